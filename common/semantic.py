"""Semantic data sets: what lies where on disk (VOC with SBD, Cityscapes, plain folders, and the
embedded set, which lies there as VOC does), and which images a run learns from.

Layouts are described in data/README.md; --split and --unlabeled are read here."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from common import splits
from common.distributed import World, rng
from common.errors import RankError, UserError
from common.files import (
    BrokenImage,
    image_files,
    images_below,
    read_image,
    read_map,
    read_text,
    turned_note,
)
from common.loading import helpers

IGNORE = 255  # in label maps: a pixel of no class

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()

CITYSCAPES_CLASSES = [
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
]

# The value in a labelIds PNG of each of these classes, in their order.
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]

# Class indices made of labelIds by Cityscapes' own scripts. A file's name says which it holds.
TRAIN_IDS = "_labelTrainIds.png"

# What PIL calls single-channel pictures of whole numbers, of any number of bits.
LABEL_MODES = ("P", "L", "1", "I", "I;16", "I;16B", "I;16L")


class Picture(NamedTuple):
    """One image on disk; `label` is None when there is no label file, or none may be opened."""

    name: str
    image: Path
    label: Path | None


@dataclass
class Segmentation:
    """A data set as found on disk. `to_class` (256,) maps the values of a label file to class
    indices; None leaves them as they are."""

    name: str
    root: Path
    classes: list[str]
    train: dict[str, Picture]
    val: list[Picture]
    extra: list[Picture] = field(default_factory=list)  # images that never had labels
    to_class: np.ndarray | None = None


# ------------------------------------------------------------------------------------------ reading
def read_label(path: Path, data: Segmentation) -> Tensor:
    """(H, W) uint8 class indices. Palette files are read as indices, never as colours or grey
    values.

    Raises UserError (RankError: one process may meet it alone) when a value is no class."""
    return torch.from_numpy(classes_of(read_values(path), path, data))


def read_values(path: Path) -> np.ndarray:
    """(H, W) integers as they lie in a label file; RankError when it is none."""
    values, mode = read_map(path)
    if values.ndim != 2 or mode not in LABEL_MODES:
        kind = "holds numbers with a fraction" if mode == "F" else "is a colour picture"
        raise RankError(
            f"The label {path} {kind} (mode {mode}); save it as a single-channel PNG of class "
            f"indices."
        )
    return values


def classes_of(values: np.ndarray, path: Path, data: Segmentation) -> np.ndarray:
    """The values of a label file (of any shape) as uint8 class indices; RankError when one is no
    class. They are compared as they are, of whatever type, before they become 8 bits."""
    number = len(data.classes)
    if data.to_class is not None and not path.name.endswith(TRAIN_IDS):
        wrong = (values < 0) | (values > 255)
        if wrong.any():
            raise RankError(
                f"The label {path} holds the value {int(values[wrong][0])}, which is no label id "
                f"(0 to 255); it may be of another kind (instanceIds): fetch or make it again."
            )
        return through_table(values.astype(np.uint8), data.to_class)
    wrong = (values < 0) | ((values >= number) & (values != IGNORE))
    if wrong.any():
        raise RankError(
            f"The label {path} holds the value {int(values[wrong][0])}, but there are {number} "
            f"classes (0 to {number - 1}, 255 to ignore); correct the file or classes.txt."
        )
    return values.astype(np.uint8)


def through_table(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[values]` of 8 bits on both sides, without an index of eight bytes for each of them."""
    mapped = bytearray(values.tobytes().translate(table.tobytes()))
    return np.frombuffer(mapped, np.uint8).reshape(values.shape)


