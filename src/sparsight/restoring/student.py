"""Make the student: the sparse model with adapters, and its teacher, in as little memory as the method allows."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsight import distributed
from sparsight.calibration.rehearsal import rehearse
from sparsight.checkpoint.folder import family_of, plan_of_zeros, read_record
from sparsight.checks import check_name_of, parse_pairs
from sparsight.data import Encoder, batches
from sparsight.data.encoding import FIRST, select_answers
from sparsight.data.own_batches import OwnBatches
from sparsight.errors import SparsightError
from sparsight.masks.pattern import Pattern
from sparsight.memory import main_device
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.families import COMPONENTS, Family
from sparsight.model.source import ModelSource
from sparsight.progress import Progress
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.head import Head
from sparsight.restoring.peft_layers import AdapterTarget, add_adapters
from sparsight.restoring.refit import SAMPLES, refit
from sparsight.restoring.teacher import (
    Masks,
    Teacher,
    live_teacher,
    masked_hashes,
    pruned_too,
    read_masks,
    shared_teacher,
)
from sparsight.restoring.teacher_cache import TeacherCache, cache_key, check_rest, fill_cache
from sparsight.specs import RestoreSpec

DEFAULT_RANKS = {"vision": 4, "connector": 2, "language": 8}
PROBED = 32  # samples encoded to predict the size of a cache


def parse_ranks(rank: int | str | Mapping[str, int] | None) -> dict[str, int]:
    """Read a rank per component, `vision=4,connector=2,language=8`; a component that is not named keeps its default.

    A number alone is for all of them. **Raises** `SparsightError` for what is no rank.
    """
    if rank is None:
        return dict(DEFAULT_RANKS)
    if isinstance(rank, int) or (isinstance(rank, str) and rank.strip().lstrip("-").isdecimal()):
        pairs: Mapping[str, Any] = dict.fromkeys(COMPONENTS, int(rank))
    elif isinstance(rank, str):
        pairs = parse_pairs(rank, "rank", COMPONENTS, "vision=4,connector=2,language=8")
    else:
        pairs = dict(rank)
    ranks = dict(DEFAULT_RANKS)
    for component, value in pairs.items():
        check_name_of("component", "rank", component, COMPONENTS)
        least = 0 if component == "connector" else 1
        if not (str(value).isascii() and str(value).isdigit()) or int(value) < least:
            raise SparsightError(f"`rank`: {component}={value} is not a whole number of at least {least}")
        ranks[component] = int(value)
    return ranks


@dataclass(frozen=True)
class SparseFacts:
    """Facts of the sparse model, read before another model is loaded."""

    name: str
    processor: Any
    family: Family | None
    encoder: Any
    samples: list[Any]  # valid for the model, the held-out ones last
    held_out: int
    masks: Masks
    plan: dict[str, Pattern]  # the zeros of the sparse model
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype  # of most layers: a model may keep a few parameters in float32
    first: Mapping[str, Any]  # the inputs of one sample
    hashes: dict[str, str]  # of every parameter under its mask, where teacher and student may share a copy
    head_hash: str
    dense_bytes: int
    mask_bytes: int


@dataclass
class Student:
    """A sparse model with adapters, and everything needed to train them.

    `samples` are those that the model can take, the last `held_out` of them kept out of training. `weight_bytes` counts
    student and teacher together, adapters left out; `dense_bytes` one dense copy; `modes` the bytes of memory and, for a
    cache, of disk of each teacher mode. `weights` counts those of one dense copy.
    """

    wrapped: Any  # the PeftModel
    processor: Any
    anatomy: Anatomy
    masks: Masks
    plan: dict[str, Pattern]
    encoder: Any
    samples: list[Any]
    held_out: int
    head: Head
    teacher: Teacher | None = None
    teacher_head: Head | None = None
    cache: TeacherCache | None = None
    mode: str = "none"
    weight_bytes: int = 0
    dense_bytes: int = 0
    modes: dict[str, dict[str, int]] = field(default_factory=dict)
    refit_errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    family: Family | None = None
    weights: int = 0


def make_student(
    sparse: ModelSource | str | Path,
    teacher: ModelSource | str | Path | None,
    samples: Sequence[Any],
    held_out: Sequence[Any] = (),
    *,
    spec: RestoreSpec | None = None,
    cache: Path | None = None,
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Student:
    """Load the sparse model, read its masks from its zeros, put adapters on it, and set up the teacher.

    Pruned layers get the adapter that `spec` names, connector layers that were not pruned LoRA. `teacher` None trains
    without one. Where every kept weight equals the teacher's, the teacher's copy serves both; it is then the only one in
    memory. Else the teacher's hidden states go into the folder `cache`, under a hash of teacher, samples and `fingerprint`
    (that of the data). If the two output heads differ, the teacher is a second model.

    **Raises** `SparsightError` for a model without zeros, a teacher of another architecture or one that is pruned too, and
    a mode that is not possible.
    """
    spec = spec or RestoreSpec()
    sparse = sparse if isinstance(sparse, ModelSource) else ModelSource(sparse, device=spec.device)
    teacher = ModelSource(teacher, device=spec.device) if isinstance(teacher, str | Path) else teacher
    facts = inspect_sparse(sparse, samples, held_out, spec)
    if teacher is None:
        if spec.reconstruct:
            raise SparsightError("`reconstruct`: fits blocks to those of the dense model; name it with `teacher`")
        model = sparse.take(spec.dtype)
        head = Head(model)
        head.check(model, facts.first)
        return _build(facts, model, anatomy(model, facts.family), head, spec)
    sparse.drop()  # so that two models are in memory only where both are needed
    dense = teacher.get(facts.dtype)
    body = anatomy(dense, facts.family)
    _check_teacher(dense, body, facts, teacher.name)
    fresh = copy.deepcopy(dense) if spec.reconstruct and teacher.path is None else None
    head = Head(dense)
    head.check(dense, facts.first)
    modes, mode = {}, "none"
    if spec.needs_teacher:
        modes = possible_modes(facts, dense, body, head, spec, own_model=sparse.path is None)
        mode = choose_mode(spec.teacher_mode, modes, facts.name, teacher.name)
    if mode == "shared":
        student = _build(facts, teacher.take(facts.dtype), body, head, spec, mode, modes)
        student.teacher = shared_teacher(student.wrapped, head)
        return student
    stored, live = None, None
    if mode == "cached":
        facts = check_rest(facts)
        stored = _store(facts, dense, head, spec, cache, fingerprint, progress)
    if mode == "live":
        live = live_teacher(dense, head)
    else:
        head.remove()
    del dense, body
    teacher.drop()
    model = sparse.take(facts.dtype)
    errors: dict[str, tuple[float, float]] = {}
    if spec.reconstruct:
        base = fresh if fresh is not None else teacher.take(facts.dtype)
        errors = _refit(facts, base, model, spec, progress)
        if sparse.path is None:
            _copy_parameters(base, model)
        else:
            model = base
    student = _build(facts, model, anatomy(model, facts.family), Head(model, head.scale), spec, mode, modes)
    student.cache, student.refit_errors = stored, errors
    if live is not None:
        student.teacher, student.teacher_head = live, head
        student.weight_bytes += facts.dense_bytes
    return student


def inspect_sparse(
    source: ModelSource, samples: Sequence[Any], held_out: Sequence[Any], spec: RestoreSpec
) -> SparseFacts:  # fmt: skip
    """Read masks, hashes and sizes of the sparse model, which stays as it is, and choose the samples that it can take.

    **Raises** `SparsightError` for a model without zeros, and for ranks or samples that it cannot take.
    """
    own = samples if isinstance(samples, OwnBatches) else None
    processor = None if own else source.processor
    model = source.get(spec.dtype)
    record = read_record(source.path) if source.path is not None else None
    family = family_of(record, spec.family)
    body = anatomy(model, family)
    masks = read_masks(body, record["layers"] if record else ())
    if not any(body[name].zeros for name in masks):
        raise SparsightError(f"{source.name}: holds no zeros, so there is nothing to restore; give a pruned folder")
    _check_ranks(parse_ranks(spec.rank), spec.tune, body, masks)
    encoder: Any = own or Encoder(processor, model, max_length=spec.max_length, skip_bad=spec.skip_bad)
    held = encoder.usable(held_out) if held_out else []
    usable = [*encoder.usable(samples, FIRST), *held]
    if own is None:
        rehearse(model, encoder, usable)
    head = Head(model)
    masked = ADAPTERS[spec.adapter].masked
    facts = SparseFacts(
        name=source.name, processor=processor, family=family, encoder=encoder, samples=usable, held_out=len(held),
        masks=masks, plan=plan_of_zeros(body),
        shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        dtype=Counter(body[name].weight.dtype for name in masks).most_common(1)[0][0],
        first=encoder.encode(usable[:1]).to(main_device(spec.device)).inputs,
        hashes=masked_hashes(model, body, masks) if masked and not spec.reconstruct else {},
        head_hash=head.hash(), dense_bytes=_bytes(model),
        mask_bytes=sum(mask.numel() for mask in masks.values()) if masked else 0,
    )  # fmt: skip
    head.remove()
    return facts


def possible_modes(
    facts: SparseFacts, dense: Any, body: Anatomy, head: Head, spec: RestoreSpec, own_model: bool = False
) -> dict[str, dict[str, int]]:
    """The bytes of each possible teacher mode, the preferred one first; a student that is `own_model` shares no copy."""
    one = facts.dense_bytes + facts.mask_bytes
    modes: dict[str, dict[str, int]] = {}
    if facts.hashes and not own_model and masked_hashes(dense, body, facts.masks) == facts.hashes:
        modes["shared"] = {"memory": one}
    cacheable = head.hash() == facts.head_hash and spec.reduction != "paper"
    if cacheable and not isinstance(facts.encoder, OwnBatches):
        probed = facts.samples[:PROBED]
        labels = facts.encoder.encode(probed).inputs["labels"]
        tokens = len(select_answers(labels, labels, facts.encoder.shifted)[0]) / len(probed) * len(facts.samples)
        modes["cached"] = {"memory": one, "disk": round(tokens * head.weight.shape[1] * head.weight.element_size())}
    return modes | {"live": {"memory": one + facts.dense_bytes}}


def choose_mode(mode: str, modes: Mapping[str, Any], sparse: str, teacher: str) -> str:
    """Return `mode`, or for `auto` the first possible one.

    **Raises** `SparsightError` with the reason for a mode that is not possible.
    """
    if mode == "auto":
        return next(iter(modes))
    if mode not in modes:
        reasons = {
            "shared": f"the kept weights of {sparse} are not those of {teacher}, or are changed before training",
            "cached": f"{sparse} has another output head than {teacher}, or `reduction=paper` needs every position",
        }
        raise SparsightError(f"`teacher_mode`: {mode} cannot be: {reasons[mode]}; give {' or '.join(modes)}")
    return mode


def remaining_zeros(body: Anatomy, masks: Masks) -> dict[str, Pattern]:
    """The zeros that the pruned layers still hold; plain LoRA, merged, leaves about none."""
    layers = [layer for layer in body.layers if layer.name in masks]
    return {layer.name: Pattern("tensor", layer.zeros / layer.weight.numel()) for layer in layers}


def adapter_targets(body: Anatomy, masks: Masks, spec: RestoreSpec, *, shared: bool = False) -> list[AdapterTarget]:
    """The adapter of each layer: the spec's on pruned layers of the components `tune`, LoRA on the connector's others.

    `shared`: the weights below are dense, so pruned layers that are not trained are masked, too. **Raises**
    `SparsightError` where nothing is left to train.
    """
    ranks, masked = parse_ranks(spec.rank), ADAPTERS[spec.adapter].masked
    targets = []
    for layer in body.layers:
        keep = masks.get(layer.name) if masked else None
        if layer.component in spec.tune and (layer.name in masks or layer.component == "connector"):
            if ranks[layer.component]:
                adapter = spec.adapter if keep is not None or not masked else "sparselora"
                targets.append(AdapterTarget(layer, ranks[layer.component], keep, adapter))
        elif keep is not None and shared:
            targets.append(AdapterTarget(layer, 1, keep, "frozen"))
    if not any(target.adapter != "frozen" for target in targets):
        raise SparsightError(f"`tune`: {', '.join(spec.tune)} has no layer to train; name a component that was pruned")
    return targets


def _build(
    facts: SparseFacts, model: Any, body: Anatomy, head: Head, spec: RestoreSpec, mode: str = "none",
    modes: dict[str, dict[str, int]] | None = None,
) -> Student:  # fmt: skip
    """Put the adapters on `model`, in place."""
    targets = adapter_targets(body, facts.masks, spec, shared=mode == "shared")
    wrapped = add_adapters(model, targets, alpha=spec.alpha, seed=spec.seed)
    return Student(
        wrapped, facts.processor, body, facts.masks, facts.plan, facts.encoder, facts.samples, facts.held_out, head,
        mode=mode, modes=modes or {}, weight_bytes=facts.dense_bytes + facts.mask_bytes, dense_bytes=facts.dense_bytes,
        family=facts.family, weights=sum(map(math.prod, facts.shapes.values())),
    )  # fmt: skip


def _store(
    facts: SparseFacts, dense: Any, head: Head, spec: RestoreSpec, cache: Path | None, fingerprint: str,
    progress: Progress | None,
) -> TeacherCache:  # fmt: skip
    """Write the teacher's hidden states to disk, unless they are there."""
    if cache is None:
        raise SparsightError("`teacher_cache`: names no folder for the teacher's hidden states")
    folder = cache / distributed.on_main(lambda: cache_key(dense, facts.encoder, facts.samples, fingerprint))
    fill_cache(
        folder, dense, head, facts.samples, facts.encoder, spec.rows, device=main_device(spec.device), progress=progress
    )  # fmt: skip
    return TeacherCache(folder)


