"""What --predict writes for pictures that have no labels, in forms that training can read.

Pictures are turned upright as their EXIF data say, as viewers show them; so are the predictions.
They are decoded, seen and written at the same time, and never all in memory."""

import contextlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from common import mask_ap
from common.boxes import boxes_of
from common.distributed import World
from common.errors import UserError
from common.files import BrokenImage, pictures, read_image, write_text
from common.loading import helpers
from common.plots import draw_objects, overlay, save_index_png, save_picture

WRITERS = 4  # threads that compress files while the network goes on
PIXELS = 2**21  # of the pictures that pass through a network together
TOGETHER = 16  # of them, at most
HELD = 64  # pictures that wait for others of their size, at most
SAME = 0.5  # overlap from which two windows show one object
LEAST_SCORE = 0.05  # of an object in a window, which has many that are next to nothing


# --------------------------------------------------------------------------------- reading, writing
class Loaded(NamedTuple):
    """A picture that is to be predicted."""

    place: int  # among all
    image: Tensor  # (3, H, W) uint8


def readable(files: list[Path], world: World, workers: int) -> Iterator[Loaded]:
    """The images of this process, which `workers`, if any, decode ahead. A file that is no image is
    named and passed over, unless it is the only one, which is a UserError."""

    def load(place: int) -> tuple[int, Tensor | str]:
        try:
            return place, read_image(files[place], upright=True)
        except BrokenImage as error:
            return place, str(error)

    mine = DataLoader(
        range(world.rank, len(files), world.size),
        batch_size=None,
        generator=torch.Generator(),
        collate_fn=load,
        **helpers(min(workers, 4)),
    )
    for place, image in mine:
        if isinstance(image, Tensor):
            yield Loaded(place, image)
        elif len(files) == 1:
            raise UserError(image)
        else:
            print(f"passed over: {image}", file=sys.stderr, flush=True)


def batches(loaded: Iterator[Loaded], tile: int = 0, side: int = 0) -> Iterator[list[Loaded]]:
    """The same pictures, in lists of one size; or, if the network brings all of them to squares of
    this `side`, of any sizes. As many are together as make about two million pixels. What is seen
    in windows of the side `tile` comes alone."""
    waiting: dict[tuple[int, int], list[Loaded]] = {}  # by their size
    for picture in loaded:
        if is_tiled(picture.image, tile):
            yield [picture]
            continue
        size = (side, side) if side else tuple(picture.image.shape[-2:])
        group = waiting.setdefault(size, [])
        group.append(picture)
        largest = max(side**2, *(one.image[0].numel() for one in group))
        if len(group) >= min(PIXELS // largest, TOGETHER):
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) > HELD:
            yield waiting.pop(next(iter(waiting)))  # the size that has waited longest
    yield from waiting.values()


@contextlib.contextmanager
def writing() -> Iterator[Callable]:
    """A function that has others write in threads, and waits while more than so many are at it:
    `later(most, write, *inputs)`. What goes wrong there is raised here."""
    under_way = deque()

    def later(most: int, write: Callable, *inputs) -> None:
        under_way.append(pool.submit(write, *inputs))
        while len(under_way) > most:
            under_way.popleft().result()

    with ThreadPoolExecutor(WRITERS) as pool:
        yield later
        for writer in under_way:
            writer.result()


def is_tiled(image: Tensor, tile: int) -> bool:
    """Whether an image is seen in windows of the side `tile`."""
    return tile > 0 and max(image.shape[-2:]) > tile


