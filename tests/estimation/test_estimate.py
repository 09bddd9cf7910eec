"""What stages will cost: FLOPs as torch counts them, bytes as a person can count them, and one line for what is unknown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsight import anatomy
from sparsight.allocation.plan import make_plan
from sparsight.api import estimate
from sparsight.calibration.moments import real_tokens
from sparsight.data import Encoder
from sparsight.demo import MODELS
from sparsight.estimation import machine, shapes, trace
from sparsight.estimation.stages import LayerShape, Shapes, Work, evaluate, packed_bytes, prune, restore
from sparsight.estimation.stubs import hollow
from sparsight.estimation.trace import Pass, Step, Stop
from sparsight.pruning.methods import METHODS, REFINES, UPDATES
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.head import Head
from sparsight.restoring.peft_layers import AdapterTarget, add_adapters

import walks
import zoo


def low_rank(out, columns, rank):
    return ADAPTERS["sparselora"].shapes(out, columns, rank, 0.5)


BASE = {"load": 10, "prune": 20, "restore": 30, "evaluate": 40}


@pytest.fixture
def no_child(monkeypatch):
    """Interpreter and libraries are said, and not measured in a process of their own."""
    monkeypatch.setattr(machine, "measured_base", lambda where, dtype: BASE)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_forward_without_weights_counts_the_flops_that_torch_counts(name):
    if name in zoo.NEEDS_TORCHVISION:
        pytest.importorskip("torchvision")
    model, processor = zoo.build(name)
    model.requires_grad_(False)
    for config in (model.config, model.config.get_text_config()):
        config._experts_implementation = "eager"  # torch does not count grouped products
    batch = walks.calibration(model, processor, 3, 3)[0]
    inputs = {key: t for key, t in batch.inputs.items() if key != "labels" or not batch.shifted}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(**inputs, use_cache=False)
    shape = hollow(model.config, torch.float32)
    body = anatomy(shape)
    found, stops = trace.walk(shape, [(b.name, b.module) for b in body.blocks], inputs, use_cache=False)
    assert found.flops == counted.get_total_flops()
    reached = {stop.name for stop in stops}
    assert all(block.name in reached for block in body.blocks if block.component == "language")
    assert all(p.is_meta for p in shape.parameters())
    assert 0 < max(stop.held + stop.extra for stop in stops) <= found.peak


def test_flops_of_one_layer_by_hand():
    layer = torch.nn.Linear(8, 4, device="meta")
    with torch.no_grad(), trace.tracing(layer) as (ledger, _):
        layer(torch.ones(5, 8))
    assert ledger.flops == 2 * 5 * 8 * 4
    assert ledger.peak == 5 * 8 * 4 + 5 * 4 * 4  # the ones were made inside, too
    assert ledger.live == 0


def test_bytes_alive_fall_when_tensors_go():
    with trace.tracing(torch.nn.Identity()) as (ledger, _):
        a = torch.ones(1000, device="meta")
        b = a + a
        del a
        assert (ledger.live, ledger.peak) == (4000, 8000)
        c = b.view(10, 100)  # the same storage
        del b
        assert ledger.live == 4000
        del c
    assert (ledger.live, ledger.peak) == (0, 8000)


def test_what_a_paused_batch_holds_by_hand():
    model, processor = zoo.build("llava")
    batch = walks.calibration(model, processor, 3, 3)[0]
    inputs = {key: t for key, t in batch.inputs.items() if key != "labels"}
    body = anatomy(hollow_ := hollow(model.config, torch.float32))
    _, stops = trace.walk(hollow_, [(b.name, b.module) for b in body.blocks], inputs, use_cache=False)
    words = inputs["input_ids"].numel() * 48 * 4  # their embeddings wait while the pictures are looked at
    assert stops[0].held == words + 3 * 17 * 32 * 4  # 16 patches and a class token of width 32
    assert stops[0].rows == 3 * 17
    assert stops[0].output == 3 * 17 * 32 * 4


def _forecast_layers(name):
    model, processor = zoo.build(name)
    shape = hollow(model.config, torch.float32)
    body, encoder = anatomy(shape), Encoder(processor, shape)
    batch = walks.calibration(model, processor, 3, 3)[0]
    layers, _, _ = shapes._layers(shape, body, make_plan(body, sparsity=0.5), batch, encoder)
    return model, batch, {layer.name: layer for layer in layers}


@pytest.mark.parametrize("name", ["llava", "instructblip-t5", "paligemma"])
def test_tokens_of_a_layer_are_those_that_pruning_sees(name):
    model, batch, layers = _forecast_layers(name)
    seen = {}

    def look(layer):
        def hook(module, args):
            flat, image = real_tokens(args[0], batch.padding, layer.component)
            kinds = 1 if image is None or bool(image.all()) else 2
            seen[layer.name] = (len(flat), kinds)

        return hook

    inputs = {key: t for key, t in batch.inputs.items() if key != "labels" or not batch.shifted}
    for layer in anatomy(model).layers:
        layer.module.register_forward_pre_hook(look(layer))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    assert {n: (x.tokens, x.kinds) for n, x in layers.items()} == {n: found for n, found in seen.items() if n in layers}


def test_layers_that_are_fed_the_same_tensor_share_their_moments():
    _, _, layers = _forecast_layers("llava")
    block = [x for x in layers.values() if x.block == "model.language_model.layers.0"]
    assert len(block) == 7
    assert len({x.feed for x in block}) == 4  # q k v, o, gate up, down


def test_what_training_saves_is_what_autograd_saves():
    model, processor = zoo.build("llava")
    batch = walks.calibration(model, processor, 3, 3)[0]
    shape = hollow(model.config, torch.float32)
    chosen = [layer for layer in anatomy(shape).layers if layer.component == "language"]
    head = Head(shape)
    found = trace.step(
        shape, lambda: head.hidden(shape, batch.inputs).sum(), [(x.module, 2, True) for x in chosen], low_rank
    )

    real = [layer for layer in anatomy(model).layers if layer.component == "language"]
    masks = [torch.full(((x.weight.numel() + 7) // 8,), 255, dtype=torch.uint8) for x in real]
    head = Head(model)
    wrapped = add_adapters(model, [AdapterTarget(x, 2, mask) for x, mask in zip(real, masks, strict=True)])
    fixed = {t.untyped_storage().data_ptr() for t in (*wrapped.parameters(), *wrapped.buffers(), *batch.inputs.values())}
    saved = {}

    def keep(tensor):
        if (key := tensor.untyped_storage().data_ptr()) not in fixed:
            saved[key] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = head.hidden(wrapped, batch.inputs).sum()
    assert found.trained == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert found.saved == pytest.approx(sum(saved.values()), rel=0.05)
    assert found.backward >= found.saved
    value.backward()


def _shapes(**other):
    """Two layers fed the same tensor, of 8 inputs, 4 and 6 outputs, half of them zeros, in one block; everything counted."""
    layers = tuple(
        LayerShape(name, "language", "block", out, 8, out * 4, tokens=10, kinds=2, feed="q")
        for name, out in (("q", 4), ("k", 6))
    )
    given = {
        "weights": 1000, "size": 4, "layers": layers, "base": BASE, "walk": Pass(5000, 0),
        "stops": (Stop("block", 100, 50, 30, 4000, 700, 12, "block"),), "calibration": 7,
        "step": Step(9000, 300, 200, 200, 250, 11), "teacher": Pass(3000, 120), "step_inputs": 5, "answers": 3, "width": 2,
        "vocabulary": 6, "prompt": Pass(2000, 80, 32), "token": Pass(100, 0, 4), "right": Pass(2500, 90),
        "right_answers": 9, "asked_inputs": 8,
    }  # fmt: skip
    return Shapes(**given | other)


def test_pruning_block_by_block_by_hand():
    """One block and what is outside in place of all weights; parked batches on the disk, but for one."""
    shapes = _shapes(blocks={"block": 600, "other": 300}, outside=90)
    whole = prune(shapes, Work(samples=20, batch_size=8))
    stage = prune(shapes, Work(samples=20, batch_size=8, streamed=True))
    kept = {name: size for name, size in whole.memory.items() if name != "weights"}
    assert stage.memory == {"base": 20, "outside the blocks": 90, "the block": 600} | {
        k: kept[k] for k in kept if k != "base"
    }
    assert stage.flops == whole.flops
    assert stage.disk == whole.disk
    for how in ({"park": "always"}, {"free": 1199}):
        parked = prune(shapes, Work(samples=20, batch_size=8, streamed=True, **how))
        assert parked.memory["paused activations"] == 100
        assert parked.memory["batches"] == 7
        assert parked.disk["parked"] == 300 + 21
    for how in ({"park": "never", "free": 1}, {"free": 1200}):
        assert prune(shapes, Work(samples=20, batch_size=8, streamed=True, **how)) == stage


def test_pruning_by_hand():
    stage = prune(_shapes(), Work(samples=20, batch_size=8))
    assert stage.flops == {"forwards": 3 * (700 + 4000), "errors": 3 * 4000, "check": 3 * 5000}
    error = 6 * 8 * (4 + 4)  # the new weight, and its difference from the old
    assert stage.memory == {
        "base": 20, "weights": 1000, "batches": 21, "paused activations": 300, "block outputs": 4 * 30,
        "moments": 8 * (8 * 2 + 128 * 4), "running": error,
    }  # fmt: skip
    assert stage.peak == sum(stage.memory.values())
    assert stage.moment == "block"
    # 40 of 80 weights stay; one bit for each of the 80
    assert stage.disk == {"model": 1000, "packed": 1000 - 4 * 40 + 10}
    assert packed_bytes(_shapes()) == 850


def test_a_gram_matrix_and_its_solver_by_hand():
    stage = prune(_shapes(), Work({"sparsegpt": METHODS["sparsegpt"].cost}, gram=True, samples=8, batch_size=8))
    assert stage.flops["gram"] == 10 * 8 * (8 + 256)  # once for both layers
    assert stage.flops["sparsegpt"] == 8**3 + (4 + 6) * 8**2
    # text and image apart, both together, and the factor
    assert stage.memory["moments"] == 8 * (8 * 2 + 128 * 4) + 4 * 4 * 8 * 8
    assert stage.memory["running"] == 2 * 4 * 8 * 8  # a copy and its Cholesky factor, from which the factor is made
    exact = prune(
        _shapes(), Work({"swaps": REFINES["swaps"].cost, "pcg": UPDATES["pcg"].cost}, gram=True, samples=8, batch_size=8)
    )
    assert exact.flops["swaps"] == 2 * (4 + 6) * 8**2
    assert exact.flops["pcg"] == 64 * exact.flops["swaps"]
    assert exact.memory["moments"] == stage.memory["moments"] - 4 * 8 * 8  # no factor
    assert exact.memory["running"] == 33 * 6 * 8 + 4 * 8 * 8


def test_stage_runs_nothing_twice():
    stage = prune(_shapes(), Work(propagate="layer", samples=16, batch_size=8))
    assert stage.flops == {"forwards": 2 * 700, "check": 3 * 5000}  # up to the last stop, where nobody walks on
    assert "block outputs" not in stage.memory


@pytest.mark.parametrize("teacher", ["shared", "cached", "live", "none"])
def test_restoration_by_hand(teacher):
    small = _shapes(weights=10)
    stage = restore(small, Work(teacher=teacher, train_steps=3, accumulate=2, restore_batch=4, learned=10))
    asked = {"shared": 6, "live": 6, "cached": 3, "none": 0}[teacher]
    expected = {"student": 6 * 9000} | ({"teacher": asked * 3000} if asked else {})
    assert stage.flops == expected
    assert stage.moment == "a step"
    assert stage.memory == {
        "base": 30, "weights": 10, "masks": 10, "batches": 20, "factors, gradients, moments": 16 * 11,
        "saved for backward": 200, "gaps in the heap": 60, "running": 100,
    } | ({"teacher": 10} if teacher == "live" else {})  # fmt: skip
    assert stage.disk.get("teacher") == (10 * 3 * 2 * 4 // 4 if teacher == "cached" else None)
    assert restore(_shapes(weights=10**6), Work(teacher=teacher)).moment == "a step"


def test_evaluation_by_hand():
    work = Work(asked=10, eval_batch=4, max_new_tokens=5, beams=2)
    stage = evaluate(_shapes(), work)
    assert stage.moment == "logits of the right answers"
    assert stage.memory == {"base": 40, "weights": 1000, "batches": 8, "running": 90, "logits in float32": 2 * 4 * 9 * 6}
    assert stage.flops == {"prompts": 3 * 2 * 2000, "new tokens": 3 * 2 * 4 * 100, "right answers": 3 * 2500}
    long = evaluate(_shapes(prompt=Pass(1, 5000, 3000)), work)
    assert long.moment == "writing answers"
    assert long.memory["keys and values"] == 2 * (3000 + 5 * 4)
    assert long.memory["running"] == 2 * 2000


def test_a_time_is_flops_by_rate():
    assert evaluate(_shapes(), Work(asked=4, eval_batch=4, max_new_tokens=1)).seconds(1000) == 4.5


@pytest.mark.parametrize("name", ["instructblip-t5", "llava", "qwen3-vl-moe", "smolvlm"])
def test_every_stage_of_a_family(name, zoo_folder, scenes, no_child):
    if name in zoo.NEEDS_TORCHVISION:
        pytest.importorskip("torchvision")
    few = {"prune": {"samples": 4, "batch_size": 2}, "evaluate": {"batch_size": 2}, "timed": False}
    found = estimate(zoo_folder(name), data=scenes, restore={"batch_size": 2}, **few)
    assert not found.assumed
    assert [stage.name for stage in found.stages] == ["load", "prune", "restore", "evaluate"]
    assert all(stage.work > 0 for stage in found.stages[1:])
    model = hf.AutoModelForImageTextToText.from_pretrained(zoo_folder(name))
    tensors = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    assert found["load"].memory["weights"] == sum(tensors.values())
    assert 0 < found["prune"].memory["the block"] < sum(tensors.values()) / 2
    checkpointed = {"batch_size": 2, "gradient_checkpointing": True}
    less = estimate(zoo_folder(name), data=scenes, restore=checkpointed, **few)
    saved = "saved for backward"
    if saved in found["restore"].memory and saved in less["restore"].memory:
        assert less["restore"].memory[saved] < found["restore"].memory[saved]
    assert less["restore"].flops["student"] > found["restore"].flops["student"]


@pytest.mark.parametrize("adapter", ["sparselora-fast", "hira", "masked-full"])
def test_every_adapter_has_a_cost(adapter, zoo_folder, no_child):
    few = {"evaluate": {"batch_size": 2}, "timed": False}
    layer = {"batch_size": 2, "propagate": "layer"}
    found = estimate(zoo_folder("llava"), prune=layer, restore={"batch_size": 2, "adapter": adapter}, **few)
    lora = estimate(zoo_folder("llava"), prune={"batch_size": 2}, restore={"batch_size": 2}, **few)
    trained = "factors, gradients, moments"
    more = found["restore"].memory[trained] > lora["restore"].memory[trained]
    assert more == (adapter == "masked-full")
    assert found["prune"].flops["forwards"] < lora["prune"].flops["forwards"]


def test_the_teacher_s_mode_follows_the_method(zoo_folder, no_child):
    few = {"restore": {"batch_size": 2}, "evaluate": {"batch_size": 2}, "timed": False}
    assert "teacher" not in estimate(zoo_folder("llava"), prune={"method": "wanda"}, **few)["restore"].disk
    assert "teacher" in estimate(zoo_folder("llava"), prune={"method": "sparsegpt"}, **few)["restore"].disk


def test_swaps_and_exact_weights_have_a_cost(run, zoo_folder, no_child):
    plain, exact = (
        {
            stage["name"]: stage
            for stage in json.loads(run("plan", zoo_folder("llava"), "--cost", "--json", *more)[1])["stages"]
        }
        for more in ((), ("--refine", "swaps", "--update", "pcg"))
    )
    assert exact["prune"]["flops"].keys() - plain["prune"]["flops"].keys() == {"gram", "swaps", "pcg"}
    assert exact["prune"]["peak"] > plain["prune"]["peak"]
    assert "teacher" in exact["restore"]["disk"]  # new weights, so the teacher is another model


def test_the_command_line(run, zoo_folder, scenes, tmp_path, no_child):
    words = ("plan", zoo_folder("llava"), "--cost", "--data", scenes, "--restore-batch-size", 4, "--steps", 3)
    code, out, _ = run(*words)
    assert code == 0
    for said in (
        "load",
        "prune",
        "restore",
        "evaluate",
        "peak MB",
        "saved for backward",
        "Tokens per sample: 17 vision, 16",
    ):
        assert said in out
    facts = json.loads(run(*words, "--json")[1])
    stages = {stage["name"]: stage for stage in facts["stages"]}
    assert stages["restore"]["peak"] == sum(stages["restore"]["memory"].values())
    assert stages["prune"]["seconds"] > 0
    assert not facts["assumed"]
    assert "no --data" in run("plan", zoo_folder("llava"), "--cost", "--method", "sparsegpt")[1]
    assert list(tmp_path.iterdir()) == []


BAD = {
    "method": (["--method", "alps"], ["--method", "alps", "wanda, ria, sparsegpt"]),
    "no method": (["--method", "wandaa"], ["--method", "did you mean wanda?"]),
    "refine": (["--refine", "swap"], ["--refine", "swap", "dsnot, dsnot-all, swaps"]),
    "update": (["--update", "cg"], ["--update", "cg", "pcg"]),
    "policy": (["--policy", "owl"], ["--policy", "owl", "uniform"]),
    "propagate": (["--propagate", "blocks"], ["--propagate", "did you mean block?"]),
    "teacher mode": (["--teacher-mode", "cache"], ["--teacher-mode", "did you mean cached?"]),
    "steps": (["--steps", "-1"], ["--steps: -1", "at least 0"]),
    "batch": (["--restore-batch-size", "0"], ["--restore-batch-size: 0", "at least 1"]),
    "device": (["--device", "cuda"], ["--device", "on the CPU", "leave it out"]),
    "layers": (["--layers"], ["--layers", "leave one of the two out"]),
    "data": (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "sparsity": (["--sparsity", "50%"], ["'50%' is not a number"]),
    "dtype": (["--dtype", "bf16"], ["--dtype", "bfloat16"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line(case, run, zoo_folder, no_child):
    words, says = BAD[case]
    code, out, err = run("plan", zoo_folder("llava"), "--cost", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(said in err for said in says), err


def test_options_of_the_estimate_need_cost(run, zoo_folder):
    code, _, err = run("plan", zoo_folder("llava"), "--steps", 3)
    assert (code, err.count("\n")) == (2, 1)
    assert "--steps: says what the estimate is of; add --cost" in err


def test_a_folder_without_a_configuration(run, tmp_path, no_child):
    (tmp_path / "empty").mkdir()
    code, _, err = run("plan", "empty", "--cost")
    assert (code, "no config.json" in err) == (2, True)


def test_seven_billion_parameters_need_no_weights(zoo_folder, tmp_path):
    """A folder with configuration and processor only; the process stays small."""
    for path in zoo_folder("llava").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 16384, "intermediate_size": 43008, "num_attention_heads": 128, "num_key_value_heads": 128,
        "head_dim": 128, "num_hidden_layers": 2, "vocab_size": 32064,
    }  # fmt: skip
    config["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = (
        "import re, sys; from pathlib import Path; from sparsight import estimate\n"
        "from sparsight.estimation import machine\n"
        f"machine.measured_base = lambda where, dtype: {BASE}\n"
        "few = {'batch_size': 2}; found = estimate(sys.argv[1], restore=few, evaluate=few, timed=False)\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "print(found['load'].memory['weights'], found['restore'].peak, 1024 * int(peak))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, restoring, held = map(int, done.stdout.split()[-3:])
    assert 14e9 < weights < 16e9
    assert restoring > weights
    assert held < 2e9


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prune", "restore"])
def test_the_peak_of_a_demo_model_is_within_15_per_cent(stage, tmp_path):
    from sparsight.demo.scenes import write

    data = write(tmp_path / "scenes", "train", 32, seed=0)
    code = (
        "import re, sys; from pathlib import Path; from sparsight import api; f, a = sys.argv[1:3]\n"
        "api.prune(f, 'sparse', data=a, samples=32, dtype='float32') if sys.argv[3] == 'prune' else "
        "api.restore('sparse', 'restored', data=a, steps=2)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    prune = {"samples": 32, "dtype": "float32"}
    made = estimate(MODELS["llava"], data=data, prune=prune, restore={"steps": 2}, timed=False)
    for what in ("prune", "restore")[: 1 + (stage == "restore")]:
        words = [sys.executable, "-c", code, str(Path(MODELS["llava"]).resolve()), str(Path(data).resolve()), what]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    measured = 1024 * int(re.search(r"(\d+)\s*$", done.stdout)[1])
    assert made[stage].peak == pytest.approx(measured, rel=0.15)
