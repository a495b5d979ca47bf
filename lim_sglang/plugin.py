"""The two entry points that SGLang calls in each of its processes.

`activate_cpu_platform` lets SGLang's wheels serve on a host without CUDA; `register` makes the
backend `lim`, its flags, its refusals, its checks of requests and its counters known.
"""

import argparse
import importlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lim_sglang import compat, mends
from lim_sglang.compat import Target, serves_on_cpu
from lim_sglang.config import (
    ALLOW_VAR,
    BACKEND,
    CHECKED_MARK,
    CONFIG_VAR,
    NAME_KEY,
    SERVER_VAR,
    LimConfig,
    resolve_settings,
)
from lim_sglang.errors import ConfigError, RefusedError, ServerError, errors_in_words
from lim_sglang.flags import add_flags, given_config, given_flags, given_settings
from lim_sglang.policies.lossless import Lossless
from lim_sglang.request_door import (
    RequestDoor,
    anthropic_error,
    check_detokenized,
    check_incoming,
    check_tokenized,
    checked_conversion,
)
from lim_sglang.validation import (
    CPU_REFUSALS,
    DRAFTING_REFUSALS,
    GPU_REFUSALS,
    REFUSALS,
    SUMMARY_REFUSALS,
    Gpu,
    decodes_with_lim,
    default_page_size,
    find_gpu,
    reads_sparsely,
    reasons_against,
    reasons_against_drafting,
    reasons_against_gpu,
    reasons_against_model,
    reasons_against_ranks,
    reasons_against_selection,
    reasons_against_summaries,
)

_log = logging.getLogger(__name__)

FIELDS = {
    *(each.field for table in (REFUSALS, CPU_REFUSALS, GPU_REFUSALS) for each in table),
    *(each.field for each in DRAFTING_REFUSALS + SUMMARY_REFUSALS),
    *("attention_backend", "decode_attention_backend", "prefill_attention_backend"),
    *("sampling_backend", "grammar_backend", "kv_cache_dtype", "page_size", "tp_size"),
    *("context_length", "max_running_requests", "max_total_tokens", "mem_fraction_static"),
    *("model_path", "revision", "trust_remote_code", "json_model_override_args"),
    *("cuda_graph_config", "disable_overlap_schedule"),
    *("speculative_algorithm", "speculative_attention_mode", "speculative_eagle_topk"),
    *("speculative_num_draft_tokens", "speculative_num_steps"),
}
"""Fields of SGLang's `ServerArgs` that we read or set. A refusal of one that SGLang has renamed
would let everything pass."""


def register() -> None:
    """Make the backend `lim`, its flags, refusals, checks and counters known to SGLang."""
    _end_if_orphaned()
    compat.check_version()
    compat.check_signatures()
    compat.check_fields(FIELDS)
    if tried := compat.tried_version():
        _log.warning(
            "%s lets SGLang %s serve: lim-sglang was verified with %s, and a hook may do nothing",
            ALLOW_VAR,
            tried,
            compat.SGLANG_VERSION,
        )
    if SERVER_VAR in os.environ:
        mends.name_shared_memory(os.environ[SERVER_VAR])
    compat.register_backend(BACKEND, create_backend)
    compat.register_sampler(BACKEND, _create_sampler)
    compat.hook_after(Target.ADD_CLI_ARGS, _add_flags)
    compat.hook_around(Target.FROM_CLI_ARGS, _read_flags)
    compat.hook_around(Target.POST_INIT, _complete_arguments)
    compat.hook_before(Target.POST_INIT, _refuse)  # around it: what is completed has passed
    from lim_sglang.lossless import algorithm  # a class of SGLang's below

    algorithm.register()
    compat.hook_around(Target.ROW_ROOM, algorithm.room_of_row)
    compat.hook_after(Target.SAMPLING_INFO, _fill_seeds)
    compat.hook_after(Target.SEND_REQUEST, _seed_next_sample)
    compat.hook_around(Target.INIT_MODEL_RUNNER, _use_lim_runner)
    compat.hook_after(Target.INTERNAL_STATE, _show_state)
    compat.hook_before(Target.QUEUE_REQUEST, _count_retraction)
    compat.hook_after(Target.INIT_TOKENIZER, _guard_http)
    compat.hook_around(Target.GENERATE, check_incoming)
    compat.hook_after(Target.TOKENIZE, check_tokenized)
    compat.hook_before(Target.DETOKENIZE_REQUEST, check_detokenized)
    for reading in (Target.CHAT_MESSAGES, Target.CHAT_REQUEST, Target.COMPLETION_REQUEST):
        compat.hook_around(reading, checked_conversion)
    compat.hook_around(Target.ANTHROPIC_ERROR, anthropic_error)
    mends.mend_sglang(BACKEND)


