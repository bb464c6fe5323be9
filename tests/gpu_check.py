"""Does everything work on this GPU, and how fast? One command, ten minutes, before the first run.

    python tests/gpu_check.py --out gpu.json            all parts, as far as ten minutes go
    python tests/gpu_check.py --only equal "speed gta"  the parts whose names begin like this
    python tests/gpu_check.py --list                    the names of all parts
    python tests/gpu_check.py --device cpu --small      the same parts, tiny, without a GPU

It needs no data but drawn shapes and random tensors, and no network. Each part runs in a process
of its own, prints one line, and does not stop the others when it fails, crashes or hangs. What
they found is printed as JSON in the end, and written to --out after each part. The exit code is 1
when a part failed.

    equal     one step in float32, here and on the CPU: the same losses and gradients
    ranks     a step on two processes, with synchronised BatchNorm: the gradient of one process
    profile   kernels of a step, how often it waits for the device, the ten slowest kernels
    compile   a step with --compile has the losses of a step without
    resume    a run that is killed goes on where it was
    speed     images a second and memory at the papers' sizes, beside what the arithmetic needs
    bf16      the losses of 20 steps in bf16 beside those in float32
    train     a short run on drawn shapes, and its score

On one GPU the two processes of `ranks` share it, which NCCL refuses; so gloo carries their sums.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from common import distributed, instances, semantic
from common.distributed import World
from data import shapes

# Children are forked: they start at once, for the libraries are loaded. So nothing here may touch
# the GPU before the fork; each child does it for itself.
processes = multiprocessing.get_context("fork")

SCRIPTS = {
    "gta": "gta_seg",
    "gist": "gist_rist",
    "guided": "guided_distillation",
    "better": "better_pseudo_labels",
}
TASKS = SCRIPTS | {"guided semantic": "guided_distillation"}  # with the other task of a script
CLASSES = 5  # of random labels, where a part does not ask for more
OBJECTS = 7  # of a random image
REACHES = 1e-4  # how far losses may be apart, relative to the larger of their size and 1
COSINE = 0.9999  # of the two gradients, at least


class Setup(NamedTuple):
    """What all parts are told."""

    device: str  # cpu or cuda
    small: bool
    folder: Path  # for files, removed in the end


class Training(NamedTuple):
    """A script's State, and its training step on random batches."""

    state: Any
    train_step: Callable[[], dict[str, Tensor]]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return self.state.networks()

    def step(self) -> dict[str, Tensor]:
        """Make a step -> what the script would log."""
        log = self.train_step()
        self.state.step += 1
        return log

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step, on the CPU."""
        return {
            f"{network}.{name}": parameter.grad.detach().double().cpu()
            for network, net in self.networks.items()
            for name, parameter in net.named_parameters()
            if parameter.grad is not None
        }


# ------------------------------------------------------------------------------- random batches
def blocks(low: int, high: int, count: int, size: int, g: torch.Generator) -> Tensor:
    """Random integers (count, size, size) in large blocks, as labels are."""
    coarse = torch.randint(low, high, (count, 1, 8, 8), generator=g).float()
    return nn.functional.interpolate(coarse, size=(size, size))[:, 0].long()


def pictures(count: int, size: int, g: torch.Generator) -> Tensor:
    """Random images (count, 3, size, size) in 0..255: blocks with noise on them."""
    colour = blocks(0, 200, 3 * count, size, g).view(count, 3, size, size)
    return colour + torch.randint(0, 56, colour.shape, generator=g)


def semantic_batch(count: int, size: int, classes: int, g: torch.Generator) -> semantic.Batch:
    """Images (count, 3, size, size) in 0..255, and their labels."""
    valid = torch.ones(count, size, size, dtype=torch.bool)
    label = blocks(0, classes, count, size, g)
    images = pictures(count, size, g).float()
    return semantic.Batch(images, valid, label, torch.zeros(count, dtype=torch.long))


def instance_batch(count: int, size: int, classes: int, g: torch.Generator) -> instances.Batch:
    """Images of rectangles, which are the objects."""
    images, targets = pictures(count, size, g).byte(), []
    for _ in range(count):
        masks = torch.zeros(OBJECTS, size, size, dtype=torch.uint8)
        for mask in masks:
            y, x = torch.randint(0, size // 2, (2,), generator=g).tolist()
            h, w = torch.randint(size // 8, size // 2, (2,), generator=g).tolist()
            mask[y : y + h, x : x + w] = 1
        labels = torch.randint(0, classes, (OBJECTS,), generator=g)
        targets.append(instances.Target(labels, masks))
    return instances.Batch(images, images.clone(), targets, torch.zeros(count, dtype=torch.long))


def pixel_batch(count: int, size: int, classes: int, g: torch.Generator) -> instances.Batch:
    """Images whose targets are a mask for each class of a label map, which leaves pixels out."""
    from guided_distillation import class_masks

    images = pictures(count, size, g).byte()
    labels = blocks(0, classes + 1, count, size, g)
    labels[labels == classes] = semantic.IGNORE
    targets = [class_masks(label.byte().numpy()) for label in labels]
    return instances.Batch(images, images.clone(), targets, torch.zeros(count, dtype=torch.long))


def side(args) -> int:
    """Of a random image; the random batches are square."""
    size = getattr(args, "crop_size", None) or args.image_size
    return size if isinstance(size, int) else size[0]


# ------------------------------------------------------------------------- the four training steps
def gta(args, classes: int, count: int, world: World) -> Training:
    """`count` labeled and `count` unlabeled images on this process."""
    import gta_seg

    g = torch.Generator().manual_seed(0)
    batches = [semantic_batch(world.size * count, side(args), classes, g) for _ in range(2)]
    mine = slice(world.rank * count, (world.rank + 1) * count)
    labeled, unlabeled = (
        gta_seg.prepare(semantic.Batch(*(x[mine] for x in batch)), world) for batch in batches
    )
    s, _ = gta_seg.build(args, classes, world)
    gta_seg.end_of_warmup(s, args)
    s.student.train()
    return Training(s, lambda: gta_seg.train_step(s, labeled, unlabeled, args, world))


def gist(args, classes: int, count: int, world: World) -> Training:
    import gist_rist

    g = torch.Generator().manual_seed(0)
    labeled, pseudo = (
        semantic_batch(count, side(args), classes, g).to(world.device) for _ in range(2)
    )
    tree = gist_rist.Tree(args, world, SimpleNamespace(classes=range(classes)), [], [], [])
    student = tree.network(None)
    teacher = tree.network(student.state_dict()).requires_grad_(False).eval()
    s = gist_rist.State(student, gist_rist.optimizer_of(student, args), teacher)
    return Training(s, lambda: gist_rist.refine_step(s, args, "F0.5", 0.5, s.step, labeled, pseudo))


def guided(args, classes: int, count: int, world: World) -> Training:
    import guided_distillation

    g = torch.Generator().manual_seed(0)
    batch_of = pixel_batch if args.task == "semantic" else instance_batch
    batches = [batch_of(count, side(args), classes, g) for _ in range(2)]
    labeled, unlabeled = (instances.to_device(batch, world.device) for batch in batches)
    data = SimpleNamespace(classes=range(classes))
    s, _ = guided_distillation.begin("student", args, data, world, 0)
    return Training(s, lambda: guided_distillation.train_step(s, labeled, unlabeled, args, world))


def better(args, classes: int, count: int, world: World) -> Training:
    import better_pseudo_labels as better_script

    g = torch.Generator().manual_seed(0)
    labeled, unlabeled = (
        instances.to_device(instance_batch(count, side(args), classes, g), world.device)
        for _ in range(2)
    )
    ones = torch.full((classes,), 10, device=world.device)
    smooth = better_script.class_targets("uniform", torch.eye(classes), ones.cpu(), 0.1, 1.5)
    known = better_script.Classes(ones, ones, smooth.to(world.device), ["f"] * classes)
    teacher = better_script.network(args, classes, world, "student").requires_grad_(False).eval()
    student = better_script.network(args, classes, world, "student").train()
    for net in (teacher, student):
        net.heads.learned.fill_(True)
    if args.compile:
        student.backbone.compile()
    s = better_script.State(
        "student",
        student,
        teacher,
        better_script.adamw(student, args, world),
        distributed.parallel(student, world),
        known,
        torch.full((classes,), 0.001, device=world.device),
    )
    return Training(s, lambda: better_script.train_step(s, labeled, unlabeled, args, world))


MAKE = {"gta": gta, "gist": gist, "guided": guided, "better": better, "guided semantic": guided}

APART = ("objectness.weight", "classes.weight")  # layers of better_pseudo_labels.py

# Networks for one small step. Nothing is drawn on the device, and pseudo labels are found although
# nothing was learned.
TINY = {
    "gta": dict(width=16, crop_size=64, cutmix=0, cutmix_labeled=0, batch_size=4),
    "gist": dict(crop_size=(64, 64), resize=1),
    "guided": dict(burn_in="none", class_threshold=0.3, size_threshold=2, crop_size=(64, 64)),
    "better": dict(threshold=0.02, federated=0, image_size=64, drop_path=0.0),
}
TINY["guided semantic"] = TINY["guided"] | dict(task="semantic", class_threshold=0.15)


def tiny(name: str, **overrides):
    """The settings of a script for one small step."""
    script = importlib.import_module(TASKS[name])
    given = dict(weights="none", precision="fp32") | TINY[name] | overrides
    return script.preset("shapes", **given)


def make_comparable(networks: dict[str, nn.Module]) -> None:
    """Dropout draws from the device's own generator, so it is left out of comparisons. The scores
    of an untrained detector are nearly all equal, and rounding would decide which region is the
    best; so they are drawn apart."""
    import gist_rist

    gist_rist.CL_DROP = 0.0
    for net in networks.values():
        for module in net.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        for name, parameter in net.named_parameters():
            if name.startswith(("rpn.", "heads.")) and name.endswith(APART):
                parameter.data.mul_(100)


def draw_on_cpu(name: str) -> None:
    """Let a script draw points and regions on the CPU, from the same seeds, wherever it computes.
    It is not undone: the process ends with its part."""
    script = importlib.import_module(TASKS[name])
    if not hasattr(script, "generator"):
        return
    generator, rand = script.generator, torch.rand

    def on_cpu(device: torch.device, *key: int | str) -> torch.Generator:
        return generator(torch.device("cpu"), *key)

    def rand_on_cpu(*shape, generator=None, device=None, **more) -> Tensor:
        if generator is None:
            return rand(*shape, device=device, **more)
        return rand(*shape, generator=generator, **more).to(device or "cpu")

    script.generator, torch.rand = on_cpu, rand_on_cpu


def start(setup: Setup, exact: bool = False) -> World:
    """The device as the scripts start it; `exact` without TF32."""
    if setup.device == "cpu":
        torch.set_num_threads(1 if setup.small else os.cpu_count() or 1)
    world = distributed.start(setup.device)
    if exact:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
    return world


def losses_of(log: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in log.items() if name.startswith("loss")}


def compare_losses(ours: dict[str, float], theirs: dict[str, float], reaches: float) -> float:
    """The largest difference; ValueError when it is larger than allowed, or not a number."""
    apart = max(abs(ours[k] - theirs[k]) / max(1.0, abs(theirs[k])) for k in theirs)
    if ours.keys() != theirs.keys() or not apart <= reaches:
        raise ValueError(f"losses differ: {ours} and {theirs}")
    return apart


def compare_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Their cosine; ValueError when it is below the least one."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one has gradients of {sorted(ours.keys() ^ theirs.keys())[:5]}")
    a, b = (torch.cat([x[k].flatten() for k in sorted(theirs)]) for x in (ours, theirs))
    cosine = float(a @ b / (a.norm() * b.norm()))
    if not cosine >= COSINE:
        raise ValueError(f"the gradients' cosine is {cosine:.6f}, below {COSINE}")
    return cosine


# --------------------------------------------------------------------------------------- the parts
# A part fills `facts` as it goes, so that what it found before it failed is kept.
def device(facts: dict, setup: Setup) -> None:
    """Which device, and how fast it multiplies matrices."""
    world = start(setup)
    facts.update(torch=torch.__version__, python=sys.version.split()[0], cpus=os.cpu_count())
    if setup.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts.update(gpu=about.name, gib=round(about.total_memory / 2**30, 1))
        facts.update(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        facts["gpus"] = torch.cuda.device_count()
    for kind in (torch.bfloat16, torch.float32):
        name = str(kind).removeprefix("torch.")
        facts[f"tflops {name}"] = round(matmul_rate(world, kind, setup.small) / 1e12, 3)


def matmul_rate(world: World, kind: torch.dtype, small: bool) -> float:
    """Floating-point operations a second of the largest product that is usual: the roof that steps
    are compared with. In float32 it is that of TF32, as in a run."""
    n = 256 if small else 8192
    a = torch.randn(n, n, device=world.device, dtype=kind)
    for _ in range(3):
        a @ a
    repeats = 2 if small else 10
    seconds = timed(lambda: [a @ a for _ in range(repeats)], world)
    return 2 * n**3 * repeats / seconds


def timed(function: Callable, world: World) -> float:
    """Seconds of a call, with all that the device has to do for it."""
    wait(world)
    begin = time.perf_counter()
    function()
    wait(world)
    return time.perf_counter() - begin


def wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def equal(facts: dict, setup: Setup, name: str) -> None:
    """One step in float32, there and on the CPU."""
    world = start(setup, exact=True)
    draw_on_cpu(name)
    found = []
    for place in (World(), world):
        training = MAKE[name](tiny(name), CLASSES, 4, place)
        make_comparable(training.networks)
        log = training.step()
        found.append((losses_of(log), training.gradients()))
        counts = {k: float(v) for k, v in log.items() if k in ("kept", "pseudo_per_image")}
        facts.update(counts)
    (loss_cpu, gradient_cpu), (loss_device, gradient_device) = found
    facts["losses"] = loss_cpu
    facts["apart"] = compare_losses(loss_device, loss_cpu, REACHES)
    facts["cosine"] = round(compare_gradients(gradient_device, gradient_cpu), 7)


def bf16(facts: dict, setup: Setup, name: str) -> None:
    """The same steps in bf16 and in float32."""
    world = start(setup)
    draw_on_cpu(name)
    curves = []
    for precision in ("fp32", "bf16"):
        training = MAKE[name](tiny(name, precision=precision), CLASSES, 4, world)
        make_comparable(training.networks)
        steps = 2 if setup.small else 20
        curves.append([sum(losses_of(training.step()).values()) for _ in range(steps)])
    exact, rounded = curves
    facts["fp32"], facts["bf16"] = ([round(x, 4) for x in (c[0], c[-1])] for c in curves)
    apart = [abs(a - b) / max(abs(a), 1e-6) for a, b in zip(exact, rounded, strict=True)]
    facts["median apart"], facts["most apart"] = statistics.median(apart), max(apart)
    if not statistics.median(apart) < 0.1:
        raise ValueError(f"the losses are {statistics.median(apart):.0%} apart")


def compiled(facts: dict, setup: Setup, name: str) -> None:
    """A step of the compiled networks, beside one of the same networks that are not."""
    world = start(setup, exact=True)
    draw_on_cpu(name)
    if setup.small:  # traced, but no code is generated: that takes minutes
        nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="eager")
    losses = []
    for compile_it in (False, True):
        training = MAKE[name](tiny(name, compile=compile_it), CLASSES, 4, world)
        make_comparable(training.networks)
        begin = time.perf_counter()
        losses.append(losses_of(training.step()))
        facts["first step, seconds"] = round(time.perf_counter() - begin, 1)
    facts["apart"] = compare_losses(losses[1], losses[0], 1e-3)


# ------------------------------------------------------------------------------------- processes
def fork(function: Callable, *inputs) -> multiprocessing.Process:
    process = processes.Process(target=function, args=inputs)
    process.start()
    return process


def ranks(facts: dict, setup: Setup) -> None:
    """A step of gta_seg.py on 2 + 2 images of each of two processes, and on 4 + 4 of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [fork(rank_step, setup, rank, 2, port) for rank in range(2)]
    alone = fork(rank_step, setup, 0, 1, port)
    for process in (*several, alone):
        process.join()
    codes = [process.exitcode for process in (*several, alone)]
    if any(codes):
        raise ValueError(f"exit codes of both processes and of one alone: {codes}")
    names = ("2-0", "2-1", "1-0")
    first, second, one = (torch.load(setup.folder / f"ranks-{name}.pt") for name in names)
    facts["backend"] = first["backend"]
    facts["cosine of both"] = compare_gradients(first["gradients"], second["gradients"])
    mean = {k: (first["losses"][k] + second["losses"][k]) / 2 for k in first["losses"]}
    facts["apart"] = compare_losses(mean, one["losses"], REACHES)
    facts["cosine to one"] = compare_gradients(first["gradients"], one["gradients"])
    for name, there in one["statistics"].items():
        torch.testing.assert_close(first["statistics"][name], there, rtol=1e-3, atol=1e-4)


