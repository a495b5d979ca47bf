"""`lim calibrate`: the SELECT layers and pick layers of a model, by the distance of its next tokens
from dense attention's.

Greedy forward selection: the first SELECT layer stands above the dense layers, since layers below
it read everything; each further one is the layer that lowers KL(dense || LessIsMore) most. Pick
layers follow in the same way. The decode steps are those of `lim bench divergence`, teacher-forced
on texts that the model wrote itself.
"""

import hashlib
import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lim_sglang.bench import model_runner
from lim_sglang.bench.divergence import (
    DENSE,
    StepClock,
    check_tokens,
    decode_forced,
    load_dense_runner,
    load_tokenizer,
    measure_cell,
)
from lim_sglang.bench.model_runner import FilledBatch
from lim_sglang.bench.results import mean_in_words, surroundings
from lim_sglang.bench.verify import check_this_gpu
from lim_sglang.bench.workloads import Cell, ModelChoice, Point, make_sequences, read_texts
from lim_sglang.config import BACKEND, LimConfig, ModelShape, Preset
from lim_sglang.errors import ConfigError
from lim_sglang.gates.files import replace_file
from lim_sglang.gates.training import disk_errors
from lim_sglang.markdown_section import counted, markdown_table
from lim_sglang.models import model_digest, weights_fingerprint
from lim_sglang.progress import show_progress
from lim_sglang.validation import model_shape, model_traits

FINALISTS = 4
"""Candidates of a round that are measured on all steps."""
ROUGH_SHARE = 4
"""All candidates of a round are measured on the first quarter of the steps."""
TEMPERATURE = 0.6
"""Temperature of the texts that the model writes: a greedy small model repeats itself."""
PROMPTS = (
    "A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Show each step.",
    "Prove that the sum of two odd numbers is even, then that their product is odd.",
    "Write a Python function that merges two sorted lists, and explain its running time.",
    "Find all real x with x^2 - 7x + 10 = 0 by two different methods, and check the results.",
    "Explain how a bicycle stays upright, step by step, to somebody who never rode one.",
    "A shop sells pens at 3 for 2 euros and books at 7 euros. What can one buy for exactly 25?",
    "Compare bubble sort, insertion sort and merge sort: idea, code and number of comparisons.",
    "How many ways are there to put 5 different letters into 3 boxes? Reason carefully.",
    "Tell the story of a lighthouse keeper who finds a letter, with a beginning, middle and end.",
    "Three friends share 84 coins; one has twice as many as each other. How many has each?",
    "Write a class in Python for a queue with a maximum size, with tests for its edge cases.",
    "What happens between typing an address into a browser and seeing the page? Be detailed.",
    "A rectangle has a perimeter of 46 cm and an area of 120 cm^2. Find its sides and diagonal.",
    "List the steps of planning a week of meals for four people, with amounts and a budget.",
    "Explain the difference between correlation and causation with three worked examples.",
    "Find the greatest common divisor of 1071 and 462 by Euclid's algorithm, line by line.",
)
"""Questions of our own, from no benchmark."""


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of `lim calibrate`."""

    model: ModelChoice
    texts: Path | None  # None: the model writes them
    num_layers: int = 2
    budget: int = 128
    sequences: int = 8
    length: int = 1024  # tokens of a sequence
    steps: int = 64  # of these tokens, the last ones, are measured
    seed: int = 0
    num_pick_layers: int = 0

    def __post_init__(self) -> None:
        if self.budget > self.length - self.steps:
            raise ConfigError(
                f"--budget {self.budget:,} covers the first steps, which begin at token "
                f"{self.length - self.steps:,} (--length {self.length:,} less --steps "
                f"{self.steps:,}): lower the budget, or give a larger length"
            )

    @property
    def rough_steps(self) -> int:
        """Steps on which all candidates are measured."""
        return max(1, self.steps // ROUGH_SHARE)

    def describe_texts(self) -> str:
        """Say which texts are measured."""
        if self.texts:
            return f"texts of {self.texts.name}"
        return f"answers of the model itself to built-in prompts, temperature {TEMPERATURE}"


@dataclass(frozen=True)
class LayersKl:
    """Distance from dense attention with some SELECT layers and pick layers."""

    layers: tuple[int, ...]
    steps: int
    kl: tuple[float, ...]
    """[B], nats, KL(dense || LessIsMore) of the next token, mean over the steps of a sequence."""
    pick_layers: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over the sequences."""
        return fmean(self.kl)


