"""Measures of kept sets and of heads' scores, for one request in one layer of a decode step.

Shapes: H query heads, S tokens (newest included), n tokens of a list. A kept set is [lists, n]
int64 with one list for all heads, each KV head or each query head: query head h reads list
h · lists // H.
"""

import torch
from torch import Tensor

from lim_sglang.kernels.reference import BudgetSplit, turns_of_rank
from lim_sglang.kernels.reference_rivals import keep_per_head


def attention_recall(weights: Tensor, kept: Tensor) -> float:
    """Return the share of the attention mass that is in a kept set, mean over the heads.

    Args:
        weights: [H, S] float, softmax over all tokens.
        kept: [lists, n].
    """
    heads = weights.shape[0]
    own = kept[torch.arange(heads, device=kept.device) * kept.shape[0] // heads]  # [H, n]
    return float(weights.gather(1, own).sum(1).mean())


def share_kept(kept: Tensor, before: Tensor) -> float:
    """Return the share of a kept set that an earlier set holds, mean over the lists.

    Args:
        kept, before: [lists, n] and [lists, m], each list without repeats.
    """
    shares = [torch.isin(new, old).double().mean() for new, old in zip(kept, before, strict=True)]
    return float(torch.stack(shares).mean())


def mean_jaccard(sets: Tensor) -> float | None:
    """Return the Jaccard index of two heads' sets, common tokens over all, mean over all pairs.

    Args:
        sets: [H, n], each head's positions without repeats.

    Returns:
        None for a single head, or for empty sets.
    """
    heads, size = sets.shape
    if heads == 1 or not size:
        return None
    members = torch.zeros(heads, int(sets.max()) + 1, device=sets.device).scatter_(1, sets, 1.0)
    first, second = torch.triu_indices(heads, heads, offset=1, device=sets.device)
    common = (members @ members.T)[first, second]
    return float((common / (2 * size - common)).mean())


def own_sets(scores: Tensor, split: BudgetSplit) -> tuple[Tensor, Tensor]:
    """Return each head's own top-k with sinks and newest tokens, and the ranked tokens alone.

    Args:
        scores: [H, S] float, raw q·k, S > K.

    Returns:
        [H, K] and [H, selected] int64; the second counts from the first candidate.
    """
    candidates = scores[:, split.sinks : scores.shape[1] - split.recent]
    ranked = keep_per_head(candidates, BudgetSplit(sinks=0, selected=split.selected, recent=0))
    return keep_per_head(scores, split), ranked


def ranks_deep(scores: Tensor, split: BudgetSplit) -> int:
    """Return how many of each head's best tokens LessIsMore's union looks at, 1 to `selected`.

    Args:
        scores: [H, S] float, raw q·k, S > K.
    """
    last_turn = int(turns_of_rank(scores, split)[-1, 1])
    return last_turn // scores.shape[0] + 1
