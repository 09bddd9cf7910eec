"""Pruning a model block by block against pruning it in memory: anonymous memory, CPU time, wall time, and the files.

The model is a random LLaVA in bfloat16: CLIP-L and BLOCKS language blocks of WIDTH x WIDTH. Each run is the command line's
work in a process of its own, on one thread; memory is the largest anonymous memory (RssAnon), less that of the process
once it has imported the library. The blocks that it is counted in are those of the language model, the largest. With
`--verbs prune verify reconstruct` the pruned folder is verified and then fitted to the dense model, block by block.

Times of runs one after the other differ by a fifth on a shared machine, more than what is sought. With `--together` the
ways run at the same time, pinned to one core, which gives its time to them in turn: whatever disturbs it disturbs both, and
their CPU times can be compared. Their wall times cannot: each is about that of all. What a way waits for, as for the disk,
is wall less CPU of a run alone.

    python benchmarks/streaming.py model FOLDER [--blocks 32] [--width 2560]
    python benchmarks/streaming.py run FOLDER [--ways stream memory] [--samples 8] [--park never] ...
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "date", "torch", "model", "MB of a block", "verb", "way", "samples", "batch", "park", "anonymous MB", "blocks",
    "CPU s", "wall s", "runs", "digest",
)  # fmt: skip


def make_model(folder: Path, blocks: int, width: int, pixels: int) -> None:
    """Write a random LLaVA, tensor by tensor, with the demo model's tokenizer and pictures of PIXELS x PIXELS."""
    from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

    from sparsight.checkpoint.parts import PartFiles
    from sparsight.demo import MODELS
    from sparsight.estimation.stubs import hollow
    from sparsight.model.stream import Stream

    processor: Any = AutoProcessor.from_pretrained(MODELS["llava"])
    processor.patch_size, processor.image_processor.size = 14, {"height": pixels, "width": pixels}
    processor.image_processor.crop_size = {"height": pixels, "width": pixels}
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=pixels,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=width, intermediate_size=width * 43 // 16 // 64 * 64, num_hidden_layers=blocks,
        num_attention_heads=width // 128, num_key_value_heads=width // 128, vocab_size=32_000,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=(pixels // 14) ** 2, dtype="bfloat16",
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
    )  # fmt: skip
    bare = hollow(config, torch.bfloat16)
    bare.save_pretrained(folder, state_dict={})
    processor.save_pretrained(folder)
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    names = [name for name in bare.state_dict() if not name.endswith("position_ids")]
    generator = torch.Generator().manual_seed(0)

    def write() -> None:
        file = f"model-{len({*places.values()}) + 1:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name in names:
        shape = bare.get_parameter(name).shape
        if len(shape) > 1:
            fan = shape[1:].numel()
            shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, fan**-0.5, generator=generator)
        else:
            shard[name] = torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > 2**30:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    stream = Stream(folder)  # it can be opened
    PartFiles(stream)


