"""data/convert.py on files as other programs write them: the scripts read what was drawn."""

import base64
import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from common import instances, objects, semantic
from data import convert
from data.annotations import READERS

W, H = 40, 30
RING = np.zeros((H, W), bool)
RING[4:14, 5:17] = True
RING[7:10, 9:13] = False
FOUR = [[2, 2, 6, 2, 6, 6, 2, 6], [10, 2, 14, 2, 14, 6, 10, 6]]
FOUR += [[2, 10, 6, 10, 6, 14, 2, 14], [10, 10, 14, 10, 14, 14, 10, 14]]


# --------------------------------------------------------------------------- helpers
def picture(path: Path, size: tuple[int, int] = (W, H), orientation: int = 0) -> Path:
    """A picture whose pixels all differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.arange(size[0] * size[1] * 3).reshape(size[1], size[0], 3) % 251
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(values.astype(np.uint8)).save(path, exif=exif)
    return path


def rectangle(x: float, y: float, right: float, bottom: float) -> np.ndarray:
    """The pixels whose centres lie in a rectangle."""
    rows, columns = np.mgrid[:H, :W] + 0.5
    return (rows > y) & (rows < bottom) & (columns > x) & (columns < right)


def drawn(polygons: list[list[float]]) -> np.ndarray:
    whole = coco_mask.merge(coco_mask.frPyObjects(polygons, H, W))
    return coco_mask.decode(whole).astype(bool)


def png_text(mask: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Converted:
    """The set that a command wrote, as the instance scripts read it."""

    def __init__(self, root: Path, said: str):
        self.root, self.said = root, said
        self.data = instances.find("coco", root)
        self.photos = {p.name: p for p in self.data.train + self.data.val + self.data.extra}

    def objects(self, name: str) -> list[tuple[str, np.ndarray]]:
        """Class and mask of each object, also of crowds."""
        labels, masks, crowds = objects.masks_of(self.photos[name], self.data, crowds=True)
        assert not crowds.any()
        names = [self.data.classes[index] for index in labels.tolist()]
        return list(zip(names, masks.numpy().astype(bool), strict=True))


@pytest.fixture
def run(tmp_path, capsys):
    """Convert with these arguments into a new folder -> the set."""

    def converted(form: str, source: Path, *flags: str) -> Converted:
        root = tmp_path / "out"
        shutil.rmtree(root, ignore_errors=True)
        capsys.readouterr()
        code = convert.main([form, str(source), "--out", str(root), *flags])
        said = capsys.readouterr()
        assert code == 0, said.err
        return Converted(root, said.out)

    return converted


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert what cannot be converted -> the sentence, one line; nothing is left behind."""

    def sentence(form: str, source: Path, *flags: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = convert.main([form, str(source), "--out", str(tmp_path / "out"), *flags])
        said = capsys.readouterr().err
        assert code == 2 and said.startswith("error: ") and "Traceback" not in said
        assert [p for p in sorted(tmp_path.rglob("*")) if p not in before] in (
            [],
            [tmp_path / "out"],
        )
        return said

    return sentence


def same(found: list[tuple[str, np.ndarray]], expected: list[tuple[str, np.ndarray]]) -> bool:
    labels_agree = [label for label, _ in found] == [label for label, _ in expected]
    masks = zip(found, expected, strict=True)
    return labels_agree and all(np.array_equal(a, b) for (_, a), (_, b) in masks)


# --------------------------------------------------------------------------- yolo
def yolo(
    root: Path, lines: str, names: str = "names: [cat, dog]", val: str = "1 0.5 0.5 1 1"
) -> Path:
    """A data.yaml with a picture a.jpg to train on and b.jpg to score on."""
    for part, name, text in (("train", "a", lines), ("val", "b", val)):
        picture(root / "images" / part / f"{name}.jpg")
        (root / "labels" / part).mkdir(parents=True, exist_ok=True)
        (root / "labels" / part / f"{name}.txt").write_text(text)
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\n{names}\n")
    return root / "data.yaml"


def shares(polygon: list[float]) -> str:
    return " ".join(f"{v / (H if i % 2 else W):.6f}" for i, v in enumerate(polygon))


def test_yolo_boxes_and_polygons_are_the_pixels_they_cover(run, tmp_path):
    triangle = [3.25, 4, 20.5, 4, 3.25, 21]
    lines = f"0 {shares(triangle)}\n\n1 0.5 0.5 0.25 0.2\n"
    made = run("yolo", yolo(tmp_path / "in", lines))
    cat, dog = made.objects("a.jpg")
    assert same([cat], [("cat", drawn([triangle]))])
    assert same([dog], [("dog", rectangle(15, 12, 25, 18))])
    assert [p.name for p in made.data.train] == ["a.jpg"]
    assert [p.name for p in made.data.val] == ["b.jpg"]
    assert "2 objects have only a box" in made.said


def test_class_ids_with_gaps_keep_their_names_and_numbers(run, tmp_path):
    names = "names:\n  90: bird\n  3: cat\n  7: dog\n"
    lines = "90 0.5 0.5 0.5 0.5\n3 0.2 0.2 0.1 0.1"
    made = run("yolo", yolo(tmp_path / "in", lines, names, val="7 0.5 0.5 1 1"))
    assert made.data.ids == [3, 7, 90] and made.data.classes == ["cat", "dog", "bird"]
    assert [label for label, _ in made.objects("a.jpg")] == ["bird", "cat"]
    assert [label for label, _ in made.objects("b.jpg")] == ["dog"]


@pytest.mark.parametrize("shift", [0.0, 0.4, 0.6])
def test_a_square_covers_the_pixels_whose_centres_it_holds(run, tmp_path, shift):
    left, right = 2 + shift, 7 + shift
    square = [left, left, right, left, right, right, left, right]
    made = run("yolo", yolo(tmp_path / "in", f"0 {shares(square)}"))
    ((_, mask),) = made.objects("a.jpg")
    assert np.array_equal(mask, rectangle(left, left, right, right)) and mask.sum() == 25
    whole = run("yolo", yolo(tmp_path / "in", f"0 {shares([0, 0, W, 0, W, H, 0, H])}"))
    assert whole.objects("a.jpg")[0][1].all()


def test_a_hole_that_yolo_bridges_by_a_seam_stays_a_hole(run, tmp_path):
    outer, inner = [5, 4, 17, 4, 17, 14, 5, 14, 5, 4], [9, 7, 9, 10, 13, 10, 13, 7, 9, 7]
    made = run("yolo", yolo(tmp_path / "in", f"0 {shares(outer + inner + [5, 4])}"))
    assert same(made.objects("a.jpg"), [("cat", RING)])


def test_yolo_without_a_label_file_is_a_picture_without_objects(run, tmp_path):
    source = yolo(tmp_path / "in", "0 0.5 0.5 1 1")
    picture(tmp_path / "in/images/train/none.jpg")
    picture(tmp_path / "in/images/train/empty.jpg")
    (tmp_path / "in/labels/train/empty.txt").write_text("")
    made = run("yolo", source)
    listed = json.loads((made.root / "annotations/instances_train.json").read_text())
    assert [image["file_name"] for image in listed["images"]] == ["a.jpg", "empty.jpg", "none.jpg"]
    assert [thing["image_id"] for thing in listed["annotations"]] == [1]
    assert "1 pictures have no label file" in made.said


@pytest.mark.parametrize(
    "entry", ["images/train", "./images/train", "../images/train", "train.txt"]
)
def test_yolo_finds_pictures_as_data_yaml_names_them(run, tmp_path, entry):
    source = yolo(tmp_path / "in", "0 0.5 0.5 1 1")
    (tmp_path / "in/train.txt").write_text("./images/train/a.jpg\n")
    source.write_text(f"train: {entry}\nvalid: images/val\nnames: {{0: cat, 1: dog}}\n")
    made = run("yolo", tmp_path / "in")
    assert [p.name for p in made.data.train] == ["a.jpg"] and len(made.data.val) == 1


def test_yolo_without_data_yaml_reads_classes_txt_and_draws_what_to_score_on(run, tmp_path):
    for name in "abcdefghij":
        picture(tmp_path / f"in/{name}.jpg")
        (tmp_path / f"in/{name}.txt").write_text("1 0.5 0.5 0.5 0.5 0.9")
    (tmp_path / "in/classes.txt").write_text("cat\ndog\n")
    made = run("yolo", tmp_path / "in", "--val", "0.3")
    assert (len(made.data.train), len(made.data.val)) == (7, 3) and "3 were drawn" in made.said
    assert "1 classes have no outline (first: cat)" in made.said and "a sixth number" in made.said
    again = run("yolo", tmp_path / "in", "--val", "0.3")
    assert [p.name for p in again.data.val] == [p.name for p in made.data.val]


@pytest.mark.parametrize(
    "line, word",
    [
        ("5 0.5 0.5 1 1", "class 5"),
        ("0.5 0.5 0.5 1 1", "class 0.5"),
        ("cat 0.5 0.5 1 1", "no number"),
        ("0 0.5 0.5", "2 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "7 numbers"),
        ("0 12 14 30 20", "far outside"),
        ("0 nan 0.5 1 1", "far outside"),
        ("0 inf 0.5 1 1 0 0", "far outside"),
    ],
)
def test_a_wrong_line_of_yolo_is_named(refused, tmp_path, line, word):
    said = refused("yolo", yolo(tmp_path / "in", f"0 0.5 0.5 1 1\n{line}"))
    assert word in said and "a.txt, line 2" in said


@pytest.mark.parametrize("content", ["[]", "names: 3", "names: {a: b}", "{", "train: x", "\x00"])
def test_a_wrong_data_yaml_is_named(refused, tmp_path, content):
    (tmp_path / "data.yaml").write_text(content)
    assert "data.yaml" in refused("yolo", tmp_path / "data.yaml")


# --------------------------------------------------------------------------- cvat
def cvat(root: Path, shapes: str, labels: str = "cat dog", more: str = "") -> Path:
    """An export with the pictures a.png, with these shapes, and b.png, with a dog."""
    for name in "ab":
        picture(root / f"images/{name}.png")
    named = "".join(f"<label><name>{label}</name></label>" for label in labels.split())
    dog = '<polygon label="dog" points="1,1;9,1;9,9" occluded="0" z_order="0"></polygon>'
    text = (
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task>'
        f"<labels>{named}<label><name>1</name><parent>s1</parent></label></labels></task></meta>"
        f'<image id="0" name="a.png" subset="Train" width="{W}" height="{H}">{shapes}</image>'
        f'<image id="1" name="b.png" subset="Validation" width="{W}" height="{H}">{dog}</image>'
        f"{more}</annotations>"
    )
    (root / "annotations.xml").write_text(text)
    return root


def points(polygon: list[float]) -> str:
    pairs = zip(polygon[0::2], polygon[1::2], strict=True)
    return ";".join(f"{x},{y}" for x, y in pairs)


def cvat_mask(mask: np.ndarray, label: str = "cat") -> str:
    """As CVAT's documentation says: rows of the box, beginning with zeros."""
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    cut = mask[top : rows.max() + 1, left : columns.max() + 1]
    values = cut.ravel().astype(int)
    ends = np.flatnonzero(np.diff(values)) + 1
    counts = np.diff([0, *ends, values.size]).tolist()
    counts = [0, *counts] if values[0] else counts
    return (
        f'<mask label="{label}" source="manual" occluded="0" rle="{", ".join(map(str, counts))}" '
        f'left="{left}" top="{top}" width="{cut.shape[1]}" height="{cut.shape[0]}" z_order="0">'
        f"</mask>"
    )


def test_four_parts_of_a_group_are_one_object(run, tmp_path):
    part = '<polygon label="{}" points="{}" group_id="{}" z_order="0"></polygon>'
    shapes = "".join(part.format("cat", points(polygon), 7) for polygon in FOUR)
    shapes += part.format("dog", points(FOUR[0]), 7) + part.format("cat", "20,20;30,20;30,25", 0)
    shapes += part.format("cat", "31,20;39,20;39,25", 0)
    made = run("cvat", cvat(tmp_path / "in", shapes))
    found = made.objects("a.png")
    assert [label for label, _ in found] == ["cat", "dog", "cat", "cat"]
    assert np.array_equal(found[0][1], drawn(FOUR)) and found[0][1].sum() == 64
    thing = made.photos["a.png"].things[0]
    assert [polygon.tolist() for polygon in thing.segmentation] == FOUR and thing.area == 64
    assert "1 objects were joined" in made.said


def test_cvat_masks_keep_their_holes_and_are_no_crowds(run, tmp_path):
    one = np.zeros((H, W), bool)
    one[-1, -1] = True
    shapes = cvat_mask(RING) + cvat_mask(one, "dog") + cvat_mask(np.ones((H, W), bool), "dog")
    made = run("cvat", cvat(tmp_path / "in", shapes))
    expected = [("cat", RING), ("dog", one), ("dog", np.ones((H, W), bool))]
    assert same(made.objects("a.png"), expected)
    assert isinstance(made.photos["a.png"].things[0].segmentation, dict)


def test_the_mask_in_cvats_documentation_is_read(run, tmp_path):
    """The example of docs.cvat.ai, "XML annotation format", moved to the picture's corner."""
    rle = "3, 5, 7, 7, 5, 9, 3, 11, 2, 11, 2, 12, 1, 12, 1, 26"
    rle += ", 1, 12, 1, 12, 2, 11, 3, 9, 5, 7, 7, 5, 3"
    mask = f'<mask label="cat" rle="{rle}" left="20" top="12" width="13" height="15"></mask>'
    ((_, found),) = run("cvat", cvat(tmp_path / "in", mask)).objects("a.png")
    widths = found.sum(1)[12:27].tolist()
    assert widths == [5, 7, 9, 11, 11, 12, 12, 13, 13, 12, 12, 11, 9, 7, 5]
    assert found.sum() == sum(widths) and np.flatnonzero(found.any(0)).tolist() == [*range(20, 33)]


def test_cvat_ellipses_and_turned_boxes_have_their_area(run, tmp_path):
    shapes = (
        '<ellipse label="cat" cx="20" cy="15" rx="12" ry="6" z_order="0"></ellipse>'
        '<ellipse label="cat" cx="20" cy="15" rx="12" ry="6" rotation="90" z_order="0"></ellipse>'
        '<box label="dog" xtl="10" ytl="12" xbr="30" ybr="18" rotation="90" z_order="0"></box>'
        '<box label="dog" xtl="0" ytl="0" xbr="40" ybr="30" z_order="0"></box>'
        '<box label="dog" xtl="12" ytl="13" xbr="28" ybr="17" rotation="30" z_order="0"></box>'
    )
    wide, tall, upright, whole, tilted = (
        mask for _, mask in run("cvat", cvat(tmp_path / "in", shapes)).objects("a.png")
    )
    assert abs(wide.sum() - np.pi * 72) < 8 and np.array_equal(wide[15, 8:32], [True] * 24)
    assert tall[:, 20].sum() == 24 and tall[15].sum() == 12
    assert np.array_equal(upright, rectangle(17, 5, 23, 25)) and whole.all()
    # Clockwise, as one sees it: the right end is the lower one.
    assert np.nonzero(tilted)[0][np.nonzero(tilted)[1] > 24].mean() > 16


def test_what_has_no_area_or_is_broken_is_counted_by_reason(run, tmp_path):
    shapes = (
        '<polyline label="cat" points="1,1;5,5" z_order="0"></polyline>'
        '<points label="cat" points="1,1" z_order="0"></points><tag label="cat"></tag>'
        '<cuboid label="cat" xtl1="1"></cuboid><skeleton label="s1"><points label="1"/></skeleton>'
        '<polygon label="cat" points="1,1;5,5" z_order="0"></polygon>'
        '<polygon label="cat" points="1,1;5,5;nan,3" z_order="0"></polygon>'
        '<polygon label="cat" points="1,1;5,5;1e12,3" z_order="0"></polygon>'
        '<polygon label="cat" points="60,60;70,60;70,70" z_order="0"></polygon>'
        '<polygon label="cat" points="1,1;1,1;1,1" z_order="0"></polygon>'
        '<mask label="cat" rle="0,99" left="0" top="0" width="4" height="4"></mask>'
        '<mask label="cat" rle="-4,20" left="0" top="0" width="4" height="4"></mask>'
        '<mask label="cat" rle="0,16" left="38" top="0" width="4" height="4"></mask>'
        '<mask label="cat" rle="0,16" left="-1" top="0" width="4" height="4"></mask>'
        f'<mask label="cat" rle="0,{10**12}" left="0" top="0" width="{10**6}" height="{10**6}"/>'
        '<mask label="cat" rle="16" left="0" top="0" width="4" height="4"></mask>'
        '<polygon label="dog" points="2,2;30,2;30,60"><attribute name="x">y</attribute></polygon>'
        '<polygon label="dog" points="2,2;30,2;30,60"></polygon>'
    )
    made = run("cvat", cvat(tmp_path / "in", shapes))
    assert same(made.objects("a.png"), [("dog", drawn([[2, 2, 30, 2, 30, 60]]))])
    for kind in ("polyline", "points", "tag", "cuboid", "skeleton"):
        assert f"1 shapes were left out: a {kind} has no area" in made.said
    assert "3 polygons were left out" in made.said and "5 masks were left out" in made.said
    assert "3 objects were left out: they cover no pixel" in made.said
    assert "1 objects were left out: they repeat another" in made.said
    assert "3 polygons reach over the border" in made.said and "lost their attributes" in made.said
    assert "annotations.xml, a.png" in made.said


def test_cvat_labels_that_occur_nowhere_are_classes_and_parts_of_skeletons_are_none(run, tmp_path):
    made = run("cvat", cvat(tmp_path / "in", cvat_mask(RING), labels="bird cat dog"))
    assert made.data.classes == ["bird", "cat", "dog"] and made.data.ids == [1, 2, 3]
    (tmp_path / "names.txt").write_text("dog\ncat\nbird\nfish\n")
    named = run("cvat", tmp_path / "in", "--classes", str(tmp_path / "names.txt"))
    assert named.data.classes == ["dog", "cat", "bird", "fish"]
    assert [label for label, _ in named.objects("a.png")] == ["cat"]


def test_a_broken_file_of_cvat_is_named(refused, tmp_path):
    source = cvat(tmp_path / "in", "", more='<track id="0" label="cat"></track>')
    assert "of a video" in refused("cvat", source)
    path = source / "annotations.xml"
    for old, new, word in (
        (f'width="{W}"', 'width="99"', "99x30"),
        (f'width="{W}"', "", "lacks its name, width or height"),
        ('name="a.png"', 'name="c.png"', "--images"),
        ('points="1,1', 'points="1,x', "a polygon cannot be read"),
        ('label="dog"', "", "a polygon cannot be read"),
        ("</annotations>", "", "cannot be read as XML"),
        ("annotations>", "annotation>", "another kind of file"),
    ):
        cvat(tmp_path / "in", "")
        path.write_text(path.read_text().replace(old, new))
        assert word in refused("cvat", source), (old, new)
    (source / "images/a.png").write_bytes(b"no picture")
    cvat_text = path.read_text().replace("annotation>", "annotations>")
    path.write_text(cvat_text)
    assert "cannot be read" in refused("cvat", path)


# --------------------------------------------------------------------------- labelme
def shape(**fields) -> dict:
    empty = dict(label="cat", points=[], group_id=None, shape_type="polygon", flags={}, mask=None)
    return {**empty, "description": "", **fields}


def labelme(root: Path, listed: list[dict], size: tuple[int, int] = (W, H), **fields) -> Path:
    """labelme's files for a.png with these shapes, and for b.png with a dog."""
    dog = shape(label="dog", points=[[1, 1], [9, 1], [9, 9]])
    for name, shapes in (("a", listed), ("b", [dog])):
        if not (root / f"{name}.png").exists():
            picture(root / f"{name}.png")
        width, height = size if name == "a" else (W, H)
        content = dict(version="6.3.1", flags={}, shapes=shapes, imagePath=f"{name}.png")
        content |= dict(imageData=None, imageHeight=height, imageWidth=width)
        content |= fields if name == "a" else {}
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("corners", [[[5, 4], [17, 14]], [[17, 14], [5, 4]], [[5, 14], [17, 4]]])
def test_a_rectangle_of_labelme_has_its_corners_in_any_order(run, tmp_path, corners):
    made = run("labelme", labelme(tmp_path / "in", [shape(shape_type="rectangle", points=corners)]))
    assert same(made.objects("a.png"), [("cat", rectangle(5, 4, 17, 14))])


def test_labelme_joins_groups_and_reads_circles_and_masks(run, tmp_path):
    parts = [shape(points=np.reshape(p, (-1, 2)).tolist(), group_id=3) for p in FOUR]
    hole = png_text(RING[4:14, 5:17])
    circle = shape(label="dog", shape_type="circle", points=[[20, 15], [20, 25]])
    others = [
        shape(label="dog", points=[[5, 4], [16, 13]], shape_type="mask", mask=hole),
        shape(label="dog", points=[[1, 1], [8, 1], [8, 5], [1, 5]], group_id=3),
        shape(label="dog", points=[[20, 2], [24, 6], [20, 10], [16, 6]]),
    ]
    others[-1]["shape_type"] = "oriented_rectangle"
    made = run("labelme", labelme(tmp_path / "in", [*parts[:2], circle, *others, *parts[2:]]))
    four, disc, ring, alone, turned = made.objects("a.png")
    assert same([four, ring], [("cat", drawn(FOUR)), ("dog", RING)])
    assert disc[0] == "dog" and abs(disc[1].sum() - np.pi * 100) < 8 and disc[1][6:24, 20].all()
    assert same([alone], [("dog", rectangle(1, 1, 8, 5))]) and abs(turned[1].sum() - 32) < 5


def test_a_group_of_outlines_and_masks_is_one_mask(run, tmp_path):
    shapes = [
        shape(points=[[20, 20], [30, 20], [30, 25], [20, 25]], group_id=0),
        shape(
            points=[[5, 4], [16, 13]],
            group_id=0,
            shape_type="mask",
            mask=png_text(RING[4:14, 5:17]),
        ),
    ]
    made = run("labelme", labelme(tmp_path / "in", shapes))
    assert same(made.objects("a.png"), [("cat", RING | rectangle(20, 20, 30, 25))])


def test_what_labelme_cannot_mean_is_counted(run, tmp_path):
    ring = png_text(RING[4:14, 5:17])
    shapes = [
        shape(shape_type="line", points=[[1, 1], [5, 5]]),
        shape(shape_type="linestrip", points=[[1, 1], [5, 5], [9, 9]]),
        shape(shape_type="point", points=[[1, 1]]),
        shape(points=[[1, 1], [5, 5]]),
        shape(points=[]),
        shape(shape_type="circle", points=[[5, 5]]),
        shape(shape_type="mask", points=[[5, 4], [17, 14]], mask=ring),
        shape(shape_type="mask", points=[[35, 4], [46, 13]], mask=ring),
        shape(shape_type="mask", points=[[5, 4], [16, 13]], mask="no png"),
        shape(shape_type="mask", points=[[5, 4], [16, 13]]),
        shape(shape_type="mask", points=[[1e300, 4], [16, 13]], mask=ring),
        shape(points=[[1, 1], [9, 1], [9, 9]], description="seen twice"),
    ]
    made = run("labelme", labelme(tmp_path / "in", shapes))
    assert len(made.objects("a.png")) == 1
    for words in ("a line has", "a linestrip has", "a point has", "a circle needs two points"):
        assert f"1 shapes were left out: {words}" in made.said
    assert "2 polygons were left out" in made.said and "5 masks were left out" in made.said
    assert "1 shapes lost their flags or their description" in made.said


def test_labelme_pictures_that_nobody_annotated_become_unlabeled(run, tmp_path):
    source = labelme(tmp_path / "in", [shape(points=[[1, 1], [9, 1], [9, 9]])])
    picture(source / "more/c.png")
    made = run("labelme", source)
    assert [p.name for p in made.data.extra] == ["c.png"]
    assert (made.root / "images/unlabeled/c.png").is_file()
    assert made.objects("a.png")[0][0] == "cat"


def test_labelme_gives_back_the_picture_that_it_embeds(run, tmp_path):
    source = labelme(tmp_path / "in", [shape(points=[[1, 1], [9, 1], [9, 9]])])
    content = (source / "a.png").read_bytes()
    embedded = base64.b64encode(content).decode()
    shapes = [shape(points=[[1, 1], [9, 1], [9, 9]])]
    labelme(source, shapes, imageData=embedded, imagePath="C:\\x\\gone.png")
    (source / "a.png").unlink()
    made = run("labelme", source)
    assert made.photos["a.png"].image.read_bytes() == content


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(imageWidth=W + 1), "41x30"),
        (dict(imagePath="gone.png"), "--images"),
        (dict(imagePath="gone.png", imageData="?"), "cannot be read"),
        (dict(imagePath=3), "imagePath"),
        (dict(shapes=[shape(points=[[1, 2, 3]])]), "$.shapes[0].points"),
        (dict(shapes=[shape(points=[["1", 2]])]), "$.shapes[0].points"),
        (dict(shapes=[shape(group_id="a")]), "$.shapes[0].group_id"),
        (dict(shapes=[shape(label=None)]), "$.shapes[0].label"),
        (dict(shapes=[shape(points=[[float("nan"), 1]])]), "malformed"),
    ],
)
def test_a_wrong_file_of_labelme_is_named(refused, tmp_path, fields, word):
    said = refused("labelme", labelme(tmp_path / "in", [], **fields))
    assert word in said and "a.json" in said


