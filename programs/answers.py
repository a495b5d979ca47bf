"""The final answer that a chain of thought states."""

import re

_BOX = r"\\{1,2}(?:boxed|fbox)"
_TOKEN = re.compile(
    rf"{_BOX}\s*(?P<box>\{{)|{_BOX}\s*(?P<number>[-+]?\.?\d[^\s$]{{,99}})|\\.|[{{}}]", re.DOTALL
)
"""What a box begins with, and every brace; an escaped brace is none."""
_EMPTY_BOX = re.compile(rf"{_BOX}\s*(?:\{{\s*\}}|$)")
"""In a statement, the prompt's own words: the answer is to stand "within" it."""
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
"""What is stated: formulas, or else the text up to the end of the sentence or of the line."""
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
MAX_BARE = 200
"""Characters of a reply that may be nothing but an answer."""
_BARE = re.compile(
    rf"\s*\**\s*(?:[-+]?\$?\d[\d,./]*\s*%?|\(?[A-J]\)?|{_FORMULA})\s*\.?\s*\**\s*", re.DOTALL
)
MAX_WORDS = 4
"""In an answer that is not boxed; with more, it is a sentence about the answer."""


def extract_answer(text: str) -> str | None:
    r"""The answer that `text` states: its last box, else its last "the answer is X", "Answer: X"
    or `#### X`. None where there is none; a last number is not an answer.

    What follows the last `</think>` counts first, since it is what the reader is told. If nothing
    is stated there, the thoughts count, as they do when a sample is cut off within them. A reply
    that is nothing but a number, a formula or a letter to choose is an answer, too.
    An empty box only talks about boxes and an unclosed one was cut off: both are passed over.
    Without braces, as in `\boxed 5`, a box needs a number. Takes time linear in the length.
    """
    thoughts, _, reply = text.rpartition("</think>")
    return _find_answer(reply) or _bare_answer(reply) or _find_answer(thoughts)


def _find_answer(text: str) -> str | None:
    return _last_box(text) or _last_statement(text)


def _bare_answer(reply: str) -> str | None:
    """The whole reply, where it is nothing but a number, a formula or a letter to choose."""
    if len(reply) > MAX_BARE or not _BARE.fullmatch(reply):
        return None
    return tidy(reply) or None


def _last_box(text: str) -> str | None:
    """Of the boxes that are closed and not empty, the one that begins last."""
    start, answer = -1, None
    open_braces: list[re.Match[str]] = []
    for token in _TOKEN.finditer(text):
        if token["number"]:
            start, answer = token.start(), tidy(token["number"])
        elif token["box"] or token[0] == "{":
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            opening = open_braces.pop()
            # An outer box ends later but begins earlier.
            if opening["box"] and opening.start() > start:
                content = tidy(text[opening.end() : token.start()])
                if content:
                    start, answer = opening.start(), content
    return answer


def _last_statement(text: str) -> str | None:
    for lead in reversed(list(_STATEMENT.finditer(text))):
        stated = _STATED.match(text, lead.end())
        answer = tidy(stated[0]) if stated else ""
        echoes = _EMPTY_BOX.search(answer) and not re.search(r"\d", answer)
        if answer and len(_WORD.findall(answer)) <= MAX_WORDS and not echoes:
            return answer
    return None


def tidy(answer: str) -> str:
    """Without white space, Markdown, dollar signs and punctuation around it."""
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("", "")):
        answer = answer.lstrip(" \n\r\t$*").rstrip(" \n\r\t$*.,;:?\\")
        if answer.startswith(opening) and answer.endswith(closing):
            answer = answer.removeprefix(opening).removesuffix(closing)
    return answer
