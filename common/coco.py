"""COCO's and LVIS's JSON files, read into pictures and objects."""

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.objects import Photo, Thing, read_segmentation


def read_json(path: Path) -> dict:
    """The content of a COCO or LVIS file, in which each annotation has become a tuple (image id,
    category id, segmentation, crowd, area); UserError when it is no such file. Annotations become
    small while they are read, because COCO's train file would else fill many times its size."""

    def lean(record: dict):
        """An annotation becomes a tuple; any other record stays as it is."""
        if not {"image_id", "category_id", "segmentation"} <= record.keys():
            return record
        try:
            return (
                record["image_id"],
                record["category_id"],
                read_segmentation(record["segmentation"]),
                bool(record.get("iscrowd")),
                float(record.get("area", 0)),
            )
        except (TypeError, ValueError, KeyError, OverflowError):
            raise UserError(
                f"{path}: the annotation {record.get('id')} cannot be read; its segmentation must "
                f"be polygons or run lengths, and its area a number."
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
    records = content["categories"]
    try:
        classes = dict(sorted((record["id"], str(record["name"])) for record in records))
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: each of its categories needs a number as id, and a name; correct the file."
        ) from None
    all_differ = len(records) == len(classes) == len(set(classes.values()))
    if not classes or not all_differ:
        raise UserError(
            f"{path}: its categories need ids and names that all differ, and there must be one at "
            f"least."
        )
    return classes


def finder(bases: list[Path], part: str) -> Callable[[dict], Path | None]:
    """Record of an image -> its file. Folders are listed once: asking for each file is slow on a
    network disk. Pictures of a part other than train and val (tune) are looked for among the
    training pictures, too."""
    parts = [part] if part == "val" else list(dict.fromkeys([part, "train"]))
    subfolders = [""]
    for name in parts:
        subfolders += [name, f"{name}2017"]
    places = [base / subfolder for base in bases for subfolder in subfolders]

    @functools.cache
    def files(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def locate(record: dict) -> Path | None:
        url = (record.get("coco_url") or "").split("/")
        for name in (record.get("file_name"), "/".join(url[-2:]), url[-1]):
            if not name:
                continue
            for place in places:
                folder, file = os.path.split(os.path.join(place, name))
                if file in files(folder):
                    return Path(folder, file)
        return None

    return locate


def photos_of(content: dict, path: Path, index: dict[int, int], locate: Callable) -> list[Photo]:
    """The pictures of a file by ascending id, with their objects; UserError where it contradicts
    itself or the disk. `index` maps category ids to class indices, `locate` records to files."""

    def class_indices(record: dict, key: str) -> tuple[int, ...]:
        return tuple(index[category] for category in record.get(key) or () if category in index)

    try:
        photos = {
            r["id"]: Photo(
                r.get("file_name") or "/".join(r["coco_url"].split("/")[-2:]),
                locate(r),
                r["id"],
                int(r["height"]),
                int(r["width"]),
                negative=class_indices(r, "neg_category_ids"),
                partial=class_indices(r, "not_exhaustive_category_ids"),
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
            f"{len(lost)} of the {len(photos)} images of {path} are not on disk, for example "
            f"{lost[0]}; name the folder that holds them with --images (layout in data/README.md)."
        )
    things = {number: [] for number in photos}
    left_out = 0
    for image, category, segmentation, crowd, area in content["annotations"]:
        if image not in things or category not in index:
            unknown = f"image {image}" if image not in things else f"category {category}"
            raise UserError(
                f"{path}: an annotation is of {unknown}, which the file does not list; correct the "
                f"file."
            )
        if segmentation:
            things[image].append(Thing(index[category], segmentation, crowd, area))
        else:
            left_out += 1
    if left_out:
        warnings.warn(
            f"{left_out} annotations of {path} have no polygon of three points; they are left out",
            stacklevel=2,
        )
    return [photo._replace(things=tuple(things[number])) for number, photo in photos.items()]