# --------------------------------------------------------------------------- EXIF
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_lie_on_the_turned_picture_and_on_the_stored_one(run, tmp_path, orientation):
    """The picture's brightest corner is marked in the frame in which the annotator saw it."""
    source = labelme(tmp_path / "in", [])
    path = picture(source / "a.png", orientation=orientation)
    shown = np.array(ImageOps.exif_transpose(Image.open(path)))
    stored = np.array(Image.open(path))
    corner = [shape(points=[[1, 2], [7, 2], [7, 5], [1, 5]])]
    for frame, seen in (("auto", shown), ("shown", shown), ("stored", stored)):
        labelme(source, corner, seen.shape[1::-1])
        made = run("labelme", source, "--frame", frame)
        (photo,) = [p for p in made.photos.values() if p.name.startswith("a")]
        read = instances.load(photo).permute(1, 2, 0).numpy()
        assert np.array_equal(read, seen)
        ((_, mask),) = made.objects(photo.name)
        assert np.array_equal(read[mask], seen[2:5, 1:7].reshape(-1, 3))
        assert ("turned upright" in made.said) == (orientation > 1 and frame != "stored")
    if orientation >= 5:  # the size tells that the annotator saw the stored pixels
        labelme(source, corner, (W, H))
        made = run("labelme", source)
        assert np.array_equal(instances.load(made.photos["a.png"]).permute(1, 2, 0), stored)
        assert "keep their pixels as stored" in made.said


