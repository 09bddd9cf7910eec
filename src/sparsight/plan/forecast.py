"""From a folder with a configuration and a processor to the costs of its stages: encode a few samples, trace, add up.

No weight is read and none is allocated: a model of any size takes the memory of its configuration and of a few batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from sparsight.data import Encoder, Sample, Turn
from sparsight.data.encoding import Batch, answers_of
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy
from sparsight.model.load import check_folder, parse_dtype, quiet
from sparsight.plan import trace
from sparsight.plan.cost import LayerShape, Shapes, Stage, Work, stages
from sparsight.plan.plan import Plan
from sparsight.plan.stand_in import hollow
from sparsight.prune.moments import MASKS

METHODS = ("wanda", "sparsegpt", "magnitude", "random", "ria")  # the others solve or look at gradients in ways of their own
REFINES, UPDATES = ("dsnot", "swaps"), ("pcg",)
SOLVERS = {"sparsegpt", "swaps", "pcg"}
POLICIES = ("uniform", "language-only", "vision-only")  # the others look at weights
ADAPTERS = ("sparselora", "sparselora-fast", "hira", "masked-full")
PICTURE = (640, 480)
WORDS = 16  # of a question that nobody has asked yet; its answer has a quarter of them


@dataclass(frozen=True)
class Forecast:
    """The costs of the stages, and what they were reckoned for: tokens per sample, whether they are a guess for want of
    data, the FLOPs per second of this CPU (0 where nobody measured); for a recipe, how often a stage runs, the FLOPs of
    all its runs, and settings that are not counted in."""

    stages: tuple[Stage, ...]
    tokens: Mapping[str, float]
    assumed: bool
    rate: float = 0.0
    times: Mapping[str, int] = field(default_factory=dict)
    total: Mapping[str, int] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def facts(self) -> dict[str, Any]:
        """The same as plain values; `seconds` is FLOPs by rate, a rough lower bound."""
        listed = [
            {**asdict(stage), "peak": stage.peak, "seconds": stage.seconds(self.rate) if self.rate else None}
            for stage in self.stages
        ]
        told = {"stages": listed, "tokens_per_sample": dict(self.tokens), "assumed": self.assumed, "rate": self.rate}
        more = {"times": dict(self.times), "total": dict(self.total), "without": list(self.without)}
        return told | (more if self.times else {})


@dataclass(frozen=True)
class Training:
    """What of a restoration decides its memory, beside `Work`."""

    adapter: str = "sparselora"
    ranks: Mapping[str, int] = field(default_factory=dict)
    checkpointing: bool = False


def forecast(
    model: Any,
    processor: Any,
    made: tuple[Anatomy, Plan],
    samples: Sequence[Sample],
    work: Work,
    training: Training,
    base: Mapping[str, int],
) -> tuple[tuple[Stage, ...], dict[str, float]]:
    """Foretell what the stages take on `samples`, of which as many as a batch needs are encoded; tokens per sample, too.

    `model` is hollow, and ends with adapters that only a trace can run. `base` is what `measured_base` gives.
    """
    body, plan = made
    encoder = Encoder(processor, model)
    calibration = encoder.encode(_some(samples, work.batch_size))
    learned, asked = encoder.encode(_some(samples, work.restore_batch)), encoder.encode(_some(samples, work.eval_batch))
    layers, stops, walked = _layers(model, body, plan, calibration, encoder)
    if work.propagate != "stage":
        blocks = [(block.name, block.module) for block in body.blocks_with(set(plan))]
        _, stops = trace.walk(model, blocks, _fed(calibration, encoder), use_cache=False)
    right, _ = trace.walk(model, [], _fed(asked, encoder))
    prompt, token = _generation(model, body, encoder, _some(samples, work.eval_batch))
    teacher, step = _training(model, body, plan, learned, encoder, work, training)
    head = model.get_output_embeddings().weight
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    shapes = Shapes(
        weights=sum(tensors.values()), size=head.element_size(), layers=layers, base=base, walk=walked, stops=tuple(stops),
        calibration=_bytes(calibration.inputs), step=step, teacher=teacher, step_inputs=_bytes(learned.inputs),
        answers=_answers(learned, encoder), width=head.shape[1], vocabulary=head.shape[0], prompt=prompt, token=token,
        right=right, right_answers=_answers(asked, encoder), asked_inputs=_bytes(asked.inputs),
    )  # fmt: skip
    return stages(shapes, work), _tokens(calibration, layers, encoder)


def check(method: Any, refine: Any, update: Any, policy: Any, adapter: Any) -> None:
    """Refuse by name what is no name, or whose cost is not known."""
    for option, given, known in (
        ("--method", method, METHODS),
        ("--refine", refine, (None, *REFINES)),
        ("--update", update, (None, *UPDATES)),
        ("--policy", policy, POLICIES),
        ("--adapter", adapter, ADAPTERS),
    ):
        if given not in known:
            said = given if isinstance(given, str) else "a function"
            names = ", ".join(name for name in known if name)
            raise SparsightError(f"{option}: what {said} costs is not known before it runs; --cost knows {names}")


def open_hollow(where: str, dtype: str) -> Any:
    """The model of a folder's or hub name's configuration, in the dtype it would be loaded in; weights need not be there.

    **Raises** `SparsightError` if there is no configuration that can be read.
    """
    wanted = parse_dtype(dtype)
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise SparsightError(f"{where}: no config.json in this folder; give a folder that save_pretrained wrote")
    if not Path(where).is_dir():
        check_folder(where)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
            stored = getattr(config, "dtype", None) or torch.float32
            return hollow(config, stored if wanted == "auto" else wanted)
    except Exception as error:  # what stands in the file can be wrong in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SparsightError(f"{where}: no model could be made of its configuration: {reason}") from error


def invented() -> list[Sample]:
    """One sample where there is no data: a picture of 640 × 480, a question of 16 words and an answer of 4."""
    turn = Turn(" ".join(["what"] * WORDS) + "?", (" ".join(["red"] * (WORDS // 4)),))
    return [Sample("invented", (Image.new("RGB", PICTURE),), (turn,))]


def _some(samples: Sequence[Sample], count: int) -> list[Sample]:
    """As many samples, again from the first where there are fewer."""
    return [samples[i % len(samples)] for i in range(count)]


def _fed(batch: Batch, encoder: Encoder) -> dict[str, torch.Tensor]:
    """What a forward takes without computing a loss; an encoder-decoder is fed with its labels."""
    return {key: t for key, t in batch.inputs.items() if key != "labels" or not encoder.shifted}


def _bytes(inputs: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in inputs.values())


def _answers(batch: Batch, encoder: Encoder) -> int:
    labels = batch.inputs["labels"]
    return len(answers_of(labels, labels, encoder.shifted)[0])


def _layers(
    model: Any, body: Anatomy, plan: Plan, batch: Batch, encoder: Encoder
) -> tuple[tuple[LayerShape, ...], list[trace.Stop], trace.Pass]:
    """The planned layers that a batch reaches, with what it brings to each."""
    planned = [layer for layer in body.layers if layer.name in plan]
    modules = {(layer.name.rsplit(".", 2)[0] if layer.expert else layer.name): layer.module for layer in planned}
    walked, stops = trace.walk(model, list(modules.items()), _fed(batch, encoder), use_cache=False)
    at = {stop.name: stop for stop in stops}
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", 1) or 1
    found = []
    for layer in planned:
        stop = at.get(layer.name.rsplit(".", 2)[0] if layer.expert else layer.name)
        if stop is None:
            continue
        tokens, kinds, feed = stop.rows, 1, stop.feed
        for name in MASKS[layer.component]:
            mask = batch.padding.get(name)
            if mask is not None and mask.numel() == stop.rows:
                tokens, kinds = int(mask.sum()), 2 if name == "text" and "image" in batch.padding else 1
                break
        if layer.expert:
            tokens, feed = tokens * chosen // len(layer.parameter), layer.name
        zeros = plan[layer.name].zeros(layer.shape)
        found.append(LayerShape(layer.name, layer.component, layer.block, *layer.shape, zeros, tokens, kinds, feed))
    return tuple(found), stops, walked


def _generation(model: Any, body: Anatomy, encoder: Encoder, samples: Sequence[Sample]) -> tuple[trace.Pass, trace.Pass]:
    """The prompts of a batch; and one more token of each row: FLOPs, the bytes it leaves in the cache, and as `peak` the
    FLOPs that every token in the cache costs each later one."""
    inputs: dict[str, Any] = encoder.prompts(samples)
    text, rows, options = model.config.get_text_config(), len(samples), {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # type: ignore[assignment]
    if not encoder.shifted:
        one, two = (
            trace.walk(model, [], inputs | {"decoder_input_ids": torch.zeros(rows, n, dtype=torch.long)}, **options)[0]
            for n in (1, 2)
        )
        return one, trace.Pass(two.flops - one.flops, 0, two.left - one.left)
    prompt, _ = trace.walk(model, [], inputs, **options)
    length = inputs["input_ids"].shape[1]
    head = model.get_output_embeddings().weight
    share = (getattr(text, "num_experts_per_tok", 1) or 1) / max(getattr(text, "num_experts", 1) or 1, 1)
    active = sum((share if x.expert else 1) * x.weight.numel() for x in body.component("language"))
    groups = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    added = prompt.left // length
    attention = 2 * groups * added // head.element_size()  # every kept number is multiplied once per head that reads it
    return prompt, trace.Pass(round(2 * rows * (active + head.numel())) + attention * length, attention, added)


def _training(
    model: Any, body: Anatomy, plan: Plan, batch: Batch, encoder: Encoder, work: Work, training: Training
) -> tuple[trace.Pass, trace.Step]:
    """A teacher's forward, and a step of the student on the same batch."""
    from sparsight.restore.head import Head
    from sparsight.restore.losses import distillation
    from sparsight.restore.student import DEFAULT_RANKS
    from sparsight.restore.trainer import checkpoint_blocks

    head, ranks = Head(model), {**DEFAULT_RANKS, **training.ranks}
    inputs, labels = batch.inputs, batch.inputs["labels"]
    with torch.no_grad(), trace.tracing(model) as (ledger, _):
        taught, _ = answers_of(head.hidden(model, inputs), labels, encoder.shifted)
    teacher = trace.Pass(ledger.flops, ledger.peak)
    chosen: dict[int, tuple[Any, int, bool]] = {}
    for layer in body.layers:
        if ranks[layer.component] and (layer.name in plan or layer.component == "connector"):
            chosen[id(layer.module)] = (layer.module, ranks[layer.component], layer.name in plan)
    if training.checkpointing:
        checkpoint_blocks(SimpleNamespace(get_base_model=lambda: model, modules=model.modules))

    def loss() -> torch.Tensor:
        hidden, right = answers_of(head.hidden(model, inputs), labels, encoder.shifted)
        said = None if work.teacher == "none" else taught
        return distillation(hidden, said, right, head, kl=0.1).total

    kept = sum(1 - plan[n].zeros(body[n].shape) / body[n].weight.numel() for n in plan) / len(plan)
    full = kept if training.adapter == "masked-full" else 0.0
    return teacher, trace.step(model, loss, list(chosen.values()), full=full, checkpointed=training.checkpointing)


def _tokens(batch: Batch, layers: Sequence[LayerShape], encoder: Encoder) -> dict[str, float]:
    """Tokens per sample, padding left out."""
    rows, patches = len(batch.samples), [x.tokens for x in layers if x.component == "vision"]
    image = int(batch.padding["image"].sum()) if "image" in batch.padding else 0
    counts = {
        "vision": max(patches, default=0),
        "image": image,
        "text": int(batch.padding["text"].sum()) - image,
        "answer": _answers(batch, encoder),
    }
    return {name: round(count / rows, 1) for name, count in counts.items() if count}
