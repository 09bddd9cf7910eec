"""Budgets per component, ignored layers, and the table: everything is said before a weight is touched."""

from __future__ import annotations

import pytest

from sparsight import Pattern, SparsightError, anatomy
from sparsight.allocation.budget import parse_budget
from sparsight.allocation.plan import make_plan, plan_rows

import zoo


@pytest.fixture(scope="module")
def body():
    return anatomy(zoo.build("llava")[0])


def test_a_single_number_prunes_vision_and_language():
    assert parse_budget("0.5") == {"vision": 0.5, "connector": 0.0, "language": 0.5}


def test_a_component_that_is_not_named_stays_dense():
    assert parse_budget("language=0.6") == {"vision": 0.0, "connector": 0.0, "language": 0.6}
    assert parse_budget({"connector": 0.3, "vision": 0.1}) == {"vision": 0.1, "connector": 0.3, "language": 0.0}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("50%", "'50%' is not a number"),
        ("1.0", "1 is not a sparsity"),
        ("-0.1", "-0.1 is not a sparsity"),
        ("vison=0.5", "did you mean vision"),
        ("vision=0.5,vision=0.6", "given twice"),
        ("vision", "'vision' is not a number"),
        ("vision=", "COMPONENT=VALUE"),
        ("0", "every component dense"),
    ],
)
def test_a_bad_budget_says_what_is_allowed(given, says):
    with pytest.raises(SparsightError, match=says):
        parse_budget(given)


def test_the_plan_holds_every_layer_of_the_named_components(body):
    plan = make_plan(body, sparsity="language=0.6")
    assert set(plan) == {layer.name for layer in body.component("language")}
    assert {str(p) for p in plan.values()} == {"row 0.6"}


def test_the_table_counts_what_the_patterns_will_zero(body):
    plan = make_plan(body, pattern="2:4", sparsity="vision=0.5")
    rows = {row.component: row for row in plan_rows(body, plan)}
    size = sum(layer.weight.numel() for layer in body.component("vision"))
    assert (rows["vision"].zeros, rows["vision"].parameters) == (size // 2, size)
    assert rows["language"].zeros == 0
    assert rows["model"].parameters == body.parameters
    assert rows["model"].zeros == rows["all layers"].zeros == size // 2


def test_nothing_is_changed_by_planning(body):
    make_plan(body, sparsity=0.9)
    assert all((layer.weight != 0).all() for layer in body.layers)


@pytest.mark.parametrize("entry", ["q_proj", "model.language_model.layers.0", "*.layers.0.self_attn.?_proj"])
def test_ignored_layers_stay_out(body, entry):
    plan = make_plan(body, sparsity=0.5, ignore=[entry])
    assert 0 < len(plan) < len(make_plan(body, sparsity=0.5))
    assert "model.language_model.layers.0.self_attn.q_proj" not in plan


def test_an_ignore_entry_that_matches_nothing_is_an_error(body):
    with pytest.raises(SparsightError, match=r"'k_porj' matches no layer"):
        make_plan(body, sparsity=0.5, ignore=["q_proj", "k_porj"])
    with pytest.raises(SparsightError, match=r"matches no layer"):
        make_plan(body, sparsity=0.5, ignore=["proj"])  # a part of a word is not a part of a name


def test_nm_that_does_not_divide_names_the_layer(body):
    with pytest.raises(SparsightError, match=r"does not fit model\.vision_tower\S+: its input dimension 32 is not a mul"):
        make_plan(body, pattern="5:7")


def test_nm_and_a_contradicting_sparsity_are_refused(body):
    assert len(make_plan(body, pattern="2:4", sparsity=0.5)) == len(make_plan(body, pattern="2:4"))
    with pytest.raises(SparsightError, match=r"language=0\.6 contradicts `pattern=2:4`"):
        make_plan(body, pattern="2:4", sparsity="vision=0.5,language=0.6")


def test_unknown_policy_and_empty_plan(body):
    with pytest.raises(SparsightError, match="did you mean uniform"):
        make_plan(body, policy="unifrom")
    with pytest.raises(SparsightError, match="no layer is left"):
        make_plan(body, sparsity="connector=0.5", ignore=["multi_modal_projector"])


def test_a_function_is_a_policy(body):
    plan = make_plan(body, policy=lambda layers, budget: {x.name: 0.25 for x in layers[:2]})
    assert {str(p) for p in plan.values()} == {"row 0.25"}
    assert len(plan) == 2


def test_a_pattern_object_brings_its_own_sparsity(body):
    assert {str(p) for p in make_plan(body, pattern=Pattern.row(0.7)).values()} == {"row 0.7"}
    assert len(make_plan(body, pattern=Pattern.tensor(0.3), sparsity="language=0.3")) == 21
    with pytest.raises(SparsightError, match=r"language=0\.5 contradicts `pattern=row 0\.7`"):
        make_plan(body, pattern=Pattern.row(0.7), sparsity="language=0.5")


@pytest.mark.parametrize("amount", [1.3, -0.1, float("nan")])
def test_a_policy_that_plans_the_impossible_is_refused(body, amount):
    with pytest.raises(SparsightError, match=r"`policy`: for model\.\S+: \S+ is not a sparsity"):
        make_plan(body, policy=lambda layers, budget: {layers[0].name: amount})


def test_every_component_has_a_pattern_of_its_own():
    body = anatomy(zoo.build("llava")[0])
    for pattern in ("vision=tensor,language=2:4", {"vision": "tensor", "language": "2:4"}):
        plan = make_plan(body, pattern=pattern)
        kinds = {(body[name].component, str(p)) for name, p in plan.items()}
        assert kinds == {("vision", "tensor 0.5"), ("language", "2:4")}
    plan = make_plan(body, sparsity="vision=0.3,language=0.6,connector=0.2", pattern="language=tensor")
    kinds = {(body[name].component, p.kind, p.sparsity) for name, p in plan.items()}
    assert kinds == {("vision", "row", 0.3), ("language", "tensor", 0.6), ("connector", "row", 0.2)}
    shared = make_plan(body, sparsity=0.6, pattern="vision=tensor,language=row", policy="alpha")  # each its own budget
    assert {(body[name].component, p.kind) for name, p in shared.items()} == {("vision", "tensor"), ("language", "row")}
    for row in plan_rows(body, shared):
        if row.component in ("vision", "language"):
            assert row.sparsity == pytest.approx(0.6, abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "vison=row"}, "`pattern`: unknown component 'vison'"),
        ({"pattern": "vision=rows"}, "`pattern`: 'rows' is not row, tensor or n:m"),
        ({"pattern": "vision=row,vision=tensor"}, "`pattern`: vision is given twice"),
        ({"pattern": "vision=row,tensor"}, "`pattern`: 'tensor' is not COMPONENT=VALUE"),
        ({"pattern": "vision=2:4", "sparsity": 0.6}, "`sparsity`: vision=0.6 contradicts `pattern=2:4`"),
        ({"pattern": "vision=tensor", "policy": "language-only"}, "`pattern`: differs between components, which share one"),
    ],
)
def test_patterns_of_components_that_cannot_be_are_refused(settings, message):
    with pytest.raises(SparsightError, match=message):
        make_plan(anatomy(zoo.build("llava")[0]), **settings)
