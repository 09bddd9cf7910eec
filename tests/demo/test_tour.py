"""The demo, whole: what it prints, what it writes, and that its page needs nothing but itself."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest

from sparsight import SparsightError, api
from sparsight.cli.demo import demo_tables
from sparsight.demo.tour import Effort, tour

QUICK = Effort(train=48, test=8, steps=3)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return tour(out, effort=QUICK), out


def test_what_it_writes(quick):
    facts, out = quick
    assert {p.name for p in out.iterdir()} >= {"data", "pruned", "lora", "sparselora", "report.html"}
    for name in ("dense", "pruned", "lora", "sparselora"):
        rows = [json.loads(line) for line in (out / f"predictions-{name}.jsonl").read_text().splitlines()]
        assert len(rows) == facts["runs"][name]["questions"]["n"] + facts["runs"][name]["captions"]["n"] == 24


def test_sparsity_is_kept_by_one_and_lost_by_the_other(quick):
    facts, out = quick
    runs = facts["runs"]
    assert runs["dense"]["sparsity"] == {"vision": 0.0, "language": 0.0}
    assert runs["pruned"]["sparsity"] == runs["sparselora"]["sparsity"] == {"vision": 0.5, "language": 0.5}
    assert max(runs["lora"]["sparsity"].values()) < 0.2  # not every layer has a gradient in three steps
    assert all(layer["sparselora"] == layer["pruned"] == 0.5 for layer in facts["layers"])
    assert facts["verify"]["differences"] == {}
    assert api.verify(out / "sparselora", against=out / "pruned")["sparsity"] == 0.5
    assert runs["pruned"]["packed_bytes"] < 0.75 * runs["pruned"]["bytes"]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href", "srcset")]


def test_the_page_is_self_contained(quick):
    facts, out = quick
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)", text)
    assert page.tags.count("svg") == page.tags.count("figure") == 10
    assert page.tags.count("img") == 12
    for kind in ("caption", "count", "color"):
        assert f'<small class="soft">{kind}</small>' in text
    for run in facts["runs"].values():
        assert run["label"] in text
    assert "Half the weights of 70 layers gone at 2:4" in text
    assert "Recounted from the saved files" in text
    assert text.count('class="lost"') == 2  # plain LoRA's zeros, vision and language
    assert f"sparsight demo {out} --seed 0" in text


def test_reports_of_the_folders_afterwards(quick, tmp_path):
    _, out = quick
    page = api.report([out / "dense", out / "pruned", out / "sparselora"], out=tmp_path / "report.html")
    assert "against dense" in page.read_text()


def test_the_table_on_the_terminal(quick):
    from rich.console import Console

    facts, out = quick
    console = Console(record=True, width=160, file=io.StringIO())
    for part in demo_tables(facts):
        console.print(part)
    text = console.export_text()
    assert "SparseLoRA, merged" in text
    assert "the same weights; in bfloat16" in text
    assert "tokens per second dense" in text
    assert str(out / "report.html") in text.replace("\n", "")


def test_an_earlier_demo_is_replaced_and_nothing_else(quick, tmp_path):
    _, out = quick
    with pytest.raises(SparsightError, match="not empty"):
        tour(out, effort=QUICK)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SparsightError, match="not the folder of an earlier demo"):
        tour(tmp_path, effort=QUICK, overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()


@pytest.mark.slow
def test_the_claim_of_the_demo(tmp_path):
    """At 2:4: at least 80 % of the caption points that pruning cost come back, questions no worse, every zero kept."""
    facts = tour(tmp_path / "out")
    dense, pruned, restored = (facts["runs"][name] for name in ("dense", "pruned", "sparselora"))
    lost = dense["captions"]["value"] - pruned["captions"]["value"]
    assert lost > 0
    assert restored["captions"]["value"] - pruned["captions"]["value"] >= 0.8 * lost
    assert restored["questions"]["value"] >= pruned["questions"]["value"]
    assert all(layer["sparselora"] == 0.5 for layer in facts["layers"])
    assert max(facts["runs"]["lora"]["sparsity"].values()) < 0.01
