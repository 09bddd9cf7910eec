"""How to prune, put together from the tables of methods: score, select, refine the mask, update the kept weights,
reconstruct the block. What makes no sense together is refused here, by name, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsight.errors import SparsightError
from sparsight.plan.budget import nearest
from sparsight.plan.pattern import Pattern
from sparsight.prune.methods import PRESETS, Method, Refine, Update, find_method, find_refine, find_update
from sparsight.prune.moments import Moments
from sparsight.prune.tokens import TokenRule, find_tokens
from sparsight.settings import name_of

PROPAGATE = ("dense", "block", "stage")


@dataclass(frozen=True)
class Choice:
    """One way of pruning. `reconstruct` counts epochs; `permute` reorders channels first, for n:m."""

    method: Method
    refine: Refine | None
    update: Update | None
    tokens: TokenRule
    reconstruct: int = 0
    permute: bool = False
    propagate: str = "block"

    @property
    def needs(self) -> frozenset[str]:
        wanted = self.method.needs | frozenset(n for step in (self.refine, self.update) if step for n in step.needs)
        return wanted | ({"norm"} if self.reconstruct or self.permute else set())

    @property
    def mask_only(self) -> bool:
        """Whether the kept weights stay as they were, in their places."""
        return self.method.mask_only and not (self.update or self.reconstruct or self.permute)

    def prune(self, W: torch.Tensor, moments: Moments | None, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
        """The steps for one weight (out, in)."""
        pruned = self.method.prune(W.clone(), moments, pattern, generator=generator)
        if (self.refine is None and self.update is None) or moments is None:
            return pruned
        keep = pruned != 0
        if self.refine is not None:
            start = keep
            keep = self.refine.refine(W.clone(), start.clone(), moments, pattern)
            if not isinstance(keep, torch.Tensor) or (keep.shape, keep.dtype) != (W.shape, torch.bool):
                raise ValueError(f"the refinement gave no boolean mask of shape {tuple(W.shape)}")
            if int(keep.sum()) != int(start.sum()) or not pattern.holds(keep):
                raise ValueError(f"the refinement keeps {int(keep.sum())} weights, not {int(start.sum())} in {pattern}")
        if self.update is None:
            return W.masked_fill(~keep, 0)
        updated = self.update.update(W.clone(), keep.clone(), moments)
        if not isinstance(updated, torch.Tensor) or updated.shape != W.shape or bool(updated[~keep].any()):
            raise ValueError(f"the update gave no {tuple(W.shape)} matrix that is zero outside the mask")
        return updated


def choose(
    method: str | Method | Callable = "wanda",
    *,
    refine: str | Refine | Callable | None = None,
    update: str | Update | Callable | None = None,
    reconstruct: int = 0,
    permute: bool = False,
    tokens: str | TokenRule | Callable = "all",
    propagate: str = "block",
    pattern: Pattern | None = None,
) -> Choice:
    """Put a way of pruning together.

    **Raises** `SparsightError` for unknown names and for what makes no sense together.
    """
    if isinstance(method, str) and method in PRESETS:
        preset = PRESETS[method]
        if refine not in (None, preset.get("refine", refine)):
            raise SparsightError(_clash(method, preset, "refine", refine))
        method, refine = preset["method"], preset.get("refine", refine)
    if not isinstance(propagate, str) or propagate not in PROPAGATE:
        raise SparsightError(f"--propagate: unknown value {propagate!r}; {nearest(propagate, PROPAGATE)}")
    if isinstance(reconstruct, bool) or not isinstance(reconstruct, int) or reconstruct < 0:
        raise SparsightError(f"--reconstruct: {reconstruct!r} is not a number of epochs, 0 or more")
    choice = Choice(
        find_method(method), find_refine(refine), find_update(update), find_tokens(tokens), reconstruct, permute, propagate
    )
    _refuse(choice, pattern)
    return choice


def preset_policy(method: Any, policy: Any = None) -> Any:
    """The policy that goes with a preset's name; uniform where nobody says anything."""
    preset = PRESETS.get(method, {}) if isinstance(method, str) else {}
    if "policy" in preset and policy not in (None, preset["policy"]):
        raise SparsightError(_clash(method, preset, "policy", policy))
    return preset.get("policy", "uniform" if policy is None else policy)


def _clash(name: str, preset: Mapping[str, str], step: str, given: Any) -> str:
    meant = " ".join(f"--{key} {value}" for key, value in preset.items())
    said = given if isinstance(given, str) else getattr(given, "__name__", "a function")
    return (
        f"--{step}: {said} contradicts --method {name}, which stands for {meant}; "
        f"give --method {preset['method']} --{step} {said}"
    )


def refuse_many(choice: Choice, processes: int) -> None:
    """Refuse what needs all batches in one place where several processes have them."""
    for option, given in (("--reconstruct", choice.reconstruct), ("--permute", choice.permute)):
        if given and processes > 1:
            raise SparsightError(
                f"{option}: looks at all batches at once and does not run on several processes; run it on one"
            )


def _refuse(choice: Choice, pattern: Pattern | None) -> None:
    if choice.refine and not choice.method.mask_only and not choice.update:
        raise SparsightError(
            "--refine: moves the zeros of the dense weights, and this method may change the kept ones for its own zeros; "
            "add --update pcg, which solves for them anew, or choose a method that scores (a function of your own: "
            "Method(function), which promises to leave them)"
        )
    if choice.propagate == "stage":
        for option, given in (("--reconstruct", choice.reconstruct), ("--permute", choice.permute)):
            if given:
                raise SparsightError(f"{option}: needs whole blocks, and --propagate stage goes layer by layer; use block")
        if choice.tokens.select:
            raise SparsightError(
                "--tokens: this rule looks at a block's output, and --propagate stage goes layer by layer; use block, or "
                "a rule that needs no output, as balanced"
            )
    if choice.permute and pattern is not None and pattern.kind != "n:m":
        raise SparsightError(f"--permute: regroups channels for n:m; --pattern {pattern.kind} has no groups, leave it out")
    looks = {need for step in (choice.method, choice.refine, choice.update) if step for need in step.needs}
    if choice.tokens != find_tokens("all") and not looks & {"norm", "gram"} and not choice.permute:
        raise SparsightError("--tokens: this method does not look at inputs; leave it out, or choose another method")


def named(method: Any, refine: Any = None, update: Any = None, reconstruct: int = 0, permute: bool = False) -> str:
    """A way of pruning in words, as it is recorded."""
    steps = [name_of(step) for step in (method, refine, update) if step is not None]
    return " + ".join([*(["permute"] if permute else []), *steps, *([f"reconstruct {reconstruct}"] if reconstruct else [])])
