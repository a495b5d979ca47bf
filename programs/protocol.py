"""OpenAI's chat completions as `lim proxy` reads and answers them: pure, no connection.

A request is a vote if its model string names a program, as in `majority@16` or
`adaptive@40?confidence=0.9`, or if it has a `lim` field. Every other request is for the server. An
answer is one message, with the vote in a `lim` field; thoughts are in `reasoning_content`.
"""

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.programs.chat import split_thoughts
from lim_sglang.programs.options import read_settings
from lim_sglang.programs.program import Outcome, outcome_record
from lim_sglang.programs.schema import MATH_PROMPT, Message, Sample, SampleState, Sampling

DEFAULT_PROGRAM = "majority"
DEFAULT_SAMPLES = 8
SAMPLE_LIMIT = 1024
"""Samples of one question at most: a typing error must not keep a server busy for days."""

_MODEL = re.compile(r"(?P<program>[a-z_]+)(?:@(?P<samples>[^?]*))?(?:\?(?P<options>.*))?")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ("", []),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    # The proxy's own options decide if and how long a model thinks.
    "chat_template_kwargs": ({},),
    "reasoning_effort": (),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
}
"""Fields that a vote cannot honour, with the values that ask for nothing."""
_IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
"""Fields that change no answer."""

ProgramLimits = Mapping[str, int | None]
"""Programs by name, with the samples that each takes at most; None for no limit."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: None = None
    # An earlier answer comes back as a turn with all its fields; its thoughts are left out.
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[None] | None = None
    function_call: None = None
    tool_calls: list[None] | None = None

    def message(self) -> Message:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return Message(role=role, content=text)


class _LimField(_Strict):
    program: str | None = None
    samples: Annotated[int, Field(ge=1, le=SAMPLE_LIMIT)] | None = None
    parallel: Annotated[int, Field(ge=1)] | None = None
    options: dict[str, StrictInt | StrictFloat] = {}
    template: Literal["math"] | None = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _ChatRequest(_Strict):
    messages: Annotated[list[_Turn], Field(min_length=1)]
    model: str | None = None
    lim: _LimField | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True)
class VoteRequest:
    """A question to a program, as a client sent it."""

    model: str
    """The model string as the client wrote it; the answer repeats it."""
    messages: tuple[Message, ...]
    program: str
    samples: int
    parallel: int | None
    options: Mapping[str, int | float]
    sampling: Sampling
    stream: bool
    include_usage: bool


def read_request(body: Any, programs: ProgramLimits, defaults: Sampling) -> VoteRequest | None:
    """Return the question to a program that a request holds; None if it is for the server itself.

    Args:
        body: the JSON of a chat completion.
        defaults: parameters that the request does not name.

    Raises:
        ConfigError: the request cannot be answered as it is, with all reasons at once.
    """
    if not isinstance(body, dict):
        raise ConfigError("the body is no JSON object: send a chat completion")
    named = read_model(body.get("model"), programs)
    if named is None and body.get("lim") is None:
        return None
    asked = _validate(body)
    program, samples, options = _merge(named or (None, None, {}), asked.lim or _LimField())
    if program not in programs:
        raise ConfigError(f"unknown program {program!r}; known: {', '.join(programs)}")
    samples = samples or default_samples(programs[program])
    messages = [turn.message() for turn in asked.messages]
    if asked.lim and asked.lim.template:
        messages = _with_template(messages)
    return VoteRequest(
        model=asked.model or f"{program}@{samples}",
        messages=tuple(messages),
        program=program,
        samples=samples,
        parallel=asked.lim.parallel if asked.lim else None,
        options=options,
        sampling=_sampling(asked, defaults),
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
    )


def _validate(body: Mapping[str, Any]) -> _ChatRequest:
    """Return the known fields; raises `ConfigError` with all reasons against the request."""
    known = {name: body[name] for name in _ChatRequest.model_fields if name in body}
    reasons = _reasons_against(body)
    try:
        asked = _ChatRequest.model_validate(known)
    except ValidationError as error:
        reasons += [_in_words(problem) for problem in error.errors()]
    if reasons:
        raise ConfigError("; ".join(reasons))
    return asked


Named = tuple[str | None, int | None, Mapping[str, int | float]]
"""A program, its number of samples and its options; None for a part that is not named."""


def read_model(model: Any, programs: ProgramLimits) -> Named | None:
    """Read a model string `program@samples?name=number&name=number`; None for a server's model.

    Raises:
        ConfigError: samples or options of another form, or `word@number` with an unknown program:
            SGLang, which answers to any model string, would not complain.
    """
    found = _MODEL.fullmatch(model) if isinstance(model, str) else None
    if found is None:
        return None
    program, count, options = found["program"], found["samples"], found["options"]
    is_count = bool(count) and count.isascii() and count.isdecimal()
    if program not in programs:
        if is_count:
            known = ", ".join(programs)
            raise ConfigError(f"model {model!r}: unknown program {program!r}; known: {known}")
        return None
    if count is not None and not (is_count and len(count) < 9 and 1 <= int(count) <= SAMPLE_LIMIT):
        raise ConfigError(
            f"model {model!r}: after @ comes a number of samples, 1 to {SAMPLE_LIMIT}"
        )
    try:
        settings = read_settings(options.split("&")) if options else {}
    except ConfigError:
        raise ConfigError(
            f"model {model!r}: write options as ?name=number&name=number, each name once"
        ) from None
    return program, int(count) if count else None, settings


def _merge(named: Named, field: _LimField) -> tuple[str, int | None, dict[str, int | float]]:
    """Return program, samples and options of the model string and the `lim` field together."""
    program, samples, options = named
    twice = [name for name, value in field.options.items() if options.get(name, value) != value]
    if field.program and program and field.program != program:
        twice.append("program")
    if field.samples and samples and field.samples != samples:
        twice.append("samples")
    if twice:
        raise ConfigError(f"the model string and the lim field differ in {', '.join(twice)}")
    chosen = program or field.program or DEFAULT_PROGRAM
    return chosen, samples or field.samples, {**options, **field.options}


def default_samples(most: int | None) -> int:
    """Return the samples of a program if a request names no number.

    Args:
        most: samples that the program takes at most; None for no limit.
    """
    return min(DEFAULT_SAMPLES, most or DEFAULT_SAMPLES)


def _sampling(asked: _ChatRequest, defaults: Sampling) -> Sampling:
    named = {
        "max_tokens": asked.max_completion_tokens or asked.max_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "seed": asked.seed,
    }
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return replace(defaults, **given)


def _with_template(messages: list[Message]) -> list[Message]:
    *before, last = messages
    if last["role"] != "user":
        raise ConfigError("lim.template: the last message must be the user's")
    content = MATH_PROMPT.format(question=last["content"])
    return [*before, Message(role="user", content=content)]


def _reasons_against(body: Mapping[str, Any]) -> list[str]:
    """Return a reason for each field that would have to be ignored."""
    reasons = []
    for name, value in body.items():
        if name in _ChatRequest.model_fields or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            reasons.append(f"{name}: a vote does not know this field")
        elif value not in _NEUTRAL[name]:
            reasons.append(f"{name}: a vote cannot honour {json.dumps(value)[:60]}")
    if body.get("top_k") == 0:
        reasons.append("top_k: 0 leaves no token to sample from; -1 samples from all")
    return reasons


def _in_words(problem: Mapping[str, Any]) -> str:
    where = ".".join(str(step) for step in problem["loc"])
    return f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def error_body(message: str, kind: str, code: str) -> dict[str, Any]:
    """Return the body of an error, as OpenAI's API has it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


