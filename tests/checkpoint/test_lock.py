"""The lock on an output folder: held by the living, taken over from the dead, left alone on other hosts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

import sparsight
from sparsight import SparsightError, api
from sparsight.checkpoint import lock
from sparsight.checkpoint.lock import lock_file, locked
from sparsight.errors import NotWritten

from zoo import digest

HOLD = """
import sys, time
from sparsight.checkpoint.lock import locked
with locked(sys.argv[1]):
    print(1, flush=True)
    time.sleep(99)
"""


@pytest.fixture
def holder(tmp_path):
    """A living process that holds the lock on `out`."""
    work = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert work.stdout.readline() == "1\n"
    yield work
    work.kill()
    work.wait()
    work.stdout.close()


def test_nothing_is_left_of_a_lock(tmp_path):
    out = tmp_path / "deep" / "deeper" / "out"
    with locked(out):
        assert not out.exists()
        assert json.loads(lock_file(out).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        with pytest.raises(SparsightError, match=rf"out: process {os.getpid()} on .* is writing to it; wait"), locked(out):
            pass
        assert lock_file(out).is_file()
    assert list(tmp_path.iterdir()) == []
    with locked(out):
        out.mkdir()
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", ["prune", "restore", "run", "sweep", "search", "save", "demo"])
def test_a_second_process_is_refused_before_anything_is_computed(
    verb, holder, zoo_folder, scenes, tmp_path, run, monkeypatch
):
    dense, out = zoo_folder("llava"), tmp_path / "out"
    (tmp_path / "recipe.yaml").write_text(f"model: {dense}\ndata: {scenes}\nheld_out: {scenes}\nprune: {{samples: 4}}\n")
    (tmp_path / "sweep.yaml").write_text((tmp_path / "recipe.yaml").read_text() + "grid: {sparsity: [0.5]}\n")
    if verb in ("restore", "save"):
        api.prune(dense, tmp_path / "sparse", method="magnitude")
    monkeypatch.setattr("sparsight.data.sources._open", None)  # reading data would fail
    if verb == "save":
        model, _ = sparsight.load(tmp_path / "sparse")
        with pytest.raises(SparsightError, match=f"process {holder.pid} on"):
            sparsight.save(model, out)
    else:
        words = {
            "prune": ["prune", dense, "out", "--data", scenes],
            "restore": ["restore", "sparse", "out", "--data", scenes],
            "run": ["run", "recipe.yaml", "out"],
            "sweep": ["sweep", "sweep.yaml", "out"],
            "search": ["search", dense, "out", "--data", scenes, "--held-out", scenes],
            "demo": ["demo", "out"],
        }[verb]
        code, printed, errors = run(*words)
        host = socket.gethostname()
        line = f"sparsight: out: process {holder.pid} on {host} is writing to it; wait for its end, or give another folder\n"
        assert (code, printed, errors.replace(f"{tmp_path}/", "")) == (2, "", line)
    assert not out.exists()
    assert not (tmp_path / "out.unfinished").exists()
    assert holder.poll() is None


def test_a_dead_process_s_lock_is_taken_over(holder, zoo_folder, scenes, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads(lock_file(tmp_path / "out").read_text())["pid"] == holder.pid
    api.prune(zoo_folder("llava"), tmp_path / "out", method="magnitude")
    api.prune(zoo_folder("llava"), tmp_path / "other", method="magnitude")
    assert digest(tmp_path / "out") == digest(tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_a_lock_of_another_host_names_the_file_to_delete(tmp_path):
    out = tmp_path / "out"
    lock_file(out).write_text('{"pid": 1, "host": "node7"}')
    with pytest.raises(SparsightError) as error, locked(out):
        pass
    wait = "process 1 on node7 is writing to it; wait for its end, or give another folder"
    assert str(error.value) == f"{out}: {wait}; if that job is dead, delete {lock_file(out)}"
    lock_file(out).unlink()
    with locked(out):
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x", "host": 1}', "\xff"])
def test_an_illegible_lock_that_nobody_holds_is_taken_over(text, tmp_path):
    lock_file(tmp_path / "out").write_text(text, encoding="latin-1")
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_system_the_process_is_looked_for(holder, tmp_path, monkeypatch):
    """As on some file systems of clusters."""
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "Function not implemented")))
    with pytest.raises(SparsightError, match=f"process {holder.pid} on"), locked(tmp_path / "out"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path / "out"):
        pass


def test_other_processes_of_a_launcher_do_not_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path / "out"):
        assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_parent_cannot_be_written_to_is_locked_inside(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with locked(out):
        assert [p.name for p in out.iterdir()] == [lock.INSIDE]
    assert list(out.iterdir()) == []


def test_no_lock_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(NotWritten, match=r"cannot be written to \(.*\); give another folder"),
        locked(tmp_path / "file" / "out"),
    ):
        pass
