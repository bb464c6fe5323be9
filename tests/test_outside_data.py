"""Properties of what parses data from outside: whatever a file holds, it is read, or the user is
told what is wrong. Nothing else comes out. `make fuzz` tries the same properties for an hour."""

import io
import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import PROPERTIES, Property, changed, few
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from common import checkpoints, coco, files, judge, mask_ap, splits
from common.errors import UserError
from common.objects import Instances, Photo, Thing, Window, masks_of
from common.outlines import FAR, RunLengths, checked_counts, packed

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
held = st.lists(st.sets(st.integers(0, 3), max_size=2), min_size=1, max_size=20).map(
    lambda images: {f"image {i}": classes for i, classes in enumerate(images)}
)
numbers_of_images = st.one_of(
    words,
    st.integers(0, 30_000).map(str),
    st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.floats(0, 200).map(lambda share: f"{share:.3g}%"),
)
MINE |= {
    "a list is read or refused": Property(
        st.binary(max_size=200) | st.lists(words).map(lambda x: "\n".join(x).encode()),
        a_list_is_read_or_refused,
    ),
    "a list of ids comes back as it was written": Property(
        st.lists(ids, min_size=1, unique=True), a_list_of_ids_comes_back_as_it_was_written
    ),
    "a number of images is within what there is": Property(
        st.tuples(numbers_of_images, st.integers(0, 20_000)),
        a_number_of_images_is_within_what_there_is,
    ),
    "draws are nested and cover the classes": Property(
        st.tuples(held, st.integers(0, 9), st.floats(0, 1)), draws_are_nested_and_cover_the_classes
    ),
}


