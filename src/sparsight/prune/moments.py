"""What is known of a layer's inputs, gathered while a block runs: sums over tokens, and a few rows to measure errors on.

Padding is left out: a token that a batch only carries to fill its rectangle says nothing about the data. Tokens of text
and of images are summed apart, so that a rule (`prune/tokens.py`) can weigh them. Layers that are fed the very same
tensor (q/k/v, gate/up) share one accumulator. A Gram matrix is gathered as an upper triangle of panels, which is little
more than half the work of a full product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsight import processes
from sparsight.model.anatomy import Layer
from sparsight.prune.factor import inverse_factor
from sparsight.prune.sums import Contribution, Sums

MASKS = {"vision": ("vision",), "connector": ("instruction", "queries"), "language": ("text", "decoder")}
ERROR_ROWS = 128  # inputs of a layer kept to measure its output error on
FEW = 32  # tokens: an expert that saw fewer is pruned with the moments of all experts of its tensor

Weigh = Callable[[Mapping[str, int]], Mapping[str, float]]  # tokens seen of each kind -> what one of them counts


def alike(counts: Mapping[str, int]) -> dict[str, float]:
    return dict.fromkeys(counts, 1.0)


@dataclass
class Moments:
    """What a layer's inputs were, on the layer's device.

    `weigh` says what a token of each kind counts; a layer that saw one kind only takes every token as one.
    `sensitivity` is, for methods that need it, how the loss answers to the layer's weights (`prune/gradients.py`). With a
    `home` the Gram matrix is gathered in one of several processes, and the others know counts and sums only.
    """

    columns: int
    device: torch.device
    with_gram: bool = False
    weigh: Weigh = alike
    home: int | None = None
    kinds: dict[str, Sums] = field(default_factory=dict)  # "text", "image"
    sequences: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)  # each (k, in): tokens from all over a batch
    sensitivity: Any = None
    damping: float = 0.0  # of the Gram matrix's factor, in units of its mean diagonal
    _gram: torch.Tensor | None = None
    _factor: torch.Tensor | None = None

    def add(
        self, X: torch.Tensor, keep_rows: int = 0, *, image: torch.Tensor | None = None, sequences: int = 1
    ) -> None:  # X (tokens, in), image (tokens,)
        self.take(Contribution.of(X, gram=self.with_gram, rows=keep_rows, image=image, sequences=sequences))

    def take(self, brought: Contribution) -> None:
        """Add what a batch brings, and keep as many of its rows as there is room for."""
        self.sequences += brought.sequences
        for part in brought.parts:
            if part.kind not in self.kinds:
                self.kinds[part.kind] = Sums(self.columns, self.device, self.with_gram)
            self.kinds[part.kind].add(part)
        room = ERROR_ROWS - sum(len(rows) for rows in self.rows)
        if room > 0 and len(brought.rows):
            self.rows.append(brought.rows[:room])

    @property
    def tokens(self) -> int:
        return sum(kind.count for kind in self.kinds.values())

    @property
    def count(self) -> float:
        """Tokens, each as often as it counts."""
        return self._weighted(lambda kind: kind.count)

    @property
    def squares(self) -> torch.Tensor:  # (in,)
        return self._weighted(lambda kind: kind.squares)

    @property
    def norm(self) -> torch.Tensor:  # (in,)
        """||x_j||_2 over all tokens, for every input column."""
        return self.squares.sqrt()

    @property
    def sums(self) -> torch.Tensor:  # (in,)
        return self._weighted(lambda kind: kind.sums)

    @property
    def variance(self) -> torch.Tensor:  # (in,)
        return (self.squares / self.count - (self.sums / self.count).square()).clamp(min=0)

    @property
    def gram(self) -> torch.Tensor:  # (in, in)
        """X^T X over all tokens."""
        if self._gram is None:
            if not self.with_gram:
                raise ValueError("this method was not given a Gram matrix; declare it with needs='gram'")
            alone = len(self.kinds) == 1  # its own triangle is then filled up in place: large copies cost
            kinds: Any = list(self.kinds.values())
            upper = kinds[0].upper if alone else self._weighted(lambda kind: kind.upper)
            self._gram = upper.triu_().add_(upper.triu(1).T)
        return self._gram

    def inverse_factor(self) -> torch.Tensor:  # (in, in)
        """Upper triangular U with U^T U = (gram, damped)^-1; computed once for all layers that share these moments."""
        if self._factor is None:
            self._factor, self.damping = inverse_factor(self.gram)
        return self._factor

    def sample(self) -> torch.Tensor:
        """The kept inputs, (k, in) with k <= `ERROR_ROWS`."""
        return torch.cat(self.rows) if self.rows else torch.zeros(0, self.columns, device=self.device)

    def _weighted(self, part: Callable[[Sums], Any]) -> Any:
        weights: Mapping[str, float] = {}
        if len(self.kinds) > 1:
            weights = self.weigh({name: kind.count for name, kind in self.kinds.items()})
            if not isinstance(weights, Mapping) or not all(0 <= weights.get(k, 1.0) < float("inf") for k in self.kinds):
                raise ValueError(f"the rule weighs {sorted(self.kinds)} as {weights!r}; it must give each a number from 0")
        return sum((part(kind) * weights.get(name, 1.0) for name, kind in self.kinds.items()), start=0)

    @classmethod
    def pooled(cls, several: Sequence[Moments]) -> Moments:
        """The moments of all their tokens together."""
        first = several[0]
        whole = cls(first.columns, first.device, first.with_gram, first.weigh)
        for moments in several:
            whole.sequences += moments.sequences
            whole.rows += moments.rows
            for name, kind in moments.kinds.items():
                sums = whole.kinds.setdefault(name, Sums(first.columns, first.device, first.with_gram))
                sums.count += kind.count
                sums.sums += kind.sums
                if sums.upper is None or kind.upper is None:
                    sums._squares += kind.squares
                else:
                    sums.upper += kind.upper
        return whole

    def permuted(self, order: torch.Tensor) -> Moments:  # order (in,)
        """The moments of the same inputs with their columns in another order."""
        other = Moments(self.columns, self.device, self.with_gram, self.weigh, self.home, sequences=self.sequences)
        other.rows = [rows[:, order] for rows in self.rows]
        for name, kind in self.kinds.items():
            sums = other.kinds[name] = Sums(self.columns, self.device, False)
            sums.count, sums.sums, sums._squares = kind.count, kind.sums[order], kind.squares[order]
            if kind.upper is not None:
                whole = kind.upper.triu() + kind.upper.triu(1).T
                sums.upper = whole[order][:, order]
        return other


class Watch:
    """Open accumulators on the layers of one block; `during(batch)` says whose tokens run, `moments` holds the sums.

    `shared`: every process runs batches of its own, in turns. Each calls `exchange` at the end of a turn, whether it had
    a batch or not, and all add what all have brought in the order of the batches, as one process does. A Gram matrix
    costs more than the rest: it has one process for its home, but those of experts, which may be pooled, are everywhere.
    """

    def __init__(
        self, layers: Sequence[Layer], batches: int, *, gram: bool = False, weigh: Weigh = alike, shared: bool = False
    ) -> None:
        self.moments: dict[str, Moments] = {}
        self.gram, self.weigh = gram, weigh
        self._layers = layers
        self._experts = {layer.name for layer in layers if layer.expert is not None}
        self._rows_each = max(1, -(-ERROR_ROWS // max(1, batches)))
        self._padding: Mapping[str, torch.Tensor] = {}
        self._drop: torch.Tensor | None = None
        self._component = layers[0].component if layers else ""
        self._seen: list[tuple[torch.Tensor, str]] = []
        self._homes = 0
        self._shared = shared and processes.count() > 1
        self._outbox: list[tuple[str, Contribution | str]] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[Watch]:
        experts: dict[int, list[Layer]] = {}
        hooks = []
        for layer in self._layers:
            if layer.expert is None:
                hooks.append(layer.module.register_forward_pre_hook(self._hook(layer)))
            else:
                experts.setdefault(id(layer.module), []).append(layer)
        for group in experts.values():
            hooks.append(group[0].module.register_forward_pre_hook(self._hook_experts(group)))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def during(self, padding: Mapping[str, torch.Tensor], drop: torch.Tensor | None = None) -> Iterator[None]:
        """Run one batch with these masks of real tokens; `drop` marks language tokens (B, T) that a rule leaves out."""
        self._padding, self._drop, self._seen = padding, drop, []
        try:
            yield
        finally:
            self._padding, self._drop, self._seen = {}, None, []

    def see(self, layer: Layer, X: torch.Tensor) -> None:
        """Add the inputs X (..., in) of one layer; those of a tensor seen before in this batch are there already."""
        for tensor, name in self._seen:
            if tensor is X:
                return self._bring(layer.name, name)
        self._seen.append((X, layer.name))
        flat, image = real_tokens(X, self._padding, self._component, self._drop)
        return self._bring(layer.name, self._contribution(flat, image, self._sequences(X)))

    def exchange(self) -> None:
        """Add what this turn's batches brought in any process; nothing to do where they are not shared."""
        if self._shared:
            mine, self._outbox = self._outbox, []
            for theirs in processes.each(mine):
                for name, brought in theirs:
                    self._take(name, brought)

    def _bring(self, name: str, brought: Contribution | str) -> None:
        """Add a contribution to a layer, or the layer's name to another layer fed the same, now or at the exchange."""
        if not self._shared:
            self._take(name, brought)
        else:
            self._outbox.append((name, brought if isinstance(brought, str) else brought.kept()))

    def _take(self, name: str, brought: Contribution | str) -> None:
        if isinstance(brought, str):
            self.moments[name] = self.moments[brought]
            return
        if name not in self.moments:
            home = None
            if self._shared and self.gram and name not in self._experts:
                home, self._homes = self._homes % processes.count(), self._homes + 1
            gram = self.gram and home in (None, processes.rank())
            self.moments[name] = Moments(brought.rows.shape[1], brought.rows.device, gram, self.weigh, home)
        self.moments[name].take(brought)

    def _contribution(self, X: torch.Tensor, image: torch.Tensor | None, sequences: int) -> Contribution:
        return Contribution.of(X, gram=self.gram, rows=self._rows_each, image=image, sequences=sequences)

    def _sequences(self, X: torch.Tensor) -> int:
        """How many samples X holds: its rows, or the batch's where they are packed into one row of tokens."""
        text = self._padding.get("text")
        return X.shape[0] if X.dim() > 2 or text is None else text.shape[0]

    def _hook(self, layer: Layer):
        def gather(module: Any, args: tuple) -> None:
            self.see(layer, args[0])

        return gather

    def _hook_experts(self, layers: Sequence[Layer]):
        """Fused experts get (tokens, in) and which experts each token goes to; every expert sees its own tokens only."""

        def gather(module: Any, args: tuple) -> None:
            X, chosen = args[0], args[1]  # (tokens, in), (tokens, k)
            places = torch.arange(X.shape[0], device=X.device).unsqueeze(1)
            real, image = real_tokens(places, self._padding, self._component, self._drop)
            for layer in layers:
                key, index = layer.expert  # type: ignore[misc]
                here = (chosen[real[:, 0]] == index).any(1)
                inputs = X[real[here, 0]]
                if key == "down_proj":
                    inputs = module._apply_gate(torch.nn.functional.linear(inputs, module.gate_up_proj[index]))
                if len(inputs):
                    there = None if image is None else image[here]
                    self._bring(layer.name, self._contribution(inputs, there, self._sequences(X)))

        return gather


