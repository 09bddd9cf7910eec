"""`pack` and `unpack`: a folder in, a folder out, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sparsight import kernels
from sparsight.checkpoint.card import packed_card, unpacked_card
from sparsight.checkpoint.folder import atomic_folder, read_record, source_of
from sparsight.checkpoint.lock import INSIDE, locked
from sparsight.checkpoint.unfinished import unfinished
from sparsight.errors import Notice, SparsightError, first_line
from sparsight.files import check_output, read_json, replace_file, without_home, write_json
from sparsight.masks.bits import mask_hash, weight_hash
from sparsight.masks.matrix import count_zeros
from sparsight.model.files import check_files
from sparsight.packing.headers import header_entry, header_text, in_order
from sparsight.packing.shards import (
    FORMAT,
    INDEX,
    METHOD,
    SINGLE,
    Shard,
    Shards,
    ShardWriter,
    read_layout,
    widths,
)
from sparsight.packing.squeeze import squeeze
from sparsight.packing.tensor import Packed, row_offsets
from sparsight.progress import Progress
from sparsight.specs import PackSpec

PROBES = 16  # random inputs that the output error of int8 values is measured on
PACKED = "packed.json"
OF_SPEED = "bench.json"  # measured on the other form
OF_EVALUATION = ("evaluation.json", "predictions.jsonl", "evaluation")


# of one tensor: what is stored, its entry in the layout, and facts for the record
Change = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], list[Any] | None, dict[str, Any]]]


def pack_folder(
    sparse: str | Path,
    out: str | Path,
    spec: PackSpec,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pack the folder of a sparse model; returns the content of `packed.json`. **Raises** `SparsightError`."""
    shards = _source(sparse)
    if shards.int8:
        raise SparsightError(f"{sparse}: holds int8 values, from which the original does not come back; pack that one")
    target = _target(out, overwrite, sparse)
    if not _any_zeros(shards):
        raise SparsightError(f"{sparse}: holds no weight with zeros to leave out; prune it first, and pack what that wrote")
    record = read_record(sparse)
    hashes = {entry["weight"]: name for name, entry in (record or {}).get("layers", {}).items()}
    settings = {"verb": "pack", **spec.facts(), "files": source_of(sparse)}
    with locked(target), unfinished(target, settings, resume=resume, overwrite=overwrite) as folder:
        change = _packing(str(sparse), spec, hashes, _columns(folder))
        done = _write_shards(shards, folder, change, _packed_order, "pack", progress)
        tensors = {name: facts for shard in done.values() for name, facts in shard["facts"].items()}
        facts = {
            "format": FORMAT,
            "values": spec.values,
            "squeeze": spec.squeeze,
            "bytes": {
                "dense": sum(shard["dense"] for shard in done.values()),
                "packed": sum(shard["stored"] for shard in done.values()),
                "layers_dense": sum(entry["dense"] for entry in tensors.values()),
                "layers_packed": sum(entry["stored"] for entry in tensors.values()),
            },
            "tensors": tensors,
        }
        layout = {
            "quant_method": METHOD,
            "format": FORMAT,
            "values": spec.values,
            "layers": {name: entry for shard in done.values() for name, entry in shard["layers"].items()},
        }
        if minus := sum(entry.get("minus_zeros", 0) for entry in tensors.values()):
            warnings.warn(
                f"{sparse}: {minus:,} weights are -0.0, as a product with a mask leaves them, and are stored as they are; "
                "`sparsight.prune` writes 0.0, which takes no space",
                Notice,
                stacklevel=2,
            )
        with atomic_folder(target, overwrite) as new:
            rounded = () if spec.values == "kept" else OF_EVALUATION  # scores of other weights
            _copy_others(Path(sparse), new, shards.files, (PACKED, OF_SPEED, *rounded))
            _put_together(shards, folder, new, done, layout)
            if spec.values == "int8" and record is not None:
                write_json(new / "sparsity.json", without_home(_rounded(record, tensors)))
            write_json(new / PACKED, facts)
            if shards.layout is None:
                _write_card(new, packed_card)
    return facts


def _any_zeros(shards: Shards) -> bool:
    """Whether anything would be packed; reads as far as the first such weight."""
    return any(
        _fitting(shard.read(name), {}) is not None for shard in map(shards.open, shards.files) for name in shard.names
    )


def _columns(folder: Path) -> dict[tuple[int, ...], int]:
    """What `widths` says of the files that an interrupted run has packed."""
    notes = [read_json(note, "start over with `overwrite`") for note in folder.glob("*.safetensors.json")]
    return widths({name: entry for note in notes for name, entry in note["layers"].items()})


