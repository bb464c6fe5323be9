"""The average precision of LVIS, as the `lvis` package (0.5.3) computes it, without the package and
without the time and memory that it takes.

An image of LVIS says only of a few classes whether they are there: of those with an object in it,
and of its neg_category_ids. Detections of other classes are neither right nor wrong (arXiv
1908.03195, section 2). The package visits every pair of an image and a class. Here only the pairs
with a known answer are visited, one class after the other, and all thresholds, sizes and images of
a class are matched together. Numbers are in percent, and None where there is no object to find."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from common.mask_ap import percent, truth_of
from common.objects import Instances
from common.outlines import coco_mask

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the overlap
RECALLS = np.linspace(0, 1, 101)
# In pixels, from and to: objects of all sizes, small, medium and large ones.
AREAS = np.array([[0, 1e5], [0, 32], [32, 96], [96, 1e5]]) ** 2
RIGHT, IGNORED = 1, 2  # the outcome of a detection; 0 where it has found nothing
BLOCK = 255  # pycocotools 2.0.11 measures the areas of no more masks at once

NAMES = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l", "apr", "apc", "apf")


def lvis_ap(
    data: Instances | dict,
    results: list[dict],
    kind: str = "segm",
    max_dets: int = 300,
    frequency: list[str] | None = None,
) -> dict:
    """LVIS's AP of `results`, the entries of a results file, on the scored pictures of a data set
    or on the content of an LVIS file. Results of several processes are gathered first
    (`mask_ap.gather`).

    `kind` is segm or bbox. With segm the entries have run lengths (`counts` is text or bytes), and
    a bbox is not looked at. With bbox they have a bbox, or a mask, whose box and area are then
    used. The `max_dets` best detections of each image count, of all its classes together.
    `frequency` is r, c or f of each class by ascending category id, by default what the data set or
    the file says.

    The result has ap, ap50, ap75, ap_s, ap_m, ap_l (objects up to 32^2, up to 96^2, larger), apr,
    apc, apf (means over rare, common and frequent classes), ar300 (named by `max_dets`: the mean
    highest recall), ar_s, ar_m, ar_l; `stats`, these 13 numbers in the order of the package; and
    `per_class`, name -> ap.

    As in the package, objects and detections without area are left out, objects with `ignore` need
    not be found, and iscrowd means nothing. Unlike there, an object of id 0 can be found, and no
    results score 0."""
    truth = data if isinstance(data, dict) else truth_of(data)
    compared = compare(truth, results, kind, max_dets, "scored")
    if frequency is None:
        frequency = frequencies(data)
    groups = frequency or [None] * len(compared.categories)
    assert len(groups) == len(compared.categories), "one frequency for each class"
    precision, recall = precision_and_recall(compared, kind)
    every_size, small, medium, large = range(4)
    stats = [
        percent(precision[:, every_size]),
        percent(precision[:, every_size, 0]),
        percent(precision[:, every_size, 5]),
        percent(precision[:, small]),
        percent(precision[:, medium]),
        percent(precision[:, large]),
    ]
    for group in "rcf":
        is_member = [f == group for f in groups]
        stats.append(percent(precision[is_member, every_size]))
    for size in (every_size, small, medium, large):
        stats.append(percent(recall[:, size]))
    names = (*NAMES, f"ar{max_dets}", "ar_s", "ar_m", "ar_l")
    score = dict(zip(names, stats, strict=True))
    score["stats"] = stats
    score["per_class"] = {
        category["name"]: percent(precision[k, every_size])
        for k, category in enumerate(compared.categories)
    }
    return score


def frequencies(data: Instances | dict) -> list[str | None] | None:
    """What the data set or the file says of each class: r, c, f or nothing."""
    if not isinstance(data, dict):
        return data.frequency
    categories = sorted(data["categories"], key=lambda category: category["id"])
    return [category.get("frequency") for category in categories]


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
    """What a calibration error is measured on: each of `results` that is right or wrong in the
    evaluation of `lvis_ap` at this overlap, without limits of size. `data`, `kind` and `max_dets`
    are as there.

    If `federated`, detections of classes about which their image says nothing are left out. If not,
    a class that is not annotated in an image is absent from it, as in COCO. None takes the data's
    word: `data.lvis`, or whether images of the file have neg_category_ids. Unlike AP, this has use
    for classes without any object: their detections are wrong.

    Three kinds of detections are neither right nor wrong and are left out, too: those that find an
    object with `ignore`; those that find nothing where only some objects of their class are
    annotated; and those that find nothing and have this share of their area in a crowd. A crowd is
    no object, but in federated data its class is a known one."""
    assert 0 < overlap <= 1, overlap
    truth = data if isinstance(data, dict) else truth_of(data)
    if federated is None:
        if isinstance(data, dict):
            federated = any("neg_category_ids" in image for image in truth["images"])
        else:
            federated = data.lvis
    known = "federated" if federated else "all"
    compared = compare(truth, results, kind, max_dets, known)
    is_crowd = flags_of(compared.objects, "iscrowd")
    pairs = compared.pairs

    single = chosen(compared, ~is_crowd)
    found = candidates(single, kind, overlap)
    needless = flags_of(single.objects, "ignore")[:, None]
    outcome = match(found, pairs, needless, np.array([overlap]))[:, 0, 0]

    in_crowd = candidates(chosen(compared, is_crowd), kind, overlap, crowds=True).detection
    excused = np.isin(pairs, compared.partial)
    excused[in_crowd] = True
    right = outcome == RIGHT
    wrong = (outcome == 0) & ~excused
    counts = right | wrong
    labels = pairs[counts] // max(len(compared.images), 1)
    return Samples(labels, compared.scores[counts], right[counts])


class Compared(NamedTuple):
    """The objects and detections that are compared, both by ascending pair. A pair is a class and
    an image: that of class k and image i has the number k * len(images) + i. Classes and images are
    by ascending id, and the detections of a pair by falling score."""

    categories: list[dict]
    images: list[dict]
    objects: list[dict]  # (G,) annotations
    pairs_of_objects: np.ndarray  # (G,)
    shapes: list | np.ndarray  # (D,) run lengths or boxes of the detections
    pairs: np.ndarray  # (D,) of the detections
    scores: np.ndarray  # (D,)
    areas: np.ndarray  # (D,) in pixels
    partial: np.ndarray  # the pairs of which only some objects are annotated


def compare(truth: dict, results: list[dict], kind: str, max_dets: int, known: str) -> Compared:
    """The objects of a file's content and the results, as far as they have an area and belong to a
    pair whose answer is `known`. "federated" are the pairs that have an object or are said to be
    absent, "scored" are those of them whose class has an object, and "all" are all."""
    categories = sorted(truth["categories"], key=lambda record: record["id"])
    images = sorted(truth["images"], key=lambda record: record["id"])
    class_of_id = {category["id"]: k for k, category in enumerate(categories)}
    place_of_id = {image["id"]: i for i, image in enumerate(images)}

    def pair_of(annotation: dict) -> int:
        k = class_of_id[annotation["category_id"]]
        return k * len(images) + place_of_id[annotation["image_id"]]

    objects = []
    for annotation in truth["annotations"]:
        listed = annotation["image_id"] in place_of_id and annotation["category_id"] in class_of_id
        if listed and 0 < annotation["area"] < np.inf:
            objects.append(annotation)
    objects.sort(key=pair_of)
    pairs_of_objects = np.array([pair_of(a) for a in objects], np.int64)
    absent = pairs_listed(images, "neg_category_ids", class_of_id)
    partial = pairs_listed(images, "not_exhaustive_category_ids", class_of_id)

    answered = None
    if known != "all":
        answered = np.union1d(pairs_of_objects, absent)
    if known == "scored":  # a class without an object has no AP
        has_object = np.isin(answered // len(images), pairs_of_objects // len(images))
        answered = answered[has_object]
    order, pairs, scores = counted(results, class_of_id, place_of_id, max_dets, answered)
    shapes, areas = shapes_of([results[i] for i in order], kind)
    has_area = (areas > 0) & (areas < np.inf)
    if not has_area.all():
        kept = np.flatnonzero(has_area)
        pairs, scores, areas = pairs[kept], scores[kept], areas[kept]
        shapes = shapes[kept] if kind == "bbox" else [shapes[i] for i in kept]
    return Compared(
        categories, images, objects, pairs_of_objects, shapes, pairs, scores, areas, partial
    )


def pairs_listed(images: list[dict], key: str, class_of_id: dict[int, int]) -> np.ndarray:
    """The pairs of each image with the classes that it lists under `key`."""
    pairs = []
    for place, image in enumerate(images):
        for category in image.get(key) or ():
            if category in class_of_id:
                pairs.append(class_of_id[category] * len(images) + place)
    return np.array(pairs, np.int64)


def flags_of(objects: list[dict], key: str) -> np.ndarray:
    """Whether each annotation (G,) says yes under `key`."""
    return np.array([bool(annotation.get(key)) for annotation in objects], bool)


def chosen(compared: Compared, is_chosen: np.ndarray) -> Compared:
    """The same with those objects alone of which `is_chosen` (G,) says so."""
    objects = [a for a, keep in zip(compared.objects, is_chosen, strict=True) if keep]
    return compared._replace(objects=objects, pairs_of_objects=compared.pairs_of_objects[is_chosen])


def outside(areas: np.ndarray) -> np.ndarray:
    """Areas (N,) in pixels -> whether each is out of each range of AREAS (N, 4). A limit belongs to
    both its ranges."""
    return (areas[:, None] < AREAS[:, 0]) | (areas[:, None] > AREAS[:, 1])


def counted(
    results: list[dict],
    class_of_id: dict[int, int],
    place_of_id: dict[int, int],
    max_dets: int,
    known: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which results count: those among the `max_dets` best of their image, if their pair is a
    `known` one (None: if their class is listed). Gives their indices, pairs and scores (D,), sorted
    by pair, then by falling score, then as given."""
    assert all(r["image_id"] in place_of_id for r in results), (
        "a detection is of an image that is not scored"
    )
    image = np.array([place_of_id[r["image_id"]] for r in results], np.int64)
    classes = np.array([class_of_id.get(r["category_id"], -1) for r in results], np.int64)
    pairs = classes * len(place_of_id) + image  # below 0 where the class is not listed
    scores = np.array([r["score"] for r in results], np.float64)
    order = np.lexsort((-scores, image))  # stable
    order = order[turns(image[order]) < max_dets]
    is_known = pairs[order] >= 0 if known is None else np.isin(pairs[order], known)
    order = order[is_known]
    order = order[np.argsort(pairs[order], kind="stable")]
    return order, pairs[order], scores[order]


