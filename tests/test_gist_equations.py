"""gist_rist.py against its paper: each equation by loops, each search by all paths, the network by
a second one.

Expected values come from the paper (Eqs. 1 to 9, Algorithms 1 and 2, Sec. IV, Table II) and from
what the cited methods do (S4GAN, ClassMix, DeepLabV2), not from gist_rist.py."""

import copy
import itertools
import json
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import probabilities
from networks import close, same, values
from PIL import Image
from torch import Tensor, nn

import gist_rist
from common import splits
from common.distributed import World
from common.errors import UserError
from common.nodes import Nodes
from common.semantic import Batch, Picture, Segmentation
from gist_rist import Args, Discriminator, SegNet, State, Tree

CLASSES, SIZE, IGNORE, WORLD = 4, 16, 255, World()


pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


# ------------------------------------------------------------------------------------------ helpers


def settings(dataset: str = "shapes", **flags) -> Args:
    return gist_rist.preset(dataset, **{"weights": "none", "pixels": "imagenet"} | flags)


def aligned(length: int, size: int) -> Tensor:
    """(size, length): linear interpolation whose first and last sample lie on the first and last
    cell."""
    weights = torch.zeros(size, length, dtype=torch.float64)
    for y in range(size):
        place = y * (length - 1) / (size - 1) if size > 1 else 0.0
        low = min(int(place), max(length - 2, 0))
        weights[y, low] += 1 - (place - low)
        if length > 1:
            weights[y, low + 1] += place - low
    return weights


def up(z: Tensor, height: int, width: int) -> Tensor:
    return torch.einsum(
        "yi,bkij,xj->bkyx", aligned(z.shape[2], height), z.double(), aligned(z.shape[3], width)
    )


def ent(z: Tensor, label: Tensor) -> Tensor:
    """Eq. 1 with gradients, float64: the mean of -log p over the pixels that carry a label; 0
    without any."""
    z = up(z, *label.shape[-2:])
    logp, known = z - z.logsumexp(1, keepdim=True), label != IGNORE
    picked = logp.gather(1, label.clamp(max=z.shape[1] - 1)[:, None])[:, 0]
    return -(picked * known).sum() / max(int(known.sum()), 1)


def pictures(
    seed: int, count: int = 3, size: int = SIZE, padding: int = 0, ignored: float = 0.1
) -> Batch:
    """A batch as training steps get it: images in 0..255, int64 labels, the last `padding` columns
    outside."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (count, size, size), generator=g)
    label[torch.rand(label.shape, generator=g) < ignored] = IGNORE
    valid = torch.ones(count, size, size, dtype=torch.bool)
    valid[..., size - padding :] = False
    images = torch.randint(0, 256, (count, 3, size, size), generator=g).float()
    return Batch(
        images * valid[:, None], valid, label.masked_fill(~valid, IGNORE), torch.zeros(count)
    )


class Small(nn.Module):
    """Features of stride 4 from one convolution, logits from another."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 5, 4, 4), nn.ModuleList([nn.Conv2d(5, CLASSES, 1)])
        self.calls = 0

    def forward(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls, self.mode = self.calls + 1, self.training
        x = images / 64 - 2
        f = self.backbone(x if valid is None else x * valid[:, None]).relu()
        return 3 * self.head[0](f), f


def small_state(args: Args, teacher: bool = True) -> State:
    student, other = Small(), Small()
    return State(student, gist_rist.optimizer_of(student, args), other.eval() if teacher else None)


def constants(monkeypatch, **values: float) -> None:
    """Other values for numbers that have no flag."""
    for name, value in values.items():
        assert hasattr(gist_rist, name)
        monkeypatch.setattr(gist_rist, name, value)


def pooled_distance(f: Tensor, f_teacher: Tensor) -> Tensor:
    """Eqs. 6 to 8 without dropout."""
    return (f.double().mean((2, 3)) - f_teacher.double().mean((2, 3))).abs().mean()


# ---------------------------------------------------------------------------------------- Eqs. 1, 2


def test_upsampling_aligns_the_corners():
    z = torch.randn(2, 3, 5, 4)
    assert torch.allclose(gist_rist.upsample(z, (13, 9)).double(), up(z, 13, 9), atol=1e-5)


def test_cross_entropy_is_the_mean_over_labeled_pixels_of_the_batch():
    logits, label = 3 * torch.randn(3, CLASSES, 4, 3), torch.randint(0, CLASSES, (3, 13, 9))
    label[torch.rand(label.shape) < 0.3] = IGNORE
    label[1, 2:] = IGNORE  # images with unlike numbers of labels
    p, terms = probabilities(up(logits, 13, 9)), []
    for b, y, x in np.ndindex(3, 13, 9):
        if label[b, y, x] != IGNORE:
            terms.append(-np.log(p[b, label[b, y, x], y, x]))
    assert gist_rist.upsampled_cross_entropy(logits, label).item() == pytest.approx(
        np.mean(terms), rel=1e-5
    )
    assert ent(logits, label).item() == pytest.approx(np.mean(terms), rel=1e-9), (
        "the tests' own version"
    )


def test_cross_entropy_without_labels_is_zero_with_finite_gradient():
    logits = torch.randn(2, CLASSES, 3, 3, requires_grad=True)
    loss = gist_rist.upsampled_cross_entropy(logits, torch.full((2, 8, 8), IGNORE))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.75])
