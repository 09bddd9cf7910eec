"""What listens while adapters are trained: progress, Ctrl-C, and patience."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from sparsight import processes


class Progress(TrainerCallback):
    """Reports every step, and ends the training after the step in which Ctrl-C came, with a checkpoint.

    A `KeyboardInterrupt` that strikes inside a destructor or a foreign callback is lost; a flag is not. A second Ctrl-C
    stops at once.
    """

    def __init__(self, report: Callable[[str, int, int], None] | None) -> None:
        self.report, self.note, self.held, self.stop = report, "restore", "", False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for Ctrl-C, which only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def hear(*_: Any) -> None:
            self.stop = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.stop:
            raise KeyboardInterrupt

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "ce" in logs:
            self.note = f"restore · ce {logs['ce']:.3f} · kl {logs['kl']:.3f}"
        if logs and "eval_loss" in logs:
            self.held = f" · held out {logs['eval_loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.report:
            self.report(self.note + self.held, state.global_step, state.max_steps)
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        if self._heard(args.device):
            control.should_save = control.should_training_stop = True

    def _heard(self, device: Any) -> bool:
        """Whether any process heard Ctrl-C: all of them stop after the same step."""
        if processes.count() > 1:
            heard = torch.tensor(float(self.stop), device=device)
            torch.distributed.all_reduce(heard)
            self.stop = bool(heard > 0)
        return self.stop


class Patience(TrainerCallback):
    """Stops after so many evaluations without a better one; they are counted in the history, which a checkpoint keeps."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def over(self, state: Any) -> bool:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.over(state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_evaluate(args, state, control)
