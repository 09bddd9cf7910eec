"""The two measures of every row: exact match on held-out questions, and perplexity on held-out text; and the rows' file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import texts
import torch

import sparsight
from sparsight.data import read
from sparsight.evaluation import evaluate

CPU = torch.backends.cpu.get_cpu_capability()  # another kind of it builds another model, from the same seed


class Measure:
    """The held-out data of a model that `build.py` made, and a way to measure a model on it."""

    def __init__(self, folder: Path, processor: Any, questions: int, passages: int) -> None:
        self.processor = processor
        self.samples = list(read(folder / "data" / "heldout.jsonl", limit=questions, seed=0))
        every = (folder / "data" / "heldout.txt").read_text(encoding="utf-8").splitlines()
        some = [every[i * len(every) // passages] for i in range(passages)] if passages < len(every) else every
        self.text = texts.text_batches(some, processor.tokenizer)

    def __call__(self, model: Any) -> dict[str, str]:
        """Exact match in percent with a 95 % bootstrap interval over questions, and perplexity."""
        answers = evaluate(
            model, self.processor, self.samples, metrics=("exact_match",), max_new_tokens=8
        )  # fmt: skip
        row = next(row for row in answers.rows if (row["metric"], row["kind"]) == ("exact_match", "all"))
        cells = {name: f"{100 * row[key]:.1f}" for name, key in (("exact", "value"), ("low", "low"), ("high", "high"))}
        return {**cells, "perplexity": f"{sparsight.evaluate(model, self.text).value('perplexity'):.2f}"}


def stored(file: Path) -> list[dict[str, str]]:
    """The rows of a file, none if it is not there."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def keep(row: dict[str, Any], file: Path, columns: Sequence[str]) -> None:
    """Add a row to a file, and print it."""
    print("  ".join(f"{row.get(column, '')!s:>10}" for column in columns), flush=True)
    rows = [*stored(file), row]
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def zeros(model: Any, components: Sequence[str]) -> float:
    """The share of zeros in the layers of components."""
    layers = [layer for component in components for layer in sparsight.anatomy(model).component(component)]
    return sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)
