"""The parts of a model: components, blocks in forward order, prunable layers, and what is never pruned and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsight.errors import SparsightError
from sparsight.masks.matrix import count_zeros
from sparsight.model.discover import Discovery, Mark, discover
from sparsight.model.families import COMPONENTS, FAMILIES, Family
from sparsight.model.matrices import is_linear, output_head, read_elsewhere, stack_of
from sparsight.packing.linear import check_dense

SPARSE_FROM = 0.01
# in the name of a layer below its block
ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o|qkv|query|key|value)(_proj)?$", re.IGNORECASE)
# parts of names of the maps that choose experts, layers, tokens, or how much a state keeps
ROUTERS = re.compile(r"(^|_)(router|gate|indexer|altup)s?$|^(in_proj_[ab]|in_proj_ba|f_[ab]_proj|b_proj|beta_proj)$")


@dataclass(frozen=True)
class Layer:
    """One prunable linear map, known by its module name.

    A fused tensor of experts is one layer per expert: `expert` is the tensor's name in `module` and the expert's index, and
    `name` ends in both. `transposed`: the parameter holds (in, out). `bring(block)` loads the block of a model that is in
    memory block by block; it is called where the layer's weight is asked for and has no data.
    """

    name: str
    component: str
    block: str
    module: nn.Module
    expert: tuple[str, int] | None = None
    transposed: bool = False
    bring: Callable[[str], None] | None = field(default=None, compare=False, repr=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weights: a matrix, or one per expert."""
        if self.bring is not None and self._parameter.is_meta:
            self.bring(self.block)
        return self._parameter

    @property
    def _parameter(self) -> nn.Parameter:
        return cast(nn.Parameter, getattr(self.module, self.expert[0] if self.expert else "weight"))

    @property
    def weight(self) -> torch.Tensor:
        """The (out, in) matrix itself, not a copy."""
        return self.part_of(self.parameter.data)

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This layer's part (out, in) of a tensor of its parameter's shape, as of a gradient; not a copy."""
        part = whole if self.expert is None else whole[self.expert[1]]
        return part.T if self.transposed else part

    @property
    def attention(self) -> bool:
        """Whether the layer belongs to attention, by its name: queries, keys, values, and their output."""
        return bool(ATTENTION.search(self.name.removeprefix(self.block)))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.part_of(self._parameter.data).shape
        return rows, columns

    @property
    def sparse(self) -> bool:
        """Whether at least 1 % of the weights are zero; a dense layer may hold a few zeros, too."""
        return self.zeros >= SPARSE_FROM * self.weight.numel()

    @property
    def zeros(self) -> int:
        """The number of weights that are zero."""
        return count_zeros(self.weight)

    def write(self, weight: torch.Tensor) -> None:
        """Copy `weight` (out, in) into the layer, in place, in the layer's own dtype and storage."""
        self.weight.copy_(weight)


@dataclass(frozen=True)
class Block:
    """The unit the engine walks through."""

    name: str
    component: str
    module: nn.Module


@dataclass(frozen=True)
class Skipped:
    """Parameters that are never pruned, and why."""

    name: str
    component: str
    reason: str
    parameters: int


