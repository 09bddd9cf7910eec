"""The figures: which runs they take, the numbers in them, and how they are written."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text

from sparsight import SparsightError
from sparsight.report import figures, layers, series
from sparsight.report.album import album, write_figures
from sparsight.report.drawing import svg
from sparsight.report.runs import Run, grouped, read_runs

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs(sweep) -> list[Run]:
    return read_runs([sweep])


@pytest.fixture(scope="module")
def by_hand(hits):
    """Exact match in percent, the mean of questions and captions, over the two seeds."""

    def mean(name: str) -> float:
        right = np.stack([hits(name, seed) for seed in ((0,) if name == "dense" else (0, 1))])
        return 50 * (right[:, :30].mean() + right[:, 30:].mean())

    return mean


def test_bars_of_a_fixed_sum(runs, by_hand):
    sums = series.fixed_sums(grouped(runs))
    assert list(sums) == [1.0]
    (way,) = sums[1.0]
    assert [split for split, _ in way.points] == [(0.3, 0.7), (0.5, 0.5), (0.7, 0.3)]
    (axes,) = figures.fixed_sum_bars(runs).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(
        [by_hand(n) for n in ("0.3-0.7", "0.5-0.5", "0.7-0.3")]
    )
    assert [label.get_text() for label in axes.get_xticklabels()] == ["30:70", "50:50", "70:30"]
    assert axes.get_ylabel() == "exact match, %"


def test_curves_of_one_component(runs, by_hand):
    lines = series.component_curves(grouped(runs))
    assert [line.label for line in lines] == ["vision", "language"]
    (axes,) = figures.component_curves(runs).axes
    drawn = [c.lines[0] for c in axes.containers]
    for line, name in zip(drawn, ("vision", "language"), strict=True):
        assert list(line.get_xdata()) == pytest.approx([0, 30, 60])
        assert list(line.get_ydata()) == pytest.approx([by_hand(n) for n in ("dense", f"{name}-0.3", f"{name}-0.6")])
    assert drawn[0].get_linestyle() != drawn[1].get_linestyle()
    assert drawn[0].get_marker() != drawn[1].get_marker()


def test_bars_by_pattern(runs, by_hand):
    (way,) = series.patterns(grouped(runs))
    assert [pattern for pattern, _ in way.points] == ["row", "4:8", "2:4"]
    (axes,) = figures.pattern_bars(runs).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([by_hand(n) for n in ("0.5-0.5", "4:8", "2:4")])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["unstructured", "4:8", "2:4"]


def test_bars_have_intervals_and_differ_without_colour(runs):
    """Bars of two ways of making beside each other."""
    other = [replace(run, cell={**run.cell, "method": "alps"}) for run in runs if not run.dense]
    (axes,) = figures.fixed_sum_bars([*runs, *other]).axes
    assert len({bar.get_hatch() for bar in axes.patches}) == 2
    whiskers = [collection for collection in axes.collections if len(collection.get_segments())]
    assert len(whiskers) == len(axes.patches) == 6


def test_pairs_before_and_after(runs):
    ((before, after),) = series.pairs(grouped(runs))
    assert (before.label, after.label) == ("0.5-0.5", "restored 0.5-0.5")
    (axes,) = figures.restoration_pairs(runs).axes
    assert axes.get_yticklabels()[0].get_text() == "0.5-0.5"


def test_the_front():
    assert series.front([(3, 9), (1, 5), (2, 4), (2, 7), (4, 9), (1, 5)]) == [1, 3, 0]
    assert series.front([]) == []


def test_score_against_size(runs, by_hand):
    for against, sizes in (("bytes", (8.25, 12.0)), ("parameters", (2.0, 3.0))):
        (axes,) = figures.pareto(runs, against=against).axes
        points = {(round(float(line.get_xdata()[0]), 3), round(float(line.get_ydata()[0]), 3)) for line in axes.lines[1:]}
        assert (sizes[0], round(by_hand("2:4"), 3)) in points
        assert (sizes[1], round(by_hand("dense"), 3)) in points
    with pytest.raises(SparsightError, match="bytes or parameters, not 'time'"):
        figures.pareto(runs, against="time")


def test_maps_of_layers(runs):
    run = next(run for run in runs if run.id == "0.5-0.5-0")
    vision, language = series.layer_maps(run.layers, "error")
    assert vision.kinds == ("attn.qkv", "mlp.fc1")
    assert vision.values == pytest.approx(np.array([[0.0, 0.02, 0.04], [0.01, 0.03, 0.05]]))
    assert language.kinds == ("SelfAttention.q", "CrossAttention.q")
    assert np.isnan(language.values).tolist() == [[False] * 4, [True, True, False, False]]
    figure = layers.layer_heat(run, "error")
    assert figure.axes[-2].images[0].get_array().max() == pytest.approx(11.0)
    with pytest.raises(SparsightError, match="dense: no layer"):
        layers.layer_heat(runs[0])


def test_kinds_of_layers():
    assert series.kind_of("a.layers.3.self_attn.q_proj", "a.layers.3") == "self_attn.q_proj"
    assert series.kind_of("a.block.0.layer.1.DenseReluDense.wi_0", "a.block.0") == "DenseReluDense.wi_0"
    assert series.kind_of("a.layers.0.mlp.experts.gate_up_proj[7]", "a.layers.0") == "mlp.experts.gate_up_proj"
    assert series.kind_of("a.layers.0.mlp.experts.12.w1", "a.layers.0") == "mlp.experts.w1"


def test_loss_curves_average_the_seeds(runs):
    figure = figures.loss_curves(runs)
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([2 / s + 0.5 for s in range(1, 11)])


def test_a_figure_that_the_runs_do_not_make(runs):
    dense = runs[:1]
    for draw, what in (
        (figures.fixed_sum_bars, "the same sum"),
        (figures.component_curves, "one component alone"),
        (figures.pattern_bars, "pattern alone"),
        (figures.restoration_pairs, "restored from it"),
        (figures.pareto, "two runs"),
        (figures.loss_curves, "restored, with its curve"),
        (layers.layer_sparsity, "whose layers are known"),
    ):
        with pytest.raises(SparsightError, match=what):
            draw(dense)
    with pytest.raises(SparsightError, match="VQA accuracy"):
        figures.scores([replace(runs[0], predictions=(), scores=())], "vqa_accuracy")


def test_another_metric(runs, hits):
    (axes,) = figures.pattern_bars(runs, "cider_d").axes
    right = np.stack([hits("2:4", seed) for seed in (0, 1)])
    assert axes.patches[-1].get_height() == pytest.approx(10 * right[:, 30:].mean())
    assert axes.get_ylabel() == "CIDEr-D"


def test_fit_for_one_column_of_paper(runs):
    for plate in album(runs):
        assert plate.figure.get_figwidth() == pytest.approx(3.3)
        plate.figure.canvas.draw()
        texts = [text for text in plate.figure.findobj(Text) if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 7, plate.name


def test_files(runs, tmp_path):
    written = write_figures(runs, tmp_path / "figures")
    names = {path.name for path in written}
    assert {"scores.svg", "fixed-sum.png", "components.svg", "patterns.png", "restoration.svg", "bytes.png"} <= names
    for path in written:
        if path.suffix == ".png":
            assert struct.unpack(">I", path.read_bytes()[16:20])[0] == 660  # 3.3 inches at 200 dpi
        else:
            assert list(ElementTree.parse(path).iter(SVG + "text")), path.name
    assert svg(figures.scores(runs), "x", "y") == svg(figures.scores(runs), "x", "y")  # the same runs, the same bytes


def test_svg_in_a_page(runs):
    text = svg(figures.pattern_bars(runs), "p", 'a "label" & more')
    assert text.startswith('<svg role="img" aria-label="a &quot;label&quot; &amp; more"')
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    assert ids
    assert all(name.startswith("p-") for name in ids)
    assert {*re.findall(r'href="#([^"]*)"', text), *re.findall(r"url\(#([^)]*)\)", text)} <= ids
    assert "unstructured" in text
    assert "<metadata" not in text
