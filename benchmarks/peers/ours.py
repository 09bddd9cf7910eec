"""One run of race.py: prune the folder's model with Sparsight, from file to file, print seconds and peak bytes.

The seconds hold what `sparsight prune` does with a block: reading it, pruning, writing it, and syncing it to the disk.
`files` are those of reading, writing and syncing alone.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsight.allocation.plan import make_plan
from sparsight.checkpoint.parts import PartFiles
from sparsight.model.stream import Stream
from sparsight.pruning.compose import compose
from sparsight.pruning.loop import prune
from sparsight.pruning.methods import METHODS
from sparsight.pruning.streamed import StreamJournal


class Clock:
    """The seconds that are spent in some methods, one inside another counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def watch(self, owner: Any, *names: str) -> None:
        """Time these methods of an object, in place."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            began, self.depth = time.perf_counter(), self.depth + 1
            try:
                return method(*given, **named)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - began

        return call


folder, method, out, propagate = sys.argv[1:]
clock = Clock()
stream = Stream(f"{folder}/model")
files = PartFiles(stream)
stream.bring_outside()
tensors = load_file(f"{folder}/batches.safetensors")
batches = []
for i in range(len(tensors) // 2):
    inputs = {key: tensors[f"{i}.{key}"] for key in ("input_ids", "pixel_values")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    batches.append(SimpleNamespace(inputs=inputs, padding={}))
plan = make_plan(stream.anatomy, sparsity=0.5, pattern="tensor" if method == "sparsegpt" else "row")
work = Path(out).with_suffix("")
shutil.rmtree(work, ignore_errors=True)
work.mkdir()
files.folder = work / "weights"
began = time.perf_counter()
clock.watch(stream, "bring")
with stream.run() as model:
    journal = StreamJournal(files, work / "done")
    clock.watch(journal, "recall", "store", "close", "finish")
    composition = compose(METHODS[method], propagate=propagate)
    prune(model, stream.anatomy, plan, batches, method=composition, journal=journal)
    journal.finish()
seconds = time.perf_counter() - began
# the high-water mark of this program; getrusage would count that of the process it was started from
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
save_file({name: stream.anatomy[name].weight.contiguous().clone() for name in plan}, out)
print(json.dumps({"seconds": seconds, "peak": peak, "files": clock.seconds}))
