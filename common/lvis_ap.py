"""LVIS's AP, as the `lvis` package (0.5.3) computes it, without the package and without its time
and memory.

An image of LVIS says of a few classes only whether they are there: of those with an object in it,
and of its neg_category_ids. Detections of other classes are neither right nor wrong (arXiv
1908.03195, section 2). The package visits every pair of an image and a class; here only the pairs
with a known answer are visited, a class at a time, and all thresholds, sizes and images of the
class are matched together. Numbers are in percent, None without an object."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from common.mask_ap import percent, truth_of
from common.objects import Instances, coco_mask

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the overlap


RECALLS = np.linspace(0, 1, 101)


# all, small, medium, large; in pixels
AREAS = np.array([[0, 1e5], [0, 32], [32, 96], [96, 1e5]]) ** 2


RIGHT, IGNORED = 1, 2  # outcome of a detection; 0 where it found nothing


BLOCK = 255  # more pycocotools cannot measure at once (2.0.11)


def lvis_ap(
    data: Instances | dict,
    results: list[dict],
    kind: str = "segm",
    max_dets: int = 300,
    frequency: list[str] | None = None,
) -> dict:
    """LVIS's AP of `results`, entries of a results file, on the scored pictures of a data set or on
    the content of an LVIS file. Results of several processes are gathered first (mask_ap.gather).

    `kind` is segm (run lengths, `counts` text or bytes; a bbox is not looked at) or bbox (that, or
    else the box of the mask, which then also gives the area). Of each image the `max_dets` best
    detections of all classes count. `frequency` is r, c or f of each class by ascending category
    id; by default what the data set or the file says.

    Gives ap, ap50, ap75, ap_s, ap_m, ap_l (objects up to 32^2, up to 96^2, larger), apr, apc, apf
    (means over rare, common and frequent classes), ar300 (named by `max_dets`: the mean highest
    recall), ar_s, ar_m, ar_l; `stats`, these 13 numbers in the order of the package; and
    `per_class`, name -> ap. As in the package objects and detections without area are left out,
    objects with `ignore` need not be found, and iscrowd means nothing. Unlike there, an object of
    id 0 can be found, and no results score 0."""
    truth = data if isinstance(data, dict) else truth_of(data)
    categories, images, objects, whose, shapes, pairs, scores, areas, partial = compared(
        truth, results, kind, max_dets, "scored"
    )
    if frequency is None:
        frequency = (
            [c.get("frequency") for c in categories] if isinstance(data, dict) else data.frequency
        )
    assert frequency is None or len(frequency) == len(categories), "one frequency for each class"
    # (D, 4) nothing found, but not wrong
    excused = outside(areas) | np.isin(pairs, partial)[:, None]
    needless = (
        outside(np.array([a["area"] for a in objects]))
        | np.array(
            # (G, 4) objects that need not be found
            [bool(a.get("ignore")) for a in objects],
            bool,
        )[:, None]
    )

    precision, recall = -np.ones((2, len(categories), len(AREAS), len(THRESHOLDS)))
    ends = [
        np.searchsorted(x, len(images) * np.arange(len(categories) + 1)) for x in (whose, pairs)
    ]
    for k, (g, d) in enumerate(zip(*(map(slice, e[:-1], e[1:]) for e in ends), strict=True)):
        if not needless[g].all():
            near = candidates(objects[g], shapes[d], whose[g], pairs[d], kind, images)
            outcome = match(*near, pairs[d], needless[g])
            precision[k], recall[k] = score(
                outcome, scores[d], excused[d], (~needless[g]).sum(axis=0)
            )
    stats = [
        percent(precision[:, 0]),
        percent(precision[:, 0, 0]),
        percent(precision[:, 0, 5]),
        *(percent(precision[:, a]) for a in range(1, 4)),
        *(
            percent(precision[[f == x for f in frequency or [None] * len(categories)], 0])
            for x in "rcf"
        ),
        *(percent(recall[:, a]) for a in range(4)),
    ]
    names = (
        "ap",
        "ap50",
        "ap75",
        "ap_s",
        "ap_m",
        "ap_l",
        "apr",
        "apc",
        "apf",
        f"ar{max_dets}",
        "ar_s",
        "ar_m",
        "ar_l",
    )
    return {
        **dict(zip(names, stats, strict=True)),
        "stats": stats,
        "per_class": {c["name"]: percent(precision[k, 0]) for k, c in enumerate(categories)},
    }


class Samples(NamedTuple):
    """Detections with a known answer, ascending by class, then image, and by falling confidence:
    their class indices (N,) int64, confidences (N,) float64, and whether each has found an object
    of its class (N,) bool."""

    labels: np.ndarray
    conf: np.ndarray
    right: np.ndarray


def samples(
    data: Instances | dict,
    results: list[dict],
    kind: str = "bbox",
    overlap: float = 0.5,
    max_dets: int = 300,
    federated: bool | None = None,
) -> Samples:
    """What a calibration error is measured on: each of `results` that is right or wrong in
    `lvis_ap`'s evaluation at this overlap, without limits of size. `data`, `kind` and `max_dets`
    are as there.

    If `federated`, detections of classes about which their image says nothing are left out; if not,
    as in COCO, a class that is not annotated is absent. None takes the data's word: `data.lvis`, or
    whether images of the file have neg_category_ids. Unlike AP, this has use for classes without
    any object: their detections are wrong ones.

    Left out, as neither right nor wrong, are detections that find nothing where their class is
    annotated in part, that find an object with `ignore`, or nothing and have this share of their
    area in a crowd. A crowd is no object, but in federated data its class is a known one."""
    assert 0 < overlap <= 1, overlap
    truth = data if isinstance(data, dict) else truth_of(data)
    if federated is None:
        federated = (
            any("neg_category_ids" in image for image in truth["images"])
            if data is truth
            else data.lvis
        )
    _, images, objects, whose, shapes, pairs, scores, _, partial = compared(
        truth, results, kind, max_dets, "federated" if federated else "all"
    )
    crowd = np.array([bool(a.get("iscrowd")) for a in objects], bool)
    (found, *single), (hidden, *_) = (
        candidates(
            [a for a, x in zip(objects, mine, strict=True) if x],
            shapes,
            whose[mine],
            pairs,
            kind,
            images,
            overlap,
            crowds,
        )
        for mine, crowds in ((~crowd, False), (crowd, True))
    )
    needless = np.array([bool(a.get("ignore")) for a in objects], bool)[~crowd, None]
    outcome = match(found, *single, pairs, needless, np.array([overlap]))[:, 0, 0]
    excused = np.isin(pairs, partial)
    excused[hidden] = True
    counts = (outcome == RIGHT) | ((outcome == 0) & ~excused)
    return Samples(pairs[counts] // max(len(images), 1), scores[counts], outcome[counts] == RIGHT)


class Compared(NamedTuple):
    """Objects and detections that are looked at, both by ascending pair: that of class k and image
    i has the number k * len(images) + i. Classes and images are by ascending id, detections of a
    pair by falling score."""

    categories: list[dict]
    images: list[dict]
    objects: list[dict]  # (G,) annotations
    whose: np.ndarray  # (G,) pairs of the objects
    shapes: list | np.ndarray  # (D,) run lengths or boxes of the detections
    pairs: np.ndarray  # (D,) theirs
    scores: np.ndarray  # (D,)
    areas: np.ndarray  # (D,) in pixels
    partial: np.ndarray  # pairs of which only some objects are annotated


def compared(truth: dict, results: list[dict], kind: str, max_dets: int, known: str) -> Compared:
    """What has an area, of the content of a file and of results, in pairs with a `known` answer:
    "federated", those that have an object or are said to be absent; "scored", of these the ones of
    a class with an object; "all"."""
    categories, images = (
        sorted(truth[key], key=lambda record: record["id"]) for key in ("categories", "images")
    )
    n, classes = len(images), {c["id"]: k for k, c in enumerate(categories)}
    places = {image["id"]: i for i, image in enumerate(images)}
    objects = [
        a
        for a in truth["annotations"]
        if a["image_id"] in places and a["category_id"] in classes and 0 < a["area"] < np.inf
    ]
    objects.sort(key=lambda a: classes[a["category_id"]] * n + places[a["image_id"]])
    whose = np.array(
        [classes[a["category_id"]] * n + places[a["image_id"]] for a in objects], np.int64
    )
    absent, partial = (
        np.array(
            [
                classes[c] * n + i
                for i, image in enumerate(images)
                for c in image.get(key) or ()
                if c in classes
            ],
            np.int64,
        )
        for key in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    answered = np.union1d(whose, absent)
    if known == "scored":
        # a class without an object has no AP
        answered = answered[np.isin(answered // n, whose // n)]
    order, pairs, scores = counted(
        results, classes, places, max_dets, None if known == "all" else answered
    )
    shapes, areas = shapes_of([results[i] for i in order], kind)
    real = (areas > 0) & (areas < np.inf)
    if not real.all():
        pairs, scores, areas = pairs[real], scores[real], areas[real]
        shapes = (
            shapes[real] if kind == "bbox" else [s for s, x in zip(shapes, real, strict=True) if x]
        )
    return Compared(categories, images, objects, whose, shapes, pairs, scores, areas, partial)


def group_by_count(counts) -> list[str]:
    """r, c or f of each class: thirds, by their number of pictures `counts` (K,), of the classes
    that have some, for a subset or a data set that has no rare class by LVIS's own limits (up to 10
    and up to 100 pictures).

    Equal counts are never parted: they go to the third in which the middle of their ranks lies, c
    if that is a border, so thirds may be unequal or empty: all c where all counts are equal.
    Classes without a picture are r."""
    counts = np.asarray(counts)
    ranks = np.sort(counts[counts > 0])
    # the middle, times two
    twice = np.searchsorted(ranks, counts, "left") + np.searchsorted(ranks, counts, "right")
    return [
        "r" if not n or 3 * m < 2 * len(ranks) else "c" if 3 * m <= 4 * len(ranks) else "f"
        for n, m in zip(counts.tolist(), twice.tolist(), strict=True)
    ]


def outside(areas: np.ndarray) -> np.ndarray:
    """Areas (N,) in pixels -> whether each is out of each range of AREAS (N, 4); a limit belongs to
    both its ranges."""
    return (areas[:, None] < AREAS[:, 0]) | (areas[:, None] > AREAS[:, 1])


def counted(
    results: list[dict], classes: dict, places: dict, max_dets: int, known: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which results count: among the `max_dets` best of their image, in a `known` pair (None: in
    any of a listed class). Their indices, pairs and scores (D,), sorted by pair, then by falling
    score, then as given."""
    assert all(r["image_id"] in places for r in results), (
        "a detection is of an image that is not scored"
    )
    image = np.array([places[r["image_id"]] for r in results], np.int64)
    pairs = (
        np.array([classes.get(r["category_id"], -1) for r in results], np.int64) * len(places)
        + image
    )
    scores = np.array([r["score"] for r in results], np.float64)
    order = np.lexsort((-scores, image))  # stable
    order = order[turns(image[order]) < max_dets]
    order = order[pairs[order] >= 0 if known is None else np.isin(pairs[order], known)]
    order = order[np.argsort(pairs[order], kind="stable")]
    return order, pairs[order], scores[order]


