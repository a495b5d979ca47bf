"""The `--lim-*` flags on a parser."""

import argparse

import pytest

from lim_sglang.flags import add_flags, given_flags, given_settings, reasons_against_settings


def parse(*words: str) -> argparse.Namespace:
    """Read a command line that has our flags alone."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(words)


def test_nothing_given_sets_nothing() -> None:
    assert given_settings(parse()) == {}
    assert given_flags(parse()) == []


@pytest.mark.parametrize(
    ("flag", "text", "setting"),
    [
        ("--lim-policy", "full", {"policy": "full"}),
        ("--lim-budget", "256", {"budget": 256}),
        ("--lim-select-layers", "2,12", {"select_layers": (2, 12)}),
        ("--lim-select-layers", "", {"select_layers": ()}),
        ("--lim-recent-ratio", "0.5", {"recent_ratio": 0.5}),
        ("--lim-sinks", "0", {"sinks": 0}),
    ],
)
def test_each_flag_sets_its_field(flag: str, text: str, setting: dict[str, object]) -> None:
    arguments = parse(flag, text)
    assert given_settings(arguments) == setting
    assert given_flags(arguments) == [flag]


def test_json_counts_as_a_given_flag() -> None:
    assert given_flags(parse("--lim-config", "{}", "--lim-sinks", "1")) == [
        "--lim-sinks",
        "--lim-config",
    ]


def test_everything_wrong_with_the_settings_is_named_at_once() -> None:
    texts = {"--lim-budget": "abc", "--lim-select-layers": "two", "--lim-policy": "dense"}
    reasons = reasons_against_settings('{"sinks": -1}', texts)
    expected = ["--lim-budget: must be an integer, not 'abc'", "--lim-select-layers: layers must"]
    for words in [*expected, "policy must be one of", "sinks must be"]:
        assert any(words in reason for reason in reasons), words


def test_good_settings_have_no_reasons_against_them() -> None:
    assert reasons_against_settings(None, {"--lim-budget": "256", "--lim-config": "{}"}) == []
