"""Annotated objects as they lie on disk (COCO, LVIS and own JSON files, Cityscapes, the embedded
set): which pictures a run learns from, their masks under a joint geometry, and in what order they
come.

As in common/datasets.py, order and augmentation depend on (seed, step, sample) alone: not on
workers, processes or restarts. Labels are class indices 0..K-1, the places in the sorted category
ids, always."""

import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import splits
from common.coco import classes_of, finder, photos_of, read_json, said_of
from common.distributed import World, rng
from common.errors import RankError, UserError
from common.files import IMAGES, BrokenImage, image_files, read_image
from common.loading import helpers
from common.objects import CITYSCAPES_THINGS, Instances, Photo, bare, opened, singles
from common.semantic import missing, need

# annotations/<one of them>.json
FILES = ("{}", "instances_{}", "instances_{}2017", "lvis_{}", "lvis_v1_{}")


COCO_IMAGES = 117266  # of train2017 that hold an object; 118,287 in all


PUBLISHED = {
    "cityscapes": ("guided_distillation", "5%, 10%, 20%, 30%"),
    "coco": ("unbiased_teacher", "0.01%, 0.1%, 0.5%, 1%, 2%, 5%, 10%"),
}


# ------------------------------------------------------------------------------------------ on disk
def find(
    name: str,
    root: Path,
    train_json: str = "",
    val_json: str = "",
    images: str = "",
    val: str = "val",
    classes: list[str] | None = None,
) -> Instances:
    """The data set `name` (shapes, coco, lvis, cityscapes) under `root`, scored on its part `val`;
    UserError when it is not there, contradicts itself, or has not `classes`. Flags name files and a
    folder, also relative to `root`."""
    if root.exists() and not root.is_dir():
        raise missing(name, root, "a folder")
    if not root.is_dir():
        raise missing(name, root, "the folder itself")
    if name == "cityscapes":
        data = find_cityscapes(root, val)
    else:
        data = find_coco(name, root, train_json, val_json, images, val)
    if classes is not None and data.classes != classes:
        raise UserError(
            f"The checkpoint knows {len(classes)} classes ({', '.join(classes[:3])} ...) and {root} has "
            f"{len(data.classes)} ({', '.join(data.classes[:3])} ...); they must be the same."
        )
    return data


def find_cityscapes(root: Path, val: str) -> Instances:
    """leftImg8bit/<part>/<city>/*.png with gtFine/... instanceIds; `extra` is train_extra. No label
    is opened here."""

    def part(name: str) -> list[Photo]:
        found, end = [], "_leftImg8bit.png"
        for number, image in enumerate(
            sorted((root / "leftImg8bit" / name).glob("*/*" + end)), start=1
        ):
            stem = image.name.removesuffix(end)
            label = root / "gtFine" / name / image.parent.name / f"{stem}_gtFine_instanceIds.png"
            found.append(Photo(stem, image, number, label=label))
        if not found and name != "train_extra":
            raise missing("cityscapes", root, f"leftImg8bit/{name}/<city>/*{end}")
        return found

    train, score, extra = part("train"), part(val), part("train_extra")
    for photo in score:
        need(photo.label)
    return Instances(
        "cityscapes",
        root,
        list(CITYSCAPES_THINGS.values()),
        list(CITYSCAPES_THINGS),
        train,
        score,
        [bare(photo) for photo in extra],
    )


