"""What trackers hear of a run: the recipe in their configuration, sparsity and zeros, layer errors of a pruning.

The integrations of transformers talk to tensorboard, wandb, mlflow, trackio and others. Each keeps `TrainingArguments` as
the configuration of a run, so the recipe goes there. Tensorboard writes below `runs` in the folder of the output.
"""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from sparsight.errors import Notice, SparsightError, first_line

RUNS = "runs"  # where transformers puts the log of tensorboard
PROJECT = "sparsight"


class RunArguments(TrainingArguments):
    """Training arguments with the recipe of a run before them, in every form that trackers read."""

    recipe: Mapping[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """The recipe's values by dotted names, and the arguments."""
        return {**flat(self.recipe), **super().to_dict()}


class FirstLog(TrainerCallback):
    """Logs values once, when a training begins: what is true of the whole run."""

    def __init__(self, trainer: Any, values: Mapping[str, float]) -> None:
        self.trainer, self.values = trainer, values

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the values, and keep them out of the history that checkpoints save."""
        if self.values:
            self.trainer.callback_handler.on_log(args, state, control, dict(self.values))


class Guard:
    """A tracker whose failures cost no traceback: one that cannot begin is refused, one that fails later is left out."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker
        self.name = type(tracker).__name__.removesuffix("Callback")

    def __getattr__(self, event: str) -> Any:
        inner = getattr(self.tracker, event) if self.tracker is not None else None
        if not event.startswith("on_"):
            return inner

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs) if inner is not None else None
            except Exception as error:  # a server, a disk or another library may fail in any way
                reason = f"{self.name} failed ({first_line(error)})"
                if event in ("on_init_end", "on_train_begin"):
                    raise SparsightError(f"`report_to`: {reason}; mend its settings, or leave it out") from error
                warnings.warn(f"{reason}, and hears no more of this run", Notice, 2)
                self.tracker = None
                return None

        return call


def guard(handler: CallbackHandler, trackers: Sequence[str]) -> None:
    """Put a `Guard` around every tracker of a handler, in place."""
    kinds = tuple(get_reporting_integration_callbacks(list(trackers)))
    handler.callbacks = [Guard(each) if isinstance(each, kinds) else each for each in handler.callbacks]


def flat(settings: Mapping[str, Any], before: str = "sparsight") -> dict[str, Any]:
    """Settings by dotted names, as trackers show them; lists as texts."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{before}.{key}"
        if isinstance(value, Mapping):
            made |= flat(value, name)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, section in enumerate(value, 1):
                made |= flat(section, f"{name}.{number}")
        else:
            made[name] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return made


def zeros_of(body: Any, names: Iterable[str]) -> dict[str, float]:
    """Zeros and sparsity per component of an anatomy's layers, as they are now."""
    counts: dict[str, tuple[int, int]] = {}
    for name in names:
        layer = body[name]
        zeros, parameters = counts.get(layer.component, (0, 0))
        counts[layer.component] = (zeros + layer.zeros, parameters + layer.weight.numel())
    values: dict[str, float] = {}
    for component, (zeros, parameters) in counts.items():
        values |= {f"zeros/{component}": zeros, f"sparsity/{component}": zeros / parameters}
    return values


def pruning_rows(record: Any, body: Any) -> list[dict[str, float]]:
    """What trackers get of a pruning: the errors of layers and of blocks in their order, with zeros and sparsity first."""
    pairs = itertools.zip_longest(record.layer_errors.values(), record.block_errors.values())
    names = ("layer_error", "block_error")
    rows = [{name: value for name, value in zip(names, pair, strict=True) if value is not None} for pair in pairs]
    first = zeros_of(body, [layer.name for layer in body.layers if layer.sparse])
    return [{**first, **(rows[0] if rows else {})}, *rows[1:]]


def report(
    trackers: Sequence[str],
    folder: Path,
    name: str,
    recipe: Mapping[str, Any],
    rows: Callable[[], Sequence[Mapping[str, float]]],
) -> None:
    """Tell trackers of work that is done: the recipe, and one row of values per step.

    A tracker that fails costs a notice and nothing else.
    """
    try:
        arguments = RunArguments(
            output_dir=str(folder), report_to=list(trackers), run_name=name, project=PROJECT, use_cpu=True, disable_tqdm=True
        )
        arguments.recipe = recipe
        callbacks = [kind() for kind in get_reporting_integration_callbacks(list(trackers))]
        handler = CallbackHandler(callbacks, None, None, None, None)
        state, control = TrainerState(), TrainerControl()
        handler.on_train_begin(arguments, state, control)
        for step, row in enumerate(rows()):
            state.global_step = step
            handler.on_log(arguments, state, control, dict(row))
        handler.on_train_end(arguments, state, control)
    except Exception as error:  # a server, a disk or another library may fail in any way
        warnings.warn(f"a tracker of {', '.join(trackers)} failed ({first_line(error)}); the model is written", Notice, 2)


def keep_log(folder: Path, target: Path) -> None:
    """Move the log of tensorboard from the folder of the work into `target`, where there is one."""
    for path in sorted((folder / RUNS).glob("*")):
        (target / RUNS).mkdir(parents=True, exist_ok=True)
        shutil.move(path, target / RUNS / path.name)
