"""Errors in the midst of work: memory that runs out, NaN, a sample that is refused. The line names only what helps."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsight import SparsightError, api
from sparsight.checkpoint.folder import read_metrics
from sparsight.cli import app, commands
from sparsight.demo import tour
from sparsight.errors import OutOfMemory
from sparsight.memory import is_out_of_memory

from zoo import digest

SMALL = tour.Effort(train=48, test=2, steps=3)
KINDS = {
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    "CPU": lambda: torch.empty(1 << 55, dtype=torch.uint8),
    "Python": lambda: MemoryError(),
}


def run_out(kind):
    error = KINDS[kind]()
    if isinstance(error, BaseException):
        raise error


def at(count, act, notes=("",)):
    """Progress that acts at a step, of the first stage whose notes begin so."""

    def progress(note, done, total):
        if done == count and note.startswith(tuple(notes)):
            act()

    return progress


@contextlib.contextmanager
def displayed(monkeypatch, progress):
    """The command line reports its progress to this function."""
    with monkeypatch.context() as patch:
        patch.setattr(commands, "progress_display", lambda title, quiet: contextlib.nullcontext(progress))
        yield


@pytest.fixture
def sparse(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    return tmp_path / "sparse"


def test_what_is_no_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_runs_out_while_pruning(kind, zoo_folder, scenes, tmp_path, run, monkeypatch):
    words = ["prune", zoo_folder("llava"), "out", "--data", scenes, "--samples", 8]
    with displayed(monkeypatch, at(2, lambda: run_out(kind))):
        code, out, errors = run(*words)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("sparsight: out of memory (")
    assert (
        "lower --batch-size (it is 8) or --samples (it is 8), use --dtype bfloat16, or leave long samples out by" in errors
    )
    assert errors.endswith(
        "start over with --overwrite, which deletes out.unfinished; or with more memory --resume goes on\n"
    )
    api.prune(words[1], "whole", data=scenes, samples=8)
    assert run(*words, "--resume")[0] == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_memory_runs_out_at_once(zoo_folder, scenes, run, monkeypatch, tmp_path):
    monkeypatch.setattr("sparsight.pruning.verb.check_walk", lambda *_: run_out("CPU"))
    _, _, errors = run("prune", zoo_folder("llava"), "out", "--data", scenes, "--batch-size", 1, "--samples", 1)
    assert "out of memory" in errors
    assert "resume" not in errors
    assert "--batch-size" not in errors
    assert list(tmp_path.iterdir()) == []


def test_memory_runs_out_while_answering(zoo_folder, scenes, run, monkeypatch):
    with displayed(monkeypatch, at(12, lambda: run_out("GPU"))):
        code, out, errors = run("eval", zoo_folder("llava"), "--data", scenes)
    assert (code, out) == (2, "")
    lower = "lower --batch-size (it is 32), use --dtype bfloat16, or leave long samples out by --max-length with --skip-bad"
    assert errors == f"sparsight: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); {lower}\n"


def test_memory_runs_out_while_restoring_and_half_a_batch_goes_on(sparse, scenes, run, monkeypatch, tmp_path):
    """The same samples in the same order: the losses are those of the run that was not interrupted."""
    words = ["restore", "sparse", "out", "--data", scenes, "--steps", 6, "--lr", "5e-3", "--save-every", 2, "--held-out", 3]
    with displayed(monkeypatch, at(5, lambda: run_out("GPU"))):
        code, _, errors = run(*words, "--batch-size", 4)
    assert (code, errors.count("\n")) == (2, 1)
    assert "); --batch-size 2 with --accumulate 2 takes the same steps, or add --gradient-checkpointing; what" in errors
    assert errors.endswith("what was done is in out.unfinished: with these settings --resume goes on from there\n")
    steps = []
    with displayed(monkeypatch, lambda note, done, total: steps.append(done)):
        assert run(*words, "--batch-size", 2, "--accumulate", 2, "--gradient-checkpointing", "--resume")[0] == 0
    assert steps[-4:] == [3, 4, 5, 6] if 3 in steps else [5, 6]
    whole = api.restore(sparse, "whole", data=scenes, steps=6, lr=5e-3, save_every=2, held_out=3, batch_size=4)
    found = read_metrics(tmp_path / "out")["restore"]
    for name, key in (("curve", "loss"), ("held_out", "eval_loss")):
        expected = [row[key] for row in whole.metrics["restore"][name]]
        assert [row[key] for row in found[name]] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ({"batch_size": 1, "accumulate": 4}, None),
        ({"teacher_mode": "live"}, None),
        ({"teacher_mode": "cached", "accumulate": 4, "batch_size": 1}, None),
        ({"batch_size": 4}, r"had batch_size\*accumulate=4, this command has 8; use the same settings, or start over"),
        ({"lr": 0.1}, r"had lr=0\.005, this command has 0\.1"),
        ({"tune": "language"}, "had tune="),
    ],
)
def test_what_may_change_when_work_goes_on(then, says, sparse, scenes, tmp_path):
    def stop():
        raise KeyboardInterrupt

    how = {"data": scenes, "steps": 4, "batch_size": 2, "accumulate": 2, "lr": 5e-3, "save_every": 2}
    with pytest.raises(BaseException, match="interrupted"):
        api.restore(sparse, tmp_path / "out", progress=at(3, stop), **how)
    if says is not None:
        with pytest.raises(SparsightError, match=says):
            api.restore(sparse, tmp_path / "out", resume=True, **{**how, **then})
        return
    done = api.restore(sparse, tmp_path / "out", resume=True, **{**how, **then}).metrics["restore"]
    whole = api.restore(sparse, tmp_path / "whole", **how).metrics["restore"]
    losses = [[row["loss"] for row in each["curve"]] for each in (done, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_the_same_command_would_meet_again(sparse, scenes, run, monkeypatch):
    """No advice to resume; a file that is gone can be put back."""

    def refuse():
        raise SparsightError("sample 'x': is too wide")

    def lose():
        try:
            Path("gone.png").read_bytes()
        except OSError as error:
            raise SparsightError("sample 'x': gone.png cannot be read") from error

    words = ["restore", "sparse", "out", "--data", scenes, "--steps", 6, "--batch-size", 4, "--save-every", 2, "--overwrite"]
    with displayed(monkeypatch, at(5, refuse)):
        _, _, errors = run(*words)
    assert errors == "sparsight: sample 'x': is too wide; start over with --overwrite, which deletes out.unfinished\n"
    with displayed(monkeypatch, at(5, lose)):
        _, _, errors = run(*words)
    assert errors.endswith("what was done is in out.unfinished: once that is mended, --resume goes on from there\n")
    _, _, errors = run(*words, "--lr", "1e30", "--save-every", 1)
    assert "the loss became NaN or infinite after step" in errors
    assert "lower --lr (it is 1e+30)" in errors
    assert "--resume" not in errors


def overflow(folder):
    """Weights whose products are beyond float16."""
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if "layers.0.mlp.up_proj" in n)
    tensors[name] = tensors[name].sign() * 3e4
    down = name.replace("up_proj", "down_proj")
    tensors[down] = tensors[down].sign() * 3e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_float16_that_overflows_is_named_alike_everywhere(sparse, scenes, run):
    (sparse / "sparsity.json").unlink()
    overflow(sparse)
    says = "float16 overflows in this model: compute in bfloat16 or float32, by --dtype"
    _, _, errors = run("eval", sparse, "--data", scenes, "--dtype", "float16", "--max-new-tokens", 1)
    assert says in errors
    _, _, errors = run("restore", sparse, "out", "--data", scenes, "--kl", 0, "--dtype", "float16", "--steps", 1)
    assert says in errors
    _, _, errors = run("prune", sparse, "out", "--data", scenes, "--dtype", "float16")
    assert says in errors
    assert run("eval", sparse, "--data", scenes, "--max-new-tokens", 1)[0] == 0


def test_a_run_names_the_keys_of_its_recipe_and_goes_on(zoo_folder, scenes, run, monkeypatch, tmp_path):
    text = f"model: {zoo_folder('llava')}\ndata: {scenes}\nheld_out: {scenes}\nprune: {{samples: 4}}\n"
    text += "restore: {steps: 4, batch_size: 4, lr: 1e-3, save_every: 1}\nevaluate: {max_new_tokens: 2}\n"
    (tmp_path / "r.yaml").write_text(text)
    words = ["run", "r.yaml", "out"]
    with displayed(monkeypatch, at(12, lambda: run_out("GPU"), ["dense"])):
        _, _, errors = run(*words)
    assert "; lower evaluate.batch_size (it is 32), use dtype=bfloat16, or leave long samples out by max_length" in errors
    assert "--" not in errors
    with displayed(monkeypatch, at(2, lambda: run_out("GPU"), ["prune"])):
        _, _, errors = run(*words, "evaluate.batch_size=8")
    assert "lower prune.batch_size (it is 8) or prune.samples (it is 4)" in errors
    assert errors.endswith("with other settings delete out/pruned.unfinished first, or give another folder\n")
    shutil.rmtree(tmp_path / "out" / "pruned.unfinished")
    words.append("prune.batch_size=2")
    with displayed(monkeypatch, at(3, lambda: run_out("GPU"), ["restore"])):
        _, _, errors = run(*words, "evaluate.batch_size=8")
    assert "restore.batch_size=2 with restore.accumulate=2 takes the same steps, or add restore.gradient_check" in errors
    assert errors.endswith("what was done is in out/restored.unfinished: the same command goes on from there\n")
    assert "--" not in errors
    changes = ["restore.batch_size=2", "restore.accumulate=2", "restore.gradient_checkpointing=true"]
    _, _, errors = run(*words, *changes, "evaluate.batch_size=4", "restore.lr=1")
    assert "holds a run with restore=" in errors
    code, _, errors = run(*words, *changes, "evaluate.batch_size=4", "--quiet")
    assert code == 0, errors


def test_a_sweep_names_the_keys_of_its_recipe(zoo_folder, scenes, tmp_path):
    text = f"model: {zoo_folder('llava')}\ndata: {scenes}\nheld_out: {scenes}\nprune: {{samples: 4}}\n"
    (tmp_path / "r.yaml").write_text(text + "restore: {steps: 2, lr: 1e-3}\ngrid: {sparsity: [0.5]}\n")

    def out_of_memory(note, done, total):
        if note.startswith("restore: ") and "1 of" in note:
            run_out("GPU")

    with pytest.raises(OutOfMemory, match=r"`restore\.batch_size=16` with `restore\.accumulate=2`") as error:
        api.sweep(tmp_path / "r.yaml", tmp_path / "out", progress=out_of_memory)
    assert "`resume`" not in str(error.value)


def test_an_interrupted_demo_has_no_resume(run, monkeypatch):
    def progress(note, done, total):
        if note.startswith("restore"):
            raise KeyboardInterrupt

    monkeypatch.setattr(tour, "Effort", lambda: SMALL)
    monkeypatch.setattr(app, "progress_display", lambda title, quiet: contextlib.nullcontext(progress))
    code, _, errors = run("demo", "out")
    assert code == 130
    assert errors == "sparsight: interrupted; the demo begins again with --overwrite, which replaces out\n"
    code, _, errors = run("demo", "out")
    assert code == 2
    assert "add --overwrite" in errors
