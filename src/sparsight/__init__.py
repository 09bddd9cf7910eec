"""Sparse vision-language models that still work: plan, prune, restore, evaluate, verify.

The verbs are functions in `sparsight.verbs`; nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsight.errors import SparsightError

if TYPE_CHECKING:
    from sparsight.model.anatomy import anatomy
    from sparsight.model.families import Family
    from sparsight.model.load import load
    from sparsight.plan.pattern import Pattern
    from sparsight.prune.lockstep import lockstep
    from sparsight.restore.adapter import load_adapter

__version__ = "0.1.0"
__all__ = ["Family", "Pattern", "SparsightError", "anatomy", "load", "load_adapter", "lockstep"]

_LATER = {
    "Family": "sparsight.model.families",
    "Pattern": "sparsight.plan.pattern",
    "anatomy": "sparsight.model.anatomy",
    "load": "sparsight.model.load",
    "load_adapter": "sparsight.restore.adapter",
    "lockstep": "sparsight.prune.lockstep",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sparsight' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
