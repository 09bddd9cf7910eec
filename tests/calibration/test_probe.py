"""What policies measure: against plain passes of the model, which is bit for bit as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from sparsight import SparsightError, anatomy
from sparsight.allocation.policies.sensitivity import wanda_at
from sparsight.calibration.gradients import gradients
from sparsight.calibration.probe import Probe
from sparsight.data.batching import one_by_one
from sparsight.data.encoding import select_answers
from sparsight.data.own_batches import as_batches

import zoo
from walks import calibration


@pytest.fixture(scope="module")
def measure():
    """A LLaVA with two batches of three; measured once for all tests."""
    model, processor = zoo.build("llava")
    return Probe(model, anatomy(model), calibration(model, processor))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_measuring_leaves_the_model_as_it_was(name):
    model, processor = zoo.build(name)
    body = anatomy(model)
    ready = calibration(model, processor)
    model(**ready[0].inputs)  # transformers leaves hooks of its own at the first forward
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    model.train()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    made = Probe(model, body, ready)
    layers = [layer for layer in body.layers if layer.component != "connector"]
    some = layers[:: max(1, len(layers) // 3)]
    assert set(made.norms(layers)) == {layer.name for layer in layers}
    assert all(slope >= 0 for slope in made.slopes(some).values())
    assert made.divergence(wanda_at(layers[-2:], 0.75, made)) > 0
    assert made.divergence({}) == 0
    found = made.gradients(layers)
    assert any(bool(g.mean.any()) for g in found.values())
    assert all(bool((g.square >= g.mean.square() - 1e-6).all()) for g in found.values())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


def test_norms_are_those_of_single_samples_without_padding(measure):
    model, processor = zoo.build("llava")
    layers = measure.anatomy.component("language")
    squares = {layer.name: torch.zeros(layer.shape[1]) for layer in layers}

    def add(name):
        def hook(module, args):
            squares[name] += args[0].flatten(0, -2).square().sum(0)

        return hook

    hooks = [model.get_submodule(x.name).register_forward_pre_hook(add(x.name)) for x in layers]
    with torch.no_grad():
        for batch in calibration(model, processor, size=1):
            model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    norms = measure.norms()
    for layer in layers:
        torch.testing.assert_close(norms[layer.name], squares[layer.name].sqrt(), rtol=1e-4, atol=1e-4)


def test_gradients_equal_those_of_the_models_own_loss(measure):
    layers = measure.anatomy.component("language")[:3]
    weights = [layer.module.weight for layer in layers]
    alone = calibration(*zoo.build("llava"), size=1)
    each = [torch.autograd.grad(measure.model(**b.inputs).loss, weights) for b in alone]
    for i, (layer, found) in enumerate(zip(layers, gradients(measure.model, layers, measure.batches).values(), strict=True)):
        g = torch.stack([grads[i] for grads in each])  # (samples, out, in)
        torch.testing.assert_close(found.mean, g.mean(0), rtol=1e-4, atol=1e-7, msg=layer.name)
        torch.testing.assert_close(found.square, g.square().mean(0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("own", [False, True], ids=["samples", "dicts"])
def test_the_batch_size_changes_no_measurement(own):
    """Slopes and gradients are those of single samples, however samples are cut into batches."""
    model, processor = zoo.build("llava")
    body = anatomy(model)
    layers = body.component("language")[:3]
    found = []
    for size in (1, 3, 6):
        ready = calibration(model, processor, size=size)
        if own:
            ready = as_batches(model, [batch.inputs for batch in ready])
        made = Probe(model, body, ready)
        found.append((made.slopes(layers), made.gradients(layers)))
    for slopes, grads in found[1:]:
        for layer in layers:
            assert slopes[layer.name] == pytest.approx(found[0][0][layer.name], rel=0.02, abs=2e-4)
            for name in ("mean", "square"):
                torch.testing.assert_close(
                    getattr(grads[layer.name], name), getattr(found[0][1][layer.name], name), rtol=1e-3, atol=1e-7
                )


def test_samples_without_an_answer_count_nowhere():
    model, processor = zoo.build("llava")
    layers = anatomy(model).component("language")[:1]
    inputs = {key: value.clone() for key, value in calibration(model, processor, size=6)[0].inputs.items()}
    inputs["labels"][3] = -100
    one = gradients(model, layers, as_batches(model, [inputs]))[layers[0].name]
    rest = [i for i in range(6) if i != 3]
    two = gradients(model, layers, as_batches(model, [{key: value[rest] for key, value in inputs.items()}]))
    torch.testing.assert_close(one.mean, two[layers[0].name].mean)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_batch_is_cut_into_its_samples(name):
    """One row each, with the same logits at the answers as in the batch."""
    model, processor = zoo.build(name)
    batch = calibration(model, processor, n=3)[0]
    alone = list(one_by_one(batch))
    assert [one.rows for one in alone] == [1, 1, 1]
    assert [one.samples for one in alone] == [(sample,) for sample in batch.samples]
    with torch.no_grad():
        together, targets = select_answers(model(**batch.inputs).logits, batch.inputs["labels"], batch.shifted)
        parts = [select_answers(model(**one.inputs).logits, one.inputs["labels"], one.shifted) for one in alone]
    assert torch.equal(targets, torch.cat([labels for _, labels in parts]))
    torch.testing.assert_close(torch.cat([logits for logits, _ in parts]), together, rtol=1e-3, atol=2e-4)


def test_a_batch_that_cannot_be_cut_stays_whole():
    """Patches of all images in one tensor, as a user's own batch of Qwen2.5-VL has them."""
    model, processor = zoo.build("qwen2.5-vl")
    batch = as_batches(model, [calibration(model, processor, n=3)[0].inputs])[0]
    assert [one.rows for one in one_by_one(batch)] == [3]


