"""Sections of a Markdown document that a command writes: marker lines, tables, lists in words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lim_sglang.errors import ConfigError, DataError


@dataclass(frozen=True)
class MarkdownSection:
    """The text between the marker lines of a command, such as `<!-- lim report: begin -->`."""

    command: str

    @property
    def begin(self) -> str:
        """First marker line."""
        return f"<!-- {self.command}: begin -->"

    @property
    def end(self) -> str:
        """Last marker line."""
        return f"<!-- {self.command}: end -->"

    @property
    def markers(self) -> str:
        """Both marker lines, in words."""
        return f"the lines {self.begin} and {self.end}"

    def extract(self, text: str, document: str) -> str:
        """Return the section of a document's text.

        Args:
            document: name of the document, for the error.

        Raises:
            DataError: each marker does not occur exactly once, the first one before the last.
        """
        begin, end = self._markers(text, document)
        return text[begin:end].strip("\n")

    def replace(self, text: str, section: str, document: str) -> str:
        """Return a document's text with another section; the rest stays as it is.

        Args:
            document: name of the document, for the error.

        Raises:
            DataError: each marker does not occur exactly once, the first one before the last.
        """
        begin, end = self._markers(text, document)
        return f"{text[:begin]}\n{section}\n{text[end:]}"

    def replace_in(self, path: Path, section: str, text: str | None = None) -> str:
        """Return the text of a file with another section; the file is not written.

        Args:
            text: the file's content with other sections replaced already.

        Raises:
            ConfigError: there is no such file.
            DataError: the file is no text, or lacks the markers.
        """
        try:
            text = text or path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"cannot read {path} (not UTF-8); name a Markdown file") from None
        except OSError as error:
            raise ConfigError(
                f"cannot read {path} ({error.strerror}); name a Markdown file that has "
                f"{self.markers}"
            ) from None
        return self.replace(text, section, str(path))

    def _markers(self, text: str, document: str) -> tuple[int, int]:
        """Return the positions behind the first marker and before the last one."""
        begin, end = text.find(self.begin), text.find(self.end)
        if text.count(self.begin) != 1 or text.count(self.end) != 1 or end < begin:
            raise DataError(
                f"{document} needs one line {self.begin} and, below it, one line {self.end}: put "
                "them around the place of the table"
            )
        return begin + len(self.begin), end


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned to the left and whose others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    escaped = ([cell.replace("|", r"\|") for cell in cells] for cells in (head, rule, *rows))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def join_words(values: Iterable[object]) -> str:
    """Return `a, b and c`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


MAX_PLACES = 10
"""Most ranges of lines that a message names."""


def places(locations: Sequence[str]) -> str:
    """Return `own.jsonl, lines 2-4, 7` for locations of one file."""
    where, _, first = locations[0].rpartition(" ")
    if len(locations) == 1:
        return locations[0]
    ranges = [[int(first)] * 2]
    for number in (int(each.rpartition(" ")[2]) for each in locations[1:]):
        if number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number] * 2)
    texts = [f"{begin}-{end}" if end > begin else str(begin) for begin, end in ranges]
    more = ["…"] if len(texts) > MAX_PLACES else []
    return f"{where}s {', '.join([*texts[:MAX_PLACES], *more])}"


def counted(count: int, noun: str) -> str:
    """Return `1 question` or `1,200 questions`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short_commit(commit: str | None) -> str:
    """Return the first ten digits of a commit, with the digest of local edits if there are any."""
    if not commit:
        return "unknown"
    base, plus, edits = commit.partition("+")
    return f"{base[:10]}{' with local edits ' if plus else ''}{edits}"
