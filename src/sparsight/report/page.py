"""One self-contained HTML page: no network, no script, works on a phone and on paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparsight.errors import SparsightError

TEMPLATE = "page.html"


def write_page(facts: Mapping[str, Any], path: Path) -> Path:
    """Write the report of a run of the demo; `facts` is what `sparsight.demo.road.road` gathers.

    **Raises** `SparsightError` if the `report` extra is not installed.
    """
    try:
        from sparsight.report import figures
    except ImportError as error:
        raise SparsightError("the report needs matplotlib: pip install 'sparsight[report]'") from error

    environment = Environment(
        loader=PackageLoader("sparsight", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda value, digits=1: f"{100 * value:.{digits}f}"
    environment.filters["megabytes"] = lambda value: f"{value / 1e6:.1f}"
    components = {layer["block"]: layer["component"] for layer in facts["layers"]}
    labels = {name: run["label"] for name, run in facts["runs"].items()}
    drawn = {
        "scores": figures.scores(facts["runs"]),
        "layers": figures.layer_sparsity(facts["layers"], labels),
        "errors": figures.block_errors(facts["errors"]["block_errors"], components),
        "losses": figures.loss_curves(facts["curves"], labels),
    }
    page = environment.get_template(TEMPLATE).render(**facts, figures=drawn, regained=regained(facts["runs"]))
    path.write_text(page, encoding="utf-8")
    return path


def regained(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Of the points that pruning cost, the share that SparseLoRA brought back; None where pruning cost nothing."""
    shares = {}
    for key in ("questions", "captions"):
        dense, pruned, restored = (runs[name][key]["value"] for name in ("dense", "pruned", "sparselora"))
        shares[key] = (restored - pruned) / (dense - pruned) if dense > pruned else None
    return shares
