"""Walk calibration batches through a model block by block, with the model's own forward as the pipeline.

Every batch runs the whole `model(**batch)` in its own greenlet. A pre-hook on each block hands control back to the
engine with that block's real arguments; when every batch that will come stands in front of the same block, the engine
may run the block on any of them as often as it likes, change its weights, and let the batches walk on through the
changed block. Nothing about wiring is assumed, so there is no code per family.

Greenlets and not threads: with one OS thread per batch torch builds an OpenMP pool per thread. Grad mode and autocast
belong to the OS thread, which greenlets share, so each side of a switch keeps its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

Call = partial  # of the block, with the arguments that the model gave it in `.args` and `.keywords`
Visit = Callable[[str, nn.Module, Mapping[int, Call]], None]


def lockstep(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Sequence[Mapping[str, Any]],
    visit: Visit,
    *,
    done: Callable[[int, Any], None] | None = None,
    earliest: Callable[[int], int] = lambda position: position,
) -> None:
    """Walk `batches` through `model`, stopping in front of every block.

    `blocks` are (name, module) in forward order. `visit(name, block, calls)` may change the block's weights in place;
    `calls[i]()` runs the block on batch `i` with the arguments the model gave it (`calls[i].args`, `.keywords`), and only
    batches that reach the block are in `calls`. Any modules may be the blocks, single layers too. `done(i, output)`
    receives what the model returned; without it a batch is dropped once it was visited in front of every block, which
    saves the last of them and the output head. Runs under `no_grad`; `use_cache` is off meanwhile. Memory: the paused
    activations of all batches. Cost: one forward per batch plus what `visit` runs.

    Several engines may walk batches of their own, stop by stop together: `earliest` is given the place in `blocks` of the
    first one that a batch stands at (their number, where none does) and gives the least of all engines' places. An engine
    without batches there visits with no `calls`.

    **Raises** `RuntimeError` if a forward enters a block twice, or after the block's turn is over. Any error, from
    `visit` or from the model, unwinds every waiting forward and removes every hook.
    """
    walk = _Walk(model, blocks, batches, visit, done, earliest)
    with _cache_off(model), torch.no_grad(), _own_thread_state():
        torch.set_autocast_cache_enabled(False)  # it would go on casting a weight that a visit has changed
        walk.run()


class _Walk:
    def __init__(self, model, blocks, batches, visit, done, earliest) -> None:
        self.model, self.batches, self.visit, self.done, self.earliest = model, batches, visit, done, earliest
        self.blocks = list(blocks)
        self.engine = getcurrent()
        self.walkers = [greenlet(self._forward) for _ in batches]
        self.batch_of = {walker: i for i, walker in enumerate(self.walkers)}
        self.standing: dict[int, tuple[int, tuple, dict]] = {}  # batch -> (block, args, kwargs)
        self.entered: list[set[int]] = [set() for _ in batches]
        self.visited: set[int] = set()

    def run(self) -> None:
        hooks = [
            module.register_forward_pre_hook(self._pause(position), with_kwargs=True)
            for position, (_, module) in enumerate(self.blocks)
        ]
        try:
            for i in range(len(self.walkers)):
                self._walk_on(i, i)
            while (position := self._earliest()) < len(self.blocks):
                self._stop(position)
        finally:
            for hook in hooks:
                hook.remove()
            for walker in self.walkers:
                self._drop(walker)

    def _earliest(self) -> int:
        """The place of the earliest block that any batch stands at; behind the last where all are through."""
        return self.earliest(min((where for where, _, _ in self.standing.values()), default=len(self.blocks)))

    def _stop(self, position: int) -> None:
        """Visit a block, then let the batches that stand there walk on."""
        name, block = self.blocks[position]
        here = sorted(i for i, (where, _, _) in self.standing.items() if where == position)
        self.visited.add(position)
        with _own_thread_state():
            self.visit(name, block, {i: self._call(block, i) for i in here})
        for i in here:
            del self.standing[i]
            if self.done is None and len(self.entered[i]) == len(self.blocks):  # nothing left to see
                self._drop(self.walkers[i])
            else:
                self._walk_on(i)

    def _call(self, block: nn.Module, i: int) -> Call:
        _, args, kwargs = self.standing[i]
        return partial(block, *args, **kwargs)

    def _forward(self, i: int) -> None:
        """The body of a greenlet: one plain forward of one batch."""
        output = self.model(**self.batches[i])
        if self.done is not None:
            self.done(i, output)

    def _walk_on(self, i: int, *start: int) -> None:
        with _own_thread_state():
            self.walkers[i].switch(*start)

    def _drop(self, walker: greenlet) -> None:
        if not walker.dead:
            with _own_thread_state():
                walker.throw(GreenletExit)

    def _pause(self, position: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            i = self.batch_of.get(getcurrent())
            if i is None:  # the engine itself is running the block
                return
            name = self.blocks[position][0]
            if position in self.entered[i]:
                raise RuntimeError(f"block {name} was entered twice in one forward; it cannot be calibrated on its own")
            if position in self.visited:
                raise RuntimeError(f"block {name} was entered after its turn; list the blocks in forward order")
            self.entered[i].add(position)
            self.standing[i] = (position, args, kwargs)
            with _own_thread_state():
                self.engine.switch()

        return hook


@contextlib.contextmanager
def _own_thread_state() -> Iterator[None]:
    """Put grad mode and autocast back to what they were once this side of a switch runs again."""
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
