"""One tiny model of a type through every step, in memory and on disk: what was found, pruned, restored and verified."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM

import sparsight
from sparsight.calibration.lockstep import lockstep
from sparsight.model.anatomy import Anatomy, anatomy
from sparsight.model.load import quiet

import tiny

STEPS = ("walk", "prune", "2:4", "lora", "restore", "save", "reload")


@dataclass
class Row:
    """What happened to one type: `done` has the steps that succeeded, `failed` the first that did not, and why."""

    kind: str
    body: Anatomy | None = None
    done: list[str] = field(default_factory=list)
    failed: tuple[str, str] | None = None


def walk_through(kind: str, folder: Path) -> Row:
    """Take the model of a type through every step, and stop at the first that fails."""
    row = Row(kind)
    model = tiny.build(kind)
    ready = tiny.batches(model)
    row.body = anatomy(model)
    pruned = copy.deepcopy(model)
    steps: dict[str, Callable[[], Any]] = {
        "walk": lambda: walk(model, row.body, ready),
        "prune": lambda: prune(pruned, model, ready),
        "2:4": lambda: prune(copy.deepcopy(model), model, ready, pattern="2:4"),
        "lora": lambda: train(copy.deepcopy(pruned), ready),
        "restore": lambda: restore(copy.deepcopy(pruned), model, ready),
        "save": lambda: save(pruned, folder),
        "reload": lambda: reload(pruned, ready, folder),
    }
    for name, step in steps.items():
        try:
            step()
        except Exception as error:  # the row says which
            row.failed = name, f"{type(error).__name__}: {' '.join(str(error).split())}"
            return row
        row.done.append(name)
    return row


@torch.no_grad()
def logits(model: Any, batch: Any) -> torch.Tensor:
    """The logits of a plain forward."""
    torch.manual_seed(0)
    return model(**batch).logits


def walk(model: Any, body: Any, ready: Any) -> None:
    """The logits of a walk, every block run twice, are those of a plain forward, bit for bit."""
    outputs: dict[int, torch.Tensor] = {}

    def visit(name: str, block: Any, calls: Any) -> None:
        for call in calls.values():
            call()

    blocks = [(block.name, block.module) for block in body.blocks]
    for i, batch in enumerate(ready):
        torch.manual_seed(0)
        lockstep(model, blocks, {i: batch}, visit, on_output=lambda i, y: outputs.__setitem__(i, y.logits))
        assert torch.equal(outputs[i], logits(model, batch)), f"batch {i}: other logits than a plain forward"


def prune(model: Any, dense: Any, ready: Any, **settings: Any) -> None:
    """Half of every layer is zero, as planned, and nothing else has changed."""
    record = sparsight.prune(model, ready, **settings)
    assert sparsight.verify(model, against=record)["differences"] == {}
    body, names = anatomy(model), set()
    for layer in body.layers:
        if layer.name in record.plan:
            assert abs(float((layer.weight == 0).float().mean()) - 0.5) < 0.05, layer.name
            names.add(id(layer.parameter))
    planned = {layer.name for layer in body.layers if layer.component != "connector"}
    assert planned == {*record.plan, *record.unreached}
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        same = torch.equal(p, q)
        assert same or id(p) in names, f"{name} has changed"


def train(model: Any, ready: Any) -> None:
    """Two steps of a plain loop change the factors, and the merge keeps every zero."""
    zeros = {layer.name: layer.weight == 0 for layer in anatomy(model).layers}
    before = {layer.name: layer.weight.clone() for layer in anatomy(model).layers}
    wrapped = sparsight.sparse_lora(model, rank=2)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for batch in ready[:2]:
        output = wrapped(**batch)
        loss = output.logits.float().square().mean() if output.loss is None else output.loss
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = sparsight.merge(wrapped)
    changed = 0
    for layer in anatomy(merged).layers:
        sparse = bool(zeros[layer.name].any())
        assert not sparse or not bool((layer.weight[zeros[layer.name]] != 0).any()), layer.name
        changed += not torch.equal(layer.weight, before[layer.name])
    assert changed > 0


def restore(model: Any, dense: Any, ready: Any) -> None:
    """SparseLoRA with distillation from the dense model keeps every zero."""
    zeros = {layer.name: layer.weight == 0 for layer in anatomy(model).layers}
    sparsight.restore(model, ready, teacher=dense, steps=2, lr=1e-3, rank=2)
    for layer in anatomy(model).layers:
        assert not bool((layer.weight[zeros[layer.name]] != 0).any()) or not bool(zeros[layer.name].any()), layer.name


def save(model: Any, folder: Path) -> None:
    """The folder holds what its record says."""
    sparsight.save(model, folder)
    assert sparsight.verify(folder)["differences"] == {}


def reload(model: Any, ready: Any, folder: Path) -> None:
    """Stock transformers loads the folder, and its logits are those of the model in memory."""
    with quiet():
        loaded = AutoModelForMultimodalLM.from_pretrained(folder).eval()
    expected = logits(model, ready[0])  # products of other memory may round otherwise
    torch.testing.assert_close(logits(loaded, ready[0]), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
