"""What --predict and --export write: the same in tiles and whole, upright, readable as data; and
networks that load elsewhere."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scipy import ndimage

from common import checkpoints, cli, files, instances, predictions
from common.distributed import World
from common.errors import UserError
from common.outlines import coco_mask

CLASSES = ["sky", "road", "tree"]


def by_colour(part: torch.Tensor) -> torch.Tensor:
    """A network that looks at single pixels: (3, h, w) uint8 -> probabilities (3, h, w)."""
    return (part.float() / 40).softmax(0)


def noise(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed)).byte()


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


# --------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("workers", [0, 2])
def test_predicting_passes_over_what_is_no_image(tmp_path, capsys, workers):
    for name in ("a.png", "c.png"):
        Image.new("RGB", (5, 3)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    paths = sorted(tmp_path.iterdir())
    found = [
        [(p.place, tuple(p.image.shape)) for p in predictions.readable(paths, world, workers)]
        for world in (World(0, 2), World(1, 2))
    ]
    assert found == [[(0, (3, 3, 5)), (2, (3, 3, 5))], []]
    assert "passed over: " + str(paths[1]) in capsys.readouterr().err
    with pytest.raises(UserError, match="b.jpg cannot be read as an image"):
        list(predictions.readable(paths[1:2], World(), workers))


def test_workers_decode(photos, monkeypatch):
    monkeypatch.setattr(predictions, "read_image", lambda *_, **__: torch.tensor(os.getpid()))
    paths = sorted(photos.iterdir())
    for workers, here in ((0, True), (2, False)):
        found = predictions.readable(paths, World(), workers)
        assert [int(p.image) == os.getpid() for p in found] == [here] * 2


def loaded(*sizes: tuple[int, int]):
    for place, size in enumerate(sizes):
        yield predictions.Loaded(place, torch.zeros(3, *size, dtype=torch.uint8))


def places_of(batches) -> list[list[int]]:
    return [[picture.place for picture in batch] for batch in batches]


def test_pictures_of_one_size_are_together(monkeypatch):
    monkeypatch.setattr(predictions, "PIXELS", 300)
    small, wide, large, huge = (8, 12), (12, 8), (12, 12), (20, 20)  # 3, 3, 2 and none in 300
    sizes = [small, wide, large, small, huge, large, wide, small, small, large]
    batches = places_of(predictions.batches(loaded(*sizes)))
    assert batches == [[4], [2, 5], [0, 3, 7], [1, 6], [8], [9]]
    in_tiles = places_of(predictions.batches(loaded(*sizes), tile=10))
    assert in_tiles == [[place] for place in range(10)]  # each is larger than a tile
    in_squares = places_of(predictions.batches(loaded(*sizes), side=10))
    assert in_squares == [[0, 1, 2], [3, 4], [5, 6], [7, 8, 9]]
    monkeypatch.setattr(predictions, "TOGETHER", 2)
    assert places_of(predictions.batches(loaded(*[small] * 5))) == [[0, 1], [2, 3], [4]]


def test_few_pictures_wait_for_others_of_their_size():
    read = []

    def endless():
        for picture in loaded(*((1, n) for n in range(1, 1000))):
            read.append(picture)
            yield picture

    first = itertools.islice(predictions.batches(endless()), 3)
    assert places_of(first) == [[0], [1], [2]]
    assert len(read) == predictions.HELD + 3


def test_a_folder_of_many_sizes_is_predicted_whole(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    expected = {}
    for place in range(40):
        image = noise(8 + place % 3, 9, seed=place)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{place}.png")
        expected[f"{place}.png"] = by_colour(image).argmax(0).numpy()
    for workers in (0, 1):
        out = tmp_path / f"out{workers}"
        predict([folder], out, workers=workers)
        assert {path.name for path in (out / "labels").iterdir()} == expected.keys()
        for name, label in expected.items():
            assert (np.array(Image.open(out / "labels" / name)) == label).all()


# ---------------------------------------------------------------------------------- labels as files
@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for name, size in {"a": (20, 30), "b": (33, 17)}.items():
        pixels = noise(*size).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def predict(paths: list, out: Path, tile: int = 0, workers: int = 0) -> None:
    predictions.predict_labels(
        [str(path) for path in paths],
        out,
        CLASSES,
        lambda images: images.float() / 40,  # whose softmax is `by_colour`
        World(),
        workers,
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
def rectangles(images: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Three objects in each image: a sure one, a doubtful one, and one without a pixel."""
    found = []
    for image in images:
        masks = torch.zeros(3, *image.shape[-2:], dtype=torch.bool)
        masks[0, 2:9, 3:13] = True
        masks[1, 5:, :4] = True
        found.append((torch.tensor([1, 0, 1]), torch.tensor([0.9, 0.3, 0.8]), masks))
    return found


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


