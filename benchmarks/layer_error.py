"""Relative output error ||X W'^T - X W^T|| / ||X W^T|| of one layer at a time, for every step of every method.

Over all layers of vision and language of both demo models (the mean; inputs from 64 calibration samples, moments of the
dense model), over a random 1024-wide layer with correlated inputs, and over random 256-wide layers in which one channel is
large on 1 % of the tokens, as massive activations are: named by how often the mean of the Gram matrix's diagonal holds the
median, and with the error on the other tokens. Orders that should hold are checked, and the layers where they do not are
counted: refined <= start, updated <= mask alone, ALPS <= SparseGPT <= Wanda <= magnitude.

    python benchmarks/layer_error.py [--wide 1024] [--sources instructblip llava random outliers]

Results: layer_error.csv beside this file, where rows of other sources stay; `--table` prints it as Markdown and measures
nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsight import Pattern, anatomy, load, lockstep
from sparsight.calibration.moments import Moments
from sparsight.calibration.observe import Watch
from sparsight.data import Encoder, batches, read
from sparsight.demo import MODELS
from sparsight.demo.scenes import write
from sparsight.pruning.compose import compose

PATTERNS = {"50 %": Pattern.row(0.5), "60 %": Pattern.row(0.6), "70 %": Pattern.row(0.7), "2:4": Pattern.nm(2, 4)}
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "ria": {"method": "ria"},
    "wanda + dsnot": {"refine": "dsnot-all"},
    "wanda + swaps": {"refine": "swaps"},
    "wanda + pcg": {"update": "pcg"},
    "wanda + swaps + pcg": {"refine": "swaps", "update": "pcg"},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt + pcg": {"method": "sparsegpt", "update": "pcg"},
    "alps": {"method": "alps"},
}
ORDERS = (
    ("wanda", "magnitude"),
    ("wanda + dsnot", "wanda"),
    ("wanda + swaps", "wanda"),
    ("wanda + pcg", "wanda"),
    ("wanda + swaps + pcg", "wanda + swaps"),
    ("sparsegpt + pcg", "sparsegpt"),
    ("sparsegpt", "wanda"),
    ("alps", "sparsegpt"),
)
FILE = Path(__file__).with_suffix(".csv")
Case = tuple[str, torch.Tensor, Moments, torch.Tensor]  # name, W (out, in), moments, the Gram matrix errors are taken by
OUTLIERS = (0.0, 9700.0)  # size of the large channel
COLUMNS = ("date", "torch", "layers of", "setting", "way", "mean error, or layers")
SOURCES = (*MODELS, "random", "outliers")


def demo_layers(name: str, folder: Path) -> Iterator[Case]:
    """Every pruned layer of a demo model with the moments of its dense inputs."""
    model, processor = load(MODELS[name], dtype="float32")
    encoder = Encoder(processor, model)
    samples = encoder.usable(read(write(folder / name, "train", 64, seed=0, questions_per_scene=1)))
    ready = list(batches(samples, encoder, 8))
    body = anatomy(model)
    layers = {b.name: [x for x in body.layers if x.block == b.name] for b in body.blocks if b.component != "connector"}
    found: list[Case] = []

    def visit(block: str, module: Any, calls: Any) -> None:
        watch = Watch(layers[block], len(calls), gram=True)
        with watch.open():
            for i, call in calls.items():
                with watch.during(ready[i].padding):
                    call()
        found.extend((x.name, x.weight, m := watch.moments[x.name], m.gram.double()) for x in layers[block])

    lockstep(model, [(b.name, b.module) for b in body.blocks if b.name in layers], [b.inputs for b in ready], visit)
    yield from found


def wide_layer(width: int) -> Iterator[Case]:
    """A random layer whose inputs are correlated and of very different sizes."""
    g = torch.Generator().manual_seed(0)
    size = torch.rand(width, generator=g) ** 2 * 3 + 0.1
    X = torch.randn(4 * width, width, generator=g) @ (torch.randn(width, width, generator=g) / width**0.5)
    moments = Moments(width, torch.device("cpu"), with_gram=True)
    moments.add(X * size + 0.3, sequences=32)
    yield f"random {width}", torch.randn(width, width, generator=g), moments, moments.gram.double()


def outlier_layer(size: float, width: int = 256, tokens: int = 4096) -> Iterator[Case]:
    """A random layer with correlated inputs, one channel of which is `size` larger on every hundredth token."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, width, generator=g) @ (torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width))
    large = torch.arange(tokens) % 100 == 0
    X[large, 7] += size
    moments = Moments(width, torch.device("cpu"), with_gram=True)
    moments.add(X, sequences=32)
    diagonal = moments.gram.diagonal()
    name = f"{float(diagonal.mean() / diagonal.median()):.0f}"
    yield name, torch.randn(width, width, generator=g), moments, (X[~large].T @ X[~large]).double()


def error(W: torch.Tensor, pruned: torch.Tensor, G: torch.Tensor) -> float:
    lost = (pruned - W).double()
    return float((((lost @ G) * lost).sum() / ((W.double() @ G) * W.double()).sum()).clamp(min=0).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", type=int, default=1024)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print(markdown())
        return
    rows: list[list[Any]] = []
    today = (datetime.date.today(), torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: list(demo_layers(name, Path(folder))) for name in MODELS if name in asked.sources}
        if "random" in asked.sources:
            sources[f"random {asked.wide}"] = list(wide_layer(asked.wide))
        for size in OUTLIERS if "outliers" in asked.sources else ():
            layers = list(outlier_layer(size))
            sources[f"random 256, mean / median {layers[0][0]}"] = layers
        for source, layers in sources.items():
            for setting, pattern in PATTERNS.items():
                found: dict[str, list[float]] = {way: [] for way in WAYS}
                for _, W, moments, G in layers:
                    for way, steps in WAYS.items():
                        pruned = compose(**steps).prune(W, moments, pattern, torch.Generator().manual_seed(0))
                        found[way].append(error(W, pruned, G))
                print(f"\n{source}, {setting}, {len(layers)} layers")
                for way, errors in found.items():
                    mean = sum(errors) / len(errors)
                    rows.append([*today, source, setting, way, f"{mean:.4f}"])
                    print(f"  {way:<24}{mean:8.4f}")
                for better, worse in ORDERS:
                    not_so = [
                        name for (name, *_), a, b in zip(layers, found[better], found[worse], strict=True)
                        if a > b * (1 + 1e-6)
                    ]  # fmt: skip
                    if not_so:
                        more = " ..." if len(not_so) > 3 else ""
                        print(f"  {better} > {worse} in {len(not_so)} layers: {', '.join(not_so[:3])}{more}")
                    rows.append([*today, source, setting, f"{better} > {worse}", len(not_so)])
    again = {row[2] for row in rows}
    others = [list(row.values()) for row in stored() if row["layers of"] not in again]
    with FILE.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *others, *rows])


def stored() -> list[dict[str, str]]:
    with FILE.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown() -> str:
    rows = stored()
    sources = list(dict.fromkeys(row["layers of"] for row in rows))
    values = {(r["layers of"], r["setting"], r["way"]): r["mean error, or layers"] for r in rows}
    lines = []
    for source in sources:
        lines += [f"#### {source}\n", f"| | {' | '.join(PATTERNS)} |", f"|---|{'---:|' * len(PATTERNS)}"]
        for way in (*WAYS, *(f"{better} > {worse}" for better, worse in ORDERS)):
            lines.append(f"| {way} | {' | '.join(values.get((source, s, way), '') for s in PATTERNS)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
