"""Bars: the score by the split of a fixed sum of sparsities, and by pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sparsight.report import series
from sparsight.report.drawing import HATCHES, INK, STYLE, TINTS, legend, sheet
from sparsight.report.marks import need, scored, whiskers
from sparsight.report.runs import Group, Run, grouped
from sparsight.report.scores import axis, estimate


def fixed_sum_bars(runs: Sequence[Run], metric: str | None = None) -> Figure:
    """Score by how a fixed sum of sparsities is split between vision and language; a panel per sum."""
    groups = scored(grouped(runs), metric)
    sums = series.fixed_sums(groups)
    need(sums, "runs that split the same sum of sparsities between vision and language in two ways or more")
    with mpl.rc_context(STYLE):
        figure = sheet(0.5 + 1.55 * len(sums))
        for axes, (total, ways) in zip(figure.subplots(len(sums), 1, squeeze=False)[:, 0], sums.items(), strict=True):
            places = sorted({split for way in ways for split, _ in way.points})
            labels = [":".join(f"{100 * share:g}" for share in split) for split in places]
            _bars(axes, ways, places, labels, metric, series.dense_of(groups))
            axes.set_title(f"sum {100 * total:g} %", loc="left", color=INK)
        axes.set_xlabel("sparsity of vision : language, %")
        _bar_legend(figure, max(sums.values(), key=len), series.dense_of(groups))
        return figure


def pattern_bars(runs: Sequence[Run], metric: str | None = None) -> Figure:
    """Score by pattern at the same sparsity: unstructured, 4:8, 2:4."""
    groups = scored(grouped(runs), metric)
    ways = series.patterns(groups)
    need(ways, "runs that differ in their pattern alone")
    with mpl.rc_context(STYLE):
        figure = sheet(2.05)
        axes = figure.subplots()
        places = sorted({pattern for way in ways for pattern, _ in way.points}, key=series.looseness)
        free = [pattern for pattern in places if pattern in ("row", "tensor")]
        labels = [pattern if p not in free else "unstructured" for p in places for pattern in [p]]
        if len(free) > 1:
            labels = [f"unstructured,\nby {p}" if p in free else p for p in places]
        _bars(axes, ways, places, labels, metric, series.dense_of(groups))
        axes.set_xlabel("pattern (n:m keeps n of every m inputs)")
        _bar_legend(figure, ways, series.dense_of(groups))
        return figure


def _bars(
    axes: Any,
    ways: Sequence[series.Series],
    places: Sequence[Any],
    labels: Sequence[str],
    metric: str | None,
    dense: Group | None,
) -> None:
    name, factor = axis(metric)
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        for place, group in way.points:
            found = estimate(group, metric)
            if found:
                x = places.index(place) + (i - (len(ways) - 1) / 2) * width
                look: Any = {
                    "color": TINTS[i % 8],
                    "hatch": HATCHES[i % 8],
                    "edgecolor": INK,
                    "linewidth": 0.6,
                    "ecolor": INK,
                }
                ends: Any = {"capsize": 2, "error_kw": {"elinewidth": 0.7}}
                axes.bar(x, factor * found.value, 0.92 * width, yerr=whiskers(found, factor), **look, **ends)
    if dense and (reference := estimate(dense, metric)):
        axes.axhline(factor * reference.value, color=INK, linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(places)), labels)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(name)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylim(0, 105 if factor == 100 else None)


def _bar_legend(figure: Figure, ways: Sequence[series.Series], dense: Group | None) -> None:
    named = [(i, way.label) for i, way in enumerate(ways) if way.label]
    handles: list[Any] = [Patch(fc=TINTS[i % 8], hatch=HATCHES[i % 8], ec=INK, lw=0.6) for i, _ in named]
    labels = [label for _, label in named]
    if dense:
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=0.8))
        labels.append("dense")
    legend(figure, handles, labels)
