"""Train the adapters: a `transformers.Trainer` whose loss is distillation from hidden states at answer positions."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsight import processes
from sparsight.data.encoding import answers_of
from sparsight.errors import NotWritten, SparsightError
from sparsight.restore.callbacks import Patience, Progress
from sparsight.restore.checkpoints import factor_tensors, go_back, is_whole, load_factors, save_factors, seal
from sparsight.restore.losses import Loss, distillation
from sparsight.restore.schedule import Objective, Schedule
from sparsight.restore.student import Student


class Shuffled(Sequence):
    """What training sees, in order: `length` samples, pass after pass over all of them, each pass in an order of its own.

    A step is never cut short by the end of a pass, so it is the same on one process and on several.
    """

    def __init__(self, numbered: Sequence[tuple[int, Any]], length: int, seed: int) -> None:
        self.numbered, self.length, self.seed = numbered, length, seed
        self._pass = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        turn, i = divmod(place, len(self.numbered))
        if turn != self._pass:
            order = list(range(len(self.numbered)))
            random.Random(f"{self.seed} {turn}").shuffle(order)
            self._pass, self._order = turn, order
        return self.numbered[self._order[i]]


class RestoreTrainer(Trainer):
    """Trains a `Student`. The model stays in eval mode: dropout is off for student and teacher alike."""

    def __init__(self, *, student: Student, objective: Objective, **kwargs: Any) -> None:
        super().__init__(model=student.wrapped, data_collator=self.collate, **kwargs)
        self.student: Student = student
        self.objective: Objective = objective
        self.paper = objective.reduction == "paper"
        self.model_accepts_loss_kwargs = True  # the loss below divides by all answer tokens of a step by itself
        student.wrapped.eval()
        student.wrapped.train = lambda mode=True: student.wrapped
        self._samples = 1  # of the step under way, over all processes
        self._sums = torch.zeros(4, dtype=torch.float64)  # ce, kl, hidden, tokens since the last log

    def collate(self, numbered: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """Encode samples, and look up what the teacher says to them."""
        inputs = dict(self.student.encoder.encode([sample for _, sample in numbered]).inputs)
        if self.student.cache is not None:
            inputs["taught"] = torch.cat([self.student.cache[number] for number, _ in numbered])
        return inputs

    def loss(self, model: Any, inputs: Mapping[str, Any], tokens_per_sample: float | None = None) -> Loss:
        """The loss of one batch, in sums."""
        student, shifted = self.student, self.student.encoder.shifted
        inputs = dict(inputs)
        taught, labels = inputs.pop("taught", None), inputs["labels"]
        every = tokens_per_sample is not None
        if student.teacher is not None:
            taught, _ = answers_of(student.teacher(model, inputs), labels, shifted, every=every)
        hidden, targets = answers_of(student.head.hidden(model, inputs), labels, shifted, every=every)
        how = self.objective
        return distillation(
            hidden, taught, targets, student.head, student.teacher_head, kl=how.kl, temperature=how.temperature,
            divergence=how.divergence, hidden=how.hidden, tokens_per_sample=tokens_per_sample,
        )  # fmt: skip

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss = self.loss(model, inputs, float(num_items_in_batch) / self._samples if self.paper else None)
        if not torch.isfinite(loss.total):
            raise SparsightError(
                f"the loss became NaN or infinite after step {self.state.global_step}; lower --lr "
                f"(it is {self.args.learning_rate:g}); no output was written"
            )
        self._sums += torch.tensor([float(loss.ce), float(loss.kl), float(loss.hidden), loss.tokens], dtype=torch.float64)
        # several processes average their gradients, and each has divided by the answer tokens of all
        total = loss.total * (self.args.world_size / num_items_in_batch)
        return (total, None) if return_outputs else total

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # which is shuffled already

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """Count the answer tokens of a step as the loss does; the base class would shift an encoder-decoder's labels."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = torch.tensor([self._count(batches)], device=self.args.device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts)
        tokens, self._samples = counts.sum(0).tolist()
        return batches, torch.tensor(max(tokens, 1), device=self.args.device)

    def _count(self, batches: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
        """Answer tokens, and samples."""
        shift = int(self.student.encoder.shifted)
        tokens = sum(int((batch["labels"][:, shift:] != -100).sum()) for batch in batches)
        return tokens, sum(len(batch["labels"]) for batch in batches)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss per answer token of the held-out samples, exactly once each, over all processes."""
        held: Any = eval_dataset or self.eval_dataset
        size, world = self.args.per_device_train_batch_size, self.args.world_size
        batches = [range(start, min(start + size, len(held))) for start in range(0, len(held), size)]
        sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        for start in range(0, len(batches), world):  # a sharded model needs every process in every forward
            mine = start + processes.rank()
            chosen = batches[mine] if mine < len(batches) else batches[-1]
            with self.compute_loss_context_manager():
                inputs = self._prepare_inputs(self.collate([held[i] for i in chosen]))
                tokens, rows = self._count([inputs])
                loss = self.loss(self.model_wrapped, inputs, tokens / rows if self.paper else None)
            if mine < len(batches):
                found = [float(part) for part in (loss.total, loss.ce, loss.kl, loss.hidden)]
                sums += torch.tensor([*found, loss.tokens], dtype=torch.float64, device=sums.device)
        if world > 1:
            torch.distributed.all_reduce(sums)
        total, ce, kl, hidden, tokens = sums.tolist()
        means = {"loss": total / tokens, "ce": ce / tokens, "kl": kl / tokens}
        if self.objective.hidden:
            means["hidden"] = hidden / tokens
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._sums[3] and "loss" in logs:
            sums = self._sums.to(self.args.device)
            if self.args.world_size > 1:
                torch.distributed.all_reduce(sums)
            ce, kl, hidden, tokens = sums.tolist()
            logs |= {"ce": ce / tokens, "kl": kl / tokens}
            if self.objective.hidden:
                logs["hidden"] = hidden / tokens
            self._sums.zero_()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        processes.wait()
        if self.args.should_save:
            seal(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the factors, which every process has to gather where they are sharded."""
        tensors = factor_tensors(self.model)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_factors(tensors, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_factors(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not processes.by_main(lambda: is_whole(best)):
            raise NotWritten(f"{best}: the best checkpoint is damaged, so that nothing was written")
        load_factors(self.model, best)


def train(
    student: Student,
    objective: Objective,
    schedule: Schedule,
    folder: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Train the student's adapters in place; checkpoints go into `folder`.

    With `resume` it goes on from the last good checkpoint there. With held-out samples their loss is taken at every
    checkpoint, and the best one is what is left in the adapters. Returns `curve`, a row per logged step with `step`,
    `loss`, `ce`, `kl`, `learning_rate`; with held-out samples `held_out`, a row per evaluation, and `best_step`.
    """
    numbered = list(enumerate(student.samples))
    learned, held = numbered[: len(numbered) - student.held_out], numbered[len(numbered) - student.held_out :]
    total = schedule.total(len(learned))
    seen = Shuffled(learned, total * schedule.step_size, schedule.seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulate,
        max_steps=total,
        learning_rate=schedule.lr,
        lr_scheduler_type="constant_with_warmup" if schedule.scheduler == "constant" else schedule.scheduler,
        warmup_steps=round(schedule.warmup * total),
        weight_decay=0.0,
        seed=schedule.seed,
        logging_steps=max(1, total // 100),
        save_steps=schedule.save_every,
        save_total_limit=2,
        eval_strategy="steps" if held else "no",
        eval_steps=schedule.save_every,
        load_best_model_at_end=bool(held),
        metric_for_best_model="eval_loss" if held else None,
        greater_is_better=False if held else None,
        report_to=list(schedule.report_to) or "none",
        run_name=folder.name.removesuffix(".unfinished"),
        remove_unused_columns=False,
        label_names=["labels"],
        bf16=schedule.mixed_precision == "bf16",
        fp16=schedule.mixed_precision == "fp16",
        use_cpu=torch.device(device).type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_broadcast_buffers=False,  # the masks are the same everywhere and never change
        ddp_find_unused_parameters=True,  # the last blocks of some vision towers do not reach the output
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one GPU; more would silently multiply the batch
    watching = Progress(progress)
    with _sharding(student), watching.listening(), warnings.catch_warnings():
        # accelerate passes torch's DistributedDataParallel an option by its older name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        trainer = RestoreTrainer(
            student=student, objective=objective, args=arguments, train_dataset=seen, eval_dataset=held or None
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                trainer.remove_callback(callback)
        trainer.add_callback(watching)
        if schedule.patience and held:
            trainer.add_callback(Patience(schedule.patience))
        if schedule.gradient_checkpointing:
            checkpoint_blocks(student.wrapped)
        found = processes.by_main(lambda: go_back(folder)) if resume else None
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    history = trainer.state.log_history
    facts: dict[str, Any] = {"curve": [row for row in history if "ce" in row]}
    if held:
        facts["held_out"] = [row for row in history if "eval_loss" in row]
        facts["best_step"] = trainer.state.best_global_step
    return facts


@contextlib.contextmanager
def _sharding(student: Student) -> Iterator[None]:
    """Where accelerate shards the model (FSDP): tell it what a block is, and refuse data that would make processes wait.

    It would take the classes from the model's own list, which names some that a model may not have.
    """
    name, before = "FSDP_TRANSFORMER_CLS_TO_WRAP", os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or processes.count() == 1:
        yield
        return
    if len({bool(sample.images) for sample in student.samples}) > 1:
        raise SparsightError(
            "--data: some samples have images and some have none; a sharded model needs every process in every block, so "
            "leave FSDP out (DDP takes them), or give one kind"
        )
    os.environ[name] = before or ",".join(sorted({type(block.module).__name__ for block in student.anatomy.blocks}))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def checkpoint_blocks(wrapped: Any) -> None:
    """Keep only the inputs of blocks for backward, which runs them again.

    transformers checkpoints blocks in training mode only. That mode is given to the blocks alone, not to what is inside
    them, and the dropout that a few of them do themselves is set to zero.
    """
    base = wrapped.get_base_model()  # the name is newer than the oldest transformers that will do
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for block in wrapped.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.training = True
            for name, value in vars(block).items():
                if "dropout" in name and isinstance(value, float):
                    setattr(block, name, 0.0)
