"""Summaries as runs could give them: drawn at random, measured by nobody."""

import random
from typing import Any

from lim_sglang.evals.metrics import QuestionResult, Summary
from lim_sglang.programs.schema import SampleState

CONDITIONS: dict[str, Any] = {
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
FULL: dict[str, Any] = dict.fromkeys(
    ("budget", "ranking", "recent_ratio", "sinks", "dense_layers", "select_layers")
) | {"policy": "full"}
"""What is different under full attention."""


def made(
    seed: int = 0,
    *,
    questions: int = 500,
    samples: int = 4,
    harm: float = 0.0,
    longer: float = 1.0,
    **changed: Any,
) -> Summary:
    """A run of so many questions and samples of each.

    Args:
        harm: taken from the log odds of each sample.
        longer: factor on the lengths.
        changed: conditions.
    """
    conditions = CONDITIONS | {"samples": samples, "asked": questions} | changed
    hardness = random.Random("questions")  # the same questions for every policy
    luck = random.Random(f"{seed} {conditions['policy']} {conditions['budget']}")
    limit = conditions["max_tokens"]
    results = tuple(
        _question(f"q{number:03d}", hardness.gauss(0.7, 2.2), luck, samples, harm, longer, limit)
        for number in range(questions)
    )
    name = f"{conditions['task']}-{conditions['policy']}-{conditions['budget']}-{seed}"
    return Summary(run_id=name, conditions=conditions, questions=results, num_failed=0)


def _question(
    identity: str,
    hard: float,
    luck: random.Random,
    samples: int,
    harm: float,
    longer: float,
    limit: int,
) -> QuestionResult:
    answers: list[int | None] = []  # 0 is right, the others are wrong ones
    states, tokens = [], []
    for _ in range(samples):
        length = int(longer * luck.lognormvariate(5.95 + 0.16 * hard, 0.45))
        cut = length >= limit or luck.random() < 0.02
        tokens.append(limit if cut else max(length, 20))
        states.append(SampleState.TRUNCATED if cut else SampleState.FINISHED)
        right = luck.random() < 1 / (1 + 2.718281828 ** (hard + harm))
        wrong = None if luck.random() < 0.04 else 1 + min(int(luck.expovariate(0.7)), 5)
        answers.append(None if cut else 0 if right else wrong)
    order = list(dict.fromkeys(answer for answer in answers if answer is not None))
    groups = tuple(None if answer is None else order.index(answer) for answer in answers)
    votes = [groups.count(number) for number in range(len(order))]
    return QuestionResult(
        question_id=identity,
        indices=tuple(range(samples)),
        correct=tuple(answer == 0 for answer in answers),
        group=groups,
        states=tuple(states),
        tokens=tuple(tokens),
        late=(False,) * samples,
        chosen=votes.index(max(votes)) if votes else None,
    )


def five_runs(questions: int = 500, **changed: Any) -> list[Summary]:
    """Full attention and four budgets, the smaller the worse and the longer."""
    sparse = ((128, 0.55, 1.25), (256, 0.3, 1.1), (512, 0.1, 1.03), (1024, 0.02, 1.0))
    return [
        made(questions=questions, **FULL | changed),
        *(
            made(questions=questions, harm=harm, longer=longer, budget=budget, **changed)
            for budget, harm, longer in sparse
        ),
    ]
