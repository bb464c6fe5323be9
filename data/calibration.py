"""How far confidences are from the share of right detections, in numbers and pictures.

Samples come from data.lvis_ap.samples, or are any three arrays: class, confidence, and whether it
was right. Errors lie in 0..1; those of a class with a sign (CCECE) are better_pseudo_labels.py's
own. Matplotlib is imported for pictures."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.runs import write_text
from data.lvis_ap import Samples

GROUPS = {
    "f": ("frequent", "#009e73"),
    "c": ("common", "#0072b2"),
    "r": ("rare", "#d55e00"),
    None: ("classes", "#666666"),
}  # r on top of the others, which are many


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


# ----------------------------------------------------------------------------------------- pictures
def diagram(records: dict[str, dict], path: Path) -> None:
    """Reliability diagrams (the paper's Fig. 3) of what `reliability` gives, a panel each, titled
    by their keys: bars reach up to the accuracy of a bin, hatched ones from there to its mean
    confidence; below, the number of samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2,
        len(records),
        figsize=(3.6 * len(records), 4.6),
        sharex=True,
        squeeze=False,
        height_ratios=(3, 1),
    )
    for (top, below), (name, record) in zip(axes.T, records.items(), strict=True):
        rows = [row for row in record["bins"] if row["n"]]
        places = [(row["low"] + row["high"]) / 2 for row in rows]
        width = 0.94 / len(record["bins"])
        gaps, right = [row["conf"] - row["acc"] for row in rows], [row["acc"] for row in rows]
        top.bar(places, right, width, color="#0072b2", label="accuracy")
        for word, sign, light, dark in (
            ("too sure", 1, "#f4cdb2", "#d55e00"),
            ("too unsure", -1, "#0072b2", "white"),
        ):
            top.bar(
                places,
                [sign * max(sign * gap, 0) for gap in gaps],
                width,
                bottom=right,
                color=light,
                edgecolor=dark,
                hatch="///",
                linewidth=0.6,
                label=word,
            )
        top.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
        error = "no ECE" if record["ece"] is None else f"ECE {record['ece']:.3f}"
        top.set_title(f"{name}\n{error}, {record['n']:,} samples", fontsize=10)
        top.set(xlim=(0, 1), ylim=(0, 1))
        below.bar(places, [row["n"] for row in rows], width, color="#888888")
        many = len(record["bins"]) > 10
        below.set_ylim(0, (1.6 if many else 1.3) * max((row["n"] for row in rows), default=1))
        for place, row in zip(places, rows, strict=True):
            text = f"{row['n']:,}" if row["n"] < 10000 else f"{row['n'] / 1000:,.0f}k"
            below.text(
                place,
                row["n"],
                f" {text} ",
                ha="center",
                va="bottom",
                fontsize=6,
                rotation=90 * many,
            )
        below.set_xlabel("confidence", fontsize=9)
        for axis in (top, below):
            axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("share of right detections", fontsize=9)
    if next(iter(records.values()))["n"]:
        axes[0, 0].legend(fontsize=8, loc="upper left")
    axes[1, 0].set_ylabel("samples", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scatter(
    before: dict[str, float | None],
    after: dict[str, float | None],
    groups: dict[str, str],
    counts: dict[str, int],
    path: Path,
    labels: tuple[str, str] = ("teacher", "student"),
) -> None:
    """AP of each class (name -> percent, or None) over its number of labeled objects (the paper's
    Fig. 4), by its group (name -> r, c or f): hollow by one network, filled by another. The legend
    has the mean gain of each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    names = [name for name in before if before[name] is not None and after.get(name) is not None]
    for group, (word, colour) in GROUPS.items():
        points = np.array(
            [(max(counts[n], 0.5), before[n], after[n]) for n in names if groups.get(n) == group]
        )
        if len(points):
            x, old, new = points.T
            axis.vlines(x, old, new, color=colour, alpha=0.4, linewidth=1, zorder=1)
            axis.scatter(
                x,
                old,
                s=14,
                facecolors="none",
                edgecolors=colour,
                linewidths=0.8,
                zorder=2,
                label="_",
            )
            axis.scatter(
                x,
                new,
                s=14,
                color=colour,
                linewidths=0.8,
                zorder=3,
                label=f"{len(points)} {word}, mean gain {(new - old).mean():+.1f}",
            )
    axis.set(xscale="log", ylim=(-2, 102))
    axis.set_xlabel(
        f"labeled objects of a class (hollow: {labels[0]}, filled: {labels[1]})", fontsize=9
    )
    axis.set_ylabel("AP of a class", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if names:
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def search(run: Callable[..., dict], values: dict[str, tuple], out: Path, main: bool) -> dict:
    """Runs every combination of `values`, run(folder, **combination) -> a record of results.json,
    prints a table and writes out/grid.json: `runs` and, by AP, the `best`, which is returned."""
    rows = []
    for chosen in itertools.product(*values.values()):
        here = dict(zip(values, chosen, strict=True))
        record = run(out / "_".join(f"{name}-{value:g}" for name, value in here.items()), **here)[
            "last"
        ]
        rows.append({**here, **{k: record[k] for k in ("ap", "apr", "ece")}})
        if main:
            print(
                *(f"{k} {'-' if v is None else f'{v:.3g}'}" for k, v in rows[-1].items()),
                flush=True,
            )
    best = max(rows, key=lambda row: row["ap"])
    if main:
        write_text(out / "grid.json", json.dumps({"runs": rows, "best": best}, indent=1))
    return best
