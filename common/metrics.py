"""Confusion counts and mean intersection over union, exact on any number of processes."""

import numpy as np
import torch
from torch import Tensor, nn

from common.lvis_ap import Samples


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


def table(conf: np.ndarray, right: np.ndarray, bins: int = 10) -> list[dict]:
    """The `bins` of equal width on [0, 1] of samples (N,), each: low, high, the number n of samples
    with low <= confidence < high (in the last also 1), their mean confidence conf and share of
    right ones acc, or None."""
    conf, right = np.asarray(conf, np.float64), np.asarray(right, bool)
    assert conf.shape == right.shape and conf.ndim == 1 and bins > 0, (
        conf.shape,
        right.shape,
        bins,
    )
    assert ((conf >= 0) & (conf <= 1)).all(), "a confidence is not in 0..1"
    place = np.minimum((conf * bins).astype(np.int64), bins - 1)
    count, sums, hits = (
        np.bincount(place, weights, bins).tolist() for weights in (None, conf, right)
    )
    return [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "n": int(n),
            "conf": s / n if n else None,
            "acc": h / n if n else None,
        }
        for b, (n, s, h) in enumerate(zip(count, sums, hits, strict=True))
    ]


def error_of(rows: list[dict]) -> float | None:
    """ECE of what `table` gives: the mean gap between confidence and accuracy, each bin by its
    share of samples."""
    number = sum(row["n"] for row in rows)
    return (
        sum(row["n"] * abs(row["acc"] - row["conf"]) for row in rows if row["n"]) / number
        if number
        else None
    )


def ece(conf: np.ndarray, right: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error (Naeini, Cooper, Hauskrecht, AAAI 2015) of samples (N,): sum_b n_b
    / N |acc_b - conf_b| over bins of equal width. Empty bins count nothing; None without a
    sample."""
    return error_of(table(conf, right, bins))


def reliability(samples: Samples, bins: int = 10, groups: list[str] | None = None) -> dict:
    """ece, n (how many samples) and bins (see `table`) of all samples; and, with `groups`, r, c or
    f of each class by its index, under r, c and f the same of the samples of their classes. Ready
    for a JSON file."""

    def record(conf: np.ndarray, right: np.ndarray) -> dict:
        rows = table(conf, right, bins)
        return {"ece": error_of(rows), "n": len(conf), "bins": rows}

    labels, conf, right = (np.asarray(x) for x in samples)
    found = record(conf, right)
    for group in "rcf" if groups is not None else "":
        mine = np.isin(labels, [k for k, g in enumerate(groups) if g == group])
        found[group] = record(conf[mine], right[mine])
    return found