def _refit(
    facts: SparseFacts, dense: Any, sparse: Any, spec: RestoreSpec, progress: Progress | None
) -> dict[str, tuple[float, float]]:
    """Turn `dense` into `sparse` with its kept weights fitted, in place, on training samples."""
    learned = facts.samples[: len(facts.samples) - facts.held_out][:SAMPLES]
    ready = learned if isinstance(facts.encoder, OwnBatches) else list(batches(learned, facts.encoder, 8))
    done = refit(
        dense, anatomy(dense, facts.family), sparse, anatomy(sparse, facts.family), list(facts.masks),
        [batch.to(main_device(spec.device)) for batch in ready], spec.reconstruct, seed=spec.seed, progress=progress,
    )  # fmt: skip
    return done.reconstructed


@torch.no_grad()
def _copy_parameters(source: Any, target: Any) -> None:
    for p, q in zip(target.parameters(), source.parameters(), strict=True):
        p.copy_(q)


def _check_ranks(ranks: Mapping[str, int], tune: Sequence[str], body: Anatomy, masks: Masks) -> None:
    for layer in body.layers:
        if layer.name in masks and layer.component in tune and ranks[layer.component] < 1:
            raise SparsightError(
                f"`rank`: {layer.name} is pruned and its rank is {ranks[layer.component]}; give its component at least 1"
            )


def _check_teacher(dense: Any, body: Anatomy, facts: SparseFacts, teacher: str) -> None:
    if {name: tuple(p.shape) for name, p in dense.named_parameters()} != facts.shapes:
        raise SparsightError(f"`teacher`: {teacher} is not the same architecture as {facts.name}; give its dense original")
    if pruned_too(body, facts.masks):
        raise SparsightError(f"`teacher`: {teacher} is itself pruned where {facts.name} is; give its dense original")


def _bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(tensors.values())