# --------------------------------------------------------------------------- semantic segmentation
@torch.no_grad()
def predict_labels(
    paths: list[str],
    out: Path,
    classes: list[str],
    logits_of: Callable[[Tensor], Tensor],
    world: World,
    workers: int = 0,
    tile: int = 0,
) -> None:
    """Classes of all pixels of images, or of folders of them; `logits_of` maps uint8 (B, 3, H, W)
    to logits (B, K, H, W). Into `out` go

        labels/NAME.png        class indices, such as `labels/train` of --dataset folder has
        confidence/NAME.png    probability of that class, 255 for 1
        overlays/NAME.jpg      the picture under its classes, with their names
        classes.txt            their names, by index

    With a `tile`, larger pictures are seen in windows of that side (`classify`). UserError when
    there is no image, or the only one cannot be read."""
    files = pictures(paths)
    stems = [file.stem for file in files]
    names = [f.stem if stems.count(f.stem) == 1 else f"{f.parent.name}_{f.name}" for f in files]
    for folder in ("labels", "confidence", "overlays"):
        (out / folder).mkdir(parents=True, exist_ok=True)

    def probabilities_of(images: Tensor) -> Tensor:
        return logits_of(images.to(world.device)).softmax(1)

    def classify_batch(images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        if is_tiled(images[0], tile):
            return [classify(images[0], lambda part: probabilities_of(part[None])[0], tile)]
        return [most_likely(p) for p in probabilities_of(torch.stack(images))]

    def write(name: str, image: Tensor, label: Tensor, confidence: Tensor) -> None:
        save_index_png(label, out / "labels" / f"{name}.png")
        Image.fromarray(confidence.numpy()).save(out / "confidence" / f"{name}.png")
        save_picture(overlay(image, label, classes), out / "overlays" / f"{name}.jpg")

    with writing() as later:
        for batch in batches(readable(files, world, workers), tile):
            images = [picture.image for picture in batch]
            for picture, maps in zip(batch, classify_batch(images), strict=True):
                most = max(len(batch), WRITERS)
                later(most, write, names[picture.place], picture.image, *maps)
    if world.main:
        write_text(out / "classes.txt", "\n".join(classes) + "\n")
        print(f"{len(files)} images: {out}/labels (class indices), confidence and overlays")


def classify(
    image: Tensor, probabilities_of: Callable[[Tensor], Tensor], tile: int = 0
) -> tuple[Tensor, Tensor]:
    """The class of each pixel of an image (3, H, W), and its probability times 255, both (H, W)
    uint8 on the CPU. `probabilities_of`: (3, h, w) -> (K, h, w).

    A larger image than `tile` is cut into square windows of that side, half a side apart.
    Probabilities of windows that overlap are averaged, with weights that fall towards a window's
    border, so that no seams are seen. Only one row of windows is kept in memory."""
    if not is_tiled(image, tile):
        return most_likely(probabilities_of(image))
    height, width = image.shape[-2:]
    tops, lefts = starts(height, tile), starts(width, tile)
    labels, confidences = [], []
    sums = None  # (K + 1, rows of the windows, W): weighted probabilities, and weights
    for top, next_top in zip(tops, [*tops[1:], height], strict=True):
        for left in lefts:
            probabilities = probabilities_of(image[:, top : top + tile, left : left + tile])
            kinds, rows, columns = probabilities.shape
            weight = hill(rows, probabilities)[:, None] * hill(columns, probabilities)
            if sums is None:
                sums = probabilities.new_zeros(kinds + 1, rows, width)
            sums[:-1, :, left : left + columns] += probabilities * weight
            sums[-1, :, left : left + columns] += weight
        whole = sums[:, : next_top - top]  # rows that no further window shows
        label, confidence = most_likely(whole[:-1] / whole[-1])
        labels.append(label)
        confidences.append(confidence)
        sums = F.pad(sums[:, next_top - top :], (0, 0, 0, next_top - top))
    return torch.cat(labels), torch.cat(confidences)


def most_likely(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """(K, h, w) -> the best class and its probability times 255, (h, w) uint8 on the CPU."""
    confidence, label = probabilities.max(0)
    return label.byte().cpu(), (255 * confidence).round().byte().cpu()


def starts(side: int, tile: int) -> list[int]:
    """Where windows begin along one side: half a window apart, and the last ends at the border."""
    last = max(side - tile, 0)
    return [*range(0, last, max(tile // 2, 1)), last]


def hill(number: int, like: Tensor) -> Tensor:
    """Weights (number,) that rise evenly to the middle and fall again, all above zero."""
    up = torch.arange(1, number + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(up, up.flip(0))


# ------------------------------------------------------------------------------------------ objects
class Found(NamedTuple):
    """What was found in one image."""

    place: int  # of the image, among all
    size: tuple[int, int]  # height and width of the image
    entries: list[dict]  # of a COCO results file
    boxes: list[list[int]]  # x, y, width, height of each mask
    areas: list[int]  # pixels of each mask


def predict_objects(
    paths: list[str],
    out: Path,
    detect: Callable[[list[Tensor]], list[tuple]],
    ids: list[int],
    classes: list[str],
    world: World,
    workers: int = 0,
    tile: int = 0,
    side: int = 0,
    from_score: float = 0.5,
) -> None:
    """Objects of images, or of folders of them. `detect` gives of each image (3, H, W) uint8 in a
    list labels (n,), scores (n,), masks (n, H, W), and boxes (n, 4) where it has some; the images
    have one size, or the network pads them to squares of a `side`. Into `out` go

        predictions.json          all, in COCO's result format, with paths for `image_id`
        pseudo_labels.json        those with a score from `from_score` on, as a COCO data set
        NUMBER_NAME_overlay.jpg   the picture with these

    With a `tile`, larger pictures are seen in windows of that side (`detect_in_tiles`)."""
    files = pictures(paths)
    out.mkdir(exist_ok=True)
    of_images = []

    def detect_batch(images: list[Tensor]) -> list[tuple]:
        if is_tiled(images[0], tile):
            return [detect_in_tiles(images[0], detect, tile)]
        return [tuple(x.cpu() for x in found) for found in detect(images)]

    def write(picture: Loaded, found: tuple) -> None:
        file = files[picture.place]
        of_images.append(found_in(picture, str(file), ids, *found))
        shown = draw_objects(picture.image, *found[:3], classes)
        save_picture(shown, out / f"{picture.place:05d}_{file.stem}_overlay.jpg")

    with writing() as later:
        for batch in batches(readable(files, world, workers), tile, side):
            images = [picture.image for picture in batch]
            for picture, found in zip(batch, detect_batch(images), strict=True):
                later(len(batch), write, picture, found)  # no more: masks take much memory
    of_images = mask_ap.gather(world, of_images)
    if not world.main:
        return
    results = []
    for found in of_images:
        results += found.entries
    write_text(out / "predictions.json", json.dumps(results))
    content = dataset_of(of_images, files, ids, classes, from_score)
    write_text(out / "pseudo_labels.json", json.dumps(content))
    print(
        f"{len(files)} images: {out}/*_overlay.jpg (scores from {from_score}), predictions.json "
        f"(all) and pseudo_labels.json (scores from {from_score}, as a COCO data set)"
    )


def found_in(
    picture: Loaded,
    name: str,
    ids: list[int],
    labels: Tensor,
    scores: Tensor,
    masks: Sequence[Tensor],
    boxes: Tensor | None = None,
) -> Found:
    """What was found in one picture, in the words of COCO."""
    found = Found(picture.place, tuple(picture.image.shape[-2:]), [], [], [])
    for i, mask in enumerate(masks):
        box = None if boxes is None else boxes[i : i + 1]
        single = (labels[i : i + 1], scores[i : i + 1], mask[None], box)
        found.entries.extend(mask_ap.results_of(name, ids, *single))
        x0, y0, x1, y1 = boxes_of(mask[None])[0].int().tolist()
        found.boxes.append([x0, y0, x1 - x0, y1 - y0])
        found.areas.append(int(mask.sum()))
    return found


def dataset_of(
    of_images: list[Found], files: list[Path], ids: list[int], classes: list[str], from_score: float
) -> dict:
    """A COCO data set of what was found in images with a score from `from_score` on."""
    images, annotations = [], []
    for found in of_images:
        number = found.place + 1
        name = str(files[found.place].resolve())
        height, width = found.size
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for entry, box, area in zip(found.entries, found.boxes, found.areas, strict=True):
            if entry["score"] >= from_score and area > 0:
                known = {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
                annotations.append(entry | known | {"bbox": box, "area": area})
    categories = [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


# --------------------------------------------------------------------------------- objects in tiles
@dataclass(eq=False)
class Piece:
    """What one window shows of an object."""

    label: int
    score: float
    mask: Tensor  # (h, w) bool, in the window
    top: int  # of the window
    left: int


class Masks(Sequence):
    """The masks (H, W) of objects in pieces, each made when it is asked for: all of them need more
    memory than the picture many times over."""

    def __init__(self, objects: list[list[Piece]], size: tuple[int, int]):
        self.objects, self.size = objects, size

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, place: int) -> Tensor:
        return put_together(self.objects[place], self.size)


def detect_in_tiles(
    image: Tensor, detect: Callable[[list[Tensor]], list[tuple]], tile: int
) -> tuple[Tensor, Tensor, Masks]:
    """Labels (n,), scores (n,) and masks of the objects of an image (3, H, W), best first. It is
    cut into square windows of the side `tile`, half a side apart, so that whatever is smaller than
    that is whole in one of them. Two windows show the same object if their masks agree in the part
    of the picture that both show (`merge`)."""
    height, width = image.shape[-2:]
    pieces = []
    for top in starts(height, tile):
        for left in starts(width, tile):
            [found] = detect([image[:, top : top + tile, left : left + tile]])
            labels, scores, masks = (x.cpu() for x in found[:3])
            used = (scores >= LEAST_SCORE) & masks.flatten(1).any(1)
            rows = zip(labels[used].tolist(), scores[used].tolist(), masks[used], strict=True)
            pieces += [Piece(*row, top, left) for row in rows]
    objects = merge(pieces)
    labels = torch.tensor([best.label for best, *_ in objects], dtype=torch.int64)
    scores = torch.tensor([best.score for best, *_ in objects])
    return labels, scores, Masks(objects, (height, width))


def merge(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces of each object, its best first, and the best object first. A piece joins those of
    its class which agree with it. A window has one piece of an object: what it shows twice stays
    two objects, as in a picture without windows."""
    left_over = sorted(pieces, key=lambda piece: piece.score, reverse=True)
    objects = []
    while left_over:
        same = [left_over.pop(0)]
        for piece in same:  # which grows: a long object goes on from window to window
            for other in list(left_over):
                windows = [(one.top, one.left) for one in same]
                is_new = other.label == piece.label and (other.top, other.left) not in windows
                if is_new and agreement(piece, other) >= SAME:
                    same.append(other)
                    left_over.remove(other)
        objects.append(same)
    return objects


def agreement(a: Piece, b: Piece) -> float:
    """Intersection over union of two masks, in the part of the picture that both windows show."""
    top, left = max(a.top, b.top), max(a.left, b.left)
    bottom = min(piece.top + piece.mask.shape[0] for piece in (a, b))
    right = min(piece.left + piece.mask.shape[1] for piece in (a, b))
    if top >= bottom or left >= right:
        return 0.0
    of_a, of_b = (
        piece.mask[top - piece.top : bottom - piece.top, left - piece.left : right - piece.left]
        for piece in (a, b)
    )
    return ((of_a & of_b).sum() / (of_a | of_b).sum().clamp(min=1)).item()


def put_together(pieces: list[Piece], size: tuple[int, int]) -> Tensor:
    """The mask (H, W) bool of an object. Its windows vote on the pixels that several of them show,
    with weights that fall towards a window's border, as in `classify`."""
    top, left = min(piece.top for piece in pieces), min(piece.left for piece in pieces)
    bottom = max(piece.top + piece.mask.shape[0] for piece in pieces)
    right = max(piece.left + piece.mask.shape[1] for piece in pieces)
    votes = torch.zeros(bottom - top, right - left)
    for piece in pieces:
        rows, columns = piece.mask.shape
        weight = hill(rows, votes)[:, None] * hill(columns, votes)
        window = votes[piece.top - top :, piece.left - left :][:rows, :columns]
        window += torch.where(piece.mask, weight, -weight)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = votes > 0
    return mask
