"""The figures of a report as SVG text, drawn for paper: readable in black and white, a unit on every axis."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK, SOFT, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
COLORS = {"dense": "#6b7280", "pruned": "#c2410c", "lora": "#a16207", "sparselora": "#0f766e"}
MARKS = {"dense": "s", "pruned": "X", "lora": "D", "sparselora": "o"}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsight",  # the same facts give the same bytes
    "legend.frameon": False,
}


def scores(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Exact match of questions and captions per model, with 95 % intervals."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key, title in ((left, "questions", "Questions"), (right, "captions", "Captions")):
            for i, (name, run) in enumerate(runs.items()):
                value, low, high = (100 * run[key][k] for k in ("value", "low", "high"))
                axes.errorbar(
                    value, -i, xerr=[[value - low], [high - value]], fmt=MARKS[name], color=COLORS[name], capsize=3, ms=6
                )
            axes.set_title(title, loc="left", fontsize=9, color=INK)
            axes.set_xlabel("exact match, % (95 % interval)")
            axes.set_xlim(0, 101)
            axes.set_ylim(-len(runs) + 0.4, 0.6)
        left.set_yticks([-i for i in range(len(runs))], [run["label"] for run in runs.values()])
        return _svg(figure, "Exact match of every model with intervals")


def layer_sparsity(layers: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """The sparsity of every pruned layer, in forward order, for each result."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.3), layout="constrained")
        axes = figure.subplots()
        for name, size in (("pruned", 26), ("lora", 14), ("sparselora", 8)):
            values = [100 * layer[name] for layer in layers]
            marks: Any = {"s": size, "color": COLORS[name], "marker": MARKS[name], "linewidths": 0}
            axes.scatter(range(len(values)), values, label=labels[name], alpha=0.9, **marks)
        _component_lines(axes, [layer["component"] for layer in layers])
        axes.set_ylabel("zeros, %")
        axes.set_xlabel("pruned layer, in forward order")
        axes.set_ylim(-4, 62)
        axes.legend(loc="center right", bbox_to_anchor=(1, 0.45), handletextpad=0.2, fontsize=7.5)
        return _svg(figure, "Sparsity of every layer")


def block_errors(errors: Mapping[str, float], components: Mapping[str, str]) -> str:
    """The relative output error that pruning caused in every block, in the order of the walk."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.3), layout="constrained")
        axes = figure.subplots()
        hatches = {"vision": "", "connector": "..", "language": "///"}
        kinds = [components[name] for name in errors]
        bars = axes.bar(range(len(errors)), list(errors.values()), color="#9ca3af", edgecolor=INK, linewidth=0.6, width=0.7)
        for bar, kind in zip(bars, kinds, strict=True):
            bar.set_hatch(hatches[kind])
        _component_lines(axes, kinds)
        axes.set_ylabel("‖f′(x) − f(x)‖ / ‖f(x)‖")
        axes.set_xlabel("block, in forward order")
        axes.set_xticks(range(len(errors)))
        return _svg(figure, "Relative output error of every block")


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], labels: Mapping[str, str]) -> str:
    """Cross entropy and divergence during restoration, per adapter."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 2.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, key, title in ((left, "ce", "Cross entropy"), (right, "kl", "KL(dense ‖ sparse)")):
            for name, rows in curves.items():
                style = "-" if name == "sparselora" else "--"
                axes.plot([r["step"] for r in rows], [r[key] for r in rows], style, color=COLORS[name], label=labels[name])
            axes.set_title(title, loc="left", fontsize=9, color=INK)
            axes.set_xlabel("step")
            axes.set_ylabel("nats per answer token")
            axes.set_ylim(bottom=0)
        right.legend(loc="upper right", fontsize=7.5)
        return _svg(figure, "Loss during restoration")


def _component_lines(axes: Any, components: Sequence[str]) -> None:
    """Name the stretch of every component along the top, and part them with a line."""
    start = 0
    for i in range(1, len(components) + 1):
        if i == len(components) or components[i] != components[start]:
            text: Any = {"fontsize": 8, "color": SOFT, "ha": "center"}
            axes.text((start + i - 1) / 2, 1.01, components[start], transform=axes.get_xaxis_transform(), **text)
            if i < len(components):
                axes.axvline(i - 0.5, color=SOFT, linewidth=0.8, linestyle=":")
            start = i
    axes.set_xlim(-0.7, len(components) - 0.3)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element that scales with its page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
