"""Settings of two runs, compared: each difference in words, with the option that makes it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lim_sglang.errors import DataError, bullets
from lim_sglang.markdown_section import counted, places
from lim_sglang.programs.schema import Sampling

if TYPE_CHECKING:
    from lim_sglang.evals.tasks import Question

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
    stored: object,
    settings: object,
    questions: Sequence["Question"] = (),
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
    is_other_file = {"questions.asked", "questions.digest"} <= names
    unsaid = (*DIGESTS, "questions.asked") if is_other_file else DIGESTS
    told: list[object] = [each for each in found if each.name not in unsaid]
    advice = "use the old settings, or name another folder with --out"
    changed = ""
    if is_other_file:
        changed = _added_and_gone(read_stored(), questions)
    elif names & {*DIGESTS}:
        changed = _changed_questions(read_stored(), questions, "questions.asked" in names)
    if changed:
        told.append(f"the questions have changed{changed}")
        advice += (
            "; samples keep the questions and reference answers with which they were made, so that "
            "changed ones need a new run"
        )
    raise DataError(f"the run in {path} was made with other settings:{bullets(told)}\n{advice}")


def _added_and_gone(stored: Mapping[str, Any], questions: Sequence["Question"]) -> str:
    """Return which questions a file has more or fewer than the stored ones, as the rest of a
    sentence."""
    before = {(each.text, each.gold) for each in stored.values()}
    now = {(each.text, each.gold) for each in questions}
    added = [each.location for each in questions if (each.text, each.gold) not in before]
    gone = len(before - now)
    parts = [f"{counted(len(stored), 'question')}, now {len(questions):,}"]
    parts += [f"new in {places(added)}"] if added else []
    parts += [f"{gone:,} gone"] if gone else []
    return f": {'; '.join(parts)}"


def _changed_questions(
    stored: Mapping[str, Any], questions: Sequence["Question"], counts_differ: bool
) -> str:
    """Return which questions differ from the stored ones, as the rest of a sentence;
    empty where only their number does.

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
        return f": {places(changed)}"
    return "" if counts_differ else ", or their ids or their order"
