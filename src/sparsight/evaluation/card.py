"""Scores on a model card: in its front matter, for the Hub, and in a table between its marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from sparsight.checkpoint.card import BEGIN, END
from sparsight.errors import NotWritten
from sparsight.evaluation.metrics import axis_of

TASK = {"type": "image-text-to-text", "name": "Visual question answering and captioning"}


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
    results = [
        EvalResult(
            task_type=TASK["type"], task_name=TASK["name"], dataset_type=re.sub(r"[^\w./-]+", "-", data), dataset_name=data,
            metric_type=row["metric"], metric_name=axis_of(row["metric"])[0], metric_value=round(_value(row, "value"), 2),
        )
        for row in evaluation["rows"]
        if row["kind"] == "all"
    ]  # fmt: skip
    return eval_results_to_model_index(name, results)


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
        f"| {row['kind']} | {axis_of(row['metric'])[0]} | {_value(row, 'value'):.2f} | "
        + (f"{_value(row, 'low'):.2f} to {_value(row, 'high'):.2f}" if row["low"] is not None else "")
        + f" | {row['n']} |"
        for row in evaluation["rows"]
    ]
    digest = str(evaluation.get("fingerprint", ""))[:16]
    lead = f"On `{_data_name(evaluation)}`" + (f" (fingerprint {digest}…)" if digest else "")
    head = ["## Scores", "", f"{lead}, with 95 % bootstrap intervals over samples:", ""]
    read = evaluation.get("read") or {}
    if read.get("task"):
        asked = " and ".join(f"`{prompt!r}`" for prompt in read.get("prompts", ()))
        head[2:2] = [f"The benchmark `{read['task']}`, asked in the words {asked}.", ""]
    return [*head, "| kind | metric | score | interval | n |", "|---|---|---:|---:|---:|", *rows]


def _value(row: Mapping[str, Any], key: str) -> float:
    return row[key] * axis_of(row["metric"])[1]


def _data_name(evaluation: Mapping[str, Any]) -> str:
    """Return the name of the data, without the paths of the machine."""
    source = str(evaluation.get("data", "")).rstrip("/")
    hub = not source.startswith((".", "/")) and source.count("/") == 1 and not Path(source).exists()
    return source if hub else Path(source).name or "held-out samples"
