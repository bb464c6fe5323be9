"""Mask AP, exact on any number of processes: COCO's by pycocotools, and the one of the Cityscapes
benchmark.

All numbers are in percent, and None where there is no object to find."""

import contextlib
import io
import json

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.distributed import World
from common.errors import RankError
from common.objects import CITYSCAPES_THINGS, Instances, coco_mask, read_segmentation, with_things

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # of the overlap, as cityscapesScripts has them


MIN_PIXELS = 100  # smaller objects of Cityscapes need not be found


# labelIds that Cityscapes does not score
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)


# ------------------------------------------------------------------------------------------ results
def encode(masks: Tensor) -> list[dict]:
    """(N, H, W) bool, or numbers that are 0 or not -> N run lengths as JSON files hold them
    (`counts` is text)."""
    if not len(masks):
        return []
    # turned where the masks are
    columns = (masks != 0).to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return [
        {"size": list(runs["size"]), "counts": runs["counts"].decode()}
        for runs in coco_mask().encode(columns.transpose(2, 1, 0))
    ]


def results_of(
    image_id: int,
    ids: list[int],
    labels: Tensor,
    scores: Tensor,
    masks: Tensor | None,
    boxes: Tensor | None = None,
) -> list[dict]:
    """One image's entries of a COCO results file: class indices (N,), scores (N,) and masks (N, H,
    W) in the image's own size, or none. `ids` are the data set's category ids. Boxes (N, 4), x0,
    y0, x1, y1, become x, y, width, height; without them there is no bbox, or pycocotools would take
    areas from it."""
    entries = [
        {"image_id": image_id, "category_id": ids[label], "score": score}
        for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
    ]
    if masks is not None:
        for entry, runs in zip(entries, encode(masks), strict=True):
            entry["segmentation"] = runs
    if boxes is not None:
        for entry, (x0, y0, x1, y1) in zip(entries, boxes.tolist(), strict=True):
            entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
    return entries


def gather(world: World, items: list) -> list:
    """The items of all processes, on every process, in the order of images: entries of a results
    file by image_id, and tuples by their first value. So equal scores are ranked the same on any
    number of processes."""
    parts = [items]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, items)
    return sorted(
        (item for part in parts for item in part),
        key=lambda item: item["image_id"] if isinstance(item, dict) else item[0],
    )


