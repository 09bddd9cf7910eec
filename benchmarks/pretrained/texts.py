"""Passages of any text file, and the perplexity of a model on them.

A passage is a line of at least 600 characters with at most three unknown words (`<unk>`) among its first 700, in which the
marks of WikiText's tokens are joined again. The perplexity is exp of the mean negative log-probability of all tokens but the
first of each passage, which is cut at 128 tokens and has no token before it. Passages of fewer tokens are left out, so no
batch is padded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

CHARACTERS, FIRST, UNKNOWN, TOKENS = 600, 700, 3, 128
_JOINS = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([,.;:!?%)\]])", r"\1"),
    (r"([(\[$£]) ", r"\1"),
    (r" ('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1"),
)


def passages(path: Path, most: int | None = None) -> list[str]:
    """The passages of a file, `most` of them from all over it; exits with a line if there is none."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.strip()
        if len(text) < CHARACTERS or text[:FIRST].count("<unk>") > UNKNOWN:
            continue
        for pattern, join in _JOINS:
            text = re.sub(pattern, join, text)
        found.append(re.sub(r'" ([^"]*) "', r'"\1"', text))
    if not found:
        raise SystemExit(f"{path}: no line of {CHARACTERS} characters or more with at most {UNKNOWN} <unk>")
    if most is None or len(found) <= most:
        return found
    return [found[i * len(found) // most] for i in range(most)]


def text_batches(texts: Sequence[str], tokenizer: Any, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Batches of inputs and labels (size, 128) for `sparsight.evaluate`; shorter passages are left out."""
    rows = [ids[:TOKENS] for ids in tokenizer(list(texts))["input_ids"] if len(ids) >= TOKENS]
    batches = []
    for start in range(0, len(rows), size):
        ids = torch.tensor(rows[start : start + size])
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return batches


def perplexity(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """The perplexity of a causal language model, or of the language model of a LLaVA."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ids = batch["input_ids"]
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return math.exp(total / count)
