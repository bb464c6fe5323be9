"""What other programs write: readers of YOLO, CVAT, labelme and VOC's XML, for data/convert.py.

Coordinates are continuous, as in COCO: the first pixel reaches from 0 to 1. Polygons keep their
coordinates and masks become run lengths, so no hole is filled and no part is lost. What a reader
leaves out or changes goes into its Notes, with a reason."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

import msgspec
import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

from common.errors import UserError, one_line
from common.files import IMAGES

PARTS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
BROKEN_POLYGON = "polygons were left out: they have fewer than three points, or wild ones"
BROKEN_MASK = "masks were left out: they are damaged, or do not fit into their picture"
BOXES = "objects have only a box, kept as a filled rectangle, which is no outline to learn from"
OUTSIDE = "polygons reach over the border of their picture, where they are cut off"
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # of PIL


class Shape(NamedTuple):
    """One outline in the frame of its picture: a polygon x, y, x, y, ... in pixels, or pycocotools'
    run lengths.

    Outlines of one label and `group` are parts of one object; None stands alone. A higher `depth`
    covers a lower one."""

    label: str
    outline: np.ndarray | dict
    group: int | None = None
    depth: int = 0


class Picture(NamedTuple):
    """`image` is a file, or its content where the source embeds it; `turned` when its pixels must
    be turned as the camera noted, to lie as in the annotations.

    `part` is train, val, ... or None where the source does not say; `shapes` is None where nobody
    has annotated it; `void` marks pixels that belong to no class, (height, width) bool."""

    name: str
    image: Path | bytes
    width: int
    height: int
    turned: bool
    part: str | None
    shapes: list[Shape] | None
    void: np.ndarray | None = None


class Source(NamedTuple):
    """What a reader found; `classes` are the names by category id."""

    classes: dict[int, str]
    pictures: list[Picture]


class Settings(NamedTuple):
    """The flags that readers know: a folder of pictures, the frame (auto, shown, stored), and how
    boxes of VOC count pixels (one, zero, edges)."""

    images: Path | None = None
    frame: str = "auto"
    corners: str = "one"


class Notes(dict):
    """What was lost or changed: a reason -> how often, and the first place."""

    def add(self, reason: str, place: object) -> None:
        count, first = self.get(reason, (0, place))
        self[reason] = (count + 1, first)


class Sheet(NamedTuple):
    """The frame in which a picture was annotated; its methods check outlines that lie in it."""

    width: int
    height: int
    turned: bool
    place: str
    notes: Notes

    def note(self, reason: str) -> None:
        self.notes.add(reason, self.place)

    def polygon(self, values: Sequence[float]) -> np.ndarray | None:
        """x, y, x, y, ... as an array, or None when they are no polygon."""
        polygon = np.array(values, np.float64)
        # pycocotools takes memory for every pixel of an edge, so no wild number may reach it.
        if polygon.size < 6 or polygon.size % 2 or not np.abs(polygon).max() < 1e6:
            self.note(BROKEN_POLYGON)
            return None
        points = polygon.reshape(-1, 2)
        if (points < -1).any() or (points > (self.width + 1, self.height + 1)).any():
            self.note(OUTSIDE)
        return polygon

    def box(self, left: float, top: float, right: float, bottom: float) -> np.ndarray | None:
        self.note(BOXES)
        return self.polygon(corners_of(left, top, right, bottom))

    def mask(self, mask: np.ndarray, left: int, top: int) -> dict | None:
        """A mask that was cut out of its picture, as run lengths of the whole, or None when it does
        not fit."""
        height, width = mask.shape
        if min(left, top) < 0 or left + width > self.width or top + height > self.height:
            self.note(BROKEN_MASK)
            return None
        whole = np.zeros((self.height, self.width), np.uint8, order="F")
        whole[top : top + height, left : left + width] = mask
        return coco_mask.encode(whole)


def corners_of(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def ellipse_of(x: float, y: float, width: float, height: float) -> list[float]:
    """An ellipse with these half axes as a polygon of 90 points, 0.1 % smaller than itself."""
    angles = np.arange(90) * (2 * np.pi / 90)
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], 1).ravel().tolist()


def turned_about(values: list[float], x: float, y: float, degrees: float) -> list[float]:
    """The polygon turned about a point, clockwise as one sees it."""
    points = np.array(values).reshape(-1, 2) - (x, y)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)).ravel().tolist()


# ----------------------------------------------------------------------------------------- pictures
def sheet_of(
    image: Path | bytes,
    claimed: tuple[int, int] | None,
    settings: Settings,
    place: object,
    notes: Notes,
) -> Sheet:
    """The frame of a picture.

    A camera notes in EXIF how its pixels are to be turned. Most programs show the turned picture,
    some the pixels as they are stored: the size `claimed` in the annotations tells which, and
    where it cannot, the turned picture is meant."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
            stored = file.size
            orientation = file.getexif().get(0x0112, 1)
    except UNREADABLE as error:
        raise UserError(f"The picture of {place} cannot be read ({error}); mend it.") from None
    shown = stored[::-1] if orientation in (5, 6, 7, 8) else stored
    has_turn = orientation in range(2, 9)
    turned = has_turn and settings.frame != "stored"
    if settings.frame == "auto" and claimed == stored != shown:
        turned = False
    size = shown if turned else stored
    if claimed is not None and claimed != size:
        raise UserError(
            f"{place} is of a picture of {claimed[0]}x{claimed[1]} pixels, but that on disk has "
            f"{size[0]}x{size[1]}; give the pictures that were annotated."
        )
    if turned:
        notes.add("pictures were turned upright as their camera noted, and saved as PNG", place)
    elif has_turn:
        notes.add("pictures keep their pixels as stored, though their camera notes a turn", place)
    return Sheet(*size, turned, str(place), notes)


