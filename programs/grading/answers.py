r"""The final answer that a chain of thought states, found in the text."""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction

from lim_sglang.programs.grading.kinds import (
    CONDITIONS,
    PRONOUN,
    REASON,
    SECOND_LETTER,
    AnswerKind,
    as_choice,
    without_name,
)
from lim_sglang.programs.grading.latex import FUNCTION, plain, tidy
from lim_sglang.programs.grading.units import Unit
from lim_sglang.programs.grading.values import (
    REASON_WORDS,
    decide,
    equal_numbers,
    read_number,
    read_value,
    without_reason,
)

MAX_BARE = 200
"""Longest reply, in characters, that may be nothing but an answer."""
MAX_WORDS = 4
"""Most words of an answer without a box; a longer one is a sentence about the answer."""
MAX_STATED = 1000
"""Characters of the longest answer without a box."""
MAX_STATEMENTS = 100
"""Statements that are looked at, from the end of the text: a limit of the time."""

_BOX = r"\\{1,2}(?:boxed|fbox)"
_TOKEN = re.compile(
    rf"{_BOX}\s*(?P<box>\{{)|{_BOX}\s*(?P<number>[-+]?\.?\d[^\s$]{{,99}})|\\.|[{{}}]", re.DOTALL
)
"""The beginning of a box, and every brace; an escaped character is skipped."""
_NO_BOX = -1
_FILLER = re.compile(r"[\s$*]|\\(?:[()\[\],;: ]|quad\b|qquad\b)")
_NEXT_BOX = re.compile(
    r" *+(?:(?:,|;|&|\\\\|\\lor\b|\\land\b|\\text *\{ *,? *(?:and|or) *\}|\b(?:and|or)\b) *+)++"
    r"(?:(?P<name>[a-zA-Z](?:_\{?\w\}?)? *&?=)"
    r"|(?:the )?(?:other|second|third|larger|smaller|next|last)(?: [a-z]+)? (?:is|equals|=))? *+"
)
"""Text between two boxes that are one answer: commas, `and`, `or`, the name of a value, and words
as `and the other root is`."""
MAX_JOINED = 30
"""Most boxes that are one answer."""
MAX_BETWEEN = 100
"""Most characters between two boxes that are one answer."""
_UNFINISHED = re.compile(
    r"(?:[\s$*&)\]]|\\[)\]])*(?:(?:,|;|\b(?:and|or)\b)(?:[\s$*(\[]|\\[(\[])*)+(?:\w\s*=?\s*)?"
    r"(?:\\{1,2}(?:boxed|fbox)|(?:\\+[a-z]*)?\Z)"
)
"""A sign behind a box that another box follows, which is not there."""
_NAME_BEFORE = re.compile(r"([a-zA-Z](?:_\{?\w\}?)?)\s*&?=\s*$")
_TAG = re.compile(r"<answer>((?:(?!</?answer).){1,2000})</answer>", re.DOTALL | re.IGNORECASE)
_BEGINS_WITH_EMPTY_BOX = re.compile(
    rf"[ \t$]*{_BOX}\s*\{{\s*\}}[ \t$]*"
    r"(?:[=:]?[ \t$]*(?=[-+\d\\(\[{]|[A-J]\b)"
    r"|\n\s*(?=[-+$]*[\d.,/]+[$ \t]*$|\(?[A-J]\)?\s*$))",
    re.MULTILINE,
)
"""An empty box before a value: "the answer is \\boxed{} 32", or a value alone in the next line."""
_EMPTY_BOX = re.compile(rf"{_BOX}\s*(?:\{{\s*\}}|$)")
"""An empty box in a statement: the prompt's own words, "put your answer within \\boxed{}"."""
_IS = (
    r"(?:is|must be|should be|would be|will be|equals)\b\s*"
    r"(?:(?:therefore|thus|then|hence|simply|exactly|just|indeed|clearly|actually|really|still"
    r"|in fact|approximately|about)\b,?\s*)?:?"
)
_STATEMENT = re.compile(
    # GSM8K's `#### 5`, a heading "Final Answer" with the answer below, "the answer is 5".
    r"^(?P<hashes>####)[ \t]*(?=(?:[a-z] *= *)?[^\s\d]*\d)"
    r"|^[#*_ \t]*+(?:the )?(?:final |correct )?answer[*_ \t]*+:?[*_ \t]*+\n\s*"
    rf"|\banswer[*_]*+\s*+(?:{_IS}|:|=)[\s*_]*(?:(?:option|choice|letter)\b[\s*_]*)?"
    rf"|\b(?P<choice>(?:correct|right|best|final|my) (?:option|choice|letter)[*_]*+\s*+"
    rf"(?:{_IS}|:)[\s*_]*"
    r"|^[#*_ \t]*+(?:option|choice)[*_]*:[ \t*_]*)"
    # "No wait, it is B.", behind another answer.
    r"|\b(?P<corrected>(?:wait|actually|correction|sorry|scratch that|rather|I mean)\b[\s,.:;!—–-]*"
    r"(?:(?:no|actually|I mean)\b[\s,.:;!—–-]*)*(?:it(?:['’]s|\s+(?:is|should be|must be))\b"
    r"|I mean\b)[\s,:*_]*(?:actually\s+)?)",
    re.IGNORECASE | re.MULTILINE,
)
_ENDS = r"(?=[*_$]{0,4}(?:[.,;:!\n]|\Z|\s+(?:because|since|as)\b))"
_CORRECT_OPTION = re.compile(
    r"(?<![a-zA-Z0-9\\])(?-i:([A-J]))[)*_$]{0,4}\s+is\s+(?:the\s+)?(?:correct|right)\b"
    r"|(?:^|[.,:!]\s|\b(?:option|choice|letter|so|thus|hence|therefore|that)\b)[\s*_$(\[]{0,4}"
    rf"(?-i:([A-J]))[)\]*_$]{{0,4}}\s+is\s+(?:the|my)\s+(?:final\s+)?answer\b{_ENDS}"
    r"|(?:^|[.!]\s)[\s*_]{0,4}(?:(?:so|thus|hence|therefore),?\s+)?I(?:\s+(?:would|will)|['’](?:d|ll))?"
    r"\s+(?:choose|pick|select)\s+(?:(?:the\s+)?(?:option|choice|answer|letter)\s+)?[*_$(\[]{0,4}"
    rf"(?-i:([A-J]))[)\]]?{_ENDS}",
    re.IGNORECASE | re.MULTILINE,
)
"""`Option (B) is correct`, `Therefore, B is the answer`, `I choose B`."""
_SENTENCE_END = re.compile(r"[.!?](?=\s)|\n")
_ENDED = re.compile(
    r"^[#>*_ \t-]*(?:\d+|[A-Ja-j])\.(?=[\s*_])"
    r"|((?:[.!?](?=\s)|(?<![,;])(?<![,;] )(?<!\bor)(?<!\band)\n))",
    re.MULTILINE,
)
"""The end of a sentence or of a line, as group; a number or a letter that begins an item of a list
is none, nor is the end of a line that goes on behind a comma."""
_ITEM = re.compile(r"[ \t]*(?:[*_]*\(?1[.)][*_]*[ \t]+\S|([-*+•])[ \t].*\n\s*\1(?:[ \t]|\Z))")
"""The first item of a list, with its number or with the sign of a second item."""
_HEADING = re.compile(r"[.)][ \t]+\S.*\n")
"""The rest of a numbered heading, `#### 2. Add`, behind its number."""
_DOUBT = re.compile(
    r"\b(?:nor|neither|if|whether|unless|only|suppose|assume|assuming|why)\b"
    r"|\b(?:not|no|never|false|doubt|\w+n['’]t|cannot)\b(?!.*[,;])",
    re.IGNORECASE | re.DOTALL,
)
"""Words that deny or limit what follows: some in the whole sentence, some up to a comma."""
_CONDITION = re.compile(CONDITIONS, re.IGNORECASE)
_FORMULA = (
    r"(?:\$\$[^$]{1,500}\$\$|\$(?!\s)[^$]{1,500}(?<!\s)\$(?!\d)"
    r"|\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\])"
)
_ASSERTED = (
    r"[\s,;(—–]*\b(?:which|that|this) (?:is|was|are|equals|gives|makes|totals"
    r"|(?:comes|works out|adds up|amounts|simplifies|reduces|evaluates) to)"
    r"(?: equal to| exactly| simply| just)?\b,?"
    r"|[\s,;(—–]+(?:i\.e\.|equivalently\b|(?:equal|equivalent) to\b"
    r"|(?:equalling|giving|making)\b),?"
)
"""Words that give the value of the expression before: `, which is 5`, `, i.e. 5`."""
_FOUND = r"(?:obtain(?:ed)?|found|find|got(?:ten)?|get|calculated|computed|derived|reached)"
_SAID = (
    rf"[\s,;(—–]+(?:(?:which (?:we|you|I|one) )?{_FOUND} (?:by|from|as|using|via|when)\b"
    r"|which (?:comes from|results from|represents|corresponds to)\b"
    r"|(?:(?:and |but )?not|rather than|instead of)(?=\s+[-+$\\(]*\d))"
    r"|\s*[,(—–]\s*the [a-z]+ of\b"
)
"""Words about the number before: `, obtained by multiplying`, `, the sum of 5 and 7`, `, not 8`."""
_DENIED = re.compile(
    r"\s*(?:not|no|never|wrong|incorrect|false|impossible)\b"
    r"|.*?(?:\b(?:but|so|thus|hence|therefore|then|wait|actually|rather|instead|should|if|unless"
    r"|otherwise|except|correction)\b|[,;—–]\s*(?:and|or|no|not)\b)",
    re.IGNORECASE | re.DOTALL,
)
"""Words of a remark that takes a number back, limits it, or goes on to another one."""
_WRONG = re.compile(r"\b(?:which|that|this) (?:is|was) (?:\w+ )?(?:wrong|incorrect|impossible)\b")
_BRACKETS = re.compile(r"([^()]+?)\s+\((?!.*\bor\b)([^()]*\d[^()]*)\)", re.DOTALL)
"""A value and a remark in brackets: `391 (17 times 23)`."""
_NO_REMARK = re.compile(rf"{FUNCTION.pattern}|base|modulo")
"""Words of a bracket that belongs to the number before."""
_FACTOR = r"\d+(?:\.\d+|/[1-9]\d*)?"
_TERM = rf"{_FACTOR}(?:\*{_FACTOR})*"
_OTHERWISE = r"[\s,;(—–]*\bor(?: (?:equivalently|simply|just))?\b,?"
"""Words before the same value in another form, or before a second value."""
_OPERATOR = re.compile(r"[-+*/^×·÷−!]|\\[a-zA-Z]")
_TIMES = r"[-+*/×·÷]|\\(?:times|cdot|div)(?![a-z])|(?<=\d)x(?=\d)|(?<= )x(?= \d)"
_CALCULATED = re.compile(
    rf"\$?(?=[^=]*\d\s*(?:{_TIMES}|\())(?:{_TIMES}|[\d.,\s()=]|\$(?=\d))+=\s*([^=]+)"
)
"""A calculation of numbers alone and its result: `17 * 20 + 17 * 3 = 391`."""
_COMPARED = re.compile(r"\b(?:and|or)\b|[=<>]")
"""Signs of two values, or of a statement about one."""
_RESTATED = re.compile(
    rf"(?P<first>(?:[^,;]|,(?=\d{{3}}))*?)"
    rf"(?:{_ASSERTED}|(?P<said>{_SAID})|(?P<otherwise>{_OTHERWISE}))\s+(?P<second>.*)",
    re.DOTALL,
)
_STATED = re.compile(
    rf"{_FORMULA}(?:(?:,?\s*+(?:(?:and|or)\b\s*+)?|(?:{_ASSERTED})\s+){_FORMULA})*"
    r"|(?:[^\n.?]|[.?](?![\s*]|$)|(?<=\bi\.e)\.){1,500}",
    re.DOTALL,
)
"""A statement: formulas, or else the text up to the end of the sentence or of the line."""
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_REMARK = re.compile(r"\s*[,;(—–]\s*[^\d\\$]*$")
"""Words without a number behind a comma or in brackets: "72 clips, altogether"."""
_CALCULATION = re.compile(r"\s*\((?!.*\bor\b)[^()]*\)$")
"""A remark in brackets: "72 clips (48 + 24)"."""
_BARE = re.compile(
    rf"\s*\**\s*(?:(?:[a-zA-Z]\s*=\s*)?[-+]?\$?\d[\d,./]*\s*%?|\(?[A-J]\)?|{_FORMULA})\s*\.?\s*\**\s*",
    re.DOTALL,
)
_FIRST_LINE = re.compile(r"\s*[*_$(\[]*([A-J])[)\]*_$.:]*[ \t]*\n")
"""A reply that begins with nothing but a letter in its first line."""
_CHOICE = re.compile(
    rf"[*_$]*(?!{PRONOUN})(?:[(\[]?[A-J][)\]](?=[\s.,;:*_$]|$)|[A-J](?=[*_$]*(?:[.,;:]|\s+{REASON}|\s*[(—–]|\s+-\s|$)))"
)
"""A letter in brackets, or before the beginning of a reason: the choice, whatever text follows."""
_OPEN_LETTER = re.compile(r"(?:\\text\{)?([A-Ja-j])\s*[)\].:]+\}?")
"""The letter of an option with the sign behind it, as a list of options has it: `D)`."""
_VALUE_WORDS = frozenset(
    ("yes", "no", "true", "false", "even", "odd", "none", "undefined", "infinite", "infinity")
)
"""Words that are an answer without a box."""
_WORD_AND_REASON = re.compile(
    rf"((?:{'|'.join(sorted(_VALUE_WORDS))}|no (?:real )?solutions?)\b)[\s,;:(—–]+"
    r"(?:because|since|as|due to)\b.*",
    re.DOTALL | re.IGNORECASE,
)
_OPTION_LINE = re.compile(
    r"^[ \t*_#>$(\[-]*(?:(?:option|choice) )?([A-J])(?:[*_$]*([)\].:])|[*_$ \t]*$)",
    re.MULTILINE | re.IGNORECASE,
)
"""A line that begins with the letter of an option and its sign, or is the letter alone."""
_REST_OF_LINE = re.compile(r".*\n(?:[ \t]*\n)*")
_NEXT_OPTION = re.compile(
    rf"(?:(?!\b(?:{REASON_WORDS}|so|which|not|than|unlike)\b).)*?(?<!\w)[(\[*_]{{0,4}}"
    r"([A-J])([)\]:]|(?<=[,;\d]\s[A-J])\.)(?=[*_$]*[ \t]+\S)"
)
"""The letter of an option in the same line, before which no reason begins."""
_REJECTED = re.compile(
    r"[*_$(\[]*(?:(?:option|choice) )?[A-J][)\].:,*_$]*\s+(?:[\d.,/]+\s+)?(?:"
    r"(?:is|was|would be|can be)\s+(?:\w+\s+)?"
    r"(?:wrong|incorrect|false|eliminated|excluded|ruled out)\b"
    r"|(?:(?:is|was|can|could|would)(?:n['’]t| not)|cannot|can['’]t)\s+(?:be\s+)?(?:the\s+)?"
    r"(?:right|correct|true|answer)\b"
    r"|does(?:n['’]t| not)\s+(?:work|satisfy|hold|fit)\b)",
    re.IGNORECASE,
)
"""A sentence that rejects an option: `A) is wrong`."""


