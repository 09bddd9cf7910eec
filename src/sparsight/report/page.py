"""One self-contained HTML page that compares runs: no network, no script, works on a phone and on paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsight.errors import NotWritten, SparsightError
from sparsight.model.families import COMPONENTS
from sparsight.report import series
from sparsight.report.gallery import COLUMNS, Picture, gallery
from sparsight.report.runs import Group, Run, grouped
from sparsight.report.scores import CAPTIONS, QUESTIONS, Estimate, axis, both_kinds, difference, estimate

TEMPLATE = "page.html"
MARK = '<meta name="generator" content="sparsight">'  # what tells a page of ours from a file of yours
RECIPES = 12  # recipes shown whole


@dataclass(frozen=True)
class Story:
    """What a page says beside its tables and figures; all of it may be left out.

    `numbers` are pairs of a figure and what it is, `proof` has "broken", "title", "text" and "command", `again` is the
    command that makes the page, `picture` gives the picture of a sample, `best` the label of the run to point out, `lost`
    labels of runs that were to keep their zeros and did not; `captions` are figures' captions by name, `notes` lines at the
    end, `shown` the labels of the runs in the gallery.
    """

    title: str = ""
    eyebrow: str = "Sparsight · report"
    lead: str = ""
    numbers: Sequence[tuple[str, str]] = ()
    table_note: str = ""
    gallery_note: str = ""
    proof: Mapping[str, Any] | None = None
    again: str = ""
    notes: Sequence[str] = ()
    captions: Mapping[str, str] = field(default_factory=dict)
    picture: Picture | None = None
    shown: Sequence[str] = ()
    best: str = ""
    lost: Sequence[str] = field(default_factory=tuple)


def write_page(
    runs: Sequence[Run],
    path: str | Path,
    *,
    metric: str | None = None,
    story: Story | None = None,
    figures: str | Path | None = None,
) -> Path:
    """Write the page of the runs to the file `path`; differences are against the first run.

    `figures` is a folder for the page's figures as SVG and as PNG of 200 dpi, too.

    **Raises** `SparsightError` if the `report` extra is not installed, or no run has a score.
    """
    try:
        from sparsight.report.album import album, save_plates
    except ImportError as error:
        raise SparsightError("the report needs matplotlib: pip install 'sparsight[report]'") from error

    story = story or Story()
    groups = grouped(runs)
    if not any(estimate(group, metric) for group in groups):
        raise SparsightError(
            f"none of the {len(groups)} runs was scored by {axis(metric)[0].split(',')[0]}; run sparsight eval MODEL --data "
            "DATA --record first"
        )
    environment = Environment(
        loader=PackageLoader("sparsight", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    plates = album(runs, metric)
    page = environment.get_template(TEMPLATE).render(
        mark=MARK,
        story=story,
        title=story.title or _title(groups),
        lead=story.lead or _lead(groups, metric),
        table=score_table(groups, metric, story),
        kinds=kinds_table(groups),
        plates=plates,
        gallery=gallery(groups, metric, story.shown, story.picture),
        made=made_table(groups),
        recipes=[(group.label, _yaml(group.first.recipe)) for group in groups if _told(group)][:RECIPES],
        more_recipes=max(0, sum(_told(group) for group in groups) - RECIPES),
        environments=_distinct(groups, lambda run: " · ".join(f"{k} {v}" for k, v in run.environment.items())),
        hashes=_hashes(groups),
    )
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise NotWritten(f"{path}: the page could not be written ({error.strerror or error})") from error
    if figures is not None:
        save_plates(plates, figures)
    return Path(path)


def _told(group: Group) -> bool:
    """Whether there is a recipe to show."""
    return bool(group.first.recipe) and not group.first.dense


def _title(groups: Sequence[Group]) -> str:
    models = {Path(group.first.model).name for group in groups if group.first.model}
    return f"{len(groups)} runs" + (f" of {models.pop()}" if len(models) == 1 else "")


def _lead(groups: Sequence[Group], metric: str | None) -> str:
    first = groups[0].first
    name = axis(metric)[0].split(",")[0]
    if metric is None and any(both_kinds(group.first) for group in groups):
        name += ", the mean of questions and captions,"
    n = f" on {len(first.predictions)} held-out samples" if first.predictions else ""
    data = f" of {Path(first.data).name}" if first.data else ""
    seeds = max(len(group.runs) for group in groups)
    averaged = f" Up to {seeds} seeds are averaged; intervals cover seeds and samples." if seeds > 1 else ""
    return f"The score is {name}{n}{data}, with 95 % bootstrap intervals.{averaged}"


def score_table(groups: Sequence[Group], metric: str | None, story: Story) -> dict[str, Any]:
    """Columns and rows of the main table; a cell is a text and a smaller line below it."""
    name, factor = axis(metric)
    both = metric is None and any(both_kinds(group.first) for group in groups)
    metrics = [m for m in ("vqa_accuracy", "cider_d") if any(estimate(g, m) for g in groups)]
    if both:  # VQA accuracy of questions, which the column of questions shows already
        metrics = [m for m in metrics if m != "vqa_accuracy"]
    metrics = [m for m in metrics if m != metric]
    there = {c: [group.first for group in groups if c in group.first.components] for c in COMPONENTS}
    components = [c for c, those in there.items() if those and (c != "connector" or any(run.sparsity(c) for run in those))]
    largest = max((group.first.bytes or 0 for group in groups), default=0)
    scale, unit = (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
    columns = ["run", name, f"against {groups[0].label}"] + (["questions, %", "captions, %"] if both else [])
    columns += [axis(m)[0] for m in metrics] + [f"{c} zeros" for c in components]
    columns += ["parameters kept", unit, f"{unit}, zeros left out", "seconds"]
    rows = []
    for i, group in enumerate(groups):
        run = group.first
        apart = difference(group, groups[0], metric) if i else None
        seeds = f"{len(group.runs)} seeds" if len(group.runs) > 1 else ""
        how = series.described(run.cell)
        cells = [(group.label, " · ".join(x for x in (how if how != group.label else "", seeds) if x), "")]
        cells += [_cell(estimate(group, metric), factor), _cell(apart, factor, signed=True)]
        if both:
            cells += [_cell(estimate(group, None, part), 100) for part in (QUESTIONS, CAPTIONS)]
        cells += [_cell(estimate(group, m), axis(m)[1]) for m in metrics]
        for c in components:
            lost = group.label in story.lost and run.sparsity(c) < max(g.first.sparsity(c) for g in groups) / 2
            cells.append((f"{100 * run.sparsity(c):.2f}\u00a0%" if c in run.components else "–", "", "lost" if lost else ""))
        stages = {k: v for k, v in run.seconds.items() if k != "evaluate"}
        cells += [(f"{run.kept:,}" if run.kept is not None else "–", "", "")]
        cells += [(f"{size / scale:,.1f}" if size else "–", "", "") for size in (run.bytes, run.packed_bytes)]
        spent = sum(stages.values())
        cells += [(f"{spent:.{0 if spent >= 10 else 1}f}" if spent else "–", "", "")]
        rows.append({"ours": group.label == story.best, "cells": cells})
    return {"columns": columns, "rows": rows}


def _cell(found: Estimate | None, factor: float, signed: bool = False) -> tuple[str, str, str]:
    if found is None:
        return ("–", "", "")
    digits = 1 if factor == 100 else 2
    sign = "+" if signed else ""
    numbers = [found.value] if found.low is None or found.high is None else [found.value, found.low, found.high]
    value, *ends = (f"{factor * number:{sign}.{digits}f}".replace("-", "−") for number in numbers)
    return (value, " to ".join(ends), "")


def kinds_table(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Every score, over all samples and per kind, a column per run; None where there are none."""
    shown = [group for group in groups if group.first.scores][: 2 * COLUMNS]
    names = list(dict.fromkeys((r["kind"], r["metric"]) for g in shown for r in g.first.scores))
    if not names:
        return None
    rows = []
    for kind, metric in names:
        label, factor = axis(metric)
        cells = []
        for group in shown:
            rows_of = [r for run in group.runs for r in run.scores if (r["kind"], r["metric"]) == (kind, metric)]
            mean = sum(r["value"] for r in rows_of) / len(rows_of) if rows_of else None
            cells.append("–" if mean is None else f"{factor * mean:.{1 if factor == 100 else 2}f}")
        rows.append((kind, label, cells))
    return {"columns": [group.label for group in shown], "rows": rows, "more": len(groups) - len(shown)}


