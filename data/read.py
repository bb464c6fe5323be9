"""Images, labels and weights as they lie on disk: what a data set is, how files are read, and by
which processes."""

import os
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.runs import RankError, UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Picture(NamedTuple):
    """One image on disk; `label` is None when there is no label file, or none may be opened."""

    name: str
    image: Path
    label: Path | None


@dataclass
class Segmentation:
    """A data set as found on disk. `to_class` maps the values of a label file to class indices
    (None: as they are)."""

    name: str
    root: Path
    classes: list[str]
    train: dict[str, Picture]
    val: list[Picture]
    extra: list[Picture] = field(default_factory=list)  # images that never had labels
    to_class: np.ndarray | None = None


# ------------------------------------------------------------------------------------------ reading
def image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)


class BrokenImage(RankError):
    """An image that cannot be decoded: training skips it, evaluation stops."""


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB, with the camera's rotation applied to nothing: pixels as they lie in the
    file."""
    try:
        with Image.open(path) as file:
            if file.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
            if file.mode.startswith("I"):  # 16 bits, which PIL would cut to white
                grey = np.array(file)
                file = Image.fromarray(
                    (grey // 257 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8)
                )
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (
        OSError,
        UnidentifiedImageError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise BrokenImage(f"{path} cannot be read as an image ({error})") from None


def pictures(paths: list[str]) -> list[Path]:
    """The images that --predict names, folders opened; UserError when there are none."""
    files = [f for p in map(Path, paths) for f in (image_files(p) if p.is_dir() else [p])]
    if not files:
        raise UserError(
            "--predict needs a checkpoint and then images, or folders that hold some: "
            "--predict runs/x/best.pt photos/"
        )
    return files


def readable(files: list[Path], world) -> Iterator[tuple[int, Path, Tensor]]:
    """Place, file and image of those that this process shall predict; files that are no images are
    said and passed over, but an only one is an error."""
    for i, file in list(enumerate(files))[world.rank :: world.size]:
        try:
            yield i, file, read_image(file)
        except BrokenImage as error:
            if len(files) == 1:
                raise
            print(f"passed over: {error}", file=sys.stderr, flush=True)


def read_label(path: Path, data: Segmentation) -> Tensor:
    """(H, W) uint8 class indices. Palette files are read as indices, never as colours or grey
    values.

    Raises UserError (RankError, one process may meet it alone) when a value is not a class."""
    try:
        with Image.open(path) as file:
            mode, values = file.mode, np.array(file)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise RankError(
            f"The label {path} cannot be read ({error}); fetch or make it again."
        ) from None
    if values.ndim != 2 or mode not in ("P", "L", "1", "I", "I;16"):
        raise RankError(
            f"The label {path} is a colour picture (mode {mode}); labels are single-channel PNGs of class "
            f"indices."
        )
    if data.to_class is not None:
        return torch.from_numpy(data.to_class[np.clip(values, 0, 255)])
    wrong = values[(values >= len(data.classes)) & (values != 255)]
    if wrong.size:
        raise RankError(
            f"The label {path} holds the value {int(wrong.flat[0])}, but there are {len(data.classes)} "
            f"classes (0 to {len(data.classes) - 1}, 255 to ignore); correct the file or classes.txt."
        )
    return torch.from_numpy(values.astype(np.uint8))


def load(picture: Picture, data: Segmentation, labels: bool = True) -> tuple[Tensor, Tensor | None]:
    """Image and, when `labels`, its label (None for a picture without one); they must be of one
    size."""
    image = read_image(picture.image)
    if not labels or picture.label is None:
        return image, None
    label = read_label(picture.label, data)
    if label.shape != image.shape[-2:]:
        raise RankError(
            f"{picture.image} has {image.shape[2]}x{image.shape[1]} pixels but its label {picture.label} "
            f"has {label.shape[1]}x{label.shape[0]}; they must agree."
        )
    return image, label


# ------------------------------------------------------------------------------------- weight files
class ArraysOnly(pickle.Unpickler):
    """Detectron2 and Caffe2 .pkl files: dicts of numpy arrays and nothing else may be built."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weight file")
        return super().find_class(module, name)


def read_pickle(path: Path):
    """A pickled dict of arrays, without the means to run anything."""
    with open(path, "rb") as file:
        return ArraysOnly(file, encoding="latin1").load()


PLACES = {"reduce": 1, "conv3x3": 2, "increase": 3}


def deeplab_name(name: str) -> str:
    """A tensor's name in a weight file of DeepLabV2 (layouts A to E of docs/gist_rist.md) -> that
    of torchvision's and timm's ResNet; branches of the classifier become head.0 to head.3."""
    name = re.sub(r"^(Scale|backbone|base)\.", "", name)
    name = re.sub(r"^(layer5\.conv2d_list\.|classifier\.|aspp\.c)(\d)\.", r"head.\2.", name)
    # C: the stem, and stages 2 to 5
    name = re.sub(r"^layer1\.conv1\.(conv|bn)\.", r"\g<1>1.", name)
    if not (found := re.match(r"layer(\d)\.block(\d+)\.(\w+)\.(conv|bn)\.(.+)", name)):
        return name
    stage, block, place, kind, rest = found.groups()
    layer = (
        f"downsample.{int(kind == 'bn')}"
        if place == "shortcut"
        else f"{kind}{PLACES.get(place, place)}"
    )
    return f"layer{int(stage) - 1}.{int(block) - 1}.{layer}.{rest}"


# -------------------------------------------------------------------------------- reading processes
def helpers(workers: int) -> dict:
    """DataLoader's arguments for decoding processes. They are forked, so that they end when the run
    is killed: children of a fork server outlive it."""
    if not workers:
        return {}
    return {
        "num_workers": workers,
        "worker_init_fn": quiet_worker,
        "prefetch_factor": 4,
        "multiprocessing_context": "fork",
    }


def quiet_worker(worker_id: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, and one thread is enough for a decoder."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def default_workers() -> int:
    """Two CPU cores: decode in the main process; more: up to eight helpers a process."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if cores <= 2 else min(8, max(1, cores // local - 1))