# --------------------------------------------------------------------------------- objects in tiles
def patches(images: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """A detector that sees what windows show: every patch of one colour is an object, whose class
    is its colour, and whose score is larger the larger the patch is."""
    found = []
    for image in images:
        labels, masks = [], [torch.zeros(0, *image.shape[-2:], dtype=torch.bool)]
        for colour in image[0].unique().tolist():
            parts, number = ndimage.label((image[0] == colour).numpy() & (colour > 0))
            masks += [torch.from_numpy(parts == part)[None] for part in range(1, number + 1)]
            labels += [colour] * number
        masks = torch.cat(masks)
        scores = 0.1 + masks.flatten(1).sum(1) / 10_000
        found.append((torch.tensor(labels, dtype=torch.int64), scores, masks))
    return found


def scene(size: tuple[int, int], *boxes: tuple[int, int, int, int, int]) -> torch.Tensor:
    """A black picture (3, H, W) with rectangles: class, top, left, bottom, right."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for colour, top, left, bottom, right in boxes:
        image[:, top:bottom, left:right] = colour
    return image


def as_set(labels, masks) -> set[tuple[int, bytes]]:
    kinds = labels.tolist()
    return {(kind, mask.numpy().tobytes()) for kind, mask in zip(kinds, masks, strict=True)}


@pytest.mark.parametrize(
    "boxes",
    [
        [(1, 14, 2, 18, 62)],  # a bar across four tiles
        [(1, 5, 3, 60, 6)],  # a thin one, upright
        [(1, 10, 10, 22, 22)],  # an object on the corner of four windows
        [(1, 0, 0, 64, 64)],  # all of the picture
        [(1, 0, 50, 5, 64), (2, 60, 0, 64, 9)],  # at the picture's border
        [(1, 0, 15, 30, 17), (1, 0, 18, 30, 20), (2, 0, 17, 30, 18)],  # neighbours
        [],
    ],
)
@pytest.mark.parametrize("tile", [16, 30])
def test_an_object_across_borders_comes_out_once(boxes, tile):
    image = scene((64, 64), *boxes)
    [(labels, _, masks)] = patches([image])
    found, scores, whole = predictions.detect_in_tiles(image, patches, tile)
    assert as_set(found, whole) == as_set(labels, masks) and len(found) == len(boxes)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_a_scene_in_tiles_has_the_objects_of_the_whole_scene(seed):
    """Objects of three classes in an odd picture, on a grid that keeps them apart."""
    draw = np.random.default_rng(seed)
    boxes = []
    for top, left in itertools.product(range(0, 80, 20), range(0, 120, 20)):
        y, x, height, width = draw.integers([0, 0, 1, 1], [5, 5, 15, 15])
        boxes.append(
            (int(draw.integers(1, 4)), top + y, left + x, top + y + height, left + x + width)
        )
    image = scene((83, 127), *boxes)
    [(labels, _, masks)] = patches([image])
    found, _, whole = predictions.detect_in_tiles(image, patches, 32)
    assert len(found) == len(labels) == 24 and as_set(found, whole) == as_set(labels, masks)


def piece(label: int, score: float, columns: tuple[int, int], left: int) -> predictions.Piece:
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, columns[0] - left : columns[1] - left] = True
    return predictions.Piece(label, score, mask, 0, left)


def test_what_agrees_in_the_shared_part_is_one_object():
    """Windows show columns 0 to 15 and 8 to 23; they share 8 to 15."""
    first = piece(1, 0.9, (4, 14), 0)
    same = piece(1, 0.5, (8, 13), 8)
    assert predictions.agreement(first, same) == pytest.approx(5 / 6)
    assert predictions.merge([same, first]) == [[first, same]]
    others = [
        piece(2, 0.5, (8, 14), 8),  # of another class
        piece(1, 0.5, (8, 10), 8),  # which agrees in 2 of 6 columns
        piece(1, 0.5, (16, 20), 8),  # which the first window does not show
        piece(1, 0.5, (4, 14), 0),  # of the same window
        piece(1, 0.5, (16, 20), 16),  # of a window that shares nothing
    ]
    for other in others:
        assert predictions.merge([other, first]) == [[first], [other]]


def test_a_window_has_one_piece_of_an_object():
    """What two windows show twice stays two objects, each of the pieces that score alike."""
    pieces = [piece(1, score, (9, 14), left) for score in (0.9, 0.4) for left in (0, 8)]
    assert predictions.merge(pieces) == [pieces[:2], pieces[2:]]


def test_windows_vote_on_the_pixels_that_they_share():
    """The first window says columns 4 to 13, the second 8 to 11: it weighs less in 8 to 11 and
    more in 12 and 13."""
    mask = predictions.put_together([piece(1, 1, (4, 14), 0), piece(1, 1, (8, 12), 8)], (6, 30))
    assert mask.shape == (6, 30) and not mask[4:].any()
    assert mask[0].nonzero().flatten().tolist() == list(range(4, 12))


def test_doubtful_objects_of_windows_are_left_out():
    def doubtful(images):
        return [(labels, scores / 2.5, masks) for labels, scores, masks in patches(images)]

    image = scene((40, 40), (1, 0, 0, 8, 8), (2, 12, 12, 40, 36))
    labels, *_ = predictions.detect_in_tiles(image, doubtful, 32)
    assert labels.tolist() == [2]


def test_predicted_objects_in_tiles_are_of_the_size_of_the_picture(tmp_path):
    image = scene((40, 70), (1, 10, 5, 20, 65), (0, 0, 0, 1, 1))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    Image.fromarray(image[:, :30, :30].permute(1, 2, 0).numpy()).save(tmp_path / "b.png")
    seen = []

    def watching(images):
        seen.extend(tuple(one.shape[-2:]) for one in images)
        return patches(images)

    paths, classes = [tmp_path / "a.png", tmp_path / "b.png"], ["none", "bar"]
    out = tmp_path / "out"
    predictions.predict_objects(paths, out, watching, [1, 2], classes, World(), 0, 32, 0, 0.1)
    assert max(itertools.chain(*seen)) == 32 and (30, 30) in seen
    results = json.loads((out / "predictions.json").read_text())
    assert [(Path(r["image_id"]).name, r["category_id"]) for r in results] == [
        ("a.png", 2),
        ("b.png", 2),
    ]
    expected = [image[0] == 1, image[0, :30, :30] == 1]
    for result, mask in zip(results, expected, strict=True):
        assert "bbox" not in result
        assert (coco_mask().decode(result["segmentation"]) == mask.numpy()).all()
    data = json.loads((out / "pseudo_labels.json").read_text())
    assert [a["bbox"] for a in data["annotations"]] == [[5, 10, 60, 10], [5, 10, 25, 10]]
    assert [a["area"] for a in data["annotations"]] == [600, 250]


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
    return request.param, *save_networks(request.param, tmp_path / "best.pt")


def save_networks(of_script: str, path: Path, **task: str) -> tuple[Path, dict]:
    script = importlib.import_module(of_script)
    args = script.preset("shapes", weights="none", **task)
    name, names, _ = NETWORKS[of_script]
    weights = {}
    for network in names:
        made = getattr(script, name)(args, 3).to(memory_format=torch.channels_last)
        weights[network] = made.state_dict()
    state = {"step": 5, "networks": weights, "classes": CLASSES, "settings": vars(args)}
    state |= {"scored": 5, "last": {}, "best": {}}  # and what one script or another asks for:
    state |= {"ids": [1, 2, 3], "stage": "student", "phase": "student"}
    state |= {"groups": ["f"] * 3, "delta": None}
    checkpoints.save_checkpoint(path, script.SCRIPT, state)
    return path, weights


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


# ------------------------------------------------------------------------------------ four scripts
TASKS = {
    "gta": ("gta_seg", {}),
    "gist": ("gist_rist", {}),
    "guided": ("guided_distillation", {}),
    "guided semantic": ("guided_distillation", {"task": "semantic"}),
    "better": ("better_pseudo_labels", {}),
}


@pytest.fixture(scope="module", params=TASKS)
def predicted(request, tmp_path_factory):
    """What a script predicts of a folder of odd pictures, by settings -> a folder."""
    folder = tmp_path_factory.mktemp("predicted")
    of_script, task = TASKS[request.param]
    torch.manual_seed(0)
    path, _ = save_networks(of_script, folder / "best.pt", **task)
    (folder / "photos").mkdir()
    for place, size in enumerate([(48, 64), (48, 64), (96, 40), (48, 64), (96, 40), (130, 90)]):
        pixels = noise(size[0] // 8, size[1] // 8, seed=place).permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        picture.save(folder / "photos" / f"{place}.png")
    script = importlib.import_module(of_script)
    made = {}

    def predict(pixels: int = predictions.PIXELS, workers: int = 0, **settings) -> Path:
        key = (pixels, workers, *settings.items())
        if key not in made:
            given = {"predict": [str(path), str(folder / "photos")], "device": "cpu"}
            args = cli.saved_settings(script.Args, path, script.SCRIPT)
            args = dataclasses.replace(args, workers=workers, **given, **settings)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(predictions, "PIXELS", pixels)
                script.predict(args)
            made[key] = folder / str(len(made))
            Path(f"{path}.predictions").rename(made[key])
        return made[key]

    return predict


def assert_alike(one: Path, other: Path) -> None:
    """Two folders of predictions are the same but for rounding."""
    names = sorted(path.relative_to(one) for path in one.rglob("*"))
    assert names == sorted(path.relative_to(other) for path in other.rglob("*"))
    for name in (name for name in names if name.parts[0] in ("labels", "confidence")):
        if name.suffix == ".png":
            a, b = (np.array(Image.open(folder / name)).astype(int) for folder in (one, other))
            if name.parts[0] == "labels":
                assert (a == b).mean() > 0.999
            else:
                assert abs(a - b).max() <= 1
    if (one / "predictions.json").exists():
        a, b = (json.loads((folder / "predictions.json").read_text()) for folder in (one, other))
        helpers.assert_same_objects(a, b)


def test_batches_find_what_is_found_one_at_a_time(predicted):
    together = predicted()
    assert_alike(together, predicted(pixels=1))
    assert_alike(together, predicted(workers=2))


def test_every_script_sees_larger_pictures_in_tiles(predicted):
    whole, tiled = predicted(), predicted(predict_tile=64)
    changed = 0
    for path in (path for path in whole.rglob("*") if path.suffix == ".png"):
        a, b = (np.array(Image.open(f / path.relative_to(whole))) for f in (whole, tiled))
        assert a.shape == b.shape
        is_large = max(a.shape) > 64
        assert is_large or (a == b).mean() > 0.99
        changed += is_large and (a != b).any()
    if not (whole / "predictions.json").exists():
        assert changed
        return
    found = json.loads((tiled / "predictions.json").read_text())
    sizes = {Path(r["image_id"]).stem: tuple(r["segmentation"]["size"]) for r in found}
    large = {"2": (96, 40), "4": (96, 40), "5": (130, 90)}
    assert all(sizes.get(name, size) == size for name, size in large.items())
    assert all(
        r["score"] >= predictions.LEAST_SCORE for r in found if Path(r["image_id"]).stem in large
    )
    small = [r for r in found if Path(r["image_id"]).stem not in large]
    before = json.loads((whole / "predictions.json").read_text())
    helpers.assert_same_objects(small, [r for r in before if Path(r["image_id"]).stem not in large])
