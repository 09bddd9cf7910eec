"""Train the adapters: a `transformers.Trainer` whose loss is distillation from hidden states at answer positions."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer

from sparsight import distributed
from sparsight.data.encoding import select_answers
from sparsight.data.own_batches import OwnBatches
from sparsight.errors import NotWritten, SparsightError
from sparsight.memory import main_device
from sparsight.model.load import overflow_advice
from sparsight.progress import Progress
from sparsight.restoring.adapters import ADAPTERS
from sparsight.restoring.callbacks import PatienceCallback, ProgressCallback
from sparsight.restoring.checkpoints import (
    factor_tensors,
    go_back,
    is_whole,
    load_factor_tensors,
    load_factors,
    save_factors,
    seal,
)
from sparsight.restoring.collate import Collator, quiet_workers, receive
from sparsight.restoring.losses import POWERS, Loss, answer_weights, distillation
from sparsight.restoring.order import Shuffled
from sparsight.restoring.side_effects import checkpointed_blocks
from sparsight.restoring.student import Student
from sparsight.specs import RestoreSpec
from sparsight.trackers import PROJECT, FirstLog, RunArguments, guard, zeros_of

RATE, WEIGHTS, POWER, MOST = 1e-3, 1.5e8, 0.4, 4e-3  # of the default learning rate


class RestoreTrainer(Trainer):
    """Trains a `Student`. The model stays in eval mode: dropout is off for student and teacher alike."""

    def __init__(self, *, student: Student, spec: RestoreSpec, **kwargs: Any) -> None:
        config = vars(student.wrapped.config)
        cached = {key: config[key] for key in ("use_cache",) if key in config}
        spare = (0, student.samples[0]) if getattr(student.encoder, "skip_bad", False) else None
        self.collator = Collator(student.encoder, student.cache, spare)
        super().__init__(model=student.wrapped, data_collator=self.collator, **kwargs)
        config.pop("use_cache", None)  # the base class switches it off for good, and it would be saved so
        config.update(cached)
        self.student: Student = student
        self.spec = spec
        self.paper, self.power = spec.reduction == "paper", POWERS.get(spec.reduction, 0.0)
        self.model_accepts_loss_kwargs = True  # `compute_loss` divides by all answer tokens of a step
        student.wrapped.eval()
        student.wrapped.train = lambda mode=True: student.wrapped
        self._samples = 1  # of the step under way, over all processes
        self._sums = torch.zeros(4, dtype=torch.float64)  # ce, kl, hidden, tokens since the last log

    def loss(self, model: Any, inputs: Mapping[str, Any], tokens_per_sample: float | None = None) -> Loss:
        """The loss of one batch, in sums."""
        student, shifted = self.student, self.student.encoder.shifted
        inputs = dict(inputs)
        taught, labels = inputs.pop("taught", None), inputs["labels"]
        every = tokens_per_sample is not None
        if student.teacher is not None:
            taught, _ = select_answers(student.teacher(model, inputs), labels, shifted, all_positions=every)
        hidden, targets = select_answers(student.head.hidden(model, inputs), labels, shifted, all_positions=every)
        spec = self.spec
        return distillation(
            hidden, taught, targets, student.head, student.teacher_head, kl=spec.kl or 0.0, temperature=spec.temperature,
            divergence=spec.divergence, hidden=spec.hidden, tokens_per_sample=tokens_per_sample,
            each=answer_weights(labels[:, int(shifted) :], self.power) if self.power else None,
        )  # fmt: skip

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The loss of a batch, divided by the tokens of the step. **Raises** `SparsightError` if it is not finite."""
        loss = self.loss(model, inputs, float(num_items_in_batch) / self._samples if self.paper else None)
        self._check_finite(loss.total, "the loss")
        self._sums += torch.tensor([float(loss.ce), float(loss.kl), float(loss.hidden), loss.tokens], dtype=torch.float64)
        # several processes average their gradients, and each has divided by the answer tokens of all
        total = loss.total * (self.args.world_size / num_items_in_batch)
        return (total, None) if return_outputs else total

    def _check_finite(self, value: torch.Tensor, what: str) -> None:
        """Refuse NaN and infinity; **raises** `SparsightError` with what to do about it."""
        if not torch.isfinite(value):
            lower = f"lower `lr` (it is {self.args.learning_rate:g}), or look at the weights and the samples"
            advice = overflow_advice(self.student.wrapped, lower)
            if self.spec.mixed_precision == "fp16":
                advice = "float16 overflows in this model: use `mixed_precision=bf16` or `mixed_precision=no`"
            step = self.state.global_step
            raise SparsightError(f"{what} became NaN or infinite after step {step}; {advice}; no output was written")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # which is shuffled already

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """Count the answer tokens of a step as the loss does; the base class would shift an encoder-decoder's labels."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        batches = [receive(batch, self.student.encoder) for batch in batches]
        counts = torch.tensor([self._count(batches)], device=self.args.device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts)
        tokens, self._samples = counts.sum(0).tolist()
        return batches, torch.tensor(max(tokens, 1), device=self.args.device)

    def _count(self, batches: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
        """Answer tokens or the sum of their weights, and samples."""
        labels = [batch["labels"][:, int(self.student.encoder.shifted) :] for batch in batches]
        if self.power:
            tokens = sum(float(answer_weights(each, self.power).sum()) for each in labels)
        else:
            tokens = sum(int((each != -100).sum()) for each in labels)
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
            mine = start + distributed.rank()
            places = batches[mine] if mine < len(batches) else batches[-1]
            with self.compute_loss_context_manager():
                inputs = self._prepare_inputs(receive(self.collator([held[i] for i in places]), self.student.encoder))
                tokens, rows = self._count([inputs])
                loss = self.loss(self.model_wrapped, inputs, tokens / rows if self.paper else None)
            self._check_finite(loss.total, "the loss of held-out samples")
            if mine < len(batches):
                parts = [float(part) for part in (loss.total, loss.ce, loss.kl, loss.hidden)]
                sums += torch.tensor([*parts, loss.tokens], dtype=torch.float64, device=sums.device)
        if world > 1:
            torch.distributed.all_reduce(sums)
        total, ce, kl, hidden, tokens = sums.tolist()
        means = {"loss": total / tokens, "ce": ce / tokens, "kl": kl / tokens}
        if self.spec.hidden:
            means["hidden"] = hidden / tokens
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        if self.state.global_step == 0:  # what training starts from has to be beaten
            self.state.best_metric, self.state.best_global_step = means["loss"], 0
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the parts of the loss per answer token since the last log."""
        if self._sums[3] and "loss" in logs:
            sums = self._sums.to(self.args.device)
            if self.args.world_size > 1:
                torch.distributed.all_reduce(sums)
            ce, kl, hidden, tokens = sums.tolist()
            logs |= {"ce": ce / tokens, "kl": kl / tokens}
            if self.spec.hidden:
                logs["hidden"] = hidden / tokens
            self._sums.zero_()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        distributed.barrier()
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
        if not distributed.on_main(lambda: is_whole(best)):
            raise NotWritten(f"{best}: the best checkpoint is damaged, so that nothing was written")
        load_factors(self.model, best)


