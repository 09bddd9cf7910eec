"""The weights of a folder, file by file and tensor by tensor: never more than one tensor in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sparsight.errors import SparsightError, first_line
from sparsight.packing.headers import header_entry, header_text, map_tensors, read_header
from sparsight.packing.squeeze import squeeze, unsqueeze
from sparsight.packing.tensor import BITS, SCALE, Packed

METHOD, FORMAT = "sparsight", 1  # of `quantization_config`
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_layout(folder: str | Path) -> dict[str, Any] | None:
    """The `quantization_config` of a packed folder; None for any other. **Raises** `SparsightError` for another format."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise SparsightError(f"{path}: cannot be read ({first_line(error)}); pack the model again") from error
    layout = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(layout, dict) or layout.get("quant_method") != METHOD:
        return None
    check_layout(layout, str(folder))
    return layout


def check_layout(layout: Mapping[str, Any], where: str) -> None:
    """Refuse a layout of another format, or a damaged one, by a `SparsightError`."""
    if layout.get("format") != FORMAT:
        raise SparsightError(
            f"{where}: is packed in format {layout.get('format')!r}, and this version of Sparsight reads format {FORMAT}; "
            "use the version that packed it"
        )
    layers = layout.get("layers")
    good = isinstance(layers, Mapping) and all(map(_is_entry, layers.values()))
    if not good or layout.get("values") not in ("kept", "int8"):
        raise SparsightError(f"{where}: the quantization_config of config.json is damaged; pack the model again")


def _is_entry(entry: Any) -> bool:
    """Whether an entry of a layout is a shape and a number of values, or None."""
    if not isinstance(entry, list | tuple) or len(entry) != 2:
        return False
    shape, kept = entry
    sizes = [*shape, *([] if kept is None else [kept])] if isinstance(shape, list | tuple) and shape else [None]
    return all(isinstance(size, int) and size >= 0 for size in sizes)


