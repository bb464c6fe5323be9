"""Annotated objects as they lie on disk (COCO, LVIS and own JSON files, Cityscapes, the embedded
set): which pictures a run learns from, their masks under a joint geometry, and in what order they
come.

As in common/datasets.py, order and augmentation depend on (seed, step, sample) alone: not on
workers, processes or restarts. Labels are class indices 0..K-1, the places in the sorted category
ids, always."""

import functools
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import datasets, transforms
from common.distributed import World, rng
from common.runs import RankError, UserError
from data import shapes, splits
from data.find import missing, need
from data.read import IMAGES, BrokenImage, helpers, image_files, read_image

CITYSCAPES_THINGS = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}  # the other classes have no single objects
# annotations/<one of them>.json
FILES = ("{}", "instances_{}", "instances_{}2017", "lvis_{}", "lvis_v1_{}")
COCO_IMAGES = 117266  # of train2017 that hold an object; 118,287 in all
PUBLISHED = {
    "cityscapes": ("guided_distillation", "5%, 10%, 20%, 30%"),
    "coco": ("unbiased_teacher", "0.01%, 0.1%, 0.5%, 1%, 2%, 5%, 10%"),
}


class Thing(NamedTuple):
    """One annotated object as on disk, in class `category`; `area` in pixels as the file says, 0
    where it does not.

    `segmentation`: polygons, float64 arrays x, y, x, y, ... in pixels; or pycocotools' run lengths;
    or the object's value in a Cityscapes instanceIds PNG. A crowd is a region of many objects: no
    target, and ignored when scoring."""

    category: int
    segmentation: list | dict | int
    crowd: bool
    area: float


class Photo(NamedTuple):
    """One picture. `things` is None where no label may be opened, or where it is still to be read
    from `label`, a Cityscapes instanceIds PNG (None elsewhere). `id` is -1 and the size in pixels 0
    where no file gives them.

    LVIS says of a picture which classes are known to be absent (`negative`), and of which only some
    objects are annotated (`partial`), class indices; elsewhere both are empty."""

    name: str
    image: Path
    id: int = -1
    height: int = 0
    width: int = 0
    things: tuple[Thing, ...] | None = None
    label: Path | None = None
    negative: tuple[int, ...] = ()
    partial: tuple[int, ...] = ()


@dataclass
class Instances:
    """A data set as found on disk, pictures by ascending id. `ids` are the category ids of the
    `classes`.

    LVIS files add the `frequency` of each class (r, c, f, in training pictures) and, of each scored
    image id, what its Photo says of `negative` and `partial` classes. `val_json` is the file of
    `val`, or None (see `scored_on`)."""

    name: str
    root: Path
    classes: list[str]
    ids: list[int]
    train: list[Photo]
    val: list[Photo]
    extra: list[Photo]  # no annotations, or none but crowds
    train_json: Path | None = None
    val_json: Path | None = None
    lvis: bool = False
    frequency: list[str] | None = None
    negative: dict[int, list[int]] = field(default_factory=dict)
    partial: dict[int, list[int]] = field(default_factory=dict)


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
    if name == "shapes":
        root = shapes.make_things(root / "things")
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


