"""gta_seg.py against its paper: each equation by loops over pixels, Algorithm 1 by a plain second
version of it.

Expected values come from the paper (Secs. 3 and 4) and from what the released code does, not from
gta_seg.py."""

import copy
import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import probabilities
from networks import same, values
from torch import Tensor, nn

import gta_seg
from common.distributed import World, rng
from common.semantic import Batch
from gta_seg import Args, Pseudo, State

CLASSES, SIZE, IGNORE, WORLD = 4, 64, 255, World()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


# ------------------------------------------------------------------------------------------ helpers


def up(logits: Tensor, size: int) -> Tensor:
    return F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=True)


def pictures(seed: int, count: int = 4, size: int = SIZE, padding: int = 0) -> Batch:
    """A prepared batch: normalised images, labels with some ignored pixels, the last `padding`
    columns outside."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=g) + 2 * torch.randn(
        count, 3, 1, 1, generator=g
    )
    label = torch.randint(0, CLASSES, (count, size, size), generator=g)
    label[torch.rand(label.shape, generator=g) < 0.1] = IGNORE
    valid = torch.ones(count, size, size, dtype=torch.bool)
    if padding:
        valid[..., -padding:] = False
    return Batch(
        images * valid[:, None], valid, label.masked_fill(~valid, IGNORE), torch.zeros(count)
    )


def settings(recipe: str = "paper", **flags) -> Args:
    """The paper's method on a network of a few thousand weights."""
    small = dict(
        weights="none",
        width=8,
        batch_size=4,
        steps=100,
        cutmix=0,
        cutmix_labeled=0,
        warmup_epochs=1,
    )
    return gta_seg.preset("shapes", recipe, **small | flags)


def plain(net: nn.Module) -> nn.Module:
    """Without dropout, so that a second pass gives the same."""
    for module in net.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    return net


def tiny(args: Args, epoch: int = 2) -> State:
    """The networks of a run after one warm-up step and the copy that ends warm-up, at the first
    step of Algorithm 1."""
    s, _ = gta_seg.build(args, CLASSES, WORLD, warmup=epoch, epoch=epoch)
    for net in s.networks().values():
        plain(net)
    s.student.train()
    warm = gta_seg.warmup_step_released if args.recipe == "released" else gta_seg.warmup_step
    warm(s, pictures(99), args, WORLD)
    gta_seg.end_of_warmup(s, args)
    s.step = s.warmup
    return s


def storages(net: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in [*net.parameters(), *net.buffers()]}


def parameter_storages(net: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in net.parameters()}


def momenta(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        optimizer.state[p]["momentum_buffer"].clone()
        for g in optimizer.param_groups
        for p in g["params"]
        if "momentum_buffer" in optimizer.state[p]
    ]


# ------------------------------------------------------------------------------ Eqs. 1, 2, Sec. 4.2


def test_confidence_is_equation_1():
    logits = 3 * torch.randn(2, 5, 4, 6)
    p, (conf, label) = probabilities(logits), gta_seg.confidence(logits)
    assert conf.shape == label.shape == (2, 4, 6) and label.dtype == torch.int64
    for b, y, x in np.ndindex(2, 4, 6):
        assert conf[b, y, x].item() == pytest.approx(max(p[b, :, y, x]), abs=1e-6)
        assert label[b, y, x].item() == int(np.argmax(p[b, :, y, x]))


def test_pseudo_label_is_equation_2_and_strict():
    conf = torch.tensor([0.2, 0.5, 0.6, 0.7, 0.9])[torch.randint(0, 5, (2, 6, 7))]
    label, valid = torch.randint(0, 9, conf.shape), torch.rand(conf.shape) < 0.7
    for gamma in (0.6, conf[0, 0, 0], torch.tensor(0.9), -1.0):
        want, given = np.full(conf.shape, IGNORE), label.clone()
        for i in np.ndindex(conf.shape):
            if valid[i] and conf[i] > torch.as_tensor(gamma, dtype=conf.dtype):
                want[i] = label[i]
        assert (gta_seg.pseudo_label(label, conf, valid, gamma).numpy() == want).all()
        assert torch.equal(given, label), "the teacher's label map was changed"


def kept_by_numpy(conf: Tensor, valid: Tensor, drop: float) -> np.ndarray:
    """The released code: drop `conf <= np.percentile(conf, 100 * drop)`, over the valid pixels."""
    c, v = conf.double().numpy(), valid.numpy()
    return v & (c > np.percentile(c[v], 100 * drop)) if v.any() else v


@pytest.mark.parametrize("drop", [0.1, 0.2, 0.25, 0.5])
def test_threshold_is_numpys_percentile_rule(drop):
    for n in range(1, 120):
        conf, valid = torch.rand(1, 1, n), torch.ones(1, 1, n, dtype=torch.bool)
        gamma = gta_seg.drop_threshold(conf, valid, drop)
        assert gamma.shape == ()
        kept = valid & (conf > gamma)
        assert (kept.numpy() == kept_by_numpy(conf, valid, drop)).all(), n
        # recipe 2.5, in counts
        assert n - kept.sum().item() == math.floor(drop * (n - 1) + 1e-9) + 1


@pytest.mark.parametrize(
    "values_", [None, [0.3, 0.5, 0.9], [0.4, 1.0]], ids=["random", "ties", "saturated ties"]
)
def test_threshold_leaves_padding_out_and_handles_ties(values_):
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        conf = torch.rand(3, 8, 9, generator=g)
        if values_:
            conf = torch.tensor(values_)[(conf * len(values_)).long()]
        valid = torch.rand(conf.shape, generator=g) < 0.6
        conf = torch.where(
            valid, conf, torch.where(torch.rand(conf.shape, generator=g) < 0.5, 0.01, 1.0)
        )
        kept = valid & (conf > gta_seg.drop_threshold(conf, valid, 0.2))
        assert (kept.numpy() == kept_by_numpy(conf, valid, 0.2)).all()


def test_threshold_without_drop_or_without_valid_pixels():
    conf, every = torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    conf[0, 0, 0] = 0
    assert (conf > gta_seg.drop_threshold(conf, every, 0)).all(), (
        "drop 0 keeps every pixel, even one of confidence 0"
    )
    gamma = gta_seg.drop_threshold(conf, ~every, 0.2)
    assert torch.isfinite(gamma) and not (~every & (conf > gamma)).any()


def test_saturated_confidence_keeps_nothing_and_costs_nothing():
    logits = torch.zeros(2, 3, 4, 5)
    logits[:, 1] = 200
    logits.requires_grad_()
    conf, label = gta_seg.confidence(logits.detach())
    assert (conf == 1).all()
    valid = torch.ones_like(label, dtype=torch.bool)
    hard = gta_seg.pseudo_label(label, conf, valid, gta_seg.drop_threshold(conf, valid, 0.2))
    assert (hard == IGNORE).all()
    weight = gta_seg.reweight(conf, hard != IGNORE, 1.0)
    loss = gta_seg.unsupervised_loss(logits, hard, weight)
    loss.backward()
    assert (weight == 0).all() and loss.item() == 0 and (logits.grad == 0).all()


# ------------------------------------------------------------------------------------ Eqs. 6, 7, 10


@pytest.mark.parametrize("tau", [1.0, 0.0, 0.25])
def test_reweight_is_equation_6(tau):
    conf, keep = torch.rand(2, 5, 6), torch.rand(2, 5, 6) < 0.8
    numerator, denominator, count = np.zeros(conf.shape), 0.0, 0
    for i in np.ndindex(conf.shape):
        if keep[i]:
            numerator[i] = conf[i].item() + tau
            denominator += conf[i].item() + tau
            count += 1
    weight = gta_seg.reweight(conf, keep, tau)
    assert np.allclose(weight.numpy(), numerator / denominator * count, atol=1e-5)
    assert weight.sum().item() == pytest.approx(count, rel=1e-5)
    assert (weight[~keep] == 0).all()


@pytest.mark.parametrize("tau", [1.0, 0.0])
def test_reweight_of_nothing_is_zero(tau):
    nothing = torch.zeros(2, 3, 4, dtype=torch.bool)
    assert torch.equal(gta_seg.reweight(torch.rand(2, 3, 4), nothing, tau), torch.zeros(2, 3, 4))
    # c = 0 where tau = 0: 0 / 0
    everything_at_zero = gta_seg.reweight(torch.zeros(2, 3, 4), ~nothing, tau)
    assert torch.isfinite(everything_at_zero).all()


