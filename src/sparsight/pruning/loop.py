"""The loop: walk the calibration batches through the blocks, gather moments, prune, measure the output errors.

`propagate="block"` stops in front of every block, as the papers do: one run of the block to gather moments, one to walk
on, so two forwards in all. `"dense"` does the same and changes no weight before the walk is over. `"layer"` stops in
front of every layer, in the order in which the model calls them: a layer's inputs are in its stop's arguments, and later
layers of the same block get the outputs of the pruned earlier ones. Nothing runs twice, so one forward in all; the cost is
that the activations inside a block are held for all batches.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from sparsight import distributed
from sparsight.allocation.plan import Plan
from sparsight.calibration.gradients import evaluating, gradients
from sparsight.calibration.lockstep import lockstep
from sparsight.calibration.moment_cache import MomentCache
from sparsight.calibration.park import Park
from sparsight.errors import Notice, SparsightError
from sparsight.masks.matrix import is_finite
from sparsight.masks.pattern import Pattern
from sparsight.memory import peak_memory
from sparsight.model.anatomy import Anatomy
from sparsight.model.skeleton import device_of
from sparsight.progress import Progress
from sparsight.pruning.across_processes import prune_all
from sparsight.pruning.compose import Composition, check_processes, compose
from sparsight.pruning.journal import Journal
from sparsight.pruning.record import PruneRecord, add_to
from sparsight.pruning.streamed import StreamJournal
from sparsight.pruning.walks import BlockWalk, CollectWalk, LayerWalk, start_facts
from sparsight.pruning.work import Work

COLUMNS = 512  # of the logits, that a walk is compared by with a plain forward
LONG = 3600.0  # seconds of one core, from which on a refinement is warned about
SAME = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative to the largest logit; less precise dtypes: 2e-2


def can_reuse(composition: Composition) -> bool:
    """Whether this way of pruning needs the dense model's moments only."""
    again = composition.reconstruct or composition.permute or "gradient" in composition.needs
    return composition.propagate == "dense" and not again


def prune(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    batches: Sequence[Any],
    *,
    method: str | Composition | Callable | Any = "wanda",
    seed: int = 0,
    journal: Journal | StreamJournal | None = None,
    cache: MomentCache | None = None,
    original: Mapping[torch.Tensor, torch.Tensor] | None = None,
    progress: Progress | None = None,
    park: Park | None = None,
    teacher: tuple[nn.Module, Anatomy] | None = None,
    finite: bool = False,
    **options: Any,
) -> PruneRecord:
    """Prune `model` in place as `plan` says.

    `batches` are those of `sparsight.data`. `method` is a name, a function, a `Method` or a `Composition`; `options` are
    those of `compose`. Blocks that the `journal` holds are taken from there. With a `cache`, which `collect_moments` has
    filled from the same model and batches, nothing is run: the weights are those of `propagate="dense"`, and no errors of
    blocks are measured. `original` has the dense model's values of parameters that differ already and are not pruned, for
    the targets of reconstruction. `park` takes paused activations; `teacher` is a dense model of the
    same blocks, whose outputs are the targets. `finite`: the weights were looked at already.
    `progress(stop, done, all)` is called per stop.

    Every one of several processes gets the same model and all batches, walks its share of them and prunes its share of the
    layers; all end with the weights of a single process, bit for bit (with as many threads).

    **Raises** `SparsightError` before anything is changed for an unknown name or a contradictory combination, and, naming
    the layer, for a NaN or infinity in weights or inputs or a layer that no calibration token reached.
    """
    composition = method if isinstance(method, Composition) else compose(method, **options)
    check_processes(composition, distributed.world_size())
    if cache and not can_reuse(composition):
        raise SparsightError("cached moments serve `propagate=dense`, without `reconstruct`, `permute` and gradients")
    began = time.perf_counter()
    work = Work(anatomy, plan, batches, composition, seed, journal, progress)
    _warn_of_hours(work)
    if composition.dense_targets and (experts := [layer for layer in work.layers if layer.expert is not None]):
        raise SparsightError(
            f"`dense_targets`: experts, as {experts[0].name}, may see other tokens in the dense model; leave this out, "
            "or the experts with `ignore`"
        )
    for layer in [] if finite else work.layers:
        check_finite(layer.name, layer.weight)
    if cache:
        prune_from_cache(work, cache)
    elif batches:
        walk: Any = LayerWalk(work) if composition.propagate == "layer" else BlockWalk(work)
        second = None
        if teacher is not None:
            blocks = {block.name: block.module for block in teacher[1].blocks}
            second = teacher[0], [(name, blocks[name]) for name, _ in walk.stops]
        with evaluating(model), evaluating(model if teacher is None else teacher[0]):
            if "gradient" in composition.needs:
                work.sensitivity = gradients(model, work.layers, batches)
            lockstep(
                model, walk.stops, own_inputs(batches), walk.visit, earliest=earliest_of_all,
                ahead=getattr(walk, "ahead", None), as_it_was=partial(_values, original or {}), until=walk.until, park=park,
                ahead_in=second,
            )  # fmt: skip
        walk.finish()
    elif composition.needs:
        raise SparsightError(
            "`data`: this way of pruning needs calibration samples; give `data`, or magnitude without further steps"
        )
    else:
        for block in anatomy.blocks_with(set(plan)):
            layers = work.of_block(block.name)
            if not work.recall(block.name, layers):
                facts: dict[str, Any] = {}
                for layer in layers:
                    add_to(facts, work.prune_without_data(layer))
                work.finish_stop(block.name, layers, facts)
    work.record.seconds = time.perf_counter() - began
    work.record.memory = peak_memory(device_of(model))
    return work.record


