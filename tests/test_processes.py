"""One process, two, three, and two nodes do the same; what one process alone meets is still one
sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    REPO,
    TINY,
    begin,
    begin_ranks,
    children,
    command,
    differences,
    environment,
    free_port,
    log_of,
    ranks,
    run,
    state,
    stop_at,
    tensors,
    torchrun,
    until,
)
from test_runs import lives

LIVELY = {"lr": 0.1}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """The folder of a run that predicts several classes."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(tiny(out=out, steps=40, eval_every=40, alpha_teacher=0, **LIVELY), out.parent / "io").ok()
    return out


# ----------------------------------------------------------------------------------------- they run
def test_torchrun_with_two_processes(tiny, tmp_path):
    out = tmp_path / "out"
    done = torchrun(2, tiny(out=out, steps=4)).ok()
    # one process speaks
    assert done.out.count("8 labeled images") == 1 and done.out.count("miou:") == 1
    assert json.loads((out / "results.json").read_text())["teacher"]["last"]["step"] == 4
    assert json.loads((out / "config.json").read_text())["processes"] == 2
    assert [r["step"] for r in log_of(out) if "loss_l" in r] == [1, 2, 3, 4]
    assert "FutureWarning" not in done.err, done.err  # DDP's argument has another name since 2.13


def test_two_nodes_on_one_machine(tiny, tmp_path):
    for attempt in range(2):  # another program may have taken the port meanwhile
        out, flags = (
            tmp_path / f"out{attempt}",
            dict(nnodes=2, master_addr="127.0.0.1", master_port=free_port()),
        )
        nodes = [
            torchrun(1, tiny(out=out, steps=3), start=True, node_rank=rank, **flags)
            for rank in (0, 1)
        ]
        try:
            said = [node.communicate(timeout=90) for node in nodes]
            break
        except subprocess.TimeoutExpired:
            for node in nodes:
                node.kill()
            if attempt:
                raise
    assert [node.returncode for node in nodes] == [0, 0], said
    assert json.loads((out / "config.json").read_text())["processes"] == 2
    assert json.loads((out / "results.json").read_text())["teacher"]["last"]["step"] == 3
    assert "miou:" in said[0][0] and "miou:" not in said[1][0]


# ---------------------------------------------------------------------------------- the same result
def test_evaluation_is_equal_on_any_number_of_processes(trained, tmp_path, io):
    """7 images, shared out unevenly."""
    counts = {}
    for n in (1, 2, 3):
        (trained / "last.pt.results.json").unlink(missing_ok=True)
        for done in ranks(n, ["--eval", str(trained / "last.pt")], io):
            done.ok()
        counts[n] = json.loads((trained / "last.pt.results.json").read_text())["confusion"]
    assert counts[1] == counts[2] == counts[3]
    for matrix in counts[1].values():
        assert sum(map(sum, matrix)) == 7 * 64 * 64
        assert sum(any(row[k] for row in matrix) for k in range(len(matrix))) > 1, (
            "one class predicted shows nothing"
        )


def test_predictions_are_shared_out(trained, shapes_root, tmp_path, io):
    images = sorted((shapes_root / "voc" / "JPEGImages").glob("val_00000[0-4].jpg"))
    for done in ranks(2, ["--predict", str(trained / "best.pt"), *map(str, images)], io):
        done.ok()
    assert {p.stem for p in (trained / "best.pt.predictions" / "labels").glob("*.png")} == {
        p.stem for p in images
    }


def no_batch_effects() -> None:
    """BatchNorm with its running statistics and no dropout: only rounding depends on how a batch is
    shared out. --ohem keeps so few pixels that it leaves some out of tiny crops."""
    import gta_seg

    gta_seg.OHEM_KEPT = 100
    build = gta_seg.build

    def with_modes(*args, **keywords):
        built = build(*args, **keywords)
        for net in built[0].networks().values():
            net.train(net.training)
        return built

    gta_seg.build = with_modes
    torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
    torch.nn.Dropout2d.forward = lambda self, x: x


STEPS = {
    "gta": {},
    "mt": dict(method="mt"),
    "suponly": dict(method="suponly", cutmix_labeled=0.5, warmup_epochs=None),
    "all losses": dict(aux=0.4, ohem=0.7, gta_data="both", cutmix_labeled=0.5),
}


