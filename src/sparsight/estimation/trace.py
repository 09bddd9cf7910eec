"""A forward and backward without weights: the FLOPs and the memory of a model, from shapes alone.

Parameters live on the meta device, where a tensor has a shape and no storage. Everything that depends on the inputs'
integers (token ids, masks, positions, image grids) is real and small, so that data-dependent code runs; whatever touches
a weight is a shape. A `Ledger` intercepts every operator: it adds up FLOPs (those of torch's `flop_counter`: 2 m k n per
product) and the bytes of all tensors that are alive at a time, by their storages, as an allocator would.

Parts that cannot run like that, or that a CPU runs as one kernel, are replaced (`stubs.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from sparsight.estimation.stubs import META, FactorShapes, FusedAttention, adapt, to_meta

aten = torch.ops.aten
MAPPED = 32 << 20  # bytes from which glibc maps an allocation by itself and gives it back when it is freed
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Stop:
    """One batch in one module: bytes `held` while it waits in front of it, `extra` at most while the module runs, bytes of
    its `output`, its `flops` and those `before` it; `rows` of inputs (padding among them), and as `feed` the name of the
    first stop with the very same input tensor."""

    name: str
    held: int
    extra: int
    output: int
    flops: int
    before: int
    rows: int
    feed: str


@dataclass(frozen=True)
class Pass:
    """One batch through a whole model: `flops`, the `peak` of bytes alive, and what is `left` of them at the end."""

    flops: int
    peak: int
    left: int = 0


@dataclass(frozen=True)
class Step:
    """One batch of training: FLOPs, the peak of bytes alive in the student's `forward` with its loss and in its `backward`,
    and what is `saved` for backward in between, `small` of it in tensors of less than `MAPPED`. `trained` counts
    parameters."""

    flops: int
    forward: int
    saved: int
    small: int
    backward: int
    trained: int


class Ledger(TorchDispatchMode):
    """Counts `flops`, `live` bytes and their `peak` while it is entered. Tensors made before are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = self.most = 0  # `most` is the peak since it was last reset
        self.small = 0  # what of `live` is in tensors of less than `MAPPED`
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _placed(func, args, dict(kwargs or {}))
        if func is aten.masked_select.default and args[0].is_meta:
            made = args[0].new_empty(int(args[1].sum()))
        else:
            inputs = list(_tensors((*args, *kwargs.values())))
            shapes = any(x.is_meta for x in inputs)
            mixed = shapes and not all(x.is_meta for x in inputs)
            made = func(*(tree_map(to_meta, args) if mixed else args), **(tree_map(to_meta, kwargs) if mixed else kwargs))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        for tensor in _tensors((made,)):
            self._enter(tensor)
        return made

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._counted and not isinstance(tensor, nn.Parameter):
            self._counted.add(key)
            self.live += storage.nbytes()
            self.small += storage.nbytes() if storage.nbytes() < MAPPED else 0
            self.peak, self.most = max(self.peak, self.live), max(self.most, self.live)
            weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.live -= size
        self.small -= size if size < MAPPED else 0

    def hold(self, *tensors: torch.Tensor) -> None:
        """Leave existing tensors out of the count: operators in place return them."""
        self._counted |= {t.untyped_storage()._cdata for t in tensors}


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for x in values:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _placed(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep integers real and weights as shapes; turn real boolean indices of a shape into places, whose number is real."""
    if func is aten._to_copy.default and args[0].is_meta:
        kwargs["device"] = META
        return args, kwargs
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        sources = list(_tensors(args))
        dtype = kwargs.get("dtype") or (sources[0].dtype if sources else None)
        counting = func._overloadpacket is aten.arange and all(type(x) is int for x in args)
        whole = counting if dtype is None else dtype in INTEGERS
        if whole and not any(x.is_meta for x in sources):
            kwargs["device"] = torch.device("cpu")
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and args[0].is_meta:
        places: list[Any] = []
        for index in args[1]:
            real = index is not None and index.dtype is torch.bool and not index.is_meta
            places += index.nonzero(as_tuple=True) if real else [index]
        args = (args[0], places, *args[2:])
    return args, kwargs


@contextmanager
def tracing(model: nn.Module, stops: Sequence[tuple[str, nn.Module]] = ()) -> Iterator[tuple[Ledger, list[Stop]]]:
    """Count what runs inside the block; each module in `stops` adds a `Stop` when it ends."""
    ledger, ended = Ledger(), []
    entered: dict[str, tuple[int, int, int, torch.Tensor | None]] = {}
    fed: list[tuple[torch.Tensor, str]] = []
    ledger.hold(*model.parameters(), *model.buffers())

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            X = args[0] if args else next(x for x in kwargs.values() if isinstance(x, torch.Tensor))
            alone = isinstance(module, nn.Linear) or hasattr(module, "_apply_gate")
            entered[name] = ledger.live, ledger.flops, X.shape[:-1].numel(), X.detach() if alone else None
            ledger.most = ledger.live

        return hook

    def leave(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            live, flops, rows, X = entered.pop(name)
            if X is None:
                fed.clear()
            elif not fed or not _same(X, fed[0][0]):
                fed[:] = [(X, name)]
            first = output[0] if isinstance(output, tuple) else output
            size, extra = first.numel() * first.element_size(), ledger.most - live
            ended.append(Stop(name, live, extra, size, ledger.flops - flops, flops, rows, fed[0][1] if fed else name))

        return hook

    hooks = [module.register_forward_pre_hook(enter(name), with_kwargs=True) for name, module in stops]
    hooks += [module.register_forward_hook(leave(name)) for name, module in stops]
    try:
        with FusedAttention(ledger), ledger:
            yield ledger, ended
    finally:
        for hook in hooks:
            hook.remove()


def _same(X: torch.Tensor, Y: torch.Tensor) -> bool:
    return X.shape == Y.shape and X.untyped_storage()._cdata == Y.untyped_storage()._cdata


@torch.no_grad()
def walk(
    model: Any, stops: Sequence[tuple[str, nn.Module]], inputs: Mapping[str, Any], **options: Any
) -> tuple[Pass, list[Stop]]:
    """One forward; `left` is the cache of keys and values, if `options` turn it on."""
    with tracing(model, stops) as (ledger, ended):
        output = model(**inputs, **options)
        cache = getattr(output, "past_key_values", None)
        if cache is None and (inner := getattr(output, "language_model_outputs", None)) is not None:
            cache = getattr(inner, "past_key_values", None)
            del inner
        del output
        left = ledger.live
    del cache
    return Pass(ledger.flops, ledger.peak, left), ended


def step(
    model: Any,
    loss: Callable[[], torch.Tensor],
    targets: Sequence[tuple[nn.Module, int, bool]],
    shapes: FactorShapes,
    *,
    checkpointed: bool = False,
) -> Step:
    """One batch of training: adapters on the modules `targets` (module, rank, masked), in place, then `loss()` and its
    gradient. `shapes` is as in `adapt`; `checkpointed`: gradient checkpointing is enabled on the model."""
    with tracing(model) as (ledger, _):
        if checkpointed:  # fused attention must be in place in backward, too
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), FusedAttention(ledger))})
        trained = sum(adapt(module, rank, ledger, shapes, masked=masked) for module, rank, masked in targets)
        start, ledger.peak = ledger.live, 0
        value = loss()
        forward, saved, small, ledger.most = ledger.peak, ledger.live, ledger.small, ledger.live
        value.backward()
    return Step(ledger.flops, forward - start, saved - start, min(small, saved - start), ledger.most - start, trained)
