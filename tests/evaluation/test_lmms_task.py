"""`eval --export-task`: the folder is read as lmms-eval reads it, by its YAML file, by `datasets` and by its functions."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sparsight import SparsightError, api
from sparsight.data import read
from sparsight.errors import Notice
from sparsight.evaluation.lmms_task import write_task
from sparsight.model.load import load
from sparsight.tasks.wording import Decoding

from shapes import OFFICIAL


class Task:
    """What lmms-eval makes of such a folder: settings, documents, and the functions that the settings name."""

    def __init__(self, folder):
        datasets = pytest.importorskip("datasets")
        (file,) = folder.glob("*.yaml")
        spec = importlib.util.spec_from_file_location("utils", folder / "utils.py")
        self.utils = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.utils)

        class Loader(yaml.SafeLoader):
            pass

        def function(loader, node):
            module, name = loader.construct_scalar(node).split(".")
            assert module == "utils"
            return getattr(self.utils, name)

        Loader.add_constructor("!function", function)
        self.settings = yaml.load(file.read_text(), Loader)
        files = {split: str(folder / name) for split, name in self.settings["dataset_kwargs"]["data_files"].items()}
        self.docs = datasets.load_dataset(self.settings["dataset_path"], data_files=files)[self.settings["test_split"]]

    def asked(self):
        """Per document the prompt, the pictures as arrays, and the target."""
        text, visual, target = (self.settings[f"doc_to_{name}"] for name in ("text", "visual", "target"))
        return [(text(doc), [np.asarray(picture) for picture in visual(doc)], target(doc)) for doc in self.docs]


def test_the_same_questions_on_the_same_pictures(run, zoo_folder, scenes, tmp_path):
    files = ("--predictions", "answers.jsonl", "--export-task", "my-task")
    few = ("--samples", 6, "--max-new-tokens", 3, "--seed", 1)
    assert run("eval", zoo_folder("llava"), "--data", scenes, *few, *files)[0] == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    samples = {(sample.id, sample.prompt): sample for sample in read(scenes)}
    task = Task(tmp_path / "my-task")
    assert task.settings["task"] == "sparsight_my_task"
    assert task.settings["generation_kwargs"] == {"max_new_tokens": 3, "num_beams": 1, "do_sample": False, "temperature": 0}
    assert len(task.docs) == len(answers) == 6
    for doc, answer, (prompt, pictures, target) in zip(task.docs, answers, task.asked(), strict=True):
        assert prompt == answer["prompt"]
        (own,) = samples[answer["id"], prompt].load_images()
        np.testing.assert_array_equal(pictures[0], np.asarray(own))
        facts = json.loads(target)
        assert (facts["id"], facts["kind"], facts["answers"]) == (answer["id"], answer["kind"], answer["answers"])
        scores = task.settings["process_results"](doc, [answer["prediction"]])
        assert scores == {"exact_match": answer["scores"]["exact_match"]}
        assert task.settings["process_results"](doc, [f" {answer['answers'][0].upper()}\n"]) == {"exact_match": 1.0}
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "my-task").glob("*.*"))


def test_a_benchmark_is_asked_in_the_words_of_the_model(zoo_folder, tmp_path):
    OFFICIAL["vqav2"](tmp_path / "vqav2")
    model = zoo_folder("instructblip-t5")
    how = {"task": "vqav2", "max_new_tokens": 2}
    with pytest.warns(Notice, match="vqa: has no length penalty, and these answers have -1; lmms-eval may differ"):
        result = api.evaluate(model, tmp_path / "vqav2", export_task=tmp_path / "vqa", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        api.evaluate(model, tmp_path / "vqav2", export_task=tmp_path / "same", length_penalty=1, **how)
    asked = Task(tmp_path / "vqa").asked()
    assert [prompt for prompt, _, _ in asked] == [row["prompt"] for row in result.predictions]
    assert all(prompt.startswith("Question: ") and prompt.endswith(" Short answer:") for prompt, _, _ in asked)
    assert {json.loads(target)["task"] for _, _, target in asked} == {"vqav2"}
    assert Task(tmp_path / "vqa").settings["generation_kwargs"]["num_beams"] == 5


def test_a_benchmark_that_needs_all_samples_says_how_many_there_are(zoo_folder, tmp_path):
    OFFICIAL["mme"](tmp_path / "mme")
    api.evaluate(zoo_folder("llava"), tmp_path / "mme", task="mme", max_new_tokens=1, export_task=tmp_path / "task")
    assert [json.loads(target)["total"] for _, _, target in Task(tmp_path / "task").asked()] == [6] * 6


def odd_pictures(folder):
    """Pictures that Pillow does not open as RGB and upright, and one that it does."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    rgb = Image.fromarray(noise[..., :3])
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {"plain.jpg": (rgb, {}), "turned.jpg": (rgb, {"exif": turned}), "grey.png": (rgb.convert("L"), {})}
    made |= {"clear.png": (Image.fromarray(noise), {}), "palette.png": (rgb.quantize(8), {"transparency": 0})}
    made |= {"deep.png": (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {}), "plain.bmp": (rgb, {})}
    for name, (image, how) in made.items():
        image.save(folder / name, **how)
    lines = [{"image": name, "prompt": f"What is {name}?", "answer": "ä noise\u2028"} for name in made]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(made)


