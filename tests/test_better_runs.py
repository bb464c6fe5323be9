"""better_pseudo_labels.py from the command line: stages, kills, processes, evaluation, prediction,
presets, errors."""

import json
import os
import re
import shutil
import signal
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import instance_runs
import numpy as np
import pretend
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import (
    TEST_DATA,
    Ran,
    apart,
    argv,
    differences,
    log_of,
    state,
    tensors,
    torchrun,
)
from instance_runs import HERE, as_line, kill, networks, results, steps_of, truncate, weights, words
from PIL import Image
from pycocotools import mask as coco_mask

import better_pseudo_labels as bp
from common import files as common_files
from common import instances, judge, plots, runs
from common.distributed import World
from common.objects import masks_of, singles
from data import shapes

NAME = "better_pseudo_labels"


# 8 labeled pictures, 2 of them held out; 2 steps of each network that learns from labels, 3 of the
# student
TINY = dict(
    split="8",
    frequency="subset",
    backbone="test_resnet",
    weights="none",
    norm="frozen",
    image_size=64,
    width=32,
    fc=64,
    head_convs=1,
    anchor_scale=4.0,
    proposals=20,
    rpn_batch=32,
    roi_batch=16,
    embed_size=32,
    batch_size=2,
    teacher_batch_size=2,
    teacher_steps=2,
    steps=3,
    lr=1e-3,
    layer_decay=0.5,
    eval_every=2,
    log_every=1,
    workers=0,
    device="cpu",
    scale=(0.7, 1.4),
    ema=0.9,
    holdout=0.25,
    threshold=0.2,
)


LATE = dict(eval_every=99)  # evaluated at the ends alone


# -------------------------------------------------------------------------------------------- tools
def quick(*more: Callable, put: Callable = setattr) -> None:
    """No pictures and no other thing that takes most of a tiny run's time; then `more`."""
    instance_runs.quick(
        (
            (plots, "strip"),
            (plots, "curves"),
            (plots, "diagram"),
            (plots, "scatter"),
        ),
        more,
        put,
    )


quiet, few_val = instance_runs.quieted(quick), instance_runs.few_val


@pytest.fixture(scope="session")
def tail(tmp_path_factory) -> Path:
    """LVIS folders of a drawn long tail: 12 pictures to learn from, 5 to score. Do not change
    them."""
    return shapes.make_tail(tmp_path_factory.mktemp("tail") / "tail", 12, 2, 5)


@pytest.fixture
def data(tail, tmp_path) -> Path:
    """A copy of `tail` that a test may break."""
    return Path(shutil.copytree(tail, tmp_path / "data"))


@pytest.fixture(scope="module")
def trained(tail, tmp_path_factory) -> Path:
    """The folder of a run whose network finds things on the pictures that it learned from, which
    are scored, too."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "body.pth")
    with pytest.MonkeyPatch.context() as patch:
        quick(put=patch.setattr)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        bp.main(
            bp.preset(
                **tiny(
                    tail,
                    folder / "run",
                    split="all",
                    stage="teacher",
                    norm="live",
                    layer_decay=1.0,
                    lr=6e-3,
                    teacher_steps=60,
                    teacher_batch_size=4,
                    scale=(1, 1),
                    val="train",
                    init_detector="",
                    weights=folder / "body.pth",
                    **LATE,
                )
            )
        )
        torch.set_num_threads(threads)
    STARTS.update(weights=folder / "body.pth", init_detector=folder / "run" / "teacher.pt")
    return folder / "run"


STARTS: dict[str, Path] = {}  # where runs start from, once it is made


def tiny(data: Path, out: Path, **flags) -> dict:
    """Settings of a run; those that are None are left out."""
    every = {"dataset": "lvis", **TINY, **STARTS, "root": data, "out": out} | flags
    return {k: str(v) if isinstance(v, Path) else v for k, v in every.items() if v is not None}


def train(data: Path, out: Path, **flags) -> dict:
    """A run in this process -> what main returns."""
    return bp.main(bp.preset(**tiny(data, out, **flags)))


@pytest.fixture
def line(trained, tail, tmp_path):
    """line(...) -> the command line of a tiny run into tmp_path/out, on `tail`."""
    return lambda out=None, data=None, **flags: as_line(
        **tiny(data or tail, out or tmp_path / "out", **flags)
    )


forked = partial(instance_runs.forked, NAME, quick)


on_ranks = partial(instance_runs.on_ranks, NAME, quick)


typed = instance_runs.typed_to(bp)


@pytest.fixture(scope="module")
def finished(trained, tail, tmp_path_factory):
    """finished(...) -> the folder of that run, uninterrupted; made once. Do not change it."""

    def run(out: Path, **flags) -> None:
        returned = train(tail, out, **flags)
        if flags.get("stage") not in ("calibrate", "prototypes", "retrieve"):
            assert returned == json.loads((out / "results.json").read_text())

    return instance_runs.once_each(tmp_path_factory, run)


@pytest.fixture
def short(trained, tail, tmp_path, monkeypatch):
    """short(...) -> the State after each phase of a run of few steps that is not scored, and its
    `args`."""

    def run(**flags) -> SimpleNamespace:
        found = {}

        def begin(phase, *args, real=bp.begin):
            found[phase.name] = real(phase, *args)
            return found[phase.name]

        with monkeypatch.context() as patch:
            patch.setattr(bp, "begin", begin)
            patch.setattr(bp, "score_networks", lambda *args: None)
            out = tmp_path / f"short{len(list(tmp_path.glob('short*')))}"
            settings = tiny(tail, out, **flags)
            bp.main(bp.preset(**settings))
        return SimpleNamespace(**found, out=out, args=bp.preset(**settings))

    return run


def found_by(out: Path, name: str) -> list[dict]:
    return json.loads((out / f"{name}.segm.json").read_text())


def files(out: Path) -> set[str]:
    return {
        str(p.relative_to(out))
        for p in out.rglob("*")
        if not p.name.startswith(("events.", ".lock"))
    }


def content(path: Path) -> dict:
    if path.name != "prototypes.pt":
        return state(path)
    # it names the folder
    return {k: v for k, v in torch.load(path, weights_only=True).items() if k != "key"}


def assert_equal_runs(out: Path, reference: Path) -> None:
    """Networks, optimizer, prototypes, Delta, scores, detections and log, bit by bit; nothing more
    in the folder."""
    assert files(out) == files(reference) and results(out) == results(reference)
    for name in sorted(p.name for p in reference.glob("*.pt")):
        wrong = differences(content(out / name), content(reference / name))
        assert not wrong, f"{name}: {wrong[:5]}"
    a, b = ([r | {"images_per_second": 0} for r in log_of(folder)] for folder in (out, reference))
    assert a == b
    for path in (
        *reference.glob("*.segm.json"),
        *reference.glob("*.reliability.json"),
        *reference.glob("calib*.json"),
    ):
        assert (out / path.name).read_text() == path.read_text(), path.name


def named(photos) -> set[str]:
    return {Path(p.name).stem for p in photos}


def part(data: Path, name: str) -> Path:
    return data / "annotations" / f"lvis_{name}.json"


altered = partial(instance_runs.altered, part)


# -------------------------------------------------------------------------------------------- a run
def small_shapes() -> None:
    """`--dataset shapes` draws few pictures, and starts from the weights that lie in BODY."""
    shapes.make_tail = lambda root, make=shapes.make_tail: make(root, 12, 2, 5)
    shapes.pretrained = lambda root, backbone: Path(os.environ["BODY"])


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> tuple[Path, Ran]:
    """`--dataset shapes --stage all` in a process of its own, with its pictures; and what it
    said."""
    folder = tmp_path_factory.mktemp("whole")
    flags = {k: v for k, v in TINY.items() if k not in ("frequency", "backbone", "weights", "norm")}
    flags = flags | dict(
        out=folder / "run",
        root=folder / "data",
        init_detector=STARTS["init_detector"],
    )
    done = helpers.run(
        ["--dataset", "shapes", *argv(**flags)],
        folder,
        partial(no_tensorboard_and, small_shapes),
        env={"BODY": str(STARTS["weights"])},
        name=NAME,
    )
    return folder / "run", done.ok()


def no_tensorboard_and(more: Callable) -> None:
    instance_runs.no_tensorboard()
    more()


SCORES = (
    *instance_runs.LVIS_SCORES,
    "ece",
    "box_ap",
    "box_apr",
    "box_apc",
    "box_apf",
    "per_class",
    "step",
)


def test_results_of_a_run(whole):
    out, said = whole
    read, classes = json.loads((out / "results.json").read_text()), list(shapes.TAIL_CLASSES)
    for name, steps in {"supervised": (4,), "student": (6, 7), "teacher": (6, 7)}.items():
        assert (
            read[name].keys() == {"last", "best"}
            and read[name]["best"]["ap"] >= read[name]["last"]["ap"]
        )
        for record in read[name].values():
            assert record.keys() == set(SCORES) and record["step"] in steps
            numbers = [
                v for k, v in record.items() if k not in ("step", "per_class", "ap_l", "ar_l")
            ]
            assert all(np.isfinite(v) and 0 <= v <= 100 for v in numbers if v is not None), record
            assert (
                None not in [record[k] for k in ("ap", "ap50", "box_ap", "ece", "ar300")]
                and record["ece"] <= 1
            )
            present = [v for v in record["per_class"].values() if v is not None]
            assert list(record["per_class"]) == classes
            assert present and np.mean(present) == pytest.approx(record["ap"], abs=1e-9)
        assert read[name]["last"]["step"] == steps[-1]
    assert read["supervised"]["last"]["box_ap"] > 1  # it finds something
    assert (
        read["dataset"] == "shapes"
        and read["split"] == "8"
        and (read["split_seed"], read["seed"]) == (0, 0)
    )
    assert read["stage"] == "all" and read["val"] == "val"
    assert (
        re.fullmatch("[0-9a-f]{64}", read["split_fingerprint"])
        and read["seconds"] > 0 < read["images_per_second"]
    )
    assert f"ap: teacher {read['teacher']['last']['ap']:.2f}" in said.out and str(out) in said.out
    assert (
        "8 labeled images" in said.out and "4 unlabeled" in said.out and "scored on 5" in said.out
    )
    assert (
        "heldout (2 steps), teacher (2 steps), student (3 steps)" in said.out
        and "2 held-out images" in said.out
    )


def test_folder_and_pictures_of_a_run(whole):
    out, _ = whole
    pictures = {
        "curves.png",
        "calibration.png",
        "per_class.png",
        "reliability_teacher.png",
        "reliability_student.png",
        *(f"previews/000000{step}.png" for step in (4, 6, 7)),
    }
    assert files(out) == {
        "config.json",
        "log.jsonl",
        "last.pt",
        "best.pt",
        "heldout.pt",
        "teacher.pt",
        "prototypes.pt",
        "calibration.json",
        "results.json",
        "previews",
        *pictures,
        *(
            f"{name}.{kind}.json"
            for name in ("supervised", "student", "teacher")
            for kind in ("segm", "reliability")
        ),
    }
    for name in pictures:
        with Image.open(out / name) as picture:
            assert np.array(picture.convert("L")).std() > 10 and min(picture.size) > 100, name
    config = json.loads((out / "config.json").read_text())
    assert config["script"] == "better_pseudo_labels.py" and config["classes"] == list(
        shapes.TAIL_CLASSES
    )
    assert (
        config["settings"]["proposals"] == 20
        and config["settings"]["norm"] == "live"
        and config["processes"] == 1
    )
    assert (
        config["fingerprint"] == results(out)["split_fingerprint"]
        and "8 labeled" in config["images"]
    )
    assert (
        len(config["held_out"]) == 2
        and {"commit", "torch", "python", "device", "command"} <= config.keys()
    )


def test_checkpoints_of_a_run(whole):
    out, _ = whole
    last, best, heldout, teacher = (
        content(out / f"{name}.pt") for name in ("last", "best", "heldout", "teacher")
    )
    assert (
        last["step"] == 7
        and last.keys() - best.keys() == {"optimizer"}
        and "optimizer" not in teacher
    )
    assert last["networks"].keys() == best["networks"].keys() == {"student", "teacher"}
    assert teacher["networks"].keys() == heldout["networks"].keys() == {"supervised"}
    assert (heldout["step"], teacher["step"], best["step"]) == (
        2,
        4,
        results(out)["teacher"]["best"]["step"],
    )
    assert apart(heldout["networks"], teacher["networks"]) > 1e-4
    made, train_json = (
        content(out / "prototypes.pt"),
        part(out.parent / "data" / "tail", "train").read_text(),
    )
    assert made["prototypes"].shape == (12, 96) and made["classes"] == list(shapes.TAIL_CLASSES)
    assert ((made["prototypes"].abs().sum(1) > 0) == (made["embedded"] > 0)).all()
    # of the labeled ones alone
    assert 8 <= made["embedded"].sum() < len(json.loads(train_json)["annotations"])


def test_calibration_of_a_run(whole):
    read = json.loads((whole[0] / "calibration.json").read_text())
    assert (
        read.keys() == {"classes", "delta", "raw_delta", "samples", "images", "reliability"}
        and read["images"] == 2
    )
    assert (
        read["classes"] == list(shapes.TAIL_CLASSES)
        and sum(read["samples"]) == read["reliability"]["n"]
    )
    assert all(-1 <= d <= 1 for d in read["delta"] + read["raw_delta"])
    assert all(d == 0 for d, n in zip(read["raw_delta"], read["samples"], strict=True) if n == 0)
    delta = content(whole[0] / "last.pt")["delta"]
    assert (
        delta.tolist() == pytest.approx(read["delta"])
        and content(whole[0] / "teacher.pt")["delta"] is None
    )


PARTS = (
    "loss",
    "rpn",
    "rpn_box",
    "mask",
    *(f"{what}{i}" for what in ("class", "box") for i in (1, 2, 3)),
)


LABELED = {f"{name}_l" for name in PARTS} | {"step", "lr", "images_per_second"}


BOTH = (
    LABELED | {f"{name}_u" for name in PARTS} | {"pseudo_per_image", "pseudo_none", "conf", "mass"}
)


def test_log_of_a_run(whole):
    steps, scores = steps_of(whole[0]), [r for r in log_of(whole[0]) if "loss_l" not in r]
    assert [r["step"] for r in steps] == list(range(1, 8)) and [r["step"] for r in scores] == [
        4,
        6,
        7,
    ]
    assert [set(r) for r in steps] == [LABELED] * 4 + [BOTH] * 3
    assert [set(r) - {"step"} for r in scores] == [
        {"ap_supervised", "apr_supervised", "ece_supervised"}
    ] + [{f"{k}_{name}" for k in ("ap", "apr", "ece") for name in ("student", "teacher")}] * 2
    assert max(r["pseudo_per_image"] for r in steps[4:]) > 0 < max(r["mask_u"] for r in steps[4:])
    lengths, begun = (2, 2, 2, 2, 3, 3, 3), (0, 0, 2, 2, 4, 4, 4)
    for r, length, first in zip(steps, lengths, begun, strict=True):
        for x in "lu" if "loss_u" in r else "l":
            total = sum(r[f"{name}_{x}"] for name in PARTS[1:])
            assert r[f"loss_{x}"] == pytest.approx(total, rel=1e-5) and np.isfinite(total)
        # each phase has a schedule of its own
        factor = bp.learning_rate_factor(r["step"] - 1 - first, length, "cosine", 0.05)
        assert r["lr"] == pytest.approx(1e-3 * factor)


# ------------------------------------------------------------------------------------------- stages
def test_stage_prototypes(finished):
    out = finished(stage="prototypes")
    assert files(out) == {"config.json", "log.jsonl", "prototypes.pt"} and log_of(out) == []
    assert not differences(content(out / "prototypes.pt"), content(finished() / "prototypes.pt"))


def test_stage_teacher(finished):
    """The network of a run of two stages; no student's, no Delta."""
    out, both = finished(stage="teacher"), finished(pseudo="soft")
    assert networks(out) == {"supervised"} and not {
        "heldout.pt",
        "calibration.json",
        "per_class.png",
    } & files(out)
    assert not differences(weights(out / "teacher.pt"), weights(both / "teacher.pt"))
    assert (
        results(out)["supervised"] == results(both)["supervised"]
        and state(out / "last.pt")["step"] == 2
    )