def said_of(photos: list[Photo]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """`negative` and `partial` of Instances that are scored on these pictures."""
    return {p.id: list(p.negative) for p in photos}, {p.id: list(p.partial) for p in photos}


def scored_on(data: Instances, photos: list[Photo]) -> Instances:
    """The same data set, but scored on these pictures, which have labels: such as training pictures
    that are held out. What is true is then made of the Photos (data.ap.truth_of)."""
    negative, partial = said_of(photos) if data.lvis else ({}, {})
    return replace(data, val=list(photos), val_json=None, negative=negative, partial=partial)


def singles(photo: Photo) -> set[int]:
    """The classes of the objects of a picture that are no crowds."""
    return {thing.category for thing in photo.things or () if not thing.crowd}


def bare(photo: Photo) -> Photo:
    """The picture without its labels, so that none can be opened."""
    return photo._replace(things=None, label=None, negative=(), partial=())


def read_json(path: Path) -> dict:
    """A COCO or LVIS file, each annotation a tuple (image id, category id, segmentation, crowd,
    area); UserError when it is none. Annotations become small while they are read, or COCO's train
    file would fill many times its size."""

    def lean(record: dict):
        if not {"image_id", "category_id", "segmentation"} <= record.keys():
            return record
        try:
            return (
                record["image_id"],
                record["category_id"],
                outline(record["segmentation"]),
                bool(record.get("iscrowd")),
                float(record.get("area", 0)),
            )
        except (TypeError, ValueError, KeyError, OverflowError):
            raise UserError(
                f"{path}: the annotation {record.get('id')} cannot be read; its segmentation must be "
                f"polygons or run lengths, and its area a number."
            ) from None

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=lean)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); fetch or write it again."
        ) from None
    for key, kind in (("images", dict), ("categories", dict), ("annotations", tuple)):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"{path} is no COCO or LVIS file: it has no list of {key}; name another."
            )
        if not all(isinstance(record, kind) for record in content[key]):
            needs = "image_id, category_id and segmentation" if kind is tuple else "named fields"
            raise UserError(f"{path}: each of its {key} needs {needs}; correct the file.")
    return content


def outline(segmentation: list | dict) -> list[np.ndarray] | dict:
    """Polygons as arrays, a quarter of the memory of lists, or compressed run lengths. As in
    Detectron2, a polygon of an odd count or of fewer than six numbers is left out; an object
    without any other is no object."""
    if isinstance(segmentation, dict):
        listed = isinstance(segmentation["counts"], list)
        return (
            coco_mask.frPyObjects(segmentation, *segmentation["size"]) if listed else segmentation
        )
    return [
        np.array(p, np.float64)
        for p in segmentation
        if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0
    ]


def classes_of(content: dict, path: Path) -> dict[int, str]:
    """Category id -> name, by ascending id."""
    try:
        found = dict(
            sorted((record["id"], str(record["name"])) for record in content["categories"])
        )
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: each of its categories needs a number as id, and a name; correct the file."
        ) from None
    if not found or not len(content["categories"]) == len(found) == len(set(found.values())):
        raise UserError(
            f"{path}: its categories need ids and names that all differ, and there must be one at least."
        )
    return found


