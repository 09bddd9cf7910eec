"""Each policy against its paper's formula; budgets that are met; what cannot be is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from sparsight import Pattern, SparsightError, anatomy, api, load
from sparsight.allocation.plan import POLICIES, make_plan, plan_rows, planned_budget
from sparsight.allocation.policies.alpha import exponent
from sparsight.allocation.policies.owl import outliers
from sparsight.allocation.policies.sensitivity import levels, wanda_at
from sparsight.allocation.policy import CAP, Policy
from sparsight.allocation.solver import allocate
from sparsight.calibration.probe import Probe
from sparsight.data.batching import one_by_one
from sparsight.demo import MODELS

import zoo
from walks import calibration


@pytest.fixture(scope="module")
def measure():
    """A LLaVA with two batches of three; measured once for all tests."""
    model, processor = zoo.build("llava")
    return Probe(model, anatomy(model), calibration(model, processor))


def blocks_of(body, component):
    """The layers of each block, in order."""
    blocks = {}
    for layer in body.component(component):
        blocks.setdefault(layer.block, []).append(layer)
    return blocks


def sparsities(plan, body, component):
    """The mean sparsity of each block."""
    means = []
    for layers in blocks_of(body, component).values():
        zeros = sum(plan[x.name].zeros(x.shape) for x in layers if x.name in plan)
        means.append(zeros / sum(x.weight.numel() for x in layers))
    return np.array(means)


def share_of(body, plan, component):
    return {row.component: row for row in plan_rows(body, plan)}[component].sparsity


def test_owl_equals_the_published_formula(measure):
    body, norms = measure.anatomy, measure.norms()
    plan = make_plan(body, sparsity="vision=0.6,language=0.5", policy="owl", probe=measure)
    for component, asked in (("vision", 0.6), ("language", 0.5)):
        ratios = []
        for layers in blocks_of(body, component).values():
            scores = torch.cat([(x.weight.abs() * norms[x.name].reshape(1, -1)).flatten() for x in layers])
            ratios.append(float((scores > 5 * scores.mean()).sum()) / scores.numel() * 100)
        ratio = np.array(ratios)
        kept = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * 0.08 * 2)
        kept = kept - np.mean(kept) + (1 - asked)
        assert sparsities(plan, body, component) == pytest.approx(1 - kept, abs=0.011)
        for layers, r in zip(blocks_of(body, component).values(), ratio, strict=True):
            assert outliers(body.component(component), measure)[layers[0].name] == pytest.approx(r / 100)
            assert np.ptp([plan[x.name].sparsity for x in layers]) < 0.05  # one sparsity, as far as whole zeros go
        assert share_of(body, plan, component) == pytest.approx(asked, abs=5e-4)


def test_the_exponent_is_that_of_the_best_fitting_tail_near_the_peak():
    """Step by step: the fullest bin, and for every eigenvalue that may begin the tail its law against the counts."""
    for seed, decay in ((0, -2), (1, -1), (2, 0)):
        W = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, decay, 64)
        eigs = np.sort(np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2)
        counts, edges = np.histogram(np.log10(eigs), 100)
        peak = 10 ** edges[counts.argmax()]
        fits = {}
        for i, first in enumerate(eigs[:-1]):
            if np.log10(0.95 * peak) <= first <= 1.5 * peak:
                tail = eigs[i:]
                alpha = 1 + len(tail) / np.log(tail / first).sum()
                share = np.array([np.mean(tail < x) for x in tail])
                fits[np.abs(1 - (tail / first) ** (1 - alpha) - share).max()] = alpha
        assert exponent(W) == pytest.approx(fits[min(fits)], rel=1e-3)
        assert exponent(torch.cat([W, torch.zeros(5, 64)])) == pytest.approx(exponent(W), rel=1e-3)  # dead rows say nothing
    assert exponent(torch.eye(8)) == exponent(torch.zeros(8, 8)) == 100


def test_alpha_equals_the_published_mapping_on_a_trained_model():
    model, _ = load(MODELS["llava"])
    body = anatomy(model)
    plan = make_plan(body, sparsity="vision=0.5,language=0.7", policy="alpha")
    for component, asked in (("vision", 0.5), ("language", 0.7)):
        blocks = blocks_of(body, component).values()
        metric = torch.tensor([np.mean([exponent(x.weight) for x in layers]) for layers in blocks])
        prunables = torch.tensor([sum(x.weight.numel() for x in layers) for layers in blocks])
        ratios = (metric - metric.min()) / (metric.max() - metric.min()) * 0.6 + 0.7
        ratios = ratios * (torch.sum(prunables) * asked / torch.sum(prunables * ratios))
        assert ratios.max() < 0.99
        assert sparsities(plan, body, component) == pytest.approx(ratios.numpy(), abs=0.005)
        assert share_of(body, plan, component) == pytest.approx(asked, abs=1e-4)


def test_the_zeroth_order_slope_of_one_matrix_by_hand(measure):
    layer = measure.anatomy.component("language")[3]
    W, slopes = layer.weight.clone(), []
    for i, sample in enumerate(one for batch in measure.batches for one in one_by_one(batch)):
        z, losses = measure.noise(layer, i), []
        for perturbed in (W + 1e-3 * z, W - 1e-3 * z):
            layer.write(perturbed)
            with torch.no_grad():
                losses.append(measure.model(**sample.inputs).loss.item())
        slopes.append(abs(losses[0] - losses[1]) / 2e-3)
    layer.write(W)
    assert not torch.equal(measure.noise(layer, 0), measure.noise(layer, 1))
    assert measure.slopes([layer])[layer.name] == pytest.approx(sum(slopes) / len(slopes), abs=1e-3)
    assert measure.slopes([layer])[layer.name] > 0.01
    g = measure.gradients([layer])[layer.name].mean  # what it estimates: |<g, z>|
    along = [abs(float((measure.noise(layer, i) * g).sum())) for i in range(len(slopes))]
    assert sum(slopes) / len(slopes) < 4 * sum(along) / len(along)


def test_first_order_is_w_times_g_and_not_w_squared(measure):
    body = measure.anatomy
    plan = make_plan(body, sparsity=0.5, policy="ecoflap-first", probe=measure)
    layers = [*body.component("vision"), *body.component("language")]
    found = measure.gradients(layers)

    def kept(power):
        """Densities of the blocks of a rule |W|^power |g|, by the formula; nothing reaches a bound here."""
        blocks = [*blocks_of(body, "vision").values(), *blocks_of(body, "language").values()]
        score = [sum(float((x.weight.abs() ** power * found[x.name].mean.abs()).sum()) for x in b) for b in blocks]
        size = np.array([sum(x.weight.numel() for x in b) for b in blocks])
        return 0.4 + np.array(score) / np.sum(score) * (0.5 - 0.4) * size.sum() / size

    ours = 1 - np.concatenate([sparsities(plan, body, c) for c in ("vision", "language")])
    assert (kept(1) < 1).all()
    assert ours == pytest.approx(kept(1), abs=0.02)  # in whole columns
    assert np.abs(kept(2) - kept(1)).max() == pytest.approx(0.023, abs=0.002)  # where the forks' W^2 |g| goes astray


def test_the_published_repair_of_the_budget_adds_where_ours_meets_it():
    """Three groups of ten, alike; 16 weights of 30 may stay. Published: ceil everywhere, then the surplus once more."""
    sizes, keep = [10, 10, 10], 16
    published = [math.ceil(n * 0.2) + math.ceil((keep - 6) / 3) for n in sizes]
    surplus = sum(published) - keep
    published[0] += min(surplus, published[0] - int(sizes[0] * 0.2))  # `+=`, where weights are to be removed
    assert sum(published) == 20
    shapes = {f"{i}": (1, 10) for i in range(3)}
    made = allocate(dict.fromkeys(shapes, 1.0), shapes, 1 - keep / 30, pattern=Pattern.row(0), scale="proportional", cap=0.8)
    assert sum(10 - Pattern.row(s).zeros((1, 10)) for s in made.sparsity.values()) == keep


def test_ecoflap_shares_one_budget_over_both_components(measure):
    body = measure.anatomy
    plan = make_plan(body, sparsity="vision=0.4,language=0.6", policy="ecoflap", probe=measure)
    layers = [*body.component("vision"), *body.component("language")]
    asked = sum((0.4 if x.component == "vision" else 0.6) * x.weight.numel() for x in layers)
    assert sum(plan[x.name].zeros(x.shape) for x in layers) == pytest.approx(asked, abs=8)
    assert abs(share_of(body, plan, "vision") - 0.4) > 0.01
    mean = asked / sum(x.weight.numel() for x in layers)
    assert max(p.sparsity for p in plan.values()) <= mean + 0.1 + 1e-9  # as in the published scripts
    more = make_plan(body, sparsity=0.85, policy="ecoflap", probe=measure)
    assert 0.85 < max(p.sparsity for p in more.values()) <= 0.95 + 1e-9


def test_sensitivity_spends_where_the_answers_suffer_least(measure):
    body = measure.anatomy
    plan = make_plan(body, sparsity=0.5, policy="sensitivity", probe=measure)
    layers = [*body.component("vision"), *body.component("language")]
    assert sum(plan[x.name].zeros(x.shape) for x in layers if x.name in plan) == pytest.approx(
        0.5 * sum(x.weight.numel() for x in layers), abs=8
    )
    blocks = [*blocks_of(body, "vision").values(), *blocks_of(body, "language").values()]
    harm = [measure.divergence(wanda_at(b, 0.5, measure)) / sum(x.weight.numel() for x in b) for b in blocks]
    got = np.concatenate([sparsities(plan, body, c) for c in ("vision", "language")])
    assert harm[1] == 0  # LLaVA takes its features before the last vision block
    assert got[1] == pytest.approx(CAP, abs=0.03)
    assert got[np.argmax(harm)] == got.min()
    assert levels(layers, {"vision": 0.5, "language": 0.5}) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert levels(layers, {"vision": 0.85, "language": 0.85})[-2:] == [0.9, pytest.approx(0.95)]


@pytest.mark.parametrize(("policy", "carries"), [("language-only", "language"), ("vision-only", "vision")])
def test_one_component_carries_the_zeros_of_both(measure, policy, carries):
    body = measure.anatomy
    both = sum(x.weight.numel() for c in ("vision", "language") for x in body.component(c))
    plan = make_plan(body, sparsity=0.15, policy=policy)
    assert {body[name].component for name in plan} == {carries}
    assert sum(p.zeros(body[name].shape) for name, p in plan.items()) == pytest.approx(0.15 * both, abs=16)
    assert np.ptp([p.sparsity for p in plan.values()]) < 0.04  # the same everywhere, as far as whole zeros go
    with pytest.raises(SparsightError, match=r"-only cannot carry `sparsity=0\.9` of all layers.*ask for less"):
        make_plan(body, sparsity=0.9, policy=policy)
    other = {"vision": "language", "language": "vision"}[carries]
    with pytest.raises(SparsightError, match=f"`policy`: {policy} puts every zero into {carries}.*above 0"):
        make_plan(body, sparsity=f"{other}=0.5", policy=policy)


def test_nm_and_dense_layers_mix_as_the_policy_says(measure):
    body = measure.anatomy
    plan = make_plan(body, pattern="2:4", sparsity=0.3, policy="owl", probe=measure)
    assert {str(p) for p in plan.values()} == {"2:4"}
    for component in ("vision", "language"):
        layers = body.component(component)
        assert share_of(body, plan, component) == pytest.approx(0.3, abs=0.02)  # 21 layers add up to so much
        ratio = outliers(layers, measure)
        dense = [x for x in layers if x.name not in plan]
        assert np.mean([ratio[x.name] for x in dense]) > np.mean([ratio[x.name] for x in layers if x.name in plan])
    for policy in ("alpha", "language-only", "sensitivity", "ecoflap-first"):
        mixed = make_plan(body, pattern="2:4", sparsity=0.2, policy=policy, probe=measure)
        layers = [*body.component("vision"), *body.component("language")]
        zeros = sum(p.zeros(body[name].shape) for name, p in mixed.items())
        assert zeros / sum(x.weight.numel() for x in layers) == pytest.approx(0.2, abs=0.005)


def test_nm_at_less_than_its_own_sparsity_needs_a_policy_that_chooses(measure):
    with pytest.raises(SparsightError, match=r"language=0\.3 contradicts `pattern=2:4`.*such as owl"):
        make_plan(measure.anatomy, pattern="2:4", sparsity="language=0.3")
    for policy in ("uniform", "owl", "language-only"):
        with pytest.raises(SparsightError, match=r"vision=0\.6 contradicts `pattern=2:4`"):
            planned_budget("2:4", "vision=0.6", policy)
    with pytest.raises(SparsightError, match="vision-only cannot carry"):
        make_plan(measure.anatomy, pattern="2:4", sparsity=0.45, policy="vision-only")


def test_an_nm_that_does_not_fit_is_refused_before_measuring(measure):
    fresh = Probe(measure.model, measure.anatomy, measure.batches)
    with pytest.raises(SparsightError, match="does not fit"):
        make_plan(fresh.anatomy, pattern="5:7", policy="owl", probe=fresh)
    assert fresh.once(("norms",), lambda: "not yet") == "not yet"


def test_a_function_gets_the_measure_if_it_takes_one(measure):
    def by_norm(layers, budget, measure):
        norms = {name: float(norm.mean()) for name, norm in measure.norms(layers).items()}
        middle = sorted(norms.values())[len(norms) // 2]
        return {name: 0.25 if norm > middle else 0.75 for name, norm in norms.items()}

    plan = make_plan(measure.anatomy, policy=by_norm, probe=measure)
    assert {str(p) for p in plan.values()} == {"row 0.25", "row 0.75"}
    assert len(make_plan(measure.anatomy, policy=lambda layers, budget: {layers[0].name: 0.5}, probe=measure)) == 1
    mine = Policy(lambda layers, budget, measure: {x.name: float("down" in x.name) for x in layers})
    plan = make_plan(measure.anatomy, sparsity="language=0.5", policy=mine)
    down = {name: p.sparsity for name, p in plan.items() if "down" in name}
    assert not down
    assert share_of(measure.anatomy, plan, "language") == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("policy", [name for name, rule in POLICIES.items() if isinstance(rule, Policy) and rule.data])
def test_a_policy_without_its_data_is_refused(measure, policy):
    with pytest.raises(SparsightError, match=f"^`policy`: {policy} needs calibration samples; give `data`$"):
        make_plan(measure.anatomy, policy=policy)
    with pytest.raises(SparsightError, match="needs calibration samples"):
        api.plan("no/such", policy=policy)  # before the model is looked for


def test_a_plan_with_data_can_be_looked_at(zoo_folder, scenes):
    given = {"data": scenes, "samples": 6, "batch_size": 3, "sparsity": 0.5}
    owl = api.plan(zoo_folder("llava"), policy="owl", **given)
    assert share_of(owl.anatomy, owl.plan, "language") == pytest.approx(0.5, abs=1e-3)
    assert len({p.sparsity for p in owl.plan.values()}) > 2
    assert api.plan(zoo_folder("llava"), policy="owl", **given).plan == owl.plan  # the same seed, the same plan
    noted = []
    api.plan(zoo_folder("llava"), policy="ecoflap", progress=lambda *note: noted.append(note), **given)
    assert noted[-1][1:] == (33, 33)
    with pytest.raises(SparsightError, match="`samples`"):
        api.plan(zoo_folder("llava"), policy="owl", data=scenes, samples=0)


def test_the_command_line_plans_with_data(zoo_folder, scenes, capsys, monkeypatch):
    from sparsight.cli import app as cli

    def run(*words):
        monkeypatch.setattr("sys.argv", ["sparsight", "plan", str(zoo_folder("llava")), *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    code, out, _ = run("--policy", "owl", "--pattern", "2:4", "--sparsity", 0.3, "--data", scenes, "--samples", 6, "--json")
    assert code == 0
    assert set(json.loads(out)["layers"].values()) == {"2:4"}
    assert run("--policy", "owl") == (2, "", "sparsight: --policy: owl needs calibration samples; give --data\n")