def test_stage_calibrate(finished):
    """What the whole run measures before its student begins; and the same of a teacher that is
    given."""
    out = finished(stage="calibrate")
    assert {"heldout.pt", "calibration.json", "calibration.png"} <= files(out)
    assert not {"teacher.pt", "results.json", "supervised.segm.json"} & files(out)
    for reference in (finished(), finished(stage="calibrate", teacher=out / "heldout.pt")):
        assert (reference / "calibration.json").read_text() == (
            out / "calibration.json"
        ).read_text()
    # it trains nothing
    assert not {p for p in files(reference) if p.endswith(".pt")} - {"prototypes.pt"}
    mine, whole_run = weights(out / "heldout.pt"), weights(finished() / "heldout.pt")
    assert not differences(mine, whole_run)


def test_calibration_of_the_teacher_itself(finished):
    """With --tune it is trained and measured, and no network beside it."""
    out = finished(stage="calibrate", tune=True)
    made = files(out)
    assert {"teacher.pt", "calibration.json", "results.json"} <= made and "heldout.pt" not in made
    alone = finished(stage="calibrate", teacher=out / "teacher.pt", tune=True)
    assert (alone / "calibration.json").read_text() == (out / "calibration.json").read_text()


def test_stage_student_with_teacher_and_calibration(finished, tail):
    """Of a run of all stages; the labels held out are learned from, for others were needed to
    measure Delta."""
    both = dict(teacher=finished() / "teacher.pt", calibration=finished() / "calibration.json")
    out = finished(stage="student", **both)
    assert networks(out) == {"student", "teacher"} and state(out / "last.pt")["step"] == 3
    assert not {"teacher.pt", "heldout.pt", "calibration.json", "per_class.png"} & files(out)
    assert (
        state(out / "last.pt")["delta"].tolist()
        == json.loads(both["calibration"].read_text())["delta"]
    )
    again = finished(stage="all", **both)  # nothing else is left to do
    assert not differences(weights(again / "last.pt"), weights(out / "last.pt"))
    last = weights(out / "last.pt")
    assert (
        apart(last["student"], last["teacher"])
        > 1e-5
        < apart(last["teacher"], weights(both["teacher"])["supervised"])
    )


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_of_two_networks_in_a_file_the_teacher_teaches(finished, name):
    given = finished() / name
    out = finished(stage="student", pseudo="soft", teacher=given, lr=0.0)
    for net in weights(out / "last.pt").values():  # and the student begins as its copy
        assert apart(net, weights(given)["teacher"]) < 1e-6


def test_pseudo_labels_of_each_kind(short, monkeypatch, trained, tmp_path):
    """Table 1: the same objects of the same teacher, with other targets."""
    made, real = {}, bp.pseudo_labels
    given = {"classes": list(shapes.TAIL_CLASSES), "delta": [(i - 5) / 50 for i in range(12)]}
    (tmp_path / "given.json").write_text(json.dumps(given))

    def seen(teacher, weak, delta, args):
        found = real(teacher, weak, delta, args)
        made.setdefault(args.pseudo, []).append((found[0], delta))
        return found

    monkeypatch.setattr(bp, "pseudo_labels", seen)
    for pseudo in ("onehot", "soft", "calibrated"):
        more = dict(calibration=tmp_path / "given.json") if pseudo == "calibrated" else {}
        run = short(
            stage="student",
            teacher=trained / "teacher.pt",
            pseudo=pseudo,
            steps=2,
            batch_size=4,
            lr=0.0,
            **more,
        )
        assert not (run.out / "calibration.json").exists() and (run.student.delta is None) == (
            not more
        )
        found, delta = [o for some, _ in made[pseudo] for o in some], made[pseudo][0][1]
        made[pseudo] = (
            bp.Objects(*(torch.cat([getattr(o, k) for o in found]) for k in bp.Objects._fields)),
            delta,
        )
    (hard, _), (soft, none), (right, delta) = (made[k] for k in ("onehot", "soft", "calibrated"))
    assert none is None and delta.abs().max() > 0 and len(soft.labels) > 0
    # filtered on raw scores
    assert torch.equal(hard.boxes, soft.boxes) and torch.equal(soft.boxes, right.boxes)
    assert torch.equal(hard.probs, F.one_hot(soft.probs.argmax(1), 12).float())
    assert torch.equal(hard.labels, soft.labels) and ((soft.probs == 0) | (soft.probs > 0.02)).all()
    want = torch.where(soft.probs > 0, (soft.probs + 2.0 * delta).clamp(0, 1), 0.0)
    assert torch.allclose(right.probs, want) and not torch.equal(right.probs, soft.probs)


def spied_lists(monkeypatch) -> dict[str, set[str]]:
    """Which pictures each feed of a run may give, by its name, and which are scored."""
    lists = {}

    def views(photos, augment, seed, name, real=instances.Views):
        lists[name] = named(photos)
        return real(photos, augment, seed, name)

    def evaluate(nets, data, *args, real=bp.evaluate):
        lists["scored"] = named(data.val)
        return real(nets, data, *args)

    def calibrate(net, data, *args, real=bp.calibrate):
        lists["measured"] = named(data.val)
        return real(net, data, *args)

    monkeypatch.setattr(instances, "Views", views)
    monkeypatch.setattr(bp, "evaluate", evaluate)
    monkeypatch.setattr(bp, "calibrate", calibrate)
    return lists


EVERYONE = {f"{i:012d}" for i in range(1, 13)}


def test_who_learns_from_what(finished, trained, tail, tmp_path, monkeypatch):
    """Of 8 labeled pictures 2 are held out: from the network that Delta is measured of, not from
    the two others."""
    lists = spied_lists(monkeypatch)
    train(tail, tmp_path / "out", **LATE)
    held = {
        Path(p).stem for p in json.loads((tmp_path / "out" / "config.json").read_text())["held_out"]
    }
    assert len(held) == 2 and lists["measured"] == held and len(lists["scored"]) == 5
    assert lists["heldout labeled"] | held == lists["teacher labeled"] == lists["student labeled"]
    assert not lists["heldout labeled"] & held and len(lists["teacher labeled"]) == 8
    assert lists["unlabeled"] == EVERYONE - lists["teacher labeled"]


def test_labels_that_teach_no_one(trained, tail, tmp_path, monkeypatch):
    """--tune scores on the held-out labels and measures on them: nothing learns from them, not the
    teacher either, and they are no unlabeled pictures."""
    lists = spied_lists(monkeypatch)
    train(tail, tmp_path / "out", **LATE, tune=True)
    held = {
        Path(p).stem for p in json.loads((tmp_path / "out" / "config.json").read_text())["held_out"]
    }
    assert len(held) == 2 and lists["measured"] == held
    assert lists["scored"] == held and results(tmp_path / "out")["val"] == "held out"
    for name in {"teacher labeled", "student labeled", "unlabeled"}:
        assert lists[name] and not lists[name] & held, name
    # nor do prototypes speak of them
    made = content(tmp_path / "out" / "prototypes.pt")["embedded"]
    read = json.loads(part(tail, "train").read_text())
    ids = {p["id"] for p in read["images"] if Path(p["file_name"]).stem in lists["teacher labeled"]}
    assert made.sum() == sum(a["image_id"] in ids for a in read["annotations"])


def test_grid(line, typed, tmp_path, monkeypatch):
    """One run for each pair, on labels held out; the second call trains nothing."""
    monkeypatch.setattr(
        bp,
        "GRIDS",
        {"teacher": {"eps": (0.05, 0.2), "gamma": (0.0,)}, "student": bp.GRIDS["student"]},
    )
    trainings = []
    monkeypatch.setattr(
        bp, "train_step", lambda *args, real=bp.train_step: (trainings.append(1), real(*args))[1]
    )
    flags = [f for f in line(tune=True, stage="teacher")] + ["--grid", "teacher"]
    at = flags.index("--stage")
    flags = flags[:at] + flags[at + 2 :]
    said = typed(flags).ok().out
    out, table = tmp_path / "out", json.loads((tmp_path / "out" / "grid.json").read_text())
    assert [(r["eps"], r["gamma"]) for r in table["runs"]] == [(0.05, 0.0), (0.2, 0.0)] and len(
        trainings
    ) == 4
    for r, folder in zip(table["runs"], ("eps-0.05_gamma-0", "eps-0.2_gamma-0"), strict=True):
        read = results(out / folder)
        assert read["val"] == "held out" and read["supervised"]["last"]["ap"] == r["ap"]
        assert f"eps {r['eps']:.3g} gamma 0 ap {r['ap']:.3g}" in said
    assert table["best"] == max(table["runs"], key=lambda r: r["ap"])
    before = {p: p.read_bytes() for p in out.rglob("*.pt")}
    typed(flags).ok()
    assert len(trainings) == 4 and json.loads((out / "grid.json").read_text()) == table
    assert all(p.read_bytes() == there for p, there in before.items())


