"""Plots show the scores, and their files are the same everywhere."""

import hashlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lim_sglang.evals.metrics import Estimate, Summary
from lim_sglang.evals.plots import (
    PLOTS,
    count_votes,
    draw_png,
    draw_svg,
    interval,
    round_values,
    vote_bands,
)
from lim_sglang.evals.report import Group, make_groups
from lim_sglang.plot_style import settings
from lim_sglang.policies import POLICIES
from tests.evals.summaries import FULL, five_runs, question, run, simulated

BY_NAME = {plot.name: plot for plot in PLOTS}


@pytest.fixture(scope="module")
def group() -> Group:
    (found,) = make_groups(five_runs(40, samples=8))
    return found


def axes_of(name: str, group: Group) -> list[Any]:
    """Return the axes of a plot."""
    with settings():
        panel = Figure().subfigures()
        BY_NAME[name].draw(panel, group)
        return list(panel.axes)


def test_accuracy_is_plotted_with_its_intervals(group: Group) -> None:
    (axes,) = axes_of("accuracy", group)
    (container,) = axes.containers
    line, _, (bars,) = container.lines
    by_budget = [row.score.pass_at_1 for row in reversed(group.rows[1:])]
    assert list(line.get_xdata()) == [128, 256, 512, 1024]
    assert list(line.get_ydata()) == pytest.approx([100 * each.value for each in by_budget])
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [pytest.approx(interval(each)) for each in by_budget]
    (band,) = axes.patches
    low, high = interval(group.rows[0].score.pass_at_1)
    assert (band.get_y(), band.get_height()) == pytest.approx((low, high - low))


def test_programs_that_stop_early_are_plotted_only_among_themselves() -> None:
    adaptive = simulated(program="adaptive")
    (mixed,) = make_groups([simulated(**FULL), simulated(), adaptive])
    (axes,) = axes_of("accuracy", mixed)
    assert [container.get_label() for container in axes.containers] == ["LessIsMore"]
    assert axes.get_ylabel().startswith("pass@1")
    (alone,) = make_groups([adaptive])
    (axes,) = axes_of("accuracy", alone)
    right = 100 * alone.rows[0].score.vote_correct.value
    assert list(axes.containers[0].lines[0].get_ydata()) == [right]
    assert axes.get_ylabel().startswith("right votes")
    top, bottom = axes_of("tokens", mixed)
    score = mixed.rows[2].score
    assert list(top.lines[2].get_xdata()) == [score.tokens_per_question]
    assert list(top.lines[2].get_ydata()) == [100 * score.vote_correct.value]
    assert len(bottom.lines) == 2


def test_runs_that_all_stop_early_have_no_empty_axes_for_pass_at_k() -> None:
    runs = [simulated(program="adaptive", **FULL), simulated(program="adaptive")]
    assert len(axes_of("tokens", make_groups(runs)[0])) == 1


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


@pytest.mark.parametrize("names", [("tidal", "quest"), tuple(sorted(POLICIES.keys() - {"full"}))])
def test_series_of_the_same_budget_stand_side_by_side_around_it(names: tuple[str, ...]) -> None:
    runs = [simulated(policy=name, budget=budget) for name in names for budget in (256, 1024)]
    (axes,) = axes_of("accuracy", make_groups(runs)[0])
    left, right = axes.get_xlim()
    for point, budget in enumerate((256, 1024)):
        places = [container.lines[0].get_xdata()[point] for container in axes.containers]
        assert len(set(places)) == len(names)
        assert left < min(places) < budget < max(places) < right
        assert max(places) / budget < 2**0.5


def test_votes_and_any_right_are_plotted_over_tokens(group: Group) -> None:
    top, bottom = axes_of("tokens", group)
    for number, row in enumerate(group.rows):
        for axes, at in ((top, row.score.majority_at), (bottom, row.score.pass_at)):
            line = axes.lines[number]
            assert list(line.get_xdata()) == [k * row.score.mean_tokens for k in (1, 2, 4, 8)]
            assert list(line.get_ydata()) == [100 * at[k].value for k in (1, 2, 4, 8)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(90, 2500, [100, 200, 500, 1000, 2000]), (600, 2200, [700, 1000, 1500, 2000])],
)
def test_ticks_are_round_values(low: float, high: float, expected: list[float]) -> None:
    assert round_values(low, high) == expected


