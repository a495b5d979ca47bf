"""SGLang's internals by which a cycle's passes run the model themselves.

Names of SGLang are imported when they are used, as in `compat.py`.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lim_sglang import compat


def register_drafting(name: str, algorithm: type, create: Callable[[Any], type]) -> None:
    """Make `name` a speculative algorithm of SGLang.

    Args:
        algorithm: a subclass of `CustomSpecAlgo`.
        create: returns the class of the worker for the server's arguments.
    """
    speculation = compat.SpeculativeAlgorithm
    speculation.register(name, supports_overlap=True, spec_class=algorithm)(create)


def run_logprobs(batch: Any, logits_output: Any, picks: Tensor) -> None:
    """Compute the logprobs of verified tokens for SGLang's processing of a result.

    Args:
        logits_output: of B · w rows; gets the logprobs.
        picks: [B, w] int, the tokens after each row.
    """
    processor = importlib.import_module("sglang.srt.layers.logprob_processor")
    rows = torch.arange(picks.numel(), device=picks.device).view_as(picks)
    processor.compute_spec_v2_logprobs(
        batch, logits_output, picks.flatten(), rows, picks.shape[1] - 1
    )


def gather_slots(
    req_to_token: Tensor, requests: Tensor, lengths: Tensor, indptr: Tensor, out: Tensor
) -> None:
    """Write the cache slots of all tokens of some requests, one after the other.

    Args:
        req_to_token: [rows, S] int32, SGLang's table.
        requests: [B] int64, rows of it.
        lengths: [B] int64, tokens of each.
        indptr: [B + 1] int32, where each begins in `out`.
        out: [indptr[B]] int32.
    """
    ops = importlib.import_module("sglang.kernels.ops.kvcache.kv_indices")
    ops.create_flashinfer_kv_indices_triton[(len(requests),)](
        req_to_token, requests, lengths, indptr, None, out, req_to_token.stride(0)
    )


def decode_batch(
    runner: Any,
    *,
    tokens: Tensor,
    requests: Tensor,
    positions: Tensor,
    lengths: Tensor,
    host_lengths: Tensor,
    slots: Tensor,
    logits: Tensor | None,
    with_hidden_states: bool,
) -> Any:
    """Return SGLang's batch of a decode step that we run ourselves, of R rows.

    Args:
        tokens, requests, positions, lengths, slots: [R] int64, of each row.
        host_lengths: lengths on the host, for attention that is planned.
        logits: [R, V] f32, where the logits are written; None for memory of their own.
    """
    hidden = compat.CaptureHiddenMode
    return compat.ForwardBatch(
        forward_mode=compat.ForwardMode.DECODE,
        batch_size=len(tokens),
        input_ids=tokens,
        req_pool_indices=requests,
        seq_lens=lengths,
        orig_seq_lens=lengths,
        seq_lens_cpu=host_lengths,
        seq_lens_sum=int(host_lengths.sum()),
        out_cache_loc=slots,
        positions=positions,
        spec_algorithm=runner.spec_algorithm,
        capture_hidden_mode=hidden.FULL if with_hidden_states else hidden.NULL,
        next_token_logits_buffer=logits,
    )


def call_model(runner: Any, batch: Any, backend: Any) -> Any:
    """Run a model's layers over a batch, with an attention backend that has planned it."""
    context = importlib.import_module("sglang.srt.model_executor.forward_context")
    with context.forward_context(context.ForwardContext(attn_backend=backend)):
        return runner.model.forward(batch.input_ids, batch.positions, batch)


def graph_batch_sizes(runner: Any) -> list[int]:
    """Return the batch sizes at which SGLang captures decode steps; none if it captures none."""
    config = runner.server_args.cuda_graph_config.decode
    if config.backend == "disabled":
        return []
    module = importlib.import_module("sglang.srt.model_executor.runner.base_cuda_graph_runner")
    sizes, _ = module.get_batch_sizes_to_capture(runner, 1)
    return list(sizes)


@contextmanager
def graph_capture() -> Iterator[None]:
    """Capture CUDA graphs in this block as SGLang does, without the collector of garbage."""
    utils = "sglang.srt.model_executor.runner_utils"
    runner = importlib.import_module("sglang.srt.model_executor.runner.base_cuda_graph_runner")
    mode = importlib.import_module(f"{utils}.capture_mode")
    with mode.model_capture_mode(), runner.freeze_gc(False):
        yield


@cache
def _capture_stream() -> torch.cuda.Stream:
    """Return the stream of all captures: cuBLAS keeps memory for each."""
    return torch.cuda.Stream()


def capture_graph(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a function's work on the GPU as a CUDA graph, in the memory that all graphs share.

    Returns:
        the graph, and the function's result, whose tensors each replay writes.
    """
    pool = importlib.import_module("sglang.srt.model_executor.runner_utils.pool")
    memory = pool.get_or_create_global_graph_memory_pool(torch.cuda)
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled and loaded
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, stream=stream):
        result = function()
    return graph, result
