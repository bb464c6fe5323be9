"""--check says what is wrong and what is odd with the files of a run, remembers what it has seen,
and every run begins with the quick part of it."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import argv, run
from PIL import Image

from common import check, semantic
from common.errors import UserError


@pytest.fixture
def io(tmp_path) -> Path:
    return tmp_path / "io"


def look(root: Path) -> check.Judged:
    """What is wrong and what is odd with a folder whose training images all have labels."""
    data = semantic.find("folder", root)
    entries = check.entries_of(data, list(data.train.values()), data.extra, data.val)
    seen = {}
    for entry in entries:
        seen[str(entry.image)] = check.see_image(entry.image)
        if entry.label is not None:
            seen[str(entry.label)] = check.see_label(entry.label)
    return check.judge(entries, seen, data)


def break_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_value(path: Path, value: int) -> None:
    Image.new("L", (64, 64), value).save(path)


WRONG = {  # what is done to the folder, and what is said
    "a broken scored image": (lambda r: break_file(r / "images/val/val_000001.jpg"), "val_000001"),
    "a broken label": (lambda r: break_file(r / "labels/train/train_000001.png"), "train_000001"),
    "a value that is no class": (lambda r: one_value(r / "labels/val/val_000001.png", 77), "77"),
    "a colour label": (
        lambda r: Image.new("RGB", (64, 64)).save(r / "labels/train/train_000001.png"),
        "colour",
    ),
    "two sizes": (
        lambda r: Image.new("L", (9, 8)).save(r / "labels/train/train_000001.png"),
        "9x8",
    ),
    "a missing label": (lambda r: (r / "labels/train/train_000001.png").unlink(), "train_000001"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_stops_a_run_is_wrong(folder_root, kind):
    assert look(folder_root).wrong == []
    change, said = WRONG[kind]
    change(folder_root)
    (sentence,) = look(folder_root).wrong
    assert said in sentence


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "images/train/train_000001.jpg"
    Image.open(path).save(path, exif=exif)


ODD = {
    "a broken unlabeled image": (
        lambda r: break_file(r / "images/unlabeled/train_000101.jpg"),
        "goes on without it",
    ),
    "a broken labeled image": (
        lambda r: break_file(r / "images/train/train_000001.jpg"),
        "goes on without it",
    ),
    "twins": (
        lambda r: shutil.copy(r / "images/val/val_000001.jpg", r / "images/train/train_000001.jpg"),
        "the same picture (labeled, scored)",
    ),
    "a turned image": (turned, "EXIF"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_may_be_a_mistake_is_odd(folder_root, kind):
    assert look(folder_root).odd == []
    change, said = ODD[kind]
    change(folder_root)
    judged = look(folder_root)
    assert judged.wrong == [] and len(judged.odd) == 1 and said in judged.odd[0]


def test_a_second_look_opens_only_what_has_changed(folder_root, capsys, monkeypatch):
    data = semantic.find("folder", folder_root)
    labeled = list(data.train.values())
    opened = []
    see = check.see

    class InThisProcess:
        """A pool that notes what it opens."""

        def __init__(self, *args, **keywords):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def map(self, function, tasks, chunksize):
            opened.extend(tasks)
            return map(see, tasks)

    monkeypatch.setattr(check, "ProcessPoolExecutor", InThisProcess)

    def number_opened() -> int:
        opened.clear()
        check.look_at_all(data, labeled, data.extra, data.val)
        return len(opened)

    assert number_opened() == 8 * 2 + 3 * 2 + 4
    first = capsys.readouterr().out
    assert number_opened() == 0
    assert capsys.readouterr().out == first
    one_value(folder_root / "labels/train/train_000001.png", 0)
    assert number_opened() == 1
    (folder_root / check.MEMORY).write_text('{"image x": 3')
    assert number_opened() == 26


@pytest.mark.parametrize("name", ["gta_seg", "gist_rist"])
def test_check_trains_nothing_and_says_what_it_saw(name, folder_root, tmp_path, io):
    line = {"dataset": "folder", "root": folder_root, "split": "random:4", "check": True}
    line |= {"out": tmp_path / "run", "weights": "none", "unlabeled": folder_root / "images"}
    if name == "gist_rist":
        line |= {"dev_size": 2, "dev_reserve": 2}
    said = run(argv(**line), io, name=name).ok().out
    assert "scored" in said and "A run can begin" in said
    break_file(folder_root / "images" / "val" / "val_000001.jpg")
    done = run(argv(**line), io, name=name)
    assert "1 of these" in done.error() and "wrong: " in done.out and "val_000001.jpg" in done.out
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_what_a_few_seconds_show(folder_root):
    data = semantic.find("folder", folder_root)
    labeled = list(data.train.values())
    assert check.first_look(data, labeled, data.val) == []
    for picture in labeled:
        one_value(picture.label, 255)
        with Image.open(picture.label) as file:
            values = np.array(file)
        values[:9] = 0  # masks of 0 and 255: the object is what 255 ignores
        Image.fromarray(values).save(picture.label)
    (note,) = check.first_look(data, labeled, data.val)
    assert note.startswith("no label of the labeled images holds ") and data.classes[1] in note
    assert data.classes[0] not in note.split("holds ")[1].split(", ")
    Image.new("L", (9, 8)).save(folder_root / "labels" / "val" / "val_000002.png")
    with pytest.raises(UserError, match="val_000002.*9x8"):
        check.first_look(data, labeled, data.val)


def test_a_look_that_takes_too_long_says_how_far_it_came(folder_root, monkeypatch):
    monkeypatch.setattr(check, "SECONDS", -1.0)
    data = semantic.find("folder", folder_root)
    (note,) = check.first_look(data, list(data.train.values()), data.val)
    assert "0 of 11" in note and "--check" in note


def test_what_is_remembered_is_what_was_seen(tmp_path):
    seen = check.Seen(3, 4, "L", True, "ab", (0, 255), "broken")
    check.remember(tmp_path, {"image x": ([5, 6], seen)})
    assert check.recall(tmp_path) == {"image x": ([5, 6], seen)}
    assert json.loads((tmp_path / check.MEMORY).read_text())


OF_SHAPES = {"dataset": "shapes", "warmup_epochs": None}  # not all scripts have the latter


@pytest.mark.parametrize("name", ["gta_seg", "guided_distillation", "better_pseudo_labels"])
def test_a_missing_file_of_weights_is_said_before_a_folder_is_made(name, tmp_path, io):
    line = OF_SHAPES | {"root": tmp_path, "weights": tmp_path / "nowhere.pth"}
    error = run(argv(**line, out=tmp_path / "run"), io, name=name).error()
    assert "--weights" in error and not (tmp_path / "run").exists()


def test_a_report_of_no_run_says_so(tmp_path, io):
    error = run(["--report", str(tmp_path / "nowhere")], io, name="gist_rist").error()
    assert "--report" in error and "nowhere" in error and "best.pt" not in error


def test_a_wrong_split_of_guided_distillation_leaves_no_folder(tmp_path, shapes_root, io):
    line = OF_SHAPES | {"root": tmp_path, "split": "random:0", "out": tmp_path / "run"}
    assert "--split" in run(argv(**line), io, name="guided_distillation").error()
    assert not (tmp_path / "run").exists()


def draw_few() -> None:
    """In a process of its own: the sets of objects have a tenth of their pictures."""
    from data import shapes

    for name in ("make_things", "make_tail"):
        setattr(shapes, name, partial(getattr(shapes, name), train=80, tune=2, val=5))


@pytest.mark.parametrize("name", ["guided_distillation", "better_pseudo_labels"])
def test_check_of_objects_says_what_it_saw(name, tmp_path, io):
    line = OF_SHAPES | {"root": tmp_path, "check": True, "out": tmp_path / "run"}
    said = run(argv(**line), io, draw_few, name=name).ok().out
    assert "A run can begin" in said and not (tmp_path / "run").exists()
    picture = next(tmp_path.rglob("val/*.jpg"), None) or next(tmp_path.rglob("val2017/*.jpg"))
    Image.new("RGB", (9, 8)).save(picture)
    done = run(argv(**line), io, draw_few, name=name)
    assert "1 of these" in done.error() and picture.name in done.out and "9x8" in done.out