def test_unsupervised_loss_is_equation_7_over_the_kept():
    logits = (2 * torch.randn(2, 4, 5, 6)).requires_grad_()
    label = torch.randint(0, 4, (2, 5, 6))
    label[torch.rand(label.shape) < 0.3] = IGNORE
    weight = torch.rand(label.shape) * (label != IGNORE)
    p, want, kept = probabilities(logits), 0.0, 0
    for b, y, x in np.ndindex(2, 5, 6):
        if label[b, y, x] != IGNORE:
            want += weight[b, y, x].item() * -math.log(p[b, label[b, y, x], y, x])
            kept += 1
    loss = gta_seg.unsupervised_loss(logits, label, weight)
    assert loss.item() == pytest.approx(want / kept, rel=1e-5)
    loss.backward()
    for b, y, x in np.ndindex(2, 5, 6):
        slope = np.zeros(4)
        if label[b, y, x] != IGNORE:
            slope = weight[b, y, x].item() / kept * (p[b, :, y, x] - np.eye(4)[label[b, y, x]])
        assert np.allclose(logits.grad[b, :, y, x].numpy(), slope, atol=1e-6)


def test_supervised_loss_is_equation_10_over_the_labeled():
    logits = 2 * torch.randn(2, 4, 5, 6)
    label = torch.randint(0, 4, (2, 5, 6))
    label[torch.rand(label.shape) < 0.3] = IGNORE
    p = probabilities(logits)
    costs = [
        -math.log(p[b, label[b, y, x], y, x])
        for b, y, x in np.ndindex(2, 5, 6)
        if label[b, y, x] != IGNORE
    ]
    assert gta_seg.supervised_loss(logits, label).item() == pytest.approx(
        sum(costs) / len(costs), rel=1e-5
    )


@pytest.mark.parametrize(
    "loss_of",
    [lambda z, y: gta_seg.unsupervised_loss(z, y, torch.zeros(y.shape)), gta_seg.supervised_loss],
    ids=["Eq. 7", "Eq. 10"],
)
def test_losses_of_nothing_are_zero_with_zero_gradient(loss_of):
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    loss = loss_of(logits, torch.full((2, 5, 6), IGNORE))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


# --------------------------------------------------------------------------------- Eqs. 3, 5, 9, 12


def test_ema_decay_is_constant_or_ramps_from_a_plain_mean_to_alpha():
    for alpha in (0.0, 0.5, 0.99, 1.0):
        for n in range(300):
            assert gta_seg.ema_decay(n, alpha, ramp=False) == alpha, "Eqs. 5, 9, 12 as printed"
            ramp = gta_seg.ema_decay(n, alpha, ramp=True)
            assert ramp == pytest.approx(min(1 - 1 / (n + 1), alpha), abs=1e-12)


def norm_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[1].running_mean.normal_()
    net[1].num_batches_tracked += 7 * seed + 1
    return net


@pytest.mark.parametrize("buffers", [False, True], ids=["Eq. 9", "Eqs. 5, 12"])
@pytest.mark.parametrize("frozen", [False, True])
def test_ema_updates_are_equations_5_9_12(buffers, frozen):
    average = gta_seg.ema_update if buffers else gta_seg.ema_update_parameters
    target = norm_net(0).requires_grad_(not frozen)
    first, places = values(target), [t.data_ptr() for t in target.state_dict().values()]
    want = {name: tensor.double().numpy() for name, tensor in first.items()}
    for n in range(5):
        source, d = norm_net(n + 1), min(1 - 1 / (n + 1), 0.7)
        given = values(source)
        average(target, source, d)
        assert same(given, values(source)), "the source was changed"
        for name, tensor in source.state_dict().items():
            if "num_batches" not in name and ("running" not in name or buffers):
                want[name] = d * want[name] + (1 - d) * tensor.double().numpy()
        for name, tensor in target.state_dict().items():
            assert np.allclose(tensor.numpy(), want[name], atol=1e-6), (n, name)
        if n == 0:
            assert all(
                torch.equal(p, q)
                for p, q in zip(target.parameters(), source.parameters(), strict=True)
            )
    assert [t.data_ptr() for t in target.state_dict().values()] == places, "not in place"
    assert buffers or torch.equal(target[1].running_mean, first["1.running_mean"])
    for p in target.parameters():
        assert p.is_leaf and p.grad_fn is None and p.requires_grad is not frozen
    assert not parameter_storages(target) & parameter_storages(source)


