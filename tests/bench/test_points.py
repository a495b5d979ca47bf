"""What `lim bench` may be asked for."""

import pytest

from lim_sglang.bench.points import (
    CACHE_DTYPES,
    DecodeOptions,
    ModelChoice,
    Point,
    Precision,
    Repeats,
    choose_backends,
    choose_points,
)
from lim_sglang.errors import ConfigError
from lim_sglang.validation import KV_CACHE_DTYPES


@pytest.mark.parametrize(
    ("text", "batch", "context"),
    [("8x32768", 8, 32768), ("8x32k", 8, 32768), ("1X1K", 1, 1024), (" 16x16k ", 16, 16384)],
)
def test_a_point_is_read_in_tokens_or_in_units_of_1024(text: str, batch: int, context: int) -> None:
    assert Point.parse(text) == Point.uniform(batch, context)


@pytest.mark.parametrize(
    "text",
    [
        "8",
        "x32768",
        "8x",
        "8*32k",
        "8x32m",
        "-1x5",
        "8x3.5k",
        "0x5",
        "5x0",
        "",
        "4x1k+",
        "4x1k+0x5",
    ],
)
def test_a_malformed_point_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="point"):
        Point.parse(text)


def test_a_mixed_batch_has_the_lengths_of_its_groups_in_order() -> None:
    point = Point.parse("2x1k + 3x5")
    assert point.lengths == (1024, 1024, 5, 5, 5)
    assert (point.batch, point.longest, point.num_tokens) == (5, 1024, 2 * 1024 + 3 * 5)
    assert point.groups == ((2, 1024), (3, 5))
    assert point.is_mixed
    assert str(point) == "2x1024+3x5"
    assert Point.parse(str(point)) == point


def test_groups_of_one_length_are_one_group() -> None:
    point = Point.parse("2x5+1x5")
    assert point == Point.uniform(3, 5)
    assert (str(point), point.is_mixed) == ("3x5", False)


def test_rows_over_the_budget_are_those_that_are_sparse() -> None:
    assert Point((9, 8, 7, 9)).rows_over(8) == (0, 3)
    assert Point((8, 8)).rows_over(8) == ()


@pytest.mark.parametrize("lengths", [(), (5, 0)])
def test_a_batch_without_requests_or_tokens_is_no_point(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least 1 token each"):
        Point(lengths)


def test_points_keep_their_order_and_repeats_are_dropped() -> None:
    points = choose_points(["8x32k", "1x32k", "8x32768"], 16, 512)
    assert points == (Point.uniform(8, 32768), Point.uniform(1, 32768), Point.uniform(16, 512))


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
        choose_points(["8x32k", "1x64k", "4x1k+4x9"], None, None),
        ("lim",),
        Repeats(),
        2048,
        0.88,
    )
    assert options.batch_sizes == (1, 8)
    assert options.longest == 65536


def test_every_kv_cache_that_is_measured_is_served() -> None:
    assert set(CACHE_DTYPES) <= set(KV_CACHE_DTYPES)


def test_what_is_not_asked_for_is_left_to_sglang() -> None:
    assert Precision().server_args == {"kv_cache_dtype": "auto", "quantization": None}
    assert Precision().describe("qwen3-8b") == "qwen3-8b"
    eight_bits = Precision("fp8_e4m3", "fp8")
    assert eight_bits.server_args == {"kv_cache_dtype": "fp8_e4m3", "quantization": "fp8"}
    assert eight_bits.describe("qwen3-8b") == "qwen3-8b, weights fp8, KV cache fp8_e4m3"


def test_unknown_formats_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Precision("nvfp4", "awq")
    assert "--kv-cache-dtype nvfp4 is not measured: use auto, fp8_e4m3" in str(caught.value)
    assert "--quantization awq is not measured: use none, fp8" in str(caught.value)


def test_a_backend_that_sglang_would_replace_is_refused() -> None:
    e5m2 = Precision("fp8_e5m2")
    with pytest.raises(ConfigError, match="--backends fa3: FlashAttention 3 reads no KV cache"):
        e5m2.check_backends(("lim", "fa3"))
    e5m2.check_backends(("lim", "flashinfer", "triton"))
    Precision("fp8_e4m3").check_backends(("lim", "fa3"))
    with pytest.raises(ConfigError, match="--backends fa3"):
        DecodeOptions(
            ModelChoice("qwen3-8b", None),
            (Point.uniform(1, 5),),
            ("lim", "fa3"),
            Repeats(),
            2048,
            0.88,
            e5m2,
        )
