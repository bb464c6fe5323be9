"""Files of our own runs that something has damaged: each is read, made anew with a line that says
so, or refused in one sentence that names the file and the way out."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from fuzz import PROPERTIES, Property, changed, few
from helpers import REPO
from hypothesis import strategies as st
from PIL import Image

import better_pseudo_labels
import gist_rist
import gta_seg
import guided_distillation
from common import checkpoints, cli, files, plots, runs
from common.distributed import World
from common.errors import UserError
from common.nodes import Nodes
from common.semantic import Picture
from data import retrieval

sys.path.insert(0, str(REPO / "docs"))
import compare  # noqa: E402 (a program, which lies in no package)

# ------------------------------------------------------------------------------------- checkpoints
STATE = {
    "networks": {"student": {"weight": torch.arange(600.0).reshape(20, 30)}},
    "step": 3,
    "scored": 2,
    "seconds": 1.5,
    "settings": {"lr": 0.1},
    "classes": ["a", "b"],
    "last": {"student": {"step": 2, "miou": 40.0}},
    "best": {"student": {"step": 1, "miou": 50.0}},
    "optimizer": {},
}


def test_a_flipped_bit_of_a_checkpoint_or_of_weights_is_found(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, "gta_seg.py", STATE)
    whole = path.read_bytes()
    weights = STATE["networks"]["student"]["weight"].numpy().tobytes()
    start = whole.index(weights)
    assert checkpoints.load_checkpoint(path, "gta_seg.py")["step"] == 3
    for place in range(start, start + len(weights), 97):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="last.pt .*check sums differ"):
            checkpoints.load_checkpoint(path, "gta_seg.py")
        with pytest.raises(UserError, match="last.pt .*check sums differ"):
            checkpoints.read_weights(path)


@pytest.mark.parametrize("way", ["old", "no sums"])
def test_a_file_without_check_sums_loads(way, tmp_path):
    path = tmp_path / "last.pt"
    content = {"script": "gta_seg.py", **STATE}
    if way == "old":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(content, path)
        finally:
            torch.serialization.set_crc32_options(True)
    assert checkpoints.load_checkpoint(path, "gta_seg.py")["step"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"networks": [1]},
        {"networks": {"student": 3}},
        {"networks": {"student": {"weight": "w"}}},
        {"step": "three"},
        {"scored": None},
        {"settings": [1]},
        {"classes": "ab"},
        {"classes": [1]},
        {"step": -1},
        {"networks": {}},
        {"last": 3},
        {"best": {"student": {}}},
        {"last": {"student": {"step": 1, "miou": 1.0}}, "best": {}},
        {"settings": {"lr": {}}},
    ],
    ids=str,
)
def test_a_checkpoint_with_entries_of_another_type_is_refused(changes, tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, "gta_seg.py", STATE | changes)
    with pytest.raises(UserError, match=rf"last.pt is not a checkpoint.*{next(iter(changes))}"):
        checkpoints.load_checkpoint(path, "gta_seg.py", checkpoints.Trained)


@pytest.mark.parametrize(
    "form",
    [
        gta_seg.Saved,
        gist_rist.NodeForm,
        guided_distillation.Saved,
        better_pseudo_labels.Saved,
        better_pseudo_labels.Prototypes,
    ],
    ids=lambda form: f"{form.__module__}.{form.__name__}",
)
def test_a_checkpoint_that_lacks_an_entry_is_refused(form, tmp_path):
    path = tmp_path / "last.pt"
    good = STATE | {"ids": [1], "stage": "teacher", "phase": "teacher", "groups": ["r"]}
    good |= {"delta": None, "opt_student": {}, "prototypes": torch.ones(2, 3), "key": "k"}
    checkpoints.save_checkpoint(path, "x.py", good)
    checkpoints.load_checkpoint(path, "x.py", form)
    for field in msgspec.structs.fields(form):
        if field.required:
            lacking = {key: value for key, value in good.items() if key != field.name}
            checkpoints.save_checkpoint(path, "x.py", lacking)
            with pytest.raises(UserError, match=f"last.pt .*missing required field {field.name}"):
                checkpoints.load_checkpoint(path, "x.py", form)


def test_settings_of_a_checkpoint_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "best.pt"
    settings = vars(gta_seg.Args())
    for name, value in (("steps", "x"), ("scale", 1.5), ("drop", 7.0), ("lr", None)):
        state = STATE | {"settings": settings | {name: value}}
        checkpoints.save_checkpoint(path, "gta_seg.py", state)
        with pytest.raises(UserError, match=f"best.pt .*--{name}"):
            cli.saved_settings(gta_seg.Args, path, "gta_seg.py")


def test_what_does_not_fit_the_run_is_refused_when_it_is_restored():
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    good = optimizer.state_dict()
    for bad in (3, {}, good | {"param_groups": []}, good | {"state": 1}, good | {"state": {9: 1}}):
        with pytest.raises(UserError, match="last.pt does not hold what this run needs"):
            with checkpoints.fitting("last.pt"):
                optimizer.load_state_dict(bad)
                optimizer.step()
                raise KeyError("optimizer")  # what some of them lack is found later


# --------------------------------------------------------------------------- files of our own runs
NODE = {"path": "", "step": 1, "steps": 2, "seconds": 1.0, "weights": "x", "dev": {"1": 3.0}}


def store_of(folder: Path, content: bytes | None = None) -> Nodes:
    folder.mkdir(exist_ok=True)
    (folder / "node.json").write_bytes(json.dumps(NODE).encode() if content is None else content)
    return Nodes(folder, folder, lambda path: path[:-1], gist_rist.NodeRecord)


def node(folder: Path, content: bytes) -> None:
    record = store_of(folder, content).record("")
    assert isinstance(record["weights"], str)
    assert all(isinstance(score, (int, float)) for score in record["dev"].values())


def calibration(folder: Path, content: bytes) -> None:
    (folder / "calibration.json").write_bytes(content)
    better_pseudo_labels.read_delta(folder / "calibration.json", ["a", "b"], World())


def config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    runs.check_same_run(folder / "config.json", "x.py", SettingsOfRun())


def finished_run(folder: Path, content: bytes, name: str) -> None:
    good = {
        "config.json": {"settings": {"method": "m", "recipe": "r", "split_seed": 0, "seed": 0}},
        "results.json": {"student": {"last": {"miou": 1.0}, "best": {"miou": 2.0}}},
    }
    for file, value in good.items():
        (folder / file).write_bytes(content if file == name else json.dumps(value).encode())
    try:
        compare.table([compare.read_run(folder)] * 2)
    except SystemExit as error:
        raise UserError(str(error)) from None


def note(folder: Path, content: bytes) -> None:
    (folder / "0.json").write_bytes(content)
    retrieval.Store(folder, [], [folder / "0.npy"], [], 4).note(0)


def shard(folder: Path, content: bytes) -> None:
    (folder / "0.npy").write_bytes(content)
    retrieval.Store(folder, [], [folder / "0.npy"], [], 4).shard(0)


def scores(folder: Path, content: bytes) -> None:
    (folder / "scores.npz").write_bytes(content)
    tree = SimpleNamespace(store=store_of(folder))
    gist_rist.load_scores(tree, "", ["temps", "confidence"])


def stats(folder: Path, content: bytes) -> None:
    (folder / "labels-L").mkdir(exist_ok=True)
    (folder / "labels-L" / "stats.json").write_bytes(content)
    gist_rist.label_images(SimpleNamespace(store=store_of(folder), pool=[]), "L")


def results_of_a_report(folder: Path, content: bytes) -> None:
    (folder / "results.json").write_bytes(content)
    (folder / "report.md").touch()
    tree = SimpleNamespace(store=store_of(folder))
    of_a_run = {"set_up": lambda args: (tree, None), "write_report": lambda *args: None}
    with mock.patch.multiple(gist_rist, **of_a_run):
        gist_rist.report_again(SimpleNamespace(report=folder))


def saved_scores(folder: Path) -> bytes:
    np.savez_compressed(folder / "good.npz", temps=np.ones(2), confidence=np.ones((2, 50)))
    return (folder / "good.npz").read_bytes()


def saved_shard(folder: Path) -> bytes:
    np.save(folder / "good.npy", np.ones((3, 4), np.float16))
    return (folder / "good.npy").read_bytes()


@dataclass
class SettingsOfRun:
    lr: float = 0.1
    out: str = ""


READERS = {  # a whole file, and who reads it
    "config.json": ({"script": "x.py", "settings": {"lr": 0.1, "out": "a"}}, config),
    "node.json": (NODE, node),
    "calibration.json": ({"classes": ["b", "a"], "delta": [0.1, 0.2]}, calibration),
    "the note of a shard": (
        {"key": "k", "size": 3, "paths": ["a"], "sha256": ["b"], "broken": []},
        note,
    ),
    "results.json of compare": (
        {"student": {"last": {"miou": 1.0}, "best": {"miou": 2.0}}},
        lambda folder, content: finished_run(folder, content, "results.json"),
    ),
    "config.json of compare": (
        {"settings": {"method": "m", "recipe": "r", "split_seed": 0, "seed": 0}},
        lambda folder, content: finished_run(folder, content, "config.json"),
    ),
    "stats.json": ({"kept": 0.5, "dominant": 0.5, "share": [0.5, 0.5]}, stats),
    "results.json of a report": (
        {
            "stage0_folder": "a",
            "nodes": "b",
            "visited": {},
            "trials": [],
            "dev_size": 1,
            "split_fingerprint": "c",
        },
        results_of_a_report,
    ),
    "scores.npz": (saved_scores, scores),
    "a shard": (saved_shard, shard),
}


def whole(name: str, folder: Path) -> bytes:
    good = READERS[name][0]
    return good(folder) if callable(good) else json.dumps(good).encode()


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_of_a_run_is_one_sentence(name, tmp_path):
    good, reader = whole(name, tmp_path), READERS[name][1]
    reader(tmp_path, good)
    for content in (b"", b"\0" * 40, b"[1]", b"3", b"{}", good[: len(good) // 2], b"[" * 10**5):
        with pytest.raises(UserError) as error:
            reader(tmp_path, content)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        assert "; " in str(error.value), "and what to do"


def test_damaged_lines_of_a_log_are_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    good = b'{"step": 1, "loss": 2.0}\n'
    torn = [b'{"step": 2, "lo\n', b"[3]\n", b"4\n", b"\xff\xfe\n", b'{"step": "x"}\n', b"\0\0\n"]
    path.write_bytes(good + b"".join(torn) + b'{"step": 5, "images_per_second": "fast"}\n' + good)
    assert files.read_log(path) == [{"step": 1, "loss": 2.0}] * 2
    assert capsys.readouterr().out == f"{path}: lines that are damaged and left out: 7\n"
    path.write_bytes(good)
    assert files.read_log(path) == [{"step": 1, "loss": 2.0}] and not capsys.readouterr().out


def test_curves_of_a_log_that_has_lost_its_records_are_not_drawn(tmp_path):
    plots.curves([], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    plots.curves([{"loss": 1.0}, {"step": 2, "loss": "x"}], tmp_path / "curves.png")


def test_a_damaged_score_of_a_node_is_measured_anew_and_said(tmp_path, capsys):
    tree = SimpleNamespace(
        store=store_of(tmp_path), args=SimpleNamespace(val="val"), content_of_val="1234"
    )
    file = gist_rist.val_file(tree, "")
    good = {"miou": 50.0, "iou": {"a": 50.0, "b": None}, "data": "1234"}
    file.write_text(json.dumps(good))
    assert gist_rist.val_of(tree, "") == 50 and not capsys.readouterr().out
    for bad in ("{", "[]", json.dumps(good | {"miou": "x"}), json.dumps(good | {"data": "5678"})):
        file.write_text(bad)
        assert math.isnan(gist_rist.val_of(tree, ""))
        said = capsys.readouterr().out
        assert str(file) in said and "made anew" in said


def test_prototypes_that_are_damaged_are_made_anew_and_said(tmp_path, capsys):
    path = tmp_path / "prototypes.pt"
    script = better_pseudo_labels.PROTOTYPES
    kept = better_pseudo_labels.kept_prototypes
    record = {"prototypes": torch.ones(2, 3), "key": "k"}
    checkpoints.save_checkpoint(path, script, record)
    assert torch.equal(kept(path, "k", 2), torch.ones(2, 3)) and kept(path, "other", 2) is None
    for bad in ({"prototypes": "x"}, {"prototypes": torch.ones(5)}, {"key": 4}):
        checkpoints.save_checkpoint(path, script, record | bad)
        assert kept(path, "k", 2) is None
    path.write_bytes(b"damaged")
    assert kept(path, "k", 2) is None and "made anew" in capsys.readouterr().out


def test_damaged_shards_of_embeddings_are_made_anew_and_said(tmp_path, capsys):
    pictures = []
    for i in range(3):
        pictures.append(tmp_path / f"{i}.png")
        Image.new("RGB", (8, 8), (40 * i, 90, 7)).save(pictures[-1])

    def network(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)) + 1

    def embed() -> retrieval.Store:
        return retrieval.embed(pictures, network, tmp_path / "store", "k", 4, World(), 0)

    store = embed()
    truth = np.array(store.shard(0))
    shard, beside = store.shards[0], store.shards[0].with_suffix(".json")
    for path, content in (
        (shard, b"damaged"),
        (shard, shard.read_bytes()[:-8]),
        (beside, b"{"),
        (beside, b'{"key": "k", "size": 4, "paths": [], "sha256": [], "broken": []}'),
    ):
        path.write_bytes(content)
        assert np.array_equal(embed().shard(0), truth)
        assert "made anew" in capsys.readouterr().out


def test_other_labels_or_pictures_under_the_same_names_are_other_nodes(tmp_path):
    picture = Picture("a", tmp_path / "a.jpg", tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(picture.image)
    label = np.zeros((9, 9), np.uint8)

    def now(value: int) -> str:
        label[4, 4] = value
        Image.fromarray(label).save(picture.label)
        return gist_rist.content_of([picture], [])

    first = now(0)
    assert now(0) == first != now(1) and now(0) == first
    Image.new("RGB", (19, 9)).save(picture.image)
    assert now(0) != first
    picture.label.unlink()
    assert gist_rist.content_of([picture], []) != first, "whoever needs it says that it is gone"


# --------------------------------------------------------------------------- whatever happens to it
def damage(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    """Some bytes changed, and cut where a change is of none."""
    changed = bytearray(content)
    for place, value in changes:
        if value == 256:
            del changed[place % (len(changed) + 1) :]
        elif changed:
            changed[place % len(changed)] = value
    return bytes(changed)


def a_damaged_file_of_a_run_is_read_or_refused(value: tuple, folder: Path) -> None:
    name, changes, place, new = value
    content = damage(whole(name, folder), changes)
    if not changes and not callable(READERS[name][0]):
        content = json.dumps(changed(READERS[name][0], place, new)).encode()
    try:
        READERS[name][1](folder, content)
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


def a_checkpoint_of_any_form_is_read_or_refused(value: tuple, folder: Path) -> None:
    place, new = value
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    good = STATE | {"networks": {"student": layer.state_dict()}}
    good |= {"optimizer": optimizer.state_dict()}
    path = folder / "last.pt"
    checkpoints.save_checkpoint(path, "gta_seg.py", changed(good, place, new))
    try:
        state = checkpoints.load_checkpoint(path, "gta_seg.py", checkpoints.Trained)
        with checkpoints.fitting(state["path"]):
            checkpoints.load_exact(layer, state["networks"]["student"], state["path"])
            optimizer.load_state_dict(state["optimizer"])
    except UserError as error:
        assert str(path) in str(error)
        return
    assert state["step"] >= 0 and state.get("scored", 0) >= 0
    assert all(isinstance(name, str) for name in [*state["classes"], *state["settings"]])
    for score in [*state.get("last", {}).values(), *state.get("best", {}).values()]:
        assert isinstance(score["step"], int)


def settings_of_a_checkpoint_are_taken_or_refused(value: tuple, folder: Path) -> None:
    script, place, new = value
    path = folder / "best.pt"
    settings = vars(script.Args())
    names = list(settings)
    name = names[place % len(names)]
    checkpoints.save_checkpoint(path, "x.py", STATE | {"settings": settings | {name: new}})
    try:
        args = cli.saved_settings(script.Args, path, "x.py")
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    cli.check_ranges(args)


def a_log_is_read_whatever_its_lines_hold(value: list[bytes], folder: Path) -> None:
    path = folder / "log.jsonl"
    good = {"step": 7, "images_per_second": 2.5}
    path.write_bytes(b"\n".join([*value, json.dumps(good).encode(), b'{"step": 8, "lo']))
    records = files.read_log(path)
    assert good in records
    for record in records:
        assert isinstance(record.get("step", 0), int) and record.get("images_per_second", 0) >= 0


others = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([1])
)
records = st.dictionaries(st.sampled_from(["step", "images_per_second", "loss"]), others)
lines = st.one_of(st.binary(max_size=30), records.map(lambda record: json.dumps(record).encode()))
MINE = {
    "settings of a checkpoint are taken or refused": Property(
        st.tuples(
            st.sampled_from([gta_seg, gist_rist, guided_distillation, better_pseudo_labels]),
            st.integers(0, 99),
            others,
        ),
        settings_of_a_checkpoint_are_taken_or_refused,
    ),
    "a log is read whatever its lines hold": Property(
        st.lists(lines, max_size=4), a_log_is_read_whatever_its_lines_hold
    ),
    "a damaged file of a run is read or refused": Property(
        st.tuples(
            st.sampled_from(list(READERS)),
            st.lists(st.tuples(st.integers(0, 999), st.integers(0, 256)), max_size=4),
            st.lists(st.integers(0, 9), min_size=1, max_size=3),
            others,
        ),
        a_damaged_file_of_a_run_is_read_or_refused,
    ),
    "a checkpoint of any form is read or refused": Property(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=4), others),
        a_checkpoint_of_any_form_is_read_or_refused,
    ),
}
PROPERTIES |= MINE


@pytest.mark.parametrize("name", MINE)
def test_it_holds_of_whatever_is_drawn_that(name, tmp_path):
    few(name, tmp_path)
