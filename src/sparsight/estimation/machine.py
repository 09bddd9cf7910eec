"""Measurements of this machine: memory of the interpreter and the libraries, and FLOPs per second.

`python -m sparsight.estimation.machine MODEL DTYPE` prints the memory, in a process of its own: it imports the modules of
the stages, loads the model's processor, and takes one step with the embedded LLaVA of 2 million parameters, so that the
libraries have allocated their buffers. That model is counted, too: 8 MB in float32, and one picture's activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib import import_module

import torch

from sparsight.errors import SparsightError
from sparsight.memory import peak_memory


@cache
def measured_base(where: str, dtype: torch.dtype) -> Mapping[str, int]:
    """Bytes of a process beside a model's weights and work, by stage; takes seconds. **Raises** `SparsightError`."""
    command = [sys.executable, "-m", __name__, where, str(dtype).removeprefix("torch.")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise SparsightError(f"what libraries hold could not be measured in a process of its own: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOPs per second of square products on this CPU, the best of a third of a second."""
    A = torch.ones(size, size, dtype=dtype)
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < 0.3:
        start = time.perf_counter()
        A @ A
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


STAGES = {  # the imports of the verbs
    "prune": ("sparsight.pruning.verb", "sparsight.evaluation.verb"),
    "restore": ("sparsight.restoring.verb",),
}


def main(where: str, dtype: str) -> None:
    """Print the peak bytes of this process after each stage's imports and one small step, as JSON."""
    from PIL import Image
    from transformers import AutoConfig, AutoModelForMultimodalLM

    from sparsight.data import Encoder, Sample, Turn
    from sparsight.demo import MODELS
    from sparsight.model.load import load, load_processor

    for name in STAGES["prune"]:
        import_module(name)
    AutoModelForMultimodalLM._model_mapping[type(AutoConfig.from_pretrained(where))]  # imports the model's own code
    load_processor(where)
    peaks = {"load": peak_memory() or 0}
    model, processor = load(MODELS["llava"], dtype=dtype)
    sample = Sample("", (Image.new("RGB", (48, 48)),), (Turn("how many digits are there?", ("2",)),))
    inputs = Encoder(processor, model).encode([sample]).inputs
    with torch.no_grad():
        model(**inputs)
    peaks["prune"] = peaks["evaluate"] = peak_memory() or 0

    from accelerate import Accelerator

    from sparsight.model.anatomy import anatomy
    from sparsight.restoring.peft_layers import AdapterTarget, add_adapters, factors

    for name in STAGES["restore"]:
        import_module(name)
    wrapped = add_adapters(model, [AdapterTarget(layer, 2, None) for layer in anatomy(model).layers])
    Accelerator(cpu=True)
    wrapped(**inputs).loss.backward()
    torch.optim.AdamW(list(factors(wrapped).values()), fused=True).step()
    peaks["restore"] = peak_memory() or 0
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
