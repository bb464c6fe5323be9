"""A small call of each piece that test_copying.py cuts out. `m` is the file into which the piece
was pasted; what a call returns must be finite."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def picture() -> torch.Tensor:
    return torch.randint(256, (3, 32, 48), dtype=torch.uint8)


def labels(*shape: int, classes: int = 3) -> torch.Tensor:
    """Classes, some of them 255."""
    label = torch.randint(classes, shape)
    return label.masked_fill(torch.rand(shape) < 0.1, 255)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def averaged(m, name: str) -> list[torch.Tensor]:
    target, source = network(), network()
    before = target[0].weight.clone()
    getattr(m, name)(target, source, 0.75)
    wanted = 0.75 * before + 0.25 * source[0].weight
    assert torch.allclose(target[0].weight, wanted)
    return list(target.parameters())


def stepped(m) -> list[torch.Tensor]:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net.weight.clone()
    m.update(optimizer, net(torch.randn(4, 3)).square().mean())
    assert not torch.equal(before, net.weight)
    return list(net.parameters())


def confidences(*shape: int) -> torch.Tensor:
    return torch.rand(*shape)


def valid(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


class TinySegNet(nn.Module):
    """f and g, and logits of stride 4 with no auxiliary ones, as a network of gta_seg.py returns
    them."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8))
        self.predictor = nn.Module()
        self.predictor.classifier = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor):
        return self.predictor.classifier(self.features(x)), None


def minibatch(m):
    """Algorithm 1 on 4 labeled images and 6 larger unlabeled ones."""
    from common.distributed import World

    nets = [TinySegNet() for _ in range(3)]
    student, teacher, gta = nets
    s = SimpleNamespace(
        student=student,
        teacher=teacher.eval().requires_grad_(False),
        gta=gta,
        opt_student=torch.optim.SGD(student.parameters(), lr=0.1),
        opt_gta=torch.optim.SGD(gta.parameters(), lr=0.1),
        forward_student=student,
        forward_gta=gta,
        step=7,
        warmup=3,
    )
    args = SimpleNamespace(
        **dict(gta_data="pseudo", student_data="labeled", transfer="features", reweight="laplace"),
        **dict(alpha_gta=0.9, alpha_teacher=0.9, ramp_gta=True, ramp_teacher=True),
        **dict(mu=1.0, tau=1.0, drop=0.2, cutmix=1.0, seed=0, recipe="paper", aux=0, ohem=0),
        **dict(batch_size=4, monitor_labels=False),
    )
    labeled = SimpleNamespace(images=images(4, 3, 16, 16), label=labels(4, 16, 16))
    unlabeled = SimpleNamespace(images=images(6, 3, 24, 24), valid=valid(6, 24, 24))
    return m.train_step(s, labeled, unlabeled, args, World())


def pasted(m):
    image, label = images(4, 3, 16, 12), labels(4, 16, 12)
    boxes = m.cutmix_boxes((16, 12), [np.random.default_rng(i) for i in range(4)])
    return m.cutmix(boxes, m.neighbours(4), image, label)


def features_and_logits(m):
    net = m.Features("test_resnet", 16, (1, 2, 3), 8, False)
    features, third = net(images(2, 3, 64, 64))
    assert features.shape[:2] == (2, 16)
    return features, third


