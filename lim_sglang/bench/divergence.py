"""`lim bench divergence`: the distance of sparse policies' next tokens from dense attention's.

Teacher-forced: real texts are prefilled densely but for their last tokens, which each policy then
decodes, whatever it would say itself. Each step's distribution of the next token is compared with
that of the dense policy, on the same weights, KV cache and kernels.
"""

import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import kl_div

from lim_sglang.bench import model_runner
from lim_sglang.bench.model_runner import Contender, FilledBatch, decode_batch, run_step
from lim_sglang.bench.results import DivergenceRow, Measured, same_divergence, surroundings
from lim_sglang.bench.verify import check_this_gpu
from lim_sglang.bench.workloads import (
    Cell,
    ModelChoice,
    Point,
    make_sequences,
    named_settings,
    read_texts,
)
from lim_sglang.config import BACKEND, CONFIG_VAR, LimConfig
from lim_sglang.errors import ConfigError, DataError, ServerError
from lim_sglang.models import model_digest
from lim_sglang.progress import duration, show_progress

DENSE = "full"
"""The policy that the others are compared with."""
DENSE_BYTES = 4 << 30
"""Most memory for the dense log-probabilities, in f32, of the sequences that are decoded at once;
the others follow in further groups. One sequence is decoded even if it takes more."""
MEM_FRACTION = 0.88
"""Share of the memory for weights and KV cache; the cache holds one group of sequences alone."""


@dataclass(frozen=True)
class DivergenceOptions:
    """The options of `lim bench divergence`."""

    model: ModelChoice
    texts: Path
    cells: tuple[Cell, ...]
    sequences: int = 6
    length: int = 4096  # tokens of a sequence
    steps: int = 512  # of these tokens, the last ones, are decoded
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps >= self.length:
            raise ConfigError(
                f"--steps {self.steps:,} leaves nothing to prefill of --length {self.length:,}: "
                "decode fewer tokens than a sequence has"
            )


