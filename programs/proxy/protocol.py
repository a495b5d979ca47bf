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

import httpx
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    Tag,
    ValidationError,
)

from lim_sglang.config import SIMILAR, is_like_a_program
from lim_sglang.errors import ConfigError, cut, likely_name, value_error
from lim_sglang.programs.chat import split_thoughts
from lim_sglang.programs.http_client import reason_of
from lim_sglang.programs.options import read_settings
from lim_sglang.programs.program import (
    Outcome,
    find_name,
    find_program,
    outcome_record,
    reasons_without_vote,
)
from lim_sglang.programs.schema import (
    COMPLETED_STATES,
    MATH_PROMPT,
    RANGES,
    Message,
    Sample,
    SampleState,
    Sampling,
)

DEFAULT_PROGRAM = "majority"
SAMPLE_LIMIT = 1024
"""Samples of one question at most: a typing error must not keep a server busy for days."""

INT32_MAX = 2**31 - 1
SEED_MAX = 2**63 - 1 - SAMPLE_LIMIT
"""The largest base seed: sample i is sent `seed + i`, and servers keep seeds in 64 bits."""
OPTION_MAX = 2**53
"""The largest number of an option: the whole numbers up to it are exact as floats."""

_MODEL = re.compile(r"(?P<path>[^?]*?)(?:@(?P<samples>[^@?]*))?(?:\?(?P<options>.*))?", re.DOTALL)
_NUMBER = re.compile(r"[1-9][0-9]{0,3}")
"""A number of samples. Dates and versions, as in `claude@20240620` and `bison@001`, are none."""
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
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    # The proxy's own options decide if and how long a model thinks.
    "chat_template_kwargs": ({},),
    "reasoning_effort": (),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
}
"""Fields that a vote cannot honour, with the values that ask for nothing."""
_PLAIN = "a request to the server's own model may have it"
_IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
)
"""Fields that change no answer."""

_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}

ProgramSamples = Mapping[str, int]
"""Programs by name, with the samples of each if a request names no number."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Part(_Strict):
    type: Literal["text"]
    text: str


_TEXT, _PARTS = "<text>", "<parts>"
"""Forms of a turn's content; pydantic puts them into the places of faults."""


