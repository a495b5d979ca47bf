"""Records that programs take and return: access to a server, sampling parameters, prompts, samples.

They are plain and frozen, and import nothing of SGLang.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypedDict

from lim_sglang.errors import ConfigError, cut

DEFAULT_URL = "http://127.0.0.1:30000"
"""Address of a server that `lim serve` starts without further options."""


class Api(StrEnum):
    """Protocol of a server."""

    SGLANG = "sglang"
    """Chat completions with request ids, aborts and all of SGLang's options."""
    OPENAI = "openai"
    """Chat completions as any OpenAI-compatible server has them."""


@dataclass(frozen=True)
class Access:
    """Address and API of a server, and the limits of its use."""

    url: str = DEFAULT_URL
    """Address; for OpenAI's API the base URL, to which /v1 is added if it is only a host."""
    api: Api = Api.SGLANG
    model: str | None = None
    """The model's name at a server of OpenAI's API; None: its only model."""
    api_key: str | None = None
    timeout_s: float = 600.0
    """Limit of one generation, from sending to the answer."""
    max_concurrency: int = 64
    """Requests in flight; fewer if the server says that it runs fewer."""
    thinking: bool | None = None
    """On or off for models that can do both; None leaves it to the model's template."""
    thinking_budget: int | None = None
    """Tokens after which thoughts are closed; None: no limit."""
    command: str | None = None
    """The command, such as `lim ask`, whose `--api openai` asks other servers; None: there is none.
    """


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Defaults: the paper's temperature, top_p and top_k."""

    max_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int | None = None
    """Base seed of a question; sample i is sent `seed + i`. SGLang heeds it with
    `--sampling-backend lim`, or in deterministic inference."""
    top_k: int = 20
    """-1: no limit."""

    def seed_of(self, index: int) -> int | None:
        """Return the seed that a sample is sent."""
        return None if self.seed is None else self.seed + index


@dataclass(frozen=True)
class Range:
    """Values that a parameter can have, on the command line as from Python."""

    least: float
    most: float = math.inf
    whole: bool = True
    zero: str = ""
    """Words against 0, where the range excludes 0."""

    def check(self, name: str, value: Any) -> None:
        """Refuse a value outside of the range; raises `ConfigError`."""
        kinds = int if self.whole else int | float
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not self.least <= value <= self.most:  # so NaN is refused, too
            kind = "whole number" if self.whole else "number"
            limits = f"of at least {self.least:g}"
            if self.most < math.inf:
                limits = f"from {self.least:g} to {self.most:g}"
            raise ConfigError(f"{name}: expected a {kind} {limits}, got {cut(repr(value))}")
        if value == 0 and self.zero:
            raise ConfigError(f"{name}: {self.zero}")


RANGES: Mapping[str, Range] = {
    "samples": Range(1),
    "max_tokens": Range(1),
    "temperature": Range(0, 2, whole=False),
    "top_p": Range(
        0, 1, whole=False, zero="0 leaves no token to sample from; use more, up to 1 for all."
    ),
    "top_k": Range(-1, zero="0 leaves no token to sample from; use 1 or more, or -1 for all."),
    "seed": Range(0),
    "thinking_budget": Range(1),
    "timeout_s": Range(1, 86400, whole=False),
}
"""Values of the parameters of a question, by name."""


RECOMMENDED = ("temperature", "top_p", "top_k")
"""Parameters that a model's generation config may recommend; the server applies all others."""


def copies_note(sampling: Mapping[str, Any], num_samples: int) -> str | None:
    """Return what to say of samples that are copies of one chain; None where they are drawn.

    Args:
        sampling: fields of `Sampling` by name.
    """
    is_greedy = sampling.get("temperature") == 0 or sampling.get("top_k") == 1
    if num_samples < 2 or not is_greedy:
        return None
    setting = "temperature 0" if sampling.get("temperature") == 0 else "top_k 1"
    return (
        f"at {setting} the {num_samples} samples of a question are copies of one chain, or nearly: "
        "votes and pass@k say no more than one sample"
    )


def resolve_sampling(published: Mapping[str, Any], **given: Any) -> Sampling:
    """Return the parameters of a run: given ones, else the model's, else the paper's.

    Args:
        published: the model's parameters by name, as far as its server publishes them. A top_k of
            0 is no limit, as in transformers.
        given: fields of `Sampling`; None stands for a parameter that was not given.
    """
    recommended = {name: published[name] for name in RECOMMENDED if published.get(name) is not None}
    if recommended.get("top_k") == 0:
        recommended["top_k"] = -1
    wanted = {name: value for name, value in given.items() if value is not None}
    return Sampling(**{**recommended, **wanted})


