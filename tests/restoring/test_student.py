"""The teacher: shared where the method allows it, and then one dense copy and a bit per weight is all there is."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsight import anatomy, api, load
from sparsight.allocation.plan import make_plan
from sparsight.calibration.moments import real_tokens
from sparsight.data.encoding import Encoder, select_answers
from sparsight.errors import SparsightError
from sparsight.pruning.loop import prune
from sparsight.pruning.methods import Method
from sparsight.pruning.reconstruct import first
from sparsight.restoring.peft_layers import adapted_modules, factors
from sparsight.restoring.refit import refit
from sparsight.restoring.student import make_student
from sparsight.specs import RestoreSpec

import zoo
from walks import calibration, samples


@pytest.fixture(scope="module")
def pair(tmp_path_factory, zoo_folder):
    """A wide random LLaVA, where adapters are small against weights, and the same pruned at 2:4."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=600,
    )
    small, processor = load(zoo_folder("llava"))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=small.config.image_token_index)
    folder = tmp_path_factory.mktemp("wide")
    LlavaForConditionalGeneration(config).save_pretrained(folder / "dense")
    processor.save_pretrained(folder / "dense")
    api.prune(folder / "dense", folder / "sparse", method="magnitude", pattern="2:4")
    return folder / "dense", folder / "sparse"


def tensors_alive():
    """Bytes of every tensor in this process, shared storage counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for tensor in (o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)):
        with contextlib.suppress(RuntimeError):  # what other tests left: fake and functional tensors hold no bytes
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def test_teacher_and_student_share_one_copy(pair):
    dense, sparse = pair
    before = tensors_alive()
    model, _ = load(dense)
    one_copy = tensors_alive() - before
    del model
    student = make_student(sparse, dense, samples(4))
    assert student.mode == "shared"
    factors = sum(p.numel() * p.element_size() for p in student.wrapped.parameters() if p.requires_grad)
    both = tensors_alive() - before - factors
    print(f"teacher and student: {both / one_copy:.3f} dense copies, and {factors / one_copy:.3f} of adapters to train")
    assert both <= 1.1 * one_copy
    assert student.weight_bytes / student.dense_bytes == pytest.approx(both / one_copy, abs=0.01)


def stirred(student, scale=0.05):
    """As after training, connector too: B starts at zero."""
    g = torch.Generator().manual_seed(0)
    for name, factor in factors(student.wrapped).items():
        if not name.endswith(".A"):
            factor.data += torch.randn(factor.shape, generator=g) * scale
    return student


@pytest.mark.parametrize("mode", ["shared", "cached", "live"])
@pytest.mark.parametrize("adapter", ["sparselora", "hira", "masked-full", "sparselora-fast"])
def test_the_teacher_is_the_dense_model_connector_included(mode, adapter, pair, tmp_path):
    """Whatever holds it, and however far the student has gone, it says what the dense model says."""
    dense, sparse = pair
    data = samples(5)
    spec = RestoreSpec(adapter=adapter, teacher_mode=mode, batch_size=2)
    student = stirred(make_student(sparse, dense, data, spec=spec, cache=tmp_path))
    original, processor = load(dense)
    batch = calibration(original, processor, 5, 5)[0]
    labels = batch.inputs["labels"]
    with torch.no_grad():
        expected, _ = select_answers(original(**batch.inputs).logits, labels, True)
        if mode == "cached":
            taught = torch.cat([student.cache[i] for i in range(5)])
        else:
            taught, _ = select_answers(student.teacher(student.wrapped, batch.inputs), labels, True)
        head = student.teacher_head or student.head
        torch.testing.assert_close(head.logits(taught), expected, rtol=0, atol=2e-6 if mode == "cached" else 0)
        answered, _ = select_answers(student.wrapped(**batch.inputs).logits, labels, True)
    assert (answered - expected).abs().max() > 1e-3
    assert any("multi_modal_projector" in name for name in adapted_modules(student.wrapped))
    assert student.mode == mode
    memory = {m: needs["memory"] / student.dense_bytes for m, needs in student.modes.items()}
    assert memory["shared"] == memory["cached"] < 1.08 < 1.9 < memory["live"]
    assert student.weight_bytes == student.modes[mode]["memory"]


def test_a_student_before_training_is_the_sparse_model(pair, tmp_path):
    """Every adapter starts where pruning ended, with the teacher's copy below or the sparse one."""
    dense, sparse = pair
    pruned, processor = load(sparse)
    batch = calibration(pruned, processor, 3, 3)[0]
    with torch.no_grad():
        expected = pruned(**batch.inputs).logits
        everything = ("vision", "connector", "language")
        cases = [(adapter, everything) for adapter in ("sparselora", "hira", "masked-full", "lora")]
        for adapter, tune in [*cases, ("sparselora", ("language",)), ("lora", ("vision", "connector"))]:
            spec = RestoreSpec(adapter=adapter, tune=tune)
            student = make_student(sparse, dense, samples(3), spec=spec, cache=tmp_path)
            assert student.mode == ("cached" if adapter == "lora" else "shared")
            torch.testing.assert_close(student.wrapped(**batch.inputs).logits, expected, rtol=0, atol=1e-6)
            trained = {n.split(".")[1] for n, p in factors(student.wrapped).items() if p.requires_grad}
            words = {"vision": "vision_tower", "connector": "multi_modal_projector", "language": "language_model"}
            assert trained == {words[part] for part in tune}


