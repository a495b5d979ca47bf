"""How far shortlists go: what they rank and which rows they decide; no matter of exactness."""

from lim_sglang.kernels.check import Batch, draw, shortlisted
from lim_sglang.kernels.launch import NEEDS_FULL_RANKING


def shortlist_depths(batch: Batch, device: str) -> list[int]:
    """How many ranks each head of each row has in its shortlist."""
    return [int(depth) for depth in shortlisted(batch, draw(batch, device)).depth.flatten()]


def full_ranking_rows(batch: Batch, device: str) -> tuple[list[int], int]:
    """Rows over the budget whose shortlists are not deep enough for the union, and their count
    after the whole selection."""
    tensors = draw(batch, device)
    selector = shortlisted(batch, tensors)
    undecided = [row for row in batch.sparse if selector.last_turn[row] == NEEDS_FULL_RANKING]
    selector.forget()
    selector.full_ranking_rows.zero_()
    selector.choose(tensors.indptr)
    return undecided, selector.counts()["rows_ranked_whole"]