def flat_loss(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of -log p over labeled pixels; with weights their weighted sum over the number of
    labeled pixels."""
    cost = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    return (cost if weight is None else cost * weight).sum() / (label != IGNORE).sum()


def made_up(count: int = 4, seed: int = 5) -> Pseudo:
    u = pictures(seed, count)
    return Pseudo(u.images, u.label, torch.rand(u.label.shape) * (u.label != IGNORE), {})


def calm(net: nn.Module) -> nn.Module:
    """Train mode, with what makes one image depend on others switched off: running statistics, no
    dropout."""
    for module in plain(net).train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


@pytest.mark.parametrize("aux", [0, 0.4])
def test_loss_on_both_is_equation_3(aux):
    args = settings(mu=0.7, aux=aux)
    net, calls = calm(gta_seg.SegNet(args, CLASSES)), []
    labeled, pseudo = pictures(1), made_up()

    def forward(images: Tensor):
        calls.append(len(images))
        return net(images)

    (z_l, a_l), (z_u, _) = net(labeled.images), net(pseudo.images)
    want_l = flat_loss(up(z_l, SIZE), labeled.label) + (
        aux * flat_loss(up(a_l, SIZE), labeled.label) if aux else 0
    )
    want_u = 0.7 * flat_loss(up(z_u, SIZE), pseudo.label, pseudo.weight)
    for data, want, passes in (
        ("labeled", want_l, [4]),
        ("pseudo", want_u, [4]),
        ("both", want_l + want_u, [8]),
    ):
        calls.clear()
        got = gta_seg.loss_on(data, forward, labeled, pseudo, args, WORLD)
        assert got.item() == pytest.approx(want.item(), rel=1e-5), data
        assert calls == passes, "one forward pass"
        for a, b in zip(
            torch.autograd.grad(got, net.features.parameters(), retain_graph=True),
            torch.autograd.grad(want, net.features.parameters(), retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-5), data


# ----------------------------------------------------------------------------- OHEM, upsample, poly


def hard_by_loop(logits: Tensor, label: Tensor, thresh: float, min_kept: int) -> np.ndarray:
    p, truth = probabilities(logits), {}
    for b, y, x in np.ndindex(label.shape):
        if label[b, y, x] != IGNORE:
            truth[b, y, x] = p[b, label[b, y, x], y, x]
    limit = max(thresh, sorted(truth.values())[min_kept - 1]) if len(truth) >= min_kept else 1.0
    want = np.full(label.shape, IGNORE)
    for place, value in truth.items():
        if value <= limit + 1e-9:
            want[place] = label[place]
    return want


@pytest.mark.parametrize("min_kept", [1, 10, 40, 59, 60, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_hard_pixels_are_ohem(min_kept, ignored):
    logits, label = 2 * torch.randn(2, 3, 5, 6), torch.randint(0, 3, (2, 5, 6))
    label[torch.rand(label.shape) < ignored] = IGNORE
    for thresh in (0.05, 0.7):
        given = label.clone()
        hard = gta_seg.hard_pixels(logits, label, thresh, min_kept)
        assert (hard.numpy() == hard_by_loop(logits, label, thresh, min_kept)).all()
        assert torch.equal(given, label)


def test_cityscapes_loss_keeps_100000_pixels_or_those_below_the_threshold():
    args = settings(aux=0.4, ohem=0.7, batch_size=2)  # of two images, as on a GPU of U2PL
    label = torch.randint(0, 3, (2, 256, 256))
    label[torch.rand(label.shape) < 0.05] = IGNORE
    labeled = Batch(torch.zeros(2, 3, 256, 256), label != IGNORE, label, torch.zeros(2))
    small = F.one_hot(label.clamp(max=2), 3).permute(0, 3, 1, 2).float()[:, :, ::4, ::4]
    # mostly easy; mostly hard
    main, aux = 8 * small + torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)

    def ohem(logits: Tensor) -> float:
        p = (
            F.interpolate(logits, size=(256, 256), mode="bilinear", align_corners=True)
            .double()
            .softmax(1)
            .numpy()
        )
        truth = np.take_along_axis(p, label.clamp(max=2).numpy()[:, None], 1)[:, 0][
            label.numpy() != IGNORE
        ]
        kept = truth[truth <= max(0.7, np.sort(truth)[100000 - 1])]
        return -np.log(kept).mean(), len(kept), len(truth)

    (want, n, valid), (want_aux, n_aux, _) = ohem(main), ohem(aux)
    assert n == 100000 < n_aux < valid, "both branches of the rule occur"
    got = gta_seg.loss_on("labeled", lambda images: (main, aux), labeled, None, args, WORLD)
    assert got.item() == pytest.approx(want + 0.4 * want_aux, rel=1e-4)


def test_upsample_aligns_corners():
    logits = torch.randn(1, 2, 3, 5)
    got, want = gta_seg.upsample(logits, (9, 11)), np.zeros((1, 2, 9, 11))
    for y, x in np.ndindex(9, 11):
        v, u = y * 2 / 8, x * 4 / 10
        top, left = min(int(v), 1), min(int(u), 3)
        for i, j in np.ndindex(2, 2):
            share = abs(1 - i - (v - top)) * abs(1 - j - (u - left))
            want[0, :, y, x] += share * logits[0, :, top + i, left + j].numpy()
    assert np.allclose(got.numpy(), want, atol=1e-5)


def test_learning_rate_factor_is_the_schedule_of_section_4_2():
    for total in (1, 7, 69280):
        for t in range(0, total + 1, max(total // 7, 1)):
            assert gta_seg.learning_rate_factor(t, total) == pytest.approx(
                (1 - t / total) ** 0.9, abs=1e-12
            )
    assert gta_seg.learning_rate_factor(0, 10) == 1 and gta_seg.learning_rate_factor(10, 10) == 0


def test_decoder_learns_ten_times_faster_at_every_step():
    args = gta_seg.preset("voc", weights="none", backbone="test_resnet", width=8)
    net = gta_seg.SegNet(args, CLASSES)
    optimizer = gta_seg.optimizer_of(net, args, WORLD)
    rates = {}
    for step in (0, 5, 9, 2):  # set from the first rate, not from the last one
        gta_seg.set_learning_rates(optimizer, gta_seg.learning_rate_factor(step, 10))
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, p in net.named_parameters():
            speed = 0.001 if name.startswith("features.backbone.") else 0.01
            assert rates[p] == pytest.approx(speed * (1 - step / 10) ** 0.9), name
    assert len(rates) == len(list(net.parameters())), "each parameter once"
    assert all(
        g["momentum"] == 0.9
        and g["weight_decay"] == 1e-4
        and not g["nesterov"]
        and not g["dampening"]
        for g in optimizer.param_groups
    ), "weight decay on everything, BatchNorm and biases too"


def test_presets_have_the_settings_of_section_4_2():
    voc, city, released = (
        gta_seg.preset("voc"),
        gta_seg.preset("cityscapes"),
        gta_seg.preset("voc", "released"),
    )
    assert (voc.lr, voc.decoder_lr, voc.weight_decay, voc.crop_size, voc.epochs) == (
        0.001,
        10,
        1e-4,
        513,
        80,
    )
    assert (city.lr, city.decoder_lr, city.weight_decay, city.crop_size, city.epochs) == (
        0.01,
        1,
        5e-4,
        769,
        200,
    )
    assert (city.aux, city.ohem, city.window, voc.aux, voc.ohem) == (0.4, 0.7, 769, 0, 0)
    for a in (voc, city):
        assert (a.mu, a.tau, a.alpha_gta, a.alpha_teacher, a.drop, a.warmup_epochs) == (
            1,
            1,
            0.99,
            0.99,
            0.2,
            1,
        )
        learning = (a.gta_data, a.student_data, a.transfer, a.reweight)
        assert learning == ("pseudo", "labeled", "features", "laplace")
        assert not a.share_predictor and a.cutmix == 0.5 and a.cutmix_labeled == 0
        assert not a.ramp_gta and not a.ramp_teacher, "Eqs. 5, 9, 12 have a constant alpha"
    assert (released.alpha_gta, released.alpha_teacher, released.batch_size) == (0.999, 0.999, 12)
    assert released.ramp_gta and released.ramp_teacher


def test_the_mean_teacher_of_table_1_has_neither_cutmix_nor_equation_6():
    for dataset in ("voc", "cityscapes", "shapes", "folder"):
        mt = gta_seg.preset(dataset, method="mt")
        assert (mt.cutmix, mt.reweight) == (0, "none")
        gta = gta_seg.preset(dataset)
        assert gta.cutmix > 0 and gta.reweight == "laplace"
    assert gta_seg.preset("voc", method="mt", cutmix=0.5).cutmix == 0.5, "the row CutMix"


@pytest.mark.parametrize(
    "over, epochs, steps", [("unlabeled", 1, 649), ("labeled", 1, 11), ("unlabeled", 2, 1298)]
)
def test_an_epoch_of_the_warm_up(over, epochs, steps):
    """183 labels and 10,399 unlabeled images, 16 a step."""
    chosen = SimpleNamespace(labeled=[0] * 183, unlabeled=[0] * 10399)
    args = gta_seg.preset("voc", warmup_over=over, warmup_epochs=epochs)
    assert gta_seg.warmup_steps(chosen, args) == steps


# ------------------------------------------------------------------------------------------- CutMix


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (47, 47), (48, 65), (513, 513)])
def test_boxes_have_half_the_area_and_lie_inside(size):
    height, width = size
    boxes = gta_seg.cutmix_boxes(size, [rng(3, "box", i) for i in range(400)])
    assert boxes.shape == (400, 4)
    at_border, widths = [0, 0, 0, 0], set()
    for top, bottom, left, right in boxes.tolist():
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        h, w = bottom - top, right - left
        assert abs(h * w - height * width / 2) <= max(w, height) / 2, (
            "half the image, up to rounding the height"
        )
        assert width // 2 <= w <= width - 1
        widths.add(w)
        for side, touched in enumerate((top == 0, bottom == height, left == 0, right == width)):
            at_border[side] += touched and (h < height if side < 2 else w < width)
    assert len(widths) > 0.9 * min(width // 2, 100), "widths are uniform"
    assert min(widths) < width * 0.55 and max(widths) > width * 0.95
    assert size[0] > 100 or min(at_border) > 0, "every border is reached"
    assert len({tuple(b) for b in boxes.tolist()}) > 100


def test_cutmix_pastes_unmixed_originals_alike_into_every_map():
    images, label = torch.rand(4, 3, 9, 11), torch.randint(0, 5, (4, 9, 11))
    conf, valid = torch.rand(4, 9, 11), torch.rand(4, 9, 11) < 0.5
    boxes = torch.tensor([[0, 5, 2, 10], [3, 9, 0, 8], [1, 8, 4, 11], [0, 9, 0, 5]])
    partner = torch.tensor([1, 2, 3, 0])  # a cycle: mixed partners would show
    maps = [images, label, conf, valid]
    given = [m.clone() for m in maps]
    mixed = gta_seg.cutmix(boxes, partner, *maps)
    assert len(mixed) == 4
    for before, after in zip(given, mixed, strict=True):
        assert after.dtype == before.dtype and after.shape == before.shape
        for i, y, x in np.ndindex(4, 9, 11):
            top, bottom, left, right = boxes[i].tolist()
            source = partner[i] if top <= y < bottom and left <= x < right else i
            assert torch.equal(after[i, ..., y, x], before[source, ..., y, x])
    assert all(torch.equal(a, b) for a, b in zip(given, maps, strict=True)), (
        "the originals were changed"
    )


def provenance(count: int, size: int = 24) -> tuple[Tensor, Tensor]:
    """Images and a label map in which every pixel says which image it comes from."""
    own = torch.arange(count)[:, None, None].expand(count, size, size)
    return own[:, None].expand(-1, 3, -1, -1).float().clone(), own.clone()


def test_mix_pairs_each_image_with_another_and_one_coin_rules_the_step():
    args, mixed_steps, seen = settings(seed=1), 0, set()
    for step in range(60):
        images, label = gta_seg.mix(0.5, "unlabeled", args, step, WORLD, *provenance(4, 64))
        assert torch.equal(images[:, 0].long(), label), "one box for images and labels"
        foreign = [(label[i] != i) for i in range(4)]
        assert len({f.any().item() for f in foreign}) == 1, "all images or none"
        if not foreign[0].any():
            continue
        mixed_steps += 1
        for i, f in enumerate(foreign):
            assert set(label[i][f].tolist()) == {i ^ 1}, "the box shows the neighbour's original"
            assert abs(f.sum().item() - 64 * 64 / 2) <= 32, "half of the image"
            rows, columns = f.any(1).nonzero().flatten(), f.any(0).nonzero().flatten()
            assert f.sum() == len(rows) * len(columns), "one axis-aligned box"
            seen.add(tuple(f.flatten().tolist()))
    assert 18 <= mixed_steps <= 42, "a fair coin"
    assert len(seen) > 0.9 * 4 * mixed_steps, "each image and step has its own box"
    for probability, expected in ((0, False), (1, True)):
        for step in range(10):
            _, label = gta_seg.mix(probability, "unlabeled", args, step, WORLD, *provenance(4))
            assert (label[0] != 0).any().item() is expected


def test_mix_depends_on_seed_step_and_sample_alone():
    def mixed(
        step: int, world: World, seed: int = 0, name: str = "unlabeled", maps=None, probability=0.5
    ) -> Tensor:
        return gta_seg.mix(
            probability, name, settings(seed=seed), step, world, *(maps or provenance(4))
        )[1]

    def part(rank: int) -> list[Tensor]:
        return [m[2 * rank : 2 * rank + 2] for m in provenance(4)]

    for step in range(12):
        alone = mixed(step, WORLD)
        torch.manual_seed(step)
        np.random.seed(step)
        assert torch.equal(alone, mixed(step, WORLD)), (
            "the same again, whatever other random numbers were drawn"
        )
        two = torch.cat([mixed(step, World(rank, 2), maps=part(rank)) for rank in range(2)])
        assert torch.equal(alone, two), "the same on two processes"
    for other in ({"seed": 1}, {"name": "labeled"}):
        assert any(
            (mixed(t, WORLD) == provenance(4)[1]).all()
            != (mixed(t, WORLD, **other) == provenance(4)[1]).all()
            for t in range(12)
        ), "another coin"
        assert (mixed(0, WORLD, probability=1) != mixed(0, WORLD, probability=1, **other)).any(), (
            "other boxes"
        )


def test_neighbours_swap_and_an_odd_batch_loses_nobody():
    for count in range(1, 8):
        partner = gta_seg.neighbours(count).tolist()
        for i in range(count):
            assert partner[i] == (i ^ 1 if i ^ 1 < count else 0)
            assert count == 1 or partner[i] != i, "an image is mixed with another one"


@pytest.mark.parametrize("count", [1, 3, 5])
def test_mix_takes_odd_batches(count):
    images, label = gta_seg.mix(1.0, "u", settings(), 0, WORLD, *provenance(count))
    assert torch.equal(images[:, 0].long(), label)
    for i, partner in enumerate(gta_seg.neighbours(count).tolist()):
        assert set(label[i].flatten().tolist()) == {i, partner}


def test_mix_of_the_released_recipe_takes_the_next_image():
    _, label = gta_seg.mix(1, "unlabeled", settings("released"), 0, WORLD, *provenance(3))
    for i in range(3):
        assert set(label[i].flatten().tolist()) == {i, (i + 1) % 3}


def test_prepare_normalises_and_pads_with_the_mean_and_labels_are_mixed_too():
    g = torch.Generator().manual_seed(0)
    raw = Batch(
        torch.randint(0, 256, (4, 3, 8, 8), generator=g, dtype=torch.uint8),
        torch.ones(4, 8, 8, dtype=torch.bool),
        torch.randint(0, 4, (4, 8, 8), generator=g, dtype=torch.uint8),
        torch.zeros(4),
    )
    raw.valid[..., 6:] = False
    raw.label[..., 6:] = IGNORE
    got = gta_seg.prepare(raw, WORLD)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for b, c, y, x in np.ndindex(4, 3, 8, 8):
        want = (raw.images[b, c, y, x].item() - mean[c]) / std[c] if raw.valid[b, y, x] else 0
        assert got.images[b, c, y, x].item() == pytest.approx(want, abs=1e-4)
    assert got.label.dtype == torch.int64 and torch.equal(got.label, raw.label.long())
    mixed = gta_seg.mix_labeled(got, settings(cutmix_labeled=1.0), 0, WORLD)
    for i, y, x in np.ndindex(4, 8, 8):
        sources = [
            j for j in (i, i ^ 1) if torch.equal(mixed.images[i, :, y, x], got.images[j, :, y, x])
        ]
        assert any(mixed.label[i, y, x] == got.label[j, y, x] for j in sources)
    assert (mixed.images != got.images).flatten(1).any(1).all()


# ------------------------------------------------------------------------------------ step 1: teach


class Colours(nn.Module):
    """A network whose logits are the image's channels at every fourth pixel: no image depends on
    another."""

    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.gain * images[:, :, ::4, ::4], None


def expected_pseudo(
    origin: np.ndarray, unlabeled: Batch, args: Args
) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo labels and weights of mixed images, where `origin` (B, H, W) says which image shows at
    a pixel."""
    p = probabilities(up(unlabeled.images[:, :, ::4, ::4], SIZE))
    conf, best, inside = (
        np.zeros(origin.shape),
        np.zeros(origin.shape, int),
        np.zeros(origin.shape, bool),
    )
    for i, y, x in np.ndindex(origin.shape):
        source = origin[i, y, x]
        conf[i, y, x], best[i, y, x] = p[source, :, y, x].max(), p[source, :, y, x].argmax()
        inside[i, y, x] = unlabeled.valid[source, y, x]
    ordered = np.sort(conf[inside])
    gamma = ordered[math.floor(args.drop * (len(ordered) - 1))]
    keep = inside & (conf > gamma + 1e-9)
    weight = keep * (conf + args.tau if args.reweight == "laplace" else np.ones_like(conf))
    return np.where(keep, best, IGNORE), weight / weight.sum() * keep.sum()


def noise() -> Batch:
    """Four unlabeled images in which every pixel is unlike any other; some columns or rows count as
    padding."""
    batch = pictures(7)
    batch.valid[0::2, :, -16:] = False
    batch.valid[1::2, :24] = False
    return batch


FLAGS = [
    {},
    {"cutmix": 1.0},
    {"tau": 0.0},
    {"reweight": "none"},
    {"tau": 0.3, "cutmix": 1.0},
    {"drop": 0.5, "cutmix": 1.0},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_teach_labels_clean_images_and_mixes_everything_alike(flags):
    args, unlabeled = settings(**flags), noise()
    given = [t.clone() for t in unlabeled]
    pseudo = gta_seg.teach(Colours().eval(), unlabeled, args, 3, WORLD)
    if args.cutmix:
        own, foreign = (
            (pseudo.images == unlabeled.images[order]).all(1)
            for order in ([0, 1, 2, 3], [1, 0, 3, 2])
        )
        assert (own ^ foreign).all() and foreign.flatten(1).any(1).all()
        origin = np.array([np.where(foreign[i], i ^ 1, i) for i in range(4)])
    else:
        assert torch.equal(pseudo.images, unlabeled.images)
        origin = np.arange(4)[:, None, None].repeat(SIZE, 1).repeat(SIZE, 2)
    label, weight = expected_pseudo(origin, unlabeled, args)
    assert (pseudo.label.numpy() == label).all()
    assert np.allclose(pseudo.weight.numpy(), weight, atol=1e-4)
    assert not pseudo.weight.requires_grad and all(
        torch.equal(a, b) for a, b in zip(given, unlabeled, strict=True)
    )
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in pseudo.log.values())


def test_teach_runs_the_teacher_as_it_is_for_validation():
    args = settings(cutmix=1.0)
    s, seen = tiny(args), []
    s.teacher.register_forward_pre_hook(
        lambda net, given: seen.append((net.training, torch.is_grad_enabled(), given[0].clone()))
    )
    before, unlabeled = values(s.teacher), pictures(3)
    gta_seg.teach(s.teacher, unlabeled, args, 0, WORLD)
    assert len(seen) == 1 and seen[0][:2] == (False, False), (
        "one pass in eval mode, without a graph"
    )
    assert torch.equal(seen[0][2], unlabeled.images), "on clean images"
    assert same(before, values(s.teacher)), "the teacher's statistics moved"


# --------------------------------------------------------- one process and two: the sums are global


@dataclass(frozen=True)
class Thread(World):
    """A process of two that is a thread: real collectives, no process group."""

    table: list = field(default_factory=list)
    meeting: threading.Barrier | None = None

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        self.table[self.rank] = tensor.detach().clone()
        self.meeting.wait()
        parts = list(self.table)
        self.meeting.wait()
        return parts

    def sum(self, tensor: Tensor) -> Tensor:
        return sum(self.exchange(tensor))

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self.exchange(tensor))


