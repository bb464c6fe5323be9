"""common/metrics.py: the calibration error against values by hand and a plain loop, and its
pictures in common/plots.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import metrics, plots, runs
from common.judge import Samples
from common.metrics import ece, reliability


def random_samples(seed: int, n: int = 400, steps: int = 0) -> Samples:
    """Of five classes; confidences are multiples of 1 / steps, if that is given, and the lower ones
    are too low."""
    g = np.random.default_rng(seed)
    conf = g.random(n) if steps == 0 else g.integers(0, steps + 1, n) / steps
    return Samples(g.integers(0, 5, n), conf, g.random(n) < np.sqrt(conf))


def by_loop(conf: np.ndarray, right: np.ndarray, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [
            (c, r)
            for c, r in zip(conf.tolist(), right.tolist(), strict=True)
            if (c * bins >= b or b == 0) and (c * bins < b + 1 or b == bins - 1)
        ]
        if inside:
            accuracy = sum(r for _, r in inside) / len(inside)
            confidence = sum(c for c, _ in inside) / len(inside)
            total += len(inside) / len(conf) * abs(accuracy - confidence)
    return total


# ------------------------------------------------------------------------------------------ numbers
def test_ece_by_hand():
    """Two in [0.2, 0.3), one of them right: |0.5 - 0.25|; three in [0.9, 1], all right: |1 -
    0.95|."""
    conf, right = (
        np.array([0.2, 0.3 - 1e-9, 0.9, 1.0, 0.95]),
        np.array([True, False, True, True, True]),
    )
    assert ece(conf, right) == pytest.approx(2 / 5 * 0.25 + 3 / 5 * 0.05)
    # overconfident and underconfident cancel
    assert ece(conf, right, 1) == pytest.approx(abs(0.8 - conf.mean()))
    assert ece(conf.tolist(), right.tolist()) == ece(conf, right)
    assert ece([0.6], [False]) == pytest.approx(0.6) and ece([0.6], [True]) == pytest.approx(0.4)
    assert ece([0.25] * 4, [True, False, False, False]) == 0
    assert ece([], []) is None


@pytest.mark.parametrize("bins", [1, 2, 5, 10, 15])
@pytest.mark.parametrize("steps", [0, 10, 30])
def test_ece_against_a_loop(bins, steps):
    for seed in range(3):
        labels, conf, right = random_samples(seed, steps=steps)
        assert ece(conf, right, bins) == pytest.approx(by_loop(conf, right, bins), abs=1e-12)
        order = np.random.default_rng(seed).permutation(len(conf))
        assert ece(conf[order], right[order], bins) == pytest.approx(ece(conf, right, bins))
    assert 0.05 < ece(conf, right, bins) < 0.3
    assert ece(conf, right, bins) >= ece(conf, right, 1) - 1e-12


def test_bins_add_up_to_the_signed_error():
    """Recipe 3.1: sum_b n_b / N (acc_b - conf_b) is mean accuracy - mean confidence, for any number
    of bins."""
    found = random_samples(0)
    for bins in (5, 10, 15, 100):
        rows = reliability(found, bins)["bins"]
        total = sum(row["n"] * (row["acc"] - row["conf"]) for row in rows if row["n"]) / len(
            found.conf
        )
        assert total == pytest.approx(found.right.mean() - found.conf.mean())


def test_wrong_samples_are_refused():
    for conf, right, bins in (
        ([1.1], [True], 10),
        ([-0.1], [True], 10),
        ([float("nan")], [True], 10),
        ([0.5], [True, False], 10),
        ([[0.5]], [[True]], 10),
        ([0.5], [True], 0),
    ):
        with pytest.raises(AssertionError):
            ece(conf, right, bins)


def test_reliability_says_it_for_groups_of_classes():
    found, groups = random_samples(1), ["r", "c", "c", "f", "r"]
    record = reliability(found, 4, groups)
    assert json.loads(json.dumps(record)) == record and list(record) == [
        "ece",
        "n",
        "bins",
        "r",
        "c",
        "f",
    ]
    assert record["ece"] == ece(found.conf, found.right, 4) and record["n"] == 400
    for group in "rcf":
        mine = np.array([groups[k] == group for k in found.labels])
        part = record[group]
        assert part["n"] == mine.sum() > 0 and part["ece"] == ece(
            found.conf[mine], found.right[mine], 4
        )
    rows = record["bins"]
    assert [(row["low"], row["high"]) for row in rows] == [
        (0, 0.25),
        (0.25, 0.5),
        (0.5, 0.75),
        (0.75, 1),
    ]
    for row in rows:
        inside = (found.conf >= row["low"]) & (found.conf < row["high"])
        assert row["n"] == inside.sum() and row["conf"] == pytest.approx(found.conf[inside].mean())
        assert row["acc"] == pytest.approx(found.right[inside].mean())
        assert row["n"] == sum(record[group]["bins"][rows.index(row)]["n"] for group in "rcf")
    assert list(reliability(found, 4)) == ["ece", "n", "bins"]
    assert len(reliability(found)["bins"]) == 10


def test_groups_and_bins_without_samples():
    nothing = {
        "ece": None,
        "n": 0,
        "bins": [
            {"low": b / 2, "high": (b + 1) / 2, "n": 0, "conf": None, "acc": None} for b in range(2)
        ],
    }
    empty = Samples(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))
    assert reliability(empty, 2, ["r"]) == {**nothing, "r": nothing, "c": nothing, "f": nothing}
    record = reliability(Samples(np.array([1]), np.array([0.75]), np.array([True])), 2, ["r", "f"])
    assert record["r"] == record["c"] == nothing and record["f"]["ece"] == record["ece"] == 0.25
    assert record["bins"] == [
        nothing["bins"][0],
        {"low": 0.5, "high": 1, "n": 1, "conf": 0.75, "acc": 1},
    ]


# ----------------------------------------------------------------------------------------- pictures
def shown(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.array(file.convert("RGB")).astype(int)


def share(picture: np.ndarray, colour: str) -> float:
    """The share of pixels with a colour like this."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(picture - wanted).max(axis=-1) < 12).mean())


