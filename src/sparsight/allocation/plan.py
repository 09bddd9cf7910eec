"""A plan says where the zeros will be: `{layer name: Pattern}`. Making one changes nothing."""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sparsight.allocation.budget import PRUNED_BY_DEFAULT, parse_budget, parse_pattern
from sparsight.allocation.policies.alpha import alpha
from sparsight.allocation.policies.ecoflap import ecoflap, ecoflap_first
from sparsight.allocation.policies.one_component import language_only, vision_only
from sparsight.allocation.policies.owl import owl
from sparsight.allocation.policies.sensitivity import sensitivity
from sparsight.allocation.policies.uniform import uniform
from sparsight.allocation.policy import CAP, Policy
from sparsight.checks import check_name, check_signature, name_of, nearest
from sparsight.cost import Cost
from sparsight.errors import SparsightError
from sparsight.masks.pattern import Pattern, check_sparsity
from sparsight.model.anatomy import Anatomy, Layer
from sparsight.model.families import COMPONENTS

if TYPE_CHECKING:
    from sparsight.calibration.probe import Probe
    from sparsight.specs import PlanSpec

Plan = dict[str, Pattern]

POLICIES: dict[str, Policy] = {
    "uniform": Policy(uniform, scale=None, cost=Cost()),
    "owl": Policy(owl, data=True),
    "alpha": Policy(alpha, scale="inverse"),
    "ecoflap": Policy(ecoflap, scale="proportional", data=True, labels=True, across=True, cap=0.0, whole=True),
    "ecoflap-first": Policy(ecoflap_first, scale="proportional", data=True, labels=True, across=True, cap=0.0, whole=True),
    "sensitivity": Policy(sensitivity, scale="curves", data=True, labels=True, across=True, cap=CAP, whole=True),
    "language-only": Policy(language_only, across=True, cost=Cost()),
    "vision-only": Policy(vision_only, across=True, cost=Cost()),
}


def make_plan(
    anatomy: Anatomy,
    *,
    sparsity: str | float | Mapping[str, float] | None = None,
    pattern: str | Pattern | Mapping[str, str] = "row",
    policy: str | Policy | Callable = "uniform",
    ignore: Sequence[str] = (),
    probe: Probe | None = None,
) -> Plan:
    """Plan the zeros of every layer.

    `sparsity` is a fraction of zeros for vision and language, or one per component, and `pattern` is for all or one per
    component; n:m sets the sparsity itself, and then a component's entry may be lower only with a policy that chooses which
    layers stay dense. `ignore` holds layer names, parts of names ending at a dot, or globs. `policy` is a name, a `Policy`,
    or a function `(layers, budget)` or `(layers, budget, probe)` that gives sparsities; `probe` is a model with calibration
    batches, which some policies need.

    **Raises** `SparsightError` for an unknown policy or component, a policy that lacks its data, an `ignore` entry that
    matches no layer, an n:m that does not divide a layer's input dimension, a budget that the policy cannot meet, and a
    plan without layers.
    """
    rule = find_policy(policy, data=probe is not None)
    kinds, budget = planned_budget(pattern, sparsity, rule)
    _check_present(anatomy, sparsity)
    layers = _without(anatomy.layers, ignore)
    budgeted = [x for x in layers if budget[x.component]]
    if rule.data:  # refused before the measuring
        for layer in budgeted:
            kinds[layer.component].check(layer.shape, layer.name)
    amounts = rule(budgeted, budget, probe, kinds)
    if not isinstance(amounts, Mapping) or not all(isinstance(amount, int | float) for amount in amounts.values()):
        raise SparsightError("`policy`: the function must give a sparsity per layer name, as in {name: 0.5}")
    plan, shapes = {}, {layer.name: layer.shape for layer in layers}
    kind_of = {layer.name: kinds[layer.component] for layer in layers}
    for name, amount in amounts.items():
        if name not in shapes:
            raise SparsightError(f"`policy`: the function names {name!r}, which is no layer it was given")
        check_sparsity(amount, f"`policy`: for {name}")
        if amount:
            plan[name] = kind_of[name] if kind_of[name].kind == "n:m" else Pattern(kind_of[name].kind, amount)
    for name, p in plan.items():
        p.check(shapes[name], name)
    if not plan:
        wish = ", ".join(f"{component}={amount:g}" for component, amount in budget.items() if amount)
        raise SparsightError(f"no layer is left to prune for {wish}; check `sparsity` and `ignore` against `inspect`")
    return plan


