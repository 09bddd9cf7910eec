"""PaliGemma: images, a prefix with attention in both directions, and the answer as a causal suffix. One question only.

`token_type_ids` tells prefix (0) from suffix (1), in `generate` as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparsight.data.pixels import converts
from sparsight.data.sample import PLACEHOLDER, Sample


def refuse(sample: Sample) -> str | None:
    """Return why the model cannot take a sample (it has no image), or None."""
    return None if sample.images else "this model needs an image"


def prompts(processor: Any, samples: Sequence[Sample], config: Any) -> dict[str, Tensor]:
    """Encode the questions, padded on the left."""
    return _call(processor, samples, padding_side="left")


def encode(processor: Any, samples: Sequence[Sample], config: Any) -> dict[str, Tensor]:
    """Encode questions and answers, padded on the right; the processor makes the labels."""
    answers = [sample.turns[-1].answer.strip() for sample in samples]
    return _call(processor, samples, suffix=answers, padding_side="right")


def _call(processor: Any, samples: Sequence[Sample], **options: Any) -> dict[str, Tensor]:
    samples = [sample.with_system_in_prompt() for sample in samples]
    texts = [PLACEHOLDER * len(s.images) + s.prompt.replace(PLACEHOLDER, " ").strip() for s in samples]
    images = [sample.load_images(alpha=converts(processor)) for sample in samples]
    # tensors only afterwards: the processor makes the labels with numpy, which warns about tensors
    return dict(processor(images=images, text=texts, padding=True, **options).convert_to_tensors("pt"))
