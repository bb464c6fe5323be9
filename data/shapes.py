"""The embedded data set: drawn scenes in the real on-disk formats, so that everything runs without
a download.

Objects have a class-typical form, pattern and hue. Classes come in look-alike pairs of nearly one
hue, so that form and pattern must tell them apart; patterns fade, forms are cut off by what lies in
front. A few labels show the hues at once and the rest badly; many unlabeled pictures show which
forms and patterns go together.

    make_voc         VOC folders with palette PNGs, train / tune / val      semantic segmentation
    make_cityscapes  leftImg8bit and gtFine with labelIds and instanceIds   for format tests
    make_coco        COCO and LVIS JSON of one long-tailed set              instance segmentation
    make_things      COCO JSON of a few evenly frequent classes             the same, in minutes
    make_tail        LVIS JSON of a few long-tailed classes                 the same, in minutes
    pretrain         a tiny backbone's weights from other drawn classes     what ImageNet is to the papers

    python -m data.shapes [--root datasets/shapes]      draws all of it (it is drawn on first use anyway)

Every picture depends on (variant, part, index) alone. No randomness is taken from or left in global
generators."""

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.errors import UserError

# the embedded classes
FORMS = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "moon",
    "bar",
    "heart",
    "hexagon",
    "ell",
    "drop",
    "arrow",
    "gear",
    "bow",
    "wedge",
)  # pre-training only


PATTERNS = ("plain", "stripes", "checks", "dots", "rings", "noise", "gradient", "mesh")


@dataclass(frozen=True)
class Difficulty:
    """The knobs of one variant. Changing one means re-running the documents that quote its
    numbers."""

    size: int = 64  # pixels a side
    objects: tuple[int, int] = (2, 4)  # drawn per scene, both ends included
    radius: tuple[float, float] = (0.15, 0.28)  # of the side
    hue_noise: float = 0.05  # standard deviation around the class's hue, of a full circle
    grey: float = 0.3  # share of objects that lost their hue
    lying: float = 0.0  # share of objects with a random hue
    pattern: tuple[float, float] = (0.0, 1.0)  # contrast of the class's pattern
    texture: float = 0.10  # amplitude of smooth shading inside an object
    pixel_noise: float = 0.03  # standard deviation of pixel noise, of full range
    clutter: float = 0.25  # contrast of the background


SEMANTIC = Difficulty(objects=(1, 3), radius=(0.22, 0.38), grey=0.0, pattern=(0.2, 1.0))


INSTANCE = Difficulty(
    size=96, objects=(2, 5), radius=(0.10, 0.22), grey=0.2, lying=0.05, clutter=0.2
)


PRETRAIN = Difficulty(objects=(1, 1), radius=(0.22, 0.42), grey=0.3, lying=0.0)


# class -> (form, pattern, hue): three pairs of nearly one hue each
SEMANTIC_CLASSES = {
    "disc": ("circle", "stripes", 0.00),
    "box": ("square", "checks", 0.02),
    "tent": ("triangle", "dots", 0.33),
    "star": ("star", "rings", 0.35),
    "hoop": ("ring", "mesh", 0.67),
    "plus": ("cross", "plain", 0.69),
}


# a few classes, evenly frequent, learned in minutes
FEW = Difficulty(size=96, objects=(2, 4), radius=(0.13, 0.26), grey=0.2, clutter=0.2)


THING_CLASSES = {
    "coin": ("circle", "stripes", 0.13),
    "crate": ("square", "checks", 0.10),
    "star": ("star", "plain", 0.15),
    "tent": ("triangle", "dots", 0.33),
    "wheel": ("ring", "rings", 0.60),
    "plus": ("cross", "mesh", 0.64),
}


# a short long tail in clearer scenes (three networks are trained on it), most frequent first: the
# later half are the
# look-alikes of the first, in another pattern
TAIL = Difficulty(
    size=96, objects=(2, 4), radius=(0.15, 0.28), grey=0.1, clutter=0.15, pattern=(0.4, 1.0)
)


TAIL_CLASSES = {
    "coin": ("circle", "stripes", 0.13),
    "tent": ("triangle", "dots", 0.33),
    "wheel": ("ring", "rings", 0.60),
    "crate": ("square", "checks", 0.08),
    "star": ("star", "plain", 0.17),
    "plus": ("cross", "mesh", 0.95),
    "cookie": ("circle", "dots", 0.13),
    "flag": ("triangle", "stripes", 0.33),
    "wreath": ("ring", "dots", 0.60),
    "quilt": ("square", "mesh", 0.08),
    "medal": ("star", "rings", 0.17),
    "mill": ("cross", "checks", 0.95),
}


