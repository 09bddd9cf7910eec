"""Which calibration tokens count, and how much: one line per rule, over the same sums.

`all` counts every token as one. `text` and `image` leave the other kind out of layers that see both. `balanced` lets both
kinds weigh the same in total, however many tokens they have. `atv` (ATV-Pruning, arXiv 2603.16001; code LezJ/ATV-Pruning)
takes all text and, of every sample, those image tokens that the block turns most (cosine distance of its input and
output), min(1, mean distance) of them per text token. `tamp` (the AMIA part of TAMP, arXiv 2504.09897; code
G-JWLee/TAMP) picks tokens one by one from a graph of their three nearest neighbours, by the attention of the last token,
until the picked ones represent all (maximum mean discrepancy below 0.1 sqrt(1 - density)).

Ours selects once per block, on the block's output, where TAMP's code selects anew on the output of every layer. Vision
and connector see one kind of token only, so that no rule changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from sparsight import distributed
from sparsight.calibration.lockstep import Call
from sparsight.calibration.moments import Weigh, alike
from sparsight.checks import check_name, check_signature
from sparsight.errors import SparsightError

NEIGHBOURS = 3


@dataclass(frozen=True)
class Flow:
    """One batch in a block: hidden states before and after (B, T, d), masks (B, T), and the attention (B, T) from each row's
    last real token to every token (None unless the rule needs it)."""

    before: torch.Tensor
    after: torch.Tensor
    real: torch.Tensor
    image: torch.Tensor
    attention: torch.Tensor | None = None


Select = Callable[[Sequence[Flow]], list[torch.Tensor]]  # what is left out of each batch (B, T)


@dataclass(frozen=True)
class TokenRule:
    """`weigh` gives the weight of a token of each kind; `select` drops tokens by the block's hidden states."""

    weigh: Weigh = alike
    select: Select | None = None
    attention: bool = False


def balanced(counts: Mapping[str, int]) -> dict[str, float]:
    """Give all kinds the same total weight."""
    total = sum(counts.values())
    return {kind: total / (len(counts) * n) for kind, n in counts.items()}


def atv(flows: Sequence[Flow]) -> list[torch.Tensor]:
    """The image tokens (B, T) of each batch that ATV drops: those that the block turns least."""
    turned = [1 - F.cosine_similarity(f.before.float(), f.after.float(), dim=-1) for f in flows]  # (B, T)
    distances = torch.cat([distance[f.image & f.real] for distance, f in zip(turned, flows, strict=True)])
    share = min(1.0, float(distances.mean())) if distances.numel() else 0.0
    dropped_tokens = []
    for distance, f in zip(turned, flows, strict=True):
        images, texts = f.image & f.real, f.real & ~f.image
        drop = images.clone()
        for row in range(len(drop)):
            count = min(int(images[row].sum()), round(share * int(texts[row].sum())))
            drop[row, distance[row].masked_fill(~images[row], -1).topk(count).indices] = False
        dropped_tokens.append(drop)
    return dropped_tokens


def tamp(flows: Sequence[Flow]) -> list[torch.Tensor]:
    """The tokens (B, T) of each batch that TAMP drops: all but the representatives."""
    dropped_tokens = []
    for f in flows:
        drop = f.real.clone()
        for row in range(len(drop)):
            places = f.real[row].nonzero().flatten()
            assert f.attention is not None
            score = f.attention[row, places].float()
            drop[row, places[_representatives(f.after[row, places], f.image[row, places], score / score.sum())]] = False
        dropped_tokens.append(drop)
    return dropped_tokens


def _representatives(hidden: torch.Tensor, image: torch.Tensor, score: torch.Tensor) -> list[int]:
    """Pick tokens (n, d) until the picked ones represent all."""
    out = F.normalize(hidden.float(), dim=-1)
    alike_ = out @ out.T  # (n, n) cosine
    if not bool(image.any()) or bool(image.all()) or len(out) <= NEIGHBOURS + 1:
        return list(range(len(out)))
    density = (_density(alike_[image][:, image]) + _density(alike_[~image][:, ~image])) / 3
    density += float(alike_[image][:, ~image].mean()) / 3
    distance = 1 - alike_
    near = distance.topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]  # (n, 3)
    graph = score + (torch.exp(-distance.gather(1, near)) * score[near]).sum(1)
    kernel = torch.exp(-distance)  # a Gaussian of width 1: |a - b|^2 / 2 = 1 - cos
    enough, whole = 0.1 * max(0.0, 1 - density) ** 0.5, float(kernel.mean())
    picks: list[int] = []
    while len(picks) < len(out):
        best = int(graph.argmax())
        graph[near[best]] -= torch.exp(-0.2 * distance[best, near[best]]) * graph[best].clamp(min=0)
        picks.append(best)
        graph[picks] = graph.min() - 1
        if whole + float(kernel[picks][:, picks].mean()) - 2 * float(kernel[:, picks].mean()) < enough:
            break
    return picks


