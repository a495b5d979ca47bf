"""Every reasoning program by the name that `--program` takes, and its description."""

from dataclasses import dataclass

from lim_sglang.errors import ConfigError
from lim_sglang.programs.adaptive import ADAPTIVE
from lim_sglang.programs.budget import BUDGET
from lim_sglang.programs.confidence import CONFIDENCE
from lim_sglang.programs.early_stop import EARLY_STOP
from lim_sglang.programs.majority import MAJORITY
from lim_sglang.programs.program import Program
from lim_sglang.programs.short import SHORT
from lim_sglang.programs.single import SINGLE

PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (SINGLE, MAJORITY, ADAPTIVE, EARLY_STOP, SHORT, CONFIDENCE, BUDGET)
}


def find_program(name: str) -> Program:
    """The program of that name; raises `ConfigError` where there is none."""
    description_of(name)
    return PROGRAMS[name]


@dataclass(frozen=True)
class Description:
    """What a user wants to know before choosing a program."""

    samples: int
    """That it may draw where nobody says how many: the papers' 40 where a program stops by itself,
    twice DeepConf's warm-up."""
    stops_when: str
    source: str


DESCRIPTIONS: dict[str, Description] = {
    "single": Description(1, "its one sample has ended", "chain of thought, arXiv 2201.11903"),
    "majority": Description(8, "all samples have ended", "self-consistency, arXiv 2203.11171"),
    "adaptive": Description(
        40,
        "the leader is the more frequent answer with the given confidence",
        "Adaptive-Consistency, arXiv 2305.11860",
    ),
    "early_stop": Description(40, "a window of samples agrees", "ESC, arXiv 2401.10480"),
    "short": Description(
        8, "the first m of k samples have finished", "short-m@k, arXiv 2505.17813"
    ),
    "confidence": Description(
        32,
        "one answer has nearly all of the confidence; unsure chains are aborted",
        "DeepConf, arXiv 2508.15260",
    ),
    "budget": Description(
        40, "a token budget for the whole question is spent", "ours, a baseline at equal cost"
    ),
}
"""Every program, by the name that `--program` takes; `catalogue.py` has the programs themselves."""


def description_of(program: str) -> Description:
    """What a program is.

    Raises:
        ConfigError: none has this name; says which there are.
    """
    if program not in DESCRIPTIONS:
        raise ConfigError(f"unknown program {program!r}; known, and when each stops:\n{listing()}")
    return DESCRIPTIONS[program]


def listing() -> str:
    """The programs, a line each."""
    width = max(map(len, DESCRIPTIONS))
    return "\n".join(
        f"  {name:{width}}  {about.stops_when} ({about.source})"
        for name, about in DESCRIPTIONS.items()
    )
