"""Configuration of a run and its identity: the settings that every result depends on, compared
when a run is resumed and hashed into the run's id.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import lim_sglang
from lim_sglang.config import honours_seeds, lim_state
from lim_sglang.evals.grading import GRADING_VERSION
from lim_sglang.evals.tasks import Question, Task, questions_digest, selection_digest
from lim_sglang.programs.program import PROGRAMS, SAMPLING_VERSION, find_program
from lim_sglang.programs.schema import Sampling, check_thinking_budget

MAX_PARALLEL = 64
"""Most samples of one question in flight: the frontend starts a thread for each."""
SAMPLE_BY_SAMPLE = tuple(name for name, program in PROGRAMS.items() if not program.stops_early)
"""Programs that generate every sample, so that each sample is stored without the others."""
EVAL_SAMPLES = {name: program.eval_samples or program.samples for name, program in PROGRAMS.items()}
"""Samples of each question by default."""


@dataclass(frozen=True)
class RunConfig:
    """Choices of a user for the run of one task, before questions are read or servers asked.

    Raises:
        ConfigError: unknown program, options or a number of samples that the program does not
            take, or a thinking budget that leaves no tokens for an answer.
    """

    task: str
    """Name of a benchmark, or `file:PATH.jsonl`."""
    program: str = "majority"
    """A name that `find_program` finds; kept as the program's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the program that were given."""
    num_samples: int | None = None
    """Most samples of each question; None: the program's default."""
    system: str | None = None
    """System prompt."""
    thinking: bool | None = None
    """None: the default of the model's chat template."""
    thinking_budget: int | None = None
    """Tokens after which thoughts are closed; None: no limit."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Sampling` that were given; missing ones come from the model."""
    limit: int | None = None
    """Number of questions, the first ones of the task; None: all."""
    data_dir: Path | None = None
    """Folder with `<task>.jsonl`; None: the hub."""
    out: Path | None = None
    """Folder of the run; None: `runs/<id>`."""
    retry_failed: bool = False
    """True: samples that failed in an earlier session are generated again."""
    served: tuple[str, ...] | None = None
    """Model and settings of the server that is started for the run; None: a running server."""

    def __post_init__(self) -> None:
        program = find_program(self.program)
        object.__setattr__(self, "program", program.name)  # the class is frozen
        program.check(self.options, self.samples_per_question)
        max_tokens = self.sampling.get("max_tokens") or Sampling.max_tokens
        check_thinking_budget(self.thinking_budget, max_tokens)

    @property
    def samples_per_question(self) -> int:
        """Most samples of each question."""
        return self.num_samples or EVAL_SAMPLES[self.program]

    @property
    def stops_early(self) -> bool:
        """True if the program decides how many samples a question has. The samples of a question
        are then stored together or not at all.
        """
        return self.program not in SAMPLE_BY_SAMPLE

    def all_options(self) -> Mapping[str, Any]:
        """Return every option of the program, given or by default."""
        return {**find_program(self.program).options, **self.options}

    def samples_in_flight(self, concurrency: int) -> int:
        """Return the number of samples of one question that are generated at the same time.

        Args:
            concurrency: requests that the server is sent at the same time.
        """
        program = find_program(self.program)
        wanted = program.parallel if self.stops_early else None
        return min(
            wanted or self.samples_per_question,
            self.samples_per_question,
            MAX_PARALLEL,
            concurrency,
        )


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
"""Server arguments that can change an answer. `random_seed` is left out: SGLang chooses a new seed
at each start unless one is given, and the same command has to resume with a new server."""


def task_settings(
    config: RunConfig, task: Task, benchmark: Sequence[Question] | None = None
) -> dict[str, Any]:
    """Return the settings that are known without a server, ready for JSON.

    Args:
        benchmark: all questions of the task; None leaves out the settings that follow from them.
    """
    settings = {
        "task": task.name,
        "task_version": task.version,
        "prompt_sha256": hashlib.sha256(task.prompt.encode()).hexdigest(),
        "system": config.system,
        "thinking": {"enabled": config.thinking, "budget": config.thinking_budget},
        "program": {"name": config.program, "options": dict(config.all_options())},
        "num_samples": config.samples_per_question,
    }
    if benchmark is not None:
        digest = questions_digest(benchmark)
        asked = benchmark[: config.limit]
        settings["questions"] = {
            "hub_id": task.hub_id,
            "revision": task.revision if digest == task.digest else None,
            "digest": digest,
            "asked": len(asked),
            "asked_digest": selection_digest(asked),
            # Only where there are some, so that other runs keep their ids.
            **({"length": task.length, "seed": task.question_seed} if task.length else {}),
        }
    return settings


def server_settings(info: Mapping[str, Any], sampling: Sampling) -> dict[str, Any]:
    """Return the settings that a server decides: model, versions, how decode reads, sampling.

    Args:
        info: the server's `/server_info`, or the facts that another API has.
    """
    lim = lim_state(info) or {}
    return {
        "sampling": {
            **asdict(sampling),
            "seed_honoured": sampling.seed is not None and honours_seeds(info),
        },
        "api": info.get("api", "sglang"),
        "server": {
            **{name: info.get(name) for name in SERVER_ARGUMENTS},
            "device_name": lim.get("device_name"),
        },
        "lim": {
            # Without a gate no digest, so that runs of other policies keep their ids.
            name: lim.get(name)
            for name in ("config", "roles", *({"gate_sha256"} & lim.keys()))
        }
        if lim
        else None,
        "versions": {
            "lim_sglang": lim_sglang.__version__,
            "lim_server": lim.get("version"),
            "sglang_server": info.get("version"),
            "math_verify": metadata.version("math-verify"),
        },
    }


def run_settings(
    config: RunConfig,
    task: Task,
    benchmark: Sequence[Question],
    *,
    parallel: int,
    sampling: Sampling,
    server_info: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that can change the result, ready for JSON.

    Args:
        benchmark: all questions of the task.
        parallel: samples of one question in flight.
    """
    settings = task_settings(config, task, benchmark)
    # Where every sample is generated, the number in flight makes no difference.
    settings["program"]["parallel"] = parallel if config.stops_early else None
    return {
        **settings,
        **server_settings(server_info, sampling),
        "sampling_version": SAMPLING_VERSION,
        # Verdicts decide when a program that stops by itself has enough samples.
        "grading_version": GRADING_VERSION if config.stops_early else None,
    }


def run_id(settings: Mapping[str, Any], title: str | None = None) -> str:
    """Return a readable name that is the same for the same settings, and only for those.

    Args:
        title: of the task, as `task_title` returns it; None: the task's name.
    """
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    name = folder_name(title or settings["task"]).rstrip("-")
    return "-".join([name, describe_policy(settings), digest[:10]])


def folder_name(text: str) -> str:
    """Return a text as the name of a folder; the name of a file of questions is a path."""
    return re.sub(r"[^\w.-]+", "-", text)


def describe_policy(settings: Mapping[str, Any]) -> str:
    """Return how decode reads: `lessismore-256`, `full`, or the API of a server without lim."""
    config = (settings["lim"] or {}).get("config")
    if not config:
        return str(settings.get("api", "sglang"))
    policy = str(config["policy"])
    return policy if policy == "full" else f"{policy}-{config['budget']}"
