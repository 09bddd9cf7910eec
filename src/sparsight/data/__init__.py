"""From files to batches: samples, their sources, and their encoding with the model's own processor.

Reading samples needs neither torch nor transformers; `Encoder`, `Batch` and `batches` are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsight.data.sample import Sample, Turn
from sparsight.data.sources import Samples, Source, read, read_with

if TYPE_CHECKING:
    from sparsight.data.batching import batches
    from sparsight.data.encoding import Batch, Encoder

__all__ = ["Batch", "Encoder", "Sample", "Samples", "Source", "Turn", "batches", "read", "read_with"]

_LATER = {"Batch": "encoding", "Encoder": "encoding", "batches": "batching"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
