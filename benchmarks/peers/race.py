"""Wanda and SparseGPT against llm-compressor 0.14, on the same random LLaVA and the same 128 samples.

Each tool runs in a process of its own (the peer in its own environment) on one model folder and one file of batches, both
made here, in turns. Measured is the peak of resident memory, and the time of pruning: of the peer without loading and
saving; ours reads and writes block by block, so its time is printed with that, and without it behind. Then the results are
compared: the share of mask entries that agree, and the largest difference of kept weights relative to their size, in the
first block (which sees the same inputs in both) and over all.

    python -m venv ENV && ENV/bin/pip install -r benchmarks/peers/requirements.txt
    python benchmarks/peers/race.py --peer ENV/bin/python [--size small|300m] [--dtype bfloat16] [--runs 1]

The peer prunes by threshold within 128-column blocks of the whole matrix (SparseGPT) or row (Wanda), so that ours runs
with the patterns `tensor` and `row`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

HERE = Path(__file__).parent
SAMPLES, ROWS, TEXT = 128, 8, 32
SIZES = {  # vision width, layers; language width, layers
    "small": (64, 2, 96, 2),
    "300m": (768, 12, 1024, 16),
}
METHODS = {"wanda": "row", "sparsegpt": "tensor"}


def make(folder: Path, size: str, dtype: str) -> None:
    """A random LLaVA and batches without padding; activations are correlated, as those of a trained model are."""
    torch.manual_seed(0)
    wide, deep, text_wide, text_deep = SIZES[size]
    vision = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=deep, num_attention_heads=max(2, wide // 64),
        image_size=64, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=text_wide, intermediate_size=text_wide * 11 // 4, num_hidden_layers=text_deep,
        num_attention_heads=max(2, text_wide // 64), num_key_value_heads=max(2, text_wide // 64), vocab_size=8000,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=7999)
    model = LlavaForConditionalGeneration(config).to(getattr(torch, dtype))
    model.save_pretrained(folder / "model")
    print(f"{size}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, {dtype}")
    tensors = {}
    for i in range(SAMPLES // ROWS):
        words = torch.randint(0, 7999, (ROWS, TEXT))
        tensors[f"{i}.input_ids"] = torch.cat([torch.full((ROWS, 64), 7999), words], dim=1)
        tensors[f"{i}.pixel_values"] = torch.randn(ROWS, 3, 64, 64).to(getattr(torch, dtype))
    save_file(tensors, folder / "batches.safetensors")


def run(python: str, script: str, folder: Path, method: str, extra: tuple[str, ...] = ()) -> dict:
    out = folder / f"{Path(script).stem}-{method}{''.join(extra)}.safetensors"
    command = [python, str(HERE / script), str(folder), method, str(out), *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"out": out}


def compare(ours: Path, theirs: Path) -> dict[str, float]:
    A, B = load_file(ours), load_file(theirs)
    assert set(A) == set(B), sorted(set(A) ^ set(B))[:4]
    agree = {name: float(((A[name] != 0) == (B[name] != 0)).float().mean()) for name in A}
    first = [name for name in A if "vision" in name and ".layers.0." in name]
    both = [(A[n].float(), B[n].float()) for n in first]
    differ = max(float((a - b)[(a != 0) & (b != 0)].abs().max() / a.abs().max()) for a, b in both)
    return {
        "masks agree, first block": min(agree[n] for n in first),
        "masks agree, all": sum(agree.values()) / len(agree),
        "kept weights differ, first block": differ,
        "zeros, ours": float(sum((W == 0).sum() for W in A.values()) / sum(W.numel() for W in A.values())),
        "zeros, peer": float(sum((W == 0).sum() for W in B.values()) / sum(W.numel() for W in B.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the python of the peer's environment")
    parser.add_argument("--size", choices=tuple(SIZES), default="300m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--runs", type=int, default=1)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder, asked.size, asked.dtype)
        for method in asked.methods:
            runs: dict[str, list[dict]] = {"ours, block": [], "ours, layer": [], "llm-compressor": []}
            for _ in range(asked.runs):
                runs["llm-compressor"].append(run(asked.peer, "theirs.py", folder, method))
                runs["ours, block"].append(run(sys.executable, "ours.py", folder, method, ("block",)))
                runs["ours, layer"].append(run(sys.executable, "ours.py", folder, method, ("layer",)))
            best = {name: min(found, key=lambda r: r["seconds"]) for name, found in runs.items()}
            peer = best["llm-compressor"]
            for name, found in best.items():
                peak = min(r["peak"] for r in runs[name])
                alone = found["seconds"] - found.get("files", 0.0)
                print(
                    f"{method:>10}  {name:<16}{found['seconds']:8.1f} s  {peer['seconds'] / found['seconds']:5.2f}x   "
                    f"peak {peak / 2**30:.2f} GiB, {peak / min(r['peak'] for r in runs['llm-compressor']):.2f}x   "
                    f"without files {alone:.1f} s, {peer['seconds'] / alone:.2f}x"
                )
                rows.append([method, name, f"{found['seconds']:.1f}", f"{peak / 2**30:.2f}", f"{alone:.1f}"])
            for what, value in compare(best["ours, block"]["out"], peer["out"]).items():
                print(f"{'':>12}{what}: {value:.6f}")
                rows.append([method, what, f"{value:.6f}", "", ""])
    path = HERE / f"race-{asked.size}-{asked.dtype}.csv"
    with path.open("w", newline="") as file:
        fixed = [datetime.date.today(), torch.__version__, torch.get_num_threads()]
        csv.writer(file).writerows(
            [
                ["date", "torch", "threads", "method", "what", "seconds or value", "peak GiB", "seconds without files"],
                *([*fixed, *r] for r in rows),
            ]
        )


if __name__ == "__main__":
    main()
