"""A trace from questions to records: the model in this process, greedy answers, steps observed."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lim_sglang.bench import model_runner
from lim_sglang.bench.divergence import DENSE, MEM_FRACTION
from lim_sglang.bench.results import surroundings
from lim_sglang.bench.verify import check_this_gpu
from lim_sglang.bench.workloads import Point, named_settings
from lim_sglang.config import BACKEND, CONFIG_VAR, LimConfig, with_preset
from lim_sglang.errors import ConfigError, DataError, ServerError
from lim_sglang.evals.tasks import OWN_FILE, find_task, load_questions, questions_digest
from lim_sglang.gates.training import alone_in, check_folder
from lim_sglang.models import check_model, known_shape, model_digest
from lim_sglang.policies.lessismore import LessIsMore
from lim_sglang.programs.schema import ask_messages
from lim_sglang.progress import show_progress
from lim_sglang.tracing.recorder import Chooser, Recorder, sampled_steps
from lim_sglang.tracing.records import QuestionTrace, Trace, add_question, begin_trace
from lim_sglang.validation import model_shape


@dataclass(frozen=True)
class TraceOptions:
    """The options of `lim trace`."""

    model: str
    questions: str
    """Path of the questions' file, with the kind of answer as `lim eval file:` takes it."""
    policies: Mapping[str, LimConfig]
    """Policies with one budget, by name. The first decodes, the others choose beside it."""
    is_dense: bool
    """True if full attention decodes, and all policies choose beside it."""
    budget: int
    max_tokens: int
    """Most new tokens of an answer."""
    every: int
    """One decode step in so many is measured."""
    layers: tuple[int, ...] | None
    """Layers that are measured; None for all."""
    limit: int | None
    """Number of questions, the first ones; None for all."""
    out: Path

    @property
    def served(self) -> str:
        """Name of the policy that decodes."""
        return DENSE if self.is_dense else next(iter(self.policies))

    @property
    def served_config(self) -> LimConfig:
        """Settings of the policy that decodes."""
        return LimConfig(policy=DENSE) if self.is_dense else self.policies[self.served]


def trace(options: TraceOptions, console: Console) -> Trace:
    """Trace all questions of a file into a folder, or those that an interrupted run has left.

    Args:
        console: shows question, step and time left.

    Raises:
        LimError: SGLang or the kernels do not serve the model or a policy.
        ConfigError: `--layers` names a layer that the model does not have.
        DataError: questions or folder are unusable, another command writes there, or no answer can
            be longer than the budget.
    """
    check_folder(options.out)
    task = find_task(f"{OWN_FILE}{options.questions}")
    questions = load_questions(task)[: options.limit]
    folder = check_model(options.model)
    model_runner.check_policies(folder, options.policies, "auto")
    tokenizer, shape = load_chat_tokenizer(folder), known_shape(folder)
    if shape:
        check_layers(options, shape.num_layers)
    prompts = [encode_question(tokenizer, each.text, task.prompt) for each in questions]
    longest = max(map(len, prompts)) + options.max_tokens
    if longest <= options.budget:
        raise DataError(
            f"the longest prompt and {options.max_tokens:,} new tokens are {longest:,} tokens, "
            f"within the budget of {options.budget:,}, so that every step reads everything: raise "
            "--max-tokens, lower --budget, or ask longer questions"
        )
    conditions = surroundings() | {
        "model": Path(options.model).resolve().name,
        "model_sha256": model_digest(folder),
        "questions_sha256": questions_digest(questions),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "num_questions": len(questions),
        "served": options.served,
        "policies": {
            # The layers of a preset, too, which another version or file may change.
            name: named_settings((with_preset(config, shape) if shape else config).settings())
            for name, config in options.policies.items()
        },
        **{name: getattr(options, name) for name in ("budget", "max_tokens", "every", "layers")},
    }
    with alone_in(options.out, "lim trace"):
        begun = begin_trace(options.out, conditions)
        known = {each.question for each in begun.questions}
        pairs = zip(questions, prompts, strict=True)
        left = {each.question_id: ids for each, ids in pairs if each.question_id not in known}
        found = list(begun.questions)
        if left:
            check_this_gpu(console)
            console.print(f"Loading {options.model}")
            runner = load_runner(options, folder, longest)
            for traced in trace_questions(runner, tokenizer, left, options, console):
                add_question(options.out, traced)
                found.append(traced)
    if not any(each.layers for each in found):
        raise DataError(
            f"no answer had a measured step over the budget of {options.budget:,} tokens: lower "
            "--budget or --every, or ask longer questions"
        )
    return replace(begun, questions=tuple(found))


