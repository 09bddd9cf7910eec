"""All the figures that a list of runs makes, each with what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from sparsight.errors import NotWritten
from sparsight.report import figures, layers, series
from sparsight.report.drawing import save, svg
from sparsight.report.runs import Run, grouped
from sparsight.report.scores import axis, estimate

MOST_MAPS = 3
MOST_ROWS = 40  # in a figure with a row per run


@dataclass(frozen=True)
class Plate:
    """A figure, its name as a file, what it is in a few words, and what a reader should know."""

    name: str
    title: str
    caption: str
    figure: Figure

    @property
    def svg(self) -> str:
        return svg(self.figure, self.name, self.title)


def album(runs: Sequence[Run], metric: str | None = None) -> list[Plate]:
    """Draw every figure that the runs make possible; of long lists of runs the first 40."""
    groups = grouped(runs)
    scored = [group for group in groups if estimate(group, metric)]
    name = axis(metric)[0].split(",")[0]
    among = [run for group in scored[:MOST_ROWS] for run in group.runs]
    plates = []
    if len(scored) > 1:
        seeds = "over seeds and samples" if max(len(group.runs) for group in scored) > 1 else "over samples"
        plates.append(
            Plate(
                "scores", f"{name} of every run", f"Held-out {name}, 95 % intervals {seeds}.", figures.scores(among, metric)
            )
        )
    if series.fixed_sums(scored):
        text = "The same sum of sparsities, split between vision and language in different ways."
        plates.append(Plate("fixed-sum", f"{name} by split of a fixed sum", text, figures.fixed_sum_bars(runs, metric)))
    if series.component_curves(scored):
        text = "One component pruned, the others dense."
        plates.append(Plate("components", f"{name} by component", text, figures.component_curves(runs, metric)))
    if series.patterns(scored):
        text = "Patterns at the same sparsity, from free to bound."
        plates.append(Plate("patterns", f"{name} by pattern", text, figures.pattern_bars(runs, metric)))
    if len(series.pairs(scored)) > 0:
        text = "Before and after restoration."
        plates.append(
            Plate("restoration", f"{name} before and after restoration", text, figures.restoration_pairs(among, metric))
        )
    if sum(all(run.packed_bytes for run in group.runs) for group in scored) > 1:
        text = "Kept weights and one bit per weight of a pruned layer; no run lies above the dashed line."
        plates.append(Plate("bytes", f"{name} against bytes", text, figures.pareto(runs, metric, "bytes")))
    if sum(all(run.kept for run in group.runs) for group in scored) > 1:
        text = "Parameters of the whole model that are not pruned; no run lies above the dashed line."
        plates.append(
            Plate("parameters", f"{name} against parameters kept", text, figures.pareto(runs, metric, "parameters"))
        )
    return plates + _of_layers(runs)


def _of_layers(runs: Sequence[Run]) -> list[Plate]:
    """Curves of restoration, and what is known of the layers of the first few pruned runs."""
    groups = grouped(runs)
    plates = []
    if restored := [group for group in groups if group.first.curve]:
        text = "Loss on answer tokens during restoration" + (", the first eight runs." if len(restored) > 8 else ".")
        plates.append(Plate("losses", "Loss during restoration", text, figures.loss_curves(runs)))
    known = [group.first for group in groups if group.first.layers]
    if 1 < len(known) < 6:
        text = "Zeros in every pruned layer, as counted in the files."
        plates.append(Plate("layers", "Sparsity of every layer", text, layers.layer_sparsity(known)))
    shown = [run for run in known if not run.restored] or known
    shown.sort(key=lambda run: -len({layer["component"] for layer in run.layers.values()}))
    for i, run in enumerate(shown[:MOST_MAPS]):
        if run.block_errors:
            kinds = {layer["block"]: layer["component"] for layer in run.layers.values()}
            text = f"{run.label}: relative output error that pruning caused in each block, on calibration samples."
            title = f"Relative output error of every block of {run.label}"
            plates.append(Plate(f"blocks-{i}", title, text, layers.block_errors(run.block_errors, kinds)))
        text = f"{run.label}: zeros of every layer; hatched where a block has no such layer."
        plates.append(
            Plate(f"zeros-{i}", f"Sparsity by layer and block of {run.label}", text, layers.layer_heat(run, "got"))
        )
        if any(layer.get("error") is not None for layer in run.layers.values()):
            text = f"{run.label}: relative output error that pruning caused in every layer, on calibration samples."
            title = f"Relative output error by layer and block of {run.label}"
            plates.append(Plate(f"errors-{i}", title, text, layers.layer_heat(run, "error")))
    return plates


def write_figures(runs: Sequence[Run], folder: str | Path, metric: str | None = None) -> list[Path]:
    """Write every figure that the runs make as SVG and as PNG of 200 dpi; the files are returned."""
    return save_plates(album(runs, metric), folder)


def save_plates(plates: Sequence[Plate], folder: str | Path) -> list[Path]:
    """Write figures as `NAME.svg` and `NAME.png` into a folder, made if need be; the files are returned."""
    try:
        return [path for plate in plates for path in save(plate.figure, folder, plate.name)]
    except OSError as error:
        raise NotWritten(f"{folder}: the figures could not be written ({error.strerror or error})") from error
