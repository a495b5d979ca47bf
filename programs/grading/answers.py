r"""The final answer that a chain of thought states, found in the text."""

import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction

from lim_sglang.programs.grading.boxes import BOX, BOX_OR_BRACE, TAKEN_BACK, last_box
from lim_sglang.programs.grading.kinds import (
    CONDITIONS,
    PRONOUN,
    REASON,
    SECOND_LETTER,
    AnswerKind,
    as_choice,
    listed_letters,
    number_text,
    without_name,
)
from lim_sglang.programs.grading.latex import tidy
from lim_sglang.programs.grading.stated import (
    ASSERTED,
    MAX_STATED,
    NAME,
    WORD,
    are_one,
    is_denied,
    is_measured,
    listed,
    result,
    stated_value,
)
from lim_sglang.programs.grading.units import Unit
from lim_sglang.programs.grading.values import REASON_WORDS, read_number

MAX_BARE = 200
"""Longest reply, in characters, that may be nothing but an answer."""
MAX_STATEMENTS = 100
"""Statements that are looked at, from the end of the text: a limit of the time."""

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
_BEGINS_WITH_EMPTY_BOX = re.compile(
    rf"[ \t$]*{BOX}\s*\{{\s*\}}[ \t$]*"
    r"(?:[=:]?[ \t$]*(?=[-+\d\\(\[{]|[A-J]\b)"
    r"|\n\s*(?=[-+$]*[\d.,/]+[$ \t]*$|\(?[A-J]\)?\s*$))",
    re.MULTILINE,
)
"""An empty box before a value: "the answer is \\boxed{} 32", or a value alone in the next line."""
_EMPTY_BOX = re.compile(rf"{BOX}\s*(?:\{{\s*\}}|$)")
"""An empty box in a statement: the prompt's own words, "put your answer within \\boxed{}"."""
_IS = (
    r"(?:is|must be|should be|would be|will be|equals)\b\s*"
    r"(?:(?:therefore|thus|then|hence|simply|exactly|just|indeed|clearly|actually|really|still"
    r"|in fact|approximately|about|probably|likely|roughly|around)\b,?\s*)?:?"
)
_FORMULA = (
    r"(?:\$\$[^$]{1,500}\$\$|\$(?!\s)[^$]{1,500}(?<!\s)\$(?!\d)"
    r"|\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\])"
)
_PROBLEM = (
    r"(?:the|this|our|your)\s+(?:(?:given|original|whole|entire|above)\s+)?"
    r"(?:question|problem|exercise|task|puzzle|riddle|equation|calculation|expression)\b"
)
_OPERAND = r"[-+(]?(?:\d[\d.,]*+|[a-z](?![a-z]))[a-z\d)%!]*+"
_BETWEEN_OPERANDS = (
    r" {0,2}(?:[-+*/×·÷−^=]|\\(?:times|cdot|div)(?![a-z])"
    r"|(?:times|plus|minus|divided by|multiplied by|over|of|mod(?:ulo)?)\b) {0,2}"
)
_CALCULATION_ASKED = (
    rf"(?:{_FORMULA}|how (?:many|much) [^\n.,;:?!]{{1,80}}?"
    rf"|{_OPERAND}(?:{_BETWEEN_OPERANDS}{_OPERAND}){{1,20}})"
)
_ASKED = (
    rf"\s+(?:to|of|for)\s+(?:{_PROBLEM}(?:\s+(?:of\s+)?{_CALCULATION_ASKED})?"
    rf"|{_CALCULATION_ASKED})[*_]*+"
)
"""The question or a calculation behind "the answer", as in `to the question` and `to 2 + 3`; no
part of the question."""
_NAMED = (
    r"(?:is|must be)\s+(?:(?:therefore|thus|hence|then|indeed|clearly)\s+)?(?:the|my|our)\s+"
    rf"(?:(?:final|correct|right|only)\s+)*answer\b(?:\s+to\s+{_PROBLEM})?"
    r"(?=[*_]{0,4}(?:[.!](?:[\s*_]|\Z)|\s*(?:\n|\Z)"
    r"|,?\s+(?:because|since|as(?!\s+(?:long|far|soon|if|though)))\b))"
)
"""Words behind a value that end a sentence, as in `42 is the answer.`"""
_ENDS_SENTENCE = r"(?:[.!](?=\s|\Z)|\s*(?:\n|\Z))"
_VALUE_ALONE = (
    r"(?:[*_]*(?-i:\(?[A-J]\)?)|(?:[a-z]\s*=\s*)?[-+$*_]*\d[\d.,/]*"
    r"(?:\s+(?!(?:less|more|fewer|times|too|left)\b)[a-z]+)?\$?)[*_]*\)?" + _ENDS_SENTENCE
)
_CORRECTING = (
    r"wait|actually|correction|sorry|oops|scratch that|rather|I mean"
    r"|I made an? (?:\w+ )?(?:mistake|error)"
    r"|(?:that|this)(?:['’]s| is) (?:wrong|incorrect|not right)"
)
_STATEMENT = re.compile(
    # GSM8K's `#### 5`, a heading "Final Answer" with the answer below, "the answer is 5".
    r"^(?P<hashes>####)[ \t]*(?=(?:[a-z] *= *)?[^\s\d]*\d)"
    r"|^[#*_ \t]*+(?:the )?(?:final |correct )?answer[*_ \t]*+:?[*_ \t]*+\n\s*"
    r"(?:[-*+•][ \t]+)?"
    rf"|\banswer[*_]*+(?P<asked>{_ASKED})?\s*+(?:{_IS}|:|=)[\s*_]*"
    r"(?:(?:option|choice|letter)\b[\s*_]*)?"
    rf"|(?P<several>\banswers(?:{_ASKED})?\s+are\b:?[\s*_]*)|\b(?P<named>{_NAMED})"
    rf"|\b(?P<choice>(?:correct|right|best|final|my) (?:option|choice|letter)[*_]*+\s*+"
    rf"(?:{_IS}|:)[\s*_]*"
    r"|^[#*_ \t]*+(?:option|choice)[*_]*:[ \t*_]*)"
    # "Correction: 13.", "Actually C."
    rf"|\b(?P<final>(?:correction\s*[:—–]|actually,?)\s*(?={_VALUE_ALONE}))"
    # "No wait, it is B." and "No, 13.", behind another answer.
    rf"|\b(?P<corrected>(?:{_CORRECTING}|(?<!\?[ \n])no)\b[\s,.:;!—–-]*"
    rf"(?:(?:{_CORRECTING}|no)\b[\s,.:;!—–-]*){{0,3}}"
    rf"(?:(?:it(?:['’]s|\s+(?:is|should be|must be))\b|I meant?\b)[\s,:*_]*(?:actually\s+)?"
    rf"|(?<=[,.:;!—–-])\s*(?={_VALUE_ALONE})))",
    re.IGNORECASE | re.MULTILINE,
)
_BEFORE_OVERRULING = re.compile(
    r"(?:[\s*_#>.:;,—–-]|\b(?:so|thus|hence|therefore|then|and|but|actually|wait|no|sorry|oops"
    r"|in fact|correction|the|my|our|final|correct|right|real|true|actual|only|that|means"
    r"|it follows|we|I|conclude|find)\b)*+",
    re.IGNORECASE,
)
"""The beginning of a sentence whose statement overrules a box before: nothing limits it."""
_ROUGHLY = re.compile(r"\b(?:would|approximately|about|roughly|around)\b", re.IGNORECASE)
_HEADING_ABOUT = re.compile(
    r"\b(?:(?:double[- ]?)?check(?:s|ed|ing)?|verif(?:y|ies|ied|ying)|explain(?:s|ed|ing)?"
    r"|justif(?:y|ies|ied|ying)|(?:verification|explanation|check|proof|justification|discussion"
    r"|meaning|interpretation)\s+(?:of|for|behind))"
    r"\s+(?:the|my|our|this|your)\s+(?:final\s+|correct\s+)?\Z",
    re.IGNORECASE,
)
"""Words before "answer:" that make it a heading of what is said about the answer."""
_NOT_LETTER = re.compile(r"not\s+[(*]{0,3}[A-J][)*]{0,3}\s*,?\s+but\s+(?:rather\s+)?")
"""An option that is rejected before the one that is chosen: `not A but B`."""
_WRONG_ONE = re.compile(r"\b(?:wrong|incorrect|mistaken|erroneous|false)\s+\Z", re.IGNORECASE)
"""Words before "answer is" that name another answer than the right one."""
_WRAPPING = re.compile(r"\A(?:\\(?:text|math)[a-z]*|[\s$({*])+")
"""Signs before the first of a value."""
_GOES_ON = re.compile(r"\w|[.,]\d|\s*[-+*/^=×·÷\\]")
"""Signs that make another value of the one before."""
_NOT = re.compile(
    r"(?:\w+ly )?not\b(?!(?:[^.\n]|\.\d)*\bbut\b)"
    r"|(?:never|no longer|hardly|anything but|far from)\b"
)
"""Words behind "the answer is" that deny what follows."""
_VALUE_BEGINS = re.compile(
    r"(?:[-+±(\[{|<>≤≥√∛π∞]|\\[({\[]|[a-zA-Z]\s*=)*\s*(?:\d|\\[a-zA-Z]|[√∛π∞])"
    r"|(?:unknown|undetermined|indeterminate|n/a|impossible to)\b",
    re.IGNORECASE,
)
"""The beginning of a value, or words for none; no beginning of a sentence about the answer."""
_EMPHASIS = re.compile(r"(?<=[\d%a-z])!+\s*$|\s+or so\s*$")
"""The end of a statement that says nothing: `The answer is 391!`; in a formula, as `$5!$`, in a
box and before a full stop, as `5!.`, it is a factorial."""
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
_SENTENCE_BEGIN = re.compile(r"[.!?][*_]*\s|(?<![a-z,;—–-])\n|\n\s*\n")
"""The end of a sentence, or of a line that does not go on in the next one."""
_ALL = re.compile(r"(?<!of )\b(?:the|my|our|both) (?:(?:final|correct|only) )*\Z", re.IGNORECASE)
"""Words before "answers" that speak of all of them."""
_SO = (
    r"(?:(?:so|thus|hence|therefore|then|and|finally|clearly|consequently|as a result"
    r"|in conclusion|it follows|(?:we|I) (?:see|find|conclude|get|know)|this (?:means|shows))\b"
    r",?\s+(?:that\s+)?|(?:wait|actually|yes|no|ok(?:ay)?|well),\s+)*"
)
_BEFORE_NAMED = re.compile(
    r"[\s*_>]*(?:#+\s+)?(?:\d+[.)]\s+)?"
    r"(?:(?P<task>(?:(?:find|compute|calculate|determine|state|give|write|evaluate|simplify|solve"
    r"|conclude|report|add|multiply|subtract|divide|check|verify|count)\b[^:]*"
    r"|(?:the )?(?:final |correct )?(?:answer|conclusion|result|solution)|step \d+)[*_]*):\s+)?"
    rf"(?:(?:since|because|as|given that)\b.*,\s+)?{_SO}(?P<value>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
"""A sentence up to "is the answer": a task or a reason, and the value."""
_THUS = r"(?:therefore|thus|hence|so|consequently)\b[,:]?\s*"
_TO_THE_END = r"(?:[^\n.?!]|\.(?=\d))+?"
_CLOSING = re.compile(
    rf"(?:\A|[.!?][*_]*\s|\n)[\s*_]*(?:(?:{_THUS})?(?:the )?(?:only |real |two |three )*"
    rf"(?:solutions|roots)(?:{_ASKED})? are:?\s*(?P<several>{_TO_THE_END})"
    rf"|(?:{_THUS})?(?:(?:the|my|our|final|end)\s+)*(?:ans\.|(?:ans|result)\b[*_]*\s*(?:is\b|[:=]))[\s*_]*"
    rf"(?P<result>{_FORMULA}|{_TO_THE_END})"
    rf"|{_THUS}(?:we (?:get|have|find|obtain|see)(?: that)?:?\s*)?"
    rf"(?P<value>{_FORMULA}|{_TO_THE_END}))(?<![,;:])[\s.*_]*\Z",
    re.IGNORECASE,
)
"""The last sentence of a reply: `Therefore, x = 42.`, `The solutions are 1 and 3.`, `Ans: 5`"""
_CLOSING_CHOICE = re.compile(
    r"(?:(?:\A|[.!][*_]*\s|\n)[\s*_]*(?:(?:so|thus|hence|therefore),?\s+)?"
    r"(?:I(?:\s+(?:would|will))?\s+(?:choose|pick|select)|choose|pick|select|I\s+(?:think|believe)(?:\s+it\s+is)?"
    r"|(?:ans\b\.?|result)[*_]*:?)|,\s+(?:so|thus|hence|therefore),?)[\s*_]+"
    r"(?:(?:option|choice|answer)\s+)?(?-i:[(\[]?[A-J][)\]]?)[\s.!*_]*\Z",
    re.IGNORECASE,
)
"""The last sentence of a reply that chooses: `Choose (D)`, `I think B`, `A is wrong, so B.`"""
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
_STATED = re.compile(
    rf"{_FORMULA}(?:(?:,?\s*+(?:(?:and|or)\b\s*+)?|(?:{ASSERTED})\s+){_FORMULA})*+"
    r"(?!\s+(?:(?:times|plus|minus|over|multiplied by|divided by)\s+[-$\\\d(]|(?:squared|cubed)\b))"
    r"|(?:[^\n.?]|[.?](?![\s*]|$)|(?<=\bi\.e)\.){1,500}",
    re.DOTALL,
)
"""A statement: formulas, or else the text up to the end of the sentence or of the line."""
_LONG_SPACE = re.compile(r"[ \t]{3,}")
_BARE = re.compile(
    rf"\s*\**\s*(?:(?:[a-zA-Z]\s*=\s*)?[-+]?\$?\d[\d,./]*\s*%?|0(?:x[\da-fA-F]+|b[01]+)"
    rf"|[-+−]?(?:∞|(?:\d+|[a-zA-Z])[⁰¹²³⁴-⁹]+)|\(?[A-J]\)?|{_FORMULA})\s*\.?\s*\**\s*",
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

    The text after the last `</think>` counts first, since it is the reply to the reader. If the
    reply states nothing, the thoughts count, as in a sample that was cut off within its thoughts.
    A reply that is nothing but a number, a formula, a letter to choose, or a calculation with its
    result is an answer, too, unless it was cut off. So are the last sentence `Therefore, x = 42.`,
    `Ans: 42`, `So 6 * 7 = 42` or, for a choice, `Choose (D)`, a number in a block of code and an
    object of JSON, `{"answer": 42}`, at the end of a reply that states nothing else. The first item
    of a list, as in `1. First`, is none.
    Empty boxes are skipped, since they are the prompt's own words. A box without braces, as in
    `\boxed 5`, needs a number. Boxes that commas, `and` or `or` join are one answer. Words are an
    answer in a box only. A box gives way to a later statement of another answer, as
    `Final answer: 8` or `No, 8.`, and is none if the words behind it deny it, as in
    `\boxed{7} is wrong`. A stated answer is taken back by a later statement that denies it, that
    cannot be read or that has not ended, and any by an unclosed box, unless these begin with the
    same value. Programs in blocks of code and words struck out state nothing.
    The time is linear in the length.

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
        if found is not None:
            if (begun := _unclosed_box(text)) and not _are_alike(found, begun):
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
                line = _last_object(marked) or _closing_choice(text)
            found = [line] if line else []
        several = listed_letters(found[0]) if found else ()
        found = [
            answer for answer in found if (letter := as_choice(answer)) and letter not in several
        ] or found
    elif not found and whole and not cut_off:
        closing = _last_block(marked) or _last_object(marked) or _closing_answer(text)
        found = [closing] if closing else []
    elif kind is None and found and _is_formula(found[0]):
        found = [answer for answer in found[1:] if _CHOICE.fullmatch(answer)] or found
    return found[0] if found else ("" if stated else None)


def _unmarked(text: str) -> str:
    """Return a text without programs, words that are struck out, the signs of Markdown and HTML
    around emphasised words and short code, and those of dollars and formulas within a quantity in
    two units.
    """
    text = _STRUCK_OR_CODE.sub("", text)
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
    if closing is None or _DOUBT.search(_sentence_before(reply, closing.start() + 1)):
        return None
    return re.findall(r"[A-J]", closing[0])[-1]


def _end_of_sentences(text: str) -> int:
    """Return the last end of a sentence or of a line in a text that was cut off."""
    return max((match.end() for match in _ENDED.finditer(text) if match[1]), default=0)


def _candidates(text: str, end: int, *, whole: bool, cut_off: bool) -> Iterator[str]:
    """Yield the answers that a text states, from the most to the least explicit; empty is one that
    cannot be read or is taken back.

    Args:
        end: end of the part in which an answer without a box or tags counts.
    """
    boxed = last_box(text, cut_off)
    in_box = boxed and _unless_overruled(*boxed, text, end)
    for answer in (_tagged(text), in_box, _last_statement(text, end)):
        if answer is not None:
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
    is_last = cut_off and not WORD.search(text, len(line))
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
    end = len(content)
    in_box = (boxed := last_box(content)) and _unless_overruled(*boxed, content, end)
    return in_box or _last_statement(content, end) or stated_value(tidy(content))


def _bare_answer(reply: str, end: int, cut_off: bool) -> str | None:
    """Return the entire reply if it is nothing but a number, a formula or a letter to choose, the
    result of a reply that is a calculation, or a letter in its first line. A reply that was cut off
    is not entire.
    """
    if letter := _FIRST_LINE.match(reply, 0, end):
        return None if _begins_options(reply, 0) else letter[1]
    if cut_off or len(reply) > MAX_BARE:
        return None
    bare = tidy(reply)
    value = bare if "\n" in bare else result(bare)
    return value if value != bare or _BARE.fullmatch(reply) else None


def _closing_answer(reply: str) -> str | None:
    """Return the number that a name equals, or the solutions, which the last sentence of a reply
    states, as in `Therefore, x = 42.`
    """
    closing = _CLOSING.search(reply, max(0, len(reply) - MAX_BARE))
    if closing is None:
        return None
    if closing["several"]:
        return listed(closing["several"])
    stated = tidy(re.sub(r"(?<!\\)\$", "", closing["result"] or closing["value"]))
    equation = re.fullmatch(rf"{NAME}\s*=(.*)", stated, re.DOTALL)
    value = result(equation[1].strip() if equation else stated)
    is_stated = equation or closing["result"] or value != stated
    return value if is_stated and "=" not in value and is_measured(value) else None


def _last_statement(text: str, end: int) -> str | None:
    """Return the answer of the last lead that states one before the end, else the last option that
    is called correct. "No wait, it is 6" states one only behind another answer, and
    "Correction: 6." also as the last sentence.

    Empty if a later lead takes the answer back: it denies the same one, or states another one that
    cannot be read or has not ended.
    """
    leads = deque(_STATEMENT.finditer(text), maxlen=MAX_STATEMENTS)
    corrected = None
    denied: set[str] = set()
    unread: list[str] = []
    for lead in reversed(leads):
        if lead.end() > end:
            begun = _begun_value(lead, len(text))
            if _VALUE_BEGINS.match(begun) and not (lead["named"] or _is_about_a_box(begun)):
                unread.append(begun)
        elif _is_denied(lead):
            denied.add(_begun_value(lead, end).rpartition("not ")[2])
            if corrected:
                return corrected
        elif answer := _read_statement(lead, end):
            if answer in denied or not all(_are_alike(answer, other) for other in unread):
                return ""
            if not (lead["corrected"] or lead["final"]):
                return corrected or answer
            corrected = corrected or answer
        elif answer == "":
            unread.append(_begun_value(lead, end))
    is_last = corrected and leads[-1]["final"] and text.rstrip(" .!*$\n").endswith(corrected)
    if corrected and (is_last or _CHOICE.match(text)):
        return corrected
    options = deque(_CORRECT_OPTION.finditer(text, 0, end), maxlen=MAX_STATEMENTS)
    asserted = next((option for option in reversed(options) if _is_asserted(option)), None)
    if asserted:
        return asserted[asserted.lastindex or 0]
    return "" if unread else None


def _unless_overruled(box: str, begin: int, text: str, end: int) -> str:
    """Return the answer of a box, or of the last statement behind the box that overrules it; empty
    if a later statement denies it.

    Args:
        begin: end of the box.
        end: end of the part in which a statement counts.
    """
    for lead in reversed(deque(_STATEMENT.finditer(text, begin, end), maxlen=MAX_STATEMENTS)):
        if _is_denied(lead):
            if _are_alike(box, _begun_value(lead, end)):
                return ""
        elif answer := _read_statement(lead, end):
            if _repeats(answer, box):
                return box
            if _overrules(lead, answer, box):
                return answer
    return box


def _overrules(lead: re.Match[str], answer: str, box: str) -> bool:
    """Return True if nothing limits a statement behind a box, and the statement is of the same
    sort: a number for a number, a letter for a letter, or a formula without words.
    """
    before = _SENTENCE_BEGIN.split(lead.string[max(0, lead.start() - MAX_BARE) : lead.start()])[-1]
    is_correction = lead["corrected"] or lead["final"] or lead["named"]
    if lead["several"] or not (is_correction or _BEFORE_OVERRULING.fullmatch(before)):
        return False
    if _ROUGHLY.search(lead[0]):
        return False
    if as_choice(box) or as_choice(answer):
        return bool(as_choice(box) and as_choice(answer))
    numbers = [read_number(without_name(side)) for side in (box, answer)]
    if any(numbers):
        return all(numbers) and is_measured(answer)
    return not any(WORD.search(side) or re.search("[=,]", side) for side in (box, answer))


def _repeats(answer: str, box: str) -> bool:
    """Return True if a statement repeats the answer in a box, also as a rounded number."""
    if _are_alike(without_name(answer), without_name(box)) or are_one(box, answer):
        return True
    exact, rounded = (read_number(without_name(side)) for side in (box, answer))
    places = re.search(r"\.(\d+)", answer)
    if not (exact and rounded and places):
        return False
    return 2 * abs(exact[0] - rounded[0]) <= Fraction(1, 10 ** len(places[1]))


def _are_alike(answer: str, begun: str) -> bool:
    """Return True if an answer may be what was begun to state, or ended in words."""
    answer, begun = (_WRAPPING.sub("", side) for side in (answer, begun))
    goes_on = begun.startswith(answer) and not _GOES_ON.match(begun, len(answer))
    return goes_on or answer.startswith(begun)


def _is_denied(lead: re.Match[str]) -> bool:
    """Return True if a sentence denies or supposes an answer, as `I doubt that the answer is 7` and
    `the answer is not 7`.
    """
    text, begin = lead.string, lead.start()
    before = _SENTENCE_BEGIN.split(text[max(0, begin - MAX_BARE) : begin])[-1]
    if lead["named"] or lead["hashes"] or lead["corrected"]:
        return False
    if is_denied(before) or _WRONG_ONE.search(before) or _NOT.match(text, lead.end()):
        return True
    stated = _STATED.match(text, lead.end())
    return bool(stated and TAKEN_BACK.match(text, stated.end()))


def _begun_value(lead: re.Match[str], end: int) -> str:
    """Return the beginning of what a lead states."""
    stated = _STATED.match(lead.string, lead.end(), end)
    return tidy(stated[0]) if stated else ""


def _sentence_before(text: str, begin: int) -> str:
    """Return the beginning of the sentence that a position is in."""
    return _SENTENCE_END.split(text[max(0, begin - MAX_BARE) : begin])[-1]


def _is_asserted(option: re.Match[str]) -> bool:
    """Return True if nothing in its sentence denies or limits that an option is correct."""
    text, begin = option.string, option.start()
    before = _sentence_before(text, begin)
    return not (_DOUBT.search(before) or _CONDITION.match(text, option.end()))


def _read_statement(lead: re.Match[str], end: int) -> str | None:
    """Return the answer that follows "the answer is"; None if a sentence about it, or a list of
    steps or options follows; empty if a value follows that cannot be read.
    """
    text = lead.string
    if lead["named"]:
        return _named_value(lead)
    is_heading = lead[0].rstrip(" \t*_").endswith(":")
    if is_heading and _HEADING_ABOUT.search(text, max(0, lead.start() - MAX_BARE), lead.start()):
        return None
    if lead["asked"] or lead["several"]:
        before = re.split(r"[,;]", _sentence_before(text, lead.start()))[-1]
        if _DOUBT.search(before.removesuffix("only ")):
            return None
    line = text.rfind("\n", lead.start(), lead.end()) + 1
    if line and (_ITEM.match(text, line) or _begins_options(text, line, next_line=True)):
        return None
    box = _BEGINS_WITH_EMPTY_BOX.match(text, lead.end(), end)
    stated = _STATED.match(text, box.end() if box else lead.end(), end)
    is_factorial = stated and text.startswith("!.", stated.end() - 1)
    words = (stated[0] if is_factorial else _EMPHASIS.sub("", stated[0])) if stated else ""
    answer = tidy(_LONG_SPACE.sub(" ", words))
    if lead["several"]:
        return listed(answer) if _ALL.search(before) else None
    rejected = _NOT_LETTER.match(stated[0]) if stated else None
    if stated and (chosen := _CHOICE.match(stated[0], rejected.end() if rejected else 0)):
        return "" if SECOND_LETTER.match(stated[0], chosen.end()) else tidy(chosen[0])
    if lead["choice"] or _is_about_a_box(answer):
        return None
    if lead["corrected"] or lead["final"]:
        answer = answer.rstrip(")")
        return answer if is_measured(answer) else None
    if lead["hashes"] and stated and _is_heading(stated, answer):
        return None
    is_value = _VALUE_BEGINS.match(answer) or listed_letters(answer)
    return stated_value(answer) or ("" if is_value else None)


def _named_value(lead: re.Match[str]) -> str | None:
    """Return the value of a sentence as `So 42 is the answer.`; None for a letter, and for a
    sentence that says more than that, as "I doubt that 42 is the answer".
    """
    begin = max(0, lead.start() - MAX_BARE)
    *earlier, sentence = _SENTENCE_BEGIN.split(lead.string[begin : lead.start()])
    named = _BEFORE_NAMED.fullmatch(sentence) if earlier or begin == 0 else None
    if named is None or (named["task"] and _DOUBT.search(named["task"])):
        return None
    value = stated_value(tidy(named["value"]))
    if value is None or as_choice(value) or re.match(r"[^()]*\)|\(\w+\)\Z", value):
        return None
    number = read_number(without_name(value))
    is_counted = number is not None and number[1] not in (None, Unit()) and is_measured(value)
    return value if is_counted or not WORD.search(value) else None


def _is_heading(stated: re.Match[str], answer: str) -> bool:
    """Return True for a heading as `#### 2 cases` or `#### 2. Add` in the middle of a text; GSM8K's
    line `#### 5` is the last.
    """
    text, end = stated.string, stated.end()
    if _ITEM.match(text, stated.start()) or _HEADING.match(text, end):
        return True
    return bool(re.search(r"\s", answer) and text[end:].strip(" .*\n"))


def _is_about_a_box(answer: str) -> bool:
    """Return True if a statement echoes the prompt, or is a box that was cut off."""
    box = _EMPTY_BOX.search(answer)
    echoes = box and not re.search(r"\d", answer[: box.start()])
    cut_off = re.search(BOX, answer) and answer.count("{") > answer.count("}")
    return bool(echoes or cut_off)


def answer_line(solution: str) -> str | None:
    """Return what follows the last `####` at the beginning of a line, as in the solutions of
    GSM8K; None if there is no such line or nothing follows.
    """
    lines = re.findall(r"^####[ \t]*(.*)$", solution, re.MULTILINE)
    return tidy(lines[-1]) or None if lines else None
