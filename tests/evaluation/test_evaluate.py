import json
import math
import shutil

import pytest
import torch

from sparsight import api
from sparsight.data import Encoder, Sample, Turn, batches
from sparsight.errors import SparsightError
from sparsight.evaluation import answer_token_metrics, evaluate, predict
from sparsight.evaluation.metrics import CHOICES
from sparsight.model.stream import Stream

import zoo

IMAGES = zoo.images(6, seed=1)
SEQ2SEQ = ("instructblip-t5", "blip2-t5")


def samples(n=5, kind=""):
    prompts = ["what color is the square?", "how many?", "describe this picture in two words", "is it red?", "which shape"]
    answers = ["red", "two", "a green circle", "no", "star"]
    return [Sample(f"{kind}{i}", (IMAGES[i],), (Turn(prompts[i % 5], (answers[i % 5], "other")),), kind) for i in range(n)]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_predictions_do_not_depend_on_the_batch(name, built):
    model, processor = built(name)
    alone = predict(model, processor, samples(), batch_size=1, max_new_tokens=4)
    assert predict(model, processor, samples(), batch_size=3, max_new_tokens=4) == alone
    assert predict(model, processor, samples()[::-1], max_new_tokens=4) == alone[::-1]
    assert len(set(alone)) > 1, "a model that says one thing tests nothing"
    assert all(text == text.strip() for text in alone)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_predictions_hold_no_prompt(name, built):
    model, processor = built(name)
    for text in predict(model, processor, samples(2), max_new_tokens=3):
        assert len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) <= 12
        assert "what color" not in text
        assert not any(token in text for token in processor.tokenizer.all_special_tokens)


def test_beams_find_likelier_answers(built):
    model, processor = built("qwen3-vl")
    greedy = predict(model, processor, samples(), max_new_tokens=4)
    beams = predict(model, processor, samples(), beams=4, max_new_tokens=4)
    assert greedy != beams


def test_predict_leaves_the_model_as_it_was(built):
    model, processor = built("llava")
    calls = []
    model.train()
    model.generation_config.do_sample = True
    first = predict(
        model, processor, samples(), batch_size=2, max_new_tokens=2, progress=lambda note, *args: calls.append(args)
    )
    assert model.training
    assert calls == [(2, 5), (4, 5), (5, 5)]
    torch.manual_seed(1)
    assert predict(model, processor, samples(), batch_size=2, max_new_tokens=2) == first
    model.eval()
    model.generation_config.do_sample = False


@pytest.mark.parametrize("name", zoo.NAMES)
def test_foresight_is_the_model_s_own_loss(name, built):
    model, processor = built(name)
    encoder = Encoder(processor, model)
    batch = encoder.encode(samples())
    with torch.no_grad():
        loss = float(model(**batch.inputs).loss)
    found = answer_token_metrics(model, [batch])
    assert math.log(found["perplexity"]) == pytest.approx(loss, rel=1e-5)
    assert found["tokens"] == int((batch.inputs["labels"] != -100).sum())
    cut = answer_token_metrics(model, batches(samples(), encoder, 2))
    assert cut["perplexity"] == pytest.approx(found["perplexity"], rel=1e-4)
    assert cut["token_accuracy"] == found["token_accuracy"]


@pytest.mark.parametrize("name", ["llava", "blip2-t5"])
def test_token_accuracy_counts_first_choices(name, built):
    model, processor = built(name)
    batch = Encoder(processor, model).encode(samples(2))
    with torch.no_grad():
        best = model(**batch.inputs).logits.argmax(-1)
    labels = batch.inputs["labels"].clone()
    if name not in SEQ2SEQ:
        best = best.roll(1, dims=1)
    places = (labels != -100).nonzero()
    labels[tuple(places[0])] = best[tuple(places[0])]
    expected = sum(int(labels[r, c]) == int(best[r, c]) for r, c in places.tolist()) / len(places)
    assert expected > 0
    if name in SEQ2SEQ:  # the labels are also what the decoder reads: keep reading the right ones
        batch.inputs["decoder_input_ids"] = model.language_model._shift_right(batch.inputs["labels"])
    batch.inputs["labels"] = labels
    assert answer_token_metrics(model, [batch])["token_accuracy"] == pytest.approx(expected)


