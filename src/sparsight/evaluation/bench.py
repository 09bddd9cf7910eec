"""How fast a sparse model is on this machine, dense and packed: its layers, its first token, its next ones, its load."""

from __future__ import annotations

import datetime
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from sparsight.checkpoint.folder import identity
from sparsight.data.encoding import Encoder
from sparsight.data.sample import Sample, Turn
from sparsight.errors import Notice, SparsightError
from sparsight.evaluation.record import check_recordable
from sparsight.files import read_json, write_json
from sparsight.masks.matrix import count_zeros
from sparsight.model.anatomy import anatomy
from sparsight.model.load import load, load_model
from sparsight.packing.linear import SMALL, DenseLinear, SparseLinear
from sparsight.packing.shards import Shards
from sparsight.packing.timing import read_speed, seconds_of, time_layer
from sparsight.packing.two_of_four import time_two_of_four
from sparsight.progress import Progress
from sparsight.specs import BenchSpec

BATCHES = (1, 2, 4, 8, 16)
TOKENS = (1, 2, 4, 8, 16)
SIDE = 336  # pixels of the picture that is asked about
ROUNDS = 3
FORMAT, RECORD = 1, "bench.json"


def bench_folder(
    folder: str | Path, spec: BenchSpec, *, record: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Time a sparse model, in an ordinary or a packed folder, on the CPU. **Raises** `SparsightError` without zeros."""
    target = check_recordable(folder, instead="`json`") if record else None
    facts = _bench(folder, spec, progress)
    if target is not None:
        write_json(target / RECORD, facts)
    return facts


def read_bench(folder: str | Path) -> dict[str, Any] | None:
    """The figures that `bench` recorded in a folder, of the weights that are there; None if there are none.

    **Raises** `SparsightError` for a damaged file and for figures of other weights.
    """
    path, again = Path(folder) / RECORD, "run sparsight bench with `record` again, or delete it"
    if not path.is_file():
        return None
    facts = read_json(path, again)
    if facts.get("format") != FORMAT:
        raise SparsightError(f"{path}: format {facts.get('format')} is not {FORMAT}; {again}")
    if not _is_whole(facts):
        raise SparsightError(f"{path}: is damaged; {again}")
    if facts["weights"] != identity(folder):
        raise SparsightError(f"{path}: is of other weights than are there now; {again}")
    return facts


def _is_whole(facts: dict[str, Any]) -> bool:
    """Whether a record has what `report` shows of it."""
    with suppress(KeyError, TypeError, AttributeError):
        times = [ms for each in facts["layers"] if each["rows"] and each["columns"] for ms in each["ms"]["1"].values()]
        rates = [rate for each in facts["generate"] if each["batch"] for rate in each["tokens_per_second"].values()]
        named = {"machine", "threads", "date", "large", "weights"} <= set(facts)
        return named and bool(times) and bool(rates) and all(isinstance(value, float) for value in times + rates)
    return False


@torch.no_grad()
def _bench(folder: str | Path, spec: BenchSpec, progress: Progress | None) -> dict[str, Any]:
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
        zeros = sum(count_zeros(linear.weight) for linear in same)
        if (on_gpu := time_two_of_four(same[0].weight, spec.repeats)) is not None:
            facts["cuda"] = on_gpu
        facts["ms"] = {str(tokens): times for tokens, times in facts["ms"].items()}  # as in JSON
        layers.append(facts | {"count": len(same), "sparsity": zeros / (len(same) * shape[0] * shape[1])})
    _tell(progress, "memory", len(shapes), steps)
    speed = read_speed(ROUNDS)
    whole = TwoForms(model, linears)
    generated = []
    for i, batch in enumerate(BATCHES):
        _tell(progress, f"generate, batch {batch}", len(shapes) + 1 + i, steps)
        many = encoder.prompts([_sample()] * batch)
        generated.append({"batch": batch, **_generate(whole, many, spec.new_tokens)})
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "weights": identity(folder),
        "folder": str(folder),
        "machine": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "read_bytes_per_second": speed,
        "prompt_tokens": length,
        "layers": layers,
        "packed_layers": len(whole.pairs),
        "large": whole.large,
        "generate": generated,
        "memory": whole.sizes(),
        "load": _load_times(folder),
    }


class TwoForms:
    """A model whose large layers can be dense or packed, in turn; where no layer is `large`, all of them."""

    def __init__(self, model: Any, linears: dict[str, nn.Linear]) -> None:
        self.model = model
        self.large = any(linear.weight.numel() >= SMALL for linear in linears.values())
        least = SMALL if self.large else 0
        self.pairs = {
            name: (linear, SparseLinear.of(linear)) for name, linear in linears.items() if linear.weight.numel() >= least
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
    first: dict[str, list[float]] = {"dense": [], "packed": []}
    rest: dict[str, list[float]] = {"dense": [], "packed": []}
    for _ in range(ROUNDS):
        for name in first:
            whole.use(name == "packed")
            clock = _Clock()
            start = time.perf_counter()
            many = {"max_new_tokens": 1 + new_tokens, "min_new_tokens": 1 + new_tokens, "do_sample": False}
            whole.model.generate(**inputs, **many, stopping_criteria=[clock])
            first[name].append(clock.times[0] - start)
            rest[name].append(clock.times[-1] - clock.times[0])
    batch = len(inputs["input_ids"])
    return {
        "first_token_seconds": {name: min(values) for name, values in first.items()},
        "tokens_per_second": {name: batch * new_tokens / min(values) for name, values in rest.items()},
    }


class _Clock:
    """A stopping criterion that stops nothing and notes when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _load_times(folder: str | Path) -> dict[str, Any]:
    """Seconds to load the folder, and packed in memory where it is packed; the files are in the page cache."""
    ways: dict[str, Callable[[], Any]] = {"load": lambda: load_model(folder)}
    shards = Shards(folder)
    if shards.layout is not None:
        ways["load, packed in memory"] = lambda: _load_packed(folder)
    seconds = {name: min(seconds_of(way) for _ in range(ROUNDS)) for name, way in ways.items()}
    sizes = [(Path(folder) / file).stat().st_size for file in shards.files]
    return {"packed_folder": shards.layout is not None, "bytes": sum(sizes), "seconds": seconds}


def _load_packed(folder: str | Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # of small layers, whose rows say it
        return load_model(folder, packed=True)


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
