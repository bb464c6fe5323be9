"""The judge of COCO's and LVIS's average precision against pycocotools and the lvis package, to the
bit, on golden, real, drawn and random results, and against values by hand; and the samples of a
calibration error against plain loops."""

import copy
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import hotcoco
import numpy as np
import pytest
from bench_evaluation import of_kind, of_lvis, of_pycocotools
from helpers import TEST_DATA
from instance_runs import LVIS_SCORES
from lvis import LVISEval
from pycocotools import mask as coco_mask
from pycocotools.cocoeval import COCOeval

from common import evaluators, instances, mask_ap
from common.distributed import World
from common.errors import UserError
from common.judge import Samples, coco_ap, lvis_ap, samples
from common.objects import Instances
from common.outlines import areas_of, has_pixels
from data import shapes

GOLDEN = TEST_DATA / "coco_eval_golden"

REAL = {
    "coco_mini": "coco_mini/annotations/lvis_val.json",
    "lvis_val_100": "lvis_val_100/lvis_val_100.json",
    "car_parts": "car_parts/annotations/lvis_val.json",
}


PARTS = 100 * 51 / 101  # precision 1 up to recall 0.5, then 0


@pytest.fixture(scope="module")
def drawn_set(tmp_path_factory) -> Instances:
    return instances.find(
        "lvis", shapes.make_coco(tmp_path_factory.mktemp("drawn") / "coco", train=60, val=60)
    )


def by_the_record(function, *args) -> dict:
    """What it gives where hotcoco is not installed."""
    with mock.patch.dict(sys.modules, {"hotcoco": None}):
        return function(*args)


def same(truth: dict, results: list[dict], kind: str, max_dets: int = 300) -> dict:
    """Our score, which must be that of the lvis package to the bit, also where it is the judge: 13
    numbers and the AP of each class."""
    ours = lvis_ap(truth, results, kind, max_dets)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(truth))
        stats, per_class = of_lvis(path, [dict(r) for r in results], kind, max_dets)
    assert ours["stats"] == stats
    assert ours["per_class"] == per_class
    assert by_the_record(lvis_ap, truth, results, kind, max_dets) == ours
    return ours


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x, y + h, x + w, y + h, x + w, y]


def detection(
    image: dict, category: int, score: float, polygons: list[list[float]], kind: str
) -> dict:
    runs = coco_mask.merge(coco_mask.frPyObjects(polygons, image["height"], image["width"]))
    entry = {"image_id": image["id"], "category_id": category, "score": score}
    if kind == "bbox":
        return {**entry, "bbox": coco_mask.toBbox(runs).tolist()}
    return {**entry, "segmentation": {**runs, "counts": runs["counts"].decode()}}


def perfect(truth: dict, kind: str) -> list[dict]:
    images = {image["id"]: image for image in truth["images"]}
    results = [
        detection(images[a["image_id"]], a["category_id"], 1 - 1e-5 * i, a["segmentation"], kind)
        for i, a in enumerate(truth["annotations"])
    ]
    return [
        r | {"bbox": a["bbox"]} if kind == "bbox" else r
        for r, a in zip(results, truth["annotations"], strict=True)
    ]


def rough(truth: dict, kind: str, seed: int = 0) -> list[dict]:
    """Up to three moved copies of each object, some of another class, and rectangles of classes
    that are there, absent or unknown; in the first image more than 300. Scores have two digits."""
    g, results = np.random.default_rng(seed), []
    images = {image["id"]: image for image in truth["images"]}
    ids = [c["id"] for c in truth["categories"]]
    mine = {number: [] for number in images}
    for a in truth["annotations"]:
        mine[a["image_id"]].append(a)
    for place, (number, image) in enumerate(images.items()):
        size = np.array([image["width"], image["height"]])
        known = [a["category_id"] for a in mine[number]] + image["neg_category_ids"][:5] or ids
        found = []
        for a in mine[number]:
            center, extent = np.array(a["bbox"][:2]), np.array(a["bbox"][2:])
            for _ in range(g.integers(0, 4)):
                scale, shift = np.exp(g.normal(0, 0.1, 2)), g.normal(0, 0.08, 2) * extent
                moved = [
                    ((np.reshape(p, (-1, 2)) - center) * scale + center + shift)
                    .clip(0, size)
                    .ravel()
                    .tolist()
                    for p in a["segmentation"]
                ]
                found.append((a["category_id"] if g.random() < 0.9 else int(g.choice(ids)), moved))
        for _ in range(350 if place == 0 else 10):
            category = int(g.choice(known if g.random() < 0.5 else ids))
            found.append(
                (
                    category,
                    [rectangle(*(g.random(2) * size).tolist(), *g.uniform(4, 99, 2).tolist())],
                )
            )
        results += [detection(image, c, round(g.random(), 2), p, kind) for c, p in found]
    return [results[i] for i in g.permutation(len(results))]


