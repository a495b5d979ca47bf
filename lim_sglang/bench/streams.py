"""When a server's tokens arrived, and what follows from it: speed over time, latencies. Pure.

A stream is one request's answer as the client sees it. Its first chunk is prefill's work and counts
nowhere. The measured stretch begins when the requests that started together have all had their
first token, and ends with the last token that arrived.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

HEAD_START = 64
"""Tokens of the foremost stream; streams that begin later have waited for room, not for prefill."""
CURVE_STEP_S = 0.1
"""How finely a run is remembered, to be compared with another."""


@dataclass
class Stream:
    """One request's chunks, in the order of arrival."""

    times_s: "array[float]" = field(default_factory=lambda: array("d"))
    """When each chunk arrived, on the client's clock."""
    totals: "array[int]" = field(default_factory=lambda: array("l"))
    """Tokens of the answer up to and with each chunk."""
    retractions: int = 0
    """How often the server took its KV cache away and prefilled it again."""
    finished: bool = False

    def arrive(self, at_s: float, total: int) -> None:
        """Note a chunk; one without a new token is none."""
        if total > self.num_tokens:
            self.times_s.append(at_s)
            self.totals.append(total)

    @property
    def num_tokens(self) -> int:
        """Tokens that have arrived."""
        return self.totals[-1] if self.totals else 0

    def decoded(self) -> Iterator[tuple[float, float, int]]:
        """Every chunk but the first: when the one before it came, when it came, its tokens."""
        for index in range(1, len(self.times_s)):
            new = self.totals[index] - self.totals[index - 1]
            yield self.times_s[index - 1], self.times_s[index], new


@dataclass(frozen=True)
class Stretch:
    """The measured part of a run, on the client's clock."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s


def measured_stretch(streams: Sequence[Stream]) -> Stretch | None:
    """From the last first token of the streams that began together to the last token of all.

    None where no token came but first ones.
    """
    begun = [stream for stream in streams if stream.times_s]
    if not any(len(stream.times_s) > 1 for stream in begun):
        return None
    settled_s = min(_reaches(stream, HEAD_START) for stream in begun)
    start_s = max(s.times_s[0] for s in begun if s.times_s[0] <= settled_s)
    end_s = max(stream.times_s[-1] for stream in begun)
    return Stretch(start_s, end_s) if end_s > start_s else None


def _reaches(stream: Stream, num_tokens: int) -> float:
    """When a stream had so many tokens, or its last one."""
    index = next((n for n, total in enumerate(stream.totals) if total >= num_tokens), -1)
    return stream.times_s[index]


def arrivals(streams: Sequence[Stream], stretch: Stretch) -> list[tuple[float, int]]:
    """Decoded tokens within the stretch, as seconds from its start and how many, in order."""
    return sorted(
        (at_s - stretch.start_s, new)
        for stream in streams
        for _, at_s, new in stream.decoded()
        if stretch.start_s < at_s <= stretch.end_s
    )


def tokens_per_bin(found: Sequence[tuple[float, int]], seconds: float, bin_s: float) -> list[int]:
    """Tokens in each `bin_s` seconds of a stretch; the last bin may be shorter.

    Args:
        found: `arrivals`.
        seconds: the stretch's length.
    """
    bins = [0] * max(1, -int(-seconds // bin_s))
    for at_s, new in found:
        bins[min(int(at_s // bin_s), len(bins) - 1)] += new
    return bins


@dataclass(frozen=True)
class Latencies:
    """Milliseconds between two tokens of one stream, over all streams."""

    p50: float
    p99: float


def token_latencies(streams: Sequence[Stream], stretch: Stretch) -> Latencies | None:
    """Inter-token latency. The tokens of one chunk share the time since the chunk before evenly.

    Waits that began before the stretch are left out: there, prefill of others was part of them.
    None where no wait is left.
    """
    waits = sorted(
        ((at_s - before_s) / new, new)
        for stream in streams
        for before_s, at_s, new in stream.decoded()
        if stretch.start_s <= before_s
    )
    if not waits:
        return None
    up_to = list(accumulate(new for _, new in waits))

    def percentile(share: float) -> float:
        """The smallest wait that so large a share of the tokens does not exceed."""
        index = bisect_right(up_to, share * up_to[-1] - 1e-9)
        return 1e3 * waits[min(index, len(waits) - 1)][0]

    return Latencies(percentile(0.5), percentile(0.99))


@dataclass(frozen=True)
class Curve:
    """How many tokens there were after each `CURVE_STEP_S` of a stretch."""

    totals: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, found: Sequence[tuple[float, int]], seconds: float) -> "Curve":
        """From `arrivals` and the stretch's length."""
        return cls(tuple(accumulate(tokens_per_bin(found, seconds, CURVE_STEP_S))), seconds)

    def seconds_for(self, num_tokens: int) -> float:
        """When there were so many tokens, between two marks in proportion."""
        index = next(n for n, total in enumerate(self.totals) if total >= num_tokens)
        before = self.totals[index - 1] if index else 0
        start_s = index * CURVE_STEP_S
        end_s = min(start_s + CURVE_STEP_S, self.seconds)
        share = (num_tokens - before) / max(self.totals[index] - before, 1)
        return start_s + share * (end_s - start_s)


def speedup(dense: Curve, curve: Curve) -> float:
    """Seconds of the dense run over this one's for as many tokens as both have decoded.

    So a run that a time limit has cut is compared over the same work, at the same context.
    """
    both = min(dense.totals[-1], curve.totals[-1])
    return dense.seconds_for(both) / curve.seconds_for(both)
