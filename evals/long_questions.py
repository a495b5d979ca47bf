"""Questions of a stated length: tasks that are generated from a seed, and shots before a question.

All of it follows from SHA-256 digests of the seed, so that questions are the same on every machine
and in every version of Python. Lengths are in tokens by a rule that needs no model: see
`count_tokens`.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TypeVar

from lim_sglang.errors import DataError
from lim_sglang.markdown_section import counted
from lim_sglang.programs.grading.kinds import AnswerKind
from lim_sglang.programs.schema import MATH_PROMPT

LENGTHS = range(256, 1_000_001)
"""Tokens of a question: the shortest holds all facts of its task."""
DEFAULT_LENGTH = 1024
NUM_QUESTIONS = 100
"""Questions of a generated task."""
NUM_NEEDLES = 4
"""Facts of which one is asked for."""
NUM_LINKS = 2
"""Links of a chain, the code at its end among them."""
NUM_CHAINS = 4
NUM_COPIED = 12
"""Words of a note that is copied."""
NUM_PAYMENTS = 3
"""Payments of each person."""
NUM_PAYERS = 3

ANSWER_PROMPT = r"""{question}

Put your final answer within \boxed{{}}."""
"""Template for a question that needs no reasoning."""
SHOT = "Problem:\n{}\n\nSolution:\n{}\n\n"
"""A question with its solution, as it stands before others."""
_TOKEN = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_|\n+| (?=\d)")
T = TypeVar("T")

_VOCABULARY = """\
adjectives quiet young tired clever gentle proud careful lonely cheerful patient humble curious
people baker farmer doctor painter teacher sailor cook soldier writer singer driver student tailor \
miner hunter lawyer
verbs carried found painted repaired washed dropped borrowed moved lifted covered noticed forgot \
cleaned sold hid bought
colours red green blue yellow white black brown grey golden silver purple pink
things basket chair lamp bottle ladder wagon blanket mirror table clock bucket carpet hammer \
kettle violin pillow
prepositions near behind beside
places river garden window fence gate wall road bridge
buildings harbor museum library castle temple station hospital theater factory bakery school \
prison palace tower chapel stadium
names Anna Boris Clara David Emma Frank Grace Henry Helen James Karen Louis Maria Nina Oscar Paul \
Rosa Simon Laura Victor Walter Alice Bruno Diana
"""
VOCABULARY = {kind: words for kind, *words in map(str.split, _VOCABULARY.splitlines())}
"""Words, most of them one token in the vocabularies of Qwen2.5 and SmolLM2."""
HAY = [
    VOCABULARY[kind]
    for kind in ("adjectives", "people", "verbs", "colours", "things", "prepositions", "places")
]
"""Words of a sentence without any fact."""
COPIED = [
    word
    for kind in ("adjectives", "people", "colours", "things", "buildings")
    for word in VOCABULARY[kind]
]

Row = Mapping[str, str]
"""A question as a file of questions has it: id, problem, answer."""


def count_tokens(text: str) -> int:
    """Return the tokens of a text, about: each word, digit, sign and end of a line is one, and each
    space before a number.

    Served models count themselves, and each sample of a run records how many it was sent.
    """
    return len(_TOKEN.findall(text))


class Draws:
    """Draws that follow from a seed alone."""

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._num_digests = 0
        self._pool = 0

    def below(self, end: int) -> int:
        """Return a whole number from 0 to `end` - 1."""
        if self._pool < 2**64:
            digest = hashlib.sha256(f"{self._seed} {self._num_digests}".encode()).digest()
            self._num_digests += 1
            self._pool = int.from_bytes(digest, "big")
        self._pool, drawn = divmod(self._pool, end)
        return drawn

    def pick(self, items: Sequence[T]) -> T:
        """Return one of some items."""
        return items[self.below(len(items))]

    def sample(self, items: Iterable[T], count: int) -> list[T]:
        """Return some items in the order in which they are drawn, none twice."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


