"""Workloads of the benchmarks: models with their formats, backends, batches of requests, policies,
and texts that are decoded as they are."""

import json
import random
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

from lim_sglang.config import BACKEND, LimConfig, default_of, resolve_settings
from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.run_store import load_run, read_questions
from lim_sglang.gates.files import folder_of, weights_digest
from lim_sglang.gates.training import check_text, read_json_lines
from lim_sglang.markdown_section import counted
from lim_sglang.policies import POLICIES
from lim_sglang.policies.lossless import AUTO_CHOICES, Lossless
from lim_sglang.policies.policy import Role, SparsePolicy
from lim_sglang.validation import default_page_size

SGLANG_BACKENDS = ("flashinfer", "triton", "fa3")
"""SGLang's own attention backends that are compared with ours."""
WITH_LAYERS = "+layers"
"""Ending of the name of such a backend whose steps run layers by our kernels, too."""
DENSE_BACKENDS = (*SGLANG_BACKENDS, f"flashinfer{WITH_LAYERS}")
CacheDtype = Literal["auto", "fp8_e4m3", "fp8_e5m2"]
"""Format of the KV cache; `auto` is the model's dtype, or the checkpoint's choice."""
Quantization = Literal["none", "fp8"]
"""Quantization of the weights at loading; `none` leaves a quantized checkpoint as it is."""

# fmt: off
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000,
    "rms_norm_eps": 1e-6, "bos_token_id": 151643, "eos_token_id": 151645,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json, and so on.
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False,
    },
    "qwen3-4b": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True,
    },
    "qwen3-4b-2507": {  # Qwen3-4B-Thinking-2507 and -Instruct-2507
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True,
        "max_position_embeddings": 262144, "rope_theta": 5000000,
    },
    "qwen3-1.7b": {
        **_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "tie_word_embeddings": True,
        "num_hidden_layers": 28, "num_attention_heads": 16,
    },
    "qwen3-32b": {
        **_QWEN3, "hidden_size": 5120, "intermediate_size": 25600, "tie_word_embeddings": False,
        "num_hidden_layers": 64, "num_attention_heads": 64,
    },
    "qwen3-30b-a3b": {  # 128 experts in each layer, 8 of which serve a token
        **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "num_hidden_layers": 48, "hidden_size": 2048, "num_key_value_heads": 4,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "tie_word_embeddings": False,
    },
    "llama-8b": {  # Llama-3.1-8B and DeepSeek-R1-Distill-Llama-8B
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "coder-1.5b": {  # Qwen2.5-Coder-1.5B-Instruct
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16",
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "hidden_size": 1536, "intermediate_size": 8960, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rope_theta": 1000000, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
    },
}
# fmt: on
"""Hugging Face configurations by the name that `lim bench --shape` takes; a field that has its
default in transformers is left out."""


@dataclass(frozen=True)
class ModelChoice:
    """The measured model, a published shape with dummy weights or a model folder, and the formats
    in which SGLang holds its KV cache and weights, for all backends alike."""

    shape: str | None
    folder: str | None = None
    kv_cache_dtype: CacheDtype = "auto"
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        if (self.shape is None) == (self.folder is None):
            raise ConfigError("name what to measure: either --shape qwen3-8b or --model FOLDER")
        if self.is_dummy and self.shape not in SHAPES:
            raise ConfigError(f"unknown shape {self.shape!r}; known shapes: {', '.join(SHAPES)}")

    @property
    def name(self) -> str:
        """The shape's name or the folder."""
        return self.shape or self.folder or ""

    @property
    def is_dummy(self) -> bool:
        """True if SGLang fills the weights with random numbers."""
        return self.shape is not None

    @property
    def load_options(self) -> dict[str, Any]:
        """Options of `model_runner.load_runner`."""
        quantization = None if self.quantization == "none" else self.quantization
        formats = {"kv_cache_dtype": self.kv_cache_dtype, "quantization": quantization}
        return {"dummy": self.is_dummy, **formats}

    @contextmanager
    def as_folder(self, longest: int) -> Iterator[str]:
        """Provide a folder that SGLang can load, for contexts of up to `longest` tokens."""
        if self.shape is None:
            from lim_sglang.models import check_model

            yield check_model(self.name)
        else:
            with tempfile.TemporaryDirectory(prefix="lim-bench-") as folder:
                write_shape(self.shape, Path(folder), longest)
                yield folder