def picture_of(name: str, image: Path | bytes, sheet: Sheet, part: str | None, shapes) -> Picture:
    """The picture with its outlines, without those that were left out."""
    kept = [shape for shape in shapes if shape is not None]
    return Picture(name, image, sheet.width, sheet.height, sheet.turned, part, kept)


def need_image(name: str, folders: list[Path], place: object) -> Path:
    """The file of a picture: `name` under one of the folders, or there without its own folders."""
    for folder in folders:
        for candidate in (folder / name, folder / PurePosixPath(name).name):
            if candidate.is_file():
                return candidate
    raise UserError(
        f"The picture {name} of {place} is not in {folders[0]}; name the folder that holds it with "
        f"--images."
    )


def images_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def part_of(name: str) -> str | None:
    """The part that a folder in a path names, if one does."""
    for folder in PurePosixPath(name).parts[:-1]:
        part = PARTS.get(folder.lower(), folder.lower())
        if part in ("train", "val", "test"):
            return part
    return None


def not_annotated(
    folder: Path, pictures: list[Picture], settings: Settings, notes: Notes
) -> list[Picture]:
    """The pictures under a folder that no annotation is of."""
    used = {picture.image.resolve() for picture in pictures if isinstance(picture.image, Path)}
    rest = []
    for path in images_under(folder):
        if path.resolve() not in used:
            sheet = sheet_of(path, None, settings, path, notes)
            name = path.relative_to(folder).as_posix()
            rest.append(picture_of(name, path, sheet, "unlabeled", [])._replace(shapes=None))
    return rest


def numbered(pictures: list[Picture], listed: Sequence[str] = ()) -> dict[int, str]:
    """Classes 1, 2, ... of a source that has names alone: those that it lists, then the others."""
    used = {shape.label for picture in pictures for shape in picture.shapes or ()}
    return dict(enumerate(dict.fromkeys([*listed, *sorted(used)]), start=1))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); save it as UTF-8.") from None


