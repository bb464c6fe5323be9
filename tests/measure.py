"""How the benchmarks measure seconds and memory."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(function: Callable, repeats: int = 1, on_gpu: bool = False) -> float:
    """Seconds of a call. On a CPU those that it computes, because others share the machine; on a
    GPU by the clock, until all that was begun is done."""
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    for _ in range(repeats):
        function()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def pair(
    a: Callable, b: Callable, rounds: int = 5, repeats: int = 1, on_gpu: bool = False
) -> tuple[float, float, float]:
    """Median seconds of a and of b, and the median of a / b over rounds. Both are called once
    before, and then in turn, so that a machine that is slow for a while is slow for both."""
    a()
    b()
    times = []
    for _ in range(rounds):
        times.append((seconds(a, repeats, on_gpu), seconds(b, repeats, on_gpu)))
    return (
        statistics.median(of_a for of_a, _ in times),
        statistics.median(of_b for _, of_b in times),
        statistics.median(of_a / of_b for of_a, of_b in times),
    )


def peak(function: Callable) -> int:
    """Bytes of the resident set that a call takes at most above what is taken before it (Linux)."""

    def status(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1])

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    function()
    return 1024 * (status("VmHWM") - before)
