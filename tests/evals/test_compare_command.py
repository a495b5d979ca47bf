"""`lim compare` as a command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lim_sglang.cli import app
from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.commands import MANY
from lim_sglang.evals.compare import compare
from lim_sglang.evals.metrics import Summary, write_summary
from tests.evals.results import result, summary

SHARES = (("a", (0, 0, 1)), ("b", (0, 1, 1)), ("c", (1, 1, 1)), ("d", (0, 0, 0)))
FULL = summary(*(result(name, groups, chosen=groups[0]) for name, groups in SHARES))
SPARSE = summary(
    *(result(name, groups[::-1], chosen=groups[-1], tokens=[9] * 3) for name, groups in SHARES),
    policy="lessismore",
    budget=256,
    device_name="other",
)

Write = Callable[..., list[str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes summaries and gives their paths."""

    def write(*summaries: Summary) -> list[str]:
        paths = [tmp_path / f"{n}.json" for n in range(len(summaries))]
        for each, path in zip(summaries, paths, strict=True):
            write_summary(each, path)
        return [str(path) for path in paths]

    return write


def lim_compare(*words: str) -> Result:
    found = CliRunner().invoke(app, ["compare", *words])
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_a_table_and_a_sentence_say_what_is_different(write: Write) -> None:
    found = lim_compare(*write(FULL, SPARSE))
    assert found.exit_code == 0
    assert "against full" in found.stdout
    assert compare(FULL, SPARSE).sentence in found.stdout
    assert MANY not in found.stdout
    assert (
        "warning: full and lessismore-256 differ in device_name: None and 'other'" in found.stderr
    )


def test_all_are_compared_with_the_first(write: Write) -> None:
    third = summary(*SPARSE.questions, policy="lessismore", budget=512)
    paths = write(FULL, SPARSE, third)
    assert MANY in lim_compare(*paths).stdout
    lines = [json.loads(line) for line in lim_compare(*paths, "--json").stdout.splitlines()]
    assert [(line["a"], line["b"]) for line in lines] == [
        ("full", "lessismore-256"),
        ("full", "lessismore-512"),
    ]
    expected = compare(FULL, SPARSE)
    assert lines[0]["difference"]["low"] == expected.difference.low
    assert lines[0]["mcnemar"]["only_a"] == expected.mcnemar.only_a
    assert lines[0]["sentence"] == expected.sentence


def test_the_seed_is_that_of_the_resampling(write: Write) -> None:
    questions = [result(f"q{n}", [n % 2, n % 3, 0, 1], tokens=[n + 1] * 4) for n in range(40)]
    others = [result(f"q{n}", [n % 3, n % 2, 1, 1], tokens=[n * n] * 4) for n in range(40)]
    paths = write(summary(*questions), summary(*others, policy="b"))
    one, again, other = (
        json.loads(lim_compare(*paths, "--json", "--seed", seed).stdout) for seed in "001"
    )
    assert one == again
    assert one["length_ratio"] != other["length_ratio"]
    assert one["length_ratio"]["value"] == other["length_ratio"]["value"]


def test_what_cannot_be_compared_is_refused_in_words(write: Write, tmp_path: Path) -> None:
    full, sparse, fewer = write(FULL, SPARSE, summary(*FULL.questions[:3]))
    with pytest.raises(ConfigError, match="needs two runs"):
        lim_compare(full)
    with pytest.raises(DataError, match="cannot read"):
        lim_compare(full, str(tmp_path / "missing.json"))
    with pytest.raises(DataError, match="--common"):
        lim_compare(sparse, fewer)
    assert json.loads(lim_compare(sparse, fewer, "--common", "--json").stdout)["num_questions"] == 3
