"""InstructBLIP and BLIP-2: one image, whose query tokens stand before everything else, one question, one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsight.data.pixels import converts
from sparsight.data.sample import PLACEHOLDER, Sample
from sparsight.errors import SparsightError, quote


def refuse(sample: Sample) -> str | None:
    """Return why the model cannot take a sample (it has not exactly one image), or None."""
    return None if len(sample.images) == 1 else f"this model takes exactly one image, got {len(sample.images)}"


def prompts(processor: Any, samples: Sequence[Sample], config: Any) -> dict[str, Tensor]:
    """Encode the questions: padded on the left for a decoder-only language model, else on the right.

    The Q-Former's own copy of the question is always padded on the right, since its positions are absolute.
    """
    inputs = _questions(processor, samples, config)
    if not config.text_config.is_encoder_decoder:
        inputs |= _pad(_rows(inputs), _pad_id(processor), left=True)
    return inputs


def encode(processor: Any, samples: Sequence[Sample], config: Any) -> dict[str, Tensor]:
    """Encode questions and answers, padded on the right.

    An encoder-decoder gets the answers as its decoder's labels, a decoder-only model behind the questions.

    **Raises** `SparsightError` if the tokenizer joins a question with its answer.
    """
    tokenizer = processor.tokenizer
    inputs = separate_lengths(_questions(processor, samples, config), config)
    end = _end(processor, config)
    answers = [sample.turns[-1].answer.strip() for sample in samples]
    if config.text_config.is_encoder_decoder:
        rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] + [end] for answer in answers]
        padded = _pad(rows, -100, avoid=inputs["input_ids"].shape[1])
        return {**inputs, "labels": padded["input_ids"], "decoder_attention_mask": padded["attention_mask"]}
    questions = _rows(inputs)
    rows = []
    for sample, question, answer in zip(samples, questions, answers, strict=True):
        prompt = _prompt(sample)
        before, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
        if whole[: len(before)] != before or question[len(question) - len(before) :] != before:
            raise SparsightError(
                f"sample {quote(sample.id)}: the tokenizer does not begin prompt and answer as it does the prompt alone, so "
                f"the answer's tokens are not those the model would be asked to write"
            )
        rows.append([*whole[len(before) :], end])
    inputs |= _pad([q + row for q, row in zip(questions, rows, strict=True)], _pad_id(processor))
    labels = [[-100] * len(question) + row for question, row in zip(questions, rows, strict=True)]
    return {**inputs, "labels": _pad(labels, -100)["input_ids"]}


def _questions(processor: Any, samples: Sequence[Sample], config: Any) -> dict[str, Tensor]:
    if getattr(processor, "num_query_tokens", None) is None:
        raise SparsightError(
            f"{type(processor).__name__} has no num_query_tokens, so it writes no image tokens; set it to the value in "
            f"the model's config and save the processor again"
        )
    images = [image for sample in samples for image in sample.load_images(alpha=converts(processor))]
    texts = [_prompt(sample) for sample in samples]
    inputs = dict(processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt"))
    token, queries = getattr(config, "image_token_index", None), config.num_query_tokens
    written = [] if token is None else (inputs["input_ids"] == token).sum(1).tolist()
    if wrong := [n for n in written if n != queries]:  # the model puts in as many queries as fit, and says nothing
        raise SparsightError(
            f"{type(processor).__name__} writes {wrong[0]} of the model's image tokens (number {token}) for an image, and "
            f"the model has {queries} queries; give the processor that was saved with the model"
        )
    return inputs


def separate_lengths(inputs: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Pad the Q-Former's text until its masks, alone and behind the queries, have the length of no other input.

    Such inputs are the queries and the image's P features, which the queries attend to.
    """
    if "qformer_input_ids" not in inputs:
        return inputs
    queries, features = config.num_query_tokens, _features(config.vision_config)
    length = inputs["qformer_input_ids"].shape[1]
    width = length
    while width in (queries, features, features - queries):
        width += 1
    if width > length:
        for key in ("qformer_input_ids", "qformer_attention_mask"):
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, width - length))
    return inputs


def _features(vision: Any) -> int:
    """Return the number P of an image's features: one per patch, and one for the whole image."""
    return (vision.image_size // vision.patch_size) ** 2 + 1


def _prompt(sample: Sample) -> str:
    return sample.with_system_in_prompt().prompt.replace(PLACEHOLDER, " ").strip()


def _end(processor: Any, config: Any) -> int:
    """Return the token that the language model stops at: for BLIP-2's OPT a line end, not the tokenizer's end token."""
    end = config.text_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    return processor.tokenizer.eos_token_id if end is None else end


def _pad_id(processor: Any) -> int:
    pad = processor.tokenizer.pad_token_id
    return 0 if pad is None else pad


def _rows(inputs: dict[str, Tensor]) -> list[list[int]]:
    """Return the tokens of each row without its padding."""
    masks = inputs["attention_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], masks, strict=True)]


def _pad(rows: list[list[int]], value: int, *, left: bool = False, avoid: int = -1) -> dict[str, Tensor]:
    """Stack rows as (B, T) with their mask, T being one more than the longest row needs if that is `avoid`."""
    width = max(map(len, rows))
    width += width == avoid
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
