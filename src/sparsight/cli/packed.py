"""What `pack`, `unpack` and `bench` print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsight.cli.tables import table
from sparsight.packing.timing import DENSE_INT8, OURS, TORCH


def pack_tables(facts: Mapping[str, Any], out: str | Path) -> list[Any]:
    """What `pack` prints: bytes, and the output errors of int8 values, the largest first."""
    sizes = facts["bytes"]
    rows = [
        ("weights with zeros", "layers_dense", "layers_packed"),
        ("all weights", "dense", "packed"),
    ]
    made: list[Any] = [
        table(
            f"Packed {len(facts['tensors'])} tensors",
            ("", "bytes before", "bytes now", "times smaller"),
            [(name, f"{sizes[a]:,}", f"{sizes[b]:,}", f"{sizes[a] / max(1, sizes[b]):.2f}") for name, a, b in rows],
        )
    ]
    errors = sorted(((entry["error"], name) for name, entry in facts["tensors"].items() if "error" in entry), reverse=True)
    if errors:
        columns = ("tensor", "relative output error")
        made.append(table("int8 values, on random inputs", columns, [(name, f"{error:.2%}") for error, name in errors]))
    return [*made, f"Written to {out}; after `import sparsight`, from_pretrained reads it."]


def unpack_lines(facts: Mapping[str, Any], out: str | Path) -> list[str]:
    """What `unpack` prints."""
    sizes = facts["bytes"]
    return [f"Unpacked {sizes['packed']:,} bytes of weights to {sizes['dense']:,}.", f"Written to {out}."]


def bench_tables(facts: Mapping[str, Any]) -> list[Any]:
    """What `bench` prints: a table per shape of layers, then the whole model."""
    speed = facts["read_bytes_per_second"]
    reads = f", reads memory at {speed / 1e9:.0f} GB/s" if speed else ""
    made: list[Any] = [
        f"{facts['machine']}, {facts['threads']} threads{reads}. Weights cold in memory, 10th percentile, milliseconds."
    ]
    slower = False
    for layer in facts["layers"]:
        forms = [form for form in next(iter(layer["ms"].values())) if form != DENSE_INT8]  # which --json has
        rows = []
        for tokens, times in layer["ms"].items():
            ratio = times[TORCH] / times[OURS]
            slower = slower or ratio < 1
            own = times.get("dense, ours")
            rows.append(
                (tokens, *(f"{times[form]:.3f}" for form in forms), f"{ratio:.2f}{' slower' if ratio < 1 else ''}",
                 f"{own / times[OURS]:.2f}" if own else "")
            )  # fmt: skip
        title = f"{layer['rows']} x {layer['columns']}, {layer['count']} layers, {layer['sparsity']:.0%} zeros, "
        title += f"{layer['bytes']['dense'] / layer['bytes']['packed']:.2f} times smaller packed"
        made.append(table(title, ("tokens", *forms, "F.linear / packed", "dense, ours / packed"), rows))
        if on_gpu := layer.get("cuda"):
            made.append(_cuda_table(on_gpu))
    rows = []
    for run in facts["generate"]:
        first, rate = run["first_token_seconds"], run["tokens_per_second"]
        ratio = rate["packed"] / rate["dense"]
        firsts = [f"{first[name]:.3f}" for name in ("dense", "packed")]
        rates = [f"{rate[name]:.1f}" for name in ("dense", "packed")]
        rows.append((run["batch"], *firsts, *rates, f"{ratio:.2f}{' slower' if ratio < 1 else ''}"))
        slower = slower or ratio < 1
    if not facts["large"]:
        made.append(
            "No layer is large enough to gain from packing: all fit into a cache, and `load` keeps them dense. The next "
            "table shows what packing all of them does."
        )
    title = f"The model: a picture and a question, {facts['prompt_tokens']} tokens"
    columns = ("batch", "first token, dense (s)", "packed (s)", "tokens/s, dense", "packed", "ratio")
    made.append(table(title, columns, rows))
    memory, load = facts["memory"], facts["load"]
    made.append(f"Parameters in memory: {memory['dense']:,} bytes dense, {memory['packed']:,} packed.")
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in load["seconds"].items())
    made.append(f"Files of weights: {load['bytes']:,} bytes{' (packed)' if load['packed_folder'] else ''}; {seconds}.")
    if slower:
        made.append(
            "Slower where a weight fits into a cache, since there is nothing to read less of, and on some CPUs for many "
            "tokens at once, since each weight is then used often and arithmetic decides, not memory."
        )
    return made


def _cuda_table(facts: Mapping[str, Any]) -> Any:
    rows = [
        (tokens, f"{ms['dense']:.4f}", f"{ms['2:4']:.4f}", ms["alg_id"], f"{ms['dense'] / ms['2:4']:.2f}", ms["use"])
        for tokens, ms in facts["ms"].items()
    ]
    title = f"The same on {facts['device']}, 2:4 by core PyTorch, milliseconds"
    return table(title, ("tokens", "dense", "2:4", "alg_id", "dense / 2:4", "use"), rows)
