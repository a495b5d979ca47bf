"""`docs/cli.md` names every command and option with its default; `make docs` writes the tables.

Run as a script, this file writes what the test compares.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from lim_sglang import __version__, config
from lim_sglang.cli import command_line, main
from lim_sglang.counters import DraftStats, Stats
from lim_sglang.errors import INTERRUPTED, as_called
from lim_sglang.evals.tasks import TASKS
from lim_sglang.programs.ask import run_script
from lim_sglang.programs.program import PROGRAMS

ROOT = Path(__file__).parents[2]
CLI_MD, LAUNCH = ROOT / "docs" / "cli.md", ROOT / "launch.sh"
BEGIN, END = "<!-- lim options: begin -->", "<!-- lim options: end -->"
PASSES_ON = ("serve", "eval", "bench serve")
"""Commands whose words after -- go to SGLang."""


def tables() -> str:
    """Render a heading, the help and a table of options for each command."""
    return "\n\n".join(
        "\n".join([f"## `{usage(name, command)}`", "", help_of(command), "", *table(command)])
        for name, command in commands("", command_line())
    )


def commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield each command with its full name, groups resolved."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, child in command.commands.items():
        yield from commands(f"{path} {name}".strip(), child)


def usage(name: str, command: Any) -> str:
    """Return the command with its arguments, as one types it."""
    arguments = [spelled(p)[0] for p in command.params if p.param_type_name == "argument"]
    further = ["[-- SGLang options]"] * (name in PASSES_ON)
    return " ".join(["lim", name, *arguments, "[options]", *further])


def help_of(command: Any) -> str:
    """Return the command's description without line breaks inside paragraphs."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", (command.help or "").strip())


def table(command: Any) -> list[str]:
    """Return the rows of a command's arguments and options."""
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    for parameter in command.params:
        name = ", ".join(f"`{word}`" for word in spelled(parameter))
        cells = (name, default(parameter), meaning(parameter))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return rows if len(rows) > 2 else ["No options."]


def spelled(parameter: Any) -> list[str]:
    """Return the spellings of an option, or an argument as usage lines have it."""
    if parameter.param_type_name == "option":
        return [*parameter.opts, *parameter.secondary_opts]
    name = parameter.name.upper() + "…" * (parameter.nargs != 1)
    return [name if parameter.required else f"[{name}]"]


def default(parameter: Any) -> str:
    """Return a parameter's default in words."""
    stated, value = parameter.show_default, parameter.default
    if isinstance(stated, str):
        return stated
    if parameter.required:
        return "required"
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return f"`{parameter.opts[0]}`" if value else "off"
    return f"`{str(getattr(value, 'value', value)).encode('unicode_escape').decode()}`"


def meaning(parameter: Any) -> str:
    """Return a parameter's help, its choices and its environment variable."""
    text = parameter.help or ""
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        text += f" One of {', '.join(choice.value for choice in kind)}."
    if parameter.envvar:
        text += f" Environment: `{parameter.envvar}`."
    return " ".join(text.split())


def rewritten(text: str) -> str:
    """Return the document with fresh tables between the markers."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def test_every_command_and_option_is_documented_as_it_is() -> None:
    text = CLI_MD.read_text()
    found, expected = text.splitlines(), rewritten(text).splitlines()
    missing = [line for line in expected if line not in found]
    obsolete = [line for line in found if line not in expected]
    assert (missing, obsolete) == ([], []), "run `make docs`"
    assert found == expected, "run `make docs`"


@pytest.mark.parametrize(("name", "command"), [*commands("", command_line())])
def test_help_shows_a_default_for_every_option(name: str, command: Any) -> None:
    context = command.make_context(name, ["x"] * 9, resilient_parsing=True)
    for parameter in command.params:
        spelled, meaning = parameter.get_help_record(context)
        assert "{{" not in meaning, spelled
        if parameter.param_type_name == "option":
            assert "default:" in meaning or "required" in meaning, spelled


@pytest.mark.parametrize("path", ["", "bench"])
def test_help_shows_whole_summaries(path: str) -> None:
    group = command_line().commands[path] if path else command_line()
    shown = " ".join(group.get_help(group.make_context("lim", [], resilient_parsing=True)).split())
    for name, command in group.commands.items():
        summary = help_of(command).partition("\n\n")[0].partition(". ")[0].rstrip(".")
        assert f"{name} {summary}" in shown
    assert "..." not in shown.replace("[ARGS]...", "")


@pytest.mark.parametrize(
    ("words", "expected", "given"),
    [
        ("ask hi --show foo", "winner", "'foo'"),
        ("ask hi --samples x", "an integer", "'x'"),
        ("ask hi --samples 0", "at least 1", "'0'"),
        ("ask hi --temperature 3", "at most 2", "'3'"),
        ("ask hi --timeout soon", "a number", "'soon'"),
        ("proxy --max-questions 1.5", "an integer", "'1.5'"),
        ("bench decode --quantization awq", "fp8", "'awq'"),
        ("bench serve --concurrency 2 --concurrency y", "an integer", "'y'"),
        ("script hi --samples x", "an integer", "'x'"),
    ],
)
def test_a_value_that_an_option_cannot_take_is_refused_in_our_words(
    words: str,
    expected: str,
    given: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, *rest = words.split()
    monkeypatch.setattr("sys.argv", [name, *rest])
    with pytest.raises(SystemExit) as end:
        run_script("majority") if name == "script" else command_line()(args=words.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert rest[-2] in error
    assert expected in error
    assert given in error
    assert not re.search("Value error|Input should|valid (integer|number)|parse", error)


@pytest.mark.parametrize("words", ["serve --help", "serve --no-such-option"])
def test_the_command_is_called_lim_however_it_is_started(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["some/lim_sglang/__main__.py", *words.split()])
    with pytest.raises(SystemExit):
        main()
    shown = "".join(capsys.readouterr())
    assert "Usage: lim serve [OPTIONS]" in shown
    assert words.endswith("--help") or "Try 'lim serve --help' for help" in shown


INTERRUPT = """
import os, runpy, signal, sys
def interrupt(event, arguments):
    if event == "import" and arguments[0] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
