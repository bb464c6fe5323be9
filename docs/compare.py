"""Compare finished runs: a table of the last scores paired by label draw, and a strip of their
predictions.

    python docs/compare.py runs/suponly-d* runs/gta-d*      the first method named is the baseline
    python docs/compare.py runs/suponly-d0 runs/gta-d0 --strip strip.png
                                                            pictures: image, each method, label

Runs of one method and setting form a row: settings that differ from the baseline's name it. A
difference is taken between runs on the same label draw and seed, and its spread is the sample
standard deviation over the draws."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))


BOOKKEEPING = {
    "out",
    "resume",
    "seed",
    "split_seed",
    "workers",
    "device",
    "log_every",
    "save_every",
    "eval_every",
    "monitor_labels",
    "compile",
    "eval",
    "predict",
}


def read_run(folder: Path, metric: str = "miou") -> dict:
    """Settings and results of a finished run."""
    missing = [name for name in ("config.json", "results.json") if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"{folder} is no finished run: it has no {missing[0]}; finish it, or leave it out."
        )
    try:
        config, results = (
            json.loads((folder / name).read_bytes()) for name in ("config.json", "results.json")
        )
        network = "teacher" if "teacher" in results else "student"
        settings = [config["settings"][name] for name in ("method", "recipe", "split_seed", "seed")]
        known = [type(value) for value in settings] == [str, str, int, int]
        number = [results[network][which][metric] for which in ("last", "best")]
        if not known or not all(isinstance(value, (int, float)) for value in number):
            raise ValueError(f"no method, recipe or seed, or no number as {metric}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise SystemExit(
            f"{folder}: its config.json or results.json is damaged ({error}); run it again, or "
            f"leave it out."
        ) from None
    return {
        "folder": folder,
        "settings": config["settings"],
        "results": results,
        "network": network,
    }


def last(run: dict, metric: str) -> float:
    """The last score of the run's network."""
    return run["results"][run["network"]]["last"][metric]


def label(settings: dict, base: dict) -> str:
    """What tells a row from the baseline: method, recipe and every other setting that differs."""
    words = [settings["method"]]
    if settings["recipe"] != "paper":
        words.append(settings["recipe"])
    for name, value in settings.items():
        if name not in BOOKKEEPING | {"method", "recipe"} and value != base.get(name):
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(words)


def table(runs: list[dict], metric: str = "miou") -> str:
    """Markdown: a row for each setting, with the mean, the single scores, and the paired difference
    to the first row with its spread."""
    base = runs[0]["settings"]
    rows: dict[str, dict] = {}  # setting -> (label draw, seed) -> run
    for run in runs:
        place = (run["settings"]["split_seed"], run["settings"]["seed"])
        rows.setdefault(label(run["settings"], base), {})[place] = run
    first = next(iter(rows.values()))
    lines = [
        f"| setting | scored | {metric} last, mean (draws) | difference to the first row, "
        f"mean ± spread | wins | best |",
        "|---|---|---|---|---|---|",
    ]
    for name, draws in rows.items():
        scores = [last(draws[place], metric) for place in sorted(draws)]
        best = [run["results"][run["network"]]["best"][metric] for run in draws.values()]
        difference = wins = ""
        if draws is not first:
            both = [place for place in draws if place in first]
            gains = [last(draws[place], metric) - last(first[place], metric) for place in both]
            difference = mean_and_spread(gains)
            wins = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
        network = next(iter(draws.values()))["network"]
        each = ", ".join(f"{score:.1f}" for score in scores)
        lines.append(
            f"| {name} | {network} | {statistics.mean(scores):.2f} ({each}) | {difference} | "
            f"{wins} | {statistics.mean(best):.2f} |"
        )
    return "\n".join(lines)


def mean_and_spread(values: list[float]) -> str:
    """The mean with its sign, and the sample standard deviation where there are two or more."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    return f"{statistics.mean(values):+.2f} ± {statistics.stdev(values):.2f}"


def strip(runs: list[dict], path: Path, count: int = 8) -> None:
    """Rows of image, each run's prediction, label, on the first images of the runs' scored set
    (Figs. 3 and 4). The predictions are those of `gta_seg.py --predict`."""
    import numpy as np
    import torch
    from PIL import Image

    from common import plots, semantic

    settings = runs[0]["settings"]
    root = Path(settings["root"])
    if settings["dataset"] == "shapes":
        root = root / "voc"
    data = semantic.find(settings["dataset"], root, settings["val"])
    pictures = data.val[:count]
    for run in runs:
        command = [sys.executable, str(HOUSE / "gta_seg.py"), "--predict"]
        command.append(str(run["folder"] / "last.pt"))
        command += [str(picture.image) for picture in pictures]
        subprocess.run(command, check=True)
    rows = []
    for picture in pictures:
        image, truth = semantic.load_picture(picture, data)
        row = [image.permute(1, 2, 0).numpy()]
        for run in runs:
            folder = run["folder"] / "last.pt.predictions" / "labels"
            with Image.open(folder / f"{picture.image.stem}.png") as file:
                row.append(plots.colour(torch.from_numpy(np.array(file))))
        row.append(plots.colour(truth))
        rows.append(row)
    names = [label(run["settings"], settings).split(" --")[0] for run in runs]
    plots.strip(rows, ["image", *names, "label"], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run folders; the first one's setting is the baseline"
    )
    parser.add_argument("--metric", default="miou")
    parser.add_argument(
        "--strip", type=Path, help="write a sheet of predictions of these runs here"
    )
    options = parser.parse_args()
    runs = [read_run(folder, options.metric) for folder in options.runs]
    print(table(runs, options.metric))
    if options.strip:
        strip(runs, options.strip)
        print(
            f"\npictures: {options.strip} and " + ", ".join(f"{r['folder']}/previews" for r in runs)
        )


if __name__ == "__main__":
    main()
