"""Files that are cut short, of another kind, binary or not ours to read: one line with the file, and no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sparsight import SparsightError, anatomy, api, load, load_adapter
from sparsight.errors import Interrupted
from sparsight.evaluation import verb as evaluating

from zoo import digest

DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "another kind": lambda path: path.write_text("[1, 2]" if path.suffix == ".json" else "- 1\n- 2\n"),
    "a word": lambda path: path.write_text('"word"'),
    "binary": lambda path: path.write_bytes(bytes(range(128, 256)) * 9),
}


@pytest.fixture(scope="module")
def restored(zoo_folder, scenes, tmp_path_factory):
    """A model that was pruned, restored and evaluated, with its adapter."""
    home = tmp_path_factory.mktemp("damaged")
    api.prune(zoo_folder("llava"), home / "pruned", data=scenes, samples=4)
    api.restore(home / "pruned", home / "model", data=scenes, steps=1, batch_size=4, save_adapter=True)
    api.evaluate(home / "model", data=scenes, samples=4, max_new_tokens=1, record=True)
    return home / "model"


def one_line(run, *words, code=2):
    """What the command line says, which is one line."""
    found, out, errors = run(*words, *(["--quiet"] if words[0] not in ("verify", "inspect", "report") else []))
    assert (found, out, errors.count("\n")) == (code, "", 1), errors
    assert errors.startswith("sparsight: ")
    assert "Traceback" not in errors
    return errors


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(
    "name",
    ["config.json", "sparsity.json", "metrics.json", "recipe.yaml", "evaluation.json", "predictions.jsonl",
     "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json"],
)  # fmt: skip
def test_a_file_of_a_model_s_folder(name, kind, restored, scenes, tmp_path, run):
    folder = shutil.copytree(restored, tmp_path / "sparse")
    if not (folder / name).is_file():
        pytest.skip("this processor has no such file")
    DAMAGE[kind](folder / name)
    reads = {
        "config.json": ["eval", "inspect", "verify", "prune", "restore"],
        "sparsity.json": ["inspect", "verify", "eval", "report", "prune", "restore"],
        "metrics.json": ["report", "restore"],
        "recipe.yaml": ["report", "restore"],
        "evaluation.json": ["report"],
        "predictions.jsonl": ["report"],
        "model.safetensors": ["eval", "restore", "verify", "report"],
    }.get(name, ["eval", "restore", "prune"])
    if (kind, name) in (("empty", "recipe.yaml"), ("cut", "recipe.yaml"), ("empty", "predictions.jsonl")):
        return  # that is a recipe with fewer stages, and no answers
    words = {
        "eval": ["--data", scenes, "--record"],
        "prune": ["out", "--data", scenes],
        "restore": ["out", "--data", scenes, "--steps", 1],
    }
    for verb in reads:
        line = one_line(run, verb, "sparse", *words.get(verb, ()))
        assert "sparse" in line
        assert not (tmp_path / "out").exists()


def test_the_record_is_read_before_any_answer(restored, scenes, tmp_path, run, monkeypatch):
    folder = shutil.copytree(restored, tmp_path / "sparse")
    DAMAGE["cut"](folder / "sparsity.json")
    monkeypatch.setattr(evaluating, "evaluate", None)
    assert "sparse/sparsity.json: is damaged" in one_line(run, "eval", "sparse", "--data", scenes, "--record")


@pytest.mark.parametrize("name", ["sparsity.json", "metrics.json", "recipe.yaml", "config.json", "mine.jsonl"])
def test_a_file_that_may_not_be_read(name, restored, scenes, tmp_path, run, monkeypatch):
    folder = shutil.copytree(restored, tmp_path / "sparse")
    data = shutil.copytree(scenes, tmp_path / "data")
    (data / "metadata.jsonl").rename(data / "mine.jsonl")
    read_text = Path.read_text

    def refuse(path, *how, **more):
        if path.name == name and tmp_path in path.resolve().parents:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *how, **more)

    monkeypatch.setattr(Path, "read_text", refuse)
    line = one_line(run, "restore", "sparse", "out", "--data", data / "mine.jsonl", "--steps", 1)
    assert name in line
    assert "(Permission denied)" in line
    assert folder.is_dir()


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["sparse_lora.json", "sparse_lora.safetensors"])
def test_an_adapter(name, kind, restored, tmp_path):
    adapter = shutil.copytree(restored / "adapter", tmp_path / "adapter")
    DAMAGE[kind](adapter / name)
    model, _ = load(restored)
    with pytest.raises(SparsightError, match=rf"{name}: is damaged .*; copy the adapter again") as error:
        load_adapter(model, anatomy(model), adapter)
    assert "\n" not in str(error.value)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", ["cut", "another kind", "binary"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_peft(name, kind, restored, tmp_path, run):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    shutil.copy(restored / "model.safetensors", folder / "adapter_model.safetensors")
    DAMAGE[kind](folder / name)
    assert "adapter" in one_line(run, "inspect", "adapter")


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_the_state_of_a_run(verb, kind, zoo_folder, scenes, tmp_path, run):
    text = f"model: {zoo_folder('llava')}\ndata: {scenes}\nheld_out: {scenes}\n"
    (tmp_path / "r.yaml").write_text(text + ("grid: {sparsity: [0.5]}\n" if verb == "sweep" else ""))
    state = tmp_path / "out" / f"{verb}.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"format": 1, "model": "x"}))
    DAMAGE[kind](state)
    assert f"out/{verb}.json: is damaged" in one_line(run, verb, "r.yaml", "out")
    if verb == "sweep":
        assert "out/sweep.json: is damaged" in one_line(run, "report", "out")
    assert [p.name for p in state.parent.iterdir()] == [state.name]


@pytest.mark.parametrize("kind", DAMAGE)
def test_unfinished_work(kind, zoo_folder, scenes, tmp_path, run, caplog):
    """Its settings are needed; a block that is damaged is pruned again."""

    def stop(note, done, total):
        if done == 3:
            raise KeyboardInterrupt

    dense, how = zoo_folder("llava"), {"data": scenes, "samples": 4}
    with pytest.raises(Interrupted):
        api.prune(dense, tmp_path / "out", progress=stop, **how)
    work = tmp_path / "out.unfinished"
    settings = (work / "settings.json").read_text()
    DAMAGE[kind](work / "settings.json")
    line = one_line(run, "prune", dense, "out", "--data", scenes, "--samples", 4, "--resume")
    assert "out.unfinished/settings.json: is damaged" in line
    assert line.endswith("start over with --overwrite in place of --resume\n")
    (work / "settings.json").write_text(settings)
    first, second, _ = sorted((work / "done").iterdir())
    DAMAGE[kind](first)
    DAMAGE[kind](second)
    with pytest.raises(Interrupted):
        api.prune(dense, tmp_path / "out", resume=True, progress=stop, **how)
    assert caplog.text.count("its block is pruned again") == 2
    (weights,) = (work / "weights").iterdir()
    DAMAGE[kind](weights)
    api.prune(dense, tmp_path / "out", resume=True, **how)
    assert caplog.text.count("all blocks are pruned again") == 1
    api.prune(dense, tmp_path / "whole", **how)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_cached_teacher_is_computed_again(kind, restored, scenes, tmp_path, caplog):
    how = {"data": scenes, "steps": 2, "batch_size": 4, "teacher_mode": "cached", "teacher_cache": tmp_path / "cache"}
    pruned = restored.parent / "pruned"
    api.restore(pruned, tmp_path / "whole", **how)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = file.read_bytes()
    DAMAGE[kind](file)
    api.restore(pruned, tmp_path / "out", **how)
    assert "is damaged; it is computed again" in caplog.text
    assert file.read_bytes() == content
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["cut", "another kind", "binary"])
def test_the_index_of_a_model_in_parts(kind, zoo_folder, tmp_path, run):
    model, processor = load(zoo_folder("llava"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="20kB")
    processor.save_pretrained(tmp_path / "parts")
    DAMAGE[kind](tmp_path / "parts" / "model.safetensors.index.json")
    assert "parts/model.safetensors.index.json: n" in one_line(run, "inspect", "parts")  # no JSON, or needs a map
