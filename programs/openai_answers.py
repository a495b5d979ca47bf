"""What a vote is to a client of OpenAI's API: one message, and the vote in a `lim` field. Pure.

Thoughts are in `reasoning_content`, as SGLang and DeepSeek's API have them.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lim_sglang.errors import ServerError
from lim_sglang.programs.openai_shapes import VoteRequest
from lim_sglang.programs.program import Outcome
from lim_sglang.programs.record import outcome_record
from lim_sglang.programs.records import Sample, SampleState
from lim_sglang.programs.thoughts import split_thoughts

PIECE = 200
"""Characters of the answer in one streamed chunk."""
DONE = "data: [DONE]\n\n"


def shown_sample(outcome: Outcome) -> Sample:
    """The sample whose text the client reads: the earliest that voted for the winner, a finished
    one before one that was cut off. Without votes the first that finished, else the first that was
    cut off, else the first that its program aborted.

    Raises:
        ServerError: every sample failed.
    """
    voters = outcome.vote.groups[0].indices if outcome.vote.groups else ()
    states = (SampleState.FINISHED, SampleState.TRUNCATED, SampleState.ABORTED)
    readable = [sample for sample in outcome.samples if sample.state in states]
    if not readable:
        first = next((sample.error for sample in outcome.samples), "none was drawn")
        raise ServerError(f"all {len(outcome.samples)} samples failed, the first with: {first}")
    return min(
        readable,
        key=lambda s: (s.index not in voters, states.index(s.state), s.index),
    )


@dataclass(frozen=True)
class Answer:
    """One answer's name and date, which all its pieces carry."""

    request: VoteRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, outcome: Outcome) -> dict[str, Any]:
        """The whole answer; raises `ServerError` where every sample failed."""
        shown = shown_sample(outcome)
        thoughts, reply = split_thoughts(shown.text)
        message = {"role": "assistant", "content": reply, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _finish_reason(shown),
            "logprobs": None,
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(outcome),
            "lim": self._vote(outcome, shown),
        }

    def begin(self) -> str:
        """The first chunk of a streamed answer."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, outcome: Outcome) -> Iterator[str]:
        """The others. The last one before the end carries the vote.

        Raises:
            ServerError: every sample failed; before the first chunk.
        """
        shown = shown_sample(outcome)
        thoughts, reply = split_thoughts(shown.text)
        for name, text in (("reasoning_content", thoughts), ("content", reply)):
            for start in range(0, len(text), PIECE):
                yield self._chunk({name: text[start : start + PIECE]})
        vote = {"lim": self._vote(outcome, shown)}
        with_usage = self.request.include_usage
        yield self._chunk({}, _finish_reason(shown), **({} if with_usage else vote))
        if with_usage:
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": _usage(outcome), **vote})
        yield DONE

    def _chunk(self, delta: Mapping[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.model,
        }

    def _vote(self, outcome: Outcome, shown: Sample) -> dict[str, Any]:
        return {
            "program": self.request.program,
            "options": dict(self.request.options),
            **outcome_record(outcome),
            "shown": shown.index,
            "samples": [
                {
                    "index": sample.index,
                    "state": sample.state,
                    "answer": sample.answer,
                    "num_tokens": sample.num_tokens,
                    "tokens_at_least": sample.tokens_at_least,
                    "error": sample.error,
                }
                for sample in outcome.samples
            ],
        }


def event(content: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def _finish_reason(shown: Sample) -> str:
    return "stop" if shown.state is SampleState.FINISHED else "length"


def _usage(outcome: Outcome) -> dict[str, Any]:
    """Generated tokens of all samples; those of the prompt once, as OpenAI's API for n > 1."""
    prompt = max((sample.num_prompt_tokens for sample in outcome.samples), default=0)
    reasoning = sum(sample.num_reasoning_tokens for sample in outcome.samples)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": outcome.spent_tokens,
        "total_tokens": prompt + outcome.spent_tokens,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
