"""Properties of what parses data from outside: whatever a file holds, it is read, or the user is
told what is wrong. Nothing else comes out. `make fuzz` tries the same properties for an hour."""

import io
import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import PROPERTIES, Property, few
from hypothesis import strategies as st
from PIL import Image

from common import checkpoints, coco, files, splits
from common.errors import UserError

words = st.text(string.ascii_letters + string.digits + "_-./ ", max_size=12)
MINE: dict[str, Property] = {}


# -------------------------------------------------------------------------------- lists of images
def a_list_is_read_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "list.txt"
    path.write_bytes(content)
    try:
        entries = splits.read_list(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    names = [name for name, _ in entries]
    assert names and len(set(names)) == len(names)
    text = files.read_text(path).replace("\\", "/")
    assert all(name in text for name in names)


def a_list_of_ids_comes_back_as_it_was_written(names: list[str], folder: Path) -> None:
    path = folder / "list.txt"
    path.write_text("\n\n".join(names) + "\n")
    assert splits.read_list(path) == [(name, None) for name in names]


def a_number_of_images_is_within_what_there_is(value: tuple[str, int], folder: Path) -> None:
    text, total = value
    try:
        number = splits.count(text, total)
    except UserError:
        return
    assert 1 <= number <= total


def draws_are_nested_and_cover_the_classes(value: tuple[dict, int, float], folder: Path) -> None:
    held, seed, share = value
    n = max(1, round(share * len(held)))
    drawn = splits.draw(list(held), n, seed, lambda name: held[name])
    assert len(set(drawn)) == n and set(drawn) <= held.keys()
    assert drawn == splits.draw(sorted(held)[::-1], len(held), seed, lambda name: held[name])[:n]
    classes = set().union(*held.values())
    if n >= len(classes):
        assert set().union(*(held[name] for name in drawn)) == classes


ids = st.from_regex(r"[a-z]{1,3}_[0-9]{6}", fullmatch=True)
held = st.dictionaries(words, st.sets(st.integers(0, 5), max_size=3), min_size=1, max_size=20)
MINE |= {
    "a list is read or refused": Property(
        st.binary(max_size=200) | st.lists(words).map(lambda x: "\n".join(x).encode()),
        a_list_is_read_or_refused,
    ),
    "a list of ids comes back as it was written": Property(
        st.lists(ids, min_size=1, unique=True), a_list_of_ids_comes_back_as_it_was_written
    ),
    "a number of images is within what there is": Property(
        st.tuples(words, st.integers(0, 20_000)), a_number_of_images_is_within_what_there_is
    ),
    "draws are nested and cover the classes": Property(
        st.tuples(held, st.integers(0, 9), st.floats(0, 1)), draws_are_nested_and_cover_the_classes
    ),
}


# ------------------------------------------------------------------------------------ annotations
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
corners = st.lists(st.floats(-5, 40, width=32), min_size=6, max_size=12).filter(
    lambda x: len(x) % 2 == 0
)
mostly = lambda good: st.one_of(good, good, good, json_values)  # noqa: E731
an_image = st.fixed_dictionaries(
    {
        "id": mostly(st.integers(1, 3)),
        "file_name": mostly(st.sampled_from(["a.jpg", "b.jpg"])),
        "height": mostly(st.just(32)),
        "width": mostly(st.just(32)),
    }
)
an_annotation = st.fixed_dictionaries(
    {
        "id": st.integers(1, 99),
        "image_id": mostly(st.integers(1, 3)),
        "category_id": mostly(st.integers(1, 2)),
        "segmentation": mostly(st.lists(corners, max_size=2)),
        "area": mostly(st.just(4.0)),
        "iscrowd": mostly(st.just(0)),
    }
)
a_category = st.fixed_dictionaries({"id": mostly(st.integers(1, 2)), "name": mostly(words)})
a_file = st.fixed_dictionaries(
    {
        "images": mostly(st.lists(an_image, max_size=3)),
        "categories": mostly(st.lists(a_category, max_size=2)),
        "annotations": mostly(st.lists(an_annotation, max_size=4)),
    }
)


def read_coco(path, folder):
    content = coco.read_json(path)
    classes = coco.classes_of(content, path)
    index = {number: i for i, number in enumerate(classes)}
    return coco.photos_of(content, path, index, lambda record: folder / str(record["file_name"]))


def a_coco_file_is_read_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "train.json"
    path.write_bytes(content)
    try:
        photos = read_coco(path, folder)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert all(photo.height > 0 and photo.width > 0 for photo in photos)
    assert all(np.isfinite(thing.area) for photo in photos for thing in photo.things)


MINE["a COCO file is read or refused"] = Property(
    a_file.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=60),
    a_coco_file_is_read_or_refused,
)


# ------------------------------------------------------------------------------ pictures, weights
def a_broken_picture_is_read_or_refused(value: tuple, folder: Path) -> None:
    form, cut, flips = value
    buffer = io.BytesIO()
    pixels = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)
    Image.fromarray(pixels).save(buffer, form)
    content = bytearray(buffer.getvalue()[: cut or None])
    for place, bits in flips:
        content[place % len(content)] ^= bits
    path = folder / "picture"
    path.write_bytes(bytes(content))
    try:
        image = files.read_image(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3


def what_is_no_file_of_weights_is_refused(value: tuple[str, bytes], folder: Path) -> None:
    name, content = value
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(UserError):
        checkpoints.read_weights(path)
    with pytest.raises(UserError):
        checkpoints.load_checkpoint(path, "gta_seg.py")


MINE |= {
    "a broken picture is read or refused": Property(
        st.tuples(
            st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]),
            st.integers(0, 2000),
            st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255))),
        ),
        a_broken_picture_is_read_or_refused,
    ),
    "what is no file of weights is refused": Property(
        st.tuples(
            st.sampled_from(["net.pth", "net.safetensors", "net.pkl"]), st.binary(max_size=200)
        ),
        what_is_no_file_of_weights_is_refused,
    ),
}


# ----------------------------------------------------------------------------------------- the test
PROPERTIES |= MINE


@pytest.mark.parametrize("name", list(MINE))
def test_it_holds_of_whatever_is_drawn_that(name, tmp_path):
    few(name, tmp_path, 150)
