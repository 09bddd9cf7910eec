"""The loop on real models: tokens, experts, permutation, reconstruction, resuming, and inputs that are broken."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace

import pytest
import torch

from sparsight import Pattern, SparsightError, anatomy
from sparsight.allocation.plan import make_plan
from sparsight.calibration.moment_cache import MomentCache
from sparsight.calibration.moments import real_tokens
from sparsight.calibration.observe import Watch
from sparsight.calibration.tokens import TOKENS, find_tokens
from sparsight.pruning import work
from sparsight.pruning.journal import Journal
from sparsight.pruning.loop import collect_moments, prune
from sparsight.pruning.permute import best_order
from sparsight.pruning.reconstruct import first
from sparsight.pruning.walks import LayerWalk
from sparsight.pruning.work import output_error

import zoo
from layers import case
from walks import calibration


def pruned(name="llava", pattern="row", sparsity=None, change=None, journal=None, build=None, **how):
    model, processor = zoo.build(name, **(build or {}))
    if change:
        change(model)
    body = anatomy(model)
    plan = make_plan(body, pattern=pattern, sparsity=sparsity)
    record = prune(model, body, plan, calibration(model, processor), journal=journal, **how)
    return model, body, plan, record


def mean(values):
    return sum(values) / len(values)


WAYS = [
    {"method": "ria"},
    {"method": "snip"},
    {"method": "fisher"},
    {"method": "sparsegpt"},
    {"method": "sparsegpt", "propagate": "layer"},
    {"method": "alps"},
    {"method": "alps", "dense_targets": True, "reconstruct": 1},
    {"refine": "dsnot"},
    {"refine": "swaps", "update": "pcg", "reconstruct": 1},
    {"permute": True, "pattern": "2:4", "reconstruct": 1},
    {"tokens": "atv", "propagate": "dense"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", WAYS, ids=lambda way: "+".join(str(v) for v in way.values()))
def test_every_way_holds_the_plan_on_a_model_and_resumes_to_the_same_weights(how, dtype, tmp_path):
    from sparsight.pruning.compose import compose

    steps = {key: value for key, value in how.items() if key != "pattern"}
    journal = Journal(tmp_path, compose(**steps).mask_only)
    model, body, plan, record = pruned(journal=journal, build={"dtype": dtype}, **how)
    for name, pattern in plan.items():
        assert pattern.holds(body[name].weight), name
        assert body[name].weight.dtype == dtype
    again, _, _, resumed = pruned(journal=journal, build={"dtype": dtype}, **how)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert record.layer_errors == resumed.layer_errors


def test_tokens_of_text_and_images_are_summed_apart():
    model, processor = zoo.build("llava")
    ready = calibration(model, processor)
    layer = anatomy(model).component("language")[0]
    watch, inputs = Watch([layer], len(ready), gram=True), []
    hook = layer.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad(), watch.open():
        for batch in ready:
            with watch.during(batch.padding):
                model(**batch.inputs, use_cache=False)
    hook.remove()
    moments, image_token = watch.moments[layer.name], model.config.image_token_id
    for kind, wanted in (("image", True), ("text", False)):
        X = torch.cat(
            [X[((b.inputs["input_ids"] == image_token) == wanted) & b.inputs["attention_mask"].bool()]
             for X, b in zip(inputs, ready, strict=True)]
        )  # fmt: skip
        assert moments.kinds[kind].count == len(X)
        torch.testing.assert_close(moments.kinds[kind].squares, X.square().sum(0), rtol=1e-4, atol=1e-5)
    both = sum(kind.upper for kind in moments.kinds.values()).triu()
    torch.testing.assert_close(moments.gram, both + both.triu(1).T)
    text, image = moments.kinds["text"], moments.kinds["image"]
    moments.weigh = find_tokens("text").weigh
    assert torch.equal(moments.norm, text.squares.sqrt())
    moments.weigh = find_tokens("balanced").weigh
    half = (text.count + image.count) / 2
    torch.testing.assert_close(moments.squares, half * (text.squares / text.count + image.squares / image.count))


@pytest.mark.parametrize("weights", [{"text": 1.0}, {"txt": 1.0, "image": 1.0}, {}, {"text": -1.0, "image": 1.0}, None])
def test_a_token_rule_weighs_every_kind(weights):
    with pytest.raises(SparsightError, match=r"the rule weighs \['image', 'text'\] as .*must give each a number"):
        pruned(tokens=lambda counts: weights)


@pytest.mark.parametrize("tokens", [name for name in TOKENS if name != "all"])
def test_token_rules_change_language_layers_and_no_others(tokens):
    every, _, _, plain = pruned()
    _, body, _, record = pruned(tokens=tokens)
    changed = {}
    for component in ("vision", "language"):
        pairs = zip(anatomy(every).component(component), body.component(component), strict=True)
        changed[component] = mean([float(((a.weight != 0) != (b.weight != 0)).float().mean()) for a, b in pairs])
    assert changed["vision"] == 0
    assert 0.005 < changed["language"] < 0.4
    last = body.blocks[-1].name
    if TOKENS[tokens].select:
        assert record.tokens[last]["image"] < plain.tokens[last]["image"]
        assert (record.tokens[last]["text"] == plain.tokens[last]["text"]) == (tokens == "atv")


def test_atv_takes_the_image_tokens_that_the_block_turns_most():
    from sparsight.calibration.tokens import Flow, atv

    before = torch.eye(6).unsqueeze(0)
    after = before.clone()
    after[0, 1], after[0, 3] = -before[0, 1], before[0, 0]  # distances 0, 2, 0, 1 of the four image tokens
    image = torch.tensor([[True, True, True, True, False, False]])
    (drop,) = atv([Flow(before, after, torch.ones(1, 6, dtype=torch.bool), image)])
    assert drop.tolist() == [[True, False, True, False, False, False]]  # round(0.75 * 2 texts) = 2 of them


def test_experts_are_pruned_in_place_and_those_that_saw_too_few_tokens_with_the_moments_of_all(monkeypatch):
    """That every expert is pruned with the tokens routed to it is tested with the exact procedure, in test_lockstep.py."""
    _, body, plan, record = pruned("qwen3-vl-moe")
    experts = [layer for layer in body.layers if layer.expert]
    assert len(experts) == 3 * 2 * 4  # blocks, tensors, experts
    assert record.pooled == []
    assert all(plan[x.name].holds(x.weight) for x in experts)

    monkeypatch.setattr("sparsight.calibration.moments.FEW", 10**6)
    model, processor = zoo.build("qwen3-vl-moe")
    ready, parts, seen = calibration(model, processor), anatomy(model), []
    first = next(layer for layer in parts.layers if layer.expert)
    block = next(block for block in parts.blocks if block.name == first.block)
    here = {layer.name: plan[layer.name] for layer in parts.layers if layer.block == block.name}
    dense = {layer.name: layer.weight.clone() for layer in parts.layers if layer.name in here}
    hook = first.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in ready:
            model(**batch.inputs, use_cache=False)
    hook.remove()
    X = torch.cat([X[batch.inputs["attention_mask"].flatten().bool()] for X, batch in zip(seen, ready, strict=True)])
    record = prune(model, parts, here, ready)
    assert record.pooled == [layer.name for layer in parts.layers if layer.expert and layer.name in here]
    for name in (name for name in here if "gate_up_proj" in name):
        score = dense[name].abs() * (2 * X.square().sum(0)).sqrt()  # every token goes to two experts
        assert float(((parts[name].weight != 0) != here[name].keep(score)).float().mean()) < 0.002


def test_fused_experts_are_pruned_layer_by_layer():
    """Every tensor on the outputs of the pruned one before it; before the first experts the masks are those of `block`."""
    _, body, plan, record = pruned("qwen3-vl-moe", propagate="layer")
    _, other, _, _ = pruned("qwen3-vl-moe", propagate="block")
    experts = [layer for layer in body.layers if layer.expert]
    assert all(plan[x.name].holds(x.weight) for x in body.layers if x.name in plan)
    assert {x.name for x in experts} <= set(record.layer_errors)
    down = [x for x in experts if x.expert[0] == "down_proj"]
    assert any(not torch.equal(x.weight, other[x.name].weight) for x in down)


def test_fused_experts_are_reconstructed():
    _, body, plan, record = pruned("qwen3-vl-moe", sparsity=0.7, reconstruct=3)
    experts = {x.block for x in body.layers if x.name in plan and x.expert}
    assert len(experts) == 3
    assert all(record.reconstructed[name][1] < record.reconstructed[name][0] for name in experts)
    assert all(plan[x.name].holds(x.weight) for x in body.layers if x.name in plan)


@pytest.mark.parametrize("name", ["llava", "instructblip-t5", "blip2-opt", "qwen2.5-vl"])
def test_reconstruction_lowers_every_block_s_error_and_keeps_the_zeros(name):
    before, _, _, _ = pruned(name, sparsity=0.6)
    model, body, plan, after = pruned(name, sparsity=0.6, reconstruct=4)
    dense, processor = zoo.build(name)
    assert all(pattern.holds(body[key].weight) for key, pattern in plan.items())
    errors = list(after.reconstructed.values())
    assert all(now <= then for then, now in errors)
    assert mean([now / then for then, now in errors]) < 0.85
    ready = calibration(dense, processor)
    assert apart(model, dense, ready) < apart(before, dense, ready)


@torch.no_grad()
def apart(model, dense, ready):
    """The relative distance of the last block's outputs at real tokens from those of the dense model."""
    outputs: dict = {model: [], dense: []}
    component = {b.name: b.component for b in anatomy(dense).blocks}
    name = [b for b in component if component[b] == "language"][-1]
    for which, kept in outputs.items():
        hook = which.get_submodule(name).register_forward_hook(lambda m, a, y, k=kept: k.append(first(y)))
        for batch in ready:
            which(**batch.inputs, use_cache=False)
            kept[-1] = real_tokens(kept[-1], batch.padding, "language")[0]
        hook.remove()
    here, there = (torch.cat(kept) for kept in outputs.values())
    return float((here - there).norm() / there.norm())