def write_shape(shape: str, folder: Path, longest: int) -> None:
    """Write a model folder with configurations and a tokenizer with one word per token, no weights.

    A shape's context is stretched to `longest` tokens: with dummy weights, positions beyond the
    training change no timing.
    """
    config = dict(SHAPES[shape])
    config["max_position_embeddings"] = max(config["max_position_embeddings"], longest)
    words = {str(token): token for token in range(config["vocab_size"])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "0"}
    files = {
        "config.json": config,
        "generation_config.json": {name: config[name] for name in ("bos_token_id", "eos_token_id")},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "tokenizer.json": {"version": "1.0", "added_tokens": [], "model": model},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content) + "\n")


def read_backends(
    text: str, model: ModelChoice | None = None, *, by_step: bool = False
) -> tuple[str, ...]:
    """Read a comma-separated list of attention backends, each once; ours comes first if named. For
    a model, refuse a list without ours, and a backend that cannot read the model's KV cache.

    Args:
        by_step: steps are timed, so that a backend may have our kernels of layers.
    """
    names = dict.fromkeys(name.strip() for name in text.split(","))
    known = (BACKEND, *(DENSE_BACKENDS if by_step else SGLANG_BACKENDS))
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"unknown backend {', '.join(unknown)}; known: {', '.join(known)}")
    if model and BACKEND not in names:
        raise ConfigError(f"--backends must name {BACKEND}: the others are compared with it")
    # SGLang would replace FlashAttention 3 by Triton, and the table would not say so.
    if model and model.kv_cache_dtype == "fp8_e5m2" and "fa3" in names:
        raise ConfigError("--backends fa3 reads no KV cache of fp8_e5m2: use fp8_e4m3 or no fa3")
    return tuple(sorted(names, key=lambda name: name != BACKEND))


@dataclass(frozen=True)
class Point:
    """One measured batch."""

    lengths: tuple[int, ...]
    """Tokens of each request, the newest included, in the order of the batch's rows."""

    def __str__(self) -> str:
        return "+".join(f"{batch}x{context}" for batch, context in self.groups)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `8x32768`, `8x32k` or a mixed batch such as `4x32k+4x1k`; k is 1,024 tokens."""
        lengths: list[int] = []
        for part in text.split("+"):
            found = re.fullmatch(r"(\d+)[xX](\d+)([kK]?)", part.strip())
            if not found or not int(found[1]) or not int(found[2]):
                raise ConfigError(f"a point is such as 8x32768, 8x32k or 4x32k+4x1k, not {text!r}")
            lengths += [int(found[2]) * (1024 if found[3] else 1)] * int(found[1])
        return cls(tuple(lengths))

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Neighbours of one length as (batch, context), in order; one group unless mixed."""
        return tuple((len(list(rows)), length) for length, rows in groupby(self.lengths))

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(self.lengths)

    @property
    def is_mixed(self) -> bool:
        """True if requests differ in length."""
        return min(self.lengths) < self.longest

    @property
    def num_tokens(self) -> int:
        """Slots of the KV cache that the point fills."""
        return sum(self.lengths)

    def rows_over(self, budget: int) -> tuple[int, ...]:
        """Return the rows with more tokens than the budget, which LessIsMore decodes sparsely."""
        return tuple(row for row, length in enumerate(self.lengths) if length > budget)


def choose_points(
    texts: Sequence[str], batch: int | None, context: int | None
) -> tuple[Point, ...]:
    """Return the points of the command line: those of --point, then --batch with --context."""
    if (batch is None) != (context is None):
        raise ConfigError("--batch and --context belong together: give both or neither")
    texts = [*texts, *([] if batch is None else [f"{batch}x{context}"])]
    if not texts:
        raise ConfigError("name at least one point: --point 8x32768, or --batch 8 --context 32768")
    return tuple(dict.fromkeys(map(Point.parse, texts)))


@dataclass(frozen=True)
class SparseReads:
    """Reads of the layers of a step that read less than everything."""

    num_layers: int
    tokens: float
    """Tokens of all rows in one layer that one KV head reads: where its query heads have lists of
    their own, the union of these."""
    summary_bytes: int = 0
    """Bytes of summaries of keys that all layers read."""

    @classmethod
    def shared(cls, point: Point, facts: Mapping[str, Any], budget: int) -> Self:
        """Return the reads of layers whose heads share the tokens of a budget."""
        layers = facts["roles"].count(Role.REUSE.value)
        return cls(layers, sum(min(length, budget) for length in point.lengths))


