"""The `--lim-*` command-line flags: one table for SGLang's parser and for `lim serve`."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lim_sglang.config import POLICIES, RANKINGS, parse_layers, resolve_settings
from lim_sglang.errors import ConfigError

CONFIG_DEST = "lim_config"


@dataclass(frozen=True)
class Flag:
    """One flag and the field of `LimConfig` that it sets."""

    name: str
    field: str
    parse: Callable[[str], Any]
    metavar: str
    help: str

    def read(self, text: str) -> Any:
        """Parse what was typed.

        Raises:
            argparse.ArgumentTypeError: it is no value of this flag; argparse shows the text.
        """
        try:
            return self.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            wanted = "an integer" if self.parse is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}") from None

    @property
    def dest(self) -> str:
        """The attribute that argparse stores it in."""
        return self.name.removeprefix("--").replace("-", "_")


FLAGS = (
    Flag("--lim-policy", "policy", str, "POLICY", f"What decode reads: {' or '.join(POLICIES)}."),
    Flag("--lim-budget", "budget", int, "TOKENS", "Tokens that a sparse layer reads."),
    Flag(
        "--lim-select-layers",
        "select_layers",
        parse_layers,
        "LAYERS",
        "Layers that pick the token set, such as 2,12; empty makes every layer dense.",
    ),
    Flag(
        "--lim-recent-ratio",
        "recent_ratio",
        float,
        "RATIO",
        "Share of the budget for the newest tokens, 0 to 1.",
    ),
    Flag("--lim-sinks", "sinks", int, "TOKENS", "Oldest tokens that are always kept."),
    Flag(
        "--lim-ranking",
        "ranking",
        str,
        "RANKING",
        f"How tokens are ordered: {' or '.join(RANKINGS)}; rank is the paper's.",
    ),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to SGLang's own parser."""
    group = parser.add_argument_group("LessIsMore", "Options of the attention backend lim.")
    for flag in FLAGS:
        group.add_argument(flag.name, type=flag.read, metavar=flag.metavar, help=flag.help)
    group.add_argument(
        "--lim-config", metavar="JSON", help="Any of these settings as one JSON object."
    )


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `LimConfig` that flags were given for."""
    found: Mapping[str, Any] = vars(arguments)
    return {f.field: found[f.dest] for f in FLAGS if found.get(f.dest) is not None}


def given_flags(arguments: argparse.Namespace) -> list[str]:
    """The names of the `--lim-*` options that were given."""
    found: Mapping[str, Any] = vars(arguments)
    names = [f.name for f in FLAGS if found.get(f.dest) is not None]
    return names + ["--lim-config"] * (found.get(CONFIG_DEST) is not None)


def reasons_against_settings(environment: str | None, texts: Mapping[str, str | None]) -> list[str]:
    """What is wrong with LessIsMore's own settings, one line each.

    Args:
        environment: the value of `LIM_CONFIG`.
        texts: what was typed for each `--lim-*` flag, None where it was not given.
    """
    reasons, settings = [], {}
    for flag in FLAGS:
        text = texts.get(flag.name)
        try:
            if text is not None:
                settings[flag.field] = flag.read(text)
        except argparse.ArgumentTypeError as error:
            reasons.append(f"{flag.name}: {error}")
    try:
        resolve_settings(environment, texts.get("--lim-config"), settings)
    except ConfigError as error:
        reasons.append(str(error))
    return reasons
