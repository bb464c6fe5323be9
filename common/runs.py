"""The run folder: settings, log, progress, checkpoints, resume, signals, results."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from common.checkpoints import save_checkpoint
from common.errors import RankError, Stopped, UserError
from common.files import parse_line, read_log, whole_lines, write_text
from common.typed_json import read_json

FREE_TO_CHANGE = {
    "out",
    "resume",
    "workers",
    "device",
    "log_every",
    "save_every",
    "compile",
    "check",
    "eval",
    "predict",
    "predict_tile",
}  # settings that a resumed run may have otherwise


class Config(msgspec.Struct):
    """What a resumed run looks at in config.json."""

    script: str
    settings: dict[str, Any]


HELD = []  # open files, because a lock ends when its file is closed


# --------------------------------------------------------------------------------------- run folder
def default_out(script: str, args) -> Path:
    """--out, or runs/<script>-<dataset>-<split>-d<split seed>-s<seed>."""
    if args.out:
        return Path(args.out)
    if Path(args.split).is_file():
        split = Path(args.split).stem
    else:
        split = args.split.removeprefix("random:")
    split = split.replace("/", "-of-").replace("%", "pc")
    name = f"{Path(script).stem}-{args.dataset}-{split}-d{args.split_seed}-s{args.seed}"
    return Path("runs") / name


def open_run(out: Path, script: str, args, resume: bool, main: bool) -> bool:
    """Check and make the run folder; True when there is a checkpoint to continue from. A resumed
    run has the settings it was started with, --steps too: schedules depend on its length.

    Raises UserError when the folder holds another run, or the same run with other settings."""
    config = out / "config.json"
    last = out / "last.pt"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if last.exists() or config.exists():
        if not resume:
            raise UserError(
                f"{out} holds another run; continue it with --resume, or name a new folder with "
                f"--out."
            )
        check_same_run(config, script, args)
    if resume and main and not last.exists():
        print(f"--resume: no checkpoint in {out} yet, so this run starts afresh.")
    lock(out)
    return last.exists()


def check_same_run(config: Path, script: str, args) -> None:
    """UserError when config.json is of another script, or of other settings. What an older version
    did not know has its default, which does what that version did."""
    out = config.parent
    old = read_json(config, Config, "start again with another --out")
    if old.script != script:
        raise UserError(f"{out} holds a run of {old.script}, not of {script}; name another --out.")
    defaults = {setting.name: setting.default for setting in dataclasses.fields(args)}
    then = json.loads(json.dumps(defaults, default=str)) | old.settings
    now = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    differences = [
        f"{name} ({then.get(name)} then, {now.get(name)} now)"
        for name in sorted(then.keys() | now.keys())
        if name not in FREE_TO_CHANGE and then.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"--resume with other settings than {out} was started with: {', '.join(differences)}; "
            f"use the old ones, or another --out."
        )


def lock(out: Path) -> None:
    """Make the folder, and keep other programs out of it as long as this process lives; UserError
    when one is there, or the folder cannot be written. Loader processes do not inherit the lock,
    and a file system without locks goes without."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        HELD.append(open(out / ".lock", "w"))
        if int(os.environ.get("RANK", 0)) == 0:
            fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another process is at work in {out}; wait for it, or name another --out."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"The run folder {out} cannot be written ({error.strerror}); name another --out."
        ) from None


