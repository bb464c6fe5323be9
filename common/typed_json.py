"""The door for JSON files: each is decoded into typed records, or is refused in one sentence that
names the file, the place in it, and what to do."""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.errors import UserError

T = TypeVar("T")


def read_json(path: Path, kind: type[T], cure: str) -> T:
    """The content of a JSON file as a `kind`; UserError, which ends with the `cure`, when it is
    missing, damaged or of another form."""
    return decoded(read_bytes(path, cure), kind, str(path), cure)


def read_record(path: Path, kind: Any, cure: str) -> dict:
    """A JSON object as it stands in a file, also with keys that the `kind`, a TypedDict, does not
    name; UserError when the keys that it names are missing or hold something else."""
    try:
        record = json.loads(read_bytes(path, cure))
        msgspec.convert(record, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {said(error)}; {cure}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); {cure}.") from None
    return record


def read_bytes(path: Path, cure: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {cure}.") from None


def decoded(content: bytes, kind: Any, source: str, cure: str) -> Any:
    """The `content` of the file `source` as a `kind`. Digits in a text are taken for a number where
    one is expected, and 1.0 for 1."""
    try:
        return msgspec.json.decode(content, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {said(error)}; {cure}.") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    # Python's reader takes NaN and Infinity, byte order marks and other encodings, which msgspec
    # refuses. What is no number becomes text, so that its place can be named where one is expected.
    try:
        content = msgspec.json.encode(json.loads(content, parse_constant=str))
        return msgspec.json.decode(content, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {said(error)}; {cure}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} cannot be read as JSON ({error}); {cure}.") from None


def said(error: Exception) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.annotations[27].iscrowd`", with the place first
    and in plain words."""
    what, _, place = str(error).partition(" - at `$")
    what = (what[:1].lower() + what[1:]).replace("`", "")
    place = place.rstrip("`").lstrip(".")
    return f"{place}: {what}" if place else what


def repeated_key(content: bytes) -> str | None:
    """A key that stands twice in one object of a JSON file, of which readers would take the last
    without a word; None where there is none."""
    found = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            found.append(next(key for key in keys if keys.count(key) > 1))

    json.loads(content, object_pairs_hook=look)
    return found[0] if found else None