def turns(groups: np.ndarray) -> np.ndarray:
    """The group of each (N,), ascending -> the place of each within its group (N,), from 0."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def shapes_of(results: list[dict], kind: str) -> tuple[list | np.ndarray, np.ndarray]:
    """Run lengths, or boxes x, y, width, height (D, 4), of detections, and their areas (D,) in
    pixels."""
    if kind == "segm":
        shapes = [r["segmentation"] for r in results]
        areas = [np.zeros(0)]
        for start in range(0, len(shapes), BLOCK):
            areas.append(coco_mask().area(shapes[start : start + BLOCK]))
        return shapes, np.concatenate(areas)
    boxes = []
    areas = []
    for result in results:
        if "bbox" in result:
            boxes.append(result["bbox"])
            areas.append(float(result["bbox"][2]) * float(result["bbox"][3]))
        else:
            boxes.append(coco_mask().toBbox(result["segmentation"]))
            areas.append(float(coco_mask().area(result["segmentation"])))
    return np.array(boxes, np.float64).reshape(-1, 4), np.array(areas, np.float64)


def shape_of(annotation: dict, kind: str, image: dict):
    """The run lengths or the box of an object."""
    if kind == "bbox" and annotation.get("bbox") is not None:
        return annotation["bbox"]
    runs = annotation["segmentation"]
    size = (int(image["height"]), int(image["width"]))
    if isinstance(runs, list):
        runs = coco_mask().merge(coco_mask().frPyObjects(runs, *size))
    elif isinstance(runs["counts"], list):
        runs = coco_mask().frPyObjects(runs, *size)
    return coco_mask().toBbox(runs) if kind == "bbox" else runs


# ----------------------------------------------------------------------------------------- matching
class Candidates(NamedTuple):
    """Each way in which a detection could find an object, by ascending detection."""

    detection: np.ndarray  # (E,) indices
    object: np.ndarray  # (E,) indices
    overlap: np.ndarray  # (E,)


def candidates(
    compared: Compared, kind: str, lowest: float = THRESHOLDS[0], crowds: bool = False
) -> Candidates:
    """The objects and detections of one pair that overlap by the `lowest` threshold. Where the
    objects are `crowds`, the overlap is the part of the detection that lies in one."""
    found = [Candidates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    pairs = compared.pairs
    pairs_of_objects = compared.pairs_of_objects
    with_both = np.intersect1d(pairs_of_objects, pairs)
    bounds = zip(
        with_both,
        np.searchsorted(pairs_of_objects, with_both, "left"),
        np.searchsorted(pairs_of_objects, with_both, "right"),
        np.searchsorted(pairs, with_both, "left"),
        np.searchsorted(pairs, with_both, "right"),
        strict=True,
    )
    for pair, first_object, end_of_objects, first, end in bounds:
        image = compared.images[pair % len(compared.images)]
        objects = compared.objects[first_object:end_of_objects]
        shapes = [shape_of(a, kind, image) for a in objects]
        if kind == "bbox":
            shapes = np.array(shapes, np.float64)
        overlap = coco_mask().iou(compared.shapes[first:end], shapes, [int(crowds)] * len(objects))
        d, g = np.nonzero(overlap >= lowest)
        found.append(Candidates(d + first, g + first_object, overlap[d, g]))
    return Candidates(*(np.concatenate(values) for values in zip(*found, strict=True)))


def precision_and_recall(compared: Compared, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Precision and highest recall of each class, size and threshold (K, 4, 10), -1 where there is
    no object to find."""
    classes = len(compared.categories)
    precision = -np.ones((classes, len(AREAS), len(THRESHOLDS)))
    recall = -np.ones((classes, len(AREAS), len(THRESHOLDS)))
    # (D, 4) If such a detection finds nothing, it is not wrong.
    in_partial = np.isin(compared.pairs, compared.partial)
    excused = outside(compared.areas) | in_partial[:, None]
    # (G, 4) Such an object need not be found.
    areas = np.array([annotation["area"] for annotation in compared.objects])
    needless = outside(areas) | flags_of(compared.objects, "ignore")[:, None]

    first_pairs = len(compared.images) * np.arange(classes + 1)
    ends_of_objects = np.searchsorted(compared.pairs_of_objects, first_pairs)
    ends = np.searchsorted(compared.pairs, first_pairs)
    for k in range(classes):
        g = slice(ends_of_objects[k], ends_of_objects[k + 1])
        d = slice(ends[k], ends[k + 1])
        if needless[g].all():
            continue
        of_class = compared._replace(
            objects=compared.objects[g],
            pairs_of_objects=compared.pairs_of_objects[g],
            shapes=compared.shapes[d],
            pairs=compared.pairs[d],
        )
        outcome = match(candidates(of_class, kind), compared.pairs[d], needless[g])
        objects = (~needless[g]).sum(axis=0)
        precision[k], recall[k] = score_class(outcome, compared.scores[d], excused[d], objects)
    return precision, recall


