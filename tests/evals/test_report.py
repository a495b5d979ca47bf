"""Groups of runs and their names, `lim report`, and the documents that it wrote."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.commands import write_report
from lim_sglang.evals.compare import compare
from lim_sglang.evals.metrics import Summary, load_summaries, read_summary, score, write_summaries
from lim_sglang.evals.plots import PLOTS, draw_svg
from lim_sglang.evals.report import Group, make_groups
from lim_sglang.evals.report_page import make_page
from lim_sglang.evals.tables import SECTION, proof_section, results_section
from tests.evals.summaries import COMMITTED, CONDITIONS, FULL, five_runs, simulated

ROOT = Path(__file__).parents[2]
CODER = CONDITIONS["model"]


def sparse(budget: int = 256, **conditions: Any) -> Summary:
    return simulated(budget=budget, **conditions)


def full(**conditions: Any) -> Summary:
    return simulated(**{**FULL, **conditions})


def group_of(*runs: Summary) -> Group:
    (group,) = make_groups(runs)
    return group


def names(*runs: Summary) -> list[str]:
    return [row.name for row in group_of(*runs).rows]


def test_full_attention_comes_first_then_the_largest_budget() -> None:
    runs = five_runs(12)
    expected = ["full", "LessIsMore 1,024", "LessIsMore 512", "LessIsMore 256", "LessIsMore 128"]
    assert names(*runs) == names(*reversed(runs)) == expected


def test_each_run_is_scored_and_compared_with_full_attention() -> None:
    dense, other = full(), sparse(harm=1.0)
    first, second = group_of(other, dense).rows
    assert (first.summary, first.against_full) == (dense, None)
    assert second.score == score(other)
    assert second.against_full == compare(dense, other, names=("full", "LessIsMore 256"))
    assert [row.against_full for row in group_of(sparse(128), sparse(256)).rows] == [None, None]


def test_tasks_models_questions_and_limits_have_tables_of_their_own() -> None:
    runs = [
        full(),
        sparse(),
        sparse(task="aime24"),
        sparse(model="a/model"),
        sparse(max_tokens=400),
    ]
    found = {group.title: [row.name for row in group.rows] for group in make_groups(runs)}
    assert found == {
        f"aime24, {CODER}": ["LessIsMore 256"],
        f"math500, {CODER}, max tokens 400": ["LessIsMore 256"],
        f"math500, {CODER}, max tokens 2,048": ["full", "LessIsMore 256"],
        "math500, a/model": ["LessIsMore 256"],
    }


def test_other_questions_of_the_same_task_are_never_in_one_table() -> None:
    changed = replace(sparse(), conditions={**sparse().conditions, "questions": "ab" * 32})
    first, second = make_groups([full(), changed])
    assert {first.title[-18:], second.title[-18:]} == {"questions 59695e34", "questions abababab"}
    assert first.rows[0].against_full is second.rows[0].against_full is None


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (
            [sparse(), sparse(ranking="mass"), sparse(program="adaptive")],
            [
                "LessIsMore 256",
                "LessIsMore 256, program adaptive",
                "LessIsMore 256, ranking mass",
            ],
        ),
        (
            [
                sparse(budget, select_layers=n)
                for budget, n in ((256, [2]), (256, [2, 14]), (128, [2]))
            ],
            [
                "LessIsMore 256, select layers [2, 14]",
                "LessIsMore 256, select layers [2]",
                "LessIsMore 128, select layers [2]",
            ],
        ),
        (
            [sparse(seed=None), sparse(seed_honoured=True)],
            ["LessIsMore 256, seed honoured False", "LessIsMore 256, seed honoured True"],
        ),
    ],
    ids=["unusual", "layers", "seed"],
)
def test_rows_are_named_by_what_differs(runs: list[Summary], expected: list[str]) -> None:
    assert names(*runs) == expected


def test_rows_that_differ_in_their_budget_only_are_one_series() -> None:
    rows = group_of(sparse(128), sparse(256), sparse(128, ranking="mass"), full()).rows
    assert [row.series for row in rows] == [
        "full",
        "LessIsMore",
        "LessIsMore",
        "LessIsMore, ranking mass",
    ]


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
    assert row.note
    assert row.note.startswith("6 of 9 questions; 3 samples failed and are not scored; not compa")
    assert "3 are in one run only" in row.note


TWIN = replace(sparse(date="2026-11-26", commit="deadbeef"), run_id="twin")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no run to report; name run folders"),
        (
            [sparse(), full(), TWIN],
            r"256-0 and twin have the same conditions \(LessIsMore 256\): report one of them",
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


@pytest.fixture
def groups() -> tuple[Group, ...]:
    return make_groups([full(), sparse()])


def document(path: Path) -> Path:
    """Write a Markdown file with markers."""
    path.write_text(f"# Title\n\n{SECTION.begin}\nold\n{SECTION.end}\n\nmore | text |\n")
    return path


def test_without_options_the_tables_are_printed(folder: Path, groups: tuple[Group, ...]) -> None:
    result = report(folder)
    assert result.exit_code == 0, result.exception
    assert result.stdout == f"{results_section(groups)}\n"
    assert report(*sorted(folder.iterdir())).stdout == result.stdout


def test_everything_is_written_at_once(
    tmp_path: Path, folder: Path, groups: tuple[Group, ...]
) -> None:
    (tmp_path / "docs").mkdir()
    readme, results = document(tmp_path / "README.md"), document(tmp_path / "docs" / "results.md")
    page, plots, kept = tmp_path / "out" / "a.html", tmp_path / "docs" / "plots", tmp_path / "kept"
    words = ("--html", page, "--plots", plots, "--summaries", kept)
    result = report(folder, "--update", readme, "--results", results, *words)
    assert result.exit_code == 0, result.exception
    assert result.stdout == ""
    expected = results_section(groups, "plots/accuracy.svg")
    assert results.read_text() == (
        f"# Title\n\n{SECTION.begin}\n{expected}\n{SECTION.end}\n\nmore | text |\n"
    )
    assert SECTION.extract(readme.read_text(), "") == proof_section(groups, "docs/results.md")
    assert page.read_text() == make_page(groups)
    assert {path.name for path in plots.iterdir()} == {
        f"{plot.name}.{kind}" for plot in PLOTS for kind in ("svg", "png")
    }
    assert (plots / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert load_summaries(sorted(kept.iterdir())) == load_summaries(sorted(folder.iterdir()))


def test_updating_a_document_twice_changes_nothing(tmp_path: Path, folder: Path) -> None:
    results = document(tmp_path / "results.md")
    assert report(folder, "--results", results).exit_code == 0
    once = results.read_text()
    assert "accuracy.svg" not in once  # no plot was asked for
    assert report(folder, "--results", results).exit_code == 0
    assert results.read_text() == once


def test_published_names_replace_those_of_folders(tmp_path: Path) -> None:
    write_summaries([full(model="coder-1.5b"), sparse(model="coder-1.5b")], tmp_path / "eval")
    name = ("--name", f"coder-1.5b={CODER}")
    result = report(tmp_path / "eval", *name, "--summaries", tmp_path / "kept")
    assert result.exit_code == 0, result.exception
    kept = [read_summary(path) for path in (tmp_path / "kept").iterdir()]
    assert {summary.conditions["model"] for summary in kept} == {CODER}
    assert f"math500, {CODER}: 9 questions" in report(tmp_path / "eval", *name).stdout


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["coder"], "--name takes FOLDER=MODEL, not coder"),
        (["=a/b"], "--name takes FOLDER=MODEL, not =a/b"),
        (["a=b", "a=c"], "--name is given twice for a"),
        (["other=b"], f"--name other: no run has that model; the models are {CODER}"),
    ],
)
def test_names_that_fit_nothing_are_refused(folder: Path, pairs: list[str], message: str) -> None:
    result = report(folder, *(word for pair in pairs for word in ("--name", pair)))
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["empty"], "holds no run and no summary"),
        (["odd.json"], "odd.json is a damaged summary"),
        (["none.json"], "cannot read"),
        (["eval", "eval"], "have the same conditions"),
        (["eval", "--html", "odd.json/a.html"], "cannot write"),
        (["eval", "--update", "none.md"], "none.md cannot be read"),
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
    Path("empty").mkdir()
    Path("odd.json").write_text('{"format": 1}')
    Path("plain.md").write_text("no markers")
    before = sorted(tmp_path.rglob("*"))
    result = report(*words)
    assert isinstance(result.exception, DataError), result.exception
    assert message in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("plain.md").read_text() == "no markers"


def test_the_documents_show_the_figures_of_the_committed_summaries() -> None:
    groups = make_groups(list(COMMITTED.values()))
    results = (ROOT / "docs" / "results.md").read_text()
    assert SECTION.extract(results, "") == results_section(groups, "plots/accuracy.svg")
    readme = (ROOT / "README.md").read_text()
    assert SECTION.extract(readme, "") == proof_section(groups, "docs/results.md")
    for plot in PLOTS:
        shown = (ROOT / "docs" / "plots" / f"{plot.name}.svg").read_text()
        assert shown == draw_svg(plot, groups), f"write docs/plots/{plot.name}.svg again"


def test_published_models_have_their_hub_names() -> None:
    for summary in COMMITTED.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", str(summary.conditions["model"]))
