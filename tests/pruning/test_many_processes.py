"""Several processes write the very bytes that one writes, and fail as one does. All are started as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparsight
from sparsight import api
from sparsight.checkpoint.folder import read_metrics
from sparsight.checkpoint.lock import locked
from sparsight.errors import Interrupted

import many
import zoo
from zoo import digest

LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
THREE = ("one batch", "swaps pcg", "experts of few tokens")
RESUMED = ("sparsegpt", "sparsegpt stage")


@pytest.fixture(scope="module")
def folder(zoo_folder, tmp_path_factory):
    """Models, data of which some samples have no image, and what one process writes."""
    there = tmp_path_factory.mktemp("many")
    for name in ("llava", "instructblip-t5", "qwen3-vl-moe"):
        (there / name).symlink_to(zoo_folder(name))
    for name, without in (("data", ()), ("mixed", (2, 3, 7)), ("texts", range(12))):
        (there / name).mkdir()
        lines = []
        for i, image in enumerate(zoo.images(12)):
            image.save(there / name / f"{i}.png")
            picture = {} if i in without else {"image": f"{i}.png"}
            lines.append(json.dumps({**picture, "prompt": "what color is this?", "answer": ("red", "two stars")[i % 2]}))
        (there / name / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        many.work(there, list(many.JOBS))
        (there / "1" / "errors.json").write_text(json.dumps([many.errors(there)]))
    finally:
        torch.set_num_threads(threads)
    return there


def launched(count, *words, **settings):
    paths = [str(Path(many.__file__).parent), str(Path(sparsight.__file__).parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [*LAUNCH, str(count), *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def finished(work, timeout=120):
    try:
        out, errors = work.communicate(timeout=timeout)
    finally:
        work.kill()
    return work.returncode, out, errors


def assert_same(folder, count, name):
    one, several = folder / "1" / name, folder / str(count) / name
    assert digest(several) == digest(one), name
    assert (several / "sparsity.json").read_bytes() == (one / "sparsity.json").read_bytes(), name
    measured = [read_metrics(path)["prune"] for path in (one, several)]
    assert measured[0].pop("memory")
    assert measured[0].pop("seconds")
    assert measured[1].pop("memory")
    assert measured[1].pop("seconds")
    assert measured[0] == measured[1], name


def vision_tokens(out):
    return read_metrics(out)["prune"]["tokens"]["model.vision_tower.encoder.layers.0"]["image"]


@pytest.mark.parametrize(("count", "names"), [(2, tuple(many.JOBS)), pytest.param(3, THREE, marks=pytest.mark.slow)])
def test_several_processes_write_and_say_what_one_does(count, names, folder):
    """Every way of pruning; some were interrupted on one process before and go on on several."""
    for name in RESUMED if count == 2 else ():
        model, how = many.JOBS[name]
        with pytest.raises(Interrupted):
            api.prune(folder / model, folder / "2" / name, data=folder / "data", progress=stop_at(3), **{**many.FEW, **how})
        assert many.unfinished(folder / "2" / name).is_dir()
    code, _, errors = finished(launched(count, many.__file__, folder, *names))
    assert code == 0, errors
    for name in names:
        assert_same(folder, count, name)
        assert not many.unfinished(folder / str(count) / name).exists()
    assert vision_tokens(folder / "1" / "sparsegpt text") * 2 == vision_tokens(folder / "1" / "one batch") * 9  # pictures
    (alone,) = json.loads((folder / "1" / "errors.json").read_text())
    for said in json.loads((folder / str(count) / "errors.json").read_text()):
        for name in ("reconstruct", "permute"):
            assert said.pop(name).startswith(f"`{name}`: looks at all batches at once and does not run on several processes")
        assert said == alone
    assert all(path.name.endswith(".unfinished") for path in folder.glob("error*"))  # nothing was written


def stop_at(count):
    def progress(note, done, total):
        if done == count:
            raise KeyboardInterrupt

    return progress


def test_several_processes_are_refused_a_folder_that_another_one_writes_to(folder, tmp_path):
    words = ["-m", "sparsight", "prune", folder / "llava", tmp_path / "out", "--data", folder / "data", "--quiet"]
    with locked(tmp_path / "out"):
        _, out, errors = finished(launched(2, *words))
    assert out == ""
    assert errors.count(f"sparsight: {tmp_path / 'out'}: process {os.getpid()} on ") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_line(folder, tmp_path):
    words = ("-m", "sparsight", "prune", folder / "llava", tmp_path / "out", "--sparsity", 1.5)
    code, out, errors = finished(launched(2, *words))
    assert code != 0
    assert out == ""
    assert errors.count("sparsight: ") == 1
    assert "exitcode  : 2" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_interrupted_processes_end_and_go_on(folder, tmp_path):
    """On the command line: no process is left, one line is said; then one table, one bar, one folder."""
    out = tmp_path / "out"
    words = ("-m", "sparsight", "prune", folder / "llava", out, "--data", folder / "texts", "--samples", 10)
    words += ("--batch-size", 2, "--method", "sparsegpt", "--sparsity", "language=0.6")
    work = launched(2, *words, start_new_session=True)
    while not list((many.unfinished(out) / "done").glob("*.json")):
        assert work.poll() is None, work.communicate()
        time.sleep(0.002)
    os.killpg(work.pid, signal.SIGINT)  # what Ctrl-C does
    code, _, errors = finished(work, 60)
    assert code != 0
    assert errors.count("sparsight: interrupted; what was done is in") == 1, errors
    with pytest.raises(ProcessLookupError):
        os.killpg(work.pid, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]

    code, printed, errors = finished(launched(2, *words, "--resume"))
    assert code == 0, errors
    assert printed.count("wrote") == 1
    assert errors.count("prune: 3/3") == 1
    assert digest(out) == digest(folder / "1" / "no pictures")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
