"""Restoration without training: blocks are fitted to the dense model's outputs, with one block of each model in memory.

What `reconstruct` does before training, of two folders: the dense model walks ahead through its own blocks, and the sparse
one follows. No labels, no adapters; every zero is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sparsight import distributed
from sparsight.calibration.park import Park
from sparsight.checkpoint.folder import (
    Record,
    atomic_folder,
    family_of,
    plan_of_zeros,
    read_metrics,
    read_plan,
    read_recipe,
    read_record,
    source_of,
    sparsity_record,
    write_model,
)
from sparsight.checkpoint.lock import locked
from sparsight.checkpoint.stages import add_stage
from sparsight.checkpoint.unfinished import check_unfinished, unfinished
from sparsight.data import read_with
from sparsight.errors import SparsightError
from sparsight.masks.bits import pack
from sparsight.masks.matrix import mask_of
from sparsight.masks.pattern import Pattern
from sparsight.memory import enough_memory
from sparsight.model.anatomy import Anatomy
from sparsight.progress import Progress
from sparsight.pruning.compose import compose
from sparsight.pruning.loop import check_walk, prune
from sparsight.pruning.methods import Method
from sparsight.pruning.verb import encode
from sparsight.pruning.way import open_way
from sparsight.restoring.refit import SAMPLES
from sparsight.restoring.teacher import pruned_too
from sparsight.specs import RestoreSpec


def _as_it_is(W: torch.Tensor, moments: Any, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
    return W


def fit_folder(
    sparse: str | Path,
    out: Path,
    spec: RestoreSpec,
    *,
    data: Any,
    teacher: str,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Reconstruct the blocks of a sparse folder from `samples` (by default `SAMPLES`) of `data`; return the new record.

    **Raises** `SparsightError` for a model without zeros, a teacher of another architecture or one that is pruned too,
    several processes, and as `sparsight.prune` does.
    """
    if distributed.world_size() > 1:
        raise SparsightError("`reconstruct`: looks at all batches at once and does not run on several processes; start one")
    earlier, recipe = read_record(sparse), read_recipe(sparse)
    family = family_of(earlier, spec.family)
    with ExitStack() as stack:
        stack.enter_context(locked(out))
        check_unfinished(out, resume, overwrite)  # before anything is computed
        stack.enter_context(enough_memory(spec))
        samples = read_with(data, spec, limit=spec.samples or SAMPLES, seed=spec.seed)
        student = open_way(sparse, family, dtype=spec.dtype, device=spec.device)
        dense = open_way(teacher, family, dtype=student.model.dtype, device=spec.device)
        _check_alike(student.model, dense.model, str(sparse), teacher)
        stack.enter_context(student.run())
        stack.enter_context(dense.run())
        park = Park(out.parent, "auto", -(-len(samples) // spec.rows))
        ready, skipped = encode(samples, student.processor, student.model, spec, park)
        check_walk(student.model, student.anatomy, ready, park)
        plan = _plan(student.anatomy, read_plan(earlier))
        if not plan:
            raise SparsightError(f"{sparse}: holds no zeros to keep; prune it first")
        if _pruned_too(student.anatomy, dense.anatomy, plan):
            raise SparsightError(f"`teacher`: {teacher} is itself pruned where {sparse} is; give its dense original")
        settings = spec.same_work | {"sparse": str(sparse), "data": str(data), "teacher": teacher}
        settings |= {"fingerprint": samples.fingerprint, "files": [source_of(sparse), source_of(teacher)]}
        folder = stack.enter_context(unfinished(out, settings, resume=resume, overwrite=overwrite))
        stack.enter_context(enough_memory(spec))
        composition = compose(Method(_as_it_is, needs=frozenset(), mask_only=False), reconstruct=spec.reconstruct)
        journal = student.journal(folder, composition)
        record = prune(
            student.model, student.anatomy, plan, ready, method=composition, seed=spec.seed, journal=journal,
            progress=progress, park=park, teacher=(dense.model, dense.anatomy),
        )  # fmt: skip
        journal.finish()
        metrics: dict[str, Any] = {
            "curve": [],
            "teacher": "block by block",
            "teacher_modes": {},
            "trained_parameters": 0,
            "reconstructed": record.reconstructed,
            "block_errors": record.block_errors,
            "skipped_samples": skipped,
            "seconds": record.seconds,
            "memory": record.memory,
        }
        metrics |= {"data": samples.facts} if samples.facts else {}
        written = Record(
            sparsity_record(
                student.anatomy, plan, base_model=teacher, mask_only=False, family=family,
                method=" + ".join([(earlier or {}).get("method", "unknown"), f"reconstruct {spec.reconstruct}"]),
            ),
            {**read_metrics(sparse), "restore": metrics},
            add_stage(recipe, "restore", spec, data=data, model=teacher, fingerprint=samples.fingerprint, teacher=teacher),
        )  # fmt: skip
        with atomic_folder(out, overwrite) as new:
            write_model(student.model, student.processor, written, new, journal.files)
    return written


def _plan(body: Anatomy, recorded: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The patterns on record that the weights still hold, and those of layers whose zeros are not on record."""
    kept = {x.name: recorded[x.name] for x in body.layers if x.name in recorded and recorded[x.name].holds(x.weight)}
    return {**plan_of_zeros(body), **kept}


def _check_alike(model: Any, dense: Any, name: str, teacher: str) -> None:
    one, other = ({key: tuple(p.shape) for key, p in each.named_parameters()} for each in (model, dense))
    if one != other:
        raise SparsightError(f"`teacher`: {teacher} is not the same architecture as {name}; give its dense original")


def _pruned_too(sparse: Anatomy, dense: Anatomy, plan: Mapping[str, Pattern]) -> bool:
    """Whether most weights that are zero in the first model are zero in the second, too; one block of each in memory."""
    for block in sparse.blocks_with(set(plan)):
        masks = {x.name: pack(mask_of(x.weight)) for x in sparse.layers if x.block == block.name and x.name in plan}
        if not pruned_too(dense, masks):
            return False
    return True
