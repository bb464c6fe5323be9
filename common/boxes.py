"""Arithmetic of boxes and masks, as pure functions of tensors that need nothing but torch and
torchvision. Boxes are x0, y0, x1, y1 in pixels."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.waits import places

# torchvision's operators are imported where they are used, because they load much that --help does
# not need.


def boxes_of(masks: Tensor) -> Tensor:
    """Masks (N, h, w), none of them empty -> boxes (N, 4) float32 along pixel edges."""
    columns = masks.any(1).int()  # (N, w)
    rows = masks.any(2).int()  # (N, h)
    left = columns.argmax(1)
    top = rows.argmax(1)
    right = columns.shape[1] - columns.flip(1).argmax(1)
    bottom = rows.shape[1] - rows.flip(1).argmax(1)
    return torch.stack([left, top, right, bottom], dim=1).float()


def sided(boxes: Tensor, least: float = 0.0) -> Tensor:
    """(n, 4) -> (n,) bool: finite, and both sides longer than `least` pixels."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return torch.isfinite(boxes).all(1) & (sides > least).all(1)


# ------------------------------------------------------------------------------ anchors and deltas
@lru_cache(maxsize=4)
@torch.inference_mode(False)  # cached tensors serve training, too
def anchors_of(size: int, scale: float, device: torch.device) -> tuple[Tensor, list[int]]:
    """Anchors (A, 4) of strides 4, 8, .., 64 on a square, by level, row, column, shape; and how
    many a level has."""
    levels = []
    for stride in (4, 8, 16, 32, 64):
        at = torch.arange(-(-size // stride), device=device) * stride
        y, x = torch.meshgrid(at, at, indexing="ij")
        ratio = torch.tensor([0.5, 1.0, 2.0], device=device).sqrt()  # height over width
        half = scale * stride / 2 * torch.stack([1 / ratio, ratio], dim=1)  # (3, 2)
        centre = torch.stack([x, y], dim=2).view(-1, 1, 2).float()
        levels.append(torch.cat([centre - half, centre + half], dim=2).view(-1, 4))
    return torch.cat(levels), [len(level) for level in levels]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def constant_row(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A constant, which is sent to the device only once, because sending waits."""
    return torch.tensor(values, device=device)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Deltas (n, 4) that lead from `anchors` to `boxes`: shift of the centre over the size, log of
    the ratio of sizes, each times its weight."""
    anchor_sides = anchors[:, 2:] - anchors[:, :2]
    sides = boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2 / anchor_sides
    growth = (sides / anchor_sides).log()
    return torch.cat([shift, growth], dim=1) * constant_row(weights, boxes.device)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: tuple[float, ...], size: int) -> Tensor:
    """The reverse of `encode_boxes`, clipped to the square of `size` pixels. A side grows by a
    factor of 62.5 at most."""
    deltas = deltas / constant_row(weights, deltas.device)
    sides = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * sides
    half = deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp() * sides / 2
    return torch.cat([centre - half, centre + half], dim=1).clamp(0, size)


# -------------------------------------------------------------------------- matching and sampling
def match_boxes(
    candidates: Tensor, boxes: Tensor, low: float, high: float, rescue: bool = False
) -> Tensor:
    """The object of each candidate box (n,): the index of the most overlapping of `boxes` (N, 4);
    -1, background, where the overlap is under `low`; -2, neither, from there to `high`. With
    `rescue` an object keeps its best candidates, even under `high` (low-quality matches)."""
    from torchvision.ops import box_iou

    best = candidates.new_zeros(len(candidates))
    index = torch.zeros_like(best, dtype=torch.int64)
    rescued = torch.zeros_like(best, dtype=torch.bool)
    for start in range(0, len(boxes), 64):  # 300 objects and 260,000 anchors: 64 rows at once
        overlap = box_iou(boxes[start : start + 64], candidates)  # (<= 64, n)
        value, place = overlap.max(0)
        index = torch.where(value > best, place + start, index)
        best = torch.maximum(best, value)
        if rescue and len(candidates):
            is_best = (overlap == overlap.amax(1, keepdim=True)) & (overlap > 0)
            rescued |= is_best.any(0)
    unmatched = torch.where(best < low, -1, -2)
    matched = torch.where(best >= high, index, unmatched)
    return torch.where(rescued, index, matched)


class Sampled(NamedTuple):
    """Candidates drawn in one image, as indices."""

    foreground: Tensor  # objects
    background: Tensor


def sample_regions(
    matches: list[Tensor], number: int, share: float, draws: list[torch.Generator]
) -> list[Sampled]:
    """Of each image `number` candidates at random, from the match of each candidate: up to `share`
    of them objects (matches >= 0), the others background (-1)."""
    objects = [match >= 0 for match in matches]
    others = [match == -1 for match in matches]
    found = places([*objects, *others])
    sampled = []
    for foreground, background, g in zip(
        found[: len(matches)], found[len(matches) :], draws, strict=True
    ):
        foreground = shuffled(foreground, g)[: int(number * share)]
        background = shuffled(background, g)[: number - len(foreground)]
        sampled.append(Sampled(foreground, background))
    return sampled


def shuffled(values: Tensor, g: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=g, device=g.device)]


# ---------------------------------------------------------------------------------------- results
def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float, soft: bool
) -> tuple[Tensor, Tensor]:
    """Indices of the boxes (n, 4) that stay, best first, none that overlaps a better one of its
    class by `overlap`, and their scores. `soft` (linear soft-NMS, arXiv 1704.04503) lowers the
    scores by the overlap instead, where it is over 0.6; the best 1,000 stay."""
    from torchvision.ops import batched_nms, box_iou

    if not soft:
        # Classes are told apart by an offset, which takes digits: hence float64.
        keep = batched_nms(boxes.double(), scores.double(), labels, overlap)
        return keep, scores[keep]
    order = []
    remaining = scores.clone()
    final = scores.clone()
    for _ in range(min(len(scores), 1000)):
        best = int(remaining.argmax())
        order.append(best)
        final[best] = remaining[best]
        shared = box_iou(boxes[best : best + 1], boxes)[0] * (labels == labels[best])
        remaining = torch.where(shared > 0.6, remaining * (1 - shared), remaining)
        remaining[order] = -1
    return torch.tensor(order, dtype=torch.int64, device=boxes.device), final[order]