def widths(layers: Mapping[str, Any]) -> dict[tuple[int, ...], int]:
    """Columns by the shape of bits: bits say them only to the next eight."""
    shapes = [tuple(shape) for shape, kept in layers.values() if kept is not None]
    return {(*shape[:-1], (shape[-1] + 7) // 8): shape[-1] for shape in shapes}


def expand(
    values: torch.Tensor,
    bits: torch.Tensor | None,
    scale: torch.Tensor | None,
    columns: int | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The dense tensor of what is stored; `columns` only with bits, `dtype` by default that of the values.

    **Raises** `SparsightError` for parts that do not belong together.
    """
    squeezed = values.dtype == torch.uint8 and values.ndim == 1
    values = unsqueeze(values) if squeezed else values
    if bits is None:
        return values.to(dtype or values.dtype)
    shape = (*bits.shape[:-1], 8 * bits.shape[-1] if columns is None else columns)
    return Packed(values, bits, shape, scale).expand(dtype)


class Shards:
    """The weights of a folder that `save_pretrained` or `pack` wrote; every tensor is read dense, under its plain name.

    **Raises** `SparsightError` for a folder without weights that transformers would load, and for damaged files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.layout = read_layout(folder)
        self.layers: Mapping[str, Any] = self.layout["layers"] if self.layout else {}
        self.int8 = (self.layout or {}).get("values") == "int8"
        self.dtype = self._model_dtype()  # of what int8 values stand for
        self._widths = widths(self.layers)
        self.files = self._find()
        self._places: dict[str, str] | None = None

    def _model_dtype(self) -> torch.dtype:
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return torch.float32
        parts = [config, *(part for part in config.values() if isinstance(part, dict))] if isinstance(config, dict) else []
        names = [part.get("dtype") or part.get("torch_dtype") for part in parts]
        return next(
            (dtype for name in names if isinstance(dtype := getattr(torch, str(name), None), torch.dtype)), torch.float32
        )

    def _find(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        try:
            places = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return sorted(set(places.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SparsightError(f"{self.folder}: no weights that transformers would load ({first_line(error)})") from error

    def read_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors, dense; where they are not packed they are mapped, each by itself: a change to one stays in memory."""
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in self._by_file(names).items():
            shard = self.open(file)
            plain = [name for name in wanted if name not in self.layers]
            tensors |= map_tensors(self.folder / file, plain)
            tensors |= {name: shard.read(name) for name in wanted if name in self.layers}
        return tensors

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        if self._places is None:
            self._places = self.names()
        files: dict[str, list[str]] = {}
        for name in names:
            files.setdefault(self._places[name], []).append(name)
        return files

    def open(self, file: str) -> Shard:
        """One file of weights."""
        return Shard(self, file)

    def forms(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every dense tensor, without reading one."""
        return {name: form for file in self.files for name, form in self.open(file).forms().items()}

    def names(self) -> dict[str, str]:
        """The file of every dense tensor, by its plain name."""
        return {name: file for file in self.files for name in self.open(file).names}


class Shard:
    """One file of weights, its tensors by their plain names."""

    def __init__(self, shards: Shards, file: str) -> None:
        self.path, self._shards = shards.folder / file, shards
        self._header = read_header(self.path)
        self.stored, self.metadata = sorted(self._header.entries), self._header.metadata
        inside = set(self.stored)
        parts = {name + part for name in shards.layers if name in inside for part in (BITS, SCALE)}
        self.names = [name for name in self.stored if name not in parts]

    def read(self, name: str) -> torch.Tensor:
        """The dense tensor. **Raises** `SparsightError` for damaged files."""
        entry = self._shards.layers.get(name)
        if entry is None or entry[1] is None:
            with self._open() as stored:
                values = stored.get_tensor(name)
            dense = values if entry is None else self._checked(name, lambda: unsqueeze(values))
        else:
            packed = self.read_packed(name)
            dense = self._checked(name, lambda: packed.expand(self._shards.dtype if packed.scale is not None else None))
        if entry is not None and list(dense.shape) != list(entry[0]):
            raise SparsightError(
                f"{self.path}: {name} is {list(dense.shape)}, and config.json says {list(entry[0])}; pack the model again"
            )
        return dense

    def read_packed(self, name: str) -> Packed:
        """A packed tensor as it is, its values unsqueezed."""
        with self._open() as stored:
            values, bits = stored.get_tensor(name), stored.get_tensor(name + BITS)
            scale = stored.get_tensor(name + SCALE) if self._shards.int8 else None
        squeezed = values.dtype == torch.uint8 and values.ndim == 1
        values = self._checked(name, lambda: unsqueeze(values)) if squeezed else values
        return Packed(values, bits, tuple(self._shards.layers[name][0]), scale)

    def _checked(self, name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        try:
            return run()
        except SparsightError as error:
            raise SparsightError(f"{self.path}: {name}: {error}") from error

    def forms(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every dense tensor, without reading one."""
        facts = {}
        for name in self.names:
            (dtype, shape), entry = self._header.form(name), self._shards.layers.get(name)
            if entry is not None:
                dtype = torch.bfloat16 if dtype == torch.uint8 else self._shards.dtype if self._shards.int8 else dtype
            facts[name] = (dtype, shape if entry is None else tuple(entry[0]))
        return facts

    def _open(self) -> Any:
        return _opened(self.path)


def bytes_in_bfloat16(packed: str | Path) -> dict[str, int]:
    """Bytes that all weights of a packed folder take in bfloat16: `dense`, `packed`, and `squeezed` as well."""
    sizes = {"dense": 0, "packed": 0, "squeezed": 0}
    shards = Shards(packed)
    for shard in map(shards.open, shards.files):
        for name in shard.names:
            form = shard.read_packed(name) if name in shards.layers else None
            values = (shard.read(name) if form is None else form.values).bfloat16()
            bits = 0 if form is None else form.bits.nbytes
            small = squeeze(values)
            sizes["dense"] += values.nbytes if form is None else 2 * math.prod(form.shape)
            sizes["packed"] += values.nbytes + bits
            sizes["squeezed"] += (values if small is None else small).nbytes + bits
    return sizes


class _opened:
    """`safe_open` with one line for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(self.path, "pt").__enter__()
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        return self._file

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError):
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> SparsightError:
        reason = first_line(error)
        return SparsightError(f"{self.path}: is cut short or damaged ({reason}); copy it again from where it came from")


class ShardWriter:
    """A safetensors file that is written tensor by tensor; the header, whose `room` is kept free, comes last.

    Use as a context; an error inside leaves a file that is not one.
    """

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str]) -> None:
        self.path, self.room = path, (room + 7) // 8 * 8
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._end = 0

    def __enter__(self) -> ShardWriter:
        self._file = self.path.open("wb")
        self._file.seek(8 + self.room)
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor behind the others."""
        data = tensor.detach().contiguous().cpu()
        self._header[name] = header_entry(data.dtype, data.shape, self._end)
        data.reshape(-1).view(torch.uint8).numpy().tofile(self._file)
        self._end += data.nbytes

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if error is None:
                header = header_text(self._header)
                if len(header) > self.room:
                    raise RuntimeError(f"{self.path}: a header of {len(header)} bytes, {self.room} kept free")
                self._file.seek(0)
                self._file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        finally:
            self._file.close()
