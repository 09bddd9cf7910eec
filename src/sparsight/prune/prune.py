"""The loop: walk the calibration batches through the blocks, gather moments, prune, measure what it cost.

`propagate="block"` stops in front of every block, as the papers do: one run of the block to gather moments, one to walk
on, so two forwards in all. `"dense"` does the same and changes no weight before the walk is over. `"stage"` stops in
front of every layer, in the order in which the model calls them: a layer's inputs are in its stop's arguments, and later
layers of the same block see what the pruned earlier ones put out; nothing runs twice, so one forward in all, at the price
of holding the activations inside a block for all batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from sparsight import processes
from sparsight.errors import SparsightError
from sparsight.memory import peak_memory
from sparsight.model.anatomy import Anatomy
from sparsight.plan.pattern import Pattern
from sparsight.plan.plan import Plan
from sparsight.prune.blocks import BlockWalk, Gathering
from sparsight.prune.choice import Choice, choose, refuse_many
from sparsight.prune.gradients import evaluating, gradients
from sparsight.prune.journal import Journal
from sparsight.prune.known import Known, served
from sparsight.prune.layers import LayerWalk
from sparsight.prune.record import PruneRecord
from sparsight.prune.sharing import walk


def prune(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    batches: Sequence[Any],
    *,
    method: str | Choice | Callable | Any = "wanda",
    seed: int = 0,
    journal: Journal | None = None,
    known: Known | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> PruneRecord:
    """Prune `model` in place as `plan` says.

    `batches` have `.inputs` (what `model(**inputs)` takes) and `.padding` (masks of real tokens). `method` is a name, a
    function, a `Method` or a `Choice`; `options` are those of `choose`. Blocks that the `journal` holds are taken from
    there. With `known`, which `know` has filled from the same model and batches, nothing is run: the weights are those of
    `propagate="dense"`, and no errors of blocks are measured. `progress(stop, done, all)` is called per stop.

    On several processes every one is given the same model and all batches, walks its share of them and prunes its share
    of the layers; all end with the weights of one process alone, bit for bit (given as many threads).

    **Raises** `SparsightError` before anything is changed for an unknown name or a combination that makes no sense, and,
    naming the layer, for a NaN or infinity in weights or inputs or a layer that no calibration token reached.
    """
    choice = method if isinstance(method, Choice) else choose(method, **options)
    refuse_many(choice, processes.count())
    if known and not served(choice):
        raise SparsightError("known moments serve --propagate dense, without --reconstruct, --permute and gradients")
    began = time.perf_counter()
    work = (LayerWalk if choice.propagate == "stage" else BlockWalk)(anatomy, plan, batches, choice, seed, journal, progress)
    for layer in work.layers:
        if not torch.isfinite(layer.weight).all():
            raise SparsightError(f"{layer.name}: the weights hold NaN or infinity; nothing was pruned")
    if known:
        for block in anatomy.blocks_with(set(plan)):
            work.take(block.name, known)
        work.finish()
    elif not batches:
        if choice.needs:
            raise SparsightError(
                "--data: this way of pruning needs calibration samples; give --data, or magnitude without further steps"
            )
        for layer in work.layers:
            layer.write(work.pruned(layer, None))
    else:
        with evaluating(model):
            if "gradient" in choice.needs:
                work.sensitivity = gradients(model, work.layers, batches)
            walk(model, work.stops(anatomy), batches, work.visit)
        work.finish()
    work.record.seconds = time.perf_counter() - began
    work.record.memory = peak_memory(next(model.parameters()).device)
    return work.record


def know(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    known: Known,
    *,
    method: str | Choice | Callable | Any = "wanda",
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> None:
    """Fill `known` with what `method` needs to know of every layer of the dense model: one walk, nothing is changed."""
    choice = method if isinstance(method, Choice) else choose(method, **options)
    plan = {layer.name: Pattern.row(0.5) for layer in anatomy.layers}  # every layer; no zeros are made
    work = Gathering(anatomy, plan, batches, choice, 0, None, progress)
    work.known = known
    with evaluating(model):
        walk(model, work.stops(anatomy), batches, work.visit)
    known.finish()
