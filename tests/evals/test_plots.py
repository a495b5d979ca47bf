"""The plots: what is drawn is what was scored, and the files fit everywhere."""

import hashlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from lim_sglang.evals.metrics import Estimate
from lim_sglang.evals.plots import (
    PLOTS,
    Plot,
    bands_of,
    count_votes,
    draw_png,
    draw_svg,
    interval,
    lengths_of,
)
from lim_sglang.evals.report import Group, make_groups
from lim_sglang.plot_style import FILE_STYLE, LIGHT, PAGE_STYLE, settings
from tests.evals.made_summaries import FULL, five_runs, made

SVG = "{http://www.w3.org/2000/svg}"
BY_NAME = {plot.name: plot for plot in PLOTS}


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    return make_groups([*five_runs(40), *five_runs(30, task="aime24", samples=8)])


def axes_of(name: str, group: Group) -> list[Any]:
    """Where a plot has been drawn, in light colours."""
    from matplotlib.figure import Figure

    with settings(LIGHT):
        panel = Figure().subfigures()
        BY_NAME[name].draw(panel, group, LIGHT)
        return list(panel.axes)


def test_accuracy_is_drawn_where_it_was_scored(groups: tuple[Group, ...]) -> None:
    group = groups[1]
    full, *sparse = group.rows
    (axes,) = axes_of("accuracy", group)
    (drawn,) = axes.containers
    line, _, (bars,) = drawn.lines
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


def test_programs_without_a_pass_at_1_are_not_among_those_that_have_one() -> None:
    stopping = made(questions=9, program="adaptive")
    (group,) = make_groups([made(questions=9, **FULL), made(questions=9), stopping])
    (axes,) = axes_of("accuracy", group)
    assert [container.get_label() for container in axes.containers] == ["LessIsMore"]
    assert axes.get_ylabel().startswith("pass@1")
    assert "adaptive" not in BY_NAME["accuracy"].describe(group)
    (alone,) = make_groups([stopping])
    (axes,) = axes_of("accuracy", alone)
    answered = 100 * alone.rows[0].score.answered.value
    assert list(axes.containers[0].lines[0].get_ydata()) == [answered]
    assert axes.get_ylabel().startswith("vote right")


def test_an_interval_is_two_standard_errors_to_each_side_within_0_and_100() -> None:
    assert interval(Estimate(0.5, 0.1)) == pytest.approx((30.4, 69.6), abs=0.01)
    assert interval(Estimate(0.99, 0.02))[1] == 100.0
    assert interval(Estimate(0.01, 0.02))[0] == 0.0
    assert interval(Estimate(1.0, None)) == (100.0, 100.0)


def test_series_of_the_same_budgets_do_not_hide_each_other() -> None:
    runs = [made(questions=9, ranking=ranking, budget=128) for ranking in ("rank", "mass")]
    (axes,) = axes_of("accuracy", make_groups(runs)[0])
    places = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert places[0] == 128 < places[1] < 150


def test_tokens_are_drawn_against_votes_and_any_right(groups: tuple[Group, ...]) -> None:
    group = groups[0]
    top, bottom = axes_of("tokens", group)
    for number, row in enumerate(group.rows):
        xs = [k * row.score.mean_tokens for k in (1, 2, 4, 8)]
        for axes, at in ((top, row.score.majority_at), (bottom, row.score.pass_at)):
            line = axes.lines[number]
            assert list(line.get_xdata()) == pytest.approx(xs)
            assert list(line.get_ydata()) == pytest.approx(
                [100 * at[k].value for k in (1, 2, 4, 8)]
            )


def test_a_program_that_stops_by_itself_is_one_point_of_what_it_spent() -> None:
    (group,) = make_groups([made(questions=9, **FULL), made(questions=9, program="adaptive")])
    top, bottom = axes_of("tokens", group)
    score = group.rows[1].score
    assert list(top.lines[1].get_xdata()) == [score.tokens_per_question]
    assert list(top.lines[1].get_ydata()) == [100 * score.answered.value]
    assert len(bottom.lines) == 1


