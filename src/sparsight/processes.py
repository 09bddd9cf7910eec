"""One process or many: what `torchrun` and `accelerate launch` start, seen from the verbs.

Every process runs the whole verb; what only one may do (write, speak) the main one does, and the others wait for it.
With one process everything here is a no-op.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed


def start(device: str = "cpu") -> None:
    """Join the group that the launcher's environment describes, if it describes one of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl")
    else:
        distributed.init_process_group("gloo")


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        distributed.barrier()


def agreed(value: Any) -> Any:
    """What the main process has for `value`, in every process."""
    if count() < 2:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
