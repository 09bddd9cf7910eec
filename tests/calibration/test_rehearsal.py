"""A processor that does not belong to its model is refused in one line, before the work."""

import json
import shutil

import pytest
import torch

from sparsight import SparsightError, api, load, prune
from sparsight.calibration.rehearsal import rehearse
from sparsight.data import Encoder, Sample, Turn

import zoo

MISFITS = {
    "image token": ("llava", "config.json", {"image_token_index": 5, "image_token_id": 5}),
    "patch size": ("llava", "processor_config.json", {"patch_size": 16}),
    "size of images": ("llava", "processor_config.json", {"image_processor": {"crop_size": {"height": 64, "width": 64}}}),
    "features": ("llava", "config.json", {"vision_feature_select_strategy": "full"}),
    "queries": ("instructblip-t5", "processor_config.json", {"num_query_tokens": 3}),
    "token of queries": ("instructblip-t5", "config.json", {"image_token_index": 7, "image_token_id": 7}),
    "size of one image": (
        "instructblip-t5", "processor_config.json", {"image_processor": {"size": {"height": 64, "width": 64}}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_processor_of_another_model_is_refused(case, zoo_folder, scenes, tmp_path, run):
    name, file, changes = MISFITS[case]
    folder = shutil.copytree(zoo_folder(name), tmp_path / "copy")
    settings = json.loads((folder / file).read_text())
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    if case == "size of images":
        settings["image_processor"]["size"] = {"height": 64, "width": 64}
    (folder / file).write_text(json.dumps(settings))
    for words in (("eval", folder), ("prune", folder, tmp_path / "out", "--samples", 4)):
        code, out, err = run(*words, "--data", scenes, "--quiet")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "give the processor that was saved with the model" in err
    assert not (tmp_path / "out").exists()


def test_a_token_without_an_embedding_is_refused(built, zoo_folder, scenes, tmp_path):
    model, processor = load(zoo_folder("llava"))
    before = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["color"])
    with pytest.raises(
        SparsightError, match=f"holds 'color', which is token {before}, and the model has {before} embeddings"
    ):
        prune(model, data=scenes, processor=processor)
    with pytest.raises(SparsightError, match="none of the 12 samples can be taken: its text holds 'color'"):
        api.evaluate(model, data=scenes, processor=processor, skip_bad=True)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_rehearsal_changes_nothing(name, built):
    model, processor = built(name)
    samples = [Sample("a", (zoo.images(1)[0],), (Turn("what?", ("red",)),))]
    state = torch.random.get_rng_state()
    model.train()
    rehearse(model, Encoder(processor, model), samples)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    model.eval()


@pytest.mark.parametrize("message", ["CUDA out of memory", "can't allocate memory: you tried to allocate 9 bytes"])
def test_a_lack_of_memory_is_no_fault_of_the_processor(message, built, monkeypatch):
    model, processor = built("llava")

    def forward(**inputs):
        raise RuntimeError(f"DefaultCPUAllocator: {message}")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RuntimeError, match=message):
        rehearse(model, Encoder(processor, model), [Sample("a", (zoo.images(1)[0],), (Turn("what?", ("red",)),))])
