"""Failures that a user can act on. A message says what was wrong, what was expected, what to do."""

import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

REFUSED = 2
"""Exit code of a command or a server that refuses its options."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended, by the shell's convention: 128 + SIGINT."""


class LimError(Exception):
    """Base of the errors that the command line prints as one message, without a traceback."""

    exit_code = 1


class ConfigError(LimError, ValueError):
    """A LessIsMore option or configuration value is unknown, malformed or out of range."""

    exit_code = REFUSED


class RefusedError(LimError):
    """A server that would silently compute something else than asked; holds all reasons at once."""

    exit_code = REFUSED

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"lim cannot serve with these settings:{bullets(self.reasons)}")


class ServerError(LimError):
    """A server did not start, went away, timed out, or does not serve LessIsMore."""


class ModelError(LimError):
    """A model could not be found, fetched, verified or converted."""


class UnknownModelError(ModelError):
    """A model that does not exist, or that is not to be had here: the start is refused."""

    exit_code = REFUSED


class DataError(LimError):
    """Questions, samples or a run folder are missing or do not have the expected form."""


def bullets(texts: Iterable[object]) -> str:
    """Return a list for the end of a message, each text on a line of its own."""
    return "".join(f"\n  - {text}" for text in texts)


@contextmanager
def errors_in_words() -> Iterator[None]:
    """End the process with a message and an exit code if the block raises a `LimError`."""
    try:
        yield
    except LimError as error:
        sys.stderr.write(f"error: {as_called(str(error))}\n")
        sys.exit(error.exit_code)


def lim_command() -> str:
    """Return the name of this program if the PATH has it, else its path."""
    beside = Path(sys.executable).with_name("lim")
    if shutil.which("lim") or not beside.is_file():
        return "lim"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def as_called(text: str) -> str:
    """Return a message with the commands between backticks as they are called here."""
    return text.replace("`lim ", f"`{lim_command()} ")


def in_python(text: str) -> str:
    """Return a message with Python's arguments in the place of options: `url=` for `--url`.

    Commands of a shell, which stand between backticks, stay.
    """
    return _OPTION.sub(_argument, text)


_OPTION = re.compile(r"(?P<command>`[^`]*`)|--(?P<off>no-)?(?P<name>[a-z]+(-[a-z]+)*)( (?=\d))?")


def _argument(found: re.Match[str]) -> str:
    if found["command"]:
        return found["command"]
    name = {"timeout": "timeout_s"}.get(found["name"], found["name"].replace("-", "_"))
    if found.string.startswith(":", found.end()):
        return name  # of which the error speaks
    return f"{name}={'False' if found['off'] else ''}"


def value_error(problem: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors in our words: `must be an integer, not 'x'`."""
    text = problem["msg"].removeprefix("Value error, ")
    expected = re.sub(r", (unable to parse|got) .*", "", text.removeprefix("Input should "))
    if expected == text:
        return str(text)
    for theirs, ours in _SHORTER:
        expected = re.sub(theirs, ours, expected)
    return f"must {expected}, not {cut(repr(problem['input']))}"


_SHORTER = (
    (r"\ba valid (?=[aeiou])", "an "),
    (r"\ba valid ", "a "),
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
    ("greater than", "more than"),
)
"""Patterns of pydantic's descriptions of a value, and their replacements."""


def likely_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known name that was probably meant, as the question `did you mean x? ` for a
    message, or nothing if none is like it.

    Args:
        known: names in lower case.
        cutoff: similarity of the least likely guess, from 0 to 1 (`difflib`).
    """
    likely = get_close_matches(name.casefold(), list(known), n=1, cutoff=cutoff)
    return f"did you mean {likely[0]}? " if likely else ""


def cut(text: str, most: int = 100) -> str:
    """Return a text, or its first `most` characters and an ellipsis."""
    return text if len(text) <= most else f"{text[:most]}…"


def reasons_that_hold(*cases: tuple[bool, str]) -> list[str]:
    """Return the texts of those (condition, text) pairs whose condition is true."""
    return [text for holds, text in cases if holds]