def test_histograms_hold_every_finished_sample_and_share_a_scale(
    groups: tuple[Group, ...],
) -> None:
    group = groups[1]
    (axes,) = axes_of("lengths", group)
    filled = [patch for patch in axes.patches if patch.get_fill()]
    assert len(filled) == len(group.rows)
    scales = []
    for place, (row, patch) in enumerate(zip(reversed(group.rows), filled, strict=True)):
        data = patch.get_data()
        expected, _ = np.histogram(lengths_of(row), bins=data.edges)
        heights = np.array(data.values) - place
        scales.append(heights.sum())
        assert heights / heights.sum() == pytest.approx(expected / expected.sum())
        assert heights.max() < 1
    assert scales == pytest.approx([scales[0]] * len(scales))


def test_only_samples_that_the_model_ended_have_a_length(groups: tuple[Group, ...]) -> None:
    for row in groups[1].rows:
        ended = [
            (tokens, state)
            for question in row.summary.questions
            for tokens, state in zip(question.tokens, question.states, strict=True)
            if state == "finished"
        ]
        assert lengths_of(row) == [tokens for tokens, _ in ended]
        assert len(ended) < row.score.num_samples


def test_votes_reach_as_far_as_answers_are_right(groups: tuple[Group, ...]) -> None:
    for group in groups:
        (axes,) = axes_of("votes", group)
        for place, row in enumerate(reversed(group.rows)):
            bars = [p for p in axes.patches if abs(p.get_y() + p.get_height() / 2 - place) < 0.1]
            right = sum(bar.get_width() for bar in bars if bar.get_width() > 0)
            everything = sum(abs(bar.get_width()) for bar in bars)
            assert right == pytest.approx(100 * row.score.answered.value)
            assert everything == pytest.approx(100)


def test_each_question_is_in_the_band_of_its_votes() -> None:
    (group,) = make_groups([made(questions=50)])
    votes = count_votes(group.rows[0], bands_of(4))
    for number, found in zip((4, 3, 2, 1), votes.right, strict=True):
        expected = [
            question.answer_correct and question.group.count(question.chosen) == number
            for question in group.rows[0].summary.questions
        ]
        assert found == pytest.approx(sum(expected) / 50)
    assert sum((*votes.right, *votes.wrong, votes.silent)) == pytest.approx(1)


def test_many_samples_are_banded_by_their_share() -> None:
    bands = bands_of(16)
    assert [bands.find(votes, 16) for votes in (16, 15, 12, 11, 8, 4, 3)] == [0, 1, 1, 2, 2, 3, 4]
    assert bands.find(5, 5) == 0
    assert len(bands.names) == 5


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_a_picture_is_well_formed_and_says_what_it_shows(
    plot: Plot, groups: tuple[Group, ...]
) -> None:
    drawn = draw_svg(plot, groups, name="one", alone=True)
    root = ElementTree.fromstring(drawn)
    said = {child.tag.removeprefix(SVG): child for child in root[:3]}
    assert list(said) == ["title", "desc", "style"]
    assert said["title"].text == plot.title
    assert root.get("aria-labelledby") == f"{said['title'].get('id')} {said['desc'].get('id')}"
    for group in groups:
        assert f"{group.title}. {plot.describe(group)}" in (said["desc"].text or "")
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"math500, Qwen/Qwen2.5-Coder-1.5B-Instruct", "LessIsMore 512"} & set(words)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_no_stand_in_and_no_colour_of_its_own_is_left(
    plot: Plot, groups: tuple[Group, ...]
) -> None:
    drawn = draw_svg(plot, groups, name="one", alone=False)
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", drawn)
    assert "rgb(" not in drawn
    used = set(re.findall(r"\b[fs]-\w+", " ".join(re.findall(r'class="([^"]*)"', drawn))))
    assert {"f-paper", "f-ink"} <= used
    for style, times in ((PAGE_STYLE, 1), (FILE_STYLE, 2)):  # in light and in dark
        assert {name: style.count(f".{name}{{") for name in used} == dict.fromkeys(used, times)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_pictures_of_one_page_share_no_id_and_all_references_hold(
    plot: Plot, groups: tuple[Group, ...]
) -> None:
    seen: set[str] = set()
    for name, group in zip(("a", "b"), groups, strict=True):
        root = ElementTree.fromstring(draw_svg(plot, [group], name=name, alone=False))
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        references = {
            found
            for element in root.iter()
            for value in element.attrib.values()
            for found in re.findall(r"#([\w.-]+)", value)
        }
        assert len(ids) == len(set(ids))
        said = {f"{name}-title", f"{name}-desc"}
        assert set(ids) == references | said
        assert not seen & set(ids)
        seen |= {identity for identity in ids if identity}