def finder(bases: list[Path], part: str) -> Callable[[dict], Path | None]:
    """Record of an image -> its file. Folders are listed once: asking for each file is slow on a
    network disk. Pictures of a part other than train and val (tune) are looked for among the
    training pictures, too."""

    @functools.cache
    def files(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def locate(record: dict) -> Path | None:
        url = (record.get("coco_url") or "").split("/")
        for name in filter(None, (record.get("file_name"), "/".join(url[-2:]), url[-1])):
            for place in places:
                folder, file = os.path.split(os.path.join(place, name))
                if file in files(folder):
                    return Path(folder, file)
        return None

    parts = [
        "",
        *(
            p + year
            for p in dict.fromkeys([part] + ["train"] * (part != "val"))
            for year in ("", "2017")
        ),
    ]
    places = [base / p for base in bases for p in parts]
    return locate


def photos_of(content: dict, path: Path, index: dict[int, int], locate: Callable) -> list[Photo]:
    """The pictures of a file by ascending id, with their objects; UserError where it contradicts
    itself or the disk."""

    def places(record: dict, key: str) -> tuple[int, ...]:
        return tuple(index[category] for category in record.get(key) or () if category in index)

    try:
        photos = {
            r["id"]: Photo(
                r.get("file_name") or "/".join(r["coco_url"].split("/")[-2:]),
                locate(r),
                r["id"],
                int(r["height"]),
                int(r["width"]),
                negative=places(r, "neg_category_ids"),
                partial=places(r, "not_exhaustive_category_ids"),
            )
            for r in content["images"]
        }
        photos = dict(sorted(photos.items()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: an image lacks its id, height, width, or file_name ({error}); correct it."
        ) from None
    sized = {p.name for p in photos.values() if min(p.height, p.width) > 0}
    if not len(content["images"]) == len(photos) == len(sized):
        raise UserError(
            f"{path} lists an image twice or without a size; ids and file names must differ."
        )
    lost = [p.name for p in photos.values() if p.image is None]
    if lost:
        raise UserError(
            f"{len(lost)} of the {len(photos)} images of {path} are not on disk, for example {lost[0]}; "
            f"name the folder that holds them with --images (layout in data/README.md)."
        )
    things, left_out = {number: [] for number in photos}, 0
    for image, category, segmentation, crowd, area in content["annotations"]:
        if image not in things or category not in index:
            unknown = f"image {image}" if image not in things else f"category {category}"
            raise UserError(
                f"{path}: an annotation is of {unknown}, which the file does not list; correct the file."
            )
        if segmentation:
            things[image].append(Thing(index[category], segmentation, crowd, area))
        left_out += not segmentation
    if left_out:
        warnings.warn(
            f"{left_out} annotations of {path} have no polygon of three points; they are left out",
            stacklevel=2,
        )
    return [photo._replace(things=tuple(things[number])) for number, photo in photos.items()]


# -------------------------------------------------------------------------------------------- masks
class Window(NamedTuple):
    """Joint geometry: flip left-right, resize to `size` (height, width), then the window of size
    `out` at (top, left), which may reach over every border."""

    flip: bool
    size: tuple[int, int]
    top: int
    left: int
    out: tuple[int, int]


def cut_out(image: Tensor, window: Window, fill: int) -> Tensor:
    """(3, H, W) uint8 -> the window of it, (3, h, w); antialiased, `fill` outside."""
    image = image.flip(-1) if window.flip else image
    image = F.interpolate(image[None], size=window.size, mode="bilinear", antialias=True)[0]
    out, _, valid = transforms.crop(image, None, window.top, window.left, *window.out)
    return torch.where(valid, out, fill)


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


def masks_of(
    photo: Photo, data: Instances, window: Window | None = None, crowds: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N,) int64, masks (N, h, w) uint8 0/1 and whether each is a crowd (N,) bool, in the
    file's order; empty masks are kept. Without `window` in the picture's own frame; without
    `crowds` no crowds.

    Polygons are moved as coordinates and drawn on the window, so they stay sharp; run lengths and
    instanceIds are decoded, and each pixel of the window takes the nearest one. A RankError names
    the image that cannot be drawn."""
    assert photo.things is not None or photo.label is not None, f"{photo.name} has no labels"
    photo, ids = opened(photo)
    whole = (photo.height, photo.width)
    window = window or Window(False, whole, 0, 0, whole)
    things = [thing for thing in photo.things if crowds or not thing.crowd]
    masks = np.zeros((len(things), *window.out), np.uint8)
    ids = None if ids is None else seen(ids, window)
    for mask, (category, segmentation, *_) in zip(masks, things, strict=True):
        try:
            if isinstance(segmentation, list):
                polygons = [moved(np.asarray(p, np.float64), whole, window) for p in segmentation]
                mask[:] = coco_mask.decode(
                    coco_mask.merge(coco_mask.frPyObjects(polygons, *window.out))
                )
            elif isinstance(segmentation, dict):
                if list(segmentation["size"]) != list(whole):
                    raise ValueError(
                        f"its run lengths are for {segmentation['size']}, height and width"
                    )
                mask[:] = seen(coco_mask.decode(outline(segmentation)), window)
            else:
                mask[:] = ids == segmentation
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise RankError(
                f"An annotation of {photo.image} ({data.classes[category]}, {photo.width}x{photo.height} "
                f"pixels) cannot be drawn ({error}); correct it or take it out."
            ) from None
    return (
        torch.tensor([thing.category for thing in things], dtype=torch.int64),
        torch.from_numpy(masks),
        torch.tensor([thing.crowd for thing in things], dtype=torch.bool),
    )


def moved(polygon: np.ndarray, whole: tuple[int, int], window: Window) -> np.ndarray:
    """Coordinates x, y, x, y, ... in a picture of size `whole` (height, width) -> in the window."""
    if not np.abs(polygon).max() < 1e6:  # drawing takes memory for every pixel of an edge
        raise ValueError("a coordinate is not finite, or far outside")
    out = np.empty_like(polygon)
    out[0::2] = (whole[1] - polygon[0::2] if window.flip else polygon[0::2]) * (
        window.size[1] / whole[1]
    ) - window.left
    out[1::2] = polygon[1::2] * (window.size[0] / whole[0]) - window.top
    return out


def seen(values: np.ndarray, window: Window) -> np.ndarray:
    """(H, W) -> the window (h, w) of it, nearest pixel with half-pixel centres, 0 outside of the
    picture."""
    places = []
    for n, size, start, number in zip(
        values.shape, window.size, (window.top, window.left), window.out, strict=True
    ):
        first = max(start, 0)
        at = np.arange(first, max(min(start + number, size), first))
        places.append(
            (slice(first - start, first - start + len(at)), (2 * at + 1) * n // (2 * size))
        )
    (rows, ys), (columns, xs) = places
    out = np.zeros(window.out, values.dtype)
    out[rows, columns] = values[ys[:, None], values.shape[1] - 1 - xs if window.flip else xs]
    return out


def opened(photo: Photo) -> tuple[Photo, np.ndarray | None]:
    """The picture with its objects and size, and its instanceIds (H, W) int32 where it has a label
    PNG.

    Of their values, 24000 to 33999 are objects of the class value // 1000; the same classes under
    1000 are crowds."""
    if photo.label is None:
        return photo, None
    ids = read_ids(photo.label)
    counts, classes = np.bincount(ids.ravel()), list(CITYSCAPES_THINGS)
    things = [
        Thing(classes.index(kind), value, value < 1000, float(counts[value]))
        for value in np.flatnonzero(counts).tolist()
        if (kind := value // 1000 if value >= 1000 else value) in CITYSCAPES_THINGS
    ]
    return photo._replace(things=tuple(things), height=ids.shape[0], width=ids.shape[1]), ids


def read_ids(path: Path) -> np.ndarray:
    """(H, W) int32 of a Cityscapes instanceIds PNG."""
    try:
        with Image.open(path) as file:
            mode, ids = file.mode, np.array(file).astype(np.int32)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise RankError(
            f"The label {path} cannot be read ({error}); fetch or make it again."
        ) from None
    if mode not in ("I", "I;16", "I;16B", "L") or ids.min() < 0:
        raise RankError(
            f"The label {path} (mode {mode}) is no map of instance ids, a single-channel 16-bit PNG."
        )
    return ids


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


def hold_out(
    photos: list[Photo], share: float, seed: int, stratify: bool = False, num_classes: int = 0
) -> tuple[list[Photo], list[Photo]]:
    """The pictures to learn from and those held out, both in the order given. round(share * n) are
    held out, but one at least and one at most not; which ones, depends on the seed and the names
    alone.

    With `stratify` a class (of `num_classes`) that two pictures have, or more, comes into both
    parts where that is possible: the rarest class not yet held out chooses first, and never the
    last picture to learn a class from."""
    if len(photos) < 2:
        raise UserError(
            f"Of {len(photos)} labeled images none can be held out; a part to tune on needs two or more."
        )
    number = min(max(round(share * len(photos)), 1), len(photos) - 1)
    ranked = sorted(range(len(photos)), key=lambda i: photos[i].name)
    order = [ranked[i] for i in rng(seed, "hold out").permutation(len(photos))]
    if stratify:
        order = [
            order[i]
            for i in spread([sorted(singles(photos[i])) for i in order], num_classes, number)
        ]
    chosen = set(order[:number])
    return (
        [p for i, p in enumerate(photos) if i not in chosen],
        [p for i, p in enumerate(photos) if i in chosen],
    )


def spread(held: list[list[int]], num_classes: int, number: int) -> list[int]:
    """For pictures that hold these classes, their places, with the `number` to hold out first (see
    `hold_out`); where the classes leave a choice, earlier pictures are taken first."""
    counts = np.bincount(
        np.array([c for classes in held for c in classes], np.int64), minlength=num_classes
    )
    left, taken = counts.copy(), {}  # a dict keeps the order
    homes: list[list[int]] = [[] for _ in counts]
    for i, classes in enumerate(held):
        for c in classes:
            homes[c].append(i)

    def take(places: Iterable[int], most: int) -> None:
        for least in (0, 2):  # a class's only picture only if there is no other
            for i in places:
                if (
                    most > 0
                    and i not in taken
                    and all(left[c] > 1 or counts[c] < least for c in held[i])
                ):
                    taken[i] = True
                    left[held[i]] -= 1
                    most -= 1

    for c in np.argsort(counts, kind="stable"):
        if counts[c] > 1 and left[c] == counts[c]:
            take(homes[c], 1)
    take(range(len(held)), number - len(taken))
    return [*taken, *(i for i in range(len(held)) if i not in taken)]


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


class Stream(datasets.Stream):
    """Batches of keys (index, step, sample) of this process for steps start..stop: passes over n
    pictures, each in an order of its own. With `factors` (n,), a pass holds a picture floor(r) or
    floor(r) + 1 times, on average r times."""

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        name: str,
        start: int,
        stop: int,
        world: World,
        factors: np.ndarray | None = None,
    ):
        super().__init__(n, batch_size, seed, name, start, stop, world)
        self.factors = factors

    def passes(self, place: int) -> Iterator[tuple[int, np.ndarray]]:
        """(where it begins, its order) of each pass, from one at or before the sample `place` of
        the run."""
        turn = 0 if self.factors is not None else place // self.n
        begin = turn * self.n
        while True:
            draw, order = rng(self.seed, "order", self.name, turn), self.n
            if self.factors is not None:
                whole = np.floor(self.factors).astype(np.int64)
                order = np.arange(self.n).repeat(
                    whole + (draw.random(self.n) < self.factors - whole)
                )
            order = draw.permutation(order)
            yield begin, order
            turn, begin = turn + 1, begin + len(order)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        local = self.batch_size // self.world.size
        mine = range(self.world.rank * local, (self.world.rank + 1) * local)
        passes = self.passes(self.steps.start * self.batch_size + mine.start)
        begin, order = next(passes)
        for step in self.steps:
            keys = []
            for sample in mine:
                while (place := step * self.batch_size + sample - begin) >= len(order):
                    begin, order = next(passes)
                keys.append((int(order[place]), step, sample))
            yield keys


def stream(
    views: Views,
    batch_size: int,
    start: int,
    stop: int,
    world: World,
    workers: int,
    factors: np.ndarray | None = None,
    collate: Callable = list,
) -> Iterator:
    """What `collate` makes of this process's samples (sample, skipped) of each step start..stop;
    nothing is read before the first is asked for. Torch's own generator is left alone."""
    if start < stop:
        keys = Stream(len(views), batch_size, views.seed, views.name, start, stop, world, factors)
        yield from DataLoader(
            views,
            batch_sampler=keys,
            collate_fn=collate,
            generator=torch.Generator(),
            pin_memory=world.device.type == "cuda",
            **helpers(workers),
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
