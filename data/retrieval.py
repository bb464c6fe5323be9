"""Find the pictures of a large pool that are nearest to query embeddings: embed the pool once on
disk (`embed`), search it (`search`), find duplicates (`duplicates`, `known`), report (`report`).

Nothing here knows what a query is, or which network embeds. All processes embed together; the rest
is for one process. Picture files must not change after they were embedded, which nothing checks."""

import hashlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils.data import DataLoader

from common import plots
from common.distributed import World, rng
from common.errors import RankError, UserError, one_line
from common.files import BrokenImage, read_image, write_bytes, write_text
from common.loading import helpers
from common.typed_json import read_record

# Part of a shard's name. Change it whenever the code would write other numbers into a shard.
FORMAT = "1: whole picture, bicubic with antialias, float16"

BLOCK = 2048  # rows and columns of a block of cosines, 16 MiB


class Note(TypedDict):
    """What stands beside a shard."""

    key: str
    size: int
    paths: list[str]
    sha256: list[str]
    broken: list[int]


@dataclass
class Store:
    """Embeddings of pictures on disk; row i of the concatenated shards is of `paths`[i].

    `shards` are .npy files, float16 (`shard_size`, D), the last one shorter, rows of length 1;
    beside each lies a .json with its pictures and their SHA-256. `broken` are the rows, all zero,
    of pictures that cannot be read."""

    folder: Path
    paths: list[Path]
    shards: list[Path]
    broken: list[int]
    shard_size: int

    def shard(self, s: int) -> np.ndarray:
        """(n_s, D) float16, a memory map."""
        try:
            return np.load(self.shards[s], mmap_mode="r")
        except Exception as error:  # noqa: BLE001 (the head of the file is parsed as Python is)
            raise UserError(
                f"{self.shards[s]} cannot be read ({one_line(error)}); delete it, and it is made "
                f"again."
            ) from None

    def note(self, s: int) -> dict:
        """About shard s: `key`, `size`, its `paths`, their `sha256` ("" for broken ones), its
        places `broken`."""
        path = self.shards[s].with_suffix(".json")
        return read_record(path, Note, "delete it, and it is made again")

    def parts(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, places in `rows`, their rows within the shard) for each shard that holds some of
        `rows` (n,)."""
        if len(rows) == 0:
            return
        assert rows.min() >= 0 and rows.max() < len(self.paths), "not a row of this store"
        order = np.argsort(rows, kind="stable")
        ends = np.flatnonzero(np.diff(rows[order] // self.shard_size)) + 1
        for places in np.split(order, ends):
            s = int(rows[places[0]]) // self.shard_size
            yield s, places, rows[places] - s * self.shard_size


# ---------------------------------------------------------------------------------------- embedding
def squared(image: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, size, size): all of it, whatever its shape, by antialiased bicubic
    resizing."""
    return F.interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0]


def read(paths: list[Path], size: int) -> tuple[Tensor, list[str], list[str]]:
    """Pictures (B, 3, size, size) uint8, the SHA-256 of their files, and "" each; or, of one that
    cannot be read, a black picture, "" and why."""
    images = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8)
    sha256, reasons = [], []
    for image, path in zip(images, paths, strict=True):
        try:
            image.copy_(squared(read_image(path), size))
            sha256.append(hashlib.sha256(path.read_bytes()).hexdigest())
            reasons.append("")
        except (BrokenImage, OSError) as error:
            sha256.append("")
            reasons.append(str(error))
    return images, sha256, reasons


