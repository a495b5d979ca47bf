"""A run as it is stored, for reading: with the verdicts that `lim grade` has renewed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lim_sglang.errors import DataError
from lim_sglang.evals.lines import whole_lines
from lim_sglang.evals.records import Failure, GradedSample, Key
from lim_sglang.evals.store import (
    SAMPLES_FILE,
    RunRecord,
    read_failures,
    read_record,
    read_samples,
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
