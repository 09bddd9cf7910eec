"""How every figure looks and is written: for one column of paper, in black and white or colour."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

WIDTH = 3.3  # inches: one column
DPI = 200
INK, SOFT, GRID = "#1b1f24", "#4b5563", "#e5e7eb"
COLORS = ("#0f5f8c", "#c2410c", "#0f766e", "#7a5c00", "#6d28d9", "#be185d", "#374151", "#4d7c0f")
TINTS = ("#f3f4f6", "#c5cad1", "#d7e8f2", "#f6d9cc", "#d3ece7", "#ede3c4", "#e4dbf7", "#f6d6e4")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oo", "--")
MARKS = ("o", "s", "^", "D", "v", "X", "P", "*")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), (0, (3, 1, 1, 1)))
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "axes.titlesize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsight",  # the same facts give the same bytes
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "legend.borderaxespad": 0.2,
}


def sheet(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches; to be drawn within `mpl.rc_context(STYLE)`."""
    return Figure(figsize=(width, height), layout="constrained")


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], place: Any = "outside upper left") -> None:
    """A legend beside the axes, in as many columns as the labels allow."""
    if any(labels):
        longest = max(len(label) for label in labels)
        columns = 1 if longest > 24 else 2 if longest > 13 else 3
        lines = [textwrap.fill(label, 56) for label in labels]
        figure.legend(handles, lines, loc=place, ncols=min(columns, len(labels)), columnspacing=1.2, handletextpad=0.5)


def wrapped(label: str, width: int = 22) -> str:
    return textwrap.fill(label, width, break_long_words=True)


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element that scales with its page; its text is text, its ids start with `name`."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", text)
    opening, rest = text.split(">", 1)
    opening = re.sub(r'\s(width|height|version)="[^"]*"', "", opening)
    return opening.replace("<svg", f'<svg role="img" aria-label="{_escaped(label)}"', 1) + ">" + rest


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def save(figure: Figure, folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write `name.svg`, its text as text, and `name.png` at 200 dpi into `folder`."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    vector, pixels = target / f"{name}.svg", target / f"{name}.png"
    with mpl.rc_context(STYLE):
        figure.savefig(vector, metadata={"Date": None})
        figure.savefig(pixels, dpi=DPI)
    return vector, pixels
