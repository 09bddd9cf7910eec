"""The recipe of a folder: what was done to the dense model, stage by stage, in a form that `sparsight run` does again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsight.checks import plain_value, whole_name
from sparsight.options import Spec
from sparsight.version import VERSION


def stages_of(recipe: Mapping[str, Any], verb: str) -> list[dict[str, Any]]:
    """The sections of a verb, in order; a model that was pruned twice has two."""
    section = recipe.get(verb)
    return [] if section is None else section if isinstance(section, list) else [section]


def add_stage(
    recipe: Mapping[str, Any], verb: str, spec: Spec, *, model: str | Path, data: Any, **settings: Any
) -> dict[str, Any]:
    """The recipe of a folder with one more stage.

    Dense model, data and family stand outside the sections, once; a stage with other data says so itself. `settings` stand
    for those of `spec`, or beside them, as `fingerprint` does.
    """
    source = None if data is None else whole_name(data)
    made: dict[str, Any] = {"sparsight": VERSION}
    earlier = dict(recipe) if "model" in recipe and not (verb == "prune" and "restore" in recipe) else {}
    made |= {"model": earlier.get("model", whole_name(model)), "data": earlier.get("data") or source}
    section = {**spec.facts(), **{key: plain_value(value) for key, value in settings.items()}}
    if getattr(spec, "images", None) is not None:
        section["images"] = whole_name(spec.images)  # type: ignore[attr-defined]
    family = section.pop("family", None)
    made |= {"family": earlier.get("family", family)} if earlier.get("family", family) else {}
    for key, shared in (("data", source), ("teacher", section.get("teacher"))):
        section.pop(key, None)
        if shared is not None and shared != made["data" if key == "data" else "model"]:
            section[key] = shared
    made |= {name: earlier[name] for name in ("held_out", "search", "prune", "restore") if name in earlier}
    sections = [*stages_of(earlier, verb), section]
    return {**made, verb: sections if len(sections) > 1 else section, "evaluate": None}
