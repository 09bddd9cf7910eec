"""The teacher's hidden states at answer positions, computed once, on disk, read by memory map.

One safetensors file per `CHUNK` samples, written beside and renamed, so that an interrupted computation continues at the
next file and several processes divide the files. The folder is named by a hash of the teacher's weights, the data and the
processor.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from sparsight import distributed
from sparsight.data.chat import template
from sparsight.data.encoding import Encoder, select_answers
from sparsight.errors import SparsightError, first_line
from sparsight.files import replace_file
from sparsight.masks.bits import weight_hash
from sparsight.progress import Progress
from sparsight.restoring.head import Head

CHUNK = 256  # samples per file
FORMAT = 1
logger = logging.getLogger(__name__)


def cache_key(model: nn.Module, encoder: Encoder, samples: Sequence[Any], fingerprint: str) -> str:
    """Hash all that the hidden states depend on: every weight, the samples, how the processor writes them.

    `fingerprint` is that of the data they are taken from, whose images it covers.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {weight_hash(parameter.data)}\n".encode())
    processor = encoder.processor
    words = sorted(processor.tokenizer.get_vocab().items())
    special = [str(token) for token in processor.tokenizer.all_special_tokens]
    config = encoder.config.to_json_string()
    facts = [FORMAT, fingerprint, str(processor.to_dict()), template(processor), words, special, config]
    digest.update(json.dumps(facts, default=str).encode())
    for sample in samples:
        turns = [[turn.prompt, list(turn.answers)] for turn in sample.turns]
        digest.update(json.dumps([sample.id, turns, *([sample.system] if sample.system else [])]).encode())
    return digest.hexdigest()


def check_rest(facts: Any) -> Any:
    """Facts of a sparse model whose training samples are all checked: a stored teacher has a place for each of them."""
    late, end = facts.encoder.late, len(facts.samples) - facts.held_out
    if not late:
        return facts
    tried, rest, held = facts.samples[: end - late], facts.samples[end - late : end], facts.samples[end:]
    facts.encoder.late = 0
    return replace(facts, samples=[*tried, *facts.encoder.usable(rest), *held])


class TeacherCache:
    """The hidden states of `samples` in `folder`; `cache[i]` are those of sample i, (answer tokens, d)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
        self.starts: list[list[int]] = []  # of each file: where the rows of its samples start, and where the last end
        for file in self.files:
            counts = file.get_tensor("counts")
            self.starts.append([0, *counts.cumsum(0).tolist()])
        self.rows = [file.get_slice("hidden") for file in self.files]

    def __reduce__(self) -> tuple[type[TeacherCache], tuple[Path]]:
        return TeacherCache, (self.folder,)  # another process opens the files itself

    def __getitem__(self, sample: int) -> torch.Tensor:
        chunk, place = divmod(sample, CHUNK)
        start, stop = self.starts[chunk][place : place + 2]
        return self.rows[chunk][start:stop]

    @property
    def bytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


@torch.no_grad()
def fill_cache(
    folder: Path,
    model: Any,
    head: Head,
    samples: Sequence[Any],
    encoder: Encoder,
    batch_size: int,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> None:
    """Compute the files missing in `folder`, every process its share of them; return once all exist."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = range(0, len(samples), CHUNK)
    for number, start in enumerate(chunks):
        path = folder / f"{number:05d}.safetensors"
        if number % distributed.world_size() != distributed.rank() or _is_whole(path, min(CHUNK, len(samples) - start)):
            continue
        hidden, counts = [], []
        for first in range(start, min(start + CHUNK, len(samples)), batch_size):
            part = samples[first : min(first + batch_size, start + CHUNK)]
            batch = encoder.encode(part).to(device)
            labels = batch.inputs["labels"]
            states, _ = select_answers(head.hidden(model, batch.inputs), labels, encoder.shifted)
            hidden.append(states.cpu())
            counts += _per_sample(labels, part, encoder)
            if progress:
                progress("teacher", min(first + batch_size, len(samples)), len(samples))
        with replace_file(path) as beside:
            save_file({"hidden": torch.cat(hidden), "counts": torch.tensor(counts)}, beside)
    distributed.barrier()


def _is_whole(path: Path, samples: int) -> bool:
    """Whether a file holds the hidden states of so many samples; one that is damaged is named in the log.

    **Raises** `SparsightError` for a file that may not be read.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            counts = file.get_tensor("counts")
            whole = len(counts) == samples and file.get_slice("hidden").get_shape()[0] == int(counts.sum())
    except PermissionError as error:
        raise SparsightError(f"`teacher_cache`: {path} cannot be read ({first_line(error)}); give another folder") from error
    except (OSError, SafetensorError):
        whole = False
    if not whole:
        logger.warning("%s is damaged; it is computed again", path)
    return whole


def _per_sample(labels: torch.Tensor, samples: Sequence[Any], encoder: Encoder) -> list[int]:
    """Answer tokens of every sample, whose turns may be rows of their own."""
    each = (labels[:, int(encoder.shifted) :] != -100).sum(1).tolist()
    counts = []
    for sample in samples:
        rows = 1 if encoder.style.turns else len(sample.turns)
        counts.append(sum(each[:rows]))
        del each[:rows]
    return counts
