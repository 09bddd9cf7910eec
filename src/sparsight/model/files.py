"""Look into a model's folder before it is loaded: what cannot be pruned is refused there, in one line with the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from sparsight.checks import check_place
from sparsight.errors import LINE, SparsightError, first_line, quote
from sparsight.packing.headers import read_header
from sparsight.packing.shards import INDEX, METHOD, SINGLE, check_layout

POINTER = b"version https://git-lfs"
QUANTIZED = ("quantization_config", "compression_config")  # keys of a configuration
QUANTIZED_FILES = ("quantize_config.json", "quant_config.json")
# the last words of tensors that stand for quantized weights, and the dtypes that they are stored in
PACKED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map", "SCB", "g_idx")
LOW = ("F8_", "F4", "F6_", "I4", "U4")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what weights are stored in
WEIGHTS = ("weight", "_proj")  # the last letters of the names of matrices; other tensors may be integers
SUPPORTED = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
BUFFERS = ("inv_freq", "position_ids", "masked_bias", "attn.bias")  # of older versions; computed anew, and no weights


def check_files(where: str) -> None:
    """Refuse what is neither a folder with a model nor a hub name, and a folder whose model cannot be pruned.

    **Raises** `SparsightError`: for an adapter, quantized weights, pointers of Git LFS, shards that are missing or say two
    things, a configuration that is not JSON, and a type of model that transformers does not have or that takes no images.
    """
    if not where.strip():
        raise SparsightError("the name of the model is empty; give the folder of a model or a hub name")
    try:
        _check_files(where, Path(where))
    except OSError as error:  # no permission, a name too long
        shown = str(error.filename or where)[:LINE]
        raise SparsightError(f"{shown}: cannot be opened ({first_line(error)}); give a model that can be read") from error


def _check_files(where: str, folder: Path) -> None:
    if folder.is_dir():
        _check_adapter(folder)
        if not (folder / "config.json").is_file():
            raise SparsightError(f"{where}: no config.json in this folder; give a folder that save_pretrained wrote")
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise SparsightError(f"{where}: no .safetensors file; convert the weights with save_pretrained first")
        for path in (*weights, *sorted(folder.glob("*.json")), *sorted(folder.glob("*.model"))):
            _check_pointer(path)
        config = _read_config(folder / "config.json")
        check_config(where, config)
        if (folder / "generation_config.json").is_file():  # transformers passes over one that it cannot read
            _read_config(folder / "generation_config.json")
        for name in QUANTIZED_FILES:
            if (folder / name).is_file():
                raise SparsightError(f"{where}: is quantized ({name}); {_remedy({})}")
        headers = {path.name: read_header(path).entries for path in weights}
        if not _is_packed(config):
            _check_tensors(folder, headers)
        _check_shards(folder, headers)
    elif folder.exists():
        raise SparsightError(f"{where}: is a file; give the folder of a model or a hub name")
    check_place(where)


def check_config(where: str, config: dict[str, Any]) -> None:
    """Refuse the configuration of a model that cannot be pruned; `config` is the content of its config.json.

    **Raises** `SparsightError` for quantized weights, and for a type of model that cannot be loaded here.
    """
    for part in _parts(config):
        for key in QUANTIZED:
            if part is config and _is_packed(config):
                check_layout(config[key], where)
                break
            settings = part.get(key)
            if settings is not None and not isinstance(settings, dict):
                raise SparsightError(
                    f"{where}: its configuration says {key}={quote(settings)}, which is no object; take it out if the "
                    "weights are not quantized"
                )
            if settings is not None:
                method = settings.get("quant_method") or settings.get("quant_type") or settings.get("format") or key
                raise SparsightError(f"{where}: is quantized ({method}); {_remedy(config)}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in SUPPORTED:
        return
    code = config.get("auto_map")
    if kind not in CONFIG_MAPPING:
        raise SparsightError(
            f"{where}: is of type {kind!r}, which this version of transformers does not have"
            + (", and needs code of its own, which Sparsight does not run" if code else "")
            + "; give a checkpoint that was converted for transformers (its name often ends in -hf), or update transformers"
        )
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SparsightError(
            f"{where}: is a language model ({kind}) and takes no images; give a vision-language model, or prune it in "
            "memory with batches of your own: `sparsight.prune(model, batches)`"
        )


def check_unexpected(where: str, names: Iterable[str], blocks: Iterable[str]) -> str | None:
    """What to say of tensors in the files that the model does not name; None where there are none.

    `blocks` are the paths of its lists of blocks. **Raises** `SparsightError` for tensors that belong to blocks.
    """
    left = sorted(name for name in names if not name.endswith(BUFFERS))
    if not left:
        return None
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    lists = tuple(f"{path}." for path in blocks)
    if inside := [name for name in left if name.startswith(lists)]:
        others = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
        raise SparsightError(
            f"{where}: the files hold weights of blocks that config.json does not name: {inside[0]}{others}; give the "
            "config.json that was saved with the weights"
        )
    return f"{where}: the files hold tensors that the model does not use, and a new folder does not get: {left[0]}{more}"


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and all inside it."""
    yield config
    for part in config.values():
        if isinstance(part, dict):
            yield from _parts(part)


