"""The run folder: settings, log, progress, atomic checkpoints, resume, signals, weight files,
errors for the user."""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

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
LOST = "another process of this run stopped, or the network to it failed; see its message."


class UserError(Exception):
    """Something the user can mend. The message is one sentence: what, where, what to do."""


def cli(
    args_type: type,
    preset: Callable,
    main: Callable,
    choosers: tuple[str, ...] = ("dataset",),
    argv: list[str] | None = None,
) -> None:
    """Parse the command line over a preset and run `main(args)`; a UserError leaves with one
    sentence and code 2.

    `choosers` are the flags that pick the defaults: `preset(dataset="shapes")` returns the settings
    that every other flag then overrides, so that --help shows the numbers which will be used."""
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in choosers:
        first.add_argument(f"--{name}", default=argparse.SUPPRESS)
    try:
        try:
            default = preset(**vars(first.parse_known_args(argv)[0]))
        except KeyError:
            default = preset()  # an unknown name: tyro lists those that exist
        # --flag and --no-flag: presets have both
        main(tyro.cli(args_type, default=default, args=argv))
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\n{stopped}", flush=True)
        leave(0)
    except KeyboardInterrupt:
        print(
            "\nStopped by Ctrl-C at once; nothing was saved since the last checkpoint, if any.",
            file=sys.stderr,
        )
        leave(130)
    except Exception as error:  # noqa: BLE001 (only those with a sentence stay)
        if (sentence := user_sentence(error)) is None:
            raise
        alone = sentence != LOST and (
            isinstance(error, RankError) or not isinstance(error, UserError)
        )
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or alone:  # else another process says the same
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        leave(2)


def leave(code: int) -> None:
    """Exit at once: no waiting for loader processes, or for other processes in a collective
    call."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class RankError(UserError):
    """A UserError that only one process met, so that this process must say it."""


def user_sentence(error: BaseException) -> str | None:
    """The sentence for the user, or None when this is a defect of ours and deserves its
    traceback."""
    text = str(error)
    if isinstance(error, UserError):  # a DataLoader worker wraps it in its traceback
        return re.split(r"(?:BrokenImage|RankError|UserError): ", text)[-1].strip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"No space left on the disk, or in its quota, while writing {error.filename or 'the run folder'}; the "
            f"last checkpoint is whole, so free some space and continue with --resume."
        )
    words = (
        "closed by peer",
        "closed by remote peer",
        "onnection reset",
        "remote process exited",
        "likely closed",
    )
    if (
        isinstance(error, RuntimeError)
        and any(w in text for w in words)
        and int(os.environ.get("WORLD_SIZE", 1)) > 1
    ):
        return LOST  # of gloo, NCCL and the store; NCCL has others, too
    if "out of memory" in text.lower() and isinstance(error, torch.OutOfMemoryError):
        return "The GPU ran out of memory; use a smaller --batch-size or --crop-size, or more GPUs."
    return None


def check_ranges(args, limits: dict[str, tuple[float, float]]) -> None:
    """UserError when a number, or a pair of them, is negative, outside its (low, high), or not in
    order."""
    for name, values in vars(args).items():
        values = values if isinstance(values, tuple) else (values,)
        if not all(isinstance(v, (int, float)) for v in values):
            continue
        low, high = limits.get(name, (1 if name == "log_every" else 0, 1e15))
        if not all(low <= v <= high for v in values) or (
            name != "crop_size" and list(values) != sorted(values)
        ):
            raise UserError(
                f"--{name.replace('_', '-')} {' '.join(map(str, values))} is outside {low:g} to {high:g}"
                f"{', or not in order' if len(values) > 1 else ''}."
            )


def check_meaning(args, base, method: str, flags_of: dict[str, str], idle: dict[str, bool]) -> None:
    """UserError when a flag was changed that would be ignored: by `method`, where `flags_of` maps
    methods to their flags (both as words), or beside another flag, where `idle` says so."""
    for name in (n for n, off in idle.items() if off and getattr(args, n) != getattr(base, n)):
        raise UserError(
            f"--{name.replace('_', '-')} does nothing beside another flag of this command; leave it out."
        )
    for methods, names in flags_of.items():
        for name in names.split() if method not in methods.split() else ():
            if getattr(args, name) != getattr(base, name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no meaning for {method}; leave it out."
                )


def saved_settings(args_type: type, path: Path, script: str):
    """The settings inside a checkpoint, for scoring or predicting with it on this machine."""
    saved = load_checkpoint(path, script)["settings"]
    default = args_type()
    if unknown := sorted(saved.keys() - vars(default).keys()):
        raise UserError(
            f"{path} has settings unknown here ({', '.join(unknown)}); use the version that wrote it."
        )
    saved = {k: tuple(v) if isinstance(getattr(default, k), tuple) else v for k, v in saved.items()}
    return args_type(
        **saved | {k: getattr(default, k) for k in ("resume", "device", "workers", "compile")}
    )


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


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary file, flush it to the disk, rename: a reader sees the old file or the
    new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


@contextlib.contextmanager
def claim(folder: Path, wait: bool = False):
    """`with claim(folder) as ours`: True when no other process has this folder, which is made,
    until the block ends or this process dies; with `wait` it becomes so. UserError on a file system
    without locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); name another --store."
        ) from None
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UserError(
                f"{folder} lies on a file system without locks ({error.strerror}); name another."
            ) from None
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # loader processes may hold a copy of the handle


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


