"""Images and text as they lie on disk: decoding, from whatever system they come, and atomic
writing."""

import contextlib
import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from common.errors import RankError, UserError

try:
    from kornia_rs import io as quick  # optional: decodes most photographs in half of the time
except ImportError:
    quick = None

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# What PIL raises for a file that it cannot decode: it says so itself (OSError, SyntaxError,
# ValueError, a bomb), or stumbles over what the file promises.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# What the machine lacks, when opening a file fails through no fault of the file.
SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


# ------------------------------------------------------------------------------------------ writing
@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A temporary file to write to, which is then flushed to the disk and renamed: a reader sees
    the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file, as `written` does."""
    with written(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


# -------------------------------------------------------------------------------------------- text
MARKS = (  # what a text may begin with, and its encoding; UTF-32's begins as UTF-16's does
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)


def read_text(path: Path) -> str:
    """A text file from any system: UTF-8, UTF-16 and UTF-32 with a byte order mark, else UTF-8,
    else what Windows wrote before that (cp1252, which is latin-1 with more letters). Raises
    ValueError for anything else, and OSError when there is no such file."""
    data = path.read_bytes()
    encodings = [encoding for mark, encoding in MARKS if data.startswith(mark)][:1]
    for encoding in encodings or ("utf-8", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not any(letter < " " and letter not in "\t\n\r\f" for letter in text):
            return text
    raise ValueError("it is no text")


# ------------------------------------------------------------------------------------------- a log
def parse_line(line: str) -> dict:
    """One line of a log; {} when a crash left it torn, or it is damaged otherwise."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            speed = record.get("images_per_second", 0.0)
            is_speed = isinstance(speed, (int, float)) and 0 <= speed < math.inf
            return record if is_speed else {}
    return {}


def whole_lines(path: Path) -> list[str]:
    """The lines of a log that hold a record; how many others are left out is said."""
    lines = path.read_text(errors="replace").splitlines()
    whole = [line for line in lines if parse_line(line)]
    damaged = len(lines) - len(whole)
    if damaged:
        print(f"{path}: lines that are damaged and left out: {damaged}", flush=True)
    return whole


def read_log(path: Path) -> list[dict]:
    """The records of a log, without damaged lines."""
    return [parse_line(line) for line in whole_lines(path)]


# ------------------------------------------------------------------------------------------- images
class BrokenImage(RankError):
    """An image that cannot be decoded: training skips it, evaluation stops."""


def is_image_file(path: Path) -> bool:
    """Whether a file is an image by its name. macOS keeps a companion `._x.jpg` beside `x.jpg` on
    disks of other systems, which holds no pixels."""
    return path.suffix.lower() in IMAGES and not path.name.startswith("._")


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, without those in folders below it."""
    return sorted(path for path in folder.iterdir() if is_image_file(path))


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and in those below it, also in folders that are links. A folder that
    is reached on several ways is entered once."""
    found = []
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(place)
        if here in entered:
            folders.clear()
            continue
        entered.add(here)
        folders.sort()
        found += [Path(place, name) for name in names]
    return sorted(path for path in found if is_image_file(path))


def read_image(path: Path, upright: bool = False, planar: bool = True) -> Tensor:
    """(3, H, W) uint8 RGB. The pixels are taken as they lie in the file: a camera's note that the
    picture should be turned (EXIF) is not followed, because label maps are not turned either; it
    is if the image shall be `upright`.

    In memory the three colours follow each other if `planar`; else they lie side by side in each
    pixel, as they are decoded and as they are resized fastest."""
    try:
        with Image.open(path) as file:
            if upright:
                file = ImageOps.exif_transpose(file)
            if file.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
            if file.mode.startswith("I"):
                file = with_8_bits(file)
            pixels = torch.from_numpy(decoded(file, path)).permute(2, 0, 1)
    except UNREADABLE as error:
        if getattr(error, "errno", None) in SHORT_OF:
            raise
        raise BrokenImage(f"{path} cannot be read as an image ({error})") from None
    return pixels.contiguous() if planar else pixels


def decoded(file: Image.Image, path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture that Pillow has opened, and so approved of its kind and its
    size. Pillow decodes it, too, unless it is of a plain kind that a faster decoder reads without
    an objection: the pixels are equal, and errors and what can be borne stay Pillow's."""
    if file.mode != "RGB":
        return np.array(file.convert("RGB"))
    if quick is not None and getattr(file, "n_frames", 1) == 1:
        with contextlib.suppress(Exception):  # it has no narrower one
            if file.format == "JPEG":
                return quick.read_image_jpegturbo(str(path))
            if file.format == "PNG":
                return quick.read_image_png_u8(str(path), "rgb")
    return np.array(file)


def read_map(path: Path) -> tuple[np.ndarray, str]:
    """What lies in a file of labels, (H, W) or more, as it is, and PIL's name for its kind."""
    try:
        with Image.open(path) as file:
            return np.array(file), file.mode
    except UNREADABLE as error:
        if getattr(error, "errno", None) in SHORT_OF:
            raise
        raise RankError(
            f"The label {path} cannot be read ({error}); fetch or make it again."
        ) from None


def turned_note(path: Path, size: tuple[int, int]) -> str:
    """What to add to an error on an image whose label has the `size` (height, width): whether these
    would agree if the camera's note that the picture is to be turned (EXIF) were followed."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            agrees = file.size == size
    except UNREADABLE:
        return ""
    if not turned or not agrees:
        return ""
    return (
        "; its EXIF data say that it is to be turned by 90 degrees, which is not followed here, so "
        "save it upright"
    )


def with_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits in 8, where PIL would turn everything bright to white."""
    grey = np.array(image)
    if grey.max() > 255:
        grey = grey // 257
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8))


# -------------------------------------------------------------------------- pictures of --predict
def pictures(paths: list[str]) -> list[Path]:
    """The images that --predict names, folders opened; UserError when there are none."""
    files = []
    for path in map(Path, paths):
        files += image_files(path) if path.is_dir() else [path]
    if not files:
        raise UserError(
            "--predict needs a checkpoint and then images, or folders that hold some "
            "(--predict runs/x/best.pt photos/)."
        )
    return files
