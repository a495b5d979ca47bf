"""The definitions of the rival policies' token selection, in plain torch.

A policy reads at most the budget in tokens per query head, and everything forced (sinks, window,
newest pages) is paid out of the budget. `reference.py` defines LessIsMore itself, and ranks tokens
and pages here too: larger score first, of equal scores the lower position, NaN last.

Shapes: H query heads, G KV heads, g = H / G (query head h belongs to KV head h // g), D head
dimension, S tokens of one request (newest included), K budget, b tokens of a page or block, n
pages: page j holds the positions [j · b, (j + 1) · b), so only the newest page may be partial.

A selection is [lists, n] int64, positions in ascending order, with one list for all heads, for
each KV head (G) or for each query head (H). A request with S <= K keeps everything in every list.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lim_sglang.kernels.reference import (
    BudgetSplit,
    check_integer,
    rank_tokens,
    score_tokens,
    split_budget,
)

GATE_NORM_EPS = 1e-6
"""Epsilon of the gate's RMSNorm, in the published code."""


def keep_by_position(
    length: int, budget: int, sinks: int = 4, device: torch.device | str | None = None
) -> Tensor:
    """Return the sinks and the newest tokens (StreamingLLM, arXiv 2309.17453).

    Keys keep the RoPE of their own positions.

    Args:
        length: tokens of the request (S).
        budget: most tokens to keep.
        sinks: oldest tokens that are kept; at most budget - 1 of them.

    Returns:
        [1, min(S, K)] int64.

    Raises:
        ValueError: an argument is no integer, or too small.
    """
    check_integer("length", length, 1)
    check_integer("budget", budget, 1)
    check_integer("sinks", sinks, 0)
    if length <= budget:
        return torch.arange(length, device=device)[None]
    return _ends(length, split_budget(budget, 1.0, sinks), device)[None]


def keep_per_head(scores: Tensor, budget_split: BudgetSplit) -> Tensor:
    """Return each head's own best tokens, its sinks and its newest tokens.

    TidalDecode (arXiv 2410.05076) is the split with no sinks and one recent token.

    Args:
        scores: [H, S] float, raw q·k.

    Returns:
        [H, min(S, K)] int64.
    """
    heads, length = scores.shape
    if length <= budget_split.budget:
        return torch.arange(length, device=scores.device).repeat(heads, 1)
    ranking = rank_tokens(scores[:, budget_split.sinks : length - budget_split.recent])
    chosen = ranking[:, : budget_split.selected] + budget_split.sinks
    ends = _ends(length, budget_split, scores.device).expand(heads, -1)
    return torch.cat([ends, chosen], dim=1).sort(dim=1).values


def keep_by_max_mass(mass: Tensor, budget: int) -> Tensor:
    """Return the newest token and the K - 1 others of largest `max_mass` (OmniKV).

    OmniKV is "OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs", ICLR 2025.

    Args:
        mass: [S] float, from `max_mass`.
        budget: most tokens to keep.

    Returns:
        [1, min(S, K)] int64.

    Raises:
        ValueError: the budget is no integer of at least 1.
    """
    check_integer("budget", budget, 1)
    return keep_per_head(mass[None], split_budget(budget, 0.0, 0))


def max_mass(scores: Tensor, scale: float) -> Tensor:
    """Compute each token's largest softmax weight over the heads.

    Args:
        scores: [H, S] float, raw q·k.
        scale: factor on q·k before the softmax.

    Returns:
        [S] float32, between 0 and 1.
    """
    return (scores.float() * scale).softmax(dim=-1).amax(dim=0)


def page_mass(mass: Tensor, block: int) -> Tensor:
    """Sum the mass of each page's tokens (DELTA, arXiv 2510.09883).

    DELTA selects by `keep_pages(page_mass(max_mass(scores, scale), 16)[None], …, 16, 8)`.

    Args:
        mass: [S] float, from `max_mass`.
        block: tokens of a page.

    Returns:
        [n] float32, the newest page included.
    """
    padded = functional.pad(mass.float(), (0, -mass.shape[0] % block))
    return padded.view(-1, block).sum(dim=1)