def rank_step(setup: Setup, rank: int, size: int, port: int) -> None:
    """One process: a step, whose losses, gradients and statistics go into a file."""
    world, backend = start(setup, exact=True), "none"
    if size > 1:
        shared = setup.device == "cpu" or torch.cuda.device_count() < size
        backend = "gloo" if shared else "nccl"
        if not shared:
            torch.cuda.set_device(rank)
        where = world.device if shared else torch.device("cuda", rank)
        world = World(rank, size, rank, where)
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group(backend, address, world_size=size, rank=rank)
    training = gta(tiny("gta"), CLASSES, 4 // size, world)
    make_comparable(training.networks)
    losses = losses_of(training.step())
    statistics_of = {
        name: buffer.cpu()
        for name, buffer in training.networks["student"].named_buffers()
        if "running" in name
    }
    found = dict(backend=backend, losses=losses, statistics=statistics_of)
    found["gradients"] = training.gradients()
    torch.save(found, setup.folder / f"ranks-{size}-{rank}.pt")
    distributed.stop()


# ------------------------------------------------------------------------------------------- runs
def run_settings(name: str, setup: Setup, out: Path, steps: int, save_every: int):
    """The settings of a short run on drawn shapes, of which fewer are drawn than usual."""
    script = importlib.import_module(TASKS[name])
    counts = dict(train=40, tune=2, val=5) if setup.small else dict(train=240, tune=2, val=60)
    for make in ("make_voc", "make_things", "make_tail"):
        plain = getattr(shapes, make)
        plain = getattr(plain, "func", plain)
        setattr(shapes, make, functools.partial(plain, **counts))
    given = dict(device=setup.device, root=str(setup.folder / "shapes"), out=str(out))
    given |= dict(weights="none", log_every=1, workers=0 if setup.small else 2)
    given |= dict(steps=steps, eval_every=steps, save_every=save_every)
    path = dict(search=("path",), path=("LP",), dev_size=4, store=str(out / "store"))
    own = {
        "gta": dict(warmup_epochs=min(1, steps / 100)),
        "gist": dict(stage0_steps=steps, **path),
        "guided": dict(split="random:20"),
        "guided semantic": dict(task="semantic", split="random:20"),
        "better": dict(split="30", teacher_steps=steps),
    }[name]
    if setup.small:
        own |= SMALL_RUN[name]
    return script.preset("shapes", **(given | own))


SMALL_RUN = {
    "gta": dict(width=8, batch_size=4, crop_size=32),
    "gist": dict(batch_size=2, crop_size=(32, 32), resize=1, path=("P",)),
    "guided": dict(batch_size=2, crop_size=(64, 64), test_size=(64, 64), queries=8, points=64),
    "better": dict(
        batch_size=2, teacher_batch_size=2, image_size=64, embed_size=32, proposals=20, split="8"
    ),
}


SMALL_RUN["guided semantic"] = SMALL_RUN["guided"]


def trained(facts: dict, setup: Setup, name: str) -> None:
    """A short run, and its scores, of which the last one is what matters."""
    script = importlib.import_module(TASKS[name])
    if setup.small:
        torch.set_num_threads(1)
    args = run_settings(
        name, setup, setup.folder / f"train-{name}", 4 if setup.small else 200, 1000
    )
    facts["scores"] = scores_of(script.main(args))


def scores_of(results: dict) -> dict[str, float]:
    """Of results.json: the newest mIoU or AP of each network or search."""
    scores = {}
    for name, record in results.items():
        if isinstance(record, dict):
            newest = record.get("last", record)
            if "miou" in newest or "ap" in newest:
                scores[name] = round(newest.get("miou", newest.get("ap")), 2)
    if not scores:
        raise ValueError(f"no scores in {sorted(results)}")
    return scores


def train_quietly(name: str, args, small: bool) -> None:
    if small:
        torch.set_num_threads(1)
    importlib.import_module(SCRIPTS[name]).main(args)


def resumed(facts: dict, setup: Setup, name: str) -> None:
    """A run that is killed after it has saved, and then resumed to its end."""
    out = setup.folder / f"resume-{name}"
    args = run_settings(name, setup, out, 8 if setup.small else 20, 2)
    first = fork(train_quietly, name, args, setup.small)
    while first.is_alive() and not any(out.rglob("last.pt")):
        time.sleep(0.005)
    first.kill()
    first.join()
    facts["first process ended with"] = first.exitcode
    if first.exitcode != -9:
        raise ValueError("the run ended before it could be killed")
    facts["killed after step"] = [
        torch.load(path, map_location="cpu", weights_only=True)["step"]
        for path in out.rglob("last.pt")
    ]
    args.resume = True
    second = fork(train_quietly, name, args, setup.small)
    second.join()
    if second.exitcode != 0:
        raise ValueError(f"the resumed run ended with {second.exitcode}")
    facts["scores"] = scores_of(json.loads((out / "results.json").read_text()))
    for log in out.rglob("log.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        steps = [line["step"] for line in lines if "images_per_second" in line]
        if steps != list(range(1, len(steps) + 1)):
            raise ValueError(f"{log} does not have each step once: {steps}")


# ------------------------------------------------------------------------------------------ speed
class Case(NamedTuple):
    """A network at a paper's size. `batch` labeled and as many unlabeled images, halved until they
    fit into the memory."""

    script: str
    dataset: str
    classes: int
    batch: int
    flags: dict


CASES = {
    "gta R101 513": Case("gta", "voc", 21, 16, {}),
    "gist R101 321": Case("gist", "voc", 21, 8, dict(precision="bf16")),
    "guided R50 1024": Case("guided", "coco", 80, 8, {}),
    "guided Swin-L 1024": Case(
        "guided",
        "coco",
        80,
        8,
        dict(backbone="swin_large_patch4_window12_384.ms_in22k", checkpointing=True),
    ),
    "guided ViT-L 1024": Case(
        "guided",
        "coco",
        80,
        8,
        dict(backbone="vit_large_patch14_dinov2.lvd142m", checkpointing=True),
    ),
    "better EVA-02-L 1024": Case("better", "lvis", 1203, 4, dict(checkpointing=True)),
    "better R50 1024": Case("better", "coco", 80, 8, dict(backbone="resnet50.tv_in1k")),
}


def speed(facts: dict, setup: Setup, name: str) -> None:
    """Images a second, the peak of memory, and how near this is to the device's matrix products."""
    case = CASES[name]
    world = start(setup)
    script = importlib.import_module(SCRIPTS[case.script])
    args = script.preset(case.dataset, **(dict(weights="none") | case.flags))
    classes, batch = case.classes, case.batch
    if setup.small:
        args, classes, batch = tiny(case.script), CLASSES, 2
    elif case.script == "guided":
        args.burn_in = "none"
    while True:
        try:
            step_speed(facts, case.script, args, classes, batch, world, setup)
            return
        except torch.cuda.OutOfMemoryError:
            facts["memory did not hold"] = f"{batch} + {batch}"
            if batch <= 2:
                raise
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_speed(facts: dict, name: str, args, classes: int, batch: int, world, setup) -> None:
    """Time some steps, then count the operations of one."""
    from torch.utils.flop_counter import FlopCounterMode

    training = MAKE[name](args, classes, batch, world)
    for _ in range(1 if setup.small else 3):
        training.step()
    times, begin = [], time.perf_counter()
    while len(times) < 2 or (len(times) < 10 and time.perf_counter() - begin < 10):
        times.append(timed(training.step, world))
        if setup.small:
            break
    seconds = statistics.median(times)
    facts["batch"] = f"{batch} + {batch}"
    facts["images a second"] = round(2 * batch / seconds, 2)
    facts["seconds a step"] = round(seconds, 4)
    if world.device.type == "cuda":
        facts["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    with FlopCounterMode(display=False) as counter:
        training.step()
    operations = counter.get_total_flops()
    kind = torch.bfloat16 if world.bf16(args.precision) else torch.float32
    least = operations / matmul_rate(world, kind, setup.small)
    facts["TFLOP a step"] = round(operations / 1e12, 4)
    facts["precision"] = str(kind).removeprefix("torch.")
    facts["seconds at the speed of matrix products"] = round(least, 4)
    facts["share of that speed"] = round(least / seconds, 3)


# -------------------------------------------------------------------------------------- profiles
# The middle size: networks of the papers, 2 + 2 images of 512 pixels.
MIDDLE = {
    "gta": dict(dataset="voc", crop_size=513, batch_size=2),
    "gist": dict(dataset="voc", precision="bf16"),
    "guided": dict(dataset="coco", crop_size=(512, 512), burn_in="none"),
    "better": dict(dataset="coco", backbone="resnet50.tv_in1k", image_size=512),
}
# cudaDeviceSynchronize is not among them, for the profiler calls it in the end.
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
WAITS_CPU = ("aten::_local_scalar_dense", "aten::nonzero")  # would wait on a GPU


def profile(facts: dict, setup: Setup, name: str) -> None:
    """Kernels and waits of a step, and where its time goes."""
    from torch.profiler import ProfilerActivity

    world = start(setup)
    if setup.small:
        args = tiny(name)
    else:
        args = importlib.import_module(SCRIPTS[name]).preset(weights="none", **MIDDLE[name])
    training = MAKE[name](args, CLASSES if setup.small else 21, 2, world)
    for _ in range(1 if setup.small else 5):
        training.step()
    wait(world)
    on_gpu = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        training.step()
    events = profiler.key_averages()
    waiting = WAITS if on_gpu else WAITS_CPU
    facts["waits"] = {e.key: e.count for e in events if e.key in waiting}
    facts["kernels"] = sum(e.count for e in events if "LaunchKernel" in e.key)
    of_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    if on_gpu:
        kernels = [e for e in of_device if not getattr(e, "is_user_annotation", False)]
        time_of = {e.key: e.self_device_time_total for e in kernels}
    else:
        time_of = {e.key: e.self_cpu_time_total for e in events}
    total = sum(time_of.values())
    slowest = sorted(time_of, key=time_of.get, reverse=True)[:10]
    facts["device ms" if on_gpu else "ms"] = round(total / 1e3, 2)
    facts["slowest, share of the time"] = {
        key[:90]: round(time_of[key] / max(total, 1e-9), 3) for key in slowest
    }


# --------------------------------------------------------------------------------------- the list
class Part(NamedTuple):
    function: Callable  # (facts, setup)
    seconds: float  # that it takes on a GPU, about; it is not begun when less time is left
    small: bool = True  # whether it is part of --small


def all_parts() -> dict[str, Part]:
    """In this order. What tells most in the least time comes first."""
    parts = {"device": Part(device, 10)}
    named = functools.partial
    for name in TASKS:
        parts[f"equal {name}"] = Part(named(equal, name=name), 10)
    parts["ranks"] = Part(ranks, 15)
    for name in SCRIPTS:
        parts[f"profile {name}"] = Part(named(profile, name=name), 10)
    parts["compile gta"] = Part(named(compiled, name="gta"), 40)
    parts["resume gta"] = Part(named(resumed, name="gta"), 20)
    for name in CASES:
        parts[f"speed {name}"] = Part(
            named(speed, name=name), 20, small="checkpointing" not in CASES[name].flags
        )
    for name in SCRIPTS:
        parts[f"bf16 {name}"] = Part(named(bf16, name=name), 10)
    for name in TASKS:
        parts[f"train {name}"] = Part(named(trained, name=name), 25)
    for name in ("gist", "guided", "better"):
        parts[f"resume {name}"] = Part(named(resumed, name=name), 25, small=False)
    for name in ("gist", "guided", "better"):
        parts[f"compile {name}"] = Part(named(compiled, name=name), 40, small=False)
    return parts


PARTS = all_parts()

LEAST = 60  # seconds that a part may take, however little is expected of it


def child(part: Part, setup: Setup, log: Path, connection) -> None:
    """A part in its own process: what it prints goes into a file, what it found to the parent."""
    os.setsid()  # so that its own children can be ended with it
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    facts, error = {}, ""
    try:
        part.function(facts, setup)
    except BaseException as problem:
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send((error, facts))
    os._exit(1 if error else 0)  # no destructors: a broken device may hang in them


def perform(name: str, part: Part, setup: Setup, seconds: float) -> dict:
    """Run a part for so many seconds at most -> its record."""
    begin = time.perf_counter()
    log = setup.folder / f"{name.replace(' ', '-')}.log"
    receiver, sender = processes.Pipe(duplex=False)
    process = fork(child, part, setup, log, sender)
    sender.close()
    error, facts = "", {}
    try:
        if receiver.poll(max(seconds, 1)):
            error, facts = receiver.recv()
        else:
            error = f"not done after {seconds:.0f} s"
    except EOFError:
        error = "the process crashed"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, 9)  # its own session: the part and its children
        process.join(20)
    if error == "the process crashed":
        error = f"the process crashed, with {process.exitcode}"
    record = {"part": name, "status": "failed" if error else "ok"}
    record["seconds"] = round(time.perf_counter() - begin, 1)
    if error:
        record["error"] = error[:2000]
        if log.exists():
            record["log"] = log.read_text(errors="replace")[-3000:]
    return record | facts


def shortened(value: Any) -> str:
    """A fact as it is printed: four digits of a number are enough."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={shortened(x)}" for key, x in value.items())
    return str(value)


def line_of(record: dict) -> str:
    """What is printed of a part."""
    hidden = ("part", "status", "seconds", "log", "error")
    facts = [f"{k} {shortened(v)}" for k, v in record.items() if k not in hidden]
    text = record.get("error", ", ".join(facts)).replace("\n", " ")
    return f"{record['status']:7} {record['part']:28} {record['seconds']:6.1f} s  {text[:400]}"


def check(names: list[str], setup: Setup, minutes: float, out: Path | None) -> list[dict]:
    """All parts, one after the other."""
    end = time.perf_counter() + 60 * minutes
    records = []
    for name in names:
        part, left = PARTS[name], end - time.perf_counter()
        if left < (1 if setup.small else part.seconds):
            record = {"part": name, "status": "skipped", "seconds": 0.0}
            record["error"] = f"{left:.0f} s of {minutes:g} minutes are left"
        else:
            record = perform(name, part, setup, min(left, max(3 * part.seconds, LEAST)))
        records.append(record)
        print(line_of(record), flush=True)
        if out is not None:
            out.write_text(json.dumps(records, indent=1, default=str))
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it on a CPU")
    parser.add_argument("--only", nargs="+", metavar="PART", help="beginnings of names of parts")
    parser.add_argument("--minutes", type=float, default=10, help="default %(default)s")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--list", action="store_true", help="list the parts and leave")
    args = parser.parse_args(argv)
    names = [name for name, part in PARTS.items() if part.small or not args.small]
    if args.only:
        names = [name for name in PARTS if name.startswith(tuple(args.only))]
    if not names:
        parser.error(f"--only {' '.join(args.only)}: no such part; see --list")
    if args.list:
        print("\n".join(names))
        return 0
    for name in ("timm", "torchvision", "torchvision.ops", *SCRIPTS.values()):
        importlib.import_module(name)  # once, for all children
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(args.device, args.small, Path(folder))
        records = check(names, setup, args.minutes, args.out)
    print(json.dumps(records, default=str))
    return int(any(record["status"] == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
