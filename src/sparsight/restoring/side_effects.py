"""What training changes beside the weights, put back: the modes of a user's models, and the state of the process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from sparsight.calibration.gradients import evaluating
from sparsight.model.matrices import output_head


@contextlib.contextmanager
def unchanged(*models: Any) -> Iterator[None]:
    """Put models into eval mode inside the block; modes, `requires_grad` and hooks of the output head are put back after it.

    A head's hooks are left where training fails.
    """
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
    hooks = [
        (head._forward_pre_hooks, set(head._forward_pre_hooks)) for head in map(output_head, models) if head is not None
    ]
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        try:
            yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)
            for now, before in hooks:
                for key in now.keys() - before:
                    del now[key]


@contextlib.contextmanager
def unchanged_process(device: torch.device | str) -> Iterator[None]:
    """Put back what a `Trainer` sets for the whole process: the seeds, and the state that every `Accelerator` reads."""
    kinds: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
    states = [(kind._shared_state, dict(kind._shared_state)) for kind in kinds]
    numbers, words = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numbers)
            random.setstate(words)
            for now, before in states:
                now.clear()
                now.update(before)