@dataclass(frozen=True)
class Anatomy:
    """A model taken apart; `family` names only paths that the model has, and `marks` says why they are there."""

    family: Family
    blocks: tuple[Block, ...]
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    parameters: int
    marks: tuple[Mark, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of vision and language that have no layer to prune."""
        return tuple(name for name in ("vision", "language") if not self.component(name))

    def __repr__(self) -> str:
        return f"Anatomy({len(self.blocks)} blocks, {len(self.layers)} prunable layers, {self.parameters:,} parameters)"

    def __getitem__(self, name: str) -> Layer:
        """Return the layer of that name. **Raises** `KeyError` where there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def component(self, name: str) -> tuple[Layer, ...]:
        """Return the layers of one component, in forward order of their blocks."""
        return tuple(layer for layer in self.layers if layer.component == name)

    def blocks_with(self, names: set[str]) -> tuple[Block, ...]:
        """Return the blocks that hold any of the layers with these names, in forward order."""
        holders = {layer.block for layer in self.layers if layer.name in names}
        return tuple(block for block in self.blocks if block.name in holders)


def anatomy(model: Any, family: Family | None = None) -> Anatomy:
    """List the blocks and layers of `model`; changes nothing and copies no weight.

    The components that `family` does not name are found by `discover`. Vision or language may be missing.

    **Raises** `SparsightError` for a model without blocks of either, and for a path of `family` that is not there.
    """
    if not isinstance(model, nn.Module):
        raise SparsightError(f"`model`: {type(model).__name__} is no model in memory; `load` one first")
    found = discover(model)
    paths = _paths(model, family, found)
    blocks = tuple(_blocks(model, paths))
    if not any(block.component in ("vision", "language") for block in blocks):
        check_dense(model)
        raise SparsightError(
            f"{type(model).__name__}: no list of blocks with linear layers was found in it; name them with `family`, as in "
            "vision=PATH,language=PATH"
        )
    tied = _tied(model)
    component_of = {id(m): block for block in blocks for m in block.module.modules()}
    output = output_head(model)
    others = {mark.path: mark for mark in found.others}
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    ids: set[int] = set()
    vectors = 0
    for name, module in model.named_modules():
        block = component_of.get(id(module))
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in ids:
                continue
            ids.add(id(parameter))
            if parameter.dim() < 2:
                vectors += parameter.numel()
                continue
            reason = _reason(name, module, key, block, tied, output, others)
            full = ".".join(part for part in (name, key) if part)
            stack = stack_of(module)
            if reason is None and block is not None and stack is not None:
                layers += [
                    Layer(f"{full}.{i}", block.component, block.name, module, (key, i), stack.transposed)
                    for i in range(len(parameter))
                ]
            elif reason is None and block is not None:
                layers.append(Layer(name, block.component, block.name, module, None, isinstance(module, Conv1D)))
            else:
                skipped.append(Skipped(full, block.component if block else "", reason or "", parameter.numel()))
    skipped.append(Skipped("norms and biases", "", "vectors, never pruned", vectors))
    order = {block.name: i for i, block in enumerate(blocks)}
    layers.sort(key=lambda layer: order[layer.block])
    size = sum(p.numel() for p in model.parameters())
    present = _present(paths, blocks)
    own = {path for component in COMPONENTS for path in family.paths(component)} if family else set()
    marks = {mark.path: mark for mark in found.marks if mark.path not in own}
    whys = [marks.get(path) or Mark(path, c, "`family`") for c in COMPONENTS for path in present.paths(c)]
    return Anatomy(present, blocks, tuple(layers), tuple(skipped), size, tuple(whys))


def _paths(model: Any, family: Family | None, found: Discovery) -> Family:
    """The paths that `family` names, and the discovered ones of the components that it does not name."""
    if family is None:
        family = FAMILIES.get(model.config.model_type, Family())
    own = [path for component in COMPONENTS for path in family.paths(component)]
    modules = dict(model.named_modules())
    for path in own:
        if path not in modules:
            raise SparsightError(f"`family`: the model has no module {path!r}; {_suggestion(found)}")

    def apart(path: str) -> bool:
        return not any(f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.") for other in own)

    return Family(*(family.paths(c) or tuple(path for path in found.family.paths(c) if apart(path)) for c in COMPONENTS))


def _blocks(model: nn.Module, family: Family) -> Iterator[Block]:
    for component in COMPONENTS:
        for path in family.paths(component):
            module = model.get_submodule(path)
            if isinstance(module, nn.ModuleList | nn.Sequential):
                for index, child in enumerate(module):
                    yield Block(f"{path}.{index}", component, child)
            else:
                yield Block(path, component, module)


def _present(family: Family, blocks: tuple[Block, ...]) -> Family:
    """Return the family with only those paths that the model has."""
    names = {block.name for block in blocks} | {block.name.rpartition(".")[0] for block in blocks}
    return replace(family, **{c: tuple(path for path in family.paths(c) if path in names) for c in COMPONENTS})


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _reason(
    name: str,
    module: nn.Module,
    key: str,
    block: Block | None,
    tied: set[int],
    output: nn.Module | None,
    others: Mapping[str, Mark],
) -> str | None:
    """Return why a matrix is never pruned, or None."""
    parameter = module._parameters[key]
    shared = id(parameter) in tied
    if output is not None and parameter is output._parameters.get("weight"):
        return "output head" + (", tied to the embeddings" if shared else "")
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    other = next((mark for path, mark in others.items() if f"{name}.".startswith(f"{path}.")), None)
    if block is None and other is not None:
        return f"neither vision nor language ({other.reason})"
    if block and any(ROUTERS.search(part) for part in name.removeprefix(block.name).split(".")):
        return "router or gate"
    stack = stack_of(module)
    if stack is not None and key in stack.keys:
        return "linear layer outside the blocks" if block is None else "weight tied to another module" if shared else None
    if hasattr(module, "_apply_gate") and key.endswith("_proj"):  # transformers' mark of fused experts
        return "fused experts of an unknown layout"
    if not is_linear(module) or key != "weight":
        return "bare parameter"
    if read_elsewhere(module):
        return "read by `nn.MultiheadAttention` itself"
    if block is None:
        return "linear layer outside the blocks"
    return "weight tied to another module" if shared else None


def _suggestion(found: Discovery) -> str:
    return f"found: `family={found.family}`" if str(found.family) else "no list of blocks with linear layers was found in it"
