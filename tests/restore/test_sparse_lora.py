"""SparseLoRA: exact gradient, nothing of W's size saved, forward weight and merged weight the same bits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from sparsight.errors import SparsightError
from sparsight.model.anatomy import anatomy
from sparsight.model.masks import mask_hash, pack, unpack
from sparsight.plan.pattern import Pattern
from sparsight.restore.sparse_lora import SparseLoraLinear, adapters, add_adapters, effective_weight, sparse_linear

import zoo

SHAPES = [(6, 8, 2, True), (5, 7, 1, False), (12, 4, 3, True), (1, 16, 4, False)]


def problem(out, columns, rank, bias, dtype=torch.float64, tokens=(2, 3)):
    g = torch.Generator().manual_seed(out * columns)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    mask = torch.rand(out, columns, generator=g) > 0.5
    x, W, A, B = draw(*tokens, columns), draw(out, columns), draw(rank, columns), draw(out, rank)
    return x, W, draw(out) if bias else None, A, B, mask


@pytest.mark.parametrize("scaling", [2.0, 0.25])
@pytest.mark.parametrize(("out", "columns", "rank", "bias"), SHAPES)
def test_gradcheck_in_float64(out, columns, rank, bias, scaling):
    x, W, b, A, B, mask = problem(out, columns, rank, bias)
    for tensor in (x, A, B, *([b] if bias else [])):
        tensor.requires_grad_(True)
    packed = pack(mask)
    assert torch.autograd.gradcheck(lambda x, b, A, B: sparse_linear(x, W, b, A, B, scaling, packed), (x, b, A, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_agrees_with_plain_autograd(dtype):
    x, W, b, A, B, mask = problem(48, 64, 4, True, dtype=dtype, tokens=(128,))
    A, B = A.float(), B.float()
    grads = []
    for ours in (True, False):
        xs, As, Bs = (t.clone().requires_grad_(True) for t in (x, A, B))
        if ours:
            y = sparse_linear(xs, W, b, As, Bs, 2.0, pack(mask))
        else:
            y = nn.functional.linear(xs, ((W.float() + 2.0 * Bs @ As) * mask).to(dtype), b)
        y.float().square().mean().backward()
        grads.append([t.grad.float().flatten() for t in (xs, As, Bs)])
    for a, b in zip(*grads, strict=True):
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > (0.9999 if dtype != torch.float16 else 0.999)
        assert float(a.norm() / b.norm()) == pytest.approx(1, abs=1e-5 if dtype == torch.float32 else 0.01)


def test_backward_keeps_one_bit_per_weight():
    x, W, b, A, B, mask = problem(256, 512, 4, True, dtype=torch.float32, tokens=(16,))
    x, A, B = (t.requires_grad_(True) for t in (x, A, B))
    ours = {t.untyped_storage().data_ptr() for t in (x, W, A, B)}
    extra: dict[int, int] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            extra[storage.data_ptr()] = storage.nbytes()
        return tensor

    packed = pack(mask)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = sparse_linear(x, W, b, A, B, 2.0, packed)
    saved = sum(extra.values()) / W.numel()
    assert 0.12 < saved <= 0.14
    y.sum().backward()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
def test_packed_masks_come_back(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.3
    assert pack(mask).numel() == -(-count // 8)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


def sparse_model(name, dtype=torch.float32):
    model, _ = zoo.build(name, dtype=dtype)
    body = anatomy(model)
    masks = {}
    for layer in (*body.component("vision"), *body.component("language")):
        keep = Pattern.nm(2, 4).keep(layer.weight.abs())
        masks[layer.name] = pack(keep)
    layers = {n: (4, keep) for n, keep in masks.items()}
    layers |= {layer.name: (2, None) for layer in body.component("connector")}
    return model, body, masks, layers


def stir(wrapped, scale=0.05):
    """Give B values as training would: it starts at zero."""
    g = torch.Generator().manual_seed(1)
    for layer in adapters(wrapped).values():
        B = layer.lora_B["default"].weight
        B.data = torch.randn(B.shape, generator=g) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["instructblip-t5", "llava", "gemma3"])
def test_what_was_trained_is_what_is_merged(name, dtype):
    model, body, masks, layers = sparse_model(name, dtype)
    dense = {layer.name: layer.weight.clone() for layer in body.layers}
    wrapped = add_adapters(model, layers)
    stir(wrapped)
    found = adapters(wrapped)
    assert set(found) == set(layers)
    live = {n: found[n].effective() for n in masks}
    x = {n: torch.randn(3, found[n].in_features, dtype=dtype) for n in masks}
    before = {n: found[n](x[n]) for n in masks}
    with wrapped.disable_adapter():
        for n in masks:  # the teacher: the dense layer, untouched
            assert torch.equal(found[n](x[n]), nn.functional.linear(x[n], dense[n], found[n].base_layer.bias))
    merged = wrapped.merge_and_unload(safe_merge=True)
    for n, packed in masks.items():
        module = merged.get_submodule(n)
        assert type(module) is nn.Linear
        assert torch.equal(module.weight, live[n])
        assert torch.equal(module(x[n]), before[n])
        assert not (module.weight.data[~unpack(packed, module.weight.shape)]).any()
        assert not torch.equal(module.weight.data, dense[n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unmerge_gives_the_base_weight_back(dtype):
    model, _, masks, layers = sparse_model("llava", dtype)
    dense = {n: model.get_submodule(n).weight.data.clone() for n in masks}
    wrapped = add_adapters(model, layers)
    stir(wrapped)
    deltas = {n: layer.get_delta_weight("default") for n, layer in adapters(wrapped).items() if n in masks}
    wrapped.merge_adapter()
    name, layer = next((n, la) for n, la in adapters(wrapped).items() if n in masks)
    assert torch.equal(layer.base_layer.weight.float(), dense[name].float() + deltas[name])
    wrapped.unmerge_adapter()
    assert all(torch.equal(model.get_submodule(n).base_layer.weight, dense[n]) for n in masks)


def test_a_kept_weight_may_pass_through_zero():
    """The mask is explicit: a weight that is zero for a while is still trained, and the support never grows."""
    W, A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0]])
    packed = pack(torch.tensor([[True, False]]))
    assert effective_weight(W, A, B, 1.0, packed).tolist() == [[0.0, 0.0]]
    assert effective_weight(W, A, B, 0.5, packed).tolist() == [[0.5, 0.0]]


def test_the_one_private_seam_of_peft_is_there():
    seen = []
    config = LoraConfig(r=2, target_modules="0")

    def place(target, adapter_name, **kwargs):
        seen.append((type(target), adapter_name, kwargs["config"].r, kwargs["r"]))
        return SparseLoraLinear(target, adapter_name, keep=pack(torch.ones(4, 4) > 0), **kwargs)

    config._register_custom_module({nn.Linear: place})
    wrapped = PeftModel(nn.Sequential(nn.Linear(4, 4)), config)
    assert seen == [(nn.Linear, "default", 2, 2)]
    assert isinstance(wrapped.base_model.model[0], SparseLoraLinear)


@pytest.mark.parametrize("bad", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_would_train_the_dense_product_is_refused(bad):
    config = LoraConfig(r=2, **bad)
    with pytest.raises(SparsightError, match=next(iter(bad))):
        SparseLoraLinear(nn.Linear(4, 4), "default", config, keep=pack(torch.ones(4, 4) > 0), r=2, lora_alpha=4)


def test_a_quantized_base_is_refused():
    class Quantized(nn.Linear):
        pass

    model, _, _, layers = sparse_model("llava")
    name = next(iter(layers))
    model.get_submodule(name).__class__ = Quantized
    with pytest.raises(SparsightError, match="Quantized"):
        add_adapters(model, layers)


def test_same_seed_same_adapters():
    def first(seed):
        model, _, _, layers = sparse_model("llava")
        layer = next(iter(adapters(add_adapters(model, layers, seed=seed)).values()))
        return mask_hash(layer.lora_A["default"].weight > 0)

    assert first(3) == first(3) != first(4)
