"""common/colour.py against what it replaces: torchvision's colours, and Pillow's blur."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from common import colour

CHANGES = {
    "brightness": (colour.brightness, tv.adjust_brightness, (0.0, 0.6, 1.0, 1.37)),
    "contrast": (colour.contrast, tv.adjust_contrast, (0.0, 0.6, 1.0, 1.37)),
    "saturation": (colour.saturation, tv.adjust_saturation, (0.0, 0.6, 1.0, 1.37)),
    "hue": (colour.hue, tv.adjust_hue, (-1 / 3, -0.1, -0.02, 0.0, 0.07, 0.1, 1 / 3)),
    "grey": (lambda x, _: colour.grey(x), lambda x, _: tv.rgb_to_grayscale(x, 3), (None,)),
}


def every_kind_of_colour() -> Tensor:
    """All combinations of 17 levels of red, green and blue: greys, pure colours, and ties."""
    levels = [*range(0, 256, 16), 255]
    colours = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.uint8)
    return colours.T.reshape(3, 17, 17 * 17)


def noise(height: int, width: int, coarse: int = 1) -> Tensor:
    """Random colours in squares of `coarse` pixels, smoothed as in a photograph if these are
    larger than one."""
    g = np.random.default_rng(height + width)
    small = g.integers(0, 256, (-(-height // coarse), -(-width // coarse), 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def pillows_blur(image: Tensor, sigma: float) -> Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    blurred = np.array(picture.filter(ImageFilter.GaussianBlur(sigma)))
    return torch.from_numpy(blurred).permute(2, 0, 1)


PICTURES = {
    "every kind of colour": every_kind_of_colour(),
    "a photograph's": noise(241, 333, coarse=13),
    "noise": noise(190, 200),
    "one pixel": noise(1, 1),
    "a line": noise(1, 50),
    "white": torch.full((3, 9, 7), 255, dtype=torch.uint8),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("name", CHANGES)
def test_colours_are_torchvisions_but_for_a_level_here_and_there(name, kind):
    ours, theirs, strengths = CHANGES[name]
    image = PICTURES[kind]
    given = image.clone()
    for strength in strengths:
        got = ours(image, strength)
        wanted = theirs(image, strength)
        assert torch.equal(image, given), "the picture that was handed in has changed"
        assert got.shape == image.shape and got.dtype == torch.uint8 and got.is_contiguous()
        differ = (got.int() - wanted.int()).abs()
        assert differ.max() <= 1, strength
        if image.numel() > 100:
            assert (differ > 0).float().mean() < 0.01, strength


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("sigma", [0.1, 0.45, 1.0, 1.4, 1.42, 2.0])
def test_blur_is_pillows_but_for_rounding(sigma, kind):
    """Pillow rounds six times, we twice, with weights in 256ths; at the border it continues the
    picture anew before each of its three boxes, and we once."""
    image = PICTURES[kind]
    given = image.clone()
    got = colour.blur(image, sigma)
    assert torch.equal(image, given)
    assert got.shape == image.shape and got.dtype == torch.uint8 and got.is_contiguous()
    differ = (got.int() - pillows_blur(image, sigma).int()).abs()
    inside = differ[:, 6:-6, 6:-6]
    assert inside.numel() == 0 or inside.max() <= 4
    assert differ.float().mean() < (1.2 if kind == "a line" else 1)
    assert differ.max() <= (24 if kind in ("noise", "a line") else 4)  # at the border


@pytest.mark.parametrize("sigma", [0.1, 0.8, 1.41, 1.5, 2.0, 5.0])
def test_blurs_kernel_has_the_deviation_that_was_asked_for(sigma):
    kernel = colour.boxes(sigma)
    places = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1)
    assert np.allclose(kernel, kernel[::-1]) and (np.diff(kernel[places >= 0]) <= 0).all()
    assert (kernel * places**2).sum() == pytest.approx(sigma**2)


def test_blur_keeps_a_flat_picture_and_the_sum_of_a_point():
    flat = torch.full((3, 20, 30), 255, dtype=torch.uint8)
    point = torch.zeros(3, 31, 31, dtype=torch.uint8)
    point[:, 15, 15] = 255
    for sigma in (0.1, 0.7, 1.3, 2.0):
        assert torch.equal(colour.blur(flat, sigma), flat)
        blurred = colour.blur(point, sigma)
        assert torch.equal(blurred, blurred.flip(-1)) and torch.equal(blurred, blurred.flip(-2))
        assert blurred[0].sum().item() == pytest.approx(255, abs=26)


@pytest.mark.parametrize("name", [*CHANGES, "blur"])
def test_results_do_not_depend_on_how_a_picture_is_cut_into_pieces(name, monkeypatch):
    image = noise(61, 83, coarse=5)
    change = colour.blur if name == "blur" else CHANGES[name][0]
    strength = 0.09 if name == "hue" else 1.3
    whole = change(image, strength)
    for piece in (1, 100, 997):
        monkeypatch.setattr(colour, "PIECE", piece)
        assert torch.equal(change(image, strength), whole)


def test_colours_of_a_view_in_memory():
    """Pictures come as slices and as transposed arrays, too."""
    image = noise(40, 60, coarse=4)
    turned = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)[:, 3:-2, 5:]
    for change, strength in ((colour.hue, 0.1), (colour.contrast, 0.7), (colour.blur, 1.0)):
        assert torch.equal(change(turned, strength), change(turned.contiguous(), strength))


def test_hue_refuses_what_its_formula_does_not_cover():
    with pytest.raises(AssertionError):
        colour.hue(noise(2, 2), 0.4)
