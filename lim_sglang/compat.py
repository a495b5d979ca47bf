"""SGLang's internals, which only this module, `mends.py`, `frontend.py` and
`lossless/internals.py` name.

In this order: the versions and signatures that the plugin relies on; names of SGLang, imported when
they are first used; functions of SGLang that we call; hooks.
"""

import dis
import importlib
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.metadata import requires
from inspect import signature, unwrap
from typing import TYPE_CHECKING, Any

from lim_sglang.config import ALLOW_VAR
from lim_sglang.environment import installed_version
from lim_sglang.errors import ServerError

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.attention.flashinfer_backend import DecodeMetadata, FlashInferAttnBackend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.managers.utils import GenerationBatchResult
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
    from sglang.srt.speculative.spec_info import SpecInput, SpecInputType
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo
    from torch import Tensor

    __all__ = [
        "AttentionBackend",
        "BaseSpecWorker",
        "CustomSpecAlgo",
        "DecodeMetadata",
        "FlashInferAttnBackend",
        "ForwardBatch",
        "ForwardMode",
        "GenerationBatchResult",
        "KVWriteLoc",
        "LogitsProcessorOutput",
        "ModelRunner",
        "Sampler",
        "SamplingBatchInfo",
        "SpecInput",
        "SpecInputType",
        "TorchNativeAttnBackend",
    ]

_log = logging.getLogger(__name__)

SGLANG_VERSION = "0.5.16"
FLASHINFER_VERSION = "0.6.14"

CPU_ENGINE_VAR = "SGLANG_USE_CPU_ENGINE"
"""Read by SGLang when SGLang is imported: 1 makes a host without a GPU serve on its CPU."""
CPU_BIND_VAR = "SGLANG_CPU_OMP_THREADS_BIND"
"""Read by SGLang when a rank of a CPU server begins: each rank's cores, as in `0,1|2,3`. Without it
there may be as many ranks as NUMA nodes."""
TENSOR_CORE_VAR = "SGLANG_FLASHINFER_USE_TENSOR_CORE"
"""Read by SGLang when a FlashInfer backend is made: true or false, for decode."""
NO_COPY_VAR = "SGLANG_EAGER_INPUT_NO_COPY"
"""Read by SGLang at each step without a graph: 1 takes a batch's tensors as they are, in place of
copying them into buffers of as many rows as there may be requests."""
GLUE_GRAPH_VAR = "SGLANG_ENABLE_METADATA_GLUE_GRAPH"
"""Read by later releases of SGLang: true captures what a backend does before each step."""
PLUGINS_VAR = "SGLANG_PLUGINS"
"""Comma-separated names of the plugins that SGLang loads; unset for all."""
PLATFORM_VAR = "SGLANG_PLATFORM"
"""Name of the platform that SGLang uses; any name keeps our plugin from loading."""