def extract_answer(
    text: str, kind: AnswerKind | None = None, *, cut_off: bool = False
) -> str | None:
    r"""Return the answer that a text states: its last box, else its last "the answer is X",
    "Answer: X" or `#### X`. None if it states none; a last number is no answer.

    The text after the last `</think>` counts first, since it is the reply to the reader. If the
    reply states nothing, the thoughts count, as in a sample that was cut off within its thoughts.
    A reply that is nothing but a number, a formula or a letter to choose is an answer, too, unless
    it was cut off. The first item of a list, as in `1. First`, is none.
    Empty boxes are skipped, since they are the prompt's own words, and unclosed ones, since they
    were cut off. A box without braces, as in `\boxed 5`, needs a number. Boxes that commas, `and`
    or `or` join are one answer. Words are an answer in a box only. The time is linear in the
    length.

    Args:
        kind: for a choice, the last of these that states a letter counts first; else a first line
            as `B) 5` counts, unless it begins a list of options or rejects one. Without a kind, a
            statement of a letter counts before a box that holds a formula of more than numbers.
        cut_off: the text reached a limit of tokens. An answer without a box or tags then counts
            only if its sentence or line has ended: `the answer is 3` may have become `30`. Boxes
            count only if no comma, `and` or `or` behind them leads to another one.
    """
    thoughts, _, reply = text.rpartition("</think>")
    for part in (reply, thoughts):
        is_reply = part is reply
        found = _find_answer(part.lstrip(), kind, whole=is_reply, cut_off=cut_off and is_reply)
        if found:
            letter = _OPEN_LETTER.fullmatch(found)
            return letter[1] if letter else found
    return None


