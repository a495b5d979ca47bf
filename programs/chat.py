"""Chat completions of OpenAI's API, complete and streamed, and the thoughts in their texts.

All functions are pure: nothing here opens a connection.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from lim_sglang.programs.http_client import RequestError
from lim_sglang.programs.schema import Sampling

OPENING = "<think>"
END_OF_THOUGHT = "</think>"
TOP_LOGPROBS = 20
"""Candidates of each token whose log-probabilities make its confidence: DeepConf's k."""


MODELS_SHOWN = 10
"""Models that an error message lists, enough to show how the names look."""


def some_names(names: Sequence[str]) -> str:
    """Return the first names of a list of models in a line, with an ellipsis for the others."""
    return ", ".join(names[:MODELS_SHOWN]) + ", …" * (len(names) > MODELS_SHOWN)


@dataclass(frozen=True)
class Generation:
    """The server's result for one request, or the error in place of a result."""

    rid: str
    text: str = ""
    num_tokens: int = 0
    tokens_at_least: bool = False
    """True if the server may have generated more: the end of this try, or of an earlier one, is
    unknown."""
    num_reasoning_tokens: int = 0
    """Tokens up to the end of the thoughts, counted by the server, the stream or a tokenizer."""
    reasoning_estimated: bool = False
    """True if `num_reasoning_tokens` is an estimate: pieces of a stream, or a share of the
    characters."""
    num_repeated_logprobs: int = 0
    """Tokens that came with the candidates of another token; see `count_repeated_logprobs`."""
    truncated: bool = False
    """True if `max_tokens` was reached before the model ended its turn."""
    aborted: bool = False
    """True if the program ended the generation early; text and tokens are those so far."""
    num_prompt_tokens: int = 0
    """Tokens of the prompt; 0 if the server does not count them."""
    latency_s: float = 0.0
    """Time from sending to the answer, of the last try; waiting for a slot is not included."""
    error: str | None = None
    refusal: httpx.Response | None = None
    """The server's answer with a status above 399, if that is the error."""


