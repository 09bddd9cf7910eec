"""The device `auto`: the GPUs that there are, else the CPU; and models that accelerate has spread over several places."""

from __future__ import annotations

import pytest
import torch
from accelerate import disk_offload
from transformers import AutoModelForMultimodalLM

from sparsight import SparsightError, api
from sparsight.memory import AUTO, main_device
from sparsight.model.load import check_trainable, load

GPUS = torch.cuda.device_count()


@pytest.mark.skipif(GPUS > 0, reason="there is a GPU")
def test_without_a_gpu_it_is_the_cpu(zoo_folder, scenes, run, tmp_path):
    assert main_device(AUTO) == torch.device("cpu")
    scores = []
    for device in ("cpu", AUTO):
        words = ("--data", scenes, "--device", device)
        assert run("prune", zoo_folder("llava"), f"{device}-p", *words, "--sparsity", 0.5, "--samples", 4)[0] == 0
        code, _, said = run("restore", f"{device}-p", f"{device}-r", *words, "--steps", 1, "--batch-size", 4)
        assert code == 0, said
        rows = api.evaluate(tmp_path / f"{device}-r", scenes, device=device, samples=4, max_new_tokens=2).rows
        tokens = api.evaluate(tmp_path / f"{device}-r", scenes, device=device, samples=4, metrics=["perplexity"]).rows
        files = [(tmp_path / f"{device}-{kind}/model.safetensors").read_bytes() for kind in "pr"]
        scores.append((rows, tokens, files))
    assert scores[0] == scores[1]


def test_a_model_that_accelerate_has_spread_is_scored(zoo_folder, scenes, tmp_path):
    model, processor = load(zoo_folder("llava"))
    settings = {"processor": processor, "samples": 4, "max_new_tokens": 3}
    expected = api.evaluate(model, scenes, **settings)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert api.evaluate(model, scenes, **settings).rows == expected.rows


def test_a_model_larger_than_the_gpus_is_not_trained(zoo_folder):
    model = AutoModelForMultimodalLM.from_pretrained(zoo_folder("llava"), device_map={"": "cpu"})
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": "cpu", "lm_head": "disk"}
    with pytest.raises(SparsightError, match=r"model\.language_model and 1 more parts are elsewhere"):
        check_trainable(model)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_two_gpus_hold_a_model_together(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "sparse", data=scenes, sparsity=0.5, samples=4, device="cuda")
    model, _ = load(tmp_path / "sparse", device=AUTO)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    one = api.evaluate(tmp_path / "sparse", scenes, device="cuda", max_new_tokens=3)
    both = api.evaluate(tmp_path / "sparse", scenes, device=AUTO, max_new_tokens=3)
    assert [row["prediction"] for row in one.predictions] == [row["prediction"] for row in both.predictions]
    api.restore(tmp_path / "sparse", tmp_path / "restored", data=scenes, device=AUTO, steps=2, batch_size=4)
    assert not api.verify(tmp_path / "restored", against=tmp_path / "sparse")["differences"]