def summarize_pages(keys: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the elementwise least and most of the keys of each complete page (Quest).

    Args:
        keys: [S, G, D], after RoPE, as stored.
        block: tokens of a page.

    Returns:
        two tensors [S // b, G, D] in the keys' dtype, exact.
    """
    least, most = _complete_blocks(keys, block).aminmax(dim=1)
    return least.to(keys.dtype), most.to(keys.dtype)


def page_bounds(query: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Bound each page's q·k from above: the sum over d of max(q_d · least_d, q_d · most_d).

    Quest (arXiv 2406.10774) selects by `keep_pages` with `share_scores` of these bounds.

    Args:
        query: [H, D], after RoPE.
        least, most: [pages, G, D], from `summarize_pages`.

    Returns:
        [H, pages] float32.
    """
    # least <= most, so the larger product is with `most` where q_d >= 0, else with `least`.
    values = query.float()
    return score_tokens(values.clamp(min=0), most) + score_tokens(values.clamp(max=0), least)


def share_scores(scores: Tensor, shared_by: str, num_groups: int) -> Tensor:
    """Reduce the scores of query heads that read one list to their maximum.

    Args:
        scores: [H, pages] float.
        shared_by: `query_head`, `kv_head` or `all`, the heads that read one list.
        num_groups: number of KV heads (G), of which H is a multiple.

    Returns:
        [lists, pages]: H lists, G lists or one.

    Raises:
        ValueError: `shared_by` has another value.
    """
    if shared_by == "query_head":
        return scores
    if shared_by == "kv_head":
        group = scores.shape[0] // num_groups
        return scores.unflatten(0, (num_groups, group)).amax(dim=1)
    if shared_by == "all":
        return scores.amax(dim=0, keepdim=True)
    raise ValueError(f"shared_by must be query_head, kv_head or all, not {shared_by!r}")


def keep_pages(
    scores: Tensor, length: int, budget: int, block: int, forced_pages: int = 1
) -> Tensor:
    """Return the tokens of the newest pages and of the best others.

    K / b pages are kept, whole but for the newest, which ends with the newest token: where S > K
    a list has K - b + ((S - 1) mod b) + 1 tokens.

    Args:
        scores: [lists, pages] float, oldest page first, for at least the n - `forced_pages` pages
            that compete and at most all n; scores of forced pages are not read.
        length: tokens of the request (S).
        budget: most tokens to keep, a multiple of the block.
        block: tokens of a page.
        forced_pages: newest pages that are always kept, complete or not, out of the budget.

    Returns:
        [lists, tokens] int64.

    Raises:
        ValueError: an argument outside its range, a budget of fewer pages than are forced, or
            scores of another form.
    """
    _check_pages(scores, length, budget, block, forced_pages)
    lists, device = scores.shape[0], scores.device
    if length <= budget:
        return torch.arange(length, device=device).repeat(lists, 1)
    pages = _count_pages(length, block)
    ranking = rank_tokens(scores[:, : pages - forced_pages])
    chosen = ranking[:, : budget // block - forced_pages].sort(dim=1).values
    forced = torch.arange(pages - forced_pages, pages, device=device).expand(lists, -1)
    starts = torch.cat([chosen, forced], dim=1) * block
    positions = (starts[:, :, None] + torch.arange(block, device=device)).flatten(1)
    missing = pages * block - length  # tokens that the newest page does not have yet
    return positions[:, : budget - missing]


@dataclass(frozen=True, eq=False)
class BlockGate:
    """Trained gate of one layer (SeerAttention-R, arXiv 2506.08889), one for each KV head.

    Fields bear the published weights `attngate_linear_q`, `attngate_linear_k`, `attngate_qnorm`
    and `attngate_knorm`. The published gates rotate by the model's RoPE, so their size is D.

    Raises:
        ValueError: shapes that do not fit each other, with all reasons.
    """

    query_weight: Tensor
    """[G, g, D, D]: projects each query head of a group; the projections are summed."""
    key_weight: Tensor
    """[G, 3D, D]: projects the max, min and mean of a block's keys."""
    query_norm: Tensor | None = None
    """[D]: weight of the RMSNorm of projected queries."""
    key_norm: Tensor | None = None
    """[D]: weight of the RMSNorm of projected blocks."""
    block: int = 64
    """Tokens of a block."""

    def __post_init__(self) -> None:
        check_integer("block", self.block, 1)
        if self.query_weight.ndim != 4:
            shape = list(self.query_weight.shape)
            raise ValueError(f"query_weight must be [KV heads, group, D, D], not {shape}")
        groups, _, dim, gate_dim = self.query_weight.shape
        reasons = []
        if gate_dim != dim or dim % 2:
            reasons.append(
                f"query_weight must end in the model's head dimension twice, an even number, "
                f"not in {[dim, gate_dim]}"
            )
        expected = {
            "key_weight": [groups, 3 * dim, gate_dim],
            "query_norm": [gate_dim],
            "key_norm": [gate_dim],
        }
        for name, shape in expected.items():
            weight: Tensor | None = getattr(self, name)
            if weight is not None and list(weight.shape) != shape:
                reasons.append(f"{name} must be {shape}, not {list(weight.shape)}")
        if reasons:
            raise ValueError("the gate's weights do not fit: " + "; ".join(reasons))

    def of_rank(self, rank: int, num_ranks: int) -> "BlockGate":
        """Return the gate of one rank's KV heads, which lie in rank order."""
        weights = (self.query_weight, self.key_weight)
        own = [weight.chunk(num_ranks)[rank] for weight in weights]
        return replace(self, query_weight=own[0], key_weight=own[1])


def summarize_blocks(keys_before_rope: Tensor, block: int = 64) -> Tensor:
    """Return the max, min and mean of the keys of each complete block.

    Args:
        keys_before_rope: [S, G, D], from `rotate_back` where only rotated keys are stored.
        block: tokens of a block.

    Returns:
        [S // b, G, 3D] float32.
    """
    keys = _complete_blocks(keys_before_rope, block)
    least, most = keys.aminmax(dim=1)
    return torch.cat([most, least, keys.mean(dim=1)], dim=-1)


def compress_blocks(summaries: Tensor, gate: BlockGate, cos_sin: Tensor) -> Tensor:
    """Project, normalize and rotate the summaries of blocks; RoPE is at each block's first token.

    Args:
        summaries: [blocks, G, 3D], from `summarize_blocks`.
        cos_sin: [positions, D] float, as in `rotate`; row p belongs to position p.

    Returns:
        [blocks, G, D] float32, the compressed keys.
    """
    # [G, blocks, 3D] @ [G, 3D, D]
    projected = summaries.float().transpose(0, 1) @ gate.key_weight.float()
    compressed = _rms_norm(projected.transpose(0, 1), gate.key_norm)
    starts = torch.arange(summaries.shape[0], device=cos_sin.device) * gate.block
    return rotate(compressed, cos_sin[starts])


def project_query(
    query_before_rope: Tensor, gate: BlockGate, position: int, cos_sin: Tensor
) -> Tensor:
    """Project, sum over each group, normalize and rotate the query of the newest token.

    Args:
        query_before_rope: [H, D].
        position: S - 1.
        cos_sin: [positions, D] float, as in `rotate`; row p belongs to position p.

    Returns:
        [G, D] float32.
    """
    groups, _, dim, _ = gate.query_weight.shape
    # A sum over heads of projections is one product: [G, 1, g · D] @ [G, g · D, D].
    grouped = query_before_rope.float().reshape(groups, 1, -1)
    projected = grouped @ gate.query_weight.float().reshape(groups, -1, dim)
    normalized = _rms_norm(projected.transpose(0, 1), gate.query_norm)
    return rotate(normalized, cos_sin[position : position + 1])[0]


def gate_logits(
    query_before_rope: Tensor,
    summaries: Tensor,
    gate: BlockGate,
    position: int,
    cos_sin: Tensor,
) -> Tensor:
    """Compute the gate's logit of each block for each KV head.

    SeerAttention-R selects by `keep_pages` of these logits, one list for each KV head.

    Args:
        query_before_rope: [H, D], after q_norm where the model has one.
        summaries: [blocks, G, 3D], from `summarize_blocks`.
        position: S - 1, the query's position.
        cos_sin: [positions, D] float, as in `rotate`; row p belongs to position p.

    Returns:
        [G, blocks] float32.
    """
    compressed = compress_blocks(summaries, gate, cos_sin)
    return compressed_logits(query_before_rope, compressed, gate, position, cos_sin)


def compressed_logits(
    query_before_rope: Tensor,
    compressed: Tensor,
    gate: BlockGate,
    position: int,
    cos_sin: Tensor,
) -> Tensor:
    """Compute `gate_logits` of blocks that are compressed already.

    Args:
        query_before_rope: [H, D], after q_norm where the model has one.
        compressed: [blocks, G, D], from `compress_blocks`.
        position: S - 1, the query's position.
        cos_sin: [positions, D] float, as in `rotate`; row p belongs to position p.

    Returns:
        [G, blocks] float32.
    """
    query = project_query(query_before_rope, gate, position, cos_sin)
    return score_tokens(query, compressed) / math.sqrt(query.shape[1])


def rotate(vectors: Tensor, cos_sin: Tensor) -> Tensor:
    """Apply half-split RoPE in f32: the pairs are (d, d + D / 2).

    Args:
        vectors: [S, heads, D].
        cos_sin: [S, D] float, a row for each vector: D / 2 cosines, then D / 2 sines, each times
            YaRN's factor where the model has one (SGLang's `cos_sin_cache`).

    Returns:
        [S, heads, D] float32.
    """
    cos, sin = cos_sin.float()[:, None].chunk(2, dim=-1)
    first, second = vectors.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotate_back(keys: Tensor, cos_sin: Tensor) -> Tensor:
    """Undo `rotate` in f32.

    The result is divided by cos² + sin², which is 1 but for YaRN's factor (squared) and for the
    rounding of a table in 16 bits.

    Args:
        keys: [S, G, D], or queries [S, H, D], after RoPE.
        cos_sin: [S, D] float, as in `rotate`.

    Returns:
        [S, G, D] float32.
    """
    cos, sin = cos_sin.float().chunk(2, dim=-1)
    inverse = torch.cat([cos, -sin], dim=-1) / (cos.square() + sin.square()).repeat(1, 2)
    return rotate(keys, inverse)


def _ends(length: int, budget_split: BudgetSplit, device: torch.device | str | None) -> Tensor:
    """Return the positions of the sinks and of the newest tokens, [sinks + recent] int64."""
    newest = torch.arange(length - budget_split.recent, length, device=device)
    return torch.cat([torch.arange(budget_split.sinks, device=device), newest])


def _count_pages(length: int, block: int) -> int:
    return -(-length // block)


def _complete_blocks(keys: Tensor, block: int) -> Tensor:
    """Return the keys of the complete blocks in f32, [S // b, b, G, D]."""
    complete = keys.shape[0] // block
    return keys[: complete * block].float().view(complete, block, *keys.shape[1:])


def _rms_norm(values: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return values
    return functional.rms_norm(values, weight.shape, weight.float(), GATE_NORM_EPS)


def _check_pages(scores: Tensor, length: int, budget: int, block: int, forced_pages: int) -> None:
    check_integer("length", length, 1)
    check_integer("block", block, 1)
    check_integer("forced_pages", forced_pages, 1)
    check_integer("budget", budget, 1)
    if budget % block:
        raise ValueError(f"budget must be a multiple of {block} (block), not {budget}")
    least = forced_pages * block
    if budget < least:
        raise ValueError(
            f"budget must be at least {least}, which is {forced_pages} forced pages, not {budget}"
        )
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            "scores must be a float tensor [lists, pages], "
            f"not {scores.dtype} of shape {list(scores.shape)}"
        )
    most = _count_pages(length, block)
    if length > budget and not most - forced_pages <= scores.shape[1] <= most:
        raise ValueError(
            f"scores must be of {most - forced_pages} to {most} pages for {length} tokens, "
            f"not of {scores.shape[1]}"
        )