def _end_if_orphaned() -> None:
    """End a process whose parent died while this one was importing SGLang.

    SGLang asks the kernel for a signal at its parent's death only after that import, too late.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def create_backend(runner: Any) -> Any:
    """Build the attention backend for a runner that must be ours.

    Raises:
        ServerError: the runner was not replaced, so its schedule and counters are missing.
    """
    if not hasattr(runner, "lim_roles"):
        raise ServerError(
            f"the backend {BACKEND} needs LimModelRunner, found {type(runner).__name__}: "
            f"SGLang did not apply the plugin's hooks, or only prefill uses {BACKEND}"
        )
    if compat.serves_on_cpu():
        if runner.lim_drafting:
            from lim_sglang.lossless.cpu_passes import LosslessCpuBackend

            return LosslessCpuBackend(runner)
        from lim_sglang.cpu_backend import LimCpuBackend

        return LimCpuBackend(runner)
    if runner.lim_drafting:
        from lim_sglang.lossless.gpu_backends import LosslessGpuBackend

        return LosslessGpuBackend(runner, init_new_workspace=runner.init_new_workspace)
    from lim_sglang.attention_backend import LimAttnBackend

    return LimAttnBackend(runner, init_new_workspace=runner.init_new_workspace)


def _create_sampler() -> Any:
    from lim_sglang.lossless.sampler import CoupledSampler

    return CoupledSampler()


def _complete_arguments(original: Callable[[Any], None], server_args: Any) -> None:
    """Keep `--sampling-backend lim`, which SGLang replaces on a CPU; let SGLang draft."""
    if decodes_with_lim(server_args) and (policy := _drafting_policy()):
        from lim_sglang.lossless import algorithm

        algorithm.prepare_arguments(server_args, policy, BACKEND)
    wanted = server_args.sampling_backend
    original(server_args)
    if wanted == BACKEND:
        server_args.sampling_backend = wanted


def _fill_seeds(sampling_info: Any, *arguments: Any) -> None:
    from lim_sglang.lossless.sampler import fill_seeds

    fill_seeds(sampling_info, *arguments)


def _seed_next_sample(_result: None, manager: Any, sent: Any) -> None:
    """Give sample i of a request for n > 1 samples the seed of the request plus i.

    SGLang sends n copies of a request, one after the other, that share one object of sampling
    parameters: the seed goes up by one behind each.
    """
    parameters = getattr(sent, "sampling_params", None)
    if manager.server_args.sampling_backend != BACKEND or parameters is None:
        return
    if parameters.sampling_seed is not None:
        parameters.sampling_seed += 1


def _add_flags(_result: None, parser: argparse.ArgumentParser) -> None:
    add_flags(parser)


def _read_flags(
    original: Callable[..., Any], server_args_class: type, args: argparse.Namespace
) -> Any:
    """Read our flags before SGLang reads its own; end a refused start without a traceback."""
    with errors_in_words():
        if decodes_with_lim(args):
            _keep_settings(args)
        else:
            _refuse_unused_flags(args)
        return original(server_args_class, args)


def _keep_settings(args: argparse.Namespace) -> None:
    """Merge the settings and write them to the environment, where every process finds them.

    Raises:
        RefusedError: a setting is wrong; refused SGLang options are named with it.
    """
    settings, found = given_settings(args), os.environ.get(CONFIG_VAR)
    found = _FOUND.get(found, found)
    try:
        config = resolve_settings(found, given_config(args), settings)
    except ConfigError as error:
        others = reasons_against(args, on_cpu=compat.serves_on_cpu())
        raise RefusedError([str(error), *others]) from None
    os.environ[CONFIG_VAR] = merged = config.to_json()
    _FOUND[merged] = found


_FOUND: dict[str | None, str | None] = {}
"""The user's variable, by the text that a start in this process put in its place: what one start
was given is no setting of the next."""


def _refuse_unused_flags(args: argparse.Namespace) -> None:
    flags = given_flags(args)
    if flags:
        raise ConfigError(
            f"{', '.join(flags)} would have no effect: decode is not served by {BACKEND}; "
            f"add --attention-backend {BACKEND}"
        )


def _refuse(server_args: Any) -> None:
    """Name every reason against a start, before SGLang checks or rewrites its options; mark options
    without one, as `LimModelRunner` expects.

    Raises:
        RefusedError: the options, the model, the GPU or our settings cannot be served.
    """
    if server_args.prefill_attention_backend == BACKEND and not decodes_with_lim(server_args):
        raise RefusedError([f"--prefill-attention-backend {BACKEND}: only decode is sparse"])
    if not decodes_with_lim(server_args):
        return
    on_cpu = compat.serves_on_cpu()
    reasons = reasons_against(server_args, on_cpu=on_cpu)
    model_config = compat.load_model_config(server_args)
    gpu = None if on_cpu else find_gpu()
    if not on_cpu:
        reasons += reasons_against_gpu(gpu, model_config, os.environ)
    if gpu is not None:
        reasons += compat.reasons_against_decode_stack()
    if gpu is not None and server_args.page_size is None:
        server_args.page_size = _default_page_size()
    reasons += _reasons_against_settings(server_args, model_config, gpu)
    if reasons:
        raise RefusedError(reasons)
    setattr(server_args, CHECKED_MARK, True)  # copies and child processes get the mark, too


def _default_page_size() -> int | None:
    """Return the page size of SGLang that the policy needs; None if any does."""
    config = _settings()
    return default_page_size(config) if config else None


def _drafting_policy() -> Lossless | None:
    """Return the policy if it is lossless."""
    config = _settings()
    policy = config.make_policy() if config else None
    return policy if isinstance(policy, Lossless) else None


def _settings() -> LimConfig | None:
    """Return the settings; None if they are wrong, which is named as a reason against the start."""
    try:
        return resolve_settings(os.environ.get(CONFIG_VAR), None, {})
    except ConfigError:
        return None


def _reasons_against_settings(
    server_args: Any, model_config: Any | None, gpu: Gpu | None
) -> list[str]:
    """List the reasons why LessIsMore's settings cannot be served with this model and GPU."""
    try:
        config = resolve_settings(os.environ.get(CONFIG_VAR), None, {})
    except ConfigError as error:
        return [str(error)]
    reasons = reasons_against_drafting(server_args, config)
    if model_config is None:
        return reasons
    reasons += reasons_against_model(model_config, config)
    on_cpu = compat.serves_on_cpu()
    reasons += reasons_against_ranks(server_args.tp_size, model_config, config, on_cpu=on_cpu)
    if reasons or gpu is None or not reads_sparsely(model_config, config):
        return reasons
    reasons += reasons_against_summaries(server_args, config)
    context = compat.context_length(server_args, model_config)
    return reasons + reasons_against_selection(
        gpu, config, context, server_args.kv_cache_dtype, server_args.max_running_requests
    )


