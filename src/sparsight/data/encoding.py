"""Samples to tensors, with the model's own processor: what goes in, which positions are answers, which are padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsight.data import chat, paligemma, qformer
from sparsight.data.limits import Limits, vocabulary
from sparsight.data.sample import PLACEHOLDER, Sample
from sparsight.data.sources import reasons as count_reasons
from sparsight.errors import Notice, SparsightError, first_line, quote
from sparsight.memory import is_out_of_memory


@dataclass(frozen=True)
class Batch:
    """Some samples as one call of the model.

    Call the model as `model(**inputs)`. The `labels` are -100 everywhere but at answers and at the token that ends
    each of them; for a decoder-only model they lie on `input_ids`, unshifted, as transformers expects. `padding` has
    boolean masks, true at real tokens: "text" (B, T), "decoder" (B, Td) for an encoder-decoder, where Td is never T, so
    that the length identifies a mask, "vision" (images, patches) where images are padded, and for a Q-Former that reads
    the question "instruction" (B, Tq) and "queries" (B, queries + Tq); "image" (B, T) is true where a token of the text
    stands for a part of an image. `samples` has the sample of each row, of one turn each where the model takes only one;
    `encode` encodes some of them again.
    """

    inputs: dict[str, Tensor]
    padding: dict[str, Tensor]
    samples: tuple[Sample, ...]
    encode: Callable[[Sequence[Sample]], Batch] | None = field(default=None, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """The number of sequences."""
        return len(next(self.inputs[key] for key in TOKENS if key in self.inputs))

    @property
    def shifted(self) -> bool:
        """Whether the labels lie on the input tokens, one place behind the logits that predict them."""
        return "decoder" not in self.padding

    def to(self, device: torch.device | str) -> Batch:
        """Copy every tensor to a device."""

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: tensor.to(device) for key, tensor in tensors.items()}

        return Batch(move(self.inputs), move(self.padding), self.samples, self.encode)


def select_answers(logits: Tensor, labels: Tensor, shifted: bool, *, all_positions: bool = False) -> tuple[Tensor, Tensor]:
    """Select the logits (n, V) that predict the n answer tokens, and those tokens (n,).

    `logits` (B, T, V), or hidden states (B, T, d); `labels` (B, T), -100 outside the answers. With `shifted` position t
    predicts token t + 1, as in decoder-only models; without it label t, as in encoder-decoders. `all_positions` selects
    every position.
    """
    logits = logits[:, logits.shape[1] - labels.shape[1] :]  # a model may put image positions in front of the text
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    where = torch.ones_like(labels, dtype=torch.bool) if all_positions else labels != -100
    return logits[where], labels[where]


IMAGE_FIRST = ("git",)  # the positions of the image stand in front of the tokens, without tokens of their own
TOKENS = ("input_ids", "decoder_input_ids", "labels")  # inputs with a row per sequence


IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model's labels are the outputs of a decoder of their own, and not on its input tokens."""
    return bool(getattr(config, "is_encoder_decoder", False) or config.get_text_config().is_encoder_decoder)


