"""The witness: do two versions of this repository train the same networks, bit for bit?

    python tests/witness.py BASE                      the working tree against the commit BASE
    python tests/witness.py BASE --now COMMIT         one commit against another
    python tests/witness.py BASE --only gta "gist *"  some runs, and those that they build on
    python tests/witness.py --list                    the names of all runs and their command lines

Both versions make the same short runs with one thread on one machine: every script, stage, method,
search and recipe, on the embedded data. Then all weights in all checkpoints are compared bit by
bit, and so is every number in the JSON files that a run leaves, but for clocks. A table says what
is equal; the exit code is 1 when anything differs or fails.

Flags, files and tensors may have other names in the newer version. The tables below say so: the
runs, what the newer version calls things, and which runs are meant to differ. They are the only
part of this file that changes often.

BASE is trained once: its results and the drawn data stay in a folder of the system's temporary
folder (--cache), which may be removed at any time. This is not part of `make test`.
"""

import argparse
import ast
import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")  # before torch

REPO = Path(__file__).resolve().parents[1]

# ----------------------------------------------------------------------------------------- the runs
# Each is one command line, or several that are run in turn, with " && " between them. {data} is
# the folder of the drawn data, {out} the run's own folder, {runs} the folder of all runs:
# {runs}/gta is the {out} of the run `gta`, which is then made first. "@2 " before a command: on two
# processes, as under torchrun. A flag that is given twice has its last value. Flags are spelt out
# wherever a default might change.
GTA_TINY = (
    "gta_seg.py --dataset shapes --root {data} --val few --split {data}/labeled.txt --workers 0"
    " --backbone test_resnet --weights none --width 8 --batch-size 4 --crop-size 32 --lr 0.1"
    " --steps 6 --eval-every 3 --log-every 1 --out {out}"
)
GTA = GTA_TINY + " --unlabeled {data}/unlabeled.txt --warmup-epochs 1 --cutmix 1.0"
GTA_RUNS = {
    "gta": GTA + " && gta_seg.py --eval {out}/best.pt --workers 0 && gta_seg.py"
    " --predict {out}/best.pt {data}/pool --workers 0",
    "gta ramps": GTA + " --ramp-gta --ramp-teacher",
    "gta suponly": GTA_TINY + " --method suponly --cutmix-labeled 0.5",
    "gta mt": GTA + " --method mt --reweight laplace",
    "gta unbiased-st": GTA + " --method unbiased-st",
    "gta released": GTA + " --recipe released --steps 8",
    "gta transfer all": GTA + " --transfer all",
    "gta assistant labeled": GTA + " --gta-data labeled",
    "gta assistant both": GTA + " --gta-data both",
    "gta student pseudo": GTA + " --student-data pseudo",
    "gta exchanged": GTA + " --gta-data labeled --student-data pseudo",
    "gta share predictor": GTA + " --share-predictor",
    "gta no weights": GTA + " --reweight none",
    "gta tau 0": GTA + " --tau 0",
    "gta drop 0": GTA + " --drop 0 --mu 0.5 --alpha-gta 0.9 --alpha-teacher 0.5",
    "gta no cutmix": GTA + " --cutmix 0 --cutmix-labeled 0",
    "gta no warm-up": GTA + " --warmup-epochs 0 --monitor-labels",
    "gta aux ohem": GTA + " --aux 0.4 --ohem 0.7 --crop-size 224 --cutmix-labeled 0.5 --steps 4",
    "gta window": GTA + " --window 48 --output-stride 16 --seed 1",
    "gta resnet50": GTA_TINY + " --method suponly --backbone resnet50 --steps 1 --eval-every 1",
    "gta mobilenet": GTA_TINY
    + " --method suponly --backbone mobilenet_v2 --output-stride 16 --steps 2",
    "gta random split": GTA + " --split random:12 --split-seed 1 --steps 4",
    "gta two": "@2 " + GTA,
    "gta released two": "@2 " + GTA + " --recipe released --steps 8",
    "gta mt two": "@2 " + GTA + " --method mt --reweight laplace",
    "gta preset": "gta_seg.py --dataset shapes --root {data} --val few --workers 0"
    " --warmup-epochs 0.03 --cutmix 1.0 --steps 6 --eval-every 6 --log-every 1 --out {out}",
    "gta folder": "gta_seg.py --dataset folder --root {data}/folder --split random:4 --workers 0"
    " --backbone test_resnet --weights none --width 8 --batch-size 4 --crop-size 32"
    " --warmup-epochs 0 --steps 3 --eval-every 3 --log-every 1 --out {out}",
    "gta cityscapes": "gta_seg.py --dataset cityscapes --root {data}/cityscapes --split random:6"
    " --workers 0 --backbone test_resnet --weights none --width 8 --batch-size 2 --crop-size 230"
    " --warmup-epochs 0.4 --window 96 --steps 4 --eval-every 4 --log-every 1 --out {out}",
}

