"""Make the student: the sparse model with adapters, and its teacher, in as little memory as the method allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.checkpoint import found_plan, read_record, recorded_family
from sparsight.model.families import Family
from sparsight.model.load import load_model, load_processor
from sparsight.plan.budget import nearest
from sparsight.plan.pattern import Pattern
from sparsight.restore.sparse_lora import add_adapters
from sparsight.restore.teacher import (
    Masks,
    Teacher,
    live_teacher,
    masked_hashes,
    pruned_too,
    read_masks,
    shared_teacher,
)

ADAPTERS = ("sparselora", "lora")
DEFAULT_RANKS = {"vision": 4, "connector": 2, "language": 8}


@dataclass
class Student:
    """`weight_bytes` counts student and teacher together, adapters left out; `dense_bytes` one dense copy."""

    wrapped: Any  # the PeftModel
    processor: Any
    anatomy: Anatomy
    masks: Masks
    plan: dict[str, Pattern]  # the zeros found in the sparse model
    teacher: Teacher | None
    mode: str  # "shared", "live" or "none"
    weight_bytes: int
    dense_bytes: int


def check_adapter(adapter: str) -> None:
    if adapter not in ADAPTERS:
        raise SparsightError(f"--adapter: unknown adapter {adapter!r}; {nearest(adapter, ADAPTERS)}")


def make_student(
    sparse: str | Path,
    teacher: str | Path | None,
    *,
    adapter: str = "sparselora",
    ranks: Mapping[str, int] | None = None,
    alpha: float = 16,
    seed: int = 0,
    dtype: Any = "auto",
    device: str = "cpu",
    family: Family | None = None,
) -> Student:
    """Load the sparse model, find its masks in its zeros, put adapters on it, and arrange for the teacher.

    Pruned layers get SparseLoRA (or plain LoRA with `adapter="lora"`, whose merge is dense), connector layers that were
    not pruned get plain LoRA. `teacher` None trains without one. Where every kept weight equals the teacher's, the
    teacher's copy serves both; it is then the only one in memory.
    """
    rank = {**DEFAULT_RANKS, **(ranks or {})}
    processor = load_processor(sparse)
    model = load_model(sparse, dtype=dtype, device=device)
    record = read_record(sparse)
    body = anatomy(model, family or recorded_family(record))
    masks, plan = read_masks(body, record["layers"] if record else ()), found_plan(body)
    if not any((body[name].weight == 0).any() for name in masks):
        raise SparsightError(f"{sparse}: holds no zeros, so there is nothing to restore; give a pruned folder")
    chosen = {
        layer.name: (rank[layer.component], masks.get(layer.name) if adapter == "sparselora" else None)
        for layer in body.layers
        if layer.name in masks or layer.component == "connector"
    }
    for name, (r, _) in chosen.items():
        if name in masks and r < 1:
            raise SparsightError(f"--rank: {name} is pruned and its rank is {r}; give its component a rank of at least 1")
    mode, teach, second = "none", None, 0
    if teacher is not None:
        # the dtype of most layers: a model may keep a few parameters in float32
        kind = Counter(body[name].weight.dtype for name in masks).most_common(1)[0][0]
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        shareable = masked_hashes(model, masks) if adapter == "sparselora" else {}
        del model, body
        dense = load_model(teacher, dtype=kind, device=device)
        if {name: tuple(p.shape) for name, p in dense.named_parameters()} != shapes:
            raise SparsightError(f"--teacher: {teacher} is not the same architecture as {sparse}; give its dense original")
        if pruned_too(dense, masks):
            raise SparsightError(f"--teacher: {teacher} is itself pruned where {sparse} is; give its dense original")
        if shareable and masked_hashes(dense, masks) == shareable:
            mode, model = "shared", dense
        else:
            mode, teach, second = "live", live_teacher(dense), _bytes(dense)
            model = load_model(sparse, dtype=kind, device=device)
        body = anatomy(model, family or recorded_family(record))
    dense_bytes = _bytes(model)
    wrapped = add_adapters(model, {n: v for n, v in chosen.items() if v[0]}, alpha=alpha, seed=seed)
    if mode == "shared":
        teach = shared_teacher(wrapped)
    packed = sum(m.numel() for m in masks.values()) if adapter == "sparselora" else 0
    return Student(wrapped, processor, body, masks, plan, teach, mode, dense_bytes + second + packed, dense_bytes)


def zeros_left(student: Student) -> dict[str, Pattern]:
    """The zeros that the pruned layers still hold; plain LoRA, merged, leaves about none."""
    layers = [layer for layer in student.anatomy.layers if layer.name in student.masks]
    return {layer.name: Pattern("tensor", int((layer.weight == 0).sum()) / layer.weight.numel()) for layer in layers}


def _bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(tensors.values())
