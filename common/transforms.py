"""Joint geometry of a picture and its label map on uint8 tensors; padding is never a class, it is
marked invalid.

Picture (3, H, W) uint8 RGB; label (H, W) uint8 class indices, 255 ignore; valid (H, W) bool, False
where padded."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of RGB values in 0..255
IMAGENET_STD = (58.395, 57.12, 57.375)

MEAN = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
STD = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)


def resize(
    image: Tensor, label: Tensor | None, size: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Picture bilinear (half-pixel centres, no antialias), label nearest. `size` is (height,
    width)."""
    image = bilinear(image[None], size)[0]
    if label is not None:
        label = resize_label(label, size)
    return image, label


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Each place of `size` takes the nearest pixel of (H, W)."""
    return F.interpolate(label[None, None], size=size, mode="nearest-exact")[0, 0]


def crop(
    image: Tensor,
    label: Tensor | None,
    top: int,
    left: int,
    height: int,
    width: int,
    pad_label: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """The window at (top, left), which may reach over every border -> image, label, valid of
    (height, width).

    Outside, the image is 0, the label `pad_label` and valid False."""
    rows, image_rows = overlap(image.shape[-2], top, height)
    columns, image_columns = overlap(image.shape[-1], left, width)
    out = image.new_zeros(3, height, width)
    out_label = torch.full((height, width), pad_label, dtype=torch.uint8)
    valid = torch.zeros(height, width, dtype=torch.bool)
    out[:, rows, columns] = image[:, image_rows, image_columns]
    out_label[rows, columns] = 255 if label is None else label[image_rows, image_columns]
    valid[rows, columns] = True
    return out, out_label, valid


def overlap(length: int, start: int, side: int) -> tuple[slice, slice]:
    """On an axis of `length` pixels, a window of `side` begins at `start`: which part of the window
    lies on the axis, and which part of the axis lies in the window."""
    first = max(start, 0)
    stop = max(min(start + side, length), first)
    return slice(first - start, stop - start), slice(first, stop)


class View(NamedTuple):
    """What a training sample shows of a picture, which is resized to `size` (height, width), then
    flipped left-right, or not, and then cut: the window of size `out` at (top, left), which may
    reach over every border."""

    size: tuple[int, int]
    flip: bool
    top: int
    left: int
    out: tuple[int, int]


def random_view(
    size: tuple[int, int], out: int | tuple[int, int], rng: np.random.Generator
) -> View:
    """A picture that is resized to `size`, flipped half of the time, and a random window of it of
    the size `out` (one side, or height and width); what is shorter is padded equally on both ends.
    """
    flip = rng.random() < 0.5
    height, width = (out, out) if isinstance(out, int) else out
    top = random_start(size[0], height, rng)
    left = random_start(size[1], width, rng)
    return View(size, flip, top, left, (height, width))


def cut_out(
    image: Tensor, label: Tensor | None, view: View, pad_label: int = 255
) -> tuple[Tensor, Tensor, Tensor]:
    """The view of a picture and its label -> image, label, valid, as `resize`, a flip and `crop`
    make them, but only what the window shows is resized."""
    rows, image_rows = overlap(view.size[0], view.top, view.out[0])
    columns, image_columns = overlap(view.size[1], view.left, view.out[1])
    if view.flip:
        width = view.size[1]
        image_columns = slice(width - image_columns.stop, width - image_columns.start)
    direction = -1 if view.flip else 1
    out = np.zeros((3, *view.out), np.uint8)
    out_label = np.full(view.out, pad_label, np.uint8)
    valid = np.zeros(view.out, bool)
    part = resized_part(image, view.size, image_rows, image_columns)
    out[:, rows, columns] = part.numpy()[..., ::direction]
    if label is None:
        out_label[rows, columns] = 255
    else:
        label = resize_label(label, view.size)[image_rows, image_columns]
        out_label[rows, columns] = label.numpy()[:, ::direction]
    valid[rows, columns] = True
    return torch.from_numpy(out), torch.from_numpy(out_label), torch.from_numpy(valid)


def resized_part(image: Tensor, size: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """These rows and columns of the picture that `resize` makes.

    torch resizes 8 bits across, rounds, and then resizes down, so the two can be asked for one by
    one: across for the rows that the part is made of, down for its columns. That is equal to the
    bit on processors with AVX2; elsewhere torch rounds once, and a level may differ."""
    height = image.shape[-2]
    # as a batch whose colours lie side by side, as in a file that was decoded: twice as fast
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    first = max(rows.start * height // size[0] - 1, 0)
    stop = min(rows.stop * height // size[0] + 2, height)
    across = bilinear(batch[:, :, first:stop], (stop - first, size[1]))[..., columns]
    if first > 0 or stop < height:  # resizing down counts from the first row of the picture
        known = across
        across = torch.empty(1, height, known.shape[-1], 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        across[:, :, first:stop] = known
    return bilinear(across, (size[0], across.shape[-1]))[0, :, rows]


def bilinear(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W), with half-pixel centres and without antialias."""
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def random_start(length: int, side: int, rng: np.random.Generator) -> int:
    """Where a window of `side` begins on an axis of `length` pixels; negative where the axis is
    shorter, so that both ends are padded."""
    if length > side:
        return int(rng.integers(0, length - side + 1))
    return -((side - length) // 2)


def normalize(images: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 with ImageNet's mean and deviation; padding is exactly 0, the
    mean colour."""
    mean = MEAN.to(images.device, non_blocking=True)  # no wait for a GPU
    std = STD.to(images.device, non_blocking=True)
    images = (images.float() - mean) / std
    if valid is None:
        return images
    return images * valid[:, None]
