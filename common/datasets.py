"""What lies on disk (VOC/SBD, Cityscapes, plain folders, the embedded set), how it is read, and in what order it
comes. Order and augmentation depend on (seed, step, sample) alone: not on workers, processes or restarts."""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.distributed import World, rng
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


class Batch(NamedTuple):
    """`images` (B, 3, H, W) uint8, `valid` (B, H, W) bool, `label` (B, H, W) uint8 (all 255 where none was opened)."""
    images: Tensor
    valid: Tensor
    label: Tensor
    skipped: Tensor                                                  # (B,) how many broken images were passed over

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self))


class Pictures(Dataset):
    """Training samples by key (index, step, sample); `augment(image, label or None, rng)` -> image, label, valid."""

    def __init__(self, pictures: list[Picture], data: Segmentation, labels: bool, augment: Callable, seed: int,
                 name: str):
        self.pictures, self.data, self.labels, self.augment = pictures, data, labels, augment
        self.seed, self.name = seed, name

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: tuple[int, int, int]) -> Batch:
        index, step, sample = place
        for skipped in range(len(self.pictures)):
            picture = self.pictures[(index + skipped) % len(self.pictures)]
            try:
                image, label = load(picture, self.data, self.labels)
            except BrokenImage as error:
                warnings.warn(f"{error}; training goes on without it", stacklevel=2)
                continue
            out = self.augment(image, label, rng(self.seed, self.name, step, sample))
            return Batch(out[0], out[2], out[1], torch.tensor(skipped))
        raise RankError(f"None of the {len(self.pictures)} {self.name} images can be read, such as {picture.image}.")


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


class Stream(Sampler):
    """Batches of keys (index, step, sample) of this process for steps start..stop: passes over n pictures, each in an
    order that depends on the seed, the stream's name and the number of the pass."""

    def __init__(self, n: int, batch_size: int, seed: int, name: str, start: int, stop: int, world: World):
        self.n, self.batch_size, self.seed, self.name = n, batch_size, seed, name
        self.steps, self.world = range(start, stop), world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        local, epoch, order = self.batch_size // self.world.size, -1, None
        for step in self.steps:
            keys = []
            for sample in range(self.world.rank * local, (self.world.rank + 1) * local):
                turn, place = divmod(step * self.batch_size + sample, self.n)
                if turn != epoch:
                    epoch, order = turn, rng(self.seed, "order", self.name, turn).permutation(self.n)
                keys.append((int(order[place]), step, sample))
            yield keys


def stream(dataset: Pictures, batch_size: int, start: int, stop: int, world: World, workers: int) -> Iterator[Batch]:
    """The batches of this process for steps start..stop; nothing is read before the first is asked for."""
    if start < stop:
        keys = Stream(len(dataset), batch_size, dataset.seed, dataset.name, start, stop, world)
        yield from DataLoader(dataset, batch_sampler=keys, pin_memory=world.device.type == "cuda", **helpers(workers))


class Whole(Dataset):
    """Whole pictures with labels for scoring; a broken one stops the evaluation, which needs every image."""

    def __init__(self, pictures: list[Picture], data: Segmentation):
        self.pictures, self.data = pictures, data

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return (index, *load(self.pictures[index], self.data))


def score_loader(pictures: list[Picture], data: Segmentation, world: World, workers: int) -> DataLoader:
    """(index, image, label), one picture at a time, each on exactly one process."""
    mine = torch.utils.data.Subset(Whole(pictures, data), range(world.rank, len(pictures), world.size))
    return DataLoader(mine, batch_size=None, **helpers(min(workers, 4)))


def helpers(workers: int) -> dict:
    """DataLoader's arguments for decoding processes. They are forked, so that they end when the run is killed: children
    of a fork server outlive it."""
    if not workers:
        return {}
    return {"num_workers": workers, "worker_init_fn": quiet_worker, "prefetch_factor": 4,
            "multiprocessing_context": "fork"}


def quiet_worker(worker_id: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, and one thread is enough for a decoder."""
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def default_workers() -> int:
    """Two CPU cores: decode in the main process; more: up to eight helpers a process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if cores <= 2 else min(8, max(1, cores // local - 1))
