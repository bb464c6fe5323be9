"""DESIGN section 7: whatever is wrong, the user reads one sentence, the exit code is 2, and there
is no traceback."""

import ast
import errno
import json
import math
import os
import pickle
import re
import shutil
import socket
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    MISSING,
    NEVER_MEET,
    REPO,
    TEST_DATA,
    TINY,
    argv,
    assert_predicts,
    command,
    environment,
    log_of,
    run,
    state,
    stop_at,
    tensors,
)
from PIL import Image

import gta_seg
from common.distributed import World
from common.errors import UserError
from data import shapes

LISTS = TEST_DATA / "splits" / "gta_seg" / "data" / "splits" / "pascal"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """The folder of a finished run of four steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(tiny(out=out, steps=4), out.parent / "io").ok()
    return out


# ------------------------------------------------------------------------------------- data on disk
@pytest.mark.parametrize("dataset, way", MISSING)
def test_missing_data_set_says_what_where_and_two_ways_on(dataset, way, tmp_path, io):
    error = run(argv(dataset=dataset, root=tmp_path / "nowhere", out=tmp_path / "out"), io).error()
    assert (
        dataset in error
        and str(tmp_path / "nowhere") in error
        and way in error
        and "--root" in error
    )
    assert not (tmp_path / "out").exists()


def test_missing_data_set_as_a_user_types_it(tmp_path):
    error = command(["gta_seg.py", "--root", str(tmp_path / "nowhere"), "--device", "cpu"]).error()
    assert "python -m data.download voc" in error


def test_voc_without_its_parts(tmp_path, io):
    (tmp_path / "voc" / "JPEGImages").mkdir(parents=True)
    line = argv(dataset="voc", root=tmp_path / "voc", out=tmp_path / "out")
    assert "SegmentationClass" in run(line, io).error()
    (tmp_path / "voc" / "SegmentationClass").mkdir()
    assert "val.txt" in run(line, io).error()


def test_a_list_to_score_that_does_not_exist_is_named(tiny, tmp_path, io):
    error = run(tiny(out=tmp_path / "out", val="nonsense"), io).error()
    assert "nonsense" in error


def test_empty_list_to_score(tiny, shapes_root, tmp_path, io):
    (shapes_root / "voc" / "ImageSets" / "Segmentation" / "nothing.txt").write_text("\n\n")
    assert "nothing" in run(tiny(out=tmp_path / "out", val="nothing"), io).error()


def test_an_image_of_the_val_list_is_missing(folder_root, folder_line, io):
    (folder_root / "labels" / "val" / "val_000001.png").unlink()
    assert "val_000001.png" in run(folder_line(), io).error()


def test_the_root_of_shapes_is_a_file(tiny, tmp_path, io):
    (tmp_path / "file").write_text("x")
    assert (
        str(tmp_path / "file")
        in run(tiny(out=tmp_path / "out", root=tmp_path / "file"), io).error()
    )


def test_shapes_draws_nothing_over_a_folder_of_somebody_else(tiny, tmp_path, io):
    (tmp_path / "mine" / "voc").mkdir(parents=True)
    (tmp_path / "mine" / "voc" / "thesis.txt").write_text("x")
    assert "--root" in run(tiny(out=tmp_path / "out", root=tmp_path / "mine"), io).error()
    assert (tmp_path / "mine" / "voc" / "thesis.txt").read_text() == "x"


# -------------------------------------------------------------------------------------------- lists
def test_unknown_split_lists_those_that_exist(shapes_root, tmp_path, io):
    root = tmp_path / "voc"
    shutil.copytree(shapes_root / "voc", root, copy_function=os.symlink)
    for name in ("92", "1-of-8"):
        (root / "splits" / "gta_seg" / name).mkdir(parents=True)
        (root / "splits" / "gta_seg" / name / "labeled.txt").write_text("train_000001\n")
    error = run(argv(dataset="voc", root=root, split="nonsense", out=tmp_path / "out"), io).error()
    there, published = re.search(r"there: ([^;]*); published: ([^)]*)\)", error).groups()
    assert there.split(", ") == ["1-of-8", "92"] and {"92", "183", "366", "732", "1464"} <= set(
        published.split(", ")
    )


def test_published_split_without_its_lists_says_how_to_fetch_them(shapes_root, tmp_path, io):
    error = run(
        argv(dataset="voc", root=shapes_root / "voc", split="183", out=tmp_path / "out"), io
    ).error()
    assert "python -m data.download splits --dataset voc" in error and "random:183" in error


@pytest.mark.parametrize(
    "split", ["nonsense", "random:0", "random:-3", "random:99999", "random:1/0", "random:x", "0%"]
)
def test_split_that_is_no_number(tiny, tmp_path, io, split):
    assert f"--split {split}" in run(tiny(out=tmp_path / "out", split=split), io).error()


def test_negative_split_seed(tiny, tmp_path, io):
    assert "seed" in run(tiny(out=tmp_path / "out", split="random:4", split_seed=-1), io).error()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "empty"),
        ("train_000001\ntrain_000001\n", "twice"),
        ("a b c\n", "line 1"),
        ("train_000001\nnope_1\nnope_2\n", "nope_1"),
    ],
)
def test_list_file_that_cannot_be_used(tiny, tmp_path, io, text, said):
    (tmp_path / "list.txt").write_text(text)
    error = run(tiny(out=tmp_path / "out", split=tmp_path / "list.txt"), io).error()
    assert said in error and "list.txt" in error
    assert said in run(tiny(out=tmp_path / "out", unlabeled=tmp_path / "list.txt"), io).error()


def test_list_file_that_is_no_text(tiny, tmp_path, io):
    (tmp_path / "list.txt").write_bytes(bytes(range(128, 256)))
    assert "list.txt" in run(tiny(out=tmp_path / "out", split=tmp_path / "list.txt"), io).error()


def test_classes_txt_that_is_no_text(folder_root, folder_line, io):
    (folder_root / "classes.txt").write_bytes(bytes(range(128, 256)))
    assert "classes.txt" in run(folder_line(), io).error()


def test_a_labeled_image_without_a_label_is_named(folder_root, folder_line, tmp_path, io):
    (folder_root / "labels" / "train" / "train_000003.png").unlink()
    (tmp_path / "list.txt").write_text("train_000002\ntrain_000003\n")
    assert "train_000003.png" in run(folder_line(split=tmp_path / "list.txt"), io).error()


def test_unlabeled_folder_without_images(tiny, tmp_path, io):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("x")
    error = run(tiny(out=tmp_path / "out", unlabeled=tmp_path / "photos"), io).error()
    assert "photos" in error and "no images" in error


def test_unlabeled_that_is_not_there(tiny, tmp_path, io):
    assert (
        "--unlabeled" in run(tiny(out=tmp_path / "out", unlabeled=tmp_path / "nowhere"), io).error()
    )


def test_no_unlabeled_image_left(folder_root, folder_line, io):
    shutil.rmtree(folder_root / "images" / "unlabeled")
    error = run(folder_line(split="random:8"), io).error()
    assert "no unlabeled image" in error and "--unlabeled" in error and "suponly" in error
    run(folder_line(split="random:8", method="suponly", warmup_epochs=None), io).ok()


# ----------------------------------------------------------------------------------------- pictures
def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_skipped_with_a_warning_and_counted_in_training(
    folder_root, folder_line, tmp_path, io, workers
):
    truncate(folder_root / "images" / "train" / "train_000001.jpg")
    (tmp_path / "list.txt").write_text("".join(f"train_{i:06d}\n" for i in range(4)))
    done = run(folder_line(split=tmp_path / "list.txt", steps=3, workers=workers), io).ok()
    assert "train_000001.jpg" in done.err and "training goes on without it" in done.err
    log = log_of(tmp_path / "run")
    assert log[0]["skipped_images"] >= 1  # batches of 4 out of 4 meet it in every step ...
    # ... and once among 8 unlabeled
    assert [r["skipped_images"] for r in log if "loss_l" in r][-1] in (3, 4)


def test_the_count_of_skipped_images_goes_on_after_resume(folder_root, folder_line, tmp_path, io):
    truncate(folder_root / "images" / "train" / "train_000001.jpg")
    (tmp_path / "list.txt").write_text("".join(f"train_{i:06d}\n" for i in range(4)))
    line = folder_line(
        split=tmp_path / "list.txt", steps=4, resume=True, method="suponly", warmup_epochs=None
    )
    run(line, io, partial(stop_at, 1, 15)).ok()
    run(line, io).ok()
    assert [r["skipped_images"] for r in log_of(tmp_path / "run") if "loss_l" in r] == [1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_stops_the_evaluation_and_is_named(folder_root, folder_line, io, workers):
    truncate(folder_root / "images" / "val" / "val_000001.jpg")
    assert "val_000001.jpg" in run(folder_line(workers=workers), io).error()


def test_no_image_can_be_read(folder_root, folder_line, io):
    for path in (folder_root / "images" / "unlabeled").iterdir():
        path.write_bytes(b"no picture")
    assert (
        "can be read"
        in run(folder_line(unlabeled=folder_root / "images" / "unlabeled"), io).error()
    )


@pytest.mark.parametrize("part", ["train", "val"])
def test_image_and_label_of_two_sizes(folder_root, folder_line, io, part):
    for path in (folder_root / "labels" / part).iterdir():
        Image.open(path).crop((0, 0, 40, 30)).save(path)
    error = run(folder_line(), io).error()
    assert (
        "64x64" in error
        and "40x30" in error
        and f"images/{part}" in error
        and f"labels/{part}" in error
    )


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_label_value_that_is_no_class_names_file_and_value(
    folder_root, folder_line, io, part, workers
):
    path = sorted((folder_root / "labels" / part).iterdir())[1]
    image = Image.open(path)
    image.putpixel((5, 6), 77)
    image.save(path)
    error = run(folder_line(workers=workers), io).error()
    assert path.name in error and "77" in error


def test_label_value_just_out_of_range_and_255(folder_root, folder_line, io):
    path = folder_root / "labels" / "val" / "val_000001.png"
    classes = len((folder_root / "classes.txt").read_text().split())
    for value, good in ((classes - 1, True), (255, True), (classes, False)):
        Image.new("L", (64, 64), value).save(path)
        line = folder_line(out=folder_root / f"run-{value}", steps=1)
        assert run(line, io).ok() if good else f"value {classes}" in run(line, io).error()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_label_that_is_a_colour_picture(folder_root, folder_line, io, mode):
    path = folder_root / "labels" / "val" / "val_000001.png"
    Image.open(path).convert(mode).save(path)
    error = run(folder_line(), io).error()
    assert path.name in error and mode in error


def test_label_that_is_no_picture(folder_root, folder_line, io):
    path = folder_root / "labels" / "val" / "val_000001.png"
    path.write_bytes(b"no picture")
    assert path.name in run(folder_line(), io).error()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 40), (40, 1), (300, 2)])
def test_tiny_unlabeled_images_are_trained_on(folder_line, tmp_path, io, size):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", size, (i, 2, 3)).save(tmp_path / "photos" / f"{i}.png")
    run(folder_line(unlabeled=tmp_path / "photos"), io).ok()


# ----------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("batch_size", [0, -4, 1, 3, 5])
def test_batch_that_does_not_divide(tiny, tmp_path, io, batch_size):
    assert "--batch-size" in run(tiny(out=tmp_path / "out", batch_size=batch_size), io).error()


def test_batch_that_does_not_divide_among_processes_is_said_before_they_meet(tiny, tmp_path, io):
    for env in NEVER_MEET:
        error = run(tiny(out=tmp_path / "out", batch_size=6), io, env=env).error()
        assert "2 processes" in error and "4 or 8" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags",
    [
        dict(drop=1.0),
        dict(drop=-0.1),
        dict(cutmix=2),
        dict(alpha_gta=1.1),
        dict(alpha_teacher=-1),
        dict(lr=-1),
        dict(lr="nan"),
        dict(lr="inf"),
        dict(decoder_lr=-1),
        dict(weight_decay=-1),
        dict(mu=-1),
        dict(tau=-1),
        dict(steps=-5),
        dict(eval_every=-1),
        dict(save_every=-1),
        dict(log_every=0),
        dict(workers=-1),
        dict(seed=-1),
        dict(crop_size=8),
        dict(width=2),
        dict(warmup_epochs=-1),
        dict(epochs=-1),
        dict(window=-5),
        dict(ohem=2),
        dict(aux=-1),
        dict(scale=(2, 0.5)),
        dict(scale=(0, 1)),
        dict(scale=(-1, 1)),
        dict(aspp_rates=(0, 1, 2)),
        dict(aspp_rates=(-1, 1, 2)),
        dict(steps=0, epochs=0),
    ],
    ids=lambda f: " ".join(f"{k}={v}" for k, v in f.items()),
)
def test_setting_out_of_range(tiny, tmp_path, io, flags):
    name = "epochs" if "epochs" in flags else next(iter(flags))
    assert f"--{name.replace('_', '-')}" in run(tiny(out=tmp_path / "out", **flags), io).error()


@pytest.mark.parametrize(
    "flags",
    [
        dict(gta_data="labeled"),
        dict(student_data="pseudo"),
        dict(transfer="all"),
        dict(reweight="none"),
        dict(mu=0.5),
        dict(aux=0.4),
        dict(share_predictor=True),
    ],
    ids=str,
)
def test_the_released_loop_refuses_the_ablations_that_it_would_ignore(tiny, tmp_path, io, flags):
    line = tiny(out=tmp_path / "out", recipe="released", **flags)
    assert f"--{next(iter(flags)).replace('_', '-')}" in run(line, io).error()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["suponly", "mt", "unbiased-st"])
def test_the_released_loop_is_one_of_the_paper_s_method(tiny, tmp_path, io, method):
    line = tiny(out=tmp_path / "out", recipe="released", method=method)
    assert f"--method {method}" in run(line, io).error()


def test_ohem_that_would_keep_every_pixel_is_refused(tiny, tmp_path, io):
    assert "--ohem" in run(tiny(out=tmp_path / "out", ohem=0.7), io).error()  # crops of 32 pixels
    for size, able in ((223, False), (224, True)):
        args = gta_seg.preset("cityscapes", crop_size=size)
        if able:
            gta_seg.check(args, World())
        else:
            with pytest.raises(
                UserError, match="--ohem keeps 50,000 pixels .* --crop-size 223; .* --ohem 0"
            ):
                gta_seg.check(args, World())
        gta_seg.check(gta_seg.preset("cityscapes", crop_size=size, ohem=0), World())


def test_unknown_flag_and_choice_leave_with_code_2(tiny, tmp_path, io):
    for flags in (
        dict(nonsense=3),
        dict(dataset="nonsense"),
        dict(method="nonsense"),
        dict(steps="many"),
    ):
        done = run(tiny(out=tmp_path / "out", **flags), io)
        assert (
            done.code == 2
            and "Traceback" not in done.err
            and next(iter(flags.values()), "") is not None
        )
        assert str(list(flags.items())[0][1]) in done.err + done.out


# ---------------------------------------------------------------------------------- network, device
@pytest.mark.parametrize(
    "flags", [dict(weights="none"), dict(weights="imagenet"), dict(weights="shapes")], ids=str
)
def test_unknown_backbone(tiny, tmp_path, io, flags):
    error = run(tiny(out=tmp_path / "out", backbone="nonsense", **flags), io).error()
    assert "nonsense" in error and "--backbone" in error


def test_unknown_backbone_names_near_ones(tiny, tmp_path, io):
    assert "did you mean" in run(tiny(out=tmp_path / "out", backbone="resnet1"), io).error()


@pytest.mark.parametrize("backbone", ["alexnet", "mixer_b16_224", "vgg11", "shufflenet_v2_x0_5"])
def test_backbone_that_cannot_be_cut(tiny, tmp_path, io, backbone):
    assert backbone in run(tiny(out=tmp_path / "out", backbone=backbone), io).error()


def weight_files(folder: Path) -> dict[str, bytes | object]:
    return {
        "garbage.pth": b"garbage" * 99,
        "garbage.safetensors": b"garbage" * 99,
        "garbage.pkl": b"garbage" * 99,
        "code.pkl": pickle.dumps(Path("x")),
        "empty.pth": b"",
        "foreign.pth": {"a": torch.ones(3, 3)},
        "none.pth": {},
        "list.pth": [1, 2],
        "tensor.pth": torch.ones(3),
        "numbers.pth": {"a": 1},
        "ours.pth": {"script": "gta_seg.py", "networks": {"student": {"a": torch.ones(3)}}},
    }


@pytest.mark.parametrize("name", weight_files(Path()))
def test_file_that_holds_no_weights_for_this_network(tiny, tmp_path, io, name):
    content = weight_files(tmp_path)[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    error = run(tiny(out=tmp_path / "out", weights=tmp_path / name), io).error()
    assert name in error and not (tmp_path / "out" / "config.json").exists()


def test_file_of_weights_that_is_missing(tiny, tmp_path, io):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        assert f"--weights {path}" in run(tiny(out=tmp_path / "out", weights=path), io).error()


def test_weights_that_cannot_be_fetched_without_a_network(tiny, tmp_path, io):
    """HF_HUB_OFFLINE is set for all processes of these tests."""
    for backbone in ("resnet18.a1_in1k", "resnet101s.gluon_in1k"):
        done = run(
            tiny(out=tmp_path / "out", backbone=backbone, weights="imagenet"),
            io,
            env={"HF_HOME": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path / "hub")},
        )
        error = done.error()
        assert backbone in error and "--weights FILE" in error and "--weights none" in error


def test_gpu_asked_for_where_there_is_none(tiny, tmp_path, io):
    for device in ("cuda", "cuda:7"):
        error = run(tiny(out=tmp_path / "out", device=device), io, no_gpu).error()
        assert f"--device {device}" in error and "--device cpu" in error


def no_gpu() -> None:
    torch.cuda.is_available = lambda: False


@pytest.mark.parametrize("device", ["nonsense", "mps"])
def test_device_that_does_not_exist(tiny, tmp_path, io, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has an mps device")
    assert f"--device {device}" in run(tiny(out=tmp_path / "out", device=device), io).error()


def test_port_in_use(tiny, tmp_path, io):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {
            "WORLD_SIZE": "2",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        error = run(tiny(out=tmp_path / "out"), io, env=env).error()
    assert port in error and "--master_port" in error


# --------------------------------------------------------------------------------------- run folder
def test_out_is_a_file_or_below_one(tiny, tmp_path, io):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        error = run(tiny(out=out), io).error()
        assert str(out) in error and "--out" in error


def as_nobody() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("exists", [False, True], ids=["to be made", "exists"])
def test_out_is_not_writable(folder_root, folder_line, io, exists):
    with tempfile.TemporaryDirectory() as name:
        open_folder = Path(name)
        shutil.copytree(folder_root, open_folder / "data")
        os.chmod(open_folder, 0o755)
        out = open_folder / "locked" / ("" if exists else "run")
        (open_folder / "locked").mkdir(mode=0o555)
        error = run(folder_line(root=open_folder / "data", out=out), io, as_nobody).error()
    assert str(out) in error and "--out" in error


def full_disk(good: int) -> None:
    """To be run in a process of its own: after this many files that were written, the disk is
    full."""
    fsync, done = os.fsync, []

    def failing(number):
        done.append(number)
        if len(done) > good:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    os.fsync = failing


@pytest.mark.parametrize("good", [0, 2])
def test_no_disk_space_leaves_the_last_checkpoint_whole(tiny, tmp_path, io, good):
    out = tmp_path / "out"
    error = run(tiny(out=out, save_every=1, steps=6), io, partial(full_disk, good)).error()
    assert "space" in error.lower() and not list(out.glob(".*.tmp"))
    if good:
        step = state(out / "last.pt")["step"]
        assert 0 < step < 6
        run(tiny(out=out, save_every=1, steps=6, resume=True), io).ok()
        assert state(out / "last.pt")["step"] == 6


def over_quota(good: int) -> None:
    full_disk(good)
    failing = os.fsync

    def other_number(number):
        try:
            failing(number)
        except OSError:
            raise OSError(errno.EDQUOT, "Disk quota exceeded") from None

    os.fsync = other_number


def test_over_quota_is_a_sentence_too(tiny, tmp_path, io):
    """What clusters give in place of "no space left"."""
    assert (
        "quota"
        in run(tiny(out=tmp_path / "out", save_every=1), io, partial(over_quota, 2)).error().lower()
    )


def test_a_disk_that_is_really_full(tiny, tmp_path, io):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=13m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    try:
        error = run(tiny(out=disk / "out", save_every=1, steps=6), io).error()
        assert "space" in error.lower()
        assert 0 < state(disk / "out" / "last.pt")["step"] < 6 and not list(
            (disk / "out").glob(".*.tmp")
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --------------------------------------------------------------------------------------- divergence
def test_loss_that_is_not_finite_stops_with_step_and_term(tiny, tmp_path, io):
    out = tmp_path / "out"
    error = run(tiny(out=out, lr=1e14, decoder_lr=1e14, save_every=1, steps=10), io).error()
    term, step = re.search(r"(loss\w*) is not finite since step (\d+)", error).groups()
    assert (
        "--lr" in error
        and str(out) in error
        and 0 < int(step) < 10
        and term in ("loss_l", "loss_u")
    )
    assert 0 < state(out / "last.pt")["step"] <= int(step)
    assert all(math.isfinite(r["loss_l"]) for r in log_of(out) if "loss_l" in r)


def test_checkpoint_that_stays_after_a_loss_that_is_not_finite_is_good(tiny, tmp_path, io):
    """An update can spoil the weights whose loss was still finite: they must not replace the last
    good checkpoint."""
    out = tmp_path / "out"
    run(
        tiny(out=out, lr=1e15, decoder_lr=1e15, weight_decay=1e15, save_every=1, steps=10), io
    ).error()
    if not (out / "last.pt").exists():
        return
    bad = [
        k for k, v in tensors(state(out / "last.pt")["networks"]).items() if not v.isfinite().all()
    ]
    assert not bad, f"{len(bad)} tensors of last.pt are not finite, for example {bad[0]}"


# -------------------------------------------------------------------------------------- checkpoints
def test_checkpoint_that_cannot_be_used(trained, tmp_path, io):
    good = torch.load(trained / "best.pt", weights_only=True)
    torch.save({**good, "script": "other.py"}, tmp_path / "other.pt")
    torch.save(good["networks"]["student"], tmp_path / "weights.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    torn = (trained / "best.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(torn[: len(torn) // 2])
    for name, said in (
        ("other", "other.py"),
        ("weights", "--weights"),
        ("garbage", "readable"),
        ("torn", "readable"),
        ("nowhere", "no checkpoint"),
    ):
        for flag in ("--eval", "--predict"):
            error = run([flag, str(tmp_path / f"{name}.pt")], io).error()
            assert said in error and f"{name}.pt" in error


@pytest.mark.parametrize(
    "flags", [dict(width=16), dict(backbone="resnet18"), dict(aux=0.4)], ids=str
)
def test_eval_with_another_network_than_the_checkpoint_holds(trained, io, flags):
    assert "best.pt" in run(argv(eval=trained / "best.pt", **flags), io).error()


def test_eval_on_other_classes(trained, folder_root, io):
    (folder_root / "classes.txt").write_text("sky\nroad\n")
    error = run(
        argv(eval=trained / "best.pt", dataset="folder", root=folder_root, val="val"), io
    ).error()
    assert "2" in error and "sky" in error and "classes" in error


def test_predict_without_pictures(trained, tmp_path, io):
    (tmp_path / "none").mkdir()
    (tmp_path / "text.jpg").write_text("x")
    checkpoint = str(trained / "best.pt")
    assert "--predict needs a checkpoint" in run(["--predict"], io).error()
    for images in ([], [str(tmp_path / "none")]):
        assert "--predict" in run(["--predict", checkpoint, *images], io).error()
    for name in ("text.jpg", "nowhere.jpg"):
        assert name in run(["--predict", checkpoint, str(tmp_path / name)], io).error()


# ----------------------------------------------------------------------------------- data that work
def two_steps_score_predict(line: list[str], out: Path, picture: Path, io: Path) -> str:
    """A run of two steps, its evaluation and a prediction; what it said."""
    said = run(line, io).ok().out
    results = json.loads((out / "results.json").read_text())
    run(["--eval", str(out / "best.pt")], io).ok()
    scored = json.loads((out / "best.pt.results.json").read_text())
    for name in ("student", "teacher", "gta"):
        assert scored[name]["last"] == results[name]["best"]
    assert_predicts(run, out, picture, io)
    return said


@pytest.fixture
def voc_root(shapes_root, tmp_path) -> Path:
    """VOC folders: 183 labeled images with the published names, 8 unlabeled ones without masks, 3
    to score."""
    if not (LISTS / "183" / "labeled.txt").is_file():
        pytest.skip(f"no published lists in TEST_DATA ({TEST_DATA})")
    root, source = tmp_path / "voc", shapes_root / "voc"
    base, lists = root / "VOCdevkit" / "VOC2012", root / "splits" / "gta_seg" / "183"
    for folder in (
        base / "JPEGImages",
        base / "SegmentationClassAug",
        base / "ImageSets" / "Segmentation",
        lists,
    ):
        folder.mkdir(parents=True)
    labeled = (LISTS / "183" / "labeled.txt").read_text().split()
    unlabeled = (LISTS / "183" / "unlabeled.txt").read_text().split()[:8]
    val = (LISTS / "val.txt").read_text().split()[:3]
    for i, name in enumerate([*labeled, *unlabeled, *val]):
        stem = f"train_{i:06d}"
        (base / "JPEGImages" / f"{name}.jpg").symlink_to(source / "JPEGImages" / f"{stem}.jpg")
        if name not in unlabeled:
            (base / "SegmentationClassAug" / f"{name}.png").symlink_to(
                source / "SegmentationClass" / f"{stem}.png"
            )
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(val))
    (base / "ImageSets" / "Segmentation" / "train_aug.txt").write_text(
        "\n".join([*labeled, *unlabeled])
    )
    shutil.copy(LISTS / "183" / "labeled.txt", lists)
    (lists / "unlabeled.txt").write_text("\n".join(unlabeled))
    return root


def test_preset_voc_with_the_published_183_labels(voc_root, tmp_path, io):
    out = tmp_path / "out"
    line = argv(dataset="voc", root=voc_root, steps=2, warmup_epochs=0.5, out=out, **TINY)
    picture = next((voc_root / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir())
    said = two_steps_score_predict(line, out, picture, io)
    assert all(
        words in said
        for words in ("183 labeled images", "3b208061a59a", "voc gta_seg 183", "8 unlabeled")
    )
    results = json.loads((out / "results.json").read_text())
    assert results["split_fingerprint"].startswith("3b208061a59a42b4954b136d")
    assert len(results["teacher"]["last"]["iou"]) == 21


def test_published_list_whose_images_are_not_there(voc_root, tmp_path, io):
    shutil.copy(LISTS / "183" / "unlabeled.txt", voc_root / "splits" / "gta_seg" / "183")
    error = run(argv(dataset="voc", root=voc_root, out=tmp_path / "out", **TINY), io).error()
    assert "10391 of 10399" in error and "--root" in error


def test_preset_shapes(tiny, shapes_root, tmp_path, io):
    picture = shapes_root / "voc" / "JPEGImages" / "val_000000.jpg"
    two_steps_score_predict(
        tiny(out=tmp_path / "out", steps=2, warmup_epochs=0.5), tmp_path / "out", picture, io
    )


def test_preset_folder_needs_no_masks_of_unlabeled_images(folder_root, folder_line, tmp_path, io):
    (tmp_path / "list.txt").write_text("".join(f"train_{i:06d}\n" for i in range(4)))
    for i in range(4, 8):
        (folder_root / "labels" / "train" / f"train_{i:06d}.png").unlink()
    said = two_steps_score_predict(
        folder_line(split=tmp_path / "list.txt"),
        tmp_path / "run",
        folder_root / "images" / "val" / "val_000000.jpg",
        io,
    )
    assert "4 labeled images" in said and "8 unlabeled ones" in said


def test_a_draw_takes_images_that_have_labels(folder_root, folder_line, tmp_path, io):
    """data/README.md: images that are never used as labeled ones need no masks."""
    for i in range(4, 8):
        (folder_root / "labels" / "train" / f"train_{i:06d}.png").unlink()
    said = run(folder_line(split="random:4"), io).ok().out
    assert "4 labeled images" in said and "8 unlabeled ones" in said


@pytest.mark.skipif(
    not hasattr(shapes, "make_cityscapes"), reason="data.shapes draws no Cityscapes tree yet"
)
def test_preset_cityscapes(tmp_path, io):
    root = shapes.make_cityscapes(tmp_path / "cityscapes")
    line = argv(
        dataset="cityscapes",
        root=root,
        split="random:4",
        steps=2,
        warmup_epochs=0.001,
        out=tmp_path / "out",
        **{**TINY, "crop_size": 64, "ohem": 0},
    )
    picture = next((root / "leftImg8bit" / "val").glob("*/*.png"))
    two_steps_score_predict(line, tmp_path / "out", picture, io)


@pytest.mark.skipif(
    not (TEST_DATA / "camvid").is_dir(), reason=f"no camvid in TEST_DATA ({TEST_DATA})"
)
def test_real_pictures_in_a_folder(tmp_path, io):
    camvid = TEST_DATA / "camvid"
    few = tmp_path / "camvid"
    for kind in ("images", "labels"):
        (few / kind / "val").mkdir(parents=True)
        (few / kind / "train").symlink_to(camvid / kind / "train")
        for path in sorted((camvid / kind / "val").iterdir())[:3]:
            (few / kind / "val" / path.name).symlink_to(path)
    shutil.copy(camvid / "classes.txt", few)
    line = argv(
        dataset="folder",
        root=few,
        split=camvid / "splits" / "labelled_23.txt",
        steps=2,
        warmup_epochs=0.011,
        out=tmp_path / "out",
        unlabeled=camvid / "splits" / "unlabelled_23.txt",
        **TINY,
    )
    picture = sorted((camvid / "images" / "test").iterdir())[0]
    said = two_steps_score_predict(line, tmp_path / "out", picture, io)
    assert "23 labeled images" in said and "344 unlabeled" in said


def test_nothing_of_these_tests_asks_the_network():
    assert (
        environment()["HF_HUB_OFFLINE"] == os.environ["HF_HUB_OFFLINE"] == "1"
        and (REPO / "gta_seg.py").is_file()
    )


# ------------------------------------------------------------------------------------ the sentences
WHOLE = {"UserError", "RankError"}  # a sentence; the others are what a sentence is made of
PARTS = {"BrokenImage", "SplitError", "DownloadError"}


def faults_of_sentences(source: str) -> list[str]:
    """What is wrong with the texts of the errors that are raised for the user: the name of an
    exception in them, or whether they end as they should."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        kind = node.func.id if isinstance(node, ast.Call) and hasattr(node.func, "id") else ""
        if kind not in WHOLE | PARTS or not node.args:
            continue
        text, end = ast.unparse(node.args[0]), node.args[0]
        if isinstance(end, ast.JoinedStr):
            end = end.values[-1]
        if "__name__" in text:
            faults.append(f"the name of an exception: {text}")
        if isinstance(end, ast.Constant) and end.value.endswith(".") != (kind in WHOLE):
            faults.append(f"how it ends: {text}")
    return faults


def test_sentences_for_the_user_are_whole_and_name_no_exception():
    for folder in ("", "common", "data"):
        for path in sorted((REPO / folder).glob("*.py")):
            assert faults_of_sentences(path.read_text()) == [], path
    for bad in (
        "raise UserError(f'{path} cannot be read ({type(error).__name__}).')",
        "raise RankError('half a sentence')",
        "raise SplitError('a part.')",
    ):
        assert len(faults_of_sentences(bad)) == 1