# --------------------------------------------------------------------------------------------- COCO
def coco_ap(
    data: Instances | dict,
    results: list[dict],
    kind: str = "segm",
    max_dets: int = 100,
    frequency: list[str] | None = None,
) -> dict:
    """COCO's AP of `results` on the scored pictures of a data set, or on the content of a COCO file
    (see `truth_of`).

    `kind` is segm or bbox. Gives ap, ap50, ap75, ap_s, ap_m, ap_l (objects under 32^2, under 96^2,
    larger), ar100 (the recall with `max_dets` detections an image), `stats`, the twelve numbers in
    the order of pycocotools, `per_class`, name -> ap; and, with the `frequency` (r, c or f) of each
    class by ascending id, their means apr, apc, apf."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = data if isinstance(data, dict) else truth_of(data)
    # pycocotools takes an object of id 0 for no match, and writes into what it is given
    truth = {
        **truth,
        "annotations": [{**a, "id": i} for i, a in enumerate(truth["annotations"], start=1)],
    }
    results = [{k: v for k, v in r.items() if k != "bbox" or kind == "bbox"} for r in results]
    with contextlib.redirect_stdout(io.StringIO()):
        scored, found = COCO(), COCO()
        scored.dataset = truth
        scored.createIndex()
        if results:
            found = scored.loadRes(results)
        else:
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        judge = COCOeval(scored, found, kind)
        judge.params.maxDets = [1, min(10, max_dets), max_dets]
        judge.evaluate()
        judge.accumulate()
    # (10, 101, K, 4, 3), (10, K, 4, 3)
    precision, recall = judge.eval["precision"], judge.eval["recall"]
    sizes = range(4)  # all, small, medium, large
    stats = [
        percent(precision[..., 0, 2]),
        percent(precision[0, ..., 0, 2]),
        percent(precision[5, ..., 0, 2]),
        *(percent(precision[..., a, 2]) for a in sizes[1:]),
        *(percent(recall[..., 0, m]) for m in range(3)),
        *(percent(recall[..., a, 2]) for a in sizes[1:]),
    ]
    names = {record["id"]: record["name"] for record in truth["categories"]}
    per_class = {
        names[c]: percent(precision[:, :, k, 0, 2]) for k, c in enumerate(judge.params.catIds)
    }
    groups = (
        {f"ap{g}": percent(precision[:, :, [f == g for f in frequency], 0, 2]) for g in "rcf"}
        if frequency
        else {}
    )
    return {
        **dict(zip(("ap", "ap50", "ap75", "ap_s", "ap_m", "ap_l"), stats, strict=False)),
        **groups,
        f"ar{max_dets}": stats[8],
        "stats": stats,
        "per_class": per_class,
    }


def percent(values: np.ndarray) -> float | None:
    """The mean of those that are not -1, which stands for no object to find."""
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def truth_of(data: Instances) -> dict:
    """A COCO or LVIS file's content for the scored pictures: their JSON file, without annotations
    that have no mask, or made of Cityscapes' label PNGs, where groups are crowds, or of the objects
    of the pictures that `instances.scored_on` names. Read it once when it is needed often."""
    if data.val_json is None:
        return (
            truth_of_labels(data)
            if any(photo.label for photo in data.val)
            else truth_of_things(data)
        )
    content = json.loads(data.val_json.read_text(encoding="utf-8"))
    ids, annotations = {photo.id for photo in data.val}, []
    images = {
        record["id"]: {**record, "height": int(record["height"]), "width": int(record["width"])}
        for record in content["images"]
        if record["id"] in ids
    }
    for a in content["annotations"]:
        segmentation = read_segmentation(a["segmentation"])
        if a["image_id"] not in ids or not segmentation:
            continue
        area, box = float(a.get("area") or 0), a.get("bbox") or ()
        if not area or len(box) != 4:  # some exporters write neither
            runs = runs_of(
                segmentation, images[a["image_id"]]["height"], images[a["image_id"]]["width"]
            )
            area = area or float(coco_mask().area(runs))
            box = box if len(box) == 4 else coco_mask().toBbox(runs).tolist()
        annotations.append(
            {
                **a,
                "segmentation": segmentation,
                "area": area,
                "bbox": list(map(float, box)),
                "iscrowd": int(a.get("iscrowd") or 0),
            }
        )
    return {
        "images": list(images.values()),
        "categories": content["categories"],
        "annotations": annotations,
    }


def truth_of_labels(data: Instances) -> dict:
    """The same from Cityscapes' instanceIds; what is void there is background here."""
    images, annotations = [], []
    for photo in data.val:
        photo, ids = with_things(photo)
        size = [photo.height, photo.width]
        images.append(
            {"id": photo.id, "file_name": photo.image.name, "height": size[0], "width": size[1]}
        )
        flat = ids.ravel(order="F")  # runs of equal values, down the columns
        starts = np.flatnonzero(np.diff(flat, prepend=flat[0] - 1))
        ends = np.append(starts[1:], flat.size)
        for thing in photo.things:
            mine = flat[starts] == thing.segmentation
            edges = np.stack([starts[mine], ends[mine]], axis=1).ravel()
            counts = np.diff(edges, prepend=0, append=flat.size).tolist()
            runs = coco_mask().frPyObjects({"size": size, "counts": counts}, *size)
            annotations.append(
                {
                    "image_id": photo.id,
                    "category_id": data.ids[thing.category],
                    "segmentation": runs,
                    "area": thing.area,
                    "bbox": coco_mask().toBbox(runs).tolist(),
                    "iscrowd": int(thing.crowd),
                }
            )
    return {"images": images, "categories": categories_of(data), "annotations": annotations}


def truth_of_things(data: Instances) -> dict:
    """The same from the objects of the Photos. Of an object whose file gives no area, or 0, the
    mask's is taken. A bbox is the extent of the polygons to two digits, as in COCO and LVIS, or
    that of the mask, which is one pixel wider and higher than COCO says of its crowds."""
    images, annotations = [], []
    for photo in data.val:
        assert photo.things is not None, f"{photo.name} has no labels"
        images.append(
            {"id": photo.id, "file_name": photo.name, "height": photo.height, "width": photo.width}
        )
        if data.lvis:
            images[-1] |= {
                "neg_category_ids": [data.ids[c] for c in photo.negative],
                "not_exhaustive_category_ids": [data.ids[c] for c in photo.partial],
            }
        for category, segmentation, crowd, area in photo.things:
            if isinstance(segmentation, list):
                points = np.concatenate(segmentation).reshape(-1, 2)
                box = np.concatenate([points.min(axis=0), np.ptp(points, axis=0)]).round(2)
            else:
                box = coco_mask().toBbox(segmentation)
            area = area or float(coco_mask().area(runs_of(segmentation, photo.height, photo.width)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": photo.id,
                    "category_id": data.ids[category],
                    "segmentation": segmentation,
                    "area": area,
                    "bbox": box.tolist(),
                    "iscrowd": int(crowd),
                }
            )
    return {"images": images, "categories": categories_of(data), "annotations": annotations}


def runs_of(segmentation: list | dict, height: int, width: int) -> dict:
    """Run lengths of polygons in a picture of this size, or those that there are."""
    if isinstance(segmentation, list):
        return coco_mask().merge(coco_mask().frPyObjects(segmentation, height, width))
    return segmentation


def categories_of(data: Instances) -> list[dict]:
    found = [{"id": i, "name": name} for i, name in zip(data.ids, data.classes, strict=True)]
    return (
        [c | {"frequency": f} for c, f in zip(found, data.frequency, strict=True)]
        if data.frequency
        else found
    )


