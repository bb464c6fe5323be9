"""COCO's and LVIS's average precision of masks and boxes, and the samples of a calibration error.

The judge is hotcoco, whose matches and means are those of pycocotools and of the `lvis` package
(0.5.3) to the bit. Where it is not installed, those two judge, which takes longer; in the tests
they are the record. Any number of processes gives the same numbers: results are gathered first
(`mask_ap.gather`). All numbers are in percent, and None where there is no object to find."""

import contextlib
import gc
import io
import itertools
from collections.abc import Iterator
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from common.errors import UserError
from common.mask_ap import percent, truth_of
from common.objects import Instances
from common.outlines import areas_of

ALL, SMALL, MEDIUM, LARGE = range(4)  # sizes of objects, split at 32^2 and 96^2 pixels
OUTLINE = {"segm": "segmentation", "bbox": "bbox"}  # what is looked at


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
    limits = [1, min(10, max_dets), max_dets]
    table = judged(truth, results, kind, limits, coco_evaluator).eval
    precision = table["precision"][..., 2]  # (10 thresholds, 101 recalls, K classes, 4 sizes)
    recall = table["recall"]  # (10, K, 4, 3), the last axis being the limits of detections
    score = averages(precision)
    recalls = [percent(recall[..., ALL, limit]) for limit in range(3)]
    recalls += [percent(recall[..., size, 2]) for size in (SMALL, MEDIUM, LARGE)]
    stats = [*score.values(), *recalls]
    if frequency:
        score |= averages_of_groups(precision, frequency)
    score[f"ar{max_dets}"] = recalls[2]
    return {**score, "stats": stats, "per_class": averages_of_classes(precision, truth)}


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
    counted = counting(results, truth, kind, max_dets, True)
    table = judged(truth, counted, kind, max_dets, lvis_evaluator).eval
    precision = table["precision"]
    precision = precision.reshape(precision.shape[:4])  # hotcoco's has an axis of limits
    recall = table["recall"].reshape(table["recall"].shape[:3])
    if frequency is None:
        frequency = frequencies(data)
    score = averages(precision) | averages_of_groups(precision, frequency)
    names = (f"ar{max_dets}", "ar_s", "ar_m", "ar_l")
    for name, size in zip(names, (ALL, SMALL, MEDIUM, LARGE), strict=True):
        score[name] = percent(recall[..., size])
    stats = list(score.values())
    return {**score, "stats": stats, "per_class": averages_of_classes(precision, truth)}


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
    precision: np.ndarray, frequency: list[str | None] | None
) -> dict[str, float | None]:
    """apr, apc and apf: the AP of the classes of each frequency."""
    groups = frequency or [None] * precision.shape[2]
    assert len(groups) == precision.shape[2], "one frequency for each class"
    score = {}
    for group in "rcf":
        is_member = [f == group for f in groups]
        score[f"ap{group}"] = percent(precision[:, :, is_member, ALL])
    return score


def averages_of_classes(precision: np.ndarray, truth: dict) -> dict[str, float | None]:
    """Name -> AP of each class, by ascending id."""
    names = [category["name"] for category in by_id(truth["categories"])]
    of_class = np.moveaxis(precision[..., ALL], 2, 0).copy()  # (K, 10, 101), fast to read
    return {name: percent(values) for name, values in zip(names, of_class, strict=True)}


def frequencies(data: Instances | dict) -> list[str | None] | None:
    """What the data set or the file says of each class: r, c, f or nothing."""
    if not isinstance(data, dict):
        return data.frequency
    return [category.get("frequency") for category in by_id(data["categories"])]


def by_id(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: record["id"])