# ------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("name", REAL)
def test_real_annotations(name, kind):
    path = TEST_DATA / REAL[name]
    if not path.is_file():
        pytest.skip(f"no {path}")
    truth = json.loads(path.read_text())
    held = {a["category_id"] for a in truth["annotations"]}
    # the package takes its time
    few = {**truth, "categories": [c for c in truth["categories"] if c["id"] in held]}
    best = same(few, perfect(truth, kind), kind)
    assert best["ap"] == pytest.approx(100) and best["ar300"] == pytest.approx(100)
    score = same(truth if kind == "segm" else few, rough(truth, kind), kind)
    assert 5 < score["ap"] < 80 and tuple(score)[:13] == LVIS_SCORES
    assert all(0 < x < 100 for x in score["stats"] if x is not None)
    assert (score["apr"] is None) == (name == "car_parts")


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_drawn_annotations(drawn_set, kind):
    truth = json.loads(drawn_set.val_json.read_text())
    assert any(image["not_exhaustive_category_ids"] for image in truth["images"])
    assert {c["frequency"] for c in truth["categories"]} == {"r", "c"}
    assert same(truth, perfect(truth, kind), kind)["ap"] == pytest.approx(100)
    results = rough(truth, kind)
    score = same(truth, results, kind)
    assert 5 < score["ap"] < 80 and score["apf"] is None and score["apr"] != score["apc"]
    if kind == "segm":  # from the data set as the scripts have it
        assert lvis_ap(drawn_set, results) == score
        part = replace(drawn_set, val=drawn_set.val[:9])
        ids = {photo.id for photo in part.val}
        mine = [r for r in results if r["image_id"] in ids]
        assert lvis_ap(part, mine) == lvis_ap(
            {
                key: [x for x in content if x.get("image_id", x["id"]) in ids]
                if key in ("images", "annotations")
                else content
                for key, content in truth.items()
            },
            mine,
        )


