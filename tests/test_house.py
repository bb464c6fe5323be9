"""The house of DESIGN: who may import whom, a script with common/ alone, copies that are declared,
and what is loaded before it is needed."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import REPO, environment

SCRIPTS = ["gta_seg", "gist_rist", "guided_distillation", "better_pseudo_labels"]

# What the files of each room may import from the house. A script is a room of its own.
MAY_IMPORT = {
    "common": {"common"},
    "data": {"data", "common"},
    "docs": {"common"},
    "scripts": {"data", "common"},
    "tests": {"scripts", "data", "common", "tests"},
}


# ------------------------------------------------------------------------------------------- layers
def modules_of(root: Path) -> dict[str, Path]:
    """Every file of the house by the name that Python imports it by."""
    files = [*root.glob("*.py"), *(f for room in MAY_IMPORT for f in root.glob(f"{room}/**/*.py"))]
    modules = {}
    for file in files:
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = file
    return modules


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return first if first in MAY_IMPORT else "scripts"


def imports_of(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the house that a file imports, at its head or within functions."""
    asked = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            members = {f"{source}.{alias.name}" for alias in node.names} & modules.keys()
            asked |= members or {source}
    if room_of(name) == "tests":  # whose files lie on the path
        asked |= {f"tests.{module}" for module in asked}
    return (asked & modules.keys()) - {name}


def faults_of(root: Path) -> list[str]:
    """Imports that the layers forbid, and circles."""
    modules = modules_of(root)
    imports = {name: imports_of(name, file, modules) for name, file in modules.items()}
    faults = []
    for name, others in imports.items():
        for other in sorted(others):
            if room_of(other) not in MAY_IMPORT[room_of(name)]:
                faults.append(f"{name} imports {other}")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        faults.append(f"circle: {' -> '.join(error.args[1])}")
    return faults


def test_arrows_run_one_way():
    assert len(modules_of(REPO)) > 30
    assert faults_of(REPO) == []


HOUSE = {
    "script.py": "import os\nfrom common import files\n",
    "other.py": "from data import shapes\n",
    "common/__init__.py": "",
    "common/files.py": "from common.errors import UserError\n",
    "common/errors.py": "import torch\n",
    "data/__init__.py": "",
    "data/shapes.py": "from common.files import UserError\n",
    "docs/compare.py": "def main():\n    from common import files\n",
    "tests/helpers.py": "import script\n",
    "tests/test_script.py": "import helpers\nimport other\n",
}


def plant(root: Path, **changed: str) -> Path:
    for name, text in (HOUSE | changed).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_good_house_has_no_faults(tmp_path):
    assert faults_of(plant(tmp_path)) == []


