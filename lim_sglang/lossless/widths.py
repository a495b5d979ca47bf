"""Number of drafts of a cycle: a given one, or the one that promises most tokens a second.

The promise is the time of a cycle, from passes that were timed when the server started, and the
share of drafts that the last cycles accepted. Cycles that took longer waited for the host, and are
then expected to take as long again.
"""

import logging
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from lim_sglang.errors import reasons_that_hold
from lim_sglang.kernels.launch import MAX_RUN_ROWS
from lim_sglang.policies.lossless import Lossless

logger = logging.getLogger(__name__)

MIN_GAIN = 1.03
"""Tokens a second, in those of dense steps, below which nothing is drafted."""
SCORE_FACTOR = 0.75
"""Scoring of one layer, and its selection, over that layer's dense attention: scoring reads K
alone."""
CYCLE_MS = 0.7
"""Milliseconds of a cycle beside its passes: sampling of verified rows, slots and lists."""
GPU_BOUND = 1.15
"""A cycle that takes no longer than this, in times of its passes, waited for the GPU alone."""
SEEN_CYCLES = 5
"""Cycles of a width whose median time counts."""
FIRST_ACCEPTANCE = 0.9
"""Share of drafts that is expected of a server that has drafted nothing yet."""
MEMORY_CYCLES = 32
"""Cycles after which what was seen weighs a third."""
RETRY_CYCLES = 128
"""Cycles without drafts, for their cost, after which one drafts, since texts change; twice as many
after each that changed nothing."""


def reasons_against_verifying(model_config: Any) -> list[str]:
    """List what keeps a GPU from verifying one draft of a model."""
    heads = model_config.num_attention_heads
    group = heads // (getattr(model_config, "num_key_value_heads", None) or heads)
    return reasons_that_hold(
        (
            2 * group > MAX_RUN_ROWS,
            f"policy lossless on a GPU: a KV head has {group} query heads, and a verification "
            f"attends for up to {MAX_RUN_ROWS} of its queries: use a model with at most "
            f"{MAX_RUN_ROWS // 2}, or another policy",
        )
    )