def _packing(
    where: str, spec: PackSpec, hashes: Mapping[str, str], columns: dict[tuple[int, ...], int]
) -> Change:  # fmt: skip
    """What packing does to a tensor; `hashes` has the names of layers by the hashes of their weights.

    `columns` has those of packed tensors by the shape of their bits, which say them only to the next eight.
    """

    def change(name: str, W: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[Any] | None, dict[str, Any]]:
        packed = _fitting(W, columns)
        if packed is None:
            squeezed = squeeze(W) if spec.squeeze else None
            return ({name: W}, None, {}) if squeezed is None else ({name: squeezed}, [list(W.shape), None], {})
        facts: dict[str, Any] = {"dense": W.nbytes, "dtype": str(W.dtype).removeprefix("torch.")}
        if minus := count_zeros(packed.values):
            facts["minus_zeros"] = minus
        if (layer := hashes.get(weight_hash(W))) is not None:
            facts["layer"] = layer
        if spec.values == "int8":
            try:
                packed = Packed.int8(W)
            except SparsightError as error:
                raise SparsightError(f"{where}: {name} {error}; use `values=kept`") from error
            rounded = packed.expand(W.dtype)
            facts |= {"error": output_error(W, packed), "zeros": count_zeros(rounded)}
            facts |= {"mask": mask_hash(rounded), "weight": weight_hash(rounded)}
        stored = {name + part: tensor for part, tensor in packed.tensors().items()}
        if spec.squeeze and (squeezed := squeeze(packed.values)) is not None:
            stored[name] = squeezed
        facts["stored"] = sum(tensor.nbytes for tensor in stored.values())
        return stored, [list(W.shape), packed.values.numel()], facts

    return change


