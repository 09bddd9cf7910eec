"""Checkpoints of training, which hold hashes of their files, and the factors in a file of our own.

Stock PEFT would read its own format as a dense LoRA, so that format is not written.
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparsight.errors import SparsightError, first_line
from sparsight.files import replace_file
from sparsight.restoring.peft_layers import factors

COMPLETE = "complete.json"  # written last: the hash of every other file of the checkpoint
FACTORS = "sparse_lora.safetensors"
logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Mark `folder` as complete: write the hashes of all its files."""
    (folder / COMPLETE).write_text(json.dumps(_hashes(folder), indent=1), encoding="utf-8")


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete and undamaged; hashes every file."""
    try:
        return json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")) == _hashes(checkpoint)
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder` that is whole, with a whole best one if it names one; None without any.

    Damaged ones are named in the log.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if is_whole(path) and ((best := _best(path)) is None or is_whole(folder / best)):
            return path
        logger.warning("%s is damaged or was never finished; going on from an earlier one", path)
    return None


def go_back(folder: Path) -> Path | None:
    """Return the checkpoint to resume from, and delete all later ones, which a limit on their number would keep."""
    last = last_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        if last is None or _step(path) > _step(last):
            shutil.rmtree(path)
    return last


def _best(checkpoint: Path) -> str | None:
    """Return the name of the best checkpoint in this one's state."""
    state = checkpoint / "trainer_state.json"
    best = json.loads(state.read_text(encoding="utf-8"))["best_model_checkpoint"] if state.is_file() else None
    return Path(best).name if best else None


def save_factors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the factors, as `factor_tensors` returns them, into `folder`."""
    with replace_file(folder / FACTORS) as beside:
        save_file(dict(tensors), beside)


def load_factors(wrapped: Any, folder: Path) -> None:
    """Read the factors of `folder` into the wrapped model, in place; errors as in `load_factor_tensors`."""
    load_factor_tensors(wrapped, read_factors(folder))


def read_factors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the factors of `folder`. **Raises** `SparsightError` for a file that cannot be read, or is damaged."""
    try:
        return load_file(folder / FACTORS)
    except (OSError, SafetensorError) as error:
        what = "cannot be read" if isinstance(error, OSError) else "is damaged"
        raise SparsightError(f"{folder / FACTORS}: {what} ({first_line(error)}); copy the adapter again") from error


def factor_tensors(wrapped: Any) -> dict[str, torch.Tensor]:
    """Return copies of all trained tensors, whole and on the CPU; every process of a sharded model must call it."""
    return {key: _whole(factor.detach()).cpu().clone() for key, factor in factors(wrapped).items()}


@torch.no_grad()
def load_factor_tensors(wrapped: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors` into the factors, in place; **raises** `SparsightError` if one is absent or of another shape."""
    targets: dict[str, Any] = dict(factors(wrapped))
    for key, factor in targets.items():
        value = tensors.get(key)
        if value is None or value.shape != factor.shape:
            raise SparsightError(f"the adapter file has no {key} of shape {tuple(factor.shape)}; it is of another model")
        if hasattr(factor, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(factor.device), factor.device_mesh, factor.placements)
        factor.copy_(value)


def gather(wrapped: Any, here: bool) -> None:
    """Make a sharded model whole again on the CPU, in place, if it is wanted `here`; every process must call it."""
    divided = False
    for module in wrapped.modules():
        for name, parameter in module._parameters.items():
            if hasattr(parameter, "full_tensor"):
                whole, divided = _whole(parameter.detach()), True
                if here:
                    module._parameters[name] = torch.nn.Parameter(whole.cpu(), requires_grad=parameter.requires_grad)
    if divided and here:
        for module in wrapped.modules():  # their `cpu` would shard again
            module._buffers |= {name: buffer.cpu() for name, buffer in module._buffers.items() if buffer is not None}


def _whole(factor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a factor that FSDP may have sharded."""
    return factor.full_tensor() if hasattr(factor, "full_tensor") else factor


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != COMPLETE:
            with path.open("rb") as file:
                hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return hashes
