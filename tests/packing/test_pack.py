"""`pack` and `unpack` as a user runs them, and packed folders through transformers and every verb."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM

import sparsight
from sparsight import SparseLinear, SparsightError
from sparsight.checkpoint import pack as packing
from sparsight.errors import Interrupted, Notice
from sparsight.model.load import load_model
from sparsight.packing.shards import Shards

import zoo

BITWISE = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def sparse(zoo_folder, tmp_path_factory):
    """Give `sparse(name)`: the folder of a pruned model, made once; read only."""
    made = {}

    def get(name, dtype="bfloat16", **how):
        key = (name, dtype, str(how))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("sparse") / name
            sparsight.prune(zoo_folder(name), made[key], method="magnitude", sparsity=0.6, dtype=dtype, **how)
        return made[key]

    return get


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(model, other):
    """Every tensor has the same bits."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(raw(tensor), raw(expected[name])), name


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def loaded(folder, **how):
    model, info = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True, **how)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], info[kind]
    return model


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_family(name, sparse, tmp_path):
    dense = load_model(sparse(name))
    for how in ({}, {"squeeze": True}):
        facts = sparsight.pack(sparse(name), tmp_path / "packed", **how, overwrite=True)
        assert facts["bytes"]["packed"] < facts["bytes"]["dense"]
        sparsight.unpack(tmp_path / "packed", tmp_path / "unpacked", overwrite=True)
        assert files(tmp_path / "unpacked") == files(sparse(name))
        model = loaded(tmp_path / "packed")
        assert_same(model, dense)
        assert not hasattr(model.config, "quantization_config")
        model.save_pretrained(tmp_path / "saved")
        assert_same(loaded(tmp_path / "saved"), dense)
        report = sparsight.verify(tmp_path / "packed")
        assert report["differences"] == {}
        assert report["zeros"] == sparsight.verify(sparse(name))["zeros"]
    kept = load_model(tmp_path / "packed", packed="all")
    layers = packed_layers(kept)
    linear = [module for module in dense.modules() if type(module) is torch.nn.Linear and (module.weight == 0).any()]
    assert len(layers) == len(linear)
    for layer, original in zip(layers, linear, strict=True):
        assert torch.equal(layer.dense(), original.weight)
    kept.save_pretrained(tmp_path / "packed again")
    assert_same(loaded(tmp_path / "packed again"), dense)


@pytest.mark.parametrize("dtype", BITWISE)
def test_every_dtype_answers_the_same(dtype, sparse, zoo_folder, tmp_path):
    folder = sparse("llava", dtype)
    sparsight.pack(folder, tmp_path / "packed")
    dense, expanded = load_model(folder), load_model(tmp_path / "packed")
    kept, processor = sparsight.load(tmp_path / "packed", packed="all")
    inputs = zoo.inputs("llava", processor) if hasattr(zoo, "inputs") else None
    inputs = inputs or processor(text=["<image> a red ball"], images=[zoo.images(1)[0]], return_tensors="pt")
    with torch.no_grad():
        logits = [model(**inputs).logits.float() for model in (dense, expanded, kept)]
    assert torch.equal(logits[0], logits[1])
    rough = 1e-4 if dtype == "float32" else 2e-2
    torch.testing.assert_close(logits[2], logits[0], rtol=rough, atol=rough * float(logits[0].abs().max()))
    assert kept.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("name", ["llava", "qwen3-vl-moe"])
