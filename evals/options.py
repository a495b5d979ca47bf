"""Options of a multiple choice, which stand in the question's text: written, found and checked."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from lim_sglang.errors import DataError
from lim_sglang.markdown_section import join_words
from lim_sglang.programs.grading.kinds import CHOICES, AnswerKind, as_choice

_OPTION = re.compile(r"(?:^|\s)\(?([A-J])\)\s|^[\s*_-]*([A-J])[.:]\s", re.MULTILINE)
"""The letter before an option in a question's text."""
_OPTION_FIELD = re.compile(
    r"(choices?|options?|distractors?|(wrong|incorrect)[ _]answers?)([ _-]?\w)?|[A-J]",
    re.IGNORECASE,
)
OPTIONS_FORM = r'"Which is prime?\nA) 4\nB) 5"'


def with_options(text: str, options: list[str], seed: str) -> tuple[str, str]:
    """Append shuffled options to a question; return the text and the letter of the first option.

    The order follows from SHA-256 digests of the seed, so it is the same in every version of
    Python and does not depend on the other questions.
    """
    order = sorted(
        range(len(options)), key=lambda n: hashlib.sha256(f"{seed} {n}".encode()).digest()
    )
    lines = [f"{CHOICES[letter]}) {options[n]}" for letter, n in enumerate(order)]
    return "\n".join([text.strip(), "", *lines]), CHOICES[order.index(0)]


def stated_options(text: str) -> str:
    """Return the letters of the options that a question's text states, such as `ABCD`."""
    return "".join(sorted({one or other for one, other in _OPTION.findall(text)}))


def option_fields(names: Iterable[str]) -> list[str]:
    """Return the names of fields that look like the options of a multiple choice."""
    return [name for name in names if _OPTION_FIELD.fullmatch(name.strip())]


def check_letter(text: str, gold: str, kind: AnswerKind, unread: Sequence[str]) -> None:
    """Check that a reference answer that is a letter is an option of its question's text.

    Args:
        unread: fields of the question that are not read.

    Raises:
        DataError: the letter stands nowhere in the text, and the text states other options, A and B
            among them, or a field that is not read has the options.
    """
    letter = as_choice(gold) if kind is AnswerKind.CHOICE else gold
    if not letter or letter not in set(CHOICES):
        return
    if re.search(rf"(?<!\w)({letter}(?!\w)|{letter.lower()}[).:])", text):
        return
    options, fields = stated_options(text), option_fields(unread)
    if kind is AnswerKind.CHOICE and options.startswith("AB") and options in CHOICES:
        raise DataError(
            f"answer is {letter}, but the options in the text are {', '.join(options)}: correct "
            "the answer, or add the option"
        )
    if fields:
        raise DataError(
            f"answer is the letter {letter}, but {join_words(map(repr, fields))} cannot be seen: "
            f"write the options into the question's text, as in {OPTIONS_FORM}, and name the file "
            f"file:PATH.jsonl:{AnswerKind.CHOICE}"
        )
