"""common/instances.py, objects.py and coco.py: readers of COCO, LVIS and Cityscapes, masks under a
joint geometry, splits, and sample orders."""

import hashlib
import json
import os
import shutil
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TEST_DATA
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from common import distributed, instances, loading, objects, splits, transforms
from common.distributed import World
from common.errors import RankError, UserError
from common.files import BrokenImage
from common.instances import choose, scored_on
from common.objects import CITYSCAPES_THINGS, Instances, Photo, Thing, Window, masks_of
from data import shapes

COCO_MINI, CAR_PARTS, LISTS = TEST_DATA / "coco_mini", TEST_DATA / "car_parts", TEST_DATA / "splits"


real = pytest.mark.skipif(
    not COCO_MINI.is_dir() or not CAR_PARTS.is_dir(), reason=f"no pictures in {TEST_DATA}"
)


published = pytest.mark.skipif(not LISTS.is_dir(), reason=f"no published lists in {LISTS}")


SQUARE, TALL = [[2, 2, 10, 2, 10, 8, 2, 8]], [[4.5, 3.2, 9.1, 12.7, 3.3, 11.0]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Instances:
    return instances.find("coco", shapes.make_coco(tmp_path_factory.mktemp("drawn") / "coco"))


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Instances:
    return instances.find("cityscapes", shapes.make_cityscapes(tmp_path_factory.mktemp("street")))


@pytest.fixture(scope="module")
def mini() -> Instances:
    return instances.find("coco", COCO_MINI)


def content(images: int = 4, first: int = 0) -> dict:
    """A COCO file of pictures of 20x16 pixels, each with one object of the class cat (7) or dog
    (3)."""
    return {
        "images": [
            {"id": first + i, "file_name": f"{first + i}.png", "height": 16, "width": 20}
            for i in range(images)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": first + i,
                "category_id": (7, 3)[i % 2],
                "segmentation": SQUARE,
                "area": 48,
                "iscrowd": 0,
            }
            for i in range(images)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


def write(
    root: Path, train: dict | str | None, val: dict | str | None, images: bool = True
) -> Path:
    """A root for --dataset coco; the pictures lie in images/."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    for part, data in (("train", train), ("val", val)):
        if data is not None:
            (root / "annotations" / f"{part}.json").write_text(
                data if isinstance(data, str) else json.dumps(data)
            )
        for record in data["images"] if images and isinstance(data, dict) else []:
            if isinstance(record, dict) and "file_name" in record:
                Image.new("RGB", (20, 16)).save(root / "images" / record["file_name"])
    return root


@pytest.fixture
def own(tmp_path) -> Path:
    return write(tmp_path / "own", content(4), content(2, first=100))


def oracle(coco: COCO, photo: Photo, data: Instances) -> list[tuple[int, bytes, bool]]:
    return sorted(
        (data.ids.index(a["category_id"]), coco.annToMask(a).tobytes(), bool(a.get("iscrowd")))
        for a in coco.imgToAnns[photo.id]
    )


def as_list(labels, masks, crowd) -> list[tuple[int, bytes, bool]]:
    return sorted(
        (int(c), m.numpy().tobytes(), bool(g)) for c, m, g in zip(labels, masks, crowd, strict=True)
    )


# ------------------------------------------------------------------------------------------ readers
@real
def test_coco_with_80_classes_and_crowds(mini):
    # one training picture is empty
    assert (len(mini.train), len(mini.val), len(mini.extra)) == (214, 206, 1)
    assert len(mini.classes) == 80 and mini.ids == sorted(mini.ids) and mini.ids[-1] == 90
    assert (mini.classes[0], mini.classes[-1], mini.classes[11]) == (
        "person",
        "toothbrush",
        "stop sign",
    )
    assert [p.id for p in mini.train] == sorted(p.id for p in mini.train) and not mini.lvis
    assert sum(t.crowd for p in mini.train + mini.val for t in p.things) == 40
    assert any(not p.things for p in mini.val), "pictures without objects are scored, too"
    assert all(p.things is None for p in mini.extra)


@real
@pytest.mark.parametrize("kind", ["instances", "lvis"])
def test_masks_are_those_of_pycocotools(kind, capsys):
    data = instances.find("coco", COCO_MINI, train_json=f"{kind}_train.json")
    coco = COCO(COCO_MINI / "annotations" / f"{kind}_val.json")
    with_crowds = [p for p in data.val if any(t.crowd for t in p.things)][:8]
    assert bool(with_crowds) == (kind == "instances")
    for photo in data.val[::12] + with_crowds:
        truth = oracle(coco, photo, data)
        assert as_list(*masks_of(photo, data, crowds=True)) == truth
        assert as_list(*masks_of(photo, data)) == [x for x in truth if not x[2]]


@real
def test_super_categories_and_car_parts():
    data = instances.find("coco", COCO_MINI, train_json="instances_train_super12.json")
    assert data.val_json.name == "instances_val_super12.json" and data.ids == list(range(1, 13))
    cars = instances.find("coco", CAR_PARTS)
    assert (len(cars.train), len(cars.val), len(cars.classes), len(cars.extra)) == (400, 100, 13, 0)
    assert sum(len(p.things) for p in cars.train) == 3073
    found = instances.find("lvis", CAR_PARTS)
    assert (
        found.lvis and found.train_json.name == "lvis_train.json" and found.classes == cars.classes
    )
    assert (found.frequency.count("f"), found.frequency.count("c"), found.frequency.count("r")) == (
        11,
        2,
        0,
    )
    first = found.val[0]
    assert first.id == 401 and found.negative[401] == [4, 6, 7, 8, 11] and found.partial[401] == []
    assert not set(found.negative[401]) & objects.singles(first)
    assert first.negative == (4, 6, 7, 8, 11) and first.partial == ()


@real
def test_what_lvis_says_of_absent_classes_comes_with_each_picture():
    data, content = instances.find("lvis", COCO_MINI), {}
    for part in ("train", "val"):
        content |= {
            r["id"]: r
            for r in json.loads((COCO_MINI / f"annotations/lvis_{part}.json").read_text())["images"]
        }
    photos = data.train + data.val
    for photo in photos:
        record = content[photo.id]
        assert [data.ids[c] for c in photo.negative] == record["neg_category_ids"]
        assert [data.ids[c] for c in photo.partial] == record["not_exhaustive_category_ids"]
        assert not set(photo.negative) & objects.singles(photo)
    for part in (data.train, data.val):  # both have it
        assert sum(map(len, (p.negative for p in part))) > 100 and any(p.partial for p in part)
    assert data.negative == {p.id: list(p.negative) for p in data.val}
    assert data.partial == {p.id: list(p.partial) for p in data.val}
    rich = next(p for p in photos if p.negative and p.partial)
    assert objects.bare(rich) == Photo(*rich[:5]) and Photo(*rich[:5]).negative == ()


def test_scored_on_other_pictures(drawn):
    few = drawn.train[3:9]
    data = scored_on(drawn, few)
    assert (data.val, data.val_json, data.negative, data.partial) == (few, None, {}, {})
    assert (
        data.train is drawn.train
        and data.classes is drawn.classes
        and drawn.val_json
        and len(drawn.val) == 100
    )
    lvis = instances.find("coco", drawn.root, train_json="annotations/lvis_train.json")
    few = [p for p in lvis.train if p.partial][:2] + lvis.train[:3]
    data = scored_on(lvis, few)
    assert (
        data.lvis and data.frequency == lvis.frequency and set(data.negative) == {p.id for p in few}
    )
    assert all(
        data.negative[p.id] == list(p.negative) and data.partial[p.id] == list(p.partial)
        for p in few
    )
    assert any(data.negative.values()) and any(data.partial.values())


def test_shapes_are_drawn_on_first_use(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "make_things", partial(shapes.make_things, train=5, tune=2, val=3))
    for val, number in (("val", 3), ("tune", 2)):
        data = instances.find("coco", shapes.make_things(tmp_path / "shapes" / "things"), val=val)
        assert (data.name, len(data.train), len(data.val), data.extra) == ("coco", 5, number, [])
        assert {p.image.parent.name for p in data.val} == {val} and data.val[
            0
        ].image.name == data.train[0].image.name
        assert len(masks_of(data.val[0], data)[0]) == len(data.val[0].things) > 0
    with pytest.raises(UserError, match="knows 2 classes"):
        instances.find(
            "coco", shapes.make_things(tmp_path / "shapes" / "things"), classes=["a", "b"]
        )


def test_drawn_scenes_as_coco_and_as_lvis(drawn):
    assert (len(drawn.train), len(drawn.val), len(drawn.classes)) == (400, 100, 24) and drawn.ids[
        :3
    ] == [1, 4, 8]
    again = instances.find(
        "coco", drawn.root, train_json="annotations/lvis_train.json", classes=drawn.classes
    )
    assert (
        again.lvis
        and not drawn.lvis
        and again.ids == list(range(1, 25))
        and set(again.frequency) == {"r", "c", "f"}
    )
    for p, q in zip(drawn.val[:30], again.val, strict=False):
        assert (p.image, p.id, p.height, p.width) == (q.image, q.id, q.height, q.width)
        here, there = as_list(*masks_of(p, drawn)), as_list(*masks_of(q, again))
        assert set(here) <= set(there) and len(there) - len(here) == len(again.partial[q.id])


def test_cityscapes_tree(street):
    assert street.ids == [24, 25, 26, 27, 28, 31, 32, 33]
    assert street.classes == [
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ]
    assert (len(street.train), len(street.val)) == (16, 4) and street.val_json is None
    seen, crowds = set(), 0
    for photo in street.train:
        ids = np.array(Image.open(photo.label)).astype(int)
        labels, masks, crowd = masks_of(photo, street, crowds=True)
        truth = [v for v in np.unique(ids) if (v // 1000 if v >= 1000 else v) in CITYSCAPES_THINGS]
        assert [m.sum() for m in masks] == [
            (ids == v).sum() for v in truth
        ] and photo.things is None
        assert [street.ids[c] for c in labels] == [v // 1000 if v >= 1000 else v for v in truth]
        assert crowd.tolist() == [v < 1000 for v in truth]
        assert len(masks_of(photo, street)[0]) == sum(v >= 1000 for v in truth)
        seen, crowds = seen | set(labels.tolist()), crowds + crowd.sum()
    assert seen == set(range(8)) and crowds > 0


def test_no_object_and_pictures_without_labels(own, tmp_path):
    val = content(2, first=100)
    val["annotations"] = val["annotations"][:1]
    train = content(4)
    train["images"].reverse()
    train["annotations"][2]["iscrowd"] = 1
    train["annotations"][2]["segmentation"] = {"size": [16, 20], "counts": [100, 20, 200]}
    root = write(tmp_path / "empty", train, val)
    (root / "images" / "unlabeled").mkdir()
    Image.new("RGB", (9, 9)).save(root / "images" / "unlabeled" / "more.png")
    data = instances.find("coco", root)
    labels, masks, crowd = masks_of(data.val[1], data, Window(False, (32, 40), 3, 3, (5, 7)))
    assert labels.shape == (0,) and masks.shape == (0, 5, 7) and crowd.shape == (0,)
    assert (labels.dtype, masks.dtype, crowd.dtype) == (torch.int64, torch.uint8, torch.bool)
    assert [p.id for p in data.train] == [0, 1, 3]  # the third holds a crowd alone
    assert [(p.name, p.id, p.things) for p in data.extra] == [
        ("2.png", 2, None),
        ("more.png", -1, None),
    ]


def test_an_uncompressed_crowd_and_a_compressed_one_are_the_same(tmp_path):
    plain = {"size": [16, 20], "counts": [100, 20, 200]}
    packed = coco_mask.frPyObjects(plain, 16, 20)
    text = {**packed, "counts": packed["counts"].decode()}
    train = content(4)
    for annotation, runs in zip(train["annotations"], (plain, text, [plain]), strict=False):
        annotation.update(segmentation=runs, iscrowd=1)
    data = instances.find("coco", write(tmp_path / "own", train, train))
    for photo in data.val[:3]:
        labels, masks, crowd = masks_of(photo, data, crowds=True)
        assert masks[0].T.flatten().nonzero().flatten().tolist() == list(range(100, 120))
        assert crowd.tolist() == [True] and len(masks_of(photo, data)[0]) == 0


def test_where_files_lie(tmp_path):
    """The names of COCO and LVIS, pictures by coco_url, a tuning list of training pictures, and
    files of one's own."""
    root, train, val = tmp_path / "coco", content(3), content(2, first=100)
    for folder in ("annotations", "train2017", "val2017", "elsewhere"):
        (root / folder).mkdir(parents=True)
    for data, part in ((train, "train"), (val, "val")):
        for record in data["images"]:
            record["coco_url"] = f"http://images.cocodataset.org/{part}2017/{record['file_name']}"
            Image.new("RGB", (20, 16)).save(root / f"{part}2017" / record["file_name"])
    for name, data in (
        ("instances_train2017", train),
        ("instances_val2017", val),
        ("instances_tune2017", content(1)),
        ("elsewhere", val),
    ):
        (root / "annotations" / f"{name}.json").write_text(json.dumps(data))
    data = instances.find("coco", root)
    assert (data.train_json.name, data.val_json.name) == (
        "instances_train2017.json",
        "instances_val2017.json",
    )
    assert (
        data.train[1].image == root / "train2017" / "1.png"
        and data.val[0].image == root / "val2017" / "100.png"
    )
    data = instances.find("coco", root, val="tune")
    assert (
        data.val[0].image == root / "train2017" / "0.png"
        and data.val_json.name == "instances_tune2017.json"
    )
    data = instances.find("coco", root, val_json="elsewhere.json")
    assert [p.id for p in data.val] == [100, 101]
    # LVIS has no file_name; some pictures are of train
    for record in train["images"] + val["images"]:
        del record["file_name"]
    val["images"][0] |= train["images"][0] | {"id": 100}
    for category in train["categories"] + val["categories"]:
        category["frequency"] = "r"
    (root / "annotations" / "lvis_v1_train.json").write_text(json.dumps(train))
    (root / "annotations" / "lvis_v1_val.json").write_text(json.dumps(val))
    data = instances.find("lvis", root)
    assert data.val[0].image == root / "train2017" / "0.png" and data.frequency == ["r", "r"]
    (root / "annotations" / "elsewhere.json").write_text(json.dumps(content(2)))
    for i in range(2):
        Image.new("RGB", (20, 16)).save(root / "elsewhere" / f"{i}.png")
    data = instances.find(
        "coco",
        root,
        str(root / "annotations" / "elsewhere.json"),
        str(root / "annotations" / "elsewhere.json"),
        str(root / "elsewhere"),
    )
    assert data.val[0].image == root / "elsewhere" / "0.png"


# --------------------------------------------------------------------------------------- bad inputs
def broken(change) -> dict:
    data = content(4)
    change(data)
    return data


@pytest.mark.parametrize(
    "train, said",
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "train.json: expected object, got array"),
        ("{}", "missing required field images"),
        ('{"images": [], "categories": {}}', "categories: expected array, got object"),
        (broken(lambda d: d.pop("annotations")), "missing required field annotations"),
        (broken(lambda d: d.update(images=[3])), "images[0]: expected object, got int"),
        (
            broken(lambda d: d["annotations"][1].pop("segmentation")),
            "annotations[1]: object missing required field segmentation",
        ),
        (
            broken(lambda d: d["annotations"][1].pop("category_id")),
            "annotations[1]: object missing required field category_id",
        ),
        (
            broken(lambda d: d["annotations"][1].update(segmentation=4)),
            "annotations[1].segmentation: expected array, got int",
        ),
        (
            broken(lambda d: d["annotations"][1].update(segmentation={"size": [16, 20]})),
            "annotations[1].segmentation: object missing required field counts",
        ),
        (
            broken(lambda d: d["annotations"][1].update(segmentation=[[1, 2, 3, 4, 5, "x"]])),
            "annotations[1].segmentation[0][5]: expected float, got str",
        ),
        (
            broken(lambda d: d["annotations"][1].update(area="big")),
            "annotations[1].area: expected float",
        ),
        (
            broken(lambda d: d["annotations"][1].update(image_id=77)),
            "of image 77, which the file does not list",
        ),
        (
            broken(lambda d: d["annotations"][1].update(category_id=77)),
            "of category 77, which the file does not list",
        ),
        (
            broken(lambda d: d["images"][1].pop("height")),
            "images[1]: object missing required field height",
        ),
        (
            broken(lambda d: d["images"][1].pop("file_name")),
            "an image lacks its file_name",
        ),
        (broken(lambda d: d["images"][1].update(height=0)), "images[1].height: expected int >= 1"),
        (broken(lambda d: d["images"][1].update(id=0)), "lists an image twice"),
        (broken(lambda d: d["images"][1].update(file_name="0.png")), "lists an image twice"),
        (
            broken(
                lambda d: d["images"].append(
                    {"id": 9, "file_name": "9.gif", "height": 1, "width": 1}
                )
            ),
            "9.gif; name the",
        ),
        (
            broken(lambda d: d["categories"][1].pop("name")),
            "categories[1]: object missing required field name",
        ),
        (
            broken(lambda d: d["categories"].append({"id": "x", "name": "y"})),
            "some ids of its categories are numbers",
        ),
        (broken(lambda d: d["categories"][1].update(id=7)), "ids and names that all differ"),
        (broken(lambda d: d["categories"][1].update(name="cat")), "ids and names that all differ"),
        (
            broken(lambda d: d["categories"][1].update(name="cow")),
            "differ (first (3, 'cow') and (3, 'dog'))",
        ),
        (
            broken(lambda d: d["categories"].append({"id": 1, "name": "pig"})),
            "differ (first (1, 'pig')",
        ),
        (broken(lambda d: d.update(annotations=[])), "no object with a mask"),
        (
            broken(lambda d: [a.update(iscrowd=1) for a in d["annotations"]]),
            "no object with a mask",
        ),
        (broken(lambda d: d.update(images=[], annotations=[])), "no object with a mask"),
        (None, "--train-json"),
    ],
    ids=lambda x: "" if not isinstance(x, str) else x[:30],
)
def test_a_wrong_file_is_one_sentence(train, said, tmp_path):
    root = write(tmp_path / "own", content(4), content(2, first=100))
    if train is None:
        (root / "annotations" / "train.json").unlink()
    else:
        if isinstance(train, dict):
            train = json.dumps(train)
        (root / "annotations" / "train.json").write_text(train)
    with pytest.raises(UserError) as error:
        instances.find("coco", root)
    assert (
        said in str(error.value) and str(root) in str(error.value) and "\n" not in str(error.value)
    )


