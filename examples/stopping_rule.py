"""An own stopping rule: `python examples/stopping_rule.py QUESTION [URL]`.

A rule is a pure function of the samples that have ended. Once it is settled, the server aborts the
samples in flight.
"""

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
    add_messages(s, run.question.messages)
    run.sample(s, indices, LeadRule(lead))


LEAD = Program(
    "lead",
    samples=16,
    stops_when="the first answer is far enough ahead of the second",
    source="this file",
    parallel=4,
    options={"lead": 3},
    own_function=lead,
)


def main(question: str, url: str = "http://127.0.0.1:30000") -> None:
    vote = lim_sglang.ask(question, program=LEAD, samples=16, url=url, options={"lead": 2})
    print(f"{vote.answer}, {vote.margin} votes ahead, {len(vote.samples)} of 16 samples begun")


if __name__ == "__main__":
    main(*sys.argv[1:])
