"""One run of race.py in the peer's environment: the same model and batches through llm-compressor."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

folder, method, out = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(f"{folder}/model", dtype="auto").eval()
tensors = load_file(f"{folder}/batches.safetensors")
batches = []
for i in range(len(tensors) // 2):
    inputs = {key: tensors[f"{i}.{key}"] for key in ("input_ids", "pixel_values")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    batches.append(inputs)
kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
recipe = kind(
    sparsity=0.5,
    mask_structure="0:0",
    targets=["Linear"],
    ignore=["re:.*lm_head", "re:.*multi_modal_projector.*"],
)
began = time.perf_counter()
oneshot(
    model=model,
    dataset=DataLoader(batches, batch_size=None),
    processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}))),  # it insists on one
    recipe=recipe,
    pipeline="sequential",
    sequential_targets=["CLIPEncoderLayer", "LlamaDecoderLayer"],
    num_calibration_samples=len(batches),
    output_dir=None,
)
seconds = time.perf_counter() - began
# the high-water mark of this program; getrusage would count that of the process it was started from
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
wanted = {
    name: module.weight.data.contiguous()
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.Linear) and ".layers." in name
}
save_file(wanted, out)
print(json.dumps({"seconds": seconds, "peak": peak}))
