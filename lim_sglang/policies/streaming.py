"""StreamingLLM: the oldest tokens and the newest."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lim_sglang.policies.policy import SINKS, LayerInputs, Role, SparsePolicy, sinks_beyond

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.selector import Room, Selector


@dataclass(frozen=True, kw_only=True)
class Streaming(SparsePolicy):
    """Attention sinks and a window; which tokens are kept depends on the length alone.

    Keys keep the RoPE of their own positions and nothing is evicted, unlike in the paper's code.
    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    arXiv 2309.17453.
    """

    title: ClassVar[str] = "StreamingLLM"

    sinks: int = SINKS
    """Oldest tokens that are kept, as far as the budget leaves room for the newest."""
    dense_layers: tuple[int, ...] = ()
    """Layers that always read the whole KV cache."""

    def problems(self) -> list[str]:
        """Name sinks that leave no room for the newest token."""
        return sinks_beyond(self.sinks, self.budget - 1)

    @property
    def num_ranked(self) -> int:
        """Nothing."""
        return 0

    @property
    def needs_all_heads(self) -> bool:
        """False: no head is asked."""
        return False

    def roles(self, depth: int) -> tuple[Role, ...]:
        """Return REUSE: the tokens are known when the step begins."""
        return self._all_but_dense(Role.REUSE, depth)

    def keep(self, inputs: LayerInputs) -> "Tensor":
        """Keep sinks and window."""
        from lim_sglang.kernels.reference_rivals import keep_by_position

        device = inputs.keys.device
        return keep_by_position(inputs.keys.shape[0], self.budget, self.sinks, device)

    def allocate(self, room: "Room") -> "Selector":
        """Allocate nothing: the slots are copied from the dense plan."""
        from lim_sglang.kernels.reference import split_budget
        from lim_sglang.kernels.selector import WindowSelector

        return WindowSelector(split_budget(self.budget, 1.0, self.sinks))
