"""A model to work on block by block, or as a whole where it must be."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsight.checkpoint.parts import PartFiles
from sparsight.checkpoint.unfinished import SPACE
from sparsight.errors import Notice
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.families import Family
from sparsight.model.load import load, load_model, load_processor, read_config
from sparsight.model.skeleton import Unfit
from sparsight.model.stream import Stream
from sparsight.pruning.compose import Composition
from sparsight.pruning.journal import Journal
from sparsight.pruning.streamed import StreamJournal


@dataclass(frozen=True)
class Way:
    """A model to prune: whole in memory, or with one block in memory at a time, which then goes to `files`."""

    model: Any
    processor: Any
    anatomy: Anatomy
    files: PartFiles | None = None

    def run(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the model can run."""
        return contextlib.nullcontext() if self.files is None else self.files.stream.run()

    def journal(self, folder: Path, composition: Composition) -> Journal | StreamJournal:
        """Where pruned blocks are kept until all are done."""
        if self.files is None:
            return Journal(folder, composition.mask_only)
        self.files.folder = folder / SPACE
        return StreamJournal(self.files, folder / "done", dense=composition.propagate == "dense")


def open_way(
    model: str | Path,
    family: Family | None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    whole: bool = False,
    loaded: tuple[Any, Any] | None = None,
) -> Way:
    """Open a model block by block, or load it as a `whole`, where method or policy need that.

    `loaded` has the model and its processor in memory already. **Raises** `SparsightError` as `load` does.
    """
    if loaded is not None or whole:
        network, processor = loaded or load(model, dtype=dtype, device=device)
        return Way(network, processor, anatomy(network, family))
    read_config(str(model))
    processor = load_processor(model)  # first, since it is quick
    try:
        stream = Stream(model, dtype=dtype, device=device, family=family)
        files = PartFiles(stream)
        stream.bring_outside()
        return Way(stream.model, processor, stream.anatomy, files)
    except Unfit as why:
        network = load_model(model, dtype=dtype, device=device)
        warnings.warn(f"{model}: was loaded as a whole, since it cannot be block by block: {why}", Notice, stacklevel=2)
        return Way(network, processor, anatomy(network, family))
