"""One run of race.py: prune the folder's model with Sparsight, write the pruned weights, print seconds and peak bytes."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from sparsight import anatomy
from sparsight.allocation.plan import make_plan
from sparsight.pruning.loop import prune

folder, method, out, propagate = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(f"{folder}/model", dtype="auto").eval()
tensors = load_file(f"{folder}/batches.safetensors")
batches = []
for i in range(len(tensors) // 2):
    inputs = {key: tensors[f"{i}.{key}"] for key in ("input_ids", "pixel_values")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    batches.append(SimpleNamespace(inputs=inputs, padding={}))
body = anatomy(model)
plan = make_plan(body, sparsity=0.5, pattern="tensor" if method == "sparsegpt" else "row")
began = time.perf_counter()
prune(model, body, plan, batches, method=method, propagate=propagate)
seconds = time.perf_counter() - began
# the high-water mark of this program; getrusage would count that of the process it was started from
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
save_file({name: body[name].weight.contiguous() for name in plan}, out)
print(json.dumps({"seconds": seconds, "peak": peak}))
