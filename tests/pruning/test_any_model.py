"""Models that are wired otherwise: experts of every layout, transposed layers, states, layers that no sample reaches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForMultimodalLM, GPT2Config, VisionEncoderDecoderConfig, ViTConfig

import sparsight
from sparsight import SparsightError
from sparsight.calibration.observe import Watch
from sparsight.data.own_batches import as_batches
from sparsight.model.anatomy import anatomy
from sparsight.pruning.loop import check_walk

import tiny


def caught(module, run):
    """The arguments of a module's call."""
    seen = []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        run()
    hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["llama4", "aria", "nemotron_h_omni", "qwen3_5_moe", "inkling_mm_model", "step3p7"])
def test_every_expert_sees_the_inputs_of_its_own_product(kind):
    """The sums of squares of an expert's inputs, against a plain loop over its tokens."""
    model = tiny.build(kind)
    batch = as_batches(model, tiny.batches(model))[0]
    layers = [layer for layer in anatomy(model).layers if layer.expert]
    layers = [layer for layer in layers if layer.module is layers[0].module]
    (args,) = caught(layers[0].module, lambda: model(**batch.inputs))
    watch = Watch(layers, 1)
    with watch.open(), watch.during({}), torch.no_grad():
        layers[0].module(*args)
    module, X = layers[0].module, args[0].reshape(-1, args[0].shape[-1])
    seen = 0
    for layer in layers:
        key, index = layer.expert
        if len(args) == 3:
            inputs = X[(args[1] == index).any(1)]
        elif kind == "llama4":
            inputs = X.view(len(layer.parameter), -1, X.shape[1])[index]
        else:
            inputs = X  # shared experts take every token
        if key == "down_proj":
            first = next(x for x in layers if x.expert[1] == index and x.expert[0] != "down_proj")
            up = inputs @ first.weight.T
            if first.expert[0] == "gate_up_proj":
                gate, up = up.chunk(2, -1)
                inputs = module.act_fn(gate) * up
            elif first.expert[0] == "up_proj":
                inputs = module.act_fn(up)
            else:
                other = next(x for x in layers if x.expert == ("up_proj", index))
                inputs = (
                    module.act_fn(up) * (inputs @ other.weight.T) * args[1].reshape(-1, len(layer.parameter))[:, index, None]
                )
        inputs = inputs[(inputs != 0).any(1)]
        if len(inputs):
            seen += 1
            torch.testing.assert_close(watch.moments[layer.name].norm, inputs.square().sum(0).sqrt(), rtol=1e-4, atol=1e-5)
        else:
            assert layer.name not in watch.moments
    assert seen >= len(layers) / 2


def test_an_error_inside_fused_experts_leaves_nothing_behind(monkeypatch):
    """The mode that sees their products is over, and so are the hooks."""
    model = tiny.build("llama4")
    ready = tiny.batches(model)
    monkeypatch.setattr("sparsight.calibration.observe.Watch._see_stack", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparsight.prune(model, ready, sparsity=0.5)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope="module")
def captioner():
    """A vision-encoder-decoder with GPT-2, whose layers are `Conv1D`: (in, out)."""
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    text = GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=32, vocab_size=100, bos_token_id=1, eos_token_id=2)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    ready = [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.randint(3, 100, (2, 6))} for _ in range(3)]
    return model, ready


def test_transposed_layers_are_pruned_along_their_inputs(captioner):
    model, ready = captioner[0], captioner[1]
    sparse = copy.deepcopy(model)
    body = anatomy(sparse)
    layers = [layer for layer in body.layers if layer.transposed]
    assert {layer.name.rpartition(".")[2] for layer in layers} == {"c_attn", "c_proj", "c_fc", "q_attn"}
    record = sparsight.prune(sparse, ready, pattern="2:4")
    assert record.unreached == []
    for layer in body.layers:
        groups = (layer.weight != 0).reshape(layer.shape[0], -1, 4).sum(-1)
        assert bool((groups == 2).all()), layer.name
    assert sparsight.verify(sparse, against=record)["differences"] == {}


def test_restoration_of_transposed_layers_keeps_every_zero_and_what_the_model_says(captioner):
    model, ready = copy.deepcopy(captioner[0]), captioner[1]
    sparsight.prune(model, ready, sparsity=0.5)
    zeros = {layer.name: layer.weight == 0 for layer in anatomy(model).layers}
    wrapped = sparsight.sparse_lora(model, rank=2)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    for batch in ready:
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected = wrapped(**ready[0]).logits
        merged = sparsight.merge(wrapped)
        torch.testing.assert_close(merged(**ready[0]).logits, expected, rtol=1e-4, atol=1e-5)
    for layer in anatomy(merged).layers:
        assert not bool((layer.weight[zeros[layer.name]] != 0).any()), layer.name


@pytest.mark.parametrize("tokens", [slice(None), slice(0, 1)], ids=["every token", "the first token"])
@pytest.mark.parametrize("at", [1, -1])
def test_a_block_with_a_state_of_its_own_is_refused_before_anything_is_pruned(at, tokens):
    class Counts(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            output = self.inner(*args, **kwargs)
            output = (output[0] if isinstance(output, tuple) else output).clone()
            output[:, tokens] += self.calls * torch.arange(output.shape[-1]) / 10
            return output

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    model = tiny.build("llava")
    ready = tiny.batches(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    layers = model.model.language_model.layers
    layers[at] = Counts(layers[at])
    with pytest.raises(SparsightError, match="its blocks cannot be run one by one: the logits of such a walk differ"):
        sparsight.prune(model, ready, sparsity=0.5)
    assert all(torch.equal(p, before[name.replace(".inner.", ".")]) for name, p in model.named_parameters())
    check_walk(model, anatomy(model), [])  # nothing to compare


def test_layers_that_no_sample_reaches_stay_dense_and_are_named(tmp_path):
    model = tiny.build("video_llava")  # pictures do not go through its tower for videos
    ready = tiny.batches(model)
    dense = copy.deepcopy(model)
    record = sparsight.prune(model, ready, sparsity=0.5)
    assert record.unreached
    assert all("video_tower" in name for name in record.unreached)
    assert set(record.plan).isdisjoint(record.unreached)
    theirs = anatomy(dense)
    assert all(torch.equal(anatomy(model)[name].weight, theirs[name].weight) for name in record.unreached)
    facts = sparsight.save(model, tmp_path / "out", record=record)
    assert set(facts["layers"]) == set(record.plan)
    assert sparsight.verify(tmp_path / "out")["differences"] == {}


def test_a_component_that_no_sample_reaches_is_an_error():
    model = tiny.build("llava")
    text = [{key: value for key, value in batch.items() if "pixel" not in key} for batch in tiny.batches(model)]
    for batch in text:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 7)
    with pytest.raises(
        SparsightError, match=r"vision_tower\S+: no calibration sample reached this layer, nor any other of vision"
    ):
        sparsight.prune(model, text, sparsity=0.5)
    sparsight.prune(model, text, sparsity="language=0.5")
