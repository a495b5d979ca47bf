"""When a request that failed is sent again: exponential pauses with full jitter, and an end.

Full jitter, a pause drawn between nothing and the exponential limit, keeps many clients that failed
together from coming back together (Brooker, "Exponential Backoff And Jitter", AWS 2015).
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """How often and for how long."""

    tries: int = 4
    first_s: float = 1.0
    """Limit of the first pause; doubled with each further one."""
    most_s: float = 8.0
    """Limit of every pause, but for what the server itself asks for."""
    total_s: float = 60.0
    """No try begins later than this after the first failure."""


class Retries:
    """The pauses between the tries of one request."""

    def __init__(
        self,
        backoff: Backoff,
        *,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._backoff = backoff
        self._clock = clock
        self._uniform = uniform
        self._num_failures = 0
        self._deadline_s = 0.0

    def pause_s(self, retry_after_s: float = 0.0) -> float | None:
        """Seconds to wait after a failure; None to give up.

        Args:
            retry_after_s: the server wants no other try before. Never is one sent before, and
                none at all where that would be too late.
        """
        now_s = self._clock()
        if not self._num_failures:
            self._deadline_s = now_s + self._backoff.total_s
        limit_s = min(self._backoff.first_s * 2**self._num_failures, self._backoff.most_s)
        self._num_failures += 1
        pause_s = retry_after_s + self._uniform(0.0, limit_s)
        in_time = now_s + pause_s <= self._deadline_s
        return pause_s if in_time and self._num_failures < self._backoff.tries else None
