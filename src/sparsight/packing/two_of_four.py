"""Products with 2:4 weights on a CUDA device, by core PyTorch: how long they take beside dense ones, and which to use.

`torch.sparse.to_sparse_semi_structured` picks one of cuSPARSELt's algorithms by `alg_id`; which one is fastest depends on
the shape and on the number of tokens, so that each is tried. Few tokens are padded there, and dense is then faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

TOKENS = (1, 16, 64, 256, 1024, 4096)
MOST_ALGORITHMS = 64
MULTIPLE = 16  # rows and columns of a 2:4 weight in 16 bits


def is_two_of_four(W: torch.Tensor) -> bool:
    """Whether W (out, in) has at least two zeros in every four inputs, and a shape that cuSPARSELt takes."""
    if W.ndim != 2 or W.shape[0] % MULTIPLE or W.shape[1] % MULTIPLE:
        return False
    return bool(((W.reshape(-1, 4) != 0).sum(1) <= 2).all())


@torch.no_grad()
def time_two_of_four(W: torch.Tensor, repeats: int, tokens: Sequence[int] = TOKENS) -> dict[str, Any] | None:
    """Milliseconds of a product in bfloat16 on the CUDA device by number of tokens; None where there is no such product.

    For each number: `dense`, `2:4`, its `alg_id`, and `use`, the faster one.
    """
    if not torch.cuda.is_available() or not is_two_of_four(W):
        return None
    W = W.detach().to("cuda", torch.bfloat16)
    forms: dict[int, torch.Tensor] = {}
    for alg_id in range(MOST_ALGORITHMS):
        try:
            forms[alg_id] = torch.sparse.to_sparse_semi_structured(W, alg_id=alg_id)
            F.linear(torch.zeros(MULTIPLE, W.shape[1], device="cuda", dtype=W.dtype), forms[alg_id])
        except RuntimeError:  # there is no such algorithm, or no cuSPARSELt
            forms.pop(alg_id, None)
            break
    if not forms:
        return None
    times = {}
    for count in tokens:
        x = torch.randn(count, W.shape[1], device="cuda", dtype=W.dtype)
        dense = _milliseconds(partial(F.linear, x, W), repeats)
        by_algorithm = {alg_id: _milliseconds(partial(F.linear, x, form), repeats) for alg_id, form in forms.items()}
        best = min(by_algorithm, key=lambda alg_id: by_algorithm[alg_id])
        sparse = by_algorithm[best]
        times[str(count)] = {"dense": dense, "2:4": sparse, "alg_id": best, "use": "2:4" if sparse < dense else "dense"}
    return {"device": torch.cuda.get_device_name(), "ms": times}


def _milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """The least time of a call on the device, by its own clock, with its cache emptied before each."""
    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda")
    best = float("inf")
    for i in range(repeats + 1):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i:  # the first call makes things ready
            best = min(best, start.elapsed_time(end))
    return best
