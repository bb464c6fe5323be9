"""Instance data sets (COCO, LVIS and own JSON files, Cityscapes, the embedded set): what lies where
on disk, which pictures a run learns from, and their samples.

Order and augmentation depend on (seed, step, sample) alone, see common/loading.py. Labels are class
indices 0..K-1 everywhere, the places in the sorted category ids."""

import itertools
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import semantic, splits
from common.coco import Content, finder, listed_names, photos_of, read_content
from common.distributed import World, rng
from common.errors import RankError, UserError
from common.files import BrokenImage, image_files, images_below, read_image, turned_note
from common.loading import helpers
from common.objects import CITYSCAPES_THINGS, Instances, Photo, Thing, bare, singles, with_things
from common.semantic import (
    IGNORE,
    Picture,
    Segmentation,
    check_classes,
    check_folder,
    missing,
    need,
)
from common.typed_json import read_json

# How the JSON file of a part may be named, in the folder annotations.
FILES = ("{}", "instances_{}", "instances_{}2017", "lvis_{}", "lvis_v1_{}")

COCO_IMAGES = 117266  # the images of train2017 that hold an object, of 118,287 in all

# The published lists of each data set: their folder, and how they are called.
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
    UserError when it is not there, contradicts itself, or has other classes than `classes`. Of COCO
    and LVIS, `train_json`, `val_json` and `images` name the files and the folder of the images,
    also relative to `root`."""
    check_folder(name, root)
    if name == "cityscapes":
        data = find_cityscapes(root, val)
    else:
        data = find_coco(name, root, train_json, val_json, images, val)
    check_classes(data.classes, classes, root)
    return data


def find_cityscapes(root: Path, val: str) -> Instances:
    """leftImg8bit/<part>/<city>/*.png with gtFine/... instanceIds; `extra` is train_extra. No label
    is opened here."""

    def part(name: str) -> list[Photo]:
        found = []
        end = "_leftImg8bit.png"
        images = sorted((root / "leftImg8bit" / name).glob("*/*" + end))
        for number, image in enumerate(images, start=1):
            stem = image.name.removesuffix(end)
            label = root / "gtFine" / name / image.parent.name / f"{stem}_gtFine_instanceIds.png"
            found.append(Photo(stem, image, number, label=label))
        if not found and name != "train_extra":
            raise missing("cityscapes", root, f"leftImg8bit/{name}/<city>/*{end}")
        return found

    train = part("train")
    scored = part(val)
    extra = part("train_extra")
    for photo in scored:
        need(photo.label)
    return Instances(
        "cityscapes",
        root,
        list(CITYSCAPES_THINGS.values()),
        list(CITYSCAPES_THINGS),
        train,
        scored,
        [bare(photo) for photo in extra],
    )


def find_coco(
    name: str, root: Path, train_json: str, val_json: str, images: str, val: str
) -> Instances:
    """COCO's or LVIS's files: annotations/ (see FILES) and images/, images/<part>, <part>2017,
    <part> or the folder that coco_url or file_name names. Pictures without an object but crowds go
    from `train` to `extra`, where those of images/unlabeled are, too."""
    train_path = json_file(name, root, "--train-json", train_json, "train")
    beside = train_path.with_name(train_path.name.replace("train", val))
    first = [] if beside == train_path else [beside]
    val_path = json_file(name, root, "--val-json", val_json, val, first)
    folder = images_folder(name, root, images)
    bases = [folder] if images else [folder, root]
    of_train = read_content(train_path)
    of_val = of_train if val_path == train_path else read_content(val_path)
    check_categories(of_train, of_val)
    ids = list(of_train.classes)
    classes = list(of_train.classes.values())
    train = photos_of(of_train, finder(bases, "train"))
    scored = photos_of(of_val, finder(bases, val))
    for path, photos in ((train_path, train), (val_path, scored)):
        if not any(singles(photo) for photo in photos):
            raise UserError(
                f"{path} has no object with a mask, so there is nothing to learn from or to score "
                f"on; name another file."
            )
    with_objects = [photo for photo in train if singles(photo)]
    extra = [bare(photo) for photo in train if not singles(photo)]
    if (folder / "unlabeled").is_dir():
        extra += [Photo(path.name, path) for path in image_files(folder / "unlabeled")]
    data = Instances(name, root, classes, ids, with_objects, scored, extra, train_path, val_path)
    if of_train.frequency is not None:
        data.lvis = True
        data.frequency = of_train.frequency
        data = scored_on(data, scored, val_path)
    return data