@dataclass(frozen=True)
class Calibration:
    """Layers that were found, with the evidence."""

    shape: ModelShape
    preset: Preset
    measured: Sequence[LayersKl]
    """All sets that were measured, in order."""
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> str:
        """The chosen layers in words."""
        return name_layers(self.preset.layers, self.preset.pick_layers)

    def to_json(self) -> str:
        """Return the preset as `config.read_preset` takes it, with the evidence."""
        evidence = {**self.conditions, "measured": [asdict(each) for each in self.measured]}
        content = {"shape": asdict(self.shape), **asdict(self.preset), "evidence": evidence}
        return json.dumps(content, indent=1) + "\n"

    def table(self) -> str:
        """Return the sets that were measured on all steps, in Markdown, and the conditions."""
        found = self.conditions
        rows = [
            [name_layers(each.layers, each.pick_layers), mean_in_words(each.kl, 1000)]
            for each in self.measured
            if each.steps == found["steps"]
        ]
        table = markdown_table(["SELECT layers", "KL \N{MULTIPLICATION SIGN} 1,000"], rows)
        return (
            f"{table}\n\nKL(dense || LessIsMore) of the next token in nats at a budget of "
            f"{found['budget']:,}, mean \N{PLUS-MINUS SIGN} standard error over "
            f"{counted(found['sequences'], 'sequence')} of {found['length']:,} tokens, the last "
            f"{found['steps']:,} teacher-forced; {found['texts']}, seed {found['seed']}."
        )


def name_layers(select: Sequence[int], pick: Sequence[int] = ()) -> str:
    """Return SELECT layers in words, and pick layers behind them, if there are any."""
    named = ", ".join(map(str, select))
    return f"{named}, pick {', '.join(map(str, pick))}" if pick else named


Measure = Callable[[tuple[int, ...], tuple[int, ...], int], tuple[float, ...]]
"""Returns the KL of each sequence, given SELECT layers, pick layers and a number of steps."""


def search(
    measure: Measure,
    layers: range,
    num_layers: int,
    num_pick_layers: int,
    steps: int,
    rough_steps: int,
) -> tuple[LayersKl, list[LayersKl]]:
    """Choose SELECT layers, one after the other, then pick layers beside them.

    Args:
        layers: those that may select; the first one does. The layer above them, the model's last,
            may pick, since a pick layer reads its own set.
        rough_steps: all candidates are measured on these, the best ones again on `steps`.

    Returns:
        The chosen layers, ascending, and all that was measured.
    """

    def measured(select: Sequence[int], pick: Sequence[int], steps: int) -> LayersKl:
        select, pick = tuple(sorted(select)), tuple(sorted(pick))
        return LayersKl(select, steps, measure(select, pick, steps), pick)

    best = measured(layers[:1], (), steps)
    found = [best]

    def nearest(candidates: Iterable[tuple[Sequence[int], Sequence[int]]]) -> LayersKl:
        rough = [measured(*each, rough_steps) for each in candidates]
        first = sorted(rough, key=lambda each: each.mean)[:FINALISTS]
        final = [measured(each.layers, each.pick_layers, steps) for each in first]
        found.extend(rough + final)
        return min(final, key=lambda each: each.mean)

    while len(best.layers) < num_layers:
        left = [layer for layer in layers if layer not in best.layers]
        best = nearest(((*best.layers, layer), ()) for layer in left)
    while len(best.pick_layers) < num_pick_layers:
        taken = best.layers + best.pick_layers
        left = [layer for layer in range(layers.start, layers.stop + 1) if layer not in taken]
        best = nearest((best.layers, (*best.pick_layers, layer)) for layer in left)
    return best, found


