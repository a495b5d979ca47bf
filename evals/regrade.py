"""Grading as a step of its own: the verdicts of a run anew, from the texts of its samples."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lim_sglang.evals.grade import Grader
from lim_sglang.evals.lines import write_whole
from lim_sglang.evals.records import GradedSample
from lim_sglang.evals.runs import GRADES_FILE, load_run
from lim_sglang.evals.settings import grading_digest
from lim_sglang.programs.answers import extract_answer


@dataclass(frozen=True)
class Regraded:
    """What became of a run's verdicts."""

    num_samples: int
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
    run = load_run(path)
    by = f"math-verify {metadata.version('math-verify')}, grading {grading_digest()[:10]}"

    def verdict(graded: GradedSample) -> dict[str, object]:
        answer = extract_answer(graded.sample.text)
        correct = grader.correct(graded.gold, answer)
        question, index = graded.key
        return {
            "question": question,
            "index": index,
            "answer": answer,
            "correct": correct,
            "by": by,
        }

    rows = []
    with ThreadPoolExecutor(num_threads) as pool:
        for row in pool.map(verdict, run.samples):
            rows.append(row)
            on_graded(len(rows))
    before = [graded.correct for graded in run.samples]
    after = [row["correct"] for row in rows]
    write_whole(path / GRADES_FILE, "".join(f"{json.dumps(row)}\n" for row in rows))
    return Regraded(
        num_samples=len(rows),
        num_changed=sum(old != new for old, new in zip(before, after, strict=True)),
        num_right=sum(map(bool, after)),
    )