def random_rectangles(kind: str, g: np.random.Generator) -> tuple[dict, list[dict]]:
    """Truth and results on a coarse grid, so that scores, overlaps and the limits of sizes are
    often equal: objects without area, empty detections, classes that the file does not list, ids
    in no order and with gaps, more detections than count."""
    ids, images = g.permutation([2, 3, 5, 8, 13]).tolist(), []
    for number in g.permutation(20)[:7].tolist():
        negative = g.permutation([*ids, 99])[:3].tolist()
        images.append(
            {
                "id": number,
                "height": 256,
                "width": 256,
                "neg_category_ids": negative,
                "not_exhaustive_category_ids": g.permutation(ids)[: g.integers(0, 2)].tolist(),
            }
        )
    boxes = [
        [
            32 * int(g.integers(0, 3)),
            32 * int(g.integers(0, 3)),
            *(16 * g.integers(1, 9, 2)).tolist(),
        ]
        for _ in range(40)
    ]
    boxes += [[0, 0, 32, 32], [0, 0, 96, 96], [32, 0, 96, 96], [16, 0, 96, 96]] * 3
    annotations = [
        {
            "id": i + 1,
            "image_id": images[int(g.integers(7))]["id"],
            "category_id": ids[int(g.integers(4))],
            "bbox": b,
            "segmentation": [rectangle(*b)],
            "area": float(g.choice([0, 1, 1, 1, 1]) * b[2] * b[3]),
        }
        for i, b in enumerate(boxes)
    ]
    annotations += [
        dict(annotations[3], id=98),
        dict(annotations[4], id=99),
        dict(annotations[5], id=97, category_id=99),
    ]
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": c, "name": str(c), "frequency": f} for c, f in zip(ids, "rrcfc", strict=True)
        ],
    }
    results = []
    for _ in range(400):
        image, b = images[int(g.integers(7))], boxes[int(g.integers(len(boxes)))]
        b = [b[0] + 8 * int(g.integers(-1, 2)), *b[1:3], b[3] * int(g.random() < 0.9)]
        results.append(
            {
                "image_id": image["id"],
                "category_id": int(g.choice([*ids, 99])),
                "score": float(g.integers(1, 5) / 4),
                "bbox": b,
            }
        )
        if kind == "segm":
            runs = coco_mask.frPyObjects(np.array([results[-1].pop("bbox")], np.float64), 256, 256)[
                0
            ]
            results[-1]["segmentation"] = (
                {**runs, "counts": runs["counts"].decode()} if g.random() < 0.5 else runs
            )
    return truth, results


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_random_rectangles(kind, seed):
    truth, results = random_rectangles(kind, np.random.default_rng(seed))
    before = copy.deepcopy((truth, results))
    lvis_ap(truth, results, kind)
    assert (truth, results) == before, "what it was given has changed"
    for max_dets in (300, 40, 1):
        score = same(truth, results, kind, max_dets)
        assert score[f"ar{max_dets}"] == score["stats"][9] and (max_dets == 1 or score["ap"] > 0)
    assert lvis_ap(truth, results, kind, 40) != lvis_ap(truth, results, kind)
    if kind == "segm":  # boxes and areas of masks
        same(truth, results, "bbox")


# --------------------------------------------------------------------------------------------- COCO
def same_of_coco(truth: dict, results: list[dict], kind: str) -> dict:
    """Our score, which must be that of pycocotools to the bit, also where it is the judge and for
    other numbers of detections."""
    score = coco_ap(truth, results, kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(truth))
        stats, per_class = of_pycocotools(path, of_kind(results, kind), kind)
    assert score["stats"] == stats
    assert score["per_class"] == per_class
    groups = ["rcf"[k % 3] for k in range(len(truth["categories"]))]
    for max_dets in (100, 7, 1, 300):
        given = (truth, results, kind, max_dets, groups)
        assert coco_ap(*given) == by_the_record(coco_ap, *given)
    return score


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference results in {GOLDEN}")
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_coco_on_the_demo_of_its_api(kind, capfd):
    truth = json.loads((GOLDEN / "instances_val2014_100.json").read_text())
    results = json.loads((GOLDEN / f"instances_val2014_fake{kind}100_results.json").read_text())
    assert 10 < same_of_coco(truth, results, kind)["ap"] < 90
    assert capfd.readouterr() == ("", ""), "nobody speaks"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_coco_on_random_rectangles_and_crowds(kind, seed):
    g = np.random.default_rng(seed)
    truth, results = random_rectangles(kind, g)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = int(g.random() < 0.2)
        annotation["ignore"] = int(g.random() < 0.2)  # means nothing
    score = same_of_coco(truth, results, kind)
    assert 0 < score["ap"] < 90
    if kind == "segm":  # the boxes of masks
        assert coco_ap(truth, results, "bbox") == by_the_record(coco_ap, truth, results, "bbox")
    assert coco_ap(truth, results, kind, 7) != coco_ap(truth, results, kind, 100)


def test_coco_without_results_or_objects():
    truth, results = random_rectangles("bbox", np.random.default_rng(0))
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0
    crowds = [{**annotation, "iscrowd": 1} for annotation in truth["annotations"]]
    for objects in (truth["annotations"], crowds, []):
        content = {**truth, "annotations": objects}
        for given in ([], results):
            score = coco_ap(content, given, "bbox")
            assert score == by_the_record(coco_ap, content, given, "bbox")
            assert (score["ap"] is None) == (objects is not truth["annotations"])


