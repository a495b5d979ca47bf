"""A SGLang server as a backend: chat completions with request ids, aborts by id, thinking budgets.

SGLang's own `RuntimeEndpoint` sends no request ids and has neither time-outs nor the model's chat
template. This backend sends messages, which the server renders with the model's own template, and
aborts by id the requests that are no longer wanted.

A thinking budget takes two requests. The first generates up to the budget; if it used all of it,
the second continues its text with the thoughts closed (`continue_final_message`).
The words that close the thoughts are in the text and not in the counts: the model did not generate
them.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import httpx
from rich.console import Console

from lim_sglang.config import Drafts, honours_seeds, lim_state
from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.programs.backend import Backend, InFlightSample
from lim_sglang.programs.chat import (
    END_OF_THOUGHT,
    Generation,
    StreamReader,
    as_stream,
    chat_request,
    proportional_tokens,
    read_answer,
    thinking_switch,
    thoughts_in,
)
from lim_sglang.programs.http_client import Client, RejectedError, RequestError, awaited
from lim_sglang.programs.schema import Access, Api, Sampling
from lim_sglang.progress import told_if_late

ABORT_TIMEOUT_S = 3.0
"""Limit of one abort, and of the wait for the result of an aborted request."""
COUNT_TIMEOUT_S = 2.0
"""Limit of a count of tokens; shorter, so that an abort does not lose a complete answer."""
ABORT_AGAIN_S = 0.5
"""Pause between two aborts of a request: the server forgets one that overtakes its request."""
CHAT, MODEL_INFO = "/v1/chat/completions", "/model_info"
CLOSING_WORDS = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    f"thinking directly now.\n{END_OF_THOUGHT}\n\n"
)
"""The words that make Qwen3 stop thinking (arXiv 2505.09388, its thinking budget)."""
CUT_CHARACTER = "\ufffd"
"""Stands for a character of which only the first bytes were generated."""


def connect(access: Access, console: Console) -> Backend:
    """Connect to a server of either API, once it is known to answer.

    Raises:
        ConfigError: an option that the API does not take, or a model has to be chosen.
        ServerError: nothing answers, the key is wrong, or the server has another API.
    """
    _refuse_options(access)
    if access.api is Api.OPENAI:
        from lim_sglang.programs.openai_backend import connect_openai

        return connect_openai(access, console)
    check_server(access, console)
    with _client(access) as client:
        running: int | None = client.get("/server_info").get("max_running_requests")
        check_thinking(client, access.thinking, access.thinking_budget)
    if running:
        access = replace(access, max_concurrency=min(access.max_concurrency, running))
    return SglangBackend(access)


def check_server(access: Access, console: Console) -> None:
    """Refuse an address where no SGLang server answers.

    Raises:
        ServerError: nothing answers, the key is wrong, or it is no SGLang server.
    """
    with _client(access) as client, told_if_late(console, awaited(client)):
        _check_sglang(client, access.command)


def _client(access: Access) -> Client:
    return Client(access.url, api_key=access.api_key, timeout_s=access.timeout_s)


def _check_sglang(client: Client, command: str | None) -> None:
    """Raise `RequestError` unless a server says which model it serves, as SGLang does."""
    others = f" `{command} --api openai` asks other servers of OpenAI's API" if command else ""
    try:
        info = client.get(MODEL_INFO)
    except RejectedError as error:
        if error.response is not None and error.response.status_code == httpx.codes.NOT_FOUND:
            error.args = (f"{error}{others}",)
        raise
    if not (isinstance(info, dict) and info.get("model_path")):
        raise RejectedError(
            f"{client.url}{MODEL_INFO} names no model: is it an SGLang server?{others}"
        )


def _refuse_options(access: Access) -> None:
    if access.api is Api.SGLANG and access.model is not None:
        raise ConfigError("--model goes with --api openai: an SGLang server answers with its own")
    if access.api is Api.OPENAI and access.thinking_budget is not None:
        raise ConfigError(
            "--thinking-budget needs --api sglang: OpenAI's API cannot continue half a turn"
        )
    if access.thinking is False and access.thinking_budget is not None:
        raise ConfigError(
            "--thinking-budget limits thoughts that --no-thinking forbids: leave one of them out"
        )


def check_thinking(client: Client, thinking: bool | None, budget: int | None) -> None:
    """Refuse to switch thoughts on or off if the model's chat template has no such switch, and to
    limit the thoughts of a model that has neither the switch nor a token that ends thoughts.

    Raises:
        ConfigError: the template renders the same prompt either way.
        ServerError: the server does not tokenize.
    """
    if thinking is None and budget is None:
        return
    messages = [{"role": "user", "content": "Do you think?"}]
    on, off = (
        client.post("/v1/tokenize", {"messages": messages, **thinking_switch(choice)})
        for choice in (True, False)
    )
    if on != off:
        return
    no_switch = "the chat template of the server's model has no enable_thinking to switch"
    if thinking is not None:
        option = "--thinking" if thinking else "--no-thinking"
        raise ConfigError(f"{option}: {no_switch}; leave the option out")
    end = client.post("/v1/tokenize", {"prompt": END_OF_THOUGHT, "add_special_tokens": False})
    if end["count"] != 1:
        raise ConfigError(
            f"--thinking-budget: {no_switch}, and its tokenizer no token {END_OF_THOUGHT}: the "
            "model does not think; leave the option out"
        )


class SglangBackend(Backend):
    """One running SGLang server."""

    def __init__(self, access: Access) -> None:
        """Prepare the backend; nothing is sent yet.

        Raises:
            ConfigError: the URL is no HTTP address, or no HTTP header can hold the key.
        """
        super().__init__(_client(access), access)

    def server_info(self) -> dict[str, Any]:
        """Return the server's `/server_info`; raises `ServerError`."""
        info: dict[str, Any] = self._client.get("/server_info")
        return info

    @cached_property
    def _first_info(self) -> dict[str, Any]:
        """The first `/server_info`, for properties that do not change while the server runs."""
        return self.server_info()

    def about(self) -> dict[str, Any]:
        """Return the properties of the server that an answer depends on; raises `ServerError`."""
        info, access = self._first_info, self._access
        about = {name: info.get(name) for name in ("model_path", "version", "random_seed")}
        about |= {"url": self._client.url, "lim_config": (lim_state(info) or {}).get("config")}
        about |= {"thinking": access.thinking, "timeout_s": access.timeout_s}
        budget = access.thinking_budget
        return about | ({"thinking_budget": budget} if budget is not None else {})

    def drafts(self) -> Drafts | None:
        """Return what the server has drafted so far; None if it does not draft, or is gone."""
        with suppress(ServerError, CancelledError):
            # Asked again only of a server that drafts.
            return Drafts.of(self._first_info) and Drafts.of(self.server_info())
        return None

    def sampling_defaults(self) -> Mapping[str, Any]:
        """Return the model's generation config if LessIsMore serves it; raises `ServerError`."""
        return (lim_state(self._first_info) or {}).get("sampling_defaults") or {}

    @property
    def honours_seeds(self) -> bool:
        """True if equal seeds give equal samples; raises `ServerError`."""
        return honours_seeds(self._first_info)

    def _request(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling, seed: int | None
    ) -> dict[str, Any]:
        body = chat_request("default", messages, sampling, seed, thinking=self._access.thinking)
        # One text, as the model wrote it, even if the server has a reasoning parser.
        return body | {"top_k": sampling.top_k, "separate_reasoning": False}

    async def _generate(self, body: Mapping[str, Any], in_flight: InFlightSample) -> Generation:
        limit, budget = body["max_tokens"], self._access.thinking_budget
        if budget is None or budget >= limit:
            return await super()._generate(body, in_flight)
        first = await super()._generate({**body, "max_tokens": budget}, in_flight)
        if not first.truncated:
            return first
        beginning = close_thoughts(first.text)
        in_flight.keep(first.num_tokens, beginning)
        rest = await super()._generate(continue_turn(body, beginning, limit - budget), in_flight)
        return join_generations(first, beginning, rest)

    async def _ask(
        self, body: Mapping[str, Any], in_flight: InFlightSample, reader: StreamReader
    ) -> Generation:
        body, timeout_s = {**body, "rid": reader.found.rid}, self._access.timeout_s
        if not in_flight.streamed:
            answer = await self._client.fetch("POST", CHAT, body, timeout_s=timeout_s)
            return await self._count_thoughts(read_answer(answer, reader.found.rid))
        stream = as_stream(body, logprobs=in_flight.wants_logprobs)
        async with aclosing(self._client.lines("POST", CHAT, stream, timeout_s=timeout_s)) as lines:
            async for line in lines:
                in_flight.see(reader.read(line))
        return reader.finish()

    async def _count_thoughts(self, found: Generation) -> Generation:
        """Count the tokens of the thoughts if the server, without a reasoning parser, did not.

        The server's tokenizer may, though it seldom does, divide a text otherwise than the model
        wrote it. If it does not answer, the share of the characters is the estimate.
        """
        thoughts = thoughts_in(found.text)
        if not thoughts or found.num_reasoning_tokens:
            return found
        prompt = {"prompt": thoughts, "add_special_tokens": False}
        try:
            answer = await self._client.fetch(
                "POST", "/v1/tokenize", prompt, timeout_s=COUNT_TIMEOUT_S
            )
            counted = min(int(answer["count"]), found.num_tokens)
        except (RequestError, KeyError, TypeError, ValueError):
            estimate = proportional_tokens(found.num_tokens, thoughts, found.text)
            return replace(found, num_reasoning_tokens=estimate, reasoning_estimated=True)
        return replace(found, num_reasoning_tokens=counted)

    async def _end_early(
        self, request: "asyncio.Future[Generation]", reader: StreamReader
    ) -> Generation:
        """Abort a request, and wait for its result for a short time."""
        deadline = time.monotonic() + ABORT_TIMEOUT_S
        while time.monotonic() < deadline and not request.done():
            await self._drop(reader.found.rid)
            await asyncio.wait({request}, timeout=ABORT_AGAIN_S)
        if request.done():
            with suppress(RequestError):  # its result is not wanted
                return await request
        return replace(reader.result(), aborted=True, tokens_at_least=True)

    async def _drop(self, rid: str) -> None:
        with suppress(RequestError):  # the server is gone, and the request with it
            await self._client.send(
                "POST", "/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S
            )


