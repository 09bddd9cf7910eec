"""The loss that is trained is the loss that is said, whatever the family, the batches and their accumulation."""

from __future__ import annotations

import pytest
import torch

from sparsight import verbs
from sparsight.restore.checkpoints import last_checkpoint, seal


@pytest.mark.parametrize("name", ["instructblip-t5", "llava"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_a_mean_over_all_answer_tokens_of_a_step(name, accumulate, zoo_folder, scenes, tmp_path):
    """Batches of one sample have very different numbers of answer tokens; the logged sums are the ground truth."""
    verbs.prune(zoo_folder(name), tmp_path / "sparse", data=scenes, samples=8)
    done = verbs.restore(
        tmp_path / "sparse", tmp_path / "out", data=scenes, steps=4, batch_size=1, accumulate=accumulate, kl=0.4,
        temperature=2.0, lr=1e-4,
    )  # fmt: skip
    curve = done.metrics["restore"]["curve"]
    assert len(curve) == 4
    for row in curve:
        assert row["loss"] == pytest.approx(0.6 * row["ce"] + 0.4 * 4.0 * row["kl"], rel=1e-4)


def test_ranks_are_per_component(zoo_folder, scenes, tmp_path):
    verbs.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    verbs.restore(
        tmp_path / "sparse", tmp_path / "out", data=scenes, steps=1, batch_size=2, rank="vision=3,language=5",
        save_adapter=True,
    )  # fmt: skip
    from safetensors.torch import load_file

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
    verbs.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, samples=8)
    verbs.restore(tmp_path / "sparse", tmp_path / "out", data=scenes, steps=1, batch_size=2)
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)
