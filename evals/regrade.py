"""Grading as a step of its own: the verdicts of a run anew, from the texts of its samples."""

import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lim_sglang.evals.grading import GRADING_VERSION, Grader
from lim_sglang.evals.run_store import GRADES_FILE, GradedSample, load_run, write_whole
from lim_sglang.programs.answers import extract_answer
from lim_sglang.programs.schema import COMPLETED_STATES


@dataclass(frozen=True)
class Regraded:
    """What became of a run's verdicts."""

    num_samples: int
    """Those that count: they ended by themselves or at their limit."""
    num_changed: int
    """Verdicts that are other than before."""
    num_right: int


def grade_run(
    path: Path,
    grader: Grader,
    *,
    num_threads: int,
    on_graded: Callable[[int], object] = lambda _: None,
) -> Regraded:
    """Extract the answer of each sample again, grade it, and write `grades.jsonl`, which
    `load_run` prefers to the verdicts in `samples.jsonl`. Doing it again gives the same file.

    Args:
        num_threads: verdicts at a time; as many as the grader's judge has workers.
        on_graded: told how many are done.

    Raises:
        DataError: there is no run, a line of it is damaged, or the disk refuses.
    """
    samples = load_run(path).samples
    by = f"math-verify {metadata.version('math-verify')}, grading {GRADING_VERSION}"
    rows = []
    with closing(_verdicts(samples, grader, num_threads)) as verdicts:
        for row in verdicts:
            rows.append({**row, "by": by})
            on_graded(len(rows))
    write_whole(path / GRADES_FILE, "".join(f"{json.dumps(row)}\n" for row in rows))
    # What was aborted is neither right nor wrong.
    counted = [
        (graded.correct, row["correct"])
        for graded, row in zip(samples, rows, strict=True)
        if graded.sample.state in COMPLETED_STATES
    ]
    return Regraded(
        num_samples=len(counted),
        num_changed=sum(before != now for before, now in counted),
        num_right=sum(now for _, now in counted),
    )


def _verdicts(
    samples: Sequence[GradedSample], grader: Grader, num_threads: int
) -> Generator[dict[str, Any]]:
    """The verdict of each sample, in their order."""

    def verdict(graded: GradedSample) -> dict[str, Any]:
        question, index = graded.key
        answer = extract_answer(graded.sample.text)
        correct = grader.correct(graded.gold, answer)
        return {"question": question, "index": index, "answer": answer, "correct": correct}

    pool = ThreadPoolExecutor(num_threads)
    try:
        yield from pool.map(verdict, samples)
    finally:
        # Not waited for: where this ends early, the judge's end is that of the threads.
        pool.shutdown(wait=False, cancel_futures=True)
