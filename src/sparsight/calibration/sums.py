"""Sums over the tokens of a layer's inputs, and the contribution of one batch to them.

Sums of floats depend on their order. A batch's contribution is therefore a value of its own: it is added in its own
process, or sent to others, and added batch by batch in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from sparsight import kernels

PANEL = 256  # columns of the Gram matrix per product


@dataclass(frozen=True)
class Part:
    """The tokens of one kind: their sums; for a Gram matrix, which is larger than the inputs, the inputs themselves."""

    kind: str  # "text", "image"
    count: int
    sums: torch.Tensor  # (in,) float32, sum of x_j
    spread: torch.Tensor  # (in,) float32, sum of (x_j - mean)^2
    squares: torch.Tensor | None  # (in,) float32, sum of x_j^2; None where there is X
    X: torch.Tensor | None  # (tokens, in)
    dense: torch.Tensor | None = None  # (tokens, in), the dense model's X

    @classmethod
    def of(cls, kind: str, X: torch.Tensor, gram: bool, dense: torch.Tensor | None = None) -> Part:
        """Sum inputs X (tokens, in) of one kind; with `gram` keep X and `dense`, not copies where they are contiguous."""
        sums, wide = X.sum(0, dtype=torch.float32), X.float()
        squares = None if gram else wide.square().sum(0)
        # in two passes: `var` by columns takes ten times as long
        centred = wide.sub_(sums / X.shape[0]) if wide is not X else wide - sums / X.shape[0]
        spread = centred.square_().sum(0)
        return cls(kind, X.shape[0], sums, spread, squares, X.contiguous() if gram else None, dense if gram else None)


@dataclass(frozen=True)
class Contribution:
    """The contribution of one batch to the moments of one layer."""

    parts: Iterable[Part]  # may be a generator: iterate once
    rows: torch.Tensor  # (k, in) a few of the inputs, from all over the batch
    sequences: int

    @classmethod
    def of(
        cls, X: torch.Tensor, *, gram: bool, rows: int = 0, image: torch.Tensor | None = None, sequences: int = 1,
        dense: torch.Tensor | None = None,
    ) -> Contribution:  # fmt: skip
        """Make the contribution of inputs X (tokens, in), `image` (tokens,) True at image tokens; `rows` of X are kept.

        `dense` (tokens, in) are the inputs of the same tokens in the dense model.
        """
        every = max(1, -(-X.shape[0] // rows)) if rows else 1
        return cls(_parts(X, image, gram, dense), X[::every].clone() if rows else X[:0], sequences)

    def copied(self) -> Contribution:
        """Return the same with its own tensors, so that it stays valid after the model's forward goes on."""
        parts = [part if part.X is None else replace(part, X=part.X.clone()) for part in self.parts]
        return replace(self, parts=parts)


def _parts(X: torch.Tensor, image: torch.Tensor | None, gram: bool, dense: torch.Tensor | None) -> Iterator[Part]:
    text = torch.ones(len(X), dtype=torch.bool, device=X.device) if image is None else ~image
    for kind, mask in (("text", text), ("image", ~text)):
        if bool(mask.any()):
            X_dense = dense if dense is None or bool(mask.all()) else dense[mask]
            yield Part.of(kind, X if bool(mask.all()) else X[mask], gram, X_dense)


class Sums:
    """Float32 sums over the tokens of one kind: x_j, (x_j - mean)^2, and x_j^2 or X^T X, its upper triangle alone.

    `drift` is (Z - X)^T X, Z the inputs of the dense model; None where these are not looked at.

    `spread`, the sum of squared distances from the mean, is kept apart: the difference of x_j^2 and the squared mean is
    rounding where the mean is large (Chan, Golub & LeVeque 1979).
    """

    def __init__(self, columns: int, device: torch.device, gram: bool) -> None:
        self.count = 0
        self.sums = torch.zeros(columns, dtype=torch.float32, device=device)  # (in,) sum of x_j
        self.spread = torch.zeros_like(self.sums)  # (in,) sum of (x_j - mean)^2
        self.upper = torch.zeros(columns, columns, dtype=torch.float32, device=device) if gram else None
        self.drift: torch.Tensor | None = None  # (in, in)
        self._squares = torch.zeros_like(self.sums)  # (in,) sum of x_j^2, where there is no `upper`

    @property
    def squares(self) -> torch.Tensor:
        """(in,) sum of x_j^2; the diagonal of the Gram matrix where there is one."""
        return self._squares if self.upper is None else self.upper.diagonal()

    def add(self, part: Part) -> None:
        """Add the tokens of one batch, in place."""
        self._add(part.count, part.sums, part.spread)
        if self.upper is not None and part.X is not None:
            self._add_gram(part.X, self.upper)
            if part.dense is not None:
                self.drift = torch.zeros_like(self.upper) if self.drift is None else self.drift
                self.drift.addmm_((part.dense.float() - part.X.float()).T, part.X.float())
        elif part.squares is not None:
            self._squares += part.squares

    def merge(self, other: Sums) -> None:
        """Add the sums over other tokens, in place."""
        self._add(other.count, other.sums, other.spread)
        if self.upper is None or other.upper is None:
            self._squares += other.squares
        else:
            self.upper += other.upper

    def _add(self, count: int, sums: torch.Tensor, spread: torch.Tensor) -> None:
        """Add the count, the sums and the spread of other tokens, in place."""
        if self.count and count:
            apart = sums / count - self.sums / self.count
            self.spread += apart.square_().mul_(count * self.count / (count + self.count))
        self.spread += spread
        self.count += count
        self.sums += sums

    def permuted(self, order: torch.Tensor) -> Sums:
        """Return the sums of the same inputs with their columns in another `order` (in,)."""
        other = Sums(len(order), self.sums.device, False)
        other.count, other.sums, other._squares = self.count, self.sums[order], self.squares[order]
        other.spread = self.spread[order]
        if self.upper is not None:
            whole = self.upper.triu() + self.upper.triu(1).T
            other.upper = whole[order][:, order]
        other.drift = None if self.drift is None else self.drift[order][:, order]
        return other

    def state(self) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return all sums as plain values for a file; `of_state` reads them. Tensors are not copied."""
        return self.count, self.sums, self.spread, self._squares, self.upper

    @classmethod
    def of_state(cls, state: tuple, columns: int, device: torch.device) -> Sums:
        """Return sums from what `state` returned. **Raises** `ValueError` for another version's."""
        sums = cls(columns, device, False)
        sums.count, sums.sums, sums.spread, sums._squares, sums.upper = state
        return sums

    def _add_gram(self, X: torch.Tensor, upper: torch.Tensor) -> None:
        if kernels.add_gram(X, upper):
            return
        X = X.float()
        for start in range(0, X.shape[1], PANEL):
            upper[start : start + PANEL, start:].addmm_(X[:, start : start + PANEL].T, X[:, start:])