@pytest.mark.parametrize("on", ["both", "active"])
def test_refine_step_is_equation_2_and_the_consistency_loss(monkeypatch, alpha, on):
    """The loss, the student after one SGD step, and the teacher after Eq. 3."""
    constants(monkeypatch, CL_DROP=0.0, CL_DECAY=0.9)
    args = settings(cl=0.7, cl_on=on, lr=0.01, head_lr=10)
    s, labeled, pseudo = small_state(args), pictures(1, padding=4), pictures(2, ignored=0.5)
    student, teacher = copy.deepcopy(s.student), values(s.teacher)
    loss, terms = 0.0, {}
    for name, batch, share in (("l", labeled, alpha), ("p", pseudo, 1 - alpha)):
        if share == 0 and on == "active":
            continue
        z, f = student(batch.images, batch.valid)
        apart = pooled_distance(f, s.teacher(batch.images, batch.valid)[1].detach())
        loss = loss + share * ent(z, batch.label) + 0.7 * apart
        terms |= {f"cl_{name}": apart.item()} | (
            {f"loss_{name}": ent(z, batch.label).item()} if share else {}
        )
    loss.backward()
    with torch.no_grad():
        for part, lr in ((student.backbone, 0.01), (student.head, 0.1)):
            for p in part.parameters():
                p -= lr * (p.grad + 5e-4 * p)  # weight decay of Sec. IV

    log = gist_rist.refine_step(s, args, "P", alpha, 0, labeled, pseudo)
    assert log["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert {k: v.item() for k, v in log.items() if k in terms} == pytest.approx(terms, rel=1e-5)
    assert ("loss_l" in log) == (alpha > 0) and ("loss_p" in log) == (alpha < 1)
    assert ("cl_l" in log) == (alpha > 0 or on == "both") and ("cl_p" in log) == (
        alpha < 1 or on == "both"
    )
    assert close(values(s.student), values(student))
    after = {k: 0.9 * teacher[k] + 0.1 * values(s.student)[k] for k in teacher}
    assert close(values(s.teacher), after) and not same(values(s.teacher), teacher)
    assert all(p.grad is None for p in s.teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in s.student.parameters())


@pytest.mark.parametrize("alpha, other", [(1.0, "pseudo"), (0.0, "labeled")])
@pytest.mark.parametrize("on", ["both", "active"])
def test_a_binary_stage_never_uses_the_other_labels(monkeypatch, alpha, other, on):
    """With `both` the other images serve the consistency loss; their labels never count, with
    `active` nothing does."""
    constants(monkeypatch, CL_DROP=0.0)
    args, batches = settings(cl_on=on), {"labeled": pictures(1), "pseudo": pictures(2)}
    relabeled = batches[other]._replace(label=(batches[other].label + 1) % CLASSES)
    found = []
    for changed in (batches[other], relabeled, pictures(3)):
        torch.manual_seed(5)
        s = small_state(args)
        gist_rist.refine_step(s, args, "x", alpha, 0, **batches | {other: changed})
        found.append(values(s.student))
        assert s.student.calls == (2 if on == "both" else 1)
    assert same(found[0], found[1])
    assert same(found[0], found[2]) == (on == "active")


def test_one_source_is_enough_and_without_teacher_there_is_no_consistency_loss():
    args = settings(cl=0.0)
    for alpha, name, batches in (
        (1.0, "l", {"labeled": pictures(1)}),
        (0.0, "p", {"pseudo": pictures(1)}),
    ):
        s = small_state(args, teacher=False)
        want = ent(s.student(pictures(1).images, pictures(1).valid)[0], pictures(1).label).item()
        log = gist_rist.refine_step(s, args, "x", alpha, 0, **batches)
        assert log["loss"].item() == pytest.approx(want, rel=1e-5)
        assert set(log) == {"loss", f"loss_{name}"}
    for alpha in (1.0, 0.0, None):
        s = small_state(args, teacher=False)
        log = gist_rist.refine_step(
            s, replace(args, cl_on="both"), "B", alpha, 0, pictures(1), pictures(2)
        )
        assert s.student.calls == 1 and len(log) == 2, "images that no loss needs are not looked at"


def test_refine_step_drops_features_of_student_and_teacher(monkeypatch):
    """Eqs. 6 and 7, although the teacher is in eval mode: f = f* does not give 0."""
    args = settings()
    s = small_state(args)
    s.teacher.load_state_dict(s.student.state_dict())
    assert gist_rist.refine_step(s, args, "x", 1.0, 0, pictures(1))["cl_l"] > 0
    constants(monkeypatch, CL_DROP=0.0)
    s = small_state(args)
    s.teacher.load_state_dict(s.student.state_dict())
    assert gist_rist.refine_step(s, args, "x", 1.0, 0, pictures(1))["cl_l"] == 0


def test_batchwise_draws_one_source_per_iteration():
    """Fig. 6: alpha is 0 or 1 with equal chances, by (seed, path, step) alone."""

    def draw(args: Args, path: str, steps: int) -> str:
        s, word = small_state(args), ""
        for step in range(steps):
            log = gist_rist.refine_step(
                s, args, path, None, step, pictures(1, 2, 8), pictures(2, 2, 8)
            )
            assert ("loss_l" in log) != ("loss_p" in log)
            alone = log["loss_l" if "loss_l" in log else "loss_p"]
            assert log["loss"].item() == pytest.approx(
                alone.item() + args.cl * sum(v.item() for k, v in log.items() if k[:3] == "cl_"),
                rel=1e-5,
            )
            word += "L" if "loss_l" in log else "P"
        return word

    args = settings(cl_on="active", lr=1e-4)
    word = draw(args, "B", 300)
    assert abs(word.count("L") - 150) < 40  # 4.6 deviations
    assert abs(sum(a == b for a, b in itertools.pairwise(word)) - 149.5) < 40
    assert draw(args, "B", 30) == word[:30]
    assert draw(args, "BB", 30) != word[:30] and draw(replace(args, seed=1), "B", 30) != word[:30]


def test_ema_update_is_equation_3():
    a, b = Small(), Small()
    a.register_buffer("mean", torch.randn(3))
    b.register_buffer("mean", torch.randn(3))
    a.register_buffer("count", torch.tensor(3))
    b.register_buffer("count", torch.tensor(8))
    before, source = values(a), values(b)
    gist_rist.ema_update(a, b, 0.8)
    for name, value in values(a).items():
        want = before[name] if name == "count" else 0.8 * before[name] + 0.2 * source[name]
        assert torch.allclose(value, want, atol=1e-6), name
    assert same(values(b), source)
    gist_rist.ema_update(a, b, 0.0)
    assert all(
        torch.equal(value, source[name]) for name, value in values(a).items() if name != "count"
    )


# ---------------------------------------------------------------------------------- Eqs. 6, 7, 8, 9


def test_consistency_without_dropout_by_hand():
    f, g, total = torch.rand(3, 6, 4, 5), torch.rand(3, 6, 4, 5), 0.0
    for b, c in np.ndindex(3, 6):
        pools = [sum(x[b, c, y, z].item() for y, z in np.ndindex(4, 5)) / 20 for x in (f, g)]
        total += abs(pools[0] - pools[1])
    assert gist_rist.consistency(f, g, 0.0).item() == pytest.approx(total / 18, rel=1e-5)
    assert gist_rist.consistency(f, f, 0.0) == 0


@pytest.mark.parametrize("drop", [0.5, 0.25])
def test_consistency_of_equal_features_is_two_p_times_their_mean(drop):
    """Independent masks: E |d f - d* f| / (1 - p) = 2 p (1 - p) f / (1 - p), which is mean(f) at p
    = 0.5."""
    f = torch.rand(16, 4000, 2, 1)
    f.requires_grad_()
    loss = gist_rist.consistency(f, f.detach(), drop)
    loss.backward()
    assert loss.item() == pytest.approx(2 * drop * f.mean().item(), rel=0.02)
    # d/df: the sum over the pooled units' gradients, 1 / N each; +p of them where only the
    # teacher's unit is dropped
    assert f.grad.sum().item() == pytest.approx(drop, rel=0.03)


def test_consistency_drops_whole_pooled_units_and_scales_the_rest():
    f = torch.rand(1, 1, 7, 7)
    found = {
        round(gist_rist.consistency(f, torch.zeros_like(f), 0.5).item() / f.mean().item(), 4)
        for _ in range(40)
    }
    assert found == {0.0, 2.0}


@pytest.mark.parametrize("phi, temp", [(0.5, 1.0), (0.5, 0.2), (0.3, 0.2), (0.9, 1.0)])
def test_label_erase_is_equation_9_with_temperature_scaling(phi, temp):
    logits = 6 * torch.randn(2, 5, 7, 6)
    p, (label, conf) = probabilities(temp * logits), gist_rist.label_erase(logits, phi, temp)
    assert label.dtype == torch.int64 and label.shape == conf.shape == (2, 7, 6)
    for b, y, x in np.ndindex(2, 7, 6):
        best = p[b, :, y, x].max()
        assert conf[b, y, x].item() == pytest.approx(best, abs=1e-6)
        assert label[b, y, x] == (int(p[b, :, y, x].argmax()) if best >= phi else IGNORE)
    assert 0 < (label == IGNORE).sum() < label.numel()


def test_label_erase_keeps_a_confidence_of_exactly_phi():
    assert (gist_rist.label_erase(torch.zeros(1, 4, 2, 2), 0.25, 0.2)[0] == 0).all()
    assert (gist_rist.label_erase(torch.zeros(1, 4, 2, 2), 0.2501, 0.2)[0] == IGNORE).all()


def test_temperature_moves_no_argmax_and_lowers_the_confidence():
    logits = 9 * torch.randn(2, 6, 8, 8)
    (sharp, high), (soft, low) = (gist_rist.label_erase(logits, 0.0, temp) for temp in (1.0, 0.2))
    assert torch.equal(sharp, logits.argmax(1)) and torch.equal(soft, sharp)  # phi = 0: the argmax
    assert (low < high).all()


def test_phi_above_one_erases_everything_and_training_stays_finite():
    args = settings()
    s, images = small_state(args), pictures(1)
    label, _ = gist_rist.label_erase(up(s.student(images.images)[0], SIZE, SIZE), 1.01, 0.2)
    assert (label == IGNORE).all()
    for _ in range(3):
        log = gist_rist.refine_step(s, args, "P", 0.0, 0, None, images._replace(label=label))
    assert log["loss_p"] == 0 and all(v.isfinite() for v in log.values())
    assert all(
        v.isfinite().all() for v in [*values(s.student).values(), *values(s.teacher).values()]
    )


@pytest.mark.parametrize(
    "temp, table",
    [
        (0.2, (10.7, 13.0, 15.0, 17.0, 19.2, 21.9, 26.0, 32.0)),
        (1.0, (2.1, 2.6, 3.0, 3.4, 3.8, 4.4, 5.2, 6.4)),
    ],
)
def test_logit_gap_that_passes_label_erase(temp, table):
    """Recipe 3.6: how far the top of 21 logits must stand above a flat rest."""
    gaps = torch.arange(0, 40, 0.01, dtype=torch.float64)
    logits = torch.zeros(1, 21, 1, len(gaps), dtype=torch.float64)
    logits[0, 7, 0] = gaps
    for phi, want in zip((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.968), table, strict=True):
        kept = gist_rist.label_erase(logits, phi, temp)[0][0, 0] == 7
        assert gaps[kept][0].item() == pytest.approx(want, abs=0.061), phi
        assert kept[1:].int().diff().min() >= 0


# ------------------------------------------------------------------------------ optimizer, schedule


def test_learning_rate_factor():
    for step, total in itertools.product((0, 1, 17, 60, 99, 100), (100, 3000)):
        assert gist_rist.learning_rate_factor(step, total) == pytest.approx(
            (1 - step / total) ** 0.9
        )
    assert (
        gist_rist.learning_rate_factor(0, 3000) == 1
        and gist_rist.learning_rate_factor(3000, 3000) == 0
    )


@pytest.mark.parametrize("frozen", [True, False])
def test_every_parameter_is_once_in_the_optimizer(frozen):
    args = settings(lr=0.006, head_lr=10 / 3)
    net = SegNet(args, CLASSES)
    net.frozen = frozen
    net.train()
    (body, head) = gist_rist.optimizer_of(net, args).param_groups
    norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    listed = [id(p) for group in (body, head) for p in group["params"]]
    assert norms and len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in net.parameters()} - (norms if frozen else set())
    assert {id(p) for p in head["params"]} == {id(p) for p in net.head.parameters()} and len(
        head["params"]
    ) == 8
    assert body["lr"] == pytest.approx(0.006) and head["lr"] == pytest.approx(0.02)
    for group in (body, head):
        assert group["momentum"] == 0.9 and group["weight_decay"] == 5e-4 and not group["nesterov"]
        assert group["dampening"] == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batchnorm_is_bit_identical_after_training(frozen):
    args = settings(lr=0.01)
    net = SegNet(args, CLASSES)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
    net.frozen = frozen
    teacher = copy.deepcopy(net).requires_grad_(False).eval()
    net.eval()
    s = State(net.train(), gist_rist.optimizer_of(net, args), teacher)
    norm = {
        f"{name}.{k}"
        for name, m in net.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for k in m.state_dict()
    }
    before = values(net)
    for step in range(3):
        gist_rist.refine_step(s, args, "L", 0.5, step, pictures(1, 2, 32), pictures(2, 2, 32))
    after, of_teacher = values(net), values(teacher)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert norm and (not moved & norm if frozen else moved & norm)
    assert moved - norm == before.keys() - norm, "all else learns"
    if frozen:
        assert all(torch.equal(of_teacher[name], before[name]) for name in norm)
        assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.fixture
