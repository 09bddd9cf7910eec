"""`plan --cost`: what every stage of a road will take, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsight.data import read
from sparsight.model.anatomy import anatomy
from sparsight.model.checkpoint import read_record, recorded_family
from sparsight.model.families import Family
from sparsight.model.load import load_processor
from sparsight.plan import forecast as foretelling
from sparsight.plan import machine
from sparsight.plan.cost import Work
from sparsight.plan.pattern import Pattern
from sparsight.plan.plan import make_plan, planned_budget
from sparsight.prune.choice import choose
from sparsight.restore.student import Tuning
from sparsight.settings import check_seed, check_whole, parse_ranks


def cost(
    model: str | Path,
    *,
    sparsity: str | float | Mapping[str, float] | None = None,
    pattern: str | Pattern = "row",
    policy: str = "uniform",
    ignore: Sequence[str] = (),
    family: str | None = None,
    data: str | Path | None = None,
    samples: int = 128,
    batch_size: int = 8,
    method: str = "wanda",
    refine: str | None = None,
    update: str | None = None,
    propagate: str = "block",
    adapter: str = "sparselora",
    rank: int | str | Mapping[str, int] | None = None,
    teacher_mode: str = "auto",
    kl: float = 0.1,
    steps: int | None = None,
    restore_batch_size: int = 32,
    accumulate: int = 1,
    gradient_checkpointing: bool = False,
    eval_samples: int | None = None,
    eval_batch_size: int = 32,
    max_new_tokens: int = 32,
    beams: int = 1,
    seed: int = 0,
    dtype: str = "auto",
    skip_bad: bool = False,
    timed: bool = True,
) -> foretelling.Forecast:
    """Foretell FLOPs, bytes and peak memory of load, prune, restore and evaluate, on a CPU, before anything runs.

    No weight is read or allocated: `model` may be a folder with a configuration and a processor only. Token counts are
    those of the first samples of `data`, else of a picture of 640 × 480 with a question of 16 words and an answer of 4.
    `steps` None is one pass over the data, 100 without any; `eval_samples` None is all of it, else `samples`. `timed`
    measures for a moment how fast this CPU multiplies, for rough times.

    **Raises** `SparsightError` for a method, policy or adapter whose cost is not known, and as the stages themselves would.
    """
    how = choose(method, refine=refine, update=update, propagate=propagate)
    foretelling.check(method, refine, update, policy, adapter)
    planned_budget(pattern, sparsity, policy)
    ranks = parse_ranks(rank)
    Tuning(adapter, ranks, teacher_mode=teacher_mode).check()
    check_seed(seed)
    counts = {"--samples": samples, "--batch-size": batch_size, "--restore-batch-size": restore_batch_size}
    counts |= {"--accumulate": accumulate, "--eval-batch-size": eval_batch_size, "--max-new-tokens": max_new_tokens}
    for option, count in (counts | {"--beams": beams}).items():
        check_whole(option, count)
    check_whole("--steps", steps, optional=True)
    check_whole("--eval-samples", eval_samples, optional=True)
    chosen_family = Family.parse(family) if family else recorded_family(read_record(model))
    found = list(read(data, skip_bad=skip_bad)) if data is not None else foretelling.invented()
    shapes = foretelling.open_hollow(str(model), dtype)
    processor = load_processor(model)
    body = anatomy(shapes, chosen_family)
    planned = make_plan(body, sparsity=sparsity, pattern=pattern, policy=policy, ignore=ignore)
    batch = restore_batch_size * accumulate
    steps = steps or (-(-len(found) // batch) if data is not None else 100)
    learned = min(len(found), steps * batch) if data is not None else steps * batch
    mode = ("shared" if how.mask_only else "cached") if teacher_mode == "auto" else teacher_mode
    mode = mode if kl else "none"
    solvers = frozenset(name for name in (method, refine, update) if name in foretelling.SOLVERS)
    work = Work(
        solvers, propagate, min(samples, len(found)) if data is not None else samples, batch_size, mode, steps, learned,
        restore_batch_size, accumulate, eval_samples or (len(found) if data is not None else samples), eval_batch_size,
        max_new_tokens, beams,
    )  # fmt: skip
    training = foretelling.Training(adapter, ranks, gradient_checkpointing)
    base = machine.measured_base(str(model), shapes.dtype)
    stages, tokens = foretelling.forecast(shapes, processor, (body, planned), found, work, training, base)
    rate = machine.measured_rate(shapes.dtype) if timed else 0.0
    return foretelling.Forecast(stages, tokens, data is None, rate)
