"""One example: images, and questions with their answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from sparsight.errors import SparsightError

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
class Sample:
    """Images with one or more turns about them.

    The images stand before the first prompt, unless prompts hold `<image>` placeholders, one per image and in the
    order of `images`, which say where each belongs. `kind` groups samples in an evaluation ("caption", "vqa", ...).
    """

    id: str
    images: tuple[Path | Image.Image, ...]
    turns: tuple[Turn, ...]
    kind: str = ""

    @property
    def prompt(self) -> str:
        """The last turn's prompt: the question that an evaluation asks."""
        return self.turns[-1].prompt

    @property
    def answers(self) -> tuple[str, ...]:
        """The last turn's answers."""
        return self.turns[-1].answers

    def load_images(self) -> list[Image.Image]:
        """Open the images as RGB, turned upright as their EXIF data says; **raises** `SparsightError` if one is damaged."""
        return [self._load(image) for image in self.images]

    def _load(self, image: Path | Image.Image) -> Image.Image:
        try:
            if isinstance(image, Image.Image):
                return upright(image)
            with Image.open(image) as opened:
                return upright(opened)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = image if isinstance(image, Path) else "an image in memory"
            raise SparsightError(f"sample {self.id!r}: cannot decode {name}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Decode an image as RGB, turned as its EXIF data says."""
    return ImageOps.exif_transpose(image).convert("RGB")