@pytest.mark.parametrize("propagate", ["block", "dense"])
def test_blocks_are_fitted_to_the_outputs_of_the_dense_model(propagate):
    """What is recorded of the last block is its distance from a dense model whose blocks before it are dense, too."""
    model, body, _, record = pruned(sparsity=0.6, reconstruct=2, propagate=propagate)
    dense, processor = zoo.build("llava")
    if propagate == "dense":  # the last block alone is pruned in the walk
        last = body.component("language")[-1].block
        for p, (name, q) in zip(model.parameters(), dense.named_parameters(), strict=True):
            if not name.startswith(last):
                p.data.copy_(q)
    errors = list(record.reconstructed.values())
    assert errors[-1][1] == pytest.approx(apart(model, dense, calibration(dense, processor)), rel=1e-4)


@pytest.mark.parametrize("tokens", ["all", "balanced"])
def test_dense_targets_look_at_the_inputs_of_the_dense_model(tokens):
    """(Z - X)^T X of a layer in the last block: Z from the dense model, X with every block before it pruned."""
    drifts = {}

    def keep_drift(W, keep, moments):
        drifts[len(drifts)] = moments.drift.clone()
        return W * keep

    model, body, plan, _ = pruned(sparsity=0.6, update=keep_drift, dense_targets=True, tokens=tokens)
    dense, processor = zoo.build("llava")
    last = body.component("language")[-1]
    own, twin = dict(model.named_parameters()), dict(dense.named_parameters())
    for name in own:
        if name.startswith(last.block):
            own[name].data.copy_(twin[name])
    inputs: dict = {model: [], dense: []}
    ready = calibration(dense, processor)
    for which, kept in inputs.items():
        hook = which.get_submodule(last.name).register_forward_pre_hook(lambda m, a, k=kept: k.append(a[0]))
        for batch in ready:
            with torch.no_grad():
                which(**batch.inputs, use_cache=False)
            kept[-1], image = real_tokens(kept[-1], batch.padding, "language")
            kept[-1] = kept[-1], image
        hook.remove()
    X, Z = (torch.cat([x for x, _ in kept]).double() for kept in inputs.values())
    image = torch.cat([image for _, image in inputs[model]])
    weights = find_tokens(tokens).weigh({"image": int(image.sum()), "text": int((~image).sum())})
    each = torch.where(image, weights["image"], weights["text"]).double().unsqueeze(1)
    expected = ((Z - X) * each).T @ X
    got = drifts[[layer.name for layer in body.layers if layer.name in plan].index(last.name)].double()
    assert float((Z - X).norm() / X.norm()) > 0.1
    assert float((got - expected).norm() / expected.norm()) < 1e-4


