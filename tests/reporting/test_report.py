"""`eval --record` and `report` as a user drives them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard

from sparsight import SparsightError, api
from sparsight.checkpoint.card import model_card
from sparsight.cli.tables import sweep_tables
from sparsight.evaluation.record import read_evaluation
from sparsight.reporting.groups import distinct_labels, group_runs
from sparsight.reporting.runs import read_runs
from sparsight.reporting.scores import estimate

VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """What is on a page: tags, links, ids, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open, self.figures, self.text = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        facts = dict(attributes)
        self.tags.append(tag)
        self.links += [facts[key] for key in ("src", "href", "xlink:href", "srcset", "action", "data") if key in facts]
        self.ids += [facts["id"]] if "id" in facts else []
        if tag == "svg":
            self.figures.append(facts.get("aria-label", ""))
        if tag == "img":
            assert facts.get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(text: str) -> Page:
    """What every page keeps: it needs nothing but itself, and is whole."""
    page = Page(text)
    assert not page.open
    assert "script" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/(2000/svg|1999/xlink))", text)
    assert len(page.ids) == len(set(page.ids))
    assert all(page.figures)
    assert page.tags.count("figure") == len(page.figures) > 0
    return page


def test_what_an_evaluation_leaves(models):
    scores, answers = read_evaluation(models / "restored")
    assert len(answers) == 24
    assert {row["kind"] for row in answers} >= {"caption", "count"}
    assert scores["settings"]["max_new_tokens"] == 40
    assert scores["data"] == str(models / "test")
    assert len(scores["fingerprint"]) == 64
    assert scores["seconds"] > 0
    assert set(scores["environment"]) >= {"torch", "transformers", "python", "machine"}
    assert scores["components"]["vision"]["zeros"] * 2 == scores["components"]["vision"]["parameters"]
    assert {path.name for path in (models / "restored" / "evaluation").iterdir()} == {f"{i}.png" for i in range(24)}
    assert not api.verify(models / "restored", against=models / "pruned")["differences"]


def test_runs_of_models(models):
    dense, pruned, restored = read_runs([models / name for name in ("dense", "pruned", "restored")])
    assert dense.is_dense
    assert dense.sparsity("vision") == 0
    assert pruned.sparsity("vision") == pruned.sparsity("language") == 0.5
    assert pruned.cell["restore"] is None
    assert restored.cell["restore"]["adapter"] == "sparselora"
    assert restored.seconds.keys() == restored.memory.keys() == {"prune", "restore", "evaluate"}
    assert all(2**27 < held < 2**36 for held in restored.memory.values())
    assert len(restored.curve) == 3
    zeros = sum(counts["zeros"] for counts in pruned.components.values())
    for run in (pruned, restored):  # counted in the files here, in the loaded model there
        scores, _ = read_evaluation(run.folder)
        assert (run.bytes, run.packed_bytes) == (scores["bytes"], scores["packed_bytes"])
    assert dense.packed_bytes == dense.bytes
    assert pruned.bytes - 4 * zeros < pruned.packed_bytes < pruned.bytes - 1.7 * zeros  # of 2 or 4 bytes, less 2 bits
    assert pruned.nonzero_parameters == pruned.parameters - zeros
    assert all(0 < layer["error"] < 1 for layer in pruned.layers.values())


def test_a_page_of_models(models, run, tmp_path):
    folders = [models / name for name in ("dense", "pruned", "restored")]
    code, _, errors = run("report", *folders, "--out", tmp_path / "page.html", "--figures", tmp_path / "figures")
    assert code == 0, errors
    text = (tmp_path / "page.html").read_text()
    page = check(text)
    assert page.tags.count("img") == 12
    assert (tmp_path / "figures" / "scores.svg").is_file()
    assert (tmp_path / "figures" / "zeros-0.png").is_file()
    said = " ".join(page.text)
    for word in ("against dense", "50.00\u00a0%", "sparselora", "Recipe of restored", "Hashes", "describe the image."):
        assert word in said
    restored = group_runs(read_runs(folders))[2]
    assert f"{100 * estimate(restored).value:.1f}" in said
    lines = json.dumps(sorted(path.name for path in tmp_path.iterdir()))
    assert lines == '["figures", "page.html"]'  # nothing half written is left

    with pytest.raises(SparsightError, match="exists; give another name, or add `overwrite`"):
        api.report(folders, out=tmp_path / "page.html")
    api.report(folders, out=tmp_path / "page.html", overwrite=True)
    assert (tmp_path / "page.html").read_text() == text  # the same runs, the same bytes


