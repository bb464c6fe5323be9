"""Images and text as they lie on disk: decoding, and atomic writing."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.errors import RankError, UserError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# What the machine lacks, when opening a file fails through no fault of the file.
SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


# ------------------------------------------------------------------------------------------ writing
def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary file, flush it to the disk, rename it: a reader sees the old file or the
    new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


# ------------------------------------------------------------------------------------------- a log
def parse_line(line: str) -> dict:
    """One line of a log; {} when a crash left it torn."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)
    return {}


def read_log(path: Path) -> list[dict]:
    """The records of a log, without torn lines."""
    records = [parse_line(line) for line in path.read_text().splitlines()]
    return [record for record in records if record]


# ------------------------------------------------------------------------------------------- images
class BrokenImage(RankError):
    """An image that cannot be decoded: training skips it, evaluation stops."""


def image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB. The pixels are taken as they lie in the file: a camera's note that the
    picture should be turned is not followed, because label maps are not turned either."""
    try:
        with Image.open(path) as file:
            if file.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
            if file.mode.startswith("I"):
                file = with_8_bits(file)
            pixels = np.array(file.convert("RGB"))
    except (
        OSError,
        UnidentifiedImageError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        if getattr(error, "errno", None) in SHORT_OF:
            raise
        raise BrokenImage(f"{path} cannot be read as an image ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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
            "--predict needs a checkpoint and then images, or folders that hold some: "
            "--predict runs/x/best.pt photos/"
        )
    return files


def readable(files: list[Path], world) -> Iterator[tuple[int, Path, Tensor]]:
    """Place, file and image of those that this process shall predict. A file that is no image is
    named and passed over, unless it is the only one, which is an error."""
    for place in range(world.rank, len(files), world.size):
        try:
            image = read_image(files[place])
        except BrokenImage as error:
            if len(files) == 1:
                raise
            print(f"passed over: {error}", file=sys.stderr, flush=True)
            continue
        yield place, files[place], image
