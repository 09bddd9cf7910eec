"""The parts of a model: components, blocks in forward order, prunable layers, and what is never pruned and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from sparsight.errors import SparsightError
from sparsight.model.families import COMPONENTS, FAMILIES, Family

SPARSE_FROM = 0.01
FUSED = ("gate_up_proj", "down_proj")  # (experts, out, in) each
ROUTERS = ("router", "gate")  # names of the layer that chooses experts in mixture-of-experts models


@dataclass(frozen=True)
class Layer:
    """One prunable linear map, known by its module name.

    A fused tensor of experts (experts, out, in) is one layer per expert: `expert` is the tensor's name in `module` and
    the expert's index, and `name` ends in both.
    """

    name: str
    component: str
    block: str
    module: nn.Module
    expert: tuple[str, int] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weights: (out, in), or (experts, out, in)."""
        return cast(nn.Parameter, getattr(self.module, self.expert[0] if self.expert else "weight"))

    @property
    def weight(self) -> torch.Tensor:
        """The (out, in) matrix itself, not a copy."""
        return self.parameter.data[self.expert[1]] if self.expert else self.parameter.data

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def sparse(self) -> bool:
        """Whether at least 1 % of the weights are zero; a dense layer may hold a few zeros, too."""
        size = self.weight.numel()
        return size - int(torch.count_nonzero(self.weight)) >= SPARSE_FROM * size  # a sum of booleans makes a copy in int64

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
    """A model taken apart; `family` names only paths that the model has."""

    family: Family
    blocks: tuple[Block, ...]
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    parameters: int

    def __repr__(self) -> str:
        return f"Anatomy({len(self.blocks)} blocks, {len(self.layers)} prunable layers, {self.parameters:,} parameters)"

    def __getitem__(self, name: str) -> Layer:
        """Return the layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def component(self, name: str) -> tuple[Layer, ...]:
        """Return the layers of one component, in forward order of their blocks."""
        return tuple(layer for layer in self.layers if layer.component == name)

    def blocks_with(self, names: set[str]) -> tuple[Block, ...]:
        """Return the blocks that hold any of the layers with these names, in forward order."""
        holders = {layer.block for layer in self.layers if layer.name in names}
        return tuple(block for block in self.blocks if block.name in holders)


def anatomy(model: Any, family: Family | None = None) -> Anatomy:
    """List the blocks and layers of `model`; changes nothing and copies no weight.

    **Raises** `SparsightError` for a model type that is not in the table (with the model's block lists, ready for
    `family`), and for a path of `family` that the model does not have.
    """
    paths = family or FAMILIES.get(model.config.model_type)
    if paths is None:
        raise SparsightError(_unknown(model))
    blocks = tuple(_blocks(model, paths, strict=family is not None))
    for component in ("vision", "language"):
        if not any(block.component == component for block in blocks):
            raise SparsightError(
                f"no {component} blocks found at {', '.join(paths.paths(component)) or 'any path'}; {_suggestion(model)}"
            )
    tied = _tied(model)
    component_of = {id(m): block for block in blocks for m in block.module.modules()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
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
            reason = _reason(name, module, parameter, block, tied, output)
            full = ".".join(part for part in (name, key) if part)
            if reason is None and block is not None:
                experts = range(len(parameter)) if parameter.dim() == 3 else ()
                layers += [Layer(f"{full}.{i}", block.component, block.name, module, (key, i)) for i in experts] or [
                    Layer(name, block.component, block.name, module)
                ]
            else:
                skipped.append(Skipped(full, block.component if block else "", reason or "", parameter.numel()))
    skipped.append(Skipped("norms and biases", "", "vectors, never pruned", vectors))
    order = {block.name: i for i, block in enumerate(blocks)}
    layers.sort(key=lambda layer: order[layer.block])
    size = sum(p.numel() for p in model.parameters())
    return Anatomy(_present(paths, blocks), blocks, tuple(layers), tuple(skipped), size)


def _blocks(model: nn.Module, family: Family, strict: bool) -> Iterator[Block]:
    for component in COMPONENTS:
        for path in family.paths(component):
            try:
                module = model.get_submodule(path)
            except AttributeError:
                if strict:
                    raise SparsightError(f"`family`: the model has no module {path!r}; {_suggestion(model)}") from None
                continue
            if isinstance(module, nn.ModuleList):
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
    parameter: nn.Parameter,
    block: Block | None,
    tied: set[int],
    output: nn.Module | None,
) -> str | None:
    """Return why a matrix is never pruned, or None."""
    shared = id(parameter) in tied
    if output is not None and parameter is output._parameters.get("weight"):
        return "output head" + (", tied to the embeddings" if shared else "")
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution (patch embedding)"
    if parameter.dim() == 3 and block and hasattr(module, "_apply_gate"):  # transformers' mark of fused experts
        fused = {id(module._parameters.get(key)) for key in FUSED}
        plain = id(parameter) in fused and not (module.is_transposed or module.has_bias) and module.has_gate
        return None if plain else "fused experts of an unknown layout"
    if name.rpartition(".")[2] in ROUTERS and block:
        return "router"
    if not isinstance(module, nn.Linear):
        return "bare parameter"
    if block is None:
        return "linear layer outside the blocks"
    return "weight tied to another module" if shared else None


def block_lists(model: nn.Module) -> dict[str, list[str]]:
    """Return the paths of all lists of equal blocks with linear layers, per component, guessed from words in the path."""
    lists: dict[str, list[str]] = {"vision": [], "language": []}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(outer + ".") for group in lists.values() for outer in group):
            continue
        alike = all(type(child) is type(module[0]) for child in module)
        if alike and any(isinstance(m, nn.Linear) for m in module[0].modules()):
            words = name.lower()
            vision = any(word in words for word in ("vis", "image", "patch", "pixel"))
            lists["vision" if vision else "language"].append(name)
    return lists


def _suggestion(model: nn.Module) -> str:
    lists = block_lists(model)
    ready = ",".join(f"{component}={'+'.join(paths)}" for component, paths in lists.items() if paths)
    return f"block lists found: `family={ready}`" if ready else "no list of blocks with linear layers was found in it"


def _unknown(model: Any) -> str:
    kind = model.config.model_type
    return f"model type {kind!r} is not in the table ({', '.join(FAMILIES)}); {_suggestion(model)}"
