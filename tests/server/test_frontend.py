"""SGLang's frontend under a package whose file has not run, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lim_sglang.compat import SGLANG_VERSION

ROOT = Path(__file__).parents[2]


def run_python(program: str, *paths: Path) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process of its own, with folders before all others on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )


USES_OF_THE_FRONTEND = """
import sys
from lim_sglang.frontend import BaseBackend
import sglang as sgl
from sglang import RuntimeEndpoint, assistant, gen, select, system, user

@sgl.function
def ask(s, question):
    s += user(question) + assistant(gen("reply", max_tokens=1))

assert issubclass(RuntimeEndpoint, BaseBackend)
import lim_sglang.frontend
assert sgl is lim_sglang.frontend.sgl is sys.modules["sglang"]
assert not hasattr(sgl, "__wrapped__")  # as inspection asks
print(sgl.__version__, sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_programs_load_the_frontend_without_torch() -> None:
    shown = run_python(USES_OF_THE_FRONTEND)
    assert shown.stdout.split() == [SGLANG_VERSION, "[]"], shown.stderr


STAND_IN = {
    "__init__.py": "import sglang.lang.api as api, sglang.srt.server\nEngine = sglang.srt.server.X",
    "global_config.py": "global_config = 0",
    "version.py": "__version__ = '0'",
    "utils.py": "",
    "lang/api.py": "import sglang.utils\ndef gen(name=None): pass",
    "srt/server.py": "print('server', end=' ')\nX = object()",
    "srt/other.py": "",
}
"""A package with the layout of SGLang: its package file imports a module of the server."""
LOAD_LIGHT = """
import sys
from lim_sglang import frontend
frontend.{used} = {parameters!r}
frontend._EXECUTOR, frontend._EXECUTOR_STATE = "threading.Event", ("_cond", "_flag")
sgl = frontend.load_frontend()
print(end="; ")
"""
LIGHT = {"used": "USED_BY_PROGRAMS", "parameters": {"sglang.lang.api.gen": ("name",)}}


@pytest.mark.parametrize(
    "use",
    [
        "assert sgl.Engine is sys.modules['sglang.srt.server'].X",
        "from sglang import Engine",
        "from sglang import *; Engine",
        "import sglang.srt.server as s; assert s is sgl.srt.server is sys.modules[s.__name__]",
        "import sglang.srt.other as s; assert s is sgl.srt.other is sys.modules[s.__name__]",
        "import sglang.srt.server as s; assert s.__spec__.loader.path == s.__file__",
    ],
)
def test_what_only_the_whole_package_has_runs_the_package_file_once(
    use: str, tmp_path: Path
) -> None:
    write_stand_in(tmp_path)
    check = "gen = sgl.gen\n{use}\nassert sgl.Engine and sgl.gen is gen\nprint(type(sgl).__name__)"
    shown = run_python(LOAD_LIGHT.format(**LIGHT) + check.format(use=use), tmp_path)
    assert shown.stdout.split() == [";", "server", "module"], shown.stderr


@pytest.mark.parametrize(
    ("used", "parameters", "words"),
    [
        ("USED_BY_PROGRAMS", {"sglang.lang.api.gen": ("text",)}, "gen takes ('name',), expected"),
        ("USED_BY_PROGRAMS", {"sglang.lang.gone": ()}, "sglang.lang.gone does not load"),
        ("_LANGUAGE", "sglang.gone.", "does not load by itself"),
    ],
)
def test_a_frontend_that_is_not_the_expected_one_loads_all_of_sglang_and_says_so(
    used: str, parameters: object, words: str, tmp_path: Path
) -> None:
    write_stand_in(tmp_path)
    light = LOAD_LIGHT.format(used=used, parameters=parameters)
    shown = run_python(light + "sgl.Engine; print(type(sgl).__name__)", tmp_path)
    assert shown.stdout.split() == ["server", ";", "module"], shown.stderr
    assert "loading all of SGLang, since" in shown.stderr
    assert words in shown.stderr


def test_a_package_that_is_loaded_already_stays_as_it_is(tmp_path: Path) -> None:
    write_stand_in(tmp_path)
    program = "import sglang; from lim_sglang.frontend import sgl; assert sgl is sglang"
    shown = run_python(f"{program}; print(type(sglang).__name__)", tmp_path)
    assert shown.stdout.split() == ["server", "module"], shown.stderr


def write_stand_in(folder: Path) -> None:
    """Write a package `sglang` for tests of how it is loaded."""
    for name, text in STAND_IN.items():
        path = folder / "sglang" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
