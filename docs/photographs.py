"""What the papers claim, tried on photographs: the list of runs, a queue that trains them, and the
tables that come out of their logs. docs/photographs.md says what was found.

    python docs/photographs.py plan                 every run of the page, as a line of its own
    python docs/photographs.py run --at-most 2      train what is missing, group A first
    python docs/photographs.py pack                 the logs of finished runs into one file
    python docs/photographs.py tables --write       the tables of docs/photographs.md, from it

A queue that was stopped goes on when the same command is given again: runs resume, and what is
finished, here or in the file of logs, is skipped. It knows the scripts by their command lines
alone, and needs Python's standard library only. Beside its runs, a file named `pause` makes the
runs save and leave until it is removed; a file named `hold` makes them wait where they are.
"""

import argparse
import fcntl
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

HOUSE = Path(__file__).resolve().parent.parent
PAGE = HOUSE / "docs" / "photographs.md"
PACK = HOUSE / "docs" / "logs" / "photographs.tar.xz"
# What is packed of a run, never its weights.
PACKED = ("config.json", "log.jsonl", "results.json", "last.pt.results.json", "report.md")
GROUPS = ("study", "A", "B", "C")
SCRIPTS = ("gta_seg.py", "gist_rist.py", "guided_distillation.py", "better_pseudo_labels.py")


# ==================================================================================== list of runs
class Row(NamedTuple):
    """A method with its settings: one run for each draw of the labeled pictures. The same method at
    the same rate on the same draw is one run, whichever groups ask for it."""

    group: str  # one of GROUPS
    script: str
    method: str
    rate: str  # --lr
    flags: str  # of the script, but for --lr, --split-seed, --device, --out and --resume
    draws: tuple[int, ...] = (0, 1, 2)
    teacher: str = ""  # the row whose network on the same draw is given as --teacher, made before


class Claim(NamedTuple):
    """What a paper says: on every draw, one score is larger than another."""

    script: str
    text: str
    larger: tuple[str, str]  # the method of a row, and a score of its runs
    smaller: tuple[str, str]


class Planned(NamedTuple):
    """A run that is to be made."""

    name: str  # of its folder
    row: Row
    draw: int


# Words in braces are flags of this program, see `main`. Training is scored on the tuning pictures;
# when a run has ended, its last networks are scored once on those of SCORED.
SEMANTIC = "--dataset folder --root {semantic} --precision fp32 --workers 0"
OBJECTS = (
    "--dataset coco --root {objects} --train-json {objects}/annotations/train.json "
    "--val-json {objects}/annotations/tune.json --precision fp32 --workers 0"
)
TEST_OBJECTS = "--val-json {objects}/annotations/test.json"
SCORED = {
    "gta_seg.py": "--val test",
    "guided_distillation.py": TEST_OBJECTS,
    "better_pseudo_labels.py": TEST_OBJECTS,
}
LITE0 = "--backbone tf_efficientnet_lite0 --weights {weights}/tf_efficientnet_lite0_imagenet.pth"

# Rates are chosen at half of the length. Half of a run is warm-up.
WHOLE, HALF = "--steps 3000 --eval-every 500", "--steps 1500 --eval-every 250"
WARM_WHOLE, WARM_HALF, WARM_SHORT = (f"--warmup-epochs {n}" for n in (17.5, 8.75, 6))
GTA = (
    f"{SEMANTIC} --val val {LITE0} --output-stride 16 --aspp-rates 2 4 6 --width 48 "
    f"--crop-size 129 --batch-size 4 --cutmix-labeled 0.5"
)
LABELS = f"{GTA} {WHOLE} --split random:23 --method suponly"
BOTH = f"{GTA} {WHOLE} --split random:23 {WARM_WHOLE} --monitor-labels"
GTA_METHODS = {
    "suponly": LABELS,
    "mt": f"{BOTH} --method mt",
    "gta": f"{BOTH} --method gta",
}
# What the study changes in the baseline: a text of its flags -> another. Methods can show their
# gain only with a network that is clearly better with many labels than with few.
STRIDE_16 = "--output-stride 16 --aspp-rates 2 4 6"
STRIDE_8 = "--output-stride 8 --aspp-rates 4 8 12"
SUPONLY_VARIANTS = {
    "no CutMix": {"--cutmix-labeled 0.5 ": ""},
    "twice as long": {WHOLE: "--steps 6000 --eval-every 1000"},
    "half, 8 labels": {WHOLE: HALF, "random:23": "random:8"},
    "half, all labels": {WHOLE: HALF, "random:23": "all"},
    "half, stride 8": {WHOLE: HALF, STRIDE_16: STRIDE_8},
    "half, stride 8, all labels": {WHOLE: HALF, STRIDE_16: STRIDE_8, "random:23": "all"},
}

