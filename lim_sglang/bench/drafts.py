"""`lim bench drafts`: cycles of lossless drafting beside dense and LessIsMore steps, in tokens a
second.

A cycle is timed as the server runs it, by `LosslessWorker`, with sampling, while the host prepares
the next one. How many drafts are accepted depends on the text, and random weights accept none:
tokens are counted by acceptance that was recorded on texts, of a real model.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat
from lim_sglang.bench import model_runner
from lim_sglang.bench.decode import (
    DecodeOptions,
    make_contenders,
    prepare,
    time_window,
    time_windows,
)
from lim_sglang.bench.model_runner import FilledBatch
from lim_sglang.bench.results import NAMES, surroundings
from lim_sglang.bench.verify import require_exact_steps
from lim_sglang.bench.workloads import DENSE_BACKENDS, Point
from lim_sglang.config import BACKEND, LimConfig, with_preset
from lim_sglang.counters import DraftStats
from lim_sglang.kernels.bench import Spread
from lim_sglang.lossless.gpu_backends import LosslessGpuBackend
from lim_sglang.lossless.widths import draft_choices
from lim_sglang.lossless.worker import LosslessWorker
from lim_sglang.markdown_section import markdown_table
from lim_sglang.policies.lossless import MAX_DRAFT_TOKENS, Lossless
from lim_sglang.validation import model_shape

LOSSLESS = "lossless"
WARM_UP_CYCLES = 3
NOTES = (
    "no prefill: K and V are random, in slots of random order; the length stays",
    "with sampling, of dense and LessIsMore steps by SGLang; a cycle or step is launched while the "
    "one before runs",
    "no scheduler",
)
"""Limits of the method, recorded with each row."""
ACCEPTANCE: Mapping[int, Mapping[str, Sequence[float]]] = {
    256: {
        "easy": (
            *(0.987, 0.965, 0.940, 0.914, 0.891, 0.875, 0.858, 0.827),
            *(0.803, 0.780, 0.757, 0.732, 0.712, 0.688, 0.663),
        ),
        "hard": (
            *(0.905, 0.817, 0.740, 0.668, 0.606, 0.545, 0.495, 0.453),
            *(0.413, 0.380, 0.340, 0.317, 0.289, 0.270, 0.236),
        ),
    },
    512: {
        "easy": (
            *(0.991, 0.979, 0.964, 0.945, 0.930, 0.918, 0.902, 0.885),
            *(0.873, 0.856, 0.841, 0.827, 0.815, 0.801, 0.786),
        ),
        "hard": (
            *(0.940, 0.876, 0.804, 0.742, 0.693, 0.635, 0.599, 0.559),
            *(0.521, 0.489, 0.454, 0.428, 0.392, 0.362, 0.326),
        ),
    },
    2048: {
        "easy": (
            *(0.993, 0.986, 0.979, 0.969, 0.959, 0.956, 0.946, 0.934),
            *(0.926, 0.916, 0.905, 0.896, 0.890, 0.883, 0.876),
        ),
        "hard": (
            *(0.976, 0.939, 0.902, 0.860, 0.823, 0.771, 0.742, 0.717),
            *(0.685, 0.663, 0.628, 0.604, 0.579, 0.557, 0.530),
        ),
    },
    1024: {
        "easy": tuple(exp(-0.01739 * draft**0.8865) for draft in range(1, 1 + MAX_DRAFT_TOKENS)),
        "hard": tuple(exp(-0.06323 * draft**0.9526) for draft in range(1, 1 + MAX_DRAFT_TOKENS)),
    },
}
"""By budget and kind of text, the share of cycles in which the first 1, 2, … drafts are accepted:
Qwen2.5-Coder-1.5B at 16K tokens, on its own solutions of MATH and on source code. At 1,024 an
exponential of a power, fitted to 7.5 of 8 and 14.3 of 16, and 6.2 and 10.2; else as measured in
`docs/log/2026-12-01-lossless-budgets.md`."""
TEXTS = tuple(ACCEPTANCE[1024])
"""Kinds of text."""


@dataclass(frozen=True)
class Draw:
    """Parameters by which all requests of a batch are sampled."""

    temperature: float = 0.6
    top_p: float = 1.0

    def __str__(self) -> str:
        """Return the parameters as a column names them."""
        if not self.temperature:
            return "greedy"
        return f"T {self.temperature:g}" + (f", top_p {self.top_p:g}" if self.top_p < 1 else "")


@dataclass(frozen=True)
class DraftRow:
    """Result of one way to decode at one point."""

    point: str
    name: str
    """A dense backend, `lim`, or `lossless`."""
    budget: int | None
    """Tokens that a draft keeps; None for steps."""
    drafts: int
    """Drafts of a cycle; 0 for steps."""
    draw: Draw
    ms: Spread
    """Time of a cycle or step, sampling included."""
    tokens: Mapping[str, float]
    """Expected tokens of a request in a cycle, by the kind of text."""

    def ms_per_token(self, text: str) -> float:
        """Return the milliseconds of one token of each request."""
        return self.ms.median / self.tokens[text]

    def describe(self) -> str:
        """Return the row in one line."""
        parts = [f"{text} {self.ms_per_token(text):.3f}" for text in self.tokens]
        return f"{self.label()}: {self.ms.median:.3f} ms, a token {', '.join(parts)}"

    def label(self) -> str:
        """Return what was timed."""
        label = f"{self.point} {NAMES.get(self.name, self.name)}"
        if self.budget:
            label += f" {self.budget:,}, {self.drafts} drafts"
        return f"{label} ({self.draw})"


def expected_tokens(drafts: int, budget: int) -> dict[str, float]:
    """Return the tokens that a cycle gives, by the kind of text."""
    return {text: 1 + sum(shares[:drafts]) for text, shares in ACCEPTANCE[budget].items()}


class TimedWorker(LosslessWorker):
    """The server's worker, which drafts as many tokens as it is told."""

    num_drafts = 0

    def _choose_drafts(self, lengths: Sequence[int], sampling: Any) -> int:
        return self.num_drafts