def suppress_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float) -> Tensor:
    """Indices of the boxes (n, 4) that stay, best first: none overlaps a better one of its group
    by more than `overlap`. Groups (n,) are numbers from 0 on."""
    from torchvision.ops import nms

    if len(boxes) == 0:
        return groups
    # One square for each group, so that they do not meet; which takes digits: hence float64.
    boxes = boxes.double()
    apart = boxes + (groups * (boxes.max() + 1))[:, None]
    return nms(apart, scores.double(), overlap)


def paste_masks(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (n, m, m) of boxes (n, 4) -> (n, *size) float32, bilinear, 0 outside of a box."""

    def in_box(low: Tensor, high: Tensor, number: int) -> Tensor:
        """(n, number) where each pixel lies between the box's edges, -1 to 1."""
        at = torch.arange(number, device=probs.device) + 0.5
        return (at - low[:, None]) / (high - low)[:, None] * 2 - 1

    height, width = size
    pasted = [probs.new_zeros(0, *size)]
    at_once = max(64 * 1024**2 // (height * width), 1)  # not all: memory
    for part, box in zip(probs.split(at_once), boxes.split(at_once), strict=True):
        x = in_box(box[:, 0], box[:, 2], width)[:, None, :].expand(-1, height, -1)
        y = in_box(box[:, 1], box[:, 3], height)[:, :, None].expand(-1, -1, width)
        grid = torch.stack([x, y], dim=3)
        pasted.append(F.grid_sample(part[:, None], grid, align_corners=False)[:, 0])
    return torch.cat(pasted)