def test_a_page_of_a_sweep(sweep, tmp_path):
    path = api.report([sweep], out=tmp_path / "page.html")
    text = path.read_text()
    page = check(text)
    assert {"exact match by split of a fixed sum", "exact match by component", "exact match by pattern"} <= set(page.figures)
    assert "11 runs of tiny-vlm" in text
    assert "2 seeds" in text
    assert "what is 1? &lt;b&gt;" in text  # answers are text, whatever they hold
    assert "<b>" not in re.sub(r"<div class=\"(number|proof)\"><b>", "", text)
    assert page.tags.count("img") == 6
    cells = [text for text in page.text if text.startswith(("−", "+"))]
    assert len(cells) >= 10  # differences against the dense model


def test_models_and_sweeps_on_one_page(models, sweep, tmp_path):
    page = check(api.report([models / "pruned", sweep], out=tmp_path / "page.html").read_text())
    assert "12 runs" in " ".join(page.text)


def test_another_metric(sweep, tmp_path):
    text = api.report([sweep], out=tmp_path / "page.html", metric="cider_d").read_text()
    assert "The score is CIDEr-D" in text
    with pytest.raises(SparsightError, match="was scored by beauty"):
        api.report([sweep], out=tmp_path / "other.html", metric="beauty")
    assert not (tmp_path / "other.html").exists()


def test_the_same_name_twice(models, tmp_path):
    shutil.copytree(models / "pruned", tmp_path / "other" / "pruned")
    first, second = read_runs([models / "pruned", tmp_path / "other" / "pruned"])
    assert first.label != second.label == "other/pruned"
    assert len(group_runs([first, second])) == 2  # the same settings and seed are no second seed


def test_other_samples_are_no_second_seed_and_the_dense_model_stands_once(sweep):
    runs = read_runs([sweep])
    labels = [group.label for group in group_runs(runs)]
    assert [
        group.label for group in group_runs([*runs, *runs[:1]])
    ] == labels  # the dense model again, with the same answers
    pruned = next(run for run in runs if not run.is_dense)
    other = replace(pruned, cell={**pruned.cell, "seed": 9}, predictions=pruned.predictions[:3])
    assert len(group_runs([pruned, replace(other, predictions=pruned.predictions)])) == 1
    assert len(group_runs([pruned, other])) == 2


def test_equal_labels_say_what_differs():
    cells = [("60%", {"seed": s, "samples": 8, "restore": {"lr": lr, "steps": 3}}) for s, lr in ((0, 1e-3), (1, 1e-1))]
    assert distinct_labels([*cells, ("70%", {"samples": 4})]) == ["60%, restore.lr 0.001", "60%, restore.lr 0.1", "70%"]
    records = [
        {"label": label, "cell": cell, "components": {}, "scores": [], "packed_bytes": 1, "seconds": {}, "verified": True}
        for label, cell in cells
    ]
    for record in records:
        record["scores"] = [{"metric": "exact_match", "kind": "all", "value": 0.5}]
    (table, *_) = sweep_tables([{**record, "verified": i == 0} for i, record in enumerate(records)], "out")[:1]
    assert table.row_count == 2
    assert "NOT every zero" in sweep_tables([{**records[0], "verified": False}], "out")[1]


