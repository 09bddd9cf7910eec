"""Cut samples into encoded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparsight.data.encoding import Batch, Encoder
from sparsight.data.sample import Sample
from sparsight.data.sources import reasons
from sparsight.errors import SparsightError


def batches(samples: Sequence[Sample], encoder: Encoder, size: int) -> Iterator[Batch]:
    """Encode samples in order, `size` of them at a time.

    A batch has fewer rows than `size` where the encoder skips samples, more where it makes a row of every turn.
    **Raises** `SparsightError` for a size below 1, and if every sample is skipped.
    """
    if size < 1:
        raise SparsightError(f"a batch needs a size of at least 1, got {size}")
    empty = True
    for start in range(0, len(samples), size):
        batch = encoder.attempt(samples[start : start + size])
        if batch is not None:
            empty = False
            yield batch
    if empty:
        why = reasons(reason for _, reason in encoder.skipped)
        raise SparsightError(f"none of {len(samples)} samples can be encoded" + (f": {why}" if why else ""))
