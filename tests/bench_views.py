"""What strong views of the instance scripts cost, against torchvision's colours and Pillow's blur,
and how many pairs of a labeled and an unlabeled view a loader makes in a second: `make bench`.

Processor seconds in one thread, the two sides in turn, and the median of the ratios of pairs."""

import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import better_pseudo_labels
import guided_distillation
from common import colour
from common.instances import Views, load
from common.objects import Instances, Photo, Thing
from tests.measure import pair, seconds

SIDE = 1024
CORES, GPUS = 16, 8  # of the machine that the number of pairs is scaled to
SCRIPTS = (guided_distillation, better_pseudo_labels)


def pillows_blur(image: Tensor, sigma: float) -> Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    blurred = np.array(picture.filter(ImageFilter.GaussianBlur(sigma)))
    return torch.from_numpy(blurred).permute(2, 0, 1).contiguous()


PLAIN = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
    "grey": partial(tv.rgb_to_grayscale, num_output_channels=3),
    "blur": pillows_blur,
}
OURS = {name: getattr(colour, name) for name in PLAIN}
STRENGTHS = {"brightness": [1.2], "contrast": [1.2], "saturation": [1.2], "hue": [0.07], "grey": []}


def scene(height: int, width: int) -> Tensor:
    """A smooth picture in many colours."""
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def with_colours(functions: dict) -> None:
    for name, function in functions.items():
        setattr(colour, name, function)


def bench_colours() -> None:
    image = scene(SIDE, SIDE)
    for name in PLAIN:
        for strength in [[0.8], [1.8]] if name == "blur" else [STRENGTHS[name]]:
            a, b, ratio = pair(
                partial(PLAIN[name], image, *strength), partial(OURS[name], image, *strength)
            )
            shown = f" {strength[0]}" if name == "blur" else ""
            print(
                f"{name}{shown}, {SIDE} x {SIDE}: plain {a * 1e3:.1f} ms, ours {b * 1e3:.1f} ms, "
                f"ratio {ratio:.1f}"
            )


def bench_unlabeled(samples: int = 20) -> None:
    """Views of one decoded picture of 640 x 480, the same draws on both sides."""
    image, photo = scene(480, 640), Photo("a", None)
    for script in SCRIPTS:
        args = script.preset("coco")

        def views(functions: dict, script=script, args=args) -> None:
            with_colours(functions)
            for seed in range(samples):
                script.unlabeled_view(args, image, photo, np.random.default_rng(seed))
            with_colours(OURS)

        a, b, ratio = pair(partial(views, PLAIN), partial(views, OURS), rounds=3)
        per_gpu = CORES / GPUS * samples
        print(
            f"{script.__name__}, unlabeled views of {SIDE}, without decoding: plain "
            f"{a / samples * 1e3:.0f} ms a sample, ours {b / samples * 1e3:.0f} ms, ratio "
            f"{ratio:.1f}; {CORES} cores such as this one make {per_gpu / a:.0f} and "
            f"{per_gpu / b:.0f} of them a second for each of {GPUS} GPUs"
        )


def labeled_photo(folder: Path, objects: int = 7) -> Photo:
    """A JPEG of 640 x 480 with noise, of a photograph's size on disk, and polygons of 24 points."""
    g = np.random.default_rng(1)
    pixels = scene(480, 640).permute(1, 2, 0).numpy() + g.normal(0, 12, (480, 640, 3))
    path = folder / "a.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    turn = np.linspace(0, 2 * np.pi, 25)[:-1]
    things = []
    for _ in range(objects):
        radius = np.exp(g.uniform(2, 5)) * g.uniform(0.7, 1, 24)
        points = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        points = (points + g.uniform(0, (640, 480))).clip(0, (640, 480))
        things.append(Thing(int(g.integers(80)), [points.ravel()], False, 1.0))
    return Photo("a", path, 1, 480, 640, tuple(things))


def bench_pairs(samples: int = 40) -> None:
    """What a worker does for a labeled and an unlabeled view, decoding included, but for putting
    views into one batch."""
    data = Instances("coco", Path(), [str(i) for i in range(80)], [*range(80)], [], [], [])
    with tempfile.TemporaryDirectory() as folder:
        photo = labeled_photo(Path(folder))
        kilobytes = photo.image.stat().st_size / 1e3
        decoding = seconds(lambda: [load(photo) for _ in range(samples)]) / samples
        for script in SCRIPTS:
            args = script.preset("coco")
            labeled = Views([photo], partial(script.labeled_view, args, data), 0, "labeled")
            unlabeled = Views([photo], partial(script.unlabeled_view, args), 0, "unlabeled")

            def views(of: Views) -> None:
                for sample in range(samples):
                    of[0, 0, sample]

            times = [[seconds(partial(views, x)) for x in (labeled, unlabeled)] for _ in range(3)]
            a, b = (statistics.median(x) / samples for x in zip(*times, strict=True))
            print(
                f"{script.__name__}, views of {SIDE} of a JPEG of {kilobytes:.0f} kB with "
                f"{len(photo.things)} objects: labeled {a * 1e3:.0f} ms, unlabeled {b * 1e3:.0f} "
                f"ms, of which {decoding * 1e3:.0f} ms each are decoding; {CORES} cores such as "
                f"this one make {CORES / GPUS / (a + b):.0f} pairs a second for each of {GPUS} GPUs"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread")
    for bench in (bench_colours, bench_unlabeled, bench_pairs):
        bench()
