"""Self-consistency in SGLang's own language: `python examples/self_consistency.py QUESTION [URL]`.

An `@sgl.function` asks a running server for several chains of thought, which vote.
"""

import sys
from collections import Counter
from typing import Any

from lim_sglang import extract_answer

# As `import sglang as sgl`, without the 20 s that SGLang's server takes to import.
from lim_sglang.frontend import sgl


@sgl.function
def self_consistency(s: Any, question: str, num_samples: int) -> Counter[str]:
    s += sgl.user(f"{question}\nReason step by step, and put the answer within \\boxed{{}}.")
    forks = s.fork(num_samples)
    forks += sgl.assistant(sgl.gen("solution", max_tokens=256, temperature=0.6))
    answers = [extract_answer(fork["solution"]) for fork in forks]
    return Counter(answer for answer in answers if answer is not None)


def main(question: str, url: str = "http://127.0.0.1:30000") -> None:
    sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    votes = self_consistency.run(question, num_samples=4).ret_value
    for answer, count in votes.most_common():
        print(f"{count} of 4: {answer}")
    if missing := 4 - votes.total():
        print(f"{missing} of 4: no answer")


if __name__ == "__main__":
    main(*sys.argv[1:])
