"""DELTA: a few layers select pages of tokens for the layers above them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lim_sglang.policies.policy import LayerInputs, SelectingPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.selector import Room, Selector

PAGE = 16
WINDOW_PAGES = 8


@dataclass(frozen=True, kw_only=True)
class Delta(SelectingPolicy):
    """Pages by the sum of their tokens' largest softmax weights, one set for all heads.

    Pages are counted by position, whatever SGLang's page size. Source: "DELTA: Dynamic Layer-Aware
    Token Attention for Efficient Long-Context Reasoning", arXiv 2510.09883.
    """

    title: ClassVar[str] = "DELTA"
    block: ClassVar[int] = PAGE
    merges_on_gpu: ClassVar[bool] = False
    """The kernels add up a page's largest weights before ranks could compare them."""

    def problems(self) -> list[str]:
        """Name a budget that is no number of pages, or leaves none to select."""
        least = PAGE * (WINDOW_PAGES + 1)
        if self.budget % PAGE == 0 and self.budget >= least:
            return []
        return [
            f"budget must be a multiple of {PAGE} of at least {least} under policy delta, whose "
            f"newest {WINDOW_PAGES} pages of {PAGE} tokens are always kept, not {self.budget}"
        ]

    @property
    def num_ranked(self) -> int:
        """Pages before the window."""
        return self.budget // PAGE - WINDOW_PAGES

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
        """Keep the newest pages and the others of largest score."""
        from lim_sglang.kernels.reference_rivals import keep_pages, page_mass

        scores = page_mass(parts.amax(dim=0), PAGE)[None]
        return keep_pages(scores, length, self.budget, PAGE, WINDOW_PAGES)

    def allocate(self, room: "Room") -> "Selector":
        """Allocate for masses of pages."""
        from lim_sglang.kernels.reference import BudgetSplit
        from lim_sglang.kernels.selector import MassSelector

        pages = self.budget // PAGE
        split = BudgetSplit(sinks=0, selected=pages - WINDOW_PAGES, recent=WINDOW_PAGES)
        return MassSelector.allocate(split, room, by_largest=True, page=PAGE)
