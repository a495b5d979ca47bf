"""A SGLang server as a backend of SGLang's frontend language: what `@sgl.function` programs run on.

SGLang's own `RuntimeEndpoint` sends no request ids and has neither time-outs nor the model's chat
template. This one sends messages, which the server renders with the model's own template; it gives
each try an id of its own, aborts what is no longer wanted, and returns failures as values, because
the frontend turns an exception in a branch into a KeyError somewhere else.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import CancelledError
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from lim_sglang.compat import BaseBackend, ChatTemplate
from lim_sglang.programs.chat import (
    Generation,
    StreamReader,
    as_stream,
    chat_request,
    read_answer,
)
from lim_sglang.programs.client import Client, RequestError, RequestTimeoutError
from lim_sglang.programs.running import Running

SEED = "seed"
"""A branch's variable with the seed that its generations are sent."""
RUNNING = "running"
"""A branch's variable with its `Running`; without one, nobody can end its generation early."""

RETRY_DELAYS_S = (0.5, 2.0)
"""Pauses before a request that may succeed later is tried again."""
ABORT_TIMEOUT_S = 3.0
"""For one word to the server, and for all that it says about a generation that was ended."""
ABORT_AGAIN_S = 0.5
"""The server forgets an abort that overtakes its request, so it is told again."""

TRANSPARENT = ChatTemplate("transparent", default_system_prompt=None, role_prefix_and_suffix={})
"""Adds nothing to the messages: the server renders them."""


class Endpoint(BaseBackend):
    """One running server. Any number of programs and threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_concurrency: int = 64,
        thinking: bool | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            timeout_s: limit of one generation, from sending to the answer.
            max_concurrency: requests that the server is given at once; others wait here.
            thinking: on or off for models that can do both; None leaves it to the model's template.

        Raises:
            ServerError: `url` is no HTTP address.
        """
        super().__init__()
        self.chat_template = TRANSPARENT
        self._timeout_s = timeout_s
        self._thinking = thinking
        self._places = asyncio.Semaphore(max_concurrency)
        self._client = Client(url, api_key=api_key)

    def server_info(self) -> dict[str, Any]:
        """What the server answers under `/server_info`; raises `ServerError`."""
        info: dict[str, Any] = self._client.get("/server_info")
        return info

    def about(self) -> dict[str, Any]:
        """What of the server an answer depends on; raises `ServerError`."""
        info = self.server_info()
        live = (info.get("internal_states") or [{}])[0].get("lim") or {}
        about = {name: info.get(name) for name in ("model_path", "version", "random_seed")}
        return about | {"url": self._client.url, "lim_config": live.get("config")}

    @cached_property
    def honours_seeds(self) -> bool:
        """Whether equal seeds give equal samples; raises `ServerError`."""
        return bool(self.server_info().get("enable_deterministic_inference"))

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, Generation]:
        """Called by the frontend for `sgl.gen`: the next turn after the branch's messages."""
        running: Running = s.variables.get(RUNNING) or Running(0)
        body = chat_request(
            s.messages_, sampling_params, s.variables.get(SEED), thinking=self._thinking
        )
        try:
            found = self._client.start(self._generate(body, running)).result()
        except (RequestError, CancelledError) as error:
            # Closed while this waited.
            found = Generation(new_rid(), error=str(error) or "the connection was closed")
        return found.text, found

    def close(self) -> None:
        """Abort what is running and end the connection; every waiting branch gets an error."""
        self._client.close()

    async def _generate(self, body: Mapping[str, Any], running: Running) -> Generation:
        cancelled = asyncio.Event()
        loop = asyncio.get_running_loop()
        # The loop may be closed by then, and with it all that could be cancelled.
        running.when_cancelled(lambda: _call(loop, cancelled.set))
        async with self._places:
            running.has_started = not cancelled.is_set()
            for delay_s in (*RETRY_DELAYS_S, None):
                rid = new_rid()
                if cancelled.is_set():
                    return Generation(rid, aborted=True)
                start_s = time.monotonic()
                try:
                    found = await self._try({**body, "rid": rid}, running, cancelled)
                    if found.aborted and not cancelled.is_set():
                        raise RequestError("the server aborted the request", retryable=True)
                except RequestError as error:
                    if error.retryable and delay_s is not None and not cancelled.is_set():
                        with suppress(TimeoutError):
                            await asyncio.wait_for(cancelled.wait(), delay_s)
                        continue
                    found = Generation(rid, error=str(error))
                return replace(found, latency_s=time.monotonic() - start_s)
        raise AssertionError("the last try returns")

    async def _try(
        self, body: Mapping[str, Any], running: Running, cancelled: asyncio.Event
    ) -> Generation:
        """One try. What the server may still be busy with is aborted."""
        rid = body["rid"]
        reader = StreamReader(rid)
        request = asyncio.ensure_future(self._ask(body, running, reader))
        ending = asyncio.ensure_future(cancelled.wait())
        try:
            await asyncio.wait({request, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not request.done():
                return await self._end_early(request, reader)
            return await request
        except (RequestTimeoutError, asyncio.CancelledError):
            await self._abort(rid)
            raise
        finally:
            ending.cancel()
            request.cancel()

    async def _ask(
        self, body: Mapping[str, Any], running: Running, reader: StreamReader
    ) -> Generation:
        path = "/v1/chat/completions"
        if not running.watched:
            answer = await self._client.fetch("POST", path, body, timeout_s=self._timeout_s)
            return read_answer(answer, body["rid"])
        watch = running.on_confidence
        stream = as_stream(body, logprobs=watch is not None)
        lines = self._client.lines("POST", path, stream, timeout_s=self._timeout_s)
        async with aclosing(lines):
            async for line in lines:
                confidences = reader.read(line)
                running.num_tokens = reader.found.num_tokens
                if watch and any(watch(confidence) for confidence in confidences):
                    running.cancel()
        if not reader.is_whole:
            raise RequestError("the server ended the stream before the answer", retryable=True)
        return reader.result()

    async def _end_early(
        self, request: "asyncio.Future[Generation]", reader: StreamReader
    ) -> Generation:
        """Abort a request, and wait for what the server says about it as long as that is quick."""
        rid = reader.found.rid
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        while time.monotonic() < deadline and not request.done():
            await self._abort(rid)
            await asyncio.wait({request}, timeout=ABORT_AGAIN_S)
        if request.done():
            with suppress(RequestError):  # lost, but nobody wants it any more
                return replace(await request, aborted=not (await request).truncated)
        return replace(reader.result(), aborted=True)

    async def _abort(self, rid: str) -> None:
        try:
            await self._client.send(
                "POST", "/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S
            )
        except RequestError:
            return  # the server is gone, and the request with it


def _call(loop: asyncio.AbstractEventLoop, callback: Any) -> None:
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def new_rid() -> str:
    """A request id that is no other's beginning: SGLang aborts by prefix."""
    return f"lim-{uuid.uuid4().hex}."