def test_dense_targets_leave_the_first_block_as_it_is():
    """Nothing is pruned before it; every later block gets other weights."""
    _, body, plan, _ = pruned(sparsity=0.7, method="alps")
    _, other, _, _ = pruned(sparsity=0.7, method="alps", dense_targets=True)
    same = {block.name: True for block in body.blocks_with(set(plan))}
    for layer in body.layers:
        if layer.block in same:
            same[layer.block] &= torch.equal(layer.weight, other[layer.name].weight)
    assert list(same.values()) == [True] + [False] * (len(same) - 1)


def test_dense_targets_are_refused_for_experts():
    with pytest.raises(SparsightError, match=r"`dense_targets`: experts, as .*experts.* may see other tokens"):
        pruned("qwen3-vl-moe", method="alps", dense_targets=True)


@pytest.mark.parametrize(("name", "layers"), [("llava", 5), ("blip2-opt", 5), ("instructblip-t5", 6), ("gemma3", 5)])
def test_a_permutation_is_absorbed(name, layers):
    """Reordered, and with nothing pruned, the model puts out what it did."""
    model, processor = zoo.build(name)
    batch = calibration(model, processor)[0]
    with torch.no_grad():
        dense = model(**batch.inputs, use_cache=False).logits

    class Lenient(Pattern):  # holds in any weight, so that nothing need be pruned
        def surplus(self, weight):
            return 0

    def untouched(W, moments, pattern, generator):
        return W

    body = anatomy(model)
    plan = {n: Lenient("n:m", 0.5, 2, 4) for n in make_plan(body, pattern="2:4")}
    before = {layer.name: layer.weight.clone() for layer in body.layers}
    record = prune(model, body, plan, calibration(model, processor), method=untouched, permute=True)
    assert len(record.permuted) == layers
    assert all(not torch.equal(before[n], body[n].weight) for n in record.permuted)
    with torch.no_grad():
        now = model(**batch.inputs, use_cache=False).logits
    torch.testing.assert_close(now, dense, rtol=1e-3, atol=1e-4)


