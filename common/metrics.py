"""Numbers that papers report, of plain arrays: confusion counts and mean intersection over union,
and the calibration error."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from common.judge import Samples


def confusion(prediction: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(H, W) class indices and (H, W) labels -> (K, K) int64 counts on the CPU; rows are labels,
    columns predictions.

    Pixels whose label is not a class (255) are not counted."""
    # Labels that are no class share one extra row, which is cut off: one pass without a mask.
    rows = label.to(torch.int64).clamp(max=num_classes)
    index = (rows * num_classes + prediction.to(torch.int64)).flatten()
    bins = (num_classes + 1) * num_classes
    if index.device.type == "cpu":  # numpy counts ten times faster than torch here
        counts = torch.from_numpy(np.bincount(index.numpy(), minlength=bins))
    else:
        counts = torch.bincount(index, minlength=bins).cpu()
    return counts.view(num_classes + 1, num_classes)[:num_classes]


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
    return {"step": step, **iou_scores(counts, classes)}


def iou_scores(counts: Tensor, classes: list[str]) -> dict:
    """The `miou` and the `iou` of each class, as in `iou_record`."""
    of_class = {}
    for name, value in zip(classes, iou(counts).tolist(), strict=True):
        of_class[name] = None if math.isnan(value) else round(value, 4)
    return {"miou": round(miou(counts), 4), "iou": of_class}


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module) -> float:
    """Relative distance |a - b| / |b| of two networks' parameters."""
    differences = [x - y for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    apart = torch.stack(torch._foreach_norm(differences)).norm()
    size = torch.stack(torch._foreach_norm(list(b.parameters()))).norm()
    return (apart / size).item()


# -------------------------------------------------------------------------------------- calibration
def table(conf: np.ndarray, right: np.ndarray, bins: int = 10) -> list[dict]:
    """Samples (N,) in `bins` of equal width on [0, 1]. A row of each bin has low and high, the
    number n of samples with low <= confidence < high (in the last bin also 1), their mean
    confidence conf and the share acc of right ones, both None in an empty bin."""
    conf = np.asarray(conf, np.float64)
    right = np.asarray(right, bool)
    assert conf.shape == right.shape, (conf.shape, right.shape)
    assert conf.ndim == 1, conf.shape
    assert bins > 0, bins
    assert ((conf >= 0) & (conf <= 1)).all(), "a confidence is not in 0..1"
    place = np.minimum((conf * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins).tolist()
    sums = np.bincount(place, conf, bins).tolist()
    hits = np.bincount(place, right, bins).tolist()
    rows = []
    for b in range(bins):
        row = {"low": b / bins, "high": (b + 1) / bins, "n": counts[b], "conf": None, "acc": None}
        if counts[b]:
            row["conf"] = sums[b] / counts[b]
            row["acc"] = hits[b] / counts[b]
        rows.append(row)
    return rows


def error_of(rows: list[dict]) -> float | None:
    """The ECE of what `table` gives: the mean gap between confidence and accuracy, each bin by its
    share of the samples. None without a sample."""
    number = sum(row["n"] for row in rows)
    if not number:
        return None
    return sum(row["n"] * abs(row["acc"] - row["conf"]) for row in rows if row["n"]) / number


def ece(conf: np.ndarray, right: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error (Naeini, Cooper, Hauskrecht, AAAI 2015) of samples (N,): sum_b n_b
    / N |acc_b - conf_b| over the bins of equal width that are not empty. None without a sample."""
    return error_of(table(conf, right, bins))


def reliability(samples: Samples, bins: int = 10, groups: list[str] | None = None) -> dict:
    """The `ece` of all samples, their number `n` and their `bins` (see `table`), ready for a JSON
    file. `groups` says r, c or f of each class; with it, the same record of each group's samples
    stands under r, c and f."""

    def record(conf: np.ndarray, right: np.ndarray) -> dict:
        rows = table(conf, right, bins)
        return {"ece": error_of(rows), "n": len(conf), "bins": rows}

    labels, conf, right = map(np.asarray, samples)
    result = record(conf, right)
    if groups is not None:
        for group in "rcf":
            of_group = [label for label, name in enumerate(groups) if name == group]
            in_group = np.isin(labels, of_group)
            result[group] = record(conf[in_group], right[in_group])
    return result
