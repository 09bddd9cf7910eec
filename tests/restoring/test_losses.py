"""The loss is the formula, made from hidden states in chunks; the head is that of every family."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsight.data.encoding import select_answers
from sparsight.errors import SparsightError
from sparsight.restoring import losses
from sparsight.restoring.head import Head
from sparsight.restoring.losses import answer_weights, distillation

import zoo
from walks import calibration


class Tail:
    """A head by itself."""

    def __init__(self, vocabulary, width, dtype=torch.float64, cap=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64).to(dtype)
        self.bias, self.cap = torch.randn(vocabulary, generator=g, dtype=torch.float64).to(dtype), cap

    logits, back, capped = Head.logits, Head.back, Head.capped


def draw(n, width, seed, dtype=torch.float64):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(s, t, targets, kl, T, divergence):
    """In plain torch, from whole logits."""
    ce = F.cross_entropy(s, targets, reduction="sum")
    p, q = (t / T).softmax(-1), (s / T).softmax(-1)
    m = (p + q) / 2

    def over(a, b):
        return (a * (a / b).log()).sum()

    apart = {"forward": over(p, q), "reverse": over(q, p), "js": (over(p, m) + over(q, m)) / 2}[divergence]
    return (1 - kl) * ce + kl * T**2 * apart, ce, apart


@pytest.mark.parametrize("chunk", [1, 30, 1 << 22])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_the_loss_and_its_gradient_are_the_formula(divergence, T, cap, chunk, monkeypatch):
    """(1 - kl) CE + kl T^2 D(teacher, student), summed over tokens, with another head for the teacher."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    head, teacher_head = Tail(11, 6, cap=cap), Tail(11, 6, cap=cap, seed=1)
    student, taught = draw(7, 6, 2).requires_grad_(True), draw(7, 6, 3)
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 5])
    found = distillation(student, taught, targets, head, teacher_head, kl=0.3, temperature=T, divergence=divergence)
    (by_us,) = torch.autograd.grad(found.total, student)
    total, ce, apart = formula(head.logits(student), teacher_head.logits(taught), targets, 0.3, T, divergence)
    (by_autograd,) = torch.autograd.grad(total, student)
    for ours, theirs in ((found.total, total), (found.ce, ce), (found.kl, apart)):
        torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_us, by_autograd, rtol=1e-6, atol=1e-8)
    assert found.tokens == 7


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("T", [1.0, 0.1])
def test_logits_far_apart_in_float32(divergence, T):
    """Where both probabilities are 0 nothing is lost and nothing becomes NaN; gradients are those of float64."""
    s, t = [[0.0, 5.0, -110.0, 1.0]], [[0.0, 5.0, -112.0, 2.0]]

    class Straight(Tail):
        def __init__(self, dtype):
            self.weight, self.bias, self.cap = torch.eye(4, dtype=dtype), None, None

    found = []
    for dtype in (torch.float32, torch.float64):
        student, taught = torch.tensor(s, dtype=dtype, requires_grad=True), torch.tensor(t, dtype=dtype)
        loss = distillation(
            student, taught, torch.tensor([1]), Straight(dtype), kl=0.5, temperature=T, divergence=divergence
        )
        loss.total.backward()
        found.append((loss.kl.double(), student.grad.double()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(found[0][1]).all()


def test_the_rows_that_speak_of_answers():
    """Decoder-only: position t foretells token t + 1; an encoder-decoder foretells label t at position t."""
    hidden = draw(10, 6, 0).view(2, 5, 6)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, -100, -100]])
    rows, targets = select_answers(hidden, labels, shifted=True)
    assert targets.tolist() == [3, 4, 1, 2]
    assert torch.equal(rows, torch.stack([hidden[0, 1], hidden[0, 2], hidden[1, 0], hidden[1, 1]]))
    rows, targets = select_answers(hidden, labels, shifted=False)
    assert targets.tolist() == [3, 4, 1, 2]
    assert torch.equal(rows, torch.stack([hidden[0, 2], hidden[0, 3], hidden[1, 1], hidden[1, 2]]))


