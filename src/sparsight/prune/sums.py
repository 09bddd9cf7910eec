"""Sums over the tokens of a layer's inputs, and what one batch brings to them.

Sums of floats depend on their order. What a batch brings is therefore a value of its own: it is added where it was made,
or sent to other processes, and added batch by batch in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from sparsight import kernels

PANEL = 256  # columns of the Gram matrix per product


@dataclass(frozen=True)
class Part:
    """The tokens of one kind: their sums, or the inputs themselves, which a Gram matrix needs and is larger than."""

    kind: str  # "text", "image"
    count: int
    sums: torch.Tensor  # (in,) float32, sum of x_j
    squares: torch.Tensor | None  # (in,) float32, sum of x_j^2; None where there is X
    X: torch.Tensor | None  # (tokens, in)

    @classmethod
    def of(cls, kind: str, X: torch.Tensor, gram: bool) -> Part:  # X (tokens, in)
        sums = X.sum(0, dtype=torch.float32)
        return cls(kind, X.shape[0], sums, None if gram else X.float().square().sum(0), X.contiguous() if gram else None)


@dataclass(frozen=True)
class Contribution:
    """What one batch brings to the moments of one layer."""

    parts: Iterable[Part]  # made one by one as they are asked for, once
    rows: torch.Tensor  # (k, in) a few of the inputs, from all over the batch
    sequences: int

    @classmethod
    def of(
        cls, X: torch.Tensor, *, gram: bool, rows: int = 0, image: torch.Tensor | None = None, sequences: int = 1
    ) -> Contribution:  # X (tokens, in), image (tokens,)
        every = max(1, -(-X.shape[0] // rows)) if rows else 1
        return cls(_parts(X, image, gram), X[::every].clone() if rows else X[:0], sequences)

    def kept(self) -> Contribution:
        """The same to keep: nothing is left to be made, and what the model does to its tensors does not reach it."""
        parts = [part if part.X is None else replace(part, X=part.X.clone()) for part in self.parts]
        return replace(self, parts=parts)


def _parts(X: torch.Tensor, image: torch.Tensor | None, gram: bool) -> Iterator[Part]:
    text = torch.ones(len(X), dtype=torch.bool, device=X.device) if image is None else ~image
    for kind, chosen in (("text", text), ("image", ~text)):
        if bool(chosen.any()):
            yield Part.of(kind, X if bool(chosen.all()) else X[chosen], gram)


class Sums:
    """Plain float32 sums over the tokens of one kind."""

    def __init__(self, columns: int, device: torch.device, gram: bool) -> None:
        self.count = 0
        self.sums = torch.zeros(columns, dtype=torch.float32, device=device)  # (in,) sum of x_j
        self._squares = torch.zeros_like(self.sums)
        self.upper = torch.zeros(columns, columns, dtype=torch.float32, device=device) if gram else None

    @property
    def squares(self) -> torch.Tensor:  # (in,) sum of x_j^2
        return self._squares if self.upper is None else self.upper.diagonal()

    def add(self, part: Part) -> None:
        self.count += part.count
        self.sums += part.sums
        if self.upper is not None and part.X is not None:
            self._add_gram(part.X, self.upper)
        elif part.squares is not None:
            self._squares += part.squares

    def _add_gram(self, X: torch.Tensor, upper: torch.Tensor) -> None:
        if kernels.add_gram(X, upper):
            return
        X = X.float()
        for start in range(0, X.shape[1], PANEL):
            upper[start : start + PANEL, start:].addmm_(X[:, start : start + PANEL].T, X[:, start:])
