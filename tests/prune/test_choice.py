"""Composition: what a name stands for, and what is refused together, by name."""

from __future__ import annotations

import pytest
import torch

from sparsight import Pattern, SparsightError
from sparsight.prune.choice import choose, named, preset_policy
from sparsight.prune.methods import METHODS, PRESETS

from layers import case


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "wnada"}, r"--method: unknown method 'wnada'; did you mean wanda\?"),
        ({"refine": "swap"}, r"--refine: unknown refine 'swap'; did you mean swaps\?"),
        ({"update": "cg"}, r"--update: unknown update 'cg'; .*allowed: pcg"),
        ({"tokens": "balance"}, r"--tokens: unknown rule 'balance'; did you mean balanced\?"),
        ({"propagate": "stages"}, r"--propagate: unknown value 'stages'; did you mean stage\?"),
        ({"reconstruct": -1}, r"--reconstruct: -1 is not a number of epochs"),
        ({"reconstruct": True}, r"--reconstruct: True is not a number of epochs"),
        ({"method": "sparsegpt", "refine": "dsnot"}, r"--refine: moves the zeros of the dense weights.*--update pcg"),
        ({"method": "dsnot", "refine": "swaps"}, r"swaps contradicts --method dsnot.*give --method wanda --refine swaps"),
        ({"propagate": "stage", "reconstruct": 2}, r"--reconstruct: needs whole blocks"),
        ({"propagate": "stage", "permute": True}, r"--permute: needs whole blocks"),
        ({"propagate": "stage", "tokens": "atv"}, r"--tokens: this rule looks at a block's output"),
        ({"permute": True, "pattern": Pattern.row(0.5)}, r"--permute: regroups channels for n:m; --pattern row"),
        ({"method": "magnitude", "tokens": "text"}, r"--tokens: this method looks at the weights alone"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given, says):
    with pytest.raises(SparsightError, match=says):
        choose(**given)


def test_needs_add_up_and_rewriting_is_known():
    assert choose("magnitude").needs == set()
    assert choose("magnitude", refine="swaps").needs == {"gram"}
    assert choose("snip", refine="dsnot", update="pcg").needs == {"gradient", "norm", "gram"}
    assert choose("wanda", refine="swaps").mask_only
    for step in ({"update": "pcg"}, {"reconstruct": 1}, {"permute": True}):
        assert not choose("wanda", **step).mask_only
    assert not choose("sparsegpt").mask_only


def test_a_preset_is_its_composition():
    W, _, moments = case()
    generator = torch.Generator()
    for name, preset in PRESETS.items():
        steps = {key: value for key, value in preset.items() if key != "policy"}
        assert torch.equal(
            choose(name).prune(W, moments, Pattern.row(0.5), generator),
            choose(**steps).prune(W, moments, Pattern.row(0.5), generator),
        )
    assert preset_policy("ecoflap", "uniform") == "ecoflap"
    assert preset_policy("wanda", "owl") == "owl"
    with pytest.raises(SparsightError, match=r"owl contradicts --method ecoflap"):
        preset_policy("ecoflap", "owl")
    assert set(METHODS) & set(PRESETS) == set()


def test_functions_work_wherever_names_do():
    W, _, moments = case()

    def mine(W, moments, pattern, generator):
        return W.masked_fill(~pattern.keep(W.abs().float()), 0)

    def back_to_front(W, keep, moments, pattern):
        return keep.flip(1)

    def halved(W, keep, moments):
        return W * keep / 2

    choice = choose(mine, refine=back_to_front, update=halved, tokens=lambda counts: dict.fromkeys(counts, 2.0))
    expected = W * Pattern.row(0.5).keep(W.abs()).flip(1) / 2
    assert torch.equal(choice.prune(W, moments, Pattern.row(0.5), torch.Generator()), expected)
    assert named(mine, back_to_front, halved, 3) == "mine + back_to_front + halved + reconstruct 3"