def in_two(run) -> list:
    table, meeting = [None, None], threading.Barrier(2, timeout=20)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, Thread(rank, 2, table=table, meeting=meeting)) for rank in range(2)
        ]
        errors = [job.exception() for job in jobs]
        for error in sorted(
            (e for e in errors if e), key=lambda e: isinstance(e, threading.BrokenBarrierError)
        ):
            raise error
        return [job.result() for job in jobs]


def half(batch: tuple, rank: int) -> tuple:
    return type(batch)(*(t[2 * rank : 2 * rank + 2] if isinstance(t, Tensor) else t for t in batch))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_threshold_and_weights_belong_to_the_global_batch(flags):
    args, unlabeled = settings(**flags), noise()
    unlabeled.images[2:] *= 0.3  # the second process is far less sure
    alone = gta_seg.teach(Colours(), unlabeled, args, 3, WORLD)
    parts = in_two(
        lambda world: gta_seg.teach(Colours(), half(unlabeled, world.rank), args, 3, world)
    )
    assert torch.equal(alone.images, torch.cat([p.images for p in parts]))
    assert torch.equal(alone.label, torch.cat([p.label for p in parts]))
    assert torch.allclose(alone.weight, torch.cat([p.weight for p in parts]), atol=1e-5)


def test_hard_pixels_are_those_of_the_global_batch():
    logits, label = 2 * torch.randn(4, 3, 5, 6), torch.randint(0, 3, (4, 5, 6))
    logits[2:] *= 0.1  # the second process has the hard ones
    label[0, :4] = IGNORE
    for min_kept in (10, 50, 200):
        parts = in_two(
            lambda world, k=min_kept: gta_seg.hard_pixels(
                logits[2 * world.rank : 2 * world.rank + 2],
                label[2 * world.rank : 2 * world.rank + 2],
                0.1,
                k,
                world.gather,
            )
        )
        assert (torch.cat(parts).numpy() == hard_by_loop(logits, label, 0.1, min_kept)).all()


