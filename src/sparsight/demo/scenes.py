"""Digit scenes: small pictures of real handwritten digits, with captions and questions that cannot be answered blind.

A scene is 48 x 48 pixels: one to four digits (the 8 x 8 scans of scikit-learn's `load_digits`) in six colours, each
somewhere in its cell of a 2 x 2 grid, on a noisy ground. The scans are divided once, by index: 400 of them appear in
test scenes only, so a model with good scores on test scenes reads digits that were not in its training data.

Every question has one correct answer by construction, and captions have one form (reading order), so that exact match
is a fair score for both. Everything is drawn from an explicit generator: same split, seed and n, same bytes.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from sparsight.checks import need_packages
from sparsight.errors import SparsightError

Split = Literal["train", "test"]
T = TypeVar("T")

SIZE, CELL = 48, 24
PLACES = ("top left", "top right", "bottom left", "bottom right")  # cell i is at row i // 2, column i % 2
COLORS = {
    "red": (235, 60, 50),
    "green": (60, 200, 75),
    "blue": (75, 115, 255),
    "yellow": (245, 220, 60),
    "purple": (190, 75, 225),
    "white": (245, 245, 245),
}
NAMES = tuple(COLORS)
BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
CAPTION_PROMPT = "describe the image."
HELD_OUT = 400
SETS: dict[str, tuple[Split, int, int]] = {"train": ("train", 2400, 1), "test": ("test", 200, 2)}  # scenes, questions each


class Digit(NamedTuple):
    """One digit of a scene: its value 0-9, its colour's name, its cell in reading order."""

    value: int
    color: str
    cell: int

    @property
    def place(self) -> str:
        """The cell in words."""
        return PLACES[self.cell]


class Question(NamedTuple):
    """A prompt about one scene and its only correct answer."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """One picture, what is in it (in reading order), its caption, and one question of each kind it allows."""

    image: Image.Image
    digits: tuple[Digit, ...]
    caption: str
    questions: tuple[Question, ...]


class Drawing(NamedTuple):
    """Scenes as arrays, for training loops: an empty cell has value and colour -1."""

    pixels: np.ndarray  # (n, 48, 48, 3) uint8
    values: np.ndarray  # (n, 4)
    colors: np.ndarray  # (n, 4) index into NAMES

    def digits(self, i: int) -> tuple[Digit, ...]:
        """Return the digits of scene i in reading order."""
        cells = zip(self.values[i].tolist(), self.colors[i].tolist(), strict=True)
        return tuple(Digit(value, NAMES[color], cell) for cell, (value, color) in enumerate(cells) if value >= 0)


@cache
def scans(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return ink in [0, 1] (n, 8, 8) and values (n,) of the scans of a split.

    **Raises** `SparsightError` without scikit-learn.
    """
    need_packages("the digit scenes", "demo", sklearn="scikit-learn")
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    part = {"train": order[HELD_OUT:], "test": order[:HELD_OUT]}[split]
    return (data.images[part] / 16).astype(np.float32), data.target[part].astype(np.int64)


def glyphs(ink: np.ndarray, rng: np.random.Generator, augment: bool) -> np.ndarray:
    """Draw scans (n, 8, 8) into cells (n, 24, 24): 17 to 20 pixels high, off the centre by up to 2 pixels.

    With `augment` each is also turned, sheared, stretched and made thinner or bolder. Bilinear, for all at once.
    """
    n = len(ink)
    angle, shear, stretch = rng.uniform(-1, 1, (3, n)) * [[0.22], [0.15], [0.12]] if augment else np.zeros((3, n))
    size = rng.uniform(15.5, 21, n) if augment else rng.uniform(17, 20, n)
    shift = rng.uniform(-1, 1, (2, n)) * (2.8 if augment else 2.0)
    cos, sin = np.cos(angle), np.sin(angle)
    inverse = np.stack([np.stack([cos, sin + shear], -1), np.stack([-sin, cos], -1)], 1)  # (n, 2, 2)
    inverse *= (8 / size * np.stack([1 + stretch, 1 - stretch])).T[:, :, None]
    offset = np.arange(CELL) + 0.5 - CELL / 2
    y, x = offset[None] - shift[0][:, None], offset[None] - shift[1][:, None]
    v = inverse[:, 0, 0, None, None] * y[:, :, None] + inverse[:, 0, 1, None, None] * x[:, None, :] + 4.5
    u = inverse[:, 1, 0, None, None] * y[:, :, None] + inverse[:, 1, 1, None, None] * x[:, None, :] + 4.5
    v, u = np.clip(v, 0, 8.999), np.clip(u, 0, 8.999)  # in the scan padded by one pixel of nothing
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    row, column = v.astype(np.int64), u.astype(np.int64)
    v, u, i = v - row, u - column, np.arange(n)[:, None, None]
    upper = padded[i, row, column] * (1 - u) + padded[i, row, column + 1] * u
    lower = padded[i, row + 1, column] * (1 - u) + padded[i, row + 1, column + 1] * u
    drawn = upper * (1 - v) + lower * v
    return drawn ** rng.uniform(0.7, 1.4, (n, 1, 1)) if augment else drawn


