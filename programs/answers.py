"""Extraction of the final answer that a chain of thought states."""

import re
from collections import deque
from decimal import Decimal

_BOX = r"\\{1,2}(?:boxed|fbox)"
_TOKEN = re.compile(
    rf"{_BOX}\s*(?P<box>\{{)|{_BOX}\s*(?P<number>[-+]?\.?\d[^\s$]{{,99}})|\\.|[{{}}]", re.DOTALL
)
"""The beginning of a box, and every brace; an escaped character is skipped."""
_EMPTY_BOX = re.compile(rf"{_BOX}\s*(?:\{{\s*\}}|$)")
"""An empty box in a statement: the prompt's own words, "put your answer within \\boxed{}"."""
_STATEMENT = re.compile(
    # GSM8K's `#### 5`: one word with a digit in it, since a heading may look the same.
    r"^####[ \t]*(?=[^\s\d]*\d\S*[ \t]*$)|\banswer\**\s*(?:is\b\s*:?|:)[\s*]*",
    re.IGNORECASE | re.MULTILINE,
)
_FORMULA = (
    r"(?:\$\$[^$]{1,500}\$\$|\$(?!\s)[^$]{1,500}(?<!\s)\$(?!\d)"
    r"|\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\])"
)
_STATED = re.compile(
    rf"{_FORMULA}(?:,?\s*+(?:(?:and|or)\b\s*+)?{_FORMULA})*|(?:[^\n.?]|[.?](?![\s*]|$)){{1,500}}",
    re.DOTALL,
)
"""A statement: formulas, or else the text up to the end of the sentence or of the line."""
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
MAX_BARE = 200
"""Longest reply, in characters, that may be nothing but an answer."""
_BARE = re.compile(
    rf"\s*\**\s*(?:[-+]?\$?\d[\d,./]*\s*%?|\(?[A-J]\)?|{_FORMULA})\s*\.?\s*\**\s*", re.DOTALL
)
MAX_WORDS = 4
"""Most words of an answer without a box; a longer one is a sentence about the answer."""
MAX_STATEMENTS = 100
"""Statements that are looked at, from the end of the text: a limit of the time."""
_CHOICE = re.compile(r"\(?[A-J]\)(?=[\s.,;:]|$)")
"""A letter in brackets: the choice, whatever text follows."""
_NO_BOX = -1
_CHARACTERS = str.maketrans(
    {"°": r"^\circ ", "∞": r"\infty ", "√": r"\sqrt ", "²": "^2", "³": "^3", "£": "", "€": ""}
    | {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
"""LaTeX for characters that math-verify does not know; the last are full-width digits."""

_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;: ]|[~ ])(?=\d{3}(?![\d/]))")
_SIGNED_POWER = re.compile(r"\^(-\d+)")
_SCIENTIFIC = re.compile(
    r"([-+]?\d*\.?\d+)(?:[eE]| ?(?:\\times|\\cdot|×|\*) ?10\^)\{?([-+]?\d{1,3})\}?"  # noqa: RUF001
)
_MIXED = re.compile(r"([-+]?\d+) (\d+)/(\d+)")
_RECURRING = re.compile(r"(\d*)\.(\d*)\\overline\{(\d+)\}")


def extract_answer(text: str) -> str | None:
    r"""Return the answer that a text states: its last box, else its last "the answer is X",
    "Answer: X" or `#### X`. None if it states none; a last number is no answer.

    The text after the last `</think>` counts first, since it is the reply to the reader. If the
    reply states nothing, the thoughts count, as in a sample that was cut off within its thoughts.
    A reply that is nothing but a number, a formula or a letter to choose is an answer, too.
    Empty boxes are skipped, since they are the prompt's own words, and unclosed ones, since they
    were cut off. A box without braces, as in `\boxed 5`, needs a number. The time is linear in the
    length.
    """
    thoughts, _, reply = text.rpartition("</think>")
    return _find_answer(reply) or _bare_answer(reply) or _find_answer(thoughts)


def _find_answer(text: str) -> str | None:
    return _last_box(text) or _last_statement(text)


def _bare_answer(reply: str) -> str | None:
    """Return the entire reply if it is nothing but a number, a formula or a letter to choose."""
    if len(reply) > MAX_BARE or not _BARE.fullmatch(reply):
        return None
    return tidy(reply) or None


def _last_box(text: str) -> str | None:
    """Return the content of the box that begins last, of those that are closed and not empty."""
    start, answer = -1, None
    # The beginning of each open box's content; no match objects, since there may be millions.
    open_braces: list[int] = []
    for token in _TOKEN.finditer(text):
        if token["number"]:
            start, answer = token.start("number"), tidy(token["number"])
        elif token["box"] or token[0] == "{":
            open_braces.append(token.end() if token["box"] else _NO_BOX)
        elif token[0] == "}" and open_braces:
            begin = open_braces.pop()
            # An outer box ends later but begins earlier.
            if begin > start and (content := tidy(text[begin : token.start()])):
                start, answer = begin, content
    return answer


def _last_statement(text: str) -> str | None:
    leads = deque((lead.end() for lead in _STATEMENT.finditer(text)), maxlen=MAX_STATEMENTS)
    for end in reversed(leads):
        stated = _STATED.match(text, end)
        answer = tidy(stated[0]) if stated else ""
        if chosen := _CHOICE.match(answer):
            return chosen[0]
        if answer and len(_WORD.findall(answer)) <= MAX_WORDS and not _is_about_a_box(answer):
            return answer
    return None


def _is_about_a_box(answer: str) -> bool:
    """Return True if a statement echoes the prompt, or is a box that was cut off."""
    echoes = _EMPTY_BOX.search(answer) and not re.search(r"\d", answer)
    cut_off = re.search(_BOX, answer) and answer.count("{") > answer.count("}")
    return bool(echoes or cut_off)


def tidy(answer: str) -> str:
    """Strip the white space, Markdown, dollar signs and punctuation around an answer."""
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("", "")):
        answer = answer.lstrip(" \n\r\t$*").rstrip(" \n\r\t$*.,;:?\\")
        if answer.startswith(opening) and answer.endswith(closing):
            answer = answer.removeprefix(opening).removesuffix(closing)
    return answer


def as_latex(answer: str) -> str:
    """Return an equal answer as one line of the LaTeX that math-verify reads."""
    answer = " ".join(tidy(answer).translate(_CHARACTERS).split())
    answer = _THOUSANDS.sub("", answer)
    if number := _SCIENTIFIC.fullmatch(answer):
        # In decimal digits: in binary, SymPy's 1.1 times 100 is not 110.
        return f"{Decimal(f'{number[1]}e{number[2]}'):f}"
    answer = _SIGNED_POWER.sub(r"^{\1}", answer)
    answer = _RECURRING.sub(_recurring_fraction, answer)
    if number := _MIXED.fullmatch(answer):
        return rf"{number[1]}\frac{{{number[2]}}}{{{number[3]}}}"
    return answer


def _recurring_fraction(decimal: re.Match[str]) -> str:
    whole, fixed, period = decimal.groups()
    head = int(whole + fixed or "0")
    numerator = int(f"{head}{period}") - head
    return rf"\frac{{{numerator}}}{{{'9' * len(period)}{'0' * len(fixed)}}}"
