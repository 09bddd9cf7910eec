"""The verbs as functions: a folder to read and a folder to write, the same names and defaults as on the command line.

Every check that needs no model runs before a model is loaded, and nothing is written before the work is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparsight
from sparsight.data import read
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.checkpoint import (
    Record,
    atomic_folder,
    check_output,
    found_plan,
    read_metrics,
    read_plan,
    read_recipe,
    read_record,
    recorded_family,
    save,
    sparsity_record,
)
from sparsight.model.families import Family
from sparsight.model.unfinished import unfinished
from sparsight.model.verify import verify
from sparsight.plan.budget import check_component, parse_pairs
from sparsight.plan.pattern import Pattern
from sparsight.plan.plan import Plan, Policy, find_policy, make_plan, planned_budget

if TYPE_CHECKING:
    from sparsight.evaluate import Result

__all__ = ["Planned", "evaluate", "inspect", "plan", "prune", "restore", "verify"]

Progress = Callable[[str, int, int], None]
Budget = str | float | Mapping[str, float]


@dataclass(frozen=True)
class Planned:
    """A plan and the model it was made for."""

    anatomy: Anatomy
    plan: Plan


def inspect(model: str | Path, *, family: str | None = None) -> tuple[Anatomy, Any]:
    """Take a model apart: components, blocks, layers, and what is never pruned and why. Returns it with the model."""
    from sparsight.model.load import load

    chosen = Family.parse(family) if family else recorded_family(read_record(model))
    loaded, _ = load(model)
    return anatomy(loaded, chosen), loaded


def plan(
    model: str | Path,
    *,
    sparsity: Budget | None = None,
    pattern: str | Pattern = "row",
    policy: str | Policy = "uniform",
    ignore: Sequence[str] = (),
    family: str | None = None,
) -> Planned:
    """Plan where the zeros will be; nothing is changed and nothing is written."""
    find_policy(policy)
    planned_budget(pattern, sparsity)
    body, _ = inspect(model, family=family)
    return Planned(body, make_plan(body, sparsity=sparsity, pattern=pattern, policy=policy, ignore=ignore))


def prune(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    method: Any = "wanda",
    sparsity: Budget | None = None,
    pattern: str | Pattern = "row",
    policy: str | Policy = "uniform",
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
    weights only (random, magnitude) work without `data`, but then no errors are measured. Interrupted, it leaves
    `OUT.unfinished`, and `resume` goes on from the last finished block.

    **Raises** `SparsightError`, one line, for anything wrong with the settings, the model or the data; then no folder
    is left behind.
    """
    from sparsight.data import Encoder, batches
    from sparsight.model.load import check_device, load, parse_dtype
    from sparsight.prune.journal import Journal
    from sparsight.prune.methods import find_method
    from sparsight.prune.prune import check_propagate
    from sparsight.prune.prune import prune as prune_in_place

    settings = _settings(locals(), "model", "data", "method", "sparsity", "pattern", "policy", "ignore", "family")
    settings |= _settings(locals(), "propagate", "samples", "batch_size", "seed", "dtype")
    how = find_method(method)
    find_policy(policy)
    check_propagate(propagate)
    planned_budget(pattern, sparsity)
    chosen = Family.parse(family) if family else recorded_family(read_record(model))
    parse_dtype(dtype)
    check_device(device)
    _whole("--samples", samples)
    _whole("--batch-size", batch_size)
    target = check_output(out, overwrite)
    if data is None and how.needs is not None:
        raise SparsightError(f"--data: method {method} needs calibration samples; give a JSONL file or a folder of them")
    chosen_samples = read(data, limit=samples, seed=seed, skip_bad=skip_bad) if data is not None else None
    loaded, processor = load(model, dtype=dtype, device=device)
    body = anatomy(loaded, chosen)
    planned = make_plan(body, sparsity=sparsity, pattern=pattern, policy=policy, ignore=ignore)
    calibration, skipped = [], 0
    if chosen_samples is not None:
        encoder = Encoder(processor, loaded, skip_bad=skip_bad)
        calibration = [batch.to(device) for batch in batches(chosen_samples, encoder, batch_size)]
        skipped = len(chosen_samples.skipped) + len(encoder.skipped)
        settings["fingerprint"] = chosen_samples.fingerprint
    with unfinished(target, settings, resume) as folder:
        record = prune_in_place(
            loaded,
            body,
            planned,
            calibration,
            method=how,
            propagate=propagate,
            seed=seed,
            journal=Journal(folder, how.mask_only),
            progress=progress,
        )
        written = Record(
            sparsity_record(
                body, planned, base_model=_base(model), method=_name(method), mask_only=how.mask_only, family=chosen
            ),
            {"prune": {**asdict(record), "skipped_samples": skipped}},
            {"sparsight": sparsight.__version__, "prune": settings},
        )
        with atomic_folder(target, overwrite) as new:
            save(loaded, processor, written, new)
    return written


