"""Records of `lim trace`: a file of JSON lines, the conditions first, then a line a question."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lim_sglang.errors import DataError
from lim_sglang.gates.training import disk_errors

FILE = "trace.jsonl"
VOLATILE = ("date", "commit", "driver", "cuda")
"""Conditions in which the runs that complete one trace may differ."""


@dataclass(frozen=True)
class LayerRecord:
    """Measures of one layer in one decode step, in which the request is over the budget.

    Shares are between 0 and 1, by the policy's name in the conditions. A policy is missing where a
    measure has no meaning: recall in a layer that reads everything, changes in one that selects
    nothing.
    """

    step: int
    """Decode step of the request, from 1: the step reads the answer's first token."""
    length: int
    """Tokens of the request, the step's included."""
    layer: int
    recall: Mapping[str, float]
    """Share of the attention mass of all tokens that is in the set, mean over the query heads."""
    from_step: Mapping[str, float]
    """Share of the set that the layer's set of the step before holds."""
    from_layer: Mapping[str, float]
    """Share of the set that the set of the next lower layer that selects holds."""
    jaccard: float | None
    """Jaccard index of the heads' own top-k sets with sinks and newest tokens, mean over pairs."""
    jaccard_ranked: float | None
    """The same without sinks and newest tokens."""
    ranks_deep: int
    """Best tokens of each head that LessIsMore's union of this layer looks at."""


@dataclass(frozen=True)
class QuestionTrace:
    """Trace of one question's greedy answer."""

    question: str
    """The question's id."""
    prompt_tokens: int
    new_tokens: int
    cut_off: bool
    """True if the answer reached the limit of new tokens."""
    text: str
    """The answer."""
    layers: tuple[LayerRecord, ...]


_QUESTION = TypeAdapter(QuestionTrace)


@dataclass(frozen=True)
class Trace:
    """Traces of questions under the same conditions."""

    conditions: Mapping[str, Any]
    questions: tuple[QuestionTrace, ...]


def begin_trace(folder: Path, conditions: Mapping[str, Any]) -> Trace:
    """Make the folder of a trace, or read what an interrupted run has completed. A trace without a
    question is begun anew.

    Raises:
        DataError: the folder holds a trace of other conditions, the file is no trace, or cannot be
            written.
    """
    path, begun = folder / FILE, Trace(conditions, ())
    if path.exists() and not _is_cut_off_in_first_line(path):
        begun = read_trace(path)
    if not begun.questions:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"conditions": conditions}) + "\n")
        return Trace(conditions, ())
    old, new = begun.conditions, json.loads(json.dumps(conditions))
    if differ := [n for n in {**old, **new} if n not in VOLATILE and old.get(n) != new.get(n)]:
        raise DataError(
            f"{folder} holds a trace of other settings ({', '.join(differ)}): name another folder "
            "by --out, or repeat the command of that trace"
        )
    whole, _, cut_off = path.read_text().rpartition("\n")
    if cut_off:  # further lines follow
        with disk_errors(folder):
            path.write_text(f"{whole}\n")
    return begun


def _is_cut_off_in_first_line(path: Path) -> bool:
    """Return True for an empty file, and for the beginning of the conditions alone."""
    with suppress(OSError, UnicodeDecodeError):  # `read_trace` says what is wrong
        text, begin = path.read_text(), '{"conditions": '
        return "\n" not in text and text[: len(begin)] == begin[: len(text)]
    return False


def add_question(folder: Path, trace: QuestionTrace) -> None:
    """Add the line of a question; raises `DataError` if the disk does not take it."""
    with disk_errors(folder), (folder / FILE).open("a") as file:
        file.write(json.dumps(asdict(trace)) + "\n")


def read_trace(path: Path) -> Trace:
    """Read a trace, but for a last line that was cut off.

    Raises:
        DataError: the file cannot be read, or is no trace.
    """
    try:
        first, *lines = path.read_text().rpartition("\n")[0].splitlines()
        conditions = json.loads(first)["conditions"]
        questions = tuple(map(_QUESTION.validate_json, lines))
        for name, count in Counter(each.question for each in questions).items():
            if count > 1:
                raise ValueError(f"it has question {name} {count} times")
        return Trace(conditions, questions)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path} is no trace of `lim trace` ({reason}): name another --out, or remove it"
        ) from None
