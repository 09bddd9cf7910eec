"""What `demo` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsight.cli.tables import table, verify_lines


def demo_tables(facts: Mapping[str, Any]) -> list[Any]:
    """Scores, sparsity and sizes of the demo's models, and the report's path."""

    def score(run: Mapping[str, Any], key: str) -> str:
        value, low, high = (100 * run[key][k] for k in ("value", "low", "high"))
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"

    rows = [
        (
            run["label"],
            score(run, "questions"),
            score(run, "captions"),
            *(f"{run['sparsity'][component]:.2%}" for component in ("vision", "language")),
            f"{run['bytes'] / 1e6:.1f}",
            f"{run['packed_bytes'] / 1e6:.1f}",
            f"{run['seconds']:.0f}" if run["seconds"] else "–",
        )
        for run in facts["runs"].values()
    ]
    columns = ("model", "questions %", "captions %", "vision", "language", "MB", "packed", "s")
    return [
        table(f"Digit scenes, InstructBLIP, Wanda {facts['pattern']}", columns, rows),
        "Held-out exact match, 95 % interval · zeros per component · MB in float32, and with zeros left out",
        *verify_lines(facts["verify"]),
        *_packed_lines(facts["packed"], facts["bench"]),
        f"Report: {facts['report']}",
    ]


def _packed_lines(packed: Mapping[str, Any], bench: Mapping[str, Any]) -> list[str]:
    """Bytes packed and squeezed, and tokens per second."""
    proof = "the same weights" if packed["verified"] else "OTHER WEIGHTS"
    sizes = {name: f"{packed[f'bfloat16_{name}'] / 1e6:.1f}" for name in ("dense", "packed", "squeezed")}
    rate = next(each for each in bench["generate"] if each["batch"] == 1)["tokens_per_second"]
    why = (
        ""
        if bench["large"]
        else "; its layers fit into a cache, where packing gains no time (docs/guides/smaller-and-faster.md)"
    )
    return [
        f"Packed: {packed['packed'] / 1e6:.1f} MB of {packed['dense'] / 1e6:.1f}, {proof}; "
        f"in bfloat16 {sizes['packed']} of {sizes['dense']}, squeezed {sizes['squeezed']}",
        f"Speed: {rate['dense']:.0f} tokens per second dense, {rate['packed']:.0f} packed{why}",
    ]
