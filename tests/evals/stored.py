"""Samples as a run stores them, and a disk that is soon full."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from lim_sglang.evals.run_store import GradedSample, RunFolder, RunRecord, open_run
from lim_sglang.programs.schema import Sample, SampleState

SETTINGS: dict[str, Any] = {
    "task": "math500",
    "lim": {"config": {"policy": "lessismore", "budget": 256, "dense_layers": (0, 1)}},
}


def graded(index: int = 0, question_id: str = "q", **changes: Any) -> GradedSample:
    """A finished sample with answer 4."""
    values = {
        "index": index,
        "state": SampleState.FINISHED,
        "text": "so \\boxed{4}\n\u2028 ½",
        "answer": "4",
        "num_tokens": 12,
        "latency_s": 0.5,
        "seed": None,
        "seed_honoured": False,
        "rid": f"q/{index:03}.",
    }
    sample = Sample(**{**values, **changes})
    return GradedSample(question_id, gold="4", correct=sample.answer == "4", sample=sample)


def question(question_id: str, of: int = 3) -> list[GradedSample]:
    """The samples of a question that are written at once, the last of them too late to vote."""
    return [replace(graded(index, question_id), of=of, late=index == of - 1) for index in range(of)]


def begin(path: Path, settings: dict[str, Any] = SETTINGS) -> RunFolder:
    return open_run(path, RunRecord("math500-x", settings, {"url": "http://here"}))


def write_a_little(descriptor: int, data: memoryview, write: Any = os.write) -> int:
    """A disk that is soon full."""
    if len(data) < 100:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, data[:50])
