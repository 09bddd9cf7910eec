"""Cut samples into encoded batches, and batches into samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

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


def one_by_one(batch: Batch) -> Iterator[Batch]:
    """Cut a batch into batches of one row, on the same device.

    Its samples are encoded again; a user's batch is sliced where every input has a row per sequence, and else stays whole.
    """
    device = next(iter(batch.inputs.values())).device
    if batch.rows > 1 and batch.encode is not None and len(batch.samples) == batch.rows:
        for sample in batch.samples:
            yield batch.encode([sample]).to(device)
    elif batch.rows > 1 and all(_by_row(key, tensor, batch.rows) for key, tensor in batch.inputs.items()):
        for i in range(batch.rows):
            inputs = {key: tensor[i : i + 1] for key, tensor in batch.inputs.items()}
            yield Batch(inputs, {key: mask[i : i + 1] for key, mask in batch.padding.items()}, batch.samples[i : i + 1])
    else:
        yield batch


def _by_row(key: str, tensor: Tensor, rows: int) -> bool:
    """Whether an input has a row per sequence; positions of three kinds of tokens have them in their second dimension."""
    return tensor.dim() > 0 and len(tensor) == rows and not (key == "position_ids" and tensor.dim() == 3)
