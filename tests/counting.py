"""How many kernels a function would launch on a GPU, and how often it would wait for it there,
counted on a CPU from the operators that it calls."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from pretend import INDEXED, WAITING
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = {
    "_record_function_enter_new",
    "_record_function_exit",
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
    "resize_",
}


class Calls(NamedTuple):
    kernels: Counter  # operator -> how often
    waits: Counter


class Counting(TorchDispatchMode):
    """Operators that compute, by name. Views and memory without contents launch nothing; an
    operator on many tensors (_foreach_) counts once."""

    def __init__(self):
        super().__init__()
        self.calls = Calls(Counter(), Counter())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        returns = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        if not is_view and name not in NO_KERNEL:
            self.calls.kernels[name] += 1
        indices = args[1] if name in INDEXED else []
        by_mask = any(i is not None and i.dtype == torch.bool for i in tree_leaves(indices))
        if name in WAITING or by_mask:
            self.calls.waits[name] += 1
        return func(*args, **(kwargs or {}))


def count(function: Callable) -> Calls:
    """What a call of the function launches, and where it waits."""
    with Counting() as counting:
        function()
    return counting.calls
