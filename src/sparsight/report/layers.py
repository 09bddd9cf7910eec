"""The figures of one run's layers and blocks: where the zeros are and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sparsight.errors import SparsightError
from sparsight.report.drawing import COLORS, DASHES, INK, SOFT, STYLE, legend, sheet
from sparsight.report.runs import Run, grouped
from sparsight.report.series import LayerMap, layer_maps

UNITS = {"got": ("zeros, %", 100.0), "error": ("relative output error, %", 100.0)}


def layer_heat(run: Run, what: str = "got") -> Figure:
    """A map of "got" (sparsity) or "error" (relative output error of pruning): blocks across, kinds of layers down.

    One panel per component. A hatched place has no such layer.
    """
    if what not in UNITS:
        raise SparsightError(f"a map shows got or error, not {what!r}")
    maps = layer_maps(run.layers, what)
    if not maps:
        raise SparsightError(f"{run.label}: no layer's {UNITS[what][0].split(',')[0]} is known")
    name, factor = UNITS[what]
    top = max(float(np.nanmax(each.values)) for each in maps) * factor
    limits = {"vmin": 0, "vmax": max(top, 100 if what == "got" else 0) or 1}
    rows = [len(each.kinds) for each in maps]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = sheet(0.75 + 0.34 * len(maps) + 0.145 * sum(rows))
        panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=[max(n, 2) for n in rows])[:, 0]
        for axes, each in zip(panels, maps, strict=True):
            axes.patch.set(facecolor="white", hatch="//////", edgecolor="#c5cad1")
            image = axes.imshow(factor * each.values, aspect="auto", cmap="Greys", **limits)
            _name_blocks(axes, each)
            axes.set_yticks(range(len(each.kinds)), [kind[-28:] for kind in each.kinds])
            axes.set_title(each.component, loc="left", color=INK, fontweight="bold", pad=12 if len(_stacks(each)) > 1 else 4)
            axes.set_xticks(np.arange(0.5, len(each.blocks) - 1), minor=True)
            axes.set_yticks(np.arange(0.5, len(each.kinds) - 1), minor=True)
            axes.grid(which="minor", color="white", linewidth=1)
            axes.tick_params(which="minor", length=0)
            for side in axes.spines.values():
                side.set_visible(False)
        axes.set_xlabel("block")
        bar = figure.colorbar(image, ax=list(panels), location="bottom", aspect=40, pad=0.02, shrink=0.9)
        bar.set_label(f"{name}")
        bar.outline.set_visible(False)
        return figure


def _name_blocks(axes: Any, shown: LayerMap) -> None:
    """Number the blocks of each stack from its own 0, and name the stacks where there are several."""
    parts = [name.split(".") for name in shown.blocks]
    stacks = [_stack(name) for name in shown.blocks]
    numbers = [next((part for part in reversed(name) if part.isdigit()), "") for name in parts]
    every = -(-len(numbers) // 14)
    ticks = [i for i, number in enumerate(numbers) if not number.isdigit() or int(number) % every == 0]
    axes.set_xticks(ticks, [numbers[i] for i in ticks])
    distinct = _stacks(shown)
    if len(distinct) > 1:
        words = [stack.split(".") for stack in distinct]
        for stack, mine in zip(distinct, words, strict=True):
            at = [i for i, other in enumerate(stacks) if other == stack]
            telling = [word for word in mine if not all(word in other for other in words)]
            axes.text(
                float(np.mean(at)), 1.0, " ".join(telling) or stack, transform=axes.get_xaxis_transform(), fontsize=7,
                color=SOFT, ha="center", va="bottom",
            )  # fmt: skip
            if at[0]:
                axes.axvline(at[0] - 0.5, color=INK, linewidth=0.8)


def _stack(block: str) -> str:
    return ".".join(part for part in block.split(".") if not part.isdigit())


def _stacks(shown: LayerMap) -> list[str]:
    """The stacks of blocks of a component, as encoder and decoder."""
    return list(dict.fromkeys(_stack(name) for name in shown.blocks))


def layer_sparsity(runs: Sequence[Run]) -> Figure:
    """The sparsity of every pruned layer, in forward order, a line per run; of several seeds the first."""
    groups = [group for group in grouped(runs) if group.first.layers]
    if not groups:
        raise SparsightError("this figure needs runs whose layers are known")
    names = list(dict.fromkeys(name for group in groups for name in group.first.layers))
    components = {name: layer["component"] for group in groups for name, layer in group.first.layers.items()}
    names.sort(key=lambda name: list(dict.fromkeys(components.values())).index(components[name]))
    with mpl.rc_context(STYLE):
        figure = sheet(2.1)
        axes = figure.subplots()
        handles = []
        for i, group in enumerate(groups[:8]):  # thick below thin, so that what coincides is seen to
            there = [100 * group.first.layers[name]["got"] if name in group.first.layers else np.nan for name in names]
            look: Any = {"color": COLORS[(i + 1) % 8], "linestyle": DASHES[i % 8], "drawstyle": "steps-mid"}
            handles += axes.plot(
                range(len(names)), there, linewidth=max(1.2, 4.5 - 1.5 * i), alpha=0.5 if i == 0 else 1, **look
            )
        stretches(axes, [components[name] for name in names])
        axes.set_ylabel("zeros, %")
        axes.set_xlabel("pruned layer, in forward order")
        axes.set_ylim(bottom=-4)
        legend(figure, handles, [group.label for group in groups[:8]])
        return figure


def block_errors(errors: Mapping[str, float], components: Mapping[str, str]) -> Figure:
    """The relative output error that pruning caused in every block, in the order of the walk."""
    if not errors:
        raise SparsightError("this figure needs a run whose blocks' errors were measured")
    with mpl.rc_context(STYLE):
        figure = sheet(1.85)
        axes = figure.subplots()
        hatches = {"vision": "", "connector": "....", "language": "/////"}
        kinds = [components.get(name, "") for name in errors]
        values = [100 * value for value in errors.values()]
        bars = axes.bar(range(len(values)), values, color="#d1d5db", edgecolor=INK, linewidth=0.6, width=0.7)
        for bar, kind in zip(bars, kinds, strict=True):
            bar.set_hatch(hatches.get(kind, ""))
        stretches(axes, kinds)
        axes.set_ylabel("‖f′(x) − f(x)‖ / ‖f(x)‖, %")
        axes.set_xlabel("block, in forward order")
        axes.grid(axis="x", visible=False)
        return figure


def stretches(axes: Any, components: Sequence[str]) -> None:
    """Name the stretch of every component along the top, and part them with a line."""
    start = 0
    for i in range(1, len(components) + 1):
        if i == len(components) or components[i] != components[start]:
            text: Any = {"fontsize": 7, "color": SOFT, "ha": "center"}
            axes.text((start + i - 1) / 2, 1.01, components[start], transform=axes.get_xaxis_transform(), **text)
            if i < len(components):
                axes.axvline(i - 0.5, color=SOFT, linewidth=0.8, linestyle=":")
            start = i
    axes.set_xlim(-0.7, len(components) - 0.3)
