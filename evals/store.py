"""A run's folder: `run.json` says what it depends on, `samples.jsonl` grows by a line a sample."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lim_sglang.errors import DataError
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.settings import differences

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`."""

    run_id: str
    settings: Mapping[str, Any]
    """What can change the result: all of it has to agree before a run goes on."""
    about: Mapping[str, Any]
    """Where and when the run began; free to differ."""


class RunFolder:
    """A run that is open for writing, by one process at a time.

    A sample is safe once `append` returns: its line is written and synced. A last line that was
    torn off by a crash is dropped on opening, so that its sample is drawn again.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `open_run`."""
        self.path = path
        self.samples: list[GradedSample] = []
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, sample: GradedSample) -> None:
        """Add one sample for good.

        Raises:
            DataError: the disk refused; what was written before stays.
        """
        line = json.dumps(sample.to_row(), ensure_ascii=False, allow_nan=False)
        # Half a surrogate pair cannot be written as UTF-8; a model may end in one.
        left = memoryview((line + "\n").encode(errors="replace"))
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise DataError(
                f"cannot write {self.path / SAMPLES_FILE} ({error.strerror}); make room, then run "
                "the same command again: it goes on after the last whole sample"
            ) from None
        self.samples.append(sample)


def open_run(path: Path, record: RunRecord) -> RunFolder:
    """Begin the run in `path`, or go on with it where it stopped.

    Raises:
        DataError: the folder holds a run of other settings (each is named), another process is
            writing there, a line is damaged, or the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(path / SAMPLES_FILE, flags, 0o644)
    except OSError as error:
        raise DataError(
            f"cannot write to {path} ({error.strerror}); name another folder with --out"
        ) from None
    folder = RunFolder(path, descriptor)
    try:
        _lock(folder.path, descriptor)
        _check_or_write_record(path, record, is_empty=os.fstat(descriptor).st_size == 0)
        folder.samples += _read_whole_lines(path / SAMPLES_FILE, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return folder


def read_record(path: Path) -> RunRecord:
    """The `run.json` of a folder.

    Raises:
        DataError: it is missing or not in the form that this version writes.
    """
    try:
        content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        return RunRecord(content["run_id"], content["settings"], content["about"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path / RUN_FILE} is no record of a run ({error}); name another folder with --out"
        ) from None


def _lock(path: Path, descriptor: int) -> None:
    """Keep other processes out until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"another lim eval is writing to {path}; wait for it, or name another folder with --out"
        ) from None


def _check_or_write_record(path: Path, record: RunRecord, *, is_empty: bool) -> None:
    if not (path / RUN_FILE).exists():
        if not is_empty:
            raise DataError(
                f"{path} has samples but no {RUN_FILE} that says how they were made; "
                "name another folder with --out"
            )
        _write_record(path, record)
        return
    # Through JSON, so that a tuple equals the list that it became.
    settings = json.loads(json.dumps(record.settings))
    found = list(differences(read_record(path).settings, settings))
    if found:
        lines = "".join(f"\n  - {difference}" for difference in found)
        raise DataError(
            f"the run in {path} was made with other settings:{lines}\n"
            "go on with the old ones, or name another folder with --out"
        )


def _write_record(path: Path, record: RunRecord) -> None:
    """Write `run.json` whole or not at all."""
    draft = path / f"{RUN_FILE}.new"
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(asdict(record), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path / RUN_FILE)
    except OSError as error:
        raise DataError(f"cannot write {path / RUN_FILE} ({error.strerror}); make room") from None


def _read_whole_lines(path: Path, descriptor: int) -> list[GradedSample]:
    """Read the samples, and cut off what follows the last newline."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.ftruncate(descriptor, len(whole))
    samples: dict[tuple[str, int], GradedSample] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            sample = GradedSample.from_row(json.loads(line))
            if sample.key in samples:
                raise DataError(f"sample {sample.key} occurs a second time")
        except (ValueError, DataError) as problem:
            raise DataError(f"{path}, line {number}: {problem}; mend or delete the line") from None
        samples[sample.key] = sample
    return list(samples.values())
