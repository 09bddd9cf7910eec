"""Loading: what comes back, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparsight import SparsightError, load
from sparsight.errors import Notice
from sparsight.model import load as module
from sparsight.model.load import DTYPES, check_device, load_model

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


DEVICES = {
    "tpu9": "'tpu9' is not a device that Sparsight runs on; use cpu, cuda, cuda:N or auto",
    "mps": "'mps' is not a device that Sparsight runs on",
    "meta": "'meta' is not a device that Sparsight runs on",
    "cuda:2": "'cuda:2' was asked for, but torch sees cuda:0 to cuda:1 only",
    "cuda:99": "'cuda:99' was asked for",
}


@pytest.mark.parametrize("device", DEVICES)
def test_devices_that_are_not_there(device, zoo_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for call in (load, load_model):
        with pytest.raises(SparsightError, match=DEVICES[device]):
            call(zoo_folder("llava"), device=device)
    for good in ("cpu", "cuda", "cuda:0", "cuda:1"):
        check_device(good)
    with pytest.raises(SparsightError, match="CUDA_VISIBLE_DEVICES=1"):
        check_device("cuda:1", one_gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SparsightError, match="sees no CUDA device; use `device=cpu`"):
        check_device("cuda")


def test_a_model_that_a_device_has_no_room_for_is_one_line(zoo_folder, monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(SparsightError, match=r"does not fit into memory \(CUDA out of memory\.\); use `dtype=bfloat16`"):
        load_model(zoo_folder("llava"))


def copied(zoo_folder, tmp_path):
    return shutil.copytree(zoo_folder("llava"), tmp_path / "copy")


def test_folders_that_are_no_model(zoo_folder, tmp_path):
    for given, says in [
        (tmp_path / "nowhere", "no such folder"),
        ("x" * 300, r"cannot be opened \(File name too long\)"),
        (tmp_path / ("x" * 300), r"cannot be opened \(File name too long\)"),
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


def test_a_weight_of_another_shape_is_named(zoo_folder, tmp_path, capfd):
    folder = copied(zoo_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith("layers.0.mlp.up_proj.weight"))
    tensors[key] = tensors[key][:, :10].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparsightError, match=r"shape .*up_proj\.weight is \[96, 10\] and should be \[96, 48\]; give"):
        load(folder)
    assert capfd.readouterr().err == ""


WRONG = {
    "a dtype that is none": ("config.json", {"dtype": "float12"}, "'float12'"),
    "a field of another type": ("config.json", {"image_token_index": "x"}, "'image_token_index' expected int"),
    "a part of another type": ("config.json", {"text_config": [1]}, "Field 'text_config'"),
    "sizes that do not fit": (
        "config.json",
        {"text_config": {"model_type": "llama", "hidden_size": 50, "num_attention_heads": 4}},
        "not a multiple of the number of attention heads",
    ),
    "a type that is a list": ("config.json", {"model_type": []}, "no model configuration could be read"),
    "a list": ("config.json", None, "no model configuration could be read"),
    "a processor that is a list": ("processor_config.json", None, "no processor could be loaded"),
    "a tokenizer that is a list": ("tokenizer.json", None, "no processor could be loaded"),
    "a tokenizer's settings that are a list": ("tokenizer_config.json", None, "no processor could be loaded"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_hold_the_wrong_thing_are_one_line(case, zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    name, change, says = WRONG[case]
    held = [1] if change is None else json.loads((folder / name).read_text(encoding="utf-8")) | change
    (folder / name).write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(SparsightError) as caught:
        load(folder)
    assert str(caught.value).startswith(str(folder))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_needs_no_processor_where_none_is_asked_for(zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    model = load_model(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    with pytest.raises(SparsightError, match="copy: no processor could be loaded"):
        load(folder)


def test_a_missing_processor_is_known_before_the_weights_are_read(zoo_folder, tmp_path, monkeypatch):
    folder = copied(zoo_folder, tmp_path)
    (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(SparsightError, match="no processor could be loaded"):
        load(folder)


def test_a_folder_named_after_a_video_does_not_need_torchvision(zoo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_torchvision_available", lambda: False)
    folder = shutil.copytree(zoo_folder("llava"), tmp_path / "video-llava")
    (folder / "processor_config.json").unlink()
    with pytest.raises(SparsightError, match="no processor could be loaded"):
        load(folder)


def test_a_cut_off_file_is_one_line(zoo_folder, tmp_path):
    folder = copied(zoo_folder, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SparsightError, match="is cut short or damaged"):
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
    code = "import sys; from sparsight import load; [load(f) for f in sys.argv[1:]]; print('torchvision' in sys.modules)"
    folders = [str(zoo_folder(name)) for name in ("llava", "instructblip-t5", "gemma3", "paligemma")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_large_model_in_bfloat16_is_said_to_be_slow_on_a_cpu_without_avx512(zoo_folder):
    with torch.device("meta"):
        large = LlamaForCausalLM(LlamaConfig(hidden_size=512, num_hidden_layers=2)).to(torch.bfloat16)
    assert large.num_parameters() > module.LARGE
    assert "use `dtype=float32`" in (module.slow_dtype(large, "AVX2") or "")
    assert module.slow_dtype(large, "AVX512") is None
    assert module.slow_dtype(large.to(torch.float32), "AVX2") is None
    assert module.slow_dtype(load_model(zoo_folder("llava"), dtype="bfloat16"), "AVX2") is None


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="this CPU is not one of the slow ones")
def test_the_line_comes_with_the_stored_dtype_only(zoo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGE", 1)
    load_model(zoo_folder("llava"), dtype="bfloat16").save_pretrained(tmp_path)
    with pytest.warns(Notice, match="bfloat16 is many times slower than float32 on this CPU"):
        load_model(tmp_path)
    load_model(tmp_path, dtype="bfloat16")  # asked for: warnings are errors here
