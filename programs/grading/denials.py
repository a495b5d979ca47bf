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
    r"|(?:too )?(?:hard|difficult))\b)"
    r"|\bno (?=(?:surprise|wonder|question|coincidence|secret)\b)"
    r"|\bwithout (?=loss\b)"
)
"""Negations that deny nothing: `not hard to see that`."""
_OTHERS_MIGHT = re.compile(
    r"\b(?:one|you|some(?:one|body)?|many|people|students|others|they|he|she) (?:\w+ ){0,2}"
    r"(?:might|may|could|would) (?:\w+ ){0,3}"
    r"(?:think|say|guess|believe|assume|suspect|expect)(?: that)?\Z"
)
"""An opinion that nobody has: `one might think that`."""
_NAIVELY = re.compile(r"(?:naively|at first (?:glance|sight))\b", re.IGNORECASE)
_WOULD = re.compile(
    r"(?P<before>.*)\b(?:answer(?:\s+\w+){0,4}?|we|I|you|one)"
    r"(?:['’]d|\s+would)(?:\s+(?:then|instead|also|just|\w+ly))?"
    r"\s+(?:be|have|get|obtain|find|give|yield)(?:\s+(?:\w+ly|just))?[\s:*_$({\[\\]*\Z",
    re.IGNORECASE | re.DOTALL,
)
"""The beginning of a sentence up to a value that would be the answer; `the speed would be` may
answer the question itself."""
_UNREAL = re.compile(
    r"(?:(?:\A[\s*_>#-]*(?:(?:and|but|so|yet|now|then)\b,?\s+)?(?:were|had|should)\s+(?!to\b)(?=\w)"
    r"|(?:[,;:—–]|\b(?:and|but)\b)\s*(?:were|had|should)\s+(?=(?:the|we|it|he|she|they|there|I|you)\b)"
    r"|(?<=[\w$)}\]])\s+(?:were|had)\s+(?=(?:the|we|it|he|she|they|there|I|you)\b[^,;]*\Z)"
    r"|\botherwise\b)(?!.*[,;:]\s*(?:so|thus|hence|therefore)\b)"
    r"|(?<!even )(?<!as )(?<!and only )\b(?:if|unless)\b"
    r"(?!\s+(?:rounded|needed|required|desired|expressed|written|simplified"
    r"|I\s+(?:am|made|misread|miscounted))\b)"
    r"(?P<condition>(?:(?![,;:]\s*(?:so|thus|hence|therefore)\b).)*))",
    re.IGNORECASE | re.DOTALL,
)
"""A condition that may be contrary to fact: `were the coin fair`, `if order mattered`."""
_PRESENT = re.compile(
    r"\b(?:is|are|has|have|does|do|we|I|you|one"
    r"|(?:a|an|each|every|he|she|it)\s(?:\w+\s)?[a-z]+s)\b|=",
    re.IGNORECASE,
)
"""A word of a condition that may hold."""
_PAST = re.compile(
    r"\b(?:were|was|had|did|could|might|would|should|only|instead"
    r"|(?<!is )(?<!are )(?<!been )(?<!be )(?<!has )(?<!have )[a-z]{2,}(?<!e)ed"
    r"|took|went|got|ran|came|gave|made|sold|bought|kept|left|chose|lost|won|drew|began|wrote"
    r"|found|built|ate|knew|paid|spent|threw|thought)\b",
    re.IGNORECASE,
)
"""A word of a condition that is contrary to fact."""
_USUALLY = re.compile(
    r"[\s*_>#-]*(?:(?:and|but|so|yet)\s+)?"
    r"(?:with|without|for|in|under|normally|usually|ordinarily|generally|originally)\b",
    re.IGNORECASE,
)
"""The beginning of a sentence about another case than the one in question, if "but" follows."""
_SENTENCE = re.compile(r"(?:[^.!?\n]|\.(?=\S))*")
_BUT = re.compile(r"[,;—–]\s*(?:but|yet|though|although|however)\b", re.IGNORECASE)
MAX_ANSWERED = 1000
"""Characters behind a question in which its answer is looked for."""
_YES = re.compile(
    r"(?:\A|[.!?:,—–]\s)\W*(?:yes|yep|yeah|indeed|right|correct|confirmed|exactly|sure)\b"
    r"|(?:\A|[.!?:,]\s|\b(?:so|then|and|thus|hence|therefore)\s)\s*"
    r"(?:it|that|this|(?:(?:the|my|our)\s+)?(?:answer|result|value))(?:\s+is|['’]s)"
    r"\s+(?:indeed\s+)?(?:right|correct|true)\b(?!\s*\?)"
    r"|\A\s*(?:yes\W+)?(?:it|that)\s+(?:is|does)(?=[.!]|\Z)|[✓✔✅]",
    re.IGNORECASE,
)
"""Words that answer a question with yes."""
_QUESTION = re.compile(
    r"(?:[ \t$*_)\]}]|\\[)\]])*(?:(?:right|correct|true|the\s+(?:\w+\s+)?answer)\s*)?\(?\?",
    re.IGNORECASE,
)
"""The end of a question behind a value."""


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
    after = rest[0] if rest else ""
    if _BUT.search(after) and _USUALLY.match(before):
        return True
    for unreal in (_UNREAL.search(would["before"]), _UNREAL.search(after)):
        if unreal and unreal["condition"] is None:
            return True
        if unreal and (_PAST.search(unreal[0]) or not _PRESENT.search(unreal[0])):
            return True
    return False


def is_asked(text: str, end: int) -> bool:
    """Return True if a value ends a question that the text does not answer with yes.

    Args:
        end: end of the value.
    """
    question = _QUESTION.match(text, end)
    if question is None:
        return False
    begin = question.end()
    return not _YES.search(text[begin : begin + MAX_ANSWERED])


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