# --------------------------------------------------------------------------- voc-xml
def voc(root: Path, things: str, size: tuple[int, int] = (W, H)) -> Path:
    """VOC's folders with a.jpg, with these objects, to train on, and b.jpg to score on."""
    dog = voc_object("dog", 1, 1, 8, 8)
    for name, listed in (("a", things), ("b", dog)):
        picture(root / f"JPEGImages/{name}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        (root / f"Annotations/{name}.xml").write_text(
            f"<annotation><filename>wrong.jpg</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height><depth>3</depth></size>{listed}</annotation>"
        )
    (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "ImageSets/Main/val.txt").write_text("b\n")
    return root


def voc_object(name: str, *box: float, more: str = "") -> str:
    keys = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in keys)
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


@pytest.mark.parametrize(
    "corners, box", [("one", (1, 1, W, H)), ("zero", (0, 0, W - 1, H - 1)), ("edges", (0, 0, W, H))]
)
def test_a_box_of_voc_fills_the_whole_picture_in_each_way_to_count(run, tmp_path, corners, box):
    inner = tuple(value + add for value, add in zip(box, (3, 4, -5, -6), strict=True))
    things = voc_object("cat", *box) + voc_object("cat", *inner)
    made = run("voc-xml", voc(tmp_path / "in", things), "--corners", corners)
    expected = [("cat", np.ones((H, W), bool)), ("cat", rectangle(3, 4, W - 5, H - 6))]
    assert same(made.objects("a.jpg"), expected) and "before the first pixel" not in made.said
    if corners == "zero":
        wrong = run("voc-xml", tmp_path / "in")
        assert "1 boxes begin before the first pixel: are --corners zero" in wrong.said
        assert same(wrong.objects("a.jpg")[:1], [("cat", rectangle(0, 0, W - 1, H - 1))])