def load_picture(
    picture: Picture, data: Segmentation, labels: bool = True, planar: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Image and, when `labels`, its label (None for a picture without one); they must be of one
    size. `planar` is as in `read_image`."""
    image = read_image(picture.image, planar=planar)
    if not labels or picture.label is None:
        return image, None
    label = read_label(picture.label, data)
    if label.shape != image.shape[-2:]:
        raise RankError(
            f"{picture.image} has {image.shape[2]}x{image.shape[1]} pixels but its label "
            f"{picture.label} has {label.shape[1]}x{label.shape[0]}; they must agree"
            f"{turned_note(picture.image, tuple(label.shape))}."
        )
    return image, label


def classes_in(data: Segmentation, picture: Picture) -> set[int]:
    """The classes that occur in the label of a picture."""
    values = np.unique(read_label(picture.label, data).numpy())
    return set(values.tolist()) - {IGNORE}


# ------------------------------------------------------------------------------------------ on disk
def find(name: str, root: Path, val: str = "val", classes: list[str] | None = None) -> Segmentation:
    """The data set `name` (voc, shapes, cityscapes, folder) under `root`, scored on its `val` list;
    UserError when it is not there, or has other classes than `classes`."""
    check_folder(name, root)
    if name == "cityscapes":
        data = find_cityscapes(root, val)
    elif name == "folder":
        data = find_folder(root, val)
    else:
        data = find_voc(root, val)
    data.name = name
    if not data.val:
        raise UserError(f"The list '{val}' of {root} is empty; name another one with --val.")
    check_classes(data.classes, classes, root)
    return data


def check_folder(name: str, root: Path) -> None:
    """UserError when the root of a data set is no folder, or not there."""
    if not root.is_dir():
        raise missing(name, root)


def check_classes(found: list[str], expected: list[str] | None, root: Path) -> None:
    """UserError when a data set has other classes than a checkpoint (None: any will do)."""
    if expected is not None and found != expected:
        raise UserError(
            f"The checkpoint knows {len(expected)} classes ({', '.join(expected[:3])} ...) and "
            f"{root} has {len(found)} ({', '.join(found[:3])} ...); give the data of its classes."
        )


def missing(name: str, root: Path, what: str = "") -> UserError:
    """The error that says what of a data set was looked for where (without `what`, the folder
    itself is not there), and how to get it."""
    if what:
        found = f"looked for {what} in {root.resolve()}"
    else:
        found = f"there is no folder {root.resolve()}"
    if name == "voc":
        how = "run `python -m data.download voc`, or "
    elif name == "cityscapes":
        how = "run `python -m data.download cityscapes` for the steps, or "
    else:
        how = ""
    return UserError(
        f"The {name} data are missing: {found}; {how}name the folder that holds them with --root "
        f"(layout in data/README.md)."
    )


def need(path: Path) -> Path:
    """The path, or a UserError when there is no such file."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing, though the data set's lists name it; see data/README.md."
        )
    return path


def find_voc(root: Path, val: str) -> Segmentation:
    """PASCAL VOC 2012 with SBD: the folder that holds JPEGImages, or VOCdevkit/VOC2012 under the
    root."""
    base = first_existing(
        root, root / "VOCdevkit" / "VOC2012", root / "VOC2012", holds="JPEGImages"
    )
    if base is None:
        raise missing("voc", root, "JPEGImages or VOCdevkit/VOC2012/JPEGImages")
    masks = first_existing(base / "SegmentationClassAug", base / "SegmentationClass")
    if masks is None:
        raise missing("voc", base, "SegmentationClassAug")
    lists = base / "ImageSets" / "Segmentation"
    images = by_stem(image_files(base / "JPEGImages"))

    def picture(name: str) -> Picture:
        image = images.get(name)
        if image is None:
            image = need(base / "JPEGImages" / f"{name}.jpg")
        return Picture(name, image, masks / f"{name}.png")

    val_list = first_existing(lists / f"{val}.txt", root / "splits" / "gta_seg" / f"{val}.txt")
    if val_list is None:
        raise UserError(
            f"--val {val}: there is no list {val}.txt in {lists.resolve()}; name another."
        )
    val_names = read_names(val_list, images)
    train_list = first_existing(*(lists / f"{n}.txt" for n in ("train_aug", "trainaug", "train")))
    if train_list is None:
        train_names = sorted(images.keys() - set(val_names))
    else:
        train_names = read_names(train_list, images)
    classes = VOC_CLASSES
    if (root / "classes.txt").is_file():
        classes = read_classes(root / "classes.txt")
    train = {name: picture(name) for name in train_names}
    scored = [picture(name) for name in val_names]
    for one in scored:
        need(one.label)
    return Segmentation("voc", root, classes, train, scored)