def test_areas_of_more_masks_than_pycocotools_counts():
    """It counts up to 255 of a call. An object may have as many polygons."""
    g = np.random.default_rng(0)
    masks = (g.random((300, 9, 7)) < 0.3).astype(np.uint8)
    runs = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    for number in (0, 1, 255, 256, 300):
        assert areas_of(runs[:number]).tolist() == masks[:number].sum((1, 2)).tolist()
    specks = [np.tile([x, x, x + 0.1], 2).reshape(3, 2).ravel() for x in np.linspace(0, 9, 300)]
    assert not has_pixels(specks, 10, 10)
    assert has_pixels([*specks, np.array([1.0, 1, 6, 1, 6, 6, 1, 6])], 10, 10)


def test_the_collector_of_garbage_is_as_it_was():
    truth, results = random_rectangles("bbox", np.random.default_rng(0))
    for was_enabled in (False, True):
        (gc.enable if was_enabled else gc.disable)()
        for score in (coco_ap, samples):
            score(truth, results, "bbox")
            assert gc.isenabled() == was_enabled
            with pytest.raises(KeyError):
                score({**truth, "annotations": [{"area": 1}]}, results, "bbox")
            assert gc.isenabled() == was_enabled


def test_who_judges():
    truth, results = random_rectangles("bbox", np.random.default_rng(0))
    found = evaluators.measured(evaluators.columns(results, truth), "bbox")
    given = evaluators.numbered(truth, "bbox"), found
    for evaluator, limit in ((evaluators.coco_evaluator, [300]), (evaluators.lvis_evaluator, 300)):
        assert isinstance(evaluator(*given, "bbox", limit), hotcoco.COCOeval)
        record = by_the_record(evaluator, *given, "bbox", limit)
        assert isinstance(record, (COCOeval, LVISEval))


def test_lvis_without_any_judge():
    """It is said in a sentence."""
    with mock.patch.dict(sys.modules, {"hotcoco": None, "lvis": None}):
        with pytest.raises(UserError, match="pip install hotcoco"):
            lvis_ap(toy(([1], [], [])), [])


# ------------------------------------------------------------------------------------------ by hand
def toy(*images: tuple[list[int], list[int], list[int]]) -> dict:
    """An LVIS file with images 10, 11, ..: classes of the objects, absent, and partly annotated.
    The n-th object of an image is a square of 20 pixels at (30 n, 0). Annotation ids start at 0,
    and classes are 1 (r), 2 (c), 3 (f)."""
    truth = {
        "images": [],
        "annotations": [],
        "categories": [{"id": c, "name": f"k{c}", "frequency": "rcf"[c - 1]} for c in (1, 2, 3)],
    }
    for number, (present, absent, partial) in enumerate(images, start=10):
        truth["images"].append(
            {
                "id": number,
                "height": 60,
                "width": 240,
                "neg_category_ids": absent,
                "not_exhaustive_category_ids": partial,
            }
        )
        truth["annotations"] += [
            {
                "id": len(truth["annotations"]) + n,
                "image_id": number,
                "category_id": c,
                "area": 400.0,
                "bbox": [30 * n, 0, 20, 20],
                "segmentation": [rectangle(30 * n, 0, 20, 20)],
            }
            for n, c in enumerate(present)
        ]
    return truth


def found(*entries: tuple[int, int, float, float]) -> list[dict]:
    """Detections (image, class, score, x): squares of 20 pixels at (x, 0)."""
    image = {"height": 60, "width": 240}
    return [
        detection({**image, "id": i}, c, score, [rectangle(x, 0, 20, 20)], "segm")
        for i, c, score, x in entries
    ]


@pytest.mark.parametrize(
    "second, expected",
    [
        (([], [], []), 100),
        (([], [1], []), 50),
        (([], [1], [1]), 100),
        (([], [], [1]), 100),
        (([2], [], []), 100),
    ],
)
def test_only_known_classes_count(second, expected):
    """A better scored detection of class 1 in a second image is wrong only where that class is
    known to be absent, and not if its annotation is partial."""
    truth = toy(([1], [], []), second)
    score = lvis_ap(truth, found((10, 1, 0.5, 0), (11, 1, 0.9, 0)))
    assert (
        score["per_class"]["k1"] == pytest.approx(expected)
        and score["apr"] == score["per_class"]["k1"]
    )


