"""What it costs to read annotations, of a file drawn like COCO's train set, which has 118,287
pictures and 860,001 objects: through the one door of common/coco.py; with json.load alone; and as
it was read before, with Python's json and a hook that makes annotations small. These two check
nothing. Ratios: `make bench`.

Each way runs in a process of its own, three times, in turns; medians count. The time is that of
the CPU until the content is there, and the memory the peak of the resident set (Linux) above that
before. The file has 200,000 objects, or as many as ANNOTATIONS says."""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROUNDS = 3


def draw(path: Path, number: int, seed: int = 0) -> None:
    """Polygons of 6 to 60 points about as large as COCO's, a box, an area, and one crowd in 100 as
    run lengths."""
    g = np.random.default_rng(seed)
    pictures = max(number * 118287 // 860001, 1)
    records = [
        {"id": 3 * i + 9, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640}
        for i in range(pictures)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    head = json.dumps({"images": records, "categories": categories})[:-1]
    with open(path, "w") as file:
        file.write(head + ', "annotations": [')
        for i in range(number):
            turn = np.linspace(0, 2 * np.pi, 1 + int(g.choice([6, 12, 20, 30, 60])))[:-1]
            radius = np.exp(g.uniform(1.5, 4.5))
            x, y = g.uniform(100, (540, 380))
            points = np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=1)
            points = points.clip(0, (639, 479)).round(2)
            annotation = {
                "segmentation": [points.ravel().tolist()],
                "area": round(3.1 * radius**2, 4),
                "iscrowd": int(i % 100 == 0),
                "image_id": 3 * int(g.integers(pictures)) + 9,
                "bbox": [round(v, 2) for v in (x - radius, y - radius, 2 * radius, 2 * radius)],
                "category_id": int(g.integers(1, 81)),
                "id": i + 1,
            }
            if annotation["iscrowd"]:
                counts = [1000 + i % 99, *([7, 473] * 40)]
                counts.append(480 * 640 - sum(counts))
                annotation["segmentation"] = {"size": [480, 640], "counts": counts}
            file.write((", " if i else "") + json.dumps(annotation))
        file.write("]}")


def by_json(path: Path) -> dict[int, list]:
    """As it was done before, but with the boxes, which are kept since: polygons as arrays, run
    lengths packed, nothing checked."""
    from pycocotools import mask

    def lean(record: dict):
        if "segmentation" not in record:
            return record
        outline = record["segmentation"]
        if isinstance(outline, dict):
            outline = mask.frPyObjects(outline, *outline["size"])
        else:
            outline = [np.array(numbers, np.float64) for numbers in outline]
        facts = (record["image_id"], record["category_id"], outline)
        box = tuple(record["bbox"])
        return (*facts, bool(record.get("iscrowd")), float(record.get("area", 0)), box)

    with open(path, encoding="utf-8") as file:
        content = json.load(file, object_hook=lean)
    things = {record["id"]: [] for record in content["images"]}
    for image, *facts in content["annotations"]:
        things[image].append(tuple(facts))
    return things


def by_json_alone(path: Path) -> dict[int, list]:
    """As pycocotools reads it: dictionaries, by image."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    things = {record["id"]: [] for record in content["images"]}
    for annotation in content["annotations"]:
        things[annotation["image_id"]].append(annotation)
    return things


def by_door(path: Path) -> dict[int, list]:
    from common.coco import read_content

    return read_content(path).things


WAYS = {"json.load": by_json_alone, "json": by_json, "the door": by_door}


def measure(way: str, path: Path) -> None:
    """In a process of its own: prints the seconds, the GiB at the peak, and how many objects."""
    import pycocotools.mask  # noqa: F401 (loaded before, by both)

    import common.coco  # noqa: F401

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    things = WAYS[way](path)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    number = sum(map(len, things.values()))
    print(json.dumps({"seconds": seconds, "gib": peak / 2**20, "objects": number}))


def main() -> None:
    number = int(os.environ.get("ANNOTATIONS", 200_000))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "instances_train2017.json")
        draw(path, number)
        print(f"{number} annotations, {path.stat().st_size / 2**20:.0f} MiB")
        found = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                command = [sys.executable, "-m", "tests.bench_annotations", way, str(path)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
    assert {round["objects"] for rounds in found.values() for round in rounds} == {number}
    for way in WAYS:
        print(
            f"{way:9s} {median(found[way], 'seconds'):6.1f} s of CPU, "
            f"{median(found[way], 'gib'):.2f} GiB at the peak"
        )
    for other in ("json.load", "json"):
        time_ratio, memory_ratio = (
            median(found["the door"], what) / median(found[other], what)
            for what in ("seconds", "gib")
        )
        print(
            f"the door takes {time_ratio:.2f} of the time of {other}, "
            f"and {memory_ratio:.2f} of its memory"
        )


def median(rounds: list[dict], what: str) -> float:
    return statistics.median(round[what] for round in rounds)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
