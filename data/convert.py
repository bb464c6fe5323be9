"""Annotations that people already have, converted into what the scripts read.

    python -m data.convert yolo data.yaml --out datasets/mine
    python -m data.convert cvat annotations.xml --out datasets/mine --to folder

SOURCE is one of

    yolo       Ultralytics' data.yaml, or a folder with it, or with classes.txt or obj.names: boxes
               and polygons, a line an object
    cvat       the annotations.xml of a "CVAT for images 1.1" export, or the folder that holds it
    labelme    a folder of labelme's JSON files
    voc-xml    a folder of PASCAL VOC's XML files; the masks of SegmentationObject/ are used where
               that lies beside their folder, and else the boxes

and DIR becomes a COCO set (annotations/instances_{train,val}.json with images/{train,val}), or with
`--to folder` a semantic one (index PNGs, see data/README.md). Pictures that nobody has annotated
become images/unlabeled.

Nothing is drawn again: polygons keep their coordinates, masks become run lengths, and pycocotools
alone decides which pixels an outline covers, about those whose centre it holds. Category ids are
those of the source, or 1, 2, ... in the order of its labels where it has none. Whatever gets lost
or changed is counted and printed."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from common.errors import UserError
from common.files import IMAGES, write_bytes, write_text
from common.plots import save_index_png
from data.annotations import READERS, Notes, Picture, Settings, Shape, Source, lines_of


class Found(NamedTuple):
    """An object: its `segmentation` as COCO writes it, and its `pixels` as run lengths."""

    label: str
    segmentation: list | dict
    pixels: dict
    depth: int


def objects_of(picture: Picture, notes: Notes) -> list[Found]:
    """The objects of a picture: parts are joined; what covers no pixel, or repeats another object
    exactly, is left out."""
    groups: dict[tuple, list[Shape]] = {}
    for place, shape in enumerate(picture.shapes or ()):
        is_alone = shape.group is None
        key = (shape.label, is_alone, place if is_alone else shape.group)
        groups.setdefault(key, []).append(shape)
    found, seen = [], set()
    for (label, *_), shapes in groups.items():
        if len(shapes) > 1:
            notes.add("objects were joined from outlines of one group and label", picture.name)
        polygons = [s.outline for s in shapes if isinstance(s.outline, np.ndarray)]
        masks = [s.outline for s in shapes if isinstance(s.outline, dict)]
        drawn = coco_mask.frPyObjects(polygons, picture.height, picture.width) if polygons else []
        pixels = coco_mask.merge([*drawn, *masks])
        if not coco_mask.area(pixels):
            notes.add("objects were left out: they cover no pixel of their picture", picture.name)
        elif (label, pixels["counts"]) in seen:
            notes.add("objects were left out: they repeat another one exactly", picture.name)
        else:
            seen.add((label, pixels["counts"]))
            counts = {"size": pixels["size"], "counts": pixels["counts"].decode()}
            segmentation = counts if masks else [polygon.tolist() for polygon in polygons]
            found.append(Found(label, segmentation, pixels, shapes[0].depth))
    return found


def in_parts(pictures: list[Picture], share: float) -> dict[str, list[Picture]]:
    """The pictures of train, val, ... as the source says; where it names no val, a `share` of the
    others, drawn by their names."""
    parts = defaultdict(list)
    for picture in pictures:
        parts[picture.part or "train"].append(picture)
    if not parts["train"] or len(parts["train"]) + len(parts["val"]) < 2:
        raise UserError(
            "Two annotated pictures are needed at least, one to train on and one to score on."
        )
    if not parts["val"]:
        parts["train"].sort(key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
        number = min(max(1, round(share * len(parts["train"]))), len(parts["train"]) - 1)
        parts["val"], parts["train"] = parts["train"][:number], parts["train"][number:]
        print(f"The source names no pictures to score on: {number} were drawn (--val {share:g}).")
    return {part: sorted(parts[part], key=lambda p: p.name) for part in sorted(parts)}


def file_names(pictures: list[Picture]) -> list[str]:
    """A file name without folders for each picture; where two would be the same, all carry their
    folders in it. What is no common kind of picture, or was turned, becomes a PNG."""
    paths = [PurePosixPath(picture.name) for picture in pictures]
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):
        stems = ["_".join(path.with_suffix("").parts) for path in paths]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(f"Two pictures are called {twice}; rename one of them.")
    names = []
    for stem, path, picture in zip(stems, paths, pictures, strict=True):
        is_kept = path.suffix.lower() in IMAGES and not picture.turned
        names.append(stem + (path.suffix if is_kept else ".png"))
    return names


def write_picture(picture: Picture, path: Path, link: bool) -> None:
    embedded = isinstance(picture.image, bytes)
    if picture.turned or path.suffix != PurePosixPath(picture.name).suffix:
        with Image.open(io.BytesIO(picture.image) if embedded else picture.image) as file:
            pixels = ImageOps.exif_transpose(file) if picture.turned else file
            pixels.convert("RGB").save(path)
    elif embedded:
        write_bytes(path, picture.image)
    elif link:
        path.symlink_to(picture.image.resolve())
    else:
        shutil.copyfile(picture.image, path)


def coco_content(
    pictures: list[Picture], names: list[str], classes: dict[int, str], notes: Notes
) -> dict:
    """A part in COCO's form. No object is a crowd, since none of the forms has crowds."""
    ids = {name: number for number, name in classes.items()}
    images, annotations = [], []
    for number, (picture, name) in enumerate(zip(pictures, names, strict=True), start=1):
        size = {"width": picture.width, "height": picture.height}
        images.append({"id": number, "file_name": name, **size})
        for found in objects_of(picture, notes):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": ids[found.label],
                "segmentation": found.segmentation,
                "area": int(coco_mask.area(found.pixels)),
                "bbox": coco_mask.toBbox(found.pixels).tolist(),
                "iscrowd": 0,
            }
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for number, name in classes.items()]
    return {"images": images, "categories": categories, "annotations": annotations}


