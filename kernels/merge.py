"""Attention over parts of a row's tokens, put together: each part weighs what its normaliser says.

The second half of `reference.attend_tokens`, for rows that several programs share.
"""

import triton
import triton.language as tl


@triton.jit
def combine_splits(
    split_outputs,  # [num_parts, PADDED_GROUP, DIM] f32, of one row and KV head
    split_lse,  # [num_parts, PADDED_GROUP] f32
    num_splits,
    GROUP: tl.constexpr,  # query heads a KV head
    COMBINED_GROUP: tl.constexpr,  # the next power of two
    DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr,  # rows that a part has room for
    MAX_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts read at a time
):
    """[MERGED_GROUP, DIM]: the parts, weighted by their normalisers."""
    dims = tl.arange(0, DIM)
    members = tl.arange(0, COMBINED_GROUP)
    all_splits = tl.arange(0, MAX_SPLITS)[:, None]
    # [MAX_PARTS, MERGED_GROUP]; other programs wrote it: not from this processor's own cache
    inside = (all_splits < num_splits) & (members[None, :] < GROUP)
    places = split_lse + all_splits * PADDED_GROUP + members[None, :]
    lse = tl.load(places, mask=inside, other=float("-inf"), cache_modifier=".cg")
    largest = tl.max(lse, 0)
    largest = tl.where(largest > float("-inf"), largest, 0.0)
    total = tl.sum(tl.exp2(lse - largest[None, :]), 0)
    combined = tl.zeros([COMBINED_GROUP, DIM], tl.float32)
    for first in range(0, num_splits, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)[:, None]
        taken = (some < num_splits) & (members[None, :] < GROUP)
        rows = some * PADDED_GROUP + members[None, :]
        split_lses = tl.load(
            split_lse + rows, mask=taken, other=float("-inf"), cache_modifier=".cg"
        )
        weights = tl.exp2(split_lses - largest[None, :])
        # [AT_ONCE, MERGED_GROUP, DIM]
        outputs = tl.load(
            split_outputs + rows[:, :, None] * DIM + dims[None, None, :],
            mask=taken[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        combined += tl.sum(outputs * weights[:, :, None], 0)
    return combined / tl.where(total > 0, total, 1.0)[:, None]
