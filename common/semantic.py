"""What lies where on disk (VOC/SBD, Cityscapes, plain folders, the embedded set), and which images
a run learns from.

Layouts are described in data/README.md; --split and --unlabeled are read here."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import splits
from common.distributed import World, rng
from common.errors import RankError, UserError
from common.files import IMAGES, BrokenImage, image_files, read_image
from common.loading import helpers


class Picture(NamedTuple):
    """One image on disk; `label` is None when there is no label file, or none may be opened."""

    name: str
    image: Path
    label: Path | None


@dataclass
class Segmentation:
    """A data set as found on disk. `to_class` maps the values of a label file to class indices
    (None: as they are)."""

    name: str
    root: Path
    classes: list[str]
    train: dict[str, Picture]
    val: list[Picture]
    extra: list[Picture] = field(default_factory=list)  # images that never had labels
    to_class: np.ndarray | None = None


def read_label(path: Path, data: Segmentation) -> Tensor:
    """(H, W) uint8 class indices. Palette files are read as indices, never as colours or grey
    values.

    Raises UserError (RankError, one process may meet it alone) when a value is not a class."""
    try:
        with Image.open(path) as file:
            mode, values = file.mode, np.array(file)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise RankError(
            f"The label {path} cannot be read ({error}); fetch or make it again."
        ) from None
    if values.ndim != 2 or mode not in ("P", "L", "1", "I", "I;16"):
        raise RankError(
            f"The label {path} is a colour picture (mode {mode}); labels are single-channel PNGs of class "
            f"indices."
        )
    if data.to_class is not None:
        return torch.from_numpy(data.to_class[np.clip(values, 0, 255)])
    wrong = values[(values >= len(data.classes)) & (values != 255)]
    if wrong.size:
        raise RankError(
            f"The label {path} holds the value {int(wrong.flat[0])}, but there are {len(data.classes)} "
            f"classes (0 to {len(data.classes) - 1}, 255 to ignore); correct the file or classes.txt."
        )
    return torch.from_numpy(values.astype(np.uint8))


def load_picture(
    picture: Picture, data: Segmentation, labels: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Image and, when `labels`, its label (None for a picture without one); they must be of one
    size."""
    image = read_image(picture.image)
    if not labels or picture.label is None:
        return image, None
    label = read_label(picture.label, data)
    if label.shape != image.shape[-2:]:
        raise RankError(
            f"{picture.image} has {image.shape[2]}x{image.shape[1]} pixels but its label {picture.label} "
            f"has {label.shape[1]}x{label.shape[0]}; they must agree."
        )
    return image, label


VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
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


# labelId of trainId i
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


# ------------------------------------------------------------------------------------------ on disk
def find(name: str, root: Path, val: str = "val", classes: list[str] | None = None) -> Segmentation:
    """The data set `name` under `root`, scored on its `val` list; UserError when it is not there,
    or has not `classes`. The embedded set, shapes, lies on disk as VOC does."""
    readers = {
        "voc": find_voc,
        "shapes": find_voc,
        "cityscapes": find_cityscapes,
        "folder": find_folder,
    }
    if root.exists() and not root.is_dir():
        raise missing(name, root, "a folder")
    if not root.is_dir():
        raise missing(name, root, "the folder itself")
    data = readers[name](root, val)
    data.name = name
    if not data.val:
        raise UserError(f"The list '{val}' of {root} is empty, so there is nothing to score on.")
    if classes is not None and data.classes != classes:
        raise UserError(
            f"The checkpoint knows {len(classes)} classes ({', '.join(classes[:3])} ...) and {root} has "
            f"{len(data.classes)} ({', '.join(data.classes[:3])} ...); they must be the same."
        )
    return data


def missing(name: str, root: Path, what: str) -> UserError:
    where = root.resolve()
    get = {
        "voc": "run `python -m data.download voc`",
        "folder": "see data/README.md for its layout",
        "cityscapes": "run `python -m data.download cityscapes` for the steps",
    }.get(name, "see data/README.md")
    return UserError(
        f"The {name} data are missing: looked for {what} in {where}; {get}, or name the folder that "
        f"holds them with --root (layout in data/README.md)."
    )


