"""How tests start the scripts: forked from a warm server (a tenth of a second), as commands, and
under torchrun."""

import fcntl
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

# before anything imports the hub, here and in the server that processes are forked from
os.environ["HF_HUB_OFFLINE"] = "1"


REPO = Path(__file__).resolve().parents[1]


TEST_DATA = (REPO / os.environ.get("TEST_DATA", "../shared/data")).resolve()


# A network of a few thousand weights, warm-up of two steps of `epoch` (2 steps: 8 unlabeled images,
# batches of 4)
TINY = {
    "backbone": "test_resnet",
    "weights": "none",
    "width": 8,
    "batch_size": 4,
    "crop_size": 32,
    "workers": 0,
}


# the environments of two processes; nobody listens at the address: none may wait
NEVER_MEET = [
    {
        "WORLD_SIZE": "2",
        "RANK": rank,
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for rank in "01"
]


# data sets, and what a user reads who does not have them
MISSING = [
    ("voc", "python -m data.download voc"),
    ("cityscapes", "python -m data.download cityscapes"),
    ("folder", "data/README.md"),
]


def stays_with(nodeid: str) -> str:
    """Tests for which this is equal stay on one worker of pytest-xdist, in their order: those of a
    file that makes something for all of them (a trained network, a drawn set). All others go to
    whichever worker is free."""
    file = nodeid.split("::")[0]
    return file if makes_something_once(REPO / file) else nodeid


@functools.cache
def makes_something_once(file: Path) -> bool:
    return re.search(r'fixture\(scope="(module|session)"', file.read_text()) is not None


_server = multiprocessing.get_context("forkserver")


# What starts need and what takes long to import, once for all of them.
_server.set_forkserver_preload(
    [
        "gta_seg",
        "gist_rist",
        "guided_distillation",
        "better_pseudo_labels",
        "tyro",
        "timm",
        "torchvision",
        "matplotlib.pyplot",
        "PIL.PngImagePlugin",
        "PIL.JpegImagePlugin",
        "scipy.optimize",
        "pycocotools.mask",
        "hotcoco",
        "pytest",
        "helpers",
    ]
)


# What multiprocessing reports when the server ended before it could pass on a child's exit code.
# Then the child itself, which is not hurt by that, says whether it came to its end.
SERVER_IS_GONE = 255


class Ran(NamedTuple):
    """What a finished command left. `code` is negative when a signal ended it."""

    code: int
    out: str
    err: str

    def ok(self) -> "Ran":
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def error(self) -> str:
        """The one sentence that a user gets to see when something is wrong."""
        said = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.out + self.err, self.err[-3000:]
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert len(said) == 1, f"{len(said)} lines start with 'error: '\n{self.err}"
        after = self.err[self.err.index(said[0]) + len(said[0]) :].strip()
        assert not after, f"the sentence goes on after its line: {after}"
        return said[0]


def argv(**flags) -> list[str]:
    """A command line: width=8 -> --width 8, scale=(1, 2) -> --scale 1 2, resume=True -> --resume,
    None is left out."""
    line = []
    if flags.get("dataset") == "shapes" and flags.get("method") != "suponly":
        flags = {"warmup_epochs": 1} | flags  # the preset's three would outlast a tiny run
    for name, value in flags.items():
        if value is None or value is False:
            continue
        line.append("--" + name.replace("_", "-"))
        if value is not True:
            line += [str(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return line


class Started:
    """A process forked from the server; its output goes to files, so that nothing blocks when it is
    killed."""

    def __init__(
        self,
        target: Callable,
        args: tuple,
        folder: Path,
        env: dict[str, str] | None = None,
        cwd: Path = REPO,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.monotonic_ns()}{random.randrange(1000)}"
        self.files = folder / f"{name}.out", folder / f"{name}.err"
        self.returned = folder / f"{name}.returned"
        self.process = _server.Process(
            target=_child, args=(target, args, self.files, self.returned, env or {}, cwd)
        )
        self.process.start()
        self.pid = self.process.pid

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self, number: int) -> None:
        if self.alive():
            os.kill(self.pid, number)

    def wait(self, seconds: float = 300) -> Ran:
        self.process.join(seconds)
        if self.alive():
            self.process.kill()
            self.process.join()
            out, err = self.read()
            raise AssertionError(f"still running after {seconds} s\n{out}\n{err[-3000:]}")
        code = self.process.exitcode
        if code == SERVER_IS_GONE:
            until(lambda: not Path(f"/proc/{self.pid}").exists(), seconds=seconds)
            code = 0 if self.returned.exists() else code
        return Ran(code, *self.read())

    def read(self) -> tuple[str, str]:
        out, err = (f.read_text() if f.exists() else "" for f in self.files)
        return out, err


def _child(
    target: Callable,
    args: tuple,
    files: tuple[Path, Path],
    returned: Path,
    env: dict[str, str],
    cwd: Path,
) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    target(*args)
    sys.stdout.flush()
    returned.touch()


def script(line: list[str], setup: Callable | None = None, name: str = "gta_seg") -> None:
    """What `python NAME.py LINE` does, after `setup()`; to be run in a process of its own."""
    from common import cli

    module = importlib.import_module(name)
    if setup is not None:
        setup()
    sys.argv = [f"{name}.py", *line]
    cli.cli(module.Args, module.settings, module.main, choosers=module.CHOOSERS, argv=line)


def begin(
    line: list[str],
    folder: Path,
    setup: Callable | None = None,
    env: dict[str, str] | None = None,
    cwd: Path = REPO,
    name: str = "gta_seg",
) -> Started:
    """Start the script with this command line, in a process forked from the warm server."""
    return Started(script, (line, setup, name), folder, env, cwd)


def run(
    line: list[str],
    folder: Path,
    setup: Callable | None = None,
    env: dict[str, str] | None = None,
    cwd: Path = REPO,
    name: str = "gta_seg",
) -> Ran:
    """The same, and wait for its end."""
    return begin(line, folder, setup, env, cwd, name).wait()


def begin_ranks(
    n: int, line: list[str], folder: Path, setup: Callable | None = None, name: str = "gta_seg"
) -> list[Started]:
    """Start the script on n processes of one machine, with the environment that torchrun gives
    them."""
    port = str(free_port())
    env = {
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [
        begin(line, folder, setup, {**env, "RANK": str(i), "LOCAL_RANK": str(i)}, name=name)
        for i in range(n)
    ]


def ranks(
    n: int, line: list[str], folder: Path, setup: Callable | None = None, name: str = "gta_seg"
) -> list[Ran]:
    """The same, and wait for the end of all."""
    return [p.wait() for p in begin_ranks(n, line, folder, setup, name)]


_ports = itertools.count(os.getpid() % 100)


def free_port() -> int:
    """A port of this machine on which nobody listens, another one at each call.

    Each worker of pytest-xdist has a range of its own, below the ports that the system gives away
    by itself, so that no other takes a port between this call and its use."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in _ports:
        port = 12_000 + 200 * (worker % 90) + number % 200
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """`folder`, filled by make(folder) unless a process of this run has done so; others wait."""
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def environment() -> dict[str, str]:
    """For real commands: one thread each, and nothing of a torchrun that pytest may run under."""
    ours = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    }
    return {**ours, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(line: list[str], timeout: float = 300, start: bool = False, cwd: Path = REPO):
    """`python LINE...` as a user types it -> Ran, or with `start` the running process."""
    keywords = dict(cwd=cwd, env=environment(), text=True)
    if start:
        return subprocess.Popen(
            [sys.executable, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords
        )
    done = subprocess.run([sys.executable, *line], capture_output=True, timeout=timeout, **keywords)
    return Ran(done.returncode, done.stdout, done.stderr)


def torchrun(n: int, line: list[str], start: bool = False, name: str = "gta_seg", **flags):
    """The script under torchrun on n processes; `flags` go to torchrun (default: --standalone)."""
    head = argv(**flags) if flags else ["--standalone"]
    return command(
        ["-m", "torch.distributed.run", *head, "--nproc_per_node", str(n), f"{name}.py", *line],
        start=start,
    )


def in_process(**overrides) -> dict:
    """gta_seg.main(gta_seg.preset("shapes", ...)) in this process, and the signal handlers put
    back."""
    import signal

    import gta_seg

    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return gta_seg.main(gta_seg.preset("shapes", **overrides))
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def until(
    condition: Callable[[], object], process: Started | None = None, seconds: float = 60
) -> bool:
    """Wait until `condition()` holds -> True; False when `process` ended before. Fails after
    `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process is not None and not process.alive():
            return bool(condition())
        time.sleep(0.001)
    raise AssertionError(f"nothing happened in {seconds} s: {process.read() if process else ''}")


def log_of(out: Path, torn: bool = False) -> list[dict]:
    """log.jsonl; with `torn` without a last line that is still being written."""
    lines = (out / "log.jsonl").read_text().split("\n")
    assert torn or lines[-1] == ""
    return [json.loads(line) for line in lines[:-1]]


def state(path: Path) -> dict:
    """A checkpoint without what may differ between two equal runs: the clock and the folder's
    name."""
    read = torch.load(path, map_location="cpu", weights_only=True)
    read.pop("seconds")
    for name in ("out", "resume", "workers", "save_every", "log_every", "device"):
        read["settings"].pop(name)
    return read


def differences(a, b, place: str = "") -> list[str]:
    """Where two nests of dicts, lists, tensors and values are not equal, bit by bit."""
    if type(a) is not type(b):
        return [f"{place}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        lost = [f"{place}.{k}: only in one" for k in a.keys() ^ b.keys()]
        return lost + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{place}.{k}")
        ]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{place}: {len(a)} and {len(b)} entries"]
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{place}[{i}]")
        ]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [f"{place}: tensors differ"]
    return [] if a == b or (a != a and b != b) else [f"{place}: {a} and {b}"]


def tensors(nest, place: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in a nest, by its place."""
    if isinstance(nest, torch.Tensor):
        return {place: nest}
    pairs = (
        nest.items()
        if isinstance(nest, dict)
        else enumerate(nest)
        if isinstance(nest, (list, tuple))
        else ()
    )
    return {k: v for key, value in pairs for k, v in tensors(value, f"{place}.{key}").items()}


def children(pid: int) -> list[int]:
    """Processes that this one started."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    ).stdout
    return [int(p) for p in listed.split()]


def apart(a, b) -> float:
    """The largest difference between two nests of tensors with the same names."""
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and a
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def stop_at(step: int, number: int) -> None:
    """In a process of its own: it gets signal `number` while it takes this step."""
    from common import runs

    tally = runs.Run.tally

    def with_signal(self, at, *args):
        if at == step:
            os.kill(os.getpid(), number)
        return tally(self, at, *args)

    runs.Run.tally = with_signal


def assert_predicts(run: Callable, out: Path, picture: Path, io: Path) -> None:
    """best.pt of a semantic script labels the picture, in its own size."""
    run(["--predict", str(out / "best.pt"), str(picture)], io).ok()
    with (
        Image.open(out / "best.pt.predictions" / "labels" / f"{picture.stem}.png") as label,
        Image.open(picture) as image,
    ):
        assert label.size == image.size and label.mode == "P"


def assert_same_objects(ours: list[dict], theirs: list[dict]) -> None:
    """Two lists of COCO results hold the same objects but for rounding, which may put objects of
    equal scores into another order, and move a pixel."""
    from pycocotools.mask import area

    kinds = [sorted((r["image_id"], r["category_id"]) for r in found) for found in (ours, theirs)]
    assert kinds[0] == kinds[1]
    for kind in set(kinds[0]):
        scores, pixels = [], []
        for results in (ours, theirs):
            of_kind = [r for r in results if (r["image_id"], r["category_id"]) == kind]
            scores.append(np.sort([r["score"] for r in of_kind]))
            pixels.append(np.sort([area(r["segmentation"]) for r in of_kind]).astype(float))
        assert np.allclose(*scores, atol=2e-4)
        assert np.allclose(*pixels, rtol=0.02, atol=3)


def probabilities(logits: torch.Tensor) -> np.ndarray:
    """(B, K, H, W) -> the same, float64: softmax of one pixel after the other."""
    z, p = logits.detach().double().numpy(), np.zeros(logits.shape)
    for b, y, x in np.ndindex(z.shape[0], *z.shape[2:]):
        e = np.exp(z[b, :, y, x] - z[b, :, y, x].max())
        p[b, :, y, x] = e / e.sum()
    return p
