"""Raw q·k of every query head with every token of each long row, in two ways.

`score_tokens` reads keys from the paged KV cache (Triton). `ScoreStoringAttention` is FlashInfer's
dense decode with a variant that stores its scores: a SELECT layer computes q·k of every head and
token anyway, and storing it costs less than reading the keys a second time. Its attention is that
of FlashInfer's own kernel, bit for bit; nvcc compiles it once. Defined by
`reference.score_tokens`.
"""

import hashlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    NUM_STAGES,
    SCORE_BLOCK,
    SCORE_SPLITS,
    check_int32,
    check_tensors,
    interpreted,
    padded_group,
)


@triton.jit(do_not_specialize=["budget"])
def _score(
    query,  # [B, H, D]
    keys,  # [P, G, D]
    indptr,  # [B + 1] int32
    slots,  # [indptr[B]] int32
    scores,  # [B, H, >= S] f32
    budget,
    query_row_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    score_row_stride,
    score_head_stride,
    GROUP: tl.constexpr,  # query heads a KV head
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
            scores + row * score_row_stride + heads[:, None] * score_head_stride + positions,
            product,
            mask=(members[:, None] < GROUP) & inside[None, :],
        )


def score_tokens(
    query: Tensor, keys: Tensor, indptr: Tensor, slots: Tensor, budget: int, out: Tensor
) -> Tensor:
    """Score every token of each row that is longer than the budget; other rows stay untouched.

    Args:
        query: [B, H, D] fp16, bf16 or f32.
        keys: [P, G, D], one layer of the KV cache, in the query's dtype or fp8.
        indptr: [B + 1] int32, where each row's slots begin.
        slots: [indptr[B]] int32, the slot of each token, oldest first.
        budget: tokens that a row may keep.
        out: [B, H, N] f32 with N at least the longest row; columns past a row's length are not
            written.

    Returns:
        `out`.
    """
    check_tensors(query=query, keys=keys, indptr=indptr, slots=slots, out=out)
    check_int32(indptr=indptr, slots=slots)
    rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    if num_heads % num_kv_heads or keys.shape[2] != dim or dim & (dim - 1):
        raise ValueError(
            f"query heads must be a multiple of KV heads and dims one power of two, not "
            f"{tuple(query.shape)} and {tuple(keys.shape)}"
        )
    _score[(rows, SCORE_SPLITS, num_kv_heads)](
        query,
        keys,
        indptr,
        slots,
        out,
        budget,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        out.stride(0),
        out.stride(1),
        GROUP=num_heads // num_kv_heads,
        PADDED_GROUP=padded_group(num_heads, num_kv_heads),
        DIM=dim,
        BLOCK=SCORE_BLOCK,
        SPLITS=SCORE_SPLITS,
        # The interpreter computes bf16 products wrongly (Triton 3.6).
        UPCAST=interpreted() and query.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=NUM_STAGES,
    )
    return out


NAME = "LimScoringAttention"
VARIANT = f"""
struct {NAME} : AttentionVariantBase {{
  static constexpr bool use_softmax = true;

  uint32_t qo_len, kv_len, window_left, chunk_end;
  float sm_scale_log2;
  float* row_scores;
  // A thread's part of a tile of 16 x 16: in two rows, two columns and the two eight on. Members in
  // another order, or a name for num_seen % 8 below, and nvcc puts some of it on the stack.
  uint32_t num_seen;
  bool even, is_stored[2];
  int64_t head_scores[2];
  float tile[8];
  uint32_t column;

  template <typename Params>
  __device__ __host__ {NAME}(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {{
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    sm_scale_log2 = params.sm_scale * math::log2e;
    const bool scored = batch_idx < params.num_scored_rows && kv_len > params.budget;
    row_scores = scored ? params.scores + batch_idx * params.score_row_stride : nullptr;
    chunk_end = kv_len;
    even = true;
    num_seen = 0;
#ifdef __CUDA_ARCH__
    // The last tile of a chunk also computes positions past its end. Another block has those.
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

  // Called for a thread's numbers of a tile in turn: num_seen is known when this is compiled.
  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {{
    tile[num_seen % 8] = logits;
    if (num_seen % 8 == 0) column = kv_idx;
    if (num_seen % 8 == 0 || num_seen % 8 == 2) {{
      // A tile has more query rows than a request has heads.
      is_stored[num_seen % 8 / 2] = row_scores != nullptr && qo_idx < qo_len;
      head_scores[num_seen % 8 / 2] = qo_head_idx * params.score_head_stride;
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
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 128 << 20
"""Of a decode that splits long rows, by FlashInfer's advice."""
GRAPH_WORKSPACE_BYTES = 512 << 20
"""Of one that a CUDA graph captures, which always splits and pads: SGLang's choice for Qwen3."""


