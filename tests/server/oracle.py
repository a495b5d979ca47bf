"""Independent sparse decode: Hugging Face transformers with an attention function of our own.

The oracle is written from the papers' definitions alone and shares no code with the package: a
server that agrees with it, token for token and set for set, is right for the right reason. Prefill
is dense; at decode, layers attend by their roles. One request at a time, fp32, greedy. The rivals'
sets come from `tests/kernels/make_vectors_rivals.py`, which works on plain lists.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

KeptSets = dict[tuple[int, int], tuple[tuple[int, ...], ...]]
"""(sequence length with the newest token, layer that selects) -> ascending positions kept, a list
for all heads, each KV head or each query head."""
Keep = Callable[[torch.Tensor, torch.Tensor, float, int], list[list[int]]]
"""Returns the kept positions for a query [H, D], keys [S, G, D], both after RoPE, the factor on q·k
and the layer."""


@dataclass(frozen=True)
class OracleRun:
    """Tokens of one request, and the kept sets that led to them."""

    tokens: tuple[int, ...]
    kept: KeptSets
    """Kept sets of sparse steps; a step within the budget has no entry."""


class Oracle:
    """Greedy decoding of one model under a policy; by default LessIsMore, where an empty
    `select_layers` means dense."""

    def __init__(
        self,
        model_path: Path,
        *,
        select_layers: Sequence[int],
        budget: int,
        recent_ratio: float = 0.25,
        sinks: int = 4,
        by_mass: bool = False,
        keep: Keep | None = None,
        picks: bool = False,
        pick_layers: Collection[int] = (),
        dense_layers: Collection[int] = (0, 1),
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self._select_layers = frozenset(select_layers)
        self._dense_layers = frozenset(dense_layers) - self._select_layers
        self._budget, self._recent_ratio, self._sinks = budget, recent_ratio, sinks
        self._by_mass = by_mass
        self._keep = keep or self._keep_unified
        self._picks, self._pick_layers = picks, frozenset(pick_layers)
        # [lists, n], of the nearest SELECT layer below, or of this layer; None for everything.
        self._set: torch.Tensor | None = None
        self._kept: KeptSets = {}
        name = f"lim_oracle_{id(self)}"
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, attn_implementation=name
        ).to(device)
        self._model.eval()
        self._steps: list[torch.Tensor] = []

    @torch.inference_mode()
    def generate(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        reprefill_at: Collection[int] = (),
        forced: Sequence[int] | None = None,
    ) -> OracleRun:
        """Decode `num_tokens` greedily, through end tokens.

        Args:
            reprefill_at: numbers of output tokens at which a server retracted the request: there
                the prompt and the output so far are prefilled again, densely.
            forced: tokens to feed in place of the generated ones.
        """
        self._kept = {}
        self._steps = []
        tokens: list[int] = []
        cache = None
        while len(tokens) < num_tokens:
            if len(tokens) in reprefill_at:
                cache = None
            fed = [*prompt, *tokens] if cache is None else tokens[-1:]
            ids = torch.tensor([fed], device=self._model.device)
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if cache is not None:
                self._steps.append(out.logits[0, -1])
            cache = out.past_key_values
            tokens.append(forced[len(tokens)] if forced else int(out.logits[0, -1].argmax()))
        return OracleRun(tuple(tokens), self._kept)

    def logits(self) -> torch.Tensor:
        """Return the logits of the last run's decode steps, [steps, vocabulary]."""
        return torch.stack(self._steps)

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, heads, new tokens, head_dim]
        key: torch.Tensor,  # [1, kv_heads, length, head_dim], newest token included
        value: torch.Tensor,  # as key
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Run the attention of one layer: [1, new tokens, heads, head_dim]."""
        layer = module.layer_idx
        if layer == 0:
            self._set = None
        is_decode = query.shape[2] == 1
        if is_decode and layer in self._select_layers:
            self._set = self._select(module, query, key)
        elif is_decode and layer not in self._dense_layers:
            if self._picks or layer in self._pick_layers:
                self._set = self._select(module, query, key)
            if self._set is not None:
                return self._attend_kept(module, query, key, value), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def _attend_kept(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attend head by head, each to its own list: [1, 1, heads, head_dim]."""
        assert self._set is not None
        heads, lists = query.shape[1], len(self._set)
        outputs = []
        for head in range(heads):
            kept, kv_head = self._set[head * lists // heads], head // module.num_key_value_groups
            scores = key[0, kv_head, kept] @ query[0, head, 0] * module.scaling
            outputs.append(torch.softmax(scores, 0) @ value[0, kv_head, kept])
        return torch.stack(outputs)[None, None]

    def _select(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the positions that are read, ascending int64 [lists, n]; None for all."""
        length = key.shape[2]
        if length <= self._budget:
            return None
        layer = module.layer_idx
        positions = self._keep(query[0, :, 0], key[0].transpose(0, 1), module.scaling, layer)
        self._kept[length, layer] = tuple(map(tuple, positions))
        return torch.tensor(positions, device=key.device)

    def _keep_unified(
        self, query: torch.Tensor, keys: torch.Tensor, scale: float, _layer: int
    ) -> list[list[int]]:
        scores = raw_scores(query, keys)
        if self._by_mass:  # one ranking, by what the heads' softmax gives each token together
            scores = torch.softmax(scores * scale, dim=1).sum(dim=0, keepdim=True)
        return [unified_set(scores, self._budget, self._recent_ratio, self._sinks)]


def raw_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return q·k without a scale, [heads, length].

    Products of fp16 are exact in f32, and would tie in fp16.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    own = keys.to(wide).repeat_interleave(query.shape[0] // keys.shape[1], dim=1)
    return torch.einsum("hd,shd->hs", query.to(wide), own)


def unified_set(scores: torch.Tensor, budget: int, recent_ratio: float, sinks: int) -> list[int]:
    """Return the ascending positions that one request keeps.

    Args:
        scores: [heads, length], of a request longer than the budget.
    """
    length = scores.shape[1]
    selected = int(budget * (1 - recent_ratio) + 1e-9)
    if selected == budget:  # the newest token is always kept
        sinks, selected, recent = 0, budget - 1, 1
    else:
        sinks = min(sinks, budget - selected - 1)
        recent = budget - selected - sinks
    # Stable: among equal scores the older token comes first.
    ranking = scores[:, sinks : length - recent].sort(dim=1, descending=True, stable=True).indices
    turns = (ranking[:, :selected].T + sinks).flatten()  # rank by rank, head by head
    chosen = islice(dict.fromkeys(turns.tolist()), selected)
    return sorted([*range(sinks), *chosen, *range(length - recent, length)])