# Other rows of the paper's tables, each at the rate of the method that it varies.
GTA_VARIANTS = {
    "mt, CutMix": ("mt", f"{BOTH} --method mt --cutmix 0.5"),
    "gta, transfer all": ("gta", f"{BOTH} --method gta --transfer all"),
    "gta, no re-weighting": ("gta", f"{BOTH} --method gta --reweight none"),
    "gta, ramps": ("gta", f"{BOTH} --method gta --ramp-gta --ramp-teacher"),
    "gta, released": ("gta", f"{BOTH} --method gta --recipe released"),
    "unbiased-st": ("gta", f"{BOTH} --method unbiased-st"),
}

# The runs of one draw share the nodes in their store. Settings are chosen on 50 labeled training
# pictures, which the script holds apart (--dev-size), so it may score its nodes on `test` at once.
GIST = (
    f"{SEMANTIC} --val test --val-every-stage --split random:23 {LITE0} --pixels imagenet --cut 1 "
    f"--output-stride 8 --aspp-rates 2 4 6 8 --crop-size 128 128 --scale 0.5 2 --batch-size 4 "
    f"--stage0-steps 900 --eval-every 150 --steps 300 --stages 3 --cl-on active --phi 0.2 "
    f"--store {{runs}}/nodes"
)
GIST_METHODS = {
    "labels only": f"{GIST} --search path --path LLL",
    "searches": f"{GIST} --search gist rist path --trials 5 --path LLL PPP",
    "FIST, batch-wise": f"{GIST} --search fist batchwise --alpha 0.25 0.75",
    "searches from ClassMix": (
        f"{GIST} --stage0 classmix --search gist rist path --trials 5 --path LLL PPP"
    ),
}

# Supervised training has as many steps as the teacher and its student together.
FEW_OBJECTS = f"{OBJECTS} {LITE0} --split random:80 --batch-size 4"
GUIDED = (
    f"{FEW_OBJECTS} --norm live --width 64 --encoder-layers 2 --decoder-layers 3 --queries 40 "
    f"--points 1024 --crop-size 160 160 --scale 0.5 1.5 --test-size 160 256 --backbone-lr 0.3 "
    f"--schedule poly --ema 0.99 --eval-every 250"
)
STUDENT = f"{GUIDED} --stage student --steps 1000 --burn-in-steps 300"
GUIDED_METHODS = {
    "supervised": f"{GUIDED} --stage teacher --steps 2000",
    "teacher": f"{GUIDED} --stage teacher --steps 1000",
    "guided": f"{STUDENT} --burn-in guided",
    "standard": f"{STUDENT} --burn-in standard",
}
GUIDED_VARIANTS = {
    "no burn-in": f"{STUDENT} --burn-in none",
    "fixed": f"{STUDENT} --burn-in fixed",
    "guided, lambda 1": f"{STUDENT} --burn-in guided --lambda-u 1",
    "guided, lambda 4": f"{STUDENT} --burn-in guided --lambda-u 4",
    "guided, same view": f"{STUDENT} --burn-in guided --strong-aug same",
}
# These students have no trained teacher.
UNTAUGHT = ("standard", "no burn-in")

BETTER = (
    f"{FEW_OBJECTS} --frequency subset --image-size 160 --width 48 --fc 96 --head-convs 1 "
    f"--anchor-scale 6 --proposals 150 --rpn-batch 128 --roi-batch 48 --federated 0 "
    f"--layer-decay 0.3 --weight-decay 0.05 --warmup 0.05 --scale 0.7 1.4 "
    f"--teacher-batch-size 4 --ema 0.99 --eval-every 250"
)
BETTER_STUDENT = f"{BETTER} --stage student --steps 1000"
BETTER_METHODS = {
    "supervised": f"{BETTER} --stage teacher --teacher-steps 2000",
    "teacher": f"{BETTER} --stage teacher --teacher-steps 1000",
    "one-hot": f"{BETTER_STUDENT} --pseudo onehot",
    "soft": f"{BETTER_STUDENT} --pseudo soft",
    # Its calibration trains one more teacher, without the labels that are held out for it.
    "calibrated": f"{BETTER} --stage all --teacher-steps 1000 --steps 1000 --pseudo calibrated",
}
BETTER_VARIANTS = {
    f"smoothing {way}": f"{BETTER} --stage teacher --teacher-steps 2000 --smoothing {way}"
    for way in ("none", "uniform", "similarity")
}

