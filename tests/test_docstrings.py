"""The reference page is made of docstrings: everything public has one, and it says which error is raised.

The package is read as text, not imported, so that optional dependencies do not matter.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "sparsight"
ELSEWHERE = ("demo/models",)  # models are data
FILES = [
    path.relative_to(PACKAGE).as_posix()
    for path in sorted(PACKAGE.rglob("*.py"))
    if not path.relative_to(PACKAGE).as_posix().startswith(ELSEWHERE)
]
ERRORS = {"SparsightError", "NotWritten", "ValueError"}
PARTICIPLES = {
    "asked", "chosen", "done", "found", "given", "kept", "known", "left", "made", "named", "seen", "settled", "shown",
    "taken", "told", "wanted",
}  # fmt: skip
OPTION = re.compile(r"(?<![\w-])--[a-z]")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Everything public with its dotted name: classes, their methods and properties, and functions at the top level."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):  # a definition may depend on what is installed
            yield from definitions([inner for inner in ast.iter_child_nodes(node) if isinstance(inner, ast.stmt)], prefix)


def raised(function: Function) -> set[str]:
    """The names of the errors that a function raises itself, without the functions inside it."""
    names, nodes = set(), list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, Definition | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            names.add(error.attr if isinstance(error, ast.Attribute) else getattr(error, "id", ""))
        nodes.extend(ast.iter_child_nodes(node))
    return names & ERRORS


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """All docstrings, line by line, private ones too."""
    for node in ast.walk(tree):
        if isinstance(node, Definition | ast.Module) and ast.get_docstring(node) is not None:
            text = node.body[0].value  # type: ignore[attr-defined]
            yield from enumerate(text.value.splitlines(), text.lineno)


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.fixture(params=FILES)
def module(request):
    source = (PACKAGE / request.param).read_text(encoding="utf-8")
    return request.param, source, ast.parse(source)


def refuse(name: str, problems: list[str]) -> None:
    assert not problems, f"{len(problems)} in src/sparsight/{name}:\n  " + "\n  ".join(problems)


def test_everything_public_has_a_docstring(module):
    name, _, tree = module
    refuse(
        name,
        [f"{node.lineno}: {path} has no docstring" for path, node in definitions(tree.body) if not ast.get_docstring(node)],
    )


def test_a_function_that_raises_says_so(module):
    name, _, tree = module
    functions = [(path, node, raised(node)) for path, node in definitions(tree.body) if isinstance(node, Function)]
    refuse(
        name,
        [
            f"{node.lineno}: {path} raises {', '.join(sorted(errors))}, its docstring does not say so"
            for path, node, errors in functions
            if errors and not any(word in (ast.get_docstring(node) or "") for word in {"Raises", *errors})
        ],
    )


def test_public_names_are_no_participles(module):
    name, _, tree = module
    problems = []
    for path, node in definitions(tree.body):
        if node.name in PARTICIPLES:
            problems.append(f"{node.lineno}: {path}")
        if isinstance(node, Function):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            problems += [f"{node.lineno}: {path}({arg.arg})" for arg in every if arg is not None and arg.arg in PARTICIPLES]
    refuse(name, problems)


def test_fields_are_named_without_dashes(module):
    name, source, tree = module
    if name.startswith("cli/"):
        return
    refuse(name, [f"{line}: {text.strip()}" for line, text in [*docstrings(tree), *comments(source)] if OPTION.search(text)])


def test_the_checks_find_what_they_look_for():
    tree = ast.parse(
        '"""Give --pattern."""\n'
        "def found(known, /, *, told=0):\n"
        "    if known:\n"
        "        raise errors.SparsightError('no')\n"
        "    def inner():\n"
        "        raise ValueError\n"
        "class Open:\n"
        "    def asked(self): ...\n"
        "    def _hidden(self): ...\n"
        "class _Closed:\n"
        "    def method(self): ...\n"
        "try:\n"
        "    def tried(): raise\n"
        "except ImportError as error:\n"
        "    def caught(): raise error\n"
    )
    names = dict(definitions(tree.body))
    assert list(names) == ["found", "Open", "Open.asked", "tried"]
    assert raised(names["found"]) == {"SparsightError"}  # type: ignore[arg-type]
    assert raised(names["tried"]) == set()  # type: ignore[arg-type]
    assert [line for line, text in docstrings(tree) if OPTION.search(text)] == [1]
    assert list(comments("a = 1  # as --data does\n")) == [(1, "# as --data does")]
    assert [bool(OPTION.search(text)) for text in ("a -- b", "-----", "`--data`")] == [False, False, True]
