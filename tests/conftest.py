"""The embedded data set, drawn once per session, with short lists beside its own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

DRAWS = "the first step of a process takes other dropout: the DataLoader draws its seed after seed_torch (gta_seg.py)"


# part of a test's name -> what the product does; take the line out when it is mended (strict: it
# tells)
DEFECTS = {}


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        for part, reason in DEFECTS.items():
            if part in item.nodeid and item.path.name in (
                "test_runs.py",
                "test_errors.py",
                "test_processes.py",
            ):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory) -> Path:
    """A root for --dataset shapes. `few` (7 images) can be scored with --val; unlabeled.txt lists 8
    images."""
    from data import shapes

    root = tmp_path_factory.mktemp("shapes")
    voc = shapes.make_voc(root / "voc")
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "few.txt").write_text(
        "".join((lists / "val.txt").read_text().splitlines(keepends=True)[:7])
    )
    train = (lists / "train.txt").read_text().splitlines(keepends=True)
    (root / "unlabeled.txt").write_text("".join(train[100:108]))
    (root / "labeled.txt").write_text("".join(train[:8]))
    return root


@pytest.fixture(scope="session")
def tiny(shapes_root):
    """tiny(out=..., steps=...) -> a command line on a few shapes: two steps to an epoch, two of
    them warm-up."""
    import helpers

    def line(**flags) -> list[str]:
        return helpers.argv(
            **{
                "dataset": "shapes",
                "root": shapes_root,
                "val": "few",
                "steps": 8,
                "split": shapes_root / "labeled.txt",
                "unlabeled": shapes_root / "unlabeled.txt",
                **helpers.TINY,
                "log_every": 1,
                **flags,
            }
        )

    return line


@pytest.fixture
def folder_root(shapes_root, tmp_path) -> Path:
    """A root for --dataset folder that a test may break: 8 training, 3 scored and 4 unlabeled
    images of shapes."""
    voc, root = shapes_root / "voc", tmp_path / "folder"
    for part, names in {"train": range(8), "val": range(3), "unlabeled": range(100, 104)}.items():
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for i in names:
            name = f"{'val' if part == 'val' else 'train'}_{i:06d}"
            shutil.copy(voc / "JPEGImages" / f"{name}.jpg", root / "images" / part)
            if part != "unlabeled":
                shutil.copy(voc / "SegmentationClass" / f"{name}.png", root / "labels" / part)
    shutil.copy(voc / "classes.txt", root)
    return root


@pytest.fixture
def folder_line(folder_root, tmp_path):
    """folder_line(...) -> a command line on `folder_root`."""
    import helpers

    def line(**flags) -> list[str]:
        return helpers.argv(
            **{
                "dataset": "folder",
                "root": folder_root,
                "split": "random:4",
                "steps": 2,
                **helpers.TINY,
                "out": tmp_path / "run",
                "warmup_epochs": 0,
                "log_every": 1,
                **flags,
            }
        )

    return line


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
