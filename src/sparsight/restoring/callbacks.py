"""Callbacks of the training of adapters: progress, Ctrl-C and SIGTERM, and patience."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from sparsight import distributed, signals


class ProgressCallback(TrainerCallback):
    """Reports every step; after Ctrl-C or SIGTERM, ends the training with a checkpoint at the end of the step.

    A `KeyboardInterrupt` inside a destructor or another library's callback is lost; a flag is not. A second signal stops
    at once.
    """

    def __init__(self, report: Callable[[str, int, int], None] | None) -> None:
        self.report, self.note, self.held_out, self.stop = report, "restore", "", False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch Ctrl-C and SIGTERM inside the block, in the main thread only.

        **Raises** `KeyboardInterrupt` at the end if one came, here or in another process.
        """

        def hear(_: KeyboardInterrupt) -> None:
            self.stop = True

        with signals.listening(hear) as stops:
            yield
        if self.stop:
            raise stops.stop or KeyboardInterrupt

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        """Keep the latest losses for the next report."""
        if logs and "ce" in logs:
            self.note = f"restore · ce {logs['ce']:.3f} · kl {logs['kl']:.3f}"
        if logs and "eval_loss" in logs:
            self.held_out = f" · held out {logs['eval_loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step, evaluate after the last one, and stop after Ctrl-C or SIGTERM."""
        if self.report:
            self.report(self.note + self.held_out, state.global_step, state.max_steps)
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True
        if self._stop_anywhere(args.device):
            control.should_save = control.should_training_stop = True

    def _stop_anywhere(self, device: Any) -> bool:
        """Whether any process received a signal: all of them stop after the same step."""
        if distributed.world_size() > 1:
            stops = torch.tensor(float(self.stop), device=device)
            torch.distributed.all_reduce(stops)
            anywhere = bool(stops > 0)
            self.stop = self.stop or anywhere  # a signal that came meanwhile is for the next step
            return anywhere
        return self.stop


class PatienceCallback(TrainerCallback):
    """Stops after `patience` evaluations without a better one; the count is in the history, which checkpoints save."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def over(self, state: Any) -> bool:
        """Whether the last `patience` evaluations are all worse than the best."""
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop once the patience is over."""
        control.should_training_stop = control.should_training_stop or self.over(state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop at once where a resumed run's patience is over."""
        self.on_evaluate(args, state, control)
