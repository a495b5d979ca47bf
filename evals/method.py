"""How the questions of a run are answered: the program, its options, what is said beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lim_sglang.errors import ConfigError
from lim_sglang.programs.descriptions import DESCRIPTIONS, description_of

MOST_AT_ONCE = 64
"""Samples of one question in flight: the frontend starts a thread for each."""
SAMPLE_BY_SAMPLE = ("single", "majority")
"""Programs that draw every sample, so that each is worth keeping without the others."""
DEFAULT_SAMPLES = {name: about.samples for name, about in DESCRIPTIONS.items()} | {"majority": 4}
"""Of each question, where nobody says how many."""


@dataclass(frozen=True)
class Method:
    """A program with all that its samples depend on, but for the sampling parameters."""

    num_samples: int = DEFAULT_SAMPLES["majority"]
    """Of each question, at most."""
    program: str = "majority"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the program, by name."""
    system: str | None = None
    """A system prompt."""
    thinking: bool | None = None
    """None: as the model's own template has it."""
    thinking_budget: int | None = None
    """Tokens; None: no limit."""

    @property
    def stops_by_itself(self) -> bool:
        """Whether a question is drawn whole or not at all, since its samples decide on others."""
        return self.program not in SAMPLE_BY_SAMPLE


USUAL = Method()


def choose_method(program: str, num_samples: int | None, **others: Any) -> Method:
    """A method whose program exists.

    Args:
        num_samples: None leaves it to the program.

    Raises:
        ConfigError: there is no such program, or it does not draw so many samples.
    """
    description_of(program)
    if program == "single" and num_samples not in (None, 1):
        raise ConfigError(
            f"--program single draws one sample a question, not {num_samples}: "
            "--program majority scores several, each for itself and by their vote"
        )
    return Method(num_samples or DEFAULT_SAMPLES[program], program, **others)


def complete(method: Method) -> Method:
    """With every option of its program, also those that nobody named.

    Raises:
        ConfigError: one that the program does not have.
    """
    if not method.options and not method.stops_by_itself:
        return method  # and SGLang need not be loaded
    from lim_sglang.programs.catalogue import find_program

    program = find_program(method.program)
    program.check(method.options)
    return replace(method, options={**program.options, **method.options})


def in_flight(method: Method, concurrency: int) -> int:
    """Samples of one question that are drawn at the same time.

    Args:
        places: requests that a server is given at once.
    """
    wanted = None
    if method.stops_by_itself:
        from lim_sglang.programs.catalogue import find_program

        wanted = find_program(method.program).parallel
    return min(wanted or method.num_samples, method.num_samples, MOST_AT_ONCE, concurrency)
