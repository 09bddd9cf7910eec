"""In which order samples are trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


class Shuffled(Sequence):
    """The training samples in order: `length` of them, in passes over all, each pass in a random order of its own.

    A step is never cut short by the end of a pass, so it is the same on one process and on several. Its `step` samples
    stand by length, the longest first, where they are divided into batches: then there is little padding, and a lack of
    memory shows at once. The step is the same, whatever the order in it.
    """

    def __init__(self, numbered: Sequence[tuple[int, Any]], length: int, seed: int, step: int = 1) -> None:
        self.numbered, self.length, self.seed, self.step = numbered, length, seed, step
        self._pass = -1
        self._order: list[int] = []
        self._first = -1  # of the step that is in order
        self._places: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.length:
            raise IndexError(place)
        first = place - place % self.step
        if first != self._first:
            drawn = [self._drawn(each) for each in range(first, min(first + self.step, self.length))]
            self._places = sorted(drawn, key=lambda i: _size(self.numbered[i][1]), reverse=True) if self.step > 1 else drawn
            self._first = first
        return self.numbered[self._places[place - first]]

    def _drawn(self, place: int) -> int:
        turn, i = divmod(place, len(self.numbered))
        if turn != self._pass:
            order = list(range(len(self.numbered)))
            random.Random(f"{self.seed} {turn}").shuffle(order)
            self._pass, self._order = turn, order
        return self._order[i]


def _size(sample: Any) -> tuple[int, int]:
    """By what samples are of like length: images, which have the most tokens, then characters."""
    return len(sample.images), len(sample.system) + sum(len(turn.prompt) + len(turn.answer) for turn in sample.turns)
