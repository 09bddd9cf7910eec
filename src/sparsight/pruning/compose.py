"""A way of pruning, composed from the tables of methods: score, select, refine the mask, update the kept weights,
reconstruct the block. Contradictory steps are refused here, by name, before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsight.allocation.budget import parse_pattern
from sparsight.calibration.moments import Moments
from sparsight.calibration.tokens import TokenRule, find_tokens
from sparsight.checks import check_name, current_name, name_of
from sparsight.errors import SparsightError
from sparsight.masks.matrix import keep_only, mask_of
from sparsight.masks.pattern import Pattern
from sparsight.pruning.methods import PRESETS, Method, Refine, Update, find_method, find_refine, find_update
from sparsight.pruning.methods.dense_target import dense_target

if TYPE_CHECKING:
    from sparsight.model.anatomy import Layer
    from sparsight.specs import PruneSpec

PROPAGATE = ("dense", "block", "layer")


@dataclass(frozen=True)
class Composition:
    """One way of pruning. `reconstruct` counts epochs; `permute` reorders channels first, for n:m.

    With `dense_targets` solvers fit a layer to its outputs in the dense model, in place of those on its own inputs.
    """

    method: Method
    refine: Refine | None
    update: Update | None
    tokens: TokenRule
    reconstruct: int = 0
    permute: bool = False
    propagate: str = "block"
    dense_targets: bool = False

    @property
    def steps(self) -> list[Method | Refine | Update]:
        """The entries of the tables that work on one layer, in order."""
        return [step for step in (self.method, self.refine, self.update) if step]

    @property
    def needs(self) -> frozenset[str]:
        """The measurements that the steps need, of inputs and loss; see `Method`."""
        needs = frozenset(need for step in self.steps for need in step.needs)
        return needs | ({"norm"} if self.reconstruct or self.permute else set())

    @property
    def mask_only(self) -> bool:
        """Whether the kept weights stay as they were, in their places."""
        return self.method.mask_only and not (self.update or self.reconstruct or self.permute)

    @property
    def walks_twice(self) -> bool:
        """Whether a dense walk goes beside the one through the pruned model."""
        return bool(self.reconstruct or self.dense_targets) and self.propagate != "dense"

    def of(self, layer: Layer) -> Composition:
        """The steps for one layer: without a refinement that is for attention, elsewhere."""
        skip = self.refine is not None and self.refine.attention_only and not layer.attention
        return replace(self, refine=None) if skip else self

    def prune(self, W: torch.Tensor, moments: Moments | None, pattern: Pattern, generator: torch.Generator) -> torch.Tensor:
        """The pruned weights of one layer (out, in); W is not changed.

        **Raises** `ValueError` for a refinement that changes counts, and an update that fills zeros.
        """
        goal = dense_target(W, moments) if self.dense_targets and moments is not None else W
        pruned = self.method.prune((goal if self.method.solves else W).clone(), moments, pattern, generator=generator)
        if (self.refine is None and self.update is None) or moments is None:
            return pruned
        keep = mask_of(pruned)
        if self.refine is not None:
            start = keep
            keep = self.refine.refine(W.clone(), start.clone(), moments, pattern)
            if not isinstance(keep, torch.Tensor) or (keep.shape, keep.dtype) != (W.shape, torch.bool):
                raise ValueError(f"the refinement gave no boolean mask of shape {tuple(W.shape)}")
            kept, due = int(keep.count_nonzero()), int(start.count_nonzero())
            if kept != due or not pattern.holds(keep):
                raise ValueError(f"the refinement keeps {kept} weights, not {due} in {pattern}")
        if self.update is None:
            return keep_only(W, keep)
        updated = self.update.update(goal.clone(), keep.clone(), moments)
        if not isinstance(updated, torch.Tensor) or updated.shape != W.shape or bool((mask_of(updated) & ~keep).any()):
            raise ValueError(f"the update gave no {tuple(W.shape)} matrix that is zero outside the mask")
        return updated


def compose(
    method: str | Method | Callable = "wanda",
    *,
    refine: str | Refine | Callable | None = None,
    update: str | Update | Callable | None = None,
    reconstruct: int = 0,
    permute: bool = False,
    tokens: str | TokenRule | Callable = "all",
    propagate: str = "block",
    dense_targets: bool = False,
    pattern: Pattern | Mapping[str, Pattern] | None = None,
) -> Composition:
    """Compose a way of pruning.

    **Raises** `SparsightError` for unknown names and contradictory steps.
    """
    if isinstance(method, str) and method in PRESETS:
        preset = PRESETS[method]
        if refine not in (None, preset.get("refine", refine)):
            raise SparsightError(_clash(method, preset, "refine", refine))
        method, refine = preset["method"], preset.get("refine", refine)
    propagate = current_name("propagate", propagate)
    check_name("propagate", propagate, PROPAGATE)
    if isinstance(reconstruct, bool) or not isinstance(reconstruct, int) or reconstruct < 0:
        raise SparsightError(f"`reconstruct`: {reconstruct!r} is not a number of epochs, 0 or more")
    composition = Composition(
        find_method(method), find_refine(refine), find_update(update), find_tokens(tokens), reconstruct, permute, propagate,
        dense_targets,
    )  # fmt: skip
    patterns = () if pattern is None else (pattern,) if isinstance(pattern, Pattern) else tuple(pattern.values())
    _refuse(composition, patterns)
    return composition


def compose_spec(spec: PruneSpec) -> Composition:
    """The way of pruning in settings; errors as in `compose`."""
    return compose(
        spec.method, refine=spec.refine, update=spec.update, reconstruct=spec.reconstruct, permute=spec.permute,
        tokens=spec.tokens, propagate=spec.propagate, dense_targets=spec.dense_targets, pattern=parse_pattern(spec.pattern),
    )  # fmt: skip


def policy_of(spec: PruneSpec) -> Any:
    """The policy of a pruning: that of a preset, else the one in the settings, else uniform.

    **Raises** `SparsightError` if preset and settings contradict each other.
    """
    preset = PRESETS.get(spec.method, {}) if isinstance(spec.method, str) else {}
    if "policy" in preset and spec.policy not in (None, preset["policy"]):
        raise SparsightError(_clash(spec.method, preset, "policy", spec.policy))
    return preset.get("policy", "uniform" if spec.policy is None else spec.policy)


def _clash(name: str, preset: Mapping[str, str], step: str, value: Any) -> str:
    meant = " ".join(f"`{key}={choice}`" for key, choice in preset.items())
    other = value if isinstance(value, str) else getattr(value, "__name__", "a function")
    return (
        f"`{step}`: {other} contradicts `method={name}`, which stands for {meant}; "
        f"give `method={preset['method']}` `{step}={other}`"
    )


def check_processes(composition: Composition, processes: int) -> None:
    """**Raises** `SparsightError` on several processes for steps that need all batches in one."""
    for field in ("reconstruct", "permute"):
        if getattr(composition, field) and processes > 1:
            raise SparsightError(
                f"`{field}`: looks at all batches at once and does not run on several processes; run it on one"
            )


def _refuse(composition: Composition, patterns: Sequence[Pattern]) -> None:
    if composition.refine and not composition.method.mask_only and not composition.update:
        raise SparsightError(
            "`refine`: moves the zeros of the dense weights, and this method may change the kept ones for its own zeros; "
            "add `update=pcg`, which solves for them anew, or choose a method that scores (a function of your own "
            "that leaves them: Method(function))"
        )
    if composition.propagate == "layer":
        for field in ("reconstruct", "permute", "dense_targets"):
            if getattr(composition, field):
                raise SparsightError(
                    f"`{field}`: needs whole blocks, and `propagate=layer` goes layer by layer; use block"
                )  # fmt: skip
        if composition.tokens.select:
            raise SparsightError(
                "`tokens`: this rule looks at a block's output, and `propagate=layer` goes layer by layer; use block, or "
                "a rule that needs no output, as balanced"
            )
    if composition.dense_targets and composition.propagate == "dense":
        raise SparsightError("`dense_targets`: with `propagate=dense` every layer sees the dense model's inputs; use block")
    if composition.dense_targets and not (composition.method.solves or composition.update):
        raise SparsightError(
            "`dense_targets`: are for solvers, and this method leaves the kept weights as they are; add `update=pcg`, or "
            "use `method=alps`"
        )
    if composition.permute and patterns and not any(pattern.kind == "n:m" for pattern in patterns):
        kinds = ",".join(sorted({pattern.kind for pattern in patterns}))
        raise SparsightError(f"`permute`: regroups channels for n:m; `pattern={kinds}` has no groups, leave it out")
    looks = {need for step in composition.steps for need in step.needs}
    if composition.tokens != find_tokens("all") and not looks & {"norm", "gram"} and not composition.permute:
        raise SparsightError("`tokens`: this method does not look at inputs; leave it out, or choose another method")


def describe(spec: PruneSpec) -> str:
    """A way of pruning in words, as it is recorded: `permute + wanda + swaps + pcg + reconstruct 2`."""
    steps = [name_of(step) for step in (spec.method, spec.refine, spec.update) if step is not None]
    fitting = [f"reconstruct {spec.reconstruct}"] if spec.reconstruct else []
    targets = ["dense targets"] if spec.dense_targets else []
    return " + ".join([*(["permute"] if spec.permute else []), *steps, *targets, *fitting])
