"""Notes on questions that are perhaps not read as they are meant; no note refuses a question."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from lim_sglang.evals.options import OPTIONS_FORM, option_fields, stated_options
from lim_sglang.evals.tasks import FILE_COLUMNS, OWN_FILE, Question, find_task
from lim_sglang.markdown_section import join_words, places
from lim_sglang.programs.grading.kinds import CHOICES, PARSERS, AnswerKind, as_choice
from lim_sglang.programs.grading.values import read_value

_WORD_IN_FORMULA = re.compile(r"(?<![\\a-zA-Z{])(?!(?:and|or)\b)[a-z]{2,}")


def question_notes(benchmarks: Mapping[str, Sequence[Question]]) -> Iterator[str]:
    """Yield a line for everything in files of questions that is perhaps not read as it is meant:
    letters as reference answers among expressions or beside other options, multiple choice without
    options, prose and words among expressions, questions with several answers or that occur twice,
    options in fields of their own, and misspelt fields.

    Args:
        benchmarks: questions by the task's name.
    """
    for name, questions in benchmarks.items():
        task = find_task(name)
        letters = [each.location for each in questions if each.gold in set(CHOICES)]
        if task.file and task.answer_kind is AnswerKind.EXPRESSION and letters:
            yield (
                f"{places(letters)}: the reference answer is a letter, which is compared as an "
                "expression; multiple choice belongs in a file of its own, "
                f"{OWN_FILE}PATH.jsonl:{AnswerKind.CHOICE}, which the same command takes, too"
            )
        if task.answer_kind is AnswerKind.CHOICE:
            yield from _no_option_notes(questions)
            yield from _option_notes(questions)
        if task.file and task.answer_kind is AnswerKind.EXPRESSION:
            yield from _prose_notes(questions)
            yield from _word_notes(questions)
        yield from _answer_notes(questions, PARSERS.get(task.answer_kind, str.split))
        if task.file:
            yield from _repeated_notes(questions)
        yield from _unread_notes(questions)


def _no_option_notes(questions: Sequence[Question]) -> Iterator[str]:
    """Yield a line for the multiple-choice questions that state no options: neither in their texts
    nor in fields, which have a note of their own.
    """
    without = [
        each.location
        for each in questions
        if not ({*"AB"} <= {*stated_options(each.text)} or option_fields(each.unread))
    ]
    if without:
        yield (
            f"{places(without)}: no options A, B, … are found in the text: write each on a line of "
            f"its own, as in {OPTIONS_FORM}"
        )


def _option_notes(questions: Sequence[Question]) -> Iterator[str]:
    """Yield a line for each letter that is a reference answer but no option in the text, which
    names it all the same: other questions are refused when they are read.
    """
    having: dict[tuple[str, str], list[str]] = {}
    for each in questions:
        letters, gold = stated_options(each.text), as_choice(each.gold) or ""
        if letters.startswith("AB") and gold not in letters:
            having.setdefault((gold, ", ".join(letters)), []).append(each.location)
    for (gold, options), locations in having.items():
        yield (
            f"{places(locations)}: the reference answer is {gold}, but the options in the text "
            f"are {options}: correct the answer, or add the option"
        )


def _prose_notes(questions: Sequence[Question]) -> Iterator[str]:
    """Yield a line for the reference answers that are several words and no expression."""
    prose = [each for each in questions if _is_prose(each.gold)]
    if prose:
        yield (
            f"{places([each.location for each in prose])}: the reference answer, such as "
            f"{prose[0].gold!r}, is read as no expression: only a reply that states the same words "
            "is right; give a number or a formula where the question has one"
        )


def _is_prose(gold: str) -> bool:
    """Return True for several words that are read as no value, and for a sentence that holds one;
    False for a date and letters.
    """
    value = read_value(gold)
    words = value.words or tuple(_WORD_IN_FORMULA.findall(value.latex))
    return len(words) > 1 and words[0] != "date" and max(map(len, words)) > 2


def _word_notes(questions: Sequence[Question]) -> Iterator[str]:
    """Yield a line for the reference answers that are one word."""
    words = [each for each in questions if len(read_value(each.gold).words) == 1]
    if words:
        yield (
            f"{places([each.location for each in words])}: the reference answer, such as "
            f"{words[0].gold!r}, is a word, and among expressions a word counts in \\boxed{{}} "
            f"alone: words belong in a file of their own, {OWN_FILE}PATH.jsonl:{AnswerKind.TEXT}"
        )


def _answer_notes(questions: Sequence[Question], read: Callable[[str], object]) -> Iterator[str]:
    """Yield a line for each question that occurs with reference answers that are read as
    different ones.
    """
    by_text: dict[str, list[Question]] = {}
    for each in questions:
        by_text.setdefault(each.text.strip(), []).append(each)
    for same in by_text.values():
        golds = {str(read(each.gold)): each.gold for each in same}
        if len(golds) > 1:
            yield (
                f"{places([each.location for each in same])}: the same question with the reference "
                f"answers {join_words(map(repr, golds.values()))}: leave the wrong ones out"
            )


def _repeated_notes(questions: Sequence[Question]) -> Iterator[str]:
    """Yield a line for each question that occurs again with the same reference answer."""
    same: dict[tuple[str, str], list[str]] = {}
    for each in questions:
        same.setdefault((each.text.strip(), each.gold), []).append(each.location)
    for locations in same.values():
        if len(locations) > 1:
            yield (
                f"{places(locations)}: the same question and reference answer, which counts "
                f"{len(locations)} times: leave one in"
            )


def _unread_notes(questions: Sequence[Question]) -> Iterator[str]:
    """Yield a line for the fields that look like options, and one for each misspelt field."""
    unread: dict[str, list[str]] = {}
    for each in questions:
        for name in each.unread:
            unread.setdefault(name, []).append(each.location)
    options = option_fields(unread)
    if options:
        having = [each.location for each in questions if {*each.unread}.intersection(options)]
        are = "are" if len(options) > 1 else "is"
        yield (
            f"{places(having)}: {join_words(map(repr, options))} {are} not read: options stand in "
            "the question's text, the answer is the letter of the right one, and the file is named "
            f"{OWN_FILE}PATH.jsonl:{AnswerKind.CHOICE}"
        )
    for name in (each for each in unread if each not in options):
        if meant := _meant_field(name):
            yield f"{places(unread[name])}: {name!r} is not read; did you mean {meant!r}?"


def _meant_field(name: str) -> str | None:
    """Return the field that is read and that a name misspells, if any; a longer name, such as
    `answer_type`, is another field.
    """
    plain = name.strip().lower()
    if plain in FILE_COLUMNS.names:
        return plain
    if plain.startswith(tuple(f"{known}_" for known in FILE_COLUMNS.names)):
        return None
    long = [known for known in FILE_COLUMNS.names if len(known) > 2]
    return next(iter(get_close_matches(plain, long, n=1, cutoff=0.8)), None)
