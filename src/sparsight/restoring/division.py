"""Divide samples into those to train on and those held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sparsight.data import Samples
from sparsight.data.images import image_hashes
from sparsight.data.own_batches import OwnBatches
from sparsight.errors import SparsightError
from sparsight.restoring.trainer import step_size
from sparsight.specs import RestoreSpec


def divide_samples(spec: RestoreSpec, samples: Sequence[Any], other: Sequence[Any] | None) -> tuple[Any, list[Any]]:
    """The samples to train on, no more than the steps can use, and those held out.

    A number of held-out samples is drawn with the seed. Samples that share an image stay on one side: where the draw parts
    some, whole groups are drawn in its place, as many as fit into the number, and at least one.

    **Raises** `SparsightError` for a number of held-out samples that leaves none to train on.
    """
    learned, held = list(samples), list(other or ())
    if (count := held_out_count(spec.held_out)) is not None:
        if not 0 < count < len(learned):
            raise SparsightError(
                f"`held_out`: {count} of {len(learned)} samples; give at least 1, and leave some to learn from"
            )
        apart = _draw(_groups(samples), count, len(learned), spec.seed)
        held = [sample for i, sample in enumerate(learned) if i in apart]
        learned = [sample for i, sample in enumerate(learned) if i not in apart]
        if not learned:
            raise SparsightError(
                "`held_out`: all samples share their images, so none is left to learn from; give other data"
            )
    needed = None if spec.steps is None else spec.steps * step_size(spec)
    if needed is not None and needed < len(learned):
        places = sorted(random.Random(spec.seed).sample(range(len(learned)), needed))
        learned = [learned[i] for i in places]
    return OwnBatches(learned) if isinstance(samples, OwnBatches) else learned, held


def held_out_count(held_out: Any) -> int | None:
    """The number of held-out samples, from an int or its digits; None for other data."""
    if isinstance(held_out, int):
        return held_out
    return int(held_out) if isinstance(held_out, str) and held_out.lstrip("-").isdigit() else None


def _groups(samples: Sequence[Any]) -> list[int]:
    """A group for each sample: samples that share an image, if only through others, are in one."""
    if isinstance(samples, OwnBatches):
        return list(range(len(samples)))
    hashes = samples.hashes if isinstance(samples, Samples) else ()
    hashes = hashes or tuple(image_hashes(sample) for sample in samples)
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, images in enumerate(hashes):
        for image in images:
            parent[root(i)] = root(first.setdefault(image, i))
    return [root(i) for i in range(len(hashes))]


def _draw(groups: Sequence[int], count: int, total: int, seed: int) -> set[int]:
    """The places of held-out samples: `count` of them at random, or whole groups where that would part one."""
    drawn = set(random.Random(seed).sample(range(total), count))
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if all(len(drawn.intersection(same)) in (0, len(same)) for same in members.values()):
        return drawn
    order = list(members.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for same in order:
        if len(chosen) + len(same) <= count:
            chosen.update(same)
    return chosen or set(sorted(order, key=len)[0])
