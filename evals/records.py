"""A graded sample and a failed one, and their lines in a run's folder."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from lim_sglang.errors import DataError
from lim_sglang.programs.records import Sample, SampleState

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
