"""Restore a sparse model: train adapters against the teacher, merge them, and write the result."""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsight import distributed
from sparsight.checkpoint.folder import (
    Record,
    atomic_folder,
    read_metrics,
    read_plan,
    read_recipe,
    read_record,
    source_of,
    sparsity_record,
    write_model,
)
from sparsight.checkpoint.lock import locked
from sparsight.checkpoint.parts import PartFiles
from sparsight.checkpoint.stages import add_stage
from sparsight.checkpoint.unfinished import SPACE, unfinished
from sparsight.checks import whole_name
from sparsight.data import read_with
from sparsight.data.own_batches import OwnBatches, as_samples_or_batches
from sparsight.errors import SparsightError
from sparsight.files import check_output
from sparsight.masks.pattern import Pattern
from sparsight.memory import AUTO, enough_memory, peak_memory
from sparsight.model.anatomy import Anatomy
from sparsight.model.families import Family
from sparsight.model.files import check_files
from sparsight.model.load import check_device, check_trainable
from sparsight.model.skeleton import Unfit
from sparsight.model.source import NO_PROCESSOR, ModelSource, check_model
from sparsight.progress import Progress
from sparsight.restoring.adapter_files import save_adapter
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.checkpoints import gather
from sparsight.restoring.division import divide_samples, held_out_count
from sparsight.restoring.fit import fit_folder
from sparsight.restoring.merge import write_merged
from sparsight.restoring.side_effects import unchanged, unchanged_process
from sparsight.restoring.student import Student, make_student, parse_ranks, remaining_zeros
from sparsight.restoring.trainer import train
from sparsight.restoring.wrap import remove_adapters
from sparsight.specs import RestoreSpec
from sparsight.trackers import keep_log


@dataclass(frozen=True)
class Restoration:
    """A restored model, merged, with its remaining zeros and the measurements."""

    model: Any
    processor: Any
    anatomy: Anatomy
    plan: dict[str, Pattern]
    family: Family | None
    metrics: dict[str, Any]
    files: PartFiles | None = None  # that hold the weights already, and are then read where one is needed


def check_restore(spec: RestoreSpec) -> None:
    """Check settings against the machine and the data, before a model is loaded.

    **Raises** `SparsightError` for an absent device, and for invalid ranks, held-out samples or family.
    """
    check_device(spec.device, one_gpu=True)
    parse_ranks(spec.rank)
    if spec.family:
        Family.parse(spec.family)
    if isinstance(spec.held_out, str | Path) and held_out_count(spec.held_out) is None:
        read_with(spec.held_out, spec, held_out=True, limit=1)