def find_voc(root: Path, val: str) -> Segmentation:
    """PASCAL VOC 2012 with SBD: the folder that holds JPEGImages, or VOCdevkit/VOC2012 under the
    root."""

    def image(name: str) -> Path:
        return images.get(name) or need(base / "JPEGImages" / f"{name}.jpg")

    bases = (root, root / "VOCdevkit" / "VOC2012", root / "VOC2012")
    base = next((p for p in bases if (p / "JPEGImages").is_dir()), None)
    if base is None:
        raise missing("voc", root, "JPEGImages or VOCdevkit/VOC2012/JPEGImages")
    masks = next(
        (base / m for m in ("SegmentationClassAug", "SegmentationClass") if (base / m).is_dir()),
        None,
    )
    if masks is None:
        raise missing("voc", base, "SegmentationClassAug")
    lists = base / "ImageSets" / "Segmentation"
    images = {p.stem: p for p in (base / "JPEGImages").iterdir() if p.suffix.lower() in IMAGES}
    val_names = listed(lists / f"{val}.txt", root / "splits" / "gta_seg" / f"{val}.txt")
    train_lists = (lists / f"{name}.txt" for name in ("train_aug", "trainaug", "train"))
    train_file = next((path for path in train_lists if path.is_file()), None)
    if val_names is None:
        raise missing("--val", lists, f"{val}.txt")
    train_names = listed(train_file) if train_file else sorted(images.keys() - set(val_names))
    classes = root / "classes.txt"
    return Segmentation(
        "voc",
        root,
        read_classes(classes) if classes.is_file() else VOC_CLASSES,
        {n: Picture(n, image(n), masks / f"{n}.png") for n in train_names},
        [Picture(n, image(n), need(masks / f"{n}.png")) for n in val_names],
    )


def find_cityscapes(root: Path, val: str) -> Segmentation:
    """Cityscapes with fine labels: leftImg8bit/<part>/<city>/*.png and gtFine/... with raw
    labelIds."""

    def part(name: str) -> list[Picture]:
        found = []
        for image in sorted((root / "leftImg8bit" / name).glob("*/*_leftImg8bit.png")):
            stem = image.name.removesuffix("_leftImg8bit.png")
            label = root / "gtFine" / name / image.parent.name / f"{stem}_gtFine_labelIds.png"
            found.append(Picture(stem, image, label))
        return found

    if not (root / "leftImg8bit").is_dir():
        raise missing("cityscapes", root, "leftImg8bit")
    to_class = np.full(256, 255, np.uint8)
    to_class[CITYSCAPES_IDS] = np.arange(19)
    train, score = part("train"), part(val)
    if not train:
        raise missing("cityscapes", root, "leftImg8bit/train/<city>/*_leftImg8bit.png")
    for picture in score:
        need(picture.label)
    return Segmentation(
        "cityscapes", root, CITYSCAPES_CLASSES, {p.name: p for p in train}, score, to_class=to_class
    )


def find_folder(root: Path, val: str) -> Segmentation:
    """images/{train,val,unlabeled}, labels/{train,val} (index PNG, 255 ignore), classes.txt, a
    class a line."""

    def part(name: str) -> list[Picture]:
        folder, labels = root / "images" / name, root / "labels" / name
        return (
            [Picture(p.stem, p, labels / f"{p.stem}.png") for p in image_files(folder)]
            if folder.is_dir()
            else []
        )

    if not (root / "images" / "train").is_dir():
        raise missing("folder", root, "images/train")
    if not (root / "classes.txt").is_file():
        raise missing("folder", root, "classes.txt")
    score = part(val)
    if not score:
        raise missing("folder", root, f"images/{val}")
    for picture in score:
        need(picture.label)
    return Segmentation(
        "folder",
        root,
        read_classes(root / "classes.txt"),
        {p.name: p for p in part("train")},
        score,
        extra=[Picture(p.name, p.image, None) for p in part("unlabeled")],
    )


def read_classes(path: Path) -> list[str]:
    try:
        names = [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is not UTF-8 text; save it as such, one class name a line."
        ) from None
    if len(names) < 2 or len(names) > 255 or len(set(names)) < len(names):
        raise UserError(
            f"{path} needs 2 to 255 different class names, one a line; it has {len(names)}."
        )
    return names


