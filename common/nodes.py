"""Nodes of a tree: results that follow from a path, each in a folder of its own, made once, by any
process."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.files import write_text


@dataclass
class Nodes:
    """A node's folder holds node.json, written last: the node is done; and weights.pt, which may be
    removed again. Who makes a node holds a lock on its folder, which the system frees when the
    process dies."""

    root: Path  # folder of the node "", where all paths begin
    others: Path  # holds the folders of all others
    parent_of: Callable[[str], str]
    records: dict[str, dict] = field(default_factory=dict)

    def folder(self, path: str) -> Path:
        return self.others / path if path else self.root

    def done(self, path: str) -> bool:
        return path in self.records or (self.folder(path) / "node.json").is_file()

    def record(self, path: str) -> dict:
        if path not in self.records:
            self.records[path] = json.loads((self.folder(path) / "node.json").read_text())
        return self.records[path]

    def finish(self, path: str, record: dict) -> None:
        """The mark that a node is done."""
        write_text(self.folder(path) / "node.json", json.dumps(record, indent=1))
        self.records[path] = record

    def first_to_make(self, path: str) -> str | None:
        """The first node on the way to `path`, itself included, that must be made for its weights;
        None: none."""
        if self.done(path) and (self.folder(path) / "weights.pt").is_file():
            return None
        return (self.first_to_make(self.parent_of(path)) or path) if path else path

    def make_if_free(self, path: str, make: Callable[[str], None]) -> bool:
        """make(path), unless the node is there; False when another process makes it."""
        with claim(self.folder(path)) as ours:
            if ours and (
                not (self.folder(path) / "node.json").is_file()
                or self.first_to_make(path) is not None
            ):
                make(path)
            return ours


def fingerprint(state: dict) -> str:
    """SHA-256 of the names and values (CPU or GPU tensors) of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