def handlers():
    """Runs listen to signals: put the handlers back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_fit_is_sgd_with_the_poly_schedule(tmp_path, handlers, monkeypatch):
    """K iterations by hand: lr restarts at its base, 10 times as much for the classifier, momentum
    0.9, Eq. 3 after."""
    constants(monkeypatch, CL_DROP=0.0, CL_DECAY=0.6)
    args = settings(lr=0.01, cl=0.5)
    tree = Tree(
        args,
        WORLD,
        Segmentation("x", tmp_path, ["a"] * CLASSES, {}, []),
        [],
        [],
        [],
        Nodes(tmp_path / "root", tmp_path, gist_rist.parent_of),
    )
    (tmp_path / "L").mkdir()
    s, total, seen = small_state(args), 5, []
    student, teacher, momentum = copy.deepcopy(s.student), copy.deepcopy(s.teacher), {}
    for j in range(total):
        batch = pictures(10 + j)
        z, f = student(batch.images, batch.valid)
        student.zero_grad()
        (
            ent(z, batch.label) + 0.5 * pooled_distance(f, teacher(batch.images, batch.valid)[1])
        ).backward()
        with torch.no_grad():
            for part, lr in ((student.backbone, 0.01), (student.head, 0.1)):
                for p in part.parameters():
                    step = p.grad + 5e-4 * p
                    momentum[p] = 0.9 * momentum[p] + step if p in momentum else step
                    p -= lr * (1 - j / total) ** 0.9 * momentum[p]
            for t, p in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(0.6 * t + 0.4 * p)

    def step_of(step: int, labeled: Batch) -> dict[str, Tensor]:
        seen.append([group["lr"] for group in s.opt.param_groups])
        return gist_rist.refine_step(s, args, "L", 1.0, step, labeled)

    gist_rist.fit(
        tree,
        "L",
        s,
        step_of,
        {"labeled": lambda start, stop: map(pictures, range(10, 10 + stop))},
        total,
    )
    assert [head / body for body, head in seen] == pytest.approx([10] * total)
    assert [body for body, _ in seen] == pytest.approx(
        [0.01 * (1 - j / total) ** 0.9 for j in range(total)]
    )
    assert close(values(s.student), values(student), 1e-5) and close(
        values(s.teacher), values(teacher), 1e-5
    )
    assert s.step == total


# ------------------------------------------------------------------------------------------ stage 0


def test_supervised_step_is_equation_1():
    args = settings()
    s, batch = small_state(args, teacher=False), pictures(1, padding=3)
    student = copy.deepcopy(s.student)
    loss = ent(student(batch.images, batch.valid)[0], batch.label)
    loss.backward()
    log = gist_rist.supervised_step(s, args, 0, batch)
    assert log["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for p, q in zip(s.student.parameters(), student.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


def test_classmix_mask_takes_half_of_the_classes_present():
    label = torch.randint(0, 7, (40, 6, 6))
    for i in range(40):
        label[i] %= 1 + i % 7  # 1 to 7 classes
        label[i, 0, : i % 4] = IGNORE
    scores = torch.rand(40, 7)
    given, mask = label.clone(), gist_rist.classmix_mask(label, scores)
    assert mask.dtype == torch.bool and mask.shape == label.shape and torch.equal(label, given)
    for i in range(40):
        present = sorted(set(label[i].flatten().tolist()) - {IGNORE})
        chosen = sorted(present, key=lambda k, i=i: scores[i, k].item())[: len(present) // 2]
        want = np.isin(label[i].numpy(), chosen)
        assert (mask[i].numpy() == want).all(), (i, present, chosen)
        assert not mask[i][label[i] == IGNORE].any()
        assert len(set(label[i][mask[i]].tolist())) == len(present) // 2


def test_classmix_mask_of_one_class_or_none_is_empty():
    label = torch.full((3, 4, 4), 2)
    label[1], label[2, 0] = IGNORE, IGNORE
    assert not gist_rist.classmix_mask(label, torch.rand(3, CLASSES)).any()


def test_classmix_chooses_every_class_equally_often():
    label, counts = torch.arange(5).repeat(1000, 1, 1), np.zeros(5)
    mask = gist_rist.classmix_mask(label, torch.rand(1000, 5))
    for k in range(5):
        counts[k] = mask[label == k].float().mean().item()
    assert np.abs(counts - 2 / 5).max() < 0.08 and counts.sum() == pytest.approx(2)


class Told(nn.Module):
    """A network that answers what it is told, times one learned number, and notes what it was
    shown."""

    def __init__(self, *logits: Tensor):
        super().__init__()
        self.gain, self.logits, self.shown = nn.Parameter(torch.tensor(1.0)), list(logits), []
        self.head = nn.ModuleList([nn.Conv2d(1, CLASSES, 1)])

    def forward(self, images: Tensor, valid: Tensor) -> tuple[Tensor, None]:
        self.shown.append((images.clone(), valid.clone()))
        return self.gain * self.logits[len(self.shown) - 1], None


def mixed(count: int, step: int, gain: float = 14.0, colour: bool = False, **flags):
    """One classmix_step on `count` images of one colour each: state before and after, batches, the
    log."""
    torch.manual_seed(1)
    args = settings(mix_colour=colour, **flags)
    labeled, unlabeled = pictures(1, count), pictures(2, count)
    for i in range(count):  # image i is 20 i + 10, its last i + 1 rows are padding
        unlabeled.images[i], unlabeled.valid[i, SIZE - 1 - i :] = 20 * i + 10, False
    student = Told(torch.randn(count, CLASSES, 4, 4), 2 * torch.randn(count, CLASSES, 4, 4))
    teacher = Told(gain * torch.randn(count, CLASSES, 6, 6)).requires_grad_(False).eval()
    with torch.no_grad():
        teacher.gain.fill_(0.9)
    s = State(student, torch.optim.SGD([student.gain], lr=0.1), teacher)
    before = copy.deepcopy(student)
    log = gist_rist.classmix_step(s, args, step, labeled, unlabeled)
    return args, s, before, labeled, unlabeled, log


@pytest.mark.parametrize("count, step", [(3, 0), (3, 1), (4, 2), (4, 1000), (1, 5)])
def test_classmix_step(count, step):
    """The mixture is read from the colours that the student saw; the rest follows by loops."""
    args, s, student, labeled, unlabeled, log = mixed(count, step)
    assert torch.equal(s.teacher.shown[0][0], unlabeled.images)
    p = probabilities(up(0.9 * s.teacher.logits[0], SIZE, SIZE))
    (images, valid), (clear, _) = s.student.shown[1], s.student.shown[0]
    assert torch.equal(clear, labeled.images)
    target, sure, pixels = torch.full((count, SIZE, SIZE), IGNORE), 0, 0
    for i in range(count):
        j, seen = (i + 1) % count, p[i].argmax(0)
        seen[~unlabeled.valid[i].numpy()] = IGNORE
        own = (images[i, 0] == 20 * i + 10).numpy()
        if count > 1:
            assert (images[i, 0].numpy()[~own] == 20 * j + 10).all(), (
                "pasted into the neighbour i + 1"
            )
            present, chosen = set(seen.flatten()) - {IGNORE}, set(seen[own])
            assert IGNORE not in chosen and len(chosen) == len(present) // 2 > 0
            assert (own == np.isin(seen, list(chosen))).all()
        for y, x in np.ndindex(SIZE, SIZE):
            k = i if own[y, x] else j
            assert valid[i, y, x] == unlabeled.valid[k, y, x]
            if unlabeled.valid[k, y, x]:  # padding is not learned
                target[i, y, x] = int(p[k, :, y, x].argmax())
                sure, pixels = sure + (p[k, :, y, x].max() >= 0.968), pixels + 1
    assert 0.1 < sure / pixels < 0.9
    assert log["sure"].item() == pytest.approx(sure / pixels, abs=1e-6)
    loss_l = ent(student.gain * student.logits[0], labeled.label)
    loss_u = sure / pixels * ent(student.gain * student.logits[1], target)
    assert log["loss"].item() == pytest.approx(loss_l.item(), rel=1e-5)
    assert log["loss_u"].item() == pytest.approx(loss_u.item(), rel=1e-5)
    (loss_l + loss_u).backward()
    assert s.student.gain.item() == pytest.approx(1 - 0.1 * student.gain.grad.item(), rel=1e-5)
    decay = min(1 - 1 / (step + 1), 0.99)  # 0, 1/2, 2/3, ..., 0.99
    assert s.teacher.gain.item() == pytest.approx(
        decay * 0.9 + (1 - decay) * s.student.gain.item(), rel=1e-6
    )
    if step == 0:
        assert s.teacher.gain.item() == s.student.gain.item()
    assert s.teacher.gain.grad is None


def test_classmix_classes_change_with_step_and_seed_and_repeat():
    shown = [
        mixed(3, step, seed=seed)[1].student.shown[1][0]
        for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2]) and not torch.equal(shown[0], shown[3])


def test_classmix_colour_changes_what_the_student_sees_and_nothing_else(monkeypatch):
    noisy, plain = (
        [mixed(3, step, colour=True) for step in range(4)],
        [mixed(3, step) for step in range(4)],
    )
    for (_, s, _, _, unlabeled, log), (_, other, _, _, _, other_log) in zip(
        noisy, plain, strict=True
    ):
        assert torch.equal(s.student.shown[1][1], other.student.shown[1][1])
        assert torch.equal(s.teacher.shown[0][0], unlabeled.images)
        assert log["sure"] == other_log["sure"] and log["loss_u"] == other_log["loss_u"]
    changed = [
        not torch.equal(a[1].student.shown[1][0], b[1].student.shown[1][0])
        for a, b in zip(noisy, plain, strict=True)
    ]
    assert sum(changed) >= 2  # nine times in ten
    monkeypatch.setattr(gist_rist, "jitter_and_blur", lambda images, generator: 255 - images)
    assert torch.equal(
        mixed(3, 2, colour=True)[1].student.shown[1][0], 255 - plain[2][1].student.shown[1][0]
    )


def test_classmix_without_a_sure_pixel_learns_from_labels_alone():
    _, s, student, labeled, _, log = mixed(3, 7, gain=0.01)
    assert log["sure"] == 0 and log["loss_u"] == 0
    ent(student.gain * student.logits[0], labeled.label).backward()
    assert s.student.gain.item() == pytest.approx(1 - 0.1 * student.gain.grad.item(), rel=1e-5)


# -------------------------------------------------------------------------------------------- S4GAN


def test_minmax01_stretches_the_whole_batch():
    images = torch.randint(20, 200, (3, 3, 5, 4)).float()
    low, high, found = images.min().item(), images.max().item(), gist_rist.minmax01(images)
    for place in np.ndindex(images.shape):
        assert found[place].item() == pytest.approx(
            (images[place].item() - low) / (high - low), abs=1e-6
        )
    assert found.min() == 0 and found.max() == 1
    assert gist_rist.minmax01(torch.full((1, 3, 2, 2), 7.0)).isfinite().all()


def test_discriminator_sizes():
    with torch.device("meta"):
        critic = Discriminator(21)
    assert sum(p.numel() for p in critic.parameters()) == 2_778_561
    for size, cells in (((321, 321), (20, 20)), ((256, 512), (16, 32))):
        x = torch.empty(1, 24, *size, device="meta")
        for conv in critic.convs:
            x = conv(x)
        assert x.shape == (1, 512, *cells)
        score, features = critic(torch.empty(2, 24, *size, device="meta"))
        assert score.shape == (2,) and features.shape == (2, 512)


def test_discriminator_by_hand():
    critic, x = Discriminator(CLASSES).eval(), torch.randn(3, CLASSES + 3, 33, 40)
    score, features = critic(x)
    for conv in critic.convs:
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)
        x = torch.where(x > 0, x, 0.2 * x)
    pooled = x.flatten(2).sum(2) / (x.shape[2] * x.shape[3])
    assert torch.allclose(features, pooled, atol=1e-5)
    assert torch.allclose(
        score,
        1 / (1 + torch.exp(-(pooled @ critic.score.weight[0] + critic.score.bias))),
        atol=1e-6,
    )


def test_discriminator_drops_half_of_the_first_three_layers_maps():
    critic, entered = Discriminator(CLASSES).train(), []
    for conv in critic.convs:
        conv.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    _, features = critic(torch.randn(4, CLASSES + 3, 64, 64))
    assert len(entered) == 4 and (entered[0] != 0).all()
    for x in entered[1:]:
        empty = (x == 0).flatten(2).all(2).float().mean().item()
        # whole maps
        assert 0.4 < empty < 0.6 and (x == 0).flatten(2).any(2).float().mean().item() == empty
    assert (features != 0).all()


class Judge(nn.Module):
    """A discriminator without chance: scores as told, first of predictions, then of labels, and so
    on, moved by one learned number; features by channel means."""

    def __init__(self, *scores: tuple[float, ...]):
        super().__init__()
        self.scale, self.scores, self.shown = (
            nn.Parameter(torch.tensor(0.5)),
            torch.tensor(scores).logit(),
            [],
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means, scores = x.mean((2, 3)) * self.scale, self.scores[len(self.shown) % len(self.scores)]
        self.shown.append(x.detach().clone())
        return (scores + means.sum(1) - means.sum(1).detach()).sigmoid(), means


def gan_state(args: Args, critic: nn.Module, opt=torch.optim.SGD) -> State:
    student = Small()
    return State(
        student,
        gist_rist.optimizer_of(student, args),
        critic=critic,
        opt_critic=opt(critic.parameters(), lr=1e-4),
    )


@pytest.mark.parametrize("step", [0, 1, 9])
def test_s4gan_step_by_hand(monkeypatch, step):
    constants(monkeypatch, GAN_FEATURES=0.3, GAN_SELF_TRAINING=0.8)
    args = settings(gan_gamma=0.6, lr=0.01)
    scores, scores_real = (0.7, 0.5, 0.9), (0.8, 0.65, 0.3)
    s = gan_state(args, Judge(scores, scores_real))
    labeled, unlabeled, again = pictures(1), pictures(2, padding=5), pictures(3, ignored=0.4)
    unlabeled.images.clamp_(30, 180)
    # unlike images: some have more of a class, some less
    again.label[0, 3:], again.label[1, :12] = 2, 1
    student = copy.deepcopy(s.student)

    loss_l = ent(student(labeled.images, labeled.valid)[0], labeled.label)
    z = up(student(unlabeled.images, unlabeled.valid)[0], SIZE, SIZE)
    p = probabilities(z)
    onehot = np.zeros((3, CLASSES, SIZE, SIZE))
    for b, y, x in np.ndindex(3, SIZE, SIZE):
        if again.label[b, y, x] != IGNORE:
            onehot[b, again.label[b, y, x], y, x] = 1  # all zero where ignored
    stretched = [
        (b.images - b.images.min()) / (b.images.max() - b.images.min()) for b in (unlabeled, again)
    ]
    # padding shows none
    shown, inside = z.softmax(1) * unlabeled.valid[:, None], unlabeled.valid.numpy()[:, None]
    fm = 0.0
    for k in range(CLASSES + 3):
        mean = (
            onehot[:, k].mean()
            if k < CLASSES
            else stretched[1][:, k - CLASSES].double().mean().item()
        )
        of_fake = (
            shown[:, k].mean() if k < CLASSES else stretched[0][:, k - CLASSES].double().mean()
        )
        fm = fm + (0.5 * mean - 0.5 * of_fake).abs() / (CLASSES + 3)
    label = torch.full((3, SIZE, SIZE), IGNORE)
    for b, y, x in np.ndindex(3, SIZE, SIZE):
        # whole images, without their padding
        if scores[b] > 0.6 and unlabeled.valid[b, y, x] and step > 0:
            label[b, y, x] = int(p[b, :, y, x].argmax())
    loss_st = ent(z, label)
    (loss_l + 0.3 * fm + 0.8 * loss_st).backward()
    loss_d = (-np.log1p(-np.array(scores)).mean() - np.log(scores_real).mean()) / 2

    log = gist_rist.s4gan_step(s, args, step, labeled, unlabeled, again)
    found = {k: log[k].item() for k in ("loss", "loss_fm", "loss_st", "loss_d", "trusted")}
    assert found == pytest.approx(
        {
            "loss": loss_l.item(),
            "loss_fm": fm.item(),
            "loss_st": loss_st.item(),
            "loss_d": loss_d,
            "trusted": 2 / 3,
        },
        rel=1e-4,
    )
    assert (loss_st.item() == 0) == (step == 0)
    for a, b in zip(s.student.parameters(), student.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    fake, real, fake_again, real_again = s.critic.shown
    assert torch.equal(fake, fake_again) and torch.equal(real, real_again)
    assert np.abs(fake[:, :CLASSES].numpy() - p * inside).max() < 1e-5
    assert torch.allclose(fake[:, CLASSES:], stretched[0])
    assert (real[:, :CLASSES].numpy() == onehot).all() and torch.allclose(
        real[:, CLASSES:], stretched[1]
    )


def test_s4gan_takes_any_number_of_labeled_images_again():
    """Feature matching and the discriminator's loss average over each batch by itself."""
    args = settings(gan_gamma=0.6, lr=0.01)
    for count in (1, 5):
        s = gan_state(args, Discriminator(CLASSES))
        batches = pictures(1, 2, 32), pictures(2, 3, 32), pictures(3, count, 32)
        log = gist_rist.s4gan_step(s, args, 1, *batches)
        assert all(value.isfinite() for value in log.values())


