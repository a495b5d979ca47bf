"""The plot of step times, from recorded rows."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from lim_sglang.bench.plots import draw
from lim_sglang.errors import DataError
from tests.bench.recorded import LINES, line, table


def test_a_panel_per_batch_size_holds_measured_steps_and_byte_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[tuple[list[float], list[float]]] = []
    real = Axes.plot

    def plot(axes: Any, x: Any, y: Any, *arguments: Any, **options: Any) -> Any:
        lines.append((list(x), list(y)))
        return real(axes, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    draw(table(tmp_path, *LINES, line("lim", "4x32k+4x1k")), tmp_path / "plots" / "decode.svg")
    assert (tmp_path / "plots" / "decode.svg").read_text().rstrip().endswith("</svg>")
    # Panels of 1 and of 8 requests: the fastest dense steps, their limit, our steps, their limit.
    assert lines[0::2] == [
        ([32768], [8.4]),
        ([32768], [7.0]),
        ([32768], [19.0]),
        ([1500, 32768], [7.5, 10.0]),
    ]
    # 15 GB of weights, and 8 x 32,768 tokens of 4,096 bytes in 4 layers, or in 2 and 2,048 in 2.
    dense_ms = (15e9 + 8 * 32768 * 4096 * 4) / 3e9
    lim_ms = (15e9 + 8 * 4096 * (32768 * 2 + 2048 * 2)) / 3e9
    assert [y[-1] for _, y in lines[5::2]] == [pytest.approx(dense_ms), pytest.approx(lim_ms)]


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        draw(table(tmp_path, *LINES), path)
    assert paths[0].read_text() == paths[1].read_text()
    assert "qwen3-8b shape, dummy weights, NVIDIA H100 80GB HBM3" in paths[0].read_text()


def test_a_plot_of_mixed_batches_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leave --plot out"):
        draw(table(tmp_path, line("lim", "4x32k+4x1k")), tmp_path / "decode.svg")
