"""TidalDecode: two layers select tokens, each query head its own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lim_sglang.policies.policy import LayerInputs, SharedBy, SplitBudgetPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.selector import Room, Selector


@dataclass(frozen=True, kw_only=True)
class Tidal(SplitBudgetPolicy):
    """Each query head keeps the newest token and those that it scores highest.

    Sinks and a recency share are not the paper's; they tell LessIsMore's union of heads from its
    recency. Source: Yang et al., "TidalDecode", arXiv 2410.05076.
    """

    title: ClassVar[str] = "TidalDecode"

    recent_ratio: float = 0.0
    sinks: int = 0

    def problems(self) -> list[str]:
        """Name sinks for which the share has no room, or without a share."""
        if not self.sinks or self.recent_ratio:
            return super().problems()
        return [
            f"sinks are taken out of the recent share: policy tidal keeps {self.sinks} with a "
            "recent_ratio above 0 only, not 0"
        ]

    @property
    def sharing(self) -> SharedBy:
        """One list a query head."""
        return SharedBy.QUERY_HEAD

    def keep(self, inputs: LayerInputs) -> "Tensor":
        """Keep each head's own best tokens."""
        from lim_sglang.kernels.reference import score_tokens
        from lim_sglang.kernels.reference_rivals import keep_per_head

        return keep_per_head(score_tokens(inputs.query, inputs.keys), self.budget_split)

    def allocate(self, room: "Room") -> "Selector":
        """Allocate for a list each query head."""
        from lim_sglang.kernels.selector import HeadSelector

        return HeadSelector.allocate(self.budget_split, room)
