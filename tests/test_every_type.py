"""A tiny model of every type that transformers maps from images and text to text, through every step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import every_type

import tiny

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MOST_USED = (
    "gemma3", "gemma4", "internvl", "idefics3", "llama4", "llava", "llava_onevision", "mistral3", "mllama", "qwen2_5_vl",
    "qwen3_5_moe", "qwen3_vl",
)  # fmt: skip
STOPS = {  # the step that a type does not get through, and what is said there
    "chameleon": ("restore", "changes its logits behind the output head"),
    "diffusion_gemma": ("restore", "training needs labels, and batch 0 has none"),
    "evolla": ("reload", "Unrecognized configuration class"),  # by transformers' own classes
    "pi0": ("restore", "training needs labels, and batch 0 has none"),
    "shieldgemma2": ("save", "weights missing from the files"),  # transformers renames them when it saves
}


def check(kind, tmp_path):
    row = every_type.walk_through(kind, tmp_path / "model")
    if kind not in STOPS:
        assert row.failed is None
        assert tuple(row.done) == every_type.STEPS
        return
    step, says = STOPS[kind]
    assert row.failed is not None
    assert row.failed[0] == step
    assert step == "reload" or row.failed[1].startswith("SparsightError: ")  # stock transformers loads
    assert says in row.failed[1]


@pytest.mark.parametrize("kind", MOST_USED)
def test_the_most_used_types(kind, tmp_path):
    check(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in tiny.TYPES if kind not in (*MOST_USED, *tiny.RESIST)])
def test_every_other_type(kind, tmp_path):
    check(kind, tmp_path)


def test_the_page_has_a_row_for_every_type():
    rows = {cells[1].strip(): cells for line in PAGE.read_text().splitlines() if (cells := line.split("|"))[1:2]}
    assert {*tiny.TYPES} <= {*rows}
    whole = [kind for kind in tiny.TYPES if all(rows[kind][i].strip() == "yes" for i in range(5, 11))]
    assert {*whole} == {*tiny.TYPES} - {*STOPS} - {*tiny.RESIST}
    assert f"{len(whole)} of {len(tiny.TYPES)} types" in PAGE.read_text()
    assert len(whole) >= 90
    for kind, (_, says) in STOPS.items():
        assert re.sub(r"\W", "", says) in re.sub(r"\W", "", rows[kind][11])