def build_worker(runner: Any, config: LimConfig) -> TimedWorker:
    """Let a runner draft: its memory, its backend and its graphs are made beside the others'."""
    config = with_preset(config, model_shape(runner.model_config.hf_text_config))
    policy = config.make_policy()
    assert isinstance(policy, Lossless)
    runner.lim_config, runner.lim_policy, runner.lim_audit = config, None, None
    runner.lim_roles = policy.roles(len(runner.lim_roles))
    runner.lim_drafting, runner.lim_stats.drafting = policy, DraftStats()
    model_config = runner.model_config.hf_text_config
    runner.lim_draft_choices = draft_choices(policy, model_config, on_cpu=False)
    runner.lim_cos_sin = None
    runner.allocate_drafts(policy, runner.max_total_num_tokens)
    runner.attn_backend = LosslessGpuBackend(runner)
    worker = TimedWorker(runner.server_args, 0, None, 0, SimpleNamespace(model_runner=runner))
    worker.alloc_memory_pool(None, runner.req_to_token_pool, runner.token_to_kv_pool_allocator)
    worker.init_attention_backends()
    worker.init_cuda_graphs()
    return worker


def sampling_of(rows: int, draw: Draw, vocab: int, device: Any) -> Any:
    """Return SGLang's sampling parameters of a batch whose requests are all drawn alike."""
    ones, is_greedy = torch.ones(rows, device=device), not draw.temperature
    return compat.SamplingBatchInfo(
        temperatures=(draw.temperature or 1.0) * ones[:, None],
        top_ps=(1.0 if is_greedy else draw.top_p) * ones,
        top_ks=torch.full((rows,), 1 if is_greedy else 1 << 30, dtype=torch.int32, device=device),
        min_ps=0 * ones,
        is_all_greedy=is_greedy,
        is_any_greedy=is_greedy,
        need_top_p_sampling=not is_greedy and draw.top_p < 1,
        need_top_k_sampling=is_greedy,
        need_min_p_sampling=False,
        vocab_size=vocab,
        sampling_seed=torch.arange(rows, device=device),
    )