def trace_questions(
    runner: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[int]],
    options: TraceOptions,
    console: Console,
) -> Iterator[QuestionTrace]:
    """Yield the trace of each question.

    Args:
        prompts: token ids by the question's id.
    """
    recorder, most = make_recorder(options, runner), options.max_tokens
    with show_progress(console, len(prompts) * most, "Tracing") as update:
        for number, (name, prompt) in enumerate(prompts.items()):
            answer: list[int] = []
            for token in decode_greedily(runner, recorder, prompt, options):
                answer.append(token)
                place = f"question {number + 1} of {len(prompts)}, token {len(answer):,}"
                update(number * most + len(answer), place)
            yield QuestionTrace(
                question=name,
                prompt_tokens=len(prompt),
                new_tokens=len(answer),
                cut_off=answer[-1] not in end_tokens(runner),
                text=tokenizer.decode(answer, skip_special_tokens=True),
                layers=tuple(recorder.take()),
            )


def load_chat_tokenizer(folder: str) -> Any:
    """Return a model's tokenizer.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise DataError(f"the tokenizer of {folder} has no chat template to ask questions by")
    return tokenizer


def encode_question(tokenizer: Any, question: str, prompt: str) -> list[int]:
    """Return the token ids of a conversation that asks a question, as `lim eval` does.

    Args:
        prompt: the task's template.
    """
    messages = list(ask_messages(question, template=prompt))
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template has the special tokens; a long text would give a warning.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def load_runner(options: TraceOptions, folder: str, longest: int) -> Any:
    """Load a model with the policy that decodes, for one request: on the GPU, or in f32 on the CPU
    of a machine without one.

    Args:
        longest: tokens of the longest prompt and answer.
    """
    os.environ[CONFIG_VAR] = options.served_config.to_json()
    served = {options.served: options.served_config}
    chosen = model_runner.options_on_this_machine(served, max_rows=1)
    page = chosen["page_size"]
    runner = model_runner.load_runner(
        folder,
        backend=BACKEND,
        dummy=False,
        mem_fraction_static=MEM_FRACTION,
        batch_sizes=[1],
        max_total_tokens=-(-longest // page) * page,
        **chosen,
    )
    model_runner.check_room(runner, [Point((longest,))])
    model_runner.make_contender(runner, BACKEND)
    return runner


def check_layers(options: TraceOptions, depth: int) -> None:
    """Refuse layers that a model of `depth` layers does not have; raises `ConfigError`."""
    if beyond := [layer for layer in options.layers or () if layer >= depth]:
        raise ConfigError(
            f"--layers names {', '.join(map(str, beyond))}: the model has layers 0 to {depth - 1}"
        )


def make_recorder(options: TraceOptions, runner: Any) -> Recorder:
    """Return what measures the layers of a runner's steps.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    depth, shape = len(runner.lim_roles), model_shape(runner.model_config.hf_text_config)
    check_layers(options, depth)
    layers = range(depth) if options.layers is None else options.layers
    choosers = {}
    for name, config in options.policies.items():
        policy = with_preset(config, shape).make_policy()
        table = runner.rope_table(policy)
        choosers[name] = Chooser(policy, depth, table, served=name == options.served)
    return Recorder(choosers, LessIsMore(budget=options.budget).budget_split, layers)


def end_tokens(runner: Any) -> set[int]:
    """Return the tokens that end an answer."""
    return set(runner.model_config.hf_eos_token_id or ())


@torch.no_grad()
def decode_greedily(
    runner: Any, recorder: Recorder, prompt: Sequence[int], options: TraceOptions
) -> Iterator[int]:
    """Prefill a prompt densely and decode its answer, up to an end token or the limit; the recorder
    sees the sampled steps.

    Yields:
        The answer's tokens, an end token included.

    Raises:
        ServerError: a logit is not finite.
    """
    ends = end_tokens(runner)
    point = Point((len(prompt) + options.max_tokens,))
    with model_runner.filled_batch(runner, point, seed=0) as batch:
        requests, slots = batch.forward_batch.req_pool_indices, batch.slots[0]
        tokens = torch.tensor([prompt], device=runner.device)
        output = model_runner.prefill(runner, batch, tokens)[0]
        logits = output.logits_output.next_token_logits
        for step, observes, measures in itertools.islice(
            sampled_steps(options.every), options.max_tokens
        ):
            if not logits.isfinite().all():
                raise ServerError(f"the logits before decode step {step:,} are not finite")
            token = logits.argmax(-1)
            yield int(token)
            if int(token) in ends or step == options.max_tokens:
                return
            length = len(prompt) + step
            forward_batch = model_runner.decode_batch(
                runner,
                requests,
                lengths=[length],
                input_ids=token,
                new_slots=slots[length - 1 : length],
            )
            recorder.begin_step(step, measures=measures)
            logits = model_runner.run_step(
                runner,
                replace(batch, forward_batch=forward_batch),
                observer=recorder if observes else None,
            )
