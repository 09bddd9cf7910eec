"""Batches that a user made: dicts of model inputs, or a DataLoader of them, with the masks of real tokens read from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsight.data.encoding import TOKENS, Batch, is_encoder_decoder, padding_masks
from sparsight.data.qformer import separate_lengths
from sparsight.data.sample import Sample
from sparsight.data.sources import Samples, Source, read_with
from sparsight.errors import SparsightError

NOT_BATCHES = "give a list of dicts, a DataLoader, or a data source and `processor`"


def as_batches(
    model: nn.Module, batches: Any, *, limit: int | None = None, most: int | None = None, device: Any = None
) -> list[Batch]:
    """Take a user's batches: dicts of tensors that `model(**batch)` takes; floats get the model's dtype.

    They are put on `device`, by default the model's. A list is taken whole, any other iterable (a DataLoader) until `limit`
    samples or `most` batches are there. Batches of `sparsight.data.batches` stay as they are. What padding is, the batch's
    own masks say: `attention_mask`, and for an encoder-decoder `decoder_attention_mask` or the labels that are not -100.

    **Raises** `SparsightError` for what is no batch, and for a batch whose padding cannot be told.
    """
    if isinstance(batches, Mapping | str | Tensor) or not isinstance(batches, Iterable):
        raise SparsightError(f"`data`: {type(batches).__name__} is not a sequence of batches; {NOT_BATCHES}")
    own: list[Batch] = []
    rows, whole = 0, isinstance(batches, list | tuple)
    for number, batch in enumerate(batches):
        own.append(_as_batch(model, number, batch, device))
        rows += own[-1].rows
        if not whole and ((limit is not None and rows >= limit) or len(own) == most):
            break
    if not own:
        raise SparsightError("`data`: there is no batch; give at least one")
    return own


def as_samples(data: Any, spec: Any, *, held_out: bool = False) -> Samples | None:
    """The samples of a data source, as many as settings ask for, or of a list of `Sample`; None for what is neither.

    `held_out` samples are to be scored.
    """
    if isinstance(data, str | Path | Source) or (data is None and getattr(spec, "task", None)):
        seed = spec.seed if spec.samples else None
        return read_with(data, spec, held_out=held_out, limit=spec.samples, seed=seed)
    if isinstance(data, list | tuple) and data and all(isinstance(sample, Sample) for sample in data):
        return Samples(tuple(data), "samples in memory", "")
    return data if isinstance(data, Samples) else None


def as_samples_or_batches(
    model: nn.Module, data: Any, spec: Any, most: int | None = None, *, held_out: bool = False
) -> Samples | OwnBatches:
    """Samples of a source, or a user's own batches in their place; `spec` says how many samples to draw.

    The batches stay on the CPU, and no more than `most` of them are read.

    **Raises** `SparsightError` for no data, for what is neither, and for batches without labels.
    """
    if data is None:
        raise SparsightError("`data`: is missing; give training samples, or batches of your own")
    samples = as_samples(data, spec, held_out=held_out)
    if samples is not None:
        return samples
    check_unused(data, spec)
    own = OwnBatches(as_batches(model, data, limit=spec.samples, most=most, device="cpu"))
    check_labels(own, "data", "training")
    return own


def check_unused(data: Any, spec: Any, *fields: str) -> None:
    """Refuse settings that mean nothing for batches of the user's own, and `fields`: **raises** `SparsightError`."""
    defaults = type(spec)()
    if isinstance(data, list | tuple) and spec.samples != defaults.samples:
        raise SparsightError("`samples`: a list of batches is taken whole; leave it out, or give fewer batches")
    for field in ("batch_size", "skip_bad", "images", "split", "max_length", *fields):
        if getattr(spec, field) != getattr(defaults, field):
            raise SparsightError(f"`{field}`: means nothing for batches of your own; leave it out")


def check_labels(batches: Sequence[Batch], field: str, name: str) -> None:
    """Refuse batches without labels, which `name` needs: **raises** `SparsightError`, naming `field`."""
    for number, batch in enumerate(batches):
        if "labels" not in batch.inputs:
            raise SparsightError(
                f"`{field}`: {name} needs labels, and batch {number} has none; add `labels`, -100 off answers"
            )
        if bool((batch.inputs["labels"][:, int(batch.shifted) :] == -100).all()):
            raise SparsightError(f"`{field}`: {name} needs labels, and in batch {number} all of them are -100; leave it out")


class OwnBatches(Sequence[Batch]):
    """A user's batches in the place of samples and their encoder: each batch counts as one sample."""

    shifted: bool

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self.shifted = self.batches[0].shifted
        self.skipped: list[tuple[str, str]] = []
        self.late = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def usable(self, batches: Sequence[Batch], first: int | None = None) -> list[Batch]:
        """All of them."""
        return list(batches)

    def encode(self, batches: Sequence[Batch]) -> Batch:
        """The one batch that is given. **Raises** `SparsightError` for several, which cannot be joined."""
        if len(batches) != 1:
            raise SparsightError("`batch_size`: batches of your own are trained on one by one; leave it out")
        return batches[0]