def _find_answer(text: str, kind: AnswerKind | None, *, whole: bool, cut_off: bool) -> str | None:
    end = _end_of_sentences(text) if cut_off else len(text)
    found = list(_candidates(text, end, whole=whole, cut_off=cut_off))
    if kind is AnswerKind.CHOICE:
        if not found and (line := _first_line(text, end, cut_off)):
            found = [line]
        found = [answer for answer in found if as_choice(answer)] or found
    elif kind is None and found and _is_formula(found[0]):
        found = [answer for answer in found[1:] if _CHOICE.fullmatch(answer)] or found
    return found[0] if found else None


def _end_of_sentences(text: str) -> int:
    """Return the last end of a sentence or of a line in a text that was cut off."""
    return max((match.end() for match in _ENDED.finditer(text) if match[1]), default=0)


def _candidates(text: str, end: int, *, whole: bool, cut_off: bool) -> Iterator[str]:
    """Yield the answers that a text states, from the most to the least explicit.

    Args:
        end: end of the part in which an answer without a box or tags counts.
    """
    for answer in (_tagged(text), _last_box(text, cut_off), _last_statement(text, end)):
        if answer:
            yield answer
    if whole and (bare := _bare_answer(text, end, cut_off)):
        yield bare


def _first_line(text: str, end: int, cut_off: bool) -> str | None:
    """Return the first line if it chooses an option, and neither begins a list of options nor
    rejects one. In a text that was cut off, another line has to follow.
    """
    line = text[:end].partition("\n")[0]
    if len(line) >= MAX_BARE or not as_choice(line) or _REJECTED.match(line):
        return None
    is_last = cut_off and not _WORD.search(text, len(line))
    return None if is_last or _begins_options(text, 0) else line.rstrip()


