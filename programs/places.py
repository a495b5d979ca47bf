"""How many samples may be under way at once, shared by all questions to one server."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ConcurrencyLimiter:
    """Places for samples, each of which has a thread. Any thread may ask.

    A question always gets its first one, so that none waits for the end of another: at most `total`
    and one more for each question are taken. A free place goes to whoever holds the fewest of those
    that wait for one.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.num_taken = 0
        self._waiting: set[QuestionSlots] = set()
        self._lock = threading.Lock()

    @contextmanager
    def for_question(self) -> Iterator["QuestionSlots"]:
        """What one question takes; given back when the block ends."""
        slots = QuestionSlots(self)
        try:
            yield slots
        finally:
            self.give_back(slots, slots.num_taken)

    def take(self, slots: "QuestionSlots", *, wanted: bool) -> bool:
        """Take a place; false where none is wanted, or another question is to have the next."""
        with self._lock:
            self._waiting.discard(slots)
            is_next = all(slots.num_taken <= other.num_taken for other in self._waiting)
            may = slots.num_taken == 0 or (self.num_taken < self.total and is_next)
            if wanted and not may:
                self._waiting.add(slots)
            taken = int(wanted and may)
            slots.num_taken += taken
            self.num_taken += taken
            return bool(taken)

    def give_back(self, slots: "QuestionSlots", num_places: int) -> None:
        """So many are free again. Whoever gives back is busy, and does not wait meanwhile."""
        with self._lock:
            self._waiting.discard(slots)
            slots.num_taken -= num_places
            self.num_taken -= num_places


class QuestionSlots:
    """The places of one question."""

    def __init__(self, limiter: ConcurrencyLimiter) -> None:
        self.num_taken = 0
        self._places = limiter

    def take(self, *, wanted: bool = True) -> bool:
        """Take one more where that is fair; who wants none does not wait for one any more."""
        return self._places.take(self, wanted=wanted)

    def give_back(self) -> None:
        """One is not needed any more."""
        self._places.give_back(self, 1)
