"""Prunes that are alike on one process and on several; also the program that the several run, as many prunes in one group
of processes as can be, since to start one takes seconds: `torchrun ... tests/many.py FOLDER NAME ...`.

FOLDER has the models by name, `data`, `mixed` (some samples have no image) and `texts` (none has); what is
written goes to FOLDER/COUNT/NAME.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# isort: off
import zoo  # noqa: F401  before transformers
import torch
from sparsight import SparsightError
from sparsight import distributed
from sparsight import api
from sparsight.calibration.tokens import TokenRule
# isort: on

FEW = {"samples": 10, "batch_size": 2}  # five batches: the last turn of two or three processes is not full
TEXT = {"data": "mixed", "samples": 12, "batch_size": 1}  # some batches go past the vision tower
JOBS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (model, settings)
    "wanda": ("llava", {"pattern": "2:4"}),
    "one batch": ("llava", {"sparsity": 0.6, "samples": 2}),
    "sparsegpt": ("llava", {"method": "sparsegpt", "sparsity": 0.6}),
    "sparsegpt text": ("llava", {"method": "sparsegpt", "sparsity": 0.6, **TEXT}),
    "wanda text stage": ("llava", {"sparsity": 0.6, "propagate": "layer", **TEXT}),
    "no pictures": ("llava", {"method": "sparsegpt", "sparsity": "language=0.6", **FEW, "data": "texts"}),
    "sparsegpt bfloat16": ("llava", {"method": "sparsegpt", "pattern": "4:8", "dtype": "bfloat16"}),
    "swaps pcg": ("llava", {"refine": "swaps", "update": "pcg", "sparsity": 0.6}),
    "alps dense": ("llava", {"method": "alps", "sparsity": 0.6, "propagate": "dense"}),
    "dense targets": ("llava", {"method": "alps", "dense_targets": True, "sparsity": 0.6, **TEXT}),
    "sparsegpt stage": ("llava", {"method": "sparsegpt", "sparsity": 0.6, "propagate": "layer"}),
    "dsnot stage": ("instructblip-t5", {"method": "dsnot", "sparsity": 0.6, "propagate": "layer"}),
    "ria balanced": ("instructblip-t5", {"method": "ria", "pattern": "tensor", "sparsity": 0.6, "tokens": "balanced"}),
    "fisher atv": ("llava", {"method": "fisher", "update": "pcg", "sparsity": 0.6, "tokens": "atv"}),
    "owl": ("llava", {"method": "owl", "sparsity": 0.6}),
    "random": ("llava", {"method": "random", "data": None}),
    "experts sparsegpt": ("qwen3-vl-moe", {"method": "sparsegpt", "sparsity": 0.6}),
    "experts of few tokens": ("qwen3-vl-moe", {"sparsity": 0.6, **TEXT, "samples": 3}),
    "tamp": ("llava", {"sparsity": 0.6, "tokens": "tamp"}),
}


def work(folder: Path, names: list[str]) -> None:
    for name in names:
        model, how = JOBS[name]
        out = folder / str(distributed.world_size()) / name
        settings = {"data": "data", **FEW, **how}
        settings["data"] = settings["data"] and folder / settings["data"]
        api.prune(folder / model, out, **settings, resume=unfinished(out).exists())


def unfinished(out: Path) -> Path:
    return out.with_name(f"{out.name}.unfinished")


def errors(folder: Path) -> dict[str, str]:
    """What is said of settings that are refused, of a method that goes wrong in one layer, of a rule that does."""

    def broken(W, moments, pattern, generator):
        return W.masked_fill(~pattern.keep(W.abs()), 0) if W.shape != (96, 48) else W  # MLPs

    def no_number(counts):
        return {"text": float("nan")}

    ways: dict[str, dict[str, Any]] = {
        "method": {"method": broken},
        "tokens": {"tokens": no_number},
        "select": {"tokens": TokenRule(select=lambda flows: [])},
        "resume": {"resume": True},
    }
    if distributed.world_size() > 1:
        ways |= {"reconstruct": {"reconstruct": 1}, "permute": {"permute": True, "pattern": "2:4"}}
    said = {}
    for name, how in ways.items():
        try:
            api.prune(folder / "llava", folder / f"error-{name}", data=folder / "data", overwrite=True, **FEW, **how)
        except SparsightError as error:
            said[name] = error.args[0]  # without its advice, which the main process alone adds
    return said


def letter(rank: int) -> dict[str, Any]:
    """Of every form that a tensor can have, and what is no tensor."""
    g = torch.Generator().manual_seed(rank)
    X = torch.randn(3 + rank, 5, generator=g)
    tensors = [X, X.T, X[:, 1], X > 0, X.bfloat16(), X[:0], X.sum(), torch.randn(600, 700, generator=g), torch.arange(rank)]
    return {"tensors": tensors, "rank": rank, "line": SparsightError(f"{rank}")}


def check_letters() -> None:
    """Every process has what every other sent, bit for bit; what the main one does alone, it does as if it were."""
    for rank, theirs in enumerate(distributed.all_gather(letter(distributed.rank()))):
        expected = letter(rank)
        assert (theirs["rank"], str(theirs["line"])) == (rank, str(rank))
        for sent, wanted in zip(theirs["tensors"], expected["tensors"], strict=True):
            assert (sent.shape, sent.dtype) == (wanted.shape, wanted.dtype)
            assert torch.equal(sent, wanted)
    assert list(distributed.gather_dict({9 - distributed.rank(): 0})) == list(range(10 - distributed.world_size(), 10))
    assert distributed.on_main(distributed.world_size) == 1
    assert distributed.world_size() > 1


if __name__ == "__main__":
    there = Path(sys.argv[1])
    distributed.init()
    check_letters()
    work(there, sys.argv[2:])
    mine = errors(there)
    every = list(distributed.all_gather(mine))
    if distributed.is_main():
        (there / str(distributed.world_size()) / "errors.json").write_text(json.dumps(every))
