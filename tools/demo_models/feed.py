"""Training batches of digit scenes: what the processors make of the same pictures and texts, but faster.

Pictures stay arrays and texts are tokenized in one call. `check` holds every kind of batch against the real processor,
number by number; training calls it before its first step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import InstructBlipProcessor, LlavaProcessor, ProcessorMixin

from sparsight.demo.scenes import CAPTION_PROMPT, KINDS, Drawing, ask, caption, draw

from demo_models.build import MEAN, PATCHES, QUERIES, STD

Batch = dict[str, torch.Tensor]
CHUNK = 500


def pool(n: int, seed: int, crowd: bool) -> Drawing:
    """Draw n augmented training scenes to choose batches from (7 kB each)."""
    rng = np.random.default_rng([seed, crowd])
    chunks = [draw("train", min(CHUNK, n - i), rng, augment=True, crowd=crowd) for i in range(0, n, CHUNK)]
    return Drawing(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def pixels(images: np.ndarray) -> torch.Tensor:
    """Normalize uint8 images (n, h, w, 3) to the processors' pixel values (n, 3, h, w)."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def questions(
    drawing: Drawing, n: int, rng: np.random.Generator, kinds: Sequence[str] = tuple(KINDS)
) -> tuple[np.ndarray, list[str], list[str]]:
    """Ask n questions of these kinds in turn: indices of scenes, prompts, answers."""
    index: list[int] = []
    prompts: list[str] = []
    answers: list[str] = []
    while len(index) < n:
        i = int(rng.integers(len(drawing.values)))
        if question := ask(drawing.digits(i), kinds[len(index) % len(kinds)], rng):
            index.append(i)
            prompts.append(question.prompt)
            answers.append(question.answer)
    return np.array(index), prompts, answers


def captions(drawing: Drawing, n: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str], list[str]]:
    """Ask for n captions: indices of scenes, prompts, answers."""
    index = rng.integers(len(drawing.values), size=n)
    return index, [CAPTION_PROMPT] * n, [caption(drawing.digits(int(i))) for i in index]


def instructblip_batch(processor: Any, images: torch.Tensor, prompts: list[str], answers: list[str]) -> Batch:
    """Encode prompts as the processor does and answers as labels, ended by </s>, with -100 for padding."""
    words = processor.tokenizer
    text = words(["<image>" * QUERIES + prompt for prompt in prompts], padding=True, return_tensors="pt")
    former = processor.qformer_tokenizer(prompts, padding=True, return_tensors="pt")
    target = words(answers, padding=True, return_tensors="pt")
    return {
        "pixel_values": images,
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "qformer_input_ids": former["input_ids"],
        "qformer_attention_mask": former["attention_mask"],
        "labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, -100),
    }


def llava_batch(processor: Any, images: torch.Tensor, prompts: list[str], answers: list[str]) -> Batch:
    """Encode whole conversations; labels are the answer and </s>, -100 elsewhere. Padding is on the left."""
    words = processor.tokenizer
    image = "<image>" * PATCHES
    talks = [f"USER: {image}\n{p} ASSISTANT: {a}</s>" for p, a in zip(prompts, answers, strict=True)]
    text = words(talks, padding=True, return_tensors="pt")
    ids = text["input_ids"]
    length = torch.tensor([len(answer.split()) + 1 for answer in answers])
    answered = torch.arange(ids.shape[1]) >= ids.shape[1] - length[:, None]
    return {
        "pixel_values": images,
        "input_ids": ids,
        "attention_mask": text["attention_mask"],
        "labels": ids.masked_fill(~answered, -100),
    }


def llava_pack(processor: Any, images: torch.Tensor, asked: Sequence[Sequence[tuple[str, str]]]) -> Batch:
    """Encode many questions (prompt, answer) about each picture as one row that reads the picture once.

    Every question sees the picture and itself, never another question, and stands at the places it would have alone: a
    row gives the very logits that its questions give one by one, for a fraction of the work. Right-padded; the mask is
    (n, 1, T, T), True where a token sees another.
    """
    words = processor.tokenizer
    head = words("USER: " + "<image>" * PATCHES)["input_ids"]
    rows = []
    for pairs in asked:
        texts = [f"{prompt} ASSISTANT: {answer}</s>" for prompt, answer in pairs]
        rows.append(words(texts, add_special_tokens=False)["input_ids"])
    width = len(head) + max(sum(map(len, row)) for row in rows)
    ids = torch.full((len(rows), width), words.pad_token_id)
    labels, places = torch.full_like(ids, -100), torch.zeros_like(ids)
    owner = torch.full_like(ids, -1)  # which question a token belongs to; 0 is the picture
    for i, (row, pairs) in enumerate(zip(rows, asked, strict=True)):
        ids[i, : len(head)], places[i, : len(head)] = torch.tensor(head), torch.arange(len(head))
        owner[i, : len(head)] = 0
        start = len(head)
        for number, (tokens, (_, answer)) in enumerate(zip(row, pairs, strict=True), 1):
            end, length = start + len(tokens), len(answer.split()) + 1
            ids[i, start:end], owner[i, start:end] = torch.tensor(tokens), number
            places[i, start:end] = torch.arange(len(head), len(head) + len(tokens))
            labels[i, end - length : end] = ids[i, end - length : end]
            start = end
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = same & torch.ones(width, width, dtype=torch.bool).tril()
    return {
        "pixel_values": images,
        "input_ids": ids,
        "attention_mask": mask[:, None],
        "position_ids": places,
        "labels": labels,
    }


def batch(processor: ProcessorMixin, images: torch.Tensor, prompts: list[str], answers: list[str]) -> Batch:
    """Encode a training batch for the processor's model."""
    if isinstance(processor, InstructBlipProcessor):
        return instructblip_batch(processor, images, prompts, answers)
    if isinstance(processor, LlavaProcessor):
        return llava_batch(processor, images, prompts, answers)
    raise TypeError(f"no demo model uses a {type(processor).__name__}")


def conversation(prompt: str, answer: str | None = None) -> list[dict[str, Any]]:
    """Put a prompt, and its answer if there is one, into the form chat templates take."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    if answer is None:
        return [user]
    return [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def prompted(processor: Any, images: list[Image.Image], prompts: list[str]) -> Batch:
    """Encode pictures and prompts for generation, by the processor itself."""
    if isinstance(processor, LlavaProcessor):
        prompts = [processor.apply_chat_template(conversation(p), add_generation_prompt=True) for p in prompts]
    return dict(processor(images=images, text=prompts, padding=True, return_tensors="pt"))


def check(processor: Any, drawing: Drawing) -> None:
    """Raise AssertionError unless training batches equal what the processor makes of the same samples."""
    rng = np.random.default_rng(0)
    for index, prompts, answers in (questions(drawing, 16, rng), captions(drawing, 4, rng)):
        ours = batch(processor, pixels(drawing.pixels[index]), prompts, answers)
        images = [Image.fromarray(drawing.pixels[i]) for i in index]
        texts = prompts
        if isinstance(processor, LlavaProcessor):
            pairs = zip(prompts, answers, strict=True)
            texts = [processor.apply_chat_template(conversation(p, a)) for p, a in pairs]
        theirs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6 if name == "pixel_values" else 0)
        for row, answer in zip(ours["labels"], answers, strict=True):
            assert processor.tokenizer.decode(row[row != -100], skip_special_tokens=True) == answer