GIST_TINY = (
    "gist_rist.py --dataset shapes --root {data} --val few --split {data}/labeled.txt --workers 0"
    " --unlabeled {data}/unlabeled.txt --backbone test_resnet --weights none --bn live --lr 0.006"
    " --phi 0.3 --temp 0.5 --stage0-steps 6 --steps 3 --eval-every 3 --dev-size 4 --batch-size 2"
    " --crop-size 32 32 --resize 1 --save-every 3 --log-every 1 --keep-nodes --out {out}/run"
    " --store {out}/store"
)
GIST = GIST_TINY + " --stages 2"
P = GIST_TINY + " --search path --path P"
GIST_RUNS = {
    "gist": GIST + " && gist_rist.py --eval {out}/run/best.pt --workers 0 && gist_rist.py"
    " --predict {out}/run/best.pt {data}/pool --workers 0 && gist_rist.py --report {out}/run",
    "gist beam": GIST + " --search gist --beam 2 --no-val-every-stage",
    "gist rist": GIST + " --search rist --trials 4 --stages 3 --max-run 2 --seed 1",
    "gist independent": GIST + " --search rist --trials 3 --stages 1 --independent",
    "gist fist": GIST + " --search fist --alpha 0 0.25 1",
    "gist fist alone": GIST + " --search fist --alpha 0.75",
    "gist batchwise": GIST + " --search batchwise --stages 3",
    "gist path": GIST_TINY + " --search path --path PL LLP F0.5B",
    "gist classmix": P + " --stage0 classmix",
    "gist classmix colour": P + " --stage0 classmix --mix-colour",
    "gist s4gan": P + " --stage0 s4gan --gan-gamma 0.4 --gan-lr 1e-3",
    "gist from checkpoint": "gist_rist.py --dataset shapes --root {data} --val few --workers 0"
    " --split {data}/labeled.txt --unlabeled {data}/unlabeled.txt --backbone test_resnet"
    " --weights none --bn live --steps 2 --dev-size 4 --batch-size 2 --crop-size 32 32 --resize 1"
    " --keep-nodes --stage0 {runs}/gist/run/best.pt --search path --path L --out {out}/run"
    " --store {out}/store",
    "gist no cl": P + " --cl 0",
    "gist no erase": P + " --phi 0",
    "gist no temperature": P + " --temp 1",
    "gist cl on both": GIST_TINY + " --search path --path PL --cl-on both",
    "gist bn frozen": GIST_TINY + " --search path --path PL --bn frozen",
    "gist reserve": P + " --dev-size 3 --dev-reserve 5",
    "gist rates": P + " --head-lr 3 --resize 2 --scale 0.5 2.0",
    "gist bgr": P + " --pixels bgr --output-stride 16 --aspp-rates 1 2",
    "gist caffe": GIST_TINY + " --stages 0 --search gist --backbone caffe_resnet50"
    " --stage0-steps 1 --eval-every 1",
    "gist preset": "gist_rist.py --dataset shapes --root {data} --val few --workers 0"
    " --stage0-steps 4 --eval-every 2 --steps 2 --search path --path LP --dev-size 6 --keep-nodes"
    " --log-every 1 --unlabeled {data}/unlabeled.txt --out {out}/run --store {out}/store",
    "gist folder": "gist_rist.py --dataset folder --root {data}/folder --split random:4"
    " --workers 0 --backbone test_resnet --weights none --bn live --stage0-steps 3 --eval-every 3"
    " --steps 2 --dev-size 2 --batch-size 2 --crop-size 32 32 --search path --path P --keep-nodes"
    " --log-every 1 --out {out}/run --store {out}/store",
    "gist cityscapes": "gist_rist.py --dataset cityscapes --root {data}/cityscapes"
    " --split random:4 --backbone test_resnet --weights none --pixels imagenet --bn live --phi 0.5"
    " --stage0 classmix --stage0-steps 3"
    " --eval-every 3 --steps 2 --dev-size 2 --batch-size 2 --crop-size 32 64 --search path"
    " --path P --keep-nodes --log-every 1 --workers 0 --out {out}/run --store {out}/store",
}

# Scales up to 1: an image never outgrows the crop, so that the place of a crop does not matter.
GUIDED_TINY = (
    "guided_distillation.py --dataset coco --root {data}/few-things --split random:4"
    " --split-seed 1 --backbone test_resnet --weights none --width 64 --encoder-layers 1"
    " --decoder-layers 2 --queries 8 --points 64 --crop-size 64 64 --test-size 96 96"
    " --scale 0.5 1.0 --lr 1e-3 --batch-size 2 --steps 4 --eval-every 2 --log-every 1 --workers 0"
    " --device cpu --out {out}"
)
GUIDED_STUDENT = GUIDED_TINY + " --class-threshold 0.2"
GUIDED = GUIDED_STUDENT + " --burn-in-steps 2 --ema 0.9"
STUDENT = GUIDED + " --stage student --teacher {runs}/guided/teacher.pt"
GUIDED_RUNS = {
    "guided": GUIDED + " && guided_distillation.py --eval {out}/best.pt --workers 0 --device cpu"
    " && guided_distillation.py --predict {out}/best.pt {data}/pool --workers 0 --device cpu",
    "guided none": GUIDED_STUDENT + " --ema 0.9 --burn-in none",
    "guided standard": GUIDED + " --burn-in standard",
    "guided fixed": GUIDED_STUDENT + " --burn-in fixed",
    "guided supervised": GUIDED_TINY + " --stage teacher",
    "guided all labels": GUIDED_TINY + " --stage teacher --split all --split-seed 1 --seed 1",
    "guided student": STUDENT,
    "guided cutout": STUDENT + " --strong-aug cutout",
    "guided same": STUDENT + " --strong-aug same",
    "guided uniform": STUDENT + " --labeled-sampling uniform",
    "guided remaining": STUDENT + " --pool remaining --size-threshold 2",
    "guided lambda": STUDENT + " --lambda-u 1",
    "guided losses": STUDENT + " --lambda-c 1 --lambda-ce 2",
    "guided crops": GUIDED + " --scale 0.7 2.0",
    "guided live": GUIDED + " --norm live",
    "guided accumulate": GUIDED + " --norm frozen --accumulate 2 --checkpointing",
    "guided poly": GUIDED + " --schedule poly --backbone-lr 0.5",
    "guided vit frozen": GUIDED_TINY + " --stage teacher --backbone vit_tiny_patch16_224 --steps 2"
    " --freeze-backbone",
    "guided deit": GUIDED_TINY + " --stage teacher --backbone deit_tiny_patch16_224 --steps 2"
    " --vit-resize nearest",
    "guided swin": GUIDED_TINY
    + " --stage teacher --backbone swin_tiny_patch4_window7_224 --steps 2",
    "guided two": "@2 " + GUIDED,
    "guided live two": "@2 " + GUIDED_TINY + " --stage teacher --norm live --batch-size 4",
    "guided preset": "guided_distillation.py --dataset shapes --root {data} --split 5% --workers 0"
    " --val-json {data}/few-things/annotations/instances_val.json --steps 4 --burn-in-steps 2"
    " --eval-every 4 --log-every 1 --class-threshold 0.2 --scale 0.5 1.0 --device cpu --out {out}",
    "guided cityscapes": "guided_distillation.py --dataset cityscapes --root {data}/cityscapes"
    " --split random:6 --backbone test_resnet --weights none --width 64 --encoder-layers 1"
    " --decoder-layers 2 --queries 8 --points 64 --crop-size 64 128 --test-size 128 256"
    " --batch-size 2 --steps 4 --eval-every 4 --log-every 1 --burn-in-steps 2"
    " --class-threshold 0.1 --workers 0 --device cpu --out {out}",
}

