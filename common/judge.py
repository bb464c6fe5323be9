"""COCO's and LVIS's average precision of masks and boxes, and the samples of a calibration error.

What is compared with what, and which means are taken, is said here; hotcoco, or a package that is
its record, compares (`common/evaluators.py`). Any number of processes gives the same numbers:
results are gathered first (`mask_ap.gather`). All numbers are in percent, and None where there is
no object to find."""

import contextlib
import gc
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from common.evaluators import (
    Detections,
    by_id,
    chosen,
    coco_evaluator,
    columns,
    judged,
    lvis_evaluator,
    measured,
    numbered,
    numbers_of,
)
from common.mask_ap import percent, truth_of
from common.objects import Instances

ALL, SMALL, MEDIUM, LARGE = range(4)  # sizes of objects, split at 32^2 and 96^2 pixels


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python does not look for garbage meanwhile. It would look through hundreds of thousands of
    records whenever as many were made, which takes longer than judging them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---------------------------------------------------------------------------------------- precision
@collector_paused()
def coco_ap(
    data: Instances | dict,
    results: list[dict],
    kind: str = "segm",
    max_dets: int = 100,
    frequency: list[str] | None = None,
) -> dict:
    """COCO's AP of `results`, the entries of a results file, on the scored pictures of a data set,
    or on the content of a COCO file (see `mask_ap.truth_of`).

    `kind` is segm or bbox. The `max_dets` best detections of each class in an image count. The
    result has ap, ap50, ap75, ap_s, ap_m, ap_l (objects under 32^2, under 96^2, larger), ar100
    (named by `max_dets`: the mean highest recall), `stats` (the twelve numbers in the order of
    pycocotools) and `per_class` (name -> ap). With the `frequency` (r, c or f) of each class by
    ascending id it also has their means apr, apc and apf."""
    truth = data if isinstance(data, dict) else truth_of(data)
    is_held = are_held(truth)
    held = with_classes(truth, is_held)
    found = columns(results, held)
    found = measured(chosen(found, found.classes > 0), kind)
    limits = [1, min(10, max_dets), max_dets]
    table = judged(coco_evaluator, numbered(held, kind), found, kind, limits)
    precision = table["precision"][..., 2]  # (10 thresholds, 101 recalls, K held classes, 4 sizes)
    recall = table["recall"]  # (10, K, 4, 3), the last axis being the limits of detections
    score = averages(precision)
    recalls = [percent(recall[..., ALL, limit]) for limit in range(3)]
    recalls += [percent(recall[..., size, 2]) for size in (SMALL, MEDIUM, LARGE)]
    stats = [*score.values(), *recalls]
    if frequency:
        score |= averages_of_groups(precision, frequency, is_held)
    score[f"ar{max_dets}"] = recalls[2]
    per_class = averages_of_classes(precision, truth, is_held)
    return {**score, "stats": stats, "per_class": per_class}


@collector_paused()
def lvis_ap(
    data: Instances | dict,
    results: list[dict],
    kind: str = "segm",
    max_dets: int = 300,
    frequency: list[str] | None = None,
) -> dict:
    """LVIS's AP. Arguments are as in `coco_ap`, but the `max_dets` best detections of all classes
    of an image count, and `frequency` is by default what the data set or the file says.

    An image of LVIS says only of a few classes whether they are there: of those with an object in
    it, and of its neg_category_ids. Detections of other classes are neither right nor wrong (arXiv
    1908.03195, section 2), nor are those without a match of its not_exhaustive_category_ids.
    Objects and detections without area are left out, and iscrowd means nothing.

    The result has ap, ap50, ap75, ap_s, ap_m, ap_l, apr, apc, apf, ar300, ar_s, ar_m, ar_l;
    `stats`, these 13 numbers, which is the order of the package; and `per_class`."""
    truth = with_area(data if isinstance(data, dict) else truth_of(data))
    is_held = are_held(truth)
    held = with_classes(truth, is_held)
    found = counting(results, held, kind, max_dets, federated=True)
    table = judged(lvis_evaluator, numbered(held, kind), found, kind, max_dets)
    precision = table["precision"]
    precision = precision.reshape(precision.shape[:4])  # hotcoco's has an axis of limits
    recall = table["recall"].reshape(table["recall"].shape[:3])
    if frequency is None:
        frequency = frequencies(data)
    score = averages(precision) | averages_of_groups(precision, frequency, is_held)
    names = (f"ar{max_dets}", "ar_s", "ar_m", "ar_l")
    for name, size in zip(names, (ALL, SMALL, MEDIUM, LARGE), strict=True):
        score[name] = percent(recall[..., size])
    stats = list(score.values())
    per_class = averages_of_classes(precision, truth, is_held)
    return {**score, "stats": stats, "per_class": per_class}


