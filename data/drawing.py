"""Drawn scenes, as arrays: objects of sixteen forms in eight patterns, and streets for Cityscapes.

Every picture depends on its generator alone. No randomness is taken from or left in global
generators."""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

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


@dataclass(frozen=True)
class Domain:
    """How scenes look in another place: same objects, other ground, surfaces, light and camera."""

    tiles: float  # contrast of the tiles that the ground is laid with
    grain: float  # standard deviation of the grain of an object's surface
    light: tuple[float, float]  # how bright the brighter side is, of daylight
    fall: tuple[float, float]  # how much of that is left at the other side
    tint: tuple[float, float, float]  # colour of the light, red, green and blue
    pixel_noise: float  # standard deviation of the camera's noise, of full range


DUSK = Domain(
    tiles=0.12,
    grain=0.04,
    light=(0.8, 1.0),
    fall=(0.55, 0.8),
    tint=(0.85, 0.92, 1.1),
    pixel_noise=0.04,
)


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


def tiles(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 1) values in [-1, 1]: a turned grid of tiles, each of its own brightness, with
    dark joints."""
    side, turn = rng.uniform(0.12, 0.25) * size, rng.uniform(0, np.pi)
    ys, xs = np.mgrid[0:size, 0:size]
    u = (np.cos(turn) * xs + np.sin(turn) * ys) / side + 100  # so that no place is negative
    v = (-np.sin(turn) * xs + np.cos(turn) * ys) / side + 100
    bright = rng.uniform(-0.6, 1, (200, 200))[u.astype(int), v.astype(int)]
    joint = (u % 1 < 0.14) | (v % 1 < 0.14)
    return np.where(joint, -1, bright)[..., None]


def lit(rng: np.random.Generator, picture: np.ndarray, domain: Domain) -> np.ndarray:
    """The picture in the domain's light, which comes from one side and falls off."""
    size = len(picture)
    bright, fall, turn = rng.uniform(*domain.light), rng.uniform(*domain.fall), rng.uniform(0, 7)
    ys, xs = np.mgrid[0:size, 0:size] / size - 0.5
    along = np.clip(0.5 + (np.cos(turn) * xs + np.sin(turn) * ys), 0, 1)[..., None]
    return picture * np.array(domain.tint) * bright * (1 - (1 - fall) * along)


