"""Images and labels as they lie on disk: what a data set is, and how its files are read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.runs import RankError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Picture(NamedTuple):
    """One image on disk; `label` is None when there is no label file, or none may be opened."""
    name: str
    image: Path
    label: Path | None


@dataclass
class Segmentation:
    """A data set as found on disk. `to_class` maps the values of a label file to class indices (None: as they are)."""
    name: str
    root: Path
    classes: list[str]
    train: dict[str, Picture]
    val: list[Picture]
    extra: list[Picture] = field(default_factory=list)               # images that never had labels
    to_class: np.ndarray | None = None


# ------------------------------------------------------------------------------------------------ reading
def image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)


class BrokenImage(RankError):
    """An image that cannot be decoded: training skips it, evaluation stops."""


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB, with the camera's rotation applied to nothing: pixels as they lie in the file."""
    try:
        with Image.open(path) as file:
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{path} cannot be read as an image ({error})") from None


def read_label(path: Path, data: Segmentation) -> Tensor:
    """(H, W) uint8 class indices. Palette files are read as indices, never as colours or grey values.

    Raises UserError (RankError, one process may meet it alone) when a value is not a class."""
    try:
        with Image.open(path) as file:
            mode, values = file.mode, np.array(file)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise RankError(f"The label {path} cannot be read ({error}); fetch or make it again.") from None
    if values.ndim != 2 or mode not in ("P", "L", "1", "I", "I;16"):
        raise RankError(f"The label {path} is a colour picture (mode {mode}); labels are single-channel PNGs of class "
                        f"indices.")
    if data.to_class is not None:
        return torch.from_numpy(data.to_class[np.clip(values, 0, 255)])
    wrong = values[(values >= len(data.classes)) & (values != 255)]
    if wrong.size:
        raise RankError(f"The label {path} holds the value {int(wrong.flat[0])}, but there are {len(data.classes)} "
                        f"classes (0 to {len(data.classes) - 1}, 255 to ignore); correct the file or classes.txt.")
    return torch.from_numpy(values.astype(np.uint8))


def load(picture: Picture, data: Segmentation, labels: bool = True) -> tuple[Tensor, Tensor | None]:
    """Image and, when `labels`, its label (None for a picture without one); they must be of one size."""
    image = read_image(picture.image)
    if not labels or picture.label is None:
        return image, None
    label = read_label(picture.label, data)
    if label.shape != image.shape[-2:]:
        raise RankError(f"{picture.image} has {image.shape[2]}x{image.shape[1]} pixels but its label {picture.label} "
                        f"has {label.shape[1]}x{label.shape[0]}; they must agree.")
    return image, label
