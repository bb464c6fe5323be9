"""How often a student's step of better_pseudo_labels.py on 2 + 2 images would wait for a GPU, and
how many kernels it would launch there, counted on a CPU with the small network of drawn scenes:
`make bench`. For waits the accelerator is pretended (`pretend.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu_check
import pretend
from counting import count

from common import distributed


def training() -> gpu_check.Training:
    """A step in which the teacher finds objects, although it has learned nothing."""
    args = gpu_check.tiny("better", federated=3)
    found = gpu_check.better(args, gpu_check.CLASSES, 2, distributed.start("cpu"))
    gpu_check.make_comparable(found.networks)
    found.step()
    return found


def bench_waits() -> None:
    kernels = count(training().step).kernels.total()
    pretend.install()
    step = training().step
    before = pretend.WAITS.total()
    log = step()
    print(
        f"better_pseudo_labels, a student's step of 2 + 2 images with "
        f"{float(log['pseudo_per_image'].near):.0f} pseudo labels an image: "
        f"{pretend.WAITS.total() - before} waits for the device, {kernels} kernels"
    )


if __name__ == "__main__":
    bench_waits()
