"""Who does what where several processes prune: batches and layers are dealt out, what comes of them is everybody's.

Batch i is walked by process i % count, so that a turn of the processes is a run of batches, and sums are added up turn by
turn in the order of the batches. A layer is pruned by one process and its weights are sent to the others: all walk on with
the same bits, those of one process alone. One process is the case of count 1, in which nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sparsight import processes
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer
from sparsight.prune.lockstep import Call, Visit, lockstep
from sparsight.prune.moments import Moments
from sparsight.prune.record import add_to


def walk(model: nn.Module, stops: Sequence[tuple[str, nn.Module]], batches: Sequence[Any], visit: Visit) -> None:
    """Walk this process's share of `batches` in lockstep, stop by stop together with the other processes.

    `visit(name, module, calls)` has the places in `batches` for its keys; `calls` is empty where only others stand.
    """
    own = range(processes.rank(), len(batches), processes.count())

    def visit_own(name: str, module: nn.Module, calls: Mapping[int, Call]) -> None:
        visit(name, module, {own[i]: call for i, call in calls.items()})

    inputs = [batches[i].inputs for i in own]
    lockstep(model, stops, inputs, visit_own, earliest=lambda place: min(processes.each(place)))


def everywhere(calls: Iterable[int]) -> list[int]:
    """The batches that stand at a stop, those of the other processes too, in order."""
    return list(processes.together(dict.fromkeys(calls)))


def turns(standing: Iterable[int]) -> list[int]:
    """This process's batch of every turn in which any process has one of `standing`; its own may not be among them."""
    taken = dict.fromkeys(i // processes.count() for i in standing)
    return [turn * processes.count() + processes.rank() for turn in taken]


def prune_all(
    layers: Sequence[Layer], moments: Mapping[str, Moments], prune: Callable[[Layer, Moments], dict[str, Any]]
) -> dict[str, Any]:
    """Call `prune`, which changes a layer in place, on this process's share of `layers`, and take over what the others
    made of theirs; the facts of all.

    Of several errors the one of the first layer is raised, in every process.
    """
    mine: dict[int, tuple[Any, Any]] = {}
    for place, layer in enumerate(layers):
        home = moments[layer.name].home
        if (place if home is None else home) % processes.count() == processes.rank():
            try:
                mine[place] = prune(layer, moments[layer.name]), layer.weight
            except SparsightError as error:
                mine[place] = error, None
                break
    facts: dict[str, Any] = {}
    for place, (found, weight) in processes.together(mine).items():
        if isinstance(found, SparsightError):
            raise found
        if place not in mine:
            layers[place].write(weight)
        add_to(facts, found)
    return facts
