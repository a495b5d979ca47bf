"""One question and all that came of it, as one JSON record."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from lim_sglang.provenance import project_commit

if TYPE_CHECKING:
    from lim_sglang.programs.drawing import SamplingRequest
    from lim_sglang.programs.program import Outcome, Program


def ask_record(
    question: str,
    program: "Program",
    options: Mapping[str, Any],
    asked: "SamplingRequest",
    outcome: "Outcome",
) -> dict[str, Any]:
    """What `lim ask --json` prints, but for what the server says of itself."""
    return {
        "question": question,
        **outcome_record(outcome),
        "program": program.name,
        "options": {**program.options, **options},
        "messages": list(asked.messages),
        "parallel": asked.parallel,
        "sampling": asdict(asked.sampling),
        "samples": [asdict(sample) for sample in outcome.samples],
        "commit": project_commit(),
        "asked": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def outcome_record(outcome: "Outcome") -> dict[str, Any]:
    """The vote and what it cost."""
    vote = outcome.vote
    return {
        "answer": vote.winner,
        "votes": [
            {"answer": group.answer, "votes": group.votes, "weight": group.weight}
            for group in vote.groups
        ],
        "margin": vote.margin,
        "without_vote": {
            "unanswered": vote.unanswered,
            "truncated": vote.truncated,
            "failed": vote.failed,
            "aborted": vote.aborted,
        },
        "samples_asked": outcome.num_asked,
        "settled_early": outcome.settled,
        "tokens_spent": outcome.spent_tokens,
        "tokens_spent_at_least": outcome.spent_at_least,
        "tokens_saved_estimate": outcome.saved_tokens,
        "seconds": round(outcome.elapsed_s, 3),
    }