@pytest.mark.parametrize(
    "file, text, fault",
    [
        ("common/errors.py", "import script\n", "common.errors imports script"),
        ("common/errors.py", "def f():\n    import script\n", "common.errors imports script"),
        ("common/errors.py", "from data import shapes\n", "common.errors imports data.shapes"),
        ("common/errors.py", "from data.shapes import draw\n", "common.errors imports data.shapes"),
        ("common/errors.py", "from ..data import shapes\n", "common.errors imports data.shapes"),
        ("common/errors.py", "import data\n", "common.errors imports data"),
        ("data/shapes.py", "from script import Args\n", "data.shapes imports script"),
        ("script.py", "from other import step\n", "script imports other"),
        ("script.py", "from docs import compare\n", "script imports docs.compare"),
        ("script.py", "def f():\n    from docs import compare\n", "script imports docs.compare"),
        ("data/shapes.py", "import docs.compare\n", "data.shapes imports docs.compare"),
        ("common/errors.py", "import docs.compare as c\n", "common.errors imports docs.compare"),
        ("tests/helpers.py", "from docs import compare\n", "tests.helpers imports docs.compare"),
        ("docs/compare.py", "import script\n", "docs.compare imports script"),
        ("script.py", "from tests import helpers\n", "script imports tests.helpers"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, text, fault):
    assert fault in faults_of(plant(tmp_path, **{file: text}))


@pytest.mark.parametrize(
    "text", ["from common import files\n", "def f():\n    import common.files\n"]
)
def test_a_circle_is_found(tmp_path, text):
    (fault,) = faults_of(plant(tmp_path, **{"common/errors.py": text}))
    assert fault.startswith("circle: ") and {"common.files", "common.errors"} <= set(fault.split())


# ------------------------------------------------------------------------------------ stands alone
# Two steps of a tiny network with random weights.
SMALL = "--backbone test_resnet --weights none --workers 0 --steps 2 --device cpu --split random:4"
MASK2FORMER = (
    "--width 64 --encoder-layers 1 --decoder-layers 2 --queries 8 --points 64 --crop-size 64 64"
)
CASCADE = "--image-size 64 --width 32 --fc 64 --teacher-steps 2 --teacher-batch-size 2"
ALONE = {
    "gta_seg": "--dataset folder --width 8 --crop-size 32 --batch-size 4 --warmup-epochs 0",
    "gist_rist": "--dataset folder --crop-size 32 32 --batch-size 4 --bn live --stage0-steps 2 "
    "--dev-size 2 --search gist --stages 1",
    "guided_distillation": f"--dataset coco {MASK2FORMER} --test-size 96 96 --batch-size 2",
    "better_pseudo_labels": f"--dataset coco {CASCADE} --batch-size 2",
}


@pytest.fixture
def alone(tmp_path):
    """alone(NAME) -> a folder that holds this script, common/ and nothing else."""

    def copy(name: str) -> Path:
        folder = tmp_path / "alone"
        folder.mkdir()
        shutil.copy(REPO / f"{name}.py", folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / "common", folder / "common", ignore=ignored)
        return folder

    return copy


def typed(line: list[str], folder: Path) -> subprocess.CompletedProcess:
    """python LINE in this folder, which sees nothing of the repository."""
    environ = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *line], cwd=folder, env=environ, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_common_beside_it_trains(name, alone, folder_root, tmp_path):
    folder = alone(name)
    root = folder_root
    if "coco" in ALONE[name]:
        from data import shapes

        root = shapes.make_coco(tmp_path / "coco", train=8, val=2)
    flags = f"{ALONE[name]} {SMALL} --root {root} --out run".split()
    done = typed([f"{name}.py", *flags], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run" / "results.json").is_file()


# ----------------------------------------------------------------------------------- loaded lazily
# Each takes as long to import as torch itself, or loads what does (torchvision loads dynamo).
LATER = {
    "torch._dynamo",
    "torchvision",
    "timm",
    "matplotlib",
    "faiss",
    "scipy",
    "pycocotools",
    "hotcoco",
}


def loaded(line: list[str], folder: Path) -> set[str]:
    """The modules that `python LINE` imports; it must end well."""
    done = typed(["-X", "importtime", *line], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(re.findall(r"^import time:.*\|\s*([\w.]+)$", done.stderr, re.M))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_loads_nothing_that_is_needed_later(name, alone):
    modules = loaded([f"{name}.py", "--help"], alone(name))
    assert {"torch", "tyro"} <= modules
    assert modules & LATER == set()


# ------------------------------------------------------------------------------------------- copies
def program_files(root: Path = REPO) -> list[Path]:
    return [*sorted(root.glob("*.py")), *sorted(root.glob("common/*.py")), *root.glob("data/*.py")]


def first_line(node: ast.AST) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def definition(file: Path, name: str) -> ast.AST:
    named = [n for n in ast.walk(ast.parse(file.read_text())) if getattr(n, "name", None) == name]
    assert named, f"{file.name} defines no {name}"
    return named[0]


def declared_copies(root: Path = REPO) -> list[tuple[Path, ast.AST, str, str]]:
    """(file, copy, other file, name there) of every block under `# SAME AS other.py:name`."""
    copies = []
    for file in program_files(root):
        text = file.read_text()
        nodes = [n for n in ast.walk(ast.parse(text)) if hasattr(n, "name") and hasattr(n, "body")]
        for number, line in enumerate(text.splitlines(), 1):
            mark = re.match(r"\s*# SAME AS ([\w/]+\.py)(?::(\w+))?", line)
            if mark is None:
                continue
            below = min((n for n in nodes if first_line(n) > number), key=first_line, default=None)
            between = text.splitlines()[number : first_line(below) - 1] if below else ["nothing"]
            told = all(entry.strip().startswith("#") for entry in between)
            assert told, f"{file.name}:{number}: SAME AS stands above no function or class"
            copies.append((file, below, mark[1], mark[2] or below.name))
    return copies


def unequal_copies(root: Path) -> list[str]:
    return [
        f"{copy.name} of {file.name} is not {name} of {other}"
        for file, copy, other, name in declared_copies(root)
        if ast.dump(copy) != ast.dump(definition(root / other, name))
    ]


def test_declared_copies_are_equal():
    assert unequal_copies(REPO) == []


def test_an_unequal_copy_is_found(tmp_path):
    (tmp_path / "a.py").write_text("def f(x):\n    return x\n")
    (tmp_path / "b.py").write_text("# SAME AS a.py:f\n@torch.no_grad()\ndef f(x):\n    return x\n")
    assert unequal_copies(tmp_path) == ["f of b.py is not f of a.py"]
    (tmp_path / "b.py").write_text("# SAME AS a.py:f\ndef f(x):\n    return x\n")
    assert unequal_copies(tmp_path) == []


def lines_of_code(file: Path, skipped: set[int]) -> list[tuple[int, str]]:
    """Number and text of the lines that say something: without blanks, comments, docstrings,
    imports and lone brackets, and without settings, which the four scripts name alike."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        settings = isinstance(node, ast.ClassDef) and node.name == "Args"
        if isinstance(node, (ast.Import, ast.ImportFrom)) or docstring or settings:
            skipped = skipped | set(range(node.lineno, node.end_lineno + 1))
    lines = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.split("  #")[0].strip()
        if number not in skipped and re.search(r"\w", text) and not text.startswith("#"):
            lines.append((number, text))
    return lines


def repeated(root: Path, length: int = 6) -> list[str]:
    """Pairs of places that share `length` lines, and of which none is declared a copy."""
    declared = defaultdict(set)
    for file, node, _, _ in declared_copies(root):
        declared[file] |= set(range(first_line(node), node.end_lineno + 1))
    places = defaultdict(list)
    for file in program_files(root):
        lines = lines_of_code(file, declared[file])
        for i in range(len(lines) - length + 1):
            block = tuple(text for _, text in lines[i : i + length])
            places[block].append(f"{file.relative_to(root)}:{lines[i][0]}")
    return sorted({" and ".join(found) for found in places.values() if len(found) > 1})


def test_no_six_lines_stand_in_two_places():
    assert repeated(REPO) == []


def test_six_equal_lines_are_found_unless_declared(tmp_path):
    body = "".join(f"    x = step{i}(x)\n" for i in range(6))
    (tmp_path / "a.py").write_text(f"import os\n\n\ndef f(x):\n{body}")
    copy = f"def f(x):\n    # a word\n{body}"
    (tmp_path / "b.py").write_text(copy)
    assert repeated(tmp_path) == ["a.py:4 and b.py:1", "a.py:5 and b.py:3"]
    (tmp_path / "b.py").write_text("# SAME AS a.py:f\n" + copy)
    assert repeated(tmp_path) == []
