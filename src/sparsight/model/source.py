"""Where a model comes from: a folder or hub name, loaded when it is needed, or an object in memory."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from sparsight.errors import SparsightError
from sparsight.model.load import load_model, load_processor
from sparsight.packing.linear import check_dense, has_packed_layers

NO_PROCESSOR = "`processor`: samples are encoded by the model's own processor; give it, or batches of your own"


def check_model(model: Any, field: str = "model", *, adapters: bool = False, packed: bool = False) -> None:
    """Refuse what is no model of transformers and, unless they may be there, adapters and packed layers.

    **Raises** `SparsightError`, naming `field`.
    """
    if isinstance(model, str | Path):
        raise SparsightError(f"`{field}`: {model} is a folder or a hub name; `load` it first, and give the model in memory")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise SparsightError(
            f"`{field}`: {type(model).__name__} is no transformers model; give one in memory, a folder or a hub name"
        )
    if packed and has_packed_layers(model):
        return
    check_dense(model, field)
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise SparsightError(
            f"`{field}`: is quantized: its weights are codes, which cannot be pruned; load the original in bfloat16 or "
            "float32, and quantize the sparse model"
        )
    if not adapters and hasattr(model, "peft_config"):
        raise SparsightError(f"`{field}`: has adapters that are not merged; merge them first, as `sparsight.merge` does")


def in_memory(model: Any, spec: Any, *, adapters: bool = False, packed: bool = False, **of_folders: Any) -> Any:
    """The settings of a verb for a model in memory: its `device` is the model's own.

    **Raises** `SparsightError` as `check_model` does, for a `dtype` or `device` that is not the model's, and for whatever
    of a folder's (`of_folders`) is neither None nor False.
    """
    check_model(model, adapters=adapters, packed=packed)
    for name, value in of_folders.items():
        if value is not None and value is not False:
            raise SparsightError(
                f"`{name}`: belongs to a model in a folder, and this one is in memory; leave it out, and write the model by "
                "`sparsight.save`"
            )
    device, wish = next(model.parameters()).device, str(spec.device)
    if spec.dtype != type(spec)().dtype:
        raise SparsightError("`dtype`: a model in memory keeps its own; convert it yourself, and leave `dtype` out")
    if wish != type(spec)().device and wish not in (device.type, str(device)):
        raise SparsightError(f"`device`: the model is on {device}; move it yourself, and leave `device` out")
    return replace(spec, device=str(device))


class ModelSource:
    """A model that can be loaded, dropped and loaded again; one without a path is never dropped.

    A `model` with a path is in memory already, in the state that the files have. `borrowed`: somebody else uses it, so it
    is read and never given away to be changed. `noun` is what messages call a model without a path.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        model: Any = None,
        processor: Any = None,
        device: str = "cpu",
        borrowed: bool = False,
        noun: str = "the model",
    ) -> None:
        self.path, self.model, self.device, self.noun = path, model, device, noun
        self._processor, self._borrowed = processor, borrowed

    @property
    def name(self) -> str:
        """How messages call the model."""
        return str(self.path) if self.path is not None else self.noun

    @property
    def processor(self) -> Any:
        """The model's own processor, loaded at first use. **Raises** `SparsightError` for a model in memory without one."""
        if self._processor is None and self.path is None:
            raise SparsightError(NO_PROCESSOR)
        if self._processor is None:
            self._processor = load_processor(str(self.path))
        return self._processor

    def get(self, dtype: Any = "auto") -> Any:
        """The model, loaded in `dtype` if it is not in memory."""
        if self.model is None:
            self.model = load_model(str(self.path), dtype=dtype, device=self.device)
        return self.model

    def take(self, dtype: Any = "auto") -> Any:
        """The model, which is then somebody else's to change; with a path the next `get` loads it anew."""
        if self._borrowed:
            self.drop()
        model = self.get(dtype)
        if self.path is not None:
            self.model = None
        return model

    def drop(self) -> None:
        """Free the model if it can be loaded again."""
        if self.path is not None:
            self.model, self._borrowed = None, False
            gc.collect()  # a model points at itself
