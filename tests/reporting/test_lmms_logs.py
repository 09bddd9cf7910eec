"""`report` on sample logs of lmms-eval: a log that it wrote, and logs in the forms of its other tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sparsight import SparsightError, api
from sparsight.demo import MODELS
from sparsight.reporting.groups import group_runs
from sparsight.reporting.lmms_logs import read_log
from sparsight.reporting.runs import read_runs
from sparsight.reporting.scores import difference, estimate

# lmms-eval 0.7.3, transformers 5.23.0: --model llava_hf --model_args pretrained=llava,device_map=cpu, the samples of
# `sparsight eval demo:llava --data demo:test --samples 12 --max-new-tokens 32 --export-task scenes`
GOLDEN = Path(__file__).parents[1] / "golden" / "lmms-eval"
(LOG,) = GOLDEN.glob("*_samples_scenes.jsonl")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The demo LLaVA, evaluated on the samples of the log."""
    folder = tmp_path_factory.mktemp("dense") / "llava"
    shutil.copytree(MODELS["llava"], folder)
    folder.chmod(0o755)
    api.evaluate(folder, "demo:test", samples=12, record=True)
    return folder


def test_lmms_eval_has_our_answers(dense):
    ours, theirs = group_runs(read_runs([dense, LOG]))
    assert [row["prediction"] for row in theirs.first.predictions] == [row["prediction"] for row in ours.first.predictions]
    assert [row["scores"] for row in theirs.first.predictions] == [row["scores"] for row in ours.first.predictions]
    assert estimate(theirs).value == estimate(ours).value
    same = difference(theirs, ours)
    assert (same.value, same.n) == (0.0, 12)
    facts = json.loads(next(GOLDEN.glob("*_results.json")).read_text())["results"]["scenes"]
    assert facts["exact_match,none"] == sum(r["scores"]["exact_match"] for r in theirs.first.predictions) / 12


def test_a_page_of_both(run, dense):
    code, out, err = run("report", dense, LOG, "--out", "page.html")
    assert (code, out.startswith("Report: page.html")) == (0, True), err
    page = Path("page.html").read_text()
    assert "llava, lmms-eval" in page
    assert "against llava" in page


