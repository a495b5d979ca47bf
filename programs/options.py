"""Command-line options that all commands with samples share."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from typer.core import TyperCommand, TyperGroup

from lim_sglang.config import API_KEY_VAR, URL_VAR
from lim_sglang.errors import INTERRUPTED, ConfigError, value_error
from lim_sglang.markdown_section import join_words
from lim_sglang.programs.program import PROGRAMS, listing
from lim_sglang.programs.schema import MATH_PROMPT, RANGES, Api, Sampling
from lim_sglang.progress import plain_console, print_plain

QUESTION_FIELD = "{question}"
LIST = "?"
"""In place of a program's name: list the programs."""
NO_ANSWER = 3
"""Exit code of `lim ask` if no sample states an answer."""
TEMPLATE = MATH_PROMPT.format(question=QUESTION_FIELD)
"""The prompt template of mathematical questions, as `--template` takes it."""


_UsageError: Any = typer.BadParameter.__mro__[1]
"""Base of the refusals of a command line, an unknown option's too, which typer does not export."""


class Command(TyperCommand):
    """A command that refuses values of options in our words, not in pydantic's."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the words of the command line."""
        with _values_in_words():
            return super().make_context(*args, **kwargs)


class ServerCommand(TyperCommand):
    """A command whose words after -- are options of SGLang."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line; say where options of SGLang go."""
        try:
            words: list[str] = super().parse_args(ctx, args)
        except _UsageError as error:
            if hasattr(error, "possibilities"):  # an unknown option
                own = (
                    "" if ctx.command.name == "serve" else ", other settings of lim by --lim-config"
                )
                error.message += f"; options of SGLang go after --{own}"
            raise
        return words


class QuestionCommand(Command):
    """A command with one question, which a shell splits into words if it is not in quotes."""

    allow_extra_args = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of the command line; raises `typer.BadParameter` for further ones."""
        rest: list[str] = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            raise typer.BadParameter(
                f"{1 + len(ctx.args)} words where one question was expected: put the question in "
                "quotes",
                ctx,
                param_hint="question",
            )
        return rest


class CommandGroup(TyperGroup):
    """Commands that refuse values of options in our words, not in pydantic's."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command; point out an option of the same name, as of `lim version`."""
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            known = [name for option in self.get_params(ctx) for name in option.opts]
            if f"--{args[0]}" in known:
                error.message += f" Did you mean --{args[0]}?"
            raise

    def invoke(self, ctx: Any) -> Any:
        """Read the words of a command, and run the command; Ctrl-C ends it in words."""
        try:
            with _values_in_words():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _values_in_words() -> Iterator[None]:
    try:
        yield
    except typer.BadParameter as error:
        if isinstance(error.__cause__, ValidationError):
            error.message = value_error(error.__cause__.errors()[0])
        raise
    except _UsageError as error:
        if likely := getattr(error, "possibilities", None):
            error.possibilities = likely[:1]  # further ones only share some letters
        raise


def _refuse_zero(parameter: typer.CallbackParam, value: float | None) -> float | None:
    if value == 0:
        raise typer.BadParameter(RANGES[str(parameter.name)].zero)
    return value


UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        "--base-url",
        envvar=URL_VAR,
        help="Address of the running server, with or without /v1; for OpenAI's API the base URL.",
    ),
]
ApiOption = Annotated[
    Api,
    typer.Option(
        "--api", help="openai asks any OpenAI-compatible server; it has no top_k and no aborts."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Which model, with --api openai.", show_default="the server's only one"
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=API_KEY_VAR,
        show_envvar=True,
        help="Key of a server that was started with one.",
    ),
]
MaxTokensOption = Annotated[
    int,
    typer.Option(
        "--max-tokens",
        min=RANGES["max_tokens"].least,
        help="Tokens after which a sample is cut off.",
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=RANGES["temperature"].least,
        max=RANGES["temperature"].most,
        help="0 always takes the likeliest token.",
        show_default=f"the model's, else {Sampling.temperature}",
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=RANGES["top_p"].least,
        max=RANGES["top_p"].most,
        callback=_refuse_zero,
        help="Sample from the likeliest tokens of this total probability.",
        show_default=f"the model's, else {Sampling.top_p}",
    ),
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        min=RANGES["top_k"].least,
        callback=_refuse_zero,
        help="Sample from this number of likeliest tokens at most; -1: from all.",
        show_default=f"the model's, else {Sampling.top_k}",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=RANGES["seed"].least,
        help="Sample i is sent SEED + i; lim eval draws a seed for each question from it and the "
        "id. SGLang heeds seeds with --sampling-backend lim, or in deterministic inference.",
    ),
]


