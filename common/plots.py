"""Pictures for people, from plain arrays: palettes, overlays, strips of predictions, curves and
diagrams. Matplotlib is imported only where it draws."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def palette() -> np.ndarray:
    """(256, 3) uint8: PASCAL VOC's colour map (the bits of an index spread over red, green and
    blue)."""
    colours = np.zeros((256, 3), np.int64)
    index = np.arange(256)
    for bit in range(7, -1, -1):
        for channel in range(3):
            colours[:, channel] |= (index >> channel & 1) << bit
        index = index >> 3
    return colours.astype(np.uint8)


def colour(label: Tensor) -> np.ndarray:
    """(H, W) class indices -> (H, W, 3) uint8; 255 (ignore) in VOC's cream."""
    return palette()[label.cpu().numpy().astype(np.uint8)]


def overlay(
    image: Tensor, label: Tensor, classes: list[str] = (), alpha: float = 0.55
) -> np.ndarray:
    """Picture (3, H, W) uint8 with its label map laid over it, a thin line where the class changes,
    and a legend when `classes` names them -> (H', W, 3) uint8. A first class "background" stays
    clear."""
    picture = image.permute(1, 2, 0).cpu().numpy().astype(np.float32)
    label = label.cpu()
    has_background = not classes or classes[0] == "background"
    clear = (label == 0).numpy()[..., None] & has_background
    painted = np.where(clear, picture, (1 - alpha) * picture + alpha * colour(label))
    edge = torch.zeros_like(label, dtype=torch.bool)
    edge[1:] |= label[1:] != label[:-1]
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    painted[edge.numpy()] = 255
    painted = painted.round().astype(np.uint8)
    pixels = torch.bincount(label.flatten(), minlength=256)[: len(classes)]
    named = [i for i in pixels.argsort(descending=True).tolist() if pixels[i] > 0]
    if classes and classes[0] == "background":
        named = [i for i in named if i != 0]
    if not named:
        return painted
    return np.concatenate([painted, legend(named, classes, painted.shape[1])])


def legend(shown: list[int], classes: list[str], width: int) -> np.ndarray:
    """A white strip (h, width, 3) uint8 of colour patches with their class names, as many lines as
    they need."""
    places, x, y = [], 4, 3
    for index in shown:
        need = 16 + 7 * len(classes[index]) + 10
        if x + need > width and x > 4:
            x, y = 4, y + 14
        places.append((index, x, y))
        x += need
    bar = Image.new("RGB", (width, y + 15), "white")
    draw = ImageDraw.Draw(bar)
    for index, x, y in places:
        draw.rectangle((x, y + 1, x + 10, y + 10), fill=tuple(int(v) for v in palette()[index]))
        draw.text((x + 14, y), classes[index], fill="black")
    return np.array(bar)


def save_picture(picture: np.ndarray, path: Path) -> None:
    """(H, W, 3) uint8 as JPEG or PNG, by the name."""
    Image.fromarray(picture).save(path, quality=92)


def save_index_png(label: Tensor, path: Path) -> None:
    """(H, W) class indices as a palette PNG: the pixel values are the indices, viewers show
    colours."""
    file = Image.fromarray(label.cpu().numpy().astype(np.uint8), mode="P")
    file.putpalette(palette().flatten().tolist())
    file.save(path)


def strip(rows: list[list[np.ndarray]], titles: list[str], path: Path, height: int = 144) -> None:
    """A sheet of pictures (H, W, 3) uint8: one row each, one titled column each."""
    scaled = [[fitted(picture, height) for picture in row] for row in rows]
    widths = [max(row[column].width for row in scaled) for column in range(len(titles))]
    gap, head = 4, 16
    total_width = sum(widths) + gap * (len(widths) - 1)
    sheet = Image.new("RGB", (total_width, head + len(rows) * (height + gap)), "white")
    canvas = ImageDraw.Draw(sheet)
    x = 0
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        canvas.text((x + 2, 2), title, fill="black")
        for line, row in enumerate(scaled):
            sheet.paste(row[column], (x, head + line * (height + gap)))
        x += width + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def fitted(picture: np.ndarray, height: int) -> Image.Image:
    """A picture (H, W, 3) uint8 in this height, but no wider than four times of it."""
    scale = min(height / picture.shape[0], 4 * height / picture.shape[1])
    size = [max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0])]
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    return Image.fromarray(picture).resize(size, way)


