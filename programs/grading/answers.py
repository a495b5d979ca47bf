r"""The final answer that a chain of thought states, found in the text."""

import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from lim_sglang.programs.grading.boxes import (
    BOX,
    BOX_OR_BRACE,
    Box,
    denied_boxes,
    last_box,
    last_boxes,
    without,
)
from lim_sglang.programs.grading.corrections import FORMULA
from lim_sglang.programs.grading.denials import DOUBT, rules_out
from lim_sglang.programs.grading.kinds import (
    AnswerKind,
    as_choice,
    listed_letters,
    number_text,
)
from lim_sglang.programs.grading.last_line import last_letter, last_value, without_other_form
from lim_sglang.programs.grading.latex import tidy, with_ellipses
from lim_sglang.programs.grading.stated import (
    MAX_STATED,
    NAME,
    WORD,
    is_measured,
    listed,
    result,
    stated_value,
)
from lim_sglang.programs.grading.statements import (
    ASKED,
    ASKS,
    CHOICE,
    CHOOSE,
    MAX_BARE,
    ONLY,
    are_alike,
    begins_options,
    last_statement,
    sentence_before,
    unless_overruled,
)
from lim_sglang.programs.grading.texts import stated_text
from lim_sglang.programs.grading.told import told_value
from lim_sglang.programs.grading.values import read_number
from lim_sglang.programs.grading.withdrawals import is_taken_back

