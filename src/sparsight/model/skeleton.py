"""A model without its weights: what its configuration and the headers of its files say, on the meta device.

It is made by transformers' own loading, from tensors without data. So names, shapes, dtypes, ties and what is missing are
those of `from_pretrained`, and buffers that no file holds have the values that they have there. No weight is read.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, GenerationConfig
from transformers.utils import cached_file

from sparsight.errors import SparsightError, first_line
from sparsight.model.load import check_loaded, parse_dtype, quiet, read_config
from sparsight.packing.shards import INDEX, SINGLE, Shards

try:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.models.auto.auto_factory import _get_model_class
except ImportError as error:  # a later transformers
    LACKS: str | None = first_line(error)
else:
    LACKS = None

META = torch.device("meta")


class Unfit(Exception):
    """This version of transformers cannot load a model in parts, or this model cannot be; the message says why."""


def load_skeleton(
    path: str | Path, *, dtype: str | torch.dtype = "auto", device: str | None = "cpu"
) -> tuple[Any, Shards]:  # fmt: skip
    """The model of a folder or hub name without weights, in eval mode, and its files; buffers are on `device`.

    `device` None: the model will not run, and its buffers have no values.

    **Raises** `SparsightError` as `load_model` does, and `Unfit` where transformers gives no model without weights.
    """
    where, target = str(path), parse_dtype(dtype)
    config = read_config(where)
    config.__dict__.pop("quantization_config", None)  # the tensors of a packed folder are read dense
    shards = Shards(local_folder(where))
    state = {name: without_data(form) for name, form in shards.forms().items()}
    if LACKS:
        raise Unfit(LACKS)
    try:
        with quiet():
            model, info = _get_model_class(config, AutoModelForMultimodalLM._model_mapping).from_pretrained(
                None,
                config=config,
                dtype=target,
                state_dict=state,
                device_map={"": META},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name
            )
    except Exception as error:  # files and configurations can be wrong in any way; what loads the whole model says how
        raise Unfit(first_line(error)) from error
    check_loaded(where, model, info, dtype, device)
    model.eval()
    model.config.name_or_path = model.name_or_path = where
    _tie(model, shards)
    if device is None:
        return model, shards
    try:
        _compute_buffers(model, device)
        if model.can_generate():
            model.generation_config = _read_generation_config(where)
    except AttributeError as error:
        raise Unfit(f"transformers has changed: {first_line(error)}") from error
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in model.state_dict()]:
        raise Unfit(f"the values of {left[0]} are not known without its weights")
    return model, shards


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, Python does not look for cycles: among the many small objects of a model it finds none, and takes time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def without_data(form: tuple[torch.dtype, tuple[int, ...]]) -> torch.Tensor:
    """A tensor on the meta device, by its dtype and shape."""
    dtype, shape = form
    return torch.empty(shape, dtype=dtype, device=META)


def stored_names(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """The name in the model of every tensor of a checkpoint; of one that is merged with others, the name of the whole."""
    conversions = model._weight_conversions or []
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known, prefix, names = model.state_dict(), model.base_model_prefix, {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:  # as transformers does
            name, _ = rename_source_key(key, [], [], prefix, known)
        names[key] = name
    return names


def _tie(model: Any, shards: Shards) -> None:
    """Tie weights that the files hold twice, in place, where they are equal, as `from_pretrained` does."""
    twice = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if model.get_parameter_or_buffer(target) is not model.get_parameter_or_buffer(source)
    }
    if not twice:
        return
    files = shards.names()
    key_of = {name: key for key, name in stored_names(model, files).items()}
    for target, source in twice.items():
        one, other = (shards.open(files[key]).read(key) for key in (key_of[target], key_of[source]))
        if torch.equal(one, other):
            parent, _, leaf = target.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_parameter_or_buffer(source))
        else:
            del model.all_tied_weights_keys[target]


def _read_generation_config(where: str) -> GenerationConfig:
    """How a model writes, by its own file, or by config.json where it has none, as `from_pretrained` reads it."""
    with quiet():
        try:
            return GenerationConfig.from_pretrained(where)
        except OSError:
            return GenerationConfig.from_pretrained(where, config_file_name="config.json", _from_model_config=True)


def _compute_buffers(model: Any, device: str) -> None:
    """Give buffers that no file holds their values, in place, as the end of `from_pretrained` does."""
    for module in model.modules():
        module._is_hf_initialized = False
    model._move_missing_keys_from_meta_to_device(set(), {"": torch.device("cpu")}, None, None)
    with quiet():
        model._initialize_missing_keys(False)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def local_folder(where: str) -> Path:
    """The folder on this machine with the files of a model; those of a hub name are downloaded first.

    **Raises** `SparsightError` where they are not found.
    """
    if Path(where).is_dir():
        return Path(where)
    try:
        with quiet():
            config = Path(str(cached_file(where, "config.json")))
            if cached_file(where, SINGLE, _raise_exceptions_for_missing_entries=False) is None:
                cached_file(where, INDEX)
                for file in Shards(config.parent).files:
                    cached_file(where, file)
    except (OSError, SparsightError) as error:
        raise SparsightError(f"{where}: its files could not be found: {first_line(error)}") from error
    return config.parent


def device_of(model: Any) -> torch.device:
    """The device that a model's inputs go to; parts of it may be without data, or be kept elsewhere by accelerate."""
    hooked = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if hooked is not None:
        return torch.device(hooked)
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
