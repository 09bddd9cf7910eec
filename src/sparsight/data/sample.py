"""One example: images, and questions with their answers."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sparsight.data.pixels import opened, upright
from sparsight.errors import SparsightError, first_line, quote

PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Turn:
    """A question and people's answers to it; the answer of several people is listed several times."""

    prompt: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The answer to train on: the most frequent one, the first of them on a tie."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class Wording:
    """How a question is put to a model: a text by model type, "" for every other type.

    `{question}` and `{options}` in it stand for those of a sample, the options a line each: "A. red".
    """

    texts: Mapping[str, str]

    def text(self, model_type: str) -> str:
        """The text for a type of model."""
        return self.texts.get(model_type, self.texts.get("", "{question}"))


@dataclass(frozen=True)
class Sample:
    """Images with one or more turns about them.

    An image is a file, the bytes of one, an image in memory, or one in a table that is read when it is used. The images
    stand before the first prompt, unless prompts hold `<image>` placeholders, one per image and in the order of `images`,
    which say where each belongs. `kind` groups samples in an evaluation ("caption", "vqa", ...). `system` is an instruction
    that stands before the dialogue.
    `options` are those of a question with a letter for an answer. A sample of a benchmark has its plain question for a
    prompt, and a `wording`, by which `in_words_of` writes the prompt for a type of model.
    """

    id: str
    images: tuple[Any, ...]
    turns: tuple[Turn, ...]
    kind: str = ""
    system: str = ""
    options: tuple[str, ...] = ()
    wording: Wording | None = None

    def in_words_of(self, model_type: str) -> Sample:
        """The sample as a model of this type is asked it; the same one where it has no wording."""
        if self.wording is None:
            return self
        fields = {"{question}": self.prompt, "{options}": "\n".join(self.lettered_options)}
        text = re.sub(r"\{(question|options)\}", lambda match: fields[match[0]], self.wording.text(model_type))
        return replace(self, turns=(*self.turns[:-1], Turn(text.strip(), self.answers)), wording=None)

    @property
    def lettered_options(self) -> list[str]:
        """The options, each behind its letter."""
        return [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(self.options)]

    @property
    def prompt(self) -> str:
        """The last turn's prompt: the question that an evaluation asks."""
        return self.turns[-1].prompt

    @property
    def answers(self) -> tuple[str, ...]:
        """The last turn's answers."""
        return self.turns[-1].answers

    def with_system_in_prompt(self) -> Sample:
        """The same sample with the system text before its first prompt, and an empty line between them."""
        if not self.system:
            return self
        first = Turn(f"{self.system}\n\n{self.turns[0].prompt}", self.turns[0].answers)
        return replace(self, turns=(first, *self.turns[1:]), system="")

    def load_images(self, *, alpha: bool = False) -> list[Image.Image]:
        """Open the images as RGB, turned upright as their EXIF data says; transparent ones are laid on white.

        With `alpha` transparent images stay RGBA. **Raises** `SparsightError` if one is damaged.
        """
        return [self._load(image, alpha) for image in self.images]

    def _load(self, image: Any, alpha: bool) -> Image.Image:
        try:
            if isinstance(image, Image.Image):
                return upright(image, alpha=alpha)
            if not isinstance(image, Path | bytes):
                image = image.read_bytes()
            with opened(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
                return upright(picture, alpha=alpha)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = image if isinstance(image, Path) else "an image in memory"
            raise SparsightError(f"sample {quote(self.id)}: cannot decode {name}: {first_line(error)}") from error
