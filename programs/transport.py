"""A server as a backend of SGLang's frontend language, whatever it speaks.

Each try of a sample has an id of its own, may be ended early by its program, and gives a failure as
a value, because the frontend turns an exception in a branch into a KeyError somewhere else.
"""

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lim_sglang.compat import BaseBackend, ChatTemplate
from lim_sglang.programs.backoff import Backoff, Retries
from lim_sglang.programs.chat import Generation, StreamReader
from lim_sglang.programs.client import Client, RequestError, RequestTimeoutError, TurnedAwayError
from lim_sglang.programs.places import ConcurrencyLimiter
from lim_sglang.programs.running import InFlightSample

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