# the long tail, most frequent first. Look-alikes differ in pattern (tent, flag) or by a step in hue
# (wheel, buoy) alone
INSTANCE_CLASSES = {
    "coin": ("circle", "stripes", 0.13),
    "tent": ("triangle", "stripes", 0.33),
    "crate": ("square", "mesh", 0.08),
    "flag": ("triangle", "dots", 0.33),
    "wheel": ("ring", "rings", 0.60),
    "plus": ("cross", "checks", 0.00),
    "star": ("star", "plain", 0.15),
    "moon": ("moon", "gradient", 0.16),
    "plank": ("bar", "stripes", 0.07),
    "tile": ("square", "checks", 0.08),
    "buoy": ("ring", "rings", 0.72),
    "lime": ("circle", "stripes", 0.25),
    "lantern": ("star", "plain", 0.03),
    "kite": ("cross", "noise", 0.00),
    "fir": ("triangle", "stripes", 0.45),
    "ruler": ("bar", "checks", 0.07),
    "wreath": ("ring", "dots", 0.60),
    "cookie": ("circle", "dots", 0.13),
    "quilt": ("square", "mesh", 0.20),
    "croissant": ("moon", "stripes", 0.16),
    "melon": ("moon", "gradient", 0.28),
    "medal": ("star", "rings", 0.15),
    "mill": ("cross", "checks", 0.88),
    "pencil": ("bar", "stripes", 0.95),
}


# ------------------------------------------------------------------------------------------ drawing
def signed_distance(form: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rough signed distance to the outline of `form` in a unit frame: negative inside, about 1 =
    one radius."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    ax, ay = np.abs(x), np.abs(y)

    def polygon(n: int, inner: float = 1.0) -> np.ndarray:  # star polygon when inner < 1
        sector = np.pi / n
        a = np.abs((angle + sector) % (2 * sector) - sector)  # 0 at a tip, sector at a notch
        if inner == 1.0:
            return r * np.cos(sector - a) - 0.95 * np.cos(sector)
        tip, notch = 1.0, inner
        px, py = tip, 0.0
        qx, qy = notch * np.cos(sector), notch * np.sin(sector)
        nx, ny = qy - py, px - qx
        length = np.hypot(nx, ny)
        return ((r * np.cos(a) - px) * nx + (r * np.sin(a) - py) * ny) / length

    if form == "circle":
        return r - 0.88
    if form == "square":
        return np.maximum(ax, ay) - 0.78
    if form == "triangle":
        return np.maximum.reduce([-y - 0.5, 0.866 * x + 0.5 * y - 0.5, -0.866 * x + 0.5 * y - 0.5])
    if form == "star":
        return polygon(5, 0.45)
    if form == "ring":
        return np.abs(r - 0.66) - 0.26
    if form == "cross":
        return np.minimum(np.maximum(ax - 0.95, ay - 0.32), np.maximum(ax - 0.32, ay - 0.95))
    if form == "moon":
        return np.maximum(r - 0.95, 0.72 - np.hypot(x - 0.5, y))
    if form == "bar":
        return np.maximum(ax - 1.0, ay - 0.36)
    if form == "heart":
        return np.minimum(
            np.maximum(np.hypot(ax - 0.42, y + 0.3) - 0.48, -1.0),
            np.maximum(ax * 0.8 + y - 0.62, -0.3 - y),
        )
    if form == "hexagon":
        return polygon(6)
    if form == "ell":
        return np.minimum(
            np.maximum(np.abs(x + 0.5) - 0.3, ay - 0.9),
            np.maximum(ax - 0.85, np.abs(y - 0.6) - 0.3),
        )
    if form == "drop":
        return np.minimum(
            np.hypot(x, y - 0.3) - 0.55,
            np.maximum(ax * 1.4 + 0.3 * y - 0.35 + 0.7 * np.abs(y + 0.3), y - 0.3),
        )
    if form == "arrow":
        return np.minimum(
            np.maximum(ax - 0.24, np.abs(y - 0.35) - 0.6),
            np.maximum(ax + (-0.95 - y) * 0.9, y + 0.1),
        )
    if form == "gear":
        return r - 0.8 - 0.14 * np.sign(np.cos(8 * angle))
    if form == "bow":
        return np.maximum(ay - ax * 0.8 - 0.06, ax - 0.95)
    if form == "wedge":
        return np.maximum(r - 0.95, np.abs(angle) - 1.0)
    raise ValueError(form)


def pattern_of(
    name: str, x: np.ndarray, y: np.ndarray, frequency: float, rng: np.random.Generator
) -> np.ndarray:
    """Values in [-1, 1] of a pattern with about `frequency` periods per radius in the object's own
    frame."""
    k, p = np.pi * frequency, rng.uniform(0, 2 * np.pi, 2)
    if name == "stripes":
        return np.sign(np.sin(k * x + p[0]))
    if name == "checks":
        return np.sign(np.sin(k * x + p[0]) * np.sin(k * y + p[1]))
    if name == "dots":
        return np.where(np.sin(k * x + p[0]) + np.sin(k * y + p[1]) > 0.9, 1.0, -0.4)
    if name == "rings":
        return np.sign(np.sin(k * np.hypot(x, y) + p[0]))
    if name == "noise":
        return rng.uniform(-1, 1, x.shape)
    if name == "gradient":
        return np.clip(x, -1, 1)
    if name == "mesh":
        return np.where(np.maximum(np.sin(k * x + p[0]), np.sin(k * y + p[1])) > 0.75, 1.0, -0.4)
    return np.zeros_like(x)


def hsv(h: float, s: float, v: float) -> np.ndarray:
    """Hue, saturation, value in [0, 1] -> RGB in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * (h % 1.0)) % 6
    return v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)


def smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(size, size, 3) smooth random field in about [-1, 1]: a coarse grid, linearly
    interpolated."""
    at = np.linspace(0, cells - 1, size)
    low = np.minimum(at.astype(int), cells - 2)
    weights = np.zeros((size, cells))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), low + 1] = at - low
    return np.einsum(
        "yi,ijc,xj->yxc", weights, rng.uniform(-1, 1, (cells, cells, 3)), weights, optimize=True
    )