def restore(
    sparse: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    teacher: str | Path | None = None,
    adapter: str = "sparselora",
    rank: str | Mapping[str, int] | None = None,
    alpha: float = 16,
    kl: float = 0.1,
    temperature: float = 1.0,
    lr: float = 1e-4,
    scheduler: str = "cosine",
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    samples: int | None = None,
    save_every: int = 100,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    save_adapter: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Restore a sparse model and write it to `out`, merged, with every zero kept.

    `teacher` is the dense original (by default the one that `sparsity.json` names; not needed for `kl=0`). `rank` is per
    component, as in `vision=4,connector=2,language=8`. `adapter="lora"` is the rival whose merge is dense.
    """
    from sparsight.data import Encoder
    from sparsight.model.load import check_device, parse_dtype
    from sparsight.restore.adapter import save_adapter as write_adapter
    from sparsight.restore.student import check_adapter, make_student
    from sparsight.restore.trainer import Schedule, train

    settings = _settings(locals(), "sparse", "data", "teacher", "adapter", "rank", "alpha", "kl", "temperature", "lr")
    settings |= _settings(locals(), "scheduler", "epochs", "steps", "batch_size", "accumulate", "samples", "seed", "dtype")
    check_adapter(adapter)
    ranks = _ranks(rank)
    schedule = Schedule(
        steps, epochs, batch_size, accumulate, lr, scheduler, kl=kl, temperature=temperature, seed=seed,
        save_every=save_every,
    )  # fmt: skip
    schedule.check()
    parse_dtype(dtype)
    check_device(device, one_gpu=True)
    target = check_output(out, overwrite)
    record = read_record(sparse)
    original = str(teacher) if teacher is not None else (record or {}).get("base_model")
    if kl and original is None:
        raise SparsightError(f"--teacher: {sparse} does not say what it was pruned from; name the dense model, or --kl 0")
    chosen = read(data, limit=samples, seed=seed if samples else None, skip_bad=skip_bad)
    settings |= {"teacher": original if kl else None, "fingerprint": chosen.fingerprint}
    student = make_student(
        sparse, original if kl else None, adapter=adapter, ranks=ranks, alpha=alpha, seed=seed, dtype=dtype, device=device
    )
    encoder = Encoder(student.processor, student.wrapped.get_base_model(), skip_bad=skip_bad)
    began = time.perf_counter()
    with unfinished(target, settings, resume) as folder:
        curve = train(
            student.wrapped, student.teacher, chosen, encoder, schedule, folder, device=device, resume=resume,
            progress=progress,
        )  # fmt: skip
        measured = {
            "curve": curve,
            "seconds": time.perf_counter() - began,
            "teacher": student.mode,
            "weight_bytes": student.weight_bytes,
            "dense_bytes": student.dense_bytes,
            "skipped_samples": len(chosen.skipped) + len(encoder.skipped),
            "trained_parameters": sum(p.numel() for p in student.wrapped.parameters() if p.requires_grad),
        }
        with atomic_folder(target, overwrite) as new:
            if save_adapter:
                write_adapter(student.wrapped, alpha, new / "adapter")
            merged = student.wrapped.merge_and_unload()
            written = Record(
                sparsity_record(
                    student.anatomy,
                    read_plan(record) if record else found_plan(student.anatomy, set(student.masks)),
                    base_model=original or str(sparse),
                    method=f"{(record or {}).get('method', 'unknown')} + {adapter}",
                    mask_only=False,
                    family=recorded_family(record),
                ),
                {**read_metrics(sparse), "restore": measured},
                {**read_recipe(sparse), "sparsight": sparsight.__version__, "restore": settings},
            )
            save(merged, student.processor, written, new)
    return written


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
    progress: Progress | None = None,
) -> Result:
    """Let a model answer held-out samples and score the answers, per kind, with 95 % bootstrap intervals."""
    from sparsight.data import Encoder
    from sparsight.evaluate import evaluate as score
    from sparsight.model.load import check_device, load, parse_dtype

    parse_dtype(dtype)
    check_device(device)
    for option, value in (("--beams", beams), ("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        _whole(option, value)
    chosen = read(data, limit=samples, seed=seed if samples else None, skip_bad=skip_bad)
    loaded, processor = load(model, dtype=dtype, device=device)
    encoder = Encoder(processor, loaded)
    taken = [sample for sample in chosen if not skip_bad or encoder.refusal(sample) is None]
    result = score(
        loaded, processor, taken, beams=beams, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed,
        progress=(lambda done, total: progress("answers", done, total)) if progress else None,
    )  # fmt: skip
    return replace(result, skipped=len(chosen.skipped) + len(chosen) - len(taken))


def _settings(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The settings of a verb as plain values, for the recipe."""
    plain = {}
    for name in names:
        value = given[name]
        if isinstance(value, Path | Pattern):
            value = str(value)
        elif callable(value):
            value = _name(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        plain[name] = value
    return plain


def _name(method: Any) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)


def _base(model: str | Path) -> str:
    """How a record names the model it came from: a folder by its whole path, a hub name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def _whole(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SparsightError(f"{option}: {value!r} is not a whole number of at least 1")


def _ranks(rank: str | Mapping[str, int] | None) -> dict[str, int]:
    """Read `vision=4,connector=2,language=8`; a component that is not named keeps its default."""
    if rank is None:
        return {}
    pairs = parse_pairs(rank, "--rank", "vision=4,connector=2,language=8") if isinstance(rank, str) else dict(rank)
    ranks = {}
    for component, value in pairs.items():
        check_component(component, "--rank")
        least = 0 if component == "connector" else 1
        if not str(value).isdigit() or int(value) < least:
            raise SparsightError(f"--rank: {component}={value} is not a whole number of at least {least}")
        ranks[component] = int(value)
    return ranks