def spread(number: int) -> float:
    """Return the depth of a question's fact, from 0 to 1, by the question's number: the first 2, 4,
    8, … questions are spread evenly (van der Corput's sequence).
    """
    bits = f"{number + 1:b}"
    return sum(int(bit) / 2**place for place, bit in enumerate(reversed(bits), 1))


def _needle(number: int, length: int, draws: Draws) -> tuple[str, str]:
    """Return the code of one of four buildings, which stands at a stated depth."""
    buildings = draws.sample(VOCABULARY["buildings"], NUM_NEEDLES)
    codes = [str(10_000 + draws.below(90_000)) for _ in buildings]
    facts = [
        f"The code of the {each} is {code}." for each, code in zip(buildings, codes, strict=True)
    ]
    depths = _needle_depths(number, draws)
    return _in_hay(facts, depths, f"What is the code of the {buildings[0]}?", length, draws), codes[
        0
    ]


def _chain(_number: int, length: int, draws: Draws) -> tuple[str, str]:
    """Return the code at the end of one of four chains, whose links stand in any order."""
    buildings = draws.sample(VOCABULARY["buildings"], NUM_CHAINS * NUM_LINKS)
    chains = [buildings[begin::NUM_CHAINS] for begin in range(NUM_CHAINS)]
    codes = [str(10_000 + draws.below(90_000)) for _ in chains]
    links = [
        *(
            f"The {one} has the same code as the {other}."
            for chain in chains
            for one, other in pairwise(chain)
        ),
        *(
            f"The code of the {chain[-1]} is {code}."
            for chain, code in zip(chains, codes, strict=True)
        ),
    ]
    question = f"What is the code of the {chains[0][0]}?"
    shuffled = draws.sample(links, len(links))
    return _in_hay(shuffled, _evenly(len(links)), question, length, draws), codes[0]


def _copy(number: int, length: int, draws: Draws) -> tuple[str, str]:
    """Return the words of one of four notes, which stands at a stated depth."""
    writers = draws.sample(VOCABULARY["names"], NUM_NEEDLES)
    notes = [" ".join(draws.sample(COPIED, NUM_COPIED)) for _ in writers]
    facts = [f"The note of {each} says: {note}." for each, note in zip(writers, notes, strict=True)]
    question = f"Copy the words of the note of {writers[0]}, all of them in their order."
    return _in_hay(facts, _needle_depths(number, draws), question, length, draws), notes[0]


def _sum(_number: int, length: int, draws: Draws) -> tuple[str, str]:
    """Return the sum of one of three persons' payments, which stand in any order."""
    payers = draws.sample(VOCABULARY["names"], NUM_PAYERS)
    coins = [2 + draws.below(18) for _ in range(NUM_PAYERS * NUM_PAYMENTS)]
    payments = [
        f"{payers[n % NUM_PAYERS]} pays {paid} coins for the {thing}."
        for n, (paid, thing) in enumerate(
            zip(coins, draws.sample(VOCABULARY["things"], len(coins)), strict=True)
        )
    ]
    question = (
        f"{payers[0]} pays for {NUM_PAYMENTS} things. First list the {NUM_PAYMENTS} payments, then "
        f"add them: how many coins does {payers[0]} pay in all?"
    )
    payments = draws.sample(payments, len(payments))
    asked = _in_hay(payments, _evenly(len(payments)), question, length, draws)
    return asked, str(sum(coins[::NUM_PAYERS]))


def _in_hay(
    facts: Sequence[str], depths: Sequence[float], question: str, length: int, draws: Draws
) -> str:
    """Return a text of about `length` tokens that has each fact at its depth, and the question."""
    room = length - count_tokens(_asked(facts, question))
    hay: list[str] = []
    while True:
        adjective, person, verb, colour, thing, preposition, place = map(draws.pick, HAY)
        sentence = (
            f"The {adjective} {person} {verb} the {colour} {thing} {preposition} the {place}."
        )
        room -= count_tokens(sentence)
        if room < 0:
            break
        hay.append(sentence)
    for depth, fact in sorted(zip(depths, facts, strict=True), reverse=True):
        hay.insert(round(depth * len(hay)), fact)
    return _asked(hay, question)


