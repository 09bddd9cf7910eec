"""The verbs that use the others: whole roads, sweeps, searches, reports, the demo."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from sparsight import options as opt
from sparsight.commands.output import show


def run(
    recipe: Annotated[str, typer.Argument(help="YAML file: model, data, held_out, prune, restore; see recipes/.")],
    out: Annotated[str, typer.Argument(help="Folder for models, scores and page; one of the same run is gone on with.")],
    changes: Annotated[Optional[list[str]], typer.Argument(help="KEY=VALUE in place of what the file says.")] = None,  # noqa: UP045
    cost: opt.RecipeCost = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """The whole road of a RECIPE: prune, restore, evaluate, prove, report; killed and started again, it goes on."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    if cost:
        return _cost(recipe, changes, "run", as_json)
    with shown("run", quiet) as progress:
        done = verbs.run(recipe, out, changes=changes or (), progress=progress)
    show(done, as_json, *tables.run_tables(done))
    if done["verify"]["differences"]:
        raise typer.Exit(1)
    return None


def sweep(
    recipe: Annotated[str, typer.Argument(help="YAML file: model, data, held_out, and a grid; see recipes/.")],
    out: Annotated[str, typer.Argument(help="Folder for the results; one of the same sweep is gone on with.")],
    changes: Annotated[Optional[list[str]], typer.Argument(help="KEY=VALUE in place of what the file says.")] = None,  # noqa: UP045
    jobs: Annotated[int, typer.Option(help="Processes that work at a time.")] = 1,
    cost: opt.RecipeCost = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Prune, restore and score a model in every way of a grid; killed and started again, it goes on."""
    from sparsight import verbs
    from sparsight.report import tables
    from sparsight.report.progress import shown

    if cost:
        return _cost(recipe, changes, "sweep", as_json)
    with shown("sweep", quiet) as progress:
        records = verbs.sweep(recipe, out, changes=changes or (), jobs=jobs, progress=progress)
    show(records, as_json, *tables.sweep_tables(records, out))
    if not all(record["verified"] for record in records):
        raise typer.Exit(1)
    return None


def _cost(recipe: str, changes: list[str] | None, verb: str, as_json: bool) -> None:
    """What `--cost` prints of a recipe; nothing is written to OUT."""
    from sparsight import verbs
    from sparsight.report import tables

    facts = verbs.recipe_cost(recipe, changes or (), verb=verb).facts()
    show(facts, as_json, *tables.cost_tables(facts))


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
    show(found.facts, as_json, *tables.search_tables(found.facts, out))


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
    show(None, False, f"Report: {page}", *([f"Figures: {figures}"] if figures else []))


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
    show(facts, False, *tables.demo_tables(facts))
