"""The run folder: settings, log, progress, atomic checkpoints, resume, signals, weight files,
errors for the user."""

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
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoints import save_checkpoint
from common.errors import RankError, Stopped, UserError
from common.files import parse_line, read_log, write_text

FREE_TO_CHANGE = {
    "out",
    "resume",
    "workers",
    "device",
    "log_every",
    "save_every",
    "compile",
    "eval",
    "predict",
}


HELD = []  # open files, locked as long as this process lives


# --------------------------------------------------------------------------------------- run folder
def default_out(script: str, args) -> Path:
    """--out, or runs/<script>-<dataset>-<split>-d<split seed>-s<seed>."""
    split = (
        Path(args.split).stem if Path(args.split).is_file() else args.split.removeprefix("random:")
    )
    split = split.replace("/", "-of-").replace("%", "pc")
    return Path(
        args.out
        or f"runs/{Path(script).stem}-{args.dataset}-{split}-d{args.split_seed}-s{args.seed}"
    )


def open_run(out: Path, script: str, args, resume: bool, main: bool) -> bool:
    """Check and make the run folder; True when there is a checkpoint to continue from.

    Raises UserError when the folder holds another run, or the same run with other settings."""
    config, last = out / "config.json", out / "last.pt"
    settings = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder.")
    if last.exists() or config.exists():
        if not resume:
            raise UserError(
                f"{out} holds another run; continue it with --resume, or name a new folder with --out."
            )
        try:
            old = json.loads(config.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{config} cannot be read ({error}); start again with another --out."
            ) from None
        if old.get("script") != script:
            raise UserError(
                f"{out} holds a run of {old.get('script')}, not of {script}; name another --out."
            )
        then = old.get("settings", {})
        if differ := [
            f"{k} ({then.get(k)} then, {settings.get(k)} now)"
            for k in sorted(then.keys() | settings.keys())
            if k not in FREE_TO_CHANGE and then.get(k) != settings.get(k)
        ]:
            raise UserError(
                f"--resume with other settings than {out} was started with: {', '.join(differ)}; "
                f"use the old ones, or another --out."
            )
    if resume and main and not last.exists():
        print(f"--resume: no checkpoint in {out} yet, so this run starts afresh.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        HELD.append(open(out / ".lock", "w"))  # loader processes do not inherit its lock
        if int(os.environ.get("RANK", 0)) == 0:
            fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"Another process is at work in {out}; wait for it, or name another --out."
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return last.exists()  # a file system without locks
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"The run folder {out} cannot be written ({error.strerror}); name another --out."
        ) from None
    return last.exists()


def write_config(out: Path, script: str, args, world, extra: dict) -> None:
    """config.json: settings, versions, commit, devices, and what the run decided by itself
    (`extra`)."""
    device = (
        torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else platform.processor() or "cpu"
    )
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


