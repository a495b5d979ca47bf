"""Any OpenAI-compatible server through the `openai` package, failures in the same words as ours."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
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

from lim_sglang.programs.client import (
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
