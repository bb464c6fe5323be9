"""What Mask2Former's training step costs in guided_distillation.py, against transformers' with the
same weights, images and targets, as ratios measured in one run: `make bench`.

Memory is the peak of the resident set above what it was before the step (Linux), each in a process
of its own, in which the C library gives freed blocks back at once: otherwise it measures how it
keeps them."""

import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import guided_distillation as gd
from tests import measure

sys.path.insert(0, str(Path(__file__).parent))
from counting import count

CLASSES, OBJECTS = 80, 7  # of COCO; objects of an image, its mean


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def peak(function) -> float:
    """GiB that a call takes at most above what is taken before it."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    return measure.peak(function) / 2**30


def build(batch: int, size: int):
    """Training steps of transformers' network and of ours, from equal weights on equal images and
    targets."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    theirs = (
        Mask2FormerForUniversalSegmentation(
            Mask2FormerConfig(backbone_config=ResNetConfig(out_features=stages), num_labels=CLASSES)
        )
        .to(DEVICE)
        .train()
    )
    for m in theirs.modules():  # BatchNorm as constant as in our network
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval().requires_grad_(False)
    args = gd.preset("coco", backbone="resnet50")
    ours = gd.Mask2Former(args, CLASSES).to(DEVICE)
    ours.load_state_dict(gd.our_names(theirs.state_dict()), strict=False)
    ours.train()
    images = torch.randn(batch, 3, size, size, device=DEVICE)
    coarse = torch.rand(batch * OBJECTS, 1, 8, 8)
    masks = (
        F.interpolate(coarse, size=(size, size), mode="bilinear")[:, 0]
        .gt(0.6)
        .to(torch.uint8)
        .to(DEVICE)
    )
    labels = torch.randint(0, CLASSES, (batch, OBJECTS), device=DEVICE)
    targets = [
        gd.Target(label, mask) for label, mask in zip(labels, masks.split(OBJECTS), strict=True)
    ]
    sgd = [torch.optim.SGD(net.parameters(), 1e-6, foreach=True) for net in (theirs, ours)]

    def update(optimizer, loss) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def their_step() -> None:
        update(
            sgd[0],
            theirs(
                images,
                mask_labels=[t.masks.float() for t in targets],
                class_labels=[t.labels for t in targets],
            ).loss,
        )

    def our_step() -> None:
        norms = gd.normalisers(targets, args.queries)
        points = [gd.generator(DEVICE, "bench", i) for i in range(batch)]
        update(sgd[1], gd.criterion(ours(images), targets, norms, points)["loss"])

    return their_step, our_step, ours, images, targets, args


def bench_step(batch: int = 1, size: int = 512) -> None:
    theirs, ours, *_ = build(batch, size)
    a, b, ratio = measure.pair(ours, theirs, rounds=3, on_gpu=ON_GPU)
    print(
        f"training step, R50, {batch} x {size}: transformers {b:.2f} s, ours {a:.2f} s, "
        f"ratio {ratio:.2f}"
    )
    memory = {}
    for name in ("transformers", "ours", "ours, --checkpointing"):
        run = subprocess.run(
            [sys.executable, "-m", "tests.bench_guided", "peak", name, str(batch), str(size)],
            check=True,
            cwd=Path(__file__).parents[1],
            text=True,
            capture_output=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        )
        memory[name] = float(run.stdout.split()[-1])
    first, *others = memory.values()
    print(
        "peak memory above the step's start: "
        + ", ".join(f"{name} {x:.2f} GiB" for name, x in memory.items())
        + f"; ratios {', '.join(f'{x / first:.2f}' for x in others)}"
    )


def bench_kernels(batch: int = 2, size: int = 64) -> None:
    """Of a step with SGD, counted from operators: `counting.py`."""
    theirs, ours, *_ = build(batch, size)
    kernels = [count(step).kernels.total() for step in (ours, theirs)]
    print(
        f"kernels of a training step, R50, {batch} images: transformers {kernels[1]}, ours "
        f"{kernels[0]}, ratio {kernels[0] / kernels[1]:.2f}"
    )


def bench_student(batch: int = 2, size: int = 64) -> None:
    """Kernels of a student's step of as many labeled and unlabeled images: `train_step`, but that
    the student learns from OBJECTS pseudo labels an image, whatever the teacher finds."""
    _, _, student, _, targets, args = build(batch, size)
    teacher = gd.Mask2Former(args, CLASSES).to(DEVICE).eval()
    optimizer = gd.adamw(student, args.lr, args.backbone_lr, fused=True)
    s = gd.State("student", student, teacher, optimizer, student, gd.Plan(0, 0), 0, 1)
    images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE)
    unlabeled = gd.Batch(images, images, [], torch.zeros(batch))
    learn = partial(gd.learn, s, images, targets, args=args, world=gd.World())
    parts = {
        "average": lambda: gd.ema_update(teacher, student, args.ema),
        "labeled images": lambda: learn(1.0, "l", exchange=False),
        "teacher": lambda: gd.teach(teacher, unlabeled, args),
        "unlabeled images": lambda: learn(args.lambda_u, "u", exchange=True),
        "AdamW and the norm of gradients": lambda: gd.update(s),
    }
    for part in parts.values():  # AdamW makes its state in the first step
        part()
    optimizer.zero_grad(set_to_none=True)
    kernels = {name: count(part).kernels.total() for name, part in parts.items()}
    print(
        f"kernels of a student's step, R50, {batch} + {batch} images: {sum(kernels.values())}; "
        + ", ".join(f"{name} {number}" for name, number in kernels.items())
    )


