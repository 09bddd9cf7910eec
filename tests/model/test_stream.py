"""A model in memory block by block: the skeleton, its parts, and the bits of both."""

from __future__ import annotations

import json
import mmap
import struct
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsight
from sparsight import SparsightError
from sparsight.data import Encoder, Sample, Turn
from sparsight.model import skeleton
from sparsight.model.anatomy import anatomy
from sparsight.model.load import load, load_model
from sparsight.model.skeleton import Unfit, load_skeleton
from sparsight.model.stream import OUTSIDE, Stream

import tiny
import zoo

FEW = ("instructblip-t5", "llava", "qwen3-vl-moe", "gemma3")
REST = tuple(name for name in (*zoo.NAMES, *zoo.MORE) if name not in FEW)
EVERY = [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]


def quiet(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("name", EVERY)
def test_a_skeleton_is_the_loaded_model_without_weights(name, dtype, zoo_folder):
    bare, _ = quiet(load_skeleton, zoo_folder(name), dtype=dtype)
    whole = quiet(load_model, zoo_folder(name), dtype=dtype)
    assert all(p.is_meta for p in bare.parameters())
    assert [(n, p.shape, p.dtype) for n, p in bare.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]
    held = {*whole.state_dict()}
    buffers = dict(bare.named_buffers())
    for key, buffer in whole.named_buffers():
        if key not in held:
            assert torch.equal(buffers[key], buffer)
            assert buffers[key].dtype == buffer.dtype
    assert bare.config.to_dict() == whole.config.to_dict()
    assert bare.generation_config.to_dict() == whole.generation_config.to_dict()
    one, other = anatomy(bare), anatomy(whole)
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    assert (one.skipped, one.parameters, one.marks) == (other.skipped, other.parameters, other.marks)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("name", EVERY)
def test_a_stream_computes_what_the_whole_model_does_and_holds_one_block(name, dtype, zoo_folder):
    whole, processor = quiet(load, zoo_folder(name), dtype=dtype)
    samples = [Sample(str(i), (image,), (Turn("what color?", ("red",)),)) for i, image in enumerate(zoo.images(2))]
    inputs = Encoder(processor, whole).encode(samples).inputs
    stream = quiet(Stream, zoo_folder(name), dtype=dtype)
    stream.bring_outside()
    seen = []

    def look(module, *_):
        inside = {block.name for block in stream.anatomy.blocks for p in block.module.parameters() if not p.is_meta}
        seen.append(len(inside))

    hooks = [block.module.register_forward_hook(look) for block in stream.anatomy.blocks]
    with torch.no_grad(), stream.run() as model:
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    for hook in hooks:
        hook.remove()
    assert seen
    assert set(seen) <= {1}
    assert all(p.is_meta for block in stream.anatomy.blocks for p in block.module.parameters())
    for mine, theirs in zip(stream.anatomy.layers, anatomy(whole).layers, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize("name", ["llava", "qwen3-vl-moe"])
@pytest.mark.parametrize("squeeze", [False, True])
def test_a_packed_folder_is_streamed(name, squeeze, zoo_folder, tmp_path):
    sparsight.prune(zoo_folder(name), tmp_path / "sparse", method="magnitude", sparsity=0.6)
    sparsight.pack(tmp_path / "sparse", tmp_path / "packed", squeeze=squeeze)
    stream = Stream(tmp_path / "packed")
    stream.bring_outside()
    for mine, theirs in zip(stream.anatomy.layers, anatomy(load_model(tmp_path / "sparse")).layers, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.parametrize(("form", "times"), [("dense", 0), ("packed", 1), ("other dtype", 1)])
def test_memory_is_given_back_after_blocks_that_are_not_mapped(form, times, zoo_folder, tmp_path, monkeypatch):
    folder = zoo_folder("llava")
    if form == "packed":
        layers = sparsight.prune(folder, tmp_path / "sparse", method="magnitude", sparsity=0.6).sparsity["layers"]
        sparsight.pack(tmp_path / "sparse", tmp_path / "packed")
        folder = tmp_path / "packed"
    given = []
    monkeypatch.setattr("sparsight.model.stream.give_back_memory", lambda: given.append(1))
    stream = Stream(folder, dtype="bfloat16" if form == "other dtype" else "auto")
    stream.bring_outside()
    blocks = {layer["block"] for layer in layers.values()} if form == "packed" else {b.name for b in stream.anatomy.blocks}
    for block in blocks:
        stream.bring(block)
        before = len(given)
        stream.drop()
        assert len(given) == before + times


def test_a_change_to_a_streamed_block_stays_in_memory(zoo_folder, tmp_path):
    stream = Stream(zoo_folder("llava"))
    first, last = stream.anatomy.layers[0], stream.anatomy.layers[-1]
    before = first.weight.clone()
    first.weight.zero_()
    assert not first.weight.any()
    assert last.weight.any()  # brings another block
    assert torch.equal(first.weight, before)


@pytest.mark.parametrize("name", ["llava", "instructblip-t5", "qwen3-vl-moe"])
def test_blocks_that_are_stored_as_they_are_need_no_conversion(name, zoo_folder, monkeypatch):
    """The parts are converted once, without data, and the tensors outside the blocks a second time."""
    whole = anatomy(quiet(load_model, zoo_folder(name)))
    stream, converted = quiet(Stream, zoo_folder(name)), []
    convert = stream._convert
    monkeypatch.setattr(
        stream, "_convert", lambda tensors, device: converted.append(device.type) or convert(tensors, device)
    )
    stream.bring_outside()
    assert converted == ["meta"] * len(stream.parts) + ["cpu"]
    for mine, theirs in zip(stream.anatomy.layers, whole.layers, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert mine.parameter.requires_grad == theirs.parameter.requires_grad
        assert type(mine.parameter) is type(theirs.parameter)
    assert len(converted) == len(stream.parts) + 1


def test_blocks_of_another_dtype_are_converted(zoo_folder):
    stream = Stream(zoo_folder("llava"), dtype="float16")
    stream.bring_outside()
    layer = stream.anatomy.layers[0]
    assert layer.weight.dtype == torch.float16
    stream = Stream(zoo_folder("llava"))
    stream.bring_outside()
    layer = stream.anatomy.layers[0]
    before = layer.weight.clone()
    kept = stream.state(layer.block, stream.names(layer.block))
    for source in (
        {key: tensor + 1 for key, tensor in kept.items()},
        {key: (tensor + 1).double() for key, tensor in kept.items()},  # as a file that has changed
    ):
        stream.drop()
        stream.sources[layer.block] = lambda source=source: dict(source)
        assert layer.weight.dtype == before.dtype
        assert torch.equal(layer.weight, before + 1)


def test_merged_experts_have_the_bits_of_the_whole_model(tmp_path):
    """A checkpoint that stores experts one by one is merged into tensors that no file holds."""
    model = tiny.build("glm4v_moe")
    model.save_pretrained(tmp_path)
    stream = quiet(Stream, tmp_path)
    stream.bring_outside()
    own = anatomy(model)
    assert any(layer.expert is not None for layer in own.layers)
    for _ in range(2):
        for layer in stream.anatomy.layers:
            assert torch.equal(layer.weight, own[layer.name].weight)


def test_buffers_of_a_block_stay_buffers(zoo_folder):
    """Gemma 4 stores a number per block that is no parameter."""
    whole = quiet(load_model, zoo_folder("gemma4"))
    stream = quiet(Stream, zoo_folder("gemma4"))
    stream.bring_outside()
    found = 0
    for block in stream.anatomy.blocks:
        stream.bring(block.name)
        theirs = whole.get_submodule(block.name)
        found += sum(name in theirs.state_dict() for name, _ in theirs.named_buffers())
        assert [*dict(block.module.named_buffers())] == [*dict(theirs.named_buffers())]
        for name, value in theirs.state_dict().items():
            assert torch.equal(block.module.state_dict()[name], value)
    assert found


def test_shapes_bring_nothing(zoo_folder):
    stream = Stream(zoo_folder("llava"))
    assert all(layer.shape[0] > 0 for layer in stream.anatomy.layers)
    assert stream.here is None
    stream.bring(OUTSIDE)
    assert stream.here is None


def test_weights_that_the_files_hold_twice_are_tied_if_they_are_equal(zoo_folder, tmp_path):
    """As `from_pretrained` does, which compares them."""
    name = "gemma3"
    for equal in (True, False):
        model, processor = quiet(load, zoo_folder(name))
        where = tmp_path / str(equal)
        model.save_pretrained(where)
        processor.save_pretrained(where)
        stored = load_file(where / "model.safetensors")
        (embedding,) = [key for key in stored if key.endswith("embed_tokens.weight")]
        head = embedding.replace("model.embed_tokens", "lm_head")
        assert head != embedding
        stored[head] = stored[embedding].clone() + (0 if equal else 1)
        save_file(stored, where / "model.safetensors", {"format": "pt"})
        whole, stream = quiet(load_model, where), quiet(Stream, where)
        stream.bring_outside()
        for one in (whole, stream.model):
            tied = one.get_output_embeddings().weight is one.get_input_embeddings().weight
            assert tied is equal
        assert torch.equal(stream.model.get_output_embeddings().weight, whole.get_output_embeddings().weight)
        assert stream.anatomy.parameters == anatomy(whole).parameters


@pytest.mark.parametrize("fault", ["missing", "shape", "extra"])
def test_a_damaged_checkpoint_is_refused_as_by_load(fault, zoo_folder, tmp_path):
    model, processor = load(zoo_folder("llava"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = next(key for key in stored if "q_proj.weight" in key)
    if fault == "missing":
        del stored[name]
    elif fault == "shape":
        stored[name] = stored[name][:1].clone()
    else:
        stored[name.replace("layers.0", "layers.9")] = stored[name].clone()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    said = []
    for make in (load_model, Stream):
        with pytest.raises(SparsightError) as error:
            make(tmp_path)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_transformers_without_the_functions_is_said(zoo_folder, monkeypatch):
    monkeypatch.setattr(skeleton, "LACKS", "cannot import name 'rename_source_key'")
    with pytest.raises(Unfit, match="rename_source_key"):
        Stream(zoo_folder("llava"))


def test_a_hub_name_is_streamed_from_the_cache(zoo_folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(zoo_folder("llava"), target_is_directory=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    stream = Stream("owner/name")
    stream.bring_outside()
    assert torch.equal(stream.anatomy.layers[-1].weight, anatomy(load_model(zoo_folder("llava"))).layers[-1].weight)


def hollow(folder):
    """Put holes in the place of a checkpoint's data; its headers stay."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    with path.open("wb") as file:
        file.write(raw[: 8 + length])
        file.truncate(8 + length + end)
    return path


def test_a_skeleton_reads_no_weight(zoo_folder, tmp_path, monkeypatch):
    model, _ = load(zoo_folder("llava"))
    model.save_pretrained(tmp_path)
    path = hollow(tmp_path)
    before = path.stat().st_blocks

    def refuse(*_, **__):
        raise AssertionError("a weight was mapped")

    monkeypatch.setattr(mmap, "mmap", refuse)
    load_skeleton(tmp_path)
    assert path.stat().st_blocks == before
