"""Lists, images and labels as others have them: read as what they plainly are, or refused in a
sentence, and nothing wrong in silence. Each test is named after a kind of file or folder."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import files, instances, objects, semantic, splits
from common.errors import UserError

# ------------------------------------------------------------------------- text from other systems
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-32", "cp1252", "latin-1")


def encoded(text: str, encoding: str) -> bytes:
    if encoding == "utf-16-le with mark":
        return b"\xff\xfe" + text.encode("utf-16-le")
    return text.encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
def test_text_from_any_system_is_read_alike(tmp_path, encoding, end):
    names = ["straße_1", "café_2", "plain_3"]
    path = tmp_path / "list.txt"
    path.write_bytes(encoded(end.join(names) + end, encoding))
    assert splits.read_list(path) == [(name, None) for name in names]
    assert semantic.read_classes(path) == names
    assert semantic.read_names(path, {}) == names


@pytest.mark.parametrize("content", [b"\xff\xfea", b"\xff\xfe\x00\xd8", b"a\x00b\x00", b"\x81"])
def test_what_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    for read in (splits.read_list, semantic.read_classes, lambda p: semantic.read_names(p, {})):
        with pytest.raises(UserError, match="list.txt"):
            read(path)


@pytest.mark.parametrize("between", [" ", "\t", ",", ", ", ";"], ids=repr)
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_pairs_in_a_list_whatever_parts_them(tmp_path, between, slash):
    path = tmp_path / "list.txt"
    path.write_text(f"JPEGImages{slash}a.jpg{between}Masks{slash}a.png\n")
    assert splits.read_list(path) == [("JPEGImages/a.jpg", "Masks/a.png")]


# --------------------------------------------------------------------------- what a data set holds
def a_picture(path: Path, size: tuple[int, int] = (8, 6), value: int = 0, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def a_voc_set(root: Path, names: list[str]) -> Path:
    for name in names:
        a_picture(root / "JPEGImages" / f"{name}.jpg", mode="RGB")
        a_picture(root / "SegmentationClassAug" / f"{name}.png", value=1)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text(names[-1])
    return lists


def test_the_train_list_of_voc_may_hold_pairs_of_paths(tmp_path):
    """As DeepLab's train_aug.txt does."""
    lists = a_voc_set(tmp_path, ["2007_000032", "2007_000033", "2007_000039"])
    (lists / "train_aug.txt").write_bytes(
        b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\r\n"
        b"/JPEGImages/2007_000033.jpg /SegmentationClassAug/2007_000033.png\r\n"
    )
    data = semantic.find("voc", tmp_path)
    assert list(data.train) == ["2007_000032", "2007_000033"]


def test_an_image_that_the_lists_of_voc_name_twice(tmp_path):
    lists = a_voc_set(tmp_path, ["2007_000032", "2007_000033"])
    (lists / "val.txt").write_text("2007_000033\n2007_000033\n")
    with pytest.raises(UserError, match="2007_000033 twice"):
        semantic.find("voc", tmp_path)


def a_city(root: Path, kinds: list[str], values: list[int]) -> Path:
    """One street each to train and to score, its label in files of these kinds."""
    for part in ("train", "val"):
        name = f"{part}/ulm/ulm_000001_000019"
        a_picture(root / "leftImg8bit" / f"{name}_leftImg8bit.png", mode="RGB")
        for kind, value in zip(kinds, values, strict=True):
            a_picture(root / "gtFine" / f"{name}_gtFine_{kind}.png", value=value)
    path = root / "unimatch.txt"
    path.write_text(
        "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png "
        "gtFine/train/ulm/ulm_000001_000019_gtFine_labelTrainIds.png\n"
    )
    return path


CAR = semantic.CITYSCAPES_CLASSES.index("car")
CAR_ID = semantic.CITYSCAPES_IDS[CAR]
CITY_FILES = {
    "labelIds alone": (["labelIds"], [CAR_ID]),
    "labelTrainIds alone": (["labelTrainIds"], [CAR]),
    "both": (["labelIds", "labelTrainIds"], [CAR_ID, CAR]),
}


@pytest.mark.parametrize("case", CITY_FILES)
@pytest.mark.filterwarnings("ignore:.*names 1 masks")
def test_labels_that_a_list_names_in_another_form_are_the_data_sets_own(tmp_path, case):
    path = a_city(tmp_path, *CITY_FILES[case])
    data = semantic.find("cityscapes", tmp_path)
    (listed,) = semantic.choose(data, str(path), 0, "", "gta_seg", needed=False).labeled
    for picture in (listed, *data.train.values(), *data.val):
        assert semantic.read_label(picture.label, data).unique().tolist() == [CAR], picture


def test_a_mask_of_a_list_that_is_left_aside_is_said(folder_root, tmp_path):
    data = semantic.find("folder", folder_root)
    other = a_picture(folder_root / "pseudo" / "train_000001.png", (64, 64))
    (folder_root / "list.txt").write_text(f"images/train/train_000001.jpg {other}\n")
    with pytest.warns(UserWarning, match="labels/train/train_000001.png is taken"):
        found = semantic.listed_pictures(folder_root / "list.txt", data)
    assert found == [data.train["train_000001"]]


def test_another_image_with_a_known_name_is_itself(folder_root):
    data = semantic.find("folder", folder_root)
    image = a_picture(folder_root / "mine" / "train_000001.png", (9, 9), mode="RGB")
    mask = a_picture(folder_root / "mine" / "masks" / "train_000001.png", (9, 9))
    (folder_root / "list.txt").write_text("mine/train_000001.png mine/masks/train_000001.png\n")
    (found,) = semantic.listed_pictures(folder_root / "list.txt", data)
    assert (found.image, found.label) == (image, mask)


