"""Make the student: the sparse model with adapters, and its teacher, in as little memory as the method allows."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsight import processes
from sparsight.data import Encoder, batches
from sparsight.data.encoding import answers_of
from sparsight.errors import SparsightError
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.checkpoint import found_plan, read_record, recorded_family
from sparsight.model.families import COMPONENTS, Family
from sparsight.model.load import load_model, load_processor
from sparsight.plan.budget import nearest
from sparsight.plan.pattern import Pattern
from sparsight.restore.cache import Cache, cache_key, fill
from sparsight.restore.head import Head
from sparsight.restore.refit import SAMPLES, refit
from sparsight.restore.sparse_lora import PLAIN, Adapted, add_adapters
from sparsight.restore.teacher import (
    MODES,
    Masks,
    Teacher,
    live_teacher,
    masked_hashes,
    pruned_too,
    read_masks,
    shared_teacher,
)

# what --adapter names, and what form a pruned layer takes; plain LoRA's has no mask, so its merge is dense
ADAPTERS = {
    "sparselora": "sparselora",
    "sparselora-fast": "sparselora-fast",
    "hira": "hira",
    "masked-full": "full",
    "lora": "",
}
DEFAULT_RANKS = {"vision": 4, "connector": 2, "language": 8}
PROBED = 32  # samples encoded to foretell the size of a cache

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tuning:
    """What is trained, on which components, and beside what kind of teacher."""

    adapter: str = "sparselora"
    ranks: Mapping[str, int] = field(default_factory=dict)
    alpha: float = 16
    tune: tuple[str, ...] = COMPONENTS
    teacher_mode: str = "auto"
    reconstruct: int = 0

    def check(self) -> None:
        """Refuse values that make no sense, by the option's name."""
        if self.adapter not in ADAPTERS:
            raise SparsightError(f"--adapter: unknown adapter {self.adapter!r}; {nearest(self.adapter, tuple(ADAPTERS))}")
        if self.teacher_mode not in MODES:
            raise SparsightError(f"--teacher-mode: unknown mode {self.teacher_mode!r}; {nearest(self.teacher_mode, MODES)}")
        for component in self.tune:
            if component not in COMPONENTS:
                raise SparsightError(f"--tune: unknown component {component!r}; {nearest(component, COMPONENTS)}")
        if not self.tune:
            raise SparsightError(f"--tune: names no component; give some of {', '.join(COMPONENTS)}")
        if isinstance(self.reconstruct, bool) or not isinstance(self.reconstruct, int) or self.reconstruct < 0:
            raise SparsightError(f"--reconstruct: {self.reconstruct!r} is not a number of epochs, 0 or more")

    @property
    def masked(self) -> bool:
        """Whether every zero survives the merge."""
        return bool(ADAPTERS[self.adapter])


@dataclass
class Student:
    """A sparse model ready to be trained, with what is needed to train it.

    `samples` are those that the model can take, the last `held_out` of them kept out of training. `weight_bytes` counts
    student and teacher together, adapters left out; `dense_bytes` one dense copy; `modes` what each way of holding the
    teacher would take, in bytes of memory and, for a cache, of disk.
    """

    wrapped: Any  # the PeftModel
    processor: Any
    anatomy: Anatomy
    masks: Masks
    plan: dict[str, Pattern]  # the zeros found in the sparse model
    encoder: Encoder
    samples: list[Any]
    held_out: int
    head: Head
    teacher: Teacher | None = None
    teacher_head: Head | None = None
    cache: Cache | None = None
    mode: str = "none"
    weight_bytes: int = 0
    dense_bytes: int = 0
    modes: dict[str, dict[str, int]] = field(default_factory=dict)
    refitted: dict[str, tuple[float, float]] = field(default_factory=dict)