GTA_SEG = {
    "confidence": lambda m: m.confidence(images(2, 3, 8, 8)),
    "drop_threshold": lambda m: m.drop_threshold(confidences(2, 8, 8), valid(2, 8, 8), 0.2),
    "pseudo_label": lambda m: m.pseudo_label(
        labels(2, 8, 8), confidences(2, 8, 8), valid(2, 8, 8), 0.5
    ),
    "teacher_student_loss": lambda m: m.teacher_student_loss(*torch.rand(2), 0.5),
    "update": stepped,
    "ema_update": lambda m: averaged(m, "ema_update"),
    "ema_update_parameters": lambda m: averaged(m, "ema_update_parameters"),
    "reweight": lambda m: m.reweight(confidences(2, 8, 8), confidences(2, 8, 8) > 0.5, 1.0),
    "unsupervised_loss": lambda m: m.unsupervised_loss(
        images(2, 3, 8, 8), labels(2, 8, 8), confidences(2, 8, 8)
    ),
    "supervised_loss": lambda m: m.supervised_loss(images(2, 3, 8, 8), labels(2, 8, 8)),
    "hard_pixels": lambda m: m.hard_pixels(images(2, 3, 8, 8), labels(2, 8, 8), 0.7, 20),
    "learning_rate_factor": lambda m: m.learning_rate_factor(3, 10),
    "cutmix": pasted,
    "ASPP": lambda m: m.ASPP(8, 4, (1, 2, 3))(images(2, 8, 6, 6)),
    "Features": features_and_logits,
    "Predictor": lambda m: m.Predictor(8, 3, 4)(images(2, 16, 6, 6), images(2, 4, 3, 3)),
    "predict_logits": lambda m: m.predict_logits(TinySegNet().eval(), images(1, 3, 40, 24), 16),
    "train_step": minibatch,
}


def two_networks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x, valid):
            features = self.body(x * valid[:, None])
            return features[:, :3], features

    return Net(), Net()


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(6, 5, 3)

    def forward(self, x: torch.Tensor):
        features = self.body(x).mean((2, 3))
        return features[:, 0].sigmoid(), features


def gan_step(m):
    student, critic = two_networks()[0], Critic()
    s = SimpleNamespace(
        student=student,
        critic=critic,
        opt=torch.optim.SGD(student.parameters(), lr=0.001),
        opt_critic=torch.optim.SGD(critic.parameters(), lr=0.001),
    )

    def batch(count: int):
        pixels = 255 * torch.rand(count, 3, 16, 16)
        return SimpleNamespace(
            images=pixels, label=labels(count, 16, 16), valid=valid(count, 16, 16)
        )

    return m.s4gan_step(s, SimpleNamespace(gan_gamma=0.4), 5, batch(2), batch(3), batch(4))


def searched(m):
    asked = [path for paths in m.gist(3, 2, lambda path: path.count("P")) for path in paths]
    assert len(asked) == 2 + 4 + 4
    return asked


def drawn_path(m):
    path = m.rist_path(9, np.random.default_rng(0), 4)
    assert len(path) == 9 and set(path) <= {"L", "P"}


GIST_RIST = {
    "upsampled_cross_entropy": lambda m: m.upsampled_cross_entropy(
        images(2, 3, 4, 4), labels(2, 16, 16)
    ),
    "mix_losses": lambda m: m.mix_losses(*torch.rand(2), 0.25),
    "ema_update": lambda m: averaged(m, "ema_update"),
    "outputs_and_features": lambda m: m.outputs_and_features(
        *two_networks(), images(2, 3, 8, 8), valid(2, 8, 8)
    ),
    "consistency": lambda m: m.consistency(images(2, 4, 8, 8), images(2, 4, 8, 8), 0.5),
    "label_erase": lambda m: m.label_erase(images(2, 3, 8, 8), 0.6, 1.3),
    "gist": searched,
    "rist_path": drawn_path,
    "classmix_mask": lambda m: m.classmix_mask(labels(2, 8, 8), torch.rand(2, 3)),
    "s4gan_step": gan_step,
    "best_of": lambda m: m.best_of([3.0, 1.0, 2.0], [60.0, 61.0, 62.0], 2),
    "group_scores": lambda m: m.group_scores([3.0, 1.0, 2.0, 4.0], [60.0, 61.0, 62.0, 63.0], 2),
    "minmax01": lambda m: m.minmax01(images(2, 3, 8, 8)),
    "class_maps": lambda m: m.class_maps(labels(2, 8, 8), 3),
    "longest_run": lambda m: m.longest_run("LPPPL"),
    "learning_rate_factor": lambda m: m.learning_rate_factor(3, 10),
    "Discriminator": lambda m: m.Discriminator(3)(images(2, 6, 32, 32)),
    "jitter_and_blur": lambda m: m.jitter_and_blur(
        255 * torch.rand(2, 3, 32, 32), np.random.default_rng(0)
    ),
}


