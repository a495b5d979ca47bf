"""Progress: a bar on a terminal, a line now and then elsewhere."""

import io
import math
import random
import threading
from statistics import median

import pytest
from rich.console import Console

from lim_sglang import progress
from lim_sglang.progress import (
    duration,
    plain_console,
    print_plain,
    rate,
    seconds_left,
    show_progress,
    time_left,
)
from tests.builders import Screen


def test_a_log_gets_a_line_at_the_start_every_ten_seconds_and_at_the_end() -> None:
    now_s, text = [100.0], io.StringIO()
    with show_progress(Console(file=text), 4, "0 of 4 [red]", clock=lambda: now_s[0]) as update:
        for done in range(1, 5):
            now_s[0] += 6
            update(done, f"{done} of 4")
    assert text.getvalue().splitlines() == [
        "0 of 4 [red]",
        "2 of 4; after 12 s",
        "4 of 4; after 24 s",
    ]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_display_goes_on_while_no_work_is_completed(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.02)
    monkeypatch.setattr(progress, "REDRAW_INTERVAL_S", 0.02)
    console = Console(file=io.StringIO(), width=100, force_terminal=is_terminal)
    asked = threading.Semaphore(0)

    def refresh() -> str:
        asked.release()
        return "3 running"

    with show_progress(console, 4, "0 of 4", refresh=refresh):
        assert all(asked.acquire(timeout=10) for _ in range(4))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("3 running" in text) if is_terminal else text.count("3 running; after 0 s\n") > 1


@pytest.mark.parametrize(
    ("amount", "expected"), [(0, "0.0"), (1, "0.1"), (99, "9.9"), (99.6, "10"), (12_345, "1,234")]
)
def test_a_rate_has_a_decimal_below_ten(amount: float, expected: str) -> None:
    assert rate(amount, 10) == expected


@pytest.mark.parametrize(
    ("ended_s", "running_s", "num_waiting", "limit_s", "expected"),
    [
        ([], [], 0, math.inf, 0.0),
        ([], [4.0, 3.0], 0, 10.0, 7.0),
        ([], [4.0, 3.0], 4, 10.0, 27.0),
        ([], [4.0], 0, math.inf, math.inf),
        ([10.0], [], 3, 6.0, 18.0),
        # Mean square 9 + 16: one more mean square for the last job.
        ([3.0], [4.0], 0, math.inf, math.sqrt(16 + 25) - 4),
        ([3.0], [4.0], 0, 5.0, 1.0),
        ([3.0], [9.0], 0, 5.0, 0.0),
        ([3.0], [4.0], 2, math.inf, 2 * math.sqrt(math.pi / 4 * 25) + math.sqrt(16 + 25) - 4),
    ],
)
def test_the_time_left_follows_from_ended_running_and_waiting_jobs(
    ended_s: list[float],
    running_s: list[float],
    num_waiting: int,
    limit_s: float,
    expected: float,
) -> None:
    assert seconds_left(ended_s, running_s, num_waiting, limit_s) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ended_s", "running_s", "num_tokens", "max_tokens", "shown"),
    [
        ([], [], 0, 100, None),
        ([], [20.0, 20.0], 0, 100, None),
        ([], [4.0, 4.0], 4000, 8000, None),
        ([], [20.0, 20.0], 60, 1000, None),
        ([], [20.0, 20.0], 80, math.inf, None),
        ([], [20.0, 20.0], 80, 1000, ("at most", "8m00s", "--max-tokens")),
        ([10.0], [10.0], 5, 1000, ("about", "7 s")),
        ([10.0], [10.0], 200, math.inf, ("about", "7 s")),
        ([10.0], [10.0], 200, 120, ("about", "2 s")),
        ([10.0] * 7, [15.0], 200, 300, ("about", "4 s")),
        ([10.0] * 7, [30.0], 200, 300, ("at most", "2m00s", "--max-tokens")),
        ([10.0] * 7, [60.0], 200, 300, ("at most", "2m15s", "--max-tokens")),
        ([10.0] * 7, [60.0], 200, math.inf, None),
        ([10.0] * 7, [60.0], 0, 300, None),
    ],
)
def test_the_time_left_is_told_once_it_is_known_and_a_bound_is_called_one(
    ended_s: list[float],
    running_s: list[float],
    num_tokens: int,
    max_tokens: float,
    shown: tuple[str, ...] | None,
) -> None:
    spent_s = sum(ended_s) + sum(running_s)
    text = time_left(
        ended_s, running_s, 0, num_tokens=num_tokens, spent_s=spent_s, max_tokens=max_tokens
    )
    assert bool(text) == bool(shown)
    assert all(word in text for word in shown or ())


