"""Verbs that write nothing: one question to one or two models, and the difference of two models."""

import copy
import json

import pytest
import torch

from sparsight import SparsightError, anatomy, api, load
from sparsight.data import Sample, Turn
from sparsight.evaluation import predict

import zoo


@pytest.fixture(scope="module")
def models(zoo_folder, scenes, tmp_path_factory):
    """A dense model, two prunings of it, and a restoration of the first."""
    home = tmp_path_factory.mktemp("looks")
    dense = zoo_folder("llava")
    api.prune(dense, home / "sparse", data=scenes, samples=4, sparsity=0.5)
    api.prune(dense, home / "other", sparsity=0.5, method="magnitude")
    api.restore(home / "sparse", home / "restored", data=scenes, samples=4, steps=2, batch_size=2, lr=1e-2)
    zoo.images(1)[0].save(home / "door.png")
    return dense, home


def test_two_answers_side_by_side(models, run):
    dense, home = models
    question = "What color is the door?"
    code, out, _ = run(
        "ask", home / "sparse", home / "door.png", question, "--against", dense, "--max-new-tokens", 4, "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert [each["model"] for each in facts["answers"]] == [str(home / "sparse"), str(dense)]
    for each in facts["answers"]:
        model, processor = load(each["model"])
        sample = Sample("x", (home / "door.png",), (Turn(question, ("?",)),))
        assert [each["answer"]] == predict(model, processor, [sample], max_new_tokens=4)
    code, out, _ = run("ask", home / "sparse", home / "door.png", question, "--against", home / "sparse")
    assert (code, "The same answer" in out, question in out) == (0, True, True)


def test_a_question_to_a_model_in_memory(models):
    dense, home = models
    model, processor = load(dense)
    facts = api.ask(model, zoo.images(1)[0], "What?", processor=processor, max_new_tokens=2)
    assert facts["answers"][0]["model"] == type(model).__name__
    with pytest.raises(SparsightError, match="`processor`"):
        api.ask(model, home / "door.png", "What?")


@pytest.mark.parametrize(
    ("image", "question", "settings", "line"),
    [
        ("nothing.png", "What?", {}, "`image`: nothing.png is no file"),
        ("door.png", " ", {}, "`question`: is empty"),
        ("door.png", "What?", {"beams": 0}, "`beams`: 0 is not a whole number of at least 1"),
        ("door.png", "What?", {"dtype": "int3"}, "`dtype`: unknown dtype 'int3'"),
        ("broken.png", "What?", {}, "`image`: image 'broken.png' cannot be read"),
    ],
)
def test_what_cannot_be_asked(image, question, settings, line, models, monkeypatch):
    dense, home = models
    monkeypatch.chdir(home)
    (home / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SparsightError, match=line):
        api.ask(dense, image, question, **settings)


def test_the_difference_of_a_model_and_its_restoration(models, run):
    _, home = models
    facts = api.diff(home / "sparse", home / "restored")
    for part in (*facts["components"].values(), *facts["layers"].values()):
        if part["zeros_a"]:
            assert (part["zeros_a"], part["overlap"]) == (part["zeros_b"], 1.0)
    assert any(part["drift"] > 0 for part in facts["components"].values())
    same = api.diff(home / "sparse", home / "sparse")
    assert {part["drift"] for part in same["layers"].values()} == {0.0}
    code, out, _ = run("diff", home / "sparse", home / "restored", "--layers")
    assert (code, "overlap" in out, "Layers" in out) == (0, True, True)


def test_the_numbers_of_a_layer_by_hand(models):
    dense, home = models
    facts = api.diff(home / "sparse", home / "other")
    (one, _), (other, _) = load(home / "sparse"), load(home / "other")
    bodies = anatomy(one), anatomy(other)
    name = next(layer.name for layer in bodies[0].layers if layer.sparse)
    a, b = (body[name].weight for body in bodies)
    both, either = ((a == 0) & (b == 0)).sum(), ((a == 0) | (b == 0)).sum()
    assert facts["layers"][name]["overlap"] == pytest.approx(float(both / either))
    assert 0 < facts["layers"][name]["overlap"] < 1
    assert facts["layers"][name]["drift"] == 0  # neither method changes what it keeps
    total = facts["components"]["language"]
    parts = [part for part in facts["layers"].values() if part["component"] == "language"]
    assert total["zeros_a"] == sum(part["zeros_a"] for part in parts)
    plain = api.diff(dense, dense)
    assert plain["components"]["vision"]["overlap"] is None


def test_drift_in_memory(models):
    dense, _ = models
    model, _ = load(dense)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in anatomy(other).layers:
            layer.weight.mul_(1.5)
    facts = api.diff(model, other)
    assert all(part["drift"] == pytest.approx(0.5, rel=1e-5) for part in facts["layers"].values())


def test_other_models_are_refused(models, zoo_folder):
    with pytest.raises(SparsightError, match=r"are other models: .* is not the same layer in both"):
        api.diff(models[0], zoo_folder("instructblip-t5"))
