"""Gather moments while a model runs: hooks on the layers of one block, for one or several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sparsight import distributed
from sparsight.calibration.moments import ERROR_ROWS, Moments, Weigh, alike, real_tokens
from sparsight.calibration.sums import Contribution
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Layer
from sparsight.model.matrices import DOWN, Stack, expert_product, stack_of


class Watch:
    """Accumulators on the layers of one block; `during` sets the masks of the running batch, `moments` holds the sums.

    `shared`: every process runs batches of its own, in turns. Each calls `exchange` at the end of a turn, with a batch or
    without, and all add all contributions in the order of the batches, as one process does. A Gram matrix is gathered in one
    process, its home, because it costs most; those of experts, which may be pooled, are gathered everywhere.
    """

    def __init__(
        self, layers: Sequence[Layer], batches: int, *, gram: bool = False, weigh: Weigh = alike, shared: bool = False
    ) -> None:
        self.moments: dict[str, Moments] = {}
        self.gram, self.weigh = gram, weigh
        self._layers = layers
        self._experts = {layer.name for layer in layers if layer.expert is not None}
        self._rows_each = max(1, -(-ERROR_ROWS // max(1, batches)))
        self._padding: Mapping[str, torch.Tensor] = {}
        self._drop: torch.Tensor | None = None
        self._dense: Mapping[str, torch.Tensor] = {}
        self._component = layers[0].component if layers else ""
        self._seen: list[tuple[torch.Tensor, str]] = []
        self._homes = 0
        self._shared = shared and distributed.world_size() > 1
        self._outbox: list[tuple[str, Contribution | str]] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[Watch]:
        """Hook the layers inside the block; yields itself."""
        experts: dict[int, list[Layer]] = {}
        hooks: list[Any] = []
        for layer in self._layers:
            if layer.expert is None:
                hooks.append(layer.module.register_forward_pre_hook(self._hook(layer)))
            else:
                experts.setdefault(id(layer.module), []).append(layer)
        for group in experts.values():
            module = group[0].module
            stack = stack_of(module)
            if stack is not None and stack.routed:
                hooks.append(module.register_forward_pre_hook(self._hook_experts(group, stack)))
            else:
                products = _Products(group, self._see_stack)
                hooks.append(module.register_forward_pre_hook(products.enter))
                hooks.append(module.register_forward_hook(products.exit, always_call=True))  # after an error, too
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def during(
        self, padding: Mapping[str, torch.Tensor], drop: torch.Tensor | None = None,
        dense: Mapping[str, torch.Tensor] | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Run one batch with these masks of real tokens.

        `drop` marks language tokens (B, T) that a rule leaves out; `dense` are the layers' inputs in the dense model.
        """
        self._padding, self._drop, self._dense, self._seen = padding, drop, dense or {}, []
        try:
            yield
        finally:
            self._padding, self._drop, self._dense, self._seen = {}, None, {}, []

    def see(self, layer: Layer, X: torch.Tensor) -> None:
        """Add the inputs X (..., in) of one layer; layers of one batch with the same tensor share its sums."""
        for tensor, name in self._seen:
            if tensor is X:
                return self._bring(layer.name, name)
        self._seen.append((X, layer.name))
        flat, image = real_tokens(X, self._padding, self._component, self._drop)
        Z = self._dense.get(layer.name)
        dense = None if Z is None or Z.shape != X.shape else real_tokens(Z, self._padding, self._component, self._drop)[0]
        return self._bring(layer.name, self._contribution(flat, image, self._sequences(X), dense))

    def exchange(self) -> None:
        """Add the contributions of this turn from all processes; does nothing unless `shared`."""
        if self._shared:
            mine, self._outbox = self._outbox, []
            for theirs in distributed.all_gather(mine):
                for name, brought in theirs:
                    self._take(name, brought)

    def _bring(self, name: str, brought: Contribution | str) -> None:
        """Add a contribution to a layer, or the layer's name to another layer fed the same, now or at the exchange."""
        if not self._shared:
            self._take(name, brought)
        else:
            self._outbox.append((name, brought if isinstance(brought, str) else brought.copied()))

    def _take(self, name: str, brought: Contribution | str) -> None:
        if isinstance(brought, str):
            self.moments[name] = self.moments[brought]
            return
        if name not in self.moments:
            home = None
            if self._shared and self.gram and name not in self._experts:
                home, self._homes = self._homes % distributed.world_size(), self._homes + 1
            gram = self.gram and home in (None, distributed.rank())
            self.moments[name] = Moments(brought.rows.shape[1], brought.rows.device, gram, self.weigh, home)
        self.moments[name].take(brought)

    def _contribution(
        self, X: torch.Tensor, image: torch.Tensor | None, sequences: int, dense: torch.Tensor | None = None
    ) -> Contribution:
        return Contribution.of(X, gram=self.gram, rows=self._rows_each, image=image, sequences=sequences, dense=dense)

    def _sequences(self, X: torch.Tensor) -> int:
        """How many samples X holds: its rows, or the batch's where they are packed into one row of tokens."""
        text = self._padding.get("text")
        return X.shape[0] if X.dim() > 2 or text is None else text.shape[0]

    def _hook(self, layer: Layer):
        def gather(module: Any, args: tuple) -> None:
            self.see(layer, args[0])

        return gather

    def _hook_experts(self, layers: Sequence[Layer], stack: Stack):
        """Fused experts get (tokens, in) and which experts each token goes to; every expert sees its own tokens only."""

        def gather(module: Any, args: tuple) -> None:
            X, routes = args[0], args[1]  # (tokens, in), (tokens, k)
            places = torch.arange(X.shape[0], device=X.device).unsqueeze(1)
            real, image = real_tokens(places, self._padding, self._component, self._drop)
            for layer in layers:
                key, index = layer.expert  # type: ignore[misc]
                here = (routes[real[:, 0]] == index).any(1)
                inputs = X[real[here, 0]]
                if key == DOWN:
                    first = expert_product(module, stack, stack.keys[0], index, inputs)
                    gated = getattr(module, "has_gate", True)
                    inputs = module._apply_gate(first) if gated else module.act_fn(first)
                if len(inputs):
                    there = None if image is None else image[here]
                    self._bring(layer.name, self._contribution(inputs, there, self._sequences(X)))

        return gather

    def _see_stack(self, layer: Layer, X: torch.Tensor) -> None:
        """Add the inputs X (tokens, in) of one expert; rows of zeros stand for tokens that go to other experts."""
        if X.shape[1] != layer.shape[1]:
            raise SparsightError(f"{layer.name}: fused experts of an unknown layout; leave them out with `ignore`")
        places = torch.arange(X.shape[0], device=X.device).unsqueeze(1)
        real, image = real_tokens(places, self._padding, self._component, self._drop)
        here = (X[real[:, 0]] != 0).any(1)
        if bool(here.any()):
            there = None if image is None else image[here]
            text = self._padding.get("text")
            sequences = X.shape[0] if text is None else text.shape[0]
            self._bring(layer.name, self._contribution(X[real[here, 0]], there, sequences))


