"""The output head of a model, apart from its body: hidden states without logits, and logits of chosen positions.

A model computes logits for every position over the whole vocabulary. Restoration needs those of answer positions only,
in chunks. So a hook keeps the hidden states in front of the head, and passes an empty tensor on to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sparsight.data.encoding import is_encoder_decoder
from sparsight.errors import SparsightError
from sparsight.masks.bits import weight_hash
from sparsight.model.load import overflow_advice
from sparsight.model.matrices import output_head

HALF = (torch.bfloat16, torch.float16)
WIDENED = 1 << 22  # numbers of a head's weight in float32 at a time
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest logit


def _as_given(a: torch.Tensor) -> contextlib.AbstractContextManager:
    """A block without autocast on the device of `a`; the estimate's has none."""
    return contextlib.nullcontext() if a.device.type == "meta" else torch.autocast(a.device.type, enabled=False)


def half(a: torch.Tensor, W: torch.Tensor) -> torch.dtype | None:
    """The half precision that a product of `a` and W is computed in: that of W, or of an autocast on a GPU; else None."""
    if W.dtype in HALF:
        return W.dtype
    cast = W.dtype == torch.float32 and a.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if cast else None


def multiply(a: torch.Tensor, W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a W^T (n, V) of a (n, d) and W (V, d), rounded to a half precision, as float32 sums that are not rounded.

    On a GPU the product of `dtype` has a float32 result. Elsewhere W is widened, `WIDENED` numbers at a time.
    """
    with _as_given(a):
        if a.device.type == "cuda":
            return torch.mm(a.to(dtype), W.T.to(dtype), out_dtype=torch.float32)
        a = a.float()
        return torch.cat([a @ part.float().T for part in W.split(max(1, WIDENED // W.shape[1]))], dim=1)


def multiply_back(slope: torch.Tensor, W: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return slope W (n, d) of slope (n, V) and W (V, d) in float32, as `multiply` does."""
    with _as_given(slope):
        if slope.device.type == "cuda":
            return torch.mm(slope.to(dtype), W.to(dtype), out_dtype=torch.float32)
        each = max(1, WIDENED // W.shape[1])
        total = slope.new_zeros(len(slope), W.shape[1])
        for columns, part in zip(slope.split(each, dim=1), W.split(each), strict=True):
            total.addmm_(columns, part.float())
        return total


class Head:
    """The head of `model`, which may be wrapped later. It adds a forward pre-hook to the head, until `remove`.

    `scale` is what the model multiplies its logits by, in front of their cap; `check` finds it.

    **Raises** `SparsightError` for a model without a head.
    """

    def __init__(self, model: Any, scale: float = 1.0) -> None:
        head = output_head(model)
        if head is None:
            raise SparsightError(f"{type(model).__name__}: names no output head to transformers; it cannot be restored")
        self.linear: nn.Module = head
        text = model.config.get_text_config()
        self.cap: float | None = getattr(text, "final_logit_softcapping", None)
        self.encoder_decoder = is_encoder_decoder(model.config)
        self.scale = scale
        names = (getattr(config, "decoder_start_token_id", None) for config in (model.config, text))
        self.start: Any = next((token for token in names if token is not None), None)
        if self.start is None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
            self.start = int(model.prepare_decoder_input_ids_from_labels(torch.zeros(1, 1, dtype=torch.long))[0, 0])
        self.pad: Any = getattr(text, "pad_token_id", None)
        self._capturing = False
        self._states: torch.Tensor | None = None
        self._hook = self.linear.register_forward_pre_hook(self._capture)

    def remove(self) -> None:
        """Remove the hook from the model; `hidden` and `check` do not work afterwards."""
        self._hook.remove()

    @property
    def weight(self) -> torch.Tensor:
        """(V, d)."""
        return self.linear.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """(V,), or None."""
        return getattr(self.linear, "bias", None)

    def hidden(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the hidden states (B, T, d) in front of the head, times `scale`; T is the decoder's in an encoder-decoder.

        `inputs` are `Batch.inputs`; `model` is the model itself or a wrapper of it. Cost: one forward without the head.
        **Raises** `SparsightError` if the forward does not use the head.
        """
        self._capturing, self._states = True, None
        try:
            model(**self._without_labels(inputs), use_cache=False)
        finally:
            self._capturing = False
        states, self._states = self._states, None
        if states is None:
            raise SparsightError(f"{type(model).__name__}: its forward does not use its output head; it cannot be restored")
        return states if self.scale == 1 else states * self.scale

    def hash(self) -> str:
        """Return the hashes of weight and bias, joined by a space."""
        return " ".join(weight_hash(part.data) for part in (self.weight, self.bias) if part is not None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (n, V) of hidden states (n, d) in float32 or float64, never those of a half precision widened."""
        if (dtype := half(hidden, self.weight)) is None:
            with _as_given(hidden):
                return self.capped(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias))
        logits = multiply(hidden, self.weight, dtype)
        return self.capped(logits if self.bias is None else logits.add_(self.bias))

    def back(self, slope: torch.Tensor) -> torch.Tensor:
        """Return the gradient (n, d) by the hidden states, in float32, from that by the uncapped logits, `slope` (n, V)."""
        if (dtype := half(slope, self.weight)) is None:
            with _as_given(slope):
                return slope.to(self.weight.dtype) @ self.weight
        return multiply_back(slope, self.weight, dtype)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Return cap * tanh(logits / cap), or the logits of a model without a cap."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @torch.no_grad()
    def check(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> None:
        """Find `scale`, and refuse a model that changes its logits behind the head otherwise. Cost: two forwards.

        **Raises** `SparsightError` where the logits are not those of the hidden states, and for NaN.
        """
        expected = model(**self._without_labels(inputs), use_cache=False).logits.float()
        if expected.isnan().any():
            advice = overflow_advice(model, "look at the weights and the samples")
            raise SparsightError(f"{type(model).__name__}: its logits hold NaN; {advice}")
        actual = self.logits(self.hidden(model, inputs).flatten(0, 1)).view_as(expected)
        limit = TOLERANCE.get(self.weight.dtype, 1e-4) * float(expected.abs().max())
        if float((actual - expected).abs().max()) > limit and self.bias is None:
            bare, wish = self._uncapped(actual).flatten().double(), self._uncapped(expected).flatten().double()
            self.scale *= float((bare @ wish) / (bare @ bare).clamp_min(1e-30))
            actual = self.logits(self.hidden(model, inputs).flatten(0, 1)).view_as(expected)
        if not float((actual - expected).abs().max()) <= limit:
            raise SparsightError(
                f"{type(model).__name__} changes its logits behind the output head in a way that Sparsight does not know; "
                "it cannot be restored"
            )

    def _uncapped(self, logits: torch.Tensor) -> torch.Tensor:
        """Undo `capped`, up to nearly the cap."""
        return logits if self.cap is None else self.cap * torch.atanh((logits / self.cap).clamp(-0.999, 0.999))

    def _capture(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self._capturing:
            return None
        self._states = args[0]
        return (args[0][..., :0, :],)

    def _without_labels(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Drop the labels, so that the model computes no loss; shifted by one, they are the inputs of a decoder."""
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        if self.encoder_decoder and "decoder_input_ids" not in rest:
            if self.start is None:
                raise SparsightError(
                    "the configuration has no decoder_start_token_id; set it, or add decoder_input_ids to the batches"
                )
            labels = inputs["labels"]
            ids = labels.masked_fill(labels == -100, self.pad or 0)
            first = ids.new_full((len(ids), 1), self.start)
            rest["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
        return rest
