"""The moments of a layer's inputs, gathered while a block runs: sums over tokens, and a few rows to measure errors on.

Padding is left out. Tokens of text and of images are summed apart, so that a rule (`tokens.py`) can weigh them. Layers
with the very same input tensor (q/k/v, gate/up) share one accumulator. A Gram matrix is gathered as an upper triangle of
panels, which is little more than half the work of a full product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsight.calibration.inverse_factor import inverse_factor
from sparsight.calibration.sums import Contribution, Sums
from sparsight.model.anatomy import Layer

MASKS = {"vision": ("vision",), "connector": ("instruction", "queries"), "language": ("text", "decoder")}
ERROR_ROWS = 128  # inputs of a layer kept to measure its output error on
FEW = 32  # tokens: an expert that saw fewer is pruned with the moments of all experts of its tensor

Weigh = Callable[[Mapping[str, int]], Mapping[str, float]]  # tokens of each kind -> the weight of one of them


def alike(counts: Iterable[str]) -> dict[str, float]:
    """Count every token as one."""
    return dict.fromkeys(counts, 1.0)


@dataclass
class Moments:
    """Sums over a layer's inputs, on the layer's device.

    `weigh` gives the weight of a token of each kind; with one kind only, every token counts as one. `sensitivity` is, for
    methods that need it, the gradient of the loss by the layer's weights (`gradients.py`). With a `home` the Gram matrix is
    gathered in one of several processes, and the others have counts and sums only.
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
        """Add inputs, in place, and keep up to `keep_rows` of them."""
        self.take(Contribution.of(X, gram=self.with_gram, rows=keep_rows, image=image, sequences=sequences))

    def take(self, brought: Contribution) -> None:
        """Add the contribution of a batch, in place, and keep as many of its rows as there is room for."""
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
        """The number of tokens of all kinds."""
        return sum(kind.count for kind in self.kinds.values())

    @property
    def count(self) -> float:
        """The sum of the tokens' weights."""
        return self._weighted(lambda kind: kind.count)

    @property
    def squares(self) -> torch.Tensor:  # (in,)
        """Weighted sum of x_j^2."""
        return self._weighted(lambda kind: kind.squares)

    @property
    def norm(self) -> torch.Tensor:  # (in,)
        """||x_j||_2 over all tokens, for every input column."""
        return self.squares.sqrt()

    @property
    def sums(self) -> torch.Tensor:  # (in,)
        """Weighted sum of x_j."""
        return self._weighted(lambda kind: kind.sums)

    @property
    def variance(self) -> torch.Tensor:  # (in,)
        """Var[x_j]."""
        mean = self.sums / self.count
        return self._weighted(lambda kind: kind.spread + kind.count * (kind.sums / kind.count - mean).square()) / self.count

    @property
    def drift(self) -> torch.Tensor | None:  # (in, in)
        """(Z - X)^T X over all tokens, Z the inputs of the dense model; None where these were not looked at."""
        if any(kind.drift is None for kind in self.kinds.values()):
            return None
        return self._weighted(lambda kind: kind.drift)

    @property
    def gram(self) -> torch.Tensor:  # (in, in)
        """X^T X over all tokens. **Raises** `ValueError` if it was not gathered."""
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
        weights: Mapping[str, float] = alike(self.kinds)
        if len(self.kinds) > 1:
            weights = self.weigh({name: kind.count for name, kind in self.kinds.items()})
            if not isinstance(weights, Mapping) or not all(0 <= weights.get(k, -1.0) < float("inf") for k in self.kinds):
                raise ValueError(f"the rule weighs {sorted(self.kinds)} as {weights!r}; it must give each a number from 0")
        if not self.kinds:
            return 0
        first, *others = self.kinds
        total = part(self.kinds[first]) * weights[first]
        for name in others:  # in place: of Gram matrices there is one more then, and not three
            value = part(self.kinds[name])
            total += value if weights[name] == 1 else value * weights[name]
        return total

    @classmethod
    def pooled(cls, several: Sequence[Moments]) -> Moments:
        """The moments of all their tokens together."""
        first = several[0]
        whole = cls(first.columns, first.device, first.with_gram, first.weigh)
        for moments in several:
            whole.sequences += moments.sequences
            whole.rows += moments.rows
            for name, kind in moments.kinds.items():
                whole.kinds.setdefault(name, Sums(first.columns, first.device, first.with_gram)).merge(kind)
        return whole

    def state(self) -> dict[str, Any]:
        """All sums and rows as plain values and tensors, for `of_state`."""
        kinds = {name: kind.state() for name, kind in self.kinds.items()}
        return {
            "columns": self.columns,
            "gram": self.with_gram,
            "sequences": self.sequences,
            "rows": self.rows,
            "kinds": kinds,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], weigh: Weigh, device: torch.device) -> Moments:
        """Moments from the result of `state`, on `device`."""
        columns = state["columns"]
        moments = cls(columns, device, state["gram"], weigh, sequences=state["sequences"], rows=state["rows"])
        moments.kinds = {name: Sums.of_state(sums, columns, device) for name, sums in state["kinds"].items()}
        return moments

    def permuted(self, order: torch.Tensor) -> Moments:  # order (in,)
        """The moments of the same inputs with their columns in another order."""
        other = Moments(self.columns, self.device, self.with_gram, self.weigh, self.home, sequences=self.sequences)
        other.rows = [rows[:, order] for rows in self.rows]
        other.kinds = {name: kind.permuted(order) for name, kind in self.kinds.items()}
        return other


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
    """Flatten X (..., in) to (tokens, in) without its padding; also return which of the tokens are an image's.

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
