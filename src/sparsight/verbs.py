"""The verbs as functions: a folder to read and a folder to write, the same names and defaults as on the command line.

Every check that needs no model runs before a model is loaded, and nothing is written before the work is done.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparsight
from sparsight import processes
from sparsight.data import read
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.checkpoint import (
    Record,
    atomic_folder,
    check_output,
    found_plan,
    identity,
    read_plan,
    read_record,
    recorded_family,
    save,
    sparsity_record,
)
from sparsight.model.families import Family
from sparsight.model.unfinished import unfinished
from sparsight.model.verify import verify
from sparsight.plan.pattern import Pattern
from sparsight.plan.plan import Plan, Policy, find_policy, make_plan, planned_budget
from sparsight.settings import (
    check_seed,
    check_whole,
    plain,
    whole_name,
)

if TYPE_CHECKING:
    from sparsight.evaluate import Result

ELSEWHERE = {  # verbs that use these, or other rooms altogether
    "cost": "sparsight.plan.foretell",
    "recipe_cost": "sparsight.recipe_cost",
    "report": "sparsight.report.report",
    "run": "sparsight.run",
    "search": "sparsight.sweep.search",
    "sweep": "sparsight.sweep.run",
}
__all__ = ["Planned", "evaluate", "inspect", "plan", "prune", "restore", "verify", *ELSEWHERE]

Progress = Callable[[str, int, int], None]
Budget = str | float | Mapping[str, float]


def __getattr__(name: str) -> Any:
    if name in ELSEWHERE:
        return getattr(importlib.import_module(ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ELSEWHERE})


@dataclass(frozen=True)
class Planned:
    """A plan and the model it was made for."""

    anatomy: Anatomy
    plan: Plan


def inspect(model: str | Path, *, family: str | None = None) -> tuple[Anatomy, Any]:
    """Take a model apart: components, blocks, layers, and what is never pruned and why. Returns it with the model."""
    from sparsight.model.load import load_model

    chosen = Family.parse(family) if family else recorded_family(read_record(model))
    loaded = load_model(model)
    return anatomy(loaded, chosen), loaded


def plan(
    model: str | Path,
    *,
    sparsity: Budget | None = None,
    pattern: str | Pattern = "row",
    policy: str | Callable = "uniform",
    ignore: Sequence[str] = (),
    family: str | None = None,
    data: str | Path | None = None,
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Planned:
    """Plan where the zeros will be; nothing is changed and nothing is written.

    Some policies measure the model first, on `samples` of `data`. `policy` may be a function `(layers, budget)` or
    `(layers, budget, measure)` that gives a sparsity by layer name; `measure` is None without `data`.
    """
    from sparsight.model.load import check_device, load, load_model, parse_dtype
    from sparsight.plan.measure import Measure

    find_policy(policy, data=data is not None)
    planned_budget(pattern, sparsity, policy)
    chosen_family = Family.parse(family) if family else recorded_family(read_record(model))
    parse_dtype(dtype)
    check_device(device)
    check_seed(seed)
    check_whole("--samples", samples)
    check_whole("--batch-size", batch_size)
    measure = None
    if data is None:
        body = anatomy(load_model(model, dtype=dtype, device=device), chosen_family)
    else:
        chosen = read(data, limit=samples, seed=seed, skip_bad=skip_bad)
        loaded, processor = load(model, dtype=dtype, device=device)
        body = anatomy(loaded, chosen_family)
        calibration, _ = _encoded(chosen, processor, loaded, batch_size, device, skip_bad)
        measure = Measure(loaded, body, calibration, seed, progress)
    made = make_plan(body, sparsity=sparsity, pattern=pattern, policy=policy, ignore=ignore, measure=measure)
    return Planned(body, made)


def prune(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    method: Any = "wanda",
    refine: Any = None,
    update: Any = None,
    reconstruct: int = 0,
    permute: bool = False,
    tokens: Any = "all",
    sparsity: Budget | None = None,
    pattern: str | Pattern = "row",
    policy: str | Policy | None = None,
    ignore: Sequence[str] = (),
    family: str | None = None,
    propagate: str = "block",
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    skip_bad: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Prune `model` with a few calibration samples and write the sparse model to `out`.

    `data` is a source as `sparsight.data.read` takes it; `samples` of it are drawn with `seed`. Methods that look at the
    weights only (random, magnitude) work without `data`, but then no errors are measured. `method` makes the zeros,
    `refine` moves them, `update` changes the kept weights, `reconstruct` fits them to the dense block's outputs for that
    many epochs, `permute` regroups channels for n:m first, `tokens` says which calibration tokens count; wherever a name
    is taken, a function is. What was pruned before stays recorded, with the dense model it came from. Interrupted, it
    leaves `OUT.unfinished`, and `resume` goes on from the last finished block. Where `torchrun` has started several
    processes they share the work, and the main one writes the very weights that one process writes.

    **Raises** `SparsightError`, one line, for anything wrong with the settings, the model or the data; no folder is left
    behind, but for `OUT.unfinished` where blocks were done by then.
    """
    from sparsight.model.load import check_device, load, parse_dtype
    from sparsight.plan.measure import Measure
    from sparsight.prune.choice import choose, named, preset_policy, refuse_many
    from sparsight.prune.journal import Journal
    from sparsight.prune.prune import prune as prune_in_place

    policy = preset_policy(method, policy)
    settings = plain(locals(), "model", "data", "method", "refine", "update", "reconstruct", "permute", "tokens")
    settings |= plain(locals(), "sparsity", "pattern", "policy", "ignore", "family")
    settings |= plain(locals(), "propagate", "samples", "batch_size", "seed", "dtype")
    how = choose(
        method, refine=refine, update=update, reconstruct=reconstruct, permute=permute, tokens=tokens,
        propagate=propagate, pattern=pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern),
    )  # fmt: skip
    called = named(method, refine, update, reconstruct, permute)
    find_policy(policy, data=data is not None)
    planned_budget(pattern, sparsity, policy)
    earlier = read_record(model)
    chosen_family = Family.parse(family) if family else recorded_family(earlier)
    parse_dtype(dtype)
    check_device(device)
    check_seed(seed)
    check_whole("--samples", samples)
    check_whole("--batch-size", batch_size)
    target = check_output(out, overwrite, inputs=(model, data))
    if data is None and how.needs:
        raise SparsightError(f"--data: method {called} needs calibration samples; give a JSONL file or a folder of them")
    processes.start(device)
    refuse_many(how, processes.count())
    progress = progress if processes.is_main() else None
    chosen = read(data, limit=samples, seed=seed, skip_bad=skip_bad) if data is not None else None
    loaded, processor = load(model, dtype=dtype, device=device)
    body = anatomy(loaded, chosen_family)
    calibration: list[Any] = []
    skipped = 0
    if chosen is not None:
        calibration, skipped = _encoded(chosen, processor, loaded, batch_size, device, skip_bad)
        settings["fingerprint"] = chosen.fingerprint

    def planned_by_main() -> Plan:
        return make_plan(
            body, sparsity=sparsity, pattern=pattern, policy=policy, ignore=ignore,
            measure=Measure(loaded, body, calibration, seed=seed, progress=progress) if calibration else None,
        )  # fmt: skip

    planned = processes.by_main(planned_by_main)
    sparse_before = {**found_plan(body), **{n: p for n, p in read_plan(earlier).items() if (body[n].weight == 0).any()}}
    with ExitStack() as stack:
        ours = unfinished(target, {**settings, "files": identity(model)}, resume=resume, overwrite=overwrite)
        folder = processes.by_main(lambda: stack.enter_context(ours))
        record = prune_in_place(
            loaded, body, planned, calibration, method=how, seed=seed, journal=Journal(folder, how.mask_only),
            progress=progress,
        )  # fmt: skip

        def written_by_main() -> Record:
            written = Record(
                sparsity_record(
                    body,
                    {**sparse_before, **planned},
                    base_model=(earlier or {}).get("base_model") or whole_name(model),
                    method=" + ".join([*([earlier["method"]] if earlier else []), called]),
                    mask_only=how.mask_only and (earlier or {}).get("mask_only", True),
                    family=chosen_family,
                ),
                {"prune": {**asdict(record), "skipped_samples": skipped}},
                {"sparsight": sparsight.__version__, "prune": settings},
            )
            with atomic_folder(target, overwrite) as new:
                save(loaded, processor, written, new)
            return written

        written = processes.by_main(written_by_main)
    processes.wait()
    return written


