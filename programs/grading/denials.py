"""Words that deny or suppose what a sentence states: one list for statements, choices and boxes."""

import re

NEGATION = (
    r"(?:n[o'’]t|no|none|nor|neither|never|no(?:body|thing|where|[ ]one)|cannot|hardly|barely"
    r"|scarcely|without|little|few|far|beyond|dubious|debatable|tempting|extraneous"
    r"|un(?:likely|clear|certain|sure|convinced|true|proven)|im(?:possible|plausible)"
    r"|in(?:correct|valid)(?:ly)?|questionable|fals(?:e|ely|ify|ifies)|wrong(?:ly)?|erroneous(?:ly)?|errors?"
    r"|mistak(?:e|es|en|enly)|misconceptions?|naive(?:ly)?"
    r"|(?:fail|doubt|reject|refute|disprove|contradict|exclude|avoid|disagree|refuse|forget|dismiss"
    r"|prevent|prohibit|forbid|discard|eliminate|lack|deny|denie)(?:s|es|d|ed|ing|ful)?"
    r"|refuting|disproving|excluding|refusing|eliminating|forgot|forgotten|ruled?[ ]out)"
)
"""A word that denies what follows it; two of them, as in `no doubt`, assert it."""
CONDITION = (
    r"(?:if|whether|unless|suppos(?:e|ed|ing)|assum(?:e|ed|ing)|imagin(?:e|ing)|pretend(?:ing)?)"
)
"""A word that supposes what follows it."""
FORGOT = r"forgot\b(?!\s+to\s+(?:check|mention|say|note|verify|state|write|explain)\b)"
"""Words behind "I" that own up to a mistake."""
_NEGATION = re.compile(NEGATION)
_CONDITION = re.compile(CONDITION)
DOUBT = re.compile(
    rf"\b(?:nor|neither|only|why|{CONDITION})\b"
    rf"|\b(?:{NEGATION}|\w+n['’]t)\b(?!.*(?:[,;]|\bso\b))",
    re.IGNORECASE | re.DOTALL,
)
"""Words that deny or limit what follows: some in the whole sentence, some up to a comma or "so"."""
_SUBJECT = frozenset(
    [
        *("so", "and", "but", "hence", "thus", "therefore", "because", "since", "then", "now"),
        *("i", "we", "you", "it", "this", "he", "she", "they"),
    ]
)
"""Words behind which a new statement begins."""
_LEADS_OVER = frozenset(
    [
        *("the", "my", "our", "this", "that", "your", "their", "final", "correct", "right"),
        *("real", "true", "actual", "only"),
    ]
)
"""Words between a verb and "answer": `believe that the final answer`."""
_ATTITUDES = frozenset(
    [
        *("think", "thinks", "believe", "believes", "say", "says", "said", "know", "knows"),
        *("mean", "claim", "sure", "certain", "convinced", "confident", "clear", "obvious"),
        *("true", "see", "guarantee", "agree", "conclude", "way", "case", "expect", "imagine"),
        *("feel", "accept", "doubt", "doubts", "doubtful", "deny", "unlikely", "unclear"),
    ]
)
"""Words that deny a statement behind them without `that`, if they are denied or deny."""
_HARMLESS = re.compile(
    r"\b(?:not|n't) (?=(?:only|just|merely|surpris(?:ing|ed)|unreasonable|long|immediately|need"
    r"|(?:be )?obvious|a coincidence|(?:too )?(?:hard|difficult))\b)"
    r"|\bno (?=(?:surprise|wonder|question|coincidence|secret)\b)"
    r"|\bwithout (?=loss\b)"
)
"""Negations that deny nothing: `not hard to see that`."""
_OTHERS_MIGHT = re.compile(
    r"\b(?:one|you|some(?:one|body)?|many|people|students|others|they|he|she) (?:\w+ ){0,2}"
    r"(?:might|may|could|would) (?:\w+ ){0,3}"
    r"(?:think|say|guess|believe|assume|suspect|expect)(?: that)?\Z"
    r"|\b(?:some|many|most|(?:a )?few|other)(?: of (?:the|my|your|our))? (?:\w+ )?"
    r"(?:people|students?|pupils|readers|solvers|candidates|learners|beginners|classmates|others)"
    r" (?:(?:might|may|will|would|could|often|wrongly|mistakenly|still|\w+ly) )*"
    r"(?:think|say|guess|believe|assume|claim|argue|answer|insist|expect)(?: that)?\Z"
)
"""An opinion that nobody has, or others: `one might think that`, `some students say`."""
_NAIVELY = re.compile(r"(?:naively|at first (?:glance|sight))\b", re.IGNORECASE)
_WOULD = re.compile(
    r"(?P<before>.*)\b(?:answer(?:\s+\w+){0,4}?|we|I|you|one)"
    r"(?:['’]d|\s+would)(?:\s+(?:then|instead|also|just|\w+ly))?"
    r"\s+(?:be|have|get|obtain|find|give|yield)(?:\s+(?:\w+ly|just))?[\s:*_$({\[\\]*\Z",
    re.IGNORECASE | re.DOTALL,
)
"""The beginning of a sentence up to a value that would be the answer; `the speed would be` may
answer the question itself."""
_RULED_OUT = re.compile(
    r"\b(?:eliminat\w+|rul(?:ed|es|ing) out|exclud\w+|discard\w+|wrong|incorrect|false|impossible"
    r"|fails?)\b",
    re.IGNORECASE,
)
_NO_NOUN = (
    r"(?!\s+(?!(?:is|are|was|were|has|have|can|fails?|and|or|being|but"
    r"|ruled|excluded|eliminated|discarded)\b)[a-z])"
)
"""No noun behind an article or a number."""
_OPTIONS = re.compile(
    rf"(?<![a-zA-Z])(?-i:A{_NO_NOUN}|[B-J])(?![a-zA-Z])|\([a-j]\)"
    r"|\b(?:options?|choices?|answers?|statements?|others?|rest|possibilit(?:y|ies)|alternatives?"
    rf"|everything|else|ones?|all|both|two|three|four|they|these|those)\b{_NO_NOUN}"
    r"|\bby\s+(?:\w+\s+of\s+)?elimination\b(?!\s+of\b)",
    re.IGNORECASE,
)
"""Words for what may be ruled out before an answer; no atoms, terms or cases."""
_UNSURE = re.compile(
    r"\b(?:would|could|might|may|perhaps|maybe|not|cannot|none|\w+n['’]t)\b", re.IGNORECASE
)
"""A word by which a sentence states a possibility, or denies."""
_INVERTED = re.compile(
    r"\A[\s*_>#-]*(?:(?:and|but|so|yet|now|then)\b,?\s+)?(?:were|had)\s+(?!to\b)(?=\w)"
    r"|(?<=[\w$)}\],])\s+(?:were|had)\s+(?=(?:the|we|it|he|she|they|there)\b)",
    re.IGNORECASE,
)
"""The beginning of a condition contrary to fact without `if`: `Were the coin fair`."""
_JOINED = r"[;:]|\b(?:but|since|so|thus|hence|therefore|here|now|as)\b"
"""Sign or word that ends a condition before its consequence."""
_UNREAL = re.compile(
    rf"(?<!even )(?<!only )\b(?:if|unless)\b(?:(?!{_JOINED}).)*?"
    r"\b(?:were|weren['’]t|had (?:been|not|\w+(?:ed|en|pt|ght))|hadn['’]t|could(?:n['’]t)?"
    r"|mattered)\b"
    rf"(?:(?!{_JOINED}).)*\Z",
    re.IGNORECASE | re.DOTALL,
)
"""A condition contrary to fact, up to what would follow from it: `if order mattered`."""
_SENTENCE = re.compile(r"(?:[^.!?\n]|\.(?=\S))*")
_QUESTION = re.compile(r"(?:[ \t$*_)\]}]|\\[)\]])*\(?\?")
"""The end of a question behind a value."""
_ASKS = re.compile(
    r"[\s*_>#-]*(?:(?:and|but|so|then|now|hmm+|wait|oh|well)\b[\s,.…—–-]*)*"
    r"(?:(?:is|are|was|can|could|may|might|would|should|will|do|does|did|perhaps|maybe|possibly)\b"
    r"|wh(?:o|at|en|ere|y)\b|how\b)",
    re.IGNORECASE,
)
"""The beginning of a question: `Could it be that`, `Perhaps`."""
_UNSURE_END = re.compile(
    r"\s*(?:hmm+|wait|not sure|let(?:['’]s| me)|I(?:['’]m| am) (?:stuck|lost|not sure)"
    r"|I (?:do not|don['’]t|cannot|can['’]t|need))\b"
    r"[^.!?…\n]{0,60}[.!…]*\s*\Z",
    re.IGNORECASE,
)
"""The only sentence behind a question: the reply ends without an answer to it."""


