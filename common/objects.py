"""Annotated objects as they lie on disk, and their masks under a joint geometry."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask
from torch import Tensor

from common import transforms
from common.boxes import boxes_of
from common.errors import RankError

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


def singles(photo: Photo) -> set[int]:
    """The classes of the objects of a picture that are no crowds."""
    return {thing.category for thing in photo.things or () if not thing.crowd}


def bare(photo: Photo) -> Photo:
    """The picture without its labels, so that none can be opened."""
    return photo._replace(things=None, label=None, negative=(), partial=())


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


def true_objects(
    photo: Photo, data: Instances, chosen: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N,), masks (N, H, W) uint8 and boxes (N, 4) of the objects of a picture, or of the
    `chosen` ones, in its own frame; crowds and empty masks are left out."""
    if chosen is not None:
        photo = photo._replace(things=tuple(photo.things[i] for i in chosen))
    labels, masks, _ = masks_of(photo, data)
    seen = masks.flatten(1).any(1).bool()
    return labels[seen], masks[seen], boxes_of(masks[seen])
