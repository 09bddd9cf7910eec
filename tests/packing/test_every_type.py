"""A tiny model of every type that transformers has, packed and read again: every tensor comes back, bit for bit.

Types differ in the conversions that transformers runs between the names in files and those in memory.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

import sparsight
from sparsight import SparseLinear
from sparsight.model.anatomy import anatomy
from sparsight.model.load import quiet

import tiny

CONVERSIONS = (  # other names of the last part, patterns that end elsewhere, operations that look at their patterns
    "aria", "ernie4_5_vl_moe", "inkling2", "kimi_k25", "mistral4", "mistral_large4", "molmo2", "nemotron_h_omni",
    "unlimited_ocr",
)  # fmt: skip
STOPS = ("evolla", "shieldgemma2")  # transformers does not read what it saved


def loaded(folder, packed=False):
    config = AutoConfig.from_pretrained(folder)
    if packed:
        config.quantization_config["packed"] = "all"
    with quiet():
        model, info = AutoModelForMultimodalLM.from_pretrained(folder, config=config, output_loading_info=True)
    return model, {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def tensors(model):
    """Every tensor by its name, those of packed layers dense, as bytes."""
    state = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, SparseLinear):
            for name in [name for name in state if name.startswith(f"{path}.weight_")]:
                del state[name]
            state[f"{path}.weight"] = module.dense(module.bias.dtype if module.bias is not None else model.dtype)
    return {name: (tensor.dtype, tensor.contiguous().view(-1).view(torch.uint8)) for name, tensor in state.items()}


def assert_same(folder, expected, facts, **how):
    model, info = loaded(folder, **how)
    assert info == facts
    state = tensors(model)
    assert state.keys() == expected.keys()
    for name, (dtype, content) in state.items():
        assert dtype == expected[name][0], name
        assert torch.equal(content, expected[name][1]), name
    return model


@torch.no_grad()
def check(kind, dtype, folder):
    model = tiny.build(kind, dtype=dtype)
    for layer in anatomy(model).layers:
        W = layer.weight
        W.masked_fill_(W.abs() < W.abs().float().median(), 0)
    with quiet():
        model.save_pretrained(folder / "sparse")
    dense, facts = loaded(folder / "sparse")
    expected = tensors(dense)
    sparsight.pack(folder / "sparse", folder / "packed", squeeze=dtype == torch.bfloat16)
    sparsight.unpack(folder / "packed", folder / "unpacked")
    weights = [path.name for path in (folder / "sparse").glob("*.safetensors")]
    assert all((folder / "unpacked" / name).read_bytes() == (folder / "sparse" / name).read_bytes() for name in weights)
    for packed in (False, True):
        model = assert_same(folder / "packed", expected, facts, packed=packed)
        assert packed == any(isinstance(module, SparseLinear) for module in model.modules())
        with quiet():
            model.save_pretrained(folder / f"saved {packed}")
        assert_same(folder / f"saved {packed}", expected, facts)
    assert_same(folder / "saved True", expected, facts, packed=True)
    layers = json.loads((folder / "saved True" / "config.json").read_text())["quantization_config"]["layers"]
    packed = json.loads((folder / "packed" / "config.json").read_text())["quantization_config"]["layers"]
    assert layers.keys() <= packed.keys()


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_types_with_conversions_of_every_kind(kind, tmp_path):
    check(kind, torch.float32, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in (*tiny.TYPES, *tiny.MORE) if kind not in (*STOPS, *tiny.RESIST)])
def test_every_type(kind, dtype, tmp_path):
    check(kind, dtype, tmp_path)
