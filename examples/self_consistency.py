"""Self-consistency in SGLang's language: `python examples/self_consistency.py [QUESTION] [URL]`.

An `@sgl.function` asks a running server for several chains of thought, which vote.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="What is 17 * 23?")
parser.add_argument("url", nargs="?", default=os.environ.get("LIM_URL") or "http://127.0.0.1:30000")
if __name__ == "__main__":
    asked = parser.parse_args()
    print(f"asking {asked.url} for 4 samples: {asked.question}", flush=True)

import sys
from collections import Counter
from typing import Any

from lim_sglang import extract_answer

# As `import sglang as sgl`, without the 20 s that SGLang's server takes to import.
from lim_sglang.frontend import sgl

MAX_TOKENS = 256


@sgl.function
def self_consistency(s: Any, question: str, num_samples: int) -> Counter[str]:
    s += sgl.user(f"{question}\nReason step by step, and put the answer within \\boxed{{}}.")
    forks = s.fork(num_samples)
    forks += sgl.assistant(sgl.gen("solution", max_tokens=MAX_TOKENS, temperature=0.6))
    return Counter(answer_or_reason(fork) for fork in forks)


def answer_or_reason(fork: Any) -> str:
    answer = extract_answer(fork["solution"])
    if answer is not None:
        return answer
    ended = fork.get_meta_info("solution")["finish_reason"]["type"]
    if ended == "length":
        return f"no answer, cut off after {MAX_TOKENS} tokens"
    return "no answer in a form that is read, such as \\boxed{391}"


def main(question: str, url: str) -> None:
    try:
        sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    except OSError as error:
        sys.exit(f"error: no server answers at {url} ({error}): start one with `lim serve`")
    votes = self_consistency.run(question, num_samples=4).ret_value
    for answer, count in votes.most_common():
        print(f"{count} of 4: {answer}")


if __name__ == "__main__":
    main(asked.question, asked.url)
