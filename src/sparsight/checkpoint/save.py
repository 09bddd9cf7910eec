"""Write a sparse model that is in memory as an ordinary folder, with the record that `verify` checks it by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsight.checkpoint.folder import (
    Record,
    atomic_folder,
    family_of,
    plan_of_zeros,
    read_plan,
    read_record,
    sparsity_record,
    write_model,
)
from sparsight.checkpoint.lock import locked
from sparsight.checkpoint.verify import recorded_plan
from sparsight.checks import check_paths, whole_name
from sparsight.errors import SparsightError
from sparsight.files import check_output
from sparsight.model.anatomy import anatomy
from sparsight.model.source import check_model
from sparsight.version import VERSION


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
    """Write a sparse model in memory as a `from_pretrained` folder, with `sparsity.json` and a card beside the weights.

    `record` is what `prune` returned or a plan; without it the zeros themselves are recorded, as patterns that the folder
    the model was loaded from has on record where they still hold. `base_model` names the dense original, the default teacher
    of `restore`; by default it is that folder, or the dense model that it was made from. Returns the content of
    `sparsity.json`.

    **Raises** `SparsightError` for adapters that are not merged, a model without zeros, one that does not hold the plan of
    `record`, and for a folder that would lose something.
    """
    check_paths(out=out, base_model=base_model, method=method)
    check_model(model)
    source = str(getattr(model.config, "_name_or_path", "") or "")
    earlier = read_record(source) if source else None
    base = str(base_model or (earlier or {}).get("base_model") or source)
    target = check_output(out, overwrite, inputs=(base or None,))
    known = family_of(earlier, family)
    body = anatomy(model, known)
    weights = {layer.name: layer.weight for layer in body.layers}
    plan = recorded_plan("record", record) if record is not None else {}
    if plan is None:
        raise SparsightError(f"`record`: {type(record).__name__} is no plan; give what `plan` or `prune` returned")
    if strange := [name for name in plan if name not in weights]:
        raise SparsightError(
            f"`record`: is of another model, with {strange[0]}; give the record of this one, or leave it out"
        )
    lost = [name for name, pattern in plan.items() if not pattern.holds(weights[name])]
    if lost:
        raise SparsightError(f"`record`: {lost[0]} does not hold its pattern any more; leave `record` out to save it so")
    before = {name: p for name, p in read_plan(earlier).items() if name in weights and p.holds(weights[name])}
    plan = {**plan_of_zeros(body), **before, **plan}
    if not plan:
        raise SparsightError("the model holds no zeros; prune it first, or save it with `save_pretrained`")
    if method == "unknown":
        methods = [(earlier or {}).get("method"), getattr(record, "method", None)]
        method = " + ".join(name for name in methods if name) or method
    measured = {"prune": record.measured()} if hasattr(record, "measured") else {}
    with locked(target):
        facts = sparsity_record(
            body,
            plan,
            base_model=whole_name(base or type(model).__name__),
            method=method,
            mask_only=False,  # it may have been trained since
            family=known,
        )
        with atomic_folder(target, overwrite) as new:
            write_model(model, processor, Record(facts, measured, {"sparsight": VERSION}), new)
    return facts
