"""`lim report` from the command line: what it reads, what it writes, what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.commands import read_runs, write_report
from lim_sglang.evals.metrics import Summary, read_summary, write_summary
from lim_sglang.evals.plots import PLOTS
from lim_sglang.evals.report import make_groups
from lim_sglang.evals.report_page import make_page
from lim_sglang.evals.run_store import GradedSample, RunRecord, open_run
from lim_sglang.evals.tables import METHOD, PART, STOPPING, TIMES, make_section
from tests.builders import make_sample
from tests.evals.made_summaries import FULL, made
from tests.evals.test_summary import RECORD

BEFORE, AFTER = "# Title\n\ntext\n\n", "\n\nmore | text |\n"
CODER = "Qwen/Qwen2.5-Coder-1.5B-Instruct"


def report(*words: Any) -> Any:
    """What the command does."""
    app = typer.Typer()
    app.command()(write_report)
    return CliRunner().invoke(app, list(map(str, words)))


def two_runs(**changed: Any) -> list[Summary]:
    return [made(questions=9, **FULL | changed), made(questions=9, **changed)]


def stored(folder: Path, *summaries: Summary) -> Path:
    """A folder of summaries."""
    for summary in summaries:
        write_summary(summary, folder / f"{summary.run_id}.json")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stored(tmp_path / "eval", *two_runs())


def test_without_options_the_tables_are_printed(folder: Path) -> None:
    done = report(folder)
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"{make_section(make_groups(two_runs()))}\n"


def test_files_and_a_folder_of_files_are_the_same(folder: Path) -> None:
    files = sorted(folder.iterdir())
    assert read_runs(files) == read_runs([folder])
    assert {summary.run_id for summary in read_runs([folder])} == {r.run_id for r in two_runs()}


def test_a_run_s_folder_is_read_and_so_is_a_folder_of_runs(tmp_path: Path) -> None:
    settings = {**RECORD.settings, "task": "math500"}
    one, runs = tmp_path / "one", tmp_path / "runs"
    for path in (one, runs / "two"):
        with open_run(path, RunRecord(path.name, settings, RECORD.about)) as opened:
            opened.append(GradedSample("q", "4", True, make_sample(0, "4")))
            opened.append(GradedSample("q", "4", False, make_sample(1, "5")))
    (runs / "notes.txt").write_text("no run")
    found = read_runs([runs, one])
    assert [summary.run_id for summary in found] == ["two", "one"]
    assert [question.correct for question in found[0].questions] == [(True, False)]


def test_everything_is_written_at_once(tmp_path: Path, folder: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEFORE}{PART.begin}\nold\n{PART.end}{AFTER}")
    page, plots, kept = tmp_path / "out" / "a.html", tmp_path / "docs" / "eval", tmp_path / "kept"
    done = report(
        *(folder, "--html", page, "--plots", plots, "--update", readme, "--summaries", kept)
    )
    assert done.exit_code == 0, done.exception
    groups = make_groups(two_runs())
    section = make_section(groups, "docs/eval/accuracy.svg")
    assert readme.read_text() == f"{BEFORE}{PART.begin}\n{section}\n{PART.end}{AFTER}"
    assert page.read_text() == make_page(groups)
    assert sorted(path.name for path in plots.iterdir()) == sorted(
        f"{plot.name}.{kind}" for plot in PLOTS for kind in ("svg", "png")
    )
    assert (plots / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert [read_summary(path) for path in sorted(kept.iterdir())] == read_runs([folder])
    assert done.stdout == ""


def test_updating_twice_changes_nothing(tmp_path: Path, folder: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{PART.begin}\n{PART.end}")
    assert report(folder, "--update", readme).exit_code == 0
    once = readme.read_text()
    assert report(folder, "--update", readme).exit_code == 0
    assert readme.read_text() == once
    assert "accuracy.svg" not in once  # no plot was asked for


def test_published_names_take_the_place_of_folders(tmp_path: Path) -> None:
    folder = stored(tmp_path / "eval", *two_runs(model="coder-1.5b"))
    done = report(folder, "--name", f"coder-1.5b={CODER}", "--summaries", tmp_path / "kept")
    assert done.exit_code == 0, done.exception
    kept = read_runs([tmp_path / "kept"])
    assert {summary.conditions["model"] for summary in kept} == {CODER}
    assert [summary.questions for summary in kept] == [s.questions for s in read_runs([folder])]
    assert (
        f"math500, {CODER}: 9 questions" in report(folder, "--name", f"coder-1.5b={CODER}").stdout
    )


def test_a_name_from_a_file_stays_in_the_folder(tmp_path: Path) -> None:
    sly = replace(made(questions=9), run_id="../../sly/run")
    write_summary(sly, tmp_path / "in.json")
    done = report(tmp_path / "in.json", "--summaries", tmp_path / "deep" / "kept")
    assert done.exit_code == 0, done.exception
    (kept,) = (tmp_path / "deep" / "kept").iterdir()
    assert kept.name == "-..-sly-run.json"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["coder"], "--name takes FOLDER=MODEL, not coder"),
        (["=a/b"], "--name takes FOLDER=MODEL, not =a/b"),
        (["a=b", "a=c"], "--name is given twice for a"),
        (["other=b"], f"--name other: no run is of that model; they are of {CODER}"),
    ],
)
def test_names_that_fit_nothing_are_refused(folder: Path, words: list[str], expected: str) -> None:
    done = report(folder, *(part for word in words for part in ("--name", word)))
    assert isinstance(done.exception, ConfigError)
    assert expected in str(done.exception)


def test_what_is_no_run_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").write_text('{"format": 1}')
    for path, words in (
        (tmp_path / "empty", "holds no run and no summary; name a run's folder, a file"),
        (tmp_path / "odd.json", "odd.json is a damaged summary"),
        (tmp_path / "none.json", f"cannot read {tmp_path / 'none.json'}"),
    ):
        done = report(path)
        assert isinstance(done.exception, DataError), done.exception
        assert words in str(done.exception)


def test_a_run_that_is_given_twice_is_refused(folder: Path) -> None:
    done = report(folder, folder)
    assert isinstance(done.exception, DataError)
    assert "are of the same conditions" in str(done.exception)


def test_a_refusal_writes_nothing(tmp_path: Path, folder: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    before = sorted(tmp_path.rglob("*"))
    options = ("--html", tmp_path / "a.html", "--plots", tmp_path / "p", "--summaries", tmp_path)
    done = report(folder, "--update", readme, *options)
    assert isinstance(done.exception, DataError)
    assert "needs one line <!-- lim report: begin -->" in str(done.exception)
    assert sorted(tmp_path.rglob("*")) == before
    assert readme.read_text() == "no markers"


def test_what_cannot_be_written_or_read_is_named(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("")
    done = report(folder, "--html", tmp_path / "file" / "a.html")
    assert isinstance(done.exception, DataError)
    assert f"cannot write {tmp_path / 'file' / 'a.html'} (" in str(done.exception)
    done = report(folder, "--update", tmp_path / "none.md")
    assert isinstance(done.exception, DataError)
    assert "none.md cannot be read" in str(done.exception)


def test_conditions_stand_under_the_table() -> None:
    runs = [
        made(questions=9, **FULL),
        made(questions=9, commit="c0ffee0123456789+d61e43b333", date="2026-11-26"),
    ]
    _, below, method = make_section(make_groups(runs)).split("\n\n")
    assert below == (
        f"math500, {CODER}: 9 questions {TIMES} 4 samples, at most 2,048 new tokens, "
        "temperature 0.6, top_p 0.95, top_k 20; NVIDIA H100 80GB HBM3, SGLang 0.5.16, "
        "torch 2.11.0, Math-Verify 0.9.0. By `lim eval` on 2026-11-25 and 2026-11-26, commit "
        "c0ffee0123 and c0ffee0123 with local edits d61e43b333."
    )
    assert "standard error, clustered by question" in method
    assert "95 % intervals" in method


def test_what_is_unknown_or_missing_is_said() -> None:
    run = replace(made(questions=9, device_name=None, commit=None, versions={}), num_failed=2)
    section = make_section(make_groups([run]))
    assert "; unknown device name. By `lim eval` on 2026-11-25, commit unknown. " in section
    assert " LessIsMore 256: 2 samples failed and are not scored.\n" in section


def test_programs_that_stop_by_themselves_are_explained_where_there_are_any() -> None:
    assert STOPPING not in make_section(make_groups(two_runs()))
    runs = [*two_runs(), made(questions=9, program="adaptive")]
    assert make_section(make_groups(runs)).endswith(f"{METHOD} {STOPPING}")


def test_several_tables_have_their_conditions_each() -> None:
    section = make_section(make_groups([*two_runs(), *two_runs(task="aime24")]), "a.svg")
    parts = section.split("\n\n")
    assert [part.split(",")[0] for part in parts[1:4:2]] == ["aime24", "math500"]
    assert len(parts) == 6
    assert parts[-1] == "![Accuracy against budget](a.svg)"
