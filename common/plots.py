"""Pictures for people: palettes, overlays, strips of predictions, curves. Matplotlib is imported
only for curves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data.read import pictures, readable


def palette() -> np.ndarray:
    """(256, 3) uint8: PASCAL VOC's colour map (the bits of an index spread over red, green and
    blue)."""
    colours, index = np.zeros((256, 3), np.int64), np.arange(256)
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
    picture, label = image.permute(1, 2, 0).cpu().numpy().astype(np.float32), label.cpu()
    clear = (label == 0).numpy()[..., None] & (not classes or classes[0] == "background")
    painted = np.where(clear, picture, (1 - alpha) * picture + alpha * colour(label))
    edge = torch.zeros_like(label, dtype=torch.bool)
    edge[1:] |= label[1:] != label[:-1]
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    painted[edge.numpy()] = 255
    painted = painted.round().astype(np.uint8)
    shown = [
        i
        for i in torch.bincount(label.flatten(), minlength=256)[: len(classes)]
        .argsort(descending=True)
        .tolist()
        if (label == i).any() and not (i == 0 and classes[0] == "background")
    ]
    return np.concatenate([painted, legend(shown, classes, painted.shape[1])]) if shown else painted


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
    scaled = [
        [
            Image.fromarray(p).resize(
                [max(1, round(n * s)) for n in p.shape[1::-1]],
                Image.Resampling.NEAREST if s > 1 else Image.Resampling.BILINEAR,
            )
            for p in row
            if (s := min(height / p.shape[0], 4 * height / p.shape[1]))
        ]
        for row in rows
    ]
    widths = [max(row[i].width for row in scaled) for i in range(len(titles))]
    gap, head = 4, 16
    sheet = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) - 1), head + len(rows) * (height + gap)), "white"
    )
    draw, x = ImageDraw.Draw(sheet), 0
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        draw.text((x + 2, 2), title, fill="black")
        for line, row in enumerate(scaled):
            sheet.paste(row[column], (x, head + line * (height + gap)))
        x += width + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


@torch.no_grad()
def predictions(
    paths: list[str], out: Path, classes: list[str], logits_of: Callable[[Tensor], Tensor], world
) -> None:
    """Index PNGs and overlays of images, or of folders of them, into `out`; `logits_of` maps uint8
    (1, 3, H, W) to logits (1, K, H, W). UserError when there is no image, or the only one cannot be
    read."""
    files = pictures(paths)
    stems = [file.stem for file in files]
    names = [f.stem if stems.count(f.stem) == 1 else f"{f.parent.name}_{f.name}" for f in files]
    out.mkdir(exist_ok=True)
    for i, _, image in readable(files, world):
        label = logits_of(image[None].to(world.device)).argmax(1)[0]
        save_index_png(label, out / f"{names[i]}.png")
        save_picture(overlay(image, label, classes), out / f"{names[i]}_overlay.jpg")
    if world.main:
        print(f"{len(files)} images: {out}/*.png (class indices) and *_overlay.jpg")


def curves(records: list[dict], path: Path, title: str = "") -> None:
    """A panel for each family of keys in the log's records (what stands before an underscore), a
    line for each key."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[str]] = {}
    for key in dict.fromkeys(
        k for r in records for k in r if k not in ("step", "images_per_second")
    ):
        panels.setdefault(key.split("_")[0], []).append(key)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, keys) in zip(axes.flat, panels.items(), strict=False):
        for k in keys:
            points = [(r["step"], r[k]) for r in records if isinstance(r.get(k), (int, float))]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    label=k,
                    marker="o" if len(points) < 20 else None,
                    markersize=3,
                )
        axis.set(title=name, xlabel="step")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
