"""`lim sweep` as a command line: what it refuses, and what it plans."""

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lim_sglang.errors import ConfigError
from lim_sglang.evals.commands import read_pairs
from lim_sglang.evals.run_config import Method
from lim_sglang.evals.sweep import SweepRun, SweepServer
from lim_sglang.evals.sweep_command import describe_plan, grouped, report_names, sweep
from lim_sglang.evals.sweeping import Standing


def lim_sweep(*words: str) -> Any:
    """Call the command as the command line does; an error comes through."""
    app = typer.Typer()
    app.command()(sweep)
    found = CliRunner().invoke(app, words)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def standing(model: str, task: str, budget: int | None = None, path: str | None = None) -> Standing:
    lim = {"policy": "lessismore", "budget": budget} if budget else {"policy": "full"}
    run = SweepRun(SweepServer(model, path or model, lim), task, Method(4), {})
    return Standing(run, Path("runs") / run.folder, None, None)


def test_a_plan_needs_no_server_and_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIM_CONFIG", raising=False)
    found = lim_sweep("tiny", "--dry-run", "--data-dir", str(tmp_path), "--out", str(tmp_path))
    assert found.exit_code == 0
    assert "warning: cannot read" in found.stderr
    assert found.stdout.endswith("2 runs: 0 complete, 0 begun, 2 missing; 2 servers to start\n")
    assert list(tmp_path.iterdir()) == []


def test_settings_of_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIM_CONFIG", '{"ranking": "mass"}')
    with pytest.raises(ConfigError, match="LIM_CONFIG is set, and would change"):
        lim_sweep("tiny", "--dry-run")


def test_folders_are_given_by_the_names_of_their_models() -> None:
    given = ["Org/One=/models/one=1", "two=here"]
    assert read_pairs("--model", "NAME=FOLDER", given) == {
        "Org/One": "/models/one=1",
        "two": "here",
    }


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["Org/One"], "--model takes NAME=FOLDER, not Org/One"),
        (["Org/One="], "takes NAME=FOLDER, not Org/One="),
        (["=here"], "takes NAME=FOLDER, not =here"),
        (["a=here", "a=there"], "given twice for a"),
    ],
)
def test_other_forms_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_pairs("--model", "NAME=FOLDER", texts)


def test_runs_worth_comparing_come_together_with_the_dense_one_first() -> None:
    standings = [
        standing("a", "aime24", 64),
        standing("a", "math500", 64),
        standing("a", "aime24"),
        standing("a", "aime24", 128),
        standing("b", "aime24"),
    ]
    a_64, math, a_full, a_128, b_full = standings
    assert grouped(standings) == [[a_full, a_64, a_128], [math], [b_full]]


def test_a_plan_counts_servers_that_are_still_needed() -> None:
    standings = [standing("a", "aime24"), standing("a", "math500"), standing("a", "aime24", 64)]
    assert describe_plan(standings) == "3 runs: 0 complete, 0 begun, 3 missing; 2 servers to start"


def test_a_report_is_told_names_that_folders_do_not_have() -> None:
    runs = [
        standing("Org/One", "aime24", path="/models/one-hf").run,
        standing("Org/One", "aime24", 64, path="/models/one-hf").run,
        standing("Org/Two", "aime24").run,
        standing("three", "aime24", path="/models/three/").run,
    ]
    assert report_names(runs) == ["one-hf=Org/One"]
