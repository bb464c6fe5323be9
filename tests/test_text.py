"""What can be checked by reading: the docstring's map, departures, copied blocks, budgets, commands
in documents."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


BUDGETS = {
    "gta_seg.py": 750,
    "gist_rist.py": 900,
    "guided_distillation.py": 1250,
    "better_pseudo_labels.py": 1500,
}


SCRIPTS = [name for name in BUDGETS if (ROOT / name).is_file()]


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]


def names_defined(tree: ast.Module) -> set[str]:
    return {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstring_map_leads_to_functions(script):
    tree = ast.parse((ROOT / script).read_text())
    rows = [
        re.split(r"\s{2,}", line.strip(), maxsplit=1)
        for line in ast.get_docstring(tree).splitlines()
        if re.match(r"\s*(Sec|Eq|Eqs|Algorithm|Table|Tables|\(not)\b.*\s{2,}\S", line)
    ]
    assert len(rows) >= 10
    defined = names_defined(tree)
    for row in rows:
        here = re.split(r"\s{2,}", row[-1])[-1]
        words = set(re.findall(r"[A-Za-z_]\w+", here))
        assert words & defined, f"the row {row} names no function or class of {script}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_of_the_map_stands_in_the_code(script):
    tree = ast.parse((ROOT / script).read_text())
    code = (ROOT / script).read_text().split('"""', 2)[2]
    numbers = set()
    for first, last in re.findall(r"Eqs?\. ([\d, ]+)(?:and (\d+))?", ast.get_docstring(tree)):
        numbers |= {int(n) for n in re.findall(r"\d+", f"{first} {last}")}
    cited = {
        int(n)
        for text in re.findall(r"Eqs?\. ([\d, and]+)", code)
        for n in re.findall(r"\d+", text)
    }
    for low, high in re.findall(r"Eqs\. (\d+) to (\d+)", code):
        cited |= set(range(int(low), int(high) + 1))
    assert len(numbers) >= 5 and numbers <= cited, (
        f"in the map but not beside code: {sorted(numbers - cited)}"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_departures_are_documented(script):
    page = (ROOT / "docs" / script.replace(".py", ".md")).read_text()
    marks = set(re.findall(r"DEPARTS\[([\w-]+)\]", (ROOT / script).read_text())) - {"name"}
    assert marks
    for mark in marks:
        assert f"`[{mark}]`" in page, f"docs do not explain DEPARTS[{mark}]"
    for mark in set(re.findall(r"`\[([\w-]+)\]`", page)):
        assert mark in marks, f"docs explain [{mark}], which {script} does not carry"


def same_as_marks() -> list[tuple[str, str, str]]:
    """(script, name, other script) of every block under a comment `# SAME AS other.py`."""
    marks = []
    for script in SCRIPTS:
        found = re.finditer(
            r"# SAME AS (\S+\.py)\n(?:@.*\n)*(?:def|class) (\w+)", (ROOT / script).read_text()
        )
        marks += [(script, m.group(2), m.group(1)) for m in found]
    return marks


def test_copied_blocks_are_equal():
    def block(script: str, name: str) -> str:
        nodes = ast.parse((ROOT / script).read_text()).body
        return ast.dump(next(node for node in nodes if getattr(node, "name", None) == name))

    for here, name, there in same_as_marks():
        assert block(here, name) == block(there, name), (
            f"{name} of {here} is not the one of {there}"
        )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_keep_their_budget(script):
    assert len((ROOT / script).read_text().splitlines()) <= BUDGETS[script]


def test_common_keeps_its_budget_and_its_place():
    files = sorted((ROOT / "common").glob("*.py"))
    assert sum(len(f.read_text().splitlines()) for f in files) <= 1200
    modules = {Path(name).stem for name in BUDGETS}
    for path in files + [ROOT / script for script in SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not modules & {name.split(".")[0] for name in names}, f"{path} imports a script"


def test_lines_fit_and_nothing_names_this_machine():
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        if (
            not name.endswith((".py", ".md", ".txt", ".toml", ".cff", "Makefile"))
            or not (ROOT / name).is_file()
        ):
            continue
        text = (ROOT / name).read_text()
        assert not re.search(
            r"/(work|farm|tmp/bash_jobs|root)/", text.replace("/root/splits", "")
        ), name
        if name.endswith(".py"):
            assert all(len(line) <= 120 for line in text.splitlines()), name


def commands() -> list[tuple[str, str]]:
    """(document, command line) of every line in a code block that starts one of our programs."""
    found = []
    for document in DOCUMENTS:
        if not document.is_file():
            continue
        for block in re.findall(r"```\w*\n(.*?)```", document.read_text(), re.S):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [
                (document.name, line.strip())
                for line in lines
                if re.match(
                    r"\s*(\w+=\S+ )*(srun .*|torchrun|python3?|make|\.venv/bin/python)\b", line
                )
            ]
    return found


def test_documents_hold_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize("document, command", sorted(set(commands())))
def test_commands_in_documents_parse(document, command):
    """Flags exist, values are of their type, files and make targets are there."""
    command = re.split(r" # | \| | && | > | &$", command + " ")[0].removesuffix(" & ")
    words = [w for w in shlex.split(command) if not re.match(r"^\w+=\S*$", w)]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(w in targets for w in words[1:] if "=" not in w)
        return
    script = next((w for w in words if w.endswith(".py")), None)
    if script in SCRIPTS:
        import tyro

        module = __import__(script.removesuffix(".py"))
        flags = words[words.index(script) + 1 :]
        if any(w in flags for w in ("--eval", "--predict")):
            known = {f"--{name.replace('_', '-')}" for name in vars(module.Args())}
            assert {w for w in flags if w.startswith("--")} <= known
            return
        chosen = {
            k: flags[flags.index(f"--{k}") + 1] for k in ("dataset", "recipe") if f"--{k}" in flags
        }
        flags = [re.sub(r"\$\{?\w+\}?", "0", w) for w in flags]
        tyro.cli(module.Args, default=module.settings(**chosen), args=flags)
    elif script:
        assert (ROOT / script).is_file(), script
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        assert (
            module in ("venv", "pip", "pytest", "ruff")
            or (ROOT / (module.replace(".", "/") + ".py")).is_file()
        )


def test_help_works_offline():
    result = subprocess.run(
        [sys.executable, "gta_seg.py", "--dataset", "shapes", "--help"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0 and "--split" in result.stdout and "test_resnet" in result.stdout
