"""A SGLang server as a backend: chat completions with request ids, aborts by id, thinking budgets.

SGLang's own `RuntimeEndpoint` sends no request ids and has neither time-outs nor the model's chat
template. This backend sends messages, which the server renders with the model's own template, and
aborts by id what is no longer wanted. A thinking budget takes two requests: the first may take as
many tokens as the thoughts may; where it used them all, a second one goes on from its text, with
the thoughts closed (`continue_final_message`).
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from lim_sglang.programs.backend import Backend, InFlightSample
from lim_sglang.programs.chat import (
    END_OF_THOUGHT,
    Generation,
    StreamReader,
    as_stream,
    chat_request,
    read_answer,
    share_of_thoughts,
    thoughts_of,
)
from lim_sglang.programs.http_client import Client, RequestError

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


ENOUGH = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    f"thinking directly now.\n{END_OF_THOUGHT}\n\n"
)
"""How Qwen3 is made to stop (arXiv 2505.09388, its thinking budget)."""
CUT_CHARACTER = "\ufffd"
"""In place of a character whose first bytes alone were generated."""


class ThinkingBudgetBackend(SglangBackend):
    """A SGLang server with a thinking model. The words that close the thoughts are no tokens of its
    own: they are in the text and not in the counts.
    """

    def __init__(self, url: str, *, thinking_budget: int, **options: Any) -> None:
        """Like `Endpoint`.

        Args:
            thinking_budget: tokens after which the thoughts are closed.
        """
        super().__init__(url, **options)
        self._thinking_budget = thinking_budget

    def about(self) -> dict[str, Any]:
        """What of the server an answer depends on; raises `ServerError`."""
        return super().about() | {"thinking_budget": self._thinking_budget}

    async def _generate(self, body: Mapping[str, Any], in_flight: InFlightSample) -> Generation:
        limit = body["max_tokens"]
        budget = min(self._thinking_budget, limit)
        first = await super()._generate({**body, "max_tokens": budget}, in_flight)
        if not first.truncated or budget == limit:
            return first
        said = close_thoughts(first.text)
        in_flight.keep(first.num_tokens, said)
        rest = await super()._generate(continuation(body, said, limit - budget), in_flight)
        return joined(first, said, rest)


def close_thoughts(text: str) -> str:
    """What was said, and the end of the thoughts if they have none."""
    return text if END_OF_THOUGHT in text else text.rstrip(CUT_CHARACTER) + ENOUGH


def continuation(body: Mapping[str, Any], said: str, max_tokens: int) -> dict[str, Any]:
    """The same request, to go on from what was said."""
    turns = [*body["messages"], {"role": "assistant", "content": said}]
    return {**body, "messages": turns, "max_tokens": max_tokens, "continue_final_message": True}


def joined(first: Generation, said: str, rest: Generation) -> Generation:
    """Both as one, which ended as the second did."""
    closed = END_OF_THOUGHT in first.text
    return replace(
        rest,
        text=said + rest.text,
        num_tokens=first.num_tokens + rest.num_tokens,
        tokens_at_least=first.tokens_at_least or rest.tokens_at_least,
        num_reasoning_tokens=first.num_reasoning_tokens if closed else first.num_tokens,
        reasoning_estimated=closed and first.reasoning_estimated,
        num_repeated_logprobs=first.num_repeated_logprobs + rest.num_repeated_logprobs,
        num_prompt_tokens=first.num_prompt_tokens,
        latency_s=first.latency_s + rest.latency_s,
    )
