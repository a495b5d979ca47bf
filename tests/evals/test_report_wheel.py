"""What is installed holds the page's template, which is no Python file."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lim_sglang.evals.report_page import TEMPLATE

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, as pip would build it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("lim_sglang", "kernels", "programs", "evals"):
        shutil.copytree(
            ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tree / done.stdout.split()[-1]


def test_the_wheel_holds_the_template_as_it_is_here(built: Path) -> None:
    name = f"lim_sglang/evals/{TEMPLATE.name}"
    with zipfile.ZipFile(built) as wheel:
        assert name in wheel.namelist(), "pyproject.toml's package-data does not name it"
        assert wheel.read(name) == TEMPLATE.read_bytes()


def test_a_page_is_made_from_the_wheel_alone(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(tmp_path)
    program = (
        "from lim_sglang.evals import report_page; assert report_page.__file__.startswith("
        f"{str(tmp_path)!r}); print(report_page.make_page([])[:15])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "<!DOCTYPE html>", done.stderr
