"""The model card: what a person who finds the folder must know, in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sparsight.model.families import COMPONENTS


def component_totals(sparsity: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Per pruned component: layers, zeros, parameters of those layers."""
    totals = {}
    for component in COMPONENTS:
        rows = [entry for entry in sparsity["layers"].values() if entry["component"] == component]
        if rows:
            size = sum(entry["shape"][0] * entry["shape"][1] for entry in rows)
            totals[component] = (len(rows), sum(entry["zeros"] for entry in rows), size)
    return totals


def model_card(sparsity: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    base = str(sparsity["base_model"])
    name = base.rstrip("/").split("/")[-1]
    hub = not base.startswith((".", "/")) and base.count("/") == 1
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["sparse", "pruned", "sparsight"]}
    if hub:
        header["base_model"] = base
    patterns = sorted({entry["pattern"] for entry in sparsity["layers"].values()})
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# A sparse {name}",
        "",
        f"Pruned with Sparsight from `{base if hub else name}` by `{sparsity['method']}`, pattern {', '.join(patterns)}"
        + (f", then restored with {recipe['restore']['adapter']}." if "restore" in recipe else "."),
        "It loads with `from_pretrained` like any other model; a pruned weight is an exact zero in the ordinary files.",
        "",
        "| component | layers pruned | zeros | sparsity |",
        "|---|---:|---:|---:|",
    ]
    for component, (count, zeros, size) in component_totals(sparsity).items():
        lines.append(f"| {component} | {count} | {zeros:,} | {zeros / size:.2%} |")
    lines += [
        "",
        "`sparsight verify .` recounts every zero against `sparsity.json`; `recipe.yaml` holds every setting.",
        "",
        "```yaml",
        yaml.safe_dump(_portable(recipe), sort_keys=False).strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _portable(value: Any) -> Any:
    """The recipe without the paths of the machine it ran on."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    return value.rstrip("/").split("/")[-1] if isinstance(value, str) and value.startswith("/") else value
