"""When a failed request is sent again: with a clock and a die of our own."""

import random
import time
from email.utils import formatdate

import httpx
import pytest

from lim_sglang.programs.http_client import Backoff, Retries, retry_after_s

BACKOFF = Backoff(tries=6, first_s=1.0, most_s=8.0, total_s=60.0)


class Clock:
    """Stands still unless someone waits."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def waits(
    backoff: Backoff, *, retry_after: float = 0.0, try_s: float = 0.0, seed: int = 0
) -> list[float]:
    """The pauses of a request that fails again and again, each try taking `try_s`."""
    clock = Clock()
    found: list[float] = []
    retries = Retries(backoff, clock=clock, uniform=random.Random(seed).uniform)
    while (pause_s := retries.pause_s(retry_after)) is not None:
        found.append(pause_s)
        clock.now_s += pause_s + try_s
    return found


def test_pauses_are_drawn_from_all_below_a_limit_that_doubles() -> None:
    drawn = [waits(BACKOFF, seed=seed) for seed in range(500)]
    assert {len(pauses) for pauses in drawn} == {5}
    for place, limit_s in enumerate((1.0, 2.0, 4.0, 8.0, 8.0)):
        pauses = sorted(one[place] for one in drawn)
        assert 0.0 <= pauses[0] < 0.02 * limit_s
        assert 0.98 * limit_s < pauses[-1] <= limit_s
        assert pauses[250] == pytest.approx(limit_s / 2, rel=0.15)


def test_the_same_die_gives_the_same_pauses_and_another_gives_others() -> None:
    assert waits(BACKOFF, seed=7) == waits(BACKOFF, seed=7)
    assert waits(BACKOFF, seed=7) != waits(BACKOFF, seed=8)


def test_tries_come_to_an_end() -> None:
    assert [len(waits(Backoff(tries=tries))) for tries in (1, 2, 4)] == [0, 1, 3]


def test_no_try_comes_before_the_server_wants_one() -> None:
    pauses = [pause for seed in range(100) for pause in waits(BACKOFF, retry_after=5.0, seed=seed)]
    assert min(pauses) >= 5.0
    assert len({round(pause, 3) for pause in pauses}) > 400  # and not all at the same moment


@pytest.mark.parametrize("try_s", [0.0, 7.0, 20.0])
def test_no_try_begins_later_than_the_bound_after_the_first_failure(try_s: float) -> None:
    patient = Backoff(tries=10**6, first_s=1.0, most_s=8.0, total_s=60.0)
    for seed in range(50):
        pauses = waits(patient, try_s=try_s, seed=seed)
        last_begins_s = sum(pauses) + try_s * (len(pauses) - 1)
        assert 60.0 - 8.0 - try_s <= last_begins_s <= 60.0


@pytest.mark.parametrize(("wish_s", "num_pauses"), [(51.0, 1), (60.1, 0), (3600.0, 0)])
def test_who_wants_more_time_than_there_is_is_not_asked_again(
    wish_s: float, num_pauses: int
) -> None:
    assert len(waits(BACKOFF, retry_after=wish_s)) == num_pauses


@pytest.mark.parametrize(
    ("header", "expected_s"),
    [(None, 0), ("7", 7), ("0", 0), ("-3", 0), ("1.5", 0), ("soon", 0), ("", 0), ("3600", 3600)],
)
def test_a_wish_in_seconds_is_read(header: str | None, expected_s: float) -> None:
    headers = {} if header is None else {"Retry-After": header}
    assert retry_after_s(httpx.Response(429, headers=headers)) == expected_s


@pytest.mark.parametrize(("in_s", "least_s", "most_s"), [(30, 27, 31), (-30, 0, 0)])
def test_a_wish_may_be_a_date(in_s: int, least_s: float, most_s: float) -> None:
    date = formatdate(time.time() + in_s, usegmt=True)
    assert least_s <= retry_after_s(httpx.Response(503, headers={"Retry-After": date})) <= most_s
