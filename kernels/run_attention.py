"""Dense attention of runs: the last `width` tokens of each request, each over the tokens up to it.

Defined by `reference.attend_runs`. A *unit* is a request and a KV head: one tile of query rows, the
run's tokens times the KV head's query heads. Stream-K: the tiles of K and V of all units, one unit
behind the other, are shared evenly by a fixed number of programs, each of which finds its share
from `indptr`. Lengths are read on the device, so nothing is planned, a CUDA graph serves any
lengths, and requests of different lengths keep all SMs busy.

Where a program's share begins or ends within a unit, its part is a *split*. A second kernel
combines the splits of a unit, always in the same order, so equal inputs give equal bits.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import (
    COMBINE_WARPS,
    COMBINED_ROWS,
    COMBINED_SPLITS,
    LOG2_E,
    MAX_REQUESTS,
    MAX_RUN_DIM,
    MAX_RUN_ROWS,
    MIN_DOT_ROWS,
    MIN_REQUESTS,
    MIN_RUN_TILES,
    RUN_PROGRAMS_PER_SM,
    RUN_STAGES,
    check_attention,
    check_int32,
    check_tensors,
    interpreted,
    run_block,
    run_tile_bytes,
    run_warps,
)

INTERPRETED_PROGRAMS = 12
"""Programs on a CPU: enough for a unit to have more splits than are combined at a time."""
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class RunWorkspace:
    """Memory for splits, allocated once.

    Shapes: W programs, each with two splits at most: of the unit that a program before it begins,
    and of the unit that it begins itself and leaves to the next.
    """

    outputs: Tensor
    """[W, 2, rows, D] f32, attention over each split; rows of the widest run."""
    lse: Tensor
    """[W, 2, rows] f32, log-sum-exp of each split and row, to base 2."""
    tile_bytes: int
    """Bytes of K, and of V, that a program reads at a time."""

    @classmethod
    def allocate(
        cls,
        *,
        num_heads: int,
        num_kv_heads: int,
        dim: int,
        max_width: int,
        device: torch.device | str,
    ) -> "RunWorkspace":
        """Allocate for the SMs of this GPU.

        Args:
            num_heads, num_kv_heads: query heads and KV heads.
            dim: head dimension.
            max_width: most tokens of a run.
            device: of all tensors.
        """
        programs, shared_bytes = INTERPRETED_PROGRAMS, 0
        if torch.device(device).type == "cuda":
            gpu = torch.cuda.get_device_properties(device)
            programs = gpu.multi_processor_count * RUN_PROGRAMS_PER_SM
            shared_bytes = gpu.shared_memory_per_multiprocessor
        rows = padded_run(max_width, num_heads // num_kv_heads)
        return cls(
            torch.zeros(programs, 2, rows, dim, device=device),
            torch.zeros(programs, 2, rows, device=device),
            run_tile_bytes(shared_bytes),
        )

    def first_programs(self, num_programs: int) -> "RunWorkspace":
        """Return the same memory for fewer programs."""
        first = slice(num_programs)
        return replace(self, outputs=self.outputs[first], lse=self.lse[first])


def padded_run(width: int, group: int) -> int:
    """Return the rows of a unit's tile of queries, padded for tensor cores.

    Raises:
        ValueError: there are more rows than a program attends for.
    """
    rows = width * group
    if not 0 < rows <= MAX_RUN_ROWS:
        raise ValueError(
            f"{width} tokens times {group} query heads per KV head are {rows} rows; a program "
            f"attends for 1 to {MAX_RUN_ROWS}: verify at most {MAX_RUN_ROWS // group} tokens"
        )
    return max(MIN_DOT_ROWS, triton.next_power_of_2(rows))


@triton.jit
def _num_tiles(length, BLOCK: tl.constexpr):
    """Return the tiles of a request and KV head: one even without tokens, so that zeros appear."""
    return tl.maximum(tl.cdiv(length, BLOCK), 1)


@triton.jit
def _owner(tile, share, rest):
    """Return the program that a tile belongs to: the first `rest` have a tile more than `share`."""
    longer = rest * (share + 1)
    return tl.where(
        tile < longer, tile // (share + 1), rest + (tile - longer) // tl.maximum(share, 1)
    )


@triton.jit
def _attend_tiles(
    q,  # [ROWS, DIM]
    limits,  # [ROWS] int32, tokens that a row attends to
    seen_by_all,  # tokens that all rows attend to
    keys,  # [P, DIM], of one KV head
    values,  # [P, DIM]
    slots,  # [length] int32, of one request
    first,
    end,
    last_token,
    scale,
    soft_cap,
    key_slot_stride,
    value_slot_stride,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return attention over the tokens from `first` to `end`, and its log-sum-exp to base 2."""
    dims = tl.arange(0, DIM)
    largest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, DIM], tl.float32)
    # Slots are loaded a tile ahead here, not by the compiler's pipeline: it would take twice the
    # stages, and shared memory for them. Past the end, the last token again: its weight is 0.
    tokens = first + tl.arange(0, BLOCK)
    next_slot = tl.load(slots + tl.minimum(tokens, last_token), mask=first < end, other=0)
    for begin in range(first, end, BLOCK):
        tokens = begin + tl.arange(0, BLOCK)
        slot = next_slot.to(tl.int64)
        next_slot = tl.load(slots + tl.minimum(tokens + BLOCK, last_token))
        # [DIM, BLOCK] and [BLOCK, DIM]
        k = tl.load(keys + slot[None, :] * key_slot_stride + dims[:, None]).to(q.dtype)
        v = tl.load(values + slot[:, None] * value_slot_stride + dims[None, :]).to(q.dtype)
        if UPCAST:
            scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee")
        else:
            scores = tl.dot(q, k, input_precision="ieee")
        if CAPPED:  # soft_cap * tanh(scores / soft_cap)
            scores = soft_cap * (1 - 2 / (tl.exp(2 * scale * scores / soft_cap) + 1)) * _LOG2_E
        else:
            scores *= scale * _LOG2_E
        if begin + BLOCK > seen_by_all:
            scores = tl.where(tokens[None, :] < limits[:, None], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrunk = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores - new_largest[:, None])
        total = total * shrunk + tl.sum(weights, 1)
        output *= shrunk[:, None]
        if UPCAST:
            weights = weights.to(q.dtype).to(tl.float32)
            output += tl.dot(weights, v.to(tl.float32), input_precision="ieee")
        else:
            output = tl.dot(weights.to(q.dtype), v, output, input_precision="ieee")
        largest = new_largest
    has_any = total > 0
    total = tl.where(has_any, total, 1.0)
    lse = tl.where(has_any, largest + tl.log2(total), float("-inf"))
    return output / total[:, None], lse


