"""What --predict and --export write: the same in tiles and whole, upright, readable as data; and
networks that load elsewhere."""

import importlib
import json
import re
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from common import checkpoints, cli, files, instances, predictions
from common.distributed import World
from common.errors import UserError

CLASSES = ["sky", "road", "tree"]


def by_colour(part: torch.Tensor) -> torch.Tensor:
    """A network that looks at single pixels: (3, h, w) uint8 -> probabilities (3, h, w)."""
    return (part.float() / 40).softmax(0)


def noise(*size: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).byte()


# ------------------------------------------------------------------------------------------- tiles
@pytest.mark.parametrize("size", [(1, 1), (7, 8), (8, 8), (9, 8), (1, 40), (40, 3), (33, 47)])
@pytest.mark.parametrize("tile", [1, 8, 13])
def test_a_network_without_context_sees_the_same_in_tiles(size, tile):
    image = noise(*size)
    label, confidence = predictions.classify(image, by_colour)
    assert (
        label.shape == confidence.shape == size and label.dtype == confidence.dtype == torch.uint8
    )
    tiled = predictions.classify(image, by_colour, tile)
    assert torch.equal(tiled[0], label)
    assert (tiled[1].int() - confidence.int()).abs().max() <= 1  # rounding of the weighted mean


def test_no_window_is_larger_than_the_tile_and_every_pixel_is_seen():
    seen = torch.zeros(50, 70)
    place = torch.arange(50 * 70).view(1, 50, 70).expand(3, -1, -1)  # which pixel it is

    def watching(part):
        assert max(part.shape[-2:]) <= 16
        seen.view(-1)[part[0].flatten()] += 1
        return torch.full((3, *part.shape[-2:]), 1 / 3)

    _, confidence = predictions.classify(place, watching, 16)
    assert seen.min() >= 1 and (confidence == 85).all()  # a third everywhere: weights add up to one


def test_where_windows_disagree_the_middle_of_a_window_counts_more():
    """Windows of 8 begin at 0, 4, 8; the first says class 0, the others class 1."""
    calls = []

    def first_is_another(part):
        calls.append(part.shape)
        probabilities = torch.zeros(2, *part.shape[-2:])
        probabilities[min(len(calls) - 1, 1)] = 1
        return probabilities

    label, _ = predictions.classify(noise(8, 16), first_is_another, 8)
    assert len(calls) == 3
    # Columns 4 to 7 have weights 4, 3, 2, 1 of the first window and 1, 2, 3, 4 of the second.
    assert label[0].tolist() == [0] * 6 + [1] * 10


def test_the_memory_that_tiles_need_does_not_grow_with_the_height():
    largest = []

    def watching(part):
        largest.append(part.numel())
        return by_colour(part)

    before = predictions.F.pad
    held = []

    def pad(sums, border):
        held.append(sums.numel())
        return before(sums, border)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions.F, "pad", pad)
        predictions.classify(noise(640, 32), watching, 16)
    assert max(largest) == 3 * 16 * 16 and max(held) <= 4 * 16 * 32


# ---------------------------------------------------------------------------------- labels as files
@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for name, size in {"a": (20, 30), "b": (33, 17)}.items():
        pixels = noise(*size).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def predict(paths: list, out: Path, tile: int = 0) -> None:
    predictions.predict_labels(
        [str(path) for path in paths],
        out,
        CLASSES,
        lambda images: images.float() / 40,  # whose softmax is `by_colour`
        World(),
        tile,
    )


def test_labels_confidences_and_names(photos, tmp_path, capsys):
    predict([photos], tmp_path / "out", tile=16)
    image = files.read_image(photos / "a.png")
    label = np.array(Image.open(tmp_path / "out" / "labels" / "a.png"))
    assert (label == image.numpy().argmax(0)).mean() > 0.99  # ties aside
    confidence = np.array(Image.open(tmp_path / "out" / "confidence" / "a.png"))
    expected = 255 * by_colour(image).max(0).values.numpy()
    assert abs(confidence - expected).max() <= 1
    assert (tmp_path / "out" / "classes.txt").read_text() == "sky\nroad\ntree\n"
    with Image.open(tmp_path / "out" / "overlays" / "a.jpg") as overlay:
        assert overlay.height > 20  # its legend names the classes
    assert "2 images" in capsys.readouterr().out


