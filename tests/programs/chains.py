"""A generation in the shapes of SGLang 0.5.16's `/v1/chat/completions` (`serving_chat.py`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

END_OF_TURN = 151645
PROMPT_TOKENS = 11


@dataclass(frozen=True)
class Raw:
    """Sent in a stream as it is, in place of a token; without text, the connection is cut."""

    text: str = ""


CUT = Raw()


@dataclass(frozen=True)
class Chain:
    """What a model says, token by token."""

    pieces: Sequence[str | Raw]
    """Text of each token; without text, it is counted and nothing is sent, as SGLang does."""
    reason: str = "stop"
    """Why it ends, unless it is aborted."""
    confidences: Sequence[float] = ()
    """Of each token, as DeepConf has it; 1 where this is too short."""
    pace_s: float = 0.0
    """Before each token."""
    after: Event | None = None
    """Its first token waits for this."""
    until: Event | None = None
    """Its end waits for this."""


def endless(*pieces: str, **options: Any) -> Chain:
    """Says this, and then nothing until it is aborted."""
    return Chain(pieces, until=Event(), **options)


def words(text: str, num_tokens: int) -> tuple[str, ...]:
    """A text as so many tokens, the first with all of it."""
    return (text, *[""] * (num_tokens - 1))


@dataclass
class Said:
    """What a generation has said so far, and how SGLang tells of it."""

    body: Mapping[str, Any]
    rid: str
    text: str = ""
    num_tokens: int = 0
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, piece: str, confidence: float) -> None:
        """One token more."""
        self.text += piece
        self.num_tokens += 1
        if self.body.get("logprobs"):
            self.logprobs.append(_logprob(piece, confidence, self.body["top_logprobs"]))

    def whole(self, reason: str) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        message = {
            "role": "assistant",
            "content": self.text,
            "reasoning_content": None,
            "tool_calls": None,
        }
        logprobs = {"content": self.logprobs} if self.body.get("logprobs") else None
        choice = {"index": 0, "message": message, "logprobs": logprobs, **_ending(reason)}
        answer = {"id": self.rid, "object": "chat.completion", **_common(self.body)}
        metadata = {"weight_version": "default"}
        return answer | {"choices": [choice], "usage": self.usage(), "metadata": metadata}

    def first_chunk(self) -> dict[str, Any]:
        """Comes with the first token, before its text."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, piece: str) -> dict[str, Any]:
        """The text of the token that was added last."""
        logprobs = {"content": self.logprobs[-1:]} if self.logprobs else None
        continuous = (self.body.get("stream_options") or {}).get("continuous_usage_stats")
        usage = {"usage": self.usage()} if continuous else {}
        return self._chunk({"content": piece}, logprobs) | usage

    def last_chunks(self, reason: str) -> list[dict[str, Any]]:
        """Why it ended, and what it took."""
        chunks = [self._chunk({}, ending=_ending(reason))]
        if (self.body.get("stream_options") or {}).get("include_usage"):
            chunks.append(self._head() | {"choices": [], "usage": self.usage()})
        return chunks

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        return {
            "prompt_tokens": PROMPT_TOKENS,
            "total_tokens": PROMPT_TOKENS + self.num_tokens,
            "completion_tokens": self.num_tokens,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        }

    def _head(self) -> dict[str, Any]:
        return {"id": self.rid, "object": "chat.completion.chunk", **_common(self.body)}

    def _chunk(
        self,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
        ending: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": {"reasoning_content": None, **delta},
            "logprobs": logprobs,
            **(ending or _ending(None)),
        }
        return self._head() | {"choices": [choice]}


def as_event(content: Mapping[str, Any]) -> bytes:
    """One event of a stream, encoded as SGLang does: no character is escaped without need."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _common(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"created": 1, "model": body.get("model")}


def _ending(reason: str | None) -> dict[str, Any]:
    matched = END_OF_TURN if reason == "stop" else None
    return {"finish_reason": reason, "matched_stop": matched}


def _logprob(piece: str, confidence: float, candidates: int) -> dict[str, Any]:
    """Of one token: all candidates are as likely, so that their mean is exact."""
    top = [(f"{piece}{place or ''}", -confidence) for place in range(candidates)]
    entries = [
        {"token": token, "bytes": list(token.encode()), "logprob": logprob}
        for token, logprob in top
    ]
    return entries[0] | {"top_logprobs": entries}
