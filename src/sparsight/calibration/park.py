"""Paused activations in files: what a walk keeps of its batches need not fit into memory.

A batch that waits in front of a block holds its hidden states, masks and inputs in the local variables of its forward. They
are copied into memory-mapped files without a name, and the tensors point there. The system keeps such files in its cache
while there is room, and writes them out when there is none. What is not found stays in memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from sparsight.memory import free_memory

PARK = ("auto", "always", "never")
LEAST = 2**16  # bytes; smaller tensors stay
SHARE = 0.25  # of the free memory, that `auto` leaves to paused batches
DEPTH = 4  # of containers in containers


class Park:
    """Copies tensors of paused forwards into files under `folder`; those of GPUs stay.

    `always` parks whatever is found, `auto` once all `batches` together would take more than `SHARE` of the free memory if
    each held as much as the present one, `never` nothing. `moved` counts the bytes that were copied.
    """

    def __init__(self, folder: Path, when: str = "auto", batches: int = 1) -> None:
        self.folder = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
        self.when, self.batches, self.moved = when, batches, 0
        self._areas: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by address

    def forward(self, frame: FrameType | None, *others: Any) -> None:
        """Park the tensors in the local variables of a forward, from its innermost frame outwards, and in `others`."""
        if self.when == "never":
            return
        values: list[Any] = [*others]
        while frame is not None:
            values += frame.f_locals.values()
            frame = frame.f_back
        self.tensors(values)

    def tensors(self, values: Iterable[Any]) -> None:
        """Park the tensors among values, and in lists, tuples and dicts of them; views of a storage go together."""
        if self.when == "never":
            return
        groups: dict[int, list[torch.Tensor]] = {}
        seen: set[int] = set()
        for tensor in _tensors(values, DEPTH):
            if id(tensor) in seen or isinstance(tensor, nn.Parameter) or tensor.device.type != "cpu" or tensor.is_sparse:
                continue
            seen.add(id(tensor))
            storage = tensor.untyped_storage()
            if storage.nbytes() >= LEAST and storage.data_ptr() not in self._areas:
                groups.setdefault(storage.data_ptr(), []).append(tensor)
        if self.when == "auto" and groups:
            held = sum(tensors[0].untyped_storage().nbytes() for tensors in groups.values())
            if held * self.batches < SHARE * free_memory():
                return
            self.when = "always"
        for tensors in groups.values():
            self._move(tensors)

    @torch.no_grad()
    def _move(self, tensors: list[torch.Tensor]) -> None:
        old = tensors[0].untyped_storage()
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.truncate(old.nbytes())
            area = mmap.mmap(file.fileno(), old.nbytes())
        new = torch.frombuffer(area, dtype=torch.uint8).untyped_storage()
        new.copy_(old)
        self._areas[new.data_ptr()] = area
        self.moved += old.nbytes()
        for tensor in tensors:
            tensor.set_(new, tensor.storage_offset(), tensor.size(), tensor.stride())


def disk_folder() -> Path:
    """A folder for files beside no output: TMPDIR, else /var/tmp, which is on a disk where /tmp may be in memory."""
    lasting = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(lasting, os.W_OK):
        return lasting
    return Path(tempfile.gettempdir())


def _tensors(values: Iterable[Any], depth: int) -> Iterator[torch.Tensor]:
    """The tensors among values and inside containers, and those that they are views of."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
            if value._base is not None:
                yield value._base
        elif depth and isinstance(value, Mapping):
            yield from _tensors(value.values(), depth - 1)
        elif depth and isinstance(value, list | tuple | set):
            yield from _tensors(value, depth - 1)
