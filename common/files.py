"""Images, labels and weights as they lie on disk: what a data set is, how files are read, and by
which processes."""

import contextlib
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


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary file, flush it to the disk, rename: a reader sees the old file or the
    new one."""
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


def parse_line(line: str) -> dict:
    """One line of a log; {} when a crash left it torn."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)
    return {}


def read_log(path: Path) -> list[dict]:
    return [record for line in path.read_text().splitlines() if (record := parse_line(line))]


IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


# ------------------------------------------------------------------------------------------ reading
def image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES)


class BrokenImage(RankError):
    """An image that cannot be decoded: training skips it, evaluation stops."""


def read_image(path: Path) -> Tensor:
    """(3, H, W) uint8 RGB, with the camera's rotation applied to nothing: pixels as they lie in the
    file."""
    try:
        with Image.open(path) as file:
            if file.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
            if file.mode.startswith("I"):  # 16 bits, which PIL would cut to white
                grey = np.array(file)
                file = Image.fromarray(
                    (grey // 257 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8)
                )
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).contiguous()
    except (
        OSError,
        UnidentifiedImageError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise BrokenImage(f"{path} cannot be read as an image ({error})") from None


def pictures(paths: list[str]) -> list[Path]:
    """The images that --predict names, folders opened; UserError when there are none."""
    files = [f for p in map(Path, paths) for f in (image_files(p) if p.is_dir() else [p])]
    if not files:
        raise UserError(
            "--predict needs a checkpoint and then images, or folders that hold some: "
            "--predict runs/x/best.pt photos/"
        )
    return files


def readable(files: list[Path], world) -> Iterator[tuple[int, Path, Tensor]]:
    """Place, file and image of those that this process shall predict; files that are no images are
    said and passed over, but an only one is an error."""
    for i, file in list(enumerate(files))[world.rank :: world.size]:
        try:
            yield i, file, read_image(file)
        except BrokenImage as error:
            if len(files) == 1:
                raise
            print(f"passed over: {error}", file=sys.stderr, flush=True)
