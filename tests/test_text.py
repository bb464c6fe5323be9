"""What can be checked by reading: the docstrings' maps, departures, help texts, names and commands
in documents."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import helpers
import pytest
from helpers import REPO

SCRIPTS = ["gta_seg", "gist_rist", "guided_distillation", "better_pseudo_labels"]
each_script = pytest.mark.parametrize("script", SCRIPTS)
DOCUMENTS = [*sorted(REPO.glob("*.md")), *sorted(REPO.glob("docs/*.md")), REPO / "data/README.md"]


@cache
def source(script: str) -> str:
    return (REPO / f"{script}.py").read_text()


@cache
def tree(script: str) -> ast.Module:
    return ast.parse(source(script))


def page(script: str) -> str:
    return (REPO / "docs" / f"{script}.md").read_text()


@cache
def fields(script: str) -> tuple[str, ...]:
    """The settings of a script, in their order."""
    args = next(n for n in tree(script).body if getattr(n, "name", None) == "Args")
    return tuple(n.target.id for n in args.body if isinstance(n, ast.AnnAssign))


# --------------------------------------------------------------------------- the docstring's map
# What each paper numbers. Of the figures, those that show a measurement.
PAPERS = {
    "gta_seg": {"Eq": range(1, 13), "Algorithm": [1], "Table": range(1, 10)},
    "gist_rist": {
        "Eq": range(1, 10),
        "Algorithm": [1, 2],
        "Table": range(1, 6),
        "Fig": [1, 6, 7],
    },
    "guided_distillation": {"Eq": range(1, 6), "Table": range(1, 8), "Fig": [6]},
    "better_pseudo_labels": {"Eq": range(1, 6), "Table": [1], "Fig": [2, 3, 4]},
}
ROMAN = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6}


class Row(NamedTuple):
    """A row of the table "paper, this file" in a script's docstring."""

    paper: str  # where in the paper, and what stands there
    here: list[str]  # what computes it: names, --flags, files


def rows(docstring: str) -> list[Row]:
    lines = docstring.splitlines()
    head = next(
        i for i, line in enumerate(lines) if re.match(r"\s*paper\s{2,}.*(here|this file)$", line)
    )
    indent = len(lines[head]) - len(lines[head].lstrip())
    joined = []
    for line in lines[head + 1 :]:
        if not line.strip():
            break
        if len(line) - len(line.lstrip()) > indent:
            joined[-1] += " " + line.strip()  # goes on
        else:
            joined.append(line.strip())
    table = []
    for line in joined:
        *paper, here = re.split(r"\s{2,}", line)
        names = re.split(r"[,;]", re.sub(r"\([^)]*\)", "", here))
        table.append(Row(" ".join(paper), [name.strip() for name in names if name.strip()]))
    return table


def numbers(paper: str) -> dict[str, set[int]]:
    """ "Eqs. 4, 8 to 10; Table II" -> {"Eq": {4, 8, 9, 10}, "Table": {2}}."""
    found, kind, last, through = {}, None, None, False
    for word in re.findall(r"[A-Za-z]+|\d+|[-–]", paper):
        number = int(word) if word.isdigit() else ROMAN.get(word)
        if number is not None and kind:
            start = last + 1 if through else number
            found.setdefault(kind, set()).update(range(start, number + 1))
            last, through = number, False
        elif word in ("to", "-", "–") and last is not None:
            through = True
        elif word.removesuffix("s") in ("Eq", "Algorithm", "Table", "Fig", "Sec", "line"):
            kind, last, through = word.removesuffix("s"), None, False
    return found


def test_numbers_are_read_as_a_reader_does():
    read = numbers(
        "Eqs. 4, 8 to 10 and 12; Table II, Figs. 2-4 and Sec. 4.1, Algorithm 1, lines 3 to 5"
    )
    assert read["Eq"] == {4, 8, 9, 10, 12} and read["Table"] == {2} and read["Fig"] == {2, 3, 4}
    assert read["Algorithm"] == {1}


