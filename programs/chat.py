"""Chat completions, whole and streamed, as OpenAI's API has them, and the thoughts in their texts:
pure, no connection.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lim_sglang.programs.http_client import RequestError

OPENING = "<think>"
END_OF_THOUGHT = "</think>"


class Thoughts:
    """Puts thoughts that a server tells apart back where the model wrote them, between marks."""

    def __init__(self) -> None:
        self._open = False

    def mark(self, message: Mapping[str, Any]) -> str:
        """The text of a message, or of the next piece of one."""
        # SGLang, DeepSeek and llama.cpp use the first name, newer vLLM the second.
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        opening = f"{OPENING}\n" if thoughts and not self._open else ""
        self._open = self._open or bool(thoughts)
        closing = f"\n{END_OF_THOUGHT}\n\n" if text and self._open else ""
        self._open = self._open and not closing
        return f"{opening}{thoughts}{closing}{text}"


def thoughts_of(text: str) -> str:
    """The beginning of a text that is thoughts, marks included: up to their end, or all of it where
    they were begun and never ended. Nothing where neither mark is there: a model whose template
    opens its thoughts and which was cut off within them looks like one that does not think.
    """
    thoughts, end, _ = text.partition(END_OF_THOUGHT)
    return thoughts + end if end or text.lstrip().startswith(OPENING) else ""


def split_thoughts(text: str) -> tuple[str, str]:
    """Thoughts and reply, both without the marks and the white space around them."""
    thoughts = thoughts_of(text)
    inner = thoughts.strip().removeprefix(OPENING).removesuffix(END_OF_THOUGHT)
    return inner.strip(), text[len(thoughts) :].lstrip() if thoughts else text


def share_of_thoughts(num_tokens: int, thoughts: str, text: str) -> int:
    """How many of a text's tokens are thoughts, if all characters weigh the same: an estimate."""
    return round(num_tokens * len(thoughts) / max(len(text), 1))


TOP_LOGPROBS = 20
"""Candidates of each token whose log-probabilities make its confidence: DeepConf's k."""


@dataclass(frozen=True)
class Generation:
    """What the server made of one request, or why it made nothing. The branch's `meta_info`."""

    rid: str
    text: str = ""
    num_tokens: int = 0
    tokens_at_least: bool = False
    """Whether more may have been generated: nobody heard how this, or an earlier try, ended."""
    num_reasoning_tokens: int = 0
    """Of these, up to the end of the thoughts: as the server, the stream or a tokenizer counts."""
    reasoning_estimated: bool = False
    """Whether nobody counted them: they are pieces of a stream, or a share of the characters."""
    num_repeated_logprobs: int = 0
    """Tokens that came with the candidates of another one; see `count_repeated`."""
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
    return body | switched(thinking)


def switched(thinking: bool | None) -> dict[str, Any]:
    """What switches thoughts on or off in a request; nothing for None."""
    return {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}


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
    found = Generation(
        *(rid, text, num_tokens), num_reasoning_tokens=reasoning, num_prompt_tokens=prompt
    )
    return with_reason(_with_open_thoughts(found), reason)


def with_reason(found: Generation, reason: str) -> Generation:
    """A generation that ended for a reason of the API's."""
    return replace(found, truncated=reason == "length", aborted=reason == "abort")


def _with_open_thoughts(found: Generation) -> Generation:
    """All tokens are thoughts where these were begun and never ended."""
    only_thoughts = END_OF_THOUGHT not in found.text and thoughts_of(found.text)
    if not only_thoughts or found.num_reasoning_tokens:
        return found
    return replace(found, num_reasoning_tokens=found.num_tokens)


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

    def text(self) -> str:
        """What has come so far; any thread may ask."""
        return "".join(self._pieces)

    def result(self) -> Generation:
        """The generation, with all of its text."""
        return _with_open_thoughts(replace(self.found, text=self.text()))

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
        reason, text, num_new, num_repeated = None, "", 0, 0
        for choice in event["choices"]:
            # A server that does not stream sends one event, which holds the whole message.
            piece = self._thoughts.mark(choice["delta"] if "delta" in choice else choice["message"])
            reason = choice.get("finish_reason")
            logprobs = choice.get("logprobs") or {}
            confidences += confidences_of(logprobs)
            num_repeated += count_repeated(logprobs)
            num_new += len(logprobs.get("content") or []) or bool(piece)
            text += piece
        self._pieces.append(text)
        self._count(event.get("usage") or {}, text, num_new)
        if num_repeated:
            num_repeated += self.found.num_repeated_logprobs
            self.found = replace(self.found, num_repeated_logprobs=num_repeated)
        if reason:
            self.found, self.is_whole = with_reason(self.found, reason), True
        return confidences

    def _count(self, usage: Mapping[str, Any], text: str, num_new: int) -> None:
        """Tokens so far; those up to the end of the thoughts are the thoughts'.

        Where the server does not say how many, each piece of text is taken for one; what it says
        in the end corrects this.
        """
        before = self.found
        num_tokens = int(usage["completion_tokens"]) if usage else before.num_tokens + num_new
        prompt = int(usage.get("prompt_tokens") or 0) or before.num_prompt_tokens
        self.found = replace(before, num_tokens=num_tokens, num_prompt_tokens=prompt)
        thoughts = _reasoning_tokens(usage)
        if thoughts:
            self.found = replace(
                self.found, num_reasoning_tokens=thoughts, reasoning_estimated=False
            )
        elif not before.num_reasoning_tokens:
            num_new = num_tokens - before.num_tokens
            self._look_for_end_of_thoughts(text, num_new, is_counted=bool(usage))

    def _look_for_end_of_thoughts(self, text: str, num_new: int, *, is_counted: bool) -> None:
        """Where one piece has the end of the thoughts and more, its tokens are shared out."""
        # The mark may be split between two pieces.
        _, mark, reply = (self._end_of_text + text).partition(END_OF_THOUGHT)
        self._end_of_text = (self._end_of_text + text)[1 - len(END_OF_THOUGHT) :]
        if mark:
            thoughts = self.found.num_tokens - share_of_thoughts(num_new, reply, text)
            self.found = replace(
                self.found,
                num_reasoning_tokens=thoughts,
                reasoning_estimated=bool(reply) or not is_counted,
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

    SGLang 0.5.16 streams none for a token without text (`serving_chat.py:577`), and one of several
    candidates with the same text (`utils.py:43`).
    """
    found = []
    for token in (logprobs or {}).get("content") or []:
        candidates = [max(c["logprob"], -100.0) for c in token["top_logprobs"]]
        if candidates:
            found.append(-math.fsum(candidates) / len(candidates))
    return found


def count_repeated(logprobs: Mapping[str, Any] | None) -> int:
    """Tokens of one chunk that came with the candidates of its first token.

    A busy server sends several tokens as one chunk. SGLang 0.5.16 then sends the first one's
    candidates with each of them (`serving_chat.py:1627`), unless the plugin `lim` mends it. The
    confidence of the others is a guess: over a window of W tokens in chunks of m, whose confidences
    have the standard deviation s, it puts the mean off by some s * sqrt((m - 1) / W).
    """
    tops = [token["top_logprobs"] for token in (logprobs or {}).get("content") or []]
    return sum(bool(top) and top == tops[0] for top in tops[1:])
