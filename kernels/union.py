"""One set for all heads: heads take turns, and repeats are skipped until enough tokens are taken.

Defined by `reference.unite_rankings`. Each token's first turn is found by a scatter-min, which also
counts, for each rank, the tokens that are first met there. So the turn of the last token that fits,
which cuts the set off, is found without walking through the turns. All of it is linear work, and no
launch of its own: a head's turns are noted by the program that ranks it, the last of a row's
programs cuts, and the next launch counts what is chosen.
"""

import triton
import triton.language as tl

from lim_sglang.kernels.launch import COMPACT_BLOCK, NEEDS_FULL_RANKING, NEVER

_NO_TURN: tl.constexpr = tl.constexpr(NEVER)
_NEEDS_FULL_RANKING: tl.constexpr = tl.constexpr(NEEDS_FULL_RANKING)


@triton.jit
def note_turns(
    first_turn, new_tokens_per_rank, ranked, count, head, num_heads, PADDED: tl.constexpr
):
    """Lower the first turn of the `count` tokens that a head has ranked, best first.

    A token that another head has met before is counted at the lower of both ranks.
    """
    ranks = tl.arange(0, PADDED)
    inside = ranks < count
    turns = (ranks * num_heads + head).to(tl.int32)
    before = tl.atomic_min(first_turn + ranked, turns, mask=inside, sem="relaxed")
    lowered = inside & (turns < before)
    tl.atomic_add(new_tokens_per_rank + ranks, 1, mask=lowered, sem="relaxed")
    moved = lowered & (before != _NO_TURN)
    tl.atomic_add(
        new_tokens_per_rank + tl.where(moved, before // num_heads, 0), -1, mask=moved, sem="relaxed"
    )


@triton.jit
def cut_turns(
    ranking,  # [H, >= num_ranks] int32, of one row
    first_turn,  # [>= S] int32
    new_tokens_per_rank,  # [MET_RANKS] int32
    num_ranks,  # of each head's, that all have noted
    selected,
    num_heads,
    ranking_head_stride,
    PADDED_HEADS: tl.constexpr,
    COUNTED_RANKS: tl.constexpr,
):
    """The turn of the last token that fits; UNDECIDED where turns do not take enough tokens.

    Token t is chosen if its first turn is not after that. Counts are forgotten where they were
    enough. Other programs wrote all that is read: see `arrive.py`.
    """
    ranks = tl.arange(0, COUNTED_RANKS)
    met = tl.load(
        new_tokens_per_rank + ranks, mask=ranks < num_ranks, other=0, cache_modifier=".cg"
    )
    last = tl.sum((tl.cumsum(met, 0) < selected).to(tl.int32), 0)  # the rank of the cut
    cut = _NEEDS_FULL_RANKING
    if last < COUNTED_RANKS:
        before = tl.sum(tl.where(ranks < last, met, 0), 0)
        heads = tl.arange(0, PADDED_HEADS)
        inside = heads < num_heads
        place = ranking + heads.to(tl.int64) * ranking_head_stride + last
        token = tl.load(place, mask=inside, other=0, cache_modifier=".cg")
        turn = tl.load(first_turn + token, mask=inside, other=-1, cache_modifier=".cg")
        turns = last * num_heads + heads
        new = (inside & (turn == turns)).to(tl.int32)
        fits = (new > 0) & (before + tl.cumsum(new, 0) <= selected)
        cut = tl.max(tl.where(fits, turns, _NEEDS_FULL_RANKING), 0)
        tl.debug_barrier()  # no thread forgets what another has yet to read
        tl.store(new_tokens_per_rank + ranks, 0)
    return cut


@triton.jit
def count_chosen(
    first_turn,  # [>= length] int32
    chosen_counts,  # [>= blocks of length] int32
    cut,
    length,
    first_block,
    step,
    BLOCK: tl.constexpr,
):
    """Count the chosen tokens of every `step`-th block of positions from `first_block` on."""
    for block in range(first_block, tl.cdiv(length, BLOCK), step):
        positions = block * BLOCK + tl.arange(0, BLOCK)
        inside = positions < length
        turn = tl.load(first_turn + positions, mask=inside, other=_NO_TURN, cache_modifier=".cg")
        tl.store(chosen_counts + block, tl.sum((turn <= cut).to(tl.int32), 0))


def padded_counts(columns: int) -> int:
    """Blocks of positions of the longest row, as a power of two."""
    return triton.next_power_of_2(triton.cdiv(columns, COMPACT_BLOCK))
