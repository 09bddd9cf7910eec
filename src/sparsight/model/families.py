"""Where a model keeps its blocks: paths per component, in forward order.

A path names either a list of blocks (every child is one block) or a single module (which is then one block).
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsight.errors import SparsightError

COMPONENTS = ("vision", "connector", "language")


@dataclass(frozen=True)
class Family:
    """Where a model keeps its blocks, in forward order; a component without a path is not named."""

    vision: tuple[str, ...] = ()
    connector: tuple[str, ...] = ()
    language: tuple[str, ...] = ()

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


# what `discover` does not find, by `config.model_type`
FAMILIES: dict[str, Family] = {
    "ovis2": Family(connector=("model.vision_tower.head_linear",)),  # the last layer of the vision tower, by its name
}