def restore_model(
    model: Any,
    data: Any,
    spec: RestoreSpec,
    *,
    processor: Any = None,
    teacher: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Restore a sparse `model` in memory, in place; return the measurements.

    `data` holds samples, or batches of the user's own; `teacher` is the dense original, a model or its folder. But for its
    weights the model is afterwards as it was, and after an error or Ctrl-C it has no adapters.

    **Raises** `SparsightError` for invalid settings, data or models, and where the loss needs a teacher and there is none.
    """
    check_restore(spec)
    if spec.steps == 0:
        raise SparsightError("`steps`: 0 is for a model in a folder; write this one by `sparsight.save`, or train it, too")
    dense = _teacher_source(teacher, model, spec) if spec.needs_teacher or spec.reconstruct else None
    count = held_out_count(spec.held_out)
    most = None if spec.steps is None else spec.steps * spec.accumulate * distributed.world_size() + (count or 0)
    ready = as_samples_or_batches(model, data, spec, most)
    own = isinstance(ready, OwnBatches)
    if not own and processor is None:
        raise SparsightError(NO_PROCESSOR)
    _check_teacher_mode(spec, own)
    other = None
    if spec.held_out is not None and count is None:
        try:
            other = as_samples_or_batches(model, spec.held_out, replace(spec, samples=None), held_out=True)
        except SparsightError as error:
            raise SparsightError(str(error).replace("`data`", "`held_out`")) from error
        if isinstance(other, OwnBatches) != own:
            raise SparsightError("`held_out`: cannot be samples where `data` is batches of your own, nor the reverse")
    spec = replace(spec, batch_size=1) if own else spec  # each is a batch already
    learned, held = divide_samples(spec, ready, other)
    sparse = ModelSource(model=model, processor=processor, device=spec.device)
    models = [model] if dense is None or dense.model is None else [model, dense.model]
    with unchanged(*models), enough_memory(spec):
        try:
            with tempfile.TemporaryDirectory(prefix="sparsight-restore-") as folder:
                metrics = _restore(spec, sparse, dense, learned, held, folder=Path(folder), progress=progress).metrics
                keep_log(Path(folder), Path())
        except BaseException:
            remove_adapters(model)
            raise
    return {**metrics, "skipped_samples": metrics["skipped_samples"] + len(ready.skipped)}


def _teacher_source(teacher: Any, model: Any, spec: RestoreSpec) -> ModelSource:
    """The dense original of a model in memory; **raises** `SparsightError` for what cannot teach it."""
    if teacher is None:
        raise SparsightError("`teacher`: name the dense original, a model or its folder; or set `kl=0` to do without")
    if isinstance(teacher, str | Path):
        return ModelSource(teacher, device=spec.device)
    check_model(teacher, "teacher")
    kinds = [f"{next(m.parameters()).dtype} on {next(m.parameters()).device}" for m in (teacher, model)]
    if kinds[0] != kinds[1]:
        raise SparsightError(f"`teacher`: is {kinds[0]}, and the model is {kinds[1]}; convert one of them")
    if {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}:
        raise SparsightError("`teacher`: shares weights with the model, which is changed; give a dense original of its own")
    return ModelSource(model=teacher, device=spec.device, noun="the teacher")


def _check_teacher_mode(spec: RestoreSpec, own: bool) -> None:
    """Refuse a way of holding the teacher that a model in memory, or batches of the user's `own`, cannot have."""
    if spec.teacher_mode == "shared":
        raise SparsightError("`teacher_mode`: shared is for folders, since a model in memory is changed in place; give live")
    if own and (spec.teacher_mode == "cached" or spec.teacher_cache):
        field = "teacher_cache" if spec.teacher_cache else "teacher_mode"
        raise SparsightError(f"`{field}`: the teacher is not cached for batches of your own; leave it out")


def restore_folder(
    sparse: str | Path,
    out: str | Path,
    spec: RestoreSpec,
    *,
    data: Any,
    teacher: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    source: ModelSource | None = None,
    fit: Callable[[Any, Sequence[Any], RestoreSpec], RestoreSpec] | None = None,
) -> tuple[Record, Any]:
    """Restore the model of a folder and write it to another; return its record and the merged model.

    `source` has the sparse model in memory already; without it the merged model does not stay in memory, and None comes in
    its place. `fit(sparse, samples, spec)` gives settings with a batch size where they have none. Several
    processes of a launcher share the training data, and the main one writes. **Raises** `SparsightError`
    as `sparsight.restore` does.
    """
    check_restore(spec)
    check_files(str(sparse))
    record = read_record(sparse)
    earlier = (read_metrics(sparse), read_recipe(sparse))
    original = whole_name(teacher) if teacher is not None else (record or {}).get("base_model")
    taught = spec.needs_teacher or spec.reconstruct > 0
    other_data = spec.held_out if spec.held_out is not None and held_out_count(spec.held_out) is None else None
    target = check_output(out, overwrite, inputs=(sparse, data, original, other_data))
    if taught and original is None:
        raise SparsightError(f"`teacher`: {sparse} does not say what it was pruned from; name the dense model, or `kl=0`")
    if taught and teacher is None:
        try:
            check_files(str(original))
        except SparsightError as error:
            raise SparsightError(
                f"`teacher`: {sparse} was pruned from {original}, which is not there; name the dense model, or `kl=0`"
            ) from error
    distributed.init(spec.device)
    progress = progress if distributed.is_main() else None
    if spec.steps == 0:
        spec = replace(spec, batch_size=spec.rows)
        written = fit_folder(
            sparse, target, spec, data=data, teacher=str(original), overwrite=overwrite, resume=resume, progress=progress
        )  # fmt: skip
        return written, None
    if spec.teacher_cache and Path(spec.teacher_cache).resolve().is_relative_to(target.resolve()):
        raise SparsightError(f"`teacher_cache`: {spec.teacher_cache} lies in OUT, which is written at the end; give another")
    with ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(locked(target)))
        samples = read_with(data, spec, limit=spec.samples, seed=spec.seed if spec.samples else None)
        other = read_with(other_data, spec, held_out=True) if other_data is not None else None
        learned, held = divide_samples(spec, samples, other)
        spec = spec if fit is None else fit(sparse, samples, spec)
        spec = replace(spec, batch_size=spec.rows)
        fingerprint = samples.fingerprint + (other.fingerprint if other else "")
        teacher_name = original if taught else None
        same = spec.same_work | {
            "sparse": str(sparse),
            "data": str(data),
            "teacher": teacher_name,
            "fingerprint": fingerprint,
        }
        same |= {"processes": distributed.world_size(), "files": [source_of(sparse), source_of(teacher_name)]}
        ours = unfinished(target, same, resume=resume, overwrite=overwrite)
        folder = distributed.on_main(lambda: stack.enter_context(ours))
        stack.enter_context(enough_memory(spec))  # unfinished work says how to go on
        home = "cpu" if distributed.sharded() else spec.device  # no GPU holds the whole model
        done = _restore(
            spec,
            source or ModelSource(sparse, device=home),
            ModelSource(teacher_name, device=home) if teacher_name else None,
            learned,
            held,
            folder=folder,
            fingerprint=fingerprint,
            resume=resume,
            progress=progress,
            adapter_folder=folder / "adapter" if spec.save_adapter else None,
            recipe={"base_model": original, **earlier[1], "restore": spec.facts()},
            weights=folder / SPACE if source is None else None,
        )
        skipped = sum(len(part.skipped) for part in (samples, other) if part)
        metrics = {**done.metrics, "skipped_samples": done.metrics["skipped_samples"] + skipped}
        parts = {"split": samples.split, "held_out_split": other.split if other else ""}
        read = {"data": samples.facts, "held_out_data": other.facts if other else {}}
        metrics |= {key: facts for key, facts in read.items() if facts}

        def write() -> Record:
            steps = [*([f"reconstruct {spec.reconstruct}"] if spec.reconstruct else []), spec.adapter]
            plan = {**done.plan, **read_plan(record)} if ADAPTERS[spec.adapter].masked else done.plan
            facts = sparsity_record(
                done.anatomy,
                plan,
                base_model=original or whole_name(sparse),
                method=" + ".join([(record or {}).get("method", "unknown"), *steps]),
                mask_only=False,
                family=done.family,
            )
            recipe = add_stage(
                earlier[1], "restore", spec, data=data, model=original or sparse, fingerprint=fingerprint,
                teacher=teacher_name, **{key: part for key, part in parts.items() if part},
            )  # fmt: skip
            with atomic_folder(target, overwrite) as new:
                if spec.save_adapter:
                    (folder / "adapter").rename(new / "adapter")
                keep_log(folder, new)
                written = Record(facts, {**earlier[0], "restore": metrics}, recipe)
                write_model(done.model, done.processor, written, new, done.files)
            return written

        return distributed.on_main(write), None if done.files else done.model