def test_voc_reads_floats_and_says_what_happened_to_difficult_objects(run, tmp_path):
    things = voc_object("cat", 4.5, 3.0, 10.5, 9.0, more="<difficult>1</difficult>")
    things += voc_object("cat", 12, 3, 20, 9, more="<part><name>head</name></part>")
    made = run("voc-xml", voc(tmp_path / "in", things, size=(0, 0)))
    assert same(made.objects("a.jpg")[:1], [("cat", drawn([[3.5, 2, 10.5, 2, 10.5, 9, 3.5, 9]]))])
    assert "1 objects were marked as difficult" in made.said and "lost their parts" in made.said


def test_voc_masks_of_segmentation_object_are_used_and_its_border_is_nobodys(run, tmp_path):
    source = voc(
        tmp_path / "in", voc_object("dog", 22, 21, 30, 26) + voc_object("cat", 6, 5, 17, 14)
    )
    values = np.zeros((H, W), np.uint8)
    values[20:26, 21:30] = 1
    values[RING] = 2
    values[26] = 255
    (source / "SegmentationObject").mkdir()
    Image.fromarray(values).save(source / "SegmentationObject/a.png")
    made = run("voc-xml", source)
    assert same(made.objects("a.jpg"), [("dog", values == 1), ("cat", RING)])
    assert "1 objects have only a box" in made.said  # of b.jpg
    assert "do not fill the box" not in made.said
    code = convert.main(["voc-xml", str(source), "--out", str(tmp_path / "f"), "--to", "folder"])
    label = np.array(Image.open(tmp_path / "f/labels/train/a.png"))
    assert code == 0 and np.array_equal(label, np.choose(values.clip(0, 3), [0, 2, 1, 255]))
    swapped = np.choose(values.clip(0, 3), [0, 2, 1, 255]).astype(np.uint8)
    Image.fromarray(swapped).save(source / "SegmentationObject/a.png")
    assert "2 masks of SegmentationObject do not fill the box" in run("voc-xml", source).said
    Image.fromarray(swapped[1:]).save(source / "SegmentationObject/a.png")
    assert convert.main(["voc-xml", str(source), "--out", str(tmp_path / "g")]) == 2