def embed(
    paths: list[Path],
    network: Callable[[Tensor], Tensor],
    folder: Path,
    key: str,
    size: int,
    world: World,
    workers: int,
    batch_size: int = 64,
    shard_size: int = 8192,
) -> Store:
    """The store of `paths` in `folder`, where missing shards are made. All processes of `world`
    call this and get the same. `network`, in evaluation mode, maps uint8 (B, 3, size, size) on
    world.device to (B, D); `key` names it, its weights and what it does to the pixels.

    Process s % world.size makes shard s. A shard's name holds a hash of key, size and the absolute
    paths of its pictures. So a killed run goes on where it stopped, a longer list only adds shards,
    and those of another key or list stay in the folder unread. Pictures that cannot be read are
    passed over with a warning; UserError if that leaves none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); name another folder."
        ) from None
    store = Store(folder, paths, [], [], shard_size)
    names = [os.path.abspath(path) for path in paths]
    missing: dict[int, range] = {}  # shards that this process has to make -> their rows
    for s, start in enumerate(range(0, len(paths), shard_size)):
        span = range(start, min(start + shard_size, len(paths)))
        made_of = [FORMAT, key, str(size), *names[start : span.stop]]
        digest = hashlib.sha256(b"\0".join(os.fsencode(text) for text in made_of)).hexdigest()
        shard = folder / f"{s:05d}-{digest[:24]}.npy"
        store.shards.append(shard)
        # Shards of other processes are not looked for: a network disk would go on telling for a
        # while that they are not there.
        if s % world.size == world.rank:
            there = shard.is_file() and shard.with_suffix(".json").is_file()
            if not there or is_damaged(store, s, len(span)):
                missing[s] = span
    if missing:
        for s, rows, sha256, broken in embedded(
            missing, store, network, size, world, workers, batch_size
        ):
            note = {
                "key": key,
                "size": size,
                "paths": [names[i] for i in missing[s]],
                "sha256": sha256,
                "broken": broken,
            }
            write_text(store.shards[s].with_suffix(".json"), json.dumps(note))
            buffer = io.BytesIO()
            np.save(buffer, rows.half().numpy())
            # It is written last, since its presence says that the shard is whole.
            write_bytes(store.shards[s], buffer.getbuffer())
    world.barrier()
    for s in range(len(store.shards)):
        store.broken += [s * shard_size + place for place in store.note(s)["broken"]]
    if len(store.broken) == len(paths):
        # Perhaps the disk of the pictures is not mounted: leave nothing that says they are broken.
        for shard in store.shards[world.rank :: world.size]:
            shard.unlink(missing_ok=True)
        example = f", such as {paths[0]}" if paths else ""
        raise UserError(
            f"Of {len(paths)} pictures to embed into {folder} none can be read{example}; name a "
            "folder or a list of others."
        )
    return store


@torch.no_grad()
def embedded(
    spans: dict[int, range],
    store: Store,
    network: Callable[[Tensor], Tensor],
    size: int,
    world: World,
    workers: int,
    batch_size: int,
) -> Iterator[tuple[int, Tensor, list[str], list[int]]]:
    """(s, embeddings (n_s, D) float32 of length 1, SHA-256, broken places) of each shard s, which
    holds the rows `spans`[s]. Batches end where shards end, so a shard comes out the same whichever
    process makes it, and in whichever run."""
    from tqdm import tqdm

    batches = []
    for span in spans.values():
        batches += [span[i : i + batch_size] for i in range(0, len(span), batch_size)]
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            collate_fn=lambda batch: read([store.paths[i] for i in batch], size),
            generator=torch.Generator(),
            pin_memory=world.device.type == "cuda",
            **helpers(workers),
        )
    )
    with tqdm(
        total=sum(map(len, spans.values())),
        desc="embedding",
        unit="picture",
        disable=not world.main,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 60,
    ) as bar:
        for s, span in spans.items():
            rows, sha256, broken = [], [], []
            while len(sha256) < len(span):
                images, found, reasons = next(loader)
                x = network(images.to(world.device, non_blocking=True)).float().cpu()
                length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # (B, 1)
                for i, reason in enumerate(reasons):
                    if reason:
                        warnings.warn(f"{reason}; it is never retrieved", stacklevel=2)
                        broken.append(len(sha256) + i)
                    elif not 0 < length[i] < torch.inf:
                        raise RankError(
                            f"The embedding of {store.paths[span[len(sha256) + i]]} is zero or not "
                            "finite; use other weights, or a higher precision."
                        )
                rows.append(x / length)
                sha256 += found
                bar.update(len(found))
            rows = torch.cat(rows)
            rows[broken] = 0
            yield s, rows, sha256, broken


def is_damaged(store: Store, s: int, number: int) -> bool:
    """Whether a shard that lies there is not one of this many pictures, which is said."""
    try:
        note, rows = store.note(s), store.shard(s)
        lengths = [len(rows), len(note["paths"]), len(note["sha256"])]
        if rows.ndim != 2 or rows.dtype != np.float16 or lengths != [number] * 3:
            raise UserError(f"{store.shards[s]} does not hold {number} pictures.")
        if any(not 0 <= place < number for place in note["broken"]):
            raise UserError(f"{store.shards[s].with_suffix('.json')} names pictures it has not.")
    except UserError as error:
        print(f"{error} It is made anew.", flush=True)
        return True
    return False


def vectors(store: Store, rows: np.ndarray) -> np.ndarray:
    """Embeddings (n, D) float32 of `rows` (n,), in their order."""
    found = np.empty((len(rows), store.shard(0).shape[1]), np.float32)
    for s, places, inside in store.parts(rows):
        found[places] = store.shard(s)[inside]
    return found


def contents(store: Store, rows: np.ndarray) -> np.ndarray:
    """SHA-256 (n,) of the picture files `rows` (n,), text; "" for broken ones."""
    found = np.empty(len(rows), "U64")
    for s, places, inside in store.parts(rows):
        found[places] = np.array(store.note(s)["sha256"], "U64")[inside]
    return found


# ------------------------------------------------------------------------------------------- search
def search(
    queries: np.ndarray,
    store: Store,
    k: int,
    index: str = "exact",
    nprobe: int = 64,
    rerank: int = 8,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `store` with the largest inner product with each of the `queries` (Q, D):
    scores (Q, k) float32, falling, and rows (Q, k) int64; -inf and -1 where fewer are found. Broken
    pictures are not.

    `index` is exact, which reads shard by shard and needs the memory of one, or a Faiss factory
    string (Flat, "IVF256,Flat", "OPQ16,IVF64,PQ16", HNSW32). That index is held in memory, looks
    into `nprobe` of its lists where it has some, and gives rerank * k candidates, which are ranked
    by their vectors on disk."""
    queries = np.ascontiguousarray(queries, np.float32)
    if index == "exact":
        return exact(torch.from_numpy(queries).to(device), store, k)
    found = candidates(queries, store, k * rerank, index, nprobe)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1)
    for start in range(0, len(queries), 64):
        of_part = found[start : start + 64]
        needed = np.unique(of_part)
        needed = needed[needed >= 0]
        x = vectors(store, needed)  # read once for 64 queries
        for i, mine in enumerate(of_part, start):
            mine = mine[mine >= 0]
            score = x[np.searchsorted(needed, mine)] @ queries[i]
            best = np.argsort(-score, kind="stable")[:k]
            scores[i, : len(best)] = score[best]
            rows[i, : len(best)] = mine[best]
    return scores, rows


