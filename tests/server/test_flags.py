"""The `--lim-*` flags on a parser."""

import argparse

import pytest

from lim_sglang.flags import add_flags, given_flags, given_settings, read_settings


def parse(*words: str) -> argparse.Namespace:
    """Read a command line that has our flags alone."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "settings", "flags"),
    [
        ((), {}, []),
        (("--lim-policy", "full"), {"policy": "full"}, ["--lim-policy"]),
        (("--lim-budget", "256"), {"budget": 256}, ["--lim-budget"]),
        (("--lim-select-layers", "2,12"), {"select_layers": (2, 12)}, ["--lim-select-layers"]),
        (("--lim-select-layers", ""), {"select_layers": ()}, ["--lim-select-layers"]),
        (("--lim-preset", "a.json"), {"preset": "a.json"}, ["--lim-preset"]),
        (("--lim-recent-ratio", "0.5"), {"recent_ratio": 0.5}, ["--lim-recent-ratio"]),
        (("--lim-config", "{}", "--lim-sinks", "0"), {"sinks": 0}, ["--lim-sinks", "--lim-config"]),
    ],
)
def test_each_flag_sets_its_field(
    words: tuple[str, ...], settings: dict[str, object], flags: list[str]
) -> None:
    arguments = parse(*words)
    assert given_settings(arguments) == settings
    assert given_flags(arguments) == flags
    texts = dict(zip(words[::2], words[1::2], strict=True))
    assert read_settings(None, texts)[1] == []


def test_everything_wrong_with_the_settings_is_named_at_once() -> None:
    texts = {"--lim-budget": "abc", "--lim-select-layers": "two", "--lim-policy": "dense"}
    _, reasons = read_settings('{"sinks": -1}', texts)
    expected = ["--lim-budget: must be an integer, not 'abc'", "--lim-select-layers: layers must"]
    for words in [*expected, "policy must be one of", "sinks must be"]:
        assert any(words in reason for reason in reasons), words
