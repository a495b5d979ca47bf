"""A graded sample, and its line in `samples.jsonl`."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from lim_sglang.errors import DataError
from lim_sglang.programs.records import Sample, SampleState

SAMPLE_FIELDS = tuple(field.name for field in fields(Sample))
REQUIRED_FIELDS = tuple(field.name for field in fields(Sample) if field.default is MISSING)
"""The others came later; a line that was written before has their defaults."""


@dataclass(frozen=True)
class GradedSample:
    """One finished sample with its verdict. It quotes the model, never the question."""

    question_id: str
    gold: str
    correct: bool
    sample: Sample

    @property
    def key(self) -> tuple[str, int]:
        """What occurs once in a run: the question's id and the sample's index."""
        return self.question_id, self.sample.index

    def to_row(self) -> dict[str, Any]:
        """One flat object, ready for JSON."""
        head = {"question": self.question_id, "gold": self.gold, "correct": self.correct}
        return {**head, **asdict(self.sample)}

    @classmethod
    def from_row(cls, row: object) -> Self:
        """Read back what `to_row` gave.

        Raises:
            DataError: a field is missing or the state is unknown.
        """
        if not isinstance(row, Mapping):
            raise DataError("expected an object with a sample's fields")
        expected = ("question", "gold", "correct", *REQUIRED_FIELDS)
        missing = [name for name in expected if name not in row]
        if missing:
            raise DataError(f"has no {', no '.join(missing)}")
        if row["state"] not in list(SampleState):
            raise DataError(f"unknown state {row['state']!r}; expected {', '.join(SampleState)}")
        sample = {name: row[name] for name in SAMPLE_FIELDS if name in row}
        sample["state"] = SampleState(row["state"])
        return cls(
            question_id=row["question"],
            gold=row["gold"],
            correct=row["correct"],
            sample=Sample(**sample),
        )