def _encoded(
    samples: Any, processor: Any, model: Any, batch_size: int, device: str, skip_bad: bool
) -> tuple[list[Any], int]:
    """Calibration samples as batches on the device, and how many were left out."""
    from sparsight.data import Encoder, batches

    encoder = Encoder(processor, model, skip_bad=skip_bad)
    ready = [batch.to(device) for batch in batches(encoder.usable(samples), encoder, batch_size)]
    return ready, len(samples.skipped) + len(encoder.skipped)


def restore(
    sparse: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    teacher: str | Path | None = None,
    teacher_mode: str = "auto",
    teacher_cache: str | Path | None = None,
    adapter: str = "sparselora",
    tune: str | Sequence[str] = ("vision", "connector", "language"),
    rank: int | str | Mapping[str, int] | None = None,
    alpha: float = 16,
    reconstruct: int = 0,
    kl: float = 0.1,
    temperature: float = 1.0,
    divergence: str = "forward",
    hidden: float = 0.0,
    reduction: str = "token",
    lr: float = 1e-4,
    scheduler: str = "cosine",
    warmup: float = 0.03,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    samples: int | None = None,
    held_out: int | str | Path | None = None,
    patience: int | None = None,
    save_every: int = 100,
    report_to: str | Sequence[str] = (),
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    family: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    save_adapter: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Restore a sparse model and write it to `out`, merged, with every zero kept.

    `teacher` is the dense original (by default the one that `sparsity.json` names; not needed for `kl=0`), held as
    `teacher_mode` says: `shared`, `cached` (kept in the folder `teacher_cache` for the next run, if one is named), `live`,
    or the first of these that is possible. `adapter` is what is trained on the components `tune`: `sparselora`,
    `sparselora-fast` (a biased gradient), `hira`, `masked-full`, or `lora`, the rival whose merge is dense; `rank` is per
    component, as in `vision=4,connector=2,language=8`. `reconstruct` fits the blocks to the dense ones first, for that
    many epochs over 128 samples. `held_out` (a number of samples to take out of the data, or other data) is scored at
    every checkpoint: the best is what is written, and `patience` stops after so many without a better one.
    """
    given = dict(locals())
    from sparsight.restore.run import request, run

    return run(request(given), progress)


def evaluate(
    model: str | Path,
    *,
    data: str | Path,
    beams: int = 1,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    samples: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    skip_bad: bool = False,
    record: bool | str | Path = False,
    progress: Progress | None = None,
) -> Result:
    """Let a model answer held-out samples and score the answers, per kind, with 95 % bootstrap intervals.

    `record` keeps scores, answers and small pictures beside the weights, where `report` finds them, and puts the scores on
    the model card; a dense model's may be kept in another folder, named instead of True.
    """
    from sparsight.data import Encoder
    from sparsight.evaluate import evaluate as score
    from sparsight.evaluate.record import check_recordable, keep
    from sparsight.model.load import check_device, load, parse_dtype

    parse_dtype(dtype)
    check_device(device)
    check_seed(seed)
    check_whole("--samples", samples, optional=True)
    for option, value in (("--beams", beams), ("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        check_whole(option, value)
    kept_in = check_recordable(model, None if record is True else record) if record else None
    began = time.perf_counter()
    chosen = read(data, limit=samples, seed=seed if samples else None, skip_bad=skip_bad)
    loaded, processor = load(model, dtype=dtype, device=device)
    encoder = Encoder(processor, loaded, skip_bad=skip_bad)
    taken = encoder.usable(chosen)
    result = score(
        loaded, processor, taken, beams=beams, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
        progress=(lambda done, total: progress("answers", done, total)) if progress else None,
    )  # fmt: skip
    result = replace(result, skipped=len(chosen.skipped) + len(encoder.skipped))
    if kept_in is not None:
        keep(
            kept_in, result, taken, name=model, loaded=loaded, chosen=chosen, device=device,
            settings=plain(locals(), "beams", "max_new_tokens", "batch_size", "samples", "seed", "dtype", "device"),
            seconds=time.perf_counter() - began,
        )  # fmt: skip
    return result