def step_bytes(point: Point, facts: Mapping[str, Any], reads: SparseReads | None) -> int:
    """Return the bytes that a decode step reads at least: all weights, and of the KV cache all
    tokens, or in sparse layers those of `reads`; None: the step is dense. Scores and lists of
    selection itself are left out. `facts` are `model_runner.model_facts`."""
    reads = reads or SparseReads(0, 0)
    dense_tokens = point.num_tokens * (len(facts["roles"]) - reads.num_layers)
    sparse_tokens = reads.tokens * reads.num_layers
    cache_bytes = facts["kv_bytes_per_token_and_layer"] * (dense_tokens + sparse_tokens)
    return int(facts["weight_bytes_read"] + cache_bytes + reads.summary_bytes)


def read_drafts(text: str) -> tuple[int, ...]:
    """Read numbers of drafts between commas.

    Raises:
        ConfigError: no number, or one that no cycle drafts.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) in AUTO_CHOICES for word in words):
        known = ", ".join(map(str, AUTO_CHOICES))
        raise ConfigError(f"--drafts are some of {known}, which have CUDA graphs, not {text!r}")
    return tuple(dict.fromkeys(map(int, words)))


def check_draft_budgets(budgets: Sequence[int], known: Collection[int]) -> None:
    """Refuse a budget at which no acceptance was recorded.

    Raises:
        ConfigError: names it.
    """
    if unknown := [f"{each:,}" for each in budgets if each not in known]:
        recorded = ", ".join(f"{each:,}" for each in sorted(known))
        raise ConfigError(
            f"--draft-budget {', '.join(unknown)}: how many drafts are accepted was recorded with "
            f"{recorded}; use some of these"
        )


def read_timed_policies(texts: Sequence[str], budget: int) -> dict[str, LimConfig]:
    """Read policies whose steps are to be timed; see `read_policies`.

    Raises:
        ConfigError: as there, or a policy whose steps are dense.
    """
    found = read_policies(texts, budget)
    if any(issubclass(POLICIES[config.policy], Lossless) for config in found.values()):
        raise ConfigError(
            "--policy lossless serves dense steps, and drafts between them: time it by lim bench "
            "drafts"
        )
    return found


def read_policies(texts: Sequence[str], budget: int) -> dict[str, LimConfig]:
    """Read policies to compare: names between commas, or the JSON of settings.

    Args:
        texts: such as `quest,streaming` or `{"policy": "quest", "shared_by": "all"}`.
        budget: tokens that a sparse layer reads, for all.

    Returns:
        Settings by the names that results bear: `quest`, `quest shared_by=all`,
        `seer gate=own@0123456789ab`.

    Raises:
        ConfigError: settings that are wrong, a dense policy, a policy that is named twice, or a
            folder without a gate.
    """
    found: dict[str, LimConfig] = {}
    for text in texts:
        for settings in _settings_of(text):
            if settings.get("policy") == "seer" and not settings.get("gate"):
                raise ConfigError(
                    "--policy seer needs a gate that was trained for the model: write "
                    '--policy \'{"policy": "seer", "gate": "FOLDER"}\' (lim train-gate makes one)'
                )
            if "budget" in settings:
                raise ConfigError("--policy: the budget is that of --budget, the same for all")
            given = resolve_settings(json.dumps(settings), None, {})
            if not issubclass(POLICIES[given.policy], SparsePolicy):
                raise ConfigError(
                    f"--policy {given.policy} reads everything, as what policies are compared with"
                )
            config = resolve_settings(given.to_json(), None, {"budget": budget})
            shown = named_settings(settings).items()
            others = (f"{key}={value}" for key, value in shown if key != "policy")
            name = " ".join([config.policy, *others])
            if name in found or config in found.values():
                raise ConfigError(f"--policy names {name} twice: name each policy once")
            found[name] = config
    return found


def named_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy's settings as results bear them, a gate by its name.

    The name is the last part of the path, since paths of one machine say nothing on another, and
    the beginning of the digest, since a folder may be trained anew.
    """
    if not settings.get("gate"):
        return dict(settings)
    path = folder_of(settings["gate"])
    return {**settings, "gate": f"{path.name}@{weights_digest(path)[:12]}"}


