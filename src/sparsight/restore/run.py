"""The verb `restore`, from its settings to the written folder."""

from __future__ import annotations

import gc
import inspect
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import sparsight
from sparsight import processes
from sparsight.data import read
from sparsight.errors import SparsightError
from sparsight.memory import peak_memory
from sparsight.model.checkpoint import (
    Record,
    atomic_folder,
    check_output,
    identity,
    read_metrics,
    read_plan,
    read_recipe,
    read_record,
    recorded_family,
    save,
    sparsity_record,
)
from sparsight.model.families import Family
from sparsight.model.load import check_device, check_folder, parse_dtype
from sparsight.model.unfinished import unfinished
from sparsight.restore.adapter import save_adapter
from sparsight.restore.checkpoints import gather
from sparsight.restore.schedule import Objective, Schedule
from sparsight.restore.student import Student, Tuning, make_student, zeros_left
from sparsight.restore.trainer import train
from sparsight.settings import check_above_zero, check_seed, check_whole, parse_list, parse_ranks, plain, whole_name

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Run:
    """What `verbs.restore` was asked for."""

    sparse: str | Path
    out: str | Path
    data: str | Path
    teacher: str | Path | None
    settings: dict[str, Any]
    tuning: Tuning
    objective: Objective
    schedule: Schedule
    teacher_cache: str | Path | None
    samples: int | None
    held_out: int | str | Path | None
    family: str | None
    dtype: str
    device: str
    save_adapter: bool
    skip_bad: bool
    overwrite: bool
    resume: bool

    def check(self) -> None:
        self.tuning.check()
        self.objective.check()
        parse_dtype(self.dtype)
        check_device(self.device, one_gpu=True)
        self.schedule.check(self.device)
        check_above_zero("--alpha", self.tuning.alpha)
        check_seed(self.schedule.seed)
        check_whole("--samples", self.samples, optional=True)
        if self.save_adapter and self.tuning.reconstruct:
            raise SparsightError(
                "--save-adapter: its layers were fitted before it was trained, so it would not go with the sparse model; "
                "leave it or --reconstruct out"
            )
        if self.schedule.patience and self.held_out is None:
            raise SparsightError("--patience: waits for a better loss on held-out samples; name some with --held-out")


NOT_WORK = {  # keywords that change nothing of what comes out, and what is recorded by another name
    "out", "teacher", "teacher_cache", "report_to", "device", "save_adapter", "skip_bad", "overwrite", "resume", "progress",
}  # fmt: skip


def request(given: Mapping[str, Any]) -> Run:
    """What the keywords of `verbs.restore` ask for; the fields of its parts have the keywords' names."""

    def part(kind: Any, **read: Any) -> Any:
        return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given and f.name not in read}, **read)

    return part(
        Run,
        settings=plain(given, *(name for name in given if name not in NOT_WORK)),
        tuning=part(Tuning, ranks=parse_ranks(given["rank"]), tune=parse_list(given["tune"])),
        objective=part(Objective),
        schedule=part(Schedule, report_to=parse_list(given["report_to"])),
    )


def check_keywords(given: Mapping[str, Any], device: str) -> None:
    """Refuse keywords of `verbs.restore` that it would refuse, long before there is a model to restore."""
    from sparsight import verbs

    known = inspect.signature(verbs.restore).parameters.values()
    defaults = {p.name: "" if p.default is p.empty else p.default for p in known}
    try:
        request({**defaults, **given, "device": device}).check()
    except TypeError as error:  # a word where a number should be, a list where a word should be
        raise SparsightError(f"restore: {dict(given)} holds a value of the wrong kind ({error})") from error


