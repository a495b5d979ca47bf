"""The Python interface: ask a running server for a vote, grade a reply, extract its answer.

Import from the package: `from lim_sglang import ask, grade, extract_answer`. All functions work in
any thread and beside a running asyncio loop; they wait, so a loop stands still meanwhile.
"""

import atexit
import functools
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from inspect import signature
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, get_args

from lim_sglang.config import API_KEY_VAR, URL_VAR
from lim_sglang.errors import ConfigError, LimError, cut, in_python

if TYPE_CHECKING:
    from lim_sglang.programs.grading.equivalence import EquivalenceChecker
    from lim_sglang.programs.program import Program
    from lim_sglang.programs.schema import Sample

Kind = Literal["expression", "integer", "choice", "text"]
"""Comparison of answers: mathematical equality, integers from 0 to 999, letters A to J, texts."""


P = ParamSpec("P")
R = TypeVar("R")


def _public(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of each call by name, before anything is read or sent.

    The trace of a `LimError`, whose message says all, ends here, with arguments in the place of
    options: the fault is the caller's or the server's. Any other error keeps its whole trace.
    """
    parameters = signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        values: Any = tuple(map(_plain, args))
        named: Any = {name: _plain(value) for name, value in kwargs.items()}
        try:
            for name, value in (dict(zip(parameters, values, strict=False)) | named).items():
                if name in parameters and value is not parameters[name].default:
                    _check(name, value)
            return function(*values, **named)
        except LimError as error:
            error.args = (in_python(str(error)),)
            raise error.with_traceback(None) from None

    return call


def _plain(value: Any) -> Any:
    """Return a number of another library, such as numpy, as Python's own, alone or in a mapping."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _is_program(value: object) -> bool:
    from lim_sglang.programs.program import Program

    return isinstance(value, str | Program)


def _is_answer(value: object) -> bool:
    from lim_sglang.programs.grading.kinds import number_text

    return isinstance(value, str) or number_text(value) is not None


def _is_options(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(number, int | float) and not isinstance(number, bool)
        for number in value.values()
    )


TEXTS = ("question", "url", "system", "template", "api_key", "reply")
EXPECTED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TEXTS, ("a text", lambda value: isinstance(value, str))),
    "program": ("a name or a Program", _is_program),
    "options": ("a mapping of names to numbers, such as {'confidence': 0.9}", _is_options),
    "thinking": ("True or False", lambda value: isinstance(value, bool)),
    "on_sample": ("a function of a sample", callable),
    "answer": ("a text or a finite number", _is_answer),
    "kind": (", ".join(get_args(Kind)), lambda value: value in get_args(Kind)),
}
"""Type of each argument in words, and its test; the numbers are in `schema.RANGES`."""


def _check(name: str, value: object) -> None:
    """Refuse an argument of a wrong type, or a number out of range; raises `ConfigError`."""
    from lim_sglang.programs.schema import RANGES

    if name in RANGES:
        RANGES[name].check(name, value)
        return
    expected, holds = EXPECTED[name]
    if not holds(value):
        raise ConfigError(f"{name}: expected {expected}, got {cut(repr(value))}")


@dataclass(frozen=True)
class Vote:
    """The answer of several chains of thought to one question."""

    answer: str | None
    """The winning answer as its first sample wrote it; None if no sample states one."""
    votes: Mapping[str, int]
    """Samples for each answer, the winner first; equal answers are counted together."""
    margin: int
    """Votes of the winner minus those of the second answer; 0 is a tie."""
    samples: "tuple[Sample, ...]"
    """Every sample that was begun, by index: text, answer, state, tokens, error."""
    tokens: int
    """Tokens generated, by samples that were stopped early too."""
    seconds: float