def test_grid_of_the_student_on_two_processes(finished, line, tmp_path):
    """Each run joins the group anew; the others' results are read when they are there; one process
    speaks."""
    given = finished(stage="teacher", tune=True) / "teacher.pt"
    flags = line(tune=True, stage="student", teacher=given, steps=1, **LATE) + ["--grid", "student"]
    at = flags.index("--stage")
    every = on_ranks(2, flags[:at] + flags[at + 2 :], tmp_path, small_grid)
    assert [done.code for done in every] == [0, 0], every[0].err[-2000:] + every[1].err[-2000:]
    table = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert [r["lambda_calib"] for r in table["runs"]] == [0.0, 2.0] and table["best"] in table[
        "runs"
    ]
    # PyTorch 2.9's own
    said = [line for line in every[1].out.splitlines() if not line.startswith("[Gloo]")]
    assert every[0].out.count("lambda_calib 0") == 1 and not said


def small_grid() -> None:
    bp.GRIDS = {"student": {"lambda_calib": (0.0, 2.0), "unsup_weight": (1.0,)}}


# ---------------------------------------------------------------------------------------- retrieval
@pytest.fixture(scope="session")
def pool(tail, tmp_path_factory) -> Path:
    """A folder of 8 other pictures, 2 of them twice, 2 that are labeled or scored, one that cannot
    be read."""
    folder = tmp_path_factory.mktemp("pool") / "pool"
    things = shapes.make_things(folder.parent / "things", 8, 1, 1)
    shutil.copytree(things / "images" / "train", folder / "a")
    for i in (1, 2):
        shutil.copy(folder / "a" / f"{i:012d}.jpg", folder / f"again_{i}.jpg")
    for name in ("train", "val"):
        shutil.copy(tail / "images" / name / "000000000003.jpg", folder / f"known_{name}.jpg")
    (folder / "torn.jpg").write_bytes((folder / "a" / "000000000003.jpg").read_bytes()[:500])
    return folder


SEARCH = dict(retrieval_model="test_resnet", neighbours=3, duplicate=0.9999, frequency="file")


def two_frequent(read: dict) -> None:
    for kind in read["categories"]:
        kind["frequency"] = "rf"[kind["id"] <= 2]


@pytest.fixture(scope="module")
def searched(trained, tail, pool, tmp_path_factory) -> dict:
    """Flags of a search for neighbours of rare objects, of all classes but two."""
    return dict(
        pool=pool,
        retrieval_weights=STARTS["weights"],
        **SEARCH,
        **altered(tail, tmp_path_factory.mktemp("frequencies"), two_frequent),
    )


