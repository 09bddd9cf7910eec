"""Teach a connector, a tower and a language model to answer questions about photos, in four stages, on a CPU.

1. `connector`: tower and language model are frozen, and the tower's outputs are kept. The connector learns to put the mean
   of a photo's tokens near the embedding of its class's name: cross-entropy over the cosines with all names.
2. `tower`: the same loss, through tower and connector, on photos mirrored at random.
3. `answers`: the connector learns by the frozen language model's own loss on answers.
4. `language`: so do the connector and the blocks of the language model, at a low rate. Beside every batch of questions goes
   one of text, on which the language model keeps to its original: KL(original || taught) of every next token.

In 3 and 4 a photo is encoded once for several questions. Each of them attends to the photo and to itself, in the positions
that it would have alone, so that no answer is seen by another question.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from questions import ask, kinds_of
from torch import Tensor, nn
from torch.nn import functional as F

COLUMNS = ("stage", "step", "minutes", "loss", "accuracy", "text_kl")
TEMPERATURE = 0.05  # of the cosines
QUESTIONS = 6  # of a photo, in one row


class Lesson:
    """A model, the photos that teach it, and the curve. `check` photos are those of the same folder that teach nothing."""

    def __init__(self, model: Any, processor: Any, photos: dict[str, list[Path]], seed: int) -> None:
        self.model, self.processor, self.seed = model, processor, seed
        self.classes = list(photos)
        pairs = [(path, number) for number, files in enumerate(photos.values()) for path in files]
        random.Random(seed).shuffle(pairs)
        kept = max(1, len(pairs) // 10)
        self.check, self.pairs = pairs[:kept], pairs[kept:]
        self.names = self._names()
        self.curve: list[dict[str, Any]] = []
        self.began = time.perf_counter()

    def _names(self) -> Tensor:
        """The mean embedding of each name's tokens, (classes, width), less the mean of all embeddings."""
        table = self.model.get_input_embeddings().weight.detach()
        ids = [self.processor.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in self.classes]
        return torch.stack([table[i].mean(0) for i in ids]) - table.mean(0)

    def pixels(self, pairs: Sequence[tuple[Path, int]]) -> Tensor:
        """The processor's pixels of photos, (photos, 3, side, side)."""
        pictures = [Image.open(path).convert("RGB") for path, _ in pairs]
        return self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]

    def features(self, pixels: Tensor) -> Tensor:
        """What the connector gets of photos, (photos, tokens, tower's width)."""
        return self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]

    def connect(self, features: Tensor) -> Tensor:
        """The connector's tokens, (photos, tokens, width)."""
        return self.model.model.multi_modal_projector(features)

    def note(self, stage: str, step: int, loss: float, accuracy: float | None = None, kl: float | None = None) -> None:
        """Add a row to the curve, and print it."""
        row = {"stage": stage, "step": step, "minutes": f"{(time.perf_counter() - self.began) / 60:.1f}"}
        row |= {"loss": f"{loss:.4f}", "accuracy": "" if accuracy is None else f"{accuracy:.3f}"}
        self.curve.append({**row, "text_kl": "" if kl is None else f"{kl:.4f}"})
        print("  ".join(f"{value!s:>10}" for value in self.curve[-1].values()), flush=True)

    def name_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the names of mean tokens, with a pull on every token's length; and which are right."""
        tokens = self.connect(features)
        table = self.model.get_input_embeddings().weight.detach()
        mean = tokens.mean(1) - table.mean(0)
        logits = F.normalize(mean, dim=-1) @ F.normalize(self.names, dim=-1).T / TEMPERATURE
        length = (tokens.norm(dim=-1) / table.norm(dim=-1).mean() - 1).square().mean()
        return F.cross_entropy(logits, labels) + length, logits.argmax(-1) == labels

    def batches(self, count: int, size: int) -> Iterator[list[tuple[Path, int]]]:
        """`count` batches of photos, in a new order after every pass."""
        draw = random.Random(self.seed + 1)
        line: list[tuple[Path, int]] = []
        for _ in range(count):
            if len(line) < size:
                line += draw.sample(self.pairs, len(self.pairs))
            batch, line = line[:size], line[size:]
            yield batch


