"""What restoration minimises: (1 - kl) CE + kl T^2 D(teacher, student), on answer positions only, and from hidden states.

The logits of a chunk of tokens are made, turned into loss and gradient in closed form, and dropped: neither the logits of
all answers nor a single softmax outlives its chunk. In float32, and summed over tokens, so that the trainer divides by
the number of answer tokens of the whole step.

The paper's published code sums the divergence over every position, padding too, divides by the batch size, leaves out
T^2 and computes in bf16 (He et al., arXiv 2404.02424); `tokens_per_sample` asks for the first three, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsight.restore.head import Head

CHUNK = 1 << 22  # logits at a time
IGNORE = -100


@dataclass(frozen=True)
class Loss:
    """`total` is what is trained; `ce`, `kl` and `hidden` are plain sums over `tokens` answer tokens."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    hidden: torch.Tensor
    tokens: int


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


# (log p of the teacher, log q of the student), each (n, V) and used up, to the divergence (n,) and its gradient by the
# student's logits
DIVERGENCES: dict[str, Callable] = {"forward": _forward, "reverse": _reverse, "js": _jensen_shannon}


class _FromHidden(torch.autograd.Function):
    """Sums of CE and divergence over rows, weighted; the gradient by the student's hidden states is made on the way."""

    @staticmethod
    def forward(ctx, student, taught, targets, head, teacher_head, weights, temperature, divergence):
        wide = torch.promote_types(student.dtype, torch.float32)
        grad = torch.empty_like(student, dtype=wide) if student.requires_grad else None
        sums = torch.zeros(2, dtype=torch.float64, device=student.device)
        rows = max(1, CHUNK // head.weight.shape[0])
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            sums += _chunk(
                student[part], None if taught is None else taught[part], targets[part], head, teacher_head, weights,
                temperature, DIVERGENCES[divergence], None if grad is None else grad[part],
            )  # fmt: skip
        ctx.save_for_backward(grad)
        ctx.dtype = student.dtype
        total = (sums * sums.new_tensor(weights)).sum().float()
        return total, sums[0].float(), sums[1].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, *_):
        (grad,) = ctx.saved_tensors
        return ((grad * grad_total).to(ctx.dtype), *(None,) * 7)


def _chunk(
    student: torch.Tensor,
    taught: torch.Tensor | None,
    targets: torch.Tensor,
    head: Head,
    teacher_head: Head,
    weights: tuple[float, float],
    temperature: float,
    divergence: Callable,
    grad: torch.Tensor | None,
) -> torch.Tensor:
    """Sums of CE and divergence (2,) over n rows; `grad` (n, d) is filled. At most four buffers of (n, V) at a time."""
    s = head.logits(student)
    bend = None if head.cap is None else (s / head.cap).square_().neg_().add_(1)
    ce, slope = _cross_entropy(s, targets, weights[0])
    kl = torch.zeros_like(ce)
    if taught is not None:
        log_p = _log_softmax(teacher_head.logits(taught), temperature)
        s = _log_softmax(s, temperature)
        each, by_logits = divergence(log_p, s)
        kl = each.sum(dtype=torch.float64)
        slope.add_(by_logits, alpha=weights[1] / temperature)
    if grad is not None:
        slope = slope if bend is None else slope.mul_(bend)
        grad.copy_(slope.to(head.weight.dtype) @ head.weight)
    return torch.stack([ce, kl])


def _cross_entropy(s: torch.Tensor, targets: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over answers of one chunk, and the gradient (n, V) of `weight` times it by the logits s."""
    log_q = F.log_softmax(s, dim=-1)
    there = targets != IGNORE
    rows = there.nonzero().flatten()
    right = targets[rows]
    ce = -log_q[rows, right].sum(dtype=torch.float64)
    slope = log_q.exp_()
    if len(rows) < len(targets):
        slope.mul_(there.unsqueeze(-1))
    slope[rows, right] -= 1
    return ce, slope.mul_(weight)


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Of logits that nobody else needs."""
    return F.log_softmax(logits if temperature == 1 else logits.div_(temperature), dim=-1)


def distillation(
    student: torch.Tensor,
    taught: torch.Tensor | None,
    targets: torch.Tensor,
    head: Head,
    teacher_head: Head | None = None,
    *,
    kl: float,
    temperature: float = 1.0,
    divergence: str = "forward",
    hidden: float = 0.0,
    tokens_per_sample: float | None = None,
) -> Loss:
    """Combine cross entropy and divergence from hidden states in front of the heads, `student` and `taught` (n, d).

    `total` is a sum over tokens: divide it by the number of answer tokens of the step. `targets` (n,) may have -100 where
    a position is no answer: it counts for the divergence only, which is what the paper's reduction wants; that divides by
    samples, so it has to be told `tokens_per_sample`, the answer tokens of a step by its samples. `hidden` weighs the
    squared distance of the hidden states of answers, in units of the teacher's own square. Without a teacher it is the
    cross entropy alone. Extra memory: a few buffers of `CHUNK` logits, and one gradient like `student`.
    """
    answers = targets != IGNORE
    tokens = int(answers.sum())
    if taught is None:
        weights = (1.0, 0.0)
    elif tokens_per_sample is not None:
        weights = (1 - kl, kl * tokens_per_sample)
    else:
        weights = (1 - kl, kl * temperature**2)
    total, ce, divergent = _FromHidden.apply(
        student, taught, targets, head, teacher_head or head, weights, temperature, divergence
    )
    apart = torch.zeros((), device=student.device)
    if taught is not None and hidden:
        s, t = student[answers].float(), taught[answers].float()
        apart = ((s - t).square().sum(-1) / t.square().sum(-1).clamp(min=1e-12)).sum()
        total = total + hidden * apart
    return Loss(total, ce.detach(), divergent.detach(), apart.detach(), tokens)