def test_partly_annotated_classes():
    """A second detection is wrong, unless only some objects of the class are annotated; but these
    must be found."""
    results = found((10, 1, 0.9, 90), (10, 1, 0.5, 0))
    assert lvis_ap(toy(([1], [], [])), results)["ap"] == pytest.approx(50)
    assert lvis_ap(toy(([1], [], [1])), results)["ap"] == pytest.approx(100)
    assert lvis_ap(toy(([1, 1], [], [1])), results)["ap"] == pytest.approx(PARTS)


def test_the_cut_is_per_image_and_before_the_filter():
    truth = toy(([1], [], []), ([1], [], []))
    results = found((10, 3, 0.9, 0), (10, 77, 0.8, 0), (10, 1, 0.5, 0), (11, 1, 0.4, 0))
    assert lvis_ap(truth, results, max_dets=3)["ap"] == pytest.approx(100)
    for number in (1, 2):  # classes 3 and 77 do not count, but take places
        score = lvis_ap(truth, results, max_dets=number)
        assert score["ap"] == pytest.approx(PARTS) and score[f"ar{number}"] == score["ar_s"] == 50
    many = found(*((10, 3, 0.9, 0) for _ in range(300)), (10, 1, 0.5, 0), (11, 1, 0.4, 0))
    assert (
        lvis_ap(truth, many)["ap"] == pytest.approx(PARTS)
        and lvis_ap(truth, many, max_dets=301)["ap"] > 99
    )
    assert lvis_ap(truth, many[:299] + many[300:])["ap"] == pytest.approx(100)
    # of equal ones the first stays
    tied = found((10, 1, 0.5, 90), (10, 1, 0.5, 0), (11, 1, 0.4, 0))
    assert (
        lvis_ap(truth, tied, max_dets=1)["ar1"]
        == lvis_ap(truth, tied[::-1], max_dets=1)["ar1"] - 50
        == 50
    )


def test_more_detections_of_one_class_than_lvis_takes_by_default():
    truth = toy(([1], [], []))
    truth["annotations"][0]["id"] = 1
    many = found(*((10, 1, 0.9, 90) for _ in range(300)), (10, 1, 0.5, 0))
    assert same(truth, many, "segm", 300)["ar300"] == 0
    assert same(truth, many, "segm", 301)["ar301"] == 100


def test_equal_scores_rank_by_image_and_then_as_given():
    one = toy(([1], [], []))
    assert lvis_ap(one, found((10, 1, 0.5, 0), (10, 1, 0.5, 90)))["ap"] == pytest.approx(100)
    assert lvis_ap(one, found((10, 1, 0.5, 90), (10, 1, 0.5, 0)))["ap"] == pytest.approx(50)
    for first, expected in ((([1], [], []), 100), (([], [1], []), 50)):
        truth = toy(first, ([1] if first[1] else [], [] if first[1] else [1], []))
        for results in (
            found((10, 1, 0.5, 0), (11, 1, 0.5, 0)),
            found((11, 1, 0.5, 0), (10, 1, 0.5, 0)),
        ):
            assert lvis_ap(truth, results)["ap"] == pytest.approx(expected)


def test_no_results_no_objects_only_absent_classes():
    score = lvis_ap(toy(([1], [2], [])), [])
    assert score["stats"] == [0, 0, 0, 0, None, None, 0, None, None, 0, 0, None, None]
    assert score["per_class"] == {"k1": 0, "k2": None, "k3": None} and score["ar300"] == 0
    truth = toy(([], [1, 2], [3]))
    for results in ([], found((10, 1, 0.9, 0), (10, 2, 0.9, 0), (10, 3, 0.9, 0))):
        assert lvis_ap(truth, results)["stats"] == [None] * 13
    same(truth, found((10, 1, 0.9, 0), (10, 2, 0.9, 0), (10, 3, 0.9, 0)), "segm")
    assert lvis_ap(toy(([1], [], [])), found((10, 1, 0.9, 0)))["ap"] == pytest.approx(100), (
        "an object of id 0"
    )
    with pytest.raises(AssertionError):
        lvis_ap(toy(([1], [], [])), found((12, 1, 0.9, 0)))


