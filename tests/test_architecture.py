"""The walks of docs/architecture.md are those of the code."""

import ast
import re
from dataclasses import dataclass

import pytest

from lim_sglang.programs.program import PROGRAMS
from tests.test_structure import ROOT, module_name, own_imports

MOST = {"decode step": 10, "lim ask": 12, "lim eval": 12}
"""Most files of each walk; of `lim eval`, those beside the walk of `lim ask`."""
OUTSIDE = {"SGLang", "SGLang, by the runner's roles", "the user"}
"""Callers that are no file of this project."""


@dataclass(frozen=True)
class Stop:
    """One row of a walk."""

    file: str
    function: str
    caller: str


def walks() -> dict[str, list[Stop]]:
    """Read the walks by name."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = {}
    for name, table in re.findall(r"<!-- walk: (.+?) -->\n(.+?)<!-- walk end -->", text, re.DOTALL):
        rows = [[cell.strip(" `") for cell in row.split("|")] for row in table.splitlines()[2:]]
        found[name] = [Stop(row[2], row[3], row[4]) for row in rows]
    return found


def defined(file: str) -> set[str]:
    """Return the names of all functions and classes of a file, methods included."""
    return {
        node.name
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }


def uses(stop: Stop) -> bool:
    """Return True if the caller imports the file and names the function, or runs the program."""
    if stop.caller == "programs/program.py" and stop.function in PROGRAMS:
        return True
    caller = ROOT / stop.caller
    is_named = re.search(rf"\b{stop.function}\b", caller.read_text())
    return bool(is_named) and module_name(ROOT / stop.file) in own_imports(caller)


def test_walks_are_short_and_name_no_file_twice() -> None:
    found = walks()
    assert {name: len(stops) for name, stops in found.items()} == MOST
    for stops in found.values():
        assert len({stop.file for stop in stops}) == len(stops)


@pytest.mark.parametrize("walk", MOST)
def test_each_file_is_used_by_an_earlier_one(walk: str) -> None:
    earlier = {stop.file for stop in walks()["lim ask"]} if walk == "lim eval" else set()
    for stop in walks()[walk]:
        assert stop.function in defined(stop.file), stop
        if stop.caller not in OUTSIDE:
            assert stop.caller in earlier, stop
            assert uses(stop), stop
        earlier.add(stop.file)
