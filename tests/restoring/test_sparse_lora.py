"""SparseLoRA: exact gradient, nothing of W's size saved, forward weight and merged weight the same bits."""

from __future__ import annotations

import pytest
import torch
from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from sparsight.errors import SparsightError
from sparsight.masks.bits import mask_hash, pack, unpack
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import anatomy
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.peft_layers import (
    AdapterTarget,
    MaskedExperts,
    MaskedLinear,
    adapted_modules,
    add_adapters,
    factors,
    sparse_linear,
)

import zoo

SHAPES = [(6, 8, 2, True), (5, 7, 1, False), (12, 4, 3, True), (1, 16, 4, False)]

MASKED = [name for name, adapter in ADAPTERS.items() if adapter.masked]


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
    for form in ("sparselora", "hira"):

        def apply(x, b, A, B, form=form):
            return sparse_linear(x, W, b, (A, B), scaling, packed, form)

        assert torch.autograd.gradcheck(apply, (x, b, A, B))
    values = W[mask].clone().requires_grad_(True)

    def full(x, b, values):
        return sparse_linear(x, W, b, (values,), scaling, packed, "masked-full")

    assert torch.autograd.gradcheck(full, (x, b, values))


def plainly(form, W, mask, scaling, *held):
    """The effective weight in plain torch, float32, under autograd."""
    if form == "masked-full":
        return torch.zeros(W.shape).masked_scatter(mask, held[0])
    A, B = held
    E = W.float() + scaling * B @ A if form.startswith("sparselora") else W.float() * (1 + scaling * B @ A)
    return torch.where(mask, E, 0.0)