def draw(
    rng: np.random.Generator, kinds: list[tuple[str, str, float]], ids: list[int], d: Difficulty
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A scene with one object per entry of `kinds` (form, pattern, hue), later ones in front.

    Returns the picture (S, S, 3) uint8, the instance map (S, S) uint8 (0 background, i the i-th
    object) and `ids`."""
    s = d.size
    base = rng.uniform(0.25, 0.75) + rng.uniform(-0.06, 0.06, 3)
    picture = (
        base
        + d.clutter * smooth(rng, s, int(rng.integers(3, 7))).mean(-1, keepdims=True)
        + 0.25 * d.clutter * smooth(rng, s, 5)
    )
    instances = np.zeros((s, s), np.uint8)
    ys, xs = np.mgrid[0:s, 0:s] + 0.5
    for number, (form, pattern, hue) in enumerate(kinds, start=1):
        radius = rng.uniform(*d.radius) * s
        cx, cy = rng.uniform(0.12 * s, 0.88 * s, 2)
        turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
        dx, dy = (xs - cx) / radius, (ys - cy) / radius
        x = (np.cos(turn) * dx + np.sin(turn) * dy) * stretch
        y = (-np.sin(turn) * dx + np.cos(turn) * dy) / stretch
        cover = np.clip(0.5 - signed_distance(form, x, y) * radius, 0, 1)[..., None]
        coin = rng.random()
        if coin < d.lying:
            hue = rng.random()
        colour = hsv(
            hue + d.hue_noise * rng.standard_normal(),
            rng.uniform(0.55, 0.95),
            rng.uniform(0.55, 0.95),
        )
        if d.lying <= coin < d.lying + d.grey:
            colour = np.full(3, colour.mean()) + rng.uniform(-0.03, 0.03, 3)
        values = (
            pattern_of(pattern, x, y, rng.uniform(2.5, 3.5), rng)[..., None]
            * 0.25
            * rng.uniform(*d.pattern)
        )
        body = colour + values + d.texture * smooth(rng, s, 4)
        picture = picture * (1 - cover) + body * cover
        instances[cover[..., 0] > 0.5] = number
    picture = picture + d.pixel_noise * rng.standard_normal(picture.shape)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8), instances, ids


def generator(*key: int | str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"{type(k).__name__} {k}".encode()) for k in key])


# ------------------------------------------------------------------------------------------ on disk
def once(target: Path, version: str, make) -> Path:
    """Run make(folder) into a temporary folder beside `target` and rename it, unless `target` has
    this version.

    Processes of one machine wait for the first of them."""
    mark = target / "version.txt"
    if mark.is_file() and mark.read_text() == version:
        return target  # nothing to write: the root may be read-only
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--root {target.parent} is a file; name a folder.") from None
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = mark.read_text() if mark.is_file() else ""
        if found != version:
            ours = found.split(" ")[0] == version.split(" ")[0]  # an older drawing of the same kind
            if not ours and target.exists() and (target.is_file() or any(target.iterdir())):
                raise UserError(
                    f"{target} holds something else than the embedded data set; name another --root."
                )
            # of processes that were killed
            for left in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            temporary.mkdir(parents=True)
            make(temporary)
            (temporary / "version.txt").write_text(version)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    return target


def save_palette(index: np.ndarray, path: Path) -> None:
    """(H, W) uint8 indices as a palette PNG with VOC's colours, as the real data have it."""
    import torch

    from common.plots import save_index_png

    save_index_png(torch.from_numpy(index), path)


def semantic_scene(part: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a part: picture (S, S, 3) uint8 and label (S, S) uint8, 0 background, 1..
    the classes."""
    rng = generator("semantic", part, index)
    names = list(SEMANTIC_CLASSES)
    chosen = rng.integers(
        0, len(names), int(rng.integers(SEMANTIC.objects[0], SEMANTIC.objects[1] + 1))
    )
    picture, instances, _ = draw(
        rng, [SEMANTIC_CLASSES[names[c]] for c in chosen], list(chosen), SEMANTIC
    )
    return picture, np.concatenate([[0], chosen + 1]).astype(np.uint8)[instances]


def make_voc(root: Path, train: int = 1000, tune: int = 200, val: int = 300) -> Path:
    """VOC folders of the semantic variant: `train` (labels for all; a run uses few), `tune` and
    `val`."""

    def make(folder: Path) -> None:
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (folder / name).mkdir(parents=True)
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            names = [f"{part}_{i:06d}" for i in range(number)]
            for index, name in enumerate(names):
                picture, label = semantic_scene(part, index)
                Image.fromarray(picture).save(
                    folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0
                )
                save_palette(label, folder / "SegmentationClass" / f"{name}.png")
            (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(
                "".join(n + "\n" for n in names)
            )
        (folder / "classes.txt").write_text(
            "".join(n + "\n" for n in ["background", *SEMANTIC_CLASSES])
        )

    return once(root, f"voc {SEMANTIC} {SEMANTIC_CLASSES} {train} {tune} {val}", make)


# --------------------------------------------------------------------------------------- Cityscapes
WHEELS = ", ellipse 10 70 30 100 15, ellipse 70 70 90 100 15"


BODY = "rectangle 20 55 45 100 50, rectangle 55 55 80 100 50, rectangle 10 20 90 60 100, ellipse 28 0 72 22 140"


# raw labelId, metres wide, high and above ground, hue, saturation and value (or any colour), and
# parts in percent:
# form, left, top, right, bottom, brightness
THINGS = {
    "pole": (17, 0.2, 4.2, 0, (0.6, 0.05, 0.45), "rectangle 0 0 100 100 100"),
    "light": (
        19,
        0.8,
        1.6,
        3.0,
        (0.13, 0.9, 0.95),
        "rectangle 0 0 100 100 10, ellipse 20 35 80 65 100",
    ),
    "sign": (
        20,
        1.1,
        1.1,
        3.4,
        (0.6, 0.8, 0.8),
        "ellipse 0 0 100 100 100, rectangle 20 42 80 58 180",
    ),
    "tree": (
        21,
        3.5,
        5.5,
        0,
        (0.28, 0.55, 0.42),
        "rectangle 46 40 54 100 60, ellipse 0 20 65 65 80, ellipse 40 15 100 60 100, ellipse 20 0 80 40 120",
    ),
    "person": (24, 0.65, 1.75, 0, None, BODY),
    "people": (24, 1.1, 1.6, 0, None, BODY),  # side by side they are a group without instances
    "rider": (25, 0.65, 1.75, 0.3, None, BODY),
    "car": (26, 3.4, 1.5, 0, None, "ellipse 10 0 88 80 50, rectangle 0 40 100 85 100" + WHEELS),
    "truck": (27, 4.8, 3.2, 0, None, "rectangle 0 0 70 85 120, rectangle 72 30 100 85 80" + WHEELS),
    "bus": (28, 5.5, 3.0, 0, None, "rectangle 0 0 100 88 100, rectangle 6 15 94 50 40" + WHEELS),
    "caravan": (
        29,
        3.0,
        2.3,
        0,
        (0.1, 0.1, 0.85),
        "rectangle 0 0 100 90 100, rectangle 25 20 60 50 50" + WHEELS,
    ),
    "train": (
        31,
        7.5,
        3.5,
        0,
        None,
        "rectangle 0 0 100 100 100, rectangle 3 15 97 50 35, rectangle 0 70 100 76 160",
    ),
    "motorcycle": (
        32,
        2.0,
        1.1,
        0,
        None,
        "rectangle 25 30 75 80 100, ellipse 0 40 38 99 20, ellipse 62 40 99 99 20",
    ),
    "bicycle": (
        33,
        1.7,
        1.1,
        0,
        None,
        "ellipse 0 35 42 100 30, ellipse 58 35 100 100 30, rectangle 20 50 80 64 100",
    ),
}


def street_scene(part: str, index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A street: picture (H, W, 3) uint8 and instanceIds (H, W) uint16. Four in a row show all 19
    classes."""
    rng, counts = generator("street", part, index), dict.fromkeys(range(34), -1)
    images = Image.new("RGB", (width, height)), Image.new("I", (width, height))
    canvases = [ImageDraw.Draw(image) for image in images]
    horizon, centre = rng.uniform(0.38, 0.45) * height, rng.uniform(0.42, 0.58) * width
    below = height - horizon

    def put(value: int, colour: np.ndarray, form: str, *points: float) -> None:
        for canvas, fill in zip(
            canvases, (tuple((255 * np.clip(colour, 0, 1)).astype(int)), value), strict=True
        ):
            getattr(canvas, form)(points, fill)

    def strip(
        value: int, colour: np.ndarray, left: float, right: float, far: float, near: float
    ) -> None:
        put(
            value,
            colour,
            "polygon",
            *(
                c
                for u, t in ((left, far), (right, far), (right, near), (left, near))
                for c in (centre + u * t * below / 2.5, horizon + t * below)
            ),
        )

    def stand(name: str, u: float, t: float) -> None:  # u metres right, at share t of the ground
        ident, wide, high, lift, colour, parts = THINGS[name]
        counts[ident] += 1
        value = ident if ident < 24 or name == "people" else 1000 * ident + counts[ident]
        tint = (
            hsv(*colour)
            if colour
            else hsv(rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.35, 0.8))
        )
        scale = t * below / 2.5  # pixels a metre, seen from 2.5 m above the road
        left, top = centre + (u - wide / 2) * scale, horizon + t * below - (lift + high) * scale
        for form, *box in map(str.split, parts.split(",")):
            x0, y0, x1, y1, bright = (float(number) / 100 for number in box)
            put(
                value,
                tint * bright,
                form,
                left + x0 * wide * scale,
                top + y0 * high * scale,
                left + x1 * wide * scale,
                top + y1 * high * scale,
            )

    put(23, hsv(0.57, rng.uniform(0.1, 0.45), 0.9), "rectangle", 0, 0, width, horizon)
    corners = np.linspace(0, width, int(rng.integers(6, 9)))
    for left, right in zip(corners, corners[1:], strict=False):  # houses, higher towards the sides
        top = horizon * rng.uniform(0.15, 0.75) * (1.25 - abs(left + right - width) / width)
        facade = hsv(rng.uniform(0.02, 0.14), rng.uniform(0.1, 0.45), rng.uniform(0.45, 0.75))
        put(11, facade, "rectangle", left, top, right, horizon)
        for x, y in (
            (x, y)
            for x in np.arange(left + 4, right - 6, 9)
            for y in np.arange(top + 4, horizon - 8, 9)
        ):
            put(11, facade * 0.55, "rectangle", x, y, x + 4, y + 5)
    put(12, np.array([0.6, 0.55, 0.5]), "rectangle", 0, horizon - 4, 0.4 * width, horizon + 3)
    for x in range(int(0.4 * width), width, 2):
        put(
            13,
            np.full(3, 0.25 + 0.25 * (x % 4 < 2)),
            "rectangle",
            x,
            horizon - 5,
            x + 1,
            horizon + 3,
        )
    put(8, np.full(3, rng.uniform(0.5, 0.65)), "rectangle", 0, horizon + 3, width, height)
    strip(22, hsv(rng.uniform(0.2, 0.3), 0.55, 0.5), 8, 60, 0.04, 1)
    strip(7, np.full(3, rng.uniform(0.28, 0.4)), -5, 5, 0.01, 1)
    for t in (0.14, 0.26, 0.45, 0.75):
        strip(7, np.full(3, 0.85), -0.12, 0.12, t, 1.35 * t)
    # the car's own bonnet
    put(1, np.full(3, 0.14), "ellipse", -0.1 * width, 0.94 * height, 1.1 * width, 1.3 * height)

    things = [
        (
            ("truck", "bus", "train", "rider motorcycle")[index % 4],
            2.6,
            0.42 if index % 4 == 3 else 0.22,
        ),
        ("caravan", 2.0, 0.14) if index % 4 == 3 else ("people people people", -7.5, 0.25),
        ("car", -2.6, 0.55),
        ("rider bicycle", 3.2, 0.7),
        ("car", -2.0, 0.2),
        ("person", -6.5, 0.5),
        ("person", 6.0, 0.35),
        ("pole light", -5.3, 0.4),
        ("pole sign", 5.3, 0.5),
        ("tree", -8.0, 0.5),
        ("tree", 7.5, 0.45),
        ("car", -3.2, 0.38),
    ][: rng.integers(11, 13)]
    places = [
        (t * rng.uniform(0.8, 1.2), u + rng.uniform(-0.6, 0.6), names) for names, u, t in things
    ]
    for t, u, names in sorted(places):  # far ones first
        for shift, name in enumerate(names.split()):
            stand(name, u + 0.8 * shift * (name == "people"), t)
    picture = np.asarray(images[0]) / 255 + 0.02 * rng.standard_normal((height, width, 3))
    picture += 0.05 * smooth(rng, max(height, width), 9)[:height, :width]
    mirror = np.s_[:, :: rng.choice([-1, 1])]
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)[mirror], np.asarray(
        images[1], np.uint16
    )[mirror]