def write_config(out: Path, script: str, args, world, extra: dict) -> None:
    """config.json: settings, versions, commit, devices, and what the run decided by itself
    (`extra`)."""
    device = platform.processor() or "cpu"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name()
    record = {
        "script": script,
        "settings": dataclasses.asdict(args),
        **extra,
        "processes": world.size,
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    write_text(out / "config.json", json.dumps(record, indent=1, default=str))


def commit() -> str:
    """The commit of this source tree, with a plus sign when it was changed; empty outside git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    return ""


class Signals:
    """Hears SIGTERM and Ctrl-C, so that a run can save its state before it leaves.

    `name` is the signal that came, or "". `give_back` restores the handlers that were there
    before. Away from the main thread Python allows no handlers, and nothing is heard."""

    def __init__(self, say: bool = True):
        self.name = ""
        self.say = say
        self.handlers_before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread
                self.handlers_before[number] = signal.signal(number, self.hear)

    def hear(self, number, frame) -> None:
        """Note the signal; a second Ctrl-C leaves at once."""
        self.name = signal.Signals(number).name
        if self.say:  # print is not safe in a signal handler
            os.write(2, b"\nStopping after this step or evaluation; Ctrl-C again leaves at once.\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def give_back(self) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.handlers_before = {}


class Run:
    """A run's folder while it trains: config, log, checkpoints, progress bar, clock, signals.

    `args` is a dataclass of settings. It is written into config.json beside `facts`, which the run
    found out by itself. Of its fields, `log_every`, `save_every` and `eval_every` are used where
    it has them (0 means at the end only). `ends` are the steps at which a stage of the training
    ends, by default `args.steps` alone. `state` is the checkpoint that the run continues from, or
    None; `step` is where it continues.

    Every process makes a Run, and the main one writes. log.jsonl has one object a line;
    TensorBoard gets the same when it is installed. A loop calls, after each step and in this
    order: `tally`; `log` when `log_is_due`; `save` when `save_is_due`; `leave_if_asked`; and, when
    `score_is_due`, its own scoring, which writes with `write`. So a checkpoint is saved before the
    scoring that may fail. A checkpoint holds, beside what the script needs, `step` and `scored`,
    the last step that was scored; a resumed run scores first if its step is later and a score was
    due there.

    `signals` are those of a program that makes several runs one after the other; by default a run
    hears by itself, and gives the handlers back in `close`."""

    def __init__(
        self,
        out: Path,
        script: str,
        args,
        world,
        step: int,
        state: dict | None,
        facts: dict,
        ends: Sequence[int] | None = None,
        eval_every: int | None = None,
        signals: Signals | None = None,
    ):
        settings = vars(args)
        if ends is None:
            ends = (settings["steps"],) if "steps" in settings else ()
        if eval_every is None:
            eval_every = settings.get("eval_every", 0)
        state = state or {}
        self.out, self.script, self.args, self.world = out, script, args, world
        self.ends = tuple(ends)
        self.log_every = settings.get("log_every", 0)
        self.save_every = settings.get("save_every", 0)
        self.eval_every = eval_every
        self.seconds = state.get("seconds", 0.0)
        self.skipped_before = state.get("skipped", 0)
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.values = {}  # what the last step gave
        self.first_bad = {}  # the first step at which a loss was not finite, or -1
        self.images = 0  # read since the last line of the log
        self.leaving = ""  # the signal after which the run leaves at this step
        self.file = None
        self.writer = None
        world.barrier()  # all processes have looked into the folder before it changes
        if world.main:
            self.open_log(step, state.get("scored", step))
            write_config(out, script, args, world, facts)
        self.signals_are_own = signals is None
        self.signals = Signals(say=world.main) if signals is None else signals
        self.clock = time.perf_counter()

    def open_log(self, step: int, scored: int) -> None:
        """Cut the log back to what the checkpoint knows, and remove half-written files. Training
        lines stay up to its `step`, evaluations up to the last one it has `scored`."""
        for temporary in self.out.glob(".*.tmp"):  # of a process that was killed while saving
            temporary.unlink(missing_ok=True)
        path = self.out / "log.jsonl"
        if path.exists():
            kept = []
            for line in whole_lines(path):
                record = parse_line(line)
                last = step if "images_per_second" in record else scored
                if record.get("step", last + 1) <= last:
                    kept.append(line + "\n")
            write_text(path, "".join(kept))
        self.file = open(path, "a", buffering=1)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.out), purge_step=step + 1)

    # ------------------------------------------------------------------------------- what is due
    def steps(self, start: int, total: int):
        """range(start, total) with a progress bar; a line a minute where there is no terminal.
        After the first of many steps, a line says how long the others will take."""
        from tqdm import tqdm

        bar = tqdm(
            range(start, total),
            initial=start,
            total=total,
            disable=int(os.environ.get("RANK", 0)) > 0,
            smoothing=0.05,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )
        for step in bar:
            if step == start + 1:  # the first step also starts workers and chooses kernels
                begun = time.perf_counter()
            if step == start + 1 + TIMED_STEPS:
                seconds = (time.perf_counter() - begun) / TIMED_STEPS * (total - step)
                if self.world.main and seconds > 30:
                    left = f"{total - step:,} more steps will take about {in_words(seconds)}"
                    bar.write(f"{left}, and evaluations come on top.")
            yield step

    def score_is_due(self, step: int) -> bool:
        """Every `eval_every` steps, and where a stage ends."""
        return step in self.ends or is_multiple(step, self.eval_every)

    def log_is_due(self, step: int) -> bool:
        """Every `log_every` steps, and wherever a score is due."""
        return self.score_is_due(step) or is_multiple(step, self.log_every)

    def save_is_due(self, step: int) -> bool:
        """Every `save_every` steps, before a score, and after a signal. Called once after each
        step by every process: they agree here whether they leave."""
        self.leaving = self.asked(step)
        if self.leaving or self.score_is_due(step):
            return True
        return is_multiple(step, self.save_every)

    def leave_if_asked(self, step: int) -> None:
        """After a signal, and after saving: say where the run stands, and raise Stopped. What was
        due to be scored is scored when the run is resumed."""
        if not self.leaving:
            return
        self.world.barrier()
        self.close()
        raise Stopped(
            f"Stopped by {self.leaving} after step {step}; {self.out / 'last.pt'} is saved, "
            f"continue with --resume."
        )

    def asked(self, step: int) -> str:
        """The signal that some process got, or "". Several processes agree on every fifth step
        only, because they wait for each other there."""
        if self.world.size == 1:
            return self.signals.name
        if step % 5 and step not in self.ends:
            return ""
        heard = torch.tensor(float(bool(self.signals.name)), device=self.world.device)
        if self.world.sum(heard).item() == 0:
            return ""
        return self.signals.name or "a signal to another process"

    # ------------------------------------------------------------------------------ what happened
    def say(self, *lines: str) -> None:
        """Lines for the user, from the main process alone."""
        if self.world.main:
            print(*lines, sep="\n", flush=True)

    def tally(self, step: int, values: dict[str, Tensor], *batches) -> None:
        """Note what a step gave and read, without waiting for the device, and when a loss first was
        not finite. Each batch has `skipped` (B,), which images of it could not be read; None is no
        batch."""
        self.values = {name: torch.as_tensor(value) for name, value in values.items()}
        for batch in batches:
            if batch is not None:
                self.images += len(batch.skipped) * self.world.size
                self.skipped = self.skipped + batch.skipped.sum()
        for name, value in self.values.items():
            if name.startswith("loss"):
                before = self.first_bad.get(name, torch.full((), -1, device=value.device))
                is_bad = (before < 0) & ~torch.isfinite(value)
                self.first_bad[name] = torch.where(is_bad, step, before)

    def check(self) -> None:
        """Raise when a loss was not finite, so that nothing is saved over the last good
        checkpoint."""
        for name, step in self.first_bad.items():
            if step.item() >= 0:
                raise RankError(
                    f"{name} is not finite since step {step.item()}, so training stops; the last "
                    f"good checkpoint stays in {self.out}. Try a lower --lr, or --precision fp32."
                )

    def log(self, step: int, **extra) -> None:
        """One line: the last step's values as means over processes, `extra`, images per second
        since the last line."""
        self.check()
        if self.world.device.type == "cuda":  # of the main process, since the start
            extra["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        means = []
        if self.values:
            stacked = torch.stack([value.float() for value in self.values.values()])
            means = self.world.mean(stacked).tolist()
        elapsed = time.perf_counter() - self.clock
        skipped = self.skipped_total()
        if skipped:
            extra["skipped_images"] = skipped
        self.write(
            step,
            **dict(zip(self.values, means, strict=True)),
            **extra,
            images_per_second=round(self.images / elapsed, 2),
        )
        self.seconds += elapsed
        self.images = 0
        self.clock = time.perf_counter()

    def write(self, step: int, **values) -> None:
        """A line of the log with these values, from the main process; a score is written so."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(name, value, step)

    def save(self, name: str, state: dict) -> None:
        """A checkpoint, atomically; restarts the clock, so that saving and scoring do not count as
        training. Weights in state["networks"] must be finite."""
        self.check()
        for network, weights in state.get("networks", {}).items():
            if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
                raise RankError(
                    f"The weights of {network} are not finite after step {state['step'] - 1}, so "
                    f"training stops; the last good checkpoint stays in {self.out}. Try a lower "
                    f"--lr."
                )
        skipped = self.skipped_total()
        if self.world.main:
            complete = {**state, "seconds": self.seconds, "skipped": skipped}
            save_checkpoint(self.out / name, self.script, complete)
        self.clock = time.perf_counter()

    def skipped_total(self) -> int:
        """Broken images that all processes passed over since the run began."""
        return self.skipped_before + int(self.world.sum(self.skipped))

    def close(self) -> None:
        """Close the log and give the signal handlers back, if the run took them."""
        if self.writer is not None:
            self.writer.close()
        if self.file is not None:
            self.file.close()
        self.writer = None
        self.file = None
        if self.signals_are_own:
            self.signals.give_back()

    def finish(self, scores: dict, facts: dict, headline: str, metric: str) -> dict:
        """results.json (`scores` of each network, and `facts`) and curves.png; says what `headline`
        reached and where everything is. Returns what results.json holds.

        `scores` maps each network to its "last" and "best" record, which have `metric` and "step".
        """
        self.close()
        names = ("dataset", "split", "split_seed", "seed")
        identity = {name: vars(self.args)[name] for name in names if name in vars(self.args)}
        results = scores | identity | facts | {"seconds": round(self.seconds, 1)}
        if self.world.main:
            from common import plots

            records = read_log(self.out / "log.jsonl")
            speeds = sorted(r["images_per_second"] for r in records if "images_per_second" in r)
            results["images_per_second"] = speeds[len(speeds) // 2] if speeds else None
            write_text(self.out / "results.json", json.dumps(results, indent=1))
            plots.curves(records, self.out / "curves.png", str(self.out))
            reached = []
            headline_first = sorted(scores.items(), key=lambda item: item[0] != headline)
            for name, score in headline_first:
                last, best = score["last"], score["best"]
                reached.append(
                    f"{name} {last[metric]:.2f} (best {best[metric]:.2f} at step {best['step']})"
                    f"{classes_note(last)}"
                )
            files = sorted(
                path.name
                for path in self.out.iterdir()
                if not path.name.startswith((".", "events"))
            )
            print(f"\n{metric}: {', '.join(reached)}\nin {self.out}: {', '.join(files)}")
        return results


TIMED_STEPS = 20  # from which the length of a run is estimated


def in_words(seconds: float) -> str:
    """A duration as people say it: 40 seconds, 12 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def classes_note(score: dict) -> str:
    """What to say beside a mean IoU: over how many classes it is the mean, where some occur in
    neither labels nor predictions. Other scores have no `iou` of each class."""
    of_class = score.get("iou", {})
    counted = [name for name, value in of_class.items() if value is not None]
    if len(counted) == len(of_class):
        return ""
    return f", mean over {len(counted)} of {len(of_class)} classes"


def write_scores(path: Path, scores: dict, facts: dict, metric: str, where: str) -> None:
    """The results of --eval beside its checkpoint, and a line for each network."""
    write_text(path, json.dumps(scores | facts))
    for name, score in scores.items():
        note = classes_note(score["last"])
        print(f"{name}: {metric} {score['last'][metric]:.2f}{note} on {where}")
    print(f"in {path}")
