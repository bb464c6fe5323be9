"""Pictures near query embeddings in a large pool: embed the pool once on disk, search it, find
duplicates.

Nothing here knows what a query is, or which network embeds. All processes embed, one may do the
rest. Files are taken to stay as they were when they were embedded."""

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
from common.errors import RankError, UserError
from common.files import BrokenImage, read_image, write_bytes, write_text
from common.loading import helpers

# change it when a shard would be another one
FORMAT = "1: whole picture, bicubic with antialias, float16"


BLOCK = 2048  # rows and columns of a block of cosines, 16 MiB


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
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.shards[s]} cannot be read ({error}); delete it, and it is made again."
            ) from None

    def note(self, s: int) -> dict:
        """About shard s: `key`, `size`, its `paths`, their `sha256` ("" for broken ones), its
        places `broken`."""
        path = self.shards[s].with_suffix(".json")
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); delete it, and it is made again."
            ) from None

    def parts(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, places in `rows`, their rows within the shard) for each shard that holds some of
        `rows` (n,)."""
        assert not len(rows) or 0 <= rows.min() and rows.max() < len(self.paths), (
            "not a row of this store"
        )
        order = np.argsort(rows, kind="stable")
        ends = np.flatnonzero(np.diff(rows[order] // self.shard_size)) + 1
        for places in np.split(order, ends) if len(rows) else ():
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
    images, sha256, reasons = torch.zeros(len(paths), 3, size, size, dtype=torch.uint8), [], []
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
    """The store of `paths` in `folder`, where the shards that lack are made; all processes of
    `world` call this and get the same. `network`, in evaluation mode, maps uint8 (B, 3, size, size)
    on world.device to (B, D); `key` names it, its weights and what it does to the pixels.

    Process s % world.size makes shard s. A shard's name holds a hash of key, size and its absolute
    paths: a killed run goes on, a longer list adds to a store, and what another key or list left in
    the folder stays there unread. Pictures that cannot be read are passed over with a warning;
    UserError when all are such, or there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}); name another folder."
        ) from None
    store, names, spans = (
        Store(folder, paths, [], [], shard_size),
        [os.path.abspath(path) for path in paths],
        {},
    )
    for s, start in enumerate(range(0, len(paths), shard_size)):
        about = b"\0".join(
            map(os.fsencode, [FORMAT, key, str(size), *names[start : start + shard_size]])
        )
        shard = folder / f"{s:05d}-{hashlib.sha256(about).hexdigest()[:24]}.npy"
        store.shards.append(shard)
        # others' shards are not looked for: a network disk remembers for a while what was not there
        if s % world.size == world.rank and not (
            shard.is_file() and shard.with_suffix(".json").is_file()
        ):
            spans[s] = range(start, min(start + shard_size, len(paths)))
    for s, rows, sha256, broken in (
        embedded(spans, store, network, size, world, workers, batch_size) if spans else ()
    ):
        note = {
            "key": key,
            "size": size,
            "paths": [names[i] for i in spans[s]],
            "sha256": sha256,
            "broken": broken,
        }
        write_text(store.shards[s].with_suffix(".json"), json.dumps(note))
        buffer = io.BytesIO()
        np.save(buffer, rows.half().numpy())
        # last, for it says that the shard is whole
        write_bytes(store.shards[s], buffer.getbuffer())
    world.barrier()
    store.broken = [
        s * shard_size + place
        for s in range(len(store.shards))
        for place in store.note(s)["broken"]
    ]
    if len(store.broken) == len(paths):
        # the disk of the pictures may just be missing
        for shard in store.shards[world.rank :: world.size]:
            shard.unlink(missing_ok=True)
        raise UserError(
            f"Of {len(paths)} pictures to embed into {folder} none can be read"
            f"{f', such as {paths[0]}' if paths else ''}; name a folder or a list of others."
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
    """(shard, rows (n_s, D) float32 of length 1, SHA-256, broken places) for each shard s of the
    rows `spans`[s]. Batches end where shards end, so a shard is the same whoever makes it, and
    when."""
    from tqdm import tqdm

    batches = [
        span[i : i + batch_size] for span in spans.values() for i in range(0, len(span), batch_size)
    ]
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            collate_fn=lambda b: read([store.paths[i] for i in b], size),
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
    scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    for start in range(0, len(queries), 64):
        needed = np.unique(found[start : start + 64])
        needed = needed[needed >= 0]
        x = vectors(store, needed)  # read once for 64 queries
        for i, mine in enumerate(found[start : start + 64], start):
            mine = mine[mine >= 0]
            score = x[np.searchsorted(needed, mine)] @ queries[i]
            best = np.argsort(-score, kind="stable")[:k]
            scores[i, : len(best)], rows[i, : len(best)] = score[best], mine[best]
    return scores, rows


def exact(queries: Tensor, store: Store, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`search` by comparing each query with each row."""
    at = {"device": queries.device}
    scores, rows = (
        torch.full((len(queries), k), -torch.inf, **at),
        torch.full((len(queries), k), -1, **at),
    )
    broken = torch.tensor(store.broken, dtype=torch.int64, **at)
    for s in range(len(store.shards)):
        x, first = (
            torch.from_numpy(store.shard(s).astype(np.float32)).to(**at),
            s * store.shard_size,
        )
        gone = broken[(broken >= first) & (broken < first + len(x))] - first
        for start in range(0, len(queries), BLOCK):
            part = slice(start, start + BLOCK)
            found = queries[part] @ x.T
            found[:, gone] = -torch.inf
            found, places = found.topk(min(k, len(x)))
            scores[part], order = torch.cat([scores[part], found], 1).topk(k)
            rows[part] = torch.cat([rows[part], places + first], 1).gather(1, order)
    rows[scores == -torch.inf] = -1
    return scores.cpu().numpy(), rows.cpu().numpy()


def candidates(queries: np.ndarray, store: Store, k: int, index: str, nprobe: int) -> np.ndarray:
    """(Q, k) rows near the queries by a Faiss index of all rows but the broken, -1 where it finds
    fewer.

    It is trained on all rows, or on a sample of 2^18, or of 64 for each of its lists where that is
    more. Faiss also trains product codes for a search that is not used here; PQ16np in place of
    PQ16 saves that time."""
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
            number = min(len(rows), max(2**18, 64 * lists.nlist if lists is not None else 0))
            built.train(
                vectors(store, np.sort(rng(0, "index").choice(rows, number, replace=False)))
            )
        for s, _, inside in store.parts(rows):
            built.add(store.shard(s)[inside].astype(np.float32))
        places = built.search(queries, k)[1]
    except RuntimeError as error:  # Error in f(x) at y.cpp:66: Error: ... failed: why
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
    """For each of `rows` (n,), all different, the row (n,) that stands for it: itself where it is
    kept.

    Pictures of one file content, or of a cosine above `threshold`, are linked; of those that hang
    together, directly or by others, the first in `rows` is kept. The n vectors are held as float32,
    their cosines a block at a time."""
    x = torch.from_numpy(vectors(store, rows)).to(device)
    # (n,) numbers below n, equal where linked
    label = np.unique(contents(store, rows), return_inverse=True)[1]
    for i in range(0, len(x), BLOCK):
        for j in range(i, len(x), BLOCK):
            a, b = (x[i : i + BLOCK] @ x[j : j + BLOCK].T > threshold).nonzero(as_tuple=True)
            a, b = label[a.cpu().numpy() + i], label[b.cpu().numpy() + j]
            if (a != b).any():
                graph = coo_matrix((np.ones(len(a), bool), (a, b)), (len(x), len(x)))
                label = connected_components(graph, directed=False)[1][label]
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return rows[first[inverse]]


def known(
    store: Store,
    rows: np.ndarray,
    others: Store,
    threshold: float,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """(n,) bool: whether each of `rows` (n,) has a picture of the same file content, or of a cosine
    above `threshold`, in `others`, a store of the same network."""
    assert store.note(0)["key"] == others.note(0)["key"], "stores of two networks"
    x = torch.from_numpy(vectors(store, rows)).to(device)
    theirs = {content for s in range(len(others.shards)) for content in others.note(s)["sha256"]}
    found = torch.tensor(
        [content in theirs for content in contents(store, rows)], dtype=torch.bool, device=device
    )
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
    """Lines to choose the threshold by: the highest cosine to another one of the pictures `rows`
    (n,), two or more, for all of them or a `sample`, in bins."""
    x = torch.from_numpy(vectors(store, rows)).to(device)
    chosen = torch.from_numpy(rng(0, "histogram").permutation(len(rows))[:sample]).to(device)
    highest = torch.full((len(chosen),), -1.0, device=device)
    for j in range(0, len(rows), BLOCK):
        cosine = x[chosen] @ x[j : j + BLOCK].T
        # to itself
        cosine[chosen[:, None] == torch.arange(j, j + cosine.shape[1], device=device)] = -1
        highest = torch.maximum(highest, cosine.amax(dim=1))
    highest, edges = (
        highest.clamp(-1, 1).cpu().numpy(),
        np.array([-1, *np.arange(50, 100, 5) / 100, 0.98, 1]),
    )
    counts = np.histogram(highest, edges)[0]
    lines = [f"highest cosine of {len(chosen)} of {len(rows)} pictures to another of them:"]
    for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True):
        lines.append(f"{low:5.2f} to {high:4.2f} {n:6d} {'#' * round(40 * n / counts.max())}")
    lines.append(f"{(highest > threshold).mean():.1%} are above {threshold}")
    return "\n".join(lines)


def report(
    out: Path,
    store: Store,
    found: np.ndarray,
    kept: np.ndarray,
    rows: np.ndarray,
    cosine: np.ndarray,
    labels: np.ndarray,
    examples: dict[int, Tensor],
    classes: list[str],
    key: str = "",
) -> None:
    """Writes out/retrieved.txt, the list of the `kept` rows; .json, what each class found; and
    .png, a query of a class and its neighbours, for the first dozen. Of Q queries `rows` and
    `cosine` (Q, k) as from `search`, `labels` (Q,); `examples` is a crop (3, H, W) uint8 of each
    class; `key` says by which settings it was all made."""
    (out / "retrieved.txt").unlink(missing_ok=True)
    groups = {classes[c]: (labels == c, examples[c]) for c in np.unique(labels).tolist()}
    facts = {
        name: {
            "queries": int(mine.sum()),
            "images": len(np.intersect1d(rows[mine], kept)),
            "mean_cosine": round(float(cosine[mine][rows[mine] >= 0].mean()), 4),
        }
        for name, (mine, _) in groups.items()
    }
    drawn = []
    for name, (mine, crop) in list(groups.items())[:12]:
        first = np.flatnonzero(mine)[0]
        near = [
            (store.paths[r], float(c))
            for r, c in zip(rows[first], cosine[first], strict=True)
            if r >= 0
        ][:8]
        drawn.append((crop.permute(1, 2, 0).numpy(), near, name))
    sheet(drawn, out / "retrieved.png")
    write_text(
        out / "retrieved.json",
        json.dumps(
            {
                "queries": len(rows),
                "neighbours": rows.shape[1],
                "pool": len(store.paths),
                "unreadable": len(store.broken),
                "found": len(found),
                "kept": len(kept),
                "classes": facts,
                "key": key,
            },
            indent=1,
        ),
    )
    write_text(out / "retrieved.txt", "".join(f"{store.paths[r].resolve()}\n" for r in kept))
    print(
        f"retrieved: {len(kept)} images of {len(store.paths)}; {len(found) - len(kept)} of those "
        f"found are duplicates, or labeled or scored themselves; {out / 'retrieved.txt'}, .json "
        "and .png"
    )


def done(out: Path, key: str) -> bool:
    """Whether `report` has written its list here, by the settings `key`."""
    try:
        return (
            json.loads((out / "retrieved.json").read_text())["key"] == key
            and (out / "retrieved.txt").exists()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sheet(
    rows: list[tuple[np.ndarray, list[tuple[Path, float]], str]], path: Path, height: int = 144
) -> None:
    """A picture of what was found: in each row a query crop (H, W, 3) uint8 under its title, then
    its neighbours (file, score), best first, `height` pixels high or, to be at most twice as wide,
    less."""

    def captioned(picture: np.ndarray, text: str) -> np.ndarray:
        scale = min(height / picture.shape[0], 2 * height / picture.shape[1])
        size = [max(1, round(n * scale)) for n in (picture.shape[1], picture.shape[0])]
        canvas = Image.new("RGB", (max(size[0], 4 + 7 * len(text)), height + 16), "white")
        canvas.paste(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), (0, 16))
        ImageDraw.Draw(canvas).text((2, 2), text, fill="black")
        return np.array(canvas)

    columns = max(len(near) for _, near, _ in rows)
    drawn = [
        [
            captioned(crop, title),
            *(
                captioned(read_image(file).permute(1, 2, 0).numpy(), f"{score:.3f}")
                for file, score in near
            ),
        ]
        for crop, near, title in rows
    ]
    blank = np.full((height + 16, 1, 3), 255, np.uint8)
    plots.strip(
        [row + [blank] * (columns + 1 - len(row)) for row in drawn],
        ["query", *map(str, range(1, columns + 1))],
        path,
        height + 16,
    )