def test_evaluate_gives_rows_per_kind_and_predictions(built, tmp_path):
    model, processor = built("blip2-t5")
    mixed = [*samples(3, "vqa"), *samples(3, "caption")]
    calls = []
    result = evaluate(model, processor, mixed, max_new_tokens=3, progress=lambda note, *args: calls.append(args))
    assert calls[-1] == (6, 6)
    names = [(row["kind"], row["metric"], row["n"]) for row in result.rows]
    tokens = result.rows[-1]["n"]
    assert names == [
        ("all", "exact_match", 6), ("all", "vqa_accuracy", 3), ("all", "cider_d", 3),
        ("vqa", "exact_match", 3), ("vqa", "vqa_accuracy", 3),
        ("caption", "cider_d", 3), ("caption", "exact_match", 3),
        ("all", "token_accuracy", tokens), ("all", "perplexity", tokens),
    ]  # fmt: skip
    assert all(row["low"] <= row["value"] <= row["high"] for row in result.rows[:-2])
    assert result.rows[-1]["low"] is None
    columns, rows = result.table()
    assert columns == ("kind", "metric", "value", "low", "high", "n")
    assert rows[0] == tuple(result.rows[0].values())
    assert json.loads(result.to_json())["metrics"] == list(result.rows)
    assert result.value("perplexity") > 1
    with pytest.raises(SparsightError, match="no metric 'bleu' of kind 'all'; there are exact_match"):
        result.value("bleu")
    result.write_predictions(tmp_path / "predictions.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [sample.id for sample in mixed]
    assert list(lines[0]) == ["id", "kind", "prompt", "prediction", "answers", "correct", "scores"]
    assert lines[0]["answers"] == ["red", "other"]
    assert evaluate(model, processor, mixed, max_new_tokens=3).to_json() == result.to_json()


def test_right_answers_are_right(built):
    model, processor = built("qwen2.5-vl")
    asked = samples(4)
    said = predict(model, processor, asked, max_new_tokens=3)
    right = [Sample(s.id, s.images, (Turn(s.prompt, (text or "x",)),)) for s, text in zip(asked, said, strict=True)]
    wrong = [Sample(s.id, s.images, (Turn(s.prompt, ("never said",)),)) for s in asked]
    named = ("exact_match", "vqa_accuracy")
    result = evaluate(model, processor, [*right[:3], wrong[3]], max_new_tokens=3, metrics=named)
    assert tuple(row["metric"] for row in result.rows) == named
    assert result.value("exact_match") == 0.75
    assert [row["correct"] for row in result.predictions] == [True, True, True, False]


def test_metrics_can_be_chosen_and_functions(built):
    model, processor = built("blip2-t5")

    def length(prediction, answers):
        return len(prediction)

    chosen = {"a": [length, "cider_d"]}
    result = evaluate(model, processor, [*samples(2, "a"), *samples(2, "b")], metrics=chosen, max_new_tokens=2)
    assert [(row["kind"], row["metric"]) for row in result.rows if row["kind"] != "all"] == [
        ("a", "length"), ("a", "cider_d"), ("b", "exact_match"), ("b", "vqa_accuracy"),
    ]  # fmt: skip
    assert [row["scores"]["length"] for row in result.predictions[:2]] == [
        len(row["prediction"]) for row in result.predictions[:2]
    ]
    everywhere = evaluate(model, processor, samples(2), metrics=[length, "perplexity"], max_new_tokens=2)
    assert [row["metric"] for row in everywhere.rows] == ["length", "perplexity"]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_scores_of_tokens_alone_hold_one_block(name, zoo_folder, scenes, monkeypatch):
    held, bring = [], Stream.bring

    def count(stream, part):
        bring(stream, part)
        held.append(sum(not p.is_meta for b in stream.anatomy.blocks for p in [next(b.module.parameters())]))

    monkeypatch.setattr(Stream, "bring", count)
    settings = {"samples": 5, "batch_size": 2, "dtype": "float32"}
    streamed = api.evaluate(zoo_folder(name), scenes, metrics=["perplexity", "token_accuracy"], **settings)
    assert set(held) == {1}
    whole = api.evaluate(zoo_folder(name), scenes, max_new_tokens=1, **settings)
    assert streamed.rows == whole.rows[-2:]
    assert streamed.predictions == ()
    assert len(streamed.rows) == 2 < len(whole.rows)


def test_scores_of_tokens_alone_are_kept_and_reported(zoo_folder, scenes, run, tmp_path):
    shutil.copytree(zoo_folder("llava"), tmp_path / "model")
    code, told, said = run("eval", "model", "--data", scenes, "--metrics", "perplexity", "--record", "--samples", 4)
    assert code == 0, said
    assert "perplexity" in told
    assert "exact_match" not in told
    kept = json.loads((tmp_path / "model/evaluation.json").read_text())
    assert [row["metric"] for row in kept["rows"]] == ["perplexity"]
    assert kept["components"]["language"]["layers"] > 0
    code, _, said = run("report", "model", "--out", "page.html")
    assert code == 0, said
    assert "perplexity" in (tmp_path / "page.html").read_text()
    code, _, said = run("eval", "model", "--data", scenes, "--metrics", "perplexitty")
    assert code == 2
    assert "unknown metric 'perplexitty'; did you mean perplexity" in said
    code, _, said = run("eval", "./nowhere", "--data", scenes, "--metrics", "perplexity")
    assert code == 2
    assert "./nowhere: no such folder; give the folder of a model or a hub name" in said


def test_wrong_requests_are_refused_before_the_model_runs():
    with pytest.raises(SparsightError, match=f"unknown metric 'bleu'; allowed: {', '.join(CHOICES)}"):
        evaluate(None, None, samples(1), metrics=["bleu"])
    with pytest.raises(SparsightError, match="no samples"):
        evaluate(None, None, [])
    with pytest.raises(SparsightError, match="kind 'all'"):
        evaluate(None, None, samples(1, "all"))
