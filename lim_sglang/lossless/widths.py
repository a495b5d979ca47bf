"""How many tokens a cycle drafts: a given number, or the one that promises most tokens a second.

The promise is the time of a cycle, from passes that were timed when the server started, and the
share of drafts that the last cycles accepted.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_GAIN = 1.03
"""Tokens a second, in those of dense steps, below which nothing is drafted."""
VERIFY_FACTOR = 1.2
"""Dense attention of several tokens a request over that of one: an H200, 5 to 16 tokens, in one
tile of FlashInfer's (`docs/log`)."""
SCORE_FACTOR = 0.75
"""Scoring of one layer, and its selection, over that layer's dense attention: scoring reads K
alone."""
CYCLE_MS = 0.7
"""Of a cycle beside its passes: sampling of the verified rows, and the host's gap."""
FIRST_ACCEPTANCE = 0.9
"""Share of drafts that is expected of a server that has drafted nothing yet."""
MEMORY_CYCLES = 32
"""Cycles after which what was seen weighs a third."""
RETRY_CYCLES = 128
"""Cycles without drafts, for their cost, after which one drafts: texts change."""


@dataclass(frozen=True)
class PassTimes:
    """Milliseconds of passes, timed on the GPU that serves."""

    rows: Sequence[int]
    """Rows of the timed steps, ascending."""
    dense_ms: Sequence[float]
    """Of a dense step of as many rows, which attend to next to nothing."""
    draft_rows: Sequence[int]
    draft_ms: Sequence[float]
    """Of a draft of as many rows, which attend to whole lists."""
    token_ms: float
    """Of dense attention, in all layers, to one token of one request."""
    num_layers: int
    num_select: int

    def dense(self, rows: int) -> float:
        """Return the time of a dense step but for its attention."""
        return _between(rows, self.rows, self.dense_ms)

    def draft(self, rows: int) -> float:
        """Return the time of a draft."""
        return _between(rows, self.draft_rows, self.draft_ms)

    def step(self, lengths: Sequence[int]) -> float:
        """Return the time of a dense step over requests of these lengths."""
        return self.dense(len(lengths)) + self.token_ms * sum(lengths)

    def cycle(self, lengths: Sequence[int], drafts: int) -> float:
        """Return the time of a cycle."""
        attention = self.token_ms * sum(lengths)
        selection = SCORE_FACTOR * self.num_select / self.num_layers * attention
        verification = self.dense(len(lengths) * (drafts + 1)) + VERIFY_FACTOR * attention
        return drafts * self.draft(len(lengths)) + selection + verification + CYCLE_MS


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
    def saw(self, drafts: int, accepted: Sequence[int]) -> None:
        """Learn how many drafts of each request were accepted in a cycle."""


@dataclass(frozen=True)
class GivenWidth(Widths):
    """Always the same number."""

    drafts: int

    def choose(self, lengths: Sequence[int]) -> int:
        """Return the number."""
        return self.drafts

    def saw(self, drafts: int, accepted: Sequence[int]) -> None:
        """Do nothing."""


class WidthsByCost(Widths):
    """The number whose cycle promises most tokens a second, 0 where a dense step does."""

    def __init__(self, choices: Sequence[int], times: PassTimes) -> None:
        """Begin with an acceptance that most texts reach.

        Args:
            choices: numbers of drafts, 0 among them.
        """
        self._choices, self._times = [each for each in choices if each], times
        self._acceptance = FIRST_ACCEPTANCE
        self._undrafted = 0

    def choose(self, lengths: Sequence[int]) -> int:
        """Return the number."""
        step = self._times.step(lengths)
        gains = {n: self._tokens(n) * step / self._times.cycle(lengths, n) for n in self._choices}
        best = max(gains, key=lambda drafts: gains[drafts])
        if gains[best] >= MIN_GAIN:
            self._undrafted = 0
            return best
        self._undrafted += 1
        # A retry tells the acceptance, and costs little where it was low alone.
        could_gain = self._could_gain(lengths, step)
        if could_gain and self._undrafted % RETRY_CYCLES == 0:
            return self._choices[0]
        return 0

    def saw(self, drafts: int, accepted: Sequence[int]) -> None:
        """Move the acceptance towards that of the cycle."""
        if not drafts or not accepted:
            return
        # Each draft that was judged, the first rejected one included, is a trial.
        trials = sum(min(count + 1, drafts) for count in accepted)
        share = sum(accepted) / trials
        self._acceptance += (share - self._acceptance) / MEMORY_CYCLES

    def _tokens(self, drafts: int, acceptance: float | None = None) -> float:
        """Return the tokens that a request is expected to get by a cycle."""
        share = self._acceptance if acceptance is None else acceptance
        return sum(share**place for place in range(drafts + 1))

    def _could_gain(self, lengths: Sequence[int], step: float) -> bool:
        """Return True if drafting would gain at the acceptance that most texts reach."""
        return any(
            self._tokens(n, FIRST_ACCEPTANCE) * step / self._times.cycle(lengths, n) >= MIN_GAIN
            for n in self._choices
        )
