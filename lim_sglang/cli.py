"""The command line `lim`, put together from commands that are defined beside their work."""

import sys

import typer

from lim_sglang.bench.commands import bench
from lim_sglang.doctor import doctor
from lim_sglang.errors import errors_in_words
from lim_sglang.evals.commands import compare_runs, evaluate, grade, write_report
from lim_sglang.programs.ask import ask
from lim_sglang.programs.proxy_command import proxy
from lim_sglang.serve import serve

app = typer.Typer(
    name="lim",
    help="Serve reasoning models with LessIsMore sparse attention, ask them, and score them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve)
app.command("ask")(ask)
app.command("proxy")(proxy)
app.command("eval")(evaluate)
app.command("grade")(grade)
app.command("compare")(compare_runs)
app.command("report")(write_report)
app.command("doctor")(doctor)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line; print a failure that the user can act on without a traceback."""
    words, further = _split(sys.argv[1:])
    with errors_in_words():
        app(args=words, obj=further)


def _split(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split a command line at -- into our words and those for SGLang."""
    if "--" not in words:
        return words, ()
    border = words.index("--")
    return words[:border], tuple(words[border + 1 :])
