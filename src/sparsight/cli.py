"""The verbs on the command line: parse, one call, print, exit.

Exit codes: 0 done, 1 `verify` found a difference, 2 something given was wrong (one line on standard error, nothing
written), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import sparsight
from sparsight import options as opt
from sparsight.errors import Interrupted, SparsightError

PATIENCE = 5.0  # seconds that the other processes give the main one to speak, and the launcher to end them

app = typer.Typer(
    name="sparsight",
    help="Sparse vision-language models that still work: plan, prune, restore, evaluate, verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer has carried its own copy of click since 0.27, so click's own class need not be the one that is raised
_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(sparsight.__version__)
        raise typer.Exit


@app.command()
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
    _show(facts, as_json, *tables.anatomy_tables(facts, layers))


@app.command()
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
        "method": method, "propagate": propagate, "teacher_mode": teacher_mode, "steps": steps,
        "restore_batch_size": restore_batch_size, "gradient_checkpointing": gradient_checkpointing or None,
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
    _show(facts, as_json, tables.plan_table(facts["components"]), *listed)


def _cost(asked: Mapping[str, Any], device: str, layers: bool, as_json: bool, **given: Any) -> None:
    """What `plan --cost` prints."""
    if device != "cpu":
        raise SparsightError(f"--device: --cost foretells the memory of a process on the CPU, not on {device}; leave it out")
    if layers:
        raise SparsightError("--layers: --cost foretells whole stages; leave one of the two out")
    from sparsight import verbs
    from sparsight.report import tables

    facts = verbs.cost(**given, **asked).facts()
    _show(facts, as_json, *tables.cost_tables(facts))


@app.command()
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
    _show(
        {"out": out, **record.sparsity, "metrics": record.metrics},
        as_json,
        tables.pruned_table(record.sparsity, f"Pruned by {record.sparsity['method']}"),
        *tables.prune_notes(record.metrics, out),
    )


@app.command()
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
    _show(
        {"out": out, **record.sparsity, "metrics": record.metrics},
        as_json,
        tables.pruned_table(record.sparsity, f"Restored with {adapter}"),
        *tables.restore_notes(record.metrics, out),
    )


@app.command("eval")
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

    _check_files({"--json-file": json_file, "--predictions": predictions}, data)
    with shown("eval", quiet) as progress:
        result = verbs.evaluate(
            model, data=data, beams=beams, max_new_tokens=max_new_tokens, batch_size=batch_size, samples=samples,
            seed=seed, dtype=dtype, device=device, skip_bad=skip_bad, record=record, progress=progress,
        )  # fmt: skip
    facts = json.loads(result.to_json())
    title = f"{model} on {len(result.predictions)} samples"
    _show(facts, as_json, tables.scores_table(result.rows, title), *tables.left_out(result.skipped))
    if predictions:
        with _writing("--predictions", predictions):
            result.write_predictions(predictions)
    if json_file:
        with _writing("--json-file", json_file):
            Path(json_file).write_text(result.to_json(), encoding="utf-8")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="YAML file: model, data, held_out, prune, restore; see recipes/.")],
    out: Annotated[str, typer.Argument(help="Folder for models, scores and page; one of the same run is gone on with.")],
    changes: Annotated[Optional[list[str]], typer.Argument(help="KEY=VALUE in place of what the file says.")] = None,  # noqa: UP045
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """The whole road of a RECIPE: prune, restore, evaluate, prove, report; killed and started again, it goes on."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    with shown("run", quiet) as progress:
        done = verbs.run(recipe, out, changes=changes or (), progress=progress)
    _show(done, as_json, *tables.run_tables(done))
    if done["verify"]["differences"]:
        raise typer.Exit(1)


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="YAML file: model, data, held_out, and a grid; see recipes/.")],
    out: Annotated[str, typer.Argument(help="Folder for the results; one of the same sweep is gone on with.")],
    changes: Annotated[Optional[list[str]], typer.Argument(help="KEY=VALUE in place of what the file says.")] = None,  # noqa: UP045
    jobs: Annotated[int, typer.Option(help="Processes that work at a time.")] = 1,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Prune, restore and score a model in every way of a grid; killed and started again, it goes on."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    with shown("sweep", quiet) as progress:
        records = verbs.sweep(recipe, out, changes=changes or (), jobs=jobs, progress=progress)
    _show(records, as_json, *tables.sweep_tables(records, out))


