"""Load a vision-language model and its processor, from safetensors only and without remote code."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from sparsight.errors import SparsightError

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(path: str | Path, *, dtype: str | torch.dtype = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load the model, in eval mode, and its processor.

    `path` is a folder that `save_pretrained` wrote, or a hub name. `dtype` is one of `auto` (as stored), `float32`,
    `bfloat16`, `float16`, or a torch dtype.

    **Raises** `SparsightError` in one line if there is no such folder, no configuration, no safetensors, a missing
    weight, no processor, or a processor that needs a package that is not installed.
    """
    where = str(path)
    wanted = parse_dtype(dtype)
    check_device(device)
    _check_folder(where)
    _config(where)
    with quiet():
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                where, dtype=wanted, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise SparsightError(f"{where}: the model could not be loaded: {_first_line(error)}") from error
    model, info = loaded
    lost = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise SparsightError(f"{where}: weights missing from the files or of another shape: {', '.join(lost[:3])}{more}")
    return model.eval().to(device), load_processor(where)


def load_processor(path: str | Path) -> Any:
    """Load the model's own processor; a missing torchvision becomes one line that says what to install."""
    try:
        with quiet():
            return AutoProcessor.from_pretrained(str(path), trust_remote_code=False)
    except (ImportError, ValueError, OSError, TypeError) as error:
        if "torchvision" in str(error).lower() or "video" in str(error).lower():
            raise SparsightError(
                f"{path}: this model's processor needs torchvision for its video part: pip install torchvision"
            ) from error
        if "num2words" in str(error):
            raise SparsightError(f"{path}: this model's processor needs num2words: pip install num2words") from error
        raise SparsightError(f"{path}: no processor could be loaded: {_first_line(error)}") from error


def parse_dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SparsightError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_device(device: str, one_gpu: bool = False) -> None:
    """Refuse a device that is not there; with `one_gpu`, one chosen by number."""
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        raise SparsightError(f"--device: {device!r} is not a device; use cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise SparsightError(f"--device: {device!r} was asked for, but torch sees no CUDA device; use --device cpu")
    if one_gpu and index:
        raise SparsightError(f"--device: training takes the first GPU; set CUDA_VISIBLE_DEVICES={index} and --device cuda")


def _check_folder(where: str) -> None:
    folder = Path(where)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SparsightError(f"{where}: no config.json in this folder; give a folder that save_pretrained wrote")
        if not any(folder.glob("*.safetensors")):
            raise SparsightError(f"{where}: no .safetensors file; convert the weights with save_pretrained first")
    elif folder.exists():
        raise SparsightError(f"{where}: is a file; give the folder of a model or a hub name")
    elif where.startswith((".", "/", "~")) or where.count("/") != 1:
        raise SparsightError(f"{where}: no such folder; give the folder of a model or a hub name such as owner/model")


def _config(where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SparsightError(f"{where}: no model configuration could be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own reports and progress bars; what matters in a loading report is raised as an error."""
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
