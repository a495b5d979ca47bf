"""Every failure that a user can act on: what was wrong, what was expected, what to do."""

from collections.abc import Sequence


class LimError(Exception):
    """Base of the errors that the command line prints as one message, without a traceback."""


class ConfigError(LimError, ValueError):
    """A LessIsMore option or configuration value is unknown, malformed or out of range."""


class RefusedError(LimError):
    """The server would not compute what was asked for: all reasons at once."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        lines = "".join(f"\n  - {reason}" for reason in self.reasons)
        super().__init__(f"lim cannot serve with these settings:{lines}")


class ServerError(LimError):
    """A server did not start, went away, timed out, or does not serve LessIsMore."""


class ModelError(LimError):
    """A model could not be found, fetched, verified or converted."""


class DataError(LimError):
    """Questions, samples or a run folder are missing or do not have the expected form."""
