"""Held-out samples: drawn with the seed, and no image of theirs is trained on."""

import json
import random

import pytest

from sparsight.data import Sample, Samples, Turn, read
from sparsight.errors import SparsightError
from sparsight.restoring.division import divide_samples
from sparsight.specs import RestoreSpec

import zoo

IMAGES = zoo.images(12)


def samples(*pictures):
    """A sample for each tuple of pictures, all in memory."""
    return [Sample(str(i), tuple(IMAGES[k] for k in own), (Turn("?!", ("4",)),)) for i, own in enumerate(pictures)]


def divide(made, count, seed=0, **how):
    learned, held = divide_samples(RestoreSpec(held_out=count, seed=seed, **how), made, None)
    seen = {id(image) for sample in learned for image in sample.images}
    assert not any(id(image) in seen for sample in held for image in sample.images)
    return [sample.id for sample in learned], [sample.id for sample in held]


@pytest.mark.parametrize("seed", range(4))
def test_where_no_image_is_shared_the_draw_is_what_it_was(seed):
    made = samples(*((i,) for i in range(11)), (), ())
    learned, held = divide(made, 4, seed)
    drawn = sorted(random.Random(seed).sample(range(13), 4))
    assert held == [str(i) for i in drawn]
    assert len(learned) == 9


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("pictures", "count", "held"),
    [
        ([(i // 3,) for i in range(12)], 6, {6}),
        ([(i // 3,) for i in range(12)], 4, {3}),  # as many as fit
        ([(i // 3,) for i in range(12)], 1, {1, 3}),  # one image at least
        ([(0, 1), (1, 2), (2, 3), (4,), (5,), (6,)], 3, {3}),  # a chain is one group
        ([(0,), (0,), (), (), ()], 2, {2}),
    ],
)
def test_samples_that_share_an_image_stay_together(pictures, count, held, seed):
    learned, apart = divide(samples(*pictures), count, seed)
    assert len(apart) in held
    assert sorted(learned + apart, key=int) == [str(i) for i in range(len(pictures))]
    assert (learned, apart) == divide(samples(*pictures), count, seed)


def test_files_of_the_same_content_are_one_image(tmp_path):
    lines = []
    for i in range(8):
        IMAGES[i // 2].save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": "?!", "answer": "4", "id": str(i)}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    made = read(tmp_path / "data.jsonl")
    for given in (made, list(made), Samples(made.items, "samples in memory", "")):
        for seed in range(4):
            _, held = divide_samples(RestoreSpec(held_out=4, seed=seed), given, None)
            pairs = sorted(int(sample.id) // 2 for sample in held)
            assert pairs == sorted([*set(pairs)] * 2)
            assert len(held) == 4


def test_where_all_share_an_image_nothing_can_be_held_out():
    with pytest.raises(SparsightError, match="`held_out`: all samples share their images, so none is left to learn from"):
        divide(samples((0,), (0,), (0,)), 1)


def test_steps_use_no_held_out_image():
    learned, held = divide(samples(*((i // 2,) for i in range(12))), 4, steps=2, batch_size=3)
    assert (len(learned), len(held)) == (6, 4)
