"""What is found and what is true, as COCO's files say it, and the average precision of masks of the
Cityscapes benchmark. Any number of processes gives the same numbers.

All numbers are in percent, and None where there is no object to find."""

from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import World
from common.errors import RankError
from common.objects import CITYSCAPES_THINGS, Instances, Photo, Thing, with_things
from common.outlines import coco_mask, packed

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # of the overlap, written as in cityscapesScripts
MIN_PIXELS = 100  # smaller objects of Cityscapes need not be found

# The labelIds that Cityscapes does not score.
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)


# ------------------------------------------------------------------------------------------ results
def encode(masks: Tensor) -> list[dict]:
    """Masks (N, H, W), bool or numbers of which each but 0 belongs to the object -> N run lengths
    as JSON files hold them (`counts` is text)."""
    if not len(masks):
        return []
    foreground = (masks != 0).to(torch.uint8)
    # pycocotools runs down the columns; the masks are turned on their own device, which is fast.
    columns = foreground.transpose(1, 2).contiguous().cpu().numpy()
    return [
        {"size": list(runs["size"]), "counts": runs["counts"].decode()}
        for runs in coco_mask().encode(columns.transpose(2, 1, 0))
    ]


def results_of(
    image_id: int,
    ids: list[int],
    labels: Tensor,
    scores: Tensor,
    masks: Tensor | None,
    boxes: Tensor | None = None,
) -> list[dict]:
    """The entries of one image in a COCO results file, from class indices (N,), scores (N,) and
    masks (N, H, W) in the size of the image, or None. `ids` are the data set's category ids.

    Boxes (N, 4), x0, y0, x1, y1, are written as x, y, width, height. Without `boxes` the entries
    have no bbox, because pycocotools would take the areas of the masks from it."""
    entries = [
        {"image_id": image_id, "category_id": ids[label], "score": score}
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]
    if masks is not None:
        for entry, runs in zip(entries, encode(masks), strict=True):
            entry["segmentation"] = runs
    if boxes is not None:
        for entry, (x0, y0, x1, y1) in zip(entries, boxes.tolist(), strict=True):
            entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    return entries


def gather(world: World, items: list) -> list:
    """The items of all processes, on every process, in the order of images, so that equal scores
    are ranked the same on any number of processes. Entries of a results file are sorted by their
    image_id, and tuples by their first value."""

    def image_of(item: dict | tuple) -> int:
        return item["image_id"] if isinstance(item, dict) else item[0]

    parts = [items]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, items)
    return sorted(chain.from_iterable(parts), key=image_of)


def from_main(world: World, value: Any) -> Any:
    """The main process's value, on every process. It is also for what lies on disk: a network disk
    may show a new file later to other machines."""
    return gather(world, [(world.rank, value)])[0][1]


# -------------------------------------------------------------------------------------------- truth
def truth_of(data: Instances) -> dict:
    """The content of a COCO or LVIS file for the scored pictures, made of their objects, as
    training sees them; or of Cityscapes' label PNGs, in which groups are crowds. Make it once where
    it is needed often."""
    if any(photo.label for photo in data.val):
        return truth_of_labels(data)
    return truth_of_things(data)


def truth_of_labels(data: Instances) -> dict:
    """What `truth_of` gives, made from Cityscapes' instanceIds. What is void there is background
    here."""
    images = []
    annotations = []
    for photo in data.val:
        photo, ids = with_things(photo)
        images.append(
            {
                "id": photo.id,
                "file_name": photo.image.name,
                "height": photo.height,
                "width": photo.width,
            }
        )
        flat = ids.ravel(order="F")  # down the columns, as COCO's run lengths go
        starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))  # of runs of equal values
        ends = np.append(starts[1:], flat.size)
        for thing in photo.things:
            is_thing = flat[starts] == thing.segmentation
            edges = np.stack([starts[is_thing], ends[is_thing]], axis=1).ravel()
            counts = np.diff(edges, prepend=0, append=flat.size)
            runs = packed(counts, photo.height, photo.width)
            annotations.append(
                {
                    "image_id": photo.id,
                    "category_id": data.ids[thing.category],
                    "segmentation": runs,
                    "area": thing.area,
                    "bbox": coco_mask().toBbox(runs).tolist(),
                    "iscrowd": int(thing.crowd),
                }
            )
    return {"images": images, "categories": categories_of(data), "annotations": annotations}


