"""Channel permutation for n:m: bring channels into groups so that less importance is pruned, in a way that the model
absorbs (Zhang et al., "Plug-and-Play", ICLR 2024, with RIA; code biomedical-cybernetics).

The inputs of a layer can be put in any order if the rows (and biases) of the layers that make them are put in the same
order and nothing between them looks across channels. That holds inside an MLP. It is not assumed but tried: with a random
order the module's output must stay what it was, else the order is put back and the layer is pruned as it stands. The
saved model is an ordinary one that computes the same function.

The order: channels sorted by their summed score are dealt out to the groups back and forth, then one channel per group at
a time is assigned anew, optimally (linear sum assignment), as long as that keeps more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from sparsight.model.anatomy import Layer
from sparsight.plan.pattern import Pattern
from sparsight.prune.lockstep import Call
from sparsight.prune.methods.ria import ria_score
from sparsight.prune.moments import Moments
from sparsight.prune.reconstruct import first

ROWS = 512  # of a layer's rows, evenly spread, that an order is judged by
ROUNDS = 4
SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative change that is rounding


def permute_block(
    layers: Sequence[Layer],
    plan: Mapping[str, Pattern],
    moments: dict[str, Moments],
    parents: Mapping[str, nn.Module],
    calls: Mapping[int, Call],
    generator: torch.Generator,
) -> list[str]:
    """Reorder channels in place, in weights, biases and `moments`; the names of the layers whose inputs were."""
    done = []
    for layer in layers:
        pattern, producers = plan[layer.name], _producers(layer, layers, parents)
        if pattern.kind != "n:m" or not producers or layer.name not in moments:
            continue
        trial = torch.randperm(layer.shape[1], generator=generator).to(layer.weight.device)
        if not _absorbs(layer, producers, trial, parents[layer.name], calls):
            continue
        order = best_order(ria_score(layer.weight, moments[layer.name]), pattern)
        _apply(layer, producers, order)
        moments[layer.name] = moments[layer.name].permuted(order)
        done.append(layer.name)
    return done


def _producers(layer: Layer, layers: Sequence[Layer], parents: Mapping[str, nn.Module]) -> list[Layer]:
    if layer.expert is not None:
        return []
    beside = [x for x in layers if parents[x.name] is parents[layer.name] and x is not layer and x.expert is None]
    return [x for x in beside if x.shape[0] == layer.shape[1]]


def _apply(layer: Layer, producers: Sequence[Layer], order: torch.Tensor) -> None:
    layer.write(layer.weight[:, order].clone())
    for producer in producers:
        producer.write(producer.weight[order].clone())
        if (bias := getattr(producer.module, "bias", None)) is not None:
            bias.data.copy_(bias.data[order].clone())


def _absorbs(
    layer: Layer, producers: Sequence[Layer], order: torch.Tensor, parent: nn.Module, calls: Mapping[int, Call]
) -> bool:
    """Whether the module around them puts out the same with its channels in another order; leaves them as they were."""
    seen: list[torch.Tensor] = []
    hook = parent.register_forward_hook(lambda module, args, output: seen.append(first(output).clone()))
    call = next(iter(calls.values()))
    try:
        call()
        _apply(layer, producers, order)
        call()
    finally:
        hook.remove()
        if len(seen) != 1:
            _apply(layer, producers, order.argsort())
    if len(seen) != 2:
        return False
    change = torch.linalg.norm((seen[1] - seen[0]).float()) / torch.linalg.norm(seen[0].float()).clamp(min=1e-30)
    return bool(change < SAME.get(layer.weight.dtype, 1e-4))


def best_order(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:  # score (out, in)
    """An order of the columns (in,) that keeps more of `score` under n:m than the one they are in."""
    n, m = pattern.n, pattern.m
    every = max(1, score.shape[0] // ROWS)
    score = score[::every].float()
    groups = score.shape[1] // m
    ranked = score.sum(0).argsort(descending=True, stable=True).view(m, groups)
    ranked[1::2] = ranked[1::2].flip(1)  # back and forth
    best = torch.arange(score.shape[1], device=score.device).view(groups, m)
    for start in (best, ranked.T.contiguous()):
        found = _assign(score, start.clone(), n, m)
        if _kept(score, found, n) > _kept(score, best, n):
            best = found
    return best.reshape(-1)


def _kept(score: torch.Tensor, table: torch.Tensor, n: int) -> float:
    """How much of the score the groups (groups, m) of columns keep."""
    return float(score[:, table].topk(n, dim=2).values.sum())


def _assign(score: torch.Tensor, table: torch.Tensor, n: int, m: int) -> torch.Tensor:
    kept = _kept(score, table, n)
    for _ in range(ROUNDS):
        for place in range(m):
            others = [j for j in range(m) if j != place]
            nth = score[:, table[:, others]].topk(n, dim=2).values[:, :, -1]  # (rows, groups) what a newcomer must beat
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
