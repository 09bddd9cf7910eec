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
from sparsight.reporting import layer_figures, run_figures, select
from sparsight.reporting.figures import report_figures, save_figures
from sparsight.reporting.groups import Group, describe, group_runs, series_labels
from sparsight.reporting.runs import ScoredModel, read_runs
from sparsight.reporting.style import svg

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def runs(sweep) -> list[ScoredModel]:
    return read_runs([sweep])


@pytest.fixture(scope="module")
def groups(runs) -> list[Group]:
    return group_runs(runs)


@pytest.fixture(scope="module")
def by_hand(hits):
    """Exact match in percent, the mean of questions and captions, over the two seeds."""

    def mean(name: str) -> float:
        right = np.stack([hits(name, seed) for seed in ((0,) if name == "dense" else (0, 1))])
        return 50 * (right[:, :30].mean() + right[:, 30:].mean())

    return mean


def test_bars_of_a_fixed_sum(groups, by_hand):
    sums = select.fixed_sums(groups)
    assert list(sums) == [1.0]
    (way,) = sums[1.0]
    assert [split for split, _ in way.points] == [(0.3, 0.7), (0.5, 0.5), (0.7, 0.3)]
    (axes,) = run_figures.fixed_sum_bars(groups).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(
        [by_hand(n) for n in ("0.3-0.7", "0.5-0.5", "0.7-0.3")]
    )
    assert [label.get_text() for label in axes.get_xticklabels()] == ["30:70", "50:50", "70:30"]
    assert axes.get_ylabel() == "exact match, %"


def test_curves_of_one_component(groups, by_hand):
    lines = select.single_components(groups)
    assert [line.label for line in lines] == ["vision", "language"]
    (axes,) = run_figures.component_curves(groups).axes
    drawn = [c.lines[0] for c in axes.containers]
    for line, name in zip(drawn, ("vision", "language"), strict=True):
        assert list(line.get_xdata()) == pytest.approx([0, 30, 60])
        assert list(line.get_ydata()) == pytest.approx([by_hand(n) for n in ("dense", f"{name}-0.3", f"{name}-0.6")])
    assert drawn[0].get_linestyle() != drawn[1].get_linestyle()
    assert drawn[0].get_marker() != drawn[1].get_marker()


def test_bars_by_pattern(groups, by_hand):
    (way,) = select.patterns(groups)
    assert [pattern for pattern, _ in way.points] == ["row", "4:8", "2:4"]
    (axes,) = run_figures.pattern_bars(groups).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([by_hand(n) for n in ("0.5-0.5", "4:8", "2:4")])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["unstructured", "4:8", "2:4"]


def test_bars_have_intervals_and_differ_without_colour(runs):
    """Bars of two ways of making beside each other."""
    other = [replace(run, cell={**run.cell, "method": "alps"}) for run in runs if not run.is_dense]
    (axes,) = run_figures.fixed_sum_bars(group_runs([*runs, *other])).axes
    assert len({bar.get_hatch() for bar in axes.patches}) == 2
    whiskers = [collection for collection in axes.collections if len(collection.get_segments())]
    assert len(whiskers) == len(axes.patches) == 6


def test_pairs_before_and_after(groups):
    ((before, after),) = select.restorations(groups)
    assert (before.label, after.label) == ("0.5-0.5", "restored 0.5-0.5")
    (axes,) = run_figures.restoration_pairs(groups).axes
    assert axes.get_yticklabels()[0].get_text() == "0.5-0.5"


def test_the_front():
    assert select.pareto_front([(3, 9), (1, 5), (2, 4), (2, 7), (4, 9), (1, 5)]) == [1, 3, 0]
    assert select.pareto_front([]) == []


def test_score_against_size(groups, by_hand):
    for against, sizes in (("bytes", (8.25, 12.0)), ("parameters", (2.0, 3.0))):
        (axes,) = run_figures.pareto(groups, against=against).axes
        points = {(round(float(line.get_xdata()[0]), 3), round(float(line.get_ydata()[0]), 3)) for line in axes.lines[1:]}
        assert (sizes[0], round(by_hand("2:4"), 3)) in points
        assert (sizes[1], round(by_hand("dense"), 3)) in points
    with pytest.raises(SparsightError, match="bytes or parameters, not 'time'"):
        run_figures.pareto(groups, against="time")


def test_maps_of_layers(runs):
    run = next(run for run in runs if run.label == "0.5-0.5, seed 0")
    vision, language = select.layer_maps(run.layers, "error")
    assert vision.kinds == ("attn.qkv", "mlp.fc1")
    assert vision.values == pytest.approx(np.array([[0.0, 0.02, 0.04], [0.01, 0.03, 0.05]]))
    assert language.kinds == ("SelfAttention.q", "CrossAttention.q")
    assert np.isnan(language.values).tolist() == [[False] * 4, [True, True, False, False]]
    figure = layer_figures.layer_heat(run, "error")
    assert figure.axes[-2].images[0].get_array().max() == pytest.approx(11.0)
    with pytest.raises(SparsightError, match="dense: no layer"):
        layer_figures.layer_heat(runs[0])


