"""Groups of runs and their names, `lim report`, and the documents that it wrote."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lim_sglang.errors import DataError, LimError
from lim_sglang.evals.commands import write_report
from lim_sglang.evals.compare import compare
from lim_sglang.evals.metrics import Summary, score
from lim_sglang.evals.plots import PLOTS, draw_svg
from lim_sglang.evals.report import Group, leave_out_repeats, make_groups
from lim_sglang.evals.report_page import make_page
from lim_sglang.evals.sections import SECTION, proof_section, results_section
from lim_sglang.evals.summaries import load_summaries, write_summaries
from tests.evals.summaries import COMMITTED, CONDITIONS, FULL, five_runs, simulated

ROOT = Path(__file__).parents[2]
CODER = CONDITIONS["model"]


def sparse(budget: int = 256, **conditions: Any) -> Summary:
    return simulated(budget=budget, **conditions)


def full(**conditions: Any) -> Summary:
    return simulated(**{**FULL, **conditions})


OTHER_QUESTIONS = {**CONDITIONS, "asked": 9, "questions": "ab" * 32}


def group_of(*runs: Summary) -> Group:
    (group,) = make_groups(runs)
    return group


def test_full_attention_comes_first_then_the_largest_budget() -> None:
    runs = five_runs(12)
    expected = ["full", "LessIsMore 1,024", "LessIsMore 512", "LessIsMore 256", "LessIsMore 128"]
    for given in (runs, runs[::-1]):
        assert [row.name for row in group_of(*given).rows] == expected


def test_each_run_is_scored_and_compared_with_full_attention() -> None:
    dense, other = full(), sparse(harm=1.0)
    first, second = group_of(other, dense).rows
    assert (first.summary, first.against_full) == (dense, None)
    assert second.score == score(other)
    assert second.against_full == compare(dense, other, names=("full", "LessIsMore 256"))
    assert [row.against_full for row in group_of(sparse(128), sparse(256)).rows] == [None, None]


def test_tasks_models_questions_and_limits_have_tables_of_their_own() -> None:
    others = [sparse(task="aime24"), sparse(model="a/model"), sparse(max_tokens=400)]
    groups = make_groups([full(), sparse(), *others])
    assert {group.title: [row.name for row in group.rows] for group in groups} == {
        f"aime24, {CODER}": ["LessIsMore 256"],
        f"math500, {CODER}, max tokens 400": ["LessIsMore 256"],
        f"math500, {CODER}, max tokens 2,048": ["full", "LessIsMore 256"],
        "math500, a/model": ["LessIsMore 256"],
    }
    first, second = make_groups([full(), replace(sparse(), conditions=OTHER_QUESTIONS)])
    assert {first.title[-18:], second.title[-18:]} == {"questions 59695e34", "questions abababab"}
    assert first.rows[0].against_full is second.rows[0].against_full is None


@pytest.mark.parametrize(
    ("runs", "variants"),
    [
        (
            [sparse(), sparse(program="adaptive"), sparse(ranking="mass")],
            ["256", "256, program adaptive", "256, ranking mass"],
        ),
        (
            [
                sparse(budget, select_layers=layers)
                for budget, layers in ((256, [2, 14]), (256, [2]), (128, [2]))
            ],
            ["256, select layers [2, 14]", "256, select layers [2]", "128, select layers [2]"],
        ),
        (
            [sparse(seed_honoured=False), sparse(seed_honoured=True)],
            ["256, seed honoured False", "256, seed honoured True"],
        ),
    ],
    ids=["unusual", "layers", "seed"],
)
def test_rows_are_named_by_what_differs(runs: list[Summary], variants: list[str]) -> None:
    rows = group_of(*runs[::-1]).rows
    assert [row.name for row in rows] == [f"LessIsMore {variant}" for variant in variants]
    # The name without the budget is that of a line in a plot.
    series = ["".join(variant.partition(",")[1:]) for variant in variants]
    assert [row.series for row in rows] == [f"LessIsMore{each}" for each in series]


def test_the_most_similar_run_of_full_attention_is_compared_with() -> None:
    runs = [full(), full(program="adaptive"), sparse(), sparse(program="adaptive")]
    rows = group_of(*runs).rows
    assert {row.name: row.against_full.a for row in rows if row.against_full} == {
        "LessIsMore 256": "full",
        "LessIsMore 256, program adaptive": "full, program adaptive",
    }
    assert [row.accuracy for row in rows] == [
        row.score.vote_correct if "adaptive" in row.name else row.score.pass_at_1 for row in rows
    ]


def test_an_incomplete_run_has_a_note_and_is_not_compared() -> None:
    part = replace(sparse(), questions=sparse().questions[:6], num_failed=3)
    row = group_of(full(), part).rows[1]
    assert row.against_full is None
    assert row.note == (
        "24 of 36 samples: the run is not complete, the same lim eval command with --retry-failed "
        "resumes it; 3 samples failed, not scored; not compared with full: full and "
        "LessIsMore 256 have different questions (LessIsMore 256 lacks 3 of 9 questions, with the "
        "ids q006, q007, q008); "
        "3 samples of LessIsMore 256 failed: the same lim eval command with --retry-failed tries "
        "them again, or compare the questions of both by lim compare --common"
    )


TWIN = replace(sparse(date="2026-11-26", commit="deadbeef"), run_id="twin")


def test_of_runs_with_the_same_conditions_that_of_most_samples_is_reported() -> None:
    smaller = replace(TWIN, questions=TWIN.questions[:-1])
    kept, repeats = leave_out_repeats([smaller, full(), sparse()])
    assert [run.label for run in kept] == [sparse().label, full().label]
    (note,) = (repeat.sentence() for repeat in repeats)
    assert note == f"left out: twin has the same conditions as {sparse().label}"
    assert leave_out_repeats([sparse(), TWIN])[0] == [sparse()]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no run to report; name run folders"),
        (
            [sparse(), full(), TWIN],
            r"256-0 and twin have the same conditions \(LessIsMore 256\): re",
        ),
        (
            [replace(sparse(), conditions={"task": "x", "policy": "full"})],
            "lacks .* model, program",
        ),
    ],
    ids=["none", "twice", "no conditions"],
)
def test_runs_that_cannot_be_reported_are_refused(runs: list[Summary], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_groups(runs)


GROUPS = make_groups([full(), sparse()])
DOCUMENT = f"# Title\n\n{SECTION.begin}\nold\n{SECTION.end}\n\nmore | text |\n"
"""A Markdown file with markers."""


MANY = five_runs(40, task="aime24")
"""Runs of enough questions for intervals and plots."""


def report(*words: Any) -> Result:
    """Run `lim report`."""
    app = typer.Typer()
    app.command()(write_report)
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two summaries."""
    write_summaries([full(), sparse()], tmp_path / "eval")
    return tmp_path / "eval"