def json_file(
    name: str, root: Path, flag: str, value: str, part: str, first: Iterable[Path] = ()
) -> Path:
    """The JSON file of a part: the one that the flag names, or the `first` that exists, or the
    first of FILES; UserError when there is none."""
    if value:
        paths = [Path(value), root / value, root / "annotations" / value]
        looked_for = f"{flag} {value}"
    else:
        forms = [form for form in FILES if name != "lvis" or form.startswith("lvis")]
        names = [f"annotations/{form.format(part)}.json" for form in forms]
        paths = [*first, *(root / n for n in names)]
        looked_for = f"{', '.join(names)} (or give {flag})"
    for path in paths:
        if path.is_file():
            return path
    raise missing(name, root, looked_for)


def images_folder(name: str, root: Path, images: str) -> Path:
    """The folder that --images names, or <root>/images, which need not exist."""
    if not images:
        return root / "images"
    for path in (Path(images), root / images):
        if path.is_dir():
            return path
    raise missing(name, root, f"--images {images}")


def check_categories(train: Content, val: Content) -> None:
    """UserError unless both files list the same categories."""
    for a, b in itertools.zip_longest(train.classes.items(), val.classes.items()):
        if a != b:
            raise UserError(
                f"The categories of {train.path} and {val.path} differ (first {a} and {b}); both "
                f"must list the same ids with the same names."
            )


def scored_on(data: Instances, photos: list[Photo], val_json: Path | None = None) -> Instances:
    """The same data set, but scored on these pictures, which have labels: such as training pictures
    that are held out."""
    negative: dict[int, list[int]] = {}
    partial: dict[int, list[int]] = {}
    if data.lvis:
        negative = {photo.id: list(photo.negative) for photo in photos}
        partial = {photo.id: list(photo.partial) for photo in photos}
    return replace(data, val=list(photos), val_json=val_json, negative=negative, partial=partial)


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
    """The labeled pictures that `split` names, and the unlabeled ones. UserError when there are no
    unlabeled ones and they are `needed`.

    `split` is "all", the path of a list or of a COCO file with the labeled pictures, the name of a
    published list of COCO or Cityscapes, or a number or share to draw with `split_seed`:
    "random:183", "random:5%" (where no lists are published, "183" and "5%" mean the same). A
    `balanced` draw covers the classes evenly; the other keeps a long tail. COCO's lists are those
    of Unbiased Teacher, where `split_seed` (0 to 9) is the number of the draw; its configurations
    use 1.

    `unlabeled` names a folder or a list. Without it, `pool` "all" takes all training pictures, also
    the labeled ones, as the released code does, and "remaining" takes the others. Both take
    `data.extra`, which in Cityscapes is train_extra and is only taken with "all" labels."""
    labeled, origin = split_of(data, split, split_seed, balanced)
    if unlabeled:
        rest = unlabeled_photos(unlabeled, data)
    else:
        taken = {photo.image for photo in labeled} if pool == "remaining" else set()
        rest = [photo for photo in data.train if photo.image not in taken]
        if data.name != "cityscapes" or split == "all":
            rest += data.extra
    if needed and not rest:
        raise UserError(
            f"--split {split} leaves no unlabeled image; take a smaller one, name some with "
            f"--unlabeled, or learn from labels alone."
        )
    names = [splits.short_id(photo.name, data.name) for photo in labeled]
    fingerprint = splits.fingerprint(names)
    known = splits.published_name(names)
    labeled = [photo for photo in labels_read(labeled) if singles(photo)]
    if not labeled:
        raise UserError(
            f"--split {split}: none of its images has an object to learn from; take another one."
        )
    if known:
        origin += f", known as {known}"
    text = (
        f"{len(labeled)} labeled images ({origin}, fingerprint {fingerprint[:12]}) and {len(rest)} "
        f"unlabeled ones"
    )
    if len(labeled) < len(names):
        text += f"; {len(names) - len(labeled)} listed ones without an object are left out"
    return Chosen(labeled, [bare(photo) for photo in rest], text, fingerprint)


def split_of(
    data: Instances, split: str, split_seed: int, balanced: bool
) -> tuple[list[Photo], str]:
    """The pictures that --split names, see `choose`, and where they come from, in words."""
    if split == "all":
        return data.train, "all labels"
    if Path(split).is_file():
        return listed_photos(Path(split), data), f"the list {split}"
    if has_published_lists(data) and not split.startswith("random:"):
        return published_split(data, split, split_seed)
    with_label = [p for p in data.train if p.label is None or p.label.is_file()]
    by_name = {photo.name: photo for photo in labels_read(with_label)}
    classes_of_photo = None
    if balanced:
        classes_of_photo = lambda name: singles(by_name[name])  # noqa: E731
    try:
        number = splits.count(split.removeprefix("random:"), len(data.train))
        names = splits.draw(list(by_name), number, split_seed, classes_of_photo)
    except splits.SplitError as error:
        raise UserError(f"--split {split}: {error}") from None
    return [by_name[name] for name in names], f"{number} drawn with --split-seed {split_seed}"


