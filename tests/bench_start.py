"""What a command costs before it trains, over what it cannot do without: `make bench`. Starting a
script, over importing the libraries that it needs for that; the look at the beginning of a run, and
--check, over plain loops that open or decode the same files once. CPU seconds of all processes, as
medians of alternating pairs."""

import contextlib
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from common import check, semantic

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = ("gta_seg", "gist_rist", "guided_distillation", "better_pseudo_labels")
LIBRARIES = "import numpy, PIL.Image, msgspec, torch, torch.distributed, tyro"


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def cost(function: Callable[[], object]) -> float:
    before = cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        function()
    return cpu_seconds() - before


def ratio(ours: Callable[[], object], plain: Callable[[], object], pairs: int = 5) -> float:
    cost(ours), cost(plain)  # files are in the system's memory from here on
    return statistics.median(cost(ours) / cost(plain) for _ in range(pairs))


def python(*line: str) -> None:
    subprocess.run([sys.executable, *line], cwd=REPO, check=True, capture_output=True)


def bench_start() -> None:
    for name in SCRIPTS:
        over = ratio(
            lambda name=name: python(f"{name}.py", "--help"), lambda: python("-c", LIBRARIES), 3
        )
        print(f"start of {name}.py (--help): {over:.2f} of importing torch and what reads it")


def draw(root: Path, number: int) -> semantic.Segmentation:
    """A folder of images as large as VOC's, and of their labels."""
    g = np.random.default_rng(0)
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for i in range(number // 2):
            coarse = Image.fromarray(g.integers(0, 256, (24, 32, 3), np.uint8))
            label = Image.fromarray(g.integers(0, 21, (6, 8)).astype(np.uint8))
            coarse.resize((500, 375)).save(root / "images" / part / f"{i:04d}.jpg")
            label.resize((500, 375), Image.NEAREST).save(root / "labels" / part / f"{i:04d}.png")
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(21)))
    return semantic.find("folder", root)


def bench_looks(number: int = 400) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = draw(Path(folder), number)
        labeled = list(data.train.values())

        def heads_and_labels() -> None:
            for picture in labeled + data.val:
                for path in (picture.image, picture.label):
                    with Image.open(path) as file:
                        assert file.size == (500, 375)
            for picture in labeled:
                with Image.open(picture.label) as file:
                    np.unique(np.array(file))

        def everything() -> None:
            for picture in labeled + data.val:
                with Image.open(picture.image) as file:
                    np.array(file.convert("RGB"))
                with Image.open(picture.label) as file:
                    np.unique(np.array(file))

        def look() -> None:
            check.look_at_all(data, labeled, [], data.val)

        def look_anew() -> None:
            (data.root / check.MEMORY).unlink(missing_ok=True)
            look()

        first = ratio(lambda: check.first_look(data, labeled, data.val), heads_and_labels)
        whole = ratio(look_anew, everything)
        again = ratio(look, everything)
    files = f"{number} images and their labels"
    print(f"the look at {files} before a run: {first:.2f} of a loop that reads as much")
    print(f"--check of {files}: {whole:.2f} of a loop that decodes them; again: {again:.2f}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    bench_start()
    bench_looks()