def _as_batch(model: nn.Module, number: int, batch: Any, device: Any) -> Batch:
    parameter = next(model.parameters())
    device = parameter.device if device is None else device
    if isinstance(batch, Batch):
        return batch.to(device)
    if not isinstance(batch, Mapping):
        raise SparsightError(f"`data`: batch {number} is {type(batch).__name__} and no dict of model inputs; {NOT_BATCHES}")
    inputs: dict[str, Tensor] = {}
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            raise SparsightError(f"`data`: batch {number}: {key} is {type(value).__name__} and not a tensor; leave it out")
        inputs[key] = value.to(device, parameter.dtype if value.is_floating_point() else None)
    config: Any = model.config
    if "input_ids" not in inputs and not (is_encoder_decoder(config) and any(key in inputs for key in TOKENS)):
        raise SparsightError(f"`data`: batch {number} has no input_ids; give what `model(**batch)` takes")
    _check_shapes(inputs, number, config)
    if "qformer_input_ids" in inputs:
        inputs["qformer_attention_mask"] = _mask(inputs, "qformer_input_ids", "qformer_attention_mask", number, config)
    inputs = _with_own_widths(inputs, config)
    masks = dict(inputs)
    if "input_ids" in inputs:
        masks["attention_mask"] = _mask(inputs, "input_ids", "attention_mask", number, config)
    if is_encoder_decoder(config):
        masks["decoder_attention_mask"] = _decoder_mask(inputs, number, config)
    return Batch(inputs, padding_masks(masks, config), ())


def _check_shapes(inputs: Mapping[str, Tensor], number: int, config: Any) -> None:
    """Refuse tokens that are not (rows, tokens), and masks and labels of another shape than their tokens."""
    likes = {"attention_mask": "input_ids", "qformer_attention_mask": "qformer_input_ids"}
    likes |= {"labels": "input_ids"} if not is_encoder_decoder(config) else {}
    likes |= {"decoder_attention_mask": "labels" if "labels" in inputs else "decoder_input_ids"}
    for key, tensor in inputs.items():
        if key in ("input_ids", "qformer_input_ids", "labels", "decoder_input_ids") and tensor.dim() != 2:
            raise SparsightError(f"`data`: batch {number}: {key} has shape {tuple(tensor.shape)}; give (rows, tokens)")
        like = inputs.get(likes.get(key, ""))
        if like is not None and tensor.shape != like.shape:
            raise SparsightError(
                f"`data`: batch {number}: {key} has shape {tuple(tensor.shape)} and {likes[key]} {tuple(like.shape)}; "
                "give both the same"
            )


def _mask(inputs: Mapping[str, Tensor], ids: str, key: str, number: int, config: Any) -> Tensor:
    """The mask of real tokens of `ids` (B, T): the batch's own, or all of them where no row can hold padding."""
    if key in inputs:
        return inputs[key]
    tokens = inputs[ids]
    pad = _pad(config) if ids != "qformer_input_ids" else None
    alone = len(tokens) == 1
    unpadded = pad is not None and not bool(((tokens[:, 0] == pad) | (tokens[:, -1] == pad)).any())
    if not alone and not unpadded:
        raise SparsightError(
            f"`data`: batch {number} has no {key}, so padding cannot be told from tokens; "
            f"add {key}, or give samples one by one"
        )
    return tokens.new_ones(tokens.shape)


def _pad(config: Any) -> Any:
    """The padding token; None where the configuration names none."""
    return getattr(config.get_text_config(), "pad_token_id", None)


def _decoder_mask(inputs: Mapping[str, Tensor], number: int, config: Any) -> Tensor:
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"]
    pad = _pad(config)
    if "labels" in inputs:
        if pad is not None and len(inputs["labels"]) > 1 and bool((inputs["labels"] == pad).any()):
            raise SparsightError(f"`data`: batch {number} has the padding token {pad} in its labels; put -100 in its place")
        return (inputs["labels"] != -100).long()
    if "decoder_input_ids" not in inputs:
        raise SparsightError(f"`data`: batch {number} has neither labels nor decoder_input_ids, which the decoder needs")
    tokens = inputs["decoder_input_ids"]
    if pad is not None and len(tokens) > 1 and bool((tokens[:, -1] == pad).any()):
        raise SparsightError(f"`data`: batch {number} has no decoder_attention_mask; add it, so that padding is known")
    return tokens.new_ones(tokens.shape)


def _with_own_widths(inputs: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Pad the decoder's tokens, or the Q-Former's, by one where their number is that of other inputs: masks go by number."""
    if is_encoder_decoder(config) and "input_ids" in inputs:
        width = inputs["input_ids"].shape[1]
        fill = {"labels": -100, "decoder_input_ids": _pad(config) or 0, "decoder_attention_mask": 0}
        for key, value in fill.items():
            if key in inputs and inputs[key].shape[1] == width:
                inputs[key] = nn.functional.pad(inputs[key], (0, 1), value=value)
    return separate_lengths(inputs, config)
