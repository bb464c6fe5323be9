"""The packages that compare detections with the truth, and what they are given.

hotcoco's matches and means are those of pycocotools and of the `lvis` package (0.5.3) to the bit.
Where it is not installed, those two judge, which takes longer; in the tests they are the record."""

import contextlib
import io
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.outlines import areas_of, coco_mask

OUTLINE = {"segm": "segmentation", "bbox": "bbox"}  # what is looked at


# ------------------------------------------------------------------------------ what they are given
def by_id(records: list[dict]) -> list[dict]:
    """Images or classes in the order in which all packages count them."""
    return sorted(records, key=lambda record: record["id"])


def numbers_of(records: list[dict]) -> dict[Any, int]:
    """Id -> number of images or classes, from 1 in the order of the ids. They are numbered anew for
    the judge, because to hotcoco an id is a whole number from 0."""
    return {record["id"]: number for number, record in enumerate(by_id(records), start=1)}


def numbered(truth: dict, kind: str) -> dict:
    """A copy for the judge, which writes into what it is given, with new numbers, and without what
    the `kind` does not look at.

    Annotations are numbered anew, too: to pycocotools an object of id 0 is no match. What a file
    says to `ignore`, which COCO and LVIS do not have, is an object like any other."""
    image_numbers = numbers_of(truth["images"])
    class_numbers = numbers_of(truth["categories"])

    def numbers_in(record: dict, key: str) -> list[int]:
        return [class_numbers[c] for c in record.get(key) or () if c in class_numbers]

    return {
        "images": [
            {
                "id": image_numbers[record["id"]],
                "height": record["height"],
                "width": record["width"],
                "neg_category_ids": numbers_in(record, "neg_category_ids"),
                "not_exhaustive_category_ids": numbers_in(record, "not_exhaustive_category_ids"),
            }
            for record in by_id(truth["images"])
        ],
        "categories": [
            {**record, "id": class_numbers[record["id"]]} for record in by_id(truth["categories"])
        ],
        "annotations": [
            {
                "id": n,
                "image_id": image_numbers[annotation["image_id"]],
                "category_id": class_numbers.get(annotation["category_id"], 0),  # 0 is no class
                "iscrowd": annotation.get("iscrowd", 0),
                **{key: annotation[key] for key in ("area", OUTLINE[kind]) if key in annotation},
            }
            for n, annotation in enumerate(truth["annotations"], start=1)
        ],
    }


class Detections(NamedTuple):
    """The entries of a results file in columns, which hotcoco reads three times as fast."""

    images: np.ndarray  # (N,) int64, their numbers
    classes: np.ndarray  # (N,) int64; 0 is a class that the file of the truth does not list
    scores: np.ndarray  # (N,) float64
    areas: np.ndarray  # (N,) float64, in pixels; NaN before they are `measured`
    entries: np.ndarray  # (N,) of dictionaries


def columns(results: list[dict], truth: dict) -> Detections:
    """The entries of a results file on the images and classes of the truth, not measured yet."""
    image_numbers = numbers_of(truth["images"])
    class_numbers = numbers_of(truth["categories"])
    length = len(results)
    images = np.fromiter((image_numbers.get(r["image_id"], 0) for r in results), np.int64, length)
    assert images.all(), "a detection is of an image that is not scored"
    classes = (class_numbers.get(r["category_id"], 0) for r in results)
    return Detections(
        images,
        np.fromiter(classes, np.int64, length),
        np.fromiter((r["score"] for r in results), np.float64, length),
        np.full(length, np.nan),
        np.array(results, object),
    )


def chosen(found: Detections, which: np.ndarray) -> Detections:
    """Those at the indices, or those for which an array (N,) is True."""
    return Detections(*(column[which] for column in found))


def measured(found: Detections, kind: str) -> Detections:
    """The detections with their areas, which take long to count: first choose."""
    return found._replace(areas=areas(found.entries, kind))


def areas(entries: np.ndarray, kind: str) -> np.ndarray:
    """The area (n,) of each box, or of the mask if there is none or `kind` says so."""
    if kind == "segm":
        return areas_of([entry["segmentation"] for entry in entries]).astype(float)
    has_no_box = np.array(["bbox" not in entry for entry in entries], bool)
    values = boxes(entries)[:, 2:].prod(axis=1)
    values[has_no_box] = areas_of([entry["segmentation"] for entry in entries[has_no_box]])
    return values


