"""Who does what where several processes prune: batches and layers are dealt out, what comes of them is everybody's.

Batch i is walked by process i % world size, so that a turn of the processes is a run of batches, and sums are added up
turn by turn in the order of the batches. A layer is pruned by one process and its weights are sent to the others: all walk
on with the same bits, those of one process alone. One process is the case of world size 1, in which nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sparsight import distributed
from sparsight.calibration.moments import Moments
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer
from sparsight.pruning.record import add_to


def everywhere(calls: Iterable[int]) -> list[int]:
    """The batches that stand at a stop, those of the other processes too, in order."""
    return list(distributed.gather_dict(dict.fromkeys(calls)))


def turns(standing: Iterable[int]) -> list[int]:
    """This process's batch of every turn in which any process has one of `standing`; its own may not be among them."""
    rounds = dict.fromkeys(i // distributed.world_size() for i in standing)
    return [turn * distributed.world_size() + distributed.rank() for turn in rounds]


def prune_all(
    layers: Sequence[Layer], moments: Mapping[str, Moments], prune: Callable[[Layer, Moments], dict[str, Any]]
) -> dict[str, Any]:
    """Call `prune`, which changes a layer in place, on this process's share of `layers`, and take over what the others
    made of theirs; the facts of all.

    **Raises** the `SparsightError` of the first layer that has one, in every process.
    """
    mine: dict[int, tuple[Any, Any]] = {}
    for place, layer in enumerate(layers):
        home = moments[layer.name].home
        if (place if home is None else home) % distributed.world_size() == distributed.rank():
            try:
                mine[place] = prune(layer, moments[layer.name]), layer.weight
            except SparsightError as error:
                mine[place] = error, None
                break
    facts: dict[str, Any] = {}
    for place, (result, weight) in distributed.gather_dict(mine).items():
        if isinstance(result, SparsightError):
            raise result
        if place not in mine:
            layers[place].write(weight)
        add_to(facts, result)
    return facts
