"""The short form of `eval_kills.py`."""

from pathlib import Path

from tests.forked_commands import Forker
from tests.soak.eval_kills import Soak


def test_a_run_whose_command_and_server_are_killed_loses_and_doubles_nothing(
    forker: Forker, tmp_path: Path
) -> None:
    report = Soak(forker, tmp_path, seed=3).run(command_kills=3, server_kills=1)
    assert (report.command_kills, report.server_kills) == (3, 1)
    assert report.is_clean, report
    # Killed before the end, with samples stored: otherwise nothing was shown.
    assert 0 < report.samples_after[-1] < report.samples == 80