@pytest.mark.parametrize(
    "things, word",
    [
        ("<object><bndbox></bndbox></object>", "object 1 has no name"),
        ("<object><name>cat</name></object>", "object 1 lacks a number"),
        (voc_object("cat", 1, 2, 3, "x"), "object 1 lacks a number"),
        ("<object>", "cannot be read as XML"),
    ],
)
def test_a_wrong_file_of_voc_is_named(refused, tmp_path, things, word):
    assert word in refused("voc-xml", voc(tmp_path / "in", things))
    assert "99x30" in refused("voc-xml", voc(tmp_path / "in", "", size=(99, H)))


# --------------------------------------------------------------------------- the folder layout
def test_a_label_holds_indices_without_gaps_and_higher_objects_cover_lower_ones(tmp_path, capsys):
    low = f'<polygon label="cat" points="{points([0, 0, 20, 0, 20, 20, 0, 20])}" z_order="1"/>'
    high = f'<polygon label="dog" points="{points([10, 10, 30, 10, 30, 25, 10, 25])}" z_order="0"/>'
    source = cvat(tmp_path / "in", low + high)
    out = tmp_path / "out"
    assert convert.main(["cvat", str(source), "--out", str(out), "--to", "folder"]) == 0
    data = semantic.find("folder", out)
    label = semantic.read_label(data.train["a"].label, data).numpy()
    assert data.classes == ["background", "cat", "dog"]
    expected = np.zeros((H, W), int)
    expected[rectangle(10, 10, 30, 25)] = 2
    expected[rectangle(0, 0, 20, 20)] = 1
    assert np.array_equal(label, expected)
    assert "1 objects lie over a part of another class" in capsys.readouterr().out
    line = ["cvat", str(source), "--out", str(tmp_path / "2"), "--to", "folder", "--rest", "ignore"]
    assert convert.main(line) == 0
    data = semantic.find("folder", tmp_path / "2")
    label = semantic.read_label(data.train["a"].label, data).numpy()
    assert data.classes == ["cat", "dog"]
    assert np.array_equal(label, np.choose(expected, [255, 0, 1]))


