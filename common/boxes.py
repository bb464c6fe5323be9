"""Boxes, masks, crops and pictures of objects, true or found. Boxes are x0, y0, x1, y1 in
pixels."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, roi_align


def boxes_of(masks: Tensor) -> Tensor:
    """Masks (N, h, w), none of them empty -> boxes (N, 4) float32 along pixel edges."""
    rows, columns = masks.any(2).int(), masks.any(1).int()
    ends = [x.argmax(1) for x in (columns, rows)] + [
        x.shape[1] - x.flip(1).argmax(1) for x in (columns, rows)
    ]
    return torch.stack(ends, dim=1).float()


@lru_cache(maxsize=4)
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
    return torch.cat(levels), [len(x) for x in levels]


@lru_cache(maxsize=16)
def constant_row(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A constant, sent to the device once: sending waits."""
    return torch.tensor(values, device=device)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Deltas (n, 4) that lead from `anchors` to `boxes`: shift of the centre over the size, log of
    the ratio of sizes, each times its weight."""
    size, target = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2 / size
    return torch.cat([shift, (target / size).log()], dim=1) * constant_row(weights, boxes.device)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: tuple[float, ...], size: int) -> Tensor:
    """The reverse of `encode`, clipped to the square of `size` pixels. A side grows by a factor of
    62.5 at most."""
    deltas = deltas / constant_row(weights, deltas.device)
    sides = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * sides
    half = deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp() * sides / 2
    return torch.cat([centre - half, centre + half], dim=1).clamp(0, size)


def sided(boxes: Tensor, least: float = 0.0) -> Tensor:
    """(n, 4) -> (n,) bool: finite, and both sides longer than `least` pixels."""
    return torch.isfinite(boxes).all(1) & (boxes[:, 2:] - boxes[:, :2] > least).all(1)


def match_boxes(
    candidates: Tensor, boxes: Tensor, low: float, high: float, rescue: bool = False
) -> Tensor:
    """The object of each candidate box (n,): index of the most overlapping of `boxes` (N, 4); -1,
    background, where the overlap is under `low`; -2, neither, from there to `high`. With `rescue`
    an object's best candidates, even under `high`, are not lost (low-quality matches)."""
    best = candidates.new_zeros(len(candidates))
    index, rescued = (
        torch.zeros_like(best, dtype=torch.int64),
        torch.zeros_like(best, dtype=torch.bool),
    )
    for start in range(0, len(boxes), 64):  # 300 objects and 260,000 anchors: 64 rows at once
        overlap = box_iou(boxes[start : start + 64], candidates)  # (<= 64, n)
        value, place = overlap.max(0)
        index = torch.where(value > best, place + start, index)
        best = torch.maximum(best, value)
        if rescue and len(candidates):
            rescued |= ((overlap == overlap.amax(1, keepdim=True)) & (overlap > 0)).any(0)
    state = torch.where(best >= high, index, torch.where(best < low, -1, -2))
    return torch.where(rescued, index, state)


def sample_regions(matches: Tensor, number: int, share: float, g: torch.Generator) -> Tensor:
    """Indices of `number` candidates at random: up to `share` of them objects (matches >= 0), the
    others background."""

    def pick(chosen: Tensor, most: int) -> Tensor:
        places = chosen.nonzero().flatten()
        return places[torch.randperm(len(places), generator=g, device=g.device)[:most]]

    real = pick(matches >= 0, int(number * share))
    return torch.cat([real, pick(matches == -1, number - len(real))])


def shares(groups: list[Tensor]) -> Tensor:
    """The weight (R,) of each region in a mean over images of means over their regions (n,)."""
    return torch.cat(
        [
            g.new_full((len(g),), 1 / max(len(g), 1) / len(groups), dtype=torch.float32)
            for g in groups
        ]
    )


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float, soft: bool
) -> tuple[Tensor, Tensor]:
    """Indices of the boxes (n, 4) that stay, best first, none that overlaps a better one of its
    class by `overlap`, and their scores. `soft` (linear soft-NMS, arXiv 1704.04503) lowers the
    scores by the overlap instead, where it is over 0.6; the best 1,000 stay."""
    if not soft:
        # classes are told apart by an offset
        keep = batched_nms(boxes.double(), scores.double(), labels, overlap)
        return keep, scores[keep]
    order, left, scores = [], scores.clone(), scores.clone()
    for _ in range(min(len(scores), 1000)):
        order.append(i := int(left.argmax()))
        scores[i] = left[i]
        shared = box_iou(boxes[i : i + 1], boxes)[0] * (labels == labels[i])
        left = torch.where(shared > 0.6, left * (1 - shared), left)
        left[order] = -1
    return torch.tensor(order, dtype=torch.int64, device=boxes.device), scores[order]


def mask_targets(masks: Tensor, matches: Tensor, boxes: Tensor, size: int = 28) -> Tensor:
    """Masks (N, S, S), the object of each box (n,) and boxes (n, 4) -> (n, size, size) 0/1: what of
    the object lies in the box, averaged over each cell, from a half on."""
    used, place = matches.unique(return_inverse=True)
    rois = torch.cat([place[:, None].to(boxes), boxes], dim=1)
    return (
        roi_align(masks[used][:, None].float(), rois, size, 1.0, 0, aligned=True)[:, 0] >= 0.5
    ).float()


def paste_masks(probs: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (n, m, m) of boxes (n, 4) -> (n, *size) float32, bilinear, 0 outside of a box."""

    # (n, number) in -1 .. 1 of the box
    def places(low: Tensor, high: Tensor, number: int) -> Tensor:
        at = torch.arange(number, device=probs.device) + 0.5
        return (at - low[:, None]) / (high - low)[:, None] * 2 - 1

    parts, few = [probs.new_zeros(0, *size)], max(64 * 1024**2 // (size[0] * size[1]), 1)
    for p, b in zip(probs.split(few), boxes.split(few), strict=True):
        x, y = places(b[:, 0], b[:, 2], size[1]), places(b[:, 1], b[:, 3], size[0])
        where = torch.stack(
            [x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=3
        )
        parts.append(F.grid_sample(p[:, None], where, align_corners=False)[:, 0])
    return torch.cat(parts)
