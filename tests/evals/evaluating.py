"""`lim eval` on made-up questions and on servers whose answers are known in advance."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from lim_sglang.evals.tasks import TASKS
from tests.fakes.sglang_server import Chain, FakeServer, words
from tests.forked_commands import Forker

NUM_TOKENS = 7
SEED = "100"


def write_questions(folder: Path, count: int, name: str = "sums") -> Path:
    """A file of sums, whose first number is the question's id."""
    rows = [{"id": n, "problem": f"What is {n} + 1?", "answer": n + 1} for n in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def asked(body: Mapping[str, Any]) -> int:
    """The question of a request, by its id."""
    return int(body["messages"][-1]["content"].split("What is ")[1].split()[0])


def said(body: Mapping[str, Any]) -> str:
    """A text that only question and seed decide on; an eighth of the answers are wrong."""
    question, seed = asked(body), body.get("seed")
    digest = hashlib.sha256(f"{question}/{seed}".encode()).digest()
    return f"so \\boxed{{{question + 1 + (digest[0] % 8 == 0)}}}"


def answering(pace_s: float = 0.0) -> Any:
    """An answerer that says it token by token."""
    return lambda body: Chain(words(said(body), NUM_TOKENS), pace_s=pace_s)


def words_for(questions: Path, out: Path, *servers: FakeServer, samples: int = 4) -> list[str]:
    """The words of the command that is given again and again.

    Args:
        questions: a file that is called like a task takes the place of its questions.
    """
    own = questions.stem not in TASKS
    task = [f"file:{questions}"] if own else [questions.stem, "--data-dir", str(questions.parent)]
    urls = [word for server in servers for word in ("--url", server.url)]
    how = ["--samples", str(samples), "--seed", SEED, "--out", str(out)]
    return ["eval", *task, *how, *urls]


def rows(out: Path) -> list[dict[str, Any]]:
    """All whole lines of a run."""
    lines = (out / "samples.jsonl").read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def keys(out: Path) -> list[tuple[str, int]]:
    """Question and sample of each line, in the order of the file."""
    return [(row["question"], row["index"]) for row in rows(out)]


def comparable(out: Path) -> list[dict[str, Any]]:
    """The lines without what is new at each draw, in an order that is always the same."""
    new = ("latency_s", "rid")
    found = [{k: v for k, v in row.items() if k not in new} for row in rows(out)]
    return sorted(found, key=lambda row: (int(row["question"]), row["index"]))


@dataclass(frozen=True)
class Done:
    """A command that has come to its end."""

    code: int
    output: str
    error: str


def run(forker: Forker, folder: Path, *words: str) -> Done:
    """A command from its beginning to its end."""
    command = forker.start(Path(mkdtemp(dir=folder)), *words)
    code = command.wait()
    return Done(code, command.output, command.error)
