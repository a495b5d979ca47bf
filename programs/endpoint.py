"""A SGLang server as a backend of SGLang's frontend language: what `@sgl.function` programs run on.

SGLang's own `RuntimeEndpoint` sends no request ids and has neither time-outs nor the model's chat
template. This one sends messages, which the server renders with the model's own template; it gives
each try an id of its own, aborts what is no longer wanted, and returns failures as values, because
the frontend turns an exception in a branch into a KeyError somewhere else.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lim_sglang.compat import BaseBackend, ChatTemplate
from lim_sglang.programs.client import Client, RequestError, RequestTimeoutError

SEED = "seed"
"""A branch's variable with the seed that its generations are sent."""

RETRY_DELAYS_S = (0.5, 2.0)
"""Pauses before a request that may succeed later is tried again."""
ABORT_TIMEOUT_S = 3.0

TRANSPARENT = ChatTemplate("transparent", default_system_prompt=None, role_prefix_and_suffix={})
"""Adds nothing to the messages: the server renders them."""


@dataclass(frozen=True)
class Generation:
    """What the server made of one request, or why it made nothing. The branch's `meta_info`."""

    rid: str
    text: str = ""
    num_tokens: int = 0
    truncated: bool = False
    """`max_new_tokens` was reached before the model ended its turn."""
    latency_s: float = 0.0
    """From sending to the answer, of the last try; waiting for a free place is no part of it."""
    error: str | None = None


class Endpoint(BaseBackend):
    """One running server. Any number of programs and threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_concurrency: int = 64,
    ) -> None:
        """Connects to nothing yet.

        Args:
            timeout_s: limit of one generation, from sending to the answer.
            max_concurrency: requests that the server is given at once; others wait here.

        Raises:
            ServerError: `url` is no HTTP address.
        """
        super().__init__()
        self.chat_template = TRANSPARENT
        self._timeout_s = timeout_s
        self._places = asyncio.Semaphore(max_concurrency)
        self._client = Client(url, api_key=api_key)

    def server_info(self) -> dict[str, Any]:
        """What the server answers under `/server_info`; raises `ServerError`."""
        info: dict[str, Any] = self._client.get("/server_info")
        return info

    @cached_property
    def honours_seeds(self) -> bool:
        """Whether equal seeds give equal samples; raises `ServerError`."""
        return bool(self.server_info().get("enable_deterministic_inference"))

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, Generation]:
        """Called by the frontend for `sgl.gen`: the next turn after the branch's messages."""
        body = chat_request(s.messages_, sampling_params, s.variables.get(SEED))
        try:
            found = self._client.start(self._generate(body)).result()
        except (RequestError, CancelledError) as error:
            # Closed while this waited.
            found = Generation(new_rid(), error=str(error) or "the connection was closed")
        return found.text, found

    def close(self) -> None:
        """Abort what is running and end the connection; every waiting branch gets an error."""
        self._client.close()

    async def _generate(self, body: Mapping[str, Any]) -> Generation:
        async with self._places:
            for delay_s in (*RETRY_DELAYS_S, None):
                rid = new_rid()
                start_s = time.monotonic()
                try:
                    answer = await self._ask({**body, "rid": rid}, rid)
                    found = read_answer(answer, rid)
                except RequestError as error:
                    if error.retryable and delay_s is not None:
                        await asyncio.sleep(delay_s)
                        continue
                    found = Generation(rid, error=str(error))
                return replace(found, latency_s=time.monotonic() - start_s)
        raise AssertionError("the last try returns")

    async def _ask(self, body: Mapping[str, Any], rid: str) -> Any:
        """One try. What the server may still be busy with is aborted."""
        try:
            return await self._client.fetch(
                "POST", "/v1/chat/completions", body, timeout_s=self._timeout_s
            )
        except (RequestTimeoutError, asyncio.CancelledError):
            await self._abort(rid)
            raise

    async def _abort(self, rid: str) -> None:
        try:
            await self._client.send(
                "POST", "/abort_request", {"rid": rid}, timeout_s=ABORT_TIMEOUT_S
            )
        except RequestError:
            return  # the server is gone, and the request with it


def chat_request(
    messages: Sequence[Mapping[str, str]], sampling_params: Any, seed: int | None
) -> dict[str, Any]:
    """The body of one chat completion, without its id.

    Args:
        sampling_params: SGLang's `SglSamplingParams`.
    """
    body = {
        "model": "default",
        "messages": list(messages),
        "max_tokens": sampling_params.max_new_tokens,
        "temperature": sampling_params.temperature,
        "top_p": sampling_params.top_p,
        "top_k": sampling_params.top_k,
        # One text, as the model wrote it, also where the server has a reasoning parser.
        "separate_reasoning": False,
    }
    if sampling_params.stop:
        body["stop"] = sampling_params.stop
    if seed is not None:
        body["seed"] = seed
    return body


def read_answer(answer: Any, rid: str) -> Generation:
    """Read a chat completion.

    Raises:
        RequestError: the server aborted the request, or the answer has another form.
    """
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        num_tokens = int(answer["usage"]["completion_tokens"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RequestError(f"the answer is no chat completion ({error!r})") from None
    if reason == "abort":
        raise RequestError("the server aborted the request", retryable=True)
    return Generation(rid, text, num_tokens, truncated=reason == "length")


def new_rid() -> str:
    """A request id that is no other's beginning: SGLang aborts by prefix."""
    return f"lim-{uuid.uuid4().hex}."
