"""better_pseudo_labels.py against its paper: each equation by loops, who learns from what by hooks.

Expected values come from the paper (Eqs. 1 to 5, Sec. 4.1) and, where it is silent, from what LVIS,
Detectron2 and Guided Distillation publish, not from better_pseudo_labels.py. The detector itself is
in test_better_parity.py."""

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import instance_runs
import numpy as np
import pytest
import torch
from networks import close, shaken, values
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

import better_pseudo_labels as bpl
from better_pseudo_labels import Args, Classes, Objects
from common import checkpoints, colour, distributed, instances, judge, mask_ap, metrics, plots
from common.boxes import boxes_of
from common.distributed import World
from common.errors import UserError
from common.instances import Batch, Target
from common.objects import Instances, Photo, Thing, Window, cut_out, masks_of
from data import shapes

WORLD, CPU = World(), torch.device("cpu")


MEAN, STD = (
    torch.tensor(x).view(3, 1, 1) for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
)


RARE, COMMON, FREQUENT = 337, 461, 405  # classes of LVIS: in up to 10 pictures, up to 100, more


pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


# ------------------------------------------------------------------------------------------ helpers


def small(**flags) -> Args:
    """A network whose head is of some ten thousand weights; its teacher finds something in
    noise."""
    return bpl.preset(
        "shapes",
        **dict(
            weights="none",
            norm="frozen",
            image_size=64,
            width=8,
            fc=16,
            proposals=12,
            rpn_batch=16,
            roi_batch=12,
            embed_size=32,
            batch_size=2,
            teacher_batch_size=2,
            steps=10,
            teacher_steps=10,
            prior=0.5,
            threshold=0.0,
            size_threshold=0.0,
            federated=3,
            ema=0.75,
            workers=0,
            frequency="subset",
            lambda_calib=2.0,
            shrink=20.0,
        )
        | flags,
    )


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def draws(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def classes_of(images: list[int], targets: Tensor | None = None) -> Classes:
    """Classes in so many pictures, twice as many objects; every row of `targets` differs."""
    c, n = len(images), torch.tensor(images)
    targets = 0.7 * torch.eye(c) + 0.3 * torch.rand(c, c) if targets is None else targets
    return Classes(n, 2 * n, targets, (["r", "c", "f"] * c)[:c])


def objects_at(boxes: list, labels: list[int], c: int, size: int = 64) -> Objects:
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    labels = torch.tensor(labels, dtype=torch.int64)
    return Objects(
        labels,
        torch.tensor(boxes).view(-1, 4).float(),
        masks,
        torch.rand(len(boxes), c),
        F.one_hot(labels, c).bool(),
    )


def lvis_counts() -> np.ndarray:
    """Pictures of 1,203 classes as LVIS has them: 71 classes in a single one."""
    g = np.random.default_rng(0)
    rare = np.concatenate([np.ones(71), g.integers(2, 11, RARE - 71)])
    return np.concatenate(
        [rare, g.integers(11, 101, COMMON), g.integers(101, 2000, FREQUENT)]
    ).astype(np.int64)


@pytest.fixture(scope="module")
def tail(tmp_path_factory) -> Instances:
    """A dozen drawn pictures of twelve classes, in LVIS's layout; some classes have no object."""
    data = instances.find(
        "lvis", shapes.make_tail(tmp_path_factory.mktemp("tail") / "tail", 12, 1, 3)
    )
    assert len(data.train) > 9 and data.lvis
    return data


# -------------------------------------------------------------------------------------------- Eq. 1


def test_prototypes_are_equation_1():
    x, labels = torch.randn(11, 5), torch.tensor([2, 0, 2, 4, 4, 4, 0, 2, 5, 2, 0])
    got = bpl.prototypes(x, labels, 7)
    for c in range(7):
        mine = [x[n].tolist() for n in range(11) if labels[n] == c]
        want = [sum(v) / len(mine) for v in zip(*mine, strict=True)] if mine else [0.0] * 5
        assert got[c].tolist() == pytest.approx(want, abs=1e-6)
    assert (got[[1, 3, 6]] == 0).all() and got.shape == (7, 5)


def test_cosines_by_loops():
    """S of Eq. 2; nothing is similar to a class without a prototype."""
    p = torch.randn(6, 4) + 1
    p[[1, 4]] = 0
    got = bpl.cosines(p)
    for i, j in np.ndindex(6, 6):
        a, b = p[i].tolist(), p[j].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        lengths = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        assert got[i, j].item() == pytest.approx(dot / lengths if lengths else 0, abs=1e-6)
    assert got.diagonal()[[0, 2, 3, 5]].tolist() == pytest.approx([1] * 4)


# -------------------------------------------------------------------------------------------- Eq. 2


def eq2(s: np.ndarray, n: np.ndarray, gamma: float, tau: float = 1.0) -> np.ndarray:
    """Classes without objects take no part."""
    out = np.zeros_like(s)
    among = np.flatnonzero(n)
    for i in among:
        total = sum(math.exp(s[i, k] / (tau * n[k] ** gamma)) for k in among)
        for j in among:
            out[i, j] = math.exp(s[i, j] / (tau * n[j] ** gamma)) / total
    return out


@pytest.mark.parametrize("gamma, tau", [(0.0, 1.0), (1.5, 1.0), (0.5, 0.1), (1.0, 2.0)])
def test_similarity_distribution_is_equation_2(gamma, tau):
    n = torch.tensor([3, 0, 1, 250, 12, 0, 1, 7])
    p = torch.randn(8, 6) + 0.5
    p[n == 0] = 0
    s = bpl.cosines(p)
    got = bpl.similarity_distribution(s, n, gamma, tau)
    assert np.allclose(array(got), eq2(array(s), n.numpy(), gamma, tau), atol=1e-6)
    assert (
        torch.allclose(got.sum(1), (n > 0).float())
        and (got[:, n == 0] == 0).all()
        and (got[n == 0] == 0).all()
    )


def test_gamma_zero_orders_classes_by_similarity_alone():
    s, n = bpl.cosines(torch.randn(9, 5)), torch.tensor([1, 900, 3, 50, 2, 7, 11, 400, 5])
    got = bpl.similarity_distribution(s, n, 0.0)
    assert torch.equal(got.argsort(1), s.argsort(1)) and torch.equal(
        got, bpl.similarity_distribution(s, n.flip(0), 0.0)
    )
    back = got * s.exp().sum(1, keepdim=True)  # exp(S) is symmetric, its rows' sums differ
    assert torch.allclose(back, back.T, atol=1e-5) and not torch.allclose(got, got.T, atol=1e-3)


def test_rare_classes_get_more():
    n, s = torch.tensor([1, 2, 3, 5, 10, 30, 100]), torch.full((7, 7), 0.6)
    got = bpl.similarity_distribution(s, n, 1.5)
    assert (got.diff(dim=1) < 0).all() and (bpl.similarity_distribution(s, n, 0.0) == 1 / 7).all()
    ratios = [
        (row[i] / row[0 if i else 1]).item()
        for i, row in enumerate(bpl.similarity_distribution(torch.eye(7), n, 1.5))
    ]
    # exp(1 / N^1.5)
    assert ratios == pytest.approx([2.72, 1.42, 1.21, 1.09, 1.03, 1.006, 1.001], abs=0.005)


@pytest.mark.parametrize("mean, mass", [(0.2, 0.294), (0.6, 0.325), (0.85, 0.349)])
def test_equation_2_as_printed_is_nearly_uniform(mean, mass):
    """At LVIS's size, with and without frequencies; the temperature is what sharpens it. Eq. 3's
    literal column is no distribution: its sums are those of recipe 2.4."""
    c = RARE + COMMON + FREQUENT
    common, own = torch.tensor([1.0] + [0.0] * 63), F.normalize(torch.randn(c, 64), dim=1)
    s = bpl.cosines(math.sqrt(mean) * common + math.sqrt(1 - mean) * own).double()
    assert (s.sum() - c).item() / c / (c - 1) == pytest.approx(mean, abs=0.04)
    n = torch.from_numpy(lvis_counts())
    rare = torch.arange(c) < RARE
    for gamma in (0.0, 1.5):
        got = bpl.similarity_distribution(s, n, gamma)
        entropy = -(got * got.log()).sum(1) / math.log(c)
        assert entropy.min() > 0.995 and got.max() < 2.9 / c, gamma
        assert got[:, rare].sum(1).mean().item() == pytest.approx(
            mass if gamma else 0.28, abs=0.012
        )
    sharp = bpl.similarity_distribution(s, n, 0.0, 0.05)
    assert (-(sharp * sharp.clamp(min=1e-300).log()).sum(1) / math.log(c)).mean() < 0.995
    sums = bpl.smoothed_targets(got, 0.1, "literal").sum(1)
    assert (
        0.985 < sums.min() < 1
        and 1.01 < sums.max() < 1.12
        and sums[:71].mean() > sums[-FREQUENT:].mean()
    )
    assert torch.allclose(bpl.smoothed_targets(got, 0.1).sum(1), torch.ones(c).double())


# -------------------------------------------------------------------------------------------- Eq. 3


@pytest.mark.parametrize("convention", ["row", "literal"])
def test_smoothed_targets_are_equation_3(convention):
    """y is one-hot; S' y as printed is a column; its transpose gives the row of the true class."""
    mix = torch.rand(6, 6).softmax(1)
    for eps in (0.0, 0.1, 0.5, 1.0):
        got = bpl.smoothed_targets(mix, eps, convention)
        for c, i in np.ndindex(6, 6):
            want = (1 - eps) * (c == i) + eps * (mix[c, i] if convention == "row" else mix[i, c])
            assert got[c, i].item() == pytest.approx(float(want), abs=1e-6)
        assert got.diagonal().tolist() == pytest.approx((1 - eps + eps * mix.diagonal()).tolist())
        one = (got.sum(1) - 1).abs().max().item() < 1e-5
        assert one == (convention == "row" or eps == 0)
        assert eps or torch.equal(got, torch.eye(6))
    with pytest.raises(KeyError):
        bpl.smoothed_targets(mix, 0.1, "rows")


# ----------------------------------------------------------------------- labels of a drawn data set


def learned(args: Args, data: Instances, photos: list[Photo]) -> Classes:
    return bpl.label_statistics(
        args, data, photos, bpl.class_similarities(args, data, photos, WORLD), WORLD
    )


def given(prototypes: Tensor, args: Args, data: Instances) -> None:
    """Prototypes that the run will find in its folder."""
    key = bpl.made_of(args, bpl.PROTOTYPES_OF, data.classes)
    checkpoints.save_checkpoint(
        Path(args.out) / "prototypes.pt", bpl.PROTOTYPES, {"prototypes": prototypes, "key": key}
    )


def annotations(data: Instances, photos: list[Photo]) -> list[tuple[int, int]]:
    """(image id, class) of each object of these pictures, from the file."""
    ids = {p.id for p in photos}
    return [
        (a["image_id"], a["category_id"] - 1)
        for a in json.loads(data.train_json.read_text())["annotations"]
        if a["image_id"] in ids
    ]


def test_counts_and_groups(tail, tmp_path):
    photos, c = tail.train[2:8], len(tail.classes)
    pairs, args = annotations(tail, photos), small(smoothing="none", out=str(tmp_path))
    got = learned(args, tail, photos)
    assert got.instances.tolist() == [sum(k == i for _, k in pairs) for i in range(c)]
    assert got.images.tolist() == [len({image for image, k in pairs if k == i}) for i in range(c)]
    assert (got.images == 0).any() and (got.instances > got.images).any()
    assert torch.equal(got.targets, torch.eye(c)) and not (tmp_path / "prototypes.pt").exists()
    thirds = bpl.group_by_count(got.images[got.images > 0].numpy())  # of those that there are
    assert [g for g, n in zip(got.groups, got.images, strict=True) if n] == thirds and len(
        {*thirds}
    ) > 1
    assert all(g == "r" for g, n in zip(got.groups, got.images, strict=True) if not n)
    by_file = replace(tail, frequency=["f", "r", "c"] * 4)
    args.frequency = "file"
    assert learned(args, by_file, photos).groups == ["f", "r", "c"] * 4
    assert learned(args, replace(tail, frequency=None), photos).groups == got.groups


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([], ""),
        ([5], "c"),
        ([7, 3], "fr"),
        ([2, 9, 4], "rfc"),
        ([4, 4, 4], "ccc"),
        ([1, 1, 9], "ccf"),
        ([9, 9, 1], "ccr"),
        ([1, 5, 5, 9], "rccf"),
        ([0, 0, 0, 1, 2, 3], "rrrrcf"),
        (list(range(13)), "rrrrrccccffff"),
        (np.array([30, 10, 20]), "frc"),
    ],
)
def test_thirds_by_count(counts, expected):
    assert bpl.group_by_count(counts) == list(expected)