class Target(StrEnum):
    """The functions of SGLang that are hooked."""

    ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
    FROM_CLI_ARGS = "sglang.srt.server_args.ServerArgs.from_cli_args"
    POST_INIT = "sglang.srt.server_args.ServerArgs.__post_init__"
    INIT_MODEL_RUNNER = "sglang.srt.managers.tp_worker.TpModelWorker._init_model_runner"
    SAMPLING_INFO = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
    SEND_REQUEST = "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request"
    INTERNAL_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
    QUEUE_REQUEST = "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue"
    LOADS_FILE = "sglang.srt.managers.load_snapshot.shm_path_for"
    SUPPORT_TRITON = "sglang.srt.utils.common.support_triton"
    INIT_GROUP = "sglang.srt.distributed.parallel_state.init_model_parallel_group"
    MASK_VOCABULARY = "sglang.srt.layers.vocab_parallel_embedding.get_masked_input_and_mask"
    CHUNK_LOGPROBS = (
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_logprobs_tokens"
    )
    HANDLE_BATCH = "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request"
    GENERATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
    TOKENIZE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"
    INIT_TOKENIZER = (
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_request_dispatcher"
    )
    DETOKENIZE_REQUEST = (
        "sglang.srt.entrypoints.openai.serving_tokenize.OpenAIServingDetokenize"
        "._convert_to_internal_request"
    )
    CHAT_MESSAGES = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._process_messages"
    CHAT_REQUEST = (
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._convert_to_internal_request"
    )
    COMPLETION_REQUEST = (
        "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion"
        "._convert_to_internal_request"
    )
    ANTHROPIC_ERROR = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing._error_response"
    CREATE_GRAMMARS = "sglang.srt.constrained.grammar_manager.create_grammar_backend"
    COMPILE_GRAMMAR = (
        "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend._init_value_dispatch"
    )
    ROW_ROOM = "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len"
    TOKEN_LOGPROBS = "sglang.srt.layers.logprob_processor.get_token_ids_logprobs"
    UPDATE_FINISH = "sglang.srt.managers.schedule_batch.Req.update_finish_state"
    MATCH_STOPS = "sglang.srt.managers.schedule_batch.Req._check_str_based_finish"
    SCALE_PENALTIES = "sglang.srt.sampling.penaltylib.repetition_penalty.apply_scaling_penalties"
    APPLY_PENALTIES = (
        "sglang.srt.sampling.penaltylib.orchestrator.BatchedPenalizerOrchestrator.apply"
    )
    PREPARE_PENALTY = "sglang.srt.sampling.penaltylib.orchestrator._BatchedPenalizer.prepare"
    COUNT_TOKENS = "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens"
    COPY_SAMPLING = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward"
    LLGUIDANCE_MASK = "sglang.srt.constrained.llguidance_backend.GuidanceGrammar.fill_vocab_mask"
    XGRAMMAR_MASK = "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.fill_vocab_mask"


HOOKED: Mapping[str, tuple[str, ...]] = {
    Target.ADD_CLI_ARGS: ("parser",),
    Target.FROM_CLI_ARGS: ("args",),
    Target.POST_INIT: ("self",),
    Target.INIT_MODEL_RUNNER: ("self",),
    Target.SAMPLING_INFO: ("batch", "vocab_size"),
    Target.SEND_REQUEST: ("self", "tokenized_obj"),
    Target.INTERNAL_STATE: ("self", "recv_req"),
    Target.QUEUE_REQUEST: ("self", "req", "is_retracted"),
    Target.LOADS_FILE: ("ipc_name",),
    Target.SUPPORT_TRITON: ("backend",),
    Target.INIT_GROUP: (
        *("group_ranks", "local_rank", "backend", "use_pynccl", "use_custom_allreduce"),
        *("use_message_queue_broadcaster", "group_name", "use_mscclpp_allreduce"),
        *("use_torch_symm_mem_allreduce", "recovered_rank", "rank_offset", "max_world_size"),
    ),
    Target.MASK_VOCABULARY: (
        *("input_", "org_vocab_start_index", "org_vocab_end_index", "num_org_vocab_padding"),
        *("added_vocab_start_index", "added_vocab_end_index"),
    ),
    Target.CHUNK_LOGPROBS: ("self", "logprobs", "use_token_index"),
    Target.HANDLE_BATCH: ("self", "obj", "request"),
    Target.GENERATE: ("self", "obj", "request"),
    Target.TOKENIZE: (
        *("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs"),
        "token_type_ids",
    ),
    Target.INIT_TOKENIZER: ("self",),
    Target.DETOKENIZE_REQUEST: ("self", "request", "raw_request"),
    Target.CHAT_MESSAGES: ("self", "request", "is_multimodal"),
    Target.CHAT_REQUEST: ("self", "request", "raw_request"),
    Target.COMPLETION_REQUEST: ("self", "request", "raw_request"),
    Target.ANTHROPIC_ERROR: ("self", "status_code", "error_type", "message", "exception_name"),
    Target.CREATE_GRAMMARS: (
        *("server_args", "tokenizer", "vocab_size", "eos_token_ids", "think_end_id"),
    ),
    Target.COMPILE_GRAMMAR: ("self", "key", "require_reasoning"),
    Target.ROW_ROOM: ("server_args",),
    Target.TOKEN_LOGPROBS: ("logprobs", "token_ids_logprobs", "no_copy_to_cpu"),
    Target.UPDATE_FINISH: ("self", "new_accepted_len"),
    Target.MATCH_STOPS: ("self", "new_accepted_len"),
    Target.SCALE_PENALTIES: ("logits", "scaling_penalties"),
    Target.APPLY_PENALTIES: ("self", "logits", "repeat"),
    Target.PREPARE_PENALTY: ("self",),
    Target.COUNT_TOKENS: ("self",),
    Target.COPY_SAMPLING: ("self",),
    Target.LLGUIDANCE_MASK: ("self", "vocab_mask", "idx"),
    Target.XGRAMMAR_MASK: ("self", "vocab_mask", "idx"),
}
"""Parameters of the hooked functions."""