def test_padding_and_length_do_not_weigh_in_the_loss():
    """The published code divides by the batch size, so that longer padding weighs more; ours does not see it."""
    head, labels = Tail(11, 6), torch.tensor([[-100, 1, 2, -100]])
    hidden, taught = (draw(4, 6, seed).view(1, 4, 6) for seed in (0, 1))
    longer = F.pad(labels, (0, 6), value=-100)
    wider = [F.pad(x, (0, 0, 0, 6), value=9.0) for x in (hidden, taught)]
    found = []
    for pair, words in (((hidden, taught), labels), (wider, longer)):
        (student, targets), (teacher, _) = (select_answers(x, words, True) for x in pair)
        found.append(distillation(student, teacher, targets, head, kl=0.5))
    assert torch.equal(found[0].total, found[1].total)
    assert found[0].tokens == found[1].tokens == 2


def test_without_a_teacher_it_is_the_cross_entropy():
    head, student, targets = Tail(11, 6), draw(4, 6, 0).requires_grad_(True), torch.tensor([1, 2, 3, 4])
    found = distillation(student, None, targets, head, kl=0.9)
    torch.testing.assert_close(found.total.double(), F.cross_entropy(head.logits(student), targets, reduction="sum"))
    assert float(found.kl) == 0


def test_hidden_states_may_be_matched():
    head, targets = Tail(11, 6), torch.tensor([1, 2, -100, 4])
    student, taught = draw(4, 6, 0).requires_grad_(True), draw(4, 6, 1)
    plain = distillation(student, taught, targets, head, kl=0.5)
    found = distillation(student, taught, targets, head, kl=0.5, hidden=0.7)
    rows = [0, 1, 3]
    apart = sum((student[i] - taught[i]).square().sum() / taught[i].square().sum() for i in rows)
    torch.testing.assert_close(found.hidden.double(), apart.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.total - plain.total, (0.7 * apart).float(), rtol=1e-4, atol=1e-5)
    (with_it,) = torch.autograd.grad(found.total, student)
    (without,) = torch.autograd.grad(plain.total, student)
    (expected,) = torch.autograd.grad(0.7 * apart, student)
    torch.testing.assert_close(with_it - without, expected, rtol=1e-4, atol=1e-5)