def listed(*paths: Path) -> list[str] | None:
    """The ids of the first list that exists."""
    path = next((p for p in paths if p.is_file()), None)
    return (
        None
        if path is None
        else [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    )


def need(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path} is missing, though the data set's lists name it; see data/README.md."
        )
    return path


# ---------------------------------------------------------------------------- labeled and unlabeled
@dataclass
class Chosen:
    """Which images a run learns from, and which labeled ones it only chooses by. `text` says it to
    the user, `fingerprint` identifies the labeled list."""

    labeled: list[Picture]
    unlabeled: list[Picture]
    text: str
    fingerprint: str
    held_out: list[Picture] = field(default_factory=list)


def choose(
    data: Segmentation,
    split: str,
    split_seed: int,
    unlabeled: str,
    family: str,
    needed: bool = True,
    held_out: int = 0,
    balanced: bool = True,
) -> Chosen:
    """The labeled images that `split` names, and the unlabeled ones: all others, or what
    `unlabeled` names; UserError when there are none and they are `needed`. `held_out` labeled
    images are kept apart from both.

    `split`: a published list of `family`, fetched beside the data; random:183, random:5%; a list
    file; all."""
    published = data.name in ("voc", "cityscapes")
    folder = data.root / "splits" / family / splits.folder_name(split)
    rest: list[Picture] | None = None
    if split == "all":
        labeled, rest, origin = list(data.train.values()), list(data.train.values()), "all labels"
    elif Path(split).is_file():
        labeled, origin = pictures_of(Path(split), data), f"the list {split}"
    elif published and not split.startswith("random:"):
        if not (folder / "labeled.txt").is_file():
            have = (
                sorted(p.parent.name for p in folder.parent.glob("*/labeled.txt"))
                if folder.parent.is_dir()
                else []
            )
            known = sorted(
                {n for d, f, n in splits.PUBLISHED if (d, f) == (data.name, family) and n != "val"},
                key=lambda n: (len(n), n),
            )
            fetch = f"`python -m data.download splits --dataset {data.name} --root {data.root}`"
            raise UserError(
                f"There is no split '{split}' in {folder.parent} (there: {', '.join(have) or 'none'}; "
                f"published: {', '.join(known)}); fetch the published lists with {fetch}, draw one with "
                f"--split random:{split if split[:1].isdigit() else 183}, or name a list file."
            )
        labeled, origin = (
            pictures_of(folder / "labeled.txt", data),
            f"the published list {family}/{split}",
        )
        if (folder / "unlabeled.txt").is_file():
            rest = pictures_of(folder / "unlabeled.txt", data, labels=False)
    else:
        try:
            number = splits.count(split.removeprefix("random:"), len(data.train))
            able = [name for name, picture in data.train.items() if picture.label.is_file()]
            if balanced:  # over classes, for which all training labels are opened
                names = splits.draw(
                    able, number, split_seed, lambda name: classes_in(data, data.train[name])
                )
            else:
                names = splits.draw(able, number, split_seed)
        except splits.SplitError as error:
            raise UserError(f"--split {split}: {error}") from None
        labeled, origin = (
            [data.train[name] for name in names],
            f"{number} drawn with --split-seed {split_seed}",
        )
    for picture in labeled:
        need(picture.label)
    if unlabeled:
        rest = unlabeled_pictures(unlabeled, data)
    elif rest is None:
        taken = {p.image for p in labeled}
        rest = [p for p in data.train.values() if p.image not in taken] + data.extra
    apart = hold_out(data, labeled, split_seed, held_out, family)
    rest = [p for p in rest if p.image not in {q.image for q in apart}] if apart else rest
    if needed and not rest:
        raise UserError(
            f"--split {split} leaves no unlabeled image; take a smaller one, name some with --unlabeled, "
            f"or learn from labels alone (gta_seg.py: --method suponly)."
        )
    fingerprint = splits.fingerprint([p.name for p in labeled])
    family_name = splits.published_name([p.name for p in labeled])
    text = (
        f"{len(labeled)} labeled images ({origin}{f', known as {family_name}' if family_name else ''}, "
        f"fingerprint {fingerprint[:12]}) and {len(rest)} unlabeled ones"
    )
    text += f", {len(apart)} held out" if apart else ""
    return Chosen(labeled, rest, text, fingerprint, apart)