PIECE = 200
"""Characters of the answer in one streamed chunk."""
DONE = "data: [DONE]\n\n"


def shown_sample(outcome: Outcome) -> Sample:
    """Return the sample whose text the client reads.

    It is the earliest sample that voted for the winner, a finished one before one that was cut off.
    Without votes it is the first sample that finished, else the first that was cut off, else the
    first that the program aborted.

    Raises:
        ServerError: every sample failed.
    """
    voters = outcome.vote.groups[0].indices if outcome.vote.groups else ()
    states = (SampleState.FINISHED, SampleState.TRUNCATED, SampleState.ABORTED)
    readable = [sample for sample in outcome.samples if sample.state in states]
    if not readable:
        first = next((sample.error for sample in outcome.samples), "there is none")
        raise ServerError(f"all {len(outcome.samples)} samples failed, the first with: {first}")
    return min(
        readable,
        key=lambda s: (s.index not in voters, states.index(s.state), s.index),
    )


@dataclass(frozen=True)
class Answer:
    """The answer to one request: the id and date are the same in all its pieces."""

    request: VoteRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, outcome: Outcome) -> dict[str, Any]:
        """Return the complete answer; raises `ServerError` if every sample failed."""
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
        """Return the first chunk of a streamed answer."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, outcome: Outcome) -> Iterator[str]:
        """Yield the other chunks; the last one before the end of the stream carries the vote.

        Raises:
            ServerError: every sample failed; raised before the first of these chunks.
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
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def _finish_reason(shown: Sample) -> str:
    return "stop" if shown.state is SampleState.FINISHED else "length"


def _usage(outcome: Outcome) -> dict[str, Any]:
    """Return the tokens of all samples, and of the prompt once, as OpenAI's API for n > 1."""
    prompt = max((sample.num_prompt_tokens for sample in outcome.samples), default=0)
    reasoning = sum(sample.num_reasoning_tokens for sample in outcome.samples)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": outcome.spent_tokens,
        "total_tokens": prompt + outcome.spent_tokens,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