def find_cityscapes(root: Path, val: str) -> Segmentation:
    """Cityscapes with fine labels: leftImg8bit/<part>/<city>/*.png and gtFine/... with raw
    labelIds, or where these are not there, with labelTrainIds."""

    def part(name: str) -> list[Picture]:
        found = []
        for image in sorted((root / "leftImg8bit" / name).glob("*/[!.]*_leftImg8bit.png")):
            stem = image.name.removesuffix("_leftImg8bit.png")
            label = root / "gtFine" / name / image.parent.name / f"{stem}_gtFine_labelIds.png"
            mapped = label.with_name(f"{stem}_gtFine{TRAIN_IDS}")
            if not label.is_file() and mapped.is_file():
                label = mapped
            found.append(Picture(stem, image, label))
        return found

    if not (root / "leftImg8bit").is_dir():
        raise missing("cityscapes", root, "leftImg8bit")
    to_class = np.full(256, IGNORE, np.uint8)
    to_class[CITYSCAPES_IDS] = np.arange(19)
    train = part("train")
    scored = part(val)
    if not train:
        raise missing("cityscapes", root, "leftImg8bit/train/<city>/*_leftImg8bit.png")
    for picture in scored:
        need(picture.label)
    by_name = {picture.name: picture for picture in train}
    return Segmentation("cityscapes", root, CITYSCAPES_CLASSES, by_name, scored, to_class=to_class)


def find_folder(root: Path, val: str) -> Segmentation:
    """images/{train,val,unlabeled}, labels/{train,val} (index PNG, 255 ignore), classes.txt, a
    class a line."""

    def part(name: str) -> list[Picture]:
        folder = root / "images" / name
        labels = root / "labels" / name
        if not folder.is_dir():
            return []
        images = by_stem(image_files(folder))
        return [Picture(stem, p, labels / f"{stem}.png") for stem, p in images.items()]

    if not (root / "images" / "train").is_dir():
        raise missing("folder", root, "images/train")
    if not (root / "classes.txt").is_file():
        raise missing("folder", root, "classes.txt")
    scored = part(val)
    if not scored:
        raise missing("folder", root, f"images/{val}")
    for picture in scored:
        need(picture.label)
    return Segmentation(
        "folder",
        root,
        read_classes(root / "classes.txt"),
        {picture.name: picture for picture in part("train")},
        scored,
        extra=[picture._replace(label=None) for picture in part("unlabeled")],
    )


def first_existing(*paths: Path, holds: str = "") -> Path | None:
    """The first path that exists, or, where `holds` is given, that has something of this name in
    it."""
    for path in paths:
        if (path / holds).exists():
            return path
    return None


def by_stem(images: list[Path]) -> dict[str, Path]:
    """Stem -> image; UserError when two of a folder share a stem, and so a label."""
    found: dict[str, Path] = {}
    for image in images:
        if image.stem in found:
            raise UserError(
                f"{found[image.stem]} and {image.name} beside it share the name of their label; "
                f"remove or rename one."
            )
        found[image.stem] = image
    return found


def read_classes(path: Path) -> list[str]:
    """The names in a file that has one a line."""
    try:
        lines = read_text(path).splitlines()
    except ValueError:
        raise UserError(f"{path} is no text; write one class name a line.") from None
    names = [line.strip() for line in lines if line.strip()]
    if len(names) < 2 or len(names) > 255 or len(set(names)) < len(names):
        raise UserError(
            f"{path} needs 2 to 255 different class names, one a line; it has {len(names)}."
        )
    return names


def read_names(path: Path, images: dict[str, Path]) -> list[str]:
    """The image ids of a list: a line that is one, or else its first word, an id or the path of an
    image, whose mask may follow."""
    try:
        lines = read_text(path).splitlines()
    except ValueError:
        raise UserError(
            f"{path} is no text; write one image id a line, or fetch it again."
        ) from None
    names = []
    for line in map(str.strip, lines):
        if line:
            names.append(line if line in images else splits.short_id(line.split()[0], "voc"))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} lists {twice} twice; take it out once.")
    return names


# ---------------------------------------------------------------------------- labeled and unlabeled
@dataclass
class Chosen:
    """Which images a run learns from. `text` says it to the user, `fingerprint` identifies the
    labeled list."""

    labeled: list[Picture]
    unlabeled: list[Picture]
    text: str
    fingerprint: str


