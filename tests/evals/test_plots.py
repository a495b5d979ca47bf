"""Plots show the scores, and their files are the same everywhere."""

import hashlib
import io
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lim_sglang.evals.metrics import Estimate
from lim_sglang.evals.plots import (
    PLOTS,
    count_votes,
    draw_png,
    draw_svg,
    finished_lengths,
    interval,
    round_values,
    vote_bands,
)
from lim_sglang.evals.report import Group, make_groups
from lim_sglang.plot_style import settings
from tests.evals.summaries import FULL, five_runs, simulated

BY_NAME = {plot.name: plot for plot in PLOTS}


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    return make_groups([*five_runs(40), *five_runs(30, task="aime24", samples=8)])


def axes_of(name: str, group: Group) -> list[Any]:
    """Return the axes of a plot."""
    from matplotlib.figure import Figure

    with settings():
        panel = Figure().subfigures()
        BY_NAME[name].draw(panel, group)
        return list(panel.axes)


def test_accuracy_is_plotted_with_its_intervals(groups: tuple[Group, ...]) -> None:
    full, *sparse = groups[1].rows
    (axes,) = axes_of("accuracy", groups[1])
    (container,) = axes.containers
    line, _, (bars,) = container.lines
    by_budget = sorted(sparse, key=lambda row: row.budget or 0)
    assert list(line.get_xdata()) == [128, 256, 512, 1024]
    expected = [100 * row.score.pass_at_1.value for row in by_budget]
    assert list(line.get_ydata()) == pytest.approx(expected)
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [pytest.approx(interval(row.score.pass_at_1)) for row in by_budget]
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx(
        interval(full.score.pass_at_1)
    )


def test_programs_that_stop_early_are_plotted_only_among_themselves() -> None:
    stopping = simulated(questions=9, program="adaptive")
    (mixed,) = make_groups([simulated(questions=9, **FULL), simulated(questions=9), stopping])
    (axes,) = axes_of("accuracy", mixed)
    assert [container.get_label() for container in axes.containers] == ["LessIsMore"]
    assert axes.get_ylabel().startswith("pass@1")
    (alone,) = make_groups([stopping])
    (axes,) = axes_of("accuracy", alone)
    right = 100 * alone.rows[0].score.vote_correct.value
    assert list(axes.containers[0].lines[0].get_ydata()) == [right]
    assert axes.get_ylabel().startswith("vote right")


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.5, 0.1), (30.4, 69.6)),
        (Estimate(0.99, 0.02), (95.08, 100.0)),
        (Estimate(0.01, 0.02), (0.0, 4.92)),
        (Estimate(1.0, None), (100.0, 100.0)),
    ],
)
def test_an_interval_is_1_96_standard_errors_within_0_and_100(
    estimate: Estimate, expected: tuple[float, float]
) -> None:
    assert interval(estimate) == pytest.approx(expected, abs=0.01)


def test_series_of_the_same_budgets_do_not_hide_each_other() -> None:
    runs = [simulated(questions=9, ranking=ranking, budget=128) for ranking in ("rank", "mass")]
    (axes,) = axes_of("accuracy", make_groups(runs)[0])
    places = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert places[0] == 128 < places[1] < 150


def test_votes_and_any_right_are_plotted_over_tokens(groups: tuple[Group, ...]) -> None:
    top, bottom = axes_of("tokens", groups[0])
    ks = (1, 2, 4, 8)
    for number, row in enumerate(groups[0].rows):
        for axes, at in ((top, row.score.majority_at), (bottom, row.score.pass_at)):
            line = axes.lines[number]
            assert list(line.get_xdata()) == pytest.approx([k * row.score.mean_tokens for k in ks])
            assert list(line.get_ydata()) == pytest.approx([100 * at[k].value for k in ks])


def test_a_program_that_stops_early_is_one_point_over_its_tokens() -> None:
    runs = [simulated(questions=9, **FULL), simulated(questions=9, program="adaptive")]
    (group,) = make_groups(runs)
    top, bottom = axes_of("tokens", group)
    score = group.rows[1].score
    assert list(top.lines[1].get_xdata()) == [score.tokens_per_question]
    assert list(top.lines[1].get_ydata()) == [100 * score.vote_correct.value]
    assert len(bottom.lines) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(90, 2500, [100, 200, 500, 1000, 2000]), (600, 2200, [700, 1000, 1500, 2000])],
)
def test_ticks_are_round_values(low: float, high: float, expected: list[float]) -> None:
    assert round_values(low, high) == expected


