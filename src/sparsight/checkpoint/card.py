"""The model card of a pruned folder, in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sparsight.checkpoint.stages import stages_of
from sparsight.model.families import COMPONENTS

BEGIN, END = "<!-- scores -->", "<!-- /scores -->"  # each recorded evaluation replaces the text between them
LOAD = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", dtype="auto")
processor = AutoProcessor.from_pretrained("FOLDER")"""


PLAIN_LINE = "It loads with `from_pretrained` like any other model; a pruned weight is an exact zero in the ordinary files."
PACKED_LINE = (
    "It is packed: the files hold the weights that were kept and a bit per weight. With Sparsight imported it loads like "
    "any other model; `sparsight unpack` writes ordinary files."
)
IMPORT = "import sparsight  # reads packed weights\n"


def packed_card(card: str) -> str:
    """The card of a folder that was packed: the same but for how the model is loaded."""
    return card.replace(PLAIN_LINE, PACKED_LINE).replace(LOAD, IMPORT + LOAD)


def unpacked_card(card: str) -> str:
    """The card that `packed_card` was given."""
    return card.replace(PACKED_LINE, PLAIN_LINE).replace(IMPORT + LOAD, LOAD)


def component_totals(sparsity: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Return the numbers of layers, zeros and parameters of these layers, per pruned component."""
    totals = {}
    for component in COMPONENTS:
        rows = [entry for entry in sparsity["layers"].values() if entry["component"] == component]
        if rows:
            size = sum(entry["shape"][0] * entry["shape"][1] for entry in rows)
            totals[component] = (len(rows), sum(entry["zeros"] for entry in rows), size)
    return totals


def model_card(sparsity: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return the card as Markdown with YAML front matter."""
    base = str(sparsity["base_model"])
    name = base.rstrip("/").split("/")[-1]
    hub = not base.startswith((".", "/")) and base.count("/") == 1
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    header["tags"] = ["sparse", "pruned", "sparsight"]
    if hub:
        header["base_model"] = base
    patterns = sorted({entry["pattern"] for entry in sparsity["layers"].values()})
    totals = component_totals(sparsity)
    lines = [
        f"# A sparse {name}",
        "",
        f"Pruned with Sparsight from `{base if hub else name}` by `{sparsity['method']}`, pattern {', '.join(patterns)}"
        + (f", then restored with {stages_of(recipe, 'restore')[-1]['adapter']}." if "restore" in recipe else "."),
        PLAIN_LINE,
        "",
        "| component | layers pruned | zeros | sparsity |",
        "|---|---:|---:|---:|",
        *(f"| {c} | {count} | {zeros:,} | {zeros / size:.2%} |" for c, (count, zeros, size) in totals.items()),
        *_of_all(sparsity, sum(zeros for _, zeros, _ in totals.values())),
        "",
        BEGIN,
        END,
        "",
        "## How to load it",
        "",
        "```python",
        LOAD,
        "```",
        "",
        "## How it was made",
        "",
        "`sparsight verify .` recounts every zero against `sparsity.json`; `recipe.yaml` holds every setting.",
        "",
        "```yaml",
        yaml.safe_dump(_portable(recipe), sort_keys=False).strip(),
        "```",
    ]
    front = yaml.safe_dump(header, sort_keys=False).strip()
    return f"---\n{front}\n---\n\n" + "\n".join(lines) + "\n"


def _of_all(sparsity: Mapping[str, Any], zeros: int) -> list[str]:
    total = sparsity.get("parameters")
    return ["", f"{zeros:,} of the model's {total:,} parameters are zeros of pruned layers."] if total else []


def _portable(value: Any) -> Any:
    """Return the recipe without the paths of the machine."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    return value.rstrip("/").split("/")[-1] if isinstance(value, str) and value.startswith("/") else value