def draw(split: Split, n: int, rng: np.random.Generator, augment: bool, crowd: bool = False) -> Drawing:
    """Draw n scenes of one to four digits as arrays; `crowd` fills three or four of the cells."""
    ink, targets = scans(split)
    count = rng.integers(3, 5, n) if crowd else rng.integers(1, 5, n)
    filled = rng.permuted(np.arange(4) < count[:, None], axis=1)
    which, colors = rng.integers(0, len(ink), (n, 4)), rng.integers(0, len(NAMES), (n, 4))
    cells = np.zeros((n, 4, CELL, CELL, 1))
    cells[filled] = glyphs(ink[which[filled]], rng, augment)[..., None]
    paint = np.array(list(COLORS.values()))[colors] * rng.uniform(0.85, 1.05, (n, 4, 1))
    ground = rng.uniform(15, 70, (n, 1, 1, 1)) + rng.normal(0, 10, (n, SIZE, SIZE, 3))
    alpha = cells.reshape(n, 2, 2, CELL, CELL, 1).swapaxes(2, 3).reshape(n, SIZE, SIZE, 1)
    paint = paint.reshape(n, 2, 1, 2, 1, 3).repeat(CELL, 2).repeat(CELL, 4).reshape(n, SIZE, SIZE, 3)
    pixels = np.clip(ground * (1 - alpha) + paint * alpha, 0, 255).astype(np.uint8)
    return Drawing(pixels, np.where(filled, targets[which], -1), np.where(filled, colors, -1))


def caption(digits: tuple[Digit, ...]) -> str:
    """Describe the digits and their places, in reading order."""
    return " and ".join(f"a {d.color} {d.value} at the {d.place}" for d in digits)


def _alone(digits: tuple[Digit, ...], field: Literal["value", "color"]) -> list[Digit]:
    """Return the digits whose value (or colour) no other digit has."""
    counts = Counter(getattr(d, field) for d in digits)
    return [d for d in digits if counts[getattr(d, field)] == 1]