def has_published_lists(data: Instances) -> bool:
    """Whether --split 5% means a published list: for Cityscapes, and for COCO itself."""
    if data.name == "cityscapes":
        return True
    if data.name != "coco" or data.lvis:
        return False
    return len(data.train) == COCO_IMAGES or supervision(data).is_file()


def labels_read(photos: list[Photo]) -> list[Photo]:
    """The pictures with their objects, which Cityscapes has in the label PNGs."""
    if all(p.things is not None for p in photos):
        return photos
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(read_objects, photos))


def read_objects(photo: Photo) -> Photo:
    """The picture with its objects, from its label PNG, which must be there."""
    return with_things(photo._replace(label=need(photo.label))).photo


def supervision(data: Instances) -> Path:
    return data.root / "splits" / "unbiased_teacher" / "COCO_supervision.txt"


def published_split(data: Instances, split: str, split_seed: int) -> tuple[list[Photo], str]:
    """The pictures of a published list that lies beside the data, and where it comes from in words;
    UserError when it is not there."""
    family, known = PUBLISHED[data.name]
    folder = data.root / "splits" / family
    if data.name == "cityscapes":
        there = {path.parent.name: path for path in sorted(folder.glob("*/labeled.txt"))}
        path = there.get(splits.folder_name(split))
        if path is not None:
            return listed_photos(path, data), f"the published list {family}/{split}"
    else:
        there = coco_draws(data)
        if split in there:
            return published_draw(data, split, split_seed, there[split])
    drawn = split if split[:1].isdigit() else "5%"
    raise UserError(
        f"There is no split '{split}' in {folder} (there: {', '.join(there) or 'none'}; published: "
        f"{known}); fetch the published lists with `python -m data.download splits --dataset "
        f"{data.name} --root {data.root}`, draw one with --split random:{drawn}, or name a list "
        f"file."
    )


def coco_draws(data: Instances) -> dict[str, dict[str, list[int]]]:
    """Share of COCO's pictures ("5%") -> number of the draw ("1") -> places in `data.train`, as
    Unbiased Teacher publishes them; {} when its file is not there."""
    path = supervision(data)
    if not path.is_file():
        return {}
    shares = read_json(path, dict[float, dict[str, list[int]]], "fetch it again")
    return {f"{share:g}%": draws for share, draws in shares.items()}


def published_draw(
    data: Instances, split: str, split_seed: int, draws: dict[str, list[int]]
) -> tuple[list[Photo], str]:
    """The pictures of one draw; UserError for another data set, or a draw that is not published."""
    if len(data.train) != COCO_IMAGES:
        raise UserError(
            f"The published list {split} is of the {COCO_IMAGES} images of train2017 that hold an "
            f"object, but {data.train_json} has {len(data.train)}; draw one with --split "
            f"random:{split}."
        )
    places = draws.get(str(split_seed))
    if places is None:
        raise UserError(
            f"--split {split} is not published for --split-seed {split_seed}; give one of "
            f"{', '.join(draws)}."
        )
    family, _ = PUBLISHED[data.name]
    if not places or min(places) < 0 or max(places) >= len(data.train):
        raise UserError(
            f"{supervision(data)} names images that {data.train_json} does not have; fetch it "
            f"again."
        )
    photos = [data.train[place] for place in places]
    return photos, f"the published list {family}/{split}, draw {split_seed}"


def listed_photos(path: Path, data: Instances, files: bool = False) -> list[Photo]:
    """The pictures that a list, or a COCO file, names: all by file name, or all by its stem, or all
    by id. Those without labels are left out; but with `files` they stay, and paths under the root
    or beside the list count, too."""
    if path.suffix == ".json":
        entries = listed_names(path)
    else:
        entries = [entry for entry, _ in splits.read_list(path)]
    found = best_reading(entries, data)
    if files:
        for i, entry in enumerate(entries):  # a path is that file, whatever else has its name
            if found[i] is None or ("/" in entry and found[i].name != entry):
                for base in (data.root, path.parent, Path()):
                    if (base / entry).is_file():
                        found[i] = Photo(entry, base / entry)
                        break
    if None in found:
        raise UserError(
            f"{found.count(None)} of {len(found)} images listed in {path} are not among the "
            f"training images of {data.root}, for example {entries[found.index(None)]}; correct "
            f"the list, or name another --root."
        )
    if files:
        return found
    return [photo for photo in found if photo.things is not None or photo.label is not None]