def test_wrong_roots_and_flags(own, street, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (("coco", tmp_path / "nowhere"), "there is no folder"),
        (("coco", tmp_path / "file"), "there is no folder"),
        (("coco", own, "nope.json"), "--train-json nope.json"),
        (("coco", own, "", "nope.json"), "--val-json nope.json"),
        (("coco", own, "", "", "nope"), "--images nope"),
        (("coco", own, "", "", "", "tune"), "annotations/tune.json"),
        (("lvis", own), "annotations/lvis_train.json"),
        (("cityscapes", own), "leftImg8bit/train"),
        (("cityscapes", street.root, "", "", "", "nope"), "leftImg8bit/nope"),
    ):
        with pytest.raises(UserError, match="data are missing") as error:
            instances.find(*arguments)
        assert said in str(error.value) and str(arguments[1]) in str(error.value)


def test_a_cityscapes_label_is_missing_broken_or_of_another_kind(street, tmp_path):
    root = tmp_path / "street"
    shutil.copytree(street.root, root)
    data = instances.find("cityscapes", root)
    data.train[0].label.unlink()  # it may be without one, as long as nobody asks
    assert (
        len(choose(instances.find("cityscapes", root), "random:3", 0, "", "all", True).labeled) == 3
    )
    with pytest.raises(UserError, match="instanceIds.png is missing"):
        choose(data, "all", 0, "", "all", True)
    Image.new("RGB", (256, 128)).save(data.train[0].label)
    with pytest.raises(RankError, match="is no map of instance ids"):
        choose(data, "all", 0, "", "all", True)
    data.train[0].label.write_bytes(b"x" * 50)
    with pytest.raises(RankError, match="cannot be read"):
        masks_of(data.train[0], data)
    data.val[0].label.unlink()
    with pytest.raises(UserError, match="is missing"):
        instances.find("cityscapes", root)


