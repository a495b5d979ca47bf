"""How a summary votes again, against the programs themselves."""

from lim_sglang.evals.metrics import ORDERS
from lim_sglang.programs.registry import PROGRAMS
from lim_sglang.programs.vote import Order


def test_a_summary_ranks_answers_as_each_program_does() -> None:
    """The orders are written down twice, since a program cannot be had without SGLang."""
    assert {name: ORDERS.get(name, Order.BY_VOTES) for name in PROGRAMS} == {
        name: program.order for name, program in PROGRAMS.items()
    }
    assert set(ORDERS) <= set(PROGRAMS)
