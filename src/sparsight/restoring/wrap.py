"""SparseLoRA on a model in memory, for a training loop of the user's own."""

from __future__ import annotations

from typing import Any

from sparsight.checkpoint.folder import family_of
from sparsight.errors import SparsightError
from sparsight.model.anatomy import anatomy
from sparsight.restoring.peft_layers import adapted_modules, add_adapters
from sparsight.restoring.student import adapter_targets
from sparsight.restoring.teacher import read_masks
from sparsight.specs import RestoreSpec


def wrap_model(model: Any, spec: RestoreSpec) -> Any:
    """Put the adapter of `spec` on a model with zeros, in place; returns the `PeftModel`.

    **Raises** `SparsightError` for a model without zeros, and where no layer is left to train.
    """
    body = anatomy(model, family_of(None, spec.family))
    masks = read_masks(body)
    if not masks:
        raise SparsightError("the model holds no zeros; prune it first, or load a sparse folder")
    return add_adapters(model, adapter_targets(body, masks, spec), alpha=spec.alpha, seed=spec.seed)


def merge_model(wrapped: Any) -> Any:
    """Merge the adapters into the weights; returns the plain model, the object that was wrapped.

    **Raises** `SparsightError` for a model without adapters of `sparse_lora`.
    """
    if not hasattr(wrapped, "merge_and_unload") or not adapted_modules(wrapped):
        raise SparsightError(f"{type(wrapped).__name__} has no adapters to merge; give what `sparse_lora` returned")
    return wrapped.merge_and_unload()
