"""One sample through the model before the work begins: a processor that does not belong to it is refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsight.calibration.gradients import evaluating
from sparsight.data.encoding import Encoder
from sparsight.data.sample import Sample
from sparsight.errors import SparsightError, first_line, quote
from sparsight.model.skeleton import device_of


def rehearse(model: Any, encoder: Encoder, samples: Sequence[Sample]) -> None:
    """Run one sample, the first with an image, through the model, which stays as it is.

    **Raises** `SparsightError` where the model cannot take what its processor writes: image tokens of another number or
    name than its own, images of another size.
    """
    sample = next((each for each in samples if each.images), samples[0])
    inputs = encoder.encode([sample]).to(device_of(model)).inputs
    try:
        with torch.no_grad(), evaluating(model):
            model(**inputs)
    except (ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            raise
        raise SparsightError(
            f"sample {quote(sample.id)}: the model cannot take what its processor writes: {first_line(error)}; give the "
            "processor that was saved with the model"
        ) from error
