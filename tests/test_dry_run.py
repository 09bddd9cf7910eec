"""`--dry-run N`: the samples as the model gets them, sizes, steps and cost; no weight is read, nothing is written."""

import json
import shutil

import pytest

from sparsight.data import Encoder, read
from sparsight.model.load import load_processor

from shapes import vqav2


@pytest.fixture
def config_only(zoo_folder, tmp_path):
    """Give `config_only(name)`: a folder with configuration and processor and no weights."""

    def make(name):
        folder = tmp_path / "hollow"
        shutil.copytree(zoo_folder(name), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        return folder

    return make


@pytest.mark.parametrize("name", ["llava", "instructblip-t5", "instructblip-llama", "paligemma"])
def test_training_samples_with_their_answers_marked(name, config_only, scenes, built, run, tmp_path):
    model = config_only(name)
    how = ("--steps", 3, "--batch-size", 2, "--held-out", 2, "--dry-run", 2)
    code, out, _ = run("restore", model, "out", "--data", scenes, "--json", *how)
    facts = json.loads(out)
    assert code == 0
    assert not (tmp_path / "out").exists()
    assert len(facts["samples"]) == 2
    assert (facts["steps"], facts["samples per step"], facts["held-out samples"]) == (3, 2, 2)
    samples = {sample.id: sample for sample in read(scenes)}
    for shown in facts["samples"]:
        sample = samples[shown["id"]]
        (text,) = shown["text"]
        assert text.count("«") == text.count("»") == 1
        marked = text[text.index("«") + 1 : text.index("»")]
        assert sample.turns[0].answer.split()[0] in marked
        assert shown["images"] == [list(image.size) for image in sample.load_images()]
        batch = Encoder(load_processor(model), built(name)[0]).encode([sample])
        assert shown["inputs"] == {key: list(tensor.shape) for key, tensor in batch.inputs.items()}
        assert shown["answer_tokens"] == int((batch.inputs["labels"] != -100).sum())
        if "image" in batch.padding:
            assert f"[{int(batch.padding['image'].sum())} image tokens]" in text
    assert facts["cost"]["peak_megabytes"] > 0


def test_questions_of_a_benchmark(config_only, run, tmp_path):
    vqav2(tmp_path / "vqav2")
    model = config_only("llava")
    code, out, _ = run("eval", model, "--task", "vqav2", "--data", "vqav2", "--dry-run", 1)
    assert code == 0
    assert "Answer the question using a single word or phrase." in out
    assert "Scored by: 'red', 'red'" in out
    assert "«" not in out
    assert "most new tokens" in out


def test_calibration(config_only, scenes, run, tmp_path):
    code, out, _ = run(
        "prune", config_only("llava"), "out", "--data", scenes, "--samples", 4, "--batch-size", 3, "--dry-run", 1
    )
    assert code == 0
    assert "Dry run of prune: nothing was computed or written" in out
    assert out.count("«") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_cost_that_is_not_known_is_a_line(config_only, scenes, run):
    code, out, _ = run(
        "prune", config_only("llava"), "out", "--data", scenes, "--samples", 2, "--method", "wanda", "--refine", "dsnot",
        "--policy", "alpha", "--dry-run", 1,
    )  # fmt: skip
    assert code == 0
    assert ("is not known before it runs" in out) != ("GFLOPs" in out)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--dry-run", 0), "--dry-run: 0 is not a whole number of at least 1"),
        (("--dry-run", 1, "--sparsity", 1.5), "--sparsity"),
        (("--dry-run", 1, "--split", "x"), "there is no 'x'"),
    ],
)
def test_what_is_refused(words, line, config_only, scenes, run):
    code, _, err = run("prune", config_only("llava"), "out", "--data", scenes, *words)
    assert (code, line in err) == (2, True), err


def test_data_is_needed(config_only, run):
    code, _, err = run("prune", config_only("llava"), "out", "--method", "magnitude", "--dry-run", 1)
    assert (code, "--data: is missing; give samples to show" in err) == (2, True)