def averages(precision: np.ndarray) -> dict[str, float | None]:
    """ap, ap50, ap75, ap_s, ap_m and ap_l of a table of precision (10, 101, K, 4)."""
    return {
        "ap": percent(precision[..., ALL]),
        "ap50": percent(precision[0, ..., ALL]),
        "ap75": percent(precision[5, ..., ALL]),
        "ap_s": percent(precision[..., SMALL]),
        "ap_m": percent(precision[..., MEDIUM]),
        "ap_l": percent(precision[..., LARGE]),
    }


def averages_of_groups(
    precision: np.ndarray, frequency: list[str | None] | None, is_held: np.ndarray
) -> dict[str, float | None]:
    """apr, apc and apf: the AP of the classes of each frequency. `precision` is of the classes
    that are held, `frequency` of all."""
    groups = np.array(frequency or [None] * len(is_held), object)
    assert len(groups) == len(is_held), "one frequency for each class"
    score = {}
    for group in "rcf":
        is_member = groups[is_held] == group
        score[f"ap{group}"] = percent(precision[:, :, is_member, ALL])
    return score


def averages_of_classes(
    precision: np.ndarray, truth: dict, is_held: np.ndarray
) -> dict[str, float | None]:
    """Name -> AP of each class, by ascending id. `precision` is of those that are held."""
    names = [category["name"] for category in by_id(truth["categories"])]
    averages: list[float | None] = [None] * len(names)
    of_class = np.moveaxis(precision[..., ALL], 2, 0).copy()  # (K, 10, 101), fast to read
    for place, values in zip(np.flatnonzero(is_held), of_class, strict=True):
        averages[place] = percent(values)
    return dict(zip(names, averages, strict=True))


def frequencies(data: Instances | dict) -> list[str | None] | None:
    """What the data set or the file says of each class: r, c, f or nothing."""
    if not isinstance(data, dict):
        return data.frequency
    return [category.get("frequency") for category in by_id(data["categories"])]


def are_held(truth: dict) -> np.ndarray:
    """(C,) bool: whether there is an object of each class, by ascending id."""
    held = {annotation["category_id"] for annotation in truth["annotations"]}
    return np.array([record["id"] in held for record in by_id(truth["categories"])], bool)


def with_classes(truth: dict, is_held: np.ndarray) -> dict:
    """The content of a file without the classes that have no object. They have no precision, and
    each of them, of which LVIS has many, would cost the judge as much as another."""
    categories = [c for c, held in zip(by_id(truth["categories"]), is_held, strict=True) if held]
    return {**truth, "categories": categories}


# ---------------------------------------------------------------------------------------- samples
class Samples(NamedTuple):
    """Detections with a known answer, ascending by class, then image, and by falling confidence:
    their class indices (N,) int64, confidences (N,) float64, and whether each has found an object
    of its class (N,) bool."""

    labels: np.ndarray
    conf: np.ndarray
    right: np.ndarray