# ------------------------------------------------------------------------------------------ figures
def pyplot():
    """Matplotlib, for files and not for windows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def curves(records: list[dict], path: Path, title: str = "") -> None:
    """A panel for each family of keys in the log's records (what stands before an underscore), a
    line for each key. Of a log that has lost its records nothing is drawn."""
    plt = pyplot()
    panels: dict[str, list[str]] = {}
    for record in records:
        for key in record:
            keys = panels.setdefault(key.split("_")[0], [])
            if key not in keys:
                keys.append(key)
    panels.pop("step", None)
    panels.pop("images", None)  # images_per_second
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, keys) in zip(axes.flat, panels.items(), strict=False):
        for key in keys:
            with_key = [r for r in records if "step" in r and isinstance(r.get(key), (int, float))]
            if with_key:
                steps = [record["step"] for record in with_key]
                values = [record[key] for record in with_key]
                marker = "o" if len(with_key) < 20 else None
                axis.plot(steps, values, label=key, marker=marker, markersize=3)
        axis.set(title=name, xlabel="step")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


class GroupStyle(NamedTuple):
    """How a group of classes is called and drawn."""

    word: str
    colour: str


GROUPS = {
    "f": GroupStyle("frequent", "#009e73"),
    "c": GroupStyle("common", "#0072b2"),
    "r": GroupStyle("rare", "#d55e00"),
    None: GroupStyle("classes", "#666666"),
}  # rare ones come later, on top of the others, which are many


def diagram(records: dict[str, dict], path: Path) -> None:
    """Reliability diagrams of what `metrics.reliability` gives, a panel each, titled by their keys:
    bars reach up to the accuracy of a bin, hatched ones from there to its mean confidence; below,
    the number of samples."""
    plt = pyplot()
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
        number_of_bins = len(record["bins"])
        draw_gaps(top, rows, 0.94 / number_of_bins)
        error = "no ECE" if record["ece"] is None else f"ECE {record['ece']:.3f}"
        top.set_title(f"{name}\n{error}, {record['n']:,} samples", fontsize=10)
        top.set(xlim=(0, 1), ylim=(0, 1))
        draw_sample_counts(below, rows, number_of_bins)
        for axis in (top, below):
            axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("share of right detections", fontsize=9)
    if next(iter(records.values()))["n"]:
        axes[0, 0].legend(fontsize=8, loc="upper left")
    axes[1, 0].set_ylabel("samples", fontsize=9)
    save_figure(figure, path)


def draw_gaps(axis, rows: list[dict], width: float) -> None:
    """The upper half of a reliability diagram."""
    places = [(row["low"] + row["high"]) / 2 for row in rows]
    accuracy = [row["acc"] for row in rows]
    too_sure = [max(row["conf"] - row["acc"], 0) for row in rows]
    too_unsure = [min(row["conf"] - row["acc"], 0) for row in rows]
    hatched = {"bottom": accuracy, "hatch": "///", "linewidth": 0.6}
    axis.bar(places, accuracy, width, color="#0072b2", label="accuracy")
    axis.bar(
        places, too_sure, width, color="#f4cdb2", edgecolor="#d55e00", label="too sure", **hatched
    )
    axis.bar(
        places, too_unsure, width, color="#0072b2", edgecolor="white", label="too unsure", **hatched
    )
    axis.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)


def draw_sample_counts(axis, rows: list[dict], number_of_bins: int) -> None:
    """The lower half of a reliability diagram."""
    places = [(row["low"] + row["high"]) / 2 for row in rows]
    counts = [row["n"] for row in rows]
    axis.bar(places, counts, 0.94 / number_of_bins, color="#888888")
    upright = number_of_bins > 10  # there is no room for numbers side by side
    axis.set_ylim(0, (1.6 if upright else 1.3) * max(counts, default=1))
    for place, count in zip(places, counts, strict=True):
        text = f"{count:,}" if count < 10000 else f"{count / 1000:,.0f}k"
        axis.text(
            place,
            count,
            f" {text} ",
            ha="center",
            va="bottom",
            fontsize=6,
            rotation=90 if upright else 0,
        )
    axis.set_xlabel("confidence", fontsize=9)


def scatter(
    before: dict[str, float | None],
    after: dict[str, float | None],
    groups: dict[str, str],
    counts: dict[str, int],
    path: Path,
    labels: tuple[str, str] = ("teacher", "student"),
) -> None:
    """AP of each class (name -> percent, or None) over its number of labeled objects, by its group
    (name -> r, c or f): hollow by one network, filled by another. The legend has the mean gain of
    each group."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    names = [name for name in before if before[name] is not None and after.get(name) is not None]
    for group, style in GROUPS.items():
        of_group = [name for name in names if groups.get(name) == group]
        if not of_group:
            continue
        x = np.array([max(counts[name], 0.5) for name in of_group])
        old = np.array([before[name] for name in of_group])
        new = np.array([after[name] for name in of_group])
        legend_text = f"{len(of_group)} {style.word}, mean gain {(new - old).mean():+.1f}"
        axis.vlines(x, old, new, color=style.colour, alpha=0.4, linewidth=1, zorder=1)
        axis.scatter(
            x,
            old,
            s=14,
            facecolors="none",
            edgecolors=style.colour,
            linewidths=0.8,
            zorder=2,
            label="_",
        )
        axis.scatter(x, new, s=14, color=style.colour, linewidths=0.8, zorder=3, label=legend_text)
    axis.set(xscale="log", ylim=(-2, 102))
    axis.set_xlabel(
        f"labeled objects of a class (hollow: {labels[0]}, filled: {labels[1]})", fontsize=9
    )
    axis.set_ylabel("AP of a class", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if names:
        axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_objects(
    image: Tensor, labels: Tensor, scores: Tensor, masks: Tensor, classes: list[str] | None = None
) -> np.ndarray:
    """Image (3, H, W) uint8 with the objects that score 0.5 or more on it, the best in front ->
    (H', W, 3) uint8. With names of `classes`, each in a colour of its own, and a legend; else in
    the colour of its class."""
    ascending = scores.argsort().tolist()
    shown = [i for i in ascending if scores[i] >= 0.5][-250:]
    index = torch.zeros(image.shape[-2:], dtype=torch.uint8)
    for place, i in enumerate(shown, start=1):
        index[masks[i]] = place if classes else 1 + int(labels[i]) % 250
    names = []
    if classes:
        names = ["background", *(f"{classes[labels[i]]} {scores[i]:.2f}" for i in shown)]
    return overlay(image, index, names)


# ------------------------------------------------------------------------------------ search trees
def search_tree(
    parents: list[int | None],
    depths: list[int],
    values: list[float],
    fills: list[str],
    best: list[bool],
    path: Path,
    title: str,
) -> None:
    """A tree that grows to the right. Of each node: the index of its parent (None at the root), its
    depth, the number that stands at it, its colour, and whether it is a best one; the ways to those
    are red. Leaves stand below each other in the order of the nodes."""
    plt = pyplot()
    count = len(parents)
    leaves = [i for i in range(count) if i not in parents]
    row = {leaf: -float(place) for place, leaf in enumerate(leaves)}
    for i in sorted(range(count), key=lambda i: -depths[i]):
        children = [row[child] for child in range(count) if parents[child] == i]
        if children:  # a parent stands in the middle of its children
            row[i] = sum(children) / len(children)
    on_way: set[int | None] = set()
    for i in range(count):
        place = i if best[i] else None
        while place is not None:
            on_way.add(place)
            place = parents[place]
    figure, axis = plt.subplots(figsize=(2 + 1.5 * max(depths), 1.5 + 0.45 * len(leaves)))
    for i, parent in enumerate(parents):
        if parent is not None:
            red = i in on_way
            axis.plot(
                [depths[parent], depths[i]],
                [row[parent], row[i]],
                zorder=1,
                color="tab:red" if red else "lightgray",
                linewidth=2.5 if red else 1,
            )
        ring = 2.5 if best[i] else 1
        axis.scatter(
            depths[i], row[i], s=130, color=fills[i], edgecolor="black", zorder=2, linewidth=ring
        )
        axis.annotate(
            f"{values[i]:.1f}",
            (depths[i], row[i]),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("stage")
    axis.set_xticks(range(max(depths) + 1))
    axis.set_yticks([])
    axis.margins(0.08, 0.15)
    save_figure(figure, path)


def curves_by_stage(
    curves: dict[str, dict[str, list[list[float]]]],
    histograms: dict[str, dict[str, np.ndarray]],
    path: Path,
) -> None:
    """A panel for each title in `curves`: for each name some lines of one colour, whose points are
    the values at stages 0, 1, 2, ...; then a panel for each title in `histograms`: for each name
    the counts of equal bins of [0, 1]."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(curves) + len(histograms), figsize=(14, 4))
    for axis, (title, lines_of) in zip(axes, curves.items(), strict=False):
        for number, (name, lines) in enumerate(lines_of.items()):
            for i, line in enumerate(lines):
                label = name if i == 0 else None
                axis.plot(range(len(line)), line, color=f"C{number}", marker=".", label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("stage")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis, (title, rows) in zip(axes[len(curves) :], histograms.items(), strict=True):
        for name, row in rows.items():
            edges = np.linspace(0, 1, row.size + 1)
            axis.stairs(row / max(row.sum(), 1), edges, fill=True, alpha=0.5, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("confidence")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save_figure(figure, path)
