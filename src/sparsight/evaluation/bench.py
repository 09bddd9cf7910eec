"""How fast a sparse model is on this machine, dense and packed: its layers, its first token, its next ones, its load."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from sparsight.data.encoding import Encoder
from sparsight.data.sample import Sample, Turn
from sparsight.errors import SparsightError
from sparsight.model.anatomy import anatomy
from sparsight.model.load import load, load_model
from sparsight.packing.linear import SMALL, DenseLinear, SparseLinear
from sparsight.packing.shards import Shards
from sparsight.packing.timing import read_speed, seconds_of, time_layer
from sparsight.progress import Progress
from sparsight.specs import BenchSpec

BATCHES = (1, 2, 4, 8, 16)
TOKENS = (1, 2, 4, 8, 16)
SIDE = 336  # pixels of the picture that is asked about
ROUNDS = 3


@torch.no_grad()
def bench_folder(folder: str | Path, spec: BenchSpec, progress: Progress | None = None) -> dict[str, Any]:
    """Time a sparse model, in an ordinary or a packed folder, on the CPU. **Raises** `SparsightError` without zeros."""
    model, processor = load(folder, dtype="bfloat16")
    body = anatomy(model)
    pruned = [layer.name for layer in body.layers if layer.sparse]
    linears = {name: model.get_submodule(name) for name in pruned if type(_module(model, name)) is nn.Linear}
    if not linears:
        raise SparsightError(f"{folder}: has no linear layer with zeros to time; prune it first")
    shapes: dict[tuple[int, int], list[nn.Linear]] = {}
    for linear in linears.values():
        shapes.setdefault((linear.out_features, linear.in_features), []).append(linear)
    encoder = Encoder(processor, model)
    length = int(encoder.prompts([_sample()])["input_ids"].shape[1])
    steps = len(shapes) + 1 + len(BATCHES)
    layers = []
    for i, (shape, same) in enumerate(sorted(shapes.items(), key=lambda item: item[0][0] * item[0][1])):
        _tell(progress, f"{shape[0]} x {shape[1]}", i, steps)
        facts = time_layer(same[0], (*TOKENS, length), spec.repeats)
        zeros = sum(int((linear.weight == 0).sum()) for linear in same)
        layers.append(facts | {"count": len(same), "sparsity": zeros / (len(same) * shape[0] * shape[1])})
    _tell(progress, "memory", len(shapes), steps)
    speed = read_speed(ROUNDS)
    whole = TwoForms(model, linears)
    generated = []
    for i, batch in enumerate(BATCHES if whole.pairs else ()):
        _tell(progress, f"generate, batch {batch}", len(shapes) + 1 + i, steps)
        many = encoder.prompts([_sample()] * batch)
        generated.append({"batch": batch, **_generate(whole, many, spec.new_tokens)})
    return {
        "folder": str(folder),
        "machine": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_bytes_per_second": speed,
        "prompt_tokens": length,
        "layers": layers,
        "packed_layers": len(whole.pairs),
        "generate": generated,
        "memory": whole.sizes(),
        "load": _load_times(folder),
    }


class TwoForms:
    """A model whose large layers can be dense or packed, in turn."""

    def __init__(self, model: Any, linears: dict[str, nn.Linear]) -> None:
        self.model = model
        self.pairs = {
            name: (linear, SparseLinear.of(linear)) for name, linear in linears.items() if linear.weight.numel() >= SMALL
        }
        pruned = {id(linear) for linear in linears.values()}
        modules = [m for m in model.modules() if type(m) is nn.Linear and m.weight.numel() >= SMALL]
        self.others = [module for module in modules if id(module) not in pruned]

    def use(self, packed: bool) -> None:
        """Make the model packed, or dense."""
        for name, pair in self.pairs.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, pair[packed])
        for module in self.others:
            module.__class__ = DenseLinear if packed else nn.Linear

    def sizes(self) -> dict[str, int]:
        """Bytes of all parameters, dense and packed."""
        facts = {}
        for name, packed in (("dense", False), ("packed", True)):
            self.use(packed)
            facts[name] = sum(parameter.nbytes for parameter in self.model.parameters())
        return facts


def _generate(whole: TwoForms, inputs: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Seconds to the first token, and tokens per second behind it, of all rounds the best."""
    best: dict[str, list[float]] = {"dense": [], "packed": []}
    first: dict[str, list[float]] = {"dense": [], "packed": []}
    for _ in range(ROUNDS):
        for name in best:
            whole.use(name == "packed")
            one = seconds_of(lambda: _answer(whole.model, inputs, 1))
            first[name].append(one)
            best[name].append(seconds_of(lambda: _answer(whole.model, inputs, 1 + new_tokens)) - one)
    batch = len(inputs["input_ids"])
    return {
        "first_token_seconds": {name: min(values) for name, values in first.items()},
        "tokens_per_second": {name: batch * new_tokens / max(min(values), 1e-9) for name, values in best.items()},
    }


def _answer(model: Any, inputs: dict[str, Any], tokens: int) -> None:
    model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def _load_times(folder: str | Path) -> dict[str, Any]:
    """Seconds to load the folder, and packed in memory where it is packed; the files are in the page cache."""
    ways: dict[str, Callable[[], Any]] = {"load": lambda: load_model(folder)}
    shards = Shards(folder)
    if shards.layout is not None:
        ways["load, packed in memory"] = lambda: load_model(folder, packed=True)
    seconds = {name: min(seconds_of(way) for _ in range(ROUNDS)) for name, way in ways.items()}
    sizes = [(Path(folder) / file).stat().st_size for file in shards.files]
    return {"packed_folder": shards.layout is not None, "bytes": sum(sizes), "seconds": seconds}


def _sample() -> Sample:
    picture = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
    return Sample("bench", (picture,), (Turn("What is in the picture?", ("a gradient",)),))


def _module(model: Any, name: str) -> Any:
    with suppress(AttributeError):
        return model.get_submodule(name)
    return None


def _tell(progress: Progress | None, note: str, done: int, total: int) -> None:
    if progress is not None:
        progress(note, done, total)


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
