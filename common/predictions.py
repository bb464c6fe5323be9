"""What --predict writes for pictures that have no labels, in forms that training can read.

Pictures are turned upright as their EXIF data say, as viewers show them; so are the predictions.
"""

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import mask_ap
from common.boxes import boxes_of
from common.distributed import World
from common.files import pictures, readable, write_text
from common.plots import draw_objects, overlay, save_index_png, save_picture

WRITERS = 4  # threads that compress files while the network goes on


# --------------------------------------------------------------------------- semantic segmentation
@torch.no_grad()
def predict_labels(
    paths: list[str],
    out: Path,
    classes: list[str],
    logits_of: Callable[[Tensor], Tensor],
    world: World,
    tile: int = 0,
) -> None:
    """Classes of all pixels of images, or of folders of them; `logits_of` maps uint8 (1, 3, H, W)
    to logits (1, K, H, W). Into `out` go

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

    def probabilities_of(part: Tensor) -> Tensor:
        return logits_of(part[None].to(world.device))[0].softmax(0)

    def write(name: str, image: Tensor, label: Tensor, confidence: Tensor) -> None:
        save_index_png(label, out / "labels" / f"{name}.png")
        Image.fromarray(confidence.numpy()).save(out / "confidence" / f"{name}.png")
        save_picture(overlay(image, label, classes), out / "overlays" / f"{name}.jpg")

    with ThreadPoolExecutor(WRITERS) as pool:
        writing = deque()
        for place, _, image in readable(files, world, upright=True):
            label, confidence = classify(image, probabilities_of, tile)
            writing.append(pool.submit(write, names[place], image, label, confidence))
            if len(writing) > WRITERS:
                writing.popleft().result()
        for writer in writing:
            writer.result()
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
    height, width = image.shape[-2:]
    if not tile or max(height, width) <= tile:
        return most_likely(probabilities_of(image))
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
    files: list[Path],
    out: Path,
    detect: Callable[[Tensor], tuple[Tensor, ...]],
    ids: list[int],
    classes: list[str],
    world: World,
    from_score: float = 0.5,
) -> None:
    """Objects of images. `detect` gives of an image (3, H, W) uint8 labels (n,), scores (n,), masks
    (n, H, W), and boxes (n, 4) where it has some. Into `out` go

        predictions.json          all, in COCO's result format, with paths for `image_id`
        pseudo_labels.json        those with a score from `from_score` on, as a COCO data set
        NUMBER_NAME_overlay.jpg   the picture with these
    """
    out.mkdir(exist_ok=True)
    of_images = []
    for place, file, image in readable(files, world, upright=True):
        found = detect(image)
        labels, scores, masks = (x.cpu() for x in found[:3])
        x0, y0, x1, y1 = boxes_of(masks).unbind(1)
        of_images.append(
            Found(
                place,
                tuple(image.shape[-2:]),
                mask_ap.results_of(str(file), ids, *found),
                torch.stack([x0, y0, x1 - x0, y1 - y0], 1).int().tolist(),
                masks.flatten(1).sum(1).tolist(),
            )
        )
        shown = draw_objects(image, labels, scores, masks, classes)
        save_picture(shown, out / f"{place:05d}_{file.stem}_overlay.jpg")
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
