"""Nodes of a tree of trainings, each made once, by any process, and found by its path.

A path is a word such as LPP; the parent of LPP is LP, and the root is the empty word. A node is the
weights of a network and a record of what is known about them. Both follow from the path alone, and
so processes need not talk: each runs the same searches, makes any node whose parent is there and
which nobody else is making, and reads what the others have made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from common.checkpoints import Trained, load_checkpoint
from common.distributed import World
from common.errors import RankError, UserError
from common.files import write_text
from common.typed_json import read_record


# --------------------------------------------------------------------------------------- the store
class NodeNetworks(TypedDict):
    student: dict[str, Tensor]


class NodeForm(Trained, kw_only=True):
    """What the checkpoint of a node holds."""

    networks: NodeNetworks


@dataclass
class Nodes:
    """The store, which is the folders in which nodes lie. A node's folder holds weights.pt, which
    may be removed again, and node.json, the record, which is written last and marks the node as
    done. Whoever makes a node holds a lock on its folder; the system frees the lock when the
    process dies."""

    root: Path  # folder of the node "", where all paths begin
    others: Path  # holds the folders of all other nodes
    parent_of: Callable[[str], str]
    kind: type = dict  # a TypedDict, what a record must hold at least
    records: dict[str, dict] = field(default_factory=dict)  # by path, those that were read so far

    def folder(self, path: str) -> Path:
        return self.others / path if path else self.root

    def labels_folder(self, path: str) -> Path:
        """Where the pseudo labels lie that a node gives its children."""
        return self.others / f"labels-{path}"

    def done(self, path: str) -> bool:
        return path in self.records or (self.folder(path) / "node.json").is_file()

    def record(self, path: str) -> dict:
        if path not in self.records:
            folder = self.folder(path)
            cure = f"remove the folder {folder}, and the same command trains it again"
            self.records[path] = read_record(folder / "node.json", self.kind, cure)
        return self.records[path]

    def finish(self, path: str, record: dict) -> None:
        """Write the record, which marks the node as done."""
        write_text(self.folder(path) / "node.json", json.dumps(record, indent=1))
        self.records[path] = record

    def has_weights(self, path: str) -> bool:
        return self.done(path) and (self.folder(path) / "weights.pt").is_file()

    def weights(self, path: str, script: str) -> dict[str, Tensor]:
        """The weights of a node; UserError when they are not the ones that its record describes."""
        checkpoint = load_checkpoint(self.folder(path) / "weights.pt", script, NodeForm)
        weights = checkpoint["networks"]["student"]
        self.records.pop(path, None)  # another process may have made the node again
        if fingerprint(weights) != self.record(path)["weights"]:
            raise RankError(
                f"The weights in {self.folder(path)} are not those that were scored; remove this "
                f"folder, and the same command trains them again."
            )
        return weights

    def first_to_make(self, path: str) -> str | None:
        """The node to make first when the weights of `path` are wanted: `path` itself if its parent
        has weights, else the first to make for the parent. None when `path` has weights."""
        if self.has_weights(path):
            return None
        if path:
            missing = self.first_to_make(self.parent_of(path))
            if missing is not None:
                return missing
        return path

    def make_if_free(self, path: str, make: Callable[[str], None]) -> bool:
        """Call make(path), unless another process has made the node by now; False when another
        process is making it."""
        with claim(self.folder(path)) as ours:
            if not ours:
                return False
            # The file is asked for, since `done` would trust a record that was read before.
            is_done = (self.folder(path) / "node.json").is_file()
            if not is_done or self.first_to_make(path) is not None:
                make(path)
            return True

    def ensure(self, path: str, make: Callable[[str], None], wait: Callable[[], None]) -> None:
        """Return when the weights of `path` are there: make what is missing, or wait for others."""
        while (missing := self.first_to_make(path)) is not None:
            if not self.make_if_free(missing, make):
                wait()

    def remove_weights(self, keep: Iterable[str]) -> None:
        """Remove the weights and labels of all nodes but those in `keep`. The weights of the root
        stay."""
        for path in set(self.records) - set(keep):
            if path:
                (self.folder(path) / "weights.pt").unlink(missing_ok=True)
            shutil.rmtree(self.labels_folder(path), ignore_errors=True)


def fingerprint(state: dict) -> str:
    """SHA-256 of the names and values (CPU or GPU tensors) of a state dict."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- searches
