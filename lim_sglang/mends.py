"""Mends of SGLang's defects: functions around SGLang's own, which `compat.py` names.

`docs/limits.md` lists the defects; what a request may not ask for is in `request_checks.py`.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from http import HTTPStatus
from inspect import unwrap
from typing import Any

from lim_sglang.compat import (
    CPU_BIND_VAR,
    CPU_GRAMMARS,
    Target,
    grammar_masks,
    hook_after,
    hook_around,
    hook_before,
    resolve,
    serves_on_cpu,
)

_log = logging.getLogger(__name__)

NO_PENALTY = {"frequency": 0.0, "presence": 0.0, "repetition": 1.0}
"""Penalties of a request that has none."""
MAX_MATCH_S = 0.05
"""Time in which a request's stop patterns have to be looked for after a step."""


def name_shared_memory(name: str) -> None:
    """Let this process's semaphores and SGLang's load snapshot in `/dev/shm` bear a name.

    Neither is removed when its process is killed, and SGLang 0.5.16 never removes the snapshot.
    """
    # Where multiprocessing looks the prefix up; its spawned processes inherit the prefix.
    multiprocessing.current_process()._config["semprefix"] = f"/{name}"  # type: ignore[attr-defined]
    hook_after(Target.LOADS_FILE, lambda path, _: path.replace("/sglang_loads", f"/{name}-loads"))


def mend_sglang(backend: str) -> None:
    """Hook the functions of SGLang 0.5.16 that have a defect which our users would meet.

    Args:
        backend: the name of our attention backend.
    """

    def supports_triton(original: Callable[[str], bool], name: str) -> bool:
        """Keep SGLang from running Triton kernels for our backend on a CPU."""
        return original(name) and not (name == backend and serves_on_cpu())

    hook_around(Target.SUPPORT_TRITON, supports_triton)
    hook_around(Target.INIT_GROUP, group_without_nccl)
    hook_around(Target.MASK_VOCABULARY, without_compiler)
    hook_before(Target.INIT_MODEL_RUNNER, bind_rank)
    hook_around(Target.HANDLE_BATCH, handle_batch_without_leak)
    hook_around(Target.CHUNK_LOGPROBS, tokens_with_own_candidates)
    hook_around(Target.UPDATE_FINISH, finish_of_run)
    hook_after(Target.TOKEN_LOGPROBS, rows_that_can_be_read)
    hook_around(Target.MATCH_STOPS, stops_within_time)
    hook_around(Target.SCALE_PENALTIES, without_compiler)
    hook_before(Target.APPLY_PENALTIES, add_penalties_before_scaling)
    hook_around(Target.PREPARE_PENALTY, prepare_after_retraction)
    hook_around(Target.COUNT_TOKENS, count_tokens_later)
    hook_before(Target.COPY_SAMPLING, count_newest_tokens)
    hook_after(Target.INIT_TOKENIZER, bound_tokenizer)
    hook_before(Target.POST_INIT, use_grammars_of_cpu)
    hook_around(Target.CREATE_GRAMMARS, grammars_or_none)
    hook_around(Target.COMPILE_GRAMMAR, grammar_that_can_begin)
    for mask in grammar_masks():
        hook_around(mask, fill_mask_or_allow_all)


