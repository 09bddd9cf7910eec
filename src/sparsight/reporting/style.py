"""The look of every figure, for one column of paper in black and white or colour, and its files."""

from __future__ import annotations

import contextlib
import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

WIDTH = 3.3  # inches: one column
INK, SOFT = "#1b1f24", "#4b5563"
COLORS = ("#0f5f8c", "#c2410c", "#0f766e", "#7a5c00", "#6d28d9", "#be185d", "#374151", "#4d7c0f")
TINTS = ("#f3f4f6", "#c5cad1", "#d7e8f2", "#f6d9cc", "#d3ece7", "#ede3c4", "#e4dbf7", "#f6d6e4")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oo", "--")
MARKS = ("o", "s", "^", "D", "v", "X", "P", "*")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), (0, (3, 1, 1, 1)))
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 7.5, "axes.labelsize": 7.5, "axes.titlesize": 7.5, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "lines.linewidth": 1.2, "lines.markersize": 4, "hatch.linewidth": 0.5, "legend.frameon": False,
    "legend.handlelength": 2.4, "legend.borderaxespad": 0.2, "svg.fonttype": "none",
    "svg.hashsalt": "sparsight",  # the same data give the same bytes
}  # fmt: skip


@contextlib.contextmanager
def sheet(height: float, grid: bool = True) -> Iterator[Figure]:
    """Give an empty figure, one column wide and `height` inches high, and the style to draw it in within the block."""
    with mpl.rc_context({**STYLE, "axes.grid": grid}):
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def legend(figure: Figure, handles: Sequence[tuple[str, Any]]) -> None:
    """Put a legend of (label, handle) above the axes, in as many columns as the labels allow; none if all are empty."""
    longest = max((len(label) for label, _ in handles), default=0)
    if longest:
        columns = min(1 if longest > 24 else 2 if longest > 13 else 3, len(handles))
        labels, artists = [wrap(label, 56) for label, _ in handles], [artist for _, artist in handles]
        look: Any = {"ncols": columns, "columnspacing": 1.2, "handletextpad": 0.5}
        figure.legend(artists, labels, loc="outside upper left", **look)


def bar_look(i: int) -> dict[str, Any]:
    """Fill, hatch and edge of the bars of series `i`."""
    return {"facecolor": TINTS[i % 8], "hatch": HATCHES[i % 8], "edgecolor": INK, "linewidth": 0.6}


def wrap(label: str, width: int = 22) -> str:
    """Break a label into lines of at most `width` characters."""
    return textwrap.fill(label, width)


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
    return opening.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1) + ">" + rest
