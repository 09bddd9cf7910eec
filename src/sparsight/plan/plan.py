"""A plan says where the zeros will be: `{layer name: Pattern}`. Making one changes nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.model.families import COMPONENTS
from sparsight.plan.budget import nearest, parse_budget
from sparsight.plan.pattern import Pattern, check_sparsity
from sparsight.plan.uniform import uniform

Plan = dict[str, Pattern]
Policy = Callable[..., dict[str, float]]

POLICIES: dict[str, Policy] = {"uniform": uniform}


def make_plan(
    anatomy: Anatomy,
    *,
    sparsity: str | float | Mapping[str, float] | None = None,
    pattern: str | Pattern = "row",
    policy: str | Policy = "uniform",
    ignore: Sequence[str] = (),
) -> Plan:
    """Plan the zeros of every layer.

    `sparsity` is a fraction of zeros for vision and language, or one per component; n:m sets it itself, and then a
    component's entry may only repeat it or be 0. `ignore` holds layer names, parts of names ending at a dot, or globs.

    **Raises** `SparsightError` for an unknown policy or component, an `ignore` entry that matches no layer, an n:m that
    does not divide a layer's input dimension, and a plan without layers.
    """
    rule = find_policy(policy)
    fixed, budget = planned_budget(pattern, sparsity)
    layers = _without(anatomy.layers, ignore)
    plan = {}
    for name, amount in rule([layer for layer in layers if budget[layer.component]], budget).items():
        check_sparsity(amount, f"--policy: for {name}")
        plan[name] = fixed if fixed.kind == "n:m" else Pattern(fixed.kind, amount)
    plan = {name: p for name, p in plan.items() if p.sparsity}
    shapes = {layer.name: layer.shape for layer in layers}
    for name, p in plan.items():
        p.check(shapes[name], name)
    if not plan:
        asked = ", ".join(f"{component}={amount:g}" for component, amount in budget.items() if amount)
        raise SparsightError(f"no layer is left to prune for {asked}; check --sparsity and --ignore against `inspect`")
    return plan


def find_policy(policy: str | Policy) -> Policy:
    if callable(policy):
        return policy
    if policy not in POLICIES:
        raise SparsightError(f"--policy: unknown policy {policy!r}; {nearest(policy, tuple(POLICIES))}")
    return POLICIES[policy]


def planned_budget(
    pattern: str | Pattern, sparsity: str | float | Mapping[str, float] | None
) -> tuple[Pattern, dict[str, float]]:
    """Read a pattern and a sparsity per component, and refuse two that contradict each other.

    `n:m` and a `Pattern` object carry a sparsity of their own; the names `row` and `tensor` do not (0.5 by default).
    """
    fixed = pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern)
    if fixed.kind != "n:m" and not isinstance(pattern, Pattern):
        return fixed, parse_budget(0.5 if sparsity is None else sparsity)
    budget = parse_budget(fixed.sparsity if sparsity is None else sparsity)
    for component, amount in budget.items():
        if amount and abs(amount - fixed.sparsity) > 1e-6:
            raise SparsightError(
                f"--sparsity: {component}={amount:g} contradicts --pattern {fixed}, which is a sparsity of "
                f"{fixed.sparsity:g}; leave --sparsity out, or name each pruned component with {fixed.sparsity:g}"
            )
    return fixed, budget


def _without(layers: Sequence[Layer], ignore: Sequence[str]) -> list[Layer]:
    """Leave out the layers that an entry names: by a whole name, a run of its dotted parts, or a glob."""
    left = list(layers)
    for entry in ignore:
        hit = {layer.name for layer in layers if _matches(layer.name, entry)}
        if not hit:
            close = nearest(entry, tuple(layer.name for layer in layers)).split("? ")
            hint = close[0] + "?" if len(close) > 1 else "see `sparsight inspect --layers` for the names"
            raise SparsightError(f"--ignore: {entry!r} matches no layer; {hint}")
        left = [layer for layer in left if layer.name not in hit]
    return left


def _matches(name: str, entry: str) -> bool:
    if any(sign in entry for sign in "*?["):
        return fnmatch.fnmatchcase(name, entry)
    return f".{entry}." in f".{name}."


@dataclass(frozen=True)
class Share:
    """One row of the table of a plan."""

    component: str
    layers: int
    pruned: int
    parameters: int
    zeros: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.parameters if self.parameters else 0.0


def shares(anatomy: Anatomy, plan: Mapping[str, Pattern]) -> list[Share]:
    """Count, per component and in all, the layers, their parameters and the zeros the plan puts into them.

    The last row, `model`, sets the zeros against every parameter of the model, the unpruned ones included.
    """
    rows = []
    for component in COMPONENTS:
        layers = anatomy.component(component)
        planned = [layer for layer in layers if layer.name in plan]
        zeros = sum(plan[layer.name].zeros(layer.shape) for layer in planned)
        rows.append(Share(component, len(layers), len(planned), sum(_size(layer) for layer in layers), zeros))
    layers, pruned, zeros = (sum(getattr(r, key) for r in rows) for key in ("layers", "pruned", "zeros"))
    rows.append(Share("all layers", layers, pruned, sum(r.parameters for r in rows), zeros))
    rows.append(Share("model", layers, pruned, anatomy.parameters, zeros))
    return rows


def _size(layer: Layer) -> int:
    return layer.shape[0] * layer.shape[1]


def plan_facts(anatomy: Anatomy, plan: Mapping[str, Pattern]) -> dict[str, Any]:
    """What `plan` says, as plain values: the shares of the components and the pattern of every layer."""
    return {"components": shares(anatomy, plan), "layers": {name: str(pattern) for name, pattern in plan.items()}}
