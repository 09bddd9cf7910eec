"""The batch of a restoration that fits into memory, where nobody has named one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsight import distributed
from sparsight.allocation.plan import make_plan
from sparsight.checkpoint.folder import family_of, read_plan, read_record
from sparsight.data import Sample
from sparsight.errors import Notice, first_line
from sparsight.estimation.shapes import open_hollow, restore_shapes
from sparsight.estimation.stages import Stage, Work, restore
from sparsight.memory import free_memory
from sparsight.model.anatomy import anatomy
from sparsight.model.load import load_processor
from sparsight.specs import RestoreSpec

SMALL = 2**25  # bytes of a model whose steps fit anywhere
LOOKED_AT = 256  # samples, of which the longest count
SHARE = 0.9  # of the free memory; the estimate is right to 15 %
GROW = ("batches", "saved for backward", "gaps in the heap", "running", "teacher's forward")  # with the batch, about
FEWEST = 4  # samples of a batch before blocks run twice: smaller ones leave a processor idle
logger = logging.getLogger(__name__)


def fit_batch(sparse: str | Path, samples: Sequence[Sample], spec: RestoreSpec, *, free: int | None = None) -> RestoreSpec:
    """The settings of a restoration, with a batch whose step fits into the memory that is free; the step stays the same.

    Fewer samples and more batches come first, then gradient checkpointing. `free` bytes are by default what the device has.
    Settings that name a batch size are as they were, and so are those of several processes, which would have to agree, of
    models of fewer than `SMALL` bytes, and of models that cannot be traced. A `Notice` says what was chosen.
    """
    small = sum(file.stat().st_size for file in Path(sparse).glob("*.safetensors")) < SMALL
    if spec.batch_size is not None or small or distributed.world_size() > 1:
        return spec
    longest = _longest([samples[i] for i in range(min(len(samples), LOOKED_AT))], spec.rows)
    free = free_memory(spec.device) if free is None else free
    try:
        fits, need, least = _fit(str(sparse), longest, spec, free)
    except Exception as error:  # any code of a model may refuse to run without weights
        logger.info("%s: the memory of a step is not known: %s", sparse, first_line(error))
        return spec
    if fits != spec:
        names = [f"batch_size={fits.batch_size}", f"accumulate={fits.accumulate}"]
        names += ["gradient_checkpointing"] if fits.gradient_checkpointing != spec.gradient_checkpointing else []
        warnings.warn(
            f"restore: {', '.join(names)}, since {spec.rows} samples at once would take {need / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free; the steps stay the same"
            + (f"; even so a step takes {least / 1e9:.1f} GB" if least > free else ""),
            Notice, stacklevel=3,
        )  # fmt: skip
    return fits


def _fit(sparse: str, samples: list[Sample], spec: RestoreSpec, free: int) -> tuple[RestoreSpec, int, int]:
    """The settings that fit, or take least; the bytes that the given ones would take, and those that these take."""
    record = read_record(sparse)
    need = _stage(sparse, record, samples, spec)
    if need.peak <= SHARE * free:
        return spec, need.peak, need.peak
    costs = {spec.gradient_checkpointing: need}
    for rows, again in _ways(spec):
        fits = _divided(spec, rows, again)
        if again not in costs:
            costs[again] = _stage(sparse, record, samples, _divided(spec, spec.rows, again))
        grows = sum(costs[again].memory.get(term, 0) for term in GROW)
        peak = costs[again].peak - round(grows * (1 - rows / spec.rows))
        if peak > SHARE * free:  # a trace takes seconds
            continue
        peak = _stage(sparse, record, samples, fits).peak
        if peak <= SHARE * free:
            break
    return fits, need.peak, peak


def _ways(spec: RestoreSpec) -> list[tuple[int, bool]]:
    """Samples of a batch, and whether blocks run twice, from the fastest to the smallest."""
    halves = [spec.rows]
    while halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    once = [] if spec.gradient_checkpointing else [(rows, False) for rows in halves if rows >= FEWEST]
    return [*once, *((rows, True) for rows in halves)]


def _divided(spec: RestoreSpec, rows: int, again: bool) -> RestoreSpec:
    return replace(
        spec, batch_size=rows, accumulate=spec.accumulate * spec.rows // rows, gradient_checkpointing=again
    )  # fmt: skip


def _longest(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many samples of the most images and words."""

    def size(sample: Sample) -> tuple[int, int]:
        return len(sample.images), sum(len(turn.prompt) + len(turn.answers[0]) for turn in sample.turns)

    return sorted(samples, key=size, reverse=True)[:count]


def _stage(sparse: str, record: Any, samples: list[Sample], spec: RestoreSpec) -> Stage:
    """The cost of a restoration, without interpreter and libraries."""
    hollow = open_hollow(sparse, spec.dtype)
    body = anatomy(hollow, family_of(record, spec.family))
    names = {layer.name for layer in body.layers}
    plan = {name: pattern for name, pattern in read_plan(record).items() if name in names}
    mode = spec.teacher_mode
    if mode == "auto":
        mode = "shared" if (record or {}).get("mask_only") and not spec.reconstruct else "cached"
    work = Work(teacher=mode if spec.needs_teacher else "none", restore_batch=spec.rows, train_steps=1)
    shapes = restore_shapes(
        hollow, load_processor(sparse), body, plan or make_plan(body, sparsity=0.5), samples, work, spec, {"restore": 0}
    )  # fmt: skip
    return restore(shapes, work)
