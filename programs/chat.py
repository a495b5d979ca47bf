"""Chat completions, whole and streamed, as OpenAI's API has them: pure, no connection."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lim_sglang.programs.client import RequestError

TOP_LOGPROBS = 20
"""Candidates of each token whose log-probabilities make its confidence: DeepConf's k."""
END_OF_THOUGHT = "</think>"


@dataclass(frozen=True)
class Generation:
    """What the server made of one request, or why it made nothing. The branch's `meta_info`."""

    rid: str
    text: str = ""
    num_tokens: int = 0
    num_reasoning_tokens: int = 0
    """Of these, before the end of the thoughts, as far as the server or the stream says."""
    truncated: bool = False
    """`max_new_tokens` was reached before the model ended its turn."""
    aborted: bool = False
    """Ended early by its program; text and tokens are what there was by then."""
    num_prompt_tokens: int = 0
    """Of the request; 0 where the server does not say."""
    latency_s: float = 0.0
    """From sending to the answer, of the last try; waiting for a free place is no part of it."""
    error: str | None = None
    ended_s: float = 0.0
    """When it ended, by the client's monotonic clock."""


def chat_request(
    messages: Sequence[Mapping[str, str]],
    sampling_params: Any,
    seed: int | None,
    *,
    thinking: bool | None = None,
) -> dict[str, Any]:
    """The body of one chat completion, without its id.

    Args:
        sampling_params: SGLang's `SglSamplingParams`.
        thinking: on or off for models that can do both; None leaves it to the model's template.
    """
    body = any_request("default", messages, sampling_params, seed, thinking=thinking)
    # One text, as the model wrote it, also where the server has a reasoning parser.
    return body | {"top_k": sampling_params.top_k, "separate_reasoning": False}


def any_request(
    model: str,
    messages: Sequence[Mapping[str, str]],
    sampling_params: Any,
    seed: int | None,
    *,
    thinking: bool | None,
) -> dict[str, Any]:
    """What every server takes, and of the rest only what was asked for; see `chat_request`."""
    body = {
        "model": model,
        "messages": list(messages),
        "max_tokens": sampling_params.max_new_tokens,
        "temperature": sampling_params.temperature,
        "top_p": sampling_params.top_p,
    }
    if sampling_params.stop:
        body["stop"] = sampling_params.stop
    if seed is not None:
        body["seed"] = seed
    if thinking is not None:
        body["chat_template_kwargs"] = {"enable_thinking": thinking}
    return body


def as_stream(body: Mapping[str, Any], *, logprobs: bool) -> dict[str, Any]:
    """The same request, answered token by token, with a running count of them."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = {**body, "stream": True, "stream_options": options}
    return stream | ({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {})


def read_answer(answer: Any, rid: str) -> Generation:
    """Read a chat completion.

    Raises:
        RequestError: the answer has another form.
    """
    try:
        choice = answer["choices"][0]
        text, reason = Thoughts().mark(choice["message"]), choice["finish_reason"]
        usage = answer["usage"]
        num_tokens = int(usage["completion_tokens"])
        reasoning = _reasoning_tokens(usage)
        prompt = int(usage.get("prompt_tokens") or 0)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"the answer is no chat completion ({error!r})") from None
    found = Generation(rid, text, num_tokens, reasoning, num_prompt_tokens=prompt)
    return with_reason(found, reason)


def with_reason(found: Generation, reason: str) -> Generation:
    """A generation that ended for a reason of the API's."""
    return replace(found, truncated=reason == "length", aborted=reason == "abort")


class Thoughts:
    """Puts thoughts that a server tells apart back where the model wrote them, between marks."""

    def __init__(self) -> None:
        self._open = False

    def mark(self, message: Mapping[str, Any]) -> str:
        """The text of a message, or of the next piece of one."""
        # SGLang, DeepSeek and llama.cpp use the first name, newer vLLM the second.
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        opening = "<think>\n" if thoughts and not self._open else ""
        self._open = self._open or bool(thoughts)
        closing = f"\n{END_OF_THOUGHT}\n\n" if text and self._open else ""
        self._open = self._open and not closing
        return f"{opening}{thoughts}{closing}{text}"


