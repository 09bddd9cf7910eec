"""One entry in a table is all that a method, policy, adapter, token rule or metric needs to be found everywhere."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import yaml

import sparsight
from sparsight import SparsightError
from sparsight.allocation.plan import POLICIES
from sparsight.allocation.policy import Policy
from sparsight.calibration.tokens import TOKENS, TokenRule
from sparsight.checkpoint.folder import read_anatomy
from sparsight.cost import Cost
from sparsight.estimation.estimate import estimate
from sparsight.evaluation.metrics import METRICS, Metric
from sparsight.pruning.methods import METHODS, Method
from sparsight.restoring.adapters import ADAPTERS, low_rank
from sparsight.restoring.adapters.adapter import Adapter, masked
from sparsight.specs import EvaluateSpec, PruneSpec, RestoreSpec
from sparsight.sweeps.grid import cells


def largest_inputs(W, moments, pattern, generator):
    """A method of this test: the weights on the smallest inputs become zero."""
    return W.masked_fill(~pattern.keep(moments.norm.expand_as(W) * (1 + W.abs() / W.abs().max())), 0)


def later_more(layers, budget, probe):
    """A policy of this test: later layers are worth less."""
    return {layer.name: 1 / (1 + number) for number, layer in enumerate(layers)}


def half(counts):
    """A token rule of this test: every token counts by half."""
    return dict.fromkeys(counts, 0.5)


def length(prediction, answers):
    """A metric of this test: the share of the right answer's length."""
    return min(1.0, len(prediction) / max(len(answers[0]), 1))


def add(W, factors, scaling, packed):
    """An adapter of this test: SparseLoRA with half the product."""
    A, B = factors
    return masked(torch.addmm(W.float(), B.float(), A.float(), alpha=scaling / 2), packed).to(W.dtype)


def project(dE, W, factors, scaling, packed):
    """Its gradients."""
    return low_rank.project(dE, W, factors, scaling / 2, packed)


@pytest.fixture
def entries(monkeypatch):
    monkeypatch.setitem(METHODS, "largest", Method(largest_inputs, cost=Cost(lambda out, n: 7 * out * n)))
    monkeypatch.setitem(POLICIES, "later", Policy(later_more, cost=Cost()))
    monkeypatch.setitem(TOKENS, "half", TokenRule(weigh=half))
    monkeypatch.setitem(ADAPTERS, "halflora", Adapter(("A", "B"), low_rank.start, add, project, shapes=low_rank.shapes))
    monkeypatch.setitem(METRICS, "length", Metric(length, "answer length", default=("caption",)))


@pytest.mark.parametrize(
    ("verb", "name"),
    [("prune", "largest"), ("prune", "later"), ("plan", "later"), ("prune", "half"), ("search", "largest"),
     ("restore", "halflora"), ("eval", "length"), ("search", "length")],
)  # fmt: skip
def test_help_names_it(verb, name, run, entries):
    code, told, _ = run(verb, "--help")
    assert code == 0
    assert name in told.replace("\n", " ")


def test_bad_names_list_it(entries):
    for record, field in ((PruneSpec, "method"), (PruneSpec, "policy"), (PruneSpec, "tokens"), (RestoreSpec, "adapter")):
        with pytest.raises(SparsightError, match=r"largest|later|half"):
            record(**{field: "zzz"})
    with pytest.raises(SparsightError, match="did you mean length"):
        EvaluateSpec(metrics="lenght")


def test_it_runs_through_a_sweep_and_a_report(run, entries, zoo_folder, scenes, tmp_path):
    recipe = {
        "model": str(zoo_folder("llava")), "data": str(scenes), "held_out": str(scenes),
        "prune": {"samples": 4, "propagate": "block"},
        "evaluate": {"max_new_tokens": 4, "metrics": ["exact_match", "length"]},
        "grid": {"sparsity": [0.5], "method": ["largest"], "policy": ["later"], "tokens": ["half"],
                 "restore": [{"adapter": "halflora", "steps": 2, "batch_size": 4}]},
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    assert [cell.facts["method"] for cell in cells(recipe)][1:] == ["largest"]
    code, told, said = run("sweep", "sweep.yaml", "out", "--quiet")
    assert code == 0, said
    rows = list(csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines()))
    assert [row["method"] for row in rows if row["method"]] == ["largest"]
    assert all(float(row["length"]) > 0 for row in rows)
    assert {row["policy"] for row in rows if row["method"]} == {"later"}
    code, _, said = run("report", "out", "--metric", "length", "--out", "page.html")
    assert code == 0, said
    assert "answer length, %" in (tmp_path / "page.html").read_text()
    code, told, said = run("sweep", "sweep.yaml", "out", "--cost")
    assert code == 0, said
    assert "FLOPs" in told


