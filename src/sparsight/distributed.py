"""One process or many, as started by `torchrun` or `accelerate launch`.

Every process runs the whole verb; only the main one writes and prints, and the others wait for it. With one process every
function here does nothing.
"""

from __future__ import annotations

import atexit
import datetime
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed as dist

from sparsight.errors import SparsightError
from sparsight.memory import main_device

TIMEOUT = datetime.timedelta(days=1)  # of waiting for a process that works; the launcher stops the others if one dies
SMALL = 2**20  # bytes of a tensor that is sent together with others
_alone = False  # while the main process does what the others wait for


def several_processes() -> bool:
    """Whether a launcher started several processes, before or after `init`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_rank() -> int:
    """Return the rank that the launcher gave this process, before or after `init`; 0 is the main one."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def init(device: str = "cpu") -> None:
    """Join the process group of the launcher's environment variables; nothing to do for a single process.

    On GPUs every process takes one of its own, which is `cuda` from then on.

    **Raises** `SparsightError` if there are too few GPUs, or if `device` is one GPU for all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if main_device(device).type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if main_device(device).index is not None:
            raise SparsightError(f"`device`: {device} is one GPU, and every process takes its own; use `device=cuda`")
        if local >= there:
            raise SparsightError(f"`device`: torch sees {there} GPUs for more processes than that; start {there} of them")
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes; 1 without a group, and inside `on_main`."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def sharded() -> bool:
    """Whether accelerate divides the model among several processes (FSDP), each of which could hold a part only."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and world_size() > 1


def rank() -> int:
    """Return this process's rank; 0 without a group, and inside `on_main`."""
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def is_main() -> bool:
    """Whether this process has rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()


def broadcast(value: Any, source: int = 0) -> Any:
    """Return the `value` of process `source` in every process, its tensors bit for bit.

    Tensors on the group's kind of device are sent without pickling, and arrive on the receiver's own device.
    """
    if world_size() < 2:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = rank() == source
    tensors: list[torch.Tensor] = []
    box: list[Any] = [_written(value, device, tensors) if mine else None]
    dist.broadcast_object_list(box, src=source)
    text, forms = box[0]
    if not mine:
        tensors += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms]
    _broadcast([_bytes(tensor) for tensor in tensors], source)
    return value if mine else _Reader(text, tensors).load()


def _broadcast(tensors: list[torch.Tensor], source: int) -> None:
    """Fill byte tensors (n,) with those of process `source`, in place; small ones in one call, which takes a millisecond."""
    small = [tensor for tensor in tensors if len(tensor) < SMALL]
    for tensor in tensors:
        if len(tensor) >= SMALL:
            dist.broadcast(tensor, src=source)
    if small:
        joined = torch.cat(small)
        dist.broadcast(joined, src=source)
        for tensor, part in zip(small, joined.split([len(tensor) for tensor in small]), strict=True):
            tensor.copy_(part)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes (n,) of a tensor: a view of its storage if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _written(value: Any, device: str, tensors: list[torch.Tensor]) -> tuple[bytes, list[tuple[torch.Size, torch.dtype]]]:
    """Pickle a value without its tensors on `device`, and add those to `tensors`; their shapes and dtypes come second."""
    file = io.BytesIO()
    _Writer(file, device, tensors).dump(value)
    return file.getvalue(), [(tensor.shape, tensor.dtype) for tensor in tensors]


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, device: str, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self.device, self.tensors = device, tensors

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, torch.Tensor) or thing.device.type != self.device:
            return None
        self.tensors.append(thing.detach())
        return len(self.tensors) - 1


class _Reader(pickle.Unpickler):
    def __init__(self, text: bytes, tensors: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(text))
        self.tensors = tensors

    def persistent_load(self, place: Any) -> torch.Tensor:
        return self.tensors[place]


def all_gather(value: Any) -> Iterator[Any]:
    """Yield the `value` of every process in the order of ranks, one at a time; every process must consume them all."""
    for source in range(world_size()):
        yield broadcast(value, source)


def gather_dict(mine: Mapping[int, Any]) -> dict[int, Any]:
    """Merge the mappings of all processes, whose keys differ, in the order of the keys."""
    every = {key: value for theirs in all_gather(mine) for key, value in theirs.items()}
    return {key: every[key] for key in sorted(every)}


def on_main(work: Callable[[], Any]) -> Any:
    """Run `work` in the main process and return its result in all; meanwhile `world_size()` is 1 there.

    **Raises** a `SparsightError` of `work` in every process.
    """
    global _alone
    result, before = None, _alone
    if is_main():
        _alone = True
        try:
            result = work()
        except SparsightError as error:
            result = error
        finally:
            _alone = before
    result = broadcast(result)
    if isinstance(result, SparsightError):
        raise result
    return result