@cache
def names_of(script: str) -> set[str]:
    """Functions, classes, constants; of classes also `Class.member`."""
    names = set()
    for node in tree(script).body:
        if isinstance(node, ast.Assign):
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef):
                    names.add(f"{node.name}.{part.name}")
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    names.add(f"{node.name}.{part.target.id}")
                elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                    names.add(f"{node.name}.{part.attr}")
    return names


def exists(name: str, script: str) -> bool:
    """Is this word of a row something that a reader finds?"""
    if name.startswith("--"):
        return name[2:].split()[0].replace("-", "_") in fields(script)
    if "/" in name:
        return (REPO / name).is_file()
    return name in names_of(script)


@each_script
def test_every_name_in_the_docstrings_map_exists(script):
    table = rows(ast.get_docstring(tree(script)))
    assert len(table) >= 10
    lost = [(row.paper, name) for row in table for name in row.here if not exists(name, script)]
    assert lost == []
    assert all(row.here for row in table)


@each_script
def test_the_map_has_a_row_for_everything_that_the_paper_numbers(script):
    table = rows(ast.get_docstring(tree(script)))
    for kind, wanted in PAPERS[script].items():
        found = set().union(*(numbers(row.paper).get(kind, set()) for row in table))
        assert set(wanted) <= found, f"{kind}: {sorted(set(wanted) - found)} has no row"


@each_script
def test_every_equation_of_the_paper_is_cited_beside_code(script):
    code = source(script).split('"""', 2)[2]
    cited = set()
    for text in re.findall(r"Eqs?\. [\d, andto]+", code):
        cited |= numbers(text).get("Eq", set())
    lost = set(PAPERS[script]["Eq"]) - cited
    assert not lost, f"Eqs. {sorted(lost)} stand in the map, but not beside code"


def test_a_lost_name_is_found():
    table = rows(
        "X.\n\n    paper   this file\n    Eq. 1   sum   gone (here),\n            Args\n\nEnd"
    )
    assert table == [Row("Eq. 1 sum", ["gone", "Args"])]
    assert not exists("gone", "gta_seg") and exists("Args", "gta_seg")
    assert exists("--steps", "gta_seg") and not exists("--gone", "gta_seg")
    assert exists("docs/gta_seg.md", "gta_seg") and not exists("docs/gone.md", "gta_seg")


# ---------------------------------------------------------------------------------- departures
@each_script
def test_departures_are_marked_and_explained(script):
    marks = set(re.findall(r"DEPARTS\[([\w-]+)\]", source(script))) - {"name"}
    explained = set(re.findall(r"`\[([\w-]+)\]`", page(script)))
    assert marks
    assert marks - explained == set(), "marked in the code, not explained on the page"
    assert explained - marks == set(), "explained on the page, not marked in the code"


# ---------------------------------------------------------------------------------------- settings
def help_texts(script: str) -> dict[str, str]:
    """The comment behind or directly above each setting."""
    lines = source(script).splitlines()
    args = next(n for n in tree(script).body if getattr(n, "name", None) == "Args")
    texts = {}
    for node in args.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above, number = [], node.lineno - 2
        while lines[number].strip().startswith("#"):
            above.insert(0, lines[number].strip(" #"))
            number -= 1
        behind = lines[node.end_lineno - 1].partition("  # ")[2]
        texts[node.target.id] = " ".join([*above, behind]).strip()
    return texts


@each_script
def test_every_setting_has_a_help_text_of_its_own(script):
    texts = help_texts(script)
    assert len(texts) > 20
    assert [name for name, text in texts.items() if len(text) < 5] == []
    same = [name for name, text in texts.items() if list(texts.values()).count(text) > 1]
    assert same == []