def batch_of(runner: Any, filled: FilledBatch, draw: Draw) -> Any:
    """Return a scheduler's batch of the requests, each short of the tokens that a cycle adds."""
    rows = filled.point.batch
    parameters = SimpleNamespace(
        frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_new_tokens=0
    )
    request = SimpleNamespace(
        grammar=None,
        custom_logit_processor=None,
        return_hidden_states=False,
        sampling_params=parameters,
        origin_input_ids=[],
        kv_committed_len=0,
    )
    step = filled.forward_batch
    return SimpleNamespace(
        reqs=[request] * rows,
        req_pool_indices=step.req_pool_indices,
        seq_lens=step.seq_lens - MAX_DRAFT_TOKENS - 1,
        seq_lens_cpu=step.seq_lens_cpu - MAX_DRAFT_TOKENS - 1,
        sampling_info=sampling_of(rows, draw, runner.model_config.vocab_size, runner.device),
        return_logprob=False,
        return_hidden_states=False,
    )


def time_cycles(worker: TimedWorker, batch: Any, drafts: int, options: DecodeOptions) -> Spread:
    """Return the milliseconds of a cycle, mean of each window.

    Cycles overlap as SGLang's scheduler has it: one is launched while the one before runs.
    """
    worker.num_drafts = drafts
    launched: deque[Tensor] = deque()

    def launch() -> None:
        if len(launched) == 2:  # the older one has ended
            accepted = launched.popleft().tolist()
            worker.on_verify_complete_cpu([length - 1 for length in accepted])
        result = worker._run_cycle(batch)
        launched.append(result.accept_lens.to("cpu", non_blocking=True))

    time_window(launch, WARM_UP_CYCLES)
    return Spread.of([time_window(launch, options.steps) for _ in range(options.windows)])


def sampler_of(runner: Any, rows: int, draw: Draw) -> Callable[[Tensor], None]:
    """Return SGLang's own sampler of as many rows, on a server of its default options."""
    sampler, arguments = compat.Sampler(), compat.server_arguments()
    info = sampling_of(rows, draw, runner.model_config.vocab_size, runner.device)
    info.sampling_seed = None
    positions = torch.zeros(rows, dtype=torch.int64, device=runner.device)

    def sample(logits: Tensor) -> None:
        output = compat.LogitsProcessorOutput(next_token_logits=logits)
        ours, arguments.sampling_backend = arguments.sampling_backend, "flashinfer"
        sampler(output, info, False, [], [], positions)
        arguments.sampling_backend = ours

    return sample


