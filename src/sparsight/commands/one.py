"""The verbs of one model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sparsight import options as opt
from sparsight.commands.output import check_files, show, writing
from sparsight.errors import SparsightError


def inspect(
    model: opt.Model,
    family: opt.FamilyOption = None,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer by name.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Show components, blocks and layers, what is never pruned and why, and the sparsity now."""
    from sparsight import verbs
    from sparsight.report import tables

    body, _ = verbs.inspect(model, family=family)
    facts = tables.anatomy_facts(body)
    show(facts, as_json, *tables.anatomy_tables(facts, layers))


def plan(
    model: opt.Model,
    sparsity: opt.Sparsity = None,
    pattern: opt.PatternOption = "row",
    policy: opt.Policy = "uniform",
    ignore: opt.Ignore = None,
    family: opt.FamilyOption = None,
    data: opt.Calibration = None,
    samples: opt.CalibrationSamples = 128,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    skip_bad: opt.SkipBad = False,
    layers: Annotated[bool, typer.Option("--layers", help="List what every layer gets.")] = False,
    cost: opt.Cost = False,
    method: opt.CostMethod = None,
    refine: opt.CostRefine = None,
    update: opt.CostUpdate = None,
    propagate: opt.CostPropagate = None,
    teacher_mode: opt.CostTeacherMode = None,
    steps: opt.CostSteps = None,
    restore_batch_size: opt.CostBatchSize = None,
    gradient_checkpointing: opt.CostCheckpointing = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show where the zeros will be, or with --cost what it will take; nothing is changed."""
    from sparsight import verbs
    from sparsight.plan.plan import plan_facts
    from sparsight.report import tables
    from sparsight.report.progress import shown

    asked = {
        "method": method, "refine": refine, "update": update, "propagate": propagate, "teacher_mode": teacher_mode,
        "steps": steps, "restore_batch_size": restore_batch_size, "gradient_checkpointing": gradient_checkpointing or None,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not None}
    if cost:
        _cost(asked, device, layers, as_json, model=model, sparsity=sparsity, pattern=pattern, policy=policy,
              ignore=ignore or (), family=family, data=data, samples=samples, batch_size=batch_size, seed=seed, dtype=dtype,
              skip_bad=skip_bad)  # fmt: skip
        return
    for name in asked:
        raise SparsightError(f"--{name.replace('_', '-')}: says what is to be foretold; add --cost, or leave it out")
    with shown("plan", quiet) as progress:
        made = verbs.plan(
            model, sparsity=sparsity, pattern=pattern, policy=policy, ignore=ignore or (), family=family, data=data,
            samples=samples, batch_size=batch_size, seed=seed, dtype=dtype, device=device, skip_bad=skip_bad,
            progress=progress,
        )  # fmt: skip
    facts = plan_facts(made.anatomy, made.plan)
    listed = [tables.planned_layers(made.anatomy, made.plan)] if layers else []
    show(facts, as_json, tables.plan_table(facts["components"]), *listed)


def _cost(asked: Mapping[str, Any], device: str, layers: bool, as_json: bool, **given: Any) -> None:
    """What `plan --cost` prints."""
    if device != "cpu":
        raise SparsightError(f"--device: --cost foretells the memory of a process on the CPU, not on {device}; leave it out")
    if layers:
        raise SparsightError("--layers: --cost foretells whole stages; leave one of the two out")
    from sparsight import verbs
    from sparsight.report import tables

    facts = verbs.cost(**given, **asked).facts()
    show(facts, as_json, *tables.cost_tables(facts))


def prune(
    model: opt.Model,
    out: opt.Out,
    data: opt.Calibration = None,
    method: opt.Method = "wanda",
    refine: opt.Refine = None,
    update: opt.Update = None,
    reconstruct: opt.Reconstruct = 0,
    permute: opt.Permute = False,
    tokens: opt.Tokens = "all",
    sparsity: opt.Sparsity = None,
    pattern: opt.PatternOption = "row",
    policy: opt.PolicyOrPreset = None,
    ignore: opt.Ignore = None,
    family: opt.FamilyOption = None,
    propagate: opt.Propagate = "block",
    samples: opt.CalibrationSamples = 128,
    batch_size: opt.BatchSize = 8,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    skip_bad: opt.SkipBad = False,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Prune MODEL with a few calibration samples and write the sparse model to OUT."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    with shown("prune", quiet) as progress:
        record = verbs.prune(
            model, out, data=data, method=method, refine=refine, update=update, reconstruct=reconstruct, permute=permute,
            tokens=tokens, sparsity=sparsity, pattern=pattern, policy=policy, ignore=ignore or (), family=family,
            propagate=propagate, samples=samples, batch_size=batch_size, seed=seed, dtype=dtype, device=device,
            skip_bad=skip_bad, overwrite=overwrite, resume=resume, progress=progress,
        )  # fmt: skip
    show(
        {"out": out, **record.sparsity, "metrics": record.metrics},
        as_json,
        tables.pruned_table(record.sparsity, f"Pruned by {record.sparsity['method']}"),
        *tables.prune_notes(record.metrics, out),
    )


def restore(
    sparse: Annotated[str, typer.Argument(help="Folder of a sparse model.")],
    out: opt.Out,
    data: opt.Data,
    teacher: opt.Teacher = None,
    teacher_mode: opt.TeacherMode = "auto",
    teacher_cache: opt.TeacherCache = None,
    adapter: opt.Adapter = "sparselora",
    tune: opt.Tune = "vision,connector,language",
    rank: opt.Rank = None,
    alpha: opt.Alpha = 16,
    reconstruct: opt.ReconstructFirst = 0,
    kl: opt.Kl = 0.1,
    temperature: opt.Temperature = 1.0,
    divergence: opt.Divergence = "forward",
    hidden: opt.Hidden = 0.0,
    reduction: opt.Reduction = "token",
    lr: opt.Lr = 1e-4,
    scheduler: opt.Scheduler = "cosine",
    warmup: opt.Warmup = 0.03,
    epochs: opt.Epochs = 1.0,
    steps: opt.Steps = None,
    batch_size: opt.BatchSize = 32,
    accumulate: opt.Accumulate = 1,
    samples: opt.Samples = None,
    held_out: opt.HeldOut = None,
    patience: opt.Patience = None,
    save_every: opt.SaveEvery = 100,
    report_to: opt.ReportTo = "",
    mixed_precision: opt.MixedPrecision = "no",
    gradient_checkpointing: opt.GradientCheckpointing = False,
    seed: opt.Seed = 0,
    family: opt.FamilyOption = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    save_adapter: opt.SaveAdapter = False,
    skip_bad: opt.SkipBad = False,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Restore a SPARSE model with SparseLoRA and distillation; every zero is kept."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    with shown("restore", quiet) as progress:
        record = verbs.restore(
            sparse, out, data=data, teacher=teacher, teacher_mode=teacher_mode, teacher_cache=teacher_cache,
            adapter=adapter, tune=tune, rank=rank, alpha=alpha, reconstruct=reconstruct, kl=kl, temperature=temperature,
            divergence=divergence, hidden=hidden, reduction=reduction, lr=lr, scheduler=scheduler, warmup=warmup,
            epochs=epochs, steps=steps, batch_size=batch_size, accumulate=accumulate, samples=samples, held_out=held_out,
            patience=patience, save_every=save_every, report_to=report_to, mixed_precision=mixed_precision,
            gradient_checkpointing=gradient_checkpointing, seed=seed, family=family, dtype=dtype, device=device,
            save_adapter=save_adapter, skip_bad=skip_bad, overwrite=overwrite, resume=resume, progress=progress,
        )  # fmt: skip
    show(
        {"out": out, **record.sparsity, "metrics": record.metrics},
        as_json,
        tables.pruned_table(record.sparsity, f"Restored with {adapter}"),
        *tables.restore_notes(record.metrics, out),
    )


def evaluate(
    model: opt.Model,
    data: opt.Data,
    beams: Annotated[int, typer.Option(help="Beams; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    batch_size: opt.BatchSize = 32,
    samples: opt.Samples = None,
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    skip_bad: opt.SkipBad = False,
    json_file: Annotated[Optional[str], typer.Option("--json-file", help="Also write the scores here.")] = None,  # noqa: UP045
    predictions: Annotated[Optional[str], typer.Option(help="Write every answer here, as JSONL.")] = None,  # noqa: UP045
    record: opt.RecordScores = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Let MODEL answer held-out samples; scores per kind with 95 % intervals."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    check_files({"--json-file": json_file, "--predictions": predictions}, data)
    with shown("eval", quiet) as progress:
        result = verbs.evaluate(
            model, data=data, beams=beams, max_new_tokens=max_new_tokens, batch_size=batch_size, samples=samples,
            seed=seed, dtype=dtype, device=device, skip_bad=skip_bad, record=record, progress=progress,
        )  # fmt: skip
    facts = json.loads(result.to_json())
    title = f"{model} on {len(result.predictions)} samples"
    show(facts, as_json, tables.scores_table(result.rows, title), *tables.left_out(result.skipped))
    if predictions:
        with writing("--predictions", predictions):
            result.write_predictions(predictions)
    if json_file:
        with writing("--json-file", json_file):
            Path(json_file).write_text(result.to_json(), encoding="utf-8")


def verify(
    model: opt.Model,
    against: Annotated[Optional[str], typer.Option(help="A sparse folder whose every zero must be here too.")] = None,  # noqa: UP045
    as_json: opt.Json = False,
) -> None:
    """Recount every zero; exit code 1 and the layers by name on any difference."""
    from sparsight import verbs
    from sparsight.report import tables

    found = verbs.verify(model, against)
    show(found, as_json, *tables.verify_lines(found))
    if found["differences"]:
        raise typer.Exit(1)
