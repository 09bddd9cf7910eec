"""Make the student: the sparse model with adapters, and its teacher, in as little memory as the method allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy
from sparsight.model.checkpoint import read_anatomy, read_record
from sparsight.model.load import load
from sparsight.plan.budget import nearest
from sparsight.restore.sparse_lora import add_adapters
from sparsight.restore.teacher import Masks, Teacher, live_teacher, masked_hashes, read_masks, shared_teacher

ADAPTERS = ("sparselora", "lora")
DEFAULT_RANKS = {"vision": 4, "connector": 2, "language": 8}


@dataclass
class Student:
    wrapped: Any  # the PeftModel
    processor: Any
    anatomy: Anatomy
    masks: Masks
    teacher: Teacher | None
    mode: str  # "shared", "live" or "none"
    weight_bytes: int  # student and teacher together, adapters left out
    dense_bytes: int  # one dense copy


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
) -> Student:
    """Load the sparse model, find its masks in its zeros, put adapters on it, and arrange for the teacher.

    Pruned layers get SparseLoRA (or plain LoRA with `adapter="lora"`, whose merge is dense), connector layers that were
    not pruned get plain LoRA. `teacher` None trains without one. Where every kept weight equals the teacher's, the
    teacher's copy serves both; it is then the only one in memory.
    """
    rank = {**DEFAULT_RANKS, **(ranks or {})}
    record = read_record(sparse)
    model, processor = load(sparse, dtype=dtype, device=device)
    body = read_anatomy(model, record)
    masks = read_masks(body, set(record["layers"]) if record else None)
    if not any((layer.weight == 0).any() for layer in body.layers if layer.name in masks):
        raise SparsightError(f"{sparse}: holds no zeros, so there is nothing to restore; give a pruned folder")
    mode, teach, second = "none", None, 0
    kind = next(model.parameters()).dtype
    if teacher is not None:
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        shareable = masked_hashes(model, masks) if adapter == "sparselora" else {}
        del model, body
        dense, _ = load(teacher, dtype=kind, device=device)
        if {name: tuple(p.shape) for name, p in dense.named_parameters()} != shapes:
            raise SparsightError(f"--teacher: {teacher} is not the same architecture as {sparse}; give its dense original")
        if shareable and masked_hashes(dense, masks) == shareable:
            mode, model = "shared", dense
        else:
            mode, teach, second = "live", live_teacher(dense), _bytes(dense)
            model, _ = load(sparse, dtype=kind, device=device)
        body = read_anatomy(model, record)
    dense_bytes = _bytes(model)
    layers = {
        layer.name: (rank[layer.component], masks.get(layer.name) if adapter == "sparselora" else None)
        for layer in body.layers
        if layer.name in masks or layer.component == "connector"
    }
    for name, (r, _) in layers.items():
        if name in masks and r < 1:
            raise SparsightError(f"--rank: {name} is pruned and its rank is {r}; give its component a rank of at least 1")
    wrapped = add_adapters(model, {n: v for n, v in layers.items() if v[0]}, alpha=alpha, seed=seed)
    if mode == "shared":
        teach = shared_teacher(wrapped)
    packed = sum(m.numel() for m in masks.values()) if adapter == "sparselora" else 0
    return Student(wrapped, processor, body, masks, teach, mode, dense_bytes + second + packed, dense_bytes)


def _bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(tensors.values())
