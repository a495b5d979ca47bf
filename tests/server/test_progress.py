"""Progress: a bar on a terminal, a line now and then elsewhere."""

import io

import pytest
from rich.console import Console

from lim_sglang.progress import show_progress


def test_a_log_gets_a_line_at_the_start_every_ten_seconds_and_at_the_end() -> None:
    now_s, text = [100.0], io.StringIO()
    with show_progress(Console(file=text), 4, "0 of 4 [red]", clock=lambda: now_s[0]) as update:
        for done in range(1, 5):
            now_s[0] += 6
            update(done, f"{done} of 4")
    assert text.getvalue().splitlines() == ["0 of 4 [red]", "2 of 4", "4 of 4"]


def test_a_log_gets_its_last_line_also_after_an_error_and_no_line_twice() -> None:
    text = io.StringIO()

    def fail() -> None:
        with show_progress(Console(file=text), 4, "0") as update:
            update(1, "1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with show_progress(Console(file=text), 4, "nothing to do"):
        pass
    assert text.getvalue().splitlines() == ["0", "1", "nothing to do"]


def test_a_terminal_gets_a_bar_with_the_newest_text() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with show_progress(console, 4, "start", completed=1) as update:
        update(2, "half [way]")
    shown = text.getvalue()
    assert "50%" in shown
    assert "half [way]" in shown
