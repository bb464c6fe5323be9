"""What COCO's and LVIS's average precision cost here and in the packages that are their record,
pycocotools and lvis, on the same drawn results, as ratios: `make bench`.

Both read the truth from a JSON file and get the results as the scripts have them, in memory. Each
runs in a process of its own, one after the other. The time is that of the CPU, loading included,
and the memory is the peak of the resident set above what it was before (Linux; see `peak` of
bench_guided.py)."""

import contextlib
import ctypes
import gc
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
from pycocotools import mask as coco_mask

from common.judge import coco_ap, lvis_ap

HEIGHT, WIDTH = 480, 640


def drawn(images: int, classes: int, detections: int, seed: int = 0) -> tuple[dict, list[dict]]:
    """An LVIS file's content and results on it. The classes have a long tail; an image has 3.6 of
    them, 2.5 objects of each, and nine that are known to be absent. Of its detections some lie on
    objects, a third of the others are of its known classes. Forms are taken from a store, each with
    variants that overlap it more or less; scores have three digits, so that many are equal."""
    g = np.random.default_rng(seed)
    turn = np.linspace(0, 2 * np.pi, 17)[:-1]
    radii, centers = np.exp(g.uniform(1.5, 5, (300, 2))), g.uniform(0, (WIDTH, HEIGHT), (300, 2))
    # (300, 16, 2)
    forms = centers[:, None] + radii[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    moved = forms[:, None] + g.normal(0, 0.1, (300, 8, 1, 2)) * radii[:, None, None]
    moved = moved.clip(0, (WIDTH, HEIGHT)).reshape(300, 8, -1)
    forms = forms.clip(0, (WIDTH, HEIGHT)).reshape(300, -1)
    runs = [
        coco_mask.frPyObjects([p.round(2).tolist() for p in (form, *m)], HEIGHT, WIDTH)
        for form, m in zip(forms, moved, strict=True)
    ]
    areas, boxes = ([function(r) for r in runs] for function in (coco_mask.area, coco_mask.toBbox))
    law = 1 / np.arange(10, 10 + classes)
    law = g.permutation(law / law.sum())
    records, annotations, results, held = [], [], [], np.zeros(classes, np.int64)
    for i in range(images):
        number = min(int(1 + g.poisson(2.6)), classes // 4)
        known = g.choice(classes, min(number + 9, classes // 2), replace=False, p=law)
        present, absent = known[:number], known[number:]
        held[present] += 1
        records.append(
            {
                "id": 7 * i + 3,
                "height": HEIGHT,
                "width": WIDTH,
                "neg_category_ids": (absent + 1).tolist(),
                "not_exhaustive_category_ids": [int(c) + 1 for c in known if g.random() < 0.03],
            }
        )
        mine = []
        for c in present.repeat(g.geometric(0.4, len(present))):
            form = int(g.integers(300))
            if areas[form][0]:
                mine.append((int(c), form))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": 7 * i + 3,
                        "category_id": int(c) + 1,
                        "segmentation": [forms[form].round(2).tolist()],
                        "area": float(areas[form][0]),
                        "bbox": boxes[form][0].tolist(),
                        "iscrowd": 0,
                    }
                )
        hits = [mine[j] for j in g.permutation(len(mine)).repeat(g.integers(0, 4, len(mine)))][
            :detections
        ]
        rest = detections - len(hits)
        others = np.where(
            g.random(rest) < 1 / 3, g.choice(known, rest), g.choice(classes, rest, p=law)
        )
        found = hits + list(zip(others.tolist(), g.integers(0, 300, rest).tolist(), strict=True))
        level = np.concatenate([g.beta(3, 2, len(hits)), g.beta(1, 4, rest)]).round(3).tolist()
        for (c, form), value, v in zip(
            found, level, g.integers(0, 9, detections).tolist(), strict=True
        ):
            results.append(
                {
                    "image_id": 7 * i + 3,
                    "category_id": c + 1,
                    "score": value,
                    "segmentation": runs[form][v],
                    "bbox": boxes[form][v].tolist(),
                }
            )
    categories = [
        {
            "id": c + 1,
            "name": f"class {c}",
            "frequency": "r" if m <= 10 else "c" if m <= 100 else "f",
        }
        for c, m in enumerate(held.tolist())
    ]
    return {"images": records, "categories": categories, "annotations": annotations}, results


def of_kind(results: list[dict], kind: str) -> list[dict]:
    """Results without what the other kind needs: the package takes areas from boxes if there are
    any."""
    return [
        {k: v for k, v in r.items() if k != ("bbox" if kind == "segm" else "segmentation")}
        for r in results
    ]


def of_pycocotools(path: Path, results: list[dict], kind: str) -> tuple[list, dict]:
    """Its twelve numbers and the AP of each class (name ->) in percent, None where it says -1, of
    the truth in a file."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        judge = COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = [truth.cats[number]["name"] for number in judge.params.catIds]
    precision = judge.eval["precision"][..., 0, 2]  # (10, 101, K)
    return in_percent(judge.stats), of_classes(precision, names)


def of_lvis(path: Path, results: list[dict], kind: str, max_dets: int = 300) -> tuple[list, dict]:
    """The 13 numbers of the lvis package and the AP of each class. It writes into the results;
    np.float, which numpy has no more, is there while it runs."""
    from lvis import LVIS, LVISEval, LVISResults

    logging.disable(logging.WARNING)
    with mock.patch.object(np, "float", float, create=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it logs with `warn`
        truth = LVIS(str(path))
        judge = LVISEval(truth, LVISResults(truth, results, max_dets=max_dets), kind)
        judge.params.max_dets = max_dets
        judge.run()
    names = [truth.cats[number]["name"] for number in judge.params.cat_ids]
    precision = judge.eval["precision"][..., 0]  # (10, 101, K)
    return in_percent(judge.get_results().values()), of_classes(precision, names)


def in_percent(numbers) -> list[float | None]:
    return [None if x == -1 else 100 * float(x) for x in numbers]


def of_classes(precision: np.ndarray, names: list[str]) -> dict[str, float | None]:
    """Name -> AP in percent, from precision (10, 101, K)."""
    score = {}
    for k, name in enumerate(names):
        values = precision[:, :, k].ravel()
        score[name] = None if values[0] == -1 else 100 * float(values.mean())
    return score


RECORD = {"coco": of_pycocotools, "lvis": of_lvis}
OURS = {"coco": coco_ap, "lvis": lvis_ap}


def measure(which: str, task: str, kind: str, *sizes: int) -> dict:
    """In a process of its own: seconds, GiB above what was taken before, and all numbers."""

    def status(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1])

    def scores(path: Path, results: list[dict]) -> tuple[list, dict]:
        if which == "record":
            return RECORD[task](path, results, kind)
        score = OURS[task](json.loads(path.read_text()), results, kind)
        return score["stats"], score["per_class"]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        truth, results = drawn(2, 30, 5)
        path.write_text(json.dumps(truth))
        scores(path, of_kind(results, kind))  # what is imported on first use
        truth, results = drawn(*sizes)
        path.write_text(json.dumps(truth))
        results = of_kind(results, kind)
        del truth
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, start = status("VmRSS"), time.process_time()
        numbers = scores(path, results)
    return {
        "seconds": time.process_time() - start,
        "memory": (status("VmHWM") - before) / 2**20,
        "numbers": numbers,
    }


def compare(task: str, kind: str, *sizes: int) -> None:
    """One line of the report: medians of three pairs, in each of which one process follows the
    other."""
    measured = {"record": [], "ours": []}
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}  # hotcoco's threads
    for which in ("record", "ours") * 3:
        command = [sys.executable, "-m", "tests.bench_evaluation", which, task, kind]
        command += map(str, sizes)
        done = subprocess.run(
            command, check=True, text=True, stdout=subprocess.PIPE, env=environment
        )
        measured[which].append(json.loads(done.stdout.splitlines()[-1]))
    theirs, ours = measured["record"], measured["ours"]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(theirs, ours, strict=True)]
    images, classes, detections = sizes
    equal = "equal to the bit" if theirs[0]["numbers"] == ours[0]["numbers"] else "NOT EQUAL"
    print(
        f"{task} {kind}, {images} images x {detections} of {classes} classes: record "
        f"{median_of(theirs, 'seconds'):.1f} s, ours {median_of(ours, 'seconds'):.2f} s, ratio "
        f"{statistics.median(ratios):.1f}; peak memory {median_of(theirs, 'memory'):.2f} and "
        f"{median_of(ours, 'memory'):.2f} GiB; AP {ours[0]['numbers'][0][0]:.3f}, all numbers "
        f"{equal}",
        flush=True,
    )


def median_of(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def main(images: int) -> None:
    compare("coco", "segm", images, 80, 100)
    compare("lvis", "segm", images, 1200, 300)
    compare("lvis", "bbox", images, 1200, 300)


if __name__ == "__main__":
    if sys.argv[1:2] in (["record"], ["ours"]):
        print(json.dumps(measure(*sys.argv[1:4], *map(int, sys.argv[4:]))))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 600)
