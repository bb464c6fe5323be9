"""Rooms of common/ that have no file of tests of their own: what they do on GPUs and with several
processes, as far as a CPU can tell; and sentences for the user."""

import contextlib
import errno
import io
import multiprocessing
import os
import pickle
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gta_seg
from common import (
    backbones,
    boxes,
    checkpoints,
    cli,
    distributed,
    errors,
    plots,
    runs,
    semantic,
    transforms,
)
from common.distributed import World
from common.errors import UserError
from common.files import read_image, read_log

TWO_GPUS = World(0, 2, 0, torch.device("cuda"))


# -------------------------------------------------------------------------------------- distributed
def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for here in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        with pytest.raises(
            UserError, match="--device cuda:1 .* 2 processes .*CUDA_VISIBLE_DEVICES"
        ):
            distributed.start("cuda:1")


def test_auto_takes_bf16_where_the_gpu_computes_in_it(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert not TWO_GPUS.bf16("auto") and TWO_GPUS.bf16("bf16") and not TWO_GPUS.bf16("fp32")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert TWO_GPUS.bf16("auto") and not TWO_GPUS.bf16("fp32") and not World().bf16("auto")


@pytest.mark.parametrize("factor, said", [(0.7, False), (40, True)])
def test_a_cpu_that_emulates_bf16_is_told_of_once_with_the_way_out(
    monkeypatch, capsys, factor, said
):
    seconds = {torch.float32: 0.01, torch.bfloat16: 0.01 * factor}
    monkeypatch.setattr(distributed, "seconds_of_convolution", seconds.get)
    for world, precision in ((World(), "fp32"), (World(), "auto"), (World(1, 2), "bf16")):
        distributed.warn_of_slow_bf16(precision, world)
    assert capsys.readouterr().err == ""
    distributed.warn_of_slow_bf16("bf16", World())
    sentence = capsys.readouterr().err
    assert ("40 times as long" in sentence and "--precision fp32" in sentence) == said
    assert said or not sentence


def test_the_convolution_that_is_timed_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    assert distributed.seconds_of_convolution(torch.bfloat16) > 0
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------- runs
LOST = [
    "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2046",
    "[../gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:2046: Connection reset by peer",
    "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, "
    "NCCL version 2.28.3",
    "socketProgress: Connection closed by remote peer node<47>",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown "
    "or crash?",
]


CAUSES = [
    "NCCL error in: NCCLUtils.cpp:77, invalid usage, NCCL version 2.28.3\nDuplicate GPU detected",
    "NCCL error in: NCCLUtils.cpp:77, unhandled system error, NCCL version 2.28.3\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device "
    "error.\nError: no socket interface found",
    "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version 2.28.3\n"
    "ncclUnhandledCudaError",
]


@pytest.mark.parametrize("text", LOST + CAUSES)
def test_only_a_lost_process_is_said_to_be_one(monkeypatch, text):
    error = torch.distributed.DistBackendError(text)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert errors.user_sentence(error) == (errors.LOST if text in LOST else None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert errors.user_sentence(error) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    # a download
    assert errors.user_sentence(ConnectionResetError(104, "Connection reset by peer")) is None


@dataclass
class Nothing:
    """No settings."""

    images: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "The GPU ran out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "last.pt"), "No space left"),
        (errors.RankError("x.jpg is broken"), "x.jpg is broken"),
        (UserError("--split 0"), None),
        (torch.distributed.DistBackendError(LOST[0]), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_one_process_alone_meets_it_says_itself(monkeypatch, capsys, error, said):
    """Process 1 of 2. What all meet, or that another is gone, process 0 says."""

    def fail(args):
        raise error

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(cli, "leave", leave)
    for name, value in dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        cli.cli(Nothing, Nothing, fail, choosers=(), argv=[])
    assert left.value.code == 2 and capsys.readouterr().err.count("error: ") == (said is not None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        cli.cli(Nothing, Nothing, fail, choosers=(), argv=[])
    assert f"error: {said or ''}" in capsys.readouterr().err


TRAINED = {"networks": {"student": {}}, "step": 1, "classes": ["a"]}


def test_settings_of_a_checkpoint_leave_out_what_belongs_to_the_machine(tmp_path):
    args = gta_seg.preset("shapes", compile=True, device="cuda", resume=True, width=8, out="there")
    state = TRAINED | {"settings": vars(args)}
    checkpoints.save_checkpoint(tmp_path / "x.pt", "gta_seg.py", state)
    read = cli.saved_settings(gta_seg.Args, tmp_path / "x.pt", "gta_seg.py")
    assert (read.compile, read.device, read.resume) == (False, "auto", False)
    assert (read.width, read.out, read.scale) == (8, "there", args.scale)


def test_peak_memory_of_a_gpu_is_logged_and_a_cpus_is_not(monkeypatch, tmp_path):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    run = runs.Run(tmp_path, "x.py", Nothing(), World(), 0, None, {})
    for number, handler in handlers.items():
        signal.signal(number, handler)
    run.tally(0, {"loss": torch.tensor(1.0)})
    run.log(1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    run.world = World(device=torch.device("cuda"))
    run.log(2)
    first, second = read_log(tmp_path / "log.jsonl")
    assert "peak_gpu_gib" not in first and second["peak_gpu_gib"] == 1.5


# --------------------------------------------------------------------------------- transforms, data
def test_normalize_subtracts_and_divides_bit_by_bit():
    images, valid = (
        torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8),
        torch.rand(2, 9, 7) < 0.5,
    )
    mean, std = (
        torch.tensor(x).view(1, 3, 1, 1)
        for x in (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
    )
    assert torch.equal(transforms.normalize(images), (images.float() - mean) / std)
    assert torch.equal(
        transforms.normalize(images, valid), (images.float() - mean) / std * valid[:, None]
    )


def test_an_image_that_a_voc_list_names_must_be_there(shapes_root, tmp_path):
    """The train list as well as the one that is scored; images that no list names do not matter."""
    source, base = shapes_root / "voc", tmp_path / "voc"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    (base / "JPEGImages").mkdir()
    (base / "SegmentationClass").symlink_to(source / "SegmentationClass")
    for name in ("train_000000", "train_000001", "train_000002", "val_000000"):
        os.symlink(source / "JPEGImages" / f"{name}.jpg", base / "JPEGImages" / f"{name}.jpg")

    def found(train: str | None, val: str) -> list[str]:
        for name, text in (("train", train), ("val", val)):
            path = base / "ImageSets" / "Segmentation" / f"{name}.txt"
            path.unlink(missing_ok=True)
            if text is not None:
                path.write_text(text)
        return list(semantic.find("voc", Path(base)).train)

    assert found("train_000000\ntrain_000001\n", "val_000000\n") == ["train_000000", "train_000001"]
    assert found(None, "val_000000\n") == ["train_000000", "train_000001", "train_000002"]
    with pytest.raises(UserError, match="train_000009.jpg is missing"):
        found("train_000000\ntrain_000009\n", "val_000000\n")
    with pytest.raises(UserError, match="val_000009.jpg is missing"):
        found("train_000000\n", "val_000009\n")


def test_pictures_of_sixteen_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(3, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    image = read_image(tmp_path / "ramp.png")
    assert image.shape == (3, 3, 256) and torch.equal(
        image[1, 2], torch.arange(256, dtype=torch.uint8)
    )
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "ramp.tiff")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "ramp.tiff")


def test_sheets_of_very_wide_pictures_stay_small(tmp_path):
    wide, square = np.zeros((1, 500, 3), np.uint8), np.full((30, 30, 3), 255, np.uint8)
    plots.strip([[wide, square], [square, wide]], ["a", "b"], tmp_path / "sheet.png", height=192)
    assert Image.open(tmp_path / "sheet.png").size[0] < 2 * 4 * 192 + 20


# --------------------------------------------------------------------------------------- run folder
@dataclass
class Settings:
    seed: int = 0
    resume: bool = False
    device: str = ""
    workers: int = 0
    compile: bool = False
    scale: tuple[int, int] = (1, 2)


def hold(out, held, done) -> None:
    runs.open_run(out, "a.py", Settings(), False, True)
    held.set()
    done.wait(20)


def test_two_processes_do_not_run_in_one_folder(tmp_path):
    fork = multiprocessing.get_context("fork")
    held, done = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path / "out", held, done))
    other.start()
    assert held.wait(20)
    with pytest.raises(UserError, match="Another process is at work in"):
        runs.open_run(tmp_path / "out", "a.py", Settings(), False, True)
    done.set()
    other.join()
    assert runs.open_run(tmp_path / "out", "a.py", Settings(), False, True) is False


def test_a_run_from_before_a_flag_goes_on_with_its_default(tmp_path):
    (tmp_path / "config.json").write_text('{"script": "a.py", "settings": {"seed": 0}}')
    assert runs.open_run(tmp_path, "a.py", Settings(), True, False) is False
    with pytest.raises(UserError, match="scale"):
        runs.check_same_run(tmp_path / "config.json", "a.py", Settings(scale=(2, 3)))


def test_checkpoints_of_another_version_are_named(tmp_path):
    state = TRAINED | {"settings": {"seed": 3}}
    checkpoints.save_checkpoint(tmp_path / "x.pt", "a.py", state)
    assert cli.saved_settings(Settings, tmp_path / "x.pt", "a.py").seed == 3
    state["settings"] |= {"old_flag": 1}
    checkpoints.save_checkpoint(tmp_path / "y.pt", "a.py", state)
    with pytest.raises(UserError, match="old_flag"):
        cli.saved_settings(Settings, tmp_path / "y.pt", "a.py")


class Sink(io.BytesIO):
    """A file on a disk with so much space, which notes how much it is given at a time."""

    def __init__(self, space: int):
        super().__init__()
        self.space, self.sizes = space, []

    def write(self, data) -> int:
        self.sizes.append(memoryview(data).nbytes)
        if sum(self.sizes) > self.space:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("space", [10**8, 10**6, 0])
def test_a_checkpoint_is_written_tensor_by_tensor_and_a_full_disk_is_said(monkeypatch, space):
    sink = Sink(space)
    monkeypatch.setattr(checkpoints, "written", lambda path: contextlib.nullcontext(sink))
    state = {"networks": {str(i): torch.randn(100_000) for i in range(20)}}
    if space < 10**8:
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save_checkpoint(Path("x.pt"), "a.py", state)
        return
    checkpoints.save_checkpoint(Path("x.pt"), "a.py", state)
    assert max(sink.sizes) == 400_000  # and never all of it
    read = torch.load(io.BytesIO(sink.getvalue()), weights_only=True)
    assert torch.equal(read["networks"]["19"], state["networks"]["19"])


def test_a_checkpoint_that_fails_leaves_the_old_one(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "x.pt", "a.py", {"step": 1})
    with pytest.raises((TypeError, AttributeError)):
        checkpoints.save_checkpoint(tmp_path / "x.pt", "a.py", {"step": lambda: 2})
    assert checkpoints.load_checkpoint(tmp_path / "x.pt", "a.py")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


# --------------------------------------------------------------------------------- copied elsewhere
def test_a_frozen_network_can_be_pickled():
    """A hook that is a lambda cannot; multiprocessing and copies of whole networks need it."""
    network = backbones.FourMaps("test_resnet", frozen=True, pretrained=False)
    again = pickle.loads(pickle.dumps(network))
    images = torch.rand(1, 3, 64, 64)
    for a, b in zip(network.eval()(images), again.eval()(images), strict=True):
        assert torch.equal(a, b) and b.dtype == torch.float32


def test_anchors_of_an_evaluation_serve_training():
    """What is cached under inference_mode would be refused by autograd."""
    boxes.anchors_of.cache_clear()
    boxes.constant_row.cache_clear()
    with torch.inference_mode():
        anchors, _ = boxes.anchors_of(64, 8.0, torch.device("cpu"))
        boxes.constant_row((1.0, 1.0, 2.0, 2.0), torch.device("cpu"))
    deltas = torch.zeros(len(anchors), 4, requires_grad=True)
    decoded = boxes.decode_boxes(deltas, anchors, (1.0, 1.0, 2.0, 2.0), 64)
    decoded.square().sum().backward()
    assert deltas.grad.abs().sum() > 0
