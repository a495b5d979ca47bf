"""Acceptance of lossless drafts on real texts, by budget, SELECT layers, ranking and position.

    python -m tests.soak.draft_acceptance OUT --model FOLDER --texts TEXTS --length 16384
        --budget 256,512,1024,2048 --layers 2,12 --layers 12 --ranking rank,mass

Teacher-forced: a cycle begins every few tokens of a text's end. Its lists are those that the dense
pass selects at the newest token with keys and values (`kernels/reference.py`). Its drafts read the
text's own tokens, so that one pass over all cycles computes what as many steps would, with keys and
values of their own for the drafts. A draft is accepted if the race (`reference_sampling.py`) picks
the same token by the draft's probabilities and by the dense ones. One JSON line is written for each
setting; texts are read as by `lim bench divergence`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lim_sglang.bench.divergence import load_tokenizer
from lim_sglang.bench.results import surroundings
from lim_sglang.bench.workloads import make_sequences, read_texts
from lim_sglang.kernels.reference import keep_tokens, softmax_mass, split_budget, topk_by_mass
from lim_sglang.kernels.reference_sampling import exponential_noise, hash_tokens, kept_tokens
from lim_sglang.policies.lossless import MAX_DRAFT_TOKENS, Lossless

RECENT_RATIO, SINKS = 0.25, 4
"""LessIsMore's defaults."""
TEMPERATURE, TOP_P = 0.6, 0.95
RACES = 8
"""Seeds by which each token is drawn."""
ROWS = 128
"""Places whose noise is made at once: [128, 152K] hashes of 8 bytes are 156 MB."""
ATTENTION = "draft_acceptance"
"""Name of this file's attention among those of transformers."""


@dataclass(frozen=True)
class Setting:
    """One way to choose the lists of drafts."""

    budget: int
    layers: tuple[int, ...]
    ranking: str
    """`rank` or `mass`."""


@dataclass
class Pass:
    """What attention does while the model runs over one part of a text."""

    visible: Callable[[int], Tensor] | None = None
    """From a layer, [T, S] bool: the keys that each query sees; None for causal attention."""
    starts: Tensor | None = None
    """[C] int64, rows of this pass whose scores are kept; None for none."""
    layers: tuple[int, ...] = ()
    """Layers that keep scores."""
    scores: dict[int, Tensor] = field(default_factory=dict)
    """[C, H, S] f32 by layer, raw q·k."""


class Attention:
    """Attention of a transformers model, with any token hidden from any query."""

    part = Pass()
    scale = 1.0
    """Factor on q·k before the softmax, as the model gave it last."""

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        """Attend: [1, H, T, D] queries, [1, G, S, D] keys and values; returns [1, T, H, D]."""
        part, layer, group = self.part, module.layer_idx, query.shape[1] // key.shape[1]
        self.scale = options["scaling"]
        keys, values = (each.repeat_interleave(group, dim=1) for each in (key, value))
        if part.starts is not None and layer in part.layers:
            rows = query[0, :, part.starts].float()
            part.scores[layer] = (rows @ keys[0].float().transpose(1, 2)).transpose(0, 1)
        new, length = query.shape[2], key.shape[2]
        visible = part.visible(layer) if part.visible else None
        if visible is None and new < length:
            visible = torch.ones(new, length, dtype=torch.bool, device=query.device)
            visible = visible.tril(length - new)
        output = functional.scaled_dot_product_attention(
            *(query, keys, values),
            attn_mask=visible,
            is_causal=visible is None,
            scale=self.scale,
        )
        return output.transpose(1, 2).contiguous(), None


def read_model(folder: str) -> tuple[Any, Attention]:
    """Load a model whose attention is ours, in 16 bits on a GPU."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    attention = Attention()
    AttentionInterface.register(ATTENTION, attention)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.set_attn_implementation(ATTENTION)
    return model.to("cuda" if on_gpu else "cpu"), attention


def lists_of(part: Pass, lengths: Tensor, setting: Setting, scale: float) -> dict[int, Tensor]:
    """Return for each SELECT layer which tokens the cycles' drafts keep, [C, S] bool.

    Args:
        lengths: [C] int64, tokens with keys and values when each cycle begins.
    """
    split = split_budget(setting.budget, RECENT_RATIO, SINKS)
    found = {}
    for layer in setting.layers:
        scores = part.scores[layer]
        kept = torch.zeros(scores.shape[0], scores.shape[2], dtype=torch.bool, device=scores.device)
        for row, length in enumerate(lengths.tolist()):
            own = scores[row, :, :length]
            if setting.ranking == "mass":
                kept[row, topk_by_mass(softmax_mass(own, scale), split)] = True
            else:
                kept[row, keep_tokens(own, split)] = True
        found[layer] = kept
    return found


class Text:
    """One text, of which the end is decoded densely."""

    def __init__(
        self, model: Any, attention: Attention, tokens: Tensor, layers: tuple[int, ...], cycles: int
    ) -> None:
        """Run the dense model over the text.

        Args:
            tokens: [S] int64.
            layers: those whose scores are kept where a cycle begins.
            cycles: of `MAX_DRAFT_TOKENS` drafts each, one behind the other at the end of the text.
        """
        from transformers import DynamicCache

        self._model, self._attention, self._cache = model, attention, DynamicCache()
        num_drafted = cycles * MAX_DRAFT_TOKENS
        context = len(tokens) - num_drafted - 1
        starts = torch.arange(0, num_drafted, MAX_DRAFT_TOKENS, device=tokens.device)
        self._drafted = tokens[context + 1 :]
        self._positions = torch.arange(context + 1, len(tokens), device=tokens.device)
        self.lengths = context + 1 + starts
        """[cycles] int64, tokens with keys and values when each cycle begins."""
        attention.part = Pass()
        model.model(tokens[None, :context], past_key_values=self._cache, use_cache=True)
        self.part = attention.part = Pass(starts=starts, layers=layers)
        positions = torch.arange(context, len(tokens), device=tokens.device)
        self._winners = self._draw(self._run(tokens[context:], positions)[1:])

    def accepted(self, lists: Sequence[Tensor]) -> Tensor:
        """Return which drafts are accepted, [RACES, cycles, drafts] bool.

        Args:
            lists: for each layer [cycles, S] bool, the tokens that the drafts of a cycle keep.
        """
        cycle = torch.arange(len(self._drafted), device=self._drafted.device) // MAX_DRAFT_TOKENS
        own = (cycle[:, None] == cycle[None, :]).tril()
        masks = {id(each): torch.cat([each[cycle], own], dim=1) for each in lists}
        self._attention.part = Pass(visible=lambda layer: masks[id(lists[layer])])
        winners = self._draw(self._run(self._drafted, self._positions))
        self._cache.crop(self._cache.get_seq_length() - len(self._drafted))
        return (winners == self._winners).view(RACES, len(self.lengths), MAX_DRAFT_TOKENS)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits behind tokens that follow the cached ones, [T, V]."""
        output = self._model(
            tokens[None], position_ids=positions[None], past_key_values=self._cache, use_cache=True
        )
        return output.logits[0]

    def _draw(self, logits: Tensor) -> Tensor:
        """Return the tokens that each race draws behind the drafted ones, [RACES, T] int64."""
        return torch.cat(
            [
                race_winners(logits[rows].float(), self._positions[rows])
                for rows in torch.arange(len(logits), device=logits.device).split(ROWS)
            ],
            dim=1,
        )


