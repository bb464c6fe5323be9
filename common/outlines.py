"""What a JSON file says of an object's outline: six forms, read into two, and checked before C code
sees them.

pycocotools trusts what it is given. Run lengths that do not add up leave its memory uninitialised,
or let it run for ever, and a wild coordinate takes memory for every pixel on the way there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import msgspec
import numpy as np

from common.typed_json import said

FAR = 1e6  # no coordinate reaches so far, in pixels
LONG = 2e6  # no outline of one object is so long, in pixels
NEEDS = "it must be polygons, x, y, x, y, ... in pixels, or run lengths"


class RunLengths(msgspec.Struct, gc=False):
    """Lengths of runs of pixels down the columns, background first; `size` is height and width."""

    size: tuple[int, int]
    counts: str | list[int]  # as text they are compressed


class Outline(NamedTuple):
    """An outline as a file has it: polygons, float64 arrays x, y, x, y, ..., or run lengths."""

    polygons: list[np.ndarray]
    runs: list[RunLengths]
    dropped: int  # polygons of fewer than three points or an odd count of numbers, left out


POLYGONS = msgspec.json.Decoder(list[list[float]], strict=False)
ANYTHING = msgspec.json.Decoder()


def coco_mask():
    """The functions of pycocotools on run lengths, loaded at the first use: --help needs none."""
    from pycocotools import mask

    return mask


# ------------------------------------------------------------------------------------------ reading
def read_outline(found: msgspec.Raw | list[list[float]] | RunLengths) -> Outline:
    """The outline that a piece of JSON stands for, decoded or not; ValueError, which says what is
    wrong, when there is none."""
    if isinstance(found, list):
        return of_lists(found)
    if isinstance(found, RunLengths):
        return Outline([], [found], 0)
    try:
        return of_lists(POLYGONS.decode(found))
    except (msgspec.DecodeError, RecursionError) as error:
        return read_other_form(found, error)


def of_lists(polygons: list[list[float]]) -> Outline:
    """The outline of lists of numbers: polygons, or the points of one."""
    if len(polygons) == 1 and len(polygons[0]) >= 6 and len(polygons[0]) % 2 == 0:
        return Outline([np.array(polygons[0], np.float64)], [], 0)  # of nearly all objects
    if len(polygons) >= 3 and all(len(point) == 2 for point in polygons):
        polygons = [list(chain.from_iterable(polygons))]
    return of_polygons(polygons)


def of_polygons(polygons: list[list[float]]) -> Outline:
    """As in Detectron2, a polygon of an odd count or of fewer than six numbers is left out."""
    kept = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
    arrays = [np.array(numbers, np.float64) for numbers in kept]
    return Outline(arrays, [], len(polygons) - len(kept))


def read_other_form(text: msgspec.Raw | bytes, reason: Exception) -> Outline:
    """The outline in any form but polygons of plain numbers, of which `reason` says why it is
    not."""
    try:
        value = ANYTHING.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{error}; {NEEDS}") from None
    if value is None:
        return Outline([], [], 0)
    has_runs = isinstance(value, list) and any(isinstance(part, dict) for part in value)
    try:
        if isinstance(value, dict):
            return Outline([], [msgspec.convert(value, RunLengths, strict=False)], 0)
        if has_runs:
            return Outline([], msgspec.convert(value, list[RunLengths], strict=False), 0)
    except msgspec.ValidationError as error:
        raise ValueError(said(error)) from None
    try:
        return of_polygons([msgspec.convert(value, list[float], strict=False)])
    except msgspec.ValidationError:
        pass
    try:
        polygons = msgspec.convert(value, list[list[tuple[float, float]]], strict=False)
    except msgspec.ValidationError:
        why = said(reason) if isinstance(reason, msgspec.ValidationError) else str(reason)
        raise ValueError(f"{why}; {NEEDS}") from None
    return of_polygons([list(chain.from_iterable(points)) for points in polygons])


# -------------------------------------------------------------------------------------- run lengths
def merged_runs(parts: Sequence[RunLengths], height: int, width: int) -> tuple[dict, int]:
    """The run lengths of an object in pycocotools' form, and how many pixels it has; ValueError
    when they do not fit a picture of this size."""
    checked = [checked_counts(part, height, width) for part in parts]
    if len(checked) == 1:
        counts = checked[0]
        return packed(counts, height, width), int(counts[1::2].sum())
    runs = coco_mask().merge([packed(counts, height, width) for counts in checked])
    return runs, int(coco_mask().area(runs))


def packed(counts: np.ndarray, height: int, width: int) -> dict:
    """Checked run lengths in pycocotools' form."""
    size = [height, width]
    return coco_mask().frPyObjects({"size": size, "counts": counts.tolist()}, height, width)


