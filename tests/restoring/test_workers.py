"""Workers beside the training, and samples that are checked when they are used."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from sparsight import SparsightError, api
from sparsight.data import Encoder, encoding, images, read
from sparsight.errors import Notice
from sparsight.model.load import load
from sparsight.restoring import student
from sparsight.restoring.collate import Collator


@pytest.fixture
def sparse(zoo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    api.prune(zoo_folder("llava"), "sparse", method="magnitude")
    return "sparse"


def restored(sparse, out, data, **how):
    settings = {"steps": 3, "batch_size": 2, "overwrite": True, **how}
    return api.restore(sparse, out, data=data, **settings).metrics["restore"]


@pytest.mark.parametrize("mode", ["shared", "cached"])
def test_the_number_of_workers_changes_no_bit(mode, sparse, scenes, tmp_path):
    before = dict(os.environ)
    written = []
    for workers in (0, 1, 2):
        metrics = restored(sparse, f"out{workers}", scenes, workers=workers, held_out=2, teacher_mode=mode, samples=8)
        written.append((tmp_path / f"out{workers}" / "model.safetensors").read_bytes())
        assert [row["loss"] for row in metrics["curve"]]
    assert written[0] == written[1] == written[2]
    assert dict(os.environ) == before


def test_workers_by_option(run, sparse, scenes):
    words = ("restore", sparse, "out", "--data", scenes, "--steps", 1, "--batch-size", 2, "--samples", 4)
    code, _, err = run(*words, "--workers", 2)
    assert (code, "forked" in err) == (0, False), err
    code, _, err = run("restore", sparse, "another", *words[3:], "--workers", -1)
    assert (code, err) == (2, "sparsight: --workers: -1 is not a whole number of at least 0\n")


def test_workers_get_no_model(zoo_folder, scenes):
    model, processor = load(zoo_folder("llava"))
    collator = Collator(Encoder(processor, model))
    assert len(pickle.dumps(collator)) < 1.1 * len(pickle.dumps(processor)) + 10**5
    again = pickle.loads(pickle.dumps(collator))
    numbered = list(enumerate(read(scenes, limit=2)))
    for key, tensor in collator(numbered).items():
        assert key == "skipped" or bool((tensor == again(numbered)[key]).all())


def part(kind, content):
    """A part of a PNG file, with its right checksum."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def data(folder, n, broken=()):
    """Questions about pictures of noise; the files of `broken` are whole, and hold no pixels that can be unpacked."""
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(n):
        path = folder / "data" / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:33] + part(b"IDAT", b"no pixels") + part(b"IEND", b""))
        lines.append({"id": str(i), "image": path.name, "prompt": "what is it?", "answer": "noise"})
    (folder / "data" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data"


@pytest.fixture
def few_first(monkeypatch):
    """Let four pictures and four samples be checked at once."""
    monkeypatch.setattr(images, "WHOLE", 7000)  # bytes; a picture has 1,800
    monkeypatch.setattr(student, "FIRST", 4)


def test_reading_says_what_it_has_not_decoded(few_first, tmp_path):
    whole = read(data(tmp_path, 4))
    assert (whole.late, whole.facts) == (0, {})
    other = tmp_path / "more"
    other.mkdir()
    with pytest.warns(
        Notice, match=r"3 pictures are not decoded yet, only looked at; a broken one is named when it is used"
    ):
        samples = read(data(other, 7, broken=[5]))
    assert samples.facts == {"pictures_not_decoded": 3}
    assert len(samples) == 7
    with pytest.raises(SparsightError, match="sample '5': cannot decode"):
        samples[5].load_images()


def test_a_picture_without_an_end_is_decoded_at_once(few_first, tmp_path):
    folder = data(tmp_path, 7)
    path = folder / "6.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SparsightError, match=r"metadata.jsonl:7: image '6.png' cannot be read"):
        read(folder)
    path.write_bytes(b"\xff\xd8 no picture \xff\xd9")
    with pytest.raises(SparsightError, match=r"metadata.jsonl:7: image '6.png' cannot be read: not an image"):
        read(folder)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["shared", "cached"])
def test_a_broken_sample_is_left_out_when_its_turn_comes(workers, mode, few_first, sparse, tmp_path):
    folder = data(tmp_path, 8, broken=[5])
    how = {"batch_size": 4, "steps": 4, "workers": workers, "teacher_mode": mode}
    with pytest.warns(Notice) as seen:
        metrics = restored(sparse, "out", folder, skip_bad=True, **how)
    assert metrics["skipped_samples"] == 1
    assert metrics["data"]["pictures_not_decoded"] == 4
    lines = " ".join(str(each.message) for each in seen)
    assert "4 of 8 samples are not tried yet; one that cannot be used is named when its turn comes, or left out" in lines
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        with pytest.raises(SparsightError, match=r"sample '5': cannot decode .*5\.png") as error:
            restored(sparse, "other", folder, **how)
        assert "\n" not in str(error.value)


def test_the_same_weights_with_a_broken_sample(few_first, sparse, tmp_path):
    folder = data(tmp_path, 8, broken=[5])
    written = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        for workers in (0, 1, 2):
            restored(sparse, f"out{workers}", folder, skip_bad=True, batch_size=4, steps=4, workers=workers)
            written.append((tmp_path / f"out{workers}" / "model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_broken_samples_alone_ends_nothing(workers, few_first, sparse, tmp_path):
    folder = data(tmp_path, 8, broken=[5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        metrics = restored(sparse, "out", folder, skip_bad=True, batch_size=1, steps=16, workers=workers)
        assert metrics["skipped_samples"] == 1
        with pytest.raises(SparsightError, match=r"sample '5': cannot decode"):
            restored(sparse, "other", folder, batch_size=1, steps=16, workers=workers)


def test_all_samples_are_tried_where_they_are_few(sparse, scenes):
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        restored(sparse, "out", scenes, steps=1)
    assert encoding.CHECKED < encoding.FIRST
