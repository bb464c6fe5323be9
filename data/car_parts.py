"""Car parts as COCO files, in small:

    python -m data.car_parts Car-Parts-Segmentation --out datasets/car_parts --side 256

The source is a checkout of github.com/dsmlr/Car-Parts-Segmentation (trainingset and testset), or a
folder that has images/ and annotations/{train,val}.json already. Classes that differ by left and
right only become one, because training mirrors its images. Every tenth training picture, by name,
goes into tune.json, on which settings are chosen; the others are train.json, and the test set is
test.json. Pictures are averaged over the pixels that become one, and written as PNG."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from common.errors import UserError
from common.files import read_text, write_text

TUNING = 10  # one training picture in so many chooses settings


class Part(NamedTuple):
    """A part of the source: its COCO file, and the folder of its pictures."""

    annotations: dict
    images: Path


def read_part(source: Path, published: str, ours: str) -> Part:
    """The part that the published data set calls `published` and a converted one `ours`."""
    for file, images in (
        (source / published / "annotations.json", source / published / "JPEGImages"),
        (source / "annotations" / f"{ours}.json", source / "images"),
    ):
        if file.is_file():
            return Part(json.loads(read_text(file)), images)
    raise UserError(
        f"{source} has neither {published}/annotations.json nor annotations/{ours}.json; name a "
        f"checkout of Car-Parts-Segmentation."
    )


def without_side(name: str) -> str:
    """The name of a class without left and right."""
    return re.sub(r"(left|right)_", "", name)


def class_names(parts: list[Part]) -> list[str]:
    """The classes of all parts that have an object, in the order of the alphabet."""
    names = set()
    for part in parts:
        by_id = {category["id"]: category["name"] for category in part.annotations["categories"]}
        names |= {without_side(by_id[thing["category_id"]]) for thing in things(part)}
    return sorted(names)


def things(part: Part) -> list[dict]:
    return part.annotations["annotations"]


class Scaled(NamedTuple):
    """The factors by which a picture became smaller."""

    x: float
    y: float


def shrink(source: Path, target: Path, side: int) -> Scaled:
    """Write a picture whose longer side has at most `side` pixels."""
    with Image.open(source) as picture:
        picture = picture.convert("RGB")
    times = min(1, side / max(picture.size))
    width, height = round(picture.width * times), round(picture.height * times)
    picture.resize((width, height), Image.Resampling.BOX).save(target)
    return Scaled(width / picture.width, height / picture.height)


def scaled_thing(thing: dict, category: int, number: int, times: Scaled) -> dict:
    """An annotation of the picture in its new size."""
    if not isinstance(thing["segmentation"], list):
        raise UserError(f"annotation {thing['id']} is no list of polygons.")
    polygons = [
        [round(value * times[place % 2], 2) for place, value in enumerate(polygon)]
        for polygon in thing["segmentation"]
    ]
    left, top, width, height = thing["bbox"]
    return {
        "id": number,
        "image_id": thing["image_id"],
        "category_id": category,
        "segmentation": polygons,
        "area": round(thing["area"] * times.x * times.y, 2),
        "bbox": [left * times.x, top * times.y, width * times.x, height * times.y],
        "iscrowd": 0,
    }


def convert_part(part: Part, classes: list[str], out: Path, side: int) -> dict:
    """The COCO file of a part in its new size; its pictures are written into out/images."""
    by_id = {category["id"]: category["name"] for category in part.annotations["categories"]}
    factors, pictures = {}, []
    for picture in tqdm(part.annotations["images"], unit="picture"):
        name = f"{Path(picture['file_name']).stem}.png"
        source = part.images / Path(picture["file_name"]).name
        times = shrink(source, out / "images" / name, side)
        factors[picture["id"]] = times
        pictures.append(
            {
                "id": picture["id"],
                "file_name": name,
                "width": round(picture["width"] * times.x),
                "height": round(picture["height"] * times.y),
            }
        )
    annotations = []
    for thing in things(part):
        category = classes.index(without_side(by_id[thing["category_id"]])) + 1
        factor = factors[thing["image_id"]]
        annotations.append(scaled_thing(thing, category, len(annotations) + 1, factor))
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(classes)]
    return {"images": pictures, "annotations": annotations, "categories": categories}


def part_of(file: dict, pictures: list[dict]) -> dict:
    """A COCO file of some of the pictures of another one."""
    ids = {picture["id"] for picture in pictures}
    kept = [thing for thing in file["annotations"] if thing["image_id"] in ids]
    return {"images": pictures, "annotations": kept, "categories": file["categories"]}


def convert(source: Path, out: Path, side: int) -> dict[str, int]:
    """Write the data set `out` -> how many pictures each of its files has. UserError when the
    source is none."""
    training = read_part(source, "trainingset", "train")
    test = read_part(source, "testset", "val")
    classes = class_names([training, test])
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    whole = convert_part(training, classes, out, side)
    ordered = sorted(whole["images"], key=lambda picture: picture["file_name"])
    files = {
        "train": part_of(whole, [p for i, p in enumerate(ordered) if i % TUNING]),
        "tune": part_of(whole, ordered[::TUNING]),
        "test": convert_part(test, classes, out, side),
    }
    for name, file in files.items():
        write_text(out / "annotations" / f"{name}.json", json.dumps(file))
    return {name: len(file["images"]) for name, file in files.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.car_parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("datasets/car_parts"))
    parser.add_argument("--side", type=int, default=256, help="pixels of the longer side, at most")
    args = parser.parse_args(argv)
    try:
        counts = convert(args.source, args.out, args.side)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), f"in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