BETTER_TINY = (
    "better_pseudo_labels.py --dataset lvis --root {data}/few-tail --frequency subset"
    " --backbone test_resnet --image-size 64 --width 32 --fc 64 --head-convs 1 --anchor-scale 4.0"
    " --proposals 20 --rpn-batch 32 --roi-batch 16 --lr 1e-3 --layer-decay 0.5 --eval-every 99"
    " --log-every 1 --workers 0 --device cpu --scale 0.7 1.4 --threshold 0.1 --out {out}"
)
# From a detector that finds things: 60 steps are enough on the pictures that it has learned.
FOUND = (
    BETTER_TINY
    + " --split 8 --weights none --init-detector {runs}/better-start/teacher.pt --norm frozen"
)
TAUGHT = FOUND + " --teacher-batch-size 2 --teacher-steps 2"
ALONE = TAUGHT + " --stage teacher --embed-size 32"  # the teacher's labels: Eqs. 1 to 3
BETTER = (
    TAUGHT + " --embed-size 32 --holdout 0.25 --batch-size 2 --steps 3 --ema 0.9 --threshold 0.1"
)
# A student whose pseudo labels need no calibration, or have that of another run.
SOFT = (
    FOUND + " --stage student --teacher {runs}/better/teacher.pt --batch-size 2 --steps 3"
    " --embed-size 32 --threshold 0.1 --pseudo soft"
)
GIVEN = SOFT + " --ema 0.9 --pseudo calibrated --calibration {data}/delta.json"
CALIBRATE = (
    FOUND + " --stage calibrate --teacher {runs}/better/heldout.pt --holdout 0.25 --embed-size 32"
)
EVA = (
    BETTER_TINY + " --split 8 --backbone eva02_tiny_patch14_224 --weights none --window 2"
    " --layer-decay 0.8 --stage teacher --teacher-batch-size 2 --teacher-steps 2"
)
SEARCH = (
    " --embed-size 32 --pool {data}/pool --retrieval-model test_resnet --retrieval-weights none"
    " --neighbours 3 --duplicate 0.9999"
)
BETTER_RUNS = {
    "better start": BETTER_TINY
    + " --split all --stage teacher --norm live --layer-decay 1.0 --lr 6e-3 --weights none"
    " --teacher-steps 60 --teacher-batch-size 4 --scale 1 1 --val train --embed-size 32"
    " --eval-every 60",
    "better": BETTER + " --eval-every 2 && better_pseudo_labels.py --eval {out}/best.pt"
    " --workers 0 --device cpu && better_pseudo_labels.py --predict {out}/best.pt {data}/pool"
    " --workers 0 --device cpu",
    "better onehot": SOFT + " --ema 0.9 --pseudo onehot",
    "better soft": SOFT + " --ema 0.9",
    "better given": GIVEN,
    "better labels onehot": GIVEN + " --student-labels onehot --lambda-calib 1",
    "better no smoothing": ALONE.replace(" --embed-size 32", "") + " --smoothing none",
    "better uniform": ALONE.replace(" --embed-size 32", "") + " --smoothing uniform",
    "better similarity": ALONE + " --smoothing similarity",
    "better similarity freq": ALONE + " --smoothing similarity+freq --eps 0.2 --gamma 0.5",
    "better literal": ALONE + " --convention literal",
    "better temperature": ALONE + " --sim-tau 0.5",
    "better few objects": ALONE + " --proto-per-class 2",
    "better prototypes": FOUND + " --stage prototypes --embed-size 32",
    "better calibrate": CALIBRATE,
    "better calibrate alone": CALIBRATE + " --shrink 0",
    "better top1": GIVEN + " --support top1",
    "better correct all": GIVEN + " --support all",
    "better size": GIVEN + " --size-threshold 200",
    "better weight": GIVEN + " --unsup-weight 0.5",
    "better tune": BETTER + " --tune",
    "better grid teacher": TAUGHT
    + " --teacher-steps 1 --embed-size 32 --tune --grid teacher --holdout 0.25",
    "better grid student": FOUND
    + " --embed-size 32 --holdout 0.25 --batch-size 2 --steps 1 --ema 0.9 --threshold 0.1 --tune"
    " --grid student --teacher {runs}/better/heldout.pt",
    "better retrieve": FOUND + SEARCH + " --stage retrieve",
    "better faiss": FOUND + SEARCH + " --stage retrieve --index Flat",
    "better pool": TAUGHT
    + SEARCH
    + " --batch-size 2 --steps 2 --threshold 0.1 --ema 0.9 --pseudo soft",
    "better federated": ALONE + " --federated 3",
    "better not federated": ALONE + " --federated 0 --prior 0.1",
    "better live": ALONE + " --norm live",
    "better schedule": ALONE
    + " --schedule constant --warmup 0.5 --clip 1.0 --weight-decay 0.01 --repeat 0.5",
    "better accumulate": SOFT + " --ema 0.9 --accumulate 2",
    "better soft nms": ALONE + " --soft-nms --maskness --detections 50",
    "better frequency file": ALONE + " --frequency file --seed 1",
    "better eva": EVA + " --smoothing none --drop-path 0.5",
    "better eva whole": EVA + " --embed-size 28 --global-blocks 6 --checkpointing --drop-path 0.0",
    "better coco": "better_pseudo_labels.py --dataset coco --root {data}/few-things --split 6"
    " --frequency subset --backbone test_resnet --weights none --image-size 64 --width 32 --fc 64"
    " --head-convs 1 --anchor-scale 4.0 --proposals 20 --rpn-batch 32 --roi-batch 16"
    " --embed-size 32 --stage teacher --teacher-batch-size 2 --teacher-steps 2 --lr 1e-3"
    " --eval-every 99 --log-every 1 --workers 0 --device cpu --scale 0.7 1.4"
    " --threshold 0.5 --out {out}",
    "better two": "@2 " + SOFT + " --ema 0.9",
    "better preset": "better_pseudo_labels.py --dataset shapes --root {data} --workers 0"
    " --device cpu --val-json {data}/few-tail/annotations/lvis_val.json --teacher-steps 2"
    " --steps 2 --eval-every 99 --log-every 1 --threshold 0.3 --out {out}",
}
RUNS = {**GTA_RUNS, **GIST_RUNS, **GUIDED_RUNS, **BETTER_RUNS}