def scaled(model, words, factor):
    for name, p in model.named_parameters():
        if any(word in name for word in words):
            p.data.mul_(factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "words", "layers"),
    [("blip2-opt", ("fc2.",), 5), ("llava", ("vision_tower.encoder.layers.0.self_attn.q", "layers.0.self_attn.k"), 5)],
    ids=["a residual stream that drowns the change", "attention so even that heads hardly matter"],
)
def test_a_permutation_that_only_seems_absorbed_is_not_made(name, words, layers, dtype):
    _, _, _, record = pruned(
        name,
        pattern="2:4",
        permute=True,
        build={"dtype": dtype},
        change=lambda m: scaled(m, words, 0.01 if "opt" in name else 0.1),
    )
    assert len(record.permuted) == layers
    assert not any(layer.endswith(("out_proj", "o_proj", "fc1")) for layer in record.permuted)


def test_gradients_are_permuted_with_the_channels(monkeypatch):
    """A gradient that equals the weight still does when the method sees it."""
    from sparsight.calibration.gradients import Gradient
    from sparsight.pruning.methods import Method

    module = sys.modules["sparsight.pruning.loop"]
    fake = lambda model, layers, batches: {x.name: Gradient(x.weight.clone(), x.weight.square()) for x in layers}  # noqa: E731
    monkeypatch.setattr(module, "gradients", fake)
    seen = []

    def compare(W, moments, pattern, generator):
        seen.append(torch.equal(W, moments.sensitivity.mean) and torch.equal(W.square(), moments.sensitivity.square))
        return W.masked_fill(~pattern.keep(W.abs()), 0)

    _, _, plan, record = pruned(pattern="2:4", permute=True, method=Method(compare, needs="gradient"))
    assert record.permuted
    assert len(seen) == len(plan)
    assert all(seen)


def test_tamp_looks_at_what_the_block_puts_out(monkeypatch):
    """Attention weights come from another run, which eager attention does with a mask that is not its own."""
    from sparsight.calibration import tokens

    flows = []
    monkeypatch.setitem(
        tokens.TOKENS, "tamp", replace(tokens.TOKENS["tamp"], select=lambda f: flows.append(f) or tokens.tamp(f))
    )
    model, processor = zoo.build("llava")
    body, ready = anatomy(model), calibration(model, processor)
    block = next(b for b in body.blocks if b.component == "language")
    outputs = []
    with torch.no_grad():
        hook = block.module.register_forward_hook(
            lambda m, args, out: outputs.append(out if torch.is_tensor(out) else out[0])
        )
        for batch in ready:
            model(**batch.inputs, use_cache=False)
        hook.remove()
    plan = {n: p for n, p in make_plan(body).items() if body[n].block == block.name}
    prune(model, body, plan, ready, tokens="tamp")
    assert all(torch.equal(flow.after, out) for flow, out in zip(flows[0], outputs, strict=True))
    for flow in flows[0]:
        torch.testing.assert_close(flow.attention.sum(1), torch.ones(len(flow.attention)), atol=0.6, rtol=0)
        assert not flow.attention[~flow.real].any()


