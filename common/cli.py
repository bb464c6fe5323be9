"""From a dataclass to a command line, and what is printed when something goes wrong."""

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import msgspec

from common import distributed
from common.checkpoints import Trained, load_checkpoint
from common.errors import LOST, RankError, Stopped, UserError, one_line, user_sentence
from common.loading import end_helpers


def cli(
    args_type: type,
    preset: Callable,
    main: Callable,
    choosers: tuple[str, ...] = ("dataset",),
    argv: list[str] | None = None,
) -> None:
    """Parse the command line over a preset and run `main(args)`. A UserError leaves with one
    sentence and code 2; a defect of ours leaves with its traceback and code 1. Whoever fails leaves
    at once, so that torchrun, and the other processes, hear of it.

    `choosers` are the flags that pick the defaults: `preset(dataset="shapes")` returns the settings
    that every other flag then overrides, so that --help shows the numbers which will be used."""
    try:
        main(parse(args_type, preset, choosers, sys.argv[1:] if argv is None else argv))
        distributed.stop()
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
    except Exception as error:  # noqa: BLE001 (those without a sentence get their traceback)
        sentence = user_sentence(error)
        if sentence is None:
            traceback.print_exc()
            leave(1)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or is_of_one_process(error, sentence):
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        leave(2)


def parse(args_type: type, preset: Callable, choosers: tuple[str, ...], argv: list[str]):
    """The settings that a command line asks for."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in choosers:
        first.add_argument(f"--{name}", nargs="?", default=argparse.SUPPRESS)
    chosen, _ = first.parse_known_args(argv)
    with_value = {name: value for name, value in vars(chosen).items() if value is not None}
    try:
        default = preset(**with_value)
    except KeyError:
        default = preset()  # a name that does not exist: tyro lists those that do
    args = tyro.cli(args_type, default=default, args=argv)
    if "--predict" in argv and not args.predict:
        raise UserError("--predict needs a checkpoint, and then images or folders.")
    return args


def is_of_one_process(error: Exception, sentence: str) -> bool:
    """Whether an error may have met this process alone, so that no other one says its sentence."""
    if sentence == LOST:
        return False
    return isinstance(error, RankError) or not isinstance(error, UserError)


def leave(code: int) -> None:
    """Exit at once, and end the loader processes: no waiting for these, which do not hear SIGTERM,
    or for other processes in a collective call."""
    sys.stdout.flush()
    sys.stderr.flush()
    end_helpers()
    os._exit(code)


def check_ranges(args) -> None:
    """UserError when a setting is not of its field's type, or outside the range at its field.

    A range is written `Annotated[float, msgspec.Meta(ge=0, le=1)]`, in a tuple once for each
    element. Every number must be finite, and must not be negative unless its field names a lower
    bound. `args` is a dataclass with any fields."""
    types = get_type_hints(type(args), include_extras=True)
    for name, value in vars(args).items():
        bounds = bounds_of(types[name])
        flag = f"--{name.replace('_', '-')}"
        said = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        try:
            msgspec.convert(value, types[name])
        except msgspec.ValidationError as error:
            if bounds is None or not numbers_in(value):
                raise UserError(f"{flag} {said} is not allowed here ({error}).") from None
            raise UserError(f"{flag} {said} is {words_of(bounds)}.") from None
        for number in numbers_in(value):
            if not math.isfinite(number):
                raise UserError(f"{flag} {said} is not a finite number.")
            if number < 0 and (bounds is None or (bounds.ge is None and bounds.gt is None)):
                raise UserError(f"{flag} {said} is below 0.")


def numbers_in(value) -> list[float]:
    """The numbers that a setting consists of; none when it is of another kind."""
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


def bounds_of(annotation) -> msgspec.Meta | None:
    """The first range in the annotation of a field, at any depth."""
    if get_origin(annotation) is Annotated:
        for note in annotation.__metadata__:
            if isinstance(note, msgspec.Meta):
                return note
    for part in get_args(annotation):
        bounds = bounds_of(part)
        if bounds is not None:
            return bounds
    return None


def words_of(bounds: msgspec.Meta) -> str:
    """How a value lies that is not within the bounds: "outside 0 to 1", "below 1"."""
    low = bounds.ge if bounds.ge is not None else bounds.gt
    high = bounds.le if bounds.le is not None else bounds.lt
    if high is None:
        return f"below {low:g}" if bounds.gt is None else f"not above {low:g}"
    if low is None:
        low = 0
    excluded = [f"{x:g}" for x in (bounds.gt, bounds.lt) if x is not None]
    if excluded:
        return f"outside {low:g} to {high:g} ({' and '.join(excluded)} excluded)"
    return f"outside {low:g} to {high:g}"


# Settings that a checkpoint does not decide when it is scored or predicted with.
OF_A_COMMAND = (
    "resume",
    "device",
    "workers",
    "compile",
    "check",
    "eval",
    "predict",
    "export",
    "report",
)


def saved_settings(args_type: type, path: Path, script: str):
    """The settings inside a checkpoint, for scoring or predicting with it on this machine."""
    saved = load_checkpoint(path, script, Trained)["settings"]
    default = vars(args_type())
    unknown = sorted(saved.keys() - default.keys())
    if unknown:
        raise UserError(
            f"{path} has settings unknown here ({', '.join(unknown)}); use the version that wrote "
            f"it."
        )
    for name, value in saved.items():
        if isinstance(default[name], tuple) and isinstance(value, list):  # JSON made a list of it
            saved[name] = tuple(value)
    of_this_command = {name: default[name] for name in OF_A_COMMAND if name in default}
    args = args_type(**saved | of_this_command)
    try:
        check_ranges(args)
    except UserError as error:
        reason = one_line(error).rstrip(".")
        raise UserError(
            f"{path} holds a setting that cannot be ({reason}); give another checkpoint."
        ) from None
    return args