def test_a_crowd_is_no_object(tail, tmp_path):
    photo = tail.train[0]
    photo = photo._replace(
        things=(photo.things[0]._replace(category=3, crowd=True), Thing(5, [], False, 1.0))
    )
    got = learned(small(smoothing="none", out=str(tmp_path)), tail, [photo])
    assert got.images.tolist() == got.instances.tolist() == [int(k == 5) for k in range(12)]


def test_prototypes_of_drawn_objects(tail, tmp_path):
    """Eq. 1 of the crops of all objects, or of at most two of each class; kept for the run, though
    labels change."""
    c, photos = len(tail.classes), tail.train
    args = small(smoothing="similarity", out=str(tmp_path))
    s = bpl.class_similarities(args, tail, photos, WORLD)
    saved = checkpoints.load_checkpoint(tmp_path / "prototypes.pt", bpl.PROTOTYPES)
    distributed.seed_torch(args.seed, "prototypes")
    net, sums, numbers = (
        bpl.embedder(args),
        torch.zeros(c, net_width(args)),
        [0] * c,
    )
    for photo in photos:
        crops, labels = bpl.crop_objects(photo, tail, list(range(len(photo.things))), 32)
        for x, k in zip(net(crops), labels.tolist(), strict=True):
            sums[k] += x
            numbers[k] += 1
    assert (
        saved["embedded"].tolist() == numbers and saved["classes"] == tail.classes and 0 in numbers
    )
    want = sums / torch.tensor(numbers).clamp(min=1)[:, None]
    assert torch.allclose(saved["prototypes"], want, atol=1e-4) and want.abs().max() > 0.1
    assert torch.equal(s, bpl.cosines(saved["prototypes"]))
    later = learned(args, tail, photos[:4])
    assert later.instances.sum() < sum(numbers)
    again = checkpoints.load_checkpoint(tmp_path / "prototypes.pt", bpl.PROTOTYPES)
    assert torch.equal(again["prototypes"], saved["prototypes"])
    few = bpl.embed_objects(replace(args, proto_per_class=2), tail, photos, WORLD)
    assert few["embedded"].tolist() == [min(n, 2) for n in numbers]


def test_prototypes_of_another_command_are_made_anew(tail, tmp_path, monkeypatch):
    """A command that stopped before it trained leaves them; the mended one may be of other classes
    or crops."""
    made = []
    monkeypatch.setattr(
        bpl,
        "embed_objects",
        lambda args, data, *_: (
            made.append(args.embed_size) or {"prototypes": torch.randn(len(data.classes), 4)}
        ),
    )
    args = small(smoothing="similarity", out=str(tmp_path), embed_size=32)
    first = bpl.class_similarities(args, tail, tail.train, WORLD)
    assert torch.equal(
        bpl.class_similarities(replace(args, lr=1.0), tail, tail.train, WORLD), first
    ) and made == [32]
    bpl.class_similarities(replace(args, embed_size=64), tail, tail.train, WORLD)
    fewer = bpl.class_similarities(
        replace(args, embed_size=64), replace(tail, classes=tail.classes[:5]), [], WORLD
    )
    assert made == [32, 64, 64] and fewer.shape == (5, 5)
    with pytest.raises(UserError, match="checkpoint of prototypes"):
        checkpoints.load_checkpoint(tmp_path / "prototypes.pt", bpl.SCRIPT)


def net_width(args: Args) -> int:
    with torch.random.fork_rng():
        return bpl.embedder(args)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]


@pytest.mark.parametrize("smoothing", ["uniform", "similarity", "similarity+freq"])
def test_targets_of_each_smoothing(smoothing, tail, tmp_path):
    """Fig. 2's curves. A class without an object gets nothing of others; there is no row of S' for
    its own."""
    photos, c, eps = tail.train[:7], len(tail.classes), 0.2
    pairs = annotations(tail, photos)
    n = np.bincount([k for _, k in pairs], minlength=c)
    p = torch.randn(c, 6) + 1
    args = small(smoothing=smoothing, eps=eps, gamma=0.7, sim_tau=0.6, out=str(tmp_path))
    given(p, args, tail)
    got = learned(args, tail, photos)
    s = array(F.cosine_similarity(p[:, None], p[None], dim=2))
    want = (
        np.outer(n > 0, n > 0) / (n > 0).sum()
        if smoothing == "uniform"
        else eq2(s, n, 0.7 if smoothing == "similarity+freq" else 0.0, 0.6)
    )
    assert np.allclose(array(got.targets), (1 - eps) * np.eye(c) + eps * want, atol=1e-6)
    unseen = torch.from_numpy(n == 0)
    assert unseen.any() and (got.targets[~unseen][:, unseen] == 0).all()
    assert torch.allclose(got.targets[~unseen].sum(1), torch.ones(int((~unseen).sum())))
    literal = learned(replace(args, convention="literal"), tail, photos)
    assert np.allclose(array(literal.targets), (1 - eps) * np.eye(c) + eps * want.T, atol=1e-6)


def test_crops_are_a_tenth_larger_at_each_side(tmp_path):
    """A box of 20 x 30 pixels takes 2 and 3 more at each end; none beyond the picture."""

    def crop(box: tuple[int, ...], lit: tuple[int, ...]) -> Tensor:
        (x0, y0, x1, y1), image = lit, np.zeros((80, 100, 3), np.uint8)
        image[y0:y1, x0:x1] = 200
        Image.fromarray(image).save(tmp_path / "a.png")
        x0, y0, x1, y1 = map(float, box)
        thing = Thing(1, [np.array([x0, y0, x1, y0, x1, y1, x0, y1])], False, 0.0)
        photo = Photo("a", tmp_path / "a.png", 1, 80, 100, (thing,))
        data = Instances("lvis", tmp_path, ["a", "b"], [1, 2], [photo], [], [])
        found, labels = bpl.crop_objects(photo, data, [0], 64)
        assert (
            found.shape == (1, 3, 64, 64) and found.dtype == torch.uint8 and labels.tolist() == [1]
        )
        return found[0, 0]

    box, larger = (40, 20, 70, 40), (37, 18, 73, 42)
    assert (crop(box, larger) == 200).all()
    for i, by in enumerate((1, 1, -1, -1)):
        edge = crop(box, (*larger[:i], larger[i] + by, *larger[i + 1 :]))
        assert not (edge == 200).all() and (edge[8:-8, 8:-8] == 200).all()
    assert (crop((0, 60, 30, 80), (0, 58, 33, 80)) == 200).all()


# -------------------------------------------------------------------------------------------- Eq. 4


