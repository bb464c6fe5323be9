"""What a labeled and an unlabeled training sample of the two semantic scripts cost, from the file
to the crop, against the plain way of `tests/plain_views.py`: `make bench`.

Processor seconds in one thread, the two sides in turn, and the median of the ratios of pairs."""

import importlib.util
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import gist_rist
import gta_seg
from common import semantic
from tests.bench_views import scene
from tests.measure import pair
from tests.plain_views import plain_sample

SIZES = {"voc": (375, 500), "cityscapes": (1024, 2048)}
PICTURES = 4


def data_set(name: str, folder: Path) -> tuple[semantic.Segmentation, list[semantic.Picture]]:
    """Smooth pictures with noise, of a photograph's size on disk, and labels in blocks."""
    g = np.random.default_rng(0)
    height, width = SIZES[name]
    pictures = []
    for i in range(PICTURES):
        noise = g.normal(0, 2 if name == "cityscapes" else 12, (height, width, 3))
        pixels = scene(height, width).permute(1, 2, 0).numpy() + noise
        image = folder / f"{name}{i}.{'png' if name == 'cityscapes' else 'jpg'}"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(image)
        blocks = g.integers(0, 19, (height // 25 + 1, width // 25 + 1))
        values = np.kron(blocks, np.ones((25, 25), np.int64))[:height, :width]
        if name == "cityscapes":
            values = np.array(semantic.CITYSCAPES_IDS)[values]
        label = folder / f"{name}{i}_label.png"
        Image.fromarray(values.astype(np.uint8)).save(label)
        pictures.append(semantic.Picture(str(i), image, label))
    to_class = None
    if name == "cityscapes":
        to_class = np.full(256, semantic.IGNORE, np.uint8)
        to_class[semantic.CITYSCAPES_IDS] = np.arange(19)
    classes = [str(i) for i in range(19)]
    return semantic.Segmentation(name, folder, classes, {}, [], to_class=to_class), pictures


def bench_samples(name: str, samples: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, pictures = data_set(name, Path(folder))
        for script in (gta_seg, gist_rist):
            args = script.preset(name)
            augment = partial(script.augment, args)
            labeled = semantic.Pictures(pictures, data, True, augment, 0, "labeled")
            unlabeled = semantic.Pictures(pictures, data, False, augment, 0, "unlabeled")

            def plain(views: tuple, script=script, args=args) -> None:
                for sample in range(samples):
                    for of in views:
                        plain_sample(script, args, of, (sample % PICTURES, 0, sample))

            def ours(views: tuple) -> None:
                for sample in range(samples):
                    for of in views:
                        of[sample % PICTURES, 0, sample]

            for kind, views in (("labeled", (labeled,)), ("pair", (labeled, unlabeled))):
                a, b, ratio = pair(partial(plain, views), partial(ours, views))
                print(
                    f"{script.__name__}, {name}, {kind}: plain {a / samples * 1e3:.1f} ms, ours "
                    f"{b / samples * 1e3:.1f} ms, ratio {ratio:.2f}"
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    quick = "with" if importlib.util.find_spec("kornia_rs") else "without"
    print(f"torch {torch.__version__}, one thread, {quick} kornia-rs")
    bench_samples("voc", 40)
    bench_samples("cityscapes", 8)