@collector_paused()
def samples(
    data: Instances | dict,
    results: list[dict],
    kind: str = "bbox",
    overlap: float = 0.5,
    max_dets: int = 300,
    federated: bool | None = None,
) -> Samples:
    """What a calibration error is measured on: each of the `max_dets` best of `results` in an image
    that is right or wrong at this overlap, by COCO's matching. `data` and `kind` are as in
    `coco_ap`.

    If `federated`, detections of classes about which their image says nothing are left out. If not,
    a class that is not annotated in an image is absent from it, as in COCO. None takes the data's
    word: `data.lvis`, or whether images of the file have neg_category_ids. Unlike AP, this has use
    for classes without any object: their detections are wrong.

    Two kinds of detections are neither right nor wrong and are left out, too: those that find
    nothing where only some objects of their class are annotated; and those that find nothing and
    have this share of their area in a crowd. A crowd is no object, but in federated data its class
    is a known one. As in LVIS, objects and detections without area are left out."""
    assert 0 < overlap <= 1, overlap
    truth = with_area(data if isinstance(data, dict) else truth_of(data))
    if federated is None:
        if isinstance(data, dict):
            federated = any("neg_category_ids" in image for image in truth["images"])
        else:
            federated = data.lvis
    found = counting(results, truth, kind, max_dets, federated)
    truth = numbered(truth, kind)
    needed = set(zip(found.images.tolist(), found.classes.tolist(), strict=True))
    objects = [a for a in truth["annotations"] if (a["image_id"], a["category_id"]) in needed]
    partial = pairs_listed(truth, "not_exhaustive_category_ids")
    with contextlib.redirect_stdout(io.StringIO()):
        judge = coco_evaluator({**truth, "annotations": objects}, found, kind, [max_dets])
        judge.params.iouThrs = [overlap]
        judge.params.areaRng = [[0, 1e10]]
        judge.params.areaRngLbl = ["all"]
        judge.evaluate()
    labels, images, conf, right = [], [], [], []
    for pair in judge.evalImgs:  # of an image and a class
        if pair is None:
            continue
        is_match = np.array(pair["dtMatches"][0]) > 0
        is_ignored = np.array(pair["dtIgnore"][0], bool)
        if (pair["image_id"], pair["category_id"]) in partial:
            is_ignored |= ~is_match
        counts = np.flatnonzero(~is_ignored)
        labels += [pair["category_id"] - 1] * len(counts)
        images += [pair["image_id"]] * len(counts)
        conf += np.array(pair["dtScores"])[counts].tolist()
        right += is_match[counts].tolist()
    all_samples = Samples(
        np.array(labels, np.int64), np.array(conf, np.float64), np.array(right, bool)
    )
    order = np.lexsort((-all_samples.conf, np.array(images, np.int64), all_samples.labels))
    return Samples(*(values[order] for values in all_samples))


def pairs_listed(truth: dict, key: str) -> set[tuple[int, int]]:
    """Each image with each of the classes that it lists under `key`."""
    pairs = set()
    for image in truth["images"]:
        pairs |= {(image["id"], category) for category in image.get(key) or ()}
    return pairs


def with_area(truth: dict) -> dict:
    """The content of a file without the objects that have no area."""
    objects = [annotation for annotation in truth["annotations"] if annotation["area"] > 0]
    return {**truth, "annotations": objects}


def known_classes(truth: dict) -> np.ndarray:
    """(1 + images, 1 + classes) bool, by their numbers: whether an LVIS file says that the class is
    in the image, or that it is not."""
    image_numbers = numbers_of(truth["images"])
    class_numbers = numbers_of(truth["categories"])
    is_known = np.zeros((1 + len(image_numbers), 1 + len(class_numbers)), bool)
    for image in truth["images"]:
        for category in image.get("neg_category_ids") or ():
            is_known[image_numbers[image["id"]], class_numbers.get(category, 0)] = True
    for annotation in truth["annotations"]:
        number = class_numbers.get(annotation["category_id"], 0)
        is_known[image_numbers[annotation["image_id"]], number] = True
    return is_known


def counting(
    results: list[dict], truth: dict, kind: str, max_dets: int, federated: bool
) -> Detections:
    """The results of the highest scores of each image. Those without area take places but are left
    out, and so do those of classes that the file does not list, or, if `federated`, about which
    their image says nothing."""
    found = best_of_images(columns(results, truth), max_dets)
    is_counted = found.classes > 0
    if federated:
        is_counted &= known_classes(truth)[found.images, found.classes]
    found = measured(chosen(found, is_counted), kind)
    return chosen(found, found.areas > 0)


def best_of_images(found: Detections, max_dets: int) -> Detections:
    """The detections of the `max_dets` highest scores of each image, of all classes together, and
    of equal ones the first."""
    if np.bincount(found.images).max(initial=0) <= max_dets:
        return found
    found = chosen(found, np.lexsort((-found.scores, found.images)))  # stable
    place_in_image = np.arange(len(found.images)) - np.searchsorted(found.images, found.images)
    return chosen(found, place_in_image < max_dets)