@pytest.mark.parametrize("data", ["labeled", "pseudo", "both"])
@pytest.mark.parametrize("ohem", [0, 0.7])
def test_gradients_averaged_over_processes_are_those_of_the_global_loss(data, ohem):
    args, labeled, pseudo = settings(mu=0.7, ohem=ohem), pictures(1), made_up()
    labeled.label[labeled.label == 3] = 0
    pseudo.label[pseudo.label == 3] = 0  # Colours knows three classes
    labeled.label[0, :40] = IGNORE
    # unequal shares
    pseudo.label[3] = pseudo.label[3].masked_fill(torch.rand(SIZE, SIZE) < 0.9, IGNORE)

    def slope(world: World, rank: int | None = None) -> Tensor:
        net = Colours(2.0)
        batches = [b if rank is None else half(b, rank) for b in (labeled, pseudo)]
        gta_seg.loss_on(data, net, *batches, args, world).backward()
        return net.gain.grad

    one = slope(WORLD)
    two = in_two(lambda world: slope(world, world.rank))
    assert one.item() != 0
    assert (two[0] + two[1]).item() / 2 == pytest.approx(one.item(), rel=1e-4)


# -------------------------------------------------------------------- Algorithm 1, a second version


class Descent:
    """Eqs. 4, 8, 11 with momentum 0.9 and weight decay on every parameter (Sec. 4.2), in place."""

    def __init__(self, net: nn.Module, args: Args):
        self.net, self.args, self.speed = net, args, {}

    def __call__(self, loss: Tensor) -> None:
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        for name, p, slope in zip(
            names, parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            slope = slope + self.args.weight_decay * p.detach()
            self.speed[name] = 0.9 * self.speed[name] + slope if name in self.speed else slope
            factor = 1 if name.startswith("features.backbone.") else self.args.decoder_lr
            p.data.sub_(self.args.lr * factor * self.speed[name])


class Reference:
    """The three networks and the step of the recipe's Sec. 2.3, one operation after the other."""

    def __init__(self, s: State, args: Args):
        self.args, self.n = args, 0
        self.student, self.teacher, self.gta = (
            n and copy.deepcopy(n) for n in (s.student, s.teacher, s.gta)
        )
        if args.share_predictor:
            for p, q in zip(
                self.gta.predictor.parameters(), self.student.predictor.parameters(), strict=True
            ):
                p.data = q.data
        self.learn_student, self.learn_gta = (
            Descent(self.student, args),
            Descent(self.gta, args) if self.gta else None,
        )
        # of the warm-up step
        self.learn_student.speed = {
            name: s.opt_student.state[p]["momentum_buffer"].clone()
            for name, p in s.student.named_parameters()
        }

    def decay(self, alpha: float, ramp: bool) -> float:
        return min(1 - 1 / (self.n + 1), alpha) if ramp else alpha

    def logits(self, net: nn.Module, images: Tensor) -> Tensor:
        return up(net(images)[0], SIZE)

    def pseudo(self, unlabeled: Batch) -> tuple[Tensor, Tensor]:
        args = self.args
        with torch.no_grad():
            p = self.logits(self.teacher.eval(), unlabeled.images).softmax(1).numpy()
        conf, label, valid = p.max(1), p.argmax(1), unlabeled.valid.numpy()
        keep = valid & (conf > np.percentile(conf[valid].astype(float), 100 * args.drop))
        raw = (conf + args.tau if args.reweight == "laplace" else np.ones_like(conf)) * keep
        return torch.from_numpy(np.where(keep, label, IGNORE)), torch.from_numpy(
            raw / raw.sum() * keep.sum()
        ).float()

    def loss(
        self,
        net: nn.Module,
        data: str,
        labeled: Batch,
        unlabeled: Batch,
        label: Tensor,
        weight: Tensor,
    ):
        if data == "both":
            z_l, z_u = self.logits(net, torch.cat([labeled.images, unlabeled.images])).split(
                len(labeled.images)
            )
        else:
            z_l = z_u = self.logits(net, labeled.images if data == "labeled" else unlabeled.images)
        total = 0
        if data != "pseudo":
            total = total + flat_loss(z_l, labeled.label)
        if data != "labeled":
            total = total + self.args.mu * flat_loss(z_u, label, weight)
        return total

    def step(self, labeled: Batch, unlabeled: Batch) -> None:
        args, batches = self.args, (labeled, unlabeled, *self.pseudo(unlabeled))  # Eqs. 1, 2, 6
        if self.gta is not None:
            self.learn_gta(self.loss(self.gta, args.gta_data, *batches))  # Eqs. 7, 8
            d = self.decay(args.alpha_gta, args.ramp_gta)
            mine = dict(self.student.named_parameters())
            for name, p in self.gta.named_parameters():  # Eq. 9
                if args.transfer == "all" or name.startswith("features."):
                    mine[name].data.copy_(d * mine[name].data + (1 - d) * p.data)
        # 10, 11
        self.learn_student(
            self.loss(self.student, args.student_data if self.gta else "both", *batches)
        )
        d, theirs = self.decay(args.alpha_teacher, args.ramp_teacher), self.student.state_dict()
        for name, tensor in self.teacher.state_dict().items():  # Eqs. 5, 12
            if tensor.is_floating_point():
                tensor.copy_(d * tensor + (1 - d) * theirs[name])
        self.n += 1

    def compare(self, s: State, where: object) -> None:
        """Networks and momenta agree; then go on from exactly theirs, so that no rounding adds up
        over steps."""
        for name, net in s.networks().items():
            mine = getattr(self, name).state_dict()
            for key, tensor in net.state_dict().items():
                assert torch.allclose(tensor.float(), mine[key].float(), rtol=1e-3, atol=2e-5), (
                    where,
                    name,
                    key,
                )
            getattr(self, name).load_state_dict(net.state_dict())
        for learn, optimizer in ((self.learn_student, s.opt_student), (self.learn_gta, s.opt_gta)):
            for name, p in (
                (s.student if learn is self.learn_student else s.gta).named_parameters()
                if learn
                else ()
            ):
                theirs = optimizer.state[p]["momentum_buffer"]
                assert torch.allclose(learn.speed[name], theirs, rtol=1e-2, atol=1e-3), (
                    where,
                    "momentum",
                    name,
                )
                learn.speed[name] = theirs.clone()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"mu": 0.5, "tau": 0.3, "drop": 0.5},
        {"ramp_gta": True},
        {"ramp_teacher": True},
        {"share_predictor": True},
        {"transfer": "all"},
        {"gta_data": "labeled", "student_data": "pseudo"},
        {"gta_data": "both", "mu": 2.0},
        {"reweight": "none"},
        {"method": "mt"},
        {"method": "mt", "ramp_teacher": True, "reweight": "laplace", "mu": 0.5},
        {"alpha_gta": 1.0, "alpha_teacher": 0.0},
    ],
    ids=str,
)
def test_three_steps_are_algorithm_1(flags):
    args = settings(**dict(alpha_gta=0.3, alpha_teacher=0.6) | flags)
    s = tiny(args)
    reference = Reference(s, args)
    step_of = gta_seg.mean_teacher_step if args.method == "mt" else gta_seg.train_step
    for n in range(3):
        labeled, unlabeled = pictures(10 + n), pictures(20 + n, padding=16)
        reference.step(labeled, unlabeled)
        losses = step_of(s, labeled, unlabeled, args, WORLD)
        s.step += 1
        reference.compare(s, n)
        assert all(math.isfinite(float(value)) for value in losses.values())


def test_labels_of_unlabeled_images_teach_nothing():
    args = settings(monitor_labels=True, cutmix=1.0)
    ends = []
    for shift in (0, 1):
        s, unlabeled = tiny(args), pictures(2)
        gta_seg.train_step(
            s,
            pictures(1),
            unlabeled._replace(label=(unlabeled.label + shift) % CLASSES),
            args,
            WORLD,
        )
        ends.append([values(net) for net in s.networks().values()])
    assert all(same(a, b) for a, b in zip(*ends, strict=True))


