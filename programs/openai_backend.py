"""Any OpenAI-compatible server as a backend, through the `openai` package.

The API has no aborts (the connection is closed instead), no request ids and no word on seeds; what
is no part of it is sent only on request. Failures come in the same words as those of a SGLang
server.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncOpenAI,
    AsyncStream,
    BadRequestError,
)

from lim_sglang.programs.backend import Backend, InFlightSample
from lim_sglang.programs.chat import TOP_LOGPROBS, Generation, StreamReader, any_request
from lim_sglang.programs.http_client import (
    CONNECT_TIMEOUT_S,
    INFO_TIMEOUT_S,
    Client,
    RequestError,
    TurnedAwayError,
    normalise_url,
    reason_of,
)

CHAT, MODELS = "/chat/completions", "/models"
NOT_LISTED = (404, 405, 501)
"""What servers answer that do not list their models."""
LIMIT, NEWER_LIMIT = "max_tokens", "max_completion_tokens"
"""The name that every server knows, and the only one that OpenAI's newer models take."""


class OpenAIClient(Client):
    """Chat completions of one server, event by event."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """Connects to nothing yet.

        Raises:
            ServerError: `url` is no HTTP address, or no HTTP header can hold the key.
        """
        super().__init__(base_url(url), api_key=api_key)
        self._limit_name = LIMIT
        self._openai = AsyncOpenAI(
            base_url=self.url,
            api_key=api_key or "",
            http_client=self.http,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            max_retries=0,  # the endpoint tries again, and shows it
        )

    def models(self) -> tuple[str, ...] | None:
        """The names of the server's models, None where it does not list them.

        Raises:
            RequestError: unreachable, the key is wrong, or the list has another form.
        """
        return self.start(self._list_models()).result()

    async def events(
        self, body: Mapping[str, Any], *, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any]]:
        """A chat completion as the events of its stream, as they come, not checked.

        Leaving it early closes the connection, which is all that this API has to end a request.

        Args:
            timeout_s: limit of all of it.

        Raises:
            RequestError: unreachable, connection lost, out of time, a status above 399, an error
                or something other than JSON in mid-stream.
        """
        rest = {name: value for name, value in body.items() if name != LIMIT}
        async with self._openai_in_words(CHAT, timeout_s):
            stream = await self._openai.post(
                CHAT,
                body={**rest, self._limit_name: body[LIMIT], "stream": True},
                # Plain JSON: the package's types would neither check it nor be cheap.
                cast_to=object,
                stream=True,
                stream_cls=AsyncStream[Any],
            )
            async with stream:
                if "json" in stream.response.headers.get("content-type", ""):
                    await stream.response.aread()
                    yield stream.response.json()  # whole, as a server that does not stream has it
                    return
                async for event in stream:
                    yield event

    async def _list_models(self) -> tuple[str, ...] | None:
        async with self._openai_in_words(MODELS, INFO_TIMEOUT_S):
            try:
                found: Any = await self._openai.get(MODELS, cast_to=object)
            except APIStatusError as error:
                if error.status_code in NOT_LISTED:
                    return None
                raise
        try:
            return tuple(str(model["id"]) for model in found["data"])
        except (KeyError, TypeError):
            raise RequestError(
                f"{self.url}{MODELS} answered something other than a list of models: "
                f"{str(found)[:80]!r}"
            ) from None

    @asynccontextmanager
    async def _openai_in_words(self, path: str, timeout_s: float) -> AsyncIterator[None]:
        async with self._in_words(path, timeout_s):
            try:
                yield
            except APIStatusError as error:
                self._learn_limit_name(error)
                self._check_status(error.response, path)
                raise
            except APIConnectionError as error:
                if isinstance(error.__cause__, httpx.RequestError):
                    raise error.__cause__ from None
                raise RequestError(f"the connection to {self.url} failed ({error})") from None
            except APIError as error:
                raise RequestError(
                    f"the server ended the stream: {error.message}", retryable=True
                ) from None
            except ValueError as error:
                raise RequestError(
                    f"the stream is no chat completion ({error!r})", retryable=True
                ) from None

    def _learn_limit_name(self, error: APIStatusError) -> None:
        refused = isinstance(error, BadRequestError) and error.param == LIMIT
        if refused and NEWER_LIMIT in error.message:
            self._limit_name = NEWER_LIMIT
            raise TurnedAwayError(f"{self.url} takes {NEWER_LIMIT} only", retryable=True)

    def _check_status(self, response: httpx.Response, path: str) -> None:
        if response.status_code == 404:
            reason = reason_of(response)
            raise TurnedAwayError(
                f"{self.url} refuses the model (HTTP 404): {reason}"
                if "model" in reason.lower()
                else f"{self.url} has no {path}: does the base URL end in /v1?"
            )
        super()._check_status(response, path)


def base_url(url: str) -> str:
    """The address under which the API's paths are; /v1 where only a host is given.

    Raises:
        ServerError: `url` is no HTTP address.
    """
    full = normalise_url(url)
    return full if urlsplit(full).path else f"{full}/v1"


CLOSE_TIMEOUT_S = 3.0
"""For the end of a connection that nobody needs any more."""


class OpenAIBackend(Backend):
    """One model of one server. Answers are always streamed: else the tokens of an ended generation
    would be unknown.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_concurrency: int = 64,
        thinking: bool | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: the API's base URL; /v1 is added to a bare host.
            model: its name at the server.
            timeout_s: limit of one generation, from sending to the answer.
            max_concurrency: requests that the server is given at once; others wait here.
            thinking: sent as vLLM's and SGLang's `chat_template_kwargs`; None sends nothing.

        Raises:
            ServerError: `url` is no HTTP address.
        """
        self._openai = OpenAIClient(url, api_key=api_key)
        super().__init__(self._openai, timeout_s=timeout_s, max_concurrency=max_concurrency)
        self._model = model
        self._thinking = thinking

    @property
    def honours_seeds(self) -> bool:
        """They are sent, but nothing in the API says whether they are heeded."""
        return False

    def server_info(self) -> dict[str, Any]:
        """What is known of the server; raises `ServerError` where it does not answer."""
        self._openai.models()
        return {"api": "openai", "model_path": self._model}

    def about(self) -> dict[str, Any]:
        """What of the server an answer depends on, and what it cannot do."""
        return {
            "api": "openai",
            "model_path": self._model,
            "url": self._openai.url,
            "aborts": "connection closed",
            "tokens_of_aborted": "pieces of the stream, unless the server counts as it goes",
            "seeds": "sent, not known to be heeded",
        }

    def sampling_defaults(self) -> Mapping[str, Any]:
        """No top_k, which the API does not have."""
        return {"top_k": -1}

    def _request(
        self, messages: Sequence[Mapping[str, str]], sampling_params: Any, seed: int | None
    ) -> dict[str, Any]:
        return openai_request(self._model, messages, sampling_params, seed, thinking=self._thinking)

    async def _ask(
        self, body: Mapping[str, Any], in_flight: InFlightSample, reader: StreamReader
    ) -> Generation:
        if in_flight.on_confidence:
            body = {**body, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        async with aclosing(self._openai.events(body, timeout_s=self._timeout_s)) as events:
            async for event in events:
                in_flight.see(reader.take(event), reader.found.num_tokens)
                # The server knows it by a name of its own.
                rid = str(event.get("id") or reader.found.rid)
                reader.found = replace(reader.found, rid=rid)
        return reader.whole()

    async def _end_early(
        self, request: "asyncio.Future[Generation]", reader: StreamReader
    ) -> Generation:
        request.cancel()
        await asyncio.wait({request}, timeout=CLOSE_TIMEOUT_S)
        # What it generates until it notices is nowhere told.
        return replace(
            reader.result(), aborted=not reader.is_whole, tokens_at_least=not reader.is_whole
        )

    async def _abandon(self, rid: str) -> None:
        """Its connection is closed already, or about to be."""


def openai_request(
    model: str,
    messages: Sequence[Mapping[str, str]],
    sampling_params: Any,
    seed: int | None,
    *,
    thinking: bool | None = None,
) -> dict[str, Any]:
    """The body of one chat completion, with nothing in it that nobody asked for.

    Args:
        sampling_params: SGLang's `SglSamplingParams`; a top_k of -1 is not sent.
        thinking: on or off; None sends nothing.
    """
    body = any_request(model, messages, sampling_params, seed, thinking=thinking)
    body["stream_options"] = {"include_usage": True}
    if sampling_params.top_k > 0:
        body["top_k"] = sampling_params.top_k
    return body