def _restore(
    spec: RestoreSpec,
    sparse: ModelSource,
    teacher: ModelSource | None,
    learned: Sequence[Any],
    held: Sequence[Any],
    *,
    folder: Path,
    fingerprint: str = "",
    resume: bool = False,
    progress: Progress | None = None,
    adapter_folder: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    weights: Path | None = None,
) -> Restoration:
    """Make the student, train it, merge it; checkpoints and a cached teacher go into `folder`.

    With `weights` it is merged into files there, with one merged block in memory, where it can be in parts.
    """
    cache = Path(spec.teacher_cache) if spec.teacher_cache else folder / "teacher"
    student = make_student(
        sparse, teacher, learned, held, spec=replace(spec, device=sparse.device), cache=cache, fingerprint=fingerprint,
        progress=progress,
    )  # fmt: skip
    if spec.device == AUTO and student.wrapped.device.type == "cuda":
        check_trainable(student.wrapped)
    began = time.perf_counter()
    with unchanged_process(spec.device) if distributed.world_size() == 1 else nullcontext():
        trained = train(student, spec, folder, resume=resume, progress=progress, recipe=recipe)
    gc.collect()  # the trainer and its optimizer refer to each other
    skipped = student.encoder.skipped  # one that is left out when it is used may have been met again
    metrics = {
        **trained,
        "seconds": time.perf_counter() - began,
        "memory": peak_memory(spec.device),
        **_student_facts(student),
        "skipped_samples": len(set(skipped) if student.encoder.late else skipped),
    }
    here = sparse.path is None or distributed.is_main()  # the main process writes a folder; a model in memory is everywhere
    gather(student.wrapped, here)
    if adapter_folder is not None and distributed.is_main():
        shutil.rmtree(adapter_folder, ignore_errors=True)  # of an interrupted run
        save_adapter(student.wrapped, spec.alpha, adapter_folder)
    student.teacher = None  # the dense weights are no longer needed once they are merged
    for head in (student.head, student.teacher_head):
        if head is not None:
            head.remove()
    merged, body, files = student.wrapped, student.anatomy, None
    if here and weights is not None and sparse.path is not None:
        with contextlib.suppress(Unfit):
            files = write_merged(student.wrapped, sparse.path, weights, student.family, spec.device)
            merged, body = files.stream.model, files.stream.anatomy
    if here and files is None:
        merged = student.wrapped.merge_and_unload()
    masked = ADAPTERS[spec.adapter].masked or not here
    plan = student.plan if masked else remaining_zeros(body, student.masks)
    return Restoration(merged, student.processor, body, plan, student.family, metrics, files)


def _student_facts(student: Student) -> dict[str, Any]:
    facts = {
        "teacher": student.mode,
        "teacher_modes": student.modes,
        "weight_bytes": student.weight_bytes,
        "dense_bytes": student.dense_bytes,
        "held_out_samples": student.held_out,
        "trained_parameters": sum(p.numel() for p in student.wrapped.parameters() if p.requires_grad),
    }
    if student.cache is not None:
        facts["cache_bytes"] = student.cache.bytes
    if student.refit_errors:
        facts["reconstructed"] = student.refit_errors
    return facts
