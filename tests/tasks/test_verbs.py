"""Benchmarks in the verbs: evaluate, run, sweep, search and restore, and what is recorded of them."""

import json

import pytest
import torch
import yaml

import sparsight
from sparsight import SparsightError, api
from sparsight.data import Encoder, read
from sparsight.evaluation.record import read_evaluation

from shapes import HUB, OFFICIAL, mme, pope, scienceqa, vqav2

SHORT = "{question}\nAnswer the question using a single word or phrase."


def test_eval_records_how_it_asked(run, zoo_folder, tmp_path):
    vqav2(tmp_path / "data")
    model = zoo_folder("llava")
    code, out, _ = run("eval", model, "--task", "vqav2", "--data", "data", "--max-new-tokens", 2)
    assert code == 0
    assert "Asked: '{question}\\nAnswer the question using a single word or phrase.'" in out
    assert "Answers: beams 1, length penalty 1, max new tokens 2" in out
    api.evaluate(model, "data", task="vqav2", record="scores", max_new_tokens=2)
    scores, answers = read_evaluation(tmp_path / "scores")
    assert scores["read"] == {
        "task": "vqav2", "split": "validation", "prompts": [SHORT],
        "decoding": {"beams": 1, "length_penalty": 1.0, "max_new_tokens": 2},
    }  # fmt: skip
    assert scores["settings"]["task"] == "vqav2"
    assert [row["metric"] for row in scores["rows"]][:1] == ["vqa_accuracy"]
    assert answers[0]["prompt"] == SHORT.replace("{question}", "What color is 0?")
    code, out, _ = run("eval", model, "--task", "vqav2", "--data", "data", "--prompt", "Q: {question}", "--json")
    assert code == 0
    assert json.loads(out)["data"]["prompts"] == ["Q: {question}"]


def test_instructblip_decodes_as_its_authors_do(zoo_folder, tmp_path, monkeypatch):
    from sparsight.evaluation import generate

    seen = []
    inner = generate._generate
    monkeypatch.setattr(generate, "_generate", lambda *how: seen.append(how[3:]) or inner(*how))
    vqav2(tmp_path)
    result = api.evaluate(zoo_folder("instructblip-t5"), tmp_path, task="vqav2")
    assert seen == [(5, 10, -1.0)]
    assert result.data["prompts"] == ["Question: {question} Short answer:"]
    api.evaluate(zoo_folder("instructblip-t5"), tmp_path, task="vqav2", beams=2, length_penalty=0.5, max_new_tokens=1)
    assert seen[1:] == [(2, 1, 0.5)]


def test_the_length_penalty_changes_which_beam_wins(built, tmp_path):
    """Of beams of different lengths a penalty below 0 takes a shorter one, as transformers' own generate does."""
    model, processor = built("llava")
    vqav2(tmp_path)
    samples = Encoder(processor, model).usable(read(tmp_path, task="vqav2"))
    inputs = Encoder(processor, model).prompts(samples)
    with torch.no_grad():
        ids = model.generate(**inputs, num_beams=4, max_new_tokens=6, length_penalty=-3.0, do_sample=False)
    expected = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    got = sparsight.evaluation.predict(model, processor, samples, beams=4, max_new_tokens=6, length_penalty=-3.0)
    assert got == [text.strip() for text in expected]


def test_whole_scores_and_letters(zoo_folder, tmp_path):
    pope(tmp_path / "pope")
    result = api.evaluate(zoo_folder("llava"), tmp_path / "pope", task="pope", max_new_tokens=2)
    names = {(row["kind"], row["metric"]) for row in result.rows}
    assert {("all", "accuracy"), ("all", "f1"), ("random", "f1"), ("adversarial", "yes_ratio")} <= names
    assert result.value("yes_ratio") == 1  # a model of random weights never says no
    assert result.value("recall") == 1
    assert result.value("precision") == result.value("accuracy") == 0.5
    row = next(row for row in result.rows if (row["kind"], row["metric"]) == ("all", "f1"))
    assert row["value"] == pytest.approx(2 / 3)
    assert row["low"] < row["value"] < row["high"]
    mme(tmp_path / "mme")
    result = api.evaluate(zoo_folder("llava"), tmp_path / "mme", task="mme", max_new_tokens=1)
    assert {"perception", "cognition", "pair_accuracy"} <= {row["metric"] for row in result.rows}
    scienceqa(tmp_path / "science")
    result = api.evaluate(zoo_folder("llava"), tmp_path / "science", task="scienceqa", max_new_tokens=1)
    assert "A. red\nB. blue\nC. green" in result.predictions[0]["prompt"]


