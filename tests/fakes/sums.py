"""Sums as questions, a fake server's answers to them, and `lim eval` commands that ask them."""

import hashlib
import io
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lim_sglang.cli import main
from lim_sglang.evals.tasks import TASKS
from tests.fakes.sglang_server import Chain, FakeServer, words

NUM_TOKENS = 7
SEED = "100"
INTEGERS = "aime24"
"""Task whose answers are compared without math-verify, which takes seconds to start."""


def write_sums(folder: Path, count: int, name: str = INTEGERS) -> Path:
    """Write a file of sums; the first number of each is the question's id."""
    rows = [{"id": n, "problem": f"What is {n} + 1?", "answer": n + 1} for n in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def asked(body: Mapping[str, Any]) -> int:
    """Return the id of the question in a request."""
    return int(body["messages"][-1]["content"].split("What is ")[1].split()[0])


def said(body: Mapping[str, Any]) -> str:
    """Return a text that follows from question and seed; an eighth of the answers are wrong."""
    question, seed = asked(body), body.get("seed")
    digest = hashlib.sha256(f"{question}/{seed}".encode()).digest()
    return f"so \\boxed{{{question + 1 + (digest[0] % 8 == 0)}}}"


def answering(pace_s: float = 0.0) -> Any:
    """Return an answerer that says `said` token by token."""
    return lambda body: Chain(words(said(body), NUM_TOKENS), pace_s=pace_s)


def eval_words(questions: Path, out: Path, *servers: FakeServer, samples: int = 4) -> list[str]:
    """Return the words of a `lim eval` command.

    Args:
        questions: a file that is called like a task takes the place of the task's questions.
    """
    is_own = questions.stem not in TASKS
    named = [questions.stem, "--data-dir", str(questions.parent)]
    task = [f"file:{questions}"] if is_own else named
    urls = [word for server in servers for word in ("--url", server.url)]
    how = ["--samples", str(samples), "--seed", SEED, "--out", str(out)]
    return ["eval", *task, *how, *urls]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    output: str
    error: str


def lim(*words: str) -> Done:
    """Run a `lim` command in this process."""
    output, error, code = io.StringIO(), io.StringIO(), 0
    with (
        redirect_stdout(output),
        redirect_stderr(error),
        patch.object(sys, "argv", ["lim", *words]),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Done(code, output.getvalue(), error.getvalue())


def rows(out: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a run."""
    lines = (out / "samples.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def keys(out: Path) -> list[tuple[str, int]]:
    """Return question and index of each line, in the order of the file."""
    return [(row["question"], row["index"]) for row in rows(out)]


def comparable(out: Path) -> list[dict[str, Any]]:
    """Return the lines without what differs between two runs, sorted."""
    new = ("latency_s", "rid")
    found = [{k: v for k, v in row.items() if k not in new} for row in rows(out)]
    return sorted(found, key=lambda row: (int(row["question"]), row["index"]))


def run_record(out: Path) -> dict[str, Any]:
    """Return the content of `run.json`."""
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    return record