class Split(NamedTuple):
    """The labeled images of --split; the unlabeled ones, if it names these too; and where they come
    from, in words."""

    labeled: list[Picture]
    unlabeled: list[Picture] | None
    origin: str


def choose(
    data: Segmentation,
    split: str,
    split_seed: int,
    unlabeled: str,
    family: str,
    needed: bool = True,
    balanced: bool = True,
) -> Chosen:
    """The labeled images that `split` names, and the unlabeled ones: all others, or what
    `unlabeled` names. UserError when there are no unlabeled ones and they are `needed`.

    `split` is "all", the path of a list, the name of a published list of `family` that was fetched
    beside the data, or a number or share to draw with `split_seed`: "random:183", "random:5%". A
    `balanced` draw covers the classes evenly, for which the labels of all training images are
    opened; the other is uniform."""
    labeled, rest, origin = split_of(data, split, split_seed, family, balanced)
    for picture in labeled:
        need(picture.label)
    if unlabeled:
        rest = unlabeled_pictures(unlabeled, data)
    elif rest is None:
        taken = {picture.image for picture in labeled}
        rest = [p for p in data.train.values() if p.image not in taken] + data.extra
    if needed and not rest:
        raise UserError(
            f"--split {split} leaves no unlabeled image; take a smaller one, name some with "
            f"--unlabeled, or learn from labels alone (gta_seg.py: --method suponly, "
            f"guided_distillation.py: --stage teacher)."
        )
    names = [picture.name for picture in labeled]
    fingerprint = splits.fingerprint(names)
    known = splits.published_name(names)
    if known:
        origin += f", known as {known}"
    text = (
        f"{len(labeled)} labeled images ({origin}, fingerprint {fingerprint[:12]}) and "
        f"{len(rest)} unlabeled ones"
    )
    return Chosen(labeled, rest, text, fingerprint)


def split_of(data: Segmentation, split: str, split_seed: int, family: str, balanced: bool) -> Split:
    """What --split names, see `choose`."""
    if split == "all":
        everything = list(data.train.values())
        return Split(everything, list(everything), "all labels")
    if Path(split).is_file():
        return Split(listed_pictures(Path(split), data), None, f"the list {split}")
    if data.name in ("voc", "cityscapes") and not split.startswith("random:"):
        return published_split(data, split, family)
    with_label = [name for name, picture in data.train.items() if picture.label.is_file()]
    classes_of = None
    if balanced:
        classes_of = lambda name: classes_in(data, data.train[name])  # noqa: E731
    try:
        number = splits.count(split.removeprefix("random:"), len(data.train))
        names = splits.draw(with_label, number, split_seed, classes_of)
    except splits.SplitError as error:
        raise UserError(f"--split {split}: {error}") from None
    drawn = [data.train[name] for name in names]
    return Split(drawn, None, f"{number} drawn with --split-seed {split_seed}")


def published_split(data: Segmentation, split: str, family: str) -> Split:
    """A published list that was fetched beside the data; UserError when it is not there."""
    folder = data.root / "splits" / family / splits.folder_name(split)
    if not (folder / "labeled.txt").is_file():
        there = sorted(path.parent.name for path in folder.parent.glob("*/labeled.txt"))
        known = [name for d, f, name in splits.PUBLISHED if (d, f) == (data.name, family)]
        known = sorted((name for name in known if name != "val"), key=lambda n: (len(n), n))
        drawn = split if split[:1].isdigit() else "183"
        raise UserError(
            f"There is no split '{split}' in {folder.parent} (there: {', '.join(there) or 'none'}; "
            f"published: {', '.join(known)}); fetch the published lists with `python -m "
            f"data.download splits --dataset {data.name} --root {data.root}`, draw one with "
            f"--split random:{drawn}, or name a list file."
        )
    labeled = listed_pictures(folder / "labeled.txt", data)
    rest = None
    if (folder / "unlabeled.txt").is_file():
        rest = listed_pictures(folder / "unlabeled.txt", data, labels=False)
    return Split(labeled, rest, f"the published list {family}/{split}")


