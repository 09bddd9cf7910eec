"""The figures that compare runs: from a list of `Run` to a matplotlib figure of one column (3.3 inches).

Runs that differ in their seed only are averaged; whiskers are 95 % intervals over seeds and samples (`report.scores`).
What tells one line or bar from another is its dash, mark or hatch, and only then its colour. Every function raises
`SparsightError` where the runs do not make its figure; `report.album` knows which they make.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparsight.errors import SparsightError
from sparsight.report import series
from sparsight.report.bars import fixed_sum_bars, pattern_bars
from sparsight.report.drawing import (
    COLORS,
    DASHES,
    INK,
    MARKS,
    SOFT,
    STYLE,
    legend,
    sheet,
    wrapped,
)
from sparsight.report.marks import color, filled, kind, mark, need, scored, whiskers
from sparsight.report.runs import Group, Run, grouped
from sparsight.report.scores import CAPTIONS, QUESTIONS, axis, both_kinds, estimate


def scores(runs: Sequence[Run], metric: str | None = None) -> Figure:
    """The score of every run with its interval, a row each; questions and captions apart where there are both."""
    groups = scored(grouped(runs), metric)
    split = metric is None and all(both_kinds(group.first) for group in groups)
    parts: tuple[str | None, ...] = (QUESTIONS, CAPTIONS) if split else (None,)
    name, factor = axis(metric)
    with mpl.rc_context(STYLE):
        labels = [wrapped(group.label, 24) for group in groups]
        lines = max(label.count("\n") + 1 for label in labels)
        figure = sheet(0.55 + len(groups) * (0.07 + 0.115 * lines))
        for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts), sharey=True)), parts, strict=True):
            for i, group in enumerate(groups):
                found = estimate(group, metric, part)
                if found:
                    look: Any = {"fmt": mark(group.first), "color": color(group.first), "mfc": filled(group.first)}
                    axes.errorbar(factor * found.value, -i, xerr=whiskers(found, factor), capsize=2, ms=4.5, **look)
            if part:
                axes.set_title(part, loc="left", color=INK)
            axes.set_ylim(-len(groups) + 0.4, 0.6)
            axes.set_yticks([-i for i in range(len(groups))], labels)
            axes.grid(axis="y", visible=False)
        figure.supxlabel(f"{name} (95 % interval)", fontsize=7.5, color=INK)
        return figure


def component_curves(runs: Sequence[Run], metric: str | None = None) -> Figure:
    """Score against the sparsity of one component, the others dense; a line per component."""
    groups = scored(grouped(runs), metric)
    lines = series.component_curves(groups)
    need(lines, "runs that prune one component alone, at two sparsities or more")
    name, factor = axis(metric)
    with mpl.rc_context(STYLE):
        figure = sheet(2.35)
        axes = figure.subplots()
        handles = []
        for i, line in enumerate(lines):
            x = [100 * place for place, _ in line.points]
            found = [estimate(group, metric) for _, group in line.points]
            y = [factor * each.value for each in found if each]
            look: Any = {"color": COLORS[i % 8], "linestyle": DASHES[i % 8], "marker": MARKS[i % 8]}
            ends = np.concatenate([whiskers(each, factor) for each in found if each], axis=1)
            handles.append(axes.errorbar(x, y, yerr=ends, capsize=2, elinewidth=0.7, **look)[0])
        axes.set_xlabel("sparsity of the component, %")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        legend(figure, handles, [line.label for line in lines])
        return figure


def restoration_pairs(runs: Sequence[Run], metric: str | None = None) -> Figure:
    """Before and after restoration: a row per pair, hollow before, filled after, the dense model as a line."""
    groups = scored(grouped(runs), metric)
    found = series.pairs(groups)
    need(found, "a pruned run and one restored from it")
    name, factor = axis(metric)
    with mpl.rc_context(STYLE):
        several = len({series.restoration(after.first.cell["restore"]) for _, after in found}) > 1
        labels = [wrapped(before.label + (f" → {after.label}" if several else "")) for before, after in found]
        lines = max(label.count("\n") + 1 for label in labels)
        figure = sheet(0.8 + len(found) * max(0.26, 0.05 + 0.115 * lines))
        axes = figure.subplots()
        for i, (before, after) in enumerate(found):
            ends = [estimate(group, metric) for group in (before, after)]
            values = [factor * end.value for end in ends if end]
            axes.plot(values, [-i, -i], color=SOFT, linewidth=2.2, alpha=0.35, solid_capstyle="butt")
            for end, up, shape, fill in zip(ends, (0.14, -0.14), ("v", "o"), ("white", COLORS[2]), strict=True):
                if end:
                    look: Any = {"fmt": shape, "mfc": fill, "mec": INK, "mew": 0.8, "ecolor": INK, "elinewidth": 0.7}
                    axes.errorbar(factor * end.value, -i + up, xerr=whiskers(end, factor), capsize=2, ms=5, **look)
        handles: list[Any] = [
            Line2D([], [], marker=shape, mfc=fill, mec=INK, mew=0.8, linestyle="")
            for shape, fill in (("v", "white"), ("o", COLORS[2]))
        ]
        names = ["pruned", "restored"]
        if (dense := series.dense_of(groups)) and (reference := estimate(dense, metric)):
            handles.append(axes.axvline(factor * reference.value, color=INK, linestyle="--", linewidth=0.8))
            names.append("dense")
        axes.set_yticks([-i for i in range(len(found))], labels)
        axes.set_ylim(-len(found) + 0.4, 0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{name} (95 % interval)")
        legend(figure, handles, names)
        return figure


def pareto(runs: Sequence[Run], metric: str | None = None, against: str = "bytes") -> Figure:
    """Score against "bytes" (zeros left out) or "parameters" (kept), with the line that no run lies above."""
    groups = scored(grouped(runs), metric)
    costs = {"bytes": lambda run: run.packed_bytes, "parameters": lambda run: run.kept}
    if against not in costs:
        raise SparsightError(f"a score can be set against bytes or parameters, not {against!r}")
    groups = [group for group in groups if all(costs[against](run) for run in group.runs)]
    need(len(groups) > 1, "two runs whose size is known")
    sizes = [float(np.mean([costs[against](run) for run in group.runs])) for group in groups]
    found = [estimate(group, metric) for group in groups]
    values = [each.value for each in found if each]
    best = series.front(list(zip(sizes, values, strict=True)))
    name, factor = axis(metric)
    scale, unit = _scale(max(sizes), against)
    with mpl.rc_context(STYLE):
        figure = sheet(2.1 + 0.13 * min(len(best), 8))
        axes = figure.subplots()
        line = [(sizes[i] / scale, factor * values[i]) for i in best]
        steps = [*line, (max(sizes) / scale, line[-1][1])]
        axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=SOFT, linestyle="--", linewidth=0.9)
        for size, each, group in zip(sizes, found, groups, strict=True):
            if each:
                look: Any = {"fmt": mark(group.first), "color": color(group.first), "mfc": filled(group.first)}
                axes.errorbar(
                    size / scale, factor * each.value, yerr=whiskers(each, factor), capsize=2, elinewidth=0.7, **look
                )
        for number, (x, y) in zip(range(1, 9), line, strict=False):
            text: Any = {"xytext": (-3, 3), "textcoords": "offset points", "ha": "right", "fontsize": 7, "color": INK}
            axes.annotate(str(number), (x, y), **text)
        axes.margins(0.1)
        what = "size with zeros left out" if against == "bytes" else "parameters kept"
        axes.set_xlabel(f"{what}, {unit}")
        axes.set_ylabel(name)
        _kinds_legend(figure, groups)
        named = [f"{number}  {groups[i].label}" for number, i in zip(range(1, 9), best, strict=False)]
        handles = [Line2D([], [], linestyle="") for _ in named]
        figure.legend(handles, [wrapped(text, 60) for text in named], loc="outside lower left", handlelength=0, ncols=1)
        return figure


def loss_curves(runs: Sequence[Run]) -> Figure:
    """Cross entropy and divergence during restoration, a line per run; seeds are averaged."""
    groups = [group for group in grouped(runs) if group.first.curve]
    need(groups, "a run that was restored, with its curve")
    with mpl.rc_context(STYLE):
        figure = sheet(2.9)
        for axes, (key, title) in zip(
            figure.subplots(2, 1, sharex=True),
            (("ce", "cross entropy"), ("kl", "divergence from the dense model")),
            strict=True,
        ):
            handles = []
            for i, group in enumerate(groups[:8]):
                steps, values = _mean_curve(group, key)
                handles += axes.plot(steps, values, color=COLORS[i], linestyle=DASHES[i], label=group.label)
            axes.set_title(title, loc="left", color=INK)
            axes.set_ylabel("nats per token")
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, handles, [group.label for group in groups[:8]])
        return figure


def _mean_curve(group: Group, key: str) -> tuple[list[float], list[float]]:
    """The mean over the seeds that logged at the same steps as the first."""
    curves = [[(row["step"], row[key]) for row in run.curve if key in row] for run in group.runs]
    steps = [step for step, _ in curves[0]]
    same = [[value for _, value in curve] for curve in curves if [step for step, _ in curve] == steps]
    return steps, [float(value) for value in np.mean(same, axis=0)] if steps else []


def _kinds_legend(figure: Figure, groups: Sequence[Group]) -> None:
    kinds = {kind(group.first): group.first for group in groups}
    look: Any = [{"marker": mark(run), "mfc": filled(run), "color": color(run), "linestyle": ""} for run in kinds.values()]
    legend(figure, [Line2D([], [], **each) for each in look], list(kinds))


def _scale(largest: float, against: str) -> tuple[float, str]:
    scales = {
        "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
        "parameters": ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")),
    }
    return next((pair for pair in scales[against] if largest >= pair[0]), (1.0, against))


__all__ = [
    "component_curves", "fixed_sum_bars", "loss_curves", "pareto", "pattern_bars", "restoration_pairs", "scores",
]  # fmt: skip