def test_captions_of_several_domains_share_one_document_frequency(zoo_folder, tmp_path):
    from sparsight.evaluation import cider_d

    OFFICIAL["nocaps"](tmp_path)
    result = api.evaluate(zoo_folder("llava"), tmp_path, task="nocaps", max_new_tokens=3)
    rows = result.predictions
    assert {row["prompt"] for row in rows} == {"Provide a one-sentence caption for the provided image."}
    expected = cider_d([row["prediction"] for row in rows], [row["answers"] for row in rows])
    assert [row["scores"]["cider_d"] for row in rows] == expected
    assert {row["kind"] for row in result.rows if row["metric"] == "cider_d"} == {"all", "in-domain", "near-domain"}


def test_in_memory(built, tmp_path):
    vqav2(tmp_path)
    model, processor = built("llava")
    result = sparsight.evaluate(model, data=tmp_path, processor=processor, task="vqav2", max_new_tokens=1)
    assert result.data["task"] == "vqav2"


def test_a_task_in_every_recipe(scenes, zoo_folder, tmp_path):
    HUB["pope"](tmp_path / "pope")
    shared = {"model": str(zoo_folder("llava")), "data": str(scenes), "held_out": "pope", "prune": {"samples": 4}}
    shared["evaluate"] = {"task": "pope", "max_new_tokens": 1}
    restore = {"steps": 1, "batch_size": 2, "samples": 2, "held_out": "pope", "held_out_task": "pope", "save_every": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**shared, "restore": restore}))
    done = api.run(tmp_path / "run.yaml", tmp_path / "ran")
    assert done["verify"]["differences"] == {}
    for name in ("dense", "pruned", "restored"):
        scores, _ = read_evaluation(tmp_path / "ran" / name)
        assert scores["read"]["task"] == "pope"
        assert scores["rows"][0]["metric"] == "accuracy"
    assert "share of yes" in (tmp_path / "ran/report.html").read_text()
    metrics = json.loads((tmp_path / "ran/restored/metrics.json").read_text())
    assert metrics["restore"]["held_out_data"] == {"task": "pope", "split": "test"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**shared, "grid": {"sparsity": [0.5]}}))
    records = api.sweep(tmp_path / "sweep.yaml", tmp_path / "swept")
    assert {row["metric"] for record in records for row in record["scores"]} >= {"accuracy", "f1"}
    found = api.search(
        shared["model"], tmp_path / "found", data=scenes, held_out=tmp_path / "pope", held_out_task="pope", samples=4,
        over="components", max_new_tokens=1,
    )  # fmt: skip
    assert found.dense_score["metric"] == "accuracy"
    assert found.data["held_out"]["task"] == "pope"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"task": "vqav2", "metrics": "anls"}, "`metrics`: the task vqav2 is scored by its own"),
        ({"prompt": "{question}"}, "`prompt`: is for a benchmark; name it with `task`"),
        ({"length_penalty": -1.0}, "`length_penalty`: changes nothing without beams"),
        ({"task": "vqav2", "beams": 1, "length_penalty": -1.0}, "`length_penalty`: changes nothing without beams"),
        ({"task": "vqav2", "length_penalty": -1.0}, "`length_penalty`: changes nothing without beams"),
    ],
)
def test_settings_that_cannot_stand_together(settings, line, zoo_folder, tmp_path):
    vqav2(tmp_path)
    with pytest.raises(SparsightError, match=line):
        api.evaluate(zoo_folder("llava"), tmp_path, **settings)


def test_held_out_tasks_need_data():
    with pytest.raises(SparsightError, match="`held_out_task`: needs data of its own"):
        api.RestoreSpec(held_out=5, held_out_task="gqa")
    with pytest.raises(SparsightError, match="`metric`: the task gqa is scored by its own"):
        api.SearchSpec(held_out_task="gqa", metric="anls")


def test_data_without_any_image_says_so(run, zoo_folder, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"prompt": "What color?", "answer": "red"}\n')
    code, out, _ = run("eval", zoo_folder("llava"), "--data", "text.jsonl", "--max-new-tokens", 1)
    assert code == 0
    assert "None of the 1 samples has an image" in out