def options_of_policies(policies: Mapping[str, LimConfig], max_rows: int) -> dict[str, Any]:
    """Return SGLang's options that all contenders have where policies are compared: the page size
    that any of them needs, and a limit of requests, since lists of single heads take memory."""
    if not policies:
        return {}
    page_sizes = [default_page_size(config) or 1 for config in policies.values()]
    return {"page_size": max(page_sizes), "max_running_requests": max_rows}


def _settings_of(text: str) -> list[dict[str, Any]]:
    if not text.lstrip().startswith("{"):
        return [{"policy": name.strip()} for name in text.split(",")]
    try:
        return [json.loads(text)]
    except ValueError as error:
        raise ConfigError(f"--policy {text} is not JSON ({error})") from None


@dataclass(frozen=True)
class Cell:
    """A policy at a budget."""

    policy: str
    """Name in results: `quest`, `quest shared_by=all`."""
    budget: int
    config: LimConfig | None
    """None if the policy's definition excludes the budget."""
    reason: str | None = None
    """Why the budget is excluded."""

    def __str__(self) -> str:
        return f"{self.policy} at {self.budget:,}"

    @property
    def key(self) -> tuple[str, int]:
        """Policy and budget."""
        return self.policy, self.budget


def read_cells(policies: Sequence[str], budgets: str) -> tuple[Cell, ...]:
    """Read the values of --policy and --budget: each policy at each budget.

    Args:
        policies: as for `read_policies`.
        budgets: numbers of tokens between commas.

    Raises:
        ConfigError: a setting that is wrong at any budget, or a budget that is no number.
    """
    try:
        numbers = [int(part) for part in budgets.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--budget takes numbers of tokens between commas, not {budgets!r}")
    if not policies:
        raise ConfigError("name at least one policy: --policy lessismore,quest")
    found = read_policies(policies, default_of("budget"))
    return tuple(
        _cell(name, config, budget)
        for name, config in found.items()
        for budget in dict.fromkeys(numbers)
    )


def _cell(name: str, config: LimConfig, budget: int) -> Cell:
    try:
        return Cell(name, budget, replace(config, budget=budget))
    except ConfigError as error:
        return Cell(name, budget, None, str(error))


TOKEN_LIMIT = 1 << 31
"""More token ids than any vocabulary has."""
Text = str | list[int]
"""A text, or its token ids."""


def read_texts(path: Path) -> list[Text]:
    """Read texts: a JSON line each, with `text` or with token ids as `tokens`; or the questions and
    answers of a run's folder.

    Raises:
        DataError: the file cannot be read, or a line holds no text.
    """
    if path.is_dir():
        questions = read_questions(path)
        asked = {name: question.text for name, question in questions.items()}
        pairs = [(asked.get(each.question_id), each.sample.text) for each in load_run(path).samples]
        texts = ["\n\n".join(filter(None, pair)) for pair in pairs]
        # Half of a surrogate pair, in which a model's text may end, becomes a question mark.
        return [text.encode(errors="replace").decode() for text in texts]
    return [_text_of(row, place) for place, row in read_json_lines(path)]


def _text_of(row: Any, place: str) -> Text:
    text = row.get("text", row.get("tokens")) if isinstance(row, dict) else None
    if isinstance(text, list) and all(
        type(token) is int and 0 <= token < TOKEN_LIMIT for token in text
    ):
        return text
    if not isinstance(text, str):
        raise DataError(f'{place} needs {{"text": "…"}}, or {{"tokens": [1, 2]}} with token ids')
    return check_text(text, place)


def make_sequences(
    texts: Sequence[Text],
    encode: Callable[[str], list[int]],
    end_token: int,
    *,
    count: int,
    length: int,
    seed: int,
) -> list[list[int]]:
    """Join texts, in an order that the seed decides, each followed by the end token.

    Returns:
        Token ids, `length` in each of `count` sequences, which begin with texts of their own.

    Raises:
        DataError: the texts are too short.
    """
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    sequences: list[list[int]] = []
    tokens: list[int] = []
    num_tokens = 0
    for text in map(texts.__getitem__, order):
        new = [*(encode(text) if isinstance(text, str) else text), end_token]
        tokens, num_tokens = tokens + new, num_tokens + len(new)
        if len(tokens) >= length:
            sequences.append(tokens[:length])
            tokens = []
        if len(sequences) == count:
            return sequences
    raise DataError(
        f"--texts has {counted(num_tokens, 'token')} in {counted(len(texts), 'text')}, which fill "
        f"{len(sequences)} of {counted(count, 'sequence')} of {length:,} tokens: give more texts, "
        "or lower --sequences or --length"
    )