@pytest.mark.parametrize("kernels", ["1", "0"])
@pytest.mark.parametrize("form", ["sparselora", "hira", "masked-full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_agrees_with_plain_autograd(dtype, form, kernels, monkeypatch):
    monkeypatch.setenv("SPARSIGHT_KERNELS", kernels)
    x, W, b, A, B, mask = problem(48, 64, 4, True, dtype=dtype, tokens=(128,))
    first = (W[mask].float(),) if form == "masked-full" else (A.float(), B.float())
    outputs, grads = [], []
    for ours in (True, False):
        xs, *held = (t.clone().requires_grad_(True) for t in (x, *first))
        if ours:
            y = sparse_linear(xs, W, b, tuple(held), 2.0, pack(mask), form)
        else:
            y = nn.functional.linear(xs, plainly(form, W, mask, 2.0, *held).to(dtype), b)
        y.float().square().mean().backward()
        outputs.append(y.detach().float())
        grads.append([t.grad.float().flatten() for t in (xs, *held)])
    wide = dtype == torch.float32
    torch.testing.assert_close(*outputs, rtol=1e-5 if wide else 0.02, atol=1e-4 if wide else 0.2)
    for a, b in zip(*grads, strict=True):
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > (0.9999 if dtype != torch.float16 else 0.999)
        assert float(a.norm() / b.norm()) == pytest.approx(1, abs=1e-5 if wide else 0.01)


def test_the_fast_gradient_forgets_the_mask_and_nothing_else():
    x, W, _, A, B, mask = problem(48, 64, 4, False, dtype=torch.float32, tokens=(128,))
    found = {}
    for name, packed, form in (
        ("fast", pack(mask), "sparselora-fast"),
        ("dense", pack(mask | True), "sparselora"),
        ("exact", pack(mask), "sparselora"),
    ):
        As, Bs = (t.clone().requires_grad_(True) for t in (A, B))
        y = sparse_linear(x, W, None, (As, Bs), 2.0, packed, form)
        y.backward(torch.ones_like(y))
        found[name] = torch.cat([As.grad.flatten(), Bs.grad.flatten()])
    torch.testing.assert_close(found["fast"], found["dense"], rtol=1e-4, atol=1e-3)
    cosine = float(torch.nn.functional.cosine_similarity(found["fast"], found["exact"], dim=0))
    print(f"cosine of the fast gradient with the exact one, 50 % sparse: {cosine:.2f}")
    assert cosine < 0.9


@pytest.mark.parametrize("form", MASKED)
def test_kernels_and_plain_torch_agree(form, monkeypatch):
    g = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.0), (torch.float16, 0.0)):
        W, mask = torch.randn(37, 51, generator=g).to(dtype), torch.rand(37, 51, generator=g) > 0.6
        held = tuple(torch.randn(f.shape, generator=g) for f in ADAPTERS[form].start(W, pack(mask), 3))
        dE = torch.randn(37, 51, generator=g).to(dtype)
        found = []
        for kernels in "10":
            monkeypatch.setenv("SPARSIGHT_KERNELS", kernels)
            E = ADAPTERS[form].effective(W, held, 0.7, pack(mask))
            found.append((E.float(), *(x.float() for x in ADAPTERS[form].project(dE, W, held, 0.7, pack(mask)))))
            assert not E[~mask].any()
            assert E.dtype == dtype
        one_ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=one_ulp, atol=1e-6)
        assert (found[0][0] != found[1][0]).float().mean() <= (1 if tolerance else 0.002)  # ties in rounding only
        for a, b in zip(found[0][1:], found[1][1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_hira_is_that_of_peft():
    """PEFT's own HiRA on the sparse weight: same outputs, same gradients, same merge."""
    _, W, b, A, B, mask = problem(12, 16, 3, True, dtype=torch.float32)
    base = nn.Linear(16, 12)
    base.weight.data, base.bias.data = W * mask, b
    theirs = get_peft_model(nn.Sequential(base), HiraConfig(r=3, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.hira_A["default"].data, layer.hira_B["default"].data = A.clone(), B.clone()
    As, Bs, x = A.clone().requires_grad_(True), B.clone().requires_grad_(True), torch.randn(5, 16)
    ours = sparse_linear(x, W, b, (As, Bs), 1.0, pack(mask), "hira")
    torch.testing.assert_close(ours, theirs(x), rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(As.grad, layer.hira_A["default"].grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(Bs.grad, layer.hira_B["default"].grad, rtol=1e-4, atol=1e-3)
    merged = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(ADAPTERS["hira"].effective(W, (A, B), 1.0, pack(mask)), merged.data, rtol=1e-5, atol=1e-6)


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
        y = sparse_linear(x, W, b, (A, B), 2.0, packed)
    saved = sum(extra.values()) / W.numel()
    assert 0.12 < saved <= 0.14
    y.sum().backward()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
def test_packed_masks_come_back(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) > 0.3
    assert pack(mask).numel() == -(-count // 8)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


def sparse_model(name, dtype=torch.float32, form="sparselora"):
    """A tiny model, not yet pruned, the masks of a 2:4 pruning, and an adapter for every layer; experts have one, too."""
    model, _ = zoo.build(name, dtype=dtype)
    body = anatomy(model)
    masks = {}
    for layer in (*body.component("vision"), *body.component("language")):
        masks[layer.name] = pack(Pattern.nm(2, 4).keep(layer.weight.abs()))
    chosen = [AdapterTarget(body[n], 4, keep, form) for n, keep in masks.items()]
    chosen += [AdapterTarget(layer, 2, None) for layer in body.component("connector")]
    return model, body, masks, chosen


def stir(wrapped, scale=0.05):
    """Give the factors values as training would: B starts at zero."""
    g = torch.Generator().manual_seed(1)
    for name, factor in factors(wrapped).items():
        if ".A" not in name:
            factor.data += torch.randn(factor.shape, generator=g) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["instructblip-t5", "llava", "gemma3"])
def test_what_was_trained_is_what_is_merged(name, dtype):
    model, body, masks, chosen = sparse_model(name, dtype)
    dense = {layer.name: layer.weight.clone() for layer in body.layers}
    wrapped = add_adapters(model, chosen)
    stir(wrapped)
    found = adapted_modules(wrapped)
    assert set(found) == {adapted.layer.name for adapted in chosen}
    live = {n: found[n].effective()["weight"] for n in masks}
    x = {n: torch.randn(3, found[n].base_layer.in_features, dtype=dtype) for n in masks}
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


@pytest.mark.parametrize("form", MASKED)
def test_experts_are_masked_one_by_one(form):
    """Fused experts: what forward computes is the module with every expert's effective weight in place."""
    model, body, masks, chosen = sparse_model("qwen3-vl-moe", form=form)
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith(".experts"))
    layers = [layer for layer in body.layers if layer.expert and layer.name.startswith(name + ".")]
    chosen = [adapted for adapted in chosen if adapted.layer.name in {layer.name for layer in layers}]
    first = {layer.name: layer.weight.clone() for layer in layers}
    wrapped = add_adapters(model, chosen)
    stir(wrapped)
    experts = adapted_modules(wrapped)[name]
    assert isinstance(experts, MaskedExperts)
    x = torch.randn(9, module.gate_up_proj.shape[-1])
    where = torch.randint(0, len(module.gate_up_proj), (9, 2), generator=torch.Generator().manual_seed(0))
    args = (x, where, torch.full((9, 2), 0.5))
    expected = {key: torch.empty_like(getattr(module, key)) for key in experts.names}
    for layer in layers:
        key, index = layer.expert
        held = tuple(factor[index] for factor in experts.factors(f"_{key}"))
        expected[key][index] = ADAPTERS[form].effective(first[layer.name], held, experts.scaling, masks[layer.name])
    y = experts(*args)
    torch.testing.assert_close(y, functional_call(module, expected, args), rtol=1e-6, atol=1e-6)
    if ADAPTERS[form].names:
        y.square().sum().backward()
        assert all(float(f.grad.abs().sum()) > 0 for n, f in factors(wrapped).items() if "values" in n or ".A" in n)
    wrapped.merge_adapter()
    torch.testing.assert_close(module(*args), y, rtol=1e-6, atol=1e-6)
    for layer in layers:
        assert not layer.weight[~unpack(masks[layer.name], layer.shape)].any()
    wrapped.unmerge_adapter()
    assert all(torch.equal(layer.weight, first[layer.name]) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unmerge_gives_the_base_weight_back(dtype):
    model, _, masks, chosen = sparse_model("llava", dtype)
    dense = {n: model.get_submodule(n).weight.data.clone() for n in masks}
    wrapped = add_adapters(model, chosen)
    stir(wrapped)
    wrapped.merge_adapter()
    assert not any(torch.equal(model.get_submodule(n).base_layer.weight, dense[n]) for n in masks)
    with pytest.raises(ValueError, match="merged already"):
        adapted_modules(wrapped)[next(iter(masks))].merge()
    wrapped.unmerge_adapter()
    assert all(torch.equal(model.get_submodule(n).base_layer.weight, dense[n]) for n in masks)


def test_a_kept_weight_may_pass_through_zero():
    """The mask is explicit: a weight that is zero for a while is still trained, and the support never grows."""
    W, A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0]])
    packed = pack(torch.tensor([[True, False]]))
    assert ADAPTERS["sparselora"].effective(W, (A, B), 1.0, packed).tolist() == [[0.0, 0.0]]
    assert ADAPTERS["sparselora"].effective(W, (A, B), 0.5, packed).tolist() == [[0.5, 0.0]]


def test_under_autocast_it_is_the_merged_layer_under_autocast():
    x, W, b, A, B, mask = problem(24, 32, 4, True, dtype=torch.float32, tokens=(7,))
    merged = ADAPTERS["sparselora"].effective(W, (A, B), 2.0, pack(mask))
    A.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(x, W, b, (A, B), 2.0, pack(mask))
        assert torch.equal(y, nn.functional.linear(x, merged, b))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert A.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch does so itself, and warns of it
def test_the_surrounding_model_can_be_compiled():
    """Same outputs and gradients, within float32 rounding, from one whole graph: no break at the adapters."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    keeps = [pack(torch.rand(layer.weight.shape) > 0.5) for layer in (body[0], body[2])]
    for form in ("sparselora", "hira", "masked-full"):
        net = nn.Sequential(
            MaskedLinear(body[0], form, 8, 4, keeps[0]), body[1], MaskedLinear(body[2], form, 8, 4, keeps[1])
        )
        stir_parameters = [p for n, p in net.named_parameters() if "lora_" in n]
        for p in stir_parameters:
            p.data += 0.05 * torch.randn(p.shape)
        x = torch.randn(5, 16)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        results = []
        for run in (net, compiled):
            net.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in stir_parameters)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_one_private_seam_of_peft_is_there():
    seen = []
    config = LoraConfig(r=2, target_modules="0")

    def place(target, adapter_name, **kwargs):
        seen.append((type(target), adapter_name, kwargs["config"].r, kwargs["r"]))
        return MaskedLinear(target, "sparselora", 4, 2, pack(torch.ones(4, 4) > 0))

    config._register_custom_module({nn.Linear: place})
    wrapped = PeftModel(nn.Sequential(nn.Linear(4, 4)), config)
    assert seen == [(nn.Linear, "default", 2, 2)]
    assert isinstance(wrapped.base_model.model[0], MaskedLinear)
    assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == {
        f"base_model.model.0.lora_{letter}.default" for letter in "AB"
    }


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantized_base_is_refused(kind):
    model, _, _, chosen = sparse_model("llava")
    chosen[0].layer.module.__class__ = type(kind, (nn.Linear,), {})
    with pytest.raises(SparsightError, match=rf"is {kind} and not a plain linear layer"):
        add_adapters(model, chosen)


def test_same_seed_same_adapters():
    def first(seed):
        model, _, _, chosen = sparse_model("llava")
        held = factors(add_adapters(model, chosen, seed=seed))
        return mask_hash(next(factor for name, factor in held.items() if name.endswith(".A")) > 0)

    assert first(3) == first(3) != first(4)