def draw(
    rng: np.random.Generator,
    kinds: list[tuple[str, str, float]],
    ids: list[int],
    d: Difficulty,
    domain: Domain | None = None,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A scene with one object per entry of `kinds` (form, pattern, hue), later ones in front, as it
    looks in a `domain`.

    Returns the picture (S, S, 3) uint8, the instance map (S, S) uint8 (0 background, i the i-th
    object) and `ids`."""
    s = d.size
    base = rng.uniform(0.25, 0.75) + rng.uniform(-0.06, 0.06, 3)
    picture = (
        base
        + d.clutter * smooth(rng, s, int(rng.integers(3, 7))).mean(-1, keepdims=True)
        + 0.25 * d.clutter * smooth(rng, s, 5)
    )
    if domain is not None:
        picture = picture + domain.tiles * tiles(rng, s)
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
        if domain is not None:
            body = body + domain.grain * rng.standard_normal((s, s, 1))
        picture = picture * (1 - cover) + body * cover
        instances[cover[..., 0] > 0.5] = number
    noise = d.pixel_noise
    if domain is not None:
        picture, noise = lit(rng, picture, domain), domain.pixel_noise
    picture = picture + noise * rng.standard_normal(picture.shape)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8), instances, ids


def generator(*key: int | str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"{type(k).__name__} {k}".encode()) for k in key])


# ------------------------------------------------------------------------------------------ streets
WHEELS = ", ellipse 10 70 30 100 15, ellipse 70 70 90 100 15"


BODY = (
    "rectangle 20 55 45 100 50, rectangle 55 55 80 100 50, rectangle 10 20 90 60 100, "
    "ellipse 28 0 72 22 140"
)


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
        "rectangle 46 40 54 100 60, ellipse 0 20 65 65 80, ellipse 40 15 100 60 100, "
        "ellipse 20 0 80 40 120",
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
    rng = generator("street", part, index)
    counts = dict.fromkeys(range(34), -1)  # objects of each labelId so far, less one
    picture, labels = Image.new("RGB", (width, height)), Image.new("I", (width, height))
    picture_canvas, label_canvas = ImageDraw.Draw(picture), ImageDraw.Draw(labels)
    horizon = rng.uniform(0.38, 0.45) * height
    centre = rng.uniform(0.42, 0.58) * width
    below = height - horizon

    def put(value: int, colour: np.ndarray, form: str, *points: float) -> None:
        """Draw a form with this colour into the picture, and with this value into the labels."""
        rgb = tuple((255 * np.clip(colour, 0, 1)).astype(int))
        getattr(picture_canvas, form)(points, rgb)
        getattr(label_canvas, form)(points, value)

    def strip(
        value: int, colour: np.ndarray, left: float, right: float, far: float, near: float
    ) -> None:
        points = []
        for u, t in ((left, far), (right, far), (right, near), (left, near)):
            points += [centre + u * t * below / 2.5, horizon + t * below]
        put(value, colour, "polygon", *points)

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
        for x in np.arange(left + 4, right - 6, 9):
            for y in np.arange(top + 4, horizon - 8, 9):  # windows
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
    pixels = np.asarray(picture) / 255 + 0.02 * rng.standard_normal((height, width, 3))
    pixels += 0.05 * smooth(rng, max(height, width), 9)[:height, :width]
    mirror = np.s_[:, :: rng.choice([-1, 1])]
    pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return pixels[mirror], np.asarray(labels, np.uint16)[mirror]


# ---------------------------------------------------------------------------------------- outlines
class Step(NamedTuple):
    """An edge between two pixels: where it begins, and its direction, an index of DIRECTIONS."""

    x: int
    y: int
    turn: int


DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up


def polygons(mask: np.ndarray) -> list[list[int]]:
    """(H, W) bool -> polygons [x, y, x, y, ...] along pixel edges that cover exactly `mask`; holes
    are cut open."""
    edges = edges_of(mask)
    found = []
    while edges:
        loop = take_loop(edges)
        xs, ys = np.array(loop[::2]), np.array(loop[1::2])
        turns_left = (xs * np.roll(ys, -1) - np.roll(xs, -1) * ys).sum() < 0
        if turns_left:  # a hole: cut the mask in two through its middle
            cut = np.arange(mask.shape[1]) < (xs.min() + xs.max() + 1) // 2
            return polygons(mask & cut) + polygons(mask & ~cut)
        found.append(loop)
    return found


def edges_of(mask: np.ndarray) -> set[Step]:
    """All edges between a pixel of the mask and one outside, with the mask at their right."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    edges = set()
    # For each direction: the neighbour that must be outside, and the corner where the edge begins.
    sides = (((0, 1), (0, 0)), ((1, 2), (1, 0)), ((2, 1), (1, 1)), ((1, 0), (0, 1)))
    for turn, ((row, column), (dx, dy)) in enumerate(sides):
        outside = ~padded[row : row + height, column : column + width]
        for y, x in np.argwhere(mask & outside).tolist():
            edges.add(Step(x + dx, y + dy, turn))
    return edges


def take_loop(edges: set[Step]) -> list[int]:
    """Take one closed way out of the edges: its corners x, y, x, y, ..."""
    step = min(edges)
    loop: list[int] = []
    last_turn = None
    while step in edges:
        edges.remove(step)
        if step.turn != last_turn:
            loop += [step.x, step.y]
        last_turn = step.turn
        dx, dy = DIRECTIONS[step.turn]
        x, y = step.x + dx, step.y + dy
        step = Step(x, y, step.turn)
        for turn in (last_turn + 1, last_turn, last_turn + 3):  # right, straight on, left
            if Step(x, y, turn % 4) in edges:
                step = Step(x, y, turn % 4)
                break
    return loop
