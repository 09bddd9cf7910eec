"""Two things to report on: a sweep made by hand, whose every number is known, and real models, evaluated."""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsight import api
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.errors import Notice

SPLITS = ((0.3, 0.7), (0.5, 0.5), (0.7, 0.3))
ALONE = (0.3, 0.6)
QUESTIONS, CAPTIONS = 30, 10
LAYERS = {
    f"vision.layers.{b}.{kind}": ("vision", f"vision.layers.{b}") for b in range(3) for kind in ("attn.qkv", "mlp.fc1")
} | {
    f"language.{stack}.block.{b}.layer.0.{kind}": ("language", f"language.{stack}.block.{b}")
    for stack in ("encoder", "decoder")
    for b in range(2)
    for kind in (("SelfAttention.q", "CrossAttention.q") if stack == "decoder" else ("SelfAttention.q",))
}


def right(name: str, seed: int) -> np.ndarray:
    """Which of the 40 samples a cell gets right: questions first, then captions."""
    key = zlib.crc32(name.encode())
    return np.random.default_rng([key, seed]).random(QUESTIONS + CAPTIONS) < 0.95 - 0.04 * (key % 9)


def answers(hits: np.ndarray) -> list[dict]:
    rows = []
    for i, hit in enumerate(hits):
        caption = i >= QUESTIONS
        kind = "caption" if caption else ("color", "count")[i % 2]
        scores = {"exact_match": float(hit)} | ({"cider_d": 10.0 * hit} if caption else {"vqa_accuracy": float(hit)})
        rows.append(
            {"id": str(i), "kind": kind, "prompt": f"what is {i}? <b>", "prediction": f"it is {i if hit else -i}",
             "answers": [f"it is {i}"], "correct": bool(hit), "scores": scores}
        )  # fmt: skip
    return rows


def table(hits: np.ndarray) -> list[dict]:
    rows = []
    for kind, chosen in (
        ("all", hits),
        ("caption", hits[QUESTIONS:]),
        ("color", hits[:QUESTIONS:2]),
        ("count", hits[1:QUESTIONS:2]),
    ):
        value = float(chosen.mean())
        rows.append({"kind": kind, "metric": "exact_match", "value": value, "low": value, "high": value, "n": len(chosen)})
    return rows


def cells() -> list[dict]:
    """Nine cells: three splits of 1.0, two components alone at two sparsities, 2:4 and 4:8; two seeds of each, one dense."""
    made = [("dense", {}, None, None)]
    made += [(f"{v}-{w}", {"vision": v, "language": w}, "row", None) for v, w in SPLITS]
    made += [(f"vision-{s}", {"vision": s}, "row", None) for s in ALONE]
    made += [(f"language-{s}", {"language": s}, "row", None) for s in ALONE]
    made += [(p, {"vision": 0.5, "language": 0.5}, p, None) for p in ("2:4", "4:8")]
    made += [("restored 0.5-0.5", {"vision": 0.5, "language": 0.5}, "row", {"adapter": "sparselora", "steps": 100})]
    records = []
    for name, sparsity, pattern, restore in made:
        for seed in (0,) if name == "dense" else (0, 1):
            zeros = {c: int(1000 * sparsity.get(c, 0)) for c in ("vision", "language")}
            cell = {
                "sparsity": sparsity, "pattern": pattern, "method": "wanda" if sparsity else None, "refine": None,
                "update": None, "reconstruct": 0, "policy": "uniform", "restore": restore, "seed": seed,
            }  # fmt: skip
            records.append(
                {
                    "format": 1,
                    "id": "dense" if name == "dense" else f"{name.replace(':', '-')}-{seed}".replace(" ", "-"),
                    "label": "dense" if name == "dense" else f"{name}, seed {seed}",
                    "cell": cell,
                    "components": {c: {"layers": 6, "zeros": z, "parameters": 1000} for c, z in zeros.items()},
                    "parameters": 3000,
                    "bytes": 12000,
                    "packed_bytes": 12000 - 4 * sum(zeros.values()) + 125 * sum(z > 0 for z in zeros.values()),
                    "layers": {
                        layer: {
                            "component": c,
                            "block": b,
                            "got": sparsity.get(c, 0.0),
                            "error": 0.01 * i if sparsity else None,
                        }
                        for i, (layer, (c, b)) in enumerate(LAYERS.items())
                        if sparsity.get(c)
                    },
                    "scores": table(right(name, seed)),
                    "skipped": 0,
                    "seconds": {"prune": 1.5, "restore": 20.0 if restore else 0.0, "evaluate": 3.0},
                    "memory": {"prune": 2**29, "evaluate": 2**30},
                    "curve": [{"step": s, "ce": 2 / s + seed, "kl": 1 / s} for s in range(1, 11)] if restore else [],
                    "verified": None if name == "dense" else True,
                    "answers": answers(right(name, seed)),
                }
            )
    return records


def write_sweep(folder: Path) -> Path:
    (folder / "cells").mkdir(parents=True)
    (folder / "evaluation").mkdir()
    for i in range(6):
        Image.new("RGB", (20, 20), (40 * i, 90, 160)).save(folder / "evaluation" / f"{i}.png")
    sweep = {"format": 1, "model": "tiny-vlm", "data": "train.jsonl", "held_out": "test.jsonl",
             "environment": {"torch": "2.13.0", "machine": "x86_64, 1 thread"}, "grid": {"seeds": [0, 1]}}  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(sweep))
    for cell in cells():
        lines = cell.pop("answers")
        (folder / "cells" / f"{cell['id']}.json").write_text(json.dumps(cell))
        (folder / "cells" / f"{cell['id']}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


@pytest.fixture(scope="session")
def hits() -> Callable[[str, int], np.ndarray]:
    return right


@pytest.fixture(scope="session")
def sweep(tmp_path_factory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep") / "out")


@pytest.fixture
def own_sweep(tmp_path) -> Path:
    """A sweep that a test may break."""
    return write_sweep(tmp_path / "sweep")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with scenes, a dense copy of the demo model, one pruned and one restored, all three evaluated on record."""
    out = tmp_path_factory.mktemp("models")
    train = write(out / "train", "train", 24, 0, questions_per_scene=1)
    test = write(out / "test", "test", 8, 0)
    shutil.copytree(MODELS["instructblip"], out / "dense")
    (out / "dense").chmod(0o755)
    with pytest.warns(Notice, match="the files hold float16, and the model is loaded in float32"):
        api.prune(out / "dense", out / "pruned", data=train, pattern="2:4", samples=16)
    api.restore(out / "pruned", out / "restored", data=train, steps=3, batch_size=8, lr=4e-3)
    for name in ("dense", "pruned", "restored"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Notice)  # the same of the dense one
            api.evaluate(out / name, data=test, max_new_tokens=40, record=True)
    return out