def test_a_class_called_background_is_the_background(tmp_path):
    names = "names: {3: cat, 7: background, 90: dog}"
    source = yolo(tmp_path / "in", f"90 {shares(FOUR[0])}\n3 0.5 0.5 0.1 0.1", names, val="")
    out = tmp_path / "out"
    assert convert.main(["yolo", str(source), "--out", str(out), "--to", "folder"]) == 0
    assert (out / "classes.txt").read_text().split() == ["cat", "background", "dog"]
    label = np.array(Image.open(out / "labels/train/a.png"))
    assert np.array_equal(label == 2, drawn(FOUR[:1])) and set(np.unique(label)) == {0, 1, 2}


# --------------------------------------------------------------------------- other programs' files
# Recorded from the programs named, and written anew where these are installed. Each picture, a.png
# and b.png, holds the same objects; recorded is what belongs to a.png.
SQUARE = rectangle(22, 20, 30, 26)
PAIR = [[22.5, 20, 30, 20, 30, 26, 22.5, 26], [32, 20, 36, 20, 36, 23.25]]
COCO = [[5, 4, 17, 4, 17, 14, 5, 14], [20.5, 4, 23.25, 4, 23.25, 9]]
WHOLE = np.ones((H, W), bool)


def supervision_set(root: Path):
    """The ring and the square as masks, which supervision traces with OpenCV."""
    sv = pytest.importorskip("supervision")
    boxes = np.array([[5, 4, 17, 14], [22, 20, 30, 26]], float)
    masks = np.stack([RING, SQUARE])
    files = [str(root.parent / f"pictures/{name}.png") for name in "ab"]
    seen = sv.Detections(xyxy=boxes, class_id=np.array([1, 0]), mask=masks)
    return sv.DetectionDataset(["cat", "dog"], files, {file: seen for file in files})


def write_supervision_yolo(root: Path) -> None:
    data = supervision_set(root)
    data.as_yolo(annotations_directory_path=str(root), data_yaml_path=str(root / "data.yaml"))


def write_supervision_voc(root: Path) -> None:
    supervision_set(root).as_pascal_voc(annotations_directory_path=str(root))


def write_supervision_labelme(root: Path) -> None:
    supervision_set(root).as_labelme(annotations_directory_path=str(root))


def write_labelme(root: Path) -> None:
    try:
        from labelme import _label_file as label_file
    except ImportError:
        pytest.skip("labelme, or a library that it needs, is not installed")
    for name in "ab":
        label_file.LabelFile().save(
            filename=str(root / f"{name}.json"),
            shapes=LABELME_SHAPES,
            image_path=f"{name}.png",
            image_height=H,
            image_width=W,
        )


RING_PNG = png_text(RING[4:14, 5:17])
LABELME_SHAPES = [
    shape(label="dog", points=[[5, 4], [16, 13]], shape_type="mask", mask=RING_PNG),
    *(shape(points=np.reshape(polygon, (-1, 2)).tolist(), group_id=1) for polygon in PAIR),
    shape(points=[[40, 0], [0, 30]], shape_type="rectangle"),
]


def write_datumaro_cvat(root: Path) -> None:
    pytest.importorskip("datumaro")
    from datumaro.components import annotation as kinds
    from datumaro.components.dataset import Dataset
    from datumaro.components.dataset_base import DatasetItem
    from datumaro.components.media import Image as Media

    listed = [
        kinds.Mask(RING.astype(np.uint8), label=1, id=1),
        kinds.Polygon(PAIR[0], label=0, id=2, group=3),
        kinds.Polygon(PAIR[1], label=0, id=3, group=3),
        kinds.Bbox(0, 0, W, H, label=0, id=4),
    ]
    items = []
    for name, part in (("a", "train"), ("b", "val")):
        media = Media.from_file(path=str(root.parent / f"pictures/{name}.png"))
        items.append(DatasetItem(id=name, subset=part, media=media, annotations=listed))
    labels = kinds.LabelCategories.from_iterable(["cat", "dog"])
    categories = {kinds.AnnotationType.label: labels}
    Dataset.from_iterable(items, categories=categories).export(str(root), "cvat")


def hotcoco_set(root: Path):
    hotcoco = pytest.importorskip("hotcoco")
    images, annotations = [], []
    for number, name in enumerate("ab", start=1):
        images.append(dict(id=number, file_name=f"{name}.png", width=W, height=H))
        dog = dict(category_id=2, bbox=[5, 4, 12, 10], area=120, segmentation=COCO)
        for thing in (dog, dict(category_id=1, bbox=[0, 0, W, H], area=W * H)):
            place = dict(id=len(annotations) + 1, image_id=number, iscrowd=0)
            annotations.append({**thing, **place})
    categories = [dict(id=1, name="cat"), dict(id=2, name="dog")]
    path = root.parent / "coco.json"
    content = dict(images=images, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))
    return hotcoco.COCO(str(path))


