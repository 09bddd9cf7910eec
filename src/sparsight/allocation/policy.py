"""A policy: what the layers are worth, and how that becomes sparsities. `allocation/solver.py` shares the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsight.allocation.solver import MOST, Scale, allocate
from sparsight.cost import Cost
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import Layer

if TYPE_CHECKING:
    from sparsight.calibration.probe import Probe

CAP = 0.8  # where a loss near the dense model says little about a layer almost empty
HEADROOM = 0.1  # of a cap above the budget


@dataclass(frozen=True)
class Policy:
    """Called with `(layers, budget, probe, pattern)` it gives `{layer name: sparsity}`; `pattern` may be one per component.

    `importance(layers, budget, probe)` gives the worth of a weight of each layer, by layer name: a number, or for the scale
    `curves` what it costs at some sparsities; a layer that it leaves out stays dense. Without a scale it gives sparsities
    itself. `data`: it needs calibration samples, `labels`: with labels. `across`: all components share one budget, the
    number of zeros the uniform policy would spend; otherwise every component meets its own. `cap` is the highest sparsity of
    a layer, or the budget and `HEADROOM` where that is more, as always for 0. `cost` is for the estimate; None: not known.
    `whole`: the policy changes weights to measure, or takes gradients, so that the whole model must be in memory.
    """

    importance: Callable[..., Mapping[str, Any]]
    scale: Scale | None = "shift"
    data: bool = False
    labels: bool = False
    across: bool = False
    cap: float = MOST
    cost: Cost | None = None
    whole: bool = False

    def __call__(
        self,
        layers: Sequence[Layer],
        budget: Mapping[str, float],
        probe: Probe | None = None,
        pattern: Pattern | Mapping[str, Pattern] = Pattern("row", 0.0),  # noqa: B008
    ) -> Mapping[str, float]:
        worth = self.importance(layers, budget, probe)
        if self.scale is None:
            return worth
        plan: dict[str, float] = {}
        for group in [list(layers)] if self.across else by(layers, "component").values():
            taking = [layer for layer in group if layer.name in worth]
            if not taking:
                continue
            mean = sum(budget[layer.component] * size(layer) for layer in group) / sum(map(size, taking))
            plan |= allocate(
                {layer.name: worth[layer.name] for layer in taking},
                {layer.name: layer.shape for layer in taking},
                mean,
                pattern=pattern if isinstance(pattern, Pattern) else pattern[taking[0].component],
                scale=self.scale,
                cap=ceiling(self.cap, mean),
            ).sparsity
        return plan


def ceiling(cap: float, mean: float) -> float:
    """The highest sparsity of a layer under a budget of `mean`: the cap, raised where it would leave nothing to share."""
    return min(MOST, max(cap, mean + HEADROOM))


def by(layers: Sequence[Layer], kind: str) -> dict[str, list[Layer]]:
    """Group layers by their `component` or `block`."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(getattr(layer, kind), []).append(layer)
    return groups


def size(layer: Layer) -> int:
    """The number of a layer's weights."""
    rows, columns = layer.shape
    return rows * columns


def stretched(values: Mapping[str, float], layers: Sequence[Layer]) -> dict[str, float]:
    """Stretch a value per layer to 0 .. 1 within each component; all 0.5 where there is nothing to stretch."""
    stretch: dict[str, float] = {}
    for group in by(layers, "component").values():
        least, most = (f(values[layer.name] for layer in group) for f in (min, max))
        for layer in group:
            stretch[layer.name] = (values[layer.name] - least) / (most - least) if most > least else 0.5
    return stretch
