"""What a program is given and what it returns: plain, frozen, free of SGLang."""

from dataclasses import dataclass
from enum import StrEnum


class SampleState(StrEnum):
    """How one sample ended. A failure is a state of its own, never an empty or a wrong answer."""

    FINISHED = "finished"
    """The model ended its turn."""
    TRUNCATED = "truncated"
    """`max_tokens` was reached first."""
    FAILED = "failed"
    """The server or the connection failed; `Sample.error` says how."""
    ABORTED = "aborted"
    """Its program was settled, or a person stopped it, before the sample ended."""


COMPLETED_STATES = (SampleState.FINISHED, SampleState.TRUNCATED)
"""Samples that ended by themselves."""


@dataclass(frozen=True)
class Sampling:
    """How each sample is drawn. Defaults: the paper's temperature, top_p and top_k."""

    max_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int | None = None
    """Base seed; sample i is sent `seed + i`. SGLang drops it unless it runs deterministically."""
    top_k: int = 20
    """-1: no limit."""

    def seed_of(self, index: int) -> int | None:
        """The seed that one sample is sent."""
        return None if self.seed is None else self.seed + index


@dataclass(frozen=True)
class Sample:
    """One chain of thought, as it ended."""

    index: int
    """Position among the samples of its question, from 0."""
    state: SampleState
    text: str
    answer: str | None
    """The extracted final answer; None where the text states none."""
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
    """Whether the server may have generated more for it: nobody heard how it, or an earlier try of
    it, ended there."""
    num_reasoning_tokens: int = 0
    """Of `num_tokens`, up to the end of the thoughts."""
    reasoning_estimated: bool = False
    """Whether nobody counted these: they are pieces of a stream, or a share of the characters."""
    num_prompt_tokens: int = 0
    """Of the request that drew it; 0 where the server did not say."""
    confidence: float | None = None
    """DeepConf's lowest group confidence of the chain (`stopping.py`); None without logprobs."""
    num_repeated_logprobs: int = 0
    """Tokens whose part in the confidence is a guess (`chat.count_repeated`)."""
