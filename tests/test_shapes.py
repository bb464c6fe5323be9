"""data/shapes.py: the embedded set is the same everywhere, and its files are what the real formats
say."""

import hashlib
import inspect
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import lvis
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors import safe_open

from common import checkpoints
from common.errors import UserError
from common.files import read_image
from common.semantic import CITYSCAPES_IDS, find, read_label
from data import shapes

REPO = Path(__file__).resolve().parents[1]


PARTS = ("train", "val")


SMALL = {
    "voc": (shapes.make_voc, (5, 2, 3)),
    "cityscapes": (shapes.make_cityscapes, (3, 2, 64, 128)),
    "coco": (shapes.make_coco, (16, 5)),
}


small = pytest.mark.parametrize("name", SMALL)


# of pycocotools
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def digest(folder: Path) -> str:
    return hashlib.sha256(repr(sorted(files_of(folder).items())).encode()).hexdigest()


def draw_small(name: str, target: Path) -> Path:
    make, counts = SMALL[name]
    return make(target, *counts)


@pytest.fixture(scope="module")
def drawn(shapes_root, tmp_path_factory) -> tuple[Path, float]:
    """The whole set in its default sizes, and the processor seconds that all took but `voc`, which
    was drawn for other tests already."""
    root = tmp_path_factory.mktemp("shapes")
    shutil.copytree(shapes_root / "voc", root / "voc")
    start = time.process_time()
    assert shapes.main(["--root", str(root)]) == 0
    return root, time.process_time() - start


# ------------------------------------------------------------------------------ the same everywhere


@small
def test_drawn_twice_is_byte_equal_and_touches_no_global_generator(name, tmp_path):
    before = np.random.get_state(), torch.get_rng_state(), random.getstate()
    first = draw_small(name, tmp_path / "a")
    after = np.random.get_state(), torch.get_rng_state(), random.getstate()
    assert all(np.array_equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    assert torch.equal(before[1], after[1]) and before[2] == after[2]
    np.random.seed(5)
    torch.manual_seed(5)
    random.seed(5)
    assert digest(first) == digest(draw_small(name, tmp_path / "b")) and len(files_of(first)) > 5


def test_another_process_draws_the_same(tmp_path):
    code = "import sys; from pathlib import Path; from data import shapes\n"
    for name, (make, counts) in SMALL.items():
        code += f"shapes.{make.__name__}(Path(sys.argv[1]) / 'other' / {name!r}, *{counts})\n"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, env=environment, check=True
    )
    for name in SMALL:
        assert digest(draw_small(name, tmp_path / "here" / name)) == digest(
            tmp_path / "other" / name
        )


