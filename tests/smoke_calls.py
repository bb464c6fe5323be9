"""A small call of each piece that test_copying.py cuts out. `m` is the file into which the piece
was pasted; what a call returns must be finite."""

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


GTA_SEG = {
    "confidence": lambda m: m.confidence(images(2, 3, 8, 8)),
    "drop_threshold": lambda m: m.drop_threshold(
        confidences(2, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool), 0.2
    ),
    "pseudo_label": lambda m: m.pseudo_label(
        labels(2, 8, 8), confidences(2, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool), 0.5
    ),
    "teacher_student_loss": lambda m: m.teacher_student_loss(
        torch.tensor(1.0), torch.tensor(2.0), 0.5
    ),
    "update": stepped,
    "ema_update": lambda m: averaged(m, "ema_update"),
    "ema_update_parameters": lambda m: averaged(m, "ema_update_parameters"),
    "reweight": lambda m: m.reweight(confidences(2, 8, 8), confidences(2, 8, 8) > 0.5, 1.0),
    "unsupervised_loss": lambda m: m.unsupervised_loss(
        images(2, 3, 8, 8), labels(2, 8, 8), confidences(2, 8, 8)
    ),
    "supervised_loss": lambda m: m.supervised_loss(images(2, 3, 8, 8), labels(2, 8, 8)),
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


GIST_RIST = {
    "upsampled_cross_entropy": lambda m: m.upsampled_cross_entropy(
        images(2, 3, 4, 4), labels(2, 16, 16)
    ),
    "mix_losses": lambda m: m.mix_losses(torch.tensor(1.0), torch.tensor(2.0), 0.25),
    "ema_update": lambda m: averaged(m, "ema_update"),
    "outputs_and_features": lambda m: m.outputs_and_features(
        *two_networks(), images(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    ),
    "consistency": lambda m: m.consistency(images(2, 4, 8, 8), images(2, 4, 8, 8), 0.5),
    "label_erase": lambda m: m.label_erase(images(2, 3, 8, 8), 0.6, 1.3),
}


def heads(m):
    """L = 2 heads, B = 2 images, Q = 5 queries, K = 3 classes, C = 4 channels, 8 x 8 cells."""
    return m.Heads(torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 4, 8, 8))


def target(m, count: int = 2):
    masks = torch.rand(count, 16, 16) > 0.5
    return m.Target(torch.arange(count) % 3, masks.to(torch.uint8))


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


GUIDED_DISTILLATION = {
    "weighted_loss": lambda m: m.weighted_loss(*torch.rand(3)),
    "batch_average": lambda m: m.batch_average(torch.rand(6), torch.ones(6), torch.tensor(6.0)),
    "criterion": criterion,
    "match": lambda m: m.match(heads(m), [target(m), target(m)], generators(), num_points=32)[0],
    "match_costs": matched_costs,
    "assign": assigned,
    "normalisers": lambda m: m.normalisers([target(m), target(m)], 5),
    "mask_losses": lambda m: m.mask_losses(
        images(3, 2, 8, 8),
        torch.rand(3, 16, 16) > 0.5,
        torch.rand(3, 2, 96, 2),
        torch.rand(3, 2, 8, 2),
    ),
    "pseudo_labels": lambda m: m.pseudo_labels(heads(m), 0.2, 1.0),
    "total_loss": lambda m: m.total_loss(torch.tensor(1.0), torch.tensor(2.0), 2.0),
    "ema_update": lambda m: averaged(m, "ema_update"),
    "blocked": lambda m: m.blocked(torch.randn(2, 5, 64)),
    "sine_positions": lambda m: m.sine_positions((4, 6), 16, torch.device("cpu")),
    "teaching_plan": lambda m: m.teaching_plan("guided", 30_000),
    "learning_rate_factor": lambda m: m.learning_rate_factor(3, 10, "poly"),
    "strong_view": lambda m: m.strong_view(picture(), np.random.default_rng(0)),
    "erase_boxes": lambda m: m.erase_boxes(picture(), np.random.default_rng(0)),
    "photometric_distortion": lambda m: m.photometric_distortion(
        picture(), np.random.default_rng(0)
    ),
}


def similarities(classes: int = 4) -> torch.Tensor:
    embeddings = torch.nn.functional.normalize(torch.randn(classes, 6), dim=1)
    return embeddings @ embeddings.T


def distribution(classes: int = 4) -> torch.Tensor:
    return torch.randn(classes, classes).softmax(1)


def measured(m):
    label = torch.randint(4, (50,))
    return m.ccece(torch.rand(50), torch.rand(50) < 0.5, label, 4)


BETTER_PSEUDO_LABELS = {
    "prototypes": lambda m: m.prototypes(torch.randn(9, 6), torch.arange(9) % 3, 4),
    "similarity_distribution": lambda m: m.similarity_distribution(
        similarities(), torch.tensor([5, 0, 1, 30]), 0.5
    ),
    "smoothed_targets": lambda m: m.smoothed_targets(distribution(), 0.1),
    "class_targets": lambda m: m.class_targets(
        "frequency", similarities(), torch.tensor([5, 0, 1, 30]), 0.1, 0.5
    ),
    "ccece": measured,
    "shrunk": lambda m: m.shrunk(
        torch.randn(4), torch.tensor([5, 0, 1, 30]), ["f", "r", "r", "f"], 10.0
    ),
    "corrected": lambda m: m.corrected(distribution(), 0.1 * torch.randn(4), 0.5),
}


CALLS = {
    "gta_seg": GTA_SEG,
    "gist_rist": GIST_RIST,
    "guided_distillation": GUIDED_DISTILLATION,
    "better_pseudo_labels": BETTER_PSEUDO_LABELS,
}
