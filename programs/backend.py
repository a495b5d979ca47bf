"""A server that samples are drawn from, whatever it speaks: the base class of both backends, a
sample while it is generated, and the limit of samples in flight.
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
from typing import Any

from lim_sglang.compat import BaseBackend, ChatTemplate
from lim_sglang.programs.chat import Generation, StreamReader
from lim_sglang.programs.http_client import (
    Backoff,
    Client,
    RequestError,
    RequestTimeoutError,
    Retries,
    TurnedAwayError,
)


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


SEED = "seed"
"""A branch's variable with the seed that its generations are sent."""
IN_FLIGHT = "running"
"""A branch's variable with its `Running`; without one, nobody can end its generation early."""

BACKOFF = Backoff()
"""When a request that may succeed later is sent again."""
TRANSPARENT = ChatTemplate("transparent", default_system_prompt=None, role_prefix_and_suffix={})
"""Adds nothing to the messages: the server renders them."""


class Backend(BaseBackend, ABC):
    """What all endpoints share: places, tries with pauses, generations that a program ends early.

    Any number of programs and threads may use one.
    """

    def __init__(self, client: Client, *, timeout_s: float, max_concurrency: int) -> None:
        """Connects to nothing yet.

        Args:
            timeout_s: limit of one generation, from sending to the answer.
            max_concurrency: requests that the server is given at once; others wait here.
        """
        super().__init__()
        self.chat_template = TRANSPARENT
        self._client = client
        self.limiter = ConcurrencyLimiter(max_concurrency)
        """For samples, whose threads are none too early where they could only wait here."""
        self._timeout_s = timeout_s
        self._requests = asyncio.Semaphore(max_concurrency)

    @property
    @abstractmethod
    def honours_seeds(self) -> bool:
        """Whether equal seeds give equal samples; raises `ServerError`."""

    @abstractmethod
    def server_info(self) -> dict[str, Any]:
        """What the server says of itself; raises `ServerError`, also where it is gone."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What of the server an answer depends on; raises `ServerError`."""

    @abstractmethod
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Sampling parameters that the model's makers recommend, as far as the server says."""

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, Generation]:
        """Called by the frontend for `sgl.gen`: the next turn after the branch's messages."""
        in_flight: InFlightSample = s.variables.get(IN_FLIGHT) or InFlightSample(0)
        body = self._request(s.messages_, sampling_params, s.variables.get(SEED))
        try:
            found = self._client.start(self._generate(body, in_flight)).result()
        except (RequestError, CancelledError) as error:
            # Closed while this waited.
            found = Generation(
                new_rid(),
                num_tokens=in_flight.num_tokens,
                tokens_at_least=in_flight.has_started,
                error=str(error) or "the connection was closed",
            )
        return found.text, found

    def close(self) -> None:
        """End what is running and then the connection; every waiting branch gets an error."""
        self._client.close()

    @abstractmethod
    def _request(
        self, messages: Sequence[Mapping[str, str]], sampling_params: Any, seed: int | None
    ) -> dict[str, Any]:
        """The body of one request, without its id."""

    @abstractmethod
    async def _ask(
        self, body: Mapping[str, Any], in_flight: InFlightSample, reader: StreamReader
    ) -> Generation:
        """Send a request under the reader's id; raises `RequestError`."""

    @abstractmethod
    async def _end_early(
        self, request: "asyncio.Future[Generation]", reader: StreamReader
    ) -> Generation:
        """End a request in flight, and say what came of it; soon, and without an error."""

    @abstractmethod
    async def _abandon(self, rid: str) -> None:
        """See to it that the server drops a request whose answer nobody will read."""

    async def _generate(self, body: Mapping[str, Any], in_flight: InFlightSample) -> Generation:
        cancelled = asyncio.Event()
        loop = asyncio.get_running_loop()
        # The loop may be closed by then, and with it all that could be cancelled.
        in_flight.when_cancelled(lambda: _call(loop, cancelled.set))
        if not await self._take_place(in_flight, cancelled):
            return Generation(new_rid(), aborted=True)
        try:
            in_flight.has_started = True
            return await self._tries(body, in_flight, cancelled)
        finally:
            self._requests.release()

    async def _take_place(self, in_flight: InFlightSample, cancelled: asyncio.Event) -> bool:
        """Wait for a free place; false, and none is taken, where it is cancelled before."""
        place = asyncio.ensure_future(self._requests.acquire())
        ending = asyncio.ensure_future(cancelled.wait())
        is_wanted = False
        try:
            await asyncio.wait({place, ending}, return_when=asyncio.FIRST_COMPLETED)
            # The event is set a moment after the generation is cancelled.
            is_wanted = place.done() and not in_flight.is_cancelled
        finally:
            ending.cancel()
            if not is_wanted and not place.cancel():
                self._requests.release()
        return is_wanted

    async def _tries(
        self, body: Mapping[str, Any], in_flight: InFlightSample, cancelled: asyncio.Event
    ) -> Generation:
        retries = Retries(BACKOFF)
        any_lost = False
        while True:
            reader = StreamReader(new_rid())
            if in_flight.is_cancelled:
                return Generation(reader.found.rid, aborted=True, tokens_at_least=any_lost)
            in_flight.begin_try(reader.text)
            start_s = time.monotonic()
            try:
                found = await self._try(body, reader, in_flight, cancelled)
                if found.aborted and not in_flight.is_cancelled:
                    raise RequestError("the server aborted the request", retryable=True)
            except RequestError as error:
                any_lost = any_lost or not isinstance(error, TurnedAwayError)
                pause_s = retries.pause_s(error.retry_after_s) if error.retryable else None
                if pause_s is not None and not in_flight.is_cancelled:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(cancelled.wait(), pause_s)
                    continue
                # What had come by then was generated all the same.
                found = replace(reader.result(), aborted=False, error=str(error))
            ended_s = time.monotonic()
            return replace(
                found,
                latency_s=ended_s - start_s,
                ended_s=ended_s,
                tokens_at_least=found.tokens_at_least or any_lost,
            )

    async def _try(
        self,
        body: Mapping[str, Any],
        reader: StreamReader,
        in_flight: InFlightSample,
        cancelled: asyncio.Event,
    ) -> Generation:
        """One try. What the server may still be busy with is abandoned."""
        request = asyncio.ensure_future(self._ask(body, in_flight, reader))
        ending = asyncio.ensure_future(cancelled.wait())
        try:
            await asyncio.wait({request, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                return await self._end_early(request, reader)
            return await request
        except (RequestError, asyncio.CancelledError) as error:
            if reader.is_open or isinstance(error, RequestTimeoutError | asyncio.CancelledError):
                await self._abandon(reader.found.rid)
            raise
        finally:
            ending.cancel()
            request.cancel()


def _call(loop: asyncio.AbstractEventLoop, callback: Any) -> None:
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def new_rid() -> str:
    """A request id that is no other's beginning: SGLang aborts by prefix."""
    return f"lim-{uuid.uuid4().hex}."
