"""A pretended accelerator for machines without one: tensors say `meta`, hold their values on the
CPU, and refuse to mix with CPU tensors where a GPU refuses. Values are the CPU's, so a run must end
as there.

It finds what a first run on a GPU would find: a constant left behind, an index on the wrong side,
numpy without .cpu(). It does not find what depends on CUDA's own kernels, streams or memory. It
also counts the waits for a GPU."""

import functools
import importlib
import re
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

HERE, CPU = torch.device("meta"), torch.device("cpu")


# on a GPU, by indices that may be on the CPU
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


# their sizes come back
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount", "nms"}


WAITS = Counter()  # since the start, by operator


class Far(Tensor):
    """A tensor on the pretended device; `near` has its values."""

    @staticmethod
    def __new__(cls, near: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            dtype=near.dtype,
            device=HERE,
            storage_offset=near.storage_offset(),
            requires_grad=near.requires_grad,
        )

    def __init__(self, near: Tensor):
        self.near = near.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Far({self.near})"

    def tolist(self) -> list:
        WAITS["tolist"] += 1
        return self.near.tolist()

    def new_tensor(self, values, **more) -> Tensor:
        return self.near.new_tensor(values, **more).to(HERE)

    def numpy(self, *args, **more):
        raise TypeError("a tensor of the pretended device has no numpy array; .cpu() comes first")

    __array__ = numpy


class Pretend(TorchDispatchMode):
    """Also makes tensors: torch.zeros(2, device=HERE) and x.to(HERE) are Far."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Generator(torch._C.Generator):
    """Says that it is on the device it was asked for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, device=CPU)
        made.asked = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.asked


def near_of(x):
    return x.near if isinstance(x, Far) else x


def dispatch(func, args: tuple, kwargs: dict):
    """Every operator: refuse to mix, compute on the CPU, and give back results on the device that a
    GPU would."""
    name = func._schema.name.split("::")[1]
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in given if isinstance(x, Far)]
    here = [x for x in given if not isinstance(x, Far)]
    assert all(x.device != HERE for x in here), f"{func} of a tensor that lost its values"
    if name in INDEXED and isinstance(args[0], Far):
        here = [x for x in args[2:3] if not isinstance(x, Far)]  # values, not indices
    if far and name not in ("copy_", "_to_copy") and any(x.dim() for x in here):
        raise RuntimeError(
            f"{func} of tensors on the pretended device and on the CPU: "
            f"{[(tuple(x.shape), x.device.type) for x in given if isinstance(x, Tensor)]}"
        )
    there = any(isinstance(x, Far) for x in given)
    masks = (
        [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in INDEXED else []
    )
    moved = (
        name == "_to_copy"
        and "device" in kwargs
        and not kwargs.get("non_blocking")
        and there != (torch.device(kwargs["device"] or CPU) == HERE)
    )
    WAITS[name] += there and (name in WAITING or bool(masks)) or moved
    where = (
        torch.device(kwargs["device"])
        if kwargs.get("device") is not None
        else HERE
        if there
        else CPU
    )
    if name == "copy_":
        where = args[0].device
    args_near, kwargs_near = tree_map(near_of, (args, kwargs))
    out = func(
        *args_near, **kwargs_near | ({"device": CPU} if kwargs.get("device") is not None else {})
    )
    if where == HERE:
        out = tree_map(
            lambda x: Far(x) if isinstance(x, Tensor) and not isinstance(x, Far) else x, out
        )
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def install() -> None:
    """From now on, networks and batches of this process go to the pretended device."""
    from common import distributed

    start, save, tensor, autocast = distributed.start, torch.save, torch.tensor, torch.autocast
    devices = _foreach_utils._get_foreach_kernels_supported_devices()
    distributed.start = lambda *args, **more: replace(start(*args, **more), device=HERE)
    torch.Generator = Generator
    torch.save = lambda content, *args, **more: save(tree_map(near_of, content), *args, **more)
    torch.tensor = lambda values, device=None, **more: tensor(values, **more).to(device or CPU)
    torch.autocast = lambda kind, *args, **more: autocast(
        "cpu" if kind == "meta" else kind, *args, **more
    )
    _foreach_utils._get_foreach_kernels_supported_devices = lambda: [*devices, "meta"]
    Pretend().__enter__()


def counted(step):
    """The function, which prints after each call how often it waited."""

    @functools.wraps(step)
    def counting(*args, **more):
        before = WAITS.total()
        out = step(*args, **more)
        print(f"{step.__name__} waited {WAITS.total() - before} times")
        return out

    return counting


def count(script: str, *steps: str) -> None:
    """`install`, and these functions of the script are `counted`."""
    install()
    module = importlib.import_module(script)
    for step in steps:
        setattr(module, step, counted(getattr(module, step)))


def waits(said: str) -> list[int]:
    """What `counted` printed."""
    return [int(found) for found in re.findall(r" waited (\d+) times", said)]
