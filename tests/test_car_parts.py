"""data/car_parts.py: a checkout of Car-Parts-Segmentation becomes COCO files in small."""

import json
from pathlib import Path

import pytest
from PIL import Image

from common import coco
from data import car_parts

SQUARE = [[8.0, 16.0, 40.0, 16.0, 40.0, 48.0, 8.0, 48.0]]
CLASSES = ["back_left_door", "back_right_door", "wheel", "left_mirror", "never_seen"]


@pytest.fixture
def source(tmp_path) -> Path:
    """21 training pictures of 64x64 and one of 128x96 in the test set, two objects in each."""
    for part, count, size in (("trainingset", 21, (64, 64)), ("testset", 1, (128, 96))):
        folder = tmp_path / part / "JPEGImages"
        folder.mkdir(parents=True)
        pictures, annotations = [], []
        for number in range(count):
            Image.new("RGB", size, (number, 0, 0)).save(folder / f"{part}{number:02}.jpg")
            pictures.append(
                {
                    "id": number,
                    "file_name": f"{part}{number:02}.jpg",
                    "width": size[0],
                    "height": size[1],
                }
            )
            for category in (number % 3, 3):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category,
                        "segmentation": SQUARE,
                        "area": 1024,
                        "bbox": [8, 16, 32, 32],
                    }
                )
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
        file = {"images": pictures, "annotations": annotations, "categories": categories}
        (tmp_path / part / "annotations.json").write_text(json.dumps(file))
    return tmp_path


def test_parts_classes_and_sizes(source, tmp_path):
    out = tmp_path / "out"
    assert car_parts.convert(source, out, 32) == {"train": 18, "tune": 3, "test": 1}
    names = {}
    for part in ("train", "tune", "test"):
        content = coco.read_content(out / "annotations" / f"{part}.json")
        assert list(content.classes.values()) == ["back_door", "mirror", "wheel"]
        names[part] = {picture.name() for picture in content.pictures}
        for picture in content.pictures:
            with Image.open(out / "images" / picture.name()) as image:
                assert image.size == (picture.width, picture.height)
    assert names["tune"] == {f"trainingset{number:02}.png" for number in (0, 10, 20)}
    assert not names["train"] & names["tune"]


def test_objects_shrink_with_their_picture(source, tmp_path):
    out = tmp_path / "out"
    car_parts.convert(source, out, 32)
    content = coco.read_content(out / "annotations" / "test.json")  # 128x96 became 32x24
    thing = content.things[content.pictures[0].id][0]
    file = json.loads((out / "annotations" / "test.json").read_text())
    annotation = file["annotations"][0]
    assert annotation["segmentation"] == [[2.0, 4.0, 10.0, 4.0, 10.0, 12.0, 2.0, 12.0]]
    assert annotation["bbox"] == [2, 4, 8, 8] and annotation["area"] == 64
    assert thing.category == 0


def test_a_converted_set_is_a_source_too(source, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    car_parts.convert(source, first, 64)
    (first / "annotations" / "test.json").rename(first / "annotations" / "val.json")
    assert car_parts.convert(first, second, 32) == {"train": 16, "tune": 2, "test": 1}
    content = coco.read_content(second / "annotations" / "test.json")
    assert (content.pictures[0].width, content.pictures[0].height) == (32, 24)


def test_what_is_no_such_set_is_refused(tmp_path, capsys):
    assert car_parts.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "neither trainingset/annotations.json nor annotations/train.json" in said
    assert len(said.splitlines()) == 1
