"""Pairs of the same question in two runs, and the questions that either run lacks. Pure."""

import re
from collections.abc import Collection, Sequence

from lim_sglang.errors import DataError
from lim_sglang.evals.metrics import QuestionResult, Summary
from lim_sglang.evals.tasks import Origin
from lim_sglang.markdown_section import counted, join_words

MAX_NAMES_SHOWN = 3
COMMON = "compare the questions of both by lim compare --common"
Pairs = Sequence[tuple[QuestionResult, QuestionResult]]
"""The same question in both runs."""


def paired_questions(a: Summary, b: Summary, *, common: bool) -> Pairs:
    """Return the questions that have samples in both runs, in a's order.

    Runs that were asked different selections are paired by what they ask, whatever the ids.
    """
    if a.conditions["task"] != b.conditions["task"]:
        raise DataError(
            f"{a.label} has task {a.conditions['task']} and {b.label} has task "
            f"{b.conditions['task']}: compare runs of one task"
        )
    is_same = ask_the_same(a, b)
    by_content = not is_same and _has_texts(a) and _has_texts(b)
    if not (is_same or by_content or _differ_in_limit(a, b)):
        raise DataError(_why_unpaired(a, b))
    partners = _partners_by_content(a, b) if by_content else _partners_by_id(a, b)
    pairs = [(x, partners[x.question_id]) for x in a.questions if x.question_id in partners]
    if (gaps := unpaired(a, b, pairs)) and not common:
        ways = [*(_how_to_complete(a, b) if is_same else []), COMMON]
        raise DataError(
            f"{a.label} and {b.label} have different questions ({'; '.join(gaps)}); "
            f"{', or '.join(ways)}"
        )
    return pairs


def ask_the_same(a: Summary, b: Summary) -> bool:
    """Return True if two runs were asked the same selection of questions."""
    same: bool = a.conditions.get("questions") == b.conditions.get("questions")
    return same


def unpaired(a: Summary, b: Summary, pairs: Pairs) -> list[str]:
    """Return in words which questions of two runs have no partner, given those that are paired.

    Questions of both runs with one id count as one question that was edited.
    """
    taken_a, taken_b = ({pair[n].question_id for pair in pairs} for n in (0, 1))
    left_a = {each.question_id: each for each in a.questions if each.question_id not in taken_a}
    left_b = {each.question_id: each for each in b.questions if each.question_id not in taken_b}
    edited = left_a.keys() & left_b.keys()
    texts = {name for name in edited if left_a[name].text_digest != left_b[name].text_digest}
    num_all = len(pairs) + len(left_a) + len(left_b) - len(edited)
    of_a, of_b = ("", "") if ask_the_same(a, b) else (f" of {a.label}", f" of {b.label}")
    found = (
        (f"{a.label} lacks", left_b.keys() - edited, of_b),
        (f"{b.label} lacks", left_a.keys() - edited, of_a),
        ("the texts differ in", texts, ""),
        ("the references differ in", edited - texts, ""),
    )
    return [
        f"{what} {len(names):,} of {counted(num_all, 'question')}, with {_ids(names)}{of_run}"
        for what, names, of_run in found
        if names
    ]


def _has_texts(run: Summary) -> bool:
    """Return True if a summary tells the questions of the run by their texts."""
    return all(question.text_digest for question in run.questions)


def _differ_in_limit(a: Summary, b: Summary) -> bool:
    """Return True if one run was asked the first questions of the other, so that ids name them.

    Digests of a file do not depend on the order of its rows. The order is known of published
    questions; the rows of another file may be in another one, which changes the ids that are
    numbers of rows.
    """
    if a.conditions["benchmark"] != b.conditions["benchmark"]:
        return False
    if a.conditions["asked"] == b.conditions["asked"]:  # the same first questions would be equal
        return False
    return are_published(a, b) or not any(
        question.question_id.isdecimal() for run in (a, b) for question in run.questions
    )


def are_published(*runs: Summary) -> bool:
    """Return True if the questions of all runs are a published benchmark's."""
    return all(run.conditions.get("origin") == Origin.PUBLISHED for run in runs)


def _why_unpaired(a: Summary, b: Summary) -> str:
    """Return why ids do not pair two runs' questions, and what makes the runs comparable."""
    silent = [run for run in (a, b) if not _has_texts(run)]
    ways = ["compare runs over the same questions"]
    if any(question.reference is None for run in silent for question in run.questions):
        ways.insert(0, "in the place of a summary name its run's folder, or a summary written anew")
    return (
        f"{a.label} and {b.label} were asked different questions, or the same ones in another "
        f"order or with other references; {join_words(run.label for run in silent)} "
        f"{'do' if len(silent) > 1 else 'does'} not record the texts, without which one id may "
        f"stand for two questions: {', or '.join(ways)}"
    )


def _partners_by_id(a: Summary, b: Summary) -> dict[str, QuestionResult]:
    """Return b's question for each id of a that b has, too, unless the references are known to
    differ."""
    of_b = {question.question_id: question for question in b.questions}
    found = ((x, of_b[x.question_id]) for x in a.questions if x.question_id in of_b)
    return {
        x.question_id: y
        for x, y in found
        if x.reference == y.reference or None in (x.reference, y.reference)
    }


def _partners_by_content(a: Summary, b: Summary) -> dict[str, QuestionResult]:
    """Return b's question of the same text for ids of a.

    Where both runs know the references, these are equal, too. Of equal questions those with equal
    ids are paired first, the others in the order of their ids.
    """
    has_references = all(each.reference is not None for run in (a, b) for each in run.questions)

    def content(question: QuestionResult) -> tuple[str | None, str | None]:
        return question.text_digest, question.reference if has_references else None

    def has_moved(question: QuestionResult) -> bool:
        return question.question_id not in left.get(content(question), ())

    left: dict[tuple[str | None, str | None], dict[str, QuestionResult]] = {}
    for question in _in_natural_order(b):
        left.setdefault(content(question), {})[question.question_id] = question
    partners = {}
    for question in sorted(_in_natural_order(a), key=has_moved):
        if equal := left.get(content(question)):
            name = question.question_id
            partners[name] = equal.pop(name if name in equal else next(iter(equal)))
    return partners


def _in_natural_order(run: Summary) -> list[QuestionResult]:
    return sorted(run.questions, key=lambda question: natural_order(question.question_id))


def _ids(names: Collection[str]) -> str:
    """Return the ids of questions, no more than the first of them, and the number of the others."""
    shown = sorted(names, key=natural_order)[:MAX_NAMES_SHOWN]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return f"the id{'s' if len(names) > 1 else ''} {', '.join(shown)}{more}"


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts `q2` before `q10`."""
    return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]


def _how_to_complete(a: Summary, b: Summary) -> list[str]:
    """Return what adds the samples that two runs of the same questions lack."""
    if failed := [
        f"{counted(run.num_failed, 'sample')} of {run.label}" for run in (a, b) if run.num_failed
    ]:
        return [
            f"{' and '.join(failed)} failed: the same lim eval command with --retry-failed tries "
            "them again"
        ]
    return ["complete the runs with lim eval"] if a.gap or b.gap else []
