"""Whether the files of a data set are what a run needs: all of them, and all that they hold, for
--check; and what takes a few seconds at the beginning of every run.

`Seen` is what a file holds, found in processes of their own and remembered beside the data, so that
a second look opens only what has changed. What follows from it is judged afterwards."""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from common import semantic
from common.distributed import launched
from common.errors import RankError, UserError
from common.files import UNREADABLE, read_image, turned_note, write_text
from common.loading import quiet_worker
from common.objects import CITYSCAPES_THINGS, Instances, Photo, read_ids, singles
from common.semantic import Picture, Segmentation

SECONDS = 10.0  # how long the look at the beginning of a run may take

MEMORY = ".checked.json"  # in the data set's root

SHOWN = 20  # lines of one kind


class Entry(NamedTuple):
    """An image with its label file, if it has one; `role` says what the run does with it. `size`
    (height, width) is what its annotations are for, if they say so."""

    role: str  # labeled, unlabeled, scored
    image: Path
    label: Path | None
    size: tuple[int, int] | None


class Seen(NamedTuple):
    """What a file holds. `error` is why it cannot be read, or ""."""

    width: int = 0
    height: int = 0
    mode: str = ""
    turned: bool = False  # by the camera's note
    digest: str = ""
    values: tuple[int, ...] = ()  # of a label
    error: str = ""


class Judged(NamedTuple):
    """What stops a run, and what does not but may be a mistake, in sentences."""

    wrong: list[str]
    odd: list[str]


# -------------------------------------------------------------------------------------- what to see
def entries_of(
    data: Segmentation | Instances, labeled: list, unlabeled: list, scored: list
) -> list[Entry]:
    """The images of a run by what it does with them; one that is labeled and unlabeled comes once,
    as a labeled one."""
    taken = {picture.image for picture in labeled}
    others = [picture for picture in unlabeled if picture.image not in taken]
    entries = [entry_of(picture, "labeled") for picture in labeled]
    entries += [entry_of(picture, "scored") for picture in scored]
    return entries + [entry_of(picture, "unlabeled") for picture in others]


def entry_of(picture: Picture | Photo, role: str) -> Entry:
    if role == "unlabeled":
        return Entry(role, picture.image, None, None)
    size = None
    if isinstance(picture, Photo) and picture.things is not None:
        size = (picture.height, picture.width)
    return Entry(role, picture.image, picture.label, size)


def see_image(path: Path) -> Seen:
    """Decode an image."""
    try:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        read_image(path)
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return Seen(*file.size, file.mode, turned, digest)
    except (UserError, *UNREADABLE) as error:
        return Seen(error=str(error))


def see_label(path: Path) -> Seen:
    """Decode a map of classes, with the values that occur."""
    try:
        values = semantic.read_values(path)
    except (UserError, OSError) as error:
        return Seen(error=str(error))
    height, width = values.shape
    return Seen(width, height, values=tuple(np.unique(values).tolist()))


def see_ids(path: Path) -> Seen:
    """Decode a map of instance ids, with the values that occur."""
    try:
        values = read_ids(path)
    except (UserError, OSError) as error:
        return Seen(error=str(error))
    height, width = values.shape
    return Seen(width, height, values=tuple(np.unique(values).tolist()))


SEEING = {"image": see_image, "label": see_label, "ids": see_ids}


def see(task: tuple[str, str]) -> Seen:
    """`task` is the kind of a file and its path."""
    kind, path = task
    return SEEING[kind](Path(path))


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def see_all(tasks: list[tuple[str, str]], root: Path) -> dict[str, Seen]:
    """Path -> what it holds: remembered where size and time of a file are as they were, else seen
    now, by all cores and under a progress bar."""
    from tqdm import tqdm

    memory = recall(root)
    stamps = {path: stamp_of(Path(path)) for _, path in tasks}
    known, new = {}, []
    for kind, path in tasks:
        before = memory.get(f"{kind} {path}")
        if before is not None and before[0] == stamps[path]:
            known[path] = before[1]
        else:
            new.append((kind, path))
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores(), fork, initializer=quiet_worker, initargs=(0,)) as pool:
        found = pool.map(see, new, chunksize=8)
        bar = tqdm(found, desc="checking", total=len(new), unit="file", dynamic_ncols=True)
        for (kind, path), seen in zip(new, bar, strict=True):
            known[path] = seen
            memory[f"{kind} {path}"] = (stamps[path], seen)
    remember(root, memory)
    return known


