"""The `--lim-*` command-line flags: one table for SGLang's parser and for our own commands."""

import argparse
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lim_sglang.compat import PLUGIN_GROUP
from lim_sglang.config import LimConfig, parse_layers, resolve_settings
from lim_sglang.errors import ConfigError
from lim_sglang.policies import POLICIES
from lim_sglang.policies.lessismore import RANKINGS
from lim_sglang.policies.lossless import AUTO, MAX_DRAFT_TOKENS
from lim_sglang.policies.policy import SharedBy
from lim_sglang.validation import (
    DRAFTING_REFUSALS,
    reasons_against,
    reasons_against_drafts,
    refusals,
)

CONFIG_FLAG = "--lim-config"
CONFIG_HELP = "Any of these settings as one JSON object."


@dataclass(frozen=True)
class Flag:
    """A flag and the field of `LimConfig` that it sets."""

    name: str
    parse: Callable[[str], Any]
    metavar: str
    help: str

    @property
    def field(self) -> str:
        """The field of `LimConfig`."""
        return self.name.removeprefix("--lim-").replace("-", "_")

    @property
    def dest(self) -> str:
        """The attribute of a parsed command line that holds the value."""
        return f"lim_{self.field}"

    def read(self, text: str) -> Any:
        """Parse the text that was given for this flag.

        Raises:
            argparse.ArgumentTypeError: the text is no value of this flag; argparse shows the error.
        """
        try:
            return self.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError:
            expected = "an integer" if self.parse is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}") from None


def _read_draft_tokens(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


FLAGS = (
    Flag("--lim-policy", str, "POLICY", f"What decode reads: {', '.join(POLICIES)}."),
    Flag("--lim-budget", int, "TOKENS", "Tokens that a sparse layer reads."),
    Flag(
        "--lim-select-layers",
        parse_layers,
        "LAYERS",
        "Layers that select the kept tokens, such as 2,12; empty makes every layer dense.",
    ),
    Flag(
        "--lim-pick-layers",
        parse_layers,
        "LAYERS",
        "Further layers that select, at half the bytes: they score all keys, but read the values "
        "of the tokens that they select alone. Not the paper's.",
    ),
    Flag(
        "--lim-preset",
        str,
        "FILE",
        "Preset that names these layers, for this model; lim calibrate makes one.",
    ),
    Flag(
        "--lim-recent-ratio",
        float,
        "RATIO",
        "Share of the budget for the newest tokens and the sinks, 0 to 1; of tidal 0 by default.",
    ),
    Flag(
        "--lim-sinks",
        int,
        "TOKENS",
        "Oldest tokens that are kept, out of that share, at most all of it but the newest token; "
        "of tidal 0 by default.",
    ),
    Flag(
        "--lim-ranking",
        str,
        "RANKING",
        f"Order of tokens: {' or '.join(RANKINGS)}; rank is the paper's.",
    ),
    Flag(
        "--lim-shared-by",
        str,
        "HEADS",
        f"Heads that share pages under policy quest: {', '.join(SharedBy)}.",
    ),
    Flag(
        "--lim-draft-tokens",
        _read_draft_tokens,
        "N",
        f"Tokens that policy lossless drafts in a cycle: 1 to {MAX_DRAFT_TOKENS}, or {AUTO}.",
    ),
    Flag("--lim-gate", str, "FOLDER", "Trained gate of policy seer; lim train-gate makes one."),
)

FLAG_HELP = {flag.name: flag.help for flag in FLAGS} | {CONFIG_FLAG: CONFIG_HELP}
"""Help texts by flag, for commands that declare their options by themselves."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to SGLang's own parser."""
    group = parser.add_argument_group("LessIsMore", "Options of the attention backend lim.")
    for flag in FLAGS:
        group.add_argument(flag.name, type=flag.read, metavar=flag.metavar, help=flag.help)
    group.add_argument(CONFIG_FLAG, metavar="JSON", help=CONFIG_HELP)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `LimConfig` that have a flag on this command line."""
    return {
        f.field: value for f in FLAGS if (value := getattr(arguments, f.dest, None)) is not None
    }


def given_flags(arguments: argparse.Namespace) -> list[str]:
    """List the `--lim-*` options of this command line by name."""
    given = given_settings(arguments)
    names = [flag.name for flag in FLAGS if flag.field in given]
    return names + [CONFIG_FLAG] * (given_config(arguments) is not None)


def given_config(arguments: argparse.Namespace) -> str | None:
    """Return the value of `--lim-config` on this command line."""
    found: str | None = getattr(arguments, "lim_config", None)
    return found


def read_settings(
    environment: str | None, texts: Mapping[str, str | None]
) -> tuple[LimConfig | None, list[str]]:
    """Return LessIsMore's settings, None if something is wrong with them, and all that is wrong.

    Args:
        environment: the value of `LIM_CONFIG`.
        texts: the text given for each `--lim-*` flag, None for a flag that was not given.
    """
    config: LimConfig | None = None
    reasons, settings = [], {}
    for flag in FLAGS:
        text = texts.get(flag.name)
        try:
            if text is not None:
                settings[flag.field] = flag.read(text)
        except argparse.ArgumentTypeError as error:
            reasons.append(f"{flag.name}: {error}")
    try:
        config = resolve_settings(environment, texts.get(CONFIG_FLAG), settings)
    except ConfigError as error:
        reasons.append(str(error))
    return (None if reasons else config), reasons


def reasons_against_words(words: Sequence[str], *, on_cpu: bool, is_lossless: bool) -> list[str]:
    """List the refused options among words of a command line: the reasons of `reasons_against` and
    `reasons_against_drafts` that need none of SGLang's parser, which takes half a minute to load.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    table = (*refusals(on_cpu=on_cpu), *(DRAFTING_REFUSALS if is_lossless else ()))
    for refusal in {each.option: each for each in table}.values():
        names = (refusal.option, *refusal.aliases)
        parser.add_argument(*names, nargs="?", const=True, type=_number_or_text, dest=refusal.field)
    given = parser.parse_known_args(words)[0]
    against_drafts = reasons_against_drafts(given) if is_lossless else []
    return list(dict.fromkeys([*reasons_against(given, on_cpu=on_cpu), *against_drafts]))


def _number_or_text(word: str) -> int | str:
    return int(word) if word.isdecimal() else word


def option_names() -> set[str]:
    """Return the options of SGLang's server, and more words of that form, read from sources.

    To import the parser takes half a minute. Plugins of SGLang may add options, so their sources
    are read, too. Without SGLang the set is empty.
    """
    if not (folder := _folder_of("sglang")):
        return set()
    plugins = {point.value.partition(".")[0] for point in entry_points(group=PLUGIN_GROUP)}
    files = [path for name in plugins if (at := _folder_of(name)) for path in at.rglob("*.py")]
    source = (folder / "srt" / "server_args.py").read_text()
    names = [name.replace("_", "-") for name in re.findall(r"^    (\w+): A\[", source, re.M)]
    words = re.findall(r"--\w[\w-]*", "\n".join([source, *(path.read_text() for path in files)]))
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | set(words)


def _folder_of(package: str) -> Path | None:
    """Return the folder of an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return Path(next(iter(folders))) if folders else None
