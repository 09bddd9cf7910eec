"""Folders that hold something else than a model's own weights: one line that names it and says what to do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import sparsight
from sparsight import SparsightError, api, load
from sparsight.errors import Notice

import zoo


@pytest.fixture
def folder(zoo_folder, tmp_path):
    return Path(shutil.copytree(zoo_folder("llava"), tmp_path / "copy"))


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


QUANTIZED = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "torchao": {"quant_type": "int4_weight_only", "quant_method": "torchao"},
    "something new": {"bits": 3, "quant_method": "something new"},
}


@pytest.mark.parametrize("method", QUANTIZED)
@pytest.mark.parametrize("part", ["whole", "text_config", "a part of a part"])
def test_a_quantized_checkpoint_is_refused_by_name_before_it_is_loaded(method, part, folder, scenes, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    here = {"quantization_config": QUANTIZED[method]}
    if part != "whole":
        inner = here if part == "text_config" else {"decoder": here}
        here = {"text_config": {**config["text_config"], **inner}}
    configure(folder, **here)
    for call in (
        lambda: load(folder),
        lambda: api.prune(folder, tmp_path / "out", data=scenes),
        lambda: api.evaluate(folder, data=scenes),
        lambda: api.estimate(folder),
    ):
        with pytest.raises(
            SparsightError, match=rf"is quantized \({method}\).* prune the original.*quantize the sparse model"
        ):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_file_that_says_so_is_enough(name, folder):
    (folder / name).write_text("{}")
    with pytest.raises(SparsightError, match=rf"is quantized \({name}\)"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qweight", torch.zeros(4, 4, dtype=torch.int32)),
        ("weight_scale_inv", torch.ones(1, 1)),
        ("weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
        ("weight.absmax", torch.ones(4)),
        ("extra", torch.ones(4, 4).to(torch.float8_e4m3fn)),
    ],
)
def test_tensors_of_a_quantized_model_without_a_word_in_the_configuration(key, value, folder):
    change_tensors(folder, lambda tensors: tensors.update({f"model.language_model.layers.0.mlp.up_proj.{key}": value}))
    with pytest.raises(SparsightError, match=r"is quantized \(model\.safetensors holds \S+up_proj\."):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_are_no_weights(dtype, folder):
    def change(tensors):
        name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
        tensors[name] = (9 * tensors[name]).to(dtype)

    change_tensors(folder, change)
    with pytest.raises(SparsightError, match=r"is quantized \(model\.safetensors holds \S+up_proj\.weight as "):
        load(folder)


@pytest.mark.parametrize("settings", ["awq", [1], False, 4])
def test_settings_of_a_quantization_that_are_no_object(settings, folder):
    configure(folder, quantization_config=settings)
    with pytest.raises(SparsightError, match=r"says quantization_config=.* is no object; take it out"):
        load(folder)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float64])
def test_another_dtype_than_the_stored_one_is_said(stored, folder):
    change_tensors(folder, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    said = str(stored).removeprefix("torch.")
    with pytest.warns(Notice, match=rf"the files hold {said}, and the model is loaded in float32, as config\.json says"):
        load(folder)
    with warnings.catch_warnings(record=True) as caught:
        load(folder, dtype="float32")  # the user's own
    assert not caught


def shard(folder):
    """Split the weights over two files with an index; return their names and the content of the index."""
    tensors = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return names, index


def test_shards_are_read(folder):
    before = load(folder)[0].state_dict()
    shard(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(folder)[0].state_dict().items())


INDEXES = {
    "no object": ([1], r"it holds \[1\] and no object"),
    "nothing": ({}, "needs 'metadata' and a 'weight_map'"),
    "no files": ({"metadata": {}, "weight_map": {}}, "'weight_map' with the file"),
    "another file": (
        {"metadata": {}, "weight_map": {"x": "model-00009-of-00009.safetensors"}},
        "00009.safetensors, named in .* is missing",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_names_no_shards(case, folder):
    shard(folder)
    content, reason = INDEXES[case]
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(SparsightError, match=reason):
        load(folder)


def test_shards_that_are_missing_or_say_two_things(folder):
    whole = (folder / "model.safetensors").read_bytes()
    names, index = shard(folder)
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(SparsightError, match=r"holds model\.safetensors and model\S+index\.json, and only the first"):
        load(folder)
    (folder / "model.safetensors").unlink()
    second = load_file(folder / names[1])
    twice = next(name for name, file in index["weight_map"].items() if file == names[0])
    save_file({**second, twice: torch.ones(2)}, folder / names[1], metadata={"format": "pt"})
    with pytest.raises(SparsightError, match=rf"{twice} stands in {names[0]} and in {names[1]}"):
        load(folder)
    (folder / names[1]).unlink()
    with pytest.raises(SparsightError, match=rf"{names[1]}, named in \S+, is missing; copy it"):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(SparsightError, match=rf"holds {names[0]}, and neither model\.safetensors nor"):
        load(folder)


def test_a_link_to_nothing_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")
    with pytest.raises(SparsightError, match=r"copy/model\.safetensors: cannot be opened"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_generation_settings_that_cannot_be_read(text, folder):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(SparsightError, match=r"generation_config\.json: .*(not JSON|no object)"):
        load(folder)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name(name):
    with pytest.raises(SparsightError, match="the name of the model is empty"):
        load(name)


def test_a_quantized_model_in_memory_is_refused():
    model, _ = zoo.build("llava")
    model.config.quantization_config = QUANTIZED["fp8"]
    with pytest.raises(SparsightError, match="`model`: is quantized"):
        sparsight.prune(model, method="magnitude", sparsity=0.5)


def adapter(folder, target):
    model, _ = load(folder)
    with warnings.catch_warnings():  # PEFT uses names that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(target)


def test_an_adapter_is_no_model(folder, tmp_path):
    adapter(folder, tmp_path / "adapter")
    with pytest.raises(SparsightError, match=r"is an adapter of \S*copy.* and no model; merge it first") as error:
        load(tmp_path / "adapter")
    assert "\n" not in str(error.value)


def test_an_adapter_beside_the_model_is_refused(folder, scenes, tmp_path):
    adapter(folder, tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        if path.name.startswith("adapter"):
            shutil.copy(path, folder)
    with pytest.raises(SparsightError, match="holds an adapter beside the model"):
        api.prune(folder, tmp_path / "out", data=scenes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["mtp.fc.weight", "model.vision_tower.probe", "score.weight", "model.language_model.extra.weight"]
)
def test_tensors_that_the_model_does_not_name_are_said(name, folder):
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    with pytest.warns(Notice, match=rf"tensors that the model does not use.*: {name}$"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.7.mlp.up_proj.weight", "model.vision_tower.encoder.layers.2.layer_norm1.weight"]
)
def test_weights_of_blocks_that_the_configuration_does_not_name_are_an_error(name, folder):
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4, 4)}))
    with pytest.raises(SparsightError, match=rf"weights of blocks that config\.json does not name: {name}; give the config"):
        load(folder)


def test_a_configuration_with_too_few_layers_is_an_error(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    configure(folder, text_config={**text, "num_hidden_layers": 2})
    with pytest.raises(SparsightError, match=r"weights of blocks .*: model\.language_model\.layers\.2\.\S+ and 8 more"):
        load(folder)


def test_buffers_of_older_versions_are_no_weights(folder):
    name = "model.language_model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_file_that_is_cut_short(size, folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(SparsightError, match=r"model\.safetensors: is cut short or damaged; copy it again"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_lfs(name, folder):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(SparsightError, match=rf"{name}: is a pointer of Git LFS.*git lfs pull"):
        load(folder)


@pytest.mark.parametrize("kind", ["llava_llama", "mplug_owl9", "internvl_chat"])
@pytest.mark.parametrize("code", [{}, {"auto_map": {"AutoModel": "modeling.Model"}}])
def test_types_that_transformers_does_not_have(kind, code, folder):
    configure(folder, model_type=kind, **code)
    with pytest.raises(SparsightError, match=f"is of type '{kind}'.*converted for transformers") as error:
        load(folder)
    assert ("code of its own" in str(error.value)) == bool(code)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_plain_language_model(kind, folder):
    configure(folder, model_type=kind)
    with pytest.raises(SparsightError, match=rf"is a language model \({kind}\) and takes no images"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_an_error(value, folder, scenes):
    change_tensors(folder, lambda tensors: next(t for n, t in tensors.items() if "layers.0.mlp.up_proj" in n).fill_(value))
    with pytest.raises(SparsightError, match=r"perplexity: is nan; .*dtype=float32"):
        api.evaluate(folder, data=scenes, max_new_tokens=2)
