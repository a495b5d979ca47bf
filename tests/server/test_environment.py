"""Commit and versions of the code that made a number, with and without a git checkout."""

from pathlib import Path

import pytest

import lim_sglang
from lim_sglang.config import COMMIT_VAR
from lim_sglang.environment import driver_version, installed_versions, project_commit


def test_a_checkout_knows_its_commit_but_a_named_one_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = project_commit()
    assert commit is None or len(commit.split("+")[0]) == 40
    monkeypatch.setenv(COMMIT_VAR, "c0ffee")
    assert project_commit() == "c0ffee"


@pytest.mark.parametrize(("named", "expected"), [("c0ffee", "c0ffee"), ("", None)])
def test_a_copy_without_git_takes_its_commit_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str, expected: str | None
) -> None:
    monkeypatch.setattr(lim_sglang, "__file__", str(tmp_path / "lim_sglang" / "__init__.py"))
    monkeypatch.setenv(COMMIT_VAR, named)
    assert project_commit() == expected


def test_missing_packages_and_drivers_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert installed_versions(["no-such-package"])["no-such-package"] is None
    assert driver_version() is None
