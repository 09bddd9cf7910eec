"""Metrics against the reference codes, and by hand where they differ."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sparsight.errors import SparsightError
from sparsight.evaluation import bootstrap, cider_d, exact_match, vqa_accuracy
from sparsight.evaluation.metrics.cider import words
from sparsight.evaluation.metrics.vqa import normalise

GOLDEN = Path(__file__).parents[1] / "golden"
VQA = json.loads((GOLDEN / "vqa.json").read_text(encoding="utf-8"))
CIDER = json.loads((GOLDEN / "cider.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Red  Circle\n", ["red circle"], 1),
        ("straße", ["STRASSE"], 1),
        ("red", ["blue", "red"], 1),
        ("red.", ["red"], 0),
        ("", ["red"], 0),
    ],
)
def test_exact_match(prediction, answers, score):
    assert exact_match(prediction, answers) == score


def test_normalisation_is_the_official_one():
    assert len(VQA["normalise"]) > 100
    assert {text: normalise(text) for text in VQA["normalise"]} == VQA["normalise"]


def test_every_official_contraction_is_known():
    reachable = {k: v for k, v in VQA["contractions"].items() if k == k.lower()}  # words are lower-cased before
    assert len(reachable) > 100
    assert {wrong: normalise(wrong) for wrong in reachable} == reachable


@pytest.mark.parametrize("case", VQA["accuracy"], ids=range(len(VQA["accuracy"])))
def test_accuracy_is_the_official_one(case):
    assert vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["accuracy"], abs=1e-9)


def test_accuracy_differs_where_people_s_answers_are_raw():
    official = [case["accuracy"] for case in VQA["raw"]]
    ours = [vqa_accuracy(case["prediction"], case["answers"]) for case in VQA["raw"]]
    assert official == [0, 1, 0]  # "The two dogs" is not found among ten times "The two dogs"
    assert ours == [1, 1, 1]


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        (["red"], 1),
        (["blue"], 0),
        (["red", "red"], 1),
        (["red", "blue"], 0.5),
        (["red", "red", "red"], 1),
        (["red", "red", "blue"], (0.5 + 0.5 + 1) / 3),
        (["red"] * 4, 1),
        (["red"] * 2 + ["blue"] * 2, (1 / 3 + 1 / 3 + 2 / 3 + 2 / 3) / 4),
    ],
)
def test_accuracy_with_few_answers(answers, score):
    assert vqa_accuracy("Red!", answers) == pytest.approx(score)


@pytest.mark.parametrize("group", CIDER["groups"], ids=range(len(CIDER["groups"])))
def test_cider_is_the_reference(group):
    assert cider_d(group["predictions"], group["references"]) == pytest.approx(group["scores"], abs=1e-12)


def test_cider_by_hand():
    # two images: "red" is in one's references (idf log 2), "dog" in both's (idf 0); no longer n-grams
    assert cider_d(["red", "dog"], [["red", "dog"], ["dog"]]) == pytest.approx([10 * (1 / 4) / 2, 0])


def test_cider_sees_words():
    assert words("A dog's half-eaten pie, at 3.5 o'clock.") == ["a", "dog's", "half-eaten", "pie", "at", "3.5", "o'clock"]
    references = [["a red star"], ["a dog"]]
    assert cider_d(["A RED star!", "a dog"], references) == cider_d(["a red star", "a dog"], references)


def test_bootstrap_holds_the_mean_and_is_repeatable():
    values = np.random.default_rng(0).random(50).tolist()
    low, high = bootstrap(values)
    assert low < sum(values) / 50 < high
    assert (low, high) == bootstrap(values)
    assert (low, high) != bootstrap(values, seed=1)
    narrow = bootstrap(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap([0.5] * 9) == (0.5, 0.5)


@pytest.mark.parametrize("n", [1, 24, 129, 700])
def test_resamples_are_drawn_as_if_one_by_one(n):
    """Also where they are too many to be drawn at once."""
    values, generator = np.random.default_rng(n).normal(size=n), np.random.default_rng(3)
    means = [values[generator.integers(0, n, n)].mean() for _ in range(999)]
    assert bootstrap(values, 999, seed=3) == tuple(np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2]))


def test_bootstrap_agrees_with_the_normal_law():
    values = np.random.default_rng(0).normal(size=2000)
    low, high = bootstrap(values)
    expected = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - expected, abs=0.1 * expected)
    assert high == pytest.approx(values.mean() + expected, abs=0.1 * expected)


def test_bootstrap_refuses_what_has_no_interval():
    with pytest.raises(SparsightError, match="at least one value"):
        bootstrap([])
    with pytest.raises(SparsightError, match="level between 0 and 1"):
        bootstrap([1.0], level=95)
