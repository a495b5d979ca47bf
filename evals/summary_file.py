"""A summary as a file: JSON with a line a question; and runs' folders summarised."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lim_sglang.errors import DataError
from lim_sglang.evals.lines import write_whole
from lim_sglang.evals.summary import QuestionResult, Summary, summarise

if TYPE_CHECKING:
    from lim_sglang.programs.judge import EquivalenceChecker

FORMAT = 1
EXPECTED = "expected a run's folder, or a file that lim report --summaries wrote"


def write_summary(summary: Summary, path: Path) -> None:
    """Write it as JSON with a line a question, so that two can be compared line by line.

    Raises:
        DataError: the file cannot be written.
    """
    head = {
        "format": FORMAT,
        "run_id": summary.run_id,
        "conditions": summary.conditions,
        "num_failed": summary.num_failed,
    }
    rows = ",\n".join(f"  {json.dumps(question.to_row())}" for question in summary.questions)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "questions": [\n{rows}\n ]\n}}\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); name another file") from None
    write_whole(path, text)


def read_summary(path: Path) -> Summary:
    """Read what `write_summary` wrote.

    Raises:
        DataError: it is none, or one of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); {EXPECTED}") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); {EXPECTED}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise DataError(f"{path} is no summary of a run; {EXPECTED}")
    if content["format"] != FORMAT:
        raise DataError(
            f"{path} is of format {content['format']}, expected {FORMAT}: write it again with "
            "lim report --summaries from its run"
        )
    try:
        questions = tuple(map(QuestionResult.from_row, content["questions"]))
        if len({question.question_id for question in questions}) != len(questions):
            raise ValueError("a question is there twice")
        return Summary(
            content["run_id"], dict(content["conditions"]), questions, content["num_failed"]
        )
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is a damaged summary: {reason}; {EXPECTED}") from None


def load_summaries(paths: Sequence[Path]) -> list[Summary]:
    """Of runs' folders, whose votes are counted anew, and of summaries' files.

    Raises:
        DataError: a path is neither, or a run has no sample.
    """
    from lim_sglang.programs.judge import EquivalenceChecker

    # One for all: it remembers verdicts, and takes seconds to start.
    with EquivalenceChecker() as checker:
        return [_of_run(path, checker) if path.is_dir() else read_summary(path) for path in paths]


def _of_run(path: Path, checker: "EquivalenceChecker") -> Summary:
    from lim_sglang.evals.grade import Grader
    from lim_sglang.evals.runs import load_run
    from lim_sglang.evals.tasks import find_task

    run = load_run(path)
    if not run.samples:
        raise DataError(f"{path} has no sample yet; run lim eval until it has")
    grader = Grader(find_task(run.record.settings["task"]).answer_kind, checker)
    return summarise(run.record, run.samples, grader.equivalent, len(run.failures))
