"""What the verbs check of their arguments, and make of them, before they hand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError
from sparsight.shared_spec import FamilySpec


def places(**values: Any) -> tuple[Any, ...]:
    """The values, with folders for `demo:` names. **Raises** `SparsightError` for a `demo:` name that there is not."""
    if not any(isinstance(value, str) and value.startswith("demo:") for value in values.values()):
        return tuple(values.values())
    from sparsight.recipe import embedded

    return tuple(embedded(field, value) for field, value in values.items())


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