# ------------------------------------------------------------------------------------------ samples
def dumb(
    truth: dict, results: list[dict], kind: str, overlap: float, max_dets: int, federated: bool
) -> list:
    """The samples (class, confidence, right), sorted, one detection after the other."""

    def area(record: dict) -> float:
        return record["bbox"][2] * record["bbox"][3] if kind == "bbox" else record["mask"].sum()

    def shared(a: dict, b: dict) -> float:
        if kind == "segm":
            return float((a["mask"] & b["mask"]).sum())
        sides = (
            min(a["bbox"][i] + a["bbox"][i + 2], b["bbox"][i] + b["bbox"][i + 2])
            - max(a["bbox"][i], b["bbox"][i])
            for i in (0, 1)
        )
        return float(np.prod([max(side, 0) for side in sides]))

    found, ids = [], sorted(c["id"] for c in truth["categories"])
    for image in truth["images"]:
        size = image["height"], image["width"]
        mine = sorted(
            (r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"]
        )[:max_dets]
        for place, c in enumerate(ids):
            true = [
                dict(a)
                for a in truth["annotations"]
                if (a["image_id"], a["category_id"]) == (image["id"], c) and a["area"] > 0
            ]
            if federated and not true and c not in image["neg_category_ids"]:
                continue
            given = [dict(r) for r in mine if r["category_id"] == c]
            if kind == "segm":
                for record in true + given:
                    mask = record["segmentation"]
                    if isinstance(mask, list):
                        mask = coco_mask.merge(coco_mask.frPyObjects(mask, *size))
                    record["mask"] = coco_mask.decode(mask).astype(bool)
            free = [a for a in true if not a.get("iscrowd")]
            for r in given:
                if area(r) == 0:
                    continue
                near = []
                for turn, a in enumerate(free):
                    both = shared(r, a)
                    ratio = both / (area(r) + area(a) - both)
                    if ratio >= overlap:
                        near.append((ratio, turn))
                if near:
                    free.pop(max(near)[1])
                    found.append((place, r["score"], True))
                elif not (
                    c in image.get("not_exhaustive_category_ids", ())
                    or any(a.get("iscrowd") and shared(r, a) / area(r) >= overlap for a in true)
                ):
                    found.append((place, r["score"], False))
    return sorted(found)


def as_list(found: Samples) -> list:
    assert (found.labels.dtype, found.conf.dtype, found.right.dtype) == (np.int64, np.float64, bool)
    assert (np.diff(found.labels) >= 0).all()
    return sorted(zip(*(x.tolist() for x in found), strict=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_samples_of_random_rectangles(kind, seed):
    """On a coarse grid, as above, with crowds; class 13 has no object, and 99 is not listed."""
    g = np.random.default_rng(seed)
    ids, images = g.permutation([2, 3, 5, 8, 13]).tolist(), []
    for number in g.permutation(20)[:6].tolist():
        images.append(
            {
                "id": number,
                "height": 96,
                "width": 96,
                "neg_category_ids": g.permutation([*ids, 99])[:2].tolist(),
                "not_exhaustive_category_ids": g.permutation(ids)[: g.integers(0, 3)].tolist(),
            }
        )
    present = [c for c in ids if c != 13]
    boxes = [
        [
            16 * int(g.integers(0, 3)),
            16 * int(g.integers(0, 3)),
            *(8 * g.integers(1, 6, 2)).tolist(),
        ]
        for _ in range(60)
    ]
    annotations = [
        {
            "id": i,
            "image_id": images[int(g.integers(6))]["id"],
            "category_id": present[int(g.integers(4))],
            "bbox": b,
            "segmentation": [rectangle(*b)],
            "area": float(g.choice([0, 1, 1, 1]) * b[2] * b[3]),
            "iscrowd": int(g.random() < 0.15),
        }
        for i, b in enumerate(boxes)
    ]
    truth = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c)} for c in ids],
    }
    results = []
    for i, (x, y, w, h) in enumerate(boxes * 8):
        b = [x + 4 * int(g.integers(-1, 2)), y, w, h * int(g.random() < 0.9)]
        results.append(
            {
                "image_id": images[int(g.integers(6))]["id"],
                "category_id": int(g.choice([*ids, 99])),
                "score": 0.25 * int(g.integers(1, 4)) + 1e-3 * (i % 50),
                "bbox": b,
            }
        )
        if kind == "segm":
            runs = coco_mask.frPyObjects(np.array([results[-1].pop("bbox")], np.float64), 96, 96)[0]
            results[-1]["segmentation"] = runs
    results, seen = [results[i] for i in g.permutation(len(results))], set()
    for overlap, max_dets, federated in (
        (0.5, 300, True),
        (0.5, 300, False),
        (0.5, 30, True),
        (0.75, 300, True),
        (0.3, 40, False),
    ):
        found = as_list(samples(truth, results, kind, overlap, max_dets, federated))
        assert found == dumb(truth, results, kind, overlap, max_dets, federated)
        given = (truth, results, kind, overlap, max_dets, federated)
        assert as_list(by_the_record(samples, *given)) == found
        assert {True, False} == {right for *_, right in found}
        seen.add(json.dumps(found))
    assert len(seen) == 5, "overlap, number and federation make a difference"
    assert as_list(samples(truth, results, kind)) == as_list(
        samples(truth, results, kind, federated=True)
    )
    place = sorted(ids).index(13)  # no object in the whole set
    assert any(c == place for c, *_ in found) and not any(
        right for c, _, right in found if c == place
    )
    for image in images:
        del image["neg_category_ids"]
    assert as_list(samples(truth, results, kind)) == as_list(
        samples(truth, results, kind, federated=False)
    )


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_samples_on_real_annotations(kind):
    path = TEST_DATA / REAL["coco_mini"]
    if not path.is_file():
        pytest.skip(f"no {path}")
    truth = json.loads(path.read_text())
    truth["images"] = truth["images"][::4]
    kept = {image["id"] for image in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]
    for image in truth["images"]:  # it says of every class whether it is there
        image["neg_category_ids"] = image["neg_category_ids"][::4]
    results = rough(truth, kind)
    found = samples(truth, results, kind)
    assert as_list(found) == dumb(
        truth, results, kind, 0.5, 300, True
    ) and 100 < found.right.sum() < len(found.right)
    every = samples(truth, results, kind, federated=False)
    assert as_list(every) == dumb(truth, results, kind, 0.5, 300, False) and len(
        every.labels
    ) > 1.2 * len(found.labels)