def measure(
    options: DivergenceOptions, recorded: Sequence[Measured], console: Console
) -> Iterator[Measured]:
    """Yield the row of each cell with its conditions; a recorded row of the same conditions is
    yielded as it is. `console` shows policy, budget, step and time left.

    Raises:
        DataError: the texts are unusable.
        LimError: SGLang or the kernels do not serve what was asked for.
    """
    model, named = options.model, Path(options.model.name)
    with model.as_folder(options.length) as folder:
        encode, end_token, num_words = load_tokenizer(folder)
        tokens = torch.tensor(
            make_sequences(
                read_texts(options.texts),
                encode,
                end_token,
                count=options.sequences,
                length=options.length,
                seed=options.seed,
            )
        )
        conditions = surroundings() | {
            "model": named.resolve().name if named.is_dir() else model.name,
            "model_sha256": model_digest(folder),
            "texts_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            **{name: getattr(options, name) for name in ("sequences", "length", "steps", "seed")},
        }
        same = same_divergence(conditions)
        known = {each[0].key: each for each in recorded if same_divergence(each[1]) == same}
        left = []
        for cell in options.cells:
            if cell.key in known:
                yield known[cell.key]
            elif cell.reason:
                yield DivergenceRow(*cell.key, settings=None, reason=cell.reason), conditions
            else:
                left.append(cell)
        if left:
            size = max(1, DENSE_BYTES // (4 * options.steps * num_words))
            yield from measure_cells(options, folder, left, tokens.split(size), conditions, console)


def load_tokenizer(folder: str) -> tuple[Callable[[str], list[int]], int, int]:
    """Return a model's encoding of a text, its end token, and the number of its tokens.

    Raises:
        DataError: there is no end token to join texts with.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {folder} has no end token to join texts with")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # else it warns of long texts
        return ids

    return encode, tokenizer.eos_token_id, len(tokenizer)


def measure_cells(
    options: DivergenceOptions,
    folder: str,
    cells: Sequence[Cell],
    groups: Sequence[Tensor],
    conditions: Mapping[str, Any],
    console: Console,
) -> Iterator[Measured]:
    """Load the model and measure cells, whose rows come with the last group of sequences.

    Args:
        groups: [B, L] int64 each, the token ids of sequences that are decoded together.
    """
    policies = {cell.policy: cell.config for cell in cells if cell.config}
    model_runner.check_policies(folder, policies, options.model.kv_cache_dtype)
    check_this_gpu(console)
    console.print(f"Loading {options.model.name}")
    sizes = [len(group) for group in groups]
    runner = load_dense_runner(options.model, options.length, folder, cells, sizes)
    check_tokens(torch.cat([*groups]), runner, options.texts)
    facts = model_runner.model_facts(runner)
    shown = ("dtype", "kv_dtype", "quantization", "page_size")
    conditions = {**conditions, **{name: facts[name] for name in shown}}
    dense = model_runner.make_contender(runner, BACKEND)
    passes = len(groups) * (1 + len(cells))
    kl: dict[Cell, list[float]] = {cell: [] for cell in cells}
    agreement: dict[Cell, list[float]] = {cell: [] for cell in cells}
    with show_progress(console, passes * options.steps, "Prefilling") as update:
        clock = StepClock(passes * options.steps, update)
        for tokens in groups:
            for cell, found in measure_group(runner, dense, cells, tokens, options, clock):
                kl[cell] += found.kl
                agreement[cell] += found.agreement
                if len(kl[cell]) == options.sequences:
                    means = tuple(kl[cell]), tuple(agreement[cell])
                    yield DivergenceRow(*cell.key, found.settings, *means), conditions


def check_tokens(tokens: Tensor, runner: Any, texts: Path) -> None:
    """Refuse token ids of `--texts` that the model does not have."""
    if (largest := int(tokens.max())) >= runner.model_config.vocab_size:
        raise DataError(f"--texts {texts} has the token {largest}, which the model lacks")


def load_dense_runner(
    model: ModelChoice,
    length: int,
    folder: str,
    cells: Sequence[Cell],
    batch_sizes: Sequence[int],
) -> Any:
    """Load a model with the dense policy, for batches of these sizes and requests of `length`
    tokens: on the GPU, or in f32 on the CPU of a machine without one."""
    os.environ[CONFIG_VAR] = LimConfig(policy=DENSE).to_json()
    policies = {str(cell): cell.config for cell in cells if cell.config}
    chosen = model_runner.options_on_this_machine(policies, max(batch_sizes))
    page = chosen["page_size"]
    runner = model_runner.load_runner(
        folder,
        backend=BACKEND,
        mem_fraction_static=MEM_FRACTION,
        batch_sizes=sorted(set(batch_sizes)),
        max_total_tokens=max(batch_sizes) * -(-length // page) * page,
        **model.load_options,
        **chosen,
    )
    model_runner.check_room(runner, [Point((length,) * max(batch_sizes))])
    return runner


@dataclass(frozen=True)
class GroupDivergence:
    """Result of a policy for the B sequences of one group."""

    kl: list[float]
    """[B], nats, KL(dense || policy) of the next token, mean over the steps."""
    agreement: list[float]
    """[B], share of the steps whose likeliest token is the dense one."""
    settings: Mapping[str, Any]
    """The policy's settings, with the layers that the model's preset gave."""


@torch.no_grad()
def measure_group(
    runner: Any,
    dense: Contender,
    cells: Sequence[Cell],
    tokens: Tensor,
    options: DivergenceOptions,
    clock: "StepClock",
) -> Iterator[tuple[Cell, GroupDivergence]]:
    """Prefill sequences and decode their last tokens: densely, then by each policy.

    Args:
        dense: the backend of the dense policy.
        tokens: [B, L] int64.
    """
    tokens, steps = tokens.to(runner.device), options.steps
    num_rows, length = tokens.shape
    dense.take_over(runner)
    with model_runner.filled_batch(runner, Point((length,) * num_rows), options.seed) as batch:
        model_runner.prefill(runner, batch, tokens[:, :-steps])
        shape = (steps, num_rows, runner.model_config.vocab_size)
        expected = torch.empty(shape, dtype=torch.float32, device=runner.device)
        dense_pass = decode_forced(runner, batch, tokens, steps)
        for step, found in zip(expected, clock.follow(dense_pass, DENSE, steps), strict=True):
            step.copy_(found)
        for cell in cells:
            yield cell, measure_cell(runner, dense, cell, batch, tokens, expected, clock)


def measure_cell(
    runner: Any,
    dense: Contender,
    cell: Cell,
    batch: FilledBatch,
    tokens: Tensor,
    expected: Tensor,
    clock: "StepClock",
) -> GroupDivergence:
    """Decode the last tokens of texts by a policy, and compare each step with the dense one; the
    dense policy serves afterwards.

    Args:
        batch: requests of at least L tokens, of which all but the last T are in the KV cache.
        tokens: [B, L] int64 on the device.
        expected: [T, B, V], dense log-probabilities.
    """
    steps = len(expected)
    contender = model_runner.make_contender(runner, str(cell), cell.config)
    settings = named_settings(runner.lim_config.settings())
    # A pass reads K, V and summaries of the dense prefill and of itself, never what another pass
    # left there. Tokens: those of later steps lie beyond the request's length, and a step writes
    # its own token before a layer reads. Blocks: one that this pass has not completed yet is the
    # request's newest, which is read whatever its summary says; the step that completes a block
    # writes its summary again.
    prefilled = tokens.shape[1] - steps
    model_runner.summarize_rows(runner, contender, [own[:prefilled] for own in batch.slots])
    sparse_pass = clock.follow(decode_forced(runner, batch, tokens, steps), str(cell), steps)
    found = GroupDivergence(*compare_passes(expected, sparse_pass), settings)
    dense.take_over(runner)
    del contender, sparse_pass
    if torch.cuda.is_available():
        gc.collect()  # else lists, scores and graphs of the policy stay in the GPU's memory
        torch.cuda.empty_cache()
    return found


def decode_forced(runner: Any, batch: FilledBatch, tokens: Tensor, steps: int) -> Iterator[Tensor]:
    """Decode the last tokens of a text by the runner's live backend: each step's input is the
    text's own token, whose K and V are written.

    Args:
        batch: requests of L tokens, of which all but the last `steps` are in the KV cache.
        tokens: [B, L] int64 on the device.

    Yields:
        [B, V] f32, log-probabilities of the token that follows the step's.

    Raises:
        ServerError: a logit is not finite.
    """
    requests, slots = batch.forward_batch.req_pool_indices, torch.stack(batch.slots)
    for position in range(tokens.shape[1] - steps, tokens.shape[1]):
        forward_batch = decode_batch(
            runner,
            requests,
            lengths=[position + 1] * len(tokens),
            input_ids=tokens[:, position].contiguous(),
            new_slots=slots[:, position].contiguous(),
        )
        logits = run_step(runner, replace(batch, forward_batch=forward_batch))
        log_probabilities = logits.float().log_softmax(-1)
        # This waits for the step, as a scheduler does that reads the sampled tokens.
        if not log_probabilities.isfinite().all():
            raise ServerError(f"the logits at position {position:,} are not finite")
        yield log_probabilities


def compare_passes(expected: Tensor, found: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Compare a policy's steps with the dense ones at the same positions.

    Args:
        expected: [T, B, V], dense log-probabilities.
        found: T times [B, V], log-probabilities.

    Returns:
        KL(dense || policy) in nats and agreement of the likeliest token, [B] each, means over the
        steps.
    """
    kl, same = [], []
    for dense, sparse in zip(expected, found, strict=True):
        # torch names the second distribution first: this is the sum of exp(dense) (dense - sparse).
        kl.append(kl_div(sparse, dense, reduction="none", log_target=True).sum(-1))
        same.append((sparse.argmax(-1) == dense.argmax(-1)).double())
    return torch.stack(kl).double().mean(0).tolist(), torch.stack(same).mean(0).tolist()


class StepClock:
    """Progress over all passes: name, step, and time left at the mean speed so far."""

    def __init__(self, total: int, update: Callable[[float, str], None]) -> None:
        """Begin to count the time.

        Args:
            total: steps of all passes.
        """
        self._total, self._update = total, update
        self._done, self._start_s = 0, time.monotonic()

    def follow(self, steps: Iterator[Tensor], name: str, length: int) -> Iterator[Tensor]:
        """Yield the steps of the next pass, of this length, each shown when it has been made."""
        for step, found in enumerate(steps, start=1):
            self._done += 1
            step_s = (time.monotonic() - self._start_s) / self._done
            left_s = step_s * (self._total - self._done)
            self._update(
                self._done,
                f"{name}: step {step:,} of {length:,}, {100 * self._done // self._total} % of all; "
                f"about {duration(left_s)} left",
            )
            yield found
