"""Distillation of block gates from a model's own attention (SeerAttention-R, arXiv 2506.08889).

The model is frozen and runs densely. The gate of a layer learns to predict, for each KV head, how
the largest attention weights of the blocks compare. Hidden states do not depend on gates, so each
layer learns alone, from the queries and keys that a KV cache would hold.

Shapes: H query heads, G KV heads, g = H / G, D head dimension, S tokens of a text, B = S / 64
blocks, N queries.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional, init

from lim_sglang.errors import ModelError, bullets
from lim_sglang.gates.files import BLOCK, reasons_against_rotary_dim
from lim_sglang.kernels.reference import score_tokens
from lim_sglang.kernels.reference_rivals import (
    GATE_NORM_EPS,
    BlockGate,
    compress_blocks,
    gate_logits,
    keep_pages,
    page_bounds,
    rotate,
    rotate_back,
    share_scores,
    summarize_blocks,
    summarize_pages,
)

QUEST_PAGE = 16
"""Tokens of a page of Quest."""
MEASURED_QUERIES = 32
"""Queries of each text, in its second half, at which recall is measured."""
MODEL_TYPES = ("llama", "qwen2", "qwen3")
"""Architectures whose attention hands over queries and keys as this file expects."""
PEAK_RATE, LAST_RATE, WARM_UP = 1e-3, 1e-5, 20
"""Learning rates, and the steps until the peak."""
LOSS_SCALE = 10.0
SLICE_BYTES = 1 << 28
"""Most memory of the attention weights that are computed at once."""
_MOST_SHOWN = 8
"""Missing weights that one message lists."""
_OFF = -1e20
"""Logit of a block that does not compete; finite, so that zero times its logarithm is zero."""

LayerHook = Callable[[int, Tensor, Tensor, float], None]
"""Called with a layer, its queries [S, H, D] and keys [S, G, D] after RoPE, and the factor on q·k
before the softmax."""


@dataclass(frozen=True)
class Recall:
    """Shares of the true attention mass that sets of one size hold, means over layers."""

    budget: int
    """Tokens of a set."""
    queries: int
    """Queries, each of all heads and layers."""
    gate: float
    quest: float
    """Quest's pages, chosen for each KV head."""
    at_random: float
    """The gate's blocks, chosen at random."""


@dataclass(frozen=True)
class GateShape:
    """Sizes of a model that its gates depend on."""

    layers: int
    kv_heads: int
    group: int
    dim: int