def group_without_nccl(original: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    """Make a group of ranks; on a CPU without NCCL.

    SGLang 0.5.16 asks for NCCL wherever torch's wheel has it, and NCCL refuses a CPU: no server of
    several ranks starts there.
    """
    absent = {"use_pynccl": False, "use_custom_allreduce": False} if serves_on_cpu() else {}
    return original(*arguments, **(words | absent))


def bind_rank(worker: Any) -> None:
    """Share the cores out among the ranks of a CPU server, where the user has not.

    SGLang 0.5.16 refuses more ranks than NUMA nodes that are not bound, and without Intel's AMX it
    binds nothing: each rank would have a thread for each core.
    """
    ranks = worker.server_args.tp_size
    if ranks == 1 or not serves_on_cpu():
        return
    shares = cores_of_ranks(sorted(os.sched_getaffinity(0)), ranks)
    os.environ.setdefault(CPU_BIND_VAR, "|".join(",".join(map(str, share)) for share in shares))
    if "OMP_NUM_THREADS" not in os.environ:
        resolve("torch.set_num_threads")(len(shares[0]))


def cores_of_ranks(cores: Sequence[int], ranks: int) -> list[Sequence[int]]:
    """Return the cores of each rank, equally many; with fewer cores than ranks some share one."""
    each = max(1, len(cores) // ranks)
    return [cores[first : first + each] for first in (r * each % len(cores) for r in range(ranks))]


async def handle_batch_without_leak(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """Run SGLang's batch handler, then drop the request states that it forgets.

    For a request of n > 1 samples SGLang 0.5.16 registers n states a prompt and drops one; the
    others never reach the scheduler, and SGLang's shutdown waits for them forever.
    """
    try:
        async for output in original(manager, obj, request):
            yield output
    finally:
        if getattr(obj, "parallel_sample_num", 1) > 1:
            manager._discard_pending_req_states(obj)


def tokens_with_own_candidates(
    original: Callable[..., list[Any]], chat: Any, logprobs: Any, use_token_index: bool = False
) -> list[Any]:
    """Run SGLang's reader of logprobs so that each token gets its own candidates.

    SGLang 0.5.16 indexes candidates by token in whole answers only. In a stream all tokens of a
    chunk get the candidates of the chunk's first token, although both lists are in step.
    """
    return original(chat, logprobs, use_token_index=True)


def rows_that_can_be_read(
    found: tuple[list[Any], list[Any]], logprobs: Any, *_: Any, **__: Any
) -> tuple[list[Any], list[Any]]:
    """Return the logprobs of named tokens with an empty tensor for a request that names none.

    SGLang 0.5.16 gives such a request a list, reads each row as a tensor, and ends the server: one
    request with `token_ids_logprob` beside one without was enough.
    """
    values, ids = found
    if any(hasattr(row, "tolist") for row in values):
        values = [row if hasattr(row, "tolist") else logprobs.new_empty(0) for row in values]
    return values, ids


def finish_of_run(original: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """Find the end of a request to which a run of tokens was added, token by token.

    SGLang 0.5.16 looks at a run as a whole: its length first, then stop strings, then end tokens,
    so that text behind an end token is kept where the same run reaches the limit of tokens or
    completes a stop string.
    """
    run = req.output_ids[len(req.output_ids) - new_accepted_len :]
    if len(run) < 2:
        original(req, new_accepted_len)
        return
    del req.output_ids[-len(run) :]
    for added, token in enumerate(run, 1):
        req.output_ids.append(token)
        original(req, 1)
        if req.finished():
            req.output_ids.extend(run[added:])  # SGLang cuts them off by `finished_len`
            return


class _StopTimeoutError(Exception):
    """A stop pattern takes too long."""


def stops_within_time(
    original: Callable[..., bool], req: Any, *arguments: Any, **words: Any
) -> bool:
    """Look for a request's stop strings; abort the request if its patterns take too long.

    Python's `re` may take exponential time, in which the scheduler would serve nobody. It heeds
    signals while it matches, and the scheduler's loop is its process's main thread.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not req.sampling_params.stop_regex_strs or not in_main_thread:
        return original(req, *arguments, **words)
    armed = [True]

    def ring(*_: Any) -> None:
        if armed:  # the signal may be handled after the match has ended
            raise _StopTimeoutError

    signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, MAX_MATCH_S)
            return original(req, *arguments, **words)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            armed.clear()
    except _StopTimeoutError:
        abort = resolve("sglang.srt.managers.schedule_batch.FINISH_ABORT")
        why = f"stop_regex took over {MAX_MATCH_S} s: rewrite it without a repeat inside a repeat"
        req.finished_reason = abort(why, HTTPStatus.BAD_REQUEST, "BadRequestError")
        return True


def without_compiler(original: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function that SGLang compiles; on a CPU as it is, without `torch.compile`.

    Otherwise the first request with a repetition penalty, or to a server of several ranks, would
    stop all others for the half minute that a C++ compiler takes, or end the server where there is
    none.
    """
    return (unwrap(original) if serves_on_cpu() else original)(*arguments)


def add_penalties_before_scaling(
    orchestrator: Any, logits: Any = None, repeat: int | None = None
) -> None:
    """Order a batch's penalties: frequency and presence before repetition, as under overlap.

    SGLang 0.5.16 keeps them in a set, whose order varies from start to start.
    """
    ordered = sorted(orchestrator.penalizers.items(), key=lambda each: each[1].is_multiplicative)
    orchestrator.penalizers = dict(ordered)


def prepare_after_retraction(original: Callable[[Any], None], penalizer: Any) -> None:
    """Prepare one kind of penalty of a batch; count the tokens that a retracted request has.

    SGLang 0.5.16 begins a request's penalties, and its count of tokens, anew as it goes on.
    """
    if penalizer.is_prepared():
        return
    original(penalizer)
    state = vars(penalizer)
    for row, request in enumerate(penalizer.orchestrator.reqs()):
        if not request.output_ids:
            continue
        if (lengths := state.get("len_output_tokens")) is not None:
            lengths[row] = len(request.output_ids)
        for kind, default in NO_PENALTY.items():
            counted = state.get(f"cumulated_{kind}_penalties")
            if counted is None or getattr(request.sampling_params, f"{kind}_penalty") == default:
                continue
            tokens = counted.new_tensor(request.output_ids, dtype=resolve("torch.int64"))
            penalties = state[f"{kind}_penalties"][row].expand(len(tokens))
            if kind == "frequency":
                counted[row].scatter_add_(0, tokens, penalties)
            else:
                counted[row].scatter_(0, tokens, penalties)


def count_tokens_later(original: Callable[[Any], None], batch: Any) -> None:
    """Let a decode step under overlap count its newest tokens once they are known on the device.

    SGLang 0.5.16 counts the tokens that the host knows, which are those of the step before: at
    first the prompt's last one. `count_newest_tokens` counts them.
    """
    if batch.enable_overlap:
        batch.sampling_info.lim_uncounted = batch
    else:
        original(batch)


def count_newest_tokens(sampling_info: Any) -> None:
    """Count the newest tokens of a decode batch for its penalties, as its forward pass begins."""
    batch = vars(sampling_info).pop("lim_uncounted", None)
    if batch is not None:
        drafts = not batch.spec_algorithm.is_none()
        newest = batch.spec_info.bonus_tokens if drafts else batch.input_ids
        sampling_info.penalizer_orchestrator.cumulate_output_tokens(newest)


def bound_tokenizer(_result: None, manager: Any) -> None:
    """Give a tokenizer that knows no length the model's.

    Hugging Face's length is then 10**30, which no JSON of SGLang's can hold: `/tokenize` answers
    500 to everything.
    """
    tokenizer = manager.tokenizer
    if tokenizer is not None and getattr(tokenizer, "model_max_length", 0) > sys.maxsize:
        tokenizer.model_max_length = manager.context_len


def use_grammars_of_cpu(server_args: Any) -> None:
    """Choose the grammar backend of a server on a CPU, where nobody has chosen one.

    SGLang's default, xgrammar, has no kernel for a CPU: the first request with a grammar would end
    the server.
    """
    if serves_on_cpu() and server_args.grammar_backend is None:
        server_args.grammar_backend = CPU_GRAMMARS


def grammars_or_none(
    original: Callable[..., Any], server_args: Any, tokenizer: Any, *rest: Any, **words: Any
) -> Any:
    """Run SGLang's maker of grammar backends; serve without one if llguidance refuses a tokenizer.

    SGLang does the same for xgrammar. Requests with a grammar then get a status of 400.
    """
    try:
        return original(server_args, tokenizer, *rest, **words)
    except ValueError as error:
        if server_args.grammar_backend != CPU_GRAMMARS:
            raise
        _log.warning("no grammars: %s cannot read the tokenizer (%s)", CPU_GRAMMARS, error)
        return None


def grammar_that_can_begin(
    original: Callable[..., Any], backend: Any, key: tuple[str, str], require_reasoning: bool
) -> Any:
    """Compile a grammar, and refuse one that allows no first token.

    SGLang 0.5.16 takes any grammar that compiles. For a recursion without end, llguidance raises
    in the scheduler when the first mask is asked for; xgrammar allows no token, and sampling from
    nothing ends the process.
    """
    grammar = original(backend, key, require_reasoning)
    vocab_size = _vocab_size(grammar)
    if vocab_size is None:
        return grammar
    mask = grammar.allocate_vocab_mask(vocab_size=vocab_size, batch_size=1, device="cpu")
    first = grammar.copy()
    first.fill_vocab_mask(mask, 0)
    if not first.lim_stuck:
        return grammar
    path = "sglang.srt.constrained.base_grammar_backend.InvalidGrammarObject"
    return resolve(path)(first.lim_stuck)


def fill_mask_or_allow_all(
    original: Callable[..., None], grammar: Any, vocab_mask: Any, idx: int
) -> None:
    """Fill a request's row of the mask; allow every token if its grammar allows none.

    The next token is then not the grammar's, for which SGLang aborts the request; without a token
    to sample, the error would end the scheduler. `lim_stuck` of the grammar says why.
    """
    fill = partial(original, grammar, vocab_mask, idx)
    grammar.lim_stuck = _why_stuck(fill, vocab_mask[idx], _vocab_size(grammar) or 0)
    if grammar.lim_stuck:
        _log.error("a grammar cannot go on: %s", grammar.lim_stuck)
        vocab_mask[idx].fill_(-1)


def _vocab_size(grammar: Any) -> int | None:
    """Return the tokens of a grammar that masks by bits, None for any other."""
    tokenizer = getattr(grammar, "llguidance_tokenizer", grammar)
    return getattr(tokenizer, "vocab_size", None)


def _why_stuck(fill: Callable[[], None], bits: Any, vocab_size: int) -> str | None:
    """Fill one row of a mask; return why no token is allowed, None if there is one.

    Args:
        bits: int32 words of 32 tokens each.
    """
    try:
        fill()
    except ValueError as error:
        return str(error).partition("\n")[0]
    whole, rest = divmod(vocab_size, 32)
    is_allowed = bool(bits[:whole].any()) or (rest and bool(bits[whole] & ((1 << rest) - 1)))
    return None if is_allowed else "the grammar allows no token"
