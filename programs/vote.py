"""The vote over the samples of one question: pure, and the same whatever order they ended in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lim_sglang.programs.records import Sample, SampleState


@dataclass(frozen=True)
class Group:
    """Samples that gave the same answer."""

    answer: str
    """As the earliest of them wrote it."""
    indices: tuple[int, ...]
    """`Sample.index` of each, ascending."""

    @property
    def votes(self) -> int:
        """How many samples gave this answer."""
        return len(self.indices)


@dataclass(frozen=True)
class Tally:
    """Where each sample went: into one group, or into exactly one of the three counts."""

    groups: tuple[Group, ...]
    """Most votes first; at a tie the group with the earlier sample first."""
    unanswered: int
    """Finished without stating an answer."""
    truncated: int
    """Reached `max_tokens` before stating an answer."""
    failed: int

    @property
    def winner(self) -> str | None:
        """The answer with the most votes, None where no sample states one."""
        return self.groups[0].answer if self.groups else None

    @property
    def votes(self) -> int:
        """Votes of the winner."""
        return self.groups[0].votes if self.groups else 0


def tally(samples: Sequence[Sample], same: Callable[[str, str], bool]) -> Tally:
    """Group the answers of one question's samples.

    Args:
        same: whether two answers are equal. An answer joins the first group whose earliest
            answer it equals.
    """
    groups: dict[str, list[int]] = {}
    silent = []
    for sample in sorted(samples, key=lambda sample: sample.index):
        if sample.state is SampleState.FAILED or sample.answer is None:
            silent.append(sample.state)
            continue
        answer = sample.answer
        leader = next((known for known in groups if known == answer or same(known, answer)), answer)
        groups.setdefault(leader, []).append(sample.index)
    # sorted() is stable and the groups stand in the order of their earliest sample.
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    return Tally(
        groups=tuple(Group(answer, tuple(indices)) for answer, indices in ranked),
        unanswered=silent.count(SampleState.FINISHED),
        truncated=silent.count(SampleState.TRUNCATED),
        failed=silent.count(SampleState.FAILED),
    )