def find_coco(
    name: str, root: Path, train_json: str, val_json: str, images: str, val: str
) -> Instances:
    """COCO's or LVIS's files: annotations/ (see FILES) and images/, images/<part>, <part>2017,
    <part> or the folder that coco_url or file_name names. Pictures without an object but crowds go
    from `train` to `extra`, where those of images/unlabeled are, too."""

    def json_file(flag: str, value: str, part: str, *first: Path) -> Path:
        names = [
            f"annotations/{form.format(part)}.json"
            for form in FILES
            if name != "lvis" or form.startswith("lvis")
        ]
        paths = (
            [Path(value), root / value, root / "annotations" / value]
            if value
            else [*first, *(root / n for n in names)]
        )
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise missing(
                name, root, f"{flag} {value}" if value else f"{', '.join(names)} (or give {flag})"
            )
        return path

    train_path = json_file("--train-json", train_json, "train")
    beside = train_path.with_name(train_path.name.replace("train", val))
    val_path = json_file("--val-json", val_json, val, *[beside] * (beside != train_path))
    folder = (
        next((p for p in (Path(images), root / images) if p.is_dir()), None)
        if images
        else root / "images"
    )
    if folder is None:
        raise missing(name, root, f"--images {images}")
    content = {path: read_json(path) for path in (train_path, val_path)}  # one file may be both
    kinds = [classes_of(content[path], path) for path in (train_path, val_path)]
    for a, b in itertools.zip_longest(*(kind.items() for kind in kinds)):
        if a != b:
            raise UserError(
                f"The categories of {train_path} and {val_path} differ (first {a} and {b}); both must list "
                f"the same ids with the same names."
            )
    ids, classes = list(kinds[0]), list(kinds[0].values())
    index = {category: place for place, category in enumerate(ids)}
    bases = [folder] if images else [folder, root]
    train, score = (
        photos_of(content[path], path, index, finder(bases, part))
        for path, part in ((train_path, "train"), (val_path, val))
    )
    for path, photos in ((train_path, train), (val_path, score)):
        if not any(singles(photo) for photo in photos):
            raise UserError(
                f"{path} has no object with a mask, so there is nothing to learn from or to score on."
            )
    extra = [bare(photo) for photo in train if not singles(photo)]
    if (folder / "unlabeled").is_dir():
        extra += [Photo(path.name, path) for path in image_files(folder / "unlabeled")]
    data = Instances(
        name,
        root,
        classes,
        ids,
        [p for p in train if singles(p)],
        score,
        extra,
        train_path,
        val_path,
    )
    frequency = {
        record["id"]: record.get("frequency") for record in content[train_path]["categories"]
    }
    if None not in frequency.values():
        data.lvis, data.frequency = True, [frequency[i] for i in ids]
        data.negative, data.partial = said_of(score)
    return data


def scored_on(data: Instances, photos: list[Photo]) -> Instances:
    """The same data set, but scored on these pictures, which have labels: such as training pictures
    that are held out. What is true is then made of the Photos (data.ap.truth_of)."""
    negative, partial = said_of(photos) if data.lvis else ({}, {})
    return replace(data, val=list(photos), val_json=None, negative=negative, partial=partial)


def photometric_distortion(image: Tensor, g: np.random.Generator) -> Tensor:
    """SSD's colour distortion of (3, H, W) uint8: brightness, contrast, saturation and hue, each
    half of the time."""

    def on() -> bool:
        return bool(g.random() < 0.5)

    def contrast(x: np.ndarray) -> np.ndarray:
        return (
            np.clip(x.astype(np.float32) * g.uniform(0.5, 1.5), 0, 255).astype(np.uint8)
            if on()
            else x
        )

    x = image.permute(1, 2, 0).numpy()
    if on():
        x = np.clip(x.astype(np.float32) + g.uniform(-32, 32), 0, 255).astype(np.uint8)
    contrast_first = on()
    x = contrast(x) if contrast_first else x
    hsv = np.array(Image.fromarray(x).convert("HSV")).astype(np.float32)
    hsv[..., 1] = np.clip(hsv[..., 1] * (g.uniform(0.5, 1.5) if on() else 1), 0, 255)
    hsv[..., 0] = (hsv[..., 0] + (g.integers(-18, 19) * 256 / 180 if on() else 0)) % 256
    x = np.array(
        Image.frombytes("HSV", (x.shape[1], x.shape[0]), hsv.astype(np.uint8).tobytes()).convert(
            "RGB"
        )
    )
    x = x if contrast_first else contrast(x)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()


# ---------------------------------------------------------------------------- labeled and unlabeled
@dataclass
class Chosen:
    """Which pictures a run learns from. `text` says it to the user, `fingerprint` identifies the
    labeled list. The unlabeled ones carry no labels."""

    labeled: list[Photo]
    unlabeled: list[Photo]
    text: str
    fingerprint: str


