"""Properties of lists, labels, names of weights and archives in the forms that people have, on
drawn inputs; `make fuzz` tries them for longer."""

import io
import os
import shutil
import string
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import PROPERTIES, Property, few
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from common import checkpoints, objects, semantic, splits
from common.errors import UserError
from data import download

MINE: dict[str, Property] = {}
CLASSES = [f"class {i}" for i in range(5)]
DATA = semantic.Segmentation("folder", Path(), CLASSES, {}, [])


# ------------------------------------------------------------------------------- text and its lines
def text_of_any_system_comes_back(value: tuple[list[str], str, str], folder: Path) -> None:
    names, encoding, end = value
    path = folder / "list.txt"
    path.write_bytes((end.join(names) + end).encode(encoding))
    assert splits.read_list(path) == [(name, None) for name in names]


letters = st.characters(categories=["L", "N"], max_codepoint=0x2FF)
MINE["text of any system comes back"] = Property(
    st.tuples(
        st.lists(st.text(letters, min_size=1, max_size=9), min_size=1, unique=True),
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
        st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    ),
    text_of_any_system_comes_back,
)


# ------------------------------------------------------------------------------------------- labels
def label_values_are_read_as_they_are_or_refused(
    value: tuple[list[int], str], folder: Path
) -> None:
    values, kind = value
    limits = np.iinfo(kind)
    array = np.array([[min(max(v, limits.min), limits.max) for v in values]], kind)
    path = folder / "label.tif"
    Image.fromarray(array).save(path)
    good = all(0 <= v < len(CLASSES) or v == 255 for v in array[0].tolist())
    try:
        label = semantic.read_label(path, DATA)
    except UserError as error:
        assert not good and str(path) in str(error)
        return
    assert good and label.tolist() == array.tolist()


MINE["label values are read as they are, or refused"] = Property(
    st.tuples(
        st.lists(
            st.integers(0, 4) | st.sampled_from([-250, -1, 5, 255, 256, 260, 65535, 2**31 - 1]),
            min_size=1,
            max_size=6,
        ),
        st.sampled_from(["uint8", "uint16", "int16", "int32"]),
    ),
    label_values_are_read_as_they_are_or_refused,
)


def a_broken_label_is_read_or_refused(
    value: tuple[str, int, list[tuple[int, int]]], folder: Path
) -> None:
    form, cut, flips = value
    buffer = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 5).save(buffer, form)
    content = bytearray(buffer.getvalue()[: cut or None])
    for place, bits in flips:
        content[place % len(content)] ^= bits
    path = folder / "label.png"
    path.write_bytes(bytes(content))
    for read in (lambda path: semantic.read_label(path, DATA), objects.read_ids):
        try:
            values = read(path)
        except UserError as error:
            assert str(path) in str(error)
            continue
        assert values.ndim == 2 and (values >= 0).all()


MINE["a broken label is read or refused"] = Property(
    st.tuples(
        st.sampled_from(["PNG", "TIFF", "BMP", "GIF"]),
        st.integers(0, 300),
        st.lists(st.tuples(st.integers(0, 300), st.integers(1, 255)), max_size=6),
    ),
    a_broken_label_is_read_or_refused,
)


# -------------------------------------------------------------------------------- names of weights
def weights_under_any_prefix_are_found(
    value: tuple[list[str], list[str], list[str]], folder: Path
) -> None:
    parts, wrappers, others = value
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.Conv2d(2, 3, 1)))
    expected = {key: torch.rand_like(weight) for key, weight in net.state_dict().items()}
    prefix = "".join(f"{part}." for part in parts)
    content = {prefix + key: weight for key, weight in expected.items()}
    content |= {other: torch.ones(7, 7) for other in others if other not in content}
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 3}
    torch.save(content, folder / "net.pth")
    checkpoints.load_matching(net, checkpoints.read_weights(folder / "net.pth"), "net.pth")
    for key, weight in net.state_dict().items():
        assert torch.equal(weight, expected[key]), key


name = st.text(string.ascii_lowercase + "_0", min_size=1, max_size=8)
MINE["weights under any prefix are found"] = Property(
    st.tuples(
        st.lists(name | st.sampled_from(["module", "_orig_mod", "backbone"]), max_size=3),
        st.lists(st.sampled_from(checkpoints.WRAPPERS), max_size=2),
        st.lists(name.map(lambda x: f"{x}.{x}"), max_size=2),
    ),
    weights_under_any_prefix_are_found,
)


# ----------------------------------------------------------------------------------------- archives
def an_archive_stays_inside_or_is_refused(
    value: tuple[bool, list[tuple[str, bytes, str]], list[tuple[int, int]]], folder: Path
) -> None:
    is_zip, members, flips = value
    archive = folder / "a"
    if is_zip:
        with zipfile.ZipFile(archive, "w") as file:
            for member, _, link in members:
                info = zipfile.ZipInfo("x")
                info.filename = member
                file.writestr(info, link)
    else:
        with tarfile.open(archive, "w") as file:
            for member, kind, link in members:
                info = tarfile.TarInfo(member)
                info.type, info.linkname = kind, link
                file.addfile(info)
    content = bytearray(archive.read_bytes())
    for place, bits in flips:
        content[place % len(content)] ^= bits
    archive.write_bytes(bytes(content))
    target = folder / "inner" / "out"
    shutil.rmtree(folder / "inner", ignore_errors=True)
    try:
        download.extract(archive, target)
    except download.DownloadError as error:
        assert "\n" not in str(error)
        assert os.listdir(target) == []
    assert os.listdir(folder / "inner") == ["out"] and sorted(os.listdir(folder)) == ["a", "inner"]
    assert not [path for path in target.rglob("*") if path.is_symlink()]


member = st.sampled_from(
    ["a", "b/c", "../evil", "/tmp/evil", "a/../../evil", "", ".", "a/", "x" * 300, "b\\..\\..\\e"]
)
MINE["an archive stays inside its target, or is refused"] = Property(
    st.tuples(
        st.booleans(),
        st.lists(
            st.tuples(
                member,
                st.sampled_from(
                    [tarfile.REGTYPE] * 3 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE]
                ),
                st.sampled_from(["a", "..", "../..", "/etc"]),
            ),
            min_size=1,
            max_size=4,
        ),
        st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 255)), max_size=3),
    ),
    an_archive_stays_inside_or_is_refused,
)

PROPERTIES |= MINE


@pytest.mark.parametrize("name", MINE)
def test_property(name, tmp_path):
    few(name, tmp_path)
