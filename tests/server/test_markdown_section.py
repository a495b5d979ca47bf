"""What commands write into the README, and where."""

import re
from itertools import product

import pytest

from lim_sglang.bench.decode_section import PART as DECODE
from lim_sglang.errors import DataError
from lim_sglang.evals.tables import PART as ACCURACY
from lim_sglang.markdown_section import Part

BEFORE, AFTER = "# Title\n\ntext\n\n", "\n\nmore | text |\n"
PARTS = {"bench decode": DECODE, "report": ACCURACY}
WRONG = ["", "{0}", "{1}", "{1}\n{0}", "{0}\n{1}\n{1}", "{0}\n{0}\n{1}"]
"""Texts whose markers, begin and end, are not there once each in order."""


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_only_the_text_between_the_markers_is_replaced(part: Part) -> None:
    text = f"{BEFORE}{part.begin}\n| old |\n{part.end}{AFTER}"
    once = part.replace(text, "| new |", "README.md")
    assert once == f"{BEFORE}{part.begin}\n| new |\n{part.end}{AFTER}"
    assert part.replace(once, "| new |", "README.md") == once


@pytest.mark.parametrize(("command", "text"), list(product(PARTS, WRONG)))
def test_markers_that_are_missing_twofold_or_swapped_are_refused(command: str, text: str) -> None:
    part = PARTS[command]
    found = rf"README.md needs one line {re.escape(f'<!-- lim {command}: begin')}"
    with pytest.raises(DataError, match=found):
        part.replace(text.format(part.begin, part.end), "| new |", "README.md")