def test_two_seeds_of_a_model_are_averaged(models, tmp_path):
    shutil.copytree(models / "pruned", tmp_path / "seed1")
    recipe = yaml.safe_load((tmp_path / "seed1" / "recipe.yaml").read_text())
    recipe["prune"] |= {"seed": 1, "fingerprint": "other samples"}
    (tmp_path / "seed1" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (group,) = group_runs(read_runs([models / "pruned", tmp_path / "seed1"]))
    assert [run.seed for run in group.runs] == [0, 1]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda out: None, "is not there; give folders that eval --record or sweep has written to"),
        (lambda out: out.mkdir(), "has neither sparsity.json nor evaluation.json nor sweep.json"),
        (lambda out: (out.mkdir(), (out / "config.json").write_text("{}")), "has no evaluation.json; run sparsight eval"),
        (lambda out: (out.mkdir(), (out / "evaluation.json").write_text("{")), "evaluation.json: is damaged"),
        (lambda out: (out.mkdir(), (out / "evaluation.json").write_text('{"format": 9}')), "format 9 is not 1"),
        (lambda out: (out.mkdir(), (out / "evaluation.json").write_text('{"format": 1, "rows": []}')), "predictions.jsonl"),
        (lambda out: (out.mkdir(), (out / "sweep.json").write_text("[]")), "sweep.json: is damaged"),
        (lambda out: (out.mkdir(), (out / "sweep.json").write_text('{"format": 1}')), "no cell of this sweep is finished"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, prepare, said):
    prepare(tmp_path / "given")
    with pytest.raises(SparsightError, match=re.escape(said)) as error:
        api.report([tmp_path / "given"], out=tmp_path / "page.html")
    assert "given" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_a_broken_cell(own_sweep):
    path = own_sweep / "cells" / "2-4-0.json"
    cell = json.loads(path.read_text())
    del cell["components"]
    path.write_text(json.dumps(cell))
    with pytest.raises(SparsightError, match=r"2-4-0\.json: is damaged \(lacks 'components'\); delete it and run"):
        read_runs([own_sweep])
    path.unlink()
    (own_sweep / "cells" / "2-4-1.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(SparsightError, match=r"2-4-1\.json: is damaged .*2-4-1\.jsonl, line 1"):
        read_runs([own_sweep])


def test_an_evaluation_of_other_weights(models, tmp_path):
    shutil.copytree(models / "pruned", tmp_path / "changed")
    path = tmp_path / "changed" / "sparsity.json"
    path.write_text(path.read_text().replace('"method": "wanda"', '"method": "mine"'))
    with pytest.raises(SparsightError, match="its evaluation is of other weights"):
        read_runs([tmp_path / "changed"])


def test_a_pruned_model_without_scores(models, tmp_path):
    shutil.copytree(models / "pruned", tmp_path / "bare", ignore=shutil.ignore_patterns("evaluation.json"))
    with pytest.raises(SparsightError, match="none of the 1 runs was scored by exact match; run sparsight eval"):
        api.report([tmp_path / "bare"], out=tmp_path / "page.html")


def test_where_a_page_cannot_go(sweep, tmp_path):
    (tmp_path / "thesis.html").write_text("<p>years of work")
    for out, said in (
        (tmp_path, "is a folder; give the name of a page"),
        (tmp_path / "no" / "page.html", "there is no folder"),
        (tmp_path / "thesis.html", "is not a page of report, so `overwrite` does not replace it"),
    ):
        with pytest.raises(SparsightError, match=said):
            api.report([sweep], out=out, overwrite=True)
    with pytest.raises(SparsightError, match="the figures could not be written"):
        api.report([sweep], out=tmp_path / "page.html", figures=tmp_path / "thesis.html")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.html"]
    assert (tmp_path / "thesis.html").read_text() == "<p>years of work"


def test_record_needs_a_folder_of_ones_own(models, run):
    code, _, errors = run("eval", "someone/model", "--data", models / "test", "--record")
    assert code == 2
    assert "--record: someone/model is not a folder" in errors
    with pytest.raises(SparsightError, match="belong beside its weights"):
        api.evaluate(models / "pruned", data=models / "test", record=models / "elsewhere")
    assert not (models / "elsewhere").exists()


def test_record_where_nothing_can_be_written(models, monkeypatch, tmp_path):
    from sparsight.evaluation import record

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(record.tempfile, "TemporaryFile", refuse)
    (tmp_path / "not even read.jsonl").write_text("not JSON")
    with pytest.raises(SparsightError, match=r"`record`: .* cannot be written to \(Read-only file system\); copy the model"):
        api.evaluate(models / "dense", data=tmp_path / "not even read.jsonl", record=True)


def test_recorded_elsewhere(zoo_folder, scenes, tmp_path):
    """A dense model whose own folder is not to be touched."""
    folder = zoo_folder("llava")
    before = sorted(path.name for path in folder.iterdir())
    api.evaluate(folder, data=scenes, samples=4, max_new_tokens=4, record=tmp_path / "scores")
    assert sorted(path.name for path in folder.iterdir()) == before
    (run,) = read_runs([tmp_path / "scores"])
    assert run.is_dense
    assert run.parameters > 0
    assert run.packed_bytes <= run.bytes


def test_the_card(models):
    card = (models / "restored" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "image-text-to-text"
    (index,) = header["model-index"]
    (result,) = index["results"]
    scores, _ = read_evaluation(models / "restored")
    exact = next(row["value"] for row in scores["rows"] if (row["kind"], row["metric"]) == ("all", "exact_match"))
    assert {"type": "exact_match", "name": "exact match, %", "value": round(100 * exact, 2)} in result["metrics"]
    assert result["dataset"]["name"] == "test"
    results = ModelCard(card).data.eval_results  # as the Hub reads it
    assert {each.metric_type for each in results} >= {"exact_match", "token_accuracy"}
    assert body.count("## Scores") == 1
    assert "AutoModelForImageTextToText.from_pretrained" in body
    assert "| vision | 16 |" in body
    assert str(models) not in card


def test_the_card_keeps_what_a_person_wrote(models, tmp_path):
    shutil.copytree(models / "pruned", tmp_path / "mine")
    path = tmp_path / "mine" / "README.md"
    path.write_text(path.read_text().replace("## How to load it", "## My words\n\nmine\n\n## How to load it"))
    before = path.read_text()
    api.evaluate(tmp_path / "mine", data=models / "test", samples=5, record=True)
    after = path.read_text()
    assert "## My words\n\nmine" in after
    assert after.count("## Scores") == 1
    assert after != before
    path.write_text("my own card\n")
    api.evaluate(tmp_path / "mine", data=models / "test", samples=5, record=True)
    assert path.read_text() == "my own card\n"


@pytest.mark.skipif(shutil.which("git") is None, reason="git reads the file")
def test_what_is_of_the_held_out_data_is_kept_out_of_uploads(models, tmp_path):
    """`upload_folder` sends the file to the Hub, which reads it as git does."""
    folder = tmp_path / "repository"
    shutil.copytree(models / "restored", folder)
    subprocess.run(["git", "init", "-q", folder], check=True)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    kept = subprocess.run(
        ["git", "-C", folder, "ls-files", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    left = {name for name in names if not name.startswith(".git/")} - set(kept)
    assert "predictions.jsonl" in left
    assert any(name.startswith("evaluation/") for name in left)
    assert all(name == "predictions.jsonl" or name.startswith("evaluation/") for name in left)
    assert {"evaluation.json", "model.safetensors", "README.md"} <= set(kept)


def test_the_card_has_the_licence_of_the_base_model(tmp_path):
    layer = {"component": "vision", "pattern": "2:4", "shape": [4, 4], "zeros": 8}
    base = tmp_path / "base"
    base.mkdir()
    sparsity = {"base_model": str(base), "method": "wanda", "layers": {"a": layer}, "parameters": 100}
    recipe = {"prune": {"data": "../private/mine.jsonl", "images": "/home/someone/images"}, "data": "lmms-lab/VQAv2:x"}
    card = model_card(sparsity, recipe)
    assert "**Licence**: not known. That of `base` applies" in card
    assert "private" not in card
    assert "someone" not in card
    header = ModelCard(card).data
    assert (header.license, header.base_model, header.datasets) == (None, None, ["lmms-lab/VQAv2"])
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE\n---\n# A model\n")
    header = ModelCard(model_card(sparsity, recipe)).data
    assert (header.license, header.license_name, header.license_link) == ("other", "llama2", "LICENSE")
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert "not known" in model_card(sparsity, recipe)


def test_a_card_names_a_base_model_on_the_hub():
    layer = {"component": "vision", "pattern": "2:4", "shape": [4, 4], "zeros": 8}
    sparsity = {"base_model": "someone/model", "method": "wanda", "layers": {"a": layer}, "parameters": 100}
    card = model_card(sparsity, {"prune": {"method": "wanda"}})
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["base_model_relation"]) == ("someone/model", "finetune")
    assert "model-index" not in card
    assert "8 of the model's 100 parameters are zeros" in card
