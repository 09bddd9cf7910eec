"""What the distillation loss costs: from hidden states in chunks, against whole logits and autograd.

V 32,000, 2,048 answer tokens, width 1,024: the hidden states of student and teacher go in, the loss and the gradient by the
student's come out. The naive way makes both logits in one piece, float32 softmaxes and their gradient. Time: one thread,
interleaved in one process, minimum over runs. Memory: the high-water mark of a process of its own above what it held before.

    python benchmarks/distillation.py [--runs 5]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsight.restoring.losses import distillation

VOCABULARY, TOKENS, WIDTH, KL, T = 32_000, 2_048, 1_024, 0.1, 2.0


class Tail:
    """An output head by itself, as `restoring/head.py` wraps a model's."""

    bias, cap = None, None

    def __init__(self, dtype: torch.dtype) -> None:
        self.weight = (torch.randn(VOCABULARY, WIDTH) * 0.02).to(dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight).float()


def ours(student: torch.Tensor, taught: torch.Tensor, targets: torch.Tensor, head: Tail, divergence: str) -> torch.Tensor:
    return distillation(student, taught, targets, head, kl=KL, temperature=T, divergence=divergence).total  # type: ignore[arg-type]


def naive(student: torch.Tensor, taught: torch.Tensor, targets: torch.Tensor, head: Tail, divergence: str) -> torch.Tensor:
    s = head.logits(student)
    with torch.no_grad():
        t = head.logits(taught)
    q, p = F.log_softmax(s / T, dim=-1), F.log_softmax(t / T, dim=-1)
    if divergence == "reverse":
        p, q = q, p
    apart = F.kl_div(q, p, reduction="sum", log_target=True)
    if divergence == "js":
        m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        apart = (F.kl_div(m, p, reduction="sum", log_target=True) + F.kl_div(m, q, reduction="sum", log_target=True)) / 2
    return (1 - KL) * F.cross_entropy(s, targets, reduction="sum") + KL * T**2 * apart


WAYS = {"ours": ours, "naive": naive}


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Tail]:
    torch.manual_seed(0)
    hidden, taught = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(TOKENS, WIDTH).to(dtype)
    return hidden, taught, torch.randint(0, VOCABULARY, (TOKENS,)), Tail(dtype)


def run(way: str, given: tuple, divergence: str) -> torch.Tensor:
    student = given[0].clone().requires_grad_(True)
    WAYS[way](student, *given[1:], divergence).backward()
    return student.grad


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def alone(way: str, dtype: str, divergence: str) -> None:
    """In a process of its own: bytes above what was held before."""
    given = problem(getattr(torch, dtype))
    run(way, tuple(x[:8] if isinstance(x, torch.Tensor) else x for x in given), divergence)  # libraries and their buffers
    before = resident("VmRSS")
    run(way, given, divergence)
    print(resident("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.alone:
        return alone(*asked.alone)
    rows = []
    for dtype in ("float32", "bfloat16"):
        given = problem(getattr(torch, dtype))
        for divergence in ("forward", "reverse", "js") if dtype == "float32" else ("forward",):
            grads = {way: run(way, given, divergence).double() for way in WAYS}
            cosine = float(F.cosine_similarity(grads["ours"].flatten(), grads["naive"].flatten(), dim=0))
            best = dict.fromkeys(WAYS, float("inf"))
            for _ in range(asked.runs):
                for way in WAYS:
                    began = time.perf_counter()
                    run(way, given, divergence)
                    best[way] = min(best[way], time.perf_counter() - began)
            peaks = {}
            for way in WAYS:
                command = [sys.executable, __file__, "--alone", way, dtype, divergence]
                peaks[way] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            cells = [dtype, divergence, f"{peaks['naive'] / 1e6:.0f}", f"{peaks['ours'] / 1e6:.0f}"]
            cells += [f"{peaks['naive'] / peaks['ours']:.1f}", f"{best['naive']:.2f}", f"{best['ours']:.2f}"]
            rows.append(
                [datetime.date.today(), torch.__version__, *cells, f"{best['ours'] / best['naive']:.2f}", f"{cosine:.6f}"]
            )
            print("  ".join(f"{cell!s:>9}" for cell in rows[-1][2:]), flush=True)
            print(f"naive peak / ours {cells[4]} (bar: 10), time ours / naive {rows[-1][-2]} (bar: 1.1)", flush=True)
    columns = (
        "date",
        "torch",
        "dtype",
        "divergence",
        "naive MB",
        "ours MB",
        "peak ratio",
        "naive s",
        "ours s",
        "time ratio",
        "cosine",
    )
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return None


if __name__ == "__main__":
    main()