def exact(queries: Tensor, store: Store, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`search` by comparing each query with each row. The best k of the shards seen so far are kept
    and compared with those of the next."""
    device = queries.device
    scores = torch.full((len(queries), k), -torch.inf, device=device)
    rows = torch.full((len(queries), k), -1, device=device)
    broken = torch.tensor(store.broken, dtype=torch.int64, device=device)
    for s in range(len(store.shards)):
        x = torch.from_numpy(store.shard(s).astype(np.float32)).to(device)
        first = s * store.shard_size
        broken_here = broken[(broken >= first) & (broken < first + len(x))] - first
        for start in range(0, len(queries), BLOCK):
            part = slice(start, start + BLOCK)
            found = queries[part] @ x.T
            found[:, broken_here] = -torch.inf
            found, places = found.topk(min(k, len(x)))
            scores[part], order = torch.cat([scores[part], found], dim=1).topk(k)
            rows[part] = torch.cat([rows[part], places + first], dim=1).gather(1, order)
    rows[scores == -torch.inf] = -1
    return scores.cpu().numpy(), rows.cpu().numpy()


def candidates(queries: np.ndarray, store: Store, k: int, index: str, nprobe: int) -> np.ndarray:
    """Rows (Q, k) near the queries, found by a Faiss index of all rows but the broken; -1 where it
    finds fewer.

    The index is trained on all rows, but on no more than a sample of 2^18, or of 64 rows for each
    of its lists if that is more. Faiss also trains product codes for a kind of search that is not
    used here; PQ16np in place of PQ16 saves that time."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            f"--index {index} needs Faiss: pip install faiss-cpu, or take --index exact."
        ) from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = np.delete(np.arange(len(store.paths)), store.broken)
    try:
        built = faiss.index_factory(queries.shape[1], index, faiss.METRIC_INNER_PRODUCT)
        lists = faiss.try_extract_index_ivf(built)
        if lists is not None:
            if lists.nlist < 1:  # older versions crash on it
                raise RuntimeError("failed: no lists")
            lists.nprobe = min(nprobe, lists.nlist)
        if not built.is_trained:
            wanted = 2**18 if lists is None else max(2**18, 64 * lists.nlist)
            number = min(len(rows), wanted)
            sample = rng(0, "index").choice(rows, number, replace=False)
            built.train(vectors(store, np.sort(sample)))
        for s, _, inside in store.parts(rows):
            built.add(store.shard(s)[inside].astype(np.float32))
        places = built.search(queries, k)[1]
    except RuntimeError as error:
        # Faiss says "Error in f(x) at y.cpp:66: Error: ... failed: why"; the end is what helps.
        why = re.split(r":\d+: |Error: |failed: ", str(error).strip())[-1].rstrip(".")
        raise UserError(
            f"--index {index} cannot be built of {len(rows)} vectors of {queries.shape[1]} numbers "
            f"({why}); take exact, or a Faiss factory string that suits them."
        ) from None
    return np.where(places < 0, -1, rows[places])