def num_search_steps(
    num_candidates: int, num_layers: int, num_pick_layers: int, steps: int, rough_steps: int
) -> int:
    """Return the decode steps that `search` takes among layers, the first one included."""
    left = [num_candidates - chosen for chosen in range(1, num_layers)]
    left += [num_candidates + 1 - num_layers - chosen for chosen in range(num_pick_layers)]
    return steps + sum(n * rough_steps + min(n, FINALISTS) * steps for n in left)


def selectable_layers(shape: ModelShape, num_layers: int, num_pick_layers: int) -> range:
    """Return the layers that may select: above the dense ones, and below the last one, whose set no
    layer would read.

    Raises:
        ConfigError: they are too few, or leave too few that may pick.
    """
    dense = LimConfig().dense_layers or ()
    layers = range(next(n for n in range(len(dense) + 1) if n not in dense), shape.num_layers - 1)
    if len(layers) < num_layers:
        raise ConfigError(
            f"--layers {num_layers}: of {shape.num_layers} layers {len(layers)} can select, since "
            f"layers {name_layers(dense)} are dense and no layer reads the set of the last"
        )
    if (left := len(layers) + 1 - num_layers) < num_pick_layers:
        raise ConfigError(
            f"--pick-layers {num_pick_layers}: of {shape.num_layers} layers {left} can pick, since "
            f"layers {name_layers(dense)} are dense and {num_layers} select"
        )
    return layers


def calibrate(options: CalibrationOptions, console: Console) -> Calibration:
    """Find the SELECT layers and pick layers of a model; `console` shows what is measured, and the
    time left.

    Raises:
        DataError: the texts are unusable.
        LimError: the options, the model or the GPU do not allow it.
    """
    named, start_s = Path(options.model.name), time.monotonic()
    with options.model.as_folder(options.length) as folder:
        given = None
        if options.texts:
            encode, end_token, _ = load_tokenizer(folder)
            sized = {"count": options.sequences, "length": options.length, "seed": options.seed}
            texts = read_texts(options.texts)
            given = torch.tensor(make_sequences(texts, encode, end_token, **sized))
        config = LimConfig(budget=options.budget)
        model_runner.check_policies(folder, {config.policy: config}, "auto")
        check_this_gpu(console)
        console.print(f"Loading {options.model.name}")
        cell = Cell(config.policy, options.budget, config)
        batch_sizes = [options.sequences]
        runner = load_dense_runner(options.model, options.length, folder, [cell], batch_sizes)
        text_config = runner.model_config.hf_text_config
        shape = model_shape(text_config)
        numbers = (options.num_layers, options.num_pick_layers)
        layers = selectable_layers(shape, *numbers)
        if given is not None and options.texts:
            check_tokens(given, runner, options.texts)
        sizes = (*numbers, options.steps, options.rough_steps)
        dense_steps = options.steps if options.texts else options.length
        total = dense_steps + num_search_steps(len(layers), *sizes)
        with show_progress(console, total, "Dense steps") as update, torch.no_grad():
            clock = StepClock(total, update)
            with prepared(options, folder, runner, given, clock) as (tokens, measure):
                best, measured = search(measure, layers, *sizes)
        seconds = round(time.monotonic() - start_s, 1)
        conditions = describe(options, folder, runner, tokens) | {"seconds": seconds}
        name = named.resolve().name if named.is_dir() else options.model.name
        traits = model_traits(text_config) | {"fingerprint": weights_fingerprint(folder)}
        preset = Preset(best.layers, name, **traits, pick_layers=best.pick_layers)
        return Calibration(shape, preset, measured, conditions)


