"""What training is told: how long and how fast, what is minimised, and when to look up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers.integrations import get_available_reporting_integrations

from sparsight import processes
from sparsight.errors import SparsightError
from sparsight.restore.losses import DIVERGENCES
from sparsight.settings import check_above_zero, check_choice, check_whole

SCHEDULERS = ("cosine", "linear", "constant")
REDUCTIONS = ("token", "paper")
PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train, and when to look up; `steps` None means `epochs` over the data."""

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    scheduler: str = "cosine"
    warmup: float = 0.03
    seed: int = 0
    save_every: int = 100
    patience: int | None = None
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    report_to: tuple[str, ...] = ()

    def check(self, device: str = "cpu") -> None:
        """Refuse values that cannot train, by the option's name."""
        check_whole("--steps", self.steps, optional=True)
        check_whole("--patience", self.patience, optional=True)
        for option, count in (("--batch-size", self.batch_size), ("--accumulate", self.accumulate)):
            check_whole(option, count)
        check_whole("--save-every", self.save_every)
        for option, amount in (("--lr", self.lr), ("--epochs", self.epochs)):
            check_above_zero(option, amount)
        if not 0 <= self.warmup < 1:
            raise SparsightError(f"--warmup: {self.warmup:g} is not a part of the steps, from 0 to below 1")
        check_choice("--scheduler", self.scheduler, SCHEDULERS)
        check_choice("--mixed-precision", self.mixed_precision, PRECISIONS)
        if self.mixed_precision == "fp16" and torch.device(device).type == "cpu":
            raise SparsightError("--mixed-precision: fp16 needs a GPU, whose gradients can be scaled; use bf16 on a CPU")
        for tracker in self.report_to:
            check_choice("--report-to", tracker, get_available_reporting_integrations(), "installed are")

    @property
    def step_size(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.batch_size * self.accumulate * processes.count()

    def samples(self) -> int | None:
        """The most samples that the steps can use; None where epochs count."""
        return None if self.steps is None else self.steps * self.step_size

    def total(self, samples: int) -> int:
        """The number of optimizer steps."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * samples / self.step_size))


@dataclass(frozen=True)
class Objective:
    """What is minimised; see `losses.py`."""

    kl: float = 0.1
    temperature: float = 1.0
    divergence: str = "forward"
    hidden: float = 0.0
    reduction: str = "token"

    def check(self) -> None:
        if not 0 <= self.kl <= 1:
            raise SparsightError(f"--kl: {self.kl:g} is not a weight from 0 to 1")
        check_above_zero("--temperature", self.temperature)
        if not 0 <= self.hidden < math.inf:
            raise SparsightError(f"--hidden: {self.hidden:g} is not a weight of at least 0")
        check_choice("--divergence", self.divergence, DIVERGENCES)
        check_choice("--reduction", self.reduction, REDUCTIONS)

    @property
    def needs_teacher(self) -> bool:
        return self.kl > 0 or self.hidden > 0
