"""From a dataclass to a command line, and what is printed when something goes wrong."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from common.checkpoints import load_checkpoint
from common.errors import LOST, RankError, Stopped, UserError, user_sentence


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
