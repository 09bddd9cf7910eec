"""The cost of every stage, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsight.allocation.plan import POLICIES, find_policy, make_plan, planned_budget
from sparsight.checkpoint.folder import family_of, read_record
from sparsight.checks import name_of
from sparsight.cost import Cost
from sparsight.data import read_with
from sparsight.errors import SparsightError
from sparsight.estimation import machine
from sparsight.estimation.shapes import example_samples, gather_shapes, open_hollow
from sparsight.estimation.stages import Stage, Work, stages
from sparsight.fields import NEW_TOKENS
from sparsight.memory import free_memory
from sparsight.model.anatomy import anatomy
from sparsight.model.load import load_processor
from sparsight.options import options
from sparsight.pruning.compose import Composition, compose_spec, policy_of
from sparsight.pruning.methods import METHODS, REFINES, UPDATES
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.trainer import step_size, total_steps
from sparsight.restoring.verb import check_restore
from sparsight.specs import EvaluateSpec, PruneSpec, RestoreSpec


@dataclass(frozen=True)
class Estimate:
    """The costs of the stages; `tokens` per sample, `assumed` without data; `rate`, FLOPs per second of this CPU, 0 where it
    was not measured. For a recipe: `times` a stage runs, `total` FLOPs of all its runs, `without` the settings that are not
    counted."""

    stages: tuple[Stage, ...]
    tokens: Mapping[str, float]
    assumed: bool
    rate: float = 0.0
    times: Mapping[str, int] = field(default_factory=dict)
    total: Mapping[str, int] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def facts(self) -> dict[str, Any]:
        """The same as plain values; `seconds` is FLOPs by rate, a rough lower bound."""
        rows = [
            {**asdict(stage), "peak": stage.peak, "seconds": stage.seconds(self.rate) if self.rate else None}
            for stage in self.stages
        ]
        facts = {"stages": rows, "tokens_per_sample": dict(self.tokens), "assumed": self.assumed, "rate": self.rate}
        more = {"times": dict(self.times), "total": dict(self.total), "without": list(self.without)}
        return facts | (more if self.times else {})


def estimate(
    model: str | Path,
    prune: PruneSpec,
    restore: RestoreSpec,
    evaluate: EvaluateSpec,
    *,
    data: Any = None,
    timed: bool = True,
    streamed: bool = True,
) -> Estimate:
    """Estimate FLOPs, bytes and peak memory of load, prune, restore and evaluate; see `sparsight.estimate`.

    `streamed`: pruning holds one block at a time where method and policy can do with it, as between folders.

    `data` may be a list of samples.
    `evaluate.samples` None means all of the data, or as many as prune takes; `steps` None one pass over the data, or 100.
    **Raises** `SparsightError` for a method, policy or adapter of unknown cost.
    """
    composition, policy = compose_spec(prune), policy_of(prune)
    steps = step_costs(prune, composition)
    if find_policy(policy).cost is None:
        raise SparsightError(_unknown("policy", policy))
    if restore.steps == 0:
        raise SparsightError(
            "`steps`: what reconstruction alone costs is not known before it runs; it holds a block of each model, its "
            "weights four times in float32, and the activations of both walks"
        )
    if ADAPTERS[restore.adapter].shapes is None:
        raise SparsightError(_unknown("adapter", restore.adapter))
    planned_budget(prune.pattern, prune.sparsity, policy)
    check_restore(restore)
    family = family_of(read_record(model), prune.family)
    listed = isinstance(data, list)
    samples = example_samples() if data is None else data if listed else list(read_with(data, prune))
    hollow = open_hollow(str(model), prune.dtype)
    processor = load_processor(model)
    body = anatomy(hollow, family)
    plan = make_plan(body, sparsity=prune.sparsity, pattern=prune.pattern, policy=policy, ignore=prune.ignore)
    size = len(samples) if data is not None else prune.samples
    count = restore.steps if restore.steps is not None else (total_steps(restore, len(samples)) if data is not None else 100)
    used = count * step_size(restore)
    mode = ("shared" if composition.mask_only else "cached") if restore.teacher_mode == "auto" else restore.teacher_mode
    work = Work(
        steps=steps,
        gram="gram" in composition.needs,
        propagate=prune.propagate,
        samples=min(prune.samples, size),
        batch_size=prune.batch_size,
        teacher=mode if restore.kl else "none",
        train_steps=count,
        learned=min(len(samples), used) if data is not None else used,
        restore_batch=restore.rows,
        accumulate=restore.accumulate,
        asked=evaluate.samples or size,
        eval_batch=evaluate.batch_size,
        max_new_tokens=evaluate.max_new_tokens or NEW_TOKENS,
        beams=evaluate.beams or 1,
        streamed=streamed and "gradient" not in composition.needs and not find_policy(policy).whole,
        park=prune.park,
        free=free_memory(),
    )
    base = machine.measured_base(str(model), hollow.dtype)
    shapes, tokens = gather_shapes(hollow, processor, body, plan, samples, work, restore, base)
    rate = machine.measured_rate(hollow.dtype) if timed else 0.0
    return Estimate(stages(shapes, work), tokens, data is None, rate)


def step_costs(prune: PruneSpec, composition: Composition) -> dict[str, Cost]:
    """The cost of every step that works on one layer, by name.

    **Raises** `SparsightError` for a step whose cost is not known.
    """
    fields = zip(("method", "refine", "update"), (composition.method, composition.refine, composition.update), strict=True)
    costs = {}
    for name, step in fields:
        if step is not None:
            if step.cost is None:
                raise SparsightError(_unknown(name, getattr(prune, name)))
            costs[name_of(step)] = step.cost
    return costs


def _unknown(name: str, entry: Any) -> str:
    """The message about a table's entry without a cost."""
    what = entry if isinstance(entry, str) else "a function"
    names = ", ".join(known_costs(name))
    return f"`{name}`: what {what} costs is not known before it runs; `cost` can estimate {names}"


def known_costs(name: str) -> list[str]:
    """The names in a field's table that have a cost."""
    if name == "adapter":
        return [key for key, adapter in ADAPTERS.items() if adapter.names and adapter.shapes is not None]
    tables: Mapping[str, Mapping[str, Any]] = {
        "method": METHODS, "refine": REFINES, "update": UPDATES, "policy": POLICIES,
    }  # fmt: skip
    return [key for key, step in tables[name].items() if step.cost is not None]


def uncounted(spec: Any) -> list[str]:
    """The fields of a record that change the cost, are not counted, and are set to other than nothing."""
    names = [name for name, (_, option) in options(type(spec)).items() if option.cost is False]
    kinds = type(spec).__dataclass_fields__
    return [name for name in names if getattr(spec, name) not in (None, False, 0, "no", kinds[name].default)]