# --------------------------------------------------------------------------- what has changed since
# How the newer version spells what stands above: (pattern, replacement) on every command line ...
FLAGS: list[tuple[str, str]] = []
# ... or the whole command line of a run.
NOW: dict[str, str] = {}
# Runs that the newer version cannot make any more, and why.
GONE: dict[str, str] = {}
# Runs whose results are meant to differ, and why. A name may be a pattern, such as "guided *".
EXPECTED: dict[str, str] = {
    "guided*": "the gradients of all heads, and of an image's pairs, are summed in another order",
    "better": "--predict has pictures pass in batches, which rounds scores in predictions.json",
    "better federated": "the draw of an image's classes takes numbers also where it is empty",
}
# Tensors, now -> then: (pattern, replacement) on "<run>/<file>: <network>: <tensor>".
TENSORS: list[tuple[str, str]] = []
# Tensors and networks that only one version has, which is right: patterns, found in the same text.
ONE_SIDED: list[str] = []
# Numbers, now -> then: the same on "<file>: <key>.<key>...".
RENAMED: list[tuple[str, str]] = []
# Names of files in which a hash of the settings stands, in both versions.
FILES = [
    (r"^store/stage0-[0-9a-f]+/", "store/stage0/"),
    (r"^store/[0-9a-f]+/", "store/"),
    (r"^embedded/(\w+)/(\d+)-[0-9a-f]+", r"embedded/\1/\2"),
]
# Numbers that say when, how fast or how much, and so are of no interest.
IDLE = re.compile(r"(^|[. ])(seconds|images_per_second|peak_gpu_gib|skipped_images)$")


# ------------------------------------------------------------------------------------- two versions
@dataclasses.dataclass
class Side:
    """One of the two versions: its source, its drawn data and its runs."""

    name: str
    tree: Path
    data: Path
    runs: Path
    lines: dict[str, str]

    def out(self, name: str) -> Path:
        """The folder of a run; its name holds what the run follows from."""
        text = self.lines[name]
        for other in needed_by(text):
            text += self.out(other).name
        return self.runs / f"{folder_of(name)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def mark(self, name: str) -> Path:
        """A file that says that the run is complete."""
        return self.out(name).with_suffix(".done")

    def log(self, name: str) -> Path:
        return self.out(name).with_suffix(".log")


def git(*line: str) -> bytes:
    return subprocess.run(["git", "-C", str(REPO), *line], check=True, capture_output=True).stdout


def check_out(commit: str, target: Path) -> None:
    """The files of a commit, without its history; of the working tree when `commit` is empty."""
    target.mkdir(parents=True)
    if commit:
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
            archive.extractall(target, filter="data")
        return
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").decode()
    for name in listed.split("\0"):
        if name and (REPO / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, target / name)