def pool(layers: Sequence[Layer], moments: dict[str, Moments]) -> list[str]:
    """Give experts that saw fewer than `FEW` tokens the moments of all experts of their tensor, in place; their names."""
    tensors: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.expert is not None:
            tensors.setdefault(id(layer.parameter), []).append(layer)
    pooled = []
    for experts in tensors.values():
        seen = [moments[layer.name] for layer in experts if layer.name in moments]
        poor = [x.name for x in experts if x.name not in moments or moments[x.name].tokens < FEW]
        if seen and poor:
            whole = Moments.pooled(seen)
            moments.update(dict.fromkeys(poor, whole))
            pooled += poor
    return pooled


def real_tokens(
    X: torch.Tensor, padding: Mapping[str, torch.Tensor], component: str, drop: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Flatten X (..., in) to (tokens, in) without its padding, and say which of the tokens are an image's.

    Each component has masks of its own, told apart by their number of tokens (those of encoder and decoder, and of the
    Q-Former's text and queries, differ by construction). Inputs that fit no mask have no padding. Image tokens are those
    of the language model's inputs that stand for an image, and all of vision's; None if there are none.
    """
    flat = X.reshape(-1, X.shape[-1])
    everywhere = torch.ones(flat.shape[0], dtype=torch.bool, device=flat.device)
    for name in MASKS[component]:
        mask = padding.get(name)
        if mask is None or mask.numel() != flat.shape[0]:
            continue
        mask = mask.reshape(-1).to(flat.device)
        image = padding["image"].reshape(-1).to(flat.device) if name == "text" and "image" in padding else None
        if drop is not None and name == "text":
            mask = mask & ~drop.reshape(-1).to(flat.device)
        if not bool(mask.all()):
            flat, image = flat[mask], image if image is None else image[mask]
        return flat, everywhere[: len(flat)] if component == "vision" else image
    return flat, everywhere if component == "vision" else None