def checked_counts(runs: RunLengths, height: int, width: int) -> np.ndarray:
    """The lengths of the runs, int64, which sum to height x width and of which the first alone may
    be 0."""
    if runs.size != (height, width):
        raise ValueError(
            f"its run lengths are for {runs.size[0]} x {runs.size[1]} pixels, height and width, "
            f"but its picture has {height} x {width}"
        )
    pixels = height * width
    if isinstance(runs.counts, str):
        counts = unpacked(runs.counts)
    else:
        try:
            counts = np.array(runs.counts, np.int64)
        except OverflowError:
            raise ValueError("its run lengths are too large") from None
    if not len(counts) or counts.min() < 0 or counts.max() > pixels or counts.sum() != pixels:
        in_bounds = len(counts) and counts.min() >= 0 and counts.max() <= pixels
        total = f"sum to {counts.sum()}" if in_bounds else "are not all within the picture"
        raise ValueError(f"its run lengths {total}, but must sum to {height} x {width} = {pixels}")
    if not counts[1:].all():
        # Where two masks have an empty run at one place, pycocotools stops comparing them there.
        counts = without_empty_runs(counts)
    return counts


def without_empty_runs(counts: np.ndarray) -> np.ndarray:
    """The same pixels in runs of which the first alone may be empty."""
    is_object = np.arange(len(counts)) % 2 == 1
    is_object, counts = is_object[counts > 0], counts[counts > 0]
    starts = np.flatnonzero(np.diff(is_object, prepend=not is_object[0]))
    joined = np.add.reduceat(counts, starts)
    return np.concatenate([[0], joined]) if is_object[0] else joined


def unpacked(text: str) -> np.ndarray:
    """The run lengths, int64, in a text of COCO's compression; they may be anything. Each is some
    symbols of five bits, the lowest first, the sixth bit of all but its last symbol set; and from
    the fourth on, what is written is the difference to the last but one."""
    try:
        symbols = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError("the text of its run lengths has a foreign character") from None
    if not len(symbols) or symbols.min() < 0 or symbols.max() > 63 or symbols[-1] & 32:
        raise ValueError("the text of its run lengths is cut off or has a foreign character")
    ends = np.flatnonzero(symbols < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("the text of its run lengths holds a number that is too large")
    place = np.arange(len(symbols)) - np.repeat(starts, lengths)
    values = np.add.reduceat((symbols & 31) << 5 * place, starts)
    is_negative = (symbols[ends] & 16) > 0
    values[is_negative] -= 1 << 5 * lengths[is_negative]
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


# ----------------------------------------------------------------------------------------- polygons
class Extents(NamedTuple):
    """Facts about P polygons, each (P,)."""

    left: np.ndarray
    right: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    length: np.ndarray  # of the edges, across and down
    area: np.ndarray

    def wild(self) -> int | None:
        """The first polygon that has a coordinate which is not finite or far outside of any
        picture, or too long an outline; None where all can be drawn."""
        is_near = (self.left > -FAR) & (self.right < FAR) & (self.top > -FAR) & (self.bottom < FAR)
        is_tame = is_near & (self.length < LONG)  # NaN is neither
        return None if is_tame.all() else int(is_tame.argmin())

    def surely_have_pixels(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """(P,) bool: whether a polygon has a pixel for certain, which is cheap to know of nearly
        all: it lies within its picture, and is not thin. A polygon holds a circle of its area over
        its length, and one of radius 1 holds the centre of a pixel."""
        is_within = (self.left >= 0) & (self.right <= widths)
        is_within &= (self.top >= 0) & (self.bottom <= heights)
        return is_within & (self.area > self.length)


def extents(polygons: Sequence[np.ndarray]) -> Extents:
    points = np.concatenate(polygons)
    sizes = np.array([len(polygon) // 2 for polygon in polygons])
    ends = sizes.cumsum() - 1
    starts = ends + 1 - sizes
    x, y = points[0::2].copy(), points[1::2].copy()
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    next_x[ends], next_y[ends] = x[starts], y[starts]
    with np.errstate(invalid="ignore", over="ignore"):  # of wild ones
        return Extents(
            np.minimum.reduceat(x, starts),
            np.maximum.reduceat(x, starts),
            np.minimum.reduceat(y, starts),
            np.maximum.reduceat(y, starts),
            np.add.reduceat(np.abs(next_x - x) + np.abs(next_y - y), starts),
            np.abs(np.add.reduceat(x * next_y - y * next_x, starts)) / 2,
        )


def has_pixels(polygons: list[np.ndarray], height: int, width: int) -> bool:
    """Whether an object of checked polygons has a pixel in its picture, by drawing it."""
    runs = coco_mask().frPyObjects(polygons, height, width)
    return bool(areas_of(runs).any())


def areas_of(runs: list[dict]) -> np.ndarray:
    """The areas (n,) of run lengths, in pixels. With more than 255 at once, pycocotools fails."""
    areas = [np.zeros(0, np.uint32)]
    for start in range(0, len(runs), 255):
        areas.append(coco_mask().area(runs[start : start + 255]))
    return np.concatenate(areas)
