"""The model card of a pruned folder, in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

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
NO_LICENCE = (
    "**Licence**: not known. That of `{base}` applies; write it into `license` above before the folder is published."
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
    hub = is_hub_name(base)
    licence = licence_of(base)
    facts: dict[str, Any] = {**licence, **({"base_model": base, "base_model_relation": "finetune"} if hub else {})}
    facts |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    facts |= {"tags": ["sparse", "pruned", "sparsight"], "datasets": _datasets(recipe) or None}
    header = ModelCardData(**facts)
    patterns = sorted({entry["pattern"] for entry in sparsity["layers"].values()})
    totals = component_totals(sparsity)
    lines = [
        f"# A sparse {name}",
        "",
        f"Pruned with Sparsight from `{base if hub else name}` by `{sparsity['method']}`, pattern {', '.join(patterns)}"
        + (f", then restored with {stages_of(recipe, 'restore')[-1]['adapter']}." if "restore" in recipe else "."),
        PLAIN_LINE,
        *([] if licence else ["", NO_LICENCE.format(base=base if hub else name)]),
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
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


def _of_all(sparsity: Mapping[str, Any], zeros: int) -> list[str]:
    total = sparsity.get("parameters")
    return ["", f"{zeros:,} of the model's {total:,} parameters are zeros of pruned layers."] if total else []


def is_hub_name(name: str) -> bool:
    """Whether a name is one on the Hub, and no file or folder on this machine."""
    path = name.startswith((".", "/", "~")) or Path(name).suffix in (".jsonl", ".json", ".parquet", ".tsv")
    return not path and name.count("/") == 1 and not Path(name).exists()


def licence_of(base: str) -> dict[str, str]:
    """What the card of the base model says of its licence: that in its folder, or of the Hub in the cache; else nothing."""
    path: Any = Path(base) / "README.md" if Path(base).is_dir() else None
    if path is None and is_hub_name(base):
        path = try_to_load_from_cache(base, "README.md")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        facts = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: facts[key] for key in ("license", "license_name", "license_link") if isinstance(facts.get(key), str)}


def _datasets(recipe: Mapping[str, Any]) -> list[str]:
    """The datasets of the Hub that a recipe names."""
    sections = [recipe, *(section for verb in ("prune", "restore") for section in stages_of(recipe, verb))]
    names = [str(section[key]) for section in sections for key in ("data", "held_out") if section.get(key)]
    return list(dict.fromkeys(name.partition(":")[0] for name in names if is_hub_name(name)))


def _portable(value: Any) -> Any:
    """Return the recipe without the folders of the machine: of a path only its last part stays."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    if isinstance(value, str) and "/" in value and not is_hub_name(value):
        return value.rstrip("/").split("/")[-1]
    return value