def _rounded(record: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`sparsity.json` of int8 values: what they stand for is no longer the dense model's, and has more zeros."""
    layers = {name: {**entry, "mask": None, "weight": None} for name, entry in record["layers"].items()}
    for facts in tensors.values():
        if "layer" in facts:
            entry = layers[facts["layer"]]
            rows, columns = entry["shape"]
            new = {key: facts[key] for key in ("zeros", "mask", "weight")}
            layers[facts["layer"]] = {**entry, **new, "got": facts["zeros"] / (rows * columns)}
    return {**record, "mask_only": False, "layers": layers}


def _fitting(W: torch.Tensor, columns: dict[tuple[int, ...], int]) -> Packed | None:
    """The packed form of a weight with zeros; None where nothing is won, and for what is no weight."""
    if W.ndim < 2 or not W.is_floating_point() or not W.numel():
        return None
    shape = (*W.shape[:-1], (W.shape[-1] + 7) // 8)
    packed = Packed.of(W)
    if packed.nbytes >= W.nbytes or columns.setdefault(shape, W.shape[-1]) != W.shape[-1]:
        return None
    return packed


def unpack_folder(
    packed: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the ordinary folder that a packed one was made from. **Raises** `SparsightError`."""
    shards = _source(packed)
    if shards.layout is None:
        raise SparsightError(f"{packed}: is not packed; give a folder that `sparsight pack` wrote")
    target = _target(out, overwrite, packed)
    settings = {"verb": "unpack", "files": source_of(packed)}
    with locked(target), unfinished(target, settings, resume=resume, overwrite=overwrite) as folder:
        done = _write_shards(shards, folder, lambda name, W: ({name: W}, None, {}), _plain_order, "unpack", progress)
        with atomic_folder(target, overwrite) as new:
            _copy_others(Path(packed), new, shards.files, (PACKED, OF_SPEED))
            _put_together(shards, folder, new, done, None)
            _write_card(new, unpacked_card)
    dense = sum(shard["stored"] for shard in done.values())
    return {"bytes": {"packed": sum((Path(packed) / file).stat().st_size for file in shards.files), "dense": dense}}


class StoredLayer:
    """A layer of a packed folder, whose dense weight is read where it is asked for."""

    def __init__(self, shard: Shard, tensor: str, shape: tuple[int, ...]) -> None:
        self.tensor, self.shape = tensor, shape
        self._shard = shard

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, read from the file."""
        return self._shard.read(self.tensor)


def stored_layers(folder: str | Path, names: Collection[str]) -> dict[str, StoredLayer] | None:
    """The layers `names` of a packed folder, read one at a time; None if some are stored in another form than they have in
    memory, as experts that the model merges, and for a folder that is not packed.

    **Raises** `SparsightError` for damaged files.
    """
    record = Path(folder) / PACKED
    if read_layout(folder) is None or not record.is_file():
        return None
    try:
        tensors = read_json(record, "pack the model again").get("tensors", {})
        of_layer = {facts["layer"]: name for name, facts in tensors.items() if "layer" in facts}
    except (AttributeError, TypeError) as error:
        raise SparsightError(f"{record}: is damaged ({first_line(error)}); pack the model again") from error
    if not set(names) <= set(of_layer):
        return None
    shards = _source(folder)
    places = {name: shard for shard in map(shards.open, shards.files) for name in shard.names}
    if lost := sorted(set(of_layer.values()) - set(shards.layers)):
        raise SparsightError(f"{folder}: {lost[0]} is packed, and config.json does not say how; pack the model again")
    return {layer: StoredLayer(places[name], name, tuple(shards.layers[name][0])) for layer, name in of_layer.items()}


def output_error(W: torch.Tensor, packed: Packed) -> float:
    """The relative error of the outputs of packed int8 weights on random normal inputs, the rounding of inputs included."""
    generator = torch.Generator().manual_seed(0)
    W = W.reshape(-1, W.shape[-1])
    x = torch.randn(PROBES, W.shape[-1], generator=generator)
    bits, values = packed.bits.reshape(len(W), -1), packed.values.reshape(-1)
    assert packed.scale is not None
    y = kernels.product(x, values, bits, row_offsets(bits), None, packed.scale.reshape(-1))
    y = x @ packed.expand().reshape(W.shape).T if y is None else y
    exact = x @ W.float().T
    return float((y - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _source(folder: str | Path) -> Shards:
    """The weights of a folder on this machine that a model could be loaded from."""
    check_files(str(folder))
    if not Path(folder).is_dir():
        raise SparsightError(f"{folder}: is not a folder on this machine; download the model into one first")
    shards = Shards(folder)
    if lost := sorted(set(shards.layers) - set(shards.names())):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise SparsightError(f"{folder}: {lost[0]}{more}, named in config.json, is missing from the files; copy them again")
    return shards


def _target(out: str | Path, overwrite: bool, source: str | Path) -> Path:
    """The folder to write, which is not inside the one that is copied. **Raises** `SparsightError`."""
    target = check_output(out, overwrite, inputs=(source,))
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise SparsightError(f"{out}: lies inside {source}, which is copied; give a folder beside it")
    return target


def _write_shards(
    shards: Shards, folder: Path, change: Change, order: Any, verb: str, progress: Progress | None
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write every file of weights anew into `folder`; those that an interrupted run wrote there are kept."""
    done: dict[str, dict[str, Any]] = {}
    sizes = {
        file: {n: d.itemsize * math.prod(s) for n, (d, s) in shards.open(file).forms().items()} for file in shards.files
    }
    total = sum(sum(of_file.values()) for of_file in sizes.values())
    for file in shards.files:
        note, shard = folder / f"{file}.json", shards.open(file)
        if not note.is_file() or not (folder / file).is_file():  # it may have been moved to a folder that was given up
            names, room = order(shard)
            facts: dict[str, Any] = {"names": [], "layers": {}, "facts": {}, "dense": 0, "stored": 0}
            before = sum(sum(sizes[earlier].values()) for earlier in done)
            with replace_file(folder / file) as beside, ShardWriter(beside, room, shard.metadata) as writer:
                for name in names:
                    W = shard.read(name)
                    stored, entry, said = change(name, W)
                    for stored_name, tensor in stored.items():
                        writer.add(stored_name, tensor)
                        facts["stored"] += tensor.nbytes
                    facts["names"] += stored
                    facts["layers"] |= {name: entry} if entry else {}
                    facts["facts"] |= {name: said} if said else {}
                    facts["dense"] += W.nbytes
                    if progress is not None:
                        progress(f"{verb} {file}", before + facts["dense"], total)
            write_json(note, facts)
        done[file] = read_json(note, "start over with `overwrite`")
    return done


def _packed_order(shard: Shard) -> tuple[list[str], int]:
    """Names, and room for a header with up to three tensors for each."""
    return shard.names, 1024 + sum(3 * (len(json.dumps(name)) + 160) for name in shard.names)


def _plain_order(shard: Shard) -> tuple[list[str], int]:
    """Names as safetensors orders them, and the length of their header."""
    forms = shard.forms()
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    names, at = in_order(forms), 0
    for name in names:
        header[name] = header_entry(*forms[name], at)
        at = header[name]["data_offsets"][1]
    return names, len(header_text(header))


def _put_together(
    shards: Shards, folder: Path, new: Path, done: Mapping[str, Any], layout: Mapping[str, Any] | None
) -> None:  # fmt: skip
    """Move the files of weights into the new folder, and write index and configuration."""
    for file in shards.files:
        (folder / file).replace(new / file)
    if shards.files != [SINGLE]:
        index = json.loads((shards.folder / INDEX).read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = sum(shard["stored"] for shard in done.values())
        index["weight_map"] = {name: file for file, shard in done.items() for name in shard["names"]}
        (new / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    config = json.loads((shards.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if layout is not None:
        config["quantization_config"] = layout
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_others(source: Path, new: Path, weights: list[str], leave: tuple[str, ...]) -> None:
    """Copy everything but weights, index and configuration."""
    for path in sorted(source.iterdir()):
        hidden = path.name == INSIDE or (path.is_dir() and path.name.startswith("."))  # a lock; what git keeps
        if path.name in (*weights, INDEX, "config.json", *leave) or hidden:
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name)
        else:
            shutil.copyfile(path, new / path.name)


def _write_card(folder: Path, change: Callable[[str], str]) -> None:
    """Change how the card says that the model is loaded; a folder without a card gets none."""
    card = folder / "README.md"
    if card.is_file():
        card.write_text(change(card.read_text(encoding="utf-8")), encoding="utf-8")
