"""Settings of the data in every verb: the folder of images, the longest sample, and what only the processor refuses."""

import json

import pytest
import torch
import yaml
from PIL import Image

from sparsight import SparsightError, api
from sparsight.errors import Interrupted

import zoo


@pytest.fixture
def apart(tmp_path):
    """A JSONL file whose images lie in another folder, one of them by its absolute path."""
    far, data = tmp_path / "far", tmp_path / "data"
    far.mkdir()
    data.mkdir()
    lines = []
    for i, image in enumerate(zoo.images(8)):
        image.save(far / f"{i}.png")
        name = str(far / "0.png") if i == 0 else f"{i}.png"
        lines.append(json.dumps({"image": name, "prompt": "what color?", "answer": "red", "url": "x"}))
    (data / "data.jsonl").write_text("\n".join(lines))
    return data / "data.jsonl", far


def test_images_in_every_verb(apart, run, zoo_folder, tmp_path):
    data, far = apart
    model, short = zoo_folder("llava"), ("--samples", 4, "--batch-size", 4)
    code, _, err = run("prune", model, "sparse", "--data", data)
    assert (code, "--images" in err) == (2, True)
    code, out, _ = run("prune", model, "sparse", "--data", data, "--images", far, *short)
    assert (code, "Ignored keys: 'url' (4 samples)" in out) == (0, True)
    code, _, _ = run(
        "restore", "sparse", "restored", "--data", data, "--images", far, "--steps", 1, "--batch-size", 2, "--held-out", 2
    )
    assert code == 0
    code, out, _ = run("eval", "restored", "--data", data, "--images", far, "--max-new-tokens", 1)
    assert (code, "Ignored keys" in out) == (0, True)
    assert run("plan", model, "--data", data, "--images", far, "--policy", "owl", *short)[0] == 0
    assert run("plan", model, "--data", data, "--images", far, "--cost")[0] == 0
    recipe = yaml.safe_load((tmp_path / "restored" / "recipe.yaml").read_text())
    assert recipe["prune"]["images"] == recipe["restore"]["images"] == str(far)
    api.run(tmp_path / "restored" / "recipe.yaml", tmp_path / "again", changes=["evaluate=null"])
    assert zoo.digest(tmp_path / "again" / "restored") == zoo.digest(tmp_path / "restored")


def test_images_in_recipes(apart, zoo_folder, tmp_path):
    data, _ = apart
    shared = {"model": str(zoo_folder("llava")), "data": "data/data.jsonl", "held_out": "data/data.jsonl", "images": "far"}
    shared |= {"max_length": 500, "prune": {"samples": 4}, "evaluate": {"max_new_tokens": 1, "samples": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(shared))
    assert api.run(tmp_path / "run.yaml", tmp_path / "ran")["verify"]["differences"] == {}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**shared, "grid": {"sparsity": [0.5]}}))
    assert len(api.sweep(tmp_path / "sweep.yaml", tmp_path / "swept")) == 2
    found = api.search(
        zoo_folder("llava"),
        tmp_path / "found",
        data=data,
        held_out=data,
        images=tmp_path / "far",
        samples=4,
        max_new_tokens=1,
        held_out_samples=2,
        over="components",
    )
    assert found.facts["data"]["data"] == {"ignored_keys": {"url": 4}}
    for change, reason in (
        ("max_length=0", "max_length: 0 is not a whole number"),
        ("max_length=true", "is not a whole"),
        ("images=3", "is not a word"),
    ):
        with pytest.raises(SparsightError, match=reason):
            api.run(tmp_path / "run.yaml", tmp_path / "none", changes=[change])