def make_cityscapes(
    root: Path, train: int = 16, val: int = 4, height: int = 128, width: int = 256
) -> Path:
    """Cityscapes folders of drawn streets: leftImg8bit and gtFine with raw labelIds and 16-bit
    instanceIds."""

    def make(folder: Path) -> None:
        for part, index in [("train", i) for i in range(train)] + [("val", i) for i in range(val)]:
            picture, instances = street_scene(part, index, height, width)
            labels = np.where(instances >= 1000, instances // 1000, instances).astype(np.uint8)
            city = {"train": ("drawnburg", "inkstadt"), "val": ("paperheim", "quillau")}[part][
                index % 2
            ]
            files = {
                "leftImg8bit": picture,
                "gtFine_labelIds": labels,
                "gtFine_instanceIds": instances,
            }
            for name, values in files.items():
                path = (
                    folder
                    / name.split("_")[0]
                    / part
                    / city
                    / f"{city}_{index // 2:06d}_000019_{name}.png"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)

    return once(root, f"cityscapes {THINGS} {train} {val} {height} {width}", make)


# ------------------------------------------------------------------------------------ COCO and LVIS
def polygons(mask: np.ndarray) -> list[list[int]]:
    """(H, W) bool -> polygons [x, y, x, y, ...] along pixel edges that cover exactly `mask`; holes
    are cut open."""
    steps, edges, found, padded = ((1, 0), (0, 1), (-1, 0), (0, -1)), set(), [], np.pad(mask, 1)
    for turn, (row, column, dx, dy) in enumerate(
        ((0, 1, 0, 0), (1, 2, 1, 0), (2, 1, 1, 1), (1, 0, 0, 1))
    ):
        outside = ~padded[row : row + mask.shape[0], column : column + mask.shape[1]]
        edges |= {(x + dx, y + dy, turn) for y, x in np.argwhere(mask & outside).tolist()}
    while edges:  # along edges that have the mask at their right
        (x, y, turn), loop, last = min(edges), [], None
        while (x, y, turn) in edges:
            edges.remove((x, y, turn))
            loop += [x, y] * (turn != last)
            last, x, y = turn, x + steps[turn][0], y + steps[turn][1]
            turn = next((t % 4 for t in (turn + 1, turn, turn + 3) if (x, y, t % 4) in edges), turn)
        xs, ys = np.array(loop[::2]), np.array(loop[1::2])
        if (xs * np.roll(ys, -1) - np.roll(xs, -1) * ys).sum() < 0:  # a hole
            cut = np.arange(mask.shape[1]) < (xs.min() + xs.max() + 1) // 2
            return polygons(mask & cut) + polygons(mask & ~cut)
        found.append(loop)
    return found


def instance_scene(part: str, index: int) -> tuple[np.ndarray, np.ndarray, list[int], int]:
    """Scene `index` of a part: picture (H, W, 3) uint8, instance map (H, W) uint8, the class of
    each instance, and how many of them are no members of the crowd that every twelfth scene has in
    front."""
    rng, d, kinds = generator("instance", part, index), INSTANCE, list(INSTANCE_CLASSES.values())
    law = 1 / np.arange(6, 6 + len(kinds)) ** 3
    law /= law.sum()
    if part == "val":  # half of it even, or rare classes go unscored
        law = (law + 1 / len(law)) / 2
    chosen = rng.choice(len(law), int(rng.integers(d.objects[0], d.objects[1] + 1)), p=law).tolist()
    picture, instances, _ = draw(rng, [kinds[c] for c in chosen], chosen, d)
    single = len(chosen)
    if index % 12 == 3:
        half, c = d.size // 2, int(rng.choice(len(law), p=law))
        small, crowd, _ = draw(rng, [kinds[c]] * 8, [], replace(d, size=half))
        y, x = rng.integers(0, half, 2)
        window = np.s_[y : y + half, x : x + half]
        picture[window] = np.where(crowd[..., None] > 0, small, picture[window])
        instances[window] = np.where(crowd > 0, crowd + single, instances[window])
        chosen += [c] * 8
    cut = ((d.size, d.size), (d.size, d.size * 5 // 6), (d.size * 5 // 6, d.size))[rng.integers(3)]
    return picture[: cut[0], : cut[1]], instances[: cut[0], : cut[1]], chosen, single


def make_coco(root: Path, train: int = 400, val: int = 100, labeled: int | None = None) -> Path:
    """COCO folders of the instance variant: images/{train,val} and, of the same scenes,
    annotations/instances_*.json (run lengths, crowds) and lvis_*.json (polygons, federated, no
    file_name, frequencies of the training pictures).

    `labeled`: only so many training pictures are in the JSON files, the others lie in
    images/unlabeled (None: all)."""
    from pycocotools.mask import encode, toBbox

    names = sorted(INSTANCE_CLASSES)  # ids 1, 4, 8, 11, ... in COCO, 1, 2, ... in LVIS
    place = [names.index(name) for name in INSTANCE_CLASSES]

    def add(data: dict, image: int, mask: np.ndarray, category: int, **crowd: int) -> None:
        runs = encode(np.asfortranarray(mask, np.uint8))
        data["annotations"].append(
            {
                "id": len(data["annotations"]) + 1,
                "image_id": image,
                "category_id": category,
                "area": float(mask.sum()),
                "bbox": toBbox(runs).tolist(),
                **crowd,
                "segmentation": {**runs, "counts": runs["counts"].decode()}
                if crowd
                else polygons(mask),
            }
        )

    def make(folder: Path) -> None:
        head = {
            "info": {"description": "drawn shapes"},
            "licenses": [{"id": 1, "name": "as this code", "url": ""}],
        }
        files = {
            f"{kind}_{part}": {**head, "categories": [], "images": [], "annotations": []}
            for kind in ("instances", "lvis")
            for part in ("train", "val")
        }
        (folder / "annotations").mkdir()
        for part, index in [("train", i) for i in range(train)] + [("val", i) for i in range(val)]:
            picture, instances, classes, single = instance_scene(part, index)
            coco, lvis, number = (
                files[f"instances_{part}"],
                files[f"lvis_{part}"],
                3 * index + 1 + (part == "val"),
            )
            known = part == "val" or labeled is None or index < labeled
            path = folder / "images" / (part if known else "unlabeled") / f"{number:012d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, quality=95, subsampling=0)
            if not known:
                continue
            seen = [
                (instances == n, place[c], n > single)
                for n, c in enumerate(classes, start=1)
                if (instances == n).sum() >= 12
            ]
            crowd = [(mask, c) for mask, c, many in seen if many]
            absent = sorted(set(range(len(names))) - {place[c] for c in classes})
            negative = generator("negative", part, index).permutation(absent)[:6]
            image = {
                "id": number,
                "height": picture.shape[0],
                "width": picture.shape[1],
                "license": 1,
                "coco_url": f"http://localhost/images/{part}/{path.name}",
                "date_captured": "2025-01-01 00:00:00",
            }
            coco["images"].append({**image, "file_name": path.name})
            lvis["images"].append(
                {
                    **image,
                    "neg_category_ids": sorted((negative + 1).tolist()),
                    "not_exhaustive_category_ids": [c + 1 for _, c in crowd[:1]],
                }
            )
            for mask, c in [(mask, c) for mask, c, many in seen if not many]:
                add(coco, number, mask, 1 + 7 * c // 2, iscrowd=0)
                add(lvis, number, mask, c + 1)
            if crowd:  # one region in COCO, one object of it in LVIS
                add(
                    coco,
                    number,
                    np.any([mask for mask, _ in crowd], axis=0),
                    1 + 7 * crowd[0][1] // 2,
                    iscrowd=1,
                )
                add(lvis, number, crowd[0][0], crowd[0][1] + 1)
        pairs = [(a["category_id"], a["image_id"]) for a in files["lvis_train"]["annotations"]]
        for c, name in enumerate(names):
            images, form = len({i for k, i in pairs if k == c + 1}), INSTANCE_CLASSES[name][0]
            kind = {"id": 1 + 7 * c // 2, "name": name, "supercategory": form}
            rare = {
                "id": c + 1,
                "name": name,
                "synset": f"{name}.n.01",
                "synonyms": [name],
                "def": f"a drawn {form}",
                "frequency": "r" if images <= 10 else "c" if images <= 100 else "f",
                "image_count": images,
                "instance_count": sum(k == c + 1 for k, _ in pairs),
            }
            for key, data in files.items():
                data["categories"].append(rare if key.startswith("lvis") else kind)
        for key, data in files.items():
            (folder / "annotations" / f"{key}.json").write_text(json.dumps(data))

    return once(root, f"coco {INSTANCE} {INSTANCE_CLASSES} {train} {val} {labeled}", make)


def make_things(root: Path, train: int = 400, tune: int = 200, val: int = 200) -> Path:
    """COCO folders of a few evenly frequent classes: images/{train,tune,val},
    annotations/instances_*.json."""

    def make(folder: Path) -> None:
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            data = annotated(folder, "things", part, number, FEW, THING_CLASSES, None)
            (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(data))

    return once(root, f"things {FEW} {THING_CLASSES} {train} {tune} {val}", make)


def make_tail(root: Path, train: int = 600, tune: int = 200, val: int = 200) -> Path:
    """LVIS folders of a short long tail: images/{train,tune,val}, annotations/lvis_*.json,
    federated, with frequencies of the training pictures. The others are drawn half by the same law,
    half evenly, or rare classes went unscored."""
    law = 1 / np.arange(2, 2 + len(TAIL_CLASSES)) ** 2
    law /= law.sum()

    def make(folder: Path) -> None:
        files = {}
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            files[part] = annotated(
                folder,
                "tail",
                part,
                number,
                TAIL,
                TAIL_CLASSES,
                law if part == "train" else (law + 1 / len(law)) / 2,
            )
        pairs = [(a["category_id"], a["image_id"]) for a in files["train"]["annotations"]]
        for kind in files["train"]["categories"]:
            images = len({i for c, i in pairs if c == kind["id"]})
            facts = {
                "image_count": images,
                "instance_count": sum(c == kind["id"] for c, _ in pairs),
                "frequency": "r" if images <= 10 else "c" if images <= 100 else "f",
            }
            for data in files.values():
                data["categories"][kind["id"] - 1].update(facts)
        for part, data in files.items():
            for image in data["images"]:
                here = {
                    a["category_id"] for a in data["annotations"] if a["image_id"] == image["id"]
                }
                absent = sorted({c["id"] for c in data["categories"]} - here)
                few = generator("tail negative", part, image["id"]).permutation(absent)[:6]
                image.update(neg_category_ids=sorted(few.tolist()), not_exhaustive_category_ids=[])
            (folder / "annotations" / f"lvis_{part}.json").write_text(json.dumps(data))

    return once(root, f"tail {TAIL} {TAIL_CLASSES} {train} {tune} {val}", make)


def annotated(
    folder: Path,
    name: str,
    part: str,
    number: int,
    d: Difficulty,
    classes: dict,
    law: np.ndarray | None,
) -> dict:
    """Draws scenes of a part into folder/images/<part>; what a COCO file says of them. `law`: share
    of each class."""
    from pycocotools.mask import encode, toBbox

    data = {
        "info": {"description": "drawn shapes"},
        "images": [],
        "annotations": [],
        "categories": [
            {"id": c + 1, "name": kind, "supercategory": form[0]}
            for c, (kind, form) in enumerate(classes.items())
        ],
    }
    for made in (folder / "annotations", folder / "images" / part):
        made.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        rng = generator(name, part, index)
        chosen = rng.choice(
            len(classes), int(rng.integers(d.objects[0], d.objects[1] + 1)), p=law
        ).tolist()
        picture, instances, _ = draw(rng, [list(classes.values())[c] for c in chosen], chosen, d)
        image = {
            "id": index + 1,
            "height": d.size,
            "width": d.size,
            "file_name": f"{index + 1:012d}.jpg",
        }
        Image.fromarray(picture).save(
            folder / "images" / part / image["file_name"], quality=95, subsampling=0
        )
        data["images"].append(image)
        for n, c in enumerate(chosen, start=1):
            mask = instances == n
            if mask.sum() >= 12:
                box = toBbox(encode(np.asfortranarray(mask, np.uint8))).tolist()
                data["annotations"].append(
                    {
                        "id": len(data["annotations"]) + 1,
                        "image_id": index + 1,
                        "category_id": c + 1,
                        "area": float(mask.sum()),
                        "bbox": box,
                        "iscrowd": 0,
                        "segmentation": polygons(mask),
                    }
                )
    return data


# ------------------------------------------------------------------------------------- pre-training
def pretrain(root: Path, backbone: str, steps: int = 1200, batch_size: int = 64) -> Path:
    """Weights of a timm backbone that learned form, pattern and hue of single objects, as file
    root/weights/<name>.pth.

    What ImageNet is to the papers: features, from classes (FORMS[8:]) that the embedded set does
    not have."""
    import timm
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    def make(folder: Path) -> None:
        forms, rng = FORMS[8:], generator("pretrain", backbone)
        if not sys.stderr.isatty():  # else there are bars
            print(
                f"Pre-training {backbone} on drawn pictures of other classes, once: some two minutes.",
                flush=True,
            )
        pictures, targets = [], []
        for _ in tqdm(
            range(10000), desc="drawing pictures to pre-train on", leave=False, disable=None
        ):
            form, pattern, hue = rng.integers(len(forms)), rng.integers(len(PATTERNS)), rng.random()
            d = PRETRAIN
            picture, _, _ = draw(rng, [(forms[form], PATTERNS[pattern], hue)], [0], d)
            pictures.append(picture)
            targets.append((form, pattern, int(hue * 12)))
        x, y = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = timm.create_model(backbone, num_classes=len(forms) + len(PATTERNS) + 12)
        net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        bar = tqdm(
            range(steps),
            desc=f"pre-training {backbone} on other drawn classes",
            leave=False,
            disable=None,
        )
        for _ in bar:
            index = torch.from_numpy(rng.integers(0, len(x), batch_size))
            images = normalize(x[index])
            if rng.random() < 0.5:
                images = images.flip(-1)
            if rng.random() < 0.5:
                images = images.flip(-2)
            logits = net(images.to(memory_format=torch.channels_last)).split(
                [len(forms), len(PATTERNS), 12], dim=1
            )
            loss = sum(
                F.cross_entropy(z, t) for z, t in zip(logits, y[index].unbind(1), strict=True)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
        torch.save(net.state_dict(), folder / "weights.pth")
        (folder / "log.json").write_text(
            json.dumps(
                {
                    "loss": loss.item(),
                    "accuracy": [
                        (z.argmax(1) == t).float().mean().item()
                        for z, t in zip(logits, y[index].unbind(1), strict=True)
                    ],
                }
            )
        )

    from common.transforms import normalize

    version = f"pretrain {PRETRAIN} {steps} {batch_size} {timm.__version__}"
    return once(root / "weights" / backbone, version, make) / "weights.pth"


def pretrained(root: Path, backbone: str) -> Path:
    """The file of weights that `--weights shapes` means, pre-trained on first use."""
    import timm

    if not timm.is_model(backbone):
        raise UserError(
            f"--weights shapes pre-trains timm networks; --backbone {backbone} is none, so take a "
            f"timm name, or --weights none."
        )
    return pretrain(root, backbone)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root", type=Path, default=Path("datasets/shapes"), help="default %(default)s"
    )
    root = parser.parse_args(argv).root
    kinds = {
        "voc": make_voc,
        "cityscapes": make_cityscapes,
        "coco": make_coco,
        "things": make_things,
        "tail": make_tail,
    }
    for name, make in kinds.items():
        start = time.perf_counter()
        try:
            folder = make(root / name)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{folder}, {time.perf_counter() - start:.1f} s")
        for place, number in sorted(
            Counter(p.parent for p in folder.rglob("*") if p.is_file()).items()
        ):
            print(f"    {number:6,} files in {place.relative_to(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
