"""Any OpenAI-compatible server as a backend, through the `openai` package.

The API has no aborts (the connection is closed instead), no request ids and no promise about seeds.
Fields outside the API are sent only if the user asked for them. Failures have the same words as
those of an SGLang server.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from openai import (
    APIConnectionError,
    APIError,
    APIStatusError,
    AsyncOpenAI,
    AsyncStream,
    BadRequestError,
)
from rich.console import Console

from lim_sglang.errors import ConfigError, cut
from lim_sglang.programs.backend import Backend, InFlightSample
from lim_sglang.programs.chat import (
    TOP_LOGPROBS,
    Generation,
    StreamReader,
    chat_request,
    some_names,
)
from lim_sglang.programs.http_client import (
    CONNECT_TIMEOUT_S,
    INFO_TIMEOUT_S,
    Client,
    RejectedError,
    RequestError,
    awaited,
    normalise_url,
    reason_of,
)
from lim_sglang.programs.schema import Access, Sampling
from lim_sglang.progress import print_plain, told_if_late

CHAT, MODELS = "/chat/completions", "/models"
NOT_LISTED = (404, 405, 501)
"""Answers of servers that do not list their models, or do not describe the one asked for."""
LIMIT, NEWER_LIMIT = "max_tokens", "max_completion_tokens"
"""The limit's name that every server knows, and the only one that OpenAI's newer models take."""
CLOSE_TIMEOUT_S = 3.0
"""Limit of the end of a connection that is not needed any more."""


def connect_openai(access: Access, console: Console) -> "OpenAIBackend":
    """Connect to a server of OpenAI's API, and to its only model if none is named.

    Raises:
        ConfigError: a model has to be chosen, or the server lists its models without the given one.
        ServerError: nothing answers, or the key is wrong.
    """
    with _client(access) as client, told_if_late(console, awaited(client)):
        listed = client.models()
        if access.model and listed and access.model not in listed and not client.has(access.model):
            raise ConfigError(
                f"{client.url} has no model {cut(repr(access.model))}: choose one with --model "
                f"from {some_names(listed)}"
            )
        model = choose_model(access.model, listed, client.url)
    print_plain(
        console,
        f"{model} by OpenAI's API, which has no top_k: one is sent only if --top-k names it",
    )
    return OpenAIBackend(replace(access, model=model))


def _client(access: Access) -> "OpenAIClient":
    return OpenAIClient(access.url, api_key=access.api_key, timeout_s=access.timeout_s)


def choose_model(given: str | None, listed: Sequence[str] | None, url: str) -> str:
    """Return the given model; else the server's only model.

    Args:
        listed: the models that the server lists; None if it lists none.

    Raises:
        ConfigError: no model is given and there is not exactly one.
    """
    if given:
        return given
    if listed is None:
        raise ConfigError(f"{url} does not list its models: name one with --model")
    if len(listed) == 1:
        return listed[0]
    raise ConfigError(
        f"{url} has {len(listed)} models: choose one with --model"
        + (f" from {some_names(listed)}" if listed else "")
    )


class OpenAIClient(Client):
    """Chat completions of one server, event by event."""

    @staticmethod
    def address(url: str) -> str:
        """Return the address to which the paths of requests are added."""
        return base_url(url)

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = INFO_TIMEOUT_S
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            timeout_s: limit of a request that a server answers at once, `INFO_TIMEOUT_S` at most.

        Raises:
            ConfigError: `url` is no HTTP address, or no HTTP header can hold the key.
        """
        super().__init__(url, api_key=api_key, timeout_s=timeout_s)
        self._limit_name = LIMIT
        self._openai = AsyncOpenAI(
            base_url=self.url,
            api_key=api_key or "",
            http_client=self.http,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            max_retries=0,  # the backend tries again, and shows it
        )

    def models(self) -> tuple[str, ...] | None:
        """Return the names of the server's models, None if it does not list them.

        Raises:
            RequestError: unreachable, the key is wrong, or the list has another form.
        """
        return self.start(self._list_models()).result()

    def has(self, model: str) -> bool:
        """Return True if the server describes a model, such as an alias that it does not list."""
        return self.start(self._has(model)).result()

    async def events(
        self, body: Mapping[str, Any], *, timeout_s: float
    ) -> AsyncGenerator[dict[str, Any]]:
        """Ask for a chat completion and yield the events of its stream as they come, unchecked.

        Closing the generator closes the connection: the API's only way to end a request.

        Args:
            timeout_s: limit of the entire stream.

        Raises:
            RequestError: unreachable, connection lost, out of time, a status above 399, an error
                in the stream, or something other than JSON.
        """
        rest = {name: value for name, value in body.items() if name != LIMIT}
        async with self._translate_openai_failures(CHAT, timeout_s):
            stream = await self._openai.post(
                CHAT,
                body={**rest, self._limit_name: body[LIMIT], "stream": True},
                # Plain JSON: the package's types cost time and check nothing.
                cast_to=object,
                stream=True,
                stream_cls=AsyncStream[Any],
            )
            async with stream:
                if "json" in stream.response.headers.get("content-type", ""):
                    # A server that does not stream sends the complete answer.
                    await stream.response.aread()
                    yield stream.response.json()
                    return
                async for event in stream:
                    yield event

    async def _has(self, model: str) -> bool:
        path = f"{MODELS}/{quote(model, safe='')}"
        async with self._translate_openai_failures(path, self.info_timeout_s):
            try:
                await self._openai.get(path, cast_to=object)
            except APIStatusError as error:
                if error.status_code in NOT_LISTED:
                    return False
                raise
        return True

    async def _list_models(self) -> tuple[str, ...] | None:
        async with self._translate_openai_failures(MODELS, self.info_timeout_s):
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
    async def _translate_openai_failures(self, path: str, timeout_s: float) -> AsyncIterator[None]:
        async with self._translate_failures(path, timeout_s):
            try:
                yield
            except APIStatusError as error:
                self._learn_limit_name(error)
                self._check_status(error.response, path)
                raise
            except APIConnectionError as error:
                if isinstance(error.__cause__, httpx.RequestError):
                    # With its own cause, such as a name that is not known.
                    raise error.__cause__ from error.__cause__.__cause__
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
            raise RejectedError(f"{self.url} takes {NEWER_LIMIT} only", retryable=True)

    def _check_status(self, response: httpx.Response, path: str) -> None:
        if response.status_code == 404:
            reason = reason_of(response)
            raise RejectedError(
                f"{self.url} refuses the model (HTTP 404): {reason}"
                if "model" in reason.lower()
                else f"{self.url} has no {path}: does the base URL end in /v1?"
            )
        super()._check_status(response, path)


