"""What is pinned: versions of SGLang and FlashInfer, and the signatures that we rely on."""

import dis
import importlib
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from inspect import signature, unwrap
from typing import Any

from lim_sglang.errors import ServerError

SGLANG_VERSION = "0.5.16"
FLASHINFER_VERSION = "0.6.14"


class Target(StrEnum):
    """The functions of SGLang that are hooked."""

    ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
    FROM_CLI_ARGS = "sglang.srt.server_args.ServerArgs.from_cli_args"
    POST_INIT = "sglang.srt.server_args.ServerArgs.__post_init__"
    INIT_MODEL_RUNNER = "sglang.srt.managers.tp_worker.TpModelWorker._init_model_runner"
    INTERNAL_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
    QUEUE_REQUEST = "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue"
    SUPPORT_TRITON = "sglang.srt.utils.common.support_triton"
    CHUNK_LOGPROBS = (
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_logprobs_tokens"
    )
    HANDLE_BATCH = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request"


HOOKED: Mapping[str, tuple[str, ...]] = {
    Target.ADD_CLI_ARGS: ("parser",),
    Target.FROM_CLI_ARGS: ("args",),
    Target.POST_INIT: ("self",),
    Target.INIT_MODEL_RUNNER: ("self",),
    Target.INTERNAL_STATE: ("self", "recv_req"),
    Target.QUEUE_REQUEST: ("self", "req", "is_retracted"),
    Target.SUPPORT_TRITON: ("backend",),
    Target.CHUNK_LOGPROBS: ("self", "logprobs", "use_token_index"),
    Target.HANDLE_BATCH: ("self", "obj", "request"),
}
"""The parameters of what is hooked."""

_BACKEND = "sglang.srt.layers.attention.flashinfer_backend"
WRAPPER = "flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper"

USED_ON_GPU: Mapping[str, tuple[str, ...]] = {
    f"{_BACKEND}.FlashInferAttnBackend.forward_decode": (
        *("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
    ),
    f"{_BACKEND}.FlashInferAttnBackend.init_forward_metadata": ("self", "forward_batch"),
    f"{_BACKEND}.FlashInferAttnBackend.init_forward_metadata_out_graph": (
        *("self", "forward_batch", "in_capture"),
    ),
    f"{_BACKEND}.DecodeMetadata": ("decode_wrappers", "swa_out_cache_loc"),
    "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool": (
        *("self", "memory_pool_config"),
    ),
    WRAPPER: (
        *("float_workspace_buffer", "kv_layout", "use_cuda_graph", "use_tensor_cores"),
        *("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer"),
        *("backend", "jit_args"),
    ),
}
"""The parameters of what is overridden or called on a GPU."""

WRAPPER_BUFFERS = (
    *("_float_workspace_buffer", "_int_workspace_buffer", "_qo_indptr_buf"),
    *("_paged_kv_indptr_buf", "_paged_kv_indices_buf", "_paged_kv_last_page_len_buf"),
)
"""FlashInfer's private buffers that we read."""


def installed_version(package: str = "sglang") -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_version() -> None:
    """Refuse any SGLang but the one that this plugin was verified with."""
    reasons = reasons_against_version("sglang", SGLANG_VERSION)
    if reasons:
        raise ServerError(reasons[0])


def check_signatures() -> None:
    """Refuse an SGLang whose hooked functions take other parameters than expected."""
    wrong = wrong_signatures(HOOKED)
    if wrong:
        raise ServerError(wrong[0])


def reasons_against_version(package: str, expected: str) -> list[str]:
    """Why a package's version will not do, in one line."""
    found = installed_version(package)
    if found == expected:
        return []
    return [
        f"lim-sglang needs {package} {expected} exactly, found {found or 'none'}: "
        f"install {package}=={expected}"
    ]


def reasons_against_decode_stack() -> list[str]:
    """Why what is installed cannot decode on a GPU, one line each; nothing of it is for CPUs."""
    reasons = reasons_against_version("flashinfer-python", FLASHINFER_VERSION)
    if reasons:
        return reasons
    return wrong_signatures(USED_ON_GPU) or missing_attributes(WRAPPER, WRAPPER_BUFFERS)


def wrong_signatures(expected: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Which callables, named by dotted paths, take other parameters than expected."""
    reasons: list[str] = []
    for path, parameters in expected.items():
        try:
            found = tuple(signature(_resolve(path)).parameters)
        except (ImportError, RuntimeError) as error:  # FlashInfer's own check of its parts
            return [*reasons, f"{path} does not load ({error}): {_not_as_published(path)}"]
        if found != parameters:
            reasons.append(
                f"{path} takes {found}, expected {parameters}: {_not_as_published(path)}"
            )
    return reasons


def missing_attributes(path: str, names: Sequence[str]) -> list[str]:
    """Which attributes the constructor of a class, named by its dotted path, does not set."""
    code = unwrap(_resolve(f"{path}.__init__")).__code__
    found = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    missing = [name for name in names if name not in found]
    return [f"{path} has no {', '.join(missing)}: {_not_as_published(path)}"] if missing else []


def _not_as_published(path: str) -> str:
    package = path.split(".")[0]
    expected = {"sglang": SGLANG_VERSION, "flashinfer": FLASHINFER_VERSION}.get(package, "")
    return f"this {package} is not {expected} as published, install it again"


def _resolve(path: str) -> Callable[..., Any]:
    """Import the object that a dotted path names."""
    module_name, *attributes = path.split(".")
    found: Any = importlib.import_module(module_name)
    for attribute in attributes:
        module_name = f"{module_name}.{attribute}"
        found = getattr(found, attribute, None) or importlib.import_module(module_name)
    result: Callable[..., Any] = found
    return result