def test_histograms_hold_every_finished_sample_on_one_scale(group: Group) -> None:
    (axes,) = axes_of("lengths", group)
    filled = [patch for patch in axes.patches if patch.get_fill()]
    scales = []
    for position, (row, patch) in enumerate(zip(reversed(group.rows), filled, strict=True)):
        finished = [
            tokens
            for question in row.summary.questions
            for tokens, state in zip(question.tokens, question.states, strict=True)
            if state == "finished"
        ]
        assert len(finished) < row.score.num_samples
        data = patch.get_data()
        expected, _ = np.histogram(finished, bins=data.edges)
        heights = np.array(data.values) - position
        scales.append(heights.sum())
        assert heights / heights.sum() == pytest.approx(expected / expected.sum())
        assert heights.max() < 1
    assert scales == pytest.approx([scales[0]] * len(scales))


def test_bars_of_votes_are_as_long_as_the_share_of_right_answers(group: Group) -> None:
    (axes,) = axes_of("votes", group)
    for place, row in enumerate(reversed(group.rows)):
        bars = [p for p in axes.patches if abs(p.get_y() + p.get_height() / 2 - place) < 0.1]
        right = sum(bar.get_width() for bar in bars if bar.get_width() > 0)
        assert right == pytest.approx(100 * row.score.vote_correct.value)
        assert sum(abs(bar.get_width()) for bar in bars) == pytest.approx(100)


def test_each_question_is_in_the_band_of_its_votes() -> None:
    questions = [
        question("all", [0, 0, 0, 0], chosen=0),
        question("half", [0, 0, 1, None], 1, chosen=0),
        question("late", [0, 0, 0, 0], late=[1, 2, 3], chosen=0),
        question("no answer", [None] * 4),
    ]
    (group,) = make_groups([run(*questions)])
    votes = count_votes(group.rows[0], vote_bands(4))
    assert votes.right == (1 / 4, 0, 0, 1 / 4)  # by 4, 3, 2 votes and by 1 vote
    assert (votes.wrong, votes.no_answer) == ((0, 0, 1 / 4, 0), 1 / 4)


@pytest.mark.parametrize(
    ("votes", "of", "band"),
    [(16, 16, 0), (15, 16, 1), (12, 16, 1), (11, 16, 2), (4, 16, 3), (3, 16, 4), (5, 5, 0)],
)
def test_bands_of_many_samples_are_shares(votes: int, of: int, band: int) -> None:
    assert vote_bands(16).find(votes, of) == band


def test_the_same_runs_give_the_same_files_in_any_process() -> None:
    program = (
        "import hashlib; from lim_sglang.evals.plots import *; "
        "from lim_sglang.evals.report import make_groups; "
        "from tests.evals.summaries import simulated; g = make_groups([simulated()]); "
        "files = [draw_svg(p, g).encode() for p in PLOTS] + [draw_png(PLOTS[0], g)]; "
        "print(hashlib.sha256(b''.join(files)).hexdigest())"
    )
    groups = make_groups([simulated()])
    files = [draw_svg(plot, groups).encode() for plot in PLOTS] + [draw_png(PLOTS[0], groups)]
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.strip() == hashlib.sha256(b"".join(files)).hexdigest(), other.stderr


@pytest.mark.parametrize(
    "runs",
    [
        [simulated(questions=1, samples=1)],
        [simulated(questions=5, harm=50), simulated(questions=5, harm=50, **FULL)],
        [simulated(questions=5, longer=1000), simulated(questions=5, longer=1000, **FULL)],
        [simulated(model="cheap$model$<&>", **FULL)],
        [simulated(budget=2**n) for n in range(5, 17)],
        [simulated(), simulated(task="aime24")],
    ],
    ids=["one sample", "none right", "all cut off", "odd name", "many", "two panels"],
)
def test_odd_runs_are_plotted_without_a_warning(
    runs: list[Summary], recwarn: pytest.WarningsRecorder
) -> None:
    groups = make_groups(runs)
    for plot in PLOTS:
        root = ElementTree.fromstring(draw_svg(plot, groups))
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        title = groups[0].title.split(", ")[-1]
        assert any(title in (text or "") for text in texts)  # text, not a formula
    # matplotlib warns as a user's mistake; other tests' leftovers may be collected meanwhile.
    assert not [w.message for w in recwarn if issubclass(w.category, UserWarning)]
