"""better_pseudo_labels.py's detector against torchvision's detection modules and timm's EVA-02 with
the same weights.

Where neither has a part (cascade, sigmoid scores, windows, released names) the reference is a loop
written here from Secs. 1.1 to 1.8 of what EVA-02's detector and Detectron2 publish, not from
better_pseudo_labels.py."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import near, shaken
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import _utils as coding
from torchvision.models.detection import roi_heads as theirs
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image, nms, roi_align
from torchvision.ops.poolers import LevelMapper

import better_pseudo_labels as bpl
from better_pseudo_labels import Args, Objects
from common import checkpoints, errors
from common.boxes import (
    anchors_of,
    boxes_of,
    decode_boxes,
    encode_boxes,
    match_boxes,
    paste_masks,
    sample_regions,
    sided,
    suppress,
)
from common.distributed import World

CPU, STRIDES = torch.device("cpu"), (4, 8, 16, 32, 64)


STAGES = (
    (0.5, (10.0, 10.0, 5.0, 5.0)),
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)


EVA = "eva02_base_patch14_224"  # q, k and v apart, norm inside the MLP: as the large one


pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


# ------------------------------------------------------------------------------------------ helpers


def small(**flags) -> Args:
    return bpl.preset(
        "shapes",
        **dict(
            weights="none",
            image_size=64,
            width=8,
            fc=16,
            head_convs=1,
            anchor_scale=8.0,
            proposals=50,
            rpn_batch=32,
            roi_batch=12,
        )
        | flags,
    )


def eva(**flags) -> Args:
    return bpl.preset(
        "lvis",
        **dict(
            backbone=EVA,
            weights="none",
            drop_path=0.0,
            image_size=64,
            window=2,
            width=8,
            global_blocks=1,
            fc=16,
            proposals=50,
        )
        | flags,
    )


@pytest.fixture
def slim(monkeypatch):
    """slim(depth=2, ...): from now on timm builds every network of these sizes."""

    def sizes(**given):
        given = dict(embed_dim=32, depth=2, num_heads=2) | given
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **given))

    return sizes


def some_boxes(n: int, size: float, least: float = 2.0, most: float | None = None) -> Tensor:
    sides = least * ((most or size) / least) ** torch.rand(n, 2)  # as many small ones as large ones
    corner = torch.rand(n, 2) * (size - sides)
    return torch.cat([corner, corner + sides], dim=1)


def jittered(boxes: Tensor, by: float, size: float) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return (boxes + by * sides * torch.randn_like(boxes)).clamp(0, size)


def pyramid_of(size: int, channels: int, images: int = 1, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(images, channels, size // s, size // s, dtype=dtype) for s in STRIDES]


def shared_part(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks."""
    return ((a > 0.5) & (b > 0.5)).sum().item() / ((a > 0.5) | (b > 0.5)).sum().item()


# -------------------------------------------------------------------------------------------- boxes


class Anchors(AnchorGenerator):
    """torchvision's, but its shapes are not rounded to whole pixels from the centre."""

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=CPU):
        return (
            torch.tensor(
                [
                    (-s / r**0.5, -s * r**0.5, s / r**0.5, s * r**0.5)
                    for r in aspect_ratios
                    for s in scales
                ],
                dtype=dtype,
                device=device,
            )
            / 2
        )


