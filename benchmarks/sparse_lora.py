"""What SparseLoRA costs: against plain LoRA, which loses the zeros, and against the published masked layer.

Plain LoRA is what PEFT runs on a bfloat16 model: with float32 factors, its default, and with bfloat16 ones, which are
faster here and what the bar is held to. The published layer (arXiv 2404.02424) is the line of its code,
`F.linear(x, (W + (B @ A).to(W.dtype) * s) * mask)` with a boolean mask, its gradient left to autograd; and the same with
nothing but bfloat16 and the mask in bytes, which multiply faster. Ours trains float32 factors.

Memory is kept by the allocator, since fresh pages would cost the published layer most, which asks for most.
One thread, 2048 x 2048, rank 16, half of the weights zero, bfloat16, minimum over interleaved runs. The gradients are held
to autograd in float64; what is saved between the passes is counted beyond x, W, the factors and the packed mask.

    python benchmarks/sparse_lora.py [--runs 7]
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from sparsight.masks.bits import pack
from sparsight.restoring.peft_layers import sparse_linear

SIZE, RANK, SCALING = 2048, 16, 1.0
Step = Callable[[], torch.Tensor]
LORA, LORA_NARROW = "plain LoRA, f32 factors", "plain LoRA, bf16 factors"
PUBLISHED, PUBLISHED_NARROW, OURS = "published, f32 factors", "published, bf16 and bytes", "ours"
FORWARD, BOTH = "forward", "forward+backward"
BARS = {  # (tokens, what) -> sign, bar
    (4096, f"{BOTH}: ours / {LORA_NARROW}"): ("<=", 1.65),
    (512, f"{FORWARD}: {PUBLISHED} / ours"): (">=", 1.25),
    (512, f"{BOTH}: {PUBLISHED} / ours"): (">=", 1.25),
    (512, "saved bytes per weight: ours"): ("<=", 0.01),
    (512, "cosine of dA"): (">=", 0.9999),
    (512, "cosine of dB"): (">=", 0.9999),
}


def plain(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, W) + F.linear(F.linear(x.to(A.dtype), A), B) * SCALING).to(W.dtype)


def published(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.linear(x, (W + (B @ A).to(W.dtype) * SCALING) * mask)


def leaf(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.detach().to(dtype, copy=True).requires_grad_()


def saved_bytes(step: Step, known: list[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for backward, beyond the storages of `known`."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = step()
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del held
    return sum(kept.values())


def fastest(steps: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Milliseconds of this thread, which does all the work, the least of `runs` interleaved ones."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(runs):
        for name, step in steps.items():
            start = time.thread_time()
            step()
            best[name] = min(best[name], (time.thread_time() - start) * 1e3)
    return best


def keep_memory() -> None:
    """Have glibc hold on to freed memory: no mapping of its own for a large tensor, nothing given back."""
    if sys.platform == "linux":
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)


def measure(tokens: int, runs: int) -> dict[str, float]:
    torch.manual_seed(0)
    W, A, B = torch.randn(SIZE, SIZE) * 0.02, torch.randn(RANK, SIZE) * 0.02, torch.randn(SIZE, RANK) * 0.02
    mask = torch.rand(SIZE, SIZE) < 0.5
    W, packed, as_bytes = (W * mask).bfloat16(), pack(mask), mask.to(torch.uint8)
    x, g = leaf(torch.randn(tokens, SIZE), torch.bfloat16), torch.randn(tokens, SIZE).bfloat16()
    narrow, wide = ([leaf(A, dtype), leaf(B, dtype)] for dtype in (torch.bfloat16, torch.float32))
    layers: dict[str, tuple[list[torch.Tensor], Step]] = {
        LORA: (wide, lambda: plain(x, W, *wide)),
        LORA_NARROW: (narrow, lambda: plain(x, W, *narrow)),
        PUBLISHED: (wide, lambda: published(x, W, *wide, mask)),
        PUBLISHED_NARROW: (narrow, lambda: published(x, W, *narrow, as_bytes)),
        OURS: (wide, lambda: sparse_linear(x, W, None, tuple(wide), SCALING, packed)),
    }
    backward = {
        name: lambda factors=factors, step=step: torch.autograd.grad(step(), [x, *factors], g)
        for name, (factors, step) in layers.items()
    }
    found = {}
    for kind, steps in ((FORWARD, {name: step for name, (_, step) in layers.items()}), (BOTH, backward)):
        best = fastest(steps, runs)
        print(f"T {tokens}  {kind}: " + "; ".join(f"{name} {ms:.1f} ms" for name, ms in best.items()))
        found |= {f"{kind}: ours / {name}": best[OURS] / best[name] for name in (LORA, LORA_NARROW)}
        found |= {f"{kind}: {name} / ours": best[name] / best[OURS] for name in (PUBLISHED, PUBLISHED_NARROW)}
    for name, (factors, step) in layers.items():
        found[f"saved bytes per weight: {name}"] = saved_bytes(step, [x, W, packed, *factors]) / W.numel()

    exact = [leaf(t, torch.float64) for t in (x, *wide)]
    E = (W.double() + SCALING * (exact[2] @ exact[1])) * mask
    theirs = torch.autograd.grad(F.linear(exact[0], E), exact, g.double())
    for name, one, other in zip("xAB", backward[OURS](), theirs, strict=True):
        found[f"cosine of d{name}"] = float(F.cosine_similarity(one.double().flatten(), other.flatten(), dim=0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    keep_memory()
    rows = []
    for tokens in (512, 4096):
        for what, value in measure(tokens, runs).items():
            sign, bar = BARS.get((tokens, what), ("", ""))
            rows.append((tokens, what, f"{value:.6f}" if "cosine" in what else f"{value:.2f}", sign, bar))
            print(f"T {tokens}  {what}: {rows[-1][2]}" + (f" (bar {sign} {bar})" if sign else ""))
    with (Path(__file__).parent / "sparse_lora.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "torch", "threads", "tokens", "what", "value", "sign", "bar"])
        for row in rows:
            writer.writerow([datetime.date.today(), torch.__version__, torch.get_num_threads(), *row])


if __name__ == "__main__":
    main()
