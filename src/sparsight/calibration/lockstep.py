"""Walk calibration batches through a model block by block, with the model's own forward as the pipeline.

Every batch runs the whole `model(**batch)` in its own greenlet. A pre-hook on each block hands control back to the
engine with that block's real arguments; when every batch that reaches the block has stopped in front of it, the engine
may run the block on any batch any number of times, change its weights, and let the batches go on through the changed
block. Nothing about wiring is assumed, so there is no code per family.

Greenlets and not threads: with one OS thread per batch torch builds an OpenMP pool per thread. Grad mode and autocast
belong to the OS thread, which greenlets share, so each side of a switch keeps its own.

A second walk of the same batches can go ahead of the first: each of its forwards runs through a block before the block is
visited, so that it sees the blocks as they were.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn
from transformers import Cache

from sparsight.calibration.park import Park


class Call(partial):
    """A block with the arguments that the model gave it, in `.args` and `.keywords`; a call gets copies of its caches."""

    def __call__(self) -> Any:
        """Run the block. A cache of keys and values, which the block would extend, is as the model gave it."""
        return self.func(*map(_fresh, self.args), **{name: _fresh(value) for name, value in self.keywords.items()})


def _fresh(value: Any) -> Any:
    return copy.deepcopy(value) if isinstance(value, Cache) else value


Visit = Callable[[str, nn.Module, Mapping[int, Call]], None]
Ahead = Callable[[str, int, Callable[[], Any]], None]  # (block, batch, run the block as it was)


def lockstep(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Sequence[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]],
    visit: Visit,
    *,
    on_output: Callable[[int, Any], None] | None = None,
    earliest: Callable[[int], int] = lambda place: place,
    ahead: Ahead | None = None,
    as_it_was: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    until: Collection[str] | None = None,
    park: Park | None = None,
    ahead_in: tuple[nn.Module, Sequence[tuple[str, nn.Module]]] | None = None,
) -> None:
    """Walk `batches` through `model`, stopping in front of every block.

    `blocks` are (name, module) in forward order; `batches` are keyed by their places, or by numbers of your own.
    `visit(name, block, calls)` may change the block's weights in place; `calls[i]()` runs the block on batch `i` with the
    arguments the model gave it (`calls[i].args`, `.keywords`), and only batches that reach the block are in `calls`. Any
    modules may be the blocks, single layers too. `on_output(i, output)` receives the model's output for batch `i`; without
    it a batch is dropped after its last visit, which saves the last block and the output head. Runs under `no_grad`, with
    `use_cache` off. Memory: the paused activations of all batches. Cost: one forward per batch plus what `visit` runs.

    Several engines may walk batches of their own, stop by stop together: `earliest` receives the place in `blocks` of
    this engine's first waiting batch (`len(blocks)` if there is none) and returns the smallest place of all engines. An
    engine without batches there calls `visit` with empty `calls`.

    With `ahead` every batch walks twice, and the second walk goes through each block before its visit: `ahead(name, i, run)`
    must call `run()` once, which lets batch `i` go through the block and returns the block's output. The second walk runs
    inside `as_it_was()`, which may put back what was changed outside the blocks, or through another model and its blocks of
    the same names, `ahead_in`. Cost: one forward per batch more, and its paused activations.

    The walk ends once the blocks named in `until` were visited, by default all. `park` takes what paused batches hold.

    A forward that enters a block again, as for a second image, stops only the first time; later on it finds the block as
    it is then, in both walks. **Raises** `RuntimeError` if a
    forward enters a block for the first time after the block's turn is over. Any error, from `visit` or from the model,
    unwinds every waiting forward and removes every hook.
    """
    blocks = list(blocks)
    own = dict(batches) if isinstance(batches, Mapping) else dict(enumerate(batches))
    other, places = (model, blocks) if ahead_in is None else (ahead_in[0], [*ahead_in[1]])
    with _cache_off(model), _cache_off(other), torch.no_grad(), _own_thread_state():
        torch.set_autocast_cache_enabled(False)  # it would keep a weight's cast from before a visit changed the weight
        walk, first = _Walk(model, blocks, own, on_output, park), _Walk(other, places, own if ahead else {}, None, park)
        try:
            with as_it_was():
                first.start()
            walk.start()
            left = {*until} if until is not None else {None}
            while left and (place := earliest(walk.first_place())) < len(blocks):
                if ahead is not None:
                    with as_it_was():
                        first.go_ahead(place, ahead)
                calls = walk.calls(place)
                with _own_thread_state():
                    visit(*blocks[place], calls)
                left.discard(blocks[place][0])
                waiting = [*calls]
                del calls  # they hold the inputs of every batch, which each batch lets go as it goes on
                walk.go_on(waiting)
        finally:
            walk.close()
            first.close()


class _Walk:
    """The greenlets of one walk, one per batch, and the hooks that pause them."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[tuple[str, nn.Module]],
        batches: dict[int, Any],
        on_output: Any,
        park: Park | None,
    ) -> None:
        self.model, self.blocks, self.batches, self.on_output, self.park = model, blocks, batches, on_output, park
        self.engine = getcurrent()
        self.walkers = {i: greenlet(self._forward) for i in batches}
        self.batch_of = {walker: i for i, walker in self.walkers.items()}
        self.standing: dict[int, tuple[int, tuple, dict]] = {}  # batch -> (block, args, kwargs)
        self.entered: dict[int, set[int]] = {i: set() for i in batches}
        self.visited: set[int] = set()
        self.hooks = [
            module.register_forward_pre_hook(self._pause(place), with_kwargs=True, prepend=True)
            for place, (_, module) in enumerate(blocks)
        ]

    def start(self) -> None:
        """Run every batch up to the first block that it reaches."""
        for i in self.walkers:
            self._switch_to(i, i)

    def first_place(self) -> int:
        """Return the place of the first block that any batch waits at; `len(blocks)` once no batch waits."""
        return min((place for place, _, _ in self.standing.values()), default=len(self.blocks))

    def calls(self, place: int) -> dict[int, Call]:
        """Return the block's call for every batch that waits in front of it, and begin the block's turn."""
        self.visited.add(place)
        block, here = self.blocks[place][1], sorted(i for i, (where, _, _) in self.standing.items() if where == place)
        return {i: Call(block, *self.standing[i][1], **self.standing[i][2]) for i in here}

    def go_on(self, batches: Iterable[int]) -> None:
        """Let batches go on through the block they wait at."""
        for i in batches:
            del self.standing[i]
            if self.on_output is None and len(self.entered[i]) == len(self.blocks):  # no visit follows
                self._drop(self.walkers[i])
            else:
                self._switch_to(i)

    def go_ahead(self, place: int, ahead: Ahead) -> None:
        """Let the batches that wait at a block go on through it, each by a call of `ahead`."""
        calls = self.calls(place)
        while calls:
            i = next(iter(calls))
            ahead(self.blocks[place][0], i, partial(self._through, i, place, calls.pop(i)))

    def _through(self, i: int, place: int, call: Call) -> Any:
        """Let one batch go on through the block it waits at; return the block's output."""
        if len(self.entered[i]) == len(self.blocks):  # nothing follows
            output = call()
            self.go_on([i])
            return output
        outputs: list[Any] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if not outputs:  # a forward may enter the block again
                outputs.append(output)

        hook = self.blocks[place][1].register_forward_hook(keep)
        try:
            self.go_on([i])
        finally:
            hook.remove()
        return outputs[0]

    def close(self) -> None:
        """Remove the hooks and unwind every forward that waits."""
        for hook in self.hooks:
            hook.remove()
        for walker in self.walkers.values():
            self._drop(walker)

    def _forward(self, i: int) -> None:
        """The body of a greenlet: one plain forward of one batch."""
        output = self.model(**self.batches[i])
        if self.on_output is not None:
            self.on_output(i, output)

    def _switch_to(self, i: int, *start: int) -> None:
        with _own_thread_state():
            self.walkers[i].switch(*start)

    def _drop(self, walker: greenlet) -> None:
        if not walker.dead:
            with _own_thread_state():
                walker.throw(GreenletExit)

    def _pause(self, place: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            i = self.batch_of.get(getcurrent())
            if i is None or place in self.entered[i]:  # the engine itself is running the block, or it had its turn
                return
            if place in self.visited:
                name = self.blocks[place][0]
                raise RuntimeError(f"block {name} was entered after its turn; list the blocks in forward order")
            self.entered[i].add(place)
            self.standing[i] = (place, args, kwargs)
            if self.park is not None:
                self.park.forward(sys._getframe(1), args, kwargs)
            with _own_thread_state():
                self.engine.switch()

        return hook


@contextlib.contextmanager
def _own_thread_state() -> Iterator[None]:
    """Restore grad mode and autocast once this side of a switch runs again."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    cached = torch.is_autocast_cache_enabled()
    if inference:
        raise RuntimeError("lockstep cannot run under torch.inference_mode(); use torch.no_grad()")
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for kind, enabled, dtype in casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def _cache_off(model: nn.Module) -> Iterator[None]:
    """Switch `use_cache` off on every configuration inside the model: with a cache a block cannot be run twice."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