GRAMMAR_MASKS: Mapping[Target, str] = {
    Target.LLGUIDANCE_MASK: "llguidance",
    Target.XGRAMMAR_MASK: "xgrammar",
}
"""Hooked functions that load only with the package of a grammar backend."""

_FLASHINFER_BACKEND = "sglang.srt.layers.attention.flashinfer_backend"
_BACKEND_CLASS = f"{_FLASHINFER_BACKEND}.FlashInferAttnBackend"
_GRAPH_RUNNER = "sglang.srt.model_executor.runner.base_cuda_graph_runner"
_LINEAR_METHOD = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod"
_ATTENTIONS = [f"sglang.srt.models.{m}.{m.title()}Attention" for m in ("llama", "qwen2", "qwen3")]
_RUNNER_CLASS = "sglang.srt.model_executor.model_runner.ModelRunner"
WRAPPER = "flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper"

USED_ON_GPU: Mapping[str, tuple[str, ...]] = {
    path: tuple(parameters.split())
    for path, parameters in {
        f"{_BACKEND_CLASS}.forward_decode": "self q k v layer forward_batch save_kv_cache",
        f"{_BACKEND_CLASS}.forward_extend": "self q k v layer forward_batch save_kv_cache",
        f"{_BACKEND_CLASS}.init_forward_metadata": "self forward_batch",
        f"{_BACKEND_CLASS}.init_forward_metadata_out_graph": "self forward_batch in_capture",
        f"{_BACKEND_CLASS}.init_cuda_graph_state": "self max_bs max_num_tokens kv_indices_buf",
        "sglang.srt.model_executor.forward_context.forward_context": "ctx",
        f"{_GRAPH_RUNNER}.get_batch_sizes_to_capture": "model_runner captured_req_width",
        f"{_FLASHINFER_BACKEND}.DecodeMetadata": "decode_wrappers swa_out_cache_loc",
        f"{_RUNNER_CLASS}.alloc_memory_pool": "self memory_pool_config",
        f"{_LINEAR_METHOD}.apply": "self layer x bias",
        **{f"{a}.forward": "self positions hidden_states forward_batch" for a in _ATTENTIONS},
        WRAPPER: "float_workspace_buffer kv_layout use_cuda_graph use_tensor_cores"
        " paged_kv_indptr_buffer paged_kv_indices_buffer paged_kv_last_page_len_buffer"
        " backend jit_args",
    }.items()
}
"""Parameters of the functions and classes that are overridden or called on a GPU."""

WRAPPER_BUFFERS = (
    *("_float_workspace_buffer", "_int_workspace_buffer", "_qo_indptr_buf"),
    *("_paged_kv_indptr_buf", "_paged_kv_indices_buf", "_paged_kv_last_page_len_buf"),
)
"""Private buffers of FlashInfer's wrapper that we read."""

PLUGIN_GROUP = "sglang.srt.plugins"
"""The entry points by which SGLang finds its plugins."""

CPU_GRAMMARS = "llguidance"
"""The grammar backend that masks logits on a CPU, and that reads the character NUL."""


def check_version() -> None:
    """Refuse any SGLang but the one that this plugin was verified with, or that is tried."""
    reasons = reasons_against_version("sglang", SGLANG_VERSION)
    if reasons:
        raise ServerError(reasons[0])


