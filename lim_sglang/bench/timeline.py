"""What a GPU did during decode steps, from a trace of torch's profiler: busy, idle, ahead. Pure.

A step lasts from the first kernel of one replay of the decode CUDA graph to the first kernel of the
next. All activities that one call has launched share its correlation id, so those of a replay are
found by it; what is launched singly (sampling, copies of plans) is an activity each.
"""

import json
import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lim_sglang.errors import DataError

GPU_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
HOST_CATEGORIES = frozenset({"cuda_runtime", "cuda_driver"})
GRAPH_LAUNCH = "cudaGraphLaunch"
LEAD_IN = 6
"""Replays left out at the start: there the profiler has just held up the host."""
SMALLEST_GRAPH = 8
"""Activities of a replay that can be a model's."""
NO_JSON = re.compile(r"(?<=: )-?(?:inf|nan)(?=[,\s}])")
"""Figures about a kernel that the profiler divides by zero for, on some devices."""
SHOWN_STEPS = 3
MERGED_US = 1.0
"""Busy intervals with a smaller gap between them are drawn as one."""

Span = tuple[float, float]
"""Start and end, in microseconds."""


@dataclass(frozen=True)
class Event:
    """One activity of the GPU, or one CUDA call of the host."""

    name: str
    start_us: float
    end_us: float
    correlation: int
    """Shared by a call and all that it launched."""
    thread: str


@dataclass(frozen=True)
class Trace:
    """What was recorded, each in order of time, on one clock that starts at 0."""

    gpu: tuple[Event, ...]
    calls: tuple[Event, ...]


@dataclass(frozen=True)
class Replay:
    """One replay of the decode graph, from its first kernel to its last."""

    start_us: float
    end_us: float
    launch: Event | None
    """The host's call, where it was recorded."""


@dataclass(frozen=True)
class Timeline:
    """How busy the GPU was over some steps."""

    steps: int
    step_us: float
    """Mean length of a step, with the profiler on."""
    busy_share: float
    """Of the time, with at least one activity on any stream."""
    idle_us_per_step: float
    between_us_per_step: float
    """Of these, after a replay's last kernel and before the next one's first: the bubble."""
    gap_p50_us: float
    """Of the longest gap of each step."""
    gap_p99_us: float
    largest_gap_us: float
    ahead_p50_us: float | None
    """From the host's return from a launch to the replay's first kernel; negative where the GPU
    waited for the host; None where calls were not recorded."""
    ahead_least_us: float | None


@dataclass(frozen=True)
class Strip:
    """A few consecutive steps to be drawn; microseconds count from the first replay's start."""

    length_us: float
    busy: tuple[Span, ...]
    replays: tuple[Span, ...]
    launches: tuple[Span, ...]
    """The host's calls that launch a replay."""
    waits: tuple[Span, ...]
    """Those in which it waits for the GPU."""
    calls: tuple[Span, ...]
    """All its others."""


def recorded_steps(steps: int) -> int:
    """Decode steps to record, so that so many count: the last one only ends the one before it."""
    return LEAD_IN + steps + 1


def read_trace(text: str) -> Trace:
    """What a Chrome trace in JSON says of GPU and host.

    Raises:
        DataError: it is none, or no GPU activity is in it.
    """
    try:
        found = json.loads(NO_JSON.sub("null", text), strict=False)["traceEvents"]
        gpu = _events(found, GPU_CATEGORIES)
        calls = _events(found, HOST_CATEGORIES)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the trace cannot be read ({type(error).__name__}: {error}), expected was the Chrome "
            "trace of torch's profiler: is it SGLang 0.5.16?"
        ) from None
    if not gpu:
        raise DataError(
            "the trace holds no activity of a GPU: torch's profiler found no CUPTI, or another "
            "profiler holds it; see the server's log"
        )
    zero = min(event.start_us for event in (*gpu[:1], *calls[:1]))
    return Trace(_shifted(gpu, zero), _shifted(calls, zero))


def _events(found: Sequence[Mapping[str, Any]], categories: frozenset[str]) -> list[Event]:
    """Of some categories, in order; records that the profiler could not time have no length."""
    events = [
        Event(
            str(each["name"]),
            float(each["ts"]),
            float(each["ts"]) + float(each["dur"]),
            int(each.get("args", {}).get("correlation", 0)),
            str(each["tid"]),
        )
        for each in found
        if each.get("ph") == "X" and each.get("cat") in categories
    ]
    return sorted((e for e in events if e.end_us > e.start_us), key=lambda event: event.start_us)


def _shifted(events: Iterable[Event], zero: float) -> tuple[Event, ...]:
    return tuple(
        Event(e.name, e.start_us - zero, e.end_us - zero, e.correlation, e.thread) for e in events
    )