@each_script
def test_help_begins_with_what_the_script_is(script, capsys):
    import tyro

    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as left:
        tyro.cli(module.Args, default=module.settings(dataset="shapes"), args=["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    said = shown.split(" options")[0]  # what stands above the table of flags
    words = " ".join(said.lower().split())
    assert "segmentation" in words and "label" in words, f"--help begins with: {said}"
    flags = {f"--{name.replace('_', '-')}" for name in fields(script)}
    assert [flag for flag in flags if flag not in shown] == []


# ------------------------------------------------------------------------------------------- files
def tracked() -> list[Path]:
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    found = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [REPO / name for name in found.split() if (REPO / name).is_file()]


def test_lines_fit_and_nothing_names_a_machine():
    endings = (".py", ".md", ".txt", ".toml", ".cff", ".yml", ".yaml", "Makefile")
    for file in tracked():
        if not file.name.endswith(endings):
            continue
        text = file.read_text()
        paths = re.findall(r"(?<![\w.])/(?:work|farm|home|root)/\S*", text)
        assert [p for p in paths if not p.startswith("/root/splits")] == [], file
        if file.suffix == ".py":
            assert max(map(len, text.splitlines()), default=0) <= 100, file


def test_the_code_is_formatted():
    line = [sys.executable, "-m", "ruff", "format", "--check", "."]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --------------------------------------------------------------------------------------- documents
@cache
def all_sources() -> str:
    files = [
        *REPO.glob("*.py"),
        *(f for room in ("common", "data", "docs") for f in REPO.glob(f"{room}/*.py")),
    ]
    return "\n".join(file.read_text() for file in files)


@each_script
def test_names_on_the_scripts_page_exist(script):
    """`name(...)` is a function or class of the script, a room or a library that the script
    calls; `some_name` stands somewhere in the code."""
    text = re.sub(r"```.*?```", "", page(script), flags=re.S)
    called = set(re.findall(r"`(?:\w+\.)*(\w+)\([^`]*`", text))
    named = set(re.findall(r"`([a-z]\w*_\w+)`", text))
    lost = [name for name in called | named if not re.search(rf"\b{name}\b", all_sources())]
    assert sorted(lost) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(REPO)))
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    own = [link for link in links if not re.match(r"\w+:", link)]
    assert [link for link in own if not (document.parent / link).exists()] == []


def commands() -> list[tuple[str, str]]:
    """(document, command line) of every line in a code block that starts one of our programs."""
    starts = r"\s*(\w+=\S+ )*(srun .*|torchrun|python3?|make|\.venv/bin/python)\b"
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```\w*\n(.*?)```", document.read_text(), re.S):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [(document.name, line.strip()) for line in lines if re.match(starts, line)]
    return found


def test_documents_hold_commands():
    assert len(commands()) >= 10


def words_of(command: str) -> list[str]:
    """A command line without comment, pipes and settings of the environment."""
    command = re.split(r" # | \| | && | > | &$", command + " ")[0].removesuffix(" & ")
    return [word for word in shlex.split(command) if not re.match(r"^\w+=\S*$", word)]


def parse(script: str, flags: list[str]):
    """The settings that this line of flags gives, through the script's own parser."""
    import tyro

    module = importlib.import_module(script)
    flags = [re.sub(r"\$\{?\w+\}?", "0", word) for word in flags]
    choosers = set(module.CHOOSERS) - {"eval", "predict", "export", "report"}
    chosen = {k: flags[flags.index(f"--{k}") + 1] for k in choosers if f"--{k}" in flags}
    return tyro.cli(module.Args, default=module.settings(**chosen), args=flags)


@pytest.mark.parametrize("document, command", sorted(set(commands())))
def test_commands_in_documents_parse(document, command):
    """Flags exist, values are of their type, files and make targets are there."""
    words = words_of(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M)
        assert all(word in targets for word in words[1:] if "=" not in word)
        return
    file = next((word for word in words if word.endswith(".py")), None)
    if file and file.removesuffix(".py") in SCRIPTS:
        script, flags = file.removesuffix(".py"), words[words.index(file) + 1 :]
        if any(word in flags for word in ("--eval", "--predict", "--report")):
            # whose settings come from a checkpoint
            named = [w[2:].replace("-", "_") for w in flags if w.startswith("--")]
            assert set(named) <= set(fields(script))
        else:
            parse(script, flags)
    elif file:
        assert (REPO / file).is_file(), file
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        known = ("venv", "pip", "pytest", "ruff", "pre_commit")
        assert module in known or (REPO / (module.replace(".", "/") + ".py")).is_file()


def test_help_works_offline():
    done = helpers.command(["gta_seg.py", "--dataset", "shapes", "--help"]).ok()
    assert "--split" in done.out and "test_resnet" in done.out
