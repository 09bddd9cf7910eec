"""The figures of one run's layers and blocks: where the zeros are and what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsight.errors import SparsightError
from sparsight.reporting.groups import Group
from sparsight.reporting.runs import ScoredModel
from sparsight.reporting.select import LayerMap, NoFigure, layer_maps, require
from sparsight.reporting.style import COLORS, DASHES, INK, SOFT, legend, sheet

UNITS = {"got": ("zeros, %", 100.0), "error": ("relative output error, %", 100.0)}


def layer_heat(run: ScoredModel, fact: str = "got") -> Figure:
    """A map of "got" (sparsity) or "error" (relative output error of pruning): blocks across, kinds of layers down.

    One panel per component. A hatched place has no such layer.

    **Raises** `NoFigure` for a run without the fact, `SparsightError` for another fact.
    """
    if fact not in UNITS:
        raise SparsightError(f"a map shows got or error, not {fact!r}")
    name, factor = UNITS[fact]
    maps = layer_maps(run.layers, fact)
    if not maps:
        raise NoFigure(f"{run.label}: no layer's {name.split(',')[0]} is known")
    top = max(float(np.nanmax(each.values)) for each in maps) * factor
    limits = {"vmin": 0, "vmax": max(top, 100 if fact == "got" else 0) or 1}
    rows = [len(each.kinds) for each in maps]
    with sheet(0.75 + 0.34 * len(maps) + 0.145 * sum(rows), grid=False) as figure:
        panels = figure.subplots(len(maps), 1, squeeze=False, height_ratios=[max(n, 2) for n in rows])[:, 0]
        for axes, each in zip(panels, maps, strict=True):
            axes.patch.set(facecolor="white", hatch="//////", edgecolor="#c5cad1")
            image = axes.imshow(factor * each.values, aspect="auto", cmap="Greys", **limits)
            several = _name_blocks(axes, each)
            axes.set_yticks(range(len(each.kinds)), [kind[-28:] for kind in each.kinds])
            axes.set_title(each.component, loc="left", color=INK, fontweight="bold", pad=12 if several else 4)
            axes.set_xticks(np.arange(0.5, len(each.blocks) - 1), minor=True)
            axes.set_yticks(np.arange(0.5, len(each.kinds) - 1), minor=True)
            axes.grid(which="minor", color="white", linewidth=1)
            axes.tick_params(which="minor", length=0)
            for side in axes.spines.values():
                side.set_visible(False)
        axes.set_xlabel("block")
        bar = figure.colorbar(image, ax=list(panels), location="bottom", aspect=40, pad=0.02, shrink=0.9)
        bar.set_label(name)
        bar.outline.set_visible(False)
        return figure


def _name_blocks(axes: Any, each: LayerMap) -> bool:
    """Number the blocks of each stack from its own 0, and name the stacks, as encoder and decoder, if there are several."""
    parts = [name.split(".") for name in each.blocks]
    numbers = [next((part for part in reversed(name) if part.isdigit()), "") for name in parts]
    step = -(-len(numbers) // 14)
    ticks = [i for i, number in enumerate(numbers) if not number.isdigit() or int(number) % step == 0]
    axes.set_xticks(ticks, [numbers[i] for i in ticks])
    stacks: dict[tuple[str, ...], list[int]] = {}
    for i, name in enumerate(parts):
        stacks.setdefault(tuple(part for part in name if not part.isdigit()), []).append(i)
    if len(stacks) > 1:
        for stack, columns in stacks.items():
            label = " ".join(word for word in stack if not all(word in other for other in stacks)) or ".".join(stack)
            _name_span(axes, columns, label, 1.0, va="bottom")
            if columns[0]:
                axes.axvline(columns[0] - 0.5, color=INK, linewidth=0.8)
    return len(stacks) > 1


def _name_span(axes: Any, places: Sequence[int], label: str, y: float, **look: Any) -> None:
    """Write a label above the middle of places on the x axis, at the height `y` of the axes."""
    x = float(np.mean(places))
    axes.text(x, y, label, transform=axes.get_xaxis_transform(), fontsize=7, color=SOFT, ha="center", **look)


def layer_sparsity(groups: Sequence[Group]) -> Figure:
    """The sparsity of every pruned layer, in forward order, a line per group of at most 8; of several seeds the first.

    **Raises** `NoFigure` where no group has layers.
    """
    groups = [group for group in groups if group.first.layers]
    require(groups, "runs whose layers are known")
    components = {name: layer["component"] for group in groups for name, layer in group.first.layers.items()}
    order = list(dict.fromkeys(components.values()))
    names = sorted(components, key=lambda name: order.index(components[name]))
    groups = groups[:8]
    with sheet(2.1) as figure:
        axes = figure.subplots()
        handles = []
        for i, group in enumerate(groups):  # thick below thin, so that lines that coincide are all visible
            layers = group.first.layers
            zeros = [100 * layers[name]["got"] if name in layers else np.nan for name in names]
            look: Any = {"color": COLORS[(i + 1) % 8], "linestyle": DASHES[i % 8], "drawstyle": "steps-mid"}
            look |= {"linewidth": max(1.2, 4.5 - 1.5 * i), "alpha": 0.5 if i == 0 else 1}
            handles += [(group.label, line) for line in axes.plot(range(len(names)), zeros, **look)]
        _name_components(axes, [components[name] for name in names])
        axes.set_ylabel("zeros, %")
        axes.set_xlabel("pruned layer, in forward order")
        axes.set_ylim(bottom=-4)
        legend(figure, handles)
        return figure


def block_errors(run: ScoredModel) -> Figure:
    """The relative output error that pruning caused in every block, in forward order.

    **Raises** `NoFigure` for a run without such errors.
    """
    require(run.block_errors, "a run whose blocks' errors were measured")
    with sheet(1.85) as figure:
        axes = figure.subplots()
        hatches = {"connector": "....", "language": "/////"}
        components = {layer["block"]: layer["component"] for layer in run.layers.values()}
        names = [components.get(block, "") for block in run.block_errors]
        values = [100 * value for value in run.block_errors.values()]
        bars = axes.bar(range(len(values)), values, color="#d1d5db", edgecolor=INK, linewidth=0.6, width=0.7)
        for bar, component in zip(bars, names, strict=True):
            bar.set_hatch(hatches.get(component, ""))
        _name_components(axes, names)
        axes.set_ylabel("‖f′(x) − f(x)‖ / ‖f(x)‖, %")
        axes.set_xlabel("block, in forward order")
        axes.grid(axis="x", visible=False)
        return figure


def _name_components(axes: Any, components: Sequence[str]) -> None:
    """Name the components above their places on the x axis, with a line between two of them."""
    for component, pairs in itertools.groupby(enumerate(components), key=lambda pair: pair[1]):
        places = [i for i, _ in pairs]
        _name_span(axes, places, component, 1.01)
        if places[0]:
            axes.axvline(places[0] - 0.5, color=SOFT, linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.7, len(components) - 0.3)