@pytest.mark.parametrize(
    ("verb", "metric", "title"),
    [("run", "anls", "ANLS, %"), ("sweep", "anls", "ANLS, %"), ("run", "perplexity", "perplexity, 95 % interval")],
)
def test_a_recipe_without_exact_match_is_reported_by_its_own_metric(verb, metric, title, run, zoo_folder, scenes, tmp_path):
    recipe = {
        "model": str(zoo_folder("llava")), "data": str(scenes), "held_out": str(scenes),
        "prune": {"method": "magnitude"}, "evaluate": {"max_new_tokens": 2, "metrics": [metric]},
    }  # fmt: skip
    recipe |= {"grid": {"sparsity": [0.5]}} if verb == "sweep" else {}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    code, told, said = run(verb, "r.yaml", "out", "--quiet")
    assert code == 0, said
    assert title in told + (tmp_path / "out/report.html").read_text()
    runs = ["out"] if verb == "sweep" else ["out/dense", "out/pruned"]
    code, _, said = run("report", *runs, "--metric", "anl", "--out", "page.html")
    assert code == 2
    assert f"was scored by anl; they were scored by {metric}" in said


def test_it_runs_through_the_verbs_and_onto_the_card(run, entries, zoo_folder, scenes, tmp_path):
    model = zoo_folder("llava")
    sizes = ("--samples", 4, "--batch-size", 4)
    names = ("--method", "largest", "--policy", "later", "--tokens", "half")
    assert run("prune", model, "pruned", "--data", scenes, "--sparsity", 0.5, *sizes, *names)[0] == 0
    assert (
        run("restore", "pruned", "restored", "--data", scenes, "--adapter", "halflora", "--steps", 2, "--batch-size", 4)[0]
        == 0
    )
    assert run("verify", "restored", "--against", "pruned")[0] == 0
    code, told, _ = run("eval", "restored", "--data", scenes, "--max-new-tokens", 4, "--metrics", "length", "--record")
    assert code == 0
    assert "length" in told
    rows = json.loads((tmp_path / "restored/evaluation.json").read_text())["rows"]
    assert {row["metric"] for row in rows} == {"length"}
    assert "| answer length, % |" in (tmp_path / "restored/README.md").read_text()
    record = json.loads((tmp_path / "pruned/sparsity.json").read_text())
    assert record["method"] == "largest"
    found = read_anatomy(sparsight.load(tmp_path / "pruned")[0], record)
    got = [record["layers"][layer.name]["got"] for layer in found.layers if layer.component == "language"]
    assert got[0] < 0.5 < got[-1]  # later layers are worth less
    words = ("--data", scenes, "--held-out", scenes, "--metric", "length", "--sparsity", 0.5, "--samples", 4)
    code, told, said = run("search", model, "found", *words, "--over", "components", "--max-new-tokens", 4)
    assert code == 0, said
    assert {"answer", "length,"} <= set(told.split())


def test_the_estimate_counts_it_and_says_what_it_does_not_know(entries, monkeypatch, zoo_folder):
    model = zoo_folder("llava")

    def flops(**settings):
        restore = RestoreSpec(adapter="halflora", steps=2)
        found = estimate(model, PruneSpec(sparsity=0.5, **settings), restore, EvaluateSpec(), timed=False)
        return sum(found["prune"].flops.values())

    assert flops(method="largest") > flops(method="wanda")
    assert flops(method="wanda", policy="later") == flops(method="wanda")
    monkeypatch.setitem(METHODS, "largest", Method(largest_inputs))
    monkeypatch.setitem(POLICIES, "later", Policy(later_more))
    monkeypatch.setitem(ADAPTERS, "halflora", Adapter(("A", "B"), low_rank.start, add, project))
    for settings in ({"method": "largest"}, {"policy": "later"}, {}):
        with pytest.raises(SparsightError, match="not known"):
            flops(**settings)