# ---------------------------------------------------------------------------------------- the judge
def judged(truth: dict, results: list[dict], kind: str, max_dets: int | list[int], evaluator):
    """The evaluator of a package, made by `evaluator`, after its work. It prints nothing, and
    `truth` and `results` stay as they are."""
    truth, results = numbered(truth, results, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        judge = evaluator(truth, results, kind, max_dets)
        judge.evaluate()
        judge.accumulate()
    return judge


def numbered(truth: dict, results: list[dict], kind: str) -> tuple[dict, list[dict]]:
    """Copies for the judge, which writes into what it is given, without what the `kind` does not
    look at: a bbox beside a mask would give the detection its area.

    Images, classes and annotations are numbered anew from 1 in the order of their ids: to hotcoco
    an id is a whole number from 0, and to pycocotools an object of id 0 is no match. What a file
    says to `ignore`, which COCO and LVIS do not have, is an object like any other."""
    images = by_id(truth["images"])
    categories = by_id(truth["categories"])
    outline = OUTLINE[kind]
    image_numbers = {record["id"]: n for n, record in enumerate(images, start=1)}
    category_numbers = {record["id"]: n for n, record in enumerate(categories, start=1)}

    def numbers_of(record: dict, key: str) -> list[int]:
        return [category_numbers[c] for c in record.get(key) or () if c in category_numbers]

    copies = {
        "images": [
            {
                "id": image_numbers[record["id"]],
                "height": record["height"],
                "width": record["width"],
                "neg_category_ids": numbers_of(record, "neg_category_ids"),
                "not_exhaustive_category_ids": numbers_of(record, "not_exhaustive_category_ids"),
            }
            for record in images
        ],
        "categories": [{**record, "id": category_numbers[record["id"]]} for record in categories],
        "annotations": [
            {
                "id": n,
                "image_id": image_numbers[annotation["image_id"]],
                "category_id": category_numbers.get(annotation["category_id"], 0),  # 0 is no class
                "iscrowd": annotation.get("iscrowd", 0),
                **{key: annotation[key] for key in ("area", outline) if key in annotation},
            }
            for n, annotation in enumerate(truth["annotations"], start=1)
        ],
    }
    found = []
    for result in results:
        key = outline if outline in result else "segmentation"  # its box is that of its mask
        found.append(
            {
                "image_id": image_numbers[result["image_id"]],
                "category_id": category_numbers.get(result["category_id"], 0),
                "score": result["score"],
                key: result[key],
            }
        )
    return copies, found


def coco_evaluator(truth: dict, results: list[dict], kind: str, max_dets: list[int]):
    """A COCOeval, of hotcoco or else of pycocotools."""
    try:
        from hotcoco import COCO, COCOeval
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    def loaded(content: dict):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        return coco

    scored = loaded(truth)
    if results:
        found = scored.loadRes(results)
    else:  # pycocotools looks at the first one
        found = loaded({**truth, "annotations": []})
    judge = COCOeval(scored, found, kind)
    judge.params.maxDets = max_dets
    return judge


def lvis_evaluator(truth: dict, results: list[dict], kind: str, max_dets: int):
    """An LVISEval, of hotcoco or else of the `lvis` package."""
    try:
        from hotcoco import LVIS, LVISEval, LVISResults
    except ImportError:
        return lvis_evaluator_of_package(truth, results, kind, max_dets)
    scored = LVIS(truth)
    return LVISEval(scored, LVISResults(scored, results, max_dets), kind)


def lvis_evaluator_of_package(truth: dict, results: list[dict], kind: str, max_dets: int):
    """An LVISEval of the `lvis` package, which reads files, needs a frequency of each class, looks
    at the first result, and uses the np.float of numpy 1."""
    try:
        from lvis import LVIS, LVISEval, LVISResults
    except ImportError:
        raise UserError(
            "LVIS's average precision needs the package hotcoco; install it with `pip install "
            "hotcoco` and go on from the checkpoint with --resume."
        ) from None

    class Loaded(LVIS):
        def _load_json(self, content: dict) -> dict:
            return content

    class Evaluator(LVISEval):
        def accumulate(self) -> None:
            np.float = float
            try:
                super().accumulate()
            finally:
                del np.float

    categories = [{"frequency": "f", **category} for category in truth["categories"]]
    if not results:
        nothing = {"image_id": 1, "category_id": 1, "score": 0.0, "bbox": [0, 0, 0, 0]}
        results = [nothing]  # without area it is left out
    scored = Loaded({**truth, "categories": categories})
    return Evaluator(scored, LVISResults(scored, results, max_dets), kind)


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
    counted = counting(results, truth, kind, max_dets, federated)
    needed = pairs_of(counted)
    objects = [a for a in truth["annotations"] if (a["image_id"], a["category_id"]) in needed]
    truth, counted = numbered({**truth, "annotations": objects}, counted, kind)
    partial = pairs_listed(truth, "not_exhaustive_category_ids")

    judge = coco_evaluator(truth, counted, kind, [max_dets])
    judge.params.iouThrs = [overlap]
    judge.params.areaRng = [[0, 1e10]]
    judge.params.areaRngLbl = ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
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
    found = Samples(np.array(labels, np.int64), np.array(conf, np.float64), np.array(right, bool))
    order = np.lexsort((-found.conf, np.array(images, np.int64), found.labels))
    return Samples(*(values[order] for values in found))


def pairs_of(entries: list[dict]) -> set[tuple[int, int]]:
    """The image and the class of each entry."""
    return {(entry["image_id"], entry["category_id"]) for entry in entries}


def pairs_listed(truth: dict, key: str) -> set[tuple[int, int]]:
    """Each image with each of the classes that it lists under `key`."""
    pairs = set()
    for image in truth["images"]:
        pairs |= {(image["id"], category) for category in image.get(key) or ()}
    return pairs


def known_pairs(truth: dict) -> set[tuple[int, int]]:
    """The images and classes of which an LVIS file says whether one is in the other."""
    return pairs_of(truth["annotations"]) | pairs_listed(truth, "neg_category_ids")


def with_area(truth: dict) -> dict:
    """The content of a file without the objects that have no area."""
    objects = [annotation for annotation in truth["annotations"] if annotation["area"] > 0]
    return {**truth, "annotations": objects}


def counting(
    results: list[dict], truth: dict, kind: str, max_dets: int, federated: bool
) -> list[dict]:
    """The results of the highest scores of each image, of all classes together, and of equal ones
    the first. Those without area take places but are left out, and so do, if `federated`, those of
    classes about which their image says nothing."""
    known = known_pairs(truth)
    of_image: dict[int, list[dict]] = {}
    for result in results:
        of_image.setdefault(result["image_id"], []).append(result)
    listed = {image["id"] for image in truth["images"]}
    assert of_image.keys() <= listed, "a detection is of an image that is not scored"
    counted = []
    for ranked in of_image.values():
        ranked.sort(key=itemgetter("score"), reverse=True)  # stable
        for result in ranked[:max_dets]:
            if not federated or (result["image_id"], result["category_id"]) in known:
                counted.append(result)
    return list(itertools.compress(counted, areas(counted, kind) > 0))


def areas(results: list[dict], kind: str) -> np.ndarray:
    """The area (n,) of each box, or of the mask if there is none or `kind` says so."""
    boxes = [result.get("bbox", (0, 0, 0, 0)) for result in results]
    areas = np.array([width * height for _, _, width, height in boxes], float)
    by_mask = np.array([kind == "segm" or "bbox" not in result for result in results], bool)
    masks = [result["segmentation"] for result in itertools.compress(results, by_mask)]
    areas[by_mask] = areas_of(masks)
    return areas
