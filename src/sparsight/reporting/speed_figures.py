"""The figure of what `bench` measured: products with a layer's weight, and tokens per second, dense and packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

from sparsight.reporting.runs import ScoredModel
from sparsight.reporting.select import NoFigure
from sparsight.reporting.style import HATCHES, INK, TINTS, legend, sheet, wrap

MOST_SHAPES = 5  # the largest
SCALE = 0.86  # how wide the bars of a place are together


def speed(run: ScoredModel) -> Figure:
    """Milliseconds of a product at one token by shape of the weight, and tokens per second by batch, a bar per form.

    **Raises** `NoFigure` for a run without a record of `bench`.
    """
    if run.bench is None:
        raise NoFigure(f"{run.label}: has no bench.json; run sparsight bench with `record`")
    layers = run.bench["layers"][-MOST_SHAPES:]
    forms = list(dict.fromkeys(form for layer in layers for form in layer["ms"]["1"]))
    shapes = {f"{layer['rows']} x\n{layer['columns']}": layer["ms"]["1"] for layer in layers}
    batches = {str(each["batch"]): each["tokens_per_second"] for each in run.bench["generate"]}
    with sheet(4.1) as figure:
        above, below = figure.subplots(2, 1)
        _bars(above, forms, shapes)
        above.set_yscale("log")
        above.yaxis.set_minor_formatter(NullFormatter())
        above.set_ylabel("ms of a product, one token")
        above.set_xlabel("weight (rows x columns)")
        _bars(below, ["dense", "packed"], batches)
        below.set_ylabel("tokens per second")
        below.set_xlabel("batch")
        legend(figure, [(wrap(form), Patch(**_look(forms, form))) for form in forms])
        return figure


def _look(forms: Sequence[str], form: str) -> dict[str, Any]:
    i = {"dense": 0, "packed": forms.index("packed")}[form] if form in ("dense", "packed") else forms.index(form)
    return {"facecolor": TINTS[i % 8], "hatch": HATCHES[i % 8], "edgecolor": INK, "linewidth": 0.6}


def _bars(axes: Any, forms: Sequence[str], places: Mapping[str, Mapping[str, float]]) -> None:
    width = SCALE / len(forms)
    for i, values in enumerate(places.values()):
        for k, form in enumerate(forms):
            if form in values:
                x = i + (k - (len(forms) - 1) / 2) * width
                axes.bar(x, values[form], 0.92 * width, **_look([*forms, "packed"], form))
    axes.set_xticks(range(len(places)), list(places))
    axes.grid(axis="x", visible=False)
