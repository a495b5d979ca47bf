"""Score a running server on questions of one's own: `python examples/own_task.py FOLDER [URL]`.

A task is a file of JSON lines with `problem` and `answer`, which is written to FOLDER, beside the
run. The same command resumes a run.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder")
parser.add_argument("url", nargs="?", default=os.environ.get("LIM_URL") or "http://127.0.0.1:30000")
if __name__ == "__main__":
    asked = parser.parse_args()
    print(f"asking {asked.url} for 2 samples of each of 4 questions", flush=True)

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


def main(folder: str, url: str) -> int:
    file = Path(folder) / "sums.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in sums(count=4, digits=3)))
    command = [sys.executable, "-m", "lim_sglang", "eval", f"file:{file}"]
    options = ["--samples", "2", "--url", url, "--out", str(Path(folder) / "run")]
    return subprocess.run([*command, *options]).returncode


if __name__ == "__main__":
    sys.exit(main(asked.folder, asked.url))
