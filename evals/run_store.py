"""A run's folder: `run.json` holds the settings, `questions.jsonl` the questions that are asked,
`samples.jsonl` grows by a line a sample.

Lines are appended completely or not at all, a torn line at the end (crash, kill) is dropped on
opening, and readers get the newest verdicts (`grades.jsonl`).
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.settings import check_settings
from lim_sglang.programs.schema import Sample, SampleState

if TYPE_CHECKING:
    from lim_sglang.evals.tasks import Question

RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
FAILURES_FILE = "failures.jsonl"
GRADES_FILE = "grades.jsonl"
QUESTIONS_FILE = "questions.jsonl"

SAMPLE_FIELDS = tuple(field.name for field in fields(Sample))
REQUIRED_FIELDS = tuple(field.name for field in fields(Sample) if field.default is MISSING)
"""Fields that every stored sample has. The others were added later; older lines get defaults."""

Key = tuple[str, int]
"""Question id and sample index, unique in a run."""


@dataclass(frozen=True)
class GradedSample:
    """One sample that ended without a failure, with its verdict. The row quotes the model's text,
    never the question.
    """

    question_id: str
    gold: str
    correct: bool
    sample: Sample
    late: bool = False
    """True if the sample is complete but has no vote: the program had stopped before, or the sample
    was cut off and the program counts only finished samples."""
    written_together: int | None = None
    """Number of samples of this question, all written at once, where the program stops early; None
    where each sample is written as it ends. The row's key is `of`."""

    @property
    def key(self) -> Key:
        """Question id and sample index."""
        return self.question_id, self.sample.index

    def to_row(self) -> dict[str, Any]:
        """Return one flat object, ready for JSON."""
        head = {"question": self.question_id, "gold": self.gold, "correct": self.correct}
        row = {**head, **asdict(self.sample)}
        if self.written_together is not None:
            row |= {"late": self.late, "of": self.written_together}
        return row

    @classmethod
    def from_row(cls, row: object) -> Self:
        """Parse a row that `to_row` made.

        Raises:
            DataError: a field is missing or has an impossible value.
        """
        row = _require_fields(row, ("question", "gold", "correct", *REQUIRED_FIELDS))
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
            written_together=of,
        )


@dataclass(frozen=True)
class Failure:
    """A sample that failed although its server was alive: neither right nor wrong."""

    question_id: str
    index: int
    error: str

    @property
    def key(self) -> Key:
        """Question id and sample index."""
        return self.question_id, self.index

    def to_row(self) -> dict[str, Any]:
        """Return one flat object, ready for JSON."""
        return {"question": self.question_id, "index": self.index, "error": self.error}

    @classmethod
    def from_row(cls, row: object) -> Self:
        """Parse a row that `to_row` made; raises `DataError` where a field is missing."""
        row = _require_fields(row, ("question", "index", "error"))
        return cls(row["question"], row["index"], row["error"])


def _require_fields(row: object, expected: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError("expected an object with a sample's fields")
    missing = [name for name in expected if name not in row]
    if missing:
        raise DataError(f"has no {', no '.join(missing)}")
    return row


class JsonlFile:
    """A JSONL file open for appending. Every line is complete, unless a crash tore the last one."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises `OSError`."""
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self._descriptor).st_size

    def lock(self) -> bool:
        """Lock the file until `close`; return False if another process holds the lock."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def truncate(self, num_bytes: int) -> None:
        """Drop everything after the first `num_bytes`."""
        os.ftruncate(self._descriptor, num_bytes)

    def drop_torn_line(self) -> None:
        """Drop an incomplete line at the end, left by a crash."""
        ends = [end for _, _, end in complete_lines(self.path)]
        self.truncate(ends[-1] if ends else 0)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append lines in one write and sync them to disk.

        Raises:
            DataError: the disk is full or fails; the file is as it was before.
        """
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        # Half a surrogate pair cannot be written as UTF-8; a model's text may end in one.
        left = memoryview("".join(lines).encode(errors="replace"))
        before = self.num_bytes
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):
                self.truncate(before)
            raise DataError(
                f"cannot write {self.path} ({error.strerror}); make room, then run the same "
                "command again: finished samples are safe, and the command resumes after them"
            ) from None

    def close(self) -> None:
        """Close the file and release its lock."""
        os.close(self._descriptor)


