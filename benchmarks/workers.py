"""How long a step of `restore` waits for its data, with 0, 1 and 2 workers, and how soon 100,000 samples are read.

The demo LLaVA, 70 % of zeros, pictures of 640 x 480 (JPEG, quality 90), batches of 8, one thread per process. A step is the
time from one call for its batch to the next; it waits as long as that call takes. The first two steps, in which workers
start, are left out. Bar: at most 5 % with 2 workers where there are cores for them. The weights must be equal, bit for bit.

The 100,000 samples are questions about `--pictures` such pictures; seconds are those of the clock and of the CPU.

    python benchmarks/workers.py
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sparsight
from sparsight.data import read
from sparsight.restoring.trainer import RestoreTrainer

STEPS, BATCH = 20, 8


def write(folder: Path, pictures: int, samples: int) -> Path:
    """Questions about pictures of smooth noise, as large in bytes as photos are."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(pictures):
        small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        grain = rng.integers(-12, 13, (480, 640, 1))
        pixels = np.clip(np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC)) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=75)
    with (folder / "metadata.jsonl").open("w") as file:
        for i in range(samples):
            line = {"id": str(i), "image": f"{i % pictures}.jpg", "prompt": "what is in the picture?", "answer": "noise"}
            file.write(json.dumps(line) + "\n")
    return folder


def waits(sparse: Path, data: Path, out: Path, workers: int) -> dict[str, float | int | str]:
    """Restore, and give the share of the steps' time that is spent waiting for data."""
    calls: list[tuple[float, float]] = []
    inner = RestoreTrainer.get_batch_samples

    def timed(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        batches = inner(self, *args, **kwargs)
        calls.append((began, time.perf_counter()))
        return batches

    RestoreTrainer.get_batch_samples = timed  # type: ignore[method-assign]
    try:
        sparsight.restore(sparse, out, data=data, steps=STEPS, batch_size=BATCH, workers=workers, overwrite=True)
    finally:
        RestoreTrainer.get_batch_samples = inner  # type: ignore[method-assign]
    calls = calls[2:STEPS]
    whole = calls[-1][0] - calls[0][0]
    waited = sum(end - began for began, end in calls[:-1])
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()[:12]
    return {"workers": workers, "step_ms": 1000 * whole / (len(calls) - 1), "waits": waited / whole, "weights": digest}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores")
    parser.add_argument("--pictures", type=int, default=2000)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sparsight.prune("demo:llava", folder / "sparse", sparsity=0.7, method="magnitude")
        data = write(folder / "data", STEPS * BATCH, STEPS * BATCH)
        for workers in (0, 1, 2):
            rows.append(waits(folder / "sparse", data, folder / "out", workers))
            print(rows[-1], flush=True)
        many = write(folder / "many", settings.pictures, 100_000)
        began, used = time.perf_counter(), time.process_time()
        samples = read(many)
        seconds, used = time.perf_counter() - began, time.process_time() - used
        print(f"{len(samples):,} samples, {settings.pictures:,} pictures: {seconds:.1f} s, {used:.1f} s of CPU")
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["date", "machine", *rows[0]], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shown = {**row, "step_ms": f"{row['step_ms']:.1f}", "waits": f"{row['waits']:.3f}"}
            writer.writerow({"date": datetime.date.today().isoformat(), "machine": settings.machine, **shown})
    if len({row["weights"] for row in rows}) > 1:
        raise SystemExit("the weights differ")


if __name__ == "__main__":
    main()
