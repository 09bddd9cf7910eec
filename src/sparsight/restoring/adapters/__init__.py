"""Adapters: what is trained, and how it changes a frozen weight W (out, in) under its mask M. One file per kind, one line
here.

    sparselora   E = (W + s B A) * M          A (r, in), B (out, r)      He et al., arXiv 2404.02424
    hira         E = (W * (1 + s B A)) * M    A (r, in), B (out, r)      Huang et al., ICLR 2025
    masked-full  E = scatter(values, M)       one value per kept weight
    frozen       E = W * M                    nothing is trained
    lora         W + s B A                    PEFT's own, without a mask

Forward, backward and merge all call `effective`, so what was trained is what is saved. `project` takes dL/dE (out, in) to
the gradients of the factors, which see the kept weights only. Both run as one compiled kernel where there is one, and as
plain torch elsewhere: equal up to rounding.
"""

import torch

from sparsight.restoring.adapters import hira, kept, low_rank
from sparsight.restoring.adapters.adapter import Adapter, Factors

ADAPTERS: dict[str, Adapter] = {
    "sparselora": Adapter(("A", "B"), low_rank.start, low_rank.add, low_rank.project, shapes=low_rank.shapes),
    "hira": Adapter(("A", "B"), low_rank.start, hira.multiply, hira.project, shapes=low_rank.shapes),
    "masked-full": Adapter(("values",), kept.start, kept.scatter, kept.gather, shapes=kept.shapes, rate=0.15),
    "sparselora-fast": Adapter(
        ("A", "B"), low_rank.start, low_rank.add, low_rank.project, low_rank.two_products, shapes=low_rank.shapes
    ),
    "lora": Adapter(("A", "B"), stock=True, rate=0.5),
    "frozen": Adapter(),
}


def trainable() -> tuple[str, ...]:
    """The names of the adapters that train anything."""
    return tuple(name for name, adapter in ADAPTERS.items() if adapter.names)


def effective(
    adapter: str, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None
) -> torch.Tensor:  # fmt: skip
    """E (out, in) of an adapter; one opaque operator inside a compiled model, so that the bits are the same."""
    if torch.compiler.is_compiling():
        return torch.ops.sparsight.effective(W, list(factors), scaling, packed, adapter)
    return ADAPTERS[adapter].effective(W, factors, scaling, packed)


def project(
    adapter: str, dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None
) -> Factors:
    """The gradients of an adapter's factors from dE (out, in)."""
    if torch.compiler.is_compiling():
        return tuple(torch.ops.sparsight.project(dE, W, list(factors), scaling, packed, adapter))
    return ADAPTERS[adapter].project(dE, W, factors, scaling, packed)


@torch.library.custom_op("sparsight::effective", mutates_args=())
def _effective(
    W: torch.Tensor, factors: list[torch.Tensor], scaling: float, packed: torch.Tensor | None, adapter: str
) -> torch.Tensor:
    return ADAPTERS[adapter].effective(W, tuple(factors), scaling, packed)


@torch.library.custom_op("sparsight::project", mutates_args=())
def _project(
    dE: torch.Tensor, W: torch.Tensor, factors: list[torch.Tensor], scaling: float, packed: torch.Tensor | None, adapter: str
) -> list[torch.Tensor]:
    return [grad.clone() for grad in ADAPTERS[adapter].project(dE, W, tuple(factors), scaling, packed)]


@_effective.register_fake
def _(W, factors, scaling, packed, adapter):
    return torch.empty(W.shape, dtype=W.dtype, device=W.device)


@_project.register_fake
def _(dE, W, factors, scaling, packed, adapter):
    return [torch.empty_like(factor) for factor in factors]