def check_signatures() -> None:
    """Refuse an SGLang whose hooked functions take other parameters than expected."""
    absent = set(GRAMMAR_MASKS) - set(grammar_masks())
    wrong = wrong_signatures({path: HOOKED[path] for path in HOOKED if path not in absent})
    if wrong:
        raise ServerError(wrong[0])


def check_fields(names: Iterable[str]) -> None:
    """Refuse an SGLang whose options lack one of these names: our checks would read nothing."""
    path = Target.POST_INIT.rpartition(".")[0]
    missing = sorted(set(names) - signature(resolve(path)).parameters.keys())
    if missing:
        raise ServerError(
            f"{path} has no {', '.join(missing)}, which lim-sglang checks before a start: "
            f"{_not_as_published(path)}"
        )


def tried_version() -> str | None:
    """Return SGLang's version if `LIM_ALLOW_SGLANG` lets it be tried, None for the pinned one."""
    found = installed_version("sglang")
    return found if found == os.environ.get(ALLOW_VAR) and found != SGLANG_VERSION else None


def grammar_masks() -> list[Target]:
    """Return the functions of the grammar backends that are installed."""
    return [path for path, package in GRAMMAR_MASKS.items() if importlib.util.find_spec(package)]


def reasons_against_version(package: str, expected: str) -> list[str]:
    """Return one reason if another version of a package, or none, is installed; the SGLang that is
    tried will do."""
    found = installed_version(package)
    if found == expected or (package == "sglang" and tried_version()):
        return []
    allowed = os.environ.get(ALLOW_VAR) if package == "sglang" else None
    also = f" ({ALLOW_VAR} allows {allowed} beside it)" if allowed else ""
    return [
        f"lim-sglang needs {package} {expected} exactly, found {found or 'none'}{also}: "
        f"install {package}=={expected}"
    ]


def reasons_against_decode_stack() -> list[str]:
    """List the reasons why the installed packages cannot decode on a GPU; a CPU needs none."""
    reasons = reasons_against_version("flashinfer-python", flashinfer_version())
    if reasons:
        return reasons
    return wrong_signatures(USED_ON_GPU) or missing_attributes(WRAPPER, WRAPPER_BUFFERS)


def flashinfer_version() -> str:
    """Return the FlashInfer to decode with: the pinned one, or that of the SGLang that is tried."""
    required = "\n".join(requires("sglang") or ()) if tried_version() else ""
    pin = re.search(r"^flashinfer[-_]python(?:\[.*\])?==([\w.]+)", required, re.M)
    return pin[1] if pin else FLASHINFER_VERSION


def wrong_signatures(expected: Mapping[str, tuple[str, ...]]) -> list[str]:
    """List the callables, named by dotted paths, that take other parameters than expected."""
    reasons: list[str] = []
    for path, parameters in expected.items():
        try:
            found = tuple(signature(resolve(path)).parameters)
        except (ImportError, RuntimeError) as error:  # FlashInfer's own check of its parts
            return [*reasons, f"{path} does not load ({error}): {_not_as_published(path)}"]
        if found != parameters:
            reasons.append(
                f"{path} takes {found}, expected {parameters}: {_not_as_published(path)}"
            )
    return reasons


def missing_attributes(path: str, names: Sequence[str]) -> list[str]:
    """Return one reason if the constructor of a class does not set all of these attributes.

    Args:
        path: the dotted path of the class.
    """
    code = unwrap(resolve(f"{path}.__init__")).__code__
    found = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    missing = [name for name in names if name not in found]
    return [f"{path} has no {', '.join(missing)}: {_not_as_published(path)}"] if missing else []


def _not_as_published(path: str) -> str:
    package = path.split(".")[0]
    if tried := tried_version():
        return f"lim-sglang is made for SGLang {SGLANG_VERSION}, adapt it to {tried}"
    expected = {"sglang": SGLANG_VERSION, "flashinfer": FLASHINFER_VERSION}.get(package, "")
    return f"this {package} is not {expected} as published, install it again"


def resolve(path: str) -> Callable[..., Any]:
    """Import the object that a dotted path names."""
    module_name, *attributes = path.split(".")
    found: Any = importlib.import_module(module_name)
    for attribute in attributes:
        module_name = f"{module_name}.{attribute}"
        found = getattr(found, attribute, None) or importlib.import_module(module_name)
    result: Callable[..., Any] = found
    return result