def test_training_flags_are_put_back_one_by_one():
    model, processor = zoo.build("llava")
    model.train()
    model.model.vision_tower.eval()
    before = [m.training for m in model.modules()]
    body = anatomy(model)
    prune(model, body, make_plan(body), calibration(model, processor, 2, 2))
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize(
    ("again", "found"), [({"sparsity": 0.3}, 0.5), ({"sparsity": 0.6}, None), ({"pattern": "2:4"}, 0.55)]
)
def test_layers_that_were_sparser_before_are_listed(again, found, with_data):
    model, body, _, _ = pruned(sparsity=0.5, method="magnitude")
    ready = calibration(model, zoo.build("llava")[1]) if with_data else []
    record = prune(model, body, make_plan(body, **again), ready, method="magnitude")
    if found is None:
        assert record.sparser == {}
    else:
        assert record.sparser.keys() == {layer.name for layer in body.layers if layer.component != "connector"}
        assert all(value >= found for value in record.sparser.values())
        assert record.sparser == pytest.approx({name: layer_sparsity(body[name].weight) for name in record.sparser})


def layer_sparsity(W):
    return 1 - int(W.count_nonzero()) / W.numel()


def test_moments_of_experts_are_gone_before_others_are_gathered(monkeypatch):
    """They are one Gram matrix per expert: those of two tensors would be twice as many."""
    made, left = [], []

    def watched(gather):
        def gather_and_count(walk, layers, calls):
            if isinstance(layers, list):
                left.append(sum(ref() is not None for ref in made))
            found = gather(walk, layers, calls)
            made.extend(map(weakref.ref, found.values() if isinstance(found, dict) else [found]))
            return found

        return gather_and_count

    for name in ("_moments", "_moments_of_experts"):
        monkeypatch.setattr(LayerWalk, name, watched(getattr(LayerWalk, name)))
    pruned("qwen3-vl-moe", sparsity=0.5, method="sparsegpt", propagate="layer")
    assert left == [0] * 3 * 2  # blocks, tensors


def test_moments_of_a_cache_are_gone_before_others_are_read(monkeypatch, tmp_path):
    model, processor = zoo.build("llava")
    body, ready, cache = anatomy(model), calibration(model, processor), MomentCache(tmp_path)
    collect_moments(model, body, ready, cache)
    made, left, load = [], [], MomentCache.load

    def load_and_count(*args):
        left.append(sum(ref() is not None for ref in made))
        found = load(*args)
        made.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(MomentCache, "load", load_and_count)
    plan = make_plan(body, sparsity=0.5)
    prune(model, body, plan, ready, propagate="dense", cache=cache)
    assert left == [0] * len(body.blocks_with(set(plan)))


def test_a_layer_that_the_loss_does_not_see_is_scored_as_wanda_does_and_listed():
    """LLaVA's last vision block does not reach the output."""
    _, body, plan, record = pruned(method="snip")
    _, same, _, _ = pruned(method="wanda", propagate="dense")
    last = [layer.name for layer in body.layers if layer.block == "model.vision_tower.encoder.layers.1"]
    assert record.ungraded == last
    assert all(plan[n].holds(body[n].weight) for n in last)
    assert same


def test_a_better_order_keeps_more_under_n_m():
    W, _, moments = case(rows=64, columns=128)
    score, pattern = W.abs() * moments.norm, Pattern.nm(2, 4)
    order = best_order(score, pattern)
    assert sorted(order.tolist()) == list(range(128))

    def kept(score):
        return float((score * pattern.keep(score)).sum())

    unstructured = float(score.topk(64, dim=1).values.sum())
    assert kept(score[:, order]) > kept(score) + 0.3 * (unstructured - kept(score))


def test_permutation_lowers_what_n_m_costs():
    """More of the score is kept in the reordered layers."""
    _, _, _, plain = pruned(method="ria", pattern="2:4")
    _, _, _, moved = pruned(method="ria", pattern="2:4", permute=True)
    assert moved.permuted
    assert mean([moved.layer_errors[n] for n in moved.permuted]) < mean([plain.layer_errors[n] for n in moved.permuted])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("propagate", ["block", "layer", "dense"])
