"""From numbered samples to the inputs of a batch, in the process of the training or in workers beside it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsight.errors import SparsightError
from sparsight.restoring.teacher_cache import TeacherCache

SKIPPED, FAULT = "skipped", "fault"  # keys of a batch beside its inputs


@dataclass(frozen=True)
class Collator:
    """Encodes samples, and looks up the teacher's hidden states where they are on disk.

    It holds no model, so that workers can have a copy of it. What the encoder leaves out comes back with the batch, under
    "skipped", and so does an error, under "fault": a worker's own would arrive as a traceback.
    """

    encoder: Any
    cache: TeacherCache | None = None
    spare: tuple[int, Any] | None = None  # a sample that the model takes, in place of a batch of broken ones alone

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """The inputs of a batch of (number, sample)."""
        before = len(self.encoder.skipped)
        try:
            inputs = self._encode(numbered)
        except SparsightError as error:
            try:
                inputs = self._encode([self.spare] if self.spare else numbered)
            except SparsightError:
                return {FAULT: str(error), "labels": torch.full((1, 1), -100)}
        inputs[SKIPPED] = self.encoder.skipped[before:]
        del self.encoder.skipped[before:]
        return inputs

    def _encode(self, numbered: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        inputs: dict[str, Any] = dict(self.encoder.encode([sample for _, sample in numbered]).inputs)
        if self.cache is not None:
            inputs["taught"] = torch.cat([self.cache[number] for number, _ in numbered])
        return inputs


def receive(batch: dict[str, Any], encoder: Any) -> dict[str, Any]:
    """Take out of a batch, in place, what is no input; the samples left out are listed in the encoder.

    **Raises** `SparsightError` for a batch that could not be made.
    """
    if FAULT in batch:
        raise SparsightError(batch[FAULT])
    encoder.skipped += batch.pop(SKIPPED, ())
    return batch


@contextlib.contextmanager
def quiet_workers(workers: int) -> Iterator[None]:
    """Keep tokenizers from threads, and from their warning of it, in processes that are forked inside the block."""
    name = "TOKENIZERS_PARALLELISM"
    if not workers or name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
