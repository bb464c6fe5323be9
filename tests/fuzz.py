"""Properties of what parses data from outside, tried on drawn inputs: a few and always the same
ones in the tests, many and ever new ones by `make fuzz`.

A property says what must hold of a function for whatever it is given: a traceback, a hang or a
wrong value that nobody mentions breaks it. A test file adds its own to PROPERTIES, is named in
FILES, and runs each of them a few times with `few`. `make fuzz` runs all of them in turn, for
FUZZ_MINUTES (60), and prints how many inputs each has seen, and the smallest input that broke it.
"""

import contextlib
import faulthandler
import importlib
import io
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

# the test files that add properties
FILES = ("test_outside_data", "test_outside_forms", "test_damaged")

PATIENCE = 60  # seconds after which an input counts as one that hangs


class Property(NamedTuple):
    """`inputs` are drawn; `holds` gets one of them and a folder for its files, and raises when the
    property is broken."""

    inputs: SearchStrategy
    holds: Callable[[Any, Path], None]


PROPERTIES: dict[str, Property] = {}  # by a sentence that says what holds


def few(name: str, folder: Path, examples: int = 60) -> None:
    """Try a property on a few inputs, the same ones on every machine."""
    run(PROPERTIES[name], folder, examples, derandomize=True, database=None)


def run(prop: Property, folder: Path, examples: int, **options) -> int:
    """Try a property on so many inputs; raises what broke it on the smallest of them, and returns
    how many it was tried on."""
    seen = []

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        **options,
    )
    @given(prop.inputs)
    def attempt(value):
        seen.append(None)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            prop.holds(value, folder)

    attempt()
    return len(seen)


def changed(value: Any, place: list[int], new: Any) -> Any:
    """A nest of dictionaries and lists with one of its parts replaced, found by the places on the
    way to it."""
    if not isinstance(value, (dict, list)) or not value or not place:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[place[0] % len(keys)]
    inner = changed(value[key], place[1:], new)
    if isinstance(value, dict):
        return value | {key: inner}
    return [*value[:key], inner, *value[key + 1 :]]


def in_time(holds: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
    """The same for each input, but when it takes too long, the process says where it is, and ends:
    C code that loops hears no signal."""

    def within(value: Any, folder: Path) -> None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            holds(value, folder)
        finally:
            faulthandler.cancel_dump_traceback_later()

    return within


def main(minutes: float) -> int:
    """All properties in turn until the time is over; 1 when one of them was broken."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    fuzz = importlib.import_module("fuzz")  # the module that the test files know
    for file in FILES:
        importlib.import_module(file)
    end = time.monotonic() + 60 * minutes
    tried = dict.fromkeys(fuzz.PROPERTIES, 0)
    broken: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        while time.monotonic() < end and len(broken) < len(tried):
            print(f"{sum(tried.values())} inputs", flush=True)
            for place, (what, prop) in enumerate(fuzz.PROPERTIES.items()):
                if what in broken or time.monotonic() > end:
                    continue
                folder = Path(name, str(place))
                folder.mkdir(exist_ok=True)
                try:
                    phases = (Phase.generate, Phase.target, Phase.shrink)
                    patient = prop._replace(holds=in_time(prop.holds))
                    tried[what] += fuzz.run(patient, folder, 100, phases=phases, database=None)
                except Exception:  # noqa: BLE001 (whatever it is, it is a fault)
                    broken[what] = traceback.format_exc()
                    print(f"BROKEN: {what}\n{broken[what]}", flush=True)
    for what, number in sorted(tried.items()):
        print(f"{number:9d} {what}{'   BROKEN' if what in broken else ''}")
    print(f"{sum(tried.values()):9d} inputs, {len(broken)} of {len(tried)} properties broken")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(float(os.environ.get("FUZZ_MINUTES", 60))))
