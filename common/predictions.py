"""What --predict writes for pictures that have no labels."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import mask_ap
from common.distributed import World
from common.files import pictures, readable, write_text
from common.plots import draw_objects, overlay, save_index_png, save_picture


@torch.no_grad()
def predict_labels(
    paths: list[str],
    out: Path,
    classes: list[str],
    logits_of: Callable[[Tensor], Tensor],
    world: World,
) -> None:
    """Index PNGs and overlays of images, or of folders of them, into `out`; `logits_of` maps uint8
    (1, 3, H, W) to logits (1, K, H, W). UserError when there is no image, or the only one cannot be
    read."""
    files = pictures(paths)
    stems = [file.stem for file in files]
    names = [f.stem if stems.count(f.stem) == 1 else f"{f.parent.name}_{f.name}" for f in files]
    out.mkdir(exist_ok=True)
    for place, _, image in readable(files, world):
        label = logits_of(image[None].to(world.device)).argmax(1)[0]
        save_index_png(label, out / f"{names[place]}.png")
        save_picture(overlay(image, label, classes), out / f"{names[place]}_overlay.jpg")
    if world.main:
        print(f"{len(files)} images: {out}/*.png (class indices) and *_overlay.jpg")


def predict_objects(
    files: list[Path],
    out: Path,
    detect: Callable[[Tensor], tuple[Tensor, ...]],
    ids: list[int],
    classes: list[str],
    world: World,
) -> None:
    """Overlays of images, and predictions.json in COCO's result format, with paths for `image_id`,
    into `out`. `detect`: (3, H, W) uint8 -> labels (n,), scores (n,), masks (n, H, W) and, if
    there are any, boxes (n, 4)."""
    out.mkdir(exist_ok=True)
    of_images = []
    for place, file, image in readable(files, world):
        found = detect(image)
        of_images.append((place, mask_ap.results_of(str(file), ids, *found)))
        labels, scores, masks = found[:3]
        shown = draw_objects(image, labels.cpu(), scores.cpu(), masks.cpu(), classes)
        save_picture(shown, out / f"{place:05d}_{file.stem}_overlay.jpg")
    results = []
    for _, entries in mask_ap.gather(world, of_images):
        results += entries
    if world.main:
        write_text(out / "predictions.json", json.dumps(results))
        print(
            f"{len(files)} images: {out}/*_overlay.jpg (scores from 0.5) and predictions.json (all)"
        )