# --------------------------------------------------------------------------------------- duplicates
def duplicates(
    store: Store, rows: np.ndarray, threshold: float, device: torch.device | str = "cpu"
) -> np.ndarray:
    """For each of `rows` (n,), all different, the row that stands for it, (n,): the row itself if
    it is kept.

    Two pictures are linked if their files are equal, or their cosine is above `threshold`. Of all
    pictures that links join, directly or by way of others, the first in `rows` is kept. The n
    vectors are held as float32, their cosines a block at a time."""
    x = torch.from_numpy(vectors(store, rows)).to(device)
    # (n,) the group of each picture, a number below n. At first a group is one file content.
    group = np.unique(contents(store, rows), return_inverse=True)[1]
    for i in range(0, len(x), BLOCK):
        for j in range(i, len(x), BLOCK):
            near = x[i : i + BLOCK] @ x[j : j + BLOCK].T > threshold
            a, b = near.nonzero(as_tuple=True)
            a, b = group[a.cpu().numpy() + i], group[b.cpu().numpy() + j]
            if (a != b).any():  # groups that are linked become one
                links = coo_matrix((np.ones(len(a), bool), (a, b)), (len(x), len(x)))
                group = connected_components(links, directed=False)[1][group]
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    return rows[first[inverse]]


def known(
    store: Store,
    rows: np.ndarray,
    others: Store,
    threshold: float,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """(n,) bool: whether `others`, a store of the same network, has a picture with the same file
    content as each of `rows` (n,), or one whose cosine to it is above `threshold`."""
    assert store.note(0)["key"] == others.note(0)["key"], "stores of two networks"
    x = torch.from_numpy(vectors(store, rows)).to(device)
    theirs = set()
    for s in range(len(others.shards)):
        theirs.update(others.note(s)["sha256"])
    same_file = [content in theirs for content in contents(store, rows)]
    found = torch.tensor(same_file, dtype=torch.bool, device=device)
    for s in range(len(others.shards)):
        y = torch.from_numpy(others.shard(s).astype(np.float32)).to(device)
        for i in range(0, len(x), BLOCK):
            found[i : i + BLOCK] |= (x[i : i + BLOCK] @ y.T > threshold).any(dim=1)
    return found.cpu().numpy()


def histogram(
    store: Store,
    rows: np.ndarray,
    threshold: float,
    sample: int = 2000,
    device: torch.device | str = "cpu",
) -> str:
    """Lines that help to choose the threshold: for each of the pictures `rows` (n,), two or more,
    or for a `sample` of them, its highest cosine to another one; and how many lie in each bin."""
    x = torch.from_numpy(vectors(store, rows)).to(device)
    chosen = torch.from_numpy(rng(0, "histogram").permutation(len(rows))[:sample]).to(device)
    highest = torch.full((len(chosen),), -1.0, device=device)
    for j in range(0, len(rows), BLOCK):
        cosine = x[chosen] @ x[j : j + BLOCK].T
        is_itself = chosen[:, None] == torch.arange(j, j + cosine.shape[1], device=device)
        cosine[is_itself] = -1
        highest = torch.maximum(highest, cosine.amax(dim=1))
    highest = highest.clamp(-1, 1).cpu().numpy()
    edges = np.array([-1, *np.arange(50, 100, 5) / 100, 0.98, 1])
    counts = np.histogram(highest, edges)[0]
    lines = [f"highest cosine of {len(chosen)} of {len(rows)} pictures to another of them:"]
    for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
        lines.append(f"{low:5.2f} to {high:4.2f} {n:6d} {'#' * round(40 * n / counts.max())}")
    lines.append(f"{(highest > threshold).mean():.1%} are above {threshold}")
    return "\n".join(lines)


class Queries(NamedTuple):
    """What was searched for: Q objects."""

    labels: np.ndarray  # (Q,) their classes
    examples: dict[int, Tensor]  # class -> a crop (3, H, W) uint8 of one of its objects


class Found(NamedTuple):
    """What a search gave for Q queries with k neighbours each."""

    cosine: np.ndarray  # (Q, k) as from `search`
    rows: np.ndarray  # (Q, k) as from `search`
    different: np.ndarray  # (n,) the rows among these, each once
    kept: np.ndarray  # (m,) of these the ones that are neither duplicates nor known


def report(
    out: Path, store: Store, queries: Queries, found: Found, classes: list[str], key: str = ""
) -> None:
    """Writes out/retrieved.txt, the list of the kept pictures; .json, what each class found; and
    .png, for the first dozen classes a query and its neighbours. `key` stands for the settings by
    which it was all made."""
    (out / "retrieved.txt").unlink(missing_ok=True)
    facts, drawn = {}, []
    for c in np.unique(queries.labels).tolist():
        mine = queries.labels == c
        rows, cosine = found.rows[mine], found.cosine[mine]
        facts[classes[c]] = {
            "queries": int(mine.sum()),
            "images": len(np.intersect1d(rows, found.kept)),
            "mean_cosine": round(float(cosine[rows >= 0].mean()), 4),
        }
        if len(drawn) < 12:
            near = []
            for row, score in zip(rows[0], cosine[0], strict=True):
                if row >= 0:
                    near.append((store.paths[row], float(score)))
            drawn.append((queries.examples[c].permute(1, 2, 0).numpy(), near[:8], classes[c]))
    sheet(drawn, out / "retrieved.png")
    about = {
        "queries": len(found.rows),
        "neighbours": found.rows.shape[1],
        "pool": len(store.paths),
        "unreadable": len(store.broken),
        "found": len(found.different),
        "kept": len(found.kept),
        "classes": facts,
        "key": key,
    }
    write_text(out / "retrieved.json", json.dumps(about, indent=1))
    lines = [f"{store.paths[row].resolve()}\n" for row in found.kept]
    write_text(out / "retrieved.txt", "".join(lines))
    left_out = len(found.different) - len(found.kept)
    print(
        f"retrieved: {len(found.kept)} images of {len(store.paths)}; {left_out} of those found are "
        f"duplicates, or labeled or scored themselves; {out / 'retrieved.txt'}, .json and .png"
    )


def done(out: Path, key: str) -> bool:
    """Whether `report` has written its list here, by the settings `key`."""
    try:
        written = json.loads((out / "retrieved.json").read_bytes())["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return written == key and (out / "retrieved.txt").exists()


def sheet(
    rows: list[tuple[np.ndarray, list[tuple[Path, float]], str]], path: Path, height: int = 144
) -> None:
    """A picture of what was found: in each row a query's crop (H, W, 3) uint8 under its title, then
    its neighbours (file, score), best first. Each is `height` pixels high, or less if it would
    otherwise be more than twice as wide as that."""

    def captioned(picture: np.ndarray, text: str) -> np.ndarray:
        scale = min(height / picture.shape[0], 2 * height / picture.shape[1])
        size = [max(1, round(n * scale)) for n in (picture.shape[1], picture.shape[0])]
        canvas = Image.new("RGB", (max(size[0], 4 + 7 * len(text)), height + 16), "white")
        canvas.paste(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), (0, 16))
        ImageDraw.Draw(canvas).text((2, 2), text, fill="black")
        return np.array(canvas)

    columns = max(len(near) for _, near, _ in rows)
    blank = np.full((height + 16, 1, 3), 255, np.uint8)
    drawn = []
    for crop, near, title in rows:
        cells = [captioned(crop, title)]
        for file, score in near:
            neighbour = read_image(file).permute(1, 2, 0).numpy()
            cells.append(captioned(neighbour, f"{score:.3f}"))
        cells += [blank] * (columns - len(near))
        drawn.append(cells)
    titles = ["query", *(str(i) for i in range(1, columns + 1))]
    plots.strip(drawn, titles, path, height + 16)
