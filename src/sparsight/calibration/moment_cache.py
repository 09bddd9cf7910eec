"""The moments of a dense model's inputs, on disk, block by block: a further pruning then costs no forward.

With `propagate="dense"` no layer sees what pruning did to another, so that the moments of the dense model are all that
any method, pattern or sparsity needs. One walk gathers them; what is pruned from them has the very bits of a walk of its
own. Steps that run a block again (reconstruction, permutation) or need gradients cannot use them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sparsight.calibration.moments import Moments, Weigh
from sparsight.errors import SparsightError
from sparsight.files import replace_file
from sparsight.model.anatomy import Layer


class MomentCache:
    """Moments of every layer, in one file per block of `folder`; layers fed the same tensor share one entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def complete(self) -> bool:
        """Whether the walk that filled the folder came to its end."""
        return (self.folder / "complete").is_file()

    def finish(self) -> None:
        """Note that the walk came to its end."""
        (self.folder / "complete").touch()

    def store(self, block: str, moments: Mapping[str, Moments]) -> None:
        """Write the moments of one block's layers, in place of what the folder has of the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        distinct = list({id(m): m for m in moments.values()}.values())
        places = {id(m): place for place, m in enumerate(distinct)}
        layers = {name: places[id(m)] for name, m in moments.items()}
        with replace_file(self.folder / f"{block}.pt") as beside:
            torch.save({"layers": layers, "moments": [m.state() for m in distinct]}, beside)

    def load(self, block: str, layers: Sequence[Layer], weigh: Weigh) -> dict[str, Moments]:
        """The moments of those of `layers` that calibration reached, tokens of each kind counting as `weigh` says.

        **Raises** `SparsightError` for a file that cannot be read.
        """
        path, device = self.folder / f"{block}.pt", layers[0].weight.device
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise SparsightError(f"{path}: the moments kept there cannot be read ({error}); delete {self.folder}") from error
        moments = [Moments.of_state(state, weigh, device) for state in content["moments"]]
        return {x.name: moments[content["layers"][x.name]] for x in layers if x.name in content["layers"]}
