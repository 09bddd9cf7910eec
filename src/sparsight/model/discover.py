"""Find where a model keeps its blocks, from its module structure, names, classes and transformers' own marks.

1. Blocks are the children of the outermost lists whose children have a forward and hold matrices, alike or not. A list of
   lists is searched further, and an `nn.Sequential` counts where its children are no plain layers.
2. The component of a list is that of its nearest ancestor with a mark: a word in its name, a word in the name of its class
   (after the model's own prefix), or the modalities that transformers says it takes. Words of the connector come first.
3. Linear maps outside the lists belong to the connector where a name says so and neither a text model nor a part that is
   neither vision nor language holds them; the largest module around them without blocks is then one block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from sparsight.model.families import COMPONENTS, Family
from sparsight.model.matrices import holds_matrices, is_linear

OTHER = "other"  # audio, generated images or speech, actions, proteins: stays dense

# the words of a name, in the order in which they are looked for
WORDS: dict[str, tuple[str, ...]] = {
    OTHER: (
        "audio", "speech", "acoustic", "semantic", "asr", "ctc", "conformer", "codec", "wav", "talker", "code2wav",
        "token2wav", "timestamp", "diarization", "generation", "vqmodel", "vqvae", "vq", "dit", "action", "state", "protein",
    ),
    "connector": (
        "qformer", "perceiver", "resampler", "projector", "projection", "connector", "adapter", "adaptor", "merger",
        "abstractor", "aligner", "multimodal",
    ),
    "vision": ("vision", "visual", "image", "img", "video", "vit", "pixel", "clip", "siglip", "sam"),
    "language": ("language", "text", "llm", "lm"),
}  # fmt: skip
NO_CONNECTOR = ("patch", "position", "embeddings")  # a projection of patches is an embedding


@dataclass(frozen=True)
class Mark:
    """Where a path of a discovered family comes from: its component and the reason, as `inspect` prints it."""

    path: str
    component: str
    reason: str


@dataclass(frozen=True)
class Discovery:
    """The parts of a model: its family, a mark for each of its paths, and the lists that are neither part."""

    family: Family
    marks: tuple[Mark, ...]
    others: tuple[Mark, ...]


def discover(model: nn.Module) -> Discovery:
    """Find the blocks of a model, in forward order; changes nothing. A component that is not there has no path."""
    modules = dict(model.named_modules())
    lists = list(block_lists(model))
    marks = [_mark(model, path, modules) for path in lists]
    marks += _connectors(model, modules, marks)
    paths = {c: tuple(mark.path for mark in marks if mark.component == c) for c in COMPONENTS}
    others = tuple(mark for mark in marks if mark.component == OTHER)
    return Discovery(Family(**paths), tuple(mark for mark in marks if mark.component != OTHER), others)


def block_lists(model: nn.Module, path: str = "") -> Iterator[str]:
    """The paths of the outermost lists of blocks, in the order in which the model registered them."""
    for name, child in model.named_children():
        where = f"{path}.{name}" if path else name
        if not holds_matrices(child):
            continue
        if isinstance(child, nn.ModuleList | nn.Sequential) and any(_is_block(block) for block in child):
            yield where
        else:
            yield from block_lists(child, where)


def _is_block(module: nn.Module) -> bool:
    """Whether a list's child is a block: it has a forward of its own, holds matrices and is no plain layer."""
    plain = is_linear(module) or type(module).__module__.startswith("torch.nn.")
    return not plain and type(module).forward is not nn.Module.forward and holds_matrices(module)


def _mark(model: nn.Module, path: str, modules: dict[str, nn.Module]) -> Mark:
    """The component of a list, by its nearest ancestor with a mark; language, the rest, where there is none."""
    block = next(child for child in modules[path].children() if _is_block(child))
    places = [path, *_ancestors(path)]
    for place, kind in [(path, type(block).__name__), *((place, type(modules[place]).__name__) for place in places)]:
        name = place.rpartition(".")[2]
        for text, what in ((name, f"`{name}`"), (_own_part(kind, model), f"class {kind}")):
            if found := _component(text):
                return Mark(path, found[0], f"{found[1]!r} in {what}")
        if component := _modality(modules[place]):
            return Mark(path, component, f"the modalities of {type(modules[place]).__name__}")
    return Mark(path, "language", "no other mark")


def _ancestors(path: str) -> Iterator[str]:
    """The modules around a path, the nearest first, without the model itself."""
    while path := path.rpartition(".")[0]:
        yield path


def _component(text: str) -> tuple[str, str] | None:
    """The component that a name speaks of, and the word that says so."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text.replace("ViT", "Vit"))]
    joined = {*words, *("".join(pair) for pair in pairwise(words))}
    for component, names in WORDS.items():
        for name in names:
            if name in joined or f"{name}s" in joined:
                return component, name
    return None


def _own_part(kind: str, model: nn.Module) -> str:
    """The name of a class without that of the whole model, as `VideoLlama3`, which says nothing of its parts."""
    return kind.removeprefix(re.split(r"For[A-Z]|Model$", type(model).__name__)[0])


def _modality(module: nn.Module) -> str | None:
    """The component by the modalities that transformers says a module takes; None where it says nothing of its own."""
    modalities = vars(type(module)).get("input_modalities")
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    if not modalities:
        return None
    if "text" in modalities:
        return "language"
    return "vision" if {"image", "video"} & set(modalities) else OTHER


def _connectors(model: nn.Module, modules: dict[str, nn.Module], marks: list[Mark]) -> list[Mark]:
    """The connector's modules that are no lists: the largest without blocks around every linear map that is one's."""
    holders: dict[str, set[str]] = {}  # the components of the blocks inside a module
    for mark in marks:
        for place in (mark.path, *_ancestors(mark.path)):
            holders.setdefault(place, set()).add(mark.component)
    lists = {mark.path for mark in marks}
    found: dict[str, Mark] = {}
    for path, module in modules.items():
        around = [path, *_ancestors(path)]
        if not is_linear(module) or not lists.isdisjoint(around):
            continue
        if any(holders.get(place) in ({"language"}, {OTHER}) for place in around):
            continue
        names = [place.rpartition(".")[2] for place in around]
        spoken = [(part, name) for name in names if (part := _component(name)) is not None]
        if any(part[0] == OTHER for part, _ in spoken) or any(word in name for name in names for word in NO_CONNECTOR):
            continue
        word = next(((part[1], name) for part, name in spoken if part[0] == "connector"), None)
        if word is None:
            continue
        top = [place for place in around if place not in holders][-1]
        found.setdefault(top, Mark(top, "connector", f"{word[0]!r} in `{word[1]}`"))
    return list(found.values())