def describe(
    options: CalibrationOptions, folder: str, runner: Any, tokens: Tensor
) -> dict[str, Any]:
    """Return the conditions of a calibration on texts [B, L] int64."""
    facts = model_runner.model_facts(runner)
    return {
        **surroundings(),
        **{name: facts[name] for name in ("dtype", "kv_dtype", "page_size")},
        "model_sha256": model_digest(folder),
        "policy": LimConfig().policy,
        "texts": options.describe_texts(),
        "texts_sha256": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        **{n: getattr(options, n) for n in ["budget", "sequences", "length", "steps", "seed"]},
    }


@contextmanager
def prepared(
    options: CalibrationOptions, folder: str, runner: Any, given: Tensor | None, clock: StepClock
) -> Iterator[tuple[Tensor, Measure]]:
    """Fill the KV cache with texts, densely; yield the texts and the function that measures layers
    on their last tokens, until the block ends.

    Args:
        given: [B, L] int64, the texts; None: the model writes them.
    """
    steps, shape = options.steps, (options.sequences, options.length)
    dense = model_runner.make_contender(runner, BACKEND)
    point = Point((options.length,) * options.sequences)
    with model_runner.filled_batch(runner, point, options.seed) as batch:
        if given is None:
            tokens = torch.zeros(shape, dtype=torch.int64, device=runner.device)
            writing = write_texts(runner, batch, tokens, chats(options, folder), options.seed)
            dense_pass = clock.follow(writing, "writing texts", options.length)
        else:
            tokens = given.to(runner.device)
            model_runner.prefill(runner, batch, tokens[:, :-steps])
            forced = decode_forced(runner, batch, tokens, steps)
            dense_pass = clock.follow(forced, DENSE, steps)
        newest = torch.stack([*deque(dense_pass, maxlen=steps)])  # [T, B, V]

        def measure(
            select: tuple[int, ...], pick: tuple[int, ...], steps: int
        ) -> tuple[float, ...]:
            config = LimConfig(budget=options.budget, select_layers=select, pick_layers=pick)
            cell = Cell(f"SELECT {name_layers(select, pick)}", options.budget, config)
            part = tokens[:, : options.length - options.steps + steps]
            found = measure_cell(runner, dense, cell, batch, part, newest[:steps], clock)
            return tuple(found.kl)

        yield tokens, measure


def chats(options: CalibrationOptions, folder: str) -> list[Iterator[list[int]]]:
    """Return for each sequence the token ids of endless prompts, in an order of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(prompt: str) -> list[int]:
        if not tokenizer.chat_template:
            plain: list[int] = tokenizer(prompt)["input_ids"]
            return plain
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    encoded = [*map(encode, PROMPTS)]
    orders = (random.Random(f"{options.seed} {row}") for row in range(options.sequences))
    return [cycle(order.sample(encoded, len(encoded))) for order in orders]


def write_texts(
    runner: Any,
    batch: FilledBatch,
    tokens: Tensor,
    prompts: Sequence[Iterator[list[int]]],
    seed: int,
) -> Iterator[Tensor]:
    """Let the runner's live backend answer prompts, sequence by sequence; the next prompt follows
    the end of an answer.

    Args:
        batch: requests of L tokens, of which none is in the KV cache.
        tokens: [B, L] int64 on the device, which are written.
        prompts: token ids of each sequence's prompts.

    Yields:
        [B, V] f32, log-probabilities of the token that follows the step's.
    """
    ends = set(runner.model_config.hf_eos_token_id or ())
    generator = torch.Generator(tokens.device).manual_seed(seed)
    waiting = [deque(next(own)) for own in prompts]
    tokens[:, 0] = torch.tensor([own.popleft() for own in waiting])
    length = tokens.shape[1]
    for position, found in enumerate(decode_forced(runner, batch, tokens, length), start=1):
        yield found
        if position == length:
            return
        weights = (found / TEMPERATURE).softmax(-1)
        drawn = torch.multinomial(weights, 1, generator=generator)[:, 0].tolist()
        for row, own in enumerate(waiting):
            token = own.popleft() if own else drawn[row]
            tokens[row, position] = token
            if not own and token in ends:
                own.extend(next(prompts[row]))


def write_preset(found: Calibration, out: Path) -> None:
    """Write a preset whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, found.to_json().encode())
