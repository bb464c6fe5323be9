"""COCO's and LVIS's JSON files, read into pictures and objects. Whatever sees an annotation later,
in training or in scoring, sees the Thing that was made of it here and checked."""

import contextlib
import functools
import gc
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from common.errors import UserError
from common.objects import Photo, Thing
from common.outlines import (
    FAR,
    RunLengths,
    extents,
    has_pixels,
    merged_runs,
    read_outline,
)
from common.typed_json import decoded, read_bytes, read_json, repeated_key, said

CURE = "correct this COCO or LVIS file, or name another"
BATCH = 8192  # annotations that are checked together

# Larger pictures would overflow the run lengths of pycocotools.
Side = Annotated[int, msgspec.Meta(gt=0, lt=2**16)]


# -------------------------------------------------------------------------------- records of a file
class Picture(msgspec.Struct, gc=False):
    id: int | str
    height: Side
    width: Side
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[int | str] | None = None
    not_exhaustive_category_ids: list[int | str] | None = None

    def name(self) -> str:
        return self.file_name or "/".join((self.coco_url or "").split("/")[-2:])


class Annotation(msgspec.Struct, gc=False, kw_only=True):
    image_id: int | str
    category_id: int | str
    segmentation: msgspec.Raw  # of any form
    iscrowd: Annotated[int, msgspec.Meta(ge=0, le=1)] | bool | None = None
    area: float | None = None
    bbox: list[float] | None = None
    isCrowd: Any = None  # noqa: N815 (two wrong spellings of iscrowd)
    is_crowd: Any = None


class PlainAnnotation(Annotation, gc=False, kw_only=True):
    """What nearly all annotations are."""

    segmentation: list[list[float]] | RunLengths
    bbox: tuple[float, float, float, float] | None = None


class Category(msgspec.Struct, gc=False):
    id: int | str
    name: str | int
    frequency: Any = None


class File(msgspec.Struct, gc=False):
    images: list[Picture]
    categories: list[Category]
    annotations: list[msgspec.Raw]  # decoded a few at a time, since they would fill much memory


PLAIN_ANNOTATION = msgspec.json.Decoder(PlainAnnotation)
ANNOTATION = msgspec.json.Decoder(Annotation, strict=False)


class Content(NamedTuple):
    """What a file holds. `things` are the objects of each image id, in class indices, which are the
    places of the category ids in `classes`, id -> name, ascending."""

    path: Path
    classes: dict[int | str, str]
    frequency: list[str] | None  # r, c or f of each class, where the file says it of all of them
    pictures: list[Picture]
    things: dict[int | str, list[Thing]]


def read_content(path: Path) -> Content:
    """The content of a COCO or LVIS file; UserError when it is no such file or contradicts itself.
    What is dropped, and what has no pixel, is counted and said."""
    text = read_bytes(path, CURE)
    with without_gc():
        return content_of(text, path)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Nothing that is read here is a circle, and looking for circles among millions of records
    takes long. What was made counts as old afterwards, so that nobody looks soon either."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # which puts all into the oldest generation
        if was_on:
            gc.enable()


def content_of(text: bytes, path: Path) -> Content:
    """`read_content` of a file that is read."""
    file = decoded(text, File, str(path), CURE)
    refuse_repeated(text, file, path)
    classes = classes_of(without_roots(file, path), path)
    for picture in file.images:
        picture.id = number_of(picture.id)
    sizes = {picture.id: (picture.height, picture.width) for picture in file.images}
    if len(sizes) < len(file.images):
        raise UserError(f"{path} lists an image twice; ids and file names must differ.")
    frequency = {number_of(category.id): category.frequency for category in file.categories}
    frequency = [frequency[category] for category in classes]
    if not all(value in ("r", "c", "f") for value in frequency):
        frequency = None
    things = things_of(file.annotations, sizes, list(classes), path)
    return Content(path, classes, frequency, file.images, things)


class Listed(msgspec.Struct, gc=False):
    """A file of which only the names of its pictures count."""

    class Picture(msgspec.Struct, gc=False):
        id: int | str
        file_name: str | None = None

    images: list[Picture]


def listed_names(path: Path) -> list[str]:
    """The file names, or else the ids, of the pictures of a COCO file, which serves as a list."""
    listed = read_json(path, Listed, CURE).images
    return [picture.file_name or str(picture.id) for picture in listed]