def test_the_setting_images_is_a_folder(apart, zoo_folder, tmp_path):
    for wrong, reason in ((tmp_path / "nowhere", "is no folder"), (3, "int is no name")):
        with pytest.raises(SparsightError, match=f"`images`: .*{reason}"):
            api.prune(zoo_folder("llava"), tmp_path / "out", data=apart[0], images=wrong)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def thin(tmp_path):
    """Twelve samples, of which the seventh has an image that a Qwen processor refuses, and the ninth a token of images."""
    folder = tmp_path / "thin"
    folder.mkdir()
    lines = []
    for i, image in enumerate(zoo.images(12)):
        (Image.new("RGB", (3000, 8)) if i == 6 else image).save(folder / f"{i}.png")
        text = "a <|image_pad|>" if i == 8 else "what color?"
        lines.append(json.dumps({"image": f"{i}.png", "prompt": text, "answer": "red", "id": f"number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_what_only_the_processor_refuses_stops_no_training(thin, zoo_folder, scenes, tmp_path):
    model = zoo_folder("qwen3-vl")
    with pytest.raises(SparsightError, match=r"^sample 'number 6' cannot be written") as caught:
        api.prune(model, tmp_path / "sparse", data=thin)
    assert "template" not in str(caught.value)
    done = api.prune(model, tmp_path / "sparse", data=thin, skip_bad=True)
    assert done.metrics["prune"]["skipped_samples"] == 2
    how = {"data": thin, "batch_size": 3, "lr": 1e-3, "epochs": 2, "save_every": 1, "kl": 0.0}
    with pytest.raises(SparsightError, match=r"^sample 'number 6' cannot be written"):
        api.restore(tmp_path / "sparse", tmp_path / "none", **how)
    assert not list(tmp_path.glob("none*"))
    whole = api.restore(tmp_path / "sparse", tmp_path / "whole", skip_bad=True, **how)
    assert whole.metrics["restore"]["skipped_samples"] == 2

    def stop(note, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        api.restore(tmp_path / "sparse", tmp_path / "out", skip_bad=True, progress=stop, **how)
    api.restore(tmp_path / "sparse", tmp_path / "out", skip_bad=True, resume=True, **how)
    assert zoo.digest(tmp_path / "out") == zoo.digest(tmp_path / "whole")
    found = api.evaluate(tmp_path / "out", thin, skip_bad=True, max_new_tokens=1)
    assert (len(found.predictions), found.skipped) == (10, 2)


def test_the_longest_sample_in_every_verb(run, zoo_folder, tmp_path):
    lines = [{"prompt": "what color?", "answer": "red", "id": str(i), "image": "a.png"} for i in range(6)]
    zoo.images(1)[0].save(tmp_path / "a.png")
    lines[2]["prompt"] = "red " * 100
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model, long = zoo_folder("llava"), ("--data", "data.jsonl", "--max-length", 60)
    for words in (("prune", model, "sparse"), ("eval", model), ("plan", model, "--policy", "owl")):
        code, _, err = run(*words, *long)
        assert (code, "sample '2': " in err, "more than --max-length 60" in err) == (2, True, True)
    code, out, _ = run("prune", model, "sparse", *long, "--skip-bad")
    assert (code, "Left out 1 broken samples" in out) == (0, True)
    code, _, _ = run("restore", "sparse", "out", *long, "--skip-bad", "--steps", 1, "--batch-size", 2)
    assert code == 0
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["prune"]["max_length"] == recipe["restore"]["max_length"] == 60
    code, out, _ = run("eval", "out", *long, "--skip-bad", "--max-new-tokens", 1)
    assert (code, "Left out 1 broken samples" in out) == (0, True)


def test_system_texts_and_transparent_images_are_trained_on(zoo_folder, tmp_path):
    Image.new("RGBA", (40, 40), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "red"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps({"image": "clear.png", "messages": talk})] * 4))
    for name in ("llava", "instructblip-t5"):
        api.prune(zoo_folder(name), tmp_path / f"{name}-sparse", data=tmp_path / "data.jsonl")
        done = api.restore(
            tmp_path / f"{name}-sparse", tmp_path / f"{name}-out", data=tmp_path / "data.jsonl", steps=1, batch_size=2
        )
        assert torch.isfinite(torch.tensor(done.metrics["restore"]["curve"][-1]["ce"]))
