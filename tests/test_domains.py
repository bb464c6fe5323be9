"""The scenes at dusk of data/shapes.py, and docs/domains.py, which compares the two domains."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPO

from common import cli, instances, semantic
from data import shapes
from data.drawing import DUSK, draw, generator

SCRIPTS = ["gta_seg", "gist_rist", "guided_distillation", "better_pseudo_labels"]


def scenes(domain):
    return [shapes.semantic_scene("train", index, domain) for index in range(40)]


def test_dusk_is_darker_coarser_and_has_the_same_classes():
    day, dusk = scenes(None), scenes(DUSK)
    for part in (day, dusk):
        assert set(np.unique([label for _, label in part])) == set(range(7))
    brightness = [np.mean([picture for picture, _ in part]) for part in (day, dusk)]
    assert brightness[1] < 0.8 * brightness[0]

    def roughness(part):  # between neighbours on the ground
        steps = [
            np.abs(np.diff(p.astype(float), axis=1))[label[:, 1:] == 0].mean() for p, label in part
        ]
        return np.mean(steps)

    assert roughness(dusk) > 1.5 * roughness(day)


def test_a_domain_changes_how_a_scene_looks_and_not_what_lies_where():
    kinds = [("circle", "stripes", 0.1)]
    first = draw(generator("a"), kinds, [0], shapes.SEMANTIC, None)
    again = draw(generator("a"), kinds, [0], shapes.SEMANTIC)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(scenes(None)[0][1], scenes(DUSK)[0][1]), "no scene is drawn twice"


def test_sets_at_dusk_are_read_as_those_by_day(tmp_path):
    folder = shapes.make_folder(tmp_path / "semantic", DUSK, train=3, tune=1, val=2)
    data = semantic.find("folder", folder, "val")
    assert len(data.train) == 3 and len(data.val) == 2
    assert data.classes == ["background", *shapes.SEMANTIC_CLASSES]
    image, label = semantic.load_picture(data.val[0], data)
    assert image.shape[1:] == label.shape == (64, 64)
    for make, dataset in ((shapes.make_things, "coco"), (shapes.make_tail, "lvis")):
        found = []
        for domain in (None, DUSK):
            place = make(tmp_path / f"{dataset}-{domain is None}", 4, 1, 2, domain=domain)
            found.append(instances.find(dataset, place, "", "", "", "val", None))
        day, dusk = found
        assert day.classes == dusk.classes and len(day.val) == len(dusk.val)
        for a, b in zip(day.val, dusk.val, strict=True):
            assert a.image.read_bytes() != b.image.read_bytes()


def domains(*arguments: str, cwd=REPO) -> str:
    line = [sys.executable, str(REPO / "docs" / "domains.py"), *arguments]
    return subprocess.run(line, cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_planned_command_is_one_of_the_script(script):
    import importlib

    module = importlib.import_module(script)
    lines = domains("plan", "--scripts", f"{script}.py", "--draws", "2").splitlines()
    assert len(lines) == (4 if script == "gist_rist" else 6)
    seeds = set()
    for line in lines:
        python, name, *flags = line.split()
        assert (python, name) == ("python", f"{script}.py")
        seeds.add(cli.parse(module.Args, module.settings, module.CHOOSERS, flags).split_seed)
    assert seeds == {0, 1}


def test_the_table_pairs_the_runs_by_draw(tmp_path):
    runs = tmp_path / "runs"
    scores = {  # by day, at dusk
        "labels-alone": ("student", [(50, 20), (40, 10)]),
        "unlabeled-by-day": ("teacher", [(53, 20), (45, 11)]),
        "unlabeled-at-dusk": ("teacher", [(51, 30)]),
    }
    for setting, (network, draws) in scores.items():
        for draw_number, (day, dusk) in enumerate(draws):
            folder = runs / f"gta_seg-{setting}-d{draw_number}"
            folder.mkdir(parents=True)
            for name, miou in (("results.json", day), ("last.pt.results.json", dusk)):
                (folder / name).write_text(json.dumps({network: {"last": {"miou": miou}}}))
    table = domains("table", "--scripts", "gta_seg.py", "--runs", str(runs))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert rows[0] == ["labels alone", "45.00 (50.0, 40.0)", "", "15.00 (20.0, 10.0)", "", ""]
    assert rows[1][2:5:2] == ["+4.00 ± 1.41", "+0.50 ± 0.71"]
    assert rows[2][1:5] == ["51.00 (51.0)", "+1.00", "30.00 (30.0)", "+10.00"]


def test_the_table_of_searches_knows_the_best_node_at_dusk(tmp_path):
    runs, nodes = tmp_path / "runs", tmp_path / "nodes"
    at_dusk = {"": 10, "P": 30, "L": 20}
    for path, miou in at_dusk.items():
        node = nodes / path if path else tmp_path / "stage0"
        node.mkdir(parents=True, exist_ok=True)
        record = {"student": {"last": {"miou": miou}}}
        (node / "weights.pt.results.json").write_text(json.dumps(record))
    results = {
        "stage0_folder": str(tmp_path / "stage0"),
        "nodes": str(nodes),
        "visited": {"gist": ["P", "L"], "rist": ["L"], "path": ["L"]},
        "stage0": {"path": "", "miou": 40},
        "gist": {"path": "L", "miou": 44},
        "rist": {"path": "L", "miou": 44},
        "path": {"path": "", "miou": 40},
    }
    folder = runs / "gist_rist-unlabeled-by-day-d0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    table = domains("table", "--scripts", "gist_rist.py", "--runs", str(runs))
    assert "| GIST, unlabeled by day | 44.00 (44.0) | +4.00 | 20.00 (20.0) | +10.00 |  |" in table
    assert "| best node at dusk, unlabeled by day |  |  | 30.00 (30.0) | +20.00 |  |" in table
