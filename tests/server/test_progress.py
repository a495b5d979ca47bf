"""Progress: a bar on a terminal, a line now and then elsewhere."""

import io

import pytest
from rich.console import Console

from lim_sglang.progress import show_progress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_log_gets_a_line_at_the_start_every_ten_seconds_and_at_the_end() -> None:
    clock, text = Clock(), io.StringIO()
    with show_progress(Console(file=text), 4, "0 of 4 [red]", clock=clock) as update:
        for done in range(1, 5):
            clock.now_s += 6
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
