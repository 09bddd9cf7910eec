"""Composition: what a name stands for, and what is refused together, by name."""

from __future__ import annotations

import pytest
import torch

from sparsight import Pattern, SparsightError, anatomy
from sparsight.allocation.plan import make_plan
from sparsight.calibration.tokens import TokenRule
from sparsight.pruning.compose import compose, describe, policy_of
from sparsight.pruning.loop import prune
from sparsight.pruning.methods import METHODS, PRESETS, REFINES, Method
from sparsight.specs import PruneSpec

import zoo
from layers import case
from walks import calibration


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "wnada"}, r"`method`: unknown method 'wnada'; did you mean wanda\?"),
        ({"refine": "swap"}, r"`refine`: unknown refine 'swap'; did you mean swaps\?"),
        ({"update": "cg"}, r"`update`: unknown update 'cg'; .*allowed: pcg"),
        ({"tokens": "balance"}, r"`tokens`: unknown rule 'balance'; did you mean balanced\?"),
        ({"propagate": "layers"}, r"`propagate`: unknown value 'layers'; did you mean layer\?"),
        ({"reconstruct": -1}, r"`reconstruct`: -1 is not a number of epochs"),
        ({"reconstruct": True}, r"`reconstruct`: True is not a number of epochs"),
        ({"method": "sparsegpt", "refine": "dsnot"}, r"`refine`: moves the zeros of the dense weights.*`update=pcg`"),
        ({"method": "dsnot", "refine": "swaps"}, r"swaps contradicts `method=dsnot`.*give `method=wanda` `refine=swaps`"),
        ({"propagate": "layer", "reconstruct": 2}, r"`reconstruct`: needs whole blocks"),
        ({"propagate": "layer", "permute": True}, r"`permute`: needs whole blocks"),
        ({"method": "alps", "propagate": "layer", "dense_targets": True}, r"`dense_targets`: needs whole blocks"),
        ({"method": "alps", "propagate": "dense", "dense_targets": True}, r"`dense_targets`: with `propagate=dense` every"),
        ({"refine": "swaps", "dense_targets": True}, r"`dense_targets`: are for solvers.*add `update=pcg`"),
        ({"propagate": "layer", "tokens": "atv"}, r"`tokens`: this rule looks at a block's output"),
        ({"permute": True, "pattern": Pattern.row(0.5)}, r"`permute`: regroups channels for n:m; `pattern=row`"),
        ({"method": "magnitude", "tokens": "text"}, r"`tokens`: this method does not look at inputs"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given, says):
    with pytest.raises(SparsightError, match=says):
        compose(**given)


def test_needs_add_up_and_rewriting_is_known():
    assert compose("magnitude").needs == set()
    assert compose("magnitude", refine="swaps").needs == {"gram"}
    assert compose("snip", refine="dsnot", update="pcg").needs == {"gradient", "norm", "gram"}
    assert compose("wanda", refine="swaps").mask_only
    for step in ({"update": "pcg"}, {"reconstruct": 1}, {"permute": True}):
        assert not compose("wanda", **step).mask_only
    assert not compose("sparsegpt").mask_only


def test_a_preset_is_its_composition():
    W, _, moments = case()
    generator = torch.Generator()
    for name, preset in PRESETS.items():
        steps = {key: value for key, value in preset.items() if key != "policy"}
        assert torch.equal(
            compose(name).prune(W, moments, Pattern.row(0.5), generator),
            compose(**steps).prune(W, moments, Pattern.row(0.5), generator),
        )
    assert policy_of(PruneSpec(method="ecoflap")) == policy_of(PruneSpec(method="ecoflap", policy="ecoflap")) == "ecoflap"
    assert policy_of(PruneSpec()) == "uniform"
    with pytest.raises(SparsightError, match=r"uniform contradicts `method=ecoflap`"):
        policy_of(PruneSpec(method="ecoflap", policy="uniform"))
    assert policy_of(PruneSpec(policy="owl")) == "owl"
    with pytest.raises(SparsightError, match=r"owl contradicts `method=ecoflap`"):
        policy_of(PruneSpec(method="ecoflap", policy="owl"))
    assert set(METHODS) & set(PRESETS) == set()


def in_place(W, moments, pattern, generator):
    W[:, ::2] = 0
    return W


def keep_half(W, moments, pattern, generator):
    return W.masked_fill(~pattern.keep(W.abs().float()), 0)


