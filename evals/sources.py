"""Rows of questions as their source has them: lines of a file, or a data set of the hub."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lim_sglang.errors import ConfigError, DataError

ROW_FORM = 'one JSON object a line with "problem" (or "question") and "answer"'
"""Form of a file of questions, in messages."""
TO_JSONL = (
    """. To convert: python3 -c 'import csv, json, sys; [print(json.dumps(row)) for row in """
    """csv.DictReader(sys.stdin)]' < NAME.csv > NAME.jsonl"""
)
Rows = Iterator[tuple[str, object]]
"""Pairs of a row's location, for errors, and the row, which should be a mapping."""


@dataclass(frozen=True)
class NoJson:
    """A line of a file that is not JSON."""

    fault: str


def _read_line(line: str) -> object:
    """Return the value of a line of JSON; `NoJson` if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return NoJson(str(error))


def file_rows(path: Path, expected: str) -> Rows:
    """Return the values of a JSONL file's lines, blank ones left out, or the items of a JSON array.

    Lines are split at newlines alone: `str.splitlines` would also split at U+2028 inside a text.

    Raises:
        ConfigError: there is no such file.
        DataError: the file is not UTF-8, or no line of it is JSON.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read {path} (not UTF-8 at byte {error.start}); save it as UTF-8, {ROW_FORM}"
        ) from None
    except (OSError, ValueError) as error:  # a ValueError: not a valid file name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path} ({reason}); {expected}, {ROW_FORM}") from None
    if text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return ((f"{path}, item {n}", row) for n, row in enumerate(json.loads(text), 1))
    lines = enumerate(text.split("\n"), 1)
    rows = [(n, _read_line(line)) for n, line in lines if line.strip()]
    faults = [(n, row.fault) for n, row in rows if isinstance(row, NoJson)]
    if rows and len(faults) == len(rows):
        number, fault = faults[0]
        others = ", nor is any other line" if len(rows) > 1 else ""
        raise DataError(
            f"{path} is no JSONL file: line {number} is not JSON ({fault}){others}; expected "
            f"{ROW_FORM}{TO_JSONL if path.suffix == '.csv' else ''}"
        )
    return ((f"{path}, line {n}", row) for n, row in rows)


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub client's warning about each retry; the last failure becomes our error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_rows(
    hub_id: str | None, *, config: str | None, split: str, revision: str | None, file: str
) -> Rows:
    """Return the rows of a data set of the hub at a revision.

    Args:
        file: name of a file that may hold the questions in the hub's place.

    Raises:
        DataError: the hub cannot be read.
    """
    try:
        from datasets import load_dataset

        with _quiet_hub():
            rows = load_dataset(hub_id, name=config, split=split, revision=revision)
    except Exception as error:  # noqa: BLE001 - the hub's clients raise a dozen unrelated classes
        reason = " ".join(str(error).split())
        version = f" at revision {revision[:8]}" if revision else ""
        raise DataError(
            f"cannot load {hub_id}{version} from the hub ({reason}); connect to it, or give "
            f"--data-dir a folder with {file}"
        ) from None
    return ((f"{hub_id}, row {number}", row) for number, row in enumerate(rows))
