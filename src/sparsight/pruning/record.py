"""The measurements of pruning, collected stop by stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsight.masks.pattern import Pattern


@dataclass(repr=False)
class PruneRecord:
    """The measurements of pruning: relative output errors ||f'(x) - f(x)|| / ||f(x)|| per layer and per block.

    `tokens` counts the calibration tokens of each block (of each layer with `propagate=layer`) per kind, without padding.
    `unreached` lists layers that no calibration token reached, which stay dense; `pooled` experts with too few tokens,
    pruned with the moments of all; `ungraded` layers on which the loss does not depend, which `snip` and `fisher` score
    as Wanda does; `permuted` layers whose input channels were reordered. `sparser` has the sparsity of layers that end
    with more zeros than planned, as those that were sparse before; `damping` the damping of Gram matrices that needed
    more than 1 % of their mean diagonal; `reconstructed` the relative distance of each fitted block's outputs from the
    dense model's, before and after; `memory` the process's peak in bytes. `data` says what was read of the samples, where
    that is not all (`Samples.facts`). `plan` and `method` describe the pruning of a model in memory, for `save` and
    `verify`.
    """

    layer_errors: dict[str, float] = field(default_factory=dict)
    block_errors: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    pooled: list[str] = field(default_factory=list)
    ungraded: list[str] = field(default_factory=list)
    sparser: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    reconstructed: dict[str, tuple[float, float]] = field(default_factory=dict)
    permuted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int | None = None
    skipped_samples: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Pattern] = field(default_factory=dict)
    method: str = "unknown"

    def __repr__(self) -> str:
        errors = self.layer_errors.values()
        mean = f", mean output error {sum(errors) / len(errors):.3f}" if errors else ""
        return f"PruneRecord({self.method}, {len(self.plan or errors)} layers{mean})"

    def measured(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        hidden = ("plan", "method", *(() if self.data else ("data",)))
        return {key: value for key, value in self.__dict__.items() if key not in hidden}

    def pruned(self, plan: Mapping[str, Pattern]) -> dict[str, Pattern]:
        """The part of a plan that was carried out: all but the layers that no calibration token reached."""
        dense = {*self.unreached}
        return {name: pattern for name, pattern in plan.items() if name not in dense}

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add the measurements of one stop, in place."""
        add_to(self.__dict__, facts)


def add_to(record: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """Extend the lists and update the mappings of `record` by those of `facts`, in place."""
    for key, value in facts.items():
        if isinstance(value, list):
            record.setdefault(key, []).extend(value)
        else:
            record.setdefault(key, {}).update(value)