def check_thinking_budget(budget: int | None, max_tokens: int) -> None:
    """Refuse a thinking budget that leaves no token for the answer; raises `ConfigError`."""
    if budget is not None and budget >= max_tokens:
        raise ConfigError(
            f"a thinking budget of {budget:,} tokens leaves nothing of max_tokens {max_tokens:,} "
            "to answer with: lower the one or raise the other"
        )


MATH_PROMPT = r"""{question}

Please reason step by step, and put your final answer within \boxed{{}}."""
"""Template for `str.format(question=...)`; raw, since `\b` would be a backspace."""
CHOICE_PROMPT = r"""{question}

Please reason step by step, and put the letter of your final answer within \boxed{{}}."""
"""Template for a question that ends with its options."""


class Message(TypedDict):
    """One turn of a conversation, as OpenAI's API has it."""

    role: str
    content: str


def ask_messages(
    question: str, *, template: str = MATH_PROMPT, system: str | None = None
) -> tuple[Message, ...]:
    """Return the conversation that asks one question.

    Raises:
        ConfigError: the template does not hold {question} exactly once, or holds another field.
    """
    try:
        content = template.format(question=question)
        holds_question = template.format(question="\0").count("\0") == 1
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"the prompt template cannot be filled in ({error!r}): write {{question}} where the "
            "question goes, and {{ and }} for braces"
        ) from None
    if not holds_question:
        raise ConfigError("the prompt template must hold {question} exactly once")
    turns = [Message(role="system", content=system)] if system else []
    return (*turns, Message(role="user", content=content))


@dataclass(frozen=True)
class SamplingRequest:
    """A question with the parameters of its samples."""

    messages: tuple[Message, ...]
    sampling: Sampling
    parallel: int
    """Samples in flight at the same time."""
    streamed: bool = False
    """True if the tokens of samples in flight are counted as they come."""
    seeds_honoured: bool = False


class SampleState(StrEnum):
    """End of a sample. A failure is a state of its own, never an empty or a wrong answer."""

    FINISHED = "finished"
    """The model ended its turn."""
    TRUNCATED = "truncated"
    """`max_tokens` was reached first."""
    FAILED = "failed"
    """The server or the connection failed; `Sample.error` says how."""
    ABORTED = "aborted"
    """The program was settled, or a person stopped it, before the sample ended."""


COMPLETED_STATES = (SampleState.FINISHED, SampleState.TRUNCATED)
"""States of samples that ended by themselves."""


@dataclass(frozen=True)
class Sample:
    """One chain of thought, as it ended."""

    index: int
    """Position among the samples of its question, from 0."""
    state: SampleState
    text: str
    answer: str | None
    """The extracted final answer; None if the text states none."""
    num_tokens: int
    """Generated tokens of the text."""
    latency_s: float
    seed: int | None
    """The seed that was sent."""
    seed_honoured: bool
    rid: str
    """The request id at the server."""
    error: str | None = None
    tokens_at_least: bool = False
    """True if the server may have generated more: the end of this try, or of an earlier one, is
    unknown."""
    num_reasoning_tokens: int = 0
    """Tokens of `num_tokens` up to the end of the thoughts."""
    reasoning_estimated: bool = False
    """True if `num_reasoning_tokens` is an estimate: pieces of a stream, or a share of the
    characters."""
    num_prompt_tokens: int = 0
    """Tokens of the prompt; 0 if the server does not count them."""
    confidence: float | None = None
    """DeepConf's lowest group confidence of the chain (`stopping.py`); None without logprobs."""
    num_repeated_logprobs: int = 0
    """Tokens whose part in the confidence is a guess (`chat.count_repeated_logprobs`)."""


UNREAD = "ended with no answer in a form that is read"
"""Words on samples that were not cut off and have no answer; no answer can be read from them."""
IN_A_BOX = "most words count in a box only"
READ_FORMS = (
    f', such as \\boxed{{…}}, "the answer is …" or "Final answer: …" ({IN_A_BOX}): a small model '
    "may not follow the instruction, so try a larger one"
)
UNANSWERED = f"{UNREAD}{READ_FORMS}"


def cut_off_advice(num_tokens: int, max_tokens: int, otherwise: str) -> str:
    """Return what to do about samples that were cut off before an answer.

    Args:
        num_tokens: of the longest of these samples.
        max_tokens: limit that was asked for.
        otherwise: advice where a shorter sample shows that the server's context was full.
    """
    if num_tokens >= max_tokens:
        return "raise --max-tokens"
    return (
        f"that is less than --max-tokens {max_tokens:,}, so the server's context is full: "
        f"{otherwise}"
    )
