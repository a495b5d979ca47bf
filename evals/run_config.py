"""What a run depends on: collected once, compared on resuming, condensed into the run's id."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any, NamedTuple

import lim_sglang
from lim_sglang.errors import ConfigError
from lim_sglang.evals.grading import GRADING_VERSION
from lim_sglang.evals.tasks import Question, Task, selection_digest
from lim_sglang.programs.program import PROGRAMS, SAMPLING_VERSION, find_program
from lim_sglang.programs.schema import Sampling

MOST_AT_ONCE = 64
"""Samples of one question in flight: the frontend starts a thread for each."""
SAMPLE_BY_SAMPLE = tuple(name for name, program in PROGRAMS.items() if not program.stops_early)
"""Programs that draw every sample, so that each is worth keeping without the others."""
DEFAULT_SAMPLES = {name: program.samples for name, program in PROGRAMS.items()} | {"majority": 4}
"""Of each question, where nobody says how many."""


@dataclass(frozen=True)
class Method:
    """A program with all that its samples depend on, but for the sampling parameters."""

    num_samples: int = DEFAULT_SAMPLES["majority"]
    """Of each question, at most."""
    program: str = "majority"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the program, by name."""
    system: str | None = None
    """A system prompt."""
    thinking: bool | None = None
    """None: as the model's own template has it."""
    thinking_budget: int | None = None
    """Tokens; None: no limit."""

    @property
    def stops_by_itself(self) -> bool:
        """Whether a question is drawn whole or not at all, since its samples decide on others."""
        return self.program not in SAMPLE_BY_SAMPLE


USUAL = Method()


def choose_method(program: str, num_samples: int | None, **others: Any) -> Method:
    """A method whose program exists.

    Args:
        num_samples: None leaves it to the program.

    Raises:
        ConfigError: there is no such program, or it does not draw so many samples.
    """
    find_program(program)
    if program == "single" and num_samples not in (None, 1):
        raise ConfigError(
            f"--program single draws one sample a question, not {num_samples}: "
            "--program majority scores several, each for itself and by their vote"
        )
    return Method(num_samples or DEFAULT_SAMPLES[program], program, **others)


def complete(method: Method) -> Method:
    """With every option of its program, also those that nobody named.

    Raises:
        ConfigError: one that the program does not have.
    """
    if not method.options and not method.stops_by_itself:
        return method  # and SGLang need not be loaded
    program = find_program(method.program)
    program.check(method.options)
    return replace(method, options={**program.options, **method.options})


def in_flight(method: Method, concurrency: int) -> int:
    """Samples of one question that are drawn at the same time.

    Args:
        places: requests that a server is given at once.
    """
    wanted = None
    if method.stops_by_itself:
        wanted = find_program(method.program).parallel
    return min(wanted or method.num_samples, method.num_samples, MOST_AT_ONCE, concurrency)


SERVER_ARGUMENTS = (
    "attention_backend",
    "chat_template",
    "context_length",
    "decode_attention_backend",
    "device",
    "dtype",
    "enable_deterministic_inference",
    "json_model_override_args",
    "kv_cache_dtype",
    "load_format",
    "model_path",
    "preferred_sampling_params",
    "prefill_attention_backend",
    "quantization",
    "revision",
    "sampling_backend",
    "tokenizer_path",
    "tp_size",
    "weight_version",
)
"""The server's arguments that can change an answer. `random_seed` is left out: SGLang draws a new
one at each start unless told otherwise, and the same command has to go on with a new server."""


def run_settings(
    task: Task,
    questions: Sequence[Question],
    *,
    digest: str,
    method: Method,
    parallel: int,
    sampling: Sampling,
    server_info: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that can change the result, ready for JSON.

    Args:
        questions: those that are asked, in their order.
        digest: `questions_digest` of the whole benchmark that they are the beginning of.
        method: with all options of its program.
        parallel: samples of one question in flight.
        server_info: what the endpoint says of its server.
    """
    return {
        "task": task.name,
        "task_version": task.version,
        "questions": {
            "hub_id": task.hub_id,
            "revision": task.revision if digest == task.digest else None,
            "digest": digest,
            "asked": len(questions),
            "asked_digest": selection_digest(questions),
        },
        "prompt_sha256": hashlib.sha256(task.prompt.encode()).hexdigest(),
        **_method_settings(method, parallel),
        "sampling": {
            **asdict(sampling),
            "seed_honoured": sampling.seed is not None
            and bool(server_info.get("enable_deterministic_inference")),
        },
        **_server_settings(server_info),
        "sampling_version": SAMPLING_VERSION,
        # Verdicts decide when a program that stops by itself has samples enough.
        "grading_version": GRADING_VERSION if method.stops_by_itself else None,
    }


def _method_settings(method: Method, parallel: int) -> dict[str, Any]:
    return {
        "system": method.system,
        "thinking": {"enabled": method.thinking, "budget": method.thinking_budget},
        "program": {
            "name": method.program,
            "options": dict(method.options),
            # Where all are drawn, it makes no difference how many at a time.
            "parallel": parallel if method.stops_by_itself else None,
        },
        "num_samples": method.num_samples,
    }


def _server_settings(info: Mapping[str, Any]) -> dict[str, Any]:
    """What answers, and by which versions."""
    # What LessIsMore shows of itself; nothing where another server answers.
    lim: Mapping[str, Any] = (info.get("internal_states") or [{}])[0].get("lim") or {}
    return {
        "api": info.get("api", "sglang"),
        "server": {
            **{name: info.get(name) for name in SERVER_ARGUMENTS},
            "device_name": lim.get("device_name"),
        },
        "lim": {"config": lim.get("config"), "roles": lim.get("roles")} if lim else None,
        "versions": {
            "lim_sglang": lim_sglang.__version__,
            "lim_server": lim.get("version"),
            "sglang_server": info.get("version"),
            "math_verify": metadata.version("math-verify"),
        },
    }


def run_id(settings: Mapping[str, Any]) -> str:
    """A readable name that is the same for the same settings, and only for those."""
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return "-".join([folder_name(settings["task"]), describe_policy(settings), digest[:10]])


def folder_name(task: str) -> str:
    """A task's name as a folder can have it: that of a file of questions is a path."""
    return re.sub(r"[^\w.-]+", "-", task)


def describe_policy(settings: Mapping[str, Any]) -> str:
    """How decode reads, in a word or two: `lessismore-256`, `full`, or the API without lim."""
    config = (settings["lim"] or {}).get("config")
    if not config:
        return str(settings.get("api", "sglang"))
    policy = str(config["policy"])
    return policy if policy == "full" else f"{policy}-{config['budget']}"


class Difference(NamedTuple):
    """A setting that has two values."""

    name: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.name} was {json.dumps(self.old)} and is now {json.dumps(self.new)}"


def differences(old: object, new: object, name: str = "") -> Iterator[Difference]:
    """Where two settings differ, value by value."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield Difference(name, old, new)
