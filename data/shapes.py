"""The embedded data set: drawn scenes in the real on-disk formats, so that everything runs without a download.

Objects have a class-typical form, pattern and hue. Each cue alone is unsure: the hue wanders and is often lost to grey,
patterns fade, forms are cut off by what lies in front. Together they tell the class. A few labels therefore do not
suffice, and many unlabeled pictures show which forms, patterns and hues go together.

    make_voc         VOC folders with palette PNGs, train / tune / val      semantic segmentation
    make_cityscapes  leftImg8bit and gtFine with labelIds and instanceIds   for format tests
    make_coco        COCO and LVIS JSON of one long-tailed set              instance segmentation
    pretrain         a tiny backbone's weights from other drawn classes     what ImageNet is to the papers

    python -m data.shapes [--root datasets/shapes]      draws all of it (it is drawn on first use anyway)

Every picture depends on (variant, part, index) alone. No randomness is taken from or left in global generators.
"""

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.runs import UserError

FORMS = ("circle", "square", "triangle", "star", "ring", "cross", "moon", "bar",            # the embedded classes
         "heart", "hexagon", "ell", "drop", "arrow", "gear", "bow", "wedge")                 # pre-training only
PATTERNS = ("plain", "stripes", "checks", "dots", "rings", "noise", "gradient", "mesh")


@dataclass(frozen=True)
class Difficulty:
    """The knobs of one variant. Changing one means re-running the documents that quote its numbers."""
    size: int = 64                         # pixels a side
    objects: tuple[int, int] = (2, 4)      # drawn per scene, both ends included
    radius: tuple[float, float] = (0.15, 0.28)      # of the side
    hue_noise: float = 0.05                # standard deviation around the class's hue, of a full circle
    grey: float = 0.3                      # share of objects that lost their hue
    lying: float = 0.0                     # share of objects with a random hue
    pattern: tuple[float, float] = (0.0, 1.0)       # contrast of the class's pattern
    texture: float = 0.10                  # amplitude of smooth shading inside an object
    pixel_noise: float = 0.03              # standard deviation of pixel noise, of full range
    clutter: float = 0.25                  # contrast of the background


SEMANTIC = Difficulty()
INSTANCE = Difficulty(size=96, objects=(2, 5), radius=(0.10, 0.22), grey=0.2, lying=0.05, clutter=0.2)
STREET = Difficulty(objects=(3, 5))
PRETRAIN = Difficulty(objects=(1, 1), radius=(0.22, 0.42), grey=0.3, lying=0.0)

# class -> (form, pattern, hue). Neighbours in the list share cues, so that no single one decides.
SEMANTIC_CLASSES = {"disc": ("circle", "stripes", 0.00), "box": ("square", "checks", 0.17),
                    "tent": ("triangle", "dots", 0.33), "star": ("star", "plain", 0.50),
                    "hoop": ("ring", "rings", 0.67), "plus": ("cross", "mesh", 0.83)}


# ------------------------------------------------------------------------------------------------ drawing
def signed_distance(form: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rough signed distance to the outline of `form` in a unit frame: negative inside, about 1 = one radius."""
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    ax, ay = np.abs(x), np.abs(y)

    def polygon(n: int, inner: float = 1.0) -> np.ndarray:           # star polygon when inner < 1
        sector = np.pi / n
        a = np.abs((angle + sector) % (2 * sector) - sector)         # 0 at a tip, sector at a notch
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
        return np.minimum(np.maximum(np.hypot(ax - 0.42, y + 0.3) - 0.48, -1.0), np.maximum(ax * 0.8 + y - 0.62, -0.3 - y))
    if form == "hexagon":
        return polygon(6)
    if form == "ell":
        return np.minimum(np.maximum(np.abs(x + 0.5) - 0.3, ay - 0.9), np.maximum(ax - 0.85, np.abs(y - 0.6) - 0.3))
    if form == "drop":
        return np.minimum(np.hypot(x, y - 0.3) - 0.55, np.maximum(ax * 1.4 + 0.3 * y - 0.35 + 0.7 * np.abs(y + 0.3), y - 0.3))
    if form == "arrow":
        return np.minimum(np.maximum(ax - 0.24, np.abs(y - 0.35) - 0.6), np.maximum(ax + (-0.95 - y) * 0.9, y + 0.1))
    if form == "gear":
        return r - 0.8 - 0.14 * np.sign(np.cos(8 * angle))
    if form == "bow":
        return np.maximum(ay - ax * 0.8 - 0.06, ax - 0.95)
    if form == "wedge":
        return np.maximum(r - 0.95, np.abs(angle) - 1.0)
    raise ValueError(form)


def pattern_of(name: str, x: np.ndarray, y: np.ndarray, frequency: float, rng: np.random.Generator) -> np.ndarray:
    """Values in [-1, 1] of a pattern with about `frequency` periods per radius in the object's own frame."""
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
    """(size, size, 3) smooth random field in about [-1, 1]: a coarse grid, linearly interpolated."""
    at = np.linspace(0, cells - 1, size)
    low = np.minimum(at.astype(int), cells - 2)
    weights = np.zeros((size, cells))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), low + 1] = at - low
    return np.einsum("yi,ijc,xj->yxc", weights, rng.uniform(-1, 1, (cells, cells, 3)), weights, optimize=True)


