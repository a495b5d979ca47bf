"""Settings of two runs, compared: each difference in words, with the option that makes it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lim_sglang.errors import DataError, bullets
from lim_sglang.evals.tasks import Question, questions_digest, selection_digest
from lim_sglang.markdown_section import counted, places
from lim_sglang.programs.schema import Sampling

OPTIONS = {
    "num_samples": "--samples",
    "program.name": "--program",
    "questions.asked": "--limit",
    "questions.length": "--length",
    "questions.seed": "--question-seed",
    "system": "--system",
    "thinking.budget": "--thinking-budget",
    "thinking.enabled": "--thinking",
    "lim.config.budget": "--budget",
    "lim.config.policy": "--policy",
    **{f"sampling.{name}": f"--{name.replace('_', '-')}" for name in Sampling.__dataclass_fields__},
}
"""Options of `lim eval` that set what the settings of a run name."""


class Difference(NamedTuple):
    """A setting with two values."""

    name: str
    old: object
    new: object

    def __str__(self) -> str:
        option = f" ({OPTIONS[self.name]})" if self.name in OPTIONS else ""
        return f"{self.name}{option} was {json.dumps(self.old)} and is now {json.dumps(self.new)}"


def differences(old: object, new: object, name: str = "") -> Iterator[Difference]:
    """Yield the values in which two settings differ, however deeply they are nested."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield Difference(name, old, new)


DIGESTS = ("questions.digest", "questions.asked_digest", "questions.revision")
"""Settings by which other questions are noticed."""


def check_settings(
    path: Path,
    stored: Mapping[str, Any],
    settings: Mapping[str, Any],
    questions: Sequence[Question] = (),
    read_stored: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Refuse to mix samples of two settings.

    Args:
        questions: of the run with these settings; empty: those that have changed are not named.
        read_stored: reads the `AskedQuestion`s that the run in `path` has stored, by id.

    Raises:
        DataError: the stored settings of the run in `path` differ; each difference is named.
    """
    # Through JSON, so that a tuple equals the list that is stored in its place.
    found = list(differences(stored, json.loads(json.dumps(settings))))
    if not found:
        return
    names = {each.name for each in found}
    unsaid, changed = {*DIGESTS}, ""
    if questions and {"questions.asked", "questions.digest"} <= names:
        old, new = stored["questions"], settings["questions"]
        before = _asked_before(old, read_stored(), questions)
        # An option limits the smaller number, unless its file has no more.
        fewer, its = (questions, new) if new["asked"] < old["asked"] else (before, old)
        has_limit = fewer is not None and questions_digest(fewer) != its["digest"]
        changed = _changed_file(before, old["asked"], questions, has_limit=has_limit)
        unsaid |= set() if has_limit else {"questions.asked"}
    elif "questions.digest" in names and "questions.asked_digest" not in names:
        changed = f"the file of questions has changed behind the first {len(questions):,}"
    elif names & {*DIGESTS}:
        changed = _changed_questions(read_stored(), questions, "questions.asked" in names)
    told: list[object] = [each for each in found if each.name not in unsaid]
    advice = "use the old settings, or name another folder with --out"
    if changed:
        told.append(changed)
        advice += (
            "; samples keep the questions and reference answers with which they were made, so that "
            "changed ones need a new run"
        )
    raise DataError(f"the run in {path} was made with other settings:{bullets(told)}\n{advice}")


def _asked_before(
    old: Mapping[str, Any], stored: Mapping[str, Any], questions: Sequence[Question]
) -> Sequence[Question] | None:
    """Return the questions that a stored run asked; None where it has not stored their texts.

    Args:
        old: the run's settings of its questions.
        stored: its `AskedQuestion`s.
        questions: that are asked now, perhaps the same ones and others.
    """
    first = questions[: old["asked"]]
    if selection_digest(first) == old["asked_digest"]:
        return first
    if len(stored) < old["asked"] or any(each.text is None for each in stored.values()):
        return None
    return [Question(name, each.text, each.gold) for name, each in stored.items()]


def _changed_file(
    before: Sequence[Question] | None,
    num_before: int,
    questions: Sequence[Question],
    *,
    has_limit: bool,
) -> str:
    """Return how a file of questions has changed, of which a run asks more or fewer than before.

    Args:
        before: questions that were asked; None: not known.
        has_limit: `--limit` has changed, too.
    """
    if has_limit and before is None:
        return "the file of questions has changed"
    if has_limit and all(map(_is_same, before or (), questions)):
        count = min(num_before, len(questions))
        return f"the file of questions has changed behind the first {count:,}"
    parts = [f"{counted(num_before, 'question')}, now {len(questions):,}"]
    if before is not None:
        left = Counter((each.text, each.gold) for each in before)
        added = []
        for each in questions:
            if left[each.text, each.gold]:
                left[each.text, each.gold] -= 1
            else:
                added.append(each.location)
        parts += [f"new in {places(added)}"] if added else []
        parts += [f"{left.total():,} gone"] if left.total() else []
    return f"the questions have changed: {'; '.join(parts)}"


def _is_same(question: Question, other: Question) -> bool:
    """Return True if two questions are equal but for solved ones before them."""
    names = "question_id", "text", "gold"
    return all(getattr(question, name) == getattr(other, name) for name in names)


def _changed_questions(
    stored: Mapping[str, Any], questions: Sequence[Question], counts_differ: bool
) -> str:
    """Return which questions differ from the stored ones; empty where only their number does.

    Args:
        counts_differ: the numbers differ, so that questions which are new, or gone, are no news.
    """
    changed = [
        each.location
        for each in questions
        if (old := stored.get(each.question_id))
        and (old.gold != each.gold or old.text not in (None, each.text))
    ]
    if changed:
        are_same = all(
            stored[each.question_id].text == each.text
            for each in questions
            if each.question_id in stored
        )
        what = "reference answers" if are_same else "questions"
        return f"the {what} have changed: {places(changed)}"
    return "" if counts_differ else "the questions have changed, or their ids or their order"
