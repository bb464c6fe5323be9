"""Annotations that say something odd: what is plain is read, and anything else is one sentence that
names the file and the place. Kinds are tested here by an example; test_outside_data.py draws
others."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from common import coco, instances, mask_ap
from common.errors import UserError
from common.objects import Instances, masks_of

SQUARE = [2, 2, 10, 2, 10, 8, 2, 8]
RUNS = [50, 40, 230]  # of 16 x 20 pixels


def coco_file(folder: Path, text: str = "", **changes) -> Path:
    """A file of a picture of 20x16 pixels with one object, changed so; or of this text."""
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": [SQUARE]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 16, "width": 20}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [annotation | {"area": 48, "iscrowd": 0} | changes],
    }
    path = folder / "train.json"
    path.write_text(text or json.dumps(content))
    return path


def read(path: Path) -> Instances:
    photos = coco.photos_of(coco.read_content(path), lambda picture: path.with_name("a.png"))
    return Instances("coco", path.parent, ["dog"], [3], photos, photos, [])


# ------------------------------------------------------------------------------------- annotations
@pytest.mark.parametrize(
    "segmentation, said",
    [
        ({"size": [16, 20], "counts": [50, 40]}, "sum to 90, but must sum to 16 x 20 = 320"),
        ({"size": [16, 20], "counts": "b1X1"}, "must sum to 16 x 20"),
        ({"size": [16, 20], "counts": [50, -40, 310]}, "not all within the picture"),
        ({"size": [16, 20], "counts": [2**70]}, "too large"),
        ({"size": [16, 20], "counts": "a text"}, "text of its run lengths"),
        ({"size": [16, 20], "counts": "é"}, "foreign character"),
        ({"size": [20, 16], "counts": RUNS}, "are for 20 x 16 pixels"),
        ([[1, 1, 5, math.nan, 5, 5]], "not finite"),
        ([[1, 1, 5, 2e8, 5, 5]], "not finite or over"),
        ([[0, 0, *([9e5, 9e5, 0, 9e5] * 3)]], "too long"),
        ([[1, 1, 5, [1], 5, 5]], "segmentation[0][3]: expected float, got array"),
        ([SQUARE, {"size": [16, 20], "counts": RUNS}], "segmentation[0]: expected object"),
        ("polygon", "it must be polygons"),
        (True, "it must be polygons"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_outlines_that_c_code_cannot_take_are_refused(segmentation, said, tmp_path):
    path = coco_file(tmp_path, segmentation=segmentation)
    with pytest.raises(UserError) as error:
        read(path)
    assert f"{path}: annotations[0].segmentation" in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE,
        np.reshape(SQUARE, (-1, 2)).tolist(),
        [np.reshape(SQUARE, (-1, 2)).tolist()],
        [[str(number) for number in SQUARE]],
    ],
    ids=["flat", "points", "points in a list", "text"],
)
def test_polygons_in_other_forms_are_read_as_what_they_are(segmentation, tmp_path):
    data = read(coco_file(tmp_path, segmentation=segmentation))
    assert data.val[0].things[0].segmentation[0].tolist() == SQUARE


@pytest.mark.parametrize(
    "segmentation",
    [
        [{"size": [16, 20], "counts": RUNS}],
        {"size": ["16", 20.0], "counts": ["50", 40.0, 230]},
        {"size": [16, 20], "counts": [50, 20, 0, 20, 230, 0]},
        [{"size": [16, 20], "counts": [50, 25, 245]}, {"size": [16, 20], "counts": [60, 30, 230]}],
    ],
    ids=["in a list", "text", "empty runs", "in parts"],
)
def test_run_lengths_in_other_forms_are_read_as_what_they_are(segmentation, tmp_path):
    data = read(coco_file(tmp_path, segmentation=segmentation))
    (mask,) = masks_of(data.val[0], data).masks
    assert mask.T.flatten().nonzero().flatten().tolist() == list(range(50, 90))


@pytest.mark.parametrize("crowd", [0, 1, 0.0, 1.0, False, True, "0", "1", None])
def test_training_and_scoring_agree_on_what_is_a_crowd(crowd, tmp_path):
    data = read(coco_file(tmp_path, iscrowd=crowd))
    is_crowd = crowd in (1, "1")
    assert masks_of(data.val[0], data, crowds=True).crowds.tolist() == [is_crowd]
    for scored in (data, instances.scored_on(data, data.train)):  # --tune scores training images
        truth = mask_ap.truth_of(scored)
        assert [a["iscrowd"] for a in truth["annotations"]] == [int(is_crowd)]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"iscrowd": 2}, "iscrowd"),
        ({"iscrowd": "NaN"}, "iscrowd"),
        ({"iscrowd": 2**31}, "iscrowd"),
        ({"category_id": [3]}, "category_id"),
        ({"category_id": {}}, "category_id"),
        ({"category_id": True}, "category_id"),
        ({"bbox": 7}, "bbox"),
        ({"bbox": [1, 2, 3, math.inf]}, "bbox"),
        ({"area": math.nan}, "area"),
        ({"area": [4]}, "area"),
        ({"image_id": 1.5}, "image_id"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_named_by_its_place(changes, said, tmp_path):
    path = coco_file(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        read(path)
    assert f"{path}: annotations[0].{said}: " in str(error.value)


@pytest.mark.parametrize("has_object", [True, False])
def test_root_categories_that_share_the_name_of_a_class_are_left_out(has_object, tmp_path):
    path = coco_file(tmp_path)
    content = json.loads(path.read_text())
    content["categories"].insert(0, {"id": 0, "name": "dog", "supercategory": "none"})
    if not has_object:
        content["annotations"] = []
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"1 categories of {path} have no object"):
        assert coco.read_content(path).classes == {3: "dog"}
    content["annotations"] = [{"image_id": 1, "category_id": i, "segmentation": []} for i in (0, 3)]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names that all differ"):
        coco.read_content(path)


def test_digits_in_texts_are_numbers(tmp_path):
    path = coco_file(tmp_path, category_id="3", image_id="1", area="48", bbox=["2", "2", "8", "6"])
    thing = read(path).val[0].things[0]
    assert (thing.category, thing.area, thing.box) == (0, 48, (2, 2, 8, 6))


def test_objects_without_a_pixel_are_counted_or_refused(tmp_path):
    shares = [[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]
    for outside in (shares, [[30, 2, 40, 2, 40, 9]], {"size": [16, 20], "counts": [320]}):
        with pytest.raises(UserError, match="none of its 1 objects has a pixel"):
            read(coco_file(tmp_path, segmentation=outside))
        path = coco_file(tmp_path)
        content = json.loads(path.read_text())
        content["annotations"].append(content["annotations"][0] | {"segmentation": outside})
        path.write_text(json.dumps(content))
        with pytest.warns(UserWarning, match=r"1 of 2 objects of .*no pixel .*annotations\[1\]"):
            assert len(read(path).val[0].things) == 2


def test_thin_objects_that_have_pixels_are_not_counted(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(coco_file(tmp_path, segmentation=[[1, 1, 18, 1, 18, 2, 1, 2]]))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    text = coco_file(tmp_path).read_text()
    for twice in (
        text.replace('"iscrowd": 0', '"iscrowd": 1, "iscrowd": 0'),
        text[:-1] + ', "annotations": []}',
        '{"annotations": [], ' + text[1:],
        '{"images": [], ' + text[1:],
    ):
        with pytest.raises(UserError, match="stands twice"):
            read(coco_file(tmp_path, text=twice))
        again = coco_file(tmp_path, text=twice)
        again.write_bytes(twice.encode("utf-16"))
        with pytest.raises(UserError, match="stands twice"):
            read(again)
    read(coco_file(tmp_path, text=text.replace("a.png", "annotations")))


def test_a_misspelt_crowd_is_said(tmp_path):
    with pytest.warns(UserWarning, match="isCrowd is not looked at"):
        read(coco_file(tmp_path, isCrowd=1))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_in_other_encodings_are_read(encoding, tmp_path):
    path = coco_file(tmp_path)
    path.write_text(path.read_text(), encoding=encoding)
    assert len(read(path).val) == 1
