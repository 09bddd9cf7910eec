"""How much faster the fused sweep of SparseGPT is than a loop over columns in torch, with the same factor.

The loop is the published one (IST-DASLab/sparsegpt, `fasterprune`) line by line, except that it selects by rank from the
sort it does anyway, so that the masks can be compared. One thread, 2048 x 2048, correlated inputs, minimum over
interleaved runs. The masks must be the same; where two scores of a choice are equal up to rounding the last bits decide,
so one row in a thousand may differ from there on, and is counted.

    python benchmarks/sparsegpt.py [--runs 9]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from sparsight import Pattern
from sparsight.calibration.inverse_factor import inverse_factor
from sparsight.pruning.methods.sparsegpt import sparsegpt

SIZE, BLOCK = 2048, 128
BARS = {"tensor 0.5": 4.0, "2:4": 6.0}


def published(W: torch.Tensor, U: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The column loop: W (out, in), U (in, in)."""
    W, losses = W.clone(), torch.zeros(SIZE)
    for i1 in range(0, SIZE, BLOCK):
        i2 = i1 + BLOCK
        W1, U1 = W[:, i1:i2].clone(), U[i1:i2, i1:i2]
        Q1, error, mask = torch.zeros_like(W1), torch.zeros_like(W1), torch.zeros_like(W1, dtype=torch.bool)
        losses1 = torch.zeros_like(W1)
        if pattern.kind == "tensor":
            score = W1**2 / U1.diagonal().reshape(1, -1) ** 2
            mask.view(-1)[score.flatten().sort().indices[: int(score.numel() * pattern.sparsity)]] = True
        for i in range(BLOCK):
            w, d = W1[:, i], U1[i, i]
            if pattern.kind == "n:m" and i % pattern.m == 0:
                score = W1[:, i : i + pattern.m] ** 2 / U1.diagonal()[i : i + pattern.m].reshape(1, -1) ** 2
                mask.scatter_(1, i + torch.topk(score, pattern.m - pattern.n, dim=1, largest=False)[1], True)
            q = w.clone()
            q[mask[:, i]] = 0
            Q1[:, i] = q
            losses1[:, i] = (w - q) ** 2 / d**2
            e = (w - q) / d
            W1[:, i:] -= e.unsqueeze(1).matmul(U1[i, i:].unsqueeze(0))
            error[:, i] = e
        W[:, i1:i2] = Q1
        losses += losses1.sum(1) / 2
        W[:, i2:] -= error.matmul(U[i1:i2, i2:])
    return W


def case(seed: int) -> tuple[torch.Tensor, SimpleNamespace]:
    """Weights, and moments of inputs whose columns share 64 directions."""
    torch.manual_seed(seed)
    mix = torch.randn(SIZE, SIZE) / SIZE**0.5 + torch.randn(SIZE, 64) @ torch.randn(64, SIZE) / 16
    X = torch.randn(2 * SIZE, SIZE) @ mix
    gram = X.T @ X
    U, _ = inverse_factor(gram)
    return torch.randn(SIZE, SIZE) * 0.02, SimpleNamespace(gram=gram, inverse_factor=lambda: U)


def compare(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[int, float]:
    """Rows whose masks differ, and the largest difference of the others in units of the largest weight."""
    same = ((ours == 0) == (theirs == 0)).all(1)
    assert int((ours == 0).sum()) == int((theirs == 0).sum())
    rows = int((~same).sum())
    assert rows <= SIZE // 1000, f"the masks of {rows} rows differ"
    return rows, float((ours - theirs)[same].abs().max() / theirs.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    W, moments = case(seed=0)
    rows = []
    for pattern in (Pattern.tensor(0.5), Pattern.nm(2, 4)):
        variants = {
            "column loop": lambda pattern=pattern: published(W, moments.inverse_factor(), pattern),
            "ours": lambda pattern=pattern: sparsegpt(W, moments, pattern, None),
        }
        best, results = dict.fromkeys(variants, float("inf")), {}
        for _ in range(runs):
            for name, run in variants.items():
                start = time.perf_counter()
                results[name] = run()
                best[name] = min(best[name], time.perf_counter() - start)
        differing, gap = compare(results["ours"], results["column loop"])
        ratio = best["column loop"] / best["ours"]
        rows.append((str(pattern), *(f"{seconds * 1e3:.1f}" for seconds in best.values()), f"{ratio:.2f}", differing))
        line = f"column loop {rows[-1][1]} ms, ours {rows[-1][2]} ms: {ratio:.2f}x (bar {BARS[str(pattern)]:g}x)"
        print(f"{pattern!s:<12}{line}; {differing} rows with another mask, weights of the others within {gap:.1e}")
    with (Path(__file__).parent / "sparsegpt.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "torch", "threads", "pattern", "loop ms", "ours ms", "ratio", "rows differing"])
        for row in rows:
            writer.writerow([datetime.date.today(), torch.__version__, torch.get_num_threads(), *row])


if __name__ == "__main__":
    main()
