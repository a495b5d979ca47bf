"""What a profiler's trace says of a GPU's steps: traces written by hand, figures known before."""

import json
from typing import Any

import pytest

from lim_sglang.bench.timeline import (
    LEAD_IN,
    SHOWN_STEPS,
    SMALLEST_GRAPH,
    Steps,
    Timeline,
    Trace,
    clipped,
    cut_strip,
    find_replays,
    percentile,
    read_trace,
    recorded_steps,
    summarise,
    union,
)
from lim_sglang.errors import DataError
from tests.bench.traces import KERNELS, OTHER_THREAD, call, event, step, steps, text


def trace(events: list[dict[str, Any]]) -> Trace:
    """As it is read."""
    return read_trace(text(events))


def test_steps_of_which_all_is_known_give_these_figures() -> None:
    found = summarise(Steps.of(trace(steps(recorded_steps(10))), 10))
    assert found == Timeline(
        steps=10,
        step_us=pytest.approx(1000.0),
        busy_share=pytest.approx(0.98),
        idle_us_per_step=pytest.approx(20.0),
        between_us_per_step=pytest.approx(20.0),
        gap_p50_us=pytest.approx(20.0),
        gap_p99_us=pytest.approx(20.0),
        largest_gap_us=pytest.approx(20.0),
        ahead_p50_us=pytest.approx(500.0),
        ahead_least_us=pytest.approx(500.0),
    )


def test_the_lead_in_counts_for_nothing() -> None:
    slow = [each for n in range(LEAD_IN) for each in step(n, 5000.0 * n, between_us=99.0)]
    later = [each for n in range(LEAD_IN, LEAD_IN + 5) for each in step(n, 30_000 + 1000.0 * n)]
    found = summarise(Steps.of(trace([*slow, *later]), 50))
    assert (found.steps, found.largest_gap_us) == (4, pytest.approx(20.0))


def test_no_more_steps_than_asked_for_are_looked_at_the_last_ones() -> None:
    early = [each for n in range(20) for each in step(n, 1000.0 * n, between_us=50.0)]
    late = [each for n in range(20, 26) for each in step(n, 1000.0 * n)]
    found = summarise(Steps.of(trace([*early, *late]), 5))
    assert (found.steps, found.idle_us_per_step) == (5, pytest.approx(20.0))


def test_what_another_stream_does_meanwhile_is_no_gap() -> None:
    events = steps(recorded_steps(4))
    copies = [event("gpu_memcpy", 1e9 + 1000.0 * n + 895.0, 30.0, 9000 + n) for n in range(20)]
    found = summarise(Steps.of(trace(events + copies), 4))
    assert (found.busy_share, found.largest_gap_us) == (pytest.approx(1.0), 0.0)


def test_a_fill_covers_only_its_part_of_a_gap() -> None:
    events = steps(recorded_steps(4))
    fills = [event("gpu_memset", 1e9 + 1000.0 * n + 905.0, 5.0, 9000 + n) for n in range(20)]
    found = summarise(Steps.of(trace(events + fills), 4))
    assert found.idle_us_per_step == pytest.approx(15.0)
    assert found.gap_p50_us == pytest.approx(10.0)


def test_gaps_within_a_replay_are_idle_but_not_between_replays() -> None:
    events = steps(recorded_steps(4))
    for each in events:
        if each["cat"] == "kernel" and each["dur"] == 90.0:
            each["dur"] = 88.0
    found = summarise(Steps.of(trace(events), 4))
    # The copy on the other stream fills 5 us of the replay, but none of its gaps.
    assert found.idle_us_per_step == pytest.approx(20.0 + 2.0 * KERNELS)
    # A replay ends with its last kernel.
    assert found.between_us_per_step == pytest.approx(22.0)
    assert found.largest_gap_us == pytest.approx(22.0)


def test_one_long_gap_is_the_largest_and_moves_no_median() -> None:
    events = [each for n in range(100) for each in step(n, 1e6 + 1000.0 * n)]
    events += [each for n in range(100, 200) for each in step(n, 1e6 + 300.0 + 1000.0 * n)]
    found = summarise(Steps.of(trace(events), 190))
    assert (found.gap_p50_us, found.gap_p99_us) == (pytest.approx(20.0), pytest.approx(20.0))
    assert found.largest_gap_us == pytest.approx(300.0)


def test_a_host_that_comes_too_late_is_ahead_by_less_than_nothing() -> None:
    events = steps(recorded_steps(5))
    late = [each for each in events if each["name"] == "cudaGraphLaunch"][-1]
    late["ts"] = 1e9 + 1000.0 * (recorded_steps(5) - 1) - 30.0
    found = summarise(Steps.of(trace(events), 5))
    assert found.ahead_p50_us == pytest.approx(500.0)
    assert found.ahead_least_us == pytest.approx(-70.0)


def test_without_calls_of_the_host_nothing_is_said_of_it() -> None:
    events = [each for each in steps(recorded_steps(5)) if each["cat"] != "cuda_runtime"]
    taken = Steps.of(trace(events), 5)
    assert summarise(taken).ahead_p50_us is None
    assert summarise(taken).ahead_least_us is None
    strip = cut_strip(taken)
    assert (strip.launches, strip.waits, strip.calls) == ((), (), ())


