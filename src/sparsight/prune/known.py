"""What is known of the dense model's inputs, on disk, block by block: a further pruning then costs no forward.

With `propagate="dense"` no layer sees what pruning did to another, so that the moments of the dense model are all that
any method, pattern or sparsity needs. One walk gathers them; what is pruned from them has the very bits of a walk of its
own. Steps that run a block again (reconstruction, permutation) or want gradients are not served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer
from sparsight.prune.choice import Choice
from sparsight.prune.moments import Moments, Weigh
from sparsight.prune.sums import Sums

FACTS = ("columns", "with_gram", "sequences", "rows")


def served(choice: Choice) -> bool:
    """Whether this way of pruning can be done from the dense model's moments alone."""
    return choice.propagate == "dense" and not (choice.reconstruct or choice.permute or "gradient" in choice.needs)


class Known:
    """Moments of every layer, in one file per block of `folder`; layers fed the same tensor share one entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def whole(self) -> bool:
        """Whether the walk that filled the folder came to its end."""
        return (self.folder / "whole").is_file()

    def finish(self) -> None:
        (self.folder / "whole").touch()

    def store(self, block: str, moments: Mapping[str, Moments]) -> None:
        """Keep what one block's layers saw."""
        self.folder.mkdir(parents=True, exist_ok=True)
        distinct = list({id(m): m for m in moments.values()}.values())
        places = {id(m): place for place, m in enumerate(distinct)}
        content = {"layers": {name: places[id(m)] for name, m in moments.items()}, "moments": [_out(m) for m in distinct]}
        part = self.folder / f"{block}.part"
        torch.save(content, part)
        part.replace(self.folder / f"{block}.pt")

    def recall(self, block: str, layers: Sequence[Layer], weigh: Weigh) -> dict[str, Moments]:
        """The moments of those of `layers` that calibration reached, tokens of each kind counting as `weigh` says."""
        path = self.folder / f"{block}.pt"
        try:
            content = torch.load(path, map_location=layers[0].weight.device, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise SparsightError(f"{path}: the moments kept there cannot be read ({error}); delete {self.folder}") from error
        known = [_back(facts, weigh, layers[0].weight.device) for facts in content["moments"]]
        return {x.name: known[content["layers"][x.name]] for x in layers if x.name in content["layers"]}


def _out(moments: Moments) -> dict[str, Any]:
    kinds = {name: (kind.count, kind.sums, kind._squares, kind.upper) for name, kind in moments.kinds.items()}
    return {**{name: getattr(moments, name) for name in FACTS}, "kinds": kinds}


def _back(facts: Mapping[str, Any], weigh: Weigh, device: torch.device) -> Moments:
    moments = Moments(facts["columns"], device, facts["with_gram"], weigh, sequences=facts["sequences"], rows=facts["rows"])
    for name, (count, sums, squares, upper) in facts["kinds"].items():
        kind = moments.kinds[name] = Sums(facts["columns"], device, False)
        kind.count, kind.sums, kind._squares, kind.upper = count, sums, squares, upper
    return moments