def choose(
    data: Instances,
    split: str,
    split_seed: int,
    unlabeled: str,
    pool: str,
    needed: bool,
    balanced: bool = True,
) -> Chosen:
    """The labeled pictures that `split` names, and the unlabeled ones; UserError when there are
    none and they are `needed`.

    `split`: all; a list file, or a COCO file of the labeled pictures; random:183, random:5%, drawn
    with `split_seed`, `balanced` over the classes, or not, which keeps a long tail; a published
    list of COCO or Cityscapes (elsewhere 183 or 5% mean random:). COCO's are Unbiased Teacher's,
    whose draw is `split_seed` (0 to 9; its configurations use 1) and whose numbers are places in
    `data.train`, sorted by image id. `unlabeled`: a folder or a list. Else `pool` "all" takes all
    training pictures (labeled ones too, as the released code), "remaining" the others, and both
    `data.extra` (Cityscapes' train_extra with --split all only)."""
    official = (
        data.name == "cityscapes"
        or data.name == "coco"
        and not data.lvis
        and (len(data.train) == COCO_IMAGES or supervision(data).is_file())
    )
    if split == "all":
        labeled, origin = data.train, "all labels"
    elif Path(split).is_file():
        labeled, origin = listed(Path(split), data), f"the list {split}"
    elif official and not split.startswith("random:"):
        labeled, origin = published(data, split, split_seed)
    else:
        try:
            number = splits.count(split.removeprefix("random:"), len(data.train))
            able = {
                p.name: p
                for p in labels_read(
                    [p for p in data.train if p.label is None or p.label.is_file()]
                )
            }
            held = (lambda name: singles(able[name])) if balanced else None
            names = splits.draw(list(able), number, split_seed, held)
        except splits.SplitError as error:
            raise UserError(f"--split {split}: {error}") from None
        labeled, origin = (
            [able[name] for name in names],
            f"{number} drawn with --split-seed {split_seed}",
        )
    taken = {p.image for p in labeled} if pool == "remaining" else set()
    rest = [p for p in data.train if p.image not in taken]
    rest += data.extra if data.name != "cityscapes" or split == "all" else []
    if unlabeled:
        rest = unlabeled_photos(unlabeled, data)
    if needed and not rest:
        raise UserError(
            f"--split {split} leaves no unlabeled image; take a smaller one, name some with --unlabeled, "
            f"or learn from labels alone."
        )
    names = [splits.short_id(p.name, data.name) for p in labeled]
    fingerprint, known = splits.fingerprint(names), splits.published_name(names)
    labeled = [p for p in labels_read(labeled) if singles(p)]
    if not labeled:
        raise UserError(
            f"--split {split}: none of its images has an object, so there is nothing to learn from."
        )
    text = (
        f"{len(labeled)} labeled images ({origin}{f', known as {known}' if known else ''}, fingerprint "
        f"{fingerprint[:12]}) and {len(rest)} unlabeled ones"
    )
    if len(labeled) < len(names):
        text += f"; {len(names) - len(labeled)} listed ones without an object are left out"
    return Chosen(labeled, [bare(p) for p in rest], text, fingerprint)


def labels_read(photos: list[Photo]) -> list[Photo]:
    """The pictures with their objects, which Cityscapes has in the label PNGs."""
    if all(p.things is not None for p in photos):
        return photos
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda p: opened(p._replace(label=need(p.label)))[0], photos))


def supervision(data: Instances) -> Path:
    return data.root / "splits" / "unbiased_teacher" / "COCO_supervision.txt"


