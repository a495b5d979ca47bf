"""Independent lossless drafting: Hugging Face transformers with an attention function of our own.

Written from the definition alone, as `oracle.py`, whose sets it uses: one request at a time,
greedy.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.server.oracle import KeptSets, raw_scores, unified_set


@dataclass
class DraftRun:
    """Tokens of one request, and what its cycles did."""

    tokens: list[int]
    accepted: Counter[int] = field(default_factory=Counter)
    """Cycles by their accepted drafts."""
    sets: KeptSets = field(default_factory=dict)
    """(tokens with keys, SELECT layer) -> ascending positions that drafts read, but for drafts."""


class DraftOracle:
    """Greedy decoding of one model by cycles of drafts and a verification."""

    def __init__(
        self, model_path: Path, *, select_layers: Sequence[int], budget: int, num_drafts: int
    ) -> None:
        self._select_layers, self._budget, self._num_drafts = select_layers, budget, num_drafts
        self._queries: dict[int, torch.Tensor] = {}  # [heads, new tokens, D] of the last dense pass
        self._keys: dict[int, torch.Tensor] = {}  # [length, kv_heads, D] of the last pass
        self._lists: dict[int, list[int]] | None = None
        name = f"draft_oracle_{id(self)}"
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation=name
        ).eval()

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], num_tokens: int) -> DraftRun:
        """Decode at least `num_tokens` through end tokens; the run is cut there."""
        logits, cache = self._run(prompt, None)
        run, length, newest = DraftRun([int(logits[-1].argmax())]), len(prompt), -1
        while len(run.tokens) < num_tokens:
            lists = self._select(length, newest)
            fed = [run.tokens[-1]]
            if length > self._budget:
                run.sets |= {(length, layer): (tuple(kept),) for layer, kept in lists.items()}
                for step in range(self._num_drafts):
                    drafted = range(length, length + step + 1)
                    self._lists = {layer: [*kept, *drafted] for layer, kept in lists.items()}
                    logits, cache = self._run(fed[-1:], cache)
                    fed.append(int(logits[-1].argmax()))
                self._lists = None
                cache.crop(length)
            logits, cache = self._run(fed, cache)
            picks = logits.argmax(-1).tolist()
            right = [draft == pick for draft, pick in zip(fed[1:], picks, strict=False)]
            accepted = (*right, False).index(False)
            if len(fed) > 1:
                run.accepted[accepted] += 1
            run.tokens += picks[: accepted + 1]
            newest = accepted
            length += accepted + 1
            cache.crop(length)
        run.tokens = run.tokens[:num_tokens]
        return run

    def _run(self, fed: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
        out = self._model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        return out.logits[0], out.past_key_values

    def _select(self, length: int, newest: int) -> dict[int, list[int]]:
        """Choose what drafts read, by the query of the newest token that has keys.

        Args:
            newest: that token's place among those of the last dense pass.
        """
        if length <= self._budget:
            return {layer: list(range(length)) for layer in self._select_layers}
        scores = {
            layer: raw_scores(self._queries[layer][:, newest], self._keys[layer][:length])
            for layer in self._select_layers
        }
        return {n: unified_set(each, self._budget, 0.25, 4) for n, each in scores.items()}

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,  # [1, heads, new tokens, head_dim]
        key: torch.Tensor,  # [1, kv_heads, length, head_dim]
        value: torch.Tensor,  # as key
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        if self._lists is None:
            if layer in self._select_layers:
                self._queries[layer], self._keys[layer] = query[0], key[0].transpose(0, 1)
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        below = [each for each in self._select_layers if each <= layer]
        kept = self._lists[below[-1] if below else self._select_layers[0]]
        groups = module.num_key_value_groups
        chosen = key[0, :, kept].repeat_interleave(groups, 0)  # [heads, kept, D]
        scores = (chosen @ query[0, :, 0, :, None])[..., 0] * module.scaling
        read = value[0, :, kept].repeat_interleave(groups, 0)
        return (torch.softmax(scores, -1)[:, None] @ read).transpose(0, 1)[None], None
