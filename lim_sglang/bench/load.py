"""What `lim bench serve` asks of a server: so many long generations at once. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lim_sglang.bench.points import ModelChoice, read_backends
from lim_sglang.errors import ConfigError
from lim_sglang.refusals import BACKEND

POLICIES = f"{BACKEND},flashinfer"
"""What is compared where nothing else is asked for."""


@dataclass(frozen=True)
class Load:
    """Requests that are sent together, all of one size; none replaces one that has ended."""

    concurrency: int
    prompt_tokens: int = 200
    new_tokens: int = 8192
    limit_s: float | None = None
    """The longest stretch that is measured, from the first token on; None for all of it."""
    stream_interval: int = 1
    """New tokens of a request that the server sends together."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.prompt_tokens < 1 or self.stream_interval < 1:
            raise ConfigError(
                "--concurrency, --prompt-tokens and --stream-interval must be at least 1, "
                f"not {self.concurrency}, {self.prompt_tokens}, {self.stream_interval}"
            )
        if self.new_tokens < 2:
            raise ConfigError(
                f"--new-tokens must be at least 2, not {self.new_tokens}: prefill gives the first"
            )

    @property
    def context(self) -> int:
        """Tokens of each request when it ends."""
        return self.prompt_tokens + self.new_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests when they end: what the KV cache holds at most."""
        return self.concurrency * self.context

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids of each request's prompt, drawn; no two begin with the same token.

        Raises:
            ConfigError: the vocabulary has fewer tokens than there are requests.
        """
        if vocab_size < self.concurrency:
            raise ConfigError(
                f"--concurrency {self.concurrency} needs as many first tokens, so that no prompt "
                f"is shared; the model has {vocab_size:,} tokens"
            )
        drawn = random.Random(f"{self.seed} {self.concurrency}")
        firsts = drawn.sample(range(vocab_size), self.concurrency)
        rest = self.prompt_tokens - 1
        return [[first, *drawn.choices(range(vocab_size), k=rest)] for first in firsts]


def choose_loads(concurrencies: Sequence[int], **same: object) -> tuple[Load, ...]:
    """One load for each concurrency, in the order of the command line, each once."""
    return tuple(Load(concurrency, **same) for concurrency in dict.fromkeys(concurrencies))  # type: ignore[arg-type]


def choose_policies(text: str) -> tuple[str, ...]:
    """Read a comma-separated list of attention backends; ours comes last, to be compared."""
    names = read_backends(text)
    if not names:
        raise ConfigError(f"--policies names nothing: name some of {POLICIES}")
    return (*(name for name in names if name != BACKEND), *({BACKEND} & set(names)))


@dataclass(frozen=True)
class ServeOptions:
    """Everything that `lim bench serve` was asked for, where it starts the servers itself."""

    model: ModelChoice
    loads: tuple[Load, ...]
    policies: tuple[str, ...]
    budget: int
    mem_fraction_static: float
    verbose: bool = False
    """Whether SGLang's log is shown as it comes."""
    sglang_options: tuple[str, ...] = ()
    """Passed on to every server."""

    @property
    def context(self) -> int:
        """Tokens of the longest request."""
        return max(load.context for load in self.loads)

    @property
    def most_requests(self) -> int:
        """Requests of the largest load."""
        return max(load.concurrency for load in self.loads)

    @property
    def server_options(self) -> tuple[str, ...]:
        """SGLang's options, the same for every policy's server."""
        most = str(self.most_requests)
        ours = [
            *(("--load-format", "dummy") if self.model.shape else ()),
            *("--skip-tokenizer-init", "--incremental-streaming-output"),
            *("--mem-fraction-static", str(self.mem_fraction_static)),
            *("--max-running-requests", most, "--cuda-graph-max-bs-decode", most),
            # As in the other benchmarks: prefill is not what is measured.
            *("--disable-prefill-cuda-graph", "--disable-flashinfer-autotune"),
            *("--random-seed", "0"),
            *(() if self.verbose else ("--log-level", "warning")),
        ]
        return (*ours, *self.sglang_options)

    def lim_flags(self, policy: str) -> tuple[str, ...]:
        """LessIsMore's flags, which a dense server refuses."""
        return (f"--lim-budget={self.budget}",) if policy == BACKEND else ()
