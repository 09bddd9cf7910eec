"""One self-contained HTML page that compares runs: no network, no script, works on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsight.errors import NotWritten, SparsightError
from sparsight.evaluation.metrics import METRICS
from sparsight.files import write_text
from sparsight.model.families import COMPONENTS
from sparsight.reporting.gallery import COLUMNS, Picture, gallery
from sparsight.reporting.groups import Group, describe, group_runs
from sparsight.reporting.runs import ScoredModel
from sparsight.reporting.scores import (
    CAPTIONS,
    QUESTIONS,
    Estimate,
    axis,
    difference,
    estimate,
    has_both_kinds,
    main_metric,
    metric_name,
)

TEMPLATE = "page.html"
MARK = '<meta name="generator" content="sparsight">'  # tells a page of `report` from any other file


class Cell(NamedTuple):
    """A cell of the main table: its text (a dash is shown for none), a smaller line below it, and its CSS class."""

    text: str = ""
    note: str = ""
    css: str = ""


@dataclass(frozen=True)
class Story:
    """The texts of a page beside its tables and figures; all of them may be left out.

    `numbers` are pairs of a figure and its meaning. `proof` has "broken", "title", "text" and "command". `command` makes the
    page again. `picture` gives the picture of a sample. `best` is the label of the run to point out. `sparse_labels` are
    those of runs that should be sparse: a cell with few zeros is marked. `captions` are those of figures by name. `notes`
    are lines at the end. `gallery_labels` are those of the runs in the gallery.
    """

    title: str = ""
    eyebrow: str = "Sparsight · report"
    lead: str = ""
    numbers: Sequence[tuple[str, str]] = ()
    table_note: str = ""
    gallery_note: str = ""
    proof: Mapping[str, Any] | None = None
    command: str = ""
    notes: Sequence[str] = ()
    captions: Mapping[str, str] = field(default_factory=dict)
    picture: Picture | None = None
    gallery_labels: Sequence[str] = ()
    best: str = ""
    sparse_labels: Sequence[str] = ()


def write_page(
    runs: Sequence[ScoredModel],
    path: str | Path,
    *,
    metric: str | None = None,
    story: Story | None = None,
    figures: str | Path | None = None,
) -> Path:
    """Write the page of the runs to the file `path`; differences are against the first run.

    `figures` is a folder for the page's figures as SVG and as PNG of 200 dpi. They are written first, the page last and as a
    whole. The path of the page is returned.

    **Raises** `SparsightError` if the `report` extra is not installed, no run has a score, or a file cannot be written.
    """
    try:
        from sparsight.reporting.figures import report_figures, save_figures
    except ImportError as error:
        raise SparsightError("the report needs matplotlib: pip install 'sparsight[report]'") from error

    story = story or Story()
    groups = group_runs(runs)
    metric = main_metric(groups, metric)
    environment = Environment(
        loader=PackageLoader("sparsight", "reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    plots = report_figures(groups, metric)
    page = environment.get_template(TEMPLATE).render(
        mark=MARK,
        story=story,
        title=story.title or _title(groups),
        lead=story.lead or _lead(groups, metric),
        table=score_table(groups, metric, story),
        kinds=kinds_table(groups),
        figures=plots,
        gallery=gallery(groups, metric, story.gallery_labels, story.picture),
        stages=stage_table(groups),
        recipes=[
            (group.label, yaml.safe_dump(dict(group.first.recipe), sort_keys=False, allow_unicode=True).strip())
            for group in groups
            if group.first.recipe and not group.first.is_dense
        ],
        environments=_labels((" · ".join(f"{k} {v}" for k, v in g.first.environment.items()), g.label) for g in groups),
        hashes=_labels((pair, run.label) for g in groups for run in g.runs for pair in run.hashes.items()),
    )
    if figures is not None:
        save_figures(plots, figures)
    try:
        write_text(Path(path), page)
    except OSError as error:
        raise NotWritten(f"{path}: the page could not be written ({error.strerror or error})") from error
    return Path(path)


def _title(groups: Sequence[Group]) -> str:
    models = {Path(group.first.model).name for group in groups if group.first.model}
    return f"{len(groups)} runs" + (f" of {models.pop()}" if len(models) == 1 else "")


def _lead(groups: Sequence[Group], metric: str | None) -> str:
    first = groups[0].first
    name = metric_name(metric)
    if _is_mean_of_kinds(groups, metric):
        name += ", the mean of questions and captions,"
    n = f" on {len(first.predictions)} held-out samples" if first.predictions else ""
    data = f" of {Path(first.data).name}" if first.data else ""
    seeds = max(len(group.runs) for group in groups)
    averaged = f" Up to {seeds} seeds are averaged; intervals cover seeds and samples." if seeds > 1 else ""
    return f"The score is {name}{n}{data}, with 95 % bootstrap intervals.{averaged}"


def _is_mean_of_kinds(groups: Sequence[Group], metric: str | None) -> bool:
    """Whether the score is a mean of questions and captions."""
    return metric is None and any(has_both_kinds(group.first) for group in groups)


def score_table(groups: Sequence[Group], metric: str | None, story: Story) -> dict[str, Any]:
    """The titles of the columns and the rows of the main table, a row per group with a `Cell` per column."""
    differences: list[Estimate | None] = [None, *(difference(group, groups[0], metric) for group in groups[1:])]
    columns: dict[str, list[Cell]] = {
        "run": [_name_cell(group) for group in groups],
        axis(metric)[0]: [_score_cell(estimate(group, metric), metric) for group in groups],
        f"against {groups[0].label}": [_score_cell(score, metric, signed=True) for score in differences],
    }
    metrics = [name for name in METRICS if name != "exact_match"]
    if _is_mean_of_kinds(groups, metric):
        metrics.remove("vqa_accuracy")  # the column of questions has it already
        for part in (QUESTIONS, CAPTIONS):
            columns[f"{part}, %"] = [_score_cell(estimate(group, None, part), None) for group in groups]
    for other in metrics:
        scores = [estimate(group, other) for group in groups]
        if other != metric and any(scores):
            columns[axis(other)[0]] = [_score_cell(score, other) for score in scores]
    shares = {c: [group.first.sparsity(c) for group in groups if c in group.first.components] for c in COMPONENTS}
    scale, unit = (1e6, "MB") if max(group.first.bytes or 0 for group in groups) >= 1e6 else (1e3, "kB")
    for group in groups:
        run = group.first
        for component in [c for c in COMPONENTS if shares[c] and (c != "connector" or any(shares[c]))]:
            lost = group.label in story.sparse_labels and run.sparsity(component) < max(shares[component]) / 2
            text = f"{100 * run.sparsity(component):.2f}\u00a0%" if component in run.components else ""
            columns.setdefault(f"{component} zeros", []).append(Cell(text, css="lost" if lost else ""))
        seconds = sum(value for stage, value in run.seconds.items() if stage != "evaluate")
        numbers = {
            "parameters kept": "" if run.nonzero_parameters is None else f"{run.nonzero_parameters:,}",
            unit: f"{run.bytes / scale:,.1f}" if run.bytes else "",
            f"{unit}, zeros left out": f"{run.packed_bytes / scale:,.1f}" if run.packed_bytes else "",
            "seconds": f"{seconds:.{0 if seconds >= 10 else 1}f}" if seconds else "",
        }
        for title, text in numbers.items():
            columns.setdefault(title, []).append(Cell(text))
    rows = zip(groups, zip(*columns.values(), strict=True), strict=True)
    return {
        "columns": list(columns),
        "rows": [{"ours": group.label == story.best, "cells": cells} for group, cells in rows],
    }


def _name_cell(group: Group) -> Cell:
    notes = [describe(group.first.cell), f"{len(group.runs)} seeds" if len(group.runs) > 1 else ""]
    return Cell(group.label, " · ".join(note for note in notes if note and note != group.label))


def _score_cell(score: Estimate | None, metric: str | None, signed: bool = False) -> Cell:
    if score is None:
        return Cell()
    interval = () if score.low is None or score.high is None else (score.low, score.high)
    value, *ends = (_number(number, metric, "+" if signed else "") for number in (score.value, *interval))
    return Cell(value, " to ".join(ends))


def _number(value: float, metric: str | None, sign: str = "") -> str:
    """A value of a metric in the unit of its axis, with one decimal in percent, else with two."""
    factor = axis(metric)[1]
    return f"{factor * value:{sign}.{1 if factor == 100 else 2}f}".replace("-", "−")


def kinds_table(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Every score, over all samples and per kind, a column for each of the first 12 groups; None where there are none."""
    columns = [group for group in groups if group.first.scores][: 2 * COLUMNS]
    names = list(dict.fromkeys((row["kind"], row["metric"]) for group in columns for row in group.first.scores))
    if not names:
        return None
    rows = []
    for kind, metric in names:
        cells = []
        for group in columns:
            scores = [row for run in group.runs for row in run.scores if (row["kind"], row["metric"]) == (kind, metric)]
            cells.append(_number(sum(row["value"] for row in scores) / len(scores), metric) if scores else "")
        rows.append((kind, axis(metric)[0], cells))
    return {"columns": [group.label for group in columns], "rows": rows, "more": len(groups) - len(columns)}


