"""Properties of what parses data from outside: whatever a file holds, it is read, or the user is
told what is wrong. Nothing else comes out."""

import io
import json
import string

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common import checkpoints, coco, files, splits
from common.errors import UserError

# The same examples on every machine; a file of its own for each, in one folder.
whatever = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
words = st.text(string.ascii_letters + string.digits + "_-./ ", max_size=12)


# -------------------------------------------------------------------------------- lists of images
@whatever
@given(content=st.binary(max_size=200) | st.lists(words).map(lambda x: "\n".join(x).encode()))
def test_a_list_is_read_or_refused(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    try:
        entries = splits.read_list(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    names = [name for name, _ in entries]
    assert names and len(set(names)) == len(names)
    assert all(name in content.decode("utf-8-sig") for name in names)


@whatever
@given(
    names=st.lists(st.from_regex(r"[a-z]{1,3}_[0-9]{6}", fullmatch=True), min_size=1, unique=True)
)
def test_a_list_of_ids_comes_back_as_it_was_written(tmp_path, names):
    path = tmp_path / "list.txt"
    path.write_text("\n\n".join(names) + "\n")
    assert splits.read_list(path) == [(name, None) for name in names]


@whatever
@given(text=words, total=st.integers(0, 20_000))
def test_a_number_of_images_is_within_what_there_is(text, total):
    try:
        number = splits.count(text, total)
    except UserError:
        return
    assert 1 <= number <= total


@whatever
@given(
    held=st.dictionaries(words, st.sets(st.integers(0, 5), max_size=3), min_size=1, max_size=20),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_draws_are_nested_and_cover_the_classes(held, seed, data):
    n = data.draw(st.integers(1, len(held)))
    drawn = splits.draw(list(held), n, seed, lambda name: held[name])
    assert len(set(drawn)) == n and set(drawn) <= held.keys()
    assert drawn == splits.draw(sorted(held)[::-1], len(held), seed, lambda name: held[name])[:n]
    classes = set().union(*held.values())
    if n >= len(classes):
        assert set().union(*(held[name] for name in drawn)) == classes


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


@pytest.mark.filterwarnings("ignore:.*annotations of")
@whatever
@given(content=a_file.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=60))
def test_a_coco_file_is_read_or_refused(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    try:
        photos = read_coco(path, tmp_path)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert all(photo.height > 0 and photo.width > 0 for photo in photos)
    assert all(np.isfinite(thing.area) for photo in photos for thing in photo.things)


# ------------------------------------------------------------------------------ pictures, weights
@whatever
@given(
    cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)))
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_a_broken_picture_is_read_or_refused(tmp_path, form, cut, flips):
    buffer = io.BytesIO()
    pixels = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)
    Image.fromarray(pixels).save(buffer, form)
    content = bytearray(buffer.getvalue()[: cut or None])
    for place, bits in flips:
        content[place % len(content)] ^= bits
    path = tmp_path / "picture"
    path.write_bytes(bytes(content))
    try:
        image = files.read_image(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@whatever
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.pkl"])
def test_a_file_of_weights_is_read_or_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError):
        checkpoints.read_weights(path)
    with pytest.raises(UserError):
        checkpoints.load_checkpoint(path, "gta_seg.py")