def complete_lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yield number (from 1), content and end offset of each line that ends in a line feed.

    Lines are split at line feeds alone, since JSON may hold U+2028 as it is. A torn last line is
    left out.
    """
    end = 0
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        end += len(line) + 1
        yield number, line, end


def write_atomically(path: Path, content: str) -> None:
    """Write a small file so that a reader finds either the new content or the old.

    Raises:
        DataError: the disk is full or fails.
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
    """Sync a folder's entries to disk, so that a new file survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class RunRecord:
    """Content of `run.json`."""

    run_id: str
    settings: Mapping[str, Any]
    """Everything that can change the result. A run is resumed only with equal settings."""
    about: Mapping[str, Any]
    """Place and time of the run's beginning, which may differ when the run is resumed, and its
    sessions; see `RunFolder.begin_session`."""


class Extent(NamedTuple):
    """The stored part of a run."""

    stored: int
    total: int
    unit: str
    """`sample`, or `question` where the program decides how many samples a question has."""

    @classmethod
    def of(
        cls, question_ids: Collection[str], asked: int, num_samples: int, *, stops_early: bool
    ) -> Self:
        """Count a run's stored samples.

        Args:
            question_ids: the question of each stored sample.
            asked: number of questions.
            num_samples: most samples of each.
        """
        if stops_early:
            return cls(len(set(question_ids)), asked, "question")
        return cls(len(question_ids), asked * num_samples, "sample")


@dataclass(frozen=True)
class Run:
    """Content of a run's folder."""

    path: Path
    record: RunRecord
    samples: tuple[GradedSample, ...]
    """Complete samples, in the order in which they ended."""
    failures: tuple[Failure, ...] = ()
    """Samples that are missing because a living server failed them."""

    @property
    def is_complete(self) -> bool:
        """True if no sample is left to generate."""
        settings = self.record.settings
        extent = Extent.of(
            [graded.question_id for graded in self.samples],
            settings["questions"]["asked"],
            settings["num_samples"],
            stops_early=any(graded.written_together is not None for graded in self.samples),
        )
        return extent.stored == extent.total


