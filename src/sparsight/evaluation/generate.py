"""Generate a model's answer to every sample's last question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsight.calibration.gradients import evaluating
from sparsight.data.encoding import Encoder
from sparsight.data.sample import Sample
from sparsight.model.skeleton import device_of
from sparsight.progress import Progress


def predict(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    beams: int = 1,
    max_new_tokens: int = 32,
    length_penalty: float = 1.0,
    progress: Progress | None = None,
) -> list[str]:
    """Generate an answer to each sample's last question, without sampling: greedy, or the best of `beams` beams.

    The answers come in the order of the samples, without the prompt, special tokens and surrounding space. Prompts of
    similar length share a batch. A beam's score is divided by its length to the power `length_penalty`.
    Penalties in the model's own generation config apply.
    """
    encoder = Encoder(processor, model)
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].images), len(samples[i].prompt), i))
    written: dict[int, str] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = encoder.prompts([samples[i] for i in rows])
            texts = _generate(model, processor.tokenizer, inputs, beams, max_new_tokens, length_penalty)
            written.update(zip(rows, texts, strict=True))
            if progress:
                progress("answers", len(written), len(samples))
    return [written[i] for i in range(len(samples))]


def _generate(
    model: Any, tokenizer: Any, inputs: dict[str, Tensor], beams: int, max_new_tokens: int, length_penalty: float
) -> list[str]:
    inputs = {key: tensor.to(device_of(model)) for key, tensor in inputs.items()}
    neutral = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # no warning about unused settings
    pad = {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
    pad |= {"length_penalty": length_penalty} if beams > 1 else {}
    with torch.no_grad():
        ids = model.generate(**inputs, num_beams=beams, max_new_tokens=max_new_tokens, **neutral, **pad)
    prompt = inputs["input_ids"]
    if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
        ids = ids[:, prompt.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
