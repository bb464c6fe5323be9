"""torchrun set-up, seeds, DDP and exact reductions. Every call works on one process without
torchrun, too."""

import inspect
import os
import re
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError


@dataclass(frozen=True)
class World:
    """Who we are among the processes, and where our tensors live."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def bf16(self, precision: str) -> bool:
        """Whether networks run in bf16: as told, or with `auto` on GPUs that compute in it."""
        if precision != "auto":
            return precision == "bf16"
        if self.device.type != "cuda":
            return False
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def share(self, batch_size: int, multiple: int = 1) -> int:
        """This process's part of a global batch: a multiple of `multiple`, and two at least
        (BatchNorm, mixing)."""
        step = self.size * multiple
        least = 2 * self.size
        if batch_size % step == 0 and batch_size >= least:
            return batch_size // self.size
        below = batch_size // step * step
        above = max(below + step, least)
        parts = f"{self.size} processes"
        if multiple > 1:
            parts += f" of a multiple of {multiple} images"
        advice = f"{below} or {above}" if below >= least else f"{above}"
        raise UserError(
            f"--batch-size {batch_size} is global and does not divide into {parts}, two images "
            f"each at least; take {advice}."
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes (a new tensor)."""
        if self.size == 1:
            return tensor
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The sum over all processes divided by their number.

        DDP averages gradients, so a local loss divided by the mean of a count is the global
        loss."""
        return self.sum(tensor) / self.size

    def gather(self, tensor: Tensor) -> Tensor:
        """(B, ...) of this process -> (size * B, ...), in rank order. Equal shapes on all
        processes."""
        if self.size == 1:
            return tensor
        parts = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for _ in range(self.size)
        ]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def launched() -> World:
    """The world that torchrun describes in the environment, before joining it: to check settings
    against."""
    return World(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


def start(device: str = "auto", join: bool = True) -> World:
    """Join the group that torchrun describes in the environment; a world of one without it. With
    `join` False no group is made: the world says who we are, and nothing may be reduced.

    `device`: auto (GPUs when there are any), cpu, cuda. GPUs talk by NCCL, processors by gloo."""
    world = launched()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device, world)
    if device.startswith("cuda"):
        if device == "cuda":
            device = f"cuda:{world.local_rank}"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if world.size > 1 and join:
        join_group(device)
    return replace(world, device=torch.device(device))


def check_device(device: str, world: World) -> None:
    """UserError for a device that is not there, or that several processes would share."""
    if device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"--device {device}: give auto, cpu, cuda or cuda:N.")
    if device == "cpu":
        return
    if device != "cuda" and world.size > 1:
        raise UserError(
            f"--device {device} would put all {world.size} processes on one GPU; give --device "
            f"cuda, and choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: this PyTorch sees no GPU; use --device cpu or install a CUDA "
            f"build."
        )
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"Process {world.local_rank} of this machine has no GPU of its own: "
            f"{torch.cuda.device_count()} GPU(s) seen; lower --nproc_per_node or use --device cpu."
        )


def join_group(device: str) -> None:
    """Wait for the other processes; UserError when torchrun's port is taken."""
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=60))
    except RuntimeError as error:  # DistNetworkError is a RuntimeError
        if "address already in use" in str(error).lower():
            raise UserError(
                f"Port {os.environ.get('MASTER_PORT')} is in use on this machine; give torchrun "
                f"another one, for example --master_port 29501."
            ) from None
        raise


def warn_of_slow_bf16(precision: str, world: World) -> None:
    """Say at the start of a run that this CPU emulates bf16, which takes many times as long."""
    if world.device.type != "cpu" or not world.main or not world.bf16(precision):
        return
    times_as_long = seconds_of_convolution(torch.bfloat16) / seconds_of_convolution(torch.float32)
    if times_as_long > 3:
        print(
            f"This CPU emulates bf16: a convolution takes {times_as_long:.0f} times as long as in "
            f"float32; give --precision fp32.",
            file=sys.stderr,
            flush=True,
        )


def seconds_of_convolution(kind: torch.dtype) -> float:
    """CPU seconds of a small convolution, forward and backward."""
    image = torch.ones(2, 32, 32, 32, dtype=kind, requires_grad=True)
    weight = torch.ones(32, 32, 3, 3, dtype=kind, requires_grad=True)
    seconds = []
    for _ in range(3):  # the first one is slower
        start = time.process_time()
        torch.conv2d(image, weight, padding=1).sum().backward()
        seconds.append(time.process_time() - start)
    return max(min(seconds), 1e-6)


def stop() -> None:
    """Leave the process group, so that no process lingers."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def key(*parts: int | str) -> list[int]:
    """Seed material from names and numbers, the same on every platform and in every process."""
    return [zlib.crc32(p.encode()) if isinstance(p, str) else int(p) for p in parts]


def rng(*parts: int | str) -> np.random.Generator:
    """A generator that depends on its arguments alone: rng(seed, "crop", step, sample)."""
    return np.random.default_rng(key(*parts))


def seed_torch(*parts: int | str) -> None:
    """Seed what layers draw from (initial weights, dropout) from names and numbers alone."""
    seed = int(np.random.SeedSequence(key(*parts)).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(seed)


def parallel(network: nn.Module, world: World) -> nn.Module:
    """The callable for training forward passes: DDP on several processes, the network itself on
    one.

    Keep the bare network for everything else (EMA, checkpoints, evaluation)."""
    if world.size == 1:
        return network
    # DDP warns of 1x1 convolutions in channels_last: their strides can be written in two ways.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")
    ddp = nn.parallel.DistributedDataParallel
    # Buffers are not sent around; the flag has another name since PyTorch 2.13.
    new_name = "forward_sync_buffers" in inspect.signature(ddp).parameters
    flag = "forward_sync_buffers" if new_name else "broadcast_buffers"
    device_ids = [world.device] if world.device.type == "cuda" else None
    # Gradients lie where they are exchanged from, which saves a copy of each.
    return ddp(network, device_ids=device_ids, gradient_as_bucket_view=True, **{flag: False})
