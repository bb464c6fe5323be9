"""Colours and blur of pictures (3, H, W) uint8 RGB: torchvision's and Pillow's, several times as
fast, by tables and in pieces that stay in the processor's cache.

Tests hold these functions against the libraries: colours are equal but for a level in one of a
hundred values, blur is equal but for rounding, four levels at most away from the border."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

PIECE = 32768  # pixels that are changed at a time
LUMA = (0.2989, 0.587, 0.114)  # shares of red, green and blue in the brightness of a pixel


def brightness(image: Tensor, factor: float) -> Tensor:
    """Every value times `factor`."""
    return through_table(image, LEVELS * np.float32(factor))


def contrast(image: Tensor, factor: float) -> Tensor:
    """Every value's distance from the picture's mean brightness times `factor`."""
    total = 0
    for red, green, blue in pieces(image):
        total += int(luma(red, green, blue).sum(dtype=np.float64))
    mean = np.float32(total / image[0].numel())
    return through_table(image, LEVELS * np.float32(factor) + mean * np.float32(1 - factor))


def saturation(image: Tensor, factor: float) -> Tensor:
    """Every value's distance from its pixel's brightness times `factor`."""
    rest = np.float32(1 - factor)
    factor = np.float32(factor)

    def change(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> tuple[np.ndarray, ...]:
        towards_grey = luma(red, green, blue) * rest
        for channel in (red, green, blue):
            channel *= factor
            channel += towards_grey
            np.maximum(channel, 0, out=channel)
            np.minimum(channel, 255, out=channel)
        return red, green, blue

    return by_pieces(image, change)


def grey(image: Tensor) -> Tensor:
    """Every pixel in its brightness, in three equal channels."""

    def change(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> tuple[np.ndarray, ...]:
        return (luma(red, green, blue),) * 3

    return by_pieces(image, change)


def hue(image: Tensor, turn: float) -> Tensor:
    """Every colour turned round the colour circle, by at most a third of it either way.

    On the circle, counted from 0 to 6, red, green and blue lie at 0, 2 and 4. With lo and hi the
    least and the largest of a pixel's values and c = hi - lo, the channel at place p of a colour at
    place h has the value lo + c * clamp(2 - distance(h, p), 0, 1). All distances are counted in
    units of c here, so that nothing is divided."""
    assert abs(turn) <= 1 / 3
    turn = np.float32(6 * turn)

    def change(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> tuple[np.ndarray, ...]:
        hi = np.maximum(red, green)
        np.maximum(hi, blue, out=hi)
        lo = np.minimum(red, green)
        np.minimum(lo, blue, out=lo)
        c = hi - lo
        third, circle = 2 * c, 6 * c
        h = red - green + 2 * third  # where blue is the largest
        np.copyto(h, blue - red + third, where=hi == green)
        np.copyto(h, green - blue, where=hi == red)
        h += turn * c
        lo *= UP_TO_256
        channels = (red, green, blue)
        for value in channels:
            np.abs(h, out=value)
            np.minimum(value, circle - value, out=value)  # the shorter way round
            np.subtract(third, value, out=value)
            np.maximum(value, 0, out=value)
            np.minimum(value, c, out=value)
            value *= UP_TO_256
            value += lo
            h -= third  # counted from the next channel's place
        return channels

    return by_pieces(image, change)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of deviation `sigma`, as Pillow has it: three boxes, which are run over the
    picture here as one kernel, first down and then across."""
    kernel = boxes(sigma)
    reach = len(kernel) // 2
    weights = np.rint(kernel[reach:] * 256).astype(np.uint16)  # sums stay below 65536
    weights[0] = 256 - 2 * weights[1:].sum()
    height, width = image.shape[1:]
    padded = np.pad(image.numpy(), ((0, 0), (reach, reach), (reach, reach)), "edge")
    out = np.empty(image.shape, np.uint8)
    rows = max(2 * PIECE // width, 1)
    for source, target in zip(padded, out, strict=True):
        for top in range(0, height, rows):
            high = min(rows, height - top)
            piece = source[top : top + high + 2 * reach].astype(np.uint16)
            piece = weighted([piece[i : i + high] for i in range(2 * reach + 1)], weights)
            piece = weighted([piece[:, i : i + width] for i in range(2 * reach + 1)], weights)
            target[top : top + high] = piece
    return torch.from_numpy(out)


def weighted(shifted: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """The weighted mean of uint16 arrays, of which the one in the middle has the first of the
    `weights` (in 256ths) and the two at a distance i have the weight i."""
    middle = len(shifted) // 2
    total = shifted[middle] * weights[0]
    total += 128
    for i in range(1, middle + 1):
        two = shifted[middle - i] + shifted[middle + i]
        two *= weights[i]
        total += two
    total >>= 8
    return total


def boxes(sigma: float) -> np.ndarray:
    """The kernel (n,), n odd, of three boxes whose joint deviation is `sigma`. The ends of a box
    weigh less than the rest of it, so that every deviation can be had (P. Gwosdek et al.,
    Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011)."""
    variance = sigma**2 / 3
    reach = int((np.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * reach + 1) * (reach * (reach + 1) - 3 * variance)
    end /= 6 * (variance - (reach + 1) ** 2)
    box = np.array([end, *[1] * (2 * reach + 1), end])
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box)


# ------------------------------------------------------------------------------------------- pieces
LEVELS = np.arange(256, dtype=np.float32)
UP_TO_256 = np.float32((256 - 1e-3) / 255)  # torchvision's way from 0..1 back to whole levels


def through_table(image: Tensor, table: np.ndarray) -> Tensor:
    """Each level replaced by what the table (256,) has for it, cut off at 0 and 255."""
    levels = table.clip(0, 255).astype(np.uint8).tobytes()
    changed = bytearray(image.numpy().tobytes().translate(levels))
    return torch.frombuffer(changed, dtype=torch.uint8).view(image.shape)


def by_pieces(image: Tensor, change: Callable) -> Tensor:
    """The picture whose red, green and blue are those that `change` makes of (n,) float32 each."""
    out = np.empty((3, image[0].numel()), np.uint8)
    at = 0
    for piece in pieces(image):
        for channel, values in zip(out, change(*piece), strict=True):
            channel[at : at + len(values)] = values
        at += piece.shape[1]
    return torch.from_numpy(out).view(image.shape)


def pieces(image: Tensor) -> Iterator[np.ndarray]:
    """The pixels of a picture, (3, n) float32 at a time."""
    pixels = image.reshape(3, -1).numpy()
    for at in range(0, pixels.shape[1], PIECE):
        yield pixels[:, at : at + PIECE].astype(np.float32)


def luma(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """The brightness of pixels, in whole levels."""
    total = red * np.float32(LUMA[0])
    total += green * np.float32(LUMA[1])
    total += blue * np.float32(LUMA[2])
    return np.floor(total, out=total)