def number_of(value: int | str) -> int | str:
    """An id, of which digits in a text are the number."""
    is_number = isinstance(value, str) and value.isascii() and value.isdigit()
    return int(value) if is_number and len(value) < 20 else value


def ascending(ids: list[int | str], what: str, path: Path) -> list[int | str]:
    try:
        return sorted(ids)
    except TypeError:
        raise UserError(
            f"{path}: some ids of its {what} are numbers and others are words; {CURE}."
        ) from None


class OfCategory(msgspec.Struct, gc=False):
    """The part of an annotation that says which categories have objects."""

    category_id: int | str


def without_roots(file: File, path: Path) -> list[Category]:
    """The categories without those that some programs add as a root, which has no object and the
    name of a class below it: of several with one name those with objects stay, or else the last."""
    by_name: dict[str, list[Category]] = {}
    for category in file.categories:
        by_name.setdefault(str(category.name), []).append(category)
    if len(by_name) == len(file.categories):
        return file.categories
    used = set()
    for place, text in enumerate(file.annotations):
        try:
            annotation = msgspec.json.decode(text, type=OfCategory, strict=False)
        except msgspec.DecodeError as error:
            raise UserError(f"{path}: annotations[{place}].{said(error)}; {CURE}.") from None
        used.add(number_of(annotation.category_id))
    kept = []
    for same in by_name.values():
        with_objects = [category for category in same if number_of(category.id) in used]
        kept += with_objects or same[-1:]
    left_out = len(file.categories) - len(kept)
    if left_out:
        warnings.warn(
            f"{left_out} categories of {path} have no object and the name of another one; they are "
            f"left out",
            stacklevel=4,
        )
    return kept


def classes_of(categories: list[Category], path: Path) -> dict[int | str, str]:
    """Category id -> name, by ascending id."""
    names = {number_of(category.id): str(category.name) for category in categories}
    all_differ = len(categories) == len(names) == len(set(names.values()))
    if not names or not all_differ:
        raise UserError(
            f"{path}: its categories need ids and names that all differ, and there must be one at "
            f"least."
        )
    return {category: names[category] for category in ascending(list(names), "categories", path)}


def refuse_repeated(text: bytes, file: File, path: Path) -> None:
    """UserError when a key stands twice in one object, of which the last would be taken without a
    word."""
    if may_repeat_a_key(text, file.annotations):
        key = repeated_key(text)
        if key is not None:
            raise UserError(f"{path}: the key {key} stands twice in one of its objects; {CURE}.")


def may_repeat_a_key(text: bytes, annotations: list[msgspec.Raw]) -> bool:
    """Whether a key stands in the text more often than there are records, which is quickly known
    when the annotations are views of the text, and not of another one into which it was
    rewritten."""
    if not annotations:
        return True
    first, last = (np.frombuffer(part, np.uint8) for part in (annotations[0], annotations[-1]))
    origin = np.frombuffer(text, np.uint8).ctypes.data
    start, end = first.ctypes.data - origin, last.ctypes.data + len(last) - origin
    if not 0 <= start < end <= len(text):
        return True
    outside = text[:start] + text[end:]
    if any(outside.count(key) > 1 for key in (b'"images"', b'"categories"', b'"annotations"')):
        return True
    number = len(annotations)
    if any(text.count(key) > number for key in (b'"segmentation"', b'"iscrowd"')):
        return True
    # One count for both, unless the annotations have ids of other things, too.
    return text.count(b'_id"') > 2 * number and any(
        text.count(key) > number for key in (b'"image_id"', b'"category_id"')
    )


# ----------------------------------------------------------------------------------------- objects
class Tally:
    """What is dropped or odd in the annotations of a file."""

    def __init__(self):
        self.without_outline = 0
        self.dropped = 0  # polygons
        self.empty: list[int] = []  # the places of annotations without a pixel
        self.misspelt: set[str] = set()

    def note_misspelt(self, annotation: Annotation) -> None:
        for key in ("isCrowd", "is_crowd"):
            if getattr(annotation, key) is not None:
                self.misspelt.add(key)


