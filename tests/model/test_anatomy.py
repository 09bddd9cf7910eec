"""Components, blocks in forward order, layers, and what is left alone and why."""

from __future__ import annotations

import pytest
from torch import nn

from sparsight import Family, SparsightError, anatomy, api

import zoo

EXPECTED = {  # family: layers per block of vision and language
    "instructblip-t5": {4, 7, 11},
    "instructblip-llama": {4, 7},
    "blip2-opt": {4, 6},
    "blip2-t5": {4, 7, 11},
    "llava": {6, 7},
    "qwen2.5-vl": {5, 7},
    "qwen3-vl": {4, 7},
    "qwen3-vl-moe": {4, 4 + 2 * 4},  # q, k, v, o and two tensors of four experts
    "paligemma": {6, 7},
    "gemma3": {6, 7},
    "smolvlm": {6, 7},
}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_linear_layer_of_every_block_is_found(name):
    model, _ = zoo.build(name)
    body = anatomy(model)
    counts = {
        sum(layer.block == block.name for layer in body.layers)
        for block in body.blocks
        if block.component in ("vision", "language")
    }
    assert counts == EXPECTED[name]
    for layer in body.layers:
        if layer.expert:
            key, index = layer.expert
            assert model.get_submodule(layer.name.removesuffix(f".{key}.{index}")) is layer.module
            assert layer.weight.data_ptr() == layer.module.get_parameter(key)[index].data_ptr()
        else:
            module = model.get_submodule(layer.name)
            assert module is layer.module
            assert isinstance(module, nn.Linear)
        assert layer.name == layer.block or layer.name.startswith(layer.block + ".")
    order = [b.name for b in body.blocks]
    assert [layer.block for layer in body.layers] == sorted((x.block for x in body.layers), key=order.index)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_parameter_is_either_a_layer_or_skipped_with_a_reason(name):
    model, _ = zoo.build(name)
    body = anatomy(model)
    biases_too = sum(layer.weight.numel() for layer in body.layers) + sum(s.parameters for s in body.skipped)
    assert biases_too == body.parameters == sum(p.numel() for p in model.parameters())
    reasons = {s.reason for s in body.skipped}
    assert any("output head" in reason for reason in reasons)
    assert any("embedding" in reason for reason in reasons)


def test_reasons():
    t5 = {s.name: s.reason for s in anatomy(zoo.build("instructblip-t5")[0]).skipped}
    assert t5["language_model.shared.weight"] == "output head, tied to the embeddings"
    assert t5["query_tokens"] == "bare parameter"
    gemma = {s.name: (s.reason, s.component) for s in anatomy(zoo.build("gemma3")[0]).skipped}
    assert gemma["model.multi_modal_projector.mm_input_projection_weight"] == ("bare parameter", "")


def test_tied_weights_and_routers_are_left_alone():
    model, _ = zoo.build("llava")
    layers = model.model.language_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[0].mlp.router = nn.Linear(8, 2)
    body = anatomy(model)
    reasons = {s.name: s.reason for s in body.skipped}
    assert reasons["model.language_model.layers.0.mlp.up_proj.weight"] == "weight tied to another module"
    assert reasons["model.language_model.layers.0.mlp.router.weight"] == "router or gate"
    assert not any(x.name.endswith("router") or x.module is layers[0].mlp.up_proj for x in body.layers)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vision", "not COMPONENT=PATH"),
        ("eyes=a,language=b", "'eyes=a' is not COMPONENT=PATH"),
        ("vision=model.nowhere,language=model.language_model.layers", r"no module 'model\.nowhere'.*found: `family=vision="),
    ],
)
def test_bad_family(text, says, zoo_folder):
    with pytest.raises(SparsightError, match=says):
        api.inspect(zoo_folder("llava"), family=text)


def test_several_paths_of_a_component():
    family = Family.parse("vision=a.b,language=c+d")
    assert (family.vision, family.language) == (("a.b",), ("c", "d"))
    assert str(family) == "vision=a.b,language=c+d"
