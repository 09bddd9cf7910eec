"""Calibration batches for every family of the zoo."""

from __future__ import annotations

from sparsight.data import Encoder, Sample, Turn, batches

import zoo

QUESTIONS = ("what color is the circle?", "how many?", "is there a star in this picture, yes or no?", "describe")
ANSWERS = ("red", "two small squares and a star", "yes", "no")


def samples(n: int, seed: int = 0) -> list[Sample]:
    """Prompts and answers of different lengths, so that every batch is padded."""
    return [
        Sample(str(i), (image,), (Turn(QUESTIONS[i % 4], (ANSWERS[(i + seed) % 4],)),))
        for i, image in enumerate(zoo.images(n, seed))
    ]


def calibration(model, processor, n: int = 6, size: int = 3):
    return list(batches(samples(n), Encoder(processor, model), size))
