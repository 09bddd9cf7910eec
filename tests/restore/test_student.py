"""The teacher: shared where the method allows it, and then one dense copy and a bit per weight is all there is."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sparsight import load, verbs
from sparsight.data.encoding import Encoder, answers_of
from sparsight.restore.losses import distillation
from sparsight.restore.sparse_lora import adapters
from sparsight.restore.student import make_student

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
    verbs.prune(folder / "dense", folder / "sparse", method="magnitude", pattern="2:4")
    return folder / "dense", folder / "sparse"


def tensors_alive():
    """Bytes of every tensor in this process, shared storage counted once."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def test_teacher_and_student_share_one_copy(pair):
    dense, sparse = pair
    before = tensors_alive()
    model, _ = load(dense)
    one_copy = tensors_alive() - before
    del model
    student = make_student(sparse, dense)
    assert student.mode == "shared"
    factors = sum(p.numel() * p.element_size() for p in student.wrapped.parameters() if p.requires_grad)
    both = tensors_alive() - before - factors
    print(f"teacher and student: {both / one_copy:.3f} dense copies, and {factors / one_copy:.3f} of adapters to train")
    assert both <= 1.1 * one_copy
    assert student.weight_bytes / student.dense_bytes == pytest.approx(both / one_copy, abs=0.01)


def test_the_teacher_is_the_dense_model_connector_included(pair):
    dense, sparse = pair
    student = make_student(sparse, dense)
    g = torch.Generator().manual_seed(0)
    for layer in adapters(student.wrapped).values():  # as after training, connector too
        B = layer.lora_B["default"].weight
        B.data = torch.randn(B.shape, generator=g) * 0.1
    original, processor = load(dense)
    batch = calibration(original, processor, 3, 3)[0]
    with torch.no_grad():
        assert torch.equal(student.teacher(batch.inputs), original(**batch.inputs).logits)
        assert not torch.allclose(student.wrapped(**batch.inputs).logits, original(**batch.inputs).logits)
        pruned, _ = load(sparse)
    assert any("multi_modal_projector" in name for name in adapters(student.wrapped))
    assert pruned.dtype == original.dtype


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.0)])
def test_merged_against_live_logits(pair, dtype, limit):
    """In float32 the merged logits differ by at most 1e-5; in bf16 the connector's plain LoRA is merged with rounding,
    so it is left out there and every bit is the same."""
    dense, sparse = pair
    student = make_student(sparse, dense, dtype=dtype, ranks={"connector": 2 if limit else 0})
    g = torch.Generator().manual_seed(0)
    for layer in adapters(student.wrapped).values():
        B = layer.lora_B["default"].weight
        B.data = torch.randn(B.shape, generator=g) * 0.02
    base = student.wrapped.get_base_model()
    batch = Encoder(student.processor, base).encode(samples(4))
    with torch.no_grad():
        live = student.wrapped(**batch.inputs).logits
        merged = student.wrapped.merge_and_unload()(**batch.inputs).logits
    difference = (live.float() - merged.float()).abs().max().item()
    print(f"{dtype}: largest difference {difference:.2e}")
    assert difference <= limit


def test_without_kl_no_teacher_is_needed(pair):
    _, sparse = pair
    student = make_student(sparse, None)
    assert (student.mode, student.teacher) == ("none", None)


def test_the_loss_is_the_formula():
    """(1 - kl) CE + kl T^2 KL(teacher || student), in float32, answer positions only, mean per token."""
    g = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(2, 5, 7, generator=g), torch.randn(2, 5, 7, generator=g)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, -100, -100]])
    student, targets = answers_of(logits, labels, shifted=True)
    teacher, _ = answers_of(taught, labels, shifted=True)
    assert targets.tolist() == [3, 4, 1, 2]
    kl, T = 0.3, 2.0
    loss = distillation(student, teacher, targets, kl, T)
    rows = [(0, 1, 3), (0, 2, 4), (1, 0, 1), (1, 1, 2)]  # position t foretells t + 1
    ce = -sum(logits[b, t].log_softmax(0)[y] for b, t, y in rows)
    p = [(taught[b, t] / T).softmax(0) for b, t, _ in rows]
    q = [(logits[b, t] / T).softmax(0) for b, t, _ in rows]
    divergence = sum((pi * (pi / qi).log()).sum() for pi, qi in zip(p, q, strict=True))
    torch.testing.assert_close(loss.ce, ce)
    torch.testing.assert_close(loss.kl, divergence)
    torch.testing.assert_close(loss.total, (1 - kl) * ce + kl * T**2 * divergence)
    assert loss.tokens == 4
    unshifted, direct = answers_of(logits, labels, shifted=False)
    assert direct.tolist() == [3, 4, 1, 2]
    assert torch.equal(unshifted[0], logits[0, 2])


def test_padding_and_length_do_not_weigh_in_the_loss():
    """The published code divides by the batch size, so that longer padding weighs more; ours does not see it."""
    g = torch.Generator().manual_seed(0)
    logits, taught = torch.randn(1, 4, 7, generator=g), torch.randn(1, 4, 7, generator=g)
    labels = torch.tensor([[-100, 1, 2, -100]])
    short = distillation(*(answers_of(x, labels, True)[0] for x in (logits, taught)), labels[0, 1:3], 0.5)
    pad = torch.nn.functional.pad
    longer, wider = pad(labels, (0, 6), value=-100), [pad(x, (0, 0, 0, 6), value=9.0) for x in (logits, taught)]
    long = distillation(*(answers_of(x, longer, True)[0] for x in wider), labels[0, 1:3], 0.5)
    assert torch.equal(short.total, long.total)


def test_bf16_logits_are_compared_in_float32():
    logits = torch.tensor([[10.0, 10.03]]).bfloat16()
    loss = distillation(logits, logits, torch.tensor([0]), 0.5)
    assert loss.total.dtype == torch.float32
    assert loss.kl == 0
