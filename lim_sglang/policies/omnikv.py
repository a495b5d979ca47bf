"""OmniKV: a few layers select the tokens of largest attention for the layers above them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lim_sglang.policies.policy import LayerInputs, SelectingPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.selector import Room, Selector


@dataclass(frozen=True, kw_only=True)
class OmniKV(SelectingPolicy):
    """Tokens by the largest softmax weight that any head gives them, one set for all heads.

    Nothing is evicted or moved to the host, unlike in the paper. Source: Hao et al., "OmniKV:
    Dynamic Context Selection for Efficient Long-Context LLMs", ICLR 2025.
    """

    title: ClassVar[str] = "OmniKV"

    @property
    def weighs_by_softmax(self) -> bool:
        """True: tokens are compared across heads."""
        return True

    def part_of_rank(self, inputs: LayerInputs) -> "Tensor":
        """Return each token's largest softmax weight, [S]."""
        from lim_sglang.kernels.reference import score_tokens
        from lim_sglang.kernels.reference_rivals import max_mass

        return max_mass(score_tokens(inputs.query, inputs.keys), inputs.scale)

    def keep_by_parts(self, parts: "Tensor", length: int) -> "Tensor":
        """Keep the newest token and the others of largest weight."""
        from lim_sglang.kernels.reference_rivals import keep_by_max_mass

        return keep_by_max_mass(parts.amax(dim=0), self.budget)

    def allocate(self, room: "Room") -> "Selector":
        """Allocate for masses that are the largest weight of any head."""
        from lim_sglang.kernels.reference import split_budget
        from lim_sglang.kernels.selector import MassSelector

        return MassSelector.allocate(split_budget(self.budget, 0.0, 0), room, by_largest=True)
