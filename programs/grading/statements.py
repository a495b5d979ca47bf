r"""Where a text states its answer: each statement, what it denies, corrects or repeats."""

import re
from collections import deque
from collections.abc import Collection, Sequence
from fractions import Fraction

from lim_sglang.programs.grading.boxes import BOX, Box
from lim_sglang.programs.grading.corrections import (
    AMENDED,
    APOLOGY,
    CHANGED,
    ENDS_SENTENCE,
    FORMULA,
    MEANT,
    REPLACED,
    VALUE,
    Given,
    amended_value,
    is_changed,
    is_correction,
    is_formula,
    is_supposed,
    value_end,
)
from lim_sglang.programs.grading.denials import (
    CONDITION,
    DOUBT,
    is_asked,
    is_denied,
    is_hypothetical,
)
from lim_sglang.programs.grading.forms import is_ordinal
from lim_sglang.programs.grading.kinds import (
    CONDITIONS,
    PRONOUN,
    REASON,
    SECOND_LETTER,
    as_choice,
    listed_letters,
    without_name,
)
from lim_sglang.programs.grading.latex import tidy
from lim_sglang.programs.grading.stated import (
    ASSERTED,
    WORD,
    are_one,
    is_measured,
    is_sentence,
    listed,
    stated_value,
)
from lim_sglang.programs.grading.told import told_value, with_plain_subject
from lim_sglang.programs.grading.units import Unit
from lim_sglang.programs.grading.values import REASON_WORDS, read_number, without_reason
from lim_sglang.programs.grading.withdrawals import is_taken_back