def trainable(model: nn.Module, *parts: nn.Module) -> None:
    """Freeze all of `model` but `parts`; in place."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def schedule(rates: list[float], optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Set the rates of a step: they rise over the first 5 % and fall as a cosine."""
    rise = max(1, steps // 20)
    factor = min(1.0, (step + 1) / rise) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor


def teach_connector(lesson: Lesson, epochs: int = 20, size: int = 64, rate: float = 1e-3) -> None:
    """Stage 1, in place."""
    projector = lesson.model.model.multi_modal_projector
    trainable(lesson.model, projector)
    with torch.no_grad():
        kept = {
            name: torch.cat([lesson.features(lesson.pixels(pairs[i : i + 64])) for i in range(0, len(pairs), 64)])
            for name, pairs in (("train", lesson.pairs), ("check", lesson.check))
        }
    labels = {n: torch.tensor([y for _, y in p]) for n, p in (("train", lesson.pairs), ("check", lesson.check))}
    start_connector(projector, kept["train"], lesson.model.get_input_embeddings().weight)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.01)
    order = torch.Generator().manual_seed(lesson.seed)
    steps = epochs * math.ceil(len(lesson.pairs) / size)
    step = 0
    for epoch in range(epochs):
        for rows in torch.randperm(len(lesson.pairs), generator=order).split(size):
            schedule([rate], optimizer, step, steps)
            loss, _ = lesson.name_loss(kept["train"][rows], labels["train"][rows])
            take_step(loss, optimizer)
            step += 1
        if epoch % 5 == 4 or epoch == epochs - 1:
            with torch.no_grad():
                right = lesson.name_loss(kept["check"], labels["check"])[1]
            lesson.note("connector", step, loss.item(), float(right.float().mean()))


def start_connector(projector: Any, features: Tensor, table: Tensor) -> None:
    """Scale the first layer to the features' mean and spread, and the second to the embeddings' length; in place."""
    with torch.no_grad():
        mean, spread = features.mean((0, 1)), features.std((0, 1)).clamp_min(1e-3)
        first, second = projector.linear_1, projector.linear_2
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        first.weight /= spread
        first.bias.copy_(-first.weight @ mean)
        nn.init.normal_(second.weight, std=float(table.std()) * second.in_features**-0.5)
        nn.init.zeros_(second.bias)


def take_step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer, gradients clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def teach_tower(lesson: Lesson, steps: int = 160, size: int = 32, rates: Sequence[float] = (5e-5, 3e-4)) -> None:
    """Stage 2, in place."""
    tower, projector = lesson.model.model.vision_tower, lesson.model.model.multi_modal_projector
    trainable(lesson.model, tower, projector)
    optimizer = torch.optim.AdamW([{"params": list(m.parameters())} for m in (tower, projector)], weight_decay=0.05)
    mirror = torch.Generator().manual_seed(lesson.seed)
    for step, pairs in enumerate(lesson.batches(steps, size)):
        schedule(list(rates), optimizer, step, steps)
        pixels = lesson.pixels(pairs)
        turned = torch.rand(len(pairs), generator=mirror) < 0.5
        pixels = torch.where(turned[:, None, None, None], pixels.flip(-1), pixels)
        loss, _ = lesson.name_loss(lesson.features(pixels), torch.tensor([y for _, y in pairs]))
        take_step(loss, optimizer)
        if step % 40 == 39 or step == steps - 1:
            lesson.note("tower", step + 1, loss.item(), check_names(lesson))


def check_names(lesson: Lesson) -> float:
    """The share of the check photos whose own name is the nearest."""
    right = []
    with torch.no_grad():
        for i in range(0, len(lesson.check), 64):
            part = lesson.check[i : i + 64]
            labels = torch.tensor([y for _, y in part])
            right.append(lesson.name_loss(lesson.features(lesson.pixels(part)), labels)[1])
    return float(torch.cat(right).float().mean())


