"""All programs, by the name that `--program` takes."""

from lim_sglang.programs.adaptive import ADAPTIVE
from lim_sglang.programs.budget import BUDGET
from lim_sglang.programs.confidence import CONFIDENCE
from lim_sglang.programs.descriptions import description_of
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