MAX_BARE = 200
"""Longest reply, in characters, that may be nothing but an answer."""
MAX_STATEMENTS = 100
"""Statements that are looked at, from the end of the text: a limit of the time."""
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
    r"(?:is|must be|should be|should have been|would be|will be|equals)\b\s*"
    r"(?:(?:therefore|thus|then|hence|simply|exactly|just|indeed|clearly|actually|really|still"
    r"|in fact|approximately|about|probably|likely|roughly|around)\b,?\s*)?:?"
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
    rf"(?:{FORMULA}|how (?:many|much) [^\n.,;:?!]{{1,80}}?"
    rf"|{_OPERAND}(?:{_BETWEEN_OPERANDS}{_OPERAND}){{1,20}})"
)
ASKED = (
    rf"\s+(?:to|of|for)\s+(?:{_PROBLEM}(?:\s+(?:of\s+)?{_CALCULATION_ASKED})?"
    rf"|{_CALCULATION_ASKED})[*_]*+"
)
"""The question or a calculation behind "the answer", as in `to the question` and `to 2 + 3`; no
part of the question."""
_WITHIN_BOX = rf"\s+(?:with)?in(?:side)?\s+(?:the\s+|a\s+)?\$?{BOX}\s*\{{\s*\}}\$?"
"""The prompt's own words behind "the answer"."""
_NAMED = (
    r"(?:is|must be)\s+(?:(?:therefore|thus|hence|then|indeed|clearly)\s+)?(?:the|my|our)\s+"
    rf"(?:(?:final|correct|right|only)\s+)*answer\b(?:\s+to\s+{_PROBLEM})?"
    r"(?=[*_]{0,4}(?:[.!](?:[\s*_]|\Z)|\s*(?:\n|\Z)"
    r"|,?\s+(?:because|since|as(?!\s+(?:long|far|soon|if|though)))\b))"
)
"""Words behind a value that end a sentence, as in `42 is the answer.`"""
_VALUE = re.compile(VALUE, re.IGNORECASE)
_VALUE_ALONE = rf"[*_]*{VALUE}{ENDS_SENTENCE}"
_CORRECTING = (
    rf"{APOLOGY}|wait|actually|correction|rather|I mean|hold on|nope"
    r"|(?:that|this)(?:['’]s| is) (?:wrong|incorrect|not right)"
)
_GAP = r"(?:[\s,.:;!—–]|-(?![\d$\\]))*"
_ASKS_FOR = r"(?:the|this)\s+(?:problem|question|task)\s+(?:actually\s+)?asks\s+for"
_WANTED = (
    rf"{_ASKS_FOR}\s+(?:[$(]*\d{{1,3}}\s*[a-z]\s*=\s*"
    rf"|the\s+(?:[a-z]+\s+)?[a-z]+,\s+which\s+is\s+)(?={_VALUE_ALONE})"
    rf"|to\s+(?:obtain|get|give)\s+(?={VALUE},?\s+(?:as|since|because)\s+{_ASKS_FOR}\s+"
    r"[^,.;\n]{1,60}(?:[.\n]|\Z))"
)
"""Words before the value that a problem asks for, behind a box with another one: `The problem asks
for the square, which is 49.`"""
_STATEMENT = re.compile(
    # GSM8K's `#### 5`, a heading "Final Answer" with the answer below, "the answer is 5".
    r"(?:^|(?<=[ \t]))(?P<hashes>####)[ \t]*(?=(?:[a-z] *= *)?[^\s\d]*\d)"
    r"|^[#*_ \t]*+(?:the )?(?:final |correct )?answer[*_ \t]*+:?[*_ \t]*+\n\s*"
    r"(?:[-*+•][ \t]+)?"
    rf"|\b(?:answer[*_]*+(?P<asked>{ASKED})?(?:{_WITHIN_BOX})?\s*+(?:{_IS}|:|=)[\s*_]*"
    r"(?:(?:option|choice|letter)\b[\s*_]*)?"
    rf"|(?P<several>answers(?:{ASKED})?\s+are\b:?[\s*_]*)|(?P<named>{_NAMED})"
    rf"|(?P<choice>(?:correct|right|best|final|my|closest|nearest|most likely) "
    r"(?:option|choice|letter)[*_]*+\s*+"
    rf"(?:{_IS}|:)[\s*_]*(?:(?:option|choice)\b[\s*_]*)?"
    r"|^[#*_ \t]*+(?:option|choice)[*_]*:[ \t*_]*)"
    # What the writer thought before something else.
    r"|(?P<thought>(?:first|initially|originally),?\s+(?:(?:I|we)\s+)?(?:had\s+)?thought\s+"
    r"(?:that\s+)?the\s+answer\s+(?:is|was|would\s+be)\b\s*)"
    # "Correction: 13.", "Actually C."
    rf"|(?P<final>(?:correction\s*[:—–]|actually,?)\s*(?={_VALUE_ALONE}))"
    # "No wait, it is B." and "No, 13.", behind another answer.
    rf"|(?P<corrected>(?:{_CORRECTING}|(?<!\?[ \n])(?!(?<=[a-z] )no\. \d)no)\b{_GAP}"
    rf"(?:(?:{_CORRECTING}|no)\b{_GAP}){{0,3}}"
    rf"(?:(?:(?:it|that)(?:['’]s|\s+(?:is|should be|must be))\b|{MEANT})[\s,:*_]*(?:actually\s+)?"
    rf"|(?P<replaced>{REPLACED})"
    rf"|(?<=[,.:;!—–-])\s*(?={_VALUE_ALONE})))"
    # "I change my answer to 13."
    rf"|(?P<changed>{CHANGED}(?={VALUE}(?:{ENDS_SENTENCE}|\s+from\b|,?\s+(?:because|since)\b)))"
    # "The problem asks for 2x = 14.", behind a box.
    rf"|(?P<wanted>{_WANTED})"
    # "It should be 13.", directly behind an answer, or "it is 13" behind words that reject one.
    rf"|(?P<amended>{AMENDED}))",
    re.IGNORECASE | re.MULTILINE,
)
_BEFORE_OVERRULING = re.compile(
    r"(?:[^?]{1,200}[,;]\s+(?=(?:so|hence|thus|therefore)\b))?"
    r"(?:[\s*_#>.:;,—–-]|\b(?:so|thus|hence|therefore|then|and|but|actually|wait|no|sorry|oops"
    r"|in fact|correction|the|my|our|final|correct|right|real|true|actual|only|that|means"
    r"|corrected|revised|updated|amended|new|answer|let me correct (?:that|this|it)|now|however"
    r"|hold on|on (?:second thought|reflection)"
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
_WHICH_OPTION = re.compile(
    r"[,(]\s*(?:which|that)\s+(?:is|corresponds\s+to|matches)\s+(?:option|choice)\s+"
    r"[*_$(\[]{0,4}([A-J])[)\]*_$]{0,4}\s*\Z"
)
"""The option that an answer in words is: `compound C, which is option A`."""
_NOT_LETTER = re.compile(r"not\s+[(*]{0,3}[A-J][)*]{0,3}\s*,?\s+but\s+(?:rather\s+)?")
"""An option that is rejected before the one that is chosen: `not A but B`."""
_BRACKETED = re.compile(r"\\?[(\[{][^a-z()\[\]]*,[^a-z()\[\]]*[)\]}]")
"""Values in brackets: a point or a set."""
_SUPPOSED = re.compile(rf"[\s*_]*{CONDITION}\b", re.IGNORECASE)
"""The beginning of a sentence that holds under a condition."""
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
_PRICE = re.compile(
    r"\$\d+(?:,\d{3})*(?:\.\d+)?(?=[\s*_]*\Z|,?\s+(?:because|since|as|which)\b[^$]*\Z)"
)
"""A sum of money whose sign begins no formula."""
_ENDS = r"(?=[*_$]{0,4}(?:[.,;:!\n]|\Z|\s+(?:because|since|as)\b))"
CHOOSE = (
    r"(?:I(?:\s+(?:would|will|am)|['’](?:d|ll|m))?\s+go(?:ing)?\s+(?:with|for)"
    r"|(?:I|we)(?:\s+(?:would|will|am|are)|['’](?:d|ll|m|re))?"
    r"\s+(?:choos(?:e|ing)|(?:pick|select)(?:ing)?))"
)
"""Words before the letter of an option: `I choose`, `I'd go with`."""
_CORRECT_OPTION = re.compile(
    r"(?<![a-zA-Z0-9\\])(?-i:([A-J]))[)*_$]{0,4}\s+is\s+(?:the\s+)?(?:correct|right)\b"
    r"|(?:^|[.,:!]\s|\b(?:option|choice|letter|so|thus|hence|therefore|that)\b)[\s*_$(\[]{0,4}"
    rf"(?-i:([A-J]))[)\]*_$]{{0,4}}\s+is\s+(?:the|my)\s+(?:final\s+)?answer\b{_ENDS}"
    r"|(?:(?:^|[.!]\s)[\s*_]{0,4}|,\s+(?=so|thus|hence|therefore))"
    rf"(?:(?:so|thus|hence|therefore),?\s+)?{CHOOSE}\s+"
    r"(?:(?:the\s+)?(?:option|choice|answer|letter)\s+)?[*_$(\[]{0,4}"
    rf"(?-i:([A-J]))[)\]]?{_ENDS}"
    r"|(?<![a-zA-Z])(?-i:[A-J])[)*_$]{0,4}\s+is(?:\s+not|n['’]t)\s+(?:correct|right|true)[,;]\s+"
    r"(?:but\s+)?(?-i:([A-J]))[)*_$]{0,4}\s+is(?=[.!]|\s*\Z)",
    re.IGNORECASE | re.MULTILINE,
)
"""`Option (B) is correct`, `Therefore, B is the answer`, `I choose B`."""
ONLY = re.compile(r"\bonly\b(?!\s+if\b)", re.IGNORECASE)
"""A word of a reason, as in `Only B is prime, so I choose B`, that limits no choice behind it."""
_CHOSEN_BEFORE = re.compile(
    r"\b(?:I\s+(?:think|believe|guess)(?:\s+it(?:['’]s|\s+is))?|it\s+(?:is|must\s+be))\s+"
    r"[*_(]{0,3}(?-i:[A-J])[*_)]{0,3}[.,;!?]",
    re.IGNORECASE,
)
"""A letter that a later one corrects: `I think A.`"""
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
_ITEM = re.compile(r"[ \t]*(?:[*_]*\(?1[.)][*_]*[ \t]+\S|([-*+•])[ \t].*\n\s*\1(?:[ \t]|\Z))")
"""The first item of a list, with its number or with the sign of a second item."""
_HEADING = re.compile(r"[.)][ \t]+\S.*\n")
"""The rest of a numbered heading, `#### 2. Add`, behind its number."""
ASKS = re.compile(
    r"(?:(?!\b(?:because|since|as|so)\b|\s-{1,3}\s"
    r"|\s(?:Would|Could|Should|Do|Does|Did|Can|Shall|Want|Need|Is|Are|Will|Have|Any|Wh\w+|How)\b)"
    r"[^.,;:!?\n(—–…]){0,300}+(?:\(?\?"
    r"|(?:[\s,(…—–-]|\.{3})+(?:or|really|is\s+(?:it|that|this))\b[^.!?\n]{0,300}\?"
    r"|[^.!?\n]{0,300}\?\s*[Nn]o[,.!])"
)
"""The rest of a question whether an option is right; no reason and no other question, as in `—
would you like an example?`"""
_CONDITION = re.compile(CONDITIONS, re.IGNORECASE)
_STATED = re.compile(
    rf"{FORMULA}(?:(?:,?\s*+(?:(?:and|or)\b\s*+)?|(?:{ASSERTED})\s+){FORMULA})*+"
    r"(?!\s+(?:(?:times|plus|minus|over|multiplied by|divided by)\s+[-$\\\d(]|(?:squared|cubed)\b))"
    r"|(?:[^\n.?]|[.?](?![\s*]|$)|(?<=\bi\.e)\.){1,500}",
    re.DOTALL,
)
"""A statement: formulas, or else the text up to the end of the sentence or of the line."""
_INTRODUCTION = re.compile(
    r"\A(?:with|after|dividing|multiplying|adding|subtracting|for|drawing|rolling|out\s+of|starting"
    r"\s+(?:with|from)|working)\s[^,;:.]{1,80}(?:,\s[^,;:.]{1,40})?,\s+(?=[a-z])",
    re.IGNORECASE,
)
"""A phrase before a sentence that states an answer: `With 7 rows of 8 seats, it seats 56.`"""
_LONG_SPACE = re.compile(r"[ \t]{3,}")
CHOICE = re.compile(
    rf"[*_$]*(?!{PRONOUN})(?:[(\[]?[A-J][)\]](?=[\s.,;:*_$]|$)"
    rf"|[A-J](?=[*_$]*(?:[.,;:]|\s+{REASON}|\s*[(—–]|\s+-\s|$)))"
)
"""A letter in brackets, or before the beginning of a reason: the choice, whatever text follows."""
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


def begins_options(text: str, begin: int, *, next_line: bool = False) -> bool:
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


def last_statement(text: str, end: int, denied_boxes: Collection[Box] = ()) -> str | None:
    """Return the answer of the last lead that states one before the end, else the last option that
    is called correct. "No wait, it is 6" states one only behind another answer, and
    "Correction: 6." also as the last sentence.

    Empty if a later lead takes the answer back: it denies the same one, or states another one that
    cannot be read or has not ended.

    Args:
        denied_boxes: boxes that are denied, and spaces in the text: answers to correct.
    """
    given = [Given(content, box_end, True) for _, box_end, content in denied_boxes]
    leads = [each for each in _leads(text, 0, len(text), given) if not each["wanted"]]
    corrected = None
    denied: set[str] = set()
    unread: list[str] = []
    for lead in reversed(leads):
        if lead.end() > end:
            begun = _begun_value(lead, len(text))
            if _VALUE_BEGINS.match(begun) and not (lead["named"] or _is_about_a_box(begun)):
                unread.append(begun)
        elif _is_supposed(lead):
            if corrected:
                return corrected
        elif _is_denied(lead):
            denied.add(_begun_value(lead, end).rpartition("not ")[2])
            if corrected:
                return corrected
        elif answer := _read_statement(lead, end):
            if answer in denied or not all(are_alike(answer, other) for other in unread):
                return ""
            follows_box = lead["corrected"] and any(each.end <= lead.start() for each in given)
            if follows_box or not (lead["corrected"] or lead["final"]):
                return corrected or answer
            corrected = corrected or answer
        elif answer == "":
            unread.append(_begun_value(lead, end))
    begin = leads[-1].start() if leads else 0
    is_last = corrected and leads[-1]["final"] and text.rstrip(" .!*$\n").endswith(corrected)
    is_chosen = corrected and as_choice(corrected) and _CHOSEN_BEFORE.search(text, 0, begin)
    if corrected and (is_last or is_chosen or CHOICE.match(text)):
        return corrected
    options = deque(_CORRECT_OPTION.finditer(text, 0, end), maxlen=MAX_STATEMENTS)
    asserted = next((option for option in reversed(options) if _is_asserted(option)), None)
    if asserted:
        return asserted[asserted.lastindex or 0]
    return "" if unread else None


def unless_overruled(box: str, begin: int, text: str, end: int) -> str:
    """Return the answer of a box, or of the last statement behind the box that overrules it; empty
    if a later statement denies it.

    Args:
        begin: end of the box.
        end: end of the part in which a statement counts.
    """
    for lead in reversed(_leads(text, begin, end, [Given(box, begin)])):
        if _is_supposed(lead):
            continue
        if _is_denied(lead):
            if are_alike(box, _begun_value(lead, end)):
                return ""
        elif answer := _read_statement(lead, end, told=False):
            if _repeats(answer, box):
                return box
            if _overrules(lead, answer, box):
                return answer
    return box


def _leads(text: str, begin: int, end: int, boxes: Sequence[Given]) -> list[re.Match[str]]:
    """Return the last leads of a part of a text, but for words as "it should be" that correct none
    of the answers before them.

    Args:
        boxes: answers in boxes, by their end.
    """
    leads = []
    given: Given | None = None
    rest = deque(boxes)
    for lead in deque(_STATEMENT.finditer(text, begin, end), maxlen=MAX_STATEMENTS):
        while rest and rest[0].end <= lead.start():
            given = rest.popleft()
        if lead["amended"] and not is_correction(lead, given, _are_equal):
            continue
        if lead["corrected"] and is_supposed(text, lead.start()):
            continue
        if lead["changed"] and not is_changed(text, lead.start()):
            continue
        leads.append(lead)
        if (value := value_end(text, lead.end())) is not None:
            words = text[lead.end() : value]
            is_no = bool(lead["thought"] or words.startswith("not "))
            is_no = is_no or is_taken_back(text, value, words) or is_denied(_sentence_of(lead))
            given = Given(tidy(words.removeprefix("not ")), value, is_no)
    return leads


def _are_equal(first: str, second: str) -> bool:
    """Return True if a text names the same number or letter as another one."""
    first, second = (without_name(tidy(side)).strip("()") for side in (first, second))
    return first == second or are_one(first, second)


def _overrules(lead: re.Match[str], answer: str, box: str) -> bool:
    """Return True if nothing limits a statement behind a box, and the statement is of the same
    sort: a number for a number, a letter for a letter, or a formula without words.
    """
    before = _sentence_of(lead)
    corrects = lead["corrected"] or lead["final"] or lead["named"] or lead["amended"]
    corrects = corrects or lead["changed"] or lead["wanted"]
    if lead["several"] or not (corrects or _BEFORE_OVERRULING.fullmatch(before)):
        return False
    if _ROUGHLY.search(lead[0]) or (is_ordinal(answer) and not is_ordinal(box)):
        return False
    if as_choice(box) or as_choice(answer):
        return bool(as_choice(box) and as_choice(answer))
    numbers = [read_number(without_name(side)) for side in (box, answer)]
    if any(numbers):
        return all(numbers) and is_measured(answer)
    if all(_BRACKETED.fullmatch(side) for side in (box, answer)):
        return True
    return not any(WORD.search(side) or re.search("[=,]", side) for side in (box, answer))


def _repeats(answer: str, box: str) -> bool:
    """Return True if a statement repeats the answer in a box, also as a rounded number."""
    if are_alike(without_name(answer), without_name(box)) or are_one(box, answer):
        return True
    exact, rounded = (read_number(without_name(side)) for side in (box, answer))
    places = re.search(r"\.(\d+)", answer)
    if not (exact and rounded and places):
        return False
    return 2 * abs(exact[0] - rounded[0]) <= Fraction(1, 10 ** len(places[1]))


def are_alike(answer: str, begun: str) -> bool:
    """Return True if an answer may be what was begun to state, or ended in words."""
    answer, begun = (_WRAPPING.sub("", side) for side in (answer, begun))
    goes_on = begun.startswith(answer) and not _GOES_ON.match(begun, len(answer))
    return goes_on or answer.startswith(begun)


def _is_denied(lead: re.Match[str]) -> bool:
    """Return True if a sentence denies or supposes an answer, as `I doubt that the answer is 7` and
    `the answer is not 7`.
    """
    text = lead.string
    if lead["thought"]:
        return True
    before = _sentence_of(lead)
    if lead["corrected"] or lead["amended"]:
        return False
    if lead["named"]:
        return is_taken_back(text, lead.end(), before)
    stated = _STATED.match(text, lead.end())
    if stated and is_taken_back(text, stated.end(), stated[0]):
        return True
    is_no = lead["choice"] and _SUPPOSED.match(before)
    is_no = is_no or is_denied(before) or _WRONG_ONE.search(before) or _NOT.match(text, lead.end())
    return bool(is_no and not lead["hashes"])


def _is_supposed(lead: re.Match[str]) -> bool:
    """Return True if a statement is a question, or about another case than the one in question."""
    text, begin = lead.string, lead.end()
    if lead["named"]:
        return False
    value = _VALUE.match(text, begin)
    before = _sentence_of(lead)
    if value and is_asked(text, value.end(), before):
        return True
    return is_hypothetical(before + lead[0], text[begin : begin + MAX_BARE])


def _begun_value(lead: re.Match[str], end: int) -> str:
    """Return the beginning of what a lead states."""
    stated = _STATED.match(lead.string, lead.end(), end)
    return tidy(stated[0]) if stated else ""


def _sentence_of(lead: re.Match[str]) -> str:
    """Return the beginning of a lead's sentence, which may go on over lines."""
    begin = lead.start()
    return _SENTENCE_BEGIN.split(lead.string[max(0, begin - MAX_BARE) : begin])[-1]


def sentence_before(text: str, begin: int) -> str:
    """Return the beginning of the sentence that a position is in."""
    return _SENTENCE_END.split(text[max(0, begin - MAX_BARE) : begin])[-1]


def _is_asserted(option: re.Match[str]) -> bool:
    """Return True if nothing in its sentence denies or limits that an option is correct."""
    text, begin = option.string, option.start()
    before = sentence_before(text, begin)
    if option[0].startswith(","):
        before = ONLY.sub("", before)
    letter = option[option.lastindex or 0]
    is_limited = DOUBT.search(before) or _CONDITION.match(text, option.end())
    is_limited = is_limited or ASKS.match(text, option.end())
    return not (is_limited or is_taken_back(text, option.end(), letter))


def _read_statement(lead: re.Match[str], end: int, *, told: bool = True) -> str | None:
    """Return the answer that follows "the answer is"; None if a sentence about it, or a list of
    steps or options follows; empty if a value follows that cannot be read.

    Args:
        told: a sentence counts, too, whose only number is told.
    """
    text = lead.string
    if lead["named"]:
        return _named_value(lead)
    is_heading = lead[0].rstrip(" \t*_").endswith(":")
    if is_heading and _HEADING_ABOUT.search(text, max(0, lead.start() - MAX_BARE), lead.start()):
        return None
    if lead["asked"] or lead["several"]:
        before = re.split(r"[,;]", sentence_before(text, lead.start()))[-1]
        if DOUBT.search(before.removesuffix("only ")):
            return None
    line = text.rfind("\n", lead.start(), lead.end()) + 1
    if line and (_ITEM.match(text, line) or begins_options(text, line, next_line=True)):
        return None
    box = _BEGINS_WITH_EMPTY_BOX.match(text, lead.end(), end)
    stated = _STATED.match(text, box.end() if box else lead.end(), end)
    is_factorial = stated and text.startswith("!.", stated.end() - 1)
    words = (stated[0] if is_factorial else _EMPHASIS.sub("", stated[0])) if stated else ""
    if _PRICE.match(words):
        words = f"\\{words}"
    words = _LONG_SPACE.sub(" ", words).strip()
    if is_heading and not lead["choice"]:
        words = _INTRODUCTION.sub("", words)
    words = with_plain_subject(words)
    answer = tidy(words)
    if lead["several"]:
        return listed(answer) if _ALL.search(before) else None
    if stated and (option := _WHICH_OPTION.search(stated[0])):
        return option[1]
    rejected = _NOT_LETTER.match(stated[0]) if stated else None
    if stated and (chosen := CHOICE.match(stated[0], rejected.end() if rejected else 0)):
        if SECOND_LETTER.match(stated[0], chosen.end()):
            return ""
        is_no = is_taken_back(text, stated.start() + chosen.end(), chosen[0])
        return "" if is_no else tidy(chosen[0])
    if lead["choice"] or _is_about_a_box(answer):
        return None
    if any(map(lead.group, ("amended", "corrected", "final", "changed", "wanted"))):
        return _amended(lead, words)
    if lead["hashes"] and stated and _is_heading(stated, answer):
        return None
    is_value = _VALUE_BEGINS.match(answer) or listed_letters(answer)
    # A paragraph behind "Answer:" may begin with another number than it ends with.
    is_last = stated is not None and not re.search(r"\d", text[stated.end() :])
    told_here = told_value(without_reason(words), plainly=not is_last) if told else None
    value = (told_here if is_sentence(answer) else None) or stated_value(answer) or told_here
    return value or ("" if is_value else None)


def _amended(lead: re.Match[str], words: str) -> str | None:
    """Return the number or the formula that a correction states; None for another counted thing
    than the answer before, as in `It should be 2 digits.`
    """
    value = stated_value(tidy(amended_value(words)))
    is_value = value and (is_measured(value) or is_formula(words) or CHOICE.fullmatch(value))
    if not value or not is_value:
        return None
    if any(map(lead.group, ("replaced", "final", "changed", "wanted"))):
        return value
    number = read_number(value)
    unit = number[1] if number else None
    before = lead.string[max(0, lead.start() - MAX_BARE) : lead.start()]
    is_other = (
        unit and not unit.dimensions and not {*WORD.findall(value)} <= {*WORD.findall(before)}
    )
    return None if is_other else value


def _named_value(lead: re.Match[str]) -> str | None:
    """Return the value of a sentence as `So 42 is the answer.`; None for a letter, and for a
    sentence that says more than that, as "I doubt that 42 is the answer".
    """
    begin = max(0, lead.start() - MAX_BARE)
    *earlier, sentence = _SENTENCE_BEGIN.split(lead.string[begin : lead.start()])
    named = _BEFORE_NAMED.fullmatch(sentence) if earlier or begin == 0 else None
    if named is None or (named["task"] and DOUBT.search(named["task"])):
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
