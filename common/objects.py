"""Annotated objects as they lie on disk, and their masks under a joint geometry.

Things are what can be counted, as Cityscapes and COCO call it: a person, not the sky."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import transforms
from common.boxes import boxes_of
from common.errors import RankError
from common.files import read_map
from common.outlines import coco_mask

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
    """One annotated object, in class `category`; `area` in pixels as the file says, 0 where it does
    not, and likewise `box`: x, y, width, height.

    `segmentation`: polygons, float64 arrays x, y, x, y, ... in pixels; or pycocotools' run lengths;
    or the object's value in a Cityscapes instanceIds PNG. All were checked when they were read
    (`common/coco.py`), so that they can be drawn in a picture of their size. A crowd is a region of
    many objects: no target, and ignored when scoring."""

    category: int
    segmentation: list | dict | int
    crowd: bool
    area: float
    box: tuple[float, float, float, float] | None = None


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


# -------------------------------------------------------------------------------------------- masks
class Window(NamedTuple):
    """The geometry that a picture and its masks share: they are flipped left-right, or not, then
    resized to `size` (height, width), and then the window of size `out` at (top, left) is cut,
    which may reach over every border."""

    flip: bool
    size: tuple[int, int]
    top: int
    left: int
    out: tuple[int, int]


def cut_out(image: Tensor, window: Window, fill: int | Tensor) -> Tensor:
    """The window (3, h, w) of a picture (3, H, W) uint8, resized with antialiasing. What lies
    outside of the picture is `fill`, a level or a colour (3, 1, 1)."""
    if window.flip:
        image = image.flip(-1)
    image = F.interpolate(image[None], size=window.size, mode="bilinear", antialias=True)[0]
    rows, image_rows = transforms.overlap(image.shape[1], window.top, window.out[0])
    columns, image_columns = transforms.overlap(image.shape[2], window.left, window.out[1])
    out = torch.empty(3, *window.out, dtype=torch.uint8)
    out[:] = fill
    out[:, rows, columns] = image[:, image_rows, image_columns]
    return out


class Masks(NamedTuple):
    """Objects of a picture as they look in a window."""

    labels: Tensor  # (N,) int64
    masks: Tensor  # (N, h, w) uint8, 0 or 1
    crowds: Tensor  # (N,) bool, whether it is a region of many objects


def masks_of(
    photo: Photo,
    data: Instances,
    window: Window | None = None,
    crowds: bool = False,
    empty: bool = True,
) -> Masks:
    """The objects of a picture in the file's order, with crowds if `crowds`. Without a `window` the
    masks are in the picture's own frame. Without `empty`, objects of which the window shows nothing
    are left out.

    Polygons are moved as coordinates and drawn on the window, so they stay sharp; run lengths and
    instanceIds are decoded, and each pixel of the window takes the nearest one."""
    assert photo.things is not None or photo.label is not None, f"{photo.name} has no labels"
    photo, ids = with_things(photo)
    whole = (photo.height, photo.width)
    if window is None:
        window = Window(False, whole, 0, 0, whole)
    if ids is not None:
        ids = nearest_in_window(ids, window)
    shown: list[tuple[Thing, Drawing]] = []
    for thing in photo.things:
        if thing.crowd and not crowds:
            continue
        drawing = draw(thing.segmentation, whole, window, ids)
        if empty or drawing.pixels.any():
            shown.append((thing, drawing))
    masks = np.zeros((len(shown), *window.out), np.uint8)
    for mask, (_, drawing) in zip(masks, shown, strict=True):
        mask[drawing.rows, drawing.columns] = drawing.pixels
    return Masks(
        torch.tensor([thing.category for thing, _ in shown], dtype=torch.int64),
        torch.from_numpy(masks),
        torch.tensor([thing.crowd for thing, _ in shown], dtype=torch.bool),
    )


class Drawing(NamedTuple):
    """A mask in that part of a window outside of which an object has no pixel."""

    rows: slice
    columns: slice
    pixels: np.ndarray


def draw(
    segmentation: list | dict | int,
    whole: tuple[int, int],
    window: Window,
    ids_in_window: np.ndarray | None,
) -> Drawing:
    """An object in a window of its picture, whose size is `whole`."""
    if isinstance(segmentation, list):
        polygons = [polygon_in_window(points, whole, window) for points in segmentation]
        return draw_polygons(polygons, window.out)
    if isinstance(segmentation, dict):
        assert tuple(segmentation["size"]) == whole, "run lengths of another picture"
        return draw_runs(segmentation, whole, window)
    height, width = window.out
    return Drawing(slice(0, height), slice(0, width), ids_in_window == segmentation)


def draw_polygons(polygons: list[np.ndarray], size: tuple[int, int]) -> Drawing:
    """The union of polygons on a canvas of `size` (height, width). It is drawn on a canvas that
    ends behind them, which changes no pixel of it."""
    rows, columns = part_around(np.concatenate(polygons), size)
    if rows.start == rows.stop or columns.start == columns.stop:
        return Drawing(slice(0), slice(0), np.zeros((0, 0), np.uint8))
    runs = coco_mask().merge(coco_mask().frPyObjects(polygons, rows.stop, columns.stop))
    return Drawing(rows, columns, coco_mask().decode(runs)[rows, columns])


def draw_runs(runs: dict, whole: tuple[int, int], window: Window) -> Drawing:
    """Run lengths in a window of a picture, whose size is `whole`."""
    mask = coco_mask().decode(runs)
    x, y, width, height = coco_mask().toBbox(runs)
    corners = polygon_in_window(np.array([x, y, x + width, y + height]), whole, window)
    rows, columns = part_around(corners, window.out)
    part = window._replace(
        top=window.top + rows.start,
        left=window.left + columns.start,
        out=(rows.stop - rows.start, columns.stop - columns.start),
    )
    return Drawing(rows, columns, nearest_in_window(mask, part))


def part_around(points: np.ndarray, size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of a canvas of `size` (height, width) in which what lies between points
    x, y, x, y, ... can have pixels, and one more on each side."""
    x, y = points[0::2], points[1::2]
    top, left = max(int(y.min()) - 2, 0), max(int(x.min()) - 2, 0)
    bottom, right = min(int(y.max()) + 3, size[0]), min(int(x.max()) + 3, size[1])
    return slice(top, max(bottom, top)), slice(left, max(right, left))