@pytest.mark.parametrize("packed", [False, True])
def test_shards_dtypes_and_places(name, packed, sparse, tmp_path):
    model, processor = sparsight.load(sparse(name))
    model.save_pretrained(tmp_path / "parts", max_shard_size="60kB")
    processor.save_pretrained(tmp_path / "parts")
    shutil.copy(sparse(name) / "sparsity.json", tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) >= 3
    sparsight.pack(tmp_path / "parts", tmp_path / "packed", squeeze=True)
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert {path.name for path in (tmp_path / "packed").iterdir()} == names | {"packed.json"}
    sparsight.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert files(tmp_path / "unpacked") == files(tmp_path / "parts")
    for dtype in (torch.float32, torch.float16):
        config = AutoConfig.from_pretrained(tmp_path / "packed")
        config.quantization_config["packed"] = packed and "all"
        model = loaded(tmp_path / "packed", config=config, dtype=dtype, device_map="cpu")
        other = loaded(tmp_path / "parts", dtype=dtype)
        assert model.dtype == dtype
        if not packed:
            assert_same(model, other)
        for path, module in model.named_modules():
            if isinstance(module, SparseLinear):
                assert torch.equal(module.dense(), other.get_submodule(path).weight)
    if not packed:
        inner = dict.fromkeys((f"model.{part}" for part, _ in other.model.named_children()), "cpu")
        places = {"lm_head": "cpu", **inner, "model.language_model": "disk"}
        model = loaded(tmp_path / "packed", device_map=places, offload_folder=tmp_path / "offload")
        other = loaded(tmp_path / "parts", device_map=places, offload_folder=tmp_path / "offload 2")
        x = {"input_ids": torch.tensor([[5, 6, 7]])}
        with torch.no_grad():
            assert torch.equal(model(**x).logits, other(**x).logits)


def test_an_expanded_model_is_an_ordinary_one(sparse, scenes, tmp_path):
    sparsight.pack(sparse("llava"), tmp_path / "packed")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    assert model.get_parameter("lm_head.weight").grad is not None
    assert sparsight.inspect(tmp_path / "packed").layers[0].sparse
    sparsight.restore(tmp_path / "packed", tmp_path / "restored", data=scenes, steps=1, batch_size=2, dtype="float32")
    assert sparsight.verify(tmp_path / "restored", tmp_path / "packed")["differences"] == {}
    sparsight.prune(tmp_path / "packed", tmp_path / "again", method="magnitude", sparsity=0.8)
    assert sparsight.verify(tmp_path / "again", tmp_path / "packed")["differences"] == {}


def test_without_the_import_it_is_an_error(sparse, tmp_path):
    sparsight.pack(sparse("llava"), tmp_path / "packed")
    code = "from transformers import AutoModelForImageTextToText as A; import sys; {}A.from_pretrained(sys.argv[1])"
    for line, succeeds in (("", False), ("import sparsight; ", True), ("import sparsight.specs; ", True)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(line), str(tmp_path / "packed")], capture_output=True, text=True
        )  # fmt: skip
        assert (done.returncode == 0) == succeeds, done.stderr
        assert succeeds or "size mismatch" in done.stderr or "mismatched" in done.stderr


def test_a_kept_minus_zero_and_tied_and_plain_tensors_come_back(sparse, tmp_path):
    folder = shutil.copytree(sparse("llava"), tmp_path / "sparse")
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    name = next(name for name in state if name.endswith("q_proj.weight"))
    state[name].view(-1)[:7] = -0.0
    save_file(state, path, metadata={"format": "pt"})
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    with pytest.warns(Notice, match=r"7 weights are -0\.0"):
        sparsight.pack(folder, tmp_path / "packed")
    sparsight.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / ".gitattributes").is_file()
    back = load_file(tmp_path / "unpacked" / path.name)
    assert bool(torch.signbit(back[name].view(-1)[:7]).all())
    assert all(torch.equal(back[key].view(torch.int16), tensor.view(torch.int16)) for key, tensor in state.items())


def test_it_packs_what_is_packed(sparse, tmp_path):
    sparsight.pack(sparse("llava"), tmp_path / "packed")
    sparsight.pack(tmp_path / "packed", tmp_path / "squeezed", squeeze=True)
    sparsight.pack(sparse("llava"), tmp_path / "at once", squeeze=True)
    assert files(tmp_path / "squeezed") == files(tmp_path / "at once")


