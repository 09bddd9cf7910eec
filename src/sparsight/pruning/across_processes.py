"""Pruning on several processes: each works on its share of batches and layers, and all get the results.

Process i % world size walks batch i. So one turn of all processes covers consecutive batches, and sums are added up turn by
turn in the order of the batches. One process prunes a layer and sends its weights to the others: all continue with the bits
of a single process. With world size 1 nothing is sent.
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
    """The batches of all processes that wait at a stop, in order."""
    return list(distributed.gather_dict(dict.fromkeys(calls)))


def turns(standing: Iterable[int]) -> list[int]:
    """This process's batch of every turn in which any process has one of `standing`; its own may not be among them."""
    rounds = dict.fromkeys(i // distributed.world_size() for i in standing)
    return [turn * distributed.world_size() + distributed.rank() for turn in rounds]


def prune_all(
    layers: Sequence[Layer], moments: Mapping[str, Moments], prune: Callable[[Layer, Moments], dict[str, Any]]
) -> dict[str, Any]:
    """Call `prune`, which changes a layer in place, on this process's share of `layers`; copy the weights of the other
    processes' layers, and return the facts of all.

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