def turns(groups: np.ndarray) -> np.ndarray:
    """Group of each (N,), ascending -> its place within its group (N,), from 0."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def shapes_of(results: list[dict], kind: str) -> tuple[list | np.ndarray, np.ndarray]:
    """Run lengths, or boxes x, y, width, height (D, 4), of detections, and their areas (D,) in
    pixels."""
    if kind == "bbox":
        masks = [None if "bbox" in r else r["segmentation"] for r in results]
        boxes = [
            coco_mask().toBbox(m) if m else r["bbox"] for r, m in zip(results, masks, strict=True)
        ]
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        areas = [
            float(coco_mask().area(m)) if m else w * h
            for m, (_, _, w, h) in zip(masks, boxes, strict=True)
        ]
        return boxes, np.array(areas, np.float64)
    shapes = [r["segmentation"] for r in results]
    areas = [coco_mask().area(shapes[i : i + BLOCK]) for i in range(0, len(shapes), BLOCK)]
    return shapes, np.concatenate([np.zeros(0), *areas])


def shape_of(annotation: dict, kind: str, image: dict):
    """Run lengths or box of an object."""
    if kind == "bbox" and annotation.get("bbox") is not None:
        return annotation["bbox"]
    runs, size = annotation["segmentation"], (int(image["height"]), int(image["width"]))
    if isinstance(runs, list):
        runs = coco_mask().merge(coco_mask().frPyObjects(runs, *size))
    elif isinstance(runs["counts"], list):
        runs = coco_mask().frPyObjects(runs, *size)
    return coco_mask().toBbox(runs) if kind == "bbox" else runs


def candidates(
    objects: list[dict],
    shapes: list | np.ndarray,
    whose: np.ndarray,
    pairs: np.ndarray,
    kind: str,
    images: list[dict],
    lowest: float = THRESHOLDS[0],
    crowds: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index of the detection, index of the object and overlap (E,) of all that overlap by the
    `lowest` threshold, by ascending detection. Pairs of the objects (G,) and of the detections (D,)
    ascend. Where the objects are `crowds`, the overlap is the part of the detection that lies in
    one."""
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    both = np.intersect1d(whose, pairs)
    bounds = [np.searchsorted(x, both, side) for x in (whose, pairs) for side in ("left", "right")]
    for pair, *ends in zip(both, *bounds, strict=True):
        g0, g1, d0, d1 = ends
        true = [shape_of(a, kind, images[pair % len(images)]) for a in objects[g0:g1]]
        true = np.array(true, np.float64) if kind == "bbox" else true
        overlap = coco_mask().iou(shapes[d0:d1], true, [int(crowds)] * (g1 - g0))
        d, g = np.nonzero(overlap >= lowest)
        found.append((d + d0, g + g0, overlap[d, g]))
    return tuple(np.concatenate(x) for x in zip(*found, strict=True))


