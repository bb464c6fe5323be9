"""COCO's and LVIS's JSON files, read into pictures and objects."""

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.objects import Photo, Thing, outline


def said_of(photos: list[Photo]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """`negative` and `partial` of Instances that are scored on these pictures."""
    return {p.id: list(p.negative) for p in photos}, {p.id: list(p.partial) for p in photos}


def read_json(path: Path) -> dict:
    """A COCO or LVIS file, each annotation a tuple (image id, category id, segmentation, crowd,
    area); UserError when it is none. Annotations become small while they are read, or COCO's train
    file would fill many times its size."""

    def lean(record: dict):
        if not {"image_id", "category_id", "segmentation"} <= record.keys():
            return record
        try:
            return (
                record["image_id"],
                record["category_id"],
                outline(record["segmentation"]),
                bool(record.get("iscrowd")),
                float(record.get("area", 0)),
            )
        except (TypeError, ValueError, KeyError, OverflowError):
            raise UserError(
                f"{path}: the annotation {record.get('id')} cannot be read; its segmentation must be "
                f"polygons or run lengths, and its area a number."
            ) from None

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=lean)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); fetch or write it again."
        ) from None
    for key, kind in (("images", dict), ("categories", dict), ("annotations", tuple)):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(
                f"{path} is no COCO or LVIS file: it has no list of {key}; name another."
            )
        if not all(isinstance(record, kind) for record in content[key]):
            needs = "image_id, category_id and segmentation" if kind is tuple else "named fields"
            raise UserError(f"{path}: each of its {key} needs {needs}; correct the file.")
    return content


def classes_of(content: dict, path: Path) -> dict[int, str]:
    """Category id -> name, by ascending id."""
    try:
        found = dict(
            sorted((record["id"], str(record["name"])) for record in content["categories"])
        )
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: each of its categories needs a number as id, and a name; correct the file."
        ) from None
    if not found or not len(content["categories"]) == len(found) == len(set(found.values())):
        raise UserError(
            f"{path}: its categories need ids and names that all differ, and there must be one at least."
        )
    return found


def finder(bases: list[Path], part: str) -> Callable[[dict], Path | None]:
    """Record of an image -> its file. Folders are listed once: asking for each file is slow on a
    network disk. Pictures of a part other than train and val (tune) are looked for among the
    training pictures, too."""

    @functools.cache
    def files(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def locate(record: dict) -> Path | None:
        url = (record.get("coco_url") or "").split("/")
        for name in filter(None, (record.get("file_name"), "/".join(url[-2:]), url[-1])):
            for place in places:
                folder, file = os.path.split(os.path.join(place, name))
                if file in files(folder):
                    return Path(folder, file)
        return None

    parts = [
        "",
        *(
            p + year
            for p in dict.fromkeys([part] + ["train"] * (part != "val"))
            for year in ("", "2017")
        ),
    ]
    places = [base / p for base in bases for p in parts]
    return locate


def photos_of(content: dict, path: Path, index: dict[int, int], locate: Callable) -> list[Photo]:
    """The pictures of a file by ascending id, with their objects; UserError where it contradicts
    itself or the disk."""

    def places(record: dict, key: str) -> tuple[int, ...]:
        return tuple(index[category] for category in record.get(key) or () if category in index)

    try:
        photos = {
            r["id"]: Photo(
                r.get("file_name") or "/".join(r["coco_url"].split("/")[-2:]),
                locate(r),
                r["id"],
                int(r["height"]),
                int(r["width"]),
                negative=places(r, "neg_category_ids"),
                partial=places(r, "not_exhaustive_category_ids"),
            )
            for r in content["images"]
        }
        photos = dict(sorted(photos.items()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: an image lacks its id, height, width, or file_name ({error}); correct it."
        ) from None
    sized = {p.name for p in photos.values() if min(p.height, p.width) > 0}
    if not len(content["images"]) == len(photos) == len(sized):
        raise UserError(
            f"{path} lists an image twice or without a size; ids and file names must differ."
        )
    lost = [p.name for p in photos.values() if p.image is None]
    if lost:
        raise UserError(
            f"{len(lost)} of the {len(photos)} images of {path} are not on disk, for example {lost[0]}; "
            f"name the folder that holds them with --images (layout in data/README.md)."
        )
    things, left_out = {number: [] for number in photos}, 0
    for image, category, segmentation, crowd, area in content["annotations"]:
        if image not in things or category not in index:
            unknown = f"image {image}" if image not in things else f"category {category}"
            raise UserError(
                f"{path}: an annotation is of {unknown}, which the file does not list; correct the file."
            )
        if segmentation:
            things[image].append(Thing(index[category], segmentation, crowd, area))
        left_out += not segmentation
    if left_out:
        warnings.warn(
            f"{left_out} annotations of {path} have no polygon of three points; they are left out",
            stacklevel=2,
        )
    return [photo._replace(things=tuple(things[number])) for number, photo in photos.items()]