def is_hypothetical(before: str, behind: str) -> bool:
    """Return True if a sentence says what an answer would be in another case than the one in
    question, as `If order mattered, the answer would be`.

    Args:
        before: the beginning of the sentence, up to the value.
        behind: the text behind, with or without the value.
    """
    would = _WOULD.fullmatch(before)
    if would is None:
        return False
    rest = _SENTENCE.match(behind)
    return any(
        _INVERTED.search(part) or _UNREAL.search(part)
        for part in (would["before"], rest[0] if rest else "")
    )


def rules_out(clause: str) -> bool:
    """Return True if a clause rules options out."""
    is_about_options = _RULED_OUT.search(clause) and _OPTIONS.search(clause)
    return bool(is_about_options) and not _UNSURE.search(clause)


def is_asked(text: str, end: int, before: str) -> bool:
    """Return True if a value ends a question at which a reply breaks off, or that is its last
    sentence, as `Is it true that the answer is 12?`

    Args:
        end: end of the value.
        before: the beginning of its sentence.
    """
    question = _QUESTION.match(text, end)
    if question is None:
        return False
    is_last = not text[question.end() :].strip(' \n*_)"”')
    return bool((is_last and _ASKS.match(before)) or _UNSURE_END.match(text, question.end()))


def is_denied(before: str) -> bool:
    """Return True if the beginning of a sentence denies or supposes the answer that follows, as in
    `I doubt that the` and `if the`.
    """
    *clauses, last = re.split(r"[,;:—]", before.lower().replace("’", "'").replace("n't", " n't"))
    words = last.split()
    while words and words[-1] in _LEADS_OVER - {"that"}:
        words.pop()
    if words == ["that"] and clauses:
        words = [*clauses[-1].split(), "that"]  # behind a word between commas, as `, however,`
        if len(clauses) > 1:
            words = [*clauses[-2].split(), *words]
    text = _HARMLESS.sub("", " ".join(words))
    if _OTHERS_MIGHT.search(text) or (_NAIVELY.match(before.strip()) and " but " not in before):
        return True
    words = text.split()
    has_that = words[-1:] == ["that"]
    words = words[: len(words) - has_that]
    if words and _CONDITION.fullmatch(words[-1]):
        return True
    for at, word in reversed(list(enumerate(words))):
        if word.removesuffix("'s") in _SUBJECT:
            words = words[at + 1 :]
            break
    governs = has_that or bool(_ATTITUDES.intersection(words[-1:]))
    return governs and sum(bool(_NEGATION.fullmatch(word)) for word in words) % 2 == 1
