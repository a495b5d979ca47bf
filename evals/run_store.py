"""A run's folder: `run.json` says what it depends on, `samples.jsonl` grows by a line a sample.

JSON lines are appended whole or not at all; a reader gets the newest verdicts.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from lim_sglang.errors import DataError
from lim_sglang.evals.run_config import differences
from lim_sglang.programs.schema import Sample, SampleState

SAMPLE_FIELDS = tuple(field.name for field in fields(Sample))
REQUIRED_FIELDS = tuple(field.name for field in fields(Sample) if field.default is MISSING)
"""The others came later; a line that was written before has their defaults."""

Key = tuple[str, int]
"""What occurs once in a run: the question's id and the sample's index."""


@dataclass(frozen=True)
class GradedSample:
    """One sample that ended without a failure, with its verdict. It quotes the model, never the
    question.
    """

    question_id: str
    gold: str
    correct: bool
    sample: Sample
    late: bool = False
    """Whether its program drew it whole and did not let it vote: it ended after the program had
    stopped, or it was cut off and the program listens to finished samples only."""
    of: int | None = None
    """Lines of its question, which are written at once, where the program stops by itself; None
    where each sample is written as it ends."""

    @property
    def key(self) -> Key:
        """What occurs once in a run."""
        return self.question_id, self.sample.index

    def to_row(self) -> dict[str, Any]:
        """One flat object, ready for JSON."""
        head = {"question": self.question_id, "gold": self.gold, "correct": self.correct}
        row = {**head, **asdict(self.sample)}
        if self.of is not None:
            row |= {"late": self.late, "of": self.of}
        return row

    @classmethod
    def from_row(cls, row: object) -> Self:
        """Read back what `to_row` gave.

        Raises:
            DataError: a field is missing or has a value that it cannot have.
        """
        row = _checked(row, ("question", "gold", "correct", *REQUIRED_FIELDS))
        if row["state"] not in list(SampleState):
            raise DataError(f"unknown state {row['state']!r}; expected {', '.join(SampleState)}")
        of = row.get("of")
        if of is not None and (type(of) is not int or of < 1):
            raise DataError(f"of must be a number of lines, not {of!r}")
        sample = {name: row[name] for name in SAMPLE_FIELDS if name in row}
        sample["state"] = SampleState(row["state"])
        return cls(
            question_id=row["question"],
            gold=row["gold"],
            correct=row["correct"],
            sample=Sample(**sample),
            late=row.get("late", False),
            of=of,
        )


@dataclass(frozen=True)
class Failure:
    """A sample that a living server failed. It is neither right nor wrong."""

    question_id: str
    index: int
    error: str

    @property
    def key(self) -> Key:
        """Of the sample that would have been."""
        return self.question_id, self.index

    def to_row(self) -> dict[str, Any]:
        """One flat object, ready for JSON."""
        return {"question": self.question_id, "index": self.index, "error": self.error}

    @classmethod
    def from_row(cls, row: object) -> Self:
        """Read back what `to_row` gave; raises `DataError` where a field is missing."""
        row = _checked(row, ("question", "index", "error"))
        return cls(row["question"], row["index"], row["error"])


def _checked(row: object, expected: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError("expected an object with a sample's fields")
    missing = [name for name in expected if name not in row]
    if missing:
        raise DataError(f"has no {', no '.join(missing)}")
    return row


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
    stored = read_record(path).settings
    if "code_sha256" in stored:  # in the place of the sampling version
        raise DataError(
            f"the run in {path} was begun by an earlier lim-sglang, which recorded no sampling "
            "version: it can be graded, compared and reported, but not continued; name another "
            "folder with --out"
        )
    found = list(differences(stored, settings))
    if found:
        lines = "".join(f"\n  - {difference}" for difference in found)
        raise DataError(
            f"the run in {path} was made with other settings:{lines}\n"
            "go on with the old ones, or name another folder with --out"
        )


GRADES_FILE = "grades.jsonl"


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    path: Path
    record: RunRecord
    samples: tuple[GradedSample, ...]
    """All that are whole, in the order in which they ended."""
    failures: tuple[Failure, ...] = ()
    """Samples that are missing because a living server failed them."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to draw."""
        settings = self.record.settings
        num_questions = settings["questions"]["asked"]
        if any(graded.of is not None for graded in self.samples):
            return len({graded.question_id for graded in self.samples}) == num_questions
        return len(self.samples) == num_questions * settings["num_samples"]


def load_run(path: Path) -> Run:
    """Read a run, also one that is being written.

    Raises:
        DataError: the folder holds none, or a line of it is damaged.
    """
    record = read_record(path)
    samples, _ = read_samples(path / SAMPLES_FILE)
    failures = read_failures(path, samples)
    return Run(path, record, tuple(regraded(path, samples)), tuple(failures.values()))


def regraded(path: Path, samples: Sequence[GradedSample]) -> list[GradedSample]:
    """Samples with the answers and verdicts of `grades.jsonl`, as far as it has any.

    Raises:
        DataError: a line is damaged.
    """
    grades = _read_grades(path / GRADES_FILE)
    return [_with_grade(graded, grades.get(graded.key)) for graded in samples]


def _with_grade(graded: GradedSample, grade: Mapping[str, Any] | None) -> GradedSample:
    if grade is None:
        return graded
    sample = replace(graded.sample, answer=grade["answer"])
    return replace(graded, correct=grade["correct"], sample=sample)


def _read_grades(file: Path) -> dict[Key, Mapping[str, Any]]:
    """Each row of `grades.jsonl`, by the sample that it is of."""
    grades: dict[Key, Mapping[str, Any]] = {}
    if not file.exists():
        return grades
    for number, line, _ in whole_lines(file):
        try:
            row = json.loads(line)
            grades[row["question"], row["index"]] = {k: row[k] for k in ("answer", "correct")}
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"{file}, line {number} is no verdict ({problem!r}): delete the file, then "
                f"`lim grade {file.parent}` writes it anew"
            ) from None
    return grades
