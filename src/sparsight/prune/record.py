"""What pruning measured, put together stop by stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PruneRecord:
    """What pruning did: relative output errors ||f'(x) - f(x)|| / ||f(x)|| per layer and per block.

    `tokens` are the calibration tokens that each block (layer, with `stage`) has seen, per kind, without padding; `pooled`
    the experts that saw too few and were pruned with the moments of all; `ungraded` the layers on which the loss does not
    depend, which a gradient's method scores as Wanda does; `damping` what a Gram matrix needed beyond
    the usual 1 % of its mean diagonal; `reconstructed` the errors before and after, per part of a block; `permuted` the
    layers whose input channels were reordered; `memory` the bytes that the process had held at most by then.
    """

    layer_errors: dict[str, float] = field(default_factory=dict)
    block_errors: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    pooled: list[str] = field(default_factory=list)
    ungraded: list[str] = field(default_factory=list)
    damping: dict[str, float] = field(default_factory=dict)
    reconstructed: dict[str, tuple[float, float]] = field(default_factory=dict)
    permuted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int | None = None

    def add(self, facts: Mapping[str, Any]) -> None:
        """Take what was measured at one stop."""
        add_to(self.__dict__, facts)


def add_to(known: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Extend lists and update mappings by what else was measured."""
    for key, value in facts.items():
        if isinstance(value, list):
            known.setdefault(key, []).extend(value)
        else:
            known.setdefault(key, {}).update(value)