def test_samples_of_a_data_set(drawn_set):
    truth = json.loads(drawn_set.val_json.read_text())
    results = rough(truth, "bbox")
    for federated in (None, True, False):
        expected = as_list(samples(truth, results, federated=federated))
        for data in (drawn_set, instances.scored_on(drawn_set, drawn_set.val)):
            assert as_list(samples(data, results, federated=federated)) == expected
        assert expected
    plain = instances.find("coco", drawn_set.root)
    assert not plain.lvis and samples(plain, results).labels.max() < 24
    assert as_list(samples(plain, results)) == as_list(samples(plain, results, federated=False))


def test_samples_by_hand():
    """An object of class 1 is found twice: right, then wrong. Class 2 is absent, nothing is known
    of 3."""
    results = found(
        (10, 1, 0.9, 0), (10, 1, 0.8, 1), (10, 2, 0.7, 0), (10, 3, 0.6, 0), (10, 77, 0.5, 0)
    )
    truth = toy(([1], [2], []))
    assert as_list(samples(truth, results)) == [(0, 0.8, False), (0, 0.9, True), (1, 0.7, False)]
    assert as_list(samples(truth, results, federated=False)) == [
        (0, 0.8, False),
        (0, 0.9, True),
        (1, 0.7, False),
        (2, 0.6, False),
    ]
    partly = toy(([1], [2], [1]))
    assert as_list(samples(partly, results)) == [(0, 0.9, True), (1, 0.7, False)]
    assert as_list(samples(truth, results, max_dets=1)) == [(0, 0.9, True)]
    assert as_list(samples(truth, results, overlap=0.96)) == [
        (0, 0.8, False),
        (0, 0.9, True),
        (1, 0.7, False),
    ]
    assert as_list(samples(truth, found((10, 1, 0.8, 6)), "segm", 0.5)) == [(0, 0.8, True)]
    assert as_list(samples(truth, found((10, 1, 0.8, 6)), "segm", 0.75)) == [(0, 0.8, False)]
    truth["annotations"].append(
        {
            **truth["annotations"][0],
            "id": 9,
            "iscrowd": 1,
            "area": 3600,
            "bbox": [60, 0, 60, 60],
            "segmentation": [rectangle(60, 0, 60, 60)],
        }
    )
    crowded = found(
        (10, 1, 0.9, 70),
        (10, 1, 0.8, 90),
        (10, 1, 0.7, 51),
        (10, 1, 0.6, 49),
        (10, 2, 0.5, 70),
        (10, 1, 0.4, 0),
    )
    for kind in ("segm", "bbox"):
        assert as_list(samples(truth, crowded, kind)) == [
            (0, 0.4, True),
            (0, 0.6, False),
            (1, 0.5, False),
        ]
    for empty in (
        samples(truth, []),
        samples({**truth, "annotations": []}, results[:1]),
        samples({"images": [], "annotations": [], "categories": []}, []),
    ):
        assert as_list(empty) == []
    assert as_list(samples({**truth, "annotations": []}, results[:1], federated=False)) == [
        (0, 0.9, False)
    ]
    for wrong in (0, 1.1):
        with pytest.raises(AssertionError):
            samples(truth, results, overlap=wrong)