def _begins_options(text: str, begin: int, *, next_line: bool = False) -> bool:
    """Return True if a line is the first of a list of options, as in `A) 4` before `B) 5`.

    Args:
        next_line: only the next line, and no later one, may hold the second option.
    """
    option = _OPTION_LINE.match(text, begin)
    if option is None:
        return False
    rest = _REST_OF_LINE.match(text, option.end())
    if next_line:
        later = rest and _OPTION_LINE.match(text, rest.end())
    else:
        later = _OPTION_LINE.search(text, option.end())
    return any(
        ord(other[1].upper()) == ord(option[1].upper()) + 1
        and (other[2] == option[2] or other.end() == len(text))
        for other in (_NEXT_OPTION.match(text, option.end()), later)
        if other
    )


def _is_formula(answer: str) -> bool:
    """Return True for an answer with letters that is no choice."""
    return as_choice(answer) is None and bool(re.search(r"[a-zA-Z]", answer))


def _tagged(text: str) -> str | None:
    """Return what stands in the last `<answer>…</answer>`, unless the tags are the prompt's."""
    tags = deque(_TAG.finditer(text), maxlen=1)
    if not tags:
        return None
    content = tags[0][1]
    if chosen := _CHOICE.match(content.strip()):
        return tidy(chosen[0])
    return _last_box(content) or _last_statement(content, len(content)) or _value(tidy(content))


