"""gist_rist.py from the command line: searches, shared nodes, processes, kills, errors, evaluation,
presets."""

import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pretend
import pytest
import torch
from helpers import (
    MISSING,
    REPO,
    TEST_DATA,
    Ran,
    Started,
    argv,
    assert_predicts,
    begin_ranks,
    differences,
    torchrun,
    until,
)
from PIL import Image

import gist_rist
from common.errors import UserError
from data import shapes

# a few steps after which nodes differ in what they predict, and Label Erase keeps a part of it
TINY = dict(
    weights="none",
    backbone="test_resnet",
    bn="live",
    lr=0.006,
    phi=0.3,
    temp=0.5,
    stage0_steps=6,
    steps=3,
    stages=2,
    eval_every=3,
    dev_size=4,
    batch_size=2,
    crop_size=(32, 32),
    resize=1,
    save_every=3,
    log_every=1,
    workers=0,
)


S4GAN = TEST_DATA / "splits" / "s4gan" / "voc"


# -------------------------------------------------------------------------------------------- tools
@pytest.fixture
def line(shapes_root, tmp_path):
    """line(...) -> a command line on a few shapes; run folder and store lie in tmp_path."""
    return partial(on_shapes, shapes_root, tmp_path)


def on_shapes(data: Path, folder: Path, **flags) -> list[str]:
    # a path has its own number
    flags = ({"stages": None} if flags.get("search") == "path" else {}) | flags
    return [
        "--dataset",
        "shapes",
        *argv(
            **{
                "root": data,
                "val": "few",
                "split": data / "labeled.txt",
                "unlabeled": data / "unlabeled.txt",
                **TINY,
                "out": folder / "out",
                "store": folder / "store",
                **flags,
            }
        ),
    ]


def quick(*more) -> None:
    """In a process of its own: no pictures, no TensorBoard, no git and no flushing, which take half
    of a tiny run's time; then what `more` changes."""
    from common import runs

    def touch(*args) -> None:
        args[-1].parent.mkdir(parents=True, exist_ok=True)
        args[-1].touch()

    sys.modules["torch.utils.tensorboard"] = None
    runs.commit, os.fsync = str, lambda number: None
    gist_rist.draw_tree = gist_rist.draw_curves = gist_rist.draw_masks = touch
    gist_rist.MIX_CONFIDENCE = 0.2  # a network of a few steps is never sure
    for change in more:
        change()


def begin(flags: list[str], io: Path, *setup, **more) -> Started:
    return helpers.begin(flags, io, partial(quick, *setup), name="gist_rist", **more)


def run(flags: list[str], io: Path, *setup, **more) -> Ran:
    return begin(flags, io, *setup, **more).wait()


def start_ranks(n: int, flags: list[str], io: Path, *setup) -> list[Started]:
    return begin_ranks(n, flags, io, partial(quick, *setup), name="gist_rist")


def end(every: list[Started]) -> list[Ran]:
    """All ended, and well."""
    return [done.ok() for done in [started.wait() for started in every]]


def folders(store: Path) -> dict[str, Path]:
    """key/path -> the folder of each finished node; stage 0 is its key alone."""
    return {str(p.parent.relative_to(store)): p.parent for p in store.glob("**/node.json")}


def paths(store: Path) -> set[str]:
    return {json.loads((f / "node.json").read_text())["path"] for f in folders(store).values()}


def stamps(store: Path) -> dict[str, int]:
    """When each node was finished, to see which ones a run trained."""
    return {name: (f / "node.json").stat().st_mtime_ns for name, f in folders(store).items()}


def trained(store: Path, before: dict[str, int]) -> set[str]:
    """The paths of the nodes that were finished since; `before`: their stamps then."""
    new = {name for name, stamp in stamps(store).items() if before.get(name) != stamp}
    return {"" if name.startswith("stage0-") else name.split("/")[1] for name in new}


def facts(store: Path) -> dict[str, dict]:
    """What every node found, without the clock: record, scores and predictions."""
    found = {}
    for name, folder in folders(store).items():
        record = json.loads((folder / "node.json").read_text())
        record.pop("seconds")
        with np.load(folder / "scores.npz") as scores:
            found[name] = record | {k: torch.from_numpy(v) for k, v in scores.items()}
    return found


def records(store: Path) -> dict[str, dict]:
    """path -> node.json, of a store that holds the nodes of one key."""
    found = [json.loads((f / "node.json").read_text()) for f in folders(store).values()]
    assert len({r["path"] for r in found}) == len(found)
    return {r["path"]: r for r in found}


def fingerprints(store: Path) -> dict[str, str]:
    return {path: record["weights"] for path, record in records(store).items()}


def results(out: Path) -> dict:
    """results.json without the clock and the places."""
    read = json.loads((out / "results.json").read_text())
    return {
        k: Path(v).name if k in ("stage0_folder", "nodes") else v
        for k, v in read.items()
        if k not in ("seconds", "images_per_second")
    }


def student(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["networks"]["student"]


def kept(store: Path) -> set[str]:
    """The paths whose weights are there."""
    return {
        p
        for p in paths(store)
        for f in folders(store).values()
        if (f / "weights.pt").exists() and json.loads((f / "node.json").read_text())["path"] == p
    }


def litter(store: Path) -> list[str]:
    """What no finished run should leave behind."""
    left = [
        p for p in store.rglob("*") if p.name.endswith(".tmp") or p.name in ("last.pt", "best.pt")
    ]
    return [str(p.relative_to(store)) for p in left]


def labeled_by(store: Path) -> set[str]:
    """The paths of the nodes whose pseudo labels are there."""
    return {p.name.removeprefix("labels-") for p in store.glob("*/labels-*")}


def assert_equal_runs(folder: Path, reference: Path) -> None:
    """All nodes, the selection and best.pt are equal, bit by bit."""
    wrong = differences(facts(folder / "store"), facts(reference / "store"))
    assert not wrong, wrong[:5]
    assert results(folder / "out") == results(reference / "out")
    wrong = differences(student(folder / "out" / "best.pt"), student(reference / "out" / "best.pt"))
    assert not wrong, wrong[:5]


def at_call(where: str, nth: int, number: int, after: bool = False) -> None:
    """In a process of its own: it gets signal `number` at the n-th call of `where` (module:name),
    or after it."""
    module, _, name = where.partition(":")
    owner = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, last), itertools.count(1)

    def stopping(*args, **keywords):
        now = next(calls) == nth
        if now and not after:
            os.kill(os.getpid(), number)
        value = real(*args, **keywords)
        if now and after:
            os.kill(os.getpid(), number)
        return value

    setattr(owner, last, stopping)


@pytest.fixture(scope="module")
def finished(shapes_root, tmp_path_factory):
    """finished(...) -> the folder of a finished run with these flags (out, store), undisturbed;
    made once. GIST and RIST where no search is named. `beside`: the flags of runs that are made at
    the same time."""
    made = {}

    def make(beside: Iterable[dict] = (), **flags) -> Path:
        started = []
        for each in (flags, *beside):
            key = json.dumps(each, sort_keys=True, default=str)
            if key not in made:
                made[key] = tmp_path_factory.mktemp("finished")
                started.append(begin(on_shapes(shapes_root, made[key], **each), made[key] / "io"))
        end(started)
        return made[json.dumps(flags, sort_keys=True, default=str)]

    return make


@pytest.fixture
def copied(finished, tmp_path):
    """copied(...) -> a copy of the store of such a run, in tmp_path."""
    return lambda **flags: Path(shutil.copytree(finished(**flags) / "store", tmp_path / "store"))


