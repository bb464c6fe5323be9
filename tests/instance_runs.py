"""What the tests of runs of the two scripts of instance segmentation share: a quick run in this
process or in one of its own, what it left, and how it is killed, stopped and broken."""

import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import helpers
import numpy as np
import pytest
import timm
import torch
from helpers import Ran, argv, log_of, state, tensors, until
from PIL import Image

from common import cli, colour, instances, runs

# Of guided_distillation.py: four steps of the teacher, four of the student.
TINY_GUIDED = dict(
    backbone="test_resnet",
    weights="none",
    encoder_layers=1,
    decoder_layers=2,
    queries=8,
    points=64,
    crop_size=(64, 64),
    scale=(0.7, 1.4),
    lr=1e-3,
    batch_size=2,
    steps=4,
    eval_every=2,
    log_every=1,
    workers=0,
    device="cpu",
    burn_in_steps=2,
    ema=0.9,
)
HERE = ["--workers", "0", "--device", "cpu"]  # beside a checkpoint, which does not settle these


COCO_SCORES = ("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l")


LVIS_SCORES = (*COCO_SCORES, "apr", "apc", "apf", "ar300", "ar_s", "ar_m", "ar_l")


# ------------------------------------------------------------------------------------ strong views
COLOURS = ("brightness", "contrast", "saturation", "hue", "grey", "blur")


def strong_draws(strong_view: Callable, monkeypatch) -> list[list[tuple[str, float]]]:
    """What a script's strong view draws in a thousand pictures, which is told here: the functions
    of `colour` with their factors, in their order. Each must be drawn as often, and as strongly, as
    both papers say."""
    calls, n = [], 1000
    for name in COLOURS:
        monkeypatch.setattr(
            colour, name, lambda x, f=0, name=name: calls[-1].append((name, f)) or x
        )
    image, g = torch.zeros(3, 4, 4, dtype=torch.uint8), np.random.default_rng(0)
    for _ in range(n):
        calls.append([])
        strong_view(image, g)
    factors = {name: [] for name in COLOURS}
    for name, factor in itertools.chain(*calls):
        factors[name].append(factor)
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.6, 1.4),
        "hue": (-0.1, 0.1),
        "blur": (0.1, 2.0),
    }
    shares = dict(zip(COLOURS, (0.8, 0.8, 0.8, 0.8, 0.2, 0.5), strict=True))
    for name, share in shares.items():
        assert len(factors[name]) / n == pytest.approx(share, abs=0.05), name
    for name, (low, high) in ranges.items():
        edge, mean = 0.03 * (high - low), np.mean(factors[name])
        assert low <= min(factors[name]) < low + edge, name
        assert high - edge < max(factors[name]) <= high, name
        assert mean == pytest.approx((low + high) / 2, abs=0.05 * (high - low)), name
    return calls


