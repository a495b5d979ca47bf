"""Which layer does what."""

import pytest

from lim_sglang.config import LimConfig, layer_roles
from lim_sglang.errors import ConfigError

LETTER = {"F": "full", "S": "select", "R": "reuse"}


def roles(config: LimConfig, depth: int) -> str:
    """The roles as a word of F, S and R."""
    letters = {role: letter for letter, role in LETTER.items()}
    return "".join(letters[role.value] for role in layer_roles(config, depth))


@pytest.mark.parametrize(
    ("config", "depth", "expected"),
    [
        (LimConfig(select_layers=(2, 5)), 8, "FFSRRSRR"),
        (LimConfig(select_layers=(0,)), 4, "SFRR"),
        (LimConfig(select_layers=(1,)), 4, "FSRR"),
        (LimConfig(select_layers=(4,)), 6, "FFFFSR"),
        (LimConfig(select_layers=(5,)), 6, "FFFFFS"),
        (LimConfig(select_layers=()), 4, "FFFF"),
        (LimConfig(select_layers=(0, 1, 2, 3)), 4, "SSSS"),
        (LimConfig(select_layers=(2,), dense_layers=()), 5, "FFSRR"),
        (LimConfig(select_layers=(1,), dense_layers=(0, 3)), 5, "FSRFR"),
        (LimConfig(select_layers=(1, 3), dense_layers=(0, 3)), 5, "FSRSR"),
        (LimConfig(select_layers=(2,), policy="full"), 4, "FFFF"),
        (LimConfig(), 1, "F"),
        (LimConfig(), 2, "FF"),
        (LimConfig(), 3, "FFS"),
        (LimConfig(), 6, "FFSSRR"),
    ],
)
def test_roles(config: LimConfig, depth: int, expected: str) -> None:
    assert roles(config, depth) == expected


@pytest.mark.parametrize("policy", ["lessismore", "full"])
@pytest.mark.parametrize("name", ["select_layers", "dense_layers"])
def test_a_layer_beyond_the_model_is_refused(name: str, policy: str) -> None:
    config = LimConfig.from_mapping({name: [1, 8], "policy": policy})
    with pytest.raises(ConfigError, match=rf"{name} names layer 8.*0 to 7"):
        layer_roles(config, 8)