# ----------------------------------------------------------------------------- who learns from what


class Record:
    """What train_step does to the networks, event by event, with the values before and after."""

    def __init__(self, monkeypatch, s: State):
        self.s, self.events = s, []
        self.gradients, self.moving = (
            {"student": set(), "gta": set()},
            {"student": set(), "gta": set()},
        )
        for name in ("update", "ema_update", "ema_update_parameters", "ema_rebind"):
            monkeypatch.setattr(gta_seg, name, self.wrap(name, getattr(gta_seg, name)))

    def name(self, module: nn.Module) -> str:
        for name, net in self.s.networks().items():
            for part, inner in net.named_modules():
                if inner is module:
                    return f"{name}.{part}".rstrip(".")
        raise AssertionError("neither network nor part of one")

    def state(self) -> dict:
        return {
            "networks": {name: values(net) for name, net in self.s.networks().items()},
            "momenta": {
                name: momenta(getattr(self.s, f"opt_{name}")) for name in ("student", "gta")
            },
        }

    def wrap(self, kind: str, call):
        def wrapped(*given, **flags):
            before = self.state()
            result = call(*given, **flags)
            if kind == "update":
                what = "update " + ("gta" if given[0] is self.s.opt_gta else "student")
                assert given[0] in (self.s.opt_gta, self.s.opt_student)
            else:
                what = f"ema {self.name(given[0])} <- {self.name(given[1])}"
            for name in self.gradients:
                for key, p in getattr(self.s, name).named_parameters():
                    if p.grad is not None:
                        self.gradients[name].add(key)
                        self.moving[name] |= {key} if p.grad.any() else set()
            self.events.append((what, before, self.state(), given, flags))
            return result

        return wrapped


def test_who_learns_from_what(monkeypatch):
    args = settings(cutmix=0.5, alpha_gta=0.3, alpha_teacher=0.6)
    s = tiny(args)
    record = Record(monkeypatch, s)
    for n in range(3):
        record.events.clear()
        gta_seg.train_step(s, pictures(n), pictures(n + 50), args, WORLD)
        s.step += 1
        assert [event[0] for event in record.events] == [
            "update gta",
            "ema student.features <- gta.features",
            "update student",
            "ema teacher <- student",
        ]
        assistant, transfer, student, teacher = record.events
        decays = [(event[3] + tuple(event[4].values()))[2] for event in (transfer, teacher)]
        assert decays == [0.3, 0.6]
        _, before, after, _, _ = assistant
        for name in ("student", "teacher"):
            assert same(before["networks"][name], after["networks"][name]), (
                "not the assistant alone learnt"
            )
        assert not same(before["networks"]["gta"], after["networks"]["gta"])
        for event in (assistant, transfer):
            before, after = (state["networks"]["student"] for state in event[1:3])
            predictor = [key for key in before if key.startswith("predictor.")]
            assert len(predictor) == 16 and all(
                torch.equal(before[key], after[key]) for key in predictor
            )
            assert all(
                torch.equal(before[key], after[key]) for key, _ in s.student.named_buffers()
            ), "statistics moved"
            for a, b in zip(
                event[1]["momenta"]["student"], event[2]["momenta"]["student"], strict=True
            ):
                assert torch.equal(a, b), "the merge leaves the student's momentum alone"
        d, gta = 0.3, transfer[1]["networks"]["gta"]
        for key, p in s.student.features.named_parameters(prefix="features"):
            assert torch.allclose(after[key], d * before[key] + (1 - d) * gta[key], atol=1e-6), key
            assert p.dim() < 4 or not torch.equal(after[key], before[key])
        assert same(student[1]["networks"]["gta"], student[2]["networks"]["gta"])
        assert same(student[1]["networks"]["teacher"], student[2]["networks"]["teacher"])
        assert same(teacher[1]["networks"]["student"], teacher[2]["networks"]["student"])
        assert not s.teacher.training and s.student.training and s.gta.training
        for p in s.teacher.parameters():
            assert p.grad is None and not p.requires_grad
        assert not storages(s.student) & storages(s.gta)
        assert not storages(s.student) & storages(s.teacher)
        assert not storages(s.gta) & storages(s.teacher)


@pytest.mark.parametrize("aux", [0, 0.4])
def test_every_trainable_parameter_receives_a_gradient(monkeypatch, aux):
    args = settings(aux=aux, ohem=0.7 if aux else 0)
    s = tiny(args)
    record = Record(monkeypatch, s)
    for n in range(3):
        gta_seg.train_step(s, pictures(n), pictures(n + 50), args, WORLD)
        s.step += 1
    for name in ("student", "gta"):
        trainable = {key for key, p in getattr(s, name).named_parameters() if p.requires_grad}
        assert trainable == record.gradients[name]
        assert {key for key in trainable if not key.endswith("bias")} <= record.moving[name], (
            "a dead head"
        )


def test_a_parameter_is_of_the_features_or_of_the_predictor():
    for aux in (0, 0.4):
        net = gta_seg.SegNet(settings(aux=aux), CLASSES)
        f, g = ({id(p) for p in part.parameters()} for part in (net.features, net.predictor))
        assert f and g and not f & g and f | g == {id(p) for p in net.parameters()}
        assert {id(p) for p in net.predictor.classifier.parameters()} <= g
        assert len(g) == 10 + (6 if aux else 0)


def test_warm_up_trains_one_network_on_labels_and_then_copies_it_by_value():
    args = settings()
    s, _ = gta_seg.build(args, CLASSES, WORLD, warmup=3, epoch=3)
    for net in s.networks().values():
        plain(net)
    s.student.train()
    student, labeled = copy.deepcopy(s.student), pictures(1)
    others = values(s.gta), values(s.teacher)
    learn = Descent(student, args)
    for _ in range(2):
        gta_seg.warmup_step(s, labeled, args, WORLD)
        learn(flat_loss(up(student(labeled.images)[0], SIZE), labeled.label))
    for key, tensor in student.state_dict().items():
        assert torch.allclose(
            tensor.float(), s.student.state_dict()[key].float(), rtol=1e-3, atol=1e-5
        ), key
    assert same(others[0], values(s.gta)) and same(others[1], values(s.teacher))
    assert not same(values(s.student), values(s.teacher))
    gta_seg.end_of_warmup(s, args)
    for net in (s.teacher, s.gta):
        assert same(values(s.student), values(net)), "parameters and buffers"
    assert not storages(s.student) & storages(s.gta) and not storages(s.student) & storages(
        s.teacher
    )
    assert not storages(s.gta) & storages(s.teacher)
    assert not momenta(s.opt_gta) and len(momenta(s.opt_student)) == len(
        list(s.student.parameters())
    )
    assert all(p.requires_grad for p in [*s.student.parameters(), *s.gta.parameters()])


def test_transfer_of_everything_leaves_out_the_auxiliary_head(monkeypatch):
    args = settings(transfer="all", aux=0.4, alpha_gta=0.3)
    s = tiny(args)
    record = Record(monkeypatch, s)
    gta_seg.train_step(s, pictures(1), pictures(2), args, WORLD)
    merged = [e for e in record.events if e[0].startswith("ema student")]
    before, after = merged[0][1]["networks"]["student"], merged[-1][2]["networks"]["student"]
    moved = {
        key for key, _ in s.student.named_parameters() if not torch.equal(before[key], after[key])
    }
    assert moved == {
        key for key, _ in s.student.named_parameters() if not key.startswith("predictor.aux")
    }


def test_unbiased_st_shares_features_and_keeps_predictors_apart(monkeypatch):
    args = settings(method="unbiased-st")
    s = tiny(args)
    assert parameter_storages(s.student.features) == parameter_storages(s.gta.features)
    assert not parameter_storages(s.student.predictor) & parameter_storages(s.gta.predictor)
    record = Record(monkeypatch, s)
    gta_seg.unbiased_st_step(s, pictures(1), pictures(2), args, WORLD)
    assert [event[0] for event in record.events] == [
        "update gta",
        "update student",
        "ema teacher <- student",
    ]
    before, after = (
        record.events[0][1]["networks"]["student"],
        record.events[0][2]["networks"]["student"],
    )
    for key, _ in s.student.named_parameters():
        assert torch.equal(before[key], after[key]) is key.startswith("predictor."), key
    assert not storages(s.teacher) & (storages(s.student) | storages(s.gta))


# -------------------------------------------------------------------------- cost of a step, sharing


