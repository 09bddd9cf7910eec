"""Packed weights against dense ones: bytes, products, tokens per second and load. Prints ratios, writes a csv.

    OMP_NUM_THREADS=1 python benchmarks/packing.py [OUT.csv]

`packing.csv` is of a CPU with AVX-512, `packing-amx.csv` of one with matrix tiles, too, `packing-avx2.csv` (products only)
of one with AVX2. Products are timed cold and in turn (`sparsight.packing.timing`); the model is a LLaVA with two language
blocks of Llama width, random weights and 70 % zeros. Squeezed sizes are those of the embedded, trained model in bfloat16.
"""

from __future__ import annotations

import csv
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import sparsight
from sparsight.evaluation.bench import TwoForms
from sparsight.model.load import load_model
from sparsight.packing.timing import read_speed, time_layer

DEMO = Path(sparsight.__file__).parent / "demo" / "models" / "llava"
HERE = Path(__file__).parent
SHAPES = ((4096, 4096), (11008, 4096))
FEW, MANY = (1, 2, 4, 8, 16), (32, 64, 256)  # tokens


def sparse_linear(rows: int, columns: int, sparsity: float) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=False).bfloat16()
    with torch.no_grad():
        linear.weight[torch.rand(rows, columns) < sparsity] = 0
    return linear


def products(rows: list) -> None:
    speed = read_speed(20)
    for shape in SHAPES:
        for sparsity in (0.5, 0.7):
            linear = sparse_linear(*shape, sparsity)
            facts = time_layer(linear, FEW, 60)
            facts["ms"] |= time_layer(linear, MANY, 10)["ms"]
            sizes = facts["bytes"]
            name = f"{shape[0]} x {shape[1]}, {sparsity:.0%}"
            rows.append((name, "bytes: dense / packed", sizes["dense"] / sizes["packed"]))
            rows.append((name, "bytes: dense / packed int8", sizes["dense"] / sizes["packed int8"]))
            for tokens, ms in facts["ms"].items():
                rows.append((f"{name}, {tokens} tokens", "F.linear / packed", ms["F.linear bfloat16"] / ms["packed"]))
                rows.append(
                    (f"{name}, {tokens} tokens", "F.linear / packed int8", ms["F.linear bfloat16"] / ms["packed int8"])
                )
                if "dense, ours" in ms:
                    rows.append((f"{name}, {tokens} tokens", "dense, ours / packed", ms["dense, ours"] / ms["packed"]))
                    ratio = ms["dense int8, ours"] / ms["packed int8"]
                    rows.append((f"{name}, {tokens} tokens", "dense int8, ours / packed int8", ratio))
            if speed:
                share = sizes["packed"] / speed / (facts["ms"][1]["packed"] / 1e3)
                rows.append((name, "share of the read roofline, 1 token", share))


def sizes(rows: list) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in (0.5, 0.7):
            dense, packed = Path(scratch) / "dense", Path(scratch) / "packed"
            sparsight.prune(DEMO, dense, method="magnitude", sparsity=sparsity, dtype="bfloat16", overwrite=True)
            facts = sparsight.pack(dense, packed, squeeze=True, overwrite=True)["bytes"]
            name = f"demo LLaVA, {sparsity:.0%}"
            layers, whole = facts["layers_dense"] / facts["layers_packed"], facts["dense"] / facts["packed"]
            rows.append((name, "bytes of pruned layers: dense / squeezed", layers))
            rows.append((name, "bytes of the model: dense / squeezed", whole))
            if shutil.which("zstd"):
                file, small = dense / "model.safetensors", Path(scratch) / "model.zst"
                subprocess.run(["zstd", "-q", "-3", "-f", str(file), "-o", str(small)], check=True)
                rows.append((name, "bytes of the model: dense / zstd -3", file.stat().st_size / small.stat().st_size))


def model(rows: list) -> None:
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, vocab_size=16000
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        projection_dim=64,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=15999)
    network = LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
    linears = {}
    with torch.no_grad():
        for name, module in network.named_modules():
            if type(module) is nn.Linear and ".layers." in name and "vision" not in name:
                module.weight[torch.rand(module.weight.shape) < 0.7] = 0
                linears[name] = module
    whole = TwoForms(network, linears)
    ids = torch.arange(5, 25).unsqueeze(0)
    taken = {False: [], True: []}
    for _ in range(5):
        for packed in taken:
            whole.use(packed)
            start = time.perf_counter()
            with torch.no_grad():
                network.generate(input_ids=ids, max_new_tokens=33, min_new_tokens=33, do_sample=False)
            middle = time.perf_counter()
            with torch.no_grad():
                network.generate(input_ids=ids, max_new_tokens=1, min_new_tokens=1, do_sample=False)
            taken[packed].append(middle - start - (time.perf_counter() - middle))
    size = sum(p.numel() for p in linears.values() for p in [p.weight])
    rows.append(
        (
            f"LLaVA, {size / 1e6:.0f} M weights in pruned layers, 70%",
            "tokens per second: packed / dense",
            min(taken[False]) / min(taken[True]),
        )
    )
    whole.use(False)
    with tempfile.TemporaryDirectory() as scratch:
        dense, packed = Path(scratch) / "dense", Path(scratch) / "packed"
        network.save_pretrained(dense)
        sparsight.pack(dense, packed)
        del whole, network, linears
        ways = {
            "dense": lambda: load_model(dense),
            "expanding": lambda: load_model(packed),
            "packed": lambda: load_model(packed, packed=True),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(3):
            for name, way in ways.items():
                start = time.perf_counter()
                loaded = way()
                sum(float(p.detach().view(-1)[::512].float().sum()) for p in loaded.parameters())  # every page is read
                best[name] = min(best[name], time.perf_counter() - start)
                del loaded
        rows.append(("the same LLaVA", "seconds to load: packed, expanding / dense", best["expanding"] / best["dense"]))
        rows.append(("the same LLaVA", "seconds to load: packed in memory / dense", best["packed"] / best["dense"]))


def main() -> None:
    torch.manual_seed(0)
    rows: list[tuple[str, str, float]] = []
    for part in (sizes, products, model):
        begin = len(rows)
        part(rows)
        for what, ratio, value in rows[begin:]:
            print(f"{what:48} {ratio:48} {value:6.2f}", flush=True)
    with (Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "packing.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "ratio", "value"])
        writer.writerows((what, ratio, f"{value:.3f}") for what, ratio, value in rows)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