class Run:
    """A run's folder while it trains: config, log, checkpoints, progress bar, clock, signals.

    `before` is the checkpoint it continues from, if any; `extra` is written into config.json. All
    processes make one; only the main one writes. log.jsonl has one object a line (and TensorBoard
    the same, when it is installed)."""

    def __init__(
        self, out: Path, script: str, args, world, step: int, before: dict | None, extra: dict
    ):
        self.out, self.script, self.args, self.world = out, script, args, world
        self.seconds, self.skipped_before = (
            (before or {}).get("seconds", 0.0),
            (before or {}).get("skipped", 0),
        )
        self.first_bad, self.values, self.images, self.signal = {}, {}, 0, ""
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.file = self.writer = None
        world.barrier()  # all have looked into the folder before it changes
        if world.main:
            for left in out.glob(".*.tmp"):  # of a process that was killed while saving
                left.unlink(missing_ok=True)
            path = out / "log.jsonl"
            if path.exists():  # cut back to the checkpoint we continue from
                lines = path.read_text().splitlines()
                write_text(
                    path,
                    "".join(x + "\n" for x in lines if parse_line(x).get("step", step + 1) <= step),
                )
            self.file = open(path, "a", buffering=1)
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(out), purge_step=step + 1)
            write_config(out, script, args, world, extra)
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: no signals
                signal.signal(number, self.ask)
        self.clock = time.perf_counter()

    def say(self, *lines: str) -> None:
        """Lines for the user, from the main process alone."""
        if self.world.main:
            print(*lines, sep="\n", flush=True)

    def ask(self, number, frame) -> None:
        """SIGTERM or Ctrl-C: save and leave after this step; a second Ctrl-C leaves at once."""
        self.signal = signal.Signals(number).name  # print is not safe here
        os.write(
            2,
            b"\nStopping after this step or evaluation; Ctrl-C again leaves at once.\n"
            * self.world.main,
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked(self, step: int) -> str:
        """The signal that some process got, or "". Several processes agree on every fifth step only
        (it is a wait)."""
        if self.world.size == 1 or step % 5:
            return self.signal if self.world.size == 1 else ""
        number = self.world.sum(torch.tensor(float(bool(self.signal)), device=self.world.device))
        return (self.signal or "a signal to another process") if number.item() else ""

    def steps(self, start: int, total: int):
        """range(start, total) with a progress bar; a line a minute where there is no terminal."""
        from tqdm import tqdm

        return tqdm(
            range(start, total),
            initial=start,
            total=total,
            disable=int(os.environ.get("RANK", 0)) > 0,
            smoothing=0.05,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )

    def tally(self, step: int, values: dict[str, Tensor], *batches) -> None:
        """Note what a step gave and read, without waiting for the device, and when a loss first was
        not finite."""
        self.values = values
        for batch in (b for b in batches if b is not None):
            self.images += len(batch.skipped) * self.world.size
            self.skipped = self.skipped + batch.skipped.sum()
        for name in (n for n in values if n.startswith("loss")):
            old = self.first_bad.get(name, torch.full((), -1, device=values[name].device))
            self.first_bad[name] = torch.where((old < 0) & ~torch.isfinite(values[name]), step, old)

    def check(self) -> None:
        """Raise when a loss was not finite, so that nothing is saved over the last good
        checkpoint."""
        for name, step in self.first_bad.items():
            if step.item() >= 0:
                raise RankError(
                    f"{name} is not finite since step {step.item()}, so training stops; the last good "
                    f"checkpoint stays in {self.out}. Try a lower --lr, or --precision fp32."
                )

    def log(self, step: int, **extra) -> None:
        """One line: the last step's values as means over processes, `extra`, images per second
        since the last line."""
        self.check()
        if self.world.device.type == "cuda":  # of the main process, since the start
            extra["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        means = self.world.mean(torch.stack([v.float() for v in self.values.values()])).tolist()
        elapsed = time.perf_counter() - self.clock
        if self.skipped_total():
            extra["skipped_images"] = self.skipped_total()
        self.write(
            step,
            **dict(zip(self.values, means, strict=True)),
            **extra,
            images_per_second=round(self.images / elapsed, 2),
        )
        self.seconds, self.images, self.clock = self.seconds + elapsed, 0, time.perf_counter()

    def write(self, step: int, **values) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items() if self.writer else ():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def save(self, name: str, state: dict) -> None:
        """A checkpoint, atomically; restarts the clock, so that saving and scoring do not count as
        training."""
        self.check()
        for network, weights in state["networks"].items():
            if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
                raise RankError(
                    f"The weights of {network} are not finite after step {state['step'] - 1}, so training "
                    f"stops; the last good checkpoint stays in {self.out}. Try a lower --lr."
                )
        skipped = self.skipped_total()
        if self.world.main:
            save_checkpoint(
                self.out / name, self.script, {**state, "seconds": self.seconds, "skipped": skipped}
            )
        self.clock = time.perf_counter()

    def skipped_total(self) -> int:
        """Broken images that all processes passed over since the run began."""
        return self.skipped_before + int(self.world.sum(self.skipped))

    def leave(self, step: int) -> None:
        """After a signal, and after saving: say where the run stands."""
        self.world.barrier()
        raise Stopped(
            f"Stopped by {self.asked(0)} after step {step}; {self.out / 'last.pt'} is saved, continue with "
            f"--resume."
        )

    def finish(self, scores: dict, facts: dict, headline: str, metric: str) -> dict:
        """results.json (`scores` of each network, and `facts`) and curves.png; says what `headline`
        reached and where everything is. Returns what results.json holds."""
        from common import plots

        a = self.args
        results = scores | {
            "dataset": a.dataset,
            "split": a.split,
            "split_seed": a.split_seed,
            "seed": a.seed,
            **facts,
            "seconds": round(self.seconds, 1),
        }
        if self.writer is not None:
            self.writer.close()
        if self.file is not None:
            self.file.close()
            records = read_log(self.out / "log.jsonl")
            speeds = sorted(r["images_per_second"] for r in records if "images_per_second" in r)
            results["images_per_second"] = speeds[len(speeds) // 2] if speeds else None
            write_text(self.out / "results.json", json.dumps(results, indent=1))
            plots.curves(records, self.out / "curves.png", str(self.out))
            said = [
                f"{name} {s['last'][metric]:.2f} (best {s['best'][metric]:.2f} at step {s['best']['step']})"
                for name, s in sorted(scores.items(), key=lambda item: item[0] != headline)
            ]
            print(
                f"\n{metric}: {', '.join(said)}\nin {self.out}: "
                f"{', '.join(sorted(p.name for p in self.out.iterdir() if not p.name.startswith(('.', 'events'))))}"
            )
        return results


def write_scores(path: Path, scores: dict, facts: dict, metric: str, where: str) -> None:
    """The results of --eval beside its checkpoint, and a line for each network."""
    write_text(path, json.dumps(scores | facts))
    for name, score in scores.items():
        print(f"{name}: {metric} {score['last'][metric]:.2f} on {where}")
    print(f"in {path}")