class FrozenModel:
    """A dense model that shows the queries and keys of its attention layers.

    Raises:
        ModelError: the model cannot be loaded, or its gates could not be trained or served.
    """

    def __init__(self, source: str, config: Any, device: torch.device) -> None:
        """Load the weights, in bf16 on a GPU, else as stored.

        Args:
            source: what transformers loads, a folder or a hub id.
            config: from `load_config`.
            device: for weights and computation.
        """
        from transformers import AutoModel
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register("lim_watched", _watched_attention)
        self.config = config
        try:
            # Without the head on the vocabulary, which no gate needs.
            self._model, found = AutoModel.from_pretrained(
                source,
                dtype=torch.bfloat16 if device.type == "cuda" else "auto",
                attn_implementation="lim_watched",
                output_loading_info=True,
            )
        except Exception as error:  # noqa: BLE001 - damaged weights raise errors of many kinds
            raise ModelError(
                f"{source} cannot be loaded ({error}): fetch the model's files again"
            ) from None
        # transformers fills missing weights with random numbers.
        if missing := sorted(found["missing_keys"]):
            shown = bullets(missing[:_MOST_SHOWN])
            raise ModelError(
                f"{source} lacks {len(missing)} of its weights; fetch the model's files "
                f"again:{shown}"
            )
        self._model.eval().requires_grad_(False).to(device)
        attention = self._model.layers[0].self_attn
        groups = self.config.num_key_value_heads
        self.shape = GateShape(
            len(self._model.layers),
            groups,
            self.config.num_attention_heads // groups,
            attention.head_dim,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of queries and keys."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self._model.device
        return device

    @torch.no_grad()
    def watch(self, tokens: Tensor, hook: LayerHook) -> None:
        """Run the model on one text, [S] int, and show each layer's attention to a hook."""
        self._model(tokens[None].long().to(self.device), use_cache=False, layer_hook=hook)

    @torch.no_grad()
    def cos_sin(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return the model's RoPE table, rounded as a model of this dtype rounds it.

        Returns:
            [length, D] float32 as in `rotate`.
        """
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = self._model.rotary_emb(
            torch.empty(0, dtype=dtype, device=self.device), positions
        )
        half = cos.shape[-1] // 2
        return torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).float()


def load_config(source: str) -> Any:
    """Load the configuration of a model whose gates can be trained.

    Raises:
        ModelError: there is none, or attention is of another kind.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} cannot be loaded: {error}") from None
    if config.model_type not in MODEL_TYPES:
        raise ModelError(
            f"{source} is a {config.model_type} model: gates can be trained for "
            f"{', '.join(MODEL_TYPES)}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ModelError(
            f"{source} has layers of {', '.join(sorted(kinds))}: gates need full attention in all"
        )
    if reasons := reasons_against_rotary_dim(config):
        raise ModelError(f"{source} has no gate: {reasons[0]}")
    return config


def _watched_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layer_hook: LayerHook,
    **options: Any,
) -> tuple[Tensor, None]:
    """Show queries and keys, [1, heads, S, D] after RoPE, to the hook; then attend causally."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer_hook(
        module.layer_idx, query[0].transpose(0, 1), key[0].transpose(0, 1), options["scaling"]
    )
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return output


class GateTrainer:
    """The gates of all layers, in f32, their optimizer, and the steps that are done."""

    def __init__(self, model: FrozenModel, *, steps: int, length: int, seed: int) -> None:
        """Draw the gates' first weights from the seed.

        Args:
            model: the model whose gates are trained.
            steps: number of steps in all, which decides the learning rates.
            length: most tokens of a text (S).
            seed: of the first weights, and of random sets that recall is compared with.
        """
        self._model = model
        self._steps, self._seed = steps, seed
        self._applied = model.cos_sin(length, model.dtype)
        self._table = model.cos_sin(length, torch.float32)
        self.step = 0
        self.gates = _new_gates(model.shape, seed, model.device)
        self._optimizer = torch.optim.AdamW(
            [weight for gate in self.gates for weight in _weights(gate).values()],
            lr=PEAK_RATE,
            weight_decay=0.0,
        )

    def learn(self, tokens: Tensor) -> float:
        """Take one step on a text, [S] int; return the loss, summed over layers.

        Raises:
            ModelError: the loss is not finite; the gates are those of the step before.
        """
        losses = []

        def learn_layer(layer: int, queries: Tensor, keys: Tensor, scale: float) -> None:
            with torch.enable_grad():
                loss = LOSS_SCALE * self.loss(layer, queries, keys, scale)
                loss.backward()
            losses.append(loss.detach())

        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self._steps)
        self._optimizer.zero_grad()
        self._model.watch(tokens, learn_layer)
        loss = float(torch.stack(losses).sum())
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss of step {self.step + 1} is {loss}: check the model's weights for NaN "
                "and for values too large for their dtype; the last checkpoint is kept"
            )
        self._optimizer.step()
        self.step += 1
        return loss

    def loss(self, layer: int, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Compute the loss of one layer on the second half of a text's queries.

        Args:
            queries: [S, H, D], after RoPE.
            keys: [S, G, D], after RoPE.
            scale: factor on q·k before the softmax.
        """
        length = len(queries)
        positions = torch.arange(length // 2, length, device=queries.device)
        asking = queries[positions]
        with torch.no_grad():
            targets = attention_targets(asking, keys, positions, scale)
            before_rope = rotate_back(asking, self._applied[positions])
            summaries = summarize_blocks(rotate_back(keys, self._applied[:length]), BLOCK)
        logits = batched_logits(
            before_rope, summaries, self.gates[layer], positions, self._table[:length]
        )
        return distillation_loss(logits, targets, previous_blocks(positions, len(summaries)))

    @torch.no_grad()
    def finished_gates(self) -> tuple[BlockGate, ...]:
        """Return the gates in the model's dtype, as they are written."""
        gates = []
        for gate in self.gates:
            rounded: dict[str, Any] = {
                k: w.to(self._model.dtype) for k, w in _weights(gate).items()
            }
            gates.append(BlockGate(**rounded, block=gate.block))
        return tuple(gates)

    def state(self) -> dict[str, Any]:
        """Return all that a training needs to go on."""
        gates = [{k: w.detach() for k, w in _weights(gate).items()} for gate in self.gates]
        return {"step": self.step, "gates": gates, "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.step = state["step"]
        for gate, stored in zip(self.gates, state["gates"], strict=True):
            for name, weight in _weights(gate).items():
                weight.copy_(stored[name])
        self._optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def recall(self, texts: Sequence[Tensor], budget: int) -> Recall:
        """Measure the recall of the gates, as they are written, on texts of [S] int tokens."""
        gates = self.finished_gates()
        generator = torch.Generator().manual_seed(self._seed)
        found: list[tuple[float, float, float]] = []

        def measure(layer: int, queries: Tensor, keys: Tensor, scale: float) -> None:
            length, groups = len(keys), keys.shape[1]
            before_rope = rotate_back(queries, self._applied[:length])
            summaries = summarize_blocks(rotate_back(keys, self._applied[:length]), BLOCK)
            least, most = summarize_pages(keys, QUEST_PAGE)
            for position in measured_positions(length):
                size = position + 1
                blocks, pages = size // BLOCK, size // QUEST_PAGE
                logits = gate_logits(
                    before_rope[position], summaries[:blocks], gates[layer], position, self._table
                )
                bounds = page_bounds(queries[position], least[:pages], most[:pages])
                guesses = torch.rand(groups, blocks, generator=generator).to(keys.device)
                lists = (
                    keep_pages(logits, size, budget, BLOCK),
                    keep_pages(share_scores(bounds, "kv_head", groups), size, budget, QUEST_PAGE),
                    keep_pages(guesses, size, budget, BLOCK),
                )
                mass = (score_tokens(queries[position], keys[:size]) * scale).softmax(dim=-1)
                gate, quest, at_random = (kept_mass(mass, kept) for kept in lists)
                found.append((gate, quest, at_random))

        for tokens in texts:
            self._model.watch(tokens, measure)
        queries = sum(len(measured_positions(len(tokens))) for tokens in texts)
        return Recall(budget, queries, *(fmean(column) for column in zip(*found, strict=True)))


def _new_gates(shape: GateShape, seed: int, device: torch.device) -> tuple[BlockGate, ...]:
    """Draw gates with norms as published: Xavier's uniform weights, norms of one."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that no device changes them
    groups, dim = shape.kv_heads, shape.dim

    def parameter(*size: int) -> Tensor:
        weight = torch.ones(size)
        if len(size) > 1:
            init.xavier_uniform_(weight, generator=generator)
        return weight.to(device).requires_grad_()

    return tuple(
        BlockGate(
            query_weight=parameter(groups, shape.group, dim, dim),
            key_weight=parameter(groups, 3 * dim, dim),
            query_norm=parameter(dim),
            key_norm=parameter(dim),
            block=BLOCK,
        )
        for _ in range(shape.layers)
    )


def _weights(gate: BlockGate) -> dict[str, Tensor]:
    """Return a gate's weights by field."""
    named = ("query_weight", "key_weight", "query_norm", "key_norm")
    return {name: weight for name in named if (weight := getattr(gate, name)) is not None}


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0: linear to the peak, then half a cosine down."""
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(steps - WARM_UP, 1)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


def previous_blocks(positions: Tensor, blocks: int) -> Tensor:
    """Mark the blocks that compete for a query: those that end before the query's own block.

    Args:
        positions: [N] int, of the queries.
        blocks: number of blocks (B).

    Returns:
        [N, B] bool.
    """
    return torch.arange(blocks, device=positions.device) < positions[:, None] // BLOCK


def attention_targets(queries: Tensor, keys: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Compute the shares that the gate should predict.

    The share of a block is the largest softmax weight, over all keys up to the query, of its tokens
    in any head of the group; shares of previous blocks are normalized, others are zero.

    Args:
        queries: [N, H, D], after RoPE.
        keys: [S, G, D], after RoPE; S is a multiple of 64.
        positions: [N] int, of the queries.
        scale: factor on q·k before the softmax.

    Returns:
        [G, N, B] float32.
    """
    length, heads = len(keys), queries.shape[1]
    keys = keys.float().permute(1, 2, 0)[:, None]  # [G, 1, D, S]
    at_once = max(1, SLICE_BYTES // (4 * heads * length))
    slices = zip(queries.split(at_once), positions.split(at_once), strict=True)
    return torch.cat([_targets_of_slice(q, keys, p, scale) for q, p in slices], dim=1)


def _targets_of_slice(queries: Tensor, keys: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Compute `attention_targets` of some queries; keys are [G, 1, D, S] in f32."""
    # [G, g, N, D]
    grouped = queries.float().unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)
    length = keys.shape[-1]
    later = torch.arange(length, device=keys.device) > positions[:, None]
    weights = (grouped @ keys).mul_(scale).masked_fill_(later, -torch.inf).softmax(dim=-1)
    largest = weights.unflatten(-1, (-1, BLOCK)).amax(dim=(1, -1))  # [G, N, B]
    largest = largest * previous_blocks(positions, length // BLOCK)
    return largest / (largest.sum(dim=-1, keepdim=True) + 1e-9)


def batched_logits(
    queries_before_rope: Tensor,
    summaries: Tensor,
    gate: BlockGate,
    positions: Tensor,
    cos_sin: Tensor,
) -> Tensor:
    """Compute `gate_logits` of many queries, each with all blocks, whole or later ones, too.

    Args:
        queries_before_rope: [N, H, D].
        summaries: [B, G, 3D], from `summarize_blocks`.
        positions: [N] int, of the queries.
        cos_sin: [S, D] float, as in `rotate`; row p belongs to position p.

    Returns:
        [G, N, B] float32.
    """
    groups, group, dim, _ = gate.query_weight.shape
    # Sums over the heads of a group, [G, N, g · D] @ [G, g · D, D].
    grouped = queries_before_rope.float().reshape(-1, groups, group * dim).transpose(0, 1)
    projected = grouped @ gate.query_weight.float().reshape(groups, group * dim, dim)
    if gate.query_norm is not None:
        weight = gate.query_norm.float()
        projected = functional.rms_norm(projected, weight.shape, weight, GATE_NORM_EPS)
    asked = rotate(projected.transpose(0, 1), cos_sin[positions])  # [N, G, D]
    compressed = compress_blocks(summaries, gate, cos_sin)
    return asked.transpose(0, 1) @ compressed.permute(1, 2, 0) / math.sqrt(dim)


def distillation_loss(logits: Tensor, targets: Tensor, competing: Tensor) -> Tensor:
    """Compute KL(targets ‖ softmax of logits), its mean over all elements as published.

    Args:
        logits: [G, N, B] float.
        targets: [G, N, B] float, zero where a block does not compete.
        competing: [N, B] bool, the blocks of the softmax.
    """
    predicted = logits.masked_fill(~competing, _OFF).log_softmax(dim=-1)
    return functional.kl_div(predicted, targets, reduction="none").mean()


def measured_positions(length: int) -> range:
    """Return the positions of a text's second half at which recall is measured."""
    half = length // 2
    return range(length - 1, half - 1, -max(1, half // MEASURED_QUERIES))


def kept_mass(mass: Tensor, kept: Tensor) -> float:
    """Return the share of attention mass on kept tokens, the mean over heads.

    Args:
        mass: [H, S] float, softmax weights.
        kept: [G, K] int64, a list for each KV head.
    """
    grouped = mass.unflatten(0, (len(kept), -1))
    lists = kept[:, None].expand(-1, grouped.shape[1], -1)
    return float(grouped.gather(-1, lists).sum(dim=-1).mean())
