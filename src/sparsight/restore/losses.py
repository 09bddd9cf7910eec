"""What restoration minimises: (1 - kl) CE + kl T^2 KL(teacher || student), on answer positions only.

Computed in float32 and summed over tokens, so that the trainer divides by the number of answer tokens of the whole step.
The paper's published code sums the KL over every position, padding too, divides by the batch size, leaves out T^2 and
computes in bf16; ours does none of that (He et al., arXiv 2404.02424).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Loss:
    """Sums over answer tokens."""

    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    tokens: int


def distillation(
    student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor, kl: float, temperature: float = 1.0
) -> Loss:
    """Combine cross entropy and divergence; student and teacher (n, V), targets (n,). No teacher is needed for kl 0."""
    student = student.float()
    ce = F.cross_entropy(student, targets, reduction="sum")
    if teacher is None:
        return Loss(ce, ce.detach(), torch.zeros_like(ce.detach()), targets.numel())
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    total = (1 - kl) * ce + kl * temperature**2 * divergence
    return Loss(total, ce.detach(), divergence.detach(), targets.numel())