def chat_request(
    model: str,
    messages: Sequence[Mapping[str, str]],
    sampling: Sampling,
    seed: int | None,
    *,
    thinking: bool | None = None,
) -> dict[str, Any]:
    """Return the body of a chat completion, with only the fields that every server takes.

    Args:
        seed: the seed of this sample; None sends none.
        thinking: on or off for models that can do both; None leaves it to the model's template.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if seed is not None:
        body["seed"] = seed
    return body | thinking_switch(thinking)


def thinking_switch(thinking: bool | None) -> dict[str, Any]:
    """Return the fields of a request that switch thoughts on or off; none for None."""
    return {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}


def as_stream(body: Mapping[str, Any], *, logprobs: bool) -> dict[str, Any]:
    """Return the same request, to be answered token by token with a running count of tokens."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = {**body, "stream": True, "stream_options": options}
    return stream | ({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {})


def read_answer(answer: Any, rid: str) -> Generation:
    """Return the generation that a complete chat completion holds.

    Raises:
        RequestError: the answer has another form.
    """
    try:
        choice = answer["choices"][0]
        text, reason = ThoughtJoiner().join(choice["message"]), choice["finish_reason"]
        usage = answer["usage"]
        found = Generation(
            rid,
            text,
            num_tokens=int(usage["completion_tokens"]),
            num_reasoning_tokens=_reasoning_tokens(usage),
            num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"the answer is no chat completion ({error!r})") from None
    return _with_reason(_with_open_thoughts(found), reason)


class StreamReader:
    """A streamed chat completion, put together event by event."""

    def __init__(self, rid: str) -> None:
        self.found = Generation(rid)
        """The generation so far, without its text."""
        self.is_complete = False
        """True if the server has said why the generation ended."""
        self._joiner = ThoughtJoiner()
        self._pieces: list[str] = []
        self._end_of_text = ""

    @property
    def is_open(self) -> bool:
        """True if the stream has begun, and the server has not said why the generation ended."""
        return bool(self._pieces) and not self.is_complete

    def read(self, line: str) -> list[float]:
        """Take one line of the stream.

        Returns:
            The confidence of each token of the line, if logprobs were asked for.

        Raises:
            RequestError: the line is no event of a chat completion, or holds an error.
        """
        if not line.startswith("data:") or line == "data: [DONE]":
            return []
        try:
            event = json.loads(line.removeprefix("data:"))
        except ValueError as error:
            raise _not_an_event(line, error) from None
        return self.take(event)

    def take(self, event: Any) -> list[float]:
        """Take one parsed event of the stream; returns and raises as `read`."""
        try:
            if "error" in event:
                raise _error_in_stream(event["error"])
            return self._take(event)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _not_an_event(str(event), error) from None

    def text(self) -> str:
        """Return the text so far; safe from any thread."""
        return "".join(self._pieces)

    def result(self) -> Generation:
        """Return the generation so far, with its text."""
        return _with_open_thoughts(replace(self.found, text=self.text()))

    def finish(self) -> Generation:
        """Return the generation once the stream has ended.

        Raises:
            RequestError: the server never said why the generation ended.
        """
        if not self.is_complete:
            raise RequestError("the server ended the stream before the answer", retryable=True)
        return self.result()

    def _take(self, event: Mapping[str, Any]) -> list[float]:
        confidences = []
        reason, text, num_new, num_repeated = None, "", 0, 0
        for choice in event["choices"]:
            # A server that does not stream sends one event, which holds the complete message.
            piece = self._joiner.join(choice["delta"] if "delta" in choice else choice["message"])
            reason = choice.get("finish_reason")
            logprobs = choice.get("logprobs") or {}
            confidences += token_confidences(logprobs)
            num_repeated += count_repeated_logprobs(logprobs)
            num_new += len(logprobs.get("content") or []) or bool(piece)
            text += piece
        self._pieces.append(text)
        self._count(event.get("usage") or {}, text, num_new)
        if num_repeated:
            num_repeated += self.found.num_repeated_logprobs
            self.found = replace(self.found, num_repeated_logprobs=num_repeated)
        if reason:
            self.found, self.is_complete = _with_reason(self.found, reason), True
        return confidences

    def _count(self, usage: Mapping[str, Any], text: str, num_new: int) -> None:
        """Count the tokens so far, and those of the thoughts.

        Without a count by the server, each piece of text counts as one token until the server's
        count at the end of the stream corrects the number.
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
            self._find_end_of_thoughts(text, num_new, is_counted=bool(usage))

    def _find_end_of_thoughts(self, text: str, num_new: int, *, is_counted: bool) -> None:
        """Count the thoughts at their end; tokens of a piece that goes on after it are divided."""
        # The mark may be split between two pieces.
        _, mark, reply = (self._end_of_text + text).partition(END_OF_THOUGHT)
        self._end_of_text = (self._end_of_text + text)[1 - len(END_OF_THOUGHT) :]
        if mark:
            thoughts = self.found.num_tokens - proportional_tokens(num_new, reply, text)
            self.found = replace(
                self.found,
                num_reasoning_tokens=thoughts,
                reasoning_estimated=bool(reply) or not is_counted,
            )


def _with_reason(found: Generation, reason: str) -> Generation:
    """Return a generation that ended for one of the API's reasons."""
    return replace(found, truncated=reason == "length", aborted=reason == "abort")


def _with_open_thoughts(found: Generation) -> Generation:
    """Count all tokens as thoughts if the thoughts began and never ended."""
    only_thoughts = END_OF_THOUGHT not in found.text and thoughts_in(found.text)
    if not only_thoughts or found.num_reasoning_tokens:
        return found
    return replace(found, num_reasoning_tokens=found.num_tokens)


def _reasoning_tokens(usage: Mapping[str, Any]) -> int:
    """Return the tokens of the thoughts as SGLang or OpenAI counts them, 0 without a count."""
    details = usage.get("completion_tokens_details") or {}
    return int(usage.get("reasoning_tokens") or details.get("reasoning_tokens") or 0)


def _error_in_stream(error: Mapping[str, Any]) -> RequestError:
    """Return the failure that SGLang sends as an event, with the status in `code`."""
    message, code = f"the server ended the stream: {error.get('message', error)}", error.get("code")
    if not isinstance(code, int) or not 400 <= code <= 599:
        return RequestError(message, retryable=True)
    response = httpx.Response(code, json={"error": error})
    return RequestError(message, retryable=code == 429 or code >= 500, response=response)


def _not_an_event(shown: str, error: Exception) -> RequestError:
    return RequestError(
        f"the stream is no chat completion ({error!r}): {shown[:80]!r}", retryable=True
    )


class ThoughtJoiner:
    """Joiner of separate thoughts and replies: one text with marks, as the model writes it."""

    def __init__(self) -> None:
        self._open = False

    def join(self, message: Mapping[str, Any]) -> str:
        """Return the text of a message, or of the next piece of a message."""
        # SGLang, DeepSeek and llama.cpp use the first name, newer vLLM the second.
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        opening = f"{OPENING}\n" if thoughts and not self._open else ""
        self._open = self._open or bool(thoughts)
        closing = f"\n{END_OF_THOUGHT}\n\n" if text and self._open else ""
        self._open = self._open and not closing
        return f"{opening}{thoughts}{closing}{text}"


def thoughts_in(text: str) -> str:
    """Return the thoughts at the beginning of a text, marks included.

    Thoughts end at their closing mark; opened and never closed, they are the entire text. Without
    either mark there are none: a model whose template opens the thoughts and that was cut off
    within them looks like a model that does not think.
    """
    thoughts, end, _ = text.partition(END_OF_THOUGHT)
    return thoughts + end if end or text.lstrip().startswith(OPENING) else ""


def split_thoughts(text: str) -> tuple[str, str]:
    """Return thoughts and reply, without the marks and the white space around the thoughts."""
    thoughts = thoughts_in(text)
    inner = thoughts.strip().removeprefix(OPENING).removesuffix(END_OF_THOUGHT)
    return inner.strip(), text[len(thoughts) :].lstrip() if thoughts else text


def proportional_tokens(num_tokens: int, part: str, text: str) -> int:
    """Estimate the tokens of a part of a text by its share of the characters."""
    return round(num_tokens * len(part) / max(len(text), 1))


def token_confidences(logprobs: Mapping[str, Any]) -> list[float]:
    """Return the confidence of each token, in nats, from the `logprobs` of a choice.

    A token's confidence is minus the mean log-probability of its likeliest candidates (DeepConf,
    arXiv 2508.15260, section 2): high if the model is sure of one of them.

    SGLang 0.5.16 streams no logprobs of a token without text (`serving_chat.py:577`), and only one
    of several candidates with the same text (`utils.py:43`).
    """
    found = []
    for token in logprobs.get("content") or []:
        candidates = [max(c["logprob"], -100.0) for c in token["top_logprobs"]]
        if candidates:
            found.append(-math.fsum(candidates) / len(candidates))
    return found


def count_repeated_logprobs(logprobs: Mapping[str, Any]) -> int:
    """Count the tokens of one chunk that came with the candidates of the chunk's first token.

    A busy server sends several tokens as one chunk. SGLang 0.5.16 then sends the first token's
    candidates with each of them (`serving_chat.py:1627`), unless the plugin `lim` mends it. The
    confidence of the other tokens is a guess: over a window of W tokens in chunks of m, whose
    confidences have the standard deviation s, the mean is off by about s * sqrt((m - 1) / W).
    """
    tops = [token["top_logprobs"] for token in logprobs.get("content") or []]
    return sum(bool(top) and top == tops[0] for top in tops[1:])