def _count(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return "how many digits are there?", str(len(digits))
    color = _pick(digits, rng).color if rng.random() < 0.75 else NAMES[rng.integers(len(NAMES))]
    return f"how many {color} digits are there?", str(sum(d.color == color for d in digits))


def _color(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    if not (alone := _alone(digits, "value")):
        return None
    digit = _pick(alone, rng)
    return f"what color is the {digit.value}?", digit.color


def _digit(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    if not (alone := _alone(digits, "color")):
        return None
    digit = _pick(alone, rng)
    return f"which digit is {digit.color}?", str(digit.value)


def _place(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str]:
    digit = _pick(digits, rng)
    return f"which digit is at the {digit.place}?", str(digit.value)


def _where(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    if not (alone := _alone(digits, "value")):
        return None
    digit = _pick(alone, rng)
    return f"where is the {digit.value}?", digit.place


def _beside(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    cells = {divmod(d.cell, 2): d for d in digits}
    options = []
    for digit in _alone(digits, "color"):
        row, column = divmod(digit.cell, 2)
        for word, (down, right) in BESIDE.items():
            if other := cells.get((row + down, column + right)):
                options.append((f"which digit is {word} the {digit.color} digit?", str(other.value)))
    return _pick(options, rng) if options else None


def _compare(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str] | None:
    alone = _alone(digits, "color")
    pairs = [(a, b) for a in alone for b in alone if a.value != b.value]
    if not pairs:
        return None
    a, b = _pick(pairs, rng)
    return f"which is larger, the {a.color} digit or the {b.color} digit?", max(a, b).color


def _exists(digits: tuple[Digit, ...], rng: np.random.Generator) -> tuple[str, str]:
    """Ask with yes and no equally often; a no shares its digit or its colour with a digit of the scene."""
    digit = _pick(digits, rng)
    value, color = digit.value, digit.color
    if rng.random() < 0.5:
        present = {(d.value, d.color) for d in digits}
        same_value = [(value, other) for other in NAMES if (value, other) not in present]
        same_color = [(other, color) for other in range(10) if (other, color) not in present]
        value, color = _pick(same_value if rng.random() < 0.5 else same_color, rng)
        return f"is there a {color} {value}?", "no"
    return f"is there a {color} {value}?", "yes"


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


KINDS: dict[str, Callable[[tuple[Digit, ...], np.random.Generator], tuple[str, str] | None]] = {
    "count": _count,
    "color": _color,
    "digit": _digit,
    "place": _place,
    "where": _where,
    "beside": _beside,
    "compare": _compare,
    "exists": _exists,
}


def ask(digits: tuple[Digit, ...], kind: str, rng: np.random.Generator) -> Question | None:
    """Return a question of one kind, or None where the scene allows none with one correct answer."""
    pair = KINDS[kind](digits, rng)
    return Question(kind, *pair) if pair else None


def scenes(split: Split, n: int, seed: int, augment: bool | None = None) -> list[Scene]:
    """Draw n scenes; digits are varied (`augment`) in training scenes, not in test scenes."""
    rng = np.random.default_rng([("train", "test").index(split), seed])
    drawing = draw(split, n, rng, augment=split == "train" if augment is None else augment)
    result = []
    for i, pixels in enumerate(drawing.pixels):
        digits = drawing.digits(i)
        answerable = (ask(digits, kind, rng) for kind in KINDS)
        questions = tuple(question for question in answerable if question)
        result.append(Scene(Image.fromarray(pixels), digits, caption(digits), questions))
    return result


def select(scene: Scene, k: int, counts: Counter[str]) -> list[Question]:
    """Select up to k of a scene's questions, of the kinds with the lowest `counts`; adds to `counts` in place."""
    questions = sorted(scene.questions, key=lambda question: counts[question.kind])[:k]
    counts.update(question.kind for question in questions)
    return questions


def write(folder: Path, split: Split, n: int, seed: int, questions_per_scene: int = 2, captions: bool = True) -> Path:
    """Write n scenes as PNG files and `metadata.jsonl` (image, prompt, answer, kind), with balanced kinds."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for i, scene in enumerate(scenes(split, n, seed)):
            name = f"images/{i:05d}.png"
            scene.image.save(folder / name)
            questions = select(scene, questions_per_scene, counts)
            if captions:
                questions.append(Question("caption", CAPTION_PROMPT, scene.caption))
            for kind, prompt, answer in questions:
                record = {"image": name, "prompt": prompt, "answer": answer, "kind": kind}
                lines.write(json.dumps(record) + "\n")
    return folder


def scene_folder(name: str) -> Path:
    """Return the folder of a set of `SETS`, written at first use into the user's cache; always the same bytes.

    **Raises** `SparsightError` without scikit-learn, and if the cache cannot be written to.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsight"
    split, count, questions = SETS[name]
    target = cache / f"scenes-{name}-{count}-{questions}"
    if target.is_dir():
        return target
    need_packages(f"demo:{name}", "demo", sklearn="scikit-learn")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as beside:
            folder = write(Path(beside) / name, split, count, seed=0, questions_per_scene=questions)
            folder.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process was first
            raise SparsightError(
                f"demo:{name}: cannot be written to {cache} ({error.strerror}); name another cache with XDG_CACHE_HOME"
            ) from error
    return target