@pytest.fixture(scope="module")
def retrieved(searched, tail, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("retrieved") / "run"
    with pytest.warns(UserWarning, match="torn.jpg"):
        train(tail, out, stage="retrieve", **searched)
    return out


def test_stage_retrieve(retrieved, pool):
    """A list of files, none of them twice, labeled, scored or torn; what each class found, and a
    picture of it."""
    assert {"retrieved.txt", "retrieved.json", "retrieved.png", "embedded/pool"} <= files(retrieved)
    assert not list(retrieved.glob("*.pt"))
    listed = (retrieved / "retrieved.txt").read_text().splitlines()
    assert 3 <= len(listed) == len(set(listed)) and all(
        Path(p).is_file() and pool in Path(p).parents for p in listed
    )
    stems = [Path(p).stem.replace("again_", f"{0:011d}") for p in listed]
    assert len(set(stems)) == len(stems) and not any(s.startswith(("known", "torn")) for s in stems)
    report = json.loads((retrieved / "retrieved.json").read_text())
    assert (report["pool"], report["unreadable"], report["neighbours"], report["kept"]) == (
        13,
        1,
        3,
        len(listed),
    )
    assert report["classes"] and report["queries"] == sum(
        c["queries"] for c in report["classes"].values()
    )
    with Image.open(retrieved / "retrieved.png") as sheet:
        assert sheet.height == 16 + 164 * len(report["classes"])


def test_queries_are_all_objects_of_rare_classes(retrieved, tail):
    chosen = instances.choose(
        instances.find("lvis", tail), "8", 0, "", "remaining", False, balanced=False
    ).labeled
    names, rare = (
        list(shapes.TAIL_CLASSES),
        [t.category for p in chosen for t in p.things if t.category > 1],
    )
    report = json.loads((retrieved / "retrieved.json").read_text())
    assert {k: c["queries"] for k, c in report["classes"].items()} == {
        names[c]: rare.count(c) for c in rare
    }


def test_retrieved_list_is_what_a_student_learns_from(
    retrieved, finished, trained, tail, tmp_path, monkeypatch
):
    """With --unlabeled."""
    lists = spied_lists(monkeypatch)
    file, flags = (
        retrieved / "retrieved.txt",
        dict(stage="student", pseudo="soft", teacher=trained / "teacher.pt"),
    )
    train(tail, tmp_path / "out", unlabeled=file, **flags, **LATE)
    assert lists["unlabeled"] == named(
        [SimpleNamespace(name=p) for p in file.read_text().splitlines()]
    )
    a, b = weights(tmp_path / "out" / "last.pt"), weights(finished(**flags, **LATE) / "last.pt")
    assert apart(a["student"], b["student"]) > 1e-5


def test_pool_inside_a_run(retrieved, searched, tmp_path, monkeypatch, line, typed):
    """Embedded, searched, and learned from; a resumed run does not search again, and says which
    pictures it took."""
    lists = spied_lists(monkeypatch)
    flags = dict(pseudo="soft", **searched, **LATE)
    with pytest.warns(UserWarning, match="torn.jpg"):
        said = typed(line(**flags)).ok().out
    out, listed = tmp_path / "out", (retrieved / "retrieved.txt").read_text()
    assert (out / "retrieved.txt").read_text() == listed
    assert lists["unlabeled"] == {Path(p).stem for p in listed.splitlines()} and networks(out) == {
        "supervised",
        "student",
        "teacher",
    }
    assert f"{len(listed.splitlines())} images of 13" in said
    monkeypatch.setattr(bp, "retrieve", lambda *args: pytest.fail("it searches again"))
    typed(line(resume=True, **flags)).ok()


# ------------------------------------------------------------------------------------------ kill -9
def die(at: int | str) -> None:
    """In a process of its own: SIGKILL at the end of the step `at`; when half of the file `at` is
    written; when the networks of the phase `begin ...` are to be made; or when prototypes
    (`embed`), Delta (`measure`) or the evaluation of a step (`score ...`) are to begin."""
    tally, made, scored = runs.Run.tally, bp.begin, bp.score_networks

    runs.Run.tally = lambda self, step, *args: kill() if step == at else tally(self, step, *args)
    bp.begin = lambda phase, *args: kill() if at == f"begin {phase.name}" else made(phase, *args)
    if at == "embed":
        bp.embed_objects = lambda *args: kill()
    if at == "measure":
        bp.calibrate = lambda *args: kill()
    bp.score_networks = lambda s, *args: kill() if at == f"score {s.step}" else scored(s, *args)
    common_files.open = instance_runs.killed_in_half(at)


def graded() -> None:
    """AP is a hash of the detections, another one in each evaluation."""
    real = judge.lvis_ap
    judge.lvis_ap = lambda truth, found, *more: (
        real(truth, found, *more) | {"ap": zlib.crc32(repr(found).encode()) % 9999 / 99}
    )


# where it is killed, each time in the run that the one before left; the step that is then saved
MOMENTS = [
    ("embed", 0),
    ("prototypes.pt", 0),
    ("begin heldout", 0),
    (0, 0),
    (1, 1),
    ("heldout.pt", 1),
    ("last.pt", 1),
    ("begin teacher", 2),
    (2, 2),
    (3, 3),
    ("teacher.pt", 3),
    ("last.pt", 3),
    ("score 4", 4),
    ("supervised.segm.json", 4),
    ("measure", 4),
    ("calibration.json", 4),
    ("begin student", 4),
    (4, 4),
    ("last.pt", 4),
    (5, 5),
    ("score 6", 6),
    ("student.segm.json", 6),
    (6, 6),
    ("last.pt", 6),
    ("score 7", 7),
    ("student.segm.json", 7),
    ("last.pt", 7),
    ("results.json", 7),
]


def test_killed_at_chosen_moments_and_resumed_is_bit_equal(line, tmp_path):
    """In each phase, at each border, between saving and scoring, while each kind of file is
    written."""
    out, flags = tmp_path / "out", line(resume=True, save_every=1)
    for at, saved in MOMENTS:
        done = forked(flags, tmp_path, graded, partial(die, at))
        assert done.code == -signal.SIGKILL and "Traceback" not in done.err, f"{at}: {done}"
        assert (state(out / "last.pt")["step"] if (out / "last.pt").exists() else 0) == saved, at
        assert (
            at != "measure"
            or not (out / "calibration.json").exists()
            and (out / "teacher.pt").exists()
        )
    for each in (flags, line(tmp_path / "reference")):
        forked(each, tmp_path, graded).ok()
    assert_equal_runs(out, tmp_path / "reference")
    # evaluations have scores of their own, so that one in the place of another would show
    assert len({r[k] for r in log_of(out) for k in r if k.startswith("ap_")}) > 2


def test_killed_at_random_moments_and_resumed_is_bit_equal(line, tmp_path):
    """A kill never loses what was saved. KILLS=50 for more of them."""
    kills = int(os.environ.get("KILLS", 4))
    settings = dict(teacher_steps=2 * kills, steps=2 * kills, save_every=2, eval_every=6)
    instance_runs.kill_at_random_moments(
        kills, line, tmp_path, partial(quick, graded), NAME, **settings
    )
    assert_equal_runs(tmp_path / "out", tmp_path / "reference")


# ---------------------------------------------------------------------------------- signals, resume
EVA = dict(
    backbone="eva02_tiny_patch14_224",
    weights="none",
    image_size=64,
    window=2,
    init_detector="",
    embed_size=28,
    norm=None,
    layer_decay=0.8,
)


SETTINGS = {
    "": {},
    "tune": dict(tune=True, pseudo="soft"),
    "live": dict(norm="live", smoothing="uniform", schedule="constant", clip=1.0, seed=1),
    "drop path": EVA
    | dict(drop_path=0.5, depth=2, pseudo="soft", smoothing="uniform", embed_size=None),
}


def shallow(put: Callable, depth: int, width: int = 48) -> None:
    """From now on timm gives EVA-02's of this many blocks. `put` is setattr, or a monkeypatch's."""
    real = timm.create_model

    def create(name, *args, **more):
        small = dict(depth=depth, embed_dim=width, num_heads=2) if name.startswith("eva02") else {}
        return real(name, *args, **more, **small)

    put(timm, "create_model", create)


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_by_sigterm_and_resumed_is_bit_equal(
    line, typed, tail, tmp_path, monkeypatch, name
):
    """In each phase, and at their borders (the second and the fourth step are the last of
    theirs)."""
    settings = {k: v for k, v in SETTINGS[name].items() if k != "depth"}
    if "depth" in SETTINGS[name]:
        shallow(monkeypatch.setattr, SETTINGS[name]["depth"])
        settings["global_blocks"] = 1
    out, flags = tmp_path / "out", line(resume=True, **settings)
    train(tail, tmp_path / "reference", **settings)
    last = state(tmp_path / "reference" / "last.pt")["step"]
    for at in range(0, last - 1) if name == "" else (0, last - 3, last - 2):
        instance_runs.assert_stops(typed, flags, out, at)
    typed(flags).ok()
    assert_equal_runs(out, tmp_path / "reference")


def test_settings_that_matter_give_other_weights(finished):
    """What the comparisons above would miss if they compared nothing."""
    found = [weights(finished(**SETTINGS[name]) / "last.pt")["student"] for name in ("", "tune")]
    assert all(apart(a, b) > 1e-5 for i, a in enumerate(found) for b in found[:i])


def test_resume_in_an_empty_folder_starts_afresh_and_says_so(line, typed, finished, tmp_path):
    """With workers, on which nothing depends."""
    (tmp_path / "out").mkdir()
    done = typed(line(resume=True, workers=2)).ok()
    assert "starts afresh" in done.out and str(tmp_path / "out") in done.out
    assert_equal_runs(tmp_path / "out", finished())


def test_results_do_not_depend_on_what_the_process_did_before(tail, tmp_path, trained):
    """Also with random weights, which are drawn for prototypes, too."""
    for name in "ab":
        torch.manual_seed(ord(name))
        train(tail, tmp_path / name, init_detector="", weights="none", stage="teacher", **LATE)
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "flags",
    [{}, dict(stage="teacher"), dict(stage="calibrate"), dict(stage="prototypes")],
    ids=words,
)
def test_finished_run_resumed_changes_nothing(line, typed, finished, tmp_path, flags):
    out = Path(shutil.copytree(finished(**flags), tmp_path / "out"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "config.json"}
    typed(line(resume=True, **flags)).ok()
    assert [p for p in before if before[p] != p.read_bytes()] == []


def test_used_folder_and_resume_with_other_settings(line, typed, finished, tmp_path):
    out = Path(shutil.copytree(finished(), tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert "--resume" in (error := typed(line()).error()) and "--out" in error and str(out) in error
    error = typed(line(resume=True, lr=0.2, eps=0.2, pseudo="soft")).error()
    assert (
        "lr (0.001 then, 0.2 now)" in error
        and "pseudo (calibrated then, soft now)" in error
        and "eps (" in error
    )
    assert "--resume" in error and str(out) in error and "steps" not in error
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    typed(line(resume=True, workers=1, save_every=3, log_every=2)).ok()


def test_a_checkpoint_that_lacks_its_optimizer_is_a_sentence(line, typed, finished, tmp_path):
    out = Path(shutil.copytree(finished(), tmp_path / "out"))
    last = torch.load(out / "last.pt", weights_only=True)
    del last["optimizer"]
    torch.save(last, out / "last.pt")
    error = typed(line(resume=True)).error()
    assert "lacks 'optimizer'" in error and str(out / "last.pt") in error and "--out" in error


def test_folder_of_another_script(line, typed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(
        '{"script": "guided_distillation.py", "settings": {}}'
    )
    error = typed(line(resume=True)).error()
    assert "guided_distillation.py" in error and "--out" in error and str(tmp_path / "out") in error


def test_run_whose_teacher_file_is_gone_goes_on(line, typed, finished, tmp_path, monkeypatch):
    """last.pt holds the teacher, and Delta."""
    given = {
        name: Path(shutil.copy(finished() / name, tmp_path))
        for name in ("teacher.pt", "calibration.json")
    }
    flags = dict(
        stage="student",
        teacher=given["teacher.pt"],
        calibration=given["calibration.json"],
        resume=True,
    )
    with monkeypatch.context() as patch:
        instance_runs.interrupt(patch, 1)
        typed(line(**flags)).ok()
    for file in given.values():
        file.unlink()
    typed(line(**flags)).ok()
    assert state(tmp_path / "out" / "last.pt")["step"] == 3


# ---------------------------------------------------------------------------------------- processes
def test_as_a_user_types_it(line, tmp_path):
    """Under torchrun with two processes; the tests start the script as its last line does."""
    done = torchrun(2, line(steps=1, teacher_steps=1, **LATE), name=NAME).ok()
    # one process speaks
    assert done.out.count("8 labeled images") == done.out.count("ap: teacher") == 1
    assert results(tmp_path / "out")["teacher"]["last"]["step"] == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["processes"] == 2
    last_line = (helpers.REPO / f"{NAME}.py").read_text().splitlines()[-1]
    assert last_line == "    cli.cli(Args, settings, main, choosers=CHOOSERS)"


# Batches of four with frozen BatchNorm, weights that were trained, few steps, and a seed with which
# rounding decides
# nothing: large anchors all around a small box overlap it alike, so now and then it does, and other
# ones are sampled.
FOUR = dict(batch_size=4, teacher_batch_size=4, steps=2, teacher_steps=3, lr=3e-4, seed=3, **LATE)


MEANS = {"conf", "mass", "images_per_second"}  # over objects, see below


# Sums in another order, on any CPU. Half of the images in a batch, or a gradient that is not
# exchanged, moves the weights by more than twice as much (asserted below).
CLOSE = 5e-5


def signal_to_one() -> None:
    if os.environ["RANK"] == "1":
        instance_runs.interrupt(pytest.MonkeyPatch(), 3)


def test_steps_are_equal_on_one_and_two_processes(line, typed, finished, tmp_path):
    """In all phases: prototypes, Delta, losses, pseudo labels. Then a signal to one of two
    processes, which all hear at the next fifth step, here within the teacher's phase; and one
    process goes on."""
    one, two, out = finished(**FOUR), tmp_path / "two", tmp_path / "out"
    for done in on_ranks(2, line(two, **FOUR), tmp_path):
        done.ok()
    assert apart(content(one / "prototypes.pt"), content(two / "prototypes.pt")) < 1e-6
    for name in ("heldout.pt", "teacher.pt", "last.pt"):
        assert apart(weights(one / name), weights(two / name)) < CLOSE
        assert (
            apart(
                weights(one / name),
                weights(finished(**FOUR | dict(batch_size=2, teacher_batch_size=2)) / name),
            )
            > 1e-4
        )
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - MEANS:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    assert min(r["pseudo_per_image"] for r in steps_of(one)[6:]) > 0
    a, b = (json.loads((folder / "calibration.json").read_text()) for folder in (one, two))
    assert a["samples"] == b["samples"] and a["delta"] == pytest.approx(b["delta"], abs=1e-6)
    for name in networks(one):
        a, b = (results(folder)[name]["last"] for folder in (one, two))
        assert a.pop("per_class") == pytest.approx(b.pop("per_class"), abs=1e-6)
        assert a == pytest.approx(b, abs=1e-6)
    every = on_ranks(2, line(resume=True, **FOUR), tmp_path, signal_to_one)
    assert [done.code for done in every] == [0, 0] and not any(
        "Traceback" in done.err for done in every
    )
    assert "Stopped by a signal to another process after step 5" in every[0].out
    assert state(out / "last.pt")["step"] == 5
    typed(line(resume=True, **FOUR)).ok()
    assert apart(weights(one / "last.pt"), weights(out / "last.pt")) < CLOSE


def test_logged_means_over_pseudo_labels_do_not_depend_on_parts_or_processes(
    finished, line, trained, tail, tmp_path
):
    """Of all objects, wherever they were found: a part without one does not pull `conf` to zero."""
    train(tail, tmp_path / "parts", **FOUR, accumulate=4)
    for done in on_ranks(2, line(tmp_path / "two", **FOUR), tmp_path):
        done.ok()
    for name in ("parts", "two"):
        for a, b in zip(steps_of(finished(**FOUR))[6:], steps_of(tmp_path / name)[6:], strict=True):
            assert all(b[k] == pytest.approx(a[k], rel=1e-3) for k in ("conf", "mass")), name


def test_live_statistics_on_two_processes(line, tmp_path):
    """All processes have the same networks and Delta after each step."""
    flags = line(norm="live", batch_size=4, teacher_batch_size=4, **LATE)
    every = on_ranks(2, flags, tmp_path, partial(keep_last, tmp_path))
    assert [done.code for done in every] == [0, 0], every[0].err[-3000:] + every[1].err[-3000:]
    a, b = (torch.load(tmp_path / f"kept{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not differences(a, b) and a["delta"].shape == (12,)


def keep_last(folder: Path) -> None:
    """The state of each process before its last evaluation."""

    def score(s, *args, real=bp.score_networks):
        if s.phase == "student":
            torch.save(
                {"delta": s.delta, **{k: v.state_dict() for k, v in s.networks().items()}},
                folder / f"kept{os.environ['RANK']}.pt",
            )
        return real(s, *args)

    bp.score_networks = score


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_evaluation_and_prediction_are_equal_on_any_number_of_processes(
    copy, typed, tail, tmp_path
):
    """12 and 5 pictures, shared out unevenly."""
    found, file = {}, str(copy / "teacher.pt")
    for n in (1, 3):
        for flags in (["--eval", file], ["--predict", file, str(tail / "images" / "val")]):
            for done in (
                [typed([*flags, *HERE])] if n == 1 else on_ranks(n, [*flags, *HERE], tmp_path)
            ):
                done.ok()
        made = ("supervised.segm.json", "results.json", "predictions/predictions.json")
        found[n] = [json.loads((copy / f"teacher.pt.{name}").read_text()) for name in made]
    assert found[1][:2] == found[3][:2]
    helpers.assert_same_objects(found[1][2], found[3][2])  # other pictures go in one batch
    assert found[1][1]["supervised"]["last"]["ap"] > 2 and len(found[1][2]) > 5


@pytest.mark.parametrize("flags", [dict(batch_size=3), dict(teacher_batch_size=5)], ids=words)
def test_batch_that_does_not_divide_is_said_before_processes_meet(line, tmp_path, flags):
    for env in helpers.NEVER_MEET:
        error = forked(line(**flags), tmp_path, env=env).error()
        assert (
            f" {next(iter(flags.values()))}" in error
            and "2 processes" in error
            and "batch" in error.lower()
        )
    assert not (tmp_path / "out").exists()


def test_an_image_that_one_process_cannot_score_stops_all_with_one_sentence(line, data, tmp_path):
    truncate(data / "images" / "val" / "000000000002.jpg")  # the second of five: process 1 meets it
    every = on_ranks(2, line(data=data, stage="teacher"), tmp_path)
    instance_runs.assert_all_stop_for("000000000002.jpg", every)


@pytest.mark.parametrize(
    "flags", [dict(accumulate=2), dict(accumulate=3), dict(accumulate=4)], ids=words
)
def test_same_steps_in_less_memory(finished, trained, tail, tmp_path, flags):
    """Of four images, three parts are two and two. The pictures have 1 to 4 objects, pseudo labels
    from none on."""
    train(tail, tmp_path / "out", **FOUR, **flags)
    for name in ("heldout.pt", "teacher.pt", "last.pt"):
        assert apart(weights(finished(**FOUR) / name), weights(tmp_path / "out" / name)) < CLOSE
    for a, b in zip(steps_of(finished(**FOUR)), steps_of(tmp_path / "out"), strict=True):
        assert all(b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-6) for k in a.keys() - MEANS)


@pytest.mark.parametrize("numbers", [(0, 3, 1, 2), (0, 0, 2, 1), (0, 0, 0, 0)], ids=str)
def test_parts_with_other_numbers_of_objects_or_none(short, tail, monkeypatch, numbers):
    """One step on four images of which some have no object: gradients of --accumulate 2 are those
    of 1."""
    found = {}
    for parts in (1, 2):
        s = short(stage="teacher", teacher_steps=1, teacher_batch_size=4, accumulate=parts).teacher
        g = np.random.default_rng(0)
        images = torch.from_numpy(g.integers(0, 256, (4, 3, 64, 64), np.uint8))
        masks = [torch.zeros(n, 64, 64, dtype=torch.uint8) for n in numbers]
        for mask in (m for some in masks for m in some):
            y, x = g.integers(0, 40, 2)
            mask[y : y + 20, x : x + 24] = 1
        batch = instances.Batch(
            images, None, [instances.Target(torch.arange(len(m)), m) for m in masks], torch.zeros(4)
        )
        s.optimizer.step, s.step = lambda: None, 1
        log = bp.train_step(
            s,
            batch,
            None,
            bp.preset(
                "lvis",
                image_size=64,
                accumulate=parts,
                roi_batch=16,
                rpn_batch=32,
                proposals=20,
                anchor_scale=4.0,
            ),
            World(),
        )
        found[parts] = (
            {k: p.grad for k, p in s.student.named_parameters() if p.grad is not None},
            log,
        )
        assert all(v.isfinite() for v in log.values())
    assert apart(found[1][0], found[2][0]) < 1e-6 and found[1][0].keys() == {
        k for k, p in s.student.named_parameters() if p.requires_grad
    }
    assert found[1][1].keys() == found[2][1].keys()
    for k, v in found[1][1].items():
        assert float(v) == pytest.approx(float(found[2][1][k]), rel=1e-5, abs=1e-7), k
    assert (float(log["mask_l"]) == 0) == (sum(numbers) == 0) and float(log["rpn_l"]) > 0


def test_bf16(finished, trained, tail, tmp_path):
    """Backbone and pyramid; what is saved and the losses are float32."""
    train(tail, tmp_path / "out", precision="bf16", **LATE)
    a, b = ([r["loss_l"] for r in steps_of(out)] for out in (finished(), tmp_path / "out"))
    last = tensors(weights(tmp_path / "out" / "last.pt")).values()
    assert a[0] != b[0] and a == pytest.approx(b, rel=0.3)
    assert {v.dtype for v in last} <= {torch.float32, torch.int64, torch.bool}
    assert all(v.isfinite().all() for v in last)


# ------------------------------------------------------------------------------------ eval, predict
@pytest.mark.parametrize(
    "name, which", [("last", "last"), ("best", "best"), ("teacher", "last"), ("heldout", None)]
)
def test_eval_gives_the_runs_own_results(finished, typed, tail, tmp_path, name, which):
    run = Path(shutil.copytree(finished(), tmp_path / "copy"))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    said = typed(["--eval", str(run / f"{name}.pt"), *HERE]).ok().out
    scored, read = json.loads((run / f"{name}.pt.results.json").read_text()), results(run)
    if which:
        network = "teacher" if name in ("last", "best") else "supervised"
        assert scored[network]["last"] == read[network][which]
    for network in ("student", "teacher") if name in ("last", "best") else ("supervised",):
        record = scored[network]["last"]
        # best.pt is the teacher's best
        if which and record["step"] == read[network][which]["step"]:
            assert record == read[network][which]
        assert record["box_ap"] > 1 and f"{network}: ap {record['ap']:.2f}" in said
        found = json.loads((run / f"{name}.pt.{network}.segm.json").read_text())
        again = judge.lvis_ap(
            json.loads(part(tail, "val").read_text()),
            found,
            "segm",
            300,
            state(run / f"{name}.pt")["groups"],
        )
        assert [again[k] for k in SCORES[:10]] == [record[k] for k in SCORES[:10]]
        if which == "last":
            assert found == found_by(run, network)
    assert scored["dataset"] == "lvis" and scored["val"] == "val"
    assert all(p.read_bytes() == there for p, there in before.items())
    assert {f"{name}.pt.previews.png", f"{name}.pt.reliability.png"} <= files(run)


def test_eval_with_other_flags(copy, typed):
    """Soft-NMS keeps what NMS drops, with lower scores; maskness lowers scores; fewer
    detections."""

    def scored(*flags: str) -> list[dict]:
        typed(["--eval", str(copy / "teacher.pt"), *HERE, "--frequency", "subset", *flags]).ok()
        return json.loads((copy / "teacher.pt.supervised.segm.json").read_text())

    plain, soft, masked, few = (
        scored(*f) for f in ((), ("--soft-nms",), ("--maskness",), ("--detections", "2"))
    )
    assert plain == found_by(copy, "supervised") and len(soft) > len(plain) == len(masked) > len(
        few
    )
    for a, b in zip(plain, masked, strict=True):
        assert b["score"] < a["score"] and {**a, "score": 0} == {**b, "score": 0}
    best = {
        i: max(r["score"] for r in plain if r["image_id"] == i)
        for i in {r["image_id"] for r in plain}
    }
    assert best == {i: max(r["score"] for r in soft if r["image_id"] == i) for i in best}
    assert sum(r["score"] for r in soft) < len(soft) / len(plain) * sum(r["score"] for r in plain)
    assert max(sum(r["image_id"] == i for r in few) for i in best) <= 2


def test_predict_writes_overlays_and_predictions(copy, typed, tail, tmp_path):
    """Of a file and of a folder; pictures of odd sizes; COCO's result format."""
    best = max(found_by(copy, "supervised"), key=lambda r: r["score"])["image_id"]
    source, alone = (tail / "images" / "train" / f"{i:012d}.jpg" for i in (best, 2))
    source = Image.open(source)
    made, overlays, found = instance_runs.predict_odd_ones(
        typed, copy, tmp_path / "photos", source, alone, (37, 91)
    )
    for name, picture in made.items():
        mine = [r for r in found if r["image_id"] == str(tmp_path / "photos" / name)]
        assert (mine or name in ("pixel.bmp", "wide.png")) and len(mine) <= 300
        for r in mine:
            assert (
                r.keys() == {"image_id", "category_id", "segmentation", "score", "bbox"}
                and 0.02 < r["score"] <= 1
            )
            assert (
                r["segmentation"]["size"] == [picture.height, picture.width]
                and 1 <= r["category_id"] <= 12
            )
            x, y, w, h = r["bbox"]
            assert (
                0 <= min(x, y, w, h)
                and x + w <= picture.width + 1e-3
                and y + h <= picture.height + 1e-3
            )
        with Image.open(overlays[name]) as overlay:
            assert overlay.width == picture.width and overlay.height >= picture.height
    best = max((r for r in found if r["image_id"].endswith("a.jpg")), key=lambda r: r["score"])
    assert best["score"] > 0.5  # something is drawn, inside its box
    x, y, w, h = best["bbox"]
    rows, columns = np.nonzero(coco_mask.decode(best["segmentation"]))
    assert (
        len(rows) > 20 and x - 1 <= columns.min() and columns.max() <= x + w and y - 1 <= rows.min()
    )
    drawn = np.array(Image.open(overlays["a.jpg"]))[:96].astype(int)
    assert (abs(drawn - np.array(source)).max(2) > 60).sum() > 20


def test_predictions_of_a_scored_picture_are_what_is_evaluated(copy, typed, tail):
    """But for the classes that LVIS does not know of a picture."""
    typed(["--predict", str(copy / "teacher.pt"), str(tail / "images" / "train"), *HERE]).ok()
    predicted = json.loads((copy / "teacher.pt.predictions" / "predictions.json").read_text())
    every = [{**r, "image_id": int(Path(r["image_id"]).stem)} for r in predicted]
    scored = found_by(copy, "supervised")
    scored_classes = {(r["image_id"], r["category_id"]) for r in scored}
    same = [r for r in every if (r["image_id"], r["category_id"]) in scored_classes]
    helpers.assert_same_objects(same, scored)
    assert scored and len(every) > len(scored)


# --------------------------------------------------------------------------------------------- data
def test_broken_image_is_skipped_with_a_warning_and_counted_in_training(trained, data, tmp_path):
    truncate(data / "images" / "train" / "000000000003.jpg")
    with pytest.warns(UserWarning, match="000000000003.jpg .*training goes on without it"):
        train(
            data,
            tmp_path / "out",
            split="all",
            stage="teacher",
            smoothing="uniform",
            teacher_batch_size=12,
        )
    assert [r["skipped_images"] for r in steps_of(tmp_path / "out")] == [1, 2]


def test_images_that_cannot_be_used_are_named(data, line, typed, tmp_path, recwarn):
    flags = dict(data=data, stage="teacher", smoothing="uniform")
    scored = data / "images" / "val" / "000000000004.jpg"
    whole = scored.read_bytes()
    truncate(scored)
    assert (
        "000000000004.jpg" in typed(line(**flags)).error()
        and not (tmp_path / "out" / "best.pt").exists()
    )
    Image.new("RGB", (80, 90)).save(scored)
    error = typed(line(tmp_path / "b", **flags)).error()
    assert "80x90" in error and "96x96" in error and "images/val" in error
    scored.write_bytes(whole)
    for path in (data / "images" / "train").iterdir():
        Image.new("RGB", (80, 90)).save(path)
    assert (
        "80x90" in (error := typed(line(tmp_path / "c", **flags)).error())
        and "images/train" in error
    )
    assert "80x90" in typed(line(tmp_path / "d", data, stage="prototypes")).error()
    for path in (data / "images" / "train").iterdir():
        path.write_bytes(b"no picture")
    assert "can be read" in typed(line(tmp_path / "e", **flags)).error() and len(recwarn) >= 4


def test_broken_image_among_prototypes_is_named(data, line, typed):
    """Whose labels are learned from: a warning in training, and here one sentence."""
    for path in (data / "images" / "train").iterdir():
        truncate(path)
    assert "images/train" in typed(line(data=data, stage="prototypes")).error()


def resized(data: Path) -> None:
    """Every picture, and its annotations, another odd size."""
    for name in ("train", "val"):
        read = json.loads(part(data, name).read_text())
        for record in read["images"]:
            path = data / "images" / name / record["file_name"]
            size = ((37, 91), (91, 37), (64, 65), (130, 33))[record["id"] % 4]
            with Image.open(path) as picture:
                picture.resize(size).save(path)
            for a in (a for a in read["annotations"] if a["image_id"] == record["id"]):
                a["segmentation"] = [
                    [v * size[i % 2] / 96 for i, v in enumerate(p)] for p in a["segmentation"]
                ]
                a["bbox"] = [v * size[i % 2] / 96 for i, v in enumerate(a["bbox"])]
                a["area"] *= size[0] * size[1] / 96 / 96
            record["width"], record["height"] = size
        part(data, name).write_text(json.dumps(read))


def test_pictures_of_odd_sizes(trained, data, tmp_path):
    resized(data)
    train(data, tmp_path / "out", **LATE)
    sizes = {i: tuple(s[::-1]) for i, s in enumerate(((37, 91), (91, 37), (64, 65), (130, 33)))}
    for r in found_by(tmp_path / "out", "teacher"):
        h, w = sizes[r["image_id"] % 4]
        assert r["segmentation"]["size"] == [h, w] and r["bbox"][0] + r["bbox"][2] <= w + 1e-3
    assert results(tmp_path / "out")["supervised"]["last"]["box_ap"] > 0


def test_images_without_an_object(trained, tail, line, typed, tmp_path):
    """In the training file they are unlabeled, wherever they are listed; in the scored one they
    stay."""

    def bare(read: dict) -> None:
        read["annotations"] = [a for a in read["annotations"] if a["image_id"] > 2]

    files = altered(tail, tmp_path, bare)
    (tmp_path / "list.txt").write_text("".join(f"{i:012d}.jpg\n" for i in (1, 3, 4, 5)))
    done = typed(line(split=tmp_path / "list.txt", **files)).ok()
    assert (
        "3 labeled images" in done.out
        and "and 9 unlabeled" in done.out
        and "scored on 5" in done.out
    )
    assert {r["image_id"] for r in found_by(tmp_path / "out", "teacher")} >= {3, 4, 5}
    (tmp_path / "bare.txt").write_text("1\n2\n")
    error = typed(line(tmp_path / "other", split=tmp_path / "bare.txt", **files)).error()
    assert "none of its images has an object" in error and not (tmp_path / "other").exists()


def test_no_object_in_any_crop(trained, tail, tmp_path, monkeypatch):
    """In all phases; nor pseudo labels."""

    def nothing(photo, data, window=None, crowds=False, empty=True, real=masks_of):
        found = real(photo, data, window, crowds, empty)
        return found if window is None else type(found)(*(part[:0] for part in found))

    monkeypatch.setattr(bp, "masks_of", nothing)
    train(tail, tmp_path / "out", threshold=1.0, **LATE)
    for r in steps_of(tmp_path / "out"):
        for x in "lu" if "loss_u" in r else "l":
            assert (
                r[f"mask_{x}"]
                == r[f"rpn_box_{x}"]
                == r[f"box1_{x}"]
                == 0
                < min(r[f"rpn_{x}"], r[f"class1_{x}"])
            )
            assert np.isfinite(r[f"loss_{x}"])
    assert all(r["pseudo_none"] == 1 for r in steps_of(tmp_path / "out")[4:])


def test_class_never_seen_and_ids_that_are_no_places(trained, tail, tmp_path):
    def more(read: dict) -> None:
        for record in read["annotations"]:
            record["category_id"] *= 10
        read["categories"] = [{"id": 5, "name": "ghost", "frequency": "r"}] + [
            {**c, "id": 10 * c["id"]} for c in read["categories"][::-1]
        ]
        for image in read["images"]:
            image["neg_category_ids"] = [10 * c for c in image["neg_category_ids"]] + [5]

    read = train(tail, tmp_path / "out", **altered(tail, tmp_path, more), **LATE)
    last, found = read["teacher"]["last"], found_by(tmp_path / "out", "teacher")
    assert (
        list(last["per_class"]) == ["ghost", *shapes.TAIL_CLASSES]
        and last["per_class"]["ghost"] is None
    )
    learned = weights(tmp_path / "out" / "last.pt")["teacher"]["heads.learned"]
    ids = [5, *range(10, 130, 10)]
    assert not learned[0] and {r["category_id"] for r in found} <= {
        i for i, x in zip(ids, learned, strict=True) if x
    }
    targets = content(tmp_path / "out" / "prototypes.pt")
    assert targets["embedded"][0] == 0 and not targets["prototypes"][0].any()


def test_one_class_alone(trained, tail, tmp_path):
    def one(read: dict) -> None:
        read["categories"] = [{"id": 7, "name": "thing", "frequency": "r"}]
        for record in read["annotations"]:
            record["category_id"] = 7
        for image in read["images"]:
            image["neg_category_ids"] = []

    files = altered(tail, tmp_path, one)
    last = train(tail, tmp_path / "out", **files, **LATE)["teacher"]["last"]
    assert last["per_class"] == {"thing": last["ap"]}
    assert {r["category_id"] for r in found_by(tmp_path / "out", "teacher")} <= {7}
    head = weights(tmp_path / "out" / "last.pt")["student"]["heads.boxes.0.classes.weight"]
    assert head.shape == (1, 64)


def test_one_labeled_picture(trained, tail, line, typed, tmp_path):
    """It teaches; but where some must be held out one is not enough."""
    train(tail, tmp_path / "a", split="1", stage="teacher", **LATE)
    assert state(tmp_path / "a" / "last.pt")["step"] == 2
    for flags in ({}, dict(tune=True, pseudo="soft"), dict(stage="calibrate")):
        error = typed(line(split="1", **flags)).error()
        assert "held out" in error and not (tmp_path / "out").exists()


def with_crowds(read: dict) -> None:
    """A COCO file, in which the class 5 has a crowd in each part and no other object."""
    read["annotations"] = [a for a in read["annotations"] if a["category_id"] != 5] + [
        {
            "id": 999,
            "image_id": 3,
            "category_id": 5,
            "iscrowd": 1,
            "area": 400.0,
            "bbox": [5, 5, 20, 20],
            "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]],
        }
    ]
    for kind in read["categories"]:
        del kind["frequency"]


def test_class_whose_only_object_is_a_crowd(trained, tail, tmp_path):
    """It is not learned, counted, embedded, or found; Delta is its group's; and its picture
    stays."""
    files, out = altered(tail, tmp_path, with_crowds), tmp_path / "out"
    (tmp_path / "list.txt").write_text("".join(f"{i}\n" for i in range(1, 10)))
    train(tail, out, dataset="coco", split=tmp_path / "list.txt", **files, **LATE)
    assert not weights(out / "last.pt")["teacher"]["heads.learned"][4]
    assert content(out / "prototypes.pt")["embedded"][4] == 0
    read = json.loads((out / "calibration.json").read_text())
    assert read["samples"][4] == 0 == read["raw_delta"][4]
    assert not any(r["category_id"] == 5 for r in found_by(out, "teacher"))
    assert results(out)["teacher"]["last"]["per_class"]["star"] is None


def test_crowd_does_not_count_as_an_object_when_a_class_is_measured(trained, tail, monkeypatch):
    """Of classes without an object in the held-out pictures the group's mean is taken, not their
    own Delta."""
    data = instances.find("lvis", tail)
    photos = [
        p._replace(things=tuple(t._replace(crowd=t.category == 0) for t in p.things))
        for p in data.train
    ]
    data = instances.scored_on(data, photos)
    args = bp.preset("lvis", image_size=64, workers=0, shrink=1.0)
    samples = judge.Samples(
        np.array([0] * 9 + [1]), np.array([0.9] * 9 + [0.5]), np.array([False] * 9 + [True])
    )
    monkeypatch.setattr(judge, "samples", lambda *_, **__: samples)
    nothing = SimpleNamespace(infer=lambda x: ([], [(torch.zeros(0, 4), torch.zeros(0, 12))]))
    delta = bp.calibrate(nothing, data, ["r"] + ["f"] * 11, args, World())["delta"]
    assert delta[0] > 0.1, "nine wrong detections of a class without an object decide its Delta"


# ------------------------------------------------------------------------------------------ presets
@pytest.fixture
def two_steps(trained, typed, tmp_path):
    """two_steps(picture, ...) -> results.json of a run of two small steps a phase, which is then
    evaluated and predicts the picture. The flags that a data set has of its own are its own."""

    def do(picture: Callable[[], Path], **flags) -> dict:
        own = (
            "lr",
            "scale",
            "ema",
            "layer_decay",
            "frequency",
            "split",
            "norm",
            "threshold",
        )
        small, out = {k: None for k in (*own, "init_detector")}, tmp_path / "out"
        flags = dict(steps=2, eval_every=99, split="4") | flags
        typed(as_line(**tiny(flags.pop("root"), out, **small | flags))).ok()
        assert {len(steps_of(out)), state(out / "last.pt")["step"]} == {6}
        typed(["--eval", str(out / "last.pt"), *HERE]).ok()
        read, scored = results(out), json.loads((out / "last.pt.results.json").read_text())
        for name in ("student", "teacher"):
            assert scored[name]["last"] == read[name]["last"]
            assert found_by(out, name) == json.loads(
                (out / f"last.pt.{name}.segm.json").read_text()
            )
        assert [read[name]["last"]["step"] for name in ("supervised", "student")] == [4, 6]
        typed(["--predict", str(out / "best.pt"), str(picture()), *HERE]).ok()
        found = json.loads((out / "best.pt.predictions" / "predictions.json").read_text())
        with Image.open(picture()) as image:
            assert all(r["segmentation"]["size"] == [image.height, image.width] for r in found)
        assert len(list((out / "best.pt.predictions").glob("*_overlay.jpg"))) == 1
        return read

    return do


needs = {
    name: pytest.mark.skipif(
        not (TEST_DATA / name).exists(), reason=f"no {name} in TEST_DATA ({TEST_DATA})"
    )
    for name in ("coco_mini", "car_parts", "weights/mobilenet_v2_tf2ptq.pth")
}


def test_preset_lvis_with_an_eva02(two_steps, few_val, tail, tmp_path, monkeypatch):
    """Scaled down: 16 x 16 tokens in windows of 4 x 4, four blocks of which the second and the
    fourth attend to all."""
    shallow(monkeypatch.setattr, 4, 96)
    read = two_steps(
        lambda: tail / "images" / "val" / "000000000001.jpg",
        root=tail,
        image_size=256,
        window=4,
        global_blocks=2,
        backbone="eva02_tiny_patch14_224",
        weights="none",
        checkpointing=True,
        width=16,
        embed_size=28,
    )
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert (settings["drop_path"], settings["federated"], settings["lr"], settings["repeat"]) == (
        0.3,
        50,
        4e-5,
        0.001,
    )
    assert (
        settings["layer_decay"] == 0.8
        and settings["frequency"] == "file"
        and settings["scale"] == [0.1, 2.0]
    )
    assert read["supervised"]["last"].keys() == set(SCORES)
    net = weights(tmp_path / "out" / "last.pt")["teacher"]
    assert net["backbone.proj.weight"].shape == (96, 3, 16, 16) and net[
        "backbone.pos_embed"
    ].shape == (1, 96, 16, 16)
    assert content(tmp_path / "out" / "prototypes.pt")["prototypes"].shape == (12, 96)


def test_preset_coco_with_crowds(two_steps, few_val, tmp_path):
    """COCO's AP, run lengths, ids that are no places; crowds are no objects."""
    root = shapes.make_coco(tmp_path / "coco", 6, 4)
    read = two_steps(
        lambda: next((root / "images" / "val").iterdir()),
        dataset="coco",
        root=root,
        split="all",
        unlabeled=root / "images" / "train",
        backbone="test_resnet",
        weights=STARTS["weights"],
    )
    record = read["teacher"]["last"]
    assert record.keys() == {"stats" if k == "stats" else k for k in SCORES} - {
        "ar_s",
        "ar_m",
        "ar_l",
    }
    assert list(record["per_class"]) == sorted(shapes.INSTANCE_CLASSES)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert settings["federated"] == 0 and settings["frequency"] == "subset"
    assert {r["category_id"] for r in found_by(tmp_path / "out", "teacher")} <= {
        1 + 7 * c // 2 for c in range(24)
    }


@needs["coco_mini"]
def test_coco_pictures(two_steps, few_val, tmp_path):
    flags = instance_runs.with_crowds(TEST_DATA / "coco_mini", tmp_path / "list.txt")
    read = two_steps(**flags, backbone="test_resnet", weights=STARTS["weights"])
    found = read["student"]["last"]["per_class"]
    assert len(found) == 80 and None in found.values()


@needs["car_parts"]
@needs["weights/mobilenet_v2_tf2ptq.pth"]
def test_pictures_in_the_layout_of_lvis_with_imagenet_weights(two_steps, few_val, tmp_path):
    root, file = TEST_DATA / "car_parts", TEST_DATA / "weights" / "mobilenet_v2_tf2ptq.pth"
    read = two_steps(
        lambda: next((root / "images").glob("te*.jpg")),
        root=root,
        backbone="mobilenet_v2",
        weights=file,
    )
    assert (
        len(read["supervised"]["last"]["per_class"]) == 13
        and read["supervised"]["last"]["apr"] is None
    )
    assert content(tmp_path / "out" / "prototypes.pt")["prototypes"].shape == (13, 1280)


# -------------------------------------------------------------------------------------------- flags
def test_help_shows_every_flag_with_the_presets_numbers(typed):
    for dataset, number in (
        ("lvis", "15000"),
        ("coco", "datasets/coco"),
        ("shapes", "test_resnet"),
    ):
        said = typed(["--dataset", dataset, "--help"]).ok().out
        assert (
            all(f"--{name.replace('_', '-')}" in said for name in vars(bp.Args()))
            and number in said
        )


def targets(short, **flags) -> torch.Tensor:
    """What becomes of the labels (C, C) in a run of one step."""
    return short(stage="teacher", teacher_steps=1, **flags).teacher.classes.targets


ONE = torch.eye(12)


def test_smoothing(short):
    """Fig. 2, Eqs. 2 and 3: nothing; all classes alike; similar ones; and rare ones more."""
    found = {
        kind: targets(short, smoothing=kind, **({} if kind == "none" else dict(eps=0.2)))
        for kind in ("none", "uniform", "similarity", "similarity+freq")
    }
    counts = (
        short(stage="prototypes").out
        and short(stage="teacher", teacher_steps=1).teacher.classes.instances
    )
    there = counts > 0
    assert torch.equal(found["none"], ONE) and 6 < there.sum() < 12
    want = 0.8 * ONE + 0.2 * (there / there.sum())
    assert torch.allclose(found["uniform"][there], want[there])
    for kind in ("uniform", "similarity", "similarity+freq"):
        assert (
            torch.allclose(found[kind][there].sum(1), torch.ones(int(there.sum())))
            and not found[kind][:, ~there][there].any()
        )
    plain, rare = (
        (found[k] - 0.8 * ONE)[there][:, there] for k in ("similarity", "similarity+freq")
    )
    assert (
        torch.allclose(plain, plain.T, atol=0.01) and (plain - 0.2 / there.sum()).abs().max() > 1e-4
    )
    few, many = counts[there] == counts[there].min(), counts[there] == counts[there].max()
    assert (
        rare[:, few].mean() > plain[:, few].mean() and rare[:, many].mean() < plain[:, many].mean()
    )


TARGETS = {
    "literal": dict(convention="literal"),
    "tau": dict(sim_tau=0.02),
    "gamma": dict(gamma=0.2),
    "eps": dict(eps=0.3),
    "few": dict(proto_per_class=1),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_change_with(short, name):
    base, found = targets(short), targets(short, **TARGETS[name])
    assert not torch.allclose(base, found, atol=1e-7)
    soft, was = found - (0.7 if name == "eps" else 0.9) * ONE, base - 0.9 * ONE
    if name == "literal":
        assert torch.allclose(soft, was.T)
    if name == "tau":
        assert soft.max() > 2 * was.max() and (soft > 1e-4).sum() < (was > 1e-4).sum()  # sharper
    if name == "eps":
        assert torch.allclose(soft / 3, was, atol=1e-6)


def test_prototypes_of_few_objects_and_of_an_eva02(trained, tail, tmp_path, monkeypatch):
    """So many of a class at most; the EVA-02's are of its own width."""
    made = {}
    for name, flags in {"all": {}, "few": dict(proto_per_class=2)}.items():
        train(tail, tmp_path / name, stage="prototypes", **flags)
        made[name] = content(tmp_path / name / "prototypes.pt")
    embedded = made["all"]["embedded"]
    assert torch.equal(made["few"]["embedded"], embedded.clamp(max=2)) and embedded.max() > 2
    shallow(monkeypatch.setattr, 2)
    train(tail, tmp_path / "eva", stage="prototypes", global_blocks=1, **EVA)
    found = content(tmp_path / "eva" / "prototypes.pt")
    assert found["prototypes"].shape == (12, 48) and torch.equal(found["embedded"], embedded)
    assert found["prototypes"][found["embedded"] > 0].std(0).max() > 1e-4


def spied_losses(monkeypatch) -> list[tuple[torch.Tensor, ...]]:
    """What `sigmoid_loss` gets: logits, targets and known classes of the regions."""
    seen = []
    monkeypatch.setattr(
        bp, "sigmoid_loss", lambda *args, real=bp.sigmoid_loss: (seen.append(args), real(*args))[1]
    )
    return seen


def test_federated_loss(short, monkeypatch):
    """--federated 3: an image teaches its own classes and others, up to three; 0: all that have an
    image."""
    seen, known, real = spied_losses(monkeypatch), [], bp.known_classes

    def spied(objects, *args):
        known.append((real(objects, *args), [o.labels for o in objects]))
        return known[-1][0]

    monkeypatch.setattr(bp, "known_classes", spied)
    run = short(stage="teacher", teacher_steps=1, teacher_batch_size=4, federated=3)
    has_images = run.teacher.classes.images > 0
    ((rows, labels),) = known
    for row, mine in zip(rows, labels, strict=True):
        assert row[mine].all() and not row[~has_images].any()
        assert row.sum() == max(3, len(set(mine.tolist()))) < 12
    assert len(seen) == 3 and all(0 < taught.float().mean() < 1 for _, _, taught in seen)
    seen.clear()
    short(stage="teacher", teacher_steps=1, federated=0)
    assert len(seen) == 3 and all(taught.all() for *_, taught in seen)


def test_pseudo_labels_teach_all_classes_that_they_speak_of(short, monkeypatch, trained):
    calls = []

    def spied(objects, counts, *args, real=bp.known_classes):
        calls.append((real(objects, counts, *args), objects, counts))
        return calls[-1][0]

    monkeypatch.setattr(bp, "known_classes", spied)
    short(
        stage="student",
        pseudo="soft",
        teacher=trained / "teacher.pt",
        steps=3,
        batch_size=4,
        federated=1,
    )
    spoken = []
    for rows, objects, counts in calls[1::2]:  # labeled and unlabeled images take turns
        for row, o in zip(rows, objects, strict=True):
            if len(o.labels):
                spoken.append((o.probs > 0).any(0) & (counts > 0))
                assert torch.equal(row, spoken[-1])
    assert spoken and max(row.sum() for row in spoken) > 1


def test_student_that_knows_a_class_which_its_teacher_did_not(trained, tail, short, tmp_path):
    """The teacher's pictures had no object of it; the student's have: it is learned, so it must be
    found."""
    data = instances.find("lvis", tail)
    with_it = [p for p in data.train if 3 in singles(p)]
    (tmp_path / "without.txt").write_text(
        "".join(f"{p.name}\n" for p in data.train if p not in with_it)
    )
    first = short(
        stage="teacher", split=tmp_path / "without.txt", teacher_steps=1, smoothing="uniform"
    )
    assert with_it and not first.teacher.student.heads.learned[3]
    run = short(
        stage="student",
        pseudo="soft",
        teacher=first.out / "teacher.pt",
        split="all",
        smoothing="uniform",
        steps=1,
        unlabeled=tail / "images" / "val",
    )
    assert run.student.classes.images[3] > 0
    for net in (run.student.student, run.student.teacher):  # which follows it
        assert net.heads.learned[3], "its scores stay zero for ever"


def test_frequency_of_the_file_or_of_the_labeled_pictures(finished, tail):
    data = instances.find("lvis", tail)
    assert (
        state(finished(stage="teacher", frequency="file") / "teacher.pt")["groups"]
        == data.frequency
    )
    groups = state(finished(stage="teacher") / "teacher.pt")["groups"]
    assert groups != data.frequency and set(groups) == set("rcf")
    a, b = (
        results(finished(stage="teacher", **f))["supervised"]["last"]
        for f in (dict(frequency="file"), {})
    )
    assert a["ap"] == b["ap"] == a["apr"] and a["apf"] is None is not b["apf"]


@pytest.mark.parametrize("name", ["teacher.pt", "last.pt", "best.pt"])
def test_init_detector_of_a_run(finished, trained, tail, tmp_path, name):
    """All of it; of two networks the teacher's."""
    file = finished() / name
    train(
        tail,
        tmp_path / "out",
        stage="teacher",
        init_detector=file,
        lr=0.0,
        weight_decay=0.0,
        **LATE,
    )
    there = weights(file)
    want = there.get("teacher", there.get("supervised"))
    assert apart(weights(tmp_path / "out" / "teacher.pt")["supervised"], want) == 0


def test_init_detector_with_other_classes_says_what_did_not_fit(finished, line, typed, tmp_path):
    root = shapes.make_coco(tmp_path / "coco", 6, 2)
    said = typed(line(data=root, dataset="coco", stage="teacher", split="all", **LATE)).ok().out
    fresh = re.search(r"weights of another shape, left fresh \((\d+)\): (.*)", said)
    assert (
        int(fresh[1]) == 9
        and "heads.boxes.0.classes.weight" in fresh[2]
        and "heads.learned" in fresh[2]
    )
    assert "heads.mask.masks.bias" in fresh[2]


def test_labels_of_the_student(short, monkeypatch, trained):
    """Labeled images teach smoothed labels, unless --student-labels onehot; one-hot pseudo labels
    are not smoothed."""
    seen = spied_losses(monkeypatch)

    def soft() -> list[bool]:  # of each call, whether a target is between
        return [bool(((t > 0) & (t < 0.99)).any()) for _, t, _ in seen]

    student = dict(
        stage="student",
        pseudo="onehot",
        teacher=trained / "teacher.pt",
        steps=1,
        batch_size=4,
        federated=0,
    )
    for flags, want in (({}, True), (dict(student_labels="onehot"), False)):
        seen.clear()
        short(**student, **flags)
        assert set(soft()[:3]) == {want} and not any(soft()[3:]) and len(seen) == 6


def test_filters_of_pseudo_labels(short, monkeypatch, trained):
    """--threshold, of the raw scores, and --size-threshold."""
    found, real = {}, bp.pseudo_labels

    def seen(teacher, weak, delta, args):
        objects, log = real(teacher, weak, delta, args)
        found[name].extend(objects)
        return objects, log

    monkeypatch.setattr(bp, "pseudo_labels", seen)
    base = dict(
        stage="student",
        teacher=trained / "teacher.pt",
        steps=2,
        batch_size=4,
        lr=0.0,
        pseudo="soft",
    )
    delta = {"classes": list(shapes.TAIL_CLASSES), "delta": [-0.03] * 12}
    (trained / "minus.json").write_text(json.dumps(delta))
    flags = {
        "base": {},
        "high": dict(threshold=0.3),
        "large": dict(size_threshold=300.0),
        "raw": dict(pseudo="calibrated", calibration=trained / "minus.json"),
    }
    for name, more in flags.items():
        found[name] = []
        short(**base | more)
    conf = {k: torch.cat([o.probs.amax(1) for o in v]) for k, v in found.items()}
    area = {k: torch.cat([o.masks.sum((1, 2)) for o in v]) for k, v in found.items()}
    assert (
        conf["base"].min() >= 0.2
        and 0 < len(conf["high"]) < len(conf["base"])
        and conf["high"].min() >= 0.3
    )
    assert (
        area["base"].min() > 5
        and len(area["large"]) < len(area["base"])
        and (area["large"] > 300).all()
    )
    assert len(conf["raw"]) == len(conf["base"]) and conf["raw"].min() < 0.2


def test_weight_of_the_unlabeled_loss(short, monkeypatch, trained):
    """The gradient is that of the labeled loss, and so much of the other's."""
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        run = short(
            stage="student",
            pseudo="soft",
            teacher=trained / "teacher.pt",
            steps=1,
            unsup_weight=weight,
        )
        gradients[weight] = {
            k: p.grad for k, p in run.student.student.named_parameters() if p.grad is not None
        }
    for k, g in gradients[3.0].items():
        want = gradients[0.0][k] + 3 * (gradients[1.0][k] - gradients[0.0][k])
        assert torch.allclose(g, want, rtol=1e-3, atol=1e-5), k
    assert apart(gradients[0.0], gradients[1.0]) > 1e-3


def test_repeat_factors_and_schedules(short, monkeypatch):
    factors, real = [], bp.repeat_factors
    monkeypatch.setattr(
        bp, "repeat_factors", lambda *args: (factors.append(real(*args)), factors[-1])[1]
    )
    for repeat in (0.0, 0.9):
        short(stage="teacher", teacher_steps=1, repeat=repeat)
    assert (factors[0] == 1).all() and factors[1].max() > 1.5
    rates = [
        [
            g["lr"]
            for g in short(stage="teacher", teacher_steps=4, **flags).teacher.optimizer.param_groups
        ]
        for flags in (dict(schedule="constant"), {}, dict(layer_decay=0.1))
    ]
    assert rates[0] == pytest.approx([1e-3, 5e-4]) and rates[2][1] == pytest.approx(
        rates[2][0] / 10
    )
    assert rates[1][0] == pytest.approx(1e-3 * (0.5 + 0.5 * np.cos(0.75 * np.pi)))


def test_checkpointing_and_windows_of_an_eva02(short, monkeypatch):
    """Same gradients in less memory, also under drop path; windows and drop path change what is
    seen."""
    shallow(monkeypatch.setattr, 2)
    found = {}
    for name, flags in {
        "plain": {},
        "again": dict(checkpointing=True),
        "window": dict(window=4, global_blocks=1),
        "whole": dict(global_blocks=2),
        "drop": dict(drop_path=0.9),
    }.items():
        more = dict(
            global_blocks=1,
            drop_path=0.3,
            stage="teacher",
            teacher_steps=1,
            smoothing="none",
            embed_size=None,
        )
        run = short(**EVA | more | flags)
        found[name] = {
            k: p.grad for k, p in run.teacher.student.named_parameters() if p.grad is not None
        }
    assert apart(found["plain"], found["again"]) == 0
    assert all(apart(found["plain"], found[k]) > 1e-6 for k in ("window", "whole", "drop"))


# ------------------------------------------------------------------------------------------- errors
SMALL = dict(pool="x", retrieval_model="test_resnet", retrieval_weights="none")


REFUSED = [  # flags, what the sentence names
    *(
        ({k: v}, f"--{k.replace('_', '-')} ")
        for k, v in dict(
            eps=1.5,
            ema=1.5,
            threshold=-0.1,
            image_size=16,
            width=4,
            fc=4,
            scale=(2, 1),
            eval_every=0,
            log_every=0,
            save_every=-1,
            lr="nan",
            weight_decay=-1,
            clip=-1,
            seed=-1,
            workers=-1,
            unsup_weight=-1,
            size_threshold="inf",
            holdout=0,
            prior=0.9,
            sim_tau=0,
            repeat=2,
            accumulate=0,
            steps=0,
            teacher_steps=0,
            bins=0,
            proposals=0,
            roi_batch=0,
            rpn_batch=0,
            detections=0,
            proto_per_class=0,
            gamma=-1,
            shrink=-1,
            layer_decay=2,
            warmup=-1,
            federated=-1,
            lambda_calib=-1,
            embed_size=3,
            head_convs=0,
            anchor_scale=0,
        ).items()
    ),
    (dict(image_size=80), "--image-size 80"),
    (dict(accumulate=3), "--accumulate 3"),
    (dict(batch_size=0), "batch"),
    (dict(accumulate=2, norm="live"), "--norm frozen"),
    (dict(norm="live", batch_size=1), "batch"),
    (EVA | dict(window=3), "--image-size 64"),
    (dict(stage="student"), "--teacher"),
    (dict(stage="student", teacher="x.pt"), "--calibration"),
    (dict(stage="retrieve"), "--pool"),
    (dict(split="1", tune=True, pseudo="soft"), "held out"),
    (dict(grid="student"), "--teacher"),
    (dict(grid="teacher", stage="teacher"), "--stage"),
    (dict(pool="x", unlabeled="y"), "--pool "),
]


REFUSED += [  # what is not there, or no good
    (dict(root="text"), "there is no folder"),
    (dict(root="nowhere"), "data/README.md"),
    (dict(dataset="shapes", root="text", frequency=None), "text"),
    (dict(train_json="no.json"), "--train-json no.json"),
    (dict(val="nonsense"), "nonsense"),
    (dict(val_json="no.json"), "--val-json no.json"),
    (dict(images="no"), "--images no"),
    (dict(out="text"), "--out"),
    (dict(split="nonsense"), "--split nonsense"),
    (dict(split="random:0"), "--split random:0"),
    (dict(split="random:99"), "--split random:99"),
    (dict(split="list"), "nobody.jpg"),
    (dict(split="all"), "no unlabeled image"),
    (dict(unlabeled="no"), "--unlabeled no"),
    (dict(unlabeled="empty"), "no images"),
    (dict(device="tpu"), "--device tpu"),
    (dict(train_json="train.json"), "has no object"),
    (dict(val_json="val.json"), "has no object"),
    *(
        ({flag: f"{name}.json"}, said)
        for flag in ("train_json", "val_json")
        for name, said in instance_runs.NO_ANNOTATIONS.items()
    ),
]


TEXTS = instance_runs.TEXTS | {
    "classes.json": '{"classes": ["a"], "delta": [0.1]}',
    "short.json": '{"classes": ["a", "b"], "delta": [0.1]}',
}


@pytest.fixture
def texts(tail, tmp_path, monkeypatch) -> None:
    """Files that are no good, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    altered(tail, tmp_path, lambda read: read["annotations"].clear())


@pytest.mark.parametrize("flags, said", REFUSED, ids=words)
def test_refused_before_any_work(line, typed, texts, tmp_path, flags, said):
    """In one sentence, and nothing is written."""
    flags = dict(flags)
    error = typed(line(**{"data": flags.pop("root")} if "root" in flags else {}, **flags)).error()
    assert said in error and not list(tmp_path.glob("out/[!.]*")), error


LATER = [  # what is found when networks, prototypes or labels are needed
    (dict(backbone="nonsense"), "nonsense"),
    (EVA | dict(backbone="eva02_nonsense"), "eva02_nonsense"),
    (dict(backbone="alexnet"), "alexnet"),
    (dict(weights="no.pth"), "--weights no.pth"),
    (dict(weights="text"), "--weights text"),
    (dict(backbone="mobilenet_v2", weights="shapes"), "mobilenet_v2"),
    (EVA | dict(weights="no.pth"), "no.pth"),
    (EVA | dict(weights="text"), "text"),
    (EVA | dict(global_blocks=5), "--global-blocks 5"),
    (dict(init_detector="no.pth"), "--init-detector no.pth"),
    (dict(init_detector="text"), "--init-detector text"),
    *(
        (SMALL | dict(pool=name), said)
        for name, said in dict(no="--pool no", empty="--pool empty", list="nobody.jpg").items()
    ),
    *(
        (SMALL | {"pool": "POOL", k: v}, v)
        for k, v in dict(
            retrieval_model="nonsense", retrieval_weights="no.pth", index="IVF0"
        ).items()
    ),
    (dict(stage="student", pseudo="soft", teacher="no.pt"), "no.pt"),
    (dict(stage="student", pseudo="soft", teacher="text"), "text"),
    *(
        (
            dict(stage="student", teacher="TEACHER", calibration=f"{name}.json"),
            f"--calibration {name}.json",
        )
        for name in ("no", "torn", "numbers", "classes", "short")
    ),
    (dict(stage="student", pseudo="soft", teacher="TEACHER", width=16), "--width"),
    (
        dict(
            stage="student",
            pseudo="soft",
            teacher="TEACHER",
            backbone="resnet18",
            init_detector="",
            weights="none",
        ),
        "--backbone",
    ),
]


@pytest.mark.parametrize("flags, said", LATER, ids=words)
def test_refused_when_it_is_needed(trained, pool, line, typed, texts, tmp_path, flags, said):
    places = {"TEACHER": trained / "teacher.pt", "POOL": pool}
    more = dict(frequency="file") if "pool" in flags else {}
    error = typed(
        line(**more, **{k: places.get(v, v) if isinstance(v, str) else v for k, v in flags.items()})
    ).error()
    assert said in error and {p.name for p in tmp_path.glob("out/*.pt")} <= {"prototypes.pt"}, error


@pytest.mark.parametrize(
    "flags",
    [
        dict(teacher="no.pt"),
        dict(calibration="no.json"),
        dict(calibration="torn.json"),
        dict(calibration="classes.json"),
        dict(teacher="OTHER", pseudo="soft"),
        dict(init_detector="no.pt", smoothing="none"),
    ],
    ids=words,
)
def test_files_are_looked_at_before_a_network_is_trained(
    trained, line, typed, texts, tmp_path, monkeypatch, flags
):
    """Not after the first one has learned for a day."""
    if flags.get("teacher") == "OTHER":
        read = torch.load(trained / "teacher.pt", weights_only=True)
        torch.save(read | {"classes": ["a", "b"]}, tmp_path / "OTHER")
    trainings = []
    monkeypatch.setattr(
        bp, "train_step", lambda *args, real=bp.train_step: (trainings.append(1), real(*args))[1]
    )
    error = typed(line(**flags)).error()
    assert not trainings and str(next(iter(flags.values()))) in error


@pytest.mark.parametrize(
    "flags, mended",
    [
        (dict(weights="no.pth"), "weights"),
        (dict(backbone="nonsense"), "backbone"),
        (dict(stage="student", pseudo="soft", teacher="no.pt"), "teacher"),
    ],
    ids=words,
)
def test_mended_command_runs_in_the_same_folder(trained, line, typed, texts, flags, mended):
    """What stopped before it trained is no run that --resume must continue."""
    typed(line(**flags, **LATE)).error()
    good = {
        "weights": STARTS["weights"],
        "backbone": "test_resnet",
        "teacher": trained / "teacher.pt",
    }
    typed(line(**flags | {mended: good[mended]}, **LATE)).ok()


def test_pool_without_a_rare_class_or_without_a_neighbour(line, typed, tail, tmp_path):
    """Nothing to search with; nothing found that is not known already."""
    search = dict(stage="retrieve", retrieval_model="test_resnet", retrieval_weights="none")
    rich = altered(
        tail, tmp_path, lambda read: [kind.update(frequency="f") for kind in read["categories"]]
    )
    flags = dict(pool=tail / "images" / "val", frequency="file") | rich
    assert "rare" in typed(line(tmp_path / "a", **flags, **search)).error()
    flags = dict(pool=tail / "images" / "train", frequency="file") | search
    error = typed(line(tmp_path / "b", **flags)).error()
    assert "--pool" in error and "labeled" in error
    error = typed(line(tmp_path / "c", **flags | dict(stage="all", pseudo="soft"))).error()
    assert "--pool" in error and not list((tmp_path / "c").glob("teacher.pt"))


def test_few_labels_have_rare_classes_to_search_with(line, typed, tail, tmp_path):
    """--frequency subset: a class without a labeled object is none of the rarest third of those
    that have some."""
    typed(
        line(
            pool=tail / "images" / "val",
            stage="retrieve",
            retrieval_model="test_resnet",
            retrieval_weights="none",
            train_json=part(tail, "train"),
            val_json=part(tail, "tune"),
            duplicate=1.0,
        )
    ).ok()
    assert json.loads((tmp_path / "out" / "retrieved.json").read_text())["classes"]


def test_checkpoints_and_pictures_that_cannot_be_used(trained, copy, typed, tmp_path):
    instance_runs.assert_cannot_be_used(typed, trained, copy, tmp_path, "supervised")
    root = shapes.make_coco(tmp_path / "coco", 3, 2)
    assert (
        "classes"
        in typed(
            ["--eval", str(copy / "best.pt"), "--root", str(root), "--val", "val", *HERE]
        ).error()
    )
    assert "best.pt" in typed(["--eval", str(copy / "best.pt"), "--width", "16", *HERE]).error()


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(
    line, typed, trained, tmp_path, stage
):
    """In the teacher's stage, and in the student's, whose teacher is good."""
    more = dict(teacher=trained / "teacher.pt", pseudo="soft", steps=20)
    more = dict(teacher_steps=20) if stage == "teacher" else more
    error = typed(line(lr=1e14, save_every=1, stage=stage, **more, **LATE)).error()
    step, saved = instance_runs.not_finite_since(error, tmp_path / "out")
    assert 0 < saved <= step + 1 < 20


def test_weights_that_cannot_be_had(line, typed, tmp_path, monkeypatch):
    instance_runs.offline(monkeypatch)
    for n, (backbone, more) in enumerate(
        {"resnet18": {}, "eva02_tiny_patch14_224": dict(norm=None, window=2)}.items()
    ):
        for smoothing in ("none", "similarity"):
            error = typed(
                line(
                    tmp_path / f"{n}{smoothing}",
                    backbone=backbone,
                    weights="imagenet",
                    init_detector="",
                    smoothing=smoothing,
                    stage="teacher",
                    **more,
                )
            ).error()
            assert backbone in error and "file" in error.lower() and "none" in error


# -------------------------------------------------------------------------------------------- a GPU
@pytest.mark.parametrize(
    "flags",
    [
        {},
        dict(batch_size=4, teacher_batch_size=4, accumulate=2, pseudo="soft"),
        dict(EVA, federated=4, repeat=0.5, global_blocks=1),
    ],
    ids=str,
)
def test_nothing_mixes_devices(line, tmp_path, flags):
    """On an accelerator that is pretended, with the CPU's values: the same run, but for the order
    of sums in a ViT."""
    two_blocks = partial(shallow, setattr, 2)  # one attends within windows, one everywhere
    for name, setup in (("near", ()), ("far", (partial(pretend.count, NAME, "train_step"),))):
        line_of = line(out=tmp_path / name, **flags)
        said = forked(line_of, tmp_path / "io", two_blocks, *setup).ok().out
    parts = flags.get("accumulate", 1)  # of 2 + 2 images, or less
    assert 0 < max(pretend.waits(said)) < 20 * parts, "waits for the GPU in a step"
    if "backbone" in flags:
        # of Adam
        assert apart(*(weights(tmp_path / name / "last.pt") for name in ("far", "near"))) < 2e-3
    else:
        assert_equal_runs(tmp_path / "far", tmp_path / "near")
        assert any(r.get("pseudo_per_image") for r in log_of(tmp_path / "far"))


def test_retrieval_evaluation_and_prediction_do_not_mix_devices(
    line, finished, searched, tail, tmp_path
):
    copy, found = Path(shutil.copytree(finished(), tmp_path / "copy")), []
    for name, setup in (("near", ()), ("far", (pretend.install,))):
        forked(
            line(out=tmp_path / name, stage="retrieve", **searched), tmp_path / "io", *setup
        ).ok()
        for flags in (["--eval"], ["--predict", str(tail / "images" / "val")]):
            forked(
                [flags[0], str(copy / "best.pt"), *flags[1:], *HERE], tmp_path / "io", *setup
            ).ok()
        found.append(
            [
                (copy / "best.pt.results.json").read_text(),
                (tmp_path / name / "retrieved.txt").read_text(),
                (copy / "best.pt.predictions" / "predictions.json").read_text(),
            ]
        )
    assert found[0] == found[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_run_evaluation_and_prediction_on_a_gpu(line, typed, tail, tmp_path):
    out = tmp_path / "out"
    typed(line(device="cuda", batch_size=4)).ok()
    typed(["--eval", str(out / "best.pt"), "--device", "cuda"]).ok()
    typed(
        ["--predict", str(out / "best.pt"), str(tail / "images" / "val"), "--device", "cuda"]
    ).ok()
    assert results(out)["student"]["last"]["step"] == 7 and "peak_gpu_gib" in log_of(out)[0]
