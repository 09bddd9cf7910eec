"""The tiny models of every type: they run, see their pictures, learn, and come back from disk."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMultimodalLM

import tiny
from tiny_exceptions import NO_GRADIENTS, NO_LOSS, NO_PICTURES, UNLOADABLE

COMMON = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "internvl", "gemma3", "gemma4", "mistral3", "llava_next",
    "idefics3", "glm4v", "llama4", "mllama",
)  # fmt: skip
EVERY = [kind for kind in (*tiny.TYPES, *tiny.MORE) if kind not in tiny.RESIST]
PIXELS = ("pixel_values", "image_pixel_values", "flattened_patches", "image_patches")


def test_every_type_has_a_model_or_a_reason():
    assert len(tiny.TYPES) > 90
    assert set(tiny.RESIST) | set(UNLOADABLE) | set(COMMON) <= set(tiny.TYPES)


@pytest.mark.parametrize("kind", COMMON)
def test_a_common_type(kind):
    check(kind)


@pytest.mark.parametrize("kind", ["qwen3_5", "llama4"])
def test_a_seed_gives_its_weights(kind):
    one, again, other = tiny.build(kind), tiny.build(kind), tiny.build(kind, seed=1)
    for (key, weight), same in zip(one.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, same), key
    words = [model.get_input_embeddings().weight for model in (one, other)]
    assert not torch.equal(*words)


def test_batches_are_padded_and_labelled():
    model = tiny.build("qwen2_5_vl")
    made = tiny.batches(model, n=4, size=3)
    assert [len(batch["input_ids"]) for batch in made] == [3] * 4
    assert any(not batch["attention_mask"].all() for batch in made)
    for batch in made:
        answer = batch["labels"] != -100
        assert answer.any(1).all()
        assert torch.equal(batch["labels"][answer], batch["input_ids"][answer])
        assert batch["attention_mask"][answer].all()
        assert not (batch["input_ids"][answer] == model.config.image_token_id).any()
    again = tiny.batches(model, n=4, size=3)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(made, again, strict=True) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_any_type(kind, tmp_path):
    model = check(kind)
    again = tiny.build(kind)
    for (key, weight), same in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, same), key
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    if kind in UNLOADABLE:
        return
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path).eval()
    batch = tiny.batches(model)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_any_type_in_half_precision(kind):
    model = tiny.build(kind, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(**tiny.batches(model)[0]).logits
    assert not logits.isnan().any()


def check(kind):
    """One type: finite loss, pictures that matter to their own sample alone, gradients into vision. Returns the model."""
    model = tiny.build(kind)
    assert not model.training
    for batch in tiny.batches(model):
        out = model(**batch)
        assert not out.logits.isnan().any()
        assert out.logits[out.logits > -1e30].std() > 0.01
        assert kind in NO_LOSS or torch.isfinite(out.loss)
    if kind in NO_PICTURES:
        return model
    key = next(key for key in PIXELS if key in batch)
    if kind in NO_GRADIENTS:
        with torch.no_grad():
            moved = model(**{**batch, key: batch[key].flip(-1)}).logits
        assert ((moved - out.logits).abs().flatten(1).amax(1) > 1e-3).all()
        return model
    pixels = batch[key].clone().requires_grad_()
    logits = model(**{**batch, key: pixels}).logits
    seen = []
    for own in logits:
        (own * torch.linspace(-1, 1, own.numel()).view_as(own)).sum().backward(retain_graph=True)
        assert pixels.grad.abs().max() > 0
        seen.append(pixels.grad != 0)
        pixels.grad = None
    assert not (seen[0] & seen[1]).any()
    return model
