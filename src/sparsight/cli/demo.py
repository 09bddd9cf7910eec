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
        *_packed_lines(facts),
        f"Report: {facts['report']}",
    ]


def _packed_lines(facts: Mapping[str, Any]) -> list[str]:
    """Bytes packed and squeezed, and tokens per second."""
    packed, small, bench = facts["packed"], facts["bfloat16"], facts["bench"]
    proof = "the same weights" if packed["verified"] else "OTHER WEIGHTS"
    rate = next(each["tokens_per_second"] for each in bench["generate"] if each["batch"] == 1)
    why = "" if bench["large"] else "; the layers fit into a cache, where fewer bytes save no time"

    def size(count: int) -> str:
        return f"{count / 1e6:.1f}"

    return [
        f"Packed: {size(packed['packed'])} MB of {size(packed['dense'])}, {proof}; "
        f"in bfloat16 {size(small['packed'])} of {size(small['dense'])}, squeezed {size(small['squeezed'])}",
        f"Speed: {rate['dense']:.0f} tokens per second dense, {rate['packed']:.0f} packed{why}",
    ]