def image_passes(step_of, s: State, args: Args, count: int) -> tuple[int, int]:
    """Images that went forward through any network, and images whose logits got a gradient."""
    forward, backward, hooks = [0], [0], []

    def seen(net, given, result):
        forward[0] += len(given[0])
        if result[0].requires_grad:
            result[0].register_hook(lambda slope: backward.__setitem__(0, backward[0] + len(slope)))

    for net in s.networks().values():
        hooks.append(net.register_forward_hook(seen))
    step_of(s, pictures(1, count), pictures(2, count), args, WORLD)
    for hook in hooks:
        hook.remove()
    return forward[0], backward[0]


@pytest.mark.parametrize("count", [3, 4])
def test_a_step_costs_21_units_where_the_released_one_costs_45(count):
    args, released = settings(), settings("released")
    forward, backward = image_passes(gta_seg.train_step, tiny(args), args, count)
    assert (forward, backward) == (3 * count, 2 * count)
    assert (forward + 2 * backward) * 3 / count == 21
    forward, backward = image_passes(gta_seg.train_step_released, tiny(released), released, count)
    assert (forward, backward) == (7 * count, 4 * count)
    assert (forward + 2 * backward) * 3 / count == 45


def restored(s: State, args: Args) -> State:
    """Another process that continues from the checkpoint."""
    file = io.BytesIO()
    torch.save(gta_seg.snapshot(s, SimpleNamespace(classes=list("abcd")), args), file)
    file.seek(0)
    other, _ = gta_seg.build(args, CLASSES, WORLD, warmup=s.warmup, epoch=s.epoch)
    for net in other.networks().values():
        plain(net)
    other.student.train()
    gta_seg.restore(other, torch.load(file, weights_only=False), args)
    return other


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"share_predictor": True},
        {"recipe": "released"},
        {"method": "unbiased-st"},
        {"aux": 0.4},
        {"method": "mt"},
    ],
    ids=str,
)
def test_a_checkpoint_continues_as_if_nothing_had_happened(flags):
    args = settings(**flags)
    _, step_of = gta_seg.steps_of(args)
    s = tiny(args)
    for n in range(5):
        if n == 3:
            other = restored(s, args)
            assert other.step == s.step
            for a, b in zip(s.networks().values(), other.networks().values(), strict=True):
                assert same(values(a), values(b))
            optimizers = [(s.opt_student, other.opt_student)]
            if s.gta is not None:
                optimizers.append((s.opt_gta, other.opt_gta))
            for a, b in optimizers:
                assert momenta(a) and all(
                    torch.equal(v, w) for v, w in zip(momenta(a), momenta(b), strict=True)
                )
        for state in (s, other) if n >= 3 else (s,):
            step_of(state, pictures(n), pictures(n + 50), args, WORLD)
            state.step += 1
    shared = args.share_predictor or args.recipe == "released"
    for state in (s, other) if args.method != "mt" else ():
        mine, theirs = (
            parameter_storages(net.predictor.classifier) for net in (state.student, state.gta)
        )
        assert mine == theirs if shared else not mine & theirs
        mine, theirs = (parameter_storages(net.features) for net in (state.student, state.gta))
        assert mine == theirs if args.method == "unbiased-st" else not mine & theirs
        assert not storages(state.teacher) & (storages(state.student) | storages(state.gta))
    for name, net in s.networks().items():
        assert same(values(net), values(other.networks()[name])), f"{name} not bit-equal"


def test_released_networks_keep_their_memory_layout():
    """1x1 kernels have several; a resumed run with another one would round differently."""
    args = settings("released")
    s = tiny(args)
    gta_seg.train_step_released(s, pictures(1), pictures(2), args, WORLD)
    s.step += 1
    other = restored(s, args)
    for name, net in s.networks().items():
        for (key, p), q in zip(
            net.named_parameters(), other.networks()[name].parameters(), strict=True
        ):
            assert p.stride() == q.stride(), (name, key)


# -------------------------------------------------------------------------------- the released loop


class ReferenceReleased(Reference):
    """The released loop as the recipe's Secs. 0.1, 2.1, 2.2, 2.5 tell it; `p.data = q.data`: its
    copy by reference."""

    def __init__(self, s: State, args: Args):
        super().__init__(s, args)
        self.learn_student.speed = {n: v.clone() for n, v in self.learn_student.speed.items()}
        self.epoch = s.epoch

    def step(self, labeled: Batch, unlabeled: Batch) -> None:
        args, half_ = self.args, len(labeled.images)
        if self.n < self.epoch:
            for net in (self.teacher, self.gta):
                for p, q in zip(net.parameters(), self.student.parameters(), strict=True):
                    p.data = q.data
        images = torch.cat([labeled.images, unlabeled.images])
        with torch.no_grad():
            label = self.logits(self.teacher.eval(), unlabeled.images).argmax(1)
            conf = (
                self.logits(self.teacher.train(), images)[half_:].softmax(1).max(1).values.numpy()
            )
        self.teacher.eval()
        keep = conf > np.percentile(conf.astype(float), 20)
        weight = (conf + 1) * keep / (((conf + 1) * keep).sum() + (~keep).sum()) * keep.sum()
        label, weight = (
            label.masked_fill(torch.from_numpy(~keep), IGNORE),
            torch.from_numpy(weight).float(),
        )
        self.learn_gta(flat_loss(self.logits(self.gta, images)[half_:], label, weight))
        for d, target, source, only in (
            (args.alpha_gta, self.student, self.gta, "features."),
            (args.alpha_teacher, self.teacher, self.student, ""),
        ):
            if target is self.teacher:
                self.learn_student(
                    flat_loss(self.logits(self.student, images)[:half_], labeled.label)
                )
            d, theirs = self.decay(d, True), dict(source.named_parameters())
            for name, p in target.named_parameters():
                if name.startswith(only):
                    p.data = d * p.data + (1 - d) * theirs[name].data
        self.n += 1


def test_released_steps_are_the_released_loop():
    args = settings("released", alpha_gta=0.3, alpha_teacher=0.6)
    s = tiny(args)
    reference = ReferenceReleased(s, args)
    for n in range(4):  # two steps of the first epoch, two of the second
        labeled, unlabeled = pictures(10 + n), pictures(20 + n, padding=16)
        reference.step(labeled, unlabeled)
        gta_seg.train_step_released(s, labeled, unlabeled, args, WORLD)
        s.step += 1
        reference.compare(s, n)


def test_released_loop_ties_the_predictor_and_nothing_else_for_good():
    args = settings("released")
    s = tiny(args)
    for n in range(4):
        gta_seg.train_step_released(s, pictures(n), pictures(50 + n), args, WORLD)
        s.step += 1
        assert parameter_storages(s.student.predictor) == parameter_storages(s.gta.predictor)
        assert not parameter_storages(s.student.features) & parameter_storages(s.gta.features)
        assert not parameter_storages(s.teacher) & parameter_storages(s.student)
    before = values(s.student.predictor)
    ignored = pictures(5)._replace(label=torch.full((4, SIZE, SIZE), IGNORE))
    gta_seg.set_learning_rates(s.opt_student, 0)  # the student's own optimizer stands still
    gta_seg.train_step_released(s, ignored, pictures(6), args, WORLD)
    after = values(s.student.predictor)
    assert any(
        not torch.equal(before[key], after[key])
        for key, _ in s.student.predictor.named_parameters()
    )


def test_released_warm_up_moves_the_others_statistics_only():
    args = settings("released")
    s, _ = gta_seg.build(args, CLASSES, WORLD, warmup=2, epoch=2)
    for net in s.networks().values():
        plain(net)
    s.student.train()
    before = {name: values(net) for name, net in s.networks().items()}
    gta_seg.warmup_step_released(s, pictures(1), args, WORLD)
    gta_seg.end_of_warmup(s, args)
    for name in ("teacher", "gta"):
        net, parameters = getattr(s, name), {key for key, _ in getattr(s, name).named_parameters()}
        for key, tensor in net.state_dict().items():
            assert torch.equal(before[name][key], tensor) is (key in parameters), (name, key)
    key = "predictor.classifier.0.weight"
    assert not torch.equal(before["student"][key], s.student.state_dict()[key])


class Lonely(World):
    """A process that must not ask the others for anything."""

    def sum(self, tensor: Tensor) -> Tensor:
        raise AssertionError("the released code reduces nothing but gradients")

    gather = mean = sum


def test_released_steps_have_the_denominators_of_their_process():
    args = settings("released")
    s = tiny(args)
    labeled = pictures(1)
    labeled.label[0] = IGNORE
    gta_seg.warmup_step_released(s, labeled, args, Lonely(rank=0, size=2))
    gta_seg.train_step_released(s, labeled, pictures(2), args, Lonely(rank=0, size=2))


# ------------------------------------------------------------------------------- full-size networks


@pytest.fixture(scope="module")
def voc() -> nn.Module:
    with torch.device("meta"):
        return gta_seg.SegNet(gta_seg.preset("voc", weights="none"), 21)


