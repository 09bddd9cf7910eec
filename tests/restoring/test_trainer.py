"""The loss that is trained is the loss that is said, whatever the family, the batches and their accumulation."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from sparsight import SparsightError, anatomy, api, load, load_adapter
from sparsight.data import Encoder, read
from sparsight.data.encoding import select_answers
from sparsight.errors import Interrupted, NotWritten
from sparsight.restoring.checkpoints import last_checkpoint, seal
from sparsight.restoring.order import Shuffled
from sparsight.restoring.side_effects import checkpointed_blocks
from sparsight.restoring.student import make_student
from sparsight.restoring.trainer import peak_rate, train
from sparsight.specs import RestoreSpec


@pytest.mark.parametrize("name", ["instructblip-t5", "llava"])
@pytest.mark.parametrize(("accumulate", "reduction"), [(1, "token"), (2, "token"), (2, "root")])
def test_the_loss_is_a_mean_over_all_answer_tokens_of_a_step(name, accumulate, reduction, zoo_folder, scenes, tmp_path):
    """Batches of one sample have very different numbers of answer tokens; the logged sums are the ground truth."""
    api.prune(zoo_folder(name), tmp_path / "sparse", data=scenes, samples=8)
    how = {"batch_size": 1, "accumulate": accumulate, "kl": 0.4, "temperature": 2.0, "lr": 1e-4, "reduction": reduction}
    done = api.restore(tmp_path / "sparse", tmp_path / "out", data=scenes, steps=4, **how)
    curve = done.metrics["restore"]["curve"]
    assert [row["loss"] for row in curve] == pytest.approx([0.6 * r["ce"] + 1.6 * r["kl"] for r in curve], rel=1e-4)
    assert len(curve) == 4


def test_the_default_rate_is_the_adapter_s_and_falls_with_the_size_of_the_model():
    """By hand: 1e-3 (1.5e8 / n)^0.4, at most 4e-3, in two digits; a rate that is named is taken as it is."""
    rates = [peak_rate(RestoreSpec(), weights) for weights in (1_000, 3_000_000, 150_000_000, 7_000_000_000)]
    assert rates == [4e-3, 4e-3, 1e-3, 2.1e-4]
    assert [peak_rate(RestoreSpec(adapter=name), 150_000_000) for name in ("lora", "masked-full")] == [5e-4, 1.5e-4]
    assert peak_rate(RestoreSpec(lr=1.234e-5), 3_000_000) == 1.234e-5


def test_the_preset_of_the_paper_fills_in_what_is_not_named(sparse, scenes):
    """No warm-up, no decay: every logged rate is 1e-4. What is written beside the weights is the same record again."""
    spec = RestoreSpec(preset="paper", kl=0.5)
    assert (spec.lr, spec.kl, spec.scheduler, spec.warmup, spec.clip) == (1e-4, 0.5, "constant", 0.0, 0.0)
    assert RestoreSpec.of(spec.facts()).facts() == spec.facts()
    plain = RestoreSpec()
    assert (plain.lr, plain.kl, plain.scheduler, plain.warmup, plain.clip) == (None, 0.1, "cosine", 0.03, 1.0)
    found = restored(sparse, "out", scenes, preset="paper", lr=None)
    assert found["lr"] == 1e-4
    assert {row["learning_rate"] for row in found["curve"]} == {1e-4}
    assert restored(sparse, "out", scenes, lr=None)["lr"] == 4e-3
    with pytest.raises(SparsightError, match=r"`preset`: unknown preset 'papr'; did you mean paper"):
        RestoreSpec(preset="papr")


def test_ranks_are_per_component(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    api.restore(
        tmp_path / "sparse", tmp_path / "out", data=scenes, steps=1, batch_size=2, rank="vision=3,language=5",
        save_adapter=True,
    )  # fmt: skip
    ranks: dict[str, set[int]] = {}
    for key, tensor in load_file(tmp_path / "out" / "adapter" / "sparse_lora.safetensors").items():
        part = next(word for word in ("vision", "projector", "language") if word in key)
        ranks.setdefault(part, set()).add(min(tensor.shape))
    assert ranks == {"vision": {3}, "projector": {2}, "language": {5}}


def test_the_newest_whole_checkpoint(tmp_path, caplog):
    """Never finished, cut short or altered: passed over, with a line for each."""
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 100, 200, 300):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"0123456789")
        if step != 100:
            seal(folder)
    (tmp_path / "checkpoint-200" / "optimizer.pt").write_bytes(b"01234")
    (tmp_path / "checkpoint-300" / "complete.json").write_bytes(b"{")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert [r.getMessage().split(" is damaged")[0][-3:] for r in caplog.records] == ["300", "200", "100"]


def test_training_leaves_the_thread_as_it_was(zoo_folder, scenes, tmp_path):
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    api.restore(tmp_path / "sparse", tmp_path / "out", data=scenes, steps=1, batch_size=2)
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)


@pytest.fixture
def sparse(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    return tmp_path / "sparse"


def restored(sparse, out, scenes, **how):
    settings = {"steps": 6, "batch_size": 4, "lr": 5e-3, "save_every": 2, "overwrite": True, **how}
    return api.restore(sparse, sparse.parent / out, data=scenes, **settings).metrics["restore"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_best_checkpoint_is_kept_and_patience_ends_the_rest(sparse, scenes):
    """A rate that soon makes it worse: training stops early, and what is written is the best, not the last."""
    found = restored(sparse, "out", scenes, held_out=4, lr=0.3, steps=40, patience=2, scheduler="constant")
    rows = found["held_out"]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert found["best_step"] == best["step"]
    assert rows[-1]["step"] == best["step"] + 2 * 2 < 40
    assert found["held_out_samples"] == 4
    other = restored(sparse, "other", scenes, held_out=4, lr=0.3, steps=40, patience=2, scheduler="constant", resume=False)
    assert other["held_out"] == rows
    assert all(
        torch.equal(a, b) for a, b in zip(*(weights(sparse.parent / n).values() for n in ("out", "other")), strict=True)
    )


@pytest.mark.parametrize(("reduction", "power"), [("token", 0.0), ("root", 0.5), ("answer", 1.0)])
def test_the_held_out_loss_is_that_of_the_model_that_is_written(reduction, power, sparse, scenes):
    """Data of its own, mean by the weights of tokens, whatever the batches; scored on the merged model it is the same."""
    found = restored(sparse, "out", scenes, held_out=str(scenes), kl=0.0, batch_size=5, reduction=reduction)
    model, processor = load(sparse.parent / "out")
    batch = Encoder(processor, model).encode(list(read(scenes)))
    with torch.no_grad():
        logits, targets = select_answers(model(**batch.inputs).logits, batch.inputs["labels"], True)
    weight = torch.cat([torch.full((n,), n**-power) for n in (batch.inputs["labels"] != -100).sum(1).tolist()])
    loss = float((torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum())
    assert min(row["eval_loss"] for row in found["held_out"]) == pytest.approx(loss, rel=1e-4)
    assert [row["step"] for row in found["held_out"]] == [0, 2, 4, 6]


def test_the_start_is_written_where_no_training_beats_it(sparse, scenes):
    """At a rate that destroys the model the weights stay as they were; patience counts from the start.

    (At such rates SparseLoRA meets NaN on some CPUs, and not on others.)
    """
    how = {"held_out": 4, "lr": 30.0, "steps": 40, "patience": 2, "scheduler": "constant", "adapter": "hira"}
    found = restored(sparse, "out", scenes, **how)
    assert (found["best_step"], [row["step"] for row in found["held_out"]]) == (0, [0, 2, 4])
    before, after = weights(sparse), weights(sparse.parent / "out")
    assert all(torch.equal(before[key], W) for key, W in after.items())

    def stop(note, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        restored(sparse, "other", scenes, progress=stop, **{**how, "overwrite": False})
    again = restored(sparse, "other", scenes, resume=True, **{**how, "overwrite": False})
    assert again["held_out"] == found["held_out"]
    assert all(torch.equal(before[key], W) for key, W in weights(sparse.parent / "other").items())


def test_the_norm_of_gradients_is_a_setting(sparse, scenes):
    """A small one changes the weights, and the recipe beside them has it."""
    folders = {}
    for clip in (1.0, 0.01):
        restored(sparse, f"out{clip}", scenes, clip=clip)
        folders[clip] = sparse.parent / f"out{clip}"
    one, other = (weights(folder) for folder in folders.values())
    assert any(not torch.equal(one[key], W) for key, W in other.items())
    assert "clip: 0.01" in (folders[0.01] / "recipe.yaml").read_text()


def test_held_out_samples_are_never_trained_on(sparse, scenes):
    seen = set()
    student = make_student(sparse, None, list(read(scenes))[:9], list(read(scenes))[9:])
    encode = student.encoder.encode
    student.encoder.encode = lambda samples: seen.update(s.id for s in samples) or encode(samples)
    train(student, RestoreSpec(kl=0.0, steps=9, batch_size=2, save_every=100), sparse.parent / "folder")
    learned = {sample.id for sample in student.samples[:9]}
    assert seen == {sample.id for sample in student.samples}  # the held-out ones when they were scored
    order = Shuffled(list(enumerate(student.samples[:9])), 36, seed=3)
    passes = [[sample.id for _, sample in (order[i] for i in range(9 * k, 9 * k + 9))] for k in range(4)]
    assert all(set(one) == learned for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] == [Shuffled(order.numbered, 9, seed=3)[i][1].id for i in range(9)]


def test_the_samples_of_a_step_stand_by_length(sparse, scenes):
    """So that the batches that a step is divided into have little padding; which samples a step has stays the same."""
    samples = [replace(sample, images=sample.images if i % 3 else ()) for i, sample in enumerate(list(read(scenes))[:11])]
    numbered = list(enumerate(samples))
    drawn, sorted_ = Shuffled(numbered, 24, seed=3), Shuffled(numbered, 24, seed=3, step=6)
    for first in range(0, 24, 6):
        step = [sorted_[i] for i in range(first, first + 6)]
        assert sorted(i for i, _ in step) == sorted(drawn[i][0] for i in range(first, first + 6))
        sizes = [(len(one.images), len(one.system + one.turns[0].prompt + one.turns[0].answer)) for _, one in step]
        assert sizes == sorted(sizes, reverse=True)
    assert [i for i, _ in map(sorted_.__getitem__, (7, 2, 23))] == [[i for i, _ in sorted_][place] for place in (7, 2, 23)]


def test_divided_steps_are_the_same_steps_with_less_padding(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    rows = [{"prompt": "what? " * (1 + 40 * (i % 2)), "answer": "a"} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes, curves, weights = {}, {}, {}
    encode = Encoder.encode
    for accumulate in (1, 4):
        seen = sizes[accumulate] = []

        def noted(self, given, seen=seen):
            batch = encode(self, given)
            seen.append(tuple(batch.inputs["labels"].shape))
            return batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Encoder, "encode", noted)
            how = {"steps": 2, "batch_size": 8 // accumulate, "accumulate": accumulate, "lr": 1e-3, "clip": 0.0}
            done = api.restore(tmp_path / "sparse", tmp_path / f"out{accumulate}", data=tmp_path / "data.jsonl", **how)
        curves[accumulate] = [row["ce"] for row in done.metrics["restore"]["curve"]]
        weights[accumulate] = load_file(tmp_path / f"out{accumulate}" / "model.safetensors")
    assert curves[4] == pytest.approx(curves[1], rel=1e-4)
    learned = {
        accumulate: [rows * width for rows, width in sizes[accumulate] if rows == 8 // accumulate] for accumulate in (1, 4)
    }
    assert (len(learned[1]), len(learned[4])) == (2, 8)
    assert sum(learned[4]) < 0.7 * sum(learned[1])
    for name, W in weights[1].items():
        torch.testing.assert_close(weights[4][name], W, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_schedules(scheduler, sparse, scenes):
    rates = [row["learning_rate"] for row in restored(sparse, "out", scenes, scheduler=scheduler, warmup=0.34)["curve"]]
    shape = {
        "cosine": [0, 0.5, 1, 0.853553, 0.5, 0.146447],
        "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
        "constant": [0, 0.5, 1, 1, 1, 1],
    }[scheduler]
    assert rates == pytest.approx([5e-3 * part for part in shape], abs=1e-6)


@pytest.mark.parametrize("name", ["llava", "instructblip-t5", "blip2-opt", "qwen3-vl-moe"])
@pytest.mark.parametrize("adapter", ["sparselora", pytest.param("masked-full", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_nothing_but_memory(name, adapter, zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder(name), tmp_path / "sparse", data=scenes, samples=8)
    curves = []
    for on in (False, True):
        found = restored(tmp_path / "sparse", f"out{on}", scenes, gradient_checkpointing=on, adapter=adapter, steps=2)
        curves.append([row["loss"] for row in found["curve"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    a, b = (weights(tmp_path / f"out{on}") for on in (False, True))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-6


def test_blocks_are_run_again_in_backward(sparse, scenes):
    """What is kept between the passes is the inputs of blocks."""
    kept = []
    for on in (False, True):
        student = make_student(sparse, None, list(read(scenes)))
        checkpointed = checkpointed_blocks(student.wrapped) if on else nullcontext()
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        batch = student.encoder.encode(student.samples)
        with checkpointed, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            student.head.hidden(student.wrapped, batch.inputs)
        kept.append(saved)
    assert kept[1] < kept[0] / 4


def test_mixed_precision_is_autocast_around_a_float32_model(sparse, scenes):
    plain, mixed = (restored(sparse, f"out-{kind}", scenes, mixed_precision=kind) for kind in ("no", "bf16"))
    losses = [[row["loss"] for row in found["curve"]] for found in (plain, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    assert {t.dtype for t in weights(sparse.parent / "out-bf16").values()} == {torch.float32}
    assert api.verify(sparse.parent / "out-bf16", against=sparse)["differences"] == {}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_models_are_trained_too(dtype, zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8, dtype=dtype)
    for adapter in ("sparselora", "hira", "masked-full"):
        restored(tmp_path / "sparse", adapter, scenes, adapter=adapter)
        assert api.verify(tmp_path / adapter, against=tmp_path / "sparse")["differences"] == {}
        a, b = (weights(tmp_path / name) for name in ("sparse", adapter))
        assert any(not torch.equal(a[key], b[key]) for key in a)


def test_only_what_is_named_is_tuned(sparse, scenes):
    before = weights(sparse)
    words = {"vision": "vision_tower", "connector": "multi_modal_projector", "language": "language_model"}
    for (tune, word), mode in zip(words.items(), ("shared", "cached", "shared"), strict=True):
        restored(sparse, "out", scenes, tune=tune, teacher_mode=mode, steps=2)
        changed = {key for key, tensor in weights(sparse.parent / "out").items() if not torch.equal(tensor, before[key])}
        assert changed
        assert all(word in key for key in changed)
        assert api.verify(sparse.parent / "out", against=sparse)["differences"] == {}


def test_a_tracker_hears_of_every_step(sparse, scenes, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    restored(sparse, "out", scenes, report_to="tensorboard", held_out=4)
    (events,) = (tmp_path / "runs").rglob("events.out.tfevents*")
    text = events.read_bytes()
    for word in (b"train/ce", b"train/kl", b"eval/loss", b"train/learning_rate"):
        assert word in text


def test_patience_outlives_an_interruption(sparse, scenes):
    """It counts evaluations in the history: stopped between two that are no better, it ends where it would have ended."""
    how = {"held_out": 4, "lr": 0.3, "steps": 40, "patience": 2, "scheduler": "constant", "overwrite": False}
    whole = restored(sparse, "whole", scenes, **how)

    def stop(note, done, total):
        if done == whole["held_out"][-1]["step"] - 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        restored(sparse, "out", scenes, progress=stop, **how)
    found = restored(sparse, "out", scenes, resume=True, **how)
    assert found["held_out"] == whole["held_out"]
    a, b = (weights(sparse.parent / name) for name in ("whole", "out"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_damaged_best_checkpoint_is_not_written_as_the_best(sparse, scenes):
    how = {"held_out": 4, "lr": 0.3, "steps": 40, "patience": 2, "scheduler": "constant", "overwrite": False}
    whole = restored(sparse, "whole", scenes, **how)
    best = sparse.parent / "out.unfinished" / f"checkpoint-{whole['best_step']}"

    def damage(note, done, total):
        if done == whole["held_out"][-1]["step"]:
            (best / "sparse_lora.safetensors").write_bytes(b"cut")

    with pytest.raises(NotWritten, match=r"the best checkpoint is damaged, so that nothing was written.*`resume` goes on"):
        restored(sparse, "out", scenes, progress=damage, **how)
    assert restored(sparse, "out", scenes, resume=True, **how)["held_out"] == whole["held_out"]
    a, b = (weights(sparse.parent / name) for name in ("whole", "out"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_an_error_does_not_cost_what_was_done(sparse, scenes, zoo_folder):
    """A late error, a NaN as well as a file that is gone, leaves the checkpoints; so does one at a resumed run's start."""

    def crash(note, done, total):
        if done == 5:
            raise SparsightError("sample 'x': cannot decode x.png") from OSError("gone")

    with pytest.raises(SparsightError, match=r"decode x.png; what was done is in .*out\.unfinished: once that is mended"):
        restored(sparse, "out", scenes, progress=crash, overwrite=False)
    moved = sparse.parent / "moved"
    sparse.rename(moved)
    with pytest.raises(SparsightError, match="no such folder"):
        restored(sparse, "out", scenes, resume=True, overwrite=False)
    moved.rename(sparse)
    assert (sparse.parent / "out.unfinished" / "checkpoint-4").is_dir()
    restored(sparse, "out", scenes, resume=True, overwrite=False, gradient_checkpointing=True)
    api.prune(zoo_folder("llava"), sparse, data=scenes, samples=8, method="magnitude", overwrite=True)
    with pytest.raises(SparsightError, match="`resume`: there is no interrupted work"):
        restored(sparse, "out2", scenes, resume=True, overwrite=False)


