"""The workers of a sweep: each reads units of cells from its standard input, and prints a line per finished unit.

A worker ends when its input does, so that none outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight.checks import plain_value
from sparsight.errors import SparsightError
from sparsight.options import values
from sparsight.specs import PruneSpec
from sparsight.sweeps.grid import Cell, Notify

WORK = "work"  # moments and the teacher's cache, in the sweep's folder


def dispatch(units: Sequence[list[Cell]], settings: Mapping[str, Any], folder: Path, jobs: int, notify: Notify) -> None:
    """Run units on `jobs` workers. **Raises** `SparsightError` at the first error of a unit, and ends all workers."""
    waiting: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    answers: queue.SimpleQueue[tuple[list[Cell], str | None]] = queue.SimpleQueue()
    workers = []
    try:
        for place in range(min(jobs, len(units))):
            task = json.dumps({"settings": dict(settings), "folder": str(folder), "place": place, "jobs": jobs})
            command = [sys.executable, "-m", "sparsight.sweeps.worker", task]
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )  # Ctrl-C is for the parent process only
            workers.append(worker)
            threading.Thread(target=_serve, args=(worker, waiting, answers), daemon=True).start()
        for _ in units:
            unit, error = answers.get()
            if error is not None:
                raise SparsightError(error)
            notify(unit[-1].label, len(unit))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _serve(worker: Any, waiting: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Send one worker unit after unit."""
    while True:
        try:
            unit = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            cells = [{"prune": cell.prune and values(cell.prune), "restore": cell.restore} for cell in unit]
            worker.stdin.write(json.dumps(cells, default=plain_value) + "\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline() or "null")
        except (OSError, ValueError):
            answer = None
        if answer is None:
            code = worker.wait()
            answer = f"a process of the sweep ended (exit code {code}) at {unit[0].label}; start the sweep again to go on"
        answers.put((unit, answer or None))


def main() -> None:
    """Run units from standard input until it ends; print an error, or an empty string, for each."""
    task = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may be sent to the whole group; the parent process ends this one
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)  # the parent process is gone

    threading.Thread(target=listen, daemon=True).start()
    import torch

    from sparsight.sweeps.workbench import Workbench, measure

    settings, folder, place = task["settings"], Path(task["folder"]), task["place"]
    torch.set_num_threads(max(1, torch.get_num_threads() // task["jobs"]))
    if (settings.get("device") or "cpu") == "cuda":
        settings["device"] = f"cuda:{place % torch.cuda.device_count()}"
    answers, sys.stdout = sys.stdout, sys.stderr
    bench = None
    while True:
        unit = [
            Cell(None if cell["prune"] is None else
                 PruneSpec(**{**cell["prune"], "device": settings.get("device") or "cpu"}), cell["restore"])
            for cell in json.loads(lines.get())
        ]  # fmt: skip
        answer = ""
        try:
            bench = bench or Workbench(settings, folder / WORK / str(place))
            measure(bench, unit, folder / "cells")
        except SparsightError as error:
            answer = str(error)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
