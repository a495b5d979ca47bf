"""The package in an environment that has SGLang already: from a clone by pip, and as a wheel."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from lim_sglang.evals.matrix import MATRICES
from tests.processes import ON_CPU, ROOT, WITH_LIM, clean_environment, serving


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside the checkout; return its output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean_environment({"PYTHONPATH": ""}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what pip reads of the checkout, without anything that was built there."""
    tree = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("lim_sglang", "kernels", "programs", "evals"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    return tree


@pytest.fixture(scope="module", params=["clone", "wheel"])
def python(
    request: pytest.FixtureRequest, clone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the interpreter of an environment with SGLang, into which the package was put."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    # A line in a .pth file adds a folder without the .pth files in it: the checkout stays unseen.
    (site / "existing.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    source = clone
    if request.param == "wheel":
        run(*pip, "wheel", *offline, "--wheel-dir", folder, clone, cwd=folder)
        (source,) = folder.glob("*.whl")
    interpreter = folder / "bin" / "python"
    run(*pip, "--python", interpreter, "install", *offline, source, cwd=folder)
    return interpreter


def test_linked_packages_and_data_files_are_installed(python: Path) -> None:
    program = (
        "from lim_sglang import evals, kernels, programs; "
        "from lim_sglang.evals import matrix, report_page; "
        "print(matrix.__file__, *sorted(p.name for p in matrix.MATRICES.iterdir())); "
        "print(report_page.make_page([])[:15])"
    )
    where, page = run(python, "-c", program, cwd=python.parent).splitlines()
    path, *matrices = where.split()
    assert Path(path).is_relative_to(python.parents[1])
    assert matrices == sorted(path.name for path in MATRICES.iterdir())
    assert page == "<!DOCTYPE html>"


@pytest.mark.e2e
@pytest.mark.slow
def test_doctor_finds_nothing_off(python: Path) -> None:
    report = run(python.with_name("lim"), "doctor", cwd=python.parent)
    assert "entry point lim in sglang.srt.plugins" in report
    assert "SGLang accepts --attention-backend lim" in report


@pytest.mark.e2e
@pytest.mark.slow
def test_sglangs_own_command_serves_with_the_backend(
    python: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command = [str(python), "-m", "sglang.launch_server", "--model-path", str(tiny_model)]
    command += [*ON_CPU, *WITH_LIM]
    with serving(command, folder=tmp_path, settings={"PYTHONPATH": ""}) as server:
        assert len(server.ask([5, 6, 7], num_tokens=4).tokens) == 4
        assert server.lim()["decode_steps"] > 0
