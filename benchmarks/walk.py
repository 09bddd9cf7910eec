"""How long a lockstep walk of 128 batches takes, and pruning a whole model, in plain forwards of the same batches.

A walk that only pauses needs one forward; one that also runs every block once per batch (moments, then the pruned
block) needs two. Pruning adds the moments and the selection or the solver. Prints the ratio of minima over interleaved
runs, with torch's default threads (OMP_NUM_THREADS=1 for one).

    python benchmarks/walk.py [--runs 3]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsight import anatomy, lockstep
from sparsight.allocation.plan import make_plan
from sparsight.pruning.loop import prune

BATCHES, ROWS, TEXT = 128, 2, 48


def build() -> tuple[LlavaForConditionalGeneration, list[dict[str, torch.Tensor]]]:
    """A random LLaVA of 22 million parameters and 128 batches for it."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=64, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=4000,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3999))
    batches = []
    for _ in range(BATCHES):
        words = torch.randint(0, 3999, (ROWS, TEXT))
        ids = torch.cat([torch.full((ROWS, 64), 3999), words], dim=1)
        batches.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(ROWS, 3, 64, 64)}
        )
    return model.eval(), batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    model, batches = build()
    body = anatomy(model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    ready = [SimpleNamespace(inputs=b, padding={"text": b["attention_mask"].bool()}) for b in batches]
    blocks = [(b.name, b.module) for b in body.blocks if b.component != "connector"]
    ends = {"on_output": lambda i, output: None}

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)

    def visit(name, block, calls) -> None:
        for call in calls.values():
            call()

    def pruned(**how):
        return lambda: prune(model, body, make_plan(body, sparsity=0.5), ready, **how)

    variants = {
        "plain forward": plain,
        "walk, pausing only": lambda: lockstep(model, blocks, batches, lambda *_: None, **ends),
        "walk, each block run once more": lambda: lockstep(model, blocks, batches, visit, **ends),
        "the same, cut short after the last block": lambda: lockstep(model, blocks, batches, visit),
        "prune, Wanda, block": pruned(),
        "prune, Wanda, layer": pruned(propagate="layer"),
        "prune, SparseGPT, block": pruned(method="sparsegpt"),
        "prune, SparseGPT, layer": pruned(method="sparsegpt", propagate="layer"),
    }
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(runs):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
            model.load_state_dict(dense)
    rows = [(name, f"{seconds:.2f}", f"{seconds / best['plain forward']:.2f}") for name, seconds in best.items()]
    print(f"{BATCHES} batches, {torch.get_num_threads()} threads, torch {torch.__version__}, minimum of {runs}")
    for name, seconds, ratio in rows:
        print(f"{name:<44}{seconds:>8} s{ratio:>8} forwards")
    with (Path(__file__).parent / "walk.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "torch", "threads", "what", "seconds", "forwards"])
        for row in rows:
            writer.writerow([datetime.date.today(), torch.__version__, torch.get_num_threads(), *row])


if __name__ == "__main__":
    main()
