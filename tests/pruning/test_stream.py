"""Pruning block by block against pruning in memory: the same files, whatever is done and however it was interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers.models.llava.modeling_llava import LlavaModel

from sparsight import SparsightError, api
from sparsight.calibration import park
from sparsight.checkpoint import parts
from sparsight.checkpoint.parts import PartFiles
from sparsight.errors import Interrupted, Notice
from sparsight.model import stream as streams
from sparsight.model.load import load
from sparsight.model.stream import OUTSIDE, Stream
from sparsight.pruning.verb import prune_folder
from sparsight.specs import PruneSpec

import zoo
from zoo import digest

FEW = {"samples": 6, "batch_size": 2}
HOWS = {
    "wanda": {"sparsity": 0.5},
    "sparsegpt 2:4 bfloat16": {"method": "sparsegpt", "pattern": "2:4", "dtype": "bfloat16"},
    "dense": {"method": "sparsegpt", "sparsity": 0.6, "propagate": "dense"},
    "layer": {"sparsity": 0.6, "propagate": "layer"},
    "layer sparsegpt float16": {"method": "sparsegpt", "propagate": "layer", "dtype": "float16"},
    "reconstruct": {"reconstruct": 1},
    "reconstruct with connector": {"reconstruct": 1, "sparsity": "vision=0.5,connector=0.5,language=0.5"},
    "pcg": {"update": "pcg"},
    "owl": {"policy": "owl", "sparsity": 0.6},
    "alpha": {"policy": "alpha", "sparsity": 0.6},
    "permute": {"permute": True, "pattern": "2:4"},
    "balanced": {"tokens": "balanced"},
    "vision": {"sparsity": "vision=0.5"},
    "magnitude": {"method": "magnitude"},
}
QUICK = [
    ("instructblip-t5", "wanda"), ("instructblip-t5", "dense"), ("instructblip-t5", "layer sparsegpt float16"),
    ("llava", "sparsegpt 2:4 bfloat16"), ("llava", "layer"), ("llava", "permute"), ("llava", "magnitude"),
    ("llava", "vision"), ("llava", "alpha"), ("qwen3-vl-moe", "wanda"), ("qwen3-vl-moe", "reconstruct"),
    ("qwen3-vl-moe", "reconstruct with connector"), ("qwen3-vl-moe", "sparsegpt 2:4 bfloat16"), ("gemma3", "pcg"),
    ("gemma3", "owl"), ("qwen2.5-vl", "balanced"),
]  # fmt: skip
EVERY = [
    *QUICK,
    *(
        pytest.param(name, how, marks=pytest.mark.slow)
        for name in (*zoo.NAMES, *zoo.MORE)
        for how in HOWS
        if (name, how) not in QUICK
    ),
]


def in_memory(model, out, data, how):
    """Prune the whole model in memory and write it."""
    spec = PruneSpec.make(None, {**FEW, **how})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = prune_folder(model, out, spec, data=data, loaded=load(model, dtype=spec.dtype))
    return _measured(record)


def _measured(record):
    return {key: value for key, value in record.metrics["prune"].items() if key not in ("seconds", "memory")}


def streamed(model, out, data, how, **rest):
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        warnings.filterwarnings("ignore", message=".*is loaded in")
        return _measured(api.prune(model, out, data=data, **FEW, **how, **rest))


def assert_same(one, other):
    names = [sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) for folder in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if (one / name).is_file() and name != "metrics.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(("name", "how"), EVERY)
def test_the_files_are_those_of_the_whole_model(name, how, zoo_folder, scenes, tmp_path):
    data, model = None if how == "magnitude" else scenes, zoo_folder(name)
    if how == "reconstruct with connector" and not Stream(model).anatomy.component("connector"):
        with pytest.raises(SparsightError, match="no connector layers"):
            streamed(model, tmp_path / "parts", data, HOWS[how])
        return
    expected = in_memory(model, tmp_path / "whole", data, HOWS[how])
    assert streamed(model, tmp_path / "parts", data, HOWS[how]) == expected
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts.unfinished").exists()


@pytest.mark.parametrize("name", ["llava", "qwen3-vl-moe", "instructblip-t5"])
def test_from_several_files_and_packed_ones(name, zoo_folder, scenes, tmp_path):
    """A sparse model in many files, and packed: pruned further to the same bytes."""
    api.prune(zoo_folder(name), tmp_path / "sparse", method="magnitude", sparsity=0.3)
    model, processor = load(tmp_path / "sparse")
    model.save_pretrained(tmp_path / "files", max_shard_size="40KB")
    processor.save_pretrained(tmp_path / "files")
    for extra in ("sparsity.json", "recipe.yaml"):
        (tmp_path / "files" / extra).write_bytes((tmp_path / "sparse" / extra).read_bytes())
    assert len([*(tmp_path / "files").glob("*.safetensors")]) > 3
    api.pack(tmp_path / "files", tmp_path / "packed")
    how = {"sparsity": 0.6, "method": "sparsegpt"}
    in_memory(tmp_path / "sparse", tmp_path / "whole", scenes, how)
    for source in ("files", "packed"):
        streamed(tmp_path / source, tmp_path / f"{source} pruned", scenes, how)
        assert digest(tmp_path / f"{source} pruned") == digest(tmp_path / "whole")


@pytest.mark.parametrize("name", ["llava", "qwen3-vl-moe", "blip2-opt", "gemma3"])
def test_several_files_are_those_of_save_pretrained(name, zoo_folder, tmp_path):
    model, _ = load(zoo_folder(name))
    model.save_pretrained(tmp_path / "whole", max_shard_size="40KB")
    stream = Stream(zoo_folder(name))
    files = PartFiles(stream, "40KB")
    stream.bring_outside()
    files.folder = tmp_path / "space"
    assert files.make()
    assert files.make() == []
    for part in reversed(stream.parts):  # in any order
        stream.bring(part)
        files.write(part)
    (tmp_path / "parts").mkdir()
    files.put_into(tmp_path / "parts")
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert len(names) > 4
    assert names == sorted(path.name for path in (tmp_path / "whole").glob("model*"))
    for file in names:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    for part in stream.parts:
        assert {*files.read(part)} == {*files.keys[part]}


KILL = """
import os, sys
import zoo
from sparsight import api
from sparsight.checkpoint import parts
count, write = int(sys.argv[4]), parts._write
def torn(descriptor, tensor, place):
    global count
    count -= 1
    if not count:
        data = tensor.contiguous().view(-1)
        write(descriptor, data[: len(data) // 2], place)
        os.kill(os.getpid(), 9)
    write(descriptor, tensor, place)
parts._write = torn
api.prune(sys.argv[1], sys.argv[2], data=sys.argv[3], resume=os.path.isdir(sys.argv[2] + ".unfinished"), **eval(sys.argv[5]))
"""


@pytest.mark.parametrize(
    ("name", "how"), [("llava", "layer"), pytest.param("qwen3-vl-moe", "dense", marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_of_a_write_it_goes_on(name, how, zoo_folder, scenes, tmp_path):
    """SIGKILL with half of a tensor written, in the first block and in a later one."""
    expected = in_memory(zoo_folder(name), tmp_path / "whole", scenes, HOWS[how])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(zoo.__file__).parent)}
    settings = {**FEW, **HOWS[how]}
    for count in (3, 30):
        words = [zoo_folder(name), tmp_path / "parts", scenes, count, settings]
        work = subprocess.run(
            [sys.executable, "-c", KILL, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert work.returncode == -signal.SIGKILL, work.stderr
    assert (tmp_path / "parts.unfinished").is_dir()
    assert streamed(zoo_folder(name), tmp_path / "parts", scenes, HOWS[how], resume=True) == expected
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def interrupted(model, out, data):
    """A pruning that Ctrl-C stopped after three blocks; their notes."""

    def stop(note, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        api.prune(model, out, data=data, samples=4, sparsity=0.5, progress=stop)
    return sorted((out.with_name(out.name + ".unfinished") / "done").iterdir())


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "processor_config.json"])
def test_another_configuration_or_processor_is_other_work(file, zoo_folder, scenes, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(zoo_folder("llava"), model)
    assert interrupted(model, tmp_path / "out", scenes)
    text = (model / file).read_text()
    (model / file).write_text(text + "\n")
    with pytest.raises(SparsightError, match="files of the model are not those that the interrupted work began with"):
        api.prune(model, tmp_path / "out", data=scenes, samples=4, sparsity=0.5, resume=True)
    (model / file).write_text(text)
    (model / "evaluation.json").write_text("{}")  # which `eval --record` leaves
    api.prune(model, tmp_path / "out", data=scenes, samples=4, sparsity=0.5, resume=True)


@pytest.mark.parametrize("left", ["{}", "[]", '{"a": 1}', ""])
def test_a_note_without_measurements_is_no_done_block(left, zoo_folder, scenes, tmp_path, caplog):
    notes = interrupted(zoo_folder("llava"), tmp_path / "out", scenes)
    notes[0].write_text(left)
    api.prune(zoo_folder("llava"), tmp_path / "out", data=scenes, samples=4, sparsity=0.5, resume=True)
    assert "its block is pruned again" in caplog.text
    api.prune(zoo_folder("llava"), tmp_path / "other", data=scenes, samples=4, sparsity=0.5)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other")]
    assert files[0] == files[1]


def test_a_policy_that_measures_by_changes_loads_the_whole_model(zoo_folder, scenes, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("was streamed")

    monkeypatch.setattr("sparsight.pruning.way.Stream", refuse)
    for how in ({"policy": "sensitivity"}, {"policy": lambda layers, budget, probe: {x.name: 0.5 for x in layers}},
                {"method": "fisher"}):  # fmt: skip
        api.prune(zoo_folder("llava"), tmp_path / "out", data=scenes, overwrite=True, **FEW, **how)


def test_a_policy_of_one_s_own_that_changes_weights_must_say_so(zoo_folder, scenes, tmp_path):
    from sparsight.allocation.policy import Policy

    def measure(layers, budget, probe):
        return {layer.name: probe.slopes([layer])[layer.name] for layer in layers[:2]}

    policy = Policy(measure, data=True)
    with pytest.raises(SparsightError, match="declare it with `whole=True`"):
        api.prune(zoo_folder("llava"), tmp_path / "out", data=scenes, policy=policy, **FEW)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_in_parts_is_loaded_whole(zoo_folder, scenes, tmp_path, monkeypatch):
    api.prune(zoo_folder("llava"), tmp_path / "parts", data=scenes, **FEW)
    for lacks in ((streams, "LACKS", "no such function"), (parts, "LACKS", "no such function")):
        with monkeypatch.context() as patch:
            patch.setattr(*lacks)
            with pytest.warns(Notice, match="was loaded as a whole, since it cannot be block by block: no such function"):
                api.prune(zoo_folder("llava"), tmp_path / "whole", data=scenes, overwrite=True, **FEW)
        assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("instructblip-t5", "gemma4", "mllama")]


@pytest.mark.parametrize("name", ["llava", "qwen3-vl-moe", *MORE])
@pytest.mark.parametrize("how", ["dense", "reconstruct"])
def test_activations_in_files_change_nothing(name, how, zoo_folder, scenes, tmp_path, monkeypatch):
    moved = []

    class Watch(park.Park):
        def _move(self, tensors):
            moved.append(tensors[0].nbytes)
            super()._move(tensors)

    monkeypatch.setattr(park, "LEAST", 256)
    monkeypatch.setattr("sparsight.pruning.verb.Park", Watch)
    streamed(zoo_folder(name), tmp_path / "memory", scenes, HOWS[how] | {"park": "never"})
    assert not moved
    streamed(zoo_folder(name), tmp_path / "files", scenes, HOWS[how] | {"park": "always"})
    assert len(moved) > 20
    assert digest(tmp_path / "memory") == digest(tmp_path / "files")


def test_auto_parks_where_memory_is_short(zoo_folder, scenes, tmp_path, monkeypatch):
    made = []

    class Watch(park.Park):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(park, "LEAST", 256)
    monkeypatch.setattr("sparsight.pruning.verb.Park", Watch)
    api.prune(zoo_folder("llava"), tmp_path / "plenty", data=scenes, **FEW)
    assert made[-1].moved == 0
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**16}))
    api.prune(zoo_folder("llava"), tmp_path / "short", data=scenes, **FEW)
    assert made[-1].moved > 0
    assert digest(tmp_path / "plenty") == digest(tmp_path / "short")


def test_a_file_system_that_takes_no_space_beforehand(zoo_folder, tmp_path, monkeypatch):
    api.prune(zoo_folder("llava"), tmp_path / "one", method="magnitude")

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    api.prune(zoo_folder("llava"), tmp_path / "other", method="magnitude")
    assert digest(tmp_path / "one") == digest(tmp_path / "other")


def test_a_model_in_memory_is_not_parked(zoo_folder, scenes):
    model, processor = load(zoo_folder("llava"))
    with pytest.raises(SparsightError, match="`park`: puts files beside the output"):
        api.prune(model, data=scenes, processor=processor, park="always")


def test_the_record_says_what_was_done(zoo_folder, scenes, tmp_path):
    api.prune(zoo_folder("llava"), tmp_path / "out", data=scenes, **FEW)
    assert json.loads((tmp_path / "out" / "sparsity.json").read_text())["mask_only"] is True
    assert api.verify(tmp_path / "out")["differences"] == {}
    assert OUTSIDE not in json.loads((tmp_path / "out" / "metrics.json").read_text())["prune"]["block_errors"]
    assert torch.isfinite(load(tmp_path / "out")[0].get_input_embeddings().weight).all()


def test_a_forward_that_goes_back_to_earlier_blocks(zoo_folder, scenes, tmp_path, monkeypatch):
    """Image by image: the connector is left for the vision tower while its last layer is pruned and not yet written."""
    whole = LlavaModel.get_image_features

    def each(self, pixel_values=None, **others):
        outputs = [whole(self, pixel_values=image[None], **others) for image in pixel_values]
        outputs[0].pooler_output = [features for output in outputs for features in output.pooler_output]
        return outputs[0]

    monkeypatch.setattr(LlavaModel, "get_image_features", each)
    how = {"sparsity": "vision=0.5,connector=0.5,language=0.5", "propagate": "layer"}
    expected = in_memory(zoo_folder("llava"), tmp_path / "whole", scenes, how)
    assert streamed(zoo_folder("llava"), tmp_path / "parts", scenes, how) == expected
    assert_same(tmp_path / "whole", tmp_path / "parts")
