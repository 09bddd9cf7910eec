"""Ctrl-C, crashes and full disks: nothing half-written, nothing lost, and a line about how to go on."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from sparsight import SparsightError, api, distributed, signals
from sparsight.checkpoint.folder import read_metrics
from sparsight.cli import commands
from sparsight.errors import Interrupted
from sparsight.restoring.callbacks import ProgressCallback
from sparsight.restoring.checkpoints import last_checkpoint

from zoo import digest

COMMAND = [sys.executable, "-m", "sparsight"]


def stop_at(count):
    def progress(note, done, total):
        if done == count:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("propagate", ["block", "dense"])
def test_prune_goes_on_from_the_last_finished_block(propagate, zoo_folder, scenes, tmp_path):
    dense, how = zoo_folder("instructblip-t5"), {"sparsity": 0.6, "samples": 8, "propagate": propagate}
    api.prune(dense, tmp_path / "whole", data=scenes, **how)
    with pytest.raises(Interrupted, match=r"out\.unfinished: the same command with `resume` goes on"):
        api.prune(dense, tmp_path / "out", data=scenes, progress=stop_at(3), **how)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.unfinished" / "done").iterdir())) == 3
    api.prune(dense, tmp_path / "out", data=scenes, resume=True, **how)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not (tmp_path / "out.unfinished").exists()


def test_a_resumed_method_that_rewrites_weights(zoo_folder, scenes, tmp_path):
    def shrink(W, moments, pattern, generator):
        return (W * 0.9).masked_fill(~pattern.keep(W.abs().float() * moments.norm), 0)

    how = {"data": scenes, "samples": 8, "method": shrink}
    api.prune(zoo_folder("llava"), tmp_path / "whole", **how)
    with pytest.raises(Interrupted):
        api.prune(zoo_folder("llava"), tmp_path / "out", progress=stop_at(2), **how)
    api.prune(zoo_folder("llava"), tmp_path / "out", resume=True, **how)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_restore_goes_on_from_the_last_checkpoint(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    how = {"data": scenes, "steps": 8, "batch_size": 4, "lr": 5e-3, "save_every": 3}
    api.restore(tmp_path / "sparse", tmp_path / "whole", **how)
    with pytest.raises(Interrupted, match="`resume` goes on"):
        api.restore(tmp_path / "sparse", tmp_path / "out", progress=stop_at(5), **how)
    assert not (tmp_path / "out").exists()
    steps = []
    done = api.restore(tmp_path / "sparse", tmp_path / "out", resume=True, progress=lambda _, i, n: steps.append(i), **how)
    assert steps == [4, 5, 6, 7, 8]
    assert [row["step"] for row in done.metrics["restore"]["curve"]] == list(range(1, 9))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_resume_refuses_other_work(zoo_folder, scenes, tmp_path):
    dense = zoo_folder("llava")
    with pytest.raises(SparsightError, match="there is no interrupted work"):
        api.prune(dense, tmp_path / "out", data=scenes, resume=True)
    with pytest.raises(Interrupted):
        api.prune(dense, tmp_path / "out", data=scenes, progress=stop_at(1))
    with pytest.raises(SparsightError, match=r"had sparsity=None, this command has 0\.7"):
        api.prune(dense, tmp_path / "out", data=scenes, resume=True, sparsity=0.7)
    assert (tmp_path / "out.unfinished").is_dir()


def started(*words, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, **kwargs
    )


def test_ctrl_c_on_the_command_line(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    work = started("restore", tmp_path / "sparse", tmp_path / "out", "--data", scenes, "--steps", 100_000)
    line = work.stderr.readline()  # the first line of progress
    assert line.startswith("restore: 1/100000")
    time.sleep(0.5)
    work.send_signal(signal.SIGINT)
    try:
        _, rest = work.communicate(timeout=60)
    finally:
        work.kill()
    assert work.returncode == 130
    last = rest.strip().splitlines()[-1]
    assert last.startswith("sparsight: interrupted; what was done is in")
    assert "--resume" in last
    assert "Traceback" not in rest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.unfinished", "sparse"]
    assert last_checkpoint(tmp_path / "out.unfinished") is not None  # the step that was under way is not lost


def test_a_crash_costs_one_block(zoo_folder, scenes, tmp_path):
    """Any error that is not the user's keeps what was done; starting over has to be said."""

    def crash(note, done, total):
        if done == 3:
            raise RuntimeError("out of memory")

    dense, how = zoo_folder("llava"), {"data": scenes, "samples": 8}
    api.prune(dense, tmp_path / "whole", **how)
    with pytest.raises(RuntimeError, match="out of memory") as error:
        api.prune(dense, tmp_path / "out", progress=crash, **how)
    assert "`resume` goes on" in error.value.__notes__[0]
    with pytest.raises(SparsightError, match="holds interrupted work; go on with `resume`, or start over with `overwrite`"):
        api.prune(dense, tmp_path / "out", **how)
    api.prune(dense, tmp_path / "out", resume=True, **how)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    "damaged",
    [
        "sparse_lora.safetensors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("optimizer.pt", "complete.json", "all")),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(damaged, zoo_folder, scenes, tmp_path, caplog):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    how = {"data": scenes, "steps": 6, "batch_size": 4, "lr": 5e-3, "save_every": 2}
    api.restore(tmp_path / "sparse", tmp_path / "whole", **how)
    with pytest.raises(Interrupted):
        api.restore(tmp_path / "sparse", tmp_path / "out", progress=stop_at(5), **how)
    assert last_checkpoint(tmp_path / "out.unfinished").name == "checkpoint-4"
    for path in (tmp_path / "out.unfinished").glob(f"checkpoint-{'*' if damaged == 'all' else 4}"):
        file = path / ("optimizer.pt" if damaged == "all" else damaged)
        file.write_bytes(file.read_bytes()[:-9])
    steps = []
    api.restore(tmp_path / "sparse", tmp_path / "out", resume=True, progress=lambda _, i, n: steps.append(i), **how)
    assert steps == ([1, 2, 3, 4, 5, 6] if damaged == "all" else [3, 4, 5, 6])
    assert "checkpoint-4 is damaged" in caplog.text
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["shared", pytest.param("cached", marks=pytest.mark.slow)])
def test_killed_at_any_step_it_comes_to_the_same_weights(mode, zoo_folder, scenes, tmp_path):
    """kill -9 at steps of chance, again and again; what is written in the end is the uninterrupted run's, bit for bit."""
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    words = ["--data", scenes, "--steps", 27, "--batch-size", 4, "--lr", "5e-3", "--save-every", 3, "--held-out", 3]
    words += ["--teacher-mode", mode, "--accumulate", 2, "--adapter", "sparselora", "--quiet"]
    whole = started("restore", tmp_path / "sparse", tmp_path / "whole", *words)
    kills, resume, g = 0, [], random.Random(mode)
    while kills < 2:
        work = started("restore", tmp_path / "sparse", tmp_path / "out", *words, *resume)
        newest, patience = last_step(tmp_path), time.monotonic() + 60
        while last_step(tmp_path) <= newest and work.poll() is None and time.monotonic() < patience:
            time.sleep(0.01)
        time.sleep(g.random() * 0.2)
        if work.poll() is not None:
            break
        work.kill()
        work.communicate(timeout=60)
        kills, resume = kills + 1, ["--resume"]
    if not (tmp_path / "out").exists():
        last = started("restore", tmp_path / "sparse", tmp_path / "out", *words, "--resume")
        _, errors = last.communicate(timeout=120)
        assert last.returncode == 0, errors
    whole.communicate(timeout=120)
    assert kills == 2
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    curves = [read_metrics(tmp_path / name)["restore"] for name in ("out", "whole")]
    assert curves[0]["held_out"] == curves[1]["held_out"]
    assert [row["step"] for row in curves[0]["curve"]] == list(range(1, 28))