def stamp_of(path: Path) -> list[int]:
    """Size and time of a file, [] when there is none."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def recall(root: Path) -> dict[str, tuple[list[int], Seen]]:
    """What earlier looks saw; nothing when the file is damaged, for it can be made again."""
    try:
        content = json.loads((root / MEMORY).read_text())
        memory = {}
        for key, (stamp, values) in content.items():
            *plain, of_label, error = values
            memory[key] = (stamp, Seen(*plain, tuple(of_label), error))
        return memory
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(root: Path, memory: dict[str, tuple[list[int], Seen]]) -> None:
    """Keep what was seen beside the data, where one may write there."""
    try:
        write_text(root / MEMORY, json.dumps(memory))
    except OSError as error:
        print(f"what was seen is not remembered ({root / MEMORY}: {error.strerror})")


# ---------------------------------------------------------------------------------------- judgement
def judge(entries: list[Entry], seen: dict[str, Seen], data: Segmentation | Instances) -> Judged:
    """What is wrong and what is odd with the files of a run."""
    wrong: list[str] = []
    odd: list[str] = []
    readable = Counter()
    for entry in entries:
        image = seen[str(entry.image)]
        readable[entry.role] += not image.error
        if image.error and entry.role == "scored":
            wrong.append(f"{image.error}; it is to be scored")
        elif image.error:
            odd.append(f"{image.error}; training goes on without it")
        if entry.label is not None:
            fault = fault_of_label(entry, seen[str(entry.label)], data)
            if fault:
                wrong.append(fault)
                continue
        size = entry.size
        if entry.label is not None:
            size = (seen[str(entry.label)].height, seen[str(entry.label)].width)
        if size is not None and not image.error and size != (image.height, image.width):
            wrong.append(size_fault(entry, (image.height, image.width), size))
        elif image.turned and size is not None:
            odd.append(
                f"{entry.image} is to be turned by 90 degrees (EXIF), which is not followed; its "
                f"label must be of the pixels as they lie"
            )
    for role, number in Counter(entry.role for entry in entries).items():
        if not readable[role]:
            wrong.append(f"none of the {number} {role} images can be read")
    return Judged(wrong, odd + twins(entries, seen) + strange_modes(entries, seen))


def size_fault(entry: Entry, image: tuple[int, int], label: tuple[int, int]) -> str:
    """The sentence on an image and a label of two sizes, each (height, width)."""
    what = "annotations are for" if entry.label is None else f"label {entry.label} has"
    return (
        f"{entry.image} has {image[1]}x{image[0]} pixels but its {what} {label[1]}x{label[0]}; "
        f"they must agree{turned_note(entry.image, label)}"
    )


def fault_of_label(entry: Entry, label: Seen, data: Segmentation | Instances) -> str:
    """Why a label cannot be used, or ""."""
    if label.error or isinstance(data, Instances):
        return label.error
    try:
        semantic.classes_of(np.array(label.values), entry.label, data)
    except UserError as error:
        return str(error)
    return ""


def twins(entries: list[Entry], seen: dict[str, Seen]) -> list[str]:
    """Images of the same content."""
    by_content: dict[str, list[Entry]] = {}
    for entry in entries:
        digest = seen[str(entry.image)].digest
        if digest:
            by_content.setdefault(digest, []).append(entry)
    said = []
    for same in by_content.values():
        first, *others = same
        for other in others:
            if other.image != first.image:
                roles = first.role if first.role == other.role else f"{first.role}, {other.role}"
                said.append(f"{first.image} and {other.image} are the same picture ({roles})")
            elif {first.role, other.role} == {"labeled", "scored"}:
                said.append(f"{first.image} is learned from with its label, and scored")
    return said


def strange_modes(entries: list[Entry], seen: dict[str, Seen]) -> list[str]:
    """Kinds of pictures that are few among the others, such as grey ones among colour."""
    modes = Counter(seen[str(entry.image)].mode for entry in entries)
    modes.pop("", None)
    said = []
    for mode, number in modes.most_common()[1:]:
        if number < len(entries) / 20:
            example = next(e.image for e in entries if seen[str(e.image)].mode == mode)
            said.append(f"{number} images are of mode {mode}, unlike the others, such as {example}")
    return said


def absent_classes(
    pictures: Iterable[Picture | Photo], data: Segmentation | Instances, seen: dict[str, Seen]
) -> list[str]:
    """The classes that no label of these pictures holds. `seen` has the label files."""
    there: set[int] = set()
    for picture in pictures:
        if isinstance(picture, Photo) and picture.things is not None:
            there |= singles(picture)
        elif isinstance(picture, Photo):
            values = seen[str(picture.label)].values
            names = list(CITYSCAPES_THINGS)
            there |= {names.index(v // 1000) for v in values if v // 1000 in CITYSCAPES_THINGS}
        else:
            values = np.array(seen[str(picture.label)].values, np.int64)
            if values.size:
                there |= set(semantic.classes_of(values, picture.label, data).tolist())
    return [name for place, name in enumerate(data.classes) if place not in there]


def in_words(names: list[str]) -> str:
    """A few of the names, and how many more there are."""
    if len(names) <= 5:
        return ", ".join(names)
    return f"{', '.join(names[:5])} and {len(names) - 5} more"


# ------------------------------------------------------------------------------------------ --check
def look_at_all(
    data: Segmentation | Instances, labeled: list, unlabeled: list, scored: list
) -> dict:
    """--check: open every file, say what is wrong and what is odd; UserError when a run would stop
    on something. Returns the numbers of both. One process looks for all."""
    if not launched().main:
        return {}
    entries = entries_of(data, labeled, unlabeled, scored)
    kind = "label" if isinstance(data, Segmentation) else "ids"
    tasks = dict.fromkeys(("image", str(entry.image)) for entry in entries)
    tasks |= dict.fromkeys((kind, str(e.label)) for e in entries if e.label is not None)
    seen = see_all(list(tasks), data.root)
    judged = judge(entries, seen, data)
    odd = list(judged.odd)
    for role, pictures in (("labeled", labeled), ("scored", scored)):
        try:
            absent = absent_classes(pictures, data, seen)
        except UserError:
            continue  # a value is no class, which stands among what is wrong
        if absent:
            odd.append(f"no label of the {role} images holds {in_words(absent)}")
    roles = Counter(entry.role for entry in entries)
    print(", ".join(f"{number} {role}" for role, number in roles.items()), f"images of {data.root}")
    listed("wrong", judged.wrong)
    listed("odd", odd)
    if judged.wrong:
        raise UserError(
            f"A run on {data.root} would stop on {len(judged.wrong)} of these; mend them, and look "
            f"again with --check."
        )
    print(f"A run can begin: nothing is wrong, and {len(odd)} things are odd.")
    return {"wrong": 0, "odd": len(odd)}


def listed(what: str, sentences: list[str]) -> None:
    """Print the first of these sentences, and how many there are."""
    for sentence in sentences[:SHOWN]:
        print(f"{what}: {sentence.rstrip('.')}.")
    if len(sentences) > SHOWN:
        print(f"{what}: {len(sentences) - SHOWN} more like these.")
    sys.stdout.flush()


# --------------------------------------------------------------------------- beginning of every run
def first_look(data: Segmentation | Instances, labeled: list, scored: list) -> list[str]:
    """What a few seconds show before a run begins: whether images and labels have one size, and
    what the labels hold that are learned from. Returns lines to print; raises what would stop the
    run later."""
    end = time.monotonic() + SECONDS
    entries = entries_of(data, labeled, [], scored)
    labels = [picture.label for picture in labeled] if isinstance(data, Segmentation) else []
    with ThreadPoolExecutor(min(8, 2 * cores())) as threads:
        seen = in_time(threads, see_label, list(dict.fromkeys(labels)), end)
        faults = in_time(threads, fault_of_heads, entries, end)
    for picture in labeled:
        entry = entry_of(picture, "labeled")
        if picture.label in seen and not faults.get(entry):
            faults[entry] = fault_of_label(entry, seen[picture.label], data)
    for fault in faults.values():
        if fault:
            raise RankError(f"{fault.rstrip('.')}.")
    notes = []
    is_known = all(isinstance(p, Picture) or p.things is not None for p in labeled)
    if is_known and len(seen) == len(set(labels)):
        by_path = {str(path): found for path, found in seen.items()}
        absent = absent_classes(labeled, data, by_path)
        if absent:
            notes.append(f"no label of the labeled images holds {in_words(absent)}")
    if len(faults) < len(set(entries)) or len(seen) < len(set(labels)):
        notes.append(
            f"looked at {len(faults)} of {len(entries)} labeled and scored images in "
            f"{SECONDS:.0f} seconds; --check looks at all"
        )
    return notes


def in_time(threads: ThreadPoolExecutor, look: Callable, files: list, end: float) -> dict:
    """What `look` finds in each of the files, as far as the time reaches."""
    found = {}
    for place in range(0, len(files), 64):
        if time.monotonic() > end:
            break
        some = files[place : place + 64]
        found |= dict(zip(some, threads.map(look, some), strict=True))
    return found


def fault_of_heads(entry: Entry) -> str:
    """What the first bytes of an image and its label show to be wrong, or "". A labeled image that
    cannot be opened is passed over in training."""
    try:
        with Image.open(entry.image) as file:
            width, height = file.size
    except UNREADABLE as error:
        if entry.role == "scored":
            return f"{entry.image} cannot be read as an image ({error})"
        return ""
    size = entry.size
    if entry.label is not None:
        try:
            with Image.open(entry.label) as file:
                size = (file.size[1], file.size[0])
        except UNREADABLE:
            return ""  # whoever reads it says what is wrong
    if size is not None and size != (height, width):
        return size_fault(entry, (height, width), size)
    return ""