def test_no_label_reaches_a_model_whose_logits_alone_are_wanted(measure):
    """Its own loss would be computed over every position and the whole vocabulary."""
    seen = []
    hook = measure.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append("labels" in kwargs), with_kwargs=True)
    measure.model.requires_grad_(True)
    gradients(measure.model, measure.anatomy.component("language")[:1], measure.batches)
    Probe(measure.model, measure.anatomy, measure.batches).dense_answers()
    hook.remove()
    assert seen == [False] * 8


def test_gradients_are_float32_whatever_the_model_is():
    model, processor = zoo.build("instructblip-t5", dtype=torch.bfloat16)
    body = anatomy(model)
    found = gradients(model, body.component("language"), calibration(model, processor, n=3))
    assert all(g.mean.dtype == g.square.dtype == torch.float32 and g.mean.isfinite().all() for g in found.values())
    assert sum(bool(g.mean.any()) for g in found.values()) == len(found)


def test_the_divergence_is_that_of_the_answers_alone(measure):
    layers = measure.anatomy.component("language")[:7]
    changed = {layer.name: torch.zeros_like(layer.weight) for layer in layers}
    told = measure.divergence(changed)
    measure.dense_answers()
    with measure.changed(changed):
        drift = measure.drift()
    total, back, tokens = 0.0, 0.0, 0
    other, _ = zoo.build("llava")
    for name in changed:
        other.get_submodule(name).weight.data.zero_()
    with torch.no_grad():
        for batch in measure.batches:
            labels = batch.inputs["labels"]
            p, q = (select_answers(m(**batch.inputs).logits, labels, True)[0].softmax(-1) for m in (measure.model, other))
            total += float((p * (p / q).log()).sum())
            back += float((q * (q / p).log()).sum())
            tokens += int((labels != -100).sum())
    assert told == pytest.approx(total / tokens, rel=1e-4)
    assert drift == pytest.approx(back / tokens, rel=1e-4)
    assert measure.drift() == 0


def test_no_sample_at_all_is_refused(measure):
    with pytest.raises(SparsightError, match="no calibration sample to measure on"):
        Probe(measure.model, measure.anatomy, [])


def test_a_layer_that_no_sample_reaches_is_named(measure):
    fresh = Probe(measure.model, measure.anatomy, measure.batches)
    fresh.once(("norms",), dict)
    with pytest.raises(SparsightError, match=r"q_proj: no calibration sample reached this layer"):
        fresh.norms([x for x in measure.anatomy.layers if "q_proj" in x.name])
