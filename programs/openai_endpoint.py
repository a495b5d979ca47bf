"""Any OpenAI-compatible server as a backend of SGLang's frontend language.

It offers what this API has, and says what it has not: an ended generation is ended by closing its
connection, seeds may be heeded or not, and what is no part of the API is sent only on request.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from lim_sglang.programs.chat import TOP_LOGPROBS, Generation, StreamReader, any_request
from lim_sglang.programs.openai_client import OpenAIClient
from lim_sglang.programs.running import InFlightSample
from lim_sglang.programs.transport import Backend

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