def test_s4gan_selects_strictly_above_gamma():
    args, batches = settings(gan_gamma=0.5), (pictures(1), pictures(2), pictures(3))
    s = gan_state(args, Judge((0.5, 0.5, 0.5)))  # logit 0: exactly 0.5
    log = gist_rist.s4gan_step(s, args, 3, *batches)
    assert log["loss_st"] == 0 and log["trusted"] == 0


def test_s4gan_keeps_the_two_networks_gradients_apart():
    """At the student's step the discriminator has no gradient; at the discriminator's the student's
    is what it was."""
    args, noted = settings(lr=0.01), []
    s = gan_state(args, Discriminator(CLASSES), torch.optim.Adam)

    def grads(net: nn.Module) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in net.parameters()]

    s.opt.register_step_pre_hook(
        lambda *_: noted.append(("student", grads(s.student), grads(s.critic)))
    )
    s.opt_critic.register_step_pre_hook(
        lambda *_: noted.append(("critic", grads(s.student), grads(s.critic)))
    )
    batches = [pictures(i, size=32) for i in (1, 2, 3)]
    for step in range(2):
        stale, weights = grads(s.critic), values(s.critic)
        gist_rist.s4gan_step(s, args, step, *batches)
        (first, student, critic), (second, student_after, critic_after) = noted[-2:]
        assert (first, second) == ("student", "critic")
        for old, new in zip(stale, critic, strict=True):
            assert (new is None or new.abs().sum() == 0) if old is None else torch.equal(old, new)
        assert all(torch.equal(a, b) for a, b in zip(student, student_after, strict=True))
        assert all(g is not None and g.abs().sum() > 0 for g in [*student, *critic_after])
        assert not same(weights, values(s.critic)) and all(
            p.requires_grad for p in s.critic.parameters()
        )


def test_s4gan_feature_matching_reaches_the_student(monkeypatch):
    """Without labels and trust, feature matching alone moves it."""
    batches = [pictures(i, size=32) for i in (1, 2, 3)]
    batches[0] = batches[0]._replace(label=torch.full_like(batches[0].label, IGNORE))
    for weight in (0.1, 0.0):
        constants(monkeypatch, GAN_FEATURES=weight)
        args = settings(gan_gamma=1.0)
        s = gan_state(args, Discriminator(CLASSES))
        gist_rist.s4gan_step(s, args, 1, *batches)
        assert (sum(p.grad.abs().sum() for p in s.student.parameters()) > 0) == (weight > 0)


def caught(monkeypatch, run, *args) -> SimpleNamespace:
    """What a function hands to fit(), which is not run."""

    class Enough(Exception):
        pass

    def fit(tree, path, s, step_of, streams, total):
        raise Enough(
            SimpleNamespace(
                tree=tree, path=path, s=s, step_of=step_of, streams=streams, total=total
            )
        )

    monkeypatch.setattr(gist_rist, "fit", fit)
    with pytest.raises(Enough) as found:
        run(*args)
    return found.value.args[0]


def planted(args: Args, tmp_path=None, **more) -> Tree:
    """A tree without pictures."""
    folder = tmp_path or helpers.REPO / "absent"
    data = Segmentation("x", folder, [f"class {i}" for i in range(CLASSES)], {}, [])
    return Tree(
        args, WORLD, data, [], [], [], Nodes(folder / "root", folder, gist_rist.parent_of), **more
    )


@pytest.mark.parametrize("stage0", ["supervised", "s4gan", "classmix"])
@pytest.mark.parametrize(
    "bn, weights, frozen",
    [("live", "none", False), ("live", "shapes", False), ("frozen", "shapes", True)],
)
def test_stage_0_begins_with(monkeypatch, stage0, bn, weights, frozen):
    args = settings("voc", stage0=stage0, bn=bn, backbone="test_resnet", gan_lr=3e-5)
    init = SegNet(args, CLASSES).state_dict()
    it = caught(
        monkeypatch, gist_rist.train_stage0, planted(replace(args, weights=weights), init=init)
    )
    assert (
        it.total == 25_000
        and it.path == ""
        and same(values(it.s.student), init)
        and it.s.student.frozen == frozen
    )
    assert (
        set(it.streams)
        == {
            "supervised": {"labeled"},
            "classmix": {"labeled", "unlabeled"},
            "s4gan": {"labeled", "unlabeled", "again"},
        }[stage0]
    )
    assert (it.s.teacher is not None) == (stage0 == "classmix") and (it.s.critic is not None) == (
        stage0 == "s4gan"
    )
    if stage0 == "classmix":
        assert same(values(it.s.teacher), init) and not it.s.teacher.training
        assert not any(p.requires_grad for p in it.s.teacher.parameters())
    if stage0 == "s4gan":
        group = it.s.opt_critic.param_groups[0]
        assert isinstance(it.s.opt_critic, torch.optim.Adam) and group["lr"] == 3e-5
        assert group["betas"] == (0.9, 0.99) and group["weight_decay"] == 0
        assert len(group["params"]) == len(list(it.s.critic.parameters()))


# -------------------------------------------------------------------------- a stage from its parent


@pytest.mark.parametrize(
    "on, cl, bn", [("both", 1.0, "frozen"), ("active", 1.0, "live"), ("both", 0.0, "frozen")]
)
@pytest.mark.parametrize(
    "path, alpha", [("PL", 1.0), ("LP", 0.0), ("LF0.75", 0.75), ("BB", None), ("T4L", 1.0)]
)
def test_a_stage_starts_from_copies_of_its_parent(monkeypatch, path, alpha, on, cl, bn):
    args = settings(cl=cl, cl_on=on, bn=bn, steps=77)
    theta, asked = SegNet(args, CLASSES).state_dict(), []
    before = {k: v.clone() for k, v in theta.items()}
    tree = planted(args)
    monkeypatch.setattr(tree.store, "weights", lambda parent, _: asked.append(parent) or theta)
    monkeypatch.setattr(
        gist_rist, "label_images", lambda tree, parent: asked.append(f"labels {parent}") or ([], {})
    )
    it = caught(monkeypatch, gist_rist.refine, tree, path)
    parent = {"PL": "P", "LP": "L", "LF0.75": "L", "BB": "B", "T4L": ""}[path]
    assert asked == [parent] + [f"labels {parent}"] * (alpha != 1), (
        "labels from the parent, if any are used"
    )
    assert it.total == 77 and it.s.step == 0 and not it.s.opt.state, "a fresh optimizer"
    assert it.step_of.args[2:] == (path, alpha)
    assert same(values(it.s.student), before) and it.s.student.frozen == (bn != "live")
    want = (
        {"labeled", "pseudo"}
        if on == "both" and cl or alpha not in (0, 1)
        else {"labeled" if alpha else "pseudo"}
    )
    assert set(it.streams) == want
    assert (it.s.teacher is not None) == (cl > 0)
    if cl:
        assert same(values(it.s.teacher), before) and not it.s.teacher.training
        assert not any(p.requires_grad for p in it.s.teacher.parameters())
    with torch.no_grad():
        for p in it.s.student.parameters():
            p += 1
    assert same(theta, before), "the parent's weights were changed"
    if cl:
        assert same(values(it.s.teacher), before), "teacher and student share memory"


# ------------------------------------------------------------------------------------------ network


@pytest.fixture(scope="module")
def deeplab() -> SegNet:
    """The paper's network without memory."""
    with torch.device("meta"):
        return SegNet(gist_rist.preset("voc"), 21)


