"""One process or many: what `torchrun` and `accelerate launch` start, seen from the verbs.

Every process runs the whole verb; what only one may do (write, speak) the main one does, and the others wait for it.
With one process everything here is a no-op.
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
from torch import distributed

from sparsight.errors import SparsightError

LONGEST = datetime.timedelta(days=1)  # to wait for a process that is at work; one that died, the launcher sees at once
SMALL = 2**20  # bytes of a tensor that is sent together with others
_alone = False  # while the main process does what the others wait for


def place() -> int:
    """This process's place among those the launcher started, whether they have joined or not; 0 is the main one."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def start(device: str = "cpu") -> None:
    """Join the group that the launcher's environment describes, if it describes one of several processes.

    On GPUs every process takes one of its own: `cuda` means that one from then on. `SparsightError` if there are too few,
    or if all were told to take the same.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or distributed.is_initialized():
        return
    if torch.device(device).type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if torch.device(device).index is not None:
            raise SparsightError(f"--device: {device} is one GPU, and every process takes its own; use --device cuda")
        if local >= there:
            raise SparsightError(f"--device: torch sees {there} GPUs for more processes than that; start {there} of them")
        torch.cuda.set_device(local)
        distributed.init_process_group("nccl", timeout=LONGEST, device_id=torch.device("cuda", local))
    else:
        distributed.init_process_group("gloo", timeout=LONGEST)
    atexit.register(_leave)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() and not _alone else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() and not _alone else 0


def is_main() -> bool:
    return rank() == 0


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        distributed.barrier()


def agreed(value: Any, source: int = 0) -> Any:
    """What process `source`, the main one if not said, has for `value`, in every process; its tensors bit for bit.

    Tensors on the devices that the group talks through travel as they are, and arrive on the receiver's own device.
    """
    if count() < 2:
        return value
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mine = rank() == source
    tensors: list[torch.Tensor] = []
    box: list[Any] = [_written(value, device, tensors) if mine else None]
    distributed.broadcast_object_list(box, src=source)
    text, forms = box[0]
    if not mine:
        tensors += [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in forms]
    _broadcast([_bytes(tensor) for tensor in tensors], source)
    return value if mine else _Reader(text, tensors).load()


def _broadcast(tensors: list[torch.Tensor], source: int) -> None:
    """Fill bytes (n,) with those that process `source` has; small ones go as one, since each takes a millisecond."""
    small = [tensor for tensor in tensors if len(tensor) < SMALL]
    for tensor in tensors:
        if len(tensor) >= SMALL:
            distributed.broadcast(tensor, src=source)
    if small:
        joined = torch.cat(small)
        distributed.broadcast(joined, src=source)
        for tensor, part in zip(small, joined.split([len(tensor) for tensor in small]), strict=True):
            tensor.copy_(part)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes (n,) of a tensor: of its own storage if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _written(value: Any, device: str, tensors: list[torch.Tensor]) -> tuple[bytes, list[tuple[torch.Size, torch.dtype]]]:
    """Pickle a value without its tensors on `device`, which are added to `tensors`; with their shapes and dtypes."""
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


def each(value: Any) -> Iterator[Any]:
    """What every process has for `value`, in the order of their ranks, one at a time; every process takes them all."""
    for source in range(count()):
        yield agreed(value, source)


def together(mine: Mapping[int, Any]) -> dict[int, Any]:
    """The entries of all processes, each of which has keys of its own, in the order of the keys."""
    every = {key: value for theirs in each(mine) for key, value in theirs.items()}
    return {key: every[key] for key in sorted(every)}


def by_main(work: Callable[[], Any]) -> Any:
    """What `work` gives in the main process, in every process. The others wait: to `work` there is one process.

    A `SparsightError` is raised in all of them.
    """
    global _alone
    found, before = None, _alone
    if is_main():
        _alone = True
        try:
            found = work()
        except SparsightError as error:
            found = error
        finally:
            _alone = before
    found = agreed(found)
    if isinstance(found, SparsightError):
        raise found
    return found