_INTERNALS: Mapping[str, str] = {
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend",
    "BaseSpecWorker": "sglang.srt.speculative.base_spec_worker",
    "CaptureHiddenMode": "sglang.srt.model_executor.forward_batch_info",
    "CustomSpecAlgo": "sglang.srt.speculative.spec_registry",
    "DecodeMetadata": _FLASHINFER_BACKEND,
    "FlashInferAttnBackend": _FLASHINFER_BACKEND,
    "ForwardBatch": "sglang.srt.model_executor.forward_batch_info",
    "ForwardMode": "sglang.srt.model_executor.forward_batch_info",
    "FutureMap": "sglang.srt.managers.overlap_utils",
    "GenerationBatchResult": "sglang.srt.managers.utils",
    "HybridAttnBackend": "sglang.srt.layers.attention.hybrid_attn_backend",
    "KVWriteLoc": "sglang.srt.mem_cache.memory_pool",
    "LogitsProcessorOutput": "sglang.srt.layers.logits_processor",
    "ModelConfig": "sglang.srt.configs.model_config",
    "ModelRunner": "sglang.srt.model_executor.model_runner",
    "ParallelState": "sglang.srt.distributed.parallel_state_wrapper",
    "RadixAttention": "sglang.srt.layers.radix_attention",
    "SamplingBatchInfo": "sglang.srt.sampling.sampling_batch_info",
    "Sampler": "sglang.srt.layers.sampler",
    "SpecInput": "sglang.srt.speculative.spec_info",
    "SpecInputType": "sglang.srt.speculative.spec_info",
    "SpeculativeAlgorithm": "sglang.srt.speculative.spec_info",
    "ServerArgs": "sglang.srt.server_args",
    "TorchNativeAttnBackend": "sglang.srt.layers.attention.torch_native_backend",
}
"""Classes of SGLang by module: `compat.ModelRunner` is imported when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _INTERNALS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_version_once()
    return getattr(importlib.import_module(_INTERNALS[name]), name)


@cache
def _check_version_once() -> None:
    """Check the version where names are looked up, as each step does: a millisecond of reading."""
    check_version()


def serves_on_cpu() -> bool:
    """Return True if SGLang was told to serve on the CPU."""
    return os.environ.get(CPU_ENGINE_VAR) == "1"


def http_app() -> Any | None:
    """Return SGLang's application of HTTP routes, None in a process that serves no HTTP."""
    # Importing the module takes seconds, and a process that serves HTTP has done so.
    return getattr(sys.modules.get("sglang.srt.entrypoints.http_server"), "app", None)


def register_backend(name: str, create: Callable[[Any], Any]) -> None:
    """Make `name` an attention backend that the command line accepts and `create` builds."""
    arguments = importlib.import_module("sglang.srt.server_args")
    if name not in arguments.ATTENTION_BACKEND_CHOICES:
        arguments.add_attention_backend_choices([name])
    registry = importlib.import_module("sglang.srt.layers.attention.attention_registry")
    registry.register_attention_backend(name)(create)


def register_sampler(name: str, create: Callable[[], Any]) -> None:
    """Make `name` a sampling backend that the command line accepts and `create` builds."""
    importlib.import_module("sglang.srt.layers.sampler").register_sampler_backend(name, create)


def server_arguments() -> Any:
    """Return the arguments of the server that this process belongs to."""
    return importlib.import_module("sglang.srt.runtime_context").get_server_args()


def loads_backend(name: str) -> bool:
    """Load all plugins as SGLang does; return True if `name` is an attention backend then."""
    if not importlib.import_module("torch").cuda.is_available():
        os.environ.setdefault(CPU_ENGINE_VAR, "1")
    importlib.import_module("sglang.srt.plugins").load_plugins()
    return bool(name in importlib.import_module("sglang.srt.server_args").ATTENTION_BACKEND_CHOICES)