class Polygons(NamedTuple):
    """The polygons of some annotations: a list for each, with the place of the annotation in its
    file, and height and width of its picture."""

    arrays: list[list[np.ndarray]]
    places: list[int]
    sizes: list[tuple[int, int]]

    def check(self, path: Path, tally: Tally) -> None:
        """UserError when a polygon cannot be drawn; annotations without a pixel are counted."""
        if not self.arrays:
            return
        numbers = [len(polygons) for polygons in self.arrays]
        owners = np.repeat(np.arange(len(numbers)), numbers)
        found = extents(list(itertools.chain.from_iterable(self.arrays)))
        wild = found.wild()
        if wild is not None:
            what = f"a coordinate is not finite or over {FAR:g} pixels, or its outline is too long"
            raise at(path, self.places[owners[wild]], "segmentation", what)
        heights, widths = np.array(self.sizes)[owners].T
        is_sure = np.zeros(len(numbers), bool)
        is_sure[owners[found.surely_have_pixels(heights, widths)]] = True
        for owner in np.flatnonzero(~is_sure).tolist():
            if not has_pixels(self.arrays[owner], *self.sizes[owner]):
                tally.empty.append(self.places[owner])


def things_of(
    annotations: list[msgspec.Raw],
    sizes: dict[int | str, tuple[int, int]],
    categories: list[int | str],
    path: Path,
) -> dict[int | str, list[Thing]]:
    """The objects of each image; `sizes` are heights and widths by image id. The annotations are
    emptied on the way, since each holds on to the whole text of the file."""
    index = {category: place for place, category in enumerate(categories)}
    things: dict[int | str, list[Thing]] = {image: [] for image in sizes}
    tally = Tally()
    for start in range(0, len(annotations), BATCH):
        polygons = Polygons([], [], [])
        for place, text in enumerate(annotations[start : start + BATCH], start):
            annotations[place] = None
            annotation = decoded_annotation(text, place, path)
            size = sizes.get(annotation.image_id)
            category = index.get(annotation.category_id)
            if size is None or category is None:
                raise unlisted(annotation, size is None, place, path)
            if annotation.isCrowd is not None or annotation.is_crowd is not None:
                tally.note_misspelt(annotation)
            try:
                outline = read_outline(annotation.segmentation)
                if outline.runs:
                    segmentation, pixels = merged_runs(outline.runs, *size)
            except ValueError as error:
                raise at(path, place, "segmentation", error) from None
            tally.dropped += outline.dropped
            if outline.polygons:
                segmentation = outline.polygons
                polygons.arrays.append(segmentation)
                polygons.places.append(place)
                polygons.sizes.append(size)
            elif not outline.runs:
                tally.without_outline += 1
                continue
            elif not pixels:
                tally.empty.append(place)
            things[annotation.image_id].append(thing_of(annotation, category, segmentation))
        polygons.check(path, tally)
    say(tally, sum(map(len, things.values())), path)
    return things


def unlisted(annotation: Annotation, is_image: bool, place: int, path: Path) -> UserError:
    """An annotation is of an image or of a category that its file does not list."""
    of = f"image {annotation.image_id}" if is_image else f"category {annotation.category_id}"
    return UserError(
        f"{path}: annotations[{place}] is of {of}, which the file does not list; {CURE}."
    )


def decoded_annotation(text: msgspec.Raw, place: int, path: Path) -> Annotation:
    """An annotation; UserError, which names its value, where it is of another form."""
    try:
        annotation = PLAIN_ANNOTATION.decode(text)
    except msgspec.DecodeError:
        annotation = with_numbers_as_text(text, place, path)
    if isinstance(annotation.image_id, str):
        annotation.image_id = number_of(annotation.image_id)
    if isinstance(annotation.category_id, str):
        annotation.category_id = number_of(annotation.category_id)
    return annotation


def with_numbers_as_text(text: msgspec.Raw, place: int, path: Path) -> Annotation:
    """An annotation that is not plainly one; only here may a number be NaN or infinite, as text."""
    try:
        annotation = ANNOTATION.decode(text)
    except msgspec.DecodeError as error:
        reason = said(error)
        between = "." if ":" in reason else ": "
        raise UserError(f"{path}: annotations[{place}]{between}{reason}; {CURE}.") from None
    check_numbers(annotation, place, path)
    return annotation


def thing_of(annotation: Annotation, category: int, segmentation: list | dict) -> Thing:
    box = annotation.bbox
    return Thing(
        category,
        segmentation,
        bool(annotation.iscrowd),
        max(annotation.area or 0.0, 0.0),  # of some formulas it has a sign
        tuple(box) if box is not None and len(box) == 4 else None,
    )


