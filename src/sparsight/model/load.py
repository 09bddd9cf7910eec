"""Load a vision-language model and its processor, from safetensors only and without remote code."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.utils import is_torchvision_available
from transformers.utils import logging as transformers_logging

from sparsight.distributed import several_processes
from sparsight.errors import Notice, OutOfMemory, SparsightError
from sparsight.memory import AUTO, is_out_of_memory, main_device
from sparsight.model.discover import discover
from sparsight.model.files import check_config, check_files, check_unexpected, stored_dtypes
from sparsight.packing.linear import has_packed_layers
from sparsight.packing.reader import errors, register

LARGE = 50_000_000  # parameters; a smaller model is quick in any dtype
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu", packed: bool | str = False
) -> tuple[Any, Any]:
    """Load the model, in eval mode, and its processor.

    `path` is a folder that `save_pretrained` or `pack` wrote, or a hub name. `dtype` is one of `auto` (as stored),
    `float32`, `bfloat16`, `float16`, or a torch dtype. `packed` keeps the linear layers of a packed folder packed in
    memory, for inference only, "all" the small ones, too, which are faster dense; otherwise they are expanded.

    **Raises** `SparsightError` in one line if there is no such folder, no configuration, no safetensors, a weight that is
    missing or of another shape, no processor, or a processor that needs a package that is not installed.
    """
    parse_dtype(dtype)
    check_device(device)
    read_config(str(path))
    processor = load_processor(path)  # first, since it is quick
    return load_model(path, dtype=dtype, device=device, packed=packed), processor


def load_model(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu", packed: bool | str = False
) -> Any:  # fmt: skip
    """Load the model alone; the folder need not hold a processor. **Raises** `SparsightError` as `load` does."""
    where = str(path)
    torch_dtype = parse_dtype(dtype)
    check_device(device)
    config = read_config(where)
    register()
    errors.clear()
    if packed:
        layout = getattr(config, "quantization_config", None)
        if layout is None:
            raise SparsightError(
                f"`packed`: {where} is not packed; pack it first with `sparsight pack`, or leave `packed` out"
            )
        if packed not in (True, "all"):
            raise SparsightError(f"`packed`: {packed!r} is not one of True, False, 'all'")
        layout["packed"] = packed
    spread = {"device_map": AUTO} if device == AUTO and main_device(AUTO).type == "cuda" and not several_processes() else {}
    with quiet():
        try:
            loaded: Any = AutoModelForMultimodalLM.from_pretrained(
                where,
                config=config,
                dtype=torch_dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name
                **spread,
            )
        except Exception as error:  # files and configurations can be wrong in any way
            _check_memory(where, error)
            reason = errors[0] if errors else _reason(error)
            raise SparsightError(f"{where}: the model could not be loaded: {reason}") from error
    model, info = loaded
    check_loaded(where, model, info, dtype, str(main_device(device)))
    if packed is True and not has_packed_layers(model):
        note = "every packed layer is so small that it is faster dense; all are expanded; `packed='all'` keeps them packed"
        warnings.warn(Notice(f"{where}: {note}"), stacklevel=2)
    if spread:
        return model.eval()
    try:
        return model.eval().to(main_device(device))
    except RuntimeError as error:
        _check_memory(where, error)
        raise SparsightError(f"{where}: the model could not be moved to {device}: {_reason(error)}") from error


def check_loaded(where: str, model: Any, info: Mapping[str, Any], dtype: Any, device: str | None) -> None:
    """Refuse a model whose files are not those that its configuration asks for, by the loading report of transformers.

    Tensors that it does not use, and dtypes that a user may not expect, are said in one line; so is a dtype that is slow on
    the `device` that the model will run on. **Raises** `SparsightError`.
    """
    if misfits := sorted(info["mismatched_keys"]):
        key, stored, expected = misfits[0]
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise SparsightError(
            f"{where}: weights of another shape than config.json asks for: {key} is {list(stored)} and should be "
            f"{list(expected)}{more}; give the config.json that was saved with the weights"
        )
    if absent := sorted(info["missing_keys"]):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise SparsightError(f"{where}: weights missing from the files: {', '.join(absent[:3])}{more}; save the model again")
    if note := check_unexpected(where, info["unexpected_keys"], _lists(model)):
        warnings.warn(note, Notice, stacklevel=3)
    stored, own = stored_dtypes(where), str(model.dtype).removeprefix("torch.")
    if dtype == "auto" and stored and own not in stored:
        warnings.warn(
            f"{where}: the files hold {' and '.join(sorted(stored))}, and the model is loaded in {own}, as config.json "
            "says; set `dtype` for another",
            Notice,
            stacklevel=3,
        )
    on_cpu = device is not None and torch.device(device).type == "cpu"
    if dtype == "auto" and on_cpu and (note := slow_dtype(model)):
        warnings.warn(note, Notice, stacklevel=3)


def slow_dtype(model: Any, capability: str | None = None) -> str | None:
    """A line for a large model in bfloat16 on a CPU without AVX-512, by torch's name of its `capability`; else None.

    There torch has no fast products of bfloat16. On a Llama of 135 million parameters and 800 tokens, forward took 6 times
    as long as in float32, and backward 30 times (AMD EPYC with AVX2, one thread, torch 2.13).
    """
    capability = capability or torch.backends.cpu.get_cpu_capability()
    if model.dtype != torch.bfloat16 or capability != "AVX2" or model.num_parameters() < LARGE:
        return None
    return "bfloat16 is many times slower than float32 on this CPU, which has no AVX-512; use `dtype=float32`"


def _check_memory(where: str, error: Exception) -> None:
    if is_out_of_memory(error):
        raise OutOfMemory(
            f"{where}: the model does not fit into memory ({_reason(error)}); use `dtype=bfloat16`, or a machine with more"
        ) from error


def overflow_advice(model: Any, otherwise: str) -> str:
    """What to do about NaN or infinity in what a model computes; `otherwise` is for one without float16."""
    narrow = any(p.dtype == torch.float16 for p in model.parameters())
    return "float16 overflows in this model: compute in bfloat16 or float32, by `dtype`" if narrow else otherwise


def _lists(model: Any) -> list[str]:
    """The paths of all lists of blocks."""
    found = discover(model)
    return [mark.path for mark in (*found.marks, *found.others)]


def load_processor(path: str | Path) -> Any:
    """Load the model's own processor. **Raises** `SparsightError`, which names a package that is missing."""
    try:
        with quiet():
            return AutoProcessor.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # files can be wrong in any way, and packages missing
        message = str(error).replace(str(path), "").lower()
        if not is_torchvision_available() and ("torchvision" in message or "video" in message):
            raise SparsightError(
                f"{path}: this model's processor needs torchvision for its video part: pip install torchvision"
            ) from error
        if "num2words" in message:
            raise SparsightError(f"{path}: this model's processor needs num2words: pip install num2words") from error
        raise SparsightError(
            f"{path}: no processor could be loaded: {_reason(error)}; save the model's processor beside it"
        ) from error


