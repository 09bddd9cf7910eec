"""How many tokens a model takes: the positions of its text model and of its Q-Former, and what its tokenizer says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SANE = 10**6  # a tokenizer without a limit says 10**30


@dataclass(frozen=True)
class Limits:
    """The most tokens of a sample, None where there is no limit.

    `fixed` and `qformer` are tables of positions, and a longer sample cannot run. `usual` is only what the model was made
    for, and `source` says where that stands.
    """

    fixed: int | None = None
    qformer: int | None = None
    usual: int | None = None
    source: str = ""

    @classmethod
    def of(cls, config: Any, processor: Any) -> Limits:
        """The limits in a model's config, else in its tokenizer."""
        text = config.get_text_config()
        positions = _number(getattr(text, "max_position_embeddings", None))
        rotary = any(getattr(text, key, None) for key in ("rope_parameters", "rope_scaling", "rope_theta"))
        reader = getattr(config, "qformer_config", None)
        reads = getattr(reader, "use_qformer_text_input", True) and getattr(processor, "qformer_tokenizer", None) is not None
        qformer = _number(getattr(reader, "max_position_embeddings", None)) if reads else None
        if positions is not None:
            return cls(None if rotary else positions, qformer, positions, "positions of the model")
        said = _number(getattr(getattr(processor, "tokenizer", None), "model_max_length", None))
        return cls(None, qformer, said, "tokens of its tokenizer")

    def too_long(self, inputs: dict[str, Tensor], max_length: int | None, *, usual: bool) -> list[str | None]:
        """Why each row of encoded inputs is too long, None where it is not; `usual` says whether that limit counts, too.

        A `max_length` of the user's own stands for the usual limit.
        """
        lengths = inputs["attention_mask"].sum(1)
        if "decoder_attention_mask" in inputs:
            lengths = torch.maximum(lengths, inputs["decoder_attention_mask"].sum(1))
        questions = (
            inputs["qformer_attention_mask"].sum(1) if "qformer_attention_mask" in inputs else torch.zeros_like(lengths)
        )
        return [self._reason(*row, max_length, usual) for row in zip(lengths.tolist(), questions.tolist(), strict=True)]

    def _reason(self, tokens: int, question: int, max_length: int | None, usual: bool) -> str | None:
        if max_length is not None and tokens > max_length:
            return f"{tokens} tokens, more than `max_length={max_length}`; shorten its texts, or raise `max_length`"
        if self.fixed is not None and tokens > self.fixed:
            return f"{tokens} tokens, more than the {self.fixed} positions of the model; shorten its texts"
        if self.qformer is not None and question > self.qformer:
            return f"a question of {question} tokens, more than the {self.qformer} positions of the Q-Former; shorten it"
        if usual and max_length is None and self.usual is not None and tokens > self.usual:
            return f"{tokens} tokens, more than the {self.usual} {self.source}; shorten its texts, or set `max_length`"
        return None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < SANE else None


def vocabulary(model: Any) -> int | None:
    """The number of embeddings of a model; None where it is not known, as from a configuration alone."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        words = find() if find else None
    except NotImplementedError:
        return None
    if not isinstance(words, torch.nn.Embedding):
        return None
    return words.num_embeddings + getattr(words, "num_additional_embeddings", 0)
