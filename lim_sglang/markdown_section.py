"""A part of a document that a command writes: what stands between two markers."""

from dataclasses import dataclass
from pathlib import Path

from lim_sglang.errors import DataError


@dataclass(frozen=True)
class Part:
    """The lines between which a command writes."""

    begin: str
    end: str

    def replace(self, text: str, section: str, name: str) -> str:
        """A file's text with another section between the markers; the rest stays as it is.

        Args:
            name: the file's, for the message.

        Raises:
            DataError: the markers are not there once each, in order.
        """
        begin, end = text.find(self.begin), text.find(self.end)
        if text.count(self.begin) != 1 or text.count(self.end) != 1 or end < begin:
            raise DataError(
                f"{name} needs one line {self.begin} and, below it, one line {self.end}: put them "
                "around the place of the table"
            )
        return f"{text[: begin + len(self.begin)]}\n{section}\n{text[end:]}"

    def replace_in(self, path: Path, section: str) -> str:
        """The text of a file with another section; nothing is written.

        Raises:
            DataError: it cannot be read, or has no such part.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        return self.replace(text, section, str(path))


def short_commit(commit: str | None) -> str:
    """A commit as people write it; local edits stay visible."""
    if not commit:
        return "unknown"
    base, plus, edits = commit.partition("+")
    return f"{base[:10]}{' with local edits ' if plus else ''}{edits}"