def _use_lim_runner(original: Callable[[Any], None], worker: Any) -> None:
    if not decodes_with_lim(worker.server_args):
        original(worker)
        return
    from lim_sglang.model_runner import LimModelRunner

    compat.with_model_runner(LimModelRunner, lambda: original(worker))


def _show_state(result: Any, scheduler: Any, _request: Any) -> None:
    result.internal_state[NAME_KEY] = os.environ.get(SERVER_VAR)
    runner = scheduler.tp_worker.model_runner
    if not decodes_with_lim(scheduler.server_args) and not hasattr(runner, "lim_stats"):
        return
    from lim_sglang.model_runner import device_counts, live_state

    state = live_state(runner) if hasattr(runner, "lim_stats") else None
    states = [state]
    if decodes_with_lim(scheduler.server_args) and scheduler.ps.attn_tp_size > 1:
        states = compat.gather_states(scheduler, state)
    if state is None:
        return
    if len(states) > 1:
        state = state | {"ranks": len(states), "live_ranks": states.count(state)}
    if None not in states:  # ranks count together
        counts = device_counts(runner)
        of_ranks = compat.gather_states(scheduler, counts) if len(states) > 1 else [counts]
        state = state | {name: sum(each[name] for each in of_ranks) for name in counts}
    result.internal_state[BACKEND] = state


def _count_retraction(scheduler: Any, _request: Any, is_retracted: bool = False) -> None:
    runner = scheduler.tp_worker.model_runner
    if is_retracted and hasattr(runner, "lim_stats"):
        runner.lim_stats.retractions += 1


def _guard_http(_result: None, _manager: Any) -> None:
    """Put our door before the routes, where this process serves HTTP; `sgl.Engine` does not."""
    app = compat.http_app()
    if app is None or any(each.cls is RequestDoor for each in app.user_middleware):
        return
    from starlette.middleware import Middleware

    # Innermost, so that SGLang's CORS headers and keys go around it.
    app.user_middleware.append(Middleware(RequestDoor))


KERNELS = "sgl_kernel"
"""SGLang's GPU kernels, which do not load on a host without CUDA."""


def activate_cpu_platform() -> None:
    """Let SGLang's wheels serve on a host without CUDA, by a stand-in for their GPU kernels.

    SGLang calls this in each of its processes, before anything imports the kernels. The result,
    None, tells SGLang that this is not a platform of its own.
    """
    _end_if_orphaned()
    if serves_on_cpu() and not _can_import(KERNELS):
        sys.modules[KERNELS] = _stand_in(KERNELS)


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        # A failed import can leave submodules behind.
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]
        return False
    return True


def _stand_in(name: str) -> ModuleType:
    """Return a module from which any function can be imported; calling one raises an error, but
    for those that drafting needs (`lossless/cpu_kernels.py`)."""
    module = ModuleType(name, "Stands in for SGLang's GPU kernels on a host without CUDA.")
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None)

    def get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        from lim_sglang.lossless import cpu_kernels

        if attribute in cpu_kernels.REPLACED:
            return cpu_kernels.REPLACED[attribute]

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(
                f"{name}.{attribute} needs a GPU: this option cannot be served on a CPU"
            )

        return missing

    module.__dict__["__getattr__"] = get
    return module
