"""The sweeps that come with lim: what they mean, and that they come with it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lim_sglang.evals.run_config import Method
from lim_sglang.evals.sweep import SWEEPS, check_runs, expand, find_sweep, read_sweep

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"


@pytest.mark.parametrize(
    ("name", "num_runs", "num_servers"),
    [("paper", 48, 15), ("math500-coder-1.5b", 5, 5), ("tiny", 2, 2)],
)
def test_the_sweeps_that_come_with_lim_mean_so_many_runs(
    name: str, num_runs: int, num_servers: int
) -> None:
    found = expand(read_sweep(find_sweep(name)))
    assert len(found) == num_runs
    assert len({run.server.name for run in found}) == num_servers
    check_runs(found)


def test_every_sweep_that_comes_with_lim_is_tested() -> None:
    assert {path.stem for path in SWEEPS.iterdir()} == {"paper", "math500-coder-1.5b", "tiny"}


def test_the_headline_is_what_it_says() -> None:
    found = expand(read_sweep(find_sweep("math500-coder-1.5b")))
    assert [run.server.policy for run in found] == [
        "full",
        *(f"lessismore-{budget}" for budget in (128, 256, 512, 1024)),
    ]
    for run in found:
        assert (run.task, run.limit, run.method) == ("math500", None, Method(4))
        expected = {"max_tokens": 2048, "temperature": 0.6, "top_p": 0.95, "top_k": -1}
        assert run.sampling == expected
        assert run.server.model == "Qwen/Qwen2.5-Coder-1.5B-Instruct"


def test_the_papers_cells_have_its_samples_budgets_and_length() -> None:
    found = expand(read_sweep(find_sweep("paper")))
    cells = {(run.task, run.server.policy): run.method.num_samples for run in found}
    assert cells == {
        (task, policy): samples
        for task, samples, budgets in (
            ("aime24", 16, (2048, 4096, 6144)),
            ("aime25", 16, (2048, 4096, 6144)),
            ("math500", 8, (1024, 2048, 4096)),
            ("gpqa_diamond", 8, (1024, 2048, 4096)),
        )
        for policy in ("full", *(f"lessismore-{budget}" for budget in budgets))
    }
    assert {run.sampling["max_tokens"] for run in found} == {32768}


def test_a_wheel_has_them_where_they_are_looked_for(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("lim_sglang", "evals"):
        ignored = shutil.ignore_patterns("__pycache__", "kernels", "programs")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / done.stdout.split()[-1]) as wheel:
        for path in SWEEPS.glob("*.toml"):
            assert wheel.read(f"lim_sglang/evals/sweeps/{path.name}") == path.read_bytes()
