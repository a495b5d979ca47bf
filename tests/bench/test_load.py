"""What `lim bench serve` may be asked for, and what it makes of it."""

from itertools import pairwise

import pytest

from lim_sglang.bench.load import (
    KV_SHARE,
    SPARE_TOKENS,
    WARM_TOKENS,
    Load,
    ServeOptions,
    choose_loads,
    choose_policies,
)
from lim_sglang.bench.points import ModelChoice
from lim_sglang.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"concurrency": 0}, "at least 1, not 0, 200, 1"),
        ({"prompt_tokens": 0}, "--prompt-tokens"),
        ({"stream_interval": 0}, "--stream-interval"),
        ({"new_tokens": 1}, "at least 2, not 1: prefill gives the first"),
    ],
)
def test_a_load_without_work_is_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Load(**({"concurrency": 4} | fields))  # type: ignore[arg-type]


def test_a_load_knows_what_it_fills() -> None:
    load = Load(concurrency=64, prompt_tokens=200, new_tokens=8192)
    assert (load.context, load.num_tokens) == (8392, 64 * 8392)


STEPS = 50
NEEDED = WARM_TOKENS + SPARE_TOKENS + STEPS


def test_half_way_a_request_has_half_of_its_new_tokens_in_its_prompt() -> None:
    load = Load(concurrency=64, prompt_tokens=200, new_tokens=8192, limit_s=60.0, stream_interval=8)
    half_way = load.half_way(STEPS)
    assert (half_way.prompt_tokens, half_way.new_tokens) == (200 + 4096, NEEDED)
    assert (half_way.concurrency, half_way.stream_interval, half_way.limit_s) == (64, 8, None)
    assert load.half_way(STEPS, 10**6) == half_way


def test_half_way_a_short_request_is_no_longer_than_it_was() -> None:
    half_way = Load(concurrency=1, prompt_tokens=10, new_tokens=NEEDED).half_way(STEPS)
    assert (half_way.prompt_tokens, half_way.new_tokens) == (10, NEEDED)


def test_half_way_all_requests_fit_into_the_kv_cache() -> None:
    half_way = Load(concurrency=100, new_tokens=8192).half_way(STEPS, 200_000)
    assert half_way.num_tokens <= KV_SHARE * 200_000 < half_way.num_tokens + 100


@pytest.mark.parametrize(
    ("load", "kv_capacity", "words"),
    [
        (Load(1, 10, NEEDED - 10), None, rf"more than {NEEDED} tokens, .* give {NEEDED}: use more"),
        (Load(200), 100_000, f"100,000 tokens has no room for 200 requests of {NEEDED} tokens"),
    ],
)
def test_requests_that_cannot_be_profiled_are_refused(
    load: Load, kv_capacity: int | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load.half_way(STEPS, kv_capacity)


def test_no_two_prompts_share_a_prefix_and_the_seed_gives_them_again() -> None:
    prompts = Load(concurrency=50, prompt_tokens=9).prompts(60)
    assert [len(prompt) for prompt in prompts] == [9] * 50
    assert len({prompt[0] for prompt in prompts}) == 50
    assert all(0 <= token < 60 for prompt in prompts for token in prompt)
    assert Load(concurrency=50, prompt_tokens=9).prompts(60) == prompts
    assert Load(concurrency=50, prompt_tokens=9, seed=1).prompts(60) != prompts


def test_more_requests_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model has 3 tokens"):
        Load(concurrency=4).prompts(3)


def test_each_concurrency_is_measured_once_in_order() -> None:
    loads = choose_loads([64, 8, 64], prompt_tokens=7)
    assert [load.concurrency for load in loads] == [64, 8]
    assert {load.prompt_tokens for load in loads} == {7}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lim,flashinfer", ("flashinfer", "lim")),
        ("fa3, lim, flashinfer,fa3", ("fa3", "flashinfer", "lim")),
        ("lim", ("lim",)),
        ("triton", ("triton",)),
    ],
)
def test_ours_comes_last_because_it_is_compared(text: str, expected: tuple[str, ...]) -> None:
    assert choose_policies(text) == expected


@pytest.mark.parametrize(("text", "words"), [("lim,fa4", "unknown backend fa4"), (",", "nothing")])
def test_unknown_policies_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_policies(text)


def options(model: ModelChoice, **fields: object) -> ServeOptions:
    """Two loads, both policies."""
    loads = choose_loads([8, 64], new_tokens=100)
    return ServeOptions(model, loads, ("flashinfer", "lim"), 2048, 0.88, **fields)  # type: ignore[arg-type]


def test_all_servers_get_the_same_options_and_the_user_s_last() -> None:
    words = options(
        ModelChoice("qwen3-8b", None), sglang_options=("--kv-cache-dtype", "fp8_e5m2")
    ).server_options
    pairs = dict(pairwise(words))
    assert pairs["--load-format"] == "dummy"
    assert pairs["--cuda-graph-max-bs-decode"] == "64"
    assert pairs["--max-running-requests"] == "65"  # with 64, one of 64 requests waited
    assert pairs["--mem-fraction-static"] == "0.88"
    # Without it, each event of a stream repeats all tokens before it.
    assert {"--skip-tokenizer-init", "--incremental-streaming-output"} <= set(words)
    assert words[-2:] == ("--kv-cache-dtype", "fp8_e5m2")


def test_real_weights_are_loaded_and_a_log_is_shown_whole() -> None:
    words = options(ModelChoice(None, "/models/x"), verbose=True).server_options
    assert "--load-format" not in words
    assert "--log-level" not in words


def test_only_our_server_gets_our_flags() -> None:
    chosen = options(ModelChoice("qwen3-8b", None))
    assert chosen.lim_flags("lim") == ("--lim-budget=2048",)
    assert chosen.lim_flags("flashinfer") == ()
    assert (chosen.context, chosen.most_requests) == (300, 64)
