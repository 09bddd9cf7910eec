"""What is known of a layer's inputs, gathered while a block runs: column norms, counts, a few rows to measure errors on.

Padding is left out: a token that a batch only carries to fill its rectangle says nothing about the data. Layers that are
fed the very same tensor (q/k/v, gate/up) share one accumulator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsight.model.anatomy import Layer

MASKS = {"vision": ("vision",), "connector": ("instruction", "queries"), "language": ("text", "decoder")}
ERROR_ROWS = 512  # inputs of a layer kept to measure its output error on


@dataclass
class Moments:
    """Sums over the tokens a layer has seen; float32, on the layer's device."""

    columns: int
    device: torch.device
    count: int = 0
    squares: torch.Tensor = field(init=False)  # (in,) sum of x_j^2
    rows: list[torch.Tensor] = field(default_factory=list)  # each (k, in): tokens from all over a batch

    def __post_init__(self) -> None:
        self.squares = torch.zeros(self.columns, dtype=torch.float32, device=self.device)

    @property
    def norm(self) -> torch.Tensor:  # (in,)
        """||x_j||_2 over all tokens, for every input column."""
        return self.squares.sqrt()

    def add(self, X: torch.Tensor, keep_rows: int) -> None:  # X (tokens, in)
        self.count += X.shape[0]
        self.squares += X.float().square().sum(0)
        if keep_rows:
            self.rows.append(X[:: max(1, -(-X.shape[0] // keep_rows))].clone())

    def sample(self) -> torch.Tensor:
        """The kept inputs, (k, in) with k <= `ERROR_ROWS`."""
        return torch.cat(self.rows) if self.rows else torch.zeros(0, self.columns, device=self.device)


class Watch:
    """Open accumulators on the layers of one block; `during(batch)` says whose tokens run, `moments` holds the sums."""

    def __init__(self, layers: Sequence[Layer], batches: int) -> None:
        self.moments: dict[str, Moments] = {}
        self._layers = layers
        self._rows_each = max(1, -(-ERROR_ROWS // max(1, batches)))
        self._padding: Mapping[str, torch.Tensor] = {}
        self._component = layers[0].component if layers else ""
        self._seen: list[tuple[torch.Tensor, Moments]] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[Watch]:
        hooks = [layer.module.register_forward_pre_hook(self._hook(layer)) for layer in self._layers]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def during(self, padding: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Run one batch with these masks of real tokens."""
        self._padding, self._seen = padding, []
        try:
            yield
        finally:
            self._padding, self._seen = {}, []

    def _hook(self, layer: Layer):
        def gather(module: Any, args: tuple) -> None:
            X = args[0]
            for tensor, moments in self._seen:
                if tensor is X:
                    self.moments[layer.name] = moments
                    return
            if layer.name not in self.moments:
                self.moments[layer.name] = Moments(X.shape[-1], X.device)
            moments = self.moments[layer.name]
            self._seen.append((X, moments))
            room = ERROR_ROWS - sum(len(rows) for rows in moments.rows)
            moments.add(real_tokens(X, self._padding, self._component), min(room, self._rows_each))

        return gather


def real_tokens(X: torch.Tensor, padding: Mapping[str, torch.Tensor], component: str) -> torch.Tensor:
    """Flatten X (..., in) to (tokens, in) without its padding.

    Each component has masks of its own, told apart by their number of tokens (those of encoder and decoder, and of the
    Q-Former's text and queries, differ by construction). Inputs that fit no mask have no padding.
    """
    flat = X.reshape(-1, X.shape[-1])
    for name in MASKS[component]:
        mask = padding.get(name)
        if mask is not None and mask.numel() == flat.shape[0]:
            return flat if bool(mask.all()) else flat[mask.reshape(-1).to(flat.device)]
    return flat