# -------------------------------------------------------------------------------------------- a run
def test_a_run_end_to_end(line, tmp_path, io):
    out, store = tmp_path / "out", tmp_path / "store"
    done = helpers.run(line(), io, name="gist_rist").ok()  # with pictures
    assert str(out) in done.out and "miou" in done.out
    assert {p.name for p in out.iterdir() if p.name != ".lock"} == {
        "config.json",
        "results.json",
        "log.jsonl",
        "report.md",
        "tree.png",
        "curves.png",
        "previews",
        "best.pt",
    }
    for picture in (out / "tree.png", out / "curves.png", *(out / "previews").iterdir()):
        with Image.open(picture) as image:
            assert min(image.size) > 100
    found, config = results(out), json.loads((out / "config.json").read_text())
    for name in ("stage0", "gist", "rist"):
        assert {"path", "stage", "dev", "miou", "iou", "step"} <= found[name].keys()
        assert found[name]["stage"] == len(found[name]["path"])
        present = [v for v in found[name]["iou"].values() if v is not None]
        assert len(found[name]["iou"]) == 7 and np.mean(present) == pytest.approx(
            found[name]["miou"], abs=1e-3
        )
    assert found["stage0"]["path"] == "" and found["stage0"]["step"] in (3, 6)
    assert {
        "dataset",
        "split",
        "split_seed",
        "split_fingerprint",
        "seed",
        "dev_size",
        "visited",
    } <= found.keys()
    assert json.loads((out / "results.json").read_text())["seconds"] > 0
    assert (
        config["script"] == "gist_rist.py"
        and config["settings"]["temp"] == 0.5
        and "8 labeled" in config["images"]
    )
    nodes = records(store)
    logged = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    assert {r["path"]: r for r in logged} == nodes and len(logged) == len(nodes)
    assert set(nodes) == set(found["visited"]["gist"]) | set(found["visited"]["rist"])
    report = (out / "report.md").read_text()
    assert all(f"| {path or 'stage 0'} |" in report for path in nodes)
    best = {
        name: min(found["visited"][name], key=lambda p: (-nodes[p]["dev"]["4"], len(p), p))
        for name in ("gist", "rist")
    }
    assert best == {name: found[name]["path"] for name in best}
    top = min(best.values(), key=lambda p: (-nodes[p]["dev"]["4"], len(p), p))
    assert gist_rist.fingerprint(student(out / "best.pt")) == nodes[top]["weights"]
    for path, folder in ((r["path"], folders(store)[name]) for name, r in facts(store).items()):
        log = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in log if "loss" in r] == list(range(1, 4 if path else 7))
        assert json.loads((folder / "config.json").read_text())["path"] == path
        assert not path or nodes[path]["parent"] == nodes[path[:-1]]["weights"]
    assert len({r["weights"] for r in nodes.values()}) == len(nodes)
    assert len({r["dev"]["4"] for r in nodes.values()}) > 3, (
        "nodes that predict the same show nothing"
    )
    assert 0 < nodes["P"]["labels"]["kept"] < 1, (
        "Label Erase that keeps nothing or all shows nothing"
    )


ALL = dict(search=("gist", "rist", "fist"), beam=2)


