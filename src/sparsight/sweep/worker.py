"""Several processes of a sweep: each is given units of cells by a line on its standard input, and answers by a line.

A worker ends when its input does, so that none outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError
from sparsight.sweep.grid import Cell

WORK = "work"  # moments and the teacher's cache, in the sweep's folder
Tell = Callable[..., None]  # (note, how many cells that finished)


def share(units: Sequence[list[Cell]], asked: Mapping[str, Any], folder: Path, jobs: int, tell: Tell) -> None:
    """Deal units out to `jobs` workers as they come free; the first error of any ends all."""
    waiting: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for unit in units:
        waiting.put(unit)
    answers: queue.SimpleQueue[tuple[list[Cell], str | None]] = queue.SimpleQueue()
    workers = []
    try:
        for place in range(min(jobs, len(units))):
            told = json.dumps({"asked": dict(asked), "folder": str(folder), "place": place, "jobs": jobs})
            command = [sys.executable, "-m", "sparsight.sweep.worker", told]
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )  # Ctrl-C is for the process that gives out the work
            workers.append(worker)
            threading.Thread(target=_serve, args=(worker, waiting, answers), daemon=True).start()
        for _ in units:
            unit, error = answers.get()
            if error is not None:
                raise SparsightError(error)
            tell(unit[-1].label, len(unit))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _serve(worker: Any, waiting: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Hand one worker unit after unit."""
    while True:
        try:
            unit = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            cells = [{"prune": dict(cell.prune), "restore": cell.restore, "seed": cell.seed} for cell in unit]
            worker.stdin.write(json.dumps(cells) + "\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline() or "null")
        except (OSError, ValueError):
            answer = None
        if answer is None:
            code = worker.wait()
            answer = f"a process of the sweep ended (exit code {code}) at {unit[0].label}; start the sweep again to go on"
        answers.put((unit, answer or None))


def main() -> None:
    told = json.loads(sys.argv[1])
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)  # whoever gave the work is gone

    threading.Thread(target=listen, daemon=True).start()
    import torch

    from sparsight.sweep.workbench import Workbench, measure

    asked, folder, place = told["asked"], Path(told["folder"]), told["place"]
    torch.set_num_threads(max(1, torch.get_num_threads() // told["jobs"]))
    if (asked.get("device") or "cpu") == "cuda":
        asked["device"] = f"cuda:{place % torch.cuda.device_count()}"
    answers, sys.stdout = sys.stdout, sys.stderr
    bench = None
    while True:
        unit = [Cell(**cell) for cell in json.loads(lines.get())]
        answer = ""
        try:
            bench = bench or Workbench(asked, folder / WORK / str(place))
            measure(bench, unit, folder / "cells")
        except SparsightError as error:
            answer = str(error)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