def polygon_in_window(points: np.ndarray, whole: tuple[int, int], window: Window) -> np.ndarray:
    """Coordinates x, y, x, y, ... in a picture of size `whole` (height, width) -> in the window."""
    height, width = whole
    x, y = points[0::2], points[1::2]
    if window.flip:
        x = width - x
    moved = np.empty_like(points)
    moved[0::2] = x * (window.size[1] / width) - window.left
    moved[1::2] = y * (window.size[0] / height) - window.top
    return moved


def nearest_in_window(values: np.ndarray, window: Window, outside: int = 0) -> np.ndarray:
    """(H, W) -> the window (h, w) of it, nearest pixel with half-pixel centres, `outside` where it
    shows nothing of the picture."""
    height, width = values.shape
    rows, ys = nearest_places(height, window.size[0], window.top, window.out[0])
    columns, xs = nearest_places(width, window.size[1], window.left, window.out[1])
    if window.flip:
        xs = width - 1 - xs
    cut = np.full(window.out, outside, values.dtype)
    cut[rows, columns] = values[ys[:, None], xs]
    return cut


def nearest_places(length: int, size: int, start: int, number: int) -> tuple[slice, np.ndarray]:
    """Along one axis: `length` pixels are resized to `size`, and a window of `number` begins at
    `start`. Which part of the window lies inside, and which pixel each place of it takes."""
    first = max(start, 0)
    at = np.arange(first, max(min(start + number, size), first))
    return slice(first - start, first - start + len(at)), (2 * at + 1) * length // (2 * size)


class WithThings(NamedTuple):
    """A picture with its objects and size, and its instanceIds (H, W) int32 where it has a label
    PNG."""

    photo: Photo
    ids: np.ndarray | None


def with_things(photo: Photo) -> WithThings:
    """Read the label PNG of a picture, if it has one. Of its values, 24000 to 33999 are objects of
    the class value // 1000; the same classes under 1000 are crowds."""
    if photo.label is None:
        return WithThings(photo, None)
    ids = read_ids(photo.label)
    counts = np.bincount(ids.ravel())
    classes = list(CITYSCAPES_THINGS)
    things = []
    for value in np.flatnonzero(counts).tolist():
        crowd = value < 1000
        label_id = value if crowd else value // 1000
        if label_id in CITYSCAPES_THINGS:
            things.append(Thing(classes.index(label_id), value, crowd, float(counts[value])))
    photo = photo._replace(things=tuple(things), height=ids.shape[0], width=ids.shape[1])
    return WithThings(photo, ids)


def read_ids(path: Path) -> np.ndarray:
    """(H, W) int32 of a Cityscapes instanceIds PNG."""
    ids, mode = read_map(path)
    if mode not in ("I", "I;16", "I;16B", "L") or not 0 <= ids.min() <= ids.max() < 2**16:
        raise RankError(
            f"The label {path} (mode {mode}) is no map of instance ids, a single-channel 16-bit "
            f"PNG; fetch or make it again."
        )
    return ids.astype(np.int32)


class TrueObjects(NamedTuple):
    """The objects of a picture in its own frame."""

    labels: Tensor  # (N,) int64
    masks: Tensor  # (N, H, W) uint8, none of them empty
    boxes: Tensor  # (N, 4) float32


def true_objects(photo: Photo, data: Instances, chosen: list[int] | None = None) -> TrueObjects:
    """All objects of a picture, or the `chosen` ones; crowds and empty masks are left out."""
    if chosen is not None:
        photo = photo._replace(things=tuple(photo.things[i] for i in chosen))
    labels, masks, _ = masks_of(photo, data)
    has_pixels = masks.flatten(1).any(1).bool()
    masks = masks[has_pixels]
    return TrueObjects(labels[has_pixels], masks, boxes_of(masks))
