"""A plan says where the zeros will be: `{layer name: Pattern}`. Making one changes nothing."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.model.families import COMPONENTS
from sparsight.plan.alpha import alpha
from sparsight.plan.budget import nearest, parse_budget
from sparsight.plan.ecoflap import ecoflap, ecoflap_first
from sparsight.plan.one_component import language_only, vision_only
from sparsight.plan.owl import owl
from sparsight.plan.pattern import Pattern, check_sparsity
from sparsight.plan.policy import CAP, Policy
from sparsight.plan.sensitivity import sensitivity
from sparsight.plan.uniform import uniform

if TYPE_CHECKING:
    from sparsight.plan.measure import Measure

Plan = dict[str, Pattern]
Rule = Callable[..., Mapping[str, float]]  # a Policy, or any (layers, budget) or (layers, budget, measure)

POLICIES: dict[str, Rule] = {
    "uniform": uniform,
    "owl": Policy(owl, data=True),
    "alpha": Policy(alpha, scale="inverse"),
    "ecoflap": Policy(ecoflap, scale="proportional", data=True, across=True, cap=CAP),
    "ecoflap-first": Policy(ecoflap_first, scale="proportional", data=True, across=True, cap=CAP),
    "sensitivity": Policy(sensitivity, scale="curves", data=True, across=True, cap=CAP),
    "language-only": Policy(language_only, across=True),
    "vision-only": Policy(vision_only, across=True),
}


def make_plan(
    anatomy: Anatomy,
    *,
    sparsity: str | float | Mapping[str, float] | None = None,
    pattern: str | Pattern = "row",
    policy: str | Rule = "uniform",
    ignore: Sequence[str] = (),
    measure: Measure | None = None,
) -> Plan:
    """Plan the zeros of every layer.

    `sparsity` is a fraction of zeros for vision and language, or one per component; n:m sets it itself, and then a
    component's entry may be lower only with a policy that chooses which layers stay dense. `ignore` holds layer names,
    parts of names ending at a dot, or globs. `policy` is a name or a function `(layers, budget)` or `(layers, budget,
    measure)`; `measure` is a model with calibration batches, which some policies need.

    **Raises** `SparsightError` for an unknown policy or component, a policy that lacks its data, an `ignore` entry that
    matches no layer, an n:m that does not divide a layer's input dimension, a budget that the policy cannot meet, and a
    plan without layers.
    """
    rule = find_policy(policy, data=measure is not None)
    fixed, budget = planned_budget(pattern, sparsity, policy)
    layers = _without(anatomy.layers, ignore)
    plan = {}
    spent = _spend(rule, [x for x in layers if budget[x.component]], budget, measure, fixed)
    known = {layer.name for layer in layers}
    if not isinstance(spent, Mapping) or not all(isinstance(amount, int | float) for amount in spent.values()):
        raise SparsightError("--policy: the function must give a sparsity per layer name, as in {name: 0.5}")
    for name, amount in spent.items():
        if name not in known:
            raise SparsightError(f"--policy: the function names {name!r}, which is no layer it was given")
        check_sparsity(amount, f"--policy: for {name}")
        if amount:
            plan[name] = fixed if fixed.kind == "n:m" else Pattern(fixed.kind, amount)
    shapes = {layer.name: layer.shape for layer in layers}
    for name, p in plan.items():
        p.check(shapes[name], name)
    if not plan:
        asked = ", ".join(f"{component}={amount:g}" for component, amount in budget.items() if amount)
        raise SparsightError(f"no layer is left to prune for {asked}; check --sparsity and --ignore against `inspect`")
    return plan


def find_policy(policy: str | Rule, *, data: bool = True) -> Rule:
    """Look a policy up by name; a function works wherever a name does. `data`: whether there are calibration samples."""
    if not callable(policy) and policy not in POLICIES:
        raise SparsightError(f"--policy: unknown policy {policy!r}; {nearest(policy, tuple(POLICIES))}")
    rule = POLICIES[policy] if isinstance(policy, str) else policy
    if isinstance(rule, Policy) and rule.data and not data:
        name = next((name for name, known in POLICIES.items() if known is rule), "this one")
        raise SparsightError(f"--policy: {name} needs calibration samples; give --data")
    return rule


def _spend(
    rule: Rule, layers: Sequence[Layer], budget: Mapping[str, float], measure: Measure | None, fixed: Pattern
) -> Mapping[str, float]:
    """Call a policy with as much as it takes."""
    if isinstance(rule, Policy):
        if rule.data:  # before the measuring
            for layer in layers:
                fixed.check(layer.shape, layer.name)
        return rule(layers, budget, measure, fixed)
    try:
        takes = [
            p for p in inspect.signature(rule).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except ValueError:  # a builtin may have no signature
        takes = []
    return rule(layers, budget, measure) if len(takes) > 2 else rule(layers, budget)


def planned_budget(
    pattern: str | Pattern,
    sparsity: str | float | Mapping[str, float] | None,
    policy: str | Rule | None = None,
) -> tuple[Pattern, dict[str, float]]:
    """Read a pattern and a sparsity per component, and refuse two that contradict each other.

    `n:m` and a `Pattern` object carry a sparsity of their own; the names `row` and `tensor` do not (0.5 by default).
    Less than n:m's own is a mix of n:m and dense layers, which every `policy` but uniform can choose (None: not yet known).
    """
    fixed = pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern)
    if fixed.kind != "n:m" and not isinstance(pattern, Pattern):
        return fixed, parse_budget(0.5 if sparsity is None else sparsity)
    budget = parse_budget(fixed.sparsity if sparsity is None else sparsity)
    mixes = fixed.kind == "n:m" and policy not in ("uniform", uniform)
    for component, amount in budget.items():
        if amount and abs(amount - fixed.sparsity) > 1e-6 and not (mixes and amount < fixed.sparsity):
            fewer = fixed.kind == "n:m" and amount < fixed.sparsity
            raise SparsightError(
                f"--sparsity: {component}={amount:g} contradicts --pattern {fixed}, which is a sparsity of "
                f"{fixed.sparsity:g}; leave --sparsity out, or name each pruned component with {fixed.sparsity:g}"
                + (", or choose a --policy that leaves some layers dense, such as owl" if fewer else "")
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
