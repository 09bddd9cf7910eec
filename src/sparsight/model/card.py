"""The model card: what a person who finds the folder must know, in Hugging Face's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsight.errors import NotWritten
from sparsight.model.families import COMPONENTS

BEGIN, END = "<!-- scores -->", "<!-- /scores -->"  # what is between them is written again by each recorded evaluation
TASK = {"type": "image-text-to-text", "name": "Visual question answering and captioning"}
PERCENT = ("exact_match", "vqa_accuracy", "token_accuracy")
LOAD = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", dtype="auto")
processor = AutoProcessor.from_pretrained("FOLDER")"""


def component_totals(sparsity: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Per pruned component: layers, zeros, parameters of those layers."""
    totals = {}
    for component in COMPONENTS:
        rows = [entry for entry in sparsity["layers"].values() if entry["component"] == component]
        if rows:
            size = sum(entry["shape"][0] * entry["shape"][1] for entry in rows)
            totals[component] = (len(rows), sum(entry["zeros"] for entry in rows), size)
    return totals


def model_card(sparsity: Mapping[str, Any], recipe: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown with YAML front matter; with `evaluation`, as `eval --record` writes it, the scores too."""
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
        + (f", then restored with {recipe['restore']['adapter']}." if "restore" in recipe else "."),
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
    """Put the scores of an evaluation into the front matter and between the marks; all else stays as it is.

    A card without front matter or marks, one that a person has written, comes back as it was.
    """
    found = re.match(r"---\n(.*?)\n---\n", card, flags=re.S)
    if not found or BEGIN not in card or END not in card[card.index(BEGIN) :]:
        return card
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return card
    if not isinstance(header, dict):
        return card
    title = re.search(r"^# (.+)$", card, flags=re.M)
    header["model-index"] = model_index(title[1] if title else "model", evaluation)
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()
    before, rest = card[found.end() :].split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"---\n{front}\n---\n{before}{BEGIN}\n" + "\n".join(_scores(evaluation)) + f"\n{END}{after}"


def model_index(name: str, evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores over all samples as the `model-index` of the Hub; percentages where a metric is a share."""
    data = _data_name(evaluation)
    metrics = [
        {"type": row["metric"], "name": _title(row["metric"]), "value": round(_value(row, "value"), 2)}
        for row in evaluation["rows"]
        if row["kind"] == "all"
    ]
    dataset = {"type": re.sub(r"[^\w./-]+", "-", data), "name": data}
    return [{"name": name, "results": [{"task": dict(TASK), "dataset": dataset, "metrics": metrics}]}]


def refresh_card(folder: str | Path, evaluation: Mapping[str, Any]) -> bool:
    """Put the scores on the card in a model folder; False where there is none of ours to put them on."""
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
    told = f"On `{_data_name(evaluation)}`" + (f" (fingerprint {digest}…)" if digest else "")
    head = ["## Scores", "", f"{told}, with 95 % bootstrap intervals over samples:", ""]
    return [*head, "| kind | metric | score | interval | n |", "|---|---|---:|---:|---:|", *rows]


def _of_all(sparsity: Mapping[str, Any], zeros: int) -> list[str]:
    total = sparsity.get("parameters")
    return ["", f"{zeros:,} of the model's {total:,} parameters are zeros of pruned layers."] if total else []


def _value(row: Mapping[str, Any], key: str) -> float:
    return row[key] * (100 if row["metric"] in PERCENT else 1)


def _title(metric: str) -> str:
    names = {"vqa_accuracy": "VQA accuracy", "cider_d": "CIDEr-D"}
    return names.get(metric, metric.replace("_", " ")) + (", %" if metric in PERCENT else "")


def _data_name(evaluation: Mapping[str, Any]) -> str:
    """What the data is called, without the paths of the machine."""
    source = str(evaluation.get("data", "")).rstrip("/")
    hub = not source.startswith((".", "/")) and source.count("/") == 1 and not Path(source).exists()
    return source if hub else Path(source).name or "held-out samples"


def _portable(value: Any) -> Any:
    """The recipe without the paths of the machine it ran on."""
    if isinstance(value, Mapping):
        return {key: _portable(inner) for key, inner in value.items()}
    return value.rstrip("/").split("/")[-1] if isinstance(value, str) and value.startswith("/") else value