def test_masks_have_their_own_areas():
    """Boxes beside them would be out of range for the package, so not wrong."""
    truth = toy(([1], [], []))
    truth["annotations"][0]["id"] = 1
    results = found((10, 1, 0.9, 90), (10, 1, 0.5, 0))
    assert same(truth, results, "segm")["ap_s"] == pytest.approx(50)
    large = [r | {"bbox": [0, 0, 60, 60]} for r in results]
    assert lvis_ap(truth, large) == lvis_ap(truth, results)
    assert by_the_record(lvis_ap, truth, large) == lvis_ap(truth, results)
    assert lvis_ap(truth, results, "bbox")["ap"] == pytest.approx(50)  # boxes of the masks


def test_groups_of_classes(drawn_set):
    truth = toy(([1, 2, 2, 3], [], []))
    results = found((10, 1, 0.9, 0), (10, 2, 0.9, 30))
    score = lvis_ap(truth, results)
    assert score["stats"][6:9] == pytest.approx([100, PARTS, 0])
    assert lvis_ap(truth, results, frequency=["c", "c", "f"])["stats"][6:9] == [
        None,
        pytest.approx(np.mean(score["stats"][6:8])),
        0,
    ]
    for c in truth["categories"]:
        del c["frequency"]
    bare = lvis_ap(truth, results)
    assert bare["stats"] == score["stats"][:6] + [None] * 3 + score["stats"][9:]
    assert bare["per_class"] == score["per_class"]
    with pytest.raises(AssertionError):
        lvis_ap(truth, results, frequency=["r"])
    results = rough(json.loads(drawn_set.val_json.read_text()), "segm")
    groups = ["rcf"[k % 3] for k in range(len(drawn_set.classes))]
    score = lvis_ap(drawn_set, results, frequency=groups)
    for group in "rcf":
        mine = [
            score["per_class"][name]
            for name, f in zip(drawn_set.classes, groups, strict=True)
            if f == group
        ]
        assert score[f"ap{group}"] == pytest.approx(np.mean([x for x in mine if x is not None]))


def test_gathered_results_score_as_one(drawn_set):
    """Two processes have every other image; `gather` puts them in the order of images."""
    results = mask_ap.gather(World(), rough(json.loads(drawn_set.val_json.read_text()), "segm"))
    ids = [photo.id for photo in drawn_set.val]
    parts = [[r for r in results if r["image_id"] in ids[rank::2]] for rank in (0, 1)]
    score = lvis_ap(drawn_set, results)
    assert lvis_ap(drawn_set, mask_ap.gather(World(), parts[0] + parts[1])) == score
    assert lvis_ap(drawn_set, parts[1] + parts[0]) == score, "the order of images does not matter"