def print_peak(name: str, batch: str, size: str) -> None:
    """In a process of its own: the peak of one network's step, the median of three after the
    first."""
    theirs, ours, net, *_ = build(int(batch), int(size))
    net.pixel_decoder.checkpointing = name.endswith("checkpointing")
    step = theirs if name == "transformers" else ours
    step()
    print(statistics.median(peak(step) for _ in range(3)))


def bench_parts(batch: int = 1, size: int = 512) -> None:
    """Where our step goes."""
    _, _, net, images, targets, args = build(batch, size)
    maps = [m.detach().requires_grad_() for m in net.backbone(images)]
    levels, features = (
        x.detach().requires_grad_()
        if isinstance(x, torch.Tensor)
        else [y.detach().requires_grad_() for y in x]
        for x in net.pixel_decoder(maps)
    )
    heads = gd.Heads(*(x.detach().requires_grad_() for x in net.decoder(levels, features)))
    norms = gd.normalisers(targets, args.queries)
    points = partial(gd.generator, DEVICE, "bench")

    def back(*outputs) -> None:
        torch.autograd.backward([x.sum() for x in outputs if x.requires_grad])

    parts = {
        "backbone": lambda: back(*net.backbone(images)),
        "pixel decoder": lambda: back(*(y := net.pixel_decoder(maps))[0], y[1]),
        "transformer decoder": lambda: back(*net.decoder(levels, features)),
        "matching and losses": lambda: gd.criterion(
            heads, targets, norms, [points(i) for i in range(batch)]
        )["loss"].backward(),
    }
    times = {}
    for name, part in parts.items():
        part()
        times[name] = statistics.median(measure.seconds(part, on_gpu=ON_GPU) for _ in range(3))
    total = sum(times.values())
    print(
        "forward and backward: "
        + ", ".join(f"{name} {t:.2f} s ({t / total:.0%})" for name, t in times.items())
    )


def bench_memory(size: int = 1024) -> None:
    """Counted on tensors without contents, float32: what a forward pass of one crop keeps for its
    backward pass, and what weights, gradients and AdamW's state take; the weights of the teacher,
    which has neither, are in."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    backbones = (
        "resnet50.tv_in1k",
        "swin_base_patch4_window12_384.ms_in22k",
        "vit_base_patch14_dinov2.lvd142m",
        "swin_large_patch4_window12_384.ms_in22k",
        "vit_large_patch14_dinov2.lvd142m",
    )
    print(
        f"one crop of {size} x {size}: parameters; weights, gradients, AdamW and teacher; kept for "
        "the backward pass; the same with --checkpointing"
    )
    for name in backbones:
        kept = []
        for checkpointing in (False, True):
            args = gd.preset("coco", backbone=name, checkpointing=checkpointing)
            net, hold = gd.Mask2Former(args, CLASSES).train(), []
            seen: dict[int, int] = {p.untyped_storage()._cdata: 0 for p in net.parameters()}

            def pack(tensor, seen=seen, hold=hold):
                seen.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
                hold.append(tensor)  # so that no place is given twice
                return tensor

            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
            with FakeTensorMode(allow_non_fake_inputs=True), hooks:
                hold.append(net(torch.empty(1, 3, size, size)))
            kept.append(sum(seen.values()))
            for cached in (gd.sine_positions, gd.cell_centres, gd.shift_mask):
                cached.cache_clear()
        count = sum(p.numel() for p in net.parameters())
        print(
            f"  {name.split('.')[0]}: {count / 1e6:.0f} M; {count * 4 * 5 / 2**30:.1f} GiB; "
            f"{kept[0] / 2**30:.1f} GiB; {kept[1] / 2**30:.1f} GiB"
        )


def bench_ema() -> None:
    nets = [gd.Mask2Former(gd.preset("coco", backbone="resnet50"), CLASSES) for _ in range(2)]

    def loop() -> None:
        with torch.no_grad():
            for t, s in zip(nets[1].parameters(), nets[0].parameters(), strict=True):
                t.copy_(0.9996 * t + (1 - 0.9996) * s)

    ours = partial(gd.ema_update, nets[1], nets[0], 0.9996)
    a, b, ratio = measure.pair(ours, loop, rounds=7, on_gpu=ON_GPU)
    print(
        f"EMA of 44 M parameters: loop {b * 1e3:.0f} ms, foreach {a * 1e3:.0f} ms, "
        f"ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print_peak(*sys.argv[2:])
        sys.exit()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {DEVICE}")
    for bench in (bench_step, bench_kernels, bench_student, bench_parts, bench_memory, bench_ema):
        bench()