# The rates of --lr that are tried on draw 0, and those that the table "rates" chooses. Until all
# three are there it is the first. What is not listed has the rate of its script's baseline.
RATES = {
    "gta_seg.py": ("0.01", "0.003", "0.03"),
    "gist_rist.py": ("0.0001", "0.0003", "0.00003"),
    "guided_distillation.py": ("0.001", "0.003", "0.0003"),
    "better_pseudo_labels.py": ("0.001", "0.003", "0.0003"),
}
BEST_RATE = {
    ("gta_seg.py", "suponly"): "0.01",
    ("gta_seg.py", "mt"): "0.01",
    ("gta_seg.py", "gta"): "0.01",
    ("gist_rist.py", "labels only"): "0.0001",
    ("guided_distillation.py", "supervised"): "0.001",
    ("better_pseudo_labels.py", "supervised"): "0.001",
}


def rows() -> list[Row]:
    """All rows of the page."""
    return [
        *rows_of_gta(),
        *rows_of_gist(),
        *rows_of_objects("guided_distillation.py", GUIDED_METHODS, GUIDED_VARIANTS),
        *rows_of_objects("better_pseudo_labels.py", BETTER_METHODS, BETTER_VARIANTS),
    ]


def rows_of_gta() -> list[Row]:
    script = "gta_seg.py"
    best = {method: BEST_RATE[script, method] for method in GTA_METHODS}
    found = []
    for method, flags in GTA_METHODS.items():
        half = flags.replace(WHOLE, HALF).replace(WARM_WHOLE, WARM_HALF)
        for rate in RATES[script]:
            found.append(Row("study", script, f"{method}, half", rate, half, (0,)))
    for method in ("mt", "gta"):
        short = GTA_METHODS[method].replace(WHOLE, HALF).replace(WARM_WHOLE, WARM_SHORT)
        name = f"{method}, half, short warm-up"
        found.append(Row("study", script, name, best[method], short, (0,)))
    for name, changes in SUPONLY_VARIANTS.items():
        flags = LABELS
        for old, new in changes.items():
            flags = flags.replace(old, new)
        found.append(Row("study", script, f"suponly, {name}", best["suponly"], flags, (0,)))
    for method, flags in GTA_METHODS.items():
        found.append(Row("A", script, method, best[method], flags))
    every_label = LABELS.replace("random:23", "all")
    found.append(Row("A", script, "suponly, all labels", best["suponly"], every_label, (0,)))
    for method, flags in GTA_METHODS.items():
        more = flags.replace("random:23", "random:92")
        found.append(Row("B", script, f"{method}, 92 labels", best[method], more))
    for name, (method, flags) in GTA_VARIANTS.items():
        found.append(Row("C", script, name, best[method], flags))
    return found


def rows_of_gist() -> list[Row]:
    script = "gist_rist.py"
    best = BEST_RATE[script, "labels only"]
    found = []
    for rate in RATES[script]:
        flags = GIST_METHODS["labels only"]
        found.append(Row("study", script, "labels only", rate, flags, (0,)))
    found.append(Row("A", script, "searches", best, GIST_METHODS["searches"]))
    more = GIST_METHODS["searches"].replace("random:23", "random:92")
    found.append(Row("B", script, "searches, 92 labels", best, more))
    for method in ("FIST, batch-wise", "searches from ClassMix"):
        found.append(Row("C", script, method, best, GIST_METHODS[method]))
    return found


def rows_of_objects(script: str, methods: dict[str, str], variants: dict[str, str]) -> list[Row]:
    """The rows of a script for objects: its methods with 80 labels and with 20, and variants."""
    best = BEST_RATE[script, "supervised"]
    found = []
    for rate in RATES[script]:
        found.append(Row("study", script, "supervised", rate, methods["supervised"], (0,)))
    for method, flags in methods.items():
        found.append(Row("A", script, method, best, flags, teacher=taught_by(method, flags)))
    every_label = methods["supervised"].replace("random:80", "all")
    found.append(Row("A", script, "supervised, all labels", best, every_label, (0,)))
    for method, flags in methods.items():
        few = flags.replace("random:80", "random:20")
        teacher = taught_by(method, flags)
        if teacher:
            teacher += ", 20 labels"
        found.append(Row("B", script, f"{method}, 20 labels", best, few, teacher=teacher))
    for name, flags in variants.items():
        found.append(Row("C", script, name, best, flags, teacher=taught_by(name, flags)))
    return found


def taught_by(method: str, flags: str) -> str:
    """The row that trains the teacher of a method, if a trained one is handed to it."""
    is_student = "--stage teacher" not in flags
    return "teacher" if is_student and method not in UNTAUGHT else ""


ROWS = rows()

