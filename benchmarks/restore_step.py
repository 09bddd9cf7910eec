"""One step of restoration, against the published recipe made again: seconds, and the high-water mark of memory.

The published recipe (arXiv 2404.02424, its code): every pruned layer computes (W + B A s) * mask in its forward, its
gradient left to autograd, masks in bytes; the same module runs dense as the teacher; the KL is over every position and the
whole vocabulary. Ours: `restoring/` with a shared and with a cached teacher, with the batch in four parts whose gradients
add up to the same (`--accumulate 4`), and with activations made again. The same model, masks, batch, ranks and AdamW.

Each way runs in a process of its own, in turns; seconds are the minimum over its steps, memory what the process held at
most above what it held before the model was there. One thread.

    python benchmarks/restore_step.py [--models instructblip llava 300m] [--steps 4] [--turns 2]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsight import anatomy, load
from sparsight.data import Encoder, read
from sparsight.data.encoding import select_answers
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.masks.bits import pack
from sparsight.masks.pattern import Pattern
from sparsight.restoring.head import Head
from sparsight.restoring.losses import distillation
from sparsight.restoring.peft_layers import AdapterTarget, add_adapters, factors
from sparsight.restoring.teacher import shared_teacher
from sparsight.restoring.trainer import checkpointed_blocks

WAYS = ("published", "ours, shared", "ours, cached", "ours, cached, in parts", "ours, cached, checkpointed")
PARTS = 4
RANK, ALPHA, KL, RATE = {"vision": 4, "language": 8}, 16, 0.1, 1e-4


def big() -> Any:
    """A random LLaVA of 300 million parameters and more in bfloat16, V 32,000."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=64, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32_000,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31_999)
    return LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()


def big_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    rows, words = 4, 64
    ids = torch.cat([torch.full((rows, 64), 31_999), torch.randint(0, 31_000, (rows, words))], dim=1)
    labels = ids.clone()
    labels[:, :96] = -100  # half of the text is answers
    pixels = torch.randn(rows, 3, 64, 64).bfloat16()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


class Published(nn.Module):
    """The masked layer of the published code."""

    dense = False

    def __init__(self, base: nn.Linear, mask: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.base, self.scaling = base, ALPHA / rank
        self.register_buffer("mask", mask)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def weight(self) -> torch.Tensor:  # T5 looks at its dtype
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        W = self.base.weight
        if Published.dense:
            return F.linear(x, W, self.base.bias)
        return F.linear(x, (W + (self.B @ self.A).to(W.dtype) * self.scaling) * self.mask, self.base.bias)


def published(model: Any, batch: dict[str, torch.Tensor], chosen: list) -> Any:
    for layer, mask in chosen:
        parent, _, name = layer.name.rpartition(".")
        setattr(model.get_submodule(parent), name, Published(layer.module, mask, RANK[layer.component]))
    trained = [p for n, p in model.named_parameters() if n.endswith((".A", ".B"))]

    def losses() -> Iterator[torch.Tensor]:
        Published.dense = True
        with torch.no_grad():
            taught = model(**batch, use_cache=False).logits
        Published.dense = False
        output = model(**batch, use_cache=False)
        p, q = F.softmax(taught, dim=-1), F.log_softmax(output.logits, dim=-1)
        yield (1 - KL) * output.loss + KL * F.kl_div(q, p, reduction="sum") / len(batch["labels"])

    return trained, losses


def ours(model: Any, batch: dict[str, torch.Tensor], chosen: list, shifted: bool, way: str) -> Any:
    head = Head(model)
    size = len(batch["labels"])
    step = size // PARTS if "parts" in way else size
    parts = [{k: v[i : i + step] for k, v in batch.items()} for i in range(0, size, step)]
    tokens = int((batch["labels"][:, 1 if shifted else 0 :] != -100).sum())
    cache = None
    if "cached" in way:
        with torch.no_grad():
            cache = [select_answers(head.hidden(model, part), part["labels"], shifted)[0] for part in parts]
    wrapped = add_adapters(
        model, [AdapterTarget(layer, RANK[layer.component], pack(mask)) for layer, mask in chosen], alpha=ALPHA
    )
    teacher = shared_teacher(wrapped, head)
    if "checkpointed" in way:
        checkpointed_blocks(wrapped).__enter__()

    def losses() -> Iterator[torch.Tensor]:
        for i, part in enumerate(parts):
            said = cache[i] if cache else select_answers(teacher(wrapped, part), part["labels"], shifted)[0]
            hidden, targets = select_answers(head.hidden(wrapped, part), part["labels"], shifted)
            yield distillation(hidden, said, targets, head, kl=KL).total / tokens

    return list(factors(wrapped).values()), losses


def resident(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def alone(name: str, way: str, steps: int) -> None:
    """One way in a process of its own: seconds of the fastest step, and bytes at most."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        before = resident("VmRSS")
        if name == "300m":
            model, batch, shifted = big(), big_batch(), True
        else:
            model, processor = load(MODELS[name], dtype="float32")
            encoder = Encoder(processor, model)
            data = read(write(Path(folder) / "train", "train", 32, seed=0))
            batch, shifted = encoder.encode(list(data)[:32]).inputs, encoder.shifted
        for p in model.parameters():
            p.requires_grad_(False)
        body = anatomy(model)
        chosen = [
            (layer, Pattern.nm(2, 4).keep(layer.weight.abs().float()))
            for part in ("vision", "language")
            for layer in body.component(part)
        ]
        trained, losses = published(model, batch, chosen) if way == "published" else ours(model, batch, chosen, shifted, way)
        del chosen
        gc.collect()
        adam = torch.optim.AdamW(trained, lr=RATE)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            adam.zero_grad()
            value = 0.0
            for part in losses():
                part.backward()
                value += float(part.detach())
            adam.step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": min(seconds), "bytes": resident("VmHWM") - before, "loss": value}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, "300m"), default=[*MODELS, "300m"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        return alone(*asked.alone, asked.steps)
    rows = []
    for name in asked.models:
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(asked.turns):
            for way in WAYS:
                command = [sys.executable, __file__, "--alone", name, way, "--steps", str(asked.steps)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name}, {way}: {done.stderr[-2000:]}")
                found[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
        best = {way: (min(r["seconds"] for r in runs), min(r["bytes"] for r in runs)) for way, runs in found.items()}
        for way, (seconds, size) in best.items():
            faster, less = best["published"][0] / seconds, size / best["published"][1]
            cells = [name, way, f"{seconds:.3f}", f"{faster:.2f}", f"{size / 1e6:.0f}", f"{less:.2f}"]
            rows.append([datetime.date.today(), torch.__version__, *cells])
            print(
                f"{name:>13}  {way:<27} {cells[2]} s  {cells[3]} x as fast (bar: 1.5)  "
                f"{cells[4]} MB, {cells[5]} of it (bar: 0.6)"
            )
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([("date", "torch", "model", "way", "seconds", "faster", "MB", "of published"), *rows])
    return None


if __name__ == "__main__":
    main()