def match(
    found: np.ndarray,
    objects: np.ndarray,
    overlap: np.ndarray,
    pairs: np.ndarray,
    needless: np.ndarray,
    thresholds: np.ndarray = THRESHOLDS,
) -> np.ndarray:
    """The outcome of each detection, for each size and threshold (D, 4, 10): 0, RIGHT or IGNORED.

    By falling score each takes the object that is still free and overlaps most, of equal ones the
    last; one that need not be found only if there is no other. The first of every image go
    together, then the second, and so on, counting those with candidates: found, objects, overlap
    (E,). `pairs` (D,), `needless` (G, 4), one column a size."""
    number = len(found)
    outcome = np.zeros((len(pairs), needless.shape[1], len(thresholds)), np.int8)
    free = np.ones((*needless.shape, len(thresholds)), bool)
    value = np.empty(number, np.int32)  # of a candidate, higher is better, all differ
    value[np.lexsort((objects, overlap))] = np.arange(1, number + 1)
    who, place = np.unique(found, return_inverse=True)
    turn = turns(pairs[who])[place]
    order = np.argsort(turn, kind="stable")
    for start, stop in pairwise(np.searchsorted(turn[order], np.arange(turn.max(initial=-1) + 2))):
        now = order[start:stop]  # each object at most once, detections ascending
        d, g = found[now], objects[now]
        able = free[g] & (overlap[now, None, None] >= thresholds)  # (N, 4, 10)
        values = able * (value[now, None] + number * ~needless[g])[:, :, None]
        first = np.diff(d, prepend=-1) != 0
        best = np.maximum.reduceat(values, np.flatnonzero(first), axis=0)
        free[g] &= ~able | (values < best[np.cumsum(first) - 1])
        outcome[d[first]] = np.where(best > number, RIGHT, np.where(best > 0, IGNORED, 0))
    return outcome