def draft_choices(policy: Lossless, model_config: Any, *, on_cpu: bool) -> tuple[int, ...]:
    """Return the numbers of tokens that a cycle may draft: on a GPU no more than one program of a
    verification attends for, of which the log tells."""
    if on_cpu:
        return policy.choices(on_cpu=True)
    group = model_config.num_attention_heads // model_config.num_key_value_heads
    choices = policy.choices(on_cpu=False, most=MAX_RUN_ROWS // group - 1)
    if isinstance(policy.draft_tokens, int) and choices[0] < policy.draft_tokens:
        logger.warning(
            "%d drafts a cycle, not %d: a KV head has %d query heads, and up to %d of its queries "
            "are verified at once",
            *(choices[0], policy.draft_tokens, group, MAX_RUN_ROWS),
        )
    return choices


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one kind of pass, timed on the GPU that serves."""

    rows: Sequence[int]
    """Requests of the timed passes, ascending."""
    ms: Sequence[float]
    """Times of passes of as many requests, which attend to next to nothing, or to whole lists."""
    token_ms: float = 0.0
    """Time of attention, in all layers, to one more token of one request."""

    def of(self, requests: int, tokens: int = 0) -> float:
        """Return the time of a pass over some requests that attend to some tokens together."""
        return _between(requests, self.rows, self.ms) + self.token_ms * tokens


@dataclass(frozen=True)
class PassTimes:
    """Times of the passes of a cycle."""

    draft: StepTimes
    dense: Mapping[int, StepTimes]
    """By the tokens of each request: 1 in a dense step, more in a verification."""
    num_layers: int
    num_select: int

    def step(self, lengths: Sequence[int]) -> float:
        """Return the time of a dense step over requests of these lengths."""
        return self.dense[1].of(len(lengths), sum(lengths))

    def cycle(self, lengths: Sequence[int], drafts: int) -> float:
        """Return the time of a cycle."""
        requests, tokens = len(lengths), sum(lengths)
        share = SCORE_FACTOR * self.num_select / self.num_layers
        selection = share * self.dense[1].token_ms * tokens
        verification = self.dense[drafts + 1].of(requests, tokens)
        return drafts * self.draft.of(requests) + selection + verification + CYCLE_MS


def _between(rows: int, at: Sequence[int], times: Sequence[float]) -> float:
    """Interpolate; beyond the last two, go on by their slope, which is not less than none."""
    if rows <= at[-1] or len(at) == 1:
        return float(np.interp(rows, at, times))
    slope = max(0.0, (times[-1] - times[-2]) / (at[-1] - at[-2]))
    return times[-1] + slope * (rows - at[-1])


class Widths(ABC):
    """Choice of a cycle's drafts."""

    @abstractmethod
    def choose(self, lengths: Sequence[int]) -> int:
        """Return how many tokens to draft for requests of these lengths."""

    @abstractmethod
    def saw(self, cycle: "Cycle") -> None:
        """Learn from a cycle that has ended."""


@dataclass(frozen=True)
class Cycle:
    """Record of a cycle that has ended."""

    lengths: Sequence[int]
    """Tokens of each request before it."""
    drafts: int
    accepted: Sequence[int]
    """Drafts accepted of each request whose run may have more than one token."""
    ms: float | None
    """Since the end of the cycle before; None where that was no cycle."""


@dataclass(frozen=True)
class GivenWidth(Widths):
    """Always the same number."""

    drafts: int

    def choose(self, lengths: Sequence[int]) -> int:
        """Return the number."""
        return self.drafts

    def saw(self, cycle: Cycle) -> None:
        """Do nothing."""


class HostTimes:
    """Times of cycles that waited for the host, whose work depends on the number of drafts, and
    hardly on the requests."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=SEEN_CYCLES))

    def record(self, drafts: int, expected_ms: float, ms: float) -> None:
        """Keep a cycle's time, or that the GPU was what it waited for."""
        self._seen[drafts].append(ms if ms > GPU_BOUND * expected_ms else 0.0)

    def longest(self, drafts: int, expected_ms: float) -> float:
        """Return the time of a cycle whose passes take `expected_ms` on the GPU."""
        seen = self._seen[drafts]
        # The first cycles of a width compile kernels.
        return max(expected_ms, median(seen)) if len(seen) == SEEN_CYCLES else expected_ms


class WidthsByCost(Widths):
    """The number whose cycle promises most tokens a second, 0 where a dense step does."""

    def __init__(self, choices: Sequence[int], times: PassTimes) -> None:
        """Begin with an acceptance that most texts reach.

        Args:
            choices: numbers of drafts, 0 among them.
        """
        self._choices, self._times = [each for each in choices if each], times
        self._host = HostTimes()
        self._acceptance = FIRST_ACCEPTANCE
        self._undrafted, self._patience = 0, RETRY_CYCLES

    def choose(self, lengths: Sequence[int]) -> int:
        """Return the number."""
        best, gain = self._best(lengths, self._acceptance)
        if gain >= MIN_GAIN:
            self._undrafted, self._patience = 0, RETRY_CYCLES
            return best
        self._undrafted += 1
        if self._undrafted < self._patience:
            return 0
        self._undrafted, self._patience = 0, 2 * self._patience
        # A cycle tells the acceptance, where that is the reason.
        best, gain = self._best(lengths, FIRST_ACCEPTANCE)
        return best if gain >= MIN_GAIN else 0

    def saw(self, cycle: Cycle) -> None:
        """Move the acceptance towards that of the cycle; keep its time."""
        if cycle.ms is not None:
            self._host.record(cycle.drafts, self._on_gpu(cycle.lengths, cycle.drafts), cycle.ms)
        if cycle.drafts and cycle.accepted:
            # Each draft that was judged, the first rejected one included, is a trial.
            trials = sum(min(count + 1, cycle.drafts) for count in cycle.accepted)
            share = sum(cycle.accepted) / trials
            self._acceptance += (share - self._acceptance) / MEMORY_CYCLES

    def _best(self, lengths: Sequence[int], acceptance: float) -> tuple[int, float]:
        """Return the best number of drafts above 0, and its tokens a second in those of 0."""
        dense = self._time(lengths, 0)
        gains = {
            drafts: _tokens(drafts, acceptance) * dense / self._time(lengths, drafts)
            for drafts in self._choices
        }
        best = max(gains, key=lambda drafts: gains[drafts])
        return best, gains[best]

    def _time(self, lengths: Sequence[int], drafts: int) -> float:
        return self._host.longest(drafts, self._on_gpu(lengths, drafts))

    def _on_gpu(self, lengths: Sequence[int], drafts: int) -> float:
        return self._times.cycle(lengths, drafts) if drafts else self._times.step(lengths)


def _tokens(drafts: int, acceptance: float) -> float:
    """Return the tokens that a request is expected to get by a cycle."""
    return sum(acceptance**place for place in range(drafts + 1))