def lines_of(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_xml(path: Path, root_tag: str) -> ElementTree.Element:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise UserError(f"{path} cannot be read as XML ({error}); export it again.") from None
    if root.tag != root_tag:
        raise UserError(f"{path} is another kind of file: it holds <{root.tag}>, not <{root_tag}>.")
    return root


def need_folder(source: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source} is no folder; name the folder that holds the annotations.")


# --------------------------------------------------------------------------------------------- yolo
def read_yolo(source: Path, settings: Settings, notes: Notes) -> Source:
    """A line is a class with a box (centre and size) or with a polygon, in shares of the picture's
    width and height. A picture without a label file holds no object."""
    classes, root, listed = yolo_lists(source, settings)
    pictures = []
    for part, name, image in listed:
        sheet = sheet_of(image, None, settings, image, notes)
        label = yolo_label(image, root)
        if label is None:
            sheet.note("pictures have no label file, and so count as pictures without an object")
        lines = [] if label is None else read_text(label).splitlines()
        shapes = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = sheet._replace(place=f"{label}, line {number}")
                shapes.append(yolo_shape(line, classes, place))
        pictures.append(picture_of(name, image, sheet, part, shapes))
    return Source(classes, pictures)


def yolo_shape(line: str, classes: dict[int, str], sheet: Sheet) -> Shape | None:
    try:
        kind, *values = (float(word) for word in line.split())
    except ValueError:
        raise UserError(
            f"{sheet.place}: it holds something that is no number; correct it."
        ) from None
    if kind not in classes:
        raise UserError(
            f"{sheet.place}: it names class {kind:g}, but the classes are "
            f"{', '.join(map(str, classes))}; correct the file or the names."
        )
    if len(values) == 5:
        sheet.note("boxes carry a sixth number, a score or a track, which is lost")
        values = values[:4]
    if len(values) < 4 or len(values) % 2:
        raise UserError(
            f"{sheet.place}: after the class come {len(values)} numbers; a box has 4, a polygon an "
            f"even count from 6."
        )
    if not all(abs(value) <= 2 for value in values):
        raise UserError(
            f"{sheet.place}: a number is far outside 0 to 1; YOLO's coordinates are shares of the "
            f"picture's width and height."
        )
    scaled = (np.array(values).reshape(-1, 2) * (sheet.width, sheet.height)).ravel()
    if len(values) == 4:
        x, y, width, height = scaled
        outline = sheet.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    else:
        outline = sheet.polygon(scaled)
    return None if outline is None else Shape(classes[int(kind)], outline)


class YoloSet(NamedTuple):
    """Names by class, the folder of the list of names, and (part, name, file) of each picture."""

    classes: dict[int, str]
    root: Path
    listed: list[tuple[str | None, str, Path]]


def yolo_lists(source: Path, settings: Settings) -> YoloSet:
    if source.is_dir():
        known = ("data.yaml", "data.yml", "classes.txt", "obj.names")
        found = [source / name for name in known if (source / name).is_file()]
        found = found or sorted(source.glob("*.yaml"))
        if not found:
            raise UserError(f"{source} has none of {', '.join(known)}; name the file itself.")
        source = found[0]
    root = source.parent
    if source.suffix not in (".yaml", ".yml"):
        return YoloSet(dict(enumerate(lines_of(source))), root, yolo_folder(root, settings))
    try:
        content = yaml.safe_load(read_text(source))
        names = content["names"]
        named = enumerate(names) if isinstance(names, list) else names.items()
        classes = dict(sorted((int(number), str(name)) for number, name in named))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source} is no data.yaml ({one_line(error)}); give one with `names`, a list or a map "
            f"from numbers."
        ) from None
    base = root / str(content.get("path") or "")
    listed = []
    for key in ("train", "val", "valid", "test"):
        entries = content.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            for path in yolo_images(str(entry), base, root, source):
                name = os.path.relpath(path, root).replace(os.sep, "/").replace("../", "")
                listed.append((PARTS.get(key, key), name, path))
    return YoloSet(classes, root, listed or yolo_folder(root, settings))


def yolo_folder(root: Path, settings: Settings) -> list[tuple[str | None, str, Path]]:
    """All pictures of a folder, of a set that does not list them."""
    folder = settings.images or root
    names = [(path.relative_to(folder).as_posix(), path) for path in images_under(folder)]
    return [(part_of(name), name, path) for name, path in names]


def yolo_images(entry: str, base: Path, root: Path, source: Path) -> list[Path]:
    """The pictures of one entry of a data.yaml: a folder, or a text file that lists them. Some
    programs write ../train/images and mean the folder beside the file."""
    for place in (base / entry, root / entry, root / entry.removeprefix("../")):
        if place.is_dir():
            return images_under(place)
        if place.is_file():
            return [need_image(line, [place.parent, base, root], place) for line in lines_of(place)]
    raise UserError(f"{source} names {entry}, which is not there; correct it.")


