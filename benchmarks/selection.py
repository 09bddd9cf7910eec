"""How much faster masks are chosen than by a sort per row, or by a loop over groups.

Row-wise 50 % against a stable sort (as published Wanda does), 2:4 against `topk` on one group of four columns after the
other (as published Wanda and SparseGPT do). One thread, 2048 x 2048, minimum over interleaved runs; the masks are equal.

    python benchmarks/selection.py [--runs 9]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from pathlib import Path

import torch

from sparsight.masks.pattern import keep_largest, keep_of_group

SIZE = 2048


def by_sort(score: torch.Tensor) -> torch.Tensor:
    lowest = score.sort(dim=1, stable=True).indices[:, : SIZE // 2]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, lowest, False)


def by_group(score: torch.Tensor) -> torch.Tensor:
    keep = torch.ones_like(score, dtype=torch.bool)
    for i in range(0, SIZE, 4):
        keep.scatter_(1, i + torch.topk(score[:, i : i + 4], 2, dim=1, largest=False)[1], False)
    return keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    score = torch.rand(SIZE * SIZE, dtype=torch.float64).argsort().view(SIZE, SIZE).float()  # no ties
    cases = {
        "row 50 %": (3.3, by_sort, lambda score: keep_largest(score, SIZE // 2)),
        "2:4": (15.0, by_group, lambda score: keep_of_group(score.view(SIZE, SIZE // 4, 4), 2).view_as(score)),
    }
    rows = []
    for name, (bar, *pair) in cases.items():
        assert torch.equal(pair[0](score), pair[1](score))
        best = [float("inf")] * 2
        for _ in range(runs):
            for i, choose in enumerate(pair):
                start = time.perf_counter()
                choose(score)
                best[i] = min(best[i], time.perf_counter() - start)
        rows.append((name, f"{best[0] * 1e3:.2f}", f"{best[1] * 1e3:.2f}", f"{best[0] / best[1]:.1f}"))
        print(f"{name:<10}published {rows[-1][1]} ms, ours {rows[-1][2]} ms: {rows[-1][3]}x (bar {bar:g}x)")
    with (Path(__file__).parent / "selection.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "torch", "threads", "what", "published ms", "ours ms", "ratio"])
        for row in rows:
            writer.writerow([datetime.date.today(), torch.__version__, torch.get_num_threads(), *row])


if __name__ == "__main__":
    main()