def match(
    found: Candidates,
    pairs: np.ndarray,
    needless: np.ndarray,
    thresholds: np.ndarray = THRESHOLDS,
) -> np.ndarray:
    """The outcome of each detection, for each size and threshold (D, 4, 10): 0, RIGHT or IGNORED.
    `pairs` (D,) are the pairs of the detections, and `needless` (G, 4), a column for each size,
    tells which objects need not be found.

    By falling score each detection takes the object that is still free and overlaps it most, and of
    equal ones the last. It takes one that need not be found only if there is no other. The first
    detections of all images, of those that have candidates, go together, then the second ones, and
    so on."""
    number = len(found.detection)
    outcome = np.zeros((len(pairs), needless.shape[1], len(thresholds)), np.int8)
    is_free = np.ones((*needless.shape, len(thresholds)), bool)
    value = np.empty(number, np.int32)  # of each candidate; all differ, and the highest is taken
    value[np.lexsort((found.object, found.overlap))] = np.arange(1, number + 1)
    detections, place = np.unique(found.detection, return_inverse=True)
    turn = turns(pairs[detections])[place]
    order = np.argsort(turn, kind="stable")
    ends = np.searchsorted(turn[order], np.arange(turn.max(initial=-1) + 2))
    for start, stop in pairwise(ends):
        now = order[start:stop]  # here each object occurs once at most, and detections ascend
        d, g = found.detection[now], found.object[now]
        overlaps_enough = found.overlap[now, None, None] >= thresholds
        can_take = is_free[g] & overlaps_enough  # (N, 4, 10)
        wanted = value[now, None] + number * ~needless[g]  # (N, 4), over `number` if to be found
        values = can_take * wanted[:, :, None]
        is_first = np.diff(d, prepend=-1) != 0  # of the candidates of its detection
        best = np.maximum.reduceat(values, np.flatnonzero(is_first), axis=0)
        best_of_detection = best[np.cumsum(is_first) - 1]
        is_free[g] &= ~can_take | (values < best_of_detection)
        outcome[d[is_first]] = np.where(best > number, RIGHT, np.where(best > 0, IGNORED, 0))
    return outcome