CLAIMS = [
    Claim("gta_seg.py", "gta > mt", ("gta", "teacher"), ("mt", "teacher")),
    Claim("gta_seg.py", "mt > suponly", ("mt", "teacher"), ("suponly", "student")),
    Claim("gta_seg.py", "gta > suponly", ("gta", "teacher"), ("suponly", "student")),
    Claim("gta_seg.py", "teacher > student", ("gta", "teacher"), ("gta", "student")),
    Claim("gta_seg.py", "student > assistant", ("gta", "student"), ("gta", "gta")),
    Claim("gta_seg.py", "features > all", ("gta", "teacher"), ("gta, transfer all", "teacher")),
    Claim(
        "gta_seg.py",
        "92 labels: gta > suponly",
        ("gta, 92 labels", "teacher"),
        ("suponly, 92 labels", "student"),
    ),
    Claim("gist_rist.py", "GIST > labels only", ("searches", "gist"), ("searches", "LLL")),
    Claim("gist_rist.py", "RIST > labels only", ("searches", "rist"), ("searches", "LLL")),
    Claim("gist_rist.py", "stage 0 > after PPP", ("searches", "stage0"), ("searches", "PPP, last")),
    *(
        Claim("guided_distillation.py", f"guided > {other}", ("guided", "student"), (other, name))
        for other, name in (
            ("supervised", "supervised"),
            ("standard", "student"),
            ("no burn-in", "student"),
            ("fixed", "student"),
        )
    ),
    *(
        Claim("better_pseudo_labels.py", f"{one} > {other}", (one, "teacher"), (other, name))
        for one, other, name in (
            ("soft", "supervised", "supervised"),
            ("soft", "one-hot", "teacher"),
            ("calibrated", "soft", "teacher"),
        )
    ),
]


def plan(groups: tuple[str, ...]) -> list[Planned]:
    """The runs of these groups, a group after the other, and in it a script after the other. The
    rows of a script come draw by draw, so that a method and its baseline run together."""
    runs: dict[str, Planned] = {}
    for group in groups:
        for script in dict.fromkeys(row.script for row in ROWS):
            chosen = rows_of(group, script)
            for draw in sorted({draw for row in chosen for draw in row.draws}):
                for row in chosen:
                    name = folder_name(row, draw)
                    if draw in row.draws and name not in runs:
                        runs[name] = Planned(name, row, draw)
    return list(runs.values())


def rows_of(group: str, script: str) -> list[Row]:
    return [row for row in ROWS if (row.group, row.script) == (group, script)]


def folder_name(row: Row, draw: int) -> str:
    method = row.method.replace(",", "").replace(" ", "-")
    return f"{Path(row.script).stem}-{method}-{row.rate}-d{draw}"


def training(run: Planned, options: argparse.Namespace) -> list[str]:
    """The command line that trains a run, without the interpreter."""
    flags = run.row.flags.format(**vars(options)).split()
    flags += ["--lr", run.row.rate, "--split-seed", str(run.draw), "--device", options.device]
    if run.row.teacher:
        flags += ["--teacher", str(options.runs / teacher_of(run) / "teacher.pt")]
    return [run.row.script, *flags, "--out", str(options.runs / run.name)]


def teacher_of(run: Planned) -> str:
    """The name of the run that trains the teacher of a run, or nothing."""
    for row in ROWS:
        if (row.script, row.method) == (run.row.script, run.row.teacher):
            return folder_name(row, run.draw)
    return ""


def scoring(run: Planned, options: argparse.Namespace) -> list[str]:
    """The command line that scores a trained run on the pictures that no setting was chosen on."""
    checkpoint = str(options.runs / run.name / "last.pt")
    scored = SCORED[run.row.script].format(**vars(options)).split()
    return [run.row.script, "--eval", checkpoint, *scored, "--device", options.device]


def next_command(run: Planned, options: argparse.Namespace) -> list[str] | None:
    """What is to be done next for a run, None when nothing is."""
    folder = options.folder / run.name
    if not (folder / "results.json").is_file():
        return [*training(run, options), "--resume"]
    if run.row.script in SCORED and not (folder / "last.pt.results.json").is_file():
        return scoring(run, options)
    return None


def finished(run: Planned, options: argparse.Namespace) -> bool:
    return next_command(run, options) is None


# ======================================================================================= the queue
class Working(NamedTuple):
    """A run that is being made, and the command that makes it."""

    run: Planned
    line: list[str]