def test_malformed_polygons_are_left_out_and_counted(own):
    train = content(4)
    train["annotations"][0]["segmentation"] = SQUARE + [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]
    train["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    train["annotations"][2]["segmentation"] = [1, 1, 5, 1, 5, 5]
    (own / "annotations" / "train.json").write_text(json.dumps(train))
    with pytest.warns(UserWarning, match="1 annotations of .*train.json have no polygon"):
        data = instances.find("coco", own)
    assert [len(p.things) for p in data.train] == [1, 1, 1] and [p.id for p in data.extra] == [1]
    assert masks_of(data.train[1], data)[1].sum() > 0, "a flat list is a polygon"
    assert (
        len(data.train[0].things[0].segmentation) == 1
        and masks_of(data.train[0], data)[1].sum() == 48
    )


# ----------------------------------------------------------------------------------------- geometry
WINDOWS = [
    Window(False, (16, 20), 0, 0, (16, 20)),
    Window(True, (16, 20), 0, 0, (16, 20)),
    Window(False, (48, 60), 10, 13, (20, 30)),
    Window(True, (48, 60), 10, 13, (20, 30)),
    Window(False, (8, 10), -3, -4, (24, 24)),
    Window(True, (37, 23), 5, -6, (40, 40)),
    Window(False, (16, 20), 30, 0, (8, 8)),
    Window(False, (16, 20), 0, -9, (8, 8)),
    Window(True, (16, 20), -30, 40, (8, 8)),
    Window(False, (24, 30), 4, 6, (1, 1)),
]


def through_transforms(mask: torch.Tensor, window: Window) -> torch.Tensor:
    """(16, 20) -> (h, w)."""
    image, label = transforms.resize(
        torch.zeros(3, 16, 20), mask.flip(-1) if window.flip else mask, window.size
    )
    return transforms.crop(image, label, window.top, window.left, *window.out, pad_label=0)[1]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_masks_move_as_a_picture_does(window, own, tmp_path):
    """Run lengths and instanceIds: exactly as a label through the transforms of common/."""
    data, g = instances.find("coco", own), np.random.default_rng(0)
    mask = torch.from_numpy((g.random((16, 20)) < 0.5).astype(np.uint8))
    runs = coco_mask.encode(np.asfortranarray(mask.numpy()))
    ids = np.where(mask.numpy() == 1, 26003, 7).astype(np.uint16)
    Image.fromarray(ids).save(tmp_path / "ids.png")
    truth = through_transforms(mask, window)
    photo = data.train[0]._replace(things=(Thing(0, runs, False, 0.0),))
    assert torch.equal(masks_of(photo, data, window)[1][0], truth)
    photo = Photo("ids", tmp_path / "ids.png", label=tmp_path / "ids.png")
    labels, masks, _ = masks_of(photo, data, window)
    if window.out != (1, 1):  # `data` has two classes, the label has cars
        assert labels.tolist() == [2] and torch.equal(masks[0], truth)


@pytest.mark.parametrize("window", WINDOWS[:6], ids=str)
def test_polygons_are_drawn_on_the_window(window, own):
    """Two rectangles along pixels' edges: exact at whole scales, wherever the window lies."""
    data = instances.find("coco", own)
    polygons = [np.array(SQUARE[0], float), np.array([12.0, 8, 18, 8, 18, 14, 12, 14])]
    photo = data.train[0]._replace(things=(Thing(0, polygons, False, 0.0),))
    big = torch.zeros(16, 20, dtype=torch.uint8)
    big[2:8, 2:10] = 1
    big[8:14, 12:18] = 1
    truth = through_transforms(big, window)
    found = masks_of(photo, data, window)[1][0]
    if window.size[0] % 8 == 0:
        assert torch.equal(found, truth) and found.any()
    else:
        assert (found != truth).sum() <= 0.15 * truth.sum() and found.any()


@real
def test_polygons_on_a_window_have_the_area_of_rasterised_and_sliced_ones(mini):
    """Recipe 4.1: 0.1 % of the area on average, so shapely is not needed."""
    g, ratios = np.random.default_rng(0), []
    for photo in mini.train[::6]:
        size = (int(1.5 * photo.height), int(1.5 * photo.width))
        top, left = (int(g.integers(0, n // 2)) for n in size)
        window = Window(bool(g.random() < 0.5), size, top, left, (size[0] // 2, size[1] // 2))
        cut = masks_of(photo, mini, window)[1]
        whole = masks_of(photo, mini, Window(window.flip, size, 0, 0, size))[1]
        truth = whole[:, top : top + window.out[0], left : left + window.out[1]]
        areas, other = cut.flatten(1).sum(1), truth.flatten(1).sum(1)
        ratios += [(int(a), int(b)) for a, b in zip(areas, other, strict=True) if b >= 500]
        assert cut.shape == truth.shape
    ratios = np.array(ratios, float)
    assert len(ratios) > 100 and np.abs(ratios[:, 0] / ratios[:, 1] - 1).mean() < 0.002


def test_masks_that_leave_the_window_are_kept_empty(own):
    data = instances.find("coco", own)
    labels, masks, _ = masks_of(data.train[0], data, Window(False, (16, 20), 12, 12, (4, 8)))
    assert labels.tolist() == [1] and masks.shape == (1, 4, 8) and not masks.any()


def drawn_whole(thing: Thing, whole: tuple[int, int], window: Window) -> np.ndarray:
    """The plain way: everything is drawn, or looked up, on the whole of the window."""
    if isinstance(thing.segmentation, list):
        moved = [objects.polygon_in_window(p, whole, window) for p in thing.segmentation]
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, *window.out)))
    return objects.nearest_in_window(coco_mask.decode(thing.segmentation), window)


def some_polygons(g: np.random.Generator, kind: int) -> list[np.ndarray]:
    """One to three polygons in and around a picture of 40 pixels, small ones, or at fractions of
    a pixel that drawing rounds."""
    polygons = []
    for _ in range(g.integers(1, 4)):
        points = g.uniform(-30, 70, 2 * int(g.integers(3, 9)))
        if kind == 1:
            points = points / 10 + g.uniform(-5, 45)
        elif kind > 1:
            points = np.round(points * kind) / kind
        polygons.append(points)
    return polygons


def test_drawing_only_what_a_window_shows_gives_the_masks_of_drawing_all(own):
    data, g, seen = instances.find("coco", own), np.random.default_rng(0), 0
    for turn in range(300):
        whole = tuple(int(n) for n in g.integers(1, 40, 2))
        runs = (g.random(whole) < g.choice([0, 0.02, 0.5, 1])).astype(np.uint8)
        things = [Thing(0, some_polygons(g, kind), False, 0.0) for kind in (0, 1, 2, 10)]
        things.append(Thing(1, coco_mask.encode(np.asfortranarray(runs)), False, 0.0))
        size = tuple(max(int(n * g.uniform(0.2, 4)), 1) for n in whole) if turn % 3 else whole
        top, left = (int(g.integers(-20, n + 5)) if turn % 4 else 0 for n in size)
        out = tuple(int(n) for n in g.integers(1, 50, 2))
        window = Window(bool(turn % 2), size, top, left, out)
        truth = np.stack([drawn_whole(thing, whole, window) for thing in things])
        photo = data.train[0]._replace(height=whole[0], width=whole[1], things=tuple(things))
        assert np.array_equal(masks_of(photo, data, window).masks.numpy(), truth), window
        shown = truth.any((1, 2))
        found = masks_of(photo, data, window, empty=False)
        assert np.array_equal(found.masks.numpy(), truth[shown])
        assert found.labels.tolist() == np.array([0, 0, 0, 0, 1])[shown].tolist()
        seen += shown.sum() * (not shown.all())
    assert seen > 300


@real
def test_drawing_only_what_a_window_shows_gives_the_same_masks_of_photographs(mini):
    g = np.random.default_rng(0)
    for photo in mini.train[::10]:
        whole = (photo.height, photo.width)
        size = tuple(int(n * g.uniform(0.3, 2)) for n in whole)
        top, left = (int(g.integers(-30, n // 2)) for n in size)
        for window in (
            Window(False, whole, 0, 0, whole),
            Window(True, size, top, left, (256, 200)),
        ):
            masks = masks_of(photo, mini, window, crowds=True).masks.numpy()
            for mask, thing in zip(masks, photo.things, strict=True):
                assert np.array_equal(mask, drawn_whole(thing, whole, window))


def test_what_lies_outside_of_the_picture_is_filled():
    """The plain way: the resized picture is padded on all sides, and then cut."""
    image, g = torch.arange(3 * 8 * 10, dtype=torch.uint8).view(3, 8, 10), np.random.default_rng(0)
    for _ in range(50):
        top, left = (int(n) for n in g.integers(-30, 30, 2))
        out = tuple(int(n) for n in g.integers(1, 30, 2))
        resized = F.interpolate(image[None], size=(12, 14), mode="bilinear", antialias=True)[0]
        padded = F.pad(resized, (60, 60, 60, 60), value=77)
        truth = padded[:, 60 + top : 60 + top + out[0], 60 + left : 60 + left + out[1]]
        assert torch.equal(
            objects.cut_out(image, Window(False, (12, 14), top, left, out), 77), truth
        )


# ------------------------------------------------------------------------------------------- splits
def synthetic(n: int, root: Path, name: str = "coco") -> Instances:
    things, image = [(Thing(c, [], False, 1.0),) for c in range(3)], Path("x.jpg")
    photos = [Photo(f"{i:012d}.jpg", image, i, 4, 4, things[i % 3]) for i in range(5, n + 5)]
    return Instances(
        name,
        root,
        ["a", "b", "c"],
        [1, 2, 3],
        photos,
        photos[:2],
        [Photo("x.jpg", image)],
        train_json=Path("train.json"),
    )


@published
def test_unbiased_teachers_lists_are_places_among_the_images_with_objects(tmp_path):
    folder = tmp_path / "splits" / "unbiased_teacher"
    folder.mkdir(parents=True)
    shutil.copy(LISTS / "unbiased_teacher" / "dataseed" / "COCO_supervision.txt", folder)
    text = (folder / "COCO_supervision.txt").read_bytes()
    assert (
        hashlib.sha256(text).hexdigest()
        == splits.PUBLISHED["coco", "unbiased_teacher", "COCO_supervision"].sha256
    )
    table, data = json.loads(text), synthetic(117266, tmp_path)
    counts = {
        "0.01%": 11,
        "0.1%": 117,
        "0.5%": 586,
        "1%": 1172,
        "2%": 2345,
        "5%": 5863,
        "10%": 11726,
    }
    for split, number in counts.items():
        chosen = choose(data, split, 1, "", "all", True)
        assert len(chosen.labeled) == number and f"unbiased_teacher/{split}, draw 1" in chosen.text
        places = table[str(float(split[:-1]))]["1"]
        # ids are no places
        assert [p.id for p in chosen.labeled] == [place + 5 for place in places]
    assert choose(data, "1%", 0, "", "all", True).labeled[0].id == table["1.0"]["0"][0] + 5
    assert (
        choose(data, "1%", 0, "", "all", True).fingerprint
        != choose(data, "1%", 1, "", "all", True).fingerprint
    )
    assert len(choose(data, "random:1%", 0, "", "all", True).labeled) == 1172
    for split, seed, said in (
        ("3%", 1, "There is no split '3%'"),
        ("5%", 10, "for --split-seed 10; give one of 0, 1, 2"),
        ("183", 1, "there: 0.01%, 0.1%, 0.5%, 1%, 2%, 5%, 10%;"),
    ):
        with pytest.raises(UserError, match=said):
            choose(data, split, seed, "", "all", True)
    data.train.pop()
    with pytest.raises(
        UserError,
        match="of the 117266 images of train2017 .* has 117265; draw one with --split ran",
    ):
        choose(data, "5%", 1, "", "all", True)
    (folder / "COCO_supervision.txt").write_text("[1")
    with pytest.raises(UserError, match="COCO_supervision.txt: expected object, got array"):
        choose(data, "5%", 1, "", "all", True)


def test_published_lists_that_were_not_fetched(tmp_path):
    data = synthetic(40, tmp_path)
    assert len(choose(data, "10%", 0, "", "all", True).labeled) == 4, (
        "own COCO files have no published lists"
    )
    for name in ("cityscapes", "coco"):
        data = synthetic(40 if name == "cityscapes" else 117266, tmp_path, name)
        with pytest.raises(
            UserError, match="There is no split '5%'.*there: none; published: .*5%, 10%"
        ) as error:
            choose(data, "5%", 1, "", "all", True)
        assert f"python -m data.download splits --dataset {name}" in str(error.value)


@published
@pytest.mark.parametrize("split, number", [("5%", 144), ("10%", 296), ("20%", 592), ("30%", 888)])
def test_guided_distillations_lists(split, number, tmp_path):
    """Labeled are the images of the list as data/download.py puts it, unlabeled all of the training
    set."""
    source = LISTS / "guided_distillation" / "data_splits" / "cityscapes"
    item = splits.PUBLISHED["cityscapes", "guided_distillation", split]
    folder = tmp_path / "splits" / "guided_distillation" / splits.folder_name(split)
    folder.mkdir(parents=True)
    shutil.copy(source / f"perc_{split[:-1]}.txt", folder / "labeled.txt")
    assert hashlib.sha256((folder / "labeled.txt").read_bytes()).hexdigest() == item.sha256
    names = sorted(
        {
            splits.short_id(e, "cityscapes")
            for p in source.glob("*.txt")
            for e, _ in splits.read_list(p)
        }
    )
    photos = [
        Photo(n, Path(n), i, 9, 9, (Thing(2, 26001, False, 9.0),) if i % 50 else ())
        for i, n in enumerate(names)
    ]
    data = Instances(
        "cityscapes",
        tmp_path,
        list(CITYSCAPES_THINGS.values()),
        list(CITYSCAPES_THINGS),
        photos,
        [],
        [Photo("more", Path("more"))],
    )
    chosen = choose(data, split, 0, "", "all", True)
    listed = {splits.short_id(e, "cityscapes") for e, _ in splits.read_list(folder / "labeled.txt")}
    empty = {p.name for p in photos if not p.things} & listed
    assert chosen.fingerprint == item.ids_sha256 and len(listed) == number
    assert {p.name for p in chosen.labeled} == listed - empty and len(chosen.unlabeled) == len(
        names
    )
    assert f"known as cityscapes guided_distillation {split}" in chosen.text
    assert (f"{len(empty)} listed ones without an object are left out" in chosen.text) == bool(
        empty
    )
    assert len(choose(data, "all", 0, "", "all", True).unlabeled) == len(names) + 1, (
        "train_extra, with all labels only"
    )
    with pytest.raises(UserError, match=f"no split '7%' .*there: {splits.folder_name(split)};"):
        choose(data, "7%", 0, "", "all", True)


def test_a_draw_is_seeded_nested_and_covers_the_classes(drawn):
    draws = {
        (n, seed): [p.name for p in choose(drawn, n, seed, "", "all", True).labeled]
        for n in ("24", "random:10%", "1/8")
        for seed in (0, 1)
    }
    for seed in (0, 1):
        assert draws["24", seed] == draws["random:10%", seed][:24] == draws["1/8", seed][:24]
        held = {
            t.category
            for p in drawn.train
            if p.name in draws["24", seed]
            for t in p.things
            if not t.crowd
        }
        assert held == set(range(24)) and len(draws["1/8", seed]) == 50
    assert set(draws["24", 0]) != set(draws["24", 1])
    chosen = choose(drawn, "24", 0, "", "all", True)
    assert chosen.text.startswith(
        "24 labeled images (24 drawn with --split-seed 0, fingerprint "
        f"{chosen.fingerprint[:12]}) and 400 unlabeled ones"
    )
    for split in ("0", "401", "120%", "x", "random:x"):
        with pytest.raises(UserError, match=f"--split {split}: "):
            choose(drawn, split, 0, "", "all", True)


def holding(*classes: list[int]) -> list[Photo]:
    """Pictures with objects of these classes; a negative number stands for a crowd."""
    return [
        Photo(
            f"{i:03d}.jpg",
            Path(f"{i:03d}.jpg"),
            i,
            4,
            4,
            tuple(Thing(abs(c), [], c < 0, 1.0) for c in mine),
        )
        for i, mine in enumerate(classes)
    ]


def test_unlabeled_pools_carry_no_labels(drawn, street):
    every = choose(drawn, "40", 0, "", "all", True)
    rest = choose(drawn, "40", 0, "", "remaining", True)
    labeled = {p.name for p in every.labeled}
    assert [p.name for p in every.unlabeled] == [
        p.name for p in drawn.train
    ] and every.fingerprint == rest.fingerprint
    assert {p.name for p in rest.unlabeled} == {p.name for p in drawn.train} - labeled and len(
        rest.unlabeled
    ) == 360
    for data, split in ((drawn, "40"), (street, "random:4")):
        for pool in ("all", "remaining"):
            chosen = choose(data, split, 0, "", pool, True)
            assert all(p.things is None and p.label is None for p in chosen.unlabeled)
            assert all(p.things for p in chosen.labeled)
            with pytest.raises(AssertionError, match="no labels"):
                masks_of(chosen.unlabeled[0], data)
    assert all(
        p.height == 128 and p.width == 256
        for p in choose(street, "random:4", 0, "", "all", True).labeled
    )
    assert not choose(drawn, "all", 0, "", "remaining", False).unlabeled
    with pytest.raises(UserError, match="--split all leaves no unlabeled image"):
        choose(drawn, "all", 0, "", "remaining", True)


@pytest.mark.parametrize(
    "text", ["1.png\n3.png\n", "1\n3\n", "somewhere/1.jpg\nsomewhere/3.jpg\n", "json", "ids"]
)
def test_lists_of_labeled_images(text, own, tmp_path):
    """File names, stems, paths, a COCO file of the labeled images, and image ids, where no name
    fits."""
    data, path = (
        instances.find("coco", own),
        tmp_path / ("list.json" if text == "json" else "list.txt"),
    )
    if text == "json":  # Guided Distillation's instances_train2017_5.json
        part = content(4)
        part["images"] = part["images"][1::2]
        text = json.dumps(part)
    elif text == "ids":
        data.train = [p._replace(name=f"{'abcd'[p.id]}.png") for p in data.train]
        text = "1\n3\n"
    path.write_text(text)
    chosen = choose(data, str(path), 0, "", "remaining", True)
    assert [p.id for p in chosen.labeled] == [1, 3] and [p.id for p in chosen.unlabeled] == [0, 2]
    assert f"2 labeled images (the list {path}, fingerprint" in chosen.text


def test_wrong_lists(own, tmp_path):
    data = instances.find("coco", own)
    for name, text, said in (
        ("a.txt", "1.png\nnope.png\n", "1 of 2 images listed in .*a.txt .* for example nope.png"),
        ("b.txt", "", "is empty"),
        ("c.txt", "1.png\n1.png\n", "twice"),
        ("d.json", "{", "cannot be read as JSON"),
        ("e.txt", "1 2 3", "expected an id"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=said):
            choose(data, str(tmp_path / name), 0, "", "all", True)
    data.train[1:3] = [p._replace(name=f"{p.id}/same.png") for p in data.train[1:3]]
    (tmp_path / "f.txt").write_text("0\nsame\n")
    with pytest.raises(UserError, match="1 of 2 images .* for example same;"):
        choose(data, str(tmp_path / "f.txt"), 0, "", "all", True)
    with pytest.raises(UserError, match="neither a folder nor a list file"):
        choose(data, "2", 0, str(tmp_path / "nowhere"), "all", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in that folder"):
        choose(data, "2", 0, str(tmp_path / "empty"), "all", True)


def test_unlabeled_from_a_folder_or_a_list(own, tmp_path):
    data = instances.find("coco", own)
    for path in (tmp_path / "more" / "a.png", tmp_path / "more" / "city" / "b.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(path)
    chosen = choose(data, "2", 0, str(tmp_path / "more"), "all", True)
    assert [p.name for p in chosen.unlabeled] == ["a.png", "city/b.png"] and chosen.unlabeled[
        0
    ].things is None
    (tmp_path / "list.txt").write_text("2.png\nmore/city/b.png\n")
    chosen = choose(data, "2", 0, str(tmp_path / "list.txt"), "all", True)
    assert [p.image for p in chosen.unlabeled] == [
        own / "images" / "2.png",
        tmp_path / "more" / "city" / "b.png",
    ]
    assert all(p.things is None for p in chosen.unlabeled)


# ------------------------------------------------------------------------------------------- orders


FACTORS = np.array([1.0, 1.5, 3.25, 1.0, 2.0])


@pytest.mark.parametrize("factors", [None, FACTORS], ids=["uniform", "repeated"])
def test_the_order_depends_neither_on_restarts_nor_on_processes(factors):
    def keys(start: int, stop: int, world: World = World()) -> list:  # noqa: B008 (frozen)
        return list(loading.Stream(5, 4, 3, "labeled", start, stop, world, factors))

    whole = keys(0, 40)
    assert [k for k in whole] == keys(0, 17) + keys(17, 40)
    parts = [keys(0, 40, World(rank, 2)) for rank in range(2)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)] and keys(31, 40, World(1, 4)) == [
        k[1:2] for k in whole[31:]
    ]
    assert [[k[1:] for k in batch] for batch in whole] == [
        [(s, i) for i in range(4)] for s in range(40)
    ]
    if factors is None:
        assert whole == list(loading.Stream(5, 4, 3, "labeled", 0, 40, World()))
    assert whole != list(loading.Stream(5, 4, 4, "labeled", 0, 40, World(), factors))
    assert whole != list(loading.Stream(5, 4, 3, "unlabeled", 0, 40, World(), factors))


def test_a_pass_repeats_each_picture_by_its_factor():
    """Every pass holds picture i floor(r) or floor(r) + 1 times, in an order of its own, and r
    times on average."""
    passes, found = loading.Stream(5, 1, 0, "x", 0, 1, World(), FACTORS).passes(0), []
    begin, orders = 0, []
    for _ in range(600):
        place, order = next(passes)
        assert place == begin
        begin += len(order)
        found.append(np.bincount(order, minlength=5))
        orders.append(order.tolist())
    found = np.array(found)
    assert ((found == np.floor(FACTORS)) | (found == np.floor(FACTORS) + 1)).all()
    assert (found[:, [0, 3, 4]] == [1, 1, 2]).all() and np.abs(found.mean(0) - FACTORS).max() < 0.07
    assert len({tuple(order) for order in orders}) > 500 and sum(o == sorted(o) for o in orders) < 6
    keys = loading.Stream(5, 8, 0, "x", 0, 300, World(), FACTORS)
    assert [k[0] for batch in keys for k in batch] == list(chain(*orders))[:2400]


def test_views_pass_over_broken_images_and_say_so(own):
    data = instances.find("coco", own)
    (own / "images" / "1.png").write_bytes(b"no picture")
    seen = []

    def augment(image, photo, g):
        seen.append((tuple(image.shape), image.dtype, photo.id))
        return photo.id, float(g.random())

    views = instances.Views(data.train, augment, 5, "labeled")
    with pytest.warns(UserWarning, match="1.png cannot be read .*; training goes on without it"):
        sample, skipped = views[1, 7, 3]
    assert skipped == 1 and sample == (2, float(distributed.rng(5, "labeled", 7, 3).random()))
    assert views[0, 7, 3] == ((0, sample[1]), 0) and seen[0] == ((3, 16, 20), torch.uint8, 2)
    Image.new("RGB", (16, 20)).save(own / "images" / "0.png")
    with pytest.raises(RankError, match="0.png has 16x20 pixels but its annotations are for 20x16"):
        views[0, 0, 0]
    assert instances.Views([objects.bare(data.train[0])], augment, 5, "unlabeled")[0, 0, 0][1] == 0
    for i in range(4):
        (own / "images" / f"{i}.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning),
        pytest.raises(RankError, match="None of the 4 labeled images can be read"),
    ):
        views[0, 0, 0]


def test_batches_and_scored_pictures(own):
    data = instances.find("coco", own)
    views = instances.Views(
        data.train, lambda image, photo, g: (photo.id, g.integers(1000)), 0, "labeled"
    )
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches = list(loading.stream(views, 2, 0, 6, World(), 0, collate=list))
    assert torch.equal(torch.rand(3), expected), "torch's own generator was used"
    assert len(batches) == 6 and all(len(b) == 2 and b[0][1] == 0 for b in batches)
    assert batches[3:] == list(loading.stream(views, 2, 3, 6, World(), 2, collate=list)), (
        "restart, in two helper processes"
    )
    assert list(loading.stream(views, 2, 6, 6, World(), 0, collate=list)) == []
    ids = loading.stream(
        views, 2, 0, 6, World(), 0, np.full(4, 2.0), collate=lambda batch: [x[0] for x, _ in batch]
    )
    ids = list(chain(*ids))
    assert len(ids) == 12 and sorted(ids[:8]) == [0, 0, 1, 1, 2, 2, 3, 3]
    for size in (1, 2, 3):
        loaders = (instances.score_loader(data.train, World(rank, size), 0) for rank in range(size))
        found = [(i, x.shape) for i, x in chain(*loaders)]
        assert sorted(i for i, _ in found) == [0, 1, 2, 3] and found[0][1] == (3, 16, 20)
    assert [i for i, _ in instances.score_loader(data.train, World(1, 2), 1)] == [1, 3]
    torch.manual_seed(0)
    assert len(list(instances.score_loader(data.train, World(), 0))) == 4 and torch.equal(
        torch.rand(3), expected
    )
    (own / "images" / "2.png").write_bytes(b"")
    with pytest.raises(BrokenImage, match="2.png cannot be read"):
        list(instances.score_loader(data.train, World(), 0))


def test_large_files_are_held_small(tmp_path):
    """Polygons become arrays, what a run does not need is gone, and folders are listed, not asked
    file by file."""
    data = content(300)
    for a in data["annotations"]:
        a |= {
            "segmentation": [np.linspace(0, 15, 200).tolist()],
            "bbox": [0, 0, 1, 1],
            "note": "x" * 1000,
        }
    root, asked = write(tmp_path / "own", data, content(2, first=1000)), []
    listing = os.listdir

    def counted(folder):
        asked.append(str(folder))
        return listing(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", counted)
        found = instances.find("coco", root)
    assert len(asked) <= 4
    thing = found.train[0].things[0]
    assert isinstance(thing, Thing) and thing.segmentation[0].nbytes == 1600 and len(thing) == 5
