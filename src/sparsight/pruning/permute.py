"""Channel permutation for n:m: reorder channels into groups so that less importance is pruned, without a change of the
model's function (Zhang et al., "Plug-and-Play", ICLR 2024, with RIA; code biomedical-cybernetics).

The inputs of a layer can be put in any order if the rows (and biases) of the layers that make them are put in the same
order and nothing between them mixes channels. That holds inside an MLP. It is not assumed but tested: with a random
order, on the inputs and on ten times the inputs (near-uniform attention hides an order), a float32 copy of the module and
of the layer must have the same outputs as before; else the layer is pruned without a new order. The saved model is an
ordinary one that computes the same function.

The order: channels sorted by their summed score go to the groups back and forth; then one channel per group at a time is
assigned again, optimally (linear sum assignment), as long as the groups keep more of the score.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from sparsight.calibration.gradients import Gradient
from sparsight.calibration.lockstep import Call
from sparsight.calibration.moments import Moments
from sparsight.masks.pattern import Pattern
from sparsight.model.anatomy import Layer
from sparsight.pruning.methods.ria import ria_score
from sparsight.pruning.reconstruct import first, inputs_of

ROWS = 512  # of a layer's rows, evenly spread, that an order is judged by
ROUNDS = 4
SAME = 1e-4  # relative change that is rounding, in float32
LARGER = (1.0, 10.0)  # times the inputs that a permutation is tried on


def permute_block(
    layers: Sequence[Layer],
    plan: Mapping[str, Pattern],
    moments: dict[str, Moments],
    sensitivity: dict[str, Any],
    parents: Mapping[str, nn.Module],
    calls: Mapping[int, Call],
    generator: torch.Generator,
) -> list[str]:
    """Reorder channels in place, in weights, biases, `moments` and `sensitivity` (gradients); return the layers' names.

    Only layers with an n:m pattern and moments, and only where the outputs of the module around them stay the same.
    """
    names = []
    for layer in layers:
        pattern, producers = plan[layer.name], _producers(layer, layers, parents)
        if pattern.kind != "n:m" or not producers or layer.name not in moments:
            continue
        trial = torch.randperm(layer.shape[1], generator=generator).to(layer.weight.device)
        if not _absorbs(layer, producers, trial, parents[layer.name], calls):
            continue
        order = best_order(ria_score(layer.weight, moments[layer.name]), pattern)
        _apply(layer.weight, [(x.weight, _bias(x.module)) for x in producers], order)
        for x, columns in ((layer, True), *((producer, False) for producer in producers)):
            if isinstance(g := sensitivity.get(x.name), Gradient):
                mean, square = (t[:, order] if columns else t[order] for t in (g.mean, g.square))
                sensitivity[x.name] = Gradient(mean, square)
        moments[layer.name] = moments[layer.name].permuted(order)
        names.append(layer.name)
    return names


def _producers(layer: Layer, layers: Sequence[Layer], parents: Mapping[str, nn.Module]) -> list[Layer]:
    if layer.expert is not None:
        return []
    beside = [x for x in layers if parents[x.name] is parents[layer.name] and x is not layer and x.expert is None]
    return [x for x in beside if x.shape[0] == layer.shape[1]]


def _apply(weight: torch.Tensor, producers: Sequence[tuple[torch.Tensor, torch.Tensor | None]], order: torch.Tensor) -> None:
    """Reorder columns of `weight` (out, in), and rows and biases of the layers that make its inputs, in place."""
    weight.copy_(weight[:, order].clone())
    for rows, bias in producers:
        rows.copy_(rows[order].clone())
        if bias is not None:
            bias.copy_(bias[order].clone())


def _bias(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.data


def _absorbs(
    layer: Layer, producers: Sequence[Layer], order: torch.Tensor, parent: nn.Module, calls: Mapping[int, Call]
) -> bool:
    """Whether the module around them, and the layer, have the same outputs with the channels in another order."""
    args, kwargs = inputs_of(parent, next(iter(calls.values())))
    twin = copy.deepcopy(parent).float()
    own = {id(a): cast(nn.Linear, b) for a, b in zip(parent.modules(), twin.modules(), strict=True)}
    consumer = own[id(layer.module)]
    inner: list[torch.Tensor] = []  # the layer's outputs
    consumer.register_forward_hook(lambda module, args, output: inner.append(output.clone()))

    def run() -> list[torch.Tensor]:
        inner.clear()
        outputs = [first(twin(*_float(args, by), **_float(kwargs, by))).clone() for by in LARGER]
        return outputs + inner

    before = run()
    _apply(consumer.weight.data, [(own[id(x.module)].weight.data, _bias(own[id(x.module)])) for x in producers], order)
    return all(bool(torch.linalg.norm(b - a) <= SAME * torch.linalg.norm(a)) for a, b in zip(before, run(), strict=True))


def _float(value: Any, by: float) -> Any:
    """Return arguments in float32, the hidden states (batch, tokens, d) or (tokens, d) among them times `by`."""
    if isinstance(value, dict):
        return {key: _float(v, by if key == "hidden_states" else 1.0) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_float(v, by if i == 0 else 1.0) for i, v in enumerate(value))
    return value.float() * by if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def best_order(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:  # score (out, in)
    """Return an order of the columns (in,) that keeps at least as much of `score` under n:m as the present one.

    Judged by at most `ROWS` rows. Memory: (in / m)^2 float32 per assignment.
    """
    n, m = pattern.n, pattern.m
    every = max(1, score.shape[0] // ROWS)
    score = score[::every].float()
    groups = score.shape[1] // m
    ranked = score.sum(0).argsort(descending=True, stable=True).view(m, groups)
    ranked[1::2] = ranked[1::2].flip(1)  # back and forth
    best = torch.arange(score.shape[1], device=score.device).view(groups, m)
    for start in (best, ranked.T.contiguous()):
        table = _assign(score, start.clone(), n, m)
        if _kept(score, table, n) > _kept(score, best, n):
            best = table
    return best.reshape(-1)


def _kept(score: torch.Tensor, table: torch.Tensor, n: int) -> float:
    """Return the part of the score that the groups (groups, m) of columns keep."""
    return float(score[:, table].topk(n, dim=2).values.sum())


def _assign(score: torch.Tensor, table: torch.Tensor, n: int, m: int) -> torch.Tensor:
    from scipy.optimize import linear_sum_assignment

    kept = _kept(score, table, n)
    for _ in range(ROUNDS):
        for place in range(m):
            others = [j for j in range(m) if j != place]
            nth = score[:, table[:, others]].topk(n, dim=2).values[:, :, -1]  # (rows, groups) what a newcomer must exceed
            mover = score[:, table[:, place]]  # (rows, groups)
            # sum over rows of max(nth, mover) = (nth + mover + |nth - mover|) / 2, for every mover and every group
            gain = torch.cdist(mover.T.contiguous(), nth.T.contiguous(), p=1) + mover.sum(0).unsqueeze(1) + nth.sum(0)
            _, goes = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
            moved = table[:, place].clone()
            table[torch.as_tensor(goes, device=table.device), place] = moved
        now = _kept(score, table, n)
        if now <= kept * (1 + 1e-6):
            break
        kept = now
    return table