def yolo_label(image: Path, root: Path) -> Path | None:
    """As Ultralytics looks for it: the last folder `images` becomes `labels`. Else it lies beside
    the picture, or beside the list of names."""
    parts = list(image.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    label = Path(*parts).with_suffix(".txt")
    candidates = (label, image.with_suffix(".txt"), root / label.name)
    return next((path for path in candidates if path.is_file()), None)


# --------------------------------------------------------------------------------------------- cvat
def read_cvat(source: Path, settings: Settings, notes: Notes) -> Source:
    """Polygons, boxes, ellipses and masks; the `group_id` of shapes makes parts of one object. A
    folder without annotations.xml may hold a file for each part, such as train.xml."""
    paths = [source]
    if source.is_dir():
        whole = source / "annotations.xml"
        paths = [whole] if whole.is_file() else sorted(source.glob("*.xml"))
    if not paths:
        raise UserError(f"{source} has no annotations.xml; name the file itself.")
    folder = settings.images or paths[0].parent / "images"
    pictures, names = [], []
    for path in paths:
        root = read_xml(path, "annotations")
        if root.find("track") is not None:
            raise UserError(f"{path} is of a video; export it as 'CVAT for images 1.1'.")
        labels = [label for label in root.iter("label") if label.find("parent") is None]
        names += [label.findtext("name") for label in labels if label.findtext("name")]
        folders = [folder] if settings.images else [folder, path.parent]
        for image in root.findall("image"):
            pictures.append(cvat_picture(image, path, folders, settings, notes))
    if folder.is_dir():
        pictures += not_annotated(folder, pictures, settings, notes)
    return Source(numbered(pictures, names), pictures)


def cvat_picture(
    image: ElementTree.Element, path: Path, folders: list[Path], settings: Settings, notes: Notes
) -> Picture:
    try:
        name = PureWindowsPath(image.attrib["name"]).as_posix()
        claimed = (int(image.attrib["width"]), int(image.attrib["height"]))
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: an image lacks its name, width or height; export it again."
        ) from None
    place = f"{path}, {name}"
    subset = image.get("subset") or "default"
    part = PARTS.get(subset.lower(), subset.lower())
    part = part_of(f"{path.stem}/{name}") if part == "default" else part
    file = need_image(name, [folder / subset for folder in folders] + folders, place)
    sheet = sheet_of(file, claimed, settings, place, notes)
    return picture_of(name, file, sheet, part, [cvat_shape(element, sheet) for element in image])


def cvat_shape(element: ElementTree.Element, sheet: Sheet) -> Shape | None:
    values = element.attrib
    if element.tag not in ("polygon", "box", "ellipse", "mask"):
        sheet.note(f"shapes were left out: a {element.tag} has no area")
        return None
    if element.find("attribute") is not None:
        sheet.note("shapes lost their attributes")
    try:
        group = int(values.get("group_id") or 0)
        depth = int(values.get("z_order") or 0)
        outline = cvat_outline(element.tag, values, sheet)
        label = values["label"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{sheet.place}: a {element.tag} cannot be read ({one_line(error)}); export it again."
        ) from None
    # 0 is CVAT's word for no group.
    return None if outline is None else Shape(label, outline, group or None, depth)


