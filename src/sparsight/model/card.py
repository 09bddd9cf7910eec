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


def model_card(sparsity: Mapping[str, Any], metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    base = str(sparsity["base_model"])
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["sparse", "pruned", "sparsight"]}
    if not base.startswith((".", "/")) and base.count("/") == 1:
        header["base_model"] = base
    patterns = sorted({entry["pattern"] for entry in sparsity["layers"].values()})
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# A sparse {base.rstrip('/').split('/')[-1]}",
        "",
        f"Pruned with Sparsight from `{base}` by `{sparsity['method']}`, pattern {', '.join(patterns)}"
        + (", then restored with SparseLoRA." if "restore" in recipe else "."),
        "It loads with `from_pretrained` like any other model; a pruned weight is an exact zero in the ordinary files.",
        "",
        "| component | layers pruned | zeros | sparsity |",
        "|---|---:|---:|---:|",
    ]
    for component, (count, zeros, size) in component_totals(sparsity).items():
        lines.append(f"| {component} | {count} | {zeros:,} | {zeros / size:.2%} |")
    if scores := metrics.get("evaluation"):
        lines += ["", "| kind | metric | score | 95 % interval | samples |", "|---|---|---:|---|---:|"]
        for row in scores:
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
            lines.append(f"| {row['kind']} | {row['metric']} | {row['value']:.2f} | {interval} | {row['n']} |")
    lines += [
        "",
        "`sparsight verify .` recounts every zero against `sparsity.json`; `recipe.yaml` holds every setting.",
        "",
        "```yaml",
        yaml.safe_dump(dict(recipe), sort_keys=False).strip(),
        "```",
    ]
    return "\n".join(lines) + "\n"
