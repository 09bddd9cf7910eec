"""Scores, intervals and differences against what a person can work out."""

from __future__ import annotations

import numpy as np
import pytest

from sparsight.evaluation import bootstrap
from sparsight.reporting.groups import Group, group_runs
from sparsight.reporting.runs import ScoredModel, read_runs
from sparsight.reporting.scores import difference, estimate

QUESTIONS = 30


def run(hits, kinds=None, seed=0, scores=(), **cell) -> ScoredModel:
    rows = tuple(
        {"id": str(i), "kind": (kinds or ["q"] * len(hits))[i], "prompt": "?", "prediction": "", "answers": ["a"],
         "correct": bool(hit), "scores": {"exact_match": float(hit)}}
        for i, hit in enumerate(hits)
    )  # fmt: skip
    return ScoredModel(f"x{seed}", {"method": "wanda", "seed": seed, **cell}, predictions=rows, scores=scores)


def test_one_seed_and_one_kind_is_what_evaluate_says():
    hits = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1]
    score = estimate([run(hits)])
    low, high = bootstrap(hits)
    assert score.value == pytest.approx(8 / 11)
    assert (score.low, score.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    assert (score.n, score.seeds) == (11, 1)


def test_questions_and_captions_weigh_the_same():
    mixed = run([1, 1, 1, 0, 0, 0], ["q", "q", "q", "r", "caption", "caption"])
    assert estimate([mixed]).value == pytest.approx((3 / 4 + 0) / 2)
    assert estimate([mixed], part="questions").value == pytest.approx(3 / 4)
    assert estimate([mixed], part="captions").value == 0
    assert estimate([mixed], "exact_match").value == pytest.approx(3 / 6)  # by name: of all samples
    assert estimate([mixed], "cider_d") is None


def test_seeds_are_averaged_and_widen_the_interval():
    rng = np.random.default_rng(0)
    one = (rng.random(200) < 0.9).astype(float)
    other = (rng.random(200) < 0.5).astype(float)
    both = estimate([run(one), run(other, seed=1)])
    assert both.value == pytest.approx((one.mean() + other.mean()) / 2)
    assert both.seeds == 2
    assert both.low < other.mean() + 0.1  # a draw may hold the worse seed twice
    assert both.high > one.mean() - 0.1
    same = estimate([run(one), run(one, seed=1)])
    alone = estimate([run(one)])
    assert (same.low, same.high) == (pytest.approx(alone.low), pytest.approx(alone.high))


def test_a_difference_is_paired():
    rng = np.random.default_rng(1)
    base = (rng.random(100) < 0.5).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:10]] = 1
    score = difference(Group("b", (run(better),)), Group("a", (run(base),)))
    assert score.value == pytest.approx(0.1)
    assert score.low > 0  # unpaired, 0.1 at n = 100 would not be told from nothing
    assert difference(Group("a", (run(base),)), Group("a", (run(base),))).value == 0


def test_seeds_are_paired_where_both_have_them():
    hard, easy = np.r_[np.zeros(50), np.ones(50)], np.ones(100)
    hard_up, easy_up = hard.copy(), easy.copy()
    hard_up[:10] = 1
    ours = Group("b", (run(hard_up, seed=1), run(easy_up, seed=0)))
    theirs = Group("a", (run(easy, seed=0), run(hard, seed=1)))
    score = difference(ours, theirs)
    assert score.value == pytest.approx(0.05)
    assert score.low == 0  # a draw may hold seed 0 twice, where nothing changed; never below
    dense = Group("dense", (run(easy),))
    assert difference(ours, dense).value == pytest.approx((0.6 + 1) / 2 - 1)


def test_other_samples_give_no_difference():
    one, other = run([1, 0, 1]), run([1, 0, 1, 1])
    assert difference(Group("a", (one,)), Group("b", (other,))) is None
    assert one.samples_key != other.samples_key
    assert estimate([one, run([0, 0, 1, 1], seed=1)]).value == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_rows_alone_will_do():
    rows = (
        {"kind": "all", "metric": "exact_match", "value": 0.7, "low": 0.6, "high": 0.8, "n": 10},
        {"kind": "all", "metric": "perplexity", "value": 3.0, "low": None, "high": None, "n": 40},
    )
    bare = ScoredModel("x", {"method": "wanda"}, scores=rows)
    score = estimate([bare])
    assert (score.value, score.low, score.high) == (0.7, 0.6, 0.8)
    assert estimate([bare], "perplexity").value == 3.0
    assert estimate([bare], "perplexity").low is None
    kinds = (*rows, {**rows[0], "kind": "color", "value": 0.5, "n": 8}, {**rows[0], "kind": "caption", "value": 0.9, "n": 2})
    assert estimate([ScoredModel("x", {}, scores=kinds)]).value == pytest.approx(0.7)
    assert estimate([ScoredModel("x", {}, scores=kinds)], part="questions").value == 0.5


def test_the_sweep_by_hand(sweep, hits):
    groups = {group.label: group for group in group_runs(read_runs([sweep]))}
    assert len(groups) == 11
    assert [len(group.runs) for group in groups.values()] == [1] + [2] * 10
    for name in ("dense", "0.5-0.5", "2:4", "vision-0.3", "restored 0.5-0.5"):
        seeds = (0,) if name == "dense" else (0, 1)
        right = np.stack([hits(name, seed) for seed in seeds])
        by_hand = (right[:, :QUESTIONS].mean() + right[:, QUESTIONS:].mean()) / 2
        score = estimate(groups[name])
        assert score.value == pytest.approx(by_hand)
        assert score.low <= score.value <= score.high
        assert score.seeds == len(seeds)
        cider = estimate(groups[name], "cider_d")
        assert cider.value == pytest.approx(10 * right[:, QUESTIONS:].mean())
