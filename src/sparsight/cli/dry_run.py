"""`--dry-run N`: some samples as the model gets them, the sizes and steps of the work, its cost; then it stops.

No weight is read: the model is its configuration and its processor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsight.arguments import need, places
from sparsight.cli.tables import data_lines, skipped_line, table
from sparsight.data import Encoder, Sample, read_with
from sparsight.errors import SparsightError, quote
from sparsight.estimation.estimate import estimate
from sparsight.estimation.shapes import open_hollow
from sparsight.evaluation.lmms_task import check_export, check_samples
from sparsight.evaluation.verb import decoding_of, read_samples
from sparsight.model.load import load_processor
from sparsight.options import options
from sparsight.pruning.verb import check_prune
from sparsight.restoring.division import divide_samples, held_out_count
from sparsight.restoring.trainer import step_size, total_steps
from sparsight.restoring.verb import check_restore
from sparsight.specs import SPECS, EvaluateSpec, PruneSpec, RestoreSpec

BEGIN, END = "«", "»"  # around what is answered


def dry_run(verb: str, values: Mapping[str, Any], count: int) -> tuple[dict[str, Any], list[Any], bool]:
    """The facts of a dry run of `prune`, `restore` or `evaluate`, what is printed of them, and that all is well.

    **Raises** `SparsightError` for whatever the verb would refuse before it loads a model, and for samples that cannot be
    encoded.
    """
    if count < 1:
        raise SparsightError(f"`dry_run`: {count} is not a whole number of at least 1")
    spec: Any = SPECS[verb].of({name: values[name] for name in options(SPECS[verb])})
    model, data = places(model=values.get("model", values.get("sparse")), data=values["data"])
    if not getattr(spec, "task", None):
        need(data, "data", "samples to show")
    if verb == "prune":
        check_prune(spec, data)
    elif verb == "restore":
        check_restore(spec)
    elif (folder := values.get("export_task")) is not None:
        check_export(folder, data)
    samples, used, sizes = _work(verb, spec, data)
    if values.get("export_task") is not None:
        check_samples([sample.in_words_of("") for sample in samples])
    hollow = open_hollow(str(model), spec.dtype)
    encoder = Encoder(load_processor(model), hollow, max_length=spec.max_length, skip_bad=spec.skip_bad)
    asks = verb == "evaluate"
    shown = [_prompt(encoder, sample) if asks else _learned(encoder, sample) for sample in used[:count]]
    if asks:
        way = decoding_of(spec, encoder.config.model_type)
        sizes |= {"beams": way.beams, "most new tokens": way.max_new_tokens}
    facts = {"verb": verb, "read": samples.facts, "skipped": len(samples.skipped), "samples": shown, **sizes}
    facts["cost"] = _cost(verb, str(model), spec, used)
    return facts, _printed(facts), True


def _work(verb: str, spec: Any, data: Any) -> tuple[Any, Sequence[Sample], dict[str, Any]]:
    """The samples that were read, those that the verb uses, and the sizes of its work."""
    if verb == "evaluate":
        samples = read_samples(data, spec)
        return samples, samples.items, {"questions": len(samples), "batches": math.ceil(len(samples) / spec.batch_size)}
    if verb == "prune":
        samples = read_with(data, spec, limit=spec.samples, seed=spec.seed)
        sizes = {"calibration samples": len(samples), "batches": math.ceil(len(samples) / spec.batch_size)}
        return samples, samples.items, sizes
    samples = read_with(data, spec, limit=spec.samples, seed=spec.seed if spec.samples else None)
    other = None
    if spec.held_out is not None and held_out_count(spec.held_out) is None:
        other = read_with(places(held_out=spec.held_out)[0], spec, held_out=True)
    learned, held = divide_samples(spec, samples, other)
    steps = total_steps(spec, len(learned))
    sizes = {"training samples": len(learned), "held-out samples": len(held), "steps": steps}
    sizes |= {"samples per step": step_size(spec), "passes over the data": round(steps * step_size(spec) / len(learned), 2)}
    return samples, learned, sizes


def _learned(encoder: Encoder, sample: Sample) -> dict[str, Any]:
    """A sample as it is trained on or calibrated with; of a dialogue all turns."""
    batch = encoder.encode([sample])
    rows = []
    for row in range(batch.rows):
        ids, labels = batch.inputs["input_ids"][row], batch.inputs["labels"][row]
        real, image = batch.padding["text"][row], batch.padding.get("image")
        images = torch.zeros_like(real) if image is None else image[row]
        if batch.shifted:
            rows.append(_text(encoder, ids[real], images[real], (labels != -100)[real]))
        else:
            answer = labels[labels != -100]
            nothing = torch.zeros_like(answer, dtype=torch.bool)
            prompt = _text(encoder, ids[real], images[real], torch.zeros_like(real[real]))
            rows.append(prompt + _text(encoder, answer, nothing, ~nothing))
    answered = int((batch.inputs["labels"] != -100).sum())
    return {**_facts(sample, batch.inputs), "text": rows, "answer_tokens": answered}


def _prompt(encoder: Encoder, sample: Sample) -> dict[str, Any]:
    """A question as it is asked, and the answers that it is scored by."""
    inputs = encoder.prompts([sample])
    ids = inputs["input_ids"][0]
    token = getattr(encoder.config, "image_token_id", getattr(encoder.config, "image_token_index", None))
    images = ids == token if token is not None else torch.zeros_like(ids, dtype=torch.bool)
    text = _text(encoder, ids, images, torch.zeros_like(images))
    return {**_facts(sample, inputs), "text": [text], "answers": list(sample.answers)}


def _facts(sample: Sample, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "id": sample.id,
        "images": [list(image.size) for image in sample.load_images()],
        "tokens": int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else None,
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
    }


def _text(encoder: Encoder, ids: torch.Tensor, images: torch.Tensor, answers: torch.Tensor) -> str:
    """Tokens (T,) as text: runs of image tokens folded, answers between marks."""
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        same = end < len(ids) and bool(images[end] == images[start]) and bool(answers[end] == answers[start])
        if not same:
            text = encoder.processor.tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False)
            if images[start]:
                text = f"[{end - start} image tokens]"
            pieces.append(f"{BEGIN}{text}{END}" if answers[start] else text)
            start = end
    return "".join(pieces)


def _cost(verb: str, model: str, spec: Any, used: Sequence[Sample]) -> dict[str, Any]:
    """FLOPs and peak memory of the verb's stage on a CPU, or why they are not known."""
    specs: dict[str, Any] = {"prune": PruneSpec(dtype=spec.dtype, samples=len(used)), "restore": RestoreSpec()}
    specs["evaluate"] = EvaluateSpec(samples=len(used))
    specs[verb] = replace(spec, device="cpu")
    try:
        stage = estimate(model, specs["prune"], specs["restore"], specs["evaluate"], data=list(used), timed=False)[verb]
    except SparsightError as error:
        return {"unknown": str(error)}
    return {"gflops": round(stage.work / 1e9, 1), "peak_megabytes": round(stage.peak / 1e6, 1)}


def _printed(facts: Mapping[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for sample in facts["samples"]:
        sizes = ", ".join(f"{width} x {height}" for width, height in sample["images"]) or "no image"
        inputs = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sample["inputs"].items())
        parts += [f"Sample {quote(sample['id'])}: {sizes} pixels, {inputs}", *sample["text"]]
        if "answers" in sample:
            parts.append(f"Scored by: {', '.join(map(quote, sample['answers'][:10]))}")
        parts.append("")
    known = ("verb", "read", "skipped", "samples", "cost")
    rows = [(name, f"{value:,}") for name, value in facts.items() if name not in known]
    cost = facts["cost"]
    if "unknown" not in cost:
        rows += [("GFLOPs, on a CPU", f"{cost['gflops']:,}"), ("peak MB, on a CPU", f"{cost['peak_megabytes']:,}")]
    parts += [table(f"Dry run of {facts['verb']}: nothing was computed or written", ("size", "number"), rows)]
    parts += [cost["unknown"]] if "unknown" in cost else []
    return [*parts, *data_lines(facts["read"]), *skipped_line(facts["skipped"])]
