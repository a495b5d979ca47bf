"""SeerAttention-R: a trained gate picks blocks in each layer, which reads only those."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lim_sglang.policies.policy import LayerInputs, Role, SharedBy, SparsePolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.reference_rivals import BlockGate
    from lim_sglang.kernels.selector import Room, Selector

BLOCK = 64
FEWEST_BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class Seer(SparsePolicy):
    """Blocks by the logits of a gate that was trained for the model.

    Source: Gao et al., "SeerAttention-R: Sparse Attention Adaptation for Long Reasoning",
    arXiv 2506.08889.
    """

    title: ClassVar[str] = "SeerAttention-R"
    block: ClassVar[int] = BLOCK
    reads_before_rope: ClassVar[bool] = True

    dense_layers: tuple[int, ...] = ()
    """Layers that always read the whole KV cache; the paper has none."""
    gate: str | None = None
    """Folder of the trained gate; needed."""

    def problems(self) -> list[str]:
        """Name a gate that is missing, and a budget that is no number of blocks, or of too few."""
        least, problems = BLOCK * FEWEST_BLOCKS, []
        if self.gate is None:
            problems.append(
                "policy seer needs a gate that was trained for the model: name its folder by "
                "--lim-gate, or train one by lim train-gate MODEL"
            )
        if self.budget % BLOCK or self.budget < least:
            problems.append(
                f"budget must be a multiple of {BLOCK} of at least {least} under policy seer, "
                f"not {self.budget}"
            )
        return problems

    def reasons_against_model(self, model_config: Any) -> list[str]:
        """List what keeps the gate from serving a model."""
        from lim_sglang.gates.files import reasons_against_gate

        return reasons_against_gate(self._folder, model_config)

    def digests(self) -> dict[str, str]:
        """Return the digest of the weights that serve."""
        return {"gate_sha256": _read(self._folder)[1]}

    @property
    def sharing(self) -> SharedBy:
        """The heads that read one list."""
        return SharedBy.KV_HEAD

    def summary_shape(self, num_kv_heads: int, head_dim: int) -> tuple[int, ...] | None:
        """Return the compressed key of each KV head."""
        return (num_kv_heads, head_dim)

    def roles(self, depth: int) -> tuple[Role, ...]:
        """Return PICK for all layers but the dense ones."""
        return self._all_but_dense(Role.PICK, depth)

    def keep(self, inputs: LayerInputs) -> "Tensor":
        """Keep the newest block and the others of largest logit."""
        from lim_sglang.kernels.reference_rivals import (
            gate_logits,
            keep_pages,
            rotate_back,
            summarize_blocks,
        )

        assert inputs.cos_sin is not None
        gate, length = _read(self._folder)[0][inputs.layer], inputs.keys.shape[0]
        gate = gate.of_rank(inputs.rank, inputs.num_ranks)
        table = inputs.cos_sin[:length]
        query = rotate_back(inputs.query[None], table[-1:])[0]
        summaries = summarize_blocks(rotate_back(inputs.keys, table), BLOCK)
        logits = gate_logits(query, summaries, gate, length - 1, table)
        return keep_pages(logits, length, self.budget, BLOCK)

    def allocate(self, room: "Room") -> "Selector":
        """Allocate for logits of blocks, and copy the gate to the GPU."""
        from lim_sglang.kernels.page_selector import GateSelector, ModelGates
        from lim_sglang.kernels.reference import BudgetSplit

        split = BudgetSplit(sinks=0, selected=self.num_ranked, recent=1)
        return GateSelector.allocate(split, room, ModelGates.load(_read(self._folder)[0], room))

    @property
    def _folder(self) -> Path:
        from lim_sglang.gates.files import folder_of

        return folder_of(self.gate or "")


@cache
def _read(folder: Path) -> "tuple[tuple[BlockGate, ...], str]":
    from lim_sglang.gates.files import read_gates_and_digest

    return read_gates_and_digest(folder)
