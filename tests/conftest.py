"""The embedded data set, drawn once for all workers, with short lists beside its own."""

import os
import shutil
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("instance_runs")  # before a test file imports it


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Which tests stay on one worker. (The groups that pytest-xdist 3.8 forms by a mark come apart
    with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return helpers.stays_with(nodeid)

    return Scheduling(config, log)


@pytest.fixture
def io(tmp_path) -> Path:
    """Where a started process writes what it says."""
    return tmp_path / "io"


@pytest.fixture(scope="session")
def common_folder(tmp_path_factory) -> Path:
    """A temporary folder that all workers of this run see; `helpers.once` makes things in it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def shapes_root(common_folder) -> Path:
    """A root for --dataset shapes. `few` (7 images) can be scored with --val; unlabeled.txt lists 8
    images."""
    from data import shapes

    def make(root: Path) -> None:
        lists = shapes.make_voc(root / "voc") / "ImageSets" / "Segmentation"
        scored = (lists / "val.txt").read_text().splitlines(keepends=True)
        train = (lists / "train.txt").read_text().splitlines(keepends=True)
        (lists / "few.txt").write_text("".join(scored[:7]))
        (root / "unlabeled.txt").write_text("".join(train[100:108]))
        (root / "labeled.txt").write_text("".join(train[:8]))

    return helpers.once(common_folder / "shapes", make)


@pytest.fixture(scope="session")
def tiny(shapes_root):
    """tiny(out=..., steps=...) -> a command line on a few shapes: two steps to an epoch, two of
    them warm-up."""

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
