"""A SGLang server as what programs run on.

SGLang's own `RuntimeEndpoint` sends no request ids and has neither time-outs nor the model's chat
template. This one sends messages, which the server renders with the model's own template, and
aborts by id what is no longer wanted.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from lim_sglang.programs.chat import (
    Generation,
    StreamReader,
    as_stream,
    chat_request,
    read_answer,
)
from lim_sglang.programs.client import Client, RequestError
from lim_sglang.programs.running import InFlightSample
from lim_sglang.programs.thoughts import share_of_thoughts, thoughts_of
from lim_sglang.programs.transport import Backend

ABORT_TIMEOUT_S = 3.0
"""For one word to the server, and for all that it says about a generation that was ended."""
COUNT_TIMEOUT_S = 2.0
"""For the count of a text's tokens; less, so that an abort does not lose what is whole."""
ABORT_AGAIN_S = 0.5
"""The server forgets an abort that overtakes its request, so it is told again."""


class SglangBackend(Backend):
    """One running SGLang server."""

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
        client = Client(url, api_key=api_key)
        super().__init__(client, timeout_s=timeout_s, max_concurrency=max_concurrency)
        self._thinking = thinking

    def server_info(self) -> dict[str, Any]:
        """What the server answers under `/server_info`; raises `ServerError`."""
        info: dict[str, Any] = self._client.get("/server_info")
        return info

    @cached_property
    def _first_info(self) -> dict[str, Any]:
        """What it said when it was first asked, for what does not change while it runs."""
        return self.server_info()

    def about(self) -> dict[str, Any]:
        """What of the server an answer depends on; raises `ServerError`."""
        info = self._first_info
        about = {name: info.get(name) for name in ("model_path", "version", "random_seed")}
        about |= {"url": self._client.url, "lim_config": _live(info).get("config")}
        return about | {"thinking": self._thinking, "timeout_s": self._timeout_s}

    def sampling_defaults(self) -> Mapping[str, Any]:
        """Of the model's generation config, where LessIsMore serves it; raises `ServerError`."""
        return _live(self._first_info).get("sampling_defaults") or {}

    @property
    def honours_seeds(self) -> bool:
        """Whether equal seeds give equal samples; raises `ServerError`."""
        return bool(self._first_info.get("enable_deterministic_inference"))

    def _request(
        self, messages: Sequence[Mapping[str, str]], sampling_params: Any, seed: int | None
    ) -> dict[str, Any]:
        return chat_request(messages, sampling_params, seed, thinking=self._thinking)

    async def _ask(
        self, body: Mapping[str, Any], in_flight: InFlightSample, reader: StreamReader
    ) -> Generation:
        path = "/v1/chat/completions"
        body = {**body, "rid": reader.found.rid}
        if not in_flight.streamed:
            answer = await self._client.fetch("POST", path, body, timeout_s=self._timeout_s)
            return await self._with_thoughts_counted(read_answer(answer, body["rid"]))
        watch = in_flight.on_confidence
        stream = as_stream(body, logprobs=watch is not None)
        lines = self._client.lines("POST", path, stream, timeout_s=self._timeout_s)
        async with aclosing(lines):
            async for line in lines:
                in_flight.see(reader.read(line), reader.found.num_tokens)
        return reader.whole()

    async def _with_thoughts_counted(self, found: Generation) -> Generation:
        """The tokens of thoughts that the server did not count, since it parses none: by its
        tokenizer, which may cut a text otherwise than the model wrote it, though it seldom does;
        by their share of the text where it does not answer.
        """
        thoughts = thoughts_of(found.text)
        if not thoughts or found.num_reasoning_tokens:
            return found
        prompt = {"prompt": thoughts, "add_special_tokens": False}
        try:
            answer = await self._client.fetch(
                "POST", "/v1/tokenize", prompt, timeout_s=COUNT_TIMEOUT_S
            )
            counted = min(int(answer["count"]), found.num_tokens)
        except (RequestError, KeyError, TypeError, ValueError):
            estimate = share_of_thoughts(found.num_tokens, thoughts, found.text)
            return replace(found, num_reasoning_tokens=estimate, reasoning_estimated=True)
        return replace(found, num_reasoning_tokens=counted)

    async def _end_early(
        self, request: "asyncio.Future[Generation]", reader: StreamReader
    ) -> Generation:
        """Abort a request, and wait for what the server says about it as long as that is quick."""
        rid = reader.found.rid
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        while time.monotonic() < deadline and not request.done():
            await self._abandon(rid)
            await asyncio.wait({request}, timeout=ABORT_AGAIN_S)
        if request.done():
            with suppress(RequestError):  # lost, but nobody wants it any more
                return await request
        return replace(reader.result(), aborted=True, tokens_at_least=True)

    async def _abandon(self, rid: str) -> None:
        try:
            await self._client.send(
                "POST", "/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S
            )
        except RequestError:
            return  # the server is gone, and the request with it


def _live(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """What LessIsMore shows in `/server_info`; nothing where another SGLang serves."""
    return (info.get("internal_states") or [{}])[0].get("lim") or {}
