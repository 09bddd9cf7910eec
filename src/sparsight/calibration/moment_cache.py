"""The moments of a dense model's inputs, on disk, block by block: a further pruning then costs no forward.

With `propagate="dense"` the inputs of every layer are those of the dense model, so that its moments are enough for any
method, pattern or sparsity. One walk gathers them; pruning from them gives the same bits as a walk of its own. Steps that
run a block again (reconstruction, permutation) or need gradients cannot use them.
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
        """Whether the walk that filled the folder is finished."""
        return (self.folder / "complete").is_file()

    def finish(self) -> None:
        """Mark the walk as finished."""
        (self.folder / "complete").touch()

    def store(self, block: str, moments: Mapping[str, Moments]) -> None:
        """Write the moments of one block's layers, in place of the block's old file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        distinct = list({id(m): m for m in moments.values()}.values())
        places = {id(m): place for place, m in enumerate(distinct)}
        layers = {name: places[id(m)] for name, m in moments.items()}
        with replace_file(self.folder / f"{block}.pt") as beside:
            torch.save({"layers": layers, "moments": [m.state() for m in distinct]}, beside)

    def load(self, block: str, layers: Sequence[Layer], weigh: Weigh) -> dict[str, Moments]:
        """The moments of those of `layers` that calibration reached, with the weights of `weigh` for tokens of each kind.

        **Raises** `SparsightError` for a file that cannot be read.
        """
        path, device = self.folder / f"{block}.pt", layers[0].weight.device
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            moments = [Moments.of_state(state, weigh, device) for state in content["moments"]]
        except (OSError, RuntimeError, ValueError) as error:
            raise SparsightError(f"{path}: the moments kept there cannot be read ({error}); delete {self.folder}") from error
        return {x.name: moments[content["layers"][x.name]] for x in layers if x.name in content["layers"]}
