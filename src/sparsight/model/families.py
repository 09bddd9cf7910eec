"""Where each model type keeps its blocks: one entry per `config.model_type`, in forward order.

An entry names either a list of blocks (every child is one block) or a single module (which is then one block). Paths
that a variant does not have (T5 and LLaMA inside InstructBLIP) are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsight.errors import SparsightError

COMPONENTS = ("vision", "connector", "language")


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its blocks, in forward order."""

    vision: tuple[str, ...]
    connector: tuple[str, ...]
    language: tuple[str, ...]

    def paths(self, component: str) -> tuple[str, ...]:
        """Return the module paths of one component."""
        return getattr(self, component)

    @classmethod
    def parse(cls, text: str) -> Family:
        """Read `vision=path,language=path+path`; `+` joins several paths. **Raises** `SparsightError` for other forms."""
        paths: dict[str, tuple[str, ...]] = dict.fromkeys(COMPONENTS, ())
        for part in text.split(","):
            component, _, value = part.partition("=")
            component = component.strip()
            if component not in COMPONENTS or not value.strip():
                raise SparsightError(
                    f"`family`: {part.strip()!r} is not COMPONENT=PATH with a component of {', '.join(COMPONENTS)}; "
                    "write for example vision=model.vision.layers,language=model.text.layers"
                )
            paths[component] += tuple(p.strip() for p in value.split("+") if p.strip())
        return cls(paths["vision"], paths["connector"], paths["language"])

    def __str__(self) -> str:
        return ",".join(f"{c}={'+'.join(self.paths(c))}" for c in COMPONENTS if self.paths(c))


_BLIP_LANGUAGE = (
    "language_model.encoder.block",  # T5
    "language_model.decoder.block",
    "language_model.model.decoder.layers",  # OPT
    "language_model.model.layers",  # LLaMA, Vicuna
)
_BLIP = Family(
    vision=("vision_model.encoder.layers",),
    connector=("qformer.encoder.layer", "language_projection"),
    language=_BLIP_LANGUAGE,
)
_QWEN = Family(
    vision=("model.visual.blocks",),
    connector=("model.visual.merger", "model.visual.deepstack_merger_list"),
    language=("model.language_model.layers",),
)
_TOWER = Family(  # one vision tower, one projector, one decoder
    vision=("model.vision_tower.encoder.layers",),
    connector=("model.multi_modal_projector",),
    language=("model.language_model.layers",),
)

FAMILIES: dict[str, Family] = {
    "instructblip": _BLIP,
    "blip-2": _BLIP,
    "llava": _TOWER,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "paligemma": _TOWER,
    "gemma3": _TOWER,
    "smolvlm": Family(
        vision=("model.vision_model.encoder.layers",),
        connector=("model.connector",),
        language=("model.text_model.layers",),
    ),
}
