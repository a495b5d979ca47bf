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
    latency_s: float = 0.0
    """From sending to the answer, of the last try; waiting for a free place is no part of it."""
    error: str | None = None


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
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        usage = answer["usage"]
        num_tokens = int(usage["completion_tokens"])
        reasoning = int(usage.get("reasoning_tokens") or 0)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise RequestError(f"the answer is no chat completion ({error!r})") from None
    return with_reason(Generation(rid, text, num_tokens, reasoning), reason)


def with_reason(found: Generation, reason: str) -> Generation:
    """A generation that ended for a reason of the API's."""
    return replace(found, truncated=reason == "length", aborted=reason == "abort")


class StreamReader:
    """Puts a streamed chat completion together, event by event."""

    def __init__(self, rid: str) -> None:
        self.found = Generation(rid)
        """What has come so far."""
        self.is_whole = False
        """Whether the server has said why it ended."""
        self._pieces: list[str] = []
        self._end_of_text = ""

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
            if "error" in event:
                message = event["error"].get("message", event["error"])
                raise RequestError(f"the server ended the stream: {message}", retryable=True)
            return self._take(event)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"the stream is no chat completion ({error!r}): {line[:80]!r}", retryable=True
            ) from None

    def result(self) -> Generation:
        """The generation, with all of its text."""
        return replace(self.found, text="".join(self._pieces))

    def _take(self, event: Mapping[str, Any]) -> list[float]:
        confidences = []
        reason = None
        for choice in event["choices"]:
            self._pieces.append(choice["delta"].get("content") or "")
            reason = choice.get("finish_reason")
            confidences += confidences_of(choice.get("logprobs"))
        self._count(event.get("usage"))
        if reason:
            self.found, self.is_whole = with_reason(self.found, reason), True
        return confidences

    def _count(self, usage: Mapping[str, Any] | None) -> None:
        """Tokens so far; those before the end of the thoughts are the thoughts'."""
        if usage is None:
            return
        num_tokens = int(usage["completion_tokens"])
        thoughts = int(usage.get("reasoning_tokens") or 0) or self.found.num_reasoning_tokens
        # The mark may be split between two pieces.
        self._end_of_text += self._pieces[-1] if self._pieces else ""
        if not thoughts and END_OF_THOUGHT in self._end_of_text:
            thoughts = num_tokens
        self._end_of_text = self._end_of_text[1 - len(END_OF_THOUGHT) :]
        self.found = replace(self.found, num_tokens=num_tokens, num_reasoning_tokens=thoughts)


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
