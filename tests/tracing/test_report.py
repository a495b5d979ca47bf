"""Means, curves, tables and the page of a trace."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lim_sglang.errors import DataError
from lim_sglang.tracing import report
from lim_sglang.tracing.records import Trace
from lim_sglang.tracing.summary import (
    Curve,
    cumulative,
    mean_curve,
    means_of_questions,
    percent,
    running,
    shared_layers,
)
from tests.tracing.traces import CONDITIONS, TRACE, question, record

CURVE: Curve = [(8, 1.0), (16, 0.0), (24, 0.5), (32, 1.5)]


def test_a_cumulative_mean_is_of_all_values_so_far() -> None:
    assert cumulative(CURVE) == [(8, 1.0), (16, 0.5), (24, 0.5), (32, 0.75)]
    assert cumulative([]) == []


def test_a_running_mean_is_of_the_newest_values() -> None:
    assert running(CURVE, 2) == [(8, 1.0), (16, 0.5), (24, 0.25), (32, 1.0)]


def test_a_curve_is_the_mean_at_each_step_of_the_records_that_have_a_value() -> None:
    records = report.all_records(TRACE)
    assert mean_curve(records, "step", percent("recall", "lessismore")) == [(8, 75.0), (16, 87.5)]
    assert mean_curve(records, "layer", percent("recall", "streaming")) == [(2, 56.25), (3, 56.25)]
    assert mean_curve(records, "layer", percent("from_step", "lessismore")) == [(2, 75.0)]


def test_policies_are_compared_in_layers_that_all_of_them_read_sparsely() -> None:
    assert shared_layers(TRACE) == {3}
    value = percent("recall", "streaming")
    assert means_of_questions(TRACE, value, {3}) == [50.0, 62.5]
    assert means_of_questions(TRACE, percent("recall", "quest")) == []


def test_the_table_has_recall_lowest_layer_and_changes_with_errors_over_questions() -> None:
    rows = report.policy_table(TRACE).rows
    assert rows == (
        ("lessismore", "81.2 ± 6.2", "81.2", "75.0 ± 0.0", "-"),
        ("streaming", "56.2 ± 6.2", "56.2", "-", "-"),
    )


def test_the_layers_table_leaves_dense_layers_open() -> None:
    table = report.layer_table(TRACE)
    assert table.head[-2:] == ("recall of lessismore, %", "recall of streaming, %")
    assert table.rows == (
        ("2", "0.25", "0.12", "12.0", "-", "56.2"),
        ("3", "0.38", "0.25", "13.0", "81.2", "56.2"),
    )


def test_the_overlap_is_said_by_the_criterion() -> None:
    words = report.overlap_text(TRACE)
    assert "with sinks and recent: 0.312, below 0.3 in 1 of 2 layers" in words
    assert "without sinks and recent: 0.188, below 0.3 in 2 of 2 layers" in words
    alone = replace(question("a"), layers=(record(8, 3, {}, None),))
    assert "one query head" in report.overlap_text(Trace(CONDITIONS, (alone,)))


def test_conditions_name_who_decodes_and_what_was_measured() -> None:
    words = report.conditions_text(TRACE)
    assert words.startswith("SmolLM2-135M-Instruct, CPU, f32, budget 64; greedy answers to ")
    on_gpu = report.conditions_text(replace(TRACE, conditions=CONDITIONS | {"gpu": "NVIDIA H200"}))
    assert on_gpu.startswith("SmolLM2-135M-Instruct, NVIDIA H200, budget 64;")
    assert "2 questions, decoded by lessismore, 117 tokens with their prompts, 0 cut off" in words
    assert "4 steps over the budget were measured, one in 8" in words
    assert "commit 0123456789, torch 2.11.0, SGLang 0.5.16" in words
    assert "Recall is over the 1 layer that all policies read sparsely;" in words
    dense = replace(question("a"), layers=(record(8, 2, {"streaming": 0.5}),))
    none = report.conditions_text(Trace(CONDITIONS, (dense,)))
    assert "Recall is not shown, as no layer is read sparsely by all policies;" in none


def test_the_page_loads_nothing_and_holds_plots_and_tables(tmp_path: Path) -> None:
    page = report.write_page(TRACE, tmp_path).read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/svg)""", page)
    assert page.count("<img ") == len(list(tmp_path.glob("*.svg"))) == 4
    for cell in ("81.2 ± 6.2", "0.38"):
        assert f"<td>{cell}</td>" in page


def test_a_page_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written .* name another --out"):
        report.write_page(TRACE, tmp_path / "none")


def test_a_panel_without_curves_is_left_out() -> None:
    panels = report.plots(TRACE)["changes"].panels
    assert [panel.title for panel in panels] == ["from the step before"]


def test_plots_have_both_means_of_recall_and_the_criterion() -> None:
    found = report.plots(TRACE)
    sums, newest = (panel.curves["lessismore"] for panel in found["recall"].panels)
    assert sums == newest == [(8, 75.0), (16, 81.25)]
    assert [panel.level for panel in found["overlap"].panels] == [0.3, 0.3]
