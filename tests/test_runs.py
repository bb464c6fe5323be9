"""A run that is killed, stopped or resumed ends as the uninterrupted one; its folder; --eval and
--predict."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pretend
import pytest
import torch
from helpers import (
    REPO,
    begin,
    children,
    command,
    differences,
    in_process,
    log_of,
    run,
    state,
    stop_at,
    until,
)
from PIL import Image

import gta_seg
from common import semantic

LIVELY = {"lr": 0.1, "eval_every": 4}  # a few steps change what networks predict


RECIPES = {
    "gta": dict(LIVELY),
    "mt": dict(LIVELY, method="mt"),
    "released": dict(LIVELY, recipe="released"),
    "shared predictor": dict(LIVELY, share_predictor=True),
    "unbiased-st": dict(LIVELY, method="unbiased-st"),
    "cityscapes' losses": dict(LIVELY, aux=0.4, ohem=0.7, cutmix_labeled=0.5),
}


def mines_few_pixels() -> None:
    """--ohem leaves pixels out also of crops as small as these."""
    gta_seg.OHEM_KEPT = 100


def logged(out: Path) -> list[dict]:
    """The log without the clock."""
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in log_of(out)]


def files(out: Path) -> set[str]:
    # TensorBoard's: one a start
    return {p.name for p in out.iterdir() if not p.name.startswith(("events.", ".lock"))}


def results(out: Path) -> dict:
    read = json.loads((out / "results.json").read_text())
    return {k: v for k, v in read.items() if k not in ("seconds", "images_per_second")}


def assert_equal_runs(out: Path, reference: Path) -> None:
    """Every network, optimizer state, score and log line, bit by bit; nothing is left lying in the
    folder."""
    for name in ("last.pt", "best.pt"):
        a, b = state(out / name), state(reference / name)
        assert {"student"} <= a["networks"].keys() and not differences(a, b), differences(a, b)[:5]
    assert {"opt_student"} <= state(out / "last.pt").keys()
    assert results(out) == results(reference)
    assert logged(out) == logged(reference)
    assert files(out) - files(reference) == set()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """finished("gta", steps=12, ...) -> the folder of that run, uninterrupted; made once."""
    folder, made = tmp_path_factory.mktemp("finished"), {}

    def make(recipe: str = "gta", **flags) -> Path:
        flags = {"eval_every": 4, **flags}
        key = recipe, *sorted(flags.items())
        if key not in made:
            made[key] = folder / str(len(made))
            line = tiny(out=made[key], **{**RECIPES[recipe], **flags})
            run(line, folder / "io", mines_few_pixels).ok()
        return made[key]

    return make


# --------------------------------------------------------------------------------- stops on purpose
def die_after(name: str, nth: int) -> None:
    """In a process of its own: SIGKILL as soon as the n-th checkpoint `name` is complete."""
    from common import runs

    save, seen = runs.save_checkpoint, []

    def last_save(path, *content):
        save(path, *content)
        seen.extend([1] * (path.name == name))
        if path.name == name and len(seen) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    runs.save_checkpoint = last_save


def die_while_writing(name: str, nth: int) -> None:
    """In a process of its own: SIGKILL when half of the n-th file `name` has been written."""
    from common import checkpoints, files

    written, seen = files.written, []

    @contextlib.contextmanager
    def torn(path):
        seen.extend([1] * (path.name == name))
        with written(path) as file:
            yield file
            if path.name == name and len(seen) == nth:
                file.truncate(file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    files.written = checkpoints.written = torn


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_is_bit_equal(tiny, finished, tmp_path, io, recipe):
    """Stopped in warm-up, in the assistant's first step, and in the second epoch after warm-up (8
    steps, two to an epoch): the released recipe is resumed with and without tied networks."""
    line = tiny(out=tmp_path / "out", resume=True, **RECIPES[recipe])
    for step in (0, 2, 5) if recipe in ("gta", "released") else (3,):
        stopped = run(line, io, partial(stop_mining, step)).ok()
        assert (
            f"after step {step + 1}" in stopped.out
            and state(tmp_path / "out" / "last.pt")["step"] == step + 1
        )
    run(line, io, mines_few_pixels).ok()
    assert_equal_runs(tmp_path / "out", finished(recipe))


def stop_mining(step: int) -> None:
    mines_few_pixels()
    stop_at(step, signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_a_message_and_code_0(tiny, finished, tmp_path, io, number):
    out = tmp_path / "out"
    started = begin(tiny(out=out, steps=40, **{**LIVELY, "eval_every": 40}), io)
    assert until(lambda: (out / "log.jsonl").exists() and len(log_of(out, torn=True)) > 3, started)
    started.kill(number)
    done = started.wait()
    step = state(out / "last.pt")["step"]
    assert done.code == 0 and "Traceback" not in done.err
    assert number.name in done.out and f"after step {step}" in done.out and "--resume" in done.out
    assert 3 < step < 40 and not (out / "results.json").exists() and not list(out.glob(".*.tmp"))
    assert "Ctrl-C again" in done.err
    run(tiny(out=out, steps=40, resume=True, **{**LIVELY, "eval_every": 40}), io).ok()
    assert_equal_runs(out, finished("gta", steps=40, eval_every=40))


def test_ctrl_c_before_the_first_step_is_no_traceback(tiny, tmp_path, io):
    from_start = run(tiny(out=tmp_path / "out"), io, partial(interrupt_in, "find"))
    assert from_start.code != 0 and "Traceback" not in from_start.err


def interrupt_in(name: str) -> None:

    before = getattr(semantic, name)

    def after_ctrl_c(*args):
        # whoever runs the tests may ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return before(*args)

    setattr(semantic, name, after_ctrl_c)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_run(tiny, tmp_path, io, number):
    out = tmp_path / "out"
    started = begin(tiny(out=out, workers=2, steps=4000, save_every=1), io)
    assert until(lambda: (out / "log.jsonl").exists() and len(log_of(out, torn=True)) > 3, started)
    workers = children(started.pid)
    assert len(workers) == 4  # labeled and unlabeled images
    started.kill(number)
    assert started.wait().code == (0 if number == signal.SIGTERM else -number)
    assert until(lambda: not any(lives(pid) for pid in workers), seconds=20)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ kill -9
def kill_and_resume(
    line: list[str], out: Path, io: Path, kills: int, rng: random.Random
) -> list[int]:
    """Start and SIGKILL, again and again, then run to the end -> the steps saved at each kill. A
    kill comes when a few more lines are in the log and a random time later, or, one of five, while
    the run starts."""
    at = []
    while len(at) < kills:
        started = begin(line, io, mines_few_pixels)
        goal = (at[-1] if at else 0) + rng.randrange(1, 8)
        if rng.random() < 0.8:
            until(
                lambda goal=goal: (
                    (out / "log.jsonl").exists() and len(log_of(out, torn=True)) >= goal
                ),
                started,
            )
        time.sleep(rng.uniform(0, 0.03 if at else 0.3))
        assert started.alive(), "the run was over before it could be killed: more steps are needed"
        started.kill(signal.SIGKILL)
        assert started.wait().code == -signal.SIGKILL
        at.append(state(out / "last.pt")["step"] if (out / "last.pt").exists() else 0)
    run(line, io, mines_few_pixels).ok()
    return at


def test_killed_at_random_moments_and_resumed_is_bit_equal(tiny, finished, tmp_path, io):
    out, settings = tmp_path / "out", {**LIVELY, "steps": 60, "eval_every": 30}
    at = kill_and_resume(
        tiny(out=out, resume=True, save_every=3, **settings), out, io, 4, random.Random(0)
    )
    assert at == sorted(at) and at[-1] > 0  # a kill never loses what was saved
    # test_a_kill_leaves_no_litter_for_ever is on these
    [leftover.unlink() for leftover in out.glob(".*.tmp")]
    assert_equal_runs(out, finished("gta", steps=60, eval_every=30))


@pytest.mark.skipif(not os.environ.get("KILLS"), reason="takes minutes: KILLS=20 pytest -k twenty")
@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_kills(tiny, finished, tmp_path, io, recipe):
    kills = int(os.environ["KILLS"])
    settings = dict(steps=16 * kills, eval_every=4 * kills)
    line = tiny(out=tmp_path / "out", resume=True, save_every=2, **{**RECIPES[recipe], **settings})
    at = kill_and_resume(line, tmp_path / "out", io, kills, random.Random(recipe))
    torn = list((tmp_path / "out").glob(".*.tmp"))
    print(f"{recipe}: killed with {at} steps saved, {len(torn)} torn files left")
    assert at == sorted(at) and at[-1] > 0
    [leftover.unlink() for leftover in torn]
    assert_equal_runs(tmp_path / "out", finished(recipe, **settings))


@pytest.mark.parametrize(
    "setup, saved",
    [
        pytest.param(partial(die_after, "last.pt", 2), 2, id="at the end of warm-up"),
        pytest.param(partial(stop_at, 2, signal.SIGKILL), 2, id="in the assistant's first step"),
        pytest.param(partial(die_while_writing, "last.pt", 4), 3, id="in a save of last.pt"),
        pytest.param(partial(die_after, "last.pt", 4), 4, id="saved, and not yet scored"),
        pytest.param(partial(die_while_writing, "best.pt", 1), 4, id="in a save of best.pt"),
        pytest.param(partial(die_after, "best.pt", 1), 4, id="scored, and not saved since"),
        pytest.param(partial(die_after, "last.pt", 8), 8, id="at the end, and not yet scored"),
        pytest.param(partial(die_while_writing, "results.json", 1), 8, id="in results.json"),
    ],
)
def test_killed_at_a_chosen_moment_and_resumed_is_bit_equal(
    tiny, finished, tmp_path, io, setup, saved
):
    out = tmp_path / "out"
    line = tiny(out=out, resume=True, save_every=1, **LIVELY)
    assert run(line, io, setup).code == -signal.SIGKILL
    assert state(out / "last.pt")["step"] == saved
    run(line, io).ok()
    for leftover in out.glob(".*.tmp"):
        leftover.unlink()
    assert_equal_runs(out, finished("gta"))


def test_a_score_that_is_due_is_made_before_anything_else(tiny, tmp_path, io):
    """After a kill between saving and scoring, the next process scores before it takes a step."""
    out = tmp_path / "out"
    line = tiny(out=out, resume=True, **LIVELY)
    assert run(line, io, partial(die_after, "last.pt", 1)).code == -signal.SIGKILL
    assert state(out / "last.pt")["scored"] == 0 and not (out / "best.pt").exists()
    assert run(line, io, partial(stop_at, 4, signal.SIGKILL)).code == -signal.SIGKILL
    assert state(out / "best.pt")["step"] == 4
    assert [r["step"] for r in log_of(out) if "miou_teacher" in r] == [4]


def test_a_kill_leaves_no_litter_for_ever(tiny, tmp_path, io):
    """A half-written checkpoint can be hundreds of megabytes, and a job may be killed often."""
    line = tiny(out=tmp_path / "out", resume=True, save_every=1)
    run(line, io, partial(die_while_writing, "last.pt", 2))
    assert list((tmp_path / "out").glob(".*.tmp"))
    run(line, io).ok()
    assert not list((tmp_path / "out").glob(".*.tmp"))


# ---------------------------------------------------------------------------------------------- log
def test_log_is_cut_back_to_the_checkpoint_and_torn_lines_go(tiny, finished, tmp_path, io):
    out = tmp_path / "out"
    line = tiny(out=out, resume=True, save_every=3, **{**LIVELY, "eval_every": 8})
    assert run(line, io, partial(stop_at, 4, signal.SIGKILL)).code == -signal.SIGKILL
    assert state(out / "last.pt")["step"] == 3 and [r["step"] for r in log_of(out)] == [1, 2, 3, 4]
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 5, "loss_l": 0.12')
    run(line, io).ok()
    assert [r["step"] for r in log_of(out) if "loss_l" in r] == list(range(1, 9))
    assert logged(out) == logged(finished("gta", eval_every=8))


def test_log_every_counts_steps(tiny, tmp_path, io):
    run(tiny(out=tmp_path / "out", log_every=3), io).ok()
    assert [r["step"] for r in log_of(tmp_path / "out") if "loss_l" in r] == [3, 6, 8]


def test_save_every(tiny, tmp_path, io):
    for every, saved in ((3, 6), (5, 5)):
        out = tmp_path / str(every)
        assert (
            run(tiny(out=out, save_every=every), io, partial(stop_at, 6, signal.SIGKILL)).code
            == -signal.SIGKILL
        )
        assert state(out / "last.pt")["step"] == saved


# ----------------------------------------------------------------------------------- the run folder
def test_number_of_workers_does_not_matter(tiny, finished, tmp_path, io):
    out = tmp_path / "out"
    run(tiny(out=out, workers=2, **LIVELY), io).ok()
    assert_equal_runs(out, finished("gta"))


def test_seed_matters_and_so_does_the_method(tiny, finished, tmp_path, io):
    """What the comparisons above would miss if they compared nothing."""
    run(tiny(out=tmp_path / "out", seed=1, **LIVELY), io).ok()
    assert differences(
        state(tmp_path / "out" / "last.pt")["networks"],
        state(finished("gta") / "last.pt")["networks"],
    )
    a, b = (state(finished(r) / "last.pt")["networks"]["student"] for r in ("gta", "mt"))
    assert differences(a, b)


def test_resume_in_an_empty_folder_starts_afresh_and_says_so(tiny, finished, tmp_path, io):
    (tmp_path / "out").mkdir()
    done = run(tiny(out=tmp_path / "out", resume=True, **LIVELY), io).ok()
    assert "afresh" in done.out and str(tmp_path / "out") in done.out
    assert_equal_runs(tmp_path / "out", finished("gta"))


def test_resume_after_a_kill_before_the_first_save_says_that_it_starts_afresh(
    tiny, finished, tmp_path, io
):
    line = tiny(out=tmp_path / "out", resume=True, **LIVELY)
    assert run(line, io, partial(stop_at, 3, signal.SIGKILL)).code == -signal.SIGKILL
    assert (
        not (tmp_path / "out" / "last.pt").exists() and (tmp_path / "out" / "config.json").exists()
    )
    done = run(line, io).ok()
    assert_equal_runs(tmp_path / "out", finished("gta"))
    assert "afresh" in done.out


def test_resume_with_other_settings_names_the_fields(tiny, finished, io):
    out = finished("gta")
    error = run(tiny(out=out, resume=True, lr=0.2, tau=2, alpha_teacher=0.5), io).error()
    assert (
        all(f"{name} (" in error for name in ("lr", "tau", "alpha_teacher"))
        and "0.1 then, 0.2 now" in error
    )
    assert "steps" not in error and "width" not in error


def test_resume_with_other_bookkeeping_goes_on(tiny, finished, tmp_path, io):
    out = tmp_path / "out"
    run(tiny(out=out, **LIVELY), io, partial(stop_at, 2, signal.SIGTERM)).ok()
    run(tiny(out=out, resume=True, workers=1, save_every=2, log_every=1, **LIVELY), io).ok()
    assert_equal_runs(out, finished("gta"))


def test_used_folder_is_refused_and_stays_as_it_is(tiny, finished, io):
    out = finished("gta")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    error = run(tiny(out=out, **LIVELY), io).error()
    assert str(out) in error and "--resume" in error and "--out" in error
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


def test_finished_run_resumed_changes_nothing(tiny, finished, tmp_path, io):
    out = tmp_path / "out"
    shutil.copytree(finished("gta"), out)
    first = tiny(out=finished("gta"), resume=True, **LIVELY)
    before = {
        p.name: p.read_bytes()
        for p in finished("gta").iterdir()
        if p.suffix in (".pt", ".jsonl", ".json")
    }
    run(first, io).ok()
    after = {
        p.name: p.read_bytes()
        for p in finished("gta").iterdir()
        if p.suffix in (".pt", ".jsonl", ".json")
    }
    assert [n for n in before if before[n] != after[n] and n != "config.json"] == []
    assert_equal_runs(finished("gta"), out)


def test_resume_of_another_scripts_run_and_of_a_broken_checkpoint(tiny, finished, tmp_path, io):
    for name in ("other", "torn", "weights", "empty", "config", "other config"):
        shutil.copytree(finished("gta"), tmp_path / name)
    torch.save(
        {**torch.load(tmp_path / "other" / "last.pt"), "script": "other.py"},
        tmp_path / "other" / "last.pt",
    )
    torn = (tmp_path / "torn" / "last.pt").read_bytes()
    (tmp_path / "torn" / "last.pt").write_bytes(torn[: len(torn) * 2 // 3])
    torch.save({"a": torch.ones(3)}, tmp_path / "weights" / "last.pt")
    (tmp_path / "empty" / "last.pt").write_bytes(b"")
    (tmp_path / "config" / "config.json").write_text('{"script": "gta')
    config = json.loads((tmp_path / "other config" / "config.json").read_text())
    (tmp_path / "other config" / "config.json").write_text(
        json.dumps({**config, "script": "other.py"})
    )
    for name, said in (
        ("other", "other.py"),
        ("torn", "readable"),
        ("weights", "weights"),
        ("empty", "readable"),
        ("config", "config.json"),
        ("other config", "other.py"),
    ):
        folder = tmp_path / name
        # a run remembers its folder; --out is compared like any other setting
        old = (folder / "config.json").read_text().replace(str(finished("gta")), str(folder))
        (folder / "config.json").write_text(old)
        error = run(tiny(out=folder, resume=True, **LIVELY), io).error()
        assert said in error and str(folder) in error


def test_folder_that_was_moved_can_be_resumed(tiny, finished, tmp_path, io):
    shutil.copytree(finished("gta"), tmp_path / "moved")
    run(tiny(out=tmp_path / "moved", resume=True, **LIVELY), io).ok()


def test_folder_holds_what_the_design_says(finished):
    out = finished("gta")
    assert files(out) == {
        "config.json",
        "log.jsonl",
        "last.pt",
        "best.pt",
        "results.json",
        "curves.png",
        "previews",
    }
    assert [p.name for p in sorted((out / "previews").iterdir())] == ["0000004.png", "0000008.png"]
    read = json.loads((out / "results.json").read_text())
    assert {
        "student",
        "teacher",
        "gta",
        "dataset",
        "split",
        "split_fingerprint",
        "seed",
        "seconds",
        "images_per_second",
    } <= read.keys()
    config = json.loads((out / "config.json").read_text())
    for name in ("student", "teacher", "gta"):
        for which in ("last", "best"):
            record = read[name][which]
            assert {"step", "miou", "iou"} <= record.keys() and 0 <= record["miou"] <= 100
            assert list(record["iou"]) == config["classes"]
            present = [v for v in record["iou"].values() if v is not None]
            assert present and abs(np.mean(present) - record["miou"]) < 1e-3
        assert (
            read[name]["last"]["step"] == 8
            and read[name]["best"]["miou"] >= read[name]["last"]["miou"]
        )
    assert (
        read["seconds"] > 0
        and read["images_per_second"] > 0
        and len(read["split_fingerprint"]) == 64
    )
    assert config["settings"]["alpha_gta"] == 0.99 and config["torch"] == torch.__version__
    assert {"script", "settings", "commit", "device", "python", "processes"} <= config.keys()
    if (REPO / ".git").exists():
        assert len(config["commit"].rstrip("+")) == 12


def test_results_have_the_networks_that_exist(finished):
    for recipe, names in (("gta", {"student", "teacher", "gta"}), ("mt", {"student", "teacher"})):
        found = results(finished(recipe))
        assert {k for k in found if isinstance(found[k], dict)} == names


def test_suponly_has_a_student_alone(tiny, tmp_path, io):
    run(tiny(out=tmp_path / "out", method="suponly"), io).ok()
    found = results(tmp_path / "out")
    assert {k for k in found if isinstance(found[k], dict)} == {"student"}


def test_main_returns_what_the_file_holds(shapes_root, tmp_path):
    returned = in_process(
        root=str(shapes_root),
        val="few",
        out=str(tmp_path / "out"),
        steps=2,
        backbone="test_resnet",
        weights="none",
        width=8,
        batch_size=4,
        crop_size=32,
        workers=0,
        warmup_epochs=0,
    )
    assert returned == json.loads((tmp_path / "out" / "results.json").read_text())


def test_default_folder_is_named_after_the_run(tiny, tmp_path, io):
    run(
        tiny(split="random:1/100", split_seed=3, seed=2, steps=1, warmup_epochs=0), io, cwd=tmp_path
    ).ok()
    assert not list((tmp_path / "out").glob(".*.tmp"))


# ------------------------------------------------------------------------------------------ devices
def far_away(step: str) -> None:
    mines_few_pixels()
    pretend.count("gta_seg", "warmup_step", step)


@pytest.mark.parametrize("recipe", ["gta", "mt", "cityscapes' losses"])
def test_nothing_mixes_devices(tiny, shapes_root, tmp_path, io, recipe):
    """On an accelerator that is pretended, with the CPU's values: the same run, scores and
    predictions, to the bit. Its tensors cannot share storage, so recipes that do are left out."""
    far = partial(far_away, "mean_teacher_step" if recipe == "mt" else "train_step")
    found, photo = [], str(shapes_root / "voc" / "JPEGImages" / "val_000000.jpg")
    for name, setup in (("near", mines_few_pixels), ("far", far)):
        out = tmp_path / name
        said = run(tiny(out=out, **RECIPES[recipe] | {"steps": 4}), io, setup).ok().out
        assert pretend.waits(said) == [0] * 4 * (name == "far"), "a step that waits for the GPU"
        run(["--eval", str(out / "best.pt")], io, setup).ok()
        run(["--predict", str(out / "best.pt"), photo], io, setup).ok()
        made = sorted((out / "best.pt.predictions" / "labels").glob("*.png"))
        found.append([(out / "best.pt.results.json").read_text(), *(p.read_bytes() for p in made)])
    assert found[0] == found[1] and len(found[0]) > 1
    assert_equal_runs(tmp_path / "far", tmp_path / "near")


# ------------------------------------------------------------------------------------ eval, predict
@pytest.mark.parametrize("recipe", ["gta", "mt", "released"])
def test_eval_gives_the_runs_own_results(finished, tmp_path, io, recipe):
    out = finished(recipe)
    read = results(out)
    predictions = set()
    for name, which in (("best", "best"), ("last", "last")):
        run(["--eval", str(out / f"{name}.pt")], io, cwd=tmp_path).ok()
        scored = json.loads((out / f"{name}.pt.results.json").read_text())
        result = "teacher"  # best.pt is the best step of the result
        assert scored[result]["last"] == read[result][which]
        predictions |= set(np.array(scored["confusion"][result]).sum(0).nonzero()[0].tolist())
        if which == "last":
            assert all(scored[n]["last"] == read[n]["last"] for n in scored["confusion"])
        assert {"dataset", "split", "seed", "confusion"} <= scored.keys()
        label_pixels = np.array(scored["confusion"]["student"]).sum()
        assert label_pixels == 7 * 64 * 64
    assert predictions


def test_eval_changes_nothing_in_the_folder(finished, tmp_path, io):
    out = tmp_path / "copy"
    # what other tests made
    shutil.copytree(finished("gta"), out, ignore=shutil.ignore_patterns("*.pt.*"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    run(["--eval", str(out / "best.pt")], io).ok()
    assert all(p.read_bytes() == content for p, content in before.items())
    assert {p.name for p in out.iterdir()} - {p.name for p in before} - {"previews"} == {
        "best.pt.results.json",
        "best.pt.previews.png",
    }


def pictures(folder: Path, source: Path) -> dict[str, tuple[int, int]]:
    """Files of many kinds -> name and size."""
    folder.mkdir()
    scene = Image.open(source)
    made = {
        "scene.jpg": scene,
        "odd.png": scene.resize((97, 61)),
        "grey.png": scene.convert("L"),
        "bw.png": scene.convert("1"),
        "rgba.png": scene.convert("RGBA"),
        "palette.png": scene.convert("P"),
        "cmyk.jpg": scene.convert("CMYK"),
        "thin.png": scene.resize((1, 50)),
        "flat.jpg": scene.resize((50, 1)),
        "pixel.bmp": scene.resize((1, 1)),
        "large.webp": scene.resize((301, 203)),
        "UPPER.JPG": scene,
    }
    for name, image in made.items():
        image.save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return {name: image.size for name, image in made.items()}


def test_predict_writes_an_index_png_of_each_pictures_size(finished, shapes_root, tmp_path, io):
    sizes = pictures(tmp_path / "photos", shapes_root / "voc" / "JPEGImages" / "val_000001.jpg")
    shutil.copytree(finished("gta"), tmp_path / "run")
    done = run(["--predict", str(tmp_path / "run" / "best.pt"), str(tmp_path / "photos")], io).ok()
    folder = tmp_path / "run" / "best.pt.predictions"
    assert str(folder) in done.out and "12 images" in done.out
    for name, size in sizes.items():
        stem = Path(name).stem
        with (
            Image.open(folder / "labels" / f"{stem}.png") as label,
            Image.open(folder / "confidence" / f"{stem}.png") as confidence,
            Image.open(folder / "overlays" / f"{stem}.jpg") as overlay,
        ):
            assert label.size == size and label.mode == "P" and np.array(label).max() < 9
            assert confidence.size == size and confidence.mode == "L"
            assert overlay.width == size[0] and overlay.height >= size[1]
    assert len([p for p in folder.rglob("*") if p.is_file()]) == 3 * len(sizes) + 1


def test_prediction_is_what_the_evaluation_counts(finished, shapes_root, tmp_path, io):
    """The label files of --predict and the masks give the confusion matrix of --eval."""
    out = tmp_path / "run"
    shutil.copytree(finished("gta"), out)
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    last_layer = checkpoint["networks"]["teacher"]["predictor.classifier.8.weight"]
    last_layer.normal_(generator=torch.Generator().manual_seed(0))  # it predicts several classes
    torch.save(checkpoint, out / "last.pt")
    names = (shapes_root / "voc" / "ImageSets" / "Segmentation" / "few.txt").read_text().split()
    images = [str(shapes_root / "voc" / "JPEGImages" / f"{name}.jpg") for name in names]
    run(["--eval", str(out / "last.pt")], io).ok()
    run(["--predict", str(out / "last.pt"), *images], io).ok()
    expected = np.array(
        json.loads((out / "last.pt.results.json").read_text())["confusion"]["teacher"]
    )
    counts = np.zeros_like(expected)
    for name in names:
        label = np.array(Image.open(shapes_root / "voc" / "SegmentationClass" / f"{name}.png"))
        prediction = np.array(Image.open(out / "last.pt.predictions" / "labels" / f"{name}.png"))
        np.add.at(counts, (label[label != 255], prediction[label != 255]), 1)
    assert (counts == expected).all()
    assert np.count_nonzero(expected.sum(0)) > 1, "a network that predicts one class shows nothing"


def test_predict_keeps_pictures_of_one_name_apart(finished, shapes_root, tmp_path, io):
    shutil.copytree(finished("gta"), tmp_path / "run")
    source = shapes_root / "voc" / "JPEGImages" / "val_000001.jpg"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(source).resize((40, 30) if folder == "a" else (50, 20)).save(
            tmp_path / folder / "1.png"
        )
    done = run(
        ["--predict", str(tmp_path / "run" / "best.pt"), str(tmp_path / "a"), str(tmp_path / "b")],
        io,
    )
    made = (
        [p for p in (tmp_path / "run" / "best.pt.predictions" / "labels").glob("*.png")]
        if done.code == 0
        else []
    )
    assert done.code == 2 or len(made) == 2


def test_the_real_command_trains(tiny, tmp_path):
    """As a user types it: python gta_seg.py ..."""
    out = tmp_path / "out"
    done = command(["gta_seg.py", *tiny(out=out, steps=3)]).ok()
    assert "miou" in done.out and str(out) in done.out and "8 labeled images" in done.out
    assert math.isfinite(json.loads((out / "results.json").read_text())["teacher"]["last"]["miou"])
