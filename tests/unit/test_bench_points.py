"""What `lim bench` may be asked for."""

import pytest

from lim_sglang.bench.points import (
    DecodeOptions,
    ModelChoice,
    Point,
    Repeats,
    choose_backends,
    choose_points,
)
from lim_sglang.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "batch", "context"),
    [("8x32768", 8, 32768), ("8x32k", 8, 32768), ("1X1K", 1, 1024), (" 16x16k ", 16, 16384)],
)
def test_a_point_is_read_in_tokens_or_in_units_of_1024(text: str, batch: int, context: int) -> None:
    assert Point.parse(text) == Point(batch, context)


@pytest.mark.parametrize(
    "text", ["8", "x32768", "8x", "8*32k", "8x32m", "-1x5", "8x3.5k", "0x5", "5x0"]
)
def test_a_malformed_point_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="point"):
        Point.parse(text)


def test_points_keep_their_order_and_repeats_are_dropped() -> None:
    points = choose_points(["8x32k", "1x32k", "8x32768"], 16, 512)
    assert points == (Point(8, 32768), Point(1, 32768), Point(16, 512))


@pytest.mark.parametrize(("batch", "context"), [(8, None), (None, 5)])
def test_batch_and_context_belong_together(batch: int | None, context: int | None) -> None:
    with pytest.raises(ConfigError, match="both or neither"):
        choose_points(["1x5"], batch, context)


def test_no_point_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one point"):
        choose_points([], None, None)


def test_ours_comes_first_because_the_runner_is_built_with_it() -> None:
    assert choose_backends("flashinfer, lim,fa3,flashinfer") == ("lim", "flashinfer", "fa3")


@pytest.mark.parametrize(
    ("text", "words"), [("flashinfer", "must name lim"), ("lim,fa4,x", "unknown backend fa4, x")]
)
def test_backends_that_cannot_be_compared_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_backends(text)


@pytest.mark.parametrize(("shape", "folder"), [(None, None), ("qwen3-8b", "/models/x")])
def test_one_model_has_to_be_named(shape: str | None, folder: str | None) -> None:
    with pytest.raises(ConfigError, match="either --shape"):
        ModelChoice(shape, folder)


@pytest.mark.parametrize(("windows", "steps"), [(0, 5), (5, 0)])
def test_nothing_is_timed_zero_times(windows: int, steps: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Repeats(windows, steps)


def test_graphs_are_captured_for_the_measured_batches_only() -> None:
    options = DecodeOptions(
        ModelChoice("qwen3-8b", None),
        choose_points(["8x32k", "1x64k", "8x1k"], None, None),
        ("lim",),
        Repeats(),
        2048,
        0.88,
    )
    assert options.batch_sizes == (1, 8)
    assert options.longest == 65536