def test_parameters_of_deeplab(deeplab):
    count = sum(p.numel() for p in deeplab.parameters())
    assert count == 44_048_532
    assert sum(p.numel() for p in deeplab.backbone.parameters()) == 42_500_160
    norms = [m for m in deeplab.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 104 and sum(p.numel() for m in norms for p in m.parameters()) == 105_344
    assert all(m.eps == 1e-5 for m in norms)
    convs = [m for m in deeplab.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 104 and all(m.bias is None for m in convs)
    with torch.device("meta"):
        net = SegNet(gist_rist.preset("cityscapes"), 19)
    assert sum(p.numel() for p in net.parameters()) == 43_901_068


def test_feature_sizes_of_deeplab(deeplab):
    for size, cells in (
        ((321, 321), (41, 41)),
        ((505, 505), (64, 64)),
        ((256, 512), (33, 65)),
        ((512, 1024), (65, 129)),
        ((500, 375), (63, 48)),
    ):
        f = deeplab.backbone(torch.empty(1, 3, *size, device="meta"))[-1]
        assert f.shape == (1, 2048, *cells), size
        assert all(branch(f).shape == (1, 21, *cells) for branch in deeplab.head)


def test_strides_and_dilations_of_deeplab(deeplab):
    body = deeplab.backbone
    assert body.maxpool.ceil_mode and (
        body.maxpool.kernel_size,
        body.maxpool.stride,
        body.maxpool.padding,
    ) == (3, 2, 1)
    assert body.conv1.stride == (2, 2) and body.conv1.kernel_size == (7, 7)
    assert body.layer4[0].conv2.dilation == (4, 4) and body.layer2[0].conv1.stride == (2, 2)
    for number, (blocks, stride, dilation) in enumerate(
        ((3, 1, 1), (4, 2, 1), (23, 1, 2), (3, 1, 4)), start=1
    ):
        layer = getattr(body, f"layer{number}")
        assert len(layer) == blocks
        for i, block in enumerate(layer):
            first = stride if i == 0 else 1
            assert block.conv1.stride == (
                first,
                first,
            ) and block.conv2.stride == block.conv3.stride == (1, 1)
            assert block.conv1.kernel_size == block.conv3.kernel_size == (1, 1)
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
            assert (block.downsample is not None) == (i == 0)
        assert layer[0].downsample[0].stride == (stride, stride)
    assert (
        [b.dilation[0] for b in deeplab.head]
        == [b.padding[0] for b in deeplab.head]
        == [6, 12, 18, 24]
    )
    assert all(b.kernel_size == (3, 3) and b.stride == (1, 1) for b in deeplab.head)


def caffe_resnet(w: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Layer 4 of the Caffe ResNet at stride 8, straight from its weights."""

    def bn(x: Tensor, name: str) -> Tensor:
        mean, var, gain, bias = (
            w[f"{name}.{k}"].view(1, -1, 1, 1)
            for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x = bn(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for stage, stride, dilation in ((1, 1, 1), (2, 2, 1), (3, 1, 2), (4, 1, 4)):
        for b in range(blocks[stage - 1]):
            name, by = f"layer{stage}.{b}", stride if b == 0 else 1
            y = bn(F.conv2d(x, w[f"{name}.conv1.weight"], stride=by), f"{name}.bn1").relu()
            y = bn(
                F.conv2d(y, w[f"{name}.conv2.weight"], padding=dilation, dilation=dilation),
                f"{name}.bn2",
            ).relu()
            y = bn(F.conv2d(y, w[f"{name}.conv3.weight"]), f"{name}.bn3")
            if b == 0:
                x = bn(
                    F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=by), f"{name}.downsample.1"
                )
            x = (x + y).relu()
    return x


@pytest.fixture(scope="module")
def caffe50() -> SegNet:
    """The 50-layer network of this layout, with BatchNorm that does something."""
    torch.manual_seed(3)
    net = SegNet(settings("voc", backbone="caffe_resnet50", pixels="bgr"), 21)
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, *((0.1, 0.3) if name.endswith("bn3") else (0.5, 1.0)))
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for branch in net.head:
        nn.init.normal_(branch.bias)
    return net.eval()


@torch.no_grad()
def test_deeplab_by_hand(caffe50):
    """Both outputs of the network from pixels, on a size where ceil mode shows."""
    images, valid = (
        torch.randint(0, 256, (2, 3, 64, 48)).float(),
        torch.ones(2, 64, 48, dtype=torch.bool),
    )
    valid[1, 50:], images[1, :, 50:] = False, 0
    x = torch.zeros(2, 3, 64, 48)
    # B, G, R
    for channel, (source, mean) in enumerate(
        ((2, 104.00698793), (1, 116.66876762), (0, 122.67891434))
    ):
        x[:, channel] = torch.where(valid, images[:, source] - mean, 0)
    want = caffe_resnet(caffe50.backbone.state_dict(), x, (3, 4, 6, 3))
    z = sum(
        F.conv2d(want, caffe50.head[i].weight, caffe50.head[i].bias, padding=rate, dilation=rate)
        for i, rate in enumerate((6, 12, 18, 24))
    )
    logits, f = caffe50(images, valid)
    assert f.shape == (2, 2048, 9, 7) and logits.shape == (2, 21, 9, 7)
    assert (f - want).abs().max() < 1e-5 * want.abs().max() and want.std() > 0.05 * want.abs().max()
    assert (logits - z).abs().max() < 1e-5 * z.abs().max()


def test_head_of_a_fresh_network():
    torch.manual_seed(1)
    net = SegNet(settings("voc", backbone="test_resnet", aspp_rates=(6, 12)), 21)
    assert [b.dilation[0] for b in net.head] == [6, 12]
    weights = torch.cat([b.weight.flatten() for b in net.head])
    assert (
        weights.std().item() == pytest.approx(0.01, rel=0.05) and abs(weights.mean().item()) < 5e-4
    )
    assert all((b.bias == 0).all() for b in net.head)


def test_bf16_inside_gives_float32_outside():
    net = SegNet(settings(precision="bf16"), CLASSES).eval()
    full = copy.deepcopy(net)
    full.bf16 = False
    images = pictures(1, 2, 32).images
    for a, b in zip(net(images), full(images), strict=True):
        assert a.dtype == b.dtype == torch.float32 and not torch.equal(a, b)
        assert (a - b).abs().max() < 0.1 * b.abs().max() + 1e-3


def test_the_network_does_not_see_padding():
    """Padding is the mean colour, whatever the pixels there hold."""
    net, batch = (
        SegNet(settings("voc", backbone="test_resnet", pixels="bgr"), CLASSES).eval(),
        pictures(1, 2, 32, 8),
    )
    other = batch.images.clone()
    other[..., -8:] = 99
    assert torch.equal(net(batch.images, batch.valid)[0], net(other, batch.valid)[0])
    assert not torch.equal(net(batch.images, batch.valid)[0], net(batch.images)[0])


@pytest.mark.parametrize(
    "dataset, means",
    [
        ("voc", (122.67891434, 116.66876762, 104.00698793)),
        ("cityscapes", (73.15835921, 82.90891754, 72.39239876)),
        ("shapes", (122.67891434, 116.66876762, 104.00698793)),
    ],
)
def test_scaled_pixels(dataset, means):
    images = torch.randint(0, 256, (2, 3, 5, 6)).float()
    valid = torch.rand(2, 5, 6) < 0.7
    deviations = (58.395, 57.12, 57.375)
    for pixels, order in (("bgr", (2, 1, 0)), ("rgb", (0, 1, 2)), ("imagenet", (0, 1, 2))):
        net = SegNet(settings(dataset, backbone="test_resnet", pixels=pixels), CLASSES)
        found, everywhere = net.scaled(images, valid), net.scaled(images, None)
        for b, c, y, x in np.ndindex(found.shape):
            value = images[b, order[c], y, x].item() - means[order[c]]
            if pixels == "imagenet":
                value = (images[b, c, y, x].item() - (123.675, 116.28, 103.53)[c]) / deviations[c]
            assert everywhere[b, c, y, x].item() == pytest.approx(value, abs=1e-4)
            assert found[b, c, y, x].item() == (
                everywhere[b, c, y, x].item() if valid[b, y, x] else 0
            )


# ------------------------------------------------------------------------------------- weight files


def layout(net: SegNet, kind: str) -> dict[str, Tensor]:
    """The network as files name its tensors: A flat, B `Scale.`, C kazuto1011's, D torchvision, E
    ST++."""
    body = {
        k: v
        for k, v in net.backbone.state_dict().items()
        if kind == "D" or not k.endswith("num_batches_tracked")
    }
    head = {
        f"{i}.{k}": getattr(b, k).detach()
        for i, b in enumerate(net.head)
        for k in ("weight", "bias")
    }
    if kind == "C":
        parts = {
            "conv1": "reduce.conv",
            "bn1": "reduce.bn",
            "conv2": "conv3x3.conv",
            "bn2": "conv3x3.bn",
            "conv3": "increase.conv",
            "bn3": "increase.bn",
            "downsample.0": "shortcut.conv",
            "downsample.1": "shortcut.bn",
            "": "",
        }
        named = {"fc.weight": torch.randn(91, 2048, 1, 1), "fc.bias": torch.randn(91)}
        for name, value in body.items():
            *place, last = name.split(".")
            if place[0].startswith("layer"):
                stage, block = int(place[0][-1]) + 1, int(place[1]) + 1
                named[f"base.layer{stage}.block{block}.{parts['.'.join(place[2:])]}.{last}"] = value
            else:
                named[f"base.layer1.conv1.{place[0][:-1]}.{last}"] = value
        return named | {f"base.aspp.c{k}": v for k, v in head.items()}
    if kind == "D":
        return body | {"fc.weight": torch.randn(1000, 2048), "fc.bias": torch.randn(1000)}
    if kind == "E":
        return {f"backbone.{k}": v for k, v in body.items()} | {
            f"classifier.{k}": v for k, v in head.items()
        }
    flat = body | {f"layer5.conv2d_list.{k}": v for k, v in head.items()}
    return {f"Scale.{k}": v for k, v in flat.items()} if kind == "B" else flat


def test_layout_a_has_528_tensors(deeplab):
    assert len(layout(deeplab, "A")) == 528 and len(deeplab.backbone.state_dict()) - 104 == 520


@pytest.mark.parametrize(
    "kind, pixels", [("A", "bgr"), ("B", "bgr"), ("C", "bgr"), ("D", "imagenet"), ("E", "bgr")]
)
def test_weight_files_of_every_layout_give_the_same_backbone(caffe50, tmp_path, kind, pixels):
    file = tmp_path / f"{kind}.pth"
    torch.save(
        layout(caffe50, kind) if kind != "A" else {"state_dict": layout(caffe50, kind)}, file
    )
    args = settings("voc", backbone="caffe_resnet50", weights=str(file), pixels=pixels)
    tensors, notes = gist_rist.initial_weights(args, 21)
    assert ("COCO" if pixels == "bgr" else "ImageNet, normalised RGB") in notes[0]
    for name, value in caffe50.backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensors[f"backbone.{name}"], value), name
    for i in range(4):
        found = tensors[f"head.{i}.weight"]
        assert not torch.equal(found, caffe50.head[i].weight), "the file's classifier stays out"
        assert found.std().item() == pytest.approx(0.01, rel=0.05)
        assert tensors[f"head.{i}.bias"].abs().sum() == 0
    assert tensors.keys() == caffe50.state_dict().keys()
    assert not any("left fresh" in note for note in notes if "num_batches" not in note)
    wrong = "imagenet" if pixels == "bgr" else "bgr"
    with pytest.raises(UserError, match="--pixels"):
        gist_rist.initial_weights(replace(args, pixels=wrong), 21)


@pytest.mark.parametrize("lost", ["layer3.5.bn2.running_var", "layer1.0.downsample.0.weight"])
def test_a_file_without_a_backbone_tensor_is_refused(caffe50, tmp_path, lost):
    weights = layout(caffe50, "A")
    del weights[lost]
    torch.save(weights, tmp_path / "A.pth")
    args = settings("voc", backbone="caffe_resnet50", weights=str(tmp_path / "A.pth"), pixels="bgr")
    with pytest.raises(UserError, match=lost.replace(".", r"\.")):
        gist_rist.initial_weights(args, 21)


def test_a_file_of_a_layout_that_is_not_read_is_refused(tmp_path):
    """Stages of another program (res2 to res5), and a file that is no ResNet."""
    for name in ("stem.conv1.weight", "res2.0.conv1.weight", "blocks.0.weight"):
        torch.save({name: torch.randn(64, 64, 1, 1)}, tmp_path / "X.pth")
        args = settings(
            "voc", backbone="caffe_resnet50", weights=str(tmp_path / "X.pth"), pixels="bgr"
        )
        with pytest.raises(UserError, match="lacks 265 tensors"):
            gist_rist.initial_weights(args, 21)


@pytest.mark.parametrize(
    "kept, phi, hint",
    [
        (0.199, 0.5, True),
        (0.2, 0.5, False),
        (0.98, 0.5, False),
        (0.99, 0.5, True),
        (1.0, 0.0, False),
    ],
)
def test_a_share_of_label_erase_that_says_phi_does_not_fit(kept, phi, hint):
    said = gist_rist.label_erase_notice({"kept": kept}, phi)
    assert f"kept {kept:.0%}" in said and ("--phi" in said) == hint
    assert gist_rist.label_erase_notice(None, phi) == ""


def test_the_paper_needs_a_weight_file():
    for dataset in ("voc", "cityscapes"):
        with pytest.raises(UserError, match="MS-COCO"):
            gist_rist.initial_weights(gist_rist.preset(dataset), 21)
    assert gist_rist.initial_weights(settings("voc", backbone="test_resnet"), 21) == (None, [])


@pytest.mark.parametrize("backbone", ["resnet18", "caffe_resnet50"])
def test_imagenet_weights_need_their_pixels(backbone):
    args = gist_rist.preset("voc", backbone=backbone, weights="imagenet")
    with pytest.raises(UserError, match="--pixels imagenet"):
        gist_rist.check_pixels(args, {})
    gist_rist.check_pixels(replace(args, pixels="imagenet"), {})
    gist_rist.check_pixels(replace(args, weights="none"), None)


def test_stages_that_a_file_lacks_are_cut():
    file = helpers.TEST_DATA / "weights" / "resnet18_to_layer3.pth"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    args = settings("folder", backbone="resnet18", weights=str(file))
    with pytest.raises(UserError, match="--cut 1"):
        gist_rist.initial_weights(args, CLASSES)
    args = replace(args, cut=1)
    tensors, notes = gist_rist.initial_weights(args, CLASSES)
    assert not notes
    net = SegNet(args, CLASSES)
    net.load_state_dict(tensors)
    assert not any(name.startswith("backbone.layer4") for name in tensors)
    assert net.head[0].in_channels == 256
    assert net.eval()(torch.rand(1, 3, 64, 64))[1].shape == (1, 256, 8, 8)
    for name, value in torch.load(file, weights_only=True).items():
        assert torch.equal(tensors[f"backbone.{name}"], value), name


# ----------------------------------------------------------------------------------------- searches


def toy_scores(stages: int, seed: int, ties: bool = False) -> dict[str, float]:
    """A score for every path up to `stages`."""
    g, words = np.random.default_rng(seed), [""]
    for n in range(1, stages + 1):
        words += ["".join(letters) for letters in itertools.product("LP", repeat=n)]
    return {word: float(g.integers(0, 4)) if ties else g.random() for word in words}


class Records(Nodes):
    """Nodes that lie nowhere: their weights are always there."""

    def __init__(self, **records: dict):
        super().__init__(
            helpers.REPO / "absent", helpers.REPO / "absent", gist_rist.parent_of, dict(records)
        )

    def has_weights(self, path: str) -> bool:
        return path in self.records

    def make_if_free(self, path: str, make) -> bool:
        assert path not in self.records, f"{path} was trained twice"
        assert path == "" or self.parent_of(path) in self.records, (
            f"{path} was trained before its parent"
        )
        make(path)
        return True


class Toy(Tree):
    """A tree whose nodes are trained by looking up a table."""

    def __init__(self, args: Args, table):
        super().__init__(args, WORLD, None, [], [], [], Records())
        self.table, self.trained = table, []
        self.train("")

    def train(self, path: str) -> None:
        self.trained += [path] if path else []
        self.store.records[path] = {"dev": {str(self.args.dev_size): self.table(path)}}

    def tidy(self, needed: set[str]) -> None:
        pass

    def wait(self) -> None:
        raise AssertionError("nobody else trains here")


def beam_search(scores: dict[str, float], stages: int, beam: int) -> tuple[list[list[str]], str]:
    """Algorithm 1 over a table: the children of each stage, and the best of all stages."""
    kept, levels, best = [""], [], ""
    for stage in range(1, stages + 1):
        children = [path for path in scores if len(path) == stage and path[:-1] in kept]
        levels.append(sorted(children))
        kept, rest = [], sorted(children)
        while rest and len(kept) < beam:
            top = next(path for path in rest if scores[path] == max(scores[p] for p in rest))
            kept.append(top)
            rest.remove(top)
        for path in sorted(children):
            best = path if scores[path] > scores[best] else best
    return levels, best


@pytest.mark.parametrize("beam", [1, 2, 3, 16])
def test_gist_is_beam_search(beam):
    for seed in range(30):
        scores = toy_scores(4, seed, ties=seed % 2 == 1)
        levels, best = beam_search(scores, 4, beam)

        def rank(path, scores=scores):
            return -scores[path], len(path), path

        found = list(gist_rist.gist(4, beam, rank))
        assert [sorted(kids) for kids in found] == levels, seed
        toy = Toy(settings(stages=4, beam=beam, search=("gist",)), scores.get)
        visited = gist_rist.search_all(toy)
        assert visited["gist"][0] == "" and sorted(toy.trained) == sorted(sum(levels, []))
        assert sorted(visited["gist"][1:]) == sorted(toy.trained)
        assert toy.best(visited["gist"]) == best
        if beam == 16:
            assert len(toy.trained) == 30 and scores[best] == max(scores.values())
        assert scores[best] >= scores[""], "stage 0 may be chosen, too"


@pytest.mark.parametrize("beam, trainings", [(1, 18), (2, 34), (3, 48), (5, 74)])
def test_number_of_trainings_of_gist(beam, trainings):
    """Recipe 8.2, nine stages."""
    scores = toy_scores(9, 0)
    kids = list(gist_rist.gist(9, beam, lambda path: (-scores[path], path)))
    assert len(kids) == 9 and sum(map(len, kids)) == trainings == 2 * sum(
        min(beam, 2 ** (s - 1)) for s in range(1, 10)
    )


def test_order_is_dev_then_stage_then_name():
    records = {"": 50.0, "L": 60.0, "P": 60.0, "LL": 60.0, "LP": 61.0, "LPP": 61.0}
    tree = Toy(settings(), records.get)
    for path in records:
        tree.train(path)
    assert sorted(records, key=tree.order) == ["LP", "LPP", "L", "P", "LL", ""]
    assert tree.best(["", "LL", "P", "PPP"]) == "P", (
        "P before LL, and what is not done does not count"
    )
    tree.store.records["P"]["dev"]["10"], tree.store.records["L"]["dev"]["10"] = 2.0, 1.0
    assert tree.best(["P", "L"]) == "L" and tree.best(["P", "L"], 10) == "P"
    assert tree.dev_of("P", 10) == 2.0 and tree.dev_of("P") == 60.0


def test_all_searches_share_nodes_and_train_each_once():
    def table(path: str) -> float:
        return math.sin(sum(ord(c) * (i + 3) for i, c in enumerate(path)))

    flags = dict(stages=5, beam=2, trials=4, alpha=(0.0, 1.0, 0.75), path=("LPPLL", "PB", "LPB"))
    together = Toy(settings(search=("fist", "gist", "rist", "batchwise", "path"), **flags), table)
    visited = gist_rist.search_all(together)
    union = set()
    for name in ("fist", "gist", "rist", "batchwise", "path"):
        alone = Toy(settings(search=(name,), **flags), table)
        for label, paths in gist_rist.search_all(alone).items():
            assert paths == visited[label], "a search's path depends on what runs beside it"
            union |= set(paths)
    assert set(together.trained) == union - {""} and len(together.trained) == len(union) - 1
    assert set(visited) == {"gist", "rist", "batchwise", "path", "fist 0", "fist 1", "fist 0.75"}
    assert visited["fist 1"] == ["", "L", "LL", "LLL", "LLLL", "LLLLL"], (
        "alpha = 1 is the path of labels"
    )
    assert visited["fist 0"] == ["", "P", "PP", "PPP", "PPPP", "PPPPP"]
    assert visited["fist 0.75"] == ["F0.75" * n for n in range(6)]
    assert visited["batchwise"] == ["B" * n for n in range(6)]
    assert visited["path"] == ["", "L", "LP", "LPP", "LPPL", "LPPLL", "P", "PB", "LPB"]
    assert all(len(nodes) == len(set(nodes)) for nodes in visited.values())
    rist = gist_rist.rist_paths(together.args)
    assert set(visited["rist"]) == {path[:n] for path in rist for n in range(6)}
    trained = list(together.trained)
    assert gist_rist.search_all(together) == visited and together.trained == trained, (
        "all was there"
    )


def test_one_alpha_keeps_the_plain_name():
    toy = Toy(settings(search=("fist",), stages=2, alpha=(0.75,)), lambda path: 0.0)
    assert gist_rist.search_all(toy) == {"fist": ["", "F0.75", "F0.75F0.75"]}


@pytest.mark.parametrize("alpha", [0.0001, 1 / 3, 0.9999, 1e-5])
def test_every_alpha_names_a_stage(alpha):
    toy = Toy(settings(search=("fist",), stages=3, alpha=(alpha,)), lambda path: 0.0)
    paths = gist_rist.search_all(toy)["fist"]
    assert [len(gist_rist.tokens(path)) for path in paths] == [0, 1, 2, 3]
    assert gist_rist.alpha_of(paths[1]) == pytest.approx(alpha, abs=1e-4)


@pytest.mark.parametrize("path", ["LPX", "T3LP", "F1", "lp", "F1.5", ""])
def test_words_that_are_no_paths_are_refused(path):
    plain = gist_rist.preset("shapes", search=("path",), path=("LPPLLLPPL", "F0.75F0.75", "BB"))
    gist_rist.check(plain)
    with pytest.raises(UserError, match="--path"):
        gist_rist.check(replace(plain, path=(path,)))


def test_rist_paths():
    """Algorithm 2: each stage draws alpha = 1 (L) half of the time, apart from the stages before
    it."""
    args = settings("voc", trials=2)

    def drawn() -> list[str]:
        return [p for seed in range(300) for p in gist_rist.rist_paths(replace(args, seed=seed))]

    paths = drawn()
    assert all(len(path) == 9 and set(path) <= {"L", "P"} for path in paths)
    letters = np.array([[c == "L" for c in path] for path in paths])
    assert abs(letters.mean() - 0.5) < 0.03 and np.abs(letters.mean(0) - 0.5).max() < 0.09
    assert abs((letters[:, 1:] == letters[:, :-1]).mean() - 0.5) < 0.03
    assert drawn() == paths
    assert np.mean([a == b for a, b in zip(paths[::2], paths[1::2], strict=True)]) < 0.02, (
        "trials differ"
    )
    assert len(set(paths)) > 300


def test_max_run_draws_again():
    """Recipe 3.4: a run of five is degenerate, 18.75% of all paths; a path without stays the
    same."""
    args = settings("voc", trials=800)
    plain = gist_rist.rist_paths(args)
    tidy = gist_rist.rist_paths(replace(args, max_run=4))
    runs = ["L" * 5, "P" * 5]
    assert not any(run in path for path in tidy for run in runs)
    assert any(run in path for path in tidy for run in ("L" * 4, "P" * 4)), (
        "runs of exactly four stay"
    )
    degenerate = [any(run in path for run in runs) for path in plain]
    assert abs(np.mean(degenerate) - 0.1875) < 0.06
    assert [a == b for a, b in zip(plain, tidy, strict=True)] == [not bad for bad in degenerate]
    assert gist_rist.rist_paths(replace(args, max_run=4)) == tidy


def test_independent_paths_share_no_nodes():
    args = settings("voc", independent=True, search=("rist",), trials=6)
    paths = gist_rist.rist_paths(args)
    plain = [path.removeprefix(f"T{trial}") for trial, path in enumerate(paths)]
    assert plain == gist_rist.rist_paths(replace(args, independent=False))
    toy = Toy(args, lambda path: 0.0)
    gist_rist.search_all(toy)
    assert len(toy.trained) == 54 == len(set(toy.trained))
    assert all(len(gist_rist.tokens(path)) == 9 for path in paths)


@pytest.mark.parametrize(
    "path, want",
    [
        ("LPPLL", ["L", "P", "P", "L", "L"]),
        ("", []),
        ("BBL", ["B", "B", "L"]),
        ("F0.75F0.5P", ["F0.75", "F0.5", "P"]),
        ("T3LPL", ["T3L", "P", "L"]),
        ("T12PP", ["T12P", "P"]),
        ("LF0.125B", ["L", "F0.125", "B"]),
    ],
)
def test_paths_and_their_tokens(path, want):
    tokens = gist_rist.tokens(path)
    assert tokens == want and "".join(tokens) == path
    heads = gist_rist.prefixes(path)
    assert heads == ["".join(want[:n]) for n in range(1, len(want) + 1)]
    assert [gist_rist.parent_of(head) for head in heads] == ["", *heads[:-1]][: len(heads)]
    assert gist_rist.parent_of("") == ""


def test_alpha_of_a_token():
    assert {t: gist_rist.alpha_of(t) for t in ("L", "P", "B", "F0.75", "F0.5", "T3L", "T12P")} == {
        "L": 1.0,
        "P": 0.0,
        "B": None,
        "F0.75": 0.75,
        "F0.5": 0.5,
        "T3L": 1.0,
        "T12P": 0.0,
    }


def test_node_folders_are_named_by_what_shapes_weights():
    """Recipe 8.1: what only selects is left out of the key; refinement does not touch the name of
    stage 0."""

    def keys(**flags) -> tuple[str, str]:
        tree = planted(settings("voc", **flags))
        return tuple(
            gist_rist.key_of(tree, rest, "w")
            for rest in (gist_rist.REFINE_ONLY, gist_rist.STAGE0_ONLY)
        )

    plain = keys()
    assert len(set(plain)) == 2 and keys() == plain
    for flags in (
        dict(search=("path",)),
        dict(beam=5),
        dict(trials=15),
        dict(max_run=4),
        dict(stages=3),
        dict(dev_size=9),
        dict(alpha=(0.5,)),
        dict(path=("LP",)),
        dict(workers=7),
        dict(out="x"),
        dict(keep_nodes=True),
    ):
        assert keys(**flags) == plain, flags
    for flags in (
        dict(cl=0.5),
        dict(cl_on="active"),
        dict(phi=0.7),
        dict(temp=1.0),
        dict(steps=10),
    ):
        assert keys(**flags)[0] == plain[0] and keys(**flags)[1] != plain[1], flags
    for flags in (
        dict(stage0="s4gan"),
        dict(stage0_steps=7),
        dict(gan_lr=1.0),
        dict(mix_colour=True),
        dict(eval_every=3),
    ):
        assert keys(**flags)[0] != plain[0] and keys(**flags)[1] == plain[1], flags
    for flags in (
        dict(seed=1),
        dict(lr=1.0),
        dict(head_lr=1),
        dict(batch_size=4),
        dict(crop_size=(32, 32)),
        dict(scale=(1, 1)),
        dict(backbone="resnet18"),
        dict(precision="bf16"),
    ):
        assert keys(**flags)[0] != plain[0] and keys(**flags)[1] != plain[1], flags


def test_batchnorm_names_refined_nodes_too():
    trees = [planted(settings("voc", bn=bn)) for bn in ("frozen", "live")]
    assert len({gist_rist.key_of(tree, gist_rist.STAGE0_ONLY, "w") for tree in trees}) == 2


# ----------------------------------------------------------------------------------------- settings


def test_the_papers_numbers():
    voc, city = gist_rist.preset("voc"), gist_rist.preset("cityscapes")
    for args in (voc, city):
        assert (args.lr, args.stage0_steps, args.stages) == (2.5e-4, 25_000, 9)
        assert (args.head_lr, args.dev_size, args.phi, args.temp) == (10, 50, 0.5, 0.2)
        assert tuple(args.scale) == (0.5, 1.5) and tuple(args.aspp_rates) == (6, 12, 18, 24)
        assert (args.cl, args.cl_on) == (1.0, "both")
        assert (args.beam, args.trials, args.max_run, args.backbone) == (1, 2, 0, "caffe_resnet101")
        assert (args.pixels, args.bn, args.cut) == ("bgr", "frozen", 0)
    assert (gist_rist.MOMENTUM, gist_rist.WEIGHT_DECAY) == (0.9, 5e-4)
    assert (gist_rist.CL_DECAY, gist_rist.CL_DROP) == (0.99, 0.5)
    assert (gist_rist.GAN_FEATURES, gist_rist.GAN_SELF_TRAINING) == (0.1, 1)
    assert (gist_rist.MIX_CONFIDENCE, gist_rist.MIX_DECAY) == (0.968, 0.99)
    assert (voc.batch_size, voc.crop_size, voc.steps) == (8, (321, 321), 3000)
    assert (voc.gan_lr, voc.gan_gamma, voc.mix_colour) == (1e-4, 0.6, False)
    assert (city.batch_size, city.crop_size, city.steps) == (6, (256, 512), 4000)
    assert (city.gan_lr, city.gan_gamma, city.mix_colour) == (1e-5, 0.7, True)
    assert gist_rist.CITYSCAPES == {"1/50": 59, "1/30": 100, "1/20": 148, "1/8": 371, "1/4": 743}


# ---------------------------------------------------------------------------- the report (Table II)

TABLE_2 = """
PPLLPLPLL 54.35 66.14
LPPLLLPPL 55.05 66.71
PPLLPPPLP 54.21 66.05
LPLPPLLPL 55.12 67.03
LLLLLPPP 54.43 63.75
PPPPPPLLP 50.43 64.37
PPLLLPLPL 54.00 66.02
LLPLPLLPL 55.19 66.24
LPLPLLPLP 55.29 66.63
LLLPLPPLP 54.88 65.17
PLPLPPPLP 54.64 66.40
LPPLPPLPP 54.46 66.83
LPPLLLLPP 54.67 65.61
LPPPLLLLP 54.82 66.62
LPPPLLPPL 54.64 66.61"""


ROWS = [line.split() for line in TABLE_2.split("\n")[1:]]


PATHS, DEV, VAL = [r[0] for r in ROWS], [float(r[1]) for r in ROWS], [float(r[2]) for r in ROWS]


def test_groups_of_table_2():
    assert gist_rist.group_scores(DEV, VAL, gist_rist.GROUP) == [67.03, 66.63, 66.62]
    assert gist_rist.group_scores(DEV[:14], VAL[:14], 5) == [67.03, 66.63], "full groups only"
    assert gist_rist.group_scores(DEV[:4], VAL[:4], 5) == []
    assert np.mean([67.03, 66.63, 66.62]) == pytest.approx(66.76, abs=0.005)
    assert np.std([67.03, 66.63, 66.62], ddof=1) == pytest.approx(0.23, abs=0.005)


def test_degenerate_rows_of_table_2():
    longest = [gist_rist.longest_run(path) for path in PATHS]
    assert [i + 1 for i, n in enumerate(longest) if n > 4] == [5, 6] and longest[12] == longest[
        13
    ] == 4
    assert gist_rist.longest_run("") == 0 and gist_rist.longest_run("LPLP") == 1
    assert gist_rist.rejected_share(9, 4) == 96 / 512 == 0.1875
    assert gist_rist.rejected_share(3, 1) == 6 / 8 and gist_rist.rejected_share(3, 3) == 0


@pytest.mark.parametrize(
    "n, mean, deviation",
    [
        (1, 66.01, 0.90),
        (2, 66.27, 0.73),
        (3, 66.37, 0.61),
        (4, 66.44, 0.53),
        (5, 66.48, 0.47),
        (8, 66.55, 0.31),
        (10, 66.56, 0.23),
    ],
)
def test_best_of_n_is_the_mean_over_all_subsets(n, mean, deviation):
    """Fig. 7; n = 2 is the expectation over the 105 pairs, and Table I's 66.71 was a lucky one."""
    found = gist_rist.best_of(DEV, VAL, n)
    chosen = [VAL[max(some, key=lambda i: DEV[i])] for some in itertools.combinations(range(15), n)]
    assert n != 2 or len(chosen) == 105
    assert found == pytest.approx((np.mean(chosen), np.std(chosen)), abs=1e-9)
    assert found == pytest.approx((mean, deviation), abs=0.0051)


def report_of(rows: list[int], tmp_path) -> str:
    """report.md of a RIST run with some rows of Table II."""
    tree = Tree(
        settings("voc"), WORLD, None, [], [], [], Nodes(tmp_path, tmp_path, gist_rist.parent_of)
    )
    visited = list(dict.fromkeys(PATHS[i][:n] for i in rows for n in range(len(PATHS[i]) + 1)))
    dev, val = ({PATHS[i]: scores[i] for i in rows} for scores in (DEV, VAL))
    for path in visited:
        tree.store.records[path] = {
            "stage": len(path),
            "seconds": 1.0,
            "dev": {"50": dev.get(path, 40.0)},
        }
    scored = {path: val.get(path, 50.0) for path in visited}
    results = {"visited": {"rist": visited}}
    return "\n".join(gist_rist.tables(tree, results, sorted(visited), scored))


def test_table_2_through_the_report(tmp_path):
    text = report_of(list(range(15)), tmp_path)
    assert "val 66.01 ± 0.93 over 15 paths" in text
    assert "best on dev in each group of 5: 67.03, 66.63, 66.62 (66.76 ± 0.23)" in text
    # the paper removes rows 5 and 6
    assert "(18.75% of all paths): val 66.31 ± 0.52 over 13 paths" in text
    assert (
        "| LPPLLLPPL | 9 | 55.05 | 66.71 |" in text and "| LLLLLPPP | 8 | 54.43 | 63.75 |" in text
    )
    for n, mean, deviation in (
        (1, "66.01", "0.90"),
        (2, "66.27", "0.73"),
        (5, "66.48", "0.47"),
        (10, "66.56", "0.23"),
    ):
        assert f"| {n} | {mean} | {deviation} |" in text
    # rows 1 and 2 are Table I's search of cost two
    assert "| rist | 18 | LPPLLLPPL | 9 | 55.05 | 66.71 |" in report_of([0, 1], tmp_path)
    assert "Without" not in report_of([i for i in range(15) if i not in (4, 5)], tmp_path)


def test_the_report_takes_each_path_at_the_stage_that_dev_chooses(tmp_path):
    """Sec. IV: the best refinement stage, for tables by path and for other numbers of development
    images, too."""
    dev_images = [Picture("x", tmp_path, None)] * 50
    tree = Tree(
        settings("voc"),
        WORLD,
        None,
        [],
        [],
        dev_images,
        Nodes(tmp_path, tmp_path, gist_rist.parent_of),
    )
    scores = {
        "": (50, 58, 51),
        "L": (57, 52, 66.5),
        "LP": (55, 53, 65.25),
        "P": (51, 59, 60),
        "PL": (54, 51, 64),
    }
    for path, (dev, dev_10, _) in scores.items():
        tree.store.records[path] = {
            "stage": len(path),
            "seconds": 1.0,
            "dev": {"50": dev, "25": dev, "10": dev_10},
        }
    val = {path: float(row[2]) for path, row in scores.items()}
    text = "\n".join(gist_rist.tables(tree, {"visited": {"rist": list(scores)}}, list(scores), val))
    assert "| rist | 4 | L | 1 | 57 | 66.50 |" in text
    assert "| LP | 1 | 57 | 66.50 |" in text and "| PL | 2 | 54 | 64.00 |" in text
    assert "val 65.25 ± 1.77 over 2 paths; best on dev in each group of 5: no full group" in text
    assert "| 1 | 65.25 | 1.25 |" in text and "| 2 | 66.50 | 0.00 |" in text
    assert "| 10 | P | 60.00 |" in text and "| 50 | L | 66.50 |" in text  # Table III


def test_bloat_is_a_rise_of_the_dominant_class():
    assert gist_rist.bloat([0.6, 0.55, 0.64, 0.66, 0.9]) == [False, False, False, True, True]
    assert gist_rist.bloat([0.3]) == [False]


# ------------------------------------------------------------------------------ scores and pictures


def test_dev_miou_counts_the_classes_in_the_labels():
    for seed in range(5):
        g = np.random.default_rng(seed)
        counts = g.integers(0, 50, (4, 5, 5))
        counts[:, 1] = 0  # class 1: predicted, never labeled
        counts[:, 3], counts[:, :, 3] = 0, 0  # class 3: nowhere
        counts[:, 2, 2] = 0  # class 2: labeled, never found
        total, found = counts.sum(0), []
        for k in range(5):
            if total[k].sum():
                found.append(100 * total[k, k] / (total[k].sum() + total[:, k].sum() - total[k, k]))
        assert len(found) == 3 and gist_rist.dev_miou(counts) == pytest.approx(
            np.mean(found), abs=1e-4
        )


def test_a_fraction_of_cityscapes_is_drawn_without_opening_a_label(tmp_path):
    """Its labels are empty files here. The development images are apart from the draw."""
    train = {}
    for i in range(80):
        file = tmp_path / f"{i}.png"
        file.touch()
        train[file.stem] = Picture(file.stem, file, file)
    data = Segmentation("cityscapes", tmp_path, ["a", "b"], train, [])
    args = gist_rist.preset("cityscapes", split="1/50", dev_size=10, device="cpu")
    tree, said = gist_rist.choose_pictures(args, data)
    assert [p.name for p in tree.labeled] == splits.draw(list(train), 59, 0)
    parts = [{p.name for p in part} for part in (tree.labeled, tree.dev, tree.pool)]
    assert [len(part) for part in parts] == [59, 10, 11] and len(set.union(*parts)) == 80
    assert "69 labels used in all" in said
    with pytest.raises(UserError, match="no unlabeled image"):
        gist_rist.choose_pictures(replace(args, dev_size=21), data)


def test_cityscapes_is_read_at_half_size():
    """Image bilinear with antialias, as PIL does it; the label nearest, so that no class is
    invented."""
    g = np.random.default_rng(0)
    image = np.repeat(np.repeat(g.integers(0, 256, (11, 17, 3), dtype=np.uint8), 6, 0), 6, 1)[
        :64, :100
    ]
    label = torch.from_numpy(g.choice([0, 7, 18, 255], (64, 100)).astype(np.uint8))
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    half, small = gist_rist.resized(tensor, label, settings("cityscapes").resize)
    want = np.array(Image.fromarray(image).resize((50, 32), Image.BILINEAR)).transpose(2, 0, 1)
    assert half.shape == (3, 32, 50) and half.dtype == torch.uint8
    assert np.abs(half.numpy().astype(int) - want).max() <= 1
    blocks = label.view(32, 2, 50, 2)
    assert small.shape == (32, 50) and (small[:, None, :, None] == blocks).any(3).any(1).all()
    assert any(torch.equal(small, blocks[:, y, :, x]) for y in (0, 1) for x in (0, 1))
    assert gist_rist.resized(tensor, None, 0.5)[1] is None
    for dataset in ("voc", "folder"):
        a, b = gist_rist.resized(tensor, label, settings(dataset).resize)
        assert torch.equal(a, tensor) and torch.equal(b, label)


def test_augment_scales_flips_and_crops():
    args = settings("voc", crop_size=(90, 130))
    label = (torch.arange(80)[None] // 40 * 3).expand(60, 80).to(torch.uint8)  # 0 left, 3 right
    image = (label.float() * 50 + 50).byte().expand(3, 60, 80)  # 50 left, 200 right
    factors, flips = [], 0
    for i in range(400):
        out, cut, valid = gist_rist.augment(args, image, label, np.random.default_rng(i))
        assert (
            out.shape == (3, 90, 130)
            and cut.shape == valid.shape == (90, 130)
            and valid.dtype == torch.bool
        )
        assert (
            (cut[~valid] == IGNORE).all()
            and (cut[valid] != IGNORE).all()
            and (out[:, ~valid] == 0).all()
        )
        assert (out[:, valid] >= 50).all()
        height, width = valid.any(1).sum().item(), valid.any(0).sum().item()
        assert valid.sum() == height * width and abs(height / 60 - width / 80) <= 1 / 60
        factors.append(width / 80)
        agree = (out[0].float() > 125)[valid] == (cut == 3)[valid]
        assert agree.float().mean() > 0.95, "image and label are moved together"
        flips += int(cut[valid][0] == 3)
    assert 0.49 <= min(factors) < 0.53 and 1.46 < max(factors) <= 1.5
    assert (
        abs(np.mean(factors) - 1) < 0.06
        and np.abs(np.histogram(factors, 4, (0.5, 1.5))[0] - 100).max() < 40
    )
    assert abs(flips - 200) < 50
    again = [gist_rist.augment(args, image, label, np.random.default_rng(7)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


def test_augment_crops_large_images_anywhere_and_takes_no_label():
    args = settings("voc", crop_size=(20, 24), scale=(1.0, 1.0))
    image = (torch.arange(40)[:, None] * 5 + torch.zeros(1, 50)).byte().expand(3, 40, 50)
    tops = set()
    for i in range(200):
        out, label, valid = gist_rist.augment(args, image, None, np.random.default_rng(i))
        assert valid.all() and (label == IGNORE).all()
        tops.add(out[0, 0, 0].item() // 5)
    assert tops == set(range(21))


def test_augment_halves_cityscapes_first():
    args = settings("cityscapes", crop_size=(100, 200), scale=(0.5, 0.5))
    image = torch.full((3, 128, 256), 9, dtype=torch.uint8)
    _, _, valid = gist_rist.augment(args, image, None, np.random.default_rng(0))
    assert (valid.any(1).sum(), valid.any(0).sum()) == (32, 64)


# -------------------------------------------------------------- whole images (Alg. 1, lines 6 to 8)


def picture_files(folder, sizes) -> list[Picture]:
    g, found = np.random.default_rng(0), []
    for i, (height, width) in enumerate(sizes):
        image = (
            g.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
            .repeat(4, 0)
            .repeat(4, 1)
        )
        label = g.integers(0, CLASSES, (height, width), dtype=np.uint8)
        label[:, :3] = IGNORE
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(label).save(folder / f"{i} label.png")
        found.append(Picture(str(i), folder / f"{i}.png", folder / f"{i} label.png"))
    return found


def pixels_of(picture: Picture, resize: float = 1) -> Tensor:
    with Image.open(picture.image) as file:
        image = file.convert("RGB")
        image = image.resize(
            (round(image.width * resize), round(image.height * resize)), Image.BILINEAR
        )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("dataset, resize", [("voc", 1.0), ("cityscapes", 0.5), ("voc", 0.75)])
def test_pseudo_labels_of_whole_images(tmp_path, monkeypatch, dataset, resize):
    """Equation 9 at the network's full output, as index PNGs of the files' size; unreadable images
    are left out."""
    args = settings(
        dataset, phi=0.4, temp=0.2, workers=0, **{"resize": resize} if resize == 0.75 else {}
    )
    tree, net, asked = planted(args, tmp_path), Small(), []
    with torch.no_grad():
        net.head[0].weight *= 4
    monkeypatch.setattr(tree.store, "weights", lambda path, script: asked.append(path))
    monkeypatch.setattr(tree, "network", lambda weights: net)
    sizes = [(48, 32), (48, 32), (40, 56), (48, 32)]
    tree.pool = [Picture(p.name, p.image, None) for p in picture_files(tmp_path, sizes)]
    tree.pool[1].image.write_bytes(b"broken")
    found, facts = gist_rist.label_images(tree, "LP")
    assert not net.mode, "in eval mode"
    assert [p.name for p in found] == ["0", "2", "3"] and asked == ["LP"]
    shares, kept, pixels = np.zeros(CLASSES), 0, 0
    for picture in found:
        image, label = pixels_of(picture, resize), np.array(Image.open(picture.label))
        height, width = image.shape[-2:]
        p = probabilities(0.2 * up(net(image)[0], height, width))[0]
        want = np.where(p.max(0) >= 0.4, p.argmax(0), IGNORE).astype(np.uint8)
        with Image.open(picture.image) as file:
            want = np.array(Image.fromarray(want).resize(file.size, Image.NEAREST))
        assert label.shape == want.shape
        # PIL and torch differ by a grey level
        assert (label == want).mean() > (0.97 if resize < 1 else 0.999)
        assert 0.05 < (label == IGNORE).mean() < 0.95
        kept, pixels = kept + (label != IGNORE).sum(), pixels + label.size
        shares += [(label == k).sum() for k in range(CLASSES)]
    assert facts["kept"] == pytest.approx(kept / pixels) and facts["share"] == pytest.approx(
        (shares / kept).tolist()
    )
    assert facts["dominant"] == pytest.approx(shares.max() / kept)
    assert gist_rist.label_images(tree, "LP") == (found, facts) and asked == ["LP"], "made once"


def test_scores_of_whole_images(tmp_path):
    args = settings("voc", temp=0.2, workers=0)
    tree, net = planted(args, tmp_path), Small().train()
    chosen = picture_files(tmp_path, [(48, 32)] * 3 + [(40, 56)] * 2 + [(48, 32)] * 3)
    scores = gist_rist.evaluate(net, chosen, tree.data, args, WORLD)
    gist_rist.save_scores(tmp_path / "scores.npz", scores, args.temp)
    found = np.load(tmp_path / "scores.npz")
    assert found["temps"].tolist() == [1, 0.2]
    assert not net.mode, "in eval mode"
    assert (
        found["counts"].shape == (8, CLASSES, CLASSES) and "mask5" in found and "mask6" not in found
    )
    histogram = np.zeros((2, 50))
    for i, picture in enumerate(chosen):
        z, counts = (
            up(net(pixels_of(picture))[0], *pixels_of(picture).shape[-2:]),
            np.zeros((4, 4), int),
        )
        label, guess = np.array(Image.open(picture.label)), z[0].argmax(0).numpy()
        for y, x in np.ndindex(label.shape):
            if label[y, x] != IGNORE:
                counts[label[y, x], guess[y, x]] += 1
        assert (found["counts"][i] == counts).all()
        if i < 6:
            assert (found[f"mask{i}"] == guess).all()
            for row, temp in enumerate((1.0, 0.2)):
                histogram[row] += np.histogram(probabilities(temp * z)[0].max(0), 50, (0, 1))[0]
    assert np.abs(found["confidence"] - histogram).sum() <= 4


def test_the_record_of_a_node_holds_development_scores_and_val_is_not_opened(tmp_path):
    args = settings("voc", workers=0, dev_size=2)
    tree = planted(args, tmp_path)
    tree.dev, tree.data.val = (
        picture_files(tmp_path, [(48, 32)] * 3),
        [Picture("x", tmp_path / "absent", None)],
    )
    (tmp_path / "L").mkdir()
    net = SegNet(settings(workers=0, dev_size=2), CLASSES)
    gist_rist.finish_node(tree, "L", net, {"step": 1, "steps": 1})
    record = json.loads((tmp_path / "L" / "node.json").read_text())
    counts = gist_rist.evaluate(net, tree.dev, tree.data, args, WORLD).counts
    assert record["dev"].items() >= {str(n): gist_rist.dev_miou(counts[:n]) for n in (2, 3)}.items()
    assert tree.dev_of("L") == record["dev"]["2"] and record["stage"] == 1


def test_a_run_with_another_dev_size_reads_the_same_nodes(tmp_path):
    """Table III: scores of every picture are stored, so any number of the first development images
    can choose."""
    net = SegNet(settings(), CLASSES)
    first = planted(settings("voc", workers=0, dev_size=2, dev_reserve=3), tmp_path)
    first.dev = picture_files(tmp_path, [(48, 32)] * 3)
    (tmp_path / "L").mkdir()
    gist_rist.finish_node(first, "L", net, {"step": 1, "steps": 1})
    second = planted(settings("voc", workers=0, dev_size=1, dev_reserve=3), tmp_path)
    second.dev = first.dev
    assert gist_rist.key_of(first, gist_rist.STAGE0_ONLY, "w") == gist_rist.key_of(
        second, gist_rist.STAGE0_ONLY, "w"
    )
    counts = gist_rist.evaluate(net, first.dev, first.data, first.args, WORLD).counts
    assert second.dev_of("L") == gist_rist.dev_miou(counts[:1])