def cvat_outline(kind: str, values: dict[str, str], sheet: Sheet) -> np.ndarray | dict | None:
    angle = float(values.get("rotation") or 0)
    if kind == "mask":
        return cvat_mask(values, sheet)
    if kind == "polygon":
        return sheet.polygon([float(v) for v in values["points"].replace(";", ",").split(",")])
    if kind == "ellipse":
        x, y, width, height = (float(values[key]) for key in ("cx", "cy", "rx", "ry"))
        return sheet.polygon(turned_about(ellipse_of(x, y, width, height), x, y, angle))
    left, top, right, bottom = (float(values[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
    if not angle:
        return sheet.box(left, top, right, bottom)
    sheet.note(BOXES)
    corners = corners_of(left, top, right, bottom)
    return sheet.polygon(turned_about(corners, (left + right) / 2, (top + bottom) / 2, angle))


def cvat_mask(values: dict[str, str], sheet: Sheet) -> dict | None:
    """CVAT's run lengths go row by row through the mask's own rectangle and begin with zeros."""
    left, top, width, height = (int(values[key]) for key in ("left", "top", "width", "height"))
    counts = [int(word) for word in values["rle"].split(",")]
    fits = 0 < width <= sheet.width and 0 < height <= sheet.height
    if not fits or min(counts) < 0 or sum(counts) != width * height:
        sheet.note(BROKEN_MASK)
        return None
    mask = np.repeat(np.arange(len(counts)) % 2, counts).reshape(height, width)
    return sheet.mask(mask, left, top)


# ------------------------------------------------------------------------------------------ labelme
class LabelmeShape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = None
    group_id: int | None = None
    mask: str | None = None
    flags: dict | None = None
    description: str | None = None


class LabelmeFile(msgspec.Struct):
    shapes: list[LabelmeShape]
    imagePath: str
    imageData: str | None = None
    imageHeight: int | None = None
    imageWidth: int | None = None


def read_labelme(source: Path, settings: Settings, notes: Notes) -> Source:
    """Polygons, rectangles, circles and masks; the `group_id` of shapes makes parts of one
    object."""
    need_folder(source)
    pictures = []
    for path in sorted(source.rglob("*.json")):
        try:
            content = msgspec.json.decode(path.read_bytes(), type=LabelmeFile)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no labelme file ({error}); move it elsewhere.") from None
        image = labelme_image(content, path, settings)
        claimed = (content.imageWidth, content.imageHeight)
        sheet = sheet_of(image, None if None in claimed else claimed, settings, path, notes)
        shapes = [labelme_shape(shape, sheet) for shape in content.shapes]
        suffix = PureWindowsPath(content.imagePath).suffix
        name = path.relative_to(source).with_suffix(suffix).as_posix()
        pictures.append(picture_of(name, image, sheet, part_of(name), shapes))
    pictures += not_annotated(settings.images or source, pictures, settings, notes)
    return Source(numbered(pictures), pictures)


def labelme_image(content: LabelmeFile, path: Path, settings: Settings) -> Path | bytes:
    """The picture's file, or what the JSON embeds when there is none."""
    name = PureWindowsPath(content.imagePath).as_posix()
    try:
        return need_image(name, [settings.images or path.parent], path)
    except UserError:
        if not content.imageData:
            raise
    try:
        return base64.b64decode(content.imageData)
    except ValueError:
        raise UserError(f"{path}: its imageData is no picture in base64; correct it.") from None


def labelme_shape(shape: LabelmeShape, sheet: Sheet) -> Shape | None:
    kind = shape.shape_type or "polygon"
    if kind not in ("polygon", "rectangle", "oriented_rectangle", "circle", "mask"):
        sheet.note(f"shapes were left out: a {kind} has no area")
        return None
    if shape.flags or shape.description:
        sheet.note("shapes lost their flags or their description")
    if kind in ("polygon", "oriented_rectangle"):
        outline = sheet.polygon([value for point in shape.points for value in point])
    elif len(shape.points) != 2:
        sheet.note(f"shapes were left out: a {kind} needs two points")
        return None
    elif kind == "mask":
        outline = labelme_mask(shape, sheet)
    elif kind == "circle":
        (x, y), (x2, y2) = shape.points  # the centre, and a point on the circle
        radius = float(np.hypot(x2 - x, y2 - y))
        outline = sheet.polygon(ellipse_of(x, y, radius, radius))
    else:
        (x, y), (x2, y2) = shape.points  # any two opposite corners
        outline = sheet.box(min(x, x2), min(y, y2), max(x, x2), max(y, y2))
    return None if outline is None else Shape(shape.label, outline, shape.group_id)


def labelme_mask(shape: LabelmeShape, sheet: Sheet) -> dict | None:
    """A PNG in base64; its points are its first and its last pixel in the picture."""
    (left, top), (right, bottom) = np.array(shape.points).clip(-1e6, 1e6).astype(int).tolist()
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape.mask or ""))) as file:
            mask = np.array(file) > 0
    except UNREADABLE:
        mask = np.zeros((0, 0), bool)
    if mask.shape != (bottom - top + 1, right - left + 1):
        sheet.note(BROKEN_MASK)
        return None
    return sheet.mask(mask, left, top)


# ------------------------------------------------------------------------------------------ voc-xml
def read_voc(source: Path, settings: Settings, notes: Notes) -> Source:
    """VOC's XML files. The n-th object of a file is the value n in SegmentationObject, whose 255 is
    a border that belongs to nobody."""
    need_folder(source)
    parts = {}
    for path in sorted(source.glob("ImageSets/*/*.txt")):
        if path.stem in ("train", "val", "test"):
            parts |= {line.split()[0]: path.stem for line in lines_of(path)}
    pictures = []
    for path in sorted(source.rglob("*.xml")):
        root = read_xml(path, "annotation")
        base = path.parent.parent
        folders = [path.parent, base / "JPEGImages", base / "images"]
        image = voc_image(root, path, [settings.images] if settings.images else folders)
        claimed = voc_size(root)
        sheet = sheet_of(image, claimed, settings, path, notes)
        masks = voc_masks(base / "SegmentationObject" / f"{path.stem}.png", sheet)
        shapes = []
        for number, element in enumerate(root.findall("object"), start=1):
            shapes += voc_shapes(element, number, masks, sheet, settings.corners)
        name = path.relative_to(source).with_suffix(image.suffix).as_posix()
        part = parts.get(path.stem, part_of(name))
        picture = picture_of(name, image, sheet, part, shapes)
        pictures.append(picture._replace(void=None if masks is None else masks == 255))
    folder = settings.images or source / "JPEGImages"
    if folder.is_dir():
        pictures += not_annotated(folder, pictures, settings, notes)
    return Source(numbered(pictures), pictures)


