"""Grading: decide whether an answer is right and whether two answers are equivalent, and renew the
verdicts of a stored run.

Integers (AIME) and letters (multiple choice) are parsed here; every other answer is compared by
math-verify.
"""

import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol

from lim_sglang.evals.run_store import GRADES_FILE, GradedSample, Run, write_atomically
from lim_sglang.programs.grading.answers import extract_answer
from lim_sglang.programs.grading.kinds import PARSERS, AnswerKind
from lim_sglang.programs.schema import COMPLETED_STATES, SampleState

TURN_S = 0.5
"""Longest wait of the main thread, which Ctrl-C cannot interrupt if the kernel hands the signal to
another thread."""
GRADING_VERSION = 19
"""Version of extraction and grading: raise the number with a change of this module, of
`programs/grading/` or of `programs/comparison.py` that changes a verdict. Verdicts of another
version are renewed from the stored texts."""


class Equivalence(Protocol):
    """Comparison of expressions, as `EquivalenceChecker` does it."""

    def equivalent(self, a: str, b: str) -> bool:
        """Return True if two answers are equal; symmetric."""


class Grader:
    """Verdicts for one kind of answer. The same answer always gets the same verdict."""

    def __init__(self, kind: AnswerKind, checker: Equivalence) -> None:
        self._kind = kind
        self._parse = PARSERS.get(kind)
        self._checker = checker

    def extract(self, text: str, state: SampleState = SampleState.FINISHED) -> str | None:
        """Return the answer that a text states, as it is stored and graded.

        Args:
            state: how its sample ended.
        """
        return extract_answer(text, self._kind, cut_off=state is SampleState.TRUNCATED)

    def correct(self, gold: str, answer: str | None) -> bool:
        """Return True if an answer is right; a sample without an answer (None) is wrong."""
        if answer is None:
            return False
        if self._parse is None:
            return self._checker.equivalent(gold, answer)
        value = self._parse(answer)
        return value is not None and value == self._parse(gold)

    def equivalent(self, a: str, b: str) -> bool:
        """Return True if two answers share a vote."""
        if a == b:
            return True
        if self._parse is None:
            return self._checker.equivalent(a, b)
        value = self._parse(a)
        return value is not None and value == self._parse(b)


@dataclass(frozen=True)
class GradingResult:
    """Counts after a run was graded again."""

    num_samples: int
    """Samples that ended by themselves or at their token limit; only these count."""
    num_changed: int
    """Verdicts that differ from the ones before."""
    num_right: int


def grade_run(
    run: Run,
    grader: Grader,
    *,
    num_threads: int,
    on_graded: Callable[[int], object] = lambda _: None,
) -> GradingResult:
    """Extract the answer of each stored sample again, grade the answer, and write `grades.jsonl`,
    which `load_run` prefers to the verdicts in `samples.jsonl`.

    Grading twice writes the same file. An interruption leaves the file as it was before.

    Args:
        run: its samples are graded, and none that another process has stored since it was read.
        num_threads: verdicts computed at the same time; the number of the checker's workers.
        on_graded: called with the number of graded samples after each of them.

    Raises:
        DataError: the disk is full.
    """
    by = graded_by()
    rows = []
    with closing(_verdicts(run.samples, grader, num_threads)) as verdicts:
        for row in verdicts:
            rows.append({**row, "by": by})
            on_graded(len(rows))
    write_atomically(run.path / GRADES_FILE, "".join(f"{json.dumps(row)}\n" for row in rows))
    counted = [
        (graded.correct, row["correct"])
        for graded, row in zip(run.samples, rows, strict=True)
        if graded.sample.state in COMPLETED_STATES  # an aborted sample is neither right nor wrong
    ]
    return GradingResult(
        num_samples=len(counted),
        num_changed=sum(before != now for before, now in counted),
        num_right=sum(now for _, now in counted),
    )


def graded_by() -> str:
    """Return what gives verdicts now, as each row of `grades.jsonl` records it."""
    return f"math-verify {metadata.version('math-verify')}, grading {GRADING_VERSION}"


def _verdicts(
    samples: Sequence[GradedSample], grader: Grader, num_threads: int
) -> Generator[dict[str, Any]]:
    """Yield the row of each sample for `grades.jsonl`, in the order of the samples."""

    def verdict(graded: GradedSample) -> dict[str, Any]:
        question, index = graded.key
        answer = grader.extract(graded.sample.text, graded.sample.state)
        correct = grader.correct(graded.gold, answer)
        return {"question": question, "index": index, "answer": answer, "correct": correct}

    pool = ThreadPoolExecutor(num_threads)
    try:
        for verdict_of_one in [pool.submit(verdict, sample) for sample in samples]:
            while not wait([verdict_of_one], TURN_S).done:
                pass
            yield verdict_of_one.result()
    finally:
        # No waiting: after an interruption, these threads end when the checker is closed.
        pool.shutdown(wait=False, cancel_futures=True)
