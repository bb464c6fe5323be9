"""guided_distillation.py --task semantic: classes of pixels as masks, what is ignored, inference as
a sum over queries, and runs on each form of data."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import helpers
import instance_runs
import numpy as np
import pretend
import pytest
import torch
import torch.nn.functional as F
from helpers import differences, log_of, state
from instance_runs import HERE, TINY_GUIDED, as_line
from PIL import Image
from torch import Tensor

import guided_distillation as gd
from common import backbones, instances, plots, semantic
from common.instances import Batch, Target
from common.objects import nearest_in_window
from common.semantic import IGNORE, Picture, Segmentation
from data import shapes
from guided_distillation import Heads

pytestmark = pytest.mark.usefixtures("seeded", "one_thread")

NAME = "guided_distillation"

# A threshold that a fresh network passes.
TINY = TINY_GUIDED | dict(norm="frozen", width=32, test_size=(64, 64), class_threshold=0.15)


def quick(*more, put=setattr) -> None:
    """No pictures, and no other thing that takes most of a tiny run's time; then `more`."""
    instance_runs.quick(((gd, "draw_previews"), (plots, "curves")), more, put)


quiet = instance_runs.quieted(quick)
typed = instance_runs.typed_to(gd)


def made_heads(*sizes: int, layers: int = 2, images: int = 1, queries: int = 4, classes: int = 3):
    """Random predictions with mask features of 5 channels and of these sizes."""
    shapes_of = (
        (layers, images, queries, classes + 1),
        (layers, images, queries, 5),
        (images, 5, *sizes),
    )
    return Heads(*(torch.randn(shape).requires_grad_() for shape in shapes_of))


