"""Options of programs on the command line."""

import pytest

from lim_sglang.errors import ConfigError
from lim_sglang.programs.options import read_settings


def test_settings_are_numbers_by_name() -> None:
    texts = ["confidence=0.9", "warm-up = 4", "tokens=1e3"]
    assert read_settings(texts) == {"confidence": 0.9, "warm_up": 4, "tokens": 1000}
    assert read_settings([]) == {}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["confidence"], "--set takes NAME=VALUE with a number, not 'confidence'"),
        (["=3"], "not '=3'"),
        (["window=many"], "not 'window=many'"),
        (["window=inf"], "not 'window=inf'"),
        (["window=2", "window=3"], "--set window is given twice"),
    ],
)
def test_a_setting_of_another_form_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings(texts)
