"""Score a running server on questions of one's own: `python examples/own_task.py FOLDER [URL]`.

A task is a file of JSON lines with `problem` and `answer`. The same command resumes a run.
"""

import json
import random
import subprocess
import sys
from pathlib import Path


def sums(count: int, digits: int) -> list[dict[str, str]]:
    """Return questions whose difficulty is a dial: sums of numbers with more and more digits."""
    numbers = random.Random(digits)
    pairs = [
        [numbers.randrange(10 ** (digits - 1), 10**digits) for _ in "ab"] for _ in range(count)
    ]
    return [{"problem": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in pairs]


def main(folder: str, url: str = "http://127.0.0.1:30000") -> None:
    file = Path(folder) / "sums.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in sums(count=4, digits=3)))
    command = [sys.executable, "-m", "lim_sglang", "eval", f"file:{file}"]
    options = ["--samples", "2", "--url", url, "--out", str(Path(folder) / "run")]
    subprocess.run([*command, *options], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
