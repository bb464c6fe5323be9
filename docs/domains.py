"""Labels from one domain, unlabeled pictures from another: drawn scenes by day and at dusk, for all
four scripts. docs/domains.md says what for.

    python docs/domains.py plan        every command, as a line of its own
    python docs/domains.py run         draws the scenes and makes what is missing, one after another
    python docs/domains.py table       the tables, of the runs that are there
    python docs/domains.py pictures    scenes of both domains, in docs/figures/domains.png

The labels are always of scenes by day. What was stopped goes on when the same command is given
again. It knows the scripts by their command lines alone, and needs Python's standard library only,
for the pictures Pillow.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HOUSE = Path(__file__).resolve().parent.parent
LABELS = "labels alone"
DAY, DUSK = "unlabeled by day", "unlabeled at dusk"


class Kind(NamedTuple):
    """A script's runs: what each setting adds to its command line, and where its scenes lie."""

    metric: str
    foreign: str  # what --eval needs to find the scenes at dusk, below the root
    settings: dict[str, str]  # name of a setting -> flags; words in braces see `Planned`
    network: dict[str, str]  # the network that a setting is about, in results.json


KINDS = {
    "gta_seg.py": Kind(
        "miou",
        "--dataset folder --root {dusk}/semantic",
        {
            LABELS: "--method suponly",
            DAY: "",
            DUSK: "--unlabeled {dusk}/semantic/images/train",
        },
        {LABELS: "student", DAY: "teacher", DUSK: "teacher"},
    ),
    "gist_rist.py": Kind(
        "miou",
        "--dataset folder --root {dusk}/semantic",
        {
            DAY: "--search gist rist path --path LLL --keep-nodes --store {runs}/nodes",
            DUSK: "--search gist rist --keep-nodes --store {runs}/nodes "
            "--unlabeled {dusk}/semantic/images/train",
        },
        {},
    ),
    "guided_distillation.py": Kind(
        "ap",
        "--dataset coco --root {dusk}/things",
        {
            LABELS: "--split 5% --stage teacher --steps 1600",
            DAY: "--split 5%",
            DUSK: "--split 5% --stage student --teacher {day}/teacher.pt "
            "--unlabeled {dusk}/things/images/train",
        },
        {LABELS: "supervised", DAY: "student", DUSK: "student"},
    ),
    "better_pseudo_labels.py": Kind(
        "ap",
        "--dataset lvis --root {dusk}/tail",
        {
            LABELS: "--stage teacher --teacher-steps 1800",
            DAY: "",
            DUSK: "--stage student --teacher {day}/teacher.pt "
            "--calibration {day}/calibration.json --unlabeled {dusk}/tail/images/train",
        },
        {LABELS: "supervised", DAY: "teacher", DUSK: "teacher"},
    ),
}


class Planned(NamedTuple):
    """A run that is to be made. In its flags {runs}, {dusk} and {day} are the folder of all runs,
    that of the scenes at dusk, and that of the run by day on the same draw."""

    script: str
    setting: str
    draw: int


def plan(options: argparse.Namespace) -> list[Planned]:
    """All runs, script by script and draw by draw; what needs another run comes after it."""
    return [
        Planned(script, setting, draw)
        for script in options.scripts
        for draw in range(options.draws)
        for setting in KINDS[script].settings
    ]


def folder(run: Planned, options: argparse.Namespace) -> Path:
    name = run.setting.replace(" ", "-")
    return options.runs / f"{Path(run.script).stem}-{name}-d{run.draw}"


def filled(text: str, run: Planned, options: argparse.Namespace) -> list[str]:
    day = folder(run._replace(setting=DAY), options)
    dusk = options.root / "dusk"
    return shlex.split(text.format(runs=options.runs, day=day, dusk=dusk))


