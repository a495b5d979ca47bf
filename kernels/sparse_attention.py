"""Attention of one decoded token over lists of slots, which sparse layers run.

Defined by `reference.attend_lists`, row by row. A *unit* is a row's query heads that one program
attends for: those of a KV head, or a single one where each query head has a list of its own.
Split-KV: where rows are few, several programs share a unit's tokens; the last of them to end
combines the splits, always in the same order, so one launch does all and equal inputs give equal
bits. Lengths are read on the device: nothing is planned.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    ATTEND_STAGES,
    ATTEND_WARPS,
    COMBINED_HEADS,
    LOG2_E,
    MAX_SPLITS,
    MIN_SPLIT_TOKENS,
    PROGRAM_BYTES_PER_SM,
    PROGRAMS_PER_SM,
    SPLIT_ALIGNMENT,
    attend_block,
    check_attention,
    check_int32,
    check_tensors,
    interpreted,
    is_last_block,
    padded_group,
)

INTERPRETED_SMS = 64
"""SMs to assume on a CPU, which has none: enough for a few rows to be split."""


@dataclass(frozen=True)
class SplitWorkspace:
    """Memory for the splits of rows that several programs share, allocated once.

    Shapes: W, the programs of all split rows together: those that run at a time.
    """

    outputs: Tensor
    """[W, padded group, D] f32, attention over each split."""
    lse: Tensor
    """[W, padded group] f32, log-sum-exp of each split and head, to base 2."""
    block_counters: Tensor
    """[W] int32, programs of a row and unit that have ended; 0 between two kernels."""
    num_sms: int
    """SMs of the GPU."""
    programs_in_rounds: int
    """Programs of all split rows together where more than one round combines the splits of one."""

    @classmethod
    def allocate(
        cls,
        *,
        num_heads: int,
        num_units: int,
        dim: int,
        cache_dtype: torch.dtype,
        device: torch.device | str,
    ) -> "SplitWorkspace":
        """Allocate for the SMs of this GPU.

        Args:
            num_heads: query heads.
            num_units: units of a row: KV heads, or query heads where each has its own list.
            dim: head dimension.
            cache_dtype: of K and V.
            device: of all tensors.
        """
        num_sms = INTERPRETED_SMS
        if torch.device(device).type == "cuda":
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        programs = num_sms * PROGRAMS_PER_SM
        group = padded_group(num_heads, num_units)
        return cls(
            torch.zeros(programs, group, dim, dtype=torch.float32, device=device),
            torch.zeros(programs, group, dtype=torch.float32, device=device),
            torch.zeros(programs, dtype=torch.int32, device=device),
            num_sms,
            programs_in_rounds=num_sms * max(1, PROGRAM_BYTES_PER_SM // cache_dtype.itemsize),
        )

    def num_splits(self, num_units: int, longest: int, splits_per_round: int) -> int:
        """Return the programs that share each row and KV head, so that all of them run at a time.

        Args:
            num_units: rows times KV heads.
            longest: tokens of the longest row that there can be.
            splits_per_round: splits that are combined at a time.
        """
        room = self.outputs.shape[0]
        in_one_round, in_rounds = (
            programs // max(1, num_units) for programs in (room, min(room, self.programs_in_rounds))
        )
        splits = max(min(in_one_round, splits_per_round), in_rounds)
        return max(1, min(splits, MAX_SPLITS, triton.cdiv(longest, MIN_SPLIT_TOKENS)))


@triton.jit
def _combine_splits(
    split_outputs,  # [num_splits, PADDED_GROUP, DIM] f32, of one row and KV head
    split_lse,  # [num_splits, PADDED_GROUP] f32
    num_splits,
    GROUP: tl.constexpr,  # query heads per KV head
    COMBINED_GROUP: tl.constexpr,  # the next power of two
    DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,  # heads that a split has room for
    MAX_SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,  # splits that are combined at a time
):
    """Return the splits' mean [COMBINED_GROUP, DIM], weighted by their normalisers."""
    dims = tl.arange(0, DIM)
    members = tl.arange(0, COMBINED_GROUP)
    # [MAX_SPLITS, COMBINED_GROUP]; read past L1, since other programs wrote the data
    all_splits = tl.arange(0, MAX_SPLITS)[:, None]
    inside = (all_splits < num_splits) & (members[None, :] < GROUP)
    of_all = split_lse + all_splits * PADDED_GROUP + members[None, :]
    lse = tl.load(of_all, mask=inside, other=float("-inf"), cache_modifier=".cg")
    largest = tl.max(lse, 0)
    largest = tl.where(largest > float("-inf"), largest, 0.0)
    total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
    combined = tl.zeros([COMBINED_GROUP, DIM], tl.float32)
    for first in range(0, num_splits, SPLIT_BLOCK):
        splits = first + tl.arange(0, SPLIT_BLOCK)[:, None]
        taken = (splits < num_splits) & (members[None, :] < GROUP)
        rows = splits * PADDED_GROUP + members[None, :]
        block_lse = tl.load(split_lse + rows, mask=taken, other=float("-inf"), cache_modifier=".cg")
        weights = tl.exp2(block_lse - largest[None, :])
        # [SPLIT_BLOCK, COMBINED_GROUP, DIM]
        outputs = tl.load(
            split_outputs + rows[:, :, None] * DIM + dims[None, None, :],
            mask=taken[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        combined += tl.sum(outputs * weights[:, :, None], 0)
    return combined / tl.where(total > 0, total, 1.0)[:, None]


_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)


@triton.jit
def _attend_split(
    q,  # [PADDED_GROUP, DIM]
    keys,  # [P, DIM], of one KV head
    values,  # [P, DIM]
    slots,  # [length] int32, of one row
    first,
    end,
    scale,
    soft_cap,
    key_slot_stride,
    value_slot_stride,
    DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return attention over the tokens from `first` to `end`, and its log-sum-exp to base 2."""
    dims = tl.arange(0, DIM)
    largest = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    output = tl.zeros([PADDED_GROUP, DIM], tl.float32)
    for begin in range(first, end, BLOCK):
        tokens = begin + tl.arange(0, BLOCK)
        inside = tokens < end
        slot = tl.load(slots + tokens, mask=inside, other=0).to(tl.int64)
        # [DIM, BLOCK] and [BLOCK, DIM]
        k = tl.load(
            keys + slot[None, :] * key_slot_stride + dims[:, None],
            mask=inside[None, :],
            other=0.0,
        ).to(q.dtype)
        v = tl.load(
            values + slot[:, None] * value_slot_stride + dims[None, :],
            mask=inside[:, None],
            other=0.0,
        ).to(q.dtype)
        if UPCAST:
            scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee")
        else:
            scores = tl.dot(q, k, input_precision="ieee")
        scores *= scale
        if CAPPED:  # soft_cap * tanh(scores / soft_cap)
            scores = soft_cap * (1 - 2 / (tl.exp(2 * scores / soft_cap) + 1))
        scores = tl.where(inside[None, :], scores * _LOG2_E, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrunk = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        if UPCAST:
            weights = weights.to(q.dtype).to(tl.float32)
            added = tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        else:
            added = tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        output = output * shrunk[:, None] + added
        largest = new_largest
    has_any = total > 0
    total = tl.where(has_any, total, 1.0)
    lse = tl.where(has_any, largest + tl.log2(total), float("-inf"))
    return output / total[:, None], lse


@triton.jit(do_not_specialize=["num_splits"])
def _attend_tokens(
    query,  # [B, H, DIM]
    keys,  # [P, G, DIM]
    values,  # [P, G, DIM]
    slots,  # [lists, n] int32
    starts,  # [B] int32
    ends,  # [B] int32
    split_outputs,  # [W, PADDED_GROUP, DIM] f32
    split_lse,  # [W, PADDED_GROUP] f32
    block_counters,  # [W] int32
    output,  # [B, H, DIM]
    num_splits,
    scale,
    soft_cap,
    value_scale,
    query_row_stride,
    query_head_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    output_row_stride,
    output_head_stride,
    list_stride,
    GROUP: tl.constexpr,  # query heads of a unit
    COMBINED_GROUP: tl.constexpr,  # the next power of two
    PADDED_GROUP: tl.constexpr,  # the same, at least the fewest rows of a tensor core
    UNITS_PER_KV_HEAD: tl.constexpr,
    IS_SHARED: tl.constexpr,  # all heads read one list, else each unit its own
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a tile
    SPLIT_ALIGNMENT: tl.constexpr,  # splits begin at multiples of this many tokens
    MAX_SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,  # splits that are combined at a time
    CAPPED: tl.constexpr,  # with a soft-cap
    UPCAST: tl.constexpr,  # products in f32, for the interpreter
):
    unit = tl.program_id(0).to(tl.int64)
    kv_head = unit // UNITS_PER_KV_HEAD
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    start = tl.load(starts + row).to(tl.int64)
    length = (tl.load(ends + row) - start).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, num_splits), SPLIT_ALIGNMENT) * SPLIT_ALIGNMENT
    first = split * share
    dims = tl.arange(0, DIM)
    members = tl.arange(0, PADDED_GROUP)
    heads = unit * GROUP + members
    if not IS_SHARED:
        slots += unit * list_stride
    q = tl.load(
        query + row * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
        mask=members[:, None] < GROUP,
        other=0.0,
    )
    attended, lse = _attend_split(
        q,
        keys + kv_head * key_head_stride,
        values + kv_head * value_head_stride,
        slots + start,
        first,
        tl.minimum(first + share, length),
        scale,
        soft_cap,
        key_slot_stride,
        value_slot_stride,
        DIM,
        PADDED_GROUP,
        BLOCK,
        CAPPED,
        UPCAST,
    )
    output += row * output_row_stride + unit * GROUP * output_head_stride
    if num_splits == 1:
        tl.store(
            output + members[:, None] * output_head_stride + dims[None, :],
            (attended * value_scale).to(output.dtype.element_ty),
            mask=members[:, None] < GROUP,
        )
    else:
        number = row * tl.num_programs(0) + unit
        split_outputs += number * num_splits * PADDED_GROUP * DIM
        split_lse += number * num_splits * PADDED_GROUP
        rows = split * PADDED_GROUP + members
        tl.store(
            split_outputs + rows[:, None] * DIM + dims[None, :],
            attended,
            mask=members[:, None] < GROUP,
        )
        tl.store(split_lse + rows, lse, mask=members < GROUP)
        if is_last_block(block_counters + number, num_splits):
            combined = _combine_splits(
                split_outputs,
                split_lse,
                num_splits,
                GROUP,
                COMBINED_GROUP,
                DIM,
                PADDED_GROUP,
                MAX_SPLITS,
                SPLIT_BLOCK,
            )
            combined_members = tl.arange(0, COMBINED_GROUP)
            tl.store(
                output + combined_members[:, None] * output_head_stride + dims[None, :],
                (combined * value_scale).to(output.dtype.element_ty),
                mask=combined_members[:, None] < GROUP,
            )


def attend_tokens(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    ends: Tensor,
    *,
    longest: int,
    scale: float,
    soft_cap: float = 0.0,
    value_scale: float = 1.0,
    workspace: SplitWorkspace,
    out: Tensor,
) -> Tensor:
    """Attend, for each row and head, over the tokens in its list of slots.

    Args:
        query: [B, H, D] fp16, bf16 or f32.
        keys, values: [P, G, D], one layer of the KV cache, in the query's dtype or fp8.
        slots: [n] int32 for all heads, or a row of these for each KV head or each query head; in
            order of position, neighbours are read together.
        starts, ends: [B] int32, where each row's slots begin and end; a row without slots gives
            zeros.
        longest: tokens of the longest row that there can be; decides the grid, so a CUDA graph
            that captures the launch serves every step.
        scale: factor on q·k before the softmax.
        soft_cap: bound that a tanh keeps scaled scores within; 0 for none.
        value_scale: factor on the result, for a quantised cache.
        workspace: from `SplitWorkspace.allocate`.
        out: [B, H, D], in the query's dtype.

    Returns:
        `out`.
    """
    check_tensors(query=query, keys=keys, values=values, slots=slots, starts=starts, out=out)
    check_int32(slots=slots, starts=starts, ends=ends)
    _check_shapes(query, keys, values, slots, starts, ends, workspace, out)
    rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    units = slots.shape[0] if slots.ndim == 2 else num_kv_heads
    group = num_heads // units
    combined_group = triton.next_power_of_2(group)
    splits_per_round = max(1, COMBINED_HEADS // combined_group)
    num_splits = workspace.num_splits(rows * units, longest, splits_per_round)
    programs_per_sm = num_splits * rows * units / workspace.num_sms
    _attend_tokens[(units, num_splits, rows)](
        query,
        keys,
        values,
        slots,
        starts,
        ends,
        workspace.outputs,
        workspace.lse,
        workspace.block_counters,
        out,
        num_splits,
        scale,
        soft_cap,
        value_scale,
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        out.stride(0),
        out.stride(1),
        slots.stride(0),
        GROUP=group,
        COMBINED_GROUP=combined_group,
        PADDED_GROUP=padded_group(num_heads, units),
        UNITS_PER_KV_HEAD=units // num_kv_heads,
        IS_SHARED=slots.ndim == 1,
        DIM=dim,
        BLOCK=attend_block(dim, group, keys.itemsize, programs_per_sm),
        SPLIT_ALIGNMENT=SPLIT_ALIGNMENT,
        MAX_SPLITS=MAX_SPLITS,
        SPLIT_BLOCK=splits_per_round,
        CAPPED=bool(soft_cap),
        # The interpreter computes bf16 products wrongly (Triton 3.6).
        UPCAST=interpreted() and query.dtype == torch.bfloat16,
        num_warps=ATTEND_WARPS,
        num_stages=ATTEND_STAGES,
    )
    return out


def _check_shapes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    ends: Tensor,
    workspace: SplitWorkspace,
    out: Tensor,
) -> None:
    """Refuse shapes with which the kernel would read or write out of bounds."""
    check_attention(query, keys, values, out)
    rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[1]
    if len(starts) != rows or len(ends) != rows:
        raise ValueError(
            f"starts and ends must have {rows} elements, not {len(starts)} and {len(ends)}"
        )
    if slots.ndim == 2 and slots.shape[0] not in (num_kv_heads, num_heads):
        raise ValueError(
            f"slots must have a list for all heads, {num_kv_heads} for KV heads or {num_heads} for "
            f"query heads, not {slots.shape[0]}"
        )
    units = slots.shape[0] if slots.ndim == 2 else num_kv_heads
    needed = (padded_group(num_heads, units), dim)
    if workspace.outputs.shape[1:] != needed:
        raise ValueError(
            f"the workspace is for (padded heads, head dimension) = "
            f"{tuple(workspace.outputs.shape[1:])}, not {needed}: allocate one for this shape"
        )