# ------------------------------------------------------------------------------------- a quick run
def quick(pictures: tuple, more: tuple[Callable, ...], put: Callable) -> None:
    """None of the `pictures` (the owner and the name of what draws them), no TensorBoard, no git
    and no flushing, which take most of a tiny run's time; then `more`."""

    def touch(*args, **keywords) -> None:
        path = next(a for a in args if isinstance(a, Path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    put(runs, "commit", str)
    put(os, "fsync", lambda number: None)
    for owner, name in pictures:
        put(owner, name, touch)
    no_tensorboard()
    for change in more:
        change()


def no_tensorboard() -> None:
    sys.modules["torch.utils.tensorboard"] = None  # a second for each process that imports it


def quieted(quick: Callable) -> Callable:
    """A fixture: each test of the file is quick, on one thread, and leaves signals as they were."""

    @pytest.fixture(autouse=True)
    def quiet(monkeypatch) -> Iterator[None]:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        quick(put=monkeypatch.setattr)
        handlers, threads = (
            {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)},
            torch.get_num_threads(),
        )
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    return quiet


def as_line(**flags) -> list[str]:
    return ["--dataset", flags.pop("dataset"), *argv(**flags)]


def typed_to(script: ModuleType) -> Callable:
    """A fixture: typed(LINE) -> exit code and output of `python SCRIPT LINE`, run in this
    process."""
    choosers = script.CHOOSERS

    @pytest.fixture
    def typed(monkeypatch, capsys) -> Callable[[list[str]], Ran]:
        def enter(flags: list[str]) -> Ran:
            capsys.readouterr()
            with monkeypatch.context() as patch:
                patch.setattr(cli, "leave", sys.exit)
                try:
                    cli.cli(
                        script.Args, script.settings, script.main, choosers=choosers, argv=flags
                    )
                except SystemExit as left:
                    return Ran(left.code or 0, *capsys.readouterr())
            return Ran(0, *capsys.readouterr())

        return enter

    return typed


def forked(
    name: str, quick: Callable, flags: list[str], folder: Path, *setup: Callable, **more
) -> Ran:
    """The command line in a process of its own; `folder` keeps what it says."""
    return helpers.run(flags, folder, partial(quick, *setup), name=name, **more)


def on_ranks(
    name: str, quick: Callable, n: int, flags: list[str], folder: Path, *setup: Callable
) -> list[Ran]:
    return helpers.ranks(n, flags, folder, partial(quick, *setup), name=name)


def once_each(tmp_path_factory, run: Callable) -> Callable[..., Path]:
    """f(...) -> the folder that run(FOLDER, ...) filled; made once."""
    made = {}

    def make(**flags) -> Path:
        key = repr(sorted(flags.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("finished") / "run"
            run(made[key], **flags)
        return made[key]

    return make


# ------------------------------------------------------------------------------------ what it left
def results(out: Path) -> dict:
    """results.json without the clock."""
    read = json.loads((out / "results.json").read_text())
    return {k: v for k, v in read.items() if k not in ("seconds", "images_per_second")}


def networks(out: Path) -> set[str]:
    return {name for name, value in results(out).items() if isinstance(value, dict)}


def steps_of(out: Path) -> list[dict]:
    """The lines of the log that are of steps, not of evaluations."""
    return [record for record in log_of(out) if "loss_l" in record]


def weights(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(path, weights_only=True)["networks"]


def words(x) -> str:
    return " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else ""


# ----------------------------------------------------------------------------------- kills, signals
def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_half(at) -> Callable:
    """An `open` that kills this process when half of the file `at` is written."""

    def opened(path, mode="r", **more):
        file = open(path, mode, **more)
        if mode == "wb" and isinstance(at, str) and at in path.name:  # also a temporary name
            file.write = lambda data, half=file.write: (
                half(bytes(data)[: len(data) // 2]),
                file.flush(),
                kill(),
            )
        return file

    return opened


def kill_at_random_moments(
    kills: int, line: Callable, folder: Path, setup: Callable, name: str, **settings
) -> None:
    """A run into folder/out that is killed and resumed `kills` times, then ends; and the same into
    folder/reference, uninterrupted."""
    rng, out, at = random.Random(0), folder / "out", [0]
    while len(at) <= kills:
        started = helpers.begin(line(resume=True, **settings), folder, setup, name=name)
        goal = at[-1] + rng.randrange(1, 6)
        until(
            lambda goal=goal: (out / "log.jsonl").exists() and len(log_of(out, torn=True)) >= goal,
            started,
        )
        time.sleep(rng.uniform(0, 0.05))
        assert started.alive(), "the run was over before it could be killed: more steps are needed"
        started.kill(signal.SIGKILL)
        assert started.wait().code == -signal.SIGKILL
        at.append(state(out / "last.pt")["step"] if (out / "last.pt").exists() else 0)
    for each in (line(resume=True, **settings), line(folder / "reference", **settings)):
        helpers.run(each, folder, setup, name=name).ok()
    assert at == sorted(at) and at[-1] > 0


def interrupt(patch: pytest.MonkeyPatch, at: int, number: int = signal.SIGTERM) -> None:
    """This process gets the signal in the step `at`."""

    def at_step(self, step, *args, tally=runs.Run.tally):
        if step == at:
            os.kill(os.getpid(), number)
        return tally(self, step, *args)

    patch.setattr(runs.Run, "tally", at_step)


def assert_stops(typed: Callable, flags: list[str], out: Path, at: int) -> None:
    """By SIGTERM in the step `at`, saved, and nothing half done."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, at)
        stopped = typed(flags).ok()
    assert f"Stopped by SIGTERM after step {at + 1}; {out / 'last.pt'} is saved" in stopped.out
    assert "--resume" in stopped.out and state(out / "last.pt")["step"] == at + 1
    assert not (out / "results.json").exists() and not list(out.glob(".*.tmp"))


def assert_all_stop_for(name: str, every: list[Ran]) -> None:
    """Two processes, one of which met the picture `name`."""
    assert [done.code for done in every] == [2, 2] and not any(
        "Traceback" in done.err for done in every
    )
    assert any(
        name in re.findall("error: .*", done.err)[0] for done in every if "error: " in done.err
    )


# --------------------------------------------------------------------------------- pictures, errors
def predict_odd_ones(
    typed: Callable, copy: Path, folder: Path, source: Image.Image, alone: Path, odd: tuple
) -> tuple[dict[str, Image.Image], dict[str, Path], list[dict]]:
    """best.pt of `copy` predicts a folder of what is made of `source`, and the file `alone` -> the
    pictures of the folder, the overlays, what was found."""
    made = {
        "a.jpg": source,
        "grey.png": source.convert("L"),
        "odd.png": source.resize(odd),
        "pixel.bmp": source.resize((1, 1)),
        "wide.png": source.resize((400, 3)),
        "x.webp": source.convert("RGBA"),
    }
    folder.mkdir()
    for name, picture in made.items():
        picture.save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    done = typed(["--predict", str(copy / "best.pt"), str(folder), str(alone), *HERE]).ok()
    filled = copy / "best.pt.predictions"
    overlays = {
        name: filled / f"{i:05d}_{Path(name).stem}_overlay.jpg"
        for i, name in enumerate([*made, alone.name])
    }
    assert "7 images" in done.out and str(filled) in done.out
    made_files = {filled / "predictions.json", filled / "pseudo_labels.json"}
    assert set(filled.iterdir()) == made_files | set(overlays.values())
    return made, overlays, json.loads((filled / "predictions.json").read_text())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def few_val(monkeypatch) -> None:
    """Score three pictures, one with a crowd where there are some."""

    def find(*args, real=instances.find):
        data = real(*args)
        crowds = [p for p in data.val if any(thing.crowd for thing in p.things)]
        data.val = (crowds[:1] + [p for p in data.val if p not in crowds])[:3]
        return data

    monkeypatch.setattr(instances, "find", find)


def altered(
    part: Callable[[Path, str], Path], data: Path, folder: Path, change: Callable[[dict], object]
) -> dict[str, Path]:
    """Flags for copies of both annotation files, which are part(DATA, NAME), changed."""
    for name in ("train", "val"):
        read = json.loads(part(data, name).read_text())
        change(read)
        (folder / f"{name}.json").write_text(json.dumps(read))
    return {f"{name}_json": folder / f"{name}.json" for name in ("train", "val")}


def with_crowds(root: Path, file: Path) -> dict:
    """Flags, and the picture to predict, of a run on COCO's pictures: four with single things and
    with crowds, listed in `file`."""
    read = json.loads((root / "annotations" / "instances_train.json").read_text())
    single, crowd = (
        {a["image_id"] for a in read["annotations"] if a["iscrowd"] == kind} for kind in (0, 1)
    )
    file.write_text("".join(f"{i}\n" for i in sorted(single & crowd)[:4]))
    picture = next((root / "images").glob("*.jpg"))
    return dict(picture=lambda: picture, dataset="coco", root=root, split=file)


TEXTS = {  # files that are no good
    "text": "x",
    "list": "nobody.jpg",
    "torn.json": '{"images": [',
    "numbers.json": "[1, 2]",
    "lists.json": '{"images": []}',
    "empty/notes.txt": "no picture",
    "other.json": '{"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}',
}


NO_ANNOTATIONS = dict(  # those of them that are no annotations, and what is said of each
    torn="torn.json cannot be read as JSON",
    numbers="numbers.json: expected object, got array",
    lists="lists.json: object missing required field categories",
    other="differ",
)


def assert_cannot_be_used(
    typed: Callable, trained: Path, copy: Path, folder: Path, network: str
) -> None:
    """Checkpoints that are none of the script's, and pictures that are none."""
    good = torch.load(trained / "best.pt", weights_only=True)
    torch.save({**good, "script": "other.py"}, folder / "other.pt")
    torch.save(good["networks"][network], folder / "weights.pt")
    (folder / "torn.pt").write_bytes((trained / "best.pt").read_bytes()[:9999])
    for name, said in (
        ("other", "other.py"),
        ("weights", "--weights"),
        ("torn", "readable"),
        ("no", "no checkpoint"),
    ):
        for flag in ("--eval", "--predict"):
            assert (
                said in (error := typed([flag, str(folder / f"{name}.pt")]).error())
                and f"{name}.pt" in error
            )
    (folder / "empty").mkdir()
    (folder / "text.jpg").write_text("x")
    for name, said in (
        ("", "--predict"),
        ("empty", "--predict"),
        ("text.jpg", "text.jpg"),
        ("no.jpg", "no.jpg"),
    ):
        given = [str(folder / name)] if name else []
        assert said in typed(["--predict", str(copy / "best.pt"), *given, *HERE]).error()


def not_finite_since(error: str, out: Path) -> tuple[int, int]:
    """What stopped because it was not finite left what is -> the step that the sentence names, and
    the one that is saved."""
    step = int(
        re.search(
            r"(?:loss_[lu] is|weights of \w+ are) not finite (?:since|after) step (\d+)", error
        )[1]
    )
    last = state(out / "last.pt")
    assert "--lr" in error and str(out) in error
    assert all(v.isfinite().all() for v in tensors(last["networks"]).values())
    assert all(np.isfinite(r["loss_l"]) for r in log_of(out))
    return step, last["step"]


def offline(monkeypatch) -> None:
    """No weights can be downloaded, and random ones are not asked for."""

    def create(name, pretrained=False, **more):
        raise OSError("offline") if pretrained else AssertionError("random weights were asked for")

    monkeypatch.setattr(timm, "create_model", create)