def _check_adapter(folder: Path) -> None:
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = _read_config(path).get("base_model_name_or_path") or "its base model"
    how = "merge it first, `PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(merged)`"
    if (folder / "config.json").is_file():
        raise SparsightError(
            f"{folder}: holds an adapter beside the model (adapter_config.json), which would be loaded with it; {how}, or "
            "move the adapter's files away"
        )
    raise SparsightError(f"{folder}: is an adapter of {str(base)[:80]} and no model; {how}, and give the merged folder")


def _check_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise SparsightError(f"{path}: is a pointer of Git LFS and not the file; run `git lfs pull` in its folder")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SparsightError(f"{path}: no model configuration could be read: it is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise SparsightError(f"{path}: no model configuration could be read: it holds {quote(config)} and no object")
    return config


def stored_dtypes(where: str) -> set[str]:
    """The dtypes of the matrices in the files of a folder that weights can have; empty for a hub name."""
    headers = [read_header(path).entries for path in Path(where).glob("*.safetensors")] if Path(where).is_dir() else []
    entries = [entry for header in headers for entry in header.values() if len(entry["shape"]) > 1]
    return {FLOATS[entry["dtype"]] for entry in entries if entry["dtype"] in FLOATS}


def _check_shards(folder: Path, headers: dict[str, dict[str, Any]]) -> None:
    """Refuse weights that transformers would not find, or would find twice; `headers` are those of all files by name."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise SparsightError(
            f"{folder}: holds {SINGLE} and {INDEX}, and only the first would be read; move the one away that is out of date"
        )
    if single.is_file():
        return
    if not index.is_file():
        raise SparsightError(
            f"{folder}: holds {min(headers)}, and neither {SINGLE} nor {INDEX}, which transformers looks for; copy what is "
            "missing, or save the model again"
        )
    content = _read_config(index)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or "metadata" not in content:
        raise SparsightError(
            f"{index}: needs 'metadata' and a 'weight_map' with the file of every tensor; save the model again"
        )
    files = sorted({str(file) for file in places.values()})
    if absent := [file for file in files if not (folder / file).is_file()]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise SparsightError(f"{folder}: {absent[0]}{more}, named in {INDEX}, is missing; copy it from where it came from")
    found: dict[str, str] = {}
    for file in files:
        for name in headers.get(file, ()):
            if (first := found.setdefault(name, file)) != file:
                raise SparsightError(f"{folder}: {name} stands in {first} and in {file}; save the model again")


def _is_packed(config: dict[str, Any]) -> bool:
    """Whether a configuration is that of a packed folder of ours."""
    layout = config.get(QUANTIZED[0])
    return isinstance(layout, dict) and layout.get("quant_method") == METHOD


def _check_tensors(folder: Path, headers: dict[str, dict[str, Any]]) -> None:
    """Refuse the tensors of a quantized model, by the headers of all files."""
    for file, header in headers.items():
        for name, entry in header.items():
            dtype = entry["dtype"]
            codes = dtype not in FLOATS and name.endswith(WEIGHTS) and len(entry["shape"]) > 1
            if name.rpartition(".")[2] in PACKED or dtype.startswith(LOW) or codes:
                raise SparsightError(f"{folder}: is quantized ({file} holds {name} as {dtype}); {_remedy({})}")


def _remedy(config: dict[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    original = f"the original {str(base)[:80]}" if isinstance(base, str) and base else "the original, unquantized model"
    return f"its weights are codes, which cannot be pruned; prune {original}, and quantize the sparse model"