def heads(m):
    """L = 2 heads, B = 2 images, Q = 5 queries, K = 3 classes, C = 4 channels, 8 x 8 cells."""
    return m.Heads(torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 4, 8, 8))


def target(m, count: int = 2):
    masks = torch.rand(count, 16, 16) > 0.5
    return m.Target(torch.arange(count) % 3, masks.to(torch.uint8))


def class_map() -> np.ndarray:
    return np.array([[0, 0, 255], [2, 2, 255]], np.uint8)


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def criterion(m):
    targets = [target(m, 2), target(m, 0)]
    norms = m.normalisers(targets, 5)
    return m.criterion(heads(m), targets, norms, generators(), num_points=32)


def matched_costs(m):
    mask_embed, features = torch.randn(2, 5, 4), torch.randn(4, 8, 8)
    return m.match_costs(torch.randn(2, 5, 4), mask_embed, features, target(m), torch.rand(32, 2))


def assigned(m):
    matches, not_finite = m.assign([torch.rand(2, 5, 3), torch.rand(2, 5, 0)])
    assert not_finite == 0 and sorted(set(matches[0][0].tolist()) - {-1}) != []
    return matches


LEVELS = ((2, 3), (4, 6), (8, 12))


def tokens(width: int) -> torch.Tensor:
    return images(2, sum(h * w for h, w in LEVELS), width)


def photo(classes: tuple[int, ...]):
    """A picture with an object of each of these classes, as common/objects.py describes it."""
    from common.objects import Photo, Thing

    things = tuple(Thing(c, [np.array([[0, 0], [9, 0], [9, 9]])], False, 40.0) for c in classes)
    return Photo("a.jpg", None, 1, 32, 32, things=things)


def repeated_pictures(m):
    factors = m.repeat_factors([photo((0,)), photo((0, 1)), photo(())], 3, 0.9)
    assert len(factors) == 3 and factors.min() >= 1 and factors[1] > factors[0]
    return torch.from_numpy(factors)


