"""One set for all heads: heads take turns, and repeats are skipped until enough tokens are taken.

Defined by `reference.unite_rankings`. Each token's first turn is found by a scatter-min; the turn
of the last token that fits cuts the set off. Both are linear work, and no launch of their own: a
head's turns are noted by the program that ranks it, and the last of a row's programs cuts.
"""

import triton
import triton.language as tl

from lim_sglang.kernels.launch import COMPACT_BLOCK


@triton.jit
def note_turns(first_turn, ranked, count, head, num_heads, PADDED: tl.constexpr):
    """Lower the first turn of the `count` tokens that a head has ranked, best first."""
    ranks = tl.arange(0, PADDED)
    turns = (ranks * num_heads + head).to(tl.int32)
    tl.atomic_min(first_turn + ranked, turns, mask=ranks < count, sem="relaxed")


@triton.jit
def cut_turns(
    ranking,  # [H, >= num_turns / H] int32, of one row
    first_turn,  # [>= S] int32
    chosen_counts,  # [PADDED_COUNTS] int32
    num_turns,
    selected,
    num_heads,
    ranking_head_stride,
    COUNTED: tl.constexpr,
    PADDED_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The turn of the last token that fits, and how many tokens the turns up to it take.

    Token t is chosen if its first turn is not after that. What each block of COUNTED positions has
    of chosen tokens is counted. Other programs wrote all that is read: see `arrive.py`.
    """
    counts = chosen_counts + tl.arange(0, PADDED_COUNTS)
    tl.store(counts, 0)
    tl.debug_barrier()
    taken = 0
    cut = -1
    first = 0
    while (taken < selected) & (first < num_turns):
        turns = first + tl.arange(0, BLOCK)
        inside = turns < num_turns
        source = (turns % num_heads).to(tl.int64) * ranking_head_stride + turns // num_heads
        token = tl.load(ranking + source, mask=inside, other=0, cache_modifier=".cg")
        turn = tl.load(first_turn + token, mask=inside, other=-1, cache_modifier=".cg")
        new = (inside & (turn == turns)).to(tl.int32)
        fits = (new > 0) & (taken + tl.cumsum(new, 0) <= selected)
        tl.atomic_add(chosen_counts + token // COUNTED, 1, mask=fits, sem="relaxed")
        cut = tl.maximum(cut, tl.max(tl.where(fits, turns, -1), 0))
        taken += tl.sum(new, 0)
        first += BLOCK
    return cut, taken


def padded_counts(columns: int) -> int:
    """Blocks of positions of the longest row, as a power of two."""
    return triton.next_power_of_2(triton.cdiv(columns, COMPACT_BLOCK))
