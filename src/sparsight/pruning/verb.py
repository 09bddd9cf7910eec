"""The verb `prune`: from its settings to a pruned model, in memory or in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparsight import distributed
from sparsight.allocation.plan import Plan, PlannedModel, find_policy, make_plan, planned_budget
from sparsight.calibration.park import Park
from sparsight.calibration.probe import Probe
from sparsight.calibration.rehearsal import rehearse
from sparsight.checkpoint.folder import (
    Record,
    atomic_folder,
    family_of,
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
from sparsight.checks import name_of, whole_name
from sparsight.data import Batch, Encoder, Samples, batches, read_with
from sparsight.data.own_batches import as_batches, as_samples, check_labels, check_unused
from sparsight.errors import Notice, SparsightError
from sparsight.files import check_output
from sparsight.masks.matrix import count_zeros
from sparsight.masks.pattern import Pattern
from sparsight.memory import enough_memory
from sparsight.model.anatomy import SPARSE_FROM, Anatomy, anatomy
from sparsight.model.load import check_device
from sparsight.model.skeleton import device_of
from sparsight.model.source import NO_PROCESSOR
from sparsight.model.stream import open_anatomy
from sparsight.progress import Progress
from sparsight.pruning.compose import Composition, check_processes, compose_spec, describe, policy_of
from sparsight.pruning.loop import check_finite, check_walk, prune
from sparsight.pruning.record import PruneRecord
from sparsight.pruning.way import open_way
from sparsight.pruning.work import SPARSER
from sparsight.specs import PlanSpec, PruneSpec


def check_prune(spec: PruneSpec, data: Any = True) -> tuple[Composition, Any]:
    """The way of pruning and the policy in settings.

    **Raises** `SparsightError` for contradictory settings, and for those that need `data` where there is none.
    """
    composition, policy = compose_spec(spec), policy_of(spec)
    find_policy(policy, data=data is not None)
    planned_budget(spec.pattern, spec.sparsity, policy)
    check_device(spec.device)
    if data is None and composition.needs:
        raise SparsightError(
            f"`data`: method {describe(spec)} needs calibration samples; give a JSONL file or a folder of them"
        )
    return composition, policy


def plan_model(
    model: Any, data: Any, spec: PlanSpec, *, processor: Any = None, progress: Progress | None = None
) -> PlannedModel:
    """Plan the zeros of a model in memory, a folder or a hub name; errors (`SparsightError`) as in `sparsight.plan`."""
    policy = "uniform" if spec.policy is None else spec.policy
    rule = find_policy(policy, data=data is not None)
    planned_budget(spec.pattern, spec.sparsity, policy)
    record = read_record(model) if isinstance(model, str | Path) else None
    family = family_of(record, spec.family)
    with enough_memory(spec), ExitStack() as stack:
        if not isinstance(model, str | Path):
            network, _, ready, _ = with_batches(model, data, spec, processor)
            body = anatomy(network, family)
        elif data is None:
            check_device(spec.device)
            network, ready, body = None, [], open_anatomy(model, family, dtype=spec.dtype)
        else:
            check_device(spec.device)
            samples = as_samples(data, spec)
            assert samples is not None
            way = open_way(model, family, dtype=spec.dtype, device=spec.device, whole=rule.whole)
            network, body = stack.enter_context(way.run()) or way.model, way.anatomy
            ready, _ = encode(samples, way.processor, network, spec)
        if rule.labels:
            check_labels(ready, "policy", name_of(policy))
        plan = plan_by(spec, policy, network, body, ready, progress)
        _warn_of_zeros(model, record, plan)
        return PlannedModel(body, plan)


def _warn_of_zeros(model: Any, record: Mapping[str, Any] | None, plan: Plan) -> None:
    """Say it where a model has more zeros on record than a plan asks for."""
    got = {name: entry["got"] for name, entry in (record or {"layers": {}})["layers"].items() if name in plan}
    if sparser := {name: had for name, had in got.items() if had > plan[name].sparsity + SPARSER}:
        most = max(sparser, key=lambda name: sparser[name])
        warnings.warn(
            f"{model}: is sparse already, and zeros stay zeros: {most} has {sparser[most]:.1%} and is planned at "
            f"{plan[most].sparsity:.1%}, {len(sparser)} layers in all; ask for more zeros, or start from the dense original",
            Notice,
            stacklevel=4,
        )


def prune_model(
    model: Any, data: Any, spec: PruneSpec, *, processor: Any = None, progress: Progress | None = None
) -> PruneRecord:
    """Prune a model in memory, in place; return the measurements and the plan.

    `data` holds batches of the user's own, or samples for the model's `processor`. **Raises** `SparsightError` as
    `sparsight.prune` does.
    """
    composition, policy = check_prune(spec, data)
    if spec.park != PruneSpec().park:
        raise SparsightError("`park`: puts files beside the output of a folder, and this model is in memory; leave it out")
    family = family_of(None, spec.family)
    with enough_memory(spec):
        _, _, ready, skipped = with_batches(model, data, spec, processor)
        check_labels_of(composition, policy, ready, spec)
        body = anatomy(model, family)
        check_walk(model, body, ready)
        plan = plan_by(spec, policy, model, body, ready, progress)
        record = prune(model, body, plan, ready, method=composition, seed=spec.seed, progress=progress)
    record.plan, record.method = record.pruned(plan), describe(spec)
    record.skipped_samples = skipped
    tell_trackers(spec, Path(), "prune", {"prune": spec.facts()}, record, body)
    return record


def prune_folder(
    model: str | Path,
    out: str | Path | None,
    spec: PruneSpec,
    *,
    data: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    loaded: tuple[Any, Any] | None = None,
) -> Record:
    """Prune the model of a folder or hub name and write it to another folder; `loaded` has model and processor already.

    **Raises** `SparsightError` as `sparsight.prune` does.
    """
    composition, policy = check_prune(spec, data)
    if out is None:
        raise SparsightError("`out`: is missing; give a folder to write")
    earlier = read_record(model)
    family = family_of(earlier, spec.family)
    target = check_output(out, overwrite, inputs=(model, data))
    distributed.init(spec.device)
    check_processes(composition, distributed.world_size())
    progress = progress if distributed.is_main() else None
    with ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(locked(target)))
        distributed.on_main(lambda: check_unfinished(target, resume, overwrite))  # before anything is computed
        stack.enter_context(enough_memory(spec))
        samples = None if data is None else read_with(data, spec, limit=spec.samples, seed=spec.seed)
        whole = "gradient" in composition.needs or find_policy(policy).whole
        way = open_way(model, family, dtype=spec.dtype, device=spec.device, whole=whole, loaded=loaded)
        network, processor, body = way.model, way.processor, way.anatomy
        stack.enter_context(way.run())
        ready: list[Batch] = []
        skipped, park = 0, None
        settings = {**spec.facts(), "policy": name_of(policy), "data": None if data is None else str(data)}
        settings |= {"whole": True} if way.files is None else {}
        if samples is not None:
            park = Park(target.parent, spec.park, -(-len(samples) // spec.batch_size))
            ready, skipped = encode(samples, processor, network, spec, park)
            settings["fingerprint"] = samples.fingerprint
        check_walk(network, body, ready, park)
        plan = distributed.on_main(lambda: plan_by(spec, policy, network, body, ready, progress))
        before = survey(body, plan, read_plan(earlier))
        ours = unfinished(target, {**settings, "files": source_of(model)}, resume=resume, overwrite=overwrite)
        folder = distributed.on_main(lambda: stack.enter_context(ours))
        stack.enter_context(enough_memory(spec))  # unfinished work says how to go on
        journal = way.journal(folder, composition)
        record = prune(
            network, body, plan, ready, method=composition, seed=spec.seed, journal=journal, progress=progress, park=park,
            finite=True,
        )  # fmt: skip
        journal.finish()
        record.skipped_samples, record.data = skipped, {} if samples is None else samples.facts
        read = {} if samples is None else {"fingerprint": samples.fingerprint}
        read |= {} if samples is None or not samples.split else {"split": samples.split}

        def write() -> Record:
            recipe = add_stage(read_recipe(model), "prune", spec, model=model, data=data, policy=name_of(policy), **read)
            written = Record(
                sparsity_record(
                    body,
                    {**before, **record.pruned(plan)},
                    base_model=(earlier or {}).get("base_model") or whole_name(model),
                    method=" + ".join([*([earlier["method"]] if earlier else []), describe(spec)]),
                    mask_only=composition.mask_only and (earlier or {}).get("mask_only", True),
                    family=family,
                ),
                {"prune": record.measured()},
                recipe,
            )
            with atomic_folder(target, overwrite) as new:
                write_model(network, processor, written, new, journal.files)
                tell_trackers(spec, new, target.name, recipe, record, body)
            return written

        written = distributed.on_main(write)
    distributed.barrier()
    return written


def tell_trackers(
    spec: PruneSpec, folder: Path, name: str, recipe: Mapping[str, Any], record: PruneRecord, body: Anatomy
) -> None:  # fmt: skip
    """Tell the trackers of `report_to` what was pruned; transformers' trainer is imported for them alone."""
    if spec.report_to:
        from sparsight.trackers import pruning_rows, report

        report(spec.report_to, folder, name, recipe, lambda: pruning_rows(record, body))


