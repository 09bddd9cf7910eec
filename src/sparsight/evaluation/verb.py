"""The verb `evaluate`: from its settings to scores, of a folder or of a model in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from sparsight.calibration.gradients import evaluating
from sparsight.calibration.park import Park, disk_folder
from sparsight.calibration.rehearsal import rehearse
from sparsight.checkpoint.folder import family_of, read_record
from sparsight.data import Encoder, Sample, Samples, batches, read_with
from sparsight.data.own_batches import as_batches, as_samples, check_labels, check_unused
from sparsight.errors import SparsightError
from sparsight.evaluation.evaluate import Result, evaluate, split_metrics, token_rows
from sparsight.evaluation.lmms_task import check_export, check_samples, write_task
from sparsight.evaluation.record import check_recordable, keep_evaluation
from sparsight.fields import NEW_TOKENS
from sparsight.memory import enough_memory
from sparsight.model.anatomy import Anatomy
from sparsight.model.load import check_device, load, load_processor, read_config
from sparsight.model.skeleton import device_of
from sparsight.model.source import NO_PROCESSOR
from sparsight.model.stream import runnable
from sparsight.progress import Progress
from sparsight.specs import EvaluateSpec
from sparsight.tasks import TASKS
from sparsight.tasks.wording import Decoding, prompts_of


def read_samples(data: Any, spec: EvaluateSpec) -> Samples:
    """The held-out samples of a source, as many as the settings ask for."""
    return read_with(data, spec, held_out=True, limit=spec.samples, seed=spec.seed if spec.samples else None)


def evaluate_samples(
    model: Any,
    processor: Any,
    samples: Samples,
    spec: EvaluateSpec,
    progress: Progress | None = None,
    first: Callable[[list[Sample]], None] | None = None,
) -> tuple[Result, list[Any]]:
    """Score a loaded model's answers; the samples that it could take, too. `first` gets these before anything is asked."""
    encoder = Encoder(processor, model, max_length=spec.max_length, skip_bad=spec.skip_bad)
    usable = encoder.usable(samples)
    rehearse(model, encoder, usable)
    if first is not None:
        first(usable)
    result = score_answers(model, processor, usable, spec, progress)
    facts = {**samples.facts, **question_facts(samples, spec, model.config.model_type)}
    return replace(result, skipped=len(samples.skipped) + len(encoder.skipped), data=facts), usable


def score_answers(
    model: Any, processor: Any, usable: Sequence[Sample], spec: EvaluateSpec, progress: Progress | None = None
) -> Result:
    """Score a model's answers to samples that it can take, as the settings and the task say."""
    way = decoding_of(spec, model.config.model_type)
    return evaluate(
        model, processor, usable, metrics=spec.metrics, beams=way.beams, max_new_tokens=way.max_new_tokens,
        length_penalty=way.length_penalty, batch_size=spec.batch_size, seed=spec.seed,
        task=TASKS[spec.task] if spec.task else None, progress=progress,
    )  # fmt: skip


def decoding_of(spec: EvaluateSpec, model_type: str) -> Decoding:
    """How answers are written: as the settings say, else as the task has it for this type of model, else greedily.

    **Raises** `SparsightError` for a length penalty without beams.
    """
    usual = TASKS[spec.task].decoding(model_type) if spec.task else Decoding(max_new_tokens=NEW_TOKENS)
    beams = spec.beams or usual.beams
    if spec.length_penalty is not None and beams == 1:
        raise SparsightError("`length_penalty`: changes nothing without beams; set `beams`, or leave it out")
    penalty = usual.length_penalty if spec.length_penalty is None else spec.length_penalty
    return Decoding(beams, penalty if beams > 1 else 1.0, spec.max_new_tokens or usual.max_new_tokens)


def question_facts(samples: Sequence[Sample], spec: EvaluateSpec, model_type: str) -> dict[str, Any]:
    """The prompts and the decoding of a task, to be kept with its scores; empty without a task."""
    if spec.task is None:
        return {}
    way = decoding_of(spec, model_type)
    return {"prompts": prompts_of(samples, model_type), "decoding": asdict(way)}


