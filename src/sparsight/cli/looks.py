"""What `ask` and `diff` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsight.cli.tables import table


def answers_table(facts: Mapping[str, Any]) -> list[Any]:
    """The answers of the models, one below the other, and whether they are the same."""
    rows = [(each["model"], each["answer"] or "(nothing)", f"{each['seconds']:.1f}") for each in facts["answers"]]
    same = len({each["answer"] for each in facts["answers"]}) == 1
    line = [] if len(rows) == 1 else ["The same answer" if same else "Other answers"]
    return [table(facts["question"], ("model", "answer", "s"), rows, text_columns=2), *line]


def diff_tables(facts: Mapping[str, Any], layers: bool) -> list[Any]:
    """Overlap and drift per component and block, or per layer."""
    columns = ("parameters", "zeros of A", "zeros of B", "overlap", "drift")

    def row(name: str, part: Mapping[str, Any]) -> tuple[str, ...]:
        shares = (f"{part[key] / part['parameters']:.2%}" for key in ("zeros_a", "zeros_b"))
        overlap = "–" if part["overlap"] is None else f"{part['overlap']:.4f}"
        return name, f"{part['parameters']:,}", *shares, overlap, f"{part['drift']:.4f}"

    inner = "layers" if layers else "blocks"
    return [
        table(f"A {facts['a']} · B {facts['b']}", ("component", *columns), [row(*x) for x in facts["components"].items()]),
        table(inner.capitalize(), (inner[:-1], *columns), [row(*x) for x in facts[inner].items()]),
        "Overlap: zeros of both over zeros of either. Drift: ||B - A|| / ||A|| over the weights that both keep.",
    ]