def listed_pictures(path: Path, data: Segmentation, labels: bool = True) -> list[Picture]:
    """The images that a list names, as ids of the data set or as paths under its root or beside the
    list. Without `labels` they need none. Of an image of the data set the label is the data set's
    own, where it has one: the masks that lists name may be of another form, such as Cityscapes'
    labelTrainIds."""

    def file(name: str) -> Path | None:
        for place in (data.root / name, path.parent / name, Path(name)):
            if place.is_file():
                return place
        return None

    entries = splits.read_list(path)
    found = []
    lost = []
    left_aside = []
    for entry, mask in entries:
        name = splits.short_id(entry, data.name)
        known = data.train.get(name)
        image = file(entry)
        label = file(mask) if mask else None
        if known is not None and (image is None or "/" not in entry or image.samefile(known.image)):
            if mask is None or known.label.is_file():
                found.append(known)
                if label is not None and not label.samefile(known.label):
                    left_aside.append(f"{known.label} is taken, and {label} is not")
                continue
            image = known.image
        if image is None or (labels and label is None):
            lost.append(entry)
        else:
            found.append(Picture(name, image, label))
    if left_aside and labels:
        warnings.warn(
            f"{path} names {len(left_aside)} masks of images that have a label in {data.root}: "
            f"{left_aside[0]}",
            stacklevel=2,
        )
    if lost:
        raise UserError(
            f"{len(lost)} of {len(entries)} images listed in {path} are not under {data.root}, for "
            f"example {lost[0]}; correct the list, or name another --root (layout in "
            f"data/README.md)."
        )
    return found


def unlabeled_pictures(text: str, data: Segmentation) -> list[Picture]:
    """--unlabeled: a folder of images, also in folders below it, or a list of them."""
    path = Path(text)
    if path.is_dir():
        found = [Picture(image.stem, image, None) for image in images_below(path)]
        if not found:
            raise UserError(f"--unlabeled {path}: no images in that folder; name another.")
        return found
    if not path.is_file():
        raise UserError(f"--unlabeled {path}: neither a folder nor a list file; name another.")
    return listed_pictures(path, data, labels=False)


# ------------------------------------------------------------------------------------------ samples
class Batch(NamedTuple):
    """`images` (B, 3, H, W) uint8, `valid` (B, H, W) bool, `label` (B, H, W) uint8 (all 255 where
    none was opened)."""

    images: Tensor
    valid: Tensor
    label: Tensor
    skipped: Tensor  # (B,) how many broken images were passed over

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class Pictures(Dataset):
    """Training samples by key (index, step, sample); `augment(image, label or None, rng)` -> image,
    label, valid."""

    def __init__(
        self,
        pictures: list[Picture],
        data: Segmentation,
        labels: bool,
        augment: Callable,
        seed: int,
        name: str,
    ):
        self.pictures, self.data, self.labels, self.augment = pictures, data, labels, augment
        self.seed, self.name = seed, name

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int, int]) -> Batch:
        index, step, sample = place
        for skipped in range(len(self.pictures)):
            picture = self.pictures[(index + skipped) % len(self.pictures)]
            try:
                image, label = load_picture(picture, self.data, self.labels, planar=False)
            except BrokenImage as error:
                warnings.warn(f"{error}; training goes on without it", stacklevel=2)
                continue
            g = rng(self.seed, self.name, step, sample)
            image, label, valid = self.augment(image, label, g)
            return Batch(image, valid, label, torch.tensor(skipped))
        raise RankError(
            f"None of the {len(self.pictures)} {self.name} images can be read, such as "
            f"{picture.image}; fetch them again."
        )


class Whole(Dataset):
    """Whole pictures. With labels, for scoring, a broken one stops the evaluation, which needs
    every image; without labels, its image is None."""

    def __init__(self, pictures: list[Picture], data: Segmentation, labels: bool = True):
        self.pictures, self.data, self.labels = pictures, data, labels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Tensor | None]:
        try:
            return (index, *load_picture(self.pictures[index], self.data, self.labels))
        except BrokenImage as error:
            if self.labels:
                raise
            warnings.warn(f"{error}; it is left out", stacklevel=2)
            return index, None, None


def score_loader(
    pictures: list[Picture], data: Segmentation, world: World, workers: int, labels: bool = True
) -> DataLoader:
    """(index, image, label), one picture at a time, each on exactly one process."""
    whole = Whole(pictures, data, labels)
    mine = Subset(whole, range(world.rank, len(pictures), world.size))
    return DataLoader(mine, batch_size=None, **helpers(min(workers, 4)))