class ScoreStoringAttention:
    """One compiled kernel: a head dimension and a dtype of queries and cache."""

    def __init__(self, dtype: torch.dtype, head_dim: int) -> None:
        """Load the kernel; compile it where that was not done before (26 s on 16 cores)."""
        from flashinfer.jit import gen_customize_batch_prefill_module
        from flashinfer.utils import device_support_pdl

        source = hashlib.sha256(VARIANT.encode()).hexdigest()[:8]  # the cache goes by the name
        name = f"lim_scoring_{str(dtype).removeprefix('torch.')}_{head_dim}_{source}"
        tensors, scalars = (
            {"scores": "float"},
            dict.fromkeys(
                ("num_scored_rows", "budget", "score_row_stride", "score_head_stride"), "int64_t"
            ),
        )
        spec = gen_customize_batch_prefill_module(
            "fa2",
            name,
            *(dtype, dtype, dtype, torch.int32),
            *(head_dim, head_dim),
            list(tensors),
            list(tensors.values()),
            ["sm_scale", *scalars],
            ["double", *scalars.values()],
            NAME,
            VARIANT,
        )
        self._paged_run = spec.build_and_load().paged_run
        self._launches_early = device_support_pdl(torch.device("cuda"))

    def run(
        self,
        planned: Any,
        query: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        sm_scale: float,
        scores: Tensor,
        budget: int,
        lse: Tensor | None = None,
    ) -> Tensor:
        """Attend as a planned decode does, and store the scores of rows over the budget.

        Args:
            planned: FlashInfer's decode wrapper, planned for tensor cores at page size 1.
            query: [B, H, D].
            kv_cache: K and V, [P, G, D] each.
            sm_scale: factor on q·k before the softmax.
            scores: [R, H, N] f32; written for the first R rows, N at least the longest of them;
                rows and heads begin at multiples of 8 bytes.
            budget: rows within it leave no scores.
            lse: [>= B, H] f32; log2 of each head's normaliser is written for all rows.

        Returns:
            [B, H, D].
        """
        check_tensors(query=query, keys=kv_cache[0], values=kv_cache[1], scores=scores)
        if scores.dtype != torch.float32:
            raise ValueError(f"scores must be float32, not {scores.dtype}")
        if scores.stride(0) % 2 or scores.stride(1) % 2 or scores.data_ptr() % 8:
            raise ValueError(
                "scores are stored in pairs, so all rows and heads must begin at multiples of 8 "
                f"bytes, not at address {scores.data_ptr()} with strides of {scores.stride()}"
            )
        keys, values = (cache.unsqueeze(1) for cache in kv_cache)  # pages of one token
        output = torch.empty_like(query)
        self._paged_run(
            planned._float_workspace_buffer,
            planned._int_workspace_buffer,
            planned._plan_info,
            query,
            keys,
            values,
            planned._qo_indptr_buf,
            planned._paged_kv_indptr_buf,
            planned._paged_kv_indices_buf,
            planned._paged_kv_last_page_len_buf,
            output,
            None if lse is None else lse[: query.shape[0]],
            0,  # no mask
            0,  # NHD
            -1,  # no window
            self._launches_early,
            scores,
            sm_scale,
            scores.shape[0],
            budget,
            scores.stride(0),
            scores.stride(1),
        )
        return output


def planned_decode(
    indptr: Tensor,
    slots: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    tensor_cores: bool = True,
    in_graph: bool = False,
) -> Any:
    """FlashInfer's own decode over these slots, planned once: what checks compare with.

    Args:
        indptr: [B + 1] int32, where each row's slots begin.
        slots: [indptr[B]] int32.
        heads, kv_heads, head_dim, dtype: H, G and D, and the dtype of queries and cache.
        tensor_cores: or CUDA cores.
        in_graph: plan as for a CUDA graph, as SGLang does; `indptr` and `slots` are its buffers.
    """
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper

    last_page_len = torch.ones_like(indptr[1:])
    num_bytes = GRAPH_WORKSPACE_BYTES if in_graph else WORKSPACE_BYTES
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(num_bytes, dtype=torch.uint8, device=indptr.device),
        "NHD",
        use_cuda_graph=in_graph,
        use_tensor_cores=tensor_cores,
        paged_kv_indptr_buffer=indptr if in_graph else None,
        paged_kv_indices_buffer=slots if in_graph else None,
        paged_kv_last_page_len_buffer=last_page_len if in_graph else None,
        backend="fa2",
    )
    shape = (heads, kv_heads, head_dim, 1)
    wrapper.plan(indptr, slots, last_page_len, *shape, q_data_type=dtype, kv_data_type=dtype)
    return wrapper