@_public
def ask(
    question: str,
    program: "str | Program" = "majority",
    samples: int | None = None,
    url: str | None = None,
    *,
    options: Mapping[str, float] | None = None,
    max_tokens: int = 2048,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    system: str | None = None,
    template: str | None = None,
    thinking: bool | None = None,
    thinking_budget: int | None = None,
    api_key: str | None = None,
    timeout_s: float = 600.0,
    on_sample: "Callable[[Sample], None] | None" = None,
) -> Vote:
    r"""Ask a running server, and let the samples vote; a tie goes to the answer of the first
    sample, by its number.

    The question is sent with the request to reason and to put the answer within `\boxed{}`.

    Args:
        program: majority, adaptive, early_stop, short, confidence, budget, single, or a `Program`
            of one's own (`examples/stopping_rule.py`).
        samples: chains of thought, at most; None for the program's own number, 8 of majority.
        url: address of the server; None for `LIM_URL`, else http://127.0.0.1:30000.
        options: of the program, such as `{"confidence": 0.9}` of adaptive.
        max_tokens: tokens after which a sample is cut off.
        temperature, top_p, top_k: None for the model's own.
        seed: sample i is sent `seed + i`.
        system: a system prompt.
        template: with `{question}` where the question goes, in the place of that request.
        thinking: on or off for models that can do both; None for the model's own.
        thinking_budget: tokens after which thoughts are closed.
        api_key: None for `LIM_API_KEY`.
        timeout_s: limit of one sample.
        on_sample: called with each sample as it ends, in the caller's thread.

    Raises:
        LimError: no server answers, every sample failed, or an argument is impossible or of
            another type.
    """
    from rich.console import Console

    from lim_sglang.programs.options import TEMPLATE, read_template
    from lim_sglang.programs.program import find_program, refuse_failures, run_program
    from lim_sglang.programs.schema import (
        DEFAULT_URL,
        Access,
        SamplingRequest,
        ask_messages,
        check_thinking_budget,
        resolve_sampling,
    )
    from lim_sglang.programs.sglang_backend import connect

    if not question.strip():
        raise ConfigError("the question is empty: write one")
    chosen = find_program(program) if isinstance(program, str) else program
    most = chosen.samples if samples is None else samples
    likeliest = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {"max_tokens": max_tokens, "seed": seed, **likeliest}
    chosen.check(options or {}, most)
    check_thinking_budget(thinking_budget, max_tokens)
    messages = ask_messages(
        question, template=read_template(TEMPLATE if template is None else template), system=system
    )
    access = Access(
        url or os.environ.get(URL_VAR) or DEFAULT_URL,
        api_key=api_key or os.environ.get(API_KEY_VAR),
        timeout_s=timeout_s,
        max_concurrency=most,
        thinking=thinking,
        thinking_budget=thinking_budget,
    )
    equivalent = _checker(os.getpid()).equivalent
    with closing(connect(access, Console(quiet=True))) as backend:
        sampling = resolve_sampling(backend.sampling_defaults(), **given)
        outcome = run_program(
            chosen,
            backend,
            SamplingRequest(
                messages,
                sampling,
                parallel=chosen.parallel or most,
                streamed=chosen.streamed,
                seeds_honoured=seed is not None and backend.honours_seeds,
            ),
            indices=range(most),
            equivalent=equivalent,
            options=options,
            on_sample=lambda sample: on_sample(_in_python(sample)) if on_sample else None,
        )
    refuse_failures(outcome)
    vote = outcome.vote
    return Vote(
        answer=vote.winner,
        votes={group.answer: group.votes for group in vote.groups},
        margin=vote.margin,
        samples=tuple(map(_in_python, outcome.samples)),
        tokens=outcome.spent_tokens,
        seconds=outcome.elapsed_s,
    )


def _in_python(sample: "Sample") -> "Sample":
    """Return a sample whose error, if any, names arguments and no options."""
    return replace(sample, error=in_python(sample.error)) if sample.error else sample


@_public
def grade(reply: str, answer: str | float, kind: Kind = "expression") -> bool:
    """Return True if the answer that a reply states equals the right one, as `lim eval` decides.

    The first comparison of expressions starts a process with math-verify, for a second or two.

    Args:
        reply: the text of a model; a bare answer counts as a number, a letter, or a formula in `$`.
        answer: the right answer, a text or a number; of a solution that ends in `####` and the
            answer, or has it in a box, that alone.
        kind: expression, integer (from 0 to 999), choice (a letter from A to J) or text (the same
            words and signs, without white space, quotes and punctuation around them).

    Raises:
        LimError: there is no such kind, a text is none, no reply can equal the answer, or
            math-verify does not start.
    """
    from lim_sglang.evals.grading import Grader
    from lim_sglang.programs.grading.kinds import AnswerKind, fault_of_reference, number_text
    from lim_sglang.programs.grading.references import reference_answer

    grader = Grader(AnswerKind(kind), _checker(os.getpid()))
    gold = number_text(answer) or str(answer)
    if kind != "text":
        gold, _ = reference_answer(gold)
    if fault := fault_of_reference(gold, AnswerKind(kind)):
        raise ConfigError(f"answer: {fault}")
    return grader.correct(gold, grader.extract(reply))


@_public
def extract_answer(reply: str, kind: Kind = "expression") -> str | None:
    r"""Return the answer that a reply states: the last `\boxed{}`, "the answer is", `####`.

    A box stands with the arithmetic beside it in its formula: `3\sqrt{2}` of `\boxed{3}\sqrt{2}`.

    None if the reply states none of this kind. An integer comes without leading zeros, a choice as
    its capital letter.

    Args:
        reply: the text of a model.
        kind: as for `grade`.

    Raises:
        LimError: there is no such kind, or the reply is no text.
    """
    from lim_sglang.programs.grading.answers import extract_answer as extract
    from lim_sglang.programs.grading.kinds import PARSERS, AnswerKind

    answer_kind = AnswerKind(kind)
    found = extract(reply, answer_kind)
    parse = PARSERS.get(answer_kind)
    if found is None or parse is None:
        return found
    value = parse(found)
    return None if value is None else str(value)


_checkers: "dict[int, EquivalenceChecker]" = {}
_lock = threading.Lock()


def _checker(pid: int) -> "EquivalenceChecker":
    """Return the checker of this process, which is made once; a fork gets its own."""
    from lim_sglang.programs.grading.equivalence import EquivalenceChecker

    with _lock:
        if pid not in _checkers:
            _checkers[pid] = EquivalenceChecker()
            atexit.register(_checkers[pid].close)
        return _checkers[pid]
