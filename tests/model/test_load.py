"""Loading: what comes back, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsight import SparsightError, load
from sparsight.model.load import DTYPES

import zoo


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_family_loads_as_it_was_saved(name, zoo_folder):
    model, processor = load(zoo_folder(name))
    expected, _ = zoo.build(name)
    assert type(model) is type(expected)
    assert not model.training
    assert hasattr(processor, "tokenizer")
    for (key, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), key


def test_dtype_is_explicit(zoo_folder):
    assert load(zoo_folder("llava"))[0].dtype == torch.float32
    assert load(zoo_folder("llava"), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load(zoo_folder("llava"), dtype=torch.float16)[0].dtype == torch.float16
    with pytest.raises(SparsightError, match="'fp16' is not one of " + ", ".join(DTYPES)):
        load(zoo_folder("llava"), dtype="fp16")


def copied(zoo_folder, tmp_path):
    return shutil.copytree(zoo_folder("llava"), tmp_path / "copy")


def test_folders_that_are_no_model(zoo_folder, tmp_path):
    for given, says in [
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, r"no config\.json"),
        ("nowhere", "no such folder"),
    ]:
        with pytest.raises(SparsightError, match=says):
            load(given)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SparsightError, match="is a file"):
        load(tmp_path / "file")


def test_only_safetensors(zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SparsightError, match=r"no \.safetensors file"):
        load(folder)


def test_a_missing_weight_is_named(zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    gone = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparsightError, match=r"weights missing .*layers\.0\.mlp\.up_proj\.weight"):
        load(folder)


def test_a_cut_off_file_is_one_line(zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SparsightError, match="could not be loaded"):
        load(folder)


def test_an_unknown_architecture_is_one_line(zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsightError, match=r"copy: ") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_remote_code_is_never_run(zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(SparsightError, match=r"copy: "):
        load(folder)


def test_a_processor_without_torchvision_says_what_to_install(zoo_folder):
    """In a process of its own: the tests have torchvision, a user may not."""
    code = (
        "import sys; from sparsight import load, SparsightError\n"
        "try:\n    load(sys.argv[1])\nexcept SparsightError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(zoo_folder("qwen2.5-vl"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("pip install torchvision")
    assert done.stdout.count("\n") == 1


def test_families_with_pil_processors_need_no_torchvision(zoo_folder):
    code = "import sys; from sparsight import load; load(sys.argv[1]); print('torchvision' in sys.modules)"
    for name in ("llava", "instructblip-t5", "gemma3", "paligemma"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(zoo_folder(name))], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False"