def test_int8(sparse, scenes, tmp_path, run):
    code, out, _ = run("pack", sparse("llava"), "packed", "--values", "int8")
    assert code == 0
    assert "relative output error" in out
    assert "times smaller" in out
    facts = json.loads((tmp_path / "packed" / "packed.json").read_text())
    errors = [entry["error"] for entry in facts["tensors"].values()]
    assert 0 < min(errors) <= max(errors) < 0.02
    assert sparsight.verify(tmp_path / "packed")["differences"] == {}
    original, rounded = load_model(sparse("llava")), load_model(tmp_path / "packed")
    assert rounded.dtype == torch.bfloat16
    for (name, W), V in zip(original.state_dict().items(), rounded.state_dict().values(), strict=True):
        assert bool((V[W == 0] == 0).all()), name
        assert float((V - W).float().norm()) <= 0.01 * float(W.float().norm()) + 1e-9, name
    record = json.loads((tmp_path / "packed" / "sparsity.json").read_text())
    assert record["mask_only"] is False  # the kept weights are not the dense model's
    kept = load_model(tmp_path / "packed", packed="all")
    assert {layer.weight.dtype for layer in packed_layers(kept)} == {torch.int8}
    result = sparsight.evaluate(kept, scenes, processor=sparsight.load(tmp_path / "packed")[1])
    assert len(result.predictions) == len(sparsight.evaluate(sparse("llava"), scenes).predictions)
    assert "holds int8 values, from which the original does not come back" in refused(run, "pack", "packed", "twice")
    sparsight.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert_same(load_model(tmp_path / "unpacked"), rounded)
    assert sparsight.verify(tmp_path / "unpacked")["differences"] == {}


def test_int8_of_experts_that_the_model_merges(sparse, tmp_path):
    sparsight.pack(sparse("qwen3-vl-moe"), tmp_path / "packed", values="int8")
    assert sparsight.verify(tmp_path / "packed")["differences"] == {}


def test_a_packed_model_in_memory_is_for_inference(sparse, scenes, tmp_path):
    sparsight.pack(sparse("llava"), tmp_path / "packed")
    model, processor = sparsight.load(tmp_path / "packed", packed="all")
    for verb in (sparsight.prune, sparsight.restore):
        with pytest.raises(SparsightError, match="its layers are packed"):
            verb(model, scenes, processor=processor)
    with pytest.raises(SparsightError, match="is not packed; pack it first"):
        sparsight.load(sparse("llava"), packed=True)
    with pytest.raises(SparsightError, match="'some' is not one of True, False, 'all'"):
        sparsight.load(tmp_path / "packed", packed="some")
    with pytest.warns(Notice, match="every packed layer is so small that it is faster dense; all are expanded"):
        assert packed_layers(sparsight.load(tmp_path / "packed", packed=True)[0]) == []