def at_once(number: int, work) -> list[int]:
    """Exit codes of processes that all begin work() at the same moment."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(number)

    def run() -> None:
        barrier.wait()
        work()

    processes = [context.Process(target=run) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_processes_at_once_end_with_one_whole_tree(tmp_path):
    assert at_once(2, lambda: shapes.make_voc(tmp_path / "both" / "voc", 30, 5, 5)) == [0, 0]
    assert digest(tmp_path / "both" / "voc") == digest(
        shapes.make_voc(tmp_path / "one" / "voc", 30, 5, 5)
    )
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == [".voc.lock", "voc"]


def test_only_the_first_of_two_processes_draws(tmp_path):
    def make(folder: Path) -> None:
        with open(tmp_path / "log.txt", "a") as log:
            log.write("drawn\n")
        time.sleep(0.3)
        (folder / "picture").write_text("x")

    assert at_once(2, lambda: shapes.once(tmp_path / "set", "voc 1", make)) == [0, 0]
    assert (tmp_path / "log.txt").read_text() == "drawn\n" and (
        tmp_path / "set" / "picture"
    ).is_file()


@small
def test_a_part_of_the_set_has_the_same_pictures(name, tmp_path):
    make, counts = SMALL[name]
    whole = files_of(draw_small(name, tmp_path / "whole"))
    less = files_of(make(tmp_path / "part", counts[0] - 2, 1, *counts[2:]))
    pictures = [path for path in less if path.endswith((".png", ".jpg"))]
    assert len(pictures) >= counts[0] - 1 and len(pictures) < sum(
        p.endswith((".png", ".jpg")) for p in whole
    )
    assert all(less[path] == whole[path] for path in pictures)
    assert len({whole[path] for path in whole if path.endswith(".jpg")}) == sum(
        p.endswith(".jpg") for p in whole
    )


def test_labeled_leaves_the_other_pictures_without_annotations(tmp_path):
    whole = draw_small("coco", tmp_path / "whole")
    few = shapes.make_coco(tmp_path / "few", *SMALL["coco"][1], labeled=6)
    names = [
        sorted(p.name for p in (few / "images" / part).iterdir()) for part in ("train", "unlabeled")
    ]
    assert [len(n) for n in names] == [6, 10] and not set(names[0]) & set(names[1])
    for kind in ("instances", "lvis"):
        full, part = (
            json.loads((root / "annotations" / f"{kind}_train.json").read_text())
            for root in (whole, few)
        )
        assert part["images"] == full["images"][:6] and len(full["images"]) == 16
        assert (
            part["annotations"] == full["annotations"][: len(part["annotations"])]
            and part["annotations"]
        )
    for name in names[1]:
        assert (few / "images" / "unlabeled" / name).read_bytes() == (
            whole / "images" / "train" / name
        ).read_bytes()


# ------------------------------------------------------------------------------------------ on disk


def test_size_and_seconds(drawn):
    root, seconds = drawn
    size = {name: sum(map(len, files_of(root / name).values())) / 2**20 for name in SMALL}
    assert seconds < 25, f"{seconds:.0f} s of processor time"
    assert size["voc"] < 30 and size["cityscapes"] < 4 and size["coco"] < 15, size


def test_a_second_call_draws_nothing(drawn, capsys):
    root, start = drawn[0], time.process_time()
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.txt")}
    assert shapes.main(["--root", str(root)]) == 0 and time.process_time() - start < 2
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.txt")} == before
    assert "1,500 files in JPEGImages" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["photo.jpg", "version.txt", "deep/version.txt"])
@small
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(name, content, tmp_path):
    target = tmp_path / name
    (target / content).parent.mkdir(parents=True)
    (target / content).write_text("1.0")
    with pytest.raises(UserError, match="holds something else.*--root"):
        draw_small(name, target)
    assert files_of(target) == {content: b"1.0"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".{name}.lock", name]


def test_a_file_or_another_variant_in_the_way_is_refused(tmp_path, capsys):
    (tmp_path / "voc").write_text("mine")
    assert shapes.main(["--root", str(tmp_path)]) == 2
    assert (
        tmp_path / "voc"
    ).read_text() == "mine" and "holds something else" in capsys.readouterr().err
    before = digest(draw_small("cityscapes", tmp_path / "set"))
    with pytest.raises(UserError):
        draw_small("coco", tmp_path / "set")
    assert digest(tmp_path / "set") == before


def test_an_older_drawing_is_replaced_and_a_failed_one_is_not(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("no space")

    (tmp_path / "set").mkdir()  # an empty folder is nothing to lose
    shapes.once(tmp_path / "set", "voc 1", lambda folder: (folder / "old").write_text("x"))
    with pytest.raises(OSError, match="no space"):
        shapes.once(tmp_path / "set", "voc 2", fail)
    assert set(files_of(tmp_path / "set")) == {"old", "version.txt"}
    shapes.once(tmp_path / "set", "voc 2", lambda folder: (folder / "new").write_text("x"))
    assert set(files_of(tmp_path / "set")) == {"new", "version.txt"}


# ---------------------------------------------------------------------------------------------- VOC


def test_voc_is_found_and_its_labels_are_palette_files_of_balanced_classes(drawn):
    root = drawn[0]
    data, tune = find("shapes", root / "voc"), find("shapes", root / "voc", val="tune")
    assert data.classes == ["background", *shapes.SEMANTIC_CLASSES]
    assert (len(data.train), len(tune.val), len(data.val)) == (1000, 200, 300)
    parts = {"train": list(data.train.values()), "tune": tune.val, "val": data.val}
    assert len({p.name for pictures in parts.values() for p in pictures}) == 1500
    for part, pictures in parts.items():
        images, pixels = np.zeros(len(data.classes)), np.zeros(len(data.classes))
        for number, picture in enumerate(pictures):
            with Image.open(picture.label) as file:
                assert file.mode == "P" and file.getpalette()[3:6] == [128, 0, 0]
            label = read_label(picture.label, data).numpy()  # refuses values >= number of classes
            count = np.bincount(label.ravel(), minlength=len(data.classes))
            images, pixels = images + (count > 0), pixels + count
            if number < 20:
                assert read_image(picture.image).shape[1:] == label.shape
        away = np.abs(images[1:] / images[1:].mean() - 1).max()
        assert away < (0.2 if part == "train" else 0.45), (part, images)
        assert pixels[1:].max() < 5 * pixels[1:].min() and 0.2 < pixels[0] / pixels.sum() < 0.95, (
            part,
            pixels,
        )


# --------------------------------------------------------------------------------------- Cityscapes


def test_cityscapes_is_found_with_all_classes_in_both_parts(drawn):
    data = find("cityscapes", drawn[0] / "cityscapes")
    assert (len(data.train), len(data.val)) == (16, 4)
    for pictures in (data.train.values(), data.val):
        found = Counter()
        for picture in pictures:
            label = read_label(picture.label, data)
            assert read_image(picture.image).shape == (3, 128, 256) and label.shape == (128, 256)
            found.update(np.unique(label.numpy()).tolist())
        assert set(found) == {*range(19), 255}
    assert (
        len({p.image.parent for p in data.train.values()}) >= 2
        and len({p.image.parent for p in data.val}) >= 2
    )


def test_cityscapes_instances_agree_with_labels(drawn):
    root, things = drawn[0] / "cityscapes", Counter()
    paths = sorted((root / "gtFine").glob("*/*/*_gtFine_instanceIds.png"))
    assert len(paths) == 20
    for path in paths:
        stem = path.name.removesuffix("_gtFine_instanceIds.png")
        assert (
            re.fullmatch(rf"{path.parent.name}_\d{{6}}_\d{{6}}", stem)
            and "_" not in path.parent.name
        )
        assert (
            root
            / "leftImg8bit"
            / path.parent.parent.name
            / path.parent.name
            / f"{stem}_leftImg8bit.png"
        ).is_file()
        with (
            Image.open(path) as file,
            Image.open(path.with_name(f"{stem}_gtFine_labelIds.png")) as labels,
        ):
            assert file.mode in ("I;16", "I") and labels.mode == "L"
            instances, label = np.array(file).astype(int), np.array(labels)
        assert (
            np.array_equal(np.where(instances >= 1000, instances // 1000, instances), label)
            and label.max() <= 33
        )
        ids = np.unique(instances)
        assert set((ids[ids >= 1000] // 1000).tolist()) <= set(range(24, 34)), (
            "an instance of stuff"
        )
        assert set(ids[ids < 1000].tolist()) <= {*range(24)} | {24}, (
            "of the things only people are a group"
        )
        assert {26000, 26001} <= set(ids.tolist()), "two cars or more"
        things.update((ids[ids >= 1000] // 1000).tolist())
        things["group"] += 24 in ids
    assert set(CITYSCAPES_IDS[11:]) < set(things) and things["group"] > 5
    assert 29 in things, "a caravan: a thing that is no class"


# ------------------------------------------------------------------------------------ COCO and LVIS


def check_masks(images: dict[int, dict], annotations: list[dict], mask_of) -> None:
    taken = {
        number: np.zeros((image["height"], image["width"]), int) for number, image in images.items()
    }
    for a in annotations:
        mask = mask_of(a)
        assert mask.shape == taken[a["image_id"]].shape, "the mask has another size than its image"
        taken[a["image_id"]] += mask
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert a["area"] == mask.sum() >= 12 and a["bbox"] == box, a["id"]
    assert max(t.max() for t in taken.values()) == 1, "masks overlap"
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))


@pytest.fixture(scope="module")
def cocos(drawn) -> dict[str, COCO]:
    return {
        part: COCO(drawn[0] / "coco" / "annotations" / f"instances_{part}.json") for part in PARTS
    }


@pytest.fixture(scope="module")
def lvises(drawn) -> dict[str, lvis.LVIS]:
    return {
        part: lvis.LVIS(str(drawn[0] / "coco" / "annotations" / f"lvis_{part}.json"))
        for part in PARTS
    }


def test_coco_files_hold_visible_masks_and_crowds(drawn, cocos):
    for part, coco in cocos.items():
        ids = sorted(coco.cats)
        assert (
            len(ids) == 24 and len(np.unique(np.diff(ids))) > 1 and ids[-1] <= 90 and 0 not in ids
        )
        assert {"info", "licenses", "images", "annotations", "categories"} == set(coco.dataset)
        annotations = coco.dataset["annotations"]
        assert all(isinstance(a["segmentation"]["counts"], str) for a in annotations)
        check_masks(coco.imgs, annotations, coco.annToMask)
        assert sum(a["iscrowd"] for a in annotations) >= 6 and {
            a["iscrowd"] for a in annotations
        } == {0, 1}
        folder = drawn[0] / "coco" / "images" / part
        assert {image["file_name"] for image in coco.imgs.values()} == {
            p.name for p in folder.iterdir()
        }
        for image in list(coco.imgs.values())[:40]:
            with Image.open(folder / image["file_name"]) as file:
                assert (file.format, file.mode, file.size) == (
                    "JPEG",
                    "RGB",
                    (image["width"], image["height"]),
                )
        assert len({(image["height"], image["width"]) for image in coco.imgs.values()}) == 3
    assert (len(cocos["train"].imgs), len(cocos["val"].imgs)) == (400, 100)
    assert not set(cocos["train"].imgs) & set(cocos["val"].imgs)


def test_perfect_results_score_one(cocos):
    """Crowds are ignored, every class is scored, and the evaluator accepts the file."""
    coco = cocos["val"]
    results = [
        {key: a[key] for key in ("image_id", "category_id", "segmentation")} | {"score": 1.0}
        for a in coco.dataset["annotations"]
    ]
    evaluator = COCOeval(coco, coco.loadRes(results), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.stats[0] == pytest.approx(1.0)
    assert (evaluator.eval["precision"][:, :, :, 0, 2] > -1).all(), (
        "a class without a single object to score"
    )


def test_lvis_files_hold_the_same_masks_as_polygons(cocos, lvises):
    for part, data in lvises.items():
        assert sorted(data.cats) == list(range(1, 25)) and len(data.anns) == len(
            data.dataset["annotations"]
        )
        assert all(
            isinstance(a["segmentation"], list)
            and min(map(len, a["segmentation"])) >= 8
            and "iscrowd" not in a
            for a in data.anns.values()
        )
        check_masks(data.imgs, data.dataset["annotations"], data.ann_to_mask)
        coco, known = cocos[part], {}
        assert set(coco.imgs) == set(data.imgs) and not any(
            "file_name" in image for image in data.imgs.values()
        )
        for a in coco.dataset["annotations"]:
            known[
                a["image_id"], coco.cats[a["category_id"]]["name"], coco.annToMask(a).tobytes()
            ] = a["iscrowd"]
        single = 0
        for a in data.anns.values():
            name, image = data.cats[a["category_id"]]["name"], data.imgs[a["image_id"]]
            same = known.get((a["image_id"], name, data.ann_to_mask(a).tobytes()))
            assert same == 0 or a["category_id"] in image["not_exhaustive_category_ids"]
            single += same == 0
        assert single == sum(not crowd for crowd in known.values()), (
            "COCO has an object that LVIS lacks"
        )


def test_lvis_federated_lists_tell_the_truth(lvises):
    for part, data in lvises.items():
        present, negatives, partial = defaultdict(set), Counter(), 0
        ident = {data.cats[c]["name"]: c for c in data.cats}
        for a in data.anns.values():
            present[a["image_id"]].add(a["category_id"])
        for index, image in enumerate(data.dataset["images"][:150]):
            _, _, classes, single = shapes.instance_scene(part, index)
            names = list(shapes.INSTANCE_CLASSES)
            negative, some = (
                set(image["neg_category_ids"]),
                set(image["not_exhaustive_category_ids"]),
            )
            assert len(negative) == 6 and negative <= set(data.cats)
            assert not negative & {ident[names[c]] for c in classes}, (
                "a negative class is in the picture"
            )
            assert some <= present[image["id"]] and some <= {
                ident[names[c]] for c in classes[single:]
            }
            negatives.update(negative)
            partial += len(some)
        assert partial >= 6 and set(negatives) == set(data.cats)
        assert len({tuple(image["neg_category_ids"]) for image in data.imgs.values()}) > 50


def test_lvis_frequencies_and_the_long_tail(lvises):
    images, instances = defaultdict(set), Counter()
    for a in lvises["train"].anns.values():
        images[a["category_id"]].add(a["image_id"])
        instances[a["category_id"]] += 1
    groups, held = Counter(), Counter(a["category_id"] for a in lvises["val"].anns.values())
    for c, category in lvises["train"].cats.items():
        count = len(images[c])
        assert (category["image_count"], category["instance_count"]) == (
            count,
            instances[c],
        ) and count > 0
        assert category["frequency"] == ("r" if count <= 10 else "c" if count <= 100 else "f")
        assert (
            category["synset"] == f"{category['name']}.n.01" and lvises["val"].cats[c] == category
        )
        assert held[c] >= 3, f"{category['name']} can hardly be scored"
        groups[category["frequency"]] += 1
    assert min(groups[f] for f in "rcf") >= 3 and sum(groups.values()) == 24, groups


def test_a_rare_class_has_ten_training_pictures_at_most(tmp_path):
    for number in range(16, 60):
        root = shapes.make_coco(tmp_path / str(number), number, 0)
        data = json.loads((root / "annotations" / "lvis_train.json").read_text())
        frequency = {
            category["image_count"]: category["frequency"] for category in data["categories"]
        }
        if {10, 11} <= set(frequency):
            break
    assert (frequency[10], frequency[11]) == ("r", "c")


def test_the_tail_has_lookalikes():
    pairs = list(combinations(shapes.INSTANCE_CLASSES.values(), 2))
    assert len(set(shapes.INSTANCE_CLASSES.values())) == 24
    assert sum(a[0] == b[0] and a[1] != b[1] and a[2] == b[2] for a, b in pairs) >= 5, (
        "other pattern alone"
    )
    assert (
        sum(a[:2] == b[:2] and min((a[2] - b[2]) % 1, (b[2] - a[2]) % 1) < 0.15 for a, b in pairs)
        >= 5
    ), "next hue"
    assert {form for form, _, _ in shapes.INSTANCE_CLASSES.values()} == set(shapes.FORMS[:8]), (
        "no pre-training form"
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 1.0])
def test_polygons_cover_exactly_the_mask(share):
    rng = np.random.default_rng(int(10 * share))
    for _ in range(20):  # noise: holes, islands, touching corners
        mask = rng.random((11, 14)) < share
        found = shapes.polygons(mask)
        rle = [coco_mask.decode(coco_mask.frPyObjects([p], *mask.shape))[..., 0] for p in found]
        assert np.array_equal(np.sum(rle, axis=0), mask) and all(len(p) >= 8 for p in found)
    assert shapes.polygons(np.zeros((4, 5), bool)) == []


def test_polygons_of_simple_masks():
    ring = np.ones((5, 5), bool)
    assert shapes.polygons(ring) == [[0, 0, 5, 0, 5, 5, 0, 5]]
    ring[2, 2] = False
    assert len(shapes.polygons(ring)) == 2, "a hole is cut open"


def test_the_weights_beside_the_program_are_of_its_recipe_and_fit(tmp_path):
    file = shapes.pretrained(tmp_path, "test_resnet")
    assert file == shapes.SHIPPED and not any(tmp_path.iterdir())
    with safe_open(file, "pt") as content:
        facts = content.metadata()
    defaults = {n: p.default for n, p in inspect.signature(shapes.pretrain).parameters.items()}
    assert facts["recipe"] == shapes.recipe_of(
        "test_resnet", defaults["steps"], defaults["batch_size"]
    )
    net = timm.create_model("test_resnet", num_classes=0)
    reports = checkpoints.load_matching(net, checkpoints.read_weights(file), "weights")
    assert [line.split(" (")[0] for line in reports] == ["in the file, not in the network"]


def test_another_network_is_pre_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shapes, "PRETRAIN_PICTURES", 50)
    made = shapes.pretrain(tmp_path, "test_resnet", steps=2, batch_size=4)
    with safe_open(made, "pt") as content:
        assert content.metadata()["recipe"].endswith(" 2 4")
    net = timm.create_model("test_resnet", num_classes=0)
    assert checkpoints.load_matching(net, checkpoints.read_weights(made), "weights")
    assert "2 steps" in capsys.readouterr().out
    assert shapes.pretrain(tmp_path, "test_resnet", steps=2, batch_size=4) == made
    assert capsys.readouterr().out == ""