def last_step(folder):
    found = [int(path.parent.name.split("-")[1]) for path in folder.glob("out.unfinished/checkpoint-*/complete.json")]
    return max(found, default=0)


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("method", [pytest.param("magnitude", marks=pytest.mark.slow), "wanda"])
def test_a_disk_without_room_for_the_model(method, zoo_folder, scenes, tmp_path):
    """Files above 60 kB cannot be written: that is said before a block is pruned, and nothing is left behind."""
    words = ["prune", zoo_folder("llava"), tmp_path / "deep" / "out", "--method", method, "--quiet"]
    if method == "wanda":
        words += ["--data", scenes, "--samples", 8]
    work = started(*words, preexec_fn=small_files)
    _, errors = work.communicate(timeout=120)
    assert work.returncode == 2
    assert errors.count("\n") == 1
    assert "could not be written" in errors
    assert "nothing was left behind" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_disk_that_fills_up_after_the_last_block(links, zoo_folder, scenes, tmp_path, monkeypatch):
    """What was pruned is kept, and with room on the disk the same command goes on from there."""
    how = {"data": scenes, "samples": 8}
    api.prune(zoo_folder("llava"), tmp_path / "whole", **how)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if not links:
        monkeypatch.setattr(os, "link", full)
    with monkeypatch.context() as patch:
        patch.setattr("sparsight.checkpoint.folder.set_modes", full)
        with pytest.raises(SparsightError, match="`resume` goes on from there"):
            api.prune(zoo_folder("llava"), tmp_path / "deep" / "out", **how)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out.unfinished"]
    api.prune(zoo_folder("llava"), tmp_path / "deep" / "out", resume=True, **how)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    assert digest(tmp_path / "deep" / "out") == digest(tmp_path / "whole")