def test_what_is_written_beside_the_weights(sparse, tmp_path, run):
    folder = sparse("llava")
    code, out, _ = run("pack", folder, "packed", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["tensors"] == json.loads((tmp_path / "packed" / "packed.json").read_text())["tensors"]
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "import sparsight  # reads packed weights" in card
    for name in ("sparsity.json", "recipe.yaml", "metrics.json", "tokenizer.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (folder / name).read_bytes()
    layout = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert layout["quant_method"] == "sparsight"
    assert "sparsity_config" not in layout
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as stored:
        for name, (shape, kept) in layout["layers"].items():
            bits, values = stored.get_slice(f"{name}_bits"), stored.get_slice(name)
            assert bits.get_shape() == [*shape[:-1], -(-shape[-1] // 8)]
            assert values.get_shape() != shape
            assert torch.tensor(values.get_shape()).prod() == kept
    assert run("verify", "packed")[0] == 0
    assert run("inspect", "packed")[0] == 0
    assert oct((tmp_path / "packed" / "model.safetensors").stat().st_mode)[-3:] != "600"
    code, out, _ = run("unpack", "packed", "unpacked")
    assert code == 0
    assert "Unpacked" in out


# what goes wrong


def refused(run, *words):
    quiet = ["--quiet"] if words[0] in ("pack", "unpack") else []
    code, out, error = run(*words, *quiet)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    return error


def test_bad_input(sparse, zoo_folder, tmp_path, run):
    dense = zoo_folder("llava")
    assert "holds no weight with zeros to leave out; prune it first" in refused(run, "pack", dense, "out")
    assert "is not packed; give a folder that `sparsight pack` wrote" in refused(run, "unpack", dense, "out")
    assert "no such folder" in refused(run, "pack", "nowhere", "out")
    assert "is not a folder on this machine" in refused(run, "pack", "owner/model", "out")
    assert "--values: unknown values 'int4'; did you mean int8? allowed: kept, int8" in refused(
        run, "pack", sparse("llava"), "out", "--values", "int4"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists and is not empty" in refused(run, "pack", sparse("llava"), "out")
    assert files(tmp_path) == {Path("out/mine.txt"): b"mine"}
    shutil.rmtree(tmp_path / "out")
    folder = shutil.copytree(sparse("llava"), tmp_path / "sparse")
    assert "holds what is read" in refused(run, "pack", folder, folder, "--overwrite")
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    name = next(name for name in state if name.endswith("q_proj.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    assert f"{name} holds a NaN or an infinite weight" in refused(run, "pack", folder, "out", "--values", "int8")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()


def change_layout(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("squeeze", [False, True])
def test_damaged_packed_folders(squeeze, sparse, tmp_path, run):
    sparsight.pack(sparse("llava"), tmp_path / "whole", squeeze=squeeze)
    layout = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    name = next(name for name in layout["layers"] if name.endswith("q_proj.weight"))

    def damaged(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        folder = shutil.copytree(tmp_path / "whole", tmp_path / "bad")
        change(folder)
        return folder

    def of_weights(change):
        def run_it(folder):
            path = folder / "model.safetensors"
            state = load_file(path)
            change(state)
            save_file(state, path, metadata={"format": "pt"})

        return run_it

    def flip(state):
        state[f"{name}_bits"].view(-1)[3] ^= 16

    def lose(state):
        del state[f"{name}_bits"]

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    cases = [
        (
            lambda folder: change_layout(folder, format=9),
            "is packed in format 9, and this version of Sparsight reads format 1",
        ),
        (lambda folder: change_layout(folder, layers=[1]), "the quantization_config of config.json is damaged"),
        (lambda folder: change_layout(folder, values="int3"), "the quantization_config of config.json is damaged"),
        (cut, "is cut short or damaged"),
        (of_weights(flip), "do not belong to"),
        (of_weights(lose), ""),
    ]
    for change, says in cases:
        damaged(change)
        for words in (("unpack", "bad", "out"), ("inspect", "bad", "--count"), ("verify", "bad")):
            line = refused(run, *words)
            assert says in line, (words, line)
            assert not (tmp_path / "out").exists()

    def lose_values(state):
        del state[name]

    def lose_all(state):
        del state[name], state[f"{name}_bits"]

    for change in (lose_values, lose_all):  # and do not write a folder without them
        damaged(of_weights(change))
        for words in (("unpack", "bad", "out"), ("inspect", "bad", "--count"), ("verify", "bad")):
            line = refused(run, *words)
            assert "missing" in line or "have no values" in line, (words, line)
    for content in ("{", "[]", '{"tensors": [1]}', '{"tensors": {"a": 1}}'):
        damaged(lambda folder, content=content: (folder / "packed.json").write_text(content))
        assert "packed.json: is damaged" in refused(run, "verify", "bad")
    for entry in ([["a", 8], 3], [[8, 8], "3"], [[], 3], [[8, 8]], 5):
        damaged(lambda folder, entry=entry: change_layout(folder, layers={**layout["layers"], name: entry}))
        assert "the quantization_config of config.json is damaged" in refused(run, "unpack", "bad", "out")
    if not squeeze:  # said to be squeezed only
        damaged(lambda folder: change_layout(folder, layers={**layout["layers"], name: [layout["layers"][name][0], None]}))
        assert "squeezed values are damaged" in refused(run, "unpack", "bad", "out")

    # a flipped value has the bits of another value: only the hash tells
    def value(folder):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        with safe_open(path, "pt") as stored:
            assert stored is not None
        header = json.loads(content[8:start])
        begin, end = header[name]["data_offsets"]
        content[start + end - 5] ^= 3
        path.write_bytes(bytes(content))
        assert begin < end

    damaged(value)
    code, out, error = run("verify", "bad")
    assert code == 1 or (squeeze and code == 2), (out, error)


def test_a_full_disk_and_going_on(sparse, tmp_path, run, monkeypatch):
    model, processor = sparsight.load(sparse("llava"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="60kB")
    processor.save_pretrained(tmp_path / "parts")
    write, calls = packing.ShardWriter.add, []

    def full(self, name, tensor):
        calls.append(name)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    monkeypatch.setattr(packing.ShardWriter, "add", full)
    line = refused(run, "pack", "parts", "out")
    assert "No space left on device" in line
    assert "--resume" in line
    assert not (tmp_path / "out").exists()
    finished = len(list((tmp_path / "out.unfinished").glob("*.safetensors.json")))
    assert 0 < finished < len(list((tmp_path / "parts").glob("*.safetensors")))
    assert "holds interrupted work" in refused(run, "pack", "parts", "out")
    assert "squeeze=False" in refused(run, "pack", "parts", "out", "--resume", "--squeeze")
    calls[:] = ["x"] * 20
    assert run("pack", "parts", "out", "--resume", "--quiet")[0] == 0
    sparsight.pack(tmp_path / "parts", tmp_path / "at once")
    assert files(tmp_path / "out") == files(tmp_path / "at once")
    assert not (tmp_path / "out.unfinished").exists()


def test_parts_of_another_dtype_are_not_read(sparse, tmp_path):
    sparsight.pack(sparse("llava"), tmp_path / "packed", values="int8")
    path = tmp_path / "packed" / "model.safetensors"
    whole = load_file(path)
    name = next(name for name in whole if name.endswith("q_proj.weight"))
    for part, dtype in (("_bits", torch.int64), ("_bits", torch.float32), ("_scale", torch.bfloat16)):
        save_file({**whole, name + part: whole[name + part].to(dtype)}, path, metadata={"format": "pt"})
        for packed in (False, "all"):
            with pytest.raises(SparsightError, match="do not belong to"):
                load_model(tmp_path / "packed", packed=packed)
    save_file({key: tensor for key, tensor in whole.items() if key != f"{name}_scale"}, path, metadata={"format": "pt"})
    for packed, says in ((False, "1 masks have 0 scales"), ("all", "weights missing from the files")):
        with pytest.raises(SparsightError, match=says):
            load_model(tmp_path / "packed", packed=packed)


def test_going_on_after_a_stop_at_the_end(sparse, tmp_path, monkeypatch):
    """The files of weights were in the new folder by then, which was given up."""
    write = packing.write_json

    def stop(path, facts):
        if path.name == "packed.json":
            raise KeyboardInterrupt
        write(path, facts)

    monkeypatch.setattr(packing, "write_json", stop)
    with pytest.raises(Interrupted):
        sparsight.pack(sparse("llava"), tmp_path / "out")
    monkeypatch.undo()
    sparsight.pack(sparse("llava"), tmp_path / "out", resume=True)
    sparsight.pack(sparse("llava"), tmp_path / "at once")
    assert files(tmp_path / "out") == files(tmp_path / "at once")


def test_widths_are_known_after_going_on(tmp_path, monkeypatch):
    """Two widths whose bits have one shape are not packed both, whichever run packed the first."""
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse" / "config.json").write_text('{"model_type": "llava"}')
    for part, columns in ((1, 126), (2, 127)):
        W = torch.randn(64, columns)
        W[:, ::2] = 0
        save_file({f"{part}.weight": W}, tmp_path / "sparse" / f"model-{part}.safetensors")
    places = {f"{part}.weight": f"model-{part}.safetensors" for part in (1, 2)}
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "sparse" / "model.safetensors.index.json").write_text(json.dumps(index))
    add = packing.ShardWriter.add

    def full(self, name, tensor):
        if name == "2.weight":
            raise OSError(28, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(packing.ShardWriter, "add", full)
    with pytest.raises(SparsightError, match="No space left"):
        sparsight.pack(tmp_path / "sparse", tmp_path / "packed")
    monkeypatch.undo()
    facts = sparsight.pack(tmp_path / "sparse", tmp_path / "packed", resume=True)
    assert list(facts["tensors"]) == ["1.weight"]


def test_a_folder_inside_the_one_that_is_copied(sparse, tmp_path, run):
    folder = shutil.copytree(sparse("llava"), tmp_path / "sparse")
    before = files(folder)
    for out in ("sparse/out", "sparse/sub/out"):
        assert "lies inside sparse, which is copied" in refused(run, "pack", "sparse", out)
    assert files(folder) == before


def test_a_packed_model_is_saved_after_a_forward(sparse, tmp_path):
    sparsight.pack(sparse("llava"), tmp_path / "packed")
    model = load_model(tmp_path / "packed", packed="all")
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    model.save_pretrained(tmp_path / "again")
    assert_same(loaded(tmp_path / "again"), load_model(sparse("llava")))


def test_whoever_only_looks_for_transformers_changes_nothing():
    code = """if True:
        import sparsight
        from importlib.util import find_spec
        assert find_spec("transformers.modeling_utils") is not None
        import transformers.modeling_utils
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
        assert "sparsight" in AUTO_QUANTIZATION_CONFIG_MAPPING
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ctrl_c(sparse, tmp_path, run, monkeypatch):
    def stop(self, name, tensor):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(packing.ShardWriter, "add", stop)
    code, _, error = run("pack", sparse("llava"), "out", "--quiet")
    assert code == 130
    assert "interrupted" in error
    assert not (tmp_path / "out").exists()


def test_one_tensor_at_a_time(tmp_path):
    """The most that `pack` holds is a few times the largest tensor, however many there are."""
    code = """if True:
        import json, sys, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from sparsight.packing.shards import Shards, ShardWriter
        from sparsight.memory import peak_memory
        import sparsight.checkpoint.pack as packing
        from sparsight.specs import PackSpec
        folder, count, size = Path(sys.argv[1]), int(sys.argv[2]), 1 << 22
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
        with ShardWriter(folder / "model.safetensors", 1 << 16, {"format": "pt"}) as writer:
            for i in range(count):
                W = torch.full((2048, size // 2048), float(i + 1))
                W[:, ::2] = 0
                writer.add(f"{i}.weight", W)
        before = peak_memory()
        packing.pack_folder(folder, folder.with_name(folder.name + ".packed"), PackSpec())
        print(peak_memory() - before)
    """
    peaks = []
    for count in (2, 12):
        words = [sys.executable, "-c", code, str(tmp_path / str(count)), str(count)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    # pages of a mapped file count while they are read; twelve tensors of 16 MiB would take 192 MiB more than two
    assert peaks[1] < peaks[0] + 120 * 2**20


def test_names_and_forms_of_stored_tensors(sparse, tmp_path):
    sparsight.pack(sparse("llava"), tmp_path / "packed", squeeze=True)
    plain, packed = Shards(sparse("llava")), Shards(tmp_path / "packed")
    assert set(packed.names()) == set(plain.names())
    (file,) = packed.files
    assert packed.open(file).forms() == plain.open(file).forms()


def test_the_blocks_of_what_is_no_dense_model(zoo_folder, tmp_path):
    sparsight.prune(zoo_folder("llava"), tmp_path / "sparse", method="magnitude", sparsity=0.6)
    sparsight.pack(tmp_path / "sparse", tmp_path / "packed")
    with pytest.raises(SparsightError, match="its layers are packed"):
        sparsight.anatomy(sparsight.load(tmp_path / "packed", packed="all")[0])
    with pytest.raises(SparsightError, match="int is no model in memory"):
        sparsight.anatomy(5)


SPLIT = """
import sys
import sparsight
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
AutoModelForImageTextToText.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
"""


@pytest.mark.slow
def test_a_packed_model_is_not_split_over_devices(zoo_folder, tmp_path):
    sparsight.prune(zoo_folder("llava"), tmp_path / "sparse", method="magnitude", sparsity=0.6)
    sparsight.pack(tmp_path / "sparse", tmp_path / "packed")
    (tmp_path / "split.py").write_text(SPLIT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sparsight.__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "split.py"]
    done = subprocess.run([*command, tmp_path / "packed"], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "a packed weight cannot be split over devices (tensor parallel); unpack the folder first" in done.stderr
