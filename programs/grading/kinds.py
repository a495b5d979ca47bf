r"""Answers of a kind: an integer, the letter of an option, a text, and references that can be
right."""

import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import StrEnum

from lim_sglang.errors import cut
from lim_sglang.programs.grading.forms import rewritten
from lim_sglang.programs.grading.latex import is_unbalanced, plain
from lim_sglang.programs.grading.texts import SIGNS, as_text
from lim_sglang.programs.grading.values import REASON_WORDS, read_number, split_unit


class AnswerKind(StrEnum):
    """Comparison of an answer with the gold answer."""

    EXPRESSION = "expression"
    """Mathematical equality by math-verify."""
    INTEGER = "integer"
    """Integer from 0 to 999, as the AIME asks for."""
    CHOICE = "choice"
    """Letter of an option, A to J."""
    TEXT = "text"
    """The same text, once both are trimmed (`as_text`)."""


CHOICES = "ABCDEFGHIJ"
MAX_PARSED_CHARS = 500
"""Characters in which a letter is searched, and length of the longest text that may be an
integer."""
CONDITIONS = r"[\s,*_]*(?:(?:but )?only|if|when|unless|provided|\?)"
"""Words behind an option that is correct in some cases alone."""
REASON = rf"(?:{REASON_WORDS}|for|so|which|with|by)\b"
"""Words behind a letter that begin a reason."""
PRONOUN = (
    r"I\b,?\s+(?:as an?|am|was|cannot|can|could|do|don['’]t|did|have|will|would|must|think"
    r"|believe)\b"
)
"""Words that make of the letter I a pronoun."""
_NAME = re.compile(r"\A(?!.*\b(?:and|or)\b)[^,;]*=", re.DOTALL)
"""Left side of an equation, as in `m+n = 33`. Two numbers have two names and do not match."""
_INEQUALITY = re.compile(r"[<>]|!\s*=|\\(?:le|ge|ne|approx)(?![a-zA-Z])")
_STEP = r"(?:[-+\d.\s*/^(){}]|\\(?:frac|sqrt|cdot|times)(?![a-zA-Z]))"
_ALTERED = re.compile(rf"(?!\s*[a-zA-Z]\s*[(=]){_STEP}*([a-zA-Z])(?:{_STEP}|\1)*=.*", re.DOTALL)
"""A multiple, a power or a sum of one name, as in `2x = 25` and `n^2 = 25`; no `f(2) = 25`."""
_INTEGER = re.compile(r"(?:\s|\(|\\\{)*\+?\s*0*(\d{1,3})(?:\.0*)?(?:\s|\.|\)|\\\})*", re.ASCII)
_MARKUP = re.compile(r"\\text\b|[{}$*]")
_BRACKET = r"\s+\((?![a-z]\))|\((?=[A-Za-z]{2})"
"""A bracket with the words of an option, and no argument as in `F(x)`."""
_NUMBER_BEHIND = r"(?<!A)\s+\d|(?<=A)\s+\d\S*(?:\s+\S+)?$"
"""The number of an option; a longer text behind `A` has an article, as `A 5 kg weight`."""
_LETTER = re.compile(
    r"(?i:(?:the )?(?:correct |final |right |best )?(?:option|choice|answer|letter)(?: is)?:? )?"
    rf"(?!{PRONOUN})[(\[]?"
    # Alone, or before the bracket, sign or word that starts a reason; an article has neither.
    r"([A-Ja-j](?=[)\].:]*$)"
    rf"|[A-J](?=[)\].:,;]|\s*[—–]|{_BRACKET}|\s+(?:-{{1,3}}|:)\s|{_NUMBER_BEHIND}|\s+{REASON}"
    rf"|\s+is (?:the )?(?:correct|right)\b(?!{CONDITIONS}))|[a-j](?=[)\]]))"
)
_WORDED_LETTER = re.compile(r"([A-J])\s*\\text\{(?!\W*(?:and|or|to|than)\b)[^{}]*\}\s*$")
"""A letter and the words of its option."""
SECOND_LETTER = re.compile(
    # Not in `B; C is wrong`.
    r"(?!\s*[,;—–-]\s*(?:(?:but|and|while) )?[(\[]?[A-J][)\]]?\s+(?:is|was)\s+"
    r"(?:(?:clearly|obviously|also) )?(?:wrong|incorrect|false)\b)"
    r"[)\].:]*\s*(?:[,/&+;—–-]| and\b| or\b)[, ]*(?:(?:and|or) )?[(\[]?"
    r"(?:[A-J](?!\w)|[a-j](?=[)\]]|$))"
)
"""A second letter behind the first."""
_CONDITIONAL = re.compile(
    rf"[)\].:]*\s+is (?:the )?(?:correct|right)(?: (?:option|choice|one|answer))?{CONDITIONS}"
)
"""Words behind a letter that choose it in some cases alone."""


_AT_POINT = re.compile(r"\|\s*_\s*\{[^{}]*\}(?=\s*=)")
"""The point at which a derivative has a value: `|_{(1,2)}`."""


def as_integer(text: str) -> int | None:
    r"""Parse an integer from 0 to 999; return None where `text` states none.

    Leading zeros, a name (`m+n = 33`, but not `2m = 33`), a unit, a counted thing, a modulus, a
    degree or percent sign, brackets, styles, spaces, zero decimals and a full stop are ignored.
    `forty-two` is 42.
    """
    if len(text) > MAX_PARSED_CHARS:
        return None
    value, _ = split_unit(without_name(_AT_POINT.sub("", plain(rewritten(text)))))
    match = _INTEGER.fullmatch(re.sub(r"\\?[%$]|°|(?<!\\)[{}]", "", value))
    if match:
        return int(match[1])
    spelt = read_number(text) if re.fullmatch(r"(?!and\b)[a-zA-Z -]+", text) else None
    return int(spelt[0]) if spelt and spelt[0] in range(1000) else None