_MARKUP = re.compile(
    r"(?<![^\s(\[\"“:])([*_]{1,3})(?=[^\s*_])([^*_\n]{1,500})(?<=[^\s*_])\1(?![^\s.,;:!?)\]\"”])"
    r"|(?<!`)`([^`\n]{1,200})`(?!`)"
    r"|^```(?:text|txt|plaintext|latex|math|markdown)?[ \t]*\n([^`\n]{1,500})\n```[ \t]*$",
    re.MULTILINE,
)
"""Words in `_emphasis_`, in a span of code, or in a block of one line."""
_STRUCK_OR_CODE = re.compile(
    r"~~(?=\S)[^~\n]{1,200}(?<=\S)~~"
    r"|^[ \t]*+```(?:python|py|c|cpp|java|javascript|js|bash|sh)\d?\b(?:(?!^[ \t]*+```).)*+"
    r"^[ \t]*+```[ \t]*$",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
"""Words that are struck out, and a program."""
_HTML = re.compile(
    r"<(?:(?P<line>/?(?:p|div|li|h\d|br)\b)|/?(?:b|strong|i|em|u|span)\b)[^<>\n]{0,100}>",
    re.IGNORECASE,
)
_HTML_END = re.compile(r"</(?:p|div|li|h\d|b|strong|i|em|u|span)>", re.IGNORECASE)
"""The sign of HTML in a text; `a <b> c` may compare."""
_PRICE_BEFORE_CENTS = re.compile(
    r"\\?\$(\d+(?:,\d{3})*)"
    r"(?=(?:,? |\s*\\text\{\s*)(?:and|or)[\s}]+\d+\s*(?:\\text\{\s*)?cents?\b)"
)
"""A price whose sign begins no formula: `$12 and 50 cents`."""
_TWO_UNITS = re.compile(r"\$(\d[\d.,]*)\$( [a-z]+,? and )\$(\d[\d.,]*)\$(?= [a-z])")
"""One quantity in two formulas: `$3$ hours and $20$ minutes`."""
_LAST_BLOCK = re.compile(r"(?:\A|(?P<before>[^\n]*)\n\s*)```[ \t]*\n([^`\n]{1,100})\n```\s*\Z")
"""A block of one line at the end of a reply, and the line before it."""
_NO_RESULT = re.compile(
    r"\b(?:input|example|sample|check|test|try|instance|not|if|wrong|incorrect)\b", re.IGNORECASE
)
"""Words before a block that make its content no result."""
_TAG = re.compile(r"<answer>((?:(?!</?answer).){1,2000})</answer>", re.DOTALL | re.IGNORECASE)
_THUS = r"(?:therefore|thus|hence|so|consequently)\b[,:]?\s*"
_TO_THE_END = r"(?:[^\n.?!]|\.(?=\d))+?"
_CLOSING = re.compile(
    rf"(?:\A|[.!?][*_]*\s|\n)[\s*_]*(?:(?:{_THUS})?(?:the )?(?:only |real |two |three )*"
    rf"(?:solutions|roots)(?:{ASKED})? are:?\s*(?P<several>{_TO_THE_END})"
    rf"|(?:{_THUS})?(?:(?:the|my|our|final|end)\s+)*(?:ans\.|(?:ans|result)\b[*_]*\s*(?:is\b|[:=])"
    r"|(?:only|unique)\s+(?:real\s+|integer\s+|positive\s+)?solution(?:\s+is\b|:)"
    r"|(?:total|solution)[*_]*:)[\s*_]*"
    rf"(?P<result>{FORMULA}|{_TO_THE_END})"
    rf"|(?<![^\n*_])(?P<line>(?-i:A)[*_]*:[\s*_]*{_TO_THE_END}"
    rf"|(?:\$\$?|\\[\[(])?\s*[a-zA-Z]\s*(?:\+\s*[a-zA-Z]\s*){{1,4}}={_TO_THE_END})"
    rf"|(?:{_THUS})?(?P<calculated>[-+(\d$](?:[^\n.?!;:]|[.](?=\d)){{1,80}}\s(?:is|equals)\s"
    rf"(?:equal to\s)?(?=[-+$\\\d]){_TO_THE_END})"
    rf"|{_THUS}(?:we (?:get|have|find|obtain|see)(?: that)?:?\s*)?"
    rf"(?P<value>{FORMULA}|{_TO_THE_END}))(?<![,;:])[\s.*_]*\Z",
    re.IGNORECASE,
)
"""The last sentence of a reply: `Therefore, x = 42.`, `The solutions are 1 and 3.`, `Ans: 5`, `6
times 7 is 42.`, or a last line `A: 5` or `m + n = 42`."""
_LAST_SENTENCE = re.compile(r"[.!?:][*_]*\s|\n")
"""End of a sentence, of an introduction with a colon or of a line, before the last sentence."""
_CONCLUDED = re.compile(
    rf"[\s*_#>-]*(?:(?:{_THUS}|(?:in\s+(?:conclusion|total|all)|finally|altogether|overall"
    r"|as\s+a\s+result|it\s+follows\s+that|(?:this|that)\s+(?:means|implies|shows)(?:\s+that)?"
    r"|(?:we|I)\s+(?:conclude|find)\s+that)\b,?\s*)+"
    r"(?:(?:we|I)\s+(?:conclude|find|get|see|obtain)\s+that\s+)?"
    r"|(?=the\s+(?:final\s+)?(?:solution|result)\s+is\s"
    r"|[^\d$\\\n]{3,80}\s(?:is|are|equals|has|have)\s(?:therefore|thus|hence)\s))"
    r"(?!\s*(?:its|this|that|these|those|their|you|I)\b)(?!.*\banswers?\b)"
    r"(?!\s*we\s(?!(?:will |would )?need\b))(?P<it>it\s)?",
    re.IGNORECASE,
)
"""The beginning of a last sentence that concludes, as in `So she has 5 apples left.`"""
_TAKES = re.compile(r"(?:(?:will|would) )?(?:takes?|took|costs?|needs?|requires?)\b")
_NAMES = rf"{NAME}(?:\s*[-+]\s*{NAME}){{0,4}}"
_OTHER_OPTION = re.compile(r"^[ \t*_]*[B-J][*_]*[:.)]", re.MULTILINE)
_SILENT_END = re.compile(
    r"(?:\s*(?:</s>|<\|\w{1,30}\|>|<(?:eos|end_of_turn)>)|\s[:;]-?\)"
    r"|(?<=[.!*_])\s+[*_]{0,3}(?:This|That|It)(?:['’]s| is) (?:the|my|our) (?:final )?answer"
    r"[.!*_]*)+\s*\Z"
)
"""Tokens that end a reply, a smiley, and a sentence that calls the one before the answer."""
MOST_CHATTER = 2
"""Last sentences that may speak to the reader."""
_CHATTER = re.compile(
    r"(?<=[.!?*_)$])\s+(?!(?:but|however|wait|no|so|thus|hence|therefore)\b)"
    r"(?!\w[^\n]*\b(?:check|verif\w+|actually|wrong|incorrect|mistake|not\s+sure|unsure|(?-i:[B-HJ]))\b)"
    r"[A-Z](?=[^.!?\n]*\b(?:you|your|me|hope|luck|question|done|thanks|welcome|enjoy|happy)\b)"
    r"[^.!?\n$\\\d]{3,150}[.!?]+[^\w\n]*\Z",
    re.IGNORECASE,
)
"""A last sentence to the reader, without a number, a formula or a letter: `Hope this helps you!`"""
_OPTION = r"(?-i:[(\[]?[A-J][)\]]?|\([a-j]\))"
"""The letter of an option; a small one needs its brackets."""
_LEAVES = (
    r"(?:(?:(?:that|this|which)\s+leaves|leaving)(?:\s+us)?(?:\s+(?:only|just|with))*"
    r"|we(?:['’]re|\s+are)\s+left\s+with(?:\s+(?:only|just))?)"
    r"(?:\s+(?:one|a\s+single)\s+(?:option|choice|possibility):)?"
)
"""Words before the last option that is not ruled out."""
_THE_RIGHT_ONE = (
    r"(?:the|our|my)\s+(?:(?!(?:not|wrong|incorrect|false|impossible|invalid|un\w+|worst|weak\w+|least"
    r"|(?:reject|exclud|eliminat|discard)\w+|next|other)\b)\w+\s+){0,3}"
    r"(?:answer|option|choice|possibility|one)(?:\s+(?:left|remaining))?"
)
"""Words for an option that is chosen: `the only remaining option`."""
_CHOOSING = (
    rf"(?:{CHOOSE}|choose|pick|select|go\s+with|I\s+(?:think|believe)(?:\s+it(?:['’]s|\s+is))?"
    rf"|by\s+(?:\w+\s+of\s+)?elimination,?(?:\s+(?:it(?:['’]s|\s+is|\s+must\s+be)|{_LEAVES}))?"
    rf"|{_LEAVES}"
    r"|(?:ans\b\.?|result|(?:my|the)\s+(?:choice|pick)(?:\s+is)?)[*_]*:?)"
)
_CLOSING_CHOICE = re.compile(
    rf"(?:(?:\A|[.!][*_]*\s|\n)[\s*_]*(?:(?={_THUS})|(?={_CHOOSING}))"
    rf"|,\s+(?={_THUS}|which leaves|(?P<leaving>leaving|we(?:['’]re|\s+are)\s+left\b)))"
    rf"(?:{_THUS}(?!I\W*\Z)(?:it(?:['’]s|\s+is|\s+must\s+be)[\s*_]+)?)?(?:{_CHOOSING}[\s*_]+)?[*_]*"
    rf"(?:(?:option|choice|answer)\s+)?(?P<option>{_OPTION})"
    rf"(?:[*_]*(?:\s+as\s+{_THE_RIGHT_ONE}|,\s+(?:which\s+is\s+)?{_THE_RIGHT_ONE}"
    r"|,\s+which\s+is\s+(?:correct|right|true)))?[\s.!*_]*\Z",
    re.IGNORECASE,
)
"""The last sentence of a reply that chooses: `Choose (D)`, `I think B`, `A is wrong, so B.`,
`Hence D.`, `By elimination, D.`"""
_NOUN = r"option|choice|statement|one|answer"
_SURELY = r"(?:therefore|thus|hence|then|clearly|indeed)"
_CLOSING_TRUE = re.compile(
    rf"(?:\A|[.!][*_]*\s|\n)[\s*_]*(?P<so>(?:(?:{_THUS}|clearly,?\s+|finally,?\s+)+))?(?P<only>only\s+)?"
    r"(?:(?:(?:the\s+)?(?:option|choice|statement|answer)\s+|(?(so)|(?(only)|(?!))))"
    rf"[*_$]*(?P<option>{_OPTION})[*_$]*\s+is\s+(?:{_SURELY}\s+)?"
    rf"(?:the\s+)?(?:only\s+)?(?:true|correct|right)(?:\s+(?:{_NOUN}))?"
    rf"|the\s+(?:only\s+)?(?:true|correct|right)\s+(?:{_NOUN})\s+is\s+(?:{_SURELY},?\s+)?"
    rf"(?:(?:option|choice|statement)\s+)?[*_$]*(?P<one>{_OPTION}))[\s.!*_$]*\Z",
    re.IGNORECASE,
)
"""The last sentence of a reply: `So, statement C is true.`"""
_ALSO_TRUE = re.compile(
    r"(?<![a-zA-Z])([A-J](?=[)\]*_$]*\s)|(?<=\()[a-hj](?=\)))[)\]*_$]*\s+is\s+"
    r"(?:(?:also|therefore|thus|clearly)\s+)?(?:true|correct)\b"
)
_ENDED = re.compile(
    r"^[#>*_ \t-]*(?:\d+|[A-Ja-j])\.(?=[\s*_])"
    r"|((?:[.!?](?=\s)|(?<![,;])(?<![,;] )(?<!\bor)(?<!\band)\n))",
    re.MULTILINE,
)
"""The end of a sentence or of a line, as group; a number or a letter that begins an item of a list
is none, nor is the end of a line that goes on behind a comma."""
_BARE = re.compile(
    rf"\s*\**\s*(?:(?:[a-zA-Z]\s*=\s*)?[-+]?\$?\d[\d,./]*\s*%?|0(?:x[\da-fA-F]+|b[01]+)"
    rf"|[-+−]?(?:∞|(?:\d+|[a-zA-Z])[⁰¹²³⁴-⁹]+)|\(?[A-J]\)?|{FORMULA})\s*\.?\s*\**\s*",
    re.DOTALL,
)
_FIRST_LINE = re.compile(r"\s*[*_$(\[]*([A-J])[)\]*_$.:]*[ \t]*\n")
"""A reply that begins with nothing but a letter in its first line."""
_CHOSEN = re.compile(
    r"(?<![a-zA-Z])([A-Ja-j])(?![a-zA-Z])(?:[)\]*_$.:]*\s+-?\d[\d,/]*(?:\.\d+)?"
    r"|[)\]*_$]*\s+is\s+(?:(?:the|my)\s+)?"
    r"(?:(?:final|correct|right|answer|option|choice|one)\b ?)+)?"
)
"""A letter in a line, with the number of its option or with words that choose it."""
_ASKED = re.compile(r"[^\w.!]*\?")
"""The sign of a question behind a letter; words between are those of its option."""
_OPEN_LETTER = re.compile(r"(?:\\text\{)?([A-Ja-j])\s*[)\].:]+\}?")
"""The letter of an option with the sign behind it, as a list of options has it: `D)`."""
_CHANGES_MIND = re.compile(
    r"\b(?:wait|actually|hold\s+on|on\s+second\s+thought)\b.*(?<![a-zA-Z])[(*]{0,3}[A-J](?![a-zA-Z])",
    re.IGNORECASE,
)
"""Words of a line by which a letter takes the place of the first one."""
_REJECTED = re.compile(
    r"[*_$(\[]*(?:(?:option|choice) )?[A-J][)\].:,*_$]*\s+(?:[\d.,/]+\s+)?(?:"
    r"(?:is|was|would be|can be)\s+(?:\w+\s+)?"
    r"(?:wrong|incorrect|false|eliminated|excluded|ruled out)\b"
    r"|(?-i:is|was)(?:n['’]t| not)\s"
    r"|(?:(?:can|could|would)(?:n['’]t| not)|cannot|can['’]t)\s+(?:be\s+)?(?:the\s+)?"
    r"(?:right|correct|true|answer)\b"
    r"|does(?:n['’]t| not)\s+(?:work|satisfy|hold|fit)\b)",
    re.IGNORECASE,
)
"""A sentence that rejects an option: `A) is wrong`, `B) is not prime`."""


def extract_answer(
    text: str, kind: AnswerKind | None = None, *, cut_off: bool = False
) -> str | None:
    r"""Return the answer that a text states: its last box, else its last "the answer is X",
    "X is the answer", "Answer: X" or `#### X`. None if it states none; a last number is no answer.

    The text after the last `</think>` counts first, since it is the reply to the reader. The
    thoughts count where no reply follows, or one that was cut off before it states an answer.
    A reply that is nothing but a number, a formula, a letter to choose, or a calculation with its
    result is an answer, too, unless it was cut off. So are the last sentence `Therefore, x = 42.`,
    `Ans: 42`, `6 times 7 is 42` or, for a choice, `Choose (D)` or `Hence D`, a number in a block of
    code, an object of JSON, `{"answer": 42}`, a letter or a number in bold alone in its line,
    `**42**`, and `so I'm going with 42` at the end of a reply that states nothing else. The first
    item of a list, as in `1. First`, is none. Empty boxes are skipped, since they are the prompt's
    own words. A box without braces, as in `\boxed 5`, needs a number. Boxes that commas, `and` or
    `or` join are one answer. Words are an answer in a box only. A box gives way to a later
    statement of another answer, as `Final answer: 8`, `No, 8.` or `I change my answer to 8.`, and
    is none if the words beside it deny it, as in `\boxed{7} is wrong` and `I reject \boxed{7} since
    it is odd`. The same holds for `<answer>7</answer>`, which counts before a box. A question that
    the text does not affirm, as `Is it 7?`, and a sentence about another case, as `If order
    mattered, the answer would be 7`, state nothing. A stated answer is taken back by a later
    statement that denies it, that cannot be read or that has not ended, and any by an unclosed box,
    unless these begin with the same value; and by a check that finds another value in its place, as
    `Check: 3*5 = 15, not 12.` Programs in blocks of code and words struck out state nothing.
    The time is linear in the length.

    Args:
        kind: for a choice, the last of these that states a letter counts first; else a first line
            as `B) 5` counts, unless it begins a list of options or rejects one. Without a kind, a
            statement of a letter counts before a box that holds a formula of more than numbers.
            A text is read by `stated_text`.
        cut_off: the text reached a limit of tokens. An answer without a box or tags then counts
            only if its sentence or line has ended: `the answer is 3` may have become `30`. Boxes
            count only if no comma, `and` or `or` behind them leads to another one.
    """
    if end := _SILENT_END.search(text, max(0, len(text) - MAX_BARE)):
        text = text[: end.start()]
    if kind is AnswerKind.TEXT:
        return stated_text(text, cut_off=cut_off)
    thoughts, _, reply = text.rpartition("</think>")
    for part in (reply, thoughts) if cut_off or not reply.strip() else (reply,):
        is_reply = part is reply
        found = _find_answer(part.lstrip(), kind, whole=is_reply, cut_off=cut_off and is_reply)
        if found is not None:
            if (begun := _unclosed_box(text)) and not are_alike(found, begun):
                return None
            letter = _OPEN_LETTER.fullmatch(found)
            return letter[1] if letter else found or None
    return None


def _unclosed_box(text: str) -> str | None:
    """Return what stands in the last box if it is not closed; None if it is."""
    box = None
    depth = 0
    for token in BOX_OR_BRACE.finditer(text):
        if token["box"]:
            box, depth = token.end(), 1
        elif token[0] in "{}":
            depth += 1 if token[0] == "{" else -1
            if depth == 0:
                box = None
    return None if box is None else tidy(text[box : box + MAX_STATED])


def _find_answer(text: str, kind: AnswerKind | None, *, whole: bool, cut_off: bool) -> str | None:
    """Return the answer that a part of a text states; empty if its last one cannot be read."""
    marked, text = text, _unmarked(text)
    end = _end_of_sentences(text) if cut_off else len(text)
    stated = list(_candidates(text, end, whole=whole, cut_off=cut_off))
    found = [answer for answer in stated if answer]
    if kind is AnswerKind.CHOICE:
        if not found:
            line = _first_line(text, end, cut_off)
            if line is None and whole and not cut_off:
                plain = _without_chatter(text)
                line = _last_object(marked) or _closing_choice(plain) or _closing_true(plain)
                line = line or last_letter(_without_chatter(marked))
            found = [line] if line else []
        several = listed_letters(found[0]) if found else ()
        found = [
            answer for answer in found if (letter := as_choice(answer)) and letter not in several
        ] or found
    elif not found and whole and not cut_off:
        if (plainer := without_other_form(marked)) != marked:
            return _find_answer(plainer, kind, whole=whole, cut_off=cut_off)
        closing = _last_block(marked) or _last_object(marked)
        closing = closing or _closing_answer(_without_chatter(text))
        closing = closing or (None if stated else last_value(_without_chatter(marked)))
        found = [closing] if closing else []
    elif kind is None and found and _is_formula(found[0]):
        found = [answer for answer in found[1:] if CHOICE.fullmatch(answer)] or found
    return found[0] if found else ("" if stated else None)


def _unmarked(text: str) -> str:
    """Return a text without programs, words that are struck out, the signs of Markdown and HTML
    around emphasised words and short code, and those of dollars and formulas within a quantity in
    two units.
    """
    text = with_ellipses(_STRUCK_OR_CODE.sub("", text))
    if _HTML_END.search(text):
        text = _HTML.sub(lambda found: "\n" if found["line"] else "", text).lstrip()
    text = _MARKUP.sub(lambda found: found[2] or found[3] or found[4], text)
    return _TWO_UNITS.sub(r"\1\2\3", _PRICE_BEFORE_CENTS.sub(r"\1 dollars", text))


def _last_block(reply: str) -> str | None:
    """Return the number that the last block of a reply holds, if nothing follows the block."""
    block = _LAST_BLOCK.search(reply, max(0, len(reply) - MAX_BARE))
    if block is None or _NO_RESULT.search(block["before"] or ""):
        return None
    value = tidy(block[2])
    return value if is_measured(value) else None


def _last_object(reply: str) -> str | None:
    """Return the number or the letter that the object of JSON at the end of a reply calls its
    answer.
    """
    begin = max(0, len(reply) - MAX_STATED)
    for line in re.finditer(r"^[ \t]*\{", reply[begin:], re.MULTILINE):
        with suppress(ValueError, RecursionError):
            holds = json.loads(reply[begin + line.start() :].rstrip("` \n"))
            value = holds.get("answer", holds.get("final_answer"))
            text = value if isinstance(value, str) else number_text(value) or ""
            return text if is_measured(text) or as_choice(text) else None
    return None


def _closing_choice(reply: str) -> str | None:
    """Return the letter that the last sentence of a reply chooses, unless something limits that."""
    closing = _CLOSING_CHOICE.search(reply, max(0, len(reply) - MAX_BARE))
    if closing is None:
        return None
    before = sentence_before(reply, closing.start() + 2)
    is_clause = closing[0].startswith(",")
    if DOUBT.search(ONLY.sub("", before) if is_clause else before):
        return None
    if closing["leaving"] and not rules_out(before):
        return None
    return closing["option"].strip("()[]").upper()


def _closing_true(reply: str) -> str | None:
    """Return the letter of the statement that the last sentence of a reply calls true, unless the
    reply calls another one true.
    """
    closing = _CLOSING_TRUE.search(reply, max(0, len(reply) - MAX_BARE))
    if closing is None:
        return None
    letter = (closing["option"] or closing["one"]).strip("()[]").upper()
    return letter if {each.upper() for each in _ALSO_TRUE.findall(reply)} <= {letter} else None


def _end_of_sentences(text: str) -> int:
    """Return the last end of a sentence or of a line in a text that was cut off."""
    return max((match.end() for match in _ENDED.finditer(text) if match[1]), default=0)


def _candidates(text: str, end: int, *, whole: bool, cut_off: bool) -> Iterator[str]:
    """Yield the answers that a text states, from the most to the least explicit; empty is one that
    cannot be read or is taken back.

    Args:
        end: end of the part in which an answer without a box or tags counts.
    """
    tagged = _tagged(text)
    denied_tags = denied_boxes(tagged, text)
    in_tags = None
    if tagged:
        _, behind, content = tagged[0]
        in_tags = "" if denied_tags else unless_overruled(content, behind, text, end)
        text = text if in_tags else without(tagged, text)
    boxes = last_boxes(text)
    denied = denied_boxes(boxes, text)
    boxed = last_box(boxes, denied, text, cut_off)
    in_box = boxed and unless_overruled(*boxed, text, end)
    given = sorted([*denied, *denied_tags])
    for answer in (in_tags, in_box, last_statement(without(denied, text), end, given)):
        if answer is not None:
            yield answer
    if whole and (bare := _bare_answer(text, end, cut_off)):
        yield bare


def _first_line(text: str, end: int, cut_off: bool) -> str | None:
    """Return the first line if it chooses an option, and neither begins a list of options, nor
    rejects one, nor asks. In a text that was cut off, another line has to follow.
    """
    line = text[:end].partition("\n")[0]
    if len(line) >= MAX_BARE or not as_choice(line) or last_boxes(line):
        return None
    if _REJECTED.match(line):
        return None
    is_last = cut_off and not WORD.search(text, len(line))
    if _CHANGES_MIND.search(line):
        return None
    chosen = as_choice(line)
    letter = next((each for each in _CHOSEN.finditer(line) if each[1].upper() == chosen), None)
    if letter and (ASKS if " is " in letter[0] else _ASKED).match(line, letter.end()):
        return None
    sentence = _ENDED.search(text, letter.end(1)) if letter else None
    ends = [letter.end()] if letter else []
    if sentence and re.match(r"\W*(?:\w+ ){0,3}answer\b", line, re.IGNORECASE):
        ends.append(sentence.start())
    if letter and any(is_taken_back(text, each, letter[1]) for each in ends):
        return None
    return None if is_last or begins_options(text, 0) else line.rstrip()


def _is_formula(answer: str) -> bool:
    """Return True for an answer with letters that is no choice."""
    return as_choice(answer) is None and bool(re.search(r"[a-zA-Z]", answer))


def _tagged(text: str) -> list[Box]:
    """Return the last `<answer>…</answer>` with the answer in it, unless the tags are the
    prompt's.
    """
    tags = deque(_TAG.finditer(text), maxlen=1)
    return [(tag.start(), tag.end(), answer) for tag in tags if (answer := _in_tags(tag[1]))]


def _in_tags(content: str) -> str | None:
    """Return the answer that stands between tags."""
    if chosen := CHOICE.match(content.strip()):
        return tidy(chosen[0])
    end = len(content)
    boxes = last_boxes(content)
    boxed = last_box(boxes, denied_boxes(boxes, content), content)
    in_box = boxed and unless_overruled(*boxed, content, end)
    answer = in_box or last_statement(content, end) or stated_value(tidy(content))
    return answer or told_value(content, plainly=True)


def _bare_answer(reply: str, end: int, cut_off: bool) -> str | None:
    """Return the entire reply if it is nothing but a number, a formula or a letter to choose, the
    result of a reply that is a calculation, or a letter in its first line. A reply that was cut off
    is not entire.
    """
    if letter := _FIRST_LINE.match(reply, 0, end):
        if is_taken_back(reply, letter.end(1), letter[1]):
            return None
        return None if begins_options(reply, 0) else letter[1]
    if cut_off or len(reply) > MAX_BARE:
        return None
    bare = tidy(reply)
    if re.search(rf"{BOX}\s*\{{", bare):
        return None
    value = bare if "\n" in bare else result(bare)
    return value if value != bare or _BARE.fullmatch(reply) else None


def _without_chatter(reply: str) -> str:
    """Return a reply without the last sentences that speak to the reader and state nothing, as `Let
    me know if you have questions.`
    """
    for _ in range(MOST_CHATTER):
        if chatter := _CHATTER.search(reply, max(0, len(reply) - MAX_BARE)):
            reply = reply[: chatter.start()]
    return reply


def _closing_answer(reply: str) -> str | None:
    """Return the number, or the solutions, which the last sentence of a reply states, as in
    `Therefore, x = 42.` and `So she has 5 apples left.`
    """
    return _closing_value(reply) or _told_at_end(reply)


def _told_at_end(reply: str) -> str | None:
    """Return the only number of a last sentence that concludes something of a named subject."""
    end = reply[-MAX_BARE:].rstrip()
    sentence = _LAST_SENTENCE.split(end.rstrip(".!*_"))[-1]
    concluded = _CONCLUDED.match(sentence)
    if concluded is None or end.endswith(("?", ":")) or DOUBT.search(sentence):
        return None
    told = told_value(f"{concluded['it'] or ''}{sentence[concluded.end() :]}")
    number = read_number(told) if told and concluded["it"] else None
    is_measured = number and number[1] and number[1].dimensions
    # "It" may be any thing named before, unless it is measured, takes or costs something.
    return (
        told
        if is_measured or not concluded["it"] or _TAKES.match(sentence, concluded.end())
        else None
    )


def _closing_value(reply: str) -> str | None:
    """Return the number that a name equals or a calculation ends in, or the solutions, which the
    last sentence of a reply states.
    """
    closing = _CLOSING.search(reply, max(0, len(reply) - MAX_BARE))
    if closing is None:
        return None
    if closing["several"]:
        return listed(closing["several"])
    words = closing["result"] or closing["line"] or closing["calculated"] or closing["value"]
    answer = re.match(r"A[*_]*:[\s*_]*", words) if closing["line"] else None
    if answer and _OTHER_OPTION.search(reply):
        return None
    words = words[answer.end() if answer else 0 :]
    if closing["calculated"]:
        words = re.sub(r"\s(?:is|equals)\s(?:equal to\s)?", " = ", words, count=1)
    stated = tidy(re.sub(r"(?<!\\)\$|\\[\[\]()]", "", words))
    equation = re.fullmatch(rf"{_NAMES}\s*=(.*)", stated, re.DOTALL)
    value = result(equation[1].strip() if equation else stated)
    concluded = read_number(value) if closing["value"] else None
    is_counted = concluded and concluded[1] and not concluded[1].dimensions
    is_stated = equation or closing["result"] or answer or value != stated
    is_stated = is_stated or (concluded and not is_counted)
    return value if is_stated and "=" not in value and is_measured(value) else None


def answer_line(solution: str) -> str | None:
    """Return what follows the last `####` at the beginning of a line, as in the solutions of
    GSM8K; None if there is no such line or nothing follows.
    """
    lines = re.findall(r"^####[ \t]*(.*)$", solution, re.MULTILINE)
    return tidy(lines[-1]) or None if lines else None
