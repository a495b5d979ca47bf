"""A run's folder: `run.json` says what it depends on, `samples.jsonl` grows by a line a sample."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from lim_sglang.errors import DataError
from lim_sglang.evals.lines import LineFile, whole_lines, write_whole
from lim_sglang.evals.records import Failure, GradedSample, Key
from lim_sglang.evals.settings import differences

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
FAILURES_FILE = "failures.jsonl"


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

    Samples are safe once `append` returns. What a crash tore off is dropped on opening, the whole
    question where a question's lines are written at once, so that it is drawn again.
    """

    def __init__(self, path: Path, file: LineFile) -> None:
        """Use `open_run`."""
        self.path = path
        self.samples: list[GradedSample] = []
        self.failures: dict[Key, Failure] = {}
        """Samples that failed and were not drawn since."""
        self._file = file
        self._failures_file: LineFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._failures_file:
            self._failures_file.close()

    def append(self, *samples: GradedSample) -> None:
        """Add samples for good, all of them or none.

        Raises:
            DataError: the disk refused; what was written before stays.
        """
        self._file.append(sample.to_row() for sample in samples)
        self.samples += samples
        for sample in samples:
            self.failures.pop(sample.key, None)

    def append_failure(self, failure: Failure) -> None:
        """Remember a failure, so that the run does not try it for ever.

        Raises:
            DataError: the disk refused.
        """
        if not self._failures_file:
            self._failures_file = _open_failures(self.path / FAILURES_FILE)
        self._failures_file.append([failure.to_row()])
        self.failures[failure.key] = failure

    def load(self) -> None:
        """Read what is there, and cut off what is torn."""
        self.samples, size = read_samples(self._file.path)
        self._file.cut(size)
        self.failures = read_failures(self.path, self.samples)


def open_run(path: Path, record: RunRecord) -> RunFolder:
    """Begin the run in `path`, or go on with it where it stopped.

    Raises:
        DataError: the folder holds a run of other settings (each is named), another process is
            writing there, a line is damaged, or the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = LineFile(path / SAMPLES_FILE)
    except OSError as error:
        raise DataError(
            f"cannot write to {path} ({error.strerror}); name another folder with --out"
        ) from None
    folder = RunFolder(path, file)
    try:
        if not file.lock():
            raise DataError(
                f"another lim eval is writing to {path}; wait for it, "
                "or name another folder with --out"
            )
        _check_or_write_record(path, record, is_empty=file.size == 0)
        folder.load()
    except BaseException:
        file.close()
        raise
    return folder


def _open_failures(path: Path) -> LineFile:
    try:
        file = LineFile(path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); make room") from None
    file.mend()
    return file


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
            f"{path / RUN_FILE} is no record of a run ({error}): name the folder of a run, "
            "or another one for a new run"
        ) from None


def read_samples(path: Path) -> tuple[list[GradedSample], int]:
    """The samples of a file, and how many bytes of it they take.

    What a crash may have left at the end is left out: half a line, or a part of the lines of a
    question that are written at once.

    Raises:
        DataError: the file cannot be read, or a line before that is damaged.
    """
    samples: dict[Key, GradedSample] = {}
    size = 0
    question: list[GradedSample] = []
    try:
        for number, line, end in whole_lines(path):
            try:
                graded = GradedSample.from_row(json.loads(line))
                _check_place(graded, question, samples)
            except (ValueError, DataError) as problem:
                raise DataError(
                    f"{path}, line {number}: {problem}; mend or delete the line"
                ) from None
            question.append(graded)
            if graded.of in (None, len(question)):
                samples |= {each.key: each for each in question}
                size, question = end, []
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from None
    return list(samples.values()), size


def read_failures(path: Path, samples: list[GradedSample]) -> dict[Key, Failure]:
    """What of a run's folder failed and was not drawn since; the last failure of each.

    Raises:
        DataError: a line is damaged.
    """
    file = path / FAILURES_FILE
    failures: dict[Key, Failure] = {}
    if not file.exists():
        return failures
    for number, line, _ in whole_lines(file):
        try:
            failure = Failure.from_row(json.loads(line))
        except (ValueError, DataError) as problem:
            raise DataError(f"{file}, line {number}: {problem}; mend or delete the line") from None
        failures[failure.key] = failure
    drawn = {graded.key for graded in samples}
    return {key: failure for key, failure in failures.items() if key not in drawn}


def _check_place(
    graded: GradedSample, question: list[GradedSample], samples: Mapping[Key, GradedSample]
) -> None:
    """Refuse a sample that cannot follow: seen before, or among the lines of another question."""
    if graded.key in samples or graded.key in {each.key for each in question}:
        raise DataError(f"sample {graded.key} occurs a second time")
    first = question[0] if question else graded
    if (graded.question_id, graded.of) != (first.question_id, first.of):
        raise DataError(
            f"the question {first.question_id!r} has {len(question)} lines before it, "
            f"and should have {first.of}"
        )


def _check_or_write_record(path: Path, record: RunRecord, *, is_empty: bool) -> None:
    if not (path / RUN_FILE).exists():
        if not is_empty:
            raise DataError(
                f"{path} has samples but no {RUN_FILE} that says how they were made; "
                "name another folder with --out"
            )
        write_whole(path / RUN_FILE, json.dumps(asdict(record), indent=2) + "\n")
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
