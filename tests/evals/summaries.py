"""Summaries of runs for tests: committed, spelled out question by question, or simulated."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lim_sglang.evals.compare import POLICY
from lim_sglang.evals.metrics import QuestionResult, Summary
from lim_sglang.evals.run_store import GradedSample, RunRecord
from lim_sglang.evals.summaries import read_summary
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample

MEASURED = Path(__file__).parents[2] / "docs" / "measured" / "eval"
COMMITTED = {
    (summary.conditions["policy"], summary.conditions["budget"]): summary
    for summary in map(read_summary, sorted(MEASURED.glob("*.json")))
}
"""The committed summaries by their policies and budgets."""
CONDITIONS: Mapping[str, Any] = COMMITTED["lessismore", 256].conditions
FULL = {name: COMMITTED["full", None].conditions.get(name) for name in POLICY}
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
    seconds: Sequence[float] | None = None,
) -> QuestionResult:
    """Make a question from the answer groups of its samples, one of which is right.

    Samples are finished and have 10, 20, … tokens by default, and seconds if they are given.
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
        seconds=tuple(seconds) if seconds else None,
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
    questions: int = 9,
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
    limit, results = found["max_tokens"], []
    for number in range(questions):
        hard, tokens, answers = hardness.gauss(0.7, 2.2), [], []
        for _ in range(samples):
            length = int(longer * luck.lognormvariate(5.95 + 0.16 * hard, 0.45))
            cut = length >= limit or luck.random() < 0.02
            right = luck.random() < 1 / (1 + math.exp(hard + harm))
            wrong = None if luck.random() < 0.04 else 1 + min(int(luck.expovariate(0.7)), 5)
            tokens.append(limit if cut else max(length, 20))
            answers.append(None if cut else 0 if right else wrong)
        order = list(dict.fromkeys(answer for answer in answers if answer is not None))
        result = question(
            f"q{number:03d}",
            [None if answer is None else order.index(answer) for answer in answers],
            order.index(0) if 0 in order else None,
            states={n: SampleState.TRUNCATED for n in range(samples) if tokens[n] == limit},
            tokens=tokens,
            chosen=order.index(max(order, key=answers.count)) if order else None,
        )
        results.append(result)
    name = f"{found['task']}-{found['policy']}-{found['budget']}-{seed}"
    return Summary(name, found, tuple(results), num_failed=0)


def five_runs(questions: int, **conditions: Any) -> list[Summary]:
    """Simulate full attention and four budgets, the smaller ones worse and longer."""
    sparse = ((128, 0.55, 1.25), (256, 0.3, 1.1), (512, 0.1, 1.03), (1024, 0.02, 1.0))
    return [
        simulated(questions=questions, **{**FULL, **conditions}),
        *(
            simulated(questions=questions, harm=harm, longer=longer, budget=budget, **conditions)
            for budget, harm, longer in sparse
        ),
    ]


CONFIG = {"policy": "lessismore", "budget": 256, "ranking": "rank", "recent_ratio": 0.25}
SAMPLING = {"max_tokens": 100, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
SETTINGS: dict[str, Any] = {
    "task": "aime24",
    "questions": {"asked": 2, "asked_digest": "d1", "digest": "d2", "revision": "r"},
    "prompt_sha256": "p",
    "system": "SECRET system prompt",
    "thinking": {"enabled": True, "budget": 50},
    "program": {"name": "majority", "options": {}, "parallel": None},
    "num_samples": 4,
    "sampling": {**SAMPLING, "seed": None, "seed_honoured": False},
    "server": {
        "model_path": "/data/models/tiny/",
        "tokenizer_path": "/data/models/tiny/",
        "chat_template": None,
        "json_model_override_args": "{}",
        "tp_size": 1,
        "device_name": "GPU",
    },
    "lim": {"config": CONFIG, "roles": ["full", "full", "select", "reuse", "select", "reuse"]},
    "versions": {"math_verify": "0.9.0"},
}
ABOUT = {
    "commit": "abc",
    "began": "2026-11-25T10:00:00+00:00",
    "client_versions": {"torch": "2"},
    "concurrency": [16, 4],
}
RECORD = RunRecord("run-1", SETTINGS, ABOUT)


def graded(name: str, index: int, answer: str | None, **more: Any) -> GradedSample:
    """Make a sample of a question whose right answer is 4."""
    late = more.pop("late", False)
    sample = replace(make_sample(index, answer, **more), rid="SECRET rid")
    return GradedSample(name, "SECRET gold", answer == "4", sample, late=late)


def equivalent(a: str, b: str) -> bool:
    return a.strip() == b.strip()


SAMPLES = [
    graded("b", 3, "5"),
    graded("b", 0, "5"),
    graded("a", 1, " 4"),
    graded("a", 0, "4", num_tokens=70),
    graded("b", 1, "4"),
    graded("b", 2, None, state=SampleState.TRUNCATED),
    graded("a", 2, "6"),
    graded("a", 3, "6", late=True),
]