class _Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(_TEXT)] | Annotated[list[_Part], Tag(_PARTS)],
        Discriminator(lambda content: _PARTS if isinstance(content, list) else _TEXT),
    ]
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
    parallel: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    options: dict[str, StrictInt | StrictFloat] = {}
    template: Literal["math"] | None = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class _ChatRequest(_Strict):
    messages: Annotated[list[_Turn], Field(min_length=1)]
    model: str | None = None
    lim: _LimField | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32_MAX)] | None = None
    temperature: (
        Annotated[float, Field(ge=RANGES["temperature"].least, le=RANGES["temperature"].most)]
        | None
    ) = None
    top_p: Annotated[float, Field(gt=0, le=RANGES["top_p"].most)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    seed: Annotated[int, Field(ge=0, le=SEED_MAX)] | None = None


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


Named = tuple[str | None, int | None, Mapping[str, int | float]]
"""A program, its number of samples and its options; None for a part that is not named."""


class NoJsonError(ConfigError):
    """A body that is no JSON."""


def parse_body(content: bytes) -> Any:
    """Return the JSON of a request's body.

    Raises:
        NoJsonError: the body is no JSON.
        ConfigError: the body is nested too deeply to be read.
    """
    try:
        return json.loads(content)
    except ValueError:
        raise NoJsonError("the body is no JSON: send a JSON object in UTF-8") from None
    except RecursionError:
        raise ConfigError("the JSON of the body is nested too deeply") from None


def read_request(
    body: Any, named: Named | None, programs: ProgramSamples, defaults: Sampling
) -> VoteRequest:
    """Return the question to a program that a chat completion asks.

    Args:
        body: the JSON of a chat completion.
        named: what the model string names (`read_model`).
        defaults: parameters that the request does not name.

    Raises:
        ConfigError: the request cannot be answered as it is, with all reasons at once.
    """
    asked = _validate(body)
    program, samples, options = _merge(
        named or (None, None, {}), asked.lim or _LimField(), programs
    )
    samples = samples or programs[program]
    find_program(program).check(options, samples)
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
    _check_characters(body)
    known = {name: body[name] for name in _ChatRequest.model_fields if name in body}
    reasons = _reasons_against(body)
    try:
        asked = _ChatRequest.model_validate(known)
    except ValidationError as error:
        reasons += [_in_words(problem) for problem in error.errors()]
    if reasons:
        raise ConfigError("; ".join(reasons))
    return asked


def _check_characters(body: Any) -> None:
    """Refuse halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ConfigError(
            f"the body holds {half}, half of a surrogate pair: send whole characters"
        ) from None
    except RecursionError:
        raise ConfigError("the JSON of the body is nested too deeply") from None


def read_model(model: Any, programs: ProgramSamples) -> Named | None:
    """Read a model string `program@samples?name=number&name=number`; None for a server's model.

    Case, spaces, `-` for `_` and the path of a provider, as in `openai/Early-Stop @3`, make no
    difference. SGLang answers to any model string, so a misspelt vote has to be refused here.

    Raises:
        ConfigError: samples or options of another form, an unknown program before `@` and a
            number, or a name so similar to a program's that a vote is meant.
    """
    found = _MODEL.fullmatch(model) if isinstance(model, str) else None
    if found is None:
        return None
    count, options = found["samples"], found["options"]
    name = found["path"].rpartition("/")[2].strip()
    program = find_name(name, programs)
    if program is None:
        is_number = _NUMBER.fullmatch((count or "").strip())
        is_alone = count is None and options is None
        if is_number or is_like_a_program(name, programs, is_alone=is_alone):
            raise _unknown(f"model {cut(repr(model), 200)}: ", name, programs)
        return None
    return program, _read_count(model, count), _read_options(model, options)


def _unknown(where: str, name: str, programs: ProgramSamples) -> ConfigError:
    return ConfigError(
        f"{where}unknown program {cut(repr(name))}; {likely_name(name, programs)}known: "
        f"{', '.join(programs)}; a vote is PROGRAM@SAMPLES, such as "
        f"{DEFAULT_PROGRAM}@{programs[DEFAULT_PROGRAM]}"
    )


def _read_count(model: str, count: str | None) -> int | None:
    if count is None:
        return None
    digits = count.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 9):
        digits = "0"
    if not 1 <= int(digits) <= SAMPLE_LIMIT:
        raise ConfigError(
            f"model {cut(repr(model), 200)}: after @ comes a number of samples, 1 to {SAMPLE_LIMIT}"
        )
    return int(digits)


def _read_options(model: str, options: str | None) -> Mapping[str, int | float]:
    try:
        return read_settings((options or "").casefold().split("&")) if options else {}
    except ConfigError:
        raise ConfigError(
            f"model {cut(repr(model), 200)}: write options as ?name=number&name=number, each "
            "name once"
        ) from None


def _merge(
    named: Named, field: _LimField, programs: ProgramSamples
) -> tuple[str, int | None, dict[str, int | float]]:
    """Return program, samples and options of the model string and the `lim` field together."""
    program, samples, options = named
    wanted = find_name(field.program, programs) if field.program is not None else None
    if field.program is not None and wanted is None:
        raise _unknown("lim.program: ", field.program, programs)
    twice = [name for name, value in field.options.items() if options.get(name, value) != value]
    if wanted and program and wanted != program:
        twice.append("program")
    if field.samples and samples and field.samples != samples:
        twice.append("samples")
    if twice:
        raise ConfigError(f"the model string and the lim field differ in {', '.join(twice)}")
    merged = {**options, **field.options}
    if large := [name for name, value in merged.items() if abs(value) > OPTION_MAX]:
        raise ConfigError(f"{', '.join(large)}: expected a number up to 2^53")
    return program or wanted or DEFAULT_PROGRAM, samples or field.samples, merged


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
            known = (*_ChatRequest.model_fields, *_NEUTRAL, *_IGNORED)
            meant = likely_name(name, known, SIMILAR).strip()
            reasons.append(f"{name}: a vote does not know this field ({meant or _PLAIN})")
        elif not any(type(value) is type(each) and value == each for each in _NEUTRAL[name]):
            advice = "use @SAMPLES in the model's name" if name == "n" else _PLAIN
            reasons.append(f"{name}: a vote cannot honour {cut(json.dumps(value), 60)} ({advice})")
    if body.get("top_k") == 0:
        reasons.append("top_k: 0 leaves no token to sample from; -1 samples from all")
    return reasons


def _in_words(problem: Mapping[str, Any]) -> str:
    steps = (str(step) for step in problem["loc"] if step not in (_TEXT, _PARTS))
    where, text = ".".join(steps), value_error(problem)
    if problem["type"] == "extra_forbidden" and problem["loc"][0] == "lim":
        known = _LimField.model_fields
        meant = likely_name(where[4:], known, SIMILAR).strip()
        return f"{where}: not a field of lim ({meant or ', '.join(known)})"
    return f"{where}: {text[:1].lower()}{text[1:]}"


def error_body(
    message: str, kind: str, code: str | int, *, param: str | None = None
) -> dict[str, Any]:
    """Return the body of an error, as OpenAI's API has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_error_body(message: str, status: int) -> dict[str, Any]:
    """Return the body of an error, as Anthropic's API has it."""
    kind = _ANTHROPIC_KINDS.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def refusal_body(response: httpx.Response) -> dict[str, Any]:
    """Return a server's answer with a status above 399 as an error in a stream.

    SGLang writes the fields of the error without the `error` around them.
    """
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return error_body(reason_of(response), "server_error", response.status_code)
    return body if isinstance(body.get("error"), dict) else {"error": body}


PIECE = 200
"""Characters of the answer in one streamed chunk."""
DONE = "data: [DONE]\n\n"


def shown_sample(outcome: Outcome) -> Sample | None:
    """Return the sample whose text the client reads; None if no answer has a vote.

    It is the first sample, by its number, that voted for the winner, a finished one before one that
    was cut off.
    """
    voters = outcome.vote.groups[0].indices if outcome.vote.groups else ()
    shown = [sample for sample in outcome.samples if sample.index in voters]
    return min(shown, key=lambda s: (COMPLETED_STATES.index(s.state), s.index), default=None)


def no_answer(outcome: Outcome, request: VoteRequest) -> str:
    """Return the sentence that stands in the place of an answer that no vote has."""
    program, max_tokens = find_program(request.program), request.sampling.max_tokens
    reasons = [reason.found for reason in reasons_without_vote(outcome, program, max_tokens)]
    counts = " that counts" if outcome.vote.uncounted or outcome.num_late else ""
    return f"No sample states an answer{counts}: {'; '.join(reasons)}."


@dataclass(frozen=True)
class Answer:
    """The answer to one request: the id and date are the same in all its pieces."""

    request: VoteRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, outcome: Outcome) -> dict[str, Any]:
        """Return the complete answer."""
        shown = shown_sample(outcome)
        thoughts, reply = self._texts(outcome, shown)
        message = {"role": "assistant", "content": reply, "refusal": None}
        if thoughts:
            message["reasoning_content"] = thoughts
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _finish_reason(outcome, shown),
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
        """Yield the other chunks; the last one before the end of the stream carries the vote."""
        shown = shown_sample(outcome)
        thoughts, reply = self._texts(outcome, shown)
        for name, text in (("reasoning_content", thoughts), ("content", reply)):
            for start in range(0, len(text), PIECE):
                yield self._chunk({name: text[start : start + PIECE]})
        vote = {"lim": self._vote(outcome, shown)}
        with_usage = self.request.include_usage
        yield self._chunk({}, _finish_reason(outcome, shown), **({} if with_usage else vote))
        if with_usage:
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": _usage(outcome), **vote})
        yield DONE

    def _texts(self, outcome: Outcome, shown: Sample | None) -> tuple[str, str]:
        """Return thoughts and content."""
        return split_thoughts(shown.text) if shown else ("", no_answer(outcome, self.request))

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

    def _vote(self, outcome: Outcome, shown: Sample | None) -> dict[str, Any]:
        return {
            "program": self.request.program,
            "options": dict(self.request.options),
            **outcome_record(outcome),
            "shown": shown.index if shown else None,
            "samples": [
                {
                    "index": sample.index,
                    "state": sample.state,
                    "answer": sample.answer,
                    "num_tokens": sample.num_tokens,
                    "tokens_at_least": sample.tokens_at_least,
                    "seed_honoured": sample.seed_honoured,
                    "error": sample.error,
                }
                for sample in outcome.samples
            ],
        }


def event(content: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def _finish_reason(outcome: Outcome, shown: Sample | None) -> str:
    """Return how the shown sample ended; without one, "length" if every sample was cut off."""
    ended = [shown] if shown else outcome.samples
    was_cut = bool(ended) and all(sample.state is SampleState.TRUNCATED for sample in ended)
    return "length" if was_cut else "stop"


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
