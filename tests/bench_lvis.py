"""What LVIS's average precision costs here and in the lvis package, on the same drawn results, as
ratios: `make bench`.

Both get the truth in memory, and each runs in a process of its own, one after the other. The time
is that of the CPU, and the memory is the peak of the resident set above what it was before (Linux;
see `peak` of bench_guided.py)."""

import copy
import ctypes
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
from pycocotools import mask as coco_mask

from common.lvis_ap import lvis_ap

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


def loaded(truth: dict):
    """The package's object of a file with this content."""
    from lvis import LVIS

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(truth))
        return LVIS(str(path))


def package(truth, results: list[dict], kind: str, max_dets: int = 300) -> tuple[list, dict]:
    """The package's 13 numbers and the AP of each class (name ->) in percent, None where it says
    -1. It writes into the results; np.float, which numpy has no more, is there while it runs."""
    from lvis import LVISEval, LVISResults

    with mock.patch.object(np, "float", float, create=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it logs with `warn`
        judge = LVISEval(truth, LVISResults(truth, results, max_dets=max_dets), kind)
        judge.params.max_dets = max_dets
        judge.run()
    stats = [None if x == -1 else 100 * float(x) for x in judge.get_results().values()]
    precision = judge.eval["precision"][..., 0]  # (10, 101, K)
    names = {c["id"]: c["name"] for c in truth.dataset["categories"]}
    return stats, {
        names[c]: None if precision[0, 0, k] == -1 else 100 * float(precision[:, :, k].mean())
        for k, c in enumerate(judge.params.cat_ids)
    }


def measure(which: str, kind: str, *sizes: int) -> dict:
    """In a process of its own: seconds, GiB above what was taken before, and the 13 numbers."""

    def status(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1])

    truth, results = drawn(*sizes)
    results = of_kind(results, kind)
    small, few = drawn(2, 30, 5)
    if which == "package":
        # what is imported on first use
        package(loaded(copy.deepcopy(small)), of_kind(few, kind), kind)
        truth = loaded(truth)
    else:
        lvis_ap(small, of_kind(few, kind), kind)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.process_time()
    if which == "package":
        stats = package(truth, results, kind)[0]
    else:
        stats = lvis_ap(truth, results, kind)["stats"]
    return {
        "seconds": time.process_time() - start,
        "memory": (status("VmHWM") - before) / 2**20,
        "stats": stats,
    }


def main(*sizes: int) -> None:
    print(f"{sizes[0]} images, {sizes[1]} classes, {sizes[2]} detections an image")
    for kind in ("segm", "bbox"):
        measured = {}
        for which in ("package", "ours"):
            command = [sys.executable, __file__, which, kind, *map(str, sizes)]
            done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
            measured[which] = json.loads(done.stdout.splitlines()[-1])
        theirs, ours = measured["package"], measured["ours"]
        pairs = zip(theirs["stats"], ours["stats"], strict=True)
        apart = max((abs(a - b) for a, b in pairs if a is not None), default=0)
        print(
            f"{kind}: lvis {theirs['seconds']:.1f} s, ours {ours['seconds']:.1f} s, ratio "
            f"{theirs['seconds'] / ours['seconds']:.1f}; extra memory lvis "
            f"{theirs['memory']:.2f} GiB, ours {ours['memory']:.3f} GiB, ratio "
            f"{ours['memory'] / theirs['memory']:.3f}; AP {ours['stats'][0]:.3f}, largest "
            f"difference of the 13 numbers {apart:.1g}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] in (["package"], ["ours"]):
        print(json.dumps(measure(*sys.argv[1:3], *map(int, sys.argv[3:]))))
    else:
        main(*(map(int, sys.argv[1:]) if sys.argv[1:] else (2000, 1200, 300)))