@triton.jit
def _split_place(first_program, split):
    """Return where a unit's split lies: the first at the second place of its program."""
    return 2 * (first_program + split) + (split == 0).to(tl.int32)


@triton.jit
def _shares(
    indptr,  # [B + 1] int32
    num_requests,
    num_kv_heads,
    num_programs,
    PADDED_REQUESTS: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a tile
    MIN_TILES: tl.constexpr,  # of a program
):
    """Share all tiles among programs.

    Returns:
        requests, tiles, tile_ends: [PADDED_REQUESTS], their numbers, tiles of a KV head of each,
            and where all tiles of each end.
        programs, share, rest: programs that have tiles, the tiles of each; the first `rest` have
            one more.
    """
    requests = tl.arange(0, PADDED_REQUESTS)
    is_request = requests < num_requests
    begins = tl.load(indptr + requests, mask=is_request, other=0)
    ends = tl.load(indptr + requests + 1, mask=is_request, other=0)
    tiles = tl.where(is_request, _num_tiles(ends - begins, BLOCK), 0)
    tile_ends = tl.cumsum(tiles, 0) * num_kv_heads
    num_tiles = tl.max(tile_ends, 0)
    programs = tl.minimum(num_programs, tl.maximum(num_tiles // MIN_TILES, 1))
    return requests, tiles, tile_ends, programs, num_tiles // programs, num_tiles % programs


@triton.jit(do_not_specialize=["num_requests", "num_kv_heads", "width"])
def _attend_runs(
    query,  # [B * width, H, DIM]
    keys,  # [P, G, DIM]
    values,  # [P, G, DIM]
    slots,  # [indptr[B]] int32
    indptr,  # [B + 1] int32
    split_outputs,  # [W, 2, ROWS, DIM] f32
    split_lse,  # [W, 2, ROWS] f32
    output,  # [B * width, H, DIM]
    num_requests,
    num_kv_heads,
    width,
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
    GROUP: tl.constexpr,  # query heads per KV head
    ROWS: tl.constexpr,  # width times these, padded
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a tile
    PADDED_REQUESTS: tl.constexpr,
    MIN_TILES: tl.constexpr,  # of a program
    CAPPED: tl.constexpr,  # with a soft-cap
    UPCAST: tl.constexpr,  # products in f32, for the interpreter
):
    program = tl.program_id(0)
    requests, tiles, tile_ends, programs, share, rest = _shares(
        indptr,
        num_requests,
        num_kv_heads,
        tl.num_programs(0),
        PADDED_REQUESTS,
        BLOCK,
        MIN_TILES,
    )
    tile = program * share + tl.minimum(program, rest)
    end_tile = tl.where(program < programs, tile + share + (program < rest).to(tl.int32), tile)
    is_before = tile_ends <= tile
    request = tl.sum(is_before.to(tl.int32), 0)
    before = tl.max(tl.where(is_before, tile_ends, 0), 0)
    own_tiles = tl.maximum(tl.sum(tl.where(requests == request, tiles, 0), 0), 1)
    kv_head = (tile - before) // own_tiles
    unit_begin = before + kv_head * own_tiles
    dims = tl.arange(0, DIM)
    rows = width * GROUP
    row = tl.arange(0, ROWS)
    token = row // GROUP
    while tile < end_tile:
        begin = tl.load(indptr + request).to(tl.int64)
        length = (tl.load(indptr + request + 1) - begin).to(tl.int32)
        unit_end = unit_begin + _num_tiles(length, BLOCK)
        stop = tl.minimum(unit_end, end_tile)
        run = request.to(tl.int64) * width
        head = kv_head.to(tl.int64)
        seen_by_all = length - width + 1
        q = tl.load(
            query
            + (run + token)[:, None] * query_row_stride
            + (head * GROUP + row % GROUP)[:, None] * query_head_stride
            + dims[None, :],
            mask=(row < rows)[:, None],
            other=0.0,
        )
        attended, lse = _attend_tiles(
            q,
            seen_by_all + token,
            seen_by_all,
            keys + head * key_head_stride,
            values + head * value_head_stride,
            slots + begin,
            (tile - unit_begin) * BLOCK,
            tl.minimum((stop - unit_begin) * BLOCK, length),
            length - 1,
            scale,
            soft_cap,
            key_slot_stride,
            value_slot_stride,
            ROWS,
            DIM,
            BLOCK,
            CAPPED,
            UPCAST,
        )
        first_program = _owner(unit_begin, share, rest)
        if _owner(unit_end - 1, share, rest) == first_program:
            tl.store(
                output
                + (run + token)[:, None] * output_row_stride
                + (head * GROUP + row % GROUP)[:, None] * output_head_stride
                + dims[None, :],
                (attended * value_scale).to(output.dtype.element_ty),
                mask=(row < rows)[:, None],
            )
        else:
            places = _split_place(first_program, program - first_program) * ROWS + row
            tl.store(split_lse + places, lse, mask=row < rows)
            tl.store(
                split_outputs + places[:, None] * DIM + dims[None, :],
                attended,
                mask=(row < rows)[:, None],
            )
        tile = stop
        unit_begin = unit_end
        kv_head += 1
        if kv_head == num_kv_heads:
            kv_head = 0
            request += 1


@triton.jit(do_not_specialize=["num_requests", "num_kv_heads", "width", "num_programs"])
def _combine_splits(
    split_outputs,  # [W, 2, ROWS, DIM] f32
    split_lse,  # [W, 2, ROWS] f32
    indptr,  # [B + 1] int32
    output,  # [B * width, H, DIM]
    num_requests,
    num_kv_heads,
    width,
    num_programs,  # W
    value_scale,
    output_row_stride,
    output_head_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS: tl.constexpr,  # that are combined at a time
    COMBINED_ROWS: tl.constexpr,  # rows of a program
):
    """Combine some rows of a unit's splits, if it has several."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    requests, tiles, tile_ends, _, share, rest = _shares(
        indptr, num_requests, num_kv_heads, num_programs, PADDED_REQUESTS, BLOCK, MIN_TILES
    )
    own_tiles = tl.sum(tl.where(requests == request, tiles, 0), 0)
    end = tl.sum(tl.where(requests == request, tile_ends, 0), 0)
    unit_begin = end - (num_kv_heads - kv_head) * own_tiles
    first_program = _owner(unit_begin, share, rest)
    num_splits = _owner(unit_begin + own_tiles - 1, share, rest) - first_program + 1
    if num_splits > 1:
        dims = tl.arange(0, DIM)
        numbers = tl.arange(0, SPLITS)
        row = tl.program_id(2) * COMBINED_ROWS + tl.arange(0, COMBINED_ROWS)
        is_row = row < width * GROUP
        largest = tl.full([COMBINED_ROWS], _LOWEST, tl.float32)
        total = tl.zeros([COMBINED_ROWS], tl.float32)
        combined = tl.zeros([COMBINED_ROWS, DIM], tl.float32)
        for first in range(0, num_splits, SPLITS):
            splits = first + numbers
            inside = (splits < num_splits)[:, None] & is_row[None, :]
            # [SPLITS, COMBINED_ROWS], and DIM
            at = _split_place(first_program, splits)[:, None] * ROWS + row[None, :]
            lse = tl.load(split_lse + at, mask=inside, other=float("-inf"))
            outputs = tl.load(
                split_outputs + at[:, :, None] * DIM + dims[None, None, :],
                mask=inside[:, :, None],
                other=0.0,
            )
            new_largest = tl.maximum(largest, tl.max(lse, 0))
            shrunk = tl.exp2(largest - new_largest)
            weights = tl.exp2(lse - new_largest[None, :])
            total = total * shrunk + tl.sum(weights, 0)
            combined = combined * shrunk[:, None] + tl.sum(outputs * weights[:, :, None], 0)
            largest = new_largest
        combined /= tl.where(total > 0, total, 1.0)[:, None]
        run = request.to(tl.int64) * width
        tl.store(
            output
            + (run + row // GROUP)[:, None] * output_row_stride
            + (kv_head * GROUP + row % GROUP)[:, None] * output_head_stride
            + dims[None, :],
            (combined * value_scale).to(output.dtype.element_ty),
            mask=is_row[:, None],
        )


def attend_runs(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    indptr: Tensor,
    *,
    width: int,
    scale: float,
    soft_cap: float = 0.0,
    value_scale: float = 1.0,
    workspace: RunWorkspace,
    out: Tensor,
) -> Tensor:
    """Attend, for each of the last `width` tokens of each request, over the tokens up to its own.

    Args:
        query: [B * width, H, D] fp16, bf16 or f32, oldest first in each request.
        keys, values: [P, G, D], one layer of the KV cache, in the query's dtype or fp8.
        slots: [indptr[B]] int32, of each request's tokens, oldest first.
        indptr: [B + 1] int32, where each request's slots begin; a row that has no token, as in a
            request that pads a CUDA graph's batch, gives zeros.
        width: query rows of a request.
        scale: factor on q·k before the softmax.
        soft_cap: bound that a tanh keeps scaled scores within; 0 for none.
        value_scale: factor on the result, for a quantised cache.
        workspace: from `RunWorkspace.allocate`, for this width or a larger one.
        out: [B * width, H, D], in the query's dtype.

    Returns:
        `out`.
    """
    check_tensors(query=query, keys=keys, values=values, slots=slots, indptr=indptr, out=out)
    check_int32(slots=slots, indptr=indptr)
    _check_shapes(query, keys, values, indptr, width, workspace, out)
    num_heads, dim = query.shape[1:]
    num_kv_heads = keys.shape[1]
    group, num_requests = num_heads // num_kv_heads, len(indptr) - 1
    num_programs, padded_rows = len(workspace.lse), padded_run(width, group)
    shape = {
        "GROUP": group,
        "ROWS": padded_rows,
        "DIM": dim,
        "BLOCK": run_block(dim, query.itemsize, workspace.tile_bytes),
        "PADDED_REQUESTS": max(MIN_REQUESTS, triton.next_power_of_2(num_requests)),
        "MIN_TILES": MIN_RUN_TILES,
    }
    _attend_runs[(num_programs,)](
        query,
        keys,
        values,
        slots,
        indptr,
        workspace.outputs,
        workspace.lse,
        out,
        num_requests,
        num_kv_heads,
        width,
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
        **shape,
        CAPPED=bool(soft_cap),
        # The interpreter computes bf16 products wrongly (Triton 3.6).
        UPCAST=interpreted() and query.dtype == torch.bfloat16,
        num_warps=run_warps(dim),
        num_stages=RUN_STAGES,
    )
    _combine_splits[(num_requests, num_kv_heads, triton.cdiv(width * group, COMBINED_ROWS))](
        workspace.outputs,
        workspace.lse,
        indptr,
        out,
        num_requests,
        num_kv_heads,
        width,
        num_programs,
        value_scale,
        out.stride(0),
        out.stride(1),
        **shape,
        SPLITS=COMBINED_SPLITS,
        COMBINED_ROWS=COMBINED_ROWS,
        num_warps=COMBINE_WARPS,
    )
    return out


def _check_shapes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indptr: Tensor,
    width: int,
    workspace: RunWorkspace,
    out: Tensor,
) -> None:
    """Refuse shapes with which the kernel would read or write out of bounds."""
    check_attention(query, keys, values, out)
    rows, num_heads, dim = query.shape
    num_requests = len(indptr) - 1
    if dim > MAX_RUN_DIM or dim & (dim - 1):
        raise ValueError(f"heads have a power of two up to {MAX_RUN_DIM} dimensions, not {dim}")
    if rows != num_requests * width:
        raise ValueError(
            f"{num_requests} requests of {width} query rows are {num_requests * width}, not {rows}"
        )
    if not 0 < num_requests <= MAX_REQUESTS:
        raise ValueError(f"a step has 1 to {MAX_REQUESTS} requests, not {num_requests}")
    most_rows, workspace_dim = workspace.outputs.shape[2:]
    padded_rows = padded_run(width, num_heads // keys.shape[1])
    if padded_rows > most_rows or dim != workspace_dim:
        raise ValueError(
            f"the workspace is for at most {most_rows} padded rows of {workspace_dim} dimensions, "
            f"not {padded_rows} of {dim}: allocate one for this shape"
        )