def tree(lesson: Lesson, pairs: Sequence[tuple[Path, int]], draw: random.Random) -> dict[str, Tensor]:
    """Several questions of each photo as one row: ids, positions, a mask (rows, 1, T, T) and labels, -100 off answers."""
    tokenizer, kinds = lesson.processor.tokenizer, kinds_of(lesson.classes)
    image, count = lesson.model.config.image_token_id, lesson.model.config.image_seq_length
    head = tokenizer("<|im_start|>user\n<image>\n", add_special_tokens=False)["input_ids"]
    head = [i for token in head for i in ([image] * count if token == image else [token])]
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for _, number in pairs:
        ids, places, owner, labels = list(head), list(range(len(head))), [0] * len(head), [-100] * len(head)
        for branch in range(1, QUESTIONS + 1):
            prompt, answer = ask(lesson.classes[number], lesson.classes, draw.choice(kinds), draw)
            text = f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
            asked = tokenizer(text, add_special_tokens=False)["input_ids"]
            answered = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
            both = asked + answered
            ids += both
            labels += [-100] * len(asked) + answered
            places += range(len(head), len(head) + len(both))
            owner += [branch] * len(both)
        rows.append((ids, places, owner, labels))
    width = max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, 0, -1, -100)
    ids, places, owner, labels = (
        torch.tensor([row[k] + [fill[k]] * (width - len(row[k])) for row in rows]) for k in range(4)
    )
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = same & torch.ones(width, width, dtype=torch.bool).tril()
    return {"ids": ids, "places": places, "mask": mask[:, None], "labels": labels}


def answer_loss(lesson: Lesson, pairs: Sequence[tuple[Path, int]], draw: random.Random) -> tuple[Tensor, float]:
    """The mean loss of the answers' tokens about photos, and the share of tokens that the model gives first."""
    batch = tree(lesson, pairs, draw)
    with torch.no_grad():
        features = lesson.features(lesson.pixels(pairs))
    model = lesson.model
    x = model.get_input_embeddings()(batch["ids"])
    spots = (batch["ids"] == model.config.image_token_id)[..., None]
    x = x.masked_scatter(spots, lesson.connect(features))
    hidden = model.model.language_model(
        inputs_embeds=x, attention_mask=batch["mask"], position_ids=batch["places"], use_cache=False
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    logits = model.lm_head(hidden[:, :-1][labels != -100])
    labels = labels[labels != -100]
    return F.cross_entropy(logits, labels), float((logits.argmax(-1) == labels).float().mean())


def teach_answers(lesson: Lesson, steps: int = 25, size: int = 4, rate: float = 1e-3) -> None:
    """Stage 3, in place."""
    projector = lesson.model.model.multi_modal_projector
    trainable(lesson.model, projector)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
    draw = random.Random(lesson.seed + 2)
    for step, pairs in enumerate(lesson.batches(steps, size)):
        schedule([rate], optimizer, step, steps)
        loss, right = answer_loss(lesson, pairs, draw)
        take_step(loss, optimizer)
        if step % 10 == 9 or step == steps - 1:
            lesson.note("answers", step + 1, loss.item(), right)


def teach_language(
    lesson: Lesson, text: Sequence[dict[str, Tensor]], steps: int = 80, size: int = 3,
    rates: Sequence[float] = (2e-4, 2e-4), weight: float = 1.0,
) -> None:  # fmt: skip
    """Stage 4, in place. `text` holds batches of ids (rows, 128); one row of them goes beside every batch of photos."""
    language, projector = lesson.model.model.language_model, lesson.model.model.multi_modal_projector
    original = copy.deepcopy(language).requires_grad_(False)
    trainable(lesson.model, language.layers, language.norm, projector)
    groups = [[*language.layers.parameters(), *language.norm.parameters()], list(projector.parameters())]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)
    draw = random.Random(lesson.seed + 3)
    rows = torch.cat([batch["input_ids"] for batch in text])
    for step, pairs in enumerate(lesson.batches(steps, size)):
        schedule(list(rates), optimizer, step, steps)
        ids = rows[draw.randrange(len(rows))][None]
        head = lesson.model.lm_head
        with torch.no_grad():
            target = head(original(input_ids=ids, use_cache=False).last_hidden_state).log_softmax(-1)
        ours = head(language(input_ids=ids, use_cache=False).last_hidden_state).log_softmax(-1)
        kl = (target.exp() * (target - ours)).sum(-1).mean()
        (weight * kl).backward()
        loss, right = answer_loss(lesson, pairs, draw)
        take_step(loss, optimizer)
        if step % 10 == 9 or step == steps - 1:
            lesson.note("language", step + 1, loss.item(), right, kl.item())
