"""The output head of a model, apart from its body: hidden states come out where they are wanted, logits never at once.

A model computes logits for every position over the whole vocabulary. Restoration needs those of answer positions only,
and those in chunks: so a hook takes the hidden states in front of the head and lets none through to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsight.errors import SparsightError
from sparsight.model.masks import weight_hash

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest logit


class Head:
    """The head of `model`, which may be wrapped later; one hook is left on it."""

    def __init__(self, model: Any) -> None:
        self.linear: nn.Module = model.get_output_embeddings()
        text = model.config.get_text_config()
        self.cap: float | None = getattr(text, "final_logit_softcapping", None)
        self.encoder_decoder = bool(text.is_encoder_decoder)
        self.start: Any = getattr(text, "decoder_start_token_id", None)
        self.pad: Any = text.pad_token_id
        self._taking = False
        self._taken: torch.Tensor | None = None
        self.linear.register_forward_pre_hook(self._take)

    @property
    def weight(self) -> torch.Tensor:  # (V, d)
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:  # (V,)
        return getattr(self.linear, "bias", None)

    def hidden(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The hidden states (B, T, d) in front of the head, T that of the decoder in an encoder-decoder.

        `inputs` are those of `Batch.inputs`; `model` may be the model itself or what wraps it.
        """
        self._taking, self._taken = True, None
        try:
            model(**self._without_labels(inputs), use_cache=False)
        finally:
            self._taking = False
        taken, self._taken = self._taken, None
        if taken is None:
            raise SparsightError(f"{type(model).__name__}: its forward does not use its output head; it cannot be restored")
        return taken

    def hash(self) -> str:
        return " ".join(weight_hash(part.data) for part in (self.weight, self.bias) if part is not None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) of hidden states (n, d), as the model computes them, in float32."""
        return self.capped(F.linear(hidden, self.weight, self.bias).float())

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def check(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        """Refuse a model that does more to its logits than its head does; costs two forwards."""
        expected = model(**self._without_labels(inputs), use_cache=False).logits.float()
        found = self.logits(self.hidden(model, inputs).flatten(0, 1)).view_as(expected)
        limit = TOLERANCE.get(self.weight.dtype, 1e-4) * float(expected.abs().max())
        if float((found - expected).abs().max()) > limit:
            raise SparsightError(
                f"{type(model).__name__} changes its logits behind the output head in a way that Sparsight does not know; "
                "it cannot be restored"
            )

    def _take(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self._taking:
            return None
        self._taken = args[0]
        return (args[0][..., :0, :],)

    def _without_labels(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model need not compute a loss of its own; an encoder-decoder is fed with its labels, one place on."""
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        if self.encoder_decoder:
            labels = inputs["labels"]
            fed = labels.masked_fill(labels == -100, self.pad)
            first = fed.new_full((len(fed), 1), self.start)
            rest["decoder_input_ids"] = torch.cat([first, fed[:, :-1]], dim=1)
        return rest