def label_map(picture: Picture, classes: list[str], fill: int, notes: Notes) -> np.ndarray:
    """(height, width) uint8 class indices; later objects cover earlier ones, and `fill` is where
    none lies."""
    label = np.full((picture.height, picture.width), fill, np.uint8)
    covered = np.zeros(label.shape, bool)
    for found in sorted(objects_of(picture, notes), key=lambda found: found.depth):
        mask = coco_mask.decode(found.pixels).astype(bool)
        index = classes.index(found.label)
        if (mask & covered & (label != index)).any():
            notes.add("objects lie over a part of another class, which is lost", picture.name)
        label[mask] = index
        covered |= mask
    if picture.void is not None:
        label[picture.void] = 255
    return label


def write_coco(
    root: Path, source: Source, parts: dict[str, list[Picture]], link: bool, notes: Notes
) -> None:
    for part, pictures in parts.items():
        names = copied(pictures, root / "images" / part, link)
        said = f"{part}: {len(pictures)} pictures"
        if part != "unlabeled":
            content = coco_content(pictures, names, source.classes, notes)
            (root / "annotations").mkdir(exist_ok=True)
            write_text(root / "annotations" / f"instances_{part}.json", json.dumps(content))
            said += f", {len(content['annotations'])} objects"
        print(said)
    print("classes:", ", ".join(f"{number} {name}" for number, name in source.classes.items()))