def best_reading(entries: list[str], data: Instances) -> list[Photo | None]:
    """The picture of each entry, read as a file name, as a stem or as an id: as what finds most."""
    best: list[Photo | None] | None = None
    for kind in ("name", "stem", "id"):
        table: dict[str, Photo | None] = {}
        for photo in data.train + data.extra:
            key = str(photo.id) if kind == "id" else photo.name
            if kind == "stem":
                key = splits.short_id(key, data.name)
            table[key] = None if key in table else photo  # two of one stem: neither
        keys = entries
        if kind == "stem":
            keys = [splits.short_id(entry, data.name) for entry in entries]
        found = [table.get(key) for key in keys]
        if best is None or found.count(None) < best.count(None):
            best = found
    return best


def unlabeled_photos(text: str, data: Instances, flag: str = "--unlabeled") -> list[Photo]:
    """What a flag names: a folder of images, also in folders below it, or a list of them."""
    path = Path(text)
    if path.is_file():
        return listed_photos(path, data, files=True)
    images = images_below(path)
    if not images:
        why = "no images in that folder" if path.is_dir() else "neither a folder nor a list file"
        raise UserError(f"{flag} {path}: {why}; name another.")
    found = [Photo(str(image.relative_to(path)), image) for image in images]
    for photo in found:
        # A name that is not UTF-8 holds surrogates.
        if not str(photo.image).isascii() and "\\udc" in ascii(str(photo.image)):
            raise UserError(
                f"{flag} {path}: the file name {ascii(photo.name)} is not UTF-8; rename it."
            )
    return found


# ----------------------------------------------------------------------------------- class regions
def of_regions(chosen: semantic.Chosen, data: Segmentation) -> Chosen:
    """The chosen pictures of a semantic data set, with the labeled ones as `with_regions` gives
    them."""
    with ThreadPoolExecutor(8) as threads:
        labeled = list(threads.map(partial(with_regions, data=data), chosen.labeled))
    unlabeled = [Photo(picture.name, picture.image) for picture in chosen.unlabeled]
    return Chosen(labeled, unlabeled, chosen.text, chosen.fingerprint)


def with_regions(picture: Picture, data: Segmentation) -> Photo:
    """A labeled picture, of which each class that its label map holds is one object. Its
    `segmentation` is its value there."""
    label = semantic.read_label(picture.label, data).numpy()
    counts = np.bincount(label.ravel(), minlength=IGNORE + 1)
    classes = np.flatnonzero(counts[:IGNORE]).tolist()
    things = tuple(Thing(c, c, False, float(counts[c])) for c in classes)
    height, width = label.shape
    return Photo(picture.name, picture.image, -1, height, width, things, picture.label)


# ------------------------------------------------------------------------------------------ samples
def load(photo: Photo) -> Tensor:
    """(3, H, W) uint8; it must have the size that its labels have."""
    image = read_image(photo.image)
    if photo.things is not None and image.shape[-2:] != (photo.height, photo.width):
        raise RankError(
            f"{photo.image} has {image.shape[2]}x{image.shape[1]} pixels but its annotations are "
            f"for {photo.width}x{photo.height}; they must agree"
            f"{turned_note(photo.image, (photo.height, photo.width))}."
        )
    return image


class Target(NamedTuple):
    """Objects of one image, true or pseudo, on its crop at any resolution."""

    labels: Tensor  # (N,) int64
    masks: Tensor  # (N, H', W') uint8 or bool
    valid: Tensor | None = None  # (H, W) bool, where masks are compared; None: everywhere


class Batch(NamedTuple):
    """Pictures (B, 3, H, W) uint8: `images` are learned from; `weak` is what the teacher sees of
    them, if anything."""

    images: Tensor
    weak: Tensor | None
    targets: list[Target]  # of labeled pictures; of others, if anything, only where they are valid
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
    """The batch on the device, where it arrives while the processor goes on; None stays None."""
    if batch is None:
        return None

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    targets = [Target(*map(move, target)) for target in batch.targets]
    return Batch(move(batch.images), move(batch.weak), targets, move(batch.skipped))


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
            f"None of the {len(self.photos)} {self.name} images can be read, such as "
            f"{photo.image}; fetch them again."
        )


def score_loader(photos: list[Photo], world: World, workers: int) -> Iterable[tuple[int, Tensor]]:
    """(index, picture (3, H, W) uint8), one at a time, each on exactly one process, under a
    progress bar that vanishes at the end; without a terminal it is a line a minute. A broken image
    stops the evaluation, which needs every one."""
    from tqdm import tqdm

    pictures = DataLoader(
        range(world.rank, len(photos), world.size),
        batch_size=None,
        generator=torch.Generator(),
        collate_fn=lambda index: (index, load(photos[index])),
        **helpers(min(workers, 4)),
    )
    pace = {"mininterval": 0.5}
    if not sys.stderr.isatty():
        pace = {"mininterval": 60, "delay": 60}
    return tqdm(
        pictures,
        desc="scoring",
        unit="image",
        leave=False,
        disable=not world.main,
        dynamic_ncols=True,
        **pace,
    )