def test_kinds_of_layers():
    assert select.layer_kind("a.layers.3.self_attn.q_proj", "a.layers.3") == "self_attn.q_proj"
    assert select.layer_kind("a.block.0.layer.1.DenseReluDense.wi_0", "a.block.0") == "DenseReluDense.wi_0"
    assert select.layer_kind("a.layers.0.mlp.experts.gate_up_proj[7]", "a.layers.0") == "mlp.experts.gate_up_proj"
    assert select.layer_kind("a.layers.0.mlp.experts.12.w1", "a.layers.0") == "mlp.experts.w1"


def test_loss_curves_average_the_seeds(groups):
    figure = run_figures.loss_curves(groups)
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([2 / s + 0.5 for s in range(1, 11)])


def test_a_figure_that_the_runs_do_not_make(groups):
    dense = groups[:1]
    for draw, what in (
        (run_figures.fixed_sum_bars, "the same sum"),
        (run_figures.component_curves, "one component alone"),
        (run_figures.pattern_bars, "pattern alone"),
        (run_figures.restoration_pairs, "restored from it"),
        (run_figures.pareto, "two runs"),
        (run_figures.loss_curves, "restored, with its curve"),
        (layer_figures.layer_sparsity, "whose layers are known"),
    ):
        with pytest.raises(SparsightError, match=what):
            draw(dense)
    with pytest.raises(SparsightError, match="VQA accuracy"):
        run_figures.scores(group_runs([replace(groups[0].first, predictions=(), scores=())]), "vqa_accuracy")


def test_of_many_runs_a_figure_with_a_row_per_run_has_the_first(groups):
    """The only pair before and after restoration comes too late to be drawn; the page must do without it."""
    dense, *pruned = groups
    others = [Group(f"{g.label} {n}", g.runs) for n in range(5) for g in pruned if not g.first.is_restored]
    figures = {figure.name: figure.figure for figure in report_figures([dense, *others[:40], groups[-1]])}
    assert len(figures["scores"].axes[0].get_yticks()) == 40
    assert "restoration" not in figures
    assert "bytes" in figures


def test_series_are_named_by_what_differs_between_them(runs):
    cells = [
        {"method": "wanda", "pattern": "row", "policy": "uniform", "reconstruct": 2},
        {"method": "alps", "pattern": "4:8", "policy": "owl", "restore": {"adapter": "full"}},
    ]
    assert series_labels(cells, "pattern") == ["wanda + reconstruct 2, pruned", "alps, owl, restored with full"]
    assert series_labels([*cells[:1], *cells[:1]], "sparsity") == ["", " (2)"]
    assert series_labels(cells[1:], "sparsity") == [""]
    assert describe({**cells[1], "sparsity": {"vision": 0.5}}) == "alps, 4:8, owl, vision 50\u00a0%, restored with full"
    assert describe(runs[0].cell) == "dense"


def test_another_metric(groups, hits):
    (axes,) = run_figures.pattern_bars(groups, "cider_d").axes
    right = np.stack([hits("2:4", seed) for seed in (0, 1)])
    assert axes.patches[-1].get_height() == pytest.approx(10 * right[:, 30:].mean())
    assert axes.get_ylabel() == "CIDEr-D"


def test_fit_for_one_column_of_paper(groups):
    for figure in report_figures(groups):
        assert figure.figure.get_figwidth() == pytest.approx(3.3)
        figure.figure.canvas.draw()
        texts = [text for text in figure.figure.findobj(Text) if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 7, figure.name


def test_files(groups, tmp_path):
    written = save_figures(report_figures(groups), tmp_path / "figures")
    names = {path.name for path in written}
    assert {"scores.svg", "fixed-sum.png", "components.svg", "patterns.png", "restoration.svg", "bytes.png"} <= names
    for path in written:
        if path.suffix == ".png":
            assert struct.unpack(">I", path.read_bytes()[16:20])[0] == 660  # 3.3 inches at 200 dpi
        else:
            assert list(ElementTree.parse(path).iter(SVG + "text")), path.name
    first, again = (svg(run_figures.scores(groups), "x", "y") for _ in range(2))
    assert first == again  # the same runs, the same bytes


def test_svg_in_a_page(groups):
    text = svg(run_figures.pattern_bars(groups), "p", 'a "label" & more')
    assert text.startswith('<svg role="img" aria-label="a &quot;label&quot; &amp; more"')
    ids = set(re.findall(r'\bid="([^"]*)"', text))
    assert ids
    assert all(name.startswith("p-") for name in ids)
    assert {*re.findall(r'href="#([^"]*)"', text), *re.findall(r"url\(#([^)]*)\)", text)} <= ids
    assert "unstructured" in text
    assert "<metadata" not in text
