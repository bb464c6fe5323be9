"""Joint geometry of a picture and its label map on uint8 tensors; padding is never a class, it is
marked invalid.

Picture (3, H, W) uint8 RGB; label (H, W) uint8 class indices, 255 ignore; valid (H, W) bool, False
where padded."""

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
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    if label is not None:
        label = F.interpolate(label[None, None], size=size, mode="nearest-exact")[0, 0]
    return image, label


def random_flip(
    image: Tensor, label: Tensor | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Left-right, half of the time."""
    if rng.random() < 0.5:
        image = image.flip(-1)
        label = None if label is None else label.flip(-1)
    return image, label


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


def random_crop(
    image: Tensor,
    label: Tensor | None,
    size: int | tuple[int, int],
    rng: np.random.Generator,
    pad_label: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """A random window of `size` (one side, or height and width); what is shorter is padded equally
    on both ends."""
    height, width = (size, size) if isinstance(size, int) else size
    top = random_start(image.shape[-2], height, rng)
    left = random_start(image.shape[-1], width, rng)
    return crop(image, label, top, left, height, width, pad_label)


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