@contextlib.contextmanager
def alone(folder: Path):
    """Only one witness at a time works on `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another witness, which works on {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def folder_of(name: str) -> str:
    return name.replace(" ", "-")


def needed_by(line: str) -> set[str]:
    """The runs that a command line builds on."""
    folders = set(re.findall(r"\{runs\}/([\w-]+)", line))
    return {name for name in RUNS if folder_of(name) in folders}


def line_now(name: str) -> str:
    """The command line of a run in the newer version."""
    line = NOW.get(name, RUNS[name])
    for pattern, replacement in FLAGS:
        line = re.sub(pattern, replacement, line)
    return line


def chosen(patterns: list[str]) -> list[str]:
    """The names of the runs that fit a pattern and of those that they build on, in order."""
    for pattern in patterns:
        if not fnmatch.filter(RUNS, pattern):
            sys.exit(f"error: no run is named {pattern}; see --list.")
    wanted = {name for name in RUNS if any(fnmatch.fnmatch(name, p) for p in patterns)}
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        needed = needed_by(RUNS[name]) | needed_by(line_now(name))
        waiting += needed - wanted
        wanted |= needed
    return [name for name in RUNS if name in wanted]


# --------------------------------------------------------------------------------------- drawn data
def draw(tree: Path, cache: Path) -> Path:
    """The folder of the embedded data as this version draws them, and of small parts of them.

    Versions share it when their drawing code differs in layout, comments and imports only."""
    code = ""
    for path in (tree / "data" / "shapes.py", tree / "data" / "drawing.py"):
        code += drawing_code(path.read_text()) if path.is_file() else ""
    data = cache / f"data-{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    with alone(data):
        if not data.is_dir():
            temporary = data.with_name(f"{data.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            command = [sys.executable, "-m", "data.shapes", "--root", str(temporary)]
            subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
            make_parts(temporary)
            write_weights(temporary)
            temporary.rename(data)
        write_delta(data)
    return data


def write_weights(data: Path) -> None:
    """The weights that lie beside data/shapes.py, where versions before 0.3 put those that they
    pre-trained on the machine: both start from the same."""
    import safetensors.torch
    import timm
    import torch

    shipped = Path(__file__).resolve().parents[1] / "data" / "test_resnet.safetensors"
    with safetensors.safe_open(shipped, "pt") as content:
        recipe = content.metadata()["recipe"]
    folder = data / "weights" / "test_resnet"
    folder.mkdir(parents=True)
    torch.save(safetensors.torch.load_file(shipped), folder / "weights.pth")
    version = f"{recipe.replace(' test_resnet', '')} {timm.__version__}"
    (folder / "version.txt").write_text(version)


def write_delta(data: Path) -> None:
    """A calibration that both versions correct pseudo labels by."""
    content = json.loads((data / "few-tail" / "annotations" / "lvis_train.json").read_text())
    classes = [category["name"] for category in content["categories"]]
    delta = [round(0.3 * math.cos(i), 3) for i in range(len(classes))]
    (data / "delta.json").write_text(json.dumps({"classes": classes, "delta": delta}))


def drawing_code(text: str) -> str:
    """The syntax tree of a module without its imports and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            node.body = [line for line in node.body if not is_idle(line)]
    return ast.dump(tree)


def is_idle(line: ast.stmt) -> bool:
    if isinstance(line, ast.Expr):
        return isinstance(line.value, ast.Constant)
    return isinstance(line, (ast.Import, ast.ImportFrom))


def make_parts(data: Path) -> None:
    """Short lists, small data sets and a folder of pictures to search in, all of what was drawn."""
    lists = data / "voc" / "ImageSets" / "Segmentation"
    train = (lists / "train.txt").read_text().splitlines(keepends=True)
    val = (lists / "val.txt").read_text().splitlines(keepends=True)
    (lists / "few.txt").write_text("".join(val[:7]))
    (data / "labeled.txt").write_text("".join(train[:8]))
    (data / "unlabeled.txt").write_text("".join(train[100:108]))
    for part, names in {"train": train[:8], "val": val[:3], "unlabeled": train[100:104]}.items():
        for kind, source, ending in [
            ("images", "JPEGImages", "jpg"),
            ("labels", "SegmentationClass", "png"),
        ]:
            folder = data / "folder" / kind / part
            folder.mkdir(parents=True)
            for name in names:
                shutil.copy(data / "voc" / source / f"{name.strip()}.{ending}", folder)
    shutil.copy(data / "voc" / "classes.txt", data / "folder")
    make_few(data / "things", data / "few-things", {"instances_train": 8, "instances_val": 5})
    make_few(data / "tail", data / "few-tail", {"lvis_train": 12, "lvis_val": 5})
    pool = data / "pool"
    pool.mkdir()
    for number in range(21, 29):
        shutil.copy(
            data / "tail" / "images" / "train" / f"{number:012d}.jpg", pool / f"{number}.jpg"
        )
    shutil.copy(pool / "21.jpg", pool / "again.jpg")
    shutil.copy(data / "tail" / "images" / "train" / f"{3:012d}.jpg", pool / "known.jpg")


def make_few(source: Path, target: Path, numbers: dict[str, int]) -> None:
    """The first pictures of a data set in COCO's layout, so many of each annotation file."""
    (target / "annotations").mkdir(parents=True)
    (target / "images").symlink_to(Path("..") / source.name / "images")
    for name, number in numbers.items():
        content = json.loads((source / "annotations" / f"{name}.json").read_text())
        content["images"] = [x for x in content["images"] if x["id"] <= number]
        content["annotations"] = [x for x in content["annotations"] if x["image_id"] <= number]
        (target / "annotations" / f"{name}.json").write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------ running