def write_folder(
    root: Path,
    source: Source,
    parts: dict[str, list[Picture]],
    link: bool,
    rest: str,
    notes: Notes,
) -> None:
    """Classes are the source's by ascending id, numbered without gaps, after the background."""
    classes = list(source.classes.values())
    if rest == "background" and "background" not in classes:
        classes = ["background", *classes]
    if not 2 <= len(classes) <= 255:
        raise UserError(
            f"A label PNG tells 2 to 255 classes apart, and here are {len(classes)}; convert to "
            f"coco, which takes any number."
        )
    fill = classes.index("background") if rest == "background" else 255
    for part, pictures in parts.items():
        names = copied(pictures, root / "images" / part, link)
        print(f"{part}: {len(pictures)} pictures")
        if part == "unlabeled":
            continue
        (root / "labels" / part).mkdir(parents=True)
        for picture, name in zip(pictures, names, strict=True):
            label = torch.from_numpy(label_map(picture, classes, fill, notes))
            save_index_png(label, root / "labels" / part / f"{Path(name).stem}.png")
    write_text(root / "classes.txt", "".join(f"{name}\n" for name in classes))
    print("classes:", ", ".join(f"{index} {name}" for index, name in enumerate(classes)))


def copied(pictures: list[Picture], folder: Path, link: bool) -> list[str]:
    """The pictures written into a folder -> their file names there."""
    names = file_names(pictures)
    folder.mkdir(parents=True)
    for picture, name in zip(pictures, names, strict=True):
        write_picture(picture, folder / name, link)
    return names


def with_classes(source: Source, names: list[str] | None) -> Source:
    """The source with its classes numbered as in `names`, where they are given; UserError when
    they are not fit to be a data set's."""
    known = list(source.classes.values())
    unknown = [] if names is None else [name for name in known if name not in names]
    if unknown:
        raise UserError(f"The list of --classes lacks {', '.join(unknown)}; add them.")
    classes = source.classes if names is None else dict(enumerate(names, start=1))
    if not classes or len(set(classes.values())) < len(classes):
        raise UserError(
            f"The classes need names that differ, and there must be one at least; there are: "
            f"{', '.join(classes.values()) or 'none'}."
        )
    return source._replace(classes=classes)


def convert(args: argparse.Namespace) -> None:
    if not args.source.exists():
        raise UserError(f"{args.source} is not there; name what shall be converted.")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} is there already; name a new folder with --out.")
    notes = Notes()
    settings = Settings(args.images, args.frame, args.corners)
    source = READERS[args.form](args.source, settings, notes)
    if not source.pictures:
        raise UserError(f"{args.source} is of no picture that is there; name more with --images.")
    source = with_classes(source, None if args.classes is None else lines_of(args.classes))
    parts = in_parts(source.pictures, args.val)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}.") as folder:
        # Renamed when it is whole, so that an error leaves nothing behind.
        unfinished = Path(folder, "set")
        if args.to == "coco":
            write_coco(unfinished, source, parts, args.link, notes)
        else:
            write_folder(unfinished, source, parts, args.link, args.rest, notes)
        unfinished.replace(args.out)
    used = {shape.label for picture in source.pictures for shape in picture.shapes or ()}
    for name in source.classes.values():
        if name not in used:
            notes.add("classes have no outline", name)
    for reason, (count, first) in notes.items():
        print(f"note: {count} {reason} (first: {first})")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("form", choices=READERS)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, for --root"
    )
    parser.add_argument(
        "--to", choices=("coco", "folder"), default="coco", help="objects, or one class a pixel"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="where the pictures lie, if not where expected"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="a name a line: the classes, from id 1 on"
    )
    parser.add_argument(
        "--val", type=float, default=0.2, help="share to score on, where the source names none"
    )
    parser.add_argument(
        "--rest",
        choices=("background", "ignore"),
        default="background",
        help="for --to folder: pixels in no object are class 0, or 255",
    )
    parser.add_argument(
        "--corners",
        choices=("one", "zero", "edges"),
        default="one",
        help="for voc-xml: boxes count pixels from 1 and include the last, as VOC's do; or from 0 "
        "and include it; or from 0 and end before it",
    )
    parser.add_argument(
        "--frame",
        choices=("auto", "shown", "stored"),
        default="auto",
        help="annotations are of pictures turned as EXIF says, or as their pixels are stored",
    )
    parser.add_argument("--link", action="store_true", help="link to pictures instead of copying")
    args = parser.parse_args(argv)
    if not 0 < args.val < 1:
        parser.error("--val is a share between 0 and 1")
    try:
        convert(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
