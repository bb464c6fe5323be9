"""Training samples of the two semantic scripts: made quickly, and equal to the plain way."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import gist_rist
import gta_seg
from common import files, semantic, transforms
from tests.plain_views import plain_sample, plain_view

# Elsewhere torch rounds once where it resizes 8 bits, and not after each of the two axes.
ROUNDS_TWICE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    g = np.random.default_rng(height * width)
    return g.integers(0, 256, (height, width, channels), dtype=np.uint8)


def same_pixels(a: torch.Tensor, b: torch.Tensor) -> bool:
    apart = (a.int() - b.int()).abs().max()
    return a.shape == b.shape and apart <= (0 if ROUNDS_TWICE else 1)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_only_what_a_window_shows_is_resized(side_by_side):
    """Windows inside of a picture, over its borders and round it, of larger and smaller sizes."""
    g = np.random.default_rng(0)
    for _ in range(300):
        height, width = g.integers(2, 90, 2)
        image = torch.from_numpy(noise(height, width)).permute(2, 0, 1)
        if not side_by_side:
            image = image.contiguous()
        label = torch.from_numpy(noise(height, width, 1)[..., 0])
        size = tuple(int(max(side * g.uniform(0.4, 2.5), 2)) for side in (height, width))
        view = transforms.random_view(size, tuple(g.integers(1, 120, 2).tolist()), g)
        made = transforms.cut_out(image, label, view, 7)
        plain = plain_view(image.contiguous(), label, view, 7)
        assert same_pixels(made[0], plain[0]), view
        assert torch.equal(made[1], plain[1]) and torch.equal(made[2], plain[2]), view
        assert all(x.is_contiguous() for x in made)
        without = transforms.cut_out(image, None, view, 7)
        assert (without[1][without[2]] == 255).all() and (without[1][~without[2]] == 7).all()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", ["voc", "cityscapes"])
@pytest.mark.parametrize("script", [gta_seg, gist_rist])
def test_samples_are_those_of_the_plain_way(tmp_path, monkeypatch, script, name, quick):
    if quick:
        pytest.importorskip("kornia_rs")
    else:
        monkeypatch.setattr(files, "quick", None)
    to_class = None
    values = noise(60, 84, 1)[..., 0] % 19
    if name == "cityscapes":
        values = np.array(semantic.CITYSCAPES_IDS, np.uint8)[values]
        to_class = np.full(256, semantic.IGNORE, np.uint8)
        to_class[semantic.CITYSCAPES_IDS] = np.arange(19)
    Image.fromarray(values).save(tmp_path / "label.png")
    image = tmp_path / ("a.png" if name == "cityscapes" else "a.jpg")
    Image.fromarray(noise(60, 84)).save(image)
    picture = semantic.Picture("a", image, tmp_path / "label.png")
    classes = [str(i) for i in range(19)]
    data = semantic.Segmentation(name, tmp_path, classes, {}, [], to_class=to_class)
    crop = 50 if script is gta_seg else (40, 50)
    args = script.preset(name, crop_size=crop)
    for labels in (True, False):
        views = semantic.Pictures([picture], data, labels, partial(script.augment, args), 0, "x")
        for sample in range(30):
            made, plain = views[0, 3, sample], plain_sample(script, args, views, (0, 3, sample))
            assert same_pixels(made.images, plain.images)
            assert torch.equal(made.label, plain.label) and torch.equal(made.valid, plain.valid)


KINDS = {
    "444.jpg": dict(subsampling=0),
    "422.jpg": dict(subsampling=1),
    "420.jpg": dict(subsampling=2, quality=30),
    "progressive.jpg": dict(progressive=True),
    "turned.jpg": dict(exif=bytes.fromhex("45786966000049492a000800000001001201030001000000")
    + bytes.fromhex("0600000000000000")),
    "plain.png": {},
    "colour key.png": dict(transparency=(1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", [*KINDS, "grey.jpg", "cmyk.jpg", "grey.png", "alpha.png"])
def test_quick_pixels_are_pillows(tmp_path, monkeypatch, name):
    pytest.importorskip("kornia_rs")
    path = tmp_path / name
    mode = {"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}.get(path.stem, "RGB")
    picture = Image.fromarray(noise(37, 53)).resize((159, 111), Image.Resampling.BICUBIC)
    picture.convert(mode).save(path, **KINDS.get(name, {}))
    image = files.read_image(path)
    monkeypatch.setattr(files, "quick", None)
    assert torch.equal(image, files.read_image(path)) and image.is_contiguous()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_damaged_files_are_what_they_are_to_pillow(tmp_path, suffix):
    """The quick decoder objects, or finds the same pixels; it never ends the process."""
    quick = pytest.importorskip("kornia_rs").io
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(40, 60)).save(path)
    whole, g = path.read_bytes(), np.random.default_rng(1)
    refused = 0
    for i in range(120):
        damaged = bytearray(whole)
        if i % 3 == 0:
            damaged = damaged[: g.integers(1, len(whole))]
        for place in g.integers(0, len(damaged), 3 * (i % 3)):
            damaged[place] = g.integers(256)
        path.write_bytes(damaged)
        found = []
        for files.quick in (None, quick):
            try:
                found.append(files.read_image(path))
            except files.BrokenImage as error:
                found.append(str(error))
        if isinstance(found[0], str):
            assert found[0] == found[1]
            refused += 1
        else:
            assert torch.equal(*found)
    assert 0 < refused


def test_a_table_of_bytes():
    table = noise(16, 16, 1).ravel()
    values = noise(9, 13, 1)[..., 0]
    assert np.array_equal(semantic.through_table(values, table), table[values])
