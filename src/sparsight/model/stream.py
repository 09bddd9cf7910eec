"""A model of which one block is in memory: its files are read where a block is needed, and let go where the next one is.

What lies outside the blocks (embeddings, norms, the head) stays; on a CPU, in the dtype of the files, it is mapped, so that
only what is touched takes memory. A block is loaded by transformers' own conversion, from the tensors of the checkpoint that
become its weights, and holds the same bits as in a model that is loaded whole; a block that is stored as it is needs no
conversion.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsight.errors import Notice, SparsightError, first_line
from sparsight.memory import give_back_memory, is_out_of_memory, main_device
from sparsight.model.anatomy import Anatomy, Layer, anatomy
from sparsight.model.families import Family
from sparsight.model.load import load_model, quiet
from sparsight.model.skeleton import META, Unfit, collector_paused, load_skeleton, stored_names, without_data

try:
    from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
    from transformers.modeling_utils import LoadStateDictConfig
except ImportError as error:  # a later transformers
    LACKS: str | None = first_line(error)
else:
    LACKS = None

OUTSIDE = ""  # the part of a model outside its blocks
Tensors = dict[str, torch.Tensor]


class Stream:
    """A model in parts: its blocks by name, and `OUTSIDE`.

    `model` is on the meta device but for the part that was brought last; `anatomy` brings a block where a weight of one of
    its layers is asked for. `sources` may give another reader for a block, as for one that is pruned already. Changes of the
    block `keep` are kept in memory where it must go before they are written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | None = "cpu",
        family: Family | None = None,
    ) -> None:
        """`device` None: the model will not run.

        **Raises** `SparsightError` as `load_model` and `anatomy` do, and `Unfit` for a model that cannot be in parts.
        """
        if LACKS:
            raise Unfit(LACKS)
        self.device = main_device(device or "cpu")
        with collector_paused():
            self.model, self.shards = load_skeleton(path, dtype=dtype, device=device and str(self.device))
            self.anatomy = self._watch(anatomy(self.model, family))
        self.here: str | None = None
        self.sources: dict[str, Callable[[], Tensors]] = {}
        self.keep: str | None = None
        self._mapped = False  # whether the block in memory is mapped from its files as it is: its pages go with the mapping
        self._stored: dict[str, dict[str, str]] = {}  # by block and name: the tensor of the files that it is, as it is
        self._modules = {block.name: block.module for block in self.anatomy.blocks}

    def _watch(self, whole: Anatomy) -> Anatomy:
        def watched(layer: Layer) -> Layer:
            return replace(layer, bring=self.bring)

        return replace(whole, layers=tuple(map(watched, whole.layers)))

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """The full names of parameters and buffers by part; a tensor that two parts share lies outside."""
        blocks = [block.name for block in self.anatomy.blocks]
        tensors = self._tensors(self.model.state_dict())
        part_of = {name: next((b for b in blocks if name.startswith(f"{b}.")), OUTSIDE) for name in tensors}
        owners: dict[int, set[str]] = {}
        for name, tensor in tensors.items():
            owners.setdefault(id(tensor), set()).add(part_of[name])
        parts: dict[str, list[str]] = {part: [] for part in (*blocks, OUTSIDE)}
        for name, tensor in tensors.items():
            parts[part_of[name] if len(owners[id(tensor)]) == 1 else OUTSIDE].append(name)
        return parts

    @cached_property
    def _forms(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self.shards.forms()

    @cached_property
    def _keys(self) -> dict[str, list[str]]:
        return self.parts_of(self._forms)

    @cached_property
    def _empty(self) -> dict[str, Tensors]:
        """The tensors without data; asked for before any part is loaded."""
        return {part: self._tensors(names) for part, names in self._names.items()}

    @cached_property
    def _whole(self) -> Tensors:
        """The state of the whole model without data."""
        return self._tensors(name for names in self._names.values() for name in names)

    @cached_property
    def _places(self) -> dict[str, tuple[nn.Module, str]]:
        """The module of every tensor, and the tensor's name in it."""
        paths = {name: name.rpartition(".") for names in self._names.values() for name in names}
        return {name: (self.model.get_submodule(path), leaf) for name, (path, _, leaf) in paths.items()}

    def _tensors(self, names: Any) -> Tensors:
        return {name: self.model.get_parameter_or_buffer(name) for name in names}

    def parts_of(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """The names of a checkpoint's tensors by the part of the model that they become."""
        part_of = {name: part for part, names in self._names.items() for name in names}
        parts: dict[str, list[str]] = {part: [] for part in self._names}
        for key, name in stored_names(self.model, keys).items():
            if name in part_of:
                parts[part_of[name]].append(key)
        return parts

    def bring(self, part: str) -> None:
        """Load a block, unless it is the one in memory, and let the earlier one go.

        **Raises** `SparsightError` for files that have changed since they were opened.
        """
        if part == self.here or part not in self._modules:
            return
        self.drop()
        self._empty  # noqa: B018  made once, of the model without data
        try:
            self._load(part)
        except Unfit as error:
            raise SparsightError(f"{part}: its weights cannot be loaded any more ({error}); look at the files") from error
        self.here = part

    def drop(self) -> None:
        """Let the block in memory go; what was changed in it is lost, but in `keep`."""
        if self.here is None:
            return
        if self.here == self.keep:  # a forward may go back to earlier blocks, as for a second image
            kept = self.state(self.here, {*self._names[self.here]})
            self.sources[self.here] = lambda: dict(kept)
        self._put(self._empty[self.here])
        self.here = None
        if not self._mapped:
            give_back_memory()

    def bring_outside(self) -> None:
        """Load what lies outside the blocks, for good. **Raises** `Unfit` where a block cannot be loaded alone."""
        self._check_parts()
        missing = self._load(OUTSIDE)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)

    def _check_parts(self) -> None:
        """Load all parts once, without data: every tensor of each must come from its own keys."""
        for part, names in self._names.items():
            empty = {key: without_data(self._forms[key]) for key in self._keys[part]}
            left = self._convert(empty, META) & {*names} - {*self.model.all_tied_weights_keys}
            if part != OUTSIDE and (same := _same_tensors(self._tensors(names), empty)) is not None:
                self._stored[part] = same
            self._put(self._empty[part])
            if left:
                raise Unfit(f"{min(left)} is made of tensors of several blocks")

    def _load(self, part: str) -> set[str]:
        read = self.sources.get(part)
        tensors = self.shards.read_all(self._keys[part]) if read is None else read()
        keys, empty = self._stored.get(part, {}), self._empty[part]
        as_stored = bool(keys) and all(_fits(tensors.get(key), empty[name]) for name, key in keys.items())
        self._mapped = as_stored and read is None and self.shards.layers.keys().isdisjoint(keys.values())  # of packed ones
        if as_stored:
            self._put({name: _like(empty[name], tensors[key].to(self.device)) for name, key in keys.items()})
            return set()
        return self._convert(tensors, self.device)

    def _convert(self, tensors: Tensors, device: torch.device) -> set[str]:
        """Put the tensors of a checkpoint into the model; the names that did not come."""
        conversions = self.model._weight_conversions  # those of the whole model, which a part may not need
        settings = LoadStateDictConfig(device_map={"": device}, weight_mapping=conversions or [])
        self.model.state_dict = lambda: self._whole  # asked for names and dtypes once per part, and slow to make
        try:
            with quiet():
                info, _ = convert_and_load_state_dict_in_model(self.model, tensors, settings)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise Unfit(first_line(error)) from error
        finally:
            del self.model.state_dict
            self.model._weight_conversions = conversions
        if info.conversion_errors:
            raise Unfit(first_line(next(iter(info.conversion_errors.values()))))
        return set(info.missing_keys)

    def _put(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            module, leaf = self._places[name]
            table: Any = module._buffers if leaf in module._buffers else module._parameters
            table[leaf] = tensor

    @contextlib.contextmanager
    def run(self) -> Iterator[Any]:
        """Inside, the model can run: every block is brought in front of its forward. Yields the model."""

        def before(name: str) -> Callable[..., None]:
            return lambda *_: self.bring(name)

        hooks = [module.register_forward_pre_hook(before(name)) for name, module in self._modules.items()]
        try:
            yield self.model
        finally:
            for hook in hooks:
                hook.remove()
            self.drop()

    @property
    def parts(self) -> list[str]:
        """The blocks by name, in forward order, and `OUTSIDE`."""
        return [*self._names]

    def names(self, part: str) -> list[str]:
        """The names of a part's parameters and buffers in the model."""
        return self._names[part]

    def put(self, part: str, tensors: Tensors | None) -> None:
        """Put tensors of the user's own, by name, into a part; with None those without data again."""
        empty = self._empty[part]
        self._put(empty if tensors is None else tensors)

    def state(self, part: str, names: Container[str]) -> Tensors:
        """The tensors of a part with these full names, as it is now, under the names and in the form of a checkpoint."""
        own = [name for name in self._names[part] if name in names]
        return self.as_stored({name: tensor.detach() for name, tensor in self._tensors(own).items()})

    def as_stored(self, state: Mapping[str, torch.Tensor]) -> Tensors:
        """Tensors of the model under the names, and in the form, in which `save_pretrained` writes them."""
        return dict(revert_weight_conversion(self.model, dict(state)))


def _same_tensors(placed: Tensors, stored: Tensors) -> dict[str, str] | None:
    """For every tensor of a part the one of the files that it is, with no conversion; None where any is another."""

    def form(tensor: torch.Tensor) -> tuple[Any, ...]:
        return tensor.untyped_storage()._cdata, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    keys = {form(tensor): key for key, tensor in stored.items()}
    found = {name: keys.get(form(tensor)) for name, tensor in placed.items()}
    return {name: key for name, key in found.items() if key is not None} if all(found.values()) else None


def _fits(tensor: torch.Tensor | None, empty: torch.Tensor) -> bool:
    return tensor is not None and (tensor.dtype, tensor.shape) == (empty.dtype, empty.shape)


def _like(empty: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as what stands in its place without data: a parameter or a buffer."""
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if isinstance(empty, nn.Parameter) else tensor


@contextlib.contextmanager
def runnable(
    path: str | Path, family: Family | None = None, *, dtype: str | torch.dtype = "auto", device: str = "cpu"
) -> Iterator[tuple[Any, Anatomy]]:
    """A model that can run inside, with one block in memory or, where it cannot be in parts, whole; and its anatomy.

    **Raises** `SparsightError` as `load_model` and `anatomy` do.
    """
    try:
        stream = Stream(path, dtype=dtype, device=device, family=family)
        stream.bring_outside()
    except Unfit as why:
        model = load_model(path, dtype=dtype, device=device)
        warnings.warn(f"{path}: was loaded as a whole, since it cannot be block by block: {why}", Notice, stacklevel=2)
        yield model, anatomy(model, family)
        return
    with stream.run() as model:
        yield model, stream.anatomy


def open_anatomy(path: str | Path, family: Family | None = None, *, dtype: str | torch.dtype = "auto") -> Anatomy:
    """Take the model of a folder or hub name apart; no weight is read but those that are asked for, block by block.

    **Raises** `SparsightError` as `load_model` and `anatomy` do.
    """
    try:
        return Stream(path, dtype=dtype, device=None, family=family).anatomy
    except Unfit:
        return anatomy(load_model(path, dtype=dtype), family)
