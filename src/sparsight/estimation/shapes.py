"""From a folder with a configuration and a processor to the shapes that its stages work on: encode a few samples, trace.

No weight is read and none is allocated: a model of any size takes the memory of its configuration and of a few batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from sparsight.allocation.plan import Plan
from sparsight.calibration.moments import MASKS
from sparsight.data import Encoder, Sample, Turn
from sparsight.data.encoding import Batch, select_answers
from sparsight.errors import SparsightError
from sparsight.estimation import trace
from sparsight.estimation.stages import LayerShape, Shapes, Work
from sparsight.estimation.stubs import hollow
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import Anatomy
from sparsight.model.files import check_config, check_files
from sparsight.model.load import parse_dtype, quiet
from sparsight.restoring.adapters import ADAPTERS
from sparsight.specs import RestoreSpec

PICTURE = (640, 480)
WORDS = 16  # of a question where there is no data; its answer has a quarter of them


def gather_shapes(
    model: Any,
    processor: Any,
    body: Anatomy,
    plan: Plan,
    samples: Sequence[Sample],
    work: Work,
    restore: RestoreSpec,
    base: Mapping[str, int],
) -> tuple[Shapes, dict[str, float]]:
    """The shapes of one batch of every stage, and the tokens per sample; of `samples` one batch is encoded.

    `model` is hollow; its layers get, in place, adapters that only a trace can run. `base` comes from `measured_base`.
    """
    encoder = Encoder(processor, model)
    calibration = encoder.encode(_some(samples, work.batch_size))
    learned = encoder.encode(_some(samples, work.restore_batch))
    questions = encoder.encode(_some(samples, work.eval_batch))
    layers, stops, walked = _layers(model, body, plan, calibration, encoder)
    if work.propagate != "layer":
        blocks = [(block.name, block.module) for block in body.blocks_with(set(plan))]
        _, stops = trace.walk(model, blocks, _fed(calibration, encoder), use_cache=False)
    right, _ = trace.walk(model, [], _fed(questions, encoder))
    prompt, token = _generation(model, body, encoder, _some(samples, work.eval_batch))
    teacher, step = _training(model, body, plan, learned, encoder, work, restore)
    head = model.get_output_embeddings().weight
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    sizes = {block.name: sum(p.nbytes for p in block.module.parameters()) for block in body.blocks}
    table = model.get_input_embeddings().weight
    untouched = 0 if table is head else table.nbytes
    shapes = Shapes(
        weights=sum(tensors.values()), size=head.element_size(), layers=layers, base=base, walk=walked, stops=tuple(stops),
        calibration=_bytes(calibration.inputs), step=step, teacher=teacher, step_inputs=_bytes(learned.inputs),
        answers=_answers(learned, encoder), width=head.shape[1], vocabulary=head.shape[0], prompt=prompt, token=token,
        right=right, right_answers=_answers(questions, encoder), asked_inputs=_bytes(questions.inputs),
        blocks=sizes, outside=sum(tensors.values()) - sum(sizes.values()) - untouched,
    )  # fmt: skip
    return shapes, _tokens(calibration, layers, encoder)


def restore_shapes(
    model: Any,
    processor: Any,
    body: Anatomy,
    plan: Mapping[str, Pattern],
    samples: Sequence[Sample],
    work: Work,
    restore: RestoreSpec,
    base: Mapping[str, int],
) -> Shapes:
    """The shapes of one batch of a restoration alone; those of the other stages are empty. See `gather_shapes`."""
    encoder = Encoder(processor, model)
    learned = encoder.encode(_some(samples, work.restore_batch))
    head = model.get_output_embeddings().weight
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    layers = tuple(
        LayerShape(x.name, x.component, x.block, *x.shape, plan[x.name].zeros(x.shape), 0, 1, x.name)
        for x in body.layers
        if x.name in plan
    )
    teacher, step = _training(model, body, plan, learned, encoder, work, restore)
    nothing = trace.Pass(0, 0)
    return Shapes(
        weights=sum(tensors.values()), size=head.element_size(), layers=layers, base=base, walk=nothing, stops=(),
        calibration=0, step=step, teacher=teacher, step_inputs=_bytes(learned.inputs), answers=_answers(learned, encoder),
        width=head.shape[1], vocabulary=head.shape[0], prompt=nothing, token=nothing, right=nothing, right_answers=0,
        asked_inputs=0,
    )  # fmt: skip


def open_hollow(where: str, dtype: str) -> Any:
    """The model of a folder's or hub name's configuration, in the dtype it would be loaded in; weights need not be there.

    **Raises** `SparsightError` if there is no configuration that can be read, or that of a quantized model.
    """
    target = parse_dtype(dtype)
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise SparsightError(f"{where}: no config.json in this folder; give a folder that save_pretrained wrote")
    if not Path(where).is_dir():
        check_files(where)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(where, trust_remote_code=False)
            check_config(where, config.to_dict())
            stored = getattr(config, "dtype", None) or torch.float32
            return hollow(config, stored if target == "auto" else target)
    except SparsightError:
        raise
    except Exception as error:  # the file can be wrong in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SparsightError(f"{where}: no model could be made of its configuration: {reason}") from error


def example_samples() -> list[Sample]:
    """One sample where there is no data: a picture of 640 × 480, a question of 16 words and an answer of 4."""
    turn = Turn(" ".join(["what"] * WORDS) + "?", (" ".join(["red"] * (WORDS // 4)),))
    return [Sample("example", (Image.new("RGB", PICTURE),), (turn,))]


def _some(samples: Sequence[Sample], count: int) -> list[Sample]:
    """As many samples, again from the first where there are fewer."""
    return [samples[i % len(samples)] for i in range(count)]


def _fed(batch: Batch, encoder: Encoder) -> dict[str, torch.Tensor]:
    """The inputs of a forward without a loss; an encoder-decoder needs its labels."""
    return {key: t for key, t in batch.inputs.items() if key != "labels" or not encoder.shifted}


def _bytes(inputs: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in inputs.values())


def _answers(batch: Batch, encoder: Encoder) -> int:
    labels = batch.inputs["labels"]
    return len(select_answers(labels, labels, encoder.shifted)[0])


def _layers(
    model: Any, body: Anatomy, plan: Plan, batch: Batch, encoder: Encoder
) -> tuple[tuple[LayerShape, ...], list[trace.Stop], trace.Pass]:
    """The planned layers that a batch reaches, with its tokens in each."""
    planned = [layer for layer in body.layers if layer.name in plan]
    modules = {(layer.name.rsplit(".", 2)[0] if layer.expert else layer.name): layer.module for layer in planned}
    walked, stops = trace.walk(model, list(modules.items()), _fed(batch, encoder), use_cache=False)
    at = {stop.name: stop for stop in stops}
    routes = getattr(model.config.get_text_config(), "num_experts_per_tok", 1) or 1
    shapes = []
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
            tokens, feed = tokens * routes // len(layer.parameter), layer.name
        zeros = plan[layer.name].zeros(layer.shape)
        shapes.append(LayerShape(layer.name, layer.component, layer.block, *layer.shape, zeros, tokens, kinds, feed))
    return tuple(shapes), stops, walked


def _generation(model: Any, body: Anatomy, encoder: Encoder, samples: Sequence[Sample]) -> tuple[trace.Pass, trace.Pass]:
    """The prompts of a batch, and one more token of each row; of the latter `peak` holds the FLOPs that every token in the
    cache adds to each later token."""
    inputs: dict[str, Any] = {key: tensor for key, tensor in encoder.prompts(samples).items() if key != "labels"}
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
    model: Any, body: Anatomy, plan: Mapping[str, Pattern], batch: Batch, encoder: Encoder, work: Work, restore: RestoreSpec
) -> tuple[trace.Pass, trace.Step]:
    """A teacher's forward, and a step of the student on the same batch."""
    from sparsight.restoring.head import Head
    from sparsight.restoring.losses import distillation
    from sparsight.restoring.side_effects import checkpointed_blocks
    from sparsight.restoring.student import parse_ranks

    head, ranks, adapter = Head(model), parse_ranks(restore.rank), ADAPTERS[restore.adapter]
    inputs, labels = batch.inputs, batch.inputs["labels"]
    with torch.no_grad(), trace.tracing(model) as (ledger, _):
        taught, _ = select_answers(head.hidden(model, inputs), labels, encoder.shifted)
    teacher = trace.Pass(ledger.flops, ledger.peak)
    density = sum(1 - plan[n].zeros(body[n].shape) / body[n].weight.numel() for n in plan) / len(plan)
    targets: dict[int, tuple[Any, int, bool]] = {}
    for layer in body.layers:
        if ranks[layer.component] and (layer.name in plan or layer.component == "connector"):
            targets[id(layer.module)] = (layer.module, ranks[layer.component], layer.name in plan)

    def loss() -> torch.Tensor:
        hidden, right = select_answers(head.hidden(model, inputs), labels, encoder.shifted)
        return distillation(hidden, None if work.teacher == "none" else taught, right, head, kl=0.1).total

    of_layer = adapter.shapes
    assert of_layer is not None
    whole = SimpleNamespace(get_base_model=lambda: model, modules=model.modules)
    with checkpointed_blocks(whole) if restore.gradient_checkpointing else nullcontext():
        return teacher, trace.step(
            model, loss, list(targets.values()), lambda out, columns, rank: of_layer(out, columns, rank, density),
            checkpointed=restore.gradient_checkpointing,
        )  # fmt: skip


def _tokens(batch: Batch, layers: Sequence[LayerShape], encoder: Encoder) -> dict[str, float]:
    """Tokens per sample, padding left out."""
    rows, patches = batch.rows, [x.tokens for x in layers if x.component == "vision"]
    image = int(batch.padding["image"].sum()) if "image" in batch.padding else 0
    counts = {
        "vision": max(patches, default=0),
        "image": image,
        "text": int(batch.padding["text"].sum()) - image,
        "answer": _answers(batch, encoder),
    }
    return {name: round(count / rows, 1) for name, count in counts.items() if count}
