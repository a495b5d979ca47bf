"""A sample while it is generated: what its program sees of it, and how the program ends it."""

import threading
from collections.abc import Callable


class Running:
    """One generation in flight, shared by the program's thread and the client's.

    The program reads and cancels; the client writes.
    """

    def __init__(
        self,
        index: int,
        *,
        watched: bool = False,
        on_confidence: Callable[[float], bool] | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            index: of the sample.
            watched: the answer is streamed, so that `num_tokens` grows as it comes in; costs the
                client more than one answer at the end.
            on_confidence: called in the client's thread with each token's confidence (`chat.py`);
                true ends the sample. Implies `watched`, and asks the server for logprobs.
        """
        self.index = index
        self.on_confidence = on_confidence
        self.watched = watched or on_confidence is not None
        self.num_tokens = 0
        """Generated so far, where it is watched."""
        self.has_started = False
        """Whether the server has been asked."""
        self._lock = threading.Lock()
        self._cancelled = False
        self._wake: Callable[[], object] | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether its program wants no more of it."""
        return self._cancelled

    def cancel(self) -> None:
        """Want no more of it: the server is told, and the tokens so far are counted."""
        with self._lock:
            self._cancelled = True
            wake = self._wake
        if wake:
            wake()

    def when_cancelled(self, wake: Callable[[], object]) -> None:
        """Call `wake`, from any thread, once it is cancelled; at once if it is already."""
        with self._lock:
            self._wake = wake
            cancelled = self._cancelled
        if cancelled:
            wake()