def test_predicted_labels_are_the_labels_of_a_data_set(photos, tmp_path):
    """--dataset folder reads what --predict wrote, with the pictures that it was written for."""
    from common import semantic

    predict([photos], tmp_path / "out")
    (tmp_path / "labels").mkdir()
    (tmp_path / "out" / "labels").rename(tmp_path / "labels" / "train")
    (tmp_path / "out" / "classes.txt").rename(tmp_path / "classes.txt")
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").symlink_to(tmp_path / kind / "train")
    data = semantic.find("folder", tmp_path, "val")
    assert data.classes == CLASSES and data.train.keys() == {"a", "b"}
    image, label = semantic.load_picture(data.train["b"], data)
    assert torch.equal(label.long(), by_colour(image).argmax(0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    """A viewer shows the same scene for each of the eight notes of a camera; so do predictions."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(noise(20, 30).permute(1, 2, 0).numpy())
    stored.save(tmp_path / "a.png", exif=exif)
    predict([tmp_path / "a.png"], tmp_path / "out")
    shown = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))).transpose(2, 0, 1)
    label = np.array(Image.open(tmp_path / "out" / "labels" / "a.png"))
    assert (label == by_colour(torch.from_numpy(shown)).argmax(0).numpy()).all()
    assert label.shape == ((30, 20) if orientation >= 5 else (20, 30))
    assert files.read_image(tmp_path / "a.png").shape == (3, 20, 30)  # training does not turn it


def test_a_file_that_cannot_be_written_stops_with_its_error(photos, tmp_path):
    (tmp_path / "out" / "labels" / "b.png").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        predict([photos], tmp_path / "out")


# ----------------------------------------------------------------------------------------- objects
def rectangles(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three objects: a sure one, a doubtful one, and one without a pixel."""
    masks = torch.zeros(3, *image.shape[-2:], dtype=torch.bool)
    masks[0, 2:9, 3:13] = True
    masks[1, 5:, :4] = True
    return torch.tensor([1, 0, 1]), torch.tensor([0.9, 0.3, 0.8]), masks


def test_predicted_objects_are_a_data_set(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    out = tmp_path / "out"
    paths = [Path("a.png"), Path("b.png")]
    predictions.predict_objects(paths, out, rectangles, [7, 3], ["cat", "dog"], World())
    results = json.loads((out / "predictions.json").read_text())
    assert [(r["image_id"], r["score"]) for r in results[:2]] == [
        ("a.png", pytest.approx(0.9)),
        ("a.png", pytest.approx(0.3)),
    ]
    assert len(results) == 6
    data = json.loads((out / "pseudo_labels.json").read_text())
    assert [a["area"] for a in data["annotations"]] == [70, 70]
    assert [a["bbox"] for a in data["annotations"]] == [[3, 2, 10, 7]] * 2
    assert [(i["file_name"], i["height"]) for i in data["images"]] == [
        (str(photos / "a.png"), 20),
        (str(photos / "b.png"), 33),
    ]


def test_a_run_reads_the_predicted_objects(photos, tmp_path):
    out = tmp_path / "out"
    paths = sorted(photos.iterdir())
    predictions.predict_objects(paths, out, rectangles, [7, 3], ["cat", "dog"], World())
    path = str(out / "pseudo_labels.json")
    data = instances.find("coco", tmp_path, train_json=path, val_json=path)
    assert data.classes == ["dog", "cat"]  # by their ids, 3 and 7
    assert [photo.image for photo in data.train] == paths
    assert [len(photo.things) for photo in data.train] == [1, 1]


# ------------------------------------------------------------------------------------------- export
NETWORKS = {
    "gta_seg": ("SegNet", ["student", "teacher", "gta"], "teacher"),
    "gist_rist": ("SegNet", ["student"], "student"),
    "guided_distillation": ("Mask2Former", ["supervised", "student", "teacher"], "student"),
    "better_pseudo_labels": ("Detector", ["student", "teacher"], "teacher"),
}


@pytest.fixture(params=NETWORKS)
def checkpoint(request, tmp_path) -> tuple[str, Path, dict]:
    """A script's name, a checkpoint of its small networks in channels_last, and their weights."""
    script = importlib.import_module(request.param)
    args = script.preset("shapes", weights="none")
    name, names, _ = NETWORKS[request.param]
    weights = {}
    for network in names:
        made = getattr(script, name)(args, 3).to(memory_format=torch.channels_last)
        weights[network] = made.state_dict()
    state = {"step": 5, "networks": weights, "classes": CLASSES, "settings": vars(args)}
    checkpoints.save_checkpoint(tmp_path / "best.pt", script.SCRIPT, state)
    return request.param, tmp_path / "best.pt", weights


def test_the_exported_network_loads_with_a_few_lines_of_torch(checkpoint, monkeypatch, capsys):
    name, path, weights = checkpoint
    script = importlib.import_module(name)
    monkeypatch.setattr(cli, "leave", sys.exit)
    line = ["--export", str(path)]
    cli.cli(script.Args, script.settings, script.main, choosers=script.CHOOSERS, argv=line)
    said = capsys.readouterr().out
    file = path.with_name("best.pt.safetensors")
    network, _, returned = NETWORKS[name]
    assert str(file) in said and returned in said
    blocks = re.findall("```python\n(.*?)```", (helpers.REPO / "README.md").read_text(), re.DOTALL)
    program = next(block for block in blocks if "safe_open" in block)
    program = program.replace("gta_seg", name, 1).replace("SegNet", network)
    done = helpers.command(["-c", program, str(file)]).ok()
    assert done.out.split(" ", 1) == [returned, f"{CLASSES} {len(weights[returned])}\n"]
    found = load_file(file)
    assert found.keys() == weights[returned].keys()
    assert all(torch.equal(found[key], value) for key, value in weights[returned].items())


def test_a_file_that_is_no_checkpoint_is_not_exported(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="best.pt is not a readable checkpoint"):
        checkpoints.export(tmp_path / "best.pt", "gta_seg.py", ("student",))
    assert len(list(tmp_path.iterdir())) == 1