NONSENSE = {
    "a method without a result": ({"method": lambda W, moments, pattern, generator: None}, "the method gave no finite"),
    "a method of another shape": ({"method": lambda W, moments, pattern, generator: W[:4]}, "the method gave no finite"),
    "NaN": ({"method": lambda W, moments, pattern, generator: W * float("nan")}, "the method gave no finite"),
    "too few zeros": ({"method": lambda W, moments, pattern, generator: W}, "holds the pattern row 0.5"),
    "mask only": (
        {"method": Method(lambda W, m, p, generator: 2 * keep_half(W, m, p, 0))},
        "mask_only=False",
    ),
    "a mask that is none": ({"refine": lambda W, keep, moments, pattern: None}, "no boolean mask"),
    "a float mask": ({"refine": lambda W, keep, moments, pattern: keep.float()}, "no boolean mask"),
    "a narrow mask": ({"refine": lambda W, keep, moments, pattern: keep[:1]}, "no boolean mask"),
    "an empty mask": ({"refine": lambda W, keep, moments, pattern: keep & False}, "keeps 0 weights, not"),
    "weights outside the mask": ({"update": lambda W, keep, moments: W}, "zero outside the mask"),
    "no weights": ({"update": lambda W, keep, moments: None}, "zero outside the mask"),
    "no weighing": ({"tokens": lambda counts: None}, "must give each a number from 0"),
    "weighing by NaN": ({"tokens": lambda counts: dict.fromkeys(counts, float("nan"))}, "must give each a number from 0"),
    "nothing left": ({"tokens": TokenRule(select=lambda flows: [f.real for f in flows])}, "left nothing of its inputs"),
    "too few masks": ({"tokens": TokenRule(select=lambda flows: [])}, r"one boolean mask \(B, T\)"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_functions_that_give_nonsense_are_refused_with_the_layer_s_name(case):
    steps, says = NONSENSE[case]
    model, processor = zoo.build("llava")
    body = anatomy(model)
    plan = {name: p for name, p in make_plan(body).items() if ".language_model." in name}
    with pytest.raises(SparsightError, match=says):
        prune(model, body, plan, calibration(model, processor, 2, 2), **steps)


def test_a_method_may_work_in_place():
    """It is handed a copy: errors are measured against the weights as they were."""
    model, processor = zoo.build("llava")
    body = anatomy(model)
    record = prune(model, body, make_plan(body), calibration(model, processor, 2, 2), method=in_place)
    assert all(error > 0.05 for error in record.layer_errors.values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": lambda W, moments: W}, r"`method`: .* must be callable as \(W, moments, pattern, \*, generator\)"),
        ({"refine": lambda W: W}, r"`refine`: .* must be callable as \(W, keep, moments, pattern\)"),
        ({"update": lambda W: W}, r"`update`: .* must be callable as \(W, keep, moments\)"),
        ({"method": Method}, r"`method`: unknown method <class"),
        ({"method": ["wanda"]}, r"`method`: unknown method \['wanda'\]"),
        ({"tokens": None}, r"`tokens`: unknown rule None"),
        ({"propagate": None}, r"`propagate`: unknown value None"),
    ],
)
def test_what_is_no_function_of_its_kind_is_refused(given, says):
    with pytest.raises(SparsightError, match=says):
        compose(**given)


def test_what_wraps_a_function_is_recorded_by_the_function_s_name():
    spec = PruneSpec(method=Method(keep_half), refine=REFINES["swaps"], tokens=TokenRule(select=in_place))
    assert describe(spec) == "keep_half + swaps"
    facts = spec.facts()
    assert {key: facts[key] for key in ("method", "refine", "tokens")} == {
        "method": "keep_half", "refine": "swaps", "tokens": "in_place",
    }  # fmt: skip


def test_functions_work_wherever_names_do():
    W, _, moments = case()

    def mine(W, moments, pattern, generator):
        return W.masked_fill(~pattern.keep(W.abs().float()), 0)

    def back_to_front(W, keep, moments, pattern):
        return keep.flip(1)

    def halved(W, keep, moments):
        return W * keep / 2

    choice = compose(mine, refine=back_to_front, update=halved, tokens=lambda counts: dict.fromkeys(counts, 2.0))
    expected = W * Pattern.row(0.5).keep(W.abs()).flip(1) / 2
    assert torch.equal(choice.prune(W, moments, Pattern.row(0.5), torch.Generator()), expected)
    spec = PruneSpec(method=mine, refine=back_to_front, update=halved, reconstruct=3)
    assert describe(spec) == "mine + back_to_front + halved + reconstruct 3"
    assert describe(PruneSpec(method="alps", dense_targets=True)) == "alps + dense targets"