def test_without_options_the_tables_are_printed(folder: Path) -> None:
    result = report(folder)
    assert result.exit_code == 0, result.exception
    assert result.stdout == f"{results_section(GROUPS)}\n"
    assert report(*sorted(folder.iterdir())).stdout == result.stdout


def test_rows_of_several_tables_are_named_by_their_runs(folder: Path) -> None:
    conditions = {**full().conditions, "questions": "ab" * 32}
    edited = replace(full(), run_id="edited", conditions=conditions)
    (path,) = write_summaries([edited], folder / "edited")
    several = report(folder, path)
    assert "questions abababab" in several.stdout
    assert f"questions abababab: full is {path} (edited)\n" in several.stderr
    assert " is " not in report(path).stderr


def test_everything_is_written_at_once_and_a_second_time_without_a_change(
    tmp_path: Path, folder: Path
) -> None:
    docs, page, kept = tmp_path / "docs", tmp_path / "out" / "a.html", tmp_path / "kept"
    readme, results, plots = tmp_path / "README.md", docs / "results.md", docs / "plots"
    docs.mkdir()
    for path in (readme, results):
        path.write_text(DOCUMENT)
    words = ("--html", page, "--plots", plots, "--summaries", kept)
    write_summaries(MANY, folder)
    for _ in range(2):
        result = report(folder, "--update", readme, "--results", results, *words)
        assert result.exit_code == 0, result.exception
        assert result.stdout == ""
        groups = make_groups([full(), sparse(), *MANY])
        expected = results_section(groups, "plots/accuracy.svg")
        assert results.read_text() == DOCUMENT.replace("old", expected)
        assert SECTION.extract(readme.read_text(), "") == proof_section(groups, "docs/results.md")
        assert page.read_text() == make_page(groups)
    assert {path.name for path in plots.iterdir()} == {
        f"{plot.name}.{kind}" for plot in PLOTS for kind in ("svg", "png")
    }
    assert (plots / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert load_summaries(sorted(kept.iterdir())) == load_summaries(sorted(folder.iterdir()))


def test_a_repeated_run_is_named_on_the_terminal_and_on_the_page(
    tmp_path: Path, folder: Path
) -> None:
    write_summaries([TWIN], folder)
    page = tmp_path / "a.html"
    result = report(folder, "--html", page)
    assert result.exit_code == 0, result.exception
    assert "warning: left out:" in result.stderr
    assert "left out: " in page.read_text()
    assert str(tmp_path) not in page.read_text()


def test_plots_that_no_run_has_data_for_are_left_out_and_named(
    tmp_path: Path, folder: Path
) -> None:
    results, plots = tmp_path / "results.md", tmp_path / "plots"
    results.write_text(DOCUMENT)
    result = report(folder, "--plots", plots, "--results", results)
    assert result.stderr.count(": No plots: 9 questions are too few") == 1
    assert "math500, " in result.stderr
    assert not plots.exists()
    assert "accuracy.svg" not in results.read_text()


def test_a_document_without_plots_names_none(tmp_path: Path, folder: Path) -> None:
    results = tmp_path / "results.md"
    results.write_text(DOCUMENT)
    assert report(folder, "--results", results).exit_code == 0
    assert "accuracy.svg" not in results.read_text()


def test_published_names_replace_those_of_folders(tmp_path: Path, folder: Path) -> None:
    assert "math500, a/b: 9 questions" in report(folder, "--name", f"{CODER}=a/b").stdout
    report(folder, "--name", f"{CODER}=a/b", "--summaries", tmp_path / "kept")
    kept = load_summaries(list((tmp_path / "kept").iterdir()))
    assert {summary.conditions["model"] for summary in kept} == {"a/b"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.json"], "cannot read"),
        (["eval", "--html", "plain.md/a.html"], "cannot write"),
        (["eval", "--update", "none.md"], "cannot read none.md (No such file or directory); name"),
        (["eval", "--results", "none.md"], f"that has the lines {SECTION.begin} and"),
        (["eval", "--update", "marked.md"], "marked.md: no run of LessIsMore beside one of full"),
        (["eval", "--name", "coder"], "--name takes FOLDER=MODEL, not coder"),
        (["eval", "--name", "=a/b"], "--name takes FOLDER=MODEL, not =a/b"),
        (["eval", "--name", "a=b", "--name", "a=c"], "--name is given twice for a"),
        (
            ["eval", "--update", "plain.md", "--html", "a.html", "--summaries", "s"],
            "plain.md needs one line <!-- lim report: begin -->",
        ),
    ],
)
def test_a_refusal_writes_nothing(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.md").write_text("no markers")
    Path("marked.md").write_text(DOCUMENT)
    before = sorted(tmp_path.rglob("*"))
    result = report(*words)
    assert isinstance(result.exception, LimError), result.exception
    assert message in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("plain.md").read_text() == "no markers"


def test_the_documents_show_the_figures_of_the_committed_summaries() -> None:
    groups = make_groups(list(COMMITTED.values()))
    results = (ROOT / "docs" / "results.md").read_text()
    assert SECTION.extract(results, "") == results_section(groups, "plots/accuracy.svg")
    readme = (ROOT / "README.md").read_text()
    assert SECTION.extract(readme, "") == proof_section(groups, "docs/results.md")
    models = {str(summary.conditions["model"]) for summary in COMMITTED.values()}
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", model) for model in models)  # names of the hub
    for plot in PLOTS:
        shown = (ROOT / "docs" / "plots" / f"{plot.name}.svg").read_text()
        assert shown == draw_svg(plot, groups), f"write docs/plots/{plot.name}.svg again"
