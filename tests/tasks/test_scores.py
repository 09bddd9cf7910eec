"""Scores of benchmarks equal those of their own scorers on 500 odd predictions, or differ in what is written here."""

import json
from pathlib import Path

import numpy as np
import pytest

from sparsight.data import Sample, Turn
from sparsight.errors import SparsightError
from sparsight.evaluation import anls, vqa_accuracy
from sparsight.evaluation.bootstrap import bootstrap, bootstrap_sums
from sparsight.evaluation.evaluate import task_metrics
from sparsight.evaluation.metrics import METRICS, TASK_METRICS
from sparsight.evaluation.metrics.exact import plain_match
from sparsight.evaluation.metrics.relaxed import relaxed_accuracy
from sparsight.tasks import TASKS, ai2d, mmbench, mme, mmmu, pope, scienceqa, seed

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tasks.json").read_text(encoding="utf-8"))
YES_NO, LETTERS, OPEN, NUMBERS, TEXTS = (GOLDEN[key] for key in ("yes_no", "letters", "open", "numbers", "texts"))


def sample(answers, options=()):
    return Sample("0", (), (Turn("?", tuple(answers)),), options=tuple(options))


def test_there_are_500_of_each():
    assert [len(GOLDEN[key]["predictions"]) for key in ("yes_no", "letters", "open", "numbers", "texts")] == [500] * 5


def test_pope():
    predictions, labels = YES_NO["predictions"], YES_NO["labels"]
    assert ["yes" if pope.says_yes(text) else "no" for text in predictions] == YES_NO["pope"]
    rows = [{"prediction": text, "answers": (label,)} for text, label in zip(predictions, labels, strict=True)]
    got = pope.values(np.sum(pope.parts(rows), axis=0))
    right = YES_NO["pope_whole"]
    names = {"precision": "Precision", "recall": "Recall", "f1": "F1 score", "yes_ratio": "Yes ratio"}
    assert {name: float(got[name]) for name in names} == pytest.approx({name: right[key] for name, key in names.items()})
    scores = [pope.score(text, sample([label])) for text, label in zip(predictions, labels, strict=True)]
    assert np.mean(scores) == pytest.approx(right["Accuracy"])


def test_mme():
    assert [mme.label(text) for text in YES_NO["predictions"]] == YES_NO["mme"]
    rows = [
        {"id": f"{category}/{name}#{i}", "kind": category, "prediction": text, "answers": (right.lower(),)}
        for i, (category, name, right, text) in enumerate(YES_NO["mme_whole"]["rows"])
    ]
    got = mme.values(np.sum(mme.parts(rows), axis=0))
    assert float(got["perception"]) == pytest.approx(YES_NO["mme_whole"]["perception"])
    assert float(got["cognition"]) == pytest.approx(YES_NO["mme_whole"]["cognition"])
    one = [row for row in rows if row["kind"] == "count"]
    assert set(mme.values(np.sum(mme.parts(one), axis=0))) == {"pair_accuracy", "perception"}


@pytest.mark.parametrize(
    ("name", "letter"),
    [
        ("scienceqa", scienceqa.letter),
        ("mmbench", lambda text: mmbench.letter(text, tuple(LETTERS["options"]))),
        ("mmmu", lambda text: mmmu.letter(text, LETTERS["options"])),
    ],
)
def test_letters(name, letter):
    assert [letter(text) for text in LETTERS["predictions"]] == LETTERS[name]


@pytest.mark.parametrize(("name", "module"), [("seed", seed), ("ai2d", ai2d)])
def test_scores_of_letters(name, module):
    pairs = zip(LETTERS["predictions"], LETTERS["rights"], strict=True)
    assert [module.score(text, sample([right], LETTERS["options"])) for text, right in pairs] == LETTERS[name]


def test_open_questions_of_mmmu():
    pairs = zip(OPEN["predictions"], OPEN["answers"], strict=True)
    assert [mmmu.score(text, sample(answers)) for text, answers in pairs] == OPEN["mmmu"]


def test_chartqa():
    pairs = zip(NUMBERS["predictions"], NUMBERS["answers"], strict=True)
    assert [relaxed_accuracy(text, [answer]) for text, answer in pairs] == NUMBERS["chartqa"]


def test_gqa():
    pairs = zip(TEXTS["predictions"], TEXTS["answers"], strict=True)
    assert [plain_match(text, answers[:1]) for text, answers in pairs] == TEXTS["gqa"]


@pytest.mark.parametrize("name", ["vqav2", "textvqa"])
def test_the_answers_of_ten_people(name):
    """TextVQA's own normalisation writes other texts, of both sides alike."""
    pairs = zip(TEXTS["predictions"], TEXTS["answers"], strict=True)
    assert [vqa_accuracy(text, answers) for text, answers in pairs] == pytest.approx(TEXTS[name])


def test_docvqa():
    """Where exactly half of the letters differ, the paper's formula gives 0, and the competition's script a half."""
    pairs = zip(TEXTS["predictions"], TEXTS["answers"], strict=True)
    ours = [anls(text, answers) for text, answers in pairs]
    other = [(a, b) for a, b in zip(ours, TEXTS["docvqa"], strict=True) if abs(a - b) > 1e-9]
    assert set(other) == {(0.0, 0.5)}
    assert len(other) < 20


def test_whole_scores_have_intervals_of_their_own():
    """The mean of a column is a whole score, too: both ways give the same interval but for chance."""
    values = np.random.default_rng(0).random(300)
    value, low, high = bootstrap_sums([[x, 1.0] for x in values], lambda s: {"mean": s[..., 0] / s[..., 1]})["mean"]
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(bootstrap(values), abs=0.003)


def test_every_score_of_a_task_has_a_title():
    for name, task in TASKS.items():
        (chosen,) = task_metrics(task).values()
        assert len(chosen) == 1, name
        assert set(chosen) <= {*METRICS, *TASK_METRICS}
        if task.whole:
            rows = [
                {"id": f"{kind}/1#{i}", "kind": kind, "prediction": "yes", "answers": (right,)}
                for kind in ("count", "code_reasoning")
                for i, right in enumerate(("yes", "no"))
            ]
            assert set(task.whole.values(np.sum(task.whole.parts(rows), axis=0))) <= set(TASK_METRICS)


def test_a_score_without_a_yes():
    got = pope.values(np.sum(pope.parts([{"prediction": "no", "answers": ("no",)}] * 2), axis=0))
    assert {key: float(value) for key, value in got.items()} == {"f1": 0, "precision": 0, "recall": 0, "yes_ratio": 0}


def test_options_that_are_none():
    from sparsight.data.images import BadRecord
    from sparsight.tasks.task import choice

    assert (
        choice(["a", "b"], "1")
        == choice(("a", "b"), "b")
        == choice(["a", "b"], 1)
        == {"options": ["a", "b"], "answers": ["B"]}
    )
    for options, answer in ((["a"], "B"), (["a"], 1), ("ab", "A"), (["a", "b"], "AB"), (["a"], None)):
        with pytest.raises(BadRecord):
            choice(options, answer)
    assert issubclass(BadRecord, ValueError)
    assert not issubclass(BadRecord, SparsightError)