@pytest.mark.parametrize("part", ["train", "val"])
def test_two_images_with_one_stem_are_refused(folder_root, part):
    name = f"{part}_000001"
    a_picture(folder_root / "images" / part / f"{name}.png", (64, 64), mode="RGB")
    with pytest.raises(UserError, match=f"{name}.jpg and {name}.png"):
        semantic.find("folder", folder_root)


def test_two_images_with_one_stem_are_refused_in_voc(tmp_path):
    a_voc_set(tmp_path, ["a", "b"])
    a_picture(tmp_path / "JPEGImages" / "a.png", mode="RGB")
    with pytest.raises(UserError, match="a.jpg and a.png"):
        semantic.find("voc", tmp_path)


def test_linked_and_nested_folders_of_unlabeled_images_are_entered(folder_root, tmp_path):
    photos = tmp_path / "photos"
    a_picture(photos / "a.jpg", mode="RGB")
    a_picture(photos / "deep" / "deeper" / "b.jpg", mode="RGB")
    a_picture(tmp_path / "elsewhere" / "c.jpg", mode="RGB")
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "deep" / "round").symlink_to(photos)  # a circle
    (photos / "linked again").symlink_to(tmp_path / "elsewhere")
    for found in (
        semantic.unlabeled_pictures(str(photos), semantic.find("folder", folder_root)),
        instances.unlabeled_photos(str(photos), None, "--pool"),
    ):
        assert sorted(picture.image.name for picture in found) == ["a.jpg", "b.jpg", "c.jpg"]


def test_companions_that_macos_writes_are_no_images(folder_root, tmp_path):
    for part in ("train", "val", "unlabeled"):
        for path in list((folder_root / "images" / part).iterdir()):
            path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00")
    data = semantic.find("folder", folder_root)
    found = [*data.train.values(), *data.val, *data.extra]
    found += semantic.unlabeled_pictures(str(folder_root / "images"), data)
    names = [picture.image.name for picture in found]
    names += [p.image.name for p in instances.unlabeled_photos(str(folder_root), None)]
    assert names and not [name for name in names if name.startswith("._")]
    files_of_predict = files.pictures([str(folder_root / "images" / "val")])
    assert [path.name for path in files_of_predict] == [p.image.name for p in data.val]


# ------------------------------------------------------------------------------ values of a label
def data_of(number: int, to_class=None) -> semantic.Segmentation:
    classes = [f"class {i}" for i in range(number)]
    return semantic.Segmentation("folder", Path(), classes, {}, [], to_class=to_class)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "int32", "bool"])
def test_labels_of_any_number_of_bits_are_read_as_they_are(tmp_path, kind):
    values = np.array([[0, 1, 1], [1, 0, 0]], kind)
    for suffix in ("tif", "png"):
        if suffix == "png" and kind in ("int16", "int32"):
            continue
        path = tmp_path / f"{kind}.{suffix}"
        Image.fromarray(values).save(path)
        assert semantic.read_label(path, data_of(2)).tolist() == values.astype(int).tolist()


@pytest.mark.parametrize("value", [-250, -1, 256, 257, 511, 24003, 65535])
@pytest.mark.parametrize("mapped", [False, True])
def test_label_values_of_more_than_8_bits_are_never_cut(tmp_path, value, mapped):
    path = tmp_path / "label.tif"
    Image.fromarray(np.full((4, 5), value, np.int32)).save(path)
    to_class = np.zeros(256, np.uint8) if mapped else None
    with pytest.raises(UserError, match=f"label.tif holds the value {value}"):
        semantic.read_label(path, data_of(20, to_class))


def test_labels_with_a_fraction_are_refused(tmp_path):
    path = tmp_path / "label.tif"
    Image.fromarray(np.full((4, 5), 1.5, np.float32)).save(path)
    with pytest.raises(UserError, match="numbers with a fraction"):
        semantic.read_label(path, data_of(2))


def a_bomb(path: Path, side: int = 14_000) -> Path:
    """A small file that unpacks to very many pixels."""
    Image.new("L", (side, side)).save(path)
    return path


def a_lying_header(path: Path) -> Path:
    """A PNG of a few bytes that says that it is 60,000 pixels wide and high."""
    a_picture(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("make", [a_bomb, a_lying_header])
def test_decompression_bombs_are_refused_as_image_label_and_instance_ids(tmp_path, make):
    path = make(tmp_path / "bomb.png")
    for read in (
        files.read_image,
        lambda path: semantic.read_label(path, data_of(2)),
        objects.read_ids,
    ):
        with pytest.raises(UserError, match="bomb.png"):
            read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_that_a_cameras_note_swaps_are_refused_and_the_note_is_named(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=exif)
    label = a_picture(tmp_path / "a.png", (6, 8))
    with pytest.raises(UserError, match="8x6 pixels") as refused:
        semantic.load_picture(semantic.Picture("a", tmp_path / "a.jpg", label), data_of(2))
    photo = objects.Photo("a", tmp_path / "a.jpg", width=6, height=8, things=())
    with pytest.raises(UserError, match="8x6 pixels") as of_instances:
        instances.load(photo)
    for error in (refused, of_instances):
        assert ("EXIF" in str(error.value)) == (orientation >= 5)