SEARCHES = {
    "fist, several": (
        dict(search="fist", alpha=(0, 0.25, 1)),
        {"fist 0": ["P", "PP"], "fist 0.25": ["F0.25", "F0.25F0.25"], "fist 1": ["L", "LL"]},
    ),
    "path": (
        dict(search="path", path=("PL", "LLP", "F0.5B")),
        {"path": ["P", "PL", "L", "LL", "LLP", "F0.5", "F0.5B"]},
    ),
    "beam of two": (
        ALL,
        {"gist": ["L", "P", "LL", "LP", "PL", "PP"], "fist": ["F0.75", "F0.75F0.75"]},
    ),
    "all at once": (
        dict(search=("fist", "gist", "rist", "batchwise", "path"), path="P", trials=1),
        {"fist": ["F0.75", "F0.75F0.75"], "batchwise": ["B", "BB"], "path": ["P"]},
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_search_visits_its_nodes_and_no_others(finished, name):
    flags, expected = SEARCHES[name]
    folder = finished(beside=[flags for flags, _ in SEARCHES.values()], **flags)
    found = results(folder / "out")
    for search, visited in expected.items():
        assert sorted(found["visited"][search]) == sorted(["", *visited])
        nodes = {p: records(folder / "store")[p] for p in found["visited"][search]}
        assert found[search]["dev"] == max(r["dev"]["4"] for r in nodes.values())
        assert (
            found[search]["path"] in nodes
            and found[search]["stage"] == nodes[found[search]["path"]]["stage"]
        )
    assert paths(folder / "store") == {p for visited in found["visited"].values() for p in visited}
    assert found["trainings"] == len(paths(folder / "store")) - 1


def test_no_stages_is_stage_0_alone(line, tmp_path, io):
    run(line(stages=0), io).ok()
    assert paths(tmp_path / "store") == {""} and results(tmp_path / "out")["gist"]["path"] == ""


def test_gist_keeps_the_better_child(finished):
    """Beam 1: the grandchildren's parent is the child with the higher score on the development
    images."""
    visited, nodes = results(finished() / "out")["visited"]["gist"], records(finished() / "store")
    winner = max("LP", key=lambda p: nodes[p]["dev"]["4"])
    assert nodes["L"]["dev"]["4"] != nodes["P"]["dev"]["4"]
    assert sorted(visited) == sorted(["", "L", "P", f"{winner}L", f"{winner}P"])


def test_rist_draws_its_paths_by_seed_and_trial(finished):
    """Nested in the number of trials; other seeds draw others."""

    def drawn(**flags) -> list[str]:
        return gist_rist.rist_paths(gist_rist.preset("shapes", stages=9, **flags))

    assert drawn(trials=2) == drawn(trials=20)[:2] and drawn(trials=2) != drawn(trials=2, seed=1)
    assert 0.4 < "".join(drawn(trials=200)).count("L") / 1800 < 0.6
    longest = [
        max(len(list(same)) for _, same in itertools.groupby(p))
        for p in drawn(trials=200, max_run=3)
    ]
    assert max(longest) == 3
    found = results(finished() / "out")["visited"]["rist"]
    drawn = gist_rist.rist_paths(gist_rist.preset("shapes", stages=2))
    assert set(found) == {path[:n] for path in drawn for n in range(3)}


def test_independent_trials_share_nothing(finished, tmp_path):
    folder = finished(search="rist", independent=True, trials=3, stages=1)
    found = fingerprints(folder / "store")
    assert len(found) == 4 and len(set(found.values())) == 4
    letters = [path[-1] for path in found if path]
    assert len(set(letters)) < 3, "all drawn apart show nothing"
    assert all(re.fullmatch(r"T[012][LP]", path) for path in found if path)


def test_winning_path_is_replayed_bit_by_bit(finished, line, tmp_path, io):
    """In a fresh store, where nothing else is trained; the best of the last stage, should stage 0
    be the winner."""
    found, nodes = results(finished() / "out"), records(finished() / "store")
    last = [p for p in found["visited"]["gist"] if len(p) == 2]
    best = found["gist"]["path"] or max(last, key=lambda p: nodes[p]["dev"]["4"])
    run(line(search="path", path=best), io).ok()
    alone, shared = (facts(folder / "store") for folder in (tmp_path, finished()))
    wrong = differences(alone, {name: shared[name] for name in alone})
    assert not wrong, wrong[:5]
    assert paths(tmp_path / "store") == {best[:n] for n in range(len(best) + 1)}
    chosen = results(tmp_path / "out")["path"]["path"]
    weights = gist_rist.fingerprint(student(tmp_path / "out" / "best.pt"))
    assert weights == nodes[chosen]["weights"]


def test_worker_processes_make_no_difference(finished, line, tmp_path, io):
    run(line(search="path", path="P", workers=2), io).ok()
    alone, shared = (facts(folder / "store") for folder in (tmp_path, finished()))
    assert not differences(alone, {name: shared[name] for name in alone})


def test_default_folders(line, tmp_path, io):
    flags = line(
        out=None, store=None, split="random:8", split_seed=3, seed=2, search="path", path="L"
    )
    run(flags, io, cwd=tmp_path).ok()
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "gist_rist-shapes-8-d3-s2",
        "gist_rist-nodes",
    }


# ------------------------------------------------------------------------------------------ sharing
def test_another_search_trains_new_nodes_only(line, copied, tmp_path, io):
    """Flags that choose nodes, or only keep the books: none of them trains a node twice."""
    store = copied(keep_nodes=True)
    old, before = paths(store), stamps(store)
    more = dict(log_every=2, save_every=1, workers=1, no_val_every_stage=True)
    run(line(search=("fist", "path", "rist"), alpha=(0, 1), path="PP", trials=3, **more), io).ok()
    assert {"LL", "PP"} <= paths(store) and trained(store, before) == paths(store) - old
    # one stage 0, one key of nodes
    assert len({name.split("/")[0] for name in folders(store)}) == 2


def test_the_same_run_again_trains_nothing(line, finished, copied, tmp_path, io):
    store = copied()
    before = stamps(store)
    run(line(), io).ok()
    assert not trained(store, before)
    assert_equal_runs(tmp_path, finished())


ABLATIONS = [dict(cl=0), dict(phi=0), dict(temp=1), dict(cl_on="both")]


def test_ablations_share_stage_0_but_neither_nodes_nor_pseudo_labels(line, copied, tmp_path, io):
    """At the same time, too."""
    store = copied(search="path", path="P", keep_nodes=True)
    (stage0,) = (name for name in folders(store) if name.startswith("stage0-"))
    before = stamps(store)
    end(
        [
            begin(
                line(
                    search="path", path="P", keep_nodes=True, out=tmp_path / words(flags), **flags
                ),
                io,
            )
            for flags in ABLATIONS
        ]
    )
    new = stamps(store).keys() - before.keys()
    assert trained(store, before) == {"P"} and len(new) == len(ABLATIONS)
    assert [name for name in folders(store) if name.startswith("stage0-")] == [stage0]
    assert len(list(store.glob("*/labels-"))) == len(ABLATIONS) + 1
    found = {name: f for name, f in facts(store).items() if name != stage0}
    assert len({f["weights"] for f in found.values()}) == len(ABLATIONS) + 1
    shares = {f["labels"]["kept"] for f in found.values()}
    assert len(shares) == 3 and 1.0 in shares  # phi 0 keeps all, temp 1 more than temp 0.5


def words(flags: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in flags.items())


def test_what_shapes_all_weights_shares_nothing(line, shapes_root, copied, tmp_path, io):
    store = copied(search="path", path="P")
    before = stamps(store)
    for name in ("labeled.txt", "unlabeled.txt"):
        (tmp_path / name).write_text(
            "".join((shapes_root / name).read_text().splitlines(keepends=True)[1:])
        )
    other = [
        dict(seed=1),
        dict(batch_size=4),
        dict(split=tmp_path / "labeled.txt"),
        dict(unlabeled=tmp_path / "unlabeled.txt"),
    ]
    end(
        [
            begin(line(search="path", path="P", out=tmp_path / str(i), **flags), io)
            for i, flags in enumerate(other)
        ]
    )
    assert trained(store, before) == {"", "P"} and len(stamps(store).keys() - before.keys()) == 8
    weights = {name: f["weights"] for name, f in facts(store).items()}
    same = {name for name in weights if list(weights.values()).count(weights[name]) > 1}
    # it takes no unlabeled images
    assert all(name.startswith("stage0-") for name in same) and len(same) == 2


def test_a_smaller_development_set_out_of_one_reserve_trains_no_refinement_again(
    line, copied, tmp_path, io
):
    """The key of nodes holds the reserve and the weights of stage 0; the key of stage 0 also the
    number of images that chose among its evaluations, here one."""
    store = copied(dev_reserve=8, eval_every=6)
    before = stamps(store)
    run(line(dev_reserve=8, eval_every=6, dev_size=3), io).ok()
    again = trained(store, before)
    found, nodes = results(tmp_path / "out"), facts(store)
    # the same key
    assert {name.split("/")[0] for name in before if "/" in name} == {found["nodes"]}
    # another selection may ask for new ones
    assert not {p for p in again if f"{found['nodes']}/{p}" in before}
    for name in ("gist", "rist"):
        assert found[name]["dev"] == max(
            dev_of(nodes[node_name(found, p)], 3) for p in found["visited"][name]
        )


def node_name(found: dict, path: str) -> str:
    return f"{found['nodes']}/{path}" if path else found["stage0_folder"]


def dev_of(node: dict, size: int) -> float:
    return gist_rist.dev_miou(node["counts"][:size].numpy())


def test_scores_of_other_development_sizes_are_stored(finished):
    folder = finished(dev_reserve=8, eval_every=6)
    for name, node in facts(folder / "store").items():
        assert {"4", "8"} <= node["dev"].keys(), name
        assert all(node["dev"][str(n)] == dev_of(node, n) for n in (4, 8))
        assert node["counts"].shape == (8, 7, 7) and {f"mask{i}" for i in range(6)} <= node.keys()


def test_development_labeled_and_unlabeled_images_are_apart(shapes_root, tmp_path):
    def plant(**flags) -> gist_rist.Tree:
        return gist_rist.set_up(
            gist_rist.preset(
                "shapes",
                **TINY
                | dict(root=str(shapes_root), val="few", split="random:8", store=str(tmp_path))
                | flags,
            )
        )[0]

    trees = [
        plant(dev_size=d, dev_reserve=r) for d, r in ((4, 0), (4, 10), (10, 0), (10, 10), (10, 4))
    ]
    for tree, number in zip(trees, (4, 10, 10, 10, 10), strict=True):
        sets = [{p.image for p in part} for part in (tree.labeled, tree.pool, tree.dev)]
        assert [len(s) for s in sets] == [8, 1000 - 8 - number, number] and len(
            set.union(*sets)
        ) == 1000
        assert all(p.label is None for p in tree.pool)
    assert (
        trees[0].dev == trees[1].dev[:4]
        and trees[1].dev == trees[2].dev == trees[3].dev == trees[4].dev
    )
    assert len({t.store.root for t in trees}) == 3  # a reserve of 10 for 10 is none


def test_two_runs_at_once_share_one_store(line, finished, tmp_path, io):
    """Jobs of their own, not processes of one job. With --keep-nodes, as docs/gist_rist.md asks, no
    node is trained twice."""
    other = line(
        out=tmp_path / "other",
        search=("path", "fist"),
        path=("PL", "LP"),
        alpha=(0, 1),
        keep_nodes=True,
    )
    end(
        [
            begin(flags, io, partial(count_trainings, tmp_path))
            for flags in (line(keep_nodes=True), other)
        ]
    )
    assert results(tmp_path / "out") == results(finished() / "out")
    wanted = facts(finished() / "store")
    found = facts(tmp_path / "store")
    assert not differences({k: found[k] for k in wanted}, wanted)
    said = (tmp_path / "trainings").read_text().split()
    assert sorted(said) == sorted({p or "stage0" for p in paths(tmp_path / "store")})


def count_trainings(folder: Path) -> None:
    """Write the path of each node that is trained."""
    fit = gist_rist.fit

    def noting(tree, path, *args):
        with open(folder / "trainings", "a") as file:
            file.write(f"{path or 'stage0'}\n")
        return fit(tree, path, *args)

    gist_rist.fit = noting


# ---------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize("n", [2, 3])
def test_processes_find_what_one_finds(line, finished, tmp_path, io, n):
    every = end(start_ranks(n, line(**ALL), io, partial(count_trainings, tmp_path)))
    assert_equal_runs(tmp_path, finished(**ALL))
    said = (tmp_path / "trainings").read_text().split()
    assert len(said) == len(set(said)) == 9  # nobody trained what another one had
    assert (
        sum(done.out.count("labels used") for done in every)
        == 1
        == sum(d.out.count("miou:") for d in every)
    )
    assert kept(tmp_path / "store") == kept(finished(**ALL) / "store") and not litter(
        tmp_path / "store"
    )


def test_as_a_user_types_it(line, finished, tmp_path):
    """Under torchrun with two processes. The tests start the script as its last line does."""
    done = torchrun(2, line(), name="gist_rist").ok()
    assert done.out.count("miou:") == 1 and str(tmp_path / "out") in done.out
    assert_equal_runs(tmp_path, finished())
    last_line = (REPO / "gist_rist.py").read_text().splitlines()[-1]
    assert last_line == "    cli.cli(Args, settings, main, choosers=CHOOSERS)"


def slow_scores() -> None:
    """Scoring takes a while, as on real data: weights.pt lies there and node.json does not."""
    savez = np.savez_compressed

    def late(*args, **arrays):
        time.sleep(0.3)
        savez(*args, **arrays)

    np.savez_compressed = late


def test_a_node_has_no_children_before_it_is_scored(line, tmp_path, io):
    end(start_ranks(2, line(search="path", path="LL"), io, slow_scores))


# -------------------------------------------------------------------------------------------- kills
MOMENTS = [  # in this order, each in the run that the one before left
    ("common.runs:Run.tally", 2, False),
    ("common.runs:save_checkpoint", 3, True),
    ("gist_rist:score_stage0", 1, False),
    ("gist_rist:finish_node", 1, False),
    ("common.nodes:Nodes.finish", 1, False),
    ("common.nodes:Nodes.finish", 1, True),
    ("PIL.Image:Image.save", 3, False),
    ("PIL.Image:Image.save", 8, True),
    ("common.runs:Run.tally", 1, True),
    ("numpy:savez_compressed", 1, True),
    ("gist_rist:write_report", 1, False),
]


def test_killed_at_chosen_moments_and_resumed_is_bit_equal(line, finished, tmp_path, io):
    """Among them: while pseudo labels are written, and between weights.pt and node.json."""
    flags = line(save_every=1, resume=True)
    for where, nth, after in MOMENTS:
        done = run(flags, io, partial(at_call, where, nth, signal.SIGKILL, after))
        assert done.code == -signal.SIGKILL, f"{where}: {done}"
    run(flags, io).ok()
    assert_equal_runs(tmp_path, finished())


@pytest.mark.parametrize(
    "where, nth, after",
    [("common.nodes:Nodes.finish", 2, True), ("PIL.Image:Image.save", 3, False)],
    ids=["after node.json", "pseudo labels"],
)
def test_a_kill_leaves_no_litter_for_ever(line, tmp_path, io, where, nth, after):
    """Checkpoints with teacher and momentum are four times the size of weights."""
    flags = line(search="path", path=("P", "L"), save_every=1, resume=True)
    assert (
        run(flags, io, partial(at_call, where, nth, signal.SIGKILL, after)).code == -signal.SIGKILL
    )
    run(flags, io).ok()
    assert not litter(tmp_path / "store")


@pytest.mark.parametrize("n", [1, 2])
def test_killed_at_random_moments_and_resumed_is_bit_equal(line, finished, tmp_path, io, n):
    """One worker or all. A worker that is left alone goes on and ends by itself."""
    rng, flags, killed = random.Random(n), line(save_every=1, resume=True), 0
    while killed < 2 + n:
        every = start_ranks(n, flags, io)
        time.sleep(rng.uniform(0.15, 0.7))
        victims = rng.sample(every, rng.randint(1, n))
        killed += sum(victim.alive() for victim in victims)
        for victim in victims:
            victim.kill(signal.SIGKILL)
        done = [started.wait() for started in every]
        assert all(d.code in (0, -signal.SIGKILL) for d in done), [d.err[-1500:] for d in done]
        if (tmp_path / "out" / "results.json").exists():  # it was over: begin anew
            assert_equal_runs(tmp_path, finished())
            shutil.rmtree(tmp_path / "out")
            shutil.rmtree(tmp_path / "store")
    end(start_ranks(n, flags, io))
    assert_equal_runs(tmp_path, finished())


@pytest.mark.skipif(
    not os.environ.get("KILLS"), reason="takes minutes: KILLS=20 pytest -k many_kills"
)
def test_many_kills(line, finished, tmp_path, io):
    flags, rng, reference = dict(**ALL, stages=3, steps=9), random.Random(0), None
    reference = finished(**flags)
    for _ in range(int(os.environ["KILLS"])):
        every = start_ranks(3, line(save_every=1, resume=True, **flags), io)
        time.sleep(rng.uniform(0.2, 3))
        for victim in rng.sample(every, rng.randint(1, 3)):
            victim.kill(signal.SIGKILL)
        assert all(s.wait().code in (0, -signal.SIGKILL) for s in every)
    end(start_ranks(3, line(save_every=1, resume=True, **flags), io))
    assert_equal_runs(tmp_path, reference)


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize(
    "where, nth",
    [("common.runs:Run.tally", 2), ("common.runs:Run.tally", 8), ("PIL.Image:Image.save", 3)],
    ids=["stage 0", "a stage", "pseudo labels"],
)
def test_sigterm_saves_and_leaves_with_a_message_and_code_0(
    line, finished, tmp_path, io, where, nth
):
    flags = line(search="path", path=("L", "P"), resume=True, save_every=1000)
    stopped = run(flags, io, partial(at_call, where, nth, signal.SIGTERM)).ok()
    assert (
        "SIGTERM" in stopped.out
        and "--resume" in stopped.out
        and not (tmp_path / "out" / "results.json").exists()
    )
    (last,) = (tmp_path / "store").rglob("last.pt")
    step = torch.load(last, weights_only=True)["step"]
    assert step == {"common.runs:Run.tally": (nth - 1) % 6 + 1, "PIL.Image:Image.save": 1}[where]
    assert f"after step {step}" in stopped.out and str(last) in stopped.out
    if nth != 2:  # stage 0 is resumed in other tests
        run(flags, io).ok()
        assert_equal_runs(tmp_path, finished(search="path", path=("L", "P")))


def slow_steps(only: str) -> None:
    """The process of this rank takes a minute for each step."""
    if os.environ["RANK"] == only:
        from common import runs

        runs.Run.tally = lambda *args: time.sleep(60)


def note_waits(folder: Path) -> None:
    wait = gist_rist.Tree.wait

    def noting(tree):
        (folder / f"waits-{os.environ['RANK']}").touch()
        wait(tree)

    gist_rist.Tree.wait = noting


def test_sigterm_while_a_process_waits_for_another(line, finished, tmp_path, io):
    """For a node, after it trained one itself."""
    (folder,) = (finished() / "store").glob("stage0-*")
    shutil.copytree(folder, tmp_path / "store" / folder.name)
    flags = line(search="path", path=("L", "P"))
    env = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    slow, waiting = ({**env, "RANK": rank, "LOCAL_RANK": rank} for rank in "10")
    first = begin(flags, io, partial(slow_steps, "1"), env=slow)
    try:
        assert until(lambda: list((tmp_path / "store").glob("*/P/log.jsonl")), first)
        second = begin(flags, io, partial(note_waits, tmp_path), env=waiting)
        assert until(lambda: (tmp_path / "waits-0").exists(), second)
        second.kill(signal.SIGTERM)
        done = second.wait(20)
    finally:
        first.kill(signal.SIGKILL)
        first.wait()
    assert (
        done.code == 0
        and "SIGTERM" in done.out
        and "--resume" in done.out
        and "Traceback" not in done.err
    )


def test_resume_in_an_empty_folder_starts_afresh_and_says_so(line, finished, tmp_path, io):
    (tmp_path / "out").mkdir()
    done = run(line(resume=True), io).ok()
    assert "afresh" in done.out and str(tmp_path / "out") in done.out
    assert_equal_runs(tmp_path, finished())


def test_resume_with_other_settings_names_the_fields(line, tmp_path, io):
    run(line(search="path", path="L"), io).ok()
    before = stamps(tmp_path / "store")
    error = run(line(search="path", path="L", resume=True, lr=0.2, temp=1), io).error()
    assert "lr (0.006 then, 0.2 now)" in error and "temp (" in error and "steps" not in error
    run(line(search="path", path="L", resume=True, log_every=2, workers=1, save_every=1), io).ok()
    assert stamps(tmp_path / "store") == before


# ------------------------------------------------------------------------------------- what is read
def note_reads(file: Path) -> None:
    """Every image and label that is opened, and every node that is finished, in order."""
    from common import semantic
    from common.nodes import Nodes

    def noting(real, name):
        def noted(*args, **kwargs):
            with open(file, "a") as out:
                out.write(f"{name} {args[1] or 'stage0' if name == 'node' else args[0]}\n")
            return real(*args, **kwargs)

        return noted

    semantic.read_image = noting(semantic.read_image, "image")
    semantic.read_label = noting(semantic.read_label, "label")
    Nodes.finish = noting(Nodes.finish, "node")


def test_val_is_read_after_the_searches_and_labels_of_the_pool_never(
    line, shapes_root, tmp_path, io
):
    flags = line(
        search=("gist", "rist", "fist", "batchwise"),
        no_val_every_stage=True,
        stage0="classmix",
        cl_on="both",
    )
    run(flags, io, partial(note_reads, tmp_path / "reads")).ok()
    told = [entry.split(" ", 1) for entry in (tmp_path / "reads").read_text().splitlines()]
    last = max(i for i, (what, _) in enumerate(told) if what == "node")
    stems = {
        what: [(i, Path(name).stem) for i, (kind, name) in enumerate(told) if kind == what]
        for what in ("image", "label")
    }
    tree = gist_rist.set_up(
        gist_rist.preset(
            "shapes",
            **TINY
            | dict(
                root=str(shapes_root),
                val="few",
                split=str(shapes_root / "labeled.txt"),
                store=str(tmp_path),
                unlabeled=str(shapes_root / "unlabeled.txt"),
            ),
        )
    )[0]
    val, pool, dev, labeled = (
        {p.name for p in part} for part in (tree.data.val, tree.pool, tree.dev, tree.labeled)
    )
    first = min(i for i, name in stems["image"] + stems["label"] if name in val)
    assert first > last and val <= {name for _, name in stems["image"]}
    ours = {name for i, name in stems["label"] if i <= last and "labels-" not in told[i][1]}
    assert ours == dev | labeled and pool <= {name for _, name in stems["image"]}
    assert not (ours | val) & pool


def test_searches_end_although_val_cannot_be_read(folder_root, tmp_path, io):
    """Then the choice is scored, which needs it."""
    val = sorted((folder_root / "images" / "val").iterdir())
    whole = {path: path.read_bytes() for path in val}
    for path in val:  # their first bytes, which a run looks at when it begins, are whole
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    flags = argv(
        dataset="folder",
        root=folder_root,
        split="random:4",
        **TINY,
        out=tmp_path / "out",
        store=tmp_path / "store",
        resume=True,
    )
    flags[flags.index("--dev-size") + 1] = "2"
    assert val[0].name in run(flags, io).error()
    before = stamps(tmp_path / "store")
    assert len(before) >= 6 and not (tmp_path / "out" / "results.json").exists()
    for path, content in whole.items():
        path.write_bytes(content)
    run(flags, io).ok()
    assert stamps(tmp_path / "store") == before and results(tmp_path / "out")["gist"]["miou"] > 0


# ------------------------------------------------------------------------------------- kept weights
def test_weights_and_pseudo_labels_that_nobody_needs_are_removed(finished):
    for flags in ({}, ALL, dict(search="path", path="LLP")):
        folder = finished(**flags)
        found = results(folder / "out")
        best = {found[name]["path"] for name in found["visited"]}
        assert kept(folder / "store") == {"", *best} and labeled_by(folder / "store") <= best, flags
        assert not litter(folder / "store"), flags


def falling_scores() -> None:
    """Each score is lower than those before it, so stage 0 wins."""
    scores = itertools.count(90, -1)
    gist_rist.dev_miou = lambda counts: float(next(scores))


def test_pseudo_labels_of_the_winner_alone_are_kept(line, tmp_path, io):
    """Stage 0 wins and has labeled the images for P; P has labeled them for PP, and PP for PPL."""
    run(line(search="path", path="PPL"), io, falling_scores).ok()
    assert results(tmp_path / "out")["path"]["path"] == "" and labeled_by(tmp_path / "store") <= {
        ""
    }


def test_keep_nodes_keeps_all_weights(finished):
    store = finished(keep_nodes=True) / "store"
    assert kept(store) == paths(store) and len(paths(store)) >= 6
    assert {name: f["weights"] for name, f in facts(store).items()} == {
        name: gist_rist.fingerprint(student(folder / "weights.pt"))
        for name, folder in folders(store).items()
    }


@pytest.mark.parametrize(
    "old, new", [("LL", "LP"), ("LLL", "LLP")], ids=["a parent", "parent and grandparent"]
)
def test_removed_weights_are_trained_again_bit_by_bit(
    line, finished, copied, tmp_path, io, old, new
):
    store = copied(search="path", path=old)
    first, before = fingerprints(store), stamps(store)
    lost = {new[:n] for n in range(1, len(new))}
    for path in lost:  # also of the parent that won, whose weights are kept
        for file in store.glob(f"*/{path}/weights.pt"):
            file.unlink()
    begin(line(search="path", path=new), io).wait(12).ok()
    assert trained(store, before) >= lost | {new}
    again = fingerprints(store)
    assert {p: again[p] for p in first} == first
    wrong = differences(
        facts(store)[node_name(results(tmp_path / "out"), new)],
        facts(finished(search="path", path=new) / "store")[
            node_name(results(finished(search="path", path=new) / "out"), new)
        ],
    )
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("how", ["other values", "torn", "another script's"])
def test_weights_that_are_not_those_that_were_scored(line, copied, tmp_path, io, how):
    store = copied(search="path", path="P", keep_nodes=True)
    (folder,) = store.glob("*/P")
    content = torch.load(folder / "weights.pt", weights_only=True)
    if how == "other values":
        next(iter(content["networks"]["student"].values())).add_(1e-3)
    torch.save(
        content | ({"script": "other.py"} if how == "another script's" else {}),
        folder / "weights.pt",
    )
    if how == "torn":
        (folder / "weights.pt").write_bytes((folder / "weights.pt").read_bytes()[:5000])
    error = run(line(search="path", path="PL"), io).error()
    assert str(folder) in error
    if how == "other values":  # do what the sentence says
        shutil.rmtree(folder)
        run(line(search="path", path="PL", resume=True), io).ok()


# ------------------------------------------------------------------------------------------ stage 0
STAGE0 = {
    "supervised": {},
    "s4gan": dict(gan_gamma=0),
    "classmix": dict(mix_colour=True),
}


@pytest.mark.parametrize("kind", STAGE0)
def test_stage_0_keeps_its_best_evaluation(finished, kind):
    kinds = {
        k: dict(stage0=k, search="path", path="L", eval_every=2, **flags)
        for k, flags in STAGE0.items()
    }
    folder = finished(beside=kinds.values(), **kinds[kind])
    (stage0,) = (folder / "store").glob("stage0-*")
    log = [json.loads(text) for text in (stage0 / "log.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["dev_miou"] for r in log if "dev_miou" in r}
    record = records(folder / "store")[""]
    assert (
        list(scores) == [2, 4, 6]
        and record["step"] == max(scores, key=scores.get)
        and record["steps"] == 6
    )
    assert record["dev"]["4"] == max(scores.values()) == results(folder / "out")["stage0"]["dev"]
    expected = {
        "supervised": set(),
        "s4gan": {"loss_fm", "loss_st", "loss_d", "trusted"},
        "classmix": {"loss_u", "sure"},
    }
    losses = [r for r in log if "loss" in r]
    assert len(losses) == 6 and all(expected[kind] <= r.keys() for r in losses)
    if kind != "supervised":
        assert any(r["loss_st" if kind == "s4gan" else "loss_u"] > 0 for r in losses), (
            "nothing learned from the pool"
        )


def test_kinds_of_stage_0_are_different_nodes(finished):
    found = [
        fingerprints(
            finished(stage0=kind, search="path", path="L", eval_every=2, **flags) / "store"
        )
        for kind, flags in STAGE0.items()
    ]
    assert len({f[path] for f in found for path in ("", "L")}) == 6


@pytest.mark.parametrize("kind", STAGE0)
def test_stage_0_killed_and_resumed_is_bit_equal(line, finished, tmp_path, io, kind):
    flags = dict(stage0=kind, search="path", path="L", eval_every=2, **STAGE0[kind])
    command_line = line(**flags, save_every=1, resume=True)
    done = run(command_line, io, partial(at_call, "common.runs:Run.tally", 4, signal.SIGKILL))
    (last,) = (tmp_path / "store").glob("stage0-*/last.pt")
    assert done.code == -signal.SIGKILL and torch.load(last, weights_only=True)["step"] == 3
    run(command_line, io).ok()
    assert_equal_runs(tmp_path, finished(**flags))


def test_stage_0_killed_between_saving_and_scoring(line, finished, tmp_path, io):
    """What was due is scored first, even at the last step; the log has no line twice."""
    flags = dict(search="path", path="L", eval_every=2)
    command_line = line(**flags, save_every=1, resume=True)
    for nth, step in ((2, 4), (2, 6)):  # the second scores first
        kill = partial(at_call, "gist_rist:score_stage0", nth, signal.SIGKILL)
        assert run(command_line, io, kill).code == -signal.SIGKILL
        (last,) = (tmp_path / "store").glob("stage0-*/last.pt")
        state = torch.load(last, weights_only=True)
        assert (state["step"], state["scored"]) == (step, step - 2)
    run(command_line, io).ok()
    assert_equal_runs(tmp_path, finished(**flags))
    (log,) = (tmp_path / "store").glob("stage0-*/log.jsonl")
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert [r["step"] for r in lines if "dev_miou" in r] == [2, 4, 6]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_stage_0_from_a_checkpoint(line, finished, copied, tmp_path, io):
    best = finished() / "out" / "best.pt"
    run(line(stage0=best, search="path", path="L"), io).ok()
    found = records(tmp_path / "store")
    assert found[""]["weights"] == gist_rist.fingerprint(student(best)) and found[""]["steps"] == 0
    assert found["L"]["parent"] == found[""]["weights"] != found["L"]["weights"]
    assert results(tmp_path / "out")["stage0"]["dev"] == found[""]["dev"]["4"]
    torch.save(student(best), tmp_path / "plain.pth")  # the same weights in a file of their own
    plain = line(
        stage0=tmp_path / "plain.pth",
        search="path",
        path="L",
        out=tmp_path / "out2",
        store=tmp_path / "store2",
    )
    run(plain, io).ok()
    assert fingerprints(tmp_path / "store2") == fingerprints(tmp_path / "store")


def test_stage_0_from_a_file_that_does_not_fit(line, gta, tmp_path, io):
    (tmp_path / "random").write_bytes(random.Random(0).randbytes(5000))
    torch.save({"a": torch.ones(3)}, tmp_path / "foreign.pth")
    for file in (gta / "best.pt", tmp_path / "random", tmp_path / "foreign.pth"):
        error = run(line(stage0=file, resume=True), io).error()
        assert str(file) in error and not paths(tmp_path / "store")
        shutil.rmtree(tmp_path / "out")


def counting() -> None:
    pretend.count("gist_rist", "refine_step")
    gist_rist.STAGE0.update(
        {name: pretend.counted(step) for name, step in gist_rist.STAGE0.items()}
    )


@pytest.mark.parametrize("kind", STAGE0)
def test_nothing_mixes_devices(line, shapes_root, tmp_path, io, kind):
    """On an accelerator that is pretended, with the CPU's values: the same nodes, scores and
    predictions."""
    found, photo = [], str(shapes_root / "voc" / "JPEGImages" / "val_000000.jpg")
    # refinement does not know by what method its stage 0 was trained
    path = ("PL", "B", "F0.5") if kind == "supervised" else ("P",)
    nodes = len({node for end in path for node in gist_rist.prefixes(end)})
    for name, setup in (("near", ()), ("far", (counting,))):
        store, out = tmp_path / f"{name}-store", tmp_path / name
        said = (
            run(
                line(
                    stage0=kind,
                    search="path",
                    path=path,
                    store=store,
                    out=out,
                    **STAGE0[kind],
                ),
                io,
                *setup,
            )
            .ok()
            .out
        )
        assert pretend.waits(said) == [0] * (6 + nodes * 3) * (name == "far"), (
            "a step that waits for the GPU"
        )
        run(["--eval", str(out / "best.pt")], io, *setup).ok()
        run(["--predict", str(out / "best.pt"), photo], io, *setup).ok()
        made = sorted((out / "best.pt.predictions" / "labels").glob("*.png"))
        found.append(
            (
                fingerprints(store),
                results(out),
                (out / "best.pt.results.json").read_text(),
                [p.read_bytes() for p in made],
            )
        )
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------- eval, report
@pytest.fixture
def finished_copy(finished, tmp_path) -> Path:
    """A copy of the run folder of GIST and RIST."""
    return Path(shutil.copytree(finished() / "out", tmp_path / "run"))


def test_eval_gives_the_runs_own_results(finished_copy, tmp_path, io):
    found = results(finished_copy)
    top = min(
        (found[n] for n in ("gist", "rist")), key=lambda r: (-r["dev"], r["stage"], r["path"])
    )
    before = {p: p.read_bytes() for p in finished_copy.rglob("*") if p.is_file()}
    said = run(["--eval", str(finished_copy / "best.pt")], io, cwd=tmp_path).ok().out
    scored = json.loads((finished_copy / "best.pt.results.json").read_text())
    record = scored["student"]["last"]
    assert (record["miou"], record["iou"]) == (
        top["miou"],
        top["iou"],
    ) and f"{top['miou']:.2f}" in said
    counts = np.array(scored["confusion"])
    assert counts.shape == (7, 7) and counts.sum() == 7 * 64 * 64 and (counts.sum(0) > 0).sum() > 1
    assert all(p.read_bytes() == content for p, content in before.items())
    assert {p.name for p in finished_copy.iterdir()} - {p.name for p in before} <= {
        "best.pt.results.json",
        "previews",
    }


def test_predict_writes_overlays_and_index_pngs(finished_copy, shapes_root, tmp_path, io):
    (tmp_path / "photos").mkdir()
    source = Image.open(shapes_root / "voc" / "JPEGImages" / "val_000001.jpg")
    made = {"a.jpg": source, "odd.png": source.resize((97, 61)), "grey.png": source.convert("L")}
    for name, image in made.items():
        image.save(tmp_path / "photos" / name)
    done = run(["--predict", str(finished_copy / "best.pt"), str(tmp_path / "photos")], io).ok()
    folder = finished_copy / "best.pt.predictions"
    assert "3 images" in done.out and len([p for p in folder.rglob("*") if p.is_file()]) == 10
    for name, image in made.items():
        stem = Path(name).stem
        with (
            Image.open(folder / "labels" / f"{stem}.png") as label,
            Image.open(folder / "overlays" / f"{stem}.jpg") as overlay,
        ):
            assert label.size == image.size and label.mode == "P" and np.array(label).max() < 7
            assert overlay.width == image.width


def test_prediction_is_what_the_evaluation_counts(finished_copy, shapes_root, io):
    names = (shapes_root / "voc" / "ImageSets" / "Segmentation" / "few.txt").read_text().split()
    images = [str(shapes_root / "voc" / "JPEGImages" / f"{name}.jpg") for name in names]
    run(["--eval", str(finished_copy / "best.pt")], io).ok()
    run(["--predict", str(finished_copy / "best.pt"), *images], io).ok()
    expected = np.array(
        json.loads((finished_copy / "best.pt.results.json").read_text())["confusion"]
    )
    counts = np.zeros_like(expected)
    for name in names:
        label = np.array(Image.open(shapes_root / "voc" / "SegmentationClass" / f"{name}.png"))
        prediction = np.array(
            Image.open(finished_copy / "best.pt.predictions" / "labels" / f"{name}.png")
        )
        np.add.at(counts, (label[label != 255], prediction[label != 255]), 1)
    assert (counts == expected).all()


def test_report_writes_the_same_again(finished, tmp_path, io):
    out, store = finished(trials=5, stages=1) / "out", finished(trials=5, stages=1) / "store"
    names = ("report.md", "log.jsonl", "results.json")
    before, nodes = {n: (out / n).read_text() for n in names}, stamps(store)
    (out / "report.md").unlink()
    said = run(["--report", str(out)], io, cwd=tmp_path).ok().out
    assert {n: (out / n).read_text() for n in names} == before and before["report.md"] in said
    assert stamps(store) == nodes


def test_eval_and_report_of_a_run_whose_nodes_another_run_trained(line, copied, tmp_path, io):
    """The run's own --val and --dev-size, not those of the run that trained its best node."""
    lists, out = line.args[0] / "voc" / "ImageSets" / "Segmentation", tmp_path / "out"
    (lists / "five.txt").write_text(
        "".join((lists / "val.txt").read_text().splitlines(keepends=True)[20:25])
    )
    flags = dict(search="path", path=("L", "P"), dev_reserve=8, eval_every=6, keep_nodes=True)
    copied(**flags)
    run(line(val="five", **flags | dict(dev_size=3)), io).ok()
    before, found = (out / "report.md").read_text(), results(out)
    run(["--report", str(out)], io).ok()
    assert (out / "report.md").read_text() == before and results(out) == found
    run(["--eval", str(out / "best.pt")], io).ok()
    scored = json.loads((out / "best.pt.results.json").read_text())
    best = max((found[name] for name in ("stage0", "path")), key=lambda r: (r["dev"], -r["stage"]))
    assert scored["val"] == "five" and scored["student"]["last"]["miou"] == best["miou"]


def test_val_every_stage_scores_nodes_that_were_there(line, copied, tmp_path, io):
    """Figs. 1 and 7 and Table II need the scores of all nodes, also of those whose run did not ask
    for them."""
    copied(search="path", path=("LL", "PP"), keep_nodes=True, no_val_every_stage=True)
    run(line(search="path", path=("LL", "PP")), io).ok()
    lost = [
        str(f) for f in folders(tmp_path / "store").values() if not (f / "val-few.json").exists()
    ]
    assert not lost and "Table II" in (tmp_path / "out" / "report.md").read_text()


# ------------------------------------------------------------------------------------------ presets
SHORT = TINY | dict(stage0_steps=2, steps=2, stages=1, eval_every=2, dev_size=2)


ONE = {k: v for k, v in SHORT.items() if k != "stages"}  # a path has its own number


def two_steps_score_predict(line: list[str], out: Path, picture: Path, io: Path) -> str:
    """A run of two steps, its evaluation and a prediction; what it said."""
    said = run(line, io).ok().out
    found = results(out)
    run(["--eval", str(out / "best.pt")], io).ok()
    scored = json.loads((out / "best.pt.results.json").read_text())["student"]["last"]
    assert scored["miou"] in [found[name]["miou"] for name in found["visited"]]
    assert_predicts(run, out, picture, io)
    return said


def shallow() -> None:
    """In a process of its own: ResNets of one block a stage."""
    from common import backbones

    backbones.build = partial(backbones.build, layers=(1, 1, 1, 1))


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A file in the layout of resnet101COCO-41f33a49.pth, of a shallow ResNet-50 with random
    weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gist_rist.backbones, "build", partial(gist_rist.backbones.build, layers=(1, 1, 1, 1))
        )
        net = gist_rist.SegNet(gist_rist.preset("voc", backbone="caffe_resnet50"), 21)
    state = {
        k: v for k, v in net.backbone.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    state |= {f"layer5.conv2d_list.{k}": v for k, v in net.head.state_dict().items()}
    path = tmp_path_factory.mktemp("coco") / "resnet50COCO.pth"
    torch.save(state, path)
    return path


def test_preset_voc_with_coco_weights(shapes_root, coco, tmp_path, io):
    """A small crop; the Caffe-style ResNet, BGR, BatchNorm frozen from stage 0 on."""
    line = argv(
        dataset="voc",
        root=shapes_root / "voc",
        split=shapes_root / "labeled.txt",
        val="few",
        weights=coco,
        backbone="caffe_resnet50",
        unlabeled=shapes_root / "unlabeled.txt",
        out=tmp_path / "out",
        phi=0,
        store=tmp_path / "store",
        stage0_steps=1,
        steps=1,
        dev_size=2,
        batch_size=2,
        crop_size=(32, 32),
        search="path",
        path="P",
        cl=0,
        workers=0,
        keep_nodes=True,
    )
    run(line, io, shallow).ok()
    settings = torch.load(tmp_path / "out" / "best.pt", weights_only=True)["settings"]
    assert settings["pixels"] == "bgr" and settings["cut"] == 0
    start = torch.load(coco, weights_only=True)
    for folder in folders(tmp_path / "store").values():
        net = student(folder / "weights.pt")
        moved = {
            k
            for k, v in start.items()
            if not k.startswith("layer5") and not torch.equal(net[f"backbone.{k}"], v)
        }
        assert moved and not any(
            ".bn" in k or k.startswith("bn") or "downsample.1" in k for k in moved
        )


@pytest.fixture
def voc_root(shapes_root, tmp_path) -> Path:
    """VOC folders: the 211 labeled images of S4GAN's list, the four last of its order, 8 unlabeled
    ones, 3 to score."""
    if not (S4GAN / "permutation.txt").is_file():
        pytest.skip(f"no published lists in TEST_DATA ({TEST_DATA})")
    root, source = tmp_path / "voc", shapes_root / "voc"
    base, lists = root / "VOCdevkit" / "VOC2012", root / "splits" / "s4gan"
    for folder in (
        base / "JPEGImages",
        base / "SegmentationClassAug",
        base / "ImageSets" / "Segmentation",
        lists / "1-of-50",
    ):
        folder.mkdir(parents=True)
    labeled = (S4GAN / "1-50.txt").read_text().split()
    order = (S4GAN / "permutation.txt").read_text().split()
    val = [f"val_{i:06d}" for i in range(3)]
    train = [*labeled, *order[1000:1008], *order[-4:]]
    for i, name in enumerate([*train, *val]):
        stem = f"train_{i:06d}"
        (base / "JPEGImages" / f"{name}.jpg").symlink_to(source / "JPEGImages" / f"{stem}.jpg")
        if name not in order[1000:1008]:
            (base / "SegmentationClassAug" / f"{name}.png").symlink_to(
                source / "SegmentationClass" / f"{stem}.png"
            )
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(val))
    (base / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("\n".join(train))
    shutil.copy(S4GAN / "1-50.txt", lists / "1-of-50" / "labeled.txt")
    shutil.copy(S4GAN / "permutation.txt", lists)
    return root


def test_preset_voc_with_the_published_list(voc_root, tmp_path, io):
    """1/50, the default: S4GAN's 211 images; development images are the last of its order."""
    flags = SHORT | dict(dev_size=4)
    line = argv(
        dataset="voc", root=voc_root, **flags, out=tmp_path / "out", store=tmp_path / "store"
    )
    picture = next((voc_root / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir())
    said = two_steps_score_predict(line, tmp_path / "out", picture, io)
    assert all(
        words in said
        for words in ("211 labeled images", "3a73656340d8", "8 left to label", "4 held out", "215")
    )
    assert results(tmp_path / "out")["split_fingerprint"].startswith(
        "3a73656340d8f32e63a9c46806c29d"
    )
    assert len(results(tmp_path / "out")["stage0"]["iou"]) == 21
    tree = gist_rist.set_up(gist_rist.preset("voc", root=str(voc_root), **flags))[0]
    assert [p.name for p in tree.dev] == (S4GAN / "permutation.txt").read_text().split()[:-5:-1]


def test_preset_cityscapes_at_half_size(tmp_path, io):
    """Pseudo labels are made at half size, stored at full size, and halved again when they are
    read."""
    root = shapes.make_cityscapes(tmp_path / "cityscapes")
    flags = ONE | dict(pixels="imagenet", crop_size=(32, 64), phi=0, search=("path",), path=("P",))
    del flags["resize"]  # the preset's own: 0.5
    line = argv(
        dataset="cityscapes",
        root=root,
        split="random:4",
        **flags,
        keep_nodes=True,
        out=tmp_path / "out",
        store=tmp_path / "store",
    )
    picture = next((root / "leftImg8bit" / "val").glob("*/*.png"))
    two_steps_score_predict(line, tmp_path / "out", picture, io)
    tree = gist_rist.set_up(
        gist_rist.preset("cityscapes", root=str(root), split="random:4", **flags)
    )[0]
    (stage0,), (labels,) = (
        (tmp_path / "store").glob("stage0-*"),
        (tmp_path / "store").glob("*/labels-"),
    )
    net = tree.network(student(stage0 / "weights.pt"))
    net.eval()
    for group in gist_rist.passes(tree.pool, tree.data, tree.args, tree.world, labels=False):
        i = group[0].index
        logits = gist_rist.forward_whole(net, group[:1], tree.world.device)[0]
        with Image.open(labels / f"{i}.png") as stored, Image.open(tree.pool[i].image) as image:
            assert stored.size == image.size == (256, 128) and logits.shape == (19, 64, 128)
            whole = torch.from_numpy(np.array(stored))
        assert torch.equal(whole[::2, ::2].long(), logits.argmax(0)) and torch.equal(
            whole[1::2, 1::2], whole[::2, ::2]
        )
        half = gist_rist.transforms.resize(torch.zeros(3, 128, 256), whole, (64, 128))[1]
        assert torch.equal(half.long(), logits.argmax(0))
    with np.load(stage0 / "scores.npz") as scores:
        assert scores["mask0"].shape == (64, 128) and scores["counts"][0].sum() <= 64 * 128


def note_sizes(file: Path) -> None:
    """Height and width of what the network sees."""
    forward = gist_rist.SegNet.forward

    def noting(self, images, *args):
        with open(file, "a") as out:
            out.write(f"{images.shape[-2]}x{images.shape[-1]}\n")
        return forward(self, images, *args)

    gist_rist.SegNet.forward = noting


def test_pictures_are_predicted_at_the_size_that_was_trained_and_scored(
    line, shapes_root, tmp_path, io
):
    run(line(search="path", path="L", resize=0.5), io).ok()
    best, picture = (
        tmp_path / "out" / "best.pt",
        shapes_root / "voc" / "JPEGImages" / "val_000000.jpg",
    )
    for i, flags in enumerate((["--eval", str(best)], ["--predict", str(best), str(picture)])):
        run(flags, io, partial(note_sizes, tmp_path / str(i))).ok()
        assert set((tmp_path / str(i)).read_text().split()) == {"32x32"}
    with Image.open(
        tmp_path / "out" / "best.pt.predictions" / "labels" / "val_000000.png"
    ) as label:
        assert label.size == (64, 64)


@pytest.fixture
def folder_flags(folder_root, tmp_path):
    """folder_flags(...) -> a command line on `folder_root`, four labeled images and two to choose
    by."""

    def line(**flags) -> list[str]:
        return argv(
            **{
                "dataset": "folder",
                "root": folder_root,
                "split": "random:4",
                **ONE,
                "search": "path",
                "path": "P",
                "out": tmp_path / "out",
                "store": tmp_path / "store",
                **flags,
            }
        )

    return line


def test_preset_folder(folder_root, folder_flags, tmp_path, io):
    picture = folder_root / "images" / "val" / "val_000000.jpg"
    said = two_steps_score_predict(folder_flags(), tmp_path / "out", picture, io)
    assert (
        "4 labeled images" in said
        and "6 left to label" in said
        and "2 held out" in said
        and "6 labels" in said
    )


@pytest.mark.skipif(
    not (TEST_DATA / "camvid").is_dir(), reason=f"no camvid in TEST_DATA ({TEST_DATA})"
)
def test_real_pictures_in_a_folder(tmp_path, io):
    camvid, few = TEST_DATA / "camvid", tmp_path / "camvid"
    for kind in ("images", "labels"):
        (few / kind / "val").mkdir(parents=True)
        (few / kind / "train").symlink_to(camvid / kind / "train")
        for path in sorted((camvid / kind / "val").iterdir())[:2]:
            (few / kind / "val" / path.name).symlink_to(path)
    shutil.copy(camvid / "classes.txt", few)
    names = (camvid / "splits" / "unlabelled_23.txt").read_text().splitlines()[:4]
    (few / "unlabeled.txt").write_text("\n".join(names))
    line = argv(
        dataset="folder",
        root=few,
        split=camvid / "splits" / "labelled_23.txt",
        **ONE,
        search="path",
        path="P",
        unlabeled=few / "unlabeled.txt",
        out=tmp_path / "out",
        store=tmp_path / "store",
    )
    said = two_steps_score_predict(
        line, tmp_path / "out", sorted((camvid / "images" / "test").iterdir())[0], io
    )
    assert "23 labeled images" in said and "4 unlabeled" in said


# ------------------------------------------------------------------------------------------- errors
def test_the_papers_data_sets_need_weights(shapes_root, tmp_path, io):
    for dataset in ("voc", "cityscapes"):
        root = (
            shapes_root / "voc"
            if dataset == "voc"
            else shapes.make_cityscapes(tmp_path / "cityscapes")
        )
        error = run(
            argv(dataset=dataset, root=root, split="random:4", dev_size=2, out=tmp_path / "out"), io
        ).error()
        assert (
            "--weights FILE" in error
            and "--weights imagenet" in error
            and not (tmp_path / "out").exists()
        )


def test_coco_weights_that_do_not_fit(shapes_root, coco, tmp_path, io):
    state = {k: v for k, v in torch.load(coco, weights_only=True).items() if "layer4" not in k}
    torch.save(state, tmp_path / "lost.pth")
    torch.save({"a": torch.ones(3, 3)}, tmp_path / "foreign.pth")
    line = argv(
        dataset="voc",
        root=shapes_root / "voc",
        split=shapes_root / "labeled.txt",
        out=tmp_path / "out",
    )
    for name, backbone, said in (
        ("lost.pth", "caffe_resnet50", "layer4.0.conv1.weight"),
        ("foreign.pth", "caffe_resnet50", "foreign.pth"),
        ("no.pth", "resnet18", "no such file"),
        ("foreign.pth", "resnet18", "--pixels imagenet"),
    ):
        setup = [shallow] * (backbone != "resnet18")
        error = run(
            [*line, "--weights", str(tmp_path / name), "--backbone", backbone], io, *setup
        ).error()
        assert said in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dataset, way", MISSING)
def test_missing_data_set_says_what_where_and_two_ways_on(dataset, way, tmp_path, io):
    line = argv(
        dataset=dataset, root=tmp_path / "nowhere", out=tmp_path / "out", store=tmp_path / "store"
    )
    error = run(line, io).error()
    assert str(tmp_path / "nowhere") in error and way in error and "--root" in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


@pytest.fixture
def refused(shapes_root, tmp_path):
    """refused(...) -> why these settings, in place of TINY's, are refused before anything is
    written."""

    def why(**flags) -> str:
        args = gist_rist.preset(
            "shapes",
            **TINY
            | dict(
                root=str(shapes_root),
                val="few",
                split=str(shapes_root / "labeled.txt"),
                out=str(tmp_path / "out"),
                unlabeled=str(shapes_root / "unlabeled.txt"),
                store=str(tmp_path / "store"),
            )
            | flags,
        )
        with pytest.raises(UserError) as error:
            gist_rist.main(args)
        assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()
        return str(error.value)

    return why


def test_refused_as_a_user_types_it(line, tmp_path, io):
    for flags, said in (
        (dict(search="path"), "--path"),
        (dict(search="path", path="X"), "--path"),
        (dict(dev_size=5000), "--dev-size"),
        (dict(lr="nan"), "--lr"),
    ):
        assert said in run(line(**flags), io).error() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [(), ("X",), ("L", "LXP"), ("T1L",), ("lp",), ("F75",)], ids=str)
def test_path_that_is_none(refused, path):
    assert "--path" in refused(search=("path",), path=path, stages=3)


@pytest.mark.parametrize("path", ["F2.5", ""])
def test_path_with_an_alpha_that_is_no_share_or_without_a_letter(refused, path):
    assert "--path" in refused(search=("path",), path=(path,), stages=3)


@pytest.mark.parametrize(
    "flags",
    [
        dict(dev_size=5000),
        dict(dev_size=0),
        dict(dev_reserve=-1),
        dict(dev_reserve=5000),
        dict(beam=0),
        dict(trials=0),
        dict(stages=-1),
        dict(steps=0),
        dict(batch_size=1),
        dict(alpha=(1.5,)),
        dict(alpha=(-0.5,)),
        dict(phi=-1),
        dict(temp=0),
        dict(cl=-1),
        dict(lr=float("nan")),
        dict(crop_size=(8, 8)),
        dict(scale=(2, 1)),
        dict(seed=-1),
        dict(max_run=-1),
        dict(log_every=0),
        dict(stage0="nonsense"),
        dict(stage0="no.pt"),
    ],
    ids=words,
)
def test_setting_out_of_range(refused, flags):
    (name,) = flags
    search = ("fist", "gist", "rist")
    said = refused(**{"search": search, **flags})
    assert f"--{name.replace('_', '-')}" in said


def test_a_crop_may_be_higher_than_wide(line, tmp_path, io):
    run(line(search="path", path="L", crop_size=(48, 32)), io).ok()


def test_fist_with_an_alpha_close_to_a_bound(line, tmp_path, io):
    """Its name must stay one that the search knows."""
    run(line(search="fist", alpha=1e-5, stages=1), io).ok()
    assert results(tmp_path / "out")["trainings"] == 1


def test_used_folder_is_refused_and_stays_as_it_is(line, finished, io):
    folder = finished(search="path", path="P")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "io" not in p.parts}
    error = run(on_shapes(line.args[0], folder, search="path", path="L"), io).error()
    assert str(folder / "out") in error and "--resume" in error and "--out" in error
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "io" not in p.parts}


@pytest.fixture(scope="module")
def gta(tiny, tmp_path_factory) -> Path:
    """The folder of a run of gta_seg.py."""
    out = tmp_path_factory.mktemp("gta") / "out"
    helpers.run(tiny(out=out, steps=1, warmup_epochs=0), out.parent / "io").ok()
    return out


def test_run_into_the_folder_of_another_script(line, gta, tmp_path, io):
    shutil.copytree(gta, tmp_path / "out")
    assert "--out" in run(line(), io).error()
    assert "gta_seg.py" in run(line(resume=True), io).error() and not paths(tmp_path / "store")


@pytest.mark.parametrize("flag", ["out", "store"])
def test_out_or_store_is_a_file_or_below_one(line, tmp_path, io, flag):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        error = run(line(**{flag: place}), io).error()
        assert str(place) in error and f"--{flag}" in error
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_report_eval_and_predict_of_what_is_no_run(gta, tmp_path, io):
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (tmp_path / "empty", "there is no run"),
        (tmp_path / "nowhere", "there is no run"),
        (gta, "gta_seg.py"),
    ):
        error = run(["--report", str(folder)], io).error()
        assert str(folder) in error and said in error
    for flag in ("--eval", "--predict"):
        assert "gta_seg.py" in run([flag, str(gta / "best.pt")], io).error()