@pytest.mark.parametrize("method", STEPS)
def test_ten_steps_are_equal_on_one_and_two_processes(tiny, tmp_path, io, method):
    """Global batch, coins, boxes, threshold and normalisers: float32, two steps of warm-up."""
    # 1 step an epoch
    line = dict(steps=10, lr=0.02, precision="fp32", batch_size=8, warmup_epochs=2) | STEPS[method]
    for n in (1, 2):
        for done in ranks(n, tiny(out=tmp_path / str(n), **line), io, no_batch_effects):
            done.ok()
    one, two = (state(tmp_path / str(n) / "last.pt") for n in (1, 2))
    first = tensors(one["networks"])
    apart = {
        k: (v.double() - first[k].double()).abs().max().item()
        for k, v in tensors(two["networks"]).items()
    }
    assert first.keys() == apart.keys() and max(apart.values()) < 1e-6, sorted(
        apart.items(), key=lambda x: -x[1]
    )[:3]
    moved = state_of_step_one(
        tiny(out=tmp_path / "short", **{**line, "steps": 10}), tmp_path / "short", io
    )
    assert (
        max((moved[k] - first[k]).abs().max().item() for k in first if first[k].is_floating_point())
        > 1e-3
    )


def state_of_step_one(line: list[str], out: Path, io: Path) -> dict[str, torch.Tensor]:
    """The networks after one step of the same run, to see that ten steps go somewhere."""
    run(line, io, partial(stop_first, 0)).ok()
    return tensors(state(out / "last.pt")["networks"])


def stop_first(step: int) -> None:
    no_batch_effects()
    stop_at(step, signal.SIGTERM)


def note_buffers(folder: Path) -> None:
    """Each process writes what its networks' buffers are when the evaluation begins."""
    import gta_seg

    evaluate = gta_seg.evaluate

    def with_note(networks, *args):
        buffers = {
            f"{n}.{k}": v.clone() for n, net in networks.items() for k, v in net.named_buffers()
        }
        weights = {
            f"{n}.{k}": v.clone() for n, net in networks.items() for k, v in net.named_parameters()
        }
        torch.save({"buffers": buffers, "weights": weights}, folder / f"{os.environ['RANK']}.pt")
        return evaluate(networks, *args)

    gta_seg.evaluate = with_note


@pytest.mark.parametrize("flags", [{}, dict(recipe="released"), dict(method="mt")], ids=str)
def test_all_processes_hold_the_same_networks_before_an_evaluation(tiny, tmp_path, io, flags):
    for done in ranks(
        2,
        tiny(out=tmp_path / "out", steps=6, **LIVELY, **flags),
        io,
        partial(note_buffers, tmp_path),
    ):
        done.ok()
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(a["buffers"]) > 50 and not differences(a, b), differences(a, b)[:5]
    fresh = [k for k, v in a["buffers"].items() if k.endswith("running_mean") and not v.any()]
    assert not fresh, f"statistics that never moved: {fresh[:3]}"


@pytest.mark.parametrize("flags", [{}, dict(recipe="released")], ids=str)
def test_resume_on_two_processes_is_bit_equal(tiny, tmp_path, io, flags):
    line = dict(steps=12, eval_every=6, **LIVELY, **flags)
    for done in ranks(2, tiny(out=tmp_path / "whole", **line), io):
        done.ok()
    out = tmp_path / "out"
    for number in (signal.SIGTERM, signal.SIGKILL):  # both get it: at step 3, heard at 5; then at 8
        setup = partial(stop_at, 3 if number == signal.SIGTERM else 8, number)
        for done in ranks(2, tiny(out=out, resume=True, **line), io, setup):
            assert done.code == (0 if number == signal.SIGTERM else -number), done.err
        assert state(out / "last.pt")["step"] == (5 if number == signal.SIGTERM else 6)
    for done in ranks(2, tiny(out=out, resume=True, **line), io):
        done.ok()
    for name in ("last.pt", "best.pt"):
        wrong = differences(state(out / name), state(tmp_path / "whole" / name))
        assert not wrong, wrong[:5]
    assert [r["step"] for r in log_of(out)] == [r["step"] for r in log_of(tmp_path / "whole")]