def test_a_sample_that_runs_to_the_limit_leaves_the_bound_steady() -> None:
    """One of eight samples runs to the limit of 150 s, the others end at about 10 s."""
    durations, limit_s, tokens_per_s = [7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 150.0], 150.0, 20.0
    shown = []
    for now_s in range(5, 150):
        ended = [each for each in durations if each <= now_s]
        running = [float(now_s)] * (len(durations) - len(ended))
        spent_s = sum(ended) + sum(running)
        limits = {"num_tokens": spent_s * tokens_per_s, "max_tokens": limit_s * tokens_per_s}
        shown.append(time_left(ended, running, 0, spent_s=spent_s, **limits))
    for now_s, text in enumerate(shown, start=5):
        assert f"at most {duration(limit_s - now_s)}" in text
    assert all("about" in text for text in shown[2:15])
    assert not any("about" in text for text in shown[25:])


@pytest.mark.parametrize("num_waiting", [0, 60])
def test_the_time_left_is_right_within_a_factor_for_lengths_like_those_of_answers(
    num_waiting: int,
) -> None:
    """Twelve jobs side by side; the estimate after the first, the third and half of all ends."""
    rng = random.Random(7)
    ratios: dict[int, list[float]] = {}
    for _ in range(200):
        durations = [rng.lognormvariate(3.0, 0.5) for _ in range(12 + num_waiting)]
        begins, ends = [], []
        for duration_s in durations:
            begins.append(sorted(ends)[len(ends) - 12] if len(ends) >= 12 else 0.0)
            ends.append(begins[-1] + duration_s)
        for num_ended in (1, 3, len(durations) // 2):
            now_s = sorted(ends)[num_ended - 1]
            ended = [d for d, end in zip(durations, ends, strict=True) if end <= now_s]
            running = [
                now_s - begin
                for begin, end in zip(begins, ends, strict=True)
                if begin <= now_s < end
            ]
            waiting = len(durations) - len(ended) - len(running)
            estimate_s = seconds_left(ended, running, waiting)
            ratios.setdefault(num_ended, []).append(estimate_s / (max(ends) - now_s))
    for found in ratios.values():
        assert 0.7 < median(found) < 1.5
        assert sum(0.4 < ratio < 2.5 for ratio in found) > 0.8 * len(found)


def test_a_bar_on_a_narrow_terminal_shows_the_whole_time_and_the_whole_text() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    text = "file:own: 3/12 samples, 66.7 % right, 4 samples running, 31 tokens/s, about 1m05s left"
    with show_progress(console, 12, text) as update:
        update(3, text)
    screen = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in screen for word in ["0:00:00", "25%", *text.split()])


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
    assert text.getvalue().splitlines() == ["0", "1; after 0 s", "nothing to do"]


def test_a_terminal_gets_a_bar_with_the_newest_text() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with show_progress(console, 4, "start", completed=1) as update:
        update(2, "half [way]")
    shown = text.getvalue()
    assert "50%" in shown
    assert "half [way]" in shown


NAME = "[red]a[/red] :smile: https://b"


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print(NAME)
    plain_console(stderr=True).print(NAME)
    print_plain(printed := Console(file=io.StringIO(), width=10), NAME)
    assert capsys.readouterr() == (f"{NAME}\n", f"{NAME}\n")
    assert printed.file.getvalue() == f"{NAME}\n"  # type: ignore[attr-defined]


PATH = "/a/long/folder/of/runs/samples.jsonl"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("short", "short"),
        ("exactly twenty chars", "exactly twenty chars"),
        ("one word more than twenty", "one word more than\ntwenty"),
        ("two lines,\n  of which one is indented", "two lines,\n  of which one is\n  indented"),
        ("ok  a name before the text", "ok  a name before\n    the text"),
        ("  - an entry of a list", "  - an entry of a\n    list"),
        (f"samples in {PATH}, whole", f"samples in\n{PATH},\nwhole"),
        ("a name that leaves  no room", "a name that leaves \nno room"),
        ("数学数学 数学数学 数学", "数学数学 数学数学\n数学"),
    ],
)
def test_a_terminal_breaks_lines_at_spaces_and_other_files_have_them_whole(
    text: str, shown: str
) -> None:
    files = {"wrapped": Screen(), "whole": Screen(), "file": io.StringIO()}
    for name, file in files.items():
        print_plain(Console(file=file, width=20, color_system=None), text, whole=name == "whole")
    assert files["wrapped"].getvalue() == f"{shown}\n"
    assert files["whole"].getvalue() == files["file"].getvalue() == f"{text}\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_shows_names_as_they_are(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=is_terminal)
    with show_progress(console, 2, NAME) as show:
        show(1, f"{NAME}!")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert NAME in text
    assert f"{NAME}!" in text
