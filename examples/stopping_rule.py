"""An own stopping rule: `python examples/stopping_rule.py [QUESTION] [URL]`.

A rule is a pure function of the samples that have ended. Once it is settled, the server aborts the
samples in flight.
"""

import argparse
import os

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("question", nargs="?", default="What is 17 * 23?")
parser.add_argument("url", nargs="?", default=os.environ.get("LIM_URL") or "http://127.0.0.1:30000")
if __name__ == "__main__":
    asked = parser.parse_args()
    print(f"asking {asked.url} for at most 4 samples: {asked.question}", flush=True)

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lim_sglang
from lim_sglang.frontend import sgl
from lim_sglang.programs.program import Program
from lim_sglang.programs.sampler import SamplingRun, add_messages
from lim_sglang.programs.schema import Sample
from lim_sglang.programs.vote import Equivalent, tally


@dataclass(frozen=True)
class LeadRule:
    """Stop once the first answer is `lead` votes ahead of the second."""

    lead: int
    looks_at_tokens = False

    def is_settled(
        self, ended: Sequence[Sample], spent_tokens: int, equivalent: Equivalent
    ) -> bool:
        return tally(ended, equivalent).margin >= self.lead


@sgl.function
def lead(s: Any, run: SamplingRun, indices: Sequence[int], lead: int) -> None:
    print("a line as each ends: after seconds on a GPU, minutes on a CPU", flush=True)
    add_messages(s, run.question.messages)
    run.sample(s, indices, LeadRule(lead))


LEAD = Program(
    "lead",
    samples=4,
    stops_when="the first answer is far enough ahead of the second",
    source="this file",
    parallel=2,
    options={"lead": 3},
    own_function=lead,
)


def show(sample: Sample) -> None:
    answer = "no answer" if sample.answer is None else sample.answer
    number = sample.index + 1  # people count from 1
    print(f"sample {number}: {answer}, {sample.state}, {sample.num_tokens} tokens", flush=True)


def main(question: str, url: str) -> None:
    try:
        vote = lim_sglang.ask(
            question, program=LEAD, samples=4, url=url, options={"lead": 2}, on_sample=show
        )
    except lim_sglang.LimError as error:
        sys.exit(f"error: {error}")
    answer = "no answer" if vote.answer is None else vote.answer
    ahead = f"{vote.margin} vote{'' if vote.margin == 1 else 's'} ahead"
    print(f"{answer}, {ahead}, {len(vote.samples)} of 4 samples begun")


if __name__ == "__main__":
    main(asked.question, asked.url)