class Queue:
    """Trains runs, at most so many at a time, until none is left or the queue is told to stop."""

    def __init__(self, waiting: list[Planned], options: argparse.Namespace):
        self.waiting = waiting
        self.options = options
        self.running: dict[subprocess.Popen, Working] = {}
        self.failed: list[str] = []
        self.stopping = False  # this program was told to stop
        self.leaving = False  # the runs were told to save and leave
        self.held = False  # the runs stand still

    def work(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        while self.running or (self.waiting and not self.stopping):
            paused = (self.options.folder / "pause").exists()
            self.hold((self.options.folder / "hold").exists() and not paused and not self.stopping)
            if paused or self.stopping:
                self.tell_to_leave()
            self.collect()
            if not (self.held or paused or self.stopping):
                self.start()
            time.sleep(self.options.poll)

    def stop(self, number: int, frame: object) -> None:
        self.stopping = True

    def start(self) -> None:
        """Fill the free places."""
        ready = [run for run in self.waiting if self.is_taught(run)]
        if self.waiting and not ready and not self.running:
            self.give_up()
        for run in ready[: self.options.at_most - len(self.running)]:
            self.waiting.remove(run)
            line = next_command(run, self.options)
            say(f"starts {run.name}: {'scores' if '--eval' in line else 'trains'}")
            with open(self.options.folder / f"{run.name}.out", "a") as output:
                # A session of its own, so that Ctrl-C here does not reach it a second time.
                process = subprocess.Popen(
                    [*shlex.split(self.options.before), self.options.python, *line],
                    cwd=self.options.house,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={"OMP_NUM_THREADS": "1"} | os.environ,
                    start_new_session=True,
                )
            self.running[process] = Working(run, line)

    def is_taught(self, run: Planned) -> bool:
        """Whether the teacher of a run is trained to its end, if the run has one. (teacher.pt is
        there from its first score on.)"""
        teacher = teacher_of(run)
        return not teacher or (self.options.folder / teacher / "results.json").is_file()

    def give_up(self) -> None:
        """The runs that still wait have no teacher, because the run that trains it has failed."""
        for run in self.waiting:
            say(f"FAILED {run.name}, which needs {teacher_of(run)}")
            self.failed.append(run.name)
        self.waiting.clear()

    def collect(self) -> None:
        """Take the runs that have ended off the list. One that has more to do waits again, before
        all others."""
        for process, (run, line) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[process]
            following = next_command(run, self.options)
            if following is None:
                say(f"finished {run.name}")
                write_pack(self.options)
            elif self.leaving or following != line:
                say(f"{run.name} has more to do")
                self.waiting.insert(0, run)
            else:
                say(f"FAILED {run.name}, see {self.options.folder / run.name}.out")
                self.failed.append(run.name)
        if not self.running:
            self.leaving = False

    def tell_to_leave(self) -> None:
        if self.running and not self.leaving:
            self.leaving = True
            self.send(signal.SIGTERM)

    def hold(self, still: bool) -> None:
        if still != self.held:
            self.held = still
            say("holds" if still else "goes on")
            self.send(signal.SIGSTOP if still else signal.SIGCONT)

    def send(self, number: signal.Signals) -> None:
        for process in self.running:
            process.send_signal(number)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def train(options: argparse.Namespace) -> int:
    """Train what is neither finished here nor in the pack; the exit status."""
    options.folder.mkdir(parents=True, exist_ok=True)
    with open(options.folder / ".queue", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(
                f"Another queue is at work in {options.folder}; wait for it."
            ) from None
        waiting = missing(options)
        say(f"{len(waiting)} runs to make")
        queue = Queue(waiting, options)
        queue.work()
    if queue.failed:
        say(f"{len(queue.failed)} runs failed: {', '.join(queue.failed)}")
    return 1 if queue.failed else 0


def missing(options: argparse.Namespace) -> list[Planned]:
    """The runs that were asked for and are neither finished here nor in the pack, and those that
    train their teachers. Weights are not packed, so a teacher whose folder is gone is made anew."""
    packed = read_pack(options.pack)
    asked = {
        run.name
        for run in plan(options.groups)
        if fits(run.name, options.only) and run.name not in packed
    }
    unfinished = [run for run in plan(GROUPS) if not finished(run, options)]
    teachers = {teacher_of(run) for run in unfinished if run.name in asked}
    return [run for run in unfinished if run.name in asked | teachers]


def fits(name: str, words: list[str]) -> bool:
    """Whether a name holds one of the words, if there are any."""
    return not words or any(word in name for word in words)


# ======================================================================================== the pack
Log = dict[str, str]  # name of a file of a run -> its text


def read_pack(path: Path) -> dict[str, Log]:
    """The logs of all runs in the pack, by the run's name."""
    logs: dict[str, Log] = {}
    if path.is_file():
        with tarfile.open(path) as archive:
            for member in archive:
                run, file = member.name.split("/")
                logs.setdefault(run, {})[file] = archive.extractfile(member).read().decode()
    return logs


def write_pack(options: argparse.Namespace) -> None:
    """Add the finished runs of the plan to the pack. What is in it from elsewhere stays, and the
    same logs give the same bytes."""
    logs = read_pack(options.pack)
    for run in plan(GROUPS):
        folder = options.folder / run.name
        if folder.is_dir() and finished(run, options):
            files = [folder / file for file in PACKED if (folder / file).is_file()]
            logs[run.name] = {file.name: file.read_text() for file in files}
    options.pack.parent.mkdir(parents=True, exist_ok=True)
    new = options.pack.with_suffix(".tmp")
    with tarfile.open(new, "w:xz", preset=9) as archive:
        for run in sorted(logs):
            for file, text in sorted(logs[run].items()):
                content = text.encode()
                member = tarfile.TarInfo(f"{run}/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    new.replace(options.pack)


# ====================================================================================== the tables
def scores(log: Log) -> dict[str, float]:
    """The scores of a finished run by the network's name, on the scored pictures."""
    script = json.loads(log["config.json"])["script"]
    if script == "gist_rist.py":
        return scores_of_search(json.loads(log["results.json"]), nodes(log["report.md"]))
    return last_scores(json.loads(log["last.pt.results.json"]))


def last_scores(results: dict) -> dict[str, float]:
    """What stands under `last` in results.json, by the network's name."""
    found = {}
    for name, record in results.items():
        if isinstance(record, dict) and isinstance(record.get("last"), dict):
            last = record["last"]
            found[name] = last["miou"] if "miou" in last else last["ap"]
    return found


class Node(NamedTuple):
    """A network of gist_rist.py: its mIoU on the development pictures and on the scored ones."""

    dev: float
    val: float


def nodes(report: str) -> dict[str, Node]:
    """The nodes in the report of a run of gist_rist.py, by path; that of stage 0 is empty."""
    section = report.split("## Nodes")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if re.fullmatch(r"stage 0|[LPBTF\d.]+", cells[0]):
            path = "" if cells[0] == "stage 0" else cells[0]
            found[path] = Node(float(cells[1]), float(cells[2]))
    return found


def scores_of_search(results: dict, found: dict[str, Node]) -> dict[str, float]:
    """What each search chose, by its name; and of the longest path that repeats one letter, such as
    LLL, the node that the development pictures choose, and under "LLL, last" its end."""
    chosen = {
        name: found[record["path"]].val
        for name, record in results.items()
        if isinstance(record, dict) and record.get("path") in found
    }
    for letter in "LPB":
        path = max((path for path in found if set(path) == {letter}), key=len, default="")
        if len(path) > 1:
            trail = [path[:length] for length in range(len(path) + 1)]
            best = max(trail, key=lambda node: found[node].dev)
            chosen[path] = found[best].val
            chosen[f"{path}, last"] = found[path].val
    return chosen


def markdown(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "No run is there yet."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_scores(script: str, logs: dict[str, Log]) -> str:
    """Every score of every row but those of the study: its mean over the draws, and the draws."""
    lines = []
    for row in ROWS:
        if row.script != script or row.group == "study":
            continue
        draws = draws_of(row, logs)
        names = dict.fromkeys(name for found in draws.values() for name in found)
        for name in names:
            values = [found[name] for found in draws.values() if name in found]
            each = ", ".join(f"{value:.2f}" for value in values)
            lines.append([row.method, row.rate, name, f"{statistics.mean(values):.2f}", each])
    return markdown(["method", "`--lr`", "network", "mean", "draws"], lines)


def draws_of(row: Row, logs: dict[str, Log]) -> dict[int, dict[str, float]]:
    """The scores of the finished runs of a row, by draw."""
    return {
        draw: scores(logs[folder_name(row, draw)])
        for draw in row.draws
        if folder_name(row, draw) in logs
    }


def table_of_claims(script: str, logs: dict[str, Log]) -> str:
    """Each claim with the mean of its differences, paired by draw, and their sample deviation."""
    rows_here = [row for row in ROWS if row.script == script and row.group != "study"]
    by_method = {row.method: row for row in rows_here}
    lines = []
    for claim in CLAIMS:
        if claim.script != script:
            continue
        larger, smaller = (
            draws_of(by_method[method], logs) for method, _ in (claim.larger, claim.smaller)
        )
        gains = [
            larger[draw][claim.larger[1]] - smaller[draw][claim.smaller[1]]
            for draw in larger.keys() & smaller.keys()
        ]
        if gains:
            wins = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
            lines.append([claim.text, mean_and_spread(gains), wins])
    return markdown(["claim", "difference, mean ± spread", "wins"], lines)


def mean_and_spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:+.2f}"
    return f"{statistics.mean(values):+.2f} ± {statistics.stdev(values):.2f}"


def table_of_classes(script: str, logs: dict[str, Log]) -> str:
    """The IoU of each class on the scored pictures, for the network that a method returns, as a
    mean over the draws of group A that all methods have."""
    found: dict[str, dict[int, dict[str, float]]] = {}  # by method and draw
    for row in rows_of("A", script):
        of_draw = {
            draw: class_scores(logs[folder_name(row, draw)])
            for draw in row.draws
            if folder_name(row, draw) in logs
        }
        if of_draw:
            found[row.method] = of_draw
    shared = set.intersection(*(set(of_draw) for of_draw in found.values())) if found else set()
    if not shared:
        return markdown([], [])
    classes = next(iter(next(iter(found.values())).values()))
    lines = []
    for name in classes:
        means = [
            statistics.mean(of_draw[draw][name] for draw in shared) for of_draw in found.values()
        ]
        lines.append([name, *(f"{mean:.1f}" for mean in means)])
    return markdown(["class", *found], lines)


def class_scores(log: Log) -> dict[str, float]:
    """The IoU of each class of the network that a finished run returns, on the scored pictures."""
    script = json.loads(log["config.json"])["script"]
    results = json.loads(log["last.pt.results.json"])
    network = next(name for name in RETURNED[script] if name in results)
    return results[network]["last"]["iou"]


def table_of_curves(group: str, script: str, logs: dict[str, Log]) -> str:
    """The scores of the baselines and of what chooses settings, as training goes on: columns are
    shares of the run."""
    points = (1, 2, 3, 4, 5, 6)
    lines = []
    for row in rows_of(group, script):
        for draw in row.draws:
            name = folder_name(row, draw)
            if name not in logs:
                continue
            for key, curve in curves(logs[name]).items():
                last = max(curve)
                values = [curve.get(round(last * point / len(points))) for point in points]
                cells = ["" if value is None else f"{value:.1f}" for value in values]
                lines.append([row.method, row.rate, str(draw), network_of(key), *cells])
    return markdown(
        ["method", "`--lr`", "draw", "network", *(f"{point}/6" for point in points)], lines
    )


def curves(log: Log) -> dict[str, dict[int, float]]:
    """The scores in a log by step, a curve for each network."""
    found: dict[str, dict[int, float]] = {}
    for line in log["log.jsonl"].splitlines():
        record = json.loads(line)
        for key, value in record.items():
            if key.startswith(("miou_", "ap_")):
                found.setdefault(key, {})[record["step"]] = value
    return found


def network_of(key: str) -> str:
    """The network whose score a log has under this key: `student` of `miou_student`."""
    return key.split("_", 1)[1]


# The network that a script returns, or else that of its baseline.
RETURNED = {
    "gta_seg.py": ("teacher", "student"),
    "guided_distillation.py": ("student", "supervised"),
    "better_pseudo_labels.py": ("teacher", "supervised"),
}


def tuning_score(log: Log) -> float:
    """What a rate is chosen by: the score of the method's result on the tuning pictures, at the
    last step."""
    script = json.loads(log["config.json"])["script"]
    if script == "gist_rist.py":
        return json.loads(log["results.json"])["path"]["dev"]
    by_network = {network_of(key): curve for key, curve in curves(log).items()}
    network = next(name for name in RETURNED[script] if name in by_network)
    curve = by_network[network]
    return curve[max(curve)]


def tried(script: str, method: str, logs: dict[str, Log]) -> dict[str, float]:
    """The tuning scores of a method by rate, as far as its runs are there."""
    names = (method, f"{method}, half")
    rows = [row for row in rows_of("study", script) if row.method in names]
    found = {row.rate: logs.get(folder_name(row, 0)) for row in rows}
    return {rate: tuning_score(log) for rate, log in found.items() if log is not None}


def table_of_rates(logs: dict[str, Log]) -> str:
    """For each method the score of every rate that was tried, and the best when all are there."""
    lines = []
    for script, method in BEST_RATE:
        found = tried(script, method, logs)
        if found:
            each = ", ".join(f"{rate}: {score:.2f}" for rate, score in found.items())
            best = max(found, key=found.get) if len(found) == len(RATES[script]) else "open"
            lines.append([f"`{script}`", method, each, best])
    return markdown(["script", "method", "`--lr`: tuning score", "best"], lines)


def table_of_pseudo_labels(script: str, logs: dict[str, Log]) -> str:
    """The share of kept pseudo labels that are right, over the thirds of each run."""
    lines = []
    for run in plan(GROUPS):
        shares = shares_over_thirds(logs[run.name]) if run.name in logs else []
        if run.row.script == script and shares:
            each = [f"{share:.3f}" for share in shares]
            lines.append([run.row.method, run.row.rate, str(run.draw), *each])
    return markdown(["method", "`--lr`", "draw", "first third", "second", "last"], lines)


def shares_over_thirds(log: Log) -> list[float]:
    """The means of `pseudo_acc` over the thirds of a log's lines that have it."""
    records = [json.loads(line) for line in log["log.jsonl"].splitlines()]
    shares = [record["pseudo_acc"] for record in records if "pseudo_acc" in record]
    if len(shares) < 3:
        return []
    cuts = [round(len(shares) * third / 3) for third in range(4)]
    return [statistics.mean(shares[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def table_of_what_is_there(logs: dict[str, Log]) -> str:
    """How many of the planned runs are in the pack, and how many are missing of which method."""
    lines = []
    for group in GROUPS:
        for script in dict.fromkeys(row.script for row in ROWS if row.group == group):
            runs = [run for run in plan((group,)) if run.row.script == script]
            missing: dict[str, int] = {}
            for run in runs:
                if run.name not in logs:
                    missing[run.row.method] = missing.get(run.row.method, 0) + 1
            there = f"{len(runs) - sum(missing.values())} of {len(runs)}"
            names = "; ".join(f"{method}: {count}" for method, count in missing.items())
            lines.append([group, f"`{script}`", there, names or "none"])
    return markdown(["group", "script", "runs", "missing"], lines)


def table_of_machines(logs: dict[str, Log]) -> str:
    """Where the runs were made, and of which commit."""
    seen: dict[tuple, int] = {}
    for log in logs.values():
        config = json.loads(log["config.json"])
        settings = config["settings"]
        device = f"{config['device']}, {config['threads']} thread(s)"
        where = (config["commit"][:7], config["torch"], device, settings["precision"])
        seen[where] = seen.get(where, 0) + 1
    lines = [[*where, str(count)] for where, count in sorted(seen.items())]
    return markdown(["commit", "PyTorch", "device", "precision", "runs"], lines)


TABLES: dict[str, Callable[[dict[str, Log]], str]] = {
    "what is there": table_of_what_is_there,
    "machines": table_of_machines,
    "rates": table_of_rates,
}
for script in SCRIPTS:
    stem = Path(script).stem
    TABLES |= {
        f"{stem} study": partial(table_of_curves, "study", script),
        f"{stem} scores": partial(table_of_scores, script),
        f"{stem} claims": partial(table_of_claims, script),
        f"{stem} curves": partial(table_of_curves, "A", script),
    }
TABLES["gta_seg classes"] = partial(table_of_classes, "gta_seg.py")
TABLES["gta_seg pseudo labels"] = partial(table_of_pseudo_labels, "gta_seg.py")


def page_with_tables(page: str, logs: dict[str, Log]) -> str:
    """The page, with what stands between <!-- table: NAME --> and <!-- end --> made anew."""

    def made(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]](logs)}\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


# ===================================================================================== command line
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("plan", "run", "pack", "tables"))
    add = parser.add_argument
    add("--only", nargs="+", default=[], help="only runs, or tables, with one of these words")
    add("--groups", nargs="+", choices=GROUPS, default=["A", "B", "C"])
    add("--at-most", type=int, default=1, help="how many runs at a time")
    add("--runs", type=Path, default=Path("runs/photographs"), help="where run folders lie")
    add("--pack", type=Path, default=PACK, help="the file of logs")
    add("--semantic", default="datasets/camvid_half", help="pictures of the semantic scripts")
    add("--objects", default="datasets/car_parts", help="those of the scripts for objects")
    add("--weights", default="datasets/weights", help="folder with the files of weights")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--house", type=Path, default=HOUSE, help="the checkout whose scripts are run")
    add("--python", default=sys.executable, help="the interpreter that runs the scripts")
    add("--before", default="", help="what comes before it, such as 'nice -n 19'")
    add("--poll", type=float, default=1.0, help="seconds between two looks at the runs")
    add("--write", action="store_true", help="tables: write them into docs/photographs.md")
    options = parser.parse_args()
    options.groups = tuple(options.groups)
    options.folder = options.house / options.runs
    if options.what == "run":
        return train(options)
    if options.what == "pack":
        write_pack(options)
    elif options.what == "plan":
        for run in plan(options.groups):
            if fits(run.name, options.only):
                print(shlex.join(["python", *training(run, options)]))
                if run.row.script in SCORED:
                    print(shlex.join(["python", *scoring(run, options)]))
    else:
        show_tables(options)
    return 0


def show_tables(options: argparse.Namespace) -> None:
    logs = read_pack(options.pack)
    if options.write:
        PAGE.write_text(page_with_tables(PAGE.read_text(), logs))
        return
    for name, table in TABLES.items():
        if fits(name, options.only):
            print(f"{name}\n\n{table(logs)}\n")


if __name__ == "__main__":
    sys.exit(main())