def run(asked: Run, progress: Progress | None = None) -> Record:
    """Check, load, train, merge, write. Where a launcher has started several processes they share the training data."""
    asked.check()
    check_folder(str(asked.sparse))
    record = read_record(asked.sparse)
    earlier = (read_metrics(asked.sparse), read_recipe(asked.sparse))
    family = Family.parse(asked.family) if asked.family else recorded_family(record)
    original = whole_name(asked.teacher) if asked.teacher is not None else (record or {}).get("base_model")
    taught = asked.objective.needs_teacher or asked.tuning.reconstruct > 0
    held_data: Any = asked.held_out if asked.held_out is not None and _count(asked.held_out) is None else None
    target = check_output(asked.out, asked.overwrite, inputs=(asked.sparse, asked.data, original, held_data))
    if taught and original is None:
        raise SparsightError(
            f"--teacher: {asked.sparse} does not say what it was pruned from; name the dense model, or --kl 0"
        )
    processes.start(asked.device)
    progress = progress if processes.is_main() else None
    chosen = read(
        asked.data, limit=asked.samples, seed=asked.schedule.seed if asked.samples else None, skip_bad=asked.skip_bad
    )
    other = read(held_data, skip_bad=asked.skip_bad) if held_data is not None else None
    learned, held = _divide(asked, chosen, other)
    fingerprint = chosen.fingerprint + (other.fingerprint if other else "")
    settings = {**asked.settings, "teacher": original if taught else None, "fingerprint": fingerprint}
    if asked.teacher_cache and Path(asked.teacher_cache).resolve().is_relative_to(target.resolve()):
        raise SparsightError(
            f"--teacher-cache: {asked.teacher_cache} lies in OUT, which is written at the end; give another"
        )
    # work goes on with the same models and processes only, but it may do so with less memory
    same = {key: value for key, value in settings.items() if key != "gradient_checkpointing"}
    same |= {"processes": processes.count(), "files": [identity(asked.sparse), identity(original) if taught else None]}
    with ExitStack() as stack:
        ours = unfinished(target, same, resume=asked.resume, overwrite=asked.overwrite)
        folder = processes.by_main(lambda: stack.enter_context(ours))
        student = make_student(
            asked.sparse, original if taught else None, learned, held, tuning=asked.tuning,
            cache=Path(asked.teacher_cache) if asked.teacher_cache else folder / "teacher",
            fingerprint=fingerprint, distil=asked.objective.needs_teacher,
            every_position=asked.objective.reduction == "paper", batch_size=asked.schedule.batch_size,
            seed=asked.schedule.seed, dtype=asked.dtype, device=asked.device, family=family, skip_bad=asked.skip_bad,
            progress=progress,
        )  # fmt: skip
        began = time.perf_counter()
        trained = train(
            student, asked.objective, asked.schedule, folder, device=asked.device, resume=asked.resume, progress=progress
        )
        gc.collect()  # the trainer and its optimizer, which point at each other
        measured = {
            **trained,
            "seconds": time.perf_counter() - began,
            "memory": peak_memory(asked.device),
            **_facts(student),
            "skipped_samples": sum(len(part.skipped) for part in (chosen, other) if part) + len(student.encoder.skipped),
        }
        gather(student.wrapped)

        def written_by_main() -> Record:
            with atomic_folder(target, asked.overwrite) as new:
                return _write(asked, student, settings, measured, earlier, original, family, new)

        return processes.by_main(written_by_main)


def _facts(student: Student) -> dict[str, Any]:
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
    if student.refitted:
        facts["reconstructed"] = student.refitted
    return facts


def _write(
    asked: Run,
    student: Student,
    settings: dict[str, Any],
    measured: dict[str, Any],
    earlier: tuple[dict[str, Any], dict[str, Any]],
    original: str | None,
    family: Family | None,
    new: Path,
) -> Record:
    """Merge the adapters and write the model into the folder `new`."""
    record = read_record(asked.sparse)
    if asked.save_adapter:
        save_adapter(student.wrapped, asked.tuning.alpha, new / "adapter")
    student.teacher = None  # the dense weights are no longer needed once they are merged
    merged = student.wrapped.merge_and_unload()
    steps = [*([f"reconstruct {asked.tuning.reconstruct}"] if asked.tuning.reconstruct else []), asked.tuning.adapter]
    written = Record(
        sparsity_record(
            student.anatomy,
            {**student.plan, **read_plan(record)} if asked.tuning.masked else zeros_left(student),
            base_model=original or whole_name(asked.sparse),
            method=" + ".join([(record or {}).get("method", "unknown"), *steps]),
            mask_only=False,
            family=family,
        ),
        {**earlier[0], "restore": measured},
        {**earlier[1], "sparsight": sparsight.__version__, "restore": settings},
    )
    save(merged, student.processor, written, new)
    return written


def _divide(asked: Run, chosen: Sequence[Any], other: Sequence[Any] | None) -> tuple[list[Any], list[Any]]:
    """The samples to learn from, no more than the steps can use, and those held out."""
    learned, held = list(chosen), list(other or ())
    if (count := _count(asked.held_out)) is not None:
        if not 0 < count < len(learned):
            raise SparsightError(
                f"--held-out: {count} of {len(learned)} samples; give at least 1, and leave some to learn from"
            )
        apart = set(random.Random(asked.schedule.seed).sample(range(len(learned)), count))
        held = [sample for i, sample in enumerate(learned) if i in apart]
        learned = [sample for i, sample in enumerate(learned) if i not in apart]
    if (needed := asked.schedule.samples()) is not None and needed < len(learned):
        used = sorted(random.Random(asked.schedule.seed).sample(range(len(learned)), needed))
        learned = [learned[i] for i in used]
    return learned, held


def _count(held_out: Any) -> int | None:
    """A number of samples, given as one or in words; None for data of its own."""
    if isinstance(held_out, int):
        return held_out
    return int(held_out) if isinstance(held_out, str) and held_out.lstrip("-").isdigit() else None
