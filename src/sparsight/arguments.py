"""What the verbs check of their arguments, and make of them, before they hand on."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight.checks import check_paths, check_place, need_packages
from sparsight.errors import SparsightError
from sparsight.shared_spec import FamilySpec


def places(**values: Any) -> tuple[Any, ...]:
    """The values, with folders for `demo:` names.

    **Raises** `SparsightError` for a `demo:` name that there is not, for what needs a package that is missing, and for a
    model's folder and a file of data that are not there: before torch is imported.
    """
    for field in ("data", "held_out"):
        _check_dataset(values.get(field))
        _check_file(values.get(field))
    for field in ("model", "sparse", "packed", "folder"):
        check_place(values.get(field))
    if not any(isinstance(value, str) and value.startswith("demo:") for value in values.values()):
        return tuple(values.values())
    from sparsight.recipe import embedded

    return tuple(embedded(field, value) for field, value in values.items())


def paths(**values: Any) -> tuple[Any, ...]:
    """The values, which must be paths, as `places` gives them. **Raises** as it does, and for what is no path."""
    check_paths(**values)
    return places(**values)


def _check_file(data: Any) -> None:
    """Refuse, by a `SparsightError`, a file of data that is not there."""
    if not isinstance(data, str | Path) or Path(data).suffix not in (".jsonl", ".json", ".parquet"):
        return
    with contextlib.suppress(OSError):  # a name too long, no permission: said where it is read
        if not Path(data).exists():
            raise SparsightError(f"{data}: no such file or folder")


def _check_dataset(data: Any) -> None:
    """Refuse, by a `SparsightError`, a dataset of the Hub and parquet files where `datasets` is missing."""
    if not isinstance(data, str | Path) or importlib.util.find_spec("datasets") is not None:
        return
    path, name = Path(data), str(data)
    needed = path.suffix == ".parquet"
    with contextlib.suppress(OSError):  # a name too long, no permission: said where it is read
        if path.is_dir():
            needed = not (path / "metadata.jsonl").is_file() and next(path.rglob("*.parquet"), None) is not None
        elif not path.exists() and path.suffix not in (".json", ".jsonl", ".tsv"):
            own = name.isdigit() or name.startswith("demo:")
            needed |= not own and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", name) is not None
    if needed:
        need_packages(f"{data}: reading it", "data", datasets="datasets")


def check_task_data(spec: Any, settings: Mapping[str, Any], data: Any) -> None:
    """Refuse an evaluation without data: a benchmark's may be read from the Hub, which needs `datasets`.

    **Raises** `SparsightError`.
    """
    given = spec.get("task") if isinstance(spec, Mapping) else getattr(spec, "task", None)
    task = settings.get("task", given)
    if task is None:
        need(data, "data", "held-out samples")
    elif data is None:
        need_packages(f"{task}: reading it from the Hub", "data", datasets="datasets")


def check_recipe(recipe: Any, out: Any, changes: Sequence[str]) -> None:
    """Refuse, before anything large is imported, paths that are none, and demo names whose packages are missing.

    **Raises** `SparsightError`.
    """
    from sparsight.recipe import content

    check_paths(recipe=recipe, out=out)
    content(recipe, changes)


def is_folder(model: Any) -> bool:
    """Whether a model is named, and not in memory."""
    return isinstance(model, str | Path)


def anatomy_of(model: Any, spec: FamilySpec) -> Any:
    """The parts of a model in memory or in a folder. **Raises** `SparsightError` for what is no model."""
    from sparsight.model.anatomy import anatomy
    from sparsight.model.source import check_model
    from sparsight.model.stream import open_anatomy

    if is_folder(model):
        return open_anatomy(model, family_for(model, spec))
    check_model(model)
    return anatomy(model, family_for(model, spec))


def in_memory_spec(model: Any, spec: Any, **of_folders: Any) -> Any:
    """The settings of a verb for a model in memory. **Raises** `SparsightError` for settings of folders."""
    from sparsight.model.source import in_memory

    return in_memory(model, spec, **of_folders)


def check_folder_data(data: Any, processor: Any) -> None:
    """Refuse, by a `SparsightError`, what only a model in memory can use."""
    from sparsight.data.sources import Source

    if processor is not None:
        raise SparsightError("`processor`: a folder holds its own; leave it out")
    if data is not None and not isinstance(data, str | Path | Source):
        raise SparsightError(
            f"`data`: {type(data).__name__} is no data source; batches of your own need a model in memory: `load` it first"
        )


def family_for(model: Any, spec: FamilySpec) -> Any:
    """The family that settings name, else the one on record."""
    from sparsight.checkpoint.folder import family_of, read_record

    return family_of(read_record(model) if is_folder(model) else None, spec.family)


def need(value: Any, field: str, noun: str) -> None:
    """Refuse, by a `SparsightError`, an argument that is missing."""
    if value is None:
        raise SparsightError(f"`{field}`: is missing; give {noun}")
