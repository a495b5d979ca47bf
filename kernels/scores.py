"""Raw q·k of every query head with every token of each row over the budget, computed in two ways.

`score_tokens` reads keys from the paged KV cache (Triton). `ScoreStoringAttention` is FlashInfer's
dense decode with a variant that stores its scores: a SELECT layer computes q·k of every head and
token anyway, and storing scores costs less than reading the keys a second time. The attention has
the same bits as FlashInfer's own kernel; nvcc compiles the variant once. Defined by
`reference.score_tokens`.
"""

import hashlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    SCORE_BLOCK,
    SCORE_SPLITS,
    SCORE_STAGES,
    check_int32,
    check_tensors,
    interpreted,
    padded_group,
)
from lim_sglang.kernels.packed import ALIGNMENT, PackedRows, packed_row


@triton.jit(do_not_specialize=["budget", "num_heads"])
def _score_tokens(
    query,  # [B, H, D]
    keys,  # [P, G, D]
    indptr,  # [B + 1] int32
    slots,  # [indptr[B]] int32
    scores,  # [B, H, S] f32, packed
    budget,
    num_heads,
    query_row_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    GROUP: tl.constexpr,  # query heads per KV head
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    start = tl.load(indptr + row).to(tl.int64)
    length = tl.load(indptr + row + 1).to(tl.int64) - start
    if length <= budget:
        return

    dims = tl.arange(0, DIM)
    members = tl.arange(0, PADDED_GROUP)
    heads = kv_head * GROUP + members
    # [PADDED_GROUP, DIM]
    q = tl.load(
        query + row * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
        mask=members[:, None] < GROUP,
        other=0.0,
    )
    before, pitch = packed_row(indptr, row, 1)
    scores += before * num_heads
    for first in range(split * BLOCK, length, SPLITS * BLOCK):
        positions = first + tl.arange(0, BLOCK)
        inside = positions < length
        slot = tl.load(slots + start + positions, mask=inside, other=0).to(tl.int64)
        # [BLOCK, DIM]
        k = tl.load(
            keys + slot[:, None] * key_slot_stride + kv_head * key_head_stride + dims[None, :],
            mask=inside[:, None],
            other=0.0,
        ).to(q.dtype)
        if UPCAST:
            product = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
        tl.store(
            scores + heads[:, None] * pitch + positions,
            product,
            mask=(members[:, None] < GROUP) & inside[None, :],
        )


def score_tokens(
    query: Tensor, keys: Tensor, indptr: Tensor, slots: Tensor, budget: int, out: PackedRows
) -> PackedRows:
    """Score every token of each row that is longer than the budget.

    Args:
        query: [B, H, D] fp16, bf16 or f32.
        keys: [P, G, D], one layer of the KV cache, in the query's dtype or fp8.
        indptr: [B + 1] int32, where each row's slots begin.
        slots: [indptr[B]] int32, the slot of each token, oldest first.
        budget: rows within it stay untouched.
        out: of B rows and H heads; columns past a row's end stay untouched.

    Returns:
        `out`.
    """
    check_tensors(query=query, keys=keys, indptr=indptr, slots=slots, out=out.values)
    check_int32(indptr=indptr, slots=slots)
    rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    if num_heads % num_kv_heads or keys.shape[2] != dim or dim & (dim - 1):
        raise ValueError(
            "query heads must be a multiple of KV heads, and the head dimension of both the same "
            f"power of two, not query {tuple(query.shape)} and keys {tuple(keys.shape)}"
        )
    _score_tokens[(rows, SCORE_SPLITS, num_kv_heads)](
        query,
        keys,
        indptr,
        slots,
        out.values,
        budget,
        num_heads,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        GROUP=num_heads // num_kv_heads,
        PADDED_GROUP=padded_group(num_heads, num_kv_heads),
        DIM=dim,
        BLOCK=SCORE_BLOCK,
        SPLITS=SCORE_SPLITS,
        # The interpreter computes bf16 products wrongly (Triton 3.6).
        UPCAST=interpreted() and query.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=SCORE_STAGES,
    )
    return out


QUERY_DTYPES = (torch.float16, torch.bfloat16)
"""Dtypes of queries for which a dense pass stores scores; the cache has the same, or an fp8 one."""
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
VARIANT_NAME = "LimScoringAttention"
VARIANT_SOURCE = f"""
struct {VARIANT_NAME} : AttentionVariantBase {{
  static constexpr bool use_softmax = true;

  uint32_t qo_len, kv_len, window_left, chunk_end;
  float sm_scale_log2;
  float* row_scores;
  int64_t pitch;
  // A thread has 8 scores of a tile of 16 x 16: in each of two rows, two adjacent columns and the
  // two that are eight further on. With members in another order, or a name for num_seen % 8 below,
  // nvcc puts some of them on the stack.
  uint32_t num_seen;
  bool even, is_stored[2];
  int64_t head_scores[2];
  float tile[8];
  uint32_t column;

  template <typename Params>
  __device__ __host__ {VARIANT_NAME}(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {{
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    sm_scale_log2 = params.sm_scale * math::log2e;
    const bool scored = batch_idx < params.num_scored_rows && kv_len > params.budget;
    // `packed.packed_row`: where the row begins, and how far apart its heads are.
    constexpr uint32_t alignment = {ALIGNMENT};
    pitch = (kv_len + alignment - 1) / alignment * alignment;
    row_scores = nullptr;
    if (scored) {{
      const int64_t before = params.score_ends[batch_idx] / alignment + batch_idx;
      row_scores = params.scores + before * alignment * params.score_heads;
    }}
    chunk_end = kv_len;
    even = true;
    num_seen = 0;
#ifdef __CUDA_ARCH__
    // The last tile of a chunk also computes positions past the chunk's end: another block's.
    if (params.partition_kv) {{
      const uint32_t chunk = *params.kv_chunk_size_ptr;
      even = params.kv_tile_indices[blockIdx.x] * chunk % 2 == 0;
      chunk_end = min((params.kv_tile_indices[blockIdx.x] + 1) * chunk, kv_len);
    }}
#endif
  }}

  __device__ __forceinline__ void store(const int row) {{
    if (!is_stored[row]) return;
    float* to = row_scores + (head_scores[row] + column);
    const float a = tile[2 * row], b = tile[2 * row + 1];
    const float c = tile[2 * row + 4], d = tile[2 * row + 5];
    if (even && column + 9 < chunk_end) {{
      *reinterpret_cast<float2*>(to) = make_float2(a, b);
      *reinterpret_cast<float2*>(to + 8) = make_float2(c, d);
    }} else {{
      if (column < chunk_end) to[0] = a;
      if (column + 1 < chunk_end) to[1] = b;
      if (column + 8 < chunk_end) to[8] = c;
      if (column + 9 < chunk_end) to[9] = d;
    }}
  }}

  // Called for a thread's 8 scores of a tile in turn: unrolled, so num_seen % 8 is a constant.
  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {{
    tile[num_seen % 8] = logits;
    if (num_seen % 8 == 0) column = kv_idx;
    if (num_seen % 8 == 0 || num_seen % 8 == 2) {{
      // A tile may have more query rows than a KV head has query heads.
      is_stored[num_seen % 8 / 2] = row_scores != nullptr && qo_idx < qo_len;
      head_scores[num_seen % 8 / 2] = qo_head_idx * pitch;
    }}
    if (num_seen % 8 == 7) {{
      store(0);
      store(1);
    }}
    ++num_seen;
    return logits;
  }})
}};
"""
WORKSPACE_BYTES = 128 << 20
"""FlashInfer's workspace for a decode that splits long rows, by FlashInfer's advice."""
GRAPH_WORKSPACE_BYTES = 512 << 20
"""The same for a decode in a CUDA graph, which always splits and pads: SGLang's value for Qwen3."""


class ScoreStoringAttention:
    """FlashInfer's dense decode with stored scores, compiled for a head dimension and dtypes."""

    def __init__(self, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
        """Load the kernel, compiled on first use (26 s on 16 cores).

        Args:
            dtype: of queries, one of `QUERY_DTYPES`.
            cache_dtype: of K and V: that of queries, or one of `FP8_DTYPES`.
            head_dim: D.
        """
        from flashinfer.jit import gen_customize_batch_prefill_module
        from flashinfer.utils import device_support_pdl

        # FlashInfer caches compiled modules by name.
        digest = hashlib.sha256(VARIANT_SOURCE.encode()).hexdigest()[:8]
        dtypes = "_".join(str(each).removeprefix("torch.") for each in {dtype: 0, cache_dtype: 0})
        numbers = ("num_scored_rows", "budget", "score_heads")
        spec = gen_customize_batch_prefill_module(
            "fa2",
            f"lim_scoring_{dtypes}_{head_dim}_{digest}",
            dtype_q=dtype,
            dtype_kv=cache_dtype,
            dtype_o=dtype,
            idtype=torch.int32,
            head_dim_qk=head_dim,
            head_dim_vo=head_dim,
            additional_tensor_names=["scores", "score_ends"],
            additional_tensor_dtypes=["float", "int32_t"],
            additional_scalar_names=["sm_scale", *numbers],
            additional_scalar_dtypes=["double", *["int64_t" for _ in numbers]],
            variant_name=VARIANT_NAME,
            variant_decl=VARIANT_SOURCE,
        )
        self._paged_run = spec.build_and_load().paged_run
        self._launches_early = device_support_pdl(torch.device("cuda"))

    def run(
        self,
        wrapper: Any,
        query: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        sm_scale: float,
        scores: PackedRows,
        budget: int,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Attend as a planned decode does, and store the scores of rows over the budget.

        Args:
            wrapper: FlashInfer's decode wrapper, planned for tensor cores at page size 1.
            query: [B, H, D].
            kv_cache: K and V, [P, G, D] each.
            sm_scale: factor on q·k before the softmax.
            scores: of H heads; written for its first `max_rows` rows.
            budget: rows within it leave no scores.
            lse: [>= B, H] f32; each head's log-sum-exp to base 2 is written for all rows.

        Returns:
            [B, H, D].
        """
        values = scores.values
        check_tensors(query=query, keys=kv_cache[0], values=kv_cache[1], scores=values)
        if values.dtype != torch.float32 or values.data_ptr() % 8:
            raise ValueError(
                "scores are stored in pairs, so they must be float32 at a multiple of 8 bytes, not "
                f"{values.dtype} at address {values.data_ptr()}"
            )
        pages = [cache.unsqueeze(1) for cache in kv_cache]  # of one token
        output = torch.empty_like(query)
        self._paged_run(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._plan_info,
            query,
            *pages,
            wrapper._qo_indptr_buf,
            wrapper._paged_kv_indptr_buf,
            wrapper._paged_kv_indices_buf,
            wrapper._paged_kv_last_page_len_buf,
            output,
            None if lse is None else lse[: query.shape[0]],
            0,  # no mask
            0,  # NHD
            -1,  # no window
            self._launches_early,
            values,
            wrapper._paged_kv_indptr_buf,
            sm_scale,
            scores.max_rows,
            budget,
            scores.lists,
        )
        return output


def plan_flashinfer_decode(
    indptr: Tensor,
    slots: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    tensor_cores: bool = True,
    in_graph: bool = False,
    workspace: Tensor | None = None,
) -> Any:
    """Plan FlashInfer's own decode over these slots, for comparisons; return its wrapper.

    Args:
        indptr: [B + 1] int32, where each row's slots begin.
        slots: [indptr[B]] int32.
        heads, kv_heads, head_dim: H, G and D.
        dtype: of queries.
        cache_dtype: of K and V; None for `dtype`.
        tensor_cores: decode on tensor cores; else on CUDA cores.
        in_graph: plan as SGLang does for a CUDA graph; `indptr` and `slots` are its buffers.
        workspace: FlashInfer's, [bytes] uint8; None for one of its own.
    """
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper

    last_page_len = torch.ones_like(indptr[1:])
    num_bytes = GRAPH_WORKSPACE_BYTES if in_graph else WORKSPACE_BYTES
    if workspace is None:
        workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=indptr.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=in_graph,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr if in_graph else None,
        paged_kv_indices_buffer=slots if in_graph else None,
        paged_kv_last_page_len_buffer=last_page_len if in_graph else None,
        backend="fa2",
    )
    wrapper.plan(
        indptr,
        slots,
        last_page_len,
        heads,
        kv_heads,
        head_dim,
        1,  # token per page
        q_data_type=dtype,
        kv_data_type=cache_dtype or dtype,
    )
    return wrapper


def plan_flashinfer_runs(
    indptr: Tensor,
    slots: Tensor,
    *,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> Any:
    """Plan FlashInfer's causal prefill of the last tokens of each request, for comparisons; return
    its wrapper.

    Args:
        indptr: [B + 1] int32, where each request's slots begin.
        slots: [indptr[B]] int32.
        width: query rows of a request.
        heads, kv_heads, head_dim: H, G and D.
        dtype: of queries and cache.
    """
    from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

    workspace = torch.zeros(GRAPH_WORKSPACE_BYTES, dtype=torch.uint8, device=slots.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    wrapper.plan(
        torch.arange(len(indptr), dtype=torch.int32, device=slots.device) * width,
        indptr,
        slots,
        torch.ones_like(indptr[1:]),
        heads,
        kv_heads,
        head_dim,
        1,  # token per page
        causal=True,
        q_data_type=dtype,
        kv_data_type=dtype,
    )
    return wrapper
