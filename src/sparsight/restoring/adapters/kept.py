"""All kept weights are trained: E = scatter(values, M), one value per kept weight."""

from __future__ import annotations

import torch

from sparsight import kernels
from sparsight.masks.bits import unpack
from sparsight.restoring.adapters.adapter import Factors


def start(W: torch.Tensor, packed: torch.Tensor | None, rank: int) -> Factors:
    """The kept weights themselves, float32."""
    return ((W if packed is None else W[unpack(packed, W.shape)]).detach().float().reshape(-1).clone(),)


def shapes(out: int, columns: int, rank: int, density: float) -> tuple[tuple[int, ...], ...]:
    """The shape of the values; a layer keeps the fraction `density` of its weights."""
    return ((round(density * out * columns),),)


def scatter(W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    """E: the values in the places that the mask keeps, zero elsewhere."""
    (values,) = factors
    if packed is None:
        return values.view(W.shape).to(W.dtype)
    if (E := kernels.expand(values, packed, tuple(W.shape), W.dtype)) is not None:
        return E
    E = torch.zeros(W.shape, dtype=W.dtype, device=W.device)
    return E.masked_scatter_(unpack(packed, W.shape), values.to(W.dtype))


def gather(dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> Factors:
    """The gradient of the values: dE in the places that the mask keeps."""
    (values,) = factors
    if packed is None:
        return (dE.reshape(-1).to(values.dtype),)
    if (gradient := kernels.compress(dE, packed)) is None:
        gradient = dE[unpack(packed, dE.shape)]
    return (torch.nn.functional.pad(gradient.to(values.dtype), (0, len(values) - len(gradient))),)