def millions(*modules: nn.Module) -> float:
    return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 2)


def test_full_network_has_the_released_ones_parameters(voc):
    f, g = voc.features, voc.predictor
    assert [millions(m) for m in (f.backbone, f.aspp, f.head, f.low, g.classifier)] == [
        42.62,
        15.21,
        2.95,
        0.07,
        1.78,
    ]
    assert millions(voc) == 62.62, "without the representation head"
    assert len(list(g.parameters())) == 10 and len(list(g.buffers())) == 6 and g.aux is None
    kernels = [tuple(p.shape) for p in g.classifier.parameters() if p.dim() == 4]
    assert kernels == [(256, 512, 3, 3), (256, 256, 3, 3), (21, 256, 1, 1)]
    biases = [
        [m.bias is not None for m in part.modules() if isinstance(m, nn.Conv2d)]
        for part in (f.aspp, f.head, f.low, g)
    ]
    assert biases == [[False] * 5, [False], [True], [True] * 3]
    with torch.device("meta"):
        city = gta_seg.SegNet(gta_seg.preset("cityscapes", weights="none"), 19)
    assert millions(city.predictor.aux) == 2.36
    assert city.predictor.aux[0].in_channels == 1024


def test_full_network_has_the_released_ones_strides_and_dilations(voc):
    convs = {
        name: conv
        for name, conv in voc.features.backbone.named_modules()
        if isinstance(conv, nn.Conv2d)
    }
    stem = [c for name, c in convs.items() if "layer" not in name]
    stem = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in stem]
    assert stem == [(3, 64, 3, 2), (64, 64, 3, 1), (64, 128, 3, 1)], "the deep stem"
    assert all(conv.bias is None for conv in convs.values())
    wide = {
        stage: [
            (c.dilation, c.padding, c.stride)
            for name, c in convs.items()
            if f"layer{stage}." in name and name.endswith("conv2")
        ]
        for stage in (1, 2, 3, 4)
    }
    assert wide[1] == [((1, 1), (1, 1), (1, 1))] * 3
    assert wide[2] == [((1, 1), (1, 1), (2, 2))] + [((1, 1), (1, 1), (1, 1))] * 3
    assert wide[3] == [((1, 1), (1, 1), (1, 1))] + [((2, 2), (2, 2), (1, 1))] * 22
    assert wide[4] == [((d, d), (d, d), (1, 1)) for d in (4, 8, 16)]
    (pool,) = [m for m in voc.modules() if isinstance(m, nn.MaxPool2d)]
    assert pool.ceil_mode and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    rates = [
        conv.dilation[0] for conv in voc.features.aspp.modules() if isinstance(conv, nn.Conv2d)
    ]
    assert rates == [1, 1, 12, 24, 36]
    assert [m.p for m in voc.modules() if isinstance(m, nn.Dropout2d)] == [0.1] * 3
    assert all(
        m.momentum == 0.1 and m.eps == 1e-5 for m in voc.modules() if isinstance(m, nn.BatchNorm2d)
    )


@pytest.mark.parametrize(("size", "low", "deep"), [(513, 129, 65), (321, 81, 41), (769, 193, 97)])
def test_full_network_has_the_released_ones_feature_sizes(voc, size, low, deep):
    images, f, seen = torch.zeros(2, 3, size, size, device="meta"), voc.features, []
    hooks = [
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        for part in (f.low, f.aspp)
    ]
    features, third = f(images)
    for hook in hooks:
        hook.remove()
    assert [tuple(m.shape[1:]) for m in seen] == [(256, low, low), (2048, deep, deep)]
    assert third.shape == (2, 1024, deep, deep)
    assert features.shape == (2, 512, low, low), "the paper's 512 dimensions"
    assert voc.predictor(features, third)[0].shape == (2, 21, low, low)


def test_low_level_channels_come_first():
    net, seen = gta_seg.SegNet(settings(), CLASSES).eval(), []
    for part in (net.features.low, net.features.head):
        part.register_forward_hook(lambda _, given, result: seen.append(result))
    features, _ = net.features(torch.randn(2, 3, SIZE, SIZE))
    assert torch.equal(features[:, :8], seen[0])
    assert torch.allclose(features[:, 8:], up(seen[1], seen[0].shape[-1]), atol=1e-6)


# ---------------------------------------------------------------------------- backbones, edge cases


def finite(s: State, losses: dict[str, Tensor]) -> None:
    assert losses and all(math.isfinite(float(value)) for value in losses.values()), losses
    for name, net in s.networks().items():
        for key, tensor in net.state_dict().items():
            assert torch.isfinite(tensor).all(), (name, key)


@pytest.mark.parametrize(
    "backbone", ["resnet18", "mobilenet_v2", "mobilenetv2_100", "vit_tiny_patch16_224"]
)
def test_small_backbones_take_a_step(backbone):
    args = settings(backbone=backbone, cutmix=1.0)
    s, _ = gta_seg.build(args, CLASSES, WORLD)
    gta_seg.end_of_warmup(s, args)
    s.step = s.warmup
    before = values(s.student)
    finite(s, gta_seg.train_step(s, pictures(1, 2), pictures(2, 2), args, WORLD))
    assert not torch.equal(
        before["predictor.classifier.0.weight"], s.student.predictor.classifier[0].weight
    )
    after = values(s.student)
    assert any(not torch.equal(before[key], after[key]) for key in after if "backbone" in key)


@pytest.mark.parametrize(
    "backbone, dilations",
    [
        ("resnet50", [4, 8, 16]),
        ("resnetrs50", [4, 8, 16]),
        ("resnetblur50", [4, 8, 16]),
        ("seresnet50", [4, 8, 16]),
        ("resnext50_32x4d", [4, 8, 16]),
        ("resnet26", [2, 4]),
        ("resnet14t", [2]),
        ("resnet51q", None),
        ("resnet33ts", None),
    ],
)
def test_every_kind_of_resnet_is_cut(backbone, dilations):
    """Ceil-mode pooling and the released code's dilations where the network has their place, none
    where not."""
    with torch.device("meta"):
        features = gta_seg.Features(backbone, 8, (12, 24, 36), 256, pretrained=False)
        assert features(torch.zeros(2, 3, 97, 97))[0].shape == (2, 512, 25, 25)
    body = features.backbone
    if dilations is None:
        assert not hasattr(body, "maxpool") and not hasattr(body, "layer4")
        return
    assert [block.conv2.dilation for block in body.layer4] == [(d, d) for d in dilations]
    if isinstance(body.maxpool, nn.MaxPool2d):
        assert body.maxpool.ceil_mode is (len(dilations) > 1), "a toy stays as it is"


@pytest.mark.parametrize("flags", [{}, dict(recipe="released")], ids=str)
def test_scoring_leaves_the_compiled_networks_alone(monkeypatch, flags):
    """Three networks share one code object, and images of many sizes would use up the
    recompilations it is granted."""
    graphs, args, compiled = [], settings(compile=True, **flags), nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(gta_seg.SegNet, "compile", lambda net: compiled(net, backend=backend))
    s = tiny(args)
    step = gta_seg.train_step_released if flags else gta_seg.train_step
    step(s, pictures(1), pictures(2), args, WORLD)
    count = len(graphs)
    assert 2 <= count < torch._dynamo.config.recompile_limit
    with torch.no_grad():
        for size in range(40, 100, 10):
            for net in s.networks().values():
                for window in (0, 32):
                    gta_seg.predict_logits(net.eval(), pictures(3, 1, size).images, window)
    s.student.train()
    s.gta.train()
    s.step += 1
    step(s, pictures(4), pictures(5), args, WORLD)
    assert len(graphs) == count
    torch._dynamo.reset()


STEPS = {
    "gta": gta_seg.train_step,
    "mt": gta_seg.mean_teacher_step,
    "released": gta_seg.train_step_released,
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    "case", ["all ignored", "one class", "unlabeled all padding", "both", "saturated"]
)
def test_edge_cases_stay_finite(kind, case):
    args = settings(
        "released" if kind == "released" else "paper",
        method="mt" if kind == "mt" else "gta",
        cutmix=1.0,
    )
    s, labeled, unlabeled = tiny(args), pictures(1), pictures(2)
    if case in ("all ignored", "both"):
        labeled = labeled._replace(label=torch.full_like(labeled.label, IGNORE))
    if case == "one class":
        labeled = labeled._replace(label=torch.full_like(labeled.label, 2))
    if case in ("unlabeled all padding", "both"):
        unlabeled.images.zero_()
        unlabeled.valid.zero_()
    if case == "saturated":
        with torch.no_grad():
            for net in s.networks().values():
                net.predictor.classifier[-1].bias[1] = 500
    for _ in range(2):
        losses = STEPS[kind](s, labeled, unlabeled, args, WORLD)
        s.step += 1
        finite(s, losses)