def generators(count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def loss_of(heads: Heads, target: Target, points: int = 200) -> Tensor:
    norms = gd.normalisers([target], heads.class_logits.shape[2])
    return gd.criterion(heads, [target], norms, generators(), num_points=points)["loss"]


def map_of(size: int = 64) -> np.ndarray:
    """Classes 1 and 2 side by side; below half of the height, nothing is labeled."""
    label = np.full((size, size), IGNORE, np.uint8)
    label[: size // 2, : size // 2] = 1
    label[: size // 2, size // 2 :] = 2
    return label


# ----------------------------------------------------------------------------- targets and ignored
def test_each_class_that_occurs_is_one_mask():
    """Also class 0; and a map without it keeps all of its classes, too."""
    target = gd.class_masks(map_of(8))
    assert target.labels.tolist() == [1, 2] and target.labels.dtype == torch.int64
    assert torch.equal(target.valid, torch.from_numpy(map_of(8) != IGNORE))
    for label, mask in zip(target.labels, target.masks, strict=True):
        assert torch.equal(mask, torch.from_numpy(map_of(8)) == label)
    with_background = map_of(8)
    with_background[0, 0] = 0
    target = gd.class_masks(with_background)
    assert target.labels.tolist() == [0, 1, 2] and target.masks[0].sum() == 1
    nothing = gd.class_masks(np.full((8, 8), IGNORE, np.uint8))
    assert nothing.masks.shape == (0, 8, 8) and not nothing.valid.any()


def test_points_are_drawn_evenly_from_valid_pixels():
    valid = torch.zeros(5, 7, dtype=torch.bool)
    valid[1, 2:5] = valid[4, 6] = valid[0, 0] = True
    points = gd.random_points((20, 500), generators()[0], valid.device, valid)
    assert points.shape == (20, 500, 2)
    at = points * torch.tensor([7, 5]) - 0.5
    assert torch.allclose(at, at.round(), atol=1e-5)
    column, row = at.round().long().flatten(0, 1).unbind(1)
    counts = torch.zeros(5, 7).index_put((row, column), torch.ones(len(row)), accumulate=True)
    assert (counts[~valid] == 0).all()
    assert ((counts[valid] - 2000).abs() < 200).all()


def test_points_see_labels_as_they_are():
    """No value between 0 and 1, also beside pixels that are ignored and at the edges of masks."""
    label = torch.randint(0, 3, (33, 47)).to(torch.uint8)
    label[torch.rand(33, 47) < 0.5] = IGNORE
    target = gd.class_masks(label.numpy())
    points = gd.random_points((900,), generators()[0], label.device, target.valid)
    truth = gd.sample_points(target.masks[None].float(), points[None])[0]
    assert torch.allclose(truth, truth.round(), atol=1e-4)
    assert torch.equal(truth.round().sum(0), torch.ones(900))


def test_what_lies_in_ignored_pixels_moves_neither_costs_nor_losses_nor_gradients():
    """Cells of stride 4 from the second ignored one on: the first still shows in valid pixels."""
    heads, target = made_heads(16, 16), gd.class_masks(map_of())
    features = heads.mask_features.detach()
    found = []
    for rows in (None, slice(9, 16), slice(4, 8)):
        changed = features.clone()
        if rows is not None:
            changed[:, :, rows] += 10 * torch.randn_like(changed[:, :, rows])
        of_changed = heads._replace(mask_features=changed.requires_grad_())
        points = gd.random_points((100,), generators()[0], changed.device, target.valid)
        one = heads.class_logits[:, 0], heads.mask_embed[:, 0], changed[0]
        costs = gd.match_costs(*one, target, points)
        loss = loss_of(of_changed, target)
        found.append((costs, loss, *torch.autograd.grad(loss, list(of_changed))))
        assert (found[-1][-1][:, :, 9:] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_ignored_pixels_would_be_negatives_without_valid():
    """The planted fault: a mask that covers its class, and all that is ignored, costs nothing."""
    heads, target = made_heads(16, 16, layers=1, queries=2), gd.class_masks(map_of())
    with torch.no_grad():
        heads.mask_embed[:] = torch.eye(5)[:2]
        heads.mask_features[:, :2] = -50
        heads.mask_features[:, 0, :, :8] = 50
        heads.mask_features[:, 1, :, 8:] = 50
    norms = gd.normalisers([target], 2)
    for valid, is_right in ((target.valid, True), (None, False)):
        losses = gd.criterion(heads, [target._replace(valid=valid)], norms, generators())
        assert (losses["dice"] < 0.1) == is_right
        assert (losses["mask"] < 1.5) == is_right  # points between the classes cost a little


def test_a_picture_without_a_valid_pixel_gives_a_finite_loss_and_all_gradients():
    args = gd.preset("shapes", task="semantic", **TINY)
    net = gd.Mask2Former(args, 3).train()
    heads = net(torch.randn(2, 3, 64, 64))
    targets = [gd.class_masks(np.full((64, 64), IGNORE, np.uint8))] * 2
    norms = gd.normalisers(targets, args.queries)
    losses = gd.criterion(heads, targets, norms, generators(2), num_points=64)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"]) and losses["mask"] == losses["dice"] == 0
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert net.decoder.class_embed.weight.grad.abs().sum() > 0


def test_logits_as_large_as_half_precision_has_still_match_all():
    heads = made_heads(16, 16)
    with torch.no_grad():
        heads.class_logits[:] = 6e4 * heads.class_logits.sign()
        heads.mask_embed[:] = 6e4 * heads.mask_embed.sign()
    target = gd.class_masks(map_of())
    matches, not_finite = gd.match(heads, [target], generators(), num_points=100)
    assert not_finite == 0
    assert all(len(set(row.tolist()) - {-1}) == 2 for row in matches[0])


# ------------------------------------------------------------------------------------------- views
def folder_of(root: Path, label: np.ndarray, classes: int) -> Segmentation:
    """A data set of one picture."""
    Image.fromarray(label).save(root / "label.png")
    Image.fromarray(np.stack([label] * 3, 2)).save(root / "image.png")
    picture = Picture("a", root / "image.png", root / "label.png")
    names = [f"class {i}" for i in range(classes)]
    return Segmentation("folder", root, names, {"a": picture}, [picture])


@pytest.mark.parametrize("scale", [(0.3, 0.3), (1, 1), (2.5, 2.5)], ids=str)
def test_values_of_labels_pass_unchanged_into_targets_of_a_crop(tmp_path, scale):
    """Also of pictures larger than the crop, and of smaller ones, which are padded."""
    label = np.full((90, 120), 1, np.uint8)
    label[::2] = 254
    label[:, 40:70] = IGNORE
    label[:, 70:80] = 0
    data = folder_of(tmp_path, label, 255)
    photo = instances.with_regions(data.val[0], data)
    assert {thing.category for thing in photo.things} == {0, 1, 254}
    args = gd.preset("folder", task="semantic", crop_size=(64, 64), scale=scale)
    image, seen = instances.load(photo), set()
    for seed in range(8):
        _, nothing, target = gd.labeled_view(args, data, image, photo, np.random.default_rng(seed))
        _, window = gd.weak_view(args, image, np.random.default_rng(seed))
        cut = torch.from_numpy(nearest_in_window(label, window, outside=IGNORE))
        assert nothing is None and torch.equal(target.valid, cut != IGNORE)
        assert torch.equal(target.masks.sum(0).bool(), target.valid)
        for value, mask in zip(target.labels, target.masks, strict=True):
            assert torch.equal(mask, cut == value)
        seen |= set(target.labels.tolist())
    assert seen == {0, 1, 254}


def test_padding_is_not_valid_with_and_without_labels(tmp_path):
    data = folder_of(tmp_path, np.zeros((40, 64), np.uint8), 2)
    args = gd.preset("folder", task="semantic", crop_size=(64, 64), scale=(1, 1))
    photo = instances.with_regions(data.val[0], data)
    image = instances.load(photo)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[:40] = True
    labeled = gd.labeled_view(args, data, image, photo, np.random.default_rng(0))[2]
    strong, weak, unlabeled = gd.unlabeled_view(args, image, photo, np.random.default_rng(0))
    assert torch.equal(labeled.valid, inside) and labeled.labels.tolist() == [0]
    assert torch.equal(unlabeled.valid, inside) and len(unlabeled.labels) == 0
    assert (weak[:, 40:] == 128).all() and strong.shape == weak.shape


def test_a_batch_keeps_where_its_pictures_are_valid():
    image, target = torch.zeros(3, 64, 64, dtype=torch.uint8), gd.class_masks(map_of())
    batch = instances.collate([((image, image, target), 0), ((image, image, target), 1)])
    moved = instances.to_device(batch, torch.device("cpu"))
    for one in moved.targets:
        assert torch.equal(one.valid, target.valid) and torch.equal(one.masks, target.masks)
    without = instances.to_device(batch._replace(targets=[Target(*target[:2])]), image.device)
    assert without.targets[0].valid is None


def test_repeat_factors_count_classes_of_pixels(tmp_path):
    data = folder_of(tmp_path, map_of(), 3)
    chosen = semantic.Chosen([data.val[0]], [data.val[0]], "text", "print")
    labeled, unlabeled = (lambda c: (c.labeled, c.unlabeled))(instances.of_regions(chosen, data))
    assert [(t.category, t.area) for t in labeled[0].things] == [(1, 1024), (2, 1024)]
    assert unlabeled[0].label is None and unlabeled[0].things is None
    assert gd.repeat_factors(labeled, 3, 4.0).tolist() == [2.0]


# ----------------------------------------------------------------------------------- pseudo labels
def test_pseudo_masks_of_one_class_become_one():
    masks = torch.rand(5, 6, 7) < 0.3
    target = gd.one_mask_per_class(Target(torch.tensor([2, 0, 2, 2, 1]), masks))
    assert target.labels.tolist() == [0, 1, 2]
    assert torch.equal(target.masks, torch.stack([masks[1], masks[4], masks[[0, 2, 3]].any(0)]))
    none = gd.one_mask_per_class(Target(torch.zeros(0, dtype=torch.int64), masks[:0]))
    assert none.labels.shape == (0,) and none.masks.shape == (0, 6, 7)


def test_pseudo_labels_have_a_mask_a_class_and_the_views_valid_pixels():
    args = gd.preset("shapes", task="semantic", class_threshold=0.5, size_threshold=5.0)
    heads = made_heads(16, 16, layers=1, images=2)
    with torch.no_grad():
        heads.class_logits[:] = torch.tensor([9.0, 0, 0, 0])
        heads.class_logits[0, 0, 3] = torch.tensor([0, 0, 9.0, 0])
    found, _ = gd.pseudo_labels(heads, 0.5, 5.0)
    valid = torch.rand(2, 64, 64) < 0.5
    places = [Target(torch.zeros(0, dtype=torch.int64), v.new_zeros(0, 64, 64), v) for v in valid]
    weak = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    targets, log = gd.teach(
        lambda x, last_only: heads, Batch(weak, weak, places, torch.zeros(2)), args
    )
    assert [t.labels.tolist() for t in targets] == [[0, 2], [0]]
    assert torch.equal(targets[0].masks[0], found[0].masks[:3].any(0))
    assert torch.equal(torch.stack([t.valid for t in targets]), valid)
    assert log["pseudo_per_image"] == 1.5


# --------------------------------------------------------------------------------------- inference
def fixed(heads: Heads) -> SimpleNamespace:
    """A network that predicts this for every picture."""
    return SimpleNamespace(forward=lambda x, last_only=False: heads)


@pytest.mark.parametrize(
    "size, test_size", [((20, 30), (20, 30)), ((10, 15), (20, 40)), ((24, 45), (20, 30))], ids=str
)
def test_scores_by_loops(size, test_size):
    factor = min(test_size[0] / min(size), test_size[1] / max(size))
    new = [round(n * factor) for n in size]
    padded = [-(-n // 32) * 32 for n in new]
    heads = made_heads(padded[0] // 4, padded[1] // 4, layers=1)
    got = gd.segment(fixed(heads), torch.zeros(3, *size, dtype=torch.uint8), test_size)
    want = torch.zeros(3, *size)
    for q in range(4):
        logits = torch.einsum("c,chw->hw", heads.mask_embed[0, 0, q], heads.mask_features[0])
        logits = F.interpolate(logits[None, None], size=padded, mode="bilinear")
        logits = logits[:, :, : new[0], : new[1]]
        logits = F.interpolate(logits, size=size, mode="bilinear")[0, 0]
        probabilities = heads.class_logits[0, 0, q].softmax(0)
        for k in range(3):
            want[k] += (probabilities[k] * logits.sigmoid()).detach()
    assert got.shape == (3, *size) and torch.allclose(got, want, atol=1e-5)


def test_padding_does_not_show_in_the_cropped_scores():
    """Padded cells from the second one on: the first shows in the last pixels of the picture."""
    heads = made_heads(16, 16, layers=1)
    with torch.no_grad():
        heads.mask_features[:] = heads.mask_features[:, :, :1, :1]
    image = torch.zeros(3, 40, 36, dtype=torch.uint8)
    before = gd.segment(fixed(heads), image, (36, 40))
    assert (before - before[:, :1, :1]).abs().max() < 1e-5, "a constant for each query"
    with torch.no_grad():
        heads.mask_features[:, :, 11:] += 10
        heads.mask_features[..., 10:] -= 10
    assert torch.equal(gd.segment(fixed(heads), image, (36, 40)), before)
    with torch.no_grad():
        heads.mask_features[:, :, 9] += 10
    assert not torch.equal(gd.segment(fixed(heads), image, (36, 40)), before)


def test_a_line_of_four_pixels_survives_in_a_large_picture():
    heads = Heads(
        torch.tensor([[9.0, 0, -9], [0, 9.0, -9]])[None, None],
        torch.eye(2)[None, None],
        torch.full((1, 2, 128, 256), 8.0),
    )
    heads.mask_features[:, 1] = -8
    heads.mask_features[:, 1, :, 100] = 8
    heads.mask_features[:, 0, :, 100] = -8
    image = torch.zeros(3, 512, 1024, dtype=torch.uint8)
    found = gd.segment(fixed(heads), image, (512, 1024)).argmax(0)
    assert (found == found[:1]).all()
    assert found[0].nonzero().flatten().tolist() == [400, 401, 402, 403]


def test_two_equal_queries_add_up_and_shares_do_not_exceed_1(tmp_path):
    heads = made_heads(16, 16, layers=1, queries=1)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    once = gd.segment(fixed(heads), image, (64, 64))
    twice = Heads(*(x.expand(-1, -1, 2, -1) for x in heads[:2]), heads.mask_features)
    scores = gd.segment(fixed(twice), image, (64, 64))
    assert torch.allclose(scores, 2 * once)
    shares = scores.log().softmax(0)
    assert torch.allclose(shares.sum(0), torch.ones(64, 64))
    assert torch.equal(shares.argmax(0), scores.argmax(0))


def test_masks_are_made_in_parts_of_any_size(monkeypatch):
    heads, image = made_heads(16, 16, layers=1), torch.zeros(3, 50, 64, dtype=torch.uint8)
    together = gd.segment(fixed(heads), image, (50, 64))
    monkeypatch.setattr(gd, "TOGETHER", 1)
    assert torch.allclose(gd.segment(fixed(heads), image, (50, 64)), together, atol=1e-6)


# -------------------------------------------------------------------------------------------- runs
@pytest.fixture
def line(shapes_root, tmp_path):
    """line(...) -> the command line of a tiny run into tmp_path/out, on a few drawn scenes."""

    def of(out: Path | None = None, **flags) -> list[str]:
        every = dict(
            dataset="shapes",
            task="semantic",
            root=shapes_root,
            val="few",
            split=shapes_root / "labeled.txt",
            unlabeled=shapes_root / "unlabeled.txt",
        )
        return as_line(**every | TINY | {"out": out or tmp_path / "out"} | flags)

    return of


@pytest.fixture(scope="module")
def trained(shapes_root, tmp_path_factory) -> Path:
    """The folder of a run. Do not change it."""
    out = tmp_path_factory.mktemp("trained") / "run"
    of_data = dict(root=str(shapes_root), val="few", out=str(out))
    lists = {name: str(shapes_root / f"{name}.txt") for name in ("labeled", "unlabeled")}
    chosen = dict(split=lists["labeled"], unlabeled=lists["unlabeled"])
    gd.main(gd.preset("shapes", task="semantic", **of_data, **chosen, **TINY))
    return out


def test_a_run_leaves_mean_iou_beside_its_log(trained):
    read = json.loads((trained / "results.json").read_text())
    classes = list(shapes.SEMANTIC_CLASSES)
    for name, steps in {"supervised": (2, 4), "student": (6, 8), "teacher": (6, 8)}.items():
        for record in read[name].values():
            assert record.keys() == {"step", "miou", "iou"} and record["step"] in steps
            assert list(record["iou"])[1:] == classes
            present = [value for value in record["iou"].values() if value is not None]
            assert record["miou"] == pytest.approx(np.mean(present), abs=1e-3)
        assert read[name]["best"]["miou"] >= read[name]["last"]["miou"]
    lines = log_of(trained)
    assert sum("miou_student" in record for record in lines) == 2
    learned = [record for record in lines if "loss_u" in record]
    assert len(learned) == 4 and max(record["pseudo_per_image"] for record in learned) > 0
    assert all(np.isfinite(record["loss"]) for record in learned)
    assert not list(trained.glob("*.segm.json"))
    assert {"best.pt", "last.pt", "teacher.pt"} <= {path.name for path in trained.iterdir()}


def test_stopped_and_resumed_is_bit_equal(line, typed, trained, tmp_path):
    for at in (1, 3, 6):
        instance_runs.assert_stops(typed, line(resume=True), tmp_path / "out", at)
    typed(line(resume=True)).ok()
    assert instance_runs.results(tmp_path / "out") == instance_runs.results(trained)
    for name in ("best.pt", "last.pt", "teacher.pt"):
        assert differences(state(tmp_path / "out" / name), state(trained / name)) == []


def test_eval_gives_the_runs_own_results(trained, typed, tmp_path):
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    said = typed(["--eval", str(tmp_path / "last.pt"), *HERE]).ok().out
    scored = json.loads((tmp_path / "last.pt.results.json").read_text())
    read = instance_runs.results(trained)
    for name in ("student", "teacher"):
        assert scored[name]["last"] == read[name]["last"]
        assert f"{name}: miou {scored[name]['last']['miou']:.2f}" in said


def test_predict_writes_classes_and_their_shares(trained, typed, shapes_root, tmp_path):
    (tmp_path / "last.pt").write_bytes((trained / "last.pt").read_bytes())
    picture = shapes_root / "voc" / "JPEGImages" / "val_000000.jpg"
    typed(["--predict", str(tmp_path / "last.pt"), str(picture), *HERE]).ok()
    out = tmp_path / "last.pt.predictions"
    label, confidence = (
        np.array(Image.open(out / folder / "val_000000.png")) for folder in ("labels", "confidence")
    )
    settings = cli_settings(tmp_path / "last.pt")
    networks, loaded, _ = gd.load_networks(str(tmp_path / "last.pt"), settings)
    image = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)
    scores = gd.segment(networks["student"], image, settings.test_size)
    assert np.array_equal(label, scores.argmax(0).numpy())
    shares = (scores / scores.sum(0)).amax(0)
    assert np.abs(confidence / 255.0 - shares.numpy()).max() < 0.003
    assert (out / "classes.txt").read_text().splitlines() == loaded["classes"]
    assert (out / "overlays" / "val_000000.jpg").is_file()


def cli_settings(path: Path) -> gd.Args:
    settings = gd.settings(eval=str(path))
    settings.device = "cpu"
    return settings


def test_export_names_the_task(trained, typed, tmp_path):
    from safetensors import safe_open

    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    typed(["--export", str(tmp_path / "best.pt")]).ok()
    with safe_open(str(tmp_path / "best.pt.safetensors"), "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        exported = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert facts["settings"]["task"] == "semantic"
    network = gd.Mask2Former(gd.Args(**facts["settings"]), len(facts["classes"]))
    network.load_state_dict(exported)


def test_previews_show_label_and_networks(shapes_root, tmp_path):
    args = gd.preset("shapes", task="semantic", root=str(shapes_root), val="few", **TINY)
    data, world = gd.find_data(args), gd.distributed.start("cpu")
    net = gd.Mask2Former(args, len(data.classes))
    row = gd.row_of_pixels({"a": net}, data.val[0], data, args, world)
    label = semantic.read_label(data.val[0].label, data)
    assert len(row) == 3 and np.array_equal(row[1], plots.colour(label))
    assert row[2].shape == row[0].shape == row[1].shape


def two_steps(**flags) -> dict:
    """A run of a teacher's step and a student's, on any data."""
    flags = TINY | dict(steps=2, burn_in_steps=1, eval_every=2) | flags
    return gd.main(gd.preset(task="semantic", **flags))


def test_folder(folder_root, tmp_path):
    out = dict(root=str(folder_root), out=str(tmp_path / "run"))
    done = two_steps(dataset="folder", split="random:4", **out)
    assert done["student"]["last"]["miou"] >= 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "4 labeled images" in config["images"] and "8 unlabeled" in config["images"]


def test_voc_folders(shapes_root, tmp_path):
    """What lies in VOC's form is read as gta_seg.py reads it, with the same draw."""
    out = dict(root=str(shapes_root / "voc"), val="few", out=str(tmp_path / "run"))
    done = two_steps(dataset="voc", split="random:6", labeled_sampling="uniform", **out)
    data = semantic.find("voc", shapes_root / "voc", "few")
    assert (
        done["split_fingerprint"] == semantic.choose(data, "random:6", 0, "", "gta_seg").fingerprint
    )


def test_cityscapes(tmp_path):
    """Nineteen classes of labelIds, not the eight with objects."""
    root = shapes.make_cityscapes(tmp_path / "streets", 4, 2)
    sizes = dict(crop_size=(64, 128), test_size=(64, 128))
    out = dict(root=str(root), out=str(tmp_path / "run"))
    done = two_steps(dataset="cityscapes", split="random:2", **sizes, **out)
    assert list(done["student"]["last"]["iou"]) == semantic.CITYSCAPES_CLASSES


def test_check_opens_all_files_and_trains_nothing(line, typed, folder_root, tmp_path):
    said = typed(line(check=True)).ok().out
    assert "8 labeled" in said and "7 scored" in said and not (tmp_path / "out").exists()
    bad = next((folder_root / "labels" / "train").iterdir())
    Image.fromarray(np.full((5, 5), 200, np.uint8)).save(bad)
    flags = dict(dataset="folder", root=folder_root, val="val", unlabeled=None, split="all")
    assert "of these" in typed(line(check=True, **flags)).error()


REFUSED = [  # flags, what the sentence names
    (dict(dataset="coco"), "--task semantic"),
    (dict(task="instance", dataset="voc"), "--task semantic"),
    (dict(task="instance", dataset="folder"), "--task semantic"),
    (dict(train_json="a.json"), "--train-json"),
    (dict(val_json="a.json"), "--val-json"),
    (dict(images="a"), "--images"),
    (dict(pool="all"), "--pool all"),
    (dict(split="nonsense"), "--split nonsense"),
    (dict(val="nonsense"), "nonsense"),
]


@pytest.mark.parametrize("flags, said", REFUSED, ids=instance_runs.words)
def test_refused_before_any_work(line, typed, tmp_path, flags, said):
    assert said in typed(line(**flags)).error() and not (tmp_path / "out").exists()


def test_a_checkpoint_keeps_its_task(trained, typed):
    flags = ["--eval", str(trained / "last.pt"), "--task", "instance", *HERE]
    assert "--task semantic" in typed(flags).error()


def test_presets_of_the_task(typed):
    voc = gd.preset("voc", task="semantic")
    assert (voc.split, voc.crop_size, voc.steps, voc.burn_in_steps) == (
        "183",
        (512, 512),
        90_000,
        25_000,
    )
    streets, objects = gd.preset("cityscapes", task="semantic"), gd.preset("cityscapes")
    assert (streets.split, streets.pool) == ("186", "remaining")
    assert (objects.split, objects.pool, objects.task) == ("5%", "all", "instance")
    assert streets.crop_size == objects.crop_size and streets.steps == objects.steps
    for dataset in gd.SEMANTIC:
        assert gd.preset(dataset, task="semantic").task == "semantic"
    assert "random:10" in typed(["--dataset", "shapes", "--task", "semantic", "--help"]).ok().out


def far() -> None:
    """The pretended device is called meta, too: what is looked at there would draw numbers."""
    backbones.is_layer_normed(TINY["backbone"])  # remembered
    pretend.install()


def test_nothing_mixes_devices(line, shapes_root, tmp_path):
    """On an accelerator that is pretended, with the CPU's values: the same first step of each
    stage, its scores and predictions."""
    flags = dict(steps=1, burn_in_steps=0, eval_every=1)
    picture = shapes_root / "voc" / "JPEGImages" / "val_000000.jpg"
    for name, setup in (("near", ()), ("far", (far,))):
        set_up = partial(quick, *setup)
        out = tmp_path / name
        helpers.run(line(out, **flags), tmp_path / "io", set_up, name=NAME).ok()
        given = ["--predict", str(out / "last.pt"), str(picture), *HERE]
        helpers.run(given, tmp_path / "io", set_up, name=NAME).ok()
    here, there = (
        [record for record in log_of(tmp_path / name) if "loss_l" in record]
        for name in ("near", "far")
    )
    assert len(here) == 2
    for a, b in zip(here, there, strict=True):
        assert a["targets_l"] == b["targets_l"]
        # A near tie in the matching of a fresh network may fall the other way.
        assert a["loss_l"] == pytest.approx(b["loss_l"], rel=0.05)


def test_two_processes_share_a_batch(line, tmp_path):
    """The same targets, half of them each; what a fresh network matches with them may be a tie."""
    flags = dict(steps=1, burn_in_steps=0, batch_size=4, eval_every=1)
    helpers.run(line(tmp_path / "one", **flags), tmp_path, quick, name=NAME).ok()
    for done in helpers.ranks(2, line(tmp_path / "two", **flags), tmp_path, quick, name=NAME):
        done.ok()
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        if "loss_l" in a:
            assert a["targets_l"] == 2 * b["targets_l"]
            assert a["loss_l"] == pytest.approx(b["loss_l"], rel=0.3)


def test_scores_are_equal_on_any_number_of_processes(trained, tmp_path):
    """Seven pictures, shared out unevenly."""
    found = []
    for n in (1, 2):
        path = tmp_path / str(n) / "last.pt"
        path.parent.mkdir()
        path.write_bytes((trained / "last.pt").read_bytes())
        for done in helpers.ranks(n, ["--eval", str(path), *HERE], tmp_path, quick, name=NAME):
            done.ok()
        found.append(json.loads(Path(f"{path}.results.json").read_text()))
    assert found[0] == found[1] and found[0]["student"]["last"]["miou"] > 0
