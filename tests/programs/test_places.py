"""Places for samples: bounded over all questions, and shared fairly."""

import threading
from contextlib import ExitStack

from lim_sglang.programs.backend import ConcurrencyLimiter, QuestionSlots


def fill(slots: QuestionSlots) -> int:
    """Take as many as there are; how many."""
    taken = 0
    while slots.take():
        taken += 1
    return taken


def test_a_question_alone_takes_all_places() -> None:
    limiter = ConcurrencyLimiter(5)
    with limiter.for_question() as slots:
        assert fill(slots) == 5
        assert limiter.num_taken == 5
    assert limiter.num_taken == 0


def test_no_question_waits_for_the_end_of_another() -> None:
    limiter = ConcurrencyLimiter(3)
    with limiter.for_question() as first, limiter.for_question() as second:
        assert (fill(first), fill(second)) == (3, 1)
        assert limiter.num_taken == 4  # `total` and one for each further question
        second.give_back()
        assert second.take()


def test_a_free_place_goes_to_who_waits_with_the_fewest() -> None:
    limiter = ConcurrencyLimiter(4)
    with limiter.for_question() as first, limiter.for_question() as second:
        assert (fill(first), fill(second)) == (4, 1)
        for left, has in ((3, 1), (2, 2)):
            first.give_back()
            assert not first.take()  # the second waits, and has fewer
            assert second.take() == (left == 2)
            assert (first.num_taken, second.num_taken) == (left, has)


def test_who_wants_none_keeps_nobody_waiting() -> None:
    limiter = ConcurrencyLimiter(4)
    with limiter.for_question() as first, limiter.for_question() as second:
        fill(first)
        fill(second)
        assert not second.take(wanted=False)
        first.give_back()
        first.give_back()
        assert first.take()


def test_who_is_busy_keeps_nobody_waiting() -> None:
    limiter = ConcurrencyLimiter(3)
    with limiter.for_question() as first:
        with limiter.for_question() as second:
            fill(first)
            fill(second)
            second.give_back()  # and then looks at its sample
            first.give_back()
            assert first.take()
        first.give_back()
        assert fill(first) == 1


def test_many_questions_at_once_take_no_more_than_there_are() -> None:
    limiter, most = ConcurrencyLimiter(8), 0
    together = threading.Barrier(20)

    def question() -> None:
        nonlocal most
        with limiter.for_question() as slots:
            together.wait(10)
            for _ in range(200):
                if not slots.take():
                    slots.give_back()
                most = max(most, limiter.num_taken)
                together.wait(10)

    with ExitStack() as stack:
        threads = [threading.Thread(target=question) for _ in range(20)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
    assert 20 <= most <= 8 + 20
    assert limiter.num_taken == 0