def parse_dtype(dtype: str | torch.dtype) -> Any:
    """Return a torch dtype, or "auto". **Raises** `SparsightError` for a name that is not in `DTYPES`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SparsightError(f"`dtype`: {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_device(device: str, one_gpu: bool = False) -> None:
    """Refuse a device that torch does not have, and with `one_gpu` any GPU but the first; **raises** `SparsightError`."""
    if device == AUTO:
        return
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        kind, index = "", None
    if kind not in ("cpu", "cuda"):
        raise SparsightError(f"`device`: {device!r} is not a device that Sparsight runs on; use cpu, cuda, cuda:N or auto")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SparsightError(f"`device`: {device!r} was asked for, but torch sees no CUDA device; use `device=cpu`")
    if kind == "cuda" and (index or 0) >= (count := torch.cuda.device_count()):
        names = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise SparsightError(f"`device`: {device!r} was asked for, but torch sees {names} only; use `device=cuda:0`")
    if one_gpu and index:
        raise SparsightError(f"`device`: training takes the first GPU; set CUDA_VISIBLE_DEVICES={index} and `device=cuda`")


def check_trainable(model: Any) -> None:
    """Refuse a model that was spread over the GPUs and, as they are too small, over other memory, too.

    **Raises** `SparsightError`.
    """
    places = getattr(model, "hf_device_map", {})
    if left := [name for name, place in places.items() if str(place) in ("cpu", "disk")]:
        raise SparsightError(
            f"`device`: the GPUs together do not hold the model: {left[0]} and {len(left) - 1} more parts are elsewhere, "
            "where they cannot be trained; start several processes with FSDP, or use `device=cpu`"
        )


def read_config(where: str) -> Any:
    """The configuration of a folder or a hub name.

    **Raises** `SparsightError` for one that cannot be read, or whose model cannot be pruned.
    """
    check_files(where)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # the file can be wrong in any way
        raise SparsightError(f"{where}: no model configuration could be read: {_reason(error)}") from error
    check_config(where, config.to_dict())
    return config


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message, and the second where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own reports and progress bars inside the block."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
