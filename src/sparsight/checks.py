"""Read and check the values of settings, and write them as plain values.

A message names a field of the settings in backticks (`pattern`, or `pattern=2:4` with a value); the command line replaces
it by its option.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError

SEEDS = 2**32
FUNCTIONS = ("prune", "refine", "update", "select", "weigh", "importance", "score")  # what an entry of a table wraps


def nearest(name: str, allowed: Sequence[str]) -> str:
    """Return a hint: the nearest of `allowed`, if one is near, and all that are allowed."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}allowed: {', '.join(allowed)}"


NOUNS = {
    "over": "value", "propagate": "value", "tokens": "rule", "teacher_mode": "mode", "tune": "component",
    "report_to": "tracker", "metrics": "metric", "mixed_precision": "precision",
}  # fmt: skip


def check_name(field: str, name: Any, allowed: Sequence[str]) -> None:
    """Refuse a name that is not allowed. **Raises** `SparsightError`, naming the nearest that is."""
    if name not in allowed:
        hint = nearest(str(name), tuple(allowed)) if allowed else "none is installed"
        raise SparsightError(f"`{field}`: unknown {NOUNS.get(field, field)} {name!r}; {hint}")


OLD_NAMES = {("propagate", "stage"): "layer"}  # accepted for one release


def current_name(field: str, value: Any) -> Any:
    """The value; for an old name the new one, with a `FutureWarning`."""
    name = OLD_NAMES.get((field, value)) if isinstance(value, str) else None
    if name is None:
        return value
    warnings.warn(f"`{field}={value}` is the old name of `{field}={name}`", FutureWarning, stacklevel=2)
    return name


def need_packages(what: str, extra: str, **packages: str) -> None:
    """Refuse work for which packages are missing, named `module="name on the index"`; nothing is imported.

    **Raises** `SparsightError` with the command that installs them.
    """
    if missing := [name for module, name in packages.items() if importlib.util.find_spec(module) is None]:
        raise SparsightError(f"{what} needs {' and '.join(missing)}: pip install 'sparsight[{extra}]'")


TRACKERS = {  # packages that each of these needs, one of them; transformers knows others, too
    "tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "mlflow": ("mlflow",), "trackio": ("trackio",),
}  # fmt: skip


def check_trackers(field: str, names: Any) -> None:
    """Refuse known trackers whose packages are missing, before anything is imported. **Raises** `SparsightError`."""
    for name in parse_list(names) if isinstance(names, str | list | tuple) else ():
        packages = TRACKERS.get(name, ()) if isinstance(name, str) else ()
        if packages and all(importlib.util.find_spec(package) is None for package in packages):
            raise SparsightError(f"`{field}`: {name} needs {' or '.join(packages)}: pip install {packages[0]}")


def check_paths(**paths: Any) -> None:
    """Refuse values that are neither None nor a path or a name. **Raises** `SparsightError`."""
    for field, value in paths.items():
        if value is not None and not isinstance(value, str | PathLike):
            raise SparsightError(f"`{field}`: {type(value).__name__} is no name; give a path or a name, as text")


def check_count(field: str, value: Any) -> None:
    """Refuse what is not a whole number of at least 1. **Raises** `SparsightError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SparsightError(f"`{field}`: {value!r} is not a whole number of at least 1")


def parse_list(value: str | Sequence[Any]) -> tuple[Any, ...]:
    """Read `one,two`, or several of them; functions among them stay as they are."""
    words = value.split(",") if isinstance(value, str) else value
    return tuple(word.strip() if isinstance(word, str) else word for word in words if word != "")


def parse_pairs(text: str, field: str, names: Sequence[str], example: str) -> dict[str, str]:
    """Read `name=value,...` with names that are allowed, each at most once.

    **Raises** `SparsightError` for what is not of this form.
    """
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise SparsightError(f"`{field}`: {part.strip()!r} is not COMPONENT=VALUE; write for example {example}")
        check_name_of("component", field, name, names)
        if name in pairs:
            raise SparsightError(f"`{field}`: {name} is given twice in {text!r}; give it once")
        pairs[name] = value
    return pairs


def check_name_of(noun: str, field: str, name: Any, allowed: Sequence[str]) -> str:
    """The name inside the value of a field, as a component's. **Raises** `SparsightError` if it is not allowed."""
    if name not in allowed:
        raise SparsightError(f"`{field}`: unknown {noun} {name!r}; {nearest(str(name), tuple(allowed))}")
    return name


def check_signature(field: str, function: Callable, *forms: str) -> None:
    """Refuse, by a `SparsightError`, a function that cannot be called in any of `forms`, as "(W, moments, *, generator)"."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin may have none
        return
    for form in forms:
        places, _, names = form.strip("()").partition(", *, ")
        with contextlib.suppress(TypeError):
            signature.bind(*places.split(", "), **dict.fromkeys(names.split(", ") if names else ()))
            return
    raise SparsightError(f"`{field}`: {name_of(function)} must be callable as {' or '.join(forms)}")


def name_of(function: Any) -> str:
    """The name of a method, a policy or another step: of a string, a function or the entry of a table."""
    if isinstance(function, str):
        return function
    inner = next((f for key in FUNCTIONS if callable(f := getattr(function, key, None))), function)
    return getattr(inner, "__name__", type(inner).__name__)


def plain_value(value: Any) -> Any:
    """A setting as a value that YAML and JSON can hold; functions by their names."""
    if hasattr(value, "item"):  # a number of numpy or torch
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_value(inner) for key, inner in value.items()}
    if callable(value) or any(callable(getattr(value, key, None)) for key in FUNCTIONS):
        return name_of(value)
    if isinstance(value, Sequence):
        return [plain_value(inner) for inner in value]
    return str(value)


def whole_name(model: str | Path) -> str:
    """The name of a model in a record: the absolute path of a folder, or a hub name."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def check_place(model: Any) -> None:
    """Refuse, by a `SparsightError`, a path that is not there; a name of one's own and of a model may be on the Hub."""
    if not isinstance(model, str | Path) or not (where := str(model)).strip() or where.startswith("demo:"):
        return
    with contextlib.suppress(OSError):  # a name too long, no permission: said where it is read
        if not Path(where).exists() and (where.startswith((".", "/", "~")) or where.count("/") != 1):
            raise SparsightError(f"{where}: no such folder; give the folder of a model or a hub name such as owner/model")