def truth_of_things(data: Instances) -> dict:
    """What `truth_of` gives, made from the objects of the Photos. An object whose file gives no
    area, or 0, has that of its mask. A bbox that the file does not give is the extent of the
    polygons to two digits, as in COCO and LVIS, or that of the mask."""
    images = []
    annotations = []
    for photo in data.val:
        assert photo.things is not None, f"{photo.name} has no labels"
        image = {
            "id": photo.id,
            "file_name": photo.name,
            "height": photo.height,
            "width": photo.width,
        }
        if data.lvis:
            image["neg_category_ids"] = [data.ids[c] for c in photo.negative]
            image["not_exhaustive_category_ids"] = [data.ids[c] for c in photo.partial]
        images.append(image)
        for thing in photo.things:
            annotations.append(annotation_of(thing, photo, data.ids[thing.category]))
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return {"images": images, "categories": categories_of(data), "annotations": annotations}


def annotation_of(thing: Thing, photo: Photo, category_id: int) -> dict:
    """An object in COCO's form, but for its id."""
    area, box = thing.area, thing.box
    if not area:
        area = float(coco_mask().area(runs_of(thing.segmentation, photo.height, photo.width)))
    if box is None:
        if isinstance(thing.segmentation, list):
            points = np.concatenate(thing.segmentation).reshape(-1, 2)
            box = np.concatenate([points.min(axis=0), np.ptp(points, axis=0)]).round(2).tolist()
        else:
            box = coco_mask().toBbox(thing.segmentation).tolist()
    return {
        "image_id": photo.id,
        "category_id": category_id,
        "segmentation": thing.segmentation,
        "area": area,
        "bbox": list(box),
        "iscrowd": int(thing.crowd),
    }


def runs_of(segmentation: list | dict, height: int, width: int) -> dict:
    """The run lengths of an outline, which may be given as polygons, in a picture of this size."""
    if isinstance(segmentation, list):
        return coco_mask().merge(coco_mask().frPyObjects(segmentation, height, width))
    return segmentation


def categories_of(data: Instances) -> list[dict]:
    """The records of the classes, with their frequency where the data set knows it."""
    records = [{"id": i, "name": name} for i, name in zip(data.ids, data.classes, strict=True)]
    if data.frequency:
        for record, frequency in zip(records, data.frequency, strict=True):
            record["frequency"] = frequency
    return records


# --------------------------------------------------------------------------------------- Cityscapes
class Found(NamedTuple):
    """What the detections of one image, or of many, have found."""

    labels: np.ndarray  # (P,) class indices of the detections
    scores: np.ndarray  # (P,)
    outcome: np.ndarray  # (P, 10) at each threshold: 1 right, 0 wrong, -1 does not count
    objects: np.ndarray  # (8,) how many objects of each class there are to find, for each image


