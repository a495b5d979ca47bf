"""A file of JSON lines that only grows: what is appended is on disk whole, or not there at all."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lim_sglang.errors import DataError


class LineFile:
    """One that is open for writing. It ends in whole lines, or else a crash tore its last write."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it; raises `OSError`."""
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size

    def lock(self) -> bool:
        """Keep other processes out until it is closed; false where one keeps us out."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def cut(self, size: int) -> None:
        """Drop what follows the first `size` bytes."""
        os.ftruncate(self._descriptor, size)

    def mend(self) -> None:
        """Drop half a line at the end, which a crash has left there."""
        ends = [end for _, _, end in whole_lines(self.path)]
        self.cut(ends[-1] if ends else 0)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines for good, in one write.

        Raises:
            DataError: the disk refused; the file is as it was before.
        """
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        # Half a surrogate pair cannot be written as UTF-8; a model may end in one.
        left = memoryview("".join(lines).encode(errors="replace"))
        before = self.size
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):
                self.cut(before)
            raise DataError(
                f"cannot write {self.path} ({error.strerror}); make room, then run the same "
                "command again: what is finished is safe, and it goes on from there"
            ) from None

    def close(self) -> None:
        """Let others write."""
        os.close(self._descriptor)


def whole_lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """The lines of a file that end: number from 1, content, and where the next one begins.

    Split at line feeds alone: JSON may hold U+2028 as it is. What a crash tore off is left out.
    """
    end = 0
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        end += len(line) + 1
        yield number, line, end


def write_whole(path: Path, content: str) -> None:
    """Write a small file so that a reader finds all of it or the one before.

    Raises:
        DataError: the disk refused.
    """
    draft = path.with_name(f"{path.name}.new")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror}); make room, then run the same command again"
        ) from None


def _sync_folder(path: Path) -> None:
    """Put the names in a folder on disk, those of files that were just made among them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
