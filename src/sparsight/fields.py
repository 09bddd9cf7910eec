"""Fields that the settings of several verbs share, and what one of them means for another."""

from __future__ import annotations

import math
from typing import Annotated, Any

from sparsight.checks import SEEDS
from sparsight.errors import SparsightError
from sparsight.options import Option, count

Seed = Annotated[
    int,
    Option(
        "Same seed, same command: the same bytes.",
        fits=lambda value: isinstance(value, int) and 0 <= value < SEEDS,
        says=f"a whole number from 0 to {SEEDS - 1}",
    ),
]
BatchSize = Annotated[int, count("Samples per batch.", cost=True)]
Workers = Annotated[
    int,
    Option(
        "Processes beside the training that read and encode the next batches; 0: the training does it itself.",
        fits=lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        says="a whole number of at least 0",
        cost=False,
        work=False,
    ),
]
Samples = Annotated[int | None, count("How many samples to draw from the data. [default: all]", cost=True)]
Split = Annotated[str | None, Option("Split to read, of data that has several. [default: train]", cost=True, work=None)]
_SCORED = "[default: test, else validation; never train]"
ScoredSplit = Annotated[str | None, Option(f"Split to read, of data that has several. {_SCORED}", cost=True, work=None)]
HeldOutSplit = Annotated[str | None, Option(f"Split of the held-out data to read. {_SCORED}", work=None)]
NEW_TOKENS = 32
NewTokens = Annotated[
    int | None, count(f"Longest answer, in tokens. [default: {NEW_TOKENS}, or that of the task]", cost=True)
]
ReportTo = Annotated[
    tuple[str, ...],
    Option(
        "Trackers: tensorboard, wandb or any other that transformers supports.",
        ("transformers.integrations:get_available_reporting_integrations",),
        work=False,
    ),
]
TASKS = "sparsight.tasks:TASKS"
Task = Annotated[str | None, Option("Benchmark, read, asked and scored as it was published: {names}.", (TASKS,), work=None)]
Prompt = Annotated[
    str | None,
    Option("Ask in these words, with {question} and, for letters, {options}. [default: by type of model]", work=None),
]
LengthPenalty = Annotated[
    float | None,
    Option(
        "A beam's score is divided by its length to this power: below 0 for short answers. [default: 1, or the task's]",
        fits=math.isfinite,
        says="a finite number",
        work=None,
    ),
]
HeldOutTask = Annotated[str | None, Option("The held-out data is this benchmark: {names}.", (TASKS,), work=None)]
HeldOutPrompt = Annotated[
    str | None,
    Option("Ask it in these words, with {question} and, for letters, {options}. [default: by type of model]", work=None),
]


def check_task(spec: Any, prefix: str, own: Any = "") -> None:
    """Refuse a prompt without a task, and metrics of the user's `own` beside one. **Raises** `SparsightError`."""
    task = getattr(spec, f"{prefix}task")
    if task is None and getattr(spec, f"{prefix}prompt") is not None:
        raise SparsightError(f"`{prefix}prompt`: is for a benchmark; name it with `{prefix}task`, or leave it out")
    if task is not None and own:
        raise SparsightError(f"`{own}`: the task {task} is scored by its own; leave one of the two out")
    if getattr(spec, "length_penalty", None) is not None and (spec.beams == 1 or (spec.beams is None and task is None)):
        raise SparsightError("`length_penalty`: changes nothing without beams; set `beams`, or leave it out")


def check_held_out(spec: Any) -> None:
    """Refuse a split or a task of held-out data where none is named. **Raises** `SparsightError`."""
    for field in ("held_out_split", "held_out_task"):
        if getattr(spec, field) and (spec.held_out is None or str(spec.held_out).isdigit()):
            raise SparsightError(f"`{field}`: needs data of its own to read from; name it with `held_out`")
    check_task(spec, "held_out_")


def check_training(spec: Any) -> None:
    """Refuse settings of a restoration that contradict each other. **Raises** `SparsightError`."""
    if not spec.tune:
        raise SparsightError("`tune`: names no component; give some of vision, connector, language")
    if spec.mixed_precision == "fp16" and spec.device == "cpu":
        raise SparsightError(
            "`mixed_precision`: fp16 needs a GPU, whose gradients can be scaled; use bf16 on a CPU"
        )  # fmt: skip
    if spec.save_adapter and spec.reconstruct:
        raise SparsightError(
            "`save_adapter`: its layers were fitted before it was trained, so it would not fit the sparse model; "
            "leave it or `reconstruct` out"
        )
    check_held_out(spec)
    if spec.steps == 0 and not spec.reconstruct:
        raise SparsightError("`steps`: 0 trains nothing; say with `reconstruct` how long to fit the blocks")
    if spec.steps == 0 and (idle := [n for n in ("held_out", "save_adapter", "report_to") if getattr(spec, n)]):
        raise SparsightError(f"`{idle[0]}`: is of training, and `steps` is 0; leave one of the two out")
    if spec.patience and spec.held_out is None:
        raise SparsightError("`patience`: needs held-out samples to measure a loss on; name some with `held_out`")