def samples(c: int = 6, n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Confidences, half of them on a border of bins, whether right, and classes; class 2 has
    none."""
    g = np.random.default_rng(1)
    conf = np.where(g.random(n) < 0.5, g.random(n), g.integers(0, 11, n) / 10).astype(np.float32)
    labels = g.choice([k for k in range(c) if k != 2], n)
    return (
        torch.from_numpy(conf),
        torch.from_numpy(g.random(n) < conf * 0.8),
        torch.from_numpy(labels),
    )


@pytest.mark.parametrize("bins", [1, 5, 10, 15, 100])
def test_ccece_is_equation_4(bins):
    """The sum over bins by loops; and, being signed, mean accuracy minus mean confidence for any
    number of bins."""
    conf, right, labels = samples()
    delta, number = bpl.ccece(conf, right, labels, 6, bins)
    for i in range(6):
        mine = [
            (p, r)
            for p, r, k in zip(conf.tolist(), right.tolist(), labels.tolist(), strict=True)
            if k == i
        ]
        total = 0.0
        for b in range(bins):
            here = [
                (p, r)
                for p, r in mine
                if b / bins <= p < (b + 1) / bins or (b == bins - 1 and p == 1)
            ]
            if here:
                acc, sure = (
                    sum(v) / len(here) for v in ([r for _, r in here], [p for p, _ in here])
                )
                total += len(here) / len(mine) * (acc - sure)
        assert delta[i].item() == pytest.approx(total, abs=1e-6) and number[i] == len(mine)
        telescoped = np.mean([r for _, r in mine]) - np.mean([p for p, _ in mine]) if mine else 0
        assert delta[i].item() == pytest.approx(telescoped, abs=1e-6)
    assert delta[2] == 0 and number[2] == 0 and (delta[[0, 1, 3, 4, 5]] < -0.02).all()


def test_sign_of_ccece_and_borders():
    """Negative: overconfident. A confidence of 1 is of the last bin, not of the next class."""
    delta, number = bpl.ccece(
        torch.tensor([0.9, 0.9, 0.2, 0.2, 1.0, 1.0, 0.0]),
        torch.tensor([1, 0, 1, 1, 1, 0, 0]),
        torch.tensor([0, 0, 1, 1, 2, 3, 3]),
        4,
    )
    assert delta.tolist() == pytest.approx([-0.4, 0.8, 0.0, -0.5]) and number.tolist() == [
        2,
        2,
        1,
        2,
    ]
    nothing = torch.zeros(0)
    delta, number = bpl.ccece(nothing, nothing.bool(), nothing.long(), 3)
    assert delta.tolist() == [0, 0, 0] and number.tolist() == [0, 0, 0]


def shrunk(delta: list[float], number: list[int], groups: list[str], kappa: float) -> list[float]:
    """(n Delta + kappa m) / (n + kappa), m the mean of the group, by samples, itself drawn so to
    the mean of all."""

    def mean(mine: list[int], towards: float) -> float:
        n, total = (
            sum(v) for v in zip(*((number[j], number[j] * delta[j]) for j in mine), strict=True)
        )
        return (total + kappa * towards) / (n + kappa)

    whole = sum(n * d for n, d in zip(number, delta, strict=True)) / sum(number)
    return [
        mean([i], mean([j for j, h in enumerate(groups) if h == g], whole)) if kappa else delta[i]
        for i, g in enumerate(groups)
    ]


@pytest.mark.parametrize("kappa", [0.0, 3.0, 20.0])
def test_shrunk_by_loops(kappa):
    """Recipe 3.3; a class without a sample has its group's mean, a group without one that of
    all."""
    delta, number = (
        torch.tensor([0.5, -0.3, 0.0, 0.2, -0.8, 0.0]),
        torch.tensor([1, 40, 0, 3, 5, 0]),
    )
    groups, whole = ["r", "r", "r", "c", "c", "f"], (0.5 - 12 + 0.6 - 4) / 49
    got = bpl.shrunk(delta, number, groups, kappa)
    assert got.tolist() == pytest.approx(
        shrunk(delta.tolist(), number.tolist(), groups, kappa), abs=1e-6
    )
    if kappa:
        assert got[5].item() == pytest.approx(whole)
        assert got[2].item() == pytest.approx((0.5 - 12 + kappa * whole) / (41 + kappa))
    assert delta[0] == 0.5  # the argument stays
    nothing = bpl.shrunk(torch.zeros(6), torch.zeros(6, dtype=torch.int64), groups, kappa)
    assert nothing.tolist() == [0] * 6


# -------------------------------------------------------------------------------------------- Eq. 5


SUPPORTS = {
    "all": lambda y, row: True,
    "support": lambda y, row: y > 0.02,
    "top1": lambda y, row: y == max(row),
}


@pytest.mark.parametrize("support", SUPPORTS)
def test_corrected_is_equation_5(support):
    """In [0, 1]. Scores up to 0.02 are no detections: they stay out unless they are corrected."""
    y = torch.cat([torch.rand(40, 7), 0.04 * torch.rand(40, 7)])
    y[0, 3], y[1, 3] = 0.02, 0.0201
    delta = torch.tensor([-0.4, 0.3, 0.0, 0.05, -0.01, 0.2, -0.6])
    got = bpl.corrected(y, delta, 1.5, support)
    for row, out in zip(y.tolist(), got.tolist(), strict=True):
        want = [
            min(max(p + 1.5 * d, 0), 1) if SUPPORTS[support](p, row) else p if p > 0.02 else 0
            for p, d in zip(row, delta.tolist(), strict=True)
        ]
        assert out == pytest.approx(want, abs=1e-6)
    assert got.min() == 0 and got.max() == 1
    assert bpl.corrected(
        torch.tensor([[0.6], [0.9]]), torch.tensor([-0.2]), 2.0, support
    ).flatten().tolist() == pytest.approx([0.2, 0.5])


def test_correcting_all_classes_is_destructive():
    """Recipe 3.4: one object of LVIS, its top score 0.6, and two confusers; 337 rare classes are
    underconfident."""
    c = RARE + COMMON + FREQUENT
    y = torch.zeros(1, c)
    y[0, 1000], y[0, 1001], y[0, 1002] = 0.6, 0.15, 0.05
    rare = (torch.arange(c) < RARE).float()
    for rise, mass in ((0.05, 34.5), (0.01, 7.6)):
        assert bpl.corrected(y, rise * rare, 2.0, "all").sum().item() == pytest.approx(
            mass, abs=0.1
        )
        assert torch.equal(bpl.corrected(y, rise * rare, 2.0), y)
    delta = 0.05 * rare - 0.26 * (1 - rare)  # and frequent ones are overconfident
    got = {support: bpl.corrected(y, delta, 2.0, support) for support in SUPPORTS}
    assert (
        got["all"].argmax() < RARE
        and y[0, got["all"].argmax()] == 0
        and got["support"].argmax() == 1000
    )
    assert got["support"].sum().item() == pytest.approx(0.08) and got[
        "top1"
    ].sum().item() == pytest.approx(0.28)
    y, lower = torch.rand(20, c) ** 8, -0.5 * torch.rand(c) - 0.02
    assert torch.equal(bpl.corrected(y, lower, 2.0, "all"), bpl.corrected(y, lower, 2.0)), (
        "all lower: one and the same"
    )


def test_pseudo_targets_are_table_1():
    y = torch.tensor([[0.6, 0.3, 0.02, 0.021], [0.1, 0.2, 0.9, 0.0]])
    delta = torch.tensor([-0.2, 0.1, 0.3, 0.2])
    one_hot = bpl.pseudo_targets(y, "onehot", None, 2.0)
    soft = bpl.pseudo_targets(y, "soft", None, 2.0)
    assert one_hot.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]] and one_hot.dtype == torch.float32
    assert soft.flatten().tolist() == pytest.approx([0.6, 0.3, 0, 0.021, 0.1, 0.2, 0.9, 0])
    for strength, row in ((2.0, [0.2, 0.5, 0, 0.421]), (0.5, [0.5, 0.35, 0, 0.121])):
        got = bpl.pseudo_targets(y, "calibrated", delta, strength)
        assert got[0].tolist() == pytest.approx(row)
    all_, top = (bpl.pseudo_targets(y, "calibrated", delta, 2.0, s) for s in ("all", "top1"))
    assert all_[1].tolist() == pytest.approx([0, 0.4, 1, 0.4]) and top[1].tolist() == pytest.approx(
        [0.1, 0.2, 1, 0]
    )


# ------------------------------------------------------------------------------------------- losses


def test_sigmoid_loss_by_loops():
    logits, probs = (
        3 * torch.randn(5, 4, dtype=torch.float64),
        torch.rand(5, 4, dtype=torch.float64),
    )
    probs[0], probs[1], known = 0, 1, torch.rand(5, 4) < 0.6
    logits.requires_grad_()
    got = bpl.sigmoid_loss(logits, probs, known)
    for r in range(5):
        s = [1 / (1 + math.exp(-z)) for z in logits[r].tolist()]
        want = -sum(
            t * math.log(p) + (1 - t) * math.log(1 - p)
            for p, t, k in zip(s, probs[r].tolist(), known[r].tolist(), strict=True)
            if k
        )
        assert got[r].item() == pytest.approx(want)
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    assert (
        torch.allclose(gradient, (logits.sigmoid() - probs) * known)
        and (gradient[~known] == 0).all()
    )


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_lambda_that_cancels_the_teachers_error(weight):
    """Recipe 3.3: labels leave the confidence at c, pseudo labels pull it to c + lambda Delta. With
    equal weights half of lambda arrives, so lambda = 2 cancels; in general 1 + 1 / weight."""
    c, delta, one = 0.6, torch.tensor([-0.15]), torch.ones(1, 1)
    for strength in (1.0, 2.0, 1 + 1 / weight):
        target = bpl.pseudo_targets(torch.tensor([[c]]), "calibrated", delta, strength)
        z = torch.zeros(1, 1, requires_grad=True)
        for _ in range(120):
            loss = bpl.sigmoid_loss(z, c * one, one) + weight * bpl.sigmoid_loss(z, target, one)
            z.data -= 2 * torch.autograd.grad(loss.sum(), z)[0]
        want = c + strength * delta.item() * weight / (1 + weight)
        assert z.sigmoid().item() == pytest.approx(want, abs=1e-4)
    assert want == pytest.approx(c + delta.item())


# ----------------------------------------------------------------------------------- federated loss


def test_known_classes_of_an_image():
    """Its own, and others up to --federated in all; none without labels; of soft labels all that
    they speak of."""
    images = [9, 4, 0, 25, 1, 16, 3, 0, 2, 5]
    counts = torch.tensor(images)
    objects = [
        objects_at([[0, 0, 9, 9]] * len(k), k, 10) for k in ([1, 5, 1], [], [0, 1, 3, 4, 5, 6])
    ]
    got = bpl.known_classes(objects, counts, 4, draws(0, 1, 2))
    assert got.shape == (3, 10) and got.dtype == torch.bool and got.sum(1).tolist() == [4, 4, 6]
    assert got[0, [1, 5]].all() and got[2].nonzero().flatten().tolist() == [0, 1, 3, 4, 5, 6]
    assert not got[:, [2, 7]].any()
    assert bpl.known_classes(objects, counts, 50, draws(0, 1, 2)).sum() == 3 * 8
    every = bpl.known_classes(objects, counts, 0, draws(0, 1, 2))
    assert every.tolist() == [[n > 0 for n in images]] * 3
    for place in ((0, 3), (1, 9), (2, 4), (2, 7)):
        objects[0].named[place] = True
    soft = bpl.known_classes(objects[:1], counts, 1, draws(0))
    assert soft[0].nonzero().flatten().tolist() == [1, 3, 4, 5, 9]


def test_soft_labels_of_unlabeled_classes_take_no_place():
    counts, o = torch.tensor([9, 4, 0, 0, 0, 5, 6, 7]), objects_at([[0, 0, 9, 9]], [1], 8)
    o.named[0, 2:5] = True
    assert bpl.known_classes([o], counts, 4, draws(0)).sum() == 4


def test_known_classes_are_drawn_by_the_root_of_their_pictures():
    """Of one more class each class's share is its root over all roots; of several, as numpy draws
    without replacement. The draw is the generator's alone."""
    images, n = [100, 4, 0, 25, 1, 64, 9], 3000
    of_images, o = torch.tensor(images), objects_at([[0, 0, 9, 9]], [1], 7)
    seeds = range(n)
    got = bpl.known_classes([o] * n, of_images, 2, draws(*seeds))
    roots = np.sqrt(images) * (np.arange(7) != 1)
    counts, want = array(got.sum(0))[roots > 0], n * (roots / roots.sum())[roots > 0]
    # 0.999 of chi-square with four degrees of freedom
    assert ((counts - want) ** 2 / want).sum() < 18.5
    g = np.random.default_rng(0)
    three = bpl.known_classes([o] * n, of_images, 4, draws(*seeds)).float().mean(0)
    numpys = np.mean(
        [np.isin(np.arange(7), g.choice(7, 3, False, roots / roots.sum())) for _ in range(n)],
        axis=0,
    )
    assert np.allclose(array(three), numpys + (np.arange(7) == 1), atol=0.04)
    again = bpl.known_classes([o] * 20, of_images, 2, draws(*reversed(seeds[:20])))
    assert torch.equal(again, got[:20].flip(0)) and len(got[:20].unique(dim=0)) > 1


def test_repeat_factors_of_lvis():
    """Recipe 1.8: sqrt(0.001 / share) of the rarest class; at most 10 of 100,170 pictures; none of
    a thousand."""

    def holding(n: int, *counts: int) -> list[Photo]:
        def photo(i: int) -> Photo:
            return Photo(
                "",
                Path(),
                things=tuple(Thing(k, [], False, 1.0) for k, m in enumerate(counts) if i < m),
            )

        first = max(counts[1:])
        return [photo(i) for i in range(first)] + [photo(first)] * (n - first)

    found = bpl.repeat_factors(holding(100_170, 100_170, 101, 100, 25, 1), 5, 0.001)
    assert found[0] == pytest.approx(math.sqrt(100.17)) and found[0] == pytest.approx(10, abs=0.01)
    assert found[1] == pytest.approx(math.sqrt(100.17 / 25)) and found[25] == pytest.approx(
        math.sqrt(1.0017)
    )
    assert (found[100:] == 1).all() and found[99] > 1
    assert (bpl.repeat_factors(holding(1000, 1000, 3, 1), 4, 0.001) == 1).all()


# ------------------------------------------------------------------------------------ pseudo labels


def test_objects_found():
    """From the threshold on; one of those that overlap, of whatever class; sides over 2 pixels; a
    hundred at most, best first."""
    boxes = torch.tensor(
        [[0, 0, 10, 10], [1, 0, 11, 10], [0, 1, 10, 11], [30, 30, 40, 40], [50, 0, 60, 10.0]]
    )
    probs = torch.tensor(
        [[0.5, 0.1, 0], [0.2, 0.7, 0.1], [0.6, 0, 0.3], [0, 0, 0.05], [0, 0.0625, 0]]
    )
    assert bpl.objects_found(boxes, probs, 0.0625).tolist() == [1, 4]
    assert bpl.objects_found(boxes, probs, 0.3).tolist() == [1]
    narrow = boxes.clone()
    narrow[4, 2] = 52
    assert bpl.objects_found(narrow, probs, 0.0625).tolist() == [1]
    corner = torch.arange(130.0)[:, None] * torch.tensor([20.0, 0, 20, 0])
    conf = torch.linspace(0.06, 0.9, 130)[torch.randperm(130)]
    scores = conf[:, None] * torch.tensor([[0.0, 1, 0]])
    found = bpl.objects_found(corner + boxes[0], scores, 0.05)
    assert found.tolist() == conf.argsort(descending=True)[:100].tolist()
    assert bpl.objects_found(boxes[:0], probs[:0], 0.05).tolist() == []
    for height, kept in ((4.9, [0, 1]), (5.1, [0])):  # an overlap of 0.49 stays, one of 0.51 goes
        pair = torch.tensor([[0, 0, 10, 10], [0, 0, 10, height]])
        assert bpl.objects_found(pair, torch.tensor([[0.9], [0.8]]), 0.05).tolist() == kept


# of one view of 32 x 32 pixels: box, scores
REGIONS = {
    "sure": ([2, 2, 12, 12], [0.6, 0.3, 0.01, 0]),
    "lower": ([16, 2, 28, 14], [0.1, 0.45, 0.4, 0.02]),
    "thin": ([2, 16, 4, 28], [0, 0, 0.9, 0]),
    "small": ([16, 16, 28, 28], [0, 0, 0.7, 0]),
    "tie": ([5, 19, 14, 31], [0.8, 0.9, 0, 0]),
}


DELTA = torch.tensor([-0.2, 0.1, 0, 0.3])


def stub(*views: list[str], size: int = 32):
    """A teacher that finds these regions; the mask of the small one has 5 pixels, others fill their
    boxes."""
    calls = []

    def infer(x: Tensor, least: float = 0.0):
        calls.append(x)
        rows = [[REGIONS[name] for name in view] for view in views]
        return ["a pyramid"], [
            (
                torch.tensor([b for b, _ in view]).view(-1, 4).float(),
                torch.tensor([p for _, p in view]).view(-1, 4),
            )
            for view in rows
        ]

    def masks(pyramid: list, image: int, boxes: Tensor, labels: Tensor) -> Tensor:
        calls.append((pyramid, image, labels.tolist()))
        out = torch.full((len(boxes), 28, 28), 0.51)
        small_one = (boxes == torch.tensor([16.0, 16, 28, 28])).all(1)
        out[small_one] -= 0.02 * ((torch.arange(28) >= 11) | (torch.arange(28)[:, None] >= 2))
        return out

    return SimpleNamespace(infer=infer, masks=masks), calls


def kept_of(
    view: list[str], args: Args, delta: Tensor | None = DELTA
) -> tuple[Objects, dict, list]:
    teacher, calls = stub(view)
    weak = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    (found,), conf = bpl.pseudo_labels(teacher, weak, delta, args)
    log = bpl.pseudo_log([found], conf, WORLD)
    assert torch.allclose(calls[0], (weak - MEAN) / STD, atol=1e-5)
    return found, log, calls


def test_pseudo_labels_of_hand_made_scores():
    args = small(threshold=0.5, size_threshold=5.0, lambda_calib=2.0)
    found, log, calls = kept_of(list(REGIONS), args)  # sides over 2 pixels, areas over 5
    assert calls[1][:2] == (["a pyramid"], 0) and sorted(calls[1][2]) == [1, 1, 2]
    order = [b for name in ("tie", "sure") for b in [REGIONS[name][0]]]
    assert found.boxes.tolist() == order and found.labels.tolist() == [1, 1]
    assert torch.allclose(found.probs, torch.tensor([[0.4, 1, 0, 0], [0.2, 0.5, 0, 0]]))
    for mask, (x0, y0, x1, y1) in zip(found.masks, order, strict=True):
        want = torch.zeros(32, 32, dtype=torch.bool)
        want[y0:y1, x0:x1] = True
        assert mask.dtype == torch.bool and torch.equal(mask, want)
    assert log["conf"].item() == pytest.approx(0.75) and log["mass"].item() == pytest.approx(
        (1.4 + 0.7) / 2
    )
    assert log["pseudo_per_image"] == 2 and log["pseudo_none"] == 0
    assert (
        found.named.tolist() == [[True, True, False, False]] * 2 and not found.probs.requires_grad
    )
    for size, number in ((4.0, 3), (5.0, 2), (6.0, 2), (99.9, 2), (100.0, 1), (108.0, 0)):
        assert (
            len(kept_of(list(REGIONS), replace(args, size_threshold=size))[0].labels) == number
        ), size


def test_threshold_is_of_raw_scores():
    args, names = small(threshold=0.5, size_threshold=5.0), ["sure", "lower", "tie"]
    for mode in ("onehot", "soft", "calibrated"):  # Table 1: rows differ in targets alone
        found, log, _ = kept_of(names, replace(args, pseudo=mode))
        assert found.boxes.tolist() == [REGIONS["tie"][0], REGIONS["sure"][0]]
        assert log["conf"].item() == pytest.approx(0.75)
    # as high as it: stays
    assert len(kept_of(["sure"], replace(args, threshold=0.6))[0].labels) == 1
    assert len(kept_of(["sure"], replace(args, threshold=0.601))[0].labels) == 0


def test_classes_that_pseudo_labels_speak_of():
    """Of a soft label all scores over 0.02, also those that Eq. 5 takes to zero, and all that it
    makes larger."""
    for flags, want in (
        (dict(), [0, 1, 2]),
        (dict(pseudo="soft"), [0, 1, 2]),
        (dict(pseudo="onehot"), [1]),
        (dict(support="all"), [0, 1, 2, 3]),
        (dict(support="top1"), [0, 1, 2]),
    ):
        args = small(threshold=0.3, size_threshold=5.0, **flags)
        found, _, _ = kept_of(["lower"], args, torch.tensor([-0.2, 0.1, -0.3, 0.2]))
        assert found.named[0].nonzero().flatten().tolist() == want, flags
    assert (
        found.probs[0, 1] > 0
        and kept_of(["lower"], small(), torch.tensor([-0.2, 0.1, -0.3, 0]))[0].probs[0, 0] == 0
    )


def test_mask_channel_is_the_best_corrected_class():
    """Of equal ones the raw best: also where all are cut to 1, or to 0."""

    def channel(name: str, *delta: float, **flags) -> int:
        args = small(threshold=0.3, size_threshold=5.0, lambda_calib=1.0, **flags)
        found, _, calls = kept_of([name], args, torch.tensor(delta))
        assert found.labels.tolist() == calls[1][2]
        return found.labels.item()

    assert channel("sure", 0, 0, 0, 0) == 0 and channel("sure", -0.2, 0.2, 0, 0) == 1
    assert (
        channel("sure", -0.2, 0.2, 0, 0, pseudo="soft")
        == channel("sure", -0.2, 0.2, 0, 0, pseudo="onehot")
        == 0
    )
    assert channel("tie", 0.5, 0.5, 0, 0) == 1 and channel("tie", -0.9, -0.9, 0, 0) == 1
    assert channel("lower", -0.5, -0.5, -0.5, -0.5) == 1


def test_mask_channel_is_of_the_support():
    """Recipe 3.4: the best corrected class among the support, also where all classes are
    corrected."""
    args = small(threshold=0.5, size_threshold=5.0, lambda_calib=1.0, support="all")
    found, _, _ = kept_of(["sure"], args, torch.tensor([-0.5, -0.25, 0, 0.3]))
    assert torch.allclose(
        found.probs, torch.tensor([[0.1, 0.05, 0.01, 0.3]])
    ) and found.labels.tolist() == [0]


def test_pseudo_labels_of_views_without_any():
    teacher, calls = stub([], ["sure", "tie"], ["lower"])
    weak = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    found, conf = bpl.pseudo_labels(
        teacher, weak, None, small(pseudo="soft", threshold=0.5, size_threshold=5.0)
    )
    log = bpl.pseudo_log(found, conf, WORLD)
    assert [len(o.labels) for o in found] == [0, 2, 0] and [image for _, image, _ in calls[1:]] == [
        0,
        1,
        2,
    ]
    assert (
        found[0].boxes.shape == (0, 4)
        and found[0].masks.shape == (0, 32, 32)
        and found[0].probs.shape == (0, 4)
    )
    assert log["pseudo_per_image"].item() == pytest.approx(2 / 3) and log[
        "pseudo_none"
    ].item() == pytest.approx(2 / 3)
    assert log["conf"].item() == pytest.approx(0.75) and log["mass"].item() == pytest.approx(
        (0.9 + 1.7) / 2
    )
    log = bpl.pseudo_log(
        *bpl.pseudo_labels(stub([], [])[0], weak[:2], None, small(pseudo="soft")), WORLD
    )
    assert log["conf"] == log["mass"] == log["pseudo_per_image"] == 0 and log["pseudo_none"] == 1


# ------------------------------------------------------------------------ what regions shall become


def test_targets_of_regions():
    o = objects_at([[0, 0, 9, 9], [5, 6, 20, 30]], [2, 0], 4)
    probs, boxes = bpl.targets_of_regions(torch.tensor([1, -1, 0, 1]), o)
    nothing, rows = torch.zeros(4), o.probs
    assert torch.equal(probs, torch.stack([rows[1], nothing, rows[0], rows[1]]))
    assert torch.equal(boxes, torch.stack([o.boxes[1], nothing, o.boxes[0], o.boxes[1]]))
    probs, boxes = bpl.targets_of_regions(torch.tensor([-1, -1]), objects_at([], [], 4))
    assert probs.shape == boxes.shape == (2, 4) and not probs.any() and not boxes.any()


def test_labeled_objects():
    masks = objects_at([[4, 6, 20, 30], [0, 1, 64, 9]], [2, 0], 3).masks
    target, table = Target(torch.tensor([2, 0]), masks), torch.rand(3, 3)
    o = bpl.labeled_objects(target, table)
    assert torch.equal(o.probs, table[[2, 0]]) and torch.equal(o.masks, target.masks)
    assert o.boxes.tolist() == [[4, 6, 20, 30], [0, 1, 64, 9]]
    assert torch.equal(o.labels, target.labels)
    assert torch.equal(o.named, torch.eye(3)[[2, 0]].bool())


@pytest.mark.parametrize("k", [1, 2])
def test_mask_targets_by_loops(k):
    """Each of 28 x 28 cells of k x k pixels: 1 from a half on; of the object that the box is
    matched to."""
    masks = (torch.rand(3, 70, 70) < 0.5).to(torch.uint8)
    boxes, matches = torch.tensor([[3, 5], [10, 0], [0, 2], [6, 6]]), torch.tensor([2, 0, 2, 0])
    got = bpl.mask_targets(masks, matches, torch.cat([boxes, boxes + 28 * k], dim=1).float())
    halves = 0
    for (x, y), m, found in zip(boxes.tolist(), matches.tolist(), got, strict=True):
        for i, j in np.ndindex(28, 28):
            cell = (
                masks[m, y + k * i : y + k * i + k, x + k * j : x + k * j + k].float().mean().item()
            )
            halves += cell == 0.5
            assert found[i, j].item() == float(cell >= 0.5)
    assert halves >= 500 * (k - 1) and got.dtype == torch.float32
    assert bpl.mask_targets(masks, matches[:0], torch.zeros(0, 4)).shape == (0, 28, 28)


def cascade(
    monkeypatch, objects: list[Objects], known: Tensor, **flags
) -> tuple[list, dict, bpl.CascadeHeads]:
    """What sigmoid_loss is given in the three stages, and the losses."""
    args, b, seen = small(roi_batch=24, **flags), len(objects), []
    torch.manual_seed(3)
    heads = bpl.CascadeHeads(args, known.shape[1])
    for layer in (*(head.classes for head in heads.boxes), heads.mask.masks):  # deltas stay small
        nn.init.normal_(layer.weight, std=1)
    heads.learned[3] = False
    pyramid = [torch.randn(b, 8, 64 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    near = [o.boxes.repeat(4, 1) + torch.randint(-1, 2, (4 * len(o.boxes), 4)) for o in objects]
    far = [
        torch.tensor([[40.0, 2, 60, 12], [3, 50, 60, 62], [50, 20, 63, 60]])[: 3 - i]
        for i in range(b)
    ]
    proposals = [torch.cat(x).clamp(0, 64) for x in zip(near, far, strict=True)]
    real = bpl.sigmoid_loss
    monkeypatch.setattr(bpl, "sigmoid_loss", lambda *x: seen.append(x) or real(*x))
    loss = heads.losses(pyramid, proposals, objects, known, draws(*range(b)))
    apart = [
        heads.losses(
            [x[i : i + 1] for x in pyramid],
            proposals[i : i + 1],
            objects[i : i + 1],
            known[i : i + 1],
            draws(i),
        )
        for i in range(b)
    ]
    monkeypatch.setattr(bpl, "sigmoid_loss", real)
    return seen[:3], loss | {"apart": apart}, heads


OBJECTS = [([[2, 2, 30, 28], [30, 30, 48, 62]], [1, 4]), ([[8, 4, 50, 40]], [0])]


def test_smooth_labels_in_all_heads(monkeypatch):
    objects = [objects_at(*o, 5) for o in OBJECTS]
    every = torch.ones(2, 5, dtype=torch.bool)
    seen, _, _ = cascade(monkeypatch, objects, every)
    rows = {tuple(row) for o in objects for row in o.probs.tolist()}
    for _, probs, taught in seen:
        found = {tuple(row) for row in probs.tolist()}
        assert found == rows | {(0.0,) * 5} and taught.all()  # and background


def test_losses_are_means_over_images_of_means_over_regions(monkeypatch):
    objects, every = [objects_at(*o, 5) for o in OBJECTS], torch.ones(2, 5, dtype=torch.bool)
    seen, loss, _ = cascade(monkeypatch, objects, every)
    for name in ("mask", *(f"{kind}{i}" for kind in ("class", "box") for i in (1, 2, 3))):
        values_ = [part[name].item() for part in loss["apart"]]
        assert loss[name].item() == pytest.approx(sum(values_) / 2, rel=1e-4), name
        assert abs(values_[0] - values_[1]) > 0.02 * values_[0], name
    logits, probs, _ = seen[0]
    real = (probs > 0).any(1).split([9, 7])
    value = F.binary_cross_entropy_with_logits(logits, probs, reduction="none").sum(1).split([9, 7])
    assert loss["class1"].item() == pytest.approx(sum(v.mean().item() for v in value) / 2, rel=1e-4)
    assert [r.sum() for r in real] == [6, 5]  # objects are a quarter of 24 at most


def test_federated_loss_learns_known_classes_alone(monkeypatch):
    objects, known = [objects_at(*o, 5) for o in OBJECTS], torch.zeros(2, 5, dtype=torch.bool)
    known[0, [1, 4]] = known[1, [0, 4]] = True
    seen, loss, heads = cascade(monkeypatch, objects, known)
    columns = [0, 1, 4]
    for logits, probs, taught in seen:
        assert logits.shape == probs.shape == taught.shape and logits.shape[1] == 3
        foreground = (probs > 0).any(1)
        allowed = {tuple(row[columns].tolist()) for row in known}
        assert {tuple(row) for row in taught[~foreground].tolist()} <= allowed
        assert {tuple(row) for row in taught[foreground].tolist()} == allowed
    sum(loss[f"class{i}"] for i in (1, 2, 3)).backward()
    for head in heads.boxes:
        assert (head.classes.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == columns


# ----------------------------------------------------------------------------------------- the step


def pictures(low: int, high: int, count: int) -> Tensor:
    return torch.randint(low, high, (count, 3, 64, 64), dtype=torch.uint8)


def batches(seed: int, count: int = 2) -> tuple[Batch, Batch]:
    """Dark labeled pictures, and unlabeled ones: middling for the teacher, bright for the
    student."""
    torch.manual_seed(seed)
    objects = [objects_at(b, k, 5) for b, k in (*OBJECTS, ([], []), ([[1, 1, 63, 40]], [4]))][
        :count
    ]
    targets = [Target(o.labels, o.masks) for o in objects]
    return (
        Batch(pictures(0, 70, count), None, targets, torch.zeros(count)),
        Batch(pictures(190, 256, count), pictures(100, 150, count), [], torch.zeros(count)),
    )


NAMES = ["a", "b", "c", "d", "e"]


STEP_DELTA = torch.tensor([-0.1, 0.05, 0.0, 0.3, 0.1])


def begun(
    args: Args, tmp_path: Path, phase: str = "student", unlearned=(3,)
) -> tuple[bpl.State, dict[str, Tensor]]:
    """The phase at step 10 of a run, and the weights of the trained teacher; nothing is labeled as
    class d."""
    args.out, classes = str(tmp_path), classes_of([7, 3, 2, 0, 9])
    trained = shaken(bpl.Detector(args, 5), 0.05)
    trained.heads.learned[list(unlearned)] = False
    with torch.no_grad():
        for head in trained.heads.boxes:
            head.classes.weight.mul_(30)  # scores differ from region to region
    checkpoints.save_checkpoint(
        tmp_path / "teacher.pt",
        bpl.SCRIPT,
        {
            "classes": NAMES,
            "networks": {"supervised": trained.state_dict()},
            "step": 10,
            "settings": {},
        },
    )
    data = SimpleNamespace(classes=NAMES, root=tmp_path)
    delta = STEP_DELTA if phase == "student" else None
    s = bpl.begin(bpl.Phase(phase, 10, 20), args, data, classes, delta, WORLD, None)
    return s, values(trained)


def watched(s: bpl.State) -> list:
    """Each call of a network: (who, pictures, objects, known, states of generators)."""
    calls = []
    s.student.register_forward_pre_hook(
        lambda _, x: calls.append(
            (
                "student",
                x[0],
                x[1],
                x[2],
                [g.get_state() for g in x[3]],
                torch.is_grad_enabled(),
                s.student.training,
            )
        )
    )
    if s.teacher is not None:
        real = s.teacher.infer
        s.teacher.infer = lambda x, least: (
            calls.append(
                ("teacher", x, values(s.teacher), torch.is_grad_enabled(), s.teacher.training)
            )
            or real(x, least)
        )
    return calls


def repeated(net: nn.Module, call: tuple) -> Tensor:
    """The loss of a watched call again."""
    _, images, objects, known, states, *_ = call
    again = draws(*[0] * len(states))
    for g, state in zip(again, states, strict=True):
        g.set_state(state)
    return sum(net(images, objects, known, again).values())


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in net.named_parameters()
    }


def test_a_phase_begins_with_the_trained_teacher(tmp_path):
    s, trained = begun(small(), tmp_path)
    assert close(values(s.student), trained, 0) and close(values(s.teacher), trained, 0)
    assert (
        not s.teacher.training
        and s.student.training
        and not any(p.requires_grad for p in s.teacher.parameters())
    )
    assert all(p.requires_grad for p in s.student.parameters()) and [*s.networks()] == [
        "student",
        "teacher",
    ]
    assert not any(
        p.data_ptr() == q.data_ptr()
        for p, q in zip(s.teacher.parameters(), s.student.parameters(), strict=True)
    )
    s, _ = begun(small(), tmp_path, "teacher")
    assert s.student.heads.learned.tolist() == [True, True, True, False, True]
    assert s.teacher is None and [*s.networks()] == ["supervised"]


def test_the_student_may_learn_classes_that_its_teacher_did_not(tmp_path):
    """Such as one trained on another split; and the teacher is then a copy of the student."""
    s, _ = begun(args := small(), tmp_path, unlearned=(2, 3))
    assert s.student.heads.learned.tolist() == [True, True, True, False, True]
    bpl.train_step(s, *batches(1), args, WORLD)
    assert s.teacher.heads.learned.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("labels", ["smoothed", "onehot"])
def test_the_student_learns_from_both_halves(labels, tmp_path):
    """Labels with Eq. 3's rows; strong views with what the teacher finds on the weak ones, with Eq.
    5. The gradient is that of the sum of both losses, the second one weighted; the teacher has
    none."""
    args = small(student_labels=labels, unsup_weight=0.3, lr=0.01, ema=1.0)  # the teacher stays
    s, trained = begun(args, tmp_path)
    s.teacher.requires_grad_(True)
    calls, (labeled, unlabeled), twin = watched(s), batches(1), copy.deepcopy(s.student)
    twin._forward_pre_hooks.clear()
    for p in s.student.parameters():
        p.grad = torch.ones_like(p)  # of a step before
    log = bpl.train_step(s, labeled, unlabeled, args, WORLD)
    assert [c[0] for c in calls] == ["student", "teacher", "student"]
    first, asked, second = calls
    for call, x in zip(calls, (labeled.images, unlabeled.weak, unlabeled.images), strict=True):
        assert torch.allclose(call[1], (x - MEAN) / STD, atol=1e-5)
        assert call[-1] == call[-2] == (call[0] == "student")  # training mode, and gradients
    table = s.classes.targets if labels == "smoothed" else torch.eye(5)
    for o, target in zip(first[2], labeled.targets, strict=True):
        assert torch.equal(o.probs, table[target.labels]) and torch.equal(o.masks, target.masks)
    found, _ = bpl.pseudo_labels(s.teacher, unlabeled.weak, STEP_DELTA, args)
    raw, _ = bpl.pseudo_labels(s.teacher, unlabeled.weak, None, replace(args, pseudo="soft"))
    assert sum(len(o.labels) for o in found) > 3
    for o, want, y in zip(second[2], found, raw, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(o, want, strict=True))
        assert torch.allclose(
            o.probs, torch.where(y.probs > 0, (y.probs + 2 * STEP_DELTA).clamp(0, 1), 0), atol=1e-6
        )
    for known, y in zip(second[3], raw, strict=True):
        assert known[(y.probs > 0).any(0)].all() and not known[3]
    losses = [repeated(twin, call) for call in (first, second)]
    (losses[0] + 0.3 * losses[1]).backward()
    assert close(gradients(s.student), gradients(twin), 1e-5)
    assert [log["loss_l"].item(), log["loss_u"].item()] == pytest.approx(
        [v.item() for v in losses], rel=1e-4
    )
    assert log["pseudo_per_image"].item() == sum(len(o.labels) for o in found) / 2
    assert all(p.grad is None for p in s.teacher.parameters()) and close(
        values(s.teacher), trained, 0
    )
    assert not close(values(s.student), trained)


def test_a_supervised_phase_does_not_look_at_unlabeled_images(tmp_path):
    s, _ = begun(args := small(student_labels="onehot"), tmp_path, "teacher")
    calls, (labeled, _), twin = watched(s), batches(1), copy.deepcopy(s.student)
    twin._forward_pre_hooks.clear()
    log = bpl.train_step(s, labeled, None, args, WORLD)
    assert len(calls) == 1 and not any(name.endswith("_u") or "pseudo" in name for name in log)
    for o, target in zip(calls[0][2], labeled.targets, strict=True):
        # Eq. 3, whatever the student learns
        assert torch.equal(o.probs, s.classes.targets[target.labels])
    repeated(twin, calls[0]).backward()
    assert close(gradients(s.student), gradients(twin), 1e-5)
    args.clip = 1e-3
    bpl.train_step(s, labeled, None, args, WORLD)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients(s.student).values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_gradients_are_equal(tmp_path):
    found = []
    for parts in (1, 2, 3):
        torch.manual_seed(3)
        args = small(accumulate=parts, batch_size=4, ema=1.0)
        s, _ = begun(args, tmp_path)
        calls = watched(s)
        log = bpl.train_step(s, *batches(5, count=4), args, WORLD)
        assert sum(c[0] == "student" for c in calls) == 2 * min(parts, 2)
        found.append((gradients(s.student), log))
    for grads, log in found[1:]:
        assert close(found[0][0], grads, 1e-4) and found[0][1].keys() == log.keys()
        for name in ("loss_l", "loss_u", "pseudo_per_image", "class3_u", "mask_l", "rpn_u"):
            assert log[name].item() == pytest.approx(
                found[0][1][name].item(), rel=1e-3, abs=1e-5
            ), name


def test_ema_averages_parameters_and_floating_buffers():
    def net() -> nn.Module:
        made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        made(torch.randn(8, 3))
        return shaken(made, 0.3)

    teacher, student = net(), net()
    student[1].num_batches_tracked.fill_(7)
    before, learned = values(teacher), values(student)
    bpl.ema_update(teacher, student, 0.9)
    for name, now in teacher.state_dict().items():
        want = 0.9 * before[name] + 0.1 * learned[name] if now.is_floating_point() else before[name]
        assert torch.allclose(now, want, atol=1e-6), name
    bpl.ema_update(teacher, student, 0)
    assert all(
        torch.equal(now, learned[name])
        for name, now in teacher.state_dict().items()
        if now.is_floating_point()
    )
    assert all(torch.equal(now, learned[name]) for name, now in student.state_dict().items())


def test_teacher_follows_the_student(tmp_path):
    """After each step, with live statistics."""
    args = small(norm="live", lr=0.01)
    s, expected = begun(args, tmp_path)
    calls = watched(s)
    for done in range(1, 4):
        calls.clear()
        bpl.train_step(s, *batches(done), args, WORLD)
        s.step += 1
        (asked,) = (c for c in calls if c[0] == "teacher")
        assert close(asked[2], expected, 1e-5), "the teacher moved within the step"
        now = values(s.student)
        expected = {k: 0.75 * expected[k] + 0.25 * now[k] for k in now}
        assert close(values(s.teacher), expected, 1e-5), done
        assert not close(values(s.teacher), now)


# ------------------------------------------------------------------------------- Sec. 4.1: settings


def test_the_papers_numbers():
    args = bpl.preset("lvis")
    assert (args.eps, args.gamma, args.lambda_calib, args.unsup_weight) == (0.1, 1.5, 2, 1)
    assert (args.lr, args.schedule, args.teacher_batch_size, args.batch_size) == (
        4e-5,
        "cosine",
        32,
        16,
    )
    assert (args.holdout, args.neighbours, args.detections, args.backbone) == (
        0.15,
        64,
        300,
        "eva02_large_patch14_224.mim_m38m",
    )
    assert (args.smoothing, args.pseudo, args.split) == ("similarity+freq", "calibrated", "all")
    assert bpl.GRIDS["teacher"].keys() == {"eps", "gamma"} and bpl.GRIDS["student"].keys() == {
        "lambda_calib",
        "unsup_weight",
    }
    for name, values_ in itertools.chain(*(grid.items() for grid in bpl.GRIDS.values())):
        assert getattr(args, name) in values_


def test_learning_rate():
    """Linear from a thousandth over one percent of the steps, then a cosine to zero; or
    constant."""
    factor = bpl.learning_rate_factor
    for t in (0, 1, 75, 149, 150, 151, 7500, 14_999, 15_000):
        rise = 0.001 + 0.999 * t / 150 if t < 150 else 1
        wave = (1 + math.cos(math.pi * t / 15_000)) / 2
        assert factor(t, 15_000, "cosine", 0.01) == pytest.approx(rise * wave)
        assert factor(t, 15_000, "constant", 0.01) == pytest.approx(rise)
    assert factor(15_000, 15_000, "cosine", 0.01) == 0 and factor(1, 10, "constant", 0.0) == 1


def test_optimizer_of_a_cnn():
    args = small(lr=0.01, layer_decay=0.3, weight_decay=0.07)
    net = bpl.Detector(args, 3)
    optimizer = bpl.adamw(net, args, WORLD)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert (
        len(rates)
        == sum(len(g["params"]) for g in optimizer.param_groups)
        == len([*net.parameters()])
    )
    for name, p in net.named_parameters():
        assert rates[id(p)] == pytest.approx(0.003 if name.startswith("backbone.cnn") else 0.01), (
            name
        )
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (
            0.07,
            (0.9, 0.999),
            group["lr"],
        )


def test_layer_decay_of_24_blocks():
    """Recipe, section 7: 0.8^(24 - i) for block i, 0.8^25 for what is before them, 1 after."""
    net = nn.Module()
    net.backbone, net.neck = nn.Module(), nn.Linear(1, 1)
    net.backbone.proj, net.backbone.blocks = (
        nn.Linear(1, 1),
        nn.ModuleList(nn.Linear(1, 1) for _ in range(24)),
    )
    optimizer = bpl.adamw(net, bpl.preset("lvis"), WORLD)
    rates = {id(p): group["lr"] / 4e-5 for group in optimizer.param_groups for p in group["params"]}
    assert (
        rates[id(net.backbone.proj.weight)] == pytest.approx(0.8**25)
        and rates[id(net.neck.bias)] == 1
    )
    assert [rates[id(b.weight)] for b in net.backbone.blocks] == pytest.approx(
        [0.8 ** (24 - i) for i in range(24)]
    )
    assert len(optimizer.param_groups) == 26


PLANS = [
    (dict(), "heldout teacher student"),
    (dict(pseudo="soft"), "teacher student"),
    (dict(tune=True), "teacher student"),
    (dict(calibration="c.json"), "teacher student"),
    (dict(teacher="t.pt"), "heldout student"),
    (dict(teacher="t.pt", pseudo="onehot"), "student"),
    (dict(stage="teacher"), "teacher"),
    (dict(stage="student", teacher="t.pt"), "student"),
    (dict(stage="calibrate"), "heldout"),
    (dict(stage="calibrate", tune=True), "teacher"),
    (dict(stage="calibrate", teacher="t.pt"), ""),
    (dict(stage="prototypes"), ""),
    (dict(stage="retrieve"), ""),
]


@pytest.mark.parametrize("flags, phases", PLANS, ids=str)
def test_plan(flags, phases):
    """A network of 85 % of the labels only where Eq. 4 has to be measured, and the teacher has seen
    all labels."""
    steps = {"heldout": 7, "teacher": 7, "student": 5}
    got = bpl.plan(bpl.preset("lvis", teacher_steps=7, steps=5, **flags))
    assert [phase.name for phase in got] == phases.split()
    begin = 0
    for phase in got:
        assert (phase.begin, phase.end) == (begin, begin + steps[phase.name])
        begin = phase.end


def test_fifteen_percent_are_held_out():
    photos = [Photo(f"{i:06d}", Path()) for i in range(1000)]
    learned, held = bpl.hold_out(photos, bpl.preset("lvis").holdout, 0)
    assert (len(learned), len(held)) == (850, 150)
    assert {p.name for p in learned} | {p.name for p in held} == {p.name for p in photos}


EVA = dict(dataset="lvis")


REFUSED = [
    (dict(image_size=100), "multiple of 32"),
    (dict(image_size=1056, **EVA), "windows of 16 x 16"),
    (dict(stage="student"), "needs a trained teacher"),
    (dict(stage="student", teacher="t.pt"), "needs --calibration"),
    (dict(stage="retrieve"), "searches a --pool"),
    (dict(accumulate=2), "batch statistics"),
    (dict(scale=(2.0, 1.0)), "smaller number first"),
    (dict(pool="a", unlabeled="b"), "give one"),
    (dict(batch_size=1), "does not divide"),
]


@pytest.mark.parametrize("flags, sentence", REFUSED, ids=str)
def test_who_is_refused(flags, sentence):
    with pytest.raises(UserError, match=sentence):
        bpl.check(bpl.preset(**{"dataset": "shapes"} | flags), WORLD)


def test_who_is_not_refused():
    for flags in (
        dict(),
        EVA,
        dict(EVA, image_size=1536),
        dict(stage="student", teacher="t.pt", pseudo="soft"),
        dict(stage="student", teacher="t", tune=True),
        dict(stage="retrieve", pool="x", neighbours=3),
        dict(smoothing="uniform", eps=0.3),
    ):
        bpl.check(bpl.preset(**{"dataset": "shapes"} | flags), WORLD)
    bpl.check(bpl.preset("lvis"), World(size=8))
    for flags in (dict(eps=1.5), dict(steps=0), dict(lr=-1.0), dict(scale=(0.0, 1.0))):
        with pytest.raises(UserError, match=f"--{[*flags][0]} "):
            bpl.train(bpl.preset("lvis", **flags))
    for flags in (dict(batch_size=24), dict(teacher_batch_size=24)):
        with pytest.raises(UserError, match="24.* 16 processes"):
            bpl.check(bpl.preset("lvis", **flags), World(size=16))


# -------------------------------------------------------------------------------------------- views


def test_jittered_window():
    """Recipe 6.3: flip, a scale of 0.1 to 2 of the square, aspect kept; a window at random, padded
    right and below."""
    args, g = bpl.preset("lvis", image_size=640), np.random.default_rng(0)
    us, places, flips = [], [], 0
    for h, n in [(480, 640), (1200, 300), (333, 777)] * 200:
        w = bpl.jittered_window((h, n), args, g)
        us.append(max(w.size) / 640)
        assert abs(w.size[0] / h - w.size[1] / n) <= 0.5 / h + 0.5 / n + 1e-6
        room = [max(size - 640, 0) for size in w.size]
        assert w.out == (640, 640) and 0 <= w.top <= room[0] and 0 <= w.left <= room[1]
        if min(room) > 50:
            places.append((w.top / room[0], w.left / room[1]))
        flips += w.flip
    assert (
        0.099 < min(us) < 0.12
        and 1.97 < max(us) < 2.001
        and np.mean(us) == pytest.approx(1.05, abs=0.07)
    )
    places = np.array(places)
    assert flips / 600 == pytest.approx(0.5, abs=0.07) and len(places) > 50
    assert (
        (places.min(0) < 0.1).all()
        and (places.max(0) > 0.9).all()
        and np.allclose(places.mean(0), 0.5, atol=0.12)
    )
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.3


@pytest.mark.parametrize(
    "size, factor", [((30, 60), 1.6), ((61, 31), 96 / 61), ((192, 91), 0.5), ((96, 50), 1)]
)
def test_test_view(size, factor):
    """The longer side becomes 96 pixels; zeros, the mean colour, at the right and below."""
    image = torch.randint(150, 256, (3, *size), dtype=torch.uint8)
    x, got = bpl.test_view(image, small(image_size=96))
    h, w = (round(n * factor) for n in size)
    assert got.tolist() == pytest.approx([w / size[1], h / size[0]] * 2) and x.shape == (
        1,
        3,
        96,
        96,
    )
    assert x.dtype == torch.float32 and max(h, w) == 96
    assert (x[:, :, h:] == 0).all() and (x[..., w:] == 0).all()
    inside = x[0, :, :h, :w] * STD + MEAN
    if factor == 1:
        assert torch.allclose(inside, image.float(), atol=1e-3)
    assert inside.min() > 149 and inside.mean((1, 2)).tolist() == pytest.approx(
        image.float().mean((1, 2)).tolist(), abs=3
    )


def scene() -> tuple[Instances, Photo, Tensor]:
    """A picture with a rectangle of class 1 at the left, and one of class 0 at the right edge."""
    boxes, image, things = (
        [(8, 20, 30, 60), (56, 100, 10, 26)],
        torch.zeros(3, 64, 128, dtype=torch.uint8),
        [],
    )
    for label, (top, left, height, width) in zip((1, 0), boxes, strict=True):
        top, height = (top, height) if label else (4, 40)
        corners = [left, top, left + width, top, left + width, top + height, left, top + height]
        things.append(Thing(label, [np.array(corners, float)], False, 0.0))
        image[label, top : top + height, left : left + width] = 255
    photo = Photo("a", Path("a.png"), 1, 64, 128, tuple(things))
    return Instances("lvis", Path(), ["b", "a"], [1, 2], [photo], [], []), photo, image


def test_labeled_view_moves_masks_and_drops_empty_ones():
    data, photo, image = scene()
    args, numbers, colour = small(scale=(0.5, 3.0)), [], torch.tensor([124, 116, 104]).view(3, 1, 1)
    for seed in range(30):
        view, nothing, target = bpl.labeled_view(
            args, data, image, photo, np.random.default_rng(seed)
        )
        window = bpl.jittered_window((64, 128), args, np.random.default_rng(seed))
        labels, masks, _ = masks_of(photo, data, window)
        assert nothing is None and view.shape == (3, 64, 64) and labels.tolist() == [1, 0]
        assert target.masks.flatten(1).any(1).all()
        assert target.labels.tolist() == [k for k, m in zip((1, 0), masks, strict=True) if m.any()]
        # painted so, but for the edges
        for label, mask in zip(target.labels.tolist(), target.masks, strict=True):
            painted = (view[label] > 200) & (view[1 - label] < 60)
            assert mask.shape == (64, 64) and (painted != (mask > 0)).float().mean() < 0.06
        h, w = window.size
        assert (view[:, h:] == colour).all() and (view[:, :, w:] == colour).all()
        numbers.append((len(target.labels), h < 64))
    assert {n for n, _ in numbers} >= {1, 2} and {True, False} == {padded for _, padded in numbers}
    assert ((colour - MEAN) / STD).abs().max() < 0.01


def test_unlabeled_views_share_their_geometry(monkeypatch):
    """Strong is the weak view in other colours: without them the same, pixel by pixel."""
    _, photo, image = scene()
    args, differ = small(scale=(0.5, 3.0)), 0
    for seed in range(10):
        strong, weak, nothing = bpl.unlabeled_view(args, image, photo, np.random.default_rng(seed))
        window = bpl.jittered_window((64, 128), args, np.random.default_rng(seed))
        assert nothing is None and torch.equal(weak, cut_out(image, window, bpl.FILL))
        differ += not torch.equal(strong, weak)
    assert differ > 6
    for name in instance_runs.COLOURS:
        monkeypatch.setattr(colour, name, lambda x, *_: x)
    for seed in range(10):
        strong, weak, _ = bpl.unlabeled_view(args, image, photo, np.random.default_rng(seed))
        assert torch.equal(strong, weak)
    samples_ = [((strong, weak, None), 0)] * 2
    batch = instances.collate(samples_)
    assert torch.equal(batch.images[0], strong) and torch.equal(batch.weak[1], weak)


def test_strong_view_draws(monkeypatch):
    """Recipe 4.1: how often and how strongly: jitter in any order, grey, blur."""
    calls = instance_runs.strong_draws(bpl.strong_view, monkeypatch)
    assert len({tuple(name for name, _ in c[:4]) for c in calls if ("hue" in dict(c))}) == 24


# -------------------------------------------------------------------------------------- calibration


# class; box and slant
OBJECTS_OF = [(0, [8, 8, 24, 24, 0]), (1, [32, 8, 56, 32, 20]), (0, [2, 36, 10, 44, 0])]


FOUND = {  # in pixels of the picture: box, scores of the classes a, b, c, d
    "right": ([8, 8, 24, 24], [0.9, 0.1, 0, 0]),
    "thin": ([32, 8, 56, 32], [0.1, 0.7, 0, 0]),
    "absent": ([2, 20, 7, 34], [0, 0.1, 0.5, 0]),
    "not said": ([40, 34, 60, 46], [0, 0, 0.2, 0.8]),
    "wrong": ([26, 34, 38, 46], [0.6, 0, 0.4, 0]),
    "unsure": ([50, 2, 60, 6], [0.29, 0, 0.1, 0]),
    "double": ([9, 8, 25, 24], [0.1, 0.4, 0, 0]),
}


def judged() -> tuple[Instances, Tensor]:
    """A picture of 48 x 64 with objects of a and b, whose b is thin; without any c; nothing is said
    of d."""
    things = []
    for k, (x0, y0, x1, y1, slant) in OBJECTS_OF:
        corners = [x0, y0, x1 - slant, y0, x1, y1, x0 + slant, y1]
        things.append(
            Thing(k, [np.array(corners, float)], False, float((x1 - slant - x0) * (y1 - y0)))
        )
    photo = Photo("a", Path("a.png"), 7, 48, 64, tuple(things), negative=(2,))
    data = Instances(
        "lvis",
        Path(),
        NAMES[:4],
        [3, 5, 6, 9],
        [],
        [],
        [],
        lvis=True,
        frequency=["f", "c", "r", "r"],
    )
    return instances.scored_on(data, [photo]), torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)


def test_detections_that_are_counted():
    """Those that would be pseudo labels, right at an overlap of half with an object of their class;
    of classes that the picture knows."""
    data, _ = judged()
    boxes, probs = (torch.tensor(x) for x in zip(*FOUND.values(), strict=True))
    factors, truth = torch.tensor([1.5, 2, 1.5, 2]), mask_ap.truth_of(data)

    def count(threshold: float, data: Instances = data) -> list[tuple]:
        entries = bpl.confident_results(7, data.ids, factors * boxes, probs, threshold, factors)
        for e in entries:  # in the picture's own pixels
            (x0, y0, w, h), k = e["bbox"], [3, 5, 6, 9].index(e["category_id"])
            (p,) = (p for b, p in FOUND.values() if b == pytest.approx([x0, y0, x0 + w, y0 + h]))
            assert p.index(max(p)) == k and e["score"] == pytest.approx(max(p))
            assert e["image_id"] == 7
        got = judge.samples(truth, entries, "bbox", federated=data.lvis)
        return [(k, round(p, 4), r) for k, p, r in zip(*map(np.ndarray.tolist, got), strict=True)]

    want = [(0, 0.9, True), (0, 0.6, False), (1, 0.7, True), (2, 0.5, False)]
    assert sorted(count(0.3)) == sorted(want)
    assert sorted(count(0.2)) == sorted([*want, (0, 0.29, False)])
    assert sorted(count(0.6)) == sorted(x for x in want if x[1] >= 0.6)
    closed = replace(data, lvis=False)  # as in COCO, what is not annotated is absent
    assert (3, 0.8, False) in count(0.3, closed)


def test_labels_within_a_window():
    """Objects that reach into it, as it shows them. A class of the picture without an object there
    is known to be absent, and what the picture says of others stays."""
    data, _ = judged()
    (photo,) = data.val
    crowd = photo.things[1]._replace(crowd=True)
    photo = photo._replace(things=(*photo.things, crowd), partial=(3,))
    for window, classes, absent in (
        (Window(False, (96, 128), 0, 0, (96, 96)), [0, 1, 0, 1], (2,)),
        (Window(False, (96, 128), 20, 60, (32, 32)), [1, 1], (0, 2)),
        (Window(True, (96, 128), 60, 0, (16, 16)), [], (0, 1, 2)),
    ):
        got = bpl.within(photo, data, window)
        labels, masks, crowds = masks_of(photo, data, window, crowds=True)
        shown = masks.flatten(1).any(1).bool()
        assert [thing.category for thing in got.things] == classes == labels[shown].tolist()
        assert [thing.crowd for thing in got.things] == crowds[shown].tolist()
        for thing, mask in zip(got.things, masks[shown], strict=True):
            assert np.array_equal(coco_mask.decode(thing.segmentation), mask.numpy())
        assert got.negative == absent and got.partial == (3,)
        assert (got.height, got.width) == window.out and got.id == photo.id


class Finder(nn.Module):
    """A network that finds these boxes with these scores in whatever it is shown."""

    def __init__(self, boxes: list, probs: list | None = None):
        super().__init__()
        self.place, self.seen = nn.Parameter(torch.zeros(1)), []
        self.boxes = torch.tensor(boxes)
        self.probs = torch.rand(len(boxes), 4) if probs is None else torch.tensor(probs)

    def infer(self, x: Tensor):
        self.seen.append(x)
        return ["a pyramid"], [(self.boxes, self.probs)]


def test_regions_end_with_the_picture():
    """Boxes on the padded square are cut at the picture's own border."""
    net = Finder([[1.0, 2, 90, 80], [90, 60, 96, 96], [5, 70, 96, 72]])
    args, image = small(image_size=96), torch.zeros(3, 48, 64, dtype=torch.uint8)
    [regions] = bpl.find_regions(net, [image], args)
    assert regions.boxes.tolist() == [[1, 2, 90, 72], [90, 60, 96, 72], [5, 70, 96, 72]]
    assert regions.factors.tolist() == [1.5] * 4
    assert torch.equal(net.seen[0], bpl.test_view(image, args)[0])


def test_regions_of_a_batch_are_of_their_own_picture():
    """Pictures of any sizes pass together; each has its maps, boxes, scores and factors."""
    found = [(torch.full((1, 4), 90.0 + b), torch.rand(1, 4)) for b in range(3)]
    net = nn.Linear(1, 1)
    net.infer = lambda x: ([x, x[:, :, ::2]], found)
    sizes = [(48, 64), (96, 40), (60, 60)]
    images = [torch.randint(0, 256, (3, *size)).byte() for size in sizes]
    args = small(image_size=96)
    for b, regions in enumerate(bpl.find_regions(net, images, args)):
        view, factors = bpl.test_view(images[b], args)
        assert torch.equal(regions.pyramid[0], view)
        assert torch.equal(regions.pyramid[1], view[:, :, ::2])
        assert torch.equal(regions.factors, factors)
        assert torch.equal(regions.probs, found[b][1])
        right, bottom = [(96, 72), (40, 96), (96, 96)][b]  # where the picture ends in its view
        x, y = min(90 + b, right), min(90 + b, bottom)
        assert regions.boxes.tolist() == [[x, y, x, y]]


@pytest.mark.parametrize("kappa", [20.0, 0.0])
def test_delta_is_measured_on_weak_views(kappa, monkeypatch):
    """On a view as the teacher has it for pseudo labels, drawn by the seed, against what the window
    shows, from the threshold on. Classes without an object there have their group's mean alone; 0
    is Eq. 4, literally."""
    data, image = judged()  # objects of a and b; c and d, both rare, have none
    data.frequency[1] = "r"
    args = small(shrink=kappa, bins=5, threshold=0.5, scale=(1.0, 1.0), seed=3)
    window = bpl.jittered_window((48, 64), args, distributed.rng(3, "calibration", 0))
    _, masks, _ = masks_of(data.val[0], data, window)
    boxes = boxes_of(masks).tolist()  # two of a, one of b: on the view, not on the picture
    found = [
        (boxes[0], [0.9, 0, 0, 0], True),
        (boxes[2], [0.6, 0, 0, 0], True),
        (boxes[1], [0, 0.75, 0, 0], True),
        ([56.0, 40, 63, 47], [0, 0.55, 0, 0], False),
        ([1.0, 1, 6, 7], [0, 0, 0.8, 0], False),
        ([50.0, 2, 60, 6], [0.49, 0, 0, 0], None),  # under the threshold
        ([2.0, 56, 10, 63], [0, 0, 0, 0.9], None),  # nothing is known of its class
    ]
    net = Finder([box for box, _, _ in found], [probs for _, probs, _ in found])
    monkeypatch.setattr(instances, "score_loader", lambda photos, *_: [(0, image)])
    got = bpl.calibrate(net, data, data.frequency, args, WORLD)
    weak = cut_out(image, window, bpl.FILL)
    assert torch.allclose(net.seen[0], (weak[None] - MEAN) / STD, atol=1e-5)
    raw = [1 - 0.75, 0.5 - 0.65, -0.8, 0.0]
    assert got["raw_delta"] == pytest.approx(raw, abs=1e-6) and got["samples"] == [2, 2, 1, 0]
    want = shrunk(raw, [2, 2, 0, 0], data.frequency, kappa)  # the sample of c does not count
    assert got["delta"] == pytest.approx(want, abs=1e-6)
    assert got["classes"] == NAMES[:4] and got["images"] == 1
    conf, right = np.array([0.9, 0.6, 0.75, 0.55, 0.8]), np.array([1, 1, 1, 0, 0], bool)
    samples_ = judge.Samples(np.array([0, 0, 1, 1, 2]), conf, right)
    diagram = metrics.reliability(samples_, 5, data.frequency)
    assert got["reliability"]["ece"] == pytest.approx(diagram["ece"], abs=1e-6)
    assert [b["n"] for b in got["reliability"]["bins"]] == [b["n"] for b in diagram["bins"]]


WHOSE = [
    (dict(), "heldout.pt"),
    (dict(tune=True), "teacher.pt"),
    (dict(teacher="t.pt"), "heldout.pt"),
    (dict(teacher="t.pt", tune=True, stage="student"), "t.pt"),
    (dict(teacher="t.pt", stage="calibrate"), "t.pt"),
    (dict(stage="calibrate"), "heldout.pt"),
    (dict(stage="calibrate", tune=True), "teacher.pt"),
]


@pytest.mark.parametrize("flags, whose", WHOSE, ids=str)
def test_whose_error_is_measured(flags, whose, tmp_path, monkeypatch):
    """By default that of the network that has not seen the held-out labels; written once; classes
    go by their names."""
    data, asked = judged()[0], []
    args, groups = small(out=str(tmp_path), **flags), ["r", "c", "f", "r"]
    monkeypatch.setattr(bpl, "trained", lambda args, data, path, world: path.name)
    monkeypatch.setattr(plots, "diagram", lambda *_: None)
    monkeypatch.setattr(
        bpl,
        "calibrate",
        lambda net, scored, groups, *_: (
            asked.append((net, scored.val, groups))
            or {
                "classes": ["d", "c", "b", "a"],
                "delta": [0.4, 0.3, -0.2, 0.1],
                "samples": [1],
                "reliability": {"ece": None},
            }
        ),
    )
    held = [data.val[0]._replace(id=99)]
    for _ in range(2):
        delta = bpl.delta_of(args, data, held, groups, WORLD)
        assert delta.tolist() == pytest.approx([0.1, -0.2, 0.3, 0.4])
    assert asked == [(whose, held, groups)]
    given = replace(args, calibration=str(tmp_path / "calibration.json"), out="elsewhere")
    assert (
        bpl.delta_of(given, data, held, groups, WORLD).tolist() == delta.tolist()
        and len(asked) == 1
    )
    with pytest.raises(UserError, match="other classes"):
        bpl.delta_of(given, replace(data, classes=["a", "b", "c", "z"]), held, groups, WORLD)
