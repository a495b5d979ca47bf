"""The command line `lim`, put together from commands that are defined beside their work."""

import inspect
import sys
import warnings
from typing import Annotated, Any

import typer

from lim_sglang import __version__
from lim_sglang.bench.commands import bench, calibrate
from lim_sglang.doctor import doctor
from lim_sglang.errors import errors_in_words
from lim_sglang.evals.commands import compare_runs, grade, write_report
from lim_sglang.evals.evaluate import evaluate
from lim_sglang.gates.training import train_gate
from lim_sglang.launch.serve import serve
from lim_sglang.programs.ask import ask
from lim_sglang.programs.options import (
    CommandGroup,
    QuestionCommand,
    ServerCommand,
    list_programs,
)
from lim_sglang.programs.proxy.command import proxy
from lim_sglang.tracing.command import trace

app = typer.Typer(
    name="lim",
    cls=CommandGroup,
    help="Serve reasoning models with LessIsMore sparse attention, ask them, and score them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("serve", cls=ServerCommand)(serve)
app.command("ask", cls=QuestionCommand)(ask)
app.command("programs")(list_programs)
app.command("proxy")(proxy)
app.command("eval", cls=ServerCommand)(evaluate)
app.command("grade")(grade)
app.command("compare")(compare_runs)
app.command("report")(write_report)
app.command("calibrate")(calibrate)
app.command("train-gate")(train_gate)
app.command("trace")(trace)
app.command("doctor")(doctor)
app.add_typer(bench, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lim {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", is_eager=True, callback=_print_version, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


def command_line() -> Any:
    """Return the `lim` command; its help has whole summaries and a default for each option."""
    group = typer.main.get_command(app)
    _complete_help(group)
    return group


def _complete_help(command: Any) -> None:
    text = " ".join(inspect.cleandoc(command.help or "").partition("\n\n")[0].split())
    first, stop, _ = text.partition(". ")
    command.short_help = first + stop.strip()
    for option in command.params:
        if option.param_type_name == "option" and not option.is_eager:
            option.show_default = _default_in_words(option)
    for child in getattr(command, "commands", {}).values():
        _complete_help(child)


def _default_in_words(option: Any) -> str | bool:
    """Return the stated default, words for none and off, or True for the value itself."""
    if isinstance(option.show_default, str):
        return option.show_default
    if option.default is False:
        return "off"
    return True if option.default is not None else "none"


def main() -> None:
    """Run the command line; print a failure that the user can act on without a traceback."""
    words, further = _split(sys.argv[1:])
    # anyio warns about a connection that Ctrl-C or a decided vote ends before it is tried.
    warnings.filterwarnings("ignore", r"coroutine 'connect_tcp\b", RuntimeWarning)
    with errors_in_words():
        command_line()(args=words, prog_name="lim", obj=further)


def _split(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split a command line at -- into our words and those for SGLang."""
    if "--" not in words:
        return words, ()
    border = words.index("--")
    return words[:border], tuple(words[border + 1 :])