def parse_line(line: str) -> dict:
    """One line of a log; {} when a crash left it torn."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)
    return {}


def read_log(path: Path) -> list[dict]:
    return [record for line in path.read_text().splitlines() if (record := parse_line(line))]


class Stopped(Exception):
    """A run that was asked to leave and has saved its state."""


# -------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(path: Path, script: str, state: dict) -> None:
    """torch.save, atomically. `state` holds tensors, numbers, strings, lists and dicts only."""
    buffer = io.BytesIO()
    torch.save({"script": script, **state}, buffer)
    write_bytes(path, buffer.getbuffer())


def load_checkpoint(path: Path, script: str) -> dict:
    """Read what `save_checkpoint` wrote; UserError for a missing, broken or foreign file."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (zip, pickle, runtime errors)
        raise UserError(
            f"{path} is not a readable checkpoint ({type(error).__name__}); "
            f"use another one, or start again with another --out."
        ) from None
    if not isinstance(state, dict) or "script" not in state:
        raise UserError(
            f"{path} is a file of weights, not a checkpoint of {script}; give it to --weights."
        )
    if state["script"] != script:
        raise UserError(f"{path} is a checkpoint of {state['script']}, not of {script}.")
    return state | {"path": str(path)}


def read_weights(path: Path, flag: str = "--weights") -> dict[str, Tensor]:
    """A flat dict of tensors from .pth/.pt/.bin (weights_only), .safetensors or .pkl, without
    wrappers' prefixes."""
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; give imagenet, none or a file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(str(path))
        elif path.suffix == ".pkl":
            from data.read import read_pickle

            weights = read_pickle(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (each format has its own)
        raise UserError(
            f"{flag} {path} cannot be read as weights ({type(error).__name__}); save it again as a "
            f"plain state dict."
        ) from None
    for wrapper in ("networks", "model", "state_dict", "teacher", "supervised", "student"):
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    weights = weights if isinstance(weights, dict) else {}
    weights = {k: torch.as_tensor(v) for k, v in weights.items() if hasattr(v, "shape")}
    while weights and all(k.startswith("module.") for k in weights):
        weights = {k.removeprefix("module."): v for k, v in weights.items()}
    if not weights:
        raise UserError(f"{flag} {path} holds no tensors.")
    return weights


def load_exact(network: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load all tensors of the checkpoint `path`; UserError when the network was built with other
    settings."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:90]
        raise UserError(
            f"{path} does not fit the network of these settings ({first}); leave --backbone, --width and "
            f"other network flags as they were."
        ) from None


def load_matching(network: nn.Module, weights: dict[str, Tensor], what: str) -> list[str]:
    """Load every tensor whose name and shape fit; return lines that report each one that did not.

    Raises UserError when nothing fits."""
    own = network.state_dict()
    fits = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if not any(v.dim() > 1 for v in fits.values()):
        raise UserError(
            f"None of the {len(weights)} tensors of {what} fits this --backbone "
            f"(for example {next(iter(weights))})."
        )
    network.load_state_dict(fits, strict=False)
    wrong = [k for k in weights if k in own and k not in fits]
    fresh = [k for k in own if k not in fits and not k.endswith("num_batches_tracked")]
    unused = [k for k in weights if k not in own]
    return [
        f"{label} ({len(keys)}): {', '.join(keys)}"
        for label, keys in [
            ("of another shape, left fresh", wrong),
            ("not in the file, left fresh", fresh),
            ("in the file, not in the network", unused),
        ]
        if keys
    ]
