"""Training samples and whole pictures, in what order they come, and who reads them. Order and
augmentation depend on (seed, step, sample) alone: not on workers, processes or restarts."""

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.distributed import World, rng
from common.runs import RankError
from data.read import BrokenImage, Picture, Segmentation, helpers, load


class Batch(NamedTuple):
    """`images` (B, 3, H, W) uint8, `valid` (B, H, W) bool, `label` (B, H, W) uint8 (all 255 where
    none was opened)."""

    images: Tensor
    valid: Tensor
    label: Tensor
    skipped: Tensor  # (B,) how many broken images were passed over

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self))


class Pictures(Dataset):
    """Training samples by key (index, step, sample); `augment(image, label or None, rng)` -> image,
    label, valid."""

    def __init__(
        self,
        pictures: list[Picture],
        data: Segmentation,
        labels: bool,
        augment: Callable,
        seed: int,
        name: str,
    ):
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
        raise RankError(
            f"None of the {len(self.pictures)} {self.name} images can be read, such as {picture.image}."
        )


class Stream(Sampler):
    """Batches of keys (index, step, sample) of this process for steps start..stop: passes over n
    pictures, each in an order that depends on the seed, the stream's name and the number of the
    pass."""

    def __init__(
        self, n: int, batch_size: int, seed: int, name: str, start: int, stop: int, world: World
    ):
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
                    epoch, order = (
                        turn,
                        rng(self.seed, "order", self.name, turn).permutation(self.n),
                    )
                keys.append((int(order[place]), step, sample))
            yield keys


def stream(
    dataset: Pictures, batch_size: int, start: int, stop: int, world: World, workers: int
) -> Iterator[Batch]:
    """The batches of this process for steps start..stop; nothing is read before the first is asked
    for."""
    if start < stop:
        keys = Stream(len(dataset), batch_size, dataset.seed, dataset.name, start, stop, world)
        yield from DataLoader(
            dataset, batch_sampler=keys, pin_memory=world.device.type == "cuda", **helpers(workers)
        )


class Whole(Dataset):
    """Whole pictures. With labels, for scoring, a broken one stops the evaluation, which needs
    every image; without labels, its image is None."""

    def __init__(self, pictures: list[Picture], data: Segmentation, labels: bool = True):
        self.pictures, self.data, self.labels = pictures, data, labels

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, Tensor | None]:
        try:
            return (index, *load(self.pictures[index], self.data, self.labels))
        except BrokenImage as error:
            if self.labels:
                raise
            warnings.warn(f"{error}; it is left out", stacklevel=2)
            return index, None, None


def score_loader(
    pictures: list[Picture], data: Segmentation, world: World, workers: int, labels: bool = True
) -> DataLoader:
    """(index, image, label), one picture at a time, each on exactly one process."""
    mine = torch.utils.data.Subset(
        Whole(pictures, data, labels), range(world.rank, len(pictures), world.size)
    )
    return DataLoader(mine, batch_size=None, **helpers(min(workers, 4)))