def published(data: Instances, split: str, split_seed: int) -> tuple[list[Photo], str]:
    """The pictures of a published list that lies beside the data, and where it comes from."""
    family, known = PUBLISHED[data.name]
    folder, have = data.root / "splits" / family, {}
    if data.name == "cityscapes":
        have = {path.parent.name: path for path in sorted(folder.glob("*/labeled.txt"))}
        if splits.folder_name(split) in have:
            path = have[splits.folder_name(split)]
            return listed(path, data), f"the published list {family}/{split}"
    elif supervision(data).is_file():
        try:  # "5.0" -> draw "1" -> [12, 5, ...]
            have = {
                f"{float(key):g}%": draws
                for key, draws in json.loads(supervision(data).read_text()).items()
            }
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{supervision(data)} cannot be read ({error}); fetch it again."
            ) from None
    if split in have and len(data.train) != COCO_IMAGES:
        raise UserError(
            f"The published list {split} is of the {COCO_IMAGES} images of train2017 that hold an object, "
            f"but {data.train_json} has {len(data.train)}; draw one with --split random:{split}."
        )
    if split in have and str(split_seed) not in have[split]:
        raise UserError(
            f"--split {split} is published for --split-seed {', '.join(have[split])}, not {split_seed}."
        )
    if split in have:
        return (
            [data.train[place] for place in have[split][str(split_seed)]],
            f"the published list {family}/{split}, draw {split_seed}",
        )
    fetch = f"`python -m data.download splits --dataset {data.name} --root {data.root}`"
    raise UserError(
        f"There is no split '{split}' in {folder} (there: {', '.join(have) or 'none'}; published: {known}"
        f"); fetch the published lists with {fetch}, draw one with --split random:"
        f"{split if split[:1].isdigit() else '5%'}, or name a list file."
    )


def listed(path: Path, data: Instances, files: bool = False) -> list[Photo]:
    """The pictures that a list, or a COCO file, names: all by file name, or all by its stem, or all
    by id. Those without labels are left out; but with `files` they stay, and paths under the root
    or beside the list count, too."""
    try:
        if path.suffix == ".json":
            entries = [str(r.get("file_name") or r.get("id")) for r in read_json(path)["images"]]
        else:
            entries = [entry for entry, _ in splits.read_list(path)]
    except splits.SplitError as error:
        raise UserError(str(error)) from None
    best: list[Photo | None] = []
    for kind in ("name", "stem", "id"):
        table: dict[str, Photo | None] = {}
        for photo in data.train + data.extra:
            key = str(photo.id) if kind == "id" else photo.name
            key = splits.short_id(key, data.name) if kind == "stem" else key
            table[key] = None if key in table else photo  # two of one stem: neither
        found = [table.get(splits.short_id(e, data.name) if kind == "stem" else e) for e in entries]
        if kind == "name" or found.count(None) < best.count(None):
            best = found
    for i, entry in enumerate(entries):  # a path is that file, whatever else has its name
        paths = (base / entry for base in (data.root, path.parent, Path()))
        wanted = files and (best[i] is None or "/" in entry and best[i].name != entry)
        if wanted and (image := next((p for p in paths if p.is_file()), None)):
            best[i] = Photo(entry, image)
    if None in best:
        raise UserError(
            f"{best.count(None)} of {len(best)} images listed in {path} are not among the training images "
            f"of {data.root}, for example {entries[best.index(None)]}; is --root right?"
        )
    return [photo for photo in best if files or photo.things is not None or photo.label is not None]


def unlabeled_photos(text: str, data: Instances, flag: str = "--unlabeled") -> list[Photo]:
    """What a flag names: a folder of images, also in folders below it, or a list of them."""
    path = Path(text)
    if path.is_file():
        return listed(path, data, files=True)
    found = [
        Photo(str(p.relative_to(path)), p)
        for p in sorted(path.rglob("*"))
        if p.suffix.lower() in IMAGES
    ]
    if not found:
        raise UserError(
            f"{flag} {path}: {'no images in that folder' if path.is_dir() else 'no folder or list'}."
        )
    for photo in found:
        # surrogates: not UTF-8
        if not str(photo.image).isascii() and "\\udc" in ascii(str(photo.image)):
            raise UserError(
                f"{flag} {path}: the file name {ascii(photo.name)} is not UTF-8; rename it."
            )
    return found