def voc_image(root: ElementTree.Element, path: Path, folders: list[Path]) -> Path:
    """The picture that is called as the XML file, since its `filename` is often another's."""
    for folder in folders:
        for suffix in (*IMAGES, *(suffix.upper() for suffix in IMAGES)):
            if (folder / f"{path.stem}{suffix}").is_file():
                return folder / f"{path.stem}{suffix}"
    name = PureWindowsPath(root.findtext("filename") or f"{path.stem}.jpg").as_posix()
    return need_image(name, folders[::-1], path)


def voc_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Width and height, which some programs leave out or set to 0."""
    try:
        size = int(root.findtext("size/width", "0")), int(root.findtext("size/height", "0"))
    except ValueError:
        return None
    return size if all(size) else None


def voc_masks(path: Path, sheet: Sheet) -> np.ndarray | None:
    """The picture of SegmentationObject, (height, width), where there is one."""
    if not path.is_file():
        return None
    try:
        with Image.open(path) as file:
            masks = np.array(file)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again.") from None
    if masks.shape != (sheet.height, sheet.width):
        raise UserError(
            f"{path} is no index picture of {sheet.width}x{sheet.height} pixels; fetch it again."
        )
    return masks


def voc_shapes(
    element: ElementTree.Element, number: int, masks: np.ndarray | None, sheet: Sheet, corners: str
) -> list[Shape]:
    """The mask of an object, else the polygons that some programs add, else its box.

    `corners` says how pixels are counted: from "one", the last one of a box included, as VOC does;
    from "zero", the last one included; or from zero up to the "edges", as a width is."""
    label = (element.findtext("name") or "").strip()
    if not label:
        raise UserError(f"{sheet.place}: its object {number} has no name; correct it.")
    if element.findtext("difficult") == "1":
        sheet.note("objects were marked as difficult, and are like all others now")
    if element.find("part") is not None:
        sheet.note("objects lost their parts, such as head and hands")
    first = 1 if corners == "one" else 0
    try:
        words = [element.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        box = np.array([float(word) for word in words]) - first
        polygons = [voc_polygon(polygon) - first for polygon in element.findall("polygon")]
    except (TypeError, ValueError):
        raise UserError(
            f"{sheet.place}: the bndbox or a polygon of its object {number} lacks a number; "
            f"correct it."
        ) from None
    if box.min() < 0:
        sheet.note("boxes begin before the first pixel: are --corners zero or edges meant?")
    if corners != "edges":
        box[2:] += 1
    if masks is not None:
        outline = voc_mask(masks == number, box, sheet)
        return [] if outline is None else [Shape(label, outline)]
    outlines = [sheet.polygon(polygon) for polygon in polygons] if polygons else [sheet.box(*box)]
    return [Shape(label, outline, number) for outline in outlines if outline is not None]


def voc_polygon(polygon: ElementTree.Element) -> np.ndarray:
    points = len(polygon.findall("*")) // 2
    keys = [axis + str(number) for number in range(1, points + 1) for axis in "xy"]
    return np.array([float(polygon.findtext(key)) for key in keys])


def voc_mask(mask: np.ndarray, box: np.ndarray, sheet: Sheet) -> np.ndarray | dict | None:
    """The mask of an object, if it lies in its box; the box where the mask is another's."""
    if not mask.any():
        sheet.note("objects were left out: SegmentationObject has no pixel of them")
        return None
    outline = sheet.mask(mask, 0, 0)
    x, y, width, height = coco_mask.toBbox(outline)
    apart = np.abs(box - (x, y, x + width, y + height))
    if (apart > 0.1 * max(sheet.width, sheet.height) + 2).any():
        sheet.note("masks of SegmentationObject do not fill the box of their object: not used")
        return sheet.box(*box)
    return outline


READERS = {"yolo": read_yolo, "cvat": read_cvat, "labelme": read_labelme, "voc-xml": read_voc}