def test_report_of_a_run_that_is_not_finished(finished_copy, io):
    (finished_copy / "results.json").unlink()
    assert str(finished_copy) in run(["--report", str(finished_copy)], io).error()


def test_report_after_the_store_is_gone(line, tmp_path, io):
    run(line(search="path", path="LP"), io).ok()
    for part, names in (("*/LP", "LP"), ("*", "stage 0")):
        for folder in (tmp_path / "store").glob(part):
            shutil.rmtree(folder)
        error = run(["--report", str(tmp_path / "out")], io).error()
        assert names in error and str(tmp_path / "store") in error
    # trains them again, as the sentence says
    run(line(search="path", path="LP", resume=True), io).ok()
    run(["--report", str(tmp_path / "out")], io).ok()


def test_eval_on_other_classes(finished_copy, folder_root, io):
    (folder_root / "classes.txt").write_text("sky\nroad\n")
    line = argv(eval=finished_copy / "best.pt", dataset="folder", root=folder_root, val="val")
    assert "classes" in run(line, io).error()


def test_network_that_the_checkpoint_does_not_fit(finished_copy, io):
    error = run(argv(eval=finished_copy / "best.pt", backbone="resnet18"), io).error()
    assert str(finished_copy / "best.pt") in error


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("cl_on", ["active", "both"])
def test_broken_unlabeled_image_is_skipped_with_a_warning(
    folder_root, folder_flags, tmp_path, io, cl_on
):
    truncate(folder_root / "images" / "unlabeled" / "train_000101.jpg")
    line = folder_flags(
        unlabeled=folder_root / "images" / "unlabeled", cl_on=cl_on, keep_nodes=True
    )
    done = run(line, io).ok()
    assert "train_000101.jpg" in done.err and "Traceback" not in done.err
    (labels,) = (tmp_path / "store").glob("*/labels-")
    assert {p.name for p in labels.glob("*.png")} == {"0.png", "2.png", "3.png"}


