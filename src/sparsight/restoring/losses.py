"""The loss of restoration: (1 - kl) CE + kl T^2 D(teacher, student), on answer positions only, from hidden states.

The logits of a chunk of tokens are computed, turned into loss and gradient in closed form, and freed: memory never holds
the logits of all answers. In float32: a small divergence is a difference of nearly equal logits, which half precision would
round away. Summed over tokens, so that the trainer divides by the number of answer tokens of the whole step, or by the
sum of their weights.

The paper's published code sums the divergence over every position, padding too, divides by the batch size, leaves out
T^2 and computes in bf16 (He et al., arXiv 2404.02424); `tokens_per_sample` turns on the first three, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsight.restoring.head import Head

CHUNK = 1 << 22  # logits at a time
IGNORE = -100
POWERS = {"token": 0.0, "root": 0.5, "answer": 1.0}  # a token of an answer of n tokens weighs n ** -power


@dataclass(frozen=True)
class Loss:
    """`total` has the gradient; `ce`, `kl` and `hidden` are sums over answer tokens, `tokens` that of their weights."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    hidden: torch.Tensor
    tokens: float


def answer_weights(labels: torch.Tensor, power: float) -> torch.Tensor:
    """The weight of every answer token (n,), in the order of `labels[labels != -100]`: n ** -power in an answer of n tokens.

    An answer is a run of labels (B, T) that are not -100, so that several of them may stand in one row.
    """
    there = labels != IGNORE
    first = there.clone()
    first[:, 1:] &= ~there[:, :-1]
    number = first[there].cumsum(0) - 1
    return number.bincount().float().pow(-power)[number]


def _forward(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    each = log_p.sub_(log_q).mul_(p).sum(-1)
    return each, log_q.exp_().sub_(p)


def _reverse(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    apart = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    each = (q * apart).sum(-1)
    return each, apart.sub_(each.unsqueeze(-1)).mul_(q)


def _jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))  # both may be 0 in float32
    of_p = log_p.sub_(log_m).mul_(p).sum(-1)
    apart = log_q.sub_(log_m)
    of_q = (q * apart).sum(-1)
    return 0.5 * (of_p + of_q), apart.sub_(of_q.unsqueeze(-1)).mul_(q).mul_(0.5)


# (log p of the teacher, log q of the student), each (n, V) and overwritten -> divergence (n,), its gradient by the student's
# logits (n, V)
DIVERGENCES: dict[str, Callable] = {"forward": _forward, "reverse": _reverse, "js": _jensen_shannon}


class _FromHidden(torch.autograd.Function):
    """Weighted sums of CE and divergence over rows; forward also computes the gradient by the student's hidden states."""

    @staticmethod
    def forward(ctx, student, teacher, targets, each, head, teacher_head, weights, temperature, divergence):
        wide = torch.promote_types(student.dtype, torch.float32)
        grad = torch.empty_like(student, dtype=wide) if student.requires_grad else None
        sums = torch.zeros(2, dtype=torch.float64, device=student.device)
        rows = max(1, CHUNK // head.weight.shape[0])
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            sums += _chunk(
                student[part], None if teacher is None else teacher[part], targets[part],
                None if each is None else each[part], head, teacher_head, weights, temperature, DIVERGENCES[divergence],
                None if grad is None else grad[part],
            )  # fmt: skip
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        total = (sums * sums.new_tensor(weights)).sum().float()
        return total, sums[0].float(), sums[1].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, *_):
        (grad,) = ctx.saved_tensors
        return ((grad * grad_total).to(ctx.dtype), *(None,) * 8)


def _chunk(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    each: torch.Tensor | None,
    head: Head,
    teacher_head: Head,
    weights: tuple[float, float],
    temperature: float,
    divergence: Callable,
    grad: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sums of CE and divergence (2,) over n rows, and fill `grad` (n, d). Needs at most four buffers (n, V).

    `each` (n,) has the weights of rows.
    """
    s = head.logits(student)
    bend = None if head.cap is None else (s / head.cap).square_().neg_().add_(1)
    ce, slope = _cross_entropy(s, targets, weights[0])
    kl = torch.zeros_like(ce)  # of every row, as `ce`
    if teacher is not None:
        log_p = _log_softmax(teacher_head.logits(teacher), temperature)
        s = _log_softmax(s, temperature)
        kl, by_logits = divergence(log_p, s)
        slope.add_(by_logits, alpha=weights[1] / temperature)
    if grad is not None:
        slope = slope if bend is None else slope.mul_(bend)
        grad.copy_(head.back(slope))
        if each is not None:
            grad.mul_(each.unsqueeze(-1))
    return torch.stack([(part if each is None else part * each).sum(dtype=torch.float64) for part in (ce, kl)])


def _cross_entropy(s: torch.Tensor, targets: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy (n,), 0 off answers, and the gradient (n, V) of `weight` times its sum by the logits s."""
    log_q = F.log_softmax(s, dim=-1)
    there = targets != IGNORE
    rows = there.nonzero().flatten()
    right = targets[rows]
    ce = log_q.new_zeros(len(targets))
    ce[rows] = -log_q[rows, right]
    slope = log_q.exp_()
    if len(rows) < len(targets):
        slope.mul_(there.unsqueeze(-1))
    slope[rows, right] -= 1
    return ce, slope.mul_(weight)


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log softmax(logits / temperature); may overwrite the logits."""
    return F.log_softmax(logits if temperature == 1 else logits.div_(temperature), dim=-1)


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    head: Head,
    teacher_head: Head | None = None,
    *,
    kl: float,
    temperature: float = 1.0,
    divergence: str = "forward",
    hidden: float = 0.0,
    tokens_per_sample: float | None = None,
    each: torch.Tensor | None = None,
) -> Loss:
    """Return (1 - kl) CE + kl T^2 D from hidden states in front of the heads, `student` and `teacher` (n, d).

    `total` is a sum over tokens: divide it by the number of answer tokens of the step. With `each` (n,), the weights of
    tokens, all sums are weighted, and `tokens` is the sum of the weights of answers. `targets` (n,) may have -100 at
    positions that are no answers; they count for the divergence only, as in the paper's reduction. The paper divides by
    samples: `tokens_per_sample`, the answer tokens of a step by its samples, replaces T^2. `hidden` is the weight of the
    squared distance of the hidden states of answers, relative to the teacher's square. Without a teacher the loss is the
    cross entropy alone. Extra memory: a few buffers of `CHUNK` logits, and one gradient like `student`.
    """
    answers = targets != IGNORE
    tokens = float(answers.sum() if each is None else each[answers].sum())
    if teacher is None:
        weights = (1.0, 0.0)
    elif tokens_per_sample is not None:
        weights = (1 - kl, kl * tokens_per_sample)
    else:
        weights = (1 - kl, kl * temperature**2)
    total, ce, divergent = _FromHidden.apply(
        student, teacher, targets, each, head, teacher_head or head, weights, temperature, divergence
    )
    apart = torch.zeros((), device=student.device)
    if teacher is not None and hidden:
        s, t = student[answers].float(), teacher[answers].float()
        apart = (s - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-12)
        apart = (apart if each is None else apart * each[answers]).sum()
        total = total + hidden * apart
    return Loss(total, ce.detach(), divergent.detach(), apart.detach(), tokens)
