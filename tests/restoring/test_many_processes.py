"""Two processes restore as one does, within rounding, and keep every zero: DDP and FSDP2, as users start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import many_restores
import sparsight
from sparsight import api
from sparsight.checkpoint.folder import read_metrics

TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def folder(zoo_folder, scenes, tmp_path_factory):
    there = tmp_path_factory.mktemp("restores")
    (there / "data").symlink_to(scenes)
    api.prune(zoo_folder("llava"), there / "sparse", data=scenes, pattern="2:4", samples=8)
    many_restores.work(there, "one")
    return there


def launch(*words, timeout=240, code=0):
    paths = [str(Path(many_restores.__file__).parent), str(Path(sparsight.__file__).parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def assert_alike(folder, one, other):
    sparse, a, b = (load_file(folder / name / "model.safetensors") for name in ("sparse", one, other))
    trained = max(float((a[key] - sparse[key]).abs().max()) for key in a)
    apart = max(float((a[key] - b[key]).abs().max()) for key in a)
    print(f"{other}: trained by {trained:.3f}, {apart:.1e} apart from one process")
    assert apart < 1e-5 < 1e-3 < trained
    curves = [[row["loss"] for row in read_metrics(folder / name)["restore"]["curve"]] for name in (one, other)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsdp", "offload"))])
def test_two_processes_are_as_good_as_one(kind, folder):
    launch(*TWO, many_restores.__file__, folder, kind)
    for name in many_restores.JOBS:
        assert_alike(folder, f"one/{name}", f"{kind}/{name}")
        if name != "lora":
            proof = api.verify(folder / kind / name, against=folder / "sparse")
            assert (proof["differences"], proof["sparsity"]) == ({}, 0.5)
    held = [read_metrics(folder / k / "shared")["restore"]["held_out"] for k in ("one", kind)]
    assert [row["eval_loss"] for row in held[0]] == pytest.approx([row["eval_loss"] for row in held[1]], rel=1e-5)
    assert not list((folder / kind).glob("*.unfinished"))


@pytest.mark.slow
def test_accelerate_launch_on_the_command_line(folder):
    """The main process alone speaks and writes; wrong input is one line of it. (Without GPUs they meet on CPUs.)"""
    accelerate = Path(sys.executable).parent / "accelerate"
    launcher = (accelerate, "launch", "--multi_gpu", "--num_processes", 2, "-m", "sparsight")
    where = ("restore", folder / "sparse", folder / "ddp" / "cli", "--data", folder / "data")
    how = ("--steps", 4, "--lr", "5e-3", "--kl", "0.3", "--held-out", 3)
    done = launch(*launcher, *where, *how, "--batch-size", 2)
    assert done.stdout.count("wrote ") == 1
    alone = ("restore", folder / "sparse", folder / "one" / "cli", "--data", folder / "data")
    launch(sys.executable, "-m", "sparsight", *alone, *how, "--batch-size", 4)
    assert_alike(folder, "one/cli", "ddp/cli")
    done = launch(*launcher, *where, code=1)
    assert done.stderr.count("sparsight: ") == 1, done.stderr
    assert "ddp/cli: exists and is not empty" in done.stderr
