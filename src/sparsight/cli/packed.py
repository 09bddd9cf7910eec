"""What `pack` and `unpack` print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsight.cli.tables import table


def packed_tables(facts: Mapping[str, Any], out: str | Path) -> list[Any]:
    """What `pack` prints: bytes, and the output errors of int8 values, the largest first."""
    sizes = facts["bytes"]
    rows = [
        ("weights with zeros", "layers_dense", "layers_packed"),
        ("all weights", "dense", "packed"),
    ]
    made: list[Any] = [
        table(
            f"Packed {len(facts['tensors'])} tensors",
            ("", "bytes before", "bytes now", "times smaller"),
            [(name, f"{sizes[a]:,}", f"{sizes[b]:,}", f"{sizes[a] / max(1, sizes[b]):.2f}") for name, a, b in rows],
        )
    ]
    errors = sorted(((entry["error"], name) for name, entry in facts["tensors"].items() if "error" in entry), reverse=True)
    if errors:
        columns = ("tensor", "relative output error")
        made.append(table("int8 values, on random inputs", columns, [(name, f"{error:.2%}") for error, name in errors]))
    return [*made, f"Written to {out}; after `import sparsight`, from_pretrained reads it."]


def unpacked_lines(facts: Mapping[str, Any], out: str | Path) -> list[str]:
    """What `unpack` prints."""
    sizes = facts["bytes"]
    return [f"Unpacked {sizes['packed']:,} bytes of weights to {sizes['dense']:,}.", f"Written to {out}."]