runpy.run_module("lim_sglang", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["typer", "lim_sglang.gates.training", "lim_sglang.cli"])
def test_ctrl_c_during_the_imports_ends_without_a_traceback(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPT, module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "interrupted\n")


def test_ctrl_c_that_a_shell_has_switched_off_stays_so() -> None:
    ignored = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{INTERRUPT}"
    command = [sys.executable, "-c", ignored, "typer"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Usage" in done.stdout + done.stderr


def test_the_lim_command_is_the_module_that_heeds_ctrl_c() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"lim": "lim_sglang.__main__:main"}


def test_version_programs_and_tasks_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for words in ("--version", "programs", "eval --help"):
        with pytest.raises(SystemExit) as end:
            command_line()(args=words.split())
        assert end.value.code == 0
        shown[words] = " ".join(capsys.readouterr().out.split())
    assert shown["--version"] == f"lim {__version__}"
    for program in PROGRAMS.values():
        assert f"{program.name} {program.stops_when}" in shown["programs"]
        for option, value in program.options.items():
            assert f"{option}={value}" in shown["programs"]
    assert all(task in shown["eval --help"] for task in TASKS)


def test_every_option_of_launch_sh_is_documented() -> None:
    options = re.findall(r"^#   (--[\w-]+)", LAUNCH.read_text(), flags=re.MULTILINE)
    text = CLI_MD.read_text()
    assert options == re.findall(r"^\| `(--[\w-]+)` \|", text, flags=re.MULTILINE)[: len(options)]


def test_before_the_installation_launch_sh_shows_all_options_and_installs_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(CLI_MD, tmp_path / "docs")
    shutil.copy(LAUNCH, tmp_path)
    command = [tmp_path / LAUNCH.name, "some/model", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert (shown.returncode, shown.stderr) == (0, "")
    words = " ".join(shown.stdout.split())
    serve = dict(commands("", command_line()))["serve"]
    for parameter in serve.params:
        assert ", ".join(spelled(parameter)) in words
        assert " ".join((parameter.help or "").split()) in words
    assert "--install-only" in words
    assert not (tmp_path / ".venv").exists()


def test_every_environment_variable_is_documented() -> None:
    variables = [value for name, value in vars(config).items() if name.endswith("_VAR")]
    text = CLI_MD.read_text()
    assert not [variable for variable in variables if f"`{variable}`" not in text]


def test_every_counter_of_a_server_is_documented() -> None:
    text = CLI_MD.read_text()
    counters = {counter.name for stats in (Stats, DraftStats) for counter in fields(stats)}
    assert not [name for name in counters - {"drafting"} if f"`{name}`" not in text]


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (("ask", "--smaples", "8"), "No such option: --smaples (Possible options: --samples)"),
        (("serve", "--tp-size", "2"), "No such option: --tp-size; options of SGLang go after --"),
        (("version",), "No such command 'version'. Did you mean --version?"),
        (("help",), "No such command 'help'. Did you mean --help?"),
        (("aks",), "No such command 'aks'. Did you mean 'ask'?"),
        (("-V",), f"lim {__version__}"),
    ],
)
def test_a_word_that_nearly_is_one_is_answered_with_the_right_one(
    words: tuple[str, ...], output: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["lim", *words])
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main()
    assert output in " ".join("".join(capsys.readouterr()).split())


if __name__ == "__main__":
    CLI_MD.write_text(rewritten(CLI_MD.read_text()))


@pytest.mark.parametrize(
    ("path", "called"), [("/usr/bin", "`.venv/bin/lim serve`"), (".venv/bin", "`lim serve`")]
)
def test_messages_name_commands_as_they_are_called(
    path: str, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / ".venv" / "bin" / "lim"
    script.parent.mkdir(parents=True)
    script.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", str(tmp_path / path))
    assert as_called("start one with `lim serve`") == f"start one with {called}"
