"""The house: rooms stand in an order, imports run down, and there is no circle."""

from __future__ import annotations

import ast
import inspect
import sys
from graphlib import CycleError, TopologicalSorter
from inspect import isfunction
from pathlib import Path

import pytest

import sparsight
from sparsight.cli import app
from sparsight.pruning.methods import METHODS, Method
from sparsight.pruning.methods.wanda import wanda
from sparsight.specs import SPECS

SRC = Path(sparsight.__file__).parent
ORDER = [  # from the ground up; a room imports only from rooms below it
    ("errors", "version", "progress", "memory", "files", "signals", "cost"),
    ("checks",),
    ("options",),
    ("fields",),
    ("shared_spec",),
    ("specs",),
    ("distributed", "kernels", "trackers"),
    ("masks",),
    ("packing",),
    ("model",),
    ("data",),
    ("calibration",),
    ("allocation",),
    ("checkpoint",),
    ("tasks",),
    ("evaluation",),
    ("pruning",),
    ("restoring",),
    ("reporting",),
    ("demo",),
    ("recipe",),
    ("sweeps",),
    ("pipeline",),
    ("estimation",),
    ("arguments",),
    ("looks",),
    ("api",),
    ("__init__",),
    ("cli",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


def module_name(path: Path) -> str:
    return ".".join(("sparsight", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside a function, for types too."""
    targets = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparsight":
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                targets.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            targets |= {name.name for name in node.names if name.name in MODULES}
    return targets - {module_name(path)}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_has_its_place():
    assert {room(module) for module in MODULES} == set(FLOOR)


def test_imports_run_down():
    up = [
        f"{module} -> {target}"
        for module, path in MODULES.items()
        for target in imports(path)
        if FLOOR[room(module)] < FLOOR[room(target)]
    ]
    assert up == []


def test_there_is_no_circle():
    graph = {module: imports(path) for module, path in MODULES.items()}
    graph["sparsight"] = set()  # the face hands names on
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_folder_is_named_like_a_verb():
    verbs = {name for name in sparsight.__all__ if isfunction(getattr(sparsight, name))}
    assert {"save", "merge", *(name for name in SPECS if name != "inspect")} <= verbs
    assert verbs.isdisjoint(path.name for path in SRC.iterdir() if (path / "__init__.py").is_file())
    for verb in verbs:
        assert callable(getattr(sparsight, verb)), verb


def test_files_are_short():
    """About 300 lines; the Python face, a page of docstrings, has more."""
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert lengths.pop("sparsight.api") < 420
    assert {module: n for module, n in lengths.items() if n > 360} == {}


def test_few_frames_from_the_command_to_a_method(monkeypatch, zoo_folder, scenes, tmp_path):
    """What a reader of a traceback has to read: at most ten frames of ours above the body of a method."""
    seen: list[list[str]] = []

    def first(W, moments, pattern, generator):
        frames = [frame for frame in inspect.stack(0)[1:] if SRC in Path(frame.filename).parents]
        seen.append([f"{Path(frame.filename).relative_to(SRC)}:{frame.function}" for frame in reversed(frames)])
        return wanda(W, moments, pattern, generator)

    monkeypatch.setitem(METHODS, "wanda", Method(first))
    words = ["prune", str(zoo_folder("llava")), str(tmp_path / "out"), "--data", str(scenes), "--samples", "4", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["sparsight", *words])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    assert all(len(frames) <= 10 for frames in seen), seen[0]
    assert seen
    assert seen[0][0] == "cli/app.py:main"
