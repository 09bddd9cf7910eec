"""Digit scenes: deterministic, unseen digits in test scenes, one correct answer to every question."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from PIL import Image

from sparsight import SparsightError
from sparsight.demo import scenes as demo
from sparsight.demo.scenes import KINDS, PLACES, Digit, Question, Scene, scene_folder, scenes, write

ROW = {place: i // 2 for i, place in enumerate(PLACES)}
COLUMN = {place: i % 2 for i, place in enumerate(PLACES)}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(question: Question, digits: tuple[Digit, ...]) -> set[str]:
    """Every answer the words of a prompt allow, read from the prompt alone."""
    words = question.prompt.rstrip("?").replace(",", "").split()
    colored = [d for d in digits if d.color in words]
    match words:
        case ["how", "many", "digits", *_]:
            return {str(len(digits))}
        case ["how", "many", color, "digits", *_]:
            return {str(sum(d.color == color for d in digits))}
        case ["what", "color", "is", "the", value]:
            return {d.color for d in digits if str(d.value) == value}
        case ["where", "is", "the", value]:
            return {d.place for d in digits if str(d.value) == value}
        case ["which", "digit", "is", "at", "the", vertical, horizontal]:
            return {str(d.value) for d in digits if d.place == f"{vertical} {horizontal}"}
        case ["is", "there", "a", color, value]:
            return {"yes" if any(d.color == color and str(d.value) == value for d in digits) else "no"}
        case ["which", "is", "larger", *_]:
            assert len(colored) == 2
            best = max(d.value for d in colored)
            return {d.color for d in colored if d.value == best}
        case ["which", "digit", "is", color] if color in demo.NAMES:
            return {str(d.value) for d in colored}
        case ["which", "digit", "is", *relation, "the", _, "digit"]:
            return {str(d.value) for known in colored for d in digits if stands(d, " ".join(relation), known)}
    raise AssertionError(f"a prompt of no known form: {question.prompt}")


def stands(one: Digit, relation: str, other: Digit) -> bool:
    """Whether one digit is left of, right of, above or below its neighbour."""
    down, right = ROW[one.place] - ROW[other.place], COLUMN[one.place] - COLUMN[other.place]
    return {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[relation] == (down, right)


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return scenes("test", 400, seed=3)


def test_same_split_seed_and_n_give_the_same_bytes(tmp_path: Path) -> None:
    first = files(write(tmp_path / "a", "train", 12, seed=5))
    assert first == files(write(tmp_path / "b", "train", 12, seed=5))
    assert first != files(write(tmp_path / "c", "train", 12, seed=6))
    assert len(first) == 13


def test_no_scan_is_drawn_in_both_splits() -> None:
    (train, _), (test, values) = demo.scans("train"), demo.scans("test")
    assert len(test) == demo.HELD_OUT == len(values)
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}
    assert set(values.tolist()) == set(range(10))


def test_questions_have_one_correct_answer_and_it_is_given(drawn: list[Scene]) -> None:
    for scene in drawn:
        for question in scene.questions:
            assert answers(question, scene.digits) == {question.answer}, (question, scene.digits)


def test_captions_name_every_digit_in_reading_order(drawn: list[Scene]) -> None:
    for scene in drawn:
        said = [part.split() for part in scene.caption.split(" and ")]
        assert [(int(w[2]), w[1], f"{w[5]} {w[6]}") for w in said] == [(d.value, d.color, d.place) for d in scene.digits]
        assert [d.cell for d in scene.digits] == sorted(d.cell for d in scene.digits)


def test_questions_cannot_be_answered_blind(drawn: list[Scene]) -> None:
    """No fixed answer to a kind of question is right more than six times in ten."""
    replies: dict[str, Counter[str]] = {}
    for question in (q for scene in drawn for q in scene.questions):
        replies.setdefault(question.kind, Counter())[question.answer] += 1
    assert set(replies) == set(KINDS)
    for kind, counts in replies.items():
        assert max(counts.values()) / sum(counts.values()) < 0.6, kind


def test_a_digit_is_painted_where_the_scene_says(drawn: list[Scene]) -> None:
    for scene in drawn[:50]:
        pixels = np.asarray(scene.image, dtype=float)
        for cell in range(4):
            row, column = divmod(cell, 2)
            part = pixels[row * 24 : row * 24 + 24, column * 24 : column * 24 + 24].reshape(-1, 3)
            bright = part[np.argsort(part.max(1))[-12:]]
            found = [d for d in scene.digits if d.cell == cell]
            assert (np.median(bright.max(1)) > 110) == bool(found)
            if found:
                hue = bright.mean(0) / bright.mean(0).max()
                distance = {name: np.abs(hue - np.array(rgb) / max(rgb)).sum() for name, rgb in demo.COLORS.items()}
                assert min(distance, key=distance.__getitem__) == found[0].color


def test_only_training_scenes_are_augmented() -> None:
    plain = scenes("train", 5, seed=1, augment=False)
    varied = scenes("train", 5, seed=1)
    assert [np.asarray(s.image).tobytes() for s in plain] != [np.asarray(s.image).tobytes() for s in varied]
    assert scenes("test", 5, 1)[0].image.tobytes() == scenes("test", 5, 1, augment=False)[0].image.tobytes()


def test_written_folder_has_balanced_kinds_and_readable_images(tmp_path: Path) -> None:
    folder = write(tmp_path / "scenes", "test", 120, seed=0, questions_per_scene=2)
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    counts = Counter(record["kind"] for record in records)
    assert counts.pop("caption") == 120
    assert sum(counts.values()) == 240
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 6
    for record in records:
        assert set(record) == {"image", "prompt", "answer", "kind"}
        with Image.open(folder / record["image"]) as image:
            assert (image.size, image.mode) == ((48, 48), "RGB")


def test_captions_can_be_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, "test", 6, seed=0, questions_per_scene=1, captions=False)
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert all(record["kind"] in KINDS for record in records)


def test_a_set_is_kept_in_the_cache_and_where_that_cannot_be_it_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scene_folder("test").parent == tmp_path / "sparsight"
    assert scene_folder("test").stat() == scene_folder("test").stat()
    (tmp_path / "full").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    with pytest.raises(SparsightError, match=r"demo:test: cannot be written to .*; name another cache with XDG_CACHE_HOME"):
        scene_folder("test")
