"""The figure of what `bench` measured: products with a layer's weight, and tokens per second, dense and packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sparsight.packing.timing import OURS, TORCH
from sparsight.reporting.runs import ScoredModel
from sparsight.reporting.select import NoFigure
from sparsight.reporting.style import bar_look, legend, sheet, wrap

MOST_SHAPES = 5  # the largest
WIDTH = 0.86  # of the bars of a place together
FORMS = {"dense": TORCH, "packed": OURS}  # of a whole model, and the products that most of its time goes into


def speed(run: ScoredModel) -> Figure:
    """Milliseconds of a product at one token by shape of the weight, and tokens per second by batch, a bar per form.

    **Raises** `NoFigure` for a run without a record of `bench`.
    """
    if run.bench is None:
        raise NoFigure(f"{run.label}: has no bench.json; run sparsight bench with `record`")
    shapes = {f"{each['rows']} x\n{each['columns']}": each["ms"]["1"] for each in run.bench["layers"][-MOST_SHAPES:]}
    batches = {str(each["batch"]): each["tokens_per_second"] for each in run.bench["generate"]}
    names = list(dict.fromkeys(form for times in shapes.values() for form in times))
    looks = {name: bar_look(i) for i, name in enumerate(names)}
    with sheet(4.1) as figure:
        above, below = figure.subplots(2, 1)
        _bars(above, shapes, looks)
        above.set_yscale("log")
        above.set_ylim(min(time for times in shapes.values() for time in times.values()) / 2, None)
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # where all bars lie between 1 and 10, too
        above.yaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:g}"))
        above.yaxis.set_minor_formatter(NullFormatter())
        above.set_ylabel("ms of a product, one token")
        above.set_xlabel("weight (rows x columns)")
        _bars(below, batches, {form: looks[name] for form, name in FORMS.items()})
        below.set_ylabel("tokens per second")
        below.set_xlabel("batch")
        legend(figure, [(wrap(name), Patch(**look)) for name, look in looks.items()])
        return figure


def _bars(axes: Any, places: Mapping[str, Mapping[str, float]], looks: Mapping[str, dict[str, Any]]) -> None:
    """A bar per look beside each other at every place, where it has a value of that name."""
    width = WIDTH / len(looks)
    for i, values in enumerate(places.values()):
        for k, (name, look) in enumerate(looks.items()):
            if name in values:
                axes.bar(i + (k - (len(looks) - 1) / 2) * width, values[name], 0.92 * width, **look)
    axes.set_xticks(range(len(places)), list(places))
    axes.grid(axis="x", visible=False)