def write_hotcoco_yolo(root: Path) -> None:
    hotcoco_set(root).to_yolo(str(root))


def write_hotcoco_voc(root: Path) -> None:
    hotcoco_set(root).to_voc(str(root))


def write_hotcoco_cvat(root: Path) -> None:
    hotcoco_set(root).to_cvat(str(root / "annotations.xml"))


NAMES = "nc: 2\nnames: [cat, dog]\n"
RECORDED = {
    # supervision 0.31.2
    "supervision yolo": {
        "data.yaml": NAMES,
        "a.txt": "1 0.12500 0.13333 0.20000 0.23333 0.22500 0.20000 0.30000 0.20000 0.32500 "
        "0.23333 0.32500 0.30000 0.30000 0.33333 0.22500 0.33333 0.20000 0.30000 0.20000 0.23333 "
        "0.12500 0.13333 0.12500 0.43333 0.40000 0.43333 0.40000 0.13333\n"
        "0 0.55000 0.66667 0.55000 0.83333 0.72500 0.83333 0.72500 0.66667\n",
    },
    "supervision voc": {
        "a.xml": """<?xml version="1.0" ?>
<annotation><folder>VOC</folder><filename>a.png</filename>
<source><database>roboflow.ai</database></source>
<size><width>40</width><height>30</height><depth>3</depth></size><segmented>0</segmented>
<object><name>dog</name>
<bndbox><xmin>6</xmin><ymin>5</ymin><xmax>17</xmax><ymax>14</ymax></bndbox>
<polygon><x1>6</x1><y1>5</y1><x2>9</x2><y2>8</y2><x3>10</x3><y3>7</y3><x4>13</x4><y4>7</y4>
<x5>14</x5><y5>8</y5><x6>14</x6><y6>10</y6><x7>13</x7><y7>11</y7><x8>10</x8><y8>11</y8>
<x9>9</x9><y9>10</y9><x10>9</x10><y10>8</y10><x11>6</x11><y11>5</y11><x12>6</x12><y12>14</y12>
<x13>17</x13><y13>14</y13><x14>17</x14><y14>5</y14></polygon></object>
<object><name>cat</name>
<bndbox><xmin>23</xmin><ymin>21</ymin><xmax>30</xmax><ymax>26</ymax></bndbox>
<polygon><x1>23</x1><y1>21</y1><x2>23</x2><y2>26</y2><x3>30</x3><y3>26</y3><x4>30</x4><y4>21</y4>
</polygon></object></annotation>"""
    },
    "supervision labelme": {
        "a.json": json.dumps(
            {
                "version": "5.5.0",
                "flags": {},
                "shapes": [
                    {
                        "label": label,
                        "points": np.reshape(polygon, (-1, 2)).tolist(),
                        "group_id": None,
                        "description": "",
                        "shape_type": "polygon",
                        "flags": {},
                    }
                    for label, polygon in (
                        (
                            "dog",
                            [
                                5.0,
                                4,
                                8,
                                7,
                                9,
                                6,
                                12,
                                6,
                                13,
                                7,
                                13,
                                9,
                                12,
                                10,
                                9,
                                10,
                                8,
                                9,
                                8,
                                7,
                                5,
                                4,
                            ]
                            + [5, 13, 16, 13, 16, 4],
                        ),
                        ("cat", [22.0, 20, 22, 25, 29, 25, 29, 20]),
                    )
                ],
                "imagePath": "a.png",
                "imageData": None,
                "imageHeight": H,
                "imageWidth": W,
            }
        )
    },
    # datumaro 1.13.12
    "datumaro cvat": {
        "train.xml": """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><id></id><name>train</name><size>1</size>
<mode>annotation</mode><z_order>True</z_order><labels>
<label><name>cat</name><attributes></attributes></label>
<label><name>dog</name><attributes></attributes></label></labels></task></meta>
<image id="0" name="a.png" width="40" height="30">
<mask label="dog" occluded="0" outside="0" keyframe="0"
 rle="165, 12, 28, 12, 28, 12, 28, 4, 4, 4, 28, 4, 4, 4, 28, 4, 4, 4, 28, 12, 28, 12, 28, 12,
 28, 12, 663"
 left="0" top="0" width="40" height="30"
 z_order="0"></mask>
<polygon label="cat" occluded="0" outside="0" keyframe="0"
 points="22.50,20.00;30.00,20.00;30.00,26.00;22.50,26.00" z_order="0" group_id="3"></polygon>
<polygon label="cat" occluded="0" outside="0" keyframe="0"
 points="32.00,20.00;36.00,20.00;36.00,23.25" z_order="0" group_id="3"></polygon>
<box label="cat" occluded="0" outside="0" keyframe="0" xtl="0.00" ytl="0.00" xbr="40.00" ybr="30.00"
 z_order="0"></box></image></annotations>"""
    },
    # hotcoco 1.3.0
    "hotcoco yolo": {
        "data.yaml": NAMES,
        "a.txt": "1 0.275000 0.300000 0.300000 0.333333\n0 0.500000 0.500000 1.000000 1.000000\n",
    },
    "hotcoco voc": {
        "Annotations/a.xml": """<annotation><folder>Annotations</folder><filename>a.png</filename>
<size><width>40</width><height>30</height><depth>3</depth></size><segmented>0</segmented>
<object><name>dog</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>6</xmin><ymin>5</ymin><xmax>17</xmax><ymax>14</ymax></bndbox></object>
<object><name>cat</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"""
    },
    "hotcoco cvat": {
        "train.xml": """<annotations><version>1.1</version><meta><task><labels>
<label><name>cat</name></label><label><name>dog</name></label></labels></task></meta>
<image id="1" name="a.png" width="40" height="30">
<polygon label="dog" points="5.00,4.00;17.00,4.00;17.00,14.00;5.00,14.00" occluded="0"/>
<polygon label="dog" points="20.50,4.00;23.25,4.00;23.25,9.00" occluded="0"/>
<box label="cat" xtl="0.00" ytl="0.00" xbr="40.00" ybr="30.00" occluded="0"/>
</image></annotations>"""
    },
    # labelme 6.3.1
    "labelme labelme": {
        "a.json": json.dumps(
            {
                "version": "6.3.1",
                "flags": {},
                "shapes": LABELME_SHAPES,
                "imagePath": "a.png",
                "imageData": None,
                "imageHeight": H,
                "imageWidth": W,
            }
        )
    },
}
TRACED = [("dog", RING), ("cat", SQUARE)]  # one pixel narrower on the right and below
EXPECTED = {
    "supervision yolo": TRACED,
    "supervision voc": TRACED,
    "supervision labelme": TRACED,
    "datumaro cvat": [("dog", RING), ("cat", drawn(PAIR)), ("cat", WHOLE)],
    "hotcoco yolo": [("dog", drawn(COCO[:1])), ("cat", WHOLE)],
    "hotcoco voc": [("dog", drawn(COCO[:1])), ("cat", WHOLE)],
    "hotcoco cvat": [("dog", drawn(COCO[:1])), ("dog", drawn(COCO[1:])), ("cat", WHOLE)],
    "labelme labelme": [("dog", RING), ("cat", drawn(PAIR)), ("cat", WHOLE)],
}


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("how", ["recorded", "anew"])
@pytest.mark.parametrize("name", RECORDED)
def test_objects_that_another_program_wrote_are_read_back(run, tmp_path, name, how):
    root = tmp_path / "in"
    root.mkdir()
    for stem in "ab":
        picture(tmp_path / f"pictures/{stem}.png")
    program, form = name.split()
    if how == "recorded":
        for file, text in RECORDED[name].items():
            path = root / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            other = path.with_name(path.name.replace("a.", "b.").replace("train", "val"))
            if other != path and path.name != "data.yaml":
                other.write_text(text.replace("a.png", "b.png"))
    elif program == "labelme":
        write_labelme(root)
    else:
        globals()[f"write_{program}_{form}"](root)
    form = "voc-xml" if form == "voc" else form
    made = run(form, root, "--images", str(tmp_path / "pictures"))
    for stem in "ab":
        found, expected = made.objects(f"{stem}.png"), EXPECTED[name]
        assert [label for label, _ in found] == [label for label, _ in expected]
        overlaps = [iou(a, b) for (_, a), (_, b) in zip(found, expected, strict=True)]
        assert min(overlaps) >= (0.7 if program == "supervision" else 1), overlaps
        if expected[0][1] is RING:
            assert not found[0][1][8, 10:12].any()