def score(
    outcome: np.ndarray, scores: np.ndarray, excused: np.ndarray, number: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision, its mean over RECALLS, and highest recall of a class (4, 10); -1 where `number`
    (4,) of objects is 0.

    `outcome` (D, 4, 10) as from `match`, `scores` (D,), `excused` (D, 4): wrong only if not. The
    precision at a recall is the highest there or beyond. It is so where a detection is right, so
    only these are looked at."""
    order = np.argsort(-scores, kind="stable")
    cells = len(AREAS) * len(THRESHOLDS)
    wrong = (outcome == 0) & ~excused[:, :, None]
    right, wrong = ((x[order]).reshape(-1, cells).T for x in (outcome == RIGHT, wrong))  # (40, D)
    cell, rank = np.nonzero(right)
    nth = turns(cell) + 1
    below = np.cumsum(wrong, axis=1, dtype=np.int32)[cell, rank]
    table = np.zeros((cells, nth.max(initial=0) + 1))  # precision with the 1st, 2nd, ... right one
    table[cell, nth - 1] = nth / (below + nth + np.spacing(1))
    table = np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1].reshape(*outcome.shape[1:], -1)
    precision, recall = -np.ones((2, *outcome.shape[1:]))
    for a in np.flatnonzero(number):
        # right ones, for each recall
        need = np.searchsorted(np.arange(number[a] + 1) / number[a], RECALLS)
        precision[a] = table[a][:, np.clip(need - 1, 0, table.shape[-1] - 1)].mean(axis=1)
        recall[a] = right.reshape(*outcome.shape[1:], -1)[a].sum(axis=1) / number[a]
    return precision, recall