def score_class(
    outcome: np.ndarray, scores: np.ndarray, excused: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision, its mean over RECALLS, and highest recall of a class (4, 10), -1 where the number
    of `objects` (4,) is 0.

    `outcome` (D, 4, 10) is that of `match`, `scores` are (D,), and a detection that has found
    nothing is wrong unless it is `excused` (D, 4). The precision at a recall is the highest one
    there or beyond. That is reached where a detection is right, so only those are looked at."""
    sizes, thresholds = outcome.shape[1:]
    cells = sizes * thresholds
    order = np.argsort(-scores, kind="stable")
    right = (outcome == RIGHT)[order].reshape(-1, cells).T  # (40, D)
    is_wrong = (outcome == 0) & ~excused[:, :, None]
    wrong = is_wrong[order].reshape(-1, cells).T
    cell, rank = np.nonzero(right)
    nth = turns(cell) + 1  # the how-manieth right one of its cell
    wrong_before = np.cumsum(wrong, axis=1, dtype=np.int32)[cell, rank]
    table = np.zeros((cells, nth.max(initial=0) + 1))  # precision at the 1st, 2nd, ... right one
    table[cell, nth - 1] = nth / (wrong_before + nth + np.spacing(1))
    table = np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    table = table.reshape(sizes, thresholds, -1)
    right_ones = right.reshape(sizes, thresholds, -1).sum(axis=2)
    precision = -np.ones((sizes, thresholds))
    recall = -np.ones((sizes, thresholds))
    for size in np.flatnonzero(objects):
        # How many right ones each recall needs.
        needed = np.searchsorted(np.arange(objects[size] + 1) / objects[size], RECALLS)
        places = np.clip(needed - 1, 0, table.shape[-1] - 1)
        precision[size] = table[size][:, places].mean(axis=1)
        recall[size] = right_ones[size] / objects[size]
    return precision, recall
