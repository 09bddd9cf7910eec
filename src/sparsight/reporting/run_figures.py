"""The figures that compare runs: each takes groups of runs and gives a matplotlib figure of one column (3.3 inches).

Whiskers are 95 % intervals over seeds and samples (`reporting.scores`). Lines and bars differ in their dash, marker or hatch
first, and in their colour second. Every function raises `NoFigure` where the groups do not make its figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from sparsight.errors import SparsightError
from sparsight.reporting import select
from sparsight.reporting.groups import Group, describe_restoration
from sparsight.reporting.runs import ScoredModel
from sparsight.reporting.scores import CAPTIONS, QUESTIONS, Estimate, axis, estimate, has_both_kinds
from sparsight.reporting.style import COLORS, DASHES, INK, MARKS, SOFT, bar_look, legend, sheet, wrap

LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"marker": "s", "color": "#374151", "mfc": "#374151", "linestyle": ""},
    "pruned": {"marker": "v", "color": COLORS[1], "mfc": "white", "linestyle": ""},
    "restored": {"marker": "o", "color": COLORS[2], "mfc": COLORS[2], "linestyle": ""},
}
DASHED: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 0.8}  # the dense model
MOST_ROWS = 40  # in a figure with a row per run
COSTS = {  # the field of a run, the label of its axis, and the scales of the axis
    "bytes": ("packed_bytes", "size with zeros left out", ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))),
    "parameters": ("nonzero_parameters", "parameters kept", ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))),
}


def scores(groups: Sequence[Group], metric: str | None = None) -> Figure:
    """The score of each of the first 40 groups with its interval, a row each; a panel each for questions and captions."""
    groups = _scored_groups(groups, metric)[:MOST_ROWS]
    split = metric is None and all(has_both_kinds(group.first) for group in groups)
    parts: tuple[str | None, ...] = (QUESTIONS, CAPTIONS) if split else (None,)
    name, factor = axis(metric)
    labels = [wrap(group.label, 24) for group in groups]
    lines = 1 + max(label.count("\n") for label in labels)
    with sheet(0.55 + len(groups) * (0.07 + 0.115 * lines)) as figure:
        for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts), sharey=True)), parts, strict=True):
            for i, group in enumerate(groups):
                if score := estimate(group, metric, part):
                    look = LOOKS[_state(group.first)]
                    axes.errorbar(factor * score.value, -i, xerr=_whiskers(score, factor), capsize=2, ms=4.5, **look)
            if part:
                axes.set_title(part, loc="left", color=INK)
            _name_rows(axes, labels)
        figure.supxlabel(f"{name} (95 % interval)", fontsize=7.5, color=INK)
        return figure


def fixed_sum_bars(groups: Sequence[Group], metric: str | None = None) -> Figure:
    """Score by the split of a fixed sum of sparsities between vision and language; a panel per sum."""
    groups = _scored_groups(groups, metric)
    sums = select.fixed_sums(groups)
    select.require(sums, "runs that split the same sum of sparsities between vision and language in two ways or more")
    panels = {f"sum {100 * total:g} %": ways for total, ways in sums.items()}

    def ticks(splits: Sequence[Any]) -> list[str]:
        return [":".join(f"{100 * share:g}" for share in split) for split in splits]

    return _bars(panels, select.dense_group(groups), metric, "sparsity of vision : language, %", ticks)


def pattern_bars(groups: Sequence[Group], metric: str | None = None) -> Figure:
    """Score by pattern at the same sparsity, from unstructured to 2:4."""
    groups = _scored_groups(groups, metric)
    ways = select.patterns(groups)
    select.require(ways, "runs that differ in their pattern alone")

    def ticks(patterns: Sequence[Any]) -> list[str]:
        free = [pattern for pattern in patterns if pattern in ("row", "tensor")]
        if len(free) == 1:
            return ["unstructured" if pattern in free else pattern for pattern in patterns]
        return [f"unstructured,\nby {pattern}" if pattern in free else pattern for pattern in patterns]

    label = "pattern (n:m keeps n of every m inputs)"
    return _bars({"": ways}, select.dense_group(groups), metric, label, ticks, select.pattern_order)


def _bars(
    panels: Mapping[str, Sequence[select.Series]],
    dense: Group | None,
    metric: str | None,
    label: str,
    ticks: Callable[[Sequence[Any]], list[str]],
    order: Callable[[Any], Any] | None = None,
) -> Figure:
    """A panel per title with a bar per point, series beside each other; the score of the dense model is a line.

    `label` is that of the last x axis. The places of the points are sorted by `order`; `ticks` gives their labels.
    """
    name, factor = axis(metric)
    reference = estimate(dense, metric) if dense else None
    with sheet(0.5 + 1.55 * len(panels)) as figure:
        for axes, (title, ways) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
            places = sorted({place for way in ways for place, _ in way.points}, key=order)
            width = 0.8 / len(ways)
            for i, way in enumerate(ways):
                for place, group in way.points:
                    if score := estimate(group, metric):
                        x = places.index(place) + (i - (len(ways) - 1) / 2) * width
                        ends = {"yerr": _whiskers(score, factor), "capsize": 2, "error_kw": {"elinewidth": 0.7}}
                        axes.bar(x, factor * score.value, 0.92 * width, **bar_look(i), ecolor=INK, **ends)
            if reference:
                axes.axhline(factor * reference.value, **DASHED)
            axes.set_xticks(range(len(places)), ticks(places))
            axes.grid(axis="x", visible=False)
            axes.set_ylabel(name)
            axes.set_xlim(-0.6, len(places) - 0.4)
            axes.set_ylim(0, 105 if factor == 100 else None)
            axes.set_title(title, loc="left", color=INK)
        axes.set_xlabel(label)
        most = max(panels.values(), key=len)
        handles: list[Any] = [(way.label, Patch(**bar_look(i))) for i, way in enumerate(most) if way.label]
        if dense:
            handles.append(("dense", Line2D([], [], **DASHED)))
        legend(figure, handles)
        return figure


def component_curves(groups: Sequence[Group], metric: str | None = None) -> Figure:
    """Score against the sparsity of one component, the others dense; a line per component."""
    lines = select.single_components(_scored_groups(groups, metric))
    select.require(lines, "runs that prune one component alone, at two sparsities or more")
    name, factor = axis(metric)
    with sheet(2.35) as figure:
        axes = figure.subplots()
        handles = []
        for i, line in enumerate(lines):
            points = [(100 * sparsity, score) for sparsity, group in line.points if (score := estimate(group, metric))]
            look: Any = {"color": COLORS[i % 8], "linestyle": DASHES[i % 8], "marker": MARKS[i % 8]}
            ends = np.concatenate([_whiskers(score, factor) for _, score in points], axis=1)
            x, y = [sparsity for sparsity, _ in points], [factor * score.value for _, score in points]
            handles.append((line.label, axes.errorbar(x, y, yerr=ends, capsize=2, elinewidth=0.7, **look)[0]))
        axes.set_xlabel("sparsity of the component, %")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        legend(figure, handles)
        return figure


def restoration_pairs(groups: Sequence[Group], metric: str | None = None) -> Figure:
    """Scores before (hollow) and after restoration, of the first 40 groups, a row per pair; the dense model is a line."""
    groups = _scored_groups(groups, metric)[:MOST_ROWS]
    pairs = select.restorations(groups)
    select.require(pairs, "a pruned run and one restored from it")
    name, factor = axis(metric)
    several = len({describe_restoration(after.first.cell["restore"]) for _, after in pairs}) > 1
    labels = [wrap(before.label + (f" → {after.label}" if several else "")) for before, after in pairs]
    lines = 1 + max(label.count("\n") for label in labels)
    edge: dict[str, Any] = {"mec": INK, "mew": 0.8, "linestyle": ""}
    looks: list[dict[str, Any]] = [{"marker": "v", "mfc": "white", **edge}, {"marker": "o", "mfc": COLORS[2], **edge}]
    with sheet(0.8 + len(pairs) * max(0.26, 0.05 + 0.115 * lines)) as figure:
        axes = figure.subplots()
        for i, pair in enumerate(pairs):
            ends = [estimate(group, metric) for group in pair]
            values = [factor * end.value for end in ends if end]
            axes.plot(values, [-i, -i], color=SOFT, linewidth=2.2, alpha=0.35, solid_capstyle="butt")
            for end, up, look in zip(ends, (0.14, -0.14), looks, strict=True):
                if end:
                    bars: Any = {"xerr": _whiskers(end, factor), "capsize": 2, "ecolor": INK, "elinewidth": 0.7}
                    axes.errorbar(factor * end.value, -i + up, ms=5, **bars, **look)
        handles = [(s, Line2D([], [], **look)) for s, look in zip(("pruned", "restored"), looks, strict=True)]
        if (dense := select.dense_group(groups)) and (reference := estimate(dense, metric)):
            handles.append(("dense", axes.axvline(factor * reference.value, **DASHED)))
        _name_rows(axes, labels)
        axes.set_xlabel(f"{name} (95 % interval)")
        legend(figure, handles)
        return figure


def pareto(groups: Sequence[Group], metric: str | None = None, against: str = "bytes") -> Figure:
    """Score against "bytes" (zeros left out) or "parameters" (zeros not counted), with the line that no run lies above.

    **Raises** `SparsightError` for another cost.
    """
    if against not in COSTS:
        raise SparsightError(f"a score can be set against bytes or parameters, not {against!r}")
    cost, label, scales = COSTS[against]
    points = []
    for group in _scored_groups(groups, metric):
        sizes = [size for run in group.runs if (size := getattr(run, cost))]
        score = estimate(group, metric)
        if score and len(sizes) == len(group.runs):
            points.append((float(np.mean(sizes)), score, group))
    select.require(len(points) > 1, "two runs whose size is known")
    name, factor = axis(metric)
    largest = max(x for x, _, _ in points)
    scale, unit = next((pair for pair in scales if largest >= pair[0]), (1.0, against))
    best = select.pareto_front([(x, score.value) for x, score, _ in points])
    with sheet(2.1 + 0.13 * min(len(best), 8)) as figure:
        axes = figure.subplots()
        line = [(points[i][0] / scale, factor * points[i][1].value) for i in best]
        steps = [*line, (largest / scale, line[-1][1])]
        axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=SOFT, linestyle="--", linewidth=0.9)
        for x, score, group in points:
            ends: Any = {"yerr": _whiskers(score, factor), "capsize": 2, "elinewidth": 0.7}
            axes.errorbar(x / scale, factor * score.value, **ends, **LOOKS[_state(group.first)])
        for number, (x, y) in enumerate(line[:8], 1):
            text: Any = {"xytext": (-3, 3), "textcoords": "offset points", "ha": "right", "fontsize": 7, "color": INK}
            axes.annotate(str(number), (x, y), **text)
        axes.margins(0.1)
        axes.set_xlabel(f"{label}, {unit}")
        axes.set_ylabel(name)
        states = dict.fromkeys(_state(group.first) for _, _, group in points)
        legend(figure, [(state, Line2D([], [], **LOOKS[state])) for state in states])
        names = [wrap(f"{number}  {points[i][2].label}", 60) for number, i in enumerate(best[:8], 1)]
        handles = [Line2D([], [], linestyle="") for _ in names]
        figure.legend(handles, names, loc="outside lower left", handlelength=0, ncols=1)
        return figure


def loss_curves(groups: Sequence[Group]) -> Figure:
    """Cross entropy and divergence during restoration, a line per group of at most 8; seeds are averaged."""
    groups = [group for group in groups if group.first.curve][:8]
    select.require(groups, "a run that was restored, with its curve")
    with sheet(2.9) as figure:
        losses = (("ce", "cross entropy"), ("kl", "divergence from the dense model"))
        for axes, (key, title) in zip(figure.subplots(2, 1, sharex=True), losses, strict=True):
            handles = []
            for i, group in enumerate(groups):
                steps, values = _mean_curve(group, key)
                (line,) = axes.plot(steps, values, color=COLORS[i], linestyle=DASHES[i], label=group.label)
                handles.append((group.label, line))
            axes.set_title(title, loc="left", color=INK)
            axes.set_ylabel("nats per token")
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, handles)
        return figure


def _mean_curve(group: Group, key: str) -> tuple[list[float], list[float]]:
    """The mean over the seeds that logged at the same steps as the first."""
    curves = [[(row["step"], row[key]) for row in run.curve if key in row] for run in group.runs]
    steps = [step for step, _ in curves[0]]
    same = [[value for _, value in curve] for curve in curves if [step for step, _ in curve] == steps]
    return steps, [float(value) for value in np.mean(same, axis=0)] if steps else []


def _scored_groups(groups: Sequence[Group], metric: str | None) -> list[Group]:
    scored = [group for group in groups if estimate(group, metric)]
    select.require(scored, f"runs with {axis(metric)[0]}; record them with sparsight eval --record")
    return scored


def _state(run: ScoredModel) -> str:
    return "dense" if run.is_dense else "restored" if run.is_restored else "pruned"


def _whiskers(score: Estimate, factor: float) -> np.ndarray:
    """Lengths below and above the value, (2, 1); 0 where there is no interval."""
    if score.low is None or score.high is None:
        return np.zeros((2, 1))
    return factor * np.array([[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]])


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    """Label the rows at 0, -1, -2, ... on the y axis."""
    axes.set_yticks([-i for i in range(len(labels))], labels)
    axes.set_ylim(-len(labels) + 0.4, 0.6)
    axes.grid(axis="y", visible=False)