def test_diagrams_show_gaps_on_the_right_side(tmp_path):
    """Too sure: hatched orange above the bars; too unsure: their upper part hatched; no gap where
    there is none."""
    g = np.random.default_rng(0)
    conf, zeros = g.random(2000), np.zeros(2000, np.int64)
    panels = {}
    for name, chance in (("sure", conf**3), ("unsure", conf**0.3)):
        panels[name] = reliability(Samples(zeros, conf, g.random(2000) < chance))
    exact = np.repeat((np.arange(10) + 0.5) / 10, 20)  # of 20 in the b-th bin 2 b + 1 are right
    panels["exact"] = reliability(
        Samples(
            zeros[:200], exact, np.tile(np.arange(20), 10) < np.repeat(2 * np.arange(10) + 1, 20)
        )
    )
    assert panels["exact"]["ece"] == pytest.approx(0, abs=1e-9)
    pixels = {}
    for name, record in panels.items():
        plots.diagram({name: record}, tmp_path / f"{name}.png")
        picture = shown(tmp_path / f"{name}.png")
        pixels[name] = share(picture, "#f4cdb2"), share(picture, "#0072b2")
    orange, blue = np.array(list(pixels.values())).T
    assert orange[0] > 0.05 > 10 * orange[1] and orange[2] < 0.01  # the legend alone
    assert blue[1] > blue[2] > blue[0] > 0.01  # bars reach up to the accuracy, hatched or not
    plots.diagram(panels, tmp_path / "all.png")
    assert shown(tmp_path / "all.png").shape[1] > 2.5 * picture.shape[1]


def test_diagrams_of_few_and_of_no_samples(tmp_path):
    empty = Samples(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))
    found = random_samples(0, 7)
    plots.diagram(
        {
            "none": reliability(empty),
            "few": reliability(found, 20),
            "rare": reliability(found, 10, list("rrcff"))["r"],
        },
        tmp_path / "few.png",
    )
    assert shown(tmp_path / "few.png").std() > 10


def test_titles_say_name_ece_and_number(tmp_path, monkeypatch):
    titles = []
    from matplotlib.axes import Axes

    title = Axes.set_title
    monkeypatch.setattr(
        Axes,
        "set_title",
        lambda self, text, **more: titles.append(text) or title(self, text, **more),
    )
    record = reliability(
        Samples(np.zeros(1500, np.int64), np.full(1500, 0.75), np.arange(1500) % 2 == 0)
    )
    empty = reliability(Samples(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool)))
    plots.diagram({"teacher": record, "rare": empty}, tmp_path / "x.png")
    assert titles == ["teacher\nECE 0.250, 1,500 samples", "rare\nno ECE, 0 samples"]


def test_scatter_has_counts_groups_and_leaves_out_classes_without_ap(tmp_path, monkeypatch):
    drawn = []
    from matplotlib.axes import Axes

    scatter = Axes.scatter
    monkeypatch.setattr(
        Axes,
        "scatter",
        lambda self, x, y, **more: (
            drawn.append((sorted(zip(x, y, strict=True)), more["label"]))
            or scatter(self, x, y, **more)
        ),
    )
    before = {"a": 10.0, "b": 20.0, "c": None, "d": 40.0, "e": 50.0, "g": 60.0}
    after = {"a": 30.0, "b": 25.0, "c": 30.0, "d": None, "e": 40.0, "f": 1.0}
    groups = dict(zip("abcde", "rrccf", strict=True))
    counts = dict(zip("abcdefg", (0, 3, 50, 60, 700, 1, 1), strict=True))
    plots.scatter(before, after, groups, counts, tmp_path / "s.png", ("supervised", "ours"))
    assert drawn == [
        ([(700, 50)], "_"),
        ([(700, 40)], "1 frequent, mean gain -10.0"),
        ([(0.5, 10), (3, 20)], "_"),
        ([(0.5, 30), (3, 25)], "2 rare, mean gain +12.5"),
    ]
    drawn.clear()
    plots.scatter(before, after, {}, counts, tmp_path / "s.png")
    assert [label for _, label in drawn] == ["_", "3 classes, mean gain +5.0"]
    plots.scatter({"a": None}, {"a": None}, {}, counts, tmp_path / "none.png")
    assert shown(tmp_path / "none.png").std() > 5


def test_a_mean_over_some_of_the_classes_is_said_to_be_one():
    """Labels of 0 and 255 alone: of two classes only the background is ever scored."""
    counts = torch.tensor([[40, 0], [0, 0]])
    score = metrics.iou_record(counts, ["background", "thing"], 0)
    assert score["miou"] == 100
    assert runs.classes_note(score) == ", mean over 1 of 2 classes"
    whole = metrics.iou_record(counts + 1, ["background", "thing"], 0)
    assert runs.classes_note(whole) == "" == runs.classes_note({"ap": 30.0})
