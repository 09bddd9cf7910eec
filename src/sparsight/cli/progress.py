"""Show the progress of long work: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sparsight.cli.output import launched_rank
from sparsight.progress import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_display(title: str, quiet: bool = False) -> Iterator[Progress | None]:
    """Yield a function `progress(note, done, total)` that writes to standard error; None if `quiet`.

    Of several processes only the main one gets a function.
    """
    if quiet or launched_rank():
        yield None
    elif sys.stderr.isatty():
        with _bar(title) as progress:
            yield progress
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[title]:<10}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}", style="dim", markup=False),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, title=title)

        def progress(note: str, done: int, total: int) -> None:
            bar.update(task, description=note, completed=done, total=total)

        yield progress


def _lines(title: str) -> Progress:
    began = time.monotonic()
    last = began - SECONDS_BETWEEN_LINES

    def progress(note: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        print(f"{title}: {done}/{total} after {now - began:.0f} s  {note}", file=sys.stderr, flush=True)

    return progress
