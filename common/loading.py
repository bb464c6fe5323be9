"""In what order training samples come, and which processes read them.

Order and augmentation depend on (seed, step, sample) alone: not on workers, processes or restarts.
"""

import atexit
import multiprocessing.util  # registers its exit handler first, so that it runs after ours
import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from common.distributed import World, rng


class Stream(Sampler):
    """Batches of keys (index, step, sample) of this process for the steps start to stop.

    The run passes over `n` pictures again and again, each pass in an order that depends on the
    seed, the stream's name and the number of the pass. With repeat `factors` (n,), a pass holds a
    picture floor(r) or floor(r) + 1 times, r times on average.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        name: str,
        start: int,
        stop: int,
        world: World,
        factors: np.ndarray | None = None,
    ):
        self.n, self.batch_size, self.seed, self.name = n, batch_size, seed, name
        self.steps, self.world, self.factors = range(start, stop), world, factors

    def __len__(self) -> int:
        return len(self.steps)

    def order_of(self, turn: int) -> np.ndarray:
        """The indices of one pass, in their order."""
        draw = rng(self.seed, "order", self.name, turn)
        if self.factors is None:
            return draw.permutation(self.n)
        whole = np.floor(self.factors).astype(np.int64)
        repeats = whole + (draw.random(self.n) < self.factors - whole)
        return draw.permutation(np.arange(self.n).repeat(repeats))

    def passes(self, place: int) -> Iterator[tuple[int, np.ndarray]]:
        """(where it begins, its order) of each pass, from one at or before the sample `place` of
        the run. Passes with repeat factors differ in length, so these are counted from the first.
        """
        turn = place // self.n if self.factors is None else 0
        begin = turn * self.n
        while True:
            order = self.order_of(turn)
            yield begin, order
            turn += 1
            begin += len(order)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        local = self.batch_size // self.world.size
        mine = range(self.world.rank * local, (self.world.rank + 1) * local)
        passes = self.passes(self.steps.start * self.batch_size + mine.start)
        begin, order = next(passes)
        for step in self.steps:
            keys = []
            for sample in mine:
                place = step * self.batch_size + sample
                while place >= begin + len(order):
                    begin, order = next(passes)
                keys.append((int(order[place - begin]), step, sample))
            yield keys


def stream(
    views: Dataset,
    batch_size: int,
    start: int,
    stop: int,
    world: World,
    workers: int,
    factors: np.ndarray | None = None,
    collate: Callable | None = None,
) -> Iterator:
    """What `collate` (torch's own by default) makes of this process's samples of each step from
    start to stop. `views` has a `seed` and a `name` and is indexed by (index, step, sample).

    Nothing is read before the first batch is asked for, and torch's own generator is left alone.
    """
    if start >= stop:
        return
    keys = Stream(len(views), batch_size, views.seed, views.name, start, stop, world, factors)
    yield from DataLoader(
        views,
        batch_sampler=keys,
        collate_fn=collate,
        generator=torch.Generator(),
        pin_memory=world.device.type == "cuda",
        **helpers(workers),
    )


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


def end_helpers() -> None:
    """End the processes that this one started to read and decode. They do not hear SIGTERM, so
    Python, which sends that before it exits, would wait for them for ever."""
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(end_helpers)


def quiet_worker(worker_id: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process; one thread is enough for a decoder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def default_workers() -> int:
    """How many helpers decode for each process: none on two CPU cores, else eight at most."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return 0 if cores <= 2 else min(8, max(1, cores // processes_here - 1))