GUIDED_DISTILLATION = {
    "weighted_loss": lambda m: m.weighted_loss(*torch.rand(3)),
    "batch_average": lambda m: m.batch_average(torch.rand(6), torch.ones(6), torch.tensor(6.0)),
    "criterion": criterion,
    "match": lambda m: m.match(heads(m), [target(m), target(m)], generators(), num_points=32)[0],
    "match_costs": matched_costs,
    "assign": assigned,
    "normalisers": lambda m: m.normalisers([target(m), target(m)], 5),
    "class_masks": lambda m: m.class_masks(class_map()),
    "one_mask_per_class": lambda m: m.one_mask_per_class(target(m, 5)),
    "mask_losses": lambda m: m.mask_losses(
        images(3, 2, 8, 8),
        torch.rand(3, 16, 16) > 0.5,
        torch.rand(3, 2, 96, 2),
        torch.rand(3, 2, 8, 2),
    ),
    "pseudo_labels": lambda m: m.pseudo_labels(heads(m), 0.2, 1.0),
    "total_loss": lambda m: m.total_loss(torch.tensor(1.0), torch.tensor(2.0), 2.0),
    "ema_update": lambda m: averaged(m, "ema_update"),
    "visible": lambda m: m.visible(torch.randn(2, 5, 64)),
    "sine_positions": lambda m: m.sine_positions((4, 6), 16, torch.device("cpu")),
    "teaching_plan": lambda m: m.teaching_plan("guided", 30_000),
    "learning_rate_factor": lambda m: m.learning_rate_factor(3, 10, "poly"),
    "strong_view": lambda m: m.strong_view(picture(), np.random.default_rng(0)),
    "erase_boxes": lambda m: m.erase_boxes(picture(), np.random.default_rng(0)),
    "photometric_distortion": lambda m: m.photometric_distortion(
        picture(), np.random.default_rng(0)
    ),
    "DeformableAttention": lambda m: m.DeformableAttention(16)(*[tokens(16)] * 2, LEVELS),
    "PixelDecoder": lambda m: m.PixelDecoder([4, 8, 8, 8], 32, 1)(
        [images(2, c, 32 // 2**i, 32 // 2**i) for i, c in enumerate([4, 8, 8, 8])]
    ),
    "Decoder": lambda m: m.Decoder(3, 32, 5, 3)(
        [images(2, 32, n, n) for n in (4, 8, 16)], images(2, 32, 32, 32)
    ),
    "jitter_crop": lambda m: m.jitter_crop(
        (40, 60), (32, 32), (0.5, 2.0), np.random.default_rng(0)
    ),
    "repeat_factors": repeated_pictures,
}


def similarities(classes: int = 4) -> torch.Tensor:
    embeddings = torch.nn.functional.normalize(torch.randn(classes, 6), dim=1)
    return embeddings @ embeddings.T


def distribution(classes: int = 4) -> torch.Tensor:
    return torch.randn(classes, classes).softmax(1)


def measured(m):
    label = torch.randint(4, (50,))
    return m.ccece(torch.rand(50), torch.rand(50) < 0.5, label, 4)


def an_object(m, count: int = 2, classes: int = 4):
    masks = torch.rand(count, 32, 32) > 0.5
    boxes = torch.tensor([[2.0, 3.0, 20.0, 24.0]]).repeat(count, 1)
    probs = torch.eye(classes)[torch.arange(count) % classes]
    label = torch.arange(count) % classes
    return m.Objects(label, boxes, masks, probs, probs > 0)


BETTER_PSEUDO_LABELS = {
    "prototypes": lambda m: m.prototypes(torch.randn(9, 6), torch.arange(9) % 3, 4),
    "cosines": lambda m: m.cosines(torch.randn(4, 6)),
    "similarity_distribution": lambda m: m.similarity_distribution(
        similarities(), torch.tensor([5, 0, 1, 30]), 0.5
    ),
    "smoothed_targets": lambda m: m.smoothed_targets(distribution(), 0.1),
    "class_targets": lambda m: m.class_targets(
        "similarity+freq", similarities(), torch.tensor([5, 0, 1, 30]), 0.1, 0.5
    ),
    "ccece": measured,
    "shrunk": lambda m: m.shrunk(
        torch.randn(4), torch.tensor([5, 0, 1, 30]), ["f", "r", "r", "f"], 10.0
    ),
    "corrected": lambda m: m.corrected(distribution(), 0.1 * torch.randn(4), 0.5),
    "pseudo_targets": lambda m: m.pseudo_targets(
        distribution(), "calibrated", 0.1 * torch.randn(4), 0.5
    ),
    "mask_channel": lambda m: m.mask_channel(distribution(), distribution()),
    "sigmoid_loss": lambda m: m.sigmoid_loss(
        torch.randn(5, 4), torch.rand(5, 4), torch.rand(5, 4) > 0.5
    ),
    "region_weights": lambda m: m.region_weights([torch.ones(n) > 0 for n in (3, 0, 2)]),
    "mask_targets": lambda m: m.mask_targets(
        torch.rand(2, 32, 32) > 0.5, torch.tensor([0, 1, 1]), 32 * torch.rand(3, 4)
    ),
    "known_classes": lambda m: m.known_classes(
        [an_object(m)], torch.tensor([5, 1, 1, 30]), 3, generators(1)
    ),
    "targets_of_regions": lambda m: m.targets_of_regions(torch.tensor([0, -1, 1]), an_object(m)),
    "ema_update": lambda m: averaged(m, "ema_update"),
    "learning_rate_factor": lambda m: m.learning_rate_factor(3, 10, "cosine", 0.2),
    "group_by_count": lambda m: m.group_by_count(np.array([0, 3, 5, 9, 200])),
    "windows": lambda m: m.windows(torch.randn(2, 4, 6, 5), 2),
    "unwindows": lambda m: m.unwindows(torch.randn(12, 4, 5), 2, (4, 6)),
    "decay_power": lambda m: m.decay_power("backbone.blocks.3.attn.q", 12),
    "strong_view": lambda m: m.strong_view(picture(), np.random.default_rng(0)),
    "repeat_factors": repeated_pictures,
}


CALLS = {
    "gta_seg": GTA_SEG,
    "gist_rist": GIST_RIST,
    "guided_distillation": GUIDED_DISTILLATION,
    "better_pseudo_labels": BETTER_PSEUDO_LABELS,
}
