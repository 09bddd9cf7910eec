"""The weights of a folder that are written part by part: the files of `save_pretrained`, byte for byte, in any order.

Their layout is known from a model without weights. Every file gets its header and its full size at once, so that a full disk
is met at the start, and every tensor its place.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from sparsight.errors import SparsightError, first_line
from sparsight.model.skeleton import Unfit
from sparsight.model.stream import Stream
from sparsight.packing.headers import Header, header_entry, header_text, in_order, map_tensors, read_header
from sparsight.packing.shards import INDEX

try:
    from transformers.modeling_utils import remove_tied_weights_from_state_dict
except ImportError as error:  # a later transformers
    LACKS: str | None = first_line(error)
else:
    LACKS = None

LARGEST = "50GB"  # of a file, as in `save_pretrained`
ALIGN = 8  # bytes that a header is filled up to a multiple of
MOST = 2**30  # bytes written by one call


class PartFiles:
    """The files of weights of a stream's model, in `folder`; `write` puts the tensors of a part into their places."""

    folder: Path

    def __init__(self, stream: Stream, largest: int | str = LARGEST) -> None:
        """Plan the files. **Raises** `Unfit` where the parts alone are not stored as the whole model is."""
        if LACKS:
            raise Unfit(LACKS)
        self.stream = stream
        model = stream.model
        state = model.state_dict()
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, model)
        self._saved = {*state}
        whole = stream.as_stored(state)
        self.keys = {part: [*self._of(part)] for part in stream.parts}
        if sorted(key for keys in self.keys.values() for key in keys) != sorted(whole):
            raise Unfit("its checkpoint stores tensors of several blocks as one")
        split = split_torch_state_dict_into_shards(
            whole, filename_pattern="model{suffix}.safetensors", max_shard_size=largest
        )
        self.files = dict(split.filename_to_tensors)
        self.index = split.is_sharded and {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        self._place = {key: file for file, keys in self.files.items() for key in keys}
        self._headers = {file: _header({key: whole[key] for key in keys}) for file, keys in self.files.items()}

    def _of(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part, as it is now, in the form that they are stored in."""
        return self.stream.state(part, self._saved)

    def make(self) -> list[str]:
        """Write the headers and take the space of all tensors; files that are there already, with these headers, stay.

        Returns why files were made: they were not there, or damaged. **Raises** `OSError` for a full disk.
        """
        self.folder.mkdir(exist_ok=True)
        made = []
        for file, header in self._headers.items():
            path, text = self.folder / file, _text(header)
            size = len(text) + max((entry["data_offsets"][1] for entry in header.entries.values()), default=0)
            try:
                if read_header(path) == header:
                    continue
                made.append(f"{path}: holds other weights")
            except (SparsightError, OSError) as error:
                made.append(first_line(error) if isinstance(error, SparsightError) else f"{path}: {first_line(error)}")
            beside = path.with_name(f".{file}")
            with beside.open("wb") as stored:
                stored.write(text)
                _take_space(stored.fileno(), size)
                os.fsync(stored.fileno())
            beside.replace(path)
        return made

    def write(self, part: str) -> None:
        """Write a part that is in memory; on return it is on the disk."""
        opened: dict[str, int] = {}
        try:
            for key, tensor in self._of(part).items():
                file = self._place[key]
                if file not in opened:
                    opened[file] = os.open(self.folder / file, os.O_WRONLY | getattr(os, "O_BINARY", 0))
                header = self._headers[file]
                if (tensor.dtype, tuple(tensor.shape)) != header.form(key):
                    raise RuntimeError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, planned {header.form(key)}")
                _write(opened[file], tensor, header.start + header.entries[key]["data_offsets"][0])
            for descriptor in opened.values():
                os.fsync(descriptor)
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    def read(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a part from the files, under their names there."""
        files: dict[str, list[str]] = {}
        for key in self.keys[part]:
            files.setdefault(self._place[key], []).append(key)
        tensors: dict[str, torch.Tensor] = {}
        for file, keys in files.items():
            tensors |= map_tensors(self.folder / file, keys)
        return tensors

    def put_into(self, folder: Path) -> None:
        """Give the files a second name in another folder, and write the index there: what fails later loses nothing."""
        for file in self.files:
            try:
                os.link(self.folder / file, folder / file)
            except OSError:  # a file system without links
                (self.folder / file).replace(folder / file)
        if self.index:
            (folder / INDEX).write_text(json.dumps(self.index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, torch.Tensor]) -> Header:
    """The header of a file with these tensors, in the order in which safetensors writes them."""
    forms = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    entries: dict[str, Any] = {}
    end = 0
    for key in in_order(forms):
        entries[key] = header_entry(*forms[key], end)
        end = entries[key]["data_offsets"][1]
    header = Header(entries, {"format": "pt"}, 0)
    return Header(entries, header.metadata, len(_text(header)))


def _text(header: Header) -> bytes:
    text = header_text({"__metadata__": header.metadata, **header.entries})
    text = text.ljust(-(-len(text) // ALIGN) * ALIGN)
    return len(text).to_bytes(8, "little") + text


def _take_space(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # not of this file system
                raise
    os.truncate(descriptor, size)  # macOS and Windows, too


def _write(descriptor: int, tensor: torch.Tensor, place: int) -> None:
    """Write a tensor's bytes at a place of a file."""
    data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    while data:
        count = _write_at(descriptor, data[:MOST], place)
        data, place = data[count:], place + count


def _write_at(descriptor: int, data: memoryview, place: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, place)
    os.lseek(descriptor, place, os.SEEK_SET)  # Windows
    return os.write(descriptor, data)
