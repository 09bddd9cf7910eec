"""What is trained, and how it changes a frozen weight W (out, in) under its mask M: one form per kind of adapter.

    sparselora  E = (W + s B A) * M          A (r, in), B (out, r)      He et al., arXiv 2404.02424
    hira        E = (W * (1 + s B A)) * M    A (r, in), B (out, r)      Huang et al., ICLR 2025 (PEFT's HiRA has s = 1)
    full        E = scatter(values, M)       one value per kept weight
    mask        E = W * M                    nothing is trained

`effective` is one float32 expression (float64 for float64 weights), rounded once to W's dtype; +0 where the mask is 0.
Forward, backward and merge all call it, so what was trained is what is saved. `project` takes dL/dE (out, in) to the
gradients of the factors, which see the kept weights only. Both run as one compiled kernel where there is one, and as
plain torch elsewhere: equal up to rounding.

sparselora-fast is sparselora with the two-product gradient of LoRS, which forgets the mask on the way back: cheaper, and
biased.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsight import kernels
from sparsight.model.masks import unpack

Factors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Form:
    """`start(W, packed, rank)` gives the factors' first values, float32, by the names in `names`.

    `effective(W, factors, scaling, packed)` gives E; `project(dE, W, factors, scaling, packed)` a gradient per factor;
    `shortcut(g, x, factors, scaling)` does the same from g (tokens, out) and x (tokens, in), without dE.
    """

    names: tuple[str, ...]
    start: Callable[[torch.Tensor, torch.Tensor | None, int], Factors]
    effective: Callable[[torch.Tensor, Factors, float, torch.Tensor | None], torch.Tensor]
    project: Callable[[torch.Tensor, torch.Tensor, Factors, float, torch.Tensor | None], Factors]
    shortcut: Callable[[torch.Tensor, torch.Tensor, Factors, float], Factors] | None = None


def _wide(W: torch.Tensor) -> torch.dtype:
    return torch.promote_types(W.dtype, torch.float32)


def _masked(E: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    return E if packed is None else E.masked_fill_(~unpack(packed, E.shape), 0)


def _low_rank(W: torch.Tensor, packed: torch.Tensor | None, rank: int) -> Factors:
    """A kaiming-uniform and B zero, as in LoRA: training starts from the sparse model itself."""
    A = torch.empty(rank, W.shape[1])
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, torch.zeros(W.shape[0], rank)


def _add(W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    A, B = factors
    if (E := kernels.merge(W, A, B, scaling, packed)) is not None:
        return E
    wide = _wide(W)
    return _masked(torch.addmm(W.to(wide), B.to(wide), A.to(wide), alpha=scaling), packed).to(W.dtype)


def _multiply(W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    A, B = factors
    if (E := kernels.merge(W, A, B, scaling, packed, times=True)) is not None:
        return E
    wide = _wide(W)
    E = torch.addmm(W.new_ones(1, 1, dtype=wide), B.to(wide), A.to(wide), alpha=scaling).mul_(W)
    return _masked(E, packed).to(W.dtype)


def _scatter(W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    (values,) = factors
    if packed is None:
        return values.view(W.shape).to(W.dtype)
    if (E := kernels.expand(values, packed, tuple(W.shape), W.dtype)) is not None:
        return E
    E = torch.zeros(W.shape, dtype=W.dtype, device=W.device)
    return E.masked_scatter_(unpack(packed, W.shape), values.to(W.dtype))


def _leave(W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    return _masked(W.clone(), packed)


def _to_low_rank(
    dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None, times: bool = False
) -> Factors:
    A, B = factors
    found = kernels.project(dE, A, B, scaling, packed, W=W if times else None)
    if found is None:
        wide = torch.promote_types(A.dtype, _wide(W))
        masked = _masked(dE.to(wide, copy=True), packed)
        masked = masked.mul_(W).mul_(scaling) if times else masked.mul_(scaling)
        found = B.T.to(wide) @ masked, masked @ A.T.to(wide)
    return found[0].to(A.dtype), found[1].to(B.dtype)


def _to_low_rank_times(
    dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None
) -> Factors:
    return _to_low_rank(dE, W, factors, scaling, packed, times=True)


def _gather(dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> Factors:
    (values,) = factors
    if packed is None:
        return (dE.reshape(-1).to(values.dtype),)
    if (kept := kernels.compress(dE, packed)) is None:
        kept = dE[unpack(packed, dE.shape)]
    return (torch.nn.functional.pad(kept.to(values.dtype), (0, len(values) - len(kept))),)


def _two_products(g: torch.Tensor, x: torch.Tensor, factors: Factors, scaling: float) -> Factors:
    A, B = factors
    dA = (g @ B.to(g.dtype)).T @ x  # (r, in)
    dB = g.T @ (x @ A.T.to(x.dtype))  # (out, r)
    return dA.to(A.dtype) * scaling, dB.to(B.dtype) * scaling


def _kept(W: torch.Tensor, packed: torch.Tensor | None, rank: int) -> Factors:
    return ((W if packed is None else W[unpack(packed, W.shape)]).detach().float().reshape(-1).clone(),)


FORMS = {
    "sparselora": Form(("A", "B"), _low_rank, _add, _to_low_rank),
    "sparselora-fast": Form(("A", "B"), _low_rank, _add, _to_low_rank, _two_products),
    "hira": Form(("A", "B"), _low_rank, _multiply, _to_low_rank_times),
    "full": Form(("values",), _kept, _scatter, _gather),
    "mask": Form((), lambda W, packed, rank: (), _leave, lambda dE, W, factors, scaling, packed: ()),
}


def effective(form: str, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None) -> torch.Tensor:
    """E (out, in) of a form; one opaque operator where a surrounding model is compiled, so that the bits are the same."""
    if torch.compiler.is_compiling():
        return torch.ops.sparsight.effective(W, list(factors), scaling, packed, form)
    return FORMS[form].effective(W, factors, scaling, packed)


def project(
    form: str, dE: torch.Tensor, W: torch.Tensor, factors: Factors, scaling: float, packed: torch.Tensor | None
) -> Factors:
    """The gradients of a form's factors from dE (out, in)."""
    if torch.compiler.is_compiling():
        return tuple(torch.ops.sparsight.project(dE, W, list(factors), scaling, packed, form))
    return FORMS[form].project(dE, W, factors, scaling, packed)


@torch.library.custom_op("sparsight::effective", mutates_args=())
def _effective(
    W: torch.Tensor, factors: list[torch.Tensor], scaling: float, packed: torch.Tensor | None, form: str
) -> torch.Tensor:
    return FORMS[form].effective(W, tuple(factors), scaling, packed)


@torch.library.custom_op("sparsight::project", mutates_args=())
def _project(
    dE: torch.Tensor, W: torch.Tensor, factors: list[torch.Tensor], scaling: float, packed: torch.Tensor | None, form: str
) -> list[torch.Tensor]:
    return [grad.clone() for grad in FORMS[form].project(dE, W, tuple(factors), scaling, packed)]


@_effective.register_fake
def _(W, factors, scaling, packed, form):
    return torch.empty(W.shape, dtype=W.dtype, device=W.device)


@_project.register_fake
def _(dE, W, factors, scaling, packed, form):
    return [torch.empty_like(factor) for factor in factors]