def survey(body: Anatomy, plan: Plan, recorded: Mapping[str, Pattern]) -> dict[str, Pattern]:
    """The patterns of the zeros that layers hold already: the recorded ones, where any zero is left, or what is counted.

    Reads every weight once. **Raises** `SparsightError` for NaN or infinity in a layer of the plan.
    """
    before = {}
    for layer in body.layers:
        W = layer.weight
        if layer.name in plan:
            check_finite(layer.name, W)
        zeros = count_zeros(W)
        if zeros and layer.name in recorded:
            before[layer.name] = recorded[layer.name]
        elif zeros >= SPARSE_FROM * W.numel():
            before[layer.name] = Pattern("tensor", zeros / W.numel())
    return before


def plan_by(
    spec: PlanSpec, policy: Any, model: Any, body: Anatomy, ready: Sequence[Batch], progress: Progress | None
) -> Plan:  # fmt: skip
    """The plan of settings; some policies measure the model on the batches first."""
    probe = Probe(model, body, ready, spec.seed, progress) if ready else None
    return make_plan(
        body, sparsity=spec.sparsity, pattern=spec.pattern, policy=policy, ignore=spec.ignore, probe=probe
    )  # fmt: skip


def with_batches(model: Any, data: Any, spec: PlanSpec, processor: Any = None) -> tuple[Any, Any, list[Batch], int]:
    """A model in memory, its processor, its calibration batches, and the number of samples left out.

    **Raises** `SparsightError` for invalid settings or data, and for samples without a processor.
    """
    check_device(spec.device)
    if data is None:
        return model, processor, [], 0
    samples = as_samples(data, spec)
    if samples is None:
        check_unused(data, spec)
        return model, processor, as_batches(model, data, limit=spec.samples), 0
    if processor is None:
        raise SparsightError(NO_PROCESSOR)
    ready, skipped = encode(samples, processor, model, spec)
    return model, processor, ready, skipped


def encode(
    samples: Samples, processor: Any, model: Any, spec: Any, park: Park | None = None
) -> tuple[list[Batch], int]:  # fmt: skip
    """Samples as batches on the model's device, and the number left out; `park` takes each batch as it is made."""
    encoder = Encoder(processor, model, max_length=spec.max_length, skip_bad=spec.skip_bad)
    device = device_of(model)
    usable = encoder.usable(samples)
    rehearse(model, encoder, usable)
    ready = []
    for batch in batches(usable, encoder, spec.batch_size):
        ready.append(batch.to(device))
        if park is not None:
            park.tensors([ready[-1].inputs, ready[-1].padding])
    return ready, len(samples.skipped) + len(encoder.skipped)


def check_labels_of(composition: Composition, policy: Any, ready: Sequence[Batch], spec: PruneSpec) -> None:
    """Refuse batches without labels for a method or a policy that needs them."""
    if "gradient" in composition.needs:
        check_labels(ready, "method", describe(spec))
    if find_policy(policy).labels:
        check_labels(ready, "policy", name_of(policy))