def anonymous() -> int:
    """Bytes of anonymous memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise SystemExit("RssAnon is not known on this system")


def child(verb: str, way: str, model: Path, out: Path, data: Path, settings: dict[str, Any]) -> dict[str, float]:
    """One run in this process."""
    from sparsight.cli import app as cli  # noqa: F401  what a command imports
    from sparsight.model.load import load, load_model
    from sparsight.model.stream import Stream  # noqa: F401
    from sparsight.pruning.verb import prune_folder
    from sparsight.specs import PruneSpec

    base, peak, ends = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ends.wait(0.02):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if verb == "prune":
        spec = PruneSpec.make(None, settings)
        loaded = load(model, dtype=spec.dtype) if way == "memory" else None
        prune_folder(model, out, spec, data=data, loaded=loaded)
    elif verb == "reconstruct":  # of what was pruned before
        from sparsight.restoring.fit import fit_folder
        from sparsight.specs import RestoreSpec

        fit_folder(
            out,
            out.with_name(out.name + "-fitted"),
            RestoreSpec.make(None, settings),
            data=data,
            teacher=str(model),
            overwrite=True,
        )
    else:
        from sparsight.checkpoint.verify import verify

        found = verify(model, loaded=load_model(model) if way == "memory" else None)
        assert not found["differences"], found["differences"]
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    ends.set()
    watcher.join()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"anonymous": peak - base, "cpu": cpu, "wall": wall}


def start(asked: argparse.Namespace, verb: str, way: str) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    settings = {"samples": asked.samples, "batch_size": asked.batch, "park": asked.park} | dict(
        word.split("=", 1) for word in asked.settings
    )
    out, data = output(asked, way), asked.folder.with_name("data")
    if not data.is_dir():
        from sparsight.demo.scenes import write

        write(data, "train", 192, seed=0)
    if verb == "reconstruct":
        settings = {"samples": asked.samples, "batch_size": asked.batch, "steps": 0, "reconstruct": 1}
    words = ["child", verb, way, out if verb == "verify" else asked.folder, out, data, json.dumps(settings)]
    if verb == "prune":
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(out.name + ".unfinished"), ignore_errors=True)
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.Popen([sys.executable, __file__, *map(str, words)], env=quiet, stdout=subprocess.PIPE, text=True)
    if asked.together:
        os.sched_setaffinity(run.pid, {max(os.sched_getaffinity(0))})
    return run


def output(asked: argparse.Namespace, way: str) -> Path:
    """The folder that a way writes."""
    return asked.folder.with_name(f"{asked.folder.name}-{way}")


def row_of(asked: argparse.Namespace, verb: str, way: str, said: str) -> list[Any]:
    """What a run measured, by its last line."""
    from sparsight.model.stream import Stream

    got, out = json.loads(said.strip().splitlines()[-1]), output(asked, way)
    stream = Stream(asked.folder)
    sizes = [sum(p.nbytes for p in block.module.parameters()) for block in stream.anatomy.blocks]
    name = f"LLaVA {stream.anatomy.parameters / 1e9:.2f} B, {len(sizes)} blocks"
    written = out.with_name(out.name + "-fitted") if verb == "reconstruct" else out
    digest = ["sh", "-c", f"cat {written}/*.safetensors | sha256sum"]
    files = subprocess.run(digest, capture_output=True, text=True).stdout[:12]
    row = [
        datetime.date.today(), torch.__version__, name, f"{max(sizes) / 1e6:.0f}", verb, way, asked.samples, asked.batch,
        asked.park, f"{got['anonymous'] / 1e6:.0f}", f"{got['anonymous'] / max(sizes):.1f}", f"{got['cpu']:.1f}",
        f"{got['wall']:.1f}", "together" if asked.together else "", files,
    ]  # fmt: skip
    print(*row, sep=", ", flush=True)
    return row


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        _, _, verb, way, model, out, data, settings = sys.argv
        print(json.dumps(child(verb, way, Path(model), Path(out), Path(data), json.loads(settings))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("model")
    made.add_argument("folder", type=Path)
    made.add_argument("--blocks", type=int, default=32)
    made.add_argument("--width", type=int, default=2560)
    made.add_argument("--pixels", type=int, default=56)
    ran = commands.add_parser("run")
    ran.add_argument("folder", type=Path)
    ran.add_argument("--verbs", nargs="+", default=["prune"], choices=("prune", "verify", "reconstruct"))
    ran.add_argument("--ways", nargs="+", default=["stream", "memory"], choices=("stream", "memory"))
    ran.add_argument("--samples", type=int, default=8)
    ran.add_argument("--batch", type=int, default=2)
    ran.add_argument("--park", default="never")
    ran.add_argument("--together", action="store_true", help="the ways at the same time on one core")
    ran.add_argument("--rounds", type=int, default=1)
    ran.add_argument("--settings", nargs="*", default=[], metavar="FIELD=VALUE")
    asked = parser.parse_args()
    if asked.command == "model":
        make_model(asked.folder, asked.blocks, asked.width, asked.pixels)
        return
    if not TABLE.is_file():
        keep(COLUMNS)
    for verb in asked.verbs * asked.rounds:
        for ways in [asked.ways] if asked.together else [[way] for way in asked.ways]:
            runs = [start(asked, verb, way) for way in ways]
            try:
                said = [run.communicate()[0] for run in runs]
                for way, run, text in zip(ways, runs, said, strict=True):
                    if run.returncode:
                        raise SystemExit(f"{verb}, {way}: ended with {run.returncode}")
                    keep(row_of(asked, verb, way, text))
            finally:
                for run in runs:
                    run.kill()


def keep(row: Sequence[Any]) -> None:
    """Add a row to the table."""
    with TABLE.open("a", newline="") as file:
        csv.writer(file).writerow(row)


if __name__ == "__main__":
    main()