def test_smaller_graphs_and_half_a_replay_are_no_steps() -> None:
    small = [event("kernel", 1e9 + 910.0 + n, 1.0, 77) for n in range(KERNELS // 2)]
    half = [event("kernel", 1e9 - 50.0 + n, 1.0, 78) for n in range(KERNELS // 2 - 1)]
    found = find_replays(trace([*half, *steps(3), *small]))
    assert [(each.start_us, each.end_us) for each in found] == [
        (pytest.approx(600.0 + n), pytest.approx(1500.0 + n)) for n in (0.0, 1000.0, 2000.0)
    ]


def test_activities_of_no_known_call_are_no_replay() -> None:
    events = [event("kernel", 10.0 * n, 5.0, 0) for n in range(50)]
    with pytest.raises(DataError, match="no replay of a CUDA graph"):
        find_replays(trace(events))


def test_a_server_without_decode_graphs_is_told_so() -> None:
    events = [event("kernel", 10.0 * n, 5.0, 1 + n) for n in range(SMALLEST_GRAPH * 5)]
    with pytest.raises(DataError, match=r"whose 40 GPU activities were launched one by one: start"):
        Steps.of(trace(events), 5)


def test_too_few_replays_are_no_steps() -> None:
    with pytest.raises(DataError, match=f"{LEAD_IN + 1} replays .* ended too early"):
        Steps.of(trace(steps(LEAD_IN + 1)), 5)


@pytest.mark.parametrize("events", [[], [call("cudaGraphLaunch", 5.0, 1.0, 3)]])
def test_a_trace_without_gpu_activity_is_refused(events: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="no activity of a GPU: torch's profiler found no CUPTI"):
        trace(events)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"traceEvents": [{"ph": "X", "cat": "kernel"}]}', '{"traceEvents": 5}'],
)
def test_what_is_no_trace_is_refused(content: str) -> None:
    with pytest.raises(DataError, match="the trace cannot be read"):
        read_trace(content)


def test_figures_that_are_no_json_spoil_nothing() -> None:
    content = text(steps(2)).replace('"stream": 7', '"blocks per SM": inf, "share": -nan')
    assert len(read_trace(content).gpu) == 2 * (KERNELS + 2)


def test_records_that_could_not_be_timed_are_left_out() -> None:
    untimed = event("kernel", 0, 0, 5)
    found = trace([untimed, *steps(1)])
    assert len(found.gpu) == KERNELS + 2
    assert min(each.start_us for each in (*found.gpu, *found.calls)) == 0.0


def test_the_order_of_a_file_changes_nothing() -> None:
    events = steps(recorded_steps(5))
    turned = json.dumps({"traceEvents": events[::-1]})
    assert summarise(Steps.of(read_trace(turned), 5)) == summarise(Steps.of(trace(events), 5))


def test_the_strip_shows_consecutive_steps_of_host_and_gpu_from_0() -> None:
    other = event("cuda_runtime", 1e9 + 7000.0, 9.0, 0, name="cudaMalloc", tid=OTHER_THREAD)
    strip = cut_strip(Steps.of(trace([*steps(recorded_steps(5)), other]), 5))
    assert strip.length_us == pytest.approx(1000.0 * SHOWN_STEPS)
    starts = [start for start, _ in strip.replays]
    assert starts == [pytest.approx(1000.0 * n) for n in range(SHOWN_STEPS)]
    # Kernels that touch are one; sampling joins the next replay.
    assert [end - start for start, end in strip.busy] == [
        pytest.approx(length) for length in (900.0, 980.0, 980.0, 80.0)
    ]
    assert strip.launches[0] == (pytest.approx(400.0), pytest.approx(500.0))
    assert len(strip.launches) == len(strip.waits) == SHOWN_STEPS
    assert len(strip.calls) == 2 * SHOWN_STEPS  # none of another thread


def test_the_strip_is_around_a_usual_step() -> None:
    between = [20.0] * 12 + [5.0, 90.0, 20.0, 1.0] * 2 + [20.0] * 3
    events = [
        each
        for n, wait_us in enumerate(between)
        for each in step(n, 1000.0 * n, between_us=wait_us)
    ]
    taken = Steps.of(trace(events), 50)
    strip = cut_strip(taken)
    assert strip.busy[1][0] - strip.busy[0][1] == pytest.approx(20.0)


def test_fewer_steps_than_are_shown_are_all_shown() -> None:
    strip = cut_strip(Steps.of(trace(steps(LEAD_IN + 2)), 50))
    assert (len(strip.replays), strip.length_us) == (1, pytest.approx(1000.0))


@pytest.mark.parametrize(
    ("spans", "nearer_than_us", "expected"),
    [
        ([], 0.0, []),
        ([(0, 2), (1, 3), (1, 2), (3, 4), (5, 6)], 0.0, [(0, 4), (5, 6)]),
        ([(0, 9), (1, 2), (8, 9), (9.5, 10)], 0.0, [(0, 9), (9.5, 10)]),
        ([(0, 1), (1.9, 3), (4, 5)], 1.0, [(0, 3), (4, 5)]),
    ],
)
def test_spans_are_joined_where_they_overlap_or_nearly_touch(
    spans: list[tuple[float, float]],
    nearer_than_us: float,
    expected: list[tuple[float, float]],
) -> None:
    assert union(spans, nearer_than_us) == expected


def test_spans_are_cut_to_a_window() -> None:
    assert clipped([(0, 1), (0, 3), (3, 4), (5, 9), (6, 7)], 1, 6) == [(1, 3), (3, 4), (5, 6)]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.5, 3.0), ([4, 1, 3, 2], 0.5, 2), ([*range(100)], 0.99, 98), ([1, 2], 0.99, 2)],
)
def test_a_percentile_is_one_of_the_values(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected
