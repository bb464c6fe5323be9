"""What gta_seg.py costs, as ratios measured in one run: `make bench`."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import gta_seg
from common import metrics, semantic, transforms
from common.distributed import World
from tests.measure import pair

WORLD = World()


def batch(args: gta_seg.Args, count: int, classes: int) -> semantic.Batch:
    size = args.crop_size
    images = torch.randn(count, 3, size, size).contiguous(memory_format=torch.channels_last)
    return semantic.Batch(
        images,
        torch.ones(count, size, size, dtype=torch.bool),
        torch.randint(0, classes, (count, size, size)),
        torch.zeros(count),
    )


def steps(count: int, world: World = WORLD, **overrides):
    """Functions that make one step of the paper's and of the released loop on the same images, and
    their states."""
    made = {}
    for recipe in ("paper", "released"):
        args = gta_seg.preset(
            "voc", recipe, weights="none", batch_size=count, cutmix=0, **overrides
        )
        state, _ = gta_seg.build(args, 21, world, epoch=1)
        gta_seg.end_of_warmup(state, args)
        state.student.train()
        state.step = 2  # after the first epoch, where the released loop has settled
        function = gta_seg.train_step if recipe == "paper" else gta_seg.train_step_released
        made[recipe] = partial(
            function, state, batch(args, count, 21), batch(args, count, 21), args, world
        )
    return made["paper"], made["released"]


def counted(function) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def largest_graph(function) -> int:
    """Bytes that the largest of a step's graphs keeps for its backward pass, each storage once."""
    sizes, seen, update = [0], {}, gta_seg.update

    def pack(tensor):
        seen[id(tensor.untyped_storage())] = (
            tensor.untyped_storage(),
            tensor.untyped_storage().nbytes(),
        )
        return tensor

    def counting(optimizer, loss):
        sizes.append(sum(size for _, size in seen.values()))
        seen.clear()
        update(optimizer, loss)

    gta_seg.update = counting
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function()
    finally:
        gta_seg.update = update
    return max(sizes)


def bench_step() -> None:
    with torch.device("meta"):  # the paper's network and crop: shapes only, nothing is computed
        paper, released = steps(3, World(device=torch.device("meta")))
        a, b = counted(paper), counted(released)
        saved = largest_graph(paper), largest_graph(released)
    print(
        f"step, R101 513, 3 + 3 images: {a / 1e12:.1f} against {b / 1e12:.1f} TFLOP, "
        f"released / paper {b / a:.2f} (image passes 45 / 21 = {45 / 21:.2f})"
    )
    paper, released = steps(4, backbone="resnet18", crop_size=129, width=64, output_stride=16)
    a, b, ratio = pair(released, paper)
    print(
        f"step, resnet18 129, 4 + 4 images, this machine: released {a * 1e3:.0f} ms, "
        f"paper {b * 1e3:.0f} ms, ratio {ratio:.2f}"
    )
    print(
        f"tensors saved for backward, largest graph, R101 513, 3 + 3 images, fp32: "
        f"released {saved[1] / 2**30:.1f} GiB, paper {saved[0] / 2**30:.1f} GiB, "
        f"ratio {saved[1] / saved[0]:.2f}"
    )


def bench_loader() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        image, label = Path(folder, "a.jpg"), Path(folder, "a.png")
        coarse = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(image)
        Image.fromarray(
            np.kron(rng.integers(0, 21, (15, 20), dtype=np.uint8), np.ones((25, 25), np.uint8))
        ).save(label)
        data = semantic.Segmentation("voc", Path(folder), [str(i) for i in range(21)], {}, [])
        args = gta_seg.preset("voc")
        picture = semantic.Picture("a", image, label)
        views = semantic.Pictures([picture], data, True, partial(gta_seg.augment, args), 0, "x")
        place = iter(range(10**6))

        def ours():
            views[(0, next(place), 0)]

        def pil_chain():  # the chain of PIL and numpy calls that papers' code uses
            g = np.random.default_rng(next(place))
            with Image.open(image) as x, Image.open(label) as y:
                x, y = x.convert("RGB"), y.copy()
            factor = g.uniform(0.5, 1) if g.random() < 0.5 else g.uniform(1, 2)
            size = (int(x.width * factor), int(x.height * factor))
            x, y = (
                x.resize(size, Image.Resampling.BILINEAR),
                y.resize(size, Image.Resampling.NEAREST),
            )
            if g.random() < 0.5:
                x, y = (
                    x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                    y.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                )
            x, y = np.asarray(x, np.float32), np.asarray(y)
            x = (x - transforms.IMAGENET_MEAN) / transforms.IMAGENET_STD
            ph, pw = max(513 - x.shape[0], 0), max(513 - x.shape[1], 0)
            x = np.pad(x, ((0, ph), (0, pw), (0, 0)))
            y = np.pad(y, ((0, ph), (0, pw)), constant_values=255)
            top, left = g.integers(0, x.shape[0] - 512), g.integers(0, x.shape[1] - 512)
            torch.from_numpy(
                np.ascontiguousarray(x[top : top + 513, left : left + 513].transpose(2, 0, 1))
            )
            torch.from_numpy(y[top : top + 513, left : left + 513].copy())

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a loader process
        a, b, ratio = pair(pil_chain, ours, rounds=7, repeats=30)
        torch.set_num_threads(threads)
    print(
        f"loader, 500x375 to 513 with label: PIL chain {a * 1e3:.1f} ms a sample, "
        f"ours {b * 1e3:.1f} ms, ratio {ratio:.2f}; "
        f"bytes to the device {513 * 513 * 16 / 1e6:.1f} against {513 * 513 * 5 / 1e6:.1f} MB"
    )


def bench_ema() -> None:
    args = gta_seg.preset("voc", weights="none")
    one, two = (gta_seg.SegNet(args, 21) for _ in range(2))

    def loop():
        with torch.no_grad():
            for t, s in zip(two.parameters(), one.parameters(), strict=True):
                t.data = 0.99 * t.data + (1 - 0.99) * s.data

    a, b, ratio = pair(loop, lambda: gta_seg.ema_update(two, one, 0.99))
    print(
        f"EMA of 62.6 M parameters: loop {a * 1e3:.0f} ms, "
        f"foreach {b * 1e3:.0f} ms, ratio {ratio:.2f}"
    )


def bench_miou() -> None:
    label = torch.randint(0, 20, (1024, 2048))
    label[label == 19] = 255
    prediction = torch.randint(0, 19, (1024, 2048))

    def masked():
        keep = label != 255
        torch.bincount(label[keep] * 19 + prediction[keep], minlength=361)

    a, b, ratio = pair(masked, lambda: metrics.confusion(prediction, label, 19))
    print(
        f"confusion of a 1024x2048 image: masked torch.bincount {a * 1e3:.1f} ms, "
        f"ours {b * 1e3:.1f} ms, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for bench in (bench_step, bench_loader, bench_ema, bench_miou):
        bench()