@pytest.mark.parametrize("family", ["llava", "smolvlm"])
def test_odd_pictures_are_those_that_the_model_gets(family, zoo_folder, tmp_path):
    names = odd_pictures(tmp_path)
    processor = load(zoo_folder(family))[1]
    samples = read(tmp_path)
    write_task(tmp_path / "task", samples, Decoding(), processor=processor)
    from sparsight.data.pixels import converts

    for name, sample, (_, pictures, target) in zip(names, samples, Task(tmp_path / "task").asked(), strict=True):
        (own,) = sample.load_images(alpha=converts(processor))
        np.testing.assert_array_equal(pictures[0], np.asarray(own), err_msg=name)
        assert json.loads(target)["answers"] == list(sample.answers)
    copied = {file.suffix for file in (tmp_path / "task" / "images").iterdir()}
    assert copied == {".jpg", ".png"}


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"},
                       {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d"}]}, "a dialogue"),
        ({"prompt": "a?", "answer": "b", "system": "be brief"}, "a system text"),
        ({"prompt": "this <image> is?", "answer": "b", "image": "plain.jpg"}, "pictures inside its text"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_alike_is_refused(record, part, run, zoo_folder, tmp_path):
    odd_pictures(tmp_path)
    Path("own.jsonl").write_text(json.dumps({"id": "7", **record}) + "\n")
    code, _, err = run("eval", zoo_folder("llava"), "--data", "own.jsonl", "--export-task", "task")
    assert code == 2
    assert err.startswith(f"sparsight: --export-task: sample '7' has {part}, and lmms-eval asks one question behind")
    assert not (tmp_path / "task").exists()


def test_a_prompt_with_a_picture_inside_is_refused_before_anything_is_asked(run, zoo_folder, tmp_path, monkeypatch):
    OFFICIAL["gqa"](tmp_path / "gqa")
    words = ("eval", zoo_folder("llava"), "--task", "gqa", "--data", "gqa", "--prompt", "<image> {question}")
    monkeypatch.setattr("sparsight.evaluation.verb.load", lambda *args, **kwargs: pytest.fail("was loaded"))
    for more in ((), ("--dry-run", 1)):
        code, _, err = run(*words, "--export-task", "task", *more)
        assert (code, "--export-task: sample '201000' has pictures inside its text" in err) == (2, True), err


def test_a_folder_that_holds_something_is_refused(run, zoo_folder, scenes, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for folder, line in {
        "full": "--export-task: full: exists and is not empty; choose another folder\n",
        "full/mine.txt": "--export-task: full/mine.txt: is a file; give a folder to write to\n",
        str(Path(scenes).parent): "holds what is read",
    }.items():
        for more in ((), ("--dry-run", 1)):
            code, _, err = run("eval", zoo_folder("llava"), "--data", scenes, "--export-task", folder, *more)
            assert (code, line in err) == (2, True), err
    model, processor = load(zoo_folder("llava"))
    with pytest.raises(SparsightError, match="`export_task`: belongs to a model in a folder"):
        api.evaluate(model, scenes, processor=processor, export_task=tmp_path / "task")
