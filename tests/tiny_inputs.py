"""Batches for the models of `tiny.py`: random words, random pictures, and labels on the answer.

Which tensors describe a picture follows from the signature of the model's forward. How many tokens stand for it in the
text is what the model's own `get_image_features` makes of it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tiny_pictures import COUNTS, EXTRAS, WITHOUT, pictures

WORDS = (100, 200)  # ordinary words; special tokens are below


def batches(model: Any, n: int = 3, size: int = 2, seed: int = 0) -> list[dict[str, Tensor]]:
    """Make `n` batches of `size` samples for `model(**batch)`: one picture each, texts of several lengths, labels."""
    generator = torch.Generator().manual_seed(seed)
    return [_batch(model, number, size, generator) for number in range(n)]


def _batch(model: Any, number: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    kind, wanted = model.config.model_type, inspect.signature(model.forward).parameters
    pixels = [pictures(model, number + row, generator) for row in range(size)]
    rows = []
    for row, picture in enumerate(pixels):
        holes = [marked(model, picture)] if picture else []
        rows.append(_text(model, holes, 3 + (number + row) % 3, 2 + (number + 2 * row) % 3, generator))
    axis = {"pixel_values": -1} if "target_sizes" in pixels[0] else {}  # one strip
    batch = {key: torch.cat([picture[key] for picture in pixels], axis.get(key, 0)) for key in pixels[0]}
    pad = number_of(model.config, "pad") or 0
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((size, width), pad)
    mask = torch.zeros(size, width, dtype=torch.long)
    labels = torch.full((size, width), -100)
    for row, (words, answer) in enumerate(rows):
        ids[row, : len(words)] = words
        mask[row, : len(words)] = 1
        labels[row, len(words) - answer : len(words)] = words[len(words) - answer :]
    batch |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    token = image_token(model.config)
    seen = torch.zeros_like(ids) if token is None else (ids == token).long()
    for key in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if key in wanted:
            batch[key] = (labels != -100).long() if kind == "paligemma" else seen
    if _encodes(model.config):
        batch["labels"] = torch.randint(*WORDS, (size, 5), generator=generator)
        batch["labels"][1::2, 4:] = -100
    if kind in EXTRAS:
        EXTRAS[kind](model, batch)
    return {key: value for key, value in batch.items() if key in wanted or key in pixels[0]}


def _text(model: Any, holes: list[list[int]], before: int, answer: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """The tokens of one sample: words, the places of its pictures, words, and an answer of so many tokens at the end."""

    def words(count: int) -> list[int]:
        return torch.randint(*WORDS, (count,), generator=generator).tolist()

    bos = number_of(model.config, "bos")
    tokens = [] if bos is None else [bos]
    tokens += words(before)
    for hole in holes:
        tokens += hole + words(2)
    answer = 0 if _encodes(model.config) else answer
    return torch.tensor(tokens + words(answer)), answer


def marked(model: Any, picture: dict[str, Tensor]) -> list[int]:
    """The tokens in whose place one picture comes, between the tokens that mark its start and its end."""
    config = model.config
    token = image_token(config)
    if token is None or model.config.model_type in WITHOUT:
        return []
    start = next((x for x in (number_of(config, name) for name in ("vision_start", "image_start", "boi")) if x), None)
    end = next((x for x in (number_of(config, name) for name in ("vision_end", "image_end", "eoi")) if x), None)
    return [x for x in [start, *[token] * features(model, picture), end] if x is not None]


@torch.no_grad()
def features(model: Any, picture: dict[str, Tensor]) -> int:
    """How many vectors the language model gets for one picture."""
    if model.config.model_type in COUNTS:
        return COUNTS[model.config.model_type](model, picture)
    inner = getattr(model, "model", model)
    find = inner.get_image_features if hasattr(inner, "get_image_features") else model.get_image_features
    known = set(inspect.signature(find).parameters)
    made = find(**{key: value for key, value in picture.items() if key in known})
    pooled = getattr(made, "pooler_output", made)
    made = made.last_hidden_state if pooled is None else pooled
    while isinstance(made, list | tuple) and len(made) == 1:
        made = made[0]
    if isinstance(made, list | tuple):
        return sum(part.flatten(0, -2).shape[0] for part in made)
    return int(made.flatten(0, -2).shape[0])


def image_token(config: Any) -> int | None:
    """The token in whose place vision features come."""
    image = number_of(config, "image")
    return number_of(config, "video") if image is None else image


def number_of(config: Any, name: str) -> int | None:
    """The special token of that name, wherever the config has it."""
    for part in (config, config.get_text_config(), *(getattr(config, key, None) for key in ("vlm_config", "vision_config"))):
        for suffix in ("token_id", "token_index"):
            value = getattr(part, f"{name}_{suffix}", None)
            if isinstance(value, int):
                return value
    return None


def _encodes(config: Any) -> bool:
    return bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)
