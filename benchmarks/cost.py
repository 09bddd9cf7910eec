"""The peak memory that `sparsight plan --cost` estimates, against the measured peak of every stage in its own process.

Models: both demo models in float32 on digit scenes, and a random LLaVA of 300 million parameters in bfloat16, vocabulary
32,000. Measured is the high-water mark of resident memory (VmHWM) of the command line, run with one thread; the estimate
is that of `sparsight.estimate` for the configuration, the processor and the same data. Bar: within 15 %.

    python benchmarks/cost.py [--models instructblip llava 300m]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparsight.demo import MODELS
from sparsight.demo.scenes import write

BAR = 0.15
CHILD = """
import re, sys, time
from pathlib import Path
from sparsight.cli import app as cli
sys.argv = ["sparsight", *sys.argv[1:]]
began = time.perf_counter()
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
seconds = time.perf_counter() - began
print("took", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], seconds, file=sys.stderr)
"""


def big(folder: Path) -> Path:
    """A random LLaVA of 309 million parameters on disk, with the demo LLaVA's tokenizer and 64 × 64 pictures."""
    from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    processor: Any = AutoProcessor.from_pretrained(MODELS["llava"])
    processor.patch_size, processor.image_processor.size = 8, {"height": 64, "width": 64}
    processor.image_processor.crop_size = {"height": 64, "width": 64}
    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=64, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32_000, pad_token_id=processor.tokenizer.pad_token_id, eos_token_id=processor.tokenizer.eos_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=64,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(processor.image_token),
    )  # fmt: skip
    LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def measured(*words: Any) -> tuple[int, float]:
    """Peak bytes and seconds of one verb in a process of its own."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    if done.returncode or "took" not in done.stderr:
        raise SystemExit(f"{words}: {done.stderr[-2000:]}")
    _, kilobytes, seconds = done.stderr.strip().splitlines()[-1].split()
    return 1024 * int(kilobytes), float(seconds)


def cases(model: Path, big: bool, folder: Path) -> list[tuple[str, tuple[Any, ...], str, dict[str, Any]]]:
    """The measurements in order: a name, the words of the command line, the stage, and the arguments of `estimate`.

    Swaps are left out for the big model, where they take many minutes on one thread.
    """
    dtype, samples, batch, steps = ("bfloat16", 32, 8, 2) if big else ("float32", 64, 32, 4)
    train, test, quiet = folder / "train", folder / "test", ("--quiet", "--overwrite")
    prune = {"dtype": dtype, "samples": samples}
    both = {"restore": {"batch_size": batch, "steps": steps}, "evaluate": {"batch_size": batch, "samples": samples}}
    listed = []
    ways: dict[str, dict[str, str]] = {"wanda": {}, "sparsegpt": {"method": "sparsegpt"}}
    slow: dict[str, dict[str, str]] = {} if big else {"swaps and pcg": {"refine": "swaps", "update": "pcg"}}
    for name, way in (ways | slow).items():
        words = ("prune", model, folder / name, "--data", train, "--samples", samples, "--dtype", dtype, *quiet)
        words += tuple(word for option, value in way.items() for word in (f"--{option}", value))
        listed.append((f"prune, {name}", words, "prune", both | {"prune": prune | way, "data": train}))
    for mode, sparse in (("shared", "wanda"), ("cached", "sparsegpt")):
        words = ("restore", folder / sparse, folder / "restored", "--data", train, "--teacher-mode", mode)
        words = (*words, "--steps", steps, "--batch-size", batch, *quiet)
        listed.append(
            (
                f"restore, {mode}",
                words,
                "restore",
                both | {"restore": both["restore"] | {"teacher_mode": mode}, "prune": prune, "data": train},
            )
        )
    words = ("eval", model, "--data", test, "--samples", samples, "--batch-size", batch, "--dtype", dtype, "--quiet")
    return [*listed, ("evaluate", words, "evaluate", both | {"prune": prune, "data": test})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*MODELS, "300m"), default=[*MODELS, "300m"])
    asked = parser.parse_args()
    from sparsight import estimate

    rows = []
    for name in asked.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write(folder / "train", "train", 64, seed=0)
            write(folder / "test", "test", 64, seed=1)
            model = big(folder / "model") if name == "300m" else MODELS[name]
            for what, words, stage, options in cases(model, name == "300m", folder):
                expected = estimate(model, timed=False, **options)[stage]
                peak, seconds = measured(*words)
                off = expected.peak / peak - 1
                cells = [name, what, f"{expected.peak / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{off:+.1%}", expected.moment]
                rows.append(
                    [datetime.date.today(), torch.__version__, *cells, f"{expected.work / 1e9:.0f}", f"{seconds:.1f}"]
                )
                fit = "within" if abs(off) <= BAR else "NOT WITHIN"
                print(
                    f"{name:>13}  {what:<20} {cells[2]:>5} MB estimated, {cells[3]:>5} measured, {off:+.1%}: {fit} {BAR:.0%}"
                )
    columns = ("date", "torch", "model", "stage", "MB estimated", "MB measured", "off", "moment", "GFLOPs", "seconds")
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


if __name__ == "__main__":
    main()