def stage_table(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Per group its label, and the cells: seeds, costs of each stage, whether every zero was verified, data, skips, date."""
    rows = []
    for group in groups:
        pruned = [run for run in group.runs if not run.is_dense]
        verified = {run.verified for run in pruned}
        cells = [
            ", ".join(str(run.seed) for run in pruned if run.seed is not None),
            *(_costs(group, stage) for stage in ("prune", "restore", "evaluate")),
            "no" if False in verified else "yes" if verified == {True} else "",
            Path(group.first.data).name,
            str(sum(run.skipped for run in group.runs) or ""),
            group.first.date,
        ]
        rows.append((group.label, cells))
    return rows


def _costs(group: Group, stage: str) -> str:
    """Mean seconds and peak memory over the seeds."""
    seconds = [run.seconds[stage] for run in group.runs if run.seconds.get(stage)]
    memory = [run.memory[stage] for run in group.runs if run.memory.get(stage)]
    costs = [f"{sum(seconds) / len(seconds):.1f}\u00a0s"] if seconds else []
    return ", ".join(costs + ([f"{max(memory) / 2**20:,.0f}\u00a0MiB"] if memory else []))


def _labels(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str]]:
    """The labels that go with each key, without repeats."""
    labels: dict[Any, dict[str, None]] = {}
    for key, label in pairs:
        labels.setdefault(key, {})[label] = None
    return {key: list(several) for key, several in labels.items()}