forked = multiprocessing.get_context(
    "fork"
)  # a process that has imported torch already starts at once


def preload() -> None:
    """Import once what every run imports; leave out what takes time and changes no result."""
    import matplotlib.figure
    import matplotlib.pyplot
    import pycocotools.mask
    import timm
    import torch
    import torchvision
    import tyro

    assert pycocotools.mask and timm and torchvision and tyro
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    sys.modules["torch.utils.tensorboard"] = None  # as if it were not installed
    matplotlib.figure.Figure.savefig = lambda figure, path, **more: Path(path).touch()
    os.fsync = lambda file: None


def perform(tree: Path, commands: list[list[str]], log: Path) -> None:
    """One command after the other, each in processes of its own, until one fails."""
    for command in commands:
        number = 1
        if command[0].startswith("@"):
            number, command = int(command[0][1:]), command[1:]
        port = free_port()
        processes = []
        for rank in range(number):
            environment = {}
            if number > 1:
                environment = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "RANK": rank}
                environment |= {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = forked.Process(target=execute, args=(tree, command, log, environment))
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        if any(process.exitcode != 0 for process in processes):
            sys.exit(1)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def execute(tree: Path, command: list[str], log: Path, environment: dict) -> None:
    """What `python COMMAND` does in `tree`; its output goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(file, f"$ {' '.join(command)}\n".encode())
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(tree)
    sys.path[0] = str(tree)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def commands_of(side: Side, name: str) -> list[list[str]]:
    """A run's commands, each as a list of words."""
    line = side.lines[name]
    for other in needed_by(line):
        line = re.sub(rf"\{{runs\}}/{folder_of(other)}(?=/)", str(side.out(other)), line)
    commands = []
    for text in line.split(" && "):
        words = [word.format(data=side.data, out=side.out(name)) for word in text.split()]
        commands.append(["" if word == "''" else word for word in words])
    return commands


def make_runs(side: Side, names: list[str], jobs: int, again: bool) -> dict[str, str]:
    """Make all runs that are not there, `jobs` at a time; what went wrong, by the names of runs."""
    failed: dict[str, str] = {}
    waiting = [name for name in names if again or not side.mark(name).is_file()]
    made = set(names) - set(waiting)
    running: dict[int, tuple[str, multiprocessing.Process, float]] = {}
    while waiting or running:
        for name in list(waiting):
            needs = needed_by(side.lines[name])
            if needs & failed.keys():
                waiting.remove(name)
                failed[name] = "builds on a run that failed"
            elif needs <= made and len(running) < jobs:
                waiting.remove(name)
                process = start(side, name)
                running[process.sentinel] = name, process, time.perf_counter()
        for sentinel in multiprocessing.connection.wait(list(running)) if running else ():
            name, process, began = running.pop(sentinel)
            process.join()
            seconds = time.perf_counter() - began
            if process.exitcode == 0:
                forget_optimizers(side.out(name))
                made.add(name)
                side.mark(name).touch()
            else:
                failed[name] = f"fails, see {side.log(name)}: {last_line(side.log(name))}"
            print(
                f"  {side.name}: {name}, {seconds:.1f} s{', FAILED' * (name in failed)}", flush=True
            )
    return failed


def start(side: Side, name: str) -> multiprocessing.Process:
    shutil.rmtree(side.out(name), ignore_errors=True)
    side.mark(name).unlink(missing_ok=True)
    side.log(name).unlink(missing_ok=True)
    side.out(name).mkdir(parents=True)
    commands = commands_of(side, name)
    process = forked.Process(target=perform, args=(side.tree, commands, side.log(name)))
    process.start()
    return process


def forget_optimizers(out: Path) -> None:
    """Keep the networks of checkpoints that nothing continues from: two thirds less on the disk."""
    import torch

    for path in out.rglob("last.pt"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        torch.save({"networks": state["networks"]}, path)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    return (said or lines or ["nothing was said"])[-1]


# ---------------------------------------------------------------------------------------- comparing
def renamed(text: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        text = re.sub(pattern, replacement, text)
    return text


def file_name(path: Path, folder: Path) -> str:
    return renamed(path.relative_to(folder).as_posix(), FILES)


def tensors_in(nest, place: str = "") -> dict:
    """Every tensor in a nest of dictionaries and lists, by its place."""
    import torch

    if isinstance(nest, torch.Tensor):
        return {place: nest}
    pairs = ()
    if isinstance(nest, dict):
        pairs = nest.items()
    elif isinstance(nest, (list, tuple)):
        pairs = enumerate(nest)
    found = {}
    for key, value in pairs:
        found.update(tensors_in(value, f"{place}.{key}" if place else str(key)))
    return found


def weights_of(folder: Path, name: str) -> dict:
    """The tensors of all networks in a run's checkpoints, by "<run>/<file>: <network>: <tensor>".

    A file without networks counts as one network with all its tensors."""
    import torch

    found = {}
    for path in sorted(folder.rglob("*.pt")):
        state = torch.load(path, map_location="cpu", weights_only=True)
        networks = state["networks"] if "networks" in state else {"": state}
        for network, weights in networks.items():
            for key, tensor in tensors_in(weights).items():
                found[f"{name}/{file_name(path, folder)}: {network}: {key}"] = tensor
    return found


def numbers_in(nest, place: str) -> dict:
    """Every number, True, False and None in a nest, by its place; of texts, masks' run lengths."""
    if isinstance(nest, dict):
        pairs = [(f"{place}.{key}", value) for key, value in nest.items()]
    elif isinstance(nest, list):
        pairs = [(f"{place}.{i}", value) for i, value in enumerate(nest)]
    elif isinstance(nest, str) and not place.endswith(".counts"):
        return {}
    else:
        return {} if IDLE.search(place) else {place.replace(": .", ": "): nest}
    found = {}
    for key, value in pairs:
        found.update(numbers_in(value, key))
    return found


def numbers_of(folder: Path) -> dict:
    """The numbers of all JSON files of a run but config.json, by "<file>: <key>.<key>..."."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        if path.name not in ("config.json", "pseudo_labels.json"):
            found.update(numbers_in(json.loads(path.read_text()), f"{file_name(path, folder)}: "))
    return found


def pictures_of(folder: Path) -> dict:
    """The predictions of a run that are kept as PNG files of class indices."""
    import numpy as np
    from PIL import Image

    found = {}
    for path in sorted(folder.glob("**/*.predictions/**/*.png")):
        if path.parent.name != "confidence":
            with Image.open(path) as picture:
                found[file_name(path, folder).replace("/labels/", "/")] = np.asarray(picture)
    return found


def same_tensor(a, b) -> bool:
    """Bit by bit: NaN equals itself, and 0 is not -0."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def tensor_distance(a, b) -> float:
    if a.shape != b.shape or not a.numel():
        return math.inf
    return (a.double() - b.double()).abs().max().item()


def same_picture(a, b) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def picture_distance(a, b) -> float:
    """The share of pixels that are not the same."""
    return float((a != b).mean()) if a.shape == b.shape else math.inf


def same_number(a, b) -> bool:
    return type(a) is type(b) and (a == b or (a != a and b != b))


def number_distance(a, b) -> float:
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
        return math.inf
    return abs(a - b)


def differences(kind: str, then: dict, now: dict, same, distance) -> list[str]:
    """A sentence when values of both versions are not the same: the first, and by how much."""
    places = [place for place in then if place in now and not same(then[place], now[place])]
    if not places:
        return []
    far = max(distance(then[place], now[place]) for place in places)
    first = places[0]
    if kind == "numbers":
        first += f" ({then[first]!r} then, {now[first]!r} now)"
    much = f", by {far:.2g} at most" if math.isfinite(far) else ""
    return [f"{len(places)} of {len(then)} {kind}{much}, first {first}"]


def network_of(place: str) -> str:
    return place.rpartition(": ")[0]


def lost_weights(then: dict, now: dict) -> list[str]:
    """Sentences on networks and tensors that one version has and the other has not."""
    found = []
    for here, there, when in [(then, now, "then"), (now, then, "now")]:
        known = {network_of(place) for place in there}
        lost = [
            p for p in here if p not in there and not any(re.search(one, p) for one in ONE_SIDED)
        ]
        networks = list(dict.fromkeys(network_of(p) for p in lost if network_of(p) not in known))
        tensors = [p for p in lost if network_of(p) in known]
        if networks:
            found.append(f"{len(networks)} networks only {when}, first {networks[0]}")
        if tensors:
            found.append(f"{len(tensors)} tensors only {when}, first {tensors[0]}")
    return found


def first_step(then: Path, now: Path) -> str:
    """The first line of a log in which a number of both logs differs: where the reason is."""
    for path in sorted(then.rglob("log.jsonl")):
        name = file_name(path, then)
        others = [p for p in now.rglob("log.jsonl") if file_name(p, now) == name]
        if not others:
            continue
        for a, b in zip(
            path.read_text().splitlines(), others[0].read_text().splitlines(), strict=False
        ):
            a, b = numbers_in(json.loads(a), ""), numbers_in(json.loads(b), "")
            b = {renamed(place, RENAMED): value for place, value in b.items()}
            for place in a.keys() & b.keys():
                if not same_number(a[place], b[place]):
                    step = a.get(".step")
                    values = f"{place[1:]} {a[place]} then, {b[place]} now"
                    return f"; {name}: first at step {step}, {values}"
    return ""


def compare(name: str, then: Path, now: Path) -> tuple[list[str], str]:
    """Sentences on what differs in a run, and what was compared."""
    weights_then = weights_of(then, name)
    weights_now = {renamed(k, TENSORS): v for k, v in weights_of(now, name).items()}
    numbers_then = numbers_of(then)
    numbers_now = {renamed(k, RENAMED): v for k, v in numbers_of(now).items()}
    pictures_then, pictures_now = pictures_of(then), pictures_of(now)
    wrong = lost_weights(weights_then, weights_now)
    wrong += differences("tensors", weights_then, weights_now, same_tensor, tensor_distance)
    wrong += differences("numbers", numbers_then, numbers_now, same_number, number_distance)
    wrong += differences("pictures", pictures_then, pictures_now, same_picture, picture_distance)
    if wrong:
        wrong[-1] += first_step(then, now)
    common = numbers_then.keys() & numbers_now.keys()
    if numbers_then and not common:
        wrong.append("no number has the same name in both versions, see RENAMED")
    if pictures_then and not pictures_then.keys() & pictures_now.keys():
        wrong.append("no predicted picture has the same name in both versions, see FILES")
    text = f"{len(weights_then.keys() & weights_now.keys())} tensors, {len(common)} numbers"
    if pictures_then:
        text += f", {len(pictures_then.keys() & pictures_now.keys())} pictures"
    for here, there, when in [(numbers_then, common, "then"), (numbers_now, common, "now")]:
        if len(here) > len(there):
            lost = next(place for place in here if place not in there)
            text += f", {len(here) - len(there)} numbers only {when} ({lost})"
    return wrong, text


def reason(name: str, table: dict[str, str]) -> str:
    """What a table of named changes says of a run; "" when it is not named."""
    for pattern, why in table.items():
        if fnmatch.fnmatch(name, pattern):
            return why
    return ""


def compare_data(base: Side, now: Side) -> tuple[list[str], str]:
    """The same of the drawn data: all files, and the weights of the pre-training."""
    if base.data == now.data:
        return [], "the same code has drawn them"
    then, new = drawn(base.data), drawn(now.data)
    lost = sorted(then.keys() ^ new.keys())
    wrong = [f"{len(lost)} files of one version only, first {lost[0]}"] if lost else []
    wrong += differences("files", then, new, lambda a, b: a == b, lambda a, b: math.inf)
    return wrong, f"{len(then)} files"


def drawn(data: Path) -> dict[str, bytes]:
    """What the drawing code wrote, by file; of weights the values alone."""
    found = {}
    for path in sorted(data.rglob("*")):
        name = path.relative_to(data).as_posix()
        if path.suffix in (".jpg", ".png", ".json", ".txt") and not name.startswith("weights/"):
            found[name] = b"" if path.name == "version.txt" else path.read_bytes()
            if path.suffix == ".json":  # the order of keys is free
                found[name] = json.dumps(json.loads(found[name]), sort_keys=True).encode()
        elif path.suffix == ".pth":
            import torch

            for key, tensor in torch.load(path, weights_only=True).items():
                found[f"{name}: {key}"] = tensor.numpy().tobytes()
    return found


def report(base: Side, now: Side, names: list[str], failed: dict[str, str]) -> int:
    """Print the table; the number of runs that are not as they should be."""
    bad = 0
    counts = {"equal": 0, "as named": 0, "gone": 0}
    for name in ["drawn data", *names]:
        wrong, text = [], ""
        why = reason(name, EXPECTED)
        if name in GONE:
            counts["gone"] += 1
            print(f"{name:24} gone: {GONE[name]}")
            continue
        if name in failed:
            wrong = [failed[name]]
            why = ""
        elif name == "drawn data":
            wrong, text = compare_data(base, now)
        else:
            wrong, text = compare(name, base.out(name), now.out(name))
        if wrong and why:
            counts["as named"] += 1
            print(f"{name:24} differs, as named: {why} ({'; '.join(wrong)})")
        elif wrong:
            bad += 1
            print(f"{name:24} DIFFERS: {'; '.join(wrong)}")
        else:
            counts["equal"] += 1
            print(f"{name:24} equal: {text}" + f"; BUT IT IS NAMED TO DIFFER: {why}" * bool(why))
    print(
        f"\n{counts['equal']} equal, {counts['as named']} differ as named, {counts['gone']} gone,"
        f" {bad} differ or fail"
    )
    return bad


# --------------------------------------------------------------------------------------------- main
def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", help="the commit to compare with")
    parser.add_argument(
        "--now", default="", help="another commit; without it, the working tree as it is"
    )
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="NAME", help="runs, by name or pattern"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--again", action="store_true", help="make the runs of BASE again")
    parser.add_argument(
        "--shared-data", action="store_true", help="let both versions read what BASE draws"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the newer version's runs, and say where"
    )
    parser.add_argument("--list", action="store_true", help="print the runs and make none")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "witness")
    args = parser.parse_args()
    if not args.base and not args.list:
        parser.error("name a commit to compare with")
    return args


def machine() -> str:
    """What the results of a commit depend on besides the commit."""
    import torch

    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {sys.version_info[:2]}"


def main() -> int:
    args = settings()
    names = chosen(args.only)
    if args.list:
        for name in names:
            print(
                f"{name}\n    {RUNS[name]}"
                + f"\n    now: {line_now(name)}" * (line_now(name) != RUNS[name])
            )
        return 0
    preload()
    cache = args.cache.resolve()
    commit = git("rev-parse", "--verify", f"{args.base}^{{commit}}").decode().strip()
    key = hashlib.sha256(f"{commit} {machine()}".encode()).hexdigest()[:12]
    began = time.perf_counter()
    folder = cache / f"base-{key}"
    with alone(folder):
        if not (folder / "tree").is_dir():
            shutil.rmtree(folder / "tree.tmp", ignore_errors=True)
            check_out(commit, folder / "tree.tmp")
            (folder / "tree.tmp").rename(folder / "tree")
        data = draw(folder / "tree", cache)
        base = Side("base", folder / "tree", data, folder / "runs", RUNS)
        failed = {
            n: f"base {why}" for n, why in make_runs(base, names, args.jobs, args.again).items()
        }
    with contextlib.ExitStack() as stack:
        if args.keep:
            folder = Path(tempfile.mkdtemp(prefix="now-", dir=cache))
        else:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="now-", dir=cache))
            )
        check_out(args.now, folder / "tree")
        data = base.data if args.shared_data else draw(folder / "tree", cache)
        now = Side("now", folder / "tree", data, folder / "runs", {n: line_now(n) for n in names})
        left = [name for name in names if name not in failed and name not in GONE]
        failed.update(make_runs(now, left, args.jobs, again=True))
        print()
        bad = report(base, now, names, failed)
        print(
            f"{time.perf_counter() - began:.0f} s"
            + f"; the newer version's runs are in {folder}" * args.keep
        )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
