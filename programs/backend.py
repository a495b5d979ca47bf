"""A server that answers with samples: the base class of both backends, a sample while it is
generated, and the limit of samples in flight.
"""

import asyncio
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lim_sglang.config import Drafts
from lim_sglang.programs.chat import Generation, StreamReader
from lim_sglang.programs.http_client import (
    RAISE_TIMEOUT,
    Backoff,
    Client,
    RejectedError,
    RequestError,
    RequestTimeoutError,
    Retries,
    UnreachableError,
)
from lim_sglang.programs.schema import Access, Sampling

if TYPE_CHECKING:
    from lim_sglang.programs.stopping import GroupConfidence

BACKOFF = Backoff()
"""The pauses of a request that may succeed later."""


class ConcurrencyLimiter:
    """Slots for samples in flight at one server, shared by all questions; safe from any thread.

    A free slot goes to the question that holds the fewest slots of those that wait for one; at a
    tie, to the question that has waited longest.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.num_free = total
        self.waiting: dict[QuestionSlots, None] = {}
        """Questions that wait for a slot, in the order in which they began to wait."""
        self.lock = threading.Lock()

    @contextmanager
    def question(self, on_grant: Callable[[], object]) -> Iterator["QuestionSlots"]:
        """Let a question take slots until the block ends.

        Args:
            on_grant: called, from any thread, when a slot is there that the question waits for.
        """
        slots = QuestionSlots(self, on_grant)
        try:
            yield slots
        finally:
            slots.withdraw()

    def free(self) -> None:
        """Give a free slot to a question that waits, or keep it; the lock is held."""
        if not self.waiting:
            self.num_free += 1
            return
        slots = min(self.waiting, key=lambda slots: slots.num_held)
        del self.waiting[slots]
        slots.num_held += 1
        slots.is_granted = True
        slots.on_grant()


class QuestionSlots:
    """The slots of one question."""

    def __init__(self, limiter: ConcurrencyLimiter, on_grant: Callable[[], object]) -> None:
        self.num_held = 0
        """Slots that are taken or granted."""
        self.is_granted = False
        """True if this question was given a slot for which it waited, and has not taken it yet."""
        self.on_grant = on_grant
        self._limiter = limiter

    def take(self) -> bool:
        """Take a slot; if none is free, return False and wait until `on_grant` is called."""
        with self._limiter.lock:
            if self.is_granted:
                self.is_granted = False
                return True
            if self._limiter.num_free:  # so no question waits
                self._limiter.num_free -= 1
                self.num_held += 1
                return True
            self._limiter.waiting.setdefault(self)
            return False

    def withdraw(self) -> None:
        """Wait no longer; a slot that was granted meanwhile goes to another question."""
        with self._limiter.lock:
            self._limiter.waiting.pop(self, None)
            if self.is_granted:
                self.is_granted = False
                self._give_back()

    def release(self) -> None:
        """Give back a slot that was taken."""
        with self._limiter.lock:
            self._give_back()

    def _give_back(self) -> None:
        self.num_held -= 1
        self._limiter.free()


def _do_nothing(*_: object) -> None:
    pass


def _told(error: RequestError, *, was_lost: bool) -> str:
    """Return the last failure of a generation, with what to do about it.

    Args:
        was_lost: the server had begun the generation in an earlier try.
    """
    if isinstance(error, RequestTimeoutError):
        return f"{error}: {RAISE_TIMEOUT}"
    if was_lost and isinstance(error, UnreachableError):
        return f"the server went away in mid-answer, and {error}"
    return str(error)


class InFlightSample:
    """A sample while it is generated, shared by the program's thread and the client's.

    The program reads and cancels; the client writes.
    """

    def __init__(
        self,
        index: int,
        *,
        seed: int | None = None,
        streamed: bool = False,
        new_confidence: "Callable[[], GroupConfidence] | None" = None,
        threshold: float | None = None,
        on_end: Callable[["InFlightSample"], object] = _do_nothing,
    ) -> None:
        """Describe a sample; nothing is sent yet.

        Args:
            index: position among the samples of the question.
            seed: sent to the server; None sends none.
            streamed: the answer is streamed, so that `num_tokens` and `text` grow meanwhile; costs
                the client more than one answer at the end.
            new_confidence: makes the measure of each try; asks the server for logprobs and implies
                `streamed`.
            threshold: group confidence under which the sample is cancelled.
            on_end: called once, when the sample has ended in any way; from any thread.
        """
        self.index = index
        self.seed = seed
        self.streamed = streamed or new_confidence is not None
        self.confidence: GroupConfidence | None = None
        """The confidence of the last try, None without logprobs."""
        self.num_tokens = 0
        """Tokens generated so far, without those of earlier tries; 0 if not streamed."""
        self.low_confidence = False
        """True if the sample fell under its threshold: it has no vote, even if it was complete."""
        self.has_started = False
        """True if the server has been asked."""
        self.generation: Generation | None = None
        """The result, once the sample has ended; None if the frontend failed."""
        self._num_kept = 0
        self._kept = ""
        self._reader: StreamReader | None = None
        self._sent_s: float | None = None
        self._new_confidence = new_confidence
        self._threshold = threshold
        self._on_end = on_end
        self._lock = threading.Lock()
        self._has_ended = False
        self._cancelled = False
        self._wake: Callable[[], object] = _do_nothing

    @property
    def wants_logprobs(self) -> bool:
        """True if the confidence of the sample is measured."""
        return self._new_confidence is not None

    @property
    def is_cancelled(self) -> bool:
        """True if the program does not want the rest of the sample."""
        return self._cancelled

    @property
    def text(self) -> str:
        """Text generated so far, empty if not streamed; safe from any thread."""
        reader = self._reader
        return self._kept + (reader.text() if reader else "")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the server was asked; 0 before."""
        return 0.0 if self._sent_s is None else time.monotonic() - self._sent_s

    @property
    def tokens_per_s(self) -> float:
        """Speed since the server was asked, the wait for the first token included."""
        return self.num_tokens / max(self.elapsed_s, 1e-3)

    def cancel(self) -> None:
        """End the sample early: the server aborts it, and its tokens so far are counted."""
        with self._lock:
            if self._cancelled:
                return
            self._cancelled = True
            wake = self._wake
        wake()

    def when_cancelled(self, wake: Callable[[], object]) -> None:
        """Call `wake`, from any thread, when the sample is cancelled; at once if it already is."""
        with self._lock:
            self._wake = wake
            cancelled = self._cancelled
        if cancelled:
            wake()

    def begin_try(self, reader: StreamReader) -> None:
        """Forget the tokens of an earlier try; the reader gets those of the new try."""
        self.has_started = True
        self.num_tokens = self._num_kept
        self._reader = reader
        if not self._num_kept:
            self._sent_s = time.monotonic()
        self.confidence = self._new_confidence() if self._new_confidence else None

    def keep(self, num_tokens: int, text: str) -> None:
        """Keep a part of the answer: the tries that follow continue from its end."""
        self._num_kept, self._kept, self._reader = num_tokens, text, None
        if kept := self.confidence:
            self._new_confidence = lambda: kept

    def see(self, confidences: Iterable[float]) -> None:
        """Note that the reader has new tokens; cancel the sample if its confidence is too low.

        Args:
            confidences: of the new tokens.
        """
        if any(self._falls_under_threshold(confidence) for confidence in confidences):
            self.low_confidence = True
            self.cancel()
        # The last tokens count when the sample ends, together with its vote: else a rule could be
        # settled by the tokens of a sample that has no vote yet.
        if self._reader and not self._reader.is_complete:
            self.num_tokens = self._num_kept + self._reader.found.num_tokens

    def _falls_under_threshold(self, token_confidence: float) -> bool:
        group = self.confidence.push(token_confidence) if self.confidence else None
        return group is not None and self._threshold is not None and group < self._threshold

    def end(self, generation: Generation | None = None) -> None:
        """Note the end of the sample and its result; only the first call counts.

        Args:
            generation: None if the frontend failed.
        """
        with self._lock:
            if self._has_ended:
                return
            self._has_ended, self.generation = True, generation
        self._on_end(self)