@dataclass
class Search:
    """A search under way. `asks` yields the nodes that it needs next, and is asked again once all
    of them are done. It ends, or yields an empty list, when it needs no more."""

    asks: Iterator[list[str]]
    # whether it chooses by scores whose children come next, so that all nodes that it asked for
    # last have to keep their weights
    adaptive: bool = False
    visited: list[str] = field(default_factory=lambda: [""])  # all that it asked for, and the root
    wanted: list[str] = field(default_factory=list)  # what it asked for last
    ended: bool = False

    def advance(self, store: Nodes) -> None:
        """While all wanted nodes are done, ask for the next ones."""
        while not self.ended and all(store.done(path) for path in self.wanted):
            self.wanted = list(dict.fromkeys(next(self.asks, [])))
            self.visited += self.wanted
            self.ended = not self.wanted


def explore(
    searches: Iterable[Search],
    store: Nodes,
    make: Callable[[str], None],
    best: Callable[[list[str]], str],
    tidy: Callable[[set[str]], None],
    wait: Callable[[], None],
    launched: World,
) -> None:
    """Run searches side by side until all have ended. Every process calls this, and it makes no
    difference which of them makes which node.

    `make(path)` makes a node; `best(paths)` picks the best of those that are done; `tidy(needed)`
    may remove the weights of all other nodes; `wait()` lets some time pass, in which other
    processes work. `launched` says which process this is, and of how many."""
    searches = list(searches)
    while True:
        for search in searches:
            search.advance(store)
        pending = nodes_to_make(searches, store)
        # Each process begins at another place of the list, so that they seldom want the same node.
        first = launched.rank * len(pending) // launched.size
        ready = ready_nodes(pending[first:] + pending[:first], store)
        tidy(needed_nodes(searches, store, pending, ready, best))
        if all(search.ended for search in searches):
            return
        # Make one node and look again; wait when other processes are making all that are ready.
        for path in ready:
            if store.make_if_free(path, make):
                break
        else:
            wait()


def nodes_to_make(searches: list[Search], store: Nodes) -> list[str]:
    """What the searches have asked for and nobody has finished, each node once."""
    pending = []
    for search in searches:
        pending += [path for path in search.wanted if not store.done(path)]
    return list(dict.fromkeys(pending))


def ready_nodes(pending: list[str], store: Nodes) -> list[str]:
    """For each of these nodes the one that can be made now: itself if its parent has weights, else
    the first one to make for its parent. Each node once."""
    ready = []
    for path in pending:
        missing_above = store.first_to_make(store.parent_of(path))
        ready.append(path if missing_above is None else missing_above)
    return list(dict.fromkeys(ready))


def needed_nodes(
    searches: list[Search],
    store: Nodes,
    pending: list[str],
    ready: list[str],
    best: Callable[[list[str]], str],
) -> set[str]:
    """The nodes whose weights some search still needs: the best so far, those that can be made now,
    the parents of those and of all others to be made, and, of an adaptive search, the nodes that
    are to be compared when their siblings are done, too."""
    needed = {best(search.visited) for search in searches}
    needed |= set(ready)
    needed |= {store.parent_of(path) for path in [*ready, *pending]}
    for search in searches:
        if search.adaptive:
            needed |= {path for path in search.wanted if store.done(path)}
    return needed


# -------------------------------------------------------------------------------------------- locks
@contextlib.contextmanager
def claim(folder: Path, wait: bool = False):
    """`with claim(folder) as ours`: hold the folder, which is created if need be, until the block
    ends or this process dies. `ours` is False when another process holds it; with `wait`, wait
    until it is free instead. UserError when the folder cannot be made or locked."""
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
                f"{folder} lies on a file system without locks ({error.strerror}); name another "
                f"--store."
            ) from None
        try:
            yield True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # loader processes may hold a copy of the handle


def fill_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Return when `folder` is there. One process fills a temporary folder and renames it when it is
    complete, so that nobody ever sees half of it; the others wait."""
    with claim(folder.with_name(f".{folder.name}"), wait=True):
        if folder.is_dir():
            return
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        temporary.rename(folder)