def test_kept_weights_that_changed_take_a_cache(pair, zoo_folder, scenes, tmp_path):
    """Any folder with zeros will do: no record, kept weights of its own. Its teacher is cached, or live if asked."""
    dense, _ = pair

    def shrink(W, moments, pattern, generator):
        return (0.9 * W).masked_fill(~pattern.keep(W.abs().float()), 0)

    api.prune(dense, tmp_path / "sparse", pattern="2:4", method=Method(shrink, needs=frozenset(), mask_only=False))
    for name in ("sparsity.json", "recipe.yaml", "metrics.json"):
        (tmp_path / "sparse" / name).unlink()
    student = make_student(tmp_path / "sparse", dense, samples(5), cache=tmp_path / "cache", spec=RestoreSpec(batch_size=2))
    assert student.mode == "cached"
    assert set(student.modes) == {"cached", "live"}
    assert student.modes["cached"]["disk"] <= student.cache.bytes < 2 * student.modes["cached"]["disk"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    again = make_student(tmp_path / "sparse", dense, samples(5), cache=tmp_path / "cache", spec=RestoreSpec(batch_size=2))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")} == files
    assert torch.equal(again.cache[4], student.cache[4])
    make_student(tmp_path / "sparse", dense, samples(4), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # other data, another folder
    with pytest.raises(SparsightError, match="`teacher_mode`: shared cannot be: the kept weights"):
        make_student(tmp_path / "sparse", dense, samples(4), spec=RestoreSpec(teacher_mode="shared"))


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_reconstruction_comes_before_the_adapters(mode, pair, tmp_path):
    """Training-free: the zeros stay, the blocks come nearer to the dense ones, and the teacher is the dense model still."""
    dense, sparse = pair
    spec = RestoreSpec(reconstruct=4, teacher_mode=mode, batch_size=4)
    student = make_student(sparse, dense, samples(8), spec=spec, cache=tmp_path)
    assert all(after < before for before, after in student.refit_errors.values())
    pruned, processor = load(sparse)
    original, _ = load(dense)
    batch = calibration(original, processor, 3, 3)[0]
    with torch.no_grad():
        truth = original(**batch.inputs).logits
        errors = [float((m(**batch.inputs).logits - truth).norm()) for m in (pruned, student.wrapped)]
        if mode == "live":
            taught, _ = select_answers(student.teacher(None, batch.inputs), batch.inputs["labels"], True)
            expected, _ = select_answers(truth, batch.inputs["labels"], True)
            torch.testing.assert_close(student.teacher_head.logits(taught), expected)
    print(f"distance of the logits from the dense model's: pruned {errors[0]:.2f}, reconstructed {errors[1]:.2f}")
    assert errors[1] < errors[0]
    merged = student.wrapped.merge_and_unload()
    for name, W in pruned.named_parameters():
        if (W == 0).any():
            assert not merged.get_parameter(name)[W == 0].any(), name


def test_blocks_are_refitted_to_a_dense_model_with_its_own_connector():
    """A connector that an earlier restoration changed stays, and the targets are those of the dense model without it."""
    sparse, processor = zoo.build("llava")
    ready = calibration(sparse, processor)
    prune(sparse, anatomy(sparse), make_plan(anatomy(sparse), sparsity=0.5), ready)
    bridge = "model.multi_modal_projector.linear_1.weight"
    sparse.get_parameter(bridge).data.mul_(1.5)
    fitted, untouched = zoo.build("llava")[0], zoo.build("llava")[0]
    body = anatomy(fitted)
    names = [layer.name for layer in anatomy(sparse).layers if layer.sparse]
    record = refit(fitted, body, sparse, anatomy(sparse), names, ready, 1)
    assert torch.equal(fitted.get_parameter(bridge), sparse.get_parameter(bridge))
    last = body.component("language")[-1].block
    states: list = []
    for model in (fitted, untouched):
        hook = model.get_submodule(last).register_forward_hook(lambda m, a, y: states.append(first(y)))
        with torch.no_grad():
            for batch in ready:
                model(**batch.inputs, use_cache=False)
        hook.remove()
    real = [real_tokens(X, batch.padding, "language")[0] for X, batch in zip(states, [*ready, *ready], strict=True)]
    here, there = torch.cat(real[: len(ready)]), torch.cat(real[len(ready) :])
    assert record.reconstructed[last][1] == pytest.approx(float((here - there).norm() / there.norm()), rel=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.0)])
def test_merged_against_live_logits(pair, dtype, limit):
    """In float32 the merged logits differ by at most 1e-5; in bf16 every bit is the same, the connector's too."""
    dense, sparse = pair
    for adapter in ("sparselora", "hira", "masked-full"):
        student = stirred(make_student(sparse, dense, samples(4), spec=RestoreSpec(adapter=adapter, dtype=dtype)), 0.02)
        base = student.wrapped.get_base_model()
        batch = Encoder(student.processor, base).encode(samples(4))
        with torch.no_grad():
            live = student.wrapped(**batch.inputs).logits
            merged = student.wrapped.merge_and_unload()(**batch.inputs).logits
        difference = (live.float() - merged.float()).abs().max().item()
        print(f"{adapter} {dtype}: largest difference {difference:.2e}")
        assert difference <= limit


def test_without_kl_no_teacher_is_needed(pair):
    _, sparse = pair
    student = make_student(sparse, None, samples(2))
    assert (student.mode, student.teacher, student.cache, student.modes) == ("none", None, None, {})
    with pytest.raises(SparsightError, match="`reconstruct`: fits blocks to those of the dense model"):
        make_student(sparse, None, samples(2), spec=RestoreSpec(reconstruct=1))
