"""What common/runs.py promises to any script: here to a stranger's, with settings of its own and a
network of one layer."""

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
import torch
from torch import nn

from common import checkpoints, cli, runs
from common.distributed import World, rng
from common.errors import Stopped, UserError

SCRIPT = "stranger.py"


@dataclass
class Settings:
    steps: Annotated[int, msgspec.Meta(ge=1)] = 12
    rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.1
    eval_every: int = 4
    log_every: int = 3
    save_every: int = 5
    betas: tuple[Annotated[float, msgspec.Meta(ge=0, lt=1)], ...] = (0.9, 0.5)
    offset: Annotated[float, msgspec.Meta(ge=-5, le=5)] = 0.0
    resume: bool = False


def nothing(moment: str, step: int) -> None:
    """What happens at the moments of a run that is left alone."""


def train(out: Path, args: Settings, happens=nothing) -> dict:
    """A stranger's training: `happens(moment, step)` is called at "saved", "scored" and "left"."""
    cli.check_ranges(args)
    world = World()
    resuming = runs.open_run(out, SCRIPT, args, args.resume, main=True)
    torch.manual_seed(0)
    network = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(network.parameters(), args.rate, momentum=0.9)
    begun, scored, last, best = 0, 0, None, None
    state = None
    if resuming:
        state = checkpoints.load_checkpoint(out / "last.pt", SCRIPT)
        network.load_state_dict(state["networks"]["line"])
        optimizer.load_state_dict(state["optimizer"])
        begun, scored, last, best = (state[k] for k in ("step", "scored", "last", "best"))
    run = runs.Run(out, SCRIPT, args, world, begun, state, {"network": "one layer"})

    def score(step: int) -> None:
        nonlocal scored, last, best
        last = {"step": step, "sum": network.weight.sum().item()}
        best = last if best is None or last["sum"] > best["sum"] else best
        run.write(step, sum=last["sum"])
        if best is last:
            run.save("best.pt", {"step": step, "networks": {"line": network.state_dict()}})
        scored = step
        happens("scored", step)

    if begun > scored and run.score_is_due(begun):
        score(begun)
    for step in run.steps(begun, args.steps):
        x = torch.from_numpy(rng(0, "x", step).normal(size=(8, 3))).float()
        loss = (network(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = step + 1
        run.tally(step, {"loss": loss.detach()})
        if run.log_is_due(done):
            run.log(done)
        if run.save_is_due(done):
            state = {
                "step": done,
                "scored": scored,
                "last": last,
                "best": best,
                "networks": {"line": network.state_dict()},
                "optimizer": optimizer.state_dict(),
            }
            run.save("last.pt", state)
            happens("saved", done)
        run.leave_if_asked(done)
        if run.score_is_due(done):
            score(done)
    return run.finish({"line": {"last": last, "best": best}}, {"data": "drawn"}, "line", "sum")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(path, SCRIPT)["networks"]["line"]


def lines(out: Path) -> list[dict]:
    """The log without what the clock says."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def in_a_child(function, *args) -> int:
    """Run it in a forked process, which may be killed; returns its exit code."""
    child = multiprocessing.get_context("fork").Process(target=function, args=args)
    child.start()
    child.join(120)
    return child.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    results = train(out, Settings())
    assert results == json.loads((out / "results.json").read_text())
    assert {p.name for p in out.iterdir()} >= {"last.pt", "best.pt", "curves.png", "config.json"}
    return out


def killed(out: Path, args: Settings, moment: str, at: int) -> None:
    def happens(now: str, step: int) -> None:
        if (now, step) == (moment, at):
            os._exit(7)

    train(out, args, happens)


@pytest.mark.parametrize(
    ("moment", "step"),
    [("saved", 4), ("scored", 4), ("saved", 5), ("saved", 8), ("saved", 12), ("scored", 12)],
)
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(tmp_path, whole, moment, step):
    """Bit-equal weights, the best network too; and no line of the log is lost or there twice."""
    out = tmp_path / "run"
    assert in_a_child(killed, out, Settings(), moment, step) == 7
    train(out, Settings(resume=True))
    for name in ("last.pt", "best.pt"):
        for key, value in weights(whole / name).items():
            assert torch.equal(weights(out / name)[key], value), (name, key)
    assert lines(out) == lines(whole)
    then, now = (json.loads((p / "results.json").read_text()) for p in (whole, out))
    assert then["line"] == now["line"]


def test_what_was_due_is_scored_before_training_goes_on(tmp_path):
    out = tmp_path / "run"
    assert in_a_child(killed, out, Settings(), "saved", 8) == 7
    scored = []

    def happens(moment: str, step: int) -> None:
        scored.extend([step] if moment == "scored" else [])
        if moment == "saved":
            assert scored == [8], "trained and saved before the score that was due"
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(out, Settings(resume=True), happens)


def test_a_signal_saves_and_leaves_without_scoring(tmp_path, whole):
    """SIGTERM comes during the step before a score is due, and the handlers are given back."""
    out = tmp_path / "run"
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    moments = []

    def happens(moment: str, step: int) -> None:
        moments.append((moment, step))
        if (moment, step) == ("scored", 4):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM after step 5.*--resume"):
        train(out, Settings(), happens)
    assert moments == [("saved", 4), ("scored", 4), ("saved", 5)]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    train(out, Settings(resume=True))
    assert lines(out) == lines(whole)
    assert torch.equal(weights(out / "last.pt")["weight"], weights(whole / "last.pt")["weight"])


def test_signals_are_given_back_when_a_run_is_finished(tmp_path):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    train(tmp_path / "run", Settings(steps=2))
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_one_listener_serves_several_runs(tmp_path):
    """A program that makes one run after the other hears a signal between them, too."""
    listener = runs.Signals(say=False)
    try:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            run = runs.Run(
                tmp_path / name, SCRIPT, Settings(), World(), 0, None, {}, signals=listener
            )
            run.close()
        os.kill(os.getpid(), signal.SIGTERM)
        assert listener.name == "SIGTERM"
    finally:
        listener.give_back()


def test_a_run_is_resumed_with_its_own_number_of_steps_only(tmp_path, whole):
    """Schedules may depend on the length of a run, so a longer one is another run: it is refused,
    and the sentence names both numbers."""
    with pytest.raises(UserError, match="steps \\(12 then, 20 now\\)"):
        train(whole, Settings(steps=20, resume=True))


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    run = runs.Run(tmp_path, SCRIPT, Settings(), World(), 0, None, {})
    run.log(0)  # nothing was counted yet
    run.save("last.pt", {"step": 1, "networks": {"line": nn.Linear(1, 1).state_dict()}})
    run.tally(1, {"loss": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match="loss is not finite since step 1"):
        run.save("last.pt", {"step": 2, "networks": {}})
    run.close()
    assert checkpoints.load_checkpoint(tmp_path / "last.pt", SCRIPT)["step"] == 1


def test_the_ends_of_stages_are_scored(tmp_path):
    args = Settings(eval_every=0, save_every=0, log_every=0)
    run = runs.Run(tmp_path, SCRIPT, args, World(), 0, None, {}, ends=(7, 12))
    assert [n for n in range(1, 14) if run.score_is_due(n)] == [7, 12]
    assert [n for n in range(1, 14) if run.save_is_due(n)] == [7, 12]
    assert [n for n in range(1, 14) if run.log_is_due(n)] == [7, 12]
    run.close()


# ------------------------------------------------------------------------------------------- ranges
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rate": 0.0}, "--rate 0.0 is outside 0 to 1 \\(0 excluded\\)"),
        ({"rate": 2.0}, "--rate 2.0 is outside 0 to 1"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"steps": 0}, "--steps 0 is below 1"),
        ({"betas": (0.5, 1.0)}, "--betas 0.5 1.0 is outside 0 to 1 \\(1 excluded\\)"),
        ({"offset": -6.0}, "--offset -6.0 is outside -5 to 5"),
        ({"eval_every": -1}, "--eval-every -1 is below 0"),
        ({"steps": "many"}, "--steps many is not allowed here"),
    ],
)
def test_a_setting_outside_its_range_is_named_as_its_flag(change, sentence):
    with pytest.raises(UserError, match=sentence):
        cli.check_ranges(Settings(**change))


def test_settings_within_their_ranges_pass():
    cli.check_ranges(Settings(offset=-5.0, rate=1, betas=(), eval_every=0))


def test_after_the_first_steps_a_line_says_how_long_the_others_will_take(
    tmp_path, capsys, monkeypatch
):
    now = iter(range(0, 100_000, 3))  # each look at the clock is 3 seconds after the one before
    run = runs.Run(tmp_path, SCRIPT, Settings(), World(), 0, None, {})
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(now))
    for _ in run.steps(5, 5 + 1 + runs.TIMED_STEPS + 400):
        pass  # two looks: 3 seconds for 20 steps
    out = capsys.readouterr().out
    assert out.strip() == "400 more steps will take about 60 seconds, and evaluations come on top."
    for _ in run.steps(0, 100):  # 79 steps: 12 seconds, which need no announcement
        pass
    run.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(59.6, "60 seconds"), (91, "2 minutes"), (5400, "1.5 hours")]
)
def test_durations_in_words(seconds, words):
    assert runs.in_words(seconds) == words