def at(path: Path, place: int, key: str, error: object) -> UserError:
    """What is wrong with a value; `error` may begin with the place within it."""
    between = "" if str(error).startswith("[") else ": "
    return UserError(f"{path}: annotations[{place}].{key}{between}{error}; {CURE}.")


def check_numbers(annotation: Annotation, place: int, path: Path) -> None:
    """UserError when an annotation has a number that is none."""
    if annotation.area is not None and not math.isfinite(annotation.area):
        raise at(path, place, "area", f"{annotation.area} is no area")
    if annotation.bbox and not abs(sum(map(abs, annotation.bbox))) < math.inf:
        raise at(path, place, "bbox", f"it is no box ({annotation.bbox})")


def say(tally: Tally, number: int, path: Path) -> None:
    """Warn of what a file's annotations have lost; UserError when no object has a pixel."""
    if tally.empty and len(tally.empty) == number:
        raise UserError(
            f"{path}: none of its {number} objects has a pixel in its picture; their coordinates "
            f"must be pixels of the picture on disk, not shares of its width and height; {CURE}."
        )
    for key in sorted(tally.misspelt):
        warnings.warn(
            f"{path}: {key} is not looked at, because COCO calls it iscrowd", stacklevel=4
        )
    if tally.without_outline:
        warnings.warn(
            f"{tally.without_outline} annotations of {path} have no polygon of three points; they "
            f"are left out",
            stacklevel=4,
        )
    elif tally.dropped:
        warnings.warn(
            f"{tally.dropped} polygons of {path} have fewer than three points, or an odd count of "
            f"numbers; they are left out",
            stacklevel=4,
        )
    if tally.empty:
        warnings.warn(
            f"{len(tally.empty)} of {number} objects of {path} have no pixel in their picture "
            f"(first: annotations[{min(tally.empty)}]); nothing is learned from them, and no "
            f"detection can find them",
            stacklevel=4,
        )


# ---------------------------------------------------------------------------------------- pictures
def finder(bases: list[Path], part: str) -> Callable[[Picture], Path | None]:
    """Record of an image -> its file. Folders are listed once: asking for each file is slow on a
    network disk. Pictures of a part other than train and val (tune) are looked for among the
    training pictures, too."""
    parts = [part] if part == "val" else list(dict.fromkeys([part, "train"]))
    subfolders = [""]
    for name in parts:
        subfolders += [name, f"{name}2017"]
    places = [base / subfolder for base in bases for subfolder in subfolders]

    @functools.cache
    def files(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def locate(picture: Picture) -> Path | None:
        url = (picture.coco_url or "").split("/")
        for name in (picture.file_name, "/".join(url[-2:]), url[-1]):
            if not name:
                continue
            for place in places:
                folder, file = os.path.split(os.path.join(place, name))
                if file in files(folder):
                    return Path(folder, file)
        return None

    return locate


def photos_of(content: Content, locate: Callable[[Picture], Path | None]) -> list[Photo]:
    """The pictures of a file by ascending id, with their objects; UserError where it contradicts
    itself or the disk. `locate` maps records to files."""
    path = content.path
    index = {category: place for place, category in enumerate(content.classes)}

    def class_indices(ids: list[int | str] | None) -> tuple[int, ...]:
        return tuple(index[i] for i in map(number_of, ids or ()) if i in index)

    photos = {
        picture.id: Photo(
            picture.name(),
            locate(picture),
            picture.id,
            picture.height,
            picture.width,
            tuple(content.things[picture.id]),
            negative=class_indices(picture.neg_category_ids),
            partial=class_indices(picture.not_exhaustive_category_ids),
        )
        for picture in content.pictures
    }
    photos = [photos[number] for number in ascending(list(photos), "images", path)]
    names = {photo.name for photo in photos}
    if "" in names:
        raise UserError(f"{path}: an image lacks its file_name; {CURE}.")
    if len(names) < len(photos):
        raise UserError(f"{path} lists an image twice; ids and file names must differ.")
    lost = [photo.name for photo in photos if photo.image is None]
    if lost:
        raise UserError(
            f"{len(lost)} of the {len(photos)} images of {path} are not on disk, for example "
            f"{lost[0]}; name the folder that holds them with --images (layout in data/README.md)."
        )
    return photos