def without_name(text: str) -> str:
    """Return the right side of an equation; the text itself if the left side is no name."""
    name = _NAME.match(text)
    if name is None or _INEQUALITY.search(name[0]) or _ALTERED.match(name[0]):
        return text
    return text[name.end() :]


_LETTERS = re.compile(
    r"[(\[]?[A-J][)\].]?(?:(?:\s*[,;&/]\s*(?:(?:and|or)\b)?|\s+(?:and|or)\b)\s*[(\[]?[A-J][)\].]?)+"
)


def listed_letters(text: str) -> frozenset[str]:
    """Return the letters of a list as `A, B` and `(A) and (C)`; none for any other text."""
    bare = _bare(text)
    return frozenset(re.findall(r"\b[A-J]\b", bare) if _LETTERS.fullmatch(bare) else ())


def _bare(text: str) -> str:
    """Return a text without markup, from which a letter is read."""
    return " ".join(_MARKUP.sub(" ", plain(text[:MAX_PARSED_CHARS]).strip("_")).split())


def as_choice(text: str) -> str | None:
    r"""Parse the letter of an option, A to J, from `B`, `(B)`, `\text{B}`, `b`, `B) because …`,
    `B (4.2 eV)` or `option B`; return None where `text` has no letter (a number, a word) or two.
    """
    if worded := _WORDED_LETTER.match(plain(text[:MAX_PARSED_CHARS])):
        return worded[1]
    bare = _bare(text)
    match = _LETTER.match(bare)
    if match is None or SECOND_LETTER.match(bare, match.end()):
        return None
    if _CONDITIONAL.match(bare, match.end()):
        return None
    return match[1].upper()


_LABEL = re.compile(r"\A\s*\w{1,3}\)|\\(?:left|right)\s*[.\])\[(]")
"""A bracket without another: behind the number or letter of an item, and one that TeX sizes, whose
other side may be a full stop.
"""


def fault_of_reference(answer: str, kind: AnswerKind) -> str | None:
    r"""Return why no reply can equal a reference answer, as the end of a sentence that begins with
    the answer's name: `must be …`; None if one can.
    """
    if not answer.strip():
        return "must be a non-empty text"
    if kind is AnswerKind.INTEGER and as_integer(answer) is None:
        return f"must be an integer from 0 to 999, not {cut(repr(answer))}"
    if kind is AnswerKind.CHOICE and as_choice(answer) is None:
        letters = f"{CHOICES[0]} to {CHOICES[-1]}"
        return f"must be the letter of an option, {letters}, not {cut(repr(answer))}"
    if kind is AnswerKind.TEXT and not answer.strip(SIGNS):
        return f"must be more than quotes and punctuation, not {cut(repr(answer))}"
    if kind is AnswerKind.EXPRESSION and is_unbalanced(_LABEL.sub("", answer)):
        return f"must close each brace and bracket that it opens: {cut(repr(answer))}"
    return _fault_of_text(answer)


_LOST_COMMAND = re.compile(
    r"[\b\f]\w*|\t(?:ext|imes|heta|frac|riangle|ilde|a[nu]\b)\w*"
    r"|\n(?:eq|abla|otin)\b|\A\n(?:u|e|eg|ot)\b|\r(?:ight\w*|(?:ho|angle|floor|ceil)\b)"
)
"""A control character for which a backslash and a letter were written, and the rest of the name."""
_LOST_IN_ANSWER = re.compile(r"\nu\b(?!\s*=)")
"""A name that also begins a line of a problem; in an answer with `=` behind, a second value."""
_CONTROL = re.compile(r"[^\n\t\r -\U0010ffff]|\x7f|\r(?!\n|\Z)")
"""A control character that no text needs; line ends of Windows are none."""


def lost_command(text: str) -> str | None:
    r"""Return which command of LaTeX became a control character when JSON was read (`\frac` after
    `\f`), as `fault_of_reference` does; None if none did.
    """
    found = _LOST_COMMAND.search(text)
    return _describe_lost(found[0]) if found else None


def _describe_lost(found: str) -> str:
    name = json.dumps(found).strip('"')
    return f"holds a control character for {name[:2]}: in JSON a backslash is doubled, \\{name}"


def _fault_of_text(answer: str) -> str | None:
    """Return which lost command or control character an answer holds, as `fault_of_reference`."""
    if found := lost_command(answer):
        return found
    if name := _LOST_IN_ANSWER.search(answer):
        return _describe_lost(name[0])
    found_sign = _CONTROL.search(answer)
    if found_sign is None:
        return None
    return f"holds the control character {json.dumps(found_sign[0])}: write the answer without it"


def number_text(value: object) -> str | None:
    """Return a finite number as the text of an answer, 25.0 as "25"; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else f"{Decimal(repr(value)):f}"


PARSERS: Mapping[AnswerKind, Callable[[str], int | str | None]] = {
    AnswerKind.INTEGER: as_integer,
    AnswerKind.CHOICE: as_choice,
    AnswerKind.TEXT: as_text,
}
"""Parsers of the kinds that need no math-verify."""