def test_settings_come_from_the_folder_of_the_model(zoo_folder, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.prune(zoo_folder("llava"), "sparse", method="magnitude")
    (results,) = GOLDEN.glob("*_results.json")
    (tmp_path / LOG.name).write_text(LOG.read_text())
    facts = json.loads(results.read_text())
    for name, method in {"sparse": "magnitude", str(zoo_folder("llava")): None, "someone/else": "unknown"}.items():
        (tmp_path / results.name).write_text(json.dumps({**facts, "model_name": name}))
        (log,) = read_runs([tmp_path / LOG.name])
        assert log.cell.get("method") == method
        assert log.cell["answered_by"] == "lmms-eval llava_hf"
        assert bool(log.components) == (method == "magnitude")
        assert log.date == "2026-11-27"
    (tmp_path / results.name).unlink()
    (alone,) = read_runs([tmp_path / LOG.name])
    assert alone.label == f"{tmp_path.name}, lmms-eval"


def foreign(path, *rows):
    """A log of a task of lmms-eval's own."""
    lines = ({"doc_id": i, "target": "red", "filtered_resps": "red", "input": f"{i}?", **row} for i, row in enumerate(rows))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_other_tasks_keep_their_scores(run, tmp_path):
    """GQA's form, POPE's with the score inside, a list of people's answers, answers in a list."""
    first = foreign(
        tmp_path / "20260101_000000_samples_gqa.jsonl",
        {"exact_match": 1.0, "submission": {"question_id": 1}, "token_counts": [{"output_tokens": 1}]},
        {"exact_match": 0.0, "target": "['blue', 'sky blue']", "filtered_resps": ["Red"]},
        {"exact_match": {"question_id": 3, "score": 1}},
    )
    second = foreign(
        tmp_path / "20260102_000000_samples_gqa.jsonl",
        {"exact_match": 0.0, "filtered_resps": "green"},
        {"exact_match": 0.0, "target": "['blue', 'sky blue']"},
        {"exact_match": {"question_id": 3, "score": 1}},
    )
    one, two = group_runs(read_runs([first, second]))
    assert one.first.predictions[1]["answers"] == ["blue", "sky blue"]
    assert one.first.predictions[1]["prediction"] == "Red"
    assert [row["scores"]["exact_match"] for row in one.first.predictions] == [1.0, 0.0, 1.0]
    assert difference(two, one).value == pytest.approx(-1 / 3)
    assert run("report", first, second)[0] == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", ": is empty; give a *_samples_*.jsonl that lmms-eval wrote with --log_samples"),
        ("{]\n", ":1: is not JSON (Expecting property name enclosed in double quotes"),
        ('{"id": "1", "prediction": "a"}\n', ":1: has no doc_id, target and filtered_resps; give a *_samples_*.jsonl"),
        ('[1]\n', ":1: has no doc_id, target and filtered_resps"),
        ('{"doc_id": "x", "target": "a", "filtered_resps": "a"}\n', ":1: has the doc_id 'x', which is no number"),
        ('{"doc_id": 0, "target": "a", "filtered_resps": "a", "acc": 1}\n' * 2, ":2: has the doc_id 0, which stands twice"),
        ('{"doc_id": 5, "target": "a", "filtered_resps": "a", "acc": NaN}\n', ": has no score of doc_id 5; tasks that are"),
        ('{"doc_id": 5, "target": "a", "filtered_resps": "a", "coco": {"pred": "a"}}\n', ": has no score of doc_id 5"),
        (b"\xff\xfe", ": cannot be read ('utf-8' codec can't decode"),
    ],
)  # fmt: skip
def test_a_log_that_is_none_is_one_line(text, line, run, tmp_path):
    path = tmp_path / "20260101_000000_samples_x.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, err = run("report", path)
    assert code == 2
    assert err.startswith(f"sparsight: {path}{line}")
    assert err.count("\n") == 1


def test_a_damaged_results_file_is_one_line(tmp_path):
    (tmp_path / LOG.name).write_text(LOG.read_text())
    (tmp_path / f"{LOG.name.partition('_samples_')[0]}_results.json").write_text("{")
    with pytest.raises(SparsightError, match=r"_results.json: is damaged .*; delete it, or run lmms-eval again"):
        read_log(tmp_path / LOG.name)


def test_a_task_of_another_version_is_refused(tmp_path):
    rows = [json.loads(line) for line in LOG.read_text().splitlines()]
    for row in rows:
        row["target"] = json.dumps({**json.loads(row["target"]), "task": "vqav9"})
    path = tmp_path / LOG.name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SparsightError, match="is of the task 'vqav9', which is none of vqav2, okvqa"):
        read_log(path)


@pytest.mark.parametrize("known_by", ["target", "results"])
def test_a_part_of_mme_is_refused(known_by, run, tmp_path):
    """Its scores are sums of categories, and those of a part look like those of a weak model."""
    rows = []
    for i in range(4):
        target = {"id": f"count/1#{i}", "kind": "count", "prompt": "?", "answers": [["yes"], ["no"]][i % 2], "task": "mme"}
        target |= {"total": 4} if known_by == "target" else {}
        rows.append({"doc_id": i, "target": json.dumps(target), "filtered_resps": "yes"})
    path = tmp_path / "20260101_000000_samples_sparsight_mme.jsonl"
    if known_by == "results":
        counts = {"sparsight_mme": {"original": 4, "effective": 2}}
        (tmp_path / "20260101_000000_results.json").write_text(json.dumps({"n-samples": counts}))
    for count in (4, 2):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        code, _, err = run("report", path, "--out", tmp_path / f"{count}.html")
        assert (code, (tmp_path / f"{count}.html").exists()) == ((0, True) if count == 4 else (2, False)), err
    assert err == (
        f"sparsight: {path}: has 2 of the 4 samples of mme, which scores questions about an image together; run lmms-eval "
        "on all of them, without --limit and --offset\n"
    )
