"""Models with a chat template: LLaVA, Qwen-VL, Gemma 3, SmolVLM and any other that has one.

The template writes the dialogue and the processor expands the images; this module finds the answers in the result. An
answer starts where the template's `{% generation %}` says, or where the prompt for it ends; it ends with the special
token right behind it. If the template writes none (LLaVA 1.5's), the tokenizer's end token goes behind the last answer,
else the model would never learn to stop. Positions in the text become positions in the tokens only if the text before
an answer has the same tokens with and without the answer; if not, that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from sparsight.data.pixels import converts
from sparsight.data.sample import PLACEHOLDER, Sample
from sparsight.errors import SparsightError, first_line, quote


class TemplateFault(ValueError):
    """A chat template that cannot write a dialogue, or writes it without its images."""


Message = dict[str, Any]
Span = tuple[int, int]


def template(processor: Any) -> Any:
    """Return the processor's chat template, or its tokenizer's."""
    return getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)


def refuse(sample: Sample) -> str | None:
    """Return why a dialogue cannot be encoded (it has more or fewer placeholders than images), or None."""
    count = sum(turn.prompt.count(PLACEHOLDER) for turn in sample.turns)
    if count in (0, len(sample.images)):
        return None
    return f"{count} {PLACEHOLDER} in the prompts but {len(sample.images)} images"


def messages(processor: Any, sample: Sample) -> list[Message]:
    """Turn a sample into messages of user and assistant; images stand where the placeholders are, else first.

    A system text is a message of its own, in the form that the template takes, or else the start of the first prompt.
    """
    written = system_message(processor, sample.system) if sample.system else None
    dialogue: list[Message] = [written] if written else []
    sample = sample if written else sample.with_system_in_prompt()
    for i, turn in enumerate(sample.turns):
        pieces = [piece.strip() for piece in turn.prompt.split(PLACEHOLDER)]
        content: list[dict[str, str]] = []
        for k, piece in enumerate(pieces):
            if k:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece})
        if i == 0 and not any(PLACEHOLDER in each.prompt for each in sample.turns):
            content = [{"type": "image"}] * len(sample.images) + content
        dialogue.append({"role": "user", "content": content})
        dialogue.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer.strip()}]})
    return dialogue


def system_message(processor: Any, text: str) -> Message | None:
    """The message of a system text that the template writes as such; None for a template without that role.

    A template has the role if it writes the text once, and otherwise than as a turn of the user or of the assistant.
    """
    ask, mark = {"role": "user", "content": [{"type": "text", "text": "?"}]}, "8c5e1f"
    parts = [{"type": "text", "text": mark}]
    for content in (parts, mark):
        whole = _attempt(processor, [{"role": "system", "content": content}, ask])
        if whole is not None and whole.count(mark) == 1 and "'type'" not in whole:
            others = [_attempt(processor, [{"role": role, "content": parts}, ask]) for role in ("user", "assistant")]
            own = text if content is mark else [{"type": "text", "text": text}]
            return None if whole in others else {"role": "system", "content": own}
    return None


def _attempt(processor: Any, dialogue: list[Message]) -> str | None:
    try:
        return _render(processor, dialogue)
    except Exception:  # a template may refuse a role in any way
        return None


def prompts(processor: Any, samples: Sequence[Sample], config: Any) -> dict[str, Tensor]:
    """Encode dialogues up to the start of the last answer, padded on the left."""
    texts = [_render(processor, messages(processor, sample)[:-1]) for sample in samples]
    return _call(processor, texts, _images(processor, samples), side="left")


def encode(processor: Any, samples: Sequence[Sample], config: Any) -> dict[str, Tensor]:
    """Encode whole dialogues, padded on the right, with the answers as labels."""
    written = [_find_answers(processor, sample) for sample in samples]
    images = _images(processor, samples)
    inputs = _call(processor, [text for text, _ in written], images, side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (sample, (text, spans)) in enumerate(zip(samples, written, strict=True)):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        for start, stop in _token_spans(processor, sample.id, text, spans, images[row], ids):
            labels[row, start:stop] = inputs["input_ids"][row, start:stop]
    return {**inputs, "labels": labels}


def _images(processor: Any, samples: Sequence[Sample]) -> list[list[Any]]:
    alpha = converts(processor)
    return [sample.load_images(alpha=alpha) for sample in samples]


def _render(processor: Any, dialogue: list[Message], ask: bool = True) -> str:
    source = template(processor)
    text = source if isinstance(source, str) else None  # of several named templates the processor takes its default
    try:
        return processor.apply_chat_template(dialogue, chat_template=text, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template may raise anything
        raise TemplateFault(first_line(error)) from error


def _call(processor: Any, texts: list[str], images: list[list[Any]], side: str) -> dict[str, Tensor]:
    special = _special_tokens(processor, texts[0])
    pictures = images if any(images) else None
    try:
        made = dict(processor(text=texts, images=pictures, padding=True, padding_side=side, return_tensors="pt", **special))
    except Exception as error:
        for text, own in zip(texts, images, strict=True):
            if own and not any(mark in text for mark in image_marks(processor)):
                raise TemplateFault(first_line(error)) from error
        raise
    _check_images(processor, made["input_ids"], images)
    return made


def _check_images(processor: Any, ids: Tensor, images: list[list[Any]]) -> None:
    """Refuse, by a `TemplateFault`, texts (B, T) without a token of their images, which some processors let pass."""
    marks = sorted(image_marks(processor))
    numbers = torch.tensor([n for n in processor.tokenizer.convert_tokens_to_ids(marks) if n is not None], dtype=ids.dtype)
    for row, own in zip(ids, images, strict=True):
        if own and len(numbers) and not torch.isin(row, numbers).any():
            raise TemplateFault(f"Found total 0 {marks[0]} tokens and {len(own)} images")


def image_marks(processor: Any) -> set[str]:
    """The tokens that stand for an image, or a video, in a text for the processor."""
    names, owners = ("image_token", "boi_token", "video_token"), (processor, getattr(processor, "tokenizer", None))
    return {str(mark) for owner in owners for name in names if (mark := getattr(owner, name, None))}


def _special_tokens(processor: Any, text: str) -> dict[str, bool]:
    """Return options that add no second start token where the template has written one."""
    bos = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def _find_answers(processor: Any, sample: Sample) -> tuple[str, list[Span]]:
    """Render the dialogue, and find each answer with its end token as (start, stop) in the text.

    A span starts where a prompt would stop: it may begin with the space before the answer.
    """
    dialogue = messages(processor, sample)
    before = len(dialogue) - 2 * len(sample.turns)  # 1 for a system message
    text, marked = _render_marked(processor, dialogue)
    added = [token.content for token in processor.tokenizer.added_tokens_decoder.values()]
    end = re.compile(" ?(?:" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")" if added else r"(?!)")
    spans: list[Span] = []
    for turn in range(len(sample.turns)):
        answer = dialogue[before + 2 * turn + 1]["content"][0]["text"]
        prompt = text[: marked[turn][0]].rstrip(" ") if marked else _render(processor, dialogue[: before + 2 * turn + 1])
        at = len(prompt) + len(text[len(prompt) :]) - len(text[len(prompt) :].lstrip())
        if not text.startswith(prompt) or not text.startswith(answer, at):
            raise SparsightError(
                f"sample {quote(sample.id)}: the chat template writes an answer not right behind the prompt that asks for "
                f"it, so the answer's tokens cannot be told; mark them in the template with {{% generation %}}"
            )
        stop = at + len(answer)
        match = end.match(text, stop)
        spans.append((len(prompt), match.end() if match else stop))
        if not match and turn == len(sample.turns) - 1 and processor.tokenizer.eos_token:
            text = text[:stop] + processor.tokenizer.eos_token
            spans[-1] = (len(prompt), len(text))
    return text, spans


def _render_marked(processor: Any, dialogue: list[Message]) -> tuple[str, list[Span]]:
    """Render a dialogue, with the (start, stop) of its answers if the template marks them, else with none."""
    source = template(processor)
    if not isinstance(source, str) or not re.search(r"{%-?\s*generation\s*-?%}", source):
        return _render(processor, dialogue, ask=False), []
    try:
        rendered: Any = render_jinja_template(
            conversations=[dialogue],
            chat_template=source,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise TemplateFault(first_line(error)) from error
    (text,), (marked,) = rendered
    spans = [(int(start), int(stop)) for start, stop in marked]
    return str(text), spans if len(spans) == len(dialogue) // 2 else []


def _token_spans(processor: Any, sample: str, text: str, spans: list[Span], images: list[Any], ids: list[int]) -> list[Span]:
    """Turn spans in `text` into spans in `ids`, its encoding with all images expanded.

    Tokens are counted from the end, behind the last image, where the processor changes no text; only a dialogue with an
    image behind its first answer needs the processor again.
    """
    image_token = str(getattr(processor, "image_token", None) or "")
    last = text.rfind(image_token) + len(image_token) if image_token and images else 0
    count: Callable[[str], list[int]]
    if images and (not image_token or last > spans[0][0]):

        def count(part: str) -> list[int]:
            pictures = images[: part.count(image_token)] if image_token else images
            return _call(processor, [part], [pictures], side="right")["input_ids"][0].tolist()
    else:

        def count(part: str) -> list[int]:
            return processor.tokenizer(part[last:], add_special_tokens=False)["input_ids"]

    whole = count(text)
    shift = len(ids) - len(whole)
    places: list[Span] = []
    for start, stop in spans:
        before, through = count(text[:start]), count(text[:stop])
        if whole[: len(before)] != before or whole[: len(through)] != through:
            raise SparsightError(
                f"sample {quote(sample)}: the tokenizer joins an answer with the text around it "
                f"({quote(text[start:stop])}), so its tokens are not those the model would be asked to write"
            )
        places.append((shift + len(before), shift + len(through)))
    first = places[0][0]
    if shift < 0 or ids[first:] != whole[first - shift :]:
        raise SparsightError(f"sample {quote(sample)}: the processor encodes the answers otherwise than its tokenizer does")
    return places