def step_size(spec: RestoreSpec) -> int:
    """Samples of one optimizer step, over all processes."""
    return spec.rows * spec.accumulate * distributed.world_size()


def peak_rate(spec: RestoreSpec, weights: int) -> float:
    """The learning rate of the settings, else one for the adapter and so many weights: 4e-3 for 3 million, 2e-4 for 7B."""
    if spec.lr is not None:
        return spec.lr
    rate = min(RATE * (WEIGHTS / max(1, weights)) ** POWER, MOST)
    return float(f"{rate * ADAPTERS[spec.adapter].rate:.2g}")


def total_steps(spec: RestoreSpec, samples: int) -> int:
    """The number of optimizer steps on so many training samples."""
    return spec.steps or max(1, math.ceil(spec.epochs * samples / step_size(spec)))


def train(
    student: Student, spec: RestoreSpec, folder: Path, *, resume: bool = False, progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the student's adapters in place; checkpoints go into `folder`.

    With `resume` it continues from the last good checkpoint there. With held-out samples their loss is measured before the
    first step and at every checkpoint, and the adapters end with the best values, those of the start among them. Trackers
    get `recipe` as their configuration, and zeros and sparsity per component. Returns `lr`, the peak learning rate; `curve`,
    a row per logged step with `step`, `loss`, `ce`, `kl`, `learning_rate`; with held-out samples `held_out`, a row per
    evaluation, and `best_step`, 0 for the start.
    """
    numbered = list(enumerate(student.samples))
    learned, held = numbered[: len(numbered) - student.held_out], numbered[len(numbered) - student.held_out :]
    total, rate = total_steps(spec, len(learned)), peak_rate(spec, student.weights)
    step = step_size(spec)
    divided = step > spec.rows and not isinstance(student.encoder, OwnBatches)
    order = Shuffled(learned, total * step, spec.seed, step if divided else 1)
    checkpoint = distributed.on_main(lambda: go_back(folder)) if resume else None
    workers = 0 if isinstance(student.encoder, OwnBatches) else spec.workers  # batches of the user's are ready
    arguments = RunArguments(
        output_dir=str(folder),
        per_device_train_batch_size=spec.rows,
        gradient_accumulation_steps=spec.accumulate,
        max_steps=total,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup" if spec.scheduler == "constant" else str(spec.scheduler),
        warmup_steps=round((spec.warmup or 0.0) * total),
        weight_decay=0.0,
        max_grad_norm=spec.clip or 0.0,
        seed=spec.seed,
        logging_steps=max(1, total // 100),
        save_steps=spec.save_every,
        save_total_limit=2,
        eval_strategy="steps" if held else "no",
        eval_steps=spec.save_every,
        eval_on_start=bool(held) and checkpoint is None,
        load_best_model_at_end=bool(held),
        metric_for_best_model="eval_loss" if held else None,
        greater_is_better=False if held else None,
        report_to=list(spec.report_to) or "none",
        run_name=folder.name.removesuffix(".unfinished"),
        project=PROJECT,
        remove_unused_columns=False,
        label_names=["labels"],
        bf16=spec.mixed_precision == "bf16",
        fp16=spec.mixed_precision == "fp16",
        use_cpu=main_device(spec.device).type == "cpu",
        dataloader_pin_memory=main_device(spec.device).type == "cuda",
        dataloader_num_workers=workers,
        disable_tqdm=True,
        ddp_broadcast_buffers=False,  # the masks are the same everywhere and never change
        ddp_find_unused_parameters=True,  # the last blocks of some vision towers do not reach the output
    )
    arguments.recipe = recipe or {"restore": spec.facts()}
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one GPU; more would silently multiply the batch
    watching = ProgressCallback(progress)
    with _sharding(student), watching.listening(), quiet_workers(workers), warnings.catch_warnings():
        # accelerate passes torch's DistributedDataParallel an option by its older name
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        trainer = RestoreTrainer(student=student, spec=spec, args=arguments, train_dataset=order, eval_dataset=held or None)
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                trainer.remove_callback(callback)
        trainer.add_callback(watching)
        if spec.report_to:
            guard(trainer.callback_handler, spec.report_to)
            trainer.add_callback(FirstLog(trainer, zeros_of(student.anatomy, student.plan)))
        if spec.patience and held:
            trainer.add_callback(PatienceCallback(spec.patience))
        start = factor_tensors(student.wrapped) if held else {}  # the same on every run, a resumed one too
        with checkpointed_blocks(student.wrapped) if spec.gradient_checkpointing else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if held and not trainer.state.best_global_step:
            load_factor_tensors(trainer.model, start)
    history = trainer.state.log_history
    facts: dict[str, Any] = {"lr": rate, "curve": [row for row in history if "ce" in row]}
    if held:
        facts["held_out"] = [row for row in history if "eval_loss" in row]
        facts["best_step"] = trainer.state.best_global_step or 0
    return facts


@contextlib.contextmanager
def _sharding(student: Student) -> Iterator[None]:
    """For FSDP, name the classes of the blocks to accelerate, and refuse data that would make processes wait forever.

    The model's own list of classes, accelerate's default, may name some that the model does not have.
    """
    name, before = "FSDP_TRANSFORMER_CLS_TO_WRAP", os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if not distributed.sharded():
        yield
        return
    if len({bool(sample.images) for sample in student.samples}) > 1:
        raise SparsightError(
            "`data`: some samples have images and some have none; a sharded model needs every process in every block, so "
            "leave FSDP out (DDP takes them), or give one kind"
        )
    os.environ[name] = before or ",".join(sorted({type(block.module).__name__ for block in student.anatomy.blocks}))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