# --------------------------------------------------------------------------- the whole set
def test_pictures_of_one_name_carry_their_folders(run, tmp_path):
    for folder in "xy":
        picture(tmp_path / f"in/{folder}/a.jpg")
        (tmp_path / f"in/{folder}/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "in/classes.txt").write_text("cat\n")
    picture(tmp_path / "in/train/a.jpg")
    picture(tmp_path / "in/val/a.jpg")
    (tmp_path / "in/val/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    made = run("yolo", tmp_path / "in")
    assert sorted(p.name for p in made.data.train + made.data.extra) == [
        "train_a.jpg",
        "x_a.jpg",
        "y_a.jpg",
    ]
    assert [p.name for p in made.data.val] == ["a.jpg"]


def test_pictures_are_copied_or_linked_to(run, tmp_path):
    source = yolo(tmp_path / "in", "0 0.5 0.5 1 1")
    copied = run("yolo", source).photos["a.jpg"].image
    assert not copied.is_symlink()
    linked = run("yolo", source, "--link").photos["a.jpg"].image
    assert linked.is_symlink() and linked.resolve() == tmp_path / "in/images/train/a.jpg"


def test_a_used_folder_or_a_missing_source_is_refused(refused, tmp_path):
    source = yolo(tmp_path / "in", "0 0.5 0.5 1 1")
    assert "not there" in refused("yolo", tmp_path / "nothing")
    assert "no picture" in refused("labelme", tmp_path / "in/labels")
    assert "none of data.yaml" in refused("yolo", tmp_path / "in/images")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    assert "is there already" in refused("yolo", source)
    assert (tmp_path / "out/mine.txt").read_text() == "keep"


def test_one_picture_or_no_class_is_refused(refused, tmp_path):
    picture(tmp_path / "in/a.jpg")
    (tmp_path / "in/classes.txt").write_text("cat\n")
    assert "Two annotated pictures" in refused("yolo", tmp_path / "in")
    (tmp_path / "in/classes.txt").write_text("cat\ncat\n")
    assert "names that differ" in refused("yolo", tmp_path / "in")
    (tmp_path / "in/classes.txt").write_text("")
    assert "at least" in refused("yolo", tmp_path / "in")
    (tmp_path / "in/classes.txt").write_text("cat\ndog\n")
    (tmp_path / "names.txt").write_text("cat\n")
    said = refused("yolo", tmp_path / "in", "--classes", str(tmp_path / "names.txt"))
    assert "lacks dog" in said


SIGNS = b'0123456789-.,;"<>{}[] \n\x00\xff'


@pytest.mark.parametrize("form", READERS)
def test_damaged_files_end_with_a_sentence_or_a_set(tmp_path, capsys, form):
    """Bytes changed at random, sixty times: no traceback, and nothing half-written."""
    make = {
        "yolo": lambda root: yolo(root, f"0 {shares(FOUR[0])}\n1 0.5 0.5 0.5 0.5"),
        "cvat": lambda root: cvat(root, cvat_mask(RING)),
        "labelme": lambda root: labelme(root, [shape(points=[[1, 1], [9, 1], [9, 9]], group_id=1)]),
        "voc-xml": lambda root: voc(root, voc_object("cat", 1, 2, 20, 20)),
    }[form]
    source = make(tmp_path / "in")
    kinds = (".txt", ".yaml", ".xml", ".json")
    files = [p for p in sorted((tmp_path / "in").rglob("*")) if p.suffix in kinds]
    g = random.Random(0)
    codes = set()
    for _ in range(60):
        path = g.choice(files)
        whole = path.read_bytes()
        digits = [place for place, byte in enumerate(whole) if chr(byte).isdigit()]
        if digits and g.random() < 0.5:
            places, signs = digits, b"0123456789-."
        else:
            places, signs = range(len(whole)), SIGNS
        damaged = bytearray(whole)
        for _ in range(g.randint(1, 3)):
            damaged[g.choice(places)] = g.choice(signs)
        end = g.randrange(len(damaged)) if g.random() < 0.1 else len(damaged)
        path.write_bytes(bytes(damaged[:end]))
        code = convert.main([form, str(source), "--out", str(tmp_path / "out")])
        assert code in (0, 2) and code == bool(capsys.readouterr().err) * 2
        codes.add(code)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        path.write_bytes(whole)
    assert codes == {0, 2}
