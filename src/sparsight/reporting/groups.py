"""Groups of runs that differ in their seed only, and the words that tell how a run was made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsight.reporting.runs import ScoredModel


@dataclass(frozen=True, eq=False)
class Group:
    """Runs with the same settings that differ in their seed only."""

    label: str
    runs: tuple[ScoredModel, ...]

    @property
    def first(self) -> ScoredModel:
        """The run that stands for the group: its settings are those of all but for the seed."""
        return self.runs[0]


def group_runs(runs: Sequence[ScoredModel]) -> list[Group]:
    """Group runs that differ in their seed only, in the order of each group's first run.

    Runs with the same settings and the same seed are groups of their own. A dense model that was read twice with the same
    answers counts once.
    """
    members: dict[tuple[str, int, int], list[ScoredModel]] = {}
    for run in runs:
        key, copy = (settings_key(run), run.samples_key), 0
        if run.is_dense and any(other.predictions == run.predictions for other in members.get((*key, 0), ())):
            continue
        while any(run.is_dense or other.seed == run.seed for other in members.get((*key, copy), ())):
            copy += 1
        members.setdefault((*key, copy), []).append(run)
    labels = distinct_labels([(_common_label([run.label for run in same]), same[0].cell) for same in members.values()])
    return [Group(label, tuple(same)) for label, same in zip(labels, members.values(), strict=True)]


def settings_key(run: ScoredModel, *without: str) -> str:
    """A key of the model and all its settings but the seed and those named in `without`."""
    settings = {k: v for k, v in run.cell.items() if k not in ("seed", *without) and v not in (None, 0, False, [], "")}
    if "sparsity" in settings:
        settings["sparsity"] = {c: round(float(v), 4) for c, v in sorted(settings["sparsity"].items()) if v}
    return json.dumps([run.model, settings], sort_keys=True, default=str)


def distinct_labels(cells: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Labels for pairs of a label and settings: to equal labels the settings that differ are added, the seed left out."""
    rows = [(label, _flat(settings)) for label, settings in cells]
    labels = []
    for label, settings in rows:
        others = [other for same, other in rows if same == label]
        differing = [key for key, value in settings.items() if any(other.get(key) != value for other in others)]
        labels.append(", ".join([label, *(f"{key} {settings[key]}" for key in differing)]))
    return labels


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the seed; those of a section, as `restore`, by a name with a dot."""
    sections = {k: v for k, v in settings.items() if isinstance(v, Mapping)}
    flat = {k: v for k, v in settings.items() if k not in sections and k != "seed"}
    return flat | {f"{k}.{name}": value for k, section in sections.items() for name, value in section.items()}


def _common_label(labels: Sequence[str]) -> str:
    """The beginning that the labels of several seeds share."""
    if len(set(labels)) == 1:
        return labels[0]
    beginning = os.path.commonprefix(list(labels))  # noqa: RUF071 (character by character)
    return re.sub(r"[\s,;:·(\[/_-]*(seed)?[\s=:_-]*$", "", beginning) or labels[0]


def describe(cell: Mapping[str, Any]) -> str:
    """One line that tells how a model was made: method, pattern, policy, sparsity per component and restoration."""
    return ", ".join(part for part in _parts(cell).values() if part and part != "pruned")


def describe_restoration(settings: Mapping[str, Any] | None) -> str:
    """A few words for the settings of a restoration; "pruned" where there was none."""
    if settings is None:
        return "pruned"
    first = f"reconstruct {settings['reconstruct']} + " if settings.get("reconstruct") else ""
    return f"restored with {first}{settings.get('adapter', 'sparselora')}"


def _parts(cell: Mapping[str, Any]) -> dict[str, str]:
    """The parts of a description by the name of their setting; an empty part is the usual case."""
    if cell.get("method") is None:
        return {"method": "dense"}
    steps = [cell["method"], cell.get("refine"), cell.get("update")]
    steps += [f"reconstruct {cell['reconstruct']}"] if cell.get("reconstruct") else []
    shares = {component: share for component, share in (cell.get("sparsity") or {}).items() if share}
    return {
        "method": " + ".join(str(step) for step in steps if step),
        "pattern": str(cell.get("pattern") or ""),
        "policy": "" if cell.get("policy") in (None, "uniform") else str(cell["policy"]),
        "sparsity": ", ".join(f"{component} {100 * share:g}\u00a0%" for component, share in shares.items()),
        "restore": describe_restoration(cell.get("restore")),
    }


def series_labels(cells: Sequence[Mapping[str, Any]], varied: str) -> list[str]:
    """Labels of the settings in which series differ, but for the setting that is `varied` within each of them.

    Equal labels are numbered from the second on. A single series has an empty label.
    """
    parts = [_parts(cell) for cell in cells]
    names = dict.fromkeys(name for part in parts for name in part if name != varied)
    differing = [name for name in names if len({part.get(name) for part in parts}) > 1]
    labels = [", ".join(part[name] for name in differing if part.get(name)) for part in parts]
    counts = [labels[:i].count(label) for i, label in enumerate(labels)]
    return [f"{label} ({count + 1})" if count else label for label, count in zip(labels, counts, strict=True)]
