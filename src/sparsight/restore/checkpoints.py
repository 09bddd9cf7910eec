"""What training leaves on its way: checkpoints that say whether they are whole, and the factors in a file of our own.

Stock PEFT would take its own format for a dense LoRA, so there is none of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsight import processes
from sparsight.errors import SparsightError
from sparsight.restore.sparse_lora import factors

COMPLETE = "complete.json"  # what a checkpoint gets last: the hash of every other file
FACTORS = "sparse_lora.safetensors"
logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Write down that `folder` is whole, and what is in it."""
    (folder / COMPLETE).write_text(json.dumps(_hashes(folder), indent=1), encoding="utf-8")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and is undamaged."""
    try:
        return json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")) == _hashes(checkpoint)
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is whole, and the best one until then with it.

    Says on the log which ones it passes over.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if is_whole(path) and ((best := _best(path)) is None or is_whole(folder / best)):
            return path
        logger.warning("%s is damaged or was never finished; going on from an earlier one", path)
    return None


def go_back(folder: Path) -> Path | None:
    """The checkpoint to go on from; what was passed over is deleted, or a limit on their number would keep it instead."""
    found = last_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        if found is None or _step(path) > _step(found):
            shutil.rmtree(path)
    return found


def _best(checkpoint: Path) -> str | None:
    """The name of the best checkpoint that this one remembers."""
    state = checkpoint / "trainer_state.json"
    best = json.loads(state.read_text(encoding="utf-8"))["best_model_checkpoint"] if state.is_file() else None
    return Path(best).name if best else None


def save_factors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    save_file(dict(tensors), folder / FACTORS)


def load_factors(wrapped: Any, folder: Path) -> None:
    load_factor_tensors(wrapped, load_file(folder / FACTORS))


def factor_tensors(wrapped: Any) -> dict[str, torch.Tensor]:
    """Everything that is trained, whole and on the CPU; every process of a sharded model has to call it."""
    return {key: _whole(factor.detach()).cpu().clone() for key, factor in factors(wrapped).items()}


@torch.no_grad()
def load_factor_tensors(wrapped: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the factors back, in place; every one must be there in its shape."""
    held: dict[str, Any] = dict(factors(wrapped))
    for key, factor in held.items():
        found = tensors.get(key)
        if found is None or found.shape != factor.shape:
            raise SparsightError(f"the adapter file has no {key} of shape {tuple(factor.shape)}; it is of another model")
        if hasattr(factor, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            found = distribute_tensor(found.to(factor.device), factor.device_mesh, factor.placements)
        factor.copy_(found)


def gather(wrapped: Any) -> None:
    """Make a sharded model whole again, in place, in the main process; every process has to call it."""
    for module in wrapped.modules():
        for name, parameter in module._parameters.items():
            if hasattr(parameter, "full_tensor"):
                whole = _whole(parameter.detach())
                if processes.is_main():
                    module._parameters[name] = torch.nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _whole(factor: torch.Tensor) -> torch.Tensor:
    """A factor that FSDP has sharded, gathered."""
    return factor.full_tensor() if hasattr(factor, "full_tensor") else factor


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return found
