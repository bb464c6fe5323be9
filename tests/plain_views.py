"""Training samples of the two semantic scripts in the plain way, which the quick one is held
against: Pillow decodes, pictures and labels are resized whole, and then flipped and cropped."""

from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import gist_rist
import gta_seg
from common import transforms
from common.distributed import rng
from common.semantic import Batch, Pictures, Segmentation


def plain_image(path: Path) -> Tensor:
    with Image.open(path) as file:
        pixels = np.array(file.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def plain_label(path: Path, data: Segmentation) -> Tensor:
    with Image.open(path) as file:
        values = np.array(file)
    allowed = 256 if data.to_class is not None else len(data.classes)
    wrong = values[(values < 0) | ((values >= allowed) & (values != 255))]
    assert not wrong.size
    if data.to_class is not None:
        values = data.to_class[values.astype(np.uint8)]
    return torch.from_numpy(values.astype(np.uint8))


def plain_view(
    image: Tensor, label: Tensor | None, view: transforms.View, pad_label: int = 255
) -> tuple[Tensor, Tensor, Tensor]:
    image, label = transforms.resize(image, label, view.size)
    if view.flip:
        image = image.flip(-1)
        label = None if label is None else label.flip(-1)
    return transforms.crop(image, label, view.top, view.left, *view.out, pad_label)


def plain_resized(
    image: Tensor, label: Tensor | None, times: float
) -> tuple[Tensor, Tensor | None]:
    if times == 1:
        return image, label
    size = tuple(round(side * times) for side in image.shape[-2:])
    small = torch.nn.functional.interpolate(
        image[None].float(), size=size, mode="bilinear", antialias=True
    )[0]
    if label is not None:
        _, label = transforms.resize(image, label, size)
    return small.round().clamp(0, 255).byte(), label


def plain_sample(
    script: ModuleType,
    args: gta_seg.Args | gist_rist.Args,
    views: Pictures,
    place: tuple[int, int, int],
) -> Batch:
    """What `views[place]` is."""
    index, step, sample = place
    picture = views.pictures[index]
    image = plain_image(picture.image)
    label = plain_label(picture.label, views.data) if views.labels else None
    g = rng(views.seed, views.name, step, sample)
    pad_label = 255
    if script is gist_rist:
        image, label = plain_resized(image, label, args.resize)
    elif args.recipe == "released":
        pad_label = 0
    size = script.random_size(image.shape[-2:], *args.scale, g)
    view = transforms.random_view(size, args.crop_size, g)
    image, label, valid = plain_view(image, label, view, pad_label)
    return Batch(image, valid, label, torch.tensor(0))