class StreamReader:
    """Puts a streamed chat completion together, event by event."""

    def __init__(self, rid: str) -> None:
        self.found = Generation(rid)
        """What has come so far."""
        self.is_whole = False
        """Whether the server has said why it ended."""
        self._thoughts = Thoughts()
        self._pieces: list[str] = []
        self._end_of_text = ""

    @property
    def is_open(self) -> bool:
        """Whether the stream has begun, and the server has not said why it ended."""
        return bool(self._pieces) and not self.is_whole

    def read(self, line: str) -> list[float]:
        """Take one line of the stream.

        Returns:
            The confidence of each token that it brought, where logprobs were asked for.

        Raises:
            RequestError: the line is no event of a chat completion, or tells of an error.
        """
        if not line.startswith("data:") or line == "data: [DONE]":
            return []
        try:
            event = json.loads(line.removeprefix("data:"))
        except ValueError as error:
            raise _no_event(line, error) from None
        return self.take(event)

    def take(self, event: Any) -> list[float]:
        """Like `read`, for an event that has been parsed."""
        try:
            if "error" in event:
                message = event["error"].get("message", event["error"])
                raise RequestError(f"the server ended the stream: {message}", retryable=True)
            return self._take(event)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _no_event(str(event), error) from None

    def result(self) -> Generation:
        """The generation, with all of its text."""
        return replace(self.found, text="".join(self._pieces))

    def whole(self) -> Generation:
        """The generation, once the stream has ended.

        Raises:
            RequestError: the server never said that the answer is whole.
        """
        if not self.is_whole:
            raise RequestError("the server ended the stream before the answer", retryable=True)
        return self.result()

    def _take(self, event: Mapping[str, Any]) -> list[float]:
        confidences = []
        reason, text, num_new = None, "", 0
        for choice in event["choices"]:
            # A server that does not stream sends one event, which holds the whole message.
            piece = self._thoughts.mark(choice["delta"] if "delta" in choice else choice["message"])
            reason = choice.get("finish_reason")
            logprobs = choice.get("logprobs") or {}
            confidences += confidences_of(logprobs)
            num_new += len(logprobs.get("content") or []) or bool(piece)
            text += piece
        self._pieces.append(text)
        self._count(event.get("usage"), text, num_new)
        if reason:
            self.found, self.is_whole = with_reason(self.found, reason), True
        return confidences

    def _count(self, usage: Mapping[str, Any] | None, text: str, num_new: int) -> None:
        """Tokens so far; those before the end of the thoughts are the thoughts'.

        Where the server does not say how many, each piece of text is taken for one; what it says
        in the end corrects this.
        """
        num_tokens = int(usage["completion_tokens"]) if usage else self.found.num_tokens + num_new
        thoughts = _reasoning_tokens(usage or {}) or self.found.num_reasoning_tokens
        # The mark may be split between two pieces.
        self._end_of_text += text
        if not thoughts and END_OF_THOUGHT in self._end_of_text:
            thoughts = num_tokens
        self._end_of_text = self._end_of_text[1 - len(END_OF_THOUGHT) :]
        self.found = replace(
            self.found,
            num_tokens=num_tokens,
            num_reasoning_tokens=thoughts,
            num_prompt_tokens=int((usage or {}).get("prompt_tokens") or 0)
            or self.found.num_prompt_tokens,
        )


def _reasoning_tokens(usage: Mapping[str, Any]) -> int:
    """Tokens of thoughts, where SGLang says it or where OpenAI does; 0 where nobody does."""
    details = usage.get("completion_tokens_details") or {}
    return int(usage.get("reasoning_tokens") or details.get("reasoning_tokens") or 0)


def _no_event(shown: str, error: Exception) -> RequestError:
    return RequestError(
        f"the stream is no chat completion ({error!r}): {shown[:80]!r}", retryable=True
    )


def confidences_of(logprobs: Mapping[str, Any] | None) -> list[float]:
    """DeepConf's confidence of each token, in nats: minus the mean log-probability of the likeliest
    candidates (arXiv 2508.15260, section 2). High where the model is sure of one of them.
    """
    found = []
    for token in (logprobs or {}).get("content") or []:
        candidates = [max(c["logprob"], -100.0) for c in token["top_logprobs"]]
        if candidates:
            found.append(-math.fsum(candidates) / len(candidates))
    return found