def _bare_answer(reply: str, end: int, cut_off: bool) -> str | None:
    """Return the entire reply if it is nothing but a number, a formula or a letter to choose, or a
    letter in its first line. A reply that was cut off is not entire.
    """
    if letter := _FIRST_LINE.match(reply, 0, end):
        return None if _begins_options(reply, 0) else letter[1]
    if cut_off or len(reply) > MAX_BARE or not _BARE.fullmatch(reply):
        return None
    return tidy(reply) or None


def _last_box(text: str, cut_off: bool = False) -> str | None:
    """Return the content of the box that begins last, of those that are closed and not empty,
    together with the boxes of the same list. None if the list was cut off.
    """
    boxes = deque(_boxes(text), maxlen=MAX_JOINED)
    if cut_off and boxes and _UNFINISHED.match(text, boxes[-1][1]):
        return None
    return _join(boxes, text) or None


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield beginning, end and content of the boxes, each with a later beginning than the last."""
    start = -1
    # The beginning of each open box, and that of its content; no match objects, since there may be
    # millions.
    open_braces: list[tuple[int, int]] = []
    for token in _TOKEN.finditer(text):
        if token["number"]:
            start = token.start("number")
            yield token.start(), token.end(), tidy(token["number"])
        elif token["box"] or token[0] == "{":
            open_braces.append((token.start(), token.end() if token["box"] else _NO_BOX))
        elif token[0] == "}" and open_braces:
            outside, begin = open_braces.pop()
            # An outer box ends later but begins earlier.
            if begin > start and _shows(content := tidy(text[begin : token.start()])):
                start = begin
                yield outside, token.end(), content


def _shows(content: str) -> bool:
    r"""Return False for a box without an answer: an empty one, and one with a sign that an answer
    is complete, as `\checkmark`.
    """
    return bool(plain(content) if len(content) < MAX_BETWEEN else content)


def _join(boxes: Iterable[tuple[int, int, str]], text: str) -> str:
    """Return the last of the boxes, with those before it that commas, `and` or `or` join to it."""
    joined: list[tuple[str, str]] = []
    last_end = 0
    for begin, end, content in boxes:
        between = None
        if joined and begin - last_end < MAX_BETWEEN:
            between = _NEXT_BOX.fullmatch(_FILLER.sub(" ", text[last_end:begin]))
        if between is None:
            before = _NAME_BEFORE.search(text, max(0, begin - 20), begin)
            joined = [(before[1] if before else "", content)]
        else:
            name = (between["name"] or "").rstrip(" =&")
            if (name, content) not in joined:
                joined.append((name, content))
        last_end = end
    names = {name for name, _ in joined}
    if len(joined) > 1 and len(names) == len(joined):
        # Different names: the values have an order.
        return ", ".join(f"{name}={content}" if name else content for name, content in joined)
    return ", ".join(content for _, content in joined)


def _last_statement(text: str, end: int) -> str | None:
    """Return the answer of the last lead that states one before the end, else the last option that
    is called correct. "No wait, it is 6" states one only behind another answer.
    """
    leads = deque(_STATEMENT.finditer(text, 0, end), maxlen=MAX_STATEMENTS)
    corrected = None
    for lead in reversed(leads):
        if answer := _read_statement(lead, end):
            if not lead["corrected"]:
                return corrected or answer
            corrected = corrected or answer
    if corrected and _CHOICE.match(text):
        return corrected
    options = deque(_CORRECT_OPTION.finditer(text, 0, end), maxlen=MAX_STATEMENTS)
    asserted = next((option for option in reversed(options) if _is_asserted(option)), None)
    return asserted[asserted.lastindex or 0] if asserted else None


def _is_asserted(option: re.Match[str]) -> bool:
    """Return True if nothing in its sentence denies or limits that an option is correct."""
    text, begin = option.string, option.start()
    before = _SENTENCE_END.split(text[max(0, begin - MAX_BARE) : begin])[-1]
    return not (_DOUBT.search(before) or _CONDITION.match(text, option.end()))


def _read_statement(lead: re.Match[str], end: int) -> str | None:
    """Return the answer that follows "the answer is"; None if a sentence about it, or a list of
    steps or options follows.
    """
    text = lead.string
    line = text.rfind("\n", lead.start(), lead.end()) + 1
    if line and (_ITEM.match(text, line) or _begins_options(text, line, next_line=True)):
        return None
    box = _BEGINS_WITH_EMPTY_BOX.match(text, lead.end(), end)
    stated = _STATED.match(text, box.end() if box else lead.end(), end)
    answer = tidy(stated[0]) if stated else ""
    if stated and (chosen := _CHOICE.match(stated[0])):
        return None if SECOND_LETTER.match(stated[0], chosen.end()) else tidy(chosen[0])
    if lead["choice"] or _is_about_a_box(answer):
        return None
    if lead["corrected"] and not _is_measured(answer):
        return None
    if lead["hashes"] and stated and _is_heading(stated, answer):
        return None
    return _value(answer)


def _is_measured(answer: str) -> bool:
    """Return True for a number with no more than a unit, or one counted thing."""
    number = read_number(without_name(answer))
    return number is not None and (number[1] is None or len(number[1].words) < 2)


def _is_heading(stated: re.Match[str], answer: str) -> bool:
    """Return True for a heading as `#### 2 cases` or `#### 2. Add` in the middle of a text; GSM8K's
    line `#### 5` is the last.
    """
    text, end = stated.string, stated.end()
    if _ITEM.match(text, stated.start()) or _HEADING.match(text, end):
        return True
    return bool(re.search(r"\s", answer) and text[end:].strip(" .*\n"))


def _value(answer: str) -> str | None:
    """Return an answer without a box, less the remark behind it; None if it is words alone."""
    if len(answer) > MAX_STATED or re.match(PRONOUN, answer) or _WRONG.search(answer):
        return None
    answer = re.sub(r"^(?:minus|negative)\s+\$?(?=[\d.\\])", "-", answer)
    answer = _WORD_AND_REASON.sub(r"\1", _result(without_reason(_settled(answer))))
    answer = _without_bracket(answer)
    for words in (answer, _REMARK.sub("", answer), _CALCULATION.sub("", answer)):
        if words and len(_WORD.findall(words)) <= MAX_WORDS and _is_value(words):
            return words
    return None


def _without_bracket(answer: str) -> str:
    """Return a number without the bracket behind it that says how it was found, as in
    `391 (17 times 23)` and `391 (17 * 23)`; any other answer as it is.
    """
    parts = _BRACKETS.fullmatch(answer)
    number = read_number(parts[1]) if parts else None
    if parts is None or number is None:
        return answer
    words = _WORD.findall(parts[2])
    if words or parts[2].startswith("="):
        kept = any(map(_NO_REMARK.fullmatch, words)) or bool(_DENIED.match(parts[2]))
    else:
        kept = _calculated(parts[2].partition("=")[0]) != number[0]
    return answer if kept else parts[1]


def _calculated(text: str) -> Fraction | None:
    """Return the value of a sum of products of numbers; None for any other text."""
    text = re.sub(r"\\(?:times|cdot)(?![a-z])|(?<=\d) ?x ?(?=\d)", "*", plain(text))
    text = re.sub(r"\\?\$|(?<=\d),(?=\d{3})|\s", "", text)
    if not re.fullmatch(rf"[-+]?{_TERM}(?:[-+]{_TERM})*", text):
        return None
    total = Fraction(0)
    for sign, term in re.findall(rf"([-+]?)({_TERM})", text):
        total += int(f"{sign}1") * math.prod(map(Fraction, term.split("*")))
    return total


def _result(answer: str) -> str:
    """Return the number that a calculation without names ends in, as in `10 + 5 = 15`; else the
    answer."""
    calculation = _CALCULATED.fullmatch(answer)
    return calculation[1] if calculation and read_number(calculation[1]) else answer


def _settled(answer: str) -> str:
    """Return the value of an answer that is stated twice, as in `2 + 3, which is 5`.

    A number stays, whatever is said of it, as in `12, which is 50%` and `12, which is 3 times 4`,
    unless it is denied. An expression gives way to a number behind it, but not to its rounding.
    After "or", numbers are one if they are equal.
    Any other answer, as `2 or 3` and a list, is returned as it is.
    """
    restated = _RESTATED.fullmatch(answer)
    if restated is None:
        return answer
    first, second = (
        tidy(re.sub(r"\\[()\[\]]", "", restated[side])) for side in ("first", "second")
    )
    second = tidy(_REMARK.sub("", without_reason(_settled(second))).rstrip(")"))
    number = read_number(second)
    if _is_single(first):
        if restated["otherwise"]:
            return first if number and _are_one(first, second) else answer
        return first if number or not _DENIED.match(restated["second"]) else answer
    if number is None or restated["said"]:
        return answer
    return second if not restated["otherwise"] and _gives(first, second, number[1]) else answer


def _is_single(answer: str) -> bool:
    """Return True for a number, also with its name, for a date and for a time of day."""
    value = read_value(answer)
    is_date = value.words[:1] == ("date",) or value.clock
    return bool(is_date or read_number(without_name(answer)))


def _gives(expression: str, number: str, unit: Unit | None) -> bool:
    """Return True if a number that is said to be an expression can be its value."""
    if not _OPERATOR.search(expression) or _COMPARED.search(without_name(expression)):
        return False
    if "." in number and "." not in expression:
        return False  # may be rounded
    # A noun of its own, as in `which is 2 factors`, counts something else.
    is_measured = unit is None or bool(unit.dimensions)
    return is_measured or set(_WORD.findall(number)) <= set(_WORD.findall(expression))


def _are_one(first: str, second: str) -> bool:
    """Return True if two numbers are surely equal."""
    equal = decide(read_value(first), read_value(second))
    if isinstance(equal, bool):
        return equal
    numbers = [read_number(side) for side in equal]
    return all(numbers) and equal_numbers(*(number[0] for number in numbers if number))


def _is_value(answer: str) -> bool:
    """Return True if an answer can be read as a value or a choice, and False for other words."""
    if re.search(r"[,;(—–]\s*[a-z][^\d\\$]*$", answer) and re.match(r"[^,;(]*\d", answer):
        return False
    value = read_value(answer)
    if not value.words:
        return bool(re.search(r"\d|\\|[=<>+^∅]|^\W*\w\W*$", answer)) or value.latex != plain(answer)
    return value.words[0] in ("date", "digits") or (
        value.words[-1] in _VALUE_WORDS and len(value.words) < 3
    )


def _is_about_a_box(answer: str) -> bool:
    """Return True if a statement echoes the prompt, or is a box that was cut off."""
    box = _EMPTY_BOX.search(answer)
    echoes = box and not re.search(r"\d", answer[: box.start()])
    cut_off = re.search(_BOX, answer) and answer.count("{") > answer.count("}")
    return bool(echoes or cut_off)


def answer_line(solution: str) -> str | None:
    """Return what follows the last `####` at the beginning of a line, as in the solutions of
    GSM8K; None if there is no such line or nothing follows.
    """
    lines = re.findall(r"^####[ \t]*(.*)$", solution, re.MULTILINE)
    return tidy(lines[-1]) or None if lines else None