@contextlib.contextmanager
def inputs_of_layers(layers: Sequence[Layer]) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of the inputs (..., in) that layers get inside the block, by name; those with the same input share one."""
    inputs: dict[str, torch.Tensor] = {}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(name: str, module: Any, args: tuple) -> None:
        copies = [copy for X, copy in seen if X is args[0]] or [args[0].clone()]
        seen.append((args[0], copies[0]))
        inputs[name] = copies[0]

    hooks = [layer.module.register_forward_pre_hook(partial(keep, layer.name)) for layer in layers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


class _Products(TorchFunctionMode):
    """Sees the inputs of the `torch.bmm` by which a module multiplies a stack of experts, while the module runs."""

    def __init__(self, layers: Sequence[Layer], see: Callable[[Layer, torch.Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.stacks: dict[int, list[Layer]] = {}
        for layer in layers:
            self.stacks.setdefault(layer.parameter.data_ptr(), []).append(layer)

    def enter(self, module: Any, args: tuple) -> None:
        """The pre-hook of the module."""
        self.__enter__()

    def exit(self, module: Any, args: tuple, output: Any) -> None:
        """The hook of the module."""
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul) and args[1].dim() == 3:
            for layer in self.stacks.get(args[1].data_ptr(), ()):
                self.see(layer, args[0][layer.expert[1]])  # type: ignore[index]
        return func(*args, **(kwargs or {}))