def made_table(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Per run: seeds, seconds and peak memory per stage, what verify said, which data, when."""
    rows = []
    for group in groups:
        runs = group.runs
        stages = {}
        for stage in ("prune", "restore", "evaluate"):
            took = [run.seconds[stage] for run in runs if run.seconds.get(stage)]
            held = [run.memory[stage] for run in runs if run.memory.get(stage)]
            known = [f"{sum(took) / len(took):.1f}\u00a0s"] if took else []
            known += [f"{max(held) / 2**20:,.0f}\u00a0MiB"] if held else []
            stages[stage] = ", ".join(known) or "–"
        verified = {run.verified for run in runs if not run.dense}
        rows.append(
            {
                "label": group.label,
                "seeds": ", ".join(str(run.seed) for run in runs if run.seed is not None and not run.dense) or "–",
                **stages,
                "verified": "no" if False in verified else "yes" if verified == {True} else "–",
                "data": Path(group.first.data).name or "–",
                "skipped": str(sum(run.skipped for run in runs) or "–"),
                "date": group.first.date or "–",
            }
        )
    return rows


def _hashes(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(what, hash, of which run)."""
    names = {"sparsity.json": "sparsity.json, which holds the hash of every layer", "fingerprint": "held-out samples"}
    found: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        for run in group.runs:
            for key, value in run.hashes.items():
                found.setdefault((names.get(key, key), value), []).append(run.label)
    labels = {
        key: "all runs" if len(set(runs)) == len(groups) > 1 else ", ".join(dict.fromkeys(runs))
        for key, runs in found.items()
    }
    return [(what, value, labels[what, value]) for what, value in found]


def _distinct(groups: Sequence[Group], say: Callable[[Run], str]) -> list[tuple[str, str]]:
    """What is said of the runs, each different line once, with the runs it is of."""
    found: dict[str, list[str]] = {}
    for group in groups:
        if line := say(group.first):
            found.setdefault(line, []).append(group.label)
    return [(line, "" if len(found) == 1 else ", ".join(labels)) for line, labels in found.items()]


def _yaml(recipe: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).strip()


__all__ = ["Picture", "Story", "write_page"]
