"""What follows from the times at which tokens arrived."""

import pytest

from lim_sglang.bench.streams import (
    HEAD_START,
    Curve,
    Latencies,
    Stream,
    Stretch,
    arrivals,
    measured_stretch,
    speedup,
    token_latencies,
    tokens_per_bin,
)


def stream(*chunks: tuple[float, int]) -> Stream:
    """A stream of chunks: when each came, and the tokens up to it."""
    found = Stream()
    for at_s, total in chunks:
        found.arrive(at_s, total)
    return found


def steady(first_s: float, wait_s: float, num_tokens: int) -> Stream:
    """One token after the other."""
    return stream(*((first_s + n * wait_s, n + 1) for n in range(num_tokens)))


def test_a_chunk_without_a_new_token_is_none() -> None:
    found = stream((1.0, 1), (2.0, 1), (3.0, 4))
    assert list(found.times_s) == [1.0, 3.0]
    assert found.num_tokens == 4
    assert Stream().num_tokens == 0


def test_the_stretch_begins_when_all_that_began_together_have_their_first_token() -> None:
    streams = [steady(10.0, 0.1, 100), steady(10.5, 0.1, 100), steady(12.0, 0.1, 100)]
    assert measured_stretch(streams) == Stretch(12.0, pytest.approx(12.0 + 9.9))


def test_a_stream_that_waited_for_room_does_not_move_the_start() -> None:
    early = steady(10.0, 0.1, 2 * HEAD_START)
    late = steady(10.0 + 0.1 * HEAD_START, 0.1, 50)
    assert measured_stretch([early, late]) == Stretch(10.0, pytest.approx(10.0 + 12.7))


def test_short_streams_settle_with_their_last_token() -> None:
    assert measured_stretch([steady(1.0, 1.0, 3), steady(2.5, 1.0, 3)]) == Stretch(2.5, 4.5)


@pytest.mark.parametrize("streams", [[], [Stream()], [stream((1.0, 1)), stream((2.0, 3))]])
def test_first_chunks_alone_are_no_stretch(streams: list[Stream]) -> None:
    assert measured_stretch(streams) is None


def test_first_chunks_count_nowhere() -> None:
    streams = [stream((0.0, 5), (1.0, 6), (2.0, 8)), stream((0.5, 1), (1.5, 2))]
    assert arrivals(streams, Stretch(0.5, 2.0)) == [(0.5, 1), (1.0, 1), (1.5, 2)]


def test_what_arrives_before_the_stretch_is_left_out() -> None:
    assert arrivals([steady(0.0, 1.0, 5)], Stretch(2.0, 4.0)) == [(1.0, 1), (2.0, 1)]


@pytest.mark.parametrize(
    ("found", "seconds", "expected"),
    [
        ([(0.1, 1), (4.9, 2), (5.0, 4)], 10.0, [3, 4]),
        ([(0.1, 1), (10.0, 4)], 10.0, [1, 4]),
        ([(0.1, 1), (10.0, 4)], 10.5, [1, 0, 4]),
        ([(0.1, 1), (8.9, 4)], 9.0, [1, 4]),
        ([(0.1, 1), (0.5, 4)], 0.5, [5]),
    ],
)
def test_bins_hold_every_token_once(
    found: list[tuple[float, int]], seconds: float, expected: list[int]
) -> None:
    assert tokens_per_bin(found, seconds, 5.0) == expected


def test_the_tokens_of_one_chunk_share_its_wait_evenly() -> None:
    found = token_latencies([stream((0.0, 1), (0.4, 5), (0.5, 6))], Stretch(0.0, 0.5))
    assert found == Latencies(p50=pytest.approx(100.0), p99=pytest.approx(100.0))


def test_percentiles_are_over_tokens_of_all_streams() -> None:
    fast, slow = steady(0.0, 0.01, 99), stream((0.0, 1), (2.0, 3))
    found = token_latencies([fast, slow], Stretch(0.0, 2.0))
    assert found == Latencies(p50=pytest.approx(10.0), p99=pytest.approx(1000.0))
    without = token_latencies([fast], Stretch(0.0, 2.0))
    assert without == Latencies(p50=pytest.approx(10.0), p99=pytest.approx(10.0))


@pytest.mark.parametrize(("slow", "p99"), [(1, 10.0), (2, 500.0)])
def test_one_slow_token_of_a_hundred_is_beyond_p99_and_two_are_not(slow: int, p99: float) -> None:
    chunks = [(0.01 * n, n + 1) for n in range(101 - slow)]
    for _ in range(slow):
        chunks.append((chunks[-1][0] + 0.5, chunks[-1][1] + 1))
    found = token_latencies([stream(*chunks)], Stretch(0.0, 10.0))
    assert found
    assert found.p99 == pytest.approx(p99)


def test_a_wait_that_began_before_the_stretch_is_no_latency() -> None:
    found = token_latencies([stream((0.0, 1), (5.0, 2), (5.1, 3))], Stretch(1.0, 6.0))
    assert found == Latencies(p50=pytest.approx(100.0), p99=pytest.approx(100.0))
    assert token_latencies([stream((0.0, 1), (5.0, 2))], Stretch(1.0, 6.0)) is None


def at_speed(tokens_per_s: float, seconds: float) -> Curve:
    """A run at one speed."""
    num_tokens = round(tokens_per_s * seconds)
    found = [((n + 1) / tokens_per_s, 1) for n in range(num_tokens)]
    return Curve.of(found, seconds)


def test_a_whole_run_is_compared_by_its_length() -> None:
    assert speedup(at_speed(100, 20.0), at_speed(200, 10.0)) == pytest.approx(2.0, rel=0.02)


def test_a_cut_run_is_compared_over_the_tokens_that_both_decoded() -> None:
    # Ours is fast at first and slow at contexts that the dense run did not reach in its time.
    fast_then_slow = [((n + 1) / 200, 1) for n in range(1000)]
    fast_then_slow += [(5 + (n + 1) / 50, 1) for n in range(250)]
    ours, dense = Curve.of(fast_then_slow, 10.0), at_speed(100, 10.0)
    assert dense.totals[-1] == 1000
    assert speedup(dense, ours) == pytest.approx(2.0, rel=0.02)


def test_a_moment_is_found_between_two_marks() -> None:
    curve = Curve((10, 30, 30, 40), seconds=0.35)
    assert curve.seconds_for(10) == pytest.approx(0.1)
    assert curve.seconds_for(20) == pytest.approx(0.15)
    assert curve.seconds_for(40) == pytest.approx(0.35)
