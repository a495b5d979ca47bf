"""What a benchmark says of itself while it runs."""

import io

from rich.console import Console

from lim_sglang.bench.progress import LINE_INTERVAL_S, bar, lines


def test_a_log_is_told_now_and_then_how_far_it_is() -> None:
    now_s = [0.0]
    file = io.StringIO()
    progress = lines(Console(file=file), clock=lambda: now_s[0])
    progress.doing("Starting")
    for _ in range(30):
        now_s[0] += 1.0
        progress.advancing(now_s[0] / 30, "5 tokens/s [fast]")
    shown = file.getvalue().splitlines()
    assert shown[0] == "   0.0 s  Starting"
    assert shown[1:] == [
        f"  {at:.1f} s  {100 * at / 30:.0f} %, 5 tokens/s [fast]"
        for at in (LINE_INTERVAL_S, 2 * LINE_INTERVAL_S, 3 * LINE_INTERVAL_S)
    ]


def test_a_terminal_shows_a_bar() -> None:
    file = io.StringIO()
    Console(width=100, file=file).print(bar(0.4, "5 tokens/s"))
    assert "40 % 5 tokens/s" in file.getvalue()
