"""Pieces of the scripts work elsewhere: each is cut out, pasted into an empty file, and run."""

import ast
import builtins
import importlib.util
import re
import types
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import REPO
from smoke_calls import CALLS
from test_text import SCRIPTS, each_script, numbers, page, rows, source, tree

# What an empty file needs of libraries, whatever is pasted into it.
FREE_IMPORTS = """
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""
OF_THE_HOUSE = ("common", "data", "docs", "tests")


# ----------------------------------------------------------------------------------- cutting out
class Definitions:
    """The functions, classes and constants of a file, by name."""

    def __init__(self, text: str):
        self.text, self.nodes = text, {}
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.nodes[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            self.nodes[name.id] = node

    def cut(self, name: str) -> str:
        """The source of a definition, with its decorators."""
        node = self.nodes[name]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(self.text.splitlines()[first - 1 : node.end_lineno])

    def is_constant(self, name: str) -> bool:
        return isinstance(self.nodes[name], (ast.Assign, ast.AnnAssign))

    def is_record(self, name: str) -> bool:
        """A named tuple is a type that is handed in, not a helper."""
        node = self.nodes[name]
        bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
        return bases == ["NamedTuple"]


def needs(node: ast.AST) -> set[str]:
    """The global names that a definition reads when it runs: not its annotations, which nobody
    reads under `from __future__ import annotations`."""
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.arg, ast.AnnAssign)):
            if hasattr(part, "annotation"):
                part.annotation = ast.Constant(None)
            if hasattr(part, "returns"):
                part.returns = None
    read, bound = set(), set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            (read if isinstance(part.ctx, ast.Load) else bound).add(part.id)
        elif isinstance(part, ast.arg):
            bound.add(part.arg)
        elif isinstance(part, (ast.FunctionDef, ast.ClassDef)) and part is not node:
            bound.add(part.name)
        elif isinstance(part, ast.alias):
            bound.add((part.asname or part.name).split(".")[0])
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        bound = set()
    return read - bound - set(dir(builtins))


@cache
def definitions(script: str) -> Definitions:
    return Definitions(source(script))


@cache
def records_of_rooms(script: str) -> dict[str, Definitions]:
    """Name -> file of the named tuples that a script imports from common/."""
    found = {}
    for node in tree(script).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common."):
            room = Definitions((REPO / (node.module.replace(".", "/") + ".py")).read_text())
            for alias in node.names:
                if alias.name in room.nodes and room.is_record(alias.name):
                    found[alias.name] = room
    return found


def paste(file: Path, blocks: list[str]) -> types.ModuleType:
    """A new file of these blocks, imported."""
    text = "\n\n\n".join(["from __future__ import annotations", FREE_IMPORTS, *blocks])
    file.write_text(text + "\n")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script: str, name: str, module: types.ModuleType) -> None:
    """The smoke call of a piece: it runs, and what it returns is finite."""
    assert name in CALLS[script], f"tests/smoke_calls.py has no call of {name} of {script}.py"
    torch.manual_seed(0)
    returned = CALLS[script][name](module)
    values = [v for v in flat(returned) if v.is_floating_point()]
    assert all(torch.isfinite(v).all() for v in values)


def flat(nest) -> list[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        return [nest]
    if isinstance(nest, dict):
        nest = nest.values()
    if isinstance(nest, (str, bytes)) or not hasattr(nest, "__iter__"):
        return []
    return [tensor for part in nest for tensor in flat(part)]


# ------------------------------------------------------------------------------------ equations
def equations() -> list[tuple[str, str]]:
    """(script, name) of the function that each row of an equation names first."""
    found = []
    for script in SCRIPTS:
        for row in rows(ast.get_docstring(tree(script))):
            if row.paper.startswith("Eq") and numbers(row.paper).get("Eq"):
                found.append((script, row.here[0]))
    return sorted(set(found))


def along(script: str, name: str) -> tuple[list[str], list[str], list[str]]:
    """What a function needs of its script -> constants; records, also those that it is handed;
    helpers."""
    own, rooms = definitions(script), records_of_rooms(script)
    constants, records, helpers, todo = [], [], [], [name]
    signature = re.findall(r"\w+", ast.unparse(own.nodes[name].args))
    types = {word for word in signature if word in own.nodes and own.is_record(word)}
    types |= rooms.keys() & set(signature)
    while todo:
        needed = types | needs(ast.parse(text_of(script, todo.pop())).body[0])
        for other in sorted(needed):
            if other in (*constants, *records, *helpers, name):
                continue
            if other in rooms:
                records.append(other)
            elif other not in own.nodes:
                continue  # a library's, or missing: the call shows
            elif own.is_constant(other):
                constants.append(other)
            else:
                (records if own.is_record(other) else helpers).append(other)
            todo.append(other)
    return constants, records, helpers


def text_of(script: str, name: str) -> str:
    rooms = records_of_rooms(script)
    return (rooms[name] if name in rooms else definitions(script)).cut(name)


def in_their_order(script: str, names: list[str]) -> list[str]:
    """Names of a script in the order in which it defines them, each block once."""
    own, rooms = definitions(script), records_of_rooms(script)
    of_rooms = [name for name in names if name in rooms]
    of_script = sorted((own.nodes[n].lineno, n) for n in names if n not in rooms)
    blocks = [text_of(script, n) for n in [*of_rooms, *(n for _, n in of_script)]]
    return list(dict.fromkeys(blocks))


@pytest.mark.parametrize("script, name", equations())
def test_the_function_of_an_equation_runs_in_an_empty_file(script, name, tmp_path):
    own = definitions(script)
    assert name in own.nodes and isinstance(own.nodes[name], ast.FunctionDef)
    constants, records, helpers = along(script, name)
    assert len(helpers) <= 2, f"{name} needs {helpers}"
    signature = ast.unparse(ast.parse(own.cut(name)).body[0].args)
    words = set(re.findall(r"\w+", signature))
    assert not words & {"Args", "State", "World"}, f"{name}({signature})"
    names = [*constants, *records, *helpers, name]
    module = paste(tmp_path / "elsewhere.py", in_their_order(script, names))
    call(script, name, module)


def test_every_script_maps_equations_to_functions():
    assert {script for script, _ in equations()} == set(SCRIPTS)


def test_what_a_function_needs_is_found():
    text = (
        "def f(x: Args, *, y=ONE) -> World:\n    z: Tensor = g(x)\n    return z + [w for w in y]\n"
    )
    assert needs(ast.parse(text).body[0]) == {"ONE", "g"}


# ------------------------------------------------------------------------------- pieces to copy
class Piece(tuple):
    """(script, names of the piece, names that come along, files of common/ that come along)."""


def pieces(script: str) -> list[Piece]:
    """The rows of the table under "Pieces to copy" on the page of a script."""
    found = re.search(r"^#+ .*Pieces to copy.*?\n(.*?)(?=^#|\Z)", page(script), re.M | re.S)
    if found is None:
        return []
    table = []
    for line in found[1].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or set(cells[0]) <= set("-: ") or cells[0] == "piece":
            continue
        of_piece, with_it = (re.findall(r"`([\w./]+)`", cell) for cell in cells[:2])
        rooms = [name for name in with_it if "/" in name]
        names = [name for name in with_it if "/" not in name]
        table.append(Piece((script, tuple(of_piece), tuple(names), tuple(rooms))))
    return table


def all_pieces() -> list[Piece]:
    return [piece for script in SCRIPTS for piece in pieces(script)]


def imports_of(script: str, rooms: tuple[str, ...]) -> list[str]:
    """The imports at a script's head: of libraries, and of these files of common/."""
    kept = []
    for node in tree(script).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        module = getattr(node, "module", None) or node.names[0].name
        if module == "common":
            node = ast.ImportFrom(
                "common", [a for a in node.names if f"common/{a.name}.py" in rooms], 0
            )
            if node.names:
                kept.append(ast.unparse(node))
        elif module.split(".")[0] not in OF_THE_HOUSE or module.replace(".", "/") + ".py" in rooms:
            if module != "__future__":
                kept.append(ast.unparse(node))
    return kept


@each_script
def test_the_page_lists_pieces_to_copy(script):
    if not pieces(script):
        pytest.skip(f"docs/{script}.md has no table of pieces yet")
    assert len(pieces(script)) >= 4


@pytest.mark.parametrize("piece", all_pieces(), ids=lambda p: f"{p[0]}-{p[1][0]}")
def test_a_piece_runs_with_what_comes_along_and_nothing_else(piece, tmp_path):
    script, names, with_it, rooms = piece
    blocks = in_their_order(script, [*names, *with_it])
    module = paste(tmp_path / "elsewhere.py", [*imports_of(script, rooms), *blocks])
    for name in names:
        call(script, name, module)