def test_other_weights_are_other_work(sparse, scenes, zoo_folder):
    def stop(note, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        restored(sparse, "out", scenes, progress=stop, overwrite=False)
    api.prune(zoo_folder("llava"), sparse, data=scenes, samples=8, method="magnitude", overwrite=True)
    with pytest.raises(
        SparsightError, match="`resume`: files of the model are not those that the interrupted work began with"
    ):
        restored(sparse, "out", scenes, resume=True, overwrite=False)


def test_reconstruction_alone_needs_no_teacher_in_the_step(sparse, scenes):
    found = restored(sparse, "out", scenes, kl=0.0, reconstruct=2, steps=2)
    assert found["teacher"] == "none"
    assert found["reconstructed"]
    assert all(row["kl"] == 0 for row in found["curve"])


def test_the_paper_s_reduction_is_scored_as_it_is_trained(sparse, scenes):
    found = restored(sparse, "out", scenes, reduction="paper", kl=0.5, temperature=2.0, held_out=4, steps=2)
    row = found["held_out"][-1]
    assert row["eval_loss"] > 0.5 * row["eval_ce"] + 0.5 * row["eval_kl"]  # it grows with answers and padding
    assert found["teacher"] == "shared"


@pytest.mark.parametrize("adapter", ["sparselora", "masked-full", "lora"])
def test_experts_that_keep_different_numbers_of_weights(adapter, zoo_folder, scenes, tmp_path):
    """One expert is not pruned at all; an adapter that was saved fits the sparse model again."""
    api.prune(zoo_folder("qwen3-vl-moe"), tmp_path / "sparse", data=scenes, samples=8, ignore=["*experts.gate_up_proj.0"])
    restored(tmp_path / "sparse", "out", scenes, adapter=adapter, save_adapter=True, steps=2)
    if adapter != "lora":
        assert api.verify(tmp_path / "out", against=tmp_path / "sparse")["differences"] == {}
    model, _ = load(tmp_path / "sparse")
    wrapped = load_adapter(model, anatomy(model), tmp_path / "out" / "adapter")
    merged = dict(wrapped.merge_and_unload().named_parameters())
    written = dict(load(tmp_path / "out")[0].named_parameters())
    assert all(torch.equal(merged[key], written[key]) for key in written)