def draw(rng: np.random.Generator, kinds: list[tuple[str, str, float]], ids: list[int],
         d: Difficulty) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A scene with one object per entry of `kinds` (form, pattern, hue), later ones in front.

    Returns the picture (S, S, 3) uint8, the instance map (S, S) uint8 (0 background, i the i-th object) and `ids`."""
    s = d.size
    base = rng.uniform(0.25, 0.75) + rng.uniform(-0.06, 0.06, 3)
    picture = base + d.clutter * smooth(rng, s, int(rng.integers(3, 7))).mean(-1, keepdims=True) \
        + 0.25 * d.clutter * smooth(rng, s, 5)
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
        colour = hsv(hue + d.hue_noise * rng.standard_normal(), rng.uniform(0.55, 0.95), rng.uniform(0.55, 0.95))
        if d.lying <= coin < d.lying + d.grey:
            colour = np.full(3, colour.mean()) + rng.uniform(-0.03, 0.03, 3)
        values = pattern_of(pattern, x, y, rng.uniform(2.5, 3.5), rng)[..., None] * 0.25 * rng.uniform(*d.pattern)
        body = colour + values + d.texture * smooth(rng, s, 4)
        picture = picture * (1 - cover) + body * cover
        instances[cover[..., 0] > 0.5] = number
    picture = picture + d.pixel_noise * rng.standard_normal(picture.shape)
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8), instances, ids


def generator(*key: int | str) -> np.random.Generator:
    return np.random.default_rng([int.from_bytes(str(k).encode()[:8].ljust(8, b"\0"), "little") for k in key])


# ------------------------------------------------------------------------------------------------ on disk
def once(target: Path, version: str, make) -> Path:
    """Run make(folder) into a temporary folder beside `target` and rename it, unless `target` has this version.

    Processes of one machine wait for the first of them."""
    mark = target / "version.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (mark.is_file() and mark.read_text() == version):
            if target.exists() and any(target.iterdir()) and not mark.is_file():
                raise UserError(f"{target} holds something else than the embedded data set; name another --root.")
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
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
    """Scene `index` of a part: picture (S, S, 3) uint8 and label (S, S) uint8, 0 background, 1.. the classes."""
    rng = generator("semantic", part, index)
    names = list(SEMANTIC_CLASSES)
    chosen = rng.integers(0, len(names), int(rng.integers(SEMANTIC.objects[0], SEMANTIC.objects[1] + 1)))
    picture, instances, _ = draw(rng, [SEMANTIC_CLASSES[names[c]] for c in chosen], list(chosen), SEMANTIC)
    return picture, np.concatenate([[0], chosen + 1]).astype(np.uint8)[instances]


def make_voc(root: Path, train: int = 1000, tune: int = 200, val: int = 300) -> Path:
    """VOC folders of the semantic variant: `train` (labels for all; a run uses few), `tune` and `val`."""
    def make(folder: Path) -> None:
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (folder / name).mkdir(parents=True)
        for part, number in (("train", train), ("tune", tune), ("val", val)):
            names = [f"{part}_{i:06d}" for i in range(number)]
            for index, name in enumerate(names):
                picture, label = semantic_scene(part, index)
                Image.fromarray(picture).save(folder / "JPEGImages" / f"{name}.jpg", quality=95, subsampling=0)
                save_palette(label, folder / "SegmentationClass" / f"{name}.png")
            (folder / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("".join(n + "\n" for n in names))
        (folder / "classes.txt").write_text("".join(n + "\n" for n in ["background", *SEMANTIC_CLASSES]))
    return once(root, f"voc {SEMANTIC} {SEMANTIC_CLASSES} {train} {tune} {val}", make)


# ------------------------------------------------------------------------------------------------ pre-training
def pretrain(root: Path, backbone: str, steps: int = 700, batch_size: int = 64) -> Path:
    """Weights of a timm backbone that learned form, pattern and hue of single objects, as file root/weights/<name>.pth.

    What ImageNet is to the papers: features, from classes (FORMS[8:]) that the embedded set does not have."""
    import timm
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    def make(folder: Path) -> None:
        forms, rng = FORMS[8:], generator("pretrain", backbone)
        pictures, targets = [], []
        for _ in tqdm(range(6000), desc="drawing pictures to pre-train on", leave=False, disable=None):
            form, pattern, hue = rng.integers(len(forms)), rng.integers(len(PATTERNS)), rng.random()
            d = PRETRAIN
            picture, _, _ = draw(rng, [(forms[form], PATTERNS[pattern], hue)], [0], d)
            pictures.append(picture)
            targets.append((form, pattern, int(hue * 12)))
        x, y = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(targets)
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        net = timm.create_model(backbone, num_classes=len(forms) + len(PATTERNS) + 12)
        torch.random.set_rng_state(state)
        net = net.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        bar = tqdm(range(steps), desc=f"pre-training {backbone} on other drawn classes", leave=False,
                   disable=None)
        for _ in bar:
            index = torch.from_numpy(rng.integers(0, len(x), batch_size))
            images = normalize(x[index])
            if rng.random() < 0.5:
                images = images.flip(-1)
            if rng.random() < 0.5:
                images = images.flip(-2)
            logits = net(images.to(memory_format=torch.channels_last)).split([len(forms), len(PATTERNS), 12], dim=1)
            loss = sum(F.cross_entropy(z, t) for z, t in zip(logits, y[index].unbind(1), strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")
        torch.save(net.state_dict(), folder / "weights.pth")
        (folder / "log.json").write_text(json.dumps({"loss": loss.item(), "accuracy": [
            (z.argmax(1) == t).float().mean().item() for z, t in zip(logits, y[index].unbind(1), strict=True)]}))

    from common.transforms import normalize
    return once(root / "weights" / backbone, f"pretrain {PRETRAIN} {steps} {batch_size} {timm.__version__}", make) / "weights.pth"
