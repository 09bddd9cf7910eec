"""The list of the figures that runs make, and their files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from sparsight.errors import NotWritten
from sparsight.reporting import layer_figures, run_figures, speed_figures
from sparsight.reporting.groups import Group
from sparsight.reporting.scores import estimate, metric_name
from sparsight.reporting.select import NoFigure
from sparsight.reporting.style import STYLE, svg

# name, title after the name of the metric, caption, and the function of groups and a metric that draws the figure
RUN_FIGURES: tuple[tuple[str, str, str, Callable[..., Figure]], ...] = (
    ("fixed-sum", "by split of a fixed sum",
     "The same sum of sparsities, split between vision and language in different ways.", run_figures.fixed_sum_bars),
    ("components", "by component", "One component pruned, the others dense.", run_figures.component_curves),
    ("patterns", "by pattern", "Patterns at the same sparsity, from free to bound.", run_figures.pattern_bars),
    ("restoration", "before and after restoration", "Before and after restoration.", run_figures.restoration_pairs),
    ("bytes", "against bytes", "Kept weights and one bit per weight of a pruned layer; no run lies above the dashed line.",
     partial(run_figures.pareto, against="bytes")),
    ("parameters", "against parameters kept",
     "Parameters of the whole model that are not pruned; no run lies above the dashed line.",
     partial(run_figures.pareto, against="parameters")),
)  # fmt: skip
MOST_MAPS = 3  # runs with maps of their layers
Drawing = tuple[str, str, str, Callable[[], Figure]]  # name, title, caption and what draws the figure


@dataclass(frozen=True)
class ReportFigure:
    """A figure, its name as a file, its title, and what a reader should know to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> str:
        """The figure as an `<svg>` element whose ids are its own on a page."""
        return svg(self.figure, self.name, self.title)


def report_figures(groups: Sequence[Group], metric: str | None = None) -> list[ReportFigure]:
    """Draw every figure that the groups make; with a row per run, of the first 40."""
    figures = []
    for name, title, caption, draw in (*_run_drawings(groups, metric), *_layer_drawings(groups), *_speed_drawings(groups)):
        with contextlib.suppress(NoFigure):
            figures.append(ReportFigure(name, title, caption, draw()))
    return figures


def _run_drawings(groups: Sequence[Group], metric: str | None) -> Iterator[Drawing]:
    scored = [group for group in groups if estimate(group, metric)]
    score = metric_name(metric)
    if len(scored) > 1:
        seeds = "seeds and samples" if any(len(group.runs) > 1 for group in scored) else "samples"
        caption = f"Held-out {score}, 95 % intervals over {seeds}."
        yield "scores", f"{score} of every run", caption, partial(run_figures.scores, scored, metric)
    for name, title, caption, draw in RUN_FIGURES:
        yield name, f"{score} {title}", caption, partial(draw, scored, metric)
    limit = ", the first eight runs" if sum(bool(group.first.curve) for group in groups) > 8 else ""
    caption = f"Loss on answer tokens during restoration{limit}."
    yield "losses", "Loss during restoration", caption, partial(run_figures.loss_curves, groups)


def _layer_drawings(groups: Sequence[Group]) -> Iterator[Drawing]:
    """The layers of all groups if they are few; maps of the first few, those without restoration if there are any."""
    layered = [group for group in groups if group.first.layers]
    if 1 < len(layered) < 6:
        caption = "Zeros in every pruned layer, as counted in the files."
        yield "layers", "Sparsity of every layer", caption, partial(layer_figures.layer_sparsity, layered)
    runs = [group.first for group in layered if not group.first.is_restored] or [group.first for group in layered]
    runs.sort(key=lambda run: -len({layer["component"] for layer in run.layers.values()}))
    for i, run in enumerate(runs[:MOST_MAPS]):
        error = f"{run.label}: relative output error that pruning caused in"
        title = f"Relative output error of every block of {run.label}"
        caption = f"{error} each block, on calibration samples."
        yield f"blocks-{i}", title, caption, partial(layer_figures.block_errors, run)
        caption = f"{run.label}: zeros of every layer; hatched where a block has no such layer."
        yield f"zeros-{i}", f"Sparsity by layer and block of {run.label}", caption, partial(layer_figures.layer_heat, run)
        title = f"Relative output error by layer and block of {run.label}"
        caption = f"{error} every layer, on calibration samples."
        yield f"errors-{i}", title, caption, partial(layer_figures.layer_heat, run, "error")


def _speed_drawings(groups: Sequence[Group]) -> Iterator[Drawing]:
    runs = [run for group in groups for run in group.runs if run.bench is not None]
    for i, run in enumerate(runs[:MOST_MAPS]):
        facts = run.bench or {}
        small = "" if facts["large"] else " All layers fit into a cache, where packed weights gain nothing."
        machine = f"{facts['machine']}, {facts['threads']} threads, {facts['date']}"
        caption = (
            f"{run.label}, dense and packed, on {machine}: products with weights cold in memory, lower is faster; whole "
            f"answers, higher is faster.{small}"
        )
        yield f"speed-{i}", f"Speed of {run.label}, dense and packed", caption, partial(speed_figures.speed, run)


def save_figures(figures: Sequence[ReportFigure], folder: str | Path) -> list[Path]:
    """Write figures as `NAME.svg` and as `NAME.png` of 200 dpi into a folder, made if need be; the files are returned.

    **Raises** `NotWritten` where the folder cannot be written to.
    """
    files = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            for each in figures:
                vector, pixels = (Path(folder) / f"{each.name}.{kind}" for kind in ("svg", "png"))
                each.figure.savefig(vector, metadata={"Date": None})
                each.figure.savefig(pixels, dpi=200)
                files += [vector, pixels]
    except OSError as error:
        raise NotWritten(f"{folder}: the figures could not be written ({error.strerror or error})") from error
    return files