def test_signal_to_one_process_stops_all(tiny, tmp_path, io):
    out = tmp_path / "out"
    every = ranks(2, tiny(out=out, steps=12), io, partial(one_stops, 4))
    assert [done.code for done in every] == [0, 0] and state(out / "last.pt")["step"] == 5
    assert "after step 5" in every[0].out and "--resume" in every[0].out
    assert not any("Traceback" in done.err for done in every)


def one_stops(step: int) -> None:
    if os.environ["RANK"] == "1":
        stop_at(step, signal.SIGTERM)


def test_sigterm_to_torchrun_saves(tiny, tmp_path):
    """What a batch system sends before it ends a job."""
    out = tmp_path / "out"
    job = torchrun(2, tiny(out=out, steps=5000, eval_every=5000), start=True)
    try:
        assert until(lambda: (out / "log.jsonl").exists() and len(log_of(out, torn=True)) > 3)
        job.send_signal(signal.SIGTERM)
        said, errors = job.communicate(timeout=60)
    finally:
        job.kill()
    assert "Stopped by SIGTERM" in said and state(out / "last.pt")["step"] >= 3


# ------------------------------------------------------------------------------------------- errors
def sentences(every) -> set[str]:
    assert all(done.code == 2 for done in every), [(done.code, done.err[-1500:]) for done in every]
    assert not any("Traceback" in done.err for done in every), [done.err[-1500:] for done in every]
    return {line for done in every for line in done.err.splitlines() if line.startswith("error: ")}


def test_an_error_of_all_processes_is_said_once(tiny, tmp_path, io):
    every = ranks(2, tiny(out=tmp_path / "out", split="random:0"), io)
    assert len(sentences(every)) == 1 and sum(done.err.count("error: ") for done in every) == 1


def test_an_image_that_one_process_cannot_score_stops_all_with_one_sentence(
    folder_root, folder_line, tmp_path, io
):
    # the second of three: process 1 meets it
    path = folder_root / "images" / "val" / "val_000001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    said = sentences(ranks(2, folder_line(), io))
    assert any("val_000001.jpg" in sentence for sentence in said)


def test_skipped_images_of_all_processes_are_counted(folder_root, folder_line, tmp_path, io):
    """Batches of 4 out of 4 images meet the broken one in every step, on one process or on the
    other."""
    path = folder_root / "images" / "train" / "train_000001.jpg"
    path.write_bytes(path.read_bytes()[:300])
    (tmp_path / "list.txt").write_text("".join(f"train_{i:06d}\n" for i in range(4)))
    line = folder_line(split=tmp_path / "list.txt", steps=6, method="suponly", warmup_epochs=None)
    for done in ranks(2, line, io):
        done.ok()
    assert [r.get("skipped_images") for r in log_of(tmp_path / "run") if "loss_l" in r] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_loss_that_is_not_finite_stops_all_processes(tiny, tmp_path, io):
    said = sentences(ranks(2, tiny(out=tmp_path / "out", lr=1e14, decoder_lr=1e14, steps=12), io))
    assert any("is not finite since step" in sentence for sentence in said)