def check_finite(name: str, W: torch.Tensor) -> None:
    """Refuse the weights of a layer, by a `SparsightError`, if they hold NaN or infinity."""
    if not is_finite(W):
        raise SparsightError(f"{name}: the weights hold NaN or infinity; nothing was pruned")


def prune_from_cache(work: Work, cache: MomentCache) -> None:
    """Prune every planned layer in place from the moments in a cache; nothing is run."""
    blocks = work.anatomy.blocks_with(set(work.plan))
    for block in blocks:
        layers = work.of_block(block.name)
        if not work.recall(block.name, layers):
            moments = cache.load(block.name, layers, work.composition.tokens.weigh)
            facts = start_facts(block.name, layers, moments)
            add_to(facts, prune_all([layer for layer in layers if layer.name in moments], moments, work.prune))
            del moments  # before those of the next block are read
            work.finish_stop(block.name, layers, facts)
        work.report(block.name, len(blocks))
    work.check_reached()


def _warn_of_hours(work: Work) -> None:
    """Say it where a refinement will take more than `LONG` seconds of one core."""
    seconds = 0.0
    for layer in work.layers:
        refine = work.composition.of(layer).refine
        if refine and refine.seconds and work.plan[layer.name].kind != "n:m":
            seconds += refine.seconds(*layer.shape)
    if seconds > LONG and distributed.is_main():
        warnings.warn(
            f"`refine`: without groups (`pattern` row or tensor) it takes about {seconds / 3600:,.0f} hours of one CPU core "
            "for these layers; n:m is fast, and so is `update=pcg` without it",
            Notice,
            stacklevel=3,
        )


@contextlib.contextmanager
def _values(others: Mapping[torch.Tensor, torch.Tensor]) -> Iterator[None]:
    """Give parameters other values inside the block, in place."""
    before = {p: p.data.clone() for p in others}
    try:
        for p, value in others.items():
            p.data.copy_(value)
        yield
    finally:
        for p, value in before.items():
            p.data.copy_(value)


@torch.no_grad()
def check_walk(model: nn.Module, anatomy: Anatomy, batches: Sequence[Any], park: Park | None = None) -> None:
    """Refuse a model whose output a walk would change, as a block that keeps a state of its own does.

    One batch is walked, every block run once more than the model does, and compared with a plain forward: what the last
    block of every list gives for every token, and the logits. Does nothing without batches. Changes nothing. Cost: three
    forwards of one batch.

    **Raises** `SparsightError` where the outputs differ.
    """
    if not batches:
        return
    outputs: dict[str, torch.Tensor] = {}
    ends = {block.name.rpartition(".")[0]: block.module for block in anatomy.blocks}  # the last block of every list

    def again(name: str, block: nn.Module, calls: Any) -> None:
        for call in calls.values():
            call()

    device, inputs = device_of(model), _last_logits_only(model, batches[0].inputs)
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: outputs.update({name: _tensor(output).clone()}))
        for name, module in ends.items()
    ]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            outputs["logits"] = _logits(model(**inputs))
            expected, outputs = outputs, {}
            torch.manual_seed(0)
            lockstep(
                model, [(block.name, block.module) for block in anatomy.blocks], [inputs],
                again, on_output=lambda i, output: outputs.update({"logits": _logits(output)}), park=park,
            )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    if outputs.keys() != expected.keys() or not all(_alike(outputs[name], expected[name]) for name in outputs):
        raise SparsightError(
            f"{type(model).__name__}: its blocks cannot be run one by one: the logits of such a walk differ from those of a "
            "plain forward; nothing was pruned. A method that needs no data, as magnitude, can prune it"
        )


def _alike(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two outputs are equal, or nearly."""
    if actual.shape != expected.shape:
        return False
    limit = SAME.get(expected.dtype, 2e-2) * float(expected.float().nan_to_num().abs().max())
    return torch.allclose(actual.float(), expected.float(), 0, limit, equal_nan=True)


def _last_logits_only(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs for the logits of the last token only, where a decoder can choose: those of a batch would fill the memory."""
    configs = (getattr(model, "config", None), getattr(getattr(model, "config", None), "text_config", None))
    decoder = not any(getattr(config, "is_encoder_decoder", False) for config in configs)
    if not decoder or "logits_to_keep" not in signature(model.forward).parameters:
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name != "labels"} | {"logits_to_keep": 1}  # a loss takes all


def _logits(output: Any) -> torch.Tensor:
    """Some columns of the logits of a model's output, or of its first tensor; what is wrong before the head changes all."""
    logits = getattr(output, "logits", None)
    logits = _tensor(output) if logits is None else logits
    return logits[..., :: max(1, logits.shape[-1] // COLUMNS)].clone()


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def collect_moments(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Any],
    cache: MomentCache,
    *,
    method: str | Composition | Callable | Any = "wanda",
    progress: Progress | None = None,
    **options: Any,
) -> None:
    """Fill `cache` with the moments that `method` needs of the dense model's layers: one walk, nothing is changed."""
    composition = method if isinstance(method, Composition) else compose(method, **options)
    plan = {layer.name: Pattern.row(0.5) for layer in anatomy.layers}  # every layer; no zeros are made
    walk = CollectWalk(Work(anatomy, plan, batches, composition, progress=progress), cache)
    with evaluating(model):
        lockstep(model, walk.stops, own_inputs(batches), walk.visit, earliest=earliest_of_all)
    cache.finish()


def own_inputs(batches: Sequence[Any]) -> dict[int, Any]:
    """This process's share of the batches, by their places: batch i is walked by process i % world size."""
    return {i: batches[i].inputs for i in range(distributed.rank(), len(batches), distributed.world_size())}


def earliest_of_all(place: int) -> int:
    """The earliest place of a stop in any process."""
    return min(distributed.all_gather(place))