def training(run: Planned, options: argparse.Namespace) -> list[str]:
    """The command line of a run, without the interpreter."""
    line = [run.script, "--dataset", "shapes", "--root", str(options.root)]
    line += ["--split-seed", str(run.draw), "--workers", "0", "--device", options.device]
    line += filled(KINDS[run.script].settings[run.setting], run, options)
    return [*line, *options.more, "--out", str(folder(run, options)), "--resume"]


def scoring(run: Planned, checkpoint: Path, options: argparse.Namespace) -> list[str]:
    """The command line that scores a checkpoint of a run on the scenes at dusk."""
    where = filled(KINDS[run.script].foreign, run, options)
    line = [run.script, "--eval", str(checkpoint), *where]
    return [*line, "--workers", "0", "--device", options.device]


# ========================================================================================= the runs
def nodes_of(run: Planned, options: argparse.Namespace) -> dict[str, Path]:
    """The checkpoint of each node that a finished run of gist_rist.py visited, by its path."""
    results = json.loads((folder(run, options) / "results.json").read_bytes())
    paths = {path for visited in results["visited"].values() for path in visited}
    nodes = {path: Path(results["nodes"]) / path / "weights.pt" for path in sorted(paths) if path}
    return {"": Path(results["stage0_folder"]) / "weights.pt"} | nodes


def checkpoints_of(run: Planned, options: argparse.Namespace) -> list[Path]:
    """What of a finished run is scored at dusk."""
    if run.script == "gist_rist.py":
        return list(nodes_of(run, options).values())
    return [folder(run, options) / "last.pt"]


def scores_of(checkpoint: Path) -> Path:
    return Path(f"{checkpoint}.results.json")


def make(options: argparse.Namespace) -> None:
    call(["-m", "data.shapes", "--root", str(options.root), "--domain", "dusk"], options)
    for run in plan(options):
        if not (folder(run, options) / "results.json").is_file():
            call(training(run, options), options)
        for checkpoint in checkpoints_of(run, options):
            if not scores_of(checkpoint).is_file():
                call(scoring(run, checkpoint, options), options)


def call(line: list[str], options: argparse.Namespace) -> None:
    """Run a command; leave with its exit code when it fails."""
    print("$", shlex.join(line), flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run([sys.executable, *line], env=environment)
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"{took:.0f} CPU seconds", flush=True)
    if done.returncode:
        sys.exit(done.returncode)


# ======================================================================================= the tables
class Score(NamedTuple):
    """What a network reached on scenes of both domains."""

    day: float
    dusk: float
    ece_day: float | None = None  # calibration error of better_pseudo_labels.py
    ece_dusk: float | None = None


def read(path: Path) -> dict:
    return json.loads(path.read_bytes())


def score(run: Planned, options: argparse.Namespace) -> dict[str, Score]:
    """The rows to which a finished run gives a score."""
    kind = KINDS[run.script]
    results = read(folder(run, options) / "results.json")
    if run.script == "gist_rist.py":
        return scores_of_searches(run, results, options)
    network = kind.network[run.setting]
    by_day = results[network]["last"]
    at_dusk = read(scores_of(folder(run, options) / "last.pt"))[network]["last"]
    ece = [record.get("ece") for record in (by_day, at_dusk)]
    return {run.setting: Score(by_day[kind.metric], at_dusk[kind.metric], *ece)}


def scores_of_searches(
    run: Planned, results: dict, options: argparse.Namespace
) -> dict[str, Score]:
    """Rows of a run of gist_rist.py: what its searches chose by the development images, which are
    scenes by day, and the node that would have been best at dusk."""
    at_dusk = {
        path: read(scores_of(checkpoint))["student"]["last"]["miou"]
        for path, checkpoint in nodes_of(run, options).items()
    }
    rows = {}
    names = {"gist": "GIST", "rist": "RIST"}
    if run.setting == DAY:
        names = {"stage0": "stage 0", "path": LABELS} | names
    for name, title in names.items():
        chosen = results[name]
        if name in ("gist", "rist"):
            title = f"{title}, {run.setting}"
        rows[title] = Score(chosen["miou"], at_dusk[chosen["path"]])
    searched = {path for name in ("gist", "rist") for path in results["visited"][name]}
    best = max(searched | {""}, key=lambda path: at_dusk[path])
    rows[f"best node at dusk, {run.setting}"] = Score(float("nan"), at_dusk[best])
    return rows