def _density(alike_: torch.Tensor) -> float:
    pairs = alike_.triu(1)
    pairs = pairs[pairs > 0]
    return float(pairs.mean()) if pairs.numel() else 0.0


TOKENS: dict[str, TokenRule] = {
    "all": TokenRule(),
    "text": TokenRule(weigh=lambda counts: {"text": 1.0, "image": 0.0}),
    "image": TokenRule(weigh=lambda counts: {"text": 0.0, "image": 1.0}),
    "balanced": TokenRule(weigh=balanced),
    "atv": TokenRule(select=atv),
    "tamp": TokenRule(select=tamp, attention=True),
}


def dropped_tokens(
    rule: TokenRule, component: str, calls: Mapping[int, Call], batches: Sequence[Any]
) -> dict[int, torch.Tensor]:
    """The tokens (B, T) of each batch that a rule leaves out of one block's moments.

    A rule with `select` costs one more run of the block on every batch; it gets the batches of all processes. **Raises**
    `SparsightError` if it does not return a boolean mask per batch.
    """
    if rule.select is None or component != "language":
        return {}
    flows = {}
    for i, call in calls.items():
        padding = batches[i].padding
        before = call.args[0] if call.args else call.keywords["hidden_states"]
        image = padding.get("image")
        if image is None or image.shape != before.shape[:2]:  # a decoder's tokens are text
            continue
        after = call()
        attention = last_token_attention(call, padding["text"]) if rule.attention else None
        flows[i] = Flow(before, after if isinstance(after, torch.Tensor) else after[0], padding["text"], image, attention)
    every = distributed.gather_dict(flows)
    drops = list(rule.select(list(every.values()))) if every else []
    shapes = [f.real.shape for f in every.values()]
    if [getattr(drop, "shape", None) for drop in drops] != shapes or any(drop.dtype != torch.bool for drop in drops):
        raise SparsightError("`tokens`: the rule must give one boolean mask (B, T) of what it leaves out for every batch")
    return {i: drop for i, drop in zip(every, drops, strict=True) if i in flows}


def last_token_attention(call: Call, real: torch.Tensor) -> torch.Tensor:
    """Run a block with eager attention: the attention from each row's last real token to every token (B, T).

    The last real token attends to all of them, so its weights over the real tokens, scaled to 1, are those of any mask. The
    block's output is not used: its mask is that of another attention. **Raises** `SparsightError` without such weights.
    """
    maps: list[torch.Tensor] = []

    def catch(module: nn.Module, args: tuple, output: Any) -> None:
        for part in output[1:] if isinstance(output, tuple) else ():
            if isinstance(part, torch.Tensor) and part.shape[::2] == (len(real), real.shape[1]) and part.dim() == 4:
                maps.append(part)

    block = cast(nn.Module, call.func)
    configs = {id(c): c for m in block.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(config, config._attn_implementation) for config in configs]
    hooks = [module.register_forward_hook(catch) for module in block.modules()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        call()
    finally:
        for config, kind in before:
            config._attn_implementation = kind
        for hook in hooks:
            hook.remove()
    if not maps or not torch.allclose(maps[0].float().sum(-1), torch.ones(()).to(real.device), atol=0.02):
        raise SparsightError("`tokens`: tamp needs attention weights, which this model's blocks do not give; use atv")
    places = torch.arange(real.shape[1], device=real.device)
    last = (places * real).argmax(1)  # (B,)
    weights = maps[0].mean(1)[torch.arange(len(last), device=real.device), last]  # (B, T)
    return weights.masked_fill(~real, 0)


def find_tokens(tokens: str | TokenRule | Weigh) -> TokenRule:
    """Look a rule up by name; a function of the counts per kind is a rule that weighs them."""
    if isinstance(tokens, TokenRule):
        return tokens
    if callable(tokens):
        check_signature("tokens", tokens, "(counts)")
        return TokenRule(weigh=tokens)
    check_name("tokens", tokens, tuple(TOKENS))
    return TOKENS[tokens]
