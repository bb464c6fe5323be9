"""Confusion counts and mean intersection over union, exact on any number of processes."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from common import plots
from common.transforms import normalize


def confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) class indices and (H, W) labels -> (K, K) int64 counts on the CPU; rows are labels,
    columns predictions.

    Pixels whose label is not a class (255) are not counted."""
    # labels out of range share one extra row, which is cut off: no masking of the pixels, one pass
    rows = label.to(torch.int64).clamp(max=num_classes)
    index, bins = (
        (rows * num_classes + prediction.to(torch.int64)).flatten(),
        (num_classes + 1) * num_classes,
    )
    if index.device.type == "cpu":  # numpy counts ten times faster than torch here
        counts = torch.from_numpy(np.bincount(index.numpy(), minlength=bins))
    else:
        counts = torch.bincount(index, minlength=bins).cpu()
    return counts.view(num_classes + 1, num_classes)[:num_classes]


@torch.no_grad()
# many sizes: no time to try algorithms for each
@torch.backends.cudnn.flags(enabled=True, benchmark=False)
def score(
    networks: dict[str, nn.Module],
    logits_of: Callable,
    images: Iterable,
    view: Callable,
    num_classes: int,
    world,
    previews: int = 6,
) -> tuple[dict[str, Tensor], list]:
    """Confusion counts (K, K) of each network over all processes' `images` (index, image, label),
    and preview rows.

    `view(image, label)` -> what is scored of it (image, label, valid or None); `logits_of(net, x)`
    maps a normalised (1, 3, H, W) to logits (1, K, H, W). Networks are scored in eval mode and left
    in the mode they came in."""
    counts = {name: torch.zeros(num_classes, num_classes, dtype=torch.int64) for name in networks}
    rows, modes = [], [(net, net.training) for net in networks.values()]
    for _, image, label in images:
        image, label, valid = view(image, label)
        x = normalize(
            image[None].to(world.device), None if valid is None else valid[None].to(world.device)
        )
        row = [image.permute(1, 2, 0).numpy(), plots.colour(label)] if len(rows) < previews else []
        for name, net in networks.items():
            prediction = logits_of(net.eval(), x).argmax(1)[0]
            counts[name] += confusion(prediction, label.to(prediction.device), num_classes)
            row += [plots.colour(prediction)] if len(rows) < previews else []
        rows += [row] if len(rows) < previews else []
    for net, training in modes:
        net.train(training)
    return {name: world.sum(c) for name, c in counts.items()}, rows


def iou(counts: Tensor) -> Tensor:
    """(K, K) counts -> (K,) intersection over union in percent; NaN for a class in neither labels
    nor predictions."""
    counts = counts.double()
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit
    return 100 * hit / torch.where(union > 0, union, torch.nan)


def miou(counts: Tensor) -> float:
    """The mean IoU in percent over the classes that occur in labels or predictions; NaN when none
    does."""
    return iou(counts).nanmean().item()


def iou_record(counts: Tensor, classes: list[str], step: int) -> dict:
    """What results.json holds of a confusion matrix: `step`, `miou`, `iou` (class -> percent, None
    when absent)."""
    values = iou(counts).tolist()
    return {
        "step": step,
        "miou": round(miou(counts), 4),
        "iou": {
            name: None if value != value else round(value, 4)
            for name, value in zip(classes, values, strict=True)
        },
    }


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module) -> float:
    """Relative distance |a - b| / |b| of two networks' parameters."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    apart = torch.stack(torch._foreach_norm([x - y for x, y in pairs])).norm()
    return (apart / torch.stack(torch._foreach_norm([y for _, y in pairs])).norm()).item()
