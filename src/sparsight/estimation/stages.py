"""The cost of the stages: FLOPs, bytes on disk, and peak memory of a process. A pure function of shapes.

The cost of one batch comes from a trace (`trace.py`), a forward and backward of the model's own code without weights.
The rest are the formulas below. A stage's memory is a list of terms that exist at the same time, and its peak is their
sum; of several moments the one with the largest sum is reported.

Letters: N batches of calibration, i a block, P pruned weights, b bytes of a weight, T tokens (padding left out) that one
batch brings to a layer of shape (out, in), k kinds of tokens summed apart (2 where text and image tokens meet), r rank.

* `base`: interpreter and libraries, measured and not computed; all terms are on top of it.
* `weights`: every parameter and buffer once. Files are mapped into memory, so they come in as they are touched.
* prune: of a folder one block is in memory beside what lies outside the blocks, of which an embedding's table is touched
  in a few rows only; of a model in memory, and where method or policy need it, the whole. Activations that would take more
  than a quarter of the free memory are parked: those of one batch then stay. The FLOPs of the walk are N (outside the
  blocks + 2 blocks) with `block` and `dense`, which run a block once to observe, once to walk on, N (outside + blocks)
  with `layer`; a Gram matrix takes T in (in + 256) per batch, being half of it, its factor in^3 (Cholesky 1/3, inverse by
  halves 2/3), SparseGPT's sweep out in^2, swaps 2 out in^2 to begin with (the exchanges are no products), PCG as much in
  each of the 64 iterations that the demo models' layers took on average (at most 100). Three forwards of one batch come
  first, which compare a walk with a plain forward. Paused are N max_i held_i bytes.
* restore: a step is `accumulate` batches, each one forward and backward of the student (traced; adapted layers make their
  effective weight twice and project its gradient once, 8 r out in beside the three products) and, where the teacher is
  not cached, one forward. Beside the weights: P/8 bytes of masks, 16 per trained number (itself, gradient, two moments).
  One factor is measured: tensors of less than 32 MiB come from glibc's heap, where an effective weight leaves a gap that
  the smaller tensors saved next break up. A step of training held 1.3 (300 million parameters, bfloat16) to 1.4
  (demo models, float32) times the bytes that it saves; with `MALLOC_MMAP_THRESHOLD_=65536` it held 0.95 to 1.01 times.
* evaluate: prompts and new tokens with a cache of keys and values; then the right answers' logits, T V at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparsight.calibration.moments import ERROR_ROWS
from sparsight.calibration.park import SHARE
from sparsight.calibration.sums import PANEL
from sparsight.cost import Cost
from sparsight.estimation.trace import Pass, Step, Stop
from sparsight.pruning.walks import ERROR_BATCHES

CHECK = 3  # forwards of one batch that compare a walk with a plain forward
HEAP = 0.3  # free pieces between saved tensors of less than 32 MiB, in parts of those (see above)


@dataclass(frozen=True)
class Work:
    """The settings of the stages; the defaults are those of the verbs."""

    steps: Mapping[str, Cost] = field(default_factory=dict)  # of pruning one layer, by name
    gram: bool = False  # whether they need X^T X
    propagate: str = "block"
    samples: int = 128
    batch_size: int = 8
    teacher: str = "shared"  # or cached, live, none
    train_steps: int = 100
    learned: int = 0  # samples in a teacher's cache
    restore_batch: int = 32
    accumulate: int = 1
    asked: int = 0  # samples of the evaluation
    eval_batch: int = 32
    max_new_tokens: int = 32
    beams: int = 1
    streamed: bool = False  # pruning holds one block at a time
    park: str = "auto"
    free: int = 2**63  # bytes of memory that are free


@dataclass(frozen=True)
class LayerShape:
    """A layer that will be pruned: (out, in), zeros to come, and of one batch's inputs the real tokens and their kinds;
    layers of one `feed` are fed the very same tensor."""

    name: str
    component: str
    block: str
    out: int
    columns: int
    zeros: int
    tokens: int
    kinds: int
    feed: str


@dataclass(frozen=True)
class Shapes:
    """The bytes of a model, and the cost of one batch of each stage."""

    weights: int  # bytes of all parameters and buffers
    size: int  # bytes of one weight
    layers: tuple[LayerShape, ...]
    base: Mapping[str, int]  # bytes of interpreter and libraries, by stage
    walk: Pass  # one calibration batch
    stops: tuple[Stop, ...]  # blocks, or layers with `layer`
    calibration: int  # bytes of an encoded calibration batch
    step: Step
    teacher: Pass
    step_inputs: int
    answers: int  # answer tokens of a batch of restoration
    width: int  # of the hidden states in front of the head
    vocabulary: int
    prompt: Pass  # `left` are keys and values
    token: Pass  # one more token of every row: FLOPs, and bytes `left`
    right: Pass  # the logits of right answers
    right_answers: int
    asked_inputs: int
    blocks: Mapping[str, int] = field(default_factory=dict)  # bytes by block
    outside: int = 0  # bytes outside the blocks that are touched


@dataclass(frozen=True)
class Stage:
    """One stage: FLOPs by what they are for, and at its worst `moment` the terms of `memory`; bytes on `disk`."""

    name: str
    moment: str
    memory: Mapping[str, int]
    flops: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes that the process holds at most."""
        return sum(self.memory.values())

    @property
    def work(self) -> int:
        """All FLOPs."""
        return sum(self.flops.values())

    def seconds(self, rate: float) -> float:
        """A rough time: FLOPs by a measured rate of products; all that is no product is left out."""
        return self.work / rate


