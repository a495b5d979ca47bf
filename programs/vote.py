"""The vote over the samples of one question: pure, and the same in whatever order they ended."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from lim_sglang.programs.schema import COMPLETED_STATES, Sample, SampleState

Equivalent = Callable[[str, str], bool]
"""Returns True if two answers are equal."""


class Order(StrEnum):
    """Ranking of the groups. A tie that remains goes to the group with the earlier sample."""

    BY_VOTES = "votes"
    """More votes, then more weight: self-consistency, arXiv 2203.11171."""
    BY_CONFIDENCE = "confidence"
    """More weight, then more votes: DeepConf's confidence-weighted vote, arXiv 2508.15260."""
    SHORTER_FIRST = "shorter"
    """More votes, then the shortest chain: short-m@k, arXiv 2505.17813."""


@dataclass(frozen=True)
class Group:
    """Samples that gave the same answer."""

    answer: str
    """The answer as the earliest sample wrote it."""
    indices: tuple[int, ...]
    """`Sample.index` of each, ascending."""
    weight: float
    """Sum of the confidences; the number of votes unless every sample with a vote has one."""
    shortest: int
    """Tokens of the shortest sample."""

    @property
    def votes(self) -> int:
        """Number of samples with this answer."""
        return len(self.indices)


@dataclass(frozen=True)
class Tally:
    """A counted vote: each sample is in one group or in exactly one of the four counts."""

    groups: tuple[Group, ...]
    """Groups as the order ranks them."""
    unanswered: int
    """Samples that finished without stating an answer."""
    truncated: int
    """Samples that reached `max_tokens` before stating an answer."""
    failed: int
    aborted: int
    """Samples that were ended early; their answers so far are no votes."""
    uncounted: int = 0
    """Samples of `truncated` that state an answer, which the program does not count."""

    @property
    def winner(self) -> str | None:
        """The answer of the first group; None if no sample states one."""
        return self.groups[0].answer if self.groups else None

    @property
    def votes(self) -> int:
        """Votes of the winner."""
        return self.groups[0].votes if self.groups else 0

    @property
    def margin(self) -> int:
        """Votes of the winner minus those of the second group; negative if weight beat votes."""
        second = self.groups[1].votes if len(self.groups) > 1 else 0
        return self.votes - second

    def counts(self, sample: Sample) -> bool:
        """Return True if the sample's answer is a vote."""
        return any(sample.index in group.indices for group in self.groups)


def tally(
    samples: Sequence[Sample],
    equivalent: Equivalent,
    order: Order = Order.BY_VOTES,
    *,
    finished_only: bool = False,
) -> Tally:
    """Group the answers of one question's samples.

    Args:
        equivalent: returns True if two answers are equal. An answer joins the first group of which
            it equals all answers, since equality is not transitive: an area of 15 and a perimeter
            of 15 both equal 15.
        order: ranks the groups.
        finished_only: an answer of a sample that was cut off is no vote.
    """
    voting = (SampleState.FINISHED,) if finished_only else COMPLETED_STATES
    groups: dict[str, list[Sample]] = {}
    members: dict[str, list[str]] = {}
    without_vote = []
    uncounted = 0
    for sample in sorted(samples, key=lambda sample: sample.index):
        if sample.answer is None or sample.state not in voting:
            without_vote.append(sample.state)
            uncounted += sample.answer is not None and sample.state is SampleState.TRUNCATED
            continue
        answer = sample.answer
        leader = _leader(answer, members, equivalent)
        groups.setdefault(leader, []).append(sample)
    weighted = all(sample.confidence is not None for group in groups.values() for sample in group)
    found = [_group(answer, voters, weighted) for answer, voters in groups.items()]
    return Tally(
        groups=tuple(sorted(found, key=lambda group: _rank(group, order))),
        unanswered=without_vote.count(SampleState.FINISHED),
        truncated=without_vote.count(SampleState.TRUNCATED),
        failed=without_vote.count(SampleState.FAILED),
        aborted=without_vote.count(SampleState.ABORTED),
        uncounted=uncounted,
    )


def _leader(answer: str, members: dict[str, list[str]], equivalent: Equivalent) -> str:
    """Return the earliest answer of the group that an answer joins, and add the answer to the
    group's members, which are different texts.
    """
    for leader, known in members.items():
        if answer in known:
            return leader
    for leader, known in members.items():
        if all(equivalent(each, answer) for each in known):
            known.append(answer)
            return leader
    members[answer] = [answer]
    return answer


def _group(answer: str, voters: Sequence[Sample], weighted: bool) -> Group:
    # fsum rounds once, so that equal groups weigh the same to the last bit.
    weight = math.fsum(sample.confidence or 0.0 for sample in voters) if weighted else len(voters)
    return Group(
        answer=answer,
        indices=tuple(sample.index for sample in voters),
        weight=float(weight),
        shortest=min(sample.num_tokens for sample in voters),
    )


def _rank(group: Group, order: Order) -> tuple[float, ...]:
    """Return the sort key of a group; the lowest comes first."""
    votes, weight, earliest = -group.votes, -group.weight, group.indices[0]
    return {
        Order.BY_VOTES: (votes, weight, earliest),
        Order.BY_CONFIDENCE: (weight, votes, earliest),
        Order.SHORTER_FIRST: (votes, group.shortest, earliest),
    }[order]