def measure(
    options: DecodeOptions,
    budgets: Sequence[LimConfig],
    drafts: Sequence[int],
    draws: Sequence[Draw],
    report: Callable[[str], None],
) -> Iterator[tuple[DraftRow, dict[str, Any]]]:
    """Load a model once; time steps and cycles at each point.

    Args:
        options: of `lim bench decode`, for dense and LessIsMore steps.
        budgets: settings of the drafts, each timed by a worker of its own.
        drafts: of a cycle, each timed; 0 is a dense step by the worker.
        draws: ways to sample, each timed.
    """
    config, batch_sizes = prepare(options, report)
    with options.model.as_folder(options.longest + 2 * MAX_DRAFT_TOKENS + 2) as folder:
        report(f"Loading {options.model.name}")
        runner = model_runner.load_runner(
            folder,
            backend=BACKEND,
            mem_fraction_static=options.mem_fraction_static,
            batch_sizes=batch_sizes,
            sampling_backend=BACKEND,
            **options.model.load_options,
        )
        model_runner.check_room(runner, options.points)
        contenders = make_contenders(runner, options, report)
        model_runner.fill_cache(runner.token_to_kv_pool, options.seed)
        ours = model_runner.policy_state(runner)
        conditions = surroundings() | model_runner.model_facts(runner)
        conditions |= {
            "model": options.model.name,
            "dummy_weights": options.model.is_dummy,
            "lim_config": config.settings(),
            "windows": options.windows,
            "steps": options.steps,
            "notes": list(NOTES),
        }
        for point in options.points:
            report(f"{point}: {options.windows} windows of each step")
            for row in _measure_steps(runner, contenders, point, draws, options):
                yield row, conditions
        for lossless in budgets:
            report(f"Capturing drafts of a budget of {lossless.budget:,}")
            worker = build_worker(runner, lossless)
            vars(runner).update(ours)
            fitting = [each for each in drafts if each in runner.lim_draft_choices]
            if left := [str(each) for each in drafts if each not in fitting]:
                report(f"Left out {', '.join(left)}: the model drafts {runner.lim_draft_choices}")
            passes = worker._passes.times
            conditions |= {
                "lossless_config": lossless.settings(),
                "acceptance": dict(ACCEPTANCE[runner.lim_drafting.budget]),
                "pass_times": asdict(passes) if passes else None,
            }
            for point in options.points:
                report(f"{point}: {options.windows} windows of each number of drafts")
                for row in _measure_cycles(runner, worker, point, fitting, draws, options):
                    yield row, conditions
            del worker


@torch.no_grad()
def _measure_steps(
    runner: Any,
    contenders: Sequence[model_runner.Contender],
    point: Point,
    draws: Sequence[Draw],
    options: DecodeOptions,
) -> list[DraftRow]:
    """Time dense and LessIsMore steps."""
    tokens, rows = dict.fromkeys(TEXTS, 1.0), []
    with model_runner.filled_batch(runner, point, options.seed) as filled:
        require_exact_steps(runner, filled, contenders, options.budget)
        for draw in draws:
            sample = sampler_of(runner, point.batch, draw)
            for name, spread in time_windows(runner, filled, contenders, options, sample).items():
                rows.append(DraftRow(str(point), name, None, 0, draw, spread, tokens))
    return rows


@torch.no_grad()
def _measure_cycles(
    runner: Any,
    worker: TimedWorker,
    point: Point,
    drafts: Sequence[int],
    draws: Sequence[Draw],
    options: DecodeOptions,
) -> list[DraftRow]:
    """Time cycles, of the numbers of drafts that the worker has graphs for."""
    budget, rows = runner.lim_drafting.budget, []
    fitting = [each for each in drafts if not each or point.batch <= worker._passes.max_drafted]
    with model_runner.filled_batch(runner, point, options.seed) as filled:
        for draw, number in itertools.product(draws, fitting):
            spread = time_cycles(worker, batch_of(runner, filled, draw), number, options)
            expected = expected_tokens(number, budget)
            rows.append(DraftRow(str(point), LOSSLESS, budget, number, draw, spread, expected))
    return rows


def draft_table(rows: Sequence[DraftRow]) -> str:
    """Return milliseconds of a token as a Markdown table, with how many times as fast as the faster
    dense backend each is."""
    head = ["", "cycle, ms", *(f"{text}, ms a token" for text in TEXTS)]
    return markdown_table(head, (_cells(row, rows) for row in rows))


def _cells(row: DraftRow, rows: Sequence[DraftRow]) -> list[str]:
    same = [each for each in rows if (each.point, each.draw) == (row.point, row.draw)]
    dense = [each for each in same if each.name in DENSE_BACKENDS]
    cells = [row.label(), f"{row.ms.median:.2f}"]
    for text in TEXTS:
        own = row.ms_per_token(text)
        ratio = min((each.ms_per_token(text) for each in dense), default=own) / own
        cells.append(f"{own:.2f} ({ratio:.2f})")
    return cells
