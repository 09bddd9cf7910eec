"""One question about one picture, answered by one model or by two."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.calibration.gradients import evaluating
from sparsight.data import Sample, Turn
from sparsight.data.images import BadRecord, finder
from sparsight.data.images import Picture as Stored
from sparsight.errors import SparsightError
from sparsight.evaluation.generate import predict
from sparsight.fields import NEW_TOKENS
from sparsight.memory import enough_memory
from sparsight.model.load import check_device, load
from sparsight.model.source import NO_PROCESSOR, check_model
from sparsight.specs import EvaluateSpec


def answer(model: Any, image: Any, question: str, spec: EvaluateSpec, processor: Any = None) -> dict[str, Any]:
    """What a model in a folder or in memory writes: {"model", "answer", "seconds"}, the time without that of loading.

    **Raises** `SparsightError` for a picture that cannot be read, and for what the model cannot take.
    """
    sample = Sample("the question", (picture(image),), (Turn(question.strip(), ("?",)),))
    named = isinstance(model, str | Path)
    if named:
        check_device(spec.device)
    else:
        check_model(model, adapters=True, packed=True)
    with enough_memory(spec):
        network, writer = load(model, dtype=spec.dtype, device=spec.device) if named else (model, processor)
        if writer is None:
            raise SparsightError(NO_PROCESSOR)
        began = time.perf_counter()
        with evaluating(network):
            (text,) = predict(
                network, writer, [sample], beams=spec.beams or 1, max_new_tokens=spec.max_new_tokens or NEW_TOKENS,
                length_penalty=1.0 if spec.length_penalty is None else spec.length_penalty,
            )  # fmt: skip
    name = str(model) if named else type(model).__name__
    return {"model": name, "answer": text, "seconds": time.perf_counter() - began}


def picture(image: Any) -> Stored:
    """A picture in memory, or the file of one that decodes. **Raises** `SparsightError` for anything else."""
    if isinstance(image, Image.Image):
        return image
    path = Path(image)
    try:
        return finder(path.resolve().parent)(path.name)[0]
    except BadRecord as error:
        raise SparsightError(f"`image`: {error}") from error