def given_options(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Return the options of these parameters that stand on the command line, as `--name`."""
    option_of = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        option_of[name] for name, found in sources.items() if found and found.name == "COMMANDLINE"
    ]


def by_program(numbers: Mapping[str, int | None]) -> str:
    """Return the numbers with the programs that have each, such as `adaptive and budget 40`."""
    by_number: dict[int, list[str]] = {}
    for name, number in numbers.items():
        if number is not None:
            by_number.setdefault(number, []).append(name)
    return ", ".join(f"{join_words(names)} {number}" for number, names in by_number.items())


def list_programs() -> None:
    """List the programs of ask, proxy and eval: when each stops, its samples and its options."""
    print_plain(plain_console(), listing())


def _list_programs(name: str) -> str:
    if name == LIST:
        list_programs()
        raise typer.Exit
    return name


ProgramOption = Annotated[
    str,
    typer.Option(
        "--program",
        is_eager=True,
        callback=_list_programs,
        help=f"{', '.join(PROGRAMS)}; {LIST} or `lim programs` lists when each stops.",
    ),
]
MostSamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        min=RANGES["samples"].least,
        help="Chains of thought, at most.",
        show_default=by_program({name: program.samples for name, program in PROGRAMS.items()}),
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Option of a program: "
        + "; ".join(
            f"{', '.join(program.options)} of {name}"
            for name, program in PROGRAMS.items()
            if program.options
        )
        + ". May be repeated.",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="A system prompt.", show_default="none")
]
TemplateOption = Annotated[
    str,
    typer.Option(
        "--template",
        help=f"Prompt template, with {QUESTION_FIELD} where the question goes; the rest is sent as "
        "it is.",
    ),
]
ThinkingOption = Annotated[
    bool | None,
    typer.Option(
        "--thinking/--no-thinking",
        help="For models that can think or not.",
        show_default="the model's own",
    ),
]
ThinkingBudgetOption = Annotated[
    int | None,
    typer.Option(
        "--thinking-budget",
        min=RANGES["thinking_budget"].least,
        help="For models that think: tokens after which their thoughts are closed and they answer, "
        "up to --max-tokens in all.",
        show_default="no limit",
    ),
]
TimeoutOption = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=RANGES["timeout_s"].least,
        max=RANGES["timeout_s"].most,
        help="Seconds that the server has for one sample, and, 60 at most, to say what it serves.",
    ),
]


def read_template(text: str) -> str:
    """Return a user's template, in which only {question} has a meaning, as one for `str.format`.

    Raises:
        ConfigError: the template does not hold {question} exactly once.
    """
    if text.count(QUESTION_FIELD) != 1:
        raise ConfigError(f"--template must hold {QUESTION_FIELD} exactly once")
    escaped = text.replace("{", "{{").replace("}", "}}")
    return escaped.replace(f"{{{QUESTION_FIELD}}}", QUESTION_FIELD)


def read_settings(texts: list[str]) -> dict[str, int | float]:
    """Return the options of a program that NAME=VALUE texts name.

    Raises:
        ConfigError: a text has another form, or a name occurs twice.
    """
    settings: dict[str, int | float] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.strip().replace("-", "_")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not sign or not name or not math.isfinite(number):
            raise ConfigError(f"--set takes NAME=VALUE with a number, not {text!r}")
        if name in settings:
            raise ConfigError(f"--set {name} is given twice")
        settings[name] = int(number) if number.is_integer() else number
    return settings
