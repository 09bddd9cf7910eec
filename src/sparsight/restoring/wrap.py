"""SparseLoRA on a model in memory, for a training loop of the user's own."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear

from sparsight.checkpoint.folder import family_of
from sparsight.errors import SparsightError
from sparsight.model.anatomy import anatomy
from sparsight.model.source import check_model
from sparsight.options import options
from sparsight.restoring.peft_layers import MaskedTuner, adapted_modules, add_adapters
from sparsight.restoring.student import adapter_targets
from sparsight.restoring.teacher import read_masks
from sparsight.specs import RestoreSpec

FIELDS = ("adapter", "rank", "alpha", "tune", "seed", "family")  # of `RestoreSpec`: what is trained


def sparse_lora(model: Any, *, spec: RestoreSpec | None = None, **settings: Any) -> Any:
    """Put SparseLoRA on a model with zeros, in place, for a training loop of your own; returns the PEFT model.

    Its pruned layers, and the connector's, train factors under the mask of their zeros; everything else is frozen. Of
    the settings of `restore` it uses `adapter`, `rank`, `alpha`, `tune`, `seed` and `family`. Train it with plain torch,
    Trainer, TRL or accelerate; then `merge` gives a plain model.

    **Raises** `SparsightError` for a model without zeros, where no layer is left to train, and for settings of the training
    itself.
    """
    spec = RestoreSpec.make(spec, settings)
    check_model(model)
    defaults = RestoreSpec()
    for field in options(RestoreSpec):
        if field not in FIELDS and getattr(spec, field) != getattr(defaults, field):
            raise SparsightError(f"`{field}`: is for your own training loop to set; leave it out")
    body = anatomy(model, family_of(None, spec.family))
    masks = read_masks(body)
    if not masks:
        raise SparsightError("the model holds no zeros; prune it first, or load a sparse folder")
    targets = adapter_targets(body, masks, spec)
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        wrapped = add_adapters(model, targets, alpha=spec.alpha, seed=spec.seed)
    except BaseException:
        remove_adapters(model)
        _put_back(before)
        raise
    wrapped.requires_grad_before = before
    return wrapped


def merge(wrapped: Any) -> Any:
    """Merge the adapters of `sparse_lora` into the weights; returns the plain model, the object that was wrapped.

    Every zero is kept, unless the adapter is `lora`, whose merge is dense. Every parameter requires gradients as it did
    before. **Raises** `SparsightError` for a model without such adapters.
    """
    if not hasattr(wrapped, "merge_and_unload") or not adapted_modules(wrapped):
        raise SparsightError(
            f"{type(wrapped).__name__} has no adapters to merge; give what `sparse_lora` returned, without a wrapper of "
            "accelerate or torch"
        )
    merged = wrapped.merge_and_unload()
    _put_back(getattr(wrapped, "requires_grad_before", ()))
    return merged


def remove_adapters(model: Any) -> None:
    """Take all adapters off a model, in place, without merging them."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear | MaskedTuner):
                setattr(parent, name, child.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _put_back(flags: Any) -> None:
    for p, flag in flags:
        p.requires_grad_(flag)
