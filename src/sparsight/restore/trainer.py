"""Train the adapters: a `transformers.Trainer` whose loss is distillation on answer positions."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparsight.data.encoding import Encoder, answers_of
from sparsight.errors import SparsightError
from sparsight.plan.budget import nearest
from sparsight.restore.losses import distillation
from sparsight.restore.sparse_lora import ADAPTER, adapters
from sparsight.restore.teacher import Teacher
from sparsight.settings import check_above_zero, check_whole

SCHEDULERS = ("cosine", "linear", "constant")
COMPLETE = "complete"  # a file that a checkpoint gets last
ADAPTER_FILE = "sparse_lora.safetensors"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; `steps` None means `epochs` over the data."""

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    scheduler: str = "cosine"
    warmup: float = 0.03
    kl: float = 0.1
    temperature: float = 1.0
    seed: int = 0
    save_every: int = 100

    def check(self) -> None:
        """Refuse values that cannot train, by the option's name."""
        check_whole("--steps", self.steps, optional=True)
        for option, count in (("--batch-size", self.batch_size), ("--accumulate", self.accumulate)):
            check_whole(option, count)
        check_whole("--save-every", self.save_every)
        for option, amount in (("--lr", self.lr), ("--epochs", self.epochs), ("--temperature", self.temperature)):
            check_above_zero(option, amount)
        if not 0 <= self.kl <= 1:
            raise SparsightError(f"--kl: {self.kl:g} is not a weight from 0 to 1")
        if self.scheduler not in SCHEDULERS:
            raise SparsightError(f"--scheduler: unknown {self.scheduler!r}; {nearest(self.scheduler, SCHEDULERS)}")

    def total(self, samples: int) -> int:
        """The number of optimizer steps."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * samples / (self.batch_size * self.accumulate)))


class RestoreTrainer(Trainer):
    """Student: the wrapped model. The model stays in eval mode: dropout is off for student and teacher alike."""

    def __init__(self, *, teacher: Teacher | None, shifted: bool, schedule: Schedule, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher, self.shifted, self.schedule = teacher, shifted, schedule
        self.model_accepts_loss_kwargs = True  # the loss below divides by all answer tokens of a step by itself
        self._apart = {"ce": 0.0, "kl": 0.0, "tokens": 0}

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if model.training:
            model.eval()
        labels = inputs["labels"]
        if self.shifted:  # the model need not compute a loss of its own; an encoder-decoder feeds its decoder with them
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        taught = None
        if self.teacher is not None:
            taught, _ = answers_of(self.teacher(inputs), labels, self.shifted)
        output = model(**inputs, use_cache=False)
        student, targets = answers_of(output.logits, labels, self.shifted)
        loss = distillation(student, taught, targets, self.schedule.kl, self.schedule.temperature)
        if not torch.isfinite(loss.total):
            raise SparsightError(
                f"the loss became NaN or infinite after step {self.state.global_step}; lower --lr "
                f"(it is {self.schedule.lr:g}); no output was written"
            )
        self._apart["ce"] += float(loss.ce)
        self._apart["kl"] += float(loss.kl)
        self._apart["tokens"] += loss.tokens
        total = loss.total / (num_items_in_batch if num_items_in_batch is not None else loss.tokens)
        return (total, output) if return_outputs else total

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """Count the answer tokens of a step as the loss does; the base class would shift an encoder-decoder's labels."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = sum(int((b["labels"][:, int(self.shifted) :] != -100).sum()) for b in batches)
        return batches, torch.tensor(count, device=self.args.device) if count else None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._apart["tokens"] and "loss" in logs:
            logs["ce"] = self._apart["ce"] / self._apart["tokens"]
            logs["kl"] = self._apart["kl"] / self._apart["tokens"]
            self._apart = {"ce": 0.0, "kl": 0.0, "tokens": 0}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the adapters in our own file: stock PEFT would take its own format for a dense LoRA."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(adapter_tensors(self.model), folder / ADAPTER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_tensors(model or self.model, load_file(Path(resume_from_checkpoint) / ADAPTER_FILE))


class _Progress(TrainerCallback):
    """Reports every step, and ends the training after the step in which Ctrl-C came, with a checkpoint.

    A `KeyboardInterrupt` that strikes inside a destructor or a foreign callback is lost; a flag is not. A second Ctrl-C
    stops at once.
    """

    def __init__(self, report: Callable[[str, int, int], None] | None) -> None:
        self.report, self.note, self.stop = report, "restore", False

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

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.report:
            self.report(self.note, state.global_step, state.max_steps)
        if self.stop:
            control.should_save = control.should_training_stop = True


def train(
    wrapped: Any,
    teacher: Teacher | None,
    samples: Sequence[Any],
    encoder: Encoder,
    schedule: Schedule,
    folder: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, float]]:
    """Train the adapters of `wrapped` in place; checkpoints go into `folder`.

    With `resume` it goes on from the last checkpoint there. Returns the loss curve: a row per logged step with `step`,
    `loss`, `ce`, `kl`, `learning_rate`.
    """
    total = schedule.total(len(samples))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulate,
        max_steps=total,
        learning_rate=schedule.lr,
        lr_scheduler_type=schedule.scheduler,
        warmup_steps=round(schedule.warmup * total),
        weight_decay=0.0,
        seed=schedule.seed,
        logging_steps=max(1, total // 100),
        save_steps=schedule.save_every,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=torch.device(device).type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one GPU; more would silently multiply the batch
    trainer = RestoreTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=samples,
        data_collator=lambda chosen: encoder.encode(chosen).inputs,
        teacher=teacher,
        shifted=encoder.shifted,
        schedule=schedule,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    watching = _Progress(progress)
    trainer.add_callback(watching)
    with watching.listening():
        trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume else None)
    return [row for row in trainer.state.log_history if "ce" in row]


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    done = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(done, key=lambda path: int(path.name.rpartition("-")[2]))) if done else None


def adapter_tensors(wrapped: Any) -> dict[str, torch.Tensor]:
    """A and B of every adapted layer, on the CPU, keyed `LAYER.A` and `LAYER.B`."""
    return {key: tensor.detach().cpu().clone() for key, tensor in _factors(wrapped).items()}


@torch.no_grad()
def load_adapter_tensors(wrapped: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put A and B back, in place; every layer must be there with the same rank."""
    for key, factor in _factors(wrapped).items():
        found = tensors.get(key)
        if found is None or found.shape != factor.shape:
            raise SparsightError(f"the adapter file has no {key} of shape {tuple(factor.shape)}; it is of another model")
        factor.copy_(found)


def _factors(wrapped: Any) -> dict[str, torch.nn.Parameter]:
    factors = {}
    for name, layer in adapters(wrapped).items():
        factors[f"{name}.A"] = cast(torch.nn.Parameter, layer.lora_A[ADAPTER].weight)
        factors[f"{name}.B"] = cast(torch.nn.Parameter, layer.lora_B[ADAPTER].weight)
    return factors
