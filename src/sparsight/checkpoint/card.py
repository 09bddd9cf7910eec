"""The model card of a pruned folder, in Hugging Face's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsight.checkpoint.stages import stages_of
from sparsight.errors import NotWritten
from sparsight.evaluation.metrics import title_of
from sparsight.model.families import COMPONENTS

BEGIN, END = "<!-- scores -->", "<!-- /scores -->"  # each recorded evaluation replaces the text between them
TASK = {"type": "image-text-to-text", "name": "Visual question answering and captioning"}
LOAD = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", dtype="auto")
processor = AutoProcessor.from_pretrained("FOLDER")"""


def component_totals(sparsity: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Return the numbers of layers, zeros and parameters of these layers, per pruned component."""
    totals = {}
    for component in COMPONENTS:
        rows = [entry for entry in sparsity["layers"].values() if entry["component"] == component]
        if rows:
            size = sum(entry["shape"][0] * entry["shape"][1] for entry in rows)
            totals[component] = (len(rows), sum(entry["zeros"] for entry in rows), size)
    return totals


def model_card(sparsity: Mapping[str, Any], recipe: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """Return the card as Markdown with YAML front matter; with `evaluation`, as `evaluate` records it, the scores too."""
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
        "It loads with `from_pretrained` like any other model; a pruned weight is an exact zero in the ordinary files.",
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
    card = f"---\n{front}\n---\n\n" + "\n".join(lines) + "\n"
    return with_scores(card, evaluation) if evaluation else card


def with_scores(card: str, evaluation: Mapping[str, Any]) -> str:
    """Return the card with the scores of an evaluation in the front matter and between the marks.

    A card without front matter or marks, as a user may write one, is returned without changes.
    """
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.S)
    if not match or BEGIN not in card or END not in card[card.index(BEGIN) :]:
        return card
    try:
        header = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return card
    if not isinstance(header, dict):
        return card
    title = re.search(r"^# (.+)$", card, flags=re.M)
    header["model-index"] = model_index(title[1] if title else "model", evaluation)
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()
    before, rest = card[match.end() :].split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"---\n{front}\n---\n{before}{BEGIN}\n" + "\n".join(_scores(evaluation)) + f"\n{END}{after}"


def model_index(name: str, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the scores over all samples as the Hub's `model-index`; in percent where a metric is a share."""
    data = _data_name(evaluation)
    metrics = [
        {"type": row["metric"], "name": _title(row["metric"]), "value": round(_value(row, "value"), 2)}
        for row in evaluation["rows"]
        if row["kind"] == "all"
    ]
    dataset = {"type": re.sub(r"[^\w./-]+", "-", data), "name": data}
    return [{"name": name, "results": [{"task": dict(TASK), "dataset": dataset, "metrics": metrics}]}]


def refresh_card(folder: str | Path, evaluation: Mapping[str, Any]) -> bool:
    """Write the scores into the card of a model folder, in place; False if the folder has no card of ours.

    **Raises** `NotWritten` if the card cannot be read or written.
    """
    path = Path(folder) / "README.md"
    if not path.is_file() or not (Path(folder) / "sparsity.json").is_file():
        return False
    try:
        card = path.read_text(encoding="utf-8")
        new = with_scores(card, evaluation)
        if new != card:
            path.write_text(new, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotWritten(f"{path}: the scores could not be put on the model card ({error})") from error
    return new != card


def _scores(evaluation: Mapping[str, Any]) -> Sequence[str]:
    rows = [
        f"| {row['kind']} | {_title(row['metric'])} | {_value(row, 'value'):.2f} | "
        + (f"{_value(row, 'low'):.2f} to {_value(row, 'high'):.2f}" if row["low"] is not None else "")
        + f" | {row['n']} |"
        for row in evaluation["rows"]
    ]
    digest = str(evaluation.get("fingerprint", ""))[:16]
    lead = f"On `{_data_name(evaluation)}`" + (f" (fingerprint {digest}…)" if digest else "")
    head = ["## Scores", "", f"{lead}, with 95 % bootstrap intervals over samples:", ""]
    return [*head, "| kind | metric | score | interval | n |", "|---|---|---:|---:|---:|", *rows]


def _of_all(sparsity: Mapping[str, Any], zeros: int) -> list[str]:
    total = sparsity.get("parameters")
    return ["", f"{zeros:,} of the model's {total:,} parameters are zeros of pruned layers."] if total else []


def _value(row: Mapping[str, Any], key: str) -> float:
    return row[key] * title_of(row["metric"])[1]


def _title(metric: str) -> str:
    title, factor = title_of(metric)
    return f"{title}, %" if factor == 100 else title


def _data_name(evaluation: Mapping[str, Any]) -> str:
    """Return the name of the data, without the paths of the machine."""
    source = str(evaluation.get("data", "")).rstrip("/")
    hub = not source.startswith((".", "/")) and source.count("/") == 1 and not Path(source).exists()
    return source if hub else Path(source).name or "held-out samples"


def _portable(value: Any) -> Any:
    """Return the recipe without the paths of the machine."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    return value.rstrip("/").split("/")[-1] if isinstance(value, str) and value.startswith("/") else value
