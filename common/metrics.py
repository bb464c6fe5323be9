"""Confusion counts and mean intersection over union, exact on any number of processes."""

import numpy as np
import torch
from torch import Tensor, nn


def confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) class indices and (H, W) labels -> (K, K) int64 counts on the CPU; rows are labels, columns predictions.

    Pixels whose label is not a class (255) are not counted."""
    # labels out of range share one extra row, which is cut off: no masking of the pixels, one pass
    rows = label.to(torch.int64).clamp(max=num_classes)
    index = (rows * num_classes + prediction.to(torch.int64)).flatten()
    bins = (num_classes + 1) * num_classes
    if index.device.type == "cpu":                                   # numpy counts ten times faster than torch here
        counts = torch.from_numpy(np.bincount(index.numpy(), minlength=bins))
    else:
        counts = torch.bincount(index, minlength=bins).cpu()
    return counts.view(num_classes + 1, num_classes)[:num_classes]


def iou(counts: Tensor) -> Tensor:
    """(K, K) counts -> (K,) intersection over union in percent; NaN for a class in neither labels nor predictions."""
    counts = counts.double()
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit
    return 100 * hit / torch.where(union > 0, union, torch.nan)


def miou(counts: Tensor) -> float:
    """The mean IoU in percent over the classes that occur in labels or predictions; NaN when none does."""
    return iou(counts).nanmean().item()


def iou_record(counts: Tensor, classes: list[str], step: int) -> dict:
    """What results.json holds of a confusion matrix: `step`, `miou`, `iou` (class name -> percent, None when absent)."""
    values = iou(counts).tolist()
    return {"step": step, "miou": round(miou(counts), 4),
            "iou": {name: None if value != value else round(value, 4)
                    for name, value in zip(classes, values, strict=True)}}


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module) -> float:
    """Relative distance |a - b| / |b| of two networks' parameters."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    apart = torch.stack(torch._foreach_norm([x - y for x, y in pairs])).norm()
    return (apart / torch.stack(torch._foreach_norm([y for _, y in pairs])).norm()).item()