def make_student(
    sparse: str | Path,
    teacher: str | Path | None,
    samples: Sequence[Any],
    held_out: Sequence[Any] = (),
    *,
    tuning: Tuning | None = None,
    cache: Path | None = None,
    fingerprint: str = "",
    distil: bool = True,
    every_position: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    dtype: Any = "auto",
    device: str = "cpu",
    family: Family | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Student:
    """Load the sparse model, find its masks in its zeros, put adapters on it, and arrange for the teacher.

    Pruned layers get the adapter that `tuning` names, connector layers that were not pruned LoRA. `teacher` None trains
    without one; with `distil` false it is there for reconstruction only. Where every kept weight equals the teacher's, the
    teacher's copy serves both; it is then the only one in memory. Else the teacher's hidden states go into the folder
    `cache`, below a name that says what they are of (`fingerprint` tells the data apart), unless its output head is not
    the student's: that takes a second model. `every_position` says that the loss needs the teacher at every position,
    which no cache has.
    """
    tuning, known = tuning or Tuning(), family or recorded_family(read_record(sparse))
    student, model = _opened(sparse, samples, held_out, tuning, dtype, device, known, skip_bad)
    first = student.encoder.encode(student.samples[:1]).to(device).inputs
    if teacher is None:
        if tuning.reconstruct:
            raise SparsightError("--reconstruct: fits blocks to those of the dense model; name it with --teacher")
        student.head.check(model, first)
        return _finish(student, model, student.anatomy, tuning, seed)
    # the dtype of most layers: a model may keep a few parameters in float32
    kind = Counter(student.anatomy[name].weight.dtype for name in student.masks).most_common(1)[0][0]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    may_share = tuning.masked and not tuning.reconstruct
    hashes = masked_hashes(model, student.anatomy, student.masks) if may_share else {}
    own_head = student.head.hash()
    del model, student.head, student.anatomy  # so that no two models are in memory unless they have to
    gc.collect()  # a model points at itself
    dense = load_model(teacher, dtype=kind, device=device)
    body = anatomy(dense, known)
    _check_teacher(dense, body, shapes, student.masks, teacher, sparse)
    head = Head(dense)
    head.check(dense, first)
    if distil:
        shareable = bool(hashes) and masked_hashes(dense, body, student.masks) == hashes
        student.modes = _modes(student, head, shareable, head.hash() == own_head and not every_position)
        student.mode = _choose(tuning.teacher_mode, student.modes, sparse, teacher)
    if student.mode == "shared":
        student.head = head
        _finish(student, dense, body, tuning, seed)
        student.teacher = shared_teacher(student.wrapped, head)
        return student
    if student.mode == "cached":
        if cache is None:
            raise SparsightError("--teacher-cache: names no folder for what the teacher says")
        folder = cache / processes.by_main(lambda: cache_key(dense, student.encoder, student.samples, fingerprint))
        fill(folder, dense, head, student.samples, student.encoder, batch_size, device=device, progress=progress)
        student.cache = Cache(folder)
    if student.mode == "live":
        student.teacher, student.teacher_head = live_teacher(dense, head), head
        student.weight_bytes += student.dense_bytes
        dense = load_model(teacher, dtype=kind, device=device) if tuning.reconstruct else None
    elif not tuning.reconstruct:
        dense = None
    del body, head
    gc.collect()
    model = load_model(sparse, dtype=kind, device=device)
    if tuning.reconstruct:
        _refit(student, dense, model, tuning.reconstruct, seed, device, known, progress)
        model = dense
    student.head = Head(model)
    return _finish(student, model, anatomy(model, known), tuning, seed)


def _opened(
    sparse: str | Path,
    samples: Sequence[Any],
    held_out: Sequence[Any],
    tuning: Tuning,
    dtype: Any,
    device: str,
    family: Family | None,
    skip_bad: bool,
) -> tuple[Student, Any]:
    """The sparse model, and a student that is not wrapped yet."""
    processor = load_processor(sparse)
    model = load_model(sparse, dtype=dtype, device=device)
    record, body = read_record(sparse), anatomy(model, family)
    masks = read_masks(body, record["layers"] if record else ())
    if not any((body[name].weight == 0).any() for name in masks):
        raise SparsightError(f"{sparse}: holds no zeros, so there is nothing to restore; give a pruned folder")
    _check_ranks(tuning, body, masks)
    encoder = Encoder(processor, model, skip_bad=skip_bad)
    kept = encoder.usable(held_out) if held_out else []
    usable = [*encoder.usable(samples), *kept]
    size, packed = _bytes(model), sum(mask.numel() for mask in masks.values()) if tuning.masked else 0
    student = Student(
        None, processor, body, masks, found_plan(body), encoder, usable, len(kept), Head(model),
        weight_bytes=size + packed, dense_bytes=size,
    )  # fmt: skip
    return student, model


def _refit(
    student: Student,
    dense: Any,
    sparse: Any,
    epochs: int,
    seed: int,
    device: str,
    family: Family | None,
    progress: Progress | None,
) -> None:
    """Turn `dense` into `sparse` with its kept weights fitted, in place, on samples that are trained on."""
    learned = student.samples[: len(student.samples) - student.held_out][:SAMPLES]
    ready = [batch.to(device) for batch in batches(learned, student.encoder, 8)]
    done = refit(
        dense, anatomy(dense, family), sparse, anatomy(sparse, family), list(student.masks), ready, epochs, seed=seed,
        progress=progress,
    )  # fmt: skip
    student.refitted = done.reconstructed


def zeros_left(student: Student) -> dict[str, Pattern]:
    """The zeros that the pruned layers still hold; plain LoRA, merged, leaves about none."""
    layers = [layer for layer in student.anatomy.layers if layer.name in student.masks]
    return {layer.name: Pattern("tensor", int((layer.weight == 0).sum()) / layer.weight.numel()) for layer in layers}


def _finish(student: Student, model: Any, body: Anatomy, tuning: Tuning, seed: int) -> Student:
    """Put the adapters on."""
    rank, form = {**DEFAULT_RANKS, **tuning.ranks}, ADAPTERS[tuning.adapter]
    chosen = []
    for layer in body.layers:
        keep = student.masks.get(layer.name) if form else None
        if layer.component in tuning.tune and (layer.name in student.masks or layer.component == "connector"):
            if rank[layer.component]:
                kind = PLAIN if not form else form if keep is not None else "sparselora"
                chosen.append(Adapted(layer, rank[layer.component], keep, kind))
        elif keep is not None and student.mode == "shared":  # the weights below are dense
            chosen.append(Adapted(layer, 1, keep, "mask"))
    if not any(adapted.form != "mask" for adapted in chosen):
        raise SparsightError(f"--tune: {', '.join(tuning.tune)} has no layer to train; name a component that was pruned")
    student.anatomy = body
    student.wrapped = add_adapters(model, chosen, alpha=tuning.alpha, seed=seed)
    return student


def _check_ranks(tuning: Tuning, body: Anatomy, masks: Masks) -> None:
    rank = {**DEFAULT_RANKS, **tuning.ranks}
    for layer in body.layers:
        if layer.name in masks and layer.component in tuning.tune and rank[layer.component] < 1:
            raise SparsightError(
                f"--rank: {layer.name} is pruned and its rank is {rank[layer.component]}; give its component at least 1"
            )


def _check_teacher(
    dense: Any, body: Anatomy, shapes: Mapping[str, Any], masks: Masks, teacher: str | Path, sparse: str | Path
) -> None:
    if {name: tuple(p.shape) for name, p in dense.named_parameters()} != shapes:
        raise SparsightError(f"--teacher: {teacher} is not the same architecture as {sparse}; give its dense original")
    if pruned_too(body, masks):
        raise SparsightError(f"--teacher: {teacher} is itself pruned where {sparse} is; give its dense original")


def _modes(student: Student, head: Head, shareable: bool, cacheable: bool) -> dict[str, dict[str, int]]:
    """What each mode that is possible would take, in bytes."""
    one = student.weight_bytes
    modes = {"shared": {"memory": one}} if shareable else {}
    if cacheable:
        probed = student.samples[:PROBED]
        labels = student.encoder.encode(probed).inputs["labels"]
        tokens = len(answers_of(labels, labels, student.encoder.shifted)[0]) / len(probed) * len(student.samples)
        modes["cached"] = {"memory": one, "disk": round(tokens * head.weight.shape[1] * head.weight.element_size())}
    return modes | {"live": {"memory": one + student.dense_bytes}}


def _choose(asked: str, modes: Mapping[str, Any], sparse: str | Path, teacher: str | Path) -> str:
    if asked == "auto":
        return next(iter(modes))
    if asked not in modes:
        reasons = {
            "shared": f"the kept weights of {sparse} are not those of {teacher}, or are changed before training",
            "cached": f"{sparse} has another output head than {teacher}, or --reduction paper wants every position",
        }
        raise SparsightError(f"--teacher-mode: {asked} cannot be: {reasons[asked]}; give {' or '.join(modes)}")
    return asked


def _bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(tensors.values())
