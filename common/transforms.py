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


MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


def resize(
    image: Tensor, label: Tensor | None, size: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """Picture bilinear (half-pixel centres, no antialias), label nearest. `size` is (height,
    width)."""
    image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    if label is not None:
        label = F.interpolate(label[None, None], size=size, mode="nearest-exact")[0, 0]
    return image, label


def random_scale(
    image: Tensor, label: Tensor | None, low: float, high: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Scale both sides by one factor. Factors under and over 1 are equally likely when the range
    holds 1: half of the time uniform in [low, 1], else uniform in [1, high]."""
    if low < 1 < high:
        factor = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    else:
        factor = rng.uniform(low, high)
    height, width = image.shape[-2:]
    return resize(image, label, (max(int(height * factor), 2), max(int(width * factor), 2)))


def random_flip(
    image: Tensor, label: Tensor | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    """Left-right, half of the time."""
    if rng.random() < 0.5:
        image, label = image.flip(-1), None if label is None else label.flip(-1)
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
    h, w = image.shape[-2:]
    out = image.new_zeros(3, height, width)
    out_label = torch.full((height, width), pad_label, dtype=torch.uint8)
    valid = torch.zeros(height, width, dtype=torch.bool)
    y0, y1, x0, x1 = max(top, 0), min(top + height, h), max(left, 0), min(left + width, w)
    if y1 > y0 and x1 > x0:
        inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        out[(slice(None), *inside)] = image[:, y0:y1, x0:x1]
        out_label[inside] = 255 if label is None else label[y0:y1, x0:x1]
        valid[inside] = True
    return out, out_label, valid


def random_crop(
    image: Tensor,
    label: Tensor | None,
    size: int | tuple[int, int],
    rng: np.random.Generator,
    pad_label: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """A random window of `size` (one side, or height and width); what is shorter is padded equally
    on both ends."""
    sides = (size, size) if isinstance(size, int) else size
    top, left = (
        int(rng.integers(0, n - side + 1)) if n > side else -((side - n) // 2)
        for n, side in zip(image.shape[-2:], sides, strict=True)
    )
    return crop(image, label, top, left, *sides, pad_label)


def normalize(images: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 with ImageNet's mean and deviation; padding is exactly 0, the
    mean colour."""
    # no wait for a GPU
    mean, std = (values.to(images.device, non_blocking=True) for values in (MEAN, STD))
    images = (images.float() - mean) / std
    return images if valid is None else images * valid[:, None]


def jitter_and_blur(images: Tensor, rng: np.random.Generator) -> Tensor:
    """ClassMix's photometric noise, one draw for the whole batch (B, 3, H, W) in 0..255: jitter of
    strength 0.25 with probability 0.8, blur of deviation 0.15 to 1.15 with a kernel of a tenth of
    the side with 0.5."""
    from torchvision.transforms.v2 import functional as tv

    bright, contrast, colourful = rng.uniform(0.75, 1.25, 3)
    hue, jittered, blurred, sigma = rng.uniform((-0.25, 0, 0, 0.15), (0.25, 1, 1, 1.15))
    images = images / 255
    if jittered > 0.2:
        images = tv.adjust_contrast(tv.adjust_brightness(images, bright), contrast)
        images = tv.adjust_hue(tv.adjust_saturation(images, colourful), hue)
    if blurred > 0.5:
        images = tv.gaussian_blur(
            images, [int(0.1 * n) // 2 * 2 + 1 for n in images.shape[:-3:-1]], [sigma, sigma]
        )
    return images * 255