def stages(model: Shapes, work: Work) -> tuple[Stage, ...]:
    """The cost of load, prune, restore and evaluate."""
    return load(model), prune(model, work), restore(model, work), evaluate(model, work)


def load(model: Shapes) -> Stage:
    """Reading all weights."""
    return Stage("load", "all weights touched", _held(model, "load"), disk={"weights": model.weights})


def _held(model: Shapes, stage: str) -> dict[str, int]:
    return {"base": model.base[stage], "weights": model.weights}


def packed_bytes(model: Shapes) -> int:
    """Bytes with the zeros left out: kept weights, and one bit per position of a pruned layer."""
    pruned = sum(layer.out * layer.columns for layer in model.layers)
    return model.weights - model.size * sum(layer.zeros for layer in model.layers) + -(-pruned // 8)


def _worst(name: str, moments: Mapping[str, Mapping[str, int]], flops: Mapping[str, int], disk: Mapping[str, int]) -> Stage:
    moment = max(moments, key=lambda key: sum(moments[key].values()))
    there = {term: size for term, size in moments[moment].items() if size}
    return Stage(name, moment, there, {what: n for what, n in flops.items() if n}, disk)


def prune(model: Shapes, work: Work) -> Stage:
    """The walk, stop by stop, and the writing after it."""
    batches = math.ceil(work.samples / work.batch_size)
    moments: dict[str, dict[str, int]] = {}
    parked = 0
    for i, stop in enumerate(model.stops):
        later = model.stops[i + 1].held if i + 1 < len(model.stops) else 0
        layers = [x for x in model.layers if stop.name in (x.block, x.name)]
        waiting = batches * max(stop.held, later)
        if work.streamed and _parks(waiting, work):
            parked = max(parked, waiting + batches * model.calibration)
        kept = 1 if parked else batches
        targets = 0 if work.propagate == "layer" else (min(ERROR_BATCHES, batches) + 1) * stop.output
        moments[stop.name] = {
            **_walked(model, layers[0].block if layers else stop.name, work),
            "batches": kept * model.calibration,
            "paused activations": kept * max(stop.held, later),
            "block outputs": targets,
            "moments": _moments(layers, work, model.size),
            "running": max(stop.extra, max((_pruning(x, work, model.size) for x in layers), default=0)),
        }
    largest = max(model.blocks, key=lambda name: model.blocks[name], default="")
    moments["writing"] = _walked(model, largest, work)
    written = {"model": model.weights, "packed": packed_bytes(model)} | ({"parked": parked} if parked else {})
    return _worst("prune", moments, prune_flops(model, work, batches), written)


def _walked(model: Shapes, block: str, work: Work) -> dict[str, int]:
    """What is there of the model at a stop in a block."""
    if not work.streamed:
        return _held(model, "prune")
    return {"base": model.base["prune"], "outside the blocks": model.outside, "the block": model.blocks.get(block, 0)}


def _parks(waiting: int, work: Work) -> bool:
    """Whether paused batches go into files."""
    return work.park == "always" or (work.park == "auto" and waiting > SHARE * work.free)


def _moments(layers: Sequence[LayerShape], work: Work, size: int) -> int:
    """Sums, rows kept to measure errors on, Gram matrices of each kind (and one of all), and their factor."""
    total = 0
    for layer in {x.feed: x for x in layers}.values():
        total += layer.columns * (8 * layer.kinds + ERROR_ROWS * size)
        if work.gram:
            kept = layer.kinds + (layer.kinds > 1) + any(cost.factor for cost in work.steps.values())
            total += 4 * layer.columns**2 * kept
    return total


def _pruning(layer: LayerShape, work: Work, size: int) -> int:
    """The largest scratch memory of pruning one layer: the new weight and the old in float32 and their difference, or a
    solver's own matrices."""
    there = layer.out * layer.columns
    wide = 8 if size < 4 else 0  # float32 copies of both
    own = (cost.scratch(layer.out, layer.columns) for cost in work.steps.values())
    return max(there * (size + wide + 4), *own, 0)


def prune_flops(model: Shapes, work: Work, batches: int) -> dict[str, int]:
    """FLOPs of pruning; the model after the last stop, the head for one, never runs."""
    last = model.stops[-1]
    inside = sum(stop.flops for stop in model.stops)
    counts = {"forwards": batches * last.before}
    if work.propagate != "layer":
        counts = {"forwards": batches * (last.before + inside), "errors": min(ERROR_BATCHES, batches) * inside}
    counts["check"] = CHECK * model.walk.flops
    feeds = {x.feed: x for x in model.layers}.values()
    if work.gram:
        counts["gram"] = batches * sum(x.tokens * x.columns * (x.columns + PANEL) for x in feeds)
    for name, cost in work.steps.items():
        factors = sum(x.columns**3 for x in feeds) if cost.factor else 0
        if flops := factors + sum(cost.flops(x.out, x.columns) for x in model.layers):
            counts[name] = flops
    return counts


def restore(model: Shapes, work: Work) -> Stage:
    """Loading and comparing the models, then the steps."""
    pruned = sum(x.out * x.columns for x in model.layers)
    step, live = model.step, work.teacher == "live"
    held = _held(model, "restore") | {"masks": pruned // 8}
    cache = work.learned * model.answers * model.width * model.size // max(work.restore_batch, 1)
    batches = work.train_steps * work.accumulate
    taught = work.teacher in ("shared", "live")
    training = {
        "teacher": model.weights if live else 0,
        "batches": 2 * work.accumulate * model.step_inputs,
        "factors, gradients, moments": 16 * step.trained,
        "saved for backward": step.saved,
        "gaps in the heap": int(HEAP * step.small),
        "running": max(step.forward, step.backward, model.teacher.peak if taught else 0) - step.saved,
    }
    moments = {"a step": held | training}
    if work.teacher == "cached":
        moments["asking the teacher"] = held | {"teacher's forward": model.teacher.peak}
    taught_batches = math.ceil(work.learned / work.restore_batch) if work.teacher == "cached" else batches if taught else 0
    flops = {"student": batches * step.flops, "teacher": taught_batches * model.teacher.flops}
    disk = {"model": model.weights} | ({"teacher": cache} if work.teacher == "cached" else {})
    return _worst("restore", moments, flops, disk)


def evaluate(model: Shapes, work: Work) -> Stage:
    """Writing answers, at most `max_new_tokens` each, then the logits of the right ones."""
    batches = math.ceil(work.asked / work.eval_batch)
    cache = work.beams * (model.prompt.left + work.max_new_tokens * model.token.left)
    held = _held(model, "evaluate") | {"batches": model.asked_inputs}
    prompt, running = model.prompt, work.beams * (model.prompt.peak - model.prompt.left)
    first = 4 * work.beams * work.eval_batch * model.vocabulary
    wide = 2 * 4 * model.right_answers * model.vocabulary
    moments = {
        "writing answers": held | {"keys and values": cache, "running": max(running, first)},
        "logits of the right answers": held | {"running": model.right.peak, "logits in float32": wide},
    }
    new = (work.max_new_tokens - 1) * (model.token.flops + work.max_new_tokens * model.token.peak // 2)
    flops = {"prompts": work.beams * prompt.flops, "new tokens": work.beams * new, "right answers": model.right.flops}
    return _worst("evaluate", moments, {what: batches * n for what, n in flops.items()}, {})
