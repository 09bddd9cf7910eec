"""What training changes beside the weights, put back: the modes of a user's models, and the state of the process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsight.calibration.gradients import evaluating
from sparsight.memory import main_device
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
    device = main_device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numbers)
            random.setstate(words)
            for now, before in states:
                now.clear()
                now.update(before)


@contextlib.contextmanager
def checkpointed_blocks(wrapped: Any) -> Iterator[None]:
    """Keep only the inputs of blocks for backward, which runs them again; afterwards the model is as it was.

    transformers checkpoints blocks in training mode only. Only the blocks themselves get that mode, not the modules inside
    them, and their own dropout rates are set to zero.
    """
    base = wrapped.get_base_model()  # the oldest supported transformers has the older name
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
    marks = [
        (module, {k: v for k, v in vars(module).items() if "gradient_checkpointing" in k or "_require_grads_hook" in k})
        for module in base.modules()
    ]
    enable({"use_reentrant": False})
    base.disable_input_require_grads()  # only the reentrant kind needs hooks on inputs, and `disable` would leave them
    before = []
    for block in wrapped.modules():
        if isinstance(block, GradientCheckpointingLayer):
            rates = {name: x for name, x in vars(block).items() if "dropout" in name and isinstance(x, float)}
            before.append((block, {"training": block.training, **rates}))
            block.training = True
            vars(block).update(dict.fromkeys(rates, 0.0))
    try:
        yield
    finally:
        disable()
        for module, own in marks:
            vars(module).update(own)
        for block, values in before:
            for name, value in values.items():
                setattr(block, name, value)