def find_replays(trace: Trace) -> list[Replay]:
    """The decode graph's replays, in order.

    Smaller graphs are no model, and a replay of which the profiler lost half is none, either.

    Raises:
        DataError: no graph was replayed.
    """
    groups: dict[int, list[Event]] = defaultdict(list)
    for event in trace.gpu:
        groups[event.correlation].append(event)
    groups.pop(0, None)  # no call is known
    largest = max(map(len, groups.values()), default=0)
    if largest < SMALLEST_GRAPH:
        raise DataError(
            f"no replay of a CUDA graph is in the trace, whose {len(trace.gpu):,} GPU activities "
            "were launched one by one: start the server with decode CUDA graphs"
        )
    launches = {call.correlation: call for call in trace.calls if call.name == GRAPH_LAUNCH}
    return [
        Replay(group[0].start_us, max(e.end_us for e in group), launches.get(correlation))
        for correlation, group in groups.items()
        if 2 * len(group) > largest
    ]


def union(spans: Iterable[Span], nearer_than_us: float = 0.0) -> list[Span]:
    """Spans in order of their starts, joined where they overlap, touch or nearly touch."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and (start <= joined[-1][1] or start - joined[-1][1] < nearer_than_us):
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def clipped(spans: Iterable[Span], start: float, end: float) -> list[Span]:
    """The parts of spans within a window."""
    return [(max(s, start), min(e, end)) for s, e in spans if s < end and e > start]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class Steps:
    """Consecutive decode steps, and the gaps in which no stream had work."""

    trace: Trace
    replays: tuple[Replay, ...]
    """One more than steps: the last one ends the last step."""
    gaps: tuple[tuple[Span, ...], ...]
    """Of each step, in order."""

    @classmethod
    def of(cls, trace: Trace, num_steps: int) -> "Steps":
        """The last steps of a trace, at most so many; those of its lead-in are never among them.

        Raises:
            DataError: there are none.
        """
        found = find_replays(trace)
        replays = found[LEAD_IN:][-(num_steps + 1) :]
        if len(replays) < 2:
            raise DataError(
                f"the trace holds {len(found)} replays of the decode graph; needed are {LEAD_IN} "
                f"that count for nothing and {num_steps + 1} more: the requests ended too early"
            )
        start, end = replays[0].start_us, replays[-1].start_us
        busy = union(clipped(((e.start_us, e.end_us) for e in trace.gpu), start, end))
        gaps: list[list[Span]] = [[] for _ in replays[1:]]
        starts = [replay.start_us for replay in replays]
        for (_, idle_from), (idle_to, _) in pairwise([*busy, (end, end)]):
            if idle_to > idle_from:
                gaps[bisect_right(starts, idle_from) - 1].append((idle_from, idle_to))
        return cls(trace, tuple(replays), tuple(map(tuple, gaps)))

    @property
    def longest_us(self) -> list[float]:
        """The longest gap of each step; 0 where it has none."""
        return [max((end - start for start, end in gaps), default=0.0) for gaps in self.gaps]


def summarise(steps: Steps) -> Timeline:
    """The figures of some steps."""
    num_steps = len(steps.gaps)
    whole_us = steps.replays[-1].start_us - steps.replays[0].start_us
    idle_us = sum(end - start for gaps in steps.gaps for start, end in gaps)
    between_us = sum(
        max(0.0, end - max(start, replay.end_us))
        for replay, gaps in zip(steps.replays[:-1], steps.gaps, strict=True)
        for start, end in gaps
    )
    longest = steps.longest_us
    ahead = [r.start_us - r.launch.end_us for r in steps.replays if r.launch]
    return Timeline(
        steps=num_steps,
        step_us=whole_us / num_steps,
        busy_share=1 - idle_us / whole_us,
        idle_us_per_step=idle_us / num_steps,
        between_us_per_step=between_us / num_steps,
        gap_p50_us=percentile(longest, 0.5),
        gap_p99_us=percentile(longest, 0.99),
        largest_gap_us=max(longest),
        ahead_p50_us=percentile(ahead, 0.5) if ahead else None,
        ahead_least_us=min(ahead, default=None),
    )


def cut_strip(steps: Steps) -> Strip:
    """A few steps around the one whose longest gap is the median: what is usual, not the best."""
    longest = steps.longest_us
    usual = longest.index(percentile(longest, 0.5))
    first = max(0, min(usual - 1, len(longest) - SHOWN_STEPS))
    replays = steps.replays[first : first + SHOWN_STEPS + 1]
    start, end = replays[0].start_us, replays[-1].start_us
    threads = Counter(replay.launch.thread for replay in steps.replays if replay.launch)
    host = threads.most_common(1)[0][0] if threads else None
    calls = [call for call in steps.trace.calls if call.thread == host]

    def within(events: Iterable[Event | Replay], nearer_than_us: float = 0.0) -> tuple[Span, ...]:
        spans = clipped(((e.start_us, e.end_us) for e in events), start, end)
        return tuple((s - start, e - start) for s, e in union(spans, nearer_than_us))

    return Strip(
        length_us=end - start,
        busy=within(steps.trace.gpu, MERGED_US),
        replays=within(replays[:-1]),
        launches=within(call for call in calls if call.name == GRAPH_LAUNCH),
        waits=within(call for call in calls if "Synchronize" in call.name),
        calls=within(
            call for call in calls if call.name != GRAPH_LAUNCH and "Synchronize" not in call.name
        ),
    )