def boxes(entries: np.ndarray) -> np.ndarray:
    """The box (n, 4) of each entry, x, y, width, height, or that of its mask if it has none."""
    rows = (
        entry["bbox"] if "bbox" in entry else coco_mask().toBbox(entry["segmentation"])
        for entry in entries
    )
    return np.fromiter(chain.from_iterable(rows), float).reshape(-1, 4)


# ------------------------------------------------------------------------------------- the packages
def judged(evaluator: Callable, *given) -> dict:
    """The tables of precision and recall of a package's evaluator, which `evaluator` makes of what
    is given. Nothing is printed."""
    with contextlib.redirect_stdout(io.StringIO()):
        judge = evaluator(*given)
        judge.evaluate()
        judge.accumulate()
    return judge.eval


def coco_evaluator(truth: dict, found: Detections, kind: str, max_dets: list[int]):
    """A COCOeval, of hotcoco or else of pycocotools."""
    try:
        from hotcoco import COCO, COCOeval
    except ImportError:
        return coco_evaluator_of_package(truth, found, kind, max_dets)
    scored = COCO(truth)
    judge = COCOeval(scored, read_by_hotcoco(scored, found, kind), kind)
    judge.params.maxDets = max_dets
    return judge


def lvis_evaluator(truth: dict, found: Detections, kind: str, max_dets: int):
    """An LVISEval, of hotcoco or else of the `lvis` package."""
    try:
        from hotcoco import LVIS, LVISEval
    except ImportError:
        return lvis_evaluator_of_package(truth, found, kind, max_dets)
    scored = LVIS(truth)
    # In two places it takes no more than 300, of an image and of a class in it, unless it is told.
    read = read_by_hotcoco(scored, found, kind).cap_detections_per_image(max_dets)
    judge = LVISEval(scored, read, kind)
    judge.params.maxDets = [max_dets]
    return judge


def read_by_hotcoco(scored, found: Detections, kind: str):
    """The detections as an object of hotcoco, `scored` being its truth."""
    table = np.zeros((len(found.entries), 7))  # image, x, y, width, height, score, class
    table[:, 0] = found.images
    table[:, 5] = found.scores
    table[:, 6] = found.classes
    masks = None
    if kind == "bbox":
        table[:, 1:5] = boxes(found.entries)
    else:
        masks = [entry["segmentation"] for entry in found.entries]
    read = scored.load_res(table, segmentation=masks)
    # It took the areas of the boxes, which are not those of the masks.
    read.update_anns(ids=np.arange(1, len(table) + 1), area=found.areas)
    return read


def coco_evaluator_of_package(truth: dict, found: Detections, kind: str, max_dets: list[int]):
    """A COCOeval of pycocotools, which looks at the first result."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def loaded(content: dict) -> COCO:
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        return coco

    scored = loaded(truth)
    results = results_for_packages(found, kind)
    read = scored.loadRes(results) if results else loaded({**truth, "annotations": []})
    judge = COCOeval(scored, read, kind)
    judge.params.maxDets = max_dets
    return judge


def lvis_evaluator_of_package(truth: dict, found: Detections, kind: str, max_dets: int):
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
    results = results_for_packages(found, kind)
    if not results:
        nothing = {"image_id": 1, "category_id": 1, "score": 0.0, "bbox": [0, 0, 0, 0]}
        results = [nothing]  # without area it is left out
    scored = Loaded({**truth, "categories": categories})
    return Evaluator(scored, LVISResults(scored, results, max_dets), kind)


def results_for_packages(found: Detections, kind: str) -> list[dict]:
    """The detections as the entries of a results file with new numbers, without what the `kind`
    does not look at: a bbox beside a mask would give the detection its area."""
    results = []
    for image, number, score, entry in zip(
        found.images.tolist(),
        found.classes.tolist(),
        found.scores.tolist(),
        found.entries,
        strict=True,
    ):
        key = OUTLINE[kind] if OUTLINE[kind] in entry else "segmentation"  # its box is its mask's
        results.append({"image_id": image, "category_id": number, "score": score, key: entry[key]})
    return results