def repeat_factors(photos: list[Photo], num_classes: int, threshold: float) -> np.ndarray:
    """How often each picture comes in a pass, (len(photos),) float64, 1 or more: of its classes the
    largest r(c) = max(1, sqrt(threshold / f_c)), f_c the share of `photos` that hold class c (LVIS,
    arXiv 1908.03195)."""
    held = [sorted(singles(photo)) for photo in photos]
    counts = np.bincount(
        np.array([c for classes in held for c in classes], np.int64), minlength=num_classes
    )
    factors = np.maximum(1, np.sqrt(threshold * len(photos) / np.maximum(counts, 1)))
    return np.array([factors[classes].max(initial=1) for classes in held])


# ------------------------------------------------------------------------------------------ samples
def load(photo: Photo) -> Tensor:
    """(3, H, W) uint8; it must have the size that its labels have."""
    image = read_image(photo.image)
    if photo.things is not None and image.shape[-2:] != (photo.height, photo.width):
        raise RankError(
            f"{photo.image} has {image.shape[2]}x{image.shape[1]} pixels but its annotations are for "
            f"{photo.width}x{photo.height}; they must agree."
        )
    return image


class Target(NamedTuple):
    """Objects of one image, true or pseudo, on its crop at any resolution."""

    labels: Tensor  # (N,) int64
    masks: Tensor  # (N, H', W') uint8 or bool


class Batch(NamedTuple):
    """Pictures (B, 3, H, W) uint8: `images` are learned from; `weak` is what the teacher sees of
    them, if anything."""

    images: Tensor
    weak: Tensor | None
    targets: list[Target]  # of labeled pictures
    skipped: Tensor  # (B,) how many broken images were passed over


def collate(samples: list[tuple[tuple, int]]) -> Batch:
    """What Views gave, each (images, weak or None, target or None) and a count -> a batch."""
    views, skipped = zip(*samples, strict=True)
    images, weak, targets = zip(*views, strict=True)
    return Batch(
        torch.stack(images),
        None if weak[0] is None else torch.stack(weak),
        [t for t in targets if t is not None],
        torch.tensor(skipped),
    )


def to_device(batch: Batch | None, device: torch.device) -> Batch | None:
    def move(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device, non_blocking=True)

    return (
        None
        if batch is None
        else Batch(
            move(batch.images),
            move(batch.weak),
            [Target(move(t.labels), move(t.masks)) for t in batch.targets],
            move(batch.skipped),
        )
    )


class Views(Dataset):
    """Training samples by key (index, step, sample): what `augment(image (3, H, W) uint8, photo,
    rng)` gives, and how many broken images were passed over."""

    def __init__(self, photos: list[Photo], augment: Callable, seed: int, name: str):
        self.photos, self.augment, self.seed, self.name = photos, augment, seed, name

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, place: tuple[int, int, int]) -> tuple:
        index, step, sample = place
        for skipped in range(len(self.photos)):
            photo = self.photos[(index + skipped) % len(self.photos)]
            try:
                image = load(photo)
            except BrokenImage as error:
                warnings.warn(f"{error}; training goes on without it", stacklevel=2)
                continue
            return self.augment(image, photo, rng(self.seed, self.name, step, sample)), skipped
        raise RankError(
            f"None of the {len(self.photos)} {self.name} images can be read, such as {photo.image}."
        )


def score_loader(photos: list[Photo], world: World, workers: int) -> Iterable[tuple[int, Tensor]]:
    """(index, picture (3, H, W) uint8), one at a time, each on exactly one process, under a
    progress bar that goes when it is done (without a terminal: a line a minute). A broken image
    stops the evaluation, which needs every one."""
    from tqdm import tqdm

    pictures = DataLoader(
        range(world.rank, len(photos), world.size),
        batch_size=None,
        generator=torch.Generator(),
        collate_fn=lambda index: (index, load(photos[index])),
        **helpers(min(workers, 4)),
    )
    return tqdm(
        pictures,
        desc="scoring",
        unit="image",
        leave=False,
        disable=not world.main,
        dynamic_ncols=True,
        **({"mininterval": 0.5} if sys.stderr.isatty() else {"mininterval": 60, "delay": 60}),
    )