def _check_present(anatomy: Anatomy, sparsity: Any) -> None:
    """Refuse a sparsity for a component by name that the model does not have; a number is for those that it has."""
    if not (isinstance(sparsity, Mapping) or (isinstance(sparsity, str) and "=" in sparsity)):
        return
    there = [name for name in COMPONENTS if anatomy.component(name)]
    for name, amount in parse_budget(sparsity).items():
        if amount and name not in there:
            raise SparsightError(
                f"`sparsity`: {name}={amount:g}, and the model has no {name} layers that can be pruned; name some of "
                f"{', '.join(there)}, or add them with `family`"
            )


def check_plan(anatomy: Anatomy, spec: PlanSpec, policy: Any) -> None:
    """Refuse settings that leave no plan for this model, before anything is measured.

    **Raises** `SparsightError` as `make_plan` does.
    """
    rule = find_policy(policy)
    if rule.data:
        rule = replace(rule, importance=_alike, scale="shift", data=False)
    make_plan(anatomy, sparsity=spec.sparsity, pattern=spec.pattern, policy=rule, ignore=spec.ignore)


def _alike(layers: Sequence[Layer], budget: Any, probe: Any) -> dict[str, float]:
    return {layer.name: 1.0 for layer in layers}


def find_policy(policy: str | Policy | Callable, *, data: bool = True) -> Policy:
    """Look a policy up by name; a function works wherever a name does. `data`: whether there are calibration samples.

    **Raises** `SparsightError` for an unknown name, and for a policy that lacks its data.
    """
    if isinstance(policy, Policy):
        rule = policy
    elif callable(policy):
        check_signature("policy", policy, "(layers, budget)", "(layers, budget, probe)")
        rule = Policy(_as_importance(policy), scale=None, whole=_takes_probe(policy))
    else:
        check_name("policy", policy, tuple(POLICIES))
        rule = POLICIES[policy]
    if rule.data and not data:
        raise SparsightError(f"`policy`: {name_of(policy)} needs calibration samples; give `data`")
    return rule


def _as_importance(function: Callable) -> Callable:
    """A function `(layers, budget)` or `(layers, budget, probe)`, called with all three; its name stays."""
    if _takes_probe(function):
        return function

    @functools.wraps(function)
    def importance(layers: Sequence[Layer], budget: Mapping[str, float], probe: Probe | None) -> Mapping[str, float]:
        return function(layers, budget)

    return importance