def test_histograms_hold_every_finished_sample_on_one_scale(groups: tuple[Group, ...]) -> None:
    rows = groups[1].rows
    (axes,) = axes_of("lengths", groups[1])
    filled = [patch for patch in axes.patches if patch.get_fill()]
    scales = []
    for position, (row, patch) in enumerate(zip(reversed(rows), filled, strict=True)):
        finished = [
            tokens
            for question in row.summary.questions
            for tokens, state in zip(question.tokens, question.states, strict=True)
            if state == "finished"
        ]
        assert finished_lengths(row) == finished
        assert len(finished) < row.score.num_samples
        data = patch.get_data()
        expected, _ = np.histogram(finished, bins=data.edges)
        heights = np.array(data.values) - position
        scales.append(heights.sum())
        assert heights / heights.sum() == pytest.approx(expected / expected.sum())
        assert heights.max() < 1
    assert scales == pytest.approx([scales[0]] * len(scales))


def test_bars_of_votes_are_as_long_as_the_share_of_right_answers(
    groups: tuple[Group, ...],
) -> None:
    for group in groups:
        (axes,) = axes_of("votes", group)
        for place, row in enumerate(reversed(group.rows)):
            bars = [p for p in axes.patches if abs(p.get_y() + p.get_height() / 2 - place) < 0.1]
            right = sum(bar.get_width() for bar in bars if bar.get_width() > 0)
            assert right == pytest.approx(100 * row.score.vote_correct.value)
            assert sum(abs(bar.get_width()) for bar in bars) == pytest.approx(100)


def test_each_question_is_in_the_band_of_its_votes() -> None:
    (group,) = make_groups([simulated(questions=50)])
    votes = count_votes(group.rows[0], vote_bands(4))
    for number, share in zip((4, 3, 2, 1), votes.right, strict=True):
        expected = [
            question.answer_correct and question.group.count(question.chosen) == number
            for question in group.rows[0].summary.questions
        ]
        assert share == pytest.approx(sum(expected) / 50)
    assert sum((*votes.right, *votes.wrong, votes.no_answer)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("votes", "of", "band"),
    [(16, 16, 0), (15, 16, 1), (12, 16, 1), (11, 16, 2), (4, 16, 3), (3, 16, 4), (5, 5, 0)],
)
def test_bands_of_many_samples_are_shares(votes: int, of: int, band: int) -> None:
    assert vote_bands(16).find(votes, of) == band


def test_names_are_text_and_not_formulas() -> None:
    (group,) = make_groups([simulated(questions=9, model="cheap$model$<&>")])
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(draw_svg(BY_NAME["accuracy"], [group]))
    assert "math500, cheap$model$<&>" in [element.text for element in root.iter(f"{svg}text")]


def test_the_same_runs_give_the_same_files_in_any_process() -> None:
    program = (
        "import hashlib; from lim_sglang.evals.plots import *; "
        "from lim_sglang.evals.report import make_groups; "
        "from tests.evals.summaries import simulated; g = make_groups([simulated(questions=9)]); "
        "files = [draw_svg(p, g).encode() for p in PLOTS] + [draw_png(PLOTS[0], g)]; "
        "print(hashlib.sha256(b''.join(files)).hexdigest())"
    )
    groups = make_groups([simulated(questions=9)])
    files = [draw_svg(plot, groups).encode() for plot in PLOTS] + [draw_png(PLOTS[0], groups)]
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.strip() == hashlib.sha256(b"".join(files)).hexdigest(), other.stderr


def test_a_png_has_two_pixels_a_point(groups: tuple[Group, ...]) -> None:
    picture = Image.open(io.BytesIO(draw_png(BY_NAME["accuracy"], groups)))
    assert picture.width == 2 * 380
    assert picture.getpixel((1, 1))[:3] == (255, 255, 255)


@pytest.mark.parametrize(
    "runs",
    [
        [simulated(questions=1, samples=1)],
        [simulated(questions=5, harm=50), simulated(questions=5, harm=50, **FULL)],
        [simulated(questions=5, longer=1000), simulated(questions=5, longer=1000, **FULL)],
        [simulated(questions=5, **FULL)],
        [simulated(questions=9, budget=2**n) for n in range(5, 17)],
    ],
    ids=["one sample", "none right", "all cut off", "full alone", "many"],
)
def test_odd_runs_are_plotted_without_a_warning(
    runs: Any, recwarn: pytest.WarningsRecorder
) -> None:
    for plot in PLOTS:
        ElementTree.fromstring(draw_svg(plot, make_groups(runs)))
    assert not [str(warning.message) for warning in recwarn]