def missing_backend(name: str) -> str | None:
    """Return why one of SGLang's own attention backends cannot run on this GPU, None if it can."""
    if name != "fa3":
        return None
    try:
        supported: bool = importlib.import_module("sgl_kernel.flash_attn").is_fa3_supported()
    except ImportError as error:
        return f"its binary does not load ({error})"
    return None if supported else "this GPU is too old or too new for it"


def load_model_config(options: Any) -> Any | None:
    """Load the Hugging Face text configuration of the model that `options` name.

    None if the configuration cannot be read: SGLang then says what is wrong with the model.
    """
    reader = importlib.import_module("sglang.srt.utils.hf_transformers")
    try:
        overrides = json.loads(options.json_model_override_args or "{}")
        config = reader.get_config(
            options.model_path,
            trust_remote_code=options.trust_remote_code,
            revision=options.revision,
            model_override_args=overrides,
        )
    except (OSError, ValueError, RuntimeError) as error:
        _log.debug("no configuration for %s: %s", options.model_path, error)
        return None
    return reader.get_hf_text_config(config)


def context_length(options: Any, model_config: Any) -> int:
    """Return the tokens of the longest request, prompt and answer, as SGLang derives them.

    Args:
        model_config: from `load_model_config`.
    """
    if options.context_length is not None:
        return int(options.context_length)
    reader = importlib.import_module("sglang.srt.utils.hf_transformers")
    return int(reader.get_context_length(model_config))


def extra_context(server_args: Any) -> int:
    """Return the tokens by which a row of `req_to_token` is longer than the model's context."""
    sizing = importlib.import_module("sglang.srt.mem_cache.allocation_sizing")
    return int(sizing.get_req_to_token_extra_context_len(server_args))


@contextmanager
def without_decode_graphs(runner: Any) -> Iterator[None]:
    """Let a model runner's decode steps run eagerly, until the block ends."""
    graphs, runner.decode_cuda_graph_runner = runner.decode_cuda_graph_runner, None
    try:
        yield
    finally:
        runner.decode_cuda_graph_runner = graphs


def load_runner(runner_class: type, server_args: Any, port: int, rank: int = 0) -> Any:
    """Load a model runner in this process, on the GPU of its rank, as SGLang's scheduler does.

    The runner has weights; its memory pools, attention backends and CUDA graphs are not made yet.

    Args:
        port: a free one, for torch's process group of all ranks.
        rank: of `server_args.tp_size` ranks of tensor parallelism, which all call this together.
    """
    # The set-up of a process before SGLang loads a model there.
    importlib.import_module("sglang.srt.entrypoints.engine")._set_envs_and_config(server_args)
    importlib.import_module("sglang.srt.layers.moe").initialize_moe_config(server_args)
    quantization = "sglang.srt.layers.quantization"
    importlib.import_module(f"{quantization}.fp8_utils").initialize_fp8_gemm_config(server_args)
    importlib.import_module(f"{quantization}.fp4_utils").initialize_fp4_gemm_config(server_args)
    state = {"tp_rank": rank, "attn_tp_rank": rank, "gpu_id": rank, "dp_rank": None}
    state |= dict.fromkeys(("tp_size", "attn_tp_size"), server_args.tp_size)
    return runner_class(
        model_config=__getattr__("ModelConfig").from_server_args(server_args),
        mem_fraction_static=server_args.mem_fraction_static,
        gpu_id=rank,
        ps=__getattr__("ParallelState").trivial(**state, moe_dp_rank=None),
        nccl_port=port,
        server_args=server_args,
    )


_LOADERS = re.compile(
    r"sglang\.srt\.(?:models(?!\.registry)|model_loader|model_executor|layers|configs)\b"
)
"""Loggers of the modules that read a checkpoint; the registry names each model of SGLang's that
cannot be imported here."""


def tells_of_model(logger: str) -> bool:
    """Return True if warnings of one of SGLang's loggers are about the model that is loaded."""
    return bool(_LOADERS.match(logger))


def with_model_runner(replacement: type, build: Callable[[], None]) -> None:
    """Run `build`, which looks `ModelRunner` up in its module, with `replacement` in its place."""
    module: Any = importlib.import_module(_INTERNALS["ModelRunner"])
    original = module.ModelRunner
    module.ModelRunner = replacement
    try:
        build()
    finally:
        module.ModelRunner = original


