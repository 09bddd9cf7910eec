"""Where a model comes from: a folder or hub name, loaded when it is needed, or an object in memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from sparsight.model.load import load_model, load_processor


class ModelSource:
    """A model that can be loaded, dropped and loaded again; one without a path is never dropped.

    A `model` with a path is in memory already, in the state that the files have. `borrowed`: somebody else uses it, so it
    is read and never given away to be changed.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        model: Any = None,
        processor: Any = None,
        device: str = "cpu",
        borrowed: bool = False,
    ) -> None:
        self.path, self.model, self.device = path, model, device
        self._processor, self._borrowed = processor, borrowed

    @property
    def name(self) -> str:
        """How messages call the model."""
        return str(self.path) if self.path is not None else "the model"

    @property
    def processor(self) -> Any:
        """The model's own processor, loaded at first use."""
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
        self.drop()
        return model

    def drop(self) -> None:
        """Free the model if it can be loaded again."""
        if self.path is not None:
            self.model, self._borrowed = None, False
            gc.collect()  # a model points at itself