class Backend(ABC):
    """One server, for any number of programs and threads: tries with pauses, early ends."""

    def __init__(self, client: Client, access: Access) -> None:
        """Prepare the backend; nothing is sent yet."""
        self.limiter = ConcurrencyLimiter(access.max_concurrency)
        """Slots for the requests that the server is given at the same time: a program takes one
        for each sample that it begins."""
        self._client = client
        self._access = access

    @property
    @abstractmethod
    def honours_seeds(self) -> bool:
        """True if equal seeds give equal samples; raises `ServerError`."""

    @abstractmethod
    def server_info(self) -> dict[str, Any]:
        """Return the server's description of itself; raises `ServerError`, also if it is gone."""

    def drafts(self) -> Drafts | None:
        """Return what the server has drafted so far; None if it does not draft, or is gone."""
        return None

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return the properties of the server that an answer depends on; raises `ServerError`."""

    @abstractmethod
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Return the sampling parameters that the model's makers recommend, if the server knows."""

    def generate(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling: Sampling,
        in_flight: InFlightSample,
    ) -> Generation:
        """Generate the next turn of a conversation and wait for it.

        A failure of the server is a result, too: see `Generation.error`.
        """
        body = self._request(messages, sampling, in_flight.seed)
        try:
            return self._client.start(self._generate_and_end(body, in_flight)).result()
        except (RequestError, CancelledError) as error:
            # The client was closed meanwhile.
            found = Generation(
                new_rid(),
                num_tokens=in_flight.num_tokens,
                tokens_at_least=in_flight.has_started,
                error=str(error) or "the connection was closed",
            )
            in_flight.end(found)
            return found

    def close(self) -> None:
        """End all generations, with an error each, and then the connection."""
        self._client.close()

    @abstractmethod
    def _request(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling, seed: int | None
    ) -> dict[str, Any]:
        """Return the body of one request, without its id."""

    @abstractmethod
    async def _ask(
        self, body: Mapping[str, Any], in_flight: InFlightSample, reader: StreamReader
    ) -> Generation:
        """Send a request under the reader's id; raises `RequestError`."""

    @abstractmethod
    async def _end_early(
        self, request: "asyncio.Future[Generation]", reader: StreamReader
    ) -> Generation:
        """End a request in flight and return its result so far; soon, and without an error."""

    @abstractmethod
    async def _drop(self, rid: str) -> None:
        """Make the server drop a request whose answer is not read."""

    async def _generate_and_end(
        self, body: Mapping[str, Any], in_flight: InFlightSample
    ) -> Generation:
        """Generate, and end the sample in the client's thread: the order of ends is kept."""
        found = await self._generate(body, in_flight)
        in_flight.end(found)
        return found

    async def _generate(self, body: Mapping[str, Any], in_flight: InFlightSample) -> Generation:
        """Try until the request succeeds, is cancelled, or is not worth another try."""
        cancelled = asyncio.Event()
        loop = asyncio.get_running_loop()
        in_flight.when_cancelled(lambda: _call(loop, cancelled.set))
        retries = Retries(BACKOFF)
        any_lost = False
        while True:
            reader = StreamReader(new_rid())
            if in_flight.is_cancelled:
                return Generation(reader.found.rid, aborted=True, tokens_at_least=any_lost)
            in_flight.begin_try(reader)
            start_s = time.monotonic()
            try:
                found = await self._try(body, reader, in_flight, cancelled)
                if found.aborted and not in_flight.is_cancelled:
                    raise RequestError("the server aborted the request", retryable=True)
            except RequestError as error:
                any_lost = any_lost or not isinstance(error, RejectedError)
                pause_s = retries.pause_s(error.retry_after_s) if error.retryable else None
                if pause_s is not None and not in_flight.is_cancelled:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(cancelled.wait(), pause_s)
                    continue
                # The tokens that had come by then were generated all the same.
                found = replace(
                    reader.result(),
                    aborted=False,
                    error=_told(error, was_lost=any_lost),
                    refusal=error.response,
                )
            return replace(
                found,
                latency_s=time.monotonic() - start_s,
                tokens_at_least=found.tokens_at_least or any_lost,
            )

    async def _try(
        self,
        body: Mapping[str, Any],
        reader: StreamReader,
        in_flight: InFlightSample,
        cancelled: asyncio.Event,
    ) -> Generation:
        """Send a request once; drop the request if the server may still work on it."""
        request = asyncio.ensure_future(self._ask(body, in_flight, reader))
        ending = asyncio.ensure_future(cancelled.wait())
        try:
            await asyncio.wait({request, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                return await self._end_early(request, reader)
            return await request
        except (RequestError, asyncio.CancelledError) as error:
            if reader.is_open or isinstance(error, RequestTimeoutError | asyncio.CancelledError):
                await self._drop(reader.found.rid)
            raise
        finally:
            ending.cancel()
            request.cancel()


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    # A closed loop has nothing left that could be cancelled.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def new_rid() -> str:
    """Return a request id that no other id begins with, since all are as long: SGLang aborts by
    prefix.
    """
    return f"lim-{uuid.uuid4().hex}"