@pytest.mark.parametrize("where", ["weight", "input"])
def test_a_broken_weight_or_input_stops_with_the_layer_s_name(where, propagate, value):
    model, processor = zoo.build("llava")
    body = anatomy(model)
    ready = calibration(model, processor)
    layer = body.component("language")[3]
    if where == "weight":
        layer.weight[0, 0] = value
    else:
        ready[1].inputs["pixel_values"][:] = value
        layer = body.layers[2 if propagate == "layer" else 0]  # in the order of the calls, and of the names
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(SparsightError, match=rf"{layer.name}: (the weights|its calibration inputs) hold NaN or infinity"):
        prune(model, body, make_plan(body), ready, propagate=propagate)
    changed = sum(not torch.equal(p.nan_to_num(7), q.nan_to_num(7)) for p, q in zip(model.parameters(), before, strict=True))
    assert changed == 0


@pytest.mark.parametrize("gram", [False, True])
def test_the_variance_of_inputs_far_from_zero_is_right(gram):
    """A mean of 1,000 deviations, and kinds of tokens whose means differ: E[x^2] - E[x]^2 is rounding in float32."""
    from sparsight.calibration.moments import Moments

    g = torch.Generator().manual_seed(0)
    X = torch.randn(900, 16, generator=g, dtype=torch.float64) + 1000
    image = torch.arange(900) % 3 == 0
    X[image] += 2
    moments = Moments(16, torch.device("cpu"), with_gram=gram)
    for rows in torch.arange(900).split(200):
        moments.add(X[rows].float(), image=image[rows])
    torch.testing.assert_close(moments.variance.double(), X.float().double().var(0, correction=0), rtol=1e-3, atol=0)
    order = torch.randperm(16, generator=g)
    assert torch.equal(moments.permuted(order).variance, moments.variance[order])
    state = Moments.of_state(moments.state(), moments.weigh, moments.device)
    assert torch.equal(Moments.pooled([state]).variance, moments.variance)


def test_a_gram_matrix_that_needs_more_damping_is_reported():
    W, X, _ = case(columns=32)
    from sparsight.calibration.moments import Moments

    moments = Moments(32, W.device, with_gram=True)
    moments.add(X)
    moments.kinds["text"].upper.diagonal().mul_(0.5)  # not a Gram matrix
    moments.inverse_factor()
    assert moments.damping > 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("how", WAYS, ids=lambda way: "+".join(str(v) for v in way.values()))
def test_every_way_on_a_gpu_prunes_as_on_a_cpu(how):
    steps = {key: value for key, value in how.items() if key != "pattern"}
    _, expected, plan, _ = pruned(**how)
    model, processor = zoo.build("llava")
    body = anatomy(model.cuda())
    prune(model, body, plan, [batch.to("cuda") for batch in calibration(model, processor)], **steps)
    agree = [float(((body[n].weight.cpu() != 0) == (expected[n].weight != 0)).float().mean()) for n in plan]
    assert all(pattern.holds(body[name].weight) for name, pattern in plan.items())
    assert mean(agree) > 0.97


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.99])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (1, 1), (1, 64), (128, 1)])
def test_a_layers_error_is_that_of_its_outputs_in_any_dtype(inputs, outputs, dtype, sparsity, tiles, monkeypatch):
    monkeypatch.setattr(work, "has_tiles", lambda x: tiles)
    torch.manual_seed(0)
    W, X = torch.randn(outputs, 512).to(dtype), torch.randn(inputs, 512).to(dtype)
    X[:, 3] *= 300  # an outlier channel
    for change in (0, 0.01):
        pruned = (W.double() * (torch.rand(W.shape) >= sparsity) * (1 + change * torch.randn(W.shape))).to(dtype)
        pruned[:, 0] = 0
        x, w, p = X.double(), W.double(), pruned.double()
        exact = float(torch.linalg.norm(x @ (p - w).T) / torch.linalg.norm(x @ w.T))
        rounds = tiles and dtype == torch.bfloat16 and inputs * outputs > 4096
        found, wide = output_error(X, W, pruned), output_error(X.float(), W.float(), pruned.float())
        assert found == pytest.approx(exact, rel=1e-3 if rounds else 1e-4)
        assert (found != wide) == rounds
    assert output_error(X, W, W) == 0
    assert output_error(torch.zeros(0, 512, dtype=dtype), W, pruned) == 0