def test_tokens_weigh_by_the_length_of_their_answer():
    """Two turns of two and one tokens in the first row, an answer of four in the second; none in the third."""
    labels = torch.tensor([[3, 4, -100, 5, -100], [-100, 1, 2, 3, 4], [-100] * 5])
    assert answer_weights(labels, 0.0).tolist() == [1.0] * 7
    assert answer_weights(labels, 1.0).tolist() == [0.5, 0.5, 1.0] + [0.25] * 4
    torch.testing.assert_close(answer_weights(labels, 0.5), torch.tensor([0.5**0.5] * 2 + [1.0] + [0.5] * 4))
    assert answer_weights(labels[2:], 0.5).tolist() == []


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
@pytest.mark.parametrize("chunk", [1, 30, 1 << 22])
def test_weights_of_tokens_are_in_the_loss_and_in_its_gradient(chunk, divergence, monkeypatch):
    """Every part is the sum of the tokens' own parts, each times its weight."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    head, targets, each = Tail(11, 6), torch.tensor([1, 2, -100, 4]), torch.tensor([0.5, 2.0, 3.0, 0.1])
    student, taught = draw(4, 6, 0).requires_grad_(True), draw(4, 6, 1)
    how = {"kl": 0.3, "temperature": 2.0, "divergence": divergence, "hidden": 0.7}
    found = distillation(student, taught, targets, head, each=each, **how)
    alone = [distillation(student[i : i + 1], taught[i : i + 1], targets[i : i + 1], head, **how) for i in range(4)]
    for part in ("total", "ce", "kl", "hidden"):
        expected = sum(weight * getattr(one, part) for weight, one in zip(each, alone, strict=True))
        torch.testing.assert_close(getattr(found, part), expected, rtol=1e-5, atol=1e-5)
    assert found.tokens == pytest.approx(2.6)
    (ours,) = torch.autograd.grad(found.total, student)
    (summed,) = torch.autograd.grad(sum(w * one.total for w, one in zip(each, alone, strict=True)), student)
    torch.testing.assert_close(ours, summed, rtol=1e-5, atol=1e-6)


def test_the_paper_s_reduction():
    """Its code: CE a mean over answer tokens, KL a sum over every position divided by the samples, no T^2."""
    head = Tail(11, 6)
    hidden, taught = draw(8, 6, 0).view(2, 4, 6), draw(8, 6, 1).view(2, 4, 6)
    labels = torch.tensor([[-100, 3, 4, -100], [-100, -100, 2, -100]])
    rows = [select_answers(x, labels, True, all_positions=True) for x in (hidden, taught)]
    student, targets = rows[0][0].requires_grad_(True), rows[0][1]
    found = distillation(student, rows[1][0], targets, head, kl=0.1, tokens_per_sample=3 / 2)
    s, t = head.logits(student), head.logits(rows[1][0])
    there = targets != -100
    ce = F.cross_entropy(s[there], targets[there])
    kl = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True) / 2
    torch.testing.assert_close((found.total / 3).double(), (0.9 * ce + 0.1 * kl).detach(), rtol=1e-6, atol=1e-6)
    assert found.tokens == 3
    (by_us,) = torch.autograd.grad(found.total / 3, student)
    (by_autograd,) = torch.autograd.grad(0.9 * ce + 0.1 * kl, student)
    torch.testing.assert_close(by_us, by_autograd, rtol=1e-5, atol=1e-8)


def test_bf16_logits_are_compared_in_float32():
    head = Tail(5, 3, torch.bfloat16)
    hidden = draw(2, 3, 0, torch.bfloat16).requires_grad_(True)
    found = distillation(hidden, hidden.detach(), torch.tensor([0, 1]), head, kl=0.5)
    assert found.total.dtype == torch.float32
    assert float(found.kl) == 0
    found.total.backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("apart", [0.006, 0.02])
def test_a_small_divergence_of_half_precision_states_is_right(apart, autocast):
    """Logits to 16: rounded to bfloat16 they would be off by 0.06, and the divergence would be that of the rounding."""
    vocabulary, d, n = 4000, 64, 8
    dtype = torch.float32 if autocast else torch.bfloat16
    head = Tail(vocabulary, d, dtype)
    head.weight.data.copy_(4 * draw(vocabulary, d, 2, torch.float32) / d**0.5)
    taught = draw(n, d, 0, torch.bfloat16).to(dtype)
    student = (taught.float() + apart * draw(n, d, 1, torch.float32)).to(torch.bfloat16).to(dtype).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = distillation(student, taught, torch.full((n,), -100), head, kl=1.0)
    (slope,) = torch.autograd.grad(found.total, student)
    W, wide = head.weight.double(), student.detach().double().requires_grad_(True)
    p, q = ((x @ W.T + head.bias.double()).log_softmax(-1) for x in (taught.double(), wide))
    exact = (p.exp() * (p - q)).sum()
    (expected,) = torch.autograd.grad(exact, wide)
    assert exact.item() / n < 4e-3
    assert float(found.kl) == pytest.approx(exact.item(), rel=5e-3)
    print(f"KL {exact.item() / n:.1e}, here {float(found.kl) / n:.1e}")
    assert F.cosine_similarity(slope.double().flatten(), expected.flatten(), dim=0) > 0.999


def test_logits_of_all_answers_never_live_at_once():
    """The largest tensor that the loss makes is a chunk of logits, in forward and backward."""
    vocabulary, n = 5000, 4000
    head = Tail(vocabulary, 4, torch.float32)
    student, taught = draw(n, 4, 0, torch.float32).requires_grad_(True), draw(n, 4, 1, torch.float32)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        distillation(student, taught, torch.zeros(n, dtype=torch.long), head, kl=0.5).total.backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * n * vocabulary / 2
    assert largest == 4 * (losses.CHUNK // vocabulary) * vocabulary


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_head_of_every_family(name, zoo_folder):
    """Hidden states in front of the head give the logits of a plain forward, which is left as it was."""
    model, processor = zoo.build(name)
    batch = calibration(model, processor, 3, 3)[0]
    with torch.no_grad():
        expected = model(**batch.inputs, use_cache=False).logits
        head = Head(model)
        hidden = head.hidden(model, batch.inputs)
        assert hidden.shape[:2] == batch.inputs["labels"].shape
        torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(**batch.inputs, use_cache=False).logits, expected)
        head.check(model, batch.inputs)
        hook = head.linear.register_forward_hook(lambda module, args, output: output * 0.5)
        head.check(model, batch.inputs)
        assert head.scale == pytest.approx(0.5, rel=1e-3)
        half = model(**batch.inputs, use_cache=False).logits
        torch.testing.assert_close(head.logits(head.hidden(model, batch.inputs)), half, rtol=1e-4, atol=1e-4)
        hook.remove()
        head.linear.register_forward_hook(lambda module, args, output: output.relu())
        with pytest.raises(SparsightError, match="changes its logits behind the output head"):
            head.check(model, batch.inputs)
