"""The definition of LessIsMore's token selection and sparse attention, in plain torch.

Source: Yang et al., "Less Is More", arXiv 2508.07101, and its public code where the paper is
silent. Every kernel in this folder is tested against a function of the same meaning here.

Shapes: H query heads, G KV heads, D head dimension, S tokens of one request (newest included),
C candidates, K budget.
"""

import itertools
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class BudgetSplit:
    """Budget in tokens, split into its three parts."""

    sinks: int
    selected: int
    recent: int

    @property
    def budget(self) -> int:
        """Most tokens that a row keeps."""
        return self.sinks + self.selected + self.recent


def split_budget(budget: int, recent_ratio: float, sinks: int) -> BudgetSplit:
    """Split a budget; the sinks come out of the recency share, and the newest token is kept.

    The epsilon keeps a product such as 10 * 0.9 from being truncated to 8.
    """
    selected = int(budget * (1 - recent_ratio) + 1e-9)
    share = budget - selected
    if share == 0:
        return BudgetSplit(sinks=0, selected=budget - 1, recent=1)
    sinks = min(sinks, share - 1)
    return BudgetSplit(sinks=sinks, selected=selected, recent=share - sinks)


def count_kept(lengths: Tensor, budget: int, page: int = 1) -> Tensor:
    """Return where each row's kept tokens begin.

    A row keeps all of its tokens, or a budget of whole pages but for the newest, which ends with
    the row: by tokens `min(length, budget)`.

    Args:
        lengths: [B] int, tokens of each row, the newest included.
        budget: most tokens that a row keeps, a multiple of `page`.
        page: tokens that are kept or dropped together.

    Returns:
        [B + 1] int32; row b keeps `result[b + 1] - result[b]` tokens.
    """
    kept = lengths.minimum(budget - page + (lengths - 1) % page + 1).cumsum(0)
    return torch.cat([kept.new_zeros(1), kept]).int()


