"""How long products with a layer's weight take, dense and packed: in one run, in turn, with weights that no cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsight import kernels
from sparsight.packing.linear import SparseLinear
from sparsight.packing.tensor import Packed

COLD = 1 << 28  # bytes of copies that are used in turn, so that none is in a cache when its turn comes
MOST_COPIES = 16
OURS, TORCH, DENSE_INT8 = "packed", "F.linear bfloat16", "dense int8, ours"


@torch.no_grad()
def time_layer(linear: nn.Linear, tokens: Sequence[int], repeats: int) -> dict[str, Any]:
    """Milliseconds of a call by form of the weight and number of tokens, and bytes of the forms; x and W in bfloat16.

    **Forms**: `F.linear` in three dtypes, our dense products, packed, packed int8. A form that has no kernel here is
    missing.
    """
    W = linear.weight.detach().to(torch.bfloat16)
    copies = max(2, min(MOST_COPIES, COLD // max(1, W.nbytes)))
    forms = _forms(W, copies)
    times = {count: _in_turn(forms, count, W.shape[1], repeats) for count in tokens}
    packed, rounded = Packed.of(W), Packed.int8(W)
    sizes = {"dense": W.nbytes, "packed": packed.nbytes, "packed int8": rounded.nbytes}
    return {"rows": len(W), "columns": W.shape[1], "copies": copies, "bytes": sizes, "ms": times}


@torch.no_grad()
def read_speed(repeats: int) -> float | None:
    """Bytes per second at which this machine reads memory with the threads of torch; None without compiled kernels."""
    data = torch.zeros(COLD // 8, dtype=torch.int64)
    if not kernels.read(data):
        return None
    return data.nbytes / min(seconds_of(lambda: kernels.read(data)) for _ in range(repeats))


def _forms(W: torch.Tensor, copies: int) -> dict[str, list[Callable[[torch.Tensor], Any]]]:
    """For every form a function per copy of the weight."""
    made: dict[str, list[Callable[[torch.Tensor], Any]]] = {}

    def add(name: str, function: Callable[[Any, torch.Tensor], Any], copy: Callable[[], Any]) -> None:
        made[name] = [partial(function, copy()) for _ in range(copies)]

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        add(f"F.linear {name}", lambda V, x: F.linear(x.to(V.dtype), V), partial(W.to, dtype, copy=True))
    if kernels.product(W[:1], W, None, None) is not None:
        codes = Packed.int8(W.masked_fill(W == 0, 1))  # without a zero, so that every code is kept
        add("dense, ours", lambda V, x: kernels.product(x, V, None, None), W.clone)
        add(
            DENSE_INT8, lambda V, x: kernels.product(x, V, None, None, None, codes.scale),
            lambda: codes.values.view(W.shape).clone(),
        )  # fmt: skip
    linear = nn.Linear(W.shape[1], len(W), bias=False, device="meta")
    linear.weight = nn.Parameter(W, requires_grad=False)
    add(OURS, lambda layer, x: layer(x), lambda: SparseLinear.of(linear))
    add("packed int8", lambda layer, x: layer(x), lambda: SparseLinear.of(linear, int8=True))
    return made


def _in_turn(forms: Mapping[str, list[Callable]], tokens: int, columns: int, repeats: int) -> dict[str, float]:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(repeats + 1):
        for name, functions in forms.items():
            seconds = seconds_of(partial(functions[i % len(functions)], x))
            if i:  # the first call makes things ready
                taken[name].append(seconds)
    return {name: 1e3 * sorted(values)[len(values) // 10] for name, values in taken.items()}


def seconds_of(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