class CityscapesAP:
    """AP of the Cityscapes benchmark. It differs from COCO's in four ways: a detection must overlap
    by more than the threshold; the best of several detections on one object is right and the others
    are wrong; a detection that lies mostly on what is not scored does not count; and precision is
    integrated over the raw curve. Objects under 100 pixels are not scored."""

    def __init__(self):
        self.records: list[Found] = []  # one for each image

    def add(self, truth: np.ndarray, predictions: list[tuple[int, float, np.ndarray]]) -> None:
        """Judge the predictions of one image: class index, score and mask (H, W) bool of each.
        `truth` (H, W) are its instanceIds. Predictions with an empty mask are left out."""
        pixels = np.bincount(truth.ravel())
        values = np.flatnonzero(pixels)  # (V,) the instanceIds of the regions of this image
        sizes = pixels[values]
        region_of_value = np.zeros(len(pixels), np.int64)
        region_of_value[values] = np.arange(len(values))
        overlaps = overlaps_of(predictions, region_of_value[truth], len(values))
        labels = np.array([label for label, _, _ in overlaps], np.int64)
        scores = np.array([score for _, score, _ in overlaps], np.float64)
        overlap = np.array([shared for _, _, shared in overlaps], np.int64)
        overlap = overlap.reshape(len(labels), len(values))  # (P, V) pixels

        # Groups of objects have the number of their class, single objects 1000 times that and more.
        is_group = values < 1000
        kinds = np.where(is_group, values, values // 1000)
        is_small = sizes < MIN_PIXELS
        is_object = ~is_group & ~is_small
        things = np.array(list(CITYSCAPES_THINGS))
        of_class = kinds == things[labels][:, None]  # (P, V)
        area = overlap.sum(axis=1)  # (P,)
        ious = overlap / (sizes + area[:, None] - overlap)

        # (10, P, V). Regions do not overlap, so a detection passes on one of them at most.
        passes = (ious > THRESHOLDS[:, None, None]) & of_class & is_object
        on_void = (overlap * np.isin(values, VOID)).sum(axis=1)
        # As in the benchmark, pixels of a small group count twice.
        on_groups = (overlap * (of_class & is_group)).sum(axis=1)
        on_small = (overlap * (of_class & is_small)).sum(axis=1)
        ignored = (on_void + on_groups + on_small) / area
        outcome = np.where(ignored > THRESHOLDS[:, None], -1, 0)  # (10, P)
        outcome[passes.any(axis=2)] = 0  # wrong, unless it is the best on its object
        if len(labels):
            best = np.where(passes, scores[:, None], -np.inf).argmax(axis=1)  # (10, V)
            threshold, region = np.nonzero(passes.any(axis=1))
            outcome[threshold, best[threshold, region]] = 1

        kinds_of_objects = kinds[is_object & np.isin(kinds, things)]
        classes = np.searchsorted(things, kinds_of_objects)
        objects = np.bincount(classes, minlength=len(things))
        self.records.append(Found(labels, scores, outcome.T.astype(np.int8), objects))

    def result(self, world: World | None = None) -> dict:
        """ap, ap50 and `per_class`, name -> ap, over the images of all processes of `world`: means
        over thresholds and over the classes that have an object."""
        classes = len(CITYSCAPES_THINGS)
        empty = Found(
            np.zeros(0, np.int64),
            np.zeros(0),
            np.zeros((0, len(THRESHOLDS)), np.int8),
            np.zeros(classes, np.int64),
        )
        # The order of images makes no difference here, so all of them go by the number 0.
        items = gather(world or World(), [(0, record) for record in self.records])
        records = [empty, *(record for _, record in items)]
        found = Found(*(np.concatenate(values) for values in zip(*records, strict=True)))
        objects = found.objects.reshape(-1, classes).sum(axis=0)
        table = np.full((classes, len(THRESHOLDS)), -1.0)
        for c, t in np.ndindex(*table.shape):
            if objects[c]:
                counts = (found.labels == c) & (found.outcome[:, t] >= 0)
                right = found.outcome[counts, t]
                table[c, t] = area_under(found.scores[counts], right, objects[c])
        names = CITYSCAPES_THINGS.values()
        return {
            "ap": percent(table),
            "ap50": percent(table[:, 0]),
            "per_class": {name: percent(row) for name, row in zip(names, table, strict=True)},
        }


def overlaps_of(
    predictions: list[tuple[int, float, np.ndarray]], regions: np.ndarray, number: int
) -> list[tuple[int, float, np.ndarray]]:
    """The class index and score of each prediction whose mask is not empty, and how many pixels its
    mask shares with each of the `number` regions that `regions` (H, W) numbers from 0."""
    overlaps = []
    for label, score, mask in predictions:
        if mask.shape != regions.shape:
            raise RankError(
                f"A mask of {mask.shape[1]}x{mask.shape[0]} pixels is scored on a label of "
                f"{regions.shape[1]}x{regions.shape[0]}; images and labels must be of one size."
            )
        rows = np.flatnonzero(mask.any(axis=1))
        if not len(rows):
            continue
        rows = slice(rows[0], rows[-1] + 1)
        columns = np.flatnonzero(mask[rows].any(axis=0))
        box = (rows, slice(columns[0], columns[-1] + 1))  # counting within it is faster
        shared = np.bincount(regions[box][mask[box]], minlength=number)
        overlaps.append((label, score, shared))
    return overlaps


def area_under(scores: np.ndarray, right: np.ndarray, objects: int) -> float:
    """The area under the curve of precision over recall, for detections with `scores` (N,), of
    which `right` (N,) says by 1 and 0 whether they are right, and for a number of `objects`.

    The curve has a point for each score, that of all detections at or above it, and ends at recall
    0 and precision 1. Each point is as wide as half-way to its neighbours, and the one of the
    highest recall has no neighbour beyond it."""
    if not len(scores):
        return 0.0
    order = np.argsort(scores)
    _, first = np.unique(scores[order], return_index=True)
    found = right[order][::-1].cumsum()[::-1][first]  # how many at or above each score are right
    precision = np.append(found / (len(scores) - first), 1.0)
    recall = np.append(found / objects, 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    widths = np.convolve(padded, [-0.5, 0.0, 0.5], "valid")
    return float(precision @ widths)


def percent(values: np.ndarray) -> float | None:
    """100 times the mean of the values that are not -1. The evaluators write -1 where there is no
    object to find."""
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None
