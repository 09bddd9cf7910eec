"""Sparse vision-language models that still work: plan, prune, restore, evaluate, verify.

The verbs take a model in memory, or a folder or hub name; see `sparsight.api`. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsight.errors import SparsightError
from sparsight.packing.hook import register_reader
from sparsight.version import VERSION

if TYPE_CHECKING:
    from sparsight.api import (
        ask,
        bench,
        diff,
        estimate,
        evaluate,
        inspect,
        pack,
        plan,
        prune,
        report,
        restore,
        run,
        search,
        sweep,
        unpack,
        verify,
    )
    from sparsight.calibration.lockstep import lockstep
    from sparsight.checkpoint.save import save
    from sparsight.masks.pattern import Pattern
    from sparsight.model.anatomy import anatomy
    from sparsight.model.families import Family
    from sparsight.model.load import load
    from sparsight.packing.linear import SparseLinear
    from sparsight.restoring.adapter_files import load_adapter
    from sparsight.restoring.wrap import merge, sparse_lora
    from sparsight.specs import BenchSpec, EvaluateSpec, PackSpec, PlanSpec, PruneSpec, RestoreSpec, SearchSpec

__version__ = VERSION

_API = (
    "ask", "bench", "diff", "estimate", "evaluate", "inspect", "pack", "plan", "prune", "report", "restore", "run",
    "search", "sweep", "unpack", "verify",
)  # fmt: skip
_SPECS = ("BenchSpec", "EvaluateSpec", "PackSpec", "PlanSpec", "PruneSpec", "RestoreSpec", "SearchSpec")
_HOMES = {
    **dict.fromkeys(_API, "api"),
    **dict.fromkeys(_SPECS, "specs"),
    "Family": "model.families",
    "Pattern": "masks.pattern",
    "anatomy": "model.anatomy",
    "load": "model.load",
    "load_adapter": "restoring.adapter_files",
    "lockstep": "calibration.lockstep",
    "SparseLinear": "packing.linear",
    "merge": "restoring.wrap",
    "save": "checkpoint.save",
    "sparse_lora": "restoring.wrap",
}

__all__ = [
    "BenchSpec", "EvaluateSpec", "Family", "PackSpec", "Pattern", "PlanSpec", "PruneSpec", "RestoreSpec", "SearchSpec",
    "SparseLinear", "SparsightError", "anatomy", "ask", "bench", "diff", "estimate", "evaluate", "inspect", "load",
    "load_adapter", "lockstep", "merge", "pack", "plan", "prune", "report", "restore", "run", "save",
    "search", "sparse_lora", "sweep", "unpack", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsight' has no attribute {name!r}")
    return getattr(import_module(f"sparsight.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_reader()
