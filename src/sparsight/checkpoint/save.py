"""Write a sparse model that is in memory as an ordinary folder, with the record that `verify` checks it by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sparsight
from sparsight.checkpoint.folder import (
    Record,
    atomic_folder,
    check_output,
    family_of,
    plan_of_zeros,
    sparsity_record,
    write_model,
)
from sparsight.checks import whole_name
from sparsight.errors import SparsightError
from sparsight.model.anatomy import anatomy


def save(
    model: Any,
    out: str | Path,
    processor: Any = None,
    *,
    record: Any = None,
    base_model: str | Path = "",
    method: str = "unknown",
    family: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `model` to the folder `out`; returns the content of `sparsity.json`.

    `record` is what `prune` returned or a plan; without it the zeros themselves are recorded. `base_model` is by default
    what the model says it was loaded from.

    **Raises** `SparsightError` for a wrapped model, for one without zeros, and for a folder that would lose something.
    """
    target = check_output(out, overwrite)
    if hasattr(model, "merge_and_unload"):
        raise SparsightError("the model has adapters that are not merged; save `sparsight.merge(model)`")
    known = family_of(None, family)
    body = anatomy(model, known)
    plan = dict(record if isinstance(record, Mapping) else getattr(record, "plan", None) or {})
    plan = {**plan_of_zeros(body), **{name: pattern for name, pattern in plan.items() if pattern.holds(body[name].weight)}}
    if not plan:
        raise SparsightError("the model holds no zeros; prune it first, or save it with `save_pretrained`")
    name = str(base_model or getattr(model.config, "_name_or_path", "") or type(model).__name__)
    measured = {"prune": record.measured()} if hasattr(record, "measured") else {}
    facts = sparsity_record(
        body,
        plan,
        base_model=whole_name(name),
        method=getattr(record, "method", method) if method == "unknown" else method,
        mask_only=getattr(record, "mask_only", False),
        family=known,
    )
    with atomic_folder(target, overwrite) as new:
        write_model(model, processor, Record(facts, measured, {"sparsight": sparsight.__version__}), new)
    return facts