@app.command()
def search(
    model: opt.Model,
    out: opt.Out,
    data: opt.Data,
    held_out: opt.RequiredHeldOut,
    sparsity: opt.Sparsity = "0.5",
    within: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="The other way round: the sparsest plan that loses at most so much score, as 0.02."),
    ] = None,
    over: Annotated[str, typer.Option(help="What shares the budget: components, or also their blocks.")] = "blocks",
    pattern: opt.PatternOption = "row",
    method: opt.Method = "wanda",
    refine: opt.Refine = None,
    update: opt.Update = None,
    reconstruct: opt.Reconstruct = 0,
    tokens: opt.Tokens = "all",
    ignore: opt.Ignore = None,
    family: opt.FamilyOption = None,
    propagate: opt.DensePropagate = "dense",
    samples: opt.CalibrationSamples = 128,
    batch_size: opt.BatchSize = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    held_out_samples: Annotated[Optional[int], typer.Option(help="How many of them to draw. [default: all]")] = None,  # noqa: UP045
    seed: opt.Seed = 0,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    skip_bad: opt.SkipBad = False,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Find the split of a budget that harms the answers least, and write the model pruned by it to OUT."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    with shown("search", quiet) as progress:
        found = verbs.search(
            model, out, data=data, held_out=held_out, sparsity=sparsity or "0.5", within=within, over=over, pattern=pattern,
            method=method, refine=refine, update=update, reconstruct=reconstruct, tokens=tokens, ignore=ignore or (),
            family=family, propagate=propagate, samples=samples, batch_size=batch_size, max_new_tokens=max_new_tokens,
            held_out_samples=held_out_samples, seed=seed, dtype=dtype, device=device, skip_bad=skip_bad,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    _show(found.facts, as_json, *tables.search_tables(found.facts, out))


@app.command()
def verify(
    model: opt.Model,
    against: Annotated[Optional[str], typer.Option(help="A sparse folder whose every zero must be here too.")] = None,  # noqa: UP045
    as_json: opt.Json = False,
) -> None:
    """Recount every zero; exit code 1 and the layers by name on any difference."""
    from sparsight import verbs
    from sparsight.report import tables

    found = verbs.verify(model, against)
    _show(found, as_json, *tables.verify_lines(found))
    if found["differences"]:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Folders of models evaluated with --record, or of sweeps.")],
    out: Annotated[str, typer.Option(help="The page to write.")] = "report.html",
    metric: Annotated[Optional[str], typer.Option(help="Compare by this metric. [default: exact match]")] = None,  # noqa: UP045
    figures: Annotated[Optional[str], typer.Option(help="Folder for every figure as SVG and PNG, too.")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page.")] = False,
) -> None:
    """Compare runs on one HTML page: scores, figures, answers side by side; the first is what the others are set against."""
    from sparsight import verbs

    page = verbs.report(runs, out=out, metric=metric, figures=figures, overwrite=overwrite)
    _show(None, False, f"Report: {page}", *([f"Figures: {figures}"] if figures else []))


@app.command()
def demo(
    out: Annotated[str, typer.Argument(help="Folder for the models and the report.")] = "demo-out",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier demo.")] = False,
    seed: opt.Seed = 0,
    quiet: opt.Quiet = False,
) -> None:
    """The whole road on the embedded model: prune at 2:4, restore, prove; no network."""
    from sparsight.demo.road import road
    from sparsight.report import tables
    from sparsight.report.progress import shown

    with shown("demo", quiet) as progress:
        facts = road(out, overwrite=overwrite, seed=seed, progress=progress)
    _show(facts, False, *tables.demo_tables(facts))


def _check_files(files: Mapping[str, str | None], data: str) -> None:
    """Refuse files that cannot be written, that are one and the same, or that hold the data; none is left or changed."""
    taken: dict[Path, str] = {}
    sources = (Path(data), Path(data, "metadata.jsonl"))
    for option, path in files.items():
        if not path:
            continue
        with _writing(option, path):
            target = Path(path).resolve()
            if not target.is_fifo():  # opening one would wait for its reader
                new = not target.exists()
                with target.open("ab") as file:
                    os.write(file.fileno(), b"")  # a device that is full refuses even nothing
                if new:
                    target.unlink()
            if any(source.exists() and target.exists() and target.samefile(source) for source in sources):
                raise SparsightError(f"{option}: {path} holds the samples of --data; give another file")
            if other := taken.get(target):
                raise SparsightError(f"{option}: {path} is the file of {other}, too; give each a file of its own")
            taken[target] = option


@contextlib.contextmanager
def _writing(option: str, path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # a loop of links is the latter
        reason = getattr(error, "strerror", None) or error
        raise SparsightError(
            f"{option}: {path} cannot be written ({reason}); give a file in a folder that exists"
        ) from error


def _show(facts: Any, as_json: bool, *parts: Any) -> None:
    if _place():
        return
    if as_json:
        print(json.dumps(facts, indent=1, default=lambda record: record.__dict__))
        return
    from rich.console import Console

    # what is printed holds names of folders, which may look like markup
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    for part in parts:
        console.print(part)


def main() -> None:
    """Run the command line; every foreseen error is one line on standard error.

    The launcher of several processes ends them all when one fails. What goes wrong in all is said by the main one, and
    what follows from another's end by nobody: the others wait for theirs, and speak up only if it does not come.
    """
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except SparsightError as error:
        code = _fail(str(error), 2)
    except Interrupted as stop:
        code = _fail(str(stop), 130)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; nothing was written", 130)
    except _USAGE as error:
        code = _fail(error.format_message(), 2)
    except Exception:
        if _place():
            time.sleep(PATIENCE)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> int:
    place = _place()
    if place and code == 130:  # all were interrupted
        return code
    if place:
        time.sleep(PATIENCE)
    print(f"sparsight: {f'process {place}: ' if place else ''}{' '.join(line.split())}", file=sys.stderr)
    return code


def _place() -> int:
    """This process's place among those a launcher started; one process does not pay for the import of torch."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    from sparsight import processes

    return processes.place()
