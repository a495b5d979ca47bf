"""What a run depends on: collected once, compared on resuming, condensed into the run's id."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import lim_sglang
from lim_sglang.evals.tasks import Question, Task, selection_digest
from lim_sglang.programs.records import Sampling

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


SHAPING_FILES = (
    *("programs/majority.py", "programs/drawing.py", "programs/transport.py"),
    *("programs/endpoint.py", "programs/openai_endpoint.py", "programs/openai_client.py"),
    *("programs/chat.py", "programs/answers.py", "programs/judge.py"),
    "evals/grade.py",
)
"""What a sample and its verdict depend on, under the package's folder."""


def run_settings(
    task: Task,
    questions: Sequence[Question],
    *,
    digest: str,
    num_samples: int,
    sampling: Sampling,
    prompt: str,
    server_info: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that can change the result, ready for JSON.

    Args:
        questions: those that are asked, in their order.
        digest: `questions_digest` of the whole benchmark that they are the beginning of.
        server_info: what the endpoint says of its server.
    """
    states = server_info.get("internal_states") or [{}]
    lim = states[0].get("lim")
    return {
        "task": task.name,
        "questions": {
            "hub_id": task.hub_id,
            "revision": task.revision if digest == task.digest else None,
            "digest": digest,
            "asked": len(questions),
            "asked_digest": selection_digest(questions),
        },
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "num_samples": num_samples,
        "sampling": {
            **asdict(sampling),
            "seed_honoured": sampling.seed is not None
            and bool(server_info.get("enable_deterministic_inference")),
        },
        "api": server_info.get("api", "sglang"),
        "server": {name: server_info.get(name) for name in SERVER_ARGUMENTS},
        # None: a server without LessIsMore answers.
        "lim": {"config": lim.get("config"), "roles": lim.get("roles")} if lim else None,
        "versions": {
            "lim_sglang": lim_sglang.__version__,
            "lim_server": lim.get("version") if lim else None,
            "sglang_server": server_info.get("version"),
            "math_verify": metadata.version("math-verify"),
        },
        "code_sha256": code_digest(),
    }


def code_digest() -> str:
    """SHA-256 of the files that make a sample and its verdict; other edits leave a run as it is."""
    root = Path(lim_sglang.__file__).parent
    content = b"".join((root / name).read_bytes() for name in SHAPING_FILES)
    return hashlib.sha256(content).hexdigest()


def run_id(settings: Mapping[str, Any]) -> str:
    """A readable name that is the same for the same settings, and only for those."""
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return "-".join([settings["task"], describe_policy(settings), digest[:10]])


def describe_policy(settings: Mapping[str, Any]) -> str:
    """How decode reads, in a word or two: `lessismore-256`, `full`, or the API without lim."""
    config = (settings["lim"] or {}).get("config")
    if not config:
        return str(settings.get("api", "sglang"))
    policy = str(config["policy"])
    return policy if policy == "full" else f"{policy}-{config['budget']}"


def differences(old: object, new: object, name: str = "") -> Iterator[str]:
    """Where two settings differ, one text a value, with the old value and the new one."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name} was {json.dumps(old)} and is now {json.dumps(new)}"