def test_no_unlabeled_image_can_be_read(folder_root, folder_flags, io):
    for path in (folder_root / "images" / "unlabeled").iterdir():
        path.write_bytes(b"no picture")
    assert (
        "can be read"
        in run(folder_flags(unlabeled=folder_root / "images" / "unlabeled"), io).error()
    )


def test_no_unlabeled_image_left(folder_root, folder_flags, io):
    shutil.rmtree(folder_root / "images" / "unlabeled")
    error = run(folder_flags(split="random:6"), io).error()
    assert "no unlabeled image" in error and "--unlabeled" in error


def planted(root: Path, split: Path | str = "random:4") -> gist_rist.Tree:
    return gist_rist.set_up(gist_rist.preset("folder", **SHORT, root=str(root), split=str(split)))[
        0
    ]


def test_broken_image_that_is_scored_is_named(folder_root, folder_flags, tmp_path, io):
    for path in (folder_root / "images" / "val").iterdir():
        truncate(path)
    assert "val_000000.jpg" in run(folder_flags(), io).error()
    image = planted(folder_root).dev[1].image
    truncate(image)
    error = run(folder_flags(out=tmp_path / "out2", store=tmp_path / "store2"), io).error()
    assert image.name in error and not paths(tmp_path / "store2")


@pytest.mark.parametrize("part", ["labeled", "dev", "val"])
def test_broken_label_is_named(folder_root, folder_flags, io, part):
    split = folder_root / "list.txt"
    split.write_text("".join(f"{p.name}\n" for p in planted(folder_root).labeled))
    tree, line = planted(folder_root, split), folder_flags(split=split, batch_size=4, resume=True)
    label = {"labeled": tree.labeled, "dev": tree.dev, "val": tree.data.val}[part][-1].label
    with Image.open(label) as image:
        whole = image.copy()
    value = whole.copy()
    value.putpixel((5, 6), 77)
    small = whole.crop((0, 0, 40, 30))
    for broken in {"labeled": (value, whole.convert("RGB")), "dev": (value,), "val": (small,)}[
        part
    ]:
        broken.save(label)
        assert label.name in run(line, io).error()
    label.write_bytes(b"no picture")
    assert label.name in run(line, io).error()


def test_loss_that_is_not_finite_stops_with_step_and_term(line, tmp_path, io):
    error = run(line(lr=1e14, save_every=1, stage0_steps=30), io).error()
    assert re.search(r"loss\w* is not finite since step \d+", error) and "--lr" in error
    assert not paths(tmp_path / "store")


def test_an_error_of_two_processes_is_said_once(line, tmp_path, io):
    for flags in (dict(split="random:0"), dict(dev_size=5000), dict(search="path", path="X")):
        done = [started.wait() for started in start_ranks(2, line(**flags), io)]
        assert [d.code for d in done] == [2, 2] and not any("Traceback" in d.err for d in done)
        assert sum(d.err.count("error: ") for d in done) == 1