def _asked(sentences: Sequence[str], question: str) -> str:
    text = " ".join(sentences)
    return f"Read this text. A question about it follows.\n\n{text}\n\n{question}"


def _needle_depths(number: int, draws: Draws) -> list[float]:
    """Return the depth of the fact that is asked for, then those of the others."""
    return [spread(number), *(draws.below(1000) / 1000 for _ in range(NUM_NEEDLES - 1))]


def _evenly(count: int) -> list[float]:
    """Return the depths of facts that are as far from each other as from both ends."""
    return [(n + 1) / (count + 1) for n in range(count)]


@dataclass(frozen=True)
class Generator:
    """A task's questions, from a length and a seed."""

    name: str
    write: Callable[[int, int, Draws], tuple[str, str]]
    """Returns question and answer by the question's number, a length in tokens and draws."""
    answer_kind: AnswerKind
    prompt: str

    def rows(self, length: int, seed: int) -> Iterator[Row]:
        """Yield all questions. Each follows from name, seed, length and its number."""
        for number in range(NUM_QUESTIONS):
            draws = Draws(f"{self.name} {seed} {length} {number}")
            problem, answer = self.write(number, length, draws)
            yield {"id": str(number), "problem": problem, "answer": answer}


GENERATORS: Mapping[str, Generator] = {
    each.name: each
    for each in (
        Generator("needle", _needle, AnswerKind.EXPRESSION, ANSWER_PROMPT),
        Generator("chain", _chain, AnswerKind.EXPRESSION, MATH_PROMPT),
        Generator("copy", _copy, AnswerKind.TEXT, ANSWER_PROMPT),
        Generator("sum", _sum, AnswerKind.INTEGER, MATH_PROMPT),
    )
}


def shots_of(solved: Sequence[tuple[str, str | None]], length: int, seed: int) -> Iterator[str]:
    """Yield, for each question, the others with their solutions, up to the first one that exceeds
    a length in tokens together with the question.

    The order of the others follows from the seed and is the same for all questions, so that prompts
    share their beginning, which a server keeps. A question never stands before itself.

    Args:
        solved: text and solution of each question.

    Raises:
        DataError: a question has no solution, none has room, or all together are too short.
    """
    if missing := sum(not solution for _, solution in solved):
        raise DataError(
            f"{missing} of {len(solved)} questions have no solution to show before others: give "
            '--data-dir rows with "solution", or leave --length out'
        )
    order = Draws(f"shots {seed}").sample(solved, len(solved))
    shots = [(text.strip(), SHOT.format(text.strip(), solution)) for text, solution in order]
    sizes = [count_tokens(shot) for _, shot in shots]
    rooms = [length - count_tokens(SHOT.format(text, "")) for text, _ in solved]
    lacking = [
        size - room
        for (text, _), room in zip(solved, rooms, strict=True)
        for size in islice(
            (n for (other, _), n in zip(shots, sizes, strict=True) if other != text.strip()), 1
        )
        if size > room
    ]
    if lacking:
        raise DataError(
            f"--length {length:,} has no room for a solved question before {len(lacking)} of "
            f"{len(solved)} questions: raise it by {counted(max(lacking), 'token')}"
        )
    for (text, _), room in zip(solved, rooms, strict=True):
        shown = []
        for (other, shot), size in zip(shots, sizes, strict=True):
            if other == text.strip():
                continue
            if room < size:
                break
            room -= size
            shown.append(shot)
        else:
            raise DataError(
                f"all {len(solved)} questions with their solutions are {room:,} tokens short of "
                f"--length {length:,}: lower it"
            )
        yield "".join(shown) + SHOT.partition("{")[0]