def test_no_process_stays_behind_when_another_is_killed(tiny, tmp_path, io):
    """torchrun ends the others; without it they must at least not compute on for ever on their
    own."""
    out = tmp_path / "out"
    job = torchrun(2, tiny(out=out, steps=5000, eval_every=5000), start=True)
    try:
        assert until(lambda: (out / "log.jsonl").exists() and len(log_of(out, torn=True)) > 1)
        workers = children(job.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        job.communicate(timeout=60)
        assert job.returncode != 0
        time.sleep(0.5)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        job.kill()


# ---------------------------------------------------------------------------------------- a defect
def a_defect(folder: Path, rank: str = "") -> None:
    """To be run in a process of its own: its third step (of process `rank` alone, if given) fails
    as a programming error does, after it has noted which helpers it has."""
    import multiprocessing

    from common import runs

    tally = runs.Run.tally

    def failing(self, step, *args):
        if step == 2 and os.environ.get("RANK", "") == rank:
            pids = [child.pid for child in multiprocessing.active_children()]
            (folder / "helpers.json").write_text(json.dumps(pids))
            raise ZeroDivisionError("a defect")
        return tally(self, step, *args)

    runs.Run.tally = failing


def check_that_helpers_are_gone(folder: Path, number: int) -> None:
    pids = json.loads((folder / "helpers.json").read_text())
    assert len(pids) == number
    assert until(lambda: not any(lives(pid) for pid in pids), seconds=10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_defect_prints_its_traceback_and_ends_the_run_with_its_workers(
    tiny, tmp_path, io, workers
):
    line = tiny(out=tmp_path / "out", workers=workers)
    done = begin(line, io, partial(a_defect, tmp_path)).wait(seconds=60)
    assert done.code == 1 and "ZeroDivisionError: a defect" in done.err, done.err
    check_that_helpers_are_gone(tmp_path, 2 * workers)


def test_a_defect_ends_a_program_that_calls_train_with_its_workers(shapes_root, tmp_path):
    """A program of one's own prints the traceback itself; Python would then wait for workers that
    do not hear its SIGTERM."""
    settings = {
        "root": str(shapes_root),
        "val": "few",
        "split": str(shapes_root / "labeled.txt"),
        "unlabeled": str(shapes_root / "unlabeled.txt"),
        "steps": 8,
        **TINY,
        "workers": 2,
        "warmup_epochs": 1,
        "out": str(tmp_path / "out"),
    }
    program = (
        f"import sys; sys.path += ['tests']\nfrom pathlib import Path\nimport gta_seg\n"
        f"from test_processes import a_defect\na_defect(Path({str(tmp_path)!r}))\n"
        f"gta_seg.train(gta_seg.preset('shapes', **{settings!r}))"
    )
    done = command(["-c", program], timeout=60)
    assert done.code == 1 and "ZeroDivisionError: a defect" in done.err, done.err
    check_that_helpers_are_gone(tmp_path, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_defect_of_one_process_ends_the_other(tiny, tmp_path, io, workers):
    line = tiny(out=tmp_path / "out", workers=workers, eval_every=4)
    every = begin_ranks(2, line, io, partial(a_defect, tmp_path, "1"))
    first, second = [process.wait(seconds=60) for process in every]
    assert second.code == 1 and "ZeroDivisionError: a defect" in second.err
    assert first.code == 2 and "another process of this run stopped" in first.err
    check_that_helpers_are_gone(tmp_path, 2 * workers)


def test_a_defect_of_one_process_ends_torchrun_with_all_processes(tiny, tmp_path):
    program = tmp_path / "faulty.py"
    program.write_text(
        f"import sys; sys.path += [{str(REPO)!r}, {str(REPO / 'tests')!r}]\n"
        f"from pathlib import Path\nimport helpers\nfrom test_processes import a_defect\n"
        f"a_defect(Path({str(tmp_path)!r}), '1')\nhelpers.script(sys.argv[1:])\n"
    )
    line = tiny(out=tmp_path / "out", workers=2, steps=4000)
    job = torchrun(2, line, start=True, name=str(program.with_suffix("")))
    try:
        _, said = job.communicate(timeout=90)
    finally:
        job.kill()
    assert job.returncode == 1 and "ZeroDivisionError: a defect" in said, said
    check_that_helpers_are_gone(tmp_path, 4)


# ----------------------------------------------------------------------- what the machine lacks
def no_more_files() -> None:
    """To be run in a process of its own: whoever reads an image may not open another file."""
    import resource

    from common import semantic

    read_image = semantic.read_image

    def limited(path, **kwargs):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        return read_image(path, **kwargs)

    semantic.read_image = limited


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_open_files_is_a_sentence_and_no_broken_image(tiny, tmp_path, io, workers):
    line = tiny(out=tmp_path / "out", workers=workers)
    error = begin(line, io, no_more_files).wait(seconds=60).error()
    assert "ulimit -n" in error and "--workers" in error


def test_a_full_shared_memory_is_a_sentence(tiny, tmp_path):
    """In a mount namespace of its own, which only root may make: /dev/shm holds 64 KiB."""
    line = tiny(out=tmp_path / "out", workers=2, steps=4000, crop_size=256)
    words = " ".join(f"'{word}'" for word in [sys.executable, "gta_seg.py", *line])
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size=64k x /dev/shm && {words}"],
            capture_output=True,
            text=True,
            timeout=90,
            cwd=REPO,
            env=environment(),
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("a small /dev/shm can be mounted by root only")
    assert done.returncode == 2 and "--shm-size" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