def test_nothing_is_fetched(groups: tuple[Group, ...]) -> None:
    for plot in PLOTS:
        drawn = draw_svg(plot, groups, name="one", alone=True)
        assert set(re.findall(r"\w+://[^\"' ]+", drawn)) == {"http://www.w3.org/2000/svg"}
        assert not re.findall(r"url\((?!#)", drawn)
        assert "<image" not in drawn


def test_names_are_words_and_not_formulas() -> None:
    (group,) = make_groups([made(questions=9, model="cheap$model$<&>")])
    drawn = draw_svg(BY_NAME["accuracy"], [group], name="a", alone=True)
    words = [element.text for element in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    assert "math500, cheap$model$<&>" in words


def test_the_same_runs_give_the_same_bytes_in_any_process(groups: tuple[Group, ...]) -> None:
    program = (
        "import hashlib; from lim_sglang.evals.plots import *; "
        "from lim_sglang.evals.report import make_groups; "
        "from tests.evals.made_summaries import five_runs; g = make_groups(five_runs(20)); "
        "d = [draw_svg(p, g, name='a', alone=True).encode() + draw_png(p, g) for p in PLOTS]; "
        "print(hashlib.sha256(b''.join(d)).hexdigest())"
    )
    here = make_groups(five_runs(20))
    drawn = [
        draw_svg(plot, here, name="a", alone=True).encode() + draw_png(plot, here) for plot in PLOTS
    ]
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert other.stdout.strip() == hashlib.sha256(b"".join(drawn)).hexdigest(), other.stderr


def test_another_run_gives_another_picture(groups: tuple[Group, ...]) -> None:
    for plot in PLOTS:
        first, second = (
            draw_svg(plot, make_groups(five_runs(20, seed=seed)), name="a", alone=True)
            for seed in (0, 1)
        )
        assert first != second


def test_a_png_is_twice_as_wide_as_its_panels(groups: tuple[Group, ...]) -> None:
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(draw_png(BY_NAME["accuracy"], groups)))
    assert picture.width == 2 * 2 * 380
    assert picture.getpixel((1, 1))[:3] == (255, 255, 255)
    assert "Software" not in picture.info


@pytest.mark.parametrize(
    "runs",
    [
        [made(questions=1, samples=1)],
        [made(questions=5, harm=50), made(questions=5, harm=50, **FULL)],
        [made(questions=5, longer=1000), made(questions=5, longer=1000, **FULL)],
        [made(questions=5, **FULL)],
        [made(questions=9, budget=2**n) for n in range(5, 17)],
    ],
    ids=["one sample", "none right", "all cut off", "full alone", "many"],
)
def test_odd_runs_are_drawn_without_a_warning(runs: Any, recwarn: pytest.WarningsRecorder) -> None:
    for plot in PLOTS:
        ElementTree.fromstring(draw_svg(plot, make_groups(runs), name="a", alone=True))
    assert not [str(warning.message) for warning in recwarn]