def score_tokens(query: Tensor, keys: Tensor) -> Tensor:
    """Compute raw q·k of every query head with every token, in f32.

    Softmax, scale and soft-cap are monotone within a head, so they would change no ranking.

    Args:
        query: [H, D].
        keys: [S, G, D]; H is a multiple of G.

    Returns:
        [H, S] float32.
    """
    heads, dim = query.shape
    groups = keys.shape[1]
    # [G, H/G, D] @ [G, D, S]
    scores = query.float().view(groups, heads // groups, dim) @ keys.float().permute(1, 2, 0)
    return scores.reshape(heads, -1)


def rank_tokens(scores: Tensor) -> Tensor:
    """Rank each head's candidates, best first; of equal scores, the older token comes first.

    -0.0 ties with +0.0, and NaN ranks last, after -inf.

    Args:
        scores: [H, C] float, candidates in order of position.

    Returns:
        [H, C] int64, candidate indices.
    """
    values = scores + 0.0  # turns -0.0 into +0.0, which sorting on a GPU would tell apart
    if values.isnan().any():  # an ascending sort puts them last, but is slower on a CPU
        return (-values).sort(dim=-1, stable=True).indices
    return values.sort(dim=-1, descending=True, stable=True).indices


def unite_rankings(ranking: Tensor, selected: int) -> Tensor:
    """Return the first `selected` different tokens when heads take turns, rank by rank.

    A token's first turn is `min_h(rank_h * H + h)`; the tokens with the smallest first turns are
    chosen. No rank beyond `selected - 1` matters: one head alone has `selected` tokens by then.

    Args:
        ranking: [H, C] int64, from `rank_tokens`.
        selected: tokens to take, at most C.

    Returns:
        [selected] int64 candidate indices, in the order of their turns.
    """
    token_by_turn = ranking[:, :selected].T.reshape(-1)
    turns = torch.arange(token_by_turn.numel(), device=ranking.device)
    return _first_turns(token_by_turn, turns, ranking.shape[1], selected)[0]


def _first_turns(
    tokens: Tensor, turns: Tensor, candidates: int, selected: int
) -> tuple[Tensor, Tensor]:
    """Return the `selected` tokens of the smallest first turns, ascending, and those turns.

    Args:
        tokens, turns: [n] int64, a token and a turn at which a head has it.
    """
    never = torch.iinfo(turns.dtype).max
    first_turn = torch.full((candidates,), never, device=turns.device)
    first_turn.scatter_reduce_(0, tokens, turns, reduce="amin")
    found = first_turn.sort(stable=True)
    return found.indices[:selected], found.values[:selected]


def keep_tokens(scores: Tensor, budget_split: BudgetSplit) -> Tensor:
    """Return the kept positions of one request, without the checks of `select_tokens`.

    The CPU server calls this function.

    Args:
        scores: [H, S] float, raw q·k.

    Returns:
        [min(S, K)] int64, ascending.
    """
    length = scores.shape[1]
    if length <= budget_split.budget:
        return torch.arange(length, device=scores.device)
    ranking = rank_tokens(_candidates(scores, budget_split))
    return _with_ends(unite_rankings(ranking, budget_split.selected), length, budget_split)


def _candidates(scores: Tensor, budget_split: BudgetSplit) -> Tensor:
    """Return the scores of the tokens between sinks and newest tokens, [H, C]."""
    return scores[:, budget_split.sinks : scores.shape[1] - budget_split.recent]


def _with_ends(chosen: Tensor, length: int, budget_split: BudgetSplit) -> Tensor:
    """Return the positions of sinks, chosen candidates and newest tokens, ascending."""
    device = chosen.device
    return torch.cat(
        [
            torch.arange(budget_split.sinks, device=device),
            chosen.sort().values + budget_split.sinks,
            torch.arange(length - budget_split.recent, length, device=device),
        ]
    )


def turns_of_rank(
    scores: Tensor, budget_split: BudgetSplit, rank: int = 0, num_ranks: int = 1
) -> Tensor:
    """Return what one rank of tensor parallelism adds to a union over the heads of all ranks.

    Rank r has the query heads `[r · H / ranks, (r + 1) · H / ranks)`. Among its own heads turns
    come in the order that they have among all heads, so a token of the union is among the first
    `selected` tokens of a rank, with its first turn among all heads.

    Args:
        scores: [H / ranks, S] float, raw q·k of the rank's heads; S > K.

    Returns:
        [selected, 2] int64: candidate index and turn among all heads, in the order of the turns.
    """
    heads, selected = scores.shape[0], budget_split.selected
    ranking = rank_tokens(_candidates(scores, budget_split))
    token_by_turn = ranking[:, :selected].T.reshape(-1)
    own_turns = torch.arange(token_by_turn.numel(), device=scores.device)
    depth, head = own_turns // heads, own_turns % heads
    turns = depth * heads * num_ranks + rank * heads + head
    return torch.stack(_first_turns(token_by_turn, turns, ranking.shape[1], selected), dim=1)


def keep_by_turns(turns: Tensor, length: int, budget_split: BudgetSplit) -> Tensor:
    """Return the kept positions of one request by what its ranks have found.

    Equal to `keep_tokens` of the scores of all heads, for any number of ranks.

    Args:
        turns: [ranks, selected, 2] int64, from `turns_of_rank`.
        length: tokens of the request (S), more than the budget.

    Returns:
        [K] int64, ascending.
    """
    candidates = length - budget_split.sinks - budget_split.recent
    tokens, turns = turns.flatten(0, 1).unbind(1)
    chosen, _ = _first_turns(tokens, turns, candidates, budget_split.selected)
    return _with_ends(chosen, length, budget_split)


def log_sum_exp(scores: Tensor, scale: float) -> Tensor:
    """Compute each head's log-sum-exp as FlashInfer does: log2 of the sum of e^(scale · score).

    Args:
        scores: [H, S] float, raw q·k.
        scale: factor on q·k before the softmax.

    Returns:
        [H] float32.
    """
    return (scores.float() * scale).logsumexp(dim=-1) / math.log(2)


def softmax_mass(scores: Tensor, scale: float) -> Tensor:
    """Compute each token's attention mass: the softmax weights of all heads, summed.

    Args:
        scores: [H, S] float, raw q·k.
        scale: factor on q·k before the softmax.

    Returns:
        [S] float32, between 0 and H.
    """
    return (scores.float() * scale).softmax(dim=-1).sum(dim=0)


def topk_by_mass(mass: Tensor, budget_split: BudgetSplit) -> Tensor:
    """Return the kept positions of one request when candidates are ranked by mass.

    Of equal masses the older token is taken; -0.0 ties with +0.0, and NaN is taken last.

    Args:
        mass: [S] float, from `softmax_mass`.

    Returns:
        [min(S, K)] int64, ascending.
    """
    return keep_tokens(mass[None], budget_split)  # one head, which has every turn


def select_tokens(
    scores: Tensor,
    *,
    budget: int,
    recent_ratio: float = 0.25,
    sinks: int = 4,
    mass_scale: float | None = None,
) -> Tensor:
    """Return the tokens that one request keeps in one decode step, the same for all heads.

    Args:
        scores: [heads, length] float, raw q·k of every query head; the newest token is last.
        budget: most tokens to keep (the paper's K).
        recent_ratio: share of the budget for the newest tokens and the sinks.
        sinks: oldest tokens that are always kept, out of that share.
        mass_scale: rank tokens by mass, with this factor on q·k; None for the paper's ranking.

    Returns:
        [min(length, budget)] int64 positions, ascending.

    Raises:
        ValueError: an argument outside its range, an empty request, or a non-finite score.
    """
    _check(scores, budget, recent_ratio, sinks)
    budget_split = split_budget(budget, recent_ratio, sinks)
    if mass_scale is not None:
        return topk_by_mass(softmax_mass(scores, mass_scale), budget_split)
    return keep_tokens(scores, budget_split)


def compact_slots(
    slots: Tensor, first_turn: Tensor, last_turn: int, budget_split: BudgetSplit
) -> Tensor:
    """Return the cache slots of the kept tokens: sinks, chosen tokens, newest tokens.

    Args:
        slots: [S], slots of all tokens, oldest first.
        first_turn: [S] int, each token's first turn.
        last_turn: last turn whose token is chosen.

    Returns:
        [min(S, K)] in order of position.
    """
    length = slots.shape[0]
    if length <= budget_split.budget:
        return slots
    positions = torch.arange(length, device=slots.device)
    ends = (positions < budget_split.sinks) | (positions >= length - budget_split.recent)
    return slots[ends | (first_turn <= last_turn)]


def attend_tokens(
    query: Tensor, keys: Tensor, values: Tensor, kept: Tensor, scale: float
) -> Tensor:
    """Compute attention of one decoded token over the kept tokens only.

    Args:
        query: [H, D].
        keys, values: [S, G, D].
        kept: [n] int64 positions.
        scale: factor on q·k before the softmax.

    Returns:
        [H, D] in the query's dtype.
    """
    # [heads, tokens, D] in one dtype: torch has fused kernels for this form.
    chosen_keys = keys[kept].transpose(0, 1).to(query.dtype)
    chosen_values = values[kept].transpose(0, 1).to(query.dtype)
    output = functional.scaled_dot_product_attention(
        query[None, :, None], chosen_keys[None], chosen_values[None], scale=scale, enable_gqa=True
    )
    return output[0, :, 0]


def attend_lists(query: Tensor, keys: Tensor, values: Tensor, kept: Tensor, scale: float) -> Tensor:
    """Compute attention of one decoded token over lists that some heads share.

    Args:
        query: [H, D].
        keys, values: [S, G, D].
        kept: [lists, n] int64 positions; a list for all heads, each KV head or each query head.
        scale: factor on q·k before the softmax.

    Returns:
        [H, D] in the query's dtype.
    """
    if kept.shape[0] == 1:
        return attend_tokens(query, keys, values, kept[0], scale)
    heads, groups = query.shape[0], keys.shape[1]
    head = torch.arange(heads, device=query.device)
    own = kept[head * kept.shape[0] // heads]  # [H, n]
    group = (head * groups // heads)[:, None]
    output = functional.scaled_dot_product_attention(
        query[:, None],
        keys[own, group].to(query.dtype),  # [H, n, D]
        values[own, group].to(query.dtype),
        scale=scale,
    )
    return output[:, 0]


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
) -> Tensor:
    """Compute attention of each request's last tokens, each over the tokens up to its own.

    Args:
        query: [B * width, H, D], of the last `width` tokens of each request, oldest first.
        keys, values: [P, G, D].
        slots: [indptr[B]], of each request's tokens, oldest first.
        indptr: [B + 1], where each request's slots begin.
        width: query rows of a request.
        scale: factor on q·k before the softmax.
        soft_cap: bound that a tanh keeps scaled scores within; 0 for none.

    Returns:
        [B * width, H, D] in the query's dtype; zeros for a row that has no token.
    """
    heads, groups, dim = query.shape[1], keys.shape[1], query.shape[2]
    rows = query.view(-1, width, groups, heads // groups, dim)
    output = torch.zeros_like(rows)
    ends = indptr.tolist()
    for request, (first, end) in enumerate(itertools.pairwise(ends)):
        own, length = slots[first:end].long(), end - first
        scores = torch.einsum("wghd,ngd->ghwn", rows[request], keys[own].to(query.dtype)) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        row, token = torch.arange(width)[:, None], torch.arange(length)
        visible = (token <= length - width + row).to(query.device)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        weights = weights.masked_fill(~visible, 0)  # of a row without tokens, NaN
        output[request] = torch.einsum("ghwn,ngd->wghd", weights, values[own].to(query.dtype))
    return output.view(query.shape)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `rows @ weight.T + bias` in f32.

    Args:
        rows: [B, depth].
        weight: [features, depth].
        bias: [features].

    Returns:
        [B, features] f32.
    """
    return functional.linear(rows.float(), weight.float(), None if bias is None else bias.float())


def norm_and_rotate(
    heads: Tensor, weight: Tensor | None, epsilon: float, cos_sin: Tensor
) -> Tensor:
    """Return the RMS norm of each head, or the head itself, rotated by RoPE.

    Args:
        heads: [B, H, D].
        weight: [D], of the norm; None: no norm.
        epsilon: added to the mean square.
        cos_sin: [B, D], of each row's position: cosines, then sines, of the two halves' pairs.

    Returns:
        [B, H, D] f32; what is rotated has been rounded to the dtype of `heads`.
    """
    values = heads.float()
    if weight is not None:
        values *= (values.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.float()
    low, high = values.to(heads.dtype).float().chunk(2, -1)
    cosine, sine = cos_sin.float()[:, None].chunk(2, -1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless a value is an integer of at least `least`; True is no integer."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")


def _check(scores: Tensor, budget: int, recent_ratio: float, sinks: int) -> None:
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            "scores must be a float tensor [heads, length], "
            f"not {scores.dtype} of shape {list(scores.shape)}"
        )
    if not scores.isfinite().all():
        raise ValueError("scores must be finite, but some are NaN or infinite")
    if scores.numel() == 0:
        raise ValueError(f"scores must hold at least one token, not shape {list(scores.shape)}")
    check_integer("budget", budget, 1)
    check_integer("sinks", sinks, 0)
    if not _is_number(recent_ratio) or not 0 <= recent_ratio <= 1:
        raise ValueError(f"recent_ratio must be a number from 0 to 1, not {recent_ratio!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