def evaluate_model(
    model: Any, data: Any, spec: EvaluateSpec, *, processor: Any = None, progress: Progress | None = None
) -> Result:
    """Score a model in memory on samples, which need its processor, or on batches of the user's own.

    **Raises** `SparsightError` for samples without a processor and batches without labels.
    """
    samples = as_samples(data, spec, held_out=True)
    if samples is not None:
        if processor is None:
            raise SparsightError(NO_PROCESSOR)
        with evaluating(model), enough_memory(spec):
            return evaluate_samples(model, processor, samples, spec, progress)[0]
    of_answers, of_tokens = split_metrics(spec.metrics)
    check_unused(
        data, spec, *(("metrics",) if of_answers else ()), "task", "beams", "max_new_tokens", "length_penalty", "seed"
    )
    ready = as_batches(model, data, limit=spec.samples)
    check_labels(ready, "data", "the score of answer tokens")
    with evaluating(model), enough_memory(spec):
        return Result(tuple(token_rows(model, ready, of_tokens)), ())


def evaluate_folder(
    model: str | Path,
    data: Any,
    spec: EvaluateSpec,
    *,
    record: bool | str | Path = False,
    export_task: str | Path | None = None,
    progress: Progress | None = None,
    loaded: tuple[Any, Any] | None = None,
) -> Result:
    """Score the model of a folder; `loaded` has model and processor already.

    `record` says where scores are kept, and `export_task` where the samples are written as a task of lmms-eval.
    """
    check_device(spec.device)
    if export_task is not None:
        check_export(export_task, data)
    target = check_recordable(model, None if record is True else record) if record else None
    began = time.perf_counter()
    sparsity = read_record(model) if target is not None else None  # a damaged one is refused before it answers
    samples = read_samples(data, spec)
    if export_task is not None:
        check_samples([sample.in_words_of("") for sample in samples])  # "": in those of the user's, where there are some
    with enough_memory(spec):
        if loaded is None and not spec.task and split_metrics(spec.metrics)[0] == ():
            network, body, result, usable = _tokens_by_block(model, samples, spec)
            processor = load_processor(model)
        else:
            network, processor = loaded or load(model, dtype=spec.dtype, device=spec.device)
            body = None
            first = None if export_task is None else partial(_export, export_task, network, processor, spec, samples.task)
            result, usable = evaluate_samples(network, processor, samples, spec, progress, first)
            export_task = None
    if target is not None:
        keep_evaluation(
            target, result, usable, name=model, sparsity=sparsity, model=network, body=body, samples=samples, spec=spec,
            seconds=time.perf_counter() - began,
        )  # fmt: skip
    if export_task is not None:
        _export(export_task, network, processor, spec, samples.task, usable)
    return result


def _export(folder: str | Path, model: Any, processor: Any, spec: EvaluateSpec, task: Any, usable: Sequence[Sample]) -> None:
    """Write the samples that a model could take as a task of lmms-eval."""
    asked = [sample.in_words_of(model.config.model_type) for sample in usable]
    way = decoding_of(spec, model.config.model_type)
    write_task(folder, asked, way, processor=processor, task=task)


def _tokens_by_block(model: str | Path, samples: Samples, spec: EvaluateSpec) -> tuple[Any, Anatomy, Result, list[Sample]]:
    """Score the tokens of the right answers with one block in memory; the model, its anatomy, scores, the samples used."""
    read_config(str(model))  # first, since it says what is wrong with a path
    processor = load_processor(model)
    with runnable(model, family_of(read_record(model), None), dtype=spec.dtype, device=spec.device) as (network, body):
        encoder = Encoder(processor, network, max_length=spec.max_length, skip_bad=spec.skip_bad)
        usable = encoder.usable(samples)
        rehearse(network, encoder, usable)
        park, ready = Park(disk_folder(), "auto", -(-len(usable) // spec.batch_size)), []
        for batch in batches(usable, encoder, spec.batch_size):
            ready.append(batch.to(device_of(network)))
            park.tensors([ready[-1].inputs])
        blocks = [(block.name, block.module) for block in body.blocks]
        rows = token_rows(network, ready, split_metrics(spec.metrics)[1], blocks=blocks, park=park)
    skipped = len(samples.skipped) + len(encoder.skipped)
    return network, body, Result(tuple(rows), (), skipped, dict(samples.facts)), usable