def hold_out(
    data: Segmentation, labeled: list[Picture], split_seed: int, number: int, family: str
) -> list[Picture]:
    """Images with labels beside the `labeled` ones of a run, to choose by: the last `number` of the
    order the split was cut from (the published permutation where `family` has one, else a seeded
    one), nearest the end first, so that a smaller set is the beginning of a larger one. UserError
    when there are not so many."""
    published = data.root / "splits" / family / "permutation.txt"
    if data.name == "voc" and published.is_file():
        order = [name for name, _ in splits.read_list(published)]
    else:
        order = splits.draw(list(data.train), len(data.train), split_seed)
    taken = {p.name for p in labeled}
    able = (
        p
        for n in reversed(order)
        if n not in taken and (p := data.train.get(n)) and p.label.is_file()
    )
    found = list(itertools.islice(able, number))
    if len(found) < number:
        raise UserError(
            f"{number} images with labels are to be held out (--dev-size, --dev-reserve), but beside the "
            f"{len(taken)} labeled ones there are only {len(found)}; ask for fewer, or a smaller --split."
        )
    return found


def pictures_of(path: Path, data: Segmentation, labels: bool = True) -> list[Picture]:
    """The images that a list names, as ids of the data set or as paths under its root or beside the
    list."""
    try:
        entries = splits.read_list(path)
    except (splits.SplitError, OSError) as error:
        raise UserError(str(error)) from None
    found, lost = [], []
    for entry, mask in entries:
        name = splits.short_id(entry, data.name)
        if mask is None and name in data.train:
            found.append(data.train[name])
            continue
        bases = [data.root, path.parent, Path()]
        image = next((b / entry for b in bases if (b / entry).is_file()), None)
        label = next((b / mask for b in bases if (b / mask).is_file()), None) if mask else None
        if image is None and name in data.train:  # UniMatch names masks of SegmentationClass
            image, label = data.train[name].image, label or data.train[name].label
        if image is None or (labels and label is None):
            lost.append(entry)
        else:
            found.append(Picture(name, image, label))
    if lost:
        raise UserError(
            f"{len(lost)} of {len(entries)} images listed in {path} are not under {data.root}, for example "
            f"{lost[0]}; is --root right? See data/README.md for the layout."
        )
    return found


def unlabeled_pictures(text: str, data: Segmentation) -> list[Picture]:
    """--unlabeled: a folder of images, or a list of them."""
    path = Path(text)
    if path.is_dir():
        found = [Picture(p.stem, p, None) for p in image_files(path)]
        if not found:
            raise UserError(f"--unlabeled {path}: no images in that folder.")
        return found
    if not path.is_file():
        raise UserError(f"--unlabeled {path}: neither a folder nor a list file.")
    return pictures_of(path, data, labels=False)


def classes_in(data: Segmentation, picture: Picture) -> set[int]:
    return set(np.unique(read_label(picture.label, data).numpy()).tolist()) - {255}


class Batch(NamedTuple):
    """`images` (B, 3, H, W) uint8, `valid` (B, H, W) bool, `label` (B, H, W) uint8 (all 255 where
    none was opened)."""

    images: Tensor
    valid: Tensor
    label: Tensor
    skipped: Tensor  # (B,) how many broken images were passed over

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self))


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
                image, label = load_picture(picture, self.data, self.labels)
            except BrokenImage as error:
                warnings.warn(f"{error}; training goes on without it", stacklevel=2)
                continue
            out = self.augment(image, label, rng(self.seed, self.name, step, sample))
            return Batch(out[0], out[2], out[1], torch.tensor(skipped))
        raise RankError(
            f"None of the {len(self.pictures)} {self.name} images can be read, such as {picture.image}."
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
    mine = torch.utils.data.Subset(
        Whole(pictures, data, labels), range(world.rank, len(pictures), world.size)
    )
    return DataLoader(mine, batch_size=None, **helpers(min(workers, 4)))