# ------------------------------------------------------------------------------------ annotations
odd = st.sampled_from([2**31, 2**64, -(2**31), 10**30, 1e308, 1e9, "nan", "1", "0", "1.0", "\0"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | words | odd,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


def rarely(odd: st.SearchStrategy, good: st.SearchStrategy, one_in: int = 20) -> st.SearchStrategy:
    """Nearly always what belongs here, so that many a file is good but for one value."""
    return st.integers(1, one_in).flatmap(lambda n: odd if n == one_in // 2 else good)


def with_wild_place(polygon: list[float]) -> st.SearchStrategy:
    wild = st.sampled_from([2e8, -2e8, 1e300])
    return st.tuples(st.integers(0, len(polygon) - 1), wild).map(
        lambda change: [*polygon[: change[0]], change[1], *polygon[change[0] + 1 :]]
    )


good_corners = st.lists(st.floats(-5, 40, width=32), min_size=6, max_size=12).filter(
    lambda x: len(x) % 2 == 0
)
corners = rarely(good_corners.flatmap(with_wild_place), good_corners, 8)


@st.composite
def run_lengths(draw) -> dict:
    """Run lengths of 32 x 32 pixels or nearly so, as a list or as text of any kind."""
    edges = draw(st.lists(st.integers(0, 1024), max_size=8).map(sorted))
    counts = np.diff([0, *edges, 1024]).tolist()
    if draw(st.integers(0, 3)) == 0:
        counts.append(draw(st.integers(-3, 40)))
    if draw(st.booleans()) and min(counts) >= 0:
        counts = coco_mask.frPyObjects({"size": [32, 32], "counts": counts}, 32, 32)["counts"]
        counts = draw(st.just(counts.decode()) | st.text(string.printable, max_size=9))
    return {"size": draw(st.sampled_from([[32, 32]] * 5 + [[32, 31]])), "counts": counts}


pairs = corners.map(lambda p: np.array(p).reshape(-1, 2).tolist())
outlines = st.one_of(
    st.lists(corners, max_size=2),
    corners,
    pairs,
    pairs.map(lambda p: [p]),
    run_lengths(),
    run_lengths().map(lambda r: [r]),
)


areas = rarely(st.sampled_from(["nan", "inf"]), st.sampled_from([4.0, -4.0, "4", None]), 8)
boxes = rarely(st.just([1, 2, 3, "inf"]), st.sampled_from([[1, 2, 3, 4], ["1", 2, 3, 4], None]), 8)
crowds = st.sampled_from([0, 1, 0.0, 1.0, "0", "1", False, True, None])
an_annotation = st.fixed_dictionaries(
    {
        "id": st.integers(1, 99),
        "image_id": st.integers(1, 2),
        "category_id": st.integers(1, 2),
        "segmentation": outlines,
        "area": areas,
        "iscrowd": crowds,
        "bbox": boxes,
    }
)
SOME_IMAGES = [
    {"id": number, "file_name": f"{number}.jpg", "height": 32, "width": 32} for number in (1, 2)
]
SOME_CLASSES = [{"id": 2, "name": "a"}, {"id": 1, "name": "b"}]
a_file = st.fixed_dictionaries(
    {
        "images": st.just(SOME_IMAGES),
        "categories": st.just(SOME_CLASSES),
        "annotations": st.lists(an_annotation, min_size=1, max_size=4),
    }
)
a_changed_file = st.tuples(
    a_file, st.lists(st.integers(0, 9), min_size=2, max_size=4), json_values
).map(lambda drawn: changed(*drawn))


def read_coco(path: Path, folder: Path) -> list:
    content = coco.read_content(path)
    return coco.photos_of(content, lambda picture: folder / str(picture.file_name))


def a_coco_file_is_read_or_refused(content: bytes, folder: Path) -> None:
    path = folder / "train.json"
    path.write_bytes(content)
    try:
        photos = read_coco(path, folder)
    except UserError as error:
        assert str(path) in str(error)
        return
    data = Instances("coco", folder, ["a", "b"], [1, 2], photos, photos, [])
    for photo in photos:
        assert photo.height > 0 and photo.width > 0
        assert all(np.isfinite(thing.area) and thing.area >= 0 for thing in photo.things)
        assert all(isinstance(thing.crowd, bool) for thing in photo.things)
        assert all(np.isfinite(thing.box or 0).all() for thing in photo.things)
        polygons = [
            p for t in photo.things if isinstance(t.segmentation, list) for p in t.segmentation
        ]
        assert all(np.abs(polygon).max() < FAR for polygon in polygons)
        masks = masks_of(photo, data, crowds=True).masks
        assert masks.shape[1:] == (photo.height, photo.width)
    truth = mask_ap.truth_of(data)
    json.dumps([{**a, "segmentation": None} for a in truth["annotations"]], allow_nan=False)
    scored = [{**a, "score": 0.5, "segmentation": runs_of(a, truth)} for a in truth["annotations"]]
    judge.coco_ap(truth, scored)


def runs_of(annotation: dict, truth: dict) -> dict:
    image = next(r for r in truth["images"] if r["id"] == annotation["image_id"])
    return mask_ap.runs_of(annotation["segmentation"], image["height"], image["width"])


MINE["a COCO file is read or refused"] = Property(
    rarely(
        st.binary(max_size=60),
        rarely(a_changed_file, a_file, 3).map(lambda x: json.dumps(x).encode()),
        6,
    ),
    a_coco_file_is_read_or_refused,
)


def run_lengths_are_those_of_the_mask(value: tuple, folder: Path) -> None:
    """Both forms, and a form with empty runs in it, stand for the same pixels."""
    height, width, pixels, empty = value
    flat = np.array((pixels * (height * width))[: height * width], np.uint8)
    mask = np.asfortranarray(flat.reshape(width, height).T)
    truth = coco_mask.encode(mask)
    text = RunLengths((height, width), truth["counts"].decode())
    counts = checked_counts(text, height, width)
    assert np.array_equal(np.repeat(np.arange(len(counts)) % 2, counts), flat)
    split = counts.tolist()
    for place in empty:  # a run is cut in two by an empty one
        place %= len(split)
        cut = split[place] // 2
        split[place : place + 1] = [cut, 0, split[place] - cut]
    for runs in (text, RunLengths((height, width), split)):
        assert packed(checked_counts(runs, height, width), height, width) == truth


def run_lengths_that_do_not_fit_are_refused(value: tuple, folder: Path) -> None:
    """What is let through has been decoded here as pycocotools decodes it."""
    counts, height, width = value
    try:
        checked = checked_counts(RunLengths((height, width), counts), height, width)
    except ValueError:
        return
    assert checked.sum() == height * width and checked.min() >= 0
    if isinstance(counts, str):
        mask = coco_mask.decode({"size": [height, width], "counts": counts})
        assert np.array_equal(mask.T.ravel(), np.repeat(np.arange(len(checked)) % 2, checked))


symbols = st.text([chr(c) for c in range(46, 114)], max_size=12)


@st.composite
def counts_of_a_size(draw) -> tuple[list[int], int, int]:
    """Run lengths of any sign, which mostly sum to height x width."""
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(-2, 12), max_size=6))
    if draw(st.integers(0, 3)):
        counts.append(height * width - sum(counts))
    return counts, height, width


MINE |= {
    "run lengths are those of the mask": Property(
        st.tuples(
            st.integers(1, 9),
            st.integers(1, 9),
            st.lists(st.integers(0, 1), min_size=1, max_size=81),
            st.lists(st.integers(0, 9), max_size=3),
        ),
        run_lengths_are_those_of_the_mask,
    ),
    "run lengths that do not fit are refused": Property(
        counts_of_a_size()
        | st.tuples(
            symbols | st.lists(st.integers(-2, 12) | st.integers(), max_size=6),
            st.integers(1, 4),
            st.integers(1, 4),
        ),
        run_lengths_that_do_not_fit_are_refused,
    ),
}


def drawn_and_decoded_masks_agree(value: tuple, folder: Path) -> None:
    """A polygon along the edges of pixels, and the run lengths of its mask, look the same through
    any window that makes pixels whole times as large."""
    left, top, width, height, times, flip, window = value
    mask = np.zeros((16, 20), np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    right, bottom = min(left + width, 20), min(top + height, 16)
    polygon = [np.array([left, top, right, top, right, bottom, left, bottom], float)]
    window = Window(flip, (16 * times, 20 * times), *window[:2], window[2:])
    data = Instances("coco", folder, ["a"], [1], [], [], [])
    runs = coco_mask.encode(mask)
    things = tuple(Thing(0, segmentation, False, 0.0) for segmentation in (polygon, runs))
    photo = Photo("x", folder, 1, 16, 20, things)
    drawn, decoded = masks_of(photo, data, window).masks
    assert torch.equal(drawn, decoded)
    whole = np.kron(mask[:, ::-1] if flip else mask, np.ones((times, times), np.uint8))
    rows = np.arange(window.out[0]) + window.top
    columns = np.arange(window.out[1]) + window.left
    inside = ((rows >= 0) & (rows < 16 * times))[:, None] & (columns >= 0)
    inside &= columns < 20 * times
    truth = whole[rows.clip(0, 16 * times - 1)[:, None], columns.clip(0, 20 * times - 1)]
    assert np.array_equal(decoded.numpy(), truth * inside)


MINE["drawn and decoded masks agree in any window"] = Property(
    st.tuples(
        st.integers(0, 19),
        st.integers(0, 15),
        st.integers(1, 20),
        st.integers(1, 16),
        st.integers(1, 3),
        st.booleans(),
        st.tuples(
            st.integers(-20, 50), st.integers(-20, 60), st.integers(1, 40), st.integers(1, 40)
        ),
    ),
    drawn_and_decoded_masks_agree,
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
    few(name, tmp_path, 200)
