"""A sample while it is generated: what its program sees of it, and how the program ends it."""

import threading
import time
from collections.abc import Callable, Iterable


class InFlightSample:
    """One generation in flight, shared by the program's thread and the client's.

    The program reads and cancels; the client writes.
    """

    def __init__(
        self,
        index: int,
        *,
        streamed: bool = False,
        watcher: Callable[[], Callable[[float], bool]] | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            index: of the sample.
            watched: the answer is streamed, so that `num_tokens` grows as it comes in; costs the
                client more than one answer at the end.
            watcher: makes, for each try, what is called in the client's thread with each token's
                confidence (`chat.py`); true ends the sample. Implies `watched`, and asks the
                server for logprobs.
        """
        self.index = index
        self.streamed = streamed or watcher is not None
        self.on_confidence: Callable[[float], bool] | None = None
        """What the watcher made for this try."""
        self.num_tokens = 0
        """Generated so far by this try, where it is watched."""
        self.low_confidence = False
        """Whether its own confidence ended it. It has no vote, also if it was whole by then."""
        self.has_started = False
        """Whether the server has been asked."""
        self._num_kept = 0
        self._kept = ""
        self._text: Callable[[], str] = str
        self._sent_s = 0.0
        self._watcher = watcher
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

    @property
    def text(self) -> str:
        """Generated so far, where it is watched; any thread may ask."""
        return self._kept + self._text()

    @property
    def tokens_per_s(self) -> float:
        """Since the server was asked, the wait for the first token included."""
        return self.num_tokens / max(time.monotonic() - self._sent_s, 1e-3)

    def begin_try(self, text: Callable[[], str]) -> None:
        """Forget what an earlier try has brought.

        Args:
            text: what the new one has brought so far.
        """
        self.num_tokens = self._num_kept
        self._text = text
        if not self._num_kept:
            self._sent_s = time.monotonic()
        self.on_confidence = self._watcher() if self._watcher else None

    def keep(self, num_tokens: int, text: str) -> None:
        """Of what has come nothing is forgotten: the tries that follow go on from there."""
        self._num_kept, self._kept, self._text = num_tokens, text, str
        watch = self.on_confidence
        self._watcher = (lambda: watch) if watch else None

    def see(self, confidences: Iterable[float], num_tokens: int) -> None:
        """Take note of what has come in; may cancel it."""
        self.num_tokens = self._num_kept + num_tokens
        watch = self.on_confidence
        if watch and any(watch(confidence) for confidence in confidences):
            self.low_confidence = True
            self.cancel()

    def when_cancelled(self, wake: Callable[[], object]) -> None:
        """Call `wake`, from any thread, once it is cancelled; at once if it is already."""
        with self._lock:
            self._wake = wake
            cancelled = self._cancelled
        if cancelled:
            wake()