def test_a_disk_that_fills_up_while_restoring(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    words = ["restore", tmp_path / "sparse", tmp_path / "out", "--data", scenes, "--steps", 2, "--batch-size", 4, "--quiet"]
    work = started(*words, preexec_fn=small_files)
    _, errors = work.communicate(timeout=120)
    assert work.returncode == 2
    assert "could not be written" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    if (tmp_path / "out.unfinished").exists():  # with room on the disk it goes on, from the last good checkpoint
        assert "--resume goes on from there" in errors
        for name, resume in (("out", True), ("whole", False)):
            api.restore(tmp_path / "sparse", tmp_path / name, data=scenes, steps=2, batch_size=4, resume=resume)
        assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("sent", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_sigterm_is_ctrl_c(sent, zoo_folder, scenes, tmp_path):
    """A second signal within a second is the same one, as `timeout` and schedulers send it."""
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    work = started("restore", tmp_path / "sparse", tmp_path / "out", "--data", scenes, "--steps", 100_000)
    work.stderr.readline()  # the first line of progress
    for number in sent:
        work.send_signal(number)
        time.sleep(0.01)
    try:
        _, rest = work.communicate(timeout=60)
    finally:
        work.kill()
    assert work.returncode == (143 if sent[0] == signal.SIGTERM else 130)
    assert rest.strip().splitlines()[-1].startswith("sparsight: interrupted; what was done is in")
    assert "Traceback" not in rest
    assert last_checkpoint(tmp_path / "out.unfinished") is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.unfinished", "sparse"]


@pytest.mark.parametrize("verb", ["prune", "eval", "run", "sweep", "inspect"])
def test_sigterm_in_every_verb(verb, zoo_folder, scenes, tmp_path, run, monkeypatch):
    """One line, exit code 143, and the same bytes when it goes on."""

    def stop(note, done, total):
        if verb != "prune" or done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def display(title, quiet):
        yield stop

    dense = zoo_folder("llava")
    (tmp_path / "recipe.yaml").write_text(f"model: {dense}\ndata: {scenes}\nheld_out: {scenes}\nprune: {{samples: 4}}\n")
    (tmp_path / "sweep.yaml").write_text((tmp_path / "recipe.yaml").read_text() + "grid: {sparsity: [0.5]}\n")
    words = {
        "prune": ["prune", dense, "out", "--data", scenes, "--samples", 8],
        "eval": ["eval", dense, "--data", scenes],
        "run": ["run", "recipe.yaml", "out"],
        "sweep": ["sweep", "sweep.yaml", "out"],
        "inspect": ["inspect", dense],
    }[verb]
    if verb == "inspect":
        monkeypatch.setattr(api, "inspect", lambda model, **_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(commands, "progress_display", display)
    try:
        code, out, errors = run(*words)
    finally:  # they stay until the process has ended
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert (code, out, errors.count("\n")) == (143, "", 1)
    assert errors.startswith("sparsight: interrupted; ")
    monkeypatch.undo()
    if verb == "prune":
        assert len(list((tmp_path / "out.unfinished" / "done").iterdir())) == 2
        monkeypatch.chdir(tmp_path)
        api.prune(dense, "out", data=scenes, samples=8, resume=True)
        api.prune(dense, "whole", data=scenes, samples=8)
        assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_later_signal_stops_at_once():
    heard = []
    with signals.listening(heard.append) as stops:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [stops.stop]
        stops._began -= 2 * signals.SAME
        with pytest.raises(signals.Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_an_inner_listener_heard_is_not_heard_again_by_the_outer_one():
    outer, inner = [], []
    with signals.listening(outer.append) as stops:
        with signals.listening(inner.append):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (outer, inner) == ([], [stops.stop])


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda *_: None])
def test_a_caller_s_own_handler_of_sigterm_stays(own):
    before = signal.signal(signal.SIGTERM, own)
    try:
        with signals.listening(lambda stop: None):
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_while_processes_agree_is_kept_for_the_next_step(monkeypatch):
    watching = ProgressCallback(None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda stops: setattr(watching, "stop", True))
    assert not watching._stop_anywhere("cpu")
    assert watching._stop_anywhere("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_stopped(number, zoo_folder, scenes, tmp_path):
    """Both processes stop after the same step, the main one says so, and `--resume` goes on."""
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    words = ["restore", tmp_path / "sparse", tmp_path / "out", "--data", scenes, "--steps", 100_000, "--batch-size", 2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sparsight"]
    work = subprocess.Popen(
        [*launcher, *map(str, words)], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while "restore: " not in (line := work.stderr.readline()):
        assert line
    work.send_signal(number)
    try:
        _, rest = work.communicate(timeout=90)
    finally:
        work.kill()
    assert rest.count("sparsight: interrupted; what was done is in") == 1
    assert last_checkpoint(tmp_path / "out.unfinished") is not None