class RunFolder:
    """A run that is open for writing, by one process at a time.

    Samples are on disk once `append` returns. Torn lines at the end are dropped on opening; where
    the lines of a question are written together, all lines of a torn question are dropped, and the
    question is sampled again.
    """

    def __init__(self, path: Path, file: JsonlFile) -> None:
        """Private: use `open_run`."""
        self.path = path
        self.samples: list[GradedSample] = []
        self.failures: dict[Key, Failure] = {}
        """Samples that failed and have not been generated since."""
        self._file = file
        self._failures_file: JsonlFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, so that another process may open the run."""
        self._file.close()
        if self._failures_file:
            self._failures_file.close()

    def begin_session(self, requests: int) -> None:
        """Record in `run.json` that samples are generated from now on.

        A session before the first stored sample leaves no trace, and sessions of an earlier
        lim-sglang, which recorded none, count as one.

        Args:
            requests: most requests that each server is sent at the same time.

        Raises:
            DataError: the disk is full or fails.
        """
        record = read_record(self.path)
        before = record.about.get("sessions") or [{"requests": None}]
        has_begun = bool(self.samples or self.failures)
        sessions = [*(before if has_begun else []), {"requests": requests}]
        write_record(self.path, replace(record, about={**record.about, "sessions": sessions}))

    def add_to_session(self, facts: Mapping[str, Any]) -> None:
        """Record in `run.json` what became of the session that was begun last.

        Raises:
            DataError: the disk is full or fails.
        """
        record = read_record(self.path)
        *before, last = record.about["sessions"]
        about = {**record.about, "sessions": [*before, {**last, **facts}]}
        write_record(self.path, replace(record, about=about))

    def append(self, *samples: GradedSample) -> None:
        """Store samples, all of them or none.

        Raises:
            DataError: the disk is full or fails; earlier samples stay.
        """
        self._file.append(sample.to_row() for sample in samples)
        self.samples += samples
        for sample in samples:
            self.failures.pop(sample.key, None)

    def append_failure(self, failure: Failure) -> None:
        """Store a failure, so that a resumed run does not try the sample forever.

        Raises:
            DataError: the disk is full or fails.
        """
        if not self._failures_file:
            self._failures_file = _open_failures(self.path / FAILURES_FILE)
        self._failures_file.append([failure.to_row()])
        self.failures[failure.key] = failure

    def load(self) -> None:
        """Read the stored samples and failures, and drop torn lines."""
        self.samples, num_bytes = read_samples(self._file.path)
        self._file.truncate(num_bytes)
        self.failures = read_failures(self.path, self.samples)


def refuse_other_writers(path: Path) -> None:
    """Refuse a run that another process is writing, before anything slow is begun.

    Raises:
        DataError: the run is locked.
    """
    if (path / SAMPLES_FILE).exists():
        with closing(JsonlFile(path / SAMPLES_FILE)) as file:
            _lock(file)


def _lock(file: JsonlFile) -> None:
    if not file.lock():
        raise DataError(
            f"another lim eval is writing to {file.path.parent}; wait for its end, "
            "or name another folder with --out"
        )


def open_run(path: Path, record: RunRecord, questions: Sequence["Question"] = ()) -> RunFolder:
    """Begin the run in `path`, or open the run that was begun there.

    Args:
        questions: of the run; errors name those that have changed.

    Raises:
        DataError: the folder holds a run of other settings (each is named), or folders of runs,
            another process is writing there, a line is damaged, or the folder cannot be written.
    """
    if not (path / RUN_FILE).exists() and (inside := next(path.rglob(RUN_FILE), None)):
        raise DataError(
            f"{path} holds runs, such as {inside.parent}; name another folder with --out"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = JsonlFile(path / SAMPLES_FILE)
    except OSError as error:
        raise DataError(
            f"cannot write to {path} ({error.strerror}); name another folder with --out"
        ) from None
    folder = RunFolder(path, file)
    try:
        _lock(file)
        _check_or_write_record(path, record, questions, is_empty=file.num_bytes == 0)
        folder.load()
    except BaseException:
        file.close()
        raise
    return folder


@dataclass(frozen=True)
class AskedQuestion:
    """A question of a run, for reports; without a text if none was stored, or to be shown."""

    gold: str
    text: str | None


def write_questions(path: Path, questions: Mapping[str, AskedQuestion]) -> None:
    """Write the questions of a run, by id, into its folder, unless exactly these are there.

    Raises:
        DataError: the disk is full or fails.
    """
    file = path / QUESTIONS_FILE
    lines = (json.dumps({"id": name, **asdict(each)}) for name, each in questions.items())
    content = "".join(f"{line}\n" for line in lines)
    if not file.exists() or file.read_bytes() != content.encode():
        write_atomically(file, content)


def read_questions(path: Path) -> dict[str, AskedQuestion]:
    """Return the questions of a run by id; of a run that stored none, those with samples.

    Raises:
        DataError: a line is damaged or missing.
    """
    file = path / QUESTIONS_FILE
    if not file.exists():
        samples, _ = read_samples(path / SAMPLES_FILE)
        return {graded.question_id: AskedQuestion(graded.gold, None) for graded in samples}
    questions = {}
    way_out = "run its lim eval command again, or delete the file"
    for number, line, _ in complete_lines(file):
        try:
            row = json.loads(line)
            questions[row["id"]] = AskedQuestion(row["gold"], row["text"])
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"{file}, line {number} is no question ({problem!r}): {way_out}"
            ) from None
    asked = read_record(path).settings["questions"]["asked"]
    if len(questions) != asked:
        raise DataError(f"{file} holds {len(questions)} of the run's {asked} questions: {way_out}")
    return questions


def write_record(path: Path, record: RunRecord) -> None:
    """Write the `run.json` of a folder; raises `DataError` where the disk is full or fails."""
    write_atomically(path / RUN_FILE, json.dumps(asdict(record), indent=2) + "\n")


def _check_or_write_record(
    path: Path, record: RunRecord, questions: Sequence["Question"], *, is_empty: bool
) -> None:
    if (path / RUN_FILE).exists():
        stored = read_record(path).settings
        with suppress(DataError) if is_empty else nullcontext():  # with no sample it begins anew
            _check_stored(path, stored, record, questions)
            return
    elif not is_empty:
        raise DataError(f"{path} has samples but no {RUN_FILE}; name another folder with --out")
    (path / FAILURES_FILE).unlink(missing_ok=True)  # of other settings
    write_record(path, record)


def _check_stored(
    path: Path, stored: Mapping[str, Any], record: RunRecord, questions: Sequence["Question"]
) -> None:
    if "code_sha256" in stored:  # in the place of the sampling version
        raise DataError(
            f"the run in {path} was begun by an earlier lim-sglang, which recorded no sampling "
            "version: it can be graded, compared and reported, but not resumed; name another "
            "folder with --out"
        )
    check_settings(path, stored, record.settings, questions, partial(read_questions, path))


def _open_failures(path: Path) -> JsonlFile:
    try:
        file = JsonlFile(path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); make room") from None
    file.drop_torn_line()
    return file


def load_run(path: Path) -> Run:
    """Read a run, also one that another process is writing.

    Raises:
        DataError: the folder holds no run, or a line of its files is damaged.
    """
    record = read_record(path)
    samples, _ = read_samples(path / SAMPLES_FILE)
    failures = read_failures(path, samples)
    return Run(path, record, tuple(_with_new_grades(path, samples)), tuple(failures.values()))


def read_record(path: Path) -> RunRecord:
    """Read the `run.json` of a folder.

    Raises:
        ConfigError: the folder holds no run.
        DataError: the file is not in the form that this version writes.
    """
    try:
        content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        return RunRecord(content["run_id"], content["settings"], content["about"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        raise (ConfigError if is_missing else DataError)(
            f"{path / RUN_FILE} is no record of a run ({error}): name the folder of a run, "
            "or another one for a new run"
        ) from None


def read_samples(path: Path) -> tuple[list[GradedSample], int]:
    """Return the samples of a file, and how many bytes of the file hold them.

    Torn writes at the end are left out: an incomplete line, or some of the lines of a question that
    are written together.

    Raises:
        DataError: the file cannot be read, or an earlier line is damaged.
    """
    samples: dict[Key, GradedSample] = {}
    num_bytes = 0
    question: list[GradedSample] = []
    try:
        for number, line, end in complete_lines(path):
            try:
                graded = GradedSample.from_row(json.loads(line))
                _check_order(graded, question, samples)
            except (ValueError, DataError) as problem:
                raise DataError(
                    f"{path}, line {number}: {problem}; repair or delete the line"
                ) from None
            question.append(graded)
            if graded.written_together in (None, len(question)):
                samples |= {each.key: each for each in question}
                num_bytes, question = end, []
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from None
    return list(samples.values()), num_bytes


def _check_order(
    graded: GradedSample, question: list[GradedSample], samples: Mapping[Key, GradedSample]
) -> None:
    """Refuse a sample that was seen before, or that stands among the lines of another question."""
    if graded.key in samples or graded.key in {each.key for each in question}:
        raise DataError(f"sample {graded.key} occurs a second time")
    first = question[0] if question else graded
    if (graded.question_id, graded.written_together) != (first.question_id, first.written_together):
        raise DataError(
            f"the question {first.question_id!r} has {len(question)} lines before it, "
            f"and should have {first.written_together}"
        )


def read_failures(path: Path, samples: Sequence[GradedSample]) -> dict[Key, Failure]:
    """Return the last failure of each sample of a run that has not been generated since.

    Raises:
        DataError: a line is damaged.
    """
    file = path / FAILURES_FILE
    failures: dict[Key, Failure] = {}
    if not file.exists():
        return failures
    for number, line, _ in complete_lines(file):
        try:
            failure = Failure.from_row(json.loads(line))
        except (ValueError, DataError) as problem:
            raise DataError(
                f"{file}, line {number}: {problem}; repair or delete the line"
            ) from None
        failures[failure.key] = failure
    stored = {graded.key for graded in samples}
    return {key: failure for key, failure in failures.items() if key not in stored}


class Verdict(NamedTuple):
    """A row of `grades.jsonl`."""

    answer: str | None
    correct: bool
    by: str | None
    """Grader that gave the verdict; None: an early version, which did not record itself."""


def read_grades(path: Path) -> dict[Key, Verdict]:
    """Return the verdicts of a run's `grades.jsonl`; none where there is no such file.

    Raises:
        DataError: a line is damaged.
    """
    file = path / GRADES_FILE
    grades: dict[Key, Verdict] = {}
    for number, line, _ in complete_lines(file) if file.exists() else ():
        try:
            row = json.loads(line)
            verdict = Verdict(row["answer"], row["correct"], row.get("by"))
            grades[row["question"], row["index"]] = verdict
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise DataError(
                f"{file}, line {number} is no verdict ({problem!r}): delete the file, then "
                f"`lim grade {path}` writes it again"
            ) from None
    return grades


def _with_new_grades(path: Path, samples: Sequence[GradedSample]) -> list[GradedSample]:
    """Return the samples with the answers and verdicts of `grades.jsonl`, where it has any.

    Raises:
        DataError: a line is damaged.
    """
    grades = read_grades(path)
    return [
        replace(graded, sample=replace(graded.sample, answer=found.answer), correct=found.correct)
        if (found := grades.get(graded.key))
        else graded
        for graded in samples
    ]