def close_thoughts(text: str) -> str:
    """Return a text that was cut off, with the end of its thoughts if they have none."""
    return text if END_OF_THOUGHT in text else text.rstrip(CUT_CHARACTER) + CLOSING_WORDS


def continue_turn(body: Mapping[str, Any], beginning: str, max_tokens: int) -> dict[str, Any]:
    """Return the request that continues the assistant's turn after its beginning."""
    turns = [*body["messages"], {"role": "assistant", "content": beginning}]
    return {**body, "messages": turns, "max_tokens": max_tokens, "continue_final_message": True}


def join_generations(first: Generation, beginning: str, rest: Generation) -> Generation:
    """Return two generations of one turn as one, which ended as the second did."""
    closed = END_OF_THOUGHT in first.text
    return replace(
        rest,
        text=beginning + rest.text,
        num_tokens=first.num_tokens + rest.num_tokens,
        tokens_at_least=first.tokens_at_least or rest.tokens_at_least,
        num_reasoning_tokens=first.num_reasoning_tokens if closed else first.num_tokens,
        reasoning_estimated=closed and first.reasoning_estimated,
        num_repeated_logprobs=first.num_repeated_logprobs + rest.num_repeated_logprobs,
        num_prompt_tokens=first.num_prompt_tokens,
        latency_s=first.latency_s + rest.latency_s,
    )