@dataclass(frozen=True)
class Ranks:
    """The ranks of tensor parallelism that share the query heads, as one of them sees them."""

    rank: int
    size: int

    @classmethod
    def of_runner(cls, runner: Any) -> "Ranks":
        """Return the ranks of a model runner."""
        return cls(runner.ps.attn_tp_rank, runner.ps.attn_tp_size)

    def gather_into(self, part: "Tensor", out: "Tensor") -> None:
        """Write the parts of all ranks to `out`, in rank order; all ranks call this together.

        A graph captures it, if it is captured as SGLang captures its own.

        Args:
            part: contiguous, of the same shape on all ranks.
            out: contiguous, of ranks times as many elements.
        """
        group, part, out = self._group, part.view(-1), out.view(-1)
        if part.is_cpu:
            distributed = importlib.import_module("torch.distributed")
            distributed.all_gather_into_tensor(out, part, group=group.device_group)
        else:
            group.all_gather_into_tensor(out, part)

    def least(self, number: int) -> int:
        """Return the least of the numbers of all ranks, which call this together."""
        return min(self._group.all_gather_object(number)) if self.size > 1 else number

    @property
    def _group(self) -> Any:
        return importlib.import_module("sglang.srt.runtime_context").get_parallel().attn_tp_group


def gather_states(scheduler: Any, state: Any) -> list[Any]:
    """Return a state of all ranks of tensor parallelism, in rank order.

    All ranks call this together: SGLang hands a request for a server's state to each of them.
    """
    states: list[Any] = [None] * scheduler.ps.attn_tp_size
    distributed = importlib.import_module("torch.distributed")
    distributed.all_gather_object(states, state, group=scheduler.attn_tp_cpu_group)
    return states


def attention_layers(model: Any) -> Iterator[Any]:
    """Yield the decoder attention layers of a loaded model."""
    radix_attention = __getattr__("RadixAttention")
    return (module for module in model.modules() if isinstance(module, radix_attention))


def unquantized_linears(model: Any) -> Iterator[Any]:
    """Yield the linear layers of a loaded model whose weights are not quantized."""
    method = resolve(_LINEAR_METHOD)
    return (each for each in model.modules() if type(getattr(each, "quant_method", 0)) is method)


def rotary_attention_layers(model: Any) -> Iterator[Any]:
    """Yield the attention layers of a loaded model, projections included, whose code was read."""
    kinds = [resolve(each) for each in _ATTENTIONS]
    return (module for module in model.modules() if type(module) in kinds)


def decode_backend(backend: Any) -> Any:
    """Return the part of a live attention backend that serves decode steps."""
    if isinstance(backend, __getattr__("HybridAttnBackend")):
        return backend.decode_backend
    return backend


@contextmanager
def decode_on_tensor_cores(*, wanted: bool) -> Iterator[None]:
    """Let a FlashInfer backend made in this block decode on tensor cores for any group of heads.

    With a 16-bit cache SGLang itself does so from four query heads a KV head on. If the user has
    set `SGLANG_FLASHINFER_USE_TENSOR_CORE`, nothing changes.
    """
    if not wanted or TENSOR_CORE_VAR in os.environ:
        yield
        return
    os.environ[TENSOR_CORE_VAR] = "true"
    try:
        yield
    finally:
        del os.environ[TENSOR_CORE_VAR]


def hook_before(target: Target, function: Callable[..., Any]) -> None:
    """Call `function` with the target's arguments before the target runs."""
    _register(target, function, "BEFORE")


def hook_after(target: Target, function: Callable[..., Any]) -> None:
    """Call `function(result, *arguments)` after the target ran."""
    _register(target, function, "AFTER")


def hook_around(target: Target, function: Callable[..., Any]) -> None:
    """Call `function(original, *arguments)` in the target's place."""
    _register(target, function, "AROUND")


def _register(target: Target, function: Callable[..., Any], kind: str) -> None:
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    registry.HookRegistry.register(target.value, function, registry.HookType[kind])