def _takes_probe(function: Callable) -> bool:
    """Whether a policy's function has a third argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin may have no signature
        return False
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 2


def planned_budget(
    pattern: str | Pattern | Mapping[str, str], sparsity: str | float | Mapping[str, float] | None, policy: Any = None
) -> tuple[dict[str, Pattern], dict[str, float]]:
    """Read a pattern and a sparsity per component, and refuse two that contradict each other.

    `n:m` and a `Pattern` object carry a sparsity of their own; the names `row` and `tensor` do not (0.5 by default).
    Less than n:m's own is a mix of n:m and dense layers, which every `policy` but uniform can choose (None: not yet known).

    **Raises** `SparsightError` for a contradiction, and for what is no pattern or no sparsity.
    """
    kinds = parse_pattern(pattern)
    own = {c: kind for c, kind in kinds.items() if kind.kind == "n:m" or isinstance(pattern, Pattern)}  # have a sparsity
    if sparsity is None:
        sparsity = {c: own[c].sparsity if c in own else 0.5 for c in PRUNED_BY_DEFAULT}
    budget = parse_budget(sparsity)
    if len({(kind.kind, kind.n, kind.m) for c, kind in kinds.items() if budget[c]}) > 1 and _shares(policy):
        raise SparsightError(
            f"`pattern`: differs between components, which share one budget under `policy={name_of(policy)}`; give one "
            "pattern, or a policy that leaves each component its own sparsity, such as owl"
        )
    for component, fixed in own.items():
        amount = budget[component]
        mixes = fixed.kind == "n:m" and policy not in ("uniform", POLICIES["uniform"])
        if amount and abs(amount - fixed.sparsity) > 1e-6 and not (mixes and amount < fixed.sparsity):
            fewer = fixed.kind == "n:m" and amount < fixed.sparsity
            raise SparsightError(
                f"`sparsity`: {component}={amount:g} contradicts `pattern={fixed}`, which is a sparsity of "
                f"{fixed.sparsity:g}; leave `sparsity` out, or name each pruned component with {fixed.sparsity:g}"
                + (", or choose a `policy` that leaves some layers dense, such as owl" if fewer else "")
            )
    return kinds, budget


def _shares(policy: Any) -> bool:
    """Whether all components share one budget under a policy."""
    rule = POLICIES.get(policy) if isinstance(policy, str) else policy
    return isinstance(rule, Policy) and rule.across


def _without(layers: Sequence[Layer], ignore: Sequence[str]) -> list[Layer]:
    """Leave out the layers that an entry names: by a whole name, a run of its dotted parts, or a glob."""
    left = list(layers)
    for entry in ignore:
        hit = {layer.name for layer in layers if _matches(layer.name, entry)}
        if not hit:
            close = nearest(entry, tuple(layer.name for layer in layers)).split("? ")
            hint = close[0] + "?" if len(close) > 1 else "see `sparsight inspect --layers` for the names"
            raise SparsightError(f"`ignore`: {entry!r} matches no layer; {hint}")
        left = [layer for layer in left if layer.name not in hit]
    return left


def _matches(name: str, entry: str) -> bool:
    if any(sign in entry for sign in "*?["):
        return fnmatch.fnmatchcase(name, entry)
    return f".{entry}." in f".{name}."


@dataclass(frozen=True)
class PlannedModel:
    """A plan and the model it was made for."""

    anatomy: Anatomy
    plan: Plan

    def __repr__(self) -> str:
        rows = (f"{row.component} {row.sparsity:.2%} of {row.parameters:,}" for row in plan_rows(self.anatomy, self.plan))
        return f"PlannedModel({', '.join(rows)})"


@dataclass(frozen=True)
class PlanRow:
    """One row of the table of a plan."""

    component: str
    layers: int
    pruned: int
    parameters: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / self.parameters if self.parameters else 0.0


def plan_rows(anatomy: Anatomy, plan: Mapping[str, Pattern]) -> list[PlanRow]:
    """Count, per component and in all, the layers, their parameters and the zeros the plan puts into them.

    The last row, `model`, sets the zeros against every parameter of the model, the unpruned ones included.
    """
    rows = []
    for component in COMPONENTS:
        layers = anatomy.component(component)
        planned = [layer for layer in layers if layer.name in plan]
        zeros = sum(plan[layer.name].zeros(layer.shape) for layer in planned)
        rows.append(PlanRow(component, len(layers), len(planned), sum(_size(layer) for layer in layers), zeros))
    layers, pruned, zeros = (sum(getattr(r, key) for r in rows) for key in ("layers", "pruned", "zeros"))
    rows.append(PlanRow("all layers", layers, pruned, sum(r.parameters for r in rows), zeros))
    rows.append(PlanRow("model", layers, pruned, anatomy.parameters, zeros))
    return rows


def _size(layer: Layer) -> int:
    return layer.shape[0] * layer.shape[1]


def plan_facts(anatomy: Anatomy, plan: Mapping[str, Pattern]) -> dict[str, Any]:
    """What `plan` says, as plain values: the rows of the components and the pattern of every layer."""
    return {"components": plan_rows(anatomy, plan), "layers": {name: str(pattern) for name, pattern in plan.items()}}