# --------------------------------------------------------------------------------------- Cityscapes
class CityscapesAP:
    """AP of the Cityscapes benchmark. It differs from COCO's: a detection overlaps by more than the
    threshold, the best of several on one object is right and the others wrong, one that lies mostly
    on what is not scored does not count, and precision is integrated over the raw curve. Objects
    under 100 pixels are not scored."""

    def __init__(self):
        self.records = []  # of each image, see `add`

    def add(self, truth: np.ndarray, predictions: list[tuple[int, float, np.ndarray]]) -> None:
        """One image: instanceIds (H, W) of integers and (class index, score, mask (H, W) bool) of
        each detection.

        Keeps, of the P that are not empty, class, score and outcome at each threshold (P, 10): 1
        right, 0 wrong, -1 does not count; and the number of objects of each class."""
        counts = np.bincount(truth.ravel())
        values = np.flatnonzero(counts)  # (V,) the regions of this image
        place = np.zeros(len(counts), np.int64)
        place[values] = np.arange(len(values))
        regions, sizes = place[truth], counts[values]
        kinds, groups, small = (
            np.where(values < 1000, values, values // 1000),
            values < 1000,
            sizes < MIN_PIXELS,
        )
        objects = ~groups & ~small
        labels, scores, overlaps = [], [], []
        for label, score, mask in predictions:
            if mask.shape != truth.shape:
                raise RankError(
                    f"A mask of {mask.shape[1]}x{mask.shape[0]} pixels is scored on a label of "
                    f"{truth.shape[1]}x{truth.shape[0]}; images and labels must be of one size."
                )
            rows = np.flatnonzero(mask.any(axis=1))
            if len(rows):
                rows = slice(rows[0], rows[-1] + 1)
                columns = np.flatnonzero(mask[rows].any(axis=0))
                box = (rows, slice(columns[0], columns[-1] + 1))
                labels.append(label)
                scores.append(score)
                overlaps.append(np.bincount(regions[box][mask[box]], minlength=len(values)))
        labels, scores = np.array(labels, np.int64), np.array(scores, np.float64)
        overlap = np.array(overlaps, np.int64).reshape(len(labels), len(values))
        things = np.array(list(CITYSCAPES_THINGS))
        own, area = kinds == things[labels][:, None], overlap.sum(axis=1)  # (P, V), (P,)
        ious = overlap / (sizes + area[:, None] - overlap)
        # (10, P, V); a detection passes on one at most
        passes = (ious > THRESHOLDS[:, None, None]) & own & objects
        ignored = (overlap * np.isin(values, VOID)).sum(axis=1) + (
            overlap * own * (1 * groups + small)
        ).sum(axis=1)
        outcome = np.where(ignored / area > THRESHOLDS[:, None], -1, 0)  # (10, P)
        outcome[passes.any(axis=2)] = 0  # also all but the best on one object
        if len(labels):
            best = np.where(passes, scores[:, None], -np.inf).argmax(axis=1)  # (10, V)
            threshold, region = np.nonzero(passes.any(axis=1))
            outcome[threshold, best[threshold, region]] = 1
        number = np.bincount(
            np.searchsorted(things, kinds[objects & np.isin(kinds, things)]), minlength=len(things)
        )
        self.records.append((labels, scores, outcome.T.astype(np.int8), number))

    def result(self, world: World | None = None) -> dict:
        """ap, ap50 and `per_class`, name -> ap, over the images of all processes of `world`: means
        over thresholds and over the classes that have an object."""
        items = gather(world or World(), [(0, record) for record in self.records])
        empty = (
            np.zeros(0, np.int64),
            np.zeros(0),
            np.zeros((0, len(THRESHOLDS)), np.int8),
            np.zeros(8, np.int64),
        )
        labels, scores, outcome, number = (
            np.concatenate(x) for x in zip(empty, *(r for _, r in items), strict=True)
        )
        number = number.reshape(-1, len(CITYSCAPES_THINGS)).sum(axis=0)
        table = np.full((len(CITYSCAPES_THINGS), len(THRESHOLDS)), -1.0)
        for c, t in np.ndindex(*table.shape):
            if number[c]:
                mine = (labels == c) & (outcome[:, t] >= 0)
                table[c, t] = area_under(scores[mine], outcome[mine, t], number[c])
        return {
            "ap": percent(table),
            "ap50": percent(table[:, 0]),
            "per_class": {
                name: percent(row)
                for name, row in zip(CITYSCAPES_THINGS.values(), table, strict=True)
            },
        }


def area_under(scores: np.ndarray, right: np.ndarray, number: int) -> float:
    """Area under the curve of precision over recall of detections with `scores` (N,), `right` (N,)
    0/1, for `number` objects. The curve has a point for each score, that of all detections at or
    above it, and ends in (recall 0, precision 1); the width of a point reaches half-way to its
    neighbours, on the side of the highest recall not at all."""
    if not len(scores):
        return 0.0
    order = np.argsort(scores)
    _, first = np.unique(scores[order], return_index=True)
    found = right[order][::-1].cumsum()[::-1][first]
    precision = np.append(found / (len(scores) - first), 1.0)
    recall = np.append(found / number, 0.0)
    widths = np.convolve(np.concatenate([recall[:1], recall, [0.0]]), [-0.5, 0.0, 0.5], "valid")
    return float(precision @ widths)