def base_url(url: str) -> str:
    """Return the address of the API's paths: a host gets /v1, a path is kept.

    Raises:
        ConfigError: `url` is no HTTP address.
    """
    full = normalise_url(url)
    return full if urlsplit(full).path else f"{full}/v1"


class OpenAIBackend(Backend):
    """One model of one server.

    Answers are always streamed: the tokens of an aborted generation would be unknown otherwise.
    """

    def __init__(self, access: Access) -> None:
        """Prepare the backend; nothing is sent yet.

        Args:
            access: names the model. `thinking` is sent as vLLM's and SGLang's
                `chat_template_kwargs`.

        Raises:
            ConfigError: the URL is no HTTP address, or no HTTP header can hold the key.
        """
        self._openai = _client(access)
        super().__init__(self._openai, access)

    @property
    def honours_seeds(self) -> bool:
        """False: seeds are sent, but nothing in the API says if the server uses them."""
        return False

    def server_info(self) -> dict[str, Any]:
        """Return the API and the model; raises `ServerError` if the server does not answer."""
        self._openai.models()
        return {"api": "openai", "model_path": self._access.model}

    def about(self) -> dict[str, Any]:
        """Return the properties of the server that an answer depends on, and what the API lacks."""
        return {
            "api": "openai",
            "model_path": self._access.model,
            "url": self._openai.url,
            "aborts": "connection closed",
            "tokens_of_aborted": "pieces of the stream, unless the server counts as it goes",
            "seeds": "sent, not known to be heeded",
        }

    def sampling_defaults(self) -> Mapping[str, Any]:
        """Return no limit for top_k, which the API does not have."""
        return {"top_k": -1}

    def _request(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling, seed: int | None
    ) -> dict[str, Any]:
        model, thinking = self._access.model or "", self._access.thinking
        body = chat_request(model, messages, sampling, seed, thinking=thinking)
        body["stream_options"] = {"include_usage": True}
        return body | ({"top_k": sampling.top_k} if sampling.top_k > 0 else {})

    async def _ask(
        self, body: Mapping[str, Any], in_flight: InFlightSample, reader: StreamReader
    ) -> Generation:
        if in_flight.wants_logprobs:
            body = {**body, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        async with aclosing(self._openai.events(body, timeout_s=self._access.timeout_s)) as events:
            async for event in events:
                in_flight.see(reader.take(event))
                # The server has given the request an id of its own.
                rid = str(event.get("id") or reader.found.rid)
                reader.found = replace(reader.found, rid=rid)
        return reader.finish()

    async def _end_early(
        self, request: "asyncio.Future[Generation]", reader: StreamReader
    ) -> Generation:
        request.cancel()
        await asyncio.wait({request}, timeout=CLOSE_TIMEOUT_S)
        # The tokens that the server generates until it notices are unknown.
        is_cut = not reader.is_complete
        return replace(reader.result(), aborted=is_cut, tokens_at_least=is_cut)

    async def _drop(self, rid: str) -> None:
        """Do nothing: the connection is closed already, or about to be."""