def race_winners(logits: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens that are drawn after each query, [RACES, T] int64.

    Args:
        logits: [T, V] f32.
        positions: [T] int64, of the queries.
    """
    probs = (logits / TEMPERATURE).softmax(-1)
    unlimited = torch.full_like(positions, probs.shape[-1] + 1)
    ones = torch.ones(len(probs), device=probs.device)
    probs.masked_fill_(~kept_tokens(probs, unlimited, TOP_P * ones, 0 * ones), 0.0)
    winners = []
    for seed in range(RACES):
        hashes = hash_tokens(torch.full_like(positions, seed), positions, probs.shape[-1])
        winners.append((probs / exponential_noise(hashes)).argmax(-1))
    return torch.stack(winners)


def measure(
    model: Any,
    attention: Attention,
    texts: Tensor,
    settings: Sequence[Setting],
    cycles: int,
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Yield the acceptance of each setting over all texts, [N, S] int64."""
    found: dict[Setting, list[Tensor]] = {setting: [] for setting in settings}
    layers = tuple(sorted({layer for setting in settings for layer in setting.layers}))
    depth = model.config.num_hidden_layers
    for number, tokens in enumerate(texts):
        text = Text(model, attention, tokens, layers, cycles)
        for setting in settings:
            kept = lists_of(text.part, text.lengths, setting, attention.scale)
            policy = Lossless(budget=setting.budget, select_layers=setting.layers)
            lists = [kept[setting.layers[each]] for each in policy.list_of_layer(depth)]
            found[setting].append(text.accepted(lists).cpu())
        sys.stderr.write(f"{number + 1} of {len(texts)} texts\n")
    for setting, accepted in found.items():
        steps = torch.stack(accepted).double()  # [N, RACES, cycles, drafts]
        whole = steps.cumprod(-1).mean((1, 2))  # [N, drafts]
        yield (
            setting,
            {
                "each": steps.mean((0, 1, 2)).tolist(),
                "all_up_to": whole.mean(0).tolist(),
                "accepted": {n: whole[:, :n].sum(1).tolist() for n in (4, 8, 12, 15)},
            },
        )


@torch.inference_mode()
def main() -> None:
    """Measure, and write a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT", help="JSON lines; lines are added")
    parser.add_argument("--model", required=True, help="the model's folder")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines, or a run's folder")
    parser.add_argument("--length", type=int, default=16384, help="tokens of a text")
    parser.add_argument("--count", type=int, default=6, help="texts")
    parser.add_argument("--cycles", type=int, default=64, help="cycles of a text")
    parser.add_argument("--seed", type=int, default=0, help="order of the texts")
    parser.add_argument("--budget", default="256,512,1024,2048")
    parser.add_argument("--layers", action="append", required=True, help="SELECT layers: 2,12")
    parser.add_argument("--ranking", default="rank,mass")
    given = parser.parse_args()
    encode, end_token, _ = load_tokenizer(given.model)
    model, attention = read_model(given.model)
    options = {"count": given.count, "length": given.length, "seed": given.seed}
    tokens = torch.tensor(
        make_sequences(read_texts(given.texts), encode, end_token, **options), device=model.device
    )
    settings = [
        Setting(int(budget), tuple(map(int, layers.split(","))), ranking)
        for budget, layers, ranking in product(
            given.budget.split(","), given.layers, given.ranking.split(",")
        )
    ]
    conditions = surroundings() | options | {"cycles": given.cycles, "texts": given.texts.name}
    conditions |= {"temperature": TEMPERATURE, "top_p": TOP_P, "races": RACES}
    for setting, result in measure(model, attention, tokens, settings, given.cycles):
        row = {"setting": asdict(setting)} | result | {"conditions": conditions}
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        means = {n: f"{sum(each) / len(each):.2f}" for n, each in result["accepted"].items()}
        sys.stdout.write(f"{setting}: accepted of {means}\n")


if __name__ == "__main__":
    main()