FIRST = 5000  # training samples that are tried before the work begins; the demo has 4,800
CHECKED = 8  # samples encoded at once to see whether they can be
Reason = str | SparsightError | None  # why a sample cannot be taken
Write = Callable[[Any, Sequence[Sample], Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Style:
    """How to call one kind of processor; `encode` and `prompts` take (processor, samples, config)."""

    encode: Write
    prompts: Write
    refuse: Callable[[Sample], str | None]  # why a sample cannot be taken
    turns: bool  # whether one sequence holds a whole dialogue


CHAT = Style(chat.encode, chat.prompts, chat.refuse, turns=True)
PLAIN = {
    "instructblip": Style(qformer.encode, qformer.prompts, qformer.refuse, turns=False),
    "blip-2": Style(qformer.encode, qformer.prompts, qformer.refuse, turns=False),
    "paligemma": Style(paligemma.encode, paligemma.prompts, paligemma.refuse, turns=False),
}


class Encoder:
    """Encode samples for one model.

    Of `model` only the config and the dtype are read; pixels come in the model's dtype. A model with a chat template
    takes whole dialogues, and every answer in them counts; InstructBLIP, BLIP-2 and PaliGemma take one question, so
    `encode` makes one row per turn. Of several answers to a question the most frequent is encoded, the first of them on
    a tie. Nothing is ever truncated: a sample longer than `max_length`, or than the positions of the model, is an error.
    With `skip_bad`, samples that the model cannot take, and too long ones, are left out and listed in `skipped` as
    (id, reason).

    **Raises** `SparsightError` for a processor without a chat template, where the model type needs one.
    """

    def __init__(self, processor: Any, model: Any, *, max_length: int | None = None, skip_bad: bool = False) -> None:
        self.processor = processor
        self.config = getattr(model, "config", model)
        self.dtype: torch.dtype | None = getattr(model, "dtype", None)
        self.max_length = max_length
        self.skip_bad = skip_bad
        self.limits = Limits.of(self.config, processor)
        self.vocabulary = vocabulary(model)
        self.skipped: list[tuple[str, str]] = []
        self.late = 0  # samples that are tried when they are encoded, as `usable` would
        self.style = PLAIN.get(self.config.model_type, CHAT)
        if self.style is CHAT and not chat.template(processor):
            raise SparsightError(
                f"{type(processor).__name__} has no chat template, and Sparsight knows no other way to ask a "
                f"{self.config.model_type!r} model; save a chat template with the processor"
            )

    @property
    def shifted(self) -> bool:
        """Whether the labels lie on the input tokens, as in `Batch.shifted`; not in encoder-decoders."""
        return not is_encoder_decoder(self.config)

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Encode questions with their answers, padded on the right.

        **Raises** `SparsightError` for the first sample that the model cannot take; with `skip_bad`, only if none is left.
        """
        batch = self.attempt(samples)
        if batch is None:
            reasons = "; ".join(f"{quote(sample)}: {reason}" for sample, reason in self.skipped[-3:])
            raise SparsightError(f"no sample of this batch can be encoded: {reasons}")
        return batch

    def attempt(self, samples: Sequence[Sample]) -> Batch | None:
        """Encode like `encode`, but return None where every sample is skipped."""
        rows = self._asked(samples)
        if not self.style.turns:
            rows = [row for sample in rows for row in self._rows_of(sample)]
        rows = self._without(rows, [self.refusal(sample) for sample in rows])
        while rows:
            inputs, reasons = self._try(rows, usual=bool(self.late))
            kept = self._without(rows, reasons)
            if len(kept) == len(rows) and inputs is not None:
                return Batch(inputs, padding_masks(inputs, self.config), tuple(rows), self.encode)
            rows = kept
        return None

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Encode the last questions, after the dialogues so far, for `generate`: one row per sample.

        Decoder-only models are padded on the left, encoder-decoders on the right.

        **Raises** `SparsightError` for the first sample that the model cannot take.
        """
        samples = self._asked(samples)
        for sample in samples:
            if reason := self.refusal(sample):
                raise SparsightError(f"sample {quote(sample.id)}: {reason}")
        if not self.style.turns:
            samples = [replace(s, turns=s.turns[-1:]) for s in samples]
        try:
            return self._call(self.style.prompts, samples)
        except SparsightError:
            if len(samples) > 1:
                for sample in samples:  # the error then names the right one
                    self._call(self.style.prompts, [sample])
            raise

    def usable(self, samples: Sequence[Sample], first: int | None = None) -> list[Sample]:
        """Return the samples that the model can take. Each is encoded once, with its answers, and the result is dropped.

        Samples of a benchmark come with the prompts of this type of model. With `first` only so many are tried, and the
        others are checked when they are encoded.

        **Raises** `SparsightError` for the first that it cannot take, or that is longer than the model was made for; with
        `skip_bad` those are left out and listed in `skipped`, and it is an error only if none is left.
        """
        kept: list[Sample] = []
        refused: list[str] = []
        stop = len(samples) if first is None else min(first, len(samples))
        for start in range(0, stop, CHECKED):
            part = self._asked(samples[start : min(start + CHECKED, stop)])
            reasons = self._reasons(part)
            kept += self._without(part, reasons)
            refused += [_plain(sample, reason) for sample, reason in zip(part, reasons, strict=True) if reason]
        if not kept:
            raise SparsightError(f"none of the {stop} samples can be taken: {count_reasons(refused)}")
        if rest := len(samples) - stop:
            self.late = rest
            warnings.warn(
                f"{rest:,} of {len(samples):,} samples are not tried yet; one that cannot be used is named when "
                "its turn comes, or left out with `skip_bad`",
                Notice,
                2,
            )
        return kept + self._asked(samples[stop:])

    def _reasons(self, samples: Sequence[Sample]) -> list[Reason]:
        """Why each sample cannot be taken; one that is several rows has the reason of the first."""
        reasons: list[Reason] = [self.refusal(sample) for sample in samples]
        rows = [(i, row) for i, sample in enumerate(samples) if reasons[i] is None for row in self._rows_of(sample)]
        if rows:
            _, more = self._try([row for _, row in rows], usual=True)
            for (i, _), reason in zip(rows, more, strict=True):
                reasons[i] = reasons[i] or reason
        return reasons

    def _try(self, rows: Sequence[Sample], usual: bool = False) -> tuple[dict[str, Tensor] | None, Sequence[Reason]]:
        """Encode rows, and say why each cannot be taken; where they cannot be encoded together, one by one."""
        try:
            inputs = self._call(self.style.encode, rows)
        except SparsightError as error:
            if len(rows) == 1:
                return None, [error]
            alone = [self._try([row], usual)[1][0] for row in rows]
            if not any(isinstance(reason, SparsightError) for reason in alone):
                raise
            return None, alone
        long = self.limits.too_long(inputs, self.max_length, usual=usual)
        return inputs, [known or own for known, own in zip(long, self._unknown(inputs), strict=True)]

    def _unknown(self, inputs: dict[str, Tensor]) -> list[str | None]:
        """Why the model has no embedding for a token of each row, None where it has all of them."""
        reasons: list[str | None] = [None] * len(inputs["attention_mask"])
        marks = {getattr(self.config, name, None) for name in IMAGE_TOKENS}  # many models put images over these
        for key in TOKENS:
            if self.vocabulary is not None and key in inputs:
                for row, place in (inputs[key] >= self.vocabulary).nonzero().tolist():
                    token = int(inputs[key][row, place])
                    word = self.processor.tokenizer.convert_ids_to_tokens(token)
                    if token not in marks:
                        reasons[row] = (
                            f"its text holds {quote(word)}, which is token {token}, and the model has {self.vocabulary} "
                            "embeddings; give the tokenizer that was saved with the model, or resize the embeddings"
                        )
        return reasons

    def _asked(self, samples: Sequence[Sample]) -> list[Sample]:
        return [sample.in_words_of(self.config.model_type) for sample in samples]

    def _rows_of(self, sample: Sample) -> list[Sample]:
        return [sample] if self.style.turns else [replace(sample, turns=(turn,)) for turn in sample.turns]

    def _call(self, write: Write, rows: Sequence[Sample]) -> dict[str, Tensor]:
        try:
            inputs = write(self.processor, rows, self.config)
        except SparsightError:
            raise
        except Exception as error:  # a processor may raise anything
            if is_out_of_memory(error):
                raise
            who = f"sample {quote(rows[0].id)}" + (" or one in its batch" if len(rows) > 1 else "")
            fault = isinstance(error, chat.TemplateFault)
            hint = "its files, above all the chat template" if fault else "the sample, or leave it out with `skip_bad`"
            raise SparsightError(
                f"{who} cannot be written by the model's processor: {first_line(error)}; mend {hint}"
            ) from error
        return {key: t.to(self.dtype) if t.is_floating_point() and self.dtype else t for key, t in inputs.items()}

    def refusal(self, sample: Sample) -> str | None:
        """Return why the model cannot take a sample, or None."""
        if not sample.turns or any(not turn.answers for turn in sample.turns):
            return "it has no turn, or a turn without an answer"
        prompts = [turn.prompt for turn in sample.turns]
        texts = [sample.system, *(answer for turn in sample.turns for answer in turn.answers)]
        for mark in sorted({PLACEHOLDER, *chat.image_marks(self.processor)}):
            if any(mark in text for text in (*texts, *(prompts if mark != PLACEHOLDER else ()))):
                return f"its text holds {mark}, which stands for an image; take it out"
        end = getattr(self.processor.tokenizer, "eos_token", None)
        if end and end.strip() and any(end in text for text in (*texts, *prompts)):
            return f"its text holds {end}, at which the model ends an answer; take it out"
        return self.style.refuse(sample)

    def _without(self, rows: Sequence[Sample], reasons: Sequence[Reason]) -> list[Sample]:
        kept = []
        for sample, reason in zip(rows, reasons, strict=True):
            if reason is None:
                kept.append(sample)
            elif self.skip_bad:
                entry = (sample.id, _plain(sample, reason))
                if entry not in self.skipped:  # every epoch meets it again
                    self.skipped.append(entry)
            elif isinstance(reason, SparsightError):
                raise reason
            else:
                raise SparsightError(f"sample {quote(sample.id)}: {reason}")
        return kept


def _plain(sample: Sample, reason: str | SparsightError) -> str:
    """A reason without the name of its sample."""
    return str(reason).removeprefix(f"sample {quote(sample.id)}").removeprefix(":").strip()


def padding_masks(inputs: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the masks of real tokens of an encoded batch, as in `Batch.padding`."""
    masks: dict[str, Tensor] = {}
    if "input_ids" in inputs:
        masks["text"] = inputs["attention_mask"].bool()
        image_token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if image_token is not None:
            masks["image"] = inputs["input_ids"] == image_token
        if config.model_type in IMAGE_FIRST and "pixel_values" in inputs:
            masks |= _with_image_first(masks["text"], inputs["pixel_values"], config.vision_config)
    elif "attention_mask" in inputs:  # that of patches, as in Pix2Struct
        masks["vision"] = inputs["attention_mask"].bool()
    if "decoder_attention_mask" in inputs:
        masks["decoder"] = inputs["decoder_attention_mask"].bool()
    if "qformer_attention_mask" in inputs:
        question = inputs["qformer_attention_mask"].bool()
        masks["instruction"] = question
        masks["queries"] = torch.cat([question.new_ones(len(question), config.num_query_tokens), question], dim=1)
    mask, pixels = inputs.get("pixel_attention_mask"), inputs.get("pixel_values")
    if mask is not None and pixels is not None and mask.dim() == 4:
        masks["vision"] = _real_patches(inputs, config.vision_config.patch_size)
    elif mask is not None and pixels is not None and mask.dim() == 2 and pixels.dim() == 3:
        masks["vision"] = mask.bool()  # (images, patches), as in Siglip 2
    return masks  # a mask of whole images, (B, images), says nothing of the patches of one


def _with_image_first(text: Tensor, pixels: Tensor, vision: Any) -> dict[str, Tensor]:
    """The masks "text" and "image" (B, positions of the image + T), of `pixels` (B, [frames,] channels, H, W)."""
    frames = pixels.shape[1] if pixels.dim() == 5 else 1
    image = text.new_ones(len(text), frames * ((vision.image_size // vision.patch_size) ** 2 + 1))
    return {"text": torch.cat([image, text], 1), "image": torch.cat([image, torch.zeros_like(text)], 1)}


def _real_patches(inputs: dict[str, Tensor], size: int) -> Tensor:
    """Return which patches (images, patches) hold pixels: SmolVLM pads images to one size and samples to one number of them.

    Padding images are all zero; the model drops them before its vision tower, so they have no row here.
    """
    there = inputs["pixel_values"].flatten(2).any(2)  # (B, images)
    mask = inputs["pixel_attention_mask"][there].bool()  # (n, H, W)
    return mask.unfold(1, size, size).unfold(2, size, size).flatten(3).any(3).flatten(1)
