"""Summaries of runs for tests: spelled out question by question, or simulated."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lim_sglang.evals.metrics import QuestionResult, Summary
from lim_sglang.programs.schema import SampleState

CONDITIONS: Mapping[str, Any] = {
    "task": "math500",
    "task_version": 1,
    "questions": "9b1f" * 16,
    "asked": 500,
    "revision": "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    "prompt_sha256": "3c5e" * 16,
    "system_sha256": None,
    "model": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "policy": "lessismore",
    "budget": 256,
    "ranking": "rank",
    "recent_ratio": 0.25,
    "sinks": 4,
    "dense_layers": [0, 1],
    "select_layers": [2, 14],
    "program": "majority",
    "options": {},
    "samples": 4,
    "thinking": None,
    "thinking_budget": None,
    "max_tokens": 2048,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 20,
    "seed": None,
    "seed_honoured": False,
    "api": "sglang",
    "device_name": "NVIDIA H100 80GB HBM3",
    "dtype": "bfloat16",
    "kv_cache_dtype": "auto",
    "quantization": None,
    "versions": {"torch": "2.11.0", "sglang_server": "0.5.16", "math_verify": "0.9.0"},
    "commit": "c0ffee0123456789abcdef",
    "date": "2026-11-25",
}
FULL: Mapping[str, Any] = {
    "policy": "full",
    "budget": None,
    "ranking": None,
    "recent_ratio": None,
    "sinks": None,
    "dense_layers": None,
    "select_layers": None,
}
"""Conditions that differ under full attention."""


def question(
    name: str,
    groups: Sequence[int | None],
    right: int | None = 0,
    *,
    states: Mapping[int, SampleState] = {},
    late: Sequence[int] = (),
    tokens: Sequence[int] | None = None,
    chosen: int | None = None,
) -> QuestionResult:
    """Make a question from the answer groups of its samples, one of which is right.

    Samples are finished and have 10, 20, … tokens by default.
    """
    count = len(groups)
    return QuestionResult(
        question_id=name,
        indices=tuple(range(count)),
        correct=tuple(group is not None and group == right for group in groups),
        group=tuple(groups),
        states=tuple(states.get(n, SampleState.FINISHED) for n in range(count)),
        tokens=tuple(tokens or (10 * (n + 1) for n in range(count))),
        late=tuple(n in late for n in range(count)),
        chosen=chosen,
    )


def run(*questions: QuestionResult, num_failed: int = 0, **conditions: Any) -> Summary:
    """Make a complete run of full attention from its questions."""
    changed = {**FULL, "task": "sums", "model": "tiny", "asked": len(questions), **conditions}
    return Summary("run", {**CONDITIONS, **changed}, questions, num_failed)


FOUR = run(
    question("all right", [0, 0, 0, 0], chosen=0),
    question("right by vote", [0, 1, 1, None], 1, states={3: SampleState.TRUNCATED}, chosen=1),
    question("wrong by vote", [0, 0, 1, 2], 1, chosen=0),
    question("no answer", [None] * 4, states=dict.fromkeys(range(4), SampleState.TRUNCATED)),
    num_failed=3,
)
"""A run whose scores are worked out by hand."""


def simulated(
    seed: int = 0,
    *,
    questions: int = 500,
    samples: int = 4,
    harm: float = 0.0,
    longer: float = 1.0,
    **conditions: Any,
) -> Summary:
    """Simulate a run of LessIsMore 256, or under other conditions.

    Args:
        harm: subtracted from the log odds of each sample.
        longer: factor of the lengths.
    """
    found = {**CONDITIONS, "samples": samples, "asked": questions, **conditions}
    hardness = random.Random("questions")  # the same questions for every policy
    luck = random.Random(f"{seed} {found['policy']} {found['budget']}")
    results = tuple(
        _simulated_question(
            f"q{n:03d}", hardness.gauss(0.7, 2.2), luck, samples, harm, longer, found["max_tokens"]
        )
        for n in range(questions)
    )
    name = f"{found['task']}-{found['policy']}-{found['budget']}-{seed}"
    return Summary(run_id=name, conditions=found, questions=results, num_failed=0)


def _simulated_question(
    name: str,
    hard: float,
    luck: random.Random,
    samples: int,
    harm: float,
    longer: float,
    limit: int,
) -> QuestionResult:
    answers: list[int | None] = []  # 0 is right, the others are wrong ones
    tokens, states = [], {}
    for n in range(samples):
        length = int(longer * luck.lognormvariate(5.95 + 0.16 * hard, 0.45))
        cut = length >= limit or luck.random() < 0.02
        tokens.append(limit if cut else max(length, 20))
        states[n] = SampleState.TRUNCATED if cut else SampleState.FINISHED
        right = luck.random() < 1 / (1 + 2.718281828 ** (hard + harm))
        wrong = None if luck.random() < 0.04 else 1 + min(int(luck.expovariate(0.7)), 5)
        answers.append(None if cut else 0 if right else wrong)
    order = list(dict.fromkeys(answer for answer in answers if answer is not None))
    groups = [None if answer is None else order.index(answer) for answer in answers]
    votes = [groups.count(number) for number in range(len(order))]
    return question(
        name,
        groups,
        order.index(0) if 0 in order else None,
        states=states,
        tokens=tokens,
        chosen=votes.index(max(votes)) if votes else None,
    )


def five_runs(questions: int = 500, **conditions: Any) -> list[Summary]:
    """Simulate full attention and four budgets, the smaller ones worse and longer."""
    sparse = ((128, 0.55, 1.25), (256, 0.3, 1.1), (512, 0.1, 1.03), (1024, 0.02, 1.0))
    return [
        simulated(questions=questions, **{**FULL, **conditions}),
        *(
            simulated(questions=questions, harm=harm, longer=longer, budget=budget, **conditions)
            for budget, harm, longer in sparse
        ),
    ]
