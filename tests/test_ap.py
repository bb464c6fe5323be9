"""COCO's average precision against the demo of the COCO API and toys, and that of Cityscapes
against values by hand and plain loops."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TEST_DATA, Started, free_port
from pycocotools import mask as coco_mask

import better_pseudo_labels
from common import distributed, instances, judge, mask_ap
from common.distributed import World
from common.errors import RankError
from common.judge import lvis_ap
from common.objects import CITYSCAPES_THINGS, Instances, Thing, bare, masks_of, read_ids
from data import shapes

GOLDEN = TEST_DATA / "coco_eval_golden"


DEMO = {
    "segm": "320 562 299 387 310 327 268 415 417 469 377 381",
    "bbox": "505 697 573 586 519 501 387 594 595 640 566 564",
}


golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference results in {GOLDEN}")


real = pytest.mark.skipif(
    not (TEST_DATA / "coco_mini").is_dir(), reason=f"no pictures in {TEST_DATA}"
)


CAR, TRUCK, PERSON = 2, 3, 0  # places among the eight classes


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Instances:
    return instances.find(
        "coco", shapes.make_coco(tmp_path_factory.mktemp("drawn") / "coco", train=40, val=40)
    )


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Instances:
    return instances.find(
        "cityscapes", shapes.make_cityscapes(tmp_path_factory.mktemp("street"), train=4, val=4)
    )


def perfect(data: Instances, shift: int = 0) -> list[dict]:
    """The truth as results, moved to the right by `shift` pixels."""
    found = []
    for photo in data.val:
        labels, masks, _ = masks_of(photo, data)
        scores = torch.linspace(1, 0.5, max(len(labels), 1))[: len(labels)]
        found += mask_ap.results_of(
            photo.id, data.ids, labels, scores, torch.roll(masks, shift, -1)
        )
    return found


def box(
    top: int, left: int, height: int, width: int, canvas: tuple[int, int] = (60, 60)
) -> np.ndarray:
    mask = np.zeros(canvas, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def toy(objects: list[tuple[int, np.ndarray, bool]], first: int = 0) -> dict:
    """A COCO file of one image, with objects (category id, mask, crowd); annotation ids start at
    0."""
    runs = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for _, mask, _ in objects]
    return {
        "images": [{"id": 5, "height": 60, "width": 60}],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {
                "id": i + first,
                "image_id": 5,
                "category_id": c,
                "segmentation": r,
                "iscrowd": int(crowd),
                "area": float(mask.sum()),
                "bbox": coco_mask.toBbox(r).tolist(),
            }
            for i, ((c, mask, crowd), r) in enumerate(zip(objects, runs, strict=True))
        ],
    }


def detected(*found: tuple[int, float, np.ndarray]) -> list[dict]:
    labels, scores = torch.tensor([c for c, _, _ in found]), torch.tensor([s for _, s, _ in found])
    return mask_ap.results_of(
        5, [4, 9], labels, scores, torch.from_numpy(np.stack([m for _, _, m in found]))
    )


# --------------------------------------------------------------------------------------------- COCO
def test_files_without_boxes_and_areas_are_scored_as_with_them(tmp_path):
    """Some exporters leave them out, or write 0 and empty lists, or sizes as text; polygons say it
    all."""
    folder = shapes.make_tail(tmp_path / "tail", 12, 2, 6)
    data = instances.find("lvis", folder)
    content = json.loads(data.val_json.read_text())
    whole = mask_ap.truth_of(data)["annotations"]
    for i, a in enumerate(content["annotations"]):
        a.update(area=0, bbox=[]) if i % 2 else [a.pop("area"), a.pop("bbox")]
    for record in content["images"]:
        record.update(height=str(record["height"]), width=float(record["width"]))
    (tmp_path / "lean.json").write_text(json.dumps(content))
    lean = mask_ap.truth_of(
        instances.find(
            "lvis", folder, val_json=str(tmp_path / "lean.json"), images=str(folder / "images")
        )
    )
    assert len(lean["annotations"]) == len(whole) > 5 and all(
        type(r["height"]) is int for r in lean["images"]
    )
    for mended, a in zip(lean["annotations"], whole, strict=True):
        assert mended["area"] > 0 and np.allclose(mended["bbox"], a["bbox"], atol=1.5)


def by_file(data: Instances) -> dict:
    """What is true by the file as Python reads it, without the pictures that are not scored."""
    content, ids = json.loads(data.val_json.read_text()), {photo.id for photo in data.val}
    content["images"] = [r for r in content["images"] if r["id"] in ids]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    for a in content["annotations"]:
        a.setdefault("iscrowd", 0)
    return content


def moved(truth: dict, seed: int = 0) -> list[dict]:
    """Boxes and masks of the objects, a few pixels off, some of another class; scores have one
    digit."""
    g, results = np.random.default_rng(seed), []
    sizes = {r["id"]: (r["height"], r["width"]) for r in truth["images"]}
    for a in truth["annotations"]:
        mask = coco_mask.decode(mask_ap.runs_of(a["segmentation"], *sizes[a["image_id"]]))
        mask = np.roll(mask, g.integers(0, 4, 2), (0, 1))
        runs = coco_mask.encode(np.asfortranarray(mask))
        results.append(
            {
                "image_id": a["image_id"],
                "category_id": a["category_id"],
                "score": round(g.random(), 1),
                "segmentation": runs,
                "bbox": (np.array(a["bbox"]) + g.integers(0, 4, 4)).tolist(),
            }
        )
    for r in results[::7]:
        r["category_id"] = truth["categories"][int(g.integers(len(truth["categories"])))]["id"]
    return results


@pytest.mark.parametrize(
    "name", ["drawn", "drawn as lvis", "coco_mini", "coco_mini as lvis", "car_parts as lvis"]
)
def test_what_is_true_by_the_photos_is_what_the_file_says(name, drawn):
    folder, _, kind = name.partition(" as ")
    root = drawn.root if folder == "drawn" else TEST_DATA / folder
    if not root.is_dir():
        pytest.skip(f"no {root}")
    data = instances.find("coco", root, train_json="annotations/lvis_train.json" if kind else "")
    data.val = data.val[::2]
    content, made = by_file(data), mask_ap.truth_of(data)
    assert made["images"] and len(made["annotations"]) == len(content["annotations"])
    assert [a["id"] for a in made["annotations"]] == list(range(1, len(made["annotations"]) + 1))
    given = {
        "images": ("id", "height", "width", "neg_category_ids", "not_exhaustive_category_ids"),
        "categories": ("id", "name", "frequency"),
        "annotations": ("image_id", "category_id", "area", "iscrowd", "bbox"),
    }
    for key, fields in given.items():
        records, others = (
            [
                str(
                    [
                        np.array(r[k]).astype(float if k in ("area", "bbox") else object).tolist()
                        for k in fields
                        if k in r
                    ]
                )
                for r in c[key]
            ]
            for c in (made, content)
        )
        assert sorted(records) == sorted(others)
    assert (
        (kind == "lvis")
        == ("frequency" in made["categories"][0])
        == ("neg_category_ids" in made["images"][0])
    )
    results = moved(made)
    for what in ("segm", "bbox"):
        scores = [
            (judge.coco_ap(truth, results, what), lvis_ap(truth, results, what))
            for truth in (content, made)
        ]
        assert scores[0] == scores[1] and 1 < scores[0][0]["ap"] < 99


def test_objects_without_area_and_boxes_of_polygons(drawn):
    """Polygons have the extent of their points, run lengths that of the mask; where there is no
    area it is measured."""
    polygons = [np.array([2.004, 3, 12, 3, 12, 9, 2.004, 9]), np.array([20.3, 3, 22, 3, 22, 5])]
    runs = coco_mask.encode(np.asfortranarray(box(5, 6, 7, 8), np.uint8))
    things = (Thing(1, polygons, False, 0.0), Thing(0, runs, True, 0.0), Thing(0, runs, False, 5.5))
    photo = drawn.val[0]._replace(things=things, height=60, width=60, negative=(2,), partial=(3,))
    truth = mask_ap.truth_of(instances.scored_on(drawn, [photo]))
    assert truth["images"] == [
        {"id": photo.id, "file_name": photo.name, "height": 60, "width": 60}
    ], "it is not LVIS"
    first, *others = truth["annotations"]
    assert (
        first["bbox"] == [2, 3, 20, 6]
        and first["category_id"] == drawn.ids[1]
        and first["iscrowd"] == 0
    )
    assert first["area"] == masks_of(photo, drawn)[1][0].sum() > 59
    assert [(a["bbox"], a["area"], a["iscrowd"]) for a in others] == [
        ([6, 5, 8, 7], 56, 1),
        ([6, 5, 8, 7], 5.5, 0),
    ]
    with pytest.raises(AssertionError, match="has no labels"):
        mask_ap.truth_of(instances.scored_on(drawn, [bare(photo)]))


def test_held_out_streets_are_read_from_their_labels(street):
    held = better_pseudo_labels.hold_out(instances.labels_read(street.train), 0.5, 0)[1]
    ids = {p.id for p in held}
    whole = mask_ap.truth_of(replace(street, val=street.train))
    truth = mask_ap.truth_of(instances.scored_on(street, held))
    assert truth["annotations"] == [a for a in whole["annotations"] if a["image_id"] in ids] != []


@golden
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_the_demo_of_the_coco_api_to_the_digit(kind, capfd):
    truth = json.loads((GOLDEN / "instances_val2014_100.json").read_text())
    results = json.loads((GOLDEN / f"instances_val2014_fake{kind}100_results.json").read_text())
    before = json.dumps(truth), json.dumps(results)
    score = judge.coco_ap(truth, results, kind)
    assert [round(10 * x) for x in score["stats"]] == [int(x) for x in DEMO[kind].split()]
    assert [score[k] for k in ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")] == score["stats"][:6]
    assert score["ar100"] == score["stats"][8] and len(score["per_class"]) == 80
    values = [x for x in score["per_class"].values() if x is not None]
    assert 40 < len(values) < 80 and np.mean(values) == pytest.approx(score["ap"])
    assert (json.dumps(truth), json.dumps(results)) == before, "what it was given has changed"
    assert capfd.readouterr() == ("", "")


def test_a_toy_by_hand():
    """Two cats. The best detection is right, the second wrong: precision 1 up to recall 0.5, then
    0, so AP is 51 of 101 recall points; dogs are not there. A detection of IoU 0.6 counts at
    thresholds 0.5, 0.55 and 0.6."""
    one, two = box(0, 0, 20, 20), box(30, 0, 20, 20)
    truth = toy([(4, one, False), (4, two, False)])
    score = judge.coco_ap(
        truth, detected((0, 0.9, one), (0, 0.8, box(0, 40, 20, 20)), (1, 0.7, two))
    )
    assert (
        score["ap"] == pytest.approx(100 * 51 / 101)
        and score["ap75"] == score["ap50"] == score["ap"]
    )
    assert score["per_class"] == {"cat": score["ap"], "dog": None} and score["ar100"] == 50
    # 400 pixels are small
    assert score["ap_s"] == score["ap"] and score["ap_m"] is None and score["ap_l"] is None
    score = judge.coco_ap(truth, detected((0, 0.9, box(0, 0, 12, 20)), (0, 0.8, two)))
    assert score["ap50"] == pytest.approx(100) and score["ap75"] == pytest.approx(
        100 * 0.5 * 51 / 101
    )
    # from 0.65 on the best is wrong
    assert score["ap"] == pytest.approx(100 * (3 * 1 + 7 * 0.5 * 51 / 101) / 10)
    both = detected((0, 0.9, one), (0, 0.8, two))
    for number, ar in ((1, 50), (7, 100), (300, 100)):
        score = judge.coco_ap(truth, both, max_dets=number)
        assert (
            score["ap"] == pytest.approx(100 * 51 / 101 if number == 1 else 100)
            and score[f"ar{number}"] == ar
        )
        assert score["stats"][6:9] == [50, ar, ar]


def test_crowds_hide_detections_and_areas_come_from_masks():
    cat, crowd = box(0, 0, 20, 20), box(20, 20, 40, 40)
    wrong = (0, 0.95, box(25, 25, 8, 8))
    score = judge.coco_ap(toy([(4, cat, False), (4, crowd, True)]), detected((0, 0.9, cat), wrong))
    assert score["ap"] == pytest.approx(100)
    assert judge.coco_ap(toy([(4, cat, False)]), detected((0, 0.9, cat), wrong))[
        "ap"
    ] == pytest.approx(50)
    results = detected((0, 0.9, cat))
    assert set(results[0]) == {"image_id", "category_id", "segmentation", "score"}
    large = [
        r | {"bbox": [0, 0, 60, 60]} for r in detected((0, 0.9, cat), (0, 0.95, box(30, 30, 9, 9)))
    ]
    truth = toy([(4, cat, False)])
    assert judge.coco_ap(truth, large)["ap_s"] == pytest.approx(50)
    assert judge.coco_ap(truth, results, "bbox")["ap"] == pytest.approx(
        100
    )  # else boxes of the masks


@pytest.mark.parametrize("first", [0, 1])
def test_an_annotation_of_id_0_can_be_found(first):
    """pycocotools takes it for no match."""
    cat = box(0, 0, 20, 20)
    assert judge.coco_ap(toy([(4, cat, False)], first), detected((0, 0.9, cat)))[
        "ap"
    ] == pytest.approx(100)


def test_empty_results_score_0_and_absent_classes_none():
    score = judge.coco_ap(toy([(4, box(0, 0, 20, 20), False)]), [])
    assert (score["ap"], score["ap50"], score["ap_s"], score["ap_l"], score["ar100"]) == (
        0,
        0,
        0,
        None,
        0,
    )
    assert score["per_class"] == {"cat": 0, "dog": None}
    score = judge.coco_ap(toy([(4, box(0, 0, 20, 20), True)]), [])
    assert (score["ap"], score["per_class"]) == (None, {"cat": None, "dog": None})
    empty = detected((0, 0.0, np.zeros((60, 60), bool)))
    assert judge.coco_ap(toy([(4, box(0, 0, 20, 20), False)]), empty)["ap"] == 0


def test_perfect_results_score_100(drawn, street):
    for data in (drawn, street):
        results = perfect(data)
        assert judge.coco_ap(data, results)["ap"] == pytest.approx(100)
        assert 5 < judge.coco_ap(data, perfect(data, 4))["ap"] < 80
        first = judge.coco_ap(data, [r for r in results if r["image_id"] == data.val[0].id])["ap"]
        data = replace(data, val=data.val[:1])
        part = judge.coco_ap(data, [r for r in results if r["image_id"] == data.val[0].id])["ap"]
        assert part == pytest.approx(100) and first < 100, "only the pictures in `val` are scored"


@real
@pytest.mark.parametrize(
    "train_json", ["instances_train.json", "lvis_train.json", "instances_train_super12.json"]
)
def test_perfect_results_on_real_pictures(train_json):
    data = instances.find("coco", TEST_DATA / "coco_mini", train_json=train_json)
    data.val = data.val[::5]
    score = judge.coco_ap(data, perfect(data))
    assert score["ap"] == pytest.approx(100) and score["ar100"] == pytest.approx(100)


def test_a_file_without_areas_crowds_or_good_polygons(drawn, tmp_path):
    content = json.loads(drawn.val_json.read_text())
    for a in content["annotations"]:
        del a["area"], a["bbox"], a["id"]
        if not a["iscrowd"]:
            del a["iscrowd"]
    content["annotations"].append(
        {"image_id": drawn.val[0].id, "category_id": 1, "segmentation": [[1, 2, 3, 4]]}
    )
    (tmp_path / "val.json").write_text(json.dumps(content))
    data = instances.find("coco", drawn.root, val_json=str(tmp_path / "val.json"))
    facts, other = (
        [(a["area"], a["iscrowd"]) for a in mask_ap.truth_of(d)["annotations"]]
        for d in (data, drawn)
    )
    results = perfect(drawn, 2)
    stats = [
        judge.coco_ap(truth, results)["stats"] for truth in (data, drawn, mask_ap.truth_of(drawn))
    ]
    assert facts == other and stats[0] == stats[1] == stats[2]


def test_cityscapes_as_a_coco_file(street):
    truth = mask_ap.truth_of(street)
    assert [c["name"] for c in truth["categories"]] == street.classes and len(truth["images"]) == 4
    for photo in street.val:
        labels, masks, crowd = masks_of(photo, street, crowds=True)
        here = [a for a in truth["annotations"] if a["image_id"] == photo.id]
        assert [a["category_id"] for a in here] == [street.ids[c] for c in labels]
        assert [a["iscrowd"] for a in here] == crowd.int().tolist() and any(crowd) == any(
            a["iscrowd"] for a in here
        )
        for a, mask in zip(here, masks.numpy(), strict=True):
            assert (
                np.array_equal(coco_mask.decode(a["segmentation"]), mask)
                and a["area"] == mask.sum()
            )
            assert a["bbox"] == coco_mask.toBbox(a["segmentation"]).tolist()


# -------------------------------------------------------------------------------------- run lengths
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32])
def test_encode(kind):
    masks = (torch.rand(5, 13, 7, generator=torch.Generator().manual_seed(0)) < 0.4).to(kind)
    if kind != torch.bool:
        masks[2, 6:] *= 3
    masks[3] = 0
    runs = mask_ap.encode(masks)
    assert json.loads(json.dumps(runs)) == runs and runs[0]["size"] == [13, 7]
    assert np.array_equal(np.stack([coco_mask.decode(r) for r in runs]), masks.numpy() != 0)
    assert mask_ap.encode(torch.zeros(0, 4, 4)) == []


# --------------------------------------------------------------------------------------- Cityscapes
def scored(*images: tuple[np.ndarray, list]) -> dict:
    benchmark = mask_ap.CityscapesAP()
    for truth, predictions in images:
        benchmark.add(truth, predictions)
    return benchmark.result()


def region(*values: tuple[int, np.ndarray]) -> np.ndarray:
    ids = np.full((60, 60), 7, np.int32)  # road
    for value, mask in values:
        ids[mask] = value
    return ids


def test_three_images_by_hand():
    """Two cars of 400 pixels. A: found (0.9), and again in part (0.8, IoU 0.6). B: missed; a
    detection on a group (0.7) does not count, one with 3/4 on void (0.95) is wrong from threshold
    0.75 on, for 3/4 is not more. C: a car of 64 pixels is no object, so its detection (0.5) does
    not count; a truck that nobody finds.

    Up to 0.7: right .9, wrong .8. Points (recall, precision): (.5, .5), (.5, 1), (0, 1), widths 0,
    .25, .25: area .5. From 0.75: wrong .95, right .9, wrong .8. Points (.5, 1/3), (.5, 1/2), (0,
    0), (0, 1), widths 0, .25, .25, 0: area .125."""
    car, other = box(0, 0, 20, 20), box(30, 0, 20, 20)
    a = region((26001, car)), [(CAR, 0.9, car), (CAR, 0.8, box(0, 0, 12, 20))]
    b = (
        region((26000, car), (26, other), (0, box(0, 30, 15, 20))),
        [(CAR, 0.7, other), (CAR, 0.95, box(0, 30, 20, 20))],
    )
    c = region((26001, box(5, 5, 8, 8)), (27000, other)), [(CAR, 0.5, box(5, 5, 8, 8))]
    score = scored(a, b, c)
    assert score["per_class"] == {name: None for name in CITYSCAPES_THINGS.values()} | {
        "car": pytest.approx(100 * (5 * 0.5 + 5 * 0.125) / 10),
        "truck": 0,
    }
    assert score["ap"] == pytest.approx(31.25 / 2) and score["ap50"] == pytest.approx(50 / 2)
    assert scored(c, a, b) == score


@pytest.mark.parametrize(
    "truth, predictions, expected",
    [
        ([(26001, box(0, 0, 20, 20))], [(CAR, 0.9, box(0, 0, 20, 20))], 100),
        ([(26001, box(0, 0, 20, 20))], [], 0),
        ([(26001, box(0, 0, 20, 20))], [(CAR, 0.9, np.zeros((60, 60), bool))], 0),
        ([(26001, box(0, 0, 20, 20))], [(TRUCK, 0.9, box(0, 0, 20, 20))], 0),
        # An IoU of 0.5 is not more than 0.5, but one of 0.55 is.
        ([(26001, box(0, 0, 20, 20))], [(CAR, 0.9, box(0, 0, 10, 20))], 0),
        ([(26001, box(0, 0, 20, 20))], [(CAR, 0.9, box(0, 0, 11, 20))], 10),
        # A wrong one with a lower score than the right one lies outside of the curve and costs
        # nothing. One with a higher score takes half of the step.
        (
            [(26001, box(0, 0, 20, 20))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.3, box(30, 30, 20, 20))],
            100,
        ),
        (
            [(26001, box(0, 0, 20, 20))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 20, 20))],
            25,
        ),
        # A wrong one lies on a region that is not scored: void, or a group of this class.
        (
            [(26001, box(0, 0, 20, 20)), (4, box(30, 30, 20, 20))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 20, 20))],
            100,
        ),
        (
            [(26001, box(0, 0, 20, 20)), (26, box(30, 30, 20, 20))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 20, 20))],
            100,
        ),
        # A group of another class is no excuse.
        (
            [(26001, box(0, 0, 20, 20)), (24, box(30, 30, 20, 20))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 20, 20))],
            25,
        ),
        # A small object is not scored, either, and a small group counts twice.
        (
            [(26001, box(0, 0, 20, 20)), (26002, box(30, 30, 9, 11))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 9, 11))],
            100,
        ),
        (
            [(26001, box(0, 0, 20, 20)), (26, box(30, 30, 9, 9))],
            # 2 * 81 / 160 is more than 0.95
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 16, 10))],
            100,
        ),
        (
            [
                (26001, box(0, 0, 20, 20)),
                (4, box(30, 30, 10, 20)),
            ],  # half on void is not more than 0.5
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 20, 20))],
            25,
        ),
        # The second one on an object (IoU 0.625) is wrong up to 0.6, although 2 * 60 / 160 of it
        # lie on a small group, and for that reason does not count at 0.65 and 0.7. A wrong one at
        # 0.8 between right ones leaves (2/3 + 1/2 + 1 + 1) / 4 = 19/24.
        (
            [(26001, box(0, 0, 10, 10)), (26, box(10, 0, 6, 10)), (26002, box(30, 30, 20, 20))],
            [
                (CAR, 0.9, box(0, 0, 10, 10)),
                (CAR, 0.8, box(0, 0, 16, 10)),
                (CAR, 0.7, box(30, 30, 20, 20)),
            ],
            (8 * 100 * 19 / 24 + 2 * 100) / 10,
        ),
        # Caravans (29001) are objects of a class that is not scored, but to the benchmark only
        # groups of them are void.
        (
            [(26001, box(0, 0, 20, 20)), (29, box(30, 30, 20, 20))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 20, 20))],
            100,
        ),
        (
            [(26001, box(0, 0, 20, 20)), (29001, box(30, 30, 20, 20))],
            [(CAR, 0.9, box(0, 0, 20, 20)), (CAR, 0.95, box(30, 30, 20, 20))],
            25,
        ),
        (
            [(26001, box(0, 0, 10, 10))],
            [(CAR, 0.9, box(0, 0, 10, 10))],
            100,
        ),  # 100 pixels are enough
        ([(26001, box(0, 0, 9, 11))], [(CAR, 0.9, box(0, 0, 9, 11))], None),
        ([], [(CAR, 0.9, box(0, 0, 9, 9))], None),
        # Nothing is left that counts.
        (
            [(26001, box(0, 0, 20, 20)), (0, box(30, 30, 20, 20))],
            [(CAR, 0.9, box(30, 30, 20, 20))],
            0,
        ),
    ],
)
def test_single_rules(truth, predictions, expected):
    score = scored((region(*truth), predictions))
    assert (
        score["per_class"]["car"]
        == (None if expected is None else pytest.approx(expected))
        == score["ap"]
    )


def by_loops(images: list[tuple[np.ndarray, list]]) -> dict[str, list[float]]:
    """Recipe 4.7 word by word, with full-size masks: class -> AP at each threshold, nan without
    objects."""
    table = {}
    for index, (kind, name) in enumerate(CITYSCAPES_THINGS.items()):
        table[name] = []
        for threshold in np.arange(0.5, 1.0, 0.05):
            right, wrong, misses, objects = [], [], 0, 0
            for truth, predictions in images:
                regions = {
                    v: truth == v
                    for v in np.unique(truth).tolist()
                    if (v // 1000 if v >= 1000 else v) == kind
                }
                void = np.isin(truth, mask_ap.VOID)
                ours = [(s, m) for c, s, m in predictions if c == index and m.any()]

                def iou(a, b):
                    return (a & b).sum() / (a | b).sum()

                for value, mask in regions.items():
                    if value < 1000 or mask.sum() < 100:
                        continue
                    objects += 1
                    # used at once
                    passing = sorted(s for s, m in ours if iou(m, mask) > threshold)  # noqa: B023
                    misses += not passing
                    right += passing[-1:]
                    wrong += passing[:-1]
                for score, mask in ours:
                    if any(iou(mask, m) > threshold for m in regions.values()):
                        continue
                    ignored = (mask & void).sum()
                    for value, m in regions.items():
                        ignored += (mask & m).sum() * (value < 1000)
                        ignored += (mask & m).sum() * (m.sum() < 100)
                    if ignored / mask.sum() <= threshold:
                        wrong.append(score)
            if not objects:
                table[name].append(float("nan"))
                continue
            curve = []  # from the lowest score on
            for score in sorted({*right, *wrong}):
                hits, all_above = (
                    sum(s >= score for s in right),
                    sum(s >= score for s in right + wrong),
                )
                curve.append((hits / (len(right) + misses), hits / all_above))
            curve.append((0.0, 1.0))
            recalls, area = [curve[0][0], *(r for r, _ in curve), 0.0], 0.0
            for i, (_, precision) in enumerate(curve):
                area += precision * (recalls[i] - recalls[i + 2]) / 2
            table[name].append(area if right or wrong else 0.0)
    return table


def random_image(g: np.random.Generator) -> tuple[np.ndarray, list]:
    """Boxes of objects, small ones, groups, void and caravans; detections near them, doubled, of
    wrong classes, random, empty, with many equal scores."""
    values = [
        24,
        25,
        26,
        33,
        24001,
        24002,
        24003,
        26000,
        26001,
        27001,
        29001,
        29,
        30,
        0,
        4,
        9,
        33000,
        33001,
        23,
    ]
    truth, found = np.full((50, 70), 7, np.int32), []
    for value in g.choice(values, 14):
        truth[box(*g.integers(0, 55, 2), *g.integers(3, 30, 2), (50, 70))] = value
    for _ in range(25):
        value = int(g.choice(truth.ravel()))
        kind = value // 1000 if value >= 1000 else value
        index = (
            list(CITYSCAPES_THINGS).index(kind)
            if kind in CITYSCAPES_THINGS and g.random() < 0.85
            else int(g.integers(8))
        )
        mask = (
            np.roll(truth == value, g.integers(-2, 3, 2), (0, 1))
            if g.random() < 0.8
            else box(*g.integers(0, 55, 2), *g.integers(0, 25, 2), (50, 70))
        )
        found.append((index, float(g.integers(1, 9)) / 8, mask))
    return truth, found


@pytest.mark.parametrize("seed", range(6))
def test_random_maps_against_plain_loops(seed):
    g = np.random.default_rng(seed)
    images = [random_image(g) for _ in range(4)]
    score, table = scored(*images), by_loops(images)
    for name, values in table.items():
        assert score["per_class"][name] == (
            None if np.isnan(values[0]) else pytest.approx(100 * np.mean(values))
        )
    known = np.array([values for values in table.values() if not np.isnan(values[0])])
    assert score["ap"] == pytest.approx(100 * known.mean()) and score["ap50"] == pytest.approx(
        100 * known[:, 0].mean()
    )
    assert 0 < score["ap"] < score["ap50"] < 100 and len(known) >= 3


def test_a_drawn_street_found_perfectly(street):
    benchmark = mask_ap.CityscapesAP()
    for photo in street.val:
        labels, masks, _ = masks_of(photo, street)
        benchmark.add(
            read_ids(photo.label),
            [(int(c), 0.5, m.numpy() > 0) for c, m in zip(labels, masks, strict=True)],
        )
    score = benchmark.result()
    assert (
        score["ap"] == pytest.approx(100)
        and len([x for x in score["per_class"].values() if x is not None]) >= 4
    )
    with pytest.raises(RankError, match="70x50 pixels is scored on a label of 60x60"):
        benchmark.add(region(), [(CAR, 0.5, np.ones((50, 70), bool))])


# ---------------------------------------------------------------------------------------- processes
def evaluate(root: Path, out: Path) -> None:
    """What a script does to score, on this process of those that the environment names; results as
    JSON."""
    world = distributed.start("cpu")
    data = instances.find("cityscapes", root)
    benchmark, results = mask_ap.CityscapesAP(), []
    for index, image in instances.score_loader(data.val, world, 0):
        photo, g = data.val[index], np.random.default_rng(index)
        labels, masks, _ = masks_of(photo, data)
        masks = torch.roll(masks, 1, -1)
        # many are equal: their order matters
        scores = torch.from_numpy(g.integers(1, 4, len(labels)) / 4)
        assert image.shape[-2:] == masks.shape[-2:]
        results += mask_ap.results_of(photo.id, data.ids, labels, scores, masks)
        benchmark.add(
            read_ids(photo.label),
            list(zip(labels.tolist(), scores.tolist(), masks.numpy() > 0, strict=True)),
        )
    results = mask_ap.gather(world, results)
    ranks = mask_ap.gather(world, [(world.rank, "x")])
    assert mask_ap.from_main(world, world.rank) == 0
    record = {
        "results": results,
        "coco": judge.coco_ap(data, results),
        "street": benchmark.result(world),
        "ranks": ranks,
    }
    (out / f"{world.size}-{world.rank}.json").write_text(json.dumps(record))
    distributed.stop()


def test_two_processes_score_as_one(street, tmp_path):
    env = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    started = [
        Started(
            evaluate, (street.root, tmp_path), tmp_path / "io", {**env, "RANK": i, "LOCAL_RANK": i}
        )
        for i in ("0", "1")
    ]
    evaluate(street.root, tmp_path)
    for process in started:
        process.wait().ok()
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first == second and first["ranks"] == [[0, "x"], [1, "x"]]
    assert one == {**first, "ranks": [[0, "x"]]}
    assert 0 < one["coco"]["ap"] < 100 and 0 < one["street"]["ap"] < 100


def test_gather_sorts_by_image():
    items = [{"image_id": 3, "score": 1}, {"image_id": 1, "score": 2}, {"image_id": 3, "score": 0}]
    assert [i["score"] for i in mask_ap.gather(World(), items)] == [2, 1, 0]
    assert mask_ap.gather(World(), [(2, "b"), (0, "a"), (2, "a")]) == [(0, "a"), (2, "b"), (2, "a")]
    assert mask_ap.gather(World(), []) == []
    assert mask_ap.from_main(World(), "x") == "x"