def generator(kind: type, scale: float = 8.0) -> AnchorGenerator:
    return kind(tuple((scale * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * 5)


def made(kind: AnchorGenerator, size: int) -> Tensor:
    images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
    return kind(images, [torch.zeros(1, 1, size // s, size // s) for s in STRIDES])[0]


@pytest.mark.parametrize("scale", [8.0, 6.0])
def test_anchors_are_torchvisions(scale):
    """Order (level, row, column, shape) and places. torchvision moves each side to a whole pixel
    from the centre: by up to half a pixel where a side is not whole, not at all where it is (the
    square ones)."""
    ours, numbers = anchors_of(256, scale, CPU)
    assert numbers == [3 * (256 // s) ** 2 for s in STRIDES]
    assert near(ours, made(generator(Anchors, scale), 256), 2e-4)
    rounded = made(generator(AnchorGenerator, scale), 256)
    assert 0.1 < (ours - rounded).abs().max() <= 0.5
    assert torch.equal(ours[1::3], rounded[1::3])


def test_anchors_at_the_papers_size():
    anchors, numbers = anchors_of(1024, 8.0, CPU)
    assert (
        numbers == [196_608, 49_152, 12_288, 3_072, 768] and len(anchors) == sum(numbers) == 261_888
    )
    sides = anchors[:, 2:] - anchors[:, :2]
    starts = np.cumsum([0, *numbers[:-1]])
    assert sides.prod(1).sqrt()[starts].tolist() == pytest.approx([32, 64, 128, 256, 512])
    assert (sides[:, 1] / sides[:, 0])[:6].tolist() == pytest.approx([0.5, 1, 2] * 2)
    assert ((anchors[:, :2] + anchors[:, 2:]) / 2)[[0, 3, 3 * 256]].tolist() == [
        [0, 0],
        [4, 0],
        [0, 4],
    ]


def test_every_place_of_the_pyramid_has_three_anchors():
    """Also of a square that 64 does not divide."""
    args = small(image_size=96)
    maps = bpl.Detector(args, 3).eval().pyramid(torch.randn(1, 3, 96, 96))
    assert anchors_of(96, 6.0, CPU)[1] == [3 * x.shape[2] * x.shape[3] for x in maps]
    assert [96 // x.shape[2] for x in maps] == [4, 8, 16, 32, 48] and torch.equal(
        maps[4], maps[3][:, :, ::2, ::2]
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), *(w for _, w in STAGES)], ids=str)
def test_box_coding_is_torchvisions(weights):
    anchors, boxes, coder = some_boxes(300, 100), some_boxes(300, 100), coding.BoxCoder(weights)
    deltas = encode_boxes(boxes, anchors, weights)
    assert torch.allclose(
        deltas, coder.encode_single(boxes, anchors), rtol=1e-4, atol=1e-4 * weights[0]
    )
    assert near(decode_boxes(deltas, anchors, weights, 100), boxes, 1e-3)
    deltas = torch.randn(300, 4) * 3 * torch.tensor(weights)
    want = clip_boxes_to_image(coder.decode_single(deltas, anchors), (100, 100))
    assert near(decode_boxes(deltas, anchors, weights, 100), want, 1e-3)
    assert (want == 0).any() and (want == 100).any() and ((want > 0) & (want < 100)).any()


def test_a_side_grows_by_62_and_a_half_at_most():
    anchors, weights = torch.tensor([[4995.0, 4990, 5005, 5010]] * 3), (10.0, 10.0, 5.0, 5.0)
    deltas = 5 * torch.tensor(
        [[0, 0, 1.0, 2], [0, 0, 9, 99], [0, 0, math.log(62.5), math.log(62.4)]]
    )
    boxes = decode_boxes(deltas, anchors, weights, 10_000)
    want = [[10 * math.e, 20 * math.e**2], [625, 1250], [625, 1248]]
    assert torch.allclose(boxes[:, 2:] - boxes[:, :2], torch.tensor(want), rtol=1e-4)


@pytest.mark.parametrize("number", [1, 5, 64, 65, 150])
@pytest.mark.parametrize(
    "low, high, rescue", [(0.3, 0.7, True), (0.5, 0.5, False), (0.7, 0.7, False)]
)
def test_matching_is_torchvisions(number, low, high, rescue):
    """Boxes on a coarse grid: most overlaps are equal to others. Over 64 objects are taken in
    parts."""
    candidates = (some_boxes(700, 60, 5) / 5).round() * 5
    candidates = torch.cat([candidates[sided(candidates)], some_boxes(100, 60)])
    boxes = candidates[torch.randint(len(candidates), (number,))]
    boxes[1::2] = jittered(boxes[1::2], 0.1, 60)
    boxes[number - number // 10 :] = boxes[: number // 10]  # twice, in two parts
    boxes[1:2] = torch.tensor([1.1, 1.2, 3.7, 3.9])  # smaller than any candidate on the grid
    overlap = box_iou(boxes, candidates)
    assert (overlap.amax(1) > 0).all()
    want = coding.Matcher(high, low, rescue)(overlap)
    assert torch.equal(match_boxes(candidates, boxes, low, high, rescue), want)
    assert (want >= 0).any() and (want == -1).any() and ((want != -2).all() or low < high)
    if number > 5:
        assert (want == -2).any() == (low < high)
        assert ((overlap == overlap.amax(0)).sum(0) > 1)[want >= 0].any(), "no ties among objects"
        assert (overlap.amax(0) < high)[want >= 0].any() == rescue, "no low-quality match"


def test_matching_at_the_borders():
    candidates = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 4.99], [50, 50, 60, 60]])
    assert match_boxes(candidates, torch.tensor([[0.0, 0, 10, 10]]), 0.5, 0.5).tolist() == [
        0,
        -1,
        -1,
    ]
    assert match_boxes(candidates, torch.zeros(0, 4), 0.3, 0.7, True).tolist() == [-1, -1, -1]
    assert match_boxes(torch.zeros(0, 4), torch.rand(2, 4), 0.3, 0.7, True).shape == (0,)
    outside = torch.tensor([[80.0, 80, 90, 90]])  # torchvision would give it all three candidates
    assert match_boxes(candidates, outside, 0.3, 0.7, True).tolist() == [-1, -1, -1]
    assert coding.Matcher(0.7, 0.3, True)(box_iou(outside, candidates)).tolist() == [0, 0, 0]
    far = torch.cat([outside.expand(64, 4), torch.tensor([[0.0, 0, 10, 11]])])
    # rescued in the second part
    assert match_boxes(candidates, far, 0.3, 0.7, True).tolist() == [64, -2, -1]


# ---------------------------------------------------------------------------------------- proposals


def rpns(args: Args, training: bool) -> tuple[bpl.RPN, RegionProposalNetwork]:
    """Ours with random weights, and torchvision's with the same and with anchors that are not
    rounded."""
    ours, head, n = shaken(bpl.RPN(args), 0.1), RPNHead(args.width, 3, conv_depth=2), args.proposals
    for a, b in (
        (head.conv[0][0], ours.convs[0]),
        (head.conv[1][0], ours.convs[2]),
        (head.cls_logits, ours.objectness),
        (head.bbox_pred, ours.deltas),
    ):
        a.load_state_dict(b.state_dict())
    rpn = RegionProposalNetwork(
        generator(Anchors, args.anchor_scale),
        head,
        0.7,
        0.3,
        args.rpn_batch,
        0.5,
        {"training": 2 * n, "testing": n},
        {"training": n, "testing": n},
        0.7,
    )
    return ours.train(training), rpn.train(training)


def objects_at(boxes: Tensor, size: int, classes: int = 5) -> Objects:
    number, masks = len(boxes), torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = torch.rand(y1 - y0, x1 - x0) < 0.8
    probs = torch.rand(number, classes) ** 4
    return Objects(torch.randint(classes, (number,)), boxes, masks, probs, probs > 0)


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_torchvisions(training):
    args = small(image_size=128, proposals=70)
    ours, rpn = rpns(args, training)
    maps, images = pyramid_of(128, 8, 2), ImageList(torch.zeros(2, 3, 128, 128), [(128, 128)] * 2)
    with torch.no_grad():
        objectness, deltas = ours(maps)
        raw = [
            x.permute(0, 2, 3, 1).reshape(2, -1, k)
            for k, xs in zip((1, 4), rpn.head(maps), strict=True)
            for x in xs
        ]
        assert torch.equal(objectness, torch.cat(raw[:5], 1)[..., 0]) and torch.equal(
            deltas, torch.cat(raw[5:], 1)
        )
        rpn.compute_loss = lambda *_: (None, None)
        want, _ = rpn(images, dict(enumerate(maps)), [{"boxes": torch.zeros(0, 4)}] * 2)
        got = ours.propose(objectness, deltas)
    assert deltas.std() > 0.1
    for a, b in zip(got, want, strict=True):
        assert len(a) == 70 and near(a, b, 1e-3)
    pool = torch.cat(want)
    assert not torch.equal(want[0], want[1]) and (pool == 0).any() and (pool == 128).any()


def test_what_is_no_box_comes_last_among_proposals_and_is_empty():
    """When boxes are clipped away, or a score or a delta is not a number."""
    ours, _ = rpns(small(), False)
    objectness, deltas = ours(pyramid_of(64, 8))
    deltas = deltas.detach().clone()
    deltas[:, :, 0] = 1e4  # far to the right of the square
    deltas[0, 6:8] = 0.0
    deltas[0, 8] = math.nan
    objectness = torch.zeros_like(objectness)
    objectness[0, :20] = 1.0
    objectness[0, 6] = math.nan
    [boxes] = ours.eval().propose(objectness, deltas)
    assert near(boxes[:1], anchors_of(64, 8.0, CPU)[0][7:8].clamp(0, 64), 1e-5)
    assert len(boxes) > 1 and (boxes[1:] == 0).all()


def test_rpn_losses_are_torchvisions(monkeypatch):
    """Of the same sampled anchors; torchvision's smooth L1 with beta 0 is L1. One image has no
    object."""
    args = small()
    ours, rpn = rpns(args, True)
    maps, drawn, draw = pyramid_of(64, 8, 3), [], sample_regions
    objects = [objects_at(some_boxes(n, 64, 8), 64) for n in (3, 0, 1)]

    def spied(matches, *more):
        found = draw(matches, *more)
        drawn.extend(zip(matches, found, strict=True))
        return found

    monkeypatch.setattr(bpl, "sample_regions", spied)
    got = ours.losses(*ours(maps), objects, [torch.Generator()] * 3)

    def fixed(labels):
        for label, (matches, taken) in zip(labels, drawn, strict=True):
            assert torch.equal(
                label, torch.where(matches >= 0, 1.0, torch.where(matches == -1, 0.0, -1.0))
            )
            taken = torch.cat(taken)
            assert len(taken) == args.rpn_batch == len(taken.unique()) and (label[taken] >= 0).all()
            assert (label[taken] == 1).sum() == min((label == 1).sum(), 16)
        chosen = [
            torch.zeros_like(x).index_fill(0, torch.cat(taken), 1)
            for x, (_, taken) in zip(labels, drawn, strict=True)
        ]
        return [(x == 1) & (c > 0) for x, c in zip(labels, chosen, strict=True)], [
            (x == 0) & (c > 0) for x, c in zip(labels, chosen, strict=True)
        ]

    rpn.fg_bg_sampler, smooth = fixed, F.smooth_l1_loss
    monkeypatch.setattr(
        F,
        "smooth_l1_loss",
        lambda a, b, beta, reduction: smooth(a, b, beta=0.0, reduction=reduction),
    )
    images = ImageList(torch.zeros(3, 3, 64, 64), [(64, 64)] * 3)
    _, want = rpn(images, dict(enumerate(maps)), [{"boxes": o.boxes} for o in objects])
    pairs = (("rpn", "loss_objectness"), ("rpn_box", "loss_rpn_box_reg"))
    for a, b in pairs:
        assert got[a].item() == pytest.approx(want[b].item(), rel=1e-5) and got[a] > 0
    mine, other = (
        [convs[0], convs[1], x, y]
        for convs, x, y in (
            (ours.convs[::2], ours.objectness, ours.deltas),
            ([c[0] for c in rpn.head.conv], rpn.head.cls_logits, rpn.head.bbox_pred),
        )
    )
    sum(got.values()).backward(), sum(want.values()).backward()
    for a, b in zip(mine, other, strict=True):
        assert (
            torch.allclose(a.weight.grad, b.weight.grad, atol=1e-6)
            and a.weight.grad.abs().sum() > 0
        )


# ------------------------------------------------------------------------------------------ pooling


def test_levels_are_torchvisions():
    """Told by maps that are 2, 3, 4, 5 everywhere. 224 pixels a side are pooled from stride 16, 112
    from 8."""
    maps = [
        torch.full((2, 1, 1536 // s, 1536 // s), float(i)) for i, s in enumerate(STRIDES, start=2)
    ]
    boxes = [some_boxes(400, 1536, 4), some_boxes(300, 1536, 90, 900)]
    levels = bpl.roi_pool(maps, boxes, 1).flatten()
    assert torch.equal(levels, LevelMapper(2, 5)(boxes).float() + 2) and {*levels.tolist()} == {
        2,
        3,
        4,
        5,
    }
    sides = torch.tensor([10, 111.9, 112, 223.9, 224, 447.9, 448, 1000])
    squares = torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)
    assert bpl.roi_pool(maps, [squares], 1).flatten().tolist() == [2, 2, 3, 3, 4, 4, 5, 5]
    wide = torch.tensor([[0, 0, 56.0, 224], [0, 0, 896, 56]])  # the root of the area counts
    assert bpl.roi_pool(maps, [wide], 1).flatten().tolist() == [3, 4]


@pytest.mark.parametrize("size", [7, 14])
def test_pooling_is_torchvisions(size):
    """Half a pixel of the level aside, which `aligned` is, as by torchvision's own pooler, also
    along the borders."""
    maps, boxes = pyramid_of(512, 3, 2), [some_boxes(60, 512, 64), some_boxes(50, 512, 40)]
    boxes[0][:4] = torch.tensor(
        [[0.0, 0, 512, 512], [0, 0, 100, 100], [448, 448, 512, 512], [0, 400, 300, 512]]
    )
    got, parts = bpl.roi_pool(maps, boxes, size), []
    levels = LevelMapper(2, 5)(boxes).split([60, 50])
    for b, level in zip(boxes, levels, strict=True):
        parts.append(b - 2.0 ** (level[:, None] + 2) / 2)
    pooler = MultiScaleRoIAlign([0, 1, 2, 3], size, 0)
    assert near(got, pooler(dict(enumerate(maps[:4])), parts, [(512, 512)] * 2), 1e-4)
    assert bpl.roi_pool(maps, [torch.zeros(0, 4)] * 2, size).shape == (0, 3, size, size)


# -------------------------------------------------------------------------------------- the cascade


def pooled(pyramid: list[Tensor], image: int, box: Tensor, size: int) -> Tensor:
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    level = min(max(math.floor(4 + math.log2(side / 224 + 1e-8)), 2), 5)
    roi = torch.cat([box.new_tensor([image]), box])[None]
    return roi_align(pyramid[level - 2], roi, size, 2.0**-level, sampling_ratio=0, aligned=True)


def best_object(box: Tensor, objects: Objects, least: float) -> int | None:
    if len(objects.boxes) == 0:
        return None
    overlap = box_iou(box[None], objects.boxes)[0]
    return int(overlap.argmax()) if overlap.max() >= least else None


def surprise(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits))


def cascade_by_loops(
    heads: bpl.CascadeHeads, pyramid, sampled, objects, known
) -> dict[str, Tensor]:
    """Region by region, without the third of the gradient."""
    size, loss = (
        heads.args.image_size,
        dict.fromkeys(("mask", "class1", "box1", "class2", "box2", "class3", "box3"), 0),
    )
    for i, (boxes_here, o) in enumerate(zip(sampled, objects, strict=True)):
        masks = []
        for box in boxes_here:
            if (n := best_object(box, o, 0.5)) is not None:
                x = F.relu(heads.mask.up(heads.mask.convs(pooled(pyramid, i, box, 14))))
                goal = bpl.mask_targets(o.masks, torch.tensor([n]), box[None])[0]
                masks.append(surprise(heads.mask.masks(x)[0, o.labels[n]], goal).mean())
        loss["mask"] += sum(masks) / max(len(masks), 1) / len(objects)
        for stage, (head, (least, weights)) in enumerate(
            zip(heads.boxes, STAGES, strict=True), start=1
        ):
            coder, after, share = coding.BoxCoder(weights), [], 1 / len(boxes_here) / len(objects)
            for box in boxes_here:
                (logits,), (deltas,) = head(pooled(pyramid, i, box, 7))
                n = best_object(box, o, least)
                target = torch.zeros_like(logits) if n is None else o.probs[n]
                loss[f"class{stage}"] += share * sum(surprise(logits, target)[known[i]])
                if n is not None:
                    off = deltas - coder.encode_single(o.boxes[n][None], box[None])[0]
                    loss[f"box{stage}"] += share * off.abs().sum()
                x0, y0, x1, y1 = coder.decode_single(deltas.detach()[None], box[None])[0].clamp(
                    0, size
                )
                if x1 > x0 and y1 > y0:
                    after.append(torch.stack([x0, y0, x1, y1]))
            boxes_here = after
    return loss


def lively(heads: bpl.CascadeHeads) -> bpl.CascadeHeads:
    """Boxes move by a tenth of their size or so, and scores differ."""
    with torch.no_grad():
        for head in shaken(heads, 0.02).boxes:
            head.deltas.weight.mul_(8)
            head.classes.weight.mul_(40)
    return heads


@pytest.fixture
def cascade(monkeypatch):
    """Heads with random weights in double precision, and what they train on: three images, one
    without an object."""
    args = small(image_size=512, roi_batch=40)
    heads, drawn, draw = lively(bpl.CascadeHeads(args, 5)).double(), [], sample_regions
    pyramid = [x.requires_grad_() for x in pyramid_of(512, 8, 3, torch.float64)]
    boxes = (
        torch.tensor([[200, 30, 270, 90], [10, 300, 150, 450.5], [220, 180, 500, 470]]),
        torch.zeros(0, 4),
        torch.tensor([[10, 20, 490, 500.0], [300, 100, 460, 300]]),
    )  # of all levels
    objects = [objects_at(b, 512) for b in boxes]
    objects = [o._replace(boxes=o.boxes.double(), probs=o.probs.double()) for o in objects]
    near = [
        torch.cat([jittered(o.boxes.repeat(3, 1), 0.12, 512), some_boxes(20, 512).double()])
        for o in objects
    ]
    near[1][3] = torch.tensor([512, 100, 512, 130.0])
    known = torch.rand(3, 5) < 0.6
    known[:, 3] = False
    monkeypatch.setattr(bpl, "sample_regions", lambda *a: drawn.extend(draw(*a)) or drawn)
    make = bpl.mask_targets
    monkeypatch.setattr(bpl, "mask_targets", lambda m, i, b: make(m, i, b.float()).double())
    got = heads.losses(pyramid, near, objects, known, [torch.Generator()] * 3)
    sampled = [
        torch.cat([b, o.boxes])[torch.cat(i)] for b, o, i in zip(near, objects, drawn, strict=True)
    ]
    assert len({len(b) for b in sampled}) == 3
    return heads, pyramid, got, cascade_by_loops(heads, pyramid, sampled, objects, known)


def test_cascade_losses_by_loops(cascade):
    """Matched again at 0.5, 0.6, 0.7; boxes of a head are the next one's regions, clipped, and gone
    when empty."""
    *_, got, want = cascade
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value.item(), rel=1e-5) and value > 0, name
    assert len({round(v.item(), 6) for v in got.values()}) == 7


def test_shared_features_get_a_third_of_the_gradient(cascade):
    heads, pyramid, got, want = cascade
    boxes = [k for k in got if k != "mask"]
    parameters, maps = [*heads.boxes.parameters()], pyramid[:4]
    mine, plain = (
        torch.autograd.grad(sum(x[k] for k in boxes), parameters + maps, retain_graph=True)
        for x in (got, want)
    )
    for a, b in zip(mine[: len(parameters)], plain[: len(parameters)], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)
    for a, b in zip(mine[len(parameters) :], plain[len(parameters) :], strict=True):
        assert torch.allclose(3 * a, b, rtol=1e-4, atol=1e-8) and b.abs().sum() > 0
    for a, b in zip(*(torch.autograd.grad(x["mask"], maps) for x in (got, want)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)  # of the mask head: the whole


def test_no_gradient_leads_from_a_head_to_the_one_before(cascade):
    heads, _, got, _ = cascade
    for stage, before in ((1, 0), (2, 0), (2, 1)):
        inputs = [*heads.boxes[before].parameters()]
        loss = got[f"class{stage + 1}"] + got[f"box{stage + 1}"]
        assert not any(
            g is not None
            for g in torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        )


def test_scores_are_the_mean_of_three_sigmoids_at_successive_boxes():
    args = small(image_size=512)
    heads = lively(bpl.CascadeHeads(args, 4)).eval()
    heads.learned[2] = False  # a class that had no object
    pyramid, proposals = pyramid_of(512, 8, 2), [some_boxes(9, 512, 20), some_boxes(6, 512, 20)]
    proposals[0][0] = 5.0  # an empty box stays, with its place
    with torch.no_grad():
        found = heads.scores(pyramid, proposals)
        for i, (boxes, probs) in enumerate(found):
            for box, start, got in zip(boxes, proposals[i], probs, strict=True):
                total, moved = 0, start
                for head, (_, weights) in zip(heads.boxes, STAGES, strict=True):
                    (logits,), deltas = head(pooled(pyramid, i, moved, 7))
                    total = total + 1 / (1 + (-logits).exp())
                    moved = (
                        coding.BoxCoder(weights).decode_single(deltas, moved[None])[0].clamp(0, 512)
                    )
                assert near(box, moved, 2e-2) and near(
                    got, total / 3 * torch.tensor([1, 1, 0, 1]), 1e-4
                )
    boxes, probs = (torch.cat(x) for x in zip(*found, strict=True))
    assert (boxes - torch.cat(proposals)).abs().amax(1)[1:].min() > 0.1 and probs[
        1:, [0, 1, 3]
    ].std() > 0.01


@pytest.mark.parametrize("least", [0.3, 0.5, 0.55, 0.8])
def test_boxes_that_are_left_out_on_the_way_could_not_have_been_found(least):
    """What reaches `least` is found with the same boxes and scores, by fewer passes of the last
    heads."""
    heads = lively(bpl.CascadeHeads(small(image_size=512), 4)).eval()
    heads.learned[2] = False
    pyramid, proposals = pyramid_of(512, 8, 2), [some_boxes(60, 512, 20), some_boxes(40, 512, 20)]
    for head in heads.boxes:  # some sure, some not
        head.classes.weight.data.mul_(8)
        head.classes.bias.data.zero_()
    passed = []
    for head in heads.boxes:
        head.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    with torch.no_grad():
        every, some = heads.scores(pyramid, proposals), heads.scores(pyramid, proposals, least)
    for (boxes, probs), (few_boxes, few_probs) in zip(every, some, strict=True):
        found, again = probs.amax(1) >= least, few_probs.amax(1) >= least
        assert found.any()
        assert near(boxes[found], few_boxes[again], 1e-3)
        assert near(probs[found], few_probs[again], 1e-5)
        assert found.any() or least > 0.6
    assert passed[:4] == [100, 100, 100, 100] and passed[5] <= passed[4]
    if least < 2 / 3:  # two more heads could lift every box
        assert passed[4] == 100
    if least >= 0.8:
        assert passed[5] < 100


# ---------------------------------------------------------------------------------------- detection


def survivors(boxes: Tensor, probs: Tensor, overlap: float) -> list[tuple[float, int, int]]:
    """(score, class, region), best first: class by class, the best that overlaps none of the
    kept."""
    found, shared = [], box_iou(boxes.double(), boxes.double())
    for c in range(probs.shape[1]):
        kept = []
        for i in probs[:, c].argsort(descending=True).tolist():
            if probs[i, c] > 0.02 and all(shared[i, j] <= overlap for j in kept):
                kept.append(i)
        found += [(probs[i, c].item(), c, i) for i in kept]
    return sorted(found, reverse=True)


@pytest.mark.parametrize("most", [300, 5000])
def test_detections_by_loops(most):
    """Threshold 0.02, suppression within a class, the best 300 of the image; boxes in its own
    pixels."""
    boxes, probs = (
        some_boxes(40, 120, 20).repeat(3, 1),
        (torch.randperm(3600).view(120, 30) / 3600) ** 5,
    )
    image, factors = torch.zeros(3, 48, 64, dtype=torch.uint8), torch.tensor([2.0, 2.5] * 2)
    boxes = torch.minimum(jittered(boxes, 0.1, 128), torch.tensor([128.0, 120] * 2))
    seen, args = (
        bpl.Regions(factors, [], boxes, probs),
        small(image_size=128, detections=most),
    )
    net = SimpleNamespace(
        masks=lambda pyramid, i, b, labels: (
            torch.ones(len(b), 28, 28) * (labels != 7)[:, None, None]
        )
    )
    want = survivors(boxes, probs, 0.5)
    labels, scores, masks, found = bpl.detect(net, image, seen, args)
    n = min(most, len(want))
    assert 300 < len(want) < (probs > 0.02).sum() < probs.numel() and masks.shape == (n, 48, 64)
    assert [(s, c) for s, c, _ in want[:n]] == list(
        zip(scores.tolist(), labels.tolist(), strict=True)
    )
    assert torch.equal(found, torch.stack([boxes[i] / factors for *_, i in want[:n]]))
    empty = (labels == 7) | ~sided(found, 1)
    assert (
        torch.equal(masks.flatten(1).any(1) | empty, torch.ones(n, dtype=torch.bool))
        and (labels == 7).any()
    )
    known = torch.arange(30) % 3 == 0  # after the cut
    some = bpl.detect(net, image, seen, args, known)
    assert torch.equal(some[1], scores[known[labels]]) and len(some[0]) < n


def test_boxes_end_with_the_image():
    """Not with the square that it is padded to; its sides are whole pixels, so each has a factor of
    its own."""
    found, image = (
        torch.tensor([[3, 5, 128, 128], [10, 90, 20, 128.0]]),
        torch.zeros(3, 33, 50, dtype=torch.uint8),
    )
    net = SimpleNamespace(
        parameters=lambda: iter([found]), infer=lambda x: ([], [(found, torch.rand(2, 3))])
    )
    [seen] = bpl.find_regions(net, [image], small(image_size=128))
    assert seen.factors.tolist() == pytest.approx([128 / 50, 84 / 33] * 2)  # 84.48 pixels are 84
    assert seen.boxes.tolist() == [[3, 5, 128, 84], [10, 84, 20, 84]]


def doubles(classes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of boxes far from the corner, whose overlap is a hundredth off 0.5 at most; a class to
    each pair."""
    n = len(classes)
    corner, sides = 400 + 1000 * torch.rand(n, 2), 4 + 60 * torch.rand(n, 2)
    boxes, moved = (torch.cat([corner, corner + sides], dim=1) for _ in range(2))
    moved[:, [0, 2]] += sides[:, :1] * (1 / 3 + 0.01 * (2 * torch.rand(n, 1) - 1))
    return torch.cat([boxes, moved]), torch.rand(2 * n), torch.tensor(classes).repeat(2)


@pytest.mark.parametrize(
    "classes", [[7, 1202] * 20, [1202] * 500, [*range(703, 1203)]], ids=["two", "one", "many"]
)
def test_suppression_is_exact_for_classes_of_high_number(classes):
    """1,202 times 1,500 pixels leaves float32 an eighth of a pixel; classes apart are suppressed
    apart."""
    boxes, scores, labels = doubles(classes)
    kept = []
    for c in labels.unique():
        here = (labels == c).nonzero().flatten()
        kept += here[nms(boxes[here].double(), scores[here].double(), 0.5)].tolist()
    keep, best = suppress(boxes, scores, labels, 0.5, False)
    assert sorted(keep.tolist()) == sorted(kept) and len({*classes}) < len(kept) < len(boxes)
    assert torch.equal(best, scores[keep]) and (best.diff() <= 0).all()


def test_soft_suppression_by_loops():
    """Linear: the score of a box falls by what it shares with a better one of its class, from 0.6
    on."""
    boxes, labels = jittered(some_boxes(6, 100, 30).repeat(6, 1), 0.05, 100), torch.arange(36) % 5
    scores, shared, kept = torch.rand(36), box_iou(boxes, boxes), []
    left = dict(enumerate(scores.tolist()))
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for i in left:
            if labels[i] == labels[best] and shared[i, best] > 0.6:
                left[i] *= 1 - shared[i, best].item()
    keep, found = suppress(boxes, scores, labels, 0.5, True)
    assert keep.tolist() == [i for i, _ in kept] and found.tolist() == pytest.approx(
        [s for _, s in kept], rel=1e-4
    )
    assert 3 < (found < 0.99 * scores[keep]).sum() < 30


# -------------------------------------------------------------------------------------------- masks


def test_only_the_wanted_channel_is_computed():
    """The last convolution in full and its channel picked: same masks, same gradients."""
    head, labels, found = (
        shaken(bpl.MaskHead(small(), 20), 0.1).double(),
        torch.tensor([3, 19, 3, 0, 7, 1]),
        [],
    )
    x, way = torch.randn(6, 8, 14, 14).double().requires_grad_(), torch.randn(6, 28, 28).double()
    for masks in (
        head(x, labels),
        head.masks(F.relu(head.up(head.convs(x))))[torch.arange(6), labels],
    ):
        found.append([masks.detach(), *torch.autograd.grad(masks, [x, *head.parameters()], way)])
    for a, b in zip(*found, strict=True):
        assert (
            a.shape == b.shape and (a - b).abs().max() <= 1e-9 * b.abs().max() and b.abs().sum() > 0
        )


def test_masks_of_many_boxes_are_made_in_parts():
    net = shaken(bpl.Detector(small(), 5), 0.1).eval()
    with torch.no_grad():
        pyramid = net.pyramid(torch.randn(2, 3, 64, 64))
        boxes, labels = some_boxes(130, 64), torch.randint(5, (130,))
        masks = net.masks(pyramid, 1, boxes, labels)
        for i in (0, 127, 128, 129):
            x = pooled(pyramid, 1, boxes[i], 14)
            assert near(masks[i], net.heads.mask(x, labels[i : i + 1])[0].sigmoid(), 1e-5)
        assert net.masks(pyramid, 0, boxes[:0], labels[:0]).shape == (0, 28, 28)


def mean_in_cells(mask: np.ndarray, box: list[float], cells: int) -> np.ndarray:
    """Bilinear samples, as many to a cell as it has pixels a side, rounded up; averaged."""

    def weights(low: float, high: float, length: int) -> np.ndarray:
        n = math.ceil((high - low) / cells)
        out = np.zeros((cells, length))
        for i, k in itertools.product(range(cells), range(n)):
            at = min(max(low + (i + (k + 0.5) / n) * (high - low) / cells - 0.5, 0), length - 1)
            left = min(int(at), length - 2)
            out[i, left] += (1 - at + left) / n
            out[i, left + 1] += (at - left) / n
        return out

    x0, y0, x1, y1 = box
    return weights(y0, y1, mask.shape[0]) @ mask @ weights(x0, x1, mask.shape[1]).T


def star(size: int, g: np.random.Generator) -> np.ndarray:
    """A polygon x, y, x, y, ..., not convex."""
    n = int(g.integers(3, 12))
    angle, radius, middle = (
        np.sort(g.uniform(0, 2 * np.pi, n)),
        g.uniform(size / 16, size / 3, n),
        g.uniform(size / 4, 3 * size / 4, 2),
    )
    points = middle + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points.clip(0, size).reshape(-1)


def raster(polygon: np.ndarray, size: int) -> Tensor:
    return torch.from_numpy(
        coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon.tolist()], size, size)))
    )


def stars(number: int, size: int) -> list[tuple[np.ndarray, Tensor, Tensor]]:
    """Polygons with their masks, and boxes that are not quite theirs."""
    g, found = np.random.default_rng(0), []
    while len(found) < number:
        polygon = star(size, g)
        mask = raster(polygon, size)
        if mask.sum() > 100:
            [box] = jittered(boxes_of(mask[None]), 0.05, size)
            found.append((polygon, mask, box))
    return found


def test_mask_targets_by_loops():
    objects = stars(12, 96)
    masks, boxes = torch.stack([m for _, m, _ in objects]), torch.stack([b for *_, b in objects])
    matches = torch.tensor([11, 3, 3, 0, 7])
    got = bpl.mask_targets(masks, matches, boxes[matches])
    assert got.shape == (5, 28, 28) and {*got.unique().tolist()} == {0.0, 1.0}
    for target, i in zip(got, matches.tolist(), strict=True):
        mean = mean_in_cells(masks[i].numpy().astype(float), boxes[i].double().tolist(), 28)
        sure = np.abs(mean - 0.5) > 1e-4
        assert np.array_equal(target.numpy()[sure], mean[sure] >= 0.5) and sure.mean() > 0.99
    assert bpl.mask_targets(masks, matches[:0], boxes[:0]).shape == (0, 28, 28)


def test_mask_targets_of_whole_cells_are_the_mask_itself():
    mask = (torch.rand(1, 40, 50) < 0.5).to(torch.uint8)
    for k, (x, y) in itertools.product((1,), ((0, 0), (5, 3), (22, 12))):
        box = torch.tensor([[x, y, x + 28 * k, y + 28 * k]]).float()
        assert torch.equal(
            bpl.mask_targets(mask, torch.tensor([0]), box)[0],
            mask[0, y : y + 28, x : x + 28].float(),
        )
    blocks = (torch.rand(1, 28, 28) < 0.5).to(torch.uint8)
    large = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(
        bpl.mask_targets(large, torch.tensor([0]), torch.tensor([[0.0, 0, 56, 56]])),
        blocks.float(),
    )


def test_mask_targets_are_nearly_detectron2s_polygons():
    """Detectron2 draws the polygon on 28 x 28 cells; ours averages the drawn mask: 1.2 % of the
    cells differ, overlap 0.96. torchvision pools half a pixel aside and keeps fractions: 3 %,
    0.91."""
    same, alike, other, apart = [], [], [], []
    for polygon, mask, box in stars(60, 128):
        [target] = bpl.mask_targets(mask[None], torch.tensor([0]), box[None])
        x0, y0, x1, y1 = box.double().tolist()
        moved = (polygon.reshape(-1, 2) - (x0, y0)) * (28 / (x1 - x0), 28 / (y1 - y0))
        drawn = raster(moved.reshape(-1), 28)
        same.append((target == drawn).float().mean().item())
        alike.append(shared_part(target, drawn))
        [pooled_] = theirs.project_masks_on_boxes(mask[None], box[None], torch.tensor([0]), 28)
        other.append((target == (pooled_ >= 0.5)).float().mean().item())
        apart.append(shared_part(target, pooled_))
    assert np.mean(same) > 0.98 and min(same) > 0.93 and np.mean(alike) > 0.95
    assert 0.95 < np.mean(other) < np.mean(same) and 0.88 < np.mean(apart) < np.mean(alike)


def test_mask_loss_is_torchvisions_with_our_targets(monkeypatch):
    """The same number of objects on each image, so that a mean of means is the mean."""
    args, masks = small(image_size=96), stars(6, 96)
    heads, pyramid = shaken(bpl.CascadeHeads(args, 5), 0.1), pyramid_of(96, 8, 2)
    objects = [
        Objects(
            torch.randint(5, (3,)),
            torch.stack([b for *_, b in part]),
            torch.stack([m for _, m, _ in part]),
            torch.zeros(3, 5),
            torch.ones(3, 5).bool(),
        )
        for part in (masks[:3], masks[3:])
    ]
    boxes = [jittered(o.boxes.repeat(2, 1), 0.02, 96) for o in objects]
    matches = [torch.tensor([0, 1, 2, -1, 1, -1]), torch.tensor([2, 1, -1, 0, -1, 0])]
    real = [m >= 0 for m in matches]
    boxes, matches = ([x[r] for x, r in zip(xs, real, strict=True)] for xs in (boxes, matches))
    got = heads.mask_loss(pyramid, boxes, matches, objects)
    logits = heads.mask.masks(
        F.relu(heads.mask.up(heads.mask.convs(bpl.roi_pool(pyramid, boxes, 14))))
    )
    monkeypatch.setattr(
        theirs,
        "project_masks_on_boxes",
        lambda masks, b, i, size: torch.from_numpy(
            np.stack(
                [
                    mean_in_cells(masks[k].numpy().astype(float), box, size) >= 0.5
                    for k, box in zip(i.tolist(), b.double().tolist(), strict=True)
                ]
            )
        ).float(),
    )
    want = theirs.maskrcnn_loss(
        logits, boxes, [o.masks for o in objects], [o.labels for o in objects], matches
    )
    assert got.item() == pytest.approx(want.item(), rel=1e-4)
    none = heads.mask_loss(pyramid, *([x[:0] for x in xs] for xs in (boxes, matches)), objects)
    assert none == 0 and none.requires_grad


def test_pasted_masks_are_nearly_torchvisions():
    """torchvision pastes into whole pixels, one too many a side. Only pixels along an edge
    differ."""
    found = []
    for _ in range(20):
        mask = (4 + 8 * F.interpolate(torch.randn(1, 1, 4, 4), (28, 28), mode="bicubic")).sigmoid()
        box = torch.cat([c := 5 + 25 * torch.rand(2), c + 130 + 60 * torch.rand(2)])[None]
        ours = paste_masks(mask[0], box, (180, 200))
        high, low = F.max_pool2d(ours, 5, 1, 2)[0], -F.max_pool2d(-ours, 5, 1, 2)[0]
        ours = ours[0] > 0.5
        other = theirs.paste_masks_in_image(mask, box, (180, 200))[0, 0] > 0.5
        found.append(shared_part(ours, other))
        assert not ((ours != other) & ((high < 0.45) | (low > 0.55))).any()
    assert np.mean(found) > 0.97 and min(found) > 0.94


def test_paste_moves_a_mask_of_its_own_size():
    """Where a box has as many pixels as the mask has cells they are copied, wherever it lies;
    nothing lies outside."""
    masks = torch.rand(3, 28, 28)
    boxes = torch.tensor([[4.0, 6, 32, 34], [-10, -3, 18, 25], [20, 30, 48, 58]])
    got = paste_masks(masks, boxes, (40, 36))
    want = torch.zeros(3, 40, 36)
    want[0, 6:34, 4:32] = masks[0]
    want[1, :25, :18] = masks[1, 3:, 10:]
    want[2, 30:, 20:] = masks[2, :10, :16]
    assert near(got, want, 1e-5)
    moved = paste_masks(masks[:1], boxes[:1] + torch.tensor([0.25, 0.5, 0.25, 0.5]), (40, 36))[0]
    rows = (want[0, 7:34] + want[0, 6:33]) / 2  # between two cells down, a quarter across
    assert near(moved[7:34, 5:32], 0.75 * rows[:, 5:32] + 0.25 * rows[:, 4:31], 1e-5)
    many = torch.rand(130, 28, 28)
    assert near(paste_masks(many, boxes[:1].expand(130, 4), (40, 36))[:, 6:34, 4:32], many, 1e-5)


@pytest.mark.parametrize(
    "box, want",
    [
        ((10, 20, 38, 48), (10, 20, 38, 48)),
        ((10, 20, 24, 34), (10, 20, 24, 34)),
        ((10.4, 20.4, 23.4, 33.4), (10, 20, 23, 33)),
        ((10.6, 20.6, 23.6, 33.6), (11, 21, 24, 34)),
    ],
    ids=str,
)
def test_a_full_mask_covers_the_pixels_whose_centres_are_in_its_box(box, want):
    got = paste_masks(torch.ones(1, 28, 28), torch.tensor([box]).float(), (64, 64))[0] > 0.5
    x0, y0, x1, y1 = want
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[y0:y1, x0:x1] = True
    assert torch.equal(got, expected)


def test_a_full_mask_in_a_large_box_loses_its_corners_as_in_detectron2():
    """Outside is zero, so a corner pixel of four times the size is (5/8)^2 < 1/2, beside it 5/8 *
    7/8 > 1/2."""
    got = paste_masks(torch.ones(1, 28, 28), torch.tensor([[4.0, 8, 116, 120]]), (128, 128))[0]
    inside = got[8:120, 4:116]
    assert inside[0, :3].tolist() == pytest.approx([25 / 64, 35 / 64, 40 / 64], rel=1e-5)
    assert (
        (inside <= 0.5).sum() == 4
        and ((got > 0.5).sum() == 112**2 - 4)
        and got.max() == pytest.approx(1)
    )


# ------------------------------------------------------------------------------------------- EVA-02


def timms(
    ours: bpl.EVA02, name: str, tokens: int, window: tuple[int, int, int] | None = None
) -> nn.Module:
    """timm's own network of `tokens` a side, patch 16 and no class token, with the weights of ours.
    All its blocks are global. `window`: first row and column of a window of a grid, whose positions
    it takes, and the grid's side."""
    net = timm.create_model(
        name, patch_size=16, img_size=16 * tokens, class_token=False, num_classes=0
    ).eval()
    net.patch_embed.proj.load_state_dict(ours.proj.state_dict())
    net.blocks.load_state_dict(ours.blocks.state_dict())
    row, column, grid = window or (0, 0, tokens)
    places = F.interpolate(ours.pos_embed, (grid, grid), mode="bicubic", align_corners=False)
    places = places[:, :, row : row + tokens, column : column + tokens]
    net.pos_embed.data = places.detach().flatten(2).transpose(1, 2).contiguous()
    return net


def of_blocks(net: bpl.EVA02, images: Tensor, *numbers: int) -> list[Tensor]:
    """The output after each of these numbers of blocks."""
    blocks, whole, found = net.blocks, net.whole, []
    for n in numbers:
        net.blocks, net.whole = blocks[:n], whole[:n]
        with torch.no_grad():
            found.append(net(images))
    net.blocks, net.whole = blocks, whole
    return found


@pytest.mark.parametrize("name, tokens, blocks", [("eva02_tiny_patch14_224", 16, 4), (EVA, 6, 3)])
def test_blocks_are_timms_when_one_window_covers_the_image(slim, name, tokens, blocks):
    """A tiny one with q, k, v in one; a base one with norms. Every block, from the patches on."""
    slim(embed_dim=128, depth=blocks)
    args = eva(backbone=name, window=tokens, image_size=16 * tokens)
    net, images = (
        shaken(bpl.EVA02(args, False), 0.1).eval(),
        torch.randn(2, 3, 16 * tokens, 16 * tokens),
    )
    other, found = timms(net, name, tokens), of_blocks(net, images, *range(1, blocks + 1))
    with torch.no_grad():
        want = other.forward_intermediates(images, norm=False, intermediates_only=True)
        assert len(found) == len(want) == blocks
        for a, b in zip(found, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        other.rope.get_embed = lambda: torch.cat(
            [torch.zeros(tokens**2, 64), torch.ones(tokens**2, 64)], dim=1
        )
        plain = other.forward_intermediates(images, norm=False, intermediates_only=True)[-1]
    assert (plain - found[-1]).abs().max() > 0.1, "rotary positions change nothing"


def test_windows_are_images_of_their_own(slim):
    """Two blocks within windows of 4 x 4 tokens, each as timm's network sees its part of the
    picture; then a global one over 8 x 8 tokens."""
    slim(embed_dim=64, depth=3)
    net = shaken(bpl.EVA02(eva(image_size=128, window=4), False), 0.1).eval()
    images, tokens = torch.randn(1, 3, 128, 128), torch.zeros(1, 64, 8, 8)
    assert net.whole == [False, False, True]
    with torch.no_grad():
        for row, column in itertools.product((0, 4), (0, 4)):
            part = images[:, :, 16 * row : 16 * row + 64, 16 * column : 16 * column + 64]
            seen = timms(net, EVA, 4, (row, column, 8)).forward_intermediates(
                part, norm=False, intermediates_only=True
            )
            tokens[:, :, row : row + 4, column : column + 4] = seen[1]
        across = timms(net, EVA, 8)
        want = across.blocks[2](tokens.flatten(2).transpose(1, 2), rope=across.rope.get_embed())
        out = net(images)
    assert torch.allclose(out, want.transpose(1, 2).view(1, 64, 8, 8), rtol=1e-4, atol=1e-4)
    found = of_blocks(net, images, 1, 2, 3)
    images[:, :, :16, :16] += 1.0  # a patch of the first window
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, :4] = True
    changed = [
        (a - b)[0].abs().amax(0) > 1e-5
        for a, b in zip(found, of_blocks(net, images, 1, 2, 3), strict=True)
    ]
    assert torch.equal(changed[0], inside) and torch.equal(changed[1], inside) and changed[2].all()


def test_windows_by_loops():
    x = torch.randn(2, 4, 6, 5)
    parts = bpl.windows(x, 2)
    want = [
        x[b, i : i + 2, j : j + 2].reshape(4, 5)
        for b in range(2)
        for i in (0, 2)
        for j in (0, 2, 4)
    ]
    assert torch.equal(parts, torch.stack(want)) and torch.equal(bpl.unwindows(parts, 2, (4, 6)), x)


@pytest.mark.parametrize(
    "depth, number, want",
    [
        (24, 4, [5, 11, 17, 23]),
        (24, 8, [2, 5, 8, 11, 14, 17, 20, 23]),
        (12, 4, [2, 5, 8, 11]),
        (4, 4, [0, 1, 2, 3]),
        (24, 1, [23]),
    ],
)
def test_which_blocks_are_global(slim, depth, number, want):
    slim(depth=depth)
    assert [
        i for i, whole in enumerate(bpl.EVA02(eva(global_blocks=number), False).whole) if whole
    ] == want


@pytest.mark.parametrize("depth", [24, 4])
def test_global_blocks_that_cannot_be_spread_evenly_are_refused(slim, depth):
    slim(depth=depth)
    with pytest.raises(errors.UserError, match=f"5 does not divide {depth} blocks"):
        bpl.EVA02(eva(global_blocks=5), False)


def rotary(tokens: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines (tokens^2, channels): rows in the first half, columns in the second, each
    frequency twice."""
    k, i = np.arange(channels // 2), np.arange(tokens) * 16 / tokens
    angle = i[:, None] * 10000.0 ** (-(k // 2 * 2) / (channels // 2))
    rows, columns = np.repeat(angle, tokens, axis=0), np.tile(angle, (tokens, 1))
    both = np.concatenate([rows, columns], axis=1)
    return np.sin(both), np.cos(both)


@pytest.mark.parametrize("tokens", [16, 32, 64, 96])
def test_rotary_table_is_the_definition(slim, tokens):
    slim(embed_dim=128, depth=1)  # a head has 64 channels, as the large one's
    net = bpl.EVA02(eva(), False)
    table = net.rope.get_embed(shape=[tokens, tokens])
    sines, cosines = rotary(tokens, 64)
    assert table.shape == (tokens**2, 128)
    assert np.abs(table.numpy() - np.concatenate([sines, cosines], axis=1)).max() < 1e-5
    # 16 frequencies, and column 0
    assert len(np.unique(sines[tokens].round(9))) == 17 and (sines[0] == 0).all()


def cubic(old: int, new: int) -> np.ndarray:
    """(new, old): bicubic weights with a = -0.75, edges repeated, corners not aligned, no
    antialiasing."""

    def kernel(t: float) -> float:
        t, a = abs(t), -0.75
        return (
            (a + 2) * t**3 - (a + 3) * t**2 + 1
            if t <= 1
            else a * (t**3 - 5 * t**2 + 8 * t - 4)
            if t < 2
            else 0.0
        )

    out = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            out[i, min(max(j, 0), old - 1)] += kernel(at - j)
    return out


@pytest.mark.parametrize("tokens", [16, 24, 8])
def test_positions_are_resized_bicubically(slim, tokens):
    slim()
    net = bpl.EVA02(eva(image_size=16 * tokens, window=tokens), False).eval()
    with torch.no_grad():
        net.pos_embed.normal_()
        net.proj.weight.zero_(), net.proj.bias.zero_()
    [[found]] = of_blocks(net, torch.randn(1, 3, 16 * tokens, 16 * tokens), 0)
    m = cubic(16, tokens)
    want = np.einsum("ip,jq,dpq->dij", m, m, net.pos_embed[0].detach().double().numpy())
    assert np.abs(found.numpy() - want).max() < 1e-4


def test_there_is_no_class_token_and_no_final_norm(slim):
    slim()
    body, net = timm.create_model(EVA, num_classes=0), bpl.EVA02(eva(), False)
    blocks = {f"blocks.{n}" for n, _ in body.blocks.named_parameters()}
    assert {n for n, _ in net.named_parameters()} == blocks | {
        "pos_embed",
        "proj.weight",
        "proj.bias",
    }
    assert net.pos_embed.shape == (1, 32, 16, 16) and body.pos_embed.shape == (1, 257, 32)
    assert all(block.attn.num_prefix_tokens == 0 for block in net.blocks)


def test_patches_are_resized_so_that_answers_stay(slim):
    """The answer to an enlarged picture is the picture's, as it is to a constant one. The other
    layers are timm's own."""
    slim()
    body = timm.create_model(EVA, num_classes=0)
    net, kernel = bpl.EVA02(eva(), False), body.patch_embed.proj.weight.data
    net.take(body)
    picture = torch.randn(9, 3, 14, 14)
    enlarged = F.interpolate(picture, (16, 16), mode="bicubic", antialias=True)
    answer, ones = F.conv2d(picture, kernel), torch.ones(1, 3, 16, 16)
    got = F.conv2d(enlarged, net.proj.weight)
    assert torch.allclose(got, answer, rtol=1e-3, atol=1e-2 * answer.abs().max())
    constant = F.conv2d(ones[:, :, :14, :14], kernel)
    close_ = {"rtol": 1e-3, "atol": 1e-3 * constant.abs().max()}
    assert torch.allclose(F.conv2d(ones, net.proj.weight), constant, **close_)
    assert net.proj.stride == (16, 16) and net.proj.bias is body.patch_embed.proj.bias
    table = body.pos_embed[0, 1:].view(16, 16, 32).permute(2, 0, 1)
    assert torch.equal(net.pos_embed[0], table) and net.blocks is body.blocks


def test_checkpointing_gives_the_same_gradients(slim):
    slim(depth=3)
    images, found = torch.randn(2, 3, 64, 64), []
    for on in (False, True):
        torch.manual_seed(1)
        net, calls = bpl.EVA02(eva(checkpointing=on, drop_path=0.5), False).train(), []
        net.blocks[1].norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        net(images).square().sum().backward()
        assert len(calls) == 1 + on
        found.append([p.grad.clone() for p in net.parameters()])
        calls.clear()
        net.eval()(images).sum().backward()
        assert len(calls) == 1
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert any(a.abs().sum() > 0 for a in found[0])


def test_a_dropped_block_is_dropped_for_the_whole_image(slim):
    """Not for some of its windows."""
    slim(depth=4)
    net, images = (
        bpl.EVA02(eva(image_size=128, drop_path=0.8), False).train(),
        torch.randn(16, 3, 128, 128),
    )
    net.blocks, net.whole = net.blocks[2:3], [False]  # 16 windows of 2 x 2 tokens an image
    nn.init.zeros_(net.blocks[0].mlp.fc2.weight)
    tokens, out = of_blocks(net, images, 0, 1)
    kept = (out != tokens).flatten(1)
    assert 0 < kept.float().mean() < 0.95 and ((kept.float().mean(1) > 0.9) | ~kept.any(1)).all()


# -------------------------------------------------------------------------------- the whole network


@pytest.fixture(scope="module")
def large() -> tuple[Args, bpl.Detector]:
    """The paper's detector, without memory."""
    args = bpl.preset("lvis", backbone="eva02_large_patch14_224", weights="none")
    with torch.device("meta"):
        return args, bpl.Detector(args, 1203)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_network_has_its_parameters(large):
    """303.3, 7.8, 1.2, three times 16.4 and 2.9 millions."""
    d, h, w, c, norm = 1024, 2730, 256, 1203, 2
    # no bias of the keys
    attention, mlp = 4 * d * d + 3 * d, 2 * (d * h + h) + norm * h + h * d + d
    backbone = 24 * (attention + mlp + 2 * norm * d) + 3 * 16 * 16 * d + d + 16 * 16 * d
    out = 9 * w * w + 2 * norm * w
    neck = 2 * (4 * d * 512 + 512) + norm * 512 + 4 * 512 * w + w + w * (w + 512 + d + d) + 4 * out
    rpn = 2 * (9 * w * w + w) + 3 * (w + 1) + 12 * (w + 1)
    convs = 4 * (9 * w * w + norm * w)
    box = convs + 49 * w * 1024 + 1024 + 1025 * c + 1025 * 4
    mask = convs + 4 * w * w + w + (w + 1) * c
    _, net = large
    assert [
        count(m) for m in (net.backbone, net.neck, net.rpn, *net.heads.boxes, net.heads.mask)
    ] == [backbone, neck, rpn, box, box, box, mask]
    assert [round(n / 1e6, 1) for n in (backbone, neck, rpn, box, mask)] == [
        303.4,
        7.8,
        1.2,
        16.4,
        2.9,
    ]
    assert count(net) == backbone + neck + rpn + 3 * box + mask == 364_704_935


def test_the_backbone_is_timms_less_class_token_and_norm(large):
    with torch.device("meta"):
        body = timm.create_model("eva02_large_patch14_224", num_classes=0)
    less = 2 * 1024 + 2 * 1024  # its token and place, and the norm after pooling
    assert round(count(body) / 1e6, 1) == 303.3
    assert count(large[1].backbone) == count(body) - less + 3 * (16**2 - 14**2) * 1024
    block = {n: tuple(p.shape) for n, p in large[1].backbone.blocks[0].named_parameters()}
    assert block["mlp.fc1_g.weight"] == (2730, 1024) and block["mlp.norm.weight"] == (2730,)
    assert "attn.k_proj.bias" not in block and large[1].backbone.whole == [
        i in (5, 11, 17, 23) for i in range(24)
    ]


def test_layer_decay_of_the_papers_network(large):
    """0.8^25 for patches and positions, 0.8^(24 - i) for block i, 1 elsewhere; weight decay 0.1 on
    everything."""
    args, net = large
    groups = bpl.adamw(net, args, World()).param_groups
    names, rates = {p: n for n, p in net.named_parameters()}, {}
    for group in groups:
        assert (
            group["lr"] == group["initial_lr"]
            and group["betas"] == (0.9, 0.999)
            and group["weight_decay"] == 0.1
        )
        rates |= {names[p]: group["lr"] / 4e-5 for p in group["params"]}
    assert len(groups) == 26 and rates.keys() == {*names.values()}
    for name, rate in rates.items():
        parts = name.split(".")
        power = 0 if parts[0] != "backbone" else 24 - int(parts[2]) if parts[1] == "blocks" else 25
        assert rate == pytest.approx(0.8**power), name
    assert rates["backbone.pos_embed"] == pytest.approx(0.8**25) and rates[
        "backbone.blocks.23.norm1.bias"
    ] == pytest.approx(0.8)


# --------------------------------------------------------------------------------- released weights

D, HIDDEN, W, FC, C, DEPTH = 32, 85, 8, 16, 5, 2  # 85 = int(32 * 8 / 3)


def released() -> dict[str, Tensor]:
    """A whole detector under the names of EVA-02's release (Detectron2), random, and what a release
    has besides."""
    shapes = {"backbone.net.pos_embed": (1, 197, D)}

    def put(name: str, *weight: int, bias: int | None = None) -> None:
        shapes.update({f"{name}.weight": weight} | ({f"{name}.bias": (bias,)} if bias else {}))

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> None:  # no bias, but a norm
        put(name, outputs, inputs, kernel, kernel)
        put(f"{name}.norm", outputs, bias=outputs)

    put("backbone.net.patch_embed.proj", D, 3, 16, 16, bias=D)
    for b in (f"backbone.net.blocks.{i}" for i in range(DEPTH)):
        for norm in ("norm1", "norm2"):
            put(f"{b}.{norm}", D, bias=D)
        for part in ("q_proj", "k_proj", "v_proj"):
            put(f"{b}.attn.{part}", D, D)
        shapes |= {f"{b}.attn.q_bias": (D,), f"{b}.attn.v_bias": (D,)}
        put(f"{b}.attn.proj", D, D, bias=D)
        put(f"{b}.mlp.w1", HIDDEN, D, bias=HIDDEN)
        put(f"{b}.mlp.w2", HIDDEN, D, bias=HIDDEN)
        put(f"{b}.mlp.ffn_ln", HIDDEN, bias=HIDDEN)
        put(f"{b}.mlp.w3", D, HIDDEN, bias=D)
        shapes |= {f"{b}.attn.rope.freqs_{kind}": (16, 16) for kind in ("cos", "sin")}
    shapes |= {
        f"backbone.net.rope_{x}.freqs_{kind}": (4, 16)
        for x in ("win", "glb")
        for kind in ("cos", "sin")
    }
    put("backbone.simfp_2.0", D, D // 2, 2, 2, bias=D // 2)
    put("backbone.simfp_2.1", D // 2, bias=D // 2)
    put("backbone.simfp_2.3", D // 2, D // 4, 2, 2, bias=D // 4)
    put("backbone.simfp_3.0", D, D // 2, 2, 2, bias=D // 2)
    for level, first, inputs in ((2, 4, D // 4), (3, 1, D // 2), (4, 0, D), (5, 1, D)):
        conv(f"backbone.simfp_{level}.{first}", W, inputs, 1)
        conv(f"backbone.simfp_{level}.{first + 1}", W, W, 3)
    for i in range(2):
        put(f"proposal_generator.rpn_head.conv.conv{i}", W, W, 3, 3, bias=W)
    put("proposal_generator.rpn_head.objectness_logits", 3, W, 1, 1, bias=3)
    put("proposal_generator.rpn_head.anchor_deltas", 12, W, 1, 1, bias=12)
    for k in range(3):
        for i in range(1, 5):
            conv(f"roi_heads.box_head.{k}.conv{i}", W, W, 3)
        put(f"roi_heads.box_head.{k}.fc1", FC, 49 * W, bias=FC)
        put(f"roi_heads.box_predictor.{k}.cls_score", C + 1, FC, bias=C + 1)
        put(f"roi_heads.box_predictor.{k}.bbox_pred", 4, FC, bias=4)
        shapes[f"roi_heads.box_predictor.{k}.fed_loss_cls_weights"] = (C,)
    for i in range(1, 5):
        conv(f"roi_heads.mask_head.mask_fcn{i}", W, W, 3)
    put("roi_heads.mask_head.deconv", W, W, 2, 2, bias=W)
    put("roi_heads.mask_head.predictor", C, W, 1, 1, bias=C)
    g = torch.Generator().manual_seed(0)
    values = {
        n: torch.randn(x, generator=g) / math.sqrt(max(math.prod(x[1:]), 4))
        for n, x in shapes.items()
    }
    for name in values:  # scales of norms, so that signals live
        if len(shapes[name]) == 1 and name.endswith("weight"):
            values[name] += 1
    return values


def own_place(name: str) -> str:
    """Where a released tensor belongs, layer by layer (recipe 1.2)."""
    *path, last = name.split(".")
    if path[0] == "backbone" and path[1] == "net":
        path = path[2:]
        if path == []:
            return f"backbone.{last}"
        if path[0] == "patch_embed":
            return f"backbone.proj.{last}"
        if last in ("q_bias", "v_bias"):
            return f"backbone.{'.'.join(path)}.{last[0]}_proj.bias"
        path[-1] = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2", "ffn_ln": "norm"}.get(
            path[-1], path[-1]
        )
        return f"backbone.{'.'.join(path)}.{last}"
    if path[0] == "backbone":  # deconvolutions, then 1x1, norm, 3x3, norm
        level, layer, norm = int(path[1][-1]), int(path[2]), path[-1] == "norm"
        first = {2: 4, 3: 1, 4: 0, 5: 1}[level]
        at = layer if layer < first else first + 2 * (layer - first) + norm
        return f"neck.levels.{level - 2}.{at}.{last}"
    if path[0] == "proposal_generator":
        part = {
            "conv0": "convs.0",
            "conv1": "convs.2",
            "objectness_logits": "objectness",
            "anchor_deltas": "deltas",
        }
        return f"rpn.{part[path[-1]]}.{last}"
    if path[1] == "mask_head":
        if "mask_fcn" in path[2]:
            return f"heads.mask.convs.{3 * (int(path[2][-1]) - 1) + (path[-1] == 'norm')}.{last}"
        return f"heads.mask.{ {'deconv': 'up', 'predictor': 'masks'}[path[2]] }.{last}"
    k, part = path[2], path[3]
    if part.startswith("conv"):
        return f"heads.boxes.{k}.convs.{3 * (int(part[-1]) - 1) + (path[-1] == 'norm')}.{last}"
    ours = {"fc1": "fc", "cls_score": "classes", "bbox_pred": "deltas"}
    return f"heads.boxes.{k}.{ours[part]}.{last}"


@pytest.fixture
def loaded(slim, tmp_path):
    """A released file, the network that loaded it, and what was said."""
    slim()
    file = released()
    torch.save({"model": file, "iteration": 39_999}, tmp_path / "released.pth")
    net = bpl.Detector(eva(), C)
    return file, net, bpl.load_detector(net, tmp_path / "released.pth")


def test_every_tensor_of_a_released_detector_lands(loaded):
    file, net, notes = loaded
    own, places = net.state_dict(), set()
    for name, value in file.items():
        if "rope" in name or "fed_loss" in name:
            continue
        place = own_place(name)
        if name.endswith("pos_embed"):
            value = value[:, 1:].view(1, 14, 14, D).permute(0, 3, 1, 2)
        if "cls_score" in name:
            value = value[:C]
        assert torch.equal(own[place], value), f"{name} is not in {place}"
        places.add(place)
    assert {n for n, _ in net.named_parameters()} == places
    assert not any("left fresh" in note for note in notes), notes


def test_a_released_detector_is_loaded_without_a_word(loaded):
    assert loaded[2] == []


def normed(x: Tensor, file: dict, name: str) -> Tensor:
    """Over the last axis."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * file[f"{name}.weight"] + file[f"{name}.bias"]


def conv_norm(x: Tensor, file: dict, name: str) -> Tensor:
    weight = file[f"{name}.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return normed(x.movedim(1, -1), file, f"{name}.norm").movedim(-1, 1)


def both(file: dict, name: str) -> tuple[Tensor, Tensor]:
    return file[f"{name}.weight"], file[f"{name}.bias"]


def released_attention(x: Tensor, file: dict, b: str, tokens: int) -> Tensor:
    """(B, tokens^2, D), two heads of 16 channels."""
    sines, cosines = (torch.from_numpy(t).float() for t in rotary(tokens, D // 2))
    q = F.linear(x, file[f"{b}.q_proj.weight"], file[f"{b}.q_bias"])
    k, v = (
        x @ file[f"{b}.k_proj.weight"].T,
        F.linear(x, file[f"{b}.v_proj.weight"], file[f"{b}.v_bias"]),
    )
    out = []
    for head in range(2):
        q_, k_, v_ = (t[..., head * 16 : head * 16 + 16] for t in (q, k, v))
        q_, k_ = (
            t * cosines + torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2) * sines
            for t in (q_, k_)
        )
        out.append((q_ @ k_.transpose(1, 2) / 4).softmax(-1) @ v_)
    return F.linear(torch.cat(out, dim=-1), *both(file, f"{b}.proj"))


def released_backbone(images: Tensor, file: dict) -> Tensor:
    """EVA-02's ViT of 4 x 4 tokens: block 0 within windows of 2 x 2, block 1 over all."""
    x = F.conv2d(images, *both(file, "backbone.net.patch_embed.proj"), stride=16)
    m = torch.from_numpy(cubic(14, 4)).float()
    x = x + torch.einsum(
        "ip,jq,pqd->dij", m, m, file["backbone.net.pos_embed"][0, 1:].view(14, 14, D)
    )
    x = x.permute(0, 2, 3, 1)
    for i in range(DEPTH):
        b = f"backbone.net.blocks.{i}"
        y, z = normed(x, file, f"{b}.norm1"), torch.zeros_like(x)
        side = 4 if i else 2
        for row, column in itertools.product(range(0, 4, side), range(0, 4, side)):
            part = y[:, row : row + side, column : column + side].flatten(1, 2)
            part = released_attention(part, file, f"{b}.attn", side)
            z[:, row : row + side, column : column + side] = part.unflatten(1, (side, side))
        x = x + z
        y = normed(x, file, f"{b}.norm2")
        y = F.silu(F.linear(y, *both(file, f"{b}.mlp.w1"))) * F.linear(
            y, *both(file, f"{b}.mlp.w2")
        )
        x = x + F.linear(normed(y, file, f"{b}.mlp.ffn_ln"), *both(file, f"{b}.mlp.w3"))
    return x.permute(0, 3, 1, 2)


def released_pyramid(x: Tensor, file: dict) -> list[Tensor]:
    up = F.conv_transpose2d(x, *both(file, "backbone.simfp_2.0"), stride=2)
    up = F.gelu(normed(up.movedim(1, -1), file, "backbone.simfp_2.1").movedim(-1, 1))
    starts = (
        (2, 4, F.conv_transpose2d(up, *both(file, "backbone.simfp_2.3"), stride=2)),
        (3, 1, F.conv_transpose2d(x, *both(file, "backbone.simfp_3.0"), stride=2)),
        (4, 0, x),
        (5, 1, F.max_pool2d(x, 2)),
    )
    maps = [
        conv_norm(
            conv_norm(y, file, f"backbone.simfp_{level}.{i}"),
            file,
            f"backbone.simfp_{level}.{i + 1}",
        )
        for level, i, y in starts
    ]
    return [*maps, maps[-1][:, :, ::2, ::2]]


def test_a_loaded_detector_computes_what_the_released_one_does(loaded):
    """By the released names alone: backbone, pyramid, proposals' scores, three heads and masks."""
    file, net, _ = loaded
    images, boxes, labels = (
        torch.randn(2, 3, 64, 64),
        some_boxes(7, 64, 12),
        torch.tensor([4, 0, 1, 1, 3, 2, 0]),
    )
    with torch.no_grad():
        tokens = released_backbone(images, file)
        assert near(net.eval().backbone(images), tokens, 1e-4) and tokens.std() > 0.3
        pyramid = released_pyramid(tokens, file)
        for a, b in zip(net.pyramid(images), pyramid, strict=True):
            assert near(a, b, 1e-3) and b.std() > 0.3

        head, scores, deltas = "proposal_generator.rpn_head", [], []
        for x in pyramid:
            for i in range(2):
                x = F.relu(F.conv2d(x, *both(file, f"{head}.conv.conv{i}"), padding=1))
            scores.append(
                F.conv2d(x, *both(file, f"{head}.objectness_logits")).permute(0, 2, 3, 1).flatten(1)
            )
            x = F.conv2d(x, *both(file, f"{head}.anchor_deltas"))
            deltas.append(x.view(2, 3, 4, *x.shape[2:]).permute(0, 3, 4, 1, 2).flatten(1, 3))
        for a, b in zip(
            net.rpn(pyramid), (torch.cat(scores, 1), torch.cat(deltas, 1)), strict=True
        ):
            assert near(a, b, 1e-4) and b.std() > 0.1

        moved, total = boxes, 0
        for k, (_, weights) in enumerate(STAGES):
            x = torch.cat([pooled(pyramid, 1, b, 7) for b in moved])
            for i in range(1, 5):
                x = F.relu(conv_norm(x, file, f"roi_heads.box_head.{k}.conv{i}"))
            x = F.relu(F.linear(x.flatten(1), *both(file, f"roi_heads.box_head.{k}.fc1")))
            total = (
                total
                + F.linear(x, *both(file, f"roi_heads.box_predictor.{k}.cls_score")).sigmoid()[
                    :, :C
                ]
                / 3
            )
            steps = F.linear(x, *both(file, f"roi_heads.box_predictor.{k}.bbox_pred"))
            moved = clip_boxes_to_image(
                coding.BoxCoder(weights).decode_single(steps, moved), (64, 64)
            )
        _, (found, probs) = net.heads.scores(pyramid, [boxes[:0], boxes])
        assert (
            near(probs, total, 1e-3)
            and near(found, moved, 1e-2)
            and (moved - boxes).abs().max() > 1
        )
        assert probs.std() > 0.05

        x = torch.cat([pooled(pyramid, 1, b, 14) for b in boxes])
        for i in range(1, 5):
            x = F.relu(conv_norm(x, file, f"roi_heads.mask_head.mask_fcn{i}"))
        x = F.relu(F.conv_transpose2d(x, *both(file, "roi_heads.mask_head.deconv"), stride=2))
        x = F.conv2d(x, *both(file, "roi_heads.mask_head.predictor")).sigmoid()[
            torch.arange(7), labels
        ]
        assert near(net.masks(pyramid, 1, boxes, labels), x, 1e-3) and x.std() > 0.1


@pytest.mark.parametrize("backbone", [EVA, "test_resnet", "eva02_tiny_patch14_224"])
def test_our_own_detector_is_loaded_whole(slim, tmp_path, backbone):
    if backbone != "test_resnet":
        slim()
    net, again = (shaken(bpl.Detector(eva(backbone=backbone, norm="live"), C)) for _ in range(2))
    torch.save(net.state_dict(), tmp_path / "own.pt")
    assert bpl.load_detector(again, tmp_path / "own.pt") == []
    for name, value in again.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_a_checkpoint_of_a_released_detector_loads_again(loaded):
    """As a teacher, with --eval and --predict: into a network that has not seen the released
    file."""
    _, net, _ = loaded
    fresh = bpl.Detector(eva(), C)
    assert fresh.backbone.pos_embed.shape != net.backbone.pos_embed.shape
    checkpoints.load_exact(fresh, net.state_dict(), "teacher.pt")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh.eval().backbone(images), net.eval().backbone(images))