def table(script: str, options: argparse.Namespace) -> str:
    """Markdown: a row for each setting, its scores in both domains, and the differences to the
    labels alone, paired by draw, with their sample standard deviation."""
    rows: dict[str, dict[int, Score]] = {}
    for run in plan(options):
        if run.script != script or not (folder(run, options) / "results.json").is_file():
            continue
        if all(scores_of(checkpoint).is_file() for checkpoint in checkpoints_of(run, options)):
            for row, found in score(run, options).items():
                rows.setdefault(row, {})[run.draw] = found
    lines = [
        f"| `{script}`, {KINDS[script].metric} | by day (draws) | difference | at dusk (draws) | "
        f"difference | ECE by day, at dusk |",
        "|---|---|---|---|---|---|",
    ]
    for row, draws in rows.items():
        cells = [row]
        for domain in ("day", "dusk"):
            values = {draw: getattr(found, domain) for draw, found in draws.items()}
            base = {draw: getattr(s, domain) for draw, s in rows.get(LABELS, {}).items()}
            cells += [mean(list(values.values())), difference(values, base, row == LABELS)]
        errors = []
        for name in ("ece_day", "ece_dusk"):
            known = [getattr(s, name) for s in draws.values() if getattr(s, name) is not None]
            if known:
                errors.append(f"{statistics.mean(known):.3f}")
        cells.append(", ".join(errors))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> str:
    if any(value != value for value in values):  # not known
        return ""
    return f"{statistics.mean(values):.2f} ({', '.join(f'{value:.1f}' for value in values)})"


def difference(values: dict[int, float], base: dict[int, float], is_base: bool) -> str:
    gains = [value - base[draw] for draw, value in values.items() if draw in base]
    if is_base or not gains or any(gain != gain for gain in gains):
        return ""
    if len(gains) == 1:
        return f"{gains[0]:+.2f}"
    return f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}"


# ===================================================================================== the pictures
def draw_pictures(options: argparse.Namespace, count: int = 6) -> None:
    """A row for each set of each domain: its first scenes."""
    from PIL import Image

    rows = []
    for name, day in (("semantic", "voc/JPEGImages"), ("things", ""), ("tail", "")):
        for folder_of_set in (day or f"{name}/images/train", f"dusk/{name}/images/train"):
            rows.append(sorted((options.root / folder_of_set).glob("*.jpg"))[:count])
    side = 96
    sheet = Image.new("RGB", (count * side, len(rows) * side))
    for y, row in enumerate(rows):
        for x, file in enumerate(row):
            with Image.open(file) as picture:
                sheet.paste(picture.resize((side, side)), (x * side, y * side))
    sheet.quantize(256).save(HOUSE / "docs" / "figures" / "domains.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["plan", "run", "table", "pictures"])
    parser.add_argument("--root", type=Path, default=Path("datasets/shapes"))
    parser.add_argument("--runs", type=Path, default=Path("runs/domains"))
    parser.add_argument("--draws", type=int, default=3, help="draws of the labels")
    parser.add_argument("--scripts", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--more", type=shlex.split, default=[], help="flags for every run")
    options = parser.parse_args()
    os.chdir(HOUSE)  # relative paths are below it, as in the commands that `plan` prints
    if options.what == "plan":
        for run in plan(options):
            print("python", shlex.join(training(run, options)))
        return
    if options.what == "pictures":
        draw_pictures(options)
        return
    if options.what == "run":
        make(options)
    print("\n\n".join(table(script, options) for script in options.scripts))


if __name__ == "__main__":
    main()
